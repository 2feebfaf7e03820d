"""Single MLP neurons: every one replaced at `last`, what it writes, and for whom it is active.

1. `run` replaces each neuron of the layers by its value in the other run of the pair, in growing passes of a layer
   each, and scores the candidates alone: the whole vocabulary would cost as much as the passes. The neuron's *direct
   effect* is what the change writes, through the norms at the scale of the plain run, onto answer minus corrupt answer.
2. `harvest` keeps every neuron's activation at `last` in plain runs of all prompts, and each layer's mean scale.
3. `of_classes` asks how well an activation tells each superset from the others (area under the ROC curve, Mann and
   Whitney 1947), and what the neuron writes on the superset's logit; `of_tokens` what it writes on all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pandera.pandas as pa_schema
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from lib import records, sweep
from lib.batches import token_ids
from lib.data import HALVES
from lib.hooks import Model, Site, materialised
from lib.metrics import margins
from lib.readout import FixedNorm, Readout, post_norms, readout
from lib.single_pass import BaseRun, Row, base_run, grow, prove_base_rows, prove_rows, row_limit
from lib.tasks import Pair
from pipeline.step import Step
from pipeline.units import Unit, sweep_units

TOKENS = 10  # tokens at either end of a neuron's list
NEEDS = ("neuron", "mlp", "resid")
WORDS = ["profile", "task", "template", "pair_id", "quad_id", "half", "direction", "ablation", "position", "site_set"]
LOGITS = [f"{value}_{when}" for value in ("logit_diff", "metric") for when in ("before", "after", "clean", "corrupt")]
COLUMNS = ["layer", "component", "head", *WORDS, *LOGITS]  # what is read of the table of site sets

_number = pa_schema.Column("float32", pa_schema.Check(np.isfinite, name="finite"))
_text = pa_schema.Column(str)
_half = pa_schema.Column(str, pa_schema.Check.isin(HALVES))
_neuron = {name: pa_schema.Column("int32", pa_schema.Check.ge(0)) for name in ("layer", "head")}
# One row per pair x direction x neuron (`head` is its number), in the words of `lib.records`, all numbers in fp32.
# `activation`: in the plain run; `change`: source less that; `direct`: the direct effect on logit_diff, before any soft
# cap; `written`: L2 norm of what the change adds to the MLP's output.
SCHEMA = pa_schema.DataFrameSchema(
    _neuron
    | dict.fromkeys(("pair_id", "quad_id"), _text)
    | {"half": _half, "direction": pa_schema.Column(str, pa_schema.Check.isin(["noise", "denoise"]))}
    | {f"{value}_{when}": _number for value in ("logit_diff", "metric") for when in ("before", "after")}
    | dict.fromkeys(("logit_diff_clean", "logit_diff_corrupt", "activation", "change", "direct", "written"), _number)
    | {"logits_after": pa_schema.Column(object), "site_delta": _number}
    | {"fired": pa_schema.Column("int32", pa_schema.Check.equal_to(1))},
    strict=True,
    ordered=True,
    unique=["pair_id", "direction", "layer", "head"],
    name="table of neurons",
)
# One row per neuron, half and superset. `auc`: of quads' mean activations, the superset's against the others'
# (`n`, `n_others` quads); `auc_swapped`: the two labels of each quad exchanged at random; `mean`, `mean_others`: of the
# activation; `weight`: logits that one unit of activation writes on the superset, above the mean of the vocabulary.
CLASS_SCHEMA = pa_schema.DataFrameSchema(
    _neuron
    | {"half": _half, "superset": _text}
    | dict.fromkeys(("n", "n_others"), pa_schema.Column("int32", pa_schema.Check.ge(1)))
    | dict.fromkeys(("auc", "auc_swapped", "mean", "mean_others", "weight"), _number),
    strict=True,
    ordered=True,
    unique=["half", "superset", "layer", "head"],
    name="table of neurons and supersets",
)


class Output(NamedTuple):
    """What one layer's neurons write, per unit of activation."""

    size: Float[Tensor, " neurons"]  # L2 norm of the neuron's column of the down projection
    spoken: Float[Tensor, "neurons hidden"]  # that column as it reaches the unembedding, but for the norms' scales
    post: FixedNorm | None  # of the MLP's output, where the architecture has one


