"""Single MLP neurons: every one replaced at `last`, what it writes, and for whom it is active.

1. `run` replaces each neuron of the layers by its value in the other run of the pair, in growing passes of a layer
   each, and scores the candidates alone: the whole vocabulary would cost as much as the passes. The neuron's *direct
   effect* is what the change writes, through the norms at the scale of the plain run, onto answer minus corrupt answer.
2. `harvest` keeps every neuron's activation at `last` in plain runs of all prompts, and each layer's mean scale.
3. `of_classes` asks how well an activation tells each superset from the others (area under the ROC curve, Mann and
   Whitney 1947), and what the neuron writes on the superset's logit; `of_tokens` what it writes on all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import pandera.pandas as pa_schema
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from lib.batches import both_runs, distinct_prompts
from lib.data import HALVES
from lib.hooks import Model, Site
from lib.metrics import margins
from lib.readout import FixedNorm, Readout, post_norms, readout
from lib.single_pass import BaseRun, Grown, Row, grow, joined, plain_runs, prove_base_rows, prove_rows, row_limit
from lib.tasks import Pair, token_texts

TOKENS = 10  # tokens at either end of a neuron's list
OTHERS = 200  # neurons of a layer whose lists it is compared with
NEEDS = ("neuron", "mlp", "resid")

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
# (`n`, `n_others` quads); `auc_chance`: each half's labels dealt out anew; `mean`, `mean_others`: of the
# activation; `weight`: logits that one unit of activation writes on the superset, above the mean of the vocabulary.
CLASS_SCHEMA = pa_schema.DataFrameSchema(
    _neuron
    | {"half": _half, "superset": _text}
    | dict.fromkeys(("n", "n_others"), pa_schema.Column("int32", pa_schema.Check.ge(1)))
    | dict.fromkeys(("auc", "auc_chance", "mean", "mean_others", "weight"), _number),
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
        scale = self.out.norm.scale(runs.activations["resid", final][:, -1])
        post = self.outputs[layer].post
        return 1 / (scale if post is None else scale * post.scale(runs.activations["mlp", layer][:, -1]))


@torch.no_grad()
def reading_of(model: Model, layers: Sequence[int]) -> Reading:
    """The layers' outputs. The down projection itself is run on single units, so that its kind does not matter."""
    out, outputs, posts = readout(model), {}, post_norms(model)
    for layer in layers:
        units = torch.eye(model.n_neurons, dtype=model.dtype, device=model.device)  # an error where there are none
        down, post = model.down_projs[layer], posts[layer].mlp
        columns = (down(units) - down(torch.zeros_like(units[:1]))).cpu().double()
        passed = columns if post is None else post.gain * post.centred(columns)
        outputs[layer] = Output(columns.norm(dim=1), (out.norm.gain * out.norm.centred(passed)).float(), post)
    return Reading(out, outputs)


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
    clean, corrupt = both_runs(model, [pair], pair.clean.roles["last"], NEEDS)
    base, other, tokens = (
        (clean, corrupt, pair.clean_tokens) if direction == "noise" else (corrupt, clean, pair.corrupt_tokens)
    )
    answers = model.unembedding([tokens[pair.answer], tokens[pair.corrupt_answer]])[0].cpu().float()
    limit, parts = row_limit(model, base, memory), []
    for layer in layers:
        was, source = (run.activations["neuron", layer][0, -1].cpu().float() for run in (base, other))
        change, output = source - was, reading.outputs[layer]
        direct = change * (output.spoken @ (answers[0] - answers[1])) * reading.rate(base, layer).float()
        of_layer = {"activation": was, "change": change, "direct": direct, "written": change.abs() * output.size}
        rows = [Row((Site(layer, "neuron", number),), 0, 0) for number in range(model.n_neurons)]
        for at in range(0, len(rows), limit):
            part = slice(at, at + limit)
            grown = grow(model, base, rows[part], other.activations)
            where = f"pair {pair.pair_id}, {direction} at last, layer {layer} neuron"
            prove_rows(model, grown, lambda index, where=where, at=at: f"{where} {at + index}")
            scores = scored(model, pair, tokens, base, grown)
            place = {"layer": np.full(len(rows[part]), layer), "head": np.arange(at, at + len(rows[part]))}
            parts.append(place | scores | {name: values[part].numpy() for name, values in of_layer.items()})
    columns = {key: list(values) if values.ndim == 2 else values for key, values in joined(parts).items()}
    about = {key: getattr(pair, key) for key in ("pair_id", "quad_id", "half")} | {"direction": direction}
    for side, run_of_side, words in (("clean", clean, pair.clean_tokens), ("corrupt", corrupt, pair.corrupt_tokens)):
        about[f"logit_diff_{side}"] = numbers(model, pair, run_of_side.hidden, words)[1][0]
    return pd.DataFrame(columns).assign(**about)


