"""The sweep against full forward passes, one intervention at a time, and the proofs that rows carry."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from lib import batches, hooks, models, records, single_pass, sweep
from lib.hooks import Site
from lib.tasks import Pair, Prompt
from pipeline.units import sweep_units

ROLES = {"name_a": (3, 4), "name_b": (6,), "names": (3, 4, 6), "swapped": (4, 6), "between": (7, 8), "last": (9,)}
ROLES |= {"rest": (0, 1, 2, 5), "all": tuple(range(10))}
FP32_TOLERANCE = 1e-4  # x max(1, the row's largest logit change)
FP64_TOLERANCE = 1e-9
# fp32 on random models of every architecture as well: the tolerance is the issue's


def pair_of(index: int, vocab: int = 101, half: str = "discovery") -> Pair:
    """A pair of random ten-token prompts that differ at the tokens of `names`; quads of two pairs."""
    rng = np.random.default_rng(1000 + index)
    clean = np.concatenate([[1, 2, 3], rng.integers(10, vocab, 7)])
    corrupt = clean.copy()
    corrupt[[3, 4, 6]] = rng.integers(10, vocab, 3)
    prompts = [Prompt("", tuple(int(i) for i in ids), ROLES) for ids in (clean, corrupt)]
    tokens, words = (20, 30, 40, 50), ("w", "x", "y", "z")
    answer, other = index % 4, (index + 1 + index // 4 % 2) % 4
    return Pair(
        f"p{index}", f"q{index // 2}", half, "superset", "t", prompts[0], prompts[1], words, answer, other,
        tokens, tokens, (), (), ("l", "m"), (60, 70),
    )  # fmt: skip


PAIRS = [pair_of(index) for index in range(8)]


@functools.cache
def captured(model, ids):
    """Every activation of one plain run."""
    parts = hooks.EVERY_COMPONENT if model.down_projs else hooks.COMPONENTS
    with hooks.capture(model, hooks.all_sites(model, parts)) as seen:
        model.model(torch.tensor([ids]))
    return seen


@functools.cache
def plain(model, ids):
    """Next-token logits of one plain run."""
    return model.model(torch.tensor([ids])).logits[0, -1]


def source_by_hand(model, pair, ablation, seed, site, role):
    """The replacement of one site, from plain captures alone."""

    def kept(prompt):
        return captured(model, prompt.ids)[site][:, list(prompt.roles[role])]

    if ablation == "zero":
        return torch.zeros(1)
    if ablation in ("counterfactual", "clean"):
        return kept(pair.corrupt if ablation == "counterfactual" else pair.clean)
    others = {}
    for lender in PAIRS:
        for prompt, answer in ((lender.clean, lender.answer), (lender.corrupt, lender.corrupt_answer)):
            if lender.quad_id != pair.quad_id:
                others.setdefault(prompt.ids, (lender.candidates[answer], prompt))
    if ablation == "mean":
        supersets = sorted({superset for superset, _ in others.values()})
        means = [torch.cat([kept(p) for s, p in others.values() if s == superset]).mean(0) for superset in supersets]
        return torch.stack(means).mean(0, keepdim=True)
    assert ablation == "resample"
    pool = batches.pooled(model, {}, PAIRS, pair, role, [[site]])
    chosen = int(np.flatnonzero(pool.weights(pair, "resample", seed))[0])
    ids = list(dict.fromkeys(i for lender in PAIRS for i in (lender.clean.ids, lender.corrupt.ids)))[chosen]
    own = {pair.candidates[pair.answer], pair.candidates[pair.corrupt_answer]}
    assert pool.quad[chosen] != pair.quad_id and pool.superset[chosen] not in own
    return kept(Prompt("", ids, ROLES))


def one_by_one(model, pair, direction, ablation, seed, site, role):
    """Logits of the base prompt with one site replaced: a full forward pass through the helper of `lib.hooks`."""
    value = source_by_hand(model, pair, ablation, seed, site, role)
    base = pair.clean if direction == "noise" else pair.corrupt
    with hooks.patch(model, {site: value}, base.roles[role]) as fired:
        logits = model.model(torch.tensor([base.ids])).logits[0, -1]
    assert fired == {site: 1}
    return logits


def check_row(model, row, pairs, tolerance):
    """One row of the sweep against the full forward pass: candidates, labels, top token, logsumexp, rank and KL."""
    pair = pairs[row.pair_id]
    site = Site(row.layer, row.component, row.head)
    logits = one_by_one(model, pair, row.direction, row.ablation, row.seed, site, row.position).double()
    before = plain(model, (pair.clean if row.direction == "noise" else pair.corrupt).ids).double()
    allowed = tolerance * max(1.0, (logits - before).abs().max().item())
    tokens = list(pair.clean_tokens)
    candidates = logits[tokens].numpy()
    # the list columns are stored in fp32
    stored = max(allowed, 1e-6 * np.abs(candidates).max())
    assert np.abs(np.array(row.logits_after) - candidates).max() <= stored
    assert np.abs(np.array(row.label_logits_after) - logits[list(pair.label_tokens)].numpy()).max() <= stored
    answer, rest = pair.answer, [i for i in range(4) if i != pair.answer]
    assert row.metric_after == pytest.approx(candidates[answer] - candidates[rest].max(), abs=2 * allowed)
    assert row.logit_diff_after == pytest.approx(candidates[answer] - candidates[pair.corrupt_answer], abs=2 * allowed)
    assert row.logsumexp_after == pytest.approx(logits.logsumexp(0).item(), abs=allowed)
    kl = torch.nn.functional.kl_div(logits.log_softmax(0), before.softmax(0), reduction="sum").item()
    assert row.kl_after == pytest.approx(kl, abs=10 * allowed)
    return (logits - before).abs().max().item()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("dtype,tolerance", [("float64", FP64_TOLERANCE), ("float32", FP32_TOLERANCE)])
@pytest.mark.parametrize("role", list(ROLES))
def test_every_component_ablation_and_direction_equals_one_by_one(tiny, name, dtype, tolerance, role):
    model = tiny(name, dtype)
    pairs = {pair.pair_id: pair for pair in PAIRS}
    frames = [
        sweep.run(model, PAIRS[:2], direction="noise", role=role, ablations=sweep.ABLATIONS, pool=PAIRS, seed=3),
        sweep.run(model, PAIRS[:2], direction="denoise", role=role, seed=3),
    ]
    sites = model.n_layers * (3 + model.n_heads)
    assert [len(frame) for frame in frames] == [2 * 4 * sites, 2 * sites]
    largest = [
        check_row(model, row, pairs, tolerance)
        for frame in frames
        for row in frame.sample(40, random_state=1).itertuples()
    ]
    assert max(largest) > 0.1, "the interventions hardly move the logits: this test could not see an error"


def test_smollm_equals_one_by_one(smollm, two_pairs):
    pairs = {pair.pair_id: pair for pair in two_pairs}
    frames = [
        sweep.run(smollm, two_pairs, direction=way, role=role, ablations=("zero", "counterfactual"), layers=[0, 21, 29])
        for way, role in itertools.product(("noise", "denoise"), ("last", "name_a", "names"))
    ]
    for frame in frames:
        for component, rows in frame.groupby("component"):
            for row in rows.sample(3, random_state=0).itertuples():
                pair, site = pairs[row.pair_id], Site(row.layer, component, row.head)
                logits = one_by_one(smollm, pair, row.direction, row.ablation, 0, site, row.position)
                base = pair.clean if row.direction == "noise" else pair.corrupt
                before = plain(smollm, base.ids)
                allowed = FP32_TOLERANCE * max(1.0, (logits - before).abs().max().item())
                assert np.abs(np.array(row.logits_after) - logits[list(pair.clean_tokens)].numpy()).max() <= allowed


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("role", ["last", "names"])
def test_neurons_equal_one_by_one(tiny, name, role):
    model, pairs = tiny(name, "float64"), {pair.pair_id: pair for pair in PAIRS}
    how = {"role": role, "components": ["neuron"], "layers": [0, 1], "seed": 3}
    frames = [
        sweep.run(model, PAIRS[:2], direction="noise", ablations=sweep.ABLATIONS, pool=PAIRS, **how),
        sweep.run(model, PAIRS[:2], direction="denoise", **how),
    ]
    assert [len(frame) for frame in frames] == [2 * 4 * 2 * model.n_neurons, 2 * 2 * model.n_neurons]
    largest = [
        check_row(model, row, pairs, FP64_TOLERANCE)
        for frame in frames
        for row in frame.sample(20, random_state=1).itertuples()
    ]
    assert max(largest) > 1e-3, "no neuron moves the logits: this test could not see an error"


def test_all_neurons_of_a_layer_of_smollm_equal_one_by_one(smollm, two_pairs):
    pair = two_pairs[0]
    frame = sweep.run(smollm, [pair], direction="noise", role="last", components=["neuron"], layers=[23])
    assert len(frame) == smollm.n_neurons == 1536
    change = (frame.logit_diff_after - frame.logit_diff_before).abs()
    chosen = [*change.nlargest(10).index, *frame.sample(20, random_state=0).index]
    for row in frame.loc[chosen].itertuples():
        logits = one_by_one(smollm, pair, "noise", "counterfactual", 0, Site(23, "neuron", row.head), "last")
        effect = (logits - plain(smollm, pair.clean.ids)).abs().max().item()
        off = np.abs(np.array(row.logits_after) - logits[list(pair.clean_tokens)].numpy()).max()
        assert off <= FP32_TOLERANCE * max(1.0, effect)
    assert change.max() > 0.01


def test_values_of_ones_own_are_put_in(tiny):
    """A variant that shrinks a module's output, in noise and denoise, against a full forward pass."""
    model, pair = tiny("llama", "float64"), PAIRS[0]
    sites = [(Site(1, "mlp"),), (Site(0, "attn"), Site(1, "mlp"))]

    def variants(pairs, base, other):
        halves = {key: value / 2 for key, value in base.activations.items()}
        return {"half": halves, "other": other.activations}

    for direction, prompt in (("noise", pair.clean), ("denoise", pair.corrupt)):
        own = sweep.run_variants(model, [pair], sites, ["half", "other"], variants, direction=direction)
        frame = records.conform(own, records.VARIANT_SCHEMA).set_index(["variant", "site_set"])
        kept = captured(model, prompt.ids)
        for at, chosen in enumerate(sites):
            values = {site: kept[site][:, [9]] / 2 for site in chosen}
            with hooks.patch(model, values, prompt.roles["last"]):
                logits = model.model(torch.tensor([prompt.ids])).logits[0, -1]
            got = np.array(frame.loc[("half", at), "logits_after"])
            assert np.abs(got - logits[list(pair.clean_tokens)].numpy()).max() < 1e-6
        usual = sweep.run(model, [pair], direction=direction, site_sets=sites)
        assert np.allclose(frame.loc["other", "metric_after"], usual.metric_after, atol=1e-9)


