"""Where heads look: how much of its attention each gives to each name's tokens, in plain runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import pandera.pandas as pa
import torch
from jaxtyping import Float
from torch import Tensor

from lib import hooks
from lib.batches import grouped, token_ids
from lib.hooks import NOISE, Model
from lib.single_pass import SweepError
from lib.tasks import Pair
from lib.weights import ModelError

_share = pa.Column("float32", pa.Check.in_range(0, 1), nullable=True)
_PAIR = {name: pa.Column(str) for name in ("pair_id", "quad_id", "half")}
_SITE = {"layer": pa.Column("int32"), "head": pa.Column("int32"), "position": pa.Column(str)}
ATTENTION = pa.DataFrameSchema(
    {
        **_PAIR,
        **_SITE,
        "onto": pa.Column(str),  # the name attended to
        "share": pa.Column("float32", pa.Check.in_range(0, 1.02)),  # of the attention from the position's last token
        "uniform": pa.Column("float32", pa.Check.in_range(0, 1)),  # what even attention to all tokens would give
    },
    strict=True,
    unique=["pair_id", *_SITE, "onto"],
    name="table of attention",
)


def _names(pair: Pair) -> list[str]:
    """The name roles of a pair's template."""
    names = [role for role in pair.clean.roles if role.startswith("name_")]
    if not names:
        raise ValueError(f"pair {pair.pair_id}: template {pair.template!r} has no role name_a; use one with names")
    return names


@contextmanager
def eager(model: Model) -> Iterator[None]:
    """Attention in its eager form, the only one that gives its pattern; the form before comes back on every way out."""
    before = model.model.config._attn_implementation
    try:
        model.model.set_attn_implementation("eager")
        yield
    finally:
        model.model.set_attn_implementation(before)


@torch.no_grad()
def attention_to_names(model: Model, pairs: Sequence[Pair], batch: int = 16) -> pd.DataFrame:
    """How each head shares out its attention over the names of the clean prompts (schema ATTENTION).

    A row per pair x layer x head x position x name: from `last` onto the tokens of each name, and from a name's last
    token onto that name's own tokens, itself included.

    Raises ModelError when the architecture gives no pattern that sums to one, SweepError when the eager run's logits
    are not those of the ordinary run within the dtype's noise.
    """
    frames = []
    for group in grouped(pairs, batch):
        frames += _attention(model, group)
    out = pd.concat(frames, ignore_index=True)
    order = {pair.pair_id: index for index, pair in enumerate(pairs)}
    return out.iloc[np.argsort(out["pair_id"].map(order).to_numpy(), kind="stable")].reset_index(drop=True)


def _attention(model: Model, pairs: Sequence[Pair]) -> list[pd.DataFrame]:
    """The rows of pairs that share a pass: one frame per position and name."""
    roles, ids = pairs[0].clean.roles, token_ids(model, [pair.clean.ids for pair in pairs])
    names = _names(pairs[0])
    asked = [("last", name) for name in names] + [(name, name) for name in names]
    shares = torch.zeros(len(asked), len(pairs), model.n_layers, model.n_heads)
    plain = model.logits(model.body(input_ids=ids, use_cache=False).last_hidden_state[:, -1])
    with eager(model), hooks.removing() as handles:
        for layer, module in enumerate(model.attns):

            def keep(_: torch.nn.Module, __: tuple, output: Any, layer: int = layer) -> None:
                pattern = _pattern(model, layer, output, ids.shape)
                for index, (position, name) in enumerate(asked):
                    shares[index, :, layer] = pattern[:, :, roles[position][-1], list(roles[name])].sum(-1).cpu()

            handles.append(module.register_forward_hook(keep))
        seen = model.logits(model.body(input_ids=ids, use_cache=False).last_hidden_state[:, -1])
    off = (seen - plain).abs().max().item()
    noise = max(model.noise_of(plain), NOISE[torch.float32])  # its softmax is in fp32
    if not off <= noise:
        raise SweepError(
            f"pair {pairs[0].pair_id} ...: with eager attention a logit differs from the ordinary run by {off:.3g}, "
            f"more than {noise:g}, the noise of {model.dtype}: these are not the patterns of the model's own run"
        )
    sites = pd.MultiIndex.from_product(
        [range(len(pairs)), range(model.n_layers), range(model.n_heads)], names=["pair", "layer", "head"]
    ).to_frame(index=False)
    about = {key: np.array([getattr(pair, key) for pair in pairs])[sites["pair"]] for key in _PAIR}
    where = {key: sites[key].to_numpy(np.int32) for key in ("layer", "head")}
    return [
        pd.DataFrame(about | where).assign(
            position=position,
            onto=name,
            share=part.flatten().numpy(),
            uniform=np.float32(len(roles[name]) / (roles[position][-1] + 1)),
        )
        for (position, name), part in zip(asked, shares, strict=True)
    ]


def _pattern(model: Model, layer: int, output: Any, shape: Sequence[int]) -> Float[Tensor, "pairs heads tokens tokens"]:
    """The attention pattern in what an attention module returns, checked."""
    pattern = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    wanted = (shape[0], model.n_heads, shape[1], shape[1])
    if pattern is None or tuple(pattern.shape) != wanted:
        found = "none" if pattern is None else f"one of shape {tuple(pattern.shape)}"
        raise ModelError(
            f"{model.name}: the attention module of layer {layer} gives no pattern of shape {wanted} (pairs, heads, "
            f"tokens, tokens) with eager attention but {found}; attention cannot be measured on this architecture"
        )
    off = (pattern.float().sum(-1) - 1).abs().max().item()
    if not off < 0.02:  # bf16 shares of 30 tokens add up to 1 within 0.01
        raise ModelError(
            f"{model.name}: the attention of layer {layer} does not add up to 1 but is off by {off:.2g}: this "
            "architecture has a sink or a cap that takes a share; attention cannot be compared with even attention"
        )
    return pattern.float()
