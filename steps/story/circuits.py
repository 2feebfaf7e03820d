"""Circuits at the last token: what is left of the task when every head and MLP outside a set is resampled there?

F(C) is the clean prompt's logit_diff when each head and MLP at `last` keeps what it computes, in that very run, if
it is in C, and otherwise has the value of another prompt (Wang et al. 2022, section 3).
All tokens before the last one stay as they are. F(everything) is the model; F(nothing) is that other prompt's.

1. The clean prompts are run plainly and lend their KV cache; the other prompts' activations at the last token are kept.
2. The last token is run once for all circuits. Circuits that agree up to a layer are one row up to there: the rows
   branch like a tree (`branches`), so that nothing is computed twice.
3. A module is run only for the rows that keep something of it; the others are given the other prompt's output.
4. Every pass carries the circuit of everything and that of nothing: they must equal the two plain runs.
5. `search` grows the smallest circuit it can find by exact tests alone, and prunes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pandera.pandas as pa_schema
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lib import hooks, metrics
from lib.batches import Pool, grouped, has_donors, subsample, token_ids
from lib.hooks import Model, materialised, site_of
from lib.single_pass import Activations, BaseRun, SharedPrefix, SweepError, base_run, joiner, row_limit
from lib.sweep import SHARED_ROW_TOKENS
from lib.tasks import Pair
from pipeline.step import Step
from pipeline.units import Unit


class Circuit(NamedTuple):
    """Heads and MLPs, by name: the only ones that are kept, or the only ones that are not."""

    only: bool
    sites: tuple[str, ...]


ALL, NOTHING = Circuit(False, ()), Circuit(True, ())
LENT = ("head", "mlp", "attn", "resid")  # components whose values another prompt lends
BATCH = 16  # pairs whose plain runs are made together
QUEUE = 32  # sites that the search tests at a time
REFRESH = (0, 2, 8, 32)  # sizes of the circuit at which the search tests every site

_finite = pa_schema.Check(np.isfinite, name="finite")
_ABOUT = {name: pa_schema.Column(str) for name in ("task", "template", "pair_id", "quad_id")}
# One row per pair, kind of resampling and test; the tests "everything" and "nothing" are in every pass.
SCHEMA = pa_schema.DataFrameSchema(
    _ABOUT
    | {
        "half": pa_schema.Column(str, pa_schema.Check.isin(["discovery", "confirmation"])),
        "seed": pa_schema.Column("int64", pa_schema.Check.ge(0)),
        "ablation": pa_schema.Column(str, pa_schema.Check.isin(["resample", "counterfactual"])),
        "test": pa_schema.Column(str),
        "logits": pa_schema.Column(object),  # of the candidates, in the order of the metadata's "candidates"
        "logit_diff": pa_schema.Column("float64", _finite),
        "metric": pa_schema.Column("float64", _finite),  # the margin
    },
    strict=True,
    ordered=True,
    unique=["pair_id", "seed", "ablation", "test"],
    name="table of circuits",
)
# One row per circuit that the search tested: `site` joins or leaves what it had so far.
SEARCH_SCHEMA = pa_schema.DataFrameSchema(
    {
        "phase": pa_schema.Column(str, pa_schema.Check.isin(["grow", "prune"])),
        "round": pa_schema.Column("int64"),
        "site": pa_schema.Column(str),
        "faithfulness": pa_schema.Column("float64", _finite),  # with (grow) or without (prune) the site
        "chosen": pa_schema.Column(bool),
    },
    strict=True,
    ordered=True,
    unique=["phase", "round", "site"],
    name="table of the search",
)


@dataclass(frozen=True)
class Ready:
    """Pairs of one group with their plain runs, and the values that other prompts lend them."""

    pairs: list[Pair]
    kinds: tuple[str, ...]
    base: BaseRun
    sources: Activations  # (kinds x pairs, 1, width)
    alike: Bool[Tensor, " lent"]  # whether the lending prompt ends in the same token


def tester(step: Step, pool: Sequence[Pair]) -> Callable[[Unit], pd.DataFrame]:
    """What `Step.table` computes units of `search` (their options name `sites`) and of `run` with."""

    def compute(unit: Unit) -> pd.DataFrame:
        how = {"pool": pool, "seed": step.params.seed, "memory": step.memory}
        return (search if "sites" in unit.options else run)(step.model, unit.pairs, **unit.options, **how)

    return compute


def searched(step: Step, prompts: Sequence[Pair], sites: Sequence[str]) -> tuple[pd.DataFrame, str]:
    """The step's table of the search, on pairs of the discovery half (or the only one), and its kind of ablation."""
    p = step.params
    first = [pair for pair in prompts if pair.half == "discovery"] or prompts
    own, kind = of_one_kind(subsample(first, p.search_pairs), prompts)
    options = {"sites": sites, "share": p.faithful_share, "limit": p.circuit_limit, "ablation": kind}
    plan = [Unit("search", tuple(own), options)]
    return step.table("search", plan, tester(step, prompts), schema=SEARCH_SCHEMA), kind


