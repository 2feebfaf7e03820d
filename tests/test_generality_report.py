"""Step 07's tables, verdict and sentences on made-up records whose answer is known; figures on thin tables."""

import re
from itertools import count, permutations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from professions import SUPERSETS

from lib.hooks import Site
from pipeline import params
from report.words import of_row
from steps.generality import controls_page, name_rule, page, placebo, placebo_page
from steps.generality.class_circuits import Circuit
from steps.generality.measure import WHOLE, Generality

PARAMS = Generality(model="config:none", resamples=200, flips=200)


# --- a grid with known effects


def made_grid(quads: int = 25, supersets=SUPERSETS) -> pd.DataFrame:
    """Two pairs, one the mirror of the other, of each quad; quads take the pairs of supersets in turn."""
    rows, pairs = [], [pair for pair in permutations(supersets, 2) if pair[0] < pair[1]]
    for number in range(quads * len(pairs)):
        answer, other = pairs[number % len(pairs)]
        for place, (a, b) in enumerate(((answer, other), (other, answer))):
            row = {"pair_id": f"q{number:03d}.{place}", "quad_id": f"q{number:03d}", "template": "profession_both"}
            row |= {"answer": a, "corrupt_answer": b, "order": "better known first" if number % 2 else ""}
            rows.append(
                row | {"clean_profession_a": f"{a} one", "clean_profession_b": f"{a} {'one' if number % 3 else 'two'}"}
            )
    return pd.DataFrame(rows)


def made_joint(grid: pd.DataFrame, effect, seed: int = 0) -> pd.DataFrame:
    """Records of one set of sites in both directions: `effect(answer, direction)` of the gap, and noise."""
    rng = np.random.default_rng(seed)
    frames = []
    for direction, sign in (("noise", -1), ("denoise", 1)):
        gap = rng.gamma(4, 1.5, len(grid))
        share = np.array([effect(answer, direction) for answer in grid["answer"]])
        before = np.where(direction == "noise", gap / 2, -gap / 2)
        change = sign * (share * gap + 0.3 * rng.standard_normal(len(grid)))
        own = grid[["pair_id", "quad_id", "template"]].assign(
            direction=direction, ablation="counterfactual" if direction == "noise" else "clean", site_set=0,
            logit_diff_before=before, logit_diff_after=before + change, logit_diff_clean=gap / 2,
            logit_diff_corrupt=-gap / 2, profile="", task="superset", position="last", half="confirmation",
        )  # fmt: skip
        frames.append(own)
    return pd.concat(frames, ignore_index=True)


def made_needed(grid: pd.DataFrame, share: float, ceiling: float = 0.5) -> pd.DataFrame:
    """Records of a class-neutral ablation: of the whole final residual, which takes `ceiling` of the gap away, and of a
    set of sites that takes away `share` of that."""
    kinds = {WHOLE: ceiling, 0: share * ceiling}
    parts = [made_joint(grid, lambda *_, lost=lost: lost, 7).assign(site_set=place) for place, lost in kinds.items()]
    frame = pd.concat(parts)
    return frame[frame["direction"] == "noise"].assign(ablation="resample")


def test_damage_is_a_share_of_what_the_ablation_can_take_away_and_the_counterfactual_one_stands_apart():
    grid = made_grid(3)
    joint = pd.concat([made_joint(grid, lambda *_: 0.9), made_needed(grid, 0.7)])
    found = {row["quantity"]: row["estimate"] for row in page.both_ways(joint, PARAMS)}
    assert found == pytest.approx({"damage": 0.7, "recovery": 0.9, "counterfactual damage": 0.9}, abs=0.05)
    own = joint[joint["ablation"] == "resample"]
    lost = (own["logit_diff_before"] - own["logit_diff_after"]).groupby(own["site_set"]).sum()
    assert found["damage"] == pytest.approx(lost[0] / lost[WHOLE])
    nothing = pd.concat([made_joint(grid, lambda *_: 0.9), made_needed(grid, 0.7, ceiling=-0.1)])
    assert np.isnan(page.both_ways(nothing, PARAMS)[0]["estimate"]), "no ceiling, no share"


def test_groups_recover_what_was_put_in_and_keep_classes_of_few_quads():
    grid = made_grid(6)
    rare = made_grid(3, ("artist", "writer")).assign(answer="scientist", corrupt_answer="writer")
    grid = pd.concat(
        [grid[grid["answer"] != "scientist"], rare.assign(pair_id="r" + rare["pair_id"], quad_id="r" + rare["quad_id"])]
    )
    planted = {"artist": 0.9, "athlete": 0.4}
    joint = made_joint(grid, lambda answer, direction: planted.get(answer, 0.7) - 0.1 * (direction == "noise"))
    joint = pd.concat([joint, made_needed(grid, 0.7)])
    table = page.groups(page.with_pairs(joint, grid), PARAMS).set_index(["kind", "group", "quantity"])
    assert table.loc[("superset", "artist", "recovery"), "estimate"] == pytest.approx(0.9, abs=0.05)
    assert table.loc[("superset", "artist", page.MIRRORED), "estimate"] == pytest.approx(0.8, abs=0.05)
    assert table.loc[("superset", "athlete", page.MIRRORED), "estimate"] == pytest.approx(0.3, abs=0.05)
    for name, quads in (("artist", 24), ("scientist", 3)):
        row = table.loc[("superset", name, "damage")]
        assert row["quads"] == quads and np.isnan(row["low"]) == (quads < 20) and np.isfinite(row["estimate"])
    assert {"profession", "order", "two names", "template", "supersets", "all"} <= set(
        table.index.get_level_values("kind")
    )