def numbers(
    model: Model, pair: Pair, hidden: Float[Tensor, "rows hidden"], tokens: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidate logits (rows, candidates), logit_diff and margin of final states."""
    logits = model.logits(hidden, list(tokens)).cpu().numpy()
    return logits, logits[:, pair.answer] - logits[:, pair.corrupt_answer], margins(logits, pair.answer)[0]


def scored(model: Model, pair: Pair, tokens: Sequence[int], base: BaseRun, grown: Grown) -> dict[str, np.ndarray]:
    """Prove a pass's base row and score its rows."""
    prove_base_rows(model, base, grown, lambda _: f"pair {pair.pair_id}")
    before, after = numbers(model, pair, grown.base, tokens), numbers(model, pair, grown.hidden, tokens)
    out = {"logits_after": after[0], "site_delta": grown.site_delta.numpy(), "fired": grown.fired.numpy()}
    for name, was, becomes in (("logit_diff", before[1], after[1]), ("metric", before[2], after[2])):
        out |= {f"{name}_before": np.repeat(was, len(becomes)), f"{name}_after": becomes}
    return out


# --- activations, classes and words -------------------------------------------------------------------------------


class Harvest(NamedTuple):
    """Plain activations at `last` of distinct prompts."""

    prompts: pd.DataFrame  # pair_id, side, superset, quad_id, half
    activations: dict[int, Float[np.ndarray, "prompts neurons"]]  # by layer
    rates: dict[int, float]  # each layer's mean of `Reading.rate`


def harvest(model: Model, pairs: Sequence[Pair], layers: Sequence[int], reading: Reading, size: int = 16) -> Harvest:
    """Run every distinct prompt of the pairs plainly, `size` of one length at a time."""
    prompts = distinct_prompts(pairs)
    ids = sorted(prompts, key=len)
    runs = [run for _, run in plain_runs(model, ids, [-1], NEEDS, size=size, cache=True)]
    kept = {
        layer: torch.cat([run.activations["neuron", layer][:, -1] for run in runs]).cpu().float().numpy()
        for layer in layers
    }
    rates = {layer: float(torch.cat([reading.rate(run, layer) for run in runs]).mean()) for layer in layers}
    rows = []
    for pair, side in (prompts[one] for one in ids):
        superset = pair.candidates[pair.answer if side == "clean" else pair.corrupt_answer]
        about = {"pair_id": pair.pair_id, "side": side, "superset": superset}
        rows.append(about | {"quad_id": pair.quad_id, "half": pair.half})
    return Harvest(pd.DataFrame(rows), kept, rates)


def of_classes(
    model: Model, found: Harvest, layers: Sequence[int], reading: Reading, tokens: Mapping[str, int], seed: int
) -> pd.DataFrame:
    """How each neuron's activation tells each superset (`tokens`: its answer token) from the others (`CLASS_SCHEMA`).

    The values of one quad and superset are averaged first: two prompts of the same people are not two observations.
    Halves in which a superset, or every other, is missing have no rows of it.
    """
    unembed = model.unembedding()[0].cpu().float()
    writes = unembed[list(tokens.values())] - unembed.mean(0)
    frames, rng = [], np.random.default_rng(seed)
    keys = found.prompts[["half", "quad_id", "superset"]]
    group = keys.groupby(["half", "quad_id", "superset"], sort=True)
    of = group.ngroup().to_numpy()
    units = group.size().index.to_frame(index=False)
    member = (of[None] == np.arange(len(units))[:, None]) / np.bincount(of)[:, None]
    # Not within quads: of two labels, an exchange leaves half in place, so that half the signal stays.
    dealt = units.groupby("half")["superset"].transform(lambda own: rng.permutation(own))
    for layer in layers:
        values = member @ found.activations[layer]
        weights = (reading.outputs[layer].spoken @ writes.T * found.rates[layer]).numpy()
        for half, rows in units.groupby("half", sort=False):
            ranks, own = stats.rankdata(values[rows.index], axis=0), values[rows.index]
            for column, superset in enumerate(tokens):
                inside, chance = ((labels[rows.index] == superset).to_numpy() for labels in (units["superset"], dealt))
                n, others = int(inside.sum()), int((~inside).sum())
                if not n or not others:
                    continue
                frames.append(
                    pd.DataFrame({"layer": layer, "head": np.arange(own.shape[1]), "half": half, "superset": superset})
                    .assign(n=n, n_others=others, auc=area(ranks, inside), auc_chance=area(ranks, chance))
                    .assign(mean=own[inside].mean(0), mean_others=own[~inside].mean(0))
                    .assign(weight=weights[:, column])
                )
    return pd.concat(frames, ignore_index=True)


def area(ranks: Float[np.ndarray, "units neurons"], inside: np.ndarray) -> Float[np.ndarray, " neurons"]:
    """Area under the ROC curve of the units inside against the others, from their ranks."""
    n, others = int(inside.sum()), int((~inside).sum())
    return (ranks[inside].sum(0) - n * (n + 1) / 2) / (n * others)


def of_tokens(model: Model, found: Harvest, reading: Reading, neurons: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """The tokens on which each (layer, number) writes most and least, `rank` 0 leading; `weight` as in CLASS_SCHEMA.

    Any vector writes most on some token. `p`: the share of neurons evenly drawn from the layer, this one counted, whose
    first token at that end lies as far out, in standard deviations over the vocabulary.
    """
    weight, parts = model.unembedding()[0].cpu().float(), []
    spoken = {layer: reading.outputs[layer].spoken for layer, _ in neurons}
    others = {layer: farthest(weight, rows[:: -(-len(rows) // OTHERS)]) for layer, rows in spoken.items()}
    for layer, number in neurons:
        logits = weight @ spoken[layer][number] * found.rates[layer]
        logits = logits - logits.mean()
        own = farthest(weight, spoken[layer][[number]])
        reached = (1 + (others[layer] > own * (1 + 1e-5)).sum(1)) / (1 + others[layer].shape[1])  # not itself again
        for (end, values), p in zip((("up", logits), ("down", -logits)), reached.tolist(), strict=True):
            top = values.topk(TOKENS)
            words = token_texts(model.tokenizer, top.indices.tolist())
            about = {"layer": layer, "head": number, "end": end, "rank": range(TOKENS), "p": p}
            parts.append(pd.DataFrame(about | {"token": words, "weight": logits[top.indices].numpy()}))
    return pd.concat(parts, ignore_index=True)


def farthest(
    weight: Float[Tensor, "vocabulary hidden"], spoken: Float[Tensor, "neurons hidden"]
) -> Float[Tensor, "2 neurons"]:
    """How far out the first token at either end of each neuron's list lies, in standard deviations over all tokens."""
    logits = weight @ spoken.T
    logits = (logits - logits.mean(0)) / logits.std(0)
    return torch.stack([logits.max(0).values, -logits.min(0).values])


def of_prompts(found: Harvest, neurons: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """The activation of each (layer, number) on every prompt."""
    parts = [
        found.prompts.assign(layer=layer, head=number, activation=found.activations[layer][:, number])
        for layer, number in neurons
    ]
    return pd.concat(parts, ignore_index=True)
