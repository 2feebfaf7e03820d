"""Probes: folds that share no person, accuracies on made-up activations of known answer, and the rank they need."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from lib import hooks, questions
from lib.tasks import Prompt
from pipeline import params
from pipeline.step import StepError
from steps.registry import PLAN
from steps.subspace import probes, probes_page
from tests.test_tasks import llama_tokenizer

P = params.validate(PLAN.sections, "subspace", params.load_profile("smoke") | {"permutations": 19, "resamples": 300})
CLASSES = ("artist", "athlete", "politician", "scientist", "writer")


def of_quads(count: int) -> pd.DataFrame:
    """Two couples of different supersets per quad."""
    rows = []
    for q in range(count):
        for side, shift in (("ab", 0), ("cd", 1 + q % 4)):
            who = [f"{q}{side[0]}", f"{q}{side[1]}"]
            rows.append(
                {"item": " and ".join(who), "unit": f"q{q}", "superset": CLASSES[(q + shift) % 5], "people": who}
            )
    return pd.DataFrame(rows)


def made(rows: pd.DataFrame, targets=("superset",), kind="pair", folds=5) -> probes.Asked:
    rows = rows.assign(fold=probes.folds_of(rows, targets[-1], folds, 0)).drop(columns="people")
    return probes.Asked(kind, rows, tuple(targets), ("first", "second"), (), ())


def activations(codes, rank, width=40, noise=0.5, seed=0, own=0.0):
    """Two templates x rows x width: class means in a space of `rank` dimensions, and each row's own vector, which both
    templates share."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(width, rank)))[0]
    means = rng.normal(size=(codes.max() + 1, rank))
    means = 6 * (means - means.mean(0)) / means.std()
    if rank == codes.max():
        means = 12 * np.eye(rank + 1)[:, :rank]
    person = own * rng.normal(size=(len(codes), width))
    shift = 5 * rng.normal(size=(2, 1, width))
    x = (means @ basis.T)[codes] + person + noise * rng.normal(size=(2, len(codes), width)) + shift
    return x.astype(np.float32)


def tabled(own, other, x, far, ranks=(1, 2)):
    own, other = probes.Seen(own, "last", x), probes.Seen(other, "last", far)
    parts = [*probes.people_folds(own, other, ranks, P), *probes.prompt_folds(own, P)]
    return pd.concat(parts, ignore_index=True).fillna({"rank": probes.WHOLE, "permutation": -1}).assign(layer=3)


@pytest.fixture(scope="module")
def separable():
    """Pair and one-name prompts in one space of activations, with the classes well apart in all four directions."""
    pairs = made(of_quads(40))
    people = pd.DataFrame({"item": [f"n{i}" for i in range(100)], "superset": np.tile(CLASSES, 20)})
    people = made(people.assign(unit=people["item"], people=[[n] for n in people["item"]]), kind="one-name")
    codes = [np.unique(own.rows["superset"], return_inverse=True)[1] for own in (pairs, people)]
    x = activations(np.concatenate(codes), 4, noise=1.0)
    near, far = x[:, :80], x[:, 80:]
    return pairs, people, near, far, tabled(pairs, people, near, far)


def test_folds_share_no_person_and_keep_quads_whole():
    rows = of_quads(40)
    fold = probes.folds_of(rows, "superset", 5, 0)
    people = rows.assign(fold=fold).explode("people")
    assert (people.groupby("people")["fold"].nunique() == 1).all()
    assert (rows.assign(fold=fold).groupby("unit")["fold"].nunique() == 1).all()
    assert np.bincount(fold).min() >= 12 and (fold != probes.folds_of(rows, "superset", 5, 1)).any()
    seen = [set(people.loc[people["fold"] == k, "people"]) for k in range(5)]
    assert not any(seen[a] & seen[b] for a in range(5) for b in range(a))
    twice = rows.copy()
    twice.at[0, "people"] = ["shared", "x"]
    twice.at[2, "people"] = ["shared", "y"]
    with pytest.raises(StepError, match="'shared' is in 2 quads"):
        probes.folds_of(twice, "superset", 5, 0)


