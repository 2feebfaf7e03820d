"""Circuits: what is left of the task when every head and MLP outside a set is resampled?

F(C) is the clean prompt's logit_diff when each head and MLP keeps what it computes, in that very run, if it is in C,
and otherwise has the value of another prompt (Wang et al. 2022, section 3): at the last token alone (`AT_LAST`), where
all tokens before it stay as they are, or at every token from the first name on (`EVERYWHERE`), where a site of C has a
role. Embeddings are the clean prompt's. F(everything) is the model; F(nothing) is that other prompt's.

1. `ready` runs the clean prompts plainly, which lends their KV cache; the donors' activations at those tokens are kept.
2. `masked` runs those tokens once for all circuits. Circuits that agree up to a layer are one row up to there: the
   rows branch like a tree (`branches`), so that nothing is computed twice. A module is run only for the rows (an MLP:
   the tokens of rows) that keep something of it; the others are given the donor's output.
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
from lib.single_pass import (
    Activations,
    BaseRun,
    SharedPrefix,
    SweepError,
    base_run,
    joiner,
    row_limit,
    suffix,
    token_ids,
)
from lib.sweep import SHARED_ROW_TOKENS
from lib.tasks import Pair
from lib.weights import Shape


class Circuit(NamedTuple):
    """Heads and MLPs, by name (21.6, mlp 23 at names; without a role: at last): the only ones that are kept, or the
    only ones that are not."""

    only: bool
    sites: tuple[str, ...]


ALL, NOTHING = Circuit(False, ()), Circuit(True, ())
AT_LAST = ("last",)
EVERYWHERE = ("names", "rest", "between", "last")  # rest: what stands between the names
COMPONENTS = ("head", "mlp", "attn", "resid", "embed")  # whose values donors give
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
    sources: Activations  # (kinds x pairs, tokens, width)
    roles: tuple[str, ...]  # whose tokens are run
    alike: Bool[Tensor, " donors"]  # whether the donor ends in the same token
    memory: float  # GB that a pass may take


def ready(
    model: Model,
    pairs: Sequence[Pair],
    ablations: Sequence[str] = ("resample",),
    pool: Sequence[Pair] | None = None,
    seed: int = 0,
    memory: float = 2.0,
    roles: Sequence[str] = AT_LAST,
) -> list[Ready]:
    """The pairs with everything that their circuits are tested with, a batch of one group at a time. SweepError where
    a donor of `EVERYWHERE` has other tokens before the names: nothing would stand for them.

    Another prompt of the pair's group in `pool` (default: `pairs`), of another class than the pair's two, gives the
    values of `resample`, the pair's corrupt prompt those of `counterfactual`.
    """
    out = []
    for batch in grouped(pairs, BATCH):
        tokens = tokens_of(batch[0], roles)
        clean = base_run(model, token_ids(model, [pair.clean.ids for pair in batch]), tokens, COMPONENTS)
        ids = [
            pair.corrupt.ids if kind == "counterfactual" else resampled(pair, pool or pairs, seed)
            for kind in ablations
            for pair in batch
        ]
        donors = base_run(model, token_ids(model, ids), tokens, COMPONENTS, cache=False)
        same = donors.ids == clean.ids.repeat(len(ablations), 1)
        if roles != AT_LAST and not same[:, : tokens[0]].all():
            raise SweepError(
                f"pair {batch[0].pair_id} and others of its template: prompts differ before the names, where a circuit "
                "over all tokens has no site"
            )
        own = (donors.activations, tuple(roles), same[:, -1].cpu())
        out.append(Ready(batch, tuple(ablations), clean, *own, memory))
    return out


def tokens_of(pair: Pair, roles: Sequence[str]) -> range:
    """The tokens that are run: from the first one of the roles on; of the rest, what stands before the names is not."""
    own = pair.clean.roles
    return range(min(min(own[role]) for role in roles if role in own and role != "rest"), len(pair.clean.ids))


def role_at(pair: Pair, roles: Sequence[str]) -> list[int]:
    """Which of the roles each token that is run has."""
    own = {token: number for number, role in enumerate(roles) for token in pair.clean.roles.get(role, ())}
    return [own[token] for token in tokens_of(pair, roles)]


def roles_of(pair: Pair, roles: Sequence[str] = EVERYWHERE) -> list[str]:
    """Those of the roles that tokens which are run have."""
    return [roles[number] for number in sorted({*role_at(pair, roles)})]


def resampled(pair: Pair, pool: Sequence[Pair], seed: int) -> tuple[int, ...]:
    """The prompt that gives a pair its values: the one that `sweep.run` resamples from with this seed."""
    donors = Pool.of(pool, pair)
    return donors.prompts[int(donors.weights(pair, "resample", seed).argmax())]


# --- the pass -----------------------------------------------------------------------------------------------------


def kept_parts(
    model: Model | Shape, circuits: Sequence[Circuit], roles: Sequence[str] = AT_LAST
) -> Bool[np.ndarray, "circuits layers parts roles"]:
    """Which heads (parts 0 ...) and MLPs (the last part) each circuit keeps. ValueError for sites the model lacks."""
    out = np.zeros((len(circuits), model.n_layers, model.n_heads + 1, len(roles)), dtype=bool)
    for kept, circuit in zip(out, circuits, strict=True):
        kept[:] = not circuit.only
        for name, _, role in (name.partition(" at ") for name in circuit.sites):
            site = site_of(name)
            hooks.check_site(model, site)
            if site.component not in ("head", "mlp") or (role or "last") not in roles:
                allowed = f"its sites are heads and MLPs at {', '.join(roles)}"
                raise ValueError(f"{site} at {role or 'last'} cannot be in a circuit: {allowed}")
            kept[site.layer, site.head, roles.index(role or "last")] = circuit.only  # an MLP's head is -1: the last
    return out


class Branch(NamedTuple):
    """The rows of one layer."""

    parent: Int[np.ndarray, " rows"]  # the row of the layer before that each one continues
    kept: Bool[np.ndarray, "rows parts tokens"]


def branches(
    kept: Bool[np.ndarray, "circuits layers parts tokens"],
) -> tuple[list[Branch], Int[np.ndarray, " circuits"]]:
    """For each layer the distinct ways in which circuits have gone up to it; and each circuit's row in the last."""
    out, row = [], np.zeros(len(kept), dtype=np.int64)
    for layer in range(kept.shape[1]):
        way = np.column_stack([row, np.packbits(kept[:, layer].reshape(len(kept), -1), axis=1)])
        _, first, again = np.unique(way, axis=0, return_index=True, return_inverse=True)
        out.append(Branch(row[first], kept[first, layer]))
        row = again.reshape(-1)
    return out, row


