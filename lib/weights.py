"""Where a model's weights lie, and what they are: `package:`, a folder, a hub id or `config:`.

1. `resolve` turns a model string into what transformers loads, and checks the SHA-256 of a single local file.
2. `converted` keeps a GGUF file's weights as fp32 safetensors in the user's cache, so that it is read once.
3. `load_error` says in one sentence why a model could not be had.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class ModelError(ValueError):
    """A model that cannot be loaded, or whose modules are not what they were taken for."""


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
