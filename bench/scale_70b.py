"""Every site of a 70B-shaped model on one GPU: growing passes against one forward pass per site. Nothing is downloaded.

    python -m bench.scale_70b [--shape 70b|quarter|small|tiny] [--quantisation nf4|int8|none]
                              [--dtype bfloat16|float32] [--out FOLDER] [--until TIME]

1. The model is random, in the shape of Llama-3.3-70B. Weights are made on the device one matrix at a time, quantised by
   bitsandbytes at once, and never exist together in 16 bits: 40 GB in nf4. Their size is that of a trained model's, so
   that no activation saturates. Without a CUDA device the shape is a quarter in every width, a fifth in depth.
2. `sweep.run` replaces every site of every layer for one pair, at `last` and at a name, and `paths.run` sends from all
   senders into one layer; the same is done one by one for a sample, and estimated for the rest. In nf4 on a card no
   matrix product has between 5 and 1,536 rows (`one_kernel`); one by one is timed without that rule, which slows it.
3. Full-vocabulary fp32 logits of the sampled sites are compared. fp32 must agree to 1e-4 x max(1, effect); other
   formats are set beside the noise floor: how far the logits of a prompt, the base prompt and others, lie from its own
   in batches of other sizes; `dtype_step` is how far two neighbours of the largest logit lie apart in that dtype.
4. What the device can do is measured in the same run: matrix products of the model's dtype and of fp32, and a copy.

Formats other than the chosen one are compared on the small shape (`others`).

Written after each part (`bench.parts`), to scale_70b.json in bench/results or --out, to scale_<shape>.json for the
shapes that serve trials:
{"shape", "device", "machine", "versions", "commit", "dirty", "threads", "scaled_down", "quantisation", "dtype",
 "one_kernel", "weights_seconds", "tokens", "sanity": {"hidden_rms", "logit_std", "top_probability"},
 "memory_gb": {"weights", "peak", "pass_budget", "row_mb": {role}, "expected_peak": {role}},
 "plain_forward_s",
 "limits": {"matrix_product_tflops", "fp32_matrix_product_tflops", "bandwidth_gb_s", "weights_gb", "dequantised_gb"},
 "sweeps": [{"role", "sites", "tokens_run_again", "seconds", "passes", "one_by_one_per_site_s", "one_by_one_sampled",
             "one_by_one_s_estimated", "times_faster", "arithmetic_limit_s", "times_arithmetic_limit",
             "bandwidth_limit_s", "times_bandwidth_limit"}],
 "paths": {"receivers", "layer", "senders", "seconds", "one_by_one_per_site_s", "one_by_one_sampled",
           "one_by_one_s_estimated", "times_faster", "largest_difference", "largest_effect"},
 "exactness": {"sites", "largest_difference", "largest_difference_over_effect", "largest_effect", "noise_floor",
               "dtype_step"},
 "any_kernel": {"seconds", "exactness"},  # with one_kernel: the sweep at `last` without that rule
 "others": [{"shape", "quantisation", "dtype", "exactness"}]}
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from bench import parts
from bench.paths import OneByOne
from bench.sweep import operations
from lib import batches, hooks, models, paths, single_pass, sweep
from lib.hooks import Model, Site
from lib.single_pass import BaseRun, Grown, Row
from lib.tasks import Pair, Prompt
from pipeline import machine

RESULTS = Path(__file__).parent / "results"
SHAPES = {  # layers, heads, key-value heads, head size, hidden, MLP, vocabulary
    "70b": (80, 64, 8, 128, 8192, 28672, 128256),
    "quarter": (16, 16, 2, 128, 2048, 7168, 32064),
    "small": (6, 4, 1, 128, 512, 1792, 8016),
    "tiny": (3, 4, 2, 32, 128, 448, 512),
}
KEYS = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
)
FORMATS = (("none", "float32"), ("none", "bfloat16"), ("int8", "bfloat16"), ("nf4", "bfloat16"))
ROLES = {"name_a": (5, 6), "name_b": (8, 9), "names": (5, 6, 8, 9), "last": (17,), "all": tuple(range(18))}
RECEIVING = 37 / 80  # the paper's layer, as a share of the depth
SAMPLE = 6  # sites of each component that are run one by one
BATCHES = (2, 7, 24)  # prompts run together, for the noise floor
FEW, MANY = 4, 1537  # rows of a matrix product in nf4 that bitsandbytes always, and never, gives to its own kernel


# --- the model -------------------------------------------------------------------------------------------------------


def build(
    shape: str, quantisation: str, dtype: torch.dtype, device: str, seed: int = 0, layers: int | None = None
) -> Model:
    """A random Llama of that shape: rms 1 in every projection's output, logits with a standard deviation of 2."""
    sizes = (layers or SHAPES[shape][0], *SHAPES[shape][1:])
    config = LlamaConfig(**dict(zip(KEYS, sizes, strict=True)), tie_word_embeddings=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    draw = torch.Generator(device).manual_seed(seed)

    def normal(size: Sequence[int], scale: float) -> Tensor:
        return torch.randn(size, generator=draw, device=device, dtype=dtype).mul_(scale)

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            weight = normal(module.weight.shape, module.in_features**-0.5)
            model.set_submodule(name, packed(weight, quantisation, dtype))
        elif isinstance(module, nn.Linear | nn.Embedding):
            module.weight = nn.Parameter(normal(module.weight.shape, 2 * config.hidden_size**-0.5))
        elif "weight" in module._parameters:  # a norm
            module.weight = nn.Parameter(torch.ones(config.hidden_size, device=device, dtype=dtype))
    model.model.rotary_emb.to(device)
    kind = None if quantisation == "none" else quantisation
    found = models.find_handles(model.eval().requires_grad_(False), None, f"random {shape}", None, kind)
    models.prove(found)
    return found


def packed(weight: Tensor, quantisation: str, dtype: torch.dtype) -> nn.Module:
    """A linear layer of that weight, in nf4 or int8 as `models.load` asks for them."""
    width, how = weight.shape[::-1], {"bias": False, "device": "meta"}
    if quantisation == "none":
        layer = nn.Linear(*width, **how)
        layer.weight = nn.Parameter(weight)
        return layer
    import bitsandbytes as bnb

    if quantisation == "nf4":
        kind = {"quant_type": "nf4", "compress_statistics": True}
        layer = bnb.nn.Linear4bit(*width, compute_dtype=dtype, **kind, **how)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **kind).to(weight.device)
        return layer
    # it says at every product that bf16 is cast to fp16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    layer = bnb.nn.Linear8bitLt(*width, has_fp16_weights=False, threshold=0.0, **how)
    eight, scale, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    layer.weight = bnb.nn.Int8Params(eight, requires_grad=False, CB=eight, SCB=scale)
    return layer