def test_an_effect_without_a_gap_is_no_number_and_no_error():
    grid = made_grid(2)
    joint = made_joint(grid, lambda *_: 0.5).assign(logit_diff_corrupt=9.0)
    assert page.groups(page.with_pairs(joint, grid), PARAMS)["estimate"].isna().all()
    assert all(np.isnan(row["estimate"]) for row in page.both_ways(joint.head(0), PARAMS))


def both(kind: str, group: str, low: float, estimate: float = 0.7, **about) -> list[dict]:
    rows = [{"kind": kind, "group": group, "quantity": quantity, "estimate": estimate, "low": low, "high": 0.9}
            for quantity in ("damage", "recovery")]  # fmt: skip
    return [row | {"pairs": 40, "quads": 20} | about for row in rows]


def held_out(superset: str, low: float) -> list[dict]:
    about = {"superset": superset, "picked_on": 50, "size": 4, "sites": "21.6", "overlap": 0.8, "reached": True}
    return both("without", "", low, **about) + both("only", "", low, **about)


def spoken(verdict: page.Verdict, circuits: pd.DataFrame, p: float = 0.001) -> str:
    assert "general" not in verdict.verdict  # a word that says something else of placebo pairs
    sites = pd.DataFrame({"sure": [True, True, False]})
    tables = SimpleNamespace(circuits=circuits, interaction=(SimpleNamespace(p_overall=p), sites, ""))
    return page.verdict_sentence(verdict, tables, PARAMS)


def test_general_means_every_class_and_every_circuit_that_did_not_see_it():
    classes = pd.DataFrame([row for name in SUPERSETS for row in both("superset", name, 0.6)])
    circuits = pd.DataFrame([row for name in SUPERSETS for row in held_out(name, 0.55)])
    good = page.decide(classes, circuits, PARAMS)
    assert good.verdict == page.EVERY and good.tested == list(SUPERSETS) and good.failing.empty
    assert "Verdict: the slice as a whole carries every superset" in spoken(good, circuits)
    assert "not do so alike: the shares of 2 differ" in spoken(good, circuits)
    assert "differ" not in spoken(good, circuits, 0.5)

    weak = classes.copy()
    weak.loc[(weak["group"] == "writer") & (weak["quantity"] == "recovery"), "low"] = 0.49
    bad = page.decide(weak, circuits, PARAMS)
    sentence = spoken(bad, circuits)
    assert bad.verdict == page.NOT_EVERY and "the slice in writer (recovery" in sentence and "artist" not in sentence

    blind = circuits.copy()
    blind.loc[(blind["superset"] == "artist") & (blind["kind"] == "without"), "low"] = 0.2
    bad = page.decide(classes, blind, PARAMS)
    assert bad.verdict == page.NOT_EVERY and set(bad.failing["superset"]) == {"artist"}
    assert "picked without it in artist" in spoken(bad, blind)
    mirrored = pd.DataFrame([row | {"quantity": page.MIRRORED, "low": 0.1} for row in classes.to_dict("records")])
    assert page.decide(pd.concat([classes, mirrored]), circuits, PARAMS).verdict == page.EVERY
    own = circuits.copy()
    own.loc[own["kind"] == "only", "low"] = 0.1  # a class's own circuit decides nothing
    assert page.decide(classes, own, PARAMS).verdict == page.EVERY


def test_a_class_of_few_quads_is_named_and_decides_nothing():
    classes = pd.DataFrame(
        [row for name in SUPERSETS for row in both("superset", name, 0.6 if name != "writer" else np.nan)]
    )
    verdict = page.decide(classes, pd.DataFrame(), PARAMS)
    assert verdict.verdict == page.EVERY and verdict.untested == ["writer"]
    sentence = spoken(verdict, pd.DataFrame())
    assert "takes nothing away): writer" in sentence and "were not there to test" in sentence
    nothing = page.decide(classes.assign(low=np.nan), pd.DataFrame(), PARAMS)
    assert nothing.verdict == page.UNTESTABLE and nothing.untested == list(SUPERSETS)


def test_a_circuit_that_could_not_be_picked_keeps_its_rows():
    grid = made_grid(3)
    for_artists = made_joint(grid, lambda answer, _: 0.6 if answer == "artist" else 0.2, 1).assign(site_set=1)
    needed = made_needed(grid, 0.5)
    joint = pd.concat(
        [made_joint(grid, lambda *_: 0.8), for_artists, needed, needed[needed["site_set"] == 0].assign(site_set=1)]
    )
    empty = Circuit("without", "artist", (), ())
    found = Circuit("only", "artist", ("a",), (Site(1, "mlp"), Site(2, "mlp")), 1, True)
    joint, sites = page.with_pairs(joint, grid), [Site(1, "mlp"), Site(3, "head", 0)]
    table = page.circuit_table(joint, [empty, found], sites, PARAMS)
    assert table["estimate"].isna().tolist() == [True] * 3 + [False] * 3
    assert table["size"].tolist() == [0] * 3 + [1] * 3
    assert table["estimate"].iloc[3:].tolist() == pytest.approx([0.5, 0.6, 0.6], abs=0.1)
    assert table["overlap"].iloc[3] == pytest.approx(1 / 2)  # mlp 1 of mlp 1 and 3.0
    moved = page.transfer(joint, [empty, found], PARAMS)
    assert set(moved["picked_on"]) == {"the slice", "artist"} and set(moved["tested_on"]) == set(SUPERSETS)
    moved = moved.set_index(["picked_on", "tested_on", "quantity"])["estimate"]
    assert moved["artist", "artist", page.MIRRORED] == pytest.approx(0.6, abs=0.1)
    assert moved["artist", "writer", "recovery"] == pytest.approx(0.2, abs=0.1)
    assert moved["the slice", "writer", "damage"] == pytest.approx(0.5, abs=0.1)
    assert moved["the slice", "writer", page.MIRRORED] == pytest.approx(0.8, abs=0.1)


