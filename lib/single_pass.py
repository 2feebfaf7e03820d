"""The growing-batch forward pass: every patched run of a sweep in one pass, exactly.

1. Run the base prompts once, plainly, and keep their KV cache and the activations at the role's positions. Nothing
   before the first patched position differs in any patched run, so it is never computed again.
2. Run the remaining tokens of the base prompts as the first rows of a batch.
3. Before layer l, append one copy of its base row for each row whose first site is in layer l: the copies are what a
   full run would have at that point.
4. Inside layer l, replace the activation at the rows' sites, and let every row flow on.
5. After the last layer each row holds the final hidden state of "this set of sites replaced from this source".

A row proves itself: a second hook, behind the one that edits, counts how often the row's sites were seen (`fired`) and
how far they lie from the plain run (`site_delta`), which must be the distance from plain run to source.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache

from lib import hooks
from lib.hooks import Model, Site

Ids = Int[Tensor, "prompts tokens"]
Hidden = Float[Tensor, "rows hidden"]
Activations = Mapping[tuple[str, int], Float[Tensor, "sources positions width"]]  # by (component, layer)
MOST_ROWS = 2**15  # of a pass: CUDA's attention kernels take a batch of fewer than 2**16


class SweepError(RuntimeError):
    """A row, a base row or a patch that did not do what it must; the message has the site, the pair and the numbers."""


@dataclass(frozen=True)
class BaseRun:
    """Plain runs of same-length prompts."""

    ids: Ids
    positions: tuple[int, ...]  # where activations were kept
    hidden: Hidden  # final hidden state at the last token
    activations: Activations
    cache: Sequence[tuple[Tensor, Tensor]]  # each layer's keys and values, (prompts, KV heads, tokens, head size)

    def part(self, first: int, last: int) -> BaseRun:
        """The runs of prompts first .. last - 1 alone (views)."""
        some = slice(first, last)
        activations = {key: value[some] for key, value in self.activations.items()}
        cache = [(keys[some], values[some]) for keys, values in self.cache]
        return BaseRun(self.ids[some], self.positions, self.hidden[some], activations, cache)


def token_ids(model: Model, prompts: Sequence[Sequence[int]]) -> Ids:
    """Prompts of one length where the model reads them."""
    return torch.tensor([list(ids) for ids in prompts], device=model.device)


@torch.no_grad()
def base_run(
    model: Model,
    ids: Ids,
    positions: Sequence[int],
    components: Sequence[str] = hooks.COMPONENTS,
    *,
    layers: Sequence[int] | None = None,
    cache: bool = True,
) -> BaseRun:
    """Run the prompts plainly; keep the KV cache and the components' activations at the positions, every layer.

    With `layers`, only their activations are kept, nothing behind the last of them is computed, and there are neither
    final states nor a cache. Without `cache`, the final states and activations alone are kept.
    """
    whole, kept = layers is None, {}
    filled = DynamicCache() if cache and whole else None
    skipped = [] if whole else model.blocks[max(layers) + 1 :]
    at = torch.tensor(list(positions), dtype=torch.long, device=ids.device)
    nothing = [(block, lambda hidden_states, *_, **__: hidden_states) for block in skipped]
    with hooks.removing() as handles, hooks.with_forwards(nothing):
        for layer in range(-1, model.n_layers) if whole else layers:
            handles += keeping(model, kept, layer, components, at)
        out = model.body(input_ids=ids, past_key_values=filled, use_cache=filled is not None)
    hidden = out.last_hidden_state[:, -1] if whole else ids.new_empty(len(ids), 0)
    kv = [] if filled is None else [(layer.keys, layer.values) for layer in filled.layers]
    return BaseRun(ids, tuple(positions), hidden, kept, kv)


def keeping(model: Model, kept: dict, layer: int, components: Sequence[str], at: Tensor) -> list[RemovableHandle]:
    """The hooks of a layer that put its components' activations at the positions into `kept`; layer -1 has `embed`."""

    def keep(activation: Tensor, key: tuple[str, int]) -> None:
        kept[key] = activation[:, at.to(activation.device)]

    here = [component for component in components if (component == "embed") == (layer < 0)]
    return [hooks.on_activation(model, layer, c, partial(keep, key=(c, layer))) for c in here]


