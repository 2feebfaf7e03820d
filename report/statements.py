"""The findings of each step: the numbers handed on and the sentences that state them.

Every sentence is built from the numbers it states, so none can outlive them; a negative result is said as plainly as a
positive one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lib import effects, findings, stats
from lib.ability import CHANCE
from lib.effects import CriticalLayers, CriticalSlice
from lib.findings import in_halves, interval, listed, picked, reported
from lib.stats import Interval
from lib.step_params import Shared
from lib.steps import Step
from report import plots

ONE_HALF = (
    " The pairs form a single half here: what is said of discovery and confirmation is about the same pairs, so the "
    "leading sites are picked and reported on the same data."
)
OVER_QUADS = "confirmation half, 95% studentised bootstrap intervals over quads"
CAPTIONS = {
    "baselines-accuracy": "Accuracy per template among the candidates, on people drawn before any selection; Wilson "
    "intervals. The dashed line is chance for five supersets (odd-one-out: one third).",
    "coarse-curves": "Recovery (denoise) and damage (noise) when the residual stream at one role is replaced after "
    f"each layer; {OVER_QUADS}. Shaded: the critical layers, picked on the discovery half.",
    "necessity-ranked": "The sites whose ablation at the last token costs most, picked on the discovery half, with "
    "their effect in both halves and intervals that hold for all sites together.",
    "necessity-layers": f"Damage when a whole attention or MLP module is replaced; {OVER_QUADS}.",
    "sufficiency-slice": "Joint recovery and joint counterfactual damage as heads and MLPs are added in order of "
    "discovery recovery, both halves, 95% studentised bootstrap intervals over quads.",
    "sufficiency-ranked": "The sites whose clean activation at the last token recovers most, picked on the discovery "
    "half, with their effect in both halves and intervals that hold for all sites together.",
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


def joined(step: Step, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The findings of a step of several parts, their figures saved.

    A part has `sentences`, `figures` by name, `captions` of those that are saved, perhaps a `headline`, and its numbers
    as mappings under names of its own.
    """
    own = {"figures", "captions"}
    numbers = {
        key: value for part in parts for key, value in part.items() if isinstance(value, Mapping) and key not in own
    }
    return {
        "model": about_model(step),
        "task": step.params.task,
        "able": True,
        **numbers,
        "sentences": [sentence for part in parts for sentence in part["sentences"]],
        "headline": [sentence for part in parts for sentence in part.get("headline", part["sentences"][:1])],
        "figures": [
            {"file": plots.save(figure, step.results, step.name, name), "caption": part["captions"][name]}
            for part in parts
            for name, figure in part["figures"].items()
            if name in part["captions"]
        ],
    }


def accuracies(frame: pd.DataFrame, params: Shared, by: list[str]) -> pd.DataFrame:
    """Share of prompts answered right, with Wilson intervals; each item is a unit (its people are in no other)."""
    rows = []
    for key, part in frame.groupby(by, sort=False):
        units = part.groupby("item")["correct"].agg(["sum", "count"])
        span = stats.proportion_interval(units["sum"], units["count"], params.level)
        chance = CHANCE[part["task"].iloc[0]]
        test = stats.above_chance(units["sum"], units["count"], chance, params.level)
        numbers = {"estimate": span.estimate, "low": span.low, "high": span.high, "prompts": len(part)}
        rows.append(dict(zip(by, key, strict=True)) | numbers | {"chance": chance, "above": test.above, "p": test.p})
    return pd.DataFrame(rows)


def abilities(accuracy: pd.DataFrame, pairs: pd.DataFrame | None, params: Shared) -> dict[str, dict]:
    """Which tasks the model can do: accuracy above chance, and, for the profile's own task, enough solved pairs."""
    out = {}
    for row in accuracy.itertuples():
        if row.task == params.task and row.template != params.template:
            continue
        value = interval(row.estimate, row.low, row.high)
        why = f"accuracy {value} on {row.prompts} prompts of template `{row.template}`, chance {row.chance:.2f}"
        able, why = row.above, why if row.above else f"{why}: not above chance with {params.level:.0%} confidence"
        if row.task == params.task and row.above:
            count = 0 if pairs is None else len(pairs)
            able = count >= params.min_pairs
            why += f"; {count} solved pairs" + ("" if able else f", fewer than the {params.min_pairs} asked for")
        known = out.get(row.task)
        if known is None or (able and not known["able"]):
            out[row.task] = {"able": bool(able), "why": why}
    return out


