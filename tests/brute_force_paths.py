"""Path patching by its definition: two full forward passes per path, nothing shared, nothing clever.

1. `plain` runs a prompt and keeps what every place of the model holds at every token.
2. `recorded` is the first run: all attention and (if frozen) all MLPs give what they gave in the base run, the senders
   give their source; it returns what then arrives at the receivers.
3. `patched` is the second run: the base prompt with every receiver's input set to that; it returns the logits.

Sources: Wang et al. 2022 (arXiv 2211.00593), section 3.1; Goldowsky-Dill et al. 2023 (arXiv 2304.05969).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lib.hooks import EMBED, Model, Site, all_sites
from lib.paths import Receiver


class Place(NamedTuple):
    """Something that can be read or set: senders (embed, head, attn, mlp), receivers (q, k, v, mlp_input, block,
    final), and all heads of a layer together (heads)."""

    kind: str
    layer: int = -1
    head: int = -1


class Write(NamedTuple):
    """A place set to a value at some tokens of the prompt."""

    place: Place
    positions: Sequence[int]
    value: Tensor  # (positions, width of the place)


def receiver(name: str) -> Receiver:
    """A receiver by its short name: "q 2.1 last", "mlp 1 names", "final last"."""
    kind, *place, role = name.split()
    layer, _, head = place[0].partition(".") if place else ("-1", "", "")
    return Receiver(int(layer), kind, int(head or -1), role)


def place_of(receiver: Receiver) -> Place:
    """Where a receiver's input is."""
    return Place("mlp_input" if receiver.kind == "mlp" else receiver.kind, receiver.layer, receiver.head)


def module_and_columns(model: Model, place: Place) -> tuple[nn.Module, bool, slice]:
    """The module of a place, whether the place is its input (else its output), and which columns of it."""
    kind, layer, head = place
    own, whole = slice(head * model.head_size, (head + 1) * model.head_size), slice(None)
    if kind == "final":
        return model.final_norm, True, whole
    if kind in ("embed", "block"):
        return model.blocks[max(layer, 0)], True, whole
    if kind in ("head", "heads"):
        return model.o_projs[layer], True, own if kind == "head" else whole
    if kind in ("mlp", "mlp_input"):
        return model.mlps[layer], kind == "mlp_input", whole
    if kind == "attn":
        return model.attns[layer], False, whole
    attention = model.attns[layer]
    for fused in ("c_attn", "qkv_proj"):  # GPT-2, Phi-3: queries, keys and values side by side
        if hasattr(attention, fused):
            start = {"q": 0, "k": model.n_heads, "v": model.n_heads + model.n_kv_heads}[kind] * model.head_size
            return getattr(attention, fused), False, slice(start + own.start, start + own.stop)
    if kind != "v" and type(attention).__name__ in ("Olmo2Attention", "Olmo3Attention"):
        return getattr(attention, f"{kind}_norm"), False, own  # a norm over all heads: what a head gets is behind it
    return getattr(attention, f"{kind}_proj"), False, own


