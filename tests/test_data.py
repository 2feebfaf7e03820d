"""People, quads, pairs: the table itself, and the builder's promises for any people and seed (with a fake score)."""

from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib import data, models, tasks
from lib.tasks import SUPERSETS

ROOT = Path(__file__).resolve().parents[1]
SLOW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PAIR = {
    "clean_a": "Brad Pitt", "clean_b": "Pablo Picasso", "corrupt_a": "Isaac Newton", "corrupt_b": "Albert Einstein",
    "answer": "artist", "corrupt_answer": "scientist",
}  # fmt: skip


@pytest.fixture(scope="session")
def people():
    return data.load_people(ROOT / "data" / "people.csv")


def fake_score(tokenizer, people, skill: float, seed: int = 0):
    """A stand-in for a model: each name in the prompt votes for its superset, noise of the prompt's own votes against.

    With a large `skill` every prompt is answered rightly; at 0 the answers are random. Logits depend on the ids alone.
    """
    superset = dict(zip(people.name, people.superset.map(SUPERSETS.index), strict=True))
    tokens = [tasks.candidates(tokenizer, tasks.TEMPLATES[name])[1] for name in ("profession_both", "bi_association")]
    width = max(map(max, tokens)) + 1

    def score(prompts):
        out = np.zeros((len(prompts), width), dtype=np.float32)
        for row, ids in zip(out, prompts, strict=True):
            text = tokenizer.decode(list(ids))
            logits = np.random.default_rng([seed, *ids]).normal(size=len(SUPERSETS))
            for name in (name for name in superset if name in text):
                logits[superset[name]] += skill
            for own in tokens:
                row[list(own)] = logits
        return out

    return score


def some_people(people, per_superset: int, seed: int) -> pd.DataFrame:
    """A random few of each superset, none of whose names is a part of another's."""
    ordinary = people[~people.two_supersets & (people.name.str.count(" ") == 1)]
    order = ordinary.iloc[np.random.default_rng(seed).permutation(len(ordinary))]
    return order.groupby("superset").head(per_superset).reset_index(drop=True)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"superset": "plumber"}, "row 3: superset 'plumber'"),
        ({"name": "Ann Lee"}, "name 'Ann Lee'"),
        ({"name": " Bob Ray"}, "row 3: name ' Bob Ray'"),
        ({"two_supersets": "maybe"}, "row 3: two_supersets is 'maybe'; allowed: true, false"),
        ({"century": "recent"}, "row 3: century is 'recent'; allowed: a whole number"),
        ({"century": "55"}, "row 3: century"),
        ({"two_supersets": "true"}, "row 3: 'Bob Ray': second_superset must be given"),
        ({"second_superset": "artist"}, "row 3: 'Bob Ray': second_superset must be given"),
        ({"two_supersets": "true", "second_superset": "athlete"}, "row 3: 'Bob Ray': .*differ from superset"),
    ],
)
def test_a_wrong_row_of_people_is_named(tmp_path, change, message):
    row = {"name": "Ann Lee", "profession": "poet", "superset": "writer", "two_supersets": "false"}
    row |= {"second_superset": "", "region": "Europe", "century": "20"}
    other = row | {"name": "Bob Ray", "profession": "boxer", "superset": "athlete"} | change
    pd.DataFrame([row, other]).to_csv(tmp_path / "people.csv", index=False)
    with pytest.raises(ValueError, match=message):
        data.load_people(tmp_path / "people.csv")


