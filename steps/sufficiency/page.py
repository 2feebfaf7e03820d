"""Step 04 on its page: which sites bring the answer back, and the critical slice."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lib import effects
from lib.effects import CriticalSlice, in_halves, picked, reported
from lib.stats import Interval
from pipeline.step import Step
from report.words import about_model, heads_or_mlps, interval, listed, site_rows, top_sites_sentence
from steps.parameters import Shared

CAPTIONS = {
    "sufficiency-slice": "Joint recovery and joint counterfactual damage as heads and MLPs are added in order of "
    "discovery recovery, both halves, 95% studentised bootstrap intervals over quads.",
    "sufficiency-ranked": "The sites whose clean activation at the last token recovers most, picked on the discovery "
    "half, with their effect in both halves and intervals that hold for all sites together.",
}


def restoring_sites(records: pd.DataFrame, table: pd.DataFrame, params: Shared) -> list[str]:
    """Single heads and MLPs that restore the answer by the design's definition, on the confirmation half."""
    own = in_halves(records[records["component"].isin(["head", "mlp"])])[-1][1]
    out = []
    for row in reported(table).itertuples():
        if row.component == "attn" or row.ratio_low is None or not row.ratio_low > params.restores_recovery:
            continue
        site = own[(own["layer"] == row.layer) & (own["component"] == row.component) & (own["head"] == row.head)]
        span = Interval(row.ratio, row.ratio_low, row.ratio_high, params.level, row.quads, "")
        if effects.restores(site, span, params.restores_share, params.restores_recovery):
            out.append(row.site)
    return out


def with_earlier(table: pd.DataFrame, sites: Sequence[dict]) -> pd.DataFrame:
    """Each site's rise when patched beside its fall when ablated in step 03, confirmation half."""
    fall = pd.DataFrame(sites)[["site", "estimate"]].rename(columns={"estimate": "fall"})
    rise = reported(table)[["site", "component", "estimate"]].rename(columns={"estimate": "rise"})
    return rise.merge(fall, on="site")


def sufficiency(
    step: Step,
    records: pd.DataFrame,
    table: pd.DataFrame,
    order: pd.DataFrame,
    curves: pd.DataFrame,
    critical: CriticalSlice,
) -> dict:
    """The findings of step 04: single sites, and the critical slice."""
    params = step.params
    restoring = effects.restoring(records, table, params)
    single = table[table["component"].isin(["head", "mlp"])]
    best = reported(picked(single, 1)).iloc[0]
    best_text = f"{best['site']} recovers most: {interval(best['ratio'], best['ratio_low'], best['ratio_high'])}"
    members = order["site"].tolist()[: critical.size]
    held = curves[(curves["half"] == reported(curves)["half"].iloc[0]) & (curves["n_sites"] == critical.size)]
    joint = {row.quantity: interval(row.estimate, row.low, row.high) for row in held.itertuples()}
    reached = (
        f"reaches {params.slice_share:.0%} in both on the discovery half"
        if critical.reached
        else f"does not reach {params.slice_share:.0%} in both on the discovery half "
        f"(recovery {critical.recovery:.2f}, damage {critical.damage:.2f})"
    )
    sentences = [
        f"No single head or MLP restores the answer on its own: {best_text}."
        if not restoring
        else f"Single sites that restore the answer on their own: {listed(restoring)}; {best_text}.",
        top_sites_sentence(table, params, 6, "recovery"),
        heads_or_mlps(table, params, "recovery"),
        f"The critical slice, heads and MLPs added in order of discovery recovery, has {critical.size} "
        f"{'site' if critical.size == 1 else 'sites'} and "
        f"{reached}: {listed(members)}.",
        f"On the confirmation half its joint recovery is {joint['recovery']} and its joint counterfactual damage "
        f"{joint['damage']}.",
    ]
    return {
        "model": about_model(step),
        "task": params.task,
        "able": True,
        "sites": site_rows(table),
        "restoring": restoring,
        "critical_slice": order[["site", "layer", "component", "head"]].head(critical.size).to_dict("records"),
        "critical_slice_reached": critical.reached,
        "joint": held[["quantity", "estimate", "low", "high"]].to_dict("records"),
        "sentences": sentences,
        "headline": [sentences[0], *sentences[3:]],
    }
