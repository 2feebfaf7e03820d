"""Circuits at the last token: what is left of the task when every head and MLP outside a set is resampled there?

F(C) is the clean prompt's logit_diff when each head and MLP at `last` keeps what it computes, in that very run, if
it is in C, and otherwise has the value of another prompt (Wang et al. 2022, section 3).
All tokens before the last one stay as they are. F(everything) is the model; F(nothing) is that other prompt's.

1. `ready` runs the clean prompts plainly, which lends their KV cache; the donors' activations at the last token are
   kept.
2. `masked` runs the last token once for all circuits. Circuits that agree up to a layer are one row up to there: the
   rows branch like a tree (`branches`), so that nothing is computed twice. A module is run only for the rows that keep
   something of it; the others are given the donor's output.
3. `scored`: every pass carries the circuit of everything and that of nothing, which must equal the two plain runs.
4. `run` tests circuits. `search` grows the smallest one it can find by exact tests alone, and prunes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lib import hooks, metrics, records
from lib.batches import Pool, grouped
from lib.hooks import Model, site_of
from lib.single_pass import Activations, BaseRun, SweepError, base_run, joiner, row_limit, suffix, token_ids
from lib.sweep import SHARED_ROW_TOKENS
from lib.tasks import Pair
from lib.weights import Shape


class Circuit(NamedTuple):
    """Heads and MLPs, by name: the only ones that are kept, or the only ones that are not."""

    only: bool
    sites: tuple[str, ...]


ALL, NOTHING = Circuit(False, ()), Circuit(True, ())
COMPONENTS = ("head", "mlp", "attn", "resid")  # whose values donors give
BATCH = 16  # pairs whose plain runs are made together
QUEUE = 32  # sites that the search tests at a time
REFRESH = (0, 2, 8, 32)  # sizes of the circuit at which the search tests every site
ABOUT = ("task", "template", "pair_id", "quad_id", "half")

# One row per pair, kind of resampling and test; the tests "everything" and "nothing" are in every pass.
SCHEMA = records.table_schema(
    "table of circuits",
    {name: records.text() for name in ABOUT[:-1]}
    | {
        "half": records.text(("discovery", "confirmation")),
        "seed": records.whole(0, "int64"),
        "ablation": records.text(("resample", "counterfactual")),
        "test": records.text(),
        "logits": records.numbers(),  # of the candidates, in the order of the metadata's "candidates"
        "logit_diff": records.number(),
        "metric": records.number(),  # the margin
    },
    unique=["pair_id", "seed", "ablation", "test"],
)
# One row per circuit that the search tested: `site` joins or leaves what it had so far.
SEARCH_SCHEMA = records.table_schema(
    "table of the search",
    {
        "phase": records.text(("grow", "prune")),
        "round": records.whole(0, "int64"),
        "site": records.text(),
        "faithfulness": records.number(),  # with (grow) or without (prune) the site
        "chosen": records.Column(bool),
    },
    unique=["phase", "round", "site"],
)


@dataclass(frozen=True)
class Ready:
    """Pairs of one group with their plain runs, and the values that donors give them."""

    pairs: list[Pair]
    kinds: tuple[str, ...]
    base: BaseRun
    sources: Activations  # (kinds x pairs, 1, width)
    alike: Bool[Tensor, " donors"]  # whether the donor ends in the same token
    memory: float  # GB that a pass may take


def ready(
    model: Model,
    pairs: Sequence[Pair],
    ablations: Sequence[str] = ("resample",),
    pool: Sequence[Pair] | None = None,
    seed: int = 0,
    memory: float = 2.0,
) -> list[Ready]:
    """The pairs with everything that their circuits are tested with, a batch of one group at a time.

    Another prompt of the pair's group in `pool` (default: `pairs`), of another class than the pair's two, gives the
    values of `resample`, the pair's corrupt prompt those of `counterfactual`.
    """
    out = []
    for batch in grouped(pairs, BATCH):
        last = batch[0].clean.roles["last"]
        clean = base_run(model, token_ids(model, [pair.clean.ids for pair in batch]), last, COMPONENTS)
        ids = [
            pair.corrupt.ids if kind == "counterfactual" else resampled(pair, pool or pairs, seed)
            for kind in ablations
            for pair in batch
        ]
        donors = base_run(model, token_ids(model, ids), last, COMPONENTS, cache=False)
        alike = donors.ids[:, -1] == clean.ids[:, -1].repeat(len(ablations))
        out.append(Ready(batch, tuple(ablations), clean, donors.activations, alike.cpu(), memory))
    return out


def resampled(pair: Pair, pool: Sequence[Pair], seed: int) -> tuple[int, ...]:
    """The prompt that gives a pair its values: the one that `sweep.run` resamples from with this seed."""
    donors = Pool.of(pool, pair)
    return donors.prompts[int(donors.weights(pair, "resample", seed).argmax())]


# --- the pass -----------------------------------------------------------------------------------------------------


def kept_parts(model: Model | Shape, circuits: Sequence[Circuit]) -> Bool[np.ndarray, "circuits layers parts"]:
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
) -> Float[Tensor, "circuits donors hidden"]:
    """Final hidden states of every circuit, in one pass over the last token of the base's prompts.

    `sources` are (donors, 1, width): a whole number of times as many as there are prompts, each time in their order.
    """
    tree, place = branches(kept)
    start, donors = base.ids.shape[1] - 1, len(sources["mlp", 0])
    owner = torch.arange(donors, device=base.ids.device) % len(base.ids)
    inputs, narrow = suffix(base, start, owner, base.ids[:, start:]), joiner(owner[:0], len(base.ids))
    handles: list = []
    forwards: list = []

    def rows_of(states: Int[np.ndarray, " states"], like: Tensor) -> Int[Tensor, " rows"]:
        """Each state of the tree has a row for every donor."""
        return (torch.from_numpy(states)[:, None] * donors + torch.arange(donors)).flatten().to(like.device)

    def module(component: str, layer: int, states: np.ndarray, compute: Callable) -> Callable:
        """A module's `forward`: computed in the rows of these states, the donor's in all others."""

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            out = sources[component, layer].to(hidden).repeat(len(hidden) // donors, 1, 1)
            if len(states):
                rows, inputs["past_key_values"].owner = rows_of(states, hidden), owner.repeat(len(states))
                out[rows] = hooks.first_tensor(compute(hidden[rows], *args[1:], **kwargs))
            return out if component == "mlp" else (out, None)

        return forward

    for layer, branch in enumerate(tree):
        heads, mlps = (np.flatnonzero(part.any(1)) for part in (branch.kept[:, :-1], branch.kept[:, -1:]))
        some = torch.from_numpy(branch.kept[heads, :-1])[:, None, :, None]

        def split(
            block: nn.Module, args: tuple, kwargs: dict, layer: int = layer, parent: Any = branch.parent
        ) -> tuple:
            (hidden, *args), kwargs = narrow(block, args, kwargs)
            rows = owner.repeat(len(parent)).to(hidden.device) if layer == 0 else rows_of(parent, hidden)
            return (hidden[rows], *args), kwargs

        def mix(z: Tensor, layer: int = layer, some: Tensor = some) -> Tensor:
            parts = z.view(-1, donors, model.n_heads, model.head_size)
            other = sources["head", layer].to(z).view(1, donors, model.n_heads, model.head_size)
            return torch.where(some.to(z.device), parts, other).view(z.shape)

        handles.append(model.blocks[layer].register_forward_pre_hook(split, with_kwargs=True))
        handles.append(hooks.on_activation(model, layer, "head", mix))
        forwards.append((model.attns[layer], module("attn", layer, heads, model.attns[layer].forward)))
        forwards.append((model.mlps[layer], module("mlp", layer, mlps, model.mlps[layer].forward)))
    with hooks.removing(handles), hooks.with_forwards(forwards):
        hidden = model.body(**inputs).last_hidden_state[:, -1]
    return hidden.unflatten(0, (-1, donors))[torch.from_numpy(place).to(hidden.device)]


@torch.no_grad()
def scored(model: Model, ready: Ready, circuits: Sequence[Circuit]) -> Float[np.ndarray, "circuits kinds pairs C"]:
    """The candidates' logits under everything, nothing and every circuit. SweepError unless that of everything is the
    model and that of nothing the donors'."""
    count, kinds = len(ready.pairs), len(ready.kinds)
    kept = kept_parts(model, [ALL, NOTHING, *circuits])
    limit = min(row_limit(model, ready.base, ready.memory), SHARED_ROW_TOKENS)
    size, parts = max(1, limit // (len(kept) * kinds)), []
    for at in range(0, count, size):
        batch, base = ready.pairs[at : at + size], ready.base.part(at, min(at + size, count))
        donors = [kind * count + at + index for kind in range(kinds) for index in range(len(batch))]
        sources = {key: value[donors] for key, value in ready.sources.items()}
        hidden = masked(model, base, sources, kept)
        other = model.final_norm(sources["resid", model.n_layers - 1][:, -1]).to(hidden)
        plain = torch.stack([base.hidden.repeat(kinds, 1).to(hidden), other])
        tokens = torch.tensor([pair.clean_tokens for pair in batch] * kinds)
        logits = model.logits(torch.cat([plain, hidden]), tokens).cpu()
        off = (logits[:2] - logits[2:4]).abs().amax(-1)
        off[1] *= ready.alike[donors]  # the embedding of the last token is nobody's to give
        if not (off <= model.noise).all():
            which, index = torch.nonzero(~(off <= model.noise))[0].tolist()
            circuit, prompt = (("everything", "the clean"), ("nothing", "the lending"))[which]
            raise SweepError(
                f"pair {batch[index % len(batch)].pair_id}: the circuit of {circuit} differs by "
                f"{off[which, index]:.3g} logits from the plain run of {prompt} prompt"
            )
        parts.append(logits[2:].unflatten(1, (kinds, -1)).numpy())
    return np.concatenate(parts, axis=2)


# --- tests and search ---------------------------------------------------------------------------------------------


def run(model: Model, pairs: Sequence[Pair], tests: Mapping[str, Sequence], **how: Any) -> pd.DataFrame:
    """Test circuits, `tests` by name as (only, sites), on every pair: one row per pair x ablation x test (`SCHEMA`).

    `everything` and `nothing` are tested beside them. `how` goes to `ready`.
    """
    circuits, frames = [Circuit(only, tuple(sites)) for only, sites in tests.values()], []
    for batch in ready(model, pairs, **how):
        logits = scored(model, batch, circuits).transpose(2, 1, 0, 3)  # (pairs, kinds, tests, C)
        for pair, kinds in zip(batch.pairs, logits, strict=True):
            about = {name: getattr(pair, name) for name in ABOUT} | {"seed": how.get("seed", 0)}
            for kind, values in zip(batch.kinds, kinds, strict=True):
                columns = {
                    "ablation": kind,
                    "test": ["everything", "nothing", *tests],
                    "logits": list(values.astype(np.float32)),
                    "logit_diff": (values[:, pair.answer] - values[:, pair.corrupt_answer]).astype(float),
                    "metric": metrics.margins(values, pair.answer)[0].astype(float),
                }
                frames.append(pd.DataFrame(about | columns))
    out = pd.concat(frames, ignore_index=True)
    out.attrs["facts"] = {"candidates": list(pairs[0].candidates)}
    return out


class Faithfulness:
    """Faithfulness of circuits on some pairs: sum F(C) - F(nothing) over sum F(everything) - F(nothing), logit_diff."""

    def __init__(self, model: Model, batches: Sequence[Ready]) -> None:
        self.model, self.batches = model, batches
        whole, self.nothing = self.differences([])
        self.gap = whole - self.nothing

    def differences(self, circuits: Sequence[Circuit]) -> Float[np.ndarray, " circuits"]:
        """Sum of logit_diff over pairs under everything, nothing and every circuit."""
        total = 0.0
        for batch in self.batches:
            logits, index = scored(self.model, batch, circuits)[:, 0].astype(float), np.arange(len(batch.pairs))
            answers = np.array([(pair.answer, pair.corrupt_answer) for pair in batch.pairs]).T
            total += (logits[:, index, answers[0]] - logits[:, index, answers[1]]).sum(1)
        return total

    def of(self, members: Sequence[Sequence[str]]) -> list[float]:
        """Of the circuits that keep these members alone."""
        sums = self.differences([Circuit(True, tuple(kept)) for kept in members])[2:]
        return ((sums - self.nothing) / self.gap).tolist()


def search(
    model: Model, pairs: Sequence[Pair], sites: Sequence[str], share: float, limit: int, **how: Any
) -> pd.DataFrame:
    """Grow a circuit from nothing, then prune it; every circuit that was tested, in order (`SEARCH_SCHEMA`).

    `how` goes to `ready`. Empty where the model has nothing to keep.
    """
    faithfulness, tested = Faithfulness(model, ready(model, pairs, **how)), []
    if faithfulness.gap > 0:
        members, reached = grow(faithfulness, sites, share, min(limit, len(sites)), tested)
        prune(faithfulness, members, min(share, reached), tested)
    frame = pd.DataFrame(tested, columns=list(SEARCH_SCHEMA.columns))
    return frame.astype({"round": "int64", "faithfulness": float, "chosen": bool, "phase": str, "site": str})


def grow(
    faithfulness: Faithfulness, sites: Sequence[str], share: float, limit: int, tested: list[tuple]
) -> tuple[list[str], float]:
    """Each round the site joins that adds most, until `share` or `limit` sites are reached: the members, and their
    faithfulness.

    Sites are tested from the head of a queue ordered by what each added when last tested, until none behind is known
    for more (Minoux 1978); sites that work only together break that order, so all of them are tested anew at the sizes
    REFRESH.
    """
    members: list[str] = []
    reached, gains = 0.0, dict.fromkeys(sites, np.inf)
    while reached < share and len(members) < limit:
        queue = sorted(set(sites) - set(members), key=lambda site: (-gains[site], sites.index(site)))
        fresh: dict[str, float] = {}
        for at in range(0, len(queue), QUEUE):
            part = queue[at : at + QUEUE]
            best = max(fresh.values(), default=-np.inf) - reached
            if len(members) not in REFRESH and best >= gains[part[0]]:
                break
            fresh |= zip(part, faithfulness.of([[*members, site] for site in part]), strict=True)
        gains |= {site: value - reached for site, value in fresh.items()}
        chosen = max(fresh, key=fresh.get)
        tested += [("grow", len(members), site, value, site == chosen) for site, value in fresh.items()]
        members, reached = [*members, chosen], fresh[chosen]
    return members, reached


def prune(faithfulness: Faithfulness, members: Sequence[str], floor: float, tested: list[tuple]) -> None:
    """Drop the member whose removal leaves most, as long as that is `floor` or more."""
    for number in range(len(members) - 1):
        left = faithfulness.of([[site for site in members if site != gone] for gone in members])
        best = int(np.argmax(left))
        spare = left[best] >= floor
        tested += [
            ("prune", number, site, value, spare and index == best)
            for index, (site, value) in enumerate(zip(members, left, strict=True))
        ]
        if not spare:
            return
        members = [site for site in members if site != members[best]]
