"""Step 04 on its page: what the same sites do in placebo pairs."""

from __future__ import annotations

from typing import Any

import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from lib.stats import MINIMUM_CLUSTERS
from pipeline.params import Shared
from report import plots
from report.words import SPECIFICITY, TOO_FEW, counted, extremes, interval, of_row, sites
from steps.sufficiency.placebo import SLICE, TASK, Specificity

CAPTION = (
    "Share of the gap that each site's clean activation recovers at the last token, in the task's pairs and in placebo "
    "pairs, whose people are of one superset; confirmation half, studentised bootstrap intervals over quads."
)
NONE = "Step 01 has left no placebo pairs here: whether the slice is about supersets alone was not asked."
UNMOVED = "That was not asked: it is measured beside placebo pairs, and step 01 has left none here."


def of(row: Any, prefix: str) -> str:
    """An estimate of a row whose columns have a prefix."""
    return interval(*(getattr(row, f"{prefix}_{name}") for name in ("estimate", "low", "high")))


def both(m: Specificity) -> pd.DataFrame:
    """The slice, kept pairs and denoise, its parts, and each site alone, one below the other."""
    joint = m.joint[(m.joint["choice"] == "kept") & (m.joint["direction"] == "denoise")]
    return pd.concat([joint.assign(site=SLICE), m.parts], ignore_index=True)


def figure(m: Specificity | None) -> Figure | None:
    """Shares of the two gaps, site by site."""
    if m is None or m.joint.empty:
        return None
    rows, parts = both(m), []
    for attribute, own in rows.groupby("attribute", sort=False):
        other = own[["site"]].assign(**{name: own[f"placebo_{name}"] for name in ("estimate", "low", "high")})
        parts.append(other.assign(gap=f"{attribute} (placebo)"))
    parts.insert(0, own[["site", "estimate", "low", "high"]].assign(gap=f"{TASK} (task)"))
    return plots.ranked_sites(pd.concat(parts), "recovery (share of the gap)", by="gap")


def table(m: Specificity | None, params: Shared) -> pd.DataFrame | Markdown:
    """Shares, their quotient, what the verdict on single sites goes by, and the verdict, site by site; behind the
    slice, the same on all pairs and in noise."""
    if m is None or m.joint.empty:
        return Markdown(NONE)
    others = m.joint[(m.joint["choice"] != "kept") | (m.joint["direction"] != "denoise")]
    named = others.assign(site=[f"{SLICE}, {row.choice} pairs, {row.direction}" for row in others.itertuples()])
    rows = pd.concat([both(m), named], ignore_index=True)
    columns = {
        "site": rows["site"],
        "placebo": rows["attribute"],
        "share of the task's gap": [of_row(row) for row in rows.itertuples()],
        "share of the placebo gap": [of(row, "placebo") for row in rows.itertuples()],
        "placebo over task": [of(row, "quotient") for row in rows.itertuples()],
        f"placebo less {params.specific_ratio:g} x task": [of(row, "beyond") for row in rows.itertuples()],
        "verdict": rows["verdict"].map(SPECIFICITY).fillna(TOO_FEW),
        "quads": [f"{row.quads}, {row.placebo_quads}" for row in rows.itertuples()],
    }
    return pd.DataFrame(columns)


def moved_table(m: Specificity | None) -> pd.DataFrame | Markdown:
    """How far the slice, and all there is, move each attribute's answers and the whole vocabulary; or why that was not
    asked."""
    if m is None or m.moved.empty:
        return Markdown(UNMOVED)
    rows = m.moved
    columns = {
        "pairs differ in": rows["attribute"],
        "moved": [word if word == "whole vocabulary" else f"answers of {word}" for word in rows["words"]],
        "by the slice": [of_row(row) for row in rows.itertuples()],
        "by all there is": [of(row, "whole") for row in rows.itertuples()],
    }
    return pd.DataFrame(columns)


# --- findings ---


def findings(m: Specificity | None, params: Shared) -> dict[str, Any]:
    """What is said of the placebo, with its numbers under `specific`."""
    if m is None or m.joint.empty:
        none = dict.fromkeys(("specific_parts", "specific_classes", "headline"), [])
        asked = {"attribute": params.topic.placebo, "choice": "kept", "direction": "denoise"}
        return {"specific": [asked | {"why": NONE}], "sentences": [NONE], **none}
    sentences, headline = [], []
    for attribute, rows in m.joint.groupby("attribute", sort=False):
        own = [slice_sentence(attribute, rows, params), sites_sentence(m, attribute, params)]
        sentences += [*own, classes_sentence(m, attribute), moved_sentence(m, attribute)]
        headline.append(own[0])
    return {
        "specific": m.joint.to_dict("records"),
        "specific_parts": m.parts.to_dict("records"),
        "specific_classes": m.classes.to_dict("records"),
        "sentences": sentences,
        "headline": headline,
    }