def index_batches(keys: Sequence[Hashable], size: int | Callable[[Any], int]) -> Iterator[list[int]]:
    """Places of items with one key, at most `size` (which may depend on the key) at a time, in the order given; keys
    come in the order in which they appear."""
    places: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    for key, alike in places.items():
        step = size(key) if callable(size) else size
        yield from (alike[at : at + step] for at in range(0, len(alike), step))


def plain_runs(
    model: Model,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[int] | Sequence[Sequence[int]] = (),
    components: Sequence[str] = (),
    *,
    size: int,
    layers: Sequence[int] | None = None,
    cache: bool = False,
) -> Iterator[tuple[list[int], BaseRun]]:
    """The one way to read prompts: plain runs, a batch at a time, each with the places of its prompts in the list.

    A batch holds prompts of one length, and of one row of `positions` where each prompt has its own, in the order
    given and at most `size` of them: no padding is needed. Batches come in the order of their first prompts. What
    shares a batch decides the last bits, so `size` is the caller's. `layers` and `cache` as in `base_run`.
    """
    each = positions if len(positions) and isinstance(positions[0], Sequence) else [positions] * len(prompts)
    keys = [(len(ids), tuple(at)) for ids, at in zip(prompts, each, strict=True)]
    for places in index_batches(keys, size):
        ids = token_ids(model, [prompts[place] for place in places])
        yield places, base_run(model, ids, each[places[0]], components, layers=layers, cache=cache)


def joined(parts: Sequence[Mapping], cat: Callable = np.concatenate) -> dict:
    """Arrays (or, with `torch.cat`, tensors) of the same names, one part after the other."""
    return {name: cat([part[name] for part in parts]) for name in parts[0]}


class SharedPrefix(DynamicCache):
    """A KV cache whose first `n` positions are, for every row, those of the row's base prompt."""

    def __init__(self, base: Sequence[tuple[Tensor, Tensor]], n: int, owner: Int[Tensor, " rows"]) -> None:
        super().__init__()
        self.base, self.n, self.owner = base, n, owner

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        prefix_keys, prefix_values = self.base[layer_idx]
        return self.behind(prefix_keys, keys), self.behind(prefix_values, values)

    def behind(self, prefix: Tensor, new: Tensor) -> Tensor:
        """The rows' own positions behind their prompts', gathered once with room for them."""
        if self.n == 0:
            return new
        prefix, owner = prefix[:, :, : self.n].to(new.device), self.owner[: len(new)].to(new.device)
        whole = nn.functional.pad(prefix, (0, 0, 0, new.shape[2])).index_select(0, owner)
        whole[:, :, self.n :] = new
        return whole

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.n

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int) -> tuple[int, int]:
        return self.n + (query if isinstance(query, int) else len(query)), 0


def suffix(base: BaseRun, start: int, owner: Int[Tensor, " rows"], ids: Ids | None = None) -> dict[str, Any]:
    """What the decoder is given to run tokens from `start` on behind the base run's kept cache.

    `owner` is the base prompt of each row, `ids` the rows' tokens from `start` on (default: those of their base
    prompts). Rows that join later (`Batch`) have an owner and no ids.
    """
    ids = base.ids[owner, start:] if ids is None else ids
    return {
        "input_ids": ids,
        "past_key_values": SharedPrefix(base.cache, start, owner),
        "position_ids": torch.arange(start, start + ids.shape[1], device=ids.device)[None],
        "use_cache": True,
    }


