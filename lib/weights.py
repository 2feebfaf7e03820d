"""Where a model's weights lie, what they weigh, and whether they fit.

1. `resolve` turns a model string (`package:`, a GGUF file, a folder, a hub id or `config:`) into what transformers
   loads, and checks the SHA-256 of a single local file. `converted` keeps a GGUF file's weights as fp32 safetensors in
   the user's cache, so that it is read once, and checks their hashes. `reading` says in one sentence why a model could
   not be had; `check_loaded` refuses weights that are not those of their config.
2. `config_of` and `shape_of` count a model's weights without having them; `weight_gb` and `pass_gb` say what they take.
3. `check` refuses a model that does not fit, with two ways in which it would.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from lib.errors import Refusal
from lib.locks import Lock


class ModelError(Refusal):
    """A model that cannot be loaded, or whose modules are not what they were taken for."""


# What transformers, safetensors and gguf raise for files that are wrong: not there, cut short, of another kind, with
# fields that are missing or of another type. (tokenizers raises bare Exceptions.)
WRONG_FILES = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, ImportError)
WRONG_FILES += (AssertionError, struct.error, SafetensorError, StrictDataclassError)
FULL = (errno.ENOSPC, errno.EDQUOT)
# How GGUF files call what splits words as GPT-2 does, but for digits: so transformers splits whatever it does not know.
SPLIT_AS_GPT2 = ("default", "gpt-2", "smollm", "starcoder", "refact", "command-r", "olmo", "mpt", "jais")


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


HASHES = "hashes.json"  # of the files beside it


def gguf_file(spec: str) -> Path | None:
    """The GGUF file of a model string, `package:name/file` or a path; None where it is of another form."""
    if spec.startswith("package:"):
        return package_file(spec)
    return Path(spec) if spec.endswith(".gguf") and Path(spec).is_file() else None


def converted(source: Path, sha256: str) -> Path:
    """The folder with the GGUF file's weights as fp32 safetensors, named by its SHA-256. Converts once (some 20 s).

    ModelError where a file there is not as it was written.
    """
    folder = cache_folder() / sha256
    if not (folder / HASHES).is_file():
        with Lock(folder.with_suffix(".lock"), patience=600):
            if not (folder / HASHES).is_file():  # nobody was first
                convert(source, folder)
    try:
        stated, found = json.loads((folder / HASHES).read_bytes()), hashes(folder)
        wrong = sorted(name for name in {*stated, *found} if stated.get(name) != found.get(name))
    except (ValueError, AttributeError):
        wrong = [HASHES]
    if wrong:
        what = f"converted weights are not as they were written ({', '.join(wrong)})"
        raise ModelError(f"{what}: delete the folder {folder} and run again")
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder of converted weights, but for the file that states them."""
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != HASHES}


def convert(source: Path, folder: Path) -> None:
    """Write the folder, whole or not at all; what killed conversions left goes, and a folder without hashes."""
    old = folder.with_name(f"{folder.name[:12]}-old")
    for left in folder.parent.glob(f"{folder.name[:12]}-*"):
        shutil.rmtree(left, ignore_errors=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name[:12]}-"))
    try:
        where = {"gguf_file": source.name, "local_files_only": True}
        transformers.AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(beside)
        options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = transformers.AutoModelForCausalLM.from_pretrained(source.parent, **options, **where)
        check_loaded(str(source), model, info)
        check_gguf(source, model)
        # transformers refuses to save a model that came from GGUF; its weights are plain fp32 by now
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(beside)
        (beside / HASHES).write_text(json.dumps(hashes(beside), indent=1))
        if folder.is_dir():
            folder.rename(old)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


# What begins a model string, with its colon -> what makes the folder of such a model, once, and returns it. For models
# that are neither trained nor downloaded; whoever can make some enters them here.
MAKERS: dict[str, Callable[[str], Path]] = {}


def made(spec: str) -> str:
    """The folder of a model that one of MAKERS makes; of any other, its model string."""
    maker = MAKERS.get(spec[: spec.find(":") + 1])
    return spec if maker is None else str(maker(spec))


