"""GGUF files of one's own: each quantisation read as it says, and nothing left out without a word."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import CONFIGS

from lib import models, weights

CONFIG = CONFIGS["llama"] | {"head_dim": 8, "intermediate_size": 64}  # whole blocks of 32 weights
NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
WORDS = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "bo", *(f"w{number}" for number in range(73))]


def permuted(name, value, back=False):
    """llama.cpp keeps the two halves of each head's queries and keys side by side."""
    heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-2])
    if heads is None:
        return value
    shape = (heads, -1, 2) if back else (heads, 2, value.shape[0] // heads // 2)
    return value.reshape(*shape, value.shape[1]).swapaxes(1, 2).reshape(value.shape)


def write(path, kind=gguf.GGMLQuantizationType.F32, tensors=(), keys=(), without="", split="gpt-2"):
    """A GGUF file of a small random Llama; returns its weights as the file has them, by their names in transformers."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**CONFIG))
    writer, kept = gguf.GGUFWriter(path, "llama"), {}
    for add, value in (
        ("context_length", 64),
        ("embedding_length", 32),
        ("block_count", 3),
        ("feed_forward_length", 64),
    ):
        getattr(writer, f"add_{add}")(value)
    for add, value in (("head_count", 4), ("head_count_kv", 2), ("rope_dimension_count", 8), ("vocab_size", 101)):
        getattr(writer, f"add_{add}")(value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["b o"])
    writer.add_tokenizer_pre(split)
    for key in keys:
        writer.add_float32(key, 8.0)
    for hf, value in model.state_dict().items():
        name = NAMES.get_name(hf, (".weight",))
        own = kind if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(permuted(name, value.numpy()), own)
        kept[hf] = torch.from_numpy(permuted(name, gguf.quants.dequantize(packed, own), back=True).copy())
        if name != without:
            writer.add_tensor(name, packed, raw_dtype=own)
    for name in tensors:
        writer.add_tensor(name, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUPERSET_CIRCUIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_weights_are_those_of_the_file(tmp_path, kind):
    kept = write(tmp_path / "own.gguf", gguf.GGMLQuantizationType[kind])
    model = models.load(str(tmp_path / "own.gguf"), device="cpu")
    found = model.model.state_dict()
    assert found.keys() == kept.keys() and all(torch.equal(found[name], value) for name, value in kept.items())
    assert model.tokenizer.convert_ids_to_tokens(model.tokenizer.encode("both")) == ["bo", "t", "h"]
    assert model.tokenizer.model_max_length == 64


@pytest.mark.parametrize(
    "change,message",
    [
        (
            {"tensors": ["rope_freqs.weight"]},
            "rope_freqs.weight would be left out when the file is read; give the model's",
        ),
        ({"tensors": ["blk.1.attn_v.bias"]}, "blk.1.attn_v.bias would be left out"),
        ({"keys": ["llama.rope.scaling.factor"]}, "llama.rope.scaling.factor would be left out"),
        ({"split": "deepseek-llm"}, "how words are split, deepseek-llm, would be left out"),
        ({"without": "blk.1.ffn_up.weight"}, r"1 missing \(model.layers.1.mlp.up_proj.weight\)"),
    ],
)
def test_what_would_be_left_out_is_refused(tmp_path, change, message):
    write(tmp_path / "own.gguf", **change)
    with pytest.raises(models.ModelError, match=message):
        models.load(str(tmp_path / "own.gguf"), device="cpu")
    assert [path.suffix for path in weights.cache_folder().iterdir()] in ([], [".lock"])