def rerun(model: Model, base: BaseRun, start: int, owner: Int[Tensor, " rows"], ids: Ids | None = None) -> Hidden:
    """The one rerun from the kept cache (arguments as in `suffix`): final hidden states at the last token. Hooks that
    the caller has put on see the new tokens alone; gradients flow where they are enabled."""
    return model.body(**suffix(base, start, owner, ids)).last_hidden_state[:, -1]


class Row(NamedTuple):
    """One patched run: the sites replaced together, the base prompt, and which source replaces them."""

    sites: tuple[Site, ...]
    owner: int  # index of the base prompt
    source: int  # index into the sources


@dataclass(frozen=True)
class Grown:
    """What a growing pass returns, in the order of the rows given."""

    base: Float[Tensor, "prompts hidden"]  # final hidden states of the base rows of the same pass
    hidden: Hidden
    fired: Int[Tensor, " rows"]  # times a site of the row was seen replaced, minus the row's other sites: 1 is right
    site_delta: Float[Tensor, " rows"]  # L2 distance of the row's sites from the plain run
    expected: Float[Tensor, " rows"]  # L2 distance from the plain run to the source
    arrived: Float[Tensor, " rows"] | None = None  # path patching: L2 norm of the change at the receivers' inputs


@torch.no_grad()
def grow(model: Model, base: BaseRun, rows: Sequence[Row], sources: Activations) -> Grown:
    """Run every row in one growing pass. `sources[component, layer]` is (sources, positions, width)."""
    growing = Growing(model, base, rows, sources)
    with hooks.removing() as handles:
        for layer in range(model.n_layers):
            handles += growing.layer_hooks(layer)
        return growing.grown(growing.batch.run(model, base, growing.start))


class Growing:
    """A growing pass by its layers, so that it can wait at each (`lib.offload`), and what its rows show of themselves.

    That stays on the device that computed it until the pass is over: to ask for a number is to wait for the device.
    """

    def __init__(self, model: Model, base: BaseRun, rows: Sequence[Row], sources: Activations) -> None:
        self.model, self.base, self.rows, self.sources = model, base, rows, sources
        self.batch = Batch(model, base, rows, [max(0, min(site.layer for site in row.sites)) for row in rows])
        self.edits, self.start = edits_by_module(rows, self.batch.place), min(base.positions)
        self.offsets = torch.tensor(base.positions, device=base.ids.device) - self.start
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []  # rows; squares row to plain run, source to plain run

    def layer_hooks(self, layer: int) -> list[RemovableHandle]:
        """Append, edit and prove the rows of a layer, whose sources and plain activations must be there by now."""
        handles = [self.batch.joining(self.model, layer)]
        for component in hooks.EVERY_COMPONENT:
            if edit := self.edit(component, layer):
                plain = self.base.activations[component, layer]
                for visit in (edit.write, partial(self.observe, edit, plain)):
                    handles.append(hooks.on_activation(self.model, layer, component, visit))
        return handles

    def edit(self, component: str, layer: int) -> Edit | None:
        """What rows replace at a module, if any do."""
        if places := self.edits.get((component, layer)):
            return Edit(self.model, component, places, self.offsets, self.sources[component, layer])
        return None

    def observe(self, edit: Edit, plain: Tensor, activation: Tensor) -> None:
        """Take note of what is at an edit's sites once it has been made."""
        target = edit.of_source(plain, self.batch.owner[edit.rows.to(self.batch.owner.device)])
        moved = (edit.read(activation) - target).double().flatten(1).square().sum(1)
        wanted = (edit.values - target).double().flatten(1).square().sum(1)
        self.seen.append((edit.rows, moved, wanted))

    def grown(self, hidden: Float[Tensor, "batch hidden"]) -> Grown:
        """The rows' numbers, from the final hidden states."""
        batch = self.batch
        return Grown(hidden[: batch.prompts], hidden[batch.at.to(hidden.device)], *self.proof())

    def proof(self) -> tuple[Tensor, Tensor, Tensor]:
        """`fired`, `site_delta` and `expected` of a Grown, in the order of the rows."""
        at, device = self.batch.at, self.batch.owner.device
        squares = torch.zeros(2, len(self.batch.owner), dtype=torch.float64)
        fired = torch.zeros(len(self.batch.owner), dtype=torch.int64)
        if self.seen:
            columns = zip(*self.seen, strict=True)
            rows, *both = (torch.cat([part.to(device) for part in column]).cpu() for column in columns)
            squares.index_add_(1, rows, torch.stack(both))
            fired.index_add_(0, rows, torch.ones_like(rows))
        others = torch.tensor([len(row.sites) - 1 for row in self.rows], dtype=torch.int64)
        return fired[at] - others, *squares.sqrt()[:, at]