def resolve(spec: str, sha256: str | None = None) -> tuple[str, str | None, bool]:
    """What to hand to transformers for a model string, the weights' SHA-256 where known, and whether it is local."""
    spec = made(spec)
    where, actual, local = spec, None, True
    if file := gguf_file(spec):
        actual = sha256_of(file)
    elif spec.startswith("config:"):
        where = spec.removeprefix("config:")
        if not Path(where).is_file():
            raise ModelError(f"model {spec!r}: there is no such file")
    elif Path(spec).is_dir():
        if (Path(spec) / "adapter_config.json").is_file():
            raise ModelError(f"model {spec!r} is an adapter: give its model as model, and this folder as adapter")
        files = files_of(Path(spec))
        actual = sha256_of(files[0]) if len(files) == 1 else None
    elif Path(spec).is_file():
        raise ModelError(
            f"model {spec!r} is a file: give the folder with its config, weights and tokenizer, or config:{spec}"
        )
    elif spec.startswith((".", "/", "~")) or spec.endswith(".gguf") or spec.count("/") != 1:
        forms = "package:name/file.gguf, a file.gguf, an existing folder, a hub id owner/name, or config:file.json"
        raise ModelError(f"model {spec!r}: no such {'file' if spec.endswith('.gguf') else 'folder'}. Give {forms}")
    else:
        local = False
    if sha256 is not None and actual is None:
        raise ModelError(f"model {spec!r}: only the SHA-256 of a single local weights file is checked; give none here")
    if sha256 not in (None, actual):
        raise ModelError(f"model {spec!r}: the weights file has SHA-256 {actual}, the profile asks for {sha256}")
    if file is not None:
        with reading(spec, where):
            where = str(converted(file, actual))
    return where, actual, local


def files_of(folder: Path) -> list[Path]:
    """A folder's files of weights. ModelError where transformers would leave some of them out without a word: it reads
    model.safetensors, else what its index names."""
    found, index = sorted(folder.glob("*.safetensors")), folder / "model.safetensors.index.json"
    read = {"model.safetensors"}
    if index.is_file() and not (folder / "model.safetensors").is_file():
        with reading(str(folder), str(index)):
            read = set(json.loads(index.read_bytes())["weight_map"].values())
    if others := [path.name for path in found if path.name not in read]:
        raise ModelError(
            f"model {str(folder)!r}: {others[0]} would not be read: weights are in model.safetensors, or in what "
            f"{index.name} names; take it out of the folder"
        )
    return found


@contextmanager
def reading(spec: str, where: str) -> Iterator[None]:
    """ModelError, in one sentence, for whatever is wrong with the files of a model; a full disk and too little memory
    are left as they are. For what another library reads alone: a mistake of our own must keep its stack."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        wrong = type(error) is Exception or isinstance(error, WRONG_FILES)
        if not wrong or getattr(error, "errno", None) in FULL:
            raise
        raise load_error(spec, where, error) from error


def load_error(spec: str, where: str, error: Exception) -> ModelError:
    """One clear message for the ways in which a model cannot be had."""
    text = f"{type(error).__name__}: {error}"
    if any(sign in text for sign in ("gated repo", "401 Client", "403 Client")):
        todo = "accept its licence on its page, then set HF_TOKEN or run `hf auth login`"
        return ModelError(f"model {spec!r} is gated or private: {todo}")
    first, *more = text.splitlines()
    if first.endswith(":") and more:  # what it is, is in the next line
        first = f"{first} {more[0].strip()}"
    text = f"model {spec!r} could not be loaded: {first}"
    if Path(where).parent == cache_folder():
        text += f" (if its converted weights were damaged: delete the folder {where} and run again)"
    return ModelError(text)


def may_be_one(one: str, other: str) -> bool:
    """Whether two names, hub ids or paths, may be one model's: the letters and digits of one's last part stand in the
    other's."""
    first, second = (re.sub(r"[^a-z0-9]", "", Path(name).name.lower()) for name in (one, other))
    return first in second or second in first


def check_loaded(spec: str, model: transformers.PreTrainedModel, info: Mapping[str, Any]) -> None:
    """ModelError where the weights lack some that the config asks for, have others, some of another shape, or two where
    the config has one; by what transformers found when it loaded them (which counts neither tied weights nor buffers as
    missing)."""
    found = {"missing": info["missing_keys"], "not asked for": info["unexpected_keys"]}
    found["of another shape"] = {name for name, *_ in info["mismatched_keys"]}
    # transformers ties what is equal, and leaves what differs as it is
    tied = model.get_expanded_tied_weights_keys(all_submodels=True).keys()
    found["unlike what tie_word_embeddings ties them to"] = tied - model.all_tied_weights_keys.keys()
    told = []
    for what, names in found.items():
        if names:
            told.append(f"{len(names)} {what} ({', '.join(sorted(names)[:2])}{', ...' * (len(names) > 2)})")
    if told:
        raise ModelError(
            f"model {spec!r}: the weights are not those of its config.json: {'; '.join(told)}; give both of one model"
        )


