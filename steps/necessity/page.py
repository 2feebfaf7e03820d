"""Step 03 on its page: which sites the answer needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lib.effects import SITE, quad_matrix, reported
from lib.hooks import site_name
from lib.stats import Interval
from pipeline.params import Shared
from pipeline.step import Step
from report import plots, site_tables
from report.words import (
    OVER_QUADS,
    about_model,
    finished,
    heads_or_mlps,
    interval,
    listed,
    site_rows,
    top_sites,
    top_sites_sentence,
)
from steps.necessity import measure
from steps.necessity.measure import Measured

CAPTIONS = {
    "ranked": "The sites whose ablation at the last token costs most, picked on the discovery half, with "
    "their effect in both halves and intervals that hold for all sites together.",
    "layers": f"Damage when a whole attention or MLP module is replaced; {OVER_QUADS}.",
}


def agreement(frame: pd.DataFrame, kinds: Sequence[str], params: Shared) -> dict[str, Interval]:
    """Spearman's correlation, over sites at `last`, of each ablation's effects with the first one's; confirmation."""
    own = frame[(frame["position"] == "last") & (frame["component"] != "resid")]
    own = reported(own)
    quads = [set(rows["quad_id"]) for _, rows in own.groupby("ablation")]
    own = own[own["quad_id"].isin(set.intersection(*quads))]  # a quad without a pool has no mean and no resample
    if own.empty:
        return {}
    matrices = {kind: quad_matrix(own[own["ablation"] == kind], "effect", SITE).values for kind in kinds}
    first = matrices[kinds[0]]
    return {kind: site_tables.rank_agreement(first, matrices[kind], params) for kind in kinds[1:]}


def by_kind(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Each site under the first ablation and, in `other`, under each of the others; confirmation half."""
    (lead, first), *rest = tables.items()
    own = reported(first)[["site", "estimate"]].rename(columns={"estimate": lead})
    parts = [
        own.merge(reported(table)[["site", "estimate"]], on="site")
        .rename(columns={"estimate": "other"})
        .assign(ablation=kind)
        for kind, table in rest
    ]
    return pd.concat(parts, ignore_index=True)


def modules_of(m: Measured, params: Shared) -> pd.DataFrame:
    """Damage of whole attention and MLP modules under the leading ablation, confirmation half, at each role."""
    return site_tables.layer_table(m.records[m.records["ablation"] == m.lead], params)


# --- figures ---


def heads(step: Step, m: Measured) -> Figure | None:
    """Fall of logit_diff for every head by kind of ablation; dots where it is significant familywise."""
    if "head" not in step.params.components:
        return None
    kinds = {kind: reported(sites) for kind, sites in m.sites.items()}
    falls = {kind: site_tables.heads_matrix(sites) for kind, sites in kinds.items()}
    sure = {
        kind: site_tables.heads_matrix(sites.assign(sure=sites["p"] <= 1 - step.params.level), "sure")
        for kind, sites in kinds.items()
    }
    return plots.heat_map(falls, "fall of logit_diff (logits)", sure, layers=step.layers)


def modules(step: Step, m: Measured) -> Figure:
    """Damage of whole modules, layer by layer."""
    return plots.layer_bars(modules_of(m, step.params), "damage (share of logit_diff)", panel="position")


def ranked(m: Measured) -> Figure:
    """The leading sites with their effect in both halves."""
    return plots.ranked_sites(site_tables.picked(m.sites[m.lead], 15), "fall of logit_diff (logits)")


def halves(m: Measured) -> Figure | None:
    """Every site, discovery against confirmation, where there are two halves."""
    return plots.halves(m.sites[m.lead])


def kinds(m: Measured) -> Figure | None:
    """Every site under the leading ablation against the others, where there are others."""
    if len(m.sites) < 2:
        return None
    axes = (f"{m.lead} (logits)", "other ablation (logits)")
    return plots.agreement(by_kind(m.sites), m.lead, "other", *axes, by="ablation")


def answer_and_foil(step: Step, m: Measured) -> Figure:
    """Change of the answer's and of the foil's logit at the leading sites."""
    names = site_tables.picked(m.sites[m.lead], 10)["site"].drop_duplicates().tolist()
    under_lead = m.records[m.records["ablation"] == m.lead]
    candidates = step.metadata(measure.SWEEP)["candidates"]
    return plots.answer_and_foil(site_tables.answer_and_foil(under_lead, names, candidates, step.params))


# --- findings ---


def findings(step: Step, m: Measured) -> dict[str, Any]:
    """The findings of step 03. The leading ablation decides; the others are compared with it."""
    params = step.params
    lead, sites, confirmation = m.lead, m.sites[m.lead], reported(m.records)
    agree = agreement(m.records, list(m.sites), params)
    by_role = modules_of(m, params)
    sample = f"{confirmation['pair_id'].nunique()} pairs of {confirmation['quad_id'].nunique()} quads"
    sentences = [
        f"Each site at `last` was ablated in the clean run, {step.layers_from}; the confirmation half has {sample}.",
        top_sites_sentence(sites, params, 6, f"{lead} damage"),
        heads_or_mlps(sites, params, "damage"),
        f"Over sites, effects rank as under `{lead}` with a Spearman correlation of "
        + listed(f"{value} under `{kind}`" for kind, value in agree.items())
        + "."
        if agree
        else f"Only `{lead}` was run.",
        *[f"Under `{kind}`, {top_sites(own, 3)} lead." for kind, own in m.sites.items() if kind != lead],
    ]
    last = m.records[m.records["position"] == "last"]
    counts = last.groupby("ablation")["pair_id"].nunique()
    for kind, count in counts[counts < counts.max()].items():
        sentences.append(
            f"`{kind}` is there for {count} of {counts.max()} pairs: the others have no other quad of their half, "
            "template and token counts to take it from."
        )
    for role, rows in by_role[by_role["position"] != "last"].groupby("position", sort=False):
        best = rows.loc[rows["estimate"].idxmax()]
        value = interval(best["estimate"], best["low"], best["high"])
        site = site_name(best["layer"], best["component"])
        sentences.append(f"At `{role}`, the attention or MLP module of largest damage is {site}: {value} of the gap.")
    found = {
        "model": about_model(step),
        "task": params.task,
        "able": True,
        "ablation": lead,
        "sites": site_rows(sites),
        "agreement": agree,
        "sentences": sentences,
        "headline": sentences[1:3],
    }
    return finished(step, found, {"ranked": ranked(m), "layers": modules(step, m)}, CAPTIONS)
