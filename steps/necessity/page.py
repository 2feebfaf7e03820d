"""Step 03 on its page: which sites the answer needs.

1. `agreement` compares the kinds of ablation by how they rank the sites.
2. `of_ceiling` says what each site takes of what its kind of ablation does to all there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from lib.batches import NEUTRAL
from lib.effects import SITE, damages, named, quad_matrix, reported, shares_of_ceiling, significant
from lib.hooks import site_name
from lib.stats import Interval
from pipeline.params import Shared
from pipeline.step import Step
from report import plots, site_tables
from report.words import (
    OVER_QUADS,
    about_model,
    counted,
    extremes,
    finished,
    heads_or_mlps,
    in_logits,
    listed,
    of_row,
    site_rows,
    tabled,
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
MODULES = {"attn": "attention", "mlp": "MLP"}


def agreement(frame: pd.DataFrame, kinds: Sequence[str], params: Shared) -> dict[str, Interval]:
    """Spearman's correlation, over sites at `last`, of each ablation's effects with the first one's; confirmation."""
    own = frame[(frame["position"] == "last") & (frame["component"] != "resid")]
    own = reported(own)
    quads = [set(rows["quad_id"]) for _, rows in own.groupby("ablation")]
    own = own[own["quad_id"].isin(set.intersection(*quads))]  # a quad without a pool has no mean and no resample
    if own.empty:
        return {}
    there = [kind for kind in kinds if kind in set(own["ablation"])]  # a half may lack donors of some
    matrices = {kind: quad_matrix(own[own["ablation"] == kind], "effect", SITE).values for kind in there}
    first = matrices[there[0]]
    return {kind: site_tables.rank_agreement(first, matrices[kind], params) for kind in there[1:]}


