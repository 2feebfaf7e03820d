"""Costs are counted as the steps incur them: operations against PyTorch's own counter, rows against the records."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from professions import TEMPLATES
from torch.utils.flop_counter import FlopCounterMode

from lib import hooks, models, paths, sweep, weights
from lib.data import HALVES
from lib.hooks import Site
from pipeline import assumed, costs
from pipeline.units import Unit
from steps.hydra import measure as hydra
from steps.hydra import splits
from steps.neurons import measure as neurons_measure
from steps.neurons import neurons
from steps.retrieval_heads import routes
from steps.story import attribution, circuits
from steps.story import measure as story

TEMPLATE = TEMPLATES["profession_both"]
PAIRS = [assumed.pair_of(TEMPLATE, q, 0, HALVES[q % 2], [2, 2], 0) for q in range(4)]
LONGER = [assumed.pair_of(TEMPLATE, q, 0, HALVES[q % 2], [3, 4], 0) for q in range(4, 6)]
SLICE = [Site(1, "head", 2), Site(1, "mlp"), Site(2, "head", 0)]
PLACE = costs.Machine(2.0, "float32")


@pytest.fixture(scope="module")
def both(tiny):
    """A small model in fp32 and its shape."""
    model = tiny("llama", "float32")
    return model, weights.shape_of(model.model.config)


def counted(run) -> float:
    """What PyTorch counts, attention included: `math` attention is made of counted products."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def at_names(prompt):
    """A stand-in's prompt that differs from others at its names, which begin at token 3, as those of a template do."""
    return replace(prompt, ids=(1, 2, 3, *prompt.ids[:3], *prompt.ids[6:]))


def agrees(work: costs.Work, run) -> None:
    assert work.operations == pytest.approx(counted(run), rel=0.1)


@pytest.mark.parametrize(("role", "direction"), [("last", "denoise"), ("name_a", "noise"), ("names", "noise")])
def test_sweeps(both, role, direction):
    model, shape = both
    options = {"direction": direction, "role": role, "ablations": ["zero", "counterfactual"]}
    options |= {"site_sets": [[*SLICE], *([site] for site in SLICE)]} if role == "names" else {}
    rows = []
    agrees(costs.sweep_unit(shape, PAIRS, options, PLACE), lambda: rows.append(len(sweep.run(model, PAIRS, **options))))
    assert costs.sweep_unit(shape, PAIRS, options, PLACE).rows == rows[0]


def test_another_architecture(tiny):
    model = tiny("gpt2", "float32")
    work = costs.sweep_unit(weights.shape_of(model.model.config), PAIRS, {"role": "name_b"}, PLACE)
    agrees(work, lambda: sweep.run(model, PAIRS, role="name_b"))


def test_sweeps_with_a_pool(both):
    model, shape = both
    options = {"ablations": ["mean", "resample"], "components": ["head", "mlp"]}
    work = costs.sweep_unit(shape, PAIRS, options, PLACE) + costs.pool(shape, PAIRS)
    agrees(work, lambda: sweep.run(model, PAIRS, **options))


@pytest.mark.parametrize("mlps", paths.MLPS)
@pytest.mark.parametrize("role", ["names", "last"])
def test_paths(both, mlps, role):
    model, shape = both
    sites, route = (routes.heads_of(SLICE), routes.NAMES) if role == "names" else (SLICE, routes.LAST)
    (unit, *_) = routes.paths("x", PAIRS, sites, route, mlps)
    work = costs.path_unit(shape, unit.pairs, unit.options, PLACE)
    agrees(work, lambda: routes.run(model, unit.pairs, **unit.options))


def test_splits_and_neurons(both):
    model, shape = both
    reading = splits.Reading(splits.readout(model), splits.post_norms(model))
    slices = {"slice": SLICE, "other": SLICE[1:]}
    how = {"slices": slices, "ablations": ("zero", "counterfactual"), "reading": reading}
    more = costs.total(costs.plain(shape, len(g), len(g[0].clean.ids)) for g in circuits.grouped(PAIRS))
    work = hydra.split_unit(shape, PAIRS, list(slices.values()), 2, 1) + more
    agrees(work, lambda: splits.run(model, PAIRS, **how))
    own = neurons.reading_of(model, [1, 2])
    each = {"direction": "noise", "layers": [1, 2], "reading": own}
    agrees(neurons_measure.neuron_unit(shape, PAIRS[0], [1, 2], PLACE), lambda: neurons.run(model, PAIRS[:1], **each))


def test_circuits_and_attribution(both):
    model, shape = both
    tests = {"a": (True, ("1.2",)), "b": (True, ("1.2", "mlp 1")), "c": (False, ("2.0", "mlp 0"))}
    tested = [circuits.Circuit(*own) for own in tests.values()]
    agrees(story.circuit_work(shape, PAIRS, tested, PLACE), lambda: circuits.run(model, PAIRS, tests))
    tests |= {"d": (True, ("0.1 at names", "mlp 1 at between", "2.2")), "e": (False, ("mlp 0 at names",))}
    tested, roles = [circuits.Circuit(*own) for own in tests.values()], circuits.EVERYWHERE
    alike = [replace(pair, clean=at_names(pair.clean), corrupt=at_names(pair.corrupt)) for pair in PAIRS]
    work = story.circuit_work(shape, alike, tested, PLACE, roles=roles)
    agrees(work, lambda: circuits.run(model, alike, tests, roles=roles))
    case = SimpleNamespace(shape=shape, n_layers=shape.n_layers, n_heads=shape.n_heads)
    work = story.attribution_cost(case, [Unit("", tuple(group)) for group in circuits.grouped(PAIRS)])
    agrees(work, lambda: attribution.attribute(model, PAIRS))


def test_proofs_and_next_tokens(both):
    model, shape = both
    agrees(costs.proofs(shape, PAIRS[0]), lambda: sweep.prove(model, PAIRS[0]))
    prompts = [pair.clean.ids for pair in PAIRS if len(pair.clean.ids) == 13]
    agrees(costs.next_logits(shape, len(prompts), 13), lambda: models.next_logits(model, prompts))


def test_passes_are_those_of_the_model(both):
    model, shape = both
    options, ran = {"role": "name_a"}, []
    handle = model.body.register_forward_hook(lambda *_: ran.append(1))
    try:
        sweep.run(model, [*PAIRS, *LONGER], **options)
    finally:
        handle.remove()
    assert costs.sweep_unit(shape, [*PAIRS, *LONGER], options, PLACE).passes == len(ran)


def test_work_adds_up():
    one = costs.Work(passes=1, plain=2.0, other={"jobs": 1})
    three = one + one.times(2)
    assert (three.passes, three.plain, three.other) == (3, 6.0, {"jobs": 3})
    assert costs.total([]) == costs.Work()


def test_stand_ins_have_the_roles_of_real_pairs(two_pairs):
    made = assumed.pair_of(TEMPLATE, 0, 0, "discovery", [len(two_pairs[0].clean.roles[f"name_{s}"]) for s in "ab"])
    assert made.clean.roles == two_pairs[0].clean.roles
    assert len(made.clean.ids) == len(two_pairs[0].clean.ids)
    quad = [assumed.pair_of(TEMPLATE, 3, n, "confirmation", [2, 2]) for n in range(4)]
    assert quad[2].clean.ids == quad[0].corrupt.ids and quad[2].answer == quad[0].corrupt_answer
    assert len({side.ids for pair in quad for side in (pair.clean, pair.corrupt)}) == 4
    assert np.ptp([len(pair.clean.ids) for pair in quad]) == 0 and hooks.COMPONENTS
