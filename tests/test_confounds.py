"""Confounds: spans of attributes, what is put into the model beside class directions, and what the page says of it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lib.hooks import Site
from pipeline.units import plan_id
from steps.subspace import confounds, confounds_page, measure
from steps.subspace.confounds import DEALT_OUT, MEAN, TOGETHER
from tests.test_directions import PARAMS, after, means_table, step_of, synthetic, vectors_of
from tests.test_sweep import PAIRS, captured

SUPERSETS, REGIONS = ("artist", "athlete", "writer"), ("Europe", "Africa", "Asia")
ABOUT = ("region", "century", "gender")
WORDS = PAIRS[0].candidates


def world(along, seed=0):
    """Activations of couples whose class lies along axis 5 (and, as far as `along` says, along the regions' axis 0),
    twice each in either order, and the people: gender and century make no difference."""
    rng = np.random.default_rng(seed)
    people = pd.DataFrame({"name": [f"n{i}" for i in range(180)], "region": rng.choice(REGIONS, 180)})
    people = people.assign(century=20, gender=rng.choice(["female", "male"], 180))
    names, superset = people["name"].to_numpy().reshape(90, 2), np.repeat(SUPERSETS, 30)
    place = {"Europe": -1.0, "Africa": 0.0, "Asia": 1.0}
    values = 0.6 * rng.standard_normal((90, 20))
    values[:, 0] += people["region"].map(place).to_numpy().reshape(90, 2).sum(1)
    ends = {"artist": 0.0, "athlete": 1.0, "writer": 3.0}
    means = {name: end * (np.eye(20)[5] + along * np.eye(20)[0]) for name, end in ends.items()}
    values += np.stack([means[name] for name in superset])
    prompts = pd.DataFrame({"names": [*map(tuple, names), *map(tuple, names[:, ::-1])], "superset": [*superset] * 2})
    return np.concatenate([values + 0.1, values - 0.1]), prompts, people, means


def test_another_layer_or_level_is_another_table():
    """Both may follow from parameters that are not in the data key."""
    plans = set()
    for layer, level in ((5, 0.95), (6, 0.95), (5, 0.9)):
        step = SimpleNamespace(params=PARAMS.model_copy(update={"level": level}))
        plans.add(plan_id(confounds.ATTRIBUTE_SPANS.units(step, None, layer, None)))
    assert len(plans) == 3


def found_in(along):
    """The rows of shares in such a world."""
    values, prompts, people, means = world(along)
    each, couples = confounds.within_classes(values, prompts)
    assert len(couples) == 90 and np.allclose(each[couples["superset"] == "writer"].mean(0), 0)
    counts, rng = confounds.counts_of(people, couples["names"].tolist(), ABOUT), np.random.default_rng(0)
    assert counts["region"].sum(1).tolist() == [2] * 90 and counts["region"].shape == (90, 3)
    names, vectors = confounds.class_directions(means)
    orders = [confounds.dealt(rng, couples) for _ in range(100)]
    assert all((couples["superset"].to_numpy()[order] == couples["superset"]).all() for order in orders)
    assert len(confounds.span_of(each, [counts["century"]])) == 0  # one value: nothing differs
    bases = [confounds.span_of(each, [counts["region"][order]]) for order in (np.arange(90), *orders)]
    own, *others = (confounds.shares(vectors, basis) for basis in bases)
    return pd.DataFrame(confounds.share_rows(names, own, np.stack(others), {}, 0.95)).set_index("name")


def test_the_share_of_a_direction_is_what_of_it_lies_along_the_attribute():
    rows = found_in(along=1.0)
    assert rows["share"].between(0.35, 0.6).all() and (rows["p"] < 0.05).all()  # half by its making
    assert rows.loc[MEAN, "by_chance"] < 0.35 and rows.loc[MEAN, "highest"] < rows.loc[MEAN, "share"]
    none = found_in(along=0.0)
    assert (none["share"] < 0.2).all() and none.loc[MEAN, "p"] > 0.05


def test_few_people_have_no_mean_and_strangers_no_value():
    people = pd.DataFrame({"name": ["a", "b", "c"], "region": "Asia", "century": 20, "gender": ["x", "x", "y"]})
    names = [("a", "b")] * 3 + [("c", "stranger")]
    counts = confounds.counts_of(people, names, ABOUT)
    assert counts["gender"].tolist() == [[2], [2], [2], [0]] and counts["region"][:, 0].tolist() == [2, 2, 2, 1]
    assert confounds.span_of(np.ones((4, 7)), [*counts.values()]).shape == (0, 7)


def spans_table(width):
    rng = np.random.default_rng(5)
    basis = np.linalg.qr(rng.standard_normal((width, 6)))[0].T
    rows = [("span", TOGETHER, row) for row in basis[:3]]
    rows += [("dealt", f"{DEALT_OUT} {n}", row) for n in range(2) for row in basis[1 + n : 4 + n]]
    return pd.DataFrame([*rows, ("difference", "region", basis[5])], columns=confounds.COLUMNS[:3])


def test_parts_and_the_placebos_directions_arrive_in_the_model(tiny):
    model, pair, site = tiny("llama"), PAIRS[1], Site(1, "resid")
    step, means, spans = step_of(model), means_table(32, [1]), spans_table(32)
    vectors, words = vectors_of(32, 1), {True: WORDS[pair.answer], False: WORDS[pair.corrupt_answer]}
    delta = (captured(model, pair.clean.ids)[site] - captured(model, pair.corrupt.ids)[site])[:, [9]]

    def wanted(change):
        return after(model, pair, {site: captured(model, pair.corrupt.ids)[site][:, [9]] + change})

    def part(vector):
        d = torch.tensor(vector / np.linalg.norm(vector))
        return (delta @ d)[..., None] * d

    own = confounds.in_pairs(step, [pair], 1, means, spans)
    frame = step.table(confounds.IN_PAIRS, own).set_index("variant")
    one = part(vectors[words[True]] - vectors[words[False]])
    within = torch.tensor(np.stack(spans["vector"][:3].tolist()))
    inside = one @ within.T @ within
    at = {"": one, f"{TOGETHER} inside": inside, f"{TOGETHER} outside": one - inside}
    for name, change in at.items():
        assert np.abs(frame.loc[f"class difference|1|{name}", "logits_after"] - wanted(change)).max() < 1e-5
    region = part(spans["vector"].iloc[-1])
    assert np.abs(frame.loc["region difference|1|", "logits_after"] - wanted(region)).max() < 1e-5
    assert f"class difference|1|{DEALT_OUT} 1 outside" in frame.index

    step.placebo = lambda: [pair, replace(PAIRS[2], pair_id="of a class that was not fitted")]
    shared = {pair.pair_id: WORDS[2], "of a class that was not fitted": "nobody"}
    own = confounds.in_placebo(step, 1, means, spans, shared)
    frame = step.table(confounds.IN_PLACEBO, own).set_index("variant")
    assert set(frame["pair_id"]) == {pair.pair_id}
    for number, other in enumerate(name for name in vectors if name != WORDS[2]):
        change = part(vectors[WORDS[2]] - vectors[other])
        assert np.abs(frame.loc[f"class difference|1|{number}", "logits_after"] - wanted(change)).max() < 1e-5
    random, first = (frame.loc[name, "site_delta"] for name in ("random|1|0", "class difference|1|0"))
    assert random == pytest.approx(first, rel=1e-6)


def test_every_placebo_attribute_gives_as_many_pairs(tiny):
    many = [replace(PAIRS[1], pair_id=f"{n}", quad_id=f"{n}", half="confirmation") for n in range(9)]
    two = [replace(pair, pair_id=f"two {pair.pair_id}", quad_id=f"two {pair.quad_id}") for pair in many[:3]]
    step = step_of(tiny("llama"))
    step.params = step.params.model_copy(update={"pairs": 2})
    step.placebo = lambda: [*many, *(replace(pair, candidates=tuple("abcde")) for pair in two)]
    means, spans = means_table(32, [1]), spans_table(32)
    own = confounds.in_placebo(step, 1, means, spans, {})
    assert [sum(pair.candidates == words for pair in own.pairs) for words in (WORDS, tuple("abcde"))] == [2, 2]
    own = confounds.in_placebo(step, 1, means, spans, {"7": WORDS[2], "two 0": WORDS[2]})
    assert [pair.pair_id for pair in own.pairs] == ["7", "two 0"], "others had no gap of the right sign"
    units = confounds.IN_PLACEBO.units(step, own)
    assert [[pair.pair_id for pair in unit.pairs] for unit in units] == [["7"], ["two 0"]], "no pass has both"
    shared = {"7": WORDS[2], "two 0": WORDS[2]}
    frame = step.table(confounds.IN_PLACEBO, confounds.in_placebo(step, 1, means, spans, shared))
    assert set(frame["pair_id"]) == {"7", "two 0"}, "one table of both, whose candidates differ"


def page_of(quads):
    """What the page makes of directions of known effect."""
    both = {"random|1|0": 0.0, "random|1|1": 0.1, "whole|0|": 1.0, "class means|4|": 0.9}
    own = {"class difference|1|": 0.8, "region difference|1|": 0.2, f"class difference|1|{TOGETHER} inside": 0.1}
    own |= {f"class difference|1|{TOGETHER} outside": 0.7}
    own |= {f"class difference|1|{DEALT_OUT} {n} {part}": 0.2 * n for n in (0, 1) for part in ("inside", "outside")}
    other = {"class difference|1|0": 0.1, "class difference|1|1": 0.3, "region difference|1|": 0.8}
    placebo = synthetic(quads, both | other, seed=1, attribute="region")
    shares = [(name, key, 0.3, 0.1, 0.2, 0.01, 2, 90) for name in ("a - b", "a against the rest", MEAN)
              for key in (*ABOUT, TOGETHER)]  # fmt: skip
    columns = ["name", "attribute", "share", "by_chance", "highest", "p", "k", "prompts"]
    spans = pd.DataFrame(shares, columns=columns).assign(what="share", vector=None)
    made = {"spans": spans, "beside": synthetic(quads, both | own), "placebo": placebo, "layer": 21}
    m = measure.Measured(**dict.fromkeys(measure.Measured._fields) | made)
    numbers = confounds_page.numbers(m, PARAMS)
    return numbers, confounds_page.sentences(m, numbers, PARAMS), m


def test_the_page_says_what_was_put_in():
    numbers, said, m = page_of(30)
    parts, rows = numbers.parts.set_index("part"), numbers.placebo.set_index("method")
    assert parts.loc[f"{TOGETHER} inside", "estimate"] == pytest.approx(0.1, abs=0.03)
    assert parts.loc[f"{TOGETHER} outside", "share"] == pytest.approx(0.7 / 0.8, abs=0.04)
    assert parts.loc[f"{DEALT_OUT} inside", "estimate"] == pytest.approx(0.1, abs=0.03)  # the mean over draws
    one, region = rows.loc["class difference"], rows.loc["region difference"]
    assert one["placebo_estimate"] == pytest.approx(0.2, abs=0.03)  # the mean over the other supersets
    assert one["quotient_estimate"] == pytest.approx(0.25, abs=0.05) and one["verdict"] == "specific"
    assert region["quotient_estimate"] == pytest.approx(4, abs=0.6) and region["verdict"] == "general"
    assert rows.loc["class means", "verdict"] == "open"
    assert len(said) == 3 and "surely less" in said[2] and "and 30 quads)" in said[2] and "0.30" in said[0]
    strict = confounds_page.sentences(m, numbers, PARAMS.model_copy(update={"level": 0.998}))[0]
    assert "), more than by chance" in said[0] and "not surely more than by chance" in strict and "100% point" in strict
    assert "8 of 8 shares exceed their 95% point, where 0.4 would on average by chance. The furthest: a - b" in said[0]
    near = numbers.shares.assign(share=0.107, highest=0.112)
    far = confounds_page.beyond_sentence(near, 0.9)
    assert far.endswith("0 of 8 shares exceed their 90% point, where 0.8 would on average by chance.")
    assert confounds_page.with_point(0.107, 0.112) == ("0.107", "0.112")
    assert confounds_page.with_point(0.1, 0.2) == ("0.10", "0.20")
    table = confounds_page.share_table(numbers)
    assert table.loc[MEAN].tolist() == [("0.30", "0.20")] * 4
    assert len(confounds_page.placebo_table(numbers, PARAMS)) == len(rows) == 5
    numbers = confounds_page.numbers(m._replace(placebo=None), PARAMS)
    assert confounds_page.sentences(m, numbers, PARAMS)[-1] == confounds_page.NONE
    assert confounds_page.placebo_table(numbers, PARAMS).data == confounds_page.NONE
    given = PARAMS.model_copy(update={"pairs_file": "mine.csv"})
    assert confounds_page.placebo_table(numbers, given).data == confounds_page.NONE_GIVEN
    assert confounds_page.sentences(m, numbers, given)[-1] == confounds_page.NONE_GIVEN


def test_few_quads_give_no_verdict():
    numbers, said, _ = page_of(3)
    assert numbers.placebo["verdict"].isna().all() and "surely" not in said[2] and "nan" not in " ".join(said)
