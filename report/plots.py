"""Figures of the report, from tidy frames and arrays: one function per kind of figure, each returning a `Figure`.

A frame holds one row per estimate: `estimate`, `low`, `high` (the interval; NaN or None where there are too few quads:
the point is then drawn hollow, without a whisker) and the columns that place it. Labels carry units and are the
caller's, because the caller knows whether a column is in logits or in shares. Colours are Okabe and Ito's; the
diverging map is centred at zero. A figure shows itself at the end of a notebook cell and belongs to no global state of
pyplot; `save` writes it to the results folder, byte for byte the same for the same data.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm, to_rgba

from lib import effects

STYLE = Path(__file__).with_name("superset.mplstyle")
WIDTH = 7.5  # inches
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # fmt: skip
GREY, PALE = "#767676", "#f0f0f0"
# One colour per word throughout the report; what is not named here takes the next free colour.
COLOURS = {
    "noise": VERMILION, "denoise": BLUE, "damage": VERMILION, "recovery": BLUE,
    "discovery": GREY, "confirmation": BLUE,
    "name_a": SKY, "name_b": GREEN, "name_c": ORANGE, "names": PURPLE, "swapped": VERMILION, "last": BLUE, "all": BLACK,
    "resid": BLACK, "attn": BLUE, "mlp": ORANGE, "head": GREEN,
    "zero": BLACK, "mean": GREEN, "resample": ORANGE, "counterfactual": VERMILION, "clean": BLUE,
    "answer": BLUE, "foil": ORANGE,
}  # fmt: skip
Panels = list[tuple[Axes, pd.DataFrame]]
MARKERS = ("o", "s", "D", "^", "v", "P", "X")


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
        (folder / f"{step}-{name}.{kind}").write_bytes(_bytes(figure, kind))
    return f"figures/{step}-{name}.png"


def layer_curve(
    frame: pd.DataFrame, ylabel: str, by: str = "position", panel: str | None = None, marked: Sequence[int] = ()
) -> Figure:
    """An effect along the layers, a line with its band per value of `by` (a role), panels above one another.

    Columns: `layer`, `by`, `panel` if given, `estimate`, `low`, `high`. `marked` layers (the critical ones) are shaded.
    """
    _need("layer_curve", frame, "layer", by, panel)
    with _panels(frame, panel, 2.7) as (figure, panels):
        groups = _groups(frame, by)
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
            _zero(axes)
        _ylabel(figure, ylabel)
        _layers(axes, frame["layer"])
        _legend(figure, panels[0][0])
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
    with _panels(frame, panel, 2.5) as (figure, panels):
        for axes, part in panels:
            _bars(axes, part, by, _groups(frame, by), part["layer"].to_numpy())
        _ylabel(figure, ylabel)
        _layers(axes, frame["layer"])
        _legend(figure, panels[0][0])
    return figure


def ranked_sites(frame: pd.DataFrame, xlabel: str, by: str = "half", lines: Sequence[float] = ()) -> Figure:
    """Sites from the top in the frame's order, a dot with its (simultaneous) interval for each value of `by`.

    Columns: `site` (text, "21.6" or "mlp 23"), `by` (discovery, confirmation), `estimate`, `low`, `high`.
    """
    _need("ranked_sites", frame, "site", by)
    sites = list(dict.fromkeys(frame["site"]))
    groups = _groups(frame, by)
    with _canvas((WIDTH, 1.0 + 0.17 * len(sites) * max(1.5, len(groups)))) as (figure, (axes,)):
        for index, (group, (colour, marker)) in enumerate(groups.items()):
            part = frame[frame[by] == group]
            offset = (index - (len(groups) - 1) / 2) * 0.6 / len(groups)
            y = np.array([sites.index(site) for site in part["site"]]) + offset
            _points(axes, y, part, colour, marker, label=group, across=True)
        _zero(axes, across=True)
        for line in lines:
            axes.axvline(line, color=GREY, lw=1, ls="--")
        axes.set_yticks(range(len(sites)), sites)
        axes.set_ylim(len(sites) - 0.4, -0.6)
        axes.set_xlabel(xlabel)
        _legend(figure, axes)
    return figure


def agreement(
    frame: pd.DataFrame, x: str, y: str, xlabel: str, ylabel: str, by: str | None = None, named: Sequence[str] = (),
    identity: bool = True,
) -> Figure:  # fmt: skip
    """One measure of each site against another: discovery against confirmation, one ablation against another.

    Columns: `x`, `y`, `by` if given (colour), `site` if any are `named` (written beside their point); where
    `<x>_low`, `<x>_high`, `<y>_low`, `<y>_high` are there, the intervals are drawn. `identity` draws the line y = x,
    on axes of one scale; leave it out where the two measures have different units.
    """
    _need("agreement", frame, x, y, by, "site" if named else None, interval=False)
    groups = _groups(frame, by) if by else {"": (BLUE, "o")}
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
                _zero(axes, across)
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
    frame: pd.DataFrame, chance: float, category: str = "superset", by: str | None = None,
    ylabel: str = "accuracy (share of prompts)",
) -> Figure:  # fmt: skip
    """Accuracy per superset (or template, task) with its interval, and the chance line.

    Columns: `category`, `by` if given, `estimate`, `low`, `high`, all shares in [0, 1]; in the frame's order.
    """
    figure = _categories("accuracy_bars", frame, category, "", ylabel, by, chance)
    figure.axes[0].set_ylim(0, 1.02)
    return figure


def fame_match(
    frame: pd.DataFrame, label: str, x: str = "fame_clean", y: str = "fame_corrupt", by: str | None = "half",
    tolerance: float | None = None,
) -> Figure:  # fmt: skip
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
    frame: pd.DataFrame, threshold: float = 0.8, by: str = "quantity", panel: str | None = "half",
    ylabel: str = "joint effect (share of logit_diff)", sites: Sequence[str] = (),
) -> Figure:  # fmt: skip
    """Joint recovery and damage of a growing set of sites, with the share that makes the set critical.

    Columns: `n_sites`, `by` ("recovery", "damage"), `panel` if given, `estimate`, `low`, `high`. `sites`, if given, are
    the names of the sites in the order in which they were added, written below the axis.
    """
    _need("slice_curve", frame, "n_sites", by, panel)
    with _panels(frame, panel, 2.6) as (figure, panels):
        groups = _groups(frame, by)
        for axes, part in panels:
            for index, (group, (colour, marker)) in enumerate(groups.items()):
                line = part[part[by] == group].sort_values("n_sites")
                x = line["n_sites"].to_numpy(dtype=float) + (index - (len(groups) - 1) / 2) * 0.12
                axes.plot(x, line["estimate"], color=colour, lw=1, alpha=0.6)
                _points(axes, x, line, colour, marker, label=group)
            _zero(axes)
            axes.axhline(threshold, color=BLACK, lw=1, ls="--", label=f"threshold ({threshold:g})")
        _ylabel(figure, ylabel)
        counts = np.unique(frame["n_sites"])
        counts = counts[:: -(-len(counts) // 20)]
        names = [f"{n}\n+ {sites[n - 1]}" if 0 < n <= len(sites) else f"{n}" for n in counts]
        axes.set_xticks(counts, names, fontsize=8 if sites else None)
        axes.set_xlabel("sites in the set")
        _legend(figure, panels[0][0])
    return figure


@contextmanager
def _canvas(size: tuple[float, float], rows: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """In the report's style, a figure of the given size (inches) and its axes, one above the other."""
    with style.context(STYLE):
        figure = Figure(figsize=size)
        yield figure, list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])


