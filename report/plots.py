"""Figures of the report, from tidy frames and arrays: one function per kind of figure, each returning a `Figure`.

A frame holds one row per estimate: `estimate`, `low`, `high` (the interval; NaN or None where there are too few quads:
the point is then drawn hollow, without a whisker) and the columns that place it. Labels carry units and are the
caller's, because the caller knows whether a column is in logits or in shares. Colours are Okabe and Ito's; the
diverging map is centred at zero. A figure shows itself at the end of a notebook cell and belongs to no global state of
pyplot; `save` writes it to the results folder, byte for byte the same for the same data.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import matplotlib.figure
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib import style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm, to_rgba
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline

from lib.questions import SLOT
from lib.records import atomic
from report import site_tables

STYLE = Path(__file__).with_name("superset.mplstyle")
WIDTH = 7.5  # inches
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # fmt: skip
GREY, PALE = "#767676", "#f0f0f0"
# One colour per word throughout the report; what is not named here takes the next free colour.
COLOURS = {
    "noise": VERMILION, "denoise": BLUE, "damage": VERMILION, "recovery": BLUE,
    "discovery": GREY, "confirmation": BLUE,
    "name_a": SKY, "name_b": GREEN, "name_c": ORANGE, "names": PURPLE, "swapped": VERMILION,
    "between": ORANGE, "last": BLUE, "rest": GREY, "remainder": BLACK, "all": BLACK,
    "resid": BLACK, "attn": BLUE, "mlp": ORANGE, "head": GREEN,
    "zero": BLACK, "mean": GREEN, "resample": ORANGE, "counterfactual": VERMILION, "clean": BLUE,
    "answer": BLUE, "foil": ORANGE,
}  # fmt: skip
Panels = list[tuple[Axes, pd.DataFrame]]
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
LONGEST = 24  # letters of a template's text, where it is a label
EDGES, LABELLED = 24, 10  # edges of a graph that are drawn at first, and those with their effect written beside them


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure in the report's style that a notebook shows as the PNG that `save` writes."""

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"image/png": b64encode(_bytes(self, "png")).decode(), "text/plain": repr(self)}


def _bytes(figure: matplotlib.figure.Figure, kind: str) -> bytes:
    # The writers' own metadata (version, date) would make equal figures differ.
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    out = BytesIO()
    with style.context(STYLE):
        figure.savefig(out, format=kind, metadata=metadata)
    return out.getvalue()


def save(figure: matplotlib.figure.Figure, results_dir: str | Path, step: str, name: str) -> str:
    """Write `figures/<step>-<name>.png` and `.svg` in the results folder; returns the PNG's path relative to it.

    The returned string is what a findings file has as `file`. The same figure gives the same bytes, whether or not it
    has been shown before: a layout settles in the first drawing, so one is made here that is not kept.
    """
    folder = Path(results_dir) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    with style.context(STYLE):
        figure.draw_without_rendering()
    for kind in ("png", "svg"):
        with atomic(folder / f"{step}-{name}.{kind}") as file:
            file.write(_bytes(figure, kind))
    return f"figures/{step}-{name}.png"


def layer_curve(
    frame: pd.DataFrame, ylabel: str, by: str = "position", panel: str | None = None, marked: Sequence[int] = ()
) -> Figure:
    """An effect along the layers, a line with its band per value of `by` (a role), panels above one another.

    Columns: `layer`, `by`, `panel` if given, `estimate`, `low`, `high`. `marked` layers (the critical ones) are shaded.
    """
    _need("layer_curve", frame, "layer", by, panel)
    with stacked_panels(frame, panel, 2.7) as (figure, panels):
        groups = styles_of(frame, by)
        for axes, part in panels:
            for layer in marked:
                axes.axvspan(layer - 0.5, layer + 0.5, color=PALE, zorder=0, lw=0)
            for group, (colour, marker) in groups.items():
                line = part[part[by] == group].sort_values("layer")
                if line.empty:
                    continue
                low, high = _ends(line)
                axes.fill_between(line["layer"], low, high, color=colour, alpha=0.18, lw=0)
                face = colour if np.isfinite(low).any() else "white"
                look = {"color": colour, "marker": marker, "markerfacecolor": face, "markersize": 3.5}
                axes.plot(line["layer"], line["estimate"], **look, label=group)
            zero_line(axes)
        shared_ylabel(figure, ylabel)
        _layers(axes, frame["layer"])
        add_legend(figure)
    return figure


def labelled_curves(frame: pd.DataFrame, ylabel: str, marked: Sequence[int] = ()) -> Figure:
    """Two effects along the layers, each named where it is highest; for readers who know neither words nor figures.

    Columns: `layer`, `position` (the names), `estimate`, `low`, `high`. `marked` layers are shaded and named.
    """
    _need("labelled_curves", frame, "layer", "position")
    with _canvas((WIDTH, 3.1)) as (figure, (axes,)):
        for layer in marked:
            axes.axvspan(layer - 0.5, layer + 0.5, color=PALE, zorder=0, lw=0)
        for (name, line), colour in zip(frame.groupby("position", sort=True), (BLUE, PURPLE), strict=False):
            line = line.sort_values("layer")
            axes.fill_between(line["layer"], *_ends(line), color=colour, alpha=0.18, lw=0)
            axes.plot(line["layer"], line["estimate"], color=colour, lw=2)
            first = line["estimate"].iloc[0] > line["estimate"].iloc[-1]
            at = line.iloc[0 if first else -1]
            place = {
                "ha": "left" if first else "right",
                "va": "bottom",
                "xytext": (0, 6),
                "textcoords": "offset points",
            }
            axes.annotate(
                name, (at["layer"], at["estimate"]), color=colour, weight="bold", annotation_clip=False, **place
            )
        zero_line(axes)
        axes.set(
            ylabel=ylabel, ylim=(min(-0.05, frame["estimate"].min() - 0.1), max(1.15, frame["estimate"].max() + 0.15))
        )
        _layers(axes, frame["layer"])
    return figure


