"""One batch of a sweep: pairs that share their passes, and every row that is made of them.

1. Run both prompts of each pair plainly.
2. Lay out the sources: zeros, means, a resampled prompt's values, the other run of the pair, or values of one's own.
3. Grow, prove and score passes of as many rows as the memory budget allows; one that does not fit is halved.
4. Put the numbers of each row into the design's columns.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lib import metrics, single_pass
from lib.hooks import Model, Site
from lib.single_pass import (
    Activations,
    BaseRun,
    Grown,
    Row,
    SweepError,
    base_run,
    index_batches,
    joined,
    plain_runs,
    token_ids,
)
from lib.tasks import Pair, token_texts

ABLATIONS = ("zero", "mean", "resample", "counterfactual")
NEUTRAL = ("resample", "mean")  # what other quads give takes the side of neither class of a pair (`neutral_classes`)
DIRECTIONS = ("noise", "denoise")
# Rows of full-vocabulary logits held at once: larger blocks go back to the system and are faulted in anew each time.
LOGIT_ROWS = 128
POOL_BATCH = 16  # prompts of a pool to a plain run
# Columns of the tidy rows that are taken as they were scored.
BOTH = ("logit_diff", "candidate_probability", "metric_both")  # before and after
AS_SCORED = [f"{name}_before" for name in BOTH]
AS_SCORED += [f"{name}_after" for name in (*BOTH, "top_logit", "logsumexp", "rank", "kl")]
AS_SCORED += ["site_delta", "fired", "arrived"]
# How torch, CUDA's libraries and the system itself say that memory has run out, where torch raises no OutOfMemoryError.
SHORT = ("not enough memory", "out of memory", "ALLOC_FAILED", "Cannot allocate memory")

Ids = tuple[int, ...]
Runs = tuple[BaseRun, BaseRun]
Sets = Sequence[Sequence[Site]]
Grow = Callable[[Model, BaseRun, Sequence[Row], Activations], Grown]
# From the pairs, their base runs and their other runs: for each variant, what the sites are replaced by.
Variants = Callable[[Sequence[Pair], BaseRun, BaseRun], Mapping[str, Activations]]
Work, Result = TypeVar("Work"), TypeVar("Result")

log = logging.getLogger(__name__)


def group_of(pair: Pair) -> tuple:
    """What pairs must share to run in one pass and to give each other means and resamples: half, template, candidates,
    the number of tokens, and where the roles stand."""
    roles = tuple(sorted(pair.clean.roles.items()))
    return pair.half, pair.task, pair.template, pair.candidates, len(pair.clean.ids), roles


def check_role(pair: Pair, role: str) -> None:
    """ValueError where no token of the pair's prompts has the role."""
    if role not in pair.clean.roles:
        have = ", ".join(pair.clean.roles)
        raise ValueError(f"role {role!r} is not in template {pair.template!r}, pair {pair.pair_id}; it has {have}")


def grouped(pairs: Sequence[Pair], size: int | None = None) -> list[list[Pair]]:
    """Pairs by `group_of`, at most `size` together, in their order; groups in the order of first appearance."""
    places = index_batches([group_of(pair) for pair in pairs], size or max(1, len(pairs)))
    return [[pairs[place] for place in batch] for batch in places]


def classes_of(pair: Pair) -> set[str]:
    """The answers of a pair's two prompts."""
    return {pair.candidates[pair.answer], pair.candidates[pair.corrupt_answer]}


def neutral_classes(pair: Pair, offered: set[str], ablation: str) -> list[str]:
    """The classes, of those that other quads offer, whose prompts can stand for a pair's without taking the side of
    either of its own: a resample is of another class; a mean has both of the pair's own, alike, or neither."""
    own = classes_of(pair)
    return sorted(offered - own if ablation == "resample" or not own <= offered else offered)


