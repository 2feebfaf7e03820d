"""Circuits picked class by class: without a superset, or on it alone; as the critical slice is picked, by other pairs.

1. `orders` puts step 04's single sites in order of their recovery on some of the discovery pairs.
2. The first of them, the first two, ... are replaced together in these pairs, both ways (`growing_units`).
3. `cut` says how many of them make the circuit, by the critical slice's rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lib import effects, sweep
from lib.effects import SITE
from lib.hooks import Site
from lib.tasks import Pair
from pipeline.step import Step
from pipeline.units import Unit, sweep_units

if TYPE_CHECKING:
    from pipeline.assumed import Case


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


def orders(frame: pd.DataFrame, limit: int, supersets: Sequence[str], floor: float = 0.0) -> list[Circuit]:
    """For each superset, the order of sites without it and the order by it alone; none where too little is left, and of
    no site that raises logit_diff by no more than the floor (logits).

    `frame` has records of single sites with both answers of their pairs (`pipeline.step.single_sites`).
    """
    out = []
    for superset in sorted({*frame["answer"], *frame["corrupt_answer"]}, key=supersets.index):
        without = (frame["answer"] != superset) & (frame["corrupt_answer"] != superset)
        for kind, chosen in (("without", without), ("only", frame["answer"] == superset)):
            rows, order = frame[chosen], pd.DataFrame(columns=SITE)
            if len(rows):
                recovery, rise = effects.ratios(rows, SITE), effects.effect(rows).groupby([rows[key] for key in SITE])
                good = (recovery > 0) & (rise.mean().reindex(recovery.index) > floor)
                order = recovery[good].nlargest(limit).reset_index()
            sites = tuple(Site(*site) for site in order[SITE].itertuples(index=False))
            out.append(Circuit(kind, superset, tuple(dict.fromkeys(rows["pair_id"])), sites))
    return out


def numbered_sets(circuits: Sequence[Circuit]) -> dict[frozenset[Site], int]:
    """Every growing set of the circuits, with its place in the list of all."""
    return {sites: number for number, sites in enumerate(dict.fromkeys(s for c in circuits for s in c.growing))}


def growing_units(step: Step | Case, pairs: Sequence[Pair], circuits: Sequence[Circuit]) -> list[Unit]:
    """The circuits' growing sets in the pairs they were ordered by, both ways; `numbers` as in `numbered_sets`.

    A set that several circuits share is run once on a pair.
    """
    number, wanted, groups, plan = numbered_sets(circuits), {}, {}, []
    for circuit in circuits:
        for pair_id in circuit.pairs:
            wanted.setdefault(pair_id, set()).update(number[sites] for sites in circuit.growing)
    for pair in pairs:
        groups.setdefault(tuple(sorted(wanted[pair.pair_id])), []).append(pair)
    listed = [sorted(sites) for sites in number]
    for index, (numbers, own) in enumerate(groups.items()):
        for direction in sweep.DIRECTIONS:
            sets = {"site_sets": [listed[place] for place in numbers], "numbers": numbers}
            plan += sweep_units(f"{direction}-{index:02d}", own, direction=direction, role="last", **sets)
    return plan


def grown(step: Step, pairs: Sequence[Pair], circuits: Sequence[Circuit]) -> Callable[[Unit], pd.DataFrame]:
    """Sweeps some sets of a longer list: `site_set` becomes the number in that list."""
    sweeper = step.sweeper(pairs)

    def compute(unit: Unit) -> pd.DataFrame:
        options = {key: value for key, value in unit.options.items() if key != "numbers"}
        frame = sweeper(replace(unit, options=options))
        frame["site_set"] = np.asarray(unit.options["numbers"])[frame["site_set"]]
        return frame

    return compute


def cut(circuits: Sequence[Circuit], records: pd.DataFrame, share: float) -> list[Circuit]:
    """The circuits with as many of their sites as the critical slice's rule takes on their own discovery pairs."""
    number, out = numbered_sets(circuits), []
    for circuit in circuits:
        places, joint = [number[sites] for sites in circuit.growing], {}
        rows = records[records["pair_id"].isin(circuit.pairs) & records["site_set"].isin(places)]
        for direction, quantity in (("noise", "damage"), ("denoise", "recovery")):
            own = rows[rows["direction"] == direction]
            ratios = effects.ratios(own, ["site_set"]) if len(own) else pd.Series()
            joint[quantity] = ratios.reindex(places).tolist()
        if places and np.isfinite([*joint["recovery"], *joint["damage"]]).all():
            chosen = effects.critical_slice(joint["recovery"], joint["damage"], share)
            circuit = replace(circuit, size=chosen.size, reached=chosen.reached)
        out.append(circuit)
    return out
