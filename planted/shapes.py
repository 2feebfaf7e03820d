"""The architectures that a planted circuit is laid into, and the weights it is laid in as.

1. `Weights` are what all of them have in common: embedding and unembedding, and of every layer what its heads ask,
   know, copy and write, and what its neurons read and write; in the residual stream's own dimensions.
2. `config` is the Hugging Face config of a shape, `install` lays weights into a model of it. What differs:
   - llama: RMSNorm, rotary positions, keys shared by heads, a gate times an input (SwiGLU).
   - gemma2: the norms' weights are about 1 and stand after attention and MLP, too; embeddings are scaled; GELU gates;
     scores have a scale of their own, and scores and logits a soft cap.
   - gpt2: LayerNorm, learned positions, fused queries, keys and values, GELU, and biases, which hold all constants.
3. A norm's epsilon is so large that the norm does nothing: x / sqrt(mean(x^2) + EPSILON) * sqrt(EPSILON) is x to 1e-5.
   LayerNorm also takes the mean away; `rotation` lays it where nothing writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor

from planted.circuit import AT, LOGIT_CAP, SCORE_CAP, SPACES, STEEP, WIDTH
from planted.options import HEADS, Options

HIDDEN, SIZE = 256, 32  # of the residual stream, of a head
EPSILON, THETA = 1e4, 1e12
LENGTH = 512  # most tokens of a prompt
QUERY_SCALAR = 64  # scores of gemma2 are divided by its root
TURNS = tuple(THETA ** (-2 * pair / SIZE) for pair in range(SPACES["position"] // 2))
"""1, 0.18 and 0.03 radians a token, of the rotary pairs or position embeddings by which a head finds a distance."""


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


@dataclass
class Layer:
    """What a layer reads and writes. Heads' scores are their queries times their keys, without a scale; neurons are
    relu(gate), as far as a steep gate is that."""

    groups: int  # of key-value heads
    query: Tensor = field(default_factory=lambda: zeros(HEADS * SIZE, HIDDEN))
    out: Tensor = field(default_factory=lambda: zeros(HIDDEN, HEADS * SIZE))
    gate: Tensor = field(default_factory=lambda: zeros(WIDTH, HIDDEN))
    down: Tensor = field(default_factory=lambda: zeros(HIDDEN, WIDTH))

    def __post_init__(self) -> None:
        self.key, self.value = zeros(self.groups * SIZE, HIDDEN), zeros(self.groups * SIZE, HIDDEN)


class Weights:
    """All weights of a circuit; zero until something is put there."""

    def __init__(self, o: Options, words: int) -> None:
        self.embedding, self.unembedding = zeros(words, HIDDEN), zeros(words, HIDDEN)
        self.layers = [Layer(o.groups) for _ in range(o.n_layers)]


def config(o: Options, words: int) -> transformers.PreTrainedConfig:
    """The config of a shape; with random weights its norm and its positions are ordinary ones."""
    random = o.no_circuit == "random"
    common = {
        "vocab_size": words,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": None,
        "initializer_range": 0.05,
    }
    epsilon = 1e-6 if random else EPSILON
    if o.shape == "gpt2":
        sizes = {"n_embd": HIDDEN, "n_layer": o.n_layers, "n_head": HEADS, "n_inner": WIDTH, "n_positions": LENGTH}
        return transformers.GPT2Config(**common, **sizes, layer_norm_epsilon=epsilon)
    common |= {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": o.n_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": o.groups,
        "head_dim": SIZE,
        "rms_norm_eps": epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4 if random else THETA},
        "max_position_embeddings": LENGTH,
    }
    if o.shape == "llama":
        return transformers.LlamaConfig(**common)
    caps = {"attn_logit_softcapping": SCORE_CAP, "final_logit_softcapping": LOGIT_CAP}
    return transformers.Gemma2Config(**common, **caps, query_pre_attn_scalar=QUERY_SCALAR)


def rotation(o: Options) -> Tensor:
    """(dimensions, dimensions): what turns the residual stream, as row vectors. At random, if asked; and for a norm
    that takes the mean away, so that the mean is the last dimension, in which nothing is written."""
    draw, free = torch.Generator().manual_seed(o.seed), HIDDEN - (o.shape == "gpt2")
    turn = torch.eye(HIDDEN, dtype=torch.float64)
    if o.rotated:
        turn[:free, :free] = torch.linalg.qr(torch.randn(free, free, generator=draw, dtype=torch.float64))[0]
    if o.shape == "gpt2":
        mirror = -torch.full((HIDDEN,), HIDDEN**-0.5, dtype=torch.float64)
        mirror[-1] += 1
        turn -= 2 * torch.outer(turn @ mirror, mirror) / (mirror @ mirror)
    return turn.float()


def install(model: transformers.PreTrainedModel, weights: Weights, o: Options) -> None:
    """Put the weights, turned, into a model of the shape; what no weight is given for is 0."""
    turn = rotation(o)
    for name, weight in model.named_parameters():
        norm = any(part in name for part in ("norm", "ln_")) and name.endswith("weight")
        weight.fill_(EPSILON**0.5 - (o.shape == "gemma2") if norm else 0)
    scale = HIDDEN**0.5 if o.shape == "gemma2" else 1.0
    model.get_input_embeddings().weight.copy_(weights.embedding @ turn / scale)
    model.get_output_embeddings().weight.copy_(weights.unembedding @ turn)
    if o.shape == "gpt2":
        model.transformer.wpe.weight.copy_(positions() @ turn)
        for layer, block in zip(weights.layers, model.transformer.h, strict=True):
            install_fused(block, layer, turn)
        return
    spread = (QUERY_SCALAR if o.shape == "gemma2" else SIZE) ** 0.5
    one = turn[AT["one"]]
    for layer, block in zip(weights.layers, model.model.layers, strict=True):
        attention, mlp = block.self_attn, block.mlp
        attention.q_proj.weight.copy_(spread * layer.query @ turn)
        attention.k_proj.weight.copy_(layer.key @ turn)
        attention.v_proj.weight.copy_(layer.value @ turn)
        attention.o_proj.weight.copy_(turn.T @ layer.out)
        used = layer.gate.any(1, keepdim=True)
        mlp.gate_proj.weight.copy_(STEEP * layer.gate @ turn)
        mlp.up_proj.weight.copy_(used * one / STEEP)
        mlp.down_proj.weight.copy_(turn.T @ layer.down)


def install_fused(block: torch.nn.Module, layer: Layer, turn: Tensor) -> None:
    """A layer of GPT-2, whose weights are (inputs, outputs): what is read of the constant dimension are the biases."""

    def put(module: torch.nn.Module, reads: Tensor) -> None:
        reads = reads.clone()
        module.bias.copy_(reads[:, AT["one"]][:, 0])
        reads[:, AT["one"]] = 0
        module.weight.copy_((reads @ turn).T)

    put(block.attn.c_attn, torch.cat([SIZE**0.5 * layer.query, layer.key, layer.value]))
    block.attn.c_proj.weight.copy_((turn.T @ layer.out).T)
    put(block.mlp.c_fc, STEEP * layer.gate)
    block.mlp.c_proj.weight.copy_((turn.T @ layer.down).T / STEEP)


def positions() -> Tensor:
    """(positions, dimensions): the cosine and the sine of every position, by each of `TURNS`."""
    out = zeros(LENGTH, HIDDEN)
    angles = torch.arange(LENGTH)[:, None] * torch.tensor(TURNS)
    out[:, AT["position"]] = torch.cat([angles.cos(), angles.sin()], dim=1)
    return out
