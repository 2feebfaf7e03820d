"""Effects, ratios and the design's definitions, on records small enough to work out by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from lib import effects, hooks, stats
from pipeline.params import Shared
from report import site_tables


def records(rows: list[dict], **shared) -> pd.DataFrame:
    """Records with what `lib.effects` reads; keys of a row beat `shared`, which beats the defaults."""
    defaults = {
        "profile": "test", "task": "superset", "template": "default", "half": "discovery", "direction": "noise",
        "ablation": "zero", "layer": 0, "component": "head", "head": 0, "position": "last", "seed": 0,
        "pair_id": "p", "quad_id": "q", "metric_before": 1.0, "metric_after": 1.0, "logit_diff_before": 3.0,
        "logit_diff_after": 3.0, "logit_diff_clean": 3.0, "logit_diff_corrupt": -1.0,
    }  # fmt: skip
    return pd.DataFrame([defaults | shared | row for row in rows])


def two_quads(direction: str = "noise") -> pd.DataFrame:
    """Two sites, three pairs: two of quad q1 and one of q2. Gaps 4, 2, 10; effects (1, 2, 3) and (-1, 0, 6)."""
    sign = 1 if direction == "noise" else -1
    rows = []
    for head, changes in ((0, (1, 2, 3)), (1, (-1, 0, 6))):
        for pair, quad, gap, change in zip("abc", ("q1", "q1", "q2"), (4.0, 2.0, 10.0), changes, strict=True):
            rows.append({
                "head": head, "pair_id": pair, "quad_id": quad, "logit_diff_clean": gap, "logit_diff_corrupt": 0.0,
                "logit_diff_before": 5.0, "logit_diff_after": 5.0 - sign * change, "metric_after": 1.0 - sign * change,
            })  # fmt: skip
    return records(rows, direction=direction, ablation="zero" if direction == "noise" else "clean")


def test_effects_are_positive_where_the_answer_suffers_or_is_helped():
    for direction in ("noise", "denoise"):
        frame = two_quads(direction)
        assert effects.effect(frame).tolist() == [1, 2, 3, -1, 0, 6]
        assert effects.effect(frame, "metric").tolist() == [1, 2, 3, -1, 0, 6]
    with pytest.raises(ValueError, match="sideways"):
        effects.effect(frame.assign(direction="sideways"))


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_damage_and_recovery_are_ratios_of_sums(direction):
    """`curve` and `ratios` agree; where the gaps do not add up to more than 0 there is a ratio from neither."""
    frame = two_quads(direction)
    assert effects.ratios(frame, ["head"]).to_dict() == {0: 6 / 16, 1: 5 / 16}
    assert effects.curve(frame, stats.DEFAULTS, ["head"])["estimate"].tolist() == pytest.approx([6 / 16, 5 / 16])
    flat = frame.assign(logit_diff_clean=0.0)
    assert effects.ratios(flat, ["head"]).isna().all()
    with pytest.raises(ValueError, match="do not add up to more than 0"):
        effects.curve(flat, stats.DEFAULTS, ["head"])


def test_tested_sites_have_the_numbers_of_their_matrix():
    rng = np.random.default_rng(0)
    rows = [
        {"quad_id": f"q{quad:02d}", "head": head, "logit_diff_after": 3.0 - rng.normal(head, 1)}
        for quad in range(25)
        for head in range(3)
    ]
    frame, own = records(rows), stats.Settings(resamples=200, flips=200, seed=1)
    table, matrix = effects.tested(frame, own, tail="greater"), effects.quad_matrix(frame).values
    together = stats.simultaneous(matrix, own)
    assert list(table.columns) == [*effects.SITE, "estimate", "low", "high", "p", "quads"]
    assert table["low"].tolist() == [span.low for span in together]
    assert table["p"].tolist() == stats.max_t(matrix, own, "greater").tolist()
    both = effects.by_half(pd.concat([frame, frame.assign(half="confirmation")]), lambda part: part.head(1))
    assert both["half"].tolist() == ["discovery", "confirmation"]


def test_quad_matrix():
    shuffled = two_quads().sample(frac=1, random_state=1)
    matrix = effects.quad_matrix(shuffled)
    assert matrix.values.tolist() == [[1.5, -0.5], [3.0, 6.0]]
    assert matrix.quads.tolist() == ["q1", "q2"]
    assert list(matrix.sites.columns) == effects.SITE and matrix.sites["head"].tolist() == [0, 1]
    assert effects.quad_matrix(shuffled, "metric_after").values.tolist() == [[-0.5, 1.5], [-2.0, -5.0]]
    numerator, denominator = (effects.quad_matrix(shuffled, name, reduce="sum").values for name in ("effect", "gap"))
    assert numerator.tolist() == [[3, -1], [3, 6]] and denominator.tolist() == [[6, 6], [10, 10]]
    np.testing.assert_allclose(numerator.sum(0) / denominator.sum(0), effects.ratios(shuffled, ["head"]))
    assert effects.quad_matrix(shuffled[shuffled["head"] == 0], sites=["head"]).values.tolist() == [[1.5], [3.0]]
    assert effects.quad_matrix(shuffled, sites=[]).values.tolist() == [[0.5], [4.5]]


def test_mixtures_and_gaps_are_errors():
    frame = two_quads()
    mixed = pd.concat([frame, frame.assign(ablation="mean")])
    with pytest.raises(ValueError, match=r"one ablation; got \['mean', 'zero'\]"):
        effects.quad_matrix(mixed)
    assert effects.quad_matrix(mixed, sites=["ablation", "head"]).values.shape == (2, 4)
    with pytest.raises(ValueError, match="one ablation"):
        effects.ratios(mixed, ["head"])
    with pytest.raises(ValueError, match=r"1 of 4 quad x site cells have no record, first quad 'q2' at .*'head': 1"):
        effects.quad_matrix(frame[:-1])
    with pytest.raises(ValueError, match="no records"):
        effects.quad_matrix(frame[:0])
    with pytest.raises(ValueError, match="no column strength; they have profile"):
        effects.quad_matrix(frame, "strength")


def test_logit_changes_follow_the_answer_and_the_first_foil():
    before, after = [1.0, 2.0, 3.0], [0.5, 4.0, 3.5]
    rows = [{"logits_before": before, "logits_after": after, "answer": "b", "foil_before": "a", "foil_after": "c"}]
    changes = site_tables.logit_changes(records(rows), ["a", "b", "c"])
    assert changes.loc[0].to_dict() == {"answer_change": 2.0, "foil_change": -0.5}
    with pytest.raises(ValueError, match=r"foil_before holds \['a'\]"):
        site_tables.logit_changes(records(rows), ["x", "b", "c"])


def test_restores_needs_the_answer_and_the_interval():
    def frame(*after: float, clean: float = 1.0) -> pd.DataFrame:
        answered = {"metric_clean": clean, "metric_corrupt": -1.0}
        return records([{"metric_after": x} | answered for x in after], direction="denoise", ablation="clean")

    def interval(low: float | None) -> stats.Interval:
        return stats.Interval(0.7, low, None if low is None else 0.9, 0.95, 50, "")

    assert site_tables.restores(frame(1, -1), interval(0.51)) is True
    assert site_tables.restores(frame(1, -1), interval(0.5)) is False
    assert site_tables.restores(frame(1, -1, -1), interval(0.51)) is False
    assert site_tables.restores(frame(1, 0), interval(0.51), share=0.6) is False
    assert site_tables.restores(frame(1, 1), interval(None)) is None
    assert site_tables.restores(frame(-1, -1), interval(None)) is False
    # pairs whose clean prompt is not answered have no answer to bring back
    some = pd.concat([frame(1, -1), frame(-1, -1, clean=-0.5)])
    assert site_tables.restores(some, interval(0.51)) is True
    assert site_tables.restores(frame(1, 1, clean=-0.5), interval(0.51)) is None
    with pytest.raises(ValueError, match="denoise"):
        site_tables.restores(records([{}]), interval(0.6))


def test_critical_slice():
    recovery, damage = [0.3, 0.7, 0.85, 0.9], [0.5, 0.6, 0.79, 0.8]
    assert effects.critical_slice(recovery, damage, 0.8) == effects.CriticalSlice(4, 0.9, 0.8, True)
    assert effects.critical_slice(recovery, damage, 0.6).size == 2
    assert effects.critical_slice(recovery[:3], damage[:3], 0.8) == effects.CriticalSlice(3, 0.85, 0.79, False)
    for broken in (([], []), ([0.1], [0.1, 0.2])):
        with pytest.raises(ValueError, match="same sets"):
            effects.critical_slice(*broken, 0.8)


def test_what_does_not_exceed_the_noise_is_no_effect_however_alike_the_quads():
    """Sites of 1e-5 and of 0.002 logits, the same in every quad: with a floor of 0.001 only the second is an effect."""
    rows = [
        {"quad_id": f"{half}{quad:02d}", "head": head, "logit_diff_after": 3.0 - change, "half": half}
        for half in ("discovery", "confirmation")
        for quad in range(24)
        for head, change in ((0, 1e-5 * (1 + quad % 3)), (1, 0.002 + 1e-5 * (quad % 3)))
    ]
    for floor, wanted in ((0.0, ["0.0", "0.1"]), (0.001, ["0.1"])):
        given = stats.Settings(floor=floor)
        table = effects.both_halves(records(rows), given)
        assert table[effects.significant(table, given)]["site"].unique().tolist() == wanted
        assert sorted(effects.confirmed(table, given)["site"]) == wanted
    shares = pd.DataFrame(rows).assign(share=lambda frame: 3.0 - frame["logit_diff_after"])
    other = effects.tested(records(shares.to_dict("records"), half="discovery"), given, "share", ["head"])
    assert (other["p"] < 0.05).all(), "the floor is one of logits"


def test_a_ratio_needs_a_loss_above_the_noise():
    given = stats.Settings(floor=0.001)
    assert effects.is_loss(np.full(24, 0.0011), given) and not effects.is_loss(np.full(24, 0.001), given)
    unsure = np.array([1.0, -0.9] * 12)
    assert unsure.mean() > 0.001 and not effects.is_loss(unsure, given), "the whole interval counts"
    assert effects.is_loss(unsure[:10], given), "where there is one"


def test_a_share_of_a_ceiling_that_gains_in_sum_is_not_given():
    def of(gains):
        rows = [{"quad_id": "a", "pair_id": "a", "logit_diff_before": 3.0, "logit_diff_after": 0.0}]
        rows += [
            {"quad_id": "b", "pair_id": f"b{n}", "logit_diff_before": 3.0, "logit_diff_after": 4.0}
            for n in range(gains)
        ]
        frame = records(rows)
        return effects.shares_of_ceiling(frame, frame, stats.Settings(floor=0.001), [])

    assert of(2)["estimate"].tolist() == [1.0]
    assert of(4).empty, "quads lose on average, the pairs gain in sum"


def test_pairs_without_a_gap_have_effects_in_logits_and_no_ratio():
    """One-name prompts of a model that is asked about two names may have none."""
    rows = [
        {"layer": 0, "component": "head", "head": head, "quad_id": quad, "direction": "noise", "logit_diff_before": 1.0,
         "logit_diff_after": 1.0 - head, "logit_diff_clean": 1.0, "logit_diff_corrupt": corrupt}
        for head in (0, 1)
        for quad, corrupt in (("q1", 0.0), ("q2", 2.5))
    ]  # fmt: skip
    table = effects.site_effects(pd.DataFrame(rows), stats.Settings())
    assert table["estimate"].tolist() == [0.0, 1.0] and table["ratio"].isna().all() and table["ratio_low"].isna().all()


def test_every_profile_has_the_floor_of_its_precision():
    own = {"model": "m", "profile": "p"}
    assert Shared(**own).floor == 0.001 and Shared(**own, dtype="float64").floor == 1e-9
    assert Shared(**own, dtype="bfloat16").floor == 0.125 < hooks.NOISE[torch.bfloat16]
    assert Shared(**own, dtype="bfloat16", quantisation="nf4").floor == 0.14 < hooks.QUANTISED_NOISE


def test_damages_are_ratios_of_sums_by_ablation_in_the_order_of_the_records():
    frame = pd.concat([two_quads(), two_quads().assign(ablation="mean", logit_diff_after=5.0)])
    found = effects.damages(frame[frame["head"] == 0], stats.DEFAULTS)
    assert {kind: span.estimate for kind, span in found.items()} == {"zero": 6 / 16, "mean": 0.0}
    assert list(found) == ["zero", "mean"]


def test_what_is_specific_is_read_off_both_shares_under_the_given_settings():
    rng, parts = np.random.default_rng(0), []
    for shift in ((3.0, 3.0), (0.1, 3.0)):  # of the gap of 4: in own pairs, and in the placebo's
        rows = [
            {"quad_id": f"q{quad:02d}", "head": head, "logit_diff_after": 3.0 - rng.normal(shift[head], 0.3)}
            for quad in range(25)
            for head in (0, 1)
        ]
        parts.append(records(rows))
    given = stats.Settings(level=0.8, resamples=300, seed=5)
    table = effects.specific(*parts, ["head"], given, 0.5)
    own, other = (effects.curve(part, given, ["head"]) for part in parts)
    for end in ("estimate", "low", "high"):
        assert table[end].tolist() == own[end].tolist() and table[f"placebo_{end}"].tolist() == other[end].tolist()
    shares = [
        stats.Shares(*(effects.quad_matrix(p, v, ["head"], "sum").values for v in ("effect", "gap"))) for p in parts
    ]
    beyond = stats.contrasts(shares[1], shares[0], 0.5, given)
    assert table["beyond_low"].tolist() == [span.low for span in beyond]
    assert table["quotient_estimate"].tolist() == pytest.approx((other["estimate"] / own["estimate"]).tolist())
    assert table["verdict"].tolist() == ["specific", "general"] and table["head"].tolist() == [0, 1]


def test_significance_and_losses_hold_at_the_given_level_and_off_zero():
    ends = pd.DataFrame({"p": [0.01, 0.01, 0.15], "low": [0.0, 0.1, 0.1], "high": [1.0, 1.0, 1.0]})
    assert effects.significant(ends, stats.DEFAULTS).tolist() == [False, True, False]
    assert effects.significant(ends, stats.Settings(level=0.8)).tolist() == [False, True, True]
    values = np.random.default_rng(1).normal(0, 1, 24)
    values += 0.25 - values.mean()
    low = stats.mean_interval(values, stats.Settings(level=0.5)).low
    assert stats.mean_interval(values, stats.DEFAULTS).low < 0 < low
    assert not effects.is_loss(values, stats.DEFAULTS) and effects.is_loss(values, stats.Settings(level=0.5))
