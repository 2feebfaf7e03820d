"""Step 08, measured: what can be read off the residual stream, and what its directions do when they are moved along.

1. `probes`: linear probes of every layer, on prompts about pairs and about one person, and the spectra of class means.
2. `directions`: class means of the fitting half, and at one layer bases of what carries the class.
3. `direction_sweeps`: one direction patched after each layer of the slice; `layer_table` and `chosen_layer` say after
   which layer the rest is measured: subspaces patched there, moved to other prompts, and steered along.
4. `interchange`: one name's class from another prompt, to see whether the causal model predicts the answer.
5. `confounds`: what of the class directions is region, century or gender, and what they carry in placebo pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pandas as pd
from pydantic import Field

from lib import effects, stats, tasks
from lib.data import HALVES
from lib.effects import in_halves
from lib.tasks import Pair
from pipeline.assumed import Case, pair_of
from pipeline.declaration import SUPERSET_TASKS, Declaration
from pipeline.params import Counts, Doses, OfSlice, Words
from pipeline.step import Step
from pipeline.units import subsample, without_labels
from steps.subspace import confounds, direction_sweeps, directions, interchange, probes
from steps.subspace.direction_sweeps import LAYERS, PATCHES, STEERING, TRANSFER
from steps.subspace.directions import CLASS_MEANS, DIRECTIONS
from steps.subspace.probes import ACCURACIES, BASELINE_SCORES, SPECTRA

ONE = ("class difference", 1)  # the direction between the two classes of a pair


class Subspace(OfSlice):
    """08: probes, the rank of the map, patching and steering along directions."""

    pairs: int | None = Field(
        None,
        ge=1,
        description="pairs on which directions are patched, and placebo pairs of each attribute; default all",
    )
    probe_people: int = Field(500, ge=1, description="most people that probes ask about with one-name prompts")
    probe_template: str = Field("common_both", description="the pairs' second template, which probes are tried in")
    probe_questions: Words = Field(
        ("profession_is", "What {a} does for a living is"), description="one-name templates; the first one leads"
    )
    probe_folds: int = Field(5, ge=2, description="folds of the probes")
    permutations: int = Field(20, ge=2, description="permutations of the labels in the probes' null")
    ranks: Counts = Field((1, 2, 3, 4, 8, 14), description="ranks of the reduced probes, beside the largest there is")
    dimensions: Counts = Field((1, 2, 3, 4, 8, 16), description="numbers of directions that are patched together")
    random_directions: int = Field(10, ge=2, description="norm-matched random subspaces patched beside each number")
    rotation_steps: int = Field(100, ge=1, description="optimiser steps in which a rotation is learned")
    templates: Words = Field(
        ("profession_both", "both_famous", "common_both"), description="templates that directions are moved between"
    )
    steering_pairs: int = Field(
        40, ge=1, description="prompts that are steered, of each kind: mixed, invented names, things"
    )
    doses: Doses = Field(
        (-2, -1, -0.5, 0, 0.5, 1, 2), description="multiples of class mean - mean of all classes that are added"
    )
    earlier_layers: int = Field(3, ge=0, description="layers before the slice after which classes are interchanged")
    interchange_steps: int = Field(60, ge=1, description="optimiser steps in which a rotation for those is learned")


def assumed(case: Case) -> Iterator[tuple[Any, ...]]:
    """The tables in order; the layer is assumed to be the middle one of the slice, and the pairs to line up in another
    template, too."""
    p, layers = case.params, interchange.slice_layers(case)
    yield ACCURACIES, None
    yield SPECTRA, None
    yield BASELINE_SCORES, None
    fit = pd.DataFrame({"pair_id": [pair.pair_id for pair in case.half(0)]})
    yield CLASS_MEANS, fit, layers
    means, pairs = directions.assumed_means(p, layers), without_labels(subsample(case.prompts(), p.pairs))
    yield LAYERS, direction_sweeps.by_layer(case, pairs, means)
    layer, shown = layers[len(layers) // 2], case.half(1, pairs)
    yield DIRECTIONS, pairs, fit, layer, means
    yield PATCHES, direction_sweeps.by_number(case, shown, layer, directions.assumed_table(p, layer, means))
    others = [replace(x, pair_id=f"{x.pair_id}@{n}", template=n) for n in directions.templates(p)[1:] for x in shown]
    yield TRANSFER, direction_sweeps.transfer(case, [*shown, *others], layer, means)
    yield STEERING, direction_sweeps.steering(case, assumed_prompts(case, shown), layer, means)
    yield interchange.BASES, fit, interchange.layers_of(case)
    for swap in interchange.SWAPS:
        yield swap.table, swap.changes(case, interchange.assumed_cases(shown), None)
    spans = confounds.assumed_spans(case)
    yield confounds.ATTRIBUTE_SPANS, fit, layer, means
    yield confounds.IN_PAIRS, confounds.in_pairs(case, shown, layer, means, spans)
    if case.placebo():
        yield confounds.IN_PLACEBO, confounds.in_placebo(case, layer, means, spans, {})


def assumed_prompts(case: Case, shown: Sequence[Pair]) -> list[Pair]:
    """Prompts to steer: one for each quad, and pairs of invented names and of things, with 2 to 5 tokens each."""
    count, template = (
        case.params.steering_pairs,
        tasks.find_template(case.params.template, case.params.task, question=case.params.question),
    )
    mixed = list({pair.quad_id: pair for pair in shown}.values())[:count]
    tokens = [(2, 2), (2, 3), (3, 3), (3, 4), (4, 4), (4, 5)]
    others = [pair_of(template, n, 0, HALVES[1], tokens[n % len(tokens)]) for n in range(2 * count)]
    every = enumerate([*mixed, *others])
    return without_labels(replace(pair, pair_id=f"steered {n}", half=HALVES[1]) for n, pair in every)


STEP = Declaration(
    "subspace",
    Subspace,
    assumed,
    layered=True,
    tasks=SUPERSET_TASKS,
    placebo=True,
    reads={"sufficiency": ("critical_slice",)},
    files=("people_file", "controls_file"),
    timings=probes.timings,
)


# --- what is chosen ---


def parsed(frame: pd.DataFrame) -> pd.DataFrame:
    """A table of variants with the columns method, k and part of their names, effect and gap (logits)."""
    words = frame["variant"].str.rsplit("|", n=2, expand=True).set_axis(["method", "k", "part"], axis=1)
    return frame.join(words.astype({"k": int})).assign(effect=effects.effect(frame), gap=effects.gap(frame))


def sums(frame: pd.DataFrame, by: Sequence[str] = ("method", "k")) -> tuple[pd.DataFrame, pd.Series]:
    """Per quad, the sum over its pairs of each variant's effect (random: the mean over draws), and of the gap."""
    each = frame.groupby(["quad_id", "pair_id", *by])[["effect", "gap"]].mean()
    total = each.groupby(["quad_id", *by])["effect"].sum().unstack(list(by))
    return total, each["gap"].groupby(["quad_id", "pair_id"]).first().groupby("quad_id").sum()