@contextmanager
def _panels(frame: pd.DataFrame, panel: str | None, height: float) -> Iterator[tuple[Figure, Panels]]:
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


def _groups(frame: pd.DataFrame, by: str) -> dict[str, tuple[str, str]]:
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


def _points(
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
    """Grouped bars with whiskers at integer positions `at`, one row each."""
    width = 0.8 / max(2, len(groups))
    for index, (group, (colour, _)) in enumerate(groups.items()):
        rows = (frame[by] == group).to_numpy()
        x = at[rows] + (index - (len(groups) - 1) / 2) * width
        part = frame[rows]
        axes.bar(x, part["estimate"].to_numpy(dtype=float), width * 0.92, color=colour, alpha=0.85, label=group, lw=0)
        _intervals(axes, x, *_ends(part), colour="#333333")
    _zero(axes)


def _categories(
    function: str, frame: pd.DataFrame, category: str, xlabel: str, ylabel: str, by: str | None,
    chance: float | None = None,
) -> Figure:  # fmt: skip
    """Grouped bars over the values of a text column, and the chance line if there is one."""
    _need(function, frame, category, by)
    if by is None:
        frame, by = frame.assign(_all=""), "_all"
    names = list(dict.fromkeys(frame[category]))
    with _canvas((WIDTH, 3.4)) as (figure, (axes,)):
        _bars(axes, frame, by, _groups(frame, by), np.array([names.index(name) for name in frame[category]]))
        rotation, side = (30, "right") if sum(len(str(name)) for name in names) > 80 else (0, "center")
        axes.set_xticks(range(len(names)), names, rotation=rotation, ha=side)
        axes.grid(False, axis="x")
        if chance is not None:
            axes.axhline(chance, color=BLACK, lw=1.2, ls="--", label=f"chance ({chance:.2g})")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _legend(figure, axes)
    return figure


def _zero(axes: Axes, across: bool = False) -> None:
    (axes.axvline if across else axes.axhline)(0, color="#999999", lw=0.8, zorder=1)


def _ylabel(figure: Figure, text: str) -> None:
    """One label for all panels: repeated beside each, a long one would run into the next."""
    figure.axes[0].set_ylabel(text) if len(figure.axes) == 1 else figure.supylabel(text, fontsize=10)


def _layers(axes: Axes, layers: pd.Series) -> None:
    """A layer axis with whole numbers."""
    first, last = int(layers.min()), int(layers.max())
    axes.set(xlim=(first - 0.7, last + 0.7), xlabel="layer")
    axes.set_xticks(range(first, last + 1, -(-(last - first + 1) // 16)))


def _legend(figure: Figure, axes: Axes) -> None:
    """A legend above the axes, where it covers nothing; none for a single unnamed group."""
    named = [(handle, text) for handle, text in zip(*axes.get_legend_handles_labels(), strict=True) if text]
    if named:
        figure.legend(*zip(*named, strict=True), loc="outside upper left", ncols=min(len(named), 6))


def halves(sites: pd.DataFrame) -> Figure | None:
    """Every site of a table of both halves, discovery against confirmation; None where there is one half."""
    if sites["half"].nunique() < 2:
        return None
    axes = ("discovery", "confirmation", "discovery (logits)", "confirmation (logits)")
    return agreement(effects.side_by_side(sites, "half"), *axes, by="component")