def test_sets_of_sites_are_replaced_together(tiny):
    model, pair = tiny("llama"), PAIRS[0]
    sites = (Site(0, "head", 1), Site(0, "head", 3), Site(1, "mlp"), Site(2, "attn"))
    frame = sweep.run(model, [pair], direction="denoise", role="names", site_sets=[sites, sites[:1]])
    with hooks.capture(model, sites, pair.clean.roles["names"]) as seen:
        model.model(torch.tensor([pair.clean.ids]))
    with hooks.patch(model, dict(seen), pair.corrupt.roles["names"]):
        logits = model.model(torch.tensor([pair.corrupt.ids])).logits[0, -1]
    assert np.abs(np.array(frame.logits_after[0]) - logits[list(pair.clean_tokens)].numpy()).max() < 1e-6
    assert frame.fired.tolist() == [1, 1] and frame.site_set.tolist() == [0, 1]
    assert frame.site_delta[0] > frame.site_delta[1] > 0


def test_packing_changes_nothing_beyond_the_noise(tiny):
    model = tiny("gemma3")
    whole = sweep.run(model, PAIRS, direction="noise", role="names")
    apart = sweep.run(model, PAIRS, direction="noise", role="names", memory=1e-5)
    single = sweep.run(model, PAIRS[5:6], direction="noise", role="names")
    assert np.abs(whole.metric_after - apart.metric_after).max() < 1e-9
    own = whole[whole.pair_id == "p5"].reset_index(drop=True)
    assert np.abs(own.metric_after - single.metric_after).max() < 1e-9


