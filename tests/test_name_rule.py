"""The comparison of rules: it picks the rule that made the data, and its folds share no people."""

import numpy as np
import pandas as pd
import pytest

from lib.stats import Settings
from steps.generality import name_rule

CLASSES = ("artist", "athlete", "politician", "scientist", "writer")
STEPS = {"additive": (1.0, 2.0), "OR": (1.0, 1.0), "AND": (0.0, 1.0), "none": (0.0, 0.0), "neither": (1.0, 4.0)}
ONE = (1, 2)
# one name in the first slot, two, prompts, noise, one name in the second slot
UNEVEN = {"additive": (1, 2.6, 200, 0.6, 1.6), "OR": (2, 2, 200, 0.6, 0.8), "neither": (1, 5.6, 200, 0.6, 1.6)}
SLOTS = ("first", "second")


def prompts(
    one: float,
    two: float,
    count: int = 200,
    noise: float = 0.6,
    second: float | None = None,
    seed: int = 0,
    people: int | None = None,
) -> pd.DataFrame:
    """Prompts of two people of random classes; a class gains `one` or `two` logits for one or two names, `second` for
    the second alone. Without `people`, nobody is in two prompts."""
    rng = np.random.default_rng(seed)
    own = rng.integers(len(CLASSES), size=(count, 2))
    who = np.arange(2 * count).reshape(count, 2) if people is None else rng.integers(people, size=(count, 2))
    prior = np.array([0.0, 1.0, -1.0, 0.5, 2.0])
    rows = []
    for number in range(count):
        n = np.stack([np.arange(len(CLASSES)) == own[number, slot] for slot in (0, 1)]).astype(int)
        gains = [0, one, one if second is None else second, two]
        logits = prior + np.choose(n[0] + 2 * n[1], gains) + noise * rng.normal(size=len(CLASSES))
        logits += 10 * rng.normal()  # what is common to all logits means nothing
        y = logits - logits[n.sum(0) == 0].mean()
        for index, name in enumerate(CLASSES):
            rows.append((number, f"p{who[number, 0]}", f"p{who[number, 1]}", name, y[index], n[0, index], n[1, index]))
    return pd.DataFrame(rows, columns=list(name_rule.COLUMNS))


@pytest.mark.parametrize("truth", STEPS)
def test_the_rule_that_made_the_data_is_picked(truth):
    for seed in range(3):
        result = name_rule.compare(prompts(*STEPS[truth], seed=seed), Settings(resamples=500))
        assert result.verdict == {"number": truth}
        errors = result.errors.set_index("rule")
        if truth in name_rule.RULES:
            assert result.fitting["number"] == (truth,)
            assert errors["error"].idxmin() in (truth, "free", f"{truth} by slot", "free by slot")
            assert errors.loc[truth, "worse"] == pytest.approx(0, abs=0.01)
        if truth == "neither":
            assert (errors.loc[list(name_rule.RULES), "low"] > 0).all() and result.fitting["number"] == ()


@pytest.mark.parametrize(("second", "verdict"), [(1.0001, "OR"), (1.1, "neither")])
def test_a_rule_is_not_refuted_by_less_than_the_models_noise(second, verdict):
    assert name_rule.compare(prompts(1.0, second, noise=1e-5), Settings(floor=1e-3)).verdict == {"number": verdict}


@pytest.mark.parametrize(("two", "verdict"), [(10.1, "OR"), (10.5, "neither")])
def test_a_rule_that_is_worse_than_free_by_next_to_nothing_is_not_refuted(two, verdict):
    result = name_rule.compare(prompts(10.0, two, noise=1e-3), Settings(resamples=500, floor=1e-3))
    assert result.errors.set_index("rule").loc["OR", "low"] > 1e-5 and result.verdict == {"number": verdict}


def test_fitted_steps_and_their_ratio():
    result = name_rule.compare(prompts(1.0, 4.0, count=400))
    fitted = result.fitted.set_index("term")
    for term, truth in {"one name": 1, "two names": 4, "second step": 3, "first slot": 1, "second slot": 1}.items():
        assert fitted.loc[term, "low"] < truth < fitted.loc[term, "high"]
        assert fitted.loc[term, "high"] - fitted.loc[term, "low"] < 0.5
    assert result.ratio.low < 3 < result.ratio.high and result.ratio.high - result.ratio.low < 1
    assert name_rule.compare(prompts(1.0, 1.0)).ratio.estimate == pytest.approx(0, abs=0.3)
    assert name_rule.compare(prompts(0.0, 1.0)).ratio is None  # a first step of 0


