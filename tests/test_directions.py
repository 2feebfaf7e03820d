"""Directions: the changes they make against full forward passes, their parts and norms, and what the report says."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from professions import SUPERSETS

from lib import hooks, records
from lib.hooks import Site
from lib.single_pass import base_run
from pipeline import params
from report import words
from steps.hydra import splits
from steps.registry import PLAN
from steps.subspace import direction_sweeps, directions, directions_page, measure
from tests.test_sweep import PAIRS, captured

WORDS = PAIRS[0].candidates
PARAMS = params.validate(
    PLAN.sections, "subspace", params.load_profile("smoke") | {"random_directions": 2, "dimensions": [1, 2]}
)


def step_of(model, sites=()):
    """A step that computes its tables at once."""

    def table(table, *chosen):
        compute = table.compute(step, *chosen)
        frame = pd.concat([compute(unit) for unit in table.units(step, *chosen)], ignore_index=True)
        return records.conform(frame, table.schema)

    own = PARAMS.model_copy(update={"doses": (-1.0, 0.0, 2.0), "layers": "all", "template": "t"})
    step = SimpleNamespace(
        model=model, params=own, table=table, memory=2.0, prove=lambda _: [], rng=lambda _: np.random.default_rng(3)
    )
    step.slice = lambda: list(sites)
    return step


def vectors_of(width, seed=0):
    rng = np.random.default_rng(seed)
    return {word: rng.standard_normal(width) for word in WORDS}


def after(model, pair, values):
    """Candidate logits of the corrupt run with sites replaced at the last token, by a full forward pass."""
    with hooks.patch(model, values, pair.corrupt.roles["last"]):
        return model.model(torch.tensor([pair.corrupt.ids])).logits[0, -1, list(pair.corrupt_tokens)].numpy()


def means_table(width, layers):
    rows = [("t", layer, word, 9, vector) for layer in layers for word, vector in vectors_of(width, layer).items()]
    return pd.DataFrame(rows, columns=directions.MEANS)


# --- changes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # o_proj as a Linear and as a transposed Conv1D
def test_a_head_keeps_what_it_writes_along_the_directions(tiny, name):
    model = tiny(name)
    basis = torch.linalg.qr(torch.randn(3, 32, 2, dtype=torch.float64, generator=torch.manual_seed(0)))[0]
    site = Site(1, "head", 2)
    pulled = direction_sweeps.pulled(model, site, basis)
    assert torch.allclose(pulled.mT @ pulled, torch.eye(2, dtype=torch.float64), atol=1e-12)
    dz = torch.randn(3, model.head_size, dtype=torch.float64)
    kept = direction_sweeps.along(dz, pulled)

    def written(values):
        z = torch.zeros(3, model.n_heads * model.head_size, dtype=torch.float64)
        z[:, hooks.columns_of(model, site)] = values
        return splits.head_outputs(model, 1, z)[:, 2]

    towards = lambda values: (basis.mT @ written(values)[:, :, None])[:, :, 0]  # noqa: E731
    assert torch.allclose(towards(kept), towards(dz), atol=1e-10)
    assert towards(dz - kept).abs().max() < 1e-10 < 0.01 < (dz - kept).norm()  # and it is the least such change


def test_random_changes_have_the_norm_of_the_class_change_and_parts_add_up():
    rng, delta = np.random.default_rng(1), torch.randn(4, 20, dtype=torch.float64)
    basis = lambda k: np.linalg.qr(rng.standard_normal((20, k)))[0].T  # noqa: E731
    one, within = direction_sweeps.fixed("class|1|", basis(1)), torch.tensor(basis(5).T)
    split = [one._replace(name=f"class|1|{part}", within=within) for part in direction_sweeps.PARTS]
    whole, random = direction_sweeps.Variant("whole|0|", None), direction_sweeps.fixed("random|1|0", basis(3), one.name)
    out = direction_sweeps.changed([one, whole, random, *split], delta, lambda variant: variant.basis(None, 0))
    assert torch.allclose(out["random|1|0"].norm(dim=1), out["class|1|"].norm(dim=1))
    assert torch.allclose(out["class|1|inside"] + out["class|1|outside"], out["class|1|"])
    assert torch.allclose(out["class|1|inside"] @ within @ within.T, out["class|1|inside"])
    assert (out["class|1|outside"] @ within).abs().max() < 1e-12 and torch.equal(out["whole|0|"], delta)
    left = out["class|1|"] - delta
    assert (left @ one.basis(None, 0)[0]).abs().max() < 1e-12  # all of the change along it


def test_changes_arrive_in_the_model(tiny):
    """The scan's rows against full forward passes: one direction after a layer, and at the slice's sites together."""
    model = tiny("llama")
    sites, pair = [Site(1, "mlp"), Site(2, "head", 3)], PAIRS[1]
    step = step_of(model, sites)
    scan = step.table(direction_sweeps.LAYERS, direction_sweeps.by_layer(step, [pair], means_table(32, [1, 2])))
    frame = scan.set_index(["variant", "site_set"])
    clean, corrupt = captured(model, pair.clean.ids), captured(model, pair.corrupt.ids)

    def values(own, everything=False):
        out = {}
        for site in own:
            means = vectors_of(32, site.layer)
            d = torch.tensor(means[WORDS[pair.answer]] - means[WORDS[pair.corrupt_answer]])
            delta = (clean[site] - corrupt[site])[:, [9]]
            if site.component == "head":
                d = model.o_projs[site.layer].weight.T[hooks.columns_of(model, site)] @ d
            d = d / d.norm()
            out[site] = corrupt[site][:, [9]] + (delta if everything else (delta @ d)[..., None] * d)
        return out

    for at, own in enumerate([(Site(1, "resid"),), (Site(2, "resid"),), tuple(sites)]):
        for name, everything in (("class difference|1|", False), ("whole|0|", True)):
            wanted = after(model, pair, values(own, everything))
            assert np.abs(frame.loc[(name, at), "logits_after"] - wanted).max() < 1e-5
        random, one = (frame.loc[(name, at), "site_delta"] for name in ("random|1|0", "class difference|1|"))
        assert random == pytest.approx(one, rel=1e-6) and one < frame.loc[("whole|0|", at), "site_delta"]
    assert set(frame.index.get_level_values(0)) >= {
        "class means|3|",
        "random|1|1",
    }  # four classes span three dimensions


def test_steering_adds_the_dose(tiny):
    model = tiny("llama")
    step = step_of(model)
    pair = replace(PAIRS[0], clean=PAIRS[0].corrupt)  # both sides equal, as steering prompts are
    added = direction_sweeps.steering(step, [pair], 1, means_table(32, [1]))
    frame = step.table(direction_sweeps.STEERING, added).set_index("variant")
    means, site = vectors_of(32, 1), Site(1, "resid")
    resid = captured(model, pair.corrupt.ids)[site][:, [9]]
    for dose in (-1, 0, 2):
        added = dose * (means["x"] - np.mean(list(means.values()), axis=0))
        wanted = after(model, pair, {site: resid + torch.tensor(added)})
        assert np.abs(frame.loc[f"x|{dose}|", "logits_after"] - wanted).max() < 1e-5
    assert frame.loc["random|2|0", "site_delta"] == pytest.approx(frame.loc["w|2|", "site_delta"])


# --- fits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_resumed_run_is_the_patched_run(tiny, name):
    """Blocks up to the layer skipped, over the base run's cache: the same final state as in full, with a gradient."""
    model, pair = tiny(name), PAIRS[0]
    base = base_run(model, torch.tensor([PAIRS[1].corrupt.ids, pair.corrupt.ids]), [9], ("resid",))
    value = torch.randn(1, 32, dtype=torch.float64, requires_grad=True)
    final = directions.resumed(model, base, 1, value, torch.tensor([1]))
    wanted = after(model, pair, {Site(1, "resid"): value.detach()[:, None]})
    assert np.abs(model.logits(final)[0, list(pair.corrupt_tokens)].detach().numpy() - wanted).max() < 1e-9
    final[0, 0].backward()
    assert value.grad.abs().max() > 0
    assert not any("forward" in block.__dict__ for block in model.blocks)  # left as it was


