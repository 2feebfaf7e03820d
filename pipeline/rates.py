"""How long a machine takes for each kind of work that `pipeline.costs` counts: seconds per operation, per pass, per row, ...

1. `calibrate` times a handful of small units on random weights of the profile's shape (fewer layers where it is a large
   one) and solves for the rates that explain them; what the steps do beside the model is timed likewise, as far as it
   is arithmetic.
2. `of_device` takes a card's rates from its data sheet (data/devices.json), and the host's part from the calibration
   that the committed plan of the default profile was made with.
3. `seconds` puts work and rates together.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from transformers import AutoModelForCausalLM, PretrainedConfig

from lib import models, paths, sweep, tasks, weights
from lib.batches import token_ids
from lib.data import HALVES
from lib.hooks import Site
from lib.single_pass import base_run
from lib.weights import Shape
from pipeline import assumed, costs
from pipeline.costs import Machine, Work
from pipeline.params import ROOT
from steps import planned
from steps.neurons import features, neurons
from steps.retrieval_heads import measure as hops
from steps.subspace import probes

DEVICES, REFERENCE = ROOT / "data" / "devices.json", ROOT / "bench" / "results" / "plan_smollm2.json"
FITTED = ("passes", "plain", "grown", "spans", "rows", "light", "jobs", "prompts", "receivers")
MOST = 3e8  # weights of the blocks that are calibrated with
# Seconds of what is neither the model's work nor a matrix product: measured in the default book on 2 cores of an AMD
# EPYC. A row of direct effects, a value read, an area under a curve, a draw of random features, a layer's class means.
BESIDE = {"parts": 8e-5, "values": 1.2e-5, "areas": 9e-7, "random features": 5e-3, "spectra": 0.5, "tokenised": 5e-4}
READING = 1.0  # GB/s at which weights are read, and seconds of proving them
PROVING = 1.5
PAGE_ROW = 4.5e-5  # seconds of a page's statistics and figures for each row, and beside them, kernel and imports too
PAGES = dict(zip(planned.TABLES, (10.4, 10.5, 12.0, 14.5, 13.0, 17.0, 19.0, 20.5, 17.0, 16.0), strict=True))
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


def calibrate(config: PretrainedConfig, dtype: str, device: str, memory: float) -> dict[str, float]:
    """Rates of this machine for the shape, in some ten seconds; on the device that the profile names."""
    whole = weights.shape_of(config)
    config, text = (own := copy.deepcopy(config)), own.get_text_config()
    text.num_hidden_layers = max(2, min(whole.n_layers, int(MOST / (whole.attention + whole.mlp))))
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=models.DTYPES[dtype]).to(device)
    model = models.find_handles(network.eval().requires_grad_(False), None, "calibration")
    return measured(model, weights.shape_of(config), Machine(memory, dtype)) | besides(whole.hidden)


def measured(model: models.Model, shape: Shape, place: Machine) -> dict[str, float]:
    """The rates of what the model does."""
    own, many = tasks.TEMPLATES["profession_both"], tasks.TEMPLATES["profession_is"]
    pairs = [assumed.pair_of(own, q, n, HALVES[0], [3, 3]) for q in range(8) for n in range(2)]
    last, tokens = shape.n_layers - 1, len(pairs[0].clean.ids)
    ids = lambda count: token_ids(model, [pair.clean.ids for pair in pairs[:count]])  # noqa: E731
    asked = [assumed.pair_of(many, q, 0, HALVES[0], [3]).clean.ids for q in range(64)]
    hidden = torch.randn(128, shape.hidden, dtype=model.dtype, device=model.device)
    rates = {"logits": timed(lambda: model.logits(hidden)) / costs.vocabulary(shape, 128).logits}
    samples: list[tuple[Work, float]] = []

    def sample(work: Work, run: Callable[[], Any], repeats: int = 2) -> None:
        samples.append((work, timed(run, repeats)))

    for count in (2, 16):
        sample(costs.plain(shape, count, tokens), lambda count=count: base_run(model, ids(count), [tokens - 1]))
    ask = costs.next_logits(shape, len(asked), len(asked[0]), 3)
    sample(ask, lambda: models.next_logits(model, asked), 1)
    heads, every = [[Site(last, "head", 0)]], range(max(0, shape.n_layers - 16), shape.n_layers)
    how = {"memory": place.memory}
    for count, options in (
        (1, {"site_sets": heads}),
        (8, {"site_sets": heads}),
        (8, {"site_sets": heads * 32}),
        (1, {"components": ["head", "mlp"], "layers": every}),
        (1, {"role": "name_a", "components": ["resid"], "layers": every}),
    ):
        work = costs.sweep_unit(shape, pairs[:count], options, place)
        sample(work, lambda count=count, options=options: sweep.run(model, pairs[:count], **options, **how))
    middle = shape.n_layers * 2 // 3
    sites = [Site(middle, "head", 0), Site(last, "head", 0), Site(last, "mlp")]
    for route, into in ((hops.NAMES, sites[:2]), (hops.LAST, sites)):
        (unit,) = hops.paths("x", pairs[:4], into, route, "recomputed", [sites[:1]])
        options = {key: value for key, value in unit.options.items() if key != "into"}
        receivers = paths.receivers_of(model, into, route)
        run = lambda o=options, r=receivers: paths.run(model, pairs[:4], receivers=r, **o, **how)  # noqa: E731
        sample(costs.path_unit(shape, pairs[:4], unit.options, place), run, 1)
    if model.down_projs:
        reading = neurons.reading_of(model, [last])
        each = {"direction": "noise", "layers": [last], "reading": reading, **how}
        sample(costs.neuron_unit(shape, pairs[:1], [last], place), lambda: neurons.run(model, pairs[:1], **each), 1)
    return rates | solved(samples, rates)


def solved(samples: list[tuple[Work, float]], known: Rates) -> dict[str, float]:
    """The rates, none below 0, that explain the samples best, each by its share."""
    parts = [{name: getattr(work, name, 0) or work.other.get(name, 0) for name in FITTED} for work, _ in samples]
    table = np.array([[own[name] for name in FITTED] for own in parts], dtype=float)
    left = np.array([max(taken - seconds(Work(logits=work.logits), known), 0.0) for work, taken in samples])
    weight, scale = 1 / np.array([taken for _, taken in samples]), table.max(0).clip(1e-30)
    found, _ = nnls(table / scale * weight[:, None], left * weight)
    return dict(zip(FITTED, (found / scale).tolist(), strict=True))


def besides(hidden: int) -> dict[str, float]:
    """Probes and steps of an autoencoder, timed, at the sizes of the default profile; and `BESIDE`."""
    rng, out = np.random.default_rng(0), dict(BESIDE)
    for name, rows, classes in (("pair probes", 314, (5,)), ("people probes", 400, (5, assumed.PROFESSIONS))):
        x = rng.standard_normal((rows, hidden)).astype(np.float32)
        labels = [
            probes.Labels("", np.arange(n), np.ones(rows, bool), rng.integers(n, size=(21, rows))) for n in classes
        ]

        def fitted(x: np.ndarray = x, labels: list = labels) -> None:
            probe = probes.Probe(x, labels, np.ones(len(x), bool))
            outputs = probe.outputs(x[:80])
            for target in range(len(labels)):
                for labelling in range(21):
                    probe.predict(outputs, target, labelling)

        out[name] = timed(fitted, 1)
    train = lambda count: features.train(torch.randn(256 * count, hidden), 1024, 32, 1, 0)  # noqa: E731
    one = timed(lambda: train(1), 1)
    return out | {"sae steps": max(0.0, (timed(lambda: train(9), 1) - one) / 8)}


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
