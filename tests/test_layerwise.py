"""Sweeps of an offloaded model in lock step: each layer is read once, and the rows are those of the model in memory."""

from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from conftest import CONFIGS
from test_sweep import pair_of

from lib import models, offload, paths, single_pass, sweep
from lib.hooks import Site
from lib.tasks import Prompt

LITTLE = 2e-3  # GB: passes of a few dozen rows
PLACES = {"model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.layers": "disk", "model.norm": "disk"}
PLACES |= {"lm_head": "disk"}


def longer(pair):
    """The pair with two more tokens before its last one."""

    def prompt(old):
        roles = old.roles | {"last": (11,), "all": tuple(range(12))}
        return Prompt("", (*old.ids[:9], 5, 6, old.ids[9]), roles)

    return replace(pair, pair_id=f"{pair.pair_id}-long", clean=prompt(pair.clean), corrupt=prompt(pair.corrupt))


PAIRS = [pair_of(index) for index in range(4)]
PAIRS = [made for pair in PAIRS for made in (pair, longer(pair))]  # two groups, one among the other
SPOKEN = [replace(pair, clean_seconds=(21, 31, 41, 51), corrupt_seconds=(22, 32, 42, 52)) for pair in PAIRS[:4]]
SWEEPS = {
    "noise": {"role": "names", "ablations": sweep.ABLATIONS},
    "denoise": {"direction": "denoise", "components": ["head"], "layers": [1, 2], "memory": 1e-4},
    "sets": {"site_sets": [[Site(0, "mlp"), Site(2, "head", 1)], [Site(1, "resid")]], "role": "all", "memory": 5e-5},
    "two tokens": {"components": ["attn", "mlp"], "pairs": SPOKEN},
}


@pytest.fixture(scope="module")
def both(tiny_folder, tmp_path_factory):
    """A small Llama in memory and offloaded to disk."""
    folder = str(tmp_path_factory.mktemp("offload"))
    there = models.load(str(tiny_folder), device_map=PLACES, offload_folder=folder)
    assert offload.offloaded(there) == [0, 1, 2] and there.unembed.weight.is_meta
    return models.load(str(tiny_folder), device="cpu"), there


def same(one, other):
    pd.testing.assert_frame_equal(one, other, check_exact=True)


def untouched(model):
    """Whether nothing is hooked and no offloaded weight is left behind."""
    modules = list(model.model.modules())
    resting = all(hook.offload for module in modules for hook in offload.offloading(module))
    bare = not any((*module._forward_hooks, *module._forward_pre_hooks) for module in modules)
    return bare and resting and all(weight.is_meta for weight in model.model.parameters())


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_reads_each_layer_once_and_gives_the_rows_of_the_model_in_memory(both, monkeypatch, name):
    options = {"pairs": PAIRS, "memory": LITTLE} | SWEEPS[name]
    real, reads, passes, through = OffloadedWeightsLoader.__getitem__, Counter(), [], offload.through

    def read(self, key):
        reads[key] += 1
        return real(self, key)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", read)
    monkeypatch.setattr(offload, "through", lambda model, own: passes.append(len(own)) or through(model, own))
    frame = sweep.run(both[1], **options)
    assert reads == dict.fromkeys([name for name, _ in both[1].model.named_parameters()], 1)
    assert sum(passes) >= 8  # of both lengths, and several where memory is short
    assert [frame.attrs["loads"][f"layer {layer}"] for layer in range(3)] == [1, 1, 1] and untouched(both[1])
    ordinary = sweep.run(both[0], **options)
    assert sum(passes) >= 8 and "loads" not in ordinary.attrs  # the model in memory has taken the ordinary way
    same(frame, ordinary)


def test_variants_may_use_any_layer_so_their_sweep_reads_each_twice(both):
    def made(pairs, base, other):
        ends = {key: value / 2 + other.activations[key[0], 2] for key, value in base.activations.items()}
        return {"half": ends, "other": other.activations}

    sets = [(Site(0, "mlp"),), (Site(1, "mlp"), Site(2, "mlp"))]
    frames = [sweep.run_variants(m, PAIRS, sets, ("half", "other"), made, memory=1e-5) for m in both]
    same(*frames)
    assert [frames[1].attrs["loads"][f"layer {layer}"] for layer in range(3)] == [2, 2, 2]


