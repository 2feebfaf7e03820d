"""Sparse autoencoders: trained, loaded, read and patched; and what is made of their tables."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from sklearn.metrics import roc_auc_score

from lib import effects, hooks, records
from lib.hooks import Site
from pipeline import params
from pipeline.units import sweep_units
from steps.neurons import coders, feature_patches, features, features_page, picks
from steps.registry import PLAN
from tests.test_sweep import PAIRS, captured, plain

SITE = Site(1, "mlp")
PARAMS = params.validate(PLAN.sections, "neurons", params.load_profile("smoke") | {"budgets": [1, 3]})


def samples(count=600, width=8, seed=0):
    """Sums of a few of twelve directions with positive sizes: what an SAE is made for."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((12, width))
    sizes = rng.exponential(size=(count, 12)) * (rng.random((count, 12)) < 0.2)
    return torch.tensor(sizes @ directions + 1, dtype=torch.float32)


def coder_for(width, features_=24, seed=0, active=4):
    rng = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(*shape, generator=rng) for shape in ((features_, width), (features_,), (features_, width), (width,))
    ]
    return coders.Coder(*made, active=active)


def step_of(model):
    return SimpleNamespace(model=model, params=PARAMS, memory=2.0)


def test_the_same_seed_gives_the_same_bytes():
    def sha(seed):
        coder = features.train(samples(), 16, 3, 2, seed)
        return hashlib.sha256(safetensors.torch.save(coder.state_dict())).hexdigest()

    state = torch.get_rng_state()
    assert sha(0) == sha(0) != sha(1)
    assert torch.equal(state, torch.get_rng_state()), "training must leave torch's own generator alone"


def test_training_explains_variance_and_the_scale_is_folded_in():
    x, held = 50 * samples(2000), 50 * samples(300)
    trained = features.train(x, 24, 4, 10, 0)
    coder = features.coder_of(trained)
    few, many = (features.quality(one, held) for one in (features.coder_of(features.train(x, 24, 4, 1, 0)), coder))
    assert many["explained"] > 0.8 and many["explained"] > few["explained"]
    assert 0 < many["l0"] <= 4 and many["dead"] == pytest.approx(np.mean(many["fires"].numpy() == 0))
    assert torch.allclose(coder.decoder.norm(dim=1), torch.ones(24), atol=1e-5)
    out = trained(held)  # the library's own forward pass
    assert torch.allclose(coder.decode(coder.encode(held)), out.sae_out, atol=1e-3)
    assert many["explained"] == pytest.approx(1 - float(out.fvu), abs=1e-4)


@pytest.mark.parametrize("component", ["mlp", "resid"])
def test_a_shared_beginning_is_harvested_once_and_first_tokens_never(tiny, component):
    model, site = tiny("llama", "float32"), Site(1, component)
    prompts = [(1, 2, 3), (1, 2, 4), (1, 2, 3), (5, 2, 3, 9)]
    own = features.harvest(model, site, prompts)
    assert own.last.tolist() == [False, True, True, False, False, True]  # 12, 123, 124; 52, 523, 5239
    wanted = [captured(model, ids)[site][0, at] for ids, at in (((1, 2, 3), 1), ((1, 2, 3), 2), ((1, 2, 4), 2))]
    assert torch.allclose(own.values[:3], torch.stack(wanted), atol=1e-5)
    first = [captured(model, ids)[site][0, 0].norm().item() for ids in prompts if ids != prompts[2]] + [captured(model, prompts[0])[site][0, 0].norm().item()]  # fmt: skip # noqa: E501
    assert own.first_norm == pytest.approx(np.mean(first), rel=1e-4)


