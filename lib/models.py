"""Loading a decoder and the few handles everything else uses, proved on one prompt.

1. `load` turns a model string into a Hugging Face causal model: a GGUF file inside an installed Python package, a
   local folder, a hub id, or a config file with seeded random weights.
2. `find_handles` names the modules the project touches, whatever the architecture calls them.
3. `prove` runs one prompt and checks that those modules are what they are taken for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lib import hooks, weights
from lib.weights import ModelError, load_error, resolve

# Where each architecture keeps its parts; the first name that exists is taken. (path from the causal model, path from
# a block.) Llama, Qwen2, Qwen3, Mistral, Gemma2, Gemma3 use the first of each, GPT-2 the second.
NAMES = {
    "blocks": ("model.layers", "transformer.h"),
    "final_norm": ("model.norm", "transformer.ln_f"),
    "body": ("model", "transformer"),
    "attn": ("self_attn", "attn"),
    "o_proj": ("o_proj", "c_proj"),
    "mlp": ("mlp",),
    "down_proj": ("down_proj", "c_proj"),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
# How far two runs of the same prompt through kernels of other shapes may differ in a logit (measured: 1e-5 in fp32,
# 0.02 in fp16, 0.125 in bf16, 0.14 in 4 bits; a factor of ten or so is left for deeper models).
NOISE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.25, torch.bfloat16: 1.0}
QUANTISED_NOISE = 2.0
SHARED_TOKENS = 512  # fewest tokens that running a shared prefix by itself must spare


@dataclass(frozen=True, eq=False)
class Model:
    """A causal model and its handles. Lists are indexed by layer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
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
            raise ModelError(f"{self.name} has no single neurons: no {' or '.join(NAMES['down_proj'])} in its MLPs")
        projection = self.down_projs[0]
        return getattr(projection, "in_features", None) or projection.weight.shape[0]  # GPT-2's Conv1D is transposed

    @property
    def noise(self) -> float:
        """The largest logit difference that two runs of one prompt may show (logits)."""
        return QUANTISED_NOISE if self.quantisation else NOISE[self.dtype]

    def logits(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        """Logits of final hidden states (after the final norm), in fp32 or better whatever the model's dtype.

        bf16 logits between 16 and 32 move in steps of 0.125, more than most heads' effect.
        """
        weight = materialised(self.unembed)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        hidden = hidden.to(weight.device, wide)
        out = hidden.new_empty(*hidden.shape[:-1], len(weight))
        # a slice of the vocabulary at a time: it stays in a CPU's cache, and a 70B unembedding is 4 GB in fp32
        size = 1024 if weight.device.type == "cpu" else 16384
        for start in range(0, len(weight), size):
            out[..., start : start + size] = hidden @ weight[start : start + size].to(wide).T
        bias = getattr(self.unembed, "bias", None)
        out = out if bias is None else out + bias.to(wide)
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)


def materialised(module: nn.Module) -> Tensor:
    """The module's weight, also when accelerate keeps it offloaded."""
    if module.weight.device.type != "meta":
        return module.weight
    return module._hf_hook.weights_map["weight"]