class Batch:
    """Where each row of a growing pass stands: base prompts first, then rows in the order of the layer they join at."""

    def __init__(self, model: Model, base: BaseRun, rows: Sequence[Row], first: Sequence[int]) -> None:
        self.prompts = len(base.ids)
        order = sorted(range(len(rows)), key=lambda index: first[index])
        self.place = {index: self.prompts + rank for rank, index in enumerate(order)}
        self.at = torch.tensor([self.place[index] for index in range(len(rows))], dtype=torch.long)
        owners = [*range(self.prompts), *(rows[index].owner for index in order)]
        self.owner = torch.tensor(owners, device=base.ids.device)
        joined = np.searchsorted(np.sort(first), range(model.n_layers), side="right")
        self.size = [self.prompts + int(count) for count in joined]  # rows of the batch in each layer

    def joining(self, model: Model, layer: int) -> RemovableHandle:
        """The hook of a block that appends the rows joining there."""
        new = self.owner[self.size[layer - 1] if layer else self.prompts : self.size[layer]]
        return model.blocks[layer].register_forward_pre_hook(joiner(new, self.prompts), with_kwargs=True)

    def inputs(self, base: BaseRun, start: int) -> dict[str, Any]:
        """What the decoder is given: the base prompts from token `start` on, behind their cached prefix."""
        return suffix(base, start, self.owner, base.ids[:, start:])

    def run(self, model: Model, base: BaseRun, start: int) -> Float[Tensor, "batch hidden"]:
        """Run the batch; final hidden states at the last token."""
        return rerun(model, base, start, self.owner, base.ids[:, start:])


def edits_by_module(rows: Sequence[Row], place: Mapping[int, int]) -> dict[tuple[str, int], list[tuple[int, int, int]]]:
    """For each (component, layer): the (place in the batch, head, source) of every edit there."""
    edits: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    for index, row in enumerate(rows):
        for site in row.sites:
            edits.setdefault((site.component, site.layer), []).append((place[index], site.head, row.source))
    return edits


