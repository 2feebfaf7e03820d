"""Figures of the steps on the circuit (05 to 07), beside those of `report.plots` and in the same style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from report.plots import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    STYLE,
    VERMILION,
    WIDTH,
    Figure,
    _bars,
    _canvas,
    _ends,
    _groups,
    _intervals,
    _legend,
    _need,
    _panels,
    _points,
    _ylabel,
    _zero,
)


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


def forest(
    frame: pd.DataFrame, xlabel: str, by: str = "quantity", section: str = "kind", row: str = "group",
    lines: Sequence[float] = (),
) -> Figure:  # fmt: skip
    """Estimates with intervals from the top in the frame's order, under a heading for each value of `section`.

    Columns: `section`, `row`, `by` ("damage", "recovery"), `estimate`, `low`, `high`, `quads` (written at the right).
    """
    _need("forest", frame, section, row, by, "quads")
    places, labels, sizes = {}, [], []
    for heading, part in frame.groupby(section, sort=False):
        labels.append((str(heading), True))
        sizes.append("")
        for name, own in part.groupby(row, sort=False):
            places[heading, name] = len(labels)
            labels.append((str(name), False))
            sizes.append(f"{own['quads'].max()}")
    with _canvas((WIDTH, 0.9 + 0.2 * len(labels))) as (figure, (axes,)):
        groups = _groups(frame, by)
        for index, (group, (colour, marker)) in enumerate(groups.items()):
            part = frame[(frame[by] == group) & frame["estimate"].notna()]
            at = np.array([places[key] for key in zip(part[section], part[row], strict=True)], dtype=float)
            _points(axes, at + (index - (len(groups) - 1) / 2) * 0.32, part, colour, marker, label=group, across=True)
        _zero(axes, across=True)
        for line in lines:
            axes.axvline(line, color=GREY, lw=1, ls="--")
        axes.set_yticks(range(len(labels)), [name for name, _ in labels])
        for text, (_, heading) in zip(axes.get_yticklabels(), labels, strict=True):
            text.set_fontweight("bold" if heading else "normal")
        for place, size in enumerate(sizes):
            axes.text(1.01, place, size, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=GREY)
        axes.text(1.01, -1, "quads", transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=GREY)
        axes.grid(False, axis="y")
        axes.set(ylim=(len(labels) - 0.4, -0.7), xlabel=xlabel)
        _legend(figure, axes)
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
            axes.set_xticks(range(table.shape[1]), table.columns, rotation=35, ha="right")
            axes.set_yticks(range(len(table)), table.index if index == 0 else [""] * len(table))
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
            _zero(axes, across=True)
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
            ("first slot", 0.97, BLUE, "o"), ("second slot", 1.03, ORANGE, "s"), ("two names", 2, GREEN, "D")
        ):  # fmt: skip
            part = fitted[fitted["term"] == term]
            _points(axes, np.full(len(part), place), part, colour, marker, label=term)
        axes.plot([0], [0], color=BLACK, marker="o", ls="none", markerfacecolor="white")
        _zero(axes)
        axes.set_xticks(range(3))
        axes.set(xlabel="names in the class", ylabel=ylabel, xlim=(-0.2, 2.2))
        _legend(figure, axes)
    return figure


def two_hop(columns: Sequence[tuple[str, Sequence[str]]], edges: pd.DataFrame, unit: str = "logits") -> Figure:
    """A path through the model as a graph: columns of nodes from left to right, edges as wide as what they carry.

    Widths are to scale within a hop (between two columns, or inside one), whose widest edge is written below it: what
    enters a site at the names goes on along every path, and so is not of the size of what it tells the slice.

    `columns` are (heading, nodes from the top, in the order in which they compute). `edges` has `source`, `target`,
    `estimate` and `significant`; an edge that is not significant is a thin dashed line. Edges within a column bulge to
    the right and run down. A node is labelled by its name up to " at ": a site of two columns is "mlp 23 at names" in
    one of them.

    Raises ValueError for a node in two columns, and for an edge to or from a node that is in none.
    """
    _need("two_hop", edges, "source", "target", "estimate", "significant", interval=False)
    places: dict[str, tuple[float, float]] = {}
    for x, (_, nodes) in enumerate(columns):
        for place, node in enumerate(nodes):
            if node in places:
                raise ValueError(
                    f"two_hop: the node {node!r} is in two columns; call one of them {node + ' at names'!r}"
                )
            places[node] = (float(x), place - (len(nodes) - 1) / 2)
    if lost := ({*edges["source"], *edges["target"]} - set(places)):
        raise ValueError(f"two_hop: edges name {min(lost)!r}, which is in no column; the nodes are {', '.join(places)}")
    tall = max(len(nodes) for _, nodes in columns)
    hops = [
        (places[source][0], places[target][0]) for source, target in zip(edges["source"], edges["target"], strict=True)
    ]
    edges = edges.assign(hop=hops)
    largest = edges["estimate"].abs().groupby(edges["hop"]).max().to_dict()

    def look(estimate: float, hop: tuple[float, float]) -> dict:
        colour = BLUE if estimate > 0 else VERMILION
        return {"lw": max(0.4, 12 * abs(estimate) / (largest[hop] or 1)), "color": colour, "alpha": 0.65}

    with _canvas((WIDTH, 1.1 + 0.42 * tall)) as (figure, (axes,)):
        faint = {"lw": 0.6, "color": GREY, "ls": (0, (4, 3)), "alpha": 0.45}
        for row in edges.sort_values("significant").itertuples():
            (x, y), (to_x, to_y) = places[row.source], places[row.target]
            if x == to_x:  # around the right of the column, further out the longer
                out = 0.13 + 0.045 * abs(to_y - y)
                bends = [(x + 0.12, y), (x + out + 0.12, y), (x + out + 0.12, to_y), (x + 0.12, to_y)]
            else:
                half = (to_x - x) / 2
                bends = [(x + 0.12, y), (x + half, y), (to_x - half, to_y), (to_x - 0.12, to_y)]
            line = Path(bends, [Path.MOVETO, *[Path.CURVE4] * 3])
            style_of = look(row.estimate, row.hop) if row.significant else faint
            axes.add_patch(PathPatch(line, fill=False, capstyle="butt", zorder=2 if row.significant else 1, **style_of))
        for node, (x, y) in places.items():
            box = {"boxstyle": "round,pad=0.3", "fc": "white", "ec": BLACK, "lw": 0.8}
            axes.text(x, y, node.split(" at ")[0], ha="center", va="center", fontsize=9, bbox=box, zorder=4)
        for x, (heading, _) in enumerate(columns):
            axes.text(x, -tall / 2 - 0.35, heading, ha="center", va="bottom", fontweight="bold", fontsize=9)
        for (x, to_x), size in largest.items():
            inside = "inside: " if x == to_x else ""
            at = ((x + to_x) / 2, tall / 2 + (0.45 if inside else 0.1))
            axes.text(*at, f"{inside}widest {size:.2g} {unit}", ha="center", va="top", fontsize=8, color=GREY)
        for label, colour in (("above zero", BLUE), ("below zero", VERMILION)):
            axes.plot([], [], label=label, lw=3, color=colour, alpha=0.65)
        axes.plot([], [], label="not significant", **faint)
        axes.set(xlim=(-0.3, len(columns) - 0.7), ylim=(tall / 2 + 0.9, -tall / 2 - 0.9))
        axes.set_axis_off()
        _legend(figure, axes)
    return figure


def probe_bars(frame: pd.DataFrame, ylabel: str = "right (share of people)") -> Figure:
    """Superset and profession from one name: bars per template, raw and centred, each template's chance dashed.

    Columns: `label` (a panel each), `template`, `centred` (bool), `chance`, `estimate`, `low`, `high`.
    """
    _need("probe_bars", frame, "label", "template", "centred", "chance")
    frame = frame.assign(how=np.where(frame["centred"], "centred on each label's mean", "raw"))
    names = list(dict.fromkeys(frame["template"]))
    with _panels(frame, "label", 2.2) as (figure, panels):
        for axes, part in panels:
            at = np.array([names.index(name) for name in part["template"]])
            _bars(axes, part, "how", _groups(frame, "how"), at)
            axes.hlines(part["chance"], at - 0.45, at + 0.45, color=BLACK, lw=1.2, ls="--", label="chance")
            axes.set_xticks(range(len(names)), [name.replace("{a}", "...") for name in names])
            axes.grid(False, axis="x")
            axes.set(ylim=(0, 1), xlim=(-0.6, len(names) - 0.4))
        _ylabel(figure, ylabel)
        _legend(figure, panels[0][0])
    return figure


def four_tests(frame: pd.DataFrame, units: Mapping[str, str]) -> Figure:
    """Sites put to several tests, a panel per test with its own axis; blue where the test is passed, grey where not.

    Columns: `site` (in the frame's order), `test`, `passed` (bool), `estimate`, `low`, `high`. `units` has what each
    test's axis measures. At the right: how many of the tests made the site passes.
    """
    _need("four_tests", frame, "site", "test", "passed")
    sites, tests = list(dict.fromkeys(frame["site"])), list(dict.fromkeys(frame["test"]))
    with style.context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.25 + 0.21 * len(sites)))
        panels = figure.subplots(1, len(tests), sharey=True, squeeze=False)[0]
        for axes, test in zip(panels, tests, strict=True):
            part = frame[frame["test"] == test]
            for passed, colour, marker in ((True, BLUE, "o"), (False, GREY, "s")):
                own = part[part["passed"] == passed]
                at = np.array([sites.index(site) for site in own["site"]], dtype=float)
                _points(axes, at, own, colour, marker, label="passed" if passed else "not passed", across=True)
            _zero(axes, across=True)
            axes.set_title(test, fontsize=9)
            axes.set_xlabel(units[test], fontsize=8)
            axes.locator_params(axis="x", nbins=4)
            axes.set_yticks(range(len(sites)), sites)
        panels[0].set_ylim(len(sites) - 0.4, -0.6)
        for place, site in enumerate(sites):
            own = frame.loc[frame["site"] == site, "passed"]
            text = f"{int(own.sum())} of {len(own)}"
            panels[-1].text(1.04, place, text, transform=panels[-1].get_yaxis_transform(), va="center", fontsize=8)
        _legend(figure, panels[0])
    return figure
