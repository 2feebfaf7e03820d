"""Figures that a reader can touch: their numbers as JSON in the page, drawn by the book's own scripts.

Nothing is fetched, so that they work from a file, and without a network. Each stands beside its matplotlib twin, which
paper and readers without scripts have. A kind of figure has a script of its own in `book/assets`, named in
`book/_config.yml`; what they share, and the state in the address, is in `interactive.js` there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from IPython.display import HTML

from lib.records import atomic
from report import plots

PAIR_VALUES = 20_000  # most values of single pairs in a page: leading sites have them, as many as that is enough for
MODULES = ("attn", "mlp")
ASSETS = Path(__file__).resolve().parent.parent / "book" / "assets"
SHARED = "interactive.js"  # the script that the others build on
# A page of its own for a figure: the book's style, in the colours that the browser has for light and dark.
PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --pst-color-background: Canvas; --pst-color-text-base: CanvasText; --pst-color-surface: ButtonFace;
  --pst-color-border: color-mix(in srgb, CanvasText 25%, Canvas);
  --pst-color-text-muted: color-mix(in srgb, CanvasText 70%, Canvas);
}
main { font-family: system-ui, sans-serif; max-width: 54rem; margin: 1rem auto; padding: 0 1rem; }
$style
</style>
<script>
document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
$script
</script>
<main><h1>$title</h1>$figure</main>
</html>
""")


class Link(NamedTuple):
    """A view of a site in the book; the script shows it where the book has that page, or it is on the same one."""

    text: str
    page: str  # 06_retrieval_heads
    figure: str  # fig-two-hop


# The views of a site, in the order in which one leads to the next.
VIEWS = (
    Link("In the map of sites.", "04_sufficiency", "fig-sufficiency-heads"),
    Link("As the slice grows.", "04_sufficiency", "fig-slice"),
    Link("Its paths.", "06_retrieval_heads", "fig-two-hop"),
    Link("In the circuits.", "10_story", "fig-circuit-graph"),
    Link("In single pairs.", "pairs", "fig-pairs"),
)


class SiteEffects(NamedTuple):
    """What one intervention does at every site; `rows` as `report.words.site_rows` makes them."""

    name: str  # as the button has it: "put back"
    verb: str  # what logit_diff does where the effect is above zero: "rises", "falls"
    rows: pd.DataFrame
    significant: pd.Series


def site_map(
    twin: str,
    shown: Sequence[SiteEffects],
    marked: Sequence[str],
    pairs: pd.DataFrame | None = None,
    level: float = 0.95,
) -> HTML:
    """A map of layers x heads and modules, in place of the figure named `twin`, that tells of each site what it does.

    `marked` sites are framed. `pairs` has what sites of the first intervention do pair by pair: `pair_id`, `site`,
    `effect` and `gap` (logits), `half`, `clean` and `corrupt` (the prompt's names and answer). It is left out of the
    page but for the leading sites, and where there are too many pairs for any. Effects are in logits.
    """
    rows = pd.concat([part.rows for part in shown])
    heads = sorted(rows.loc[rows["component"] == "head", "head"].unique(), reverse=True)
    lines = [("head", head) for head in heads] + [(name, -1) for name in MODULES if (rows["component"] == name).any()]
    layers = sorted(rows["layer"].unique())
    data = {
        "layers": layers,
        "lines": [str(head) if name == "head" else name for name, head in lines],
        "shown": [one(part, lines, layers) for part in shown],
        "marked": list(marked),
        "level": f"{100 * level:g}%",
        "links": others(twin),
        **by_pair(pairs, shown[0].rows),
    }
    return embedded("site-map", data, "In the book, this figure answers for every site and every pair.", twin)


class Panel(NamedTuple):
    """Points with intervals over one axis, joined to lines."""

    points: pd.DataFrame  # line, x, estimate, low, high: in the order of the legend
    xlabel: str
    ylabel: str
    unit: str
    name: str = ""
    ticks: Sequence[str] = ()  # what whole numbers x stand for, if they are no quantity
    bare: Mapping[str, Sequence[float]] = {}  # lines without points to be read: their values at 0, 1, ...