def tested(step: Step, prompts: Sequence[Pair], tests: Mapping[str, Circuit], kind: str) -> pd.DataFrame:
    """The step's table of circuits: all of them under this kind of ablation, `circuit` also from the corrupt prompt."""
    own, _ = of_one_kind(subsample(prompts, step.params.pairs), prompts)
    chunks = [tuple(group[at : at + 8]) for group in grouped(own) for at in range(0, len(group), 8)]
    plan = [
        Unit(f"{how}-{index:04d}", chunk, {"tests": tests if how == kind else which, "ablations": [how]})
        for how, which in {kind: tests, "counterfactual": {"circuit": tests["circuit"]}}.items()
        for index, chunk in enumerate(chunks)
    ]
    return step.table("circuits", plan, tester(step, prompts), schema=SCHEMA)


def of_one_kind(pairs: Sequence[Pair], pool: Sequence[Pair]) -> tuple[list[Pair], str]:
    """The pairs to which other quads of the pool can lend values, and `resample`; where none can, all pairs and
    `counterfactual`."""
    able = [pair for pair in pairs if has_donors(pair, pool)]
    return (able, "resample") if able else (list(pairs), "counterfactual")


def kept_parts(model: Model, circuits: Sequence[Circuit]) -> Bool[np.ndarray, "circuits layers parts"]:
    """Which heads (parts 0 ...) and MLPs (the last part) each circuit keeps. ValueError for sites the model lacks."""
    out = np.zeros((len(circuits), model.n_layers, model.n_heads + 1), dtype=bool)
    for kept, circuit in zip(out, circuits, strict=True):
        kept[:] = not circuit.only
        for site in map(site_of, circuit.sites):
            hooks.check_site(model, site)
            if site.component not in ("head", "mlp"):
                raise ValueError(f"{site} cannot be in a circuit: its sites are heads and MLPs")
            kept[site.layer, site.head] = circuit.only  # an MLP's head is -1: the last part
    return out


class Branch(NamedTuple):
    """The rows of one layer."""

    parent: Int[np.ndarray, " rows"]  # the row of the layer before that each one continues
    kept: Bool[np.ndarray, "rows parts"]


def branches(kept: Bool[np.ndarray, "circuits layers parts"]) -> tuple[list[Branch], Int[np.ndarray, " circuits"]]:
    """For each layer the distinct ways in which circuits have gone up to it; and each circuit's row in the last."""
    out, row = [], np.zeros(len(kept), dtype=np.int64)
    for layer in range(kept.shape[1]):
        way = np.column_stack([row, kept[:, layer]])
        distinct, row = np.unique(way, axis=0, return_inverse=True)
        row = row.reshape(-1)
        out.append(Branch(distinct[:, 0], distinct[:, 1:].astype(bool)))
    return out, row