def test_a_rotation_learns_to_bring_the_clean_answer_up(tiny):
    model = tiny("llama", "float32")
    groups = directions.opposed(model, PAIRS, [1])
    learned = directions.rotations(model, groups, 1, [2], 80, 0)[2]
    assert np.allclose(learned @ learned.T, np.eye(2), atol=1e-5)
    assert np.array_equal(learned, directions.rotations(model, groups, 1, [2], 80, 0)[2])  # same seed, same bytes
    step = step_of(model)
    start = directions.rotations(model, groups, 1, [2], 1, 0)[2]
    variants = [direction_sweeps.fixed(name, basis) for name, basis in (("rotation|2|", learned), ("start|2|", start))]
    own = direction_sweeps.patching(step, direction_sweeps.PATCHES, PAIRS, [(Site(1, "resid"),)], variants)
    frame = step.table(direction_sweeps.PATCHES, own)
    gain = frame.groupby("variant")["metric_after"].mean()
    assert gain["rotation|2|"] > gain["start|2|"] + 0.5


def test_subspaces_have_the_dimensions_that_their_rows_span():
    rng = np.random.default_rng(0)
    labels = np.repeat(["artist", "writer", "athlete"], 20)
    centres = {"artist": 3 * np.eye(12)[0], "writer": 3 * np.eye(12)[1], "athlete": np.zeros(12)}
    values = np.stack([centres[name] for name in labels]) + 0.1 * rng.standard_normal((60, 12))
    jobs = [[None, {"artist": "poet", "writer": "dancer", "athlete": "boxer"}[name]] for name in labels]
    found = directions.subspaces(values, labels, jobs, SUPERSETS)
    for method in ("class means", "probe", "profession means"):
        basis = found[method, 0]
        assert basis.shape == (2, 12) and np.allclose(basis @ basis.T, np.eye(2))
        assert np.linalg.norm(basis[:, :2]) == pytest.approx(2**0.5, rel=0.01)  # the plane the classes lie in
    assert len(found["component", 0]) == 2  # hold 95% of the variance
    variance, between = directions.spread_along(values, labels, np.eye(12)[[0, 5]])
    assert variance[0] == pytest.approx(2, rel=0.1) and between[0] > 0.99 and between[1] < 0.2
    with pytest.raises(ValueError, match="two supersets; the fitting half has artist"):
        directions.class_means(values[:20], labels[:20], SUPERSETS)


