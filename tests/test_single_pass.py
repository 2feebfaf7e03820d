"""The growing pass by itself: order of rows, prefixes, several prompts, sliding windows, and its proofs."""

import contextlib

import numpy as np
import pytest
import torch
from conftest import CONFIGS
from torch.utils._python_dispatch import TorchDispatchMode

from lib import hooks, models, paths, single_pass
from lib.hooks import Site
from lib.single_pass import Row, SweepError

TOLERANCE = 1e-9  # float64
POSITIONS = {"whole prompt": range(12), "from the first token": [0, 9], "middle": [4, 8, 10], "last": [11]}


def prompts(count, length=12, seed=0):
    """Random prompts of one length."""
    return torch.tensor(np.random.default_rng(seed).integers(1, 101, (count, length)))


def plain(model, ids):
    """Logits at the last token of a plain run of one prompt."""
    return model.model(ids[None]).logits[0, -1]


def one_by_one(model, ids, source, sites, positions):
    """Logits of a prompt with the sites taken from a plain run of the source, by the helpers of `lib.hooks`."""
    with hooks.capture(model, sites, positions) as seen:
        model.model(source[None])
    with hooks.patch(model, dict(seen), positions):
        return plain(model, ids)


def rows_for(model, owners, sources, count=40, seed=0):
    """A row per owner of random sites, in random order; some rows replace several sites."""
    draw = np.random.default_rng(seed)
    sites = hooks.all_sites(model)
    rows = []
    for _ in range(count):
        chosen = draw.choice(len(sites), size=draw.integers(1, 4), replace=False)
        picked = [sites[i] for i in chosen]
        # a residual replaces whatever was replaced before it in the same layer and earlier ones: keep it alone
        picked = picked[:1] if any(site.component in ("resid", "attn") for site in picked) else picked
        rows.append(Row(tuple(picked), int(draw.integers(owners)), int(draw.integers(sources))))
    return rows


