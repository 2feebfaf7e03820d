"""What this Python lacks of what the measurements on a card need, and which of the wheels at hand fill the gap.

    python -m bench.lacking --wheels .whl             # the files that are to be installed
    python -m bench.lacking --import bench.scale_70b  # what is still missing: exit status 2 and what to do about it

A wheel is wanted where its package is not there, or is of a version that another of the wheels does not go with.
"""

from __future__ import annotations

import argparse
import email
import sys
import zipfile
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MODULES = (
    "accelerate",
    "bitsandbytes",
    "jaxtyping",
    "numpy",
    "pandas",
    "pandera",
    "psutil",
    "pyarrow",
    "pydantic",
    "pytest",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
    "typeguard",
    "typing_inspect",
    "yaml",
)


def missing(modules: Sequence[str] = MODULES) -> list[str]:
    """Those of the modules that cannot be found; nothing is imported."""
    return [name for name in modules if find_spec(name) is None]


def described(wheels: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """File, package and requirements of every wheel in a folder."""
    for path in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(path) as file:
            own = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
            head = email.message_from_bytes(file.read(own))
        yield path, head["Name"], head.get_all("Requires-Dist") or []


def wanted(wheels: Path) -> list[Path]:
    """The wheels to install."""
    found = list(described(wheels))
    asked: dict[str, list[Requirement]] = {}
    for _, _, lines in found:
        for needed in map(Requirement, lines):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                asked.setdefault(canonicalize_name(needed.name), []).append(needed)
    out = []
    for path, name, _ in found:
        try:
            here = metadata.version(name)
        except metadata.PackageNotFoundError:
            here = None
        if here is None or any(here not in need.specifier for need in asked.get(canonicalize_name(name), [])):
            out.append(path)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="folder of the wheels to choose from")
    parser.add_argument("--import", dest="module", help="a module to import, as the last proof")
    asked = parser.parse_args(arguments)
    if asked.wheels:
        print(*wanted(asked.wheels), sep="\n")
        return 0
    if names := missing():
        version = ".".join(map(str, sys.version_info[:2]))
        print(
            f"error: this Python ({version}) lacks {', '.join(names)}; `make wheels`, on a machine with network, puts "
            "what an image with torch and transformers lacks into .whl/ (for Python 3.12 on Linux, x86-64)",
            file=sys.stderr,
        )
        return 2
    if asked.module:
        import_module(asked.module)
    return 0


if __name__ == "__main__":
    sys.exit(main())
