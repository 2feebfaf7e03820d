"""Sparse autoencoders (SAEs) of any origin as one form, and published ones read from their files.

1. `Coder` is what all of them come to: f = relu(W (x - c) + b), of which the k largest are kept where the SAE is a
   top-k one, and those above thresholds of their own where it is a JumpReLU one; x = f D + c + error.
2. `read` knows a file's format by the names of its tensors. Every tensor, and every key of its cfg.json, is understood,
   says nothing of what the SAE computes (SILENT), or is refused by name.
3. `check_names` compares the place and the model that the SAE was trained on with those of the profile, `check_model`
   what only the loaded model can tell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from lib import hooks
from lib.hooks import Model, Site
from lib.readout import post_norms, readout
from lib.weights import may_be_one
from pipeline.step import StepError

# tensors by the names they have in each format: ours, and whether they are stored transposed
FORMATS = {
    "eai-sparsify": {"encoder.weight": "encoder", "encoder.bias": "bias", "W_dec": "decoder", "b_dec": "centre"},
    "sae-lens": {"W_enc": "encoder.T", "b_enc": "bias", "W_dec": "decoder", "b_dec": "centre"},
    "goodfire": {
        "encoder_linear.weight": "encoder",
        "encoder_linear.bias": "bias",
        "decoder_linear.weight": "decoder.T",
        "decoder_linear.bias": "centre",
    },
}
FACTORS = ("scaling_factor", "finetuning_scaling_factor")  # sae-lens': of each feature when it is decoded
# Keys that say where an SAE comes from or how it was trained, not what it computes.
SILENT = {"dtype", "device", "dataset_path", "dataset_trust_remote_code", "context_size", "prepend_bos", "seed"}
SILENT |= {"sae_lens_version", "sae_lens_training_version", "neuronpedia_id", "model_class_name", "seqpos_slice"}
SILENT |= {"exclude_special_tokens", "training_tokens", "expansion_factor", "normalize_decoder", "multi_topk"}
SILENT |= {"sequence_separator_token", "disable_concat_sequences"}
# Of how TransformerLens loaded the model: what changes nothing of a residual stream or an MLP's output.
LOADED = {"fold_ln", "center_unembed", "fold_value_biases", "n_devices", "dtype"}
LENS = (("standard", "relu"), ("standard", "topk"), ("topk", "topk"), ("jumprelu", "relu"))
FORMER = {"hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index"}
FORMER |= {"activation_fn": "activation_fn_str"}
BESIDE = "sparsity.safetensors"  # of sae-lens' folders: how often features fired in training
# A place by its name in TransformerLens and in transformers.
HOOK = re.compile(r"blocks\.(?P<layer>\d+)\.hook_(?P<kind>resid_post|resid_pre|mlp_out)")
BLOCK = r"(?:.*\.)?(?:layers|h)\.(?P<layer>\d+)"
MODULE = re.compile(BLOCK + r"(?P<kind>\.mlp)?")


@dataclass(frozen=True)
class Coder:
    """An SAE of any origin, in fp32 on the CPU."""

    encoder: Float[Tensor, "features width"]
    bias: Float[Tensor, " features"]
    decoder: Float[Tensor, "features width"]
    centre: Float[Tensor, " width"]
    active: int | None = None  # k of a top-k SAE; None: every feature above 0 counts
    centred: bool = True  # whether the centre is taken off before encoding
    threshold: Float[Tensor, " features"] | None = None  # of a JumpReLU SAE: what a feature must exceed to count

    def encode(self, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows features"]:
        """Activations of all features, most of them 0."""
        x = x.detach().cpu().float()
        before = (x - self.centre if self.centred else x) @ self.encoder.T + self.bias
        values = torch.relu(before)
        if self.threshold is not None:
            values = values * (before > self.threshold)
        if self.active is None or self.active >= values.shape[-1]:
            return values
        top = values.topk(self.active, dim=-1)
        return torch.zeros_like(values).scatter(-1, top.indices, top.values)

    def decode(self, values: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows width"]:
        """What the features put together."""
        return values @ self.decoder + self.centre


class Origin(NamedTuple):
    """What a published SAE says of where it was trained; None where it does not say."""

    hook: str | None = None
    model: str | None = None
    centred_stream: bool = False  # whether TransformerLens took the mean off what is written into the residual stream


class Config:
    """The keys of a cfg.json, each taken once; what is left when all are taken is refused."""

    def __init__(self, where: str, about: Path | None) -> None:
        self.where, self.left = where, {}
        if about is None:
            return
        try:
            self.left.update(json.loads(about.read_text(encoding="utf-8")).items())
        except (ValueError, AttributeError) as error:
            raise self.refuse(f"its cfg.json cannot be read: {error}") from None

    def refuse(self, told: str) -> StepError:
        return StepError(f"sae_file {self.where}: {told}")

    def take(self, key: str, *allowed: Any, default: Any = None) -> Any:
        """The key's value, which must be one of `allowed` where they are given."""
        value = self.left.pop(key, default)
        if allowed and value not in allowed:
            raise self.refuse(f"{key} = {value!r} cannot be read; {' or '.join(map(repr, allowed))} can")
        return value

    def of(self, kind: type, key: str) -> Any:
        """The key's value, which must be of this kind; an empty one where it is not there, or null."""
        value = self.left.pop(key, None)
        if not isinstance(value, kind | None):
            raise self.refuse(f"{key} = {value!r} cannot be read")
        return value or kind()

    def flatten(self) -> None:
        """What sae-lens keeps in groups, and under names of earlier versions, by its own names."""
        groups = [self.of(dict, "meta"), self.of(dict, "metadata"), self.left]
        self.left = {}
        for name, value in (item for group in groups for item in group.items()):
            key = FORMER.get(name, name)
            if self.left.setdefault(key, value) != value:
                raise self.refuse(f"{key} stands there twice, as {self.left[key]!r} and as {value!r}")

    def done(self) -> None:
        if unknown := sorted(self.left.keys() - SILENT):
            key = unknown[0]
            raise self.refuse(
                f"{key} = {self.left[key]!r} of its cfg.json is not understood; if it says nothing of what the SAE "
                "computes, take it out of a copy"
            )