@pytest.mark.parametrize("component", ["mlp", "resid"])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_patches_equal_full_forward_passes(tiny, component, direction):
    model, site, pair = tiny("llama", "float64"), Site(1, component), PAIRS[0]
    coder, basis = coder_for(32), np.linalg.qr(np.random.default_rng(0).standard_normal((32, 3)))[0].T
    chosen = {"features": [3, 0, 5, 7]} | ({"neurons": [4, 1, 9]} if component == "mlp" else {})
    options = {"direction": direction, "chosen": chosen, "budgets": [1, 3], "draws": 1}
    unit = sweep_units("x", [pair], **options)[0]
    frame = feature_patches.Patcher(step_of(model), coder, site, basis)(unit)
    frame = records.conform(frame, records.VARIANT_SCHEMA).set_index("variant")
    base, other = (pair.clean, pair.corrupt) if direction == "noise" else (pair.corrupt, pair.clean)
    own, new = (captured(model, prompt.ids)[site][0, 9] for prompt in (base, other))
    change = coder.encode(new) - coder.encode(own)
    moves = {"whole": new - own, "reconstruction": change @ coder.decoder}
    moves |= {"error": moves["whole"] - moves["reconstruction"]}
    moves |= {"features 3": change[[3, 0, 5]] @ coder.decoder[[3, 0, 5]], "features 1": change[3] * coder.decoder[3]}
    span = torch.tensor(basis)
    moves |= {f"directions {k}": (new - own) @ span[:k].T @ span[:k] for k in (1, 3)}
    if component == "mlp":
        hidden = [
            torch.cat([captured(model, p.ids)[Site(1, "neuron", n)][0, 9] for n in (4, 1, 9)]) for p in (base, other)
        ]
        weight = model.down_projs[1].weight
        moves["neurons 3"] = weight[:, [4, 1, 9]] @ (hidden[1] - hidden[0])
    for name, move in moves.items():
        with hooks.patch(model, {site: (own + move)[None, None]}, [9]):
            logits = model.model(torch.tensor([base.ids])).logits[0, -1]
        assert np.allclose(frame.loc[name, "logits_after"], logits[list(pair.clean_tokens)].numpy(), atol=1e-4), name
    for k in (1, 3):
        for kind in ("random features", "random directions"):
            assert frame.loc[f"{kind} {k}.0", "site_delta"] == pytest.approx(frame.loc[f"features {k}", "site_delta"], rel=1e-3)  # fmt: skip # noqa: E501
    assert "neurons 1" in frame.index or component == "resid"
    unit = sweep_units("x", [pair], direction=direction, chosen=chosen)[0]
    alone = feature_patches.Patcher(step_of(model), coder, site, basis)(unit).set_index("variant")
    assert np.allclose(alone.loc["features 3", "logits_after"], frame.loc["features 1", "logits_after"], atol=1e-5)
    assert len(alone) == sum(map(len, chosen.values()))


def test_attributions_are_the_slope_of_the_patch(tiny):
    model, pairs, coder = tiny("llama", "float64"), PAIRS[:2], coder_for(32)
    unit = sweep_units("x", pairs)[0]
    rows = feature_patches.reader(step_of(model), coder, SITE)(unit).set_index(["pair_id", "side"])
    row, pair, step = rows.loc[("p0", "corrupt")], pairs[0], 1e-4
    own, before = captured(model, pair.corrupt.ids), plain(model, pair.corrupt.ids)
    assert (
        np.allclose(row.activation, own[SITE][0, 9], atol=1e-5) and row.superset == pair.candidates[pair.corrupt_answer]
    )
    assert np.allclose(row.features, coder.encode(own[SITE][0, 9]), atol=1e-4)

    def slope(site, value, move):
        with hooks.patch(model, {site: (value + step * move)[None, None]}, [9]):
            logits = model.model(torch.tensor([pair.corrupt.ids])).logits[0, -1] - before
        return float(logits[pair.clean_tokens[pair.answer]] - logits[pair.clean_tokens[pair.corrupt_answer]]) / step

    change = rows.loc[("p0", "clean")].features - row.features
    one = int(np.abs(row.feature_attribution).argmax())
    wanted = slope(SITE, own[SITE][0, 9], change[one] * coder.decoder[one])
    assert row.feature_attribution[one] == pytest.approx(wanted, rel=1e-2, abs=1e-4)
    two = int(np.abs(row.neuron_attribution).argmax())
    value = own[Site(1, "neuron", two)][0, 9]
    wanted = slope(Site(1, "neuron", two), value, captured(model, pair.clean.ids)[Site(1, "neuron", two)][0, 9] - value)
    assert row.neuron_attribution[two] == pytest.approx(wanted, rel=1e-2, abs=1e-4)
    assert len(row.neurons) == model.n_neurons and (row.features > 0).sum() <= 4


# --- the report ---


