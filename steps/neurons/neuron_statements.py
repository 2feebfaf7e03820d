"""Sentences of step 09 on single neurons, from the tables of `steps.neurons.neurons_page`, and the numbers handed on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats as tests

from lib import stats
from lib.effects import in_halves, reported
from report.plots import Figure
from report.words import interval, listed
from steps.neurons.measure import Neurons
from steps.neurons.neurons_page import NEURON, QUANTITY, added_up, means, selective, significant

HALF = 0.5  # "carry" means more than half of the MLPs' joint effect
CAPTIONS = {
    "top": "The neurons of largest effect either way, picked on the discovery half: fall of logit_diff when each "
    "is given its corrupt value in the clean run, both halves; intervals hold for all of the top neurons together.",
    "joint": "Joint effect of the top neurons as a share of that of the same layers' whole MLPs, beside the sum of "
    " their single effects and random neurons of the same layers that write as much; confirmation half, 95% "
    "studentised bootstrap intervals over quads.",
}


def share_sentence(table: pd.DataFrame, quantity: str) -> str:
    """How much of the MLPs' joint effect the growing sets make up, one direction."""
    own = table[table["quantity"] == quantity]
    rows = {(row.kind, row.n_sites): interval(row.estimate, row.low, row.high) for row in own.itertuples()}
    text = f"The whole MLPs of these layers have a joint {quantity} of {own['mlps'].iloc[0]:.2f} logits."
    for kind, does in (("helping", "help"), ("opposing", "oppose")):
        sizes = [n for name, n in rows if name == kind]
        if not sizes:
            continue
        each = listed(f"{rows[kind, n]} ({n})" for n in sizes if n in (1, 10, max(sizes)))
        text += (
            f" Those that {does} the answer on discovery make up this share of it, replaced together: {each}; "
            f"the single effects of the {max(sizes)} add up to {rows[f'{kind}, summed', max(sizes)]}."
        )
        if kind == "helping" and ("random", max(sizes)) in rows:
            text += f" {max(sizes)} random neurons that write as much: {rows['random', max(sizes)]}."
    return text


def few(table: pd.DataFrame) -> str:
    """Whether a few neurons carry the MLPs' effect: how many it takes to be sure of more than half of it."""
    own = table[table["kind"] == "helping"]
    if own.empty or own["low"].isna().any():
        return "There are too few quads, or no neurons, to say whether a few neurons carry the MLPs' effect."
    most, count = int(own["n_sites"].max()), table["quantity"].nunique()
    sure = own[(own["low"] > HALF) & (own["above_random"] > 0)].groupby("n_sites")["quantity"].nunique()
    sure = sure[sure == len(QUANTITY)]
    if len(sure):
        n = int(sure.index.min())
        return (
            f"{n} neuron{'s' * (n > 1)} carr{'y' if n > 1 else 'ies'} more than half of what the MLPs do together "
            "(lower ends of the intervals of damage and recovery), and more than random neurons that write as much. "
            "That is a share of a net effect, which neurons that oppose the answer have already lowered."
        )
    last = own[own["n_sites"] == most]
    best = listed(f"{row.quantity} {interval(row.estimate, row.low, row.high)}" for row in last.itertuples())
    missing = "" if count == len(QUANTITY) else "; in the other direction the MLPs have no effect to carry"
    return (
        f"That a few neurons carry the MLPs' effect is not supported: the {most} that help are not shown to make up "
        f"more than half of it in both directions ({best}{missing})."
    )


