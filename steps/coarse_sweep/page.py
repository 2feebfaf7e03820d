"""Step 02 on its page: where the signal leaves the names, which way it goes, and where it arrives at the last token.

1. `crossing`, `first_flip_layer` and `rises_of` read the curves of single roles.
2. `account` shares the gap out over the roles, layer by layer, with what is left over; `through_between` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from lib import stats
from lib.effects import by_half, columns, effect, in_halves, quad_matrix, reported
from lib.stats import Settings
from lib.sweep import DIRECTIONS
from pipeline import keys
from pipeline.params import Shared
from pipeline.step import Step
from report import plots
from report.site_tables import answered
from report.words import OVER_QUADS, about_model, counted, finished, interval, listed, of_row, tabled
from steps.coarse_sweep import lenses_page
from steps.coarse_sweep.measure import Measured, fewest_layers

PARTS = ("names", "between", "last", "rest")  # every token has one of these roles; a role not swept is in the remainder
REMAINDER = "remainder"
OUTSIDE = "data/patching_llama-3.3-70b.csv"
CAPTIONS = {
    "curves": "Recovery (denoise) and damage (noise) when the residual stream at one role is replaced after "
    f"each layer; {OVER_QUADS}. Shaded: the critical layers, picked on the discovery half.",
    "account": "The gap between clean and corrupt, shared out after each layer: what each role recovers alone, and the "
    "remainder, which none of the roles drawn does (a role that was not swept is part of it). "
    f"{OVER_QUADS[0].upper()}{OVER_QUADS[1:]}.",
}


def crossing(curves: pd.DataFrame, position: str, direction: str = "denoise") -> tuple[int | None, pd.Series | None]:
    """Where the curve at a role crosses one half: upwards at `last`, downwards at the names. The layer after which the
    estimate stays on the far side on the discovery half, and the confirmation half's row there; None if it never
    does."""
    own = curves[(curves["direction"] == direction) & (curves["position"] == position)].sort_values("layer")
    if own.empty:
        return None, None
    first, last = in_halves(own)[0][1], reported(own)
    far = first["estimate"] > 0.5 if position == "last" else first["estimate"] < 0.5
    stays = far[::-1].cummin()[::-1]
    if not stays.any():
        return None, None
    layer = int(first.loc[stays.idxmax(), "layer"])
    return layer, last[last["layer"] == layer].iloc[0]


def flip_share(frame: pd.DataFrame) -> pd.Series:
    """Share of answered pairs whose margin changes sign, by layer: to below 0 (noise) or to above it (denoise).

    One component, position and direction at a time.
    """
    own = frame[answered(frame)]
    towards = 1 if (own["direction"] == "denoise").all() else -1
    return (towards * own["metric_after"] > 0).groupby(own["layer"]).mean().rename("flip_share")


def first_flip_layer(frame: pd.DataFrame, share: float) -> int | None:
    """The first layer at which the margin's sign flips in at least `share` of the answered pairs, or None."""
    shares = flip_share(frame)
    enough = shares.index[shares >= share]
    return int(enough[0]) if len(enough) else None


def flip_sentence(direction: str, layer: int | None, params: Shared) -> str:
    """The first layer that flips the answer in one direction."""
    what = "gives the clean answer" if direction == "denoise" else "takes the clean answer away"
    where = "no layer" if layer is None else f"looked for and read on the same pairs, layer {layer} is the first that"
    return (
        f"Replacing the residual stream at `last` ({direction}): {where} {what} in at least "
        f"{params.restores_share:.0%} of the pairs that the model answers rightly."
    )


def rises_of(curves: pd.DataFrame, layers: Sequence[int]) -> float:
    """What the rises at these layers make up of the confirmation curve at `last`."""
    own = reported(curves)
    own = own[(own["direction"] == "denoise") & (own["position"] == "last")].set_index("layer")["estimate"].sort_index()
    rises = own.diff().fillna(own.iloc[0])
    return float(rises[list(layers)].sum() / own.iloc[-1])


