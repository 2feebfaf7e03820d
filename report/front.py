"""The book's first page: the question, the answer and how sure it is, from the findings of the steps.

1. `fields` fills `book/index.md`, or, where the model cannot do the task, `book/unable.md`, which is put in its place.
2. What leads was written by the last step (`outline` of its findings): answer, rows, a tally. Here it becomes MyST.
3. Everything else, step by step, is folded away behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

from pipeline import units

Found = Mapping[str, Any]


def head(outline: Found) -> dict[str, str]:
    """What the last step concludes: the answer, what it is not, the rows, the tally, and the circuit in more words."""
    return {
        "short": f"**{outline['answer']}**" if outline.get("answer") else "",
        "tally": outline.get("tally", ""),
        "spoken": outline.get("spoken", ""),
        "rows": rows(outline.get("rows", ())),
        "outline": "\n\n".join(outline.get("sentences", ())),
        "not": f"**Which links of the plan's chain do not hold.** {outline['not']}" if outline.get("not") else "",
    }


def rows(found: Sequence[Found]) -> str:
    """What one would ask first, as a MyST table: a plain sentence, its number and sample, and where that is shown."""
    lines = []
    for row in found:
        numbers = [f"**{row['number']}**" if row["number"] else "", row["sample"], row["sure"]]
        link = f'<a href="{escape(row["figure"].replace(".ipynb", ".html"))}">figure</a>' if row["figure"] else ""
        much = "; ".join(filter(None, [*numbers, link]))
        lines.append(f"| *{row['about']}* | {cell(row['words'])} | {cell(much)} |")
    table = "\n".join(["| asked | what was found | how much, of how many, how sure |", "| --- | --- | --- |", *lines])
    return f":::{{container}} first-rows\n{table}\n:::" if lines else ""


def cell(value: Any) -> str:
    """A text, or a verdict with its reason, for a cell of a MyST table."""
    text = f"{value['verdict']}: {value['reason']}" if isinstance(value, Mapping) else value or ""
    return text.replace("|", "\\|")


def in_map(sites: Sequence[Found], page: str) -> str:
    """The sites of the slice, each as a link to the view of it on the page with the map of sites; "" where none is."""
    links = [f'<a href="{page}.html#site={quote_plus(site["site"])}">{site["site"]}</a>' for site in sites]
    return f" Those of the slice: {', '.join(links)}." if links else ""


def ledger_of(results: Path) -> Found:
    """claims.json of step 10; without claims where it is not there."""
    path = results / "claims.json"
    return units.read_json(path) if path.is_file() else {"claims": []}


def verdicts(results: Path) -> str:
    """The claims ledger of step 10 (claims.json; "" where it is not there) as MyST tables that the
    book's script makes sortable: claims, then checks."""
    ledger = ledger_of(results)
    columns = {"verdict": "verdict", "alone": "alone", "tier": "evidence", "reason": "why"}
    if any(claim.get("fresh") for claim in ledger["claims"]):
        columns["fresh"] = "on fresh people"
    parts = [ledger["fresh"]] if ledger.get("fresh") else []
    for check in (False, True):
        own = [claim for claim in ledger["claims"] if (claim["check"] is not None) == check]
        if not own:
            continue
        lines = [["check" if check else "claim", *columns.values(), "under it"], ["---"] * (2 + len(columns))]
        names = (f"*{claim['id'].replace('_', ' ')}*: {cell(claim['claim'])}" for claim in own)  # as the figure has it
        for name, claim in zip(names, own, strict=True):
            lines.append([name, *(cell(claim.get(key)) for key in columns), under(claim)])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f":::{{container}} sortable\n{table}\n:::")
    return "\n\n".join(parts)


def under(claim: Found) -> str:
    """What a claim of the ledger rests on, for a cell of a table: its figure, and its table's rows, folded."""
    figure, of = claim.get("figure"), claim.get("rows")
    parts = [f'<a href="{escape(figure.replace(".ipynb", ".html"))}">figure</a>'] if figure else []
    if of:
        which = "`" + f"{of['file']}: {of['filter']}".replace("`", "'").replace("|", "\\|") + "`"
        parts.append(f"<details><summary>rows</summary> {which}</details>")
    return " ".join(parts)


def times(records: Mapping[str, Found], first: str, mapped: str) -> dict[str, str]:
    """How long sweeping took when this report was made: step 01, the step with the map of sites, and all steps."""
    taken = {step: float(record.get("seconds") or 0) for step, record in records.items()}
    machine = next((record["machine"] for record in records.values() if record.get("machine")), {})
    gpus = machine.get("gpus") or ()
    on = gpus[0] if gpus and isinstance(gpus[0], str) else machine.get("cpu", "this report's machine")
    whole = sum(taken.values())
    return {
        "first_time": minutes(taken.get(first, 0)),
        "map_time": minutes(taken.get(mapped, 0)),
        "whole_time": minutes(whole),
        "machine": f"{machine['cores']} cores of {on}" if machine.get("cores") and not gpus else str(on),
    }


def minutes(seconds: float) -> str:
    """A time in words: under a minute, 12 minutes, 3.5 hours."""
    if seconds < 60:
        return "under a minute"
    return f"{round(seconds / 60)} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def tried(found: Found) -> str:
    """For a model that cannot do its task: what step 01 asked, task by task, with its accuracy, as a MyST table."""
    lines = [
        f"| `{row['task']}` | `{cell(row['template'].replace('`', chr(39)))}` | {row['estimate']:.2f}{ends(row)} | "
        f"{row['chance']:.2f} | {row['prompts']} |"
        for row in found.get("accuracy", ())
    ]
    return "\n".join(
        ["| task | template | right | chance | prompts |", "| --- | --- | --- | --- | --- |", *lines]
    ) * bool(lines)


def ends(row: Found) -> str:
    """The interval behind an accuracy."""
    return "" if row.get("low") is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
