"""The final norm and unembedding as directions, post norms, and heads' own contributions, against the modules."""

import pytest
import torch
from torch import nn

from lib import hooks, models, readout
from lib.hooks import Site
from lib.weights import ModelError
from steps.hydra import splits

NAMES = ["llama", "qwen3", "gemma2", "gemma3", "gpt2"]
IDS = torch.tensor([[5, 17, 80, 33, 2, 64]])


@pytest.fixture(scope="module")
def uneven(config_file):
    """A tiny model of uneven norms and with biases: random models come with all ones and zeros."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = models.load(f"config:{config_file(name)}", dtype="float64", device="cpu")
            torch.manual_seed(1)
            for path, parameter in made[name].model.named_parameters():
                if "norm" in path or "ln_" in path or path.endswith("bias"):
                    parameter.data += 0.5 * torch.randn_like(parameter)
        return made[name]

    return make


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_sums_over_directions(uneven, name):
    model = uneven(name)
    read = readout.readout(model)
    last = Site(model.n_layers - 1, "resid")
    with hooks.capture(model, [last]) as seen:
        hidden = model.body(input_ids=IDS).last_hidden_state
    resid, tokens = seen[last][0], torch.tensor([[3, 40, 99]])
    wide = read.norm(resid)
    # the norms of most architectures compute in fp32 inside
    assert (wide - hidden[0]).abs().max() < (1e-12 if name == "gpt2" else 1e-5)
    constant = read.norm.bias @ model.unembed.weight[tokens[0]].T
    logits = torch.einsum("ph,kh->pk", resid, read.directions(tokens)[0]) / read.norm.scale(resid)[:, None] + constant
    assert (logits - wide @ model.unembed.weight[tokens[0]].T).abs().max() < 1e-11
    assert read.directions(7).shape == (32,) and read.directions(tokens).shape == (1, 3, 32)
    assert read.norm.centres == (name == "gpt2")


@pytest.mark.parametrize("name", NAMES)
def test_post_norms_are_found_where_the_architecture_has_them(uneven, name):
    model = uneven(name)
    norms = readout.post_norms(model)
    has = name.startswith("gemma")
    assert [(own.attn is not None, own.mlp is not None) for own in norms] == [(has, has)] * model.n_layers
    # whatever was found: each block adds its attention and MLP outputs, through these norms, to what it was given
    with hooks.capture(model, hooks.all_sites(model, ("resid", "attn", "mlp"))) as seen:
        model.body(input_ids=IDS)
    for layer in range(1, model.n_layers):
        added = seen[Site(layer, "resid")] - seen[Site(layer - 1, "resid")]
        parts = [seen[Site(layer, part)] for part in ("attn", "mlp")]
        parts = [norm(x) if norm else x for norm, x in zip(norms[layer], parts, strict=True)]
        assert (added - sum(parts)).abs().max() < (1e-4 if has else 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_heads_add_up_to_the_attention_output(uneven, name):
    model = uneven(name)
    with hooks.capture(model, [Site(1, "attn"), *hooks.all_sites(model, ("head",), [1])]) as seen:
        model.body(input_ids=IDS)
    z = torch.cat([seen[Site(1, "head", head)] for head in range(model.n_heads)], -1)
    heads = splits.head_outputs(model, 1, z)
    bias = getattr(model.o_projs[1], "bias", None)
    assert heads.shape == (1, 6, model.n_heads, 32)
    assert (heads.sum(-2) + (0 if bias is None else bias) - seen[Site(1, "attn")]).abs().max() < 1e-12
    only = z.clone().unflatten(-1, (model.n_heads, -1))
    only[..., [0, 1, 3], :] = 0
    alone = model.o_projs[1](only.flatten(-2)) - (0 if bias is None else bias)
    assert (heads[..., 2, :] - alone).abs().max() < 1e-12


class Odd(nn.LayerNorm):
    """A norm of an unknown kind."""

    def forward(self, x):
        return super().forward(x).tanh()


@pytest.mark.parametrize("width", [8, 9])
def test_any_norm_is_found_by_probing_and_another_is_an_error(width):
    torch.manual_seed(0)
    for norm in (nn.LayerNorm(width, eps=0.3), nn.LayerNorm(width, bias=False), nn.RMSNorm(width, eps=1e-3)):
        for parameter in norm.parameters():
            parameter.data = torch.randn_like(parameter)
        found, x = readout.fixed_norm(norm, width), torch.randn(5, width, dtype=torch.float64)
        assert (found(x) - norm.double()(x)).abs().max() < 1e-9
        assert found.epsilon == pytest.approx(norm.eps, rel=1e-5)
        assert found.centres == isinstance(norm, nn.LayerNorm)
    with pytest.raises(ModelError, match="Odd is not g"):
        readout.fixed_norm(Odd(width), width)


def test_a_half_precision_norm_is_read_in_full(tiny):
    norm = tiny("llama").final_norm
    half = type(norm)(32).to(torch.bfloat16)
    half.weight.data = torch.linspace(0.5, 2, 32).bfloat16()
    assert torch.equal(readout.fixed_norm(half, 32).gain, half.weight.double())
