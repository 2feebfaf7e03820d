"""The placebo: its pairs, the comparison of two shares, and what is said of them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from fake_score import fake_score
from professions import QUESTION, SUPERSETS, TEMPLATES
from test_steps_02_to_04 import many, table

from lib import effects, stats, tasks
from lib.stats import Settings, Shares
from pipeline import population
from pipeline.params import Shared
from report.words import interval
from steps.baselines import placebo
from steps.baselines.measure import Baselines
from steps.story import circuits_page
from steps.story import measure as story
from steps.sufficiency import placebo as measured
from steps.sufficiency import placebo_page

ROOT = Path(__file__).resolve().parents[1]
PARAMS = Shared(model="m", level=0.95, resamples=400, seed=3)


# --- two ratios of sums, of quads that they have not in common ---


def samples(rng, quads, share, spread):
    gaps = rng.lognormal(1, 0.5, (quads, 1))
    return Shares(share * gaps + spread * gaps * rng.standard_t(4, (quads, 1)), gaps)


def test_intervals_of_two_ratios_cover_their_quotient_and_their_contrast():
    """A nominal 95% of 400 experiments of few quads with heavy tails."""
    rng, inside = np.random.default_rng(5), {"quotient": 0, "contrast": 0}
    for trial in range(400):
        one, other = samples(rng, 30, 0.6, 0.1), samples(rng, 24, 0.8, 0.15)
        settings = Settings(resamples=300, seed=trial)
        (quotient,), (contrast,) = stats.quotients(one, other, settings), stats.contrasts(one, other, 0.5, settings)
        inside["quotient"] += quotient.low <= 0.6 / 0.8 <= quotient.high
        inside["contrast"] += contrast.low <= 0.6 - 0.5 * 0.8 <= contrast.high
    assert all(0.92 <= count / 400 <= 0.98 for count in inside.values()), inside


def test_a_quotient_is_that_of_the_two_ratios_of_sums():
    rng = np.random.default_rng(0)
    one, other = samples(rng, 25, 0.3, 0.05), samples(rng, 40, 0.6, 0.05)
    (quotient,) = stats.quotients(one, other)
    ratio = [shares.numerators.sum() / shares.denominators.sum() for shares in (one, other)]
    assert quotient.estimate == pytest.approx(ratio[0] / ratio[1]) and quotient.n == 25
    assert quotient.low < quotient.estimate < quotient.high
    # half the spread below: a narrower interval, but not as narrow as that of the ratio above alone
    alone = stats.ratio_intervals(one.numerators, one.denominators)[0]
    assert (quotient.high - quotient.low) / quotient.estimate > (alone.high - alone.low) / alone.estimate


def test_a_ratio_below_that_may_be_zero_gives_no_interval():
    rng = np.random.default_rng(0)
    one, nothing = samples(rng, 30, 0.5, 0.1), samples(rng, 30, 0.0, 0.5)
    (quotient,) = stats.quotients(one, nothing)
    assert quotient.low is None and "not surely above 0" in quotient.method
    (few,) = stats.quotients(samples(rng, 19, 0.5, 0.1), one)
    assert few.low is None and "19 clusters" in few.method


def test_contrasts_of_many_sites_cover_all_of_them_together():
    rng, inside = np.random.default_rng(2), 0
    for trial in range(200):
        one, other = (
            Shares(np.hstack([sample.numerators for sample in each]), np.hstack([s.denominators for s in each]))
            for each in ([samples(rng, 30, share, 0.2) for _ in range(8)] for share in (0.4, 0.8))
        )
        spans = stats.contrasts(one, other, 0.5, Settings(resamples=300, seed=trial))
        inside += all(span.low <= 0 <= span.high for span in spans)
    assert 0.91 <= inside / 200 <= 0.99, inside


def test_sites_are_called_specific_and_general_by_their_shares():
    """Three sites that carry half of the task's gap, and of the placebo's nothing, all of it, and a quarter."""
    rng = np.random.default_rng(1)

    def rows(shares, quads):
        gaps = rng.uniform(3, 5, quads)
        moved = [[share * gap + rng.normal(0, 0.2) for gap in gaps] for share in shares]
        return table([row for s, own in enumerate(moved) for row in many(own, list(gaps), site_set=s)])

    found = effects.specific(rows((0.5, 0.5, 0.5), 24), rows((0.0, 1.0, 0.25), 30), ["site_set"], PARAMS, 0.5)
    assert found["verdict"].tolist() == ["specific", "general", "open"]
    assert found["quotient_estimate"].tolist() == pytest.approx([0, 2, 0.5], abs=0.1)
    assert found[["quads", "placebo_quads"]].drop_duplicates().values.tolist() == [[24, 30]]
    few = effects.specific(rows((0.5,), 24), rows((0.0,), 19), ["site_set"], PARAMS, 0.5)
    assert few["verdict"].tolist() == [None] and few["beyond_low"].isna().all()


# --- the pairs ---


@pytest.fixture(scope="module")
def people():
    return population.load_people(ROOT / "data" / "people.csv")


def region_score(tokenizer, people, skill):
    """A model that knows supersets, and in which the names vote for their region with a skill of its own."""
    template = TEMPLATES["profession_both"]
    know, ids = fake_score(tokenizer, people, 9.0), tasks.candidates(tokenizer, template, "region")[1]
    side = people.set_index("name")["region"].map({"North America": 1, "Europe": -1}).fillna(0)

    def score(prompts):
        out = know(prompts)
        wide = np.zeros((len(out), max(out.shape[1], max(ids) + 1)), dtype=np.float32)
        wide[:, : out.shape[1]] = out
        for row, prompt in zip(wide, prompts, strict=True):
            text = tokenizer.decode(list(prompt))
            votes = sum(vote for name, vote in side.items() if name in text)
            row[ids[0]] += skill * votes + np.random.default_rng([*prompt]).normal()
        return wide

    return score


@pytest.fixture(scope="module")
def some(people):
    """People whose names are in no other's, so that they can be found in a prompt's text."""
    ordinary = people[~people["two_supersets"] & (people["name"].str.count(" ") == 1) & (people["century"] >= 20)]
    sided = ordinary[ordinary["region"].isin(["North America", "Europe"])]
    return sided.groupby(["superset", "region"]).head(14).reset_index(drop=True)


BASELINES = Baselines(model="m", template="profession_both", placebo_quads_per_half=5)


def built(some, tokenizer, skill, taken=(), **more):
    params, score = BASELINES.model_copy(update=more), region_score(tokenizer, some, skill)
    asked = population.ask_alone(some[some["name"].isin(taken)], tokenizer, score)
    pairs, drops = placebo.build(some, asked, taken, tokenizer, score, params, "region")
    return placebo.chosen(pairs, 1e-3, 0), drops


def test_placebo_pairs_are_of_one_superset_and_of_two_regions(some, smollm_tokenizer):
    taken = some.groupby(["superset", "region"])["name"].head(2).tolist()
    pairs, drops = built(some, smollm_tokenizer, 5.0, taken)
    about = some.set_index("name")
    for side, answer in (("clean", "answer"), ("corrupt", "corrupt_answer")):
        for slot in "ab":
            names = pairs[f"{side}_{slot}"]
            assert (names.map(about["superset"]) == pairs["shared"]).all()
            assert (names.map(about["region"]) == pairs[answer]).all()
            assert not set(names) & set(taken)
    quads = pairs.drop_duplicates("quad_id")
    four = quads[[f"{side}_{slot}" for side in ("clean", "corrupt") for slot in "ab"]].to_numpy().ravel()
    assert len(set(four)) == len(four) and set(pairs["answer"]) == {"North America", "Europe"}
    assert pairs["kept"].all() and abs(quads["half"].value_counts().diff().iloc[-1]) <= 1
    assert [drop["left"] for drop in drops] == sorted((drop["left"] for drop in drops[:-1]), reverse=True) + [
        len(quads)
    ]
    made = tasks.make_pair(smollm_tokenizer, pairs.iloc[0].to_dict())
    assert made.candidates == ("North America", "Europe")
    assert [smollm_tokenizer.decode([token]) for token in made.clean_tokens] == [" Americans", " Europeans"]
    assert {"artists", "writers"} <= set(made.labels)


def test_people_asked_before_come_first_and_are_not_asked_again(some, smollm_tokenizer):
    score, prompts = region_score(smollm_tokenizer, some, 5.0), []
    asked = population.ask_alone(some.groupby(["superset", "region"]).head(6), smollm_tokenizer, score)

    def counted(own):
        prompts.extend(own)
        return score(own)

    params = BASELINES.model_copy(update={"placebo_quads_per_half": 2})  # one quad a superset: 6 of 14 are asked about
    pairs, _ = placebo.build(some, asked, (), smollm_tokenizer, counted, params, "region")
    sides = ("clean_a", "clean_b", "corrupt_a", "corrupt_b")
    assert set(pairs[list(sides)].to_numpy().ravel()) <= set(asked["name"])
    assert len(prompts) == len({(row[f"{side}_a"], row[f"{side}_b"]) for row in pairs.to_dict("records")
                                for side in ("clean", "corrupt")})  # fmt: skip


def test_people_whom_the_model_does_not_know_come_last():
    people = pd.DataFrame({"name": list("uvwxyz"), "superset": ["artist", "artist", "artist"] + ["writer"] * 3})
    for_artists, for_writers = ([9.0 * (word == own) for word in SUPERSETS] for own in ("artist", "writer"))
    told = {"u": for_writers, "v": for_artists, "x": for_writers, "y": for_artists}
    asked = pd.DataFrame({"name": list(told), "evidence": list(told.values())})
    assert placebo.turns(people, asked).tolist() == [2, 0, 1, 0, 2, 1]
    assert placebo.turns(people, asked.head(0)).tolist() == [1] * 6


def test_quads_without_a_gap_of_the_right_sign_are_dropped_whole(some, smollm_tokenizer):
    pairs, _ = built(some, smollm_tokenizer, 0.1)
    right = pairs["gap"].gt(1e-3).groupby(pairs["quad_id"]).all()
    assert 0 < right.sum() < len(right)
    assert (pairs.groupby("quad_id")["kept"].first() == right).all()
    halves = pairs[pairs["kept"]].drop_duplicates("quad_id")["half"].value_counts()
    assert halves.max() - halves.min() <= 2, "both halves keep about as many"


def test_too_few_people_for_a_placebo_are_said_with_their_numbers(some, smollm_tokenizer):
    few = some[some["region"] == "Europe"]
    with pytest.raises(ValueError, match="70 left.*no match in token count: 10 quads dropped"):
        built(few, smollm_tokenizer, 5.0)
    with pytest.raises(ValueError, match="no answers about the attribute 'height'"):
        placebo.classes(some, "height", QUESTION)
    with pytest.raises(ValueError, match="unknown attribute 'height'"):
        tasks.candidates(smollm_tokenizer, TEMPLATES["profession_both"], "height")


def test_an_ordinary_pair_records_the_answers_of_other_attributes(smollm_tokenizer):
    row = dict(pair_id="p", quad_id="q", half="discovery", task="superset", template="profession_both")
    row |= dict(clean_a="Al Pacino", clean_b="Tom Hanks", corrupt_a="Al Pacino", corrupt_b="Tom Cruise")
    pair = tasks.make_pair(smollm_tokenizer, row | dict(answer="artist", corrupt_answer="politician"))
    assert {"Americans", "Europeans", "women", "men"} <= set(pair.labels) and "artists" not in pair.labels
    # what step 01 counts as labels of professions stays that
    assert "Americans" not in tasks.labels(smollm_tokenizer, TEMPLATES["profession_both"])[0]


# --- what is said ---


def swept(attribute, shares, quads, half="confirmation", noise=0.1, seed=0, sign=1):
    """Rows as step 04's table has them: the slice, all there is, one site alone, with their `shares` of the gap."""
    rng = np.random.default_rng(seed)
    gaps, rows = sign * rng.uniform(3, 5, quads), []
    for direction in ("denoise", "noise"):
        for place, share in enumerate(shares if direction == "denoise" else shares[:1]):
            moved = [share * gap + rng.normal(0, noise) for gap in gaps]
            own = many(moved, list(gaps), site_set=place, direction=direction, half=half, attribute=attribute)
            rows += [row | {"quad_id": f"{attribute}{half}{row['quad_id']}", "kl_after": share} for row in own]
    frame = table(rows)
    after = [np.array([0, 0, 0, 0, m, 0, 2 * m, 0, 0]) for m in frame["kl_after"]]
    return frame.assign(answers_before=[np.zeros(9)] * len(frame), answers_after=after)


