"""Step 07, measured: is the slice general? The dense grid, circuits picked class by class, controls, the rule.

1. `GRID`: pairs of confirmation quads, in the profile's template and in others (`grid`).
2. `CIRCUITS`: growing sets of circuits that are picked on part of the discovery pairs (`class_circuits`).
3. `JOINT`: the slice, those circuits, random sites and each site of the slice replaced in every pair of the grid, both
   ways; `UNSELECTED`: the slice, clean into corrupt, in step 01's pairs before any selection.
4. `NEEDED`: the slice and the circuits ablated class-neutrally, beside all that such an ablation can take away. (With
   counterfactual values, damage is recovery in mirror pairs, and says nothing of its own.)
5. `PLACEBO`: the same sets in pairs of one superset whose names differ in another attribute (`placebo`).
6. `SITES`: every head and MLP alone, in the pairs of the profile's template.
7. `CONTROLS`: the slice ablated in prompts in which it should find nothing (`controls`).
8. `RULE`: prompts of two known people (`name_rule_prompts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from lib import records, tasks
from lib.batches import NEUTRAL
from lib.data import HALVES
from lib.hooks import Site
from lib.tasks import Pair
from pipeline.assumed import MOVED, Case, of_sweep, order_of, pair_of
from pipeline.costs import Work, total
from pipeline.declaration import EFFECTS, SUPERSET_TASKS, Declaration, Table
from pipeline.params import OfSlice, Share, Words
from pipeline.population import PER_QUAD
from pipeline.step import Step, single_sites
from pipeline.units import Unit, subsample, sweep_units, without_labels
from steps.generality import class_circuits, controls, grid, name_rule_prompts, placebo
from steps.generality.class_circuits import Circuit

WHOLE = -1  # the `site_set` of the whole final residual stream: all that an ablation can take away
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
    random_sets: int = Field(5, ge=1, description="sets of random sites of each kind beside the slice")
    silence_margin: Share = Field(
        0.2, description="a control is silent if no candidate moves by this share of the ordinary effect"
    )
    general_floor: Share = Field(0.5, description="what joint recovery and damage must exceed in every class")
    placebo_pairs: int | None = Field(
        None, ge=1, description="placebo pairs of each attribute and template; default all"
    )
    specific_ratio: float = Field(
        0.5,
        gt=0,
        le=1,
        description="specific: share of the placebo gap over share of the superset gap surely below this",
    )


def joint_units(step: Step | Case, pairs: Sequence[Pair], sets: Sequence[Sequence[Site]]) -> list[Unit]:
    """Sets of sites in every pair of the grid."""
    return grid.mirrored_units(pairs, site_sets=sets)


def unselected_units(step: Step | Case, pairs: Sequence[Pair], sets: Sequence[Sequence[Site]]) -> list[Unit]:
    """Sets of sites, clean into corrupt."""
    return sweep_units("denoise", without_labels(pairs), direction="denoise", role="last", site_sets=list(sets))


def needed_units(step: Step | Case, pairs: Sequence[Pair], sets: Sequence[Sequence[Site]]) -> list[Unit]:
    """Sets of sites and, last, the whole final residual stream, ablated class-neutrally in the pairs with donors."""
    every = [*sets, (Site(step.n_layers - 1, "resid"),)]
    return sweep_units("needed", without_labels(pairs), role="last", ablations=list(NEUTRAL), site_sets=every)


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
        out += case.asked(len(prompts), tasks.find_template(name, case.params.task, question=case.params.question))
        out += Work(other={"tokenised": 3 * len(pairs)})
    return out


def needed_cost(case: Case, units: Sequence[Unit], pairs: Sequence[Pair], sets: Any) -> Work:
    """A sweep with resamples and means of the grid's own prompts."""
    return case.swept(units, pairs)


def control_cost(case: Case, units: Sequence[Unit], sets: Any, ordinary: Sequence[Pair], others: Any) -> Work:
    """A sweep with means over ordinary prompts; names are drawn from lists of two thousand."""
    return case.swept(units, ordinary) + Work(other={"tokenised": 2000})


def rule_cost(case: Case, units: Sequence[Unit]) -> Work:
    """Twice as many people as are needed asked about alone, but for those whom step 01 has asked; then two by two."""
    p = case.params
    before = 0 if p.pairs_file else PER_QUAD * case.other("baselines").quads_per_half * len(p.topic.supersets)
    people = max(4 * p.rule_prompts - before, 0)
    alone = total(case.asked(people, p.topic.find(name)) for name in p.topic.fame)
    return alone + case.asked(p.rule_prompts, tasks.find_template(p.template, p.task, question=p.question))