def heat_map(
    matrix: Float[np.ndarray, "layers heads"] | Mapping[str, Float[np.ndarray, "layers heads"]],
    label: str,
    significant: Bool[np.ndarray, "layers heads"] | Mapping[str, Bool[np.ndarray, "layers heads"]] | None = None,
    layers: Sequence[int] | None = None,
    limit: float | None = None,
) -> Figure:
    """An effect per head, layers to the right and heads upwards; a mapping gives panels with one common scale.

    `label` names the effect with its unit. Cells that are `significant` (familywise) carry a dot; NaN cells, which were
    not measured, are grey. `layers` are the layers of the rows, if not 0, 1, ...; `limit` is the end of the scale.
    """
    many = matrix if isinstance(matrix, Mapping) else {"": matrix}
    marks = significant if isinstance(significant, Mapping) else {name: significant for name in many}
    many = {name: np.asarray(values, dtype=float) for name, values in many.items()}
    shapes = list({values.shape for values in many.values()})
    if len(shapes) != 1 or len(shapes[0]) != 2 or not any(np.isfinite(values).any() for values in many.values()):
        raise ValueError(f"heat_map: needs matrices of layers x heads of one shape, with values; got shapes {shapes}")
    n_layers, n_heads = shapes[0]
    limit = limit or np.nanmax(np.abs(list(many.values()))) or 1.0
    ticks = np.arange(n_layers) if layers is None else np.asarray(layers)
    with _canvas((WIDTH, 0.7 + len(many) * (0.45 + min(3.2, 0.19 * max(n_heads, 5)))), len(many)) as (figure, panels):
        for axes, (name, values) in zip(panels, many.items(), strict=True):
            axes.grid(False)
            axes.set_facecolor("#bdbdbd")
            scale = TwoSlopeNorm(0, -limit, limit)
            image = axes.imshow(values.T, norm=scale, aspect="auto", origin="lower", interpolation="nearest")
            if marks.get(name) is not None:
                x, y = np.nonzero(np.nan_to_num(np.asarray(marks[name], dtype=float)))  # NaN: not measured, not marked
                dark = np.abs(values[x, y]) > 0.6 * limit
                axes.scatter(x, y, s=9, c=np.where(dark, "white", "black"), linewidths=0)
            axes.set(title=name, ylabel="head")
            axes.set_yticks(np.arange(n_heads)[:: -(-n_heads // 9)])
            every = slice(None, None, -(-n_layers // 16))
            axes.set_xticks(np.arange(n_layers)[every], [str(layer) for layer in ticks[every]])
        panels[-1].set_xlabel("layer")
        figure.colorbar(image, ax=panels, label=label, aspect=22 * max(1, len(many) / 2), pad=0.015)
    return figure


def layer_bars(frame: pd.DataFrame, ylabel: str, by: str = "component", panel: str | None = None) -> Figure:
    """Bars with whiskers per layer, one beside the other for each value of `by` (attn, mlp).

    Columns: `layer`, `by`, `panel` if given, `estimate`, `low`, `high`.
    """
    _need("layer_bars", frame, "layer", by, panel)
    with stacked_panels(frame, panel, 2.5) as (figure, panels):
        for axes, part in panels:
            _bars(axes, part, by, styles_of(frame, by), part["layer"].to_numpy())
        shared_ylabel(figure, ylabel)
        _layers(axes, frame["layer"])
        add_legend(figure)
    return figure


def ranked_sites(frame: pd.DataFrame, xlabel: str, by: str = "half", lines: Sequence[float] = ()) -> Figure:
    """Sites from the top in the frame's order, a dot with its (simultaneous) interval for each value of `by`.

    Columns: `site` (text, "21.6" or "mlp 23"), `by` (discovery, confirmation), `estimate`, `low`, `high`.
    """
    _need("ranked_sites", frame, "site", by)
    sites = list(dict.fromkeys(frame["site"]))
    groups = styles_of(frame, by)
    with _canvas((WIDTH, 1.0 + 0.17 * len(sites) * max(1.5, len(groups)))) as (figure, (axes,)):
        for index, (group, (colour, marker)) in enumerate(groups.items()):
            part = frame[frame[by] == group]
            offset = (index - (len(groups) - 1) / 2) * 0.6 / len(groups)
            y = np.array([sites.index(site) for site in part["site"]]) + offset
            draw_points(axes, y, part, colour, marker, label=group, across=True)
        zero_line(axes, across=True)
        for line in lines:
            axes.axvline(line, color=GREY, lw=1, ls="--")
        axes.set_yticks(range(len(sites)), sites)
        axes.set_ylim(len(sites) - 0.4, -0.6)
        axes.set_xlabel(xlabel)
        add_legend(figure)
    return figure


def agreement(
    frame: pd.DataFrame,
    x: str,
    y: str,
    xlabel: str,
    ylabel: str,
    by: str | None = None,
    named: Sequence[str] = (),
    identity: bool = True,
) -> Figure:
    """One measure of each site against another: discovery against confirmation, one ablation against another.

    Columns: `x`, `y`, `by` if given (colour), `site` if any are `named` (written beside their point); where
    `<x>_low`, `<x>_high`, `<y>_low`, `<y>_high` are there, the intervals are drawn. `identity` draws the line y = x,
    on axes of one scale; leave it out where the two measures have different units.
    """
    _need("agreement", frame, x, y, by, "site" if named else None, interval=False)
    groups = styles_of(frame, by) if by else {"": (BLUE, "o")}
    with _canvas((WIDTH, 4.8 if identity else 4.0)) as (figure, (axes,)):
        for group, (colour, marker) in groups.items():
            part = frame[frame[by] == group] if by else frame
            for name, other in ((x, y), (y, x)):
                if {f"{name}_low", f"{name}_high"} <= set(frame):
                    ends = part[[f"{name}_low", f"{name}_high"]].to_numpy(dtype=float, na_value=np.nan)
                    _intervals(axes, part[other], *ends.T, colour=to_rgba(colour, 0.35), across=name == x)
            axes.scatter(part[x], part[y], s=18, color=colour, marker=marker, alpha=0.8, linewidths=0, label=group)
        if identity:
            axes.axline((0, 0), slope=1, color=GREY, lw=1, ls="--", zorder=1)
            ends = [min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])]
            axes.set(xlim=ends, ylim=ends, aspect="equal", anchor="W")
        for across in (False, True):
            low, high = axes.get_xlim() if across else axes.get_ylim()
            if low < 0 < high:
                zero_line(axes, across)
        edge = axes.get_xlim()[0] + 0.9 * np.ptp(axes.get_xlim())
        for _, row in frame[frame["site"].isin(list(named))].iterrows() if named else ():
            side, gap = ("left", 5) if row[x] < edge else ("right", -5)
            axes.annotate(row["site"], (row[x], row[y]), (gap, 3), textcoords="offset points", ha=side, fontsize=8)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if by:
            axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0)
    return figure


def answer_and_foil(frame: pd.DataFrame, ylabel: str = "change of the logit (logits)", by: str = "logit") -> Figure:
    """Per site, how far the answer's logit and the foil's logit moved, apart: a falling foil is not a rising answer.

    Columns: `site`, `by` ("answer", "foil"), `estimate`, `low`, `high`; sites in the frame's order.
    """
    return _categories("answer_and_foil", frame, "site", "site", ylabel, by)


def accuracy_bars(
    frame: pd.DataFrame,
    category: str = "superset",
    by: str | None = None,
    ylabel: str = "accuracy (share of prompts)",
) -> Figure:
    """Accuracy per superset (or template, task) with its interval, and each bar's chance as a dashed line.

    Columns: `category`, `by` if given, `chance`, `estimate`, `low`, `high`, all shares in [0, 1]; in the frame's order.
    """
    _need("accuracy_bars", frame, "chance")
    figure = _categories("accuracy_bars", frame, category, "", ylabel, by)
    figure.axes[0].set_ylim(0, 1.02)
    return figure


def fame_match(
    frame: pd.DataFrame,
    label: str,
    x: str = "fame_clean",
    y: str = "fame_corrupt",
    by: str | None = "half",
    tolerance: float | None = None,
) -> Figure:
    """Fame of the clean side against the corrupt side, a point per pair; equal fame on the line, `tolerance` as a band.

    Columns: `x`, `y`, and `by` if given. `label` names the measure of fame with its unit.
    """
    figure = agreement(frame, x, y, f"clean: {label}", f"corrupt: {label}", by=by)
    if tolerance is not None:
        axes = figure.axes[0]
        ends = np.array([frame[[x, y]].to_numpy(dtype=float).min(), frame[[x, y]].to_numpy(dtype=float).max()])
        axes.fill_between(ends, ends - tolerance, ends + tolerance, color=PALE, zorder=0, lw=0)
    return figure


def slice_curve(
    frame: pd.DataFrame,
    threshold: float = 0.8,
    by: str = "quantity",
    panel: str | None = "half",
    ylabel: str = "joint effect (share of the gap)",
    sites: Sequence[str] = (),
) -> Figure:
    """Joint recovery and damage of a growing set of sites, with the share that makes the set critical.

    Columns: `n_sites`, `by` ("recovery", "damage"), `panel` if given, `estimate`, `low`, `high`. `sites`, if given, are
    the names of the sites in the order in which they were added, written below the axis.
    """
    _need("slice_curve", frame, "n_sites", by, panel)
    with stacked_panels(frame, panel, 2.6) as (figure, panels):
        groups = styles_of(frame, by)
        for axes, part in panels:
            for index, (group, (colour, marker)) in enumerate(groups.items()):
                line = part[part[by] == group].sort_values("n_sites")
                x = line["n_sites"].to_numpy(dtype=float) + (index - (len(groups) - 1) / 2) * 0.12
                axes.plot(x, line["estimate"], color=colour, lw=1, alpha=0.6)
                axes.fill_between(x, *_ends(line), color=colour, alpha=0.12, lw=0)
                draw_points(axes, x, line, colour, marker, label=group)
            zero_line(axes)
            axes.axhline(threshold, color=BLACK, lw=1, ls="--", label=f"threshold ({threshold:g})")
        shared_ylabel(figure, ylabel)
        counts = np.unique(frame["n_sites"])
        counts = counts[:: -(-len(counts) // 20)]
        names = [f"{n}\n+ {sites[n - 1]}" if 0 < n <= len(sites) else f"{n}" for n in counts]
        axes.set_xticks(counts, names, fontsize=8 if sites else None)
        axes.set_xlabel("sites in the set")
        add_legend(figure)
    return figure


def node_curve(frame: pd.DataFrame, roles: pd.DataFrame, threshold: float) -> Figure:
    """Faithfulness of growing circuits, a line for each `name`, over the number of their nodes (logarithmic); below,
    how many of the nodes are at each role, a line for each column of `roles` (its index: the number of nodes).

    Columns: `n_sites`, `name`, `estimate`, `low`, `high`.
    """
    _need("node_curve", frame, "n_sites", "name")
    with _canvas((WIDTH, 4.6), 2) as (figure, (top, below)):
        for name, (colour, marker) in styles_of(frame, "name").items():
            line = frame[frame["name"] == name].sort_values("n_sites")
            top.plot(line["n_sites"], line["estimate"], color=colour, lw=1, alpha=0.6)
            draw_points(top, line["n_sites"].to_numpy(dtype=float), line, colour, marker, label=name)
        zero_line(top)
        top.axhline(threshold, color=BLACK, lw=1, ls="--", label=f"threshold ({threshold:g})")
        top.set(ylabel="faithfulness (share)", xscale="log")
        for role, (colour, marker) in styles_of(pd.DataFrame({"role": roles.columns}), "role").items():
            below.plot(roles.index, roles[role], color=colour, marker=marker, ms=4, lw=1, label=role)
        below.set(ylabel="nodes", xlabel="nodes in the circuit", yscale="symlog")
        below.set_xticks(sizes := sorted(roles.index), map(str, sizes))
        below.minorticks_off()
        top.legend()
        below.legend()
    return figure


@contextmanager
def _canvas(size: tuple[float, float], rows: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """In the report's style, a figure of the given size (inches) and its axes, one above the other."""
    with style.context(STYLE):
        figure = Figure(figsize=size)
        yield figure, list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])


@contextmanager
def stacked_panels(frame: pd.DataFrame, panel: str | None, height: float) -> Iterator[tuple[Figure, Panels]]:
    """`_canvas` with axes for each value of the column `panel`, and the rows that belong there; one without `panel`."""
    values = list(dict.fromkeys(frame[panel])) if panel else [None]
    total = 0.75 + height * (1 if len(values) == 1 else 0.85 * len(values))
    with _canvas((WIDTH, total), len(values)) as (figure, rows):
        for axes, value in zip(rows, values, strict=True):
            axes.set_title("" if panel is None else str(value))
        parts = [frame] if panel is None else [frame[frame[panel] == value] for value in values]
        yield figure, list(zip(rows, parts, strict=True))


def _need(function: str, frame: pd.DataFrame, *columns: str | None, interval: bool = True) -> None:
    wanted = [column for column in columns if column] + (["estimate", "low", "high"] if interval else [])
    missing = [column for column in wanted if column not in frame]
    if missing:
        has = ", ".join(map(str, frame))
        raise ValueError(f"{function}: the frame lacks the column(s) {', '.join(missing)}; it has {has}")
    if frame.empty:
        raise ValueError(f"{function}: the frame has no rows, so there is nothing to draw")


def styles_of(frame: pd.DataFrame, by: str) -> dict[str, tuple[str, str]]:
    """Colour and marker per value of a column, in the frame's order; fixed colours for the report's words."""
    values = list(dict.fromkeys(frame[by]))
    taken = {COLOURS[value] for value in values if value in COLOURS}
    free = (c for c in (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK) if c not in taken)
    return {v: (COLOURS.get(v) or next(free, GREY), MARKERS[i % len(MARKERS)]) for i, v in enumerate(values)}


def _ends(frame: pd.DataFrame) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Interval ends as floats, None as NaN."""
    return frame["low"].to_numpy(dtype=float, na_value=np.nan), frame["high"].to_numpy(dtype=float, na_value=np.nan)


def _intervals(
    axes: Axes, at: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, across: bool = False
) -> None:
    """Lines from low to high. Not matplotlib's error bars: a studentised interval need not contain its estimate."""
    (axes.hlines if across else axes.vlines)(at, low, high, color=colour, lw=1.2, zorder=2.5)


def draw_points(
    axes: Axes, at: np.ndarray, frame: pd.DataFrame, colour: str, marker: str, label: str, across: bool = False
) -> None:
    """Estimates with their intervals at positions `at`; hollow where there is no interval."""
    estimate, (low, high) = frame["estimate"].to_numpy(dtype=float), _ends(frame)
    _intervals(axes, at, low, high, colour, across)
    x, y = (estimate, at) if across else (at, estimate)
    faces = np.where(np.isfinite(low) & np.isfinite(high), colour, "white")
    axes.scatter(x, y, s=24, c=faces, edgecolors=colour, marker=marker, zorder=3)
    axes.plot([], [], color=colour, marker=marker, ls="none", label=label)


def _bars(axes: Axes, frame: pd.DataFrame, by: str, groups: Mapping[str, tuple[str, str]], at: np.ndarray) -> None:
    """Grouped bars with whiskers at integer positions `at`, one row each; a row's `chance`, if there is one, dashed."""
    width = 0.8 / max(2, len(groups))
    for index, (group, (colour, _)) in enumerate(groups.items()):
        rows = (frame[by] == group).to_numpy()
        x = at[rows] + (index - (len(groups) - 1) / 2) * width
        part = frame[rows]
        axes.bar(x, part["estimate"].to_numpy(dtype=float), width * 0.92, color=colour, alpha=0.85, label=group, lw=0)
        _intervals(axes, x, *_ends(part), colour="#333333")
        if "chance" in part:
            ends = (x - width / 2, x + width / 2)
            axes.hlines(part["chance"], *ends, color=BLACK, lw=1.2, ls="--", label="chance", zorder=4)
    zero_line(axes)


def _categories(
    function: str,
    frame: pd.DataFrame,
    category: str,
    xlabel: str,
    ylabel: str,
    by: str | None,
) -> Figure:
    """Grouped bars over the values of a text column."""
    _need(function, frame, category, by)
    if by is None:
        frame, by = frame.assign(_all=""), "_all"
    names = list(dict.fromkeys(frame[category]))
    with _canvas((WIDTH, 3.4)) as (figure, (axes,)):
        _bars(axes, frame, by, styles_of(frame, by), np.array([names.index(name) for name in frame[category]]))
        labels = brief(names)
        rotation, side = (30, "right") if sum(map(len, labels)) > 80 else (0, "center")
        axes.set_xticks(range(len(names)), labels, rotation=rotation, ha=side)
        axes.grid(False, axis="x")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        add_legend(figure)
    return figure


def brief(labels: Iterable[object]) -> list[str]:
    """Labels with the texts of long templates as their first and last words; captions, tables and sentences have them
    whole. Two texts that are cut to the same words are numbered."""
    texts, out = [str(label) for label in labels], {}
    for text in dict.fromkeys(texts):
        short = text
        if len(text) > LONGEST and SLOT.search(text):
            first, last = (shorten(way, LONGEST // 2, placeholder="") for way in (text, text[::-1]))
            short = f"{first} ... {last[::-1]}"
        alike = [own for own in out.values() if own == short or own.startswith(f"{short} (")]
        out[text] = f"{short} ({len(alike) + 1})" if alike and short != text else short
    return [out[text] for text in texts]


def zero_line(axes: Axes, across: bool = False) -> None:
    (axes.axvline if across else axes.axhline)(0, color="#999999", lw=0.8, zorder=1)


def shared_ylabel(figure: Figure, text: str) -> None:
    """One label for all panels: repeated beside each, a long one would run into the next."""
    figure.axes[0].set_ylabel(text) if len(figure.axes) == 1 else figure.supylabel(text, fontsize=10)


def _layers(axes: Axes, layers: pd.Series) -> None:
    """A layer axis with whole numbers."""
    first, last = int(layers.min()), int(layers.max())
    axes.set(xlim=(first - 0.7, last + 0.7), xlabel="layer")
    axes.set_xticks(range(first, last + 1, -(-(last - first + 1) // 16)))


def add_legend(figure: Figure) -> None:
    """A legend above the axes, where it covers nothing, of what is drawn in any of them; none for a single unnamed
    group."""
    named: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(text, handle)
    named.pop("", None)
    if named:
        labels = brief(named)
        figure.legend(named.values(), labels, loc="outside upper left", ncols=legend_columns(labels))


def legend_columns(names: Sequence[str], width: int = 90) -> int:
    """As many columns, six at most, as a legend of these names has room for across the page (in letters)."""
    for columns in range(min(len(names), 6), 1, -1):
        if sum(5 + max(map(len, own)) for own in np.array_split(names, columns)) <= width:
            return columns
    return 1


def halves(sites: pd.DataFrame) -> Figure | None:
    """Every site of a table of both halves, discovery against confirmation; None where there is one half."""
    if sites["half"].nunique() < 2:
        return None
    axes = ("discovery", "confirmation", "discovery (logits)", "confirmation (logits)")
    return agreement(site_tables.side_by_side(sites, "half"), *axes, by="component")


# --- circuits ---


def part_bars(frame: pd.DataFrame, ylabel: str, by: str = "slice", panel: str | None = "ablation") -> Figure:
    """What a total effect is made of: bars with whiskers per part, beside each other for each value of `by`.

    Columns: `name` (the part, in the frame's order), `by`, `panel` if given, `estimate`, `low`, `high`.
    """
    _need("part_bars", frame, "name", by, panel)
    names = list(dict.fromkeys(frame["name"]))
    with stacked_panels(frame, panel, 2.5) as (figure, panels):
        for axes, part in panels:
            _bars(axes, part, by, styles_of(frame, by), np.array([names.index(name) for name in part["name"]]))
            axes.set_xticks(range(len(names)), names)
            axes.grid(False, axis="x")
        shared_ylabel(figure, ylabel)
        add_legend(figure)
    return figure


def pair_histogram(
    frame: pd.DataFrame, value: str, xlabel: str, by: str = "ablation", lines: Sequence[float] = (0, 1), ends: float = 2
) -> Figure:
    """How a number is spread over pairs, an outline per value of `by`; what lies beyond +- `ends` is in the end bins.

    Columns: `value`, `by`. `lines` are drawn dashed (no repair at 0, full repair at 1).
    """
    _need("pair_histogram", frame, value, by, interval=False)
    with _canvas((WIDTH, 3.0)) as (figure, (axes,)):
        for group, (colour, _) in styles_of(frame, by).items():
            kept = frame.loc[frame[by] == group, value].clip(-ends, ends)
            counts, edges = np.histogram(kept, bins=np.linspace(-ends, ends, 41))
            axes.stairs(counts, edges, color=colour, lw=1.5, label=f"{group} ({len(kept)} pairs)")
        for line in lines:
            axes.axvline(line, color=GREY, lw=1, ls="--")
        axes.set(xlabel=xlabel, ylabel="pairs", xlim=(-ends, ends))
        add_legend(figure)
    return figure


def widening_curve(frame: pd.DataFrame, by: str = "half", panel: str = "quantity") -> Figure:
    """A slice as it is widened, a panel for each quantity with its own axis, a line for each value of `by`.

    Columns: `n_sites`, `by`, `panel` (named with its unit), `estimate`, `low`, `high`.
    """
    _need("widening_curve", frame, "n_sites", by, panel)
    groups = styles_of(frame, by)
    with stacked_panels(frame, panel, 2.2) as (figure, panels):
        for axes, part in panels:
            for index, (group, (colour, marker)) in enumerate(groups.items()):
                line = part[part[by] == group].sort_values("n_sites")
                x = line["n_sites"].to_numpy(dtype=float) + (index - (len(groups) - 1) / 2) * 0.08
                axes.plot(x, line["estimate"], color=colour, lw=1, alpha=0.6)
                draw_points(axes, x, line, colour, marker, label=group)
            zero_line(axes)
        axes.set_xticks(np.unique(frame["n_sites"]))
        axes.set_xlabel("sites in the slice")
        add_legend(figure)
    return figure


def forest(
    frame: pd.DataFrame,
    xlabel: str,
    by: str = "quantity",
    section: str = "kind",
    row: str = "group",
    lines: Sequence[float] = (),
) -> Figure:
    """Estimates with intervals from the top in the frame's order, under a heading for each value of `section`.

    Columns: `section`, `row`, `by` ("damage", "recovery"), `estimate`, `low`, `high`, `quads` (written at the right, in
    the order of the legend where they differ).
    """
    _need("forest", frame, section, row, by, "quads")
    places, labels, sizes, groups = {}, [], [], styles_of(frame, by)
    for heading, part in frame.groupby(section, sort=False):
        labels.append((str(heading), True))
        sizes.append("")
        for name, own in part.groupby(row, sort=False):
            places[heading, name] = len(labels)
            labels.append((str(name), False))
            counts = [quads for group in groups for quads in own.loc[own[by] == group, "quads"]]
            sizes.append(", ".join(str(quads) for quads in (counts if len({*counts}) > 1 else counts[:1])))
    with _canvas((WIDTH, 0.9 + 0.2 * len(labels))) as (figure, (axes,)):
        for index, (group, (colour, marker)) in enumerate(groups.items()):
            part = frame[(frame[by] == group) & frame["estimate"].notna()]
            at = np.array([places[key] for key in zip(part[section], part[row], strict=True)], dtype=float)
            draw_points(
                axes, at + (index - (len(groups) - 1) / 2) * 0.32, part, colour, marker, label=group, across=True
            )
        zero_line(axes, across=True)
        for line in lines:
            axes.axvline(line, color=GREY, lw=1, ls="--")
        axes.set_yticks(range(len(labels)), brief(name for name, _ in labels))
        for text, (_, heading) in zip(axes.get_yticklabels(), labels, strict=True):
            text.set_fontweight("bold" if heading else "normal")
        for place, size in enumerate(sizes):
            axes.text(1.01, place, size, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=GREY)
        axes.text(1.01, -1, "quads", transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=GREY)
        axes.grid(False, axis="y")
        axes.set(ylim=(len(labels) - 0.4, -0.7), xlabel=xlabel)
        add_legend(figure)
    return figure


def class_matrices(
    tables: Mapping[str, pd.DataFrame], label: str, xlabel: str = "", ylabel: str = "", limit: float = 1
) -> Figure:
    """Shares between classes, a panel for each table: rows and columns as they are named, the number in each cell.

    The scale runs from 0 to `limit`.
    """
    rows, width = max(len(table) for table in tables.values()), len(tables)
    with style.context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.5 + 0.36 * rows))
        panels = figure.subplots(1, width, squeeze=False)[0]
        for index, (axes, (title, table)) in enumerate(zip(panels, tables.items(), strict=True)):
            values = table.to_numpy(dtype=float)
            image = axes.imshow(values, cmap="Blues", vmin=0, vmax=limit, aspect="auto")
            for (y, x), value in np.ndenumerate(values):
                if np.isfinite(value):
                    tone = "white" if value > 0.6 * limit else "black"
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=tone)
            axes.grid(False)
            axes.set(title=title, xlabel=xlabel, ylabel=ylabel if index == 0 else "")
            axes.set_xticks(range(table.shape[1]), brief(table.columns), rotation=35, ha="right")
            axes.set_yticks(range(len(table)), brief(table.index) if index == 0 else [""] * len(table))
        figure.colorbar(image, ax=list(panels), label=label, pad=0.015, aspect=14)
    return figure


def controls(frame: pd.DataFrame, share: float, xlabel: str) -> Figure:
    """Every control's candidates with intervals that hold for all of them, in a panel each.

    Columns: `control`, `candidate`, `estimate`, `low`, `high`, and `fall`, the ordinary answer's fall: dashed at -fall,
    the margin (`share` of it) shaded. Candidates "x, set 1", "x, set 2", ... share the line of x.
    """
    _need("controls", frame, "control", "candidate", "fall")
    names = list(dict.fromkeys(frame["control"]))
    lines = frame["candidate"].str.replace(r", set \d+$", "", regex=True)
    height = -(-len(names) // 2)
    with style.context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.5 + 1.45 * height))
        panels = figure.subplots(height, 2, sharex=True, squeeze=False).ravel()
        for axes, name in zip(panels, names, strict=False):
            part, own = frame[frame["control"] == name], lines[frame["control"] == name]
            order, fall = list(dict.fromkeys(own)), part["fall"].iloc[0]
            turn = own.groupby(own).cumcount() - (own.groupby(own).transform("size") - 1) / 2
            at = own.map(order.index) + turn * (0.7 / own.value_counts().max())
            axes.axvspan(-share * fall, share * fall, color="#e0e0e0", lw=0, zorder=0)
            axes.axvline(-fall, color=GREY, lw=1, ls="--")
            _intervals(axes, at.to_numpy(dtype=float), *_ends(part), colour=BLUE, across=True)
            face = BLUE if part["low"].notna().all() else "white"
            size = 24 if len(part) == len(order) else 8
            axes.scatter(part["estimate"], at, s=size, color=face, edgecolors=BLUE, zorder=3)
            zero_line(axes, across=True)
            axes.set_yticks(range(len(order)), order, fontsize=8)
            axes.grid(False, axis="y")
            axes.set(title=name, ylim=(len(order) - 0.4, -0.6))
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        for axes in panels[max(0, len(names) - 2) : len(names)]:
            axes.tick_params(labelbottom=True)
        figure.supxlabel(xlabel, fontsize=10)
    return figure


def rule_points(fitted: pd.DataFrame, rules: Mapping[str, Sequence[float]], ylabel: str) -> Figure:
    """The logit that one name (by its slot) and two names of a class add, and what each rule would make of them.

    `fitted` has the rows "first slot", "second slot" and "two names" (`term`, `estimate`, `low`, `high`), `rules` the
    values of each rule at no, one and two names.
    """
    _need("rule_points", fitted, "term")
    with _canvas((WIDTH, 3.4)) as (figure, (axes,)):
        for (name, values), line in zip(rules.items(), ("-", "--", ":"), strict=False):
            axes.plot(range(3), values, color=GREY, ls=line, lw=1.2, label=name)
        for term, place, colour, marker in (
            ("first slot", 0.97, BLUE, "o"),
            ("second slot", 1.03, ORANGE, "s"),
            ("two names", 2, GREEN, "D"),
        ):
            part = fitted[fitted["term"] == term]
            draw_points(axes, np.full(len(part), place), part, colour, marker, label=term)
        axes.plot([0], [0], color=BLACK, marker="o", ls="none", markerfacecolor="white")
        zero_line(axes)
        axes.set_xticks(range(3))
        axes.set(xlabel="names in the class", ylabel=ylabel, xlim=(-0.2, 2.2))
        add_legend(figure)
    return figure


class Layout(NamedTuple):
    """Where the nodes of a graph stand: a lane for each role, the layers from the top."""

    places: dict[str, tuple[int, int]]  # of each node, its lane and its row
    layers: list[str]  # of each row; "" before the first and after the last layer, and for another row of one layer


def laid_out(lanes: Sequence[tuple[str, Sequence[str]]]) -> Layout:
    """Rows for the nodes of `lanes`: (heading, nodes in the order in which they compute).

    A node is in the layer that its name has ("21.6", "mlp 3 at names"); without one it comes before all layers in the
    first lane and after them in another. Nodes of one layer share their rows across lanes, and have one each in a lane.
    Raises ValueError for a node in two lanes.
    """
    rows: dict[float, dict[int, list[str]]] = {}
    for lane, (_, nodes) in enumerate(lanes):
        for node in nodes:
            if any(node in own for level in rows.values() for own in level.values()):
                raise ValueError(f"the node {node!r} is in two lanes; call one of them {node + ' at names'!r}")
            found = re.search(r"\d+", node)
            layer = int(found[0]) if found else (-1 if lane == 0 else np.inf)
            rows.setdefault(layer, {}).setdefault(lane, []).append(node)
    places, layers = {}, []
    for layer in sorted(rows):
        for lane, nodes in rows[layer].items():
            places |= {node: (lane, len(layers) + index) for index, node in enumerate(nodes)}
        tall = max(map(len, rows[layer].values()))
        layers += [str(layer) if 0 <= layer < np.inf else "", *[""] * (tall - 1)]
    return Layout(places, layers)


def strongest(edges: pd.DataFrame, count: int) -> float:
    """A threshold in hundredths of a unit, rounded down, that about as many edges reach."""
    sizes = edges["estimate"].abs().sort_values(ascending=False)
    return float(np.floor(100 * sizes.iloc[count - 1]) / 100) if len(sizes) > count else 0.0


def circuit_graph(
    lanes: Sequence[tuple[str, Sequence[str]]], edges: pd.DataFrame, kept: Sequence[str] | None = None
) -> Figure:
    """A circuit as a graph: a lane of nodes for each role, layers from the top; the strongest edges, EDGES or so.

    `lanes` as `laid_out` takes them. `edges` has `source`, `target`, `estimate`, `significant`, and perhaps `low`. A
    line is as wide as the root of its effect, which is written beside the LABELLED widest where there is room. An edge
    that was tested and is not significant is dashed and grey. A node is labelled by its name up to " at "; those
    that are not `kept`, where that is given, are pale.

    Raises ValueError for a node in two lanes, and for an edge to or from a node that is in none.
    """
    places, layers = laid_out(lanes)
    if lost := sorted({*edges["source"], *edges["target"]} - set(places)):
        raise ValueError(
            f"circuit_graph: edges name {lost[0]!r}, which is in no lane; the nodes are {', '.join(places)}"
        )
    least, largest = strongest(edges, EDGES), edges["estimate"].abs().max() if len(edges) else 1.0
    shown = edges[edges["estimate"].abs() >= least].sort_values("estimate", key=abs)
    tested = "low" not in edges or edges["low"].notna().any()
    with _canvas((WIDTH, 1.0 + 0.27 * len(layers))) as (figure, (axes,)):
        for row in shown.itertuples():
            line = edge_line(places[row.source], places[row.target])
            look = {"lw": max(0.6, 9 * np.sqrt(abs(row.estimate) / largest)), "alpha": 0.55, "zorder": 2}
            look["color"] = BLUE if row.estimate > 0 else VERMILION
            if tested and not row.significant:
                look |= {"color": GREY, "ls": (0, (2.5, 1.5)), "zorder": 1}
            axes.add_patch(PathPatch(line, fill=False, capstyle="butt", **look))
        for text, place in edge_labels(shown.tail(LABELLED).iloc[::-1], places):
            back = {"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8}
            axes.text(*place, text, ha="center", va="center", fontsize=7, bbox=back, zorder=3)
        for node, (x, y) in places.items():
            colour = BLACK if kept is None or node in kept or not re.search(r"\d", node) else GREY
            box = {"boxstyle": "round,pad=0.25", "fc": "white", "ec": colour, "lw": 0.8}
            look = {"ha": "center", "va": "center", "fontsize": 8.5, "color": colour}
            axes.text(x, y, node.split(" at ")[0], bbox=box, zorder=4, **look)
        for x, (heading, _) in enumerate(lanes):
            axes.text(x, -0.8, heading, ha="center", va="bottom", fontweight="bold", fontsize=9)
        for y, layer in enumerate(layers):
            axes.text(-0.42, y, f"layer {layer}" * bool(layer), ha="left", va="center", fontsize=8, color=GREY)
        for label, colour in (("raises logit_diff", BLUE), ("lowers it", VERMILION)):
            axes.plot([], [], label=label, lw=3, color=colour, alpha=0.55)
        if tested and len(edges):
            axes.plot([], [], label="not significant", lw=3, color=GREY, ls=(0, (1, 0.7)), alpha=0.55)
        told = f"{len(shown)} of {len(edges)} paths: {least:.2f} logits or more, widest {largest:.2f}"
        axes.plot([], [], " ", label=told)
        axes.set(xlim=(-0.45, len(lanes) - 0.6), ylim=(len(layers) - 0.4, -1.4))
        axes.set_axis_off()
        add_legend(figure)
    return figure


def edge_line(start: tuple[float, float], end: tuple[float, float]) -> Outline:
    """A bent line between two nodes; within a lane it goes around the right, further out the longer."""
    (x, y), (to_x, to_y) = start, end
    if x == to_x:
        out = x + 0.2 + 0.05 * abs(to_y - y)
        bends = [(x + 0.12, y), (out, y), (out, to_y), (x + 0.12, to_y)]
    else:
        half = (to_x - x) / 2
        bends = [(x + 0.12, y), (x + half, y), (to_x - half, to_y), (to_x - 0.12, to_y)]
    return Outline(bends, [Outline.MOVETO, *[Outline.CURVE4] * 3])


def edge_labels(edges: pd.DataFrame, places: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, np.ndarray]]:
    """The effects of edges and where to write them: at the end that fewer of them share, one at each end."""
    taken = set()
    for row in edges.itertuples():
        late = (edges["source"] == row.source).sum() > (edges["target"] == row.target).sum()
        if (end := row.target if late else row.source) not in taken:
            taken.add(end)
            t = 0.82 if late else 0.18
            line = edge_line(places[row.source], places[row.target]).vertices
            yield (
                f"{row.estimate:.2f}".replace("-", "\N{MINUS SIGN}"),
                line.T @ [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3],
            )


def probe_bars(frame: pd.DataFrame, ylabel: str = "right (share of people)") -> Figure:
    """Superset and profession from one name: bars per template, raw and centred, each template's chance dashed.

    Columns: `label` (a panel each), `template`, `centred` (bool), `chance`, `estimate`, `low`, `high`.
    """
    _need("probe_bars", frame, "label", "template", "centred", "chance")
    frame = frame.assign(how=np.where(frame["centred"], "centred on each label's mean", "raw"))
    names = list(dict.fromkeys(frame["template"]))
    with stacked_panels(frame, "label", 2.2) as (figure, panels):
        for axes, part in panels:
            at = np.array([names.index(name) for name in part["template"]])
            _bars(axes, part, "how", styles_of(frame, "how"), at)
            axes.set_xticks(range(len(names)), [name.replace("{a}", "...") for name in brief(names)])
            axes.grid(False, axis="x")
            axes.set(ylim=(0, 1), xlim=(-0.6, len(names) - 0.4))
        shared_ylabel(figure, ylabel)
        add_legend(figure)
    return figure


def four_tests(frame: pd.DataFrame, units: Mapping[str, str]) -> Figure:
    """Sites put to several tests, a panel per test with its own axis; blue where the test is passed, grey where not.

    Columns: `site` (in the frame's order), `test`, `passed` (bool), `estimate`, `low`, `high`, and `whole`, the test
    that a panel is a part of. `units` has what each panel's axis measures. At the right: how many of the tests made the
    site passes, of several parts only where it passes each.
    """
    _need("four_tests", frame, "site", "test", "passed", "whole")
    sites, tests = list(dict.fromkeys(frame["site"])), list(dict.fromkeys(frame["test"]))
    with style.context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.25 + 0.21 * len(sites)))
        panels = figure.subplots(1, len(tests), sharey=True, squeeze=False)[0]
        for axes, test in zip(panels, tests, strict=True):
            part = frame[frame["test"] == test]
            for passed, colour, marker in ((True, BLUE, "o"), (False, GREY, "s")):
                own = part[part["passed"] == passed]
                at = np.array([sites.index(site) for site in own["site"]], dtype=float)
                draw_points(axes, at, own, colour, marker, label="passed" if passed else "not passed", across=True)
            zero_line(axes, across=True)
            axes.set_title(test, fontsize=9)
            axes.set_xlabel(units[test], fontsize=8)
            axes.locator_params(axis="x", nbins=4)
            axes.set_yticks(range(len(sites)), sites)
        panels[0].set_ylim(len(sites) - 0.4, -0.6)
        for place, site in enumerate(sites):
            own = frame[frame["site"] == site].groupby("whole")["passed"].all()
            text = f"{int(own.sum())} of {len(own)}"
            panels[-1].text(1.04, place, text, transform=panels[-1].get_yaxis_transform(), va="center", fontsize=8)
        add_legend(figure)
    return figure
