"""The numbers of step 01, worked out by hand: what is asked, how an answer is scored, accuracy, and what it means."""

from math import comb, log, sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from professions import QUESTION, SUPERSETS

from lib import data, models, tasks
from pipeline import population
from steps.baselines import measure, page
from steps.baselines.measure import Baselines
from steps.baselines.quads import sample_pairs

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"model": "m", "level": 0.9, "seed": 7, "template": "profession_both", "min_pairs": 3}
PARAMS = Baselines(**SETTINGS)
Z = 1.6448536269514722  # of a normal, for 90% in the middle


@pytest.fixture(scope="module")
def people() -> pd.DataFrame:
    return population.load_people(ROOT / "data" / "people.csv")


# --- accuracy


def answers(right: list[bool], item: list[int] | None = None, **more: object) -> pd.DataFrame:
    """Prompts, one an item unless said otherwise, with whether they were answered right."""
    shared = {"task": "superset", "template": "profession_both", "superset": "artist"} | more
    return pd.DataFrame({"correct": right, "item": range(len(right)) if item is None else item}).assign(**shared)


def wilson(p: float, n: float) -> list[float]:
    """Wilson's interval at 90%, as in his formula."""
    middle, reach = p + Z**2 / (2 * n), Z * sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return [(middle - reach) / (1 + Z**2 / n), (middle + reach) / (1 + Z**2 / n)]


def tail(k: int, n: int, chance: float) -> float:
    """The probability of at least k of n by chance."""
    return sum(comb(n, i) * chance**i * (1 - chance) ** (n - i) for i in range(k, n + 1))


def test_accuracy_has_wilsons_interval_and_the_binomial_test():
    (row,) = measure.accuracies(answers([True] * 10 + [False] * 15), PARAMS, ["task", "template"]).to_dict("records")
    assert (row["task"], row["template"], row["prompts"]) == ("superset", "profession_both", 25)
    assert row["estimate"] == pytest.approx(10 / 25)
    # by hand: (0.4 + 2.7055 / 50 +- 1.6449 sqrt(0.24 / 25 + 2.7055 / 2500)) / (1 + 2.7055 / 25)
    assert wilson(0.4, 25) == pytest.approx([0.2564, 0.5632], abs=1e-4)
    assert [row["low"], row["high"]] == pytest.approx(wilson(0.4, 25))
    assert row["chance"] == 1 / 5 and row["p"] == pytest.approx(tail(10, 25, 0.2)) and tail(10, 25, 0.2) < 0.02
    assert row["above"]


def test_chance_is_a_third_where_three_names_are_asked_about():
    frame = answers([True] * 10 + [False] * 15, task="odd_one_out", template="odd_one_out")
    (row,) = measure.accuracies(frame, PARAMS, ["task", "template"]).to_dict("records")
    assert row["chance"] == 1 / 3 and row["p"] == pytest.approx(tail(10, 25, 1 / 3)) and not row["above"]
    for task in ("superset", "bi_association", "one_name"):
        (row,) = measure.accuracies(answers([True] * 5, task=task), PARAMS, ["task"]).to_dict("records")
        assert row["chance"] == 1 / 5


def test_just_above_chance_depends_on_the_level():
    frame = answers([True] * 8 + [False] * 17)
    p = tail(8, 25, 0.2)
    assert 0.1 < p < 0.12
    above = [
        measure.accuracies(frame, Baselines(**SETTINGS | {"level": level}), ["task", "template"])["above"][0]
        for level in (0.85, 0.9)
    ]
    assert above == [True, False]