def scope_sentences(frame: pd.DataFrame, chosen: pd.DataFrame) -> tuple[list[str], dict]:
    """What was swept, and how far the effects of single neurons repeat in the other half."""
    halves = [means(part) for _, part in in_halves(frame)]
    both = halves[0].merge(halves[-1], on=NEURON, suffixes=("", "_last"))
    quads = [f"{part['quad_id'].nunique()} {half} quads" for half, part in in_halves(frame)]
    layers = sorted(frame["layer"].unique())
    numbers = {"neurons": len(both), "layers": [int(layer) for layer in layers], "pairs": frame["pair_id"].nunique()}
    sentences = [
        f"Each of the {len(both):,} neurons of layer{'s' * (len(layers) > 1)} {listed(layers)} was replaced at `last` "
        f"in {numbers['pairs']} pairs ({listed(quads)}), its "
        "corrupt value into the clean run and its clean value into the corrupt run: "
        f"{len(frame):,} runs, each of which proved its edit."
    ]
    if len(quads) > 1:
        numbers["replication"] = float(tests.spearmanr(both["effect"], both["effect_last"]).statistic)
        picked = both.merge(chosen[NEURON], on=NEURON)
        kept = (np.sign(picked["effect"]) * picked["effect_last"]).sum() / picked["effect"].abs().sum()
        numbers["kept"] = float(kept)
        sentences.append(
            f"Over all of them the mean effects in the two halves have a Spearman correlation of "
            f"{numbers['replication']:.2f}; the {len(picked)} of largest discovery effect, either way, keep {kept:.0%} "
            "of it, signs counted, in the quads they were not picked on."
        )
        totals = {does: total for does, total in added_up(frame).items() if len(total) and total[-1] != 0}
        each = [
            f"those of the neurons that {does} on discovery reach {total[-1]:+.2f} logits, half of it after "
            f"{1 + int(np.argmax(total / total[-1] >= HALF)):,} of {len(total):,}"
            for does, total in totals.items()
        ]
        sentences.append(f"Added up in the order of the discovery effects, confirmation effects: {'; '.join(each)}.")
    return sentences, numbers


def top_sentences(tables: dict[str, pd.DataFrame], table: pd.DataFrame, params: Neurons) -> tuple[list[str], dict]:
    """The top neurons in more pairs: their effects, and how many are significant in both halves, by ablation."""
    lead, last = tables["counterfactual"], in_halves(table)[-1][1]
    own = reported(lead).sort_values("rank")
    each = listed(f"{row.site} ({interval(row.estimate, row.low, row.high)})" for row in own.head(6).itertuples())
    counts = {kind: significant(rows, params) for kind, rows in tables.items()}
    words = {
        "counterfactual": "their corrupt value",
        "clean": "their clean value in the corrupt run",
        "mean": "the mean",
    }
    sentences = [
        f"In {last['pair_id'].nunique()} pairs of {last['quad_id'].nunique()} {last['half'].iloc[0]} quads, the first "
        f"{min(6, len(own))}, picked on discovery, change logit_diff by (logits, familywise intervals over the "
        f"{len(own)}; positive: it helps the answer): {each}.",
        f"Significant familywise in each half with one sign are, of these {len(own)}, "
        + listed(
            f"{int((sign > 0).sum())} that help and {int((sign < 0).sum())} that oppose the answer under {words[kind]}"
            for kind, sign in counts.items()
        )
        + ".",
    ]
    return sentences, {"significant": {kind: sign.to_dict() for kind, sign in counts.items()}}


def direct_sentence(frame: pd.DataFrame, chosen: pd.DataFrame) -> str:
    """How much of the top neurons' effect is direct, by layer."""
    last = in_halves(frame)[-1][1]
    own = means(last).merge(chosen[NEURON], on=NEURON)
    each = [
        f"{layer} ({len(rows)} neurons): {rows['direct'].sum():+.2f} of {rows['effect'].sum():+.2f}"
        for layer, rows in own.groupby("layer")
    ]
    return (
        "What the top neurons write directly on logit_diff, without what later layers make of it, and their whole "
        f"effect, added up by layer (logits; {last['quad_id'].nunique()} {last['half'].iloc[0]} quads): {listed(each)}."
    )


