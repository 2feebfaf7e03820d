"""People and pairs: the table itself, fame and tokens, halves, and a user's own pairs (with a fake score)."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_score import fake_score, some_people
from hypothesis import given, settings
from hypothesis import strategies as st
from professions import QUESTION, SUPERSETS, TEMPLATES

from lib import data, tasks
from pipeline import population

ROOT = Path(__file__).resolve().parents[1]
PAIR = {
    "clean_a": "Brad Pitt", "clean_b": "Pablo Picasso", "corrupt_a": "Isaac Newton", "corrupt_b": "Albert Einstein",
    "answer": "artist", "corrupt_answer": "scientist",
}  # fmt: skip


@pytest.fixture(scope="session")
def people():
    return population.load_people(ROOT / "data" / "people.csv")


def test_the_table_has_what_was_asked_for(people):
    assert len(people) >= 1200
    assert people.profession.nunique() >= 15
    groups = people.groupby("superset")
    assert set(groups.groups) == set(SUPERSETS)
    assert groups.size().min() >= 220 and groups.profession.nunique().min() >= 2
    assert (groups.profession.value_counts() > 0).all()
    assert people.region.nunique() >= 5 and people.century.nunique() >= 10
    assert people.groupby("profession").superset.nunique().max() == 1
    assert people.equals(people.sort_values(["superset", "profession", "name"], ignore_index=True))
    assert people.name.str.lower().is_unique
    assert 50 <= people.two_supersets.sum() <= 300
    women = people.gender.eq("female").groupby(people.superset).sum()
    assert women.min() >= 50 and people.gender.eq("unknown").sum() < 10


def test_people_of_whom_it_is_not_clear_what_to_say_are_left_out(people):
    left = set(population.unambiguous(people).name)
    shared = {"Tom Watson", "Ronaldo", "Homer", "John Adams"}  # a namesake is about as well known
    both = {"Octavio Paz", "Gabriela Mistral", "Geoffrey Chaucer", "Angela Merkel", "Margaret Thatcher"}
    assert shared | both <= set(people.name) and not (shared | both) & left
    assert set(people[people.name.isin(both)].second_superset) == {"politician", "scientist"}
    assert len(left) == len(people) - (people.two_supersets | people.namesake.ne("")).sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"superset": "plumber"}, "line 3: superset 'plumber'"),
        ({"name": "Ann Lee"}, "name 'Ann Lee'"),
        ({"two_supersets": "maybe"}, "line 3: two_supersets is 'maybe'; allowed: true, false"),
        ({"century": "recent"}, "line 3: century is 'recent'; allowed: a whole number"),
        ({"century": "55"}, "line 3: century"),
        ({"gender": "f"}, "line 3: gender 'f'"),
        ({"two_supersets": "true"}, "line 3: 'Bob Ray': second_superset must be given"),
        ({"second_superset": "artist"}, "line 3: 'Bob Ray': second_superset must be given"),
        ({"two_supersets": "true", "second_superset": "athlete"}, "line 3: 'Bob Ray': .*differ from superset"),
    ],
)
def test_a_wrong_row_of_people_is_named(tmp_path, change, message):
    row = {"name": "Ann Lee", "profession": "poet", "superset": "writer", "two_supersets": "false"}
    row |= {"second_superset": "", "region": "Europe", "century": "20", "gender": "female", "namesake": ""}
    other = row | {"name": "Bob Ray", "profession": "boxer", "superset": "athlete"} | change
    pd.DataFrame([row, other]).to_csv(tmp_path / "people.csv", index=False)
    with pytest.raises(ValueError, match=message):
        population.load_people(tmp_path / "people.csv")


def test_wrong_files_of_people(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        population.load_people(tmp_path / "none.csv")
    pd.DataFrame({"name": [], "job": []}).to_csv(tmp_path / "people.csv", index=False)
    with pytest.raises(ValueError, match="missing columns .*'superset'.*unknown columns .'job'.*needed are name,"):
        population.load_people(tmp_path / "people.csv")
    pd.DataFrame(columns=list(population.schema_of(QUESTION).columns)).to_csv(tmp_path / "people.csv", index=False)
    with pytest.raises(ValueError, match="no rows"):
        population.load_people(tmp_path / "people.csv")


def test_fame_is_the_centred_log_probability_of_the_own_superset_over_templates(people, smollm_tokenizer):
    few = some_people(people, 6, 0)
    score = fake_score(smollm_tokenizer, few, skill=2.0)
    asked = population.ask_alone(few, smollm_tokenizer, score)
    frame = population.add_fame(asked)
    logits = np.zeros((len(few), 5))
    for template in (TEMPLATES[name] for name in QUESTION.fame):
        tokens = list(tasks.candidates(smollm_tokenizer, template)[1])
        prompts = [tuple(smollm_tokenizer(template.text.replace("{a}", name)).input_ids) for name in few.name]
        logits += score(prompts)[:, tokens].astype(float) / len(QUESTION.fame)
    assert np.allclose(np.stack(frame.evidence.to_list()), logits)
    own = few.superset.map(SUPERSETS.index).to_numpy()
    logits -= np.mean([logits[own == s].mean(0) for s in range(5)], axis=0)
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.allclose(np.exp(frame.fame), probability[np.arange(len(own)), own])
    assert (frame.known == (probability.argmax(1) == own)).all()
    assert (frame["first"] == np.array(SUPERSETS)[probability.argmax(1)]).all()
    # who has been asked is not asked again, and nothing changes by it
    prompts = []
    again = population.ask_alone(few, smollm_tokenizer, lambda own: prompts.extend(own) or score(own), False, asked[4:])
    assert len(prompts) == 4 * len(QUESTION.fame)
    assert np.allclose(np.stack(again["evidence"].to_list()), np.stack(asked["evidence"].to_list()))


def test_nan_logits_are_an_error(people, smollm_tokenizer):
    few = some_people(people, 2, 0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        population.ask_alone(few, smollm_tokenizer, lambda prompts: np.full((len(prompts), 30000), np.nan))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), strata=st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("12"))))
def test_halves_are_even_in_every_stratum(seed, strata):
    chosen = data.halves(strata, np.random.default_rng(seed))
    for stratum in set(strata):
        own = Counter(half for half, place in zip(chosen, strata, strict=True) if place == stratum)
        assert abs(own["discovery"] - own["confirmation"]) <= 1


def test_a_quad_gives_either_side_and_either_order():
    quad = {"quad_id": "q0", "half": "discovery", "task": "superset", "template": "profession_both", "bucket": "x|2|2"}
    quad |= {"superset": "artist", "other": "writer", "n_tokens_a": 2, "n_tokens_b": 2}
    quad |= {s: s.upper() for s in "abcd"} | {f"profession_{s}": f"job {s}" for s in "abcd"}
    quad |= {f"fame_{s}": -float(i) for i, s in enumerate("abcd")}
    pairs = population.pairs_of(pd.DataFrame([quad]), 4)
    names = pairs[["clean_a", "clean_b", "corrupt_a", "corrupt_b"]].agg("".join, axis=1)
    assert list(names) == ["ABCD", "DCBA", "CDAB", "BADC"]
    assert list(pairs.answer) == ["artist", "writer", "writer", "artist"]
    assert list(pairs.corrupt_answer) == ["writer", "artist", "artist", "writer"]
    assert list(pairs.fame_clean) == [-0.5, -2.5, -2.5, -0.5]
    assert list(pairs.clean_profession_a) == ["job a", "job d", "job c", "job b"]
    assert list(pairs.pair_id) == ["q0.0", "q0.1", "q0.2", "q0.3"]
    with pytest.raises(ValueError, match="1 to 4, got 5"):
        population.pairs_of(pd.DataFrame([quad]), 5)


def test_the_plans_six_items(smollm_tokenizer):
    table = data.load_pairs_file(ROOT / "data" / "odd_one_out.csv")
    odd = {
        tuple(row[f"{side}_{slot}"] for slot in "abc"): row[f"{side}_{row[answer]}"]
        for row in table.to_dict("records")
        for side, answer in (("clean", "answer"), ("corrupt", "corrupt_answer"))
    }
    assert odd == {
        ("Isaac Newton", "Brad Pitt", "Leonardo DiCaprio"): "Isaac Newton",
        ("Isaac Newton", "Albert Einstein", "Leonardo DiCaprio"): "Leonardo DiCaprio",
        ("Stephen King", "Mark Twain", "Usain Bolt"): "Usain Bolt",
        ("Lionel Messi", "Mark Twain", "Usain Bolt"): "Mark Twain",
        ("Barack Obama", "Bob Dylan", "George Bush"): "Bob Dylan",
        ("Barack Obama", "Bob Dylan", "John Lennon"): "Barack Obama",
    }
    fits, reasons = population.aligned(table, smollm_tokenizer)
    assert list(fits.pair_id) == ["plan.actors_scientists"]
    assert len(reasons) == 2 and "'Stephen King' has 2, 'Lionel Messi' has 4" in reasons[0]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_pairs_that_share_a_name_are_one_cluster(tmp_path, suffix):
    rows = [
        PAIR,
        PAIR | {"clean_a": "Bob Dylan"},
        PAIR | {f"{k}": f"X{k}" for k in ("clean_a", "clean_b", "corrupt_a")},
    ]
    rows[2]["corrupt_b"] = "Someone Else"
    # a chain: the fourth shares a name with the third only
    rows.append(
        {key: f"Y{key}" for key in PAIR} | {"clean_b": "Someone Else", "answer": "writer", "corrupt_answer": "artist"}
    )
    rows.append({key: f"Z{key}" for key in PAIR} | {"answer": "writer", "corrupt_answer": "artist"})
    path = tmp_path / f"mine{suffix}"
    table = pd.DataFrame(rows)
    table.to_csv(path, index=False) if suffix == ".csv" else table.to_parquet(path)
    read = data.load_pairs_file(path)
    assert [list(read.quad_id).index(quad) for quad in read.quad_id] == [0, 0, 2, 2, 4]
    assert read.groupby("quad_id").half.nunique().max() == 1 and set(read.half) == set(data.HALVES)
    assert set(read.task) == {"superset"} and set(read.template) == {"profession_both"} and read.pair_id.is_unique
    pd.testing.assert_frame_equal(read, data.load_pairs_file(path))


def test_given_quads_tasks_and_templates_are_kept(tmp_path, smollm_tokenizer):
    path = tmp_path / "mine.csv"
    own = PAIR | {"template": "{a} and {b}, both", "quad_id": "mine", "pair_id": "first"}
    pd.DataFrame([own, own | {"pair_id": "second", "template": ""}]).to_csv(path, index=False)
    read = data.load_pairs_file(path)
    assert list(read.quad_id) == ["mine", "mine"] and list(read.pair_id) == ["first", "second"]
    assert list(read.template) == ["{a} and {b}, both", "profession_both"]
    for row in read.to_dict("records"):
        tasks.make_pair(smollm_tokenizer, row)
    three = {"clean_c": "Leonardo DiCaprio", "corrupt_c": "Leonardo DiCaprio", "task": "odd_one_out"}
    pd.DataFrame([PAIR | three | {"answer": "a", "corrupt_answer": "c"}]).to_csv(path, index=False)
    assert list(data.load_pairs_file(path).template) == ["odd_one_out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "plumber"}, "line 2: answer 'plumber' is unknown; allowed: artist, scientist, athlete"),
        ({"corrupt_answer": ""}, "line 2: corrupt_answer '' is unknown"),
        ({"clean_b": ""}, "line 2: clean_b is empty"),
        ({"task": "riddle"}, "line 2: task 'riddle' is unknown; allowed: superset, bi_association"),
        ({"template": "professions"}, "line 2: unknown template 'professions'"),
        ({"task": "odd_one_out", "answer": "a", "corrupt_answer": "b"}, "line 2: clean_c is empty"),
        ({"hobby": "chess"}, r"unknown columns \['hobby'\].*needed are clean_a.*allowed besides task"),
        ({"quad_id": ""}, "line 2: quad_id '' is empty"),
    ],
)
def test_a_wrong_pairs_file_is_named(tmp_path, change, message):
    path = tmp_path / "mine.csv"
    pd.DataFrame([PAIR | change]).to_csv(path, index=False)
    with pytest.raises(ValueError, match=f"pairs_file mine.csv.*{message}"):
        data.load_pairs_file(path)


def test_wrong_pairs_files(tmp_path):
    path = tmp_path / "mine.csv"
    with pytest.raises(ValueError, match="does not exist"):
        data.load_pairs_file(path)
    pd.DataFrame([PAIR]).drop(columns="answer").to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"missing columns \['answer'\]"):
        data.load_pairs_file(path)
    pd.DataFrame(columns=list(PAIR)).to_csv(path, index=False)
    with pytest.raises(ValueError, match="has no rows"):
        data.load_pairs_file(path)
    pd.DataFrame([PAIR | {"pair_id": "p"}] * 2).to_csv(path, index=False)
    with pytest.raises(ValueError, match="line 3: pair_id 'p' is that of line 2, too"):
        data.load_pairs_file(path)
    path.write_text("")
    with pytest.raises(ValueError, match="mine.csv.*empty"):
        data.load_pairs_file(path)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="must end in .csv or .parquet"):
        data.load_pairs_file(tmp_path / "mine.txt")
