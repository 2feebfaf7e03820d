"""How long a machine takes for each kind of work that `pipeline.costs` counts: seconds per operation, pass, row, ...

1. `calibrate` times a handful of small units on random weights of the profile's shape (fewer layers where it is large)
   and solves for the rates that explain them; what steps do beside the model is timed likewise where it is arithmetic.
2. `of_device` takes a card's rates from its data sheet (data/devices.json), and the host's part from the calibration
   that the committed plan of the default profile was made with.
3. `seconds` puts work and rates together.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from scipy.optimize import nnls

from lib import models, questions, sweep, weights
from lib.batches import token_ids
from lib.data import HALVES
from lib.hooks import Model, Site
from lib.single_pass import base_run
from lib.weights import Shape
from pipeline import assumed, costs
from pipeline.costs import Machine, Work
from pipeline.declaration import Plan
from pipeline.params import ROOT

DEVICES, REFERENCE = ROOT / "data" / "devices.json", ROOT / "bench" / "results" / "plan_smollm2.json"
FITTED = ("passes", "plain", "grown", "spans", "rows", "light", "jobs", "prompts", "receivers")
MOST = 3e8  # weights of the blocks that are calibrated with
# Seconds of what is neither the model's work nor a matrix product: measured in the default book on 2 cores of an AMD
# EPYC. A row of direct effects, a value read, an area under a curve, a draw of random features, a layer's class means.
BESIDE = {"parts": 8e-5, "values": 1.2e-5, "areas": 9e-7, "random features": 5e-3, "spectra": 0.5, "tokenised": 5e-4}
READING = 1.0  # GB/s at which weights are read, and seconds of proving them
PROVING = 1.5
Rates = Mapping[str, float]


def seconds(work: Work, rates: Rates) -> float:
    """Seconds of the work: every part at its rate."""
    own = {name: getattr(work, name) for name in ("passes", "plain", "grown", "spans", "logits", "rows", "light")}
    return sum(amount * rates.get(name, 0.0) for name, amount in {**own, **work.other}.items())


def timed(run: Callable[[], Any], repeats: int = 2) -> float:
    """Median seconds after one run that is not counted."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def calibrate(plan: Plan, config: Any, dtype: str, device: str, memory: float) -> dict[str, float]:
    """Rates of this machine for the config's shape, in some ten seconds; on the device that the profile names."""
    whole = weights.shape_of(config)
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    text.num_hidden_layers = max(2, min(whole.n_layers, int(MOST / (whole.attention + whole.mlp))))
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(shallow, dtype=models.DTYPES[dtype]).to(device)
    model = models.find_handles(network.eval().requires_grad_(False), None, "calibration")
    rates = measured(plan, model, weights.shape_of(shallow), Machine(memory, dtype)) | BESIDE
    for step in plan:
        rates |= step.timings(whole.hidden) if step.timings else {}
    return rates


def measured(plan: Plan, model: Model, shape: Shape, place: Machine) -> dict[str, float]:
    """The rates of what the model does: units of what lib does, and of what steps add to it."""
    hidden = torch.randn(128, shape.hidden, dtype=model.dtype, device=model.device)
    rates = {"logits": timed(lambda: model.logits(hidden)) / costs.vocabulary(shape, 128).logits}
    samples = [(work, timed(run)) for work, run in sweeps(model, shape, place)]
    added = (sample for step in plan if step.samples for sample in step.samples(model, shape, place))
    samples += [(work, timed(run, 1)) for work, run in added]
    return rates | solved(samples, rates)


def sweeps(model: Model, shape: Shape, place: Machine) -> Iterator[tuple[Work, Callable[[], Any]]]:
    """Plain runs, prompts asked for their next token, and sweeps: their work, and what runs them."""
    pairs, last = assumed.few_pairs(), shape.n_layers - 1
    tokens = len(pairs[0].clean.ids)
    for count in (2, 16):
        ids = token_ids(model, [pair.clean.ids for pair in pairs[:count]])
        yield costs.plain(shape, count, tokens), partial(base_run, model, ids, [tokens - 1])
    topic = questions.load()
    one = topic.find(topic.alone)
    asked = [assumed.pair_of(one, quad, 0, HALVES[0], [3]).clean.ids for quad in range(64)]
    yield costs.next_logits(shape, len(asked), len(asked[0]), 3), partial(models.next_logits, model, asked)
    heads, every = [[Site(last, "head", 0)]], range(max(0, shape.n_layers - 16), shape.n_layers)
    for count, options in (
        (1, {"site_sets": heads}),
        (8, {"site_sets": heads}),
        (8, {"site_sets": heads * 32}),
        (1, {"components": ["head", "mlp"], "layers": every}),
        (1, {"role": "name_a", "components": ["resid"], "layers": every}),
    ):
        work = costs.sweep_unit(shape, pairs[:count], options, place)
        yield work, partial(sweep.run, model, pairs[:count], memory=place.memory, **options)


def solved(samples: list[tuple[Work, float]], known: Rates) -> dict[str, float]:
    """The rates, none below 0, that explain the samples best, each by its share."""
    parts = [{name: getattr(work, name, 0) or work.other.get(name, 0) for name in FITTED} for work, _ in samples]
    table = np.array([[own[name] for name in FITTED] for own in parts], dtype=float)
    left = np.array([max(taken - seconds(Work(logits=work.logits), known), 0.0) for work, taken in samples])
    weight, scale = 1 / np.array([taken for _, taken in samples]), table.max(0).clip(1e-30)
    found, _ = nnls(table / scale * weight[:, None], left * weight)
    return dict(zip(FITTED, (found / scale).tolist(), strict=True))


def of_device(name: str, shape: Shape, dtype: str, quantisation: str | None) -> tuple[dict[str, float], list[str]]:
    """A card's rates from its data sheet, with what is assumed in words. ValueError for a card that is not listed."""
    known = json.loads(DEVICES.read_text(encoding="utf-8"))
    if name not in known["devices"]:
        raise ValueError(f"device {name!r} is not listed in {DEVICES.name}; it has {', '.join(known['devices'])}")
    sheet, use = known["devices"][name], known["utilisation"]
    rate = sheet["bfloat16_tflops"] * 1e12 * use["quantised" if quantisation else "bfloat16"]
    wide = sheet["float32_tflops"] * 1e12 * use["float32"]
    streamed = weights.weight_gb(shape, dtype, quantisation) / (sheet["bandwidth_tbs"] * 1e3 * use["bandwidth"])
    stored = json.loads(REFERENCE.read_text(encoding="utf-8"))
    host = {key: stored["rates"][key] for key in ("rows", "light", "jobs", "prompts", "receivers", *BESIDE)}
    host |= {key: stored["rates"][key] for key in ("pair probes", "people probes", "sae steps")}
    launched = stored["rates"]["passes"] / stored["layers"] * shape.n_layers
    own = {"passes": streamed + launched, "plain": 1 / rate, "grown": 1 / rate, "spans": 1 / rate, "logits": 1 / wide}
    host_said = f"the host's part (records, statistics, starting kernels) is that of {stored['device']}"
    return host | own, [f"{known['source']}: {sheet['sheet']}", known["assumption"], host_said]
