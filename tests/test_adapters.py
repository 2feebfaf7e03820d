"""LoRA adapters: what is merged is what the formula says, and what is not understood is refused."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from lib import adapters, models
from lib.weights import ModelError

IDS = torch.tensor([[1, 2, 3, 4, 5]])
PATHS = {
    "llama": ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj", "lm_head"),
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"),
}
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 12, "bias": "none", "task_type": "CAUSAL_LM", "use_dora": False}
CONFIG |= {"target_modules": ["q_proj"], "modules_to_save": None, "rank_pattern": {}, "lora_dropout": 0.1}
CONFIG |= {"megatron_config": None, "megatron_core": "megatron.core", "base_model_name_or_path": "./base"}  # peft's


def write(folder, model, paths, config=CONFIG, **beside):
    """An adapter of random matrices; returns them by module."""
    folder.mkdir(exist_ok=True)
    draw, tensors, made = torch.Generator().manual_seed(0), {}, {}
    for path in paths:
        weight = model.get_submodule(path).weight
        out, wide = weight.shape if isinstance(model.get_submodule(path), torch.nn.Linear) else weight.T.shape
        made[path] = torch.randn(3, wide, generator=draw), torch.randn(out, 3, generator=draw)
        for part, value in zip("AB", made[path], strict=True):
            tensors[f"base_model.model.{path}.lora_{part}.weight"] = value
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors | beside, folder / "adapter_model.safetensors")
    return made


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", list(PATHS))
def test_a_merged_adapter_adds_scale_times_b_a(tiny, config_file, tmp_path, name, rslora):
    plain, spec = tiny(name), f"config:{config_file(name)}"
    made = write(tmp_path / "lora", plain.model, PATHS[name], CONFIG | {"use_rslora": rslora})
    merged = models.load(spec, dtype="float64", device="cpu", adapter=str(tmp_path / "lora"))
    assert merged.name == f"{spec} with lora"
    scale = 12 / (3**0.5 if rslora else 3)

    def beside(module, args, output, path):
        a, b = (value.double() for value in made[path])
        return output + scale * args[0] @ a.T @ b.T

    handles = [
        plain.model.get_submodule(path).register_forward_hook(lambda *call, path=path: beside(*call, path))
        for path in made
    ]
    before = merged.model(IDS).logits
    wanted = plain.model(IDS).logits
    for handle in handles:
        handle.remove()
    assert (before - wanted).abs().max() < 1e-9 * wanted.abs().max()
    assert (wanted - plain.model(IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize(
    "change,message",
    [
        ({"use_dora": True}, "use_dora = True of adapter_config.json is not understood"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = "),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern = "),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern = "),
        ({"bias": "all"}, "bias = 'all' .* understood is 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3' .* understood is 'LORA'"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices = "),
        ({"layer_replication": [[0, 2]]}, "layer_replication = "),
        ({"something_new": 1}, "something_new = 1"),
        ({"r": None}, "has no r"),
        ({"use_rslora": "no"}, "use_rslora = 'no' of adapter_config.json is not understood; understood is True"),
        ({"r": "3"}, "r = '3' of adapter_config.json is no number"),
        ({"lora_alpha": [16]}, r"lora_alpha = \[16\] of adapter_config.json is no number"),
        ({"r": 4}, r"rank 4 and \(48, 32\) do not fit"),
    ],
)
def test_a_key_that_is_not_understood_is_refused(tiny, tmp_path, change, message):
    model = tiny("llama").model
    write(tmp_path / "lora", model, PATHS["llama"][:1], CONFIG | change)
    before = model.get_submodule(PATHS["llama"][0]).weight.clone()
    with pytest.raises(ModelError, match=message):
        adapters.merge(model, str(tmp_path / "lora"), "a")
    assert torch.equal(before, model.get_submodule(PATHS["llama"][0]).weight)


ONE = torch.ones(3, 3)
BESIDE = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight": "lora_magnitude_vector",
    "base_model.model.model.embed_tokens.lora_embedding_A": "lora_embedding_A",
    "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": "has lora_A alone",
    "lm_head.weight": "is no finite lora_A or lora_B weight",
}


@pytest.mark.parametrize("name", list(BESIDE))
def test_a_tensor_that_is_not_understood_is_refused(tiny, tmp_path, name):
    write(tmp_path / "lora", tiny("llama").model, PATHS["llama"][:1], **{name: ONE})
    with pytest.raises(ModelError, match=BESIDE[name]):
        adapters.merge(tiny("llama").model, str(tmp_path / "lora"), "a")


def test_an_adapter_that_does_not_belong_is_refused(tiny, tiny_folder, tmp_path):
    folder = tmp_path / "lora"
    with pytest.raises(ModelError, match=r"has no adapter_config.json; give a folder of peft's"):
        models.load(str(tiny_folder), adapter=str(folder), device="cpu")
    write(folder, tiny("gpt2").model, PATHS["gpt2"])
    with pytest.raises(ModelError, match="transformer.h.0.attn.c_attn is no module of LlamaForCausalLM"):
        models.load(str(tiny_folder), adapter=str(folder), device="cpu")
    with pytest.raises(ModelError, match="is merged into plain weights"):
        models.load(str(tiny_folder), adapter=str(folder), quantisation="nf4")
    with pytest.raises(ModelError, match="is an adapter: give its model as model, and this folder as adapter"):
        models.load(str(folder), device="cpu")
    write(folder, tiny("gpt2").model, PATHS["gpt2"])
    shutil.copy(folder / "adapter_model.safetensors", folder / "cut")
    (folder / "adapter_model.safetensors").write_bytes((folder / "cut").read_bytes()[:-9])
    with pytest.raises(ModelError, match="cannot be read"):
        adapters.merge(tiny("gpt2").model, str(folder), "a")


def test_a_weight_that_the_embeddings_share_is_not_merged(tiny, tmp_path):
    write(tmp_path / "lora", tiny("gpt2").model, ("lm_head",))
    with pytest.raises(ModelError, match="shares its weight with the embeddings"):
        adapters.merge(tiny("gpt2").model, str(tmp_path / "lora"), "a")


def test_an_adapter_of_a_hub_model_of_another_name_is_refused(tiny_folder, tiny, tmp_path):
    for base in (f"owner/{tiny_folder.name}", "/somewhere/base"):  # a path says nothing elsewhere
        write(tmp_path, tiny("llama").model, PATHS["llama"], CONFIG | {"base_model_name_or_path": base})
        assert models.load(str(tiny_folder), adapter=str(tmp_path), device="cpu").name.endswith(tmp_path.name)
    write(tmp_path, tiny("llama").model, PATHS["llama"], CONFIG | {"base_model_name_or_path": "meta-llama/Llama-2-7b"})
    with pytest.raises(
        ModelError, match=f"on meta-llama/Llama-2-7b, and the model here is {tiny_folder}; if the two are"
    ):
        models.load(str(tiny_folder), adapter=str(tmp_path), device="cpu")
