"""Facts that a reader needs to repeat a run: code, library versions, machine. No host name, no user, no path."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from lib.weights import memory_gb
from pipeline.params import ROOT

LIBRARIES = ("torch", "transformers", "accelerate", "bitsandbytes", "gguf")
LIBRARIES += ("numpy", "pandas", "scipy", "pyarrow", "pandera", "pydantic")


def commit() -> dict[str, Any]:
    """{"commit": hash or None outside git, "dirty": whether tracked files differ from it}."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def versions() -> dict[str, str | None]:
    """Python's version and those of the libraries that compute; None where one is not installed."""
    out: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = None
    return out


def facts() -> dict[str, Any]:
    """Cores, memory (GB), CPU model, accelerators, operating system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
    torch = sys.modules.get("torch")  # asking must not load it
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {
        "cores": cores,
        "memory_gb": round(memory_gb(), 1),
        "cpu": cpu,
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
    }


def pass_memory(model: Any | None) -> float:
    """GB that one pass may take when the profile says `auto`: a function of the machine's size, never of its load.

    On CUDA, 60% of what the weights leave free of the cards, shared over them; elsewhere an eighth of the memory, at
    most 2 GB (a larger pass is no faster on a CPU). `model` is a `lib.hooks.Model`, or None for the CPU.
    """
    if model is None or model.device.type != "cuda":
        return round(min(2.0, memory_gb() / 8), 3)
    torch = sys.modules["torch"]
    cards = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return card_memory(cards, model.model.get_memory_footprint())


def card_memory(cards: Sequence[float], weights: float) -> float:
    """GB that one pass may take on cards of so many bytes that hold so many bytes of weights between them: 60% of what
    is left of each, at least 0.5. The rest is for a layer's dequantised weights, a block of logits, and gaps."""
    return round(max(0.5, 0.6 * (sum(cards) - weights) / len(cards) / 1e9), 3)
