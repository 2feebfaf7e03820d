"""The circuits of step 10 as a graph: their sites by role and layer, with the paths that step 06 has measured.

1. `graph` puts the sites of both circuits and the ends of the paths into lanes; a site of either circuit is `kept`.
2. `notes` says of each site in which circuit it is, and what its removal costs that circuit.
3. `figure` is the twin for paper of `to_touch`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pandas as pd
from IPython.display import HTML, Markdown
from matplotlib.figure import Figure

from pipeline.step import Step
from report import interactive, plots
from report.words import listed, of_row
from steps.story import measure
from steps.story.circuits_page import members, shown
from steps.story.measure import Measured

NODES = 40  # of the circuit over all tokens that are drawn, in the order of attribution
LANES = {"names": "at the names", "rest": "between them", "between": "after them", "last": "last token"}
ENDS = {"names": ("names", ["names"]), "answer": ("answer", ["answer"])}
COLUMNS = ["source", "target", "estimate", "low", "high", "significant", "least", "most", "quads"]


class Graph(NamedTuple):
    """What is drawn; lanes and edges as `plots.circuit_graph` takes them."""

    lanes: list[tuple[str, list[str]]]
    edges: pd.DataFrame
    kept: list[str]  # nodes of either circuit
    notes: dict[str, str]  # by site
    hidden: int  # nodes of the circuit over all tokens that are not drawn


def place(node: str) -> tuple[int, bool, int]:
    """Layer, whether it is a module, and head, to sort the nodes of a lane by."""
    layer, *head = map(int, re.findall(r"\d+", node))
    return layer, not head, *(head or [0])


def graph(edges: pd.DataFrame, everywhere: Sequence[str], last: Sequence[str]) -> Graph:
    """The graph, without notes. `edges` are those of step 06; nodes are "21.6 at names", sites of `last` "21.6"."""
    drawn = [node.removesuffix(" at last") for node in everywhere[:NODES]]
    kept = list(dict.fromkeys([*drawn, *last]))
    ends = {*edges["source"], *edges["target"]}
    nodes = sorted({*kept, *ends} - set(ENDS), key=place)
    roles = {node: node.partition(" at ")[2] or "last" for node in nodes}
    lanes = [(LANES[role], own) for role in LANES if (own := [node for node in nodes if roles[node] == role])]
    first, final = ([ENDS[name]] if name in ends else [] for name in ENDS)
    return Graph([*first, *lanes, *final], edges, kept, {}, len(everywhere[NODES:]))


def notes(circuits: Mapping[str, tuple[Sequence[str], pd.DataFrame]]) -> dict[str, str]:
    """What each site is in each circuit: `circuits` has the nodes and the cost of each one's removal (`members`)."""
    out: dict[str, list[str]] = {}
    for name, (nodes, table) in circuits.items():
        costs = {row.site: f"removal costs it {of_row(row)} logits" for row in table.itertuples()}
        by_site: dict[str, list[str]] = {}
        for node in nodes:
            site, _, role = node.partition(" at ")
            by_site.setdefault(site, []).append(
                f"at {role} " * bool(role) + f"({costs.get(node, 'removal not tested')})"
            )
        for site, said in by_site.items():
            out.setdefault(site, []).append(f"in the circuit {name} {listed(said)}")
    return {site: "; ".join(said) for site, said in out.items()}


def of_step(step: Step, m: Measured) -> Graph:
    """The graph of a run; without edges where step 06 has left none."""
    edges = pd.DataFrame((step.beside("retrieval_heads") or {}).get("edges", []), columns=COLUMNS)
    everywhere, last = measure.circuit_of(m.everywhere.search), measure.circuit_of(m.search)
    tables = [
        members(shown(own), step.params) if nodes else pd.DataFrame()
        for own, nodes in ((m.everywhere, everywhere), (m, last))
    ]
    circuits = {"over all tokens": (everywhere, tables[0]), "at the last token": (last, tables[1])}
    return graph(edges, everywhere, last)._replace(notes=notes(circuits))


def figure(step: Step, m: Measured | None) -> Figure | Markdown | None:
    """The sites of both circuits, and the strongest paths; None where the model does not do the task."""
    if m is None:
        return None
    if not (found := of_step(step, m)).lanes:
        return Markdown("Neither circuit was found, and no path was measured: there is nothing to draw.")
    return plots.circuit_graph(found.lanes, found.edges, found.kept)


def to_touch(step: Step, m: Measured | None) -> HTML | None:
    """The same, to be asked site by site."""
    if m is None or not (found := of_step(step, m)).lanes:
        return None
    about = {"kept": found.kept, "notes": found.notes, "hidden": found.hidden}
    return interactive.circuit_graph("fig-circuit-graph", found.lanes, found.edges, step.params.level, **about)
