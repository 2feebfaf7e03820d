"""People in no pair that has been looked at, as a table of their own: who is left for a fresh test of the claims.

    python -m bench.fresh_people results/smollm2-135m-quick --quads results/smollm2-135m

(With `--people data/people_fresh.csv` and results of a later state, whoever has been seen by then leaves the table.)

Takes the names out of the pairs of these results (those of quads, placebo pairs, pairs before any selection), of the
quads' pairs alone in the folders after `--quads`, and of `--seen`, a table of further names, such as those of results
that have been replaced since. The others' rows of data/people.csv go to data/people_fresh.csv, for the profile
smollm2-135m-fresh.

The people do not suffice for more: the two profiles' placebo pairs and unselected pairs would leave some 1,300
people, too few for 24 quads in each half, whereas the 2,013 give 25 and 26 (and of placebo quads, which need people
of two regions, 4 in each, so what rests on them stays untested). So names of fresh people may have been in placebo or
unselected pairs of the default profile, in pairs of states of the repository in which quads were drawn by other
rules, in prompts in which nothing was patched, and (those of two supersets) in the controls of step 07. Claims on
such prompts are not decided by them (`steps.story.fresh`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
QUADS, PAIRS = ("pairs.parquet",), ("pairs.parquet", "placebo.parquet", "baselines.unselected.parquet")


def in_pairs(folders: Sequence[Path], names: set[str], tables: Sequence[str]) -> set[str]:
    """The names that stand in a cell of these tables of the results folders; an error where there are no pairs."""
    out: set[str] = set()
    for folder in folders:
        if not (folder / "pairs.parquet").is_file():
            raise SystemExit(f"{folder} has no pairs.parquet: run its step 01 first")
        for path in (folder / name for name in tables if (folder / name).is_file()):
            table = pd.read_parquet(path)
            for column in table.select_dtypes(include=["object", "string", "category"]):
                out |= names & set(table[column].dropna().astype(str).str.split(", ").explode())
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="results folders whose people are seen")
    parser.add_argument("--people", type=Path, default=ROOT / "data" / "people.csv")
    parser.add_argument(
        "--quads", nargs="+", type=Path, default=(), help="results folders whose quads' people are seen"
    )
    parser.add_argument("--seen", type=Path, help="a CSV of further names, column `name`")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "people_fresh.csv")
    options = parser.parse_args(arguments)
    people = pd.read_csv(options.people, dtype=str, keep_default_na=False)
    names = set(people["name"])
    seen = in_pairs(options.results, names, PAIRS) | in_pairs(options.quads, names, QUADS)
    seen |= set(pd.read_csv(options.seen, dtype=str)["name"]) if options.seen else set()
    fresh = people[~people["name"].isin(seen)]
    fresh.to_csv(options.out, index=False, lineterminator="\n")
    each = ", ".join(f"{count} {superset}s" for superset, count in fresh["superset"].value_counts().items())
    print(f"{len(fresh)} of {len(people)} people are in none of these pairs: {each}")


if __name__ == "__main__":
    main()
