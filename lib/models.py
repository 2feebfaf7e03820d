"""Loading a decoder and the few handles everything else uses, proved on one prompt.

1. `load` turns a model string into a Hugging Face causal model: a GGUF file inside an installed Python package, a
   local folder, a hub id, or a config file with seeded random weights.
2. `find_handles` names the modules the project touches, whatever the architecture calls them.
3. `prove` runs one prompt and checks that those modules are what they are taken for.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lib import hooks

# Where each architecture keeps its parts; the first name that exists is taken. (path from the causal model, path from
# a block.) Llama, Qwen2, Qwen3, Mistral, Gemma2, Gemma3 use the first of each, GPT-2 the second.
NAMES = {
    "blocks": ("model.layers", "transformer.h"),
    "final_norm": ("model.norm", "transformer.ln_f"),
    "body": ("model", "transformer"),
    "attn": ("self_attn", "attn"),
    "o_proj": ("o_proj", "c_proj"),
    "mlp": ("mlp",),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
# How far two runs of the same prompt through kernels of other shapes may differ in a logit (measured: 1e-5 in fp32,
# 0.02 in fp16, 0.125 in bf16, 0.14 in 4 bits; a factor of ten or so is left for deeper models).
NOISE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.25, torch.bfloat16: 1.0}
QUANTISED_NOISE = 2.0


class ModelError(ValueError):
    """A model that cannot be loaded, or whose modules are not what they were taken for."""


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
        """Where token ids go: the embedding's device (an offloaded one runs on the first device)."""
        device = self.model.get_input_embeddings().weight.device
        return torch.device(self.model.device) if device.type == "meta" else device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

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
        if weight.dtype == wide:
            out = hidden @ weight.T
        else:  # a 70B unembedding is 4 GB in fp32: cast it a slice of the vocabulary at a time
            out = torch.cat([hidden @ part.to(wide).T for part in weight.split(16384)], dim=-1)
        bias = getattr(self.unembed, "bias", None)
        out = out if bias is None else out + bias.to(wide)
        return out if self.softcap is None else self.softcap * torch.tanh(out / self.softcap)


def materialised(module: nn.Module) -> Tensor:
    """The module's weight, also when accelerate keeps it offloaded."""
    if module.weight.device.type != "meta":
        return module.weight
    return module._hf_hook.weights_map["weight"]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where converted weights are kept: $SUPERSET_CIRCUIT_CACHE, else the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SUPERSET_CIRCUIT_CACHE") or Path(root) / "superset-circuit")


def package_file(spec: str) -> Path:
    """The file behind `package:name/file`, found without importing the package (its import may need more)."""
    package, _, file = spec.removeprefix("package:").partition("/")
    found = find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ModelError(f"model {spec!r}: no Python package {package!r} is installed; `make book` installs it")
    path = Path(found.submodule_search_locations[0]) / file
    if not path.is_file():
        raise ModelError(f"model {spec!r}: package {package!r} has no file {file!r}")
    return path


def converted(source: Path, sha256: str) -> Path:
    """The folder with the GGUF file's weights as fp32 safetensors, named by its SHA-256. Converts once (some 20 s)."""
    folder = cache_folder() / sha256
    if folder.is_dir():  # it appears whole or not at all; one that was damaged since is an error at load
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{sha256[:12]}-"))
    try:
        where = {"gguf_file": source.name, "local_files_only": True}
        AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(beside)
        model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
        # transformers refuses to save a model that came from GGUF; its weights are plain fp32 by now
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(beside)
        try:
            beside.rename(folder)
        except OSError:
            if not folder.is_dir():  # not another process that was first
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def resolve(spec: str, sha256: str | None = None) -> tuple[str, str | None, bool]:
    """What to hand to transformers for a model string, the weights' SHA-256 where known, and whether it is local."""
    where, actual, local = spec, None, True
    if spec.startswith("package:"):
        actual = sha256_of(package_file(spec))
    elif spec.startswith("config:"):
        where = spec.removeprefix("config:")
        if not Path(where).is_file():
            raise ModelError(f"model {spec!r}: there is no such file")
    elif Path(spec).is_dir():
        weights = sorted(Path(spec).glob("*.safetensors"))
        actual = sha256_of(weights[0]) if len(weights) == 1 else None
    elif spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        forms = "package:name/file.gguf, an existing folder, a hub id owner/name, or config:file.json"
        raise ModelError(f"model {spec!r}: no such folder. Give {forms}")
    else:
        local = False
    if sha256 is not None and actual is None:
        raise ModelError(f"model {spec!r}: only the SHA-256 of a single local weights file is checked; give none here")
    if sha256 not in (None, actual):
        raise ModelError(f"model {spec!r}: the weights file has SHA-256 {actual}, the profile asks for {sha256}")
    if spec.startswith("package:"):
        where = str(converted(package_file(spec), actual))
    return where, actual, local


