"""Questions as data: both that ship are sound, a fault in one is said in a sentence, and no module knows a class."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from professions import QUESTION

from lib import questions, tasks
from pipeline import params, population
from steps.registry import PLAN

ROOT = Path(__file__).resolve().parents[1]
CITIES = questions.load("cities")
MINE = {
    "title": "Which kind are two things?",
    "introduction": "A paragraph.",
    "items": "things.csv",
    "columns": {"name": "thing", "superset": "kind"},
    "words": {"people": "things", "superset": "animal kind"},
    "classes": ["animal", "fruit"],
    "templates": {
        "both": {"task": "superset", "text": "The {a} and the {b} are both"},
        "one": {"task": "one_name", "text": "The {a}, like many other"},
    },
    "fame": ["one"],
    "alone": "one",
    "defaults": {"templates": ["both"]},
}


def written(folder: Path, **changed) -> Path:
    """A folder with a question of two classes, some keys changed (None: left out)."""
    (folder / "things.csv").write_text("thing,kind\ndog,animal\ncat,animal\napple,fruit\norange,fruit\n")
    given = {key: value for key, value in (MINE | changed).items() if value is not None}
    (folder / "question.yaml").write_text(yaml.safe_dump(given))
    return folder


def test_every_template_of_the_questions_has_answers_of_one_token(smollm_tokenizer):
    for question in (QUESTION, CITIES):
        for template in question.texts.values():
            if template.task != "odd_one_out" and template.form != "capitalised":
                names, tokens = tasks.candidates(smollm_tokenizer, template)
                assert names == question.supersets and len(set(tokens)) == len(names) >= 4
            prompt = tasks.make_prompt(
                smollm_tokenizer, template, ["Vienna", "Lisbon", "Prague"][: len(template.slots)]
            )
            assert prompt.roles["last"] == (len(prompt.ids) - 1,)
    ids = tasks.candidates(smollm_tokenizer, CITIES.texts["cities_in"])[1]
    assert smollm_tokenizer.batch_decode([[token] for token in ids]) == [" Europe", " Asia", " Africa", " America"]


def test_the_table_of_cities_has_what_quads_need():
    table = population.load_people(ROOT / CITIES.file("items"), "cities")
    assert table["superset"].value_counts().min() >= 120 and table.columns[:3].tolist() == [
        "name",
        "superset",
        "profession",
    ]
    of = table.set_index("name")
    assert of.loc["Lagos", ["superset", "profession", "language", "capital"]].tolist() == [
        "Africa",
        "Nigeria",
        "English",
        "no",
    ]
    assert of.loc["Geneva", "language"] == "French" and of.loc["Hanoi", "capital"] == "yes"
    assert table.groupby("profession")["superset"].nunique().max() == 1
    assert not (table["two_supersets"].any() or table["namesake"].any())  # columns that the table leaves out


def test_a_question_of_ones_own_is_a_folder(tmp_path, smollm_tokenizer):
    mine = str(written(tmp_path))
    given = {"profile": "mine", "model": "a/b", "question": mine}
    own = params.validate(PLAN.sections, "generality", given)
    assert own.template == "both" and own.templates == ("both",) and own.topic.supersets == ("animal", "fruit")
    table = population.load_people(own.people_file, mine)
    assert table["name"].tolist() == ["dog", "cat", "apple", "orange"]
    assert table["profession"].tolist() == table["superset"].tolist()  # it has no finer labels
    row = {"pair_id": "p", "quad_id": "q", "half": "discovery", "task": "superset", "template": "both"}
    row |= {"clean_a": "dog", "clean_b": "cat", "corrupt_a": "apple", "corrupt_b": "orange"}
    row |= {"answer": "animal", "corrupt_answer": "fruit"}
    pair = tasks.make_pair(smollm_tokenizer, row, question=mine)
    assert pair.candidates == ("animal", "fruit") and smollm_tokenizer.decode(pair.clean_tokens[0]) == " animals"
    for task in ("bi_association", "odd_one_out"):
        with pytest.raises(params.ParameterError, match=f"task = '{task}': question .* has no template of it"):
            params.validate(PLAN.sections, "generality", given | {"task": task})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classes": ["animal"]}, "classes: .*at least 2"),
        ({"classes": None}, "classes: Field required"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"fame": ["both"]}, "fame: template 'both' is of task superset, not one_name"),
        ({"alone": "two"}, "unknown template 'two'; allowed: both, one"),
        ({"items": "none.csv"}, "items: there is no file .*none.csv"),
        ({"match": ["size"]}, "match: no attribute is called size"),
        ({"templates": {"one": MINE["templates"]["one"]}}, "templates: none is of task superset"),
        ({"templates": MINE["templates"] | {"both": {"task": "superset", "text": "{b} and {a}"}}}, "in this order"),
        ({"templates": MINE["templates"] | {"both": {"task": "guess", "text": "{a} {b}"}}}, "templates.both.task: "),
        ({"attributes": {"size": {"answers": {"large": "large"}}}}, "attributes.size.answers: .*at least 2"),
    ],
)  # fmt: skip
def test_a_fault_in_a_question_is_one_sentence_with_its_file(tmp_path, changed, message):
    with pytest.raises(ValueError, match=rf"question\.yaml: .*({message})"):
        questions.load(str(written(tmp_path, **changed)))


def test_a_key_given_twice_and_a_question_that_is_not_there_are_refused(tmp_path):
    path = written(tmp_path) / "question.yaml"
    path.write_text(path.read_text() + "alone: both\n")
    with pytest.raises(ValueError, match="'alone' stands there twice"):
        questions.load(str(tmp_path))
    with pytest.raises(params.ParameterError, match="question = 'towns'.*there are cities, professions"):
        params.validate(PLAN.sections, "baselines", {"model": "a/b", "question": "towns"})


def test_a_changed_question_is_read_again_and_is_in_the_data_key(tmp_path):
    from pipeline import keys

    given = {"profile": "mine", "model": "a/b", "question": str(written(tmp_path))}
    step = PLAN["baselines"]

    def key() -> dict:
        return keys.ingredients(step, params.validate(PLAN.sections, "baselines", given))["inputs"]

    before = key()
    written(tmp_path, introduction="Another paragraph.", title="Another", words={"people": "towns"})
    assert key() == before  # what only the book says
    written(tmp_path, plurals={"x": "y"})
    again = key()
    assert again["question"] != before["question"] and again["people_file"] == before["people_file"]


def test_pages_speak_in_the_questions_words():
    said = "A person of a superset, and people of two; `superset` stays. People differ, as supersets do."
    there = "A city of a continent, and cities of two; `superset` stays. Cities differ, as continents do."
    assert CITIES.reworded(said) == there and QUESTION.reworded(said) == said
    mine = CITIES.model_copy(update={"words": {"superset": "animal kind"}})
    assert mine.reworded("a superset") == "an animal kind"


def test_no_module_knows_a_class_of_either_question():
    words = {
        word for question in (QUESTION, CITIES) for name in question.supersets for word in (name, question.plural(name))
    }
    known = re.compile(rf"\b({'|'.join(sorted(words))})\b")
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for room in ("lib", "pipeline", "steps")
        for path in sorted((ROOT / room).rglob("*.py"))
        for word in known.findall(path.read_text(encoding="utf-8"))
    ]
    assert found == [] and known.search("every artist writes")


def test_the_planner_counts_a_question_of_four_classes(tmp_path):
    shutil.copytree(ROOT / "data" / "questions" / "cities", tmp_path / "cities")
    own = params.validate(PLAN.sections, "baselines", params.load_profile("cities-quick"))
    from pipeline.assumed import pair_of

    pairs = [pair_of(own.topic.find(own.template), quad, 0, "discovery", [1, 1]) for quad in range(6)]
    assert {pair.candidates for pair in pairs} == {CITIES.supersets}
    assert len({(pair.answer, pair.corrupt_answer) for pair in pairs}) == 6  # every two classes in turn
    assert pd.Series([pair.answer for pair in pairs]).max() < 4