@dataclass(frozen=True)
class Reading:
    """The outputs of the layers, and the readout behind them."""

    out: Readout
    outputs: Mapping[int, Output]

    def rate(self, runs: BaseRun, layer: int) -> Float[Tensor, " prompts"]:
        """One over the norms' scales in plain runs, for what is written at `layer`."""
        final = max(at for component, at in runs.activations if component == "resid")
        scale = self.out.scale(runs.activations["resid", final][:, -1])
        post = self.outputs[layer].post
        return 1 / (scale if post is None else scale * post.scale(runs.activations["mlp", layer][:, -1]))


@torch.no_grad()
def reading_of(model: Model, layers: Sequence[int]) -> Reading:
    """The layers' outputs. The down projection itself is run on single units, so that its kind does not matter."""
    out, outputs, posts = readout(model), {}, post_norms(model)
    for layer in layers:
        down, post = model.down_projs[layer], posts[layer].mlp
        units = torch.eye(model.n_neurons, dtype=model.dtype, device=model.device)
        columns = (down(units) - down(torch.zeros_like(units[:1]))).cpu().double()
        passed = columns if post is None else post.gain * post.centred(columns)
        outputs[layer] = Output(columns.norm(dim=1), (out.norm.gain * out.norm.centred(passed)).float(), post)
    return Reading(out, outputs)


def reader(step: Step, layers: Sequence[int]) -> Callable[[], Reading]:
    """The reading of the step's model, made when it is first asked for."""
    return cache(lambda: reading_of(step.model, layers))


def swept(step: Step, pairs: Sequence[Pair], layers: Sequence[int], reading: Callable[[], Reading]) -> pd.DataFrame:
    """The step's table of neurons: every one of the layers in every pair, both directions, a pair per work unit."""
    plan = [
        unit
        for direction in sweep.DIRECTIONS
        for unit in sweep_units(direction, pairs, size=1, direction=direction, layers=list(layers))
    ]
    columns = [name for name in SCHEMA.columns if name != "logits_after"]
    return step.table("neurons", plan, sweeper(step, reading), schema=SCHEMA, columns=columns)


def replaced(step: Step, pairs: Sequence[Pair], sets: Sequence[Sequence[Site]]) -> pd.DataFrame:
    """The step's table of site sets, each replaced in every pair: corrupt value, mean, and clean value (denoise)."""
    pairs = [replace(pair, labels=(), label_tokens=()) for pair in pairs]  # other words' logits are not read here
    how = {"role": "last", "site_sets": [list(sites) for sites in sets]}
    plan = sweep_units("noise", pairs, direction="noise", ablations=["counterfactual", "mean"], **how)
    plan += sweep_units("denoise", pairs, direction="denoise", **how)
    return step.table("top", plan, step.sweeper(pairs), schema=records.SET_SCHEMA, columns=COLUMNS)


def sweeper(step: Step, reading: Callable[[], Reading]) -> Callable[[Unit], pd.DataFrame]:
    """What `Step.table` computes units of every neuron with; the first of a sitting makes the step's proofs as well."""
    proofs: list[str] = []

    def compute(unit: Unit) -> pd.DataFrame:
        own = [] if proofs else sweep.prove(step.model, unit.pairs[0])
        proofs.extend(own)
        frame = run(step.model, unit.pairs, reading=reading(), memory=step.memory, **unit.options)
        frame.attrs = {"log": own, "facts": {"candidates": list(unit.pairs[0].candidates)}}
        return frame

    return compute


def candidate_logits(model: Model, hidden: Float[Tensor, "rows hidden"], tokens: Sequence[int]) -> np.ndarray:
    """fp32 logits of some tokens alone, (rows, tokens)."""
    weight, bias = materialised(model.unembed), getattr(model.unembed, "bias", None)
    own = SimpleNamespace(weight=weight[list(tokens)], bias=None if bias is None else bias[list(tokens)])
    return replace(model, unembed=own).logits(hidden).cpu().numpy()


def run(
    model: Model, pairs: Sequence[Pair], *, direction: str, layers: Sequence[int], reading: Reading, memory: float = 2.0
) -> pd.DataFrame:
    """Every neuron of the layers replaced alone at `last`, by its value in the other run of the pair (`SCHEMA`).

    Under `noise` the clean run is edited, under `denoise` the corrupt one. SweepError when a row does not prove itself.
    """
    return pd.concat([of_pair(model, pair, direction, layers, reading, memory) for pair in pairs], ignore_index=True)


