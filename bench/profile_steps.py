"""Where the time of a finished book goes, step by step, from its executed notebooks and run records.

    python -m bench.profile_steps [--profile smollm2-135m]

Nothing is run: papermill notes what each cell took, and each table what its work units took. Per step, in seconds: all
of it; starting (kernel, imports, keys); computing the work units (the model is loaded in the first one); and the rest:
prompts, joining and reading tables, statistics, figures. Steps whose results were there before are left out: they were
only drawn. Written to bench/results/profile.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from pipeline import keys, params
from steps.registry import PLAN

RESULT = Path(__file__).parent / "results" / "profile.json"


def step_times(notebook: Path, record: dict) -> dict[str, float] | None:
    """One step's seconds; None where the notebook took less than the work units did: they were computed before."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    cells = [cell["metadata"].get("papermill", {}).get("duration") or 0.0 for cell in content["cells"]]
    first = next(i for i, cell in enumerate(content["cells"]) if 'begin("' in "".join(cell["source"]))
    whole = content["metadata"]["papermill"]["duration"]
    start = whole - sum(cells) + sum(cells[: first + 1])
    rest = whole - start - record["seconds"]
    if rest < 0:
        return None
    return {"all": whole, "starting": start, "computing": record["seconds"], "the rest": rest}


def main() -> None:
    """Read, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="smollm2-135m")
    profile = parser.parse_args().profile
    rows, about = {}, {}
    for step in PLAN.names:
        page = params.ROOT / "build" / profile / "executed" / f"{PLAN.page(step)}.ipynb"
        given = params.validate(PLAN.sections, step, params.load_profile(profile))
        record = json.loads((keys.results_folder(given) / f"{step}.run.json").read_text(encoding="utf-8"))
        about = {key: record[key] for key in ("machine", "versions", "commit", "dirty")}
        if times := step_times(page, record):
            rows[PLAN.page(step)] = times
    table = pd.DataFrame(rows).T
    table.loc["all steps"] = table.sum()
    for part in ("starting", "computing", "the rest"):
        table[f"{part}, share"] = (table[part] / table["all"]).round(3)
    print(table.round(3).to_string())
    RESULT.parent.mkdir(exist_ok=True)
    result = about | {"profile": profile, "seconds": table.round(3).to_dict("index")}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