def load_error(spec: str, where: str, error: Exception) -> ModelError:
    """One clear message for the ways in which a model cannot be had."""
    text = f"{type(error).__name__}: {error}"
    if any(sign in text for sign in ("gated repo", "401 Client", "403 Client")):
        todo = "accept its licence on its page, then set HF_TOKEN or run `hf auth login`"
        return ModelError(f"model {spec!r} is gated or private: {todo}")
    text = f"model {spec!r} could not be loaded: {text.splitlines()[0]}"
    if spec.startswith("package:"):
        text += f" (if its converted weights were damaged: delete the folder {where} and run again)"
    return ModelError(text)


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
    `max_memory` (GB per device) and `offload_folder` are accelerate's. `attention` overrides the attention kernel.
    `sha256` is checked where the weights are a single local file, and refused elsewhere. Raises ModelError with what
    was wrong and what to do.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown; allowed are {', '.join(DTYPES)}")
    placed = device_map or pick_device(device)
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
        return {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True)}
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
    heads = config.num_attention_heads
    return Model(
        model=model,
        tokenizer=words,
        body=named(model, "decoder body", NAMES["body"], owner),
        blocks=blocks,
        attns=attns,
        o_projs=[named(attn, "o_proj", NAMES["o_proj"], owner) for attn in attns],
        mlps=[named(block, "MLP", NAMES["mlp"], owner) for block in blocks],
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
    attention output. 3. The body, and the final norm of the last block, give the model's own logits. 4. The base pass
    of the sweep (cached prefix, rows appended) equals the plain forward pass.
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
        sites = [hooks.Site(layer, c) for layer in (0, model.n_layers - 1) for c in ("attn", "resid")]
        inputs: dict[int, Tensor] = {}
        for end in (0, model.n_layers - 1):
            handles.append(hooks.on_activation(model, end, "head", lambda z, end=end: inputs.update({end: z.clone()})))
        with hooks.capture(model, sites) as seen:
            own = model.model(ids).logits[0]
    for layer, component in every:
        if (times := fired.count((layer, component))) != 1:
            raise ModelError(f"{model.name}: the hook at layer {layer} {component} fired {times} times, not once")
    for (layer, earlier), (later, component) in itertools.pairwise(fired):
        if (later, component == "resid") < (layer, earlier == "resid"):
            raise ModelError(f"{model.name}: layer {later} {component} was computed after layer {layer} {earlier}")
    for layer, z in inputs.items():
        if z.shape[-1] != model.n_heads * model.head_size:
            heads = f"{model.n_heads} heads x {model.head_size}"
            raise ModelError(f"{model.name}: the input of o_proj at layer {layer} has width {z.shape[-1]}, not {heads}")
        off = (model.o_projs[layer](z) - seen[hooks.Site(layer, "attn")]).abs().max().item()
        if off > model.noise:
            where = f"the attention output of layer {layer}"
            raise ModelError(f"{model.name}: o_proj of the heads differs from {where}: {off:.2g}")
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
            hidden = model.body(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
            logits = model.logits(hidden).float().cpu().numpy()
            if out is None:
                out = np.empty((len(prompts), logits.shape[-1]), dtype=np.float32)
            out[chunk] = logits
    if out is None:
        raise ValueError("no prompts to score")
    return out