def check_gguf(source: Path, model: transformers.PreTrainedModel) -> None:
    """ModelError for a GGUF file with a tensor or size that transformers leaves out without a word, such as Llama 3.1's
    scaled rotary frequencies."""
    import gguf
    from transformers.integrations import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    reader = gguf.GGUFReader(source)
    kind = reader.fields["general.architecture"].contents()
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    taken = {names.get_name(name, (".weight", ".bias")) for name in model.state_dict()}
    left = [tensor.name for tensor in reader.tensors if tensor.name not in taken]
    # the last two are in the shapes of the tensors
    known = {*GGUF_CONFIG_MAPPING.get(kind, ()), "attention.key_length", "attention.value_length"}
    sizes = [name for name in reader.fields if name.startswith(f"{kind}.")]
    left += [name for name in sizes if name.removeprefix(f"{kind}.") not in known]
    split = reader.fields.get("tokenizer.ggml.pre")
    if split and split.contents() not in {*GGUF_PRE_TOKENIZER_SPLITS, *SPLIT_AS_GPT2}:
        left.append(f"how words are split, {split.contents()},")
    if left:
        raise ModelError(
            f"model {str(source)!r}: {', '.join(left[:2])} would be left out when the file is read; give the model's "
            "folder, with safetensors"
        )


# --- what they weigh, and where they fit ---

