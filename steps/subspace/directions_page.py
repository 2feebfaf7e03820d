"""Step 08, directions: from the tables of `steps.subspace.directions` and `steps.subspace.direction_sweeps` to numbers, figures, sentences.

1. `load` reads the table of directions for other steps, `basis` gives an orthonormal one of it.
2. `sums` gathers a table's changes per quad; every share here is a ratio of such sums (`ratios`): recovery over the
   gap between clean and corrupt, over the whole residual stream's effect, or over another direction's.
3. `layer_table` and `chosen_layer`, `by_number`, `against_random`, `single_classes`, `split_parts`, `dose_table` and
   `slopes`, `transfer_table` answer one question each; figures follow. `steps.subspace.direction_statements` has the sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib import effects, records, stats
from lib.effects import in_halves
from lib.tasks import Pair
from report import circuit_plots, plots
from report.plots import Figure
from steps.subspace.measure import Subspace

ONE = ("class difference", 1)
KINDS = ("mixed", "invented names", "things")
PARTS = {"": "all of it", "inside": "inside", "outside": "outside (dormant)"}


# --- for other steps ----------------------------------------------------------------------------------------------


def load(path: str | Path) -> pd.DataFrame:
    """The table subspace.directions.parquet (or the one of a results folder): a row per direction.

    Columns: template, layer (the residual stream after it, at `last`), method, k, class_name, index, vector (fp32
    array), prompts, half (of the fit), variance, between. Methods: "class mean" (a row per class and layer, for every
    template; not a unit vector), and at the chosen layer orthonormal "class means", "probe", "profession means",
    "component" (k = 0: nested, the first n make the subspace of n) and "rotation" (k directions learned together).
    """
    path = Path(path)
    return records.read(path / "subspace.directions.parquet" if path.is_dir() else path)


def basis(table: pd.DataFrame, method: str, k: int) -> np.ndarray:
    """(k, width) orthonormal directions of a method in the table that `load` gives; ValueError if there are fewer."""
    own = table[(table["method"] == method) & table["k"].isin([0, k])].sort_values("index")
    if len(own) < k or method == "class mean":
        raise ValueError(f"{len(own)} directions of method {method!r} were fitted together or nested, not {k}")
    return np.stack(own["vector"].tolist()[:k])


# --- numbers ------------------------------------------------------------------------------------------------------


def parsed(frame: pd.DataFrame) -> pd.DataFrame:
    """A table of variants with the columns method, k and part of their names."""
    words = frame["variant"].str.split("|", expand=True).set_axis(["method", "k", "part"], axis=1)
    return frame.join(words.astype({"k": int})).assign(effect=effects.effect(frame), gap=effects.gap(frame))


def last_half(frame: pd.DataFrame) -> pd.DataFrame:
    return in_halves(parsed(frame))[-1][1]


def sums(frame: pd.DataFrame, by: Sequence[str] = ("method", "k")) -> tuple[pd.DataFrame, pd.Series]:
    """Per quad, the sum over its pairs of each variant's effect (random: the mean over draws), and of the gap."""
    each = frame.groupby(["quad_id", "pair_id", *by])[["effect", "gap"]].mean()
    total = each.groupby(["quad_id", *by]).sum()
    return total["effect"].unstack(list(by)), each["gap"].groupby(["quad_id", "pair_id"]).first().groupby(
        "quad_id"
    ).sum()


def ratios(top: pd.DataFrame, bottom: pd.DataFrame | pd.Series, params: Subspace) -> pd.DataFrame:
    """Ratios of sums over quads with intervals: a row per column of `top`. Columns whose denominator is not above 0 are
    left out."""
    under = (
        bottom
        if isinstance(bottom, pd.DataFrame)
        else pd.DataFrame({name: bottom for name in top}, columns=top.columns)
    )
    kept = under.sum().to_numpy() > 0
    top, under = top.loc[:, kept], under.loc[:, kept]
    if not kept.any():
        return pd.DataFrame(columns=[*top.columns.names, "estimate", "low", "high", "quads"])
    spans = stats.ratio_intervals(top.to_numpy(), under.to_numpy(), params)
    return top.columns.to_frame(index=False).assign(**effects.columns(spans), quads=len(top))


