"""What leads the report, on the book's first page: rows for what one would ask first, what it is not, one figure.

The rows' words stand in data/claims.yaml (`first`): each on a claim, by its verdict, with its number, the sample that
is under it, and where it is shown. `steps.story.sentences` has the number's words, this file no number of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from lib import effects
from lib.effects import CONSTANT, reported
from pipeline.step import Step
from report import plots
from report.words import counted, with_ends
from steps.story.claims import FIRST, NOT_SUPPORTED, SUPPORTED, Entry, Row, Rows
from steps.story.sentences import deciding, number, rank, site_names

LOGIT_DIFFS = [f"logit_diff_{run}" for run in ("before", "after", "clean", "corrupt")]
PLACES = {"names": "at the names", "last": "at the last token"}
CAPTION = (
    "What one place holds after a layer is put into the run on a prompt of other names: how much of the gap between "
    "the two prompts' answers moves along (0: nothing; 1: all of it; {bands}). Shaded: the layers chosen, on other "
    "people, for what they add at the last token."
)


Read = Callable[..., pd.DataFrame | None]  # a step's stored table by its name, None where it is not there


def rows(entries: Sequence[Entry], found: Mapping[str, Any], read: Read) -> list[dict[str, str]]:
    """Each row: `about`, `words`, `number` with its interval and unit, `sample`, `sure` (verdict and kind of evidence),
    `figure`, `claim`; empty texts where nothing was measured."""
    by_claim, sites = {entry.id: entry for entry in entries}, site_names(found)
    return [row_of(row, by_claim, sites, read) for row in FIRST]


def row_of(row: Row, by_claim: Mapping[str, Entry], sites: Mapping[str, str], read: Read) -> dict[str, str]:
    """A row by the verdicts of its claims."""
    held = [name for name in row.supported if by_claim[name].verdict == SUPPORTED]
    ((other, words),) = row.otherwise.items()
    entry = by_claim[(held or [other])[0]]
    known = entry.verdict in (SUPPORTED, NOT_SUPPORTED)
    if not known:
        words = f"{entry.verdict.capitalize()}: {entry.claim.removesuffix('.')} ({deciding(entry).reason.rstrip('.')})."
    else:
        words = (row.supported[held[0]] if held else words).format(**sites)
    return {
        "about": row.about,
        "words": words[0].upper() + words[1:],
        "number": number(deciding(entry), entry) if known else "",
        "sample": sample(entry.rows, read) if known and deciding(entry) is entry else "",
        "sure": ", ".join(filter(None, (entry.verdict, rank(entry) or entry.tier))) if known else "",
        "figure": entry.figure or "",
        "claim": entry.id,
    }


def sample(of: Rows | None, read: Read) -> str:
    """Of how many pairs, in how many quads, the rows are that a claim names; "" where they are not of pairs."""
    frame = None if of is None else read(of.file.removesuffix(".parquet"))
    if frame is None or not {"pair_id", "quad_id"} <= set(frame):
        return ""
    own = frame.query(of.filter)
    return f"{counted(own['pair_id'].nunique(), 'pair')} in {counted(own['quad_id'].nunique(), 'quad')}"


def spoken(found: Mapping[str, Any] | None) -> str:
    """Whether the word that the pages are about is also what the model would say: how often it comes first in the whole
    vocabulary, its place there and its probability, by the findings of step 01; "" where that was not asked."""
    asked = [row for row in (found or {}).get("ability", ()) if row["superset"] == "all"]
    by_scoring = {row["scoring"]: row for row in asked}
    if not {"raw", "first word"} <= by_scoring.keys():
        return ""
    raw, first = by_scoring["raw"], by_scoring["first word"]
    asked = counted(first["prompts"], "prompt")
    said = (
        f"in the whole vocabulary the right word comes first in {with_ends(first)} of {asked}; its place in the median "
        f"is {raw['place']:g}, its probability {raw['probability']:.1%} on average."
    )
    if raw["place"] > 1:
        return f"**What it is not: the model's speech.** It is a leaning, which of a few words is ahead: {said}"
    return f"**It is more than a leaning**: {said}"


def figure(step: Step, found: Mapping[str, Any], read: Read) -> dict[str, Any]:
    """The curve at the names and at the last token, as a figure and its caption; nothing where it was not swept."""
    columns = ["half", "direction", "position", "layer", "pair_id", "quad_id", *CONSTANT, *LOGIT_DIFFS]
    frame = read("coarse_sweep", list(dict.fromkeys(columns)))
    if frame is None:
        return {}
    own = reported(frame[(frame["direction"] == "denoise") & frame["position"].isin(PLACES)])
    if own.empty:
        return {}
    parts = [effects.curve(part, step.params).assign(position=PLACES[role]) for role, part in own.groupby("position")]
    curves = pd.concat(parts, ignore_index=True)
    bands = f"bands: {step.params.level:.0%} intervals over {curves['quads'].iloc[0]} quads"
    caption = CAPTION.format(bands="no intervals: too few quads" if curves["low"].isna().any() else bands)
    drawn = plots.labelled_curves(
        curves, "moved, share of the gap", (found.get("coarse_sweep") or {}).get("critical_layers", ())
    )
    return {"figure": drawn, "caption": caption}