def slice_sentence(attribute: str, rows: pd.DataFrame, params: Shared) -> str:
    """The slice's shares of the two gaps, their quotient, and what follows."""
    by = {(row.choice, row.direction): row for row in rows.itertuples()}
    kept, every = by["kept", "denoise"], by.get(("all", "denoise"))
    what = {
        "specific": f"against {attribute} the slice is specific to supersets",
        "general": f"the slice is not specific to supersets: it reads out the names' {attribute} as well",
        "open": f"whether the slice is specific to supersets against {attribute} is not decided",
    }
    asked = f"surely less than {params.specific_ratio:g} was asked for"
    quads = min(kept.quads, kept.placebo_quads)
    verdict = what.get(kept.verdict, f"there are too few quads to test it ({quads}; {MINIMUM_CLUSTERS} are needed)")
    noise = of(by["kept", "noise"], "quotient")
    rest = "Over all placebo quads, whatever the sign of their gap, there is no gap of which it could be a share"
    if every is not None:
        rest = f"Over all {counted(every.placebo_quads, 'placebo quad')}, whatever the sign of their gap, it is "
        rest += f"{of(every, 'quotient')} times as much"
    return (
        f"Placebo: {verdict}. Where all four people are of one superset and differ in {attribute}, the slice "
        f"recovers {of(kept, 'placebo')} of that attribute's gap ({counted(kept.placebo_quads, 'quad')}), against "
        f"{of_row(kept)} of the superset gap ({counted(kept.quads, 'quad')}). That is {of(kept, 'quotient')} times as "
        f"much ({asked}). With the slice's corrupt values in the clean run it is {noise} times as much. {rest}."
    )


def sites_sentence(m: Specificity, attribute: str, params: Shared) -> str:
    """Which parts of the slice, and which sites, are specific, and which are not."""
    rows = m.parts[m.parts["attribute"] == attribute]
    together = "".join(
        f"Of the slice, {row.site} together recover {of(row, 'placebo')} of the {attribute} gap, against {of_row(row)} "
        "of the superset gap. "
        for row in rows[rows["site"].str.startswith("its ")].itertuples()
    )
    if rows["verdict"].isna().all():
        return f"{together}Site by site there are too few quads to test which are specific."
    groups = {name: rows.loc[rows["verdict"] == name, "site"].tolist() for name in ("specific", "general", "open")}
    said = {
        "specific": f"specific to supersets against {attribute}",
        "general": "not specific",
        "open": "not decided",
    }
    each = "; ".join(f"{said[name]}: {sites(own, 8)}" for name, own in groups.items() if own)
    return (
        f"{together}Familywise over these and the single sites, {each}. Specific is what carries less than "
        f"{params.specific_ratio:g} times as large a share of the {attribute} gap as of the superset gap."
    )


def classes_sentence(m: Specificity, attribute: str) -> str:
    """The slice's share of the placebo gap, superset by superset."""
    rows = m.classes[m.classes["attribute"] == attribute]
    few = f"; with fewer than {MINIMUM_CLUSTERS} quads there is no interval" * bool(rows["low"].isna().any())
    return (
        f"By the superset of the four people the slice's share of the {attribute} gap is {extremes(rows, 'shared')} "
        f"({counted(int(rows['quads'].min()), 'quad')} at least in each{few})."
    )


def moved_sentence(m: Specificity, attribute: str) -> str:
    """How far the slice moves the answers that the pair is not about."""
    at = {(row.attribute, row.words): row for row in m.moved.itertuples()}
    own, there, placebo = at.get((TASK, TASK)), at.get((TASK, attribute)), at.get((attribute, TASK))
    if own is None or there is None or placebo is None:
        return f"The answers of {attribute} are not single tokens here."
    return (
        f"In the task's pairs, the slice moves the supersets' logits by {of_row(own)} against each other, and those of "
        f"{attribute} by {of_row(there)} (root mean square, logits). In the placebo pairs it moves the supersets' by "
        f"{of_row(placebo)}. The table has what all there is moves beside these, and the whole vocabulary."
    )