def over_column(effect: pd.DataFrame, name: Any) -> pd.DataFrame:
    """A frame like `effect` with one of its columns everywhere, for a denominator."""
    return pd.DataFrame({column: effect[name] for column in effect}, columns=effect.columns)


def layer_table(scan: pd.DataFrame, layers: Sequence[int], params: Subspace) -> pd.DataFrame:
    """Recovery of each variant after each layer (`layer`) and in all sites of the slice together (layer -1), both
    halves; `share`: of the effect of everything patched there."""
    parts = []
    for half, own in in_halves(parsed(scan)):
        for number, rows in own.groupby("site_set"):
            effect, gap = sums(rows)
            table = ratios(effect, gap, params)
            share = ratios(effect, over_column(effect, ("whole", 0)), params).set_index(["method", "k"])
            share = (
                share[["estimate", "low", "high"]]
                .rename(columns=lambda name: f"share_{name}")
                .rename(columns={"share_estimate": "share"})
            )
            layer = layers[number] if number < len(layers) else -1
            parts.append(table.join(share, on=["method", "k"]).assign(layer=layer, half=half))
    return pd.concat(parts, ignore_index=True)


def chosen_layer(table: pd.DataFrame, params: Subspace) -> int:
    """The first of the slice's layers after which the class difference recovers `slice_share` on the discovery half;
    without one, the layer where it recovers most. (Later ones are nearer to the logits, which any direction that
    favours an answer reaches.)"""
    own = table[(table["half"] == table["half"].iloc[0]) & (table["method"] == ONE[0]) & (table["layer"] >= 0)]
    enough = own[own["estimate"] >= params.slice_share]
    return int(enough["layer"].min() if len(enough) else own.loc[own["estimate"].idxmax(), "layer"])


