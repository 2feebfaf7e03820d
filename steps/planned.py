"""The tables of every step with their work, counted from a profile's parameters.

`TABLES` has a function for each step. It goes through the step as its notebook does and yields the name and the work of
each table, by the functions that plan the step's units themselves, on stand-ins (`pipeline.assumed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from lib import batches, tasks
from lib.hooks import Site
from lib.tasks import SUPERSETS, Pair
from pipeline import costs
from pipeline.assumed import (  # fmt: skip
    Case,
    tokens_of,
)
from pipeline.costs import Work, plain
from pipeline.units import sweep_units


def subspace(case: Case) -> Iterator[tuple[str, Work]]:
    """08: probes of every layer; directions fitted, patched, moved and added."""
    p, shape, layers = case.params, case.shape, case.slice_layers
    tokens, one = len(case.pairs[0].clean.ids), tokens_of(tasks.TEMPLATES["profession_is"], [3])[0]
    couples = len(case.pairs)
    read = plain(shape, 2 * couples, tokens, 2 * -(-couples // 16))
    read += plain(shape, 2 * p.probe_people, one, 2 * -(-p.probe_people // 16))
    fits = len(case.layers) * 2 * (p.probe_folds + 2)
    rows = len(case.layers) * (p.permutations + 1) * 700
    yield "probes", read + Work(table=2 * rows, other={"pair probes": fits, "people probes": fits})
    yield "spectra", Work(table=20000 * len(layers), other={"spectra": len(layers)})
    fit = case.half(0)
    templates = [*dict.fromkeys([p.template, *p.templates]), "profession_is"]
    means = plain(shape, 2 * len(fit), tokens, -(-2 * len(fit) // 32)).times(len(templates) - 1)
    yield (
        "class_means",
        means
        + plain(shape, 2 * len(fit), one, -(-len(fit) // 16))
        + Work(table=7 * shape.hidden * 5 * len(layers) * len(templates)),
    )
    patched = [replace(pair, labels=(), label_tokens=()) for pair in subsampled(case, p.pairs)]
    count = 1 + 1 + 3 + 1  # one direction, all of them, random ones, everything
    how = {"direction": "denoise", "variants": range(count)}
    sets = [*([Site(layer, "resid")] for layer in layers), case.sites]
    yield "direction_layers", case.swept(sweep_units("direction_layers", patched, site_sets=sets, **how))
    late, shown = layers[len(layers) // 2], case.half(1, patched)
    steps = 2 * p.rotation_steps
    rows = 32 * (shape.n_layers - late)
    learned = Work(passes=2 * steps, grown=2.0 * steps * costs.block(shape, rows, tokens), other={"rotations": steps})
    yield "directions", plain(shape, 4 * len(shown), tokens, 8) + learned + Work(table=4 * shape.hidden * 220)
    variants = 2 + len(SUPERSETS) + 4 * len(p.dimensions) + 8 + p.random_directions * len(p.dimensions)
    best = [[Site(late, "resid")]]
    how = {"site_sets": best, "direction": "denoise"}
    yield "direction_patches", case.swept(sweep_units("patches", shown, variants=range(variants), **how))
    every = shown + [
        replace(x, pair_id=x.pair_id + name) for name in p.templates[1:] for x in shown[: len(shown) * 3 // 4]
    ]
    yield "direction_transfer", case.swept(sweep_units("moved", every, variants=range(15), **how))
    steered = [replace(x, pair_id=f"{x.pair_id}s{n}") for n in range(3) for x in (case.half(1) * 3)[: p.steering_pairs]]
    steered = [replace(pair, labels=(), label_tokens=()) for pair in steered]
    doses = range((len(SUPERSETS) + 3) * len(p.doses))
    yield "steering", case.swept(sweep_units("steering", steered, variants=doses, site_sets=best, direction="noise"))


def subsampled(case: Case, count: int | None, pairs: Sequence[Pair] | None = None) -> list[Pair]:
    return batches.subsample(case.pairs if pairs is None else pairs, count)


TABLES: dict[str, Callable[[Case], Iterator[tuple[str, Work]]]] = {
    "subspace": subspace,
}