def test_without_noise_the_steps_are_exact():
    result = name_rule.compare(prompts(0.75, 1.25, count=60, noise=0), Settings(resamples=200), folds=3)
    fitted = result.fitted.set_index("term")["estimate"]
    assert fitted[["one name", "two names", "second step"]].tolist() == pytest.approx([0.75, 1.25, 0.5])
    errors = result.errors.set_index("rule")["error"]
    assert errors["free"] == pytest.approx(0, abs=1e-20) and errors["additive"] > 0.001
    assert result.ratio.estimate == pytest.approx(2 / 3)


def test_slots_are_told_apart():
    same, other = (name_rule.compare(prompts(*steps), Settings(resamples=500)) for steps in (ONE, UNEVEN["additive"]))
    contrast = [result.fitted.set_index("term").loc["second slot - first"] for result in (same, other)]
    assert contrast[0]["low"] < 0 < contrast[0]["high"] and not same.names.uneven
    assert 0 < contrast[1]["low"] < 0.6 < contrast[1]["high"] and other.names.uneven
    assert (other.names.lesser, other.names.count) == ("first", "both")
    errors = other.errors.set_index("rule")
    assert errors.loc["additive", "low"] > 0 >= errors.loc["additive by slot", "low"]  # which has a slope for each
    assert "they count unequally" in name_rule.sentences(other)["slots"]
    assert "with a weight for each name: of" in name_rule.sentences(other)["number"]


@pytest.mark.parametrize("truth", UNEVEN)
def test_the_rule_of_names_that_count_unequally_is_picked(truth):
    for seed in range(3):
        result = name_rule.compare(prompts(*UNEVEN[truth], seed=seed), Settings(resamples=500))
        assert result.verdict == {"number": truth} and result.names.uneven


@pytest.mark.parametrize(
    ("steps", "read", "unread"), [((2, 2, 200, 0.3, 0), *SLOTS), ((0, 2, 200, 0.3, 2), *SLOTS[::-1])]
)
def test_an_answer_read_off_one_name_is_no_rule_of_two(steps, read, unread):
    """Averaged over which name is of the class, it adds up: one name half of what two do."""
    for seed in range(3):
        frame = prompts(*steps, seed=seed)
        result = name_rule.compare(frame, Settings(resamples=500))
        assert result.verdict == {"number": f"{read} name"} and result.ratio is None
        said = name_rule.sentences(result)
        assert f"read off the {read} name alone: what the {unread} does is " in said["ratio"]
        assert not any("additive" in text for text in said.values())
        found = name_rule.numbers(result)
        assert found["ratio"]["why"] == next(row["why"] for row in found["fitted"] if row["term"] == "one name")
        assert name_rule.figure(result, frame) is not None


def test_where_it_is_open_whether_both_names_count_there_is_no_verdict():
    result = name_rule.compare(prompts(2, 2.3, 60, 1.0, 0.3), Settings(resamples=500))
    assert result.names.share.low < name_rule.LEAST < result.names.share.high
    assert result.verdict == {"number": None} and result.ratio is None and "second does is" in result.reason
    assert "whether both names count is open" in name_rule.sentences(result)["ratio"]
    assert all("why" not in row for row in name_rule.numbers(result)["fitted"])  # what one name adds is still told


@pytest.mark.parametrize("noise", [1e-6, 0.3])
def test_where_a_second_name_takes_away_what_the_first_gave_no_rule_is_told(noise):
    result = name_rule.compare(prompts(2.0, 0.0, 60, noise), Settings(resamples=300))
    assert result.ratio.estimate == pytest.approx(-1, abs=0.1) and result.verdict == {"number": None}
    assert "why" in name_rule.numbers(result)["ratio"] and name_rule.figure(result, prompts(2.0, 0.0, 60)) is not None


