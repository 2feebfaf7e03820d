"""A model's handles, its sites, and the three helpers of activation patching: capture, ablate, patch.

Each helper is a context manager over any set of sites. A site is read or written where the design's words place it:

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
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lib.weights import ModelError

COMPONENTS = ("resid", "attn", "mlp", "head")  # what a sweep takes unless it is told otherwise
EVERY_COMPONENT = (*COMPONENTS, "neuron")
PARTS = ("head", "neuron")  # components of which a layer has several
Visit = Callable[[Tensor], Tensor | None]  # what it returns, if anything, takes the activation's place
Positions = Sequence[int] | None  # tokens; None: all
DOWN_PROJS = ("down_proj", "c_proj")  # what an MLP's last projection is called
# How far two runs of the same prompt through kernels of other shapes may differ in a logit (measured: 1e-5 in fp32,
# 0.02 in fp16, 0.125 in bf16, 0.14 in 4 bits; a factor of ten or so is left for deeper models).
NOISE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.25, torch.bfloat16: 1.0}
QUANTISED_NOISE = 2.0
# NOISE and FLOORS hold for logits of up to ORDINARY; rounding grows with what is rounded, and so do both beyond it.
ORDINARY = 100.0
# What a mean change of logits must exceed to be an effect (logits), by number format. In 16 bits and fewer, the noise
# that was measured: ten times as much would hide single heads. In fp32, what is allowed for deeper models.
FLOORS = {"float64": 1e-9, "float32": 1e-3, "float16": 0.02, "bfloat16": 0.125, "nf4": 0.14, "int8": 0.14}


def at_size(noise: float, largest: float) -> float:
    """Noise, or a floor, of logits (or activations) the largest of which has this size."""
    return noise * max(1.0, largest / ORDINARY)


class Site(NamedTuple):
    """A place in the model: layer (0-based), component, and the head's or neuron's number (-1 where there is one)."""

    layer: int
    component: str
    head: int = -1


@dataclass(frozen=True, eq=False)
class Model:
    """A causal model and its handles. Lists are indexed by layer."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase | None
    body: nn.Module  # runs embeddings, blocks and final norm: ids -> last hidden state
    blocks: Sequence[nn.Module]
    attns: Sequence[nn.Module]
    o_projs: Sequence[nn.Module]
    mlps: Sequence[nn.Module]
    down_projs: Sequence[nn.Module]  # none where an MLP is not one hidden layer (mixtures of experts)
    final_norm: nn.Module
    unembed: nn.Module
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    softcap: float | None  # Gemma2: logits = softcap * tanh(logits / softcap)
    name: str
    sha256: str | None
    quantisation: str | None
    residual_scale: float = 1.0  # Granite: what attention and MLP write is multiplied by it before it is added
    logit_scale: float = 1.0  # Granite: what logits are multiplied by

    @property
    def device(self) -> torch.device:
        """Where token ids go: the embedding's device, that on which it runs where its weights are offloaded."""
        embedding = self.model.get_input_embeddings()
        device = embedding.weight.device
        return torch.device(embedding._hf_hook.execution_device) if device.type == "meta" else device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def n_neurons(self) -> int:
        """Hidden units of an MLP."""
        if not self.down_projs:
            raise ModelError(f"{self.name} has no single neurons: no {' or '.join(DOWN_PROJS)} in its MLPs")
        projection = self.down_projs[0]
        return getattr(projection, "in_features", None) or projection.weight.shape[0]  # GPT-2's Conv1D is transposed

    @property
    def low_precision(self) -> bool:
        """Whether kernels of other shapes round visibly differently: in 16 bits, or quantised."""
        return bool(self.quantisation) or self.dtype in (torch.float16, torch.bfloat16)

    @property
    def noise(self) -> float:
        """The largest logit difference that two runs of one prompt may show (logits), ordinary in size."""
        return QUANTISED_NOISE if self.quantisation else NOISE[self.dtype]

    def noise_of(self, values: Tensor) -> float:
        """`noise` of logits (or activations) as large as these."""
        return at_size(self.noise, values.abs().max().item())

    @property
    def floor(self) -> float:
        """What a mean change of logits, ordinary in size, must exceed to be an effect (logits)."""
        return FLOORS[self.quantisation or str(self.dtype).removeprefix("torch.")]

    def unembedding(self, tokens: Int[Tensor, "*rows"] | Sequence[int] | None = None) -> tuple[Tensor, Tensor | None]:
        """Rows of the unembedding, (*rows, hidden), and its bias, (*rows), if it has one: of all tokens or of these.

        Where logits are scaled, so are these, in fp32 or better."""
        weight, bias = materialised(self.unembed), getattr(self.unembed, "bias", None)
        if tokens is not None:
            tokens = torch.as_tensor(tokens, device=weight.device)
            weight, bias = weight[tokens], None if bias is None else bias[tokens]
        if self.logit_scale == 1:
            return weight, bias
        wide = torch.promote_types(weight.dtype, torch.float32)
        return self.logit_scale * weight.to(wide), None if bias is None else self.logit_scale * bias.to(wide)

    def logits(
        self, hidden: Float[Tensor, "*more rows hidden"], tokens: Tensor | Sequence[int] | None = None
    ) -> Float[Tensor, "*more rows vocab"]:
        """Logits of final hidden states (after the final norm), in fp32 or better whatever the model's dtype.

        Of the whole vocabulary; or of a few `tokens`: (C,), the same for every row, or (rows, C), each row's own. The
        three are computed by kernels of other shapes and agree up to rounding. (bf16 logits between 16 and 32 move in
        steps of 0.125, more than most heads' effect.)
        """
        weight, bias = self.unembedding(tokens)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        hidden = hidden.to(weight.device, wide)
        if weight.ndim == 3:
            out = torch.einsum("...rh,rth->...rt", hidden, weight.to(wide))
        else:
            out = hidden.new_empty(*hidden.shape[:-1], len(weight))
            # a slice of the vocabulary at a time: it stays in a CPU's cache, and a 70B unembedding is 4 GB in fp32
            size = 1024 if weight.device.type == "cpu" else 16384
            for start in range(0, len(weight), size):
                out[..., start : start + size] = hidden @ weight[start : start + size].to(wide).T
        out = out if bias is None else out + bias.to(wide)
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)


