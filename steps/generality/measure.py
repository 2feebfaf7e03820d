"""Step 07, measured: is the slice general? The dense grid, circuits picked class by class, controls, the rule.

1. `GRID`: pairs of confirmation quads, in the profile's template and in others (`grid`).
2. `CIRCUITS`: growing sets of circuits that are picked on part of the discovery pairs (`class_circuits`).
3. `JOINT`: the slice, those circuits and each site of the slice replaced in every pair of the grid, both ways;
   `UNSELECTED`: the slice, in step 01's pairs before any selection.
4. `SITES`: every head and MLP alone, in the pairs of the profile's template.
5. `CONTROLS`: the slice ablated in prompts in which it should find nothing (`controls`).
6. `RULE`: prompts of two known people (`name_rule_prompts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from lib import records, tasks
from lib.data import HALVES
from lib.hooks import Site
from lib.tasks import SUPERSETS, Pair
from pipeline.assumed import MOVED, Case, of_sweep, order_of, pair_of
from pipeline.costs import Work, total
from pipeline.declaration import EFFECTS, SUPERSET_TASKS, Declaration, Table
from pipeline.params import OfSlice, Share, Words
from pipeline.step import Step, single_sites
from pipeline.units import Unit, subsample, without_labels
from steps.generality import class_circuits, controls, grid, name_rule_prompts
from steps.generality.class_circuits import Circuit

SHARED = 0.25  # of a circuit's sites are those of every other, in the same order: in the default book, nearly


class Generality(OfSlice):
    """07: the dense grid, class by class; templates never used for picking; the rule; negative controls."""

    pairs: int | None = Field(None, ge=1, description="most pairs of a template; default all")
    templates: Words = Field(
        ("profession_both", "both_famous", "common_both"), description="templates of the grid; the profile's own leads"
    )
    pairs_per_quad: int = Field(4, ge=1, le=4, description="pairs taken from a confirmation quad, own template")
    template_pairs: int = Field(2, ge=1, le=4, description="pairs taken from a confirmation quad, other templates")
    rule_prompts: int = Field(400, ge=1, description="prompts of two random people from which the rule is read")
    control_prompts: int = Field(60, ge=1, description="prompts of each negative control")
    random_sets: int = Field(5, ge=1, description="sets of random heads ablated")
    silence_margin: Share = Field(
        0.2, description="a control is silent if no candidate moves by this share of the ordinary effect"
    )
    general_floor: Share = Field(0.5, description="what joint recovery and damage must exceed in every class")


def joint_units(step: Step | Case, pairs: Sequence[Pair], sets: Sequence[Sequence[Site]]) -> list[Unit]:
    """Sets of sites in every pair of the grid."""
    return grid.mirrored_units(pairs, site_sets=sets)


def site_units(step: Step | Case, pairs: Sequence[Pair]) -> list[Unit]:
    """Every head and MLP alone."""
    return grid.mirrored_units(pairs, components=["head", "mlp"], layers=step.layers)


def of_pairs(step: Step, pairs: Sequence[Pair], *chosen: Any) -> Callable[[Unit], pd.DataFrame]:
    """A sweep of pairs that are no pairs of step 01, or are without their labels."""
    return step.sweeper(without_labels(pairs))


def grid_cost(case: Case, units: Sequence[Unit]) -> Work:
    """Every prompt of the pairs that could be in the grid is asked once."""
    out = Work()
    for name, pairs in possible_grid(case).items():
        prompts = {side.ids for pair in pairs for side in (pair.clean, pair.corrupt)}
        out += case.asked(len(prompts), tasks.find_template(name, case.params.task))
        out += Work(other={"tokenised": 3 * len(pairs)})
    return out


def control_cost(case: Case, units: Sequence[Unit], sets: Any, ordinary: Sequence[Pair], others: Any) -> Work:
    """A sweep with means over ordinary prompts; names are drawn from lists of two thousand."""
    return case.swept(units, ordinary) + Work(other={"tokenised": 2000})


def rule_cost(case: Case, units: Sequence[Unit]) -> Work:
    """Everyone is asked about alone, twice as many as are needed; then two by two."""
    p = case.params
    alone = total(case.asked(4 * p.rule_prompts, tasks.TEMPLATES[name]) for name in tasks.FAME)
    return alone + case.asked(p.rule_prompts, tasks.find_template(p.template, p.task))


OF_SETS = {"schema": records.SET_SCHEMA, "columns": (*EFFECTS, "site_set")}
GRID = Table.whole("grid", grid.kept_pairs, grid_cost)
CIRCUITS = Table("circuits", class_circuits.growing_units, class_circuits.grown, of_sweep, **OF_SETS)
JOINT = Table("joint", joint_units, of_pairs, of_sweep, **OF_SETS)
UNSELECTED = Table("unselected", joint_units, of_pairs, of_sweep, **OF_SETS)
SITES = Table("generality", site_units, of_pairs, of_sweep, columns=EFFECTS)
CONTROLS = Table("controls", controls.units, controls.compute, control_cost, schema=None)
RULE = Table.whole("rule", name_rule_prompts.two_known_people, rule_cost)


def possible_grid(case: Case) -> dict[str, list[Pair]]:
    """By template, the pairs that can be asked there."""
    p, out = case.params, {}
    quads = {pair.quad_id: [len(pair.clean.roles[f"name_{slot}"]) for slot in "ab"] for pair in case.half(1)}
    for name in dict.fromkeys([p.template, *p.templates]):
        template, each = tasks.find_template(name, p.task), p.pairs_per_quad if name == p.template else p.template_pairs
        numbered = [(int(quad[1:]), turn, names) for quad, names in quads.items() for turn in grid.TURNS[0][:each]]
        out[name] = [pair_of(template, quad, turn, HALVES[1], names, 0) for quad, turn, names in numbered]
    return {name: [replace(pair, pair_id=f"{pair.pair_id}@{name}") for pair in own] for name, own in out.items()}


def assumed_grid(case: Case) -> list[Pair]:
    """The pairs of the grid: those of a run, else a share of those that can be asked."""
    p, stored, pairs = case.params, case.stored(GRID), []
    if stored is None:
        for name, own in possible_grid(case).items():
            left = own if name == p.template else own[: round(MOVED * len(own))]
            pairs += subsample(left, p.pairs)
        return pairs
    for row in stored.to_dict("records"):
        names, turn = [row.get(f"n_tokens_{slot}", 3) for slot in "ab"], int(row["pair_id"].split("@")[0][-1])
        template, quad = tasks.find_template(row["template"], p.task), int(row["quad_id"][1:])
        pairs.append(replace(pair_of(template, quad, turn, row["half"], names, 0), pair_id=row["pair_id"]))
    return pairs


def assumed_unselected(case: Case) -> list[Pair]:
    """Step 01's pairs before any selection: those of a run, else as many as it keeps."""
    table = grid.unselected_table(case)
    if table is None:
        return case.prompts()
    template = tasks.find_template(case.params.template, case.params.task)
    return [
        pair_of(template, int(quad[1:]), int(pair[-1]), half, names, 0)
        for pair, quad, half, *names in table[["pair_id", "quad_id", "half", "n_tokens_a", "n_tokens_b"]].to_numpy()
    ]