def test_a_group_is_whoever_is_linked_by_people():
    frame = prompts(1, 2, count=6)
    names = {0: ("x", "y"), 1: ("z", "w"), 2: ("y", "z"), 3: ("q", "r"), 4: ("r", "q")}  # 0 and 1 by way of 2
    for prompt, pair in names.items():
        frame.loc[frame["prompt"] == prompt, ["name_a", "name_b"]] = pair
    groups = name_rule._groups(frame, pd.factorize(frame["prompt"])[0])
    assert groups.tolist() == [0, 0, 0, 1, 1, 2]


def test_folds_share_no_people(monkeypatch):
    frame, seen = prompts(1, 2, count=60, people=200), []
    monkeypatch.setattr(name_rule, "_out_of_fold", lambda design, y, fold: seen.append(fold) or np.ones_like(y))
    result = name_rule.compare(frame, Settings(resamples=100), folds=5)
    people = frame.assign(fold=seen[0]).melt(id_vars="fold", value_vars=["name_a", "name_b"], value_name="person")
    assert (people.groupby("person")["fold"].nunique() == 1).all()
    assert set(seen[0]) == set(range(5)) and result.folds == 5 and result.groups < result.prompts == 60


def test_errors_are_those_of_prompts_left_out():
    """By hand, for the additive rule: fit on the other folds, mean squared error over the classes of a prompt."""
    frame = prompts(1, 2, count=30)
    result = name_rule.compare(frame, Settings(resamples=100, seed=4), folds=3)
    fold = np.random.default_rng(4).permutation(30) % 3
    errors = []
    for held in range(3):
        train, test = (frame[np.isin(frame["prompt"], np.flatnonzero(mask))] for mask in (fold != held, fold == held))

        def design(part):
            x = np.column_stack([part["superset_class"] == name for name in CLASSES] + [part["n_a"] + part["n_b"]])
            x = pd.DataFrame(x.astype(float), index=part.index)
            absent = x[(part["n_a"] + part["n_b"]) == 0].groupby(part["prompt"]).mean()
            return x.to_numpy() - absent.loc[part["prompt"]].to_numpy()

        beta = np.linalg.pinv(design(train)) @ train["y"].to_numpy()
        errors.append(((test["y"] - design(test) @ beta) ** 2).to_numpy())
    got = result.errors.set_index("rule")["error"]
    assert got["additive"] == pytest.approx(np.concatenate(errors).mean())


@pytest.mark.parametrize(("truth", "combine"), [("additive", np.add), ("OR", np.maximum), ("AND", np.minimum)])
def test_rules_of_evidence(truth, combine):
    frame, rng = prompts(0, 0, count=300), np.random.default_rng(9)
    for slot in ("a", "b"):
        frame[f"evidence_{slot}"] = 2 * frame[f"n_{slot}"] + rng.normal(size=len(frame))
    frame["y"] += 0.8 * combine(frame["evidence_a"], frame["evidence_b"])
    result = name_rule.compare(frame, Settings(resamples=500))
    assert result.verdict["evidence"] == truth
    by_basis = result.errors.set_index(["basis", "rule"])["error"]
    assert by_basis["evidence", truth] < by_basis["number", truth]


def test_few_prompts_give_numbers_without_a_verdict():
    result = name_rule.compare(prompts(1, 2, count=12), Settings(resamples=100), folds=20)
    assert result.verdict == {"number": None} and "12 groups of prompts, fewer than 20" in result.reason
    assert result.folds == 12 and result.errors["low"].isna().all() and result.fitted["estimate"].notna().all()
    mixed = prompts(1, 2, count=60)
    mixed = mixed[~mixed["prompt"].isin(mixed["prompt"][mixed["n_a"] + mixed["n_b"] == 2])]
    result = name_rule.compare(mixed, Settings(resamples=100))
    assert result.verdict == {"number": None} and "classes of both" in result.reason and result.ratio is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.drop(columns="y"), "missing: .'y'"),
        (lambda f: f[:0], "missing: rows"),
        (lambda f: f.assign(y=np.nan), "NaN"),
        (lambda f: f.assign(n_a=2), "must be 1"),
        (lambda f: pd.concat([f, f]), "two rows of one class"),
        (lambda f: f[f["n_a"] + f["n_b"] > 0], "no class of neither name"),
        (lambda f: f.assign(name_a="same"), "need 2 of each"),
    ],
)
def test_bad_frames_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        name_rule.compare(change(prompts(1, 2, count=30)), Settings(resamples=100))
