"""One job of a sweep: pairs that share their passes, and every row that is made of them.

1. Run both prompts of each pair plainly.
2. Lay out the sources: zeros, means, a resampled prompt's values, the other run of the pair, or values of one's own.
3. Grow, prove and score passes of as many rows as the memory budget allows; one that does not fit is halved.
4. Put the numbers of each row into the design's columns.
"""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lib import metrics
from lib.hooks import Model, Site
from lib.single_pass import (
    Activations,
    BaseRun,
    Grown,
    Row,
    base_run,
    index_batches,
    joined,
    prove_base_rows,
    prove_rows,
    row_limit,
    token_ids,
)
from lib.tasks import Pair


def group_of(pair: Pair) -> tuple:
    """What pairs must share to run in one pass and to lend each other means and resamples: half, template, the
    number of tokens, and where the roles stand."""
    return pair.half, pair.task, pair.template, len(pair.clean.ids), tuple(sorted(pair.clean.roles.items()))


def grouped(pairs: Sequence[Pair], size: int | None = None) -> list[list[Pair]]:
    """Pairs by `group_of`, at most `size` together, in their order; groups in the order of first appearance."""
    places = index_batches([group_of(pair) for pair in pairs], size or max(1, len(pairs)))
    return [[pairs[place] for place in own] for own in places]


def both_runs(
    model: Model, pairs: Sequence[Pair], positions: Sequence[int], components: Sequence[str]
) -> tuple[BaseRun, BaseRun]:
    """Plain runs of the clean and of the corrupt prompts of pairs that share a group, with their caches: one pass for
    both sides, so that the weights are read once."""
    prompts = [pair.clean.ids for pair in pairs] + [pair.corrupt.ids for pair in pairs]
    plain = base_run(model, token_ids(model, prompts), positions, components)
    return plain.part(0, len(pairs)), plain.part(len(pairs), 2 * len(pairs))


def distinct_prompts(pairs: Iterable[Pair]) -> dict[tuple[int, ...], tuple[Pair, str]]:
    """Every prompt of the pairs once, by its token ids: the first pair that has it, and its side there (`clean` or
    `corrupt`). In the order of the pairs, clean before corrupt."""
    prompts: dict[tuple[int, ...], tuple[Pair, str]] = {}
    for pair in pairs:
        prompts.setdefault(pair.clean.ids, (pair, "clean"))
        prompts.setdefault(pair.corrupt.ids, (pair, "corrupt"))
    return prompts


def has_donors(pair: Pair, pairs: Iterable[Pair]) -> bool:
    """Whether another quad of the pair's group is there to take a mean or a resample from."""
    own = group_of(pair)
    return any(other.quad_id != pair.quad_id and group_of(other) == own for other in pairs)


def subsample(pairs: Sequence[Pair], count: int | None) -> list[Pair]:
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


# Rows of full-vocabulary logits held at once: larger blocks go back to the system and are faulted in anew each time.
LOGIT_ROWS = 128
# How torch, CUDA's libraries and the system itself say that memory has run out, where torch raises no OutOfMemoryError.
SHORT = ("not enough memory", "out of memory", "ALLOC_FAILED", "Cannot allocate memory")