def at_ceiling(frame: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """The confirmation records of the whole final residual stream at `last`."""
    own = frame[(frame["position"] == "last") & (frame["component"] == "resid") & (frame["layer"] == n_layers - 1)]
    return reported(own)


def of_ceiling(frame: pd.DataFrame, n_layers: int, params: Shared) -> pd.DataFrame:
    """Each site's damage at `last` as a share of its ablation's own ceiling, confirmation half."""
    own = reported(frame[(frame["position"] == "last") & (frame["component"] != "resid")])
    out = shares_of_ceiling(own, at_ceiling(frame, n_layers), params)
    return out.assign(site=named(out))


def modules_of(m: Measured, params: Shared) -> pd.DataFrame:
    """Damage of whole attention and MLP modules, confirmation half: at `last` under the leading ablation, at the other
    roles under the counterfactual one."""
    return site_tables.layer_table(
        m.records[(m.records["ablation"] == m.lead) | (m.records["position"] != "last")], params
    )


# --- figures ---


def heads(step: Step, m: Measured) -> Figure | Markdown:
    """Fall of logit_diff for every head by kind of ablation; dots where it is significant familywise."""
    if "head" not in step.params.components:
        return Markdown("Heads were not swept: `components` does not name them.")
    kinds = {kind: reported(sites) for kind, sites in m.sites.items()}
    falls = {kind: site_tables.heads_matrix(sites) for kind, sites in kinds.items()}
    sure = {
        kind: site_tables.heads_matrix(sites.assign(sure=significant(sites, step.params)), "sure")
        for kind, sites in kinds.items()
    }
    return plots.heat_map(falls, "fall of logit_diff (logits)", sure, layers=step.layers)


def modules(step: Step, m: Measured) -> Figure:
    """Damage of whole modules, layer by layer."""
    return plots.layer_bars(modules_of(m, step.params), "damage (share of the gap)", panel="position")


def ranked(m: Measured) -> Figure:
    """The leading sites with their effect in both halves."""
    return plots.ranked_sites(site_tables.picked(m.sites[m.lead], 15), "fall of logit_diff (logits)")


def halves(m: Measured) -> Figure | None:
    """Every site, discovery against confirmation, where there are two halves."""
    return plots.halves(m.sites[m.lead])


def kinds(step: Step, m: Measured) -> Figure | Markdown:
    """The leading sites under every kind of ablation, each as a share of that kind's own ceiling."""
    shares = of_ceiling(m.records, step.n_layers, step.params)
    if shares.empty:
        return Markdown("No ablation's ceiling is shown to be above zero, so there are no shares of one to compare.")
    order = list(dict.fromkeys(site_tables.picked(m.sites[m.lead], 10)["site"]))
    shares = shares[shares["site"].isin(order)].sort_values("site", key=lambda own: own.map(order.index), kind="stable")
    return plots.ranked_sites(shares, "damage (share of the ablation's own ceiling)", by="ablation")


def answer_and_foil(step: Step, m: Measured) -> Figure:
    """Change of the answer's and of the foil's logit at the leading sites."""
    names = site_tables.picked(m.sites[m.lead], 10)["site"].drop_duplicates().tolist()
    under_lead = m.records[m.records["ablation"] == m.lead]
    candidates = step.metadata(measure.SWEEP)["candidates"]
    return plots.answer_and_foil(site_tables.answer_and_foil(under_lead, names, candidates, step.params))


# --- findings ---


def shares_table(shares: pd.DataFrame, limits: Mapping[str, Interval], m: Measured, kinds: Sequence[str]) -> str:
    """The ceiling of each kind of ablation, and what the leading sites take of it."""
    order = list(dict.fromkeys(site_tables.picked(m.sites[m.lead], 4)["site"]))
    cells = {(row.site, row.ablation): of_row(row) for row in shares.itertuples()}
    ceilings = ("ceiling (share of the gap)", *(str(limits[kind]) for kind in kinds))
    rows = [(site, *(cells.get((site, kind), "not measured") for kind in kinds)) for site in order]
    return tabled(("share of the ceiling", *(f"`{kind}`" for kind in kinds)), [ceilings, *rows])


def ceiling_sentences(step: Step, m: Measured) -> tuple[dict[str, str], dict[str, Interval]]:
    """Under which ablation necessity is judged, what the ceiling of each kind is, and what the leading sites take."""
    limits = damages(at_ceiling(m.records, step.n_layers), step.params)
    shares = of_ceiling(m.records, step.n_layers, step.params)
    told = {"mirror": mirror_sentence(step, m)}
    if m.lead in limits:
        told["ceiling"] = (
            f"The ceiling of the ablation, what `{m.lead}` does to the whole residual stream of the last layer at "
            f"`last`, is {limits[m.lead]} of the gap between clean and corrupt. It is no bound: a part can take away "
            "more, where the rest stands against it."
        )
    there = [kind for kind in m.sites if kind in {*shares["ablation"]}]
    if there:
        told["sites"] = (
            f"The leading sites under `{m.lead}` on the discovery half take away, under each ablation, as a share of "
            "its own ceiling (confirmation half, each interval by itself):\n\n" + shares_table(shares, limits, m, there)
        )
    if left := [f"`{kind}`" for kind in limits if kind not in there]:
        told["no ceiling"] = (
            f"Shares of the ceiling under {listed(left)} are not testable: it is not shown to be above zero."
        )
    return told, limits


def mirror_sentence(step: Step, m: Measured) -> str:
    """Why counterfactual values do not judge necessity, and which ablation does."""
    seen = (step.beside("coarse_sweep") or {}).get("mirror")
    number = (
        f" The two effects of the residual stream at `last` after layer {seen['layer']} correlate at "
        f"{seen['correlation']:.2f}, without an interval ({seen['pairs']} pairs whose mirror was swept, too)."
        if seen and seen["correlation"] is not None and "pairs" in seen
        else ""
    )
    judged = (
        f"Necessity is judged under `{m.lead}`, whose values carry neither answer of the pair"
        if m.lead in NEUTRAL
        else "No class-neutral ablation could be run in both halves, so necessity is not judged here: what follows is "
        f"about `{m.lead}`"
    )
    return f"{judged}. `counterfactual` noise in a pair is denoise in its mirror pair.{number}"


def donor_sentences(m: Measured, asked: Sequence[str]) -> list[str]:
    """Which kinds of ablation some pairs or all of them lack, for want of donors."""
    counts = m.records[m.records["position"] == "last"].groupby("ablation")["pair_id"].nunique()
    why = "other quads of the same half, template and token counts, for `resample` of other classes than the pair's two"
    return [
        f"`{kind}` is there for {counts.get(kind, 0)} of {counts.max()} pairs: the others lack donors ({why})."
        for kind in asked
        if counts.get(kind, 0) < counts.max()
    ]


def leaders_sentence(kind: str, table: pd.DataFrame, params: Shared) -> str:
    """The leading sites under another kind of ablation."""
    unit = in_logits(table, f"familywise {params.level:.0%} intervals")
    return (
        f"Under `{kind}`, the largest damage on the discovery half is that of {top_sites(table, 3)}; in brackets what "
        f"the confirmation half gives ({unit})."
    )


def findings(step: Step, m: Measured) -> dict[str, Any]:
    """The findings of step 03. The leading ablation decides; the others are compared with it."""
    params = step.params
    lead, sites, confirmation = m.lead, m.sites[m.lead], reported(m.records)
    agree = agreement(m.records, list(m.sites), params)
    by_role = modules_of(m, params)
    pairs, quads = (confirmation[f"{name}_id"].nunique() for name in ("pair", "quad"))
    sample = f"{counted(pairs, 'pair')} of {counted(quads, 'quad')}"
    told, limits = ceiling_sentences(step, m)
    ends = ("estimate", "low", "high")
    ranks = pd.DataFrame(
        [{"kind": f"`{kind}`"} | {end: getattr(value, end) for end in ends} for kind, value in agree.items()]
    )
    leading = [top_sites_sentence(sites, params, 6, f"{lead} damage"), heads_or_mlps(sites, params, "damage")]
    sentences = [
        f"Each site at `last` was ablated in the clean run, {step.layers_from}; the confirmation half has {sample}.",
        *leading,
        *told.values(),
        f"Over sites, effects rank as under `{lead}` with a Spearman correlation of {extremes(ranks, 'kind')}."
        if agree
        else f"Only `{lead}` was run.",
        *[leaders_sentence(kind, own, params) for kind, own in m.sites.items() if kind != lead],
        *donor_sentences(m, params.ablations),
    ]
    for role, rows in by_role[by_role["position"] != "last"].groupby("position", sort=False):
        best = rows.loc[rows["estimate"].idxmax()]
        site = site_name(best["layer"], best["component"])
        kinds = " or ".join(word for kind, word in MODULES.items() if kind in {*rows["component"]})
        sentences.append(
            f"At `{role}`, the {kinds} module of largest counterfactual damage is {site}: {of_row(best)} of the gap "
            "(picked and reported on the same pairs)."
        )
    found = {
        "model": about_model(step),
        "task": params.task,
        "able": True,
        "ablation": lead,
        "sites": site_rows(sites),
        "agreement": agree,
        "ceilings": limits,
        "sentences": sentences,
        "headline": [*leading, *([told["ceiling"]] if "ceiling" in told else [])],
    }
    return finished(step, found, {"ranked": ranked(m), "layers": modules(step, m)}, CAPTIONS)
