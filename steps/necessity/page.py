"""Step 03 on its page: which sites the answer needs."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lib import stats
from lib.effects import SITE, in_halves, quad_matrix, reported
from lib.hooks import site_name
from lib.stats import Interval
from pipeline.params import Shared
from pipeline.step import Step
from report.words import (
    OVER_QUADS,
    about_model,
    heads_or_mlps,
    interval,
    listed,
    site_rows,
    top_sites,
    top_sites_sentence,
)

CAPTIONS = {
    "necessity-ranked": "The sites whose ablation at the last token costs most, picked on the discovery half, with "
    "their effect in both halves and intervals that hold for all sites together.",
    "necessity-layers": f"Damage when a whole attention or MLP module is replaced; {OVER_QUADS}.",
}


def agreement(records: pd.DataFrame, kinds: Sequence[str], params: Shared) -> dict[str, Interval]:
    """Spearman's correlation, over sites at `last`, of each ablation's effects with the first one's; confirmation."""
    own = records[(records["position"] == "last") & (records["component"] != "resid")]
    own = in_halves(own)[-1][1]
    quads = [set(rows["quad_id"]) for _, rows in own.groupby("ablation")]
    own = own[own["quad_id"].isin(set.intersection(*quads))]  # a quad without a pool has no mean and no resample
    if own.empty:
        return {}
    matrices = {kind: quad_matrix(own[own["ablation"] == kind], "effect", SITE).values for kind in kinds}
    first = matrices[kinds[0]]
    return {kind: stats.rank_agreement(first, matrices[kind], params) for kind in kinds[1:]}


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


def necessity(
    step: Step, records: pd.DataFrame, tables: dict[str, pd.DataFrame], agree: dict[str, Interval], names: pd.DataFrame
) -> dict:
    """The findings of step 03. The first table leads; the others are compared with it."""
    params = step.params
    lead, table = next(iter(tables.items()))
    confirmation = in_halves(records)[-1][1]
    sample = f"{confirmation['pair_id'].nunique()} pairs of {confirmation['quad_id'].nunique()} quads"
    sentences = [
        f"Each site at `last` was ablated in the clean run, {step.layers_from}; the confirmation half has {sample}.",
        top_sites_sentence(table, params, 6, f"{lead} damage"),
        heads_or_mlps(table, params, "damage"),
        f"Over sites, effects rank as under `{lead}` with a Spearman correlation of "
        + listed(f"{value} under `{kind}`" for kind, value in agree.items())
        + "."
        if agree
        else f"Only `{lead}` was run.",
        *[f"Under `{kind}`, {top_sites(own, 3)} lead." for kind, own in tables.items() if kind != lead],
    ]
    last = records[records["position"] == "last"]
    counts = last.groupby("ablation")["pair_id"].nunique()
    for kind, count in counts[counts < counts.max()].items():
        sentences.append(
            f"`{kind}` is there for {count} of {counts.max()} pairs: the others have no other quad of their half, "
            "template and token counts to take it from."
        )
    for role, rows in names.groupby("position", sort=False):
        best = rows.loc[rows["estimate"].idxmax()]
        value = interval(best["estimate"], best["low"], best["high"])
        site = site_name(best["layer"], best["component"])
        sentences.append(f"At `{role}`, the attention or MLP module of largest damage is {site}: {value} of the gap.")
    return {
        "model": about_model(step),
        "task": params.task,
        "able": True,
        "ablation": lead,
        "sites": site_rows(table),
        "agreement": agree,
        "sentences": sentences,
        "headline": sentences[1:3],
    }
