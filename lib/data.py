"""A user's own pairs as the pairs table that every sweep reads. Bad input raises ValueError.

1. `read_table` reads a CSV or Parquet file with the line of every row.
2. `read_pairs_file` checks the rows one by one and says what is wrong with which; `load_pairs_file` refuses these.
3. `clusters` finds pairs that share names, and `halves` splits the clusters.
"""

from __future__ import annotations

import csv
import io
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

HALVES = ("discovery", "confirmation")
SHOWN = 500  # rows that are named in one message


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
_NAMES = tuple(f"{side}_{slot}" for slot in tasks.SLOTS for side in ("clean", "corrupt"))
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_QUOTES = "\"'\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb"  # straight and typographic ones
_JOINERS = str.maketrans("", "", "\u200c\u200d")  # invisible, and part of Persian and Indic spelling

Faults = dict[int, str]  # by line: what is wrong with a row


def read_table(path: Path, what: str, required: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV (every cell as text, without spaces around it) or Parquet file with these columns, and at least one row.

    The index is where a row stands: `line` of the CSV, empty ones counted; `row` of the Parquet file, from 1.
    ValueError for a file that is not one, with every line that has more or fewer cells than the header.
    """
    table, faults = _read(path, what, required, optional)
    if faults:
        raise Refusal(unusable(f"{what} {path.name}", table, faults))
    return table


def unusable(what: str, table: pd.DataFrame, faults: Mapping[int, str]) -> str:
    """Every row that cannot be used, with its place and the reason, a line each if there are several."""
    hint = "; `make pairs` puts names of equal token counts together" if "token counts" in str(faults) else ""
    rows = [f"  {table.index.name} {place}: {faults[place]}" for place in sorted(faults)]
    if len(rows) == 1:
        return f"{what}, {rows[0].strip()}{hint}"
    more = [f"  and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    return "\n".join([f"{what}: {len(rows)} of {len(table)} rows cannot be used{hint}", *rows[:SHOWN], *more])


def _read(path: Path, what: str, required: Sequence[str], optional: Sequence[str]) -> tuple[pd.DataFrame, Faults]:
    """A table and what is wrong with the number of cells in its rows."""
    kind = path.suffix.lower()
    if not path.is_file():
        raise Refusal(f"{what} {str(path)!r} does not exist")
    if kind not in (".csv", ".parquet"):
        raise Refusal(f"{what} {str(path)!r} must end in .csv or .parquet")
    faults: Faults = {}
    if kind == ".csv":
        table, faults = _read_csv(path, f"{what} {path.name}")
    else:
        try:
            table = pd.read_parquet(path)
        except (ValueError, OSError) as error:
            raise Refusal(f"{what} {str(path)!r} is not a readable table: {error}") from None
        table = table.set_axis(pd.RangeIndex(1, len(table) + 1, name="row"))
    missing = [column for column in required if column not in table]
    unknown = [column for column in table if column not in (*required, *optional)]
    if missing or unknown:
        besides = f", allowed besides {', '.join(optional)}" if optional else ""
        wrong = f"missing columns {missing}, unknown columns {unknown}"
        raise Refusal(f"{what} {path.name}: {wrong}; needed are {', '.join(required)}{besides}")
    if not len(table):
        raise Refusal(f"{what} {path.name} has no rows")
    return table, faults


def _read_csv(path: Path, where: str) -> tuple[pd.DataFrame, Faults]:
    """The cells of a CSV file by line, and the lines that have more or fewer of them than the header."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Refusal(f"{where}, line {line}: not UTF-8 text; save the file as CSV in UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    rows, line = {}, 1
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            while cells and not cells[-1] and (not rows or len(cells) > len(next(iter(rows.values())))):
                cells.pop()  # commas that a spreadsheet leaves at the end
            if any(cells):
                rows[line] = cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise Refusal(f"{where}, line {line}: {error}; quotation marks go around a whole cell") from None
    if not rows:
        raise Refusal(f"{where} is empty")
    header = rows.pop(next(iter(rows)))
    for sign, word in _SEPARATORS.items():
        if len(header) == 1 and sign in header[0]:
            raise Refusal(f"{where}: the columns are separated by {word}; save the file with commas")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise Refusal(f"{where}: the header has {', '.join(map(repr, twice))} more than once")
    faults, width = {}, len(header)
    for line, cells in rows.items():
        if len(cells) > width:
            faults[line] = (
                f"column {width + 1} holds {cells[width]!r}, and the header has {width} columns; a name with a comma "
                "in it goes between quotation marks"
            )
        elif len(cells) < width:
            faults[line] = f"ends before {header[len(cells)]}; the header has {width} columns"
    even = [(cells + [""] * width)[:width] for cells in rows.values()]
    return pd.DataFrame(even, columns=header, index=pd.Index(rows, name="line"), dtype=str), faults


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
    question: str = questions.DEFAULT,
) -> tuple[pd.DataFrame, Faults]:
    """A user's own pairs (CSV or Parquet) as a pairs table, and what is wrong with rows that cannot be used.

    Columns clean_a, clean_b, corrupt_a, corrupt_b, answer, corrupt_answer (superset names; in odd_one_out the slot a, b
    or c); optionally task, template, clean_c, corrupt_c, pair_id, quad_id. Rows that name no task or template have
    those given here, else the first row's task and its first template; rows that name another are at fault. Without
    quad_id, pairs that share a name form one cluster. Clusters are split into halves at random by `seed`. Token counts
    are not known here, so `bucket` is the template alone; make_pair checks that the tokens line up.

    The index is where a row stands (see `read_table`). ValueError for what is wrong with the file as a whole.
    """
    path = Path(path)
    table, faults = _read(path, "pairs_file", _REQUIRED, _OPTIONAL)
    given, topic = set(table), questions.load(question)
    table = table.astype(object).where(table.notna(), "").astype(str).apply(lambda column: column.str.strip())
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
    for column in _NAMES:
        name, needed = row[column], column[-1] in words.slots
        if needed and not name:
            yield f"{column} is empty; task {task} needs the names {', '.join(words.slots)} of both sides"
        elif name and not needed:
            yield f"{column} is {name!r}, and task {task} has the names {', '.join(words.slots)} alone"
        elif wrong := wrong_name(name):
            yield f"{column} {name!r} {wrong}"
    allowed = words.slots if task == "odd_one_out" else words.question.supersets
    for column in ("answer", "corrupt_answer"):
        if row[column] not in allowed:
            yield f"{column} {row[column]!r} is unknown; allowed: {', '.join(allowed)}"
    if row["answer"] == row["corrupt_answer"]:
        yield f"answer and corrupt_answer are both {row['answer']!r}; they must differ"


def wrong_name(name: str) -> str:
    """What is wrong with the characters of a name, "" if nothing is."""
    if not name.translate(_JOINERS).isprintable() or "\ufffd" in name:
        return "holds a character that cannot be seen, or was lost in another encoding"
    if name.count('"') % 2 or (len(name) > 1 and name[0] in _QUOTES and name[-1] in _QUOTES):
        return "holds quotation marks of the file as part of the name"
    return "has two spaces in a row" if "  " in name else ""


def _repeated(table: pd.DataFrame) -> Faults:
    """Rows that say again what an earlier one says, or that lack what tells them apart."""
    faults: Faults = {}
    for columns, said in (
        ([*_NAMES, "answer", "corrupt_answer", "task", "template"], "the same pair as {place}"),
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