def curves(twin: str, key: str, panels: Sequence[Panel]) -> HTML:
    """Curves in place of the figure named `twin` whose points can be read; the one that is pinned stands in the address
    under `key`."""
    shown = []
    for panel in panels:
        lines = [
            {"name": name, "points": list(zip(own["x"], *map(hundredths, ends(own)), strict=True))}
            for name, own in panel.points.groupby("line", sort=False)
        ]
        for name, values in panel.bare.items():
            lines.append({"name": name, "bare": True, "points": list(enumerate(hundredths(pd.Series(values))))})
        shown.append(
            panel._asdict() | {"points": None, "bare": None, "ticks": list(panel.ticks) or None, "lines": lines}
        )
    return embedded(
        "curves", {"key": key, "panels": shown}, "In the book, each point of this figure can be read.", twin
    )


class Card(NamedTuple):
    """What is known of one neuron or feature."""

    name: str
    gist: str  # beside the name, where the card is folded
    facts: Mapping[str, str | Sequence[str]]  # by heading; several are listed
    bars: Mapping[str, pd.DataFrame]  # by heading: name, estimate, low, high


def cards(twin: str, key: str, shown: Sequence[Card], otherwise: pd.DataFrame) -> HTML:
    """Cards to be unfolded, in place of the figure named `twin`, if any; the one chosen stands in the address under
    `key`. Readers without scripts have the table `otherwise`."""
    out = []
    for card in shown:
        bars = [
            {"name": name, "rows": list(zip(rows["name"], *map(hundredths, ends(rows)), strict=True))}
            for name, rows in card.bars.items()
        ]
        out.append({"name": card.name, "gist": card.gist, "facts": list(card.facts.items()), "bars": bars})
    return embedded("cards", {"key": key, "cards": out}, otherwise.to_html(border=0, justify="left"), twin)


def ends(rows: pd.DataFrame) -> list[pd.Series]:
    """Estimates, and the ends of their intervals."""
    return [rows[name] for name in ("estimate", "low", "high")]


def others(figure: str) -> list[Link]:
    """The views of a site but for that of one figure."""
    return [view for view in VIEWS if view.figure != figure]


def one(part: SiteEffects, lines: Sequence[tuple[str, int]], layers: Sequence[int]) -> dict[str, Any]:
    """The numbers of one intervention, line by line from the top, hundredths of a logit; None where not measured."""
    table = part.rows.assign(significant=part.significant.astype(float)).set_index(["component", "head", "layer"])
    table = table.reindex([(*line, layer) for line in lines for layer in layers])
    effects = {key: hundredths(table[key]) for key in ("estimate", "low", "high", "discovery") if key in table}
    largest = np.nanquantile(table["estimate"].abs(), 0.99)
    shares, sure = hundredths(table["ratio"]), (table["significant"] == 1).astype(int).tolist()
    return {"name": part.name, "verb": part.verb, **effects, "share": shares, "sure": sure, "full": round(largest, 2)}


def hundredths(values: pd.Series) -> list[int | None]:
    """Numbers as JSON has them in few letters."""
    numbers = np.round(100 * values.astype(float).to_numpy())
    return [int(number) if np.isfinite(number) else None for number in numbers]