def test_wrong_files_of_people(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        data.load_people(tmp_path / "none.csv")
    pd.DataFrame({"name": [], "job": []}).to_csv(tmp_path / "people.csv", index=False)
    with pytest.raises(ValueError, match="missing: .*'superset'.*unknown: .'job'"):
        data.load_people(tmp_path / "people.csv")
    pd.DataFrame(columns=list(data.PEOPLE.columns)).to_csv(tmp_path / "people.csv", index=False)
    with pytest.raises(ValueError, match="no rows"):
        data.load_people(tmp_path / "people.csv")


def test_fame_is_the_centred_log_probability_of_the_own_superset(people, smollm_tokenizer):
    few = some_people(people, 6, 0)
    score = fake_score(smollm_tokenizer, few, skill=2.0)
    frame = data.add_fame(few, smollm_tokenizer, score)
    tokens = list(tasks.candidates(smollm_tokenizer, tasks.TEMPLATES["profession_is"])[1])
    prompts = [tuple(smollm_tokenizer(f"The profession of {name} is").input_ids) for name in few.name]
    logits = score(prompts)[:, tokens].astype(float)
    own = few.superset.map(SUPERSETS.index).to_numpy()
    logits -= np.mean([logits[own == s].mean(0) for s in range(5)], axis=0)
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.allclose(np.exp(frame.fame), probability[np.arange(len(own)), own])
    assert (frame.known == (probability.argmax(1) == own)).all()
    assert (frame["first"] == np.array(SUPERSETS)[probability.argmax(1)]).all()


def test_nan_logits_are_an_error(people, smollm_tokenizer):
    few = some_people(people, 2, 0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        data.add_fame(few, smollm_tokenizer, lambda prompts: np.full((len(prompts), 30000), np.nan))


@SLOW
@given(
    seed=st.integers(0, 2**32 - 1),
    skill=st.sampled_from([1.5, 3.0, 9.0]),
    per_quad=st.sampled_from([1, 2, 4]),
    tolerance=st.sampled_from([0.05, 0.3, 2.0]),
    template=st.sampled_from(["profession_both", "both_famous"]),
)
def test_quads_keep_their_promises(people, smollm_tokenizer, seed, skill, per_quad, tolerance, template):
    few = some_people(people, 30, seed)
    score = fake_score(smollm_tokenizer, few, skill, seed)
    options = {"quads_per_half": 10, "pairs_per_quad": per_quad, "fame_tolerance": tolerance, "min_bucket": 2}
    options |= {"seed": seed, "people_per_superset": 30}
    try:
        made, drops = data.build_quads(few, smollm_tokenizer, score, template, **options)
    except ValueError as error:
        assert "are left after filtering" in str(error) and "not known by the model" in str(error)
        return
    four = made[list("abcd")].to_numpy()
    assert len(set(four.ravel())) == four.size, "a person stands in two quads"
    superset = few.set_index("name").superset
    assert (made.a.map(superset) == made.superset).all() and (made.b.map(superset) == made.superset).all()
    assert (made.c.map(superset) == made.other).all() and (made.d.map(superset) == made.other).all()
    assert (made.superset != made.other).all()
    assert made.quad_id.is_unique and set(made.half) <= set(data.HALVES)
    assert ((made.fame_a - made.fame_c).abs() <= tolerance).all()
    assert ((made.fame_b - made.fame_d).abs() <= tolerance).all()
    assert made.groupby(["half", "bucket"]).size().min() >= 2
    # no superset pair has more than its share of the 20 quads that were asked for
    sides = Counter(frozenset(pair) for pair in zip(made.superset, made.other, strict=True))
    assert max(sides.values()) <= 2 and len(made) <= 20
    # every pair of every quad lines up, both orders and both sides; the pairs used are solved
    for row in data.pairs_of(made, 4).to_dict("records"):
        pair = tasks.make_pair(smollm_tokenizer, row)
        assert len(pair.clean.roles["name_a"]) == row["n_tokens_a"]
        assert row["bucket"] == f"{template}|{row['n_tokens_a']}|{row['n_tokens_b']}"
    used = data.add_margins(data.pairs_of(made, per_quad), smollm_tokenizer, score)
    assert (used.metric_clean > 0).all() and (used.metric_corrupt < 0).all()
    # the report adds up
    assert drops[0]["left"] + drops[0]["dropped"] == len(few)
    by_people = [drop for drop in drops if drop["unit"] == "people"]
    for one, other in zip(by_people, by_people[1:], strict=False):
        assert other["left"] + other["dropped"] == one["left"]
    assert drops[-1]["left"] == len(made)
    # the seed decides
    again, _ = data.build_quads(few, smollm_tokenizer, score, template, **options)
    pd.testing.assert_frame_equal(made, again)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(0, 14), min_size=5, max_size=5),
       wanted=st.integers(0, 3))  # fmt: skip