def joiner(owners: Int[Tensor, " new"], prompts: int) -> Any:
    """A block's pre-hook that appends one copy of its base row for each new row."""

    def join(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # Same-length prompts without padding have one mask between them: keep a single row of it to broadcast.
        def narrow(value: Any) -> Any:
            shared = isinstance(value, Tensor) and value.ndim == 4 and len(value) == prompts
            return value[:1] if shared else value

        hidden, args, kwargs = hooks.split_call(args, kwargs)
        hidden = torch.cat([hidden, hidden[owners.to(hidden.device)]]) if len(owners) else hidden
        return (hidden, *map(narrow, args)), {key: narrow(value) for key, value in kwargs.items()}

    return join


class Edit:
    """The replacement of one module's activation in some rows of the batch, at the role's positions: `edits` as in
    `edits_by_module`, `offsets` the positions in the pass, `source` (sources, positions, width)."""

    def __init__(self, model: Model, component: str, edits: list[tuple], offsets: Tensor, source: Tensor) -> None:
        self.size = hooks.part_size(model, component)
        self.rows, self.head, index = torch.tensor(edits, device=source.device).T
        self.offsets = offsets
        self.values = self.of_source(source, index)

    def of_source(self, source: Tensor, index: Int[Tensor, " rows"]) -> Float[Tensor, "rows positions part"]:
        """Each edit's values out of (sources, positions, width)."""
        index = index.to(source.device)
        if self.size is None:
            return source[index]
        return source.unflatten(-1, (-1, self.size))[index, :, self.head.to(source.device)]

    def where(self, activation: Tensor) -> tuple[Tensor, tuple]:
        """The activation as a view to index, and the index of this edit's values in it."""
        device = activation.device
        rows, offsets = self.rows.to(device)[:, None], self.offsets.to(device)[None]
        if self.size is None:
            return activation, (rows, offsets)
        return activation.unflatten(-1, (-1, self.size)), (rows, offsets, self.head.to(device)[:, None])

    def write(self, activation: Tensor) -> None:
        """Replace in place: the tensor was made by this pass and nothing before the module reads it again."""
        view, index = self.where(activation)
        view[index] = self.values.to(view)

    def read(self, activation: Tensor) -> Tensor:
        view, index = self.where(activation)
        return view[index].to(self.values.device)


def row_bytes(model: Model, tokens: int, suffix: int) -> int:
    """What a row of a pass takes at most, the logits apart: a pure function of the model's sizes and the prompt's.

    At its fullest an MLP holds its hidden units three times over, and attention the keys and values of all tokens: as
    cached, joined to the row's own, and repeated for every query head.
    """
    config = model.model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    per_token = 10 * config.hidden_size + 4 * inner + 4 * model.n_heads * model.head_size
    cached = 4 * (model.n_heads + model.n_kv_heads) * model.head_size * tokens + model.n_heads * suffix * tokens
    return torch.finfo(model.dtype).bits // 8 * (per_token * suffix + cached)


def row_limit(model: Model, base: BaseRun, memory: float) -> int:
    """How many rows of a pass fit into `memory` GB, at most MOST_ROWS."""
    tokens = base.ids.shape[1]
    return max(1, min(MOST_ROWS, int(memory * 1e9 / row_bytes(model, tokens, tokens - min(base.positions)))))


def prove_rows(model: Model, grown: Grown, describe: Callable[[int], str]) -> None:
    """SweepError for the first row whose hook did not fire once or whose site did not arrive at its source; in it,
    `describe(row index)` names the site and the pair."""
    # the plain run and the pass meet at the site through kernels of other shapes, hence a relative allowance
    loose = 1e-2 if model.low_precision else 1e-3
    missed = (grown.site_delta - grown.expected).abs() > loose * grown.expected
    for index in torch.nonzero((grown.fired != 1) | missed).flatten().tolist():
        raise SweepError(
            f"{describe(index)}: the hook fired {grown.fired[index]} times (1 is right) and moved the activation by "
            f"{grown.site_delta[index]:.6g}, while its source lies {grown.expected[index]:.6g} away. "
            "The edit did not take effect"
        )


def prove_base_rows(model: Model, base: BaseRun, grown: Grown, describe: Callable[[int], str] = str) -> float:
    """`prove_same` for the pass's base rows and the plain run; `describe(prompt)` names the pair."""

    def words(index: int, off: float) -> str:
        row = f"{describe(index)}: the base row of the growing pass differs from the plain forward pass"
        return f"{row} by {off:.3g} logits, more than {model.noise_of(plain):g}, the noise of {model.dtype}"

    plain = model.logits(base.hidden)
    return prove_same(model, model.logits(grown.base), plain, words)


def prove_same(model: Model, logits: Tensor, plain: Tensor, describe: Callable[[int, float], str]) -> float:
    """The largest difference between two rows of logits; SweepError where it exceeds the noise of the dtype at their
    size, in the words of `describe(row, difference)`."""
    off = (logits - plain).abs().amax(-1)
    worst = int(off.argmax())
    if not off[worst] <= model.noise_of(plain):
        raise SweepError(describe(worst, off[worst].item()))
    return off[worst].item()
