"""The findings of each step: the numbers handed on and the sentences that state them.

Every sentence is built from the numbers it states, so none can outlive them; a negative result is said as plainly as a
positive one.
"""

from __future__ import annotations

import pandas as pd

from lib import effects, findings
from lib.effects import CriticalLayers, CriticalSlice
from lib.findings import in_halves, interval, listed, picked, reported
from lib.params import Shared
from lib.stats import Interval
from lib.steps import Step

OVER_QUADS = "confirmation half, 95% studentised bootstrap intervals over quads"
CAPTIONS = {
    "coarse-curves": "Recovery (denoise) and damage (noise) when the residual stream at one role is replaced after each "
    f"layer; {OVER_QUADS}. Shaded: the critical layers, picked on the discovery half.",
    "necessity-ranked": "The sites whose ablation at the last token costs most, picked on the discovery half, with their "
    "effect in both halves and intervals that hold for all sites together.",
    "necessity-layers": "Damage when a whole attention or MLP module is replaced by its counterfactual; "
    + OVER_QUADS
    + ".",
    "sufficiency-slice": "Joint recovery and joint counterfactual damage as heads and MLPs are added in order of discovery "
    "recovery, both halves, 95% studentised bootstrap intervals over quads.",
    "sufficiency-ranked": "The sites whose clean activation at the last token recovers most, picked on the discovery half, "
    "with their effect in both halves and intervals that hold for all sites together.",
}


def about_model(step: Step) -> dict:
    """What a findings file says of the model."""
    record = step.record.get("model", {})
    return {"name": step.params.model, **{key: value for key, value in record.items() if key != "name"}}


def not_done(step: Step) -> dict:
    """The findings of a step whose task the model cannot do."""
    sentence = f"Nothing was computed for the task `{step.params.task}`: {step.able().why}"
    subject = {"model": {"name": step.params.model}, "task": step.params.task}
    return {**subject, "able": False, "sentences": [sentence], "figures": []}


def top_sites_sentence(table: pd.DataFrame, params: Shared, count: int, what: str) -> str:
    """The leading sites, picked on discovery, with their confirmation effects."""
    top = reported(picked(table, count))
    each = [f"{row.site} ({interval(row.estimate, row.low, row.high)})" for row in top.itertuples()]
    found = len(findings.confirmed(table, params))
    return (
        f"The {count} sites of largest {what} on the discovery half are, with their effect on logit_diff on the "
        f"confirmation half (logits, familywise {params.level:.0%} intervals): {listed(each)}. "
        f"Of {table['site'].nunique()} sites, {found} are significant familywise in both halves with a positive effect."
    )


def coarse(step: Step, records: pd.DataFrame, curves: pd.DataFrame, critical: CriticalLayers) -> dict:
    """The findings of step 02."""
    params, sentences = step.params, []
    confirmation = in_halves(records)[-1][1]
    denoise = confirmation[confirmation["direction"] == "denoise"]
    for position in dict.fromkeys(records["position"]):
        layer, row = findings.crossing(curves, position)
        rows = denoise[denoise["position"] == position]
        sample = f"{rows['pair_id'].nunique()} pairs of {rows['quad_id'].nunique()} quads, confirmation half"
        verb = "rises above" if position == "last" else "falls below"
        if layer is None:
            sentences.append(f"At `{position}` recovery never {verb} one half for good ({sample}).")
            continue
        value = interval(row["estimate"], row["low"], row["high"])
        sentences.append(f"At `{position}` recovery {verb} one half after layer {layer}: {value} ({sample}).")
    rises = [f"{layer} ({rise:+.2f})" for layer, rise in zip(critical.layers, critical.rises, strict=True)]
    critical_text = (
        f"The critical layers, the fewest whose rises of the denoise curve at `last` make up "
        f"{params.critical_share:.0%} of it on the discovery half, are {listed(rises)}; "
        f"together {critical.share:.0%} of the curve."
    )
    confirmed_rises = findings.rises_of(curves, critical.layers)
    sentences += [critical_text, f"On the confirmation half the same layers make up {confirmed_rises:.0%}."]
    flips = {
        direction: effects.first_flip_layer(rows, params.restores_share)
        for direction, rows in confirmation[confirmation["position"] == "last"].groupby("direction", sort=False)
    }
    for direction, layer in flips.items():
        what = "gives the clean answer" if direction == "denoise" else "takes the clean answer away"
        where = f"layer {layer} is the first that" if layer is not None else "no layer"
        sentences.append(
            f"Replacing the residual stream at `last` ({direction}): {where} {what} in at least "
            f"{params.restores_share:.0%} of the pairs."
        )
    if params.aggregator_layer != "auto":
        inside = "is" if params.aggregator_layer in critical.layers else "is not"
        sentences.append(f"The hypothesis of the profile, layer {params.aggregator_layer}, {inside} among them.")
    return {
        "model": about_model(step),
        "task": params.task,
        "able": True,
        "critical_layers": critical.layers,
        "critical_rises": critical.rises,
        "critical_share_confirmation": confirmed_rises,
        "first_flip_layer": flips,
        "sentences": sentences,
        "headline": [sentences[0], critical_text],
    }


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
        *[
            f"Over sites, the effects of `{kind}` rank as those of `{lead}` do with a Spearman correlation of {value}."
            for kind, value in agree.items()
        ],
        *[f"Under `{kind}`, {top_sites(own, 3)} lead." for kind, own in tables.items() if kind != lead],
    ]
    for role, rows in names.groupby("position", sort=False):
        best = rows.loc[rows["estimate"].idxmax()]
        value = interval(best["estimate"], best["low"], best["high"])
        site = findings.site_name(best["layer"], best["component"])
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


def top_sites(table: pd.DataFrame, count: int) -> str:
    """The leading sites, picked on discovery, with their confirmation effects in logits."""
    top = reported(picked(table, count))
    return listed(f"{row.site} ({interval(row.estimate, row.low, row.high)})" for row in top.itertuples())


def site_rows(table: pd.DataFrame) -> list[dict]:
    """The confirmation rows of a table, for steps that follow."""
    keep = ["site", "layer", "component", "head", "estimate", "low", "high", "p", "ratio", "ratio_low", "ratio_high"]
    return reported(table)[keep].to_dict("records")


def heads_or_mlps(table: pd.DataFrame, params: Shared, what: str) -> str:
    """How the confirmed sites divide into heads, MLPs and whole attention modules."""
    sure = findings.confirmed(table, params)
    counts = {name: int((sure["component"] == component).sum()) for name, component in KINDS.items()}
    best = []
    for name, component in KINDS.items():
        rows = picked(table[table["component"] == component], 1) if (table["component"] == component).any() else None
        if rows is not None:
            row = reported(rows).iloc[0]
            share = interval(row["ratio"], row["ratio_low"], row["ratio_high"])
            best.append(f"{row['site']} among {name} ({share} of logit_diff)")
    return (
        f"Significant in both halves are {listed(f'{count} {name}' for name, count in counts.items())}; "
        f"the largest {what} is that of {listed(best)}."
    )


KINDS = {"heads": "head", "MLPs": "mlp", "attention modules": "attn"}


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
    restoring = findings.restoring(records, table, params)
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
        f"The critical slice, heads and MLPs added in order of discovery recovery, has {critical.size} sites and "
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
