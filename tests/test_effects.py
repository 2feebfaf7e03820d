"""Effects, ratios and the design's definitions, on records small enough to work out by hand."""

import numpy as np
import pandas as pd
import pytest

from lib import effects, stats


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


def test_damage_and_recovery_are_ratios_of_sums():
    assert effects.damage(two_quads()[:3]) == pytest.approx(6 / 16)
    assert effects.recovery(two_quads("denoise")[3:]) == pytest.approx(5 / 16)
    with pytest.raises(ValueError, match="expected records of direction 'denoise'; got 'noise'"):
        effects.recovery(two_quads())
    with pytest.raises(ValueError, match="no records"):
        effects.damage(two_quads()[:0])
    with pytest.raises(ValueError, match="over 3 pairs is -6, not positive"):
        effects.damage(two_quads().assign(logit_diff_clean=-1.0))


@pytest.mark.parametrize(("direction", "ratio"), [("noise", "damage"), ("denoise", "recovery")])
def test_by_site(direction, ratio):
    table = effects.by_site(two_quads(direction))
    assert table["head"].tolist() == [0, 1]
    assert table["effect"].tolist() == [(1.5 + 3) / 2, (-0.5 + 6) / 2]  # means of the quads' means
    assert table["margin_effect"].tolist() == table["effect"].tolist()
    assert table[ratio].tolist() == [6 / 16, 5 / 16]
    assert table["pairs"].tolist() == [3, 3] and table["quads"].tolist() == [2, 2]
    flat = effects.by_site(two_quads(direction).assign(logit_diff_clean=0.0))
    assert flat[ratio].isna().all() and flat["effect"].notna().all()


def test_quad_matrix():
    shuffled = two_quads().sample(frac=1, random_state=1)
    matrix = effects.quad_matrix(shuffled)
    assert matrix.values.tolist() == [[1.5, -0.5], [3.0, 6.0]]
    assert matrix.quads.tolist() == ["q1", "q2"]
    assert list(matrix.sites.columns) == list(effects.SITE_AND_POSITION) and matrix.sites["head"].tolist() == [0, 1]
    assert effects.quad_matrix(shuffled, "metric_after").values.tolist() == [[-0.5, 1.5], [-2.0, -5.0]]
    numerator, denominator = (effects.quad_matrix(shuffled, name, reduce="sum").values for name in ("effect", "gap"))
    assert numerator.tolist() == [[3, -1], [3, 6]] and denominator.tolist() == [[6, 6], [10, 10]]
    np.testing.assert_allclose(numerator.sum(0) / denominator.sum(0), effects.by_site(shuffled)["damage"])
    assert effects.quad_matrix(shuffled[shuffled["head"] == 0], sites=["head"]).values.tolist() == [[1.5], [3.0]]
    assert effects.quad_matrix(shuffled, sites=[]).values.tolist() == [[0.5], [4.5]]


def test_mixtures_and_gaps_are_errors():
    frame = two_quads()
    mixed = pd.concat([frame, frame.assign(ablation="mean")])
    with pytest.raises(ValueError, match=r"one ablation; got \['mean', 'zero'\]"):
        effects.quad_matrix(mixed)
    assert effects.quad_matrix(mixed, sites=["ablation", "head"]).values.shape == (2, 4)
    with pytest.raises(ValueError, match="one ablation"):
        effects.by_site(mixed)
    with pytest.raises(ValueError, match=r"1 of 4 quad x site cells have no record, first quad 'q2' at .*'head': 1"):
        effects.quad_matrix(frame[:-1])
    with pytest.raises(ValueError, match="no records"):
        effects.quad_matrix(frame[:0])
    with pytest.raises(ValueError, match="no column strength; they have profile"):
        effects.quad_matrix(frame, "strength")


def test_logit_changes_follow_the_answer_and_the_first_foil():
    before, after = [1.0, 2.0, 3.0], [0.5, 4.0, 3.5]
    rows = [{"logits_before": before, "logits_after": after, "answer": "b", "foil_before": "a", "foil_after": "c"}]
    changes = effects.logit_changes(records(rows), ["a", "b", "c"])
    assert changes.loc[0].to_dict() == {"answer_change": 2.0, "foil_change": -0.5}
    with pytest.raises(ValueError, match=r"foil_before holds \['a'\]"):
        effects.logit_changes(records(rows), ["x", "b", "c"])