def test_training_never_sees_a_held_out_person(separable, monkeypatch):
    pairs, people, near, far, _ = separable
    trained = []
    fit = probes.Probe.__init__

    def watched(self, x, labels, train):
        trained.append(train)
        fit(self, x, labels, train)

    monkeypatch.setattr(probes.Probe, "__init__", watched)
    [*probes.people_folds(probes.Seen(pairs, "last", near), probes.Seen(people, "last", far), (), P)]
    assert len(trained) == 5
    for fold, train in enumerate(trained):
        units = [set(pairs.rows["unit"][mask]) for mask in (train, (pairs.rows["fold"] == fold).to_numpy())]
        assert not units[0] & units[1] and len(units[0] | units[1]) == 40


def test_small_classes_are_dropped_with_a_sentence_and_one_left_is_an_error():
    rows = of_quads(20).assign(profession="poet")
    rows.loc[:2, "profession"] = "dancer"
    rows.loc[6:20, "profession"] = "chemist"
    kept, why = probes.large_enough(rows, "profession", 5, "pair")
    assert kept == ["chemist", "poet"]
    assert len(why) == 1 and "with fewer than 5 quads, one per fold: dancer (2 quads)." in why[0]
    with pytest.raises(StepError, match=r"1 classes have at least 11 quads.*chemist \(8 quads\), dancer \(2 quads\)"):
        probes.large_enough(rows, "profession", 11, "pair")


def test_people_are_drawn_evenly_and_professions_are_large_enough():
    people = pd.DataFrame({"name": [f"p{i}" for i in range(300)], "superset": np.repeat(CLASSES, 60)})
    people["profession"] = [f"{s}{min(i % 60 // 7, 4)}" for i, s in enumerate(people["superset"])]
    people["two_supersets"] = np.arange(300) % 50 == 0
    people["namesake"] = np.where(np.arange(300) % 60 == 7, "another", "")
    drawn = probes.draw(people, 100, 5, np.random.default_rng(0))
    assert (drawn.groupby("superset").size() == 20).all() and not drawn["two_supersets"].any()
    assert drawn["namesake"].eq("").all()
    assert drawn.groupby("profession").size().min() >= 4
    few = probes.draw(people, 20, 2, np.random.default_rng(0))
    assert (few.groupby("profession").size() == 2).all() and few["profession"].nunique() == 10


def test_a_class_that_is_there_is_found_and_permuted_labels_are_not(separable):
    table = separable[-1]
    means = table.groupby(["folds", "kind", "labels", "template", "rank"])["score"].mean()
    assert means["people", "pair", "true", "first", probes.WHOLE] > 0.95
    assert abs(means["people", "pair", "permuted", "first", probes.WHOLE] - 0.2) < 0.06
    # a shift of the whole template, and another kind of prompts, do not harm a probe that is centred on them
    assert means["people", "pair", "true", "second", probes.WHOLE] > 0.95
    assert means["people", "one-name", "true", "first", probes.WHOLE] > 0.95
    # four directions of equal size: one or two cannot do it, the cap can
    ranks = means["people", "pair", "true", "first"]
    assert ranks[1] < 0.65 < ranks[4] > 0.95 and ranks[1] < ranks[2] < ranks[4]


def test_predictions_are_those_of_discriminant_analysis(separable):
    pairs, _, near, _, table = separable
    x, codes = near[0], np.unique(pairs.rows["superset"], return_inverse=True)[1]
    fold, found = pairs.rows["fold"].to_numpy(), np.empty(80, dtype=int)
    for k in range(5):
        own = LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.1).fit(x[fold != k], codes[fold != k])
        found[fold == k] = own.predict(x[fold == k])
    rows = table[(table["folds"] == "people") & (table["labels"] == "true") & (table["rank"] == probes.WHOLE)]
    rows = rows[(rows["kind"] == "pair") & (rows["template"] == "first")]
    assert (rows["predicted"].to_numpy() == np.array(CLASSES)[found]).mean() > 0.95
    right = rows["predicted"] == rows["label"]
    assert rows["score"].mean() == pytest.approx(right.groupby(rows["label"]).mean().mean())


