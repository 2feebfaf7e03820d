"""Build a planted model: `python -m planted "planted:seed=3,rule=or" --to FOLDER`; its truth is in truth.json there."""

import argparse
import sys
from pathlib import Path

from lib.errors import Refusal
from planted import build
from planted.options import Options, parse


def main() -> int:
    """The exit status."""
    about = [f"{name}: {field.description} (default {field.default})" for name, field in Options.model_fields.items()]
    parser = argparse.ArgumentParser(
        prog="python -m planted",
        description=__doc__,
        epilog="\n".join(about),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("spec", help="planted:name=value,...")
    parser.add_argument("--to", required=True, type=Path, help="the folder to make")
    options = parser.parse_args()
    try:
        chosen = parse(options.spec)
        if options.to.exists():
            raise Refusal(f"{options.to} is there already; name a folder that is not")
        found = build.write(chosen, options.to)
    except (Refusal, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.to}: {len(found.sites)} sites, a gap of {found.gap.mean:.3g} logits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
