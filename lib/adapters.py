"""LoRA adapters in peft's format, merged into a model's weights (Hu et al. 2021, arXiv 2106.09685, section 4.1).

1. `scale_of` reads adapter_config.json: each key is understood, says nothing of the weights, or is refused by name.
2. `merge` adds scale x B A to the weight of every module that adapter_model.safetensors has an A and a B for, in fp32
   or better. What is merged is an ordinary model: every site of it is exact as before.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import Conv1D

from lib.weights import ModelError, may_be_one

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of peft's names for the modules of what it wraps
BASE = "base_model_name_or_path"
# Keys that say how the adapter was trained, or what its tensors say by themselves.
SILENT = (BASE, "megatron_core", "revision", "inference_mode", "lora_dropout", "target_modules", "exclude_modules")
SILENT += ("layers_to_transform", "layers_pattern", "peft_version", "task_type", "auto_mapping", "fan_in_fan_out")
# Keys with the values they may have, beside those of a thing that is not used (null, false, nothing in it).
ALLOWED = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian")}
ALLOWED |= {"use_rslora": (True,)}
READ = ("r", "lora_alpha")
UNUSED = (None, False, {}, [], "")


def scale_of(config: dict[str, Any], where: Path) -> float:
    """What B A is multiplied by. ModelError for a key that is not understood: a variant (DoRA, PiSSA, ...), or weights
    beside A and B."""
    for key, value in config.items():
        if key in SILENT + READ or value in ALLOWED.get(key, ()) or value in UNUSED:
            continue
        if key == "qalora_group_size" and not config.get("use_qalora"):
            continue
        known = f"; understood is {', '.join(map(repr, ALLOWED[key]))}" if key in ALLOWED else ""
        raise ModelError(f"adapter {where}: {key} = {value!r} of {CONFIG} is not understood{known}. Merge it with peft")
    for key in ("peft_type", "r", "lora_alpha"):
        if not config.get(key):
            raise ModelError(f"adapter {where}: {CONFIG} has no {key}")
        if key != "peft_type" and type(config[key]) not in (int, float):
            raise ModelError(f"adapter {where}: {key} = {config[key]!r} of {CONFIG} is no number")
    return config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])


def check_base(config: dict[str, Any], folder: str, model: str) -> None:
    """ModelError for the adapter of a hub model whose name is not the model's. (A path says nothing elsewhere.)"""
    base = config.get(BASE)
    if (
        re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(base))
        and not model.startswith("config:")
        and not may_be_one(base, model)
    ):
        raise ModelError(
            f"adapter {folder!r} was trained on {base}, and the model here is {model}; if the two are one, write the "
            f"latter as {BASE} into a copy of its {CONFIG}"
        )


def read(folder: str, model: str) -> tuple[float, int, dict[str, Tensor]]:
    """The scale, the rank and the tensors of an adapter's folder."""
    where = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (where / name).is_file():
            raise ModelError(f"adapter {folder!r} has no {name}; give a folder of peft's with weights in safetensors")
    try:
        config = json.loads((where / CONFIG).read_text(encoding="utf-8"))
        scale, rank = scale_of(config, where), config["r"]
        check_base(config, folder, model)
        return scale, rank, safetensors.torch.load_file(where / WEIGHTS)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, safetensors.SafetensorError) as error:
        raise ModelError(f"adapter {folder!r} cannot be read: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def merge(model: nn.Module, folder: str, name: str) -> None:
    """Add an adapter to the weights of a model, in place. ModelError, before any weight is changed, for tensors that
    are no A or B of a linear module of the model, of another shape or rank, or that are not finite, and for the adapter
    of a model of another name."""
    scale, rank, tensors = read(folder, name)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        path, _, part = name.removesuffix(".weight").rpartition(".")
        if part not in ("lora_A", "lora_B") or not name.startswith(PREFIX) or not value.isfinite().all():
            raise ModelError(f"adapter {folder!r}: tensor {name!r} is no finite lora_A or lora_B weight")
        pairs.setdefault(path.removeprefix(PREFIX), {})[part] = value
    if not pairs:
        raise ModelError(f"adapter {folder!r} has no tensors in {WEIGHTS}")
    ready = [linear(model, path, both, rank, folder) for path, both in pairs.items()]
    for module, both in zip(ready, pairs.values(), strict=True):
        wide = torch.promote_types(module.weight.dtype, torch.float32)
        change = scale * (both["lora_B"].to(wide) @ both["lora_A"].to(wide))
        change = change.T if isinstance(module, Conv1D) else change  # GPT-2's keeps its weight transposed
        module.weight.copy_(module.weight.to(wide) + change.to(module.weight.device))


def linear(model: nn.Module, path: str, both: dict[str, Tensor], rank: int, folder: str) -> nn.Module:
    """The module that an A and a B belong to, once they are known to fit."""
    where = f"adapter {folder!r}: {path}"
    if len(both) < 2:
        raise ModelError(f"{where} has {next(iter(both))} alone")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ModelError(f"{where} is no module of {type(model).__name__}; give the model it was trained on") from None
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise ModelError(f"{where} is a {type(module).__name__}; only linear modules are merged")
    if module.weight is model.get_input_embeddings().weight:
        raise ModelError(f"{where} shares its weight with the embeddings, which would change with it; untie them first")
    shape = tuple(module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape)
    found = tuple(both["lora_A"].shape), tuple(both["lora_B"].shape)
    if found != ((rank, shape[1]), (shape[0], rank)):
        raise ModelError(f"{where} has A and B of shapes {found[0]} and {found[1]}; rank {rank} and {shape} do not fit")
    return module
