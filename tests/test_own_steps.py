"""What the later steps make of a researcher's own pairs and of a small question of their own."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_own_pairs import FOUR, HEADER, ONE, TWO, begin, lines
from test_questions import MINE, written

from lib import data, questions, records, tasks
from pipeline import keys, params, population
from pipeline.declaration import EFFECTS
from pipeline.params import ParameterError
from pipeline.step import StepError, single_sites, with_gap
from steps.baselines import measure as baselines
from steps.generality import name_rule_prompts
from steps.generality import page as generality_page
from steps.neurons import features
from steps.registry import PLAN
from steps.retrieval_heads import measure as retrieval_heads
from steps.subspace import measure as subspace
from steps.subspace import probes, probes_page

ROOT = Path(__file__).resolve().parents[1]
BARRED = "<|user|> {a} and {b} are both"


@pytest.fixture
def with_tokenizer(monkeypatch, smollm_tokenizer):
    """The tokenizer is loaded once for all tests."""
    monkeypatch.setattr("lib.models.tokenizer", lambda *_: smollm_tokenizer)


@pytest.fixture(scope="module")
def people() -> pd.DataFrame:
    return population.load_people(ROOT / "data" / "people.csv")


# --- step 01


def test_answers_of_several_tokens_are_refused_before_the_model_is_loaded(tmp_path, with_tokenizer):
    (tmp_path / "q").mkdir()
    classes = {"animal": "animal", "fruit": "piece of fruit"}
    asked = {"question": str(written(tmp_path / "q", classes=classes)), "template": None, "baselines": {}}
    step = begin(tmp_path, None, "baselines", pairs_file=None, people_file=None, **asked)
    with pytest.raises(ParameterError, match="question q: template 'both': the answer ' piece of fruits' is .* tokens"):
        baselines.accuracy_of(step)
    assert "model" not in step.__dict__
    rows = lines(*["dog,cat,apple,orange,animal,fruit"] * 2, "cat,dog,apple,orange,animal,fruit")
    step = begin(tmp_path, rows, people_file=None, **asked)
    with pytest.raises(StepError, match="' piece of fruits' is") as caught:
        step.pairs()
    assert str(caught.value).count("piece of fruits") == 1, "it is wrong with no row, but with the question"


def test_a_small_table_is_asked_about_as_far_as_it_goes(people, smollm_tokenizer):
    few = population.unambiguous(people).groupby("superset").head(9)
    own = params.validate(PLAN.sections, "baselines", params.load_profile("smoke") | {"accuracy_pairs": 200})
    drawn = baselines.items(few, smollm_tokenizer, tasks.find_template("profession_both"), own)
    assert len(drawn) == 20 and drawn["superset"].value_counts().eq(4).all(), "pairs of each superset, as many of each"
    one = few[(few["superset"] != "writer") | (few["name"] == few[few["superset"] == "writer"]["name"].iloc[0])]
    with pytest.raises(ParameterError, match="'writer' has one person in all"):
        baselines.items(one, smollm_tokenizer, tasks.find_template("profession_both"), own)


def test_a_name_that_merges_with_one_template_is_left_out_of_it(tmp_path, people, smollm):
    (tmp_path / "mine.csv").write_text(lines(ONE, ONE.replace("Brad Pitt", "Fela Jr."), TWO))
    own = params.validate(PLAN.sections, "baselines", params.load_profile("smoke"))
    template = tasks.find_template("{a}, like {b}, is one of the")
    asked = baselines.measure(smollm, people, template, own, data.load_pairs_file(tmp_path / "mine.csv"))
    assert len(asked) == 4 and not asked["names"].str.contains("Fela").any()
    assert asked.attrs["log"] == [
        "1 prompts left out: the token '.,' holds part of the name 'Fela Jr.' and of the text around it; use another "
        "template"
    ]
    (tmp_path / "q").mkdir()
    two = pd.DataFrame({"name": ["Fela Jr.", "dog"], "superset": ["fruit", "animal"]})
    how = {"question": str(written(tmp_path / "q"))}  # which asks "The {a}, like many other"
    told = population.ask_alone(two, smollm.tokenizer, baselines.score(smollm), **how)
    assert told["name"].tolist() == ["dog"] and len(told["evidence"].iloc[0]) == 2


def test_odd_ones_out_are_asked_in_the_template_that_was_named(people, smollm_tokenizer, monkeypatch):
    monkeypatch.setattr(baselines, "answered", lambda model, pairs, own: pairs)
    monkeypatch.setattr(baselines, "right_signed", lambda pairs, noise: pairs)
    own, text = params.load_profile("smoke"), "Q: Which one is odd: {a}, {b}, {c}?\nA:"
    own = params.validate(PLAN.sections, "baselines", own | {"task": "odd_one_out", "template": text})
    model = SimpleNamespace(tokenizer=smollm_tokenizer, noise=0.0)
    assert set(baselines.make_pairs(model, people, None, own)["template"]) == {text}


# --- what may be set beside own pairs


def test_findings_and_records_of_other_pairs_are_not_set_beside_these(tmp_path, with_tokenizer):
    begin(tmp_path, lines(ONE), "necessity").write_findings({"sites": []})
    frame = dict.fromkeys(EFFECTS, "x") | {"component": "head", "position": "last", "half": "discovery"}
    frame = pd.DataFrame([frame | {"pair_id": "p0000"}])
    asked = keys.ingredients(PLAN["sufficiency"], begin(tmp_path, step="sufficiency").params)
    records.write(tmp_path / "out" / "sufficiency.parquet", frame, {"ingredients": asked}, schema=None)
    same, other = begin(tmp_path, step="generality"), begin(tmp_path, lines(TWO), "generality")
    assert same.find("necessity") and other.find("necessity"), "of this model and task"
    assert other.beside("necessity") is None and len(single_sites(other)) == 0
    (tmp_path / "mine.csv").write_text(lines(ONE))
    assert same.beside("necessity") and len(single_sites(begin(tmp_path, step="generality"))) == 1


def test_pairs_without_a_gap_are_one_sentence():
    row = {"half": "discovery", "pair_id": "p", "logit_diff_clean": 1.0, "logit_diff_corrupt": 0.0}
    good, bad = pd.DataFrame([row]), pd.DataFrame([row, row | {"pair_id": "q", "logit_diff_clean": -2.5}])
    assert with_gap(good) is good
    with pytest.raises(StepError, match=r"the 2 pairs of the discovery half have no gap above 0 .*\(-1.5 logits"):
        with_gap(bad)


# --- steps 06 to 09


def test_names_that_line_up_in_pairs_alone_are_left_out_of_prompts_of_one_name(tmp_path, with_tokenizer, people):
    """At the beginning of a prompt a name has other tokens than behind a space."""
    words = begin(tmp_path, lines(ONE)).tokenizer
    sizes = {n: tuple(len(words(text, add_special_tokens=False).input_ids) for text in (n, f" {n}"))
             for n in people["name"].head(60)}  # fmt: skip
    a, c = next((a, c) for a, c in combinations(sizes, 2) if sizes[a][0] == sizes[c][0] and sizes[a][1] != sizes[c][1])
    row = lines(f"{a},Bill Murray,{c},Albert Einstein,artist,scientist")
    step = begin(tmp_path, row, "retrieval_heads", template="both_famous", slice_sites="21.6")
    found = retrieval_heads.subject(step)
    assert [pair.pair_id for pair in found.at_names] == ["p0000"]
    assert [pair.pair_id for pair in found.one_name] == ["p0000b"]


def test_probes_are_fitted_on_both_sides_of_given_pairs_as_far_as_there_are_enough(tmp_path, with_tokenizer):
    shared = [ONE, TWO, FOUR[3], "Brad Pitt,Bill Murray,James Watson,Edwin Hubble,artist,scientist"]
    step = begin(tmp_path, lines(*shared), "subspace", probe_people=20, probe_folds=2)
    (pairs, people), missing = probes.kinds_of(step)
    assert missing == [] and pairs.rows["superset"].value_counts().to_dict() == {"artist": 3, "scientist": 3}
    assert pairs.rows["unit"].nunique() == 2, "quads that share a name, directly or through others, are one unit"
    assert people.targets[0] == "superset" and len(people.prompts) == len(step.params.probe_questions)
    step = begin(tmp_path, lines(*FOUR), "subspace", probe_people=2, probe_folds=5)
    kinds, missing = probes.kinds_of(step)
    assert kinds == [] and [why.partition(":")[0] for why in missing] == ["Not made", "Not made"]
    assert "probes of superset from pair prompts: 0 classes have at least 5 quads" in missing[0]


def test_a_page_without_probes_says_so_and_draws_none():
    m = SimpleNamespace(accuracies=pd.DataFrame(), spectra=pd.DataFrame(), probe_layers=[3], dropped=("Not made: x.",))
    assert probes_page.numbers(m, None) is None
    assert probes_page.sentences(m, None) == ["No probe was fitted.", "Not made: x."]
    drawn = ("accuracy_figure", "selectivity_figure", "rank_figure", "verdict_table", "means_figure", "cluster_figure")
    assert [getattr(probes_page, name)(None) for name in drawn] == [None] * 6
    assert probes_page.found(None)["rank"]["verdicts"] == [] == probes_page.found(None)["probes"]["accuracy"]


def test_of_two_classes_no_rank_and_no_clusters_are_spoken_of():
    about = {"target": "superset", "kind": "pair", "position": "last", "layer": 3, "cap": 1, "low rank": None}
    assert probes_page.rank_sentence(pd.Series(about), pd.DataFrame()).endswith(
        "has two classes, and so rank one whatever it is."
    )
    two = pd.DataFrame([[1.0], [-1.0]], index=["animal", "fruit"])
    assert probes_page.clusters(two, {"animal": "animal", "fruit": "fruit"}, 10, 0) is None


def test_a_template_may_hold_bars():
    frame = {"variant": [f"{BARRED}|1|", "random|1|2"], "direction": "denoise"}
    frame |= {f"logit_diff_{run}": 0.0 for run in ("before", "after", "clean", "corrupt")}
    found = subspace.parsed(pd.DataFrame(frame))
    assert found[["method", "k", "part"]].to_numpy().tolist() == [[BARRED, 1, ""], ["random", 1, "2"]]


def test_where_nobody_is_known_no_rule_is_read(monkeypatch, smollm):
    monkeypatch.setattr(name_rule_prompts, "known_people", lambda *_: pd.DataFrame(columns=["name", "superset"]))
    own = params.validate(PLAN.sections, "generality", params.load_profile("smoke"))
    step = SimpleNamespace(params=own, model=smollm, rng=lambda purpose: np.random.default_rng(0))
    found = name_rule_prompts.two_known_people(step)
    assert found.empty and found["prompt"].nunique() == 0
    nobody = population.add_fame(pd.DataFrame(columns=["name", "superset", "evidence"]))
    assert nobody[nobody["known"]].empty


def test_without_attributes_no_pair_is_matched_in_none(tmp_path):
    about = {"own": True, "answer": "animal", "corrupt_answer": "fruit", "order": "", "solved": True, "matched": True}
    frame = pd.DataFrame([about | {"clean_profession_a": "", "clean_profession_b": "", "template": "both"}])
    assert generality_page.divided(frame, questions.load(str(written(tmp_path))))["matching"] == {}
    assert list(generality_page.divided(frame, questions.load())["matching"]) == ["matched in region and century"]


def test_an_own_template_is_among_those_that_features_are_trained_on(smollm_tokenizer):
    pairs = pd.DataFrame([dict(zip(HEADER.split(","), ONE.split(","), strict=True)) | {"half": "discovery"}])
    own = params.load_profile("smoke") | {"template": "{a} met {b}, and both are famous", "sae_prompts": 900}
    step = SimpleNamespace(
        model=SimpleNamespace(tokenizer=smollm_tokenizer), people_file="data/people.csv", pairs=lambda: pairs,
        params=params.validate(PLAN.sections, "neurons", own), rng=lambda purpose: np.random.default_rng(0),
    )  # fmt: skip
    texts = [smollm_tokenizer.decode(ids) for ids in features.sentences(step)]
    assert "Brad Pitt met Bill Murray, and both are famous" in texts
    asked = params.load_profile("smoke") | {"task": "bi_association", "template": None, "attributes": ["school"]}
    step.params = params.validate(PLAN.sections, "neurons", asked)
    texts = [smollm_tokenizer.decode(ids) for ids in features.sentences(step)]
    assert any("Same school" in text for text in texts) and not any("Same profession" in text for text in texts)


def test_controls_of_a_question_without_any_are_empty(tmp_path):
    own = params.validate(
        PLAN.sections, "generality", {"profile": "x", "model": "m", "question": str(written(tmp_path))}
    )
    assert population.controls_of(SimpleNamespace(params=own)).empty and own.topic.classes.keys() == {*MINE["classes"]}