def tokenizer(spec: str, sha256: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model string, without the weights."""
    where, _, local = resolve(spec, sha256)
    try:
        return AutoTokenizer.from_pretrained(where, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise load_error(spec, where, error) from error


def load(
    spec: str,
    *,
    sha256: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    device_map: str | dict | None = None,
    quantisation: str | None = None,
    max_memory: dict | None = None,
    offload_folder: str | None = None,
    attention: str | None = None,
    seed: int = 0,
) -> Model:
    """Load a model and prove its handles.

    `spec` is `package:name/file.gguf`, a folder, a hub id, or `config:file.json` (random weights from `seed`, for
    shape tests; without a tokenizer). `quantisation` is None, "nf4" or "int8" (bitsandbytes). `device_map`,
    `max_memory` (GB per device) and `offload_folder` (for weights on disk that cannot be read where they lie) are
    accelerate's. `attention` overrides the attention kernel. `sha256` is checked where
    the weights are a single local file, and refused elsewhere. Raises ModelError with what was wrong and what to do.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown; allowed are {', '.join(DTYPES)}")
    if device_map is None and (max_memory or offload_folder):
        idle = "max_memory" if max_memory else "offload_folder"
        raise ModelError(f"{idle} is for models on several devices: give device_map: auto with it, or leave it out")
    placed = device_map or pick_device(device)
    weights.check(spec, dtype, placed, quantisation, max_memory, offload_folder)
    transformers.logging.disable_progress_bar()
    where, actual, local = resolve(spec, sha256)
    random = spec.startswith("config:")
    if random and (quantisation or device_map):
        raise ModelError(f"model {spec!r} has random weights: quantisation and device_map do not apply")
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "trust_remote_code": False, "attn_implementation": attention}
    options |= quantised(quantisation, DTYPES[dtype])
    if not random:
        options |= {"use_safetensors": True, "local_files_only": local, "offload_folder": offload_folder}
        options["device_map"] = placed if device_map or quantisation else None
        options["max_memory"] = {key: f"{value}GiB" for key, value in max_memory.items()} if max_memory else None
    try:
        if random:
            torch.manual_seed(seed)
            config, words = AutoConfig.from_pretrained(where, local_files_only=True), None
            model = AutoModelForCausalLM.from_config(config, **options).to(DTYPES[dtype])
        else:
            model = AutoModelForCausalLM.from_pretrained(where, **options)
            words = AutoTokenizer.from_pretrained(where, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise load_error(spec, where, error) from error
    if device_map is None and quantisation is None:
        model = model.to(placed)
    handles = find_handles(model.eval().requires_grad_(False), words, spec, actual, quantisation)
    prove(handles)
    return handles


def pick_device(device: str) -> str:
    """`auto` takes CUDA, then Apple's MPS, then the CPU."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(kind for kind, here in found.items() if here)
    if (kind := device.split(":")[0]) not in found:
        raise ModelError(f"device {device!r} is unknown; allowed are auto, cpu, cuda, mps")
    if not found[kind]:
        raise ModelError(f"device {device!r} was asked for, but torch sees no such device; use device: auto or cpu")
    return device


def quantised(kind: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """The option that makes transformers load in 4 or 8 bits through bitsandbytes."""
    if kind is None:
        return {}
    if kind not in ("nf4", "int8"):
        raise ModelError(f"quantisation {kind!r} is unknown; allowed are nf4, int8, or none")
    if kind == "int8":
        # With a threshold, columns that any token of the batch makes stand out are computed in 16 bits for all: what
        # shares a pass then moves a row (SmolLM2: by 2.5 logits; without: 2e-5), and each layer waits for the device.
        return {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)}
    config = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, "bnb_4bit_use_double_quant": True}
    return {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True, **config)}


def named(root: nn.Module, part: str, names: tuple[str, ...], owner: str) -> nn.Module:
    """The first of the named submodules that exists, or ModelError with every name that was looked for."""
    for name in names:
        try:
            return root.get_submodule(name)
        except AttributeError:
            continue
    raise ModelError(f"{owner}: no {part} found; looked for {', '.join(names)}. Add its name to lib.models.NAMES")


def find_handles(
    model: PreTrainedModel,
    words: PreTrainedTokenizerBase | None,
    name: str,
    sha256: str | None = None,
    quantisation: str | None = None,
) -> Model:
    """The handles of a causal model, or ModelError naming the modules that were looked for."""
    config, owner = model.config.get_text_config(), type(model).__name__
    blocks = list(named(model, "blocks", NAMES["blocks"], owner))
    attns = [named(block, "attention", NAMES["attn"], owner) for block in blocks]
    heads, mlps = config.num_attention_heads, [named(block, "MLP", NAMES["mlp"], owner) for block in blocks]
    dense = all(any(hasattr(mlp, name) for name in NAMES["down_proj"]) for mlp in mlps)
    return Model(
        model=model,
        tokenizer=words,
        body=named(model, "decoder body", NAMES["body"], owner),
        blocks=blocks,
        attns=attns,
        o_projs=[named(attn, "o_proj", NAMES["o_proj"], owner) for attn in attns],
        mlps=mlps,
        down_projs=[named(mlp, "down_proj", NAMES["down_proj"], owner) for mlp in mlps] if dense else [],
        final_norm=named(model, "final norm", NAMES["final_norm"], owner),
        unembed=model.get_output_embeddings(),
        n_layers=len(blocks),
        n_heads=heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        softcap=getattr(config, "final_logit_softcapping", None),
        name=name,
        sha256=sha256,
        quantisation=quantisation,
    )


@torch.no_grad()
def prove(model: Model) -> None:
    """Check on one prompt that the handles are what they are taken for; ModelError names the module that is not.

    1. Each module's hook fires once, in the order of the layers. 2. o_proj of the captured heads equals the captured
    attention output, and down_proj of the captured neurons the MLP's. 3. The body, and the final norm of the last
    block, give the model's own logits. 4. The base pass of the sweep (cached prefix, rows appended) equals the plain
    forward pass.
    """
    from lib import single_pass  # which is built on this module

    # spread over the vocabulary: its first tokens may all be reserved, with one embedding between them (SmolLM2)
    ids = torch.arange(1, 9, device=model.device)[None] * 997 % model.model.config.get_text_config().vocab_size
    every = list(itertools.product(range(model.n_layers), hooks.COMPONENTS))
    fired: list[tuple[int, str]] = []
    handles = []
    with hooks.removing(handles):
        for key in every:
            note = lambda _, key=key: fired.append(key)  # noqa: E731
            handles.append(hooks.on_activation(model, *key, note))
        sites = [hooks.Site(layer, c) for layer in (0, model.n_layers - 1) for c in ("attn", "mlp", "resid")]
        inputs: dict[tuple[int, str], Tensor] = {}
        for end in itertools.product((0, model.n_layers - 1), ("head", "neuron") if model.down_projs else ("head",)):
            handles.append(hooks.on_activation(model, *end, lambda z, end=end: inputs.update({end: z.clone()})))
        with hooks.capture(model, sites) as seen:
            own = model.model(ids).logits[0]
    for layer, component in every:
        if (times := fired.count((layer, component))) != 1:
            raise ModelError(f"{model.name}: the hook at layer {layer} {component} fired {times} times, not once")
    for (layer, earlier), (later, component) in itertools.pairwise(fired):
        if (later, component == "resid") < (layer, earlier == "resid"):
            raise ModelError(f"{model.name}: layer {later} {component} was computed after layer {layer} {earlier}")
    for (layer, part), z in inputs.items():
        whole, name = ("attn", "o_proj") if part == "head" else ("mlp", "down_proj")
        width = model.n_heads * model.head_size if part == "head" else model.n_neurons
        if z.shape[-1] != width:
            wanted = f"{model.n_heads} heads x {model.head_size}" if part == "head" else f"{width} neurons"
            raise ModelError(
                f"{model.name}: the input of {name} at layer {layer} has width {z.shape[-1]}, not {wanted}"
            )
        projection = (model.o_projs if part == "head" else model.down_projs)[layer]
        off = (projection(z) - seen[hooks.Site(layer, whole)]).abs().max().item()
        if off > model.noise:
            where = f"the {'attention' if part == 'head' else 'MLP'} output of layer {layer}"
            raise ModelError(f"{model.name}: {name} of the {part}s differs from {where}: {off:.2g}")
    base = single_pass.base_run(model, ids, [5, 7])
    last = model.final_norm(seen[hooks.Site(model.n_layers - 1, "resid")])[:, -1]
    final = model.logits(torch.cat([base.hidden, last.to(base.hidden.device)]))
    off = (final - own[-1].to(final.device)).abs().max().item()
    # the model's own logits are in its dtype: bf16 moves in steps of 0.125 at 16 to 32
    if not off <= max(model.noise, torch.finfo(model.dtype).eps * own.abs().max().item()):
        raise ModelError(f"{model.name}: fp32 logits of the final hidden state differ from the model's own: {off:.2g}")
    single_pass.prove_identity(model, base)


@torch.no_grad()
def next_logits(
    model: Model, prompts: Sequence[Sequence[int]], batch_tokens: int = 8192
) -> Float[np.ndarray, "prompts vocab"]:
    """fp32 logits of the next token for each prompt of token ids. Same-length batches, so no padding is needed."""
    out: np.ndarray | None = None
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(index)
    for length, indices in sorted(by_length.items()):
        size = max(1, batch_tokens // length)
        for start in range(0, len(indices), size):
            chunk = indices[start : start + size]
            ids = torch.tensor([list(prompts[index]) for index in chunk], device=model.device)
            logits = model.logits(final_states(model, ids)).float().cpu().numpy()
            if out is None:
                out = np.empty((len(prompts), logits.shape[-1]), dtype=np.float32)
            out[chunk] = logits
    if out is None:
        raise ValueError("no prompts to score")
    return out


def final_states(model: Model, ids: Int[Tensor, "prompts tokens"]) -> Float[Tensor, "prompts hidden"]:
    """Final hidden states at the last token; a long beginning that all prompts share (worked examples) is run once."""
    from lib import single_pass  # which is built on this module

    shared = ((ids == ids[0]).all(0).tolist()[:-1] + [False]).index(False)
    if shared * (len(ids) - 1) < SHARED_TOKENS:
        return model.body(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
    prefix = single_pass.base_run(model, ids[:1, :shared], (), ())
    return model.body(
        input_ids=ids[:, shared:],
        past_key_values=single_pass.SharedPrefix(prefix.cache, shared, ids.new_zeros(len(ids))),
        position_ids=torch.arange(shared, ids.shape[1], device=ids.device)[None],
        use_cache=True,
    ).last_hidden_state[:, -1]
