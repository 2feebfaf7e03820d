"""Labels and the one-name probes: which tokens stand for a label, and what counts as right."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from professions import QUESTION, SUPERSETS, TEMPLATES

from lib import models, records, tasks
from pipeline import population
from pipeline.params import ROOT
from steps.retrieval_heads import one_name

IS = TEMPLATES["profession_is"]
IS_A = tasks.find_template("{a} is a", "one_name", "singular")


@pytest.fixture(scope="module")
def people() -> pd.DataFrame:
    return population.load_people(ROOT / "data" / "people.csv")


def test_labels_whole_first_or_not_scored(smollm_tokenizer):
    """Several forms: whole tokens win; a first token counts only while nothing else begins so."""
    of = {"novelist": "writer", "golfer": "athlete", "poet": "writer"}
    word = smollm_tokenizer.decode
    plural = one_name.labels_of(smollm_tokenizer, IS, of, ["plural"])
    assert plural.scored == ("first token", "first token", "whole")
    assert [word(list(ids)) for ids in plural.tokens] == [" novel", " golf", " poets"]
    both = one_name.labels_of(smollm_tokenizer, IS, of, ["plural", "singular"])
    assert both.scored == ("whole", "first token", "whole")
    assert [[word([i]) for i in ids] for ids in both.tokens] == [[" novelist"], [" golf"], [" poets", " poet"]]
    shared = one_name.labels_of(smollm_tokenizer, IS, of | {"golf coach": "athlete"}, ["plural", "singular"])
    assert shared.scored[1] == shared.scored[3] == "not: shares its first token"
    assert shared.tokens[1] == shared.tokens[3] == ()
    assert [word([i]) for i in both.candidates] == [f" {name}s" for name in SUPERSETS]


def test_a_label_that_is_a_candidate_is_not_scored(smollm_tokenizer):
    labels = one_name.labels_of(smollm_tokenizer, IS, {"artist": "artist", "poet": "writer"}, ["plural"])
    assert labels.tokens[0] == () and labels.scored[0] == one_name.NOT


def test_one_superset_per_profession(people):
    found = population.superset_by_profession(people)
    assert tuple(found) == QUESTION.labels and found["poet"] == "writer"
    twice = pd.DataFrame({"profession": ["poet", "poet"], "superset": ["writer", "artist"]})
    with pytest.raises(ValueError, match="'poet' stands under the supersets writer, artist"):
        population.superset_by_profession(twice)


def test_people_are_drawn_evenly(people):
    drawn = one_name.draw_people(people, 50, seed=3)
    assert drawn.superset.value_counts().to_dict() == dict.fromkeys(SUPERSETS, 10)
    assert not drawn.two_supersets.any() and drawn.name.is_unique
    assert drawn.equals(one_name.draw_people(people, 50, seed=3))
    assert set(drawn.name) != set(one_name.draw_people(people, 50, seed=4).name)
    few = people[(people.superset != "writer") | (people.index % 100 == 0)]
    left = int((few.superset == "writer").sum() - few[few.superset == "writer"].two_supersets.sum())
    assert (one_name.draw_people(few, 5000, 0).superset == "writer").sum() == left  # all there are, none twice


def test_articles():
    assert not one_name.can_follow(IS_A, "athlete") and one_name.can_follow(IS_A, "scientist")
    an = tasks.find_template("{a} is an", "one_name", "singular")
    assert one_name.can_follow(an, "athlete") and not one_name.can_follow(an, "scientist")
    assert one_name.can_follow(IS, "athlete") and one_name.can_follow(IS, "scientist")


@pytest.fixture
def biased(monkeypatch, smollm_tokenizer):
    """A model that knows everybody, by one logit, but likes two words ten times as much."""

    def make(people: pd.DataFrame, template: tasks.Template) -> SimpleNamespace:
        of = population.superset_by_profession(people)
        labels = one_name.labels_of(smollm_tokenizer, template, of, [template.form])
        asked = iter(people.itertuples())

        def logits(_, prompts):
            out = np.zeros((len(prompts), len(smollm_tokenizer)), dtype=np.float32)
            out[:, labels.candidates[0]] = out[:, labels.tokens[labels.words.index("chemist")][0]] = 10
            for row, person in zip(out, asked, strict=False):
                row[labels.candidates[SUPERSETS.index(person.superset)]] += 1
                row[labels.tokens[labels.words.index(person.profession)][0]] += 1
            return out

        monkeypatch.setattr(models, "next_logits", logits)
        return SimpleNamespace(tokenizer=smollm_tokenizer)

    return make


PEOPLE = pd.DataFrame(
    [
        ("Ann Poe", "poet", "writer"), ("Bo Pen", "novelist", "writer"), ("Cy Lab", "chemist", "scientist"),
        ("Di Sky", "astronomer", "scientist"), ("Ed Oil", "painter", "artist"), ("Flo Key", "actor", "artist"),
    ],
    columns=["name", "profession", "superset"],
)  # fmt: skip


def test_centring_takes_a_preference_for_words_away(biased):
    """Raw scores follow the liked words; centred ones follow the people."""
    of = population.superset_by_profession(PEOPLE)
    frame = one_name.probe(biased(PEOPLE, IS), PEOPLE, [IS], of)
    records.conform(frame, one_name.PROBES)
    assert frame.superset_right.tolist() == [0, 0, 0, 0, 1, 1]
    assert frame.profession_right.tolist() == [0, 0, 1, 0, 0, 0]
    assert frame.within_right.tolist() == [1, 1, 1, 0, 1, 1]
    for kind in one_name.KINDS:
        assert (frame[f"{kind}_right_centred"] == 1).all()
    assert frame.superset_chance.unique() == 1 / 5
    assert frame.profession_chance.unique() == 1 / 6 and frame.within_chance.unique() == 1 / 2
    assert frame.scored.tolist() == ["whole", "first token", "whole", "whole", "whole", "whole"]
    total = np.log(49152 - 4 + 2 * np.exp(10) + 2 * np.exp(1))  # Ann Poe: two liked words, two of her own
    first = frame.iloc[0]
    assert first["logsumexp"] == pytest.approx(total, abs=1e-6)
    assert first["profession_log_probability"] == pytest.approx(1 - total, abs=1e-6)
    assert first["superset_probability"] == pytest.approx((np.exp(10) + np.e + 3) / np.exp(total), rel=1e-6)
    assert first["profession_probability"] == pytest.approx((np.exp(10) + np.e + 3) / np.exp(total), rel=1e-6)
    assert first["first_token_probability"] == pytest.approx(1 / np.exp(total), rel=1e-6)
    assert frame.attrs["facts"]["professions"][int(np.argmax(first["profession_logits"]))] == "chemist"


def test_after_an_article_only_what_can_follow_is_scored(biased):
    of = population.superset_by_profession(PEOPLE)
    frame = one_name.probe(biased(PEOPLE, IS_A), PEOPLE, [IS_A], of).set_index("name")
    records.conform(frame.reset_index(), one_name.PROBES)
    assert frame.superset_right.isna().tolist() == [False] * 4 + [True] * 2  # artists
    assert frame.profession_right.isna().tolist() == [False] * 3 + [True, False, True]  # astronomer, actor
    assert frame.superset_chance["Ann Poe"] == 1 / 3 and frame.profession_chance["Ann Poe"] == 1 / 4
    assert frame.superset_right["Cy Lab"] == 1  # artist, which the model likes more, cannot follow
    assert np.isnan(frame.superset_chance["Ed Oil"])


def test_probe_reads_the_model(smollm, people):
    """Logits and rights of the real model, recomputed from a plain pass."""
    own = one_name.draw_people(people, 10)
    of = population.superset_by_profession(people)
    frame = one_name.probe(smollm, own, [IS, IS_A], of)
    assert len(records.conform(frame, one_name.PROBES)) == 20
    last = frame.iloc[13]
    ids = smollm.tokenizer(f"{last['name']} is a").input_ids
    logits = models.next_logits(smollm, [ids])[0]
    words = [word for word in of if word[0] not in "aeiou"]
    first = {word: logits[smollm.tokenizer(f" {word}").input_ids[0]] for word in words}
    stored = dict(zip(of, last["profession_logits"], strict=True))
    assert all(stored[word] == pytest.approx(first[word], abs=1e-4) for word in words)
    assert np.isnan(stored["actor"])
    assert last["profession_right"] == (max(first, key=first.get) == last["profession"])
    assert last["top_token"] == smollm.tokenizer.decode([int(logits.argmax())])


def test_probe_needs_one_name(smollm, people):
    with pytest.raises(ValueError, match="of task 'superset'; a probe needs one_name"):
        one_name.probe(smollm, people, [TEMPLATES["profession_both"]], {})
