"""Quads, odd-one-out items, samples: the builder's promises for any people and seed (with a fake score)."""

from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_score import fake_score, some_people
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from professions import QUESTION, SUPERSETS

from lib import data, models, tasks
from pipeline import population
from steps.baselines import quads
from steps.baselines.quads import Options

ROOT = Path(__file__).resolve().parents[1]
SLOW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def people():
    return population.load_people(ROOT / "data" / "people.csv")


def built(people, tokenizer, score, options, noise=0.0):
    """Quads as step 01 makes them: people drawn, asked about alone, put together."""
    asked = population.ask_alone(quads.to_ask(people, options)[0], tokenizer, score)
    return quads.build_quads(people, asked, tokenizer, score, options, noise)


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
    options = Options(template, "superset", 10, per_quad, tolerance, min_bucket=2, seed=seed)
    try:
        made, drops = built(few, smollm_tokenizer, score, options)
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
    # every pair of every quad lines up, both orders and both sides; the quads' gaps have the right sign
    for row in population.pairs_of(made, 4).to_dict("records"):
        pair = tasks.make_pair(smollm_tokenizer, row)
        assert len(pair.clean.roles["name_a"]) == row["n_tokens_a"]
        assert row["bucket"] == f"{template}|{row['n_tokens_a']}|{row['n_tokens_b']}"
    used = population.add_margins(population.pairs_of(made, per_quad), smollm_tokenizer, score)
    assert ((used.logit_diff_clean - used.logit_diff_corrupt).groupby(used.quad_id).mean() > 0).all()
    # matched is what it says
    about = few.set_index("name")
    same = {
        column: np.logical_and.reduce(
            [made[x].map(about[column]).eq(made[y].map(about[column])) for x, y in ("ac", "bd")]
        )
        for column in ("region", "century", "gender")
    }
    assert (made.matched == (same["region"] & same["century"])).all() and (made.same_gender == same["gender"]).all()
    # the report adds up
    assert drops[0]["left"] + drops[0]["dropped"] == len(few)
    by_people = [drop for drop in drops if drop["unit"] == "people"]
    for one, other in zip(by_people, by_people[1:], strict=False):
        assert other["left"] + other["dropped"] == one["left"]
    assert drops[-1]["left"] == len(made)
    # the seed decides
    again, _ = built(few, smollm_tokenizer, score, options)
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
    people = people.assign(region="Europe", century=20, gender="male")
    planned = quads.choose(people, dict.fromkeys(pairs, wanted), 0.5, np.random.default_rng(seed), QUESTION.shared)
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
    alike = {"n_tokens": (2, 2), "region": "Europe", "century": 20, "gender": "male"}
    rows = [{"superset": s, "fame": -0.01 * i} | alike for s in SUPERSETS for i in range(40)]
    pairs = list(combinations(SUPERSETS, 2))
    planned = quads.choose(pd.DataFrame(rows), dict.fromkeys(pairs, 5), 1.0, np.random.default_rng(0), QUESTION.shared)
    counts = Counter(frozenset((quad["superset"], quad["other"])) for quad in planned)
    assert counts == dict.fromkeys(map(frozenset, pairs), 5)
    first_sides = Counter(quad["superset"] for quad in planned)
    assert min(first_sides.values()) >= 3  # either superset of a pair may be the a, b side


def test_the_most_alike_are_matched_first_and_fame_still_decides():
    def side(*rows: tuple) -> pd.DataFrame:
        return pd.DataFrame(rows, columns=["fame", "region", "century", "gender"])

    one = side(
        (0.0, "Asia", 20, "female"), (0.0, "Asia", 20, "male"), (0.0, "Africa", 19, "male"), (9.0, "x", 1, "male")
    )
    other = side(
        (0.1, "Europe", 19, "male"), (0.2, "Asia", 20, "female"), (0.2, "Asia", 20, "unknown"), (5.0, "x", 1, "male")
    )
    found = quads.matches(one, other, 0.25, np.random.default_rng(0), QUESTION.shared)
    assert found == [(0, 1), (1, 2), (2, 0)]  # of one gender, then of one region and century, then anyone as famous
    assert len(quads.matches(one, other, 0.05, np.random.default_rng(0), QUESTION.shared)) == 0