def with_donors(pairs: Sequence[Pair], pool: Sequence[Pair], ablation: str) -> list[Pair]:
    """The pairs to which other quads of their group in the pool can give a `mean` or a `resample`; all of them for
    the other kinds of ablation."""
    if ablation not in NEUTRAL:
        return list(pairs)
    offered: dict[tuple, dict[str, set[str]]] = {}  # the classes of each quad, by group
    for other in pool:
        offered.setdefault(group_of(other), {}).setdefault(other.quad_id, set()).update(classes_of(other))

    counts = {group: Counter(itertools.chain.from_iterable(quads.values())) for group, quads in offered.items()}

    def able(pair: Pair) -> bool:
        group = group_of(pair)
        own = offered.get(group, {}).get(pair.quad_id, set())
        others = {name for name, quads in counts.get(group, {}).items() if quads > (name in own)}
        return bool(neutral_classes(pair, others, ablation))

    return [pair for pair in pairs if able(pair)]


def distinct_prompts(pairs: Iterable[Pair]) -> dict[Ids, tuple[Pair, str]]:
    """Every prompt of the pairs once, by its token ids: the first pair that has it, and its side there (`clean` or
    `corrupt`). In the order of the pairs, clean before corrupt."""
    prompts: dict[Ids, tuple[Pair, str]] = {}
    for pair in pairs:
        prompts.setdefault(pair.clean.ids, (pair, "clean"))
        prompts.setdefault(pair.corrupt.ids, (pair, "corrupt"))
    return prompts


def both_runs(model: Model, pairs: Sequence[Pair], positions: Sequence[int], components: Sequence[str]) -> Runs:
    """Plain runs of the clean and of the corrupt prompts of pairs that share a group, with their caches: one pass for
    both sides, so that the weights are read once."""
    plain = base_run(model, both_prompts(model, pairs), positions, components)
    return plain.part(0, len(pairs)), plain.part(len(pairs), 2 * len(pairs))


def both_prompts(model: Model, pairs: Sequence[Pair]) -> Tensor:
    """Token ids of the clean prompts, then of the corrupt ones."""
    return token_ids(model, [pair.clean.ids for pair in pairs] + [pair.corrupt.ids for pair in pairs])


