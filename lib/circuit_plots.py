"""Figures of the steps on the circuit (05 to 07), beside those of `lib.plots` and in the same style and conventions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lib.plots import GREY, WIDTH, Figure, _bars, _canvas, _groups, _legend, _need, _panels, _points, _ylabel, _zero


def part_bars(frame: pd.DataFrame, ylabel: str, by: str = "slice", panel: str | None = "ablation") -> Figure:
    """What a total effect is made of: bars with whiskers per part, beside each other for each value of `by`.

    Columns: `name` (the part, in the frame's order), `by`, `panel` if given, `estimate`, `low`, `high`.
    """
    _need("part_bars", frame, "name", by, panel)
    names = list(dict.fromkeys(frame["name"]))
    with _panels(frame, panel, 2.5) as (figure, panels):
        for axes, part in panels:
            _bars(axes, part, by, _groups(frame, by), np.array([names.index(name) for name in part["name"]]))
            axes.set_xticks(range(len(names)), names)
            axes.grid(False, axis="x")
        _ylabel(figure, ylabel)
        _legend(figure, panels[0][0])
    return figure


def pair_histogram(
    frame: pd.DataFrame, value: str, xlabel: str, by: str = "ablation", lines: Sequence[float] = (0, 1), ends: float = 2
) -> Figure:
    """How a number is spread over pairs, an outline per value of `by`; what lies beyond +- `ends` is in the end bins.

    Columns: `value`, `by`. `lines` are drawn dashed (no repair at 0, full repair at 1).
    """
    _need("pair_histogram", frame, value, by, interval=False)
    with _canvas((WIDTH, 3.0)) as (figure, (axes,)):
        for group, (colour, _) in _groups(frame, by).items():
            kept = frame.loc[frame[by] == group, value].clip(-ends, ends)
            counts, edges = np.histogram(kept, bins=np.linspace(-ends, ends, 41))
            axes.stairs(counts, edges, color=colour, lw=1.5, label=f"{group} ({len(kept)} pairs)")
        for line in lines:
            axes.axvline(line, color=GREY, lw=1, ls="--")
        axes.set(xlabel=xlabel, ylabel="pairs", xlim=(-ends, ends))
        _legend(figure, axes)
    return figure


def widening_curve(frame: pd.DataFrame, by: str = "half", panel: str = "quantity") -> Figure:
    """A slice as it is widened, a panel for each quantity with its own axis, a line for each value of `by`.

    Columns: `n_sites`, `by`, `panel` (named with its unit), `estimate`, `low`, `high`.
    """
    _need("widening_curve", frame, "n_sites", by, panel)
    groups = _groups(frame, by)
    with _panels(frame, panel, 2.2) as (figure, panels):
        for axes, part in panels:
            for index, (group, (colour, marker)) in enumerate(groups.items()):
                line = part[part[by] == group].sort_values("n_sites")
                x = line["n_sites"].to_numpy(dtype=float) + (index - (len(groups) - 1) / 2) * 0.08
                axes.plot(x, line["estimate"], color=colour, lw=1, alpha=0.6)
                _points(axes, x, line, colour, marker, label=group)
            _zero(axes)
        axes.set_xticks(np.unique(frame["n_sites"]))
        axes.set_xlabel("sites in the slice")
        _legend(figure, panels[0][0])
    return figure
