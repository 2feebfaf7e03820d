"""The tools that others use for the same work, against this library: same weights, prompts, sites and process.

    python -m bench.peers [--repeats 5] [--every 1] [--output bench/results/peers.json]

1. Every tool gets its own copy of SmolLM2-135M, from the GGUF file that this repository runs.
2. Each task is run once by every tool, not counted; logits that differ from this library's by more than 1e-3 at any
   site are an error.
3. Then the tools take turns, each time in the opposite order; medians count.

The environment is one of its own, `make bench-peers` makes it. Written to bench/results/peers.json.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import time
from importlib import metadata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from bench.peers import work as peers_work
from bench.peers.work import PATHS, TASKS, Run, Tool
from pipeline import machine

RESULT = Path(__file__).parent.parent / "results" / "peers.json"
MODULES = ("library", "plain_hooks", "with_transformer_lens", "with_nnsight", "with_pyvene")
ALLOWED = 1e-3  # logits


def measure(name: str, runs: dict[str, Run], repeats: int) -> list[dict]:
    """One task by every tool that has it."""
    wanted, off = None, {}
    for tool, run in runs.items():
        logits = run()
        wanted = logits if wanted is None else wanted
        off[tool] = float((logits - wanted).abs().max())
        if not off[tool] <= ALLOWED:
            raise SystemExit(f"error: {name}: the logits of {tool} differ from this library's by {off[tool]:.2g}")
    times: dict[str, list[float]] = {tool: [] for tool in runs}
    for turn in range(repeats):
        for tool in list(runs)[:: 1 if turn % 2 else -1]:
            gc.collect()
            start = time.perf_counter()
            runs[tool]()
            times[tool].append(time.perf_counter() - start)
        print(name, {tool: round(own[-1], 3) for tool, own in times.items()}, flush=True)
    ours = statistics.median(next(iter(times.values())))
    return [
        {
            "task": name,
            "tool": tool,
            "sites": len(wanted),
            "seconds": round(statistics.median(own), 4),
            "least": round(min(own), 4),
            "most": round(max(own), 4),
            "times_ours": round(statistics.median(own) / ours, 2),
            "largest_logit_difference": off[tool],
        }
        for tool, own in times.items()
    ]


def described(tool: Tool) -> dict:
    """A tool's name, version and how it is used."""
    version = metadata.version(tool.package) if tool.package else None
    return {"tool": tool.name, "package": tool.package, "version": version, "note": tool.note}


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--every", type=int, default=1, help="of the sites, every so-many-th alone (a trial)")
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    work = peers_work.load(given.every)
    tools = [tool for name in MODULES for tool in importlib.import_module(f"bench.peers.{name}").TOOLS]
    runs = {tool.name: tool.prepare(work) for tool in tools}
    out = []
    for task in (*(task.name for task in TASKS), PATHS):
        out += measure(task, {tool: own[task] for tool, own in runs.items() if task in own}, given.repeats)
    facts = {"machine": machine.facts(), "threads": torch.get_num_threads(), "versions": machine.versions()}
    pair = {"clean": work.pair.clean.text, "corrupt": work.pair.corrupt.text, "tokens": len(work.pair.clean.ids)}
    result = {
        **facts,
        **machine.commit(),
        "repeats": given.repeats,
        "every": given.every,
        **pair,
        "tools": list(map(described, tools)),
    }
    given.output.write_text(json.dumps(result | {"measured": out}, indent=1) + "\n", encoding="utf-8")
    print(given.output.name)


if __name__ == "__main__":
    main()