def read(path: str | Path, width: int) -> tuple[Coder, Origin]:
    """A published SAE for activations of `width`, from a safetensors file or a folder that holds one.

    Known by the names of their tensors: eai-sparsify's top-k SAEs (cfg.json, sae.safetensors), sae-lens' standard,
    top-k and JumpReLU ones (cfg.json, sae_weights.safetensors) and the ReLU SAEs of Goodfire (Llama 3.3 70B, layer 50),
    converted from their .pt file. The formats were taken from the libraries' code; the 70B file itself was not tried.

    Raises StepError for no file, an unknown or pickled one, one of another width, and for tensors and keys that are
    not understood.
    """
    file = file_of(Path(path))
    try:
        tensors = {name: value.float() for name, value in safetensors.torch.load_file(file).items()}
    except safetensors.SafetensorError as error:
        raise StepError(f"sae_file {file} cannot be read: {error}") from None
    kind = next((kind for kind, names in FORMATS.items() if names.keys() <= tensors.keys()), None)
    if kind is None:
        known = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in FORMATS.items())
        raise StepError(f"sae_file {path} has tensors {', '.join(tensors)}, which is none of the known kinds ({known})")
    about = Path(path) / "cfg.json"
    if kind != "goodfire" and not about.is_file():
        raise StepError(
            f"sae_file {path}: give the folder of an SAE of {kind}'s, with the cfg.json that says what it does"
        )
    config = Config(str(path), about if about.is_file() else None)
    own = {ours: tensors.pop(theirs) for theirs, ours in FORMATS[kind].items()}
    own |= {key[:-2]: own.pop(key).transpose(0, -1).contiguous() for key in list(own) if key.endswith(".T")}
    check_shapes(config, own | tensors, width)
    of_kind = {"eai-sparsify": of_sparsify, "sae-lens": of_lens, "goodfire": of_goodfire}[kind]
    coder, origin = of_kind(config, own, tensors)
    config.done()
    if tensors:
        raise config.refuse(f"tensor {sorted(tensors)[0]!r} is not understood")
    return coder, origin if kind != "eai-sparsify" else origin._replace(hook=folder_hook(file.parent.name))