def test_pairs_of_classes_that_were_not_fitted_are_left_out():
    rows = [("d0", "discovery", "artist", "writer"), ("c0", "confirmation", "writer", "artist")]
    rows.append(("c1", "confirmation", "athlete", "artist"))
    table = pd.DataFrame(rows, columns=["pair_id", "half", "answer", "corrupt_answer"])
    pairs = {"d0": PAIRS[0], "c0": replace(PAIRS[1], half="confirmation"), "c1": PAIRS[2]}
    step = SimpleNamespace(params=PARAMS, prompts=lambda own: [pairs[name] for name in own["pair_id"]])
    fit, own = directions.halves(step, table)
    assert fit["pair_id"].tolist() == ["d0"] and [pair.pair_id for pair in own] == ["p0", "p1"]
    assert [pair.pair_id for pair in directions.reported(own)] == ["p1"]
    fit, own = directions.halves(step, table[table["half"] == "confirmation"])  # a single half: fitted on and reported
    assert len(fit) == 2 and len(own) == 2


# --- the report ---------------------------------------------------------------------------------------------------

RECOVERY = {
    "class difference|1|": 0.8, "class means|1|": 0.3, "class means|2|": 0.9, "random|1|0": 0.1, "random|1|1": 0.2,
    "random|2|0": 0.3, "random|2|1": 0.3, "whole|0|": 1.0, "class difference|1|inside": 0.7, "probe|1|": 0.1,
    "class difference|1|outside": 0.2, "artist against the rest|1|": 0.6, "rotation|1|": 0.5,
}  # fmt: skip