def test_critical_layers_are_the_fewest_and_in_order():
    curve = {0: 0.05, 1: 0.05, 2: 0.40, 3: 0.35, 4: 0.55, 5: 1.0}  # rises 0.05, 0, 0.35, -0.05, 0.2, 0.45
    found = effects.critical_layers(curve)
    assert found.layers == (2, 5) and found.rises == pytest.approx((0.35, 0.45))
    assert found.total == 1.0 and found.share == pytest.approx(0.8)
    assert effects.critical_layers(curve, 0.81).layers == (2, 4, 5)
    assert effects.critical_layers(curve, 0.4).layers == (5,)
    assert effects.critical_layers({7: 0.5}).layers == (7,)
    # ties are taken by layer, and order of the curve does not matter
    assert effects.critical_layers({2: 1.0, 1: 0.5}, 0.5).layers == (1,)


@pytest.mark.parametrize(
    ("curve", "share", "message"),
    [
        ({}, 0.8, "every layer"),
        ({0: float("nan")}, 0.8, "every layer"),
        ({0: 0.5, 1: -0.1}, 0.8, "not positive"),
        ({0: 1.0}, 80, "share"),
    ],
)
def test_curves_without_critical_layers_are_errors(curve, share, message):
    with pytest.raises(ValueError, match=message):
        effects.critical_layers(curve, share)


def test_first_flip_layer():
    margins = {0: (-1, -1, 1, -2), 1: (1, -1, -1, 0), 2: (2, 3, -1, 0), 3: (1, 1, 1, 1)}
    rows = [
        {"layer": layer, "pair_id": str(pair), "metric_before": -2.0 if pair < 3 else 1.0, "metric_after": float(after)}
        for layer, values in margins.items()
        for pair, after in enumerate(values)
    ]
    frame = records(rows, direction="denoise", ablation="clean", component="resid", head=-1)
    # the fourth pair starts on the far side and never counts as flipped
    assert effects.flip_share(frame).tolist() == [0.25, 0.25, 0.5, 0.75]
    assert effects.first_flip_layer(frame) == 2
    assert effects.first_flip_layer(frame, 0.75) == 3
    assert effects.first_flip_layer(frame, 0.9) is None
    mirrored = frame.assign(
        direction="noise", ablation="zero", metric_before=-frame["metric_before"], metric_after=-frame["metric_after"]
    )
    assert effects.flip_share(mirrored).tolist() == [0.25, 0.25, 0.5, 0.75]
    with pytest.raises(ValueError, match="one position"):
        effects.flip_share(pd.concat([frame, frame.assign(position="names")]))


def test_restores_needs_the_answer_and_the_interval():
    def frame(*after: float) -> pd.DataFrame:
        return records([{"metric_after": value} for value in after], direction="denoise", ablation="clean")

    def interval(low: float | None) -> stats.Interval:
        return stats.Interval(0.7, low, None if low is None else 0.9, 0.95, 50, "")

    assert effects.restores(frame(1, -1), interval(0.51)) is True
    assert effects.restores(frame(1, -1), interval(0.5)) is False
    assert effects.restores(frame(1, -1, -1), interval(0.51)) is False
    assert effects.restores(frame(1, 0), interval(0.51), share=0.6) is False
    assert effects.restores(frame(1, 1), interval(None)) is None
    assert effects.restores(frame(-1, -1), interval(None)) is False
    with pytest.raises(ValueError, match="denoise"):
        effects.restores(records([{}]), interval(0.6))


def test_critical_slice():
    recovery, damage = [0.3, 0.7, 0.85, 0.9], [0.5, 0.6, 0.79, 0.8]
    assert effects.critical_slice(recovery, damage) == effects.CriticalSlice(4, 0.9, 0.8, True)
    assert effects.critical_slice(recovery, damage, share=0.6).size == 2
    assert effects.critical_slice(recovery, damage, limit=3) == effects.CriticalSlice(3, 0.85, 0.79, False)
    for broken in (([], []), ([0.1], [0.1, 0.2])):
        with pytest.raises(ValueError, match="same sets"):
            effects.critical_slice(*broken)
    with pytest.raises(ValueError, match=r"1\.\.4"):
        effects.critical_slice(recovery, damage, limit=5)