def test_a_site_that_serves_one_class_alone_shows_as_interaction_and_one_that_serves_all_does_not():
    grid, frames = made_grid(6), []
    for head in range(6):
        joint = made_joint(grid, lambda answer, _, head=head: 0.3 * (head != 0 or answer == "artist"), seed=head)
        frames.append(joint.assign(layer=0, component="head", head=head).drop(columns="site_set"))
    frame = pd.concat(frames, ignore_index=True)
    every = [Site(0, "head", head) for head in range(6)]
    test, sites, why = page.interaction(page.with_pairs(frame, grid), every, PARAMS)
    assert why == "" and test.p_overall < 0.02
    first = sites.iloc[0]
    assert (first["site"], first["most"], first["sure"]) == ("0.0", "artist", True)
    assert sites["sure"].sum() == 1
    alike = page.with_pairs(frame[frame["head"] > 0], grid)
    assert (test := page.interaction(alike, every, PARAMS)[0]).p_overall > 0.05
    with pytest.MonkeyPatch.context() as patch:  # what would have been missed is not denied
        patch.setattr(page, "COARSE", test.resolution / 2)
        test, _, why = page.interaction(alike, every, PARAMS)
        assert test is None and why.startswith("in 60 quads, a superset that has 0.2") and why.endswith("about 240")
    few = made_grid(1)
    test, _, why = page.interaction(page.with_pairs(frame[frame["pair_id"].isin(few["pair_id"])], few), every, PARAMS)
    assert test is None and why.startswith("it takes three supersets that are each in 10 quads or more, and the best")
    test, _, why = page.interaction(page.with_pairs(frame, grid), [Site(0, "head", 0), Site(5, "mlp")], PARAMS)
    assert test is None and "fewer than two sites" in why


def test_single_sites_stand_behind_all_other_sets_some_of_which_may_be_empty():
    none = page.numbered(SimpleNamespace(circuits=[], random={}))
    assert none == {"the slice": [0], "only": []} and page.behind(none) == 1
    own = Circuit("only", "artist", (), (Site(1, "mlp"),), 1)
    kinds = {"random heads": 3, "random heads and MLPs": 3}
    sets = page.numbered(SimpleNamespace(circuits=[own], random=kinds))
    assert [sets[name] for name in kinds] == [[2, 3, 4], [5, 6, 7]] and page.behind(sets) == 8


def test_no_site_is_marked_where_the_quads_are_too_few_for_a_test():
    def said(each: int, *meetings: str) -> str:
        rows = [(f"q{n}", *meeting.split()) for n, meeting in enumerate(meetings * each)]
        names = ["quad_id", "answer", "corrupt_answer"]
        frame = page.well_covered(pd.DataFrame(rows, columns=names).set_index(names))
        return page.untestable(frame.index)

    three = ("artist writer", "artist athlete", "athlete writer")
    assert said(7, *three) == "" == said(9, *three, "scientist writer")  # the rare one stays out
    assert said(6, *three) == "18 quads are too few (20 are needed)"
    assert said(4, *three).endswith("the best covered are artist in 8, athlete in 8 and writer in 8")
    assert said(20, "artist writer") == (
        "artist and writer meet so that what a site does for one cannot be told from what it does for another"
    )
    assert page.untestable(pd.MultiIndex.from_arrays([[]] * 3, names=["quad_id", "answer", "corrupt_answer"])) == (
        "no pair has a gap above zero to take shares of"
    )


# --- the placebo


def made_placebo(shares: dict[str, float], quads: int, template: str = "profession_both") -> pd.DataFrame:
    """Placebo records of the slice: of each class, `quads` quads whose gap it recovers a share of."""
    parts = []
    for name, share in shares.items():
        grid = made_grid(quads, ("x", "y")).assign(template=template)
        grid["pair_id"], grid["quad_id"] = (name + grid[column] for column in ("pair_id", "quad_id"))
        own = made_joint(grid, lambda *_, share=share: share, seed=len(parts))
        parts.append(own[own["direction"] == "denoise"].assign(shared=name, attribute="region"))
    return pd.concat(parts, ignore_index=True)