def test_loads_are_counted_and_logged(both, caplog):
    model, ids = both[1], torch.tensor([PAIRS[0].clean.ids])
    with offload.counted(model) as loads:
        plain = [model.model(ids).logits for _ in range(2)]
        with offload.loaded(model.blocks[1], model.unembed):
            held = model.model(ids).logits
    assert torch.equal(plain[0], held) and torch.equal(plain[0], both[0].model(ids).logits)
    every = [*(f"layer {layer}" for layer in range(3)), "model.embed_tokens", "model.norm", "lm_head"]
    assert loads == dict.fromkeys(every, 3)
    with caplog.at_level("INFO", "lib.offload"):
        sweep.run(model, PAIRS, components=["mlp"])
    assert "3 layers offloaded, 3 layer loads for 2 jobs" in caplog.text


@pytest.mark.parametrize("name", CONFIGS)
def test_lock_step_changes_no_bit_on_any_architecture(tiny, monkeypatch, name):
    model, options = tiny(name, "float32"), {"role": "names", "ablations": ["counterfactual", "mean"]}
    ordinary = sweep.run(model, PAIRS, memory=LITTLE, **options)
    monkeypatch.setattr(offload, "offloaded", lambda model: [0])
    same(sweep.run(model, PAIRS, memory=LITTLE, **options), ordinary)


def test_the_last_pool_serves_the_next_call(both, monkeypatch):
    options = {"components": ["mlp"], "ablations": ["mean"], "pool": PAIRS}
    batches, fill = [], offload.pool_passes
    monkeypatch.setattr(offload, "pool_passes", lambda *parts: batches.append(parts) or fill(*parts))
    pools = {}
    frames = [sweep.run(both[1], PAIRS[first::4], pools=pools, **options) for first in (0, 2)]
    assert len(batches) == len(pools) == 1
    same(frames[1], sweep.run(both[0], PAIRS[2::4], **options))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("broken")])
def test_an_error_surfaces_and_leaves_nothing_behind(both, monkeypatch, error):
    write = single_pass.Edit.write

    def fail(self, activation):
        if len(self.rows) and fail.left == 0:
            raise error
        fail.left -= 1
        write(self, activation)

    fail.left = 20
    monkeypatch.setattr(single_pass.Edit, "write", fail)
    with pytest.raises(error if isinstance(error, type) else ValueError):
        sweep.run(both[1], PAIRS, memory=LITTLE)
    assert untouched(both[1])


def test_when_memory_runs_out_all_is_done_again_with_half_of_it(both, monkeypatch):
    calls = run_short(monkeypatch, 1)
    frame = sweep.run(both[1], PAIRS, memory=LITTLE)
    assert (
        calls[1] > calls[0]
        and "out of memory" in frame.attrs["log"][0]
        and f"{LITTLE / 2:g} GB" in frame.attrs["log"][0]
    )
    same(frame, sweep.run(both[0], PAIRS, memory=LITTLE / 2))


def test_when_halving_does_not_help_the_jobs_are_parted(both, monkeypatch):
    run_short(monkeypatch, 3)
    frame = sweep.run(both[1], PAIRS, memory=LITTLE)
    assert ["in two parts" in line for line in frame.attrs["log"]] == [False, False, True]
    assert [frame.attrs["loads"][f"layer {layer}"] for layer in range(3)] == [2, 2, 2]
    same(frame, sweep.run(both[0], PAIRS, memory=LITTLE / 4))


def test_memory_that_one_pair_alone_does_not_find_is_an_error(both, monkeypatch):
    calls = run_short(monkeypatch, 1000)
    with pytest.raises(RuntimeError, match="t allocate memory"):
        sweep.run(both[1], PAIRS[:1], memory=LITTLE)
    assert len(calls) > 3 and untouched(both[1])


def run_short(monkeypatch, times):
    """Have memory run out at the first `times` passes through the model; what torch says is torch's own."""
    through, calls = offload.through, []

    def short(model, passes):
        calls.append(len(passes))
        if len(calls) <= times:
            torch.empty(2**60, dtype=torch.uint8)
        return through(model, passes)

    monkeypatch.setattr(offload, "through", short)
    return calls


def test_path_patching_and_the_proofs_run_offloaded(both):
    receivers = [paths.Receiver(2, "q", 1), paths.Receiver(2, "mlp")]
    frames = [paths.run(m, PAIRS, receivers=receivers, memory=LITTLE) for m in both]
    same(*frames)
    assert sweep.prove(both[0], PAIRS[0]) == sweep.prove(both[1], PAIRS[0])
    assert untouched(both[1])
