"""A user's own pairs as the pairs table that every sweep reads. Bad input raises ValueError.

1. `load_pairs_file` reads and checks them.
2. `clusters` finds those that share names, and `halves` splits the clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lib import questions, tasks

HALVES = ("discovery", "confirmation")


def halves(strata: Sequence[tuple], rng: Any) -> list[str]:
    """A half for each item, at random, such that each stratum, each part of it, and the whole are split evenly."""
    counts: dict[Any, int] = {}
    chosen = [""] * len(strata)
    for index in rng.permutation(len(strata)):
        levels = [strata[index], *enumerate(strata[index]), "all"]
        sizes = [(*(counts.get((level, half), 0) for level in levels), rng.random(), half) for half in HALVES]
        chosen[index] = min(sizes)[-1]
        for level in levels:
            counts[level, chosen[index]] = counts.get((level, chosen[index]), 0) + 1
    return chosen


def clusters(pairs: pd.DataFrame) -> np.ndarray:
    """A cluster number per pair: pairs that share a name, directly or through other pairs, have the same one."""
    names = pairs[[f"{side}_{slot}" for side in ("clean", "corrupt") for slot in "abc"]].to_numpy()
    codes = pd.factorize(names.ravel())[0].reshape(names.shape) + len(pairs)
    rows = np.repeat(np.arange(len(pairs)), names.shape[1])[names.ravel() != ""]
    columns = codes.ravel()[names.ravel() != ""]
    shape = (int(codes.max()) + 1,) * 2
    _, found = connected_components(coo_matrix((np.ones(len(rows)), (rows, columns)), shape), directed=False)
    return found[: len(pairs)]


_REQUIRED = ("clean_a", "clean_b", "corrupt_a", "corrupt_b", "answer", "corrupt_answer")
_OPTIONAL = ("task", "template", "clean_c", "corrupt_c", "pair_id", "quad_id")


def read_table(path: Path, what: str, required: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV (every cell as text) or Parquet file with these columns, and at least one row."""
    if not path.is_file():
        raise ValueError(f"{what} {str(path)!r} does not exist")
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"{what} {str(path)!r} must end in .csv or .parquet")
    try:
        csv = path.suffix == ".csv"
        table = pd.read_csv(path, dtype=str, keep_default_na=False) if csv else pd.read_parquet(path)
    except ValueError as error:
        raise ValueError(f"{what} {str(path)!r} is not a readable table, or empty: {error}") from None
    missing = [column for column in required if column not in table]
    unknown = [column for column in table if column not in (*required, *optional)]
    if missing or unknown:
        besides = f", allowed besides {', '.join(optional)}" if optional else ""
        wrong = f"missing columns {missing}, unknown columns {unknown}"
        raise ValueError(f"{what} {path.name}: {wrong}; needed are {', '.join(required)}{besides}")
    if not len(table):
        raise ValueError(f"{what} {path.name} has no rows")
    return table


def load_pairs_file(path: str | Path, seed: int = 0, question: str = questions.DEFAULT) -> pd.DataFrame:
    """A user's own pairs (CSV or Parquet) as a pairs table.

    Columns clean_a, clean_b, corrupt_a, corrupt_b, answer, corrupt_answer (superset names; in odd_one_out the slot a, b
    or c); optionally task, template, clean_c, corrupt_c, pair_id, quad_id. Without quad_id, pairs that share a name
    form one cluster. Clusters are split into halves at random by `seed`. Token counts are not known here, so `bucket`
    is the template alone; make_pair checks that the tokens line up.

    Raises ValueError naming the column, the row (the header is row 1) and what is allowed.
    """
    path = Path(path)
    table = read_table(path, "pairs_file", _REQUIRED, _OPTIONAL)
    table = table.fillna("").astype(str).apply(lambda column: column.str.strip())
    given, topic = table.columns, questions.load(question)
    table = table.reindex(columns=[*_REQUIRED, *_OPTIONAL], fill_value="")
    rows = [
        _own_pair(row, f"pairs_file {path.name}, row {i + 2}", i, topic)
        for i, row in enumerate(table.to_dict("records"))
    ]
    table = pd.DataFrame(rows)
    for column in ("pair_id", *(["quad_id"] if "quad_id" in given else [])):
        empty_or_twice = table[column].eq("") | (table[column].duplicated() & (column == "pair_id"))
        if empty_or_twice.any():
            row = int(np.argmax(empty_or_twice))
            raise ValueError(
                f"pairs_file {path.name}, row {row + 2}: {column} {table[column][row]!r} is empty or not unique"
            )
    if "quad_id" not in given:
        table["quad_id"] = [f"cluster{number}" for number in clusters(table)]
    quads = list(dict.fromkeys(table.quad_id))
    half = dict(zip(quads, halves([()] * len(quads), np.random.default_rng(seed)), strict=True))
    return table.assign(half=table.quad_id.map(half), bucket=table.template)


def _own_pair(row: dict[str, str], where: str, number: int, topic: questions.Question) -> dict[str, str]:
    """One row of a pairs_file, checked and filled."""
    named = topic.texts.get(row["template"])
    task = row["task"] or (named.task if named else "superset")
    if task not in tasks.TASKS:
        raise ValueError(f"{where}: task {task!r} is unknown; allowed: {', '.join(tasks.TASKS)}")
    try:
        words = topic.find(row["template"] or next((one.name for one in topic.of_task(task)), ""), task)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    allowed = words.slots if task == "odd_one_out" else topic.supersets
    for column in [f"{side}_{slot}" for slot in words.slots for side in ("clean", "corrupt")]:
        if not row[column]:
            needed = f"task {task} needs the names {', '.join(words.slots)} of both sides"
            raise ValueError(f"{where}: {column} is empty; {needed}")
    for column in ("answer", "corrupt_answer"):
        if row[column] not in allowed:
            raise ValueError(f"{where}: {column} {row[column]!r} is unknown; allowed: {', '.join(allowed)}")
    return row | {"task": task, "template": words.name, "pair_id": row["pair_id"] or f"p{number:04d}"}
