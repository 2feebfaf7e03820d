"""Passes through an offloaded model in lock step, so that the weights of each layer are read once for all of them.

accelerate reads an offloaded module's weights each time the module is called: a sweep of P passes over a model of L
layers would read P x L layers. Here every pass waits at every layer:

1. The decoder is run once per pass with blocks that do nothing: that embeds the tokens, makes masks and rotary
   embeddings, and says what each block is called with.
2. Layer by layer: read the block's weights once, take every pass through the block in the order given, drop them.
   A pass is hooked only while it is inside, so it may use what an earlier pass left behind at the same layer.
3. The final norm gives the final hidden states.

The blocks see what they would see otherwise, so the numbers are the same to the bit. A waiting pass costs its hidden
states, rows x tokens x hidden; beside an accelerator they wait in the machine's memory. (A 70B model in bf16, eight
pairs, all 5,360 sites at `last`: 0.7 GB; twelve tokens from the end: 8.4 GB.)

`run` takes all batches of a sweep (`lib.batches`) through like this. At each layer the pools' plain runs go first, then
the batches' plain runs, which make the layer's sources, then the growing passes, which use them; then the layer is
forgotten.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache

from lib import hooks
from lib.batches import PairBatch, Pool, is_short, pool_key, unfilled
from lib.hooks import Model
from lib.single_pass import BaseRun, Growing, keeping, row_limit
from lib.tasks import Pair

HALVINGS = 2  # of the memory for a pass, before the jobs are parted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pass:
    """A forward pass that is taken through the model a layer at a time."""

    inputs: Mapping[str, Any]  # of the decoder
    hooks: Callable[[int], list[RemovableHandle]]  # puts on those of a layer, when the pass has come to it
    left: Callable[[int], None] = lambda layer: None  # called when the pass has gone through a layer


@torch.no_grad()
def through(model: Model, passes: Sequence[Pass]) -> list[Float[Tensor, "batch hidden"]]:
    """Take all passes through the model in lock step; each one's final hidden states at the last token."""
    outside = [child for child in model.body.children() if not any(model.blocks[0] is own for own in child.children())]
    with loaded(model.final_norm):  # which step 1 runs, too
        with loaded(*outside):
            calls = [calls_of(model, each) for each in passes]
        waiting = [own[0][0] for own in calls]
        homes = [hidden.device for hidden in waiting]
        for layer, block in enumerate(model.blocks):
            with loaded(block):
                for index, each in enumerate(passes):
                    handles: list[RemovableHandle] = []
                    _, args, kwargs = calls[index][layer]
                    with hooks.removing(handles):
                        handles += each.hooks(layer)
                        out = hooks.first_tensor(block(waiting[index].to(homes[index]), *args, **kwargs))
                    waiting[index], homes[index] = out.cpu(), out.device
                    each.left(layer)
        return [model.final_norm(hidden.to(home))[:, -1] for hidden, home in zip(waiting, homes, strict=True)]