def test_a_class_is_specific_or_not_by_its_own_two_shares():
    grid = made_grid(8)
    joint = page.with_pairs(made_joint(grid, lambda *_: 0.8), grid)
    frame = pd.concat([made_placebo({"artist": 0.1, "writer": 0.7}, 25), made_placebo({"athlete": 0.8}, 6)])
    idle = frame.assign(site_set=1, logit_diff_after=frame["logit_diff_before"])
    none = joint.assign(site_set=1, logit_diff_after=joint["logit_diff_before"])
    some = [own.assign(site_set=2) for own in (joint, frame)]  # as much as the slice
    joint, frame = pd.concat([joint, none, some[0]]), pd.concat([frame, idle, some[1]])
    one = placebo_page.specificity(joint, frame, {placebo.SLICE: [0], "random MLPs": [1]}, PARAMS)
    (told,) = (text for text in placebo_page.sentences(one, PARAMS) if text.startswith("Random MLPs of other layers"))
    assert told.endswith(
        "recover 0.00 [0.00, 0.00] of that gap. Divided by their share of the superset gap: not defined."
    )
    rows = placebo_page.specificity(joint, frame, {placebo.SLICE: [0], "random heads": [1, 2]}, PARAMS)
    own = rows[rows["set"] == placebo.SLICE].set_index("group")
    assert own.loc["artist", "quotient_estimate"] == pytest.approx(0.1 / 0.8, abs=0.05)
    assert own["verdict"].to_dict() == {
        "all pairs": "open",
        "artist": "specific",
        "athlete": None,
        "writer": "general",
    }
    assert own.loc["athlete", ["quads", "placebo_quads"]].tolist() == [32, 6]
    every = frame[frame["site_set"] == 0]
    whole = (every["logit_diff_after"] - every["logit_diff_before"]).sum()
    whole /= (every["logit_diff_clean"] - every["logit_diff_corrupt"]).sum()
    assert own.loc["all pairs", "placebo_estimate"] == pytest.approx(whole)
    random = rows[rows["set"] == "random heads"].set_index("group").loc["all pairs"]
    assert random["placebo_estimate"] == pytest.approx(whole / 2)
    alone = rows[rows["set"].str.startswith("random heads, set")]
    assert alone["set"].tolist() == ["random heads, set 1", "random heads, set 2"] and set(alone["group"]) == {
        "all pairs"
    }
    assert alone["placebo_estimate"].tolist() == pytest.approx([0, whole])
    text = " ".join(placebo_page.sentences(rows, PARAMS))
    least = placebo_page.quotient(next(rows[rows["group"] == "artist"].itertuples()))
    assert "the slice is specific in artist; not specific in writer." in text
    assert f"in the same class is smallest in artist ({least}) and largest in athlete" in text
    assert "the slice is untested in athlete: 20 quads are needed, and there are as few as 6." in text
    assert f"of that gap on average over 2 sets (one by one 0.000 [0.000, 0.000] and {whole:.3f} [" in text
    every = next(rows[(rows["set"] == "random heads") & (rows["group"] == "all pairs")].itertuples())
    assert f"Divided by their share of the superset gap: {placebo_page.quotient(every)}." in text
    params = PARAMS.model_copy(update={"specific_ratio": 0.5})
    shown = placebo_page.table(rows, params)
    assert shown["placebo less 0.5 x superset"].tolist() == [
        placebo_page.of(row, "beyond") for row in rows.itertuples()
    ]
    cells = shown[(shown["patched"] == "random heads") & (shown["pairs of"] == "all pairs")].iloc[0]
    assert cells["placebo over superset"] == placebo_page.quotient(every) and cells["verdict"] == "not decided"
    assert len(shown) == len(rows) and not shown.isna().any(axis=None) and placebo_page.figure(rows) is not None


def test_placebo_quads_are_those_kept_and_of_the_right_sign_in_the_other_template_too():
    pairs = pd.DataFrame(
        {"pair_id": ["a", "b", "c"], "attribute": "region", "shared": "artist", "kept": [True, False, True]}
    )
    frame = pd.DataFrame({"pair_id": ["a@t", "b@t", "c@t", "a@u", "c@u"], "template": list("tttuu")})
    frame = frame.assign(quad_id=frame["pair_id"].str[0], logit_diff_clean=[1, 1, 1, -1, 1], logit_diff_corrupt=0.0)
    assert placebo.of_quads(frame, pairs, 0.01)["pair_id"].tolist() == ["a@t", "c@t", "c@u"]
    assert placebo.of_quads(frame, pairs.assign(kept=False), 0.01).empty
    assert placebo.specificity(frame, frame.drop(columns="quad_id").head(0), {placebo.SLICE: [0]}, PARAMS).empty
    assert (
        placebo_page.sentences(pd.DataFrame(), PARAMS) == [placebo_page.NONE]
        and placebo_page.figure(pd.DataFrame()) is None
    )


def test_what_is_specific_means_the_same_on_pages_04_and_07():
    for name in params.profiles():
        given = params.load_profile(name)
        assert given["generality"]["specific_ratio"] == given["sufficiency"]["specific_ratio"], name


# --- controls