@pytest.mark.parametrize("positions", list(POSITIONS))
@pytest.mark.parametrize("name", list(CONFIGS))
def test_rows_in_any_order_with_any_owner_and_source_equal_one_by_one(tiny, name, positions):
    model, where = tiny(name), list(POSITIONS[positions])
    ids, sources = prompts(3), prompts(4, seed=1)
    base, source = (single_pass.base_run(model, tokens, where) for tokens in (ids, sources))
    rows = rows_for(model, 3, 4)
    assert [min(site.layer for site in row.sites) for row in rows] != sorted(row.sites[0].layer for row in rows)
    grown = single_pass.grow(model, base, rows, source.activations)
    got = model.logits(grown.hidden)
    assert (grown.fired == 1).all() and torch.allclose(grown.site_delta, grown.expected, rtol=1e-9)
    moved = []
    for row, logits in zip(rows, got, strict=True):
        wanted = one_by_one(model, ids[row.owner], sources[row.source], row.sites, where)
        assert (logits - wanted).abs().max() < TOLERANCE, row
        moved.append((wanted - plain(model, ids[row.owner])).abs().max().item())
    assert np.mean(np.array(moved) > 0.01) > 0.5
    # the same rows in another order, and each prompt by itself
    shuffled = np.random.default_rng(5).permutation(len(rows))
    again = single_pass.grow(model, base, [rows[i] for i in shuffled], source.activations)
    assert (again.hidden - grown.hidden[shuffled]).abs().max() < TOLERANCE
    assert torch.allclose(again.site_delta, grown.site_delta[shuffled], atol=TOLERANCE)
    for owner in range(3):
        mine = [index for index, row in enumerate(rows) if row.owner == owner]
        alone = single_pass.base_run(model, ids[owner : owner + 1], where)
        single = single_pass.grow(model, alone, [rows[i]._replace(owner=0) for i in mine], source.activations)
        assert (single.hidden - grown.hidden[mine]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("positions", list(POSITIONS))
def test_base_rows_equal_the_plain_run(tiny, name, positions):
    model, ids = tiny(name), prompts(3)
    base = single_pass.base_run(model, ids, list(POSITIONS[positions]))
    grown = single_pass.grow(model, base, [Row((Site(1, "mlp"),), 1, 0)], base.activations)
    wanted = torch.stack([plain(model, tokens) for tokens in ids])
    assert (model.logits(base.hidden) - wanted).abs().max() < TOLERANCE
    assert (model.logits(grown.base) - wanted).abs().max() < TOLERANCE
    assert single_pass.prove_base_rows(model, base, grown) < TOLERANCE


def test_a_pass_without_rows_is_the_plain_run(tiny):
    model, ids = tiny("llama"), prompts(2)
    base = single_pass.base_run(model, ids, [6])
    grown = single_pass.grow(model, base, [], base.activations)
    assert len(grown.hidden) == len(grown.fired) == 0
    assert (grown.base - base.hidden).abs().max() < TOLERANCE


def test_kept_activations_are_those_of_the_helpers(tiny):
    model, ids = tiny("qwen3"), prompts(2)
    base = single_pass.base_run(model, ids, [2, 9])
    with hooks.capture(model, hooks.all_sites(model, ("resid", "attn", "mlp")), [2, 9]) as seen:
        model.model(ids)
    assert all((base.activations[s.component, s.layer] - value).abs().max() < TOLERANCE for s, value in seen.items())
    assert base.activations["head", 0].shape == (2, 2, model.n_heads * model.head_size)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("where", [[1, 28], [3, 27], [26, 28], [29]])
def test_windows_shorter_than_the_prompt(tiny, name, where):
    model, ids, sources = tiny(name), prompts(2, 30), prompts(2, 30, seed=2)
    assert CONFIGS[name]["sliding_window"] < 30 - 1
    base, source = (single_pass.base_run(model, tokens, where) for tokens in (ids, sources))
    rows = [Row((site,), owner, owner) for owner in range(2) for site in hooks.all_sites(model)]
    grown = single_pass.grow(model, base, rows, source.activations)
    moved = []
    for row, logits in list(zip(rows, model.logits(grown.hidden), strict=True))[::3]:
        wanted = one_by_one(model, ids[row.owner], sources[row.source], row.sites, where)
        assert (logits - wanted).abs().max() < TOLERANCE, row
        moved.append((wanted - plain(model, ids[row.owner])).abs().max().item())
    assert np.mean(np.array(moved) > 0.01) > 0.4


def test_the_window_hides_the_start_of_a_long_prompt(tiny):
    ids = prompts(1, 30)[0]
    far = ids.clone()
    far[0] = ids[0] % 100 + 1
    # every layer of Mistral slides here: three layers with a window of four cannot see 29 tokens back
    assert torch.equal(plain(tiny("mistral"), far), plain(tiny("mistral"), ids))
    assert not torch.equal(plain(tiny("llama"), far), plain(tiny("llama"), ids))
    for site in hooks.all_sites(tiny("mistral"), ("resid", "mlp")):
        base, source = (single_pass.base_run(tiny("mistral"), tokens[None], [0]) for tokens in (ids, far))
        grown = single_pass.grow(tiny("mistral"), base, [Row((site,), 0, 0)], source.activations)
        assert (grown.hidden - base.hidden).abs().max() < TOLERANCE and grown.fired.tolist() == [1]


def test_identity_and_whole_residual_on_long_prompts_with_windows(tiny):
    for name in ("mistral", "gemma2", "gemma3"):
        ids = prompts(2, 30)
        assert models.prove_identity(tiny(name), single_pass.base_run(tiny(name), ids, [3, 20])) < TOLERANCE
        assert models.prove_whole_residual(tiny(name), *ids) < TOLERANCE


# --- proofs ----------------------------------------------------------------------------------------------------------


def test_an_edit_at_a_wrong_position_fails_the_identity(tiny, monkeypatch):
    model, real = tiny("llama"), single_pass.Edit.where

    def beside(self, activation):
        view, index = real(self, activation)
        return view, (index[0], index[1] + 1, *index[2:])

    base = single_pass.base_run(model, prompts(1), [4, 6])
    models.prove_identity(model, base)
    monkeypatch.setattr(single_pass.Edit, "where", beside)
    with pytest.raises(
        SweepError, match=r"identity patch at Site\(layer=\d, component='\w+', head=-?\d\) moved a logit"
    ):
        models.prove_identity(model, base)


def test_an_edit_of_a_wrong_head_fails_the_identity(tiny, monkeypatch):
    model, real = tiny("llama"), single_pass.Edit.write

    def shifted(self, activation):
        self.head = (self.head + 1) % 4 if self.size else self.head
        real(self, activation)

    base = single_pass.base_run(model, prompts(1), [4, 6])
    monkeypatch.setattr(single_pass.Edit, "write", shifted)
    with pytest.raises(SweepError, match="identity patch at .*component='head'"):
        models.prove_identity(model, base)


def test_a_residual_that_is_only_partly_replaced_fails_the_whole_residual(tiny, monkeypatch):
    model, real = tiny("llama"), single_pass.Edit.write

    def partly(self, activation):
        if self.size is None:
            self.values[:, -1] = activation[self.rows, -1]
        real(self, activation)

    ids = prompts(2)
    monkeypatch.setattr(single_pass.Edit, "write", partly)
    with pytest.raises(SweepError, match="whole residual of one run in another does not give its logits"):
        models.prove_whole_residual(model, *ids)


def test_a_base_row_that_is_off_is_named(tiny):
    model, ids = tiny("llama"), prompts(3)
    base = single_pass.base_run(model, ids, [5])
    grown = single_pass.grow(model, base, [], base.activations)
    for value in (1.0, float("nan")):
        off = grown.base.clone()
        off[1] += value
        broken = single_pass.Grown(off, grown.hidden, grown.fired, grown.site_delta, grown.expected)
        with pytest.raises(
            SweepError, match="pair 1 .the prompt.: the base row .* differs from the plain forward pass"
        ):
            single_pass.prove_base_rows(model, base, broken, lambda index: f"pair {index} (the prompt)")


@pytest.mark.parametrize("what,change", [("fired", 1), ("fired", -1), ("site_delta", 0.5)])
def test_a_row_that_does_not_prove_itself_is_named(tiny, what, change):
    model, ids = tiny("llama"), prompts(2)
    base, source = single_pass.base_run(model, ids, [5]), single_pass.base_run(model, prompts(2, seed=1), [5])
    rows = [Row((site,), 0, 0) for site in hooks.all_sites(model)]
    grown = single_pass.grow(model, base, rows, source.activations)
    single_pass.prove_rows(model, grown, str)
    getattr(grown, what)[7] += change
    with pytest.raises(SweepError, match="row 7: the hook fired .* The edit did not take effect"):
        single_pass.prove_rows(model, grown, lambda index: f"row {index}")


def test_hooks_are_removed_when_a_pass_fails(tiny, monkeypatch):
    model = tiny("llama")
    base = single_pass.base_run(model, prompts(1), [5])
    before = [(*m._forward_hooks, *m._forward_pre_hooks) for m in model.model.modules()]

    def fail(self, activation):
        raise torch.OutOfMemoryError("simulated")

    monkeypatch.setattr(single_pass.Edit, "write", fail)
    with pytest.raises(torch.OutOfMemoryError):
        single_pass.grow(model, base, [Row((Site(1, "mlp"),), 0, 0)], base.activations)
    with pytest.raises(IndexError):
        single_pass.base_run(model, prompts(1), [99])
    assert [(*m._forward_hooks, *m._forward_pre_hooks) for m in model.model.modules()] == before


class Waits(TorchDispatchMode):
    """Notes what makes a host wait for its device: numbers read, sizes that depend on values."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, index = func.overloadpacket.__name__, args[1] if len(args) > 1 else ()
        masked = name.startswith("index") and any(
            getattr(one, "dtype", None) == torch.bool for one in (index if isinstance(index, list | tuple) else [index])
        )
        if masked or name in ("_local_scalar_dense", "nonzero", "equal", "_unique2", "masked_select"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def waits_between_blocks(model):
    """What waits from the first block of each pass to its final norm."""
    waits = Waits()
    begin = model.blocks[0].register_forward_pre_hook(lambda *_: waits.__enter__() and None)
    end = model.final_norm.register_forward_pre_hook(lambda *_: waits.__exit__(None, None, None))
    with hooks.removing([begin, end]):
        yield waits.seen


def test_no_layer_of_a_pass_waits_for_the_device(tiny):
    model, where = tiny("llama"), [2, 9, 11]
    with waits_between_blocks(model) as seen:
        handle = model.blocks[1].register_forward_hook(lambda _, __, out: out * float(out.max()) * 0)
        with hooks.removing([handle]):
            model.model(prompts(1))
    assert seen == ["_local_scalar_dense"]  # it is seen if it happens
    with waits_between_blocks(model) as seen:
        runs = single_pass.base_run(model, prompts(4), where)
        base, source = runs.part(0, 2), runs.part(2, 4)
        single_pass.grow(model, base, rows_for(model, 2, 2), source.activations)
    assert seen == []
    receivers = [paths.Receiver(2, kind, head) for kind, head in (("q", 1), ("k", 0), ("v", 1), ("mlp", -1))]
    route = paths.Route(receivers, {"last": (11,)}, "recomputed")
    rows = [Row((site,), site.layer, 1) for site in hooks.all_sites(model, ("head", "mlp"), [0, 1])]
    with waits_between_blocks(model) as seen:
        paths.grow_paths(model, base, rows, source.activations, route)
    assert len(seen) <= 1  # the proof of the base rows, behind the last block of the first run


@pytest.mark.parametrize("name", list(CONFIGS))
def test_prompts_are_read_in_batches_of_one_length_and_no_further_than_asked(tiny, name):
    model, draw, seen = tiny(name), np.random.default_rng(0), []
    texts = [draw.integers(1, 101, length).tolist() for length in (5, 7, 5, 7, 7)]
    ends = [[0, len(ids) - 1] for ids in texts]
    ends[3] = [2, 6]  # of one length with two others, and read elsewhere
    with hooks.removing([hooks.on_activation(model, 2, "mlp", lambda _: seen.append(1))]):
        runs = list(single_pass.plain_runs(model, texts, ends, ("resid", "head"), size=2, layers=[0, 1]))
        assert not seen
        whole = list(single_pass.plain_runs(model, texts, size=2))
    assert [places for places, _ in runs] == [[0, 2], [1, 4], [3]] and [p for p, _ in whole] == [[0, 2], [1, 3], [4]]
    for places, run in runs:
        assert set(run.activations) == {(part, layer) for part in ("resid", "head") for layer in (0, 1)}
        for row, place in enumerate(places):
            with hooks.capture(model, [Site(1, "resid")], ends[place]) as kept:
                model.model(torch.tensor([texts[place]]))
            assert (run.activations["resid", 1][row] - kept[Site(1, "resid")][0]).abs().max() < TOLERANCE
    for places, run in whole:
        final = model.logits(run.hidden)
        for row, place in enumerate(places):
            assert (final[row] - plain(model, torch.tensor(texts[place]))).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_rerun_behind_the_kept_cache_is_the_plain_run(tiny, name):
    model, ids, owner = tiny(name), prompts(3), torch.tensor([2, 0, 2])
    base = single_pass.base_run(model, ids, [])
    with torch.no_grad():
        assert (single_pass.rerun(model, base, 8, owner) - base.hidden[owner]).abs().max() < TOLERANCE
        other = prompts(1, 4, seed=5)
        changed = single_pass.rerun(model, base, 8, owner[:1], other)
        assert (model.logits(changed)[0] - plain(model, torch.cat([ids[2, :8], other[0]]))).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_few_tokens_have_the_logits_of_the_whole_vocabulary(tiny, name):
    model = tiny(name)
    hidden = torch.stack([single_pass.base_run(model, prompts(4, seed=seed), []).hidden for seed in (0, 1)])
    whole, each = model.logits(hidden), torch.tensor([[1, 5], [7, 3], [100, 2], [0, 9]])
    assert (model.logits(hidden, [7, 3, 90]) - whole[..., [7, 3, 90]]).abs().max() < TOLERANCE
    assert (model.logits(hidden, each) - whole.gather(-1, each.expand(2, 4, 2))).abs().max() < TOLERANCE