def one_hot_code(noise=0.1, beside=0.0, there=True, professions=15, people=240, width=512):
    """One-name prompts about people whose profession is a one-hot code of amplitude 1 (or is not there), among
    dimensions of noise, the last of which spreads `beside` times as far as the code; and the accuracy of probes."""
    rng, codes = np.random.default_rng(0), np.arange(people) % professions
    names = [f"n{i}" for i in range(people)]
    rows = pd.DataFrame({"item": names, "unit": names, "superset": [f"job {code:02d}" for code in codes]})
    x = noise * rng.normal(size=(1, people, width)) + np.array([0, *[3] * (width - 1)])
    x[0, :, :professions] += there * np.eye(professions)[codes]
    x[0, :, -1] += beside * rng.normal(size=people)
    own = made(rows.assign(people=[[name] for name in names]), kind="one-name")._replace(templates=("first",))
    frame = pd.concat(probes.people_folds(probes.Seen(own, "names", x.astype(np.float32)), None, (), P))
    return frame.groupby("labels")["score"].mean()


@pytest.mark.parametrize("beside", [0, 10, 100])
def test_a_code_is_read_among_small_noise_and_beside_what_varies_far_more(beside):
    """Each dimension divided by its own spread reads 0.6; one strength for all, of the total variance's order, 0.3
    beside a dimension that spreads 100 times as far."""
    read = one_hot_code(beside=beside)
    assert read["true"] > 0.99 and abs(read["permuted"] - 1 / 15) < 0.04


def test_nothing_is_read_where_there_is_nothing():
    for beside in (0, 100):
        assert one_hot_code(beside=beside, there=False)["true"] < 2 / 15


def test_probes_and_spectra_are_the_same_at_any_scale(tiny):
    pairs = made(of_quads(40))
    one = probes.labelled(pairs.rows, "superset", 2, 0)
    x, model = activations(one.codes[0], 4, noise=3.0)[0], replace(tiny("llama"), tokenizer=Words())
    train = pairs.rows["fold"].to_numpy() != 0
    found = []
    for scale in (1, 1000):
        probe = probes.Probe(scale * x, [one], train)
        found.append((probe.outputs(scale * x)[0], probes.spectrum(model, scale * x[:, :32], one)["values"][0]))
    for own, other in zip(*found, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-3, atol=1e-4)


def test_small_noise_does_not_raise_the_rank_of_class_means(tiny):
    pairs = made(of_quads(40))
    one = probes.labelled(pairs.rows, "superset", 2, 0)
    rng = np.random.default_rng(1)
    x, means = 0.001 * rng.normal(size=(80, 32)), np.array([[2, 0], [0, 2], [-2, 0], [0, -2], [0, 0]])
    x[:, :2] += means[one.codes[0]] + 0.5 * rng.normal(size=(80, 2))
    values = probes.spectrum(replace(tiny("llama"), tokenizer=Words()), x, one)["values"][0]
    assert probes_page.effective_rank(values) < 2.01 and values[2] < 0.02


def test_the_control_task_is_learned_by_heart_only_where_people_are_shared():
    pairs = made(of_quads(40))
    codes = np.unique(pairs.rows["superset"], return_inverse=True)[1]
    by_heart = activations(codes, 4, width=120, noise=0.1, own=1.0)  # each person recognisable, in a wide space
    frame = tabled(pairs, pairs, by_heart, by_heart, ranks=())
    means = frame[frame["template"] != "second"].groupby(["folds", "labels"])["score"].mean()
    assert means["prompts", "control"] > 0.6 and means["people", "permuted"] < 0.3
    table = probes_page.selectivity(frame, P)
    assert table["estimate"].iloc[0] == pytest.approx(means["prompts", "true"] - means["prompts", "control"])
    no_person = activations(codes, 4, width=120, noise=1.0)
    other = tabled(pairs, pairs, no_person, no_person, ranks=())
    control = other[(other["folds"] == "prompts") & (other["labels"] == "control")]["score"].mean()
    assert control < 0.35