SHAPES = Path(__file__).with_name("shapes.json")
BYTES = {"float64": 8.0, "float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
# of a linear layer's weight: nf4 has half a byte and its double-quantised scales (Dettmers et al. 2023, 2305.14314)
QUANTISED = {"nf4": 0.5 + 0.127 / 8, "int8": 1.0}
MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's words
PROMPT, SLICE = 32, 16384  # tokens of the prompt of a minimal pass; vocabulary cast to fp32 at a time (lib.models)


@dataclass(frozen=True)
class Shape:
    """What sizes and costs depend on. Counts of weights; `linear` are those that a quantisation packs."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    hidden: int
    n_neurons: int  # of an MLP
    vocabulary: int
    attention: int  # weights of one block's attention
    mlp: int  # and of its MLP, as many as a token passes
    linear: int  # of all blocks' linear layers
    other: int  # embeddings, unembedding, norms, experts, what sees images

    @property
    def parameters(self) -> int:
        return self.linear + self.other


def config_of(spec: str, offline: bool = True) -> transformers.PretrainedConfig | None:
    """The config behind a model string; None where it cannot be had. Downloads no more than the config."""
    if (known := json.loads(SHAPES.read_text()).get(spec)) is not None:
        return transformers.AutoConfig.for_model(**known)
    spec = made(spec)
    where = spec.removeprefix("config:")
    local = offline or spec.startswith("config:") or Path(spec).is_dir()
    try:
        with reading(spec, where):
            if file := gguf_file(spec):
                folder = cache_folder() / sha256_of(file)  # its converted weights, if they have been made
                if folder.is_dir():
                    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
                return transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
            return transformers.AutoConfig.from_pretrained(where, local_files_only=local, trust_remote_code=False)
    except ModelError:  # loading says it
        return None


def shape_of(config: transformers.PretrainedConfig) -> Shape:
    """Counted on the empty model: exact for every architecture that transformers knows. ModelError for a config that no
    causal model can be made of."""
    with reading(f"of type {config.model_type}", ""):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        return counted(model)


def counted(model: transformers.PreTrainedModel) -> Shape:
    """`shape_of` of a model that may be empty."""
    text = model.config.get_text_config()
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    linear = {
        name: module.weight.numel()
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, (torch.nn.Linear, transformers.Conv1D)) and id(module.weight) not in ends
    }
    heads, layers = text.num_attention_heads, text.num_hidden_layers
    experts = sum(weight.numel() for weight in model.get_decoder().parameters() if weight.ndim == 3)
    if experts:
        experts *= text.num_experts_per_tok
        experts //= getattr(text, "num_local_experts", None) or text.num_experts
    attention = sum(size for name, size in linear.items() if "attn" in name)
    return Shape(
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
        hidden=text.hidden_size,
        n_neurons=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        attention=attention // layers,
        mlp=(sum(linear.values()) - attention + experts) // layers,
        linear=sum(linear.values()),
        other=sum(parameter.numel() for parameter in model.parameters()) - sum(linear.values()),
    )


def weight_gb(shape: Shape, dtype: str, quantisation: str | None = None) -> float:
    """GB of the weights; what is not a block's linear layer stays in `dtype`."""
    return (shape.linear * QUANTISED.get(quantisation, BYTES[dtype]) + shape.other * BYTES[dtype]) / 1e9


def pass_gb(shape: Shape, dtype: str, rows: int = 2) -> float:
    """GB that the smallest pass takes: two prompts, their cache, logits, a slice of the unembedding in fp32."""
    cache = 2 * shape.n_layers * shape.n_kv_heads * shape.head_size
    block = 10 * shape.hidden + 4 * shape.n_neurons + 4 * shape.n_heads * shape.head_size
    logits = 4 * (rows * shape.vocabulary + min(SLICE, shape.vocabulary) * shape.hidden)
    return (rows * PROMPT * (cache + block) * BYTES[dtype] + logits) / 1e9


def device_name(key: int | str) -> str:
    """A device as accelerate's maps name it: "cuda:1" for 1, "cuda:0" for "cuda"."""
    return f"cuda:{key}" if str(key).isdigit() else "cuda:0" if key == "cuda" else str(key)


def room_gb(placed: str | Mapping | None, quantisation: str | None, max_memory: Mapping | None, disk: bool) -> float:
    """GB that weights may take: one device's, or what a device map spreads them over; infinite with the disk."""
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    cards = {f"cuda:{index}": size / 1e9 for index, size in enumerate(sizes)}
    places = cards | {"cpu": memory_gb()}  # which is Apple's MPS's, too
    if isinstance(placed, Mapping):
        used = {device_name(key) for key in placed.values()}
    elif placed in MAPS:
        used = {*places, *(["disk"] if disk else [])}
        if quantisation and cards:  # bitsandbytes keeps packed weights on the cards alone
            used = set(cards)
    else:
        return places.get(device_name(placed), places["cpu"])
    if "disk" in used:
        return float("inf")
    limits = {device_name(key): value * 2**30 / 1e9 for key, value in (max_memory or {}).items()}
    unnamed = 0.0 if limits else float("inf")  # accelerate uses no device that max_memory leaves out
    return sum(min(places.get(key, 0.0), limits.get(key, unnamed)) for key in used)


def check(
    spec: str,
    dtype: str,
    placed: str | Mapping,
    quantisation: str | None = None,
    max_memory: Mapping | None = None,
    offload_folder: str | None = None,
    room: float | None = None,
) -> None:
    """ModelError where the weights and one small pass need more memory than there is. Needs no weights.

    `placed` is a device ("cpu", "cuda:0") or accelerate's device map; `room` the memory (GB) of a device that is not
    here. Where no config can be had nothing is said: loading will say what is wrong with it.
    """
    if room is None:
        room = room_gb(placed, quantisation, max_memory, offload_folder is not None)
    config = config_of(spec, offline=False) if room < float("inf") else None
    if config is None:
        return
    try:
        shape = shape_of(config)
    except ModelError:  # loading says so
        return
    own, work = weight_gb(shape, dtype, quantisation), pass_gb(shape, dtype)
    if own + work <= room:
        return
    where = placed if isinstance(placed, str) and placed not in MAPS else "what device_map names"
    raise ModelError(
        f"model {spec!r} does not fit: {shape.parameters / 1e9:.1f} billion weights in {quantisation or dtype} take "
        f"{own:.1f} GB and one small pass {work:.1f} GB, but {where} has {room:.1f} GB; "
        f"{ways_out(shape, dtype, quantisation)}"
    )


def ways_out(shape: Shape, dtype: str, quantisation: str | None) -> str:
    """Two ways in which the model can be run, with what each needs."""
    half = dtype if BYTES[dtype] < 4 else "bfloat16"
    plain = weight_gb(shape, half)
    disk = f"device_map: auto with an offload_folder, dtype {half} and no quantisation ({plain:.0f} GB on disk)"
    if quantisation == "nf4":
        first = "device_map: auto over cards that have as much together"
    else:
        first = f"quantisation: nf4 ({weight_gb(shape, half, 'nf4') + pass_gb(shape, half):.0f} GB, dtype {half})"
    return f"use {first}, or {disk}"


def memory_gb() -> float:
    """GB of memory that this process may use: the machine's, or its control group's limit where that is lower."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no control groups here, or "max"
            continue
    return min(limits) / 1e9