def test_a_quad_is_kept_for_its_gap_and_solved_by_its_answers():
    def pairs(*rows: tuple) -> pd.DataFrame:
        return pd.DataFrame(
            rows, columns=["quad_id", "metric_clean", "metric_corrupt", "logit_diff_clean", "logit_diff_corrupt"]
        )

    made = pairs(
        ("answered", 1, -1, 3, -3), ("answered", 2, -2, 4, -4),
        ("told apart", -2, -5, 1, 0.5), ("told apart", -2, -5, 0.2, 0.4),  # gaps of 0.5 and -0.2: 0.15 on average
        ("half", 1, -1, 3, -3), ("half", -1, -1, 0.5, -0.5),
        ("wrong", 1, -1, 0.1, 0.4), ("wrong", 1, -1, 0.1, 0.1),
    )  # fmt: skip
    assert set(population.right_signed(made, 0.0)["quad_id"]) == {"answered", "told apart", "half"}
    assert set(population.right_signed(made, 0.2)["quad_id"]) == {"answered", "half"}
    assert population.solved(made).tolist() == [True, True, False, False, False, False, True, True]


def test_quads_before_any_selection_are_of_other_people_and_nothing_is_asked(people, smollm_tokenizer):
    taken = set(people[people.superset == "artist"].name.head(400))
    made = quads.unselected_quads(people, smollm_tokenizer, Options(quads_per_half=20, seed=3), taken)
    four = made[list("abcd")].to_numpy()
    assert len(made) == 40 and len(set(four.ravel())) == 160 and not set(four.ravel()) & taken
    assert made.groupby("half").size().to_dict() == {"confirmation": 20, "discovery": 20}
    assert made[[f"fame_{slot}" for slot in "abcd"]].isna().all(axis=None) and not made.matched.all()
    for row in population.pairs_of(made, 2).to_dict("records"):
        tasks.make_pair(smollm_tokenizer, row)


def test_nothing_left_is_an_error_with_the_counts(people, smollm_tokenizer):
    few = some_people(people, 10, 0)
    hopeless = fake_score(smollm_tokenizer, few, skill=-50.0)
    with pytest.raises(ValueError, match="not known by the model: 50 people dropped, 0 left"):
        built(few, smollm_tokenizer, hopeless, Options(quads_per_half=2))
    able = fake_score(smollm_tokenizer, few, skill=50.0)
    with pytest.raises(ValueError, match="bucket under 99: .* quads dropped, 0 left"):
        built(few, smollm_tokenizer, able, Options(quads_per_half=2, min_bucket=99))
    with pytest.raises(ValueError, match="no match in token count and fame: 0 quads"):
        built(few[few.superset == "artist"], smollm_tokenizer, able, Options(quads_per_half=2))
    with pytest.raises(ValueError, match="template of two names"):
        built(few, smollm_tokenizer, able, Options("odd_one_out"))


def test_sampled_pairs_are_balanced_and_use_no_one_twice(people):
    sample = quads.sample_pairs(people, 203, seed=3)
    assert len(sample) == 203
    assert sample.superset.value_counts().max() - sample.superset.value_counts().min() <= 1
    names = [*sample.a, *sample.b]
    assert len(set(names)) == len(names)
    flagged = set(people[people.two_supersets].name)
    assert not flagged & set(names)
    superset = people.set_index("name").superset
    assert (sample.a.map(superset) == sample.superset).all() and (sample.b.map(superset) == sample.superset).all()
    pd.testing.assert_frame_equal(sample, quads.sample_pairs(people, 203, seed=3))
    assert not sample.equals(quads.sample_pairs(people, 203, seed=4))
    with pytest.raises(ValueError, match="need .* people of superset 'artist'; there are"):
        quads.sample_pairs(people, 5000)


@pytest.mark.parametrize("seed", [0, 7])
def test_odd_one_out_items_swap_one_name_and_stand_everywhere(people, smollm_tokenizer, seed):
    table = quads.generate_odd_one_out(people, smollm_tokenizer, 60, seed)
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
    few = quads.generate_odd_one_out(some_people(people, 8, 0), smollm_tokenizer, 60)
    assert 0 < len(few) < 60 and few["pair_id"].is_unique, "as many as the people allow"
    with pytest.raises(ValueError, match="60 odd-one-out items were asked for; the people given allow none"):
        quads.generate_odd_one_out(some_people(people, 1, 0), smollm_tokenizer, 60)


@pytest.mark.long
def test_the_bundled_model_gives_quads_with_a_gap(people, smollm):
    def score(prompts):
        return models.next_logits(smollm, prompts)

    made, drops = built(people, smollm.tokenizer, score, Options(quads_per_half=6, min_bucket=2))
    assert len(made) >= 6 and set(made.half) == set(data.HALVES)
    used = population.add_margins(population.pairs_of(made), smollm.tokenizer, score)
    assert len(population.right_signed(used, smollm.noise)) == len(used)
    known = next(drop for drop in drops if drop["filter"] == "not known by the model")
    assert 0.45 < known["left"] / (known["left"] + known["dropped"]) < 0.75  # 0.58 of the whole table
