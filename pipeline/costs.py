"""What a work unit costs, counted: forward passes, floating-point operations, rows that are scored, bytes on disk.

1. A token through a block costs two operations per weight, and 4 x heads x size for each token it attends to.
2. `sweep_unit` and `path_unit` walk through a unit as `lib.sweep` and `lib.paths` do: the same groups and packs, the
   plain runs, every row from the layer it joins at, logits of every row. The others follow their modules likewise.
3. `Work` adds up. Its parts are what a machine has a rate for; what the steps do beside the model is counted in
   `other`, by name (probes fitted, steps of an autoencoder, ...).

No model and no weights: pairs may be stand-ins (`pipeline.assumed`), the model is a `lib.weights.Shape`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import torch

from lib import hooks, sweep
from lib.batches import grouped
from lib.hooks import Site
from lib.models import SHARED_TOKENS
from lib.single_pass import row_limit
from lib.tasks import Pair
from lib.weights import Shape


@dataclass(frozen=True)
class Work:
    """An amount of work. Operations are floating-point ones."""

    passes: int = 0  # runs of the model's body
    plain: float = 0  # operations of whole prompts
    grown: float = 0  # operations of rows that join on the way, at `last`
    spans: float = 0  # the same from a name on: several tokens a row
    logits: float = 0  # operations of full-vocabulary logits
    rows: int = 0  # rows that are scored and recorded
    light: int = 0  # rows of which a few logits are read
    table: int = 0  # bytes on disk
    other: Mapping[str, float] = field(default_factory=dict)

    @property
    def operations(self) -> float:
        return self.plain + self.grown + self.spans + self.logits

    def __add__(self, more: Work) -> Work:
        both = {f.name: getattr(self, f.name) + getattr(more, f.name) for f in fields(self) if f.name != "other"}
        return Work(**both, other=dict(Counter(self.other) + Counter(more.other)))

    def times(self, count: float) -> Work:
        """So much work so many times over."""
        own = {f.name: count * getattr(self, f.name) for f in fields(self) if f.name != "other"}
        return Work(**own, other={name: count * value for name, value in self.other.items()})


def total(parts: Iterable[Work]) -> Work:
    """All of them together."""
    return sum(parts, Work())


# --- pieces ---------------------------------------------------------------------------------------------------------


def block(shape: Shape, tokens: float, context: float) -> float:
    """Operations of some tokens in one block, each of which attends to `context` tokens."""
    return tokens * (2 * (shape.attention + shape.mlp) + 4 * shape.n_heads * shape.head_size * context)


def plain(shape: Shape, prompts: int, tokens: int, passes: int = 1, layers: int | None = None) -> Work:
    """Whole prompts, without logits."""
    depth = shape.n_layers if layers is None else layers
    return Work(passes=passes, plain=depth * block(shape, prompts * tokens, tokens))


def vocabulary(shape: Shape, rows: int) -> Work:
    """Full-vocabulary logits of rows."""
    return Work(logits=2.0 * rows * shape.hidden * shape.vocabulary)


def next_logits(shape: Shape, prompts: int, tokens: int, shared: int = 0, chunk: int = 64) -> Work:
    """Prompts of one length asked for their next token (`models.next_logits`), so many to a call. A beginning of
    `shared` tokens is run once a pass where that spares enough."""
    size = min(chunk, max(1, 8192 // tokens), max(prompts, 1))
    passes = -(-prompts // size)
    if shared * (size - 1) < SHARED_TOKENS:
        shared = 0
    alone = plain(shape, passes, shared, passes) if shared else Work()
    rest = Work(passes=passes, plain=shape.n_layers * block(shape, prompts * (tokens - shared), tokens))
    return alone + rest + vocabulary(shape, prompts) + Work(other={"prompts": prompts})


def of_rows(shape: Shape, first: Iterable[int], tokens: int, context: int) -> float:
    """Operations of rows that join at these layers."""
    return block(shape, tokens, context) * sum(shape.n_layers - max(0, layer) for layer in first)


def firsts(shape: Shape, options: Mapping[str, Any]) -> list[int]:
    """The layer at which the row of each set of sites of `sweep.run` joins."""
    if (sets := options.get("site_sets")) is not None:
        return [min(site[0] for site in own) for own in sets]
    layers = options.get("layers")
    each = sum(shape.n_heads if c == "head" else 1 for c in options.get("components", hooks.COMPONENTS))
    return [layer for layer in (range(shape.n_layers) if layers is None else layers) for _ in range(each)]


def limit_of(shape: Shape, tokens: int, start: int, dtype: str, memory: float) -> int:
    """`single_pass.row_limit` of such prompts."""
    config = SimpleNamespace(hidden_size=shape.hidden, intermediate_size=shape.n_neurons)
    network = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    sizes = {name: getattr(shape, name) for name in ("n_heads", "n_kv_heads", "head_size")}
    model = SimpleNamespace(model=network, dtype=getattr(torch, dtype), **sizes)
    return row_limit(model, SimpleNamespace(ids=torch.empty(1, tokens), positions=(start,)), memory)


@dataclass(frozen=True)
class Machine:
    """What decides how rows are packed: GB that a pass may take, and the dtype."""

    memory: float
    dtype: str


# --- units ----------------------------------------------------------------------------------------------------------


def packed(shape: Shape, pairs: Sequence[Pair], per_pair: int, role: str, machine: Machine) -> Iterable[Sequence[int]]:
    """Pairs that share their passes, as `sweep.run_sets` packs them: pairs, tokens, first token of the role, passes."""
    for group in grouped(pairs):
        tokens, start = len(group[0].clean.ids), min(group[0].clean.roles[role])
        limit = limit_of(shape, tokens, start, machine.dtype, machine.memory)
        for pack in sweep.packs(group, per_pair, role):
            yield len(pack), tokens, start, max(1, -(-len(pack) * per_pair // limit))


def pool(shape: Shape, pairs: Sequence[Pair]) -> Work:
    """The plain runs that means and resamples are taken from: every prompt of the pairs once."""
    out = Work()
    for group in grouped(pairs):
        prompts = {side.ids for pair in group for side in (pair.clean, pair.corrupt)}
        out += plain(shape, len(prompts), len(group[0].clean.ids), -(-len(prompts) // 16))
    return out


def scored(shape: Shape, rows: int, pairs: int, passes: int) -> Work:
    """What `batches.PairBatch` scores: rows, base rows of each pass three times over, both plain runs of the pairs."""
    return vocabulary(shape, rows + 3 * passes * pairs + 2 * pairs) + Work(rows=rows)


def sweep_unit(shape: Shape, pairs: Sequence[Pair], options: Mapping[str, Any], machine: Machine) -> Work:
    """A unit of `sweep_units` (`sweep.run`), the pool of means and resamples left out. `variants` are kinds, too."""
    role = options.get("role", "last")
    denoise = options.get("direction") == "denoise" and "variants" not in options
    kinds = 1 if denoise else len(options.get("variants") or options.get("ablations") or ("counterfactual",))
    first, out = firsts(shape, options), Work()
    for count, tokens, start, passes in packed(shape, pairs, kinds * len(first), role, machine):
        suffix = tokens - start
        grown = of_rows(shape, [0] * count * passes, suffix, tokens)
        grown += count * kinds * of_rows(shape, first, suffix, tokens)
        out += plain(shape, 2 * count, tokens) + scored(shape, count * kinds * len(first), count, passes)
        out += Work(passes=passes, **{"grown" if suffix == 1 else "spans": grown}, other={"jobs": 1})
    return out


def receivers_proved(shape: Shape, tokens: int) -> Work:
    """`paths.prove_receivers`: a block of one prompt, and its attention once for each receiver."""
    heads = len({0, shape.n_heads // shape.n_kv_heads - 1, shape.n_heads - 1})
    attention = block(shape, tokens, tokens) - 2 * tokens * shape.mlp
    return Work(plain=block(shape, tokens, tokens) + (1 + 3 * heads) * attention)


def path_unit(shape: Shape, pairs: Sequence[Pair], options: Mapping[str, Any], machine: Machine) -> Work:
    """A unit of `hops.paths` (`paths.run`), the pool left out: two runs for every sender."""
    from lib import paths

    model = SimpleNamespace(n_layers=shape.n_layers, n_heads=shape.n_heads, n_kv_heads=shape.n_kv_heads)
    receivers = paths.receivers_of(model, *options["into"])
    role, frozen = options["sender_role"], options["mlps"] == "frozen"
    sets = options.get("senders")
    if sets is None:
        parts = [*(("head", head) for head in range(shape.n_heads)), ("mlp", -1)]
        sites = [hooks.EMBED, *(Site(layer, *part) for layer in range(shape.n_layers) for part in parts)]
        sets = [(site,) for site in sites if any(paths.before(site, receiver) for receiver in receivers)]
    depth = {receiver: shape.n_layers - 1 if receiver.kind == "final" else receiver.layer for receiver in receivers}
    sets = [[Site(*site) for site in own] for own in sets]
    heard = [min((depth[r] for r in receivers if any(paths.before(s, r) for s in own)), default=0) for own in sets]
    sent = [max(0, min(site.layer for site in own)) for own in sets]
    mixed = sum(len({site.layer for site in own if site.component == "head"}) for own in sets)
    project = 2 * shape.hidden * shape.n_heads * shape.head_size
    out = receivers_proved(shape, len(pairs[0].clean.ids))
    for count, tokens, start, passes in packed(shape, pairs, len(sets), role, machine):
        roles = pairs[0].clean.roles
        spoken, suffix = len(roles[role]), tokens - start
        anew = count * passes * shape.n_layers + count * sum(shape.n_layers - layer for layer in sent)
        first = 0 if frozen else 2 * shape.mlp * spoken * anew
        first += 2 * project * spoken * count * mixed
        for receiver in receivers:
            if receiver.kind in paths.PROJECTIONS:
                width = shape.n_heads if receiver.kind == "q" else shape.n_kv_heads
                there = count * (passes + sum(layer <= receiver.layer for layer in sent))
                first += 2 * shape.hidden * width * shape.head_size * there * spoken
        grown = of_rows(shape, [0] * count * passes, suffix, tokens) + count * of_rows(shape, heard, suffix, tokens)
        out += plain(shape, 2 * count, tokens) + scored(shape, count * len(sets), count, passes)
        more = {"grown" if suffix == 1 else "spans": first + grown}
        out += Work(passes=2 * passes, **more, other={"jobs": 1, "receivers": len(receivers) * passes})
    return out


def proofs(shape: Shape, pair: Pair) -> Work:
    """`sweep.prove`: identity patches behind the names, and whole residuals and attention of one run in the other."""
    tokens, suffix = len(pair.clean.ids), len(sweep.after_swapped(pair))
    first = [layer for layer in range(shape.n_layers) for _ in range(3 + len({0, shape.n_heads - 1}))]
    grown = of_rows(shape, [0, 0, *first], suffix, tokens)
    grown += of_rows(shape, [0, 0, 0, *sorted({0, shape.n_layers // 2, shape.n_layers - 1})], tokens, tokens)
    rows = len(first) + 12
    return plain(shape, 4, tokens, 3) + vocabulary(shape, rows) + Work(passes=2, spans=grown)