def ratios(top: pd.DataFrame, bottom: pd.DataFrame | pd.Series, params: Subspace) -> pd.DataFrame:
    """Ratios of sums over quads with intervals: a row per column of `top`. Columns whose denominator is not above the
    model's noise are left out."""
    if isinstance(bottom, pd.Series):
        bottom = pd.DataFrame({name: bottom for name in top}, columns=top.columns)
    kept = bottom.mean().to_numpy() > params.floor
    top, bottom = top.loc[:, kept], bottom.loc[:, kept]
    if not kept.any():
        return pd.DataFrame(columns=[*top.columns.names, "estimate", "low", "high", "quads"])
    spans = stats.ratio_intervals(top.to_numpy(), bottom.to_numpy(), params)
    return top.columns.to_frame(index=False).assign(**effects.columns(spans), quads=len(top))


def replaced(effect: pd.DataFrame, by: Callable[[Any], Any]) -> pd.DataFrame:
    """A frame like `effect` in which each column holds what the column `by` names holds: a denominator."""
    return pd.DataFrame({column: effect[by(column)] for column in effect}, columns=effect.columns)


def whole(_: Any) -> tuple[str, int]:
    """The column of everything patched."""
    return "whole", 0


def with_share(
    effect: pd.DataFrame, gap: pd.Series, params: Subspace, of: Callable[[Any], Any] = whole
) -> pd.DataFrame:
    """Recovery of each column of `effect`, and its `share` of the effect of another column (default: of everything)."""
    by = list(effect.columns.names)
    share = ratios(effect, replaced(effect, of), params).set_index(by)[["estimate", "low", "high"]]
    return ratios(effect, gap, params).join(share.set_axis(["share", "share_low", "share_high"], axis=1), on=by)