def calls_of(model: Model, each: Pass) -> list[tuple[Tensor, tuple, dict[str, Any]]]:
    """What each block is given: hidden states (before the first block), other arguments, keyword arguments."""
    calls: list[tuple[Tensor, tuple, dict[str, Any]]] = []

    def note(*args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        calls.append((hidden, args[1:], kwargs))
        return hidden

    with hooks.with_forwards([(block, note) for block in model.blocks]):
        model.body(**each.inputs)
    return calls


def offloading(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks that load the module's own weights at each call and drop them after it."""
    hook = getattr(module, "_hf_hook", None)
    yield from (each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False))


def offloaded(model: Model) -> list[int]:
    """The layers with weights that are not kept on the device they run on."""
    return [layer for layer, block in enumerate(model.blocks) if any(list(offloading(m)) for m in block.modules())]


@contextmanager
def loaded(*roots: nn.Module) -> Iterator[None]:
    """Read the offloaded weights below the modules once and keep them inside; calls there neither read nor drop any."""
    held: list[tuple[nn.Module, Any]] = []
    try:
        for module in (module for root in roots for module in root.modules()):
            for hook in list(offloading(module)):
                held.append((module, hook))
                hook.pre_forward(module)
                hook.offload = False
        yield
    finally:
        for module, hook in held:
            hook.offload = True
            hook.post_forward(module, None)


class Noted(Mapping):
    """A mapping that says which of its keys are read."""

    def __init__(self, own: Mapping[str, Tensor], note: Callable[[str], None]) -> None:
        self.own, self.note = own, note

    def __getitem__(self, key: str) -> Tensor:
        self.note(key)
        return self.own[key]

    def __contains__(self, key: object) -> bool:
        return key in self.own

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


@contextmanager
def counted(model: Model) -> Iterator[dict[str, int]]:
    """Count the loads inside: how often the weights of each block ("layer 3") and of each other offloaded module (its
    name) were read. A block counts as often as that of its weights that was read most."""
    loads: dict[str, int] = {}
    reads: Counter[tuple[nn.Module, str]] = Counter()
    of_block = {module: f"layer {layer}" for layer, block in enumerate(model.blocks) for module in block.modules()}
    every = [(name, module, hook) for name, module in model.model.named_modules() for hook in offloading(module)]

    def note(owner: str, module: nn.Module, key: str) -> None:
        reads[module, key] += 1
        loads[owner] = max(loads.get(owner, 0), reads[module, key])

    kept = [hook.weights_map for *_, hook in every]
    try:
        for name, module, hook in every:
            hook.weights_map = Noted(hook.weights_map, partial(note, of_block.get(module, name), module))
        yield loads
    finally:
        for (*_, hook), own in zip(every, kept, strict=True):
            hook.weights_map = own


# --- the jobs of a sweep ----------------------------------------------------------------------------------------------


def run(
    jobs: Sequence[PairBatch], kept: dict[tuple, Pool], donors: Sequence[Pair], halved: list[str], tries: int = 0
) -> tuple[list[pd.DataFrame], dict[str, int]]:
    """`PairBatch.run` for all jobs of a sweep in lock step, and the loads (see `counted`).

    `kept` and `donors` are the pools at hand and the pairs to make others from. With variants, which may use any layer
    of the plain runs, these go first and every layer is read twice. When memory runs out, all is done again with half
    of it for a pass, which reads no more; when that has been tried HALVINGS times, in two parts, each of which reads
    every layer: the waiting passes take memory, too. Each leaves a line in `halved`.
    """
    model, memory = jobs[0].model, jobs[0].memory
    parted = len(jobs) > 1 and tries >= HALVINGS
    with counted(model) as loads:
        try:
            frames = attempt(jobs, kept, donors)
        except RuntimeError as error:
            limit = max(row_limit(model, blank(job.ids, job), memory) for job in jobs)
            if not is_short(error) or (limit == 1 and len(jobs) == 1):
                raise
            frames = None
    if frames is None:  # outside of the except block, which holds on to the failed passes
        how = "in two parts" if parted else f"with {memory / 2:g} GB for a pass"
        line = f"out of memory: {len(jobs)} jobs in lock step done again {how}"
        log.warning(line)
        halved.append(line)
        gc.collect()  # passes and what they hand each other refer to one another
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not parted:
            return run([replace(job, memory=memory / 2) for job in jobs], kept, donors, halved, tries + 1)
        (first, one), (second, two) = (
            run(part, kept, donors, halved, tries) for part in (jobs[: len(jobs) // 2], jobs[len(jobs) // 2 :])
        )
        return first + second, dict(Counter(one) + Counter(two))
    layers = [loads.get(f"layer {layer}", 0) for layer in offloaded(model)]
    log.info("%d layers offloaded, %d layer loads for %d jobs", len(layers), sum(layers), len(jobs))
    return frames, loads


def attempt(jobs: Sequence[PairBatch], kept: dict[tuple, Pool], donors: Sequence[Pair]) -> list[pd.DataFrame]:
    """All passes of the jobs, proved and scored."""
    model, pools, lending = jobs[0].model, dict(kept), []
    for job in jobs:
        key = pool_key(job.pairs[0], job.role, job.sets)
        if {"mean", "resample"} & {*job.kinds} and not job.variants and key not in pools:
            pools[key], batches = unfilled(model, donors, job.pairs[0])
            lending += lent(model, pools[key], batches, job.positions, key[-1])
    staged = [Staged(job, pools.get(pool_key(job.pairs[0], job.role, job.sets))) for job in jobs]
    growing = [each for own in staged for each in own.growing]
    if jobs[0].variants:
        ends = through(model, [own.plain for own in staged])
        for own, end in zip(staged, ends, strict=True):
            own.make(end)
        ends += through(model, growing)
    else:
        ends = through(model, [*lending, *(own.plain for own in staged), *growing])[len(lending) :]
    if pools:  # as `lib.batches.pooled`: the last one may serve the next call
        last = list(pools)[-1]
        kept.clear()
        kept[last] = pools[last]
    first, later = ends[: len(staged)], iter(ends[len(staged) :])
    with loaded(model.unembed):
        return [own.frame(end, [next(later) for _ in own.growing]) for own, end in zip(staged, first, strict=True)]


class Staged:
    """A job's passes, and what they hand each other at each layer."""

    def __init__(self, job: PairBatch, pool: Pool | None) -> None:
        self.job, self.pool, self.sources = job, pool, {}
        clean, corrupt = (blank(ids, job) for ids in job.ids.split(len(job.pairs)))
        self.runs = {"clean": clean, "corrupt": corrupt}
        self.plain = plain(job.model, job.ids, job.positions, job.kept, self.heard)
        base, _ = job.sides(self.runs)
        rows, limit = job.rows(), row_limit(job.model, base, job.memory)
        self.parts = [rows[at : at + limit] for at in range(0, len(rows), limit)]
        self.growing: list[Pass] = []
        self.growths: list[Growing | None] = []  # behind each pass of `growing`, none behind a plain one
        self.grow(base)
        for ids in job.said(base.ids):
            said = blank(ids, job)
            self.growing.append(plain(job.model, ids, job.positions, job.kept, partial(fill, said)))
            self.growths.append(None)
            self.grow(said)

    def grow(self, base: BaseRun) -> None:
        """Add the growing passes over all rows."""
        made = [Growing(self.job.model, base, rows, self.sources) for rows in self.parts]
        self.growing += [Pass(each.batch.inputs(base, each.start), each.layer_hooks) for each in made]
        self.growths += made

    def heard(self, part: BaseRun) -> None:
        """Take over a layer of the plain run; make its sources."""
        count = len(self.job.pairs)
        for index, run in enumerate(self.runs.values()):
            fill(run, part.part(index * count, (index + 1) * count), keep=bool(self.job.variants))
        if not self.job.variants:
            self.sources.clear()
            self.sources.update(self.job.sources(self.job.sides(self.runs)[1], lambda: self.pool))

    def whole(self, hidden: Tensor) -> dict[str, BaseRun]:
        """The plain runs with their final hidden states."""
        parts = hidden.split(len(self.job.pairs))
        return {which: replace(run, hidden=own) for (which, run), own in zip(self.runs.items(), parts, strict=True)}

    def make(self, hidden: Tensor) -> None:
        """The sources of variants, from whole plain runs."""
        self.sources.update(self.job.of_variants(*self.job.sides(self.whole(hidden))))

    def frame(self, hidden: Tensor, ends: Sequence[Tensor]) -> pd.DataFrame:
        """The job's rows, from the final hidden states of the plain run and of the passes of `growing`."""
        runs, parts = self.whole(hidden), self.parts
        grown = [each.grown(end) for each, end in zip(self.growths, ends, strict=True) if each]
        base, _ = self.job.sides(runs)
        scored = [
            self.job.numbers(base, rows, grown[index], grown[index + len(parts) :: len(parts)])
            for index, rows in enumerate(parts)
        ]
        together = {key: np.concatenate([part[key] for part in scored]) for key in scored[0]}
        return self.job.frame([row for rows in parts for row in rows], together, runs)


def blank(ids: Tensor, job: PairBatch) -> BaseRun:
    """A plain run that has not been made yet."""
    return BaseRun(ids, tuple(job.positions), torch.empty(0), {}, [])


def fill(run: BaseRun, part: BaseRun, keep: bool = False) -> None:
    """Give a plain run its next layer; those before are forgotten, unless they are kept."""
    if not keep:
        run.activations.clear()
        run.cache[:] = [None] * len(run.cache)
    run.activations.update(part.activations)
    run.cache.extend(part.cache)


def plain(
    model: Model, ids: Tensor, positions: Sequence[int], components: Sequence[str], heard: Callable[[BaseRun], None]
) -> Pass:
    """`base_run` as a pass: `heard` is given its part at each layer, without hidden states."""
    cache, kept = DynamicCache(), {}
    at = torch.tensor(list(positions), device=ids.device)

    def left(layer: int) -> None:
        own = cache.layers[layer]
        heard(BaseRun(ids, tuple(positions), ids.new_empty(len(ids), 0), dict(kept), [(own.keys, own.values)]))
        own.keys = own.values = None
        kept.clear()

    inputs = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    return Pass(inputs, lambda layer: keeping(model, kept, layer, components, at), left)


def lent(
    model: Model, pool: Pool, batches: Sequence[Tensor], positions: Sequence[int], components: Sequence[str]
) -> list[Pass]:
    """The plain runs that fill a pool, layer by layer."""
    parts: list[Mapping[tuple[str, int], Tensor]] = []

    def heard(part: BaseRun) -> None:
        parts.append(part.activations)
        if len(parts) == len(batches):
            pool.activations.update({key: torch.cat([own[key] for own in parts]) for key in parts[0]})
            parts.clear()

    return [plain(model, ids, positions, components, heard) for ids in batches]