def file_of(path: Path) -> Path:
    """The safetensors file itself."""
    found = [file for file in sorted(path.glob("*.safetensors")) if file.name != BESIDE]
    found = found if path.is_dir() else [path] * path.is_file()
    if path.suffix == ".npz":
        raise StepError(f"sae_file {path} is numpy's; sae-lens reads Gemma Scope's files and saves what is read here")
    if path.suffix in (".pt", ".pth", ".bin"):
        raise StepError(
            f"sae_file {path} is pickled, and nothing is unpickled here; convert it once: "
            'safetensors.torch.save_file(torch.load("file.pt", weights_only=True), "file.safetensors")'
        )
    if len(found) != 1:
        raise StepError(f"sae_file {path}: expected one .safetensors file there, found {len(found)}")
    return found[0]


def check_shapes(config: Config, tensors: Mapping[str, Tensor], width: int) -> None:
    """StepError unless the tensors fit the site, each other and the sizes that the config states, and are finite."""
    features, here = (*tensors["encoder"].shape, 0, 0)[:2]
    if here != width:
        raise config.refuse(f"it is for activations of width {here}; those of this site have {width}")
    wanted = {"encoder": (features, width), "bias": (features,), "decoder": (features, width), "centre": (width,)}
    wanted |= {name: (features,) for name in ("threshold", *FACTORS) if name in tensors}
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape or not tensors[name].isfinite().all():
            raise config.refuse(
                f"its {name} must be finite and of shape {shape}, and is of {tuple(tensors[name].shape)}"
            )
    for key, size in (("d_in", width), ("d_out", width), ("d_sae", features)):
        config.take(key, size, None)
    config.take("num_latents", features, 0, None)  # 0: by expansion_factor


def of_goodfire(config: Config, own: dict[str, Tensor], tensors: dict[str, Tensor]) -> tuple[Coder, Origin]:
    """Nothing is taken off before encoding."""
    return Coder(**own, centred=False), Origin()


def of_sparsify(config: Config, own: dict[str, Tensor], tensors: dict[str, Tensor]) -> tuple[Coder, Origin]:
    """Top-k SAEs; no transcoders, which predict another place, and no skip connections."""
    config.take("activation", "topk", default="topk")
    for key in ("transcode", "skip_connection", "signed"):
        config.take(key, False, None)
    return Coder(**own, active=whole(config, "k", config.take("k"))), Origin()


def of_lens(config: Config, own: dict[str, Tensor], tensors: dict[str, Tensor]) -> tuple[Coder, Origin]:
    """Standard, top-k and JumpReLU SAEs; factors of each feature are folded into its weights."""
    config.flatten()
    kind, active = lens_kind(config)
    config.take("normalize_activations", "none", None, False)
    config.take("reshape_activations", "none", None)
    centred = config.take("apply_b_dec_to_input", True, False, default=True)
    if config.take("rescale_acts_by_decoder_norm", *((True, False) if active else (False,)), default=False):
        # what is kept is chosen by activation x norm, and decoded through rows of length 1
        norm = own["decoder"].norm(dim=1)
        own |= {"encoder": own["encoder"] * norm[:, None], "bias": own["bias"] * norm}
        own |= {"decoder": own["decoder"] / norm[:, None]}
    scaled = config.take("finetuning_scaling_factor", True, False, None)
    factors = [tensors.pop(name) for name in FACTORS if name in tensors]
    ones = bool(factors) and all((factor == 1).all() for factor in factors)  # sae-lens wrote these for a while
    if len(factors) != bool(scaled) and not ones:
        raise config.refuse(f"finetuning_scaling_factor is {scaled}, and there are {len(factors)} tensors for it")
    for factor in factors:
        own["decoder"] = own["decoder"] * factor[:, None]
    threshold = tensors.pop("threshold", None)
    if (threshold is not None) != (kind == "jumprelu"):
        raise config.refuse(f"a {kind} SAE {'with' if threshold is not None else 'without'} thresholds cannot be read")
    return Coder(**own, active=active, centred=centred, threshold=threshold), lens_origin(config)


