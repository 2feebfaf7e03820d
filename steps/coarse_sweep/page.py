"""Step 02 on its page: where the signal leaves the names and arrives at the last token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lib.effects import reported
from pipeline.step import Step
from report import plots
from report.words import OVER_QUADS, about_model, finished, interval, listed
from steps.coarse_sweep.measure import Measured

CAPTIONS = {
    "curves": "Recovery (denoise) and damage (noise) when the residual stream at one role is replaced after "
    f"each layer; {OVER_QUADS}. Shaded: the critical layers, picked on the discovery half.",
}


def crossing(curves: pd.DataFrame, position: str, direction: str = "denoise") -> tuple[int | None, pd.Series | None]:
    """Where the confirmation curve at a role crosses one half: upwards at `last`, downwards at the names. The layer
    after which it stays on the far side, and its row; None if it never does."""
    own = reported(curves)
    own = own[(own["direction"] == direction) & (own["position"] == position)].sort_values("layer")
    far = own["estimate"] > 0.5 if position == "last" else own["estimate"] < 0.5
    stays = far[::-1].cummin()[::-1]
    return (None, None) if not stays.any() else (int(own.loc[stays.idxmax(), "layer"]), own.loc[stays.idxmax()])


def flip_share(frame: pd.DataFrame) -> pd.Series:
    """Share of pairs whose margin changes sign, by layer: from above 0 to below it (noise), the other way (denoise).

    A pair that already was on the far side counts as not flipped. One component, position and direction at a time.
    """
    towards = 1 if (frame["direction"] == "denoise").all() else -1
    flipped = (towards * frame["metric_before"] < 0) & (towards * frame["metric_after"] > 0)
    return flipped.groupby(frame["layer"]).mean().rename("flip_share")


def first_flip_layer(frame: pd.DataFrame, share: float) -> int | None:
    """The first layer at which the margin's sign flips in at least `share` of the pairs; None if there is none."""
    shares = flip_share(frame)
    enough = shares.index[shares >= share]
    return int(enough[0]) if len(enough) else None


def rises_of(curves: pd.DataFrame, layers: Sequence[int]) -> float:
    """What the rises at these layers make up of the confirmation curve at `last`."""
    own = reported(curves)
    own = own[(own["direction"] == "denoise") & (own["position"] == "last")].set_index("layer")["estimate"].sort_index()
    rises = own.diff().fillna(own.iloc[0])
    return float(rises[list(layers)].sum() / own.iloc[-1])


def curves_figure(m: Measured) -> Figure:
    """Recovery and damage along the layers, the critical ones shaded."""
    axis = "share of the clean - corrupt logit_diff"
    return plots.layer_curve(reported(m.curves), axis, panel="direction", marked=m.critical.layers)


def moves_of(m: Measured, confirmation: pd.DataFrame) -> dict[str, str]:
    """For each role, a sentence on where recovery crosses one half."""
    moves = {}
    denoise = confirmation[confirmation["direction"] == "denoise"]
    for position in dict.fromkeys(m.records["position"]):
        layer, row = crossing(m.curves, position)
        rows = denoise[denoise["position"] == position]
        sample = f"{rows['pair_id'].nunique()} pairs of {rows['quad_id'].nunique()} quads, confirmation half"
        verb = "rises above" if position == "last" else "falls below"
        if layer is None:
            moves[position] = f"At `{position}` recovery never {verb} one half for good ({sample})."
        else:
            value = interval(row["estimate"], row["low"], row["high"])
            moves[position] = f"At `{position}` recovery {verb} one half after layer {layer}: {value} ({sample})."
    return moves


def findings(step: Step, m: Measured) -> dict[str, Any]:
    """The findings of step 02."""
    params, confirmation = step.params, reported(m.records)
    moves = moves_of(m, confirmation)
    sentences = list(moves.values())
    rises = [f"{layer} ({rise:+.2f})" for layer, rise in zip(m.critical.layers, m.critical.rises, strict=True)]
    critical_text = (
        f"The critical layers, the fewest whose rises of the denoise curve at `last` make up "
        f"{params.critical_share:.0%} of it on the discovery half, are {listed(rises)}; "
        f"together {m.critical.share:.0%} of the curve."
    )
    confirmed_rises = rises_of(m.curves, m.critical.layers)
    sentences += [critical_text, f"On the confirmation half the same layers make up {confirmed_rises:.0%}."]
    flips = {
        direction: first_flip_layer(rows, params.restores_share)
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
        "headline": [critical_text, *(moves[role] for role in ("names", "swapped", "last") if role in moves)],
    }
    return finished(step, found, {"curves": curves_figure(m)}, CAPTIONS)