def compared(placebo_share, quads=24, others=6, sign=1):
    frame = pd.concat([swept("superset", (0.8, 1.0, 0.4), 22), swept("region", (placebo_share, 1.0, 0.1), quads)])
    wrong = swept("region", (-1.0, 1.0, 0.1), others, seed=2, sign=sign).assign(
        quad_id=lambda own: "wrong" + own["quad_id"]
    )
    quads = pd.concat([frame, wrong]).drop_duplicates("quad_id").set_index("quad_id")[[]]
    quads = quads.assign(kept=~quads.index.str.startswith("wrong"), shared="artist")
    quads.loc["regionconfirmationq03", "shared"] = "writer"
    sets = [measured.SLICE, measured.WHOLE, "21.6"]
    params = Shared(model="m", resamples=300).model_copy(update={"specific_ratio": 0.5})
    return measured.specificity(pd.concat([frame, wrong]), quads, sets, params), params


@pytest.mark.parametrize(
    ("share", "verdict", "words"),
    [
        (0.1, "specific", "against region the slice is specific to supersets"),
        (0.7, "general", "reads out the names' region as well"),
    ],
)
def test_the_slice_is_judged_by_its_quotient_on_kept_pairs(share, verdict, words):
    m, params = compared(share)
    row = m.joint[(m.joint["choice"] == "kept") & (m.joint["direction"] == "denoise")].iloc[0]
    assert row["quotient_estimate"] == pytest.approx(share / 0.8, abs=0.05) and row["verdict"] == verdict
    assert (row["quads"], row["placebo_quads"]) == (22, 24)
    every = m.joint[m.joint["choice"] == "all"]
    assert set(every["placebo_quads"]) == {30} and (every["quotient_estimate"] < row["quotient_estimate"]).all()
    assert m.classes[["shared", "quads"]].values.tolist() == [["artist", 23], ["writer", 1]]
    assert m.classes["estimate"].iloc[0] == pytest.approx(share, abs=0.05)
    assert m.parts["site"].tolist() == ["21.6"] and m.parts["verdict"].tolist() == ["specific"]
    found = placebo_page.findings(m, params)
    assert words in found["sentences"][0] and found["headline"] == found["sentences"][:1]
    # root mean square: 0 0 0 0 m of the supersets' answers, 0 and 2 m of the regions'
    moved = m.moved.set_index(["attribute", "words"])["estimate"]
    assert moved["superset", "superset"] == pytest.approx(0.8 * 0.4) and moved["superset", "region"] == pytest.approx(
        0.8
    )
    assert moved["region", "whole vocabulary"] == pytest.approx(share)
    assert placebo_page.figure(m) is not None and len(placebo_page.table(m, params)) == 5
    assert placebo_page.table(m, params)["verdict"].iloc[0] == {"general": "not specific"}.get(verdict, verdict)
    shown = placebo_page.table(m, params).set_index("site").loc["21.6"]
    part = m.parts.iloc[0]
    assert part["beyond_estimate"] == pytest.approx(part["placebo_estimate"] - 0.5 * part["estimate"])
    assert shown["placebo less 0.5 x task"] == interval(*part[["beyond_estimate", "beyond_low", "beyond_high"]])


