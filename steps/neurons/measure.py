"""Step 09, measured: every neuron of the slice's MLPs, sets of the leading ones, and features of autoencoders.

1. `NEURONS`: each neuron of the layers replaced alone. `SETS`: the leading ones alone and together, random ones beside.
2. `CLASSES`, `ACTIVATIONS`, `TOKENS`: for whom neurons are active, and what they write, from plain runs.
3. `SAES`: autoencoders trained on the site, or a published one. `READS`: its features on the pairs.
4. `PROMOTED`: the tokens that features promote. `RANKS`, `FEATURES`: features patched alone, then together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from lib import records, sweep
from lib.hooks import Model, Site
from lib.tasks import Pair
from lib.weights import Shape
from pipeline import costs, rates
from pipeline.assumed import Case, few_pairs, of_sweep
from pipeline.costs import Machine, Work, total
from pipeline.declaration import EFFECTS, SUPERSET_TASKS, Declaration, Table
from pipeline.params import Counts, OfSlice, SaeSite, Share
from pipeline.step import Step, StepError
from pipeline.units import Unit, subsample, sweep_units
from steps.neurons import feature_patches, features, neurons, picks
from steps.neurons.coders import Coder
from steps.neurons.picks import NEURON, Set

SET_COLUMNS = (*EFFECTS, *(f"metric_{run}" for run in ("before", "after", "clean", "corrupt")), "site_set")
NEURON_ROW = 51  # bytes of a row of the table of neurons in Parquet


class Neurons(OfSlice):
    """09: every MLP neuron of the slice's layers; features of sparse autoencoders."""

    pairs: int = Field(16, ge=1, description="pairs on which every neuron is swept")
    top_neurons: int = Field(50, ge=1, description="neurons of largest effect, swept on all pairs")
    top_pairs: int | None = Field(None, ge=1, description="pairs on which the top neurons are swept; default all")
    random_sets: int = Field(3, ge=1, description="sets of random neurons replaced beside the top ones")
    cards: int = Field(8, ge=1, description="neurons and features that get a card")
    sae_site: SaeSite | None = Field(
        None,
        description="where features are read: mlp 23 or resid 23; default: the MLP of the slice with most recovery",
    )
    sae_file: str | None = Field(None, description="folder or file of a published SAE, instead of training one")
    sae_features: int = Field(1024, ge=2, description="features of a trained SAE")
    sae_active: int = Field(32, ge=1, description="features that are active at once (k of the top-k)")
    sae_prompts: int = Field(3000, ge=1, description="sentences that activations are harvested from")
    sae_epochs: int = Field(4, ge=1, description="passes over the harvested activations")
    sae_seeds: int = Field(3, ge=2, description="trainings from different seeds, whose features are compared")
    sae_selective: Share = Field(
        0.8, description="area under the curve from which a feature or a neuron counts as selective for a superset"
    )
    budgets: Counts = Field(
        (1, 2, 4, 8, 16, 32), description="numbers of neurons, features and directions patched together"
    )


def layers_of(step: Step | Case) -> list[int]:
    """The layers of the slice."""
    return sorted({site.layer for site in step.slice()})


def in_half(pairs: Sequence[Pair], half: str) -> list[Pair]:
    """The pairs of a half; all, where it has none."""
    return [pair for pair in pairs if pair.half == half] or list(pairs)


def more_pairs(step: Step | Case) -> list[Pair]:
    """The pairs on which the leading neurons, and features, are measured."""
    return subsample(step.prompts(), step.params.top_pairs)


# --- neurons ---


def reader_of(step: Step) -> Callable[[], neurons.Reading]:
    """The reading of the step's model, made when it is first asked for."""
    return step.shared("reading", lambda: cache(lambda: neurons.reading_of(step.model, layers_of(step))))