def synthetic(quads, recovery, seed=0, **columns):
    """Records in which each variant recovers its share of the gap, up to noise; two pairs a quad, both halves."""
    rng, rows = np.random.default_rng(seed), []
    for half in ("discovery", "confirmation"):
        for index in range(2 * quads):
            gap = 4 + rng.standard_normal() * 0.5
            for name, share in recovery.items():
                moved = gap * share + 0.2 * rng.standard_normal()
                ids = {"variant": name, "half": half, "quad_id": f"{half}{index // 2}", "pair_id": f"{half}{index}"}
                plain = {"logit_diff_before": -2.0, "logit_diff_corrupt": -2.0, "logit_diff_clean": gap - 2}
                rows.append(ids | plain | {"logit_diff_after": moved - 2, "metric_after": moved - 2})
    fixed = {"direction": "denoise", "template": "t", "metric_corrupt": -2.0, "metric_clean": 2.0, "site_set": 0}
    return pd.DataFrame(rows).assign(**fixed | columns)


def steering(prompts, slope=1.5):
    """Steered prompts whose class's logit rises with the dose."""
    rng, rows = np.random.default_rng(0), []
    for index in range(prompts):
        for name, gain in (("artist", slope), ("writer", 1.0), ("random", 0.0)):
            for dose in (-1, 0, 1):
                logits = np.zeros(3)
                logits[0 if name != "writer" else 1] = gain * dose + 0.01 * rng.standard_normal()
                rows.append({"pair_id": f"s{index}", "variant": f"{name}|{dose}|", "logits_after": logits})
    return pd.DataFrame(rows), {f"s{index}": "mixed" for index in range(prompts)}


def part(quads, **other):
    """The whole part of the page from made-up tables: its findings, and sentences with the headline."""
    patches = synthetic(quads, RECOVERY | other)
    pairs = [replace(PAIRS[0], pair_id=name, candidates=("artist", "writer", "x", "y"), answer=0 if index % 2 else 2)
             for index, name in enumerate(patches["pair_id"].unique())]  # fmt: skip
    scan = pd.concat([synthetic(quads, RECOVERY, site_set=at) for at in (0, 1)], ignore_index=True)
    moved = synthetic(quads, {"t|1|": 0.8, "u|1|": 0.4, "t|2|": 0.8, "u|2|": 0.8, "random|1|0": 0.1, "whole|0|": 1.0})
    frame, kinds = steering(quads)
    known = pd.DataFrame({"method": ["class means", "component", "rotation"], "k": [0, 0, 1], "layer": 21,
                          "variance": 2.0, "between": 0.5, "prompts": 80, "half": "discovery"})  # fmt: skip
    by_layer, nothing = measure.layer_table(scan, [21], PARAMS), pd.DataFrame()
    read, rest = ([21], (), nothing, nothing, nothing), ({}, nothing, nothing, None)
    m = measure.Measured(*read, pairs, by_layer, 21, known, patches, moved, frame, kinds, *rest)
    numbers = directions_page.numbers(m, PARAMS)
    for draw in ("layer", "number", "split", "dose", "transfer"):
        getattr(directions_page, f"{draw}_figure")(numbers)._repr_mimebundle_()
    return directions_page.found(m, numbers), *directions_page.sentences(m, numbers, PARAMS)


