"""Step 07's placebo on the page: in which classes and templates is the slice specific?"""

from __future__ import annotations

from typing import Any

import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from lib.stats import MINIMUM_CLUSTERS
from pipeline.params import Shared
from report import plots
from report.words import interval, listed, of_row
from steps.generality.placebo import ALL, RANDOM, SLICE

CAPTION = (
    "Share of the superset gap and of the placebo gap that the slice's clean activations recover, over all pairs of a "
    "template and superset by superset; 95% studentised bootstrap intervals over quads; hollow: fewer than 20 quads."
)
NONE = "There are no placebo pairs here: whether the slice is specific in every class and template was not asked."
VERDICTS = {"specific": "specific", "general": "not specific", "open": "not decided"}
FEW = "too few quads to test"


def of(row: Any, prefix: str) -> str:
    """The estimate of a row whose columns have a prefix."""
    ends = [getattr(row, f"{prefix}_{name}") for name in ("estimate", "low", "high")]
    return interval(*(None if index and pd.isna(end) else end for index, end in enumerate(ends)))


def quotient(row: Any) -> str:
    """The placebo share over the superset share; "" for what has no superset share to speak of."""
    return "" if row.set == RANDOM else of(row, "quotient")


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


def table(rows: pd.DataFrame) -> pd.DataFrame | Markdown:
    """Every set's two shares, their quotient and the verdict."""
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
        "verdict": rows["verdict"].map(VERDICTS).fillna(FEW).where(rows["set"] != RANDOM, ""),
        "quads": [f"{row.quads}, {row.placebo_quads}" for row in rows.itertuples()],
    }
    return pd.DataFrame(columns)


def sentences(rows: pd.DataFrame, params: Shared) -> list[str]:
    """In which templates and classes the slice is specific, against each attribute; and what random heads do."""
    if rows.empty:
        return [NONE]
    out = []
    for attribute, each in rows.groupby("attribute", sort=False):
        for template, there in each.groupby("template", sort=False):
            own, random = (there[(there["set"] == name) & (there["group"] == ALL)] for name in (SLICE, RANDOM))
            out += [template_sentence(attribute, template, row, params) for row in own.itertuples()]
            out += [
                f"Random heads of the slice's layers recover {of(row, 'placebo')} of that gap."
                for row in random.itertuples()
            ]
        classes = each[each["group"] != ALL]
        for name in (SLICE, "picked without it"):
            out += class_sentences(attribute, name, classes[classes["set"] == name])
    return out


def template_sentence(attribute: str, template: str, row: Any, params: Shared) -> str:
    """The slice's two shares in one template, and what follows."""
    asked = f"(surely less than {params.specific_ratio:g} was asked for)"
    what = {
        "specific": f"it is specific to supersets there {asked}",
        "general": f"it is not specific to supersets there {asked}, it reads out {attribute} as well",
        "open": f"whether it is specific there is not decided {asked}",
    }
    verdict = what.get(row.verdict, f"{min(row.quads, row.placebo_quads)} quads are too few to test it")
    return (
        f"In `{template}` the slice recovers {of(row, 'placebo')} of the {attribute} gap ({row.placebo_quads} placebo "
        f"quads), {of(row, 'quotient')} times its share of the superset gap ({row.quads} quads): {verdict}."
    )


def class_sentences(attribute: str, name: str, rows: pd.DataFrame) -> list[str]:
    """In which supersets a set is specific, and the range of its quotients."""
    if rows.empty:
        return []
    who = "the slice" if name == SLICE else "the circuit picked without a superset"
    tested, lead = rows.dropna(subset="verdict"), f"Superset by superset, against {attribute}, {who}"
    each = [f"{VERDICTS[verdict]} in {listed(own['group'])}" for verdict, own in tested.groupby("verdict", sort=False)]
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