def lens_kind(config: Config) -> tuple[str, int | None]:
    """The architecture, and k where the k largest are kept: older files say so by the activation function alone."""
    kind = config.take("architecture", "standard", "topk", "jumprelu", default="standard")
    function = config.take("activation_fn_str", default="topk" if kind == "topk" else "relu")
    if (kind, function) not in LENS:
        raise config.refuse(f"activation_fn {function!r} of a {kind} SAE cannot be read")
    settings = config.of(dict, "activation_fn_kwargs")
    sizes = [size for size in (config.take("k"), settings.pop("k", None)) if size is not None]
    if settings or bool(sizes) != (function == "topk") or sizes != sizes[:1] * len(sizes):
        raise config.refuse(f"k = {sizes}, activation_fn_kwargs {settings} of a {function} SAE cannot be read")
    return kind, whole(config, "k", sizes[0]) if sizes else None


def whole(config: Config, key: str, value: Any) -> int:
    """A count, at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise config.refuse(f"{key} = {value!r} is no whole number above 0")
    return value


def lens_origin(config: Config) -> Origin:
    """Where an SAE of sae-lens was trained."""
    config.take("hook_head_index", None)
    hook, layer, model = config.of(str, "hook_name"), config.take("hook_layer"), config.of(str, "model_name")
    if layer is not None and f".{layer}." not in f".{hook}.":
        raise config.refuse(f"hook_layer {layer} is not that of hook_name {hook!r}")
    loaded = config.of(dict, "model_from_pretrained_kwargs")
    centred = loaded.pop("center_writing_weights", True)
    if unknown := sorted(loaded.keys() - LOADED):
        raise config.refuse(f"model_from_pretrained_kwargs has {unknown[0]!r}, which is not understood")
    return Origin(hook or None, model or None, centred and hook.startswith("blocks."))


def folder_hook(name: str) -> str | None:
    """eai-sparsify keeps an SAE in a folder of its module's name, whichever module that is."""
    return name if re.match(BLOCK, name) else None


def site_of_hook(hook: str) -> Site | None:
    """The site of a place by the name it has elsewhere; None for what is no residual stream and no MLP's output."""
    if found := HOOK.fullmatch(hook):
        layer, kind = int(found["layer"]), found["kind"]
        if kind == "resid_pre":
            return Site(layer - 1, "resid") if layer else None
        return Site(layer, "mlp" if kind == "mlp_out" else "resid")
    if found := MODULE.fullmatch(hook):
        return Site(int(found["layer"]), "mlp" if found["kind"] else "resid")
    return None


def check_names(path: str, origin: Origin, site: Site, model: str) -> None:
    """StepError where an SAE was trained at another place than `site`, or on a model of another name."""
    place = site_of_hook(origin.hook or "")
    if origin.hook is not None and place != site:
        todo = f"set sae_site: {hooks.site_name(*place)}" if place else "only a block's or an MLP's output is read here"
        raise StepError(
            f"sae_file {path} was trained at {origin.hook}, and features are read at {hooks.site_name(*site)}; {todo}"
        )
    if origin.model is not None and not may_be_one(origin.model, model):
        raise StepError(
            f"sae_file {path} was trained on {origin.model}, and the model here is {model}; if the two are one, write "
            "the latter as model_name into a copy of its cfg.json"
        )


def check_model(path: str, origin: Origin, site: Site, model: Model) -> None:
    """StepError where TransformerLens, on whose activations an SAE was trained, reads other values at this place."""
    if origin.hook is None or not origin.hook.startswith("blocks."):
        return
    if site.component == "mlp" and post_norms(model)[site.layer].mlp is not None:
        raise StepError(
            f"sae_file {path} was trained at {origin.hook}, behind the norm after the MLP; {hooks.site_name(*site)} is "
            "before it"
        )
    if origin.centred_stream and readout(model).norm.centres:
        raise StepError(
            f"sae_file {path} was trained on activations whose mean was taken off (center_writing_weights); those of "
            f"{model.name} keep it"
        )


def load(path: str, width: int, site: Site, model: str) -> Coder:
    """`read`, with the names checked."""
    coder, origin = read(path, width)
    check_names(path, origin, site, model)
    return coder