def test_placebo_quads_whose_gaps_do_not_add_up_to_one_have_no_share():
    """Of a model that knows nothing of the attribute: those kept for their gap have one, all together have none."""
    m, params = compared(0.1, others=40, sign=-1)
    assert set(m.joint["choice"]) == {"kept"} and len(placebo_page.table(m, params)) == 3
    assert "there is no gap of which it could be a share" in placebo_page.findings(m, params)["sentences"][0]


def test_few_placebo_quads_are_not_testable_and_none_are_said():
    m, params = compared(0.1, quads=19)
    assert m.joint.loc[m.joint["choice"] == "kept", "verdict"].isna().all()
    assert "too few quads to test it (19; 20 are needed)" in placebo_page.findings(m, params)["sentences"][0]
    none = placebo_page.findings(None, params)
    assert none["specific"][0]["why"] == none["sentences"][0]
    assert placebo_page.moved_table(None).data == placebo_page.UNMOVED and len(placebo_page.moved_table(m)) > 1


# --- the circuit ---


def circuit_rows(shares_of, attribute, half="confirmation"):
    """Step 10's rows of quads in which the circuit keeps a share of what everything has over nothing (gap 4, and 1)."""
    rows = []
    for quad, share in enumerate(shares_of):
        for test, value in (("everything", 5.0), ("nothing", 1.0), ("circuit", 1 + 4 * share)):
            about = {"quad_id": f"{attribute}{quad}", "pair_id": f"{attribute}{quad}.0", "half": half}
            about |= {"ablation": "counterfactual", "attribute": attribute}
            rows.append(about | {"test": test, "logit_diff": value})
    return pd.DataFrame(rows)