def class_sentence(told: pd.DataFrame, swapped: pd.DataFrame, chosen: pd.DataFrame, quads: int) -> tuple[str, dict]:
    """How many neurons tell a superset from the others, among all and among the top; and whether they promote it."""
    own = told.merge(chosen[NEURON], on=NEURON)
    numbers = {"selective": int(told["selective"].sum()), "selective_swapped": int(swapped["selective"].sum())}
    numbers |= {"top_selective": int(own["selective"].sum())}
    for name, rows in (("area", told), ("top_area", own)):
        numbers[name] = float((rows["confirmation"] - 0.5).abs().median())
    higher = own[own["confirmation"] > 0.5]
    for name in ("promoted", "suppressed"):
        numbers[name] = int((higher["superset"] == higher[name]).sum())
    numbers["higher"] = len(higher)
    if reason := stats.too_few(quads, "quads"):
        return f"How many neurons are selective for a superset was not tested ({reason}).", numbers
    return (
        f"By its activation at `last`, {numbers['selective']:,} of {len(told):,} neurons tell a superset from the "
        "others (significant over neurons and supersets on discovery, again on confirmation with the same side; "
        f"{numbers['selective_swapped']:,} when the labels within each quad are exchanged at random), of the "
        f"{len(own)} top ones {numbers['top_selective']}; "
        f"the area's median distance from 0.5 is {numbers['area']:.2f} over all and {numbers['top_area']:.2f} over the "
        f"top ones. Of the {numbers['higher']} top neurons that are higher for their superset, {numbers['promoted']} "
        f"raise its own logit most, of all supersets, and {numbers['suppressed']} lower it most.",
        numbers,
    )


def card_sentence(told: pd.DataFrame, words: pd.DataFrame, lead: pd.DataFrame, count: int = 3) -> str:
    """The first cards in words."""
    rows = told.set_index("site").loc[words.index[:count]]
    effect = reported(lead).set_index("site")["estimate"]
    each = [
        f"{site}, {'higher' if row.mean > row.mean_others else 'lower'} for {row.superset}s ({row.mean:.2f} against "
        f"{row.mean_others:.2f}), {'helps' if effect[site] > 0 else 'opposes'} the answer by {abs(effect[site]):.2f} "
        f"logits and writes most on {words.loc[site, 'writes most on']}, least on {words.loc[site, 'writes least on']}"
        for site, row in zip(rows.index, rows.itertuples(), strict=True)
    ]
    return "; ".join(each) + "."


class Tables(NamedTuple):
    """What the page has made of the tables."""

    frame: pd.DataFrame  # every neuron
    chosen: pd.DataFrame  # `neuron_report.top`
    table: pd.DataFrame  # the sweep of the roster
    tables: dict[str, pd.DataFrame]  # `neuron_report.singles`
    carried: pd.DataFrame  # `neuron_report.shares`
    classes: pd.DataFrame
    words: pd.DataFrame  # `neuron_report.card_table`


def part(own: Tables, params: Neurons, figures: dict[str, Figure]) -> dict:
    """Sentences, figures for the landing page, and numbers of the part on single neurons."""
    swept, numbers = scope_sentences(own.frame, own.chosen)
    leading, sure = top_sentences(own.tables, own.table, params)
    joint = [share_sentence(own.carried, q) for q in own.carried.get("quantity", pd.Series(dtype=str)).unique()]
    told, swapped = (selective(own.classes, params, column) for column in ("auc", "auc_swapped"))
    quads = int(in_halves(own.classes)[0][1].groupby("superset")["n"].first().sum() / 2)
    about_class, counted = class_sentence(told, swapped, own.chosen, quads)
    verdict = few(own.carried) if joint else "The MLPs of these layers have no joint effect to be carried."
    ranked = own.chosen.merge(told[["site", "superset", "promoted", "discovery", "confirmation"]], on="site")
    reported_by = {
        kind: reported(rows)[["site", "estimate", "low", "high", "p", "ratio"]] for kind, rows in own.tables.items()
    }
    return {
        "sentences": [*swept, *leading, *joint, verdict, direct_sentence(own.frame, own.chosen), about_class]
        + [card_sentence(told, own.words, own.tables["counterfactual"])],
        "headline": [verdict, leading[0]],
        "figures": figures,
        "captions": {name: CAPTIONS[name] for name in figures},
        "neurons": numbers
        | sure
        | counted
        | {"top": ranked.to_dict("records"), "shares": own.carried.to_dict("records")}
        | {"effects": {kind: rows.to_dict("records") for kind, rows in reported_by.items()}},
    }