def by_pair(pairs: pd.DataFrame | None, rows: pd.DataFrame) -> dict[str, Any]:
    """What leading sites do in each pair: `pairs` as [clean, corrupt, half, gap, pair_id], `effects` by site in that
    order."""
    if pairs is None or not (count := PAIR_VALUES // pairs["pair_id"].nunique()):
        return {"pairs": [], "effects": {}}
    leading = rows.assign(size=rows["estimate"].abs()).nlargest(count, "size")["site"]
    wide = pairs[pairs["site"].isin(leading)].pivot(index="pair_id", columns="site", values="effect")
    about = pairs.drop_duplicates("pair_id").set_index("pair_id").loc[wide.index]
    about = about.assign(gap=hundredths(about["gap"]), pair=about.index)
    listed = about[["clean", "corrupt", "half", "gap", "pair"]].to_numpy().tolist()
    return {"pairs": listed, "effects": {site: hundredths(wide[site]) for site in leading if site in wide}}


def circuit_graph(
    twin: str,
    lanes: Sequence[tuple[str, Sequence[str]]],
    edges: pd.DataFrame,
    level: float = 0.95,
    kept: Sequence[str] | None = None,
    notes: Mapping[str, str] | None = None,
    hidden: int = 0,
) -> HTML:
    """The graph of `plots.circuit_graph` (`twin`), whose threshold is the reader's, and in which a site can be pinned.

    `edges` has `source`, `target`, `estimate` (logits), `low`, `high`, `significant`, and for edges of too few `quads`
    for an interval `least` and `most`, the range over quads. `kept` nodes are those of the circuit, where there are
    others; `notes` says more of a site; `hidden` nodes of the circuit are not in the graph.
    """
    places, layers = plots.laid_out(lanes)
    numbers, tested = {node: number for number, node in enumerate(places)}, bool(edges["low"].notna().any())
    ends = ("low", "high") if tested else ("least", "most")
    listed = edges.assign(source=edges["source"].map(numbers), target=edges["target"].map(numbers))
    listed = listed.assign(**{end: hundredths(edges[end]) for end in ("estimate", *ends)})
    columns = ["source", "target", "estimate", *ends, *(["significant"] if tested else [])]
    data = {
        "lanes": [heading for heading, _ in lanes],
        "nodes": [[node, *place] for node, place in places.items()],
        "layers": layers,
        "edges": listed[columns].astype(object).where(listed[columns].notna(), None).to_numpy().tolist(),
        "least": round(100 * plots.strongest(edges, plots.EDGES)),
        "tested": tested,
        "quads": int(edges["quads"].max()) if len(edges) else 0,
        "kept": None if kept is None else [numbers[node] for node in kept],
        "notes": dict(notes or {}),
        "hidden": hidden,
        "level": f"{100 * level:g}%",
        "links": others(twin),
    }
    return embedded("circuit-graph", data, "In the book, this graph shows every path, and those of a site.", twin)


class Growth(NamedTuple):
    """What was measured of sets of sites, as shares of the gap: `estimate`, `low`, `high` in each table."""

    order: Sequence[str]  # sites, as they are added
    alone: pd.DataFrame  # each by itself: `site`, `half`
    curves: pd.DataFrame  # the first of the order, the first two, ...: `n_sites`, `quantity`, `half`
    sums: pd.DataFrame  # the sum of their single recoveries, by `n_sites`; last half
    twos: pd.DataFrame  # two together: `site`, `other`; last half


def slice_builder(twin: str, growth: Growth, size: int, reached: bool, share: float) -> HTML:
    """Sets of sites to be put together by the reader, with what each was measured to do, in place of `twin`.

    The critical slice has the first `size` sites, and has `reached` the `share` of the gap or not.
    """
    order = list(growth.order)

    def spans(table: pd.DataFrame) -> list[list[int | None]]:
        return [list(row) for row in zip(*(hundredths(table[end]) for end in ("estimate", "low", "high")), strict=True)]

    halves = list(dict.fromkeys(growth.curves["half"]))
    of_half = {half: growth.curves[growth.curves["half"] == half].sort_values("n_sites") for half in halves}
    alone = {half: own.set_index("site").loc[order] for half, own in growth.alone.groupby("half")}
    twos = growth.twos.assign(site=growth.twos["site"].map(order.index), other=growth.twos["other"].map(order.index))
    data = {
        "order": order,
        "curves": {
            half: {name: spans(own[own["quantity"] == name]) for name in ("recovery", "damage")}
            for half, own in of_half.items()
        },
        "alone": {half: spans(alone[half]) for half in halves},
        "sums": spans(growth.sums.sort_values("n_sites")),
        "twos": [
            [*ends, *span] for ends, span in zip(twos[["site", "other"]].values.tolist(), spans(twos), strict=True)
        ],
        "size": size,
        "reached": reached,
        "share": round(100 * share),
        "links": others(twin),
    }
    return embedded("slice-builder", data, "In the book, sets of sites can be put together here.", twin)


def embedded(kind: str, data: Any, otherwise: str, twin: str) -> HTML:
    """Data for the script, with what stands there where it does not run: a sentence, which paper does not need, or
    HTML."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=int).replace("<", "\\u003c")
    script = f'<script type="application/json">{text}</script>'
    instead = otherwise if otherwise.startswith("<") else f"<p>{otherwise}</p>"
    return HTML(f'<div class="interactive {kind}" data-twin="{twin}">{script}{instead}</div>')


def scripts() -> list[str]:
    """The book's scripts, the shared one first."""
    return [SHARED, *sorted(path.name for path in ASSETS.glob("*.js") if path.name != SHARED)]


def save(figure: HTML, path: Path, title: str) -> None:
    """Write a figure as a page that opens from a file, with the book's scripts and style in it."""
    style, script = (
        "".join((ASSETS / name).read_text("utf-8") for name in own) for own in (["superset.css"], scripts())
    )
    page = PAGE.substitute(title=title, style=style, script=script, figure=figure.data)
    with atomic(path) as file:
        file.write(page.encode())
