"""A user's own pairs as the pairs table that every sweep reads. Bad input raises ValueError.

1. `read_pairs_file` checks the rows one by one and says what is wrong with which; `load_pairs_file` refuses these.
2. `clusters` finds pairs that share names, and `halves` splits the clusters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lib import questions, tasks
from lib.errors import Refusal
from lib.questions import Question, Template
from lib.tables import Faults, read_rows, unusable, wrong_name

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


NAMES = tuple(f"{side}_{slot}" for slot in tasks.SLOTS for side in ("clean", "corrupt"))


def clusters(pairs: pd.DataFrame, columns: Sequence[str] = NAMES) -> np.ndarray:
    """A cluster number per pair: pairs that share a name in the columns, directly or through other pairs, have the same
    one."""
    names = pairs[[*columns]].to_numpy()
    codes = pd.factorize(names.ravel())[0].reshape(names.shape) + len(pairs)
    rows = np.repeat(np.arange(len(pairs)), names.shape[1])[names.ravel() != ""]
    columns = codes.ravel()[names.ravel() != ""]
    shape = (int(codes.max()) + 1,) * 2
    _, found = connected_components(coo_matrix((np.ones(len(rows)), (rows, columns)), shape), directed=False)
    return found[: len(pairs)]


def check_halves(pairs: pd.DataFrame) -> None:
    """ValueError for a name that stands in pairs of both halves."""
    first, *rest = (set(part[[*NAMES]].to_numpy().ravel()) - {""} for _, part in pairs.groupby("half"))
    if shared := sorted(first.intersection(*rest)) if rest else []:
        raise Refusal(
            f"{shared[0]!r} is in pairs of both halves, and what is picked on one is reported on the other; give pairs "
            "that share a name one quad_id, or leave that column out"
        )


_REQUIRED = ("clean_a", "clean_b", "corrupt_a", "corrupt_b", "answer", "corrupt_answer")
_OPTIONAL = ("task", "template", "clean_c", "corrupt_c", "pair_id", "quad_id")


def load_pairs_file(path: str | Path, seed: int = 0, **asked: Any) -> pd.DataFrame:
    """The pairs table of `read_pairs_file`. ValueError naming every row that cannot be used."""
    table, faults = read_pairs_file(path, seed, **asked)
    if faults:
        raise Refusal(unusable(f"pairs_file {Path(path).name}", table, faults))
    return table.reset_index()


def read_pairs_file(
    path: str | Path,
    seed: int = 0,
    *,
    task: str | None = None,
    template: str | None = None,
    question: str | Question = questions.DEFAULT,
) -> tuple[pd.DataFrame, Faults]:
    """A user's own pairs (CSV or Parquet) as a pairs table, and what is wrong with rows that cannot be used.

    Columns clean_a, clean_b, corrupt_a, corrupt_b, answer, corrupt_answer (superset names; in odd_one_out the slot a, b
    or c); optionally task, template, clean_c, corrupt_c, pair_id, quad_id. Rows that name no task or template have
    those given here, else the first row's task and its first template; rows that name another are at fault. Without
    quad_id, pairs that share a name form one cluster. Clusters are split into halves at random by `seed`. Token counts
    are not known here, so `bucket` is the template alone; make_pair checks that the tokens line up.

    The index is where a row stands (see `lib.tables`). ValueError for what is wrong with the file as a whole.
    """
    path = Path(path)
    table, faults = read_rows(path, "pairs_file", _REQUIRED, _OPTIONAL)
    given, topic = set(table), questions.load(question)
    table = table.reindex(columns=[*_REQUIRED, *_OPTIONAL], fill_value="")
    by_template = table["template"].map(lambda name: topic.texts[name].task if name in topic.texts else "")
    asked = table["task"].where(table["task"].ne(""), by_template)
    task = task or next((own for own in asked if own), "superset")
    table["task"] = asked.where(asked.ne(""), task)
    table["template"] = table["template"].where(table["template"].ne(""), template or "")
    numbered = pd.Series([f"p{number:04d}" for number in range(len(table))], index=table.index)
    table["pair_id"] = table["pair_id"].where(table["pair_id"].ne(""), numbered)
    words = {name: _words(name, task, template, topic) for name in table["template"].unique()}
    for place, row in zip(table.index, table.to_dict("records"), strict=True):
        if place not in faults and (wrong := list(_row_faults(row, task, words[row["template"]]))):
            faults[place] = "; ".join(wrong)
    if "quad_id" not in given:
        table["quad_id"] = [f"cluster{number}" for number in clusters(table)]
    table["template"] = table["template"].map(lambda name: getattr(words[name], "name", name))
    faults = _repeated(table) | faults
    quads = list(dict.fromkeys(table["quad_id"]))
    half = dict(zip(quads, halves([()] * len(quads), np.random.default_rng(seed)), strict=True))
    return table.assign(half=table["quad_id"].map(half), bucket=table["template"]), faults


def _words(name: str, task: str, asked: str | None, topic: Question) -> Template | str:
    """The template of rows that name this one ("" for the task's first), or why they cannot have it."""
    first = next((own.name for own in topic.of_task(task)), "")
    try:
        words = topic.find(name or first, task)
        wanted = topic.find(asked, task) if asked else words
    except ValueError as error:
        return str(error)
    if words.text != wanted.text or words.form != wanted.form:
        return f"template {name!r} is not the one of the parameters, {asked!r}: give that one, or leave the column out"
    return wanted


def _row_faults(row: Mapping[str, str], task: str, words: Template | str) -> Iterator[str]:
    """What is wrong with a row of a pairs_file, without regard to tokens."""
    if row["task"] not in tasks.TASKS:
        yield f"task {row['task']!r} is unknown; allowed: {', '.join(tasks.TASKS)}"
        return
    if row["task"] != task:
        yield f"task {row['task']!r} is not that of the parameters or of the rows before, {task!r}"
        return
    if isinstance(words, str):
        yield words
        return
    for column in NAMES:
        name, needed = row[column], column[-1] in words.slots
        if needed and not name:
            yield f"{column} is empty; task {task} needs the names {', '.join(words.slots)} of both sides"
        elif name and not needed:
            yield f"{column} is {name!r}, and task {task} has the names {', '.join(words.slots)} alone"
        elif wrong := wrong_name(name):
            yield f"{column} {name!r} {wrong}"
    for side in ("clean", "corrupt"):
        names = [row[f"{side}_{slot}"] for slot in words.slots]
        if twice := next((name for name in names if name and names.count(name) > 1), None):
            yield f"{side}: {twice!r} stands there twice; a prompt has different names"
    allowed = words.slots if task == "odd_one_out" else words.question.supersets
    for column in ("answer", "corrupt_answer"):
        if row[column] not in allowed:
            yield f"{column} {row[column]!r} is unknown; allowed: {', '.join(allowed)}"
    if row["answer"] == row["corrupt_answer"]:
        yield f"answer and corrupt_answer are both {row['answer']!r}; they must differ"


def _repeated(table: pd.DataFrame) -> Faults:
    """Rows that say again what an earlier one says, or that lack what tells them apart."""
    faults: Faults = {}
    for columns, said in (
        ([*NAMES, "task", "template"], "the same names as {place}, with other answers"),
        ([*NAMES, "answer", "corrupt_answer", "task", "template"], "the same pair as {place}"),
        (["pair_id"], "pair_id {value!r} is that of {place}, too"),
    ):
        first = table.groupby(columns, sort=False).ngroup()
        places = table.index.to_series().groupby(first.to_numpy()).transform("first")
        for place in table.index[table.duplicated(columns)]:
            earlier = f"{table.index.name} {places[place]}"
            faults[place] = said.format(value=table.at[place, columns[0]], place=earlier)
    for place in table.index[table["quad_id"].eq("")]:
        faults[place] = "quad_id '' is empty; give every pair one, or leave the column out"
    return faults