def test_the_report_recovers_what_was_put_in():
    found, sentences, headline = part(30)
    own = {name: pd.DataFrame(rows) for name, rows in found.items() if isinstance(rows, list)}
    numbers = own["by_number"].set_index(["method", "k"])
    assert numbers.loc[("class difference", 1), "estimate"] == pytest.approx(0.8, abs=0.03)
    assert numbers.loc[("random", 1), "estimate"] == pytest.approx(0.15, abs=0.03)  # the mean over draws
    paired = own["against_random"].set_index(["method", "k"])
    assert paired.loc[("class means", 2), "estimate"] == pytest.approx(0.6, abs=0.03)
    assert paired.loc[("class means", 2), "low"] > 0 > paired.loc[("probe", 1), "high"]
    parts = own["parts"].set_index("part")
    assert parts.loc["outside", "share"] == pytest.approx(0.25, abs=0.03)
    assert own["single_classes"].set_index("there").loc[True, "estimate"] == pytest.approx(0.6, abs=0.03)
    slope = own["slopes"].set_index("added")
    assert slope.loc["artist", "estimate"] == pytest.approx(1.0, abs=0.02)  # 1.5 less its share of the mean
    assert slope.loc["artist", "monotone"] == 1 and abs(slope.loc["random", "estimate"]) < 0.02
    moved = own["transfer"].set_index(["source", "k"])
    assert moved.loc[("u", 1), "estimate"] == pytest.approx(0.5, abs=0.03)
    assert found["restores"] is True and found["layer"] == 21 and set(headline) <= set(sentences)
    text = " ".join(sentences)
    assert "For each two supersets one direction, their own, suffices" in text
    assert f"on top in {found['leads'][0]} of the {found['leads'][1]} pairs" in text and found["leads"][1] == 60
    shared = words.interval(*numbers.loc[("class means", 1), ["estimate", "low", "high"]])
    assert f"One that all pairs share recovers {shared} (class means)." in headline[0]
    assert "Not better than random: probe, 1." in text and "of logit_diff" not in text


def test_what_the_dormant_part_does_is_said_beside_what_beats_random():
    parts = [("rotation, 1", 0.6, 0.55, 0.65), ("class means, 2", 0.1, 0.0, 0.2), ("rotation, 4", 0.6, 0.5, 0.7)]
    parts = pd.DataFrame(parts, columns=["name", "share", "share_low", "share_high"]).assign(part="outside")
    said = directions_page.dormant_sentence(parts, ["rotation, 1", "class means, 2", "rotation, 4"])
    assert said.startswith(" But for rotation, 1, the dormant part") and said.count("But for") == 1
    assert said.endswith("does most of it (0.60 [0.55, 0.65]): to that extent it is an illusion.")
    assert directions_page.dormant_sentence(parts, ["class means, 2", "rotation, 4"]) == ""
    dormant = part(30, **{"class difference|1|outside": 0.7})[2][-1]
    assert dormant.endswith(": to that extent it is an illusion.") and "But for class difference, 1, the" in dormant
    none = dict.fromkeys(("share_low", "share_high"), np.nan)  # few quads
    assert directions_page.dormant_sentence(parts.assign(**none), ["rotation, 1"]) == ""


def test_few_quads_give_numbers_without_intervals():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, sentences, _ = part(3)
    text = " ".join(sentences)
    assert "is tested on too few quads to say whether it suffices" in text and "too few quads to say whether" in text
    assert "[" not in sentences[2] and "nan" not in text


def test_the_first_layer_that_reaches_the_share_is_chosen():
    rows = [("discovery", "class difference", layer, value) for layer, value in ((21, 0.5), (23, 0.85), (29, 0.95))]
    rows += [("confirmation", "class difference", 21, 0.99), ("discovery", "whole", 21, 1.0)]
    table = pd.DataFrame(rows, columns=["half", "method", "layer", "estimate"])
    assert measure.chosen_layer(table, PARAMS) == 23
    low = table.assign(estimate=table["estimate"] / 2)
    assert measure.chosen_layer(low, PARAMS) == 29
