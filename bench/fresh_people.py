"""People in no pair that has been looked at, as a table of their own: who is left for a fresh test of the claims.

    python -m bench.fresh_people results/smollm2-135m results/smollm2-135m-quick

Takes the names out of step 01's prompts, pairs, quads and placebo pairs in these results (and those of `--seen`, people
of results that have been replaced since), and writes the others' rows of data/people.csv to data/people_fresh.csv. A
profile that asks the claims of them has

    people_file: data/people_fresh.csv
    story: {fresh: true, frozen: <what `python -m steps freeze` prints for it>}

and its page 10 refuses another set of thresholds and rules than the one it was first opened under. Single names of
these people may have been read in later steps (one-name prompts, prompts drawn for the rule), none in their pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
TABLES = ("pairs.parquet", "baselines.parquet", "baselines.*.parquet", "*placebo*.parquet")


def in_pairs(folders: Sequence[Path], names: set[str]) -> set[str]:
    """The names that stand in a cell of the tables of pairs in these results folders; an error where there is none."""
    out: set[str] = set()
    for folder in folders:
        files = sorted({path for pattern in TABLES for path in folder.glob(pattern)})
        if folder / "pairs.parquet" not in files:
            raise SystemExit(f"{folder} has no pairs.parquet: run its step 01 first")
        for path in files:
            table = pd.read_parquet(path)
            for column in table.select_dtypes(include=["object", "string", "category"]):
                out |= names & set(table[column].dropna().astype(str).str.split(", ").explode())
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="results folders whose people are seen")
    parser.add_argument("--people", type=Path, default=ROOT / "data" / "people.csv")
    parser.add_argument("--seen", type=Path, help="a CSV of further names, column `name`")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "people_fresh.csv")
    options = parser.parse_args(arguments)
    people = pd.read_csv(options.people, dtype=str, keep_default_na=False)
    seen = in_pairs(options.results, set(people["name"]))
    seen |= set(pd.read_csv(options.seen, dtype=str)["name"]) if options.seen else set()
    fresh = people[~people["name"].isin(seen)]
    fresh.to_csv(options.out, index=False, lineterminator="\n")
    each = ", ".join(f"{count} {superset}s" for superset, count in fresh["superset"].value_counts().items())
    print(f"{len(fresh)} of {len(people)} people are in no pair: {each}")


if __name__ == "__main__":
    main()
