"""Mutation testing: one small change of the code that measures at a time, and whether a fast test notices it.

    python -m bench.mutants [metrics stats effects single_pass sweep paths] [--sample 30] [--seed 0]

1. `mutants_of` has mutmut make all mutants of a module of lib; those of a text alone are left out.
2. A seeded sample of them is tried: a process that has imported the libraries, and nothing of ours, forks; the child
   imports the module with the change and runs the module's fast tests up to the first that fails.
3. Written to bench/results/mutants.json: tried and killed by module, and every mutant that survived, with `why` it may
   live. A reason is kept from run to run as long as the change is the same; tests/test_mutants.py wants one for each
   that is committed, and tries a sample again among the long tests.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import libcst
import pytest
from mutmut.mutation.file_mutation import create_mutations

from pipeline.units import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "mutants.json"
# Fast tests of each module, on one type of model; the others and the bundled model come with `make test`.
SLOW = ("smollm", "qwen3", "gemma", "gpt2", "mistral", "qwen2", "olmo", "phi3", "granite", "mixtral")
SLOW += ("every_component", "long_prompts", "committed")
TESTS = {
    "metrics": ["test_metrics"],
    "stats": ["test_stats"],
    "effects": ["test_effects"],
    "single_pass": ["test_single_pass"],
    "sweep": ["test_sweep", "test_planted_faults"],
    "paths": ["test_paths_proofs", "test_planted_faults", "test_paths"],
}
LIMIT = 120  # seconds of a child: one that hangs is killed
PRELOAD = ("torch", "transformers", "pandera.pandas", "scipy.stats", "scipy.sparse.csgraph", "hypothesis", "pyarrow")


def mutants_of(source: str, sample: int, seed: int) -> tuple[int, list[str]]:
    """How many changes of a module there are, and its text with each of a sample of them."""
    tree, mutations, *_ = create_mutations("", source)
    texts = (libcst.BaseString, libcst.FormattedStringText)
    own = [mutation for mutation in mutations if not isinstance(mutation.original_node, texts)]
    chosen = random.Random(seed).sample(own, len(own))[:sample]  # a smaller sample is part of a larger one
    return len(own), [tree.deep_replace(one.original_node, one.mutated_node).code for one in chosen]


def change(before: str, after: str) -> str:
    """The lines that differ."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return "\n".join(line for line in list(lines)[2:] if not line.startswith("@@"))


class Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from a text."""

    def __init__(self, name: str, path: Path, text: str) -> None:
        self.name, self.path, self.text = name, path, text

    def find_spec(self, name: str, *_: object) -> Any:
        return importlib.util.spec_from_loader(name, self, origin=str(self.path)) if name == self.name else None

    def get_filename(self, name: str) -> str:
        return str(self.path)

    def get_data(self, path: str) -> bytes:
        return self.text.encode()


def survives(module: str, text: str) -> bool:
    """Whether all fast tests of a module pass with this text in its place."""
    if not (child := os.fork()):
        signal.alarm(LIMIT)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        for name in [name for name in sys.modules if name.split(".")[0] in ("lib", "pipeline", "report", "steps")]:
            del sys.modules[name]
        sys.meta_path.insert(0, Changed(f"lib.{module}", ROOT / "lib" / f"{module}.py", text))
        skipped = " and ".join(f"not {name}" for name in SLOW)
        files = [str(ROOT / "tests" / f"{name}.py") for name in TESTS[module]]
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not long", "-k", skipped, *files]))
    return os.waitpid(child, 0)[1] == 0


def run(module: str, sample: int, seed: int, reasons: dict[tuple[str, str], str]) -> dict[str, Any]:
    """Try a sample of a module's mutants."""
    # weights need no gradients, so `no_grad` may go: what is decorated would be left alone
    plain = (ROOT / "lib" / f"{module}.py").read_text(encoding="utf-8").replace("@torch.no_grad()\n", "")
    begun = time.perf_counter()
    if not survives(module, plain):
        raise SystemExit(f"the fast tests of lib.{module} fail without a change: {', '.join(TESTS[module])}")
    count, tried = mutants_of(plain, sample, seed)
    left = sorted(change(plain, text) for text in tried if survives(module, text))
    out = {"mutants": count, "tried": len(tried), "killed": len(tried) - len(left)}
    out |= {"score": round(1 - len(left) / len(tried), 3), "seconds": round(time.perf_counter() - begun)}
    return out | {"survivors": [{"change": own, "why": reasons.get((module, own), "")} for own in left]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=[*TESTS], help="of lib; default: all six")
    parser.add_argument("--sample", type=int, default=30, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    for name in PRELOAD:
        importlib.import_module(name)
    before = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    reasons = {(name, own["change"]): own["why"] for name, found in before.items() for own in found["survivors"]}
    out = json.loads(options.to.read_text(encoding="utf-8")) if options.to.is_file() else {}
    for module in options.modules:
        out[module] = run(module, options.sample, options.seed, reasons)
        write_json(options.to, out)
        print(f"{module}: {out[module]['killed']} of {out[module]['tried']} mutants killed", flush=True)


if __name__ == "__main__":
    main()