def materialised(module: nn.Module) -> Tensor:
    """The module's weight, also when accelerate keeps it offloaded."""
    if module.weight.device.type != "meta":
        return module.weight
    return module._hf_hook.weights_map["weight"]


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
    asked = [Site(0, name, 0 if name in PARTS else -1) for name in components]
    for site in asked + [Site(layer, "resid") for layer in layers]:
        check_site(model, site)
    heads = {name: range(n_parts(model, name)) if name in PARTS else (-1,) for name in components}
    return [Site(layer, name, head) for layer in layers for name in components for head in heads[name]]


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
    layer, kind, head = site
    if kind not in EVERY_COMPONENT:
        raise ValueError(f"component {kind!r} is unknown; allowed are {', '.join(EVERY_COMPONENT)}")
    if not 0 <= layer < model.n_layers:
        raise ValueError(f"layer {layer} is not in {model.name}: it has layers 0 to {model.n_layers - 1}")
    count = n_parts(model, kind) if kind in PARTS else 0
    if kind in PARTS and not 0 <= head < count:
        raise ValueError(f"{kind} {head} is not in {model.name}: a layer has {kind}s 0 to {count - 1}")


def first_tensor(output: Tensor | tuple) -> Tensor:
    """The activation in what a module returns: a block returns a tensor in transformers 5, a tuple before."""
    return output[0] if isinstance(output, tuple) else output


def module_of(model: Model, layer: int, component: str) -> nn.Module:
    """The module at whose output (for `head`, `neuron` and `embed`: input) a component is read and written."""
    if component == "embed":
        return model.blocks[0]
    modules = {"resid": model.blocks, "attn": model.attns, "mlp": model.mlps, "head": model.o_projs}
    return (modules | {"neuron": model.down_projs})[component][layer]


def split_call(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """The hidden states that a module was called with, its other arguments, and its other keyword arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {key: value for key, value in kwargs.items() if key != "hidden_states"}


def on_input(module: nn.Module, visit: Visit) -> RemovableHandle:
    """Call `visit` with what a module is given, each time; what it returns, if anything, is given instead."""

    def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        hidden, args, kwargs = split_call(args, kwargs)
        new = visit(hidden)
        return None if new is None else ((new, *args), kwargs)

    return module.register_forward_pre_hook(before, with_kwargs=True)


def on_activation(model: Model, layer: int, component: str, visit: Visit) -> RemovableHandle:
    """Call `visit` with the activation, (batch, tokens, width), each time it is computed; what it returns, if
    anything, replaces the activation for everything downstream."""
    module = module_of(model, layer, component)
    if component in (*PARTS, "embed"):
        return on_input(module, visit)

    def after(_: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        activation = first_tensor(output)
        if not isinstance(activation, Tensor) or activation.ndim != 3:
            shape = tuple(getattr(activation, "shape", ())) or type(activation).__name__
            raise ModelError(f"{model.name}: layer {layer} {component} gave {shape}, not (batch, tokens, width)")
        new = visit(activation)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return module.register_forward_hook(after)


@contextmanager
def removing(handles: list[RemovableHandle] | None = None) -> Iterator[list[RemovableHandle]]:
    """Remove the handles on every way out of the block, also those added inside it to the list that is yielded."""
    handles = [] if handles is None else handles
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def with_forwards(forwards: Sequence[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Run modules through other functions for a while; their hooks and parameters stay as they are."""
    before = [(module, module.__dict__.get("forward")) for module, _ in forwards]
    try:
        for module, forward in forwards:
            module.forward = forward
        yield
    finally:
        for module, forward in before:
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
def capture(model: Model, sites: Iterable[Site], positions: Positions = None) -> Iterator[dict[Site, Tensor]]:
    """Copy the activations of the sites (at the token positions, default all) during the forward passes inside: into
    the dict that is yielded, and filled anew by each pass, site -> (batch, positions, width)."""
    seen: dict[Site, Tensor] = {}
    with removing() as handles:
        for site in sites:
            check_site(model, site)

            def visit(activation: Tensor, site: Site = site) -> None:
                chosen = activation if positions is None else activation[:, list(positions)]
                seen[site] = chosen[..., columns_of(model, site)].detach().clone()

            handles.append(on_activation(model, site.layer, site.component, visit))
        yield seen


@contextmanager
def patch(model: Model, values: Mapping[Site, Tensor], positions: Positions = None) -> Iterator[dict[Site, int]]:
    """Replace the activations of the sites (at the token positions, default all) by the values given for them, which
    broadcast to (batch, positions, width). Yields a dict that counts how often each site's edit fired."""
    fired = dict.fromkeys(values, 0)
    with removing() as handles:
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


def ablate(model: Model, sites: Iterable[Site], positions: Positions = None) -> AbstractContextManager[dict[Site, int]]:
    """Zero the activations of the sites (at the token positions, default all); any other value is a `patch`."""
    return patch(model, {site: torch.zeros(1, 1, 1) for site in sites}, positions)