@pytest.mark.parametrize("rank,low", [(1, True), (4, False)])
def test_low_rank_can_be_found_and_can_fail(rank, low, tiny):
    pairs = made(of_quads(60))
    one = probes.labelled(pairs.rows, "superset", P.permutations, 0)
    x = activations(one.codes[0], rank, width=32, noise=0.3 if low else 3.0)
    frame = tabled(pairs, pairs, x, x, ranks=(1, 2))
    model = tiny("llama")
    model = replace(model, tokenizer=Words()) if model.tokenizer is None else model
    means = probes.spectrum(model, x[0], one)
    means = means.fillna({"permutation": -1}).assign(kind="pair", target="superset", position="last", layer=3)
    frame = frame[frame["kind"] == "pair"]
    ranks = probes_page.rank_table(frame, P)
    verdict = probes_page.verdicts(ranks, probes_page.spectra(means)).iloc[0]
    assert bool(verdict["low rank"]) is low and verdict["cap"] == 4
    assert verdict["rank needed"] == 1 if low else verdict["rank needed"] > 2
    said = probes_page.rank_sentence(verdict, ranks)
    needed = int(verdict["rank needed"])
    assert f"needs rank {needed}, the first of the ranks tried that keeps 90%" in said
    mark = verdict["chance"] + 0.9 * (verdict["accuracy"] - verdict["chance"])
    lower = ranks[(ranks["labels"] == "true") & (ranks["rank"] < needed) & (ranks["high"] >= mark)]
    assert ("by their intervals, may" in said) == bool(len(lower)) and "low rank" not in said
    wide = ranks.assign(high=1.0)
    assert ("by their intervals, may rank 1" in probes_page.rank_sentence(verdict, wide)) is not low
    ends = probes_page.ends(means, ("pair", "superset", "last"), 3)
    assert sum(own["share"] for own in ends) == pytest.approx(1) and (ends[0]["share"] > 0.9) is low
    nothing = activations(np.random.default_rng(1).permutation(one.codes[0]), rank, width=32)
    frame = tabled(pairs, pairs, nothing, nothing, ranks=(1, 2))
    verdict = probes_page.verdicts(probes_page.rank_table(frame, P), probes_page.spectra(means)).iloc[0]
    assert verdict["low rank"] is None and "not decided" in probes_page.rank_sentence(verdict, ranks)


class Words:
    """A tokenizer of words: " aaaa", " aaab", ..."""

    def __len__(self) -> int:
        return 101

    def __call__(self, text, **options):
        return SimpleNamespace(input_ids=[0])

    def decode(self, ids):
        return "".join(" w" + "".join("abcdefghij"[int(d)] for d in f"{i:04d}") for i in ids)

    def batch_decode(self, ids):
        return list(map(self.decode, ids))


def test_words_of_a_direction_are_those_whose_unembedding_lies_nearest(tiny):
    model = replace(tiny("llama"), tokenizer=Words())
    direction = model.unembed.weight[37].detach() * model.final_norm.weight.detach()
    assert probes.words(model, direction, 1) == ["wadh"[:1] + "aadh"]


