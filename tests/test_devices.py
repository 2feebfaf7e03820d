"""Rows follow the layers: maps of several devices, named in a profile or by `auto`, give the rows of one device.

Two CUDA devices where there are two, else the CPU and the disk.
"""

import pandas as pd
import pytest
import torch
from conftest import SMOLLM
from test_layerwise import longer
from test_sweep import pair_of

from lib import models, offload, paths, sweep
from lib.weights import ModelError
from pipeline import params
from pipeline import step as steps
from steps.registry import PLAN

PAIRS = [pair_of(0), pair_of(2), longer(pair_of(0))]
WHOLE = {"role": "names", "ablations": ("zero", "counterfactual")}
REST = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NEEDS_TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def plain(tiny_folder):
    """The small Llama on one device."""
    return models.load(str(tiny_folder), device="cpu")


def layer_map(*devices, rest="cpu"):
    """A device map with a device for each layer."""
    return dict.fromkeys(REST, rest) | {f"model.layers.{layer}": device for layer, device in enumerate(devices)}


def from_profile(tiny_folder, tmp_path, **own):
    """The model of a step of a profile."""
    own = {"model": str(tiny_folder), "device": "cpu", "layers": "all", "results_dir": str(tmp_path / "results")} | own
    given = params.load_profile("smoke")
    given = {key: value for key, value in given.items() if key not in ("model_sha256", "memory")} | own
    return steps.Step(PLAN, "necessity", params.validate(PLAN.sections, "necessity", given)).model


def agree(one, other, tolerance=1e-3):
    """Two tables of the same rows, up to the noise of other kernels."""
    keys = ["layer", "component", "head", "pair_id", "ablation"]
    pd.testing.assert_frame_equal(one[keys], other[keys])
    for column in ("metric_before", "metric_after", "logit_diff_after", "kl_after", "site_delta"):
        assert (one[column] - other[column]).abs().max() < tolerance
    assert (one["fired"] == 1).all() and (one["site_delta"] > 0).all()


@pytest.mark.parametrize("layers", [("cpu", "disk", "cpu"), ("disk", "cpu", "disk")])
def test_a_map_in_the_profile_puts_layers_where_it_says(tiny_folder, tmp_path, plain, layers):
    model = from_profile(tiny_folder, tmp_path, device_map=layer_map(*layers))
    assert [block.mlp.down_proj.weight.device.type for block in model.blocks] == [
        {"disk": "meta"}.get(place, place) for place in layers
    ]
    frame = sweep.run(model, PAIRS, memory=1e-3, **WHOLE)
    assert frame.attrs["loads"] == {f"layer {layer}": 1 for layer, place in enumerate(layers) if place == "disk"}
    pd.testing.assert_frame_equal(frame, sweep.run(plain, PAIRS, memory=1e-3, **WHOLE), check_exact=True)


def test_auto_with_max_memory_spills_to_the_disk(tiny_folder, tmp_path, plain):
    size = plain.model.get_memory_footprint() / 2**30
    folder = str(tmp_path / "offload")
    own = {"device_map": "auto", "max_memory": {"cpu": 0.6 * size}, "offload_folder": folder}
    model = from_profile(tiny_folder, tmp_path, **own)
    spilt = offload.offloaded(model)
    assert spilt and set(model.model.hf_device_map.values()) == {"cpu", "disk"}
    frame = sweep.run(model, PAIRS, direction="denoise")
    assert {key: frame.attrs["loads"][key] for key in frame.attrs["loads"] if key.startswith("layer")} == {
        f"layer {layer}": 1 for layer in spilt
    }
    pd.testing.assert_frame_equal(frame, sweep.run(plain, PAIRS, direction="denoise"), check_exact=True)


def test_a_map_that_leaves_a_layer_out_is_an_error_that_names_it(tiny_folder):
    with pytest.raises(ModelError, match=r"could not be loaded.*model\.layers\.2"):
        models.load(str(tiny_folder), device_map=layer_map("cpu", "disk"))


@pytest.mark.parametrize("option", [{"max_memory": {"cpu": 1}}, {"offload_folder": "here"}])
def test_options_of_a_device_map_without_one_are_refused(tiny_folder, option):
    with pytest.raises(ModelError, match=f"{next(iter(option))} .*device_map: auto"):
        models.load(str(tiny_folder), device="cpu", **option)


@NEEDS_TWO
@pytest.mark.parametrize("places", ["auto", layer_map(0, 1, 1, rest=0), layer_map(1, 0, 1, rest=1)])
def test_two_devices_give_the_rows_of_one(tiny_folder, plain, places):
    model = models.load(str(tiny_folder), device_map=places)
    if isinstance(places, dict):
        assert [block.mlp.down_proj.weight.device.index for block in model.blocks] == list(places.values())[-3:]
    agree(sweep.run(model, PAIRS, **WHOLE), sweep.run(plain, PAIRS, **WHOLE))
    receivers = [paths.Receiver(2, "q", 1), paths.Receiver(1, "mlp")]
    mine, theirs = (paths.run(each, PAIRS, receivers=receivers) for each in (model, plain))
    assert (mine["metric_after"] - theirs["metric_after"]).abs().max() < 1e-3


@NEEDS_CUDA
def test_layers_kept_in_the_machines_memory_are_sent_to_the_device_once(smollm, two_pairs):
    places = dict.fromkeys(REST, 0) | {f"model.layers.{layer}": "cpu" if layer % 3 else 0 for layer in range(30)}
    model = models.load(SMOLLM, device_map=places)
    assert model.device.type == "cuda" and len(offload.offloaded(model)) == 20
    options = {"direction": "denoise", "components": ["head"], "memory": 0.02}
    frame = sweep.run(model, two_pairs, **options)
    assert [frame.attrs["loads"][f"layer {layer}"] for layer in offload.offloaded(model)] == [1] * 20
    agree(frame, sweep.run(smollm, two_pairs, **options), 2e-3)
