"""People in no pair that has been looked at, as a table of their own: who is left for a fresh test of the claims.

    python -m bench.fresh_people results/smollm2-135m results/smollm2-135m-quick

Takes the names out of the pairs that these results are about: pairs.parquet, placebo.parquet, and the pairs before any
selection (`--patched`: without these last, of which later steps patch only the slice). People of `--seen`, a table of
further names, go as well: those of results that have been replaced since. The others' rows of data/people.csv are
written to data/people_fresh.csv, for the profile smollm2-135m-fresh.

Single names of these people, or pairs of theirs, may have been read in prompts in which nothing was patched (accuracies
in step 01, one-name prompts, prompts drawn for the rule, training prompts of autoencoders): the people do not suffice
to keep them out of those, too. What is printed says how many are left of each superset; as a model knows six in ten of
them, a quarter of those of a superset end up in quads at most.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
PATCHED, SELECTED_BY_NOTHING = ("pairs.parquet", "placebo.parquet"), "baselines.unselected.parquet"


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
    parser.add_argument("--patched", action="store_true", help="people of pairs before any selection may be fresh")
    parser.add_argument("--seen", type=Path, help="a CSV of further names, column `name`")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "people_fresh.csv")
    options = parser.parse_args(arguments)
    people = pd.read_csv(options.people, dtype=str, keep_default_na=False)
    tables = PATCHED if options.patched else (*PATCHED, SELECTED_BY_NOTHING)
    seen = in_pairs(options.results, set(people["name"]), tables)
    seen |= set(pd.read_csv(options.seen, dtype=str)["name"]) if options.seen else set()
    fresh = people[~people["name"].isin(seen)]
    fresh.to_csv(options.out, index=False, lineterminator="\n")
    each = ", ".join(f"{count} {superset}s" for superset, count in fresh["superset"].value_counts().items())
    print(f"{len(fresh)} of {len(people)} people are in none of these pairs: {each}")


if __name__ == "__main__":
    main()
