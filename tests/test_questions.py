"""Questions as data: both that ship are sound, a fault in one is said in a sentence, and no module knows a class."""

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from professions import QUESTION

from lib import questions, tasks
from lib.errors import Refusal
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
        ({"classes": ["animal", "fruit", "animal"]}, "classes: 'animal' stands there twice"),
        ({"classes": {"animal": "animal", "fruit": "animal"}}, "classes: 'animal' is the answer of two classes"),
        ({"classes": ["animal", "C++"]}, r"classes: 'C\+\+' cannot name a class"),
        ({"classes": ["animal", "All"]}, "classes: 'All' cannot name a class"),
        ({"classes": [1, 2]}, "classes: "),
        ({"classes": ["animal", "fruit", "tool", "car"]}, "classes: no row of things.csv is of car, tool"),
        ({"name": "mine"}, "name: the folder's name is the question's; take this key out"),
        ({"fame": []}, "fame: .*at least 1"),
        ({"alone": "{a} is a"}, "alone: '{a} is a' is a text; give it a name under templates"),
        ({"probes": [["plural", "both"]]}, "probes: template 'both' is of task superset, not one_name"),
        ({"columns": {"name": "thing", "superset": "class"}}, r"items things.csv: missing columns \['class'\]"),
        ({"attributes": {"size": {}}}, r"items things.csv: missing columns \['size'\]"),
        ({"attributes": {"kind": {}}}, "attributes: kind is a column of its own already"),
        ({"attributes": {"namesake": {}}}, "attributes: namesake is a column of its own already"),
        ({"attributes": {"size": {"only": {"age": ["1"]}}}}, "attributes.size.only: no attribute is called age"),
        (
            {"attributes": {"size": {"allowed": ["S", "M"], "answers": {"S": "small", "L": "large"}}}},
            "attributes.size.answers: no item can be L",
        ),
        ({"attributes": {"age": {"whole": [0, 9], "answers": {"1": "one", "2": "two"}}}}, "age.answers: no item can"),
        (
            {"templates": MINE["templates"] | {"list": {"task": "bi_association", "text": "{examples} {a} {b}?"}}},
            "templates.list lists attributes, and `listed` has none",
        ),
        ({"controls": "things.csv"}, r"controls things.csv: missing columns \['name'\], unknown columns \['thing'\]"),
        ({"sentences": "question.yaml"}, "sentences: .*question.yaml must be a CSV file"),
    ],
)  # fmt: skip
def test_a_fault_in_a_question_is_one_sentence_with_its_file(tmp_path, changed, message):
    with pytest.raises(ValueError, match=rf"question\.yaml: .*({message})"):
        questions.load(str(written(tmp_path, **changed)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "kind,text\nperson,I saw {a}.\nplace,It rains.\n",
            "sentences, line 3: kind 'place' is unknown; allowed: person",
        ),
        ("kind,text\nthing,It rains.\n", "sentences, line 2: text 'It rains.' is empty, or lacks the slot {a}"),
        ("kind,text\ngeneral,It rains, it pours.\n", "sentences s.csv, line 2: column 3 holds 'it pours.'"),
        ("kind,text\n", "sentences s.csv has no rows"),
    ],
)
def test_a_fault_in_a_questions_sentences_is_named_before_anything_is_asked(tmp_path, content, message):
    (tmp_path / "s.csv").write_text(content)
    with pytest.raises(params.ParameterError, match=re.escape(message)):
        params.validate(PLAN.sections, "baselines", given_of(written(tmp_path, sentences="s.csv")))


def given_of(folder: Path, **more) -> dict:
    return {"profile": "mine", "model": "a/b", "question": str(folder)} | more