@dataclass(frozen=True)
class Rows:
    """The rows of a pass: each state of the tree has one for every donor."""

    donors: int
    owner: Int[Tensor, " donors"]  # each donor's prompt
    cache: SharedPrefix

    def of(self, states: Int[np.ndarray, " states"], like: Tensor) -> Int[Tensor, " rows"]:
        """The rows of these states, on the device of `like`."""
        return (torch.from_numpy(states)[:, None] * self.donors + torch.arange(self.donors)).flatten().to(like.device)

    def given(self, values: Tensor, hidden: Tensor) -> Tensor:
        """The donors' output of a module, in every row."""
        return values.to(hidden).repeat(len(hidden) // self.donors, 1, 1)

    def attention(self, compute: Callable, values: Tensor, states: Int[np.ndarray, " states"]) -> Callable:
        """An attention module's `forward`: computed in the rows of these states, the donor's in all others."""

        def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            hidden, args, kwargs = hooks.split_call(args, kwargs)
            out = self.given(values, hidden)
            if len(states):
                rows, self.cache.owner = self.of(states, hidden), self.owner.repeat(len(states))
                out[rows] = hooks.first_tensor(compute(hidden[rows], *args, **kwargs))
            return out, None

        return forward

    def mlp(self, compute: Callable, values: Tensor, some: Bool[np.ndarray, "states tokens"]) -> Callable:
        """An MLP's `forward`: computed at these tokens of states, the donor's at all others."""
        places = np.nonzero(some)

        def forward(hidden: Tensor) -> Tensor:
            out = self.given(values, hidden)
            if len(places[0]):
                state, token = (torch.from_numpy(part).to(hidden.device) for part in places)
                own = compute(hidden.unflatten(0, (-1, self.donors))[state, :, token])
                out.unflatten(0, (-1, self.donors))[state, :, token] = hooks.first_tensor(own)
            return out

        return forward


@torch.no_grad()
def masked(
    model: Model, base: BaseRun, sources: Activations, kept: Bool[np.ndarray, "circuits layers parts tokens"]
) -> Float[Tensor, "circuits donors hidden"]:
    """Final hidden states of every circuit at the last token, in one pass over the tokens at the base's positions.

    `sources` are (donors, tokens, width): a whole number of times as many as there are prompts, each time in their
    order.
    """
    tree, place = branches(kept)
    start, donors = min(base.positions), len(sources["mlp", 0])
    owner = torch.arange(donors, device=base.ids.device) % len(base.ids)
    inputs, narrow = suffix(base, start, owner, base.ids[:, start:]), joiner(owner[:0], len(base.ids))
    rows = Rows(donors, owner, inputs["past_key_values"])
    handles: list = []
    forwards: list = []
    for layer, branch in enumerate(tree):
        states = np.flatnonzero(branch.kept[:, :-1].any((1, 2)))
        heads = torch.from_numpy(branch.kept[states, :-1].swapaxes(1, 2))[:, None, ..., None]

        def split(
            block: nn.Module, args: tuple, kwargs: dict, layer: int = layer, parent: Any = branch.parent
        ) -> tuple:
            (hidden, *args), kwargs = narrow(block, args, kwargs)
            own = owner.repeat(len(parent)).to(hidden.device) if layer == 0 else rows.of(parent, hidden)
            return (hidden[own], *args), kwargs

        def mix(z: Tensor, layer: int = layer, heads: Tensor = heads) -> Tensor:
            parts, other = (each.unflatten(-1, (model.n_heads, -1)) for each in (z, sources["head", layer].to(z)))
            return torch.where(heads.to(z.device), parts.unflatten(0, (-1, donors)), other).view(z.shape)

        handles.append(model.blocks[layer].register_forward_pre_hook(split, with_kwargs=True))
        handles.append(hooks.on_activation(model, layer, "head", mix))
        attn, mlp = model.attns[layer], model.mlps[layer]
        forwards.append((attn, rows.attention(attn.forward, sources["attn", layer], states)))
        forwards.append((mlp, rows.mlp(mlp.forward, sources["mlp", layer], branch.kept[:, -1])))
    with hooks.removing(handles), hooks.with_forwards(forwards):
        hidden = model.body(**inputs).last_hidden_state[:, -1]
    return hidden.unflatten(0, (-1, donors))[torch.from_numpy(place).to(hidden.device)]


@torch.no_grad()
def scored(model: Model, ready: Ready, circuits: Sequence[Circuit]) -> Float[np.ndarray, "circuits kinds pairs C"]:
    """The candidates' logits under everything, nothing and every circuit. SweepError unless that of everything is the
    model and that of nothing the donors'."""
    count, kinds = len(ready.pairs), len(ready.kinds)
    kept = kept_parts(model, [ALL, NOTHING, *circuits], ready.roles)[..., role_at(ready.pairs[0], ready.roles)]
    limit = min(row_limit(model, ready.base, ready.memory), SHARED_ROW_TOKENS // len(ready.base.positions))
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
        noise = model.noise_of(logits[:2])
        if not (off <= noise).all():
            which, index = torch.nonzero(~(off <= noise))[0].tolist()
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
        self.largest = 0.0  # logit
        whole, self.nothing = self.differences([])
        self.whole, self.gap = whole, whole - self.nothing
        noise = hooks.at_size(model.floor, self.largest) * sum(len(batch.pairs) for batch in batches)
        self.noise = noise / self.gap if self.gap > noise else np.inf  # as a share

    def differences(self, circuits: Sequence[Circuit]) -> Float[np.ndarray, " circuits"]:
        """Sum of logit_diff over pairs under everything, nothing and every circuit."""
        total = 0.0
        for batch in self.batches:
            logits, index = scored(self.model, batch, circuits)[:, 0].astype(float), np.arange(len(batch.pairs))
            answers = np.array([(pair.answer, pair.corrupt_answer) for pair in batch.pairs]).T
            self.largest = max(self.largest, np.abs(logits).max())
            total += (logits[:, index, answers[0]] - logits[:, index, answers[1]]).sum(1)
        return total

    def least(self, share: float, reached: float) -> float:
        """What pruning must leave: the share, or where it was not reached all that was, less the model's noise, so that
        no member stays for less than that."""
        return share if reached >= share else reached - self.noise

    def of(self, members: Sequence[Sequence[str]]) -> list[float]:
        """Of the circuits that keep these members alone."""
        sums = self.differences([Circuit(True, tuple(kept)) for kept in members])[2:]
        return ((sums - self.nothing) / self.gap).tolist()

    def lost(self, sites: Sequence[str]) -> dict[str, float]:
        """What goes with each of these sites alone, all others kept."""
        found: list[float] = []
        for at in range(0, len(sites), QUEUE):
            sums = self.differences([Circuit(False, (site,)) for site in sites[at : at + QUEUE]])[2:]
            found += ((self.whole - sums) / self.gap).tolist()
        return dict(zip(sites, found, strict=True))


def search(
    model: Model, pairs: Sequence[Pair], sites: Sequence[str], share: float, limit: int, **how: Any
) -> pd.DataFrame:
    """Grow a circuit from nothing, then prune it; every circuit that was tested, in order (`SEARCH_SCHEMA`).

    `how` goes to `ready`. Empty where the model has nothing to keep that is above its noise.
    """
    faithfulness, tested = Faithfulness(model, ready(model, pairs, **how)), []
    if faithfulness.noise < np.inf:
        members, reached = grow(faithfulness, sites, share, min(limit, len(sites)), tested)
        prune(faithfulness, members, faithfulness.least(share, reached), tested)
    frame = pd.DataFrame(tested, columns=list(SEARCH_SCHEMA.columns))
    return frame.astype({"round": "int64", "faithfulness": float, "chosen": bool, "phase": str, "site": str})


def grow(
    faithfulness: Faithfulness, sites: Sequence[str], share: float, limit: int, tested: list[tuple]
) -> tuple[list[str], float]:
    """Each round the site joins that adds most, until `share` or `limit` sites are reached: the members, and their
    faithfulness.

    Sites are tested from the head of a queue ordered by what each added when last tested, until none behind is known
    for more (Minoux 1978); sites that work only together break that order, so all of them are tested anew at the sizes
    REFRESH. Of a chain, in which one site reads another, neither adds anything before the other is there: as long as
    less is reached than a site of `limit` must add on average, and wherever none adds a tenth of that, the one joins
    without which the model loses most.
    """
    members: list[str] = []
    reached, gains, lost, average = 0.0, dict.fromkeys(sites, np.inf), {}, share / limit
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
        if fresh[chosen] < average or fresh[chosen] - reached < max(average / 10, faithfulness.noise):
            lost = lost or faithfulness.lost(sites)
            chosen = max((site for site in sites if site not in members), key=lost.get)
            if chosen not in fresh:
                fresh |= {chosen: faithfulness.of([[*members, chosen]])[0]}
            gains = dict.fromkeys(sites, np.inf)
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