def test_pairs_share_a_pass_up_to_so_many_row_tokens():
    """4,096: 101 rows of a pair, from its first name's token on, are 707."""
    assert [len(pack) for pack in sweep.packs(PAIRS, 100, "names")] == [5, 3]
    assert [len(pack) for pack in sweep.packs(PAIRS, 1000, "last")] == [4, 4]
    assert [len(pack) for pack in sweep.packs(PAIRS[:2], 10_000, "all")] == [1, 1]


def test_running_out_of_memory_halves_the_pass_and_says_so(tiny, monkeypatch, caplog):
    model, calls, real = tiny("llama"), [], single_pass.grow

    def short(model, base, rows, sources):
        calls.append(len(rows))
        if len(rows) > 10:
            raise torch.OutOfMemoryError("simulated: no memory for more than ten rows")
        return real(model, base, rows, sources)

    expected = sweep.run(model, PAIRS[:1], direction="denoise")
    monkeypatch.setattr(sweep, "grow", short)
    frame = sweep.run(model, PAIRS[:1], direction="denoise")
    halved = frame.attrs["log"]
    assert len(frame) == 21 and calls[0] == 21
    assert np.abs(frame.metric_after - expected.metric_after).max() < 1e-9
    assert calls == [21, 10, 11, 5, 6] and len(halved) == 2 and "halved and retried" in caplog.text