def assumed_circuits(case: Case, pairs: Sequence[Pair]) -> list[Circuit]:
    """Circuits as `class_circuits.orders` makes them of these pairs: the same beginning, then a site of their own."""
    limit = case.params.slice_limit
    first, sites, out = round(SHARED * limit), order_of(case, limit + 2 * len(SUPERSETS)), []
    for superset in range(len(SUPERSETS)):
        without = [pair.pair_id for pair in pairs if superset not in (pair.answer, pair.corrupt_answer)]
        for kind, own in (("without", without), ("only", [pair.pair_id for pair in pairs if pair.answer == superset])):
            order = [*sites[:first], sites[limit + len(out)], *sites[first : limit - 1]]
            out.append(Circuit(kind, SUPERSETS[superset], tuple(own), tuple(order), 4 + len(out)))
    return out


def assumed_controls(case: Case, ordinary: Sequence[Pair]) -> list[Pair]:
    """Prompts of controls: of the token counts of ordinary prompts, in a run's table after one of those."""
    stored, like, out = case.stored(CONTROLS), ordinary[0], []
    if stored is None:
        some = subsample(ordinary, case.params.control_prompts)
        return [replace(pair, pair_id=f"{pair.pair_id}c{number}") for number in range(4) for pair in some]
    known = {pair.pair_id: pair for pair in ordinary}
    for pair_id in dict.fromkeys(stored["pair_id"]):
        like = known.get(pair_id, like)
        out += [replace(like, pair_id=pair_id)] * (pair_id not in known)
    return out


