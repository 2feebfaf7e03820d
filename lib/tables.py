"""Tables that people write: a CSV or Parquet file, read as text, with the place of every row and what is wrong with it.

1. `read_table` reads a file with the line of every row; `read_rows` gives what is wrong with single rows beside it.
2. `wrong_name` says what is wrong with the characters of a name.
3. `unusable` names every row that cannot be used, in one message.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from lib.errors import Refusal

SHOWN = 500  # rows that are named in one message
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_QUOTES = "\"'\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb"  # straight and typographic ones
_JOINERS = str.maketrans("", "", "\u200c\u200d")  # invisible, and part of Persian and Indic spelling

Faults = dict[int, str]  # by line: what is wrong with a row


def read_table(path: Path, what: str, required: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV or Parquet file with these columns, and at least one row; every cell as text, without spaces around it.

    The index is where a row stands: `line` of the CSV, empty ones counted; `row` of the Parquet file, from 1.
    ValueError for a file that is not one, with every line that has more or fewer cells than the header.
    """
    table, faults = read_rows(path, what, required, optional)
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


def read_rows(path: Path, what: str, required: Sequence[str], optional: Sequence[str]) -> tuple[pd.DataFrame, Faults]:
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
        table = table.astype(object).where(table.notna(), "").astype(str).apply(lambda column: column.str.strip())
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


def wrong_name(name: str) -> str:
    """What is wrong with the characters of a name, "" if nothing is."""
    if not name.translate(_JOINERS).isprintable() or "\ufffd" in name:
        return "holds a character that cannot be seen, or was lost in another encoding"
    if name.count('"') % 2 or (len(name) > 1 and name[0] in _QUOTES and name[-1] in _QUOTES):
        return "holds quotation marks of the file as part of the name"
    return "has two spaces in a row" if "  " in name else ""
