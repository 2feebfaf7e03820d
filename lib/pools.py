"""Groups of pairs that can share a pass, and the activations that means and resamples are taken from.

Pairs of one group have one half, template and length, and their roles stand at the same tokens: they may run in one
batch without padding, and a token position means the same in all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.hooks import Site
from lib.models import Model
from lib.single_pass import Activations, base_run
from lib.tasks import Pair


def group_of(pair: Pair) -> tuple:
    """What pairs must share to run in one pass and to lend each other means and resamples: half, template, the
    number of tokens, and where the roles stand."""
    return pair.half, pair.task, pair.template, len(pair.clean.ids), tuple(sorted(pair.clean.roles.items()))


def grouped(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Pairs by `group_of`, in the order of first appearance."""
    groups: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(group_of(pair), []).append(pair)
    return list(groups.values())


def lenders(pair: Pair, pairs: Iterable[Pair]) -> bool:
    """Whether another quad of the pair's group is there to take a mean or a resample from."""
    own = group_of(pair)
    return any(other.quad_id != pair.quad_id and group_of(other) == own for other in pairs)


def spread(pairs: Sequence[Pair], count: int | None) -> list[Pair]:
    """At most `count` pairs (None: all), from both halves alike and from as many quads as possible, in their order.

    A subset of evenly spaced quads of each half; a quad gives a second pair only after every quad has given one, and
    which of its pairs comes first alternates from quad to quad, so that both sides and both orders are there.
    """
    if count is None or count >= len(pairs):
        return list(pairs)
    ranked: list[tuple[int, float, int]] = []  # (turn of the quad, place within the half, index)
    for half in dict.fromkeys(pair.half for pair in pairs):
        quads: dict[str, list[int]] = {}
        for index, pair in enumerate(pairs):
            if pair.half == half:
                quads.setdefault(pair.quad_id, []).append(index)
        # the golden ratio's multiples spread any first few of them evenly over the list
        places = [(number * 0.6180339887498949) % 1 for number in range(len(quads))]
        for number, (place, own) in enumerate(zip(places, quads.values(), strict=True)):
            turned = own[number % len(own) :] + own[: number % len(own)]
            ranked += [(turn, place, index) for turn, index in enumerate(turned)]
    return [pairs[index] for index in sorted(index for _, _, index in sorted(ranked)[:count])]


def token_ids(model: Model, prompts: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([list(ids) for ids in prompts], device=model.device)


@dataclass(frozen=True)
class Pool:
    """Plain activations of every prompt of a group, with the superset and the quad each belongs to."""

    activations: Activations
    superset: np.ndarray
    quad: np.ndarray

    def weights(self, pair: Pair, ablation: str, seed: int) -> np.ndarray:
        """How much each prompt counts in this pair's mean (summing to one), or the one-hot choice of a resample.

        Prompts of the pair's own quad never count; every superset that is left counts alike.
        """
        free = self.quad != pair.quad_id
        present = np.unique(self.superset[free])
        if not len(present):
            raise ValueError(
                f"pair {pair.pair_id}: no other quad of its half, template and token counts to take a {ablation} from; "
                "use ablations zero and counterfactual, or give more pairs of these token counts"
            )
        if ablation == "mean":
            weights = np.zeros(len(free))
            for superset in present:
                own = free & (self.superset == superset)
                weights[own] = 1 / (len(present) * own.sum())
            return weights
        # the choice depends on the pair and the seed alone, not on what else is swept or in which order
        digest = hashlib.sha256(f"{seed}|{pair.pair_id}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        chosen = rng.choice(np.flatnonzero(free & (self.superset == rng.choice(present))))
        return (np.arange(len(free)) == chosen).astype(float)


def pooled(
    model: Model, kept: dict[tuple, Pool], pairs: Sequence[Pair], like: Pair, role: str, sets: Sequence[Sequence[Site]]
) -> Pool:
    """The pool of the group that `like` is in, from the prompts of `pairs`; only the last one is kept."""
    key = pool_key(like, role, sets)
    if key not in kept:
        kept.clear()
        pool, batches = unfilled(model, pairs, like)
        parts = [base_run(model, ids, like.clean.roles[role], key[-1]).activations for ids in batches]
        pool.activations.update({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
        kept[key] = pool
    return kept[key]


def pool_key(like: Pair, role: str, sets: Sequence[Sequence[Site]]) -> tuple:
    """What tells the pools of a sweep apart: the group, the role and, last, the components."""
    return group_of(like), role, tuple(sorted({site.component for sites in sets for site in sites}))


def unfilled(model: Model, pairs: Sequence[Pair], like: Pair) -> tuple[Pool, list[Tensor]]:
    """The pool of the group that `like` is in without its activations, and the batches of prompts that give them."""
    prompts: dict[tuple[int, ...], tuple[str, str]] = {}
    for pair in pairs:
        if group_of(pair) == group_of(like):
            prompts.setdefault(pair.clean.ids, (pair.candidates[pair.answer], pair.quad_id))
            prompts.setdefault(pair.corrupt.ids, (pair.candidates[pair.corrupt_answer], pair.quad_id))
    supersets, quads = (np.array(column) for column in zip(*prompts.values(), strict=True))
    ids = list(prompts)
    return Pool({}, supersets, quads), [token_ids(model, ids[at : at + 16]) for at in range(0, len(ids), 16)]


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Rows of weights times (prompts, positions, width), in fp64 and back: a mean must not drift with the dtype."""
    if ((weights == 0) | (weights == 1)).all():  # a resample is a copy, to the bit
        return values[weights.argmax(1).to(values.device)]
    return torch.einsum("kn,npw->kpw", weights.to(values.device), values.double()).to(values.dtype)