TABLES = {
    "as Excel writes it": "\ufeffthing,kind\r\ndog,animal\r\napple,fruit\r\n",
    "spaces and empty lines": "thing , kind\n\n dog, animal\n,\napple ,fruit\n",
    "columns in another order, quoted": 'kind,thing\nanimal,"dog"\n"fruit", "apple"\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_items_is_read_as_it_was_meant(tmp_path, name):
    folder = written(tmp_path)
    (folder / "things.csv").write_bytes(TABLES[name].encode())
    table = population.load_people(folder / "things.csv", str(folder))
    assert table[["name", "superset", "profession"]].to_numpy().tolist() == [
        ["dog", "animal", "animal"], ["apple", "fruit", "fruit"],
    ]  # fmt: skip
    assert not table["two_supersets"].any() and questions.load(str(folder)).labels == ()


def test_names_of_any_script_are_items_and_what_is_no_name_is_refused_with_its_line(tmp_path, smollm_tokenizer):
    folder, names = (
        written(tmp_path),
        ["São Tomé", "北京", "القاهرة", "Zürich", "St. John's", "a b  c", "“dog”", "x\u200by"],
    )
    rows = [f"{name},{'animal' if number % 2 else 'fruit'}" for number, name in enumerate(names)]
    (folder / "things.csv").write_text("\n".join(["thing,kind", *rows[:5]]))
    table = population.load_people(folder / "things.csv", str(folder))
    counted = population.add_tokens(table, smollm_tokenizer, questions.load(str(folder)).texts["both"])
    assert counted["name"].tolist() == names[:5] and all(min(own) > 0 for own in counted["n_tokens"])
    (folder / "things.csv").write_text("\n".join(["thing,kind", *rows]))
    with pytest.raises(ValueError) as caught:
        population.load_people(folder / "things.csv", str(folder))
    said = str(caught.value).split("\n")
    assert [line.split(":")[0].strip() for line in said[1:]] == ["line 7", "line 8", "line 9"]
    assert "two spaces" in said[1] and "quotation marks" in said[2] and "cannot be seen" in said[3]


def test_a_label_of_two_classes_is_refused_before_anything_is_asked(tmp_path):
    folder = written(tmp_path)
    (folder / "things.csv").write_text("thing,kind,profession\ndog,animal,pet\napple,fruit,pet\n")
    step = SimpleNamespace(people_file=folder / "things.csv", params=SimpleNamespace(question=str(folder)))
    with pytest.raises(Refusal, match="things.csv: profession 'pet' stands under the supersets animal"):
        population.people_of(step)


def test_a_parquet_table_of_people_may_have_empty_cells(tmp_path):
    table = pd.DataFrame({"thing": ["dog", "apple"], "kind": ["animal", "fruit"], "namesake": [None, "a company"]})
    table.to_parquet(tmp_path / "more.parquet")
    read = population.load_people(tmp_path / "more.parquet", str(written(tmp_path)))
    assert read["namesake"].tolist() == ["", "a company"] and len(population.unambiguous(read)) == 1


@pytest.mark.parametrize("step", PLAN.names)
def test_a_question_without_defaults_asks_with_its_own_templates_in_every_step(tmp_path, step):
    more = {"also": {"task": "superset", "text": "What the {a} and the {b} share is that they are both"}}
    folder = written(tmp_path, defaults=None, templates=MINE["templates"] | more)
    own = params.validate(PLAN.sections, step, given_of(folder))
    known = {template.name for template in own.topic.texts.values()}
    for key in ("templates", "order_templates", "probe_questions"):
        assert set(getattr(own, key, ())) <= known, key
    assert own.template == "also" and getattr(own, "probe_template", "both") == "both", "the first, and the last"
    assert getattr(own, "placebo_attributes", ()) == (), "there is no attribute to make placebo pairs by"
    assert own.topic.probes == (("plural", "one"),)


@pytest.mark.parametrize(
    ("changed", "given", "message"),
    [
        ({}, {"placebo_attributes": ["size"]}, "placebo_attributes = 'size': attributes of question .*: none"),
        ({"defaults": {"tempaltes": ["both"]}}, {}, r"defaults: no step has a parameter 'tempaltes' \(did you mean"),
        ({"defaults": {"templates": ["common"]}}, {}, "parameter templates = 'common'.*unknown template"),
    ],
)
def test_what_a_question_does_not_have_cannot_be_asked_for(tmp_path, changed, given, message):
    with pytest.raises(params.ParameterError, match=message):
        params.validate(PLAN.sections, "baselines", given_of(written(tmp_path, **changed), **given))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("probe_template", "common", "parameter probe_template = 'common'.*unknown template"),
        ("probe_questions", ["both"], "probe_questions = 'both': this template is of task superset, not one_name"),
        ("probe_questions", ["What {b} does is"], "must hold the slots {a} once each"),
    ],
)
def test_templates_of_probes_are_checked_at_once(tmp_path, key, value, message):
    with pytest.raises(params.ParameterError, match=message):
        params.validate(PLAN.sections, "subspace", given_of(written(tmp_path), **{key: value}))


def test_where_the_folder_lies_and_how_it_is_named_does_not_count(tmp_path, monkeypatch):
    from pipeline import keys

    (tmp_path / "mine").mkdir()
    written(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    found = []
    for name in ("mine", "./mine/", str(tmp_path / "mine")):
        own = params.validate(PLAN.sections, "baselines", given_of(name))
        found.append(keys.hash_json(keys.ingredients(PLAN["baselines"], own)))
        assert keys.same_subject(keys.about(params.validate(PLAN.sections, "necessity", given_of("mine"))), own)
    assert len(set(found)) == 1
    other = params.validate(PLAN.sections, "baselines", given_of("cities"))
    assert not keys.same_subject(keys.about(other), own)


def test_a_changed_table_is_seen_in_the_same_session(tmp_path):
    folder = written(tmp_path)
    (folder / "things.csv").write_text("thing,kind,profession\ndog,animal,pet\napple,fruit,pome\n")
    assert questions.load(str(folder)).labels == ("pet", "pome")
    (folder / "things.csv").write_text("thing,kind,profession\ndog,animal,pet\norange,fruit,citrus\n")
    os.utime(folder / "things.csv", ns=(1, 1))
    assert questions.load(str(folder)).labels == ("citrus", "pet")


def test_the_question_is_looked_for_once_for_all_pairs(tmp_path, smollm_tokenizer, monkeypatch):
    """Each look takes 0.1 ms: ten seconds of 100,000 pairs."""
    loads, load, mine = [], questions.load, str(written(tmp_path))
    load(mine)
    monkeypatch.setattr(questions, "load", lambda name="professions": loads.append(name) or load(name))
    row = {"quad_id": "q", "half": "discovery", "task": "superset", "template": "both", "answer": "animal"}
    row |= {"clean_a": "dog", "clean_b": "cat", "corrupt_a": "apple", "corrupt_b": "orange", "corrupt_answer": "fruit"}
    table = pd.DataFrame([row | {"pair_id": f"p{i}"} for i in range(50)])
    kept, _ = population.aligned(table, smollm_tokenizer, question=mine)
    assert len(kept) == 50 and sum(isinstance(name, str) for name in loads) == 1


def test_a_key_given_twice_and_a_question_that_is_not_there_are_refused(tmp_path):
    path = written(tmp_path) / "question.yaml"
    path.write_text(path.read_text() + "alone: both\n")
    with pytest.raises(ValueError, match="'alone' stands there twice"):
        questions.load(str(tmp_path))
    with pytest.raises(params.ParameterError, match="question = 'towns'.*there are cities, planted, professions"):
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
