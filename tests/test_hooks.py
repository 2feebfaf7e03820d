"""capture, ablate and patch against values worked out by hand, and hooks that never outlive their block."""

import contextlib
import dataclasses

import pytest
import torch
from conftest import CONFIGS

from lib import hooks
from lib.hooks import Site

IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
OTHER = torch.tensor([[1, 2, 30, 4, 50, 6, 7, 80]])
NAMES = ["llama", "qwen3", "gemma3", "gpt2"]


def logits(model, ids=IDS):
    return model.model(ids).logits


def all_hooks(model):
    """Every hook of every module, to compare before and after."""
    return [(*module._forward_hooks, *module._forward_pre_hooks) for module in model.model.modules()]


class TupleBlock(torch.nn.Module):
    """A block that returns a tuple, as blocks did before transformers 5."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs), "attention weights"


class FirstOf(torch.nn.Module):
    """What a body of that time did with the tuple."""

    def __init__(self, block):
        super().__init__()
        self.inner = block

    def forward(self, *args, **kwargs):
        hidden, extra = self.inner(*args, **kwargs)
        assert extra == "attention weights"
        return hidden

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:  # what the body asks of its blocks
            return getattr(self.inner.block, name)


@contextlib.contextmanager
def returning_tuples(model):
    """The model with blocks that return tuples; restored afterwards."""
    layers, blocks = model.body.layers, [TupleBlock(block) for block in model.blocks]
    model.body.layers = torch.nn.ModuleList(FirstOf(block) for block in blocks)
    try:
        yield dataclasses.replace(model, blocks=blocks)
    finally:
        model.body.layers = layers


@pytest.mark.parametrize("name", list(CONFIGS))
def test_captured_values_are_what_the_modules_compute(tiny, name):
    model = tiny(name)
    with hooks.capture(model, hooks.all_sites(model)) as seen:
        out = model.model(IDS, output_hidden_states=True)
    for layer in range(model.n_layers - 1):  # the last of hidden_states has the final norm behind it
        assert torch.equal(seen[Site(layer, "resid")], out.hidden_states[layer + 1])
    last = seen[Site(model.n_layers - 1, "resid")]
    assert torch.equal(model.final_norm(last), out.hidden_states[-1])
    for layer in range(model.n_layers):
        heads = torch.cat([seen[Site(layer, "head", head)] for head in range(model.n_heads)], dim=-1)
        assert heads.shape == (1, 8, model.n_heads * model.head_size)
        assert torch.equal(model.o_projs[layer](heads), seen[Site(layer, "attn")])
    if name in ("llama", "gpt2"):  # no norm behind attention and MLP: the stream is their sum
        for layer in range(1, model.n_layers):
            parts = [seen[Site(layer - 1, "resid")], seen[Site(layer, "attn")], seen[Site(layer, "mlp")]]
            assert torch.allclose(seen[Site(layer, "resid")], sum(parts), atol=1e-12)


def test_capture_takes_the_positions_asked_in_their_order_and_copies(tiny):
    model, sites = tiny("llama"), hooks.all_sites(tiny("llama"))
    with hooks.capture(model, sites) as whole, hooks.capture(model, sites, [6, 2]) as part:
        logits(model)
    kept = {site: value.clone() for site, value in part.items()}
    assert all(torch.equal(part[site], whole[site][:, [6, 2]]) for site in sites)
    with hooks.capture(model, sites, [6, 2]) as later:
        logits(model, OTHER)
    assert all(torch.equal(part[site], kept[site]) and not torch.equal(part[site], later[site]) for site in sites)


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_changes_only_the_positions_asked(tiny, name):
    model = tiny(name)
    sites = [Site(1, component, 2 if component == "head" else -1) for component in hooks.COMPONENTS]
    with hooks.capture(model, sites) as own:
        logits(model)
    with hooks.capture(model, sites, [4]) as source:
        logits(model, OTHER)
    for site in sites:
        with hooks.patch(model, {site: source[site]}, [4]) as fired, hooks.capture(model, [site]) as seen:
            patched = logits(model)
        assert fired == {site: 1}
        assert torch.equal(seen[site][:, 4], source[site][:, 0])
        rest = [0, 1, 2, 3, 5, 6, 7]
        assert torch.equal(seen[site][:, rest], own[site][:, rest])
        moved = (patched - logits(model)).abs().amax((0, 2))
        assert (moved[:4] == 0).all() and moved[4] > 1e-3  # nothing flows to earlier tokens


@pytest.mark.parametrize("name", NAMES)
def test_the_last_residual_of_another_run_gives_its_logits(tiny, name):
    model = tiny(name)
    site = Site(model.n_layers - 1, "resid")
    with hooks.capture(model, [site]) as source:
        other = logits(model, OTHER)
    with hooks.patch(model, source):
        assert torch.equal(logits(model), other)
    assert not torch.allclose(logits(model), other)


@pytest.mark.parametrize("name", NAMES)
def test_its_own_value_changes_nothing(tiny, name):
    model = tiny(name)
    sites = hooks.all_sites(model)
    with hooks.capture(model, sites) as own:
        plain = logits(model)
    with hooks.patch(model, own) as fired:
        assert torch.equal(logits(model), plain)
    assert fired == dict.fromkeys(sites, 1)


@pytest.mark.parametrize("name", NAMES)
def test_ablating_a_head_equals_zeros_in_the_input_of_o_proj(tiny, name):
    model, head, size = tiny(name), 2, tiny(name).head_size
    with hooks.ablate(model, [Site(1, "head", head)], [3, 7]) as fired:
        got = logits(model)

    def by_hand(_, args):
        z = args[0].clone()
        z[:, [3, 7], head * size : (head + 1) * size] = 0
        return (z,)

    handle = model.o_projs[1].register_forward_pre_hook(by_hand)
    try:
        wanted = logits(model)
    finally:
        handle.remove()
    assert fired == {Site(1, "head", head): 1}
    assert torch.equal(got, wanted) and not torch.allclose(got, logits(model))


def test_ablating_attention_and_mlp_leaves_the_stream_as_it_was(tiny):
    model = tiny("llama")
    streams, parts = [Site(0, "resid"), Site(1, "resid")], [Site(1, "attn"), Site(1, "mlp")]
    with hooks.capture(model, streams) as seen, hooks.ablate(model, parts, [5]):
        logits(model)
    before, after = seen[Site(0, "resid")], seen[Site(1, "resid")]
    assert torch.equal(before[:, 5], after[:, 5]) and not torch.allclose(before[:, 4], after[:, 4])


def test_several_sites_and_prompts_are_patched_together(tiny):
    model, batch = tiny("gemma3"), torch.cat([IDS, OTHER])
    sites = [Site(0, "head", 1), Site(0, "head", 3), Site(2, "mlp")]
    with hooks.capture(model, sites, [4, 7]) as seen:
        logits(model, batch)
    exchanged = {site: value.flip(0) for site, value in seen.items()}
    with hooks.patch(model, exchanged, [4, 7]):
        together = logits(model, batch)
    for row, ids in enumerate((IDS, OTHER)):
        with hooks.patch(model, {site: value[row : row + 1] for site, value in exchanged.items()}, [4, 7]):
            assert torch.allclose(logits(model, ids)[0], together[row], atol=1e-9)


def test_blocks_that_return_tuples(tiny):
    model = tiny("llama")
    sites = hooks.all_sites(model)
    with hooks.capture(model, sites) as plain:
        expected = logits(model)
    with hooks.capture(model, sites, [2, 6]) as source:
        logits(model, OTHER)
    with returning_tuples(model) as old:
        with hooks.capture(old, sites) as seen:
            assert torch.equal(logits(old), expected)
        assert all(torch.equal(seen[site], plain[site]) for site in sites)
        for site in [Site(1, "resid"), Site(1, "attn"), Site(1, "head", 0)]:
            with hooks.patch(old, {site: source[site]}, [2, 6]) as fired:
                got = logits(old)
            assert fired == {site: 1}
            assert not torch.allclose(got, expected)
            seen[site] = got
    for site in [Site(1, "resid"), Site(1, "attn"), Site(1, "head", 0)]:
        with hooks.patch(model, {site: source[site]}, [2, 6]):
            assert torch.equal(logits(model), seen[site])


HELPERS = {
    "capture": lambda model, sites, positions=None: hooks.capture(model, sites, positions),
    "ablate": lambda model, sites, positions=None: hooks.ablate(model, sites, positions),
    "patch": lambda model, sites, positions=None: hooks.patch(
        model, {site: torch.zeros(1, 1, 1) for site in sites}, positions
    ),
}


@pytest.mark.parametrize("helper", list(HELPERS))
def test_hooks_are_removed_on_every_way_out(tiny, helper):
    model, enter = tiny("qwen3"), HELPERS[helper]
    sites, before, plain = hooks.all_sites(model), all_hooks(tiny("qwen3")), logits(tiny("qwen3"))

    with enter(model, sites):
        assert all_hooks(model) != before
    assert all_hooks(model) == before

    with pytest.raises(RuntimeError, match="inside"), enter(model, sites):
        raise RuntimeError("inside")
    assert all_hooks(model) == before

    with pytest.raises(IndexError), enter(model, sites, [99]):  # an error inside the forward pass
        logits(model)
    assert all_hooks(model) == before

    with pytest.raises(ValueError, match="layer 9 is not in"), enter(model, [*sites, Site(9, "mlp")]):
        pass  # an error after some hooks were placed
    assert all_hooks(model) == before

    def steps():
        with enter(model, sites):
            yield

    generator = steps()
    next(generator)
    assert all_hooks(model) != before
    generator.close()
    assert all_hooks(model) == before

    with contextlib.suppress(KeyboardInterrupt), enter(model, sites):
        raise KeyboardInterrupt
    assert all_hooks(model) == before and torch.equal(logits(model), plain)


@pytest.mark.parametrize("helper", list(HELPERS))
@pytest.mark.parametrize(
    "site,message",
    [
        (Site(0, "heads", 0), "component 'heads' is unknown; allowed are resid, attn, mlp, head"),
        (Site(3, "mlp"), "layer 3 is not in .* it has layers 0 to 2"),
        (Site(-1, "mlp"), "layer -1 is not in .* it has layers 0 to 2"),
        (Site(0, "head", 4), "head 4 is not in .* a layer has heads 0 to 3"),
        (Site(0, "head"), "head -1 is not in .* a layer has heads 0 to 3"),
    ],
)
def test_an_unknown_site_is_one_clear_error(tiny, helper, site, message):
    with pytest.raises(ValueError, match=message), HELPERS[helper](tiny("llama"), [site]):
        pass


def test_all_sites(tiny):
    model = tiny("llama")
    assert len(hooks.all_sites(model)) == 3 * (3 + 4)
    assert hooks.all_sites(model, ["mlp", "head"], [2]) == [Site(2, "mlp"), *(Site(2, "head", h) for h in range(4))]
    with pytest.raises(ValueError, match="component 'heads' is unknown"):
        hooks.all_sites(model, ["heads"])
    with pytest.raises(ValueError, match="layer 3 is not in"):
        hooks.all_sites(model, layers=[0, 3])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_numbers_as_baukit(tiny, name):
    baukit = pytest.importorskip(
        "baukit", reason="baukit is on no package registry; environment.yml installs it from git for conda users"
    )
    model, positions = tiny(name), [2, 7]
    names = {module: path for path, module in model.model.named_modules()}
    for component in ("resid", "attn", "mlp"):
        sites = [Site(layer, component) for layer in range(model.n_layers)]
        paths = {site: names[hooks.module_of(model, site.layer, component)] for site in sites}
        with hooks.capture(model, sites) as ours:
            logits(model, OTHER)
        with baukit.TraceDict(model.model, list(paths.values())) as theirs:
            logits(model, OTHER)
        for site in sites:
            assert torch.equal(ours[site], hooks.first_tensor(theirs[paths[site]].output))
        for site in sites:
            for value in (ours[site][:, positions], torch.zeros_like(ours[site][:, positions])):
                with hooks.patch(model, {site: value}, positions):
                    got = logits(model)
                edit = writing(paths[site], value, positions)
                with baukit.TraceDict(model.model, list(paths.values()), edit_output=edit):
                    assert torch.equal(logits(model), got)
                assert not torch.equal(logits(model), got)


def writing(path, value, positions):
    """An `edit_output` of baukit that writes the value at one module and leaves the others."""

    def edit(output, layer):
        if layer == path:
            hooks.first_tensor(output)[:, positions] = value
        return output

    return edit