def test_choose_serves_superset_pairs_evenly_and_no_one_twice(seed, sizes, wanted):
    rng = np.random.default_rng(seed)
    rows = [
        {"superset": superset, "n_tokens": (int(k), int(k)), "fame": float(fame)}
        for superset, size in zip(SUPERSETS, sizes, strict=True)
        for k, fame in zip(rng.integers(2, 4, size), rng.normal(size=size), strict=True)
    ]
    people = pd.DataFrame(rows, columns=["superset", "n_tokens", "fame"])
    pairs = list(combinations(SUPERSETS, 2))
    planned = data.choose(people, dict.fromkeys(pairs, wanted), 0.5, np.random.default_rng(seed))
    used = [quad[slot] for quad in planned for slot in "abcd"]
    assert len(set(used)) == len(used)
    for quad in planned:
        four = people.loc[[quad[slot] for slot in "abcd"]]
        assert four.n_tokens.nunique() == 1
        assert list(four.superset) == [quad["superset"]] * 2 + [quad["other"]] * 2
        assert abs(four.fame.iloc[0] - four.fame.iloc[2]) <= 0.5 and abs(four.fame.iloc[1] - four.fame.iloc[3]) <= 0.5
    counts = Counter(frozenset((quad["superset"], quad["other"])) for quad in planned)
    assert all(counts[frozenset(pair)] <= wanted for pair in pairs)


def test_plenty_of_people_give_exactly_what_is_wanted():
    rows = [{"superset": s, "n_tokens": (2, 2), "fame": -0.01 * i} for s in SUPERSETS for i in range(40)]
    pairs = list(combinations(SUPERSETS, 2))
    planned = data.choose(pd.DataFrame(rows), dict.fromkeys(pairs, 5), 1.0, np.random.default_rng(0))
    counts = Counter(frozenset((quad["superset"], quad["other"])) for quad in planned)
    assert counts == dict.fromkeys(map(frozenset, pairs), 5)
    first_sides = Counter(quad["superset"] for quad in planned)
    assert min(first_sides.values()) >= 3  # either superset of a pair may be the a, b side


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
    pairs = data.pairs_of(pd.DataFrame([quad]), 4)
    names = pairs[["clean_a", "clean_b", "corrupt_a", "corrupt_b"]].agg("".join, axis=1)
    assert list(names) == ["ABCD", "DCBA", "CDAB", "BADC"]
    assert list(pairs.answer) == ["artist", "writer", "writer", "artist"]
    assert list(pairs.corrupt_answer) == ["writer", "artist", "artist", "writer"]
    assert list(pairs.fame_clean) == [-0.5, -2.5, -2.5, -0.5]
    assert list(pairs.clean_profession_a) == ["job a", "job d", "job c", "job b"]
    assert list(pairs.pair_id) == ["q0.0", "q0.1", "q0.2", "q0.3"]
    with pytest.raises(ValueError, match="1 to 4, got 5"):
        data.pairs_of(pd.DataFrame([quad]), 5)


def test_nothing_left_is_an_error_with_the_counts(people, smollm_tokenizer):
    few = some_people(people, 10, 0)
    hopeless = fake_score(smollm_tokenizer, few, skill=-50.0)
    with pytest.raises(ValueError, match="not known by the model: 50 people dropped, 0 left"):
        data.build_quads(few, smollm_tokenizer, hopeless, quads_per_half=2)
    able = fake_score(smollm_tokenizer, few, skill=50.0)
    with pytest.raises(ValueError, match="bucket under 99: .* quads dropped, 0 left"):
        data.build_quads(few, smollm_tokenizer, able, quads_per_half=2, min_bucket=99)
    with pytest.raises(ValueError, match="no match in token count and fame: 0 quads"):
        data.build_quads(few[few.superset == "artist"], smollm_tokenizer, able, quads_per_half=2)
    with pytest.raises(ValueError, match="template of two names"):
        data.build_quads(few, smollm_tokenizer, able, "odd_one_out")