@dataclass(frozen=True)
class Pool:
    """Every prompt of a group, with the superset and the quad it belongs to, and its plain activations."""

    prompts: list[Ids]
    superset: np.ndarray
    quad: np.ndarray
    activations: Activations = field(default_factory=dict)  # (prompts, positions, width); filled where they are needed

    @classmethod
    def of(cls, pairs: Sequence[Pair], like: Pair) -> Pool:
        """The prompts of `pairs` in the group that `like` is in, without activations."""
        prompts = distinct_prompts(pair for pair in pairs if group_of(pair) == group_of(like))
        answers = {"clean": "answer", "corrupt": "corrupt_answer"}
        supersets = [pair.candidates[getattr(pair, answers[side])] for pair, side in prompts.values()]
        return cls(list(prompts), np.array(supersets), np.array([pair.quad_id for pair, _ in prompts.values()]))

    def weights(self, pair: Pair, ablation: str, seed: int) -> np.ndarray:
        """How much each prompt counts in this pair's mean (summing to one), or the one-hot choice of a resample.

        Prompts of the pair's own quad never count; every superset that is left by `neutral_classes` counts alike.
        """
        free = self.quad != pair.quad_id
        present = neutral_classes(pair, set(self.superset[free].tolist()), ablation)
        if not present:
            raise ValueError(
                f"pair {pair.pair_id}: no other quad of its half, template and token counts to take a {ablation} from "
                f"that is of another class than {' and '.join(sorted(classes_of(pair)))}; use ablations zero and "
                "counterfactual, or give more pairs of these token counts"
            )
        if ablation == "mean":
            weights = np.zeros(len(free))
            for superset in present:
                members = free & (self.superset == superset)
                weights[members] = 1 / (len(present) * members.sum())
            return weights
        # the choice depends on the pair and the seed alone, not on what else is swept or in which order
        digest = hashlib.sha256(f"{seed}|{pair.pair_id}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        chosen = rng.choice(np.flatnonzero(free & (self.superset == rng.choice(present))))
        return (np.arange(len(free)) == chosen).astype(float)

    def values(self, pairs: Sequence[Pair], ablation: str, seed: int) -> Activations:
        """Each pair's mean or resample, (pairs, positions, width); in fp64 and back, so that a mean does not drift with
        the dtype."""
        weights = torch.tensor(np.stack([self.weights(pair, ablation, seed) for pair in pairs]))
        if ((weights == 0) | (weights == 1)).all():  # a resample is a copy, to the bit
            return {key: each[weights.argmax(1).to(each.device)] for key, each in self.activations.items()}
        return {
            key: torch.einsum("kn,npw->kpw", weights.to(each.device), each.double()).to(each.dtype)
            for key, each in self.activations.items()
        }


def components_of(sets: Sets) -> tuple[str, ...]:
    """The components of the sites of some sets."""
    return tuple(sorted({site.component for sites in sets for site in sites}))


def pool_key(like: Pair, role: str, sets: Sets) -> tuple:
    """What tells the pools of a sweep apart: the group, the role and, last, the components."""
    return group_of(like), role, components_of(sets)


def pooled(model: Model, kept: dict[tuple, Pool], pairs: Sequence[Pair], like: Pair, role: str, sets: Sets) -> Pool:
    """The pool of the group that `like` is in, from the prompts of `pairs`; only the last one is kept."""
    key = pool_key(like, role, sets)
    if key not in kept:
        kept.clear()
        pool = Pool.of(pairs, like)
        runs = plain_runs(model, pool.prompts, like.clean.roles[role], key[-1], size=POOL_BATCH)
        pool.activations.update(joined([run.activations for _, run in runs], torch.cat))
        kept[key] = pool
    return kept[key]


def ablated(
    kinds: Sequence[str], pairs: Sequence[Pair], other: Activations, pool: Callable[[], Pool], seed: int
) -> Activations:
    """What ablations put in place of the pairs' activations: (kinds x pairs, positions, width), kinds outermost.

    `other`, for every key that is replaced, is what `clean` and `counterfactual` put there. `pool` makes the pool when
    a mean or a resample needs it.
    """
    parts = []
    for kind in kinds:
        if kind in ("counterfactual", "clean"):
            parts.append(other)
        elif kind == "zero":
            parts.append({key: torch.zeros_like(value) for key, value in other.items()})
        else:
            values = pool().values(pairs, kind, seed)
            parts.append({key: values[key] for key in other})
    return joined(parts, torch.cat)


@dataclass(frozen=True)
class Options:
    """How the sites of a sweep are replaced. ValueError for words that do not exist."""

    direction: str = "noise"  # each ablation into the clean run; `denoise`: the clean run's values into the corrupt one
    role: str = "last"  # the tokens that are replaced, all of them together
    ablations: Sequence[str] = ("counterfactual",)  # under `noise`, of ABLATIONS (design: Words)
    pool: Sequence[Pair] | None = None  # whose prompts means and resamples are taken from; default: the pairs swept
    seed: int = 0  # of resamples
    memory: float = 2.0  # GB that a pass may take
    profile: str = ""  # what the column `profile` says
    pools: dict | None = None  # kept by the caller between calls, so that the pool of one group is run once

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction {self.direction!r} is unknown; allowed are {', '.join(DIRECTIONS)}")
        for ablation in self.ablations:
            if ablation not in ABLATIONS:
                raise ValueError(f"ablation {ablation!r} is unknown; allowed are {', '.join(ABLATIONS)}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the column `ablation` says, one after the other."""
        return ("clean",) if self.direction == "denoise" else tuple(self.ablations)


@dataclass(frozen=True)
class PairBatch:
    """Pairs that share their passes, and what is done to them."""

    model: Model
    pairs: list[Pair]
    sets: list[tuple[Site, ...]]  # replaced together
    kinds: tuple[str, ...]  # ablations, or the names of variants
    options: Options
    grow: Grow
    needs: tuple[str, ...] = ()  # components whose plain activations are kept beside those of the sites
    variants: Variants | None = None

    @property
    def components(self) -> list[str]:
        """Components whose plain activations are kept."""
        return sorted({*components_of(self.sets), *self.needs})

    @property
    def positions(self) -> tuple[int, ...]:
        """The tokens of the role."""
        return self.pairs[0].clean.roles[self.options.role]

    @property
    def rows(self) -> list[Row]:
        """Every pair x kind x set of sites, in this order."""
        owners, kinds = range(len(self.pairs)), range(len(self.kinds))
        return [Row(s, owner, kind * len(owners) + owner) for owner in owners for kind in kinds for s in self.sets]

    @property
    def edited(self) -> str:
        """The side whose run is edited."""
        return "clean" if self.options.direction == "noise" else "corrupt"

    def sides(self, clean: BaseRun, corrupt: BaseRun) -> Runs:
        """The run that is edited and the other one of the pairs."""
        return (clean, corrupt) if self.edited == "clean" else (corrupt, clean)

    def run(self, pool: Callable[[], Pool], halved: list[str]) -> pd.DataFrame:
        """Every set of sites x kind x pair, proved and scored. `pool` makes the pool when a kind needs it; `halved`
        collects a line for every pass that did not fit."""
        clean, corrupt = both_runs(self.model, self.pairs, self.positions, self.components)
        base, other = self.sides(clean, corrupt)
        sources, rows = self.sources(base, other, pool), self.rows
        limit, parts = single_pass.row_limit(self.model, base, self.options.memory), []

        def halves(rows: list[Row]) -> tuple[str, list[list[Row]]] | None:
            if len(rows) == 1:
                return None
            middle, words = len(rows) // 2, f"{len(rows)} rows of pairs {self.pairs[0].pair_id} ... halved and retried"
            return words, [rows[:middle], rows[middle:]]

        for at in range(0, len(rows), limit):
            parts += with_less_memory(partial(self.one_pass, base, sources), rows[at : at + limit], halves, halved)
        return self.frame(rows, joined(parts), clean, corrupt)

    def sources(self, base: BaseRun, other: BaseRun, pool: Callable[[], Pool]) -> Activations:
        """(kinds x pairs, positions, width) for each component and layer of the sites: ablations, or the caller's own
        values."""
        if self.variants:
            made = self.variants(self.pairs, base, other)
            modules = {(site.component, site.layer) for sites in self.sets for site in sites}
            return {key: torch.cat([made[kind][key] for kind in self.kinds]) for key in modules}
        replaced = {key: value for key, value in other.activations.items() if key[0] in components_of(self.sets)}
        return ablated(self.kinds, self.pairs, replaced, pool, self.options.seed)

    def one_pass(self, base: BaseRun, sources: Activations, rows: list[Row]) -> dict[str, np.ndarray]:
        """Grow, prove and score one pass; where candidates have two tokens, one more for each of them."""
        grown = self.grow(self.model, base, rows, sources)
        runs = (base_run(self.model, ids, base.positions, self.components) for ids in self.continued(base.ids))
        return self.numbers(base, rows, grown, [self.grow(self.model, run, rows, sources) for run in runs])

    def continued(self, ids: Tensor) -> list[Tensor]:
        """The edited prompts with each candidate's first token appended; where candidates have two tokens."""
        if not self.pairs[0].clean_seconds:
            return []
        firsts = answers_of(self.pairs, self.edited)["candidate_tokens"].to(ids.device).T
        return [torch.cat([ids, first[:, None]], dim=1) for first in firsts]

    def numbers(self, base: BaseRun, rows: list[Row], grown: Grown, longer: Sequence[Grown]) -> dict[str, np.ndarray]:
        """Prove and score a pass. `longer` has the same rows after the first token of each candidate of two."""
        asked = token_ids(self.model, [getattr(pair, self.edited).ids for pair in self.pairs])
        if not torch.equal(base.ids, asked):
            raise SweepError(f"pairs {self.pairs[0].pair_id} ...: the run to edit is not of the {self.edited} prompts")
        single_pass.prove_rows(self.model, grown, lambda index: self.describe(rows[index]))
        single_pass.prove_base_rows(self.model, base, grown, lambda index: f"pair {self.pairs[index].pair_id}")
        owner = np.array([row.owner for row in rows])
        base_logits = self.model.logits(grown.base)
        before = self.metrics(base_logits, base_logits, np.arange(len(self.pairs)), self.edited)
        after = self.metrics_of_rows(grown, base_logits, owner, rows)
        out = {f"{key}_before": value[owner] for key, value in before.items()}
        out |= {f"{key}_after": value for key, value in after.items()}
        out |= {"site_delta": grown.site_delta.numpy(), "fired": grown.fired.numpy()}
        if grown.arrived is not None:
            out["arrived"] = grown.arrived.numpy()
        if longer:
            second, answers = self.second_tokens(owner, longer), np.array([pair.answer for pair in self.pairs])[owner]
            for when, chosen in (("before", owner), ("after", len(self.pairs) + np.arange(len(rows)))):
                both = out[f"candidate_logits_{when}"] + second[chosen]
                out[f"metric_both_{when}"] = metrics.margins(both, answers)[0]
        return out

    def metrics(self, logits: Tensor, base_logits: Tensor, owner: np.ndarray, side: str) -> dict[str, np.ndarray]:
        """`metrics.from_logits` with the answers and candidates of a side, as a dict of arrays."""
        return vars(metrics.from_logits(logits, base_logits, owner, **answers_of(self.pairs, side)))

    def metrics_of_rows(self, grown: Grown, base_logits: Tensor, owner: np.ndarray, rows: list[Row]) -> dict:
        """Metrics of the patched rows, a block of rows of logits at a time."""
        parts, block = [], logit_rows(self.model)
        for at in range(0, len(rows), block):
            chunk = slice(at, at + block)
            logits = self.model.logits(grown.hidden[chunk])
            try:
                parts.append(self.metrics(logits, base_logits, owner[chunk], self.edited))
            except ValueError as error:
                broken = torch.nonzero(~torch.isfinite(logits).all(-1))
                if not len(broken):
                    raise
                where = self.describe(rows[at + int(broken[0])])
                raise ValueError(f"{where}: NaN or infinite logits; try dtype float32 or bfloat16") from error
        return joined(parts)

    def second_tokens(self, owner: np.ndarray, longer: Sequence[Grown]) -> np.ndarray:
        """Logits of each candidate's second token after its first, (pairs + rows, candidates): base rows lead."""
        seconds = torch.tensor([getattr(pair, f"{self.edited}_seconds") for pair in self.pairs])
        wanted = torch.cat([seconds, seconds[torch.from_numpy(owner)]])
        columns = []
        for index, grown in enumerate(longer):
            logits = self.model.logits(torch.cat([grown.base, grown.hidden])).cpu()
            columns.append(logits[torch.arange(len(logits)), wanted[:, index]].numpy())
        return np.stack(columns, axis=1)

    def describe(self, row: Row) -> str:
        """Where a row is, for errors."""
        sites = ", ".join(f"layer {s.layer} {s.component}" + (f" {s.head}" if s.head >= 0 else "") for s in row.sites)
        kind, how = self.kinds[row.source // len(self.pairs)], self.options
        return f"pair {self.pairs[row.owner].pair_id}, {how.direction} {kind} at {how.role}, {sites}"

    def frame(self, rows: list[Row], scored: Mapping, clean: BaseRun, corrupt: BaseRun) -> pd.DataFrame:
        """The tidy rows with the design's columns."""
        pairs, how, owner = self.pairs, self.options, np.array([row.owner for row in rows])
        layer, component, head = (np.array(part) for part in zip(*(row.sites[0] for row in rows), strict=True))
        columns = {"layer": layer.astype(np.int32), "component": component, "head": head.astype(np.int32)}
        columns |= {"metric_before": scored["metric_before"], "metric_after": scored["metric_after"]}
        columns |= {"profile": how.profile, "direction": how.direction, "position": how.role, "seed": how.seed}
        for name in ("task", "template", "pair_id", "quad_id", "half"):
            columns[name] = np.array([getattr(pair, name) for pair in pairs])[owner]
        columns["ablation"] = np.array(self.kinds)[[row.source // len(pairs) for row in rows]]
        columns["site_set"] = np.tile(np.arange(len(self.sets)), len(rows) // len(self.sets))
        candidates = np.array([pair.candidates for pair in pairs])
        columns["answer"] = candidates[owner, np.array([pair.answer for pair in pairs])[owner]]
        noise = 0.0
        for side, run in (("clean", clean), ("corrupt", corrupt)):
            logits = self.model.logits(run.hidden)
            noise = max(noise, self.model.noise_of(logits))
            plain = self.metrics(logits, logits, np.arange(len(pairs)), side)
            columns |= {f"{name}_{side}": plain[name][owner] for name in ("metric", "logit_diff")}
        prove_own(columns, scored["logit_diff_before"], 2 * noise)
        for when in ("before", "after"):
            columns[f"foil_{when}"] = candidates[owner, scored[f"foil_{when}"]]
            columns[f"logits_{when}"] = list(scored[f"candidate_logits_{when}"].astype(np.float32))
            columns[f"label_logits_{when}"] = list(scored[f"label_logits_{when}"].astype(np.float32))
        ids, inverse = np.unique(scored["top_token_after"], return_inverse=True)
        tokenizer = self.model.tokenizer  # where there is none, tokens stay numbers
        words = token_texts(tokenizer, ids.tolist()) if tokenizer else list(map(str, ids.tolist()))
        columns["top_token_after"] = np.array(words)[inverse]
        return pd.DataFrame(columns | {name: scored[name] for name in AS_SCORED if name in scored})


def prove_own(columns: Mapping[str, np.ndarray], before: np.ndarray, noise: float) -> None:
    """SweepError for the first row whose `logit_diff_before` is not that of its pair's own prompt, the clean one under
    `noise`: rows that changed places, or sides that did."""
    side = "clean" if columns["direction"] == "noise" else "corrupt"
    for index in np.flatnonzero(~(np.abs(before - columns[f"logit_diff_{side}"]) <= noise))[:1]:
        pair, own = columns["pair_id"][index], columns[f"logit_diff_{side}"][index]
        raise SweepError(
            f"pair {pair}: logit_diff before the {columns['direction']} is {before[index]:.6g}, and {own:.6g} in its "
            f"{side} prompt: rows or sides have changed places"
        )


def logit_rows(model: Model) -> int:
    """LOGIT_ROWS for fp32 on a CPU; more where the unembedding is cast to fp32 for each block, or a device keeps its
    memory."""
    weight = model.unembed.weight
    return LOGIT_ROWS if weight.dtype == torch.float32 and weight.device.type == "cpu" else 8 * LOGIT_ROWS


def answers_of(pairs: Sequence[Pair], side: str) -> dict[str, Tensor]:
    """The arguments of `metrics.from_logits` that name answers, candidates and labels of a side, one row per pair."""
    return {
        "candidate_tokens": torch.tensor([list(getattr(pair, f"{side}_tokens")) for pair in pairs]),
        "answer": torch.tensor([pair.answer for pair in pairs]),
        "corrupt_answer": torch.tensor([pair.corrupt_answer for pair in pairs]),
        "label_tokens": torch.tensor(list(pairs[0].label_tokens), dtype=torch.long),
    }


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
        if not is_short(error) or (instead := smaller(work)) is None:
            raise
    # outside of the except block, which holds on to the failed passes; they and what they hand each other are a circle
    words, pieces = instead
    line = f"out of memory: {words}"
    log.warning(line)
    halved.append(line)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [result for piece in pieces for result in with_less_memory(attempt, piece, smaller, halved)]


def is_short(error: Exception) -> bool:
    """Whether an error says that memory has run out."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in SHORT)
