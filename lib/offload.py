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

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache

from lib import hooks
from lib.batches import POOL_BATCH, PairBatch, Pool, both_prompts, pool_key, with_less_memory
from lib.hooks import Model
from lib.single_pass import BaseRun, Growing, joined, keeping, row_limit, token_ids
from lib.tasks import Pair

HALVINGS = 2  # of the memory for a pass, before the batches are parted

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
    outside = [child for child in model.body.children() if model.blocks[0] not in child.children()]
    with loaded(model.final_norm):  # which step 1 runs, too
        with loaded(*outside):
            calls = [calls_of(model, each) for each in passes]
        waiting = [first[0] for first, *_ in calls]
        homes = [hidden.device for hidden in waiting]
        for layer, block in enumerate(model.blocks):
            with loaded(block):
                for index, each in enumerate(passes):
                    _, args, kwargs = calls[index][layer]
                    with hooks.removing(each.hooks(layer)):
                        out = hooks.first_tensor(block(waiting[index].to(homes[index]), *args, **kwargs))
                    waiting[index], homes[index] = out.cpu(), out.device
                    each.left(layer)
        return [model.final_norm(hidden.to(home))[:, -1] for hidden, home in zip(waiting, homes, strict=True)]


def calls_of(model: Model, each: Pass) -> list[tuple[Tensor, tuple, dict[str, Any]]]:
    """What each block is given: hidden states (before the first block), other arguments, keyword arguments."""
    calls: list[tuple[Tensor, tuple, dict[str, Any]]] = []

    def note(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(hooks.split_call(args, kwargs))
        return calls[-1][0]

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


@contextmanager
def counted(model: Model) -> Iterator[dict[str, int]]:
    """Count the loads inside: how often the weights of each block ("layer 3") and of each other offloaded module (its
    name) were read. A block counts as often as that of its modules that was read most."""
    loads: dict[str, int] = {}
    reads: Counter[nn.Module] = Counter()
    of_block = {module: f"layer {layer}" for layer, block in enumerate(model.blocks) for module in block.modules()}
    every = [(name, module, hook) for name, module in model.model.named_modules() for hook in offloading(module)]

    def count(module: nn.Module, *args: Any, owner: str, hook: Any, load: Callable, **kwargs: Any) -> Any:
        if hook.offload and any(True for _ in module.parameters(recurse=hook.place_submodules)):
            reads[module] += 1
            loads[owner] = max(loads.get(owner, 0), reads[module])
        return load(module, *args, **kwargs)

    try:
        for name, module, hook in every:
            hook.pre_forward = partial(count, owner=of_block.get(module, name), hook=hook, load=hook.pre_forward)
        yield loads
    finally:
        for *_, hook in every:
            del hook.pre_forward


def run(
    batches: Sequence[PairBatch], kept: dict[tuple, Pool], donors: Sequence[Pair], halved: list[str]
) -> tuple[list[pd.DataFrame], dict[str, int]]:
    """`PairBatch.run` for all batches of a sweep in lock step, and the loads (see `counted`).

    `kept` and `donors` are the pools at hand and the pairs to make others from. With variants, which may use any layer
    of the plain runs, these go first and every layer is read twice. When memory runs out, all is done again with half
    of it for a pass, which reads no more; when that has been tried HALVINGS times, in two parts, each of which reads
    every layer: the waiting passes take memory, too. Each leaves a line in `halved`.
    """
    model = batches[0].model

    def attempt(work: tuple[Sequence[PairBatch], int]) -> tuple[list[pd.DataFrame], dict[str, int]]:
        with counted(model) as loads:
            frames = in_lock_step(work[0], kept, donors)
        layers = [loads.get(f"layer {layer}", 0) for layer in offloaded(model)]
        log.info("%d layers offloaded, %d layer loads for %d jobs", len(layers), sum(layers), len(work[0]))
        return frames, loads

    def smaller(work: tuple[Sequence[PairBatch], int]) -> tuple[str, list] | None:
        (some, halvings), first = work, work[0][0]
        memory, middle = first.options.memory / 2, len(some) // 2
        run = blank(both_prompts(model, first.pairs), first.positions)
        if not middle and row_limit(model, run, first.options.memory) == 1:
            return None
        words = f"{len(some)} jobs in lock step done again"
        if middle and halvings >= HALVINGS:
            return f"{words} in two parts", [(some[:middle], halvings), (some[middle:], halvings)]
        less = [replace(batch, options=replace(batch.options, memory=memory)) for batch in some]
        return f"{words} with {memory:g} GB for a pass", [(less, halvings + 1)]

    parts = with_less_memory(attempt, (batches, 0), smaller, halved)
    loads = sum((Counter(of_part) for _, of_part in parts), Counter())
    return [frame for frames, _ in parts for frame in frames], dict(loads)


def in_lock_step(batches: Sequence[PairBatch], kept: dict[tuple, Pool], donors: Sequence[Pair]) -> list[pd.DataFrame]:
    """All passes of the batches, proved and scored."""
    model, pools, filling = batches[0].model, dict(kept), []
    keys = [pool_key(batch.pairs[0], batch.options.role, batch.sets) for batch in batches]
    for key, batch in zip(keys, batches, strict=True):
        if {"mean", "resample"} & {*batch.kinds} and not batch.variants and key not in pools:
            pools[key] = Pool.of(donors, batch.pairs[0])
            filling += pool_passes(model, pools[key], batch.positions, key[-1])
    staged = [Staged(batch, pools.get(key)) for key, batch in zip(keys, batches, strict=True)]
    growing = [growing for batch in staged for growing in batch.growing]
    if batches[0].variants:
        ends = through(model, [batch.plain for batch in staged])
        for batch, end in zip(staged, ends, strict=True):
            batch.make(batch.whole(end))
        ends += through(model, growing)
    else:
        ends = through(model, [*filling, *(batch.plain for batch in staged), *growing])[len(filling) :]
    if pools:  # as `lib.batches.pooled`: the last one may serve the next call
        last = list(pools)[-1]
        kept.clear()
        kept[last] = pools[last]
    first, later = ends[: len(staged)], iter(ends[len(staged) :])
    with loaded(model.unembed):
        return [each.frame(end, [next(later) for _ in each.growing]) for each, end in zip(staged, first, strict=True)]


class Staged:
    """A batch's passes, and what they hand each other at each layer."""

    def __init__(self, batch: PairBatch, pool: Pool | None) -> None:
        self.batch, self.pool, self.sources, self.rows = batch, pool, {}, batch.rows
        ids = both_prompts(batch.model, batch.pairs)
        self.runs = [blank(side, batch.positions) for side in ids.split(len(batch.pairs))]  # clean, corrupt
        self.plain = plain_pass(batch.model, blank(ids, batch.positions), batch.components, self.take)
        base, _ = batch.sides(*self.runs)
        limit = row_limit(batch.model, base, batch.options.memory)
        self.parts = [self.rows[at : at + limit] for at in range(0, len(self.rows), limit)]
        self.growing: list[Pass] = []
        self.growths: list[Growing | None] = []  # behind each pass of `growing`, none behind a plain one
        self.grow(base)
        for longer in (blank(ids, batch.positions) for ids in batch.continued(base.ids)):
            self.growing.append(plain_pass(batch.model, longer, batch.components, partial(fill, longer)))
            self.growths.append(None)
            self.grow(longer)

    def grow(self, base: BaseRun) -> None:
        """Add the growing passes over all rows."""
        made = [Growing(self.batch.model, base, rows, self.sources) for rows in self.parts]
        self.growing += [Pass(each.batch.inputs(base, each.start), each.layer_hooks) for each in made]
        self.growths += made

    def take(self, part: BaseRun) -> None:
        """Take over a layer of the plain run; make its sources."""
        count, variants = len(self.batch.pairs), bool(self.batch.variants)
        for index, run in enumerate(self.runs):
            fill(run, part.part(index * count, (index + 1) * count), keep=variants)
        if not variants:
            self.sources.clear()
            self.make(self.runs)

    def make(self, runs: Sequence[BaseRun]) -> None:
        """The sources, from plain runs: of a layer, or of all where variants may use any."""
        self.sources.update(self.batch.sources(*self.batch.sides(*runs), lambda: self.pool))

    def whole(self, hidden: Tensor) -> list[BaseRun]:
        """The plain runs with their final hidden states."""
        halves = hidden.split(len(self.batch.pairs))
        return [replace(run, hidden=half) for run, half in zip(self.runs, halves, strict=True)]

    def frame(self, hidden: Tensor, ends: Sequence[Tensor]) -> pd.DataFrame:
        """The batch's rows, from the final hidden states of the plain run and of the passes of `growing`."""
        grown = [each.grown(end) for each, end in zip(self.growths, ends, strict=True) if each]
        runs, count, scored = self.whole(hidden), len(self.parts), []
        base, _ = self.batch.sides(*runs)
        for index, rows in enumerate(self.parts):
            scored.append(self.batch.numbers(base, rows, grown[index], grown[index + count :: count]))
        return self.batch.frame(self.rows, joined(scored), *runs)


def blank(ids: Tensor, positions: Sequence[int]) -> BaseRun:
    """A plain run that has not been made yet."""
    return BaseRun(ids, tuple(positions), ids.new_empty(len(ids), 0), {}, [])


def fill(run: BaseRun, part: BaseRun, keep: bool = False) -> None:
    """Give a plain run its next layer; those before are forgotten, unless they are kept."""
    if not keep:
        run.activations.clear()
        run.cache[:] = [None] * len(run.cache)
    run.activations.update(part.activations)
    run.cache.extend(part.cache)


def plain_pass(model: Model, run: BaseRun, components: Sequence[str], take: Callable[[BaseRun], None]) -> Pass:
    """`base_run` of a blank run's prompts as a pass: `take` is given its part at each layer, without hidden states."""
    cache, kept = DynamicCache(), {}
    at = torch.tensor(list(run.positions), device=run.ids.device)

    def left(layer: int) -> None:
        filled = cache.layers[layer]
        take(replace(run, activations=dict(kept), cache=[(filled.keys, filled.values)]))
        filled.keys = filled.values = None
        kept.clear()

    inputs = {"input_ids": run.ids, "past_key_values": cache, "use_cache": True}
    return Pass(inputs, lambda layer: keeping(model, kept, layer, components, at), left)


def pool_passes(model: Model, pool: Pool, positions: Sequence[int], components: Sequence[str]) -> list[Pass]:
    """The plain runs that fill a pool, layer by layer."""
    batches = [token_ids(model, pool.prompts[at : at + POOL_BATCH]) for at in range(0, len(pool.prompts), POOL_BATCH)]
    parts: list[Mapping[tuple[str, int], Tensor]] = []

    def take(part: BaseRun) -> None:
        parts.append(part.activations)
        if len(parts) == len(batches):
            pool.activations.update(joined(parts, torch.cat))
            parts.clear()

    return [plain_pass(model, blank(ids, positions), components, take) for ids in batches]