def made_controls(shift, prompts: int = 60, quads: int = 60, noise: float = 0.5):
    """`controls.ablated`'s frame: ordinary answers fall by 3, and `shift` is added to the control's candidates."""
    rng = np.random.default_rng(0)
    grid = made_grid(-(-quads // 10)).head(2 * quads)
    names = list(SUPERSETS)
    rows, number = [], count()
    for kind, ids in (("ordinary", grid.itertuples()), ("things", range(prompts))):
        for own in ids:
            change = noise * rng.standard_normal(5)
            if kind == "ordinary":
                change[names.index(own.answer)] -= 3
                row = {"pair_id": own.pair_id, "quad_id": own.quad_id}
            else:
                change += shift
                row = {"pair_id": f"control{own}", "quad_id": f"control{own}"}
            before = rng.standard_normal(5)
            for name, place, scale in (("slice", 0, 1.0), ("heads", 1, 0.6), ("random", 2, 0.0), ("random", 3, 0.0)):
                moved = change * scale + 0.02 * rng.standard_normal(5)
                own_row = row | {"ablation": "mean", "set": name, "number": place, "before": before}
                rows.append(own_row | {"after": before + moved, "order": next(number)})
    prompts_table = pd.DataFrame(
        {"control": "things", "pair_id": [f"control{i}" for i in range(prompts)], "classes": ""}
    )
    return pd.DataFrame(rows), prompts_table, grid


@pytest.mark.parametrize(
    ("shift", "verdict", "met"),
    [((0, 0, 0, 0, 0), "silent", True), ((0, 0, -2.0, 0, 0), "active", False), ((0, 0.75, 0, 0, 0), "undecided", None)],
)
def test_silence_is_claimed_only_where_every_candidate_stays_within_the_margin(shift, verdict, met):
    frame, prompts, grid = made_controls(np.array(shift), noise=0.5 if verdict != "undecided" else 1.0)
    candidates, verdicts = controls_page.scored(controls_page.with_controls(frame, prompts, grid), SUPERSETS, PARAMS)
    found = verdicts.drop_duplicates("control").set_index("control")
    assert (found.loc["things", "verdict"], found.loc["things", "met"]) == (verdict, met)
    assert found.loc["ordinary", "verdict"] == "active" and found.loc["ordinary", "fall"] == pytest.approx(2.4, abs=0.1)
    assert found.loc["random heads", "met"] is True and found.loc["random heads", "candidates"] == 10
    assert found.loc["random heads", "fall"] == pytest.approx(0.6 * 2.4, abs=0.1)  # the margin is the heads' own
    assert set(candidates["scoring"]) == {"centred", "raw"}


def test_shuffled_labels_are_silent_on_an_effect_that_right_labels_show():
    frame, prompts, grid = made_controls(np.zeros(5), quads=200)
    _, verdicts = controls_page.scored(controls_page.with_controls(frame, prompts, grid), SUPERSETS, PARAMS)
    found = verdicts[verdicts["scoring"] == "centred"].set_index("control")
    assert found.loc["shuffled labels", "verdict"] == "silent" and found.loc["ordinary", "verdict"] == "active"


def test_the_primary_scoring_is_named_and_so_is_how_many_others_agree():
    frame, prompts, grid = made_controls(np.zeros(5))
    things = frame["pair_id"].str.startswith("control")
    frame["after"] = [after + 2.0 * moved for after, moved in zip(frame["after"], things, strict=True)]  # all alike
    rows = controls_page.with_controls(frame, prompts, grid)
    candidates, verdicts = controls_page.scored(rows, SUPERSETS, PARAMS)
    said = controls_page.sentences(verdicts, candidates, controls_page.leaders(rows, PARAMS), 0.2)
    assert "This scoring, centred under `mean`, is the primary one: verdicts, figure and claims go by it." in said[0]
    assert any(
        text.startswith("Control things") and "of 1 other scoring 0 agree (raw under `mean` active)." in text
        for text in said
    )
    assert controls_page.headline(verdicts, 0.2) == [
        "Controls by the primary scoring (centred under `mean`), each by itself, as expected: things, shuffled labels "
        "and random heads. Of their 3 other scorings, 1 comes to the same verdict. Page 10 judges them with all other "
        "claims."
    ]
    assert controls_page.headline(verdicts.head(0), 0.2) == []
    unsure = pd.DataFrame({"verdict": ["silent", "undecided", "silent"], "p": [0.01, 0.077, 0.02]})
    unsure = unsure.assign(scoring=["centred", "raw", "centred"], ablation=["mean", "mean", "zero"])
    assert controls_page.agreeing(unsure) == (
        "of 2 other scorings 1 agrees (raw under `mean` undecided; centred under `zero` silent)"
    )
    assert controls_page.agreeing(unsure.head(1)) == "no other scoring was made"


def test_a_scoring_that_is_blind_to_the_slices_own_heads_does_not_count():
    """By its margin even what the slice's heads do is silence; random heads are held against these heads."""
    frame, prompts, grid = made_controls(np.zeros(5))
    rows = controls_page.with_controls(frame, prompts, grid)
    candidates, verdicts = controls_page.scored(rows, SUPERSETS, PARAMS)
    heads = (verdicts["control"] == "slice's heads") & (verdicts["scoring"] == "raw")
    every = verdicts.assign(verdict=verdicts["verdict"].mask(heads, "silent"))
    said = controls_page.sentences(every, candidates, controls_page.leaders(rows, PARAMS), 0.2)
    raw = verdicts[heads].iloc[0]
    assert said[1] == (
        "Raw under `mean` is counted as another scoring for random heads alone: there the slice takes "
        f"{raw['fall']:.2f} logits from the ordinary answer, and by a margin of 20% of that its own heads are silent."
    )
    (things,) = (text for text in said if text.startswith("Control things"))
    assert things.endswith("no other scoring was made.")
    assert "Of their 1 other scoring, 1 comes to the same" in controls_page.headline(every, 0.2)[0]
    (random,) = (text for text in said if text.startswith("Control random heads"))
    assert "of 1 other scoring 1 agrees (raw under `mean` silent)" in random
    power = verdicts.set_index("control").loc["things", "power"].iloc[0]
    assert f"Were there nothing, silence would have been shown with a probability of {power:.0%}." in things


def test_too_few_prompts_decide_nothing():
    frame, prompts, grid = made_controls(np.zeros(5), prompts=6)
    _, verdicts = controls_page.scored(controls_page.with_controls(frame, prompts, grid), SUPERSETS, PARAMS)
    found = verdicts.drop_duplicates("control").set_index("control")
    assert found.loc["things", "verdict"] == "undecided" and found.loc["things", "met"] is None


@pytest.mark.parametrize(
    ("first", "second", "verdict", "met"),
    [(-1.0, -1.2, "partial", True), (-1.0, 0.8, "not partial", False), (-4.0, -1.0, "not partial", False)],
)
def test_partial_means_that_both_fall_and_neither_as_far_as_an_answer(first, second, verdict, met):
    rng = np.random.default_rng(0)
    matrix = pd.DataFrame(np.array([first, second, 0.5]) + 0.3 * rng.standard_normal((40, 3)))
    spans = [(value, value - 0.2, value + 0.2) for value in (first, second, 0.5)]
    table = pd.DataFrame(spans, columns=["estimate", "low", "high"])
    found = controls_page.verdict_of("mixed", matrix, table, 3.0, PARAMS)
    assert (found["verdict"], found["met"]) == (verdict, met)


def test_changes_are_aligned_by_the_classes_of_the_names():
    change = [np.array([10.0, 20, 30, 40, 50]), np.array([1.0, 2, 3, 4, 5])]
    rows = pd.DataFrame({"change": change, "classes": ["writer,artist", "artist,athlete"], "quad_id": ["a", "b"]})
    mixed = controls_page.aligned_changes(rows, SUPERSETS, "mixed", 0)
    assert mixed.to_numpy().tolist() == [[50, 10, 30], [1, 3, 11 / 3]]
    answered = controls_page.aligned_changes(rows.assign(classes=["writer", "athlete"]), SUPERSETS, "ordinary", 0)
    assert answered.to_numpy().tolist() == [[50, 10, 20, 30, 40], [3, 4, 5, 1, 2]]
    assert controls_page.aligned_changes(rows, SUPERSETS, "things", 0).to_numpy().tolist() == [list(c) for c in change]


def test_a_leader_that_falls_in_every_prompt_shows_although_no_name_does():
    frame, prompts, grid = made_controls(np.zeros(5), prompts=100)
    things = frame["pair_id"].str.startswith("control")
    frame.loc[things, "after"] = pd.Series(
        [b - 2 * (b == b.max()) for b in frame[things]["before"]], index=frame.index[things]
    )
    leaders = controls_page.leaders(controls_page.with_controls(frame, prompts, grid), PARAMS).set_index("control")
    assert leaders.loc["things", "low"] > 1
    leaders.loc["things", ["low", "high"]] = np.nan  # too few quads
    shown = controls_page.leaders_table(leaders.reset_index()).set_index("control").iloc[:, 0]
    assert shown["things"] == of_row(leaders.loc["things"]) and "nan" not in shown["things"]
    assert controls_page.leaders_table(pd.DataFrame()) is None
    candidates, _ = controls_page.scored(controls_page.with_controls(frame, prompts, grid), SUPERSETS, PARAMS)
    own = candidates[(candidates["control"] == "things") & (candidates["scoring"] == "centred")]
    assert own["estimate"].abs().max() < 0.5


# --- the rule's lines, the sentences, the figures


def test_rule_lines_are_the_least_squares_fits_to_the_two_steps():
    fitted = pd.DataFrame({"term": ["one name", "two names"], "estimate": [1.0, 3.0]})
    asked = pd.DataFrame({"n_a": [1] * 6 + [0] * 4, "n_b": [1] * 2 + [0] * 8})  # two names twice, one name four times
    lines = name_rule.lines(SimpleNamespace(fitted=fitted, names=SimpleNamespace(count="both")), asked)
    x, y = np.array([1] * 4 + [2] * 2), np.array([1.0] * 4 + [3.0] * 2)
    assert lines["additive"][1] == pytest.approx((x * y).sum() / (x**2).sum())
    assert lines["OR"] == pytest.approx([0, y.mean(), y.mean()]) and lines["AND"] == [0, 0, 3.0]


def test_pairs_before_any_selection_stand_beside_the_ends():
    both = {"kind": "selection", "quantity": "recovery"}
    shares = [("solved", 0.7, 29), (page.UNSELECTED, 0.8, 60), ("not solved", 0.9, 8)]
    rows = [both | {"group": group, "estimate": share, "low": None, "high": None, "quads": quads}
            for group, share, quads in shares]  # fmt: skip
    assert (
        "By how pairs were selected, joint recovery runs from 0.70 (solved) to 0.90 (not solved). In pairs before any "
        "selection it is 0.80 (60 quads)."
    ) in page.group_sentences(pd.DataFrame(rows), "t")


def test_damage_and_recovery_of_another_template_say_their_own_quads():
    def said(damage: int, recovery: int) -> str:
        sizes = {"damage": damage, "recovery": recovery, page.MIRRORED: 30}
        about = {"kind": "template", "group": "u", "estimate": 0.8, "low": 0.7, "high": 0.9}
        rows = [about | {"quantity": name, "quads": quads} for name, quads in sizes.items()]
        return page.group_sentences(pd.DataFrame(rows), "t")[-1]

    each = "In `u`, jointly, its damage is 0.80 [0.70, 0.90] and recovery is 0.80 [0.70, 0.90]"
    assert said(20, 21) == f"{each} (quads: 20 for damage and 21 for recovery)."
    assert said(21, 21) == f"{each} (21 quads)."


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("p", [0.2, 0.001, None])
def test_whether_the_sites_share_the_work_alike_is_in_the_headline_once(p, every, monkeypatch):
    tables = made_tables(6)
    decided = page.decide(tables.groups, tables.circuits, PARAMS)
    wanted = page.EVERY if every else page.NOT_EVERY
    monkeypatch.setattr(page, "decide", lambda *_: decided._replace(verdict=wanted))
    sites = pd.DataFrame({"site": ["a", "b"], "sure": [True, False]})
    test = None if p is None else SimpleNamespace(p_overall=p, resolution=0.3)
    tables = tables._replace(interaction=(test, sites, "why"))
    found = page.numbers(STEP, MEASURED, tables)
    told = [text for text in found["headline"] if "class x site interaction" in text]
    differ = p == 0.001
    assert len(told) == (p is not None and not (every and differ))
    assert ("Site by site it does not do so alike" in found["headline"][0]) == (every and differ)
    assert all("page 10 judges the claim that they differ, on fresh people where it has some" in text for text in told)
    assert ("are not shown to share the work otherwise than alike" in " ".join(found["sentences"])) == (p == 0.2)


EARLIER = {"ablation": "resample", "estimate": 0.9, "low": 0.8, "high": 1.0, "pairs": 3, "quads": 2}
STEP = SimpleNamespace(params=PARAMS, record={}, find={"hydra": {"needed": [EARLIER]}}.get)
COUNTED = {"template": "profession_both", "possible": 9, "aligned": 9, "asked": 9, "left": 8, "quads": 4, "why": ""}
NONE_LEFT = {"template": "both_famous", "aligned": 0, "asked": 0, "left": 0, "quads": 0, "why": "tokens differ"}
MEASURED = SimpleNamespace(counts=[COUNTED, COUNTED | NONE_LEFT], judge="resample")


def test_a_circuit_that_is_the_slice_itself_is_said_to_be_no_second_test():
    both = {"size": 9, "quantity": "recovery", "estimate": 0.8, "low": 0.7, "high": 0.9}
    rows = [both | {"kind": kind, "superset": name, "overlap": overlap}
            for kind in ("without", "only") for name, overlap in (("athlete", 1.0), ("writer", 0.8))]  # fmt: skip
    *_, alike, own = page.circuit_sentences(pd.DataFrame(rows))
    assert alike.startswith("Picked without athlete, the circuit is the slice itself: there")
    shared = "80% (writer, 9 sites) to 100% (athlete, 9 sites, the slice itself) of the sites in either."
    assert own.endswith(shared)


def made_tables(quads: int) -> page.Tables:
    grid, every = made_grid(quads), [Site(0, "head", head) for head in range(4)]
    joint = page.with_pairs(pd.concat([made_joint(grid, lambda *_: 0.8), made_needed(grid, 0.7)]), grid)
    alone = [
        made_joint(grid, lambda *_: 0.3, seed=head).assign(layer=0, component="head", head=head) for head in range(4)
    ]
    alone = page.with_pairs(pd.concat(alone), grid)
    heads = page.class_matrices(alone, SUPERSETS)
    changes = controls_page.with_controls(*made_controls(np.zeros(5)))
    candidates, verdicts = controls_page.scored(changes, SUPERSETS, PARAMS)
    circuits = [Circuit(kind, name, ("p",), (), 0) for name in SUPERSETS for kind in ("without", "only")]
    return page.Tables(
        groups=page.groups(joint, PARAMS),
        sites=page.site_effects(joint, 0, [Site(0, "mlp")], PARAMS),
        heads=heads,
        ranks=page.ranks(heads, PARAMS),
        interaction=page.interaction(alone, every, PARAMS),
        circuits=page.circuit_table(joint, circuits, [Site(0, "mlp")], PARAMS),
        transfer=page.transfer(joint, circuits, PARAMS),
        specific=placebo.specificity(joint, made_placebo({"artist": 0.3}, 4 * quads), {placebo.SLICE: [0]}, PARAMS),
        candidates=candidates,
        controls=verdicts,
        leaders=controls_page.leaders(changes, PARAMS),
        rule=None,
    )


@pytest.mark.parametrize("quads", [1, 6])
def test_every_sentence_is_made_and_every_figure_drawn_however_little_there_is(quads):
    tables = made_tables(quads)
    found = page.numbers(STEP, MEASURED, tables)
    text = " ".join(found["sentences"])
    assert not re.search(r"\bnan\b", text) and "0 of the 0 asked have a gap" in text and "tokens differ" in text
    words = {
        "damage": "takes away {} of what",
        "recovery": "recover {} of",
        page.MIRRORED: "Counterfactual damage is {}",
    }
    for quantity, said in words.items():  # the number in the sentence is the table's
        row = tables.groups[(tables.groups["kind"] == "all") & (tables.groups["quantity"] == quantity)].iloc[0]
        assert said.format(of_row(row)) in text
    assert {page.EVERY: "as a whole carries every", page.NOT_EVERY: "not all that is asked", page.UNTESTABLE: ""}[
        found["verdict"]
    ] in text
    assert ("cannot be tested here. No interval of damage" in text) == (quads == 1)
    assert "Page 05 has 0.90 [0.80, 1.00] (3 pairs of 2 quads): fewer or other pairs" in text
    assert "Page 05" not in " ".join(page.needed_sentences(tables.groups, "mean", {"needed": [EARLIER]}))
    lowest = tables.groups.query("kind == 'superset' and quantity == 'recovery'").sort_values("estimate").iloc[0]
    assert f"By superset, joint recovery runs from {of_row(lowest)} ({lowest['group']}) to " in text
    assert "Without artist, scientist, athlete, politician and writer no circuit could be picked" in text
    assert not page.site_table(tables).isin(["nan"]).any(axis=None)
    shown = controls_page.verdict_table(tables.controls)
    few = (tables.controls["clusters"] < 20) & tables.controls["control"].isin([*controls_page.EXPECTATIONS])
    assert ((shown["expectation"] == "too few quads to test") == few).all()
    assert not shown.isna().any(axis=None) and not shown.isin(["nan", "None"]).any(axis=None)
    assert page.by_group(STEP, tables, ["profession"]) is not None and page.by_group(STEP, tables, ["none"]) is None
    for draw in (page.by_group, page.left_out):
        assert draw(STEP, tables) is not None
    for draw in (page.site_figure, page.transfer_figure, page.site_table, page.interaction_table, page.circuits):
        assert draw(tables) is not None
    shown = page.circuits(tables)
    assert len(shown) == len(tables.circuits) / 3 and not shown.index.has_duplicates
    for row in tables.circuits.itertuples():  # each number stands beside its own circuit
        assert shown.loc[(row.superset, row.kind), row.quantity] == of_row(row)
    assert controls_page.figure(tables.candidates, 0.2) is not None
    assert page.rank_figure(tables) is not None and page.counted(MEASURED).shape == (2, 5)


@pytest.mark.parametrize(
    ("possible", "left", "said"),
    [
        (6, 6, "Of the 12 pairs of the `pairs_file`, 6 are in the half that nothing was picked on."),
        (12, 12, "The 12 pairs of the `pairs_file` form a single half: sites were picked on pairs of the same."),
        (12, 8, "form a single half, of which 8 are taken, as `pairs` asks for: sites were picked on pairs of"),
    ],
)
def test_given_pairs_of_one_half_are_not_said_to_be_untouched(possible, left, said):
    count = {"template": "own", "possible": possible, "aligned": possible, "asked": possible, "left": left, "quads": 3}
    groups = pd.DataFrame(columns=["kind", "quantity", "group", "estimate"])
    assert said in page.grid_sentences([count], groups, 12)[1]


def test_without_controls_circuits_or_rule_the_page_says_so():
    nothing = dict.fromkeys(("circuits", "transfer", "candidates", "controls", "leaders", "specific"), pd.DataFrame())
    tables = made_tables(1)._replace(**nothing, rule=None)
    found = page.numbers(STEP, MEASURED, tables)
    text = " ".join(found["sentences"])
    for said in ("No circuits were picked", "The controls were not run", "The rule was not read", placebo_page.NONE):
        assert said in text
    assert found["leave_one_out"] == [] and found["rule"] is None
    assert page.left_out(STEP, tables) is page.transfer_figure(tables) is name_rule.figure(None, None) is None
    assert "not in the results" in page.circuits(tables).data
    assert controls_page.verdict_table(tables.controls).data == controls_page.NOT_RUN and "not read" in page.NO_RULE


def test_the_rule_is_said_with_its_numbers():
    rng, rows = np.random.default_rng(0), []
    for number in range(60):
        classes = rng.choice(5, 2, replace=bool(number % 2))
        classes = classes if number % 2 == 0 else [classes[0]] * 2
        for index, word in enumerate(SUPERSETS):
            n_a, n_b = int(classes[0] == index), int(classes[1] == index)
            rows.append({"prompt": number, "name_a": f"a{number}", "name_b": f"b{number}", "superset_class": word,
                         "n_a": n_a, "n_b": n_b, "y": 2 * (n_a + n_b) + 0.1 * rng.standard_normal()})  # fmt: skip
    fit = name_rule.compare(pd.DataFrame(rows), PARAMS)
    text = " ".join(name_rule.sentences(fit).values())
    assert "additive predicts best" in text and "two names by 4.0" in text
    assert "of the first's: this leaves room for additive (1)." in text
    for ratio, said in (
        ((0.5, 0.3, 0.7), "neither additive (1) nor OR (0) is exact; OR (0) lies 0.3 outside it; in predicting people"),
        ((0.7, 0.4, 0.966), "by itself, neither additive (1) nor OR (0) is exact; additive (1) lies 0.034 outside it;"),
        ((0.7, 0.4, 1.0), "leaves room for additive (1)."),
        ((5e-4, 4e-4, 6e-4), "leaves room for OR (0)."),  # by less than the model's own noise
        ((0.5, None, None), "not testable"),
    ):
        span = SimpleNamespace(**dict(zip(("estimate", "low", "high"), ratio, strict=True)))
        result = SimpleNamespace(
            ratio=span, reason="few", fitting={"number": ("additive", "AND")}, names=fit.names, noise=1e-3
        )
        assert said in name_rule.exact_sentence(result)
        assert ("a free fit is not shown to be better than additive." in name_rule.exact_sentence(result)) == (
            "outside" in said
        )
    span = SimpleNamespace(estimate=0.5, low=0.3, high=0.7)
    result = SimpleNamespace(ratio=span, fitting={"number": ()}, names=fit.names, noise=1e-3)
    assert name_rule.exact_sentence(result).endswith("outside it.")
    assert "cannot be said" in name_rule.exact_sentence(SimpleNamespace(ratio=None, names=fit.names, noise=1e-3))
    assert name_rule.lines(fit, pd.DataFrame(rows))["additive"][2] == pytest.approx(4, abs=0.1)
    assert name_rule.figure(fit, pd.DataFrame(rows)) is not None