def reads(quads=30, seed=0, classes=("artist", "scientist")):
    """Rows of a `reader` in which feature 0 marks the first class and neuron 1 the second, in both halves."""
    rng, rows = np.random.default_rng(seed), []
    for quad in range(quads):
        for side, superset in zip(("clean", "corrupt"), classes if quad % 2 else classes[::-1], strict=False):
            values = rng.random((2, 6)) * 0.5
            values[0, 0] += superset == classes[0]
            values[1, 1] += superset == classes[-1]
            row = {"pair_id": f"p{quad}", "quad_id": f"q{quad}", "half": ("discovery", "confirmation")[quad // 2 % 2]}
            row |= {
                "side": side,
                "superset": superset,
                "activation": values[0],
                "features": values[0],
                "neurons": values[1],
            }
            rows.append(row | {"feature_attribution": [0, 3, -1, 2, 1, 0], "neuron_attribution": [1, 0, 0, 0, 0, 2]})
    return pd.DataFrame(rows)


def test_auc_and_selectivity():
    rows = reads()
    table = picks.aucs(rows, "features")
    for unit in (0, 3):
        wanted = roc_auc_score(rows["superset"] == "artist", [value[unit] for value in rows["features"]])
        assert table.loc[unit, "artist"] == pytest.approx(wanted)
    own = picks.selective(rows, "features", PARAMS)
    assert own.iloc[0].to_dict() == {"unit": 0, "superset": "artist", "discovery": 1.0, "confirmation": 1.0}
    few = features_page.auc_interval(reads(19), np.stack(list(reads(19)["features"]))[:, 3], "artist", PARAMS)
    assert np.isfinite(few.estimate) and few.low is None, "19 quads"
    many = reads(80)
    values = np.stack(list(many["features"]))[:, 3]
    span = features_page.auc_interval(many, values, "artist", PARAMS)
    assert span.low < 0.5 < span.high < span.low + 0.35 and span.estimate == pytest.approx(
        roc_auc_score(many["superset"] == "artist", values)
    )
    assert picks.selective(reads(classes=("artist",)), "features", PARAMS).empty
    assert picks.shortlist(rows, PARAMS) == {"features": [1, 3, 4, 0, 5, 2], "neurons": [5, 0, 1, 2, 3, 4]}


def test_stability_sees_permuted_features_and_not_random_ones():
    rng = np.random.default_rng(0)
    decoder = rng.standard_normal((40, 64))
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    fires = np.where(np.arange(40) < 30, 0.1, 0.0)
    order = rng.permutation(40)

    def sae(*decoders):
        return pd.DataFrame([{"features": 40, "width": 64, "decoder": d.ravel(), "fires": f} for d, f in decoders])

    same = features_page.stability(sae((decoder, fires), (decoder[order], fires[order])), [2, 3, 35], rng)
    same = same.set_index("features")
    assert same.loc["alive", "matched"] == 1 and same.loc["alive", "cosine"] == pytest.approx(1, abs=1e-5)
    assert same.loc["class-selective", "count"] == 2 and same.loc["class-selective", "matched"] == 1
    assert same.loc["shuffled", "cosine"] < 0.6 and same.loc["shuffled", "matched"] == 0
    other = features_page.stability(sae((decoder, fires), (rng.standard_normal((40, 64)) / 8, fires)), [], rng)
    assert other.set_index("features").loc["alive", "matched"] == 0
    assert features_page.stability(sae((decoder, fires)), [], rng).empty


def patches(better, quads=30):
    """Records in which SAE features recover `better` more logits than everything else at budget 3."""
    rows, rng = [], np.random.default_rng(0)
    sizes = {"whole": 4, "reconstruction": 3, "error": 1}
    sizes |= {
        f"{kind} {k}": 1 + better * (kind == "features" and k == 3) for kind in features_page.KINDS[:3] for k in (1, 3)
    }
    sizes |= {f"{kind} {k}.{n}": 0.1 for kind in features_page.KINDS[3:] for k in (1, 3) for n in range(2)}
    for quad in range(quads):
        for variant, size in sizes.items():
            row = {
                "quad_id": f"q{quad}",
                "half": "confirmation",
                "direction": "denoise",
                "variant": variant,
                "site_delta": 1.0,
            }
            rows.append(row | {"logit_diff_before": 0.0, "logit_diff_after": size + rng.normal(0, 0.1)})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    "better,wanted",
    [
        (1, "SAE features do more than neurons or directions at some budget, and never less here"),
        (0, "SAE features are not shown to do more or less than neurons or directions at any budget here"),
        (-1, "SAE features do less than neurons or directions at some budget, and never more here"),
    ],
)
def test_the_verdict_follows_the_numbers(better, wanted):
    own = patches(better)
    table = features_page.budget_table(own, PARAMS)
    assert features_page.part_of(table, "recovery", "reconstruction")["estimate"] == pytest.approx(0.75, abs=0.02)
    assert features_page.part_of(table, "recovery", "features", 3)["estimate"] == pytest.approx(
        (1 + better) / 4, abs=0.02
    )
    gaps = features_page.compared(own, PARAMS)
    row = gaps[(gaps["other"] == "neurons") & (gaps["k"] == 3)].iloc[0]
    assert row["estimate"] == pytest.approx(better, abs=0.1) and row["low"] < better < row["high"]
    *_, against, beyond, verdict = features_page.effect_sentences(table, gaps, PARAMS, 2)
    assert wanted in verdict
    assert ("- more than neurons at a budget of 3\n" in against) == (better == 1) and "[" not in against
    assert beyond.startswith("There are 2 class directions: beyond a budget of as many,")
    said = features_page.effect_sentences(table, gaps, PARAMS, 2)[0]
    assert "| at a budget of 3 |" in said and said.count("directions (there are 2)") == 1
    assert "there are" not in features_page.effect_sentences(table, gaps, PARAMS, 3)[0]
    assert len(features_page.budget_curves(table).axes) == 1


def test_each_rival_is_judged_by_itself():
    verdicts = [("recovery", "", "neurons", True, False), ("recovery", "", "directions", False, False)]
    verdicts += [("damage", "", "neurons", False, True), ("damage", "", "random features", True, False)]
    assert features_page.rivals_sentence(verdicts).startswith(
        "SAE features do more than neurons in some comparisons, and less in others; they are not shown to do more or "
        "less than directions at any budget here"
    )


def test_the_best_features_are_said_with_their_prompts_and_few_quads_have_no_interval():
    pairs = pd.DataFrame({"pair_id": [f"p{quad}" for quad in range(80)]})
    pairs = pairs.assign(**{f"{side}_{slot}": "x" for side in ("clean", "corrupt") for slot in "ab"})
    for quads, there in ((30, 14), (80, 40)):
        found = features_page.map_table(reads(quads), PARAMS, pairs)
        said = features_page.map_sentences(reads(quads), found, PARAMS)[-1]
        assert f"| {there} | {there} |" in said
        halves = [picks.aucs(part, "neurons") for _, part in effects.in_halves(reads(quads))]
        best = halves[-1].loc[halves[0]["artist"].idxmax(), "artist"]
        assert f"| {best:.2f} |" in said.partition("| scientist")[0]
        assert ("no interval where the superset is in fewer than 20 quads" in said) == (there < 20) == ("[" not in said)
    bare = features_page.map_sentences(reads(80).drop(columns="neurons"), found, PARAMS)[-1]
    assert "neuron" not in bare.lower()


def test_too_few_quads_and_a_site_without_effect_are_said():
    own = patches(1, quads=3)
    own.loc[own["variant"] == "whole", "logit_diff_after"] = -1.0
    table, gaps = features_page.budget_table(own, PARAMS), features_page.compared(own, PARAMS)
    said = features_page.effect_sentences(table, gaps, PARAMS, 3)
    assert "too few quads" in said[-1] and "not defined" in said[0]
    features_page.budget_curves(table)


def test_sentences_leave_out_the_people_of_the_confirmation_half(smollm_tokenizer):
    pairs = pd.DataFrame(
        [
            {"half": half, "clean_a": a, "clean_b": b, "corrupt_a": c, "corrupt_b": d}
            for half, a, b, c, d in (
                ("discovery", "Brad Pitt", "Pablo Picasso", "Isaac Newton", "Albert Einstein"),
                ("confirmation", "Marie Curie", "Bob Dylan", "Pelé", "Serena Williams"),
            )
        ]
    )
    own = PARAMS.model_copy(update={"sae_prompts": 9000})
    step = SimpleNamespace(
        model=SimpleNamespace(tokenizer=smollm_tokenizer), params=own, people_file="data/people.csv",
        pairs=lambda: pairs, rng=lambda purpose: np.random.default_rng(0),
    )  # fmt: skip
    texts = [smollm_tokenizer.decode(ids) for ids in features.sentences(step)]
    assert any("Brad Pitt" in text for text in texts) and any("Brad Pitt and Pablo Picasso" in text for text in texts)
    for name in ("Marie Curie", "Bob Dylan", "Serena Williams"):
        assert not [text for text in texts if name in text]
    assert sum("The profession of" in text for text in texts) > 100 and "Light travels faster than sound." in texts