def account(records: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """The gap shared out after each layer: the recovery of each of PARTS that was swept, alone, and the `remainder`,
    with which they add up to 1, in `position`; `rise` is the change of each from the layer before. One half; the pairs
    that were swept at all of the roles."""
    own = records[(records["direction"] == "denoise") & records["position"].isin(PARTS)]
    roles = own.groupby("pair_id")["position"].nunique()
    own = own[own["pair_id"].isin(roles.index[roles == own["position"].nunique()])]
    by_role = ["layer", "position"]
    moved, gaps = (quad_matrix(own, value, by_role, "sum") for value in ("effect", "gap"))
    layers, names = (list(dict.fromkeys(moved.sites[column])) for column in by_role)
    gap = gaps.values[:, 0]
    shares = moved.values.reshape(len(gap), len(layers), len(names))
    shares = np.append(shares, gap[:, None, None] - shares.sum(2, keepdims=True), axis=2)
    out = pd.DataFrame({"layer": np.repeat(layers, len(names) + 1), "position": [*names, REMAINDER] * len(layers)})
    for prefix, each in (("", shares), ("rise_", np.diff(shares, axis=1, prepend=0))):
        spans = stats.ratio_intervals(each.reshape(len(gap), -1), gap, settings)
        out = out.assign(**columns(spans, prefix))
    return out.assign(quads=len(gap))


def through_between(table: pd.DataFrame, share: float) -> tuple[dict[str, Any], list[str]]:
    """What passes through the tokens between the names and the last one: numbers, and sentences. `table` is `account`
    of each half; layers are picked on the first of them, and reported on the last.

    `at` is the layer after which the role carries most; it fills in the fewest layers whose rises make up `share` of
    all rises up to there, and empties in those whose falls make up `share` of all falls from there on.
    """
    first, own = in_halves(table)[0][1], reported(table).set_index(["position", "layer"])
    curve = first[first["position"] == "between"].set_index("layer")["estimate"]
    at = int(curve.idxmax())
    parts = own.xs(at, level="layer")
    sample = f"{counted(parts['quads'].iloc[0], 'quad')}, {reported(table)['half'].iloc[0]} half"
    shares = [(f"`{name}`", of_row(row)) for name, row in parts.iterrows() if name != REMAINDER]
    text = (
        f"The tokens between the names and the last one carry most after layer {at} (picked on the "
        f"{first['half'].iloc[0]} half). There each role alone brings back ({sample}):\n\n"
        + tabled(
            ("role", "share of the gap"), [*shares, ("brought back by no role alone", of_row(parts.loc[REMAINDER]))]
        )
    )
    found = {"at": at, "parts": parts.reset_index().to_dict("records")}
    held = parts.loc["between"]
    if curve[at] <= 0 or pd.isna(held["low"]) or held["low"] <= 0:
        why = "there are too few quads to test whether it is" if pd.isna(held["low"]) else "it is not shown to be"
        return found, [text, f"What `between` carries there: {why} above zero."]

    def moved(layers: tuple[int, ...], role: str) -> str:
        rises = own.loc[role].loc[list(layers), [f"rise_{end}" for end in ("estimate", "low", "high")]].to_numpy()
        most = int(np.argmax(np.abs(rises[:, 0].astype(float))))
        of = f"most in layer {layers[most]}, " * (len(layers) > 1)
        return f"{'layers' if len(layers) > 1 else 'layer'} {listed(layers)} ({of}by {interval(*rises[most])})"

    fills = fewest_layers(curve.loc[:at], share).layers
    found |= {"fills": fills}
    lines = [f"`between` fills in {moved(fills, 'between')}"]
    if curve.loc[at:].iloc[-1] < curve.loc[at]:
        empties = fewest_layers(curve.loc[at] - curve.loc[at:], share).layers
        found |= {"empties": empties}
        lines += [f"empties in {moved(empties, 'between')}"]
        gains = f" There `last` gains, in {moved(empties, 'last')}."
        return found, [text, f"In shares of the gap, {' and '.join(lines)}.{gains}"]
    return found, [text, f"In shares of the gap, {' and '.join(lines)}."]


def mirrors(pairs: pd.DataFrame) -> dict[str, str]:
    """For each pair that has one, its mirror: the same two prompts, clean and corrupt exchanged."""
    slots = [slot for slot in "abc" if f"clean_{slot}" in pairs]
    sides = [
        [f"{side}_{slot}" for slot in slots] + [answer]
        for side, answer in (("clean", "answer"), ("corrupt", "corrupt_answer"))
    ]
    rows = pairs.fillna({name: "" for side in sides for name in side})
    clean, corrupt = (list(rows[["template", *side]].itertuples(index=False, name=None)) for side in sides)
    own = dict(zip(zip(clean, corrupt, strict=True), rows["pair_id"], strict=True))
    turned = zip(rows["pair_id"], zip(corrupt, clean, strict=True), strict=True)
    return {pair: own[key] for pair, key in turned if key in own}


def mirror(m: Measured, pairs: pd.DataFrame) -> dict[str, float | None]:
    """How noise in a pair agrees with denoise in its mirror: the correlation over the confirmation pairs whose mirror
    was swept, too, of the effects at `last`, after the critical layer of the largest rise; None with fewer than
    three."""
    layer, other = m.critical.layers[int(np.argmax(m.critical.rises))], mirrors(pairs)
    own = reported(m.records)
    own = own[(own["position"] == "last") & (own["layer"] == layer)].assign(effect=effect)
    noise, denoise = (own[own["direction"] == way].groupby("pair_id")["effect"].mean() for way in DIRECTIONS)
    denoise = denoise[denoise.index.isin(other)].rename(index=other)
    both = pd.DataFrame({"noise": noise, "mirrored": denoise}).dropna()
    alike = both["noise"].corr(both["mirrored"]) if len(both) > 2 else None
    return {"layer": layer, "correlation": alike, "pairs": len(both)}


def account_of(m: Measured, params: Shared) -> pd.DataFrame:
    """The account of the gap in each half."""
    return by_half(m.records, lambda half: account(half, params))


def account_figure(step: Step, m: Measured) -> Figure:
    """The gap shared out over the roles, layer by layer."""
    return plots.layer_curve(reported(account_of(m, step.params)), "share of the clean - corrupt logit_diff")


def outside(step: Step, m: Measured) -> pd.DataFrame:
    """What was measured elsewhere on this model, beside the recovery here, by layer; no rows for other models."""
    table = pd.read_csv(keys.input_file(OUTSIDE), comment="#")
    own = reported(m.curves)
    own = own[(own["direction"] == "denoise") & (own["position"] == "last")]
    here = own[["layer", "estimate"]].rename(columns={"estimate": "residual here"})
    return table[table["model"] == step.params.model].drop(columns="model").merge(here, on="layer")


def outside_sentence(table: pd.DataFrame) -> str:
    """Where the outside curve rises most, and what carries it there."""
    rises = table["residual"].diff()
    most = table.loc[rises.idxmax()]
    strong = table[table["attention_window5"] > 0.5]
    here = table["residual here"].diff()
    return (
        f"Elsewhere the residual stream at `last` rises most at layer {most['layer']:.0f} ({rises.max():+.2f}, to "
        f"{most['residual']:.2f}; no intervals were published). That was activation patching of a fine-tuned "
        "Llama-3.3-70B on long bi-association prompts, seven pairs; github.com/giordanorogers/mechinterp. Windows of "
        f"five layers' attention reach {strong['attention_window5'].max():.2f} there around layers "
        f"{strong['layer'].min()} to {strong['layer'].max()}, and of their MLPs {strong['mlp_window5'].max():.2f} (no "
        f"intervals). In this run the largest rise is at layer {table.loc[here.idxmax(), 'layer']:.0f} "
        f"({here.max():+.2f}, a difference of two estimates, without an interval)."
    )


def ranks_figure(step: Step, m: Measured) -> Figure | None:
    """Recovery, and the ranks of right words, layer by layer, where words were read."""
    if m.words is None:
        return None
    return lenses_page.ranks_figure(m.curves, m.words, step.params, m.critical.layers)


def compared_figure(step: Step, m: Measured) -> Figure | None:
    """How much better a word's rank is where it is right, where words were read."""
    if m.words is None:
        return None
    return lenses_page.compared_figure(m.words, step.params, m.critical.layers)


def read_table(step: Step, m: Measured) -> pd.DataFrame | Markdown:
    """Where words are read above control, where they were read."""
    if m.words is None:
        return Markdown("No words were read: that is done where the answer is a superset.")
    ranks, settings = lenses_page.typical(m.words, step.params), step.params
    return lenses_page.where_read(lenses_page.compared(m.words, settings), ranks, settings)


def curves_figure(m: Measured) -> Figure:
    """Recovery and damage along the layers, the critical ones shaded."""
    axis = "share of the clean - corrupt logit_diff"
    return plots.layer_curve(reported(m.curves), axis, panel="direction", marked=m.critical.layers)


def moves_of(m: Measured, confirmation: pd.DataFrame) -> dict[str, str]:
    """For `last` and the names, a sentence on where recovery crosses one half."""
    moves = {}
    denoise = confirmation[confirmation["direction"] == "denoise"]
    for position in dict.fromkeys(m.records["position"]):
        if position in ("between", "rest"):  # where the signal neither begins nor ends
            continue
        layer, row = crossing(m.curves, position)
        rows = denoise[denoise["position"] == position]
        pairs, quads = (rows[f"{name}_id"].nunique() for name in ("pair", "quad"))
        sample = f"{counted(pairs, 'pair')} of {counted(quads, 'quad')}, confirmation half"
        picked_on = in_halves(m.curves)[0][0]
        way = "upwards" if position == "last" else "downwards"
        lead = f"At `{position}` the estimate of recovery"
        if layer is None:
            moves[position] = f"{lead} never crosses one half {way} for good ({picked_on} half)."
        elif layer == m.curves["layer"].min():
            side = "above" if position == "last" else "below"
            moves[position] = f"{lead} is {side} one half from the first layer on ({picked_on} half)."
        else:
            moves[position] = (
                f"{lead} crosses one half {way} after layer {layer} (picked on the {picked_on} half): {of_row(row)} "
                f"there ({sample})."
            )
    return moves


def findings(step: Step, m: Measured) -> dict[str, Any]:
    """The findings of step 02."""
    params, confirmation = step.params, reported(m.records)
    moves = moves_of(m, confirmation)
    sentences = list(moves.values())
    several, most = len(m.critical.layers) > 1, m.critical.layers[int(np.argmax(m.critical.rises))]
    critical_text = (
        f"{'Layers' if several else 'Layer'} {listed(m.critical.layers)} {'are' if several else 'is'} critical: the "
        f"fewest whose rises of the denoise curve at `last` make up {params.critical_share:.0%} of it on the discovery "
        f"half" + f"; the largest rise is that of layer {most}" * several + "."
    )
    confirmed_rises = rises_of(m.curves, m.critical.layers)
    share = f"{m.critical.share:.0%} of the curve there, and {confirmed_rises:.0%} of it on the confirmation half"
    sentences += [critical_text, f"{'Together they make' if several else 'It makes'} up {share}."]
    headline = [critical_text, *(moves[role] for role in ("names", "swapped", "last") if role in moves)]
    figures = {"curves": curves_figure(m)}
    flips = {
        direction: first_flip_layer(rows, params.restores_share)
        for direction, rows in confirmation[confirmation["position"] == "last"].groupby("direction", sort=False)
    }
    if answered(confirmation).any():
        sentences += [flip_sentence(direction, layer, params) for direction, layer in flips.items()]
    else:
        sentences.append(
            "No confirmation pair is answered rightly, so that no layer can give or take the right answer."
        )
    passing: dict[str, Any] = {"why": "the tokens between the names and the last one were not swept"}
    if {"between", "last"} <= {*m.records["position"]}:
        passing, told = through_between(account_of(m, params), params.critical_share)
        sentences += told
        headline.append(told[-1])
        figures["account"] = account_figure(step, m)
    sentences += [] if m.words is None else lenses_page.sentences(m.words, params)
    if len(known := outside(step, m)) > 1:
        sentences.append(outside_sentence(known))
    if params.aggregator_layer != "auto":
        inside = "is" if params.aggregator_layer in m.critical.layers else "is not"
        sentences.append(f"The hypothesis of the profile, layer {params.aggregator_layer}, {inside} among them.")
    found = {
        "model": about_model(step),
        "task": params.task,
        "able": True,
        "critical_layers": m.critical.layers,
        "critical_rises": m.critical.rises,
        "critical_share_confirmation": confirmed_rises,
        "first_flip_layer": flips,
        "sentences": sentences,
        "between": passing,
        "mirror": mirror(m, step.pairs()),
        "headline": headline,
    }
    return finished(step, found, figures, CAPTIONS)