def test_readings_are_block_outputs_at_the_names_and_the_last_token(tiny):
    model, rng = tiny("llama", "float32"), np.random.default_rng(0)
    ends = [(1, 4), (2, 4), (1, 4)]  # two shapes of prompts, mixed
    prompts = tuple(Prompt("", tuple(rng.integers(101, size=7)), {"name_a": (a,), "name_b": (3, b)}) for a, b in ends)
    asked = probes.Asked("pair", pd.DataFrame({"item": range(3)}), (), ("own",), (prompts,), ())
    found = probes.read(model, asked, [0, 2])
    for index, prompt in enumerate(prompts):
        sites = [hooks.Site(layer, "resid") for layer in (0, 2)]
        with torch.no_grad(), hooks.capture(model, sites, [*ends[index], 6]) as seen:
            model.body(input_ids=torch.tensor([prompt.ids]))
        for place, site in enumerate(sites):
            kept = seen[site][0].numpy()
            np.testing.assert_allclose(found["names"][0, place, index], kept[:2].mean(0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found["last"][0, place, index], kept[2], rtol=1e-4, atol=1e-5)


def test_threshold_is_the_highest_permuted_accuracy_of_any_layer():
    about = {"folds": "people", "rank": -1, "kind": "pair", "target": "superset", "position": "last"}
    null = pd.DataFrame({"layer": [0, 0, 1, 1], "score": [0.1, 0.3, 0.4, 0.2], "labels": "permuted"} | about)
    assert (probes_page.nulls(null)["threshold"] == 0.4).all()


def test_baselines_find_what_is_in_the_metadata_or_the_letters_and_nothing_else():
    rng = np.random.default_rng(0)
    names = [f"{''.join(rng.choice(list('bdgklmnprst'), 6))}{CLASSES[i % 5][:3]}" for i in range(200)]
    rows = pd.DataFrame({"item": names, "unit": names, "superset": [CLASSES[i % 5] for i in range(200)]})
    own = made(rows.assign(people=[[n] for n in names]), kind="one-name")._replace(people=tuple((n,) for n in names))
    about = {"name": names, "century": 20, "gender": "male", "region": rng.permutation(rows["superset"])}
    seen = probes.seen_without_model(pd.DataFrame(about), own.people)
    score = pd.concat(probes.baseline_folds(own, seen, 0)).groupby("baseline")["score"].mean()
    assert score["letters"] > 0.9 and abs(score["metadata"] - 0.2) < 0.1
    known = pd.DataFrame(about | {"name": [f"x{n}" for n in names], "region": rows["superset"]})
    texts = [(f"x{n}"[:7],) for n in names]  # what tells the classes apart is cut off
    seen = probes.seen_without_model(known.assign(name=[text for (text,) in texts]), texts)
    frame = pd.concat(probes.baseline_folds(own, seen, 0))
    score = frame.groupby("baseline")["score"].mean()
    assert score["metadata"] == 1 and abs(score["letters"] - 0.2) < 0.1
    assert set(frame["fold"]) == set(own.rows["fold"]) and len(frame) == 400
    unknown = probes.seen_without_model(known, own.people)  # nobody is in the table
    score = pd.concat(probes.baseline_folds(own, unknown, 0)).groupby("baseline")["score"].mean()
    assert score["metadata"] == pytest.approx(0.2)


def test_a_probe_is_set_against_the_better_baseline_prompt_by_prompt(separable):
    pairs, people, near, far, table = separable
    rows = pd.concat([pairs.rows.assign(kind="pair"), people.rows.assign(kind="one-name")])
    rows = rows.assign(target="superset").drop(columns="superset")
    right = np.random.default_rng(0).random(len(rows)) < 0.5
    scores = pd.concat(
        [rows.assign(baseline="letters", score=right * 1.0), rows.assign(baseline="metadata", score=0.2)]
    )
    best = probes_page.baseline_table(scores, P).set_index(["kind", "baseline"])
    assert best["better"].tolist() == (best["estimate"] > 0.3).tolist() and best["better"].sum() == 2
    curve = probes_page.curves(table.assign(position="last"), scores, P)
    own = curve[curve["own"] & (curve["kind"] == "pair")].iloc[0]
    half = right[:80].mean()
    assert own["baseline"] == "letters" and own["beyond"] == pytest.approx(own["estimate"] - half)
    assert own["beyond_low"] < own["beyond"] < own["beyond_high"] and own["beyond_low"] > 0
    said = " ".join(probes_page.accuracy_sentences(curve, [3]))
    assert (
        "above the better baseline (letters), each layer's interval by itself, after 1 of 1 layers (from layer 3 to"
        in said
    )
    perfect = probes_page.curves(table, scores.assign(score=1.0), P)
    assert "after 0 of 1 layers." in probes_page.accuracy_sentences(perfect, [3])[0]


def test_clusters_follow_supersets_only_if_they_do():
    professions = [f"{name}{i}" for name in ("a", "b", "c") for i in range(4)]
    superset_of = {name: name[0] for name in professions}
    rng, centres = np.random.default_rng(0), np.repeat(10 * np.eye(3), 4, axis=0)
    grouped = pd.DataFrame(centres + rng.normal(size=(12, 3)), index=professions)
    found = probes_page.clusters(grouped, superset_of, 500, 0)
    assert (
        found["rand"] == 1
        and found["p"] < 0.01
        and "Clusters of the x means agree with the supersets more than chance"
        in probes_page.cluster_sentence(found, "x")
    )
    mixed = probes_page.clusters(grouped.set_axis(rng.permutation(professions)), superset_of, 500, 0)
    assert mixed["p"] > 0.05 and "not shown to agree" in probes_page.cluster_sentence(mixed, "x")


def test_selectivity_is_no_sum_that_roundings_could_spoil():
    row = {"target": "superset", "kind": "pair", "position": "last", "layer": 3, "true": 0.592, "control": 0.5655}
    table = pd.DataFrame([row | {"estimate": 0.0265, "low": -0.01, "high": 0.06}, row | {"layer": 4}])
    (said,) = probes_page.selectivity_sentence(table, 3)
    assert said.endswith("`last` | 0.592 | 0.566 | 0.026 [-0.010, 0.060] (not shown to be above 0) |")
    assert "=" not in said


def test_words_of_a_direction_are_found_where_a_token_alone_is_decoded_without_its_space(tiny):
    """As Llama 2's tokenizer decodes it."""
    model = replace(tiny("llama"), tokenizer=llama_tokenizer("both artists scientists ab"))
    token = model.tokenizer.get_vocab()["▁artists"]
    direction = model.unembed.weight[token].detach() * model.final_norm.weight.detach()
    assert probes.words(model, direction, 3) == ["artists", *probes.words(model, direction, 3)[1:]]
    assert sorted(probes.words(model, direction, 9)) == ["artists", "both", "scientists"]
    none = replace(model, tokenizer=llama_tokenizer("ab cd"))
    assert probes.words(none, direction, 3) == []


def test_of_given_pairs_the_page_says_whom_the_table_knows_and_no_selection():
    frame = pd.DataFrame({"labels": "true", "kind": "pair", "unit": ["q0", "q0", "q1"], "item": ["a", "b", "c"]})
    made, own = (probes_page.prompts_read(frame, given) for given in (False, True))
    assert made.startswith("3 pair prompts (2 quads), whose people the model tells apart by selection")
    assert own.startswith("3 pair prompts (2 quads) (those that share") and "selection" not in own

    def said(*names, given="mine.csv", question="professions"):
        slots = [f"{side}_{slot}" for side in ("clean", "corrupt") for slot in "abc"]
        pairs = pd.DataFrame([[*names[:2], "", *names[2:], ""]], columns=slots)
        topic = SimpleNamespace(attributes={"region": None, "century": None} if question else {})
        params = SimpleNamespace(pairs_file=given, topic=topic, question="professions")
        return probes_page.looked_up(
            SimpleNamespace(params=params, people_file=questions.ROOT / "data/people.csv", pairs=lambda: pairs)
        )

    known = ["William Cowper", "William Wordsworth", "Wislawa Szymborska"]
    start = "The region and century of the pairs' people are looked up by name in the table of people: it has "
    assert said(*known, known[0]) == [start + "3 of their 3 names."]
    assert said(*known, "No One") == [start + "3 of their 4 names; the other 1 counts as unknown (No One)."]
    (none,) = said("A", "B", "C", "D")
    assert none.startswith(f"{start}0 of their 4 names; all 4 count as unknown (A, B, C, D), so that the metadata")
    assert said("A", "B", "C", "D", given=None) == [] == said("A", "B", "C", "D", question=None)
    lone = probes_page.sentences(SimpleNamespace(dropped=()), None, True, ["x"])
    assert lone == ["No probe was fitted.", "x"]