def visit(module: nn.Module, at_input: bool, change) -> object:
    """Send the module's input or output through `change`; returns the hook's handle."""

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    def after(_: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    if at_input:
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


@torch.no_grad()
def forward(
    model: Model, ids: Sequence[int], writes: Sequence[Write] = (), reads: Sequence[Place] = ()
) -> tuple[Tensor, dict[Place, Tensor]]:
    """Logits at the last token, (vocab,), and what the places to read held after all writes, (tokens, width) each."""
    seen: dict[Place, Tensor] = {}
    handles = []
    try:
        for write in writes:
            module, at_input, columns = module_and_columns(model, write.place)

            def change(tensor: Tensor, write: Write = write, columns: slice = columns) -> Tensor:
                tensor = tensor.clone()
                tensor[0, list(write.positions), columns] = write.value
                return tensor

            handles.append(visit(module, at_input, change))
        for place in reads:
            module, at_input, columns = module_and_columns(model, place)

            def keep(tensor: Tensor, place: Place = place, columns: slice = columns) -> Tensor:
                seen[place] = tensor[0, :, columns].clone()
                return tensor

            handles.append(visit(module, at_input, keep))
        logits = model.model(torch.tensor([list(ids)], device=model.device)).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return logits, seen


@functools.lru_cache(maxsize=64)
def plain(model: Model, ids: tuple[int, ...]) -> tuple[Tensor, dict[Place, Tensor]]:
    """Logits of a plain run, and every place in it."""
    places = [Place("embed"), Place("final")]
    for layer in range(model.n_layers):
        places += [Place(kind, layer) for kind in ("block", "heads", "attn", "mlp", "mlp_input")]
        places += [Place(kind, layer, head) for kind in ("head", "q") for head in range(model.n_heads)]
        places += [Place(kind, layer, head) for kind in ("k", "v") for head in range(model.n_kv_heads)]
    return forward(model, ids, (), places)


def values_at(model: Model, ids: tuple[int, ...], sites: Sequence[Site], positions: Sequence[int]) -> dict:
    """What the sites hold at the positions in a plain run: site -> (positions, width)."""
    return {site: plain(model, ids)[1][Place(site.component, site.layer, site.head)][list(positions)] for site in sites}


def recorded(
    model: Model,
    base: tuple[int, ...],
    source: Mapping[Site, Tensor],
    positions: Sequence[int],
    receivers: Sequence[Receiver],
    mlps: str,
) -> dict[Place, Tensor]:
    """The first run: what arrives at the receivers, (tokens, width) each, when the senders hold their source at the
    positions, all attention is the base run's and the MLPs are "frozen" to it or "recomputed"."""
    before, everywhere = plain(model, base)[1], range(len(base))
    frozen = ("heads", "mlp") if mlps == "frozen" else ("heads",)
    held = [Place(kind, layer) for kind in frozen for layer in range(model.n_layers)]
    writes = [Write(place, everywhere, before[place]) for place in held]
    # after what is held, because hooks of one module run in this order
    writes += [Write(Place(site.component, site.layer, site.head), positions, source[site]) for site in source]
    return forward(model, base, writes, [place_of(receiver) for receiver in receivers])[1]


def patched(
    model: Model,
    base: tuple[int, ...],
    source: Mapping[Site, Tensor],
    positions: Sequence[int],
    receivers: Sequence[Receiver],
    roles: Mapping[str, Sequence[int]],
    mlps: str,
) -> tuple[Tensor, float]:
    """Logits at the last token, (vocab,), of the paths from the senders (the keys of `source`) to all receivers
    together, and how far the receivers' inputs moved (L2 norm over all of them)."""
    arriving, before = recorded(model, base, source, positions, receivers, mlps), plain(model, base)[1]
    writes, moved = [], 0.0
    for receiver in receivers:
        place, where = place_of(receiver), list(roles[receiver.role])
        writes.append(Write(place, where, arriving[place][where]))
        moved += (arriving[place][where] - before[place][where]).double().square().sum().item()
    return forward(model, base, writes)[0], moved**0.5


def replaced(
    model: Model,
    base: tuple[int, ...],
    other: tuple[int, ...],
    receivers: Sequence[Receiver],
    roles: Mapping[str, Sequence[int]],
) -> Tensor:
    """Logits, (vocab,), of the base prompt with the receivers' inputs replaced by those of the other prompt's run."""
    places = [(place_of(receiver), list(roles[receiver.role])) for receiver in receivers]
    return forward(model, base, [Write(p, at, plain(model, other)[1][p][at]) for p, at in places])[0]


def before(site: Site, receivers: Sequence[Receiver]) -> bool:
    """Whether the site can reach the input of one of the receivers."""

    def one(r: Receiver) -> bool:
        inside = r.kind == "mlp" and site.component in ("head", "attn") and site.layer == r.layer
        return r.kind == "final" or site.layer < r.layer or inside

    return any(map(one, receivers))


def singles(model: Model, receivers: Sequence[Receiver]) -> list[tuple[Site, ...]]:
    """Every sender by itself."""
    return [(site,) for site in (EMBED, *all_sites(model, ("head", "mlp"))) if before(site, receivers)]