OF_SETS = {"schema": records.SET_SCHEMA, "columns": (*EFFECTS, "site_set")}
GRID = Table.whole("grid", grid.kept_pairs, grid_cost)
CIRCUITS = Table("circuits", class_circuits.growing_units, class_circuits.grown, of_sweep, **OF_SETS)
JOINT = Table("joint", joint_units, of_pairs, of_sweep, **OF_SETS)
UNSELECTED = Table("unselected", unselected_units, of_pairs, of_sweep, **OF_SETS)
NEEDED = Table("needed", needed_units, of_pairs, needed_cost, **OF_SETS)
PLACEBO = Table("placebo", placebo.units, placebo.compute, of_sweep, **OF_SETS)
SITES = Table("generality", site_units, of_pairs, of_sweep, columns=EFFECTS)
CONTROLS = Table("controls", controls.units, controls.compute, control_cost, schema=None)
RULE = Table.whole("rule", name_rule_prompts.two_known_people, rule_cost)


def possible_grid(case: Case) -> dict[str, list[Pair]]:
    """By template, the pairs that can be asked there."""
    p, out = case.params, {}
    quads = {pair.quad_id: [len(pair.clean.roles[f"name_{slot}"]) for slot in "ab"] for pair in case.half(1)}
    for name in dict.fromkeys([p.template, *p.templates]):
        template, each = (
            tasks.find_template(name, p.task, question=p.question),
            p.pairs_per_quad if name == p.template else p.template_pairs,
        )
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
    quads, topic = {quad: number for number, quad in enumerate(dict.fromkeys(stored["quad_id"]))}, p.topic
    for row in stored.to_dict("records"):
        names, last = [row.get(f"n_tokens_{slot}", 3) for slot in "ab"], row["pair_id"].split("@")[0][-1]
        template, turn = topic.find(row["template"], p.task), int(last) if last.isdecimal() else 0
        made = pair_of(template, quads[row["quad_id"]], turn, row["half"], names, 0)
        pairs.append(replace(made, pair_id=row["pair_id"]))
    return pairs


def assumed_unselected(case: Case) -> list[Pair]:
    """Step 01's pairs before any selection: those of a run, else as many as it keeps."""
    table = grid.of_step_01(case, "unselected")
    if table is None:
        return case.prompts()
    template = tasks.find_template(case.params.template, case.params.task, question=case.params.question)
    return [
        pair_of(template, int(quad[1:]), int(pair[-1]), half, names, 0)
        for pair, quad, half, *names in table[["pair_id", "quad_id", "half", "n_tokens_a", "n_tokens_b"]].to_numpy()
    ]


def assumed_circuits(case: Case, pairs: Sequence[Pair]) -> list[Circuit]:
    """Circuits as `class_circuits.orders` makes them of these pairs: the same beginning, then a site of their own."""
    limit = case.params.slice_limit
    supersets = case.params.topic.supersets
    first, sites, out = round(SHARED * limit), order_of(case, limit + 2 * len(supersets)), []
    for superset in range(len(supersets)):
        without = [pair.pair_id for pair in pairs if superset not in (pair.answer, pair.corrupt_answer)]
        for kind, own in (("without", without), ("only", [pair.pair_id for pair in pairs if pair.answer == superset])):
            order = [*sites[:first], sites[limit + len(out)], *sites[first : limit - 1]]
            out.append(Circuit(kind, supersets[superset], tuple(own), tuple(order), 4 + len(out)))
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
    sets, random = picked_sets(case.sites, circuits), drawn(controls.random_sets(case, case.sites))
    yield (GRID,)
    yield CIRCUITS, without_labels(searched), circuits
    yield JOINT, pairs, [*sets, *random, *alone(case.sites)]
    if case.params.pairs_file is None:
        yield UNSELECTED, assumed_unselected(case), [tuple(case.sites)]
    if needed_units(case, pairs, sets):
        yield NEEDED, pairs, sets
    if case.placebo():
        yield PLACEBO, placebo.pairs_of(case), [*sets, *random]
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
    placebo=True,
    page_keys=("silence_margin", "general_floor", "specific_ratio"),
    reads={"sufficiency": ("critical_slice",)},
    reads_tables=("baselines", "sufficiency"),
    files=("people_file", "controls_file"),
)


def picked_sets(sites: Sequence[Site], circuits: Sequence[Circuit]) -> list[tuple[Site, ...]]:
    """The slice and the circuits that could be picked. The grid's `site_set` counts them from 0, random sets behind
    them, and behind those each site of the slice."""
    return [tuple(sites), *(circuit.sites for circuit in circuits if circuit.sites)]


def drawn(random: Mapping[str, Sequence[tuple[Site, ...]]]) -> list[tuple[Site, ...]]:
    """Random sets of every kind, one after the other."""
    return [own for sets in random.values() for own in sets]


def alone(sites: Sequence[Site]) -> list[tuple[Site, ...]]:
    """Each site, a set of its own."""
    return [(site,) for site in sites]