def test_the_circuit_is_asked_in_kept_placebo_pairs_of_the_half_that_is_read():
    rows = [("a", "discovery", True), ("b", "confirmation", True), ("c", "confirmation", False)]
    pairs = [SimpleNamespace(pair_id=name, half=half) for name, half, _ in rows]
    table = pd.DataFrame(rows, columns=["pair_id", "half", "kept"])
    step = SimpleNamespace(placebo=lambda: pairs, placebo_pairs=lambda: table)
    assert [pair.pair_id for pair in story.placebo_pairs(step)] == ["b"]
    del pairs[1]  # the only half
    assert [pair.pair_id for pair in story.placebo_pairs(step)] == ["a"]
    assert story.placebo_pairs(SimpleNamespace(placebo=list)) == []


def test_the_circuit_is_set_beside_what_it_keeps_in_placebo_pairs():
    rng = np.random.default_rng(0)
    own, other = (share + rng.normal(0, 0.05, 24) for share in (0.8, 0.2))
    placebo_rows = pd.concat([circuit_rows(other, "region"), circuit_rows([9.0] * 3, "region", "discovery")])
    m = SimpleNamespace(tested=circuit_rows(own, "superset"), ablation="resample", placebo=placebo_rows)
    (found,) = circuits_page.in_placebo(m, PARAMS)
    assert found["estimate"] == pytest.approx(other.mean()) and found["quads"] == 24
    assert found["quotient_estimate"] == pytest.approx(other.mean() / own.mean())
    assert found["quotient_low"] < 0.25 < found["quotient_high"]
    (said,) = circuits_page.placebo_sentences([found])
    assert "differ in region, the circuit at the last token keeps 0.2" in said and "(24 quads)" in said
    assert circuits_page.in_placebo(SimpleNamespace(**vars(m) | {"placebo": None}), PARAMS) == []
