"""Step 07's placebo on the page: in which classes and templates is the slice specific?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from lib.stats import MINIMUM_CLUSTERS
from pipeline.params import Shared
from report import plots
from report.words import SPECIFICITY, TOO_FEW, interval, listed, of_row
from steps.generality import placebo
from steps.generality.placebo import ALL, RANDOM, SLICE

CAPTION = (
    "Share of the superset gap and of the placebo gap that the slice's clean activations recover, over all pairs of a "
    "template and superset by superset; studentised bootstrap intervals over quads; hollow: fewer than 20 quads; "
    "at the right the quads of either kind."
)
LAYERS = dict(zip(RANDOM, ("of the slice's layers", "of other layers", "(MLPs of other layers)"), strict=True))
NONE = "There are no placebo pairs here: whether the slice is specific in every class and template was not asked."


def of(row: Any, prefix: str, digits: int = 2) -> str:
    """The estimate of a row whose columns have a prefix."""
    ends = [getattr(row, f"{prefix}_{name}") for name in ("estimate", "low", "high")]
    return interval(*(None if index and pd.isna(end) else end for index, end in enumerate(ends)), digits=digits)


def quotient(row: Any) -> str:
    """The placebo share over the superset share, where there is one."""
    return of(row, "quotient") if np.isfinite(row.quotient_estimate) else "not defined"


def specificity(
    joint: pd.DataFrame, frame: pd.DataFrame, sets: Mapping[str, Sequence[int]], params: Shared
) -> pd.DataFrame:
    """`placebo.specificity`; where several random sets of a kind were patched, each is there alone as well, over all
    pairs."""
    table = placebo.specificity(joint, frame, sets, params)
    several = {name: sets[name] for name in RANDOM if len(sets.get(name) or ()) > 1}
    if table.empty or not several:
        return table
    whole = joint.assign(own=False)  # no class apart
    parts = [
        placebo.specificity(whole, frame, {SLICE: [place]}, params).assign(set=f"{name}, set {number}")
        for name, places in several.items()
        for number, place in enumerate(places, 1)
    ]
    every, order = pd.concat([table, *parts], ignore_index=True), ["attribute", "template"]
    places_of = {name: list(dict.fromkeys(table[name])) for name in order}
    return every.sort_values(
        order, key=lambda own: own.map(places_of[own.name].index), kind="stable", ignore_index=True
    )


def figure(rows: pd.DataFrame) -> Figure | None:
    """The slice's two shares, group by group."""
    if rows.empty:
        return None
    own, parts = rows[rows["set"] == SLICE], []
    for prefix, gap, quads in (("", "superset gap", "quads"), ("placebo_", "placebo gap", "placebo_quads")):
        ends = {name: own[f"{prefix}{name}"] for name in ("estimate", "low", "high")}
        parts.append(own.assign(**ends, quantity=gap, quads=own[quads]))
    both = pd.concat(parts)
    return plots.forest(both.assign(kind=both["attribute"] + ", " + both["template"]), "recovery (share of the gap)")


def table(rows: pd.DataFrame, params: Shared) -> pd.DataFrame | Markdown:
    """Every set's two shares, their quotient, what the verdict goes by, and the verdict."""
    if rows.empty:
        return Markdown(NONE)
    columns = {
        "placebo": rows["attribute"],
        "template": rows["template"],
        "pairs of": rows["group"],
        "patched": rows["set"],
        "share of the superset gap": [of_row(row) for row in rows.itertuples()],
        "share of the placebo gap": [of(row, "placebo") for row in rows.itertuples()],
        "placebo over superset": [quotient(row) for row in rows.itertuples()],
        f"placebo less {params.specific_ratio:g} x superset": [of(row, "beyond") for row in rows.itertuples()],
        "verdict": rows["verdict"].map(SPECIFICITY).fillna(TOO_FEW),
        "quads": [f"{row.quads}, {row.placebo_quads}" for row in rows.itertuples()],
    }
    return pd.DataFrame(columns)


def sentences(rows: pd.DataFrame, params: Shared) -> list[str]:
    """In which templates and classes the slice is specific, against each attribute; and what random sites do."""
    if rows.empty:
        return [NONE]
    out = []
    for attribute, each in rows.groupby("attribute", sort=False):
        for template, there in each.groupby("template", sort=False):
            every = there[there["group"] == ALL]
            own, random = every[every["set"] == SLICE], every[every["set"].isin(RANDOM)]
            out += [template_sentence(attribute, template, row, params) for row in own.itertuples()]
            for row in random.itertuples():
                out.append(random_sentence(row, there[there["set"].str.startswith(f"{row.set}, set")]))
        classes = each[each["group"] != ALL]
        for name in (SLICE, "picked without it"):
            out += class_sentences(attribute, name, classes[classes["set"] == name])
    return out


def template_sentence(attribute: str, template: str, row: Any, params: Shared) -> str:
    """The slice's two shares in one template, and what follows."""
    what = {
        "specific": "the slice is specific to supersets",
        "general": f"the slice is not specific to supersets, it reads out {attribute} as well",
        "open": "whether the slice is specific is not decided",
    }
    verdict = what.get(row.verdict, f"{min(row.quads, row.placebo_quads)} quads are too few to test the slice")
    return (
        f"In `{template}` {verdict}. It recovers {of(row, 'placebo')} of the {attribute} gap ({row.placebo_quads} "
        f"placebo quads). That is {of(row, 'quotient')} times its share of the superset gap ({row.quads} quads), where "
        f"surely less than {params.specific_ratio:g} was asked for."
    )


def random_sentence(row: Any, alone: pd.DataFrame) -> str:
    """What random sites do there, on average and set by set."""
    each = listed(of(own, "placebo", 3) for own in alone.itertuples())
    mean = f" on average over {len(alone)} sets (one by one {each})" if len(alone) else ""
    return (
        f"{row.set[0].upper()}{row.set[1:]} {LAYERS[row.set]} recover {of(row, 'placebo')} of that gap{mean}. "
        f"Divided by their share of the superset gap: {quotient(row)}."
    )


def class_sentences(attribute: str, name: str, rows: pd.DataFrame) -> list[str]:
    """In which supersets a set is specific, and the range of its quotients."""
    if rows.empty:
        return []
    who = "the slice" if name == SLICE else "the circuit picked without a superset"
    tested, lead = rows.dropna(subset="verdict"), f"Superset by superset, against {attribute}, {who}"
    by_verdict = tested.groupby("verdict", sort=False)
    each = [f"{SPECIFICITY[verdict]} in {listed(own['group'])}" for verdict, own in by_verdict]
    out = [f"{lead} is {'; '.join(each)}."] * bool(each)
    if len(tested) < len(rows):
        few = listed(rows.loc[rows["verdict"].isna(), "group"])
        fewest = int(rows[["quads", "placebo_quads"]].min(axis=1).min())
        out.append(
            f"{lead} is untested in {few}: {MINIMUM_CLUSTERS} quads are needed, and there are as few as {fewest}."
        )
    ends = rows.sort_values("quotient_estimate")
    lowest, highest = (f"{row.group} ({quotient(row)})" for row in ends.iloc[[0, -1]].itertuples())
    return [
        *out,
        f"Its share of the placebo gap over that of the superset gap in the same class is smallest in {lowest} and "
        f"largest in {highest}.",
    ]
