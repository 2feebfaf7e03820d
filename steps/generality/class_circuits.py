"""Circuits picked class by class: without a superset, or on it alone; as the critical slice is picked, by other pairs.

1. `orders` puts step 04's single sites in order of their recovery on some of the discovery pairs.
2. The first of them, the first two, ... are replaced together in these pairs, both ways (`growing_units`).
3. `cut` says how many of them make the circuit, by the critical slice's rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from lib import effects, sweep
from lib.effects import SITE
from lib.hooks import Site
from lib.tasks import SUPERSETS, Pair
from pipeline.units import Unit, sweep_units


@dataclass(frozen=True)
class Circuit:
    """Heads and MLPs in order of recovery on some of the discovery pairs, and how many of them make the circuit."""

    kind: str  # "without" a superset: no pair has it; "only": it is the answer of every pair
    superset: str
    pairs: tuple[str, ...]
    order: tuple[Site, ...]
    size: int = 0  # 0: no sites, or too little to choose by
    reached: bool = False  # whether joint recovery and damage reach the critical slice's share

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.order[: self.size]

    @property
    def growing(self) -> list[frozenset[Site]]:
        """Its first site, its first two, ..."""
        return [frozenset(self.order[: size + 1]) for size in range(len(self.order))]


def orders(frame: pd.DataFrame, limit: int) -> list[Circuit]:
    """For each superset, the order of sites without it and the order by it alone; none where too little is left.

    `frame` has records of single sites with both answers of their pairs (`pipeline.step.single_sites`).
    """
    out = []
    for superset in sorted({*frame["answer"], *frame["corrupt_answer"]}, key=SUPERSETS.index):
        without = (frame["answer"] != superset) & (frame["corrupt_answer"] != superset)
        for kind, chosen in (("without", without), ("only", frame["answer"] == superset)):
            rows, order = frame[chosen], pd.DataFrame(columns=SITE)
            if len(rows):
                recovery = effects.ratios(rows, SITE)
                order = recovery[recovery > 0].nlargest(limit).reset_index()
            sites = tuple(Site(*site) for site in order[SITE].itertuples(index=False))
            out.append(Circuit(kind, superset, tuple(dict.fromkeys(rows["pair_id"])), sites))
    return out


def numbered_sets(circuits: Sequence[Circuit]) -> dict[frozenset[Site], int]:
    """Every growing set of the circuits, with its place in the list of all."""
    return {sites: number for number, sites in enumerate(dict.fromkeys(s for c in circuits for s in c.growing))}


def sets_by_pair(circuits: Sequence[Circuit]) -> dict[str, tuple[int, ...]]:
    """The numbers of the growing sets that are replaced in each pair; pairs that have any."""
    number, wanted = numbered_sets(circuits), {}
    for circuit in circuits:
        for pair_id in circuit.pairs:
            wanted.setdefault(pair_id, set()).update(number[sites] for sites in circuit.growing)
    return {pair_id: tuple(sorted(numbers)) for pair_id, numbers in wanted.items() if numbers}


def growing_units(circuits: Sequence[Circuit], pairs: Sequence[Pair]) -> list[Unit]:
    """The circuits' growing sets in the pairs they were ordered by, both ways; `numbers` as in `numbered_sets`.

    A set that several circuits share is run once on a pair.
    """
    listed, wanted, plan = [sorted(sites) for sites in numbered_sets(circuits)], sets_by_pair(circuits), []
    groups: dict[tuple[int, ...], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(wanted[pair.pair_id], []).append(pair)
    for index, (numbers, own) in enumerate(groups.items()):
        for direction in sweep.DIRECTIONS:
            sets = {"site_sets": [listed[number] for number in numbers], "numbers": numbers}
            plan += sweep_units(f"{direction}-{index:02d}", own, direction=direction, role="last", **sets)
    return plan


def numbered(compute: Callable[[Unit], pd.DataFrame]) -> Callable[[Unit], pd.DataFrame]:
    """`compute` for units that sweep some of the sets of a longer list: `site_set` becomes the number in that list."""

    def run(unit: Unit) -> pd.DataFrame:
        options = {key: value for key, value in unit.options.items() if key != "numbers"}
        frame = compute(replace(unit, options=options))
        frame["site_set"] = np.asarray(unit.options["numbers"])[frame["site_set"]]
        return frame

    return run


def cut(circuits: Sequence[Circuit], grown: pd.DataFrame, share: float) -> list[Circuit]:
    """The circuits with as many of their sites as the critical slice's rule takes on their own discovery pairs."""
    number, out = numbered_sets(circuits), []
    for circuit in circuits:
        places, joint = [number[sites] for sites in circuit.growing], {}
        rows = grown[grown["pair_id"].isin(circuit.pairs) & grown["site_set"].isin(places)]
        for direction, quantity in (("noise", "damage"), ("denoise", "recovery")):
            own = rows[rows["direction"] == direction]
            ratios = effects.ratios(own, ["site_set"]) if len(own) else pd.Series()
            joint[quantity] = ratios.reindex(places).tolist()
        if places and np.isfinite([*joint["recovery"], *joint["damage"]]).all():
            chosen = effects.critical_slice(joint["recovery"], joint["damage"], share)
            circuit = replace(circuit, size=chosen.size, reached=chosen.reached)
        out.append(circuit)
    return out