def by_number(patches: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """Recovery by method and number of directions, with its share of the whole residual stream's."""
    own = last_half(patches)
    effect, gap = sums(own[~own["part"].isin(["inside", "outside"])])
    share = ratios(effect, over_column(effect, ("whole", 0)), params).set_index(["method", "k"])["estimate"]
    return ratios(effect, gap, params).join(share.rename("share"), on=["method", "k"])


def random_band(patches: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """The lowest and highest recovery of a random subspace, by its number of dimensions."""
    own = last_half(patches)
    effect, gap = sums(own[own["method"] == "random"], ["k", "part"])
    recovery = (effect.sum() / gap.sum()).groupby("k").agg(["min", "max"])
    return recovery.reset_index().set_axis(["k", "low", "high"], axis=1)


def against_random(frame: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """Recovery of each method less that of the random subspaces of as many dimensions and equal norm, by quads."""
    own = last_half(frame)
    effect, gap = sums(own[~own["part"].isin(["inside", "outside"])])
    sizes = set(effect["random"].columns)
    kept = [column for column in effect if column[0] not in ("random", "whole") and column[1] in sizes]
    paired = pd.DataFrame({c: effect[c] - effect["random", c[1]] for c in kept})
    return ratios(paired.rename_axis(columns=["method", "k"]), gap, params)


def single_classes(patches: pd.DataFrame, pairs: Sequence[Pair], params: Subspace) -> pd.DataFrame:
    """Recovery of the direction of one class against the rest, in pairs that have the class on either side (`there`)
    and in those that do not."""
    classes = {p.pair_id: {p.candidates[p.answer], p.candidates[p.corrupt_answer]} for p in pairs}
    own, parts = last_half(patches), []
    own = own[own["method"].str.endswith(" against the rest")]
    for method, rows in own.groupby("method", sort=False):
        name = method.removesuffix(" against the rest")
        there = rows["pair_id"].map(lambda pair, name=name: name in classes[pair])
        for has, part in rows.groupby(there):
            parts.append(ratios(*sums(part), params).assign(class_name=name, there=has))
    return pd.concat(parts, ignore_index=True)


def split_parts(patches: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """Recovery of what was split, all of it and its parts inside and outside the span of the principal components;
    `share` is the part's, of the effect of all of it."""
    own = last_half(patches)
    split = own.loc[own["part"] == "inside", ["method", "k"]].drop_duplicates()
    effect, gap = sums(own.merge(split, on=["method", "k"]), ["method", "k", "part"])
    full = pd.DataFrame({column: effect[(*column[:2], "")] for column in effect}, columns=effect.columns)
    keys = ["method", "k", "part"]
    share = (
        ratios(effect, full, params)
        .set_index(keys)[["estimate", "low", "high"]]
        .set_axis(["share", "share_low", "share_high"], axis=1)
    )
    out = ratios(effect, gap, params).join(share, on=keys)
    return out.assign(name=called(out), shown=out["part"].map(PARTS))


def called(table: pd.DataFrame) -> list[str]:
    """Methods with their number of directions, as figures name them."""
    return [
        method if method == "whole" else f"{method}, {k}" for method, k in zip(table["method"], table["k"], strict=True)
    ]


def dose_table(frame: pd.DataFrame, kinds: Mapping[str, str], candidates: Sequence[str]) -> pd.DataFrame:
    """Per prompt, class added and dose: the logit of that class less the mean of all candidates', `y` (random: of the
    first class; the mean over draws), and whether the class leads (`top`)."""
    words = frame["variant"].str.split("|", expand=True)
    after = np.stack(frame["logits_after"].tolist()).astype(float)
    lead = next(name for name in candidates if name in set(words[0]))
    at = [list(candidates).index(name if name != "random" else lead) for name in words[0]]
    rows = np.arange(len(frame))
    y, top = (after - after.mean(1, keepdims=True))[rows, at], after.argmax(1) == at
    out = pd.DataFrame(
        {"prompt": frame["pair_id"], "added": words[0], "dose": words[1].astype(float), "y": y, "top": top}
    )
    out = out.groupby(["prompt", "added", "dose"], as_index=False, sort=False).mean()
    return out.assign(kind=out["prompt"].map(kinds))


def dose_curves(doses: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """Mean of `y` by kind of prompt, class added and dose, with intervals over prompts."""
    parts = []
    for (kind, added), rows in doses.groupby(["kind", "added"], sort=False):
        wide = rows.pivot(index="prompt", columns="dose", values="y")
        spans = stats.mean_intervals(wide.to_numpy(), params)
        top = rows.groupby("dose")["top"].mean().to_numpy()
        parts.append(
            pd.DataFrame({"dose": wide.columns, **effects.columns(spans), "top": top}).assign(kind=kind, added=added)
        )
    return pd.concat(parts, ignore_index=True)


def slopes(doses: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """Least-squares slope of `y` on the dose (logits per dose), its mean over prompts with an interval; `monotone`: the
    share of prompts in which every higher dose gives a higher logit."""
    parts = []
    for (kind, added), rows in doses.groupby(["kind", "added"], sort=False):
        wide = rows.pivot(index="prompt", columns="dose", values="y")
        dose = wide.columns.to_numpy() - wide.columns.to_numpy().mean()
        slope = wide.to_numpy() @ dose / max((dose**2).sum(), 1e-12)
        span = stats.mean_interval(slope, params)
        rising = (wide.diff(axis=1).iloc[:, 1:] > 0).all(axis=1).mean()
        parts.append({"kind": kind, "added": added, "monotone": rising, "prompts": len(wide), "estimate": span.estimate,
                      "low": span.low, "high": span.high})  # fmt: skip
    return pd.DataFrame(parts)


def transfer_table(frame: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """Effect of directions fitted on `source` prompts in pairs of each template (`target`), as a share of that of the
    directions fitted on the target's own prompts; pairs that the model solves in the target. `recovery`: of the gap."""
    own = last_half(frame)
    own, parts = own[(own["metric_clean"] > 0) & (own["metric_corrupt"] < 0)], []
    for target, rows in own.groupby("template", sort=False):
        effect, gap = sums(rows)
        kept = [column for column in effect if (target, column[1]) in effect.columns]
        if not kept:  # too few of its prompts line up to fit directions on
            continue
        own_fit = pd.DataFrame({column: effect[target, column[1]] for column in kept}, columns=effect[kept].columns)
        recovery = (effect.sum() / gap.sum()).rename("recovery")
        table = ratios(effect[kept], own_fit, params)
        parts.append(table.join(recovery, on=["method", "k"]).assign(target=target, pairs=rows["pair_id"].nunique()))
    return pd.concat(parts, ignore_index=True).rename(columns={"method": "source"})


# --- figures ------------------------------------------------------------------------------------------------------


def lines(
    frame: pd.DataFrame, x: str, by: str, xlabel: str, ylabel: str, panel: str | None = None,
    band: pd.DataFrame | None = None, level: float | None = None,
) -> Figure:  # fmt: skip
    """A line with whiskers per value of `by` over the numbers `x`; `band` (x, low, high) shaded, `level` dashed."""
    groups = plots._groups(frame, by)
    with plots._panels(frame, panel, 2.9 if panel is None else 2.2) as (figure, panels):
        for axes, part in panels:
            if band is not None:
                ends = band["low"].to_numpy(dtype=float), band["high"].to_numpy(dtype=float)
                axes.fill_between(band[x], *ends, color=plots.GREY, alpha=0.35, lw=0)
            if level is not None:
                axes.axhline(level, color=plots.BLACK, lw=1, ls="--")
            for index, (group, (colour, marker)) in enumerate(groups.items()):
                line = part[part[by] == group].sort_values(x)
                apart = 0.02 * (index - (len(groups) - 1) / 2) if x == "k" else 0.0  # on a logarithmic axis
                at = line[x].to_numpy(dtype=float) * (1 + apart)
                axes.plot(at, line["estimate"], color=colour, lw=1, alpha=0.6)
                plots._points(axes, at, line, colour, marker, label=group)
            plots._zero(axes)
        axes.set_xlabel(xlabel)
        plots._ylabel(figure, ylabel)
        plots._legend(figure, panels[0][0])
    return figure


def number_figure(numbers: pd.DataFrame, band: pd.DataFrame) -> Figure:
    """Recovery against the number of directions."""
    whole = float(numbers.loc[numbers["method"] == "whole", "estimate"].iloc[0])
    own = numbers[~numbers["method"].str.endswith("the rest") & ~numbers["method"].isin(["whole", "random"])]
    figure = lines(own, "k", "method", "directions", "recovery (share of logit_diff)", band=band, level=whole)
    figure.axes[0].set_xscale("log", base=2)
    figure.axes[0].set_xticks(sorted(own["k"].unique()), sorted(own["k"].unique()))
    figure.axes[0].minorticks_off()
    return figure


def layer_figure(table: pd.DataFrame) -> Figure:
    """Recovery after each of the slice's layers."""
    own = effects.reported(table)
    own = own[own["layer"] >= 0].assign(what=lambda rows: called(rows))
    return plots.layer_curve(own, "recovery (share of logit_diff)", by="what")


def split_figure(table: pd.DataFrame) -> Figure:
    """The parts of each change that were split."""
    return circuit_plots.part_bars(table, "recovery (share of logit_diff)", by="shown", panel=None)


def dose_figure(curves: pd.DataFrame) -> Figure:
    """Dose-response curves, a panel for each kind of prompt."""
    ylabel = "logit of the class added, less the candidates' mean"
    return lines(curves, "dose", "added", "dose (multiples of class mean - mean of all classes)", ylabel, panel="kind")


def transfer_figure(table: pd.DataFrame) -> Figure:
    """Effect of moved directions as a share of the own ones', by source and target."""
    own = table[table["source"] != "random"]
    wide = {
        f"{k} direction{'s' * (k > 1)}": rows.pivot(index="source", columns="target", values="estimate").reindex(
            index=list(dict.fromkeys(own["source"])), columns=list(dict.fromkeys(own["target"]))
        )
        for k, rows in own.groupby("k")
    }
    return circuit_plots.class_matrices(wide, "share of own effect", xlabel="patched in", ylabel="fitted on", limit=1)