def neuron_units(step: Step | Case) -> list[Unit]:
    """Every neuron of the layers in every pair, both directions, a pair per work unit."""
    pairs, layers = subsample(step.prompts(), step.params.pairs), layers_of(step)
    each = (sweep_units(way, pairs, size=1, direction=way, layers=layers) for way in sweep.DIRECTIONS)
    return [unit for units in each for unit in units]


def neuron_sweeper(step: Step) -> Callable[[Unit], pd.DataFrame]:
    """What sweeps every neuron."""
    reading = reader_of(step)

    def compute(unit: Unit) -> pd.DataFrame:
        if not step.model.down_projs:
            raise StepError(f"{step.model.name} has mixtures of experts for MLPs: no single neurons, and no step 09")
        lines = step.prove(unit.pairs[0])
        frame = neurons.run(step.model, unit.pairs, reading=reading(), memory=step.memory, **unit.options)
        frame.attrs = {"log": lines, "facts": {"candidates": list(unit.pairs[0].candidates)}}
        return frame

    return compute


def neuron_unit(shape: Shape, pair: Pair, layers: Sequence[int], machine: Machine) -> Work:
    """A unit of `neurons.run`: every neuron of the layers in a pair, one direction."""
    tokens = len(pair.clean.ids)
    passes = -(-shape.n_neurons // costs.limit_of(shape, tokens, tokens - 1, machine.dtype, machine.memory))
    out = costs.plain(shape, 2, tokens) + Work(other={"jobs": 1})
    for layer in layers:
        grown = costs.of_rows(shape, [0] * passes + [layer] * shape.n_neurons, 1, tokens)
        out += costs.vocabulary(shape, 2 * passes) + Work(passes=passes, grown=grown, light=shape.n_neurons)
    return out


def neuron_cost(case: Case, units: Sequence[Unit]) -> Work:
    """The units, and the reading of each layer."""
    layers = layers_of(case)
    each = total(neuron_unit(case.shape, unit.pairs[0], layers, case.machine) for unit in units)
    table = Work(table=round(NEURON_ROW * each.light), other={"readings": len(layers)})
    return each + table


def bare_pairs(step: Step | Case) -> list[Pair]:
    """`more_pairs` without labels: other words' logits are not read here."""
    return [replace(pair, labels=(), label_tokens=()) for pair in more_pairs(step)]


def set_units(step: Step | Case, sets: Sequence[Set]) -> list[Unit]:
    """Sets of sites replaced together: by corrupt values, by means, and by clean values in the corrupt run."""
    pairs, how = bare_pairs(step), {"role": "last", "site_sets": [list(one.sites) for one in sets]}
    units = sweep_units("noise", pairs, direction="noise", ablations=["counterfactual", "mean"], **how)
    return units + sweep_units("denoise", pairs, direction="denoise", **how)


def set_sweeper(step: Step, sets: Sequence[Set]) -> Callable[[Unit], pd.DataFrame]:
    """What replaces them."""
    return step.sweeper(bare_pairs(step))


def plain_units(name: str, named: bool, step: Step | Case, leading: Sequence[tuple[int, int]]) -> list[Unit]:
    """One unit: plain runs of all prompts; the leading neurons are part of what is asked if `named`."""
    asked = {"layers": layers_of(step), "neurons": [list(neuron) for neuron in leading] if named else []}
    return [Unit(name, tuple(more_pairs(step)), asked)]


class Plain(NamedTuple):
    """What the tables from plain runs share: the model is run once for all three."""

    step: Step
    leading: Sequence[tuple[int, int]]  # (layer, number)
    reading: Callable[[], neurons.Reading]
    harvest: Callable[[], neurons.Harvest]

    def classes(self) -> pd.DataFrame:
        pair = more_pairs(self.step)[0]
        tokens = dict(zip(pair.candidates, pair.clean_tokens, strict=True))
        seed, layers = self.step.params.seed, layers_of(self.step)
        return neurons.of_classes(self.step.model, self.harvest(), layers, self.reading(), tokens, seed)

    def activations(self) -> pd.DataFrame:
        return neurons.of_prompts(self.harvest(), self.leading)

    def tokens_written(self) -> pd.DataFrame:
        return neurons.of_tokens(self.step.model, self.harvest(), self.reading(), self.leading)


def plain_of(step: Step, leading: Sequence[tuple[int, int]]) -> Plain:
    """What is read in plain runs."""
    reading = reader_of(step)
    harvest = cache(lambda: neurons.harvest(step.model, more_pairs(step), layers_of(step), reading()))
    return Plain(step, leading, reading, harvest)


def plain_reader(name: str, step: Step, leading: Sequence[tuple[int, int]]) -> Callable[[Unit], pd.DataFrame]:
    """What makes one of these tables."""
    plain = step.shared("plain runs", lambda: plain_of(step, leading))
    return lambda _: getattr(plain, name)()


def class_cost(case: Case, units: Sequence[Unit], leading: Sequence[tuple[int, int]]) -> Work:
    """Plain runs of both prompts of each pair, and an area under a curve for each neuron and class."""
    layers, pairs = len(layers_of(case)), units[0].pairs
    areas = layers * case.shape.n_neurons * 2 * len(pairs)
    runs = costs.plain(case.shape, 2 * len(pairs), len(pairs[0].clean.ids), -(-2 * len(pairs) // 16))
    return runs + Work(table=20 * 10 * layers * case.shape.n_neurons, other={"areas": areas})


def no_cost(case: Case, units: Sequence[Unit], *chosen: Any) -> Work:
    """Next to nothing: read off what an earlier table has computed."""
    return Work()


# --- features ---


def sae_units(step: Step | Case) -> list[Unit]:
    """A unit per seed; one for a published SAE."""
    p = step.params
    facts = {"features": p.sae_features, "active": p.sae_active, "epochs": p.sae_epochs}
    return [Unit(f"seed-{seed}", (), {"seed": seed, **facts}) for seed in range(1 if p.sae_file else p.sae_seeds)]


def sae_trainer(step: Step) -> Callable[[Unit], pd.DataFrame]:
    """What trains or loads an autoencoder."""
    return features.trainer(step, features.site_of(step))


def place_of(case: Case) -> int:
    """Layers up to the one whose features are read."""
    return next((site for site in case.sites if site.component == "mlp"), case.sites[0]).layer + 1


def sae_cost(case: Case, units: Sequence[Unit]) -> Work:
    """Activations harvested, and the steps of the trainings; in the default book a prompt gives 8.6 new tokens."""
    p, shape, place = case.params, case.shape, place_of(case)
    held = case.half(1, more_pairs(case))
    read = costs.plain(shape, p.sae_prompts, 12, p.sae_prompts // 24, place)
    read += costs.plain(shape, 2 * len(held), len(held[0].clean.ids), len(held) // 12, place)
    if p.sae_file:
        return read
    steps = len(units) * p.sae_epochs * 8.6 * p.sae_prompts / features.BATCH
    return read + Work(table=8 * len(units) * p.sae_features * shape.hidden, other={"sae steps": steps})


def read_units(step: Step | Case, coder: Coder | None) -> list[Unit]:
    """Every prompt of the pairs."""
    return sweep_units("read", more_pairs(step), size=16)


def feature_reader(step: Step, coder: Coder) -> Callable[[Unit], pd.DataFrame]:
    """What reads features and neurons, with the gradients of what each does."""
    return feature_patches.reader(step, coder, features.site_of(step))


def read_cost(case: Case, units: Sequence[Unit], coder: None) -> Work:
    """Forward and backward for both prompts of each pair."""
    prompts = 2 * sum(len(unit.pairs) for unit in units)
    width = 2 * case.params.sae_features + 2 * case.shape.n_neurons + case.shape.hidden
    runs = (costs.plain(case.shape, 4 * len(unit.pairs), len(unit.pairs[0].clean.ids), 4) for unit in units)
    return total(runs) + costs.vocabulary(case.shape, prompts) + Work(table=4 * prompts * width)


def promoted_units(step: Step | Case, coder: Coder | None, shown: Sequence[int]) -> list[Unit]:
    """The features whose tokens are read off."""
    return [Unit("promoted", tuple(more_pairs(step)[:1]), {"features": list(shown)})]


def promoter(step: Step, coder: Coder, shown: Sequence[int]) -> Callable[[Unit], pd.DataFrame]:
    """What reads them off."""
    return feature_patches.promoter(step, coder, features.site_of(step))


class Chosen(NamedTuple):
    """What features and neurons are patched with."""

    coder: Coder | None
    directions: np.ndarray  # of the class means
    leading: dict[str, list[int]]  # "features" and "neurons", from the best on


def rank_units(step: Step | Case, chosen: Chosen) -> list[Unit]:
    """Each of the leading ones alone, clean into corrupt, on discovery pairs."""
    pairs = subsample(in_half(more_pairs(step), "discovery"), 2 * step.params.pairs)
    return sweep_units("rank", pairs, direction="denoise", chosen=chosen.leading)


def feature_units(step: Step | Case, chosen: Chosen) -> list[Unit]:
    """The best ones together at every budget, both ways, on confirmation pairs."""
    pairs, how = in_half(more_pairs(step), "confirmation"), {"chosen": chosen.leading, "budgets": step.params.budgets}
    each = (sweep_units(way, pairs, direction=way, draws=2, **how) for way in ("denoise", "noise"))
    return [unit for units in each for unit in units]


def patcher(step: Step, chosen: Chosen) -> Callable[[Unit], pd.DataFrame]:
    """What patches them."""
    return feature_patches.Patcher(step, chosen.coder, features.site_of(step), chosen.directions)


def patch_cost(case: Case, units: Sequence[Unit], chosen: Chosen) -> Work:
    """A row for every variant; random features are drawn in four of seven of those with a budget."""
    site = [[Site(place_of(case) - 1, "mlp")]]
    named = feature_patches.Patcher(None, None, site[0][0], chosen.directions)
    counted = [
        replace(
            unit,
            options={"direction": unit.options["direction"], "site_sets": site, "variants": named.names(unit.options)},
        )
        for unit in units
    ]
    work = case.swept(counted)
    return work + (Work(other={"random features": 4 / 7 * work.rows}) if "budgets" in units[0].options else Work())


NEURONS = Table(
    "neurons",
    neuron_units,
    neuron_sweeper,
    neuron_cost,
    schema=neurons.SCHEMA,
    columns=tuple(name for name in neurons.SCHEMA.columns if name != "logits_after"),
)
SETS = Table("top", set_units, set_sweeper, of_sweep, schema=records.SET_SCHEMA, columns=SET_COLUMNS)
CLASSES = Table(
    "classes",
    partial(plain_units, "classes", False),
    partial(plain_reader, "classes"),
    class_cost,
    neurons.CLASS_SCHEMA,
)
ACTIVATIONS, TOKENS = (
    Table(name, partial(plain_units, name, True), partial(plain_reader, name), no_cost, schema=None)
    for name in ("activations", "tokens_written")
)
SAES = Table("sae", sae_units, sae_trainer, sae_cost, schema=None)
READS = Table("feature_reads", read_units, feature_reader, read_cost, schema=None)
PROMOTED = Table("feature_map", promoted_units, promoter, no_cost, schema=None)
RANKS = Table("feature_ranks", rank_units, patcher, patch_cost, schema=records.VARIANT_SCHEMA)
FEATURES = Table("features", feature_units, patcher, patch_cost, schema=records.VARIANT_SCHEMA)


def assumed(case: Case) -> Iterator[tuple[Any, ...]]:
    """The tables in order; half of the leading neurons help the answer, and all budgets are filled."""
    p, layers = case.params, layers_of(case)
    leading = [(layers[number % len(layers)], number) for number in range(p.top_neurons)]
    sites = [Site(layer, "neuron", number) for layer, number in leading]
    helping = p.top_neurons // 2
    sizes = sorted({n for n in (1, 10, *p.budgets) if n < helping} | {helping})
    sets = [Set("single", 1, (site,)) for site in sites]
    sets += [Set("growing", n, tuple(sites[:n])) for _ in range(2 + p.random_sets) for n in sizes]
    sets += [Set("MLPs", len(layers), tuple(Site(layer, "mlp") for layer in layers))]
    yield (NEURONS,)
    yield SETS, sets
    for table in (CLASSES, ACTIVATIONS, TOKENS):
        yield table, leading
    yield (SAES,)
    yield READS, None
    yield PROMOTED, None, [0]
    best = list(range(2 * max(p.budgets)))
    chosen = Chosen(None, np.zeros((0, 0)), {"features": best, "neurons": best})
    yield RANKS, chosen
    yield FEATURES, chosen


def samples(model: Model, shape: Shape, place: Machine) -> Iterator[tuple[Work, Callable[[], Any]]]:
    """Every neuron of the last layer in a pair, to time a machine with."""
    if model.down_projs:
        last, pair = shape.n_layers - 1, few_pairs()[0]
        how = {"direction": "noise", "layers": [last], "reading": neurons.reading_of(model, [last])}
        work = neuron_unit(shape, pair, [last], place)
        yield work, partial(neurons.run, model, [pair], memory=place.memory, **how)


def timings(hidden: int) -> dict[str, float]:
    """Seconds of a step of an autoencoder's training, at the sizes of the default profile."""
    steps = {
        count: rates.timed(partial(features.train, torch.randn(features.BATCH * count, hidden), 1024, 32, 1, 0), 1)
        for count in (1, 9)
    }
    return {"sae steps": max(0.0, (steps[9] - steps[1]) / 8)}


STEP = Declaration(
    "neurons",
    Neurons,
    assumed,
    tasks=SUPERSET_TASKS,
    reads={"sufficiency": ("critical_slice",)},
    files=("people_file", "controls_file", "sentences_file", "sae_file"),
    samples=samples,
    timings=timings,
)


class Measured(NamedTuple):
    """What step 09 has measured, and what was chosen from it."""

    neurons: pd.DataFrame  # every neuron alone
    top: pd.DataFrame  # `picks.top`
    sets: list[Set]
    joint: pd.DataFrame  # the sets
    classes: pd.DataFrame
    activations: pd.DataFrame
    tokens: pd.DataFrame
    saes: pd.DataFrame
    reads: pd.DataFrame
    shown: list[int]  # features whose tokens are read
    promoted: pd.DataFrame
    features: pd.DataFrame


def run(step: Step) -> Measured:
    """Measure, or read what is there."""
    p, every = step.params, step.table(NEURONS)
    top = picks.top(every, p)
    if top.empty:  # nothing is asked of neurons that do nothing
        return Measured(every, top, [], *[pd.DataFrame()] * 6, [], *[pd.DataFrame()] * 2)
    sets = picks.roster(every, top, p, step.rng("matched neurons"))
    joint = step.table(SETS, sets)
    leading = list(top[NEURON].itertuples(index=False, name=None))
    plain = [step.table(table, leading) for table in (CLASSES, ACTIVATIONS, TOKENS)]
    saes = step.table(SAES)
    coder = features.of_table(step, saes)
    reads = step.table(READS, coder)
    shown = picks.shown_features(reads, p)
    promoted = step.table(PROMOTED, coder, shown)
    chosen = Chosen(coder, picks.class_directions(reads), picks.shortlist(reads, p))
    ranked = picks.ranked(step.table(RANKS, chosen), chosen.leading)
    best = chosen._replace(leading={kind: units[: max(p.budgets)] for kind, units in ranked.items()})
    return Measured(every, top, sets, joint, *plain, saes, reads, shown, promoted, step.table(FEATURES, best))