@torch.no_grad()
def masked(
    model: Model, base: BaseRun, sources: Activations, kept: Bool[np.ndarray, "circuits layers parts"]
) -> Float[Tensor, "circuits lent hidden"]:
    """Final hidden states of every circuit, in one pass over the last token of the base's prompts.

    `sources` are (lent, 1, width): a whole number of times as many as there are prompts, each time in their order.
    """
    tree, place = branches(kept)
    start, lent = base.ids.shape[1] - 1, len(sources["mlp", 0])
    owner = torch.arange(lent, device=base.ids.device) % len(base.ids)
    cache, narrow = SharedPrefix(base.cache, start, owner), joiner(owner[:0], len(base.ids))
    handles: list = []
    forwards: list = []

    def rows_of(states: Int[np.ndarray, " states"], like: Tensor) -> Int[Tensor, " rows"]:
        """Each state of the tree has a row for every prompt that lends."""
        return (torch.from_numpy(states)[:, None] * lent + torch.arange(lent)).flatten().to(like.device)

    def module(component: str, layer: int, states: np.ndarray, own: Callable) -> Callable:
        """A module's `forward`: computed in the rows of these states, lent in all others."""

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            out = sources[component, layer].to(hidden).repeat(len(hidden) // lent, 1, 1)
            if len(states):
                rows, cache.owner = rows_of(states, hidden), owner.repeat(len(states))
                out[rows] = hooks.first_tensor(own(hidden[rows], *args[1:], **kwargs))
            return out if component == "mlp" else (out, None)

        return forward

    for layer, branch in enumerate(tree):
        heads, mlps = (np.flatnonzero(part.any(1)) for part in (branch.kept[:, :-1], branch.kept[:, -1:]))
        some = torch.from_numpy(branch.kept[heads, :-1])[:, None, :, None]

        def split(own: nn.Module, args: tuple, kwargs: dict, layer: int = layer, parent: Any = branch.parent) -> tuple:
            (hidden, *args), kwargs = narrow(own, args, kwargs)
            rows = owner.repeat(len(parent)).to(hidden.device) if layer == 0 else rows_of(parent, hidden)
            return (hidden[rows], *args), kwargs

        def mix(z: Tensor, layer: int = layer, some: Tensor = some) -> Tensor:
            parts = z.view(-1, lent, model.n_heads, model.head_size)
            other = sources["head", layer].to(z).view(1, lent, model.n_heads, model.head_size)
            return torch.where(some.to(z.device), parts, other).view(z.shape)

        handles.append(model.blocks[layer].register_forward_pre_hook(split, with_kwargs=True))
        handles.append(hooks.on_activation(model, layer, "head", mix))
        forwards.append((model.attns[layer], module("attn", layer, heads, model.attns[layer].forward)))
        forwards.append((model.mlps[layer], module("mlp", layer, mlps, model.mlps[layer].forward)))
    with hooks.removing(handles), hooks.with_forwards(forwards):
        hidden = model.body(
            input_ids=base.ids[:, start:],
            past_key_values=cache,
            position_ids=torch.tensor([[start]], device=base.ids.device),
            use_cache=True,
        ).last_hidden_state[:, -1]
    return hidden.unflatten(0, (-1, lent))[torch.from_numpy(place).to(hidden.device)]


def ready(
    model: Model, pairs: Sequence[Pair], ablations: Sequence[str], pool: Sequence[Pair], seed: int = 0
) -> list[Ready]:
    """The pairs with everything that their circuits are tested with, a batch of one group at a time."""
    out = []
    for group in grouped(pairs):
        for at in range(0, len(group), BATCH):
            own, last = group[at : at + BATCH], group[0].clean.roles["last"]
            clean = base_run(model, token_ids(model, [pair.clean.ids for pair in own]), last, LENT)
            ids = [
                pair.corrupt.ids if kind == "counterfactual" else resampled(pair, pool, seed)
                for kind in ablations
                for pair in own
            ]
            lent = base_run(model, token_ids(model, ids), last, LENT)
            alike = lent.ids[:, -1] == clean.ids[:, -1].repeat(len(ablations))
            out.append(Ready(own, tuple(ablations), clean, lent.activations, alike.cpu()))
    return out


def resampled(pair: Pair, pool: Sequence[Pair], seed: int) -> tuple[int, ...]:
    """The prompt that lends a pair its values: the one that `sweep.run` resamples from with this seed."""
    donors = Pool.of(pool, pair)
    return donors.prompts[int(donors.weights(pair, "resample", seed).argmax())]


@torch.no_grad()
def scored(
    model: Model, ready: Ready, circuits: Sequence[Circuit], memory: float
) -> Float[np.ndarray, "circuits kinds pairs C"]:
    """The candidates' logits under every circuit. SweepError unless that of everything is the model and that of
    nothing the prompts that lend."""
    count, kinds = len(ready.pairs), len(ready.kinds)
    kept = kept_parts(model, [ALL, NOTHING, *circuits])
    limit = min(row_limit(model, ready.base, memory), SHARED_ROW_TOKENS)
    size, parts = max(1, limit // (len(kept) * kinds)), []
    for at in range(0, count, size):
        own, base = ready.pairs[at : at + size], ready.base.part(at, min(at + size, count))
        lent = [kind * count + at + index for kind in range(kinds) for index in range(len(own))]
        sources = {key: value[lent] for key, value in ready.sources.items()}
        hidden = masked(model, base, sources, kept)
        other = model.final_norm(sources["resid", model.n_layers - 1][:, -1]).to(hidden)
        plain = torch.stack([base.hidden.repeat(kinds, 1).to(hidden), other])
        tokens = torch.tensor([pair.clean_tokens for pair in own] * kinds)
        logits = candidate_logits(model, torch.cat([plain, hidden]), tokens).cpu()
        off = (logits[:2] - logits[2:4]).abs().amax(-1)
        off[1] *= ready.alike[lent]  # the embedding of the last token is nobody's to lend
        if not (off <= model.noise).all():
            which, index = torch.nonzero(~(off <= model.noise))[0].tolist()
            raise SweepError(
                f"pair {own[index % len(own)].pair_id}: the circuit of {('everything', 'nothing')[which]} differs by "
                f"{off[which, index]:.3g} logits from the plain run of {('the clean', 'the lending')[which]} prompt"
            )
        parts.append(logits[2:].unflatten(1, (kinds, -1)).numpy())
    return np.concatenate(parts, axis=2)


def candidate_logits(
    model: Model, hidden: Float[Tensor, "circuits rows hidden"], tokens: Int[Tensor, "rows C"]
) -> Float[Tensor, "circuits rows C"]:
    """`Model.logits` of a few tokens of each row."""
    weight = materialised(model.unembed)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    out = torch.einsum("crh,rth->crt", hidden.to(weight.device, wide), weight[tokens.to(weight.device)].to(wide))
    bias = getattr(model.unembed, "bias", None)
    out = out if bias is None else out + bias[tokens.to(bias.device)].to(wide)
    return out if model.softcap is None else model.softcap * torch.tanh(out / model.softcap)


def run(
    model: Model,
    pairs: Sequence[Pair],
    tests: Mapping[str, Sequence],
    *,
    ablations: Sequence[str] = ("resample",),
    pool: Sequence[Pair] | None = None,
    seed: int = 0,
    memory: float = 2.0,
) -> pd.DataFrame:
    """Test circuits, `tests` by name as (only, sites), on every pair: one row per pair x ablation x test (`SCHEMA`).

    `everything` and `nothing` are tested beside them. Another prompt of the pair's group in `pool` (default: `pairs`)
    lends the values of `resample`, the pair's corrupt prompt those of `counterfactual`.
    """
    circuits, frames = [Circuit(only, tuple(sites)) for only, sites in tests.values()], []
    names = ["everything", "nothing", *tests]
    for own in ready(model, pairs, ablations, pool or pairs, seed):
        logits = scored(model, own, circuits, memory).transpose(2, 1, 0, 3)  # (pairs, kinds, tests, C)
        for pair, kinds in zip(own.pairs, logits, strict=True):
            for kind, values in zip(own.kinds, kinds, strict=True):
                about = {name: getattr(pair, name) for name in ("task", "template", "pair_id", "quad_id", "half")}
                diff = (values[:, pair.answer] - values[:, pair.corrupt_answer]).astype(float)
                margin = metrics.margins(values, pair.answer)[0].astype(float)
                columns = {"logits": list(values.astype(np.float32)), "logit_diff": diff, "metric": margin}
                frames.append(pd.DataFrame(about | {"seed": seed, "ablation": kind, "test": names} | columns))
    out = pd.concat(frames, ignore_index=True)
    out.attrs["facts"] = {"candidates": list(pairs[0].candidates)}
    return out


def search(
    model: Model,
    pairs: Sequence[Pair],
    sites: Sequence[str],
    *,
    share: float,
    limit: int,
    ablation: str = "resample",
    pool: Sequence[Pair] | None = None,
    seed: int = 0,
    memory: float = 2.0,
) -> pd.DataFrame:
    """Grow a circuit from nothing, then prune it; every circuit that was tested, in order (`SEARCH_SCHEMA`).

    Faithfulness is sum F(C) - F(nothing) over sum F(everything) - F(nothing), logit_diff. Each round the site joins
    that adds most, until `share` or `limit` sites are reached. Sites are tested from the head of a queue ordered by
    what each added when last tested, until none behind is known for more (Minoux 1978); sites that work only together
    break that order, so all of them are tested anew at the sizes REFRESH. Then the member whose removal leaves most is
    dropped, as long as `share` (or what was reached, if less) is left. Empty where the model has nothing to keep.
    """
    lent = ready(model, pairs, (ablation,), pool or pairs, seed)

    def differences(circuits: Sequence[Circuit]) -> Float[np.ndarray, " circuits"]:
        total = 0.0
        for own in lent:
            logits, index = scored(model, own, circuits, memory)[:, 0].astype(float), np.arange(len(own.pairs))
            answers = np.array([(pair.answer, pair.corrupt_answer) for pair in own.pairs]).T
            total += (logits[:, index, answers[0]] - logits[:, index, answers[1]]).sum(1)
        return total

    whole, nothing = differences([])
    gap = whole - nothing

    def faithfulness(members: Sequence[Sequence[str]]) -> Float[np.ndarray, " circuits"]:
        return (differences([Circuit(True, tuple(own)) for own in members])[2:] - nothing) / gap

    tested: list[tuple] = []
    members: list[str] = []
    reached, gains = 0.0, dict.fromkeys(sites, np.inf)
    while gap > 0 and reached < share and len(members) < min(limit, len(sites)):
        queue = sorted(set(sites) - set(members), key=lambda site: (-gains[site], sites.index(site)))
        fresh: dict[str, float] = {}
        for at in range(0, len(queue), QUEUE):
            part = queue[at : at + QUEUE]
            best = max(fresh.values(), default=-np.inf) - reached
            if len(members) not in REFRESH and best >= gains[part[0]]:
                break
            fresh |= zip(part, faithfulness([[*members, site] for site in part]).tolist(), strict=True)
        gains |= {site: value - reached for site, value in fresh.items()}
        chosen = max(fresh, key=fresh.get)
        tested += [("grow", len(members), site, value, site == chosen) for site, value in fresh.items()]
        members, reached = [*members, chosen], fresh[chosen]
    floor, number = min(share, reached), 0
    while len(members) > 1:
        left = faithfulness([[site for site in members if site != gone] for gone in members])
        spare = left.max() >= floor
        tested += [
            ("prune", number, *row, spare and i == left.argmax())
            for i, row in enumerate(zip(members, left.tolist(), strict=True))
        ]
        if not spare:
            break
        members, number = [site for i, site in enumerate(members) if i != left.argmax()], number + 1
    frame = pd.DataFrame(tested, columns=list(SEARCH_SCHEMA.columns))
    return frame.astype({"round": "int64", "faithfulness": float, "chosen": bool, "phase": str, "site": str})
