"""How a vector of the residual stream speaks through the final norm and the unembedding.

A norm is g * c(x) / s(x) + b, where c subtracts the mean or does nothing and s = sqrt(mean(c(x)^2) + epsilon). At a
fixed scale s it is linear, so a logit is a sum over everything that wrote into the residual stream (Elhage et al.
2021; the scale fixed as by McGrath et al. 2023, section 2).

1. `fixed_norm` finds g, b, c and epsilon of any norm module by probing it: RMSNorm, Gemma's 1 + weight and LayerNorm
   need no cases of their own. `readout` joins the final norm to the unembedding.
2. `post_norms` finds the norms that an attention or MLP output passes before it is added (Gemma 2 and 3, OLMo 2 and 3),
   by watching which module is given that output; names do not tell (`post_attention_layernorm` comes before the MLP in
   Llama). A factor on what is added (Granite's residual multiplier) is a norm that divides by nothing.

Everything is in fp64 on the CPU, whatever the model's dtype and device.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lib import hooks
from lib.hooks import Model
from lib.weights import ModelError

LARGE, SMALL = 2.0**20, 2.0**-20  # probes whose size drowns any epsilon, or is drowned by it; powers of two are exact
TOLERANCE = 1e-5  # of the module's largest output: many norms compute in fp32 inside whatever they are given


@dataclass(frozen=True)
class FixedNorm:
    """A norm g * c(x) / s(x) + b in fp64; with `divides` false, s is 1."""

    gain: Float[Tensor, " hidden"]
    bias: Float[Tensor, " hidden"]
    centres: bool
    epsilon: float
    divides: bool = True

    def centred(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """c(x), in fp64 on the CPU."""
        x = x.detach().cpu().double()
        return x - x.mean(-1, keepdim=True) if self.centres else x

    def scale(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows"]:
        """s(x): what the norm divides x by."""
        scale = (self.centred(x).square().mean(-1) + self.epsilon).sqrt()
        return scale if self.divides else torch.ones_like(scale)

    def __call__(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """The norm itself."""
        return self.gain * self.centred(x) / self.scale(x)[..., None] + self.bias

    def pull(self, direction: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """The direction before the norm for one behind it: x adds x @ pull(direction) / s to norm(x) @ direction."""
        return self.centred(self.gain * direction.detach().cpu().double())  # c is its own transpose


@dataclass(frozen=True)
class Readout:
    """The final norm and the unembedding."""

    norm: FixedNorm
    unembed: Float[Tensor, "vocab hidden"]  # as `Model.unembedding` gives it, where the model keeps it

    def directions(self, tokens: Int[Tensor, "*rows"] | Sequence[int] | int) -> Float[Tensor, "*rows hidden"]:
        """A vector x of the residual stream at scale s adds x @ direction / s to the token's logit, before any cap."""
        return self.norm.pull(self.unembed[torch.as_tensor(tokens, dtype=torch.long, device=self.unembed.device)])


class PostNorms(NamedTuple):
    """What a block's attention and MLP outputs pass before they are added to the residual stream, if anything."""

    attn: FixedNorm | None
    mlp: FixedNorm | None


@torch.no_grad()
def fixed_norm(module: nn.Module, width: int) -> FixedNorm:
    """The parameters of a norm over `width` features; ModelError if the module is no g * c(x) / s(x) + b."""
    bare = copy.copy(module)
    for name in ("forward", "_old_forward", "_hf_hook"):  # accelerate's, which would move the probes
        bare.__dict__.pop(name, None)
    offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    weights = {
        name: (offloaded[name] if value.is_meta else value).detach().cpu().double()
        for name, value in module.named_parameters()
    }

    def run(x: Tensor) -> Tensor:
        return torch.func.functional_call(bare, weights, (x,))

    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(width // 2 + 1)[:width]
    bias = run(torch.zeros(1, width, dtype=torch.float64))[0]
    flat = run(torch.full((1, width), LARGE, dtype=torch.float64))[0]
    plain = FixedNorm(torch.ones_like(bias), torch.zeros_like(bias), bool((flat - bias).abs().max() < TOLERANCE), 0.0)
    gain = (run(LARGE * signs[None])[0] - bias) / plain(LARGE * signs)
    at = gain.abs().argmax()
    small = plain.centred(SMALL * signs)
    scale = gain[at] * small[at] / (run(SMALL * signs[None])[0] - bias)[at]
    found = FixedNorm(gain, bias, plain.centres, max(0.0, float(scale.square() - small.square().mean())))
    probe = 3 * torch.randn(4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    probe = probe * torch.tensor([[1e-3], [1.0], [30.0], [1e3]])
    real = run(probe)
    off = (real - found(probe)).abs().max().item()
    if not off <= TOLERANCE * real.abs().max().item():
        raise ModelError(
            f"{type(module).__name__} is not g * c(x) / s(x) + b: it differs by {off:.2g} on a test vector"
        )
    return found


def readout(model: Model) -> Readout:
    """The model's final norm and unembedding; ModelError where the norm is of another form."""
    unembed = model.unembedding()[0]
    return Readout(fixed_norm(model.final_norm, unembed.shape[1]), unembed)


@torch.no_grad()
def post_norms(model: Model) -> list[PostNorms]:
    """Each layer's `PostNorms`: the block's child that is given the very tensor that attention or MLP returned."""
    outputs: dict[tuple[int, str], Tensor] = {}
    found: dict[tuple[int, str], nn.Module] = {}

    def given(layer: int, child: nn.Module, args: tuple) -> None:
        for key in ((layer, "attn"), (layer, "mlp")):
            if args and args[0] is outputs.get(key):
                found.setdefault(key, child)

    with hooks.removing() as handles:
        for key in product(range(model.n_layers), ("attn", "mlp")):
            handles.append(hooks.on_activation(model, *key, lambda x, key=key: outputs.update({key: x})))
        for layer, block in enumerate(model.blocks):
            handles += [child.register_forward_pre_hook(partial(given, layer)) for child in block.children()]
        model.body(input_ids=torch.arange(1, 3, device=model.device)[None], use_cache=False)
    norms = {
        key: fixed_norm(child, outputs[key].shape[-1])
        for key, child in found.items()
        if not isinstance(child, (nn.Dropout, nn.Identity))
    }
    if model.residual_scale != 1:
        for key, output in outputs.items():
            ones = torch.ones(output.shape[-1], dtype=torch.float64)
            own = norms.get(key) or FixedNorm(ones, 0 * ones, centres=False, epsilon=0.0, divides=False)
            norms[key] = replace(own, gain=model.residual_scale * own.gain, bias=model.residual_scale * own.bias)
    return [PostNorms(norms.get((layer, "attn")), norms.get((layer, "mlp"))) for layer in range(model.n_layers)]