@torch.no_grad()
def of_pair(
    model: Model, pair: Pair, direction: str, layers: Sequence[int], reading: Reading, memory: float
) -> pd.DataFrame:
    """`run` for one pair."""
    ids = token_ids(model, [pair.clean.ids, pair.corrupt.ids])
    plain = base_run(model, ids, pair.clean.roles["last"], NEEDS)
    clean, corrupt = plain.part(0, 1), plain.part(1, 2)
    noise = direction == "noise"
    base, other, tokens = (clean, corrupt, pair.clean_tokens) if noise else (corrupt, clean, pair.corrupt_tokens)
    limit, columns = row_limit(model, base, memory), []

    def numbers(hidden: Tensor, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Candidate logits, logit_diff and margin."""
        logits = candidate_logits(model, hidden, tokens)
        return logits, logits[:, pair.answer] - logits[:, pair.corrupt_answer], margins(logits, pair.answer)[0]

    wanted = materialised(model.unembed)[[tokens[pair.answer], tokens[pair.corrupt_answer]]].cpu().float()
    for layer in layers:
        rows = [Row((Site(layer, "neuron", number),), 0, 0) for number in range(model.n_neurons)]
        was, source = (run.activations["neuron", layer][0, -1].cpu().float() for run in (base, other))
        change, output = source - was, reading.outputs[layer]
        direct = change * (output.spoken @ (wanted[0] - wanted[1])) * reading.rate(base, layer).float()
        of_layer = {"activation": was, "change": change, "direct": direct, "written": change.abs() * output.size}
        for at in range(0, len(rows), limit):
            part = slice(at, at + limit)
            grown = grow(model, base, rows[part], other.activations)
            where = f"pair {pair.pair_id}, {direction} at last, layer {layer} neuron"
            prove_rows(model, grown, lambda index, where=where, at=at: f"{where} {at + index}")
            prove_base_rows(model, base, grown, lambda _: f"pair {pair.pair_id}")
            before, after = numbers(grown.base, tokens), numbers(grown.hidden, tokens)
            count = len(after[0])
            columns.append(
                {"layer": np.full(count, layer), "head": np.arange(at, at + count)}
                | {"logit_diff_before": np.repeat(before[1], count), "logit_diff_after": after[1]}
                | {"metric_before": np.repeat(before[2], count), "metric_after": after[2]}
                | {name: values[part].numpy() for name, values in of_layer.items()}
                | {"logits_after": after[0], "site_delta": grown.site_delta.numpy(), "fired": grown.fired.numpy()}
            )
    joined = {key: np.concatenate([part[key] for part in columns]) for key in columns[0]}
    about = {key: getattr(pair, key) for key in ("pair_id", "quad_id", "half")} | {"direction": direction}
    for side, own, words in (("clean", clean, pair.clean_tokens), ("corrupt", corrupt, pair.corrupt_tokens)):
        about[f"logit_diff_{side}"] = numbers(own.hidden, words)[1][0]
    frame = pd.DataFrame({key: list(values) if values.ndim == 2 else values for key, values in joined.items()})
    return frame.assign(**about)


# --- activations, classes and words -------------------------------------------------------------------------------


class Harvest(NamedTuple):
    """Plain activations at `last` of distinct prompts."""

    prompts: pd.DataFrame  # pair_id, side, superset, quad_id, half
    activations: dict[int, Float[np.ndarray, "prompts neurons"]]  # by layer
    rates: dict[int, float]  # each layer's mean of `Reading.rate`


def harvest(model: Model, pairs: Sequence[Pair], layers: Sequence[int], reading: Reading, size: int = 16) -> Harvest:
    """Run every distinct prompt of the pairs plainly, `size` of one length at a time."""
    prompts: dict[tuple[int, ...], dict] = {}
    for pair in pairs:
        for side, answer in (("clean", pair.answer), ("corrupt", pair.corrupt_answer)):
            about = {"pair_id": pair.pair_id, "side": side, "superset": pair.candidates[answer]}
            prompts.setdefault(getattr(pair, side).ids, about | {"quad_id": pair.quad_id, "half": pair.half})
    ids = sorted(prompts, key=len)
    chunks = [[i for i in ids if len(i) == n] for n in dict.fromkeys(map(len, ids))]
    runs = [
        base_run(model, token_ids(model, chunk[at : at + size]), [-1], NEEDS)
        for chunk in chunks
        for at in range(0, len(chunk), size)
    ]
    kept = {
        layer: torch.cat([run.activations["neuron", layer][:, -1] for run in runs]).cpu().float().numpy()
        for layer in layers
    }
    rates = {layer: float(torch.cat([reading.rate(run, layer) for run in runs]).mean()) for layer in layers}
    return Harvest(pd.DataFrame([prompts[i] for i in ids]), kept, rates)


def of_classes(
    model: Model, found: Harvest, layers: Sequence[int], reading: Reading, tokens: Mapping[str, int], seed: int
) -> pd.DataFrame:
    """How each neuron's activation tells each superset (`tokens`: its answer token) from the others (`CLASS_SCHEMA`).

    The values of one quad and superset are averaged first: two prompts of the same people are not two observations.
    Halves in which a superset, or every other, is missing have no rows of it.
    """
    unembed = materialised(model.unembed).cpu().float()
    writes = unembed[list(tokens.values())] - unembed.mean(0)
    frames, rng = [], np.random.default_rng(seed)
    keys = found.prompts[["half", "quad_id", "superset"]]
    group = keys.groupby(["half", "quad_id", "superset"], sort=True)
    of = group.ngroup().to_numpy()
    units = group.size().index.to_frame(index=False)
    member = (of[None] == np.arange(len(units))[:, None]) / np.bincount(of)[:, None]
    turned = units.groupby("quad_id")["superset"].transform(lambda own: rng.permutation(own))
    for layer in layers:
        values = member @ found.activations[layer]
        weights = (reading.outputs[layer].spoken @ writes.T * found.rates[layer]).numpy()
        for half, rows in units.groupby("half", sort=False):
            ranks, own = stats.rankdata(values[rows.index], axis=0), values[rows.index]
            for column, superset in enumerate(tokens):
                inside, swapped = (
                    (labels[rows.index] == superset).to_numpy() for labels in (units["superset"], turned)
                )
                n, others = int(inside.sum()), int((~inside).sum())
                if not n or not others:
                    continue
                area = lambda which: (ranks[which].sum(0) - n * (n + 1) / 2) / (n * others)  # noqa: E731, B023
                frames.append(
                    pd.DataFrame({"layer": layer, "head": np.arange(own.shape[1]), "half": half, "superset": superset})
                    .assign(n=n, n_others=others, auc=area(inside), auc_swapped=area(swapped))
                    .assign(mean=own[inside].mean(0), mean_others=own[~inside].mean(0))
                    .assign(weight=weights[:, column])
                )
    return pd.concat(frames, ignore_index=True)


def of_tokens(model: Model, found: Harvest, reading: Reading, neurons: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """The tokens on which each (layer, number) writes most and least, `rank` 0 leading; `weight` as in CLASS_SCHEMA."""
    weight, parts = materialised(model.unembed).cpu().float(), []
    for layer, number in neurons:
        logits = weight @ reading.outputs[layer].spoken[number] * found.rates[layer]
        logits = logits - logits.mean()
        for end, values in (("up", logits), ("down", -logits)):
            top = values.topk(TOKENS)
            words = [model.tokenizer.decode([token]) for token in top.indices.tolist()]
            about = {"layer": layer, "head": number, "end": end, "rank": range(TOKENS)}
            parts.append(pd.DataFrame(about | {"token": words, "weight": logits[top.indices].numpy()}))
    return pd.concat(parts, ignore_index=True)


def of_prompts(found: Harvest, neurons: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """The activation of each (layer, number) on every prompt."""
    parts = [
        found.prompts.assign(layer=layer, head=number, activation=found.activations[layer][:, number])
        for layer, number in neurons
    ]
    return pd.concat(parts, ignore_index=True)


def plainly(
    step: Step,
    pairs: Sequence[Pair],
    layers: Sequence[int],
    neurons: Sequence[tuple[int, int]],
    reading: Callable[[], Reading],
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The step's tables from plain runs: every neuron and superset; the given ones' activations; and their tokens."""
    found = cache(lambda: harvest(step.model, pairs, layers, reading()))
    tokens = dict(zip(pairs[0].candidates, pairs[0].clean_tokens, strict=True))

    def table(name: str, make: Callable[[], pd.DataFrame], schema: pa_schema.DataFrameSchema | None) -> pd.DataFrame:
        asked = {"layers": list(layers), "neurons": [list(neuron) for neuron in neurons] if schema is None else []}
        return step.table(name, [Unit(name, tuple(pairs), asked)], lambda _: make(), schema=schema)

    of_class = lambda: of_classes(step.model, found(), layers, reading(), tokens, step.params.seed)  # noqa: E731
    return (
        table("classes", of_class, CLASS_SCHEMA),
        table("activations", lambda: of_prompts(found(), neurons), None),
        table("tokens_written", lambda: of_tokens(step.model, found(), reading(), neurons), None),
    )
