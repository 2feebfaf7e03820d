"""The tables of every step with their work, counted from a profile's parameters.

`TABLES` has a function for each step. It goes through the step as its notebook does and yields the name and the work of
each table, by the functions that plan the step's units themselves, on stand-ins (`pipeline.assumed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from lib import batches, sweep, tasks
from lib.data import HALVES
from lib.tasks import Pair
from pipeline.assumed import (  # fmt: skip
    CIRCUITS,
    MOVED,
    Case,
    order_of,
    pair_of,
)
from pipeline.costs import Work
from pipeline.units import sweep_units


def generality(case: Case) -> Iterator[tuple[str, Work]]:
    """07: the grid, circuits class by class, controls, the rule."""
    p = case.params
    own = tasks.find_template(p.template, p.task)
    quads = {x.quad_id: [len(x.clean.roles[f"name_{s}"]) for s in "ab"] for x in case.half(1)}
    grid, checked = [], Work()
    for name in dict.fromkeys([p.template, *p.templates]):
        template = tasks.find_template(name, p.task)
        each = p.pairs_per_quad if name == p.template else p.template_pairs
        turn = [n for n in (0, 2, 1, 3)][:each]
        made = [pair_of(template, int(q[1:]), n, HALVES[1], t, 0) for q, t in quads.items() for n in turn]
        checked += case.asked(len({s.ids for pair in made for s in (pair.clean, pair.corrupt)}), template)
        left = made if name == p.template else made[: round(MOVED * len(made))]
        grid += [replace(pair, pair_id=f"{pair.pair_id}@{name}") for pair in batches.subsample(left, p.pairs)]
    yield "grid", checked + Work(other={"tokenised": 3 * len(grid)})
    searched = case.half(0, subsampled(case, case.other("sufficiency").pairs))
    searched = [replace(pair, labels=(), label_tokens=()) for pair in searched]
    order, sets = order_of(case, p.slice_limit), round(CIRCUITS * p.slice_limit)
    growing = [order[: 1 + count % len(order)] for count in range(sets)]
    classes: dict[tuple[int, ...], list[Pair]] = {}
    for pair in searched:
        classes.setdefault(tuple(sorted((pair.answer, pair.corrupt_answer))), []).append(pair)
    plan = [
        unit
        for pairs in classes.values()
        for way in sweep.DIRECTIONS
        for unit in sweep_units(way, pairs, direction=way, site_sets=growing)
    ]
    yield "circuits", case.swept(plan)
    joint = [case.sites, *(order[: 4 + count] for count in range(10)), *([site] for site in case.sites)]
    yield "joint", case.swept(sweep_units("noise", grid, direction="noise", site_sets=joint))
    leading = [pair for pair in grid if pair.template == own.name]
    how = {"components": ["head", "mlp"], "layers": case.layers}
    yield "generality", case.swept(sweep_units("noise", leading, direction="noise", **how))
    controls = [replace(pair, pair_id=f"{pair.pair_id}c{n}") for n in range(4) for pair in leading[: p.control_prompts]]
    heads = [site for site in case.sites if site.component == "head"]
    sets = [case.sites, heads, *[heads] * p.random_sets]
    plan = sweep_units("controls", [*leading, *controls], direction="noise", ablations=["mean", "zero"], site_sets=sets)
    yield "controls", case.swept(plan, leading) + Work(other={"tokenised": 2000})
    yield "rule", case.asked(4 * p.rule_prompts, tasks.TEMPLATES["profession_is"]) + case.asked(p.rule_prompts, own)


def subsampled(case: Case, count: int | None, pairs: Sequence[Pair] | None = None) -> list[Pair]:
    return batches.subsample(case.pairs if pairs is None else pairs, count)


TABLES: dict[str, Callable[[Case], Iterator[tuple[str, Work]]]] = {
    "generality": generality,
}