def rows_run(rows: int) -> int:
    """How many rows a product in nf4 is run with where so many are wanted: at most 4, or more than 1,536."""
    return rows if rows <= FEW else max(rows, MANY)


@contextlib.contextmanager
def one_kernel(model: Model) -> Iterator[None]:
    """For a while, give products in nf4 of 5 to 1,536 rows as many rows of zeros as make 1,537, and cut them off again.

    In between, bitsandbytes (0.50, backends/cuda/ops.py) chooses by card, matrix and number of rows whether its own
    kernel multiplies or the weights are unpacked for cuBLAS: a pass that grows would change from one to the other, and
    from one noise to another, on its way.
    """
    import bitsandbytes as bnb

    def widened(real: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            rows = math.prod(x.shape[:-1])
            if (run := rows_run(rows)) == rows:
                return real(x)
            out = real(nn.functional.pad(x.reshape(rows, -1), (0, 0, 0, run - rows)))
            return out[:rows].view(*x.shape[:-1], -1)

        return forward

    packed = [module for module in model.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    with hooks.with_forwards([(module, widened(module.forward)) for module in packed]):
        yield


def made_up_pair(vocab: int, seed: int = 0) -> Pair:
    """Two prompts of random tokens that differ in two names of two tokens, as long as the paper's."""
    draw = np.random.default_rng(seed)
    clean = draw.integers(10, vocab, 18)
    corrupt = clean.copy()
    corrupt[list(ROLES["names"])] = draw.integers(10, vocab, 4)
    prompts = [Prompt("", tuple(map(int, ids)), ROLES | {"swapped": ROLES["names"]}) for ids in (clean, corrupt)]
    words, tokens = tuple("vwxyz"), tuple(map(int, draw.choice(vocab, 5, replace=False)))
    kind = ("bench", "bench", "discovery", "superset", "random")
    return Pair(*kind, *prompts, words, 0, 1, tokens, tokens, (), (), (), ())


# --- clocks ----------------------------------------------------------------------------------------------------------


def waited(device: str) -> None:
    """Wait for the device to finish."""
    if device == "cuda":
        torch.cuda.synchronize()


def once(run: Callable[[], Any], device: str) -> float:
    """Seconds of one run."""
    waited(device)
    start = time.perf_counter()
    run()
    waited(device)
    return time.perf_counter() - start


def seconds(run: Callable[[], Any], device: str, repeats: int = 1, spare: int = 0) -> float:
    """Median seconds of a run, after `spare` that are not counted."""
    return statistics.median([once(run, device) for _ in range(spare + repeats)][spare:])


def seconds_within(run: Callable[[], Any], device: str, repeats: int, left: float) -> float:
    """Median seconds of `repeats` runs, of fewer where these would take more than a quarter of the seconds `left`.

    On a card the first run only warms up, unless it is the only one that fits."""
    times = [once(run, device)]
    more = repeats if device == "cuda" else repeats - 1
    fitting = int(min(more, left / 4 / times[0]))
    times += [once(run, device) for _ in range(fitting)]
    return statistics.median(times[1:] if device == "cuda" and fitting else times)


def product_rate(dtype: torch.dtype, device: str, hidden: int) -> float:
    """Floating-point operations per second of a plain matrix product, smaller where a trial's model is."""
    size = 8192 if device == "cuda" else min(2048, 4 * hidden)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, 10, 3)


def bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and write."""
    source = torch.ones(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / seconds(lambda: target.copy_(source), device, 5, 2)


def peak_gb(device: str) -> float:
    """The most memory that was in use so far: allocated on the device, or resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# --- both ways -------------------------------------------------------------------------------------------------------


class Ways:
    """A pair's sweeps, in growing passes and one by one, denoise. `alike`: all products in nf4 by one kernel."""

    def __init__(self, model: Model, pair: Pair, device: str, alike: bool = False) -> None:
        self.model, self.pair, self.device, self.memory = model, pair, device, machine.pass_memory(model)
        self.alike = alike
        self.clean, self.corrupt = (
            torch.tensor([prompt.ids], device=model.device) for prompt in (pair.clean, pair.corrupt)
        )
        self.sites = hooks.all_sites(model)
        self.grown: list[tuple[list[Row], BaseRun, Grown]] = []  # the passes of the last sweep

    def kernel(self) -> contextlib.AbstractContextManager:
        """What every run is made in that is compared."""
        return one_kernel(self.model) if self.alike else contextlib.nullcontext()

    def sweep(self, role: str) -> None:
        """Every site through `sweep.run`'s own way, the passes kept."""
        self.grown = []

        def kept(model: Model, base: BaseRun, rows: list[Row], sources: single_pass.Activations) -> Grown:
            out = single_pass.grow(model, base, rows, sources)
            self.grown.append((rows, base, out))
            return out

        how, sets = sweep.Options("denoise", role, memory=self.memory), [(site,) for site in self.sites]
        with self.kernel():
            frame = sweep.run_sets(self.model, [self.pair], sets, how, grower=lambda roles: kept)
        assert len(frame) == len(self.sites) and not frame.attrs["log"], frame.attrs["log"]

    def sample(self, seed: int = 0) -> list[Site]:
        """A few sites of each component."""
        draw = np.random.default_rng(seed)
        out = []
        for component in hooks.COMPONENTS:
            own = [site for site in self.sites if site.component == component]
            out += [own[i] for i in sorted(draw.choice(len(own), min(SAMPLE, len(own)), replace=False))]
        return out

    @torch.no_grad()
    def one_by_one(self, sites: Sequence[Site], role: str) -> tuple[float, Tensor]:
        """Median seconds of a full forward pass with one site replaced, and fp32 logits, (sites, vocab)."""
        positions = self.pair.clean.roles[role]
        with self.kernel(), hooks.capture(self.model, sites, positions) as values:
            self.model.body(input_ids=self.clean, use_cache=False)
        times, hidden = [], []
        for site in sites:
            with hooks.patch(self.model, {site: values[site]}, positions):
                times.append(once(lambda: self.plain(self.corrupt), self.device))
                with self.kernel():
                    hidden.append(self.plain(self.corrupt))
        return statistics.median(times), self.model.logits(torch.cat(hidden))

    def plain(self, ids: Tensor) -> Tensor:
        """A plain forward pass: final hidden states at the last token, whose logits are computed too."""
        hidden = self.model.body(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        self.model.unembed(hidden)
        return hidden

    @torch.no_grad()
    def exactness(self, sites: Sequence[Site], wanted: Tensor) -> dict[str, float]:
        """The sampled rows of the last sweep against the same runs one by one, and the noise floor."""
        places = {row.sites[0]: (grown, at) for rows, _, grown in self.grown for at, row in enumerate(rows)}
        got = self.model.logits(torch.stack([places[site][0].hidden[places[site][1]] for site in sites]))
        with self.kernel():
            base = self.model.logits(self.plain(self.corrupt))
        effect, off = (wanted - base).abs().amax(1), (got - wanted).abs().amax(1)
        return {
            "sites": len(sites),
            "largest_difference": float(off.max()),
            "largest_difference_over_effect": float((off / effect.clamp_min(1)).max()),
            "largest_effect": float(effect.max()),
            "noise_floor": self.noise_floor,
            "dtype_step": float(wanted.abs().max()) * torch.finfo(self.model.dtype).eps,
        }

    @functools.cached_property
    @torch.no_grad()
    def noise_floor(self) -> float:
        """The largest difference of a logit between a prompt alone and in batches of other sizes, with and without a
        cached prefix: of the base prompt, repeated, and of as many random prompts as sites are sampled."""
        draw, many = torch.Generator().manual_seed(1), max(BATCHES)
        ids = torch.randint(10, self.model.unembed.out_features, (many, self.corrupt.shape[1]), generator=draw)
        ids = torch.cat([self.corrupt.expand(many, -1), ids.to(self.corrupt)])
        with self.kernel():
            base, *alone = (self.plain(one[None]) for one in ids[many - 1 :])
            wanted = self.model.logits(torch.cat([base.expand(many, -1), *alone]))
            # with one kernel, small batches are all run alike: those of more than MANY tokens stand in for them
            sizes, repeats = (BATCHES[-1:], (2, 6)) if self.alike else (BATCHES, ())
            together = [torch.cat([self.plain(part) for part in ids.split(size)]) for size in sizes]
            together += [self.plain(ids.repeat(times, 1))[: len(ids)] for times in repeats]
            for role in ("last", "name_a"):
                cached = single_pass.base_run(self.model, ids, self.pair.clean.roles[role], ())
                together.append(single_pass.grow(self.model, cached, [], {}).base)
        return max(float((self.model.logits(hidden) - wanted).abs().max()) for hidden in together)

    def paths(self) -> dict[str, Any]:
        """All senders at `last` into one layer's queries and MLP, both ways."""
        model, layer = self.model, round(RECEIVING * self.model.n_layers)
        into = [Site(layer, "attn"), Site(layer, "mlp")]
        receivers = paths.receivers_of(model, into, {"q": "last", "mlp": "last"})
        senders = [site for (site,) in paths.senders_before(model, receivers)]
        how = {"receivers": receivers, "direction": "denoise", "memory": self.memory}
        frames, tokens = [], list(self.pair.corrupt_tokens)
        with self.kernel():
            took = seconds(lambda: frames.append(paths.run(model, [self.pair], **how)), self.device, spare=1)
            one_by_one = OneByOne(model, self.pair, "last", receivers)
        sampled = [senders[i] for i in np.linspace(0, len(senders) - 1, SAMPLE).astype(int)]
        times, wanted = [], []
        with torch.no_grad():
            for site in sampled:
                times.append(once(functools.partial(one_by_one.logits, site), self.device))
                with self.kernel():
                    wanted.append(one_by_one.logits(site)[tokens].cpu())
        rows = frames[-1].set_index(["layer", "sender", "head"]).loc[[tuple(site) for site in sampled]]
        got = torch.tensor(np.stack(rows["logits_after"]))
        before = torch.tensor(np.stack(rows["logits_before"]))
        each = statistics.median(times)
        return {
            "receivers": f"{model.n_heads} queries and the MLP of layer {layer}, at last",
            "layer": layer,
            "senders": len(senders),
            "seconds": round(took, 3),
            "one_by_one_per_site_s": round(each, 4),
            "one_by_one_sampled": len(sampled),
            "one_by_one_s_estimated": round(each * len(senders), 1),
            "times_faster": round(each * len(senders) / took, 1),
            "largest_difference": float((got - torch.stack(wanted)).abs().max()),
            "largest_effect": float((got - before).abs().max()),
        }


# --- what is reported ------------------------------------------------------------------------------------------------


@torch.no_grad()
def sanity(ways: Ways) -> dict[str, float]:
    """Size of the last block's output, spread of the logits, and the top token's probability in a plain run."""
    last = Site(ways.model.n_layers - 1, "resid")
    with hooks.capture(ways.model, [last]) as seen:
        logits = ways.model.logits(ways.plain(ways.corrupt))[0]
    out = {
        "hidden_rms": float(seen[last].float().square().mean().sqrt()),
        "logit_std": float(logits.std()),
        "top_probability": float(logits.softmax(-1).max()),
    }
    if not all(map(math.isfinite, out.values())) or out["top_probability"] > 0.9:
        raise SystemExit(f"the random model is not sane: {out}")
    return out


def rates(model: Model, device: str) -> dict[str, float]:
    """How fast the device multiplies in the model's dtype and in fp32, and how fast it copies."""
    hidden = model.model.config.hidden_size
    return {
        "matrix_product_tflops": round(product_rate(model.dtype, device, hidden) / 1e12, 4),
        "fp32_matrix_product_tflops": round(product_rate(torch.float32, device, hidden) / 1e12, 4),
        "bandwidth_gb_s": round(bandwidth(device) / 1e9, 1),
    }


def limits(model: Model, device: str) -> dict[str, float]:
    """What the device can do, and the bytes that a pass reads at least."""
    kept = model.model.get_memory_footprint() - model.model.get_input_embeddings().weight.nbytes
    linears = sum(math.prod(weight_shape(m)) for m in model.model.modules() if hasattr(m, "in_features"))
    wide = 0 if model.quantisation != "nf4" else 2 * model.dtype.itemsize * (linears - model.unembed.weight.numel())
    return rates(model, device) | {
        "weights_gb": round(kept / 1e9, 3),
        "dequantised_gb": round(wide / 1e9, 3),  # written and read again beside the weights, once a pass
    }


def weight_shape(linear: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, packed or not."""
    return linear.out_features, linear.in_features


def compared(
    ways: Ways, role: str, bounds: dict[str, float], repeats: int, left: float
) -> tuple[dict, list[Site], Tensor]:
    """Both ways at one role; the sampled sites and their logits one by one."""
    model, sampled = ways.model, ways.sample()
    several = repeats if ways.device == "cuda" or role == "last" else 1
    took = seconds_within(lambda: ways.sweep(role), ways.device, several, left)
    # beside each measurement: shared machines drift
    bounds |= {key: max(value, bounds[key]) for key, value in rates(model, ways.device).items()}
    each, logits = ways.one_by_one(sampled, role)
    tokens = ways.corrupt.shape[1]
    suffix = tokens - min(ROLES[role])
    joins = [site.layer + (site.component == "resid") for site in ways.sites]  # nothing of its own layer is needed
    work = operations(model, tokens, suffix, joins)
    arithmetic = (work["plain runs"] + work["rows"]) / bounds["matrix_product_tflops"] / 1e12
    arithmetic += work["logits"] / bounds["fp32_matrix_product_tflops"] / 1e12
    reading = (1 + len(ways.grown)) * bounds["weights_gb"] / bounds["bandwidth_gb_s"]
    row = {
        "role": role,
        "sites": len(ways.sites),
        "tokens_run_again": suffix,
        "seconds": round(took, 3),
        "passes": len(ways.grown),
        "one_by_one_per_site_s": round(each, 4),
        "one_by_one_sampled": len(sampled),
        "one_by_one_s_estimated": round(each * len(ways.sites), 1),
        "times_faster": round(each * len(ways.sites) / took, 1),
        "arithmetic_limit_s": round(arithmetic, 4),
        "times_arithmetic_limit": round(took / arithmetic, 2),
        "bandwidth_limit_s": round(reading, 4),
        "times_bandwidth_limit": round(took / reading, 2),
    }
    return row, sampled, logits


def expected_peak(ways: Ways, role: str) -> float:
    """GB: weights, the rows of a pass, one matrix in 16 bits, and a block of logits three times over."""
    model, tokens = ways.model, ways.corrupt.shape[1]
    row = single_pass.row_bytes(model, tokens, tokens - min(ROLES[role]))
    rows = min(len(ways.sites), int(ways.memory * 1e9 / row))
    config = model.model.config
    matrix = config.hidden_size * config.intermediate_size * model.dtype.itemsize
    logits = 3 * 4 * batches.logit_rows(model) * config.vocab_size
    return (model.model.get_memory_footprint() + rows * row + matrix + logits) / 1e9


def exactness(shape: str, quantisation: str, dtype: str, device: str) -> dict[str, Any]:
    """Exactness of a format, on a random model."""
    model = build(shape, quantisation, models.DTYPES[dtype], device)
    found = both_roles(Ways(model, made_up_pair(SHAPES[shape][-1]), device))
    return {"shape": shape, "quantisation": quantisation, "dtype": dtype, "exactness": found}


def both_roles(ways: Ways) -> dict[str, float]:
    """Exactness of the sweeps at `last` and at a name, the worse of the two."""
    out = []
    for role in ("last", "name_a"):
        ways.sweep(role)
        sites = ways.sample()
        out.append(ways.exactness(sites, ways.one_by_one(sites, role)[1]))
    return worst(out)


def worst(exact: Sequence[dict[str, float]]) -> dict[str, float]:
    """The largest of each number, and all sites."""
    return {key: max(one[key] for one in exact) for key in exact[0]} | {"sites": sum(one["sites"] for one in exact)}


class Measurement:
    """The parts of the result, in the order in which they are measured."""

    def __init__(self, shape: str, quantisation: str, dtype: str, repeats: int, until: float) -> None:
        self.name, self.format, self.repeats, self.until = shape, (quantisation, dtype), repeats, until
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # on a CPU there is one kernel for all; the tiny shape goes the way of a card there, to try it
        alike = quantisation == "nf4" and (self.device == "cuda" or shape == "tiny")
        self.result: dict[str, Any] = {
            "shape": dict(zip(KEYS, SHAPES[shape], strict=True)),
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "machine": machine.facts(),
            "versions": machine.versions(),
            **machine.commit(),
            "threads": torch.get_num_threads(),
            "scaled_down": shape != "70b",
            "quantisation": quantisation,
            "dtype": dtype,
            "one_kernel": alike,
        }
        self.ways: Ways | None = None

    def parts(self) -> dict[str, Callable[[], None]]:
        """Name and function of each part; each adds to the result."""
        own = {
            "model": self.model,
            "limits": self.limits,
            "last": functools.partial(self.swept, "last"),
            "name_a": functools.partial(self.swept, "name_a"),
            "paths": self.paths,
        }
        if self.result["one_kernel"]:
            own["any kernel"] = self.any_kernel
        others = [each for each in FORMATS if each != self.format]
        return own | {f"other: {' '.join(each)}": functools.partial(self.other, *each) for each in others}

    def model(self) -> None:
        """Make the weights; whether they are sane, and what they and a pass take."""
        quantisation, dtype = self.format
        start = time.perf_counter()
        model = build(self.name, quantisation, models.DTYPES[dtype], self.device)
        waited(self.device)
        self.result["weights_seconds"] = round(time.perf_counter() - start, 1)
        alike = self.result["one_kernel"]
        self.ways = ways = Ways(model, made_up_pair(SHAPES[self.name][-1]), self.device, alike)
        roles, tokens = ("last", "name_a"), ways.corrupt.shape[1]
        self.result |= {"tokens": tokens, "sanity": sanity(ways)}
        self.result["memory_gb"] = {
            "weights": round(model.model.get_memory_footprint() / 1e9, 3),
            "pass_budget": ways.memory,
            "row_mb": {r: round(single_pass.row_bytes(model, tokens, tokens - min(ROLES[r])) / 1e6, 3) for r in roles},
            "expected_peak": {role: round(expected_peak(ways, role), 2) for role in roles},
        }

    def limits(self) -> None:
        """What the device can do, and a plain forward pass."""
        ways = self.ways
        self.result["limits"] = limits(ways.model, self.device)
        with torch.no_grad():
            took = seconds(lambda: ways.plain(ways.corrupt), self.device, self.repeats, 1)
        self.result["plain_forward_s"] = round(took, 4)

    def swept(self, role: str) -> None:
        """The sweep at a role, both ways."""
        ways, result, left = self.ways, self.result, self.until - time.time()
        row, sites, logits = compared(ways, role, result["limits"], self.repeats, left)
        result.setdefault("sweeps", []).append(row)
        self.note_peak()
        exact = ways.exactness(sites, logits)
        result["exactness"] = worst([exact, *([result["exactness"]] if "exactness" in result else [])])

    def paths(self) -> None:
        """Path patching, both ways."""
        self.result["paths"] = self.ways.paths()
        self.note_peak()

    def any_kernel(self) -> None:
        """The sweep at `last` with the kernels that bitsandbytes chooses."""
        ways = Ways(self.ways.model, self.ways.pair, self.device)
        took = seconds(lambda: ways.sweep("last"), self.device, spare=1)
        sites = ways.sample()
        exact = ways.exactness(sites, ways.one_by_one(sites, "last")[1])
        self.result["any_kernel"] = {"seconds": round(took, 3), "exactness": exact}

    def other(self, quantisation: str, dtype: str) -> None:
        """Exactness of another format, on the small shape."""
        self.ways = None  # make room
        shape = "tiny" if self.name == "tiny" else "small"
        self.result.setdefault("others", []).append(exactness(shape, quantisation, dtype, self.device))

    def note_peak(self) -> None:
        """The most memory that was in use so far."""
        self.result["memory_gb"]["peak"] = round(peak_gb(self.device), 2)


def default_shape() -> str:
    """The full shape on a card, a quarter of it elsewhere."""
    return "70b" if torch.cuda.is_available() else "quarter"


def default_dtype(shape: str) -> str:
    """bf16; fp32, which every CPU multiplies fast, where the tiny shape is tried on one."""
    return "float32" if shape == "tiny" and not torch.cuda.is_available() else "bfloat16"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the result; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("auto", *SHAPES), default="auto")
    parser.add_argument("--quantisation", choices=("nf4", "int8", "none"), default="nf4")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parts.add_options(parser, RESULTS)
    asked = parser.parse_args(arguments)
    shape = asked.shape if asked.shape != "auto" else default_shape()
    dtype = asked.dtype if asked.dtype != "auto" else default_dtype(shape)
    own = Measurement(shape, asked.quantisation, dtype, asked.repeats, asked.until)
    name = "scale_70b" if shape in ("70b", "quarter") else f"scale_{shape}"
    return parts.run(own.parts(), own.result, asked.out / f"{name}.json", asked.until)


if __name__ == "__main__":
    sys.exit(main())