def test_work_that_finds_no_memory_is_halved_as_often_as_it_takes():
    def attempt(work):
        if len(work) > 3:
            raise torch.OutOfMemoryError("simulated")
        return sum(work)

    def smaller(work):
        return ("halves", [work[: len(work) // 2], work[len(work) // 2 :]]) if len(work) > 1 else None

    lines = []
    assert batches.with_less_memory(attempt, list(range(8)), smaller, lines) == [1, 5, 9, 13] and len(lines) == 3
    with pytest.raises(torch.OutOfMemoryError):
        batches.with_less_memory(attempt, list(range(8)), lambda work: None, lines)
    with pytest.raises(RuntimeError, match="another"):
        batches.with_less_memory(lambda work: exec('raise RuntimeError("another")'), [1], smaller, lines)


def test_a_hook_that_never_takes_effect_is_found(tiny, monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(single_pass.Edit, "write", lambda self, activation: None)
    with pytest.raises(single_pass.SweepError, match=r"pair p0, noise zero at last, layer \d .*did not take effect"):
        sweep.run(model, PAIRS[:1], direction="noise", ablations=("zero",))


def test_an_edit_of_the_wrong_row_is_found(tiny, monkeypatch):
    model, real = tiny("llama"), single_pass.Edit.where

    def first_row_only(self, activation):
        view, index = real(self, activation)
        return view, (torch.zeros_like(index[0]), *index[1:])

    monkeypatch.setattr(single_pass.Edit, "write", lambda self, x: x.__setitem__((0,), x[0] + 1.0))
    with pytest.raises(single_pass.SweepError):
        sweep.run(model, PAIRS[:1], direction="noise")


def test_identity_and_whole_residual(tiny):
    for name in ("llama", "qwen3", "gemma3", "gpt2"):
        model = tiny(name)
        clean, corrupt = (torch.tensor(p.ids) for p in (PAIRS[0].clean, PAIRS[0].corrupt))
        assert models.prove_identity(model, single_pass.base_run(model, clean[None], [3, 9])) < 1e-9
        assert models.prove_whole_residual(model, corrupt, clean) < 1e-9


def test_resamples_and_means_leave_the_own_quad_out_and_balance_supersets(tiny):
    model = tiny("llama")
    pool = batches.pooled(model, {}, PAIRS, PAIRS[0], "last", [[Site(0, "mlp")]])
    mean = pool.weights(PAIRS[0], "mean", 0)
    assert mean.sum() == pytest.approx(1) and mean[pool.quad == "q0"].sum() == 0
    free = pool.quad != "q0"
    shares = [mean[pool.superset == superset].sum() for superset in np.unique(pool.superset[free])]
    assert shares == pytest.approx([1 / len(shares)] * len(shares))
    chosen = {int(pool.weights(PAIRS[0], "resample", seed).argmax()) for seed in range(50)}
    assert len(chosen) > 4 and not any(pool.quad[i] == "q0" for i in chosen)


def of_classes(*pairs: tuple[int, int]) -> list[Pair]:
    """A pair for each, of a quad of its own, with these answers."""
    made = [pair_of(2 * number) for number in range(len(pairs))]
    return [replace(own, answer=a, corrupt_answer=c) for own, (a, c) in zip(made, pairs, strict=True)]


def test_a_mean_has_both_of_the_pairs_classes_or_neither():
    classes = ["w", "x", "y", "z"]
    for others, counted in (
        ([(0, 1), (2, 3)], ["w", "x", "y", "z"]),
        ([(0, 2), (2, 3)], ["y", "z"]),  # x, the pair's other class, is not there
        ([(2, 3)], ["y", "z"]),
        ([(0, 1)], ["w", "x"]),
    ):
        pairs = of_classes((0, 1), *others)
        pool = batches.Pool.of(pairs, pairs[0])
        weights = pool.weights(pairs[0], "mean", 0)
        shares = [weights[pool.superset == name].sum() for name in classes]
        assert shares == pytest.approx([(name in counted) / len(counted) for name in classes])


def test_with_two_classes_only_nothing_can_be_resampled(tiny):
    pairs = of_classes((0, 1), (1, 0), (0, 1))
    with pytest.raises(ValueError, match="pair p0: no other quad .* of another class than w and x; use ablations zero"):
        sweep.run(tiny("llama"), pairs, ablations=["resample"])
    assert batches.with_donors(pairs, pairs, "resample") == [] and batches.with_donors(pairs, pairs, "mean") == pairs


def test_what_some_pairs_cannot_be_given_is_left_out_for_them_alone():
    first, second, other = of_classes((0, 1), (0, 2), (0, 1))
    pairs = [first, replace(second, quad_id=first.quad_id), other]  # the first one's quad alone offers a third class
    units = sweep_units("x", pairs, ablations=["zero", "resample"])
    assert [[pair.pair_id for pair in unit.pairs] for unit in units] == [["p0"], ["p2", "p4"]]
    assert [unit.options["ablations"] for unit in units] == [["zero"], ["zero", "resample"]]
    (unit,) = sweep_units("x", [first], pairs + of_classes((2, 3), (2, 3), (2, 3), (2, 3))[3:], ablations=["resample"])
    assert unit.pairs == (first,), "the pool gives what the pairs swept do not"


def test_noise_in_a_pair_is_denoise_in_its_mirror(tiny):
    """With counterfactual values: the same run, read from the other side."""
    model, own = tiny("llama"), PAIRS[0]
    turned = {"clean": own.corrupt, "corrupt": own.clean, "answer": own.corrupt_answer, "corrupt_answer": own.answer}
    noise = sweep.run(model, [own], direction="noise")
    denoise = sweep.run(model, [replace(own, **turned)], direction="denoise")
    fall = noise["logit_diff_before"] - noise["logit_diff_after"]
    rise = denoise["logit_diff_after"] - denoise["logit_diff_before"]
    assert fall.abs().max() > 0.1 and np.abs(fall - rise).max() < FP64_TOLERANCE


def test_the_stream_at_all_roles_is_the_whole_gap(tiny):
    """After any one layer: the names, the tokens between, the last one and the rest are everything there is."""
    frame = sweep.run(tiny("llama"), PAIRS[:2], direction="denoise", role="all", components=["resid"])
    assert np.abs(frame["logit_diff_after"] - frame["logit_diff_clean"]).max() < FP64_TOLERANCE


def test_nan_logits_name_the_row(tiny, monkeypatch):
    model = tiny("llama")
    real = single_pass.grow

    def broken(*args):
        grown = real(*args)
        grown.hidden[4] = float("nan")
        return grown

    monkeypatch.setattr(sweep, "grow", broken)
    with pytest.raises(ValueError, match="pair p0, noise zero at last, layer 0 .*NaN or infinite"):
        sweep.run(model, PAIRS[:1], direction="noise", ablations=("zero",))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"components": ["heads"]}, "component 'heads' is unknown; allowed are resid, attn, mlp, head"),
        ({"layers": [3]}, "layer 3 is not in .* layers 0 to 2"),
        ({"role": "name_c"}, "role 'name_c' is not in template 't', pair p0; it has name_a"),
        ({"direction": "up"}, "direction 'up' is unknown"),
        ({"ablations": ["knockout"]}, "ablation 'knockout' is unknown; allowed are zero, mean"),
        ({"ablations": []}, "no ablations"),
        ({"site_sets": [[]]}, "an empty set of sites"),
        ({"ablations": ["mean"], "pool": PAIRS[:2]}, "pair p0: no other quad .* to take a mean from"),
    ],
)
def test_bad_input_is_one_clear_error(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        sweep.run(tiny("llama"), PAIRS[:1], **options)


def test_no_pairs_is_an_error(tiny):
    with pytest.raises(ValueError, match="no pairs to sweep"):
        sweep.run(tiny("llama"), [])


def test_pairs_that_rows_could_not_tell_apart_are_an_error(tiny):
    elsewhere = replace(PAIRS[0], template="u")
    assert len(sweep.run(tiny("llama"), [PAIRS[0], elsewhere], components=["mlp"], layers=[0])) == 2
    twice = [PAIRS[0], PAIRS[1], replace(PAIRS[2], pair_id="p0")]
    with pytest.raises(ValueError, match="2 pairs are called 'p0' in template 't'"):
        sweep.run(tiny("llama"), twice)


def test_units_are_a_pure_function_of_the_pairs():
    first, again = (sweep_units("noise", PAIRS, size=3, role="last") for _ in range(2))
    assert [unit.id for unit in first] == [unit.id for unit in again]
    assert [pair.pair_id for unit in first for pair in unit.pairs] == [pair.pair_id for pair in PAIRS]
    assert [len(unit.pairs) for unit in first] == [3, 3, 2]
    assert len({unit.id for unit in first}) == 3