def baselines(
    step: Step, frame: pd.DataFrame, accuracy: pd.DataFrame, pairs: pd.DataFrame | None, drops: list[dict], failed: str
) -> dict:
    """The findings of step 01: what the model can do, what it says itself, and the pairs that are left."""
    params, sentences = step.params, []
    able = abilities(accuracy, pairs, params)
    for task, verdict in able.items():
        can = "can do" if verdict["able"] else "cannot do"
        sentences.append(f"The model {can} `{task}`: {verdict['why']}.")
    own = frame[(frame["task"] == params.task) & (frame["template"] == params.template)]
    said = own["top_token"].value_counts(normalize=True).head(5)
    words = [f'"{token}" ({share:.0%})' for token, share in said.items()]
    sentences.append(f"Its own top tokens on `{params.template}` are {listed(words)}.")
    if own["label_probability"].notna().any():
        sentences.append(
            f"It gives the supersets a total probability of {own['candidate_probability'].mean():.2f} and the "
            f"single-token profession labels {own['label_probability'].mean():.2f}, on average over prompts."
        )
    if pairs is not None:
        quads = pairs.groupby("half")["quad_id"].nunique()
        gap = (pairs["fame_clean"] - pairs["fame_corrupt"]).abs().max() if "fame_clean" in pairs else None
        fame = "" if gap is None else f" The fame of the two sides of a pair differs by {gap:.2f} nats at most."
        sentences.append(
            f"{len(pairs)} pairs in {listed(f'{count} {half} quads' for half, count in quads.items())} are left; "
            f"every one has a margin above zero in the clean prompt and below zero in the corrupt one.{fame}"
        )
    if failed:
        sentences.append(failed)
    main = able.get(params.task, {"able": False})
    return {
        "model": about_model(step),
        "task": params.task,
        "able": able,
        "pairs": 0 if pairs is None else len(pairs),
        "drops": drops,
        "accuracy": accuracy.to_dict("records"),
        "sentences": sentences,
        "headline": sentences[: len(able)] if main["able"] else sentences,
        "figures": [],
    }


def top_sites_sentence(table: pd.DataFrame, params: Shared, count: int, what: str) -> str:
    """The leading sites, picked on discovery, with their confirmation effects."""
    top = reported(picked(table, count))
    each = [f"{row.site} ({interval(row.estimate, row.low, row.high)})" for row in top.itertuples()]
    found = len(findings.confirmed(table, params))
    return (
        f"The {count} sites of largest {what} on the discovery half are, with their effect on logit_diff on the "
        f"confirmation half (logits, familywise {params.level:.0%} intervals): {listed(each)}. "
        f"Of {table['site'].nunique()} sites, {found} are significant familywise in both halves with a positive effect."
        + ONE_HALF
        * (table["half"].nunique() == 1)
    )


def coarse(step: Step, records: pd.DataFrame, curves: pd.DataFrame, critical: CriticalLayers) -> dict:
    """The findings of step 02."""
    params, sentences, moves = step.params, [], {}
    confirmation = in_halves(records)[-1][1]
    denoise = confirmation[confirmation["direction"] == "denoise"]
    for position in dict.fromkeys(records["position"]):
        layer, row = findings.crossing(curves, position)
        rows = denoise[denoise["position"] == position]
        sample = f"{rows['pair_id'].nunique()} pairs of {rows['quad_id'].nunique()} quads, confirmation half"
        verb = "rises above" if position == "last" else "falls below"
        if layer is None:
            moves[position] = f"At `{position}` recovery never {verb} one half for good ({sample})."
        else:
            value = interval(row["estimate"], row["low"], row["high"])
            moves[position] = f"At `{position}` recovery {verb} one half after layer {layer}: {value} ({sample})."
    sentences += moves.values()
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
        "headline": [critical_text, *(moves[role] for role in ("names", "swapped", "last") if role in moves)],
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