def layer_table(scan: pd.DataFrame, layers: Sequence[int], params: Subspace) -> pd.DataFrame:
    """Recovery of each variant after each layer (`layer`) and in all sites of the slice together (layer -1), both
    halves; `share`: of the effect of everything patched there."""
    places, parts = [*layers, -1], []
    for half, own in in_halves(parsed(scan)):
        for number, rows in own.groupby("site_set"):
            parts.append(with_share(*sums(rows), params).assign(layer=places[number], half=half))
    return pd.concat(parts, ignore_index=True)


def chosen_layer(table: pd.DataFrame, params: Subspace) -> int:
    """The first of the slice's layers after which the class difference recovers `slice_share` on the discovery half;
    without one, the layer where it recovers most. (Later ones are nearer to the logits, which any direction that
    favours an answer reaches.)"""
    own = table[(table["half"] == table["half"].iloc[0]) & (table["method"] == ONE[0]) & (table["layer"] >= 0)]
    enough = own[own["estimate"] >= params.slice_share]
    return int(enough["layer"].min() if len(enough) else own.loc[own["estimate"].idxmax(), "layer"])


class Measured(NamedTuple):
    """What step 08 has measured, and what was chosen from it."""

    probe_layers: list[int]  # the slice's, its leading site's first
    dropped: tuple[str, ...]  # classes that probes leave out, and why
    accuracies: pd.DataFrame  # of probes: no rows where there are too few of both kinds of prompts
    spectra: pd.DataFrame
    baselines: pd.DataFrame  # accuracies of probes that do not see the model
    pairs: list[Pair]  # in which directions are patched
    by_layer: pd.DataFrame  # recovery after each layer of the slice
    layer: int  # after which all that follows is measured
    directions: pd.DataFrame
    patches: pd.DataFrame
    transfer: pd.DataFrame
    steering: pd.DataFrame
    kinds: Mapping[str, str]  # of steered prompts, by id
    interchange: Mapping[str, pd.DataFrame]  # records, by where: "name" or "last"
    spans: pd.DataFrame  # of the people's attributes
    beside: pd.DataFrame  # the class difference and its parts in the attributes' span, and other directions
    placebo: pd.DataFrame | None  # directions in placebo pairs, with their `attribute`; kept ones alone


def run(step: Step) -> Measured:
    """Measure, or read what is there."""
    p, layers, (kinds, missing) = step.params, interchange.slice_layers(step), probes.kinds_of(step)
    accuracies = spectra = baselines = pd.DataFrame()
    if kinds:
        readings = probes.readings(step, kinds)
        accuracies, spectra = step.table(ACCURACIES, readings), step.table(SPECTRA, readings)
        baselines = step.table(BASELINE_SCORES, kinds)
    table = step.pairs()
    fit, pairs = directions.halves(step, table)
    means, shown = step.table(CLASS_MEANS, fit, layers), directions.reported(pairs)
    by_layer = layer_table(step.table(LAYERS, direction_sweeps.by_layer(step, pairs, means)), layers, p)
    layer = chosen_layer(by_layer, p)
    found = step.table(DIRECTIONS, pairs, fit, layer, means)
    patches = step.table(PATCHES, direction_sweeps.by_number(step, shown, layer, found))
    others = direction_sweeps.in_other_templates(step, table, shown)
    transfer = step.table(TRANSFER, direction_sweeps.transfer(step, [*shown, *others], layer, means))
    prompts, of_prompts = direction_sweeps.steering_prompts(step, table, pairs)
    steering = step.table(STEERING, direction_sweeps.steering(step, prompts, layer, means))
    quads = table[table["pair_id"].isin([pair.pair_id for pair in shown])]
    swapped = interchange.run(step, fit, quads)
    dropped = (*missing, *(why for one in kinds for why in one.dropped))
    first = probes.slice_layers(step), dropped, accuracies, spectra, baselines
    last = swapped, *confounds.run(step, fit, shown, layer, means)
    return Measured(*first, pairs, by_layer, layer, found, patches, transfer, steering, of_prompts, *last)