def test_prompts_of_one_item_count_for_what_they_add():
    # 20 items of two prompts, both right in ten and both wrong in ten: the second adds nothing. The variance between
    # items is 20 / 19 x 20 x 1 / 40^2 = 1 / 76, the binomial one 0.25 / 40 = 1 / 160: 40 / (160 / 76) = 19 trials
    frame = answers([True, True] * 10 + [False, False] * 10, item=[i // 2 for i in range(40)])
    (row,) = measure.accuracies(frame, PARAMS, ["task", "template"]).to_dict("records")
    assert (row["estimate"], row["prompts"]) == (0.5, 40)
    assert [row["low"], row["high"]] == pytest.approx(wilson(0.5, 19))


def test_accuracy_of_few_items_has_no_interval_and_of_all_right_a_bounded_one():
    (few,) = measure.accuracies(answers([True] * 19), PARAMS, ["task", "template"]).to_dict("records")
    assert (few["estimate"], few["low"], few["high"], few["above"]) == (1.0, None, None, True)
    (all_right,) = measure.accuracies(answers([True] * 20), PARAMS, ["task", "template"]).to_dict("records")
    assert [all_right["low"], all_right["high"]] == pytest.approx([1 / (1 + Z**2 / 20), 1.0])
    (none,) = measure.accuracies(answers([False] * 20), PARAMS, ["task", "template"]).to_dict("records")
    assert (none["estimate"], none["p"], none["above"]) == (0.0, 1.0, False)


def test_accuracies_are_told_apart_in_the_order_they_come():
    frame = pd.concat(
        [answers([True, False], template="both_famous"), answers([True, True], superset="writer")], ignore_index=True
    )
    by_template = measure.accuracies(frame, PARAMS, ["task", "template"])
    assert by_template[["template", "estimate"]].to_numpy().tolist() == [["both_famous", 0.5], ["profession_both", 1.0]]
    by_superset = measure.accuracies(frame, PARAMS, ["task", "superset"])
    assert by_superset[["superset", "estimate", "prompts"]].to_numpy().tolist() == [
        ["artist", 0.5, 2],
        ["writer", 1.0, 2],
    ]


# --- what the model can do


def measured(**rows: tuple) -> pd.DataFrame:
    """Rows of accuracies: name -> (task, template, estimate, above)."""
    keys = ["task", "template", "estimate", "above"]
    return pd.DataFrame(list(rows.values()), columns=keys).assign(low=0.25, high=0.75, prompts=40, chance=0.2)


def test_a_task_is_done_above_chance_and_the_profiles_own_with_enough_pairs():
    accuracy = measured(
        own=("superset", "profession_both", 0.5, True),
        other=("superset", "both_famous", 0.9, False),  # not the profile's template: nothing is said of it
        bad=("odd_one_out", "odd_one_out", 0.4, False),
        good=("one_name", "profession_is", 0.6, True),
    )
    can = page.abilities(accuracy, pd.DataFrame({"pair_id": ["a", "b", "c"]}), PARAMS)
    value = "0.50 [0.25, 0.75] (40 prompts of template `profession_both`) against a chance of 0.20"
    assert can == {
        "superset": {
            "able": True,
            "above": True,
            "why": f"accuracy {value}. 3 pairs are left, whose quads have a gap of the right sign",
        },
        "odd_one_out": {
            "able": False,
            "above": False,
            "why": "accuracy 0.40 [0.25, 0.75] (40 prompts of template `odd_one_out`) against a chance of 0.20: not "
            "above chance with 90% confidence",
        },
        "one_name": {
            "able": True,
            "above": True,
            "why": "accuracy 0.60 [0.25, 0.75] (40 prompts of template `profession_is`) against a chance of 0.20",
        },
    }
    few = page.abilities(accuracy, pd.DataFrame({"pair_id": ["a", "b"]}), PARAMS)["superset"]
    left = "fewer than the 3 asked for (min_pairs): give more people, or a smaller min_pairs"
    why = f"accuracy {value}. 2 pairs are left, whose quads have a gap of the right sign, {left}"
    assert few == {"able": False, "above": True, "why": why}
    assert page.verdicts({"superset": few}) == {
        "superset": f"The model can do, but has too few pairs for, `superset`: {why}."
    }
    none = page.abilities(accuracy, None, PARAMS)["superset"]
    assert none["able"] is False and none["why"].endswith(
        f". 0 pairs are left, whose quads have a gap of the right sign, {left}"
    )
    wrong = page.abilities(accuracy.assign(above=False), pd.DataFrame({"pair_id": ["a"] * 9}), PARAMS)["superset"]
    assert wrong["able"] is False and "pairs with a gap" not in wrong["why"]
    given = page.abilities(accuracy, None, PARAMS.model_copy(update={"pairs_file": "mine.csv"}))
    whose = "(not of the given pairs, whose names do not fit it)"
    assert {name for name, own in given.items() if whose in own["why"]} == {"odd_one_out"}


@pytest.mark.parametrize(
    ("above", "template"),
    [
        ([False, True], "bi_association_capitalised"),
        ([True, False], "bi_association"),
        ([True, True], "bi_association"),
        ([False, False], "bi_association"),
    ],
)
def test_another_task_is_known_by_the_first_template_that_works(above, template):
    names = ("bi_association", "bi_association_capitalised")
    rows = {name: ("bi_association", name, 0.5, good) for name, good in zip(names, above, strict=True)}
    can = page.abilities(measured(**rows), None, PARAMS)["bi_association"]
    assert can["able"] is any(above) and f"`{template}`" in can["why"]


def asked(logits: list[list[float]], answers_: list[str], **more: object) -> pd.DataFrame:
    """Prompts with the logits of the five words, a person of each superset in turn."""
    own = [SUPERSETS.index(name) for name in answers_]
    right = [row[index] == max(row) for row, index in zip(logits, own, strict=True)]
    frame = answers(right).assign(superset=answers_, answer=answers_, logits=[np.array(row) for row in logits])
    return frame.assign(rank=0, probability=0.1, candidate_probability=0.2, label_probability=0.1).assign(**more)


def test_a_word_that_is_liked_whatever_the_name_is_taken_off():
    # every artist's and writer's prompt likes " artists" by 5; the names move their own word by 1
    liked = np.array([5.0, 0, 0, 0, 0])
    logits = [liked + np.eye(5)[0], liked + np.eye(5)[0], liked + np.eye(5)[4], liked + np.eye(5)[0]]
    frame = asked(logits, ["artist", "artist", "writer", "writer"])
    assert frame["correct"].tolist() == [True, True, False, False]
    # means of the classes: artists (6, .., 0), writers (5.5, .., 0.5): 5.75 and 0.25 are taken off
    assert page.centred(frame, SUPERSETS).tolist() == [True, True, True, False]
    table = page.ability(measure.Measured(frame, frame, None, None, [], ""), PARAMS).set_index(["superset", "scoring"])
    assert table.loc[("writer", "raw"), "estimate"] == 0 and table.loc[("writer", "centred"), "estimate"] == 0.5
    assert table.loc[("all", "raw"), "estimate"] == 0.5 and table.loc[("all", "centred"), "estimate"] == 0.75


def test_the_place_of_the_right_word_is_in_the_whole_vocabulary():
    frame = asked([[3.0, 0, 0, 0, 0]] * 3, ["artist"] * 3, rank=[0, 6, 8], candidate_probability=[0.04, 0.05, 0.06])
    table = page.ability(measure.Measured(frame, frame, None, None, [], ""), PARAMS)
    assert set(table["place"]) == {7} and table["candidate_probability"].tolist() == pytest.approx([0.05] * 6)
    first = table[(table["scoring"] == "first word") & (table["superset"] == "all")].iloc[0]
    assert first["estimate"] == pytest.approx(1 / 3)
    said = page.ability_sentences(table, QUESTION)
    assert "comes first in 0.33 of these prompts, so what it says next is most often another" in said["vocabulary"]
    assert "Its place is 7 in the median, and the five words together have 5% of the prob" in said["vocabulary"]
    assert "comes first in 1.00 (artists)" in said["classes"]


def pairs_with(gaps: list[float], **more: object) -> pd.DataFrame:
    """A pair of each quad with these gaps."""
    half = ["discovery", "confirmation"] * len(gaps)
    frame = pd.DataFrame({"quad_id": [f"q{i}" for i in range(len(gaps))], "half": half[: len(gaps)]})
    return frame.assign(logit_diff_clean=gaps, logit_diff_corrupt=0.0, **more)


def test_the_gap_is_told_for_every_way_of_selecting():
    kept = pairs_with(
        [1.0, 2.0, 6.0], solved=[False, False, True], matched=[True, True, False], same_gender=[True, False, True]
    )
    before = pairs_with([-1.0, 3.0], solved=False, matched=False, same_gender=False)
    m = measure.Measured(pd.DataFrame(), pd.DataFrame(), kept, before, [], "")
    table = page.selection(m, PARAMS).set_index("pairs of")
    assert table["estimate"].to_dict() == {
        "before any selection": 1.0, "kept": 3.0, "kept and solved": 6.0, "kept and matched": 1.5,
        "kept, matched, of one gender": 1.0,
    }  # fmt: skip
    assert table["quads"].tolist() == [2, 3, 1, 2, 1]
    assert table.loc["before any selection", "right"] == 0.5 and table.loc["kept", "solved"] == pytest.approx(1 / 3)
    left, gap, unselected, matched = page.pair_sentences(m, table.reset_index(), QUESTION)
    assert left.startswith("3 pairs (2 discovery quads and 1 confirmation quad) are left")
    assert "1 of 3 quads is solved" in gap and "The gap of these is 6.00 logits" in gap
    assert unselected.startswith(
        "Before any selection, the gap is 1.00 logits on average (2 quads), and it is above zero in 50%"
    )
    assert matched.startswith("In 2 of 3 quads") and "in 1 in gender" in matched


def test_pairs_kept_for_their_gap_do_not_show_that_there_is_one():
    """A random network prefers some words: half of its quads have a gap of the right sign, and those alone are kept."""
    accuracy = measured(own=("superset", "profession_both", 0.31, True))
    kept = pairs_with([2.0, 3.0, 4.0], solved=False, matched=False, same_gender=False)

    def able(before: list[float]) -> dict:
        unselected = pairs_with(before, solved=False, matched=False, same_gender=False)
        m = measure.Measured(pd.DataFrame(), pd.DataFrame(), kept, unselected, [], "")
        return page.abilities(accuracy, kept, PARAMS, page.no_gap(m, page.selection(m, PARAMS), PARAMS))

    by_chance = able([-3.0, 3.2] * 20)
    assert by_chance["superset"]["able"] is False
    why = "quads that were not selected by it, 0.10 [-0.70, 0.90] logits, is not surely above the model's noise (0.001)"
    assert by_chance["superset"]["why"].endswith(f". But the gap between clean and corrupt prompts of 40 {why}")
    assert page.verdicts(by_chance)["superset"].startswith("The model cannot do `superset`: accuracy 0.31")
    assert able([1.0, 3.2] * 20)["superset"]["able"] is True
    assert able([1.0, 3.2])["superset"]["able"] is True, "too few quads for an interval: the estimate decides"
    assert able([-1.0, 0.9])["superset"]["able"] is able([0.0009, 0.001])["superset"]["able"] is False


def test_an_odd_one_out_gap_is_read_before_any_pair_is_kept():
    sides = [("a", [2.0, 0.0, 5.0]), ("c", [1.0, 0.0, 4.0]), ("b", [0.0, 7.0, 0.0]), ("a", [0.0, 3.0, 0.0])]
    frame = pd.DataFrame(sides, columns=["answer", "logits"]).assign(item=["x", "x", "y", "y"], task="odd_one_out")
    assert page.odd_gaps(frame) == [0.0, 4.0]  # (2 - 5) - (1 - 4), (7 - 0) - (3 - 0)
    odd = PARAMS.model_copy(update={"task": "odd_one_out"})
    m = measure.Measured(frame.assign(logits=[[0.0] * 3] * 4), frame, pairs_with([3.0], solved=True), None, [], "")
    assert page.no_gap(m, page.selection(m, odd), odd).startswith(
        "the gap between clean and corrupt prompts of 2 quads"
    )
    assert page.no_gap(m._replace(records=frame), page.selection(m, odd), odd) == ""


def test_what_step_01_says(tmp_path):
    logits = [[1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0]] * 2
    frame = asked(logits, ["artist", "scientist"] * 2, top_token=[" the", " actors", " the", " a"])
    others = frame.assign(template="both_famous", top_token=" elsewhere", candidate_probability=0.9)
    accuracy = measured(own=("superset", "profession_both", 0.75, True), other=("one_name", "profession_is", 0.3, True))
    fame = {"fame_clean": [-1.0, -2.0, -3.0], "fame_corrupt": [-1.1, -1.8, -3.05]}
    pairs = pairs_with([1.0, 2.0, 6.0], solved=False, **fame)
    step = SimpleNamespace(
        params=PARAMS, record={"model": {"n_layers": 2}}, name="baselines", results=tmp_path, write_findings=dict
    )
    whole = measure.Measured(pd.concat([frame, others]), accuracy, pairs, None, [{"filter": "x"}], "")
    found = page.findings(step, whole)
    lead, five, classes, vocabulary, spoken, other, left, gap = found["sentences"]
    assert lead.startswith("The model can do `superset`: ") and other.startswith("The model can do `one_name`: ")
    assert spoken == (
        'Its own first word on `profession_both` is " the" (50% of prompts) or " actors" (25% of prompts). '
        "Single-token profession labels have 10% of the probability."
    )
    assert "differ in fame by more than 0.20 nats" in left and "0 of 3 quads are solved" in gap and "nan" not in gap
    assert found["headline"] == [lead, five, vocabulary, other] and found["pairs"] == 3
    assert found["model"] == {"name": "m", "n_layers": 2} and found["drops"] == [{"filter": "x"}]
    assert found["able"]["superset"]["able"] is True and found["accuracy"][0]["estimate"] == 0.75
    bare = measure.Measured(frame.assign(label_probability=np.nan), accuracy, None, None, [], "None were built.")
    without = page.findings(step, bare)
    assert without["sentences"][-1] == "None were built." and without["pairs"] == 0
    assert not any("profession labels" in sentence for sentence in without["sentences"])
    assert without["headline"] == without["sentences"], "the task is not done: all of it is the answer"


def test_the_placebo_gap_is_that_of_every_kept_pair_each_quad_counting_once():
    quads = {"quad_id": ["a", "a", "b", "c"], "gap": [5.0, 1.0, 2.0, -9.0], "kept": [True, True, True, False]}
    placebo = pd.DataFrame(quads).assign(attribute="region", half="discovery")
    made = SimpleNamespace(about_placebo=[{"attribute": "region", "why": ""}], placebo=placebo)
    (said,) = page.placebo_sentences(made)
    assert "of the right sign in 2 of 3 (2 discovery quads); the others are dropped" in said
    assert "It is 2.50 logits on average" in said


def test_what_the_model_says_by_itself_in_a_table():
    words = pd.Series(["x"] * 5 + ["y"] * 3 + ["z"] * 2)
    assert page.commonest(words, 2) == '"x" 50%, "y" 30%'
    frame = answers([True, False]).assign(
        top_token=[" the", " the"], candidate_probability=[0.1, 0.246], label_probability=[0.0, np.nan]
    )
    other = frame.assign(template="odd_one_out", label_probability=np.nan, top_token=[" a", " the"])
    shown = page.free_speech(measure.Measured(pd.concat([frame, other]), frame, None, None, [], ""))
    assert shown.reset_index().to_numpy().tolist() == [
        ["profession_both", 0.17, 0.0, '" the" 100%'],
        ["odd_one_out", 0.17, "", '" a" 50%, " the" 50%'],
    ]
    assert list(shown) == ["probability of the supersets", "probability of profession labels", "top tokens"]


def test_filters_are_listed_with_what_they_left():
    drops = [{"filter": "known for two supersets", "unit": "people", "dropped": 3, "left": 7, "half": "x"}]
    rows = page.drops_table(measure.Measured(pd.DataFrame(), pd.DataFrame(), None, None, drops, "")).to_dict("records")
    assert rows == [{"filter": "known for two supersets", "unit": "people", "dropped": 3, "left": 7}]


# --- what is asked


def test_templates_that_are_asked_about():
    params = Baselines(**SETTINGS | {"templates": ("both_famous", "profession_both"), "template": "common_both"})
    names = [template.name for template in measure.asked(params)]
    assert names == ["both_famous", "profession_both", "common_both", "profession_shared", "odd_one_out"]
    twice = Baselines(**SETTINGS | {"templates": ("profession_shared", "profession_both")})
    assert [t.name for t in measure.asked(twice)] == ["profession_shared", "profession_both", "odd_one_out"]


def test_pairs_and_single_names_are_the_same_people(people, smollm_tokenizer):
    params = Baselines(**SETTINGS | {"accuracy_pairs": 7})
    drawn = sample_pairs(people, 7, 7)
    pairs, names = (
        measure.items(people, smollm_tokenizer, tasks.find_template(name), params)
        for name in ("profession_both", "profession_is")
    )
    assert pairs["names"].tolist() == list(zip(drawn["a"], drawn["b"], strict=True))
    assert pairs["item"].tolist() == [str(i) for i in range(7)]
    assert pairs["answer"].tolist() == pairs["superset"].tolist() == drawn["superset"].tolist()
    first = drawn.iloc[0]
    assert pairs.loc[0, "professions"] == f"{first['profession_a']}, {first['profession_b']}"
    assert names["names"].tolist()[:2] == [(first["a"],), (first["b"],)] and len(names) == 14
    assert names["item"].tolist()[:3] == ["0a", "0b", "1a"] and names.loc[0, "answer"] == first["superset"]
    assert names["professions"].tolist()[:2] == [first["profession_a"], first["profession_b"]]


def test_odd_ones_out_are_the_plans_and_generated_ones_of_other_people(people, smollm_tokenizer):
    template = tasks.find_template("odd_one_out")
    own = data.load_pairs_file(ROOT / "data" / "odd_one_out.csv")
    alone = measure.items(people, smollm_tokenizer, template, Baselines(**SETTINGS | {"odd_one_out_items": 0}))
    assert len(alone) == 2 * len(own) and set(alone["superset"]) == {""}
    # each item is asked from both of its sides, and the two count as one unit
    row = own.iloc[0]
    assert alone.loc[0, ["names", "answer", "item"]].tolist() == [
        (row["clean_a"], row["clean_b"], row["clean_c"]), row["answer"], row["quad_id"],
    ]  # fmt: skip
    assert alone.loc[1, ["names", "answer", "item"]].tolist() == [
        (row["corrupt_a"], row["corrupt_b"], row["corrupt_c"]), row["corrupt_answer"], row["quad_id"],
    ]  # fmt: skip
    pairs = measure.odd_pairs(people, smollm_tokenizer, Baselines(**SETTINGS | {"odd_one_out_items": 4}))
    assert len(pairs) == len(own) + 4
    names = [
        {name for side in ("clean", "corrupt") for slot in "abc" for name in part[f"{side}_{slot}"]}
        for part in (pairs[: len(own)], pairs[len(own) :])
    ]
    assert not names[0] & names[1] and len(names[1]) == 16, "four people an item, none of them in the plan's"


# --- how an answer is scored


def answering(monkeypatch: pytest.MonkeyPatch, tokenizer: object, logits: object) -> SimpleNamespace:
    """A model that gives the tokens of `logits(prompt ids)`, a dict, these logits, and all others no probability."""

    def next_logits(_: object, prompts: list, *__: object) -> np.ndarray:
        out = np.full((len(prompts), len(tokenizer)), -np.inf, dtype=np.float32)
        for row, ids in zip(out, prompts, strict=True):
            for token, value in logits(tuple(ids)).items():
                row[token] = value
        return out

    monkeypatch.setattr(models, "next_logits", next_logits)
    return SimpleNamespace(tokenizer=tokenizer)


def test_an_answer_is_scored_among_the_candidates(people, smollm_tokenizer, monkeypatch):
    template = tasks.find_template("profession_both")
    names, ids = tasks.candidates(smollm_tokenizer, template)
    assert names == ("artist", "scientist", "athlete", "politician", "writer")
    label = tasks.labels(smollm_tokenizer, template)[1][0]
    (word,) = smollm_tokenizer(" the", add_special_tokens=False).input_ids
    # shares of 20: artist 4, scientist and athlete 2, politician 0.25, writer 0.25; a label 1.5, " the" 10
    shares = {**dict(zip(ids, (4.0, 2.0, 2.0, 0.25, 0.25), strict=True)), label: 1.5, word: 10.0}
    model = answering(monkeypatch, smollm_tokenizer, lambda _: {token: log(share) for token, share in shares.items()})
    frame = measure.measure(model, people, template, Baselines(**SETTINGS | {"accuracy_pairs": 5}))
    assert frame["answer"].tolist() == list(names), "one pair of each superset"
    assert frame["chosen"].tolist() == ["artist"] * 5
    assert frame["correct"].tolist() == [True, False, False, False, False]
    assert frame["margin"].tolist() == pytest.approx([log(4 / 2), log(2 / 4), log(2 / 4), log(0.25 / 4), log(0.25 / 4)])
    assert frame["candidate_probability"].tolist() == pytest.approx([8.5 / 20] * 5)
    assert frame["label_probability"].tolist() == pytest.approx([1.5 / 20] * 5)
    assert frame["top_token"].tolist() == [" the"] * 5
    # above " artists" is " the"; above " scientists" and " athletes", equals, both; the label is above the last two
    assert frame["rank"].tolist() == [1, 2, 2, 5, 5]
    assert frame["probability"].tolist() == pytest.approx([4 / 20, 2 / 20, 2 / 20, 0.25 / 20, 0.25 / 20])
    assert set(frame["task"]) == {"superset"} and set(frame["template"]) == {"profession_both"}
    np.testing.assert_allclose(frame["logits"][3], np.log([4, 2, 2, 0.25, 0.25]), rtol=1e-6)
    assert frame["names"][0].count(", ") == 1


def test_a_tie_is_not_an_answer(people, smollm_tokenizer, monkeypatch):
    template = tasks.find_template("profession_both")
    _, ids = tasks.candidates(smollm_tokenizer, template)
    model = answering(monkeypatch, smollm_tokenizer, lambda _: dict(zip(ids, (1.0, 1.0, 0.0, 0.0, 0.0), strict=True)))
    frame = measure.measure(model, people, template, Baselines(**SETTINGS | {"accuracy_pairs": 5}))
    assert frame["margin"].tolist() == [0.0, 0.0, -1.0, -1.0, -1.0] and not frame["correct"].any()
    assert set(frame["chosen"]) == {"artist"}, "the first of the equal ones"


def test_more_prompts_than_a_batch_keep_their_order(people, smollm_tokenizer, monkeypatch):
    template = tasks.find_template("profession_is")
    _, ids = tasks.candidates(smollm_tokenizer, template)

    def mark(prompt: tuple[int, ...]) -> float:
        return float(sum(prompt) % 101)

    model = answering(monkeypatch, smollm_tokenizer, lambda prompt: dict.fromkeys(ids, 0.0) | {ids[0]: mark(prompt)})
    frame = measure.measure(model, people, template, Baselines(**SETTINGS | {"accuracy_pairs": 70}))
    assert len(frame) == 140 and frame["item"].is_unique
    prompts = [tasks.make_prompt(smollm_tokenizer, template, [name]) for name in frame["names"]]
    assert [row[0] for row in frame["logits"]] == [mark(prompt.ids) for prompt in prompts]


def test_an_odd_one_out_is_scored_among_its_names(people, smollm_tokenizer, monkeypatch):
    template = tasks.find_template("odd_one_out")
    params = Baselines(**SETTINGS | {"odd_one_out_items": 0})
    asked = measure.items(people, smollm_tokenizer, template, params)
    prompts = [tasks.make_prompt(smollm_tokenizer, template, names) for names in asked["names"]]
    firsts = {p.ids: [p.ids[p.roles[f"name_{slot}"][0]] for slot in "abc"] for p in prompts}
    # the first token of the second name gets 2, of the third 1, of the first 0
    model = answering(
        monkeypatch, smollm_tokenizer, lambda prompt: dict(zip(firsts[prompt], (0.0, 2.0, 1.0), strict=True))
    )
    frame = measure.measure(model, people, template, params)
    assert set(frame["chosen"]) == {"b"} and frame["correct"].tolist() == (asked["answer"] == "b").tolist()
    margins = {"a": 0.0 - 2.0, "b": 2.0 - 1.0, "c": 1.0 - 2.0}
    assert frame["margin"].tolist() == [margins[answer] for answer in asked["answer"]]
    assert set(asked["answer"]) == {"a", "b", "c"} and frame["label_probability"].isna().all()
    assert frame["candidate_probability"].tolist() == pytest.approx([1.0] * len(frame))