def assumed(case: Case) -> Iterator[tuple[Any, ...]]:
    """The tables in order."""
    pairs, searched = assumed_grid(case), subsample(case.pairs, case.other("sufficiency").pairs)
    searched, own = case.half(0, searched), [pair for pair in pairs if pair.template == pairs[0].template]
    circuits = assumed_circuits(case, searched)
    yield (GRID,)
    yield CIRCUITS, without_labels(searched), circuits
    yield JOINT, pairs, joint_sets(case.sites, circuits)
    if case.params.pairs_file is None:
        yield UNSELECTED, assumed_unselected(case), [tuple(case.sites)]
    yield SITES, own
    sets = controls.named_sets(case, case.sites)
    ordinary = controls.poolable(own)
    if ordinary:
        yield CONTROLS, sets, ordinary, assumed_controls(case, ordinary)
    yield (RULE,)


STEP = Declaration(
    "generality",
    Generality,
    assumed,
    layered=True,
    tasks=SUPERSET_TASKS,
    reads={"sufficiency": ("critical_slice",)},
    reads_tables=("baselines", "sufficiency"),
    files=("people_file", "data/controls.csv"),
)


def joint_sets(sites: Sequence[Site], circuits: Sequence[Circuit]) -> list[tuple[Site, ...]]:
    """The slice; the circuits that could be picked; each site of the slice. `site_set` counts them from 0."""
    return [tuple(sites), *(circuit.sites for circuit in circuits if circuit.sites), *((site,) for site in sites)]


def picked_circuits(step: Step) -> list[Circuit]:
    """Circuits without each superset, and on it alone, by step 04's single sites; none where there are no such."""
    circuits, table = class_circuits.orders(single_sites(step), step.params.slice_limit), step.pairs()
    used = table["pair_id"].isin({pair for circuit in circuits if circuit.order for pair in circuit.pairs})
    prompts = without_labels(step.prompts(table[used]))  # other words' logits are not read here
    grown = step.table(CIRCUITS, prompts, circuits) if prompts else pd.DataFrame(columns=CIRCUITS.columns)
    return class_circuits.cut(circuits, grown, step.params.slice_share)


class Measured(NamedTuple):
    """What step 07 has measured, and what was chosen from it."""

    grid: pd.DataFrame  # the pairs of the grid
    counts: list[dict[str, Any]]  # for each template, how many could be made, line up, were asked and are left
    mirrored: int  # pairs of the profile's template whose mirror is in the grid
    slice: list[Site]
    circuits: list[Circuit]
    joint: pd.DataFrame  # records of `joint_sets`
    unselected: pd.DataFrame  # records of the slice in pairs before any selection; no rows where there are none
    sites: pd.DataFrame  # records of single sites
    candidates: tuple[str, ...]
    controls: pd.DataFrame  # the prompts of the controls
    changes: pd.DataFrame | None  # the candidates' logits under ablation; None where no mean can be taken
    people: pd.DataFrame  # prompts of two known people


def run(step: Step) -> Measured:
    """Measure, or read what is there."""
    table = step.table(GRID)
    pairs, slice_sites, circuits = step.prompts(table), step.slice(), picked_circuits(step)
    joint = grid.with_mirrors(step.table(JOINT, pairs, joint_sets(slice_sites, circuits)), grid.mirrors(pairs))
    others = grid.unselected(step)
    unselected = joint.head(0) if not others else step.table(UNSELECTED, others, [tuple(slice_sites)])
    own = [pair for pair in pairs if pair.template == pairs[0].template]
    mirror = grid.mirrors(own)
    sites = grid.with_mirrors(step.table(SITES, own), mirror)
    ordinary, changes = controls.poolable(own), None
    prompts, asked = controls.control_prompts(step, ordinary, table)
    if ordinary:
        sets = controls.named_sets(step, slice_sites)
        changes = step.table(CONTROLS, sets, ordinary, asked)
        changes = changes.assign(set=np.array([name for name, _ in sets])[changes["number"]])
    return Measured(
        grid=table,
        counts=step.metadata(GRID)["templates"],
        mirrored=len(mirror),
        slice=slice_sites,
        circuits=circuits,
        joint=joint,
        unselected=grid.with_mirrors(unselected, grid.mirrors(others)),
        sites=sites,
        candidates=pairs[0].candidates,
        controls=prompts,
        changes=changes,
        people=step.table(RULE),
    )