def test_sampled_pairs_are_balanced_and_use_no_one_twice(people):
    sample = data.sample_pairs(people, 203, seed=3)
    assert len(sample) == 203
    assert sample.superset.value_counts().max() - sample.superset.value_counts().min() <= 1
    names = [*sample.a, *sample.b]
    assert len(set(names)) == len(names)
    flagged = set(people[people.two_supersets].name)
    assert not flagged & set(names)
    superset = people.set_index("name").superset
    assert (sample.a.map(superset) == sample.superset).all() and (sample.b.map(superset) == sample.superset).all()
    pd.testing.assert_frame_equal(sample, data.sample_pairs(people, 203, seed=3))
    assert not sample.equals(data.sample_pairs(people, 203, seed=4))
    with pytest.raises(ValueError, match="need .* people of superset 'artist'; there are"):
        data.sample_pairs(people, 5000)


@pytest.mark.parametrize("seed", [0, 7])
def test_odd_one_out_items_swap_one_name_and_stand_everywhere(people, smollm_tokenizer, seed):
    table = data.generate_odd_one_out(people, smollm_tokenizer, 60, seed)
    superset = people.set_index("name").superset
    assert len(table) == 60
    assert set(table.answer.value_counts()) == {20} and set(table.corrupt_answer.value_counts()) == {20}
    everyone = []
    for row in table.to_dict("records"):
        pair = tasks.make_pair(smollm_tokenizer, row)
        changed = [slot for slot in "abc" if row[f"clean_{slot}"] != row[f"corrupt_{slot}"]]
        assert len(changed) == 1 and pair.clean.roles["swapped"] == pair.clean.roles[f"name_{changed[0]}"]
        for side, answer in (("clean", "answer"), ("corrupt", "corrupt_answer")):
            classes = {slot: superset[row[f"{side}_{slot}"]] for slot in "abc"}
            others = [classes[slot] for slot in "abc" if slot != row[answer]]
            assert others[0] == others[1] != classes[row[answer]]
        everyone += sorted({row[f"{side}_{slot}"] for side in ("clean", "corrupt") for slot in "abc"})
    assert len(everyone) == len(set(everyone)) == 4 * 60
    assert table.groupby("half").size().to_dict() == {"confirmation": 30, "discovery": 30}
    with pytest.raises(ValueError, match="60 odd-one-out items were asked for; the people given allow"):
        data.generate_odd_one_out(some_people(people, 8, 0), smollm_tokenizer, 60)


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
    fits, reasons = data.aligned(table, smollm_tokenizer)
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
        ({"answer": "plumber"}, "row 2: answer 'plumber' is unknown; allowed: artist, scientist, athlete"),
        ({"corrupt_answer": ""}, "row 2: corrupt_answer '' is unknown"),
        ({"clean_b": ""}, "row 2: clean_b is empty"),
        ({"task": "riddle"}, "row 2: task 'riddle' is unknown; allowed: superset, bi_association"),
        ({"template": "professions"}, "row 2: unknown template 'professions'"),
        ({"task": "odd_one_out", "answer": "a", "corrupt_answer": "b"}, "row 2: clean_c is empty"),
        ({"hobby": "chess"}, r"unknown columns \['hobby'\].*needed are clean_a.*allowed besides task"),
        ({"quad_id": ""}, "row 2: quad_id '' is empty"),
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
    with pytest.raises(ValueError, match="row 3: pair_id 'p' is empty or not unique"):
        data.load_pairs_file(path)
    path.write_text("")
    with pytest.raises(ValueError, match="mine.csv.*empty"):
        data.load_pairs_file(path)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="must end in .csv or .parquet"):
        data.load_pairs_file(tmp_path / "mine.txt")


def test_the_bundled_model_gives_solved_quads(people, smollm):
    def score(prompts):
        return models.next_logits(smollm, prompts)

    options = {"quads_per_half": 4, "min_bucket": 2, "people_per_superset": 60}
    made, drops = data.build_quads(people, smollm.tokenizer, score, **options)
    assert len(made) >= 6 and set(made.half) == set(data.HALVES)
    used = data.add_margins(data.pairs_of(made), smollm.tokenizer, score)
    assert (used.metric_clean > 0).all() and (used.metric_corrupt < 0).all()
    assert len(data.keep_solved(used)) == len(used)
    known = next(drop for drop in drops if drop["filter"] == "not known by the model")
    assert 0.45 < known["left"] / (known["left"] + known["dropped"]) < 0.75  # 0.58 of the whole table