Work, Result = TypeVar("Work"), TypeVar("Result")
Grow = Callable[[Model, BaseRun, Sequence[Row], Activations], Grown]
# From the pairs, their base runs and their other runs: for each variant, what the sites are replaced by.
Variants = Callable[[Sequence[Pair], BaseRun, BaseRun], Mapping[str, Activations]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairBatch:
    """Pairs that share their passes, and what is done to them."""

    model: Model
    pairs: list[Pair]
    direction: str
    role: str
    sets: list[tuple[Site, ...]]
    kinds: tuple[str, ...]
    seed: int
    memory: float
    profile: str
    grow: Grow
    needs: tuple[str, ...]
    variants: Variants | None = None

    @property
    def components(self) -> list[str]:
        """Components of the sites."""
        return sorted({site.component for sites in self.sets for site in sites})

    def run(self, pool: Callable[[], Pool], halved: list[str]) -> pd.DataFrame:
        """Every set of sites x kind x pair, proved and scored. `pool` makes the pool when a kind needs it."""
        count = len(self.pairs)
        plain = base_run(self.model, self.ids, self.positions, self.kept)
        runs = {"clean": plain.part(0, count), "corrupt": plain.part(count, 2 * count)}
        base, other = self.sides(runs)
        sources = self.of_variants(base, other) if self.variants else self.sources(other, pool)
        rows = self.rows()
        return self.frame(rows, self.scored(base, rows, sources, halved), runs)

    @property
    def ids(self) -> Tensor:
        """Both prompts of each pair, clean ones first: one plain run for both sides, so the weights are read once."""
        prompts = [pair.clean.ids for pair in self.pairs] + [pair.corrupt.ids for pair in self.pairs]
        return token_ids(self.model, prompts)

    @property
    def positions(self) -> tuple[int, ...]:
        """The tokens of the role."""
        return self.pairs[0].clean.roles[self.role]

    @property
    def kept(self) -> list[str]:
        """Components whose plain activations are kept."""
        return sorted({*self.components, *self.needs})

    def sides(self, runs: Mapping[str, BaseRun]) -> tuple[BaseRun, BaseRun]:
        """The run that is edited and the other one of the pairs."""
        return (runs["clean"], runs["corrupt"]) if self.direction == "noise" else (runs["corrupt"], runs["clean"])

    def rows(self) -> list[Row]:
        """Every pair x kind x set of sites, in this order."""
        owners, kinds = range(len(self.pairs)), range(len(self.kinds))
        return [Row(s, owner, kind * len(owners) + owner) for owner in owners for kind in kinds for s in self.sets]

    def sources(self, other: BaseRun, pool: Callable[[], Pool]) -> Activations:
        """(kinds x pairs, positions, width) for each component of the sites and layer."""
        parts = []
        own = {key: value for key, value in other.activations.items() if key[0] in self.components}
        for kind in self.kinds:
            if kind in ("counterfactual", "clean"):
                parts.append(own)
            elif kind == "zero":
                parts.append({key: torch.zeros_like(value) for key, value in own.items()})
            else:
                lent = pool()
                weights = torch.tensor(np.stack([lent.weights(pair, kind, self.seed) for pair in self.pairs]))
                parts.append({key: weighted(weights, lent.activations[key]) for key in own})
        return {key: torch.cat([part[key] for part in parts]) for key in own}

    def of_variants(self, base: BaseRun, other: BaseRun) -> Activations:
        """As `sources`, of values that the caller makes."""
        made = self.variants(self.pairs, base, other)
        modules = {(site.component, site.layer) for sites in self.sets for site in sites}
        return {key: torch.cat([made[kind][key] for kind in self.kinds]) for key in modules}

    def scored(self, base: BaseRun, rows: list[Row], sources: Activations, halved: list[str]) -> dict[str, np.ndarray]:
        """Run the rows in passes within the memory budget; per-row numbers, in the order of the rows."""
        limit = row_limit(self.model, base, self.memory)

        def halves(rows: list[Row]) -> tuple[str, list[list[Row]]] | None:
            if len(rows) == 1:
                return None
            middle, words = len(rows) // 2, f"{len(rows)} rows of pairs {self.pairs[0].pair_id} ... halved and retried"
            return words, [rows[:middle], rows[middle:]]

        def attempt(rows: list[Row]) -> dict[str, np.ndarray]:
            return self.one_pass(base, rows, sources)

        parts: list[dict[str, np.ndarray]] = []
        for at in range(0, len(rows), limit):
            parts += with_less_memory(attempt, rows[at : at + limit], halves, halved)
        return joined(parts)

    def one_pass(self, base: BaseRun, rows: list[Row], sources: Activations) -> dict[str, np.ndarray]:
        """Grow, prove and score one pass; where candidates have two tokens, one more for each of them."""
        grown = self.grow(self.model, base, rows, sources)
        runs = (base_run(self.model, ids, base.positions, self.kept) for ids in self.said(base.ids))
        return self.numbers(base, rows, grown, [self.grow(self.model, run, rows, sources) for run in runs])

    def numbers(self, base: BaseRun, rows: list[Row], grown: Grown, said: Sequence[Grown]) -> dict[str, np.ndarray]:
        """Prove and score a pass. `said` has the same rows after the first token of each candidate of two."""
        prove_rows(self.model, grown, lambda index: self.describe(rows[index]))
        prove_base_rows(self.model, base, grown, lambda index: f"pair {self.pairs[index].pair_id}")
        owner = np.array([row.owner for row in rows])
        base_logits = self.model.logits(grown.base)
        before = self.metrics(base_logits, base_logits, np.arange(len(self.pairs)))
        after = self.metrics_of_rows(grown, base_logits, owner, rows)
        out = {f"{key}_before": value[owner] for key, value in before.items()}
        out |= {f"{key}_after": value for key, value in after.items()}
        out |= {"site_delta": grown.site_delta.numpy(), "fired": grown.fired.numpy()}
        if grown.arrived is not None:
            out["arrived"] = grown.arrived.numpy()
        if said:
            second = self.second_tokens(rows, said)
            for when, chosen in (("before", owner), ("after", len(self.pairs) + np.arange(len(rows)))):
                both = out[f"candidate_logits_{when}"] + second[chosen]
                answers = np.array([self.pairs[index].answer for index in owner])
                out[f"metric_both_{when}"] = metrics.margins(both, answers)[0]
        return out

    def metrics_of_rows(self, grown: Grown, base_logits: Tensor, owner: np.ndarray, rows: list[Row]) -> dict:
        """Metrics of the patched rows, a block of rows of logits at a time."""
        parts, block = [], logit_rows(self.model)
        for at in range(0, len(rows), block):
            chunk = slice(at, at + block)
            logits = self.model.logits(grown.hidden[chunk])
            try:
                parts.append(self.metrics(logits, base_logits, owner[chunk]))
            except ValueError as error:
                broken = torch.nonzero(~torch.isfinite(logits).all(-1))
                if not len(broken):
                    raise
                where = self.describe(rows[at + int(broken[0])])
                raise ValueError(f"{where}: NaN or infinite logits; try dtype float32 or bfloat16") from error
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def metrics(self, logits: Tensor, base_logits: Tensor, owner: np.ndarray) -> dict[str, np.ndarray]:
        """`metrics.from_logits` with this job's answers and candidates, as a dict of arrays."""
        tokens = [pair.clean_tokens if self.direction == "noise" else pair.corrupt_tokens for pair in self.pairs]
        return vars(metrics.from_logits(logits, base_logits, torch.tensor(owner), **answers_of(self.pairs, tokens)))

    def said(self, ids: Tensor) -> list[Tensor]:
        """The base prompts with each candidate's first token appended, as if it had been said; where candidates have
        two tokens."""
        if not self.pairs[0].clean_seconds:
            return []
        tokens = [pair.clean_tokens if self.direction == "noise" else pair.corrupt_tokens for pair in self.pairs]
        return [torch.cat([ids, first[:, None]], dim=1) for first in torch.tensor(tokens, device=ids.device).T]

    def second_tokens(self, rows: list[Row], said: Sequence[Grown]) -> np.ndarray:
        """Logits of each candidate's second token after its first, (pairs + rows, candidates): base rows lead."""
        columns = []
        for index, grown in enumerate(said):
            own = (pair.clean_seconds if self.direction == "noise" else pair.corrupt_seconds for pair in self.pairs)
            second = [tokens[index] for tokens in own]
            wanted = torch.tensor(second + [second[row.owner] for row in rows])
            logits = self.model.logits(torch.cat([grown.base, grown.hidden])).cpu()
            columns.append(logits[torch.arange(len(logits)), wanted].numpy())
        return np.stack(columns, axis=1)

    def describe(self, row: Row) -> str:
        sites = ", ".join(f"layer {s.layer} {s.component}" + (f" {s.head}" if s.head >= 0 else "") for s in row.sites)
        kind = self.kinds[row.source // len(self.pairs)]
        return f"pair {self.pairs[row.owner].pair_id}, {self.direction} {kind} at {self.role}, {sites}"

    def frame(self, rows: list[Row], scored: dict[str, np.ndarray], runs: dict[str, BaseRun]) -> pd.DataFrame:
        """The tidy rows with the design's columns."""
        pairs, count = self.pairs, len(rows)
        owner = np.array([row.owner for row in rows])
        candidates = np.array([pair.candidates for pair in pairs])
        columns: dict[str, object] = {
            "layer": np.array([row.sites[0].layer for row in rows], dtype=np.int32),
            "component": np.array([row.sites[0].component for row in rows]),
            "head": np.array([row.sites[0].head for row in rows], dtype=np.int32),
            "metric_before": scored["metric_before"],
            "metric_after": scored["metric_after"],
            "profile": np.repeat(self.profile, count),
        }
        for field in ("task", "template", "pair_id", "quad_id", "half"):
            columns[field] = np.array([getattr(pair, field) for pair in pairs])[owner]
        columns |= {
            "direction": np.repeat(self.direction, count),
            "ablation": np.array([self.kinds[row.source // len(pairs)] for row in rows]),
            "position": np.repeat(self.role, count),
            "seed": np.full(count, self.seed, dtype=np.int64),
        }
        for which, base in runs.items():
            tokens = [pair.clean_tokens if which == "clean" else pair.corrupt_tokens for pair in pairs]
            logits = self.model.logits(base.hidden)
            plain = metrics.from_logits(logits, logits, torch.arange(len(pairs)), **answers_of(pairs, tokens))
            columns[f"metric_{which}"] = plain.metric[owner]
            columns[f"logit_diff_{which}"] = plain.logit_diff[owner]
        columns["answer"] = candidates[owner, [pairs[index].answer for index in owner]]
        for when in ("before", "after"):
            columns[f"logit_diff_{when}"] = scored[f"logit_diff_{when}"]
            columns[f"foil_{when}"] = candidates[owner, scored[f"foil_{when}"]]
            columns[f"logits_{when}"] = list(scored[f"candidate_logits_{when}"].astype(np.float32))
            columns[f"label_logits_{when}"] = list(scored[f"label_logits_{when}"].astype(np.float32))
            columns[f"candidate_probability_{when}"] = scored[f"candidate_probability_{when}"]
            if f"metric_both_{when}" in scored:
                columns[f"metric_both_{when}"] = scored[f"metric_both_{when}"]
        ids, inverse = np.unique(scored["top_token_after"], return_inverse=True)
        words = self.model.tokenizer
        columns["top_token_after"] = np.array([words.decode([i]) if words else str(i) for i in ids.tolist()])[inverse]
        for key in ("top_logit", "logsumexp", "rank", "kl"):
            columns[f"{key}_after"] = scored[f"{key}_after"]
        columns |= {key: scored[key] for key in ("site_delta", "fired", "arrived") if key in scored}
        columns["site_set"] = np.tile(np.arange(len(self.sets)), count // len(self.sets))
        return pd.DataFrame(columns)


def with_less_memory(
    attempt: Callable[[Work], Result],
    work: Work,
    smaller: Callable[[Work], tuple[str, list[Work]] | None],
    halved: list[str],
) -> list[Result]:
    """`attempt(work)`, or when memory runs out, of smaller pieces of work one after the other: the one way to halve.

    `smaller` says in words what is done instead, and gives the pieces; None where work is as small as it can be, and
    the error is raised. Each time leaves a line in the log and in `halved`.
    """
    try:
        return [attempt(work)]
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_short(error) or (pieces := smaller(work)) is None:
            raise
    # outside of the except block, which holds on to the failed passes; they and what they hand each other are a circle
    line = f"out of memory: {pieces[0]}"
    log.warning(line)
    halved.append(line)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [result for piece in pieces[1] for result in with_less_memory(attempt, piece, smaller, halved)]


def is_short(error: Exception) -> bool:
    """Whether an error says that memory has run out."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in SHORT)


def logit_rows(model: Model) -> int:
    """LOGIT_ROWS for fp32 on a CPU; more where the unembedding is cast to fp32 for each block, or a device keeps its
    memory."""
    weight = model.unembed.weight
    return LOGIT_ROWS if weight.dtype == torch.float32 and weight.device.type == "cpu" else 8 * LOGIT_ROWS


def answers_of(pairs: Sequence[Pair], tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The arguments of `metrics.from_logits` that name answers, candidates and labels, one row per pair."""
    return {
        "candidate_tokens": torch.tensor([list(row) for row in tokens]),
        "answer": torch.tensor([pair.answer for pair in pairs]),
        "corrupt_answer": torch.tensor([pair.corrupt_answer for pair in pairs]),
        "label_tokens": torch.tensor(list(pairs[0].label_tokens), dtype=torch.long),
    }
