"""The three helpers of activation patching: capture, ablate, patch.

Each is a context manager over any set of sites. A site is read or written where the design's words place it:

1. `resid`: the output of a block.
2. `attn`: the output of the attention module (before a post-attention norm, where the architecture has one).
3. `mlp`: the output of the MLP module (likewise).
4. `head`: a head's slice of the input of o_proj, before heads are mixed.
5. `neuron`: one column of the input of the MLP's down projection (a hidden unit, after the activation function).

The helpers run one full forward pass per intervention. `lib.sweep` does the same edits for every site in one pass and
is tested against these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from lib.models import Model

COMPONENTS = ("resid", "attn", "mlp", "head")  # what a sweep takes unless it is told otherwise
EVERY_COMPONENT = (*COMPONENTS, "neuron")
PARTS = ("head", "neuron")  # components of which a layer has several


class Site(NamedTuple):
    """A place in the model: layer (0-based), component, and the head's or neuron's number (-1 where there is one)."""

    layer: int
    component: str
    head: int = -1


EMBED = Site(-1, "embed")  # the input of the first block; path patching sends from it, sweeps do not replace it


def site_name(layer: int, component: str, head: int = -1) -> str:
    """A site as figures and sentences call it: "21.6" (a head), "neuron 23.117", "mlp 23", "resid 20"."""
    if component == "head":
        return f"{layer}.{head}"
    return f"{component} {layer}.{head}" if head >= 0 else f"{component} {layer}"


def site_of(name: str) -> Site:
    """The site that figures and sentences call "21.6" (a head), "neuron 23.117" or "mlp 23"; ValueError for
    other words."""
    component, _, place = name.rpartition(" ")
    try:
        if component and component not in PARTS:
            return Site(int(place), component)
        layer, part = place.split(".")
        return Site(int(layer), component or "head", int(part))
    except ValueError:
        raise ValueError(f"{name!r} is not the name of a site; write 21.6 for a head, mlp 23 for a module") from None


def all_sites(model: Model, components: Iterable[str] = COMPONENTS, layers: Iterable[int] | None = None) -> list[Site]:
    """Every site of the components at the layers (default: all), by layer. Unknown names and layers are errors."""
    components, layers = list(components), list(range(model.n_layers) if layers is None else layers)
    for component in components:
        check_site(model, Site(0, component, 0 if component in PARTS else -1))
    for layer in layers:
        check_site(model, Site(layer, "resid"))
    return [
        Site(layer, component, head)
        for layer in layers
        for component in components
        for head in (range(n_parts(model, component)) if component in PARTS else (-1,))
    ]


def n_parts(model: Model, component: str) -> int:
    """Heads or neurons of a layer."""
    return model.n_heads if component == "head" else model.n_neurons


def part_size(model: Model, component: str) -> int | None:
    """Columns of one head or neuron in the activation that is read; None where the component is read whole."""
    return {"head": model.head_size, "neuron": 1}.get(component)


def check_site(model: Model, site: Site) -> None:
    """Raise ValueError when the model has no such site, saying what is allowed."""
    if site == EMBED:
        return
    if site.component not in EVERY_COMPONENT:
        raise ValueError(f"component {site.component!r} is unknown; allowed are {', '.join(EVERY_COMPONENT)}")
    if not 0 <= site.layer < model.n_layers:
        raise ValueError(f"layer {site.layer} is not in {model.name}: it has layers 0 to {model.n_layers - 1}")
    if site.component in PARTS and not 0 <= site.head < n_parts(model, site.component):
        last = n_parts(model, site.component) - 1
        raise ValueError(
            f"{site.component} {site.head} is not in {model.name}: a layer has {site.component}s 0 to {last}"
        )


def first_tensor(output: Tensor | tuple) -> Tensor:
    """The activation in what a module returns: a block returns a tensor in transformers 5, a tuple before."""
    return output[0] if isinstance(output, tuple) else output


def module_of(model: Model, layer: int, component: str) -> torch.nn.Module:
    """The module at whose output (for `head`, `neuron` and `embed`: input) a component is read and written."""
    if component == "embed":
        return model.blocks[0]
    own = {"resid": model.blocks, "attn": model.attns, "mlp": model.mlps, "head": model.o_projs}
    return (own | {"neuron": model.down_projs})[component][layer]


def on_input(module: torch.nn.Module, visit: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call `visit` with what a module is given, each time; what it returns, if anything, is given instead."""

    def before(_: torch.nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        new = visit(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    return module.register_forward_pre_hook(before, with_kwargs=True)


def on_activation(
    model: Model, layer: int, component: str, visit: Callable[[Tensor], Tensor | None]
) -> RemovableHandle:
    """Call `visit` with the activation, (batch, tokens, width), each time it is computed; what it returns, if
    anything, replaces the activation for everything downstream."""
    module = module_of(model, layer, component)
    if component in (*PARTS, "embed"):
        return on_input(module, visit)

    def after(_: torch.nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        new = visit(first_tensor(output))
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return module.register_forward_hook(after)


@contextmanager
def removing(handles: list[RemovableHandle]) -> Iterator[None]:
    """Remove the handles on every way out of the block, also those added to the list inside it."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def with_forwards(forwards: Sequence[tuple[torch.nn.Module, Callable]]) -> Iterator[None]:
    """Run modules through other functions for a while; their hooks and parameters stay as they are."""
    own = [(module, module.__dict__.get("forward")) for module, _ in forwards]
    try:
        for module, forward in forwards:
            module.forward = forward
        yield
    finally:
        for module, forward in own:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def columns_of(model: Model, site: Site) -> slice:
    """The site's columns of the activation at its module: those of a head or neuron, else all of it."""
    if (size := part_size(model, site.component)) is None:
        return slice(None)
    return slice(site.head * size, (site.head + 1) * size)


@contextmanager
def capture(
    model: Model, sites: Iterable[Site], positions: Sequence[int] | None = None
) -> Iterator[dict[Site, Float[Tensor, "batch tokens width"]]]:
    """Copy the activations of the sites (at the token positions, default all) during the forward passes inside.

    Yields a dict that each forward pass fills anew: site -> (batch, positions, width).
    """
    seen: dict[Site, Tensor] = {}
    handles: list[RemovableHandle] = []
    with removing(handles):
        for site in sites:
            check_site(model, site)

            def visit(activation: Tensor, site: Site = site) -> None:
                chosen = activation if positions is None else activation[:, list(positions)]
                seen[site] = chosen[..., columns_of(model, site)].detach().clone()

            handles.append(on_activation(model, site.layer, site.component, visit))
        yield seen


@contextmanager
def patch(
    model: Model,
    values: Mapping[Site, Float[Tensor, "#batch #positions width"]],
    positions: Sequence[int] | None = None,
) -> Iterator[dict[Site, int]]:
    """Replace the activations of the sites (at the token positions, default all) by the values given for them.

    Yields a dict that counts how often each site's edit fired.
    """
    fired = dict.fromkeys(values, 0)
    handles: list[RemovableHandle] = []
    with removing(handles):
        for site, value in values.items():
            check_site(model, site)

            def visit(activation: Tensor, site: Site = site, value: Tensor = value) -> Tensor:
                fired[site] += 1
                edited = activation.clone()
                rows = slice(None) if positions is None else list(positions)
                edited[:, rows, columns_of(model, site)] = value.to(edited)
                return edited

            handles.append(on_activation(model, site.layer, site.component, visit))
        yield fired


@contextmanager
def ablate(model: Model, sites: Iterable[Site], positions: Sequence[int] | None = None) -> Iterator[dict[Site, int]]:
    """Zero the activations of the sites (at the token positions, default all); any other value is a `patch`."""
    with patch(model, {site: torch.zeros(1, 1, 1) for site in sites}, positions) as fired:
        yield fired