def picked_circuits(step: Step) -> list[Circuit]:
    """Circuits without each superset, and on it alone, by step 04's single sites; none where there are no such."""
    circuits, table = (
        class_circuits.orders(
            single_sites(step), step.params.slice_limit, step.params.topic.supersets, step.params.floor
        ),
        step.pairs(),
    )
    used = table["pair_id"].isin({pair for circuit in circuits if circuit.order for pair in circuit.pairs})
    prompts = without_labels(step.prompts(table[used]))  # other words' logits are not read here
    grown = step.table(CIRCUITS, prompts, circuits) if prompts else pd.DataFrame(columns=CIRCUITS.columns)
    return class_circuits.cut(circuits, grown, step.params.slice_share)


class Measured(NamedTuple):
    """What step 07 has measured, and what was chosen from it."""

    grid: pd.DataFrame  # the pairs of the grid
    counts: list[dict[str, Any]]  # for each template, how many could be made, line up, were asked and are left
    slice: list[Site]
    circuits: list[Circuit]
    random: Mapping[str, int]  # random sets, by what is in them (`placebo.RANDOM`)
    joint: pd.DataFrame  # records of `JOINT`, and those of `NEEDED` under the ablation that judges
    judge: str | None  # the class-neutral ablation that judges damage; None where no pair has donors
    unselected: pd.DataFrame  # records of the slice in pairs before any selection; no rows where there are none
    placebo: pd.DataFrame  # records in placebo pairs (`placebo.of_quads`); no rows where there are none
    sites: pd.DataFrame  # records of single sites
    candidates: tuple[str, ...]
    controls: pd.DataFrame  # the prompts of the controls
    changes: pd.DataFrame | None  # the candidates' logits under ablation; None where no mean can be taken
    people: pd.DataFrame  # prompts of two known people


def run(step: Step) -> Measured:
    """Measure, or read what is there."""
    table = step.table(GRID)
    pairs, slice_sites, circuits = step.prompts(table), step.slice(), picked_circuits(step)
    sets, random = picked_sets(slice_sites, circuits), controls.random_sets(step, slice_sites)
    joint = step.table(JOINT, pairs, [*sets, *drawn(random), *alone(slice_sites)])
    joint = grid.with_mirrors(joint, grid.mirrors(pairs))
    others = grid.unselected(step)
    unselected = joint.head(0) if not others else step.table(UNSELECTED, others, [tuple(slice_sites)])
    needed, judge = neutral(step, pairs, sets)
    tried = placebo.pairs_of(step)
    there = step.table(PLACEBO, tried, [*sets, *drawn(random)]) if tried else joint.head(0)
    own = [pair for pair in pairs if pair.template == pairs[0].template]
    sites = grid.with_mirrors(step.table(SITES, own), grid.mirrors(own))
    prompts, changes = ablated_controls(step, own, table, slice_sites)
    return Measured(
        grid=table,
        counts=step.metadata(GRID)["templates"],
        slice=slice_sites,
        circuits=circuits,
        random={name: len(own) for name, own in random.items()},
        joint=joint if needed is None else pd.concat([joint, needed], ignore_index=True),
        judge=judge,
        unselected=unselected,
        placebo=placebo.of_quads(there, step.placebo_pairs(), step.record["model"]["noise"]) if tried else there,
        sites=sites,
        candidates=pairs[0].candidates,
        controls=prompts,
        changes=changes,
        people=step.table(RULE),
    )


def neutral(
    step: Step, pairs: Sequence[Pair], sets: Sequence[Sequence[Site]]
) -> tuple[pd.DataFrame, str] | tuple[None, None]:
    """The records of `NEEDED` under the ablation that judges, the first class-neutral one that any pair has donors for,
    and which one that is; the whole final residual stream is the set `WHOLE`. None where no pair has donors."""
    if not needed_units(step, pairs, sets):
        return None, None
    table = step.table(NEEDED, pairs, sets)
    judge = next(kind for kind in NEUTRAL if kind in set(table["ablation"]))
    own = table[table["ablation"] == judge]
    return own.assign(site_set=own["site_set"].where(own["site_set"] < len(sets), WHOLE)), judge


def ablated_controls(
    step: Step, own: Sequence[Pair], table: pd.DataFrame, sites: Sequence[Site]
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """The controls' prompts, and the candidates' logits under ablation; None where no mean can be taken."""
    ordinary = controls.poolable(own)
    prompts, asked = controls.control_prompts(step, ordinary, table)
    if not ordinary:
        return prompts, None
    sets = controls.named_sets(step, sites)
    changes = step.table(CONTROLS, sets, ordinary, asked)
    return prompts, changes.assign(set=np.array([name for name, _ in sets])[changes["number"]])
