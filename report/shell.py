"""What stands around a step's own cells on its page: put there for every step alike, when the book is assembled.

1. `folded`: the cells before the first prose (parameters, setting up, reading what was measured) become one, so that
   the question is followed by what was found.
2. `sourced`: under each figure a line says of which table and rows it is drawn, by which commit, and how to cite it.
3. `again`: at the end, how to change a parameter and run the page again, and how long it took.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.params import BY_HAND

Cell = dict[str, Any]


def around(
    cells: Sequence[Cell], page: str, run: Mapping[str, Any], claims: Sequence[Mapping[str, Any]], time: str
) -> list[Cell]:
    """The cells of the executed notebook `page` ("04_sufficiency") with all that. `run` is the step's run record,
    `claims` are those of claims.json, `time` is how long its sweeps took, in words."""
    return [*sourced(folded(cells), page, run, claims), again(cells, page, run, time)]


def tags(cell: Cell) -> set[str]:
    """The tags of a cell."""
    return set(cell["metadata"].get("tags", ()))


def text(source: str) -> Cell:
    """A cell of prose."""
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def folded(cells: Sequence[Cell]) -> list[Cell]:
    """The cells, the first run of code among them as one cell, as far as a figure; its outputs stand in their order."""
    code = [number for number, cell in enumerate(cells) if cell["cell_type"] == "code"]
    first = end = code[0] if code else 0
    while (
        end < len(cells)
        and cells[end]["cell_type"] == "code"
        and "figure" not in cells[end]["metadata"].get("mystnb", {})
    ):
        end += 1
    setup = cells[first:end]
    if len(setup) < 2:
        return list(cells)
    source = "\n\n".join("".join(cell["source"]).strip() for cell in setup)
    outputs = [output for cell in setup for output in cell.get("outputs", ())]
    shown = {
        "tags": ["hide-input"],
        "mystnb": {"code_prompt_show": "Parameters and setup", "code_prompt_hide": "Fold them"},
    }
    one = setup[-1] | {"source": source, "outputs": outputs, "metadata": shown}
    return [*cells[:first], one, *cells[end:]]


def sourced(
    cells: Sequence[Cell], page: str, run: Mapping[str, Any], claims: Sequence[Mapping[str, Any]]
) -> list[Cell]:
    """The cells, with a line under each figure that was drawn."""
    out = []
    for cell in cells:
        out.append(cell)
        name = cell["metadata"].get("mystnb", {}).get("figure", {}).get("name")
        kinds = {kind for output in cell.get("outputs", ()) for kind in output.get("data", ())}
        if name and "image/png" in kinds:
            out.append(text(source_of(name, page, run, claims)))
    return out


def source_of(name: str, page: str, run: Mapping[str, Any], claims: Sequence[Mapping[str, Any]]) -> str:
    """Where a figure's numbers lie: the rows of the claims that rest on it, else the tables of its step."""
    under = [
        claim["rows"] for claim in claims if claim.get("rows") and (claim.get("figure") or "").endswith(f"#{name}")
    ]
    rows = {(row["file"], row["filter"]): None for row in under}
    if rows:
        tables = "; ".join(f"`{file}` where `{where.replace('`', '')}`" for file, where in [*rows][:2])
        tables += f" and {len(rows) - 2} more sets of rows (page 10)" * (len(rows) > 2)
    else:
        tables = ", ".join(f"`{table}.parquet`" for table in run.get("tables", ())) or "what earlier steps left"
    commit = f", commit `{str(run['commit'])[:7]}`" if run.get("commit") else ""
    cited = f"[cite this view](../cite.md): `{page}.html#{name}`"
    return f":::{{container}} under-figure\nStep {page[:2]}, from {tables}{commit}; {cited}.\n:::"


def again(cells: Sequence[Cell], page: str, run: Mapping[str, Any], time: str) -> Cell:
    """How to run the page again with another parameter: those of its step, with their values here, and a command."""
    lines = [line for cell in cells if "parameters" in tags(cell) for line in "".join(cell["source"]).splitlines()]
    meanings = dict(found.groups() for line in lines if (found := re.match(r"(\w+) = [^#]*#\s*(.*)", line)))
    given = run.get("parameters", {})
    own = {key: given[key] for key in meanings if key in given and key not in BY_HAND and key != "profile"}
    number = next((key for key, value in own.items() if type(value) is int), "seed")
    profile = given.get("profile", "smollm2-135m")
    command = (
        f".venv/bin/papermill notebooks/{page}.ipynb out.ipynb -f params/{profile}.yaml \\\n"
        f"    -p {number} {given.get(number, 0)} -p results_dir out"
    )
    rows = [f"| `{key}` | {shown(value)} | {meanings[key].replace('|', chr(92) + '|')} |" for key, value in own.items()]
    table = "\n".join(["| parameter | here | meaning |", "| --- | --- | --- |", *rows]) if rows else ""
    return text(
        f"::::{{dropdown}} Change something and run this page again\n```bash\n{command}\n```\n\nruns it with the "
        f"`{number}` that you put there, and leaves page, tables and figures in `out`. The sweeps of this page took "
        f"{time}; `make plan` says what others take. `-p pairs_file mine.csv` asks about pairs of your own.\n\n"
        f"{table}\n::::"
    )


def shown(value: Any) -> str:
    """A parameter's value for a cell of a table."""
    plain = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    plain = plain if len(plain) < 60 else f"{plain[:57]}..."
    return f"`{plain}`".replace("|", "\\|") if plain else ""
