"""Equivalence, class x site interaction and agreement between classes: hand-made examples, level, power."""

import numpy as np
import pytest
from scipy import stats as reference

from lib import stats
from lib.stats import Settings
from steps.generality import class_tests

# --- equivalence


def test_two_one_sided_tests_by_hand():
    """20 values of mean 0.1 and standard deviation sqrt(20/19): the standard error is 1 / sqrt(19)."""
    column = 0.1 + np.tile([1.0, -1.0], 10)
    [p] = class_tests.equivalence(column, margin=0.5)
    assert p == pytest.approx(reference.t.sf((0.5 - 0.1) * np.sqrt(19), 19))  # the upper end is the nearer one
    assert p < 0.05 < class_tests.equivalence(column, margin=0.49)[0]  # 0.1 + 1.729 standard errors: 0.497


def test_two_one_sided_tests_are_scipys():
    matrix = np.random.default_rng(0).normal(0.05, 0.3, (40, 6))
    for p, column in zip(class_tests.equivalence(matrix, 0.15), matrix.T, strict=True):
        below = reference.ttest_1samp(column, 0.15, alternative="less").pvalue
        above = reference.ttest_1samp(column, -0.15, alternative="greater").pvalue
        assert p == pytest.approx(max(below, above))


def test_a_control_is_silent_only_if_every_candidate_is():
    rng = np.random.default_rng(1)
    quiet, loud = rng.normal(0, 0.1, (50, 5)), rng.normal(0.3, 0.1, (50, 1))
    assert class_tests.equivalence(quiet, 0.2).max() < 0.05
    assert class_tests.equivalence(np.hstack([quiet, loud]), 0.2).argmax() == 5
    assert class_tests.equivalence(loud, 0.2) > 0.99


def test_not_significant_is_not_equivalent():
    wide = np.random.default_rng(2).normal(0, 5, 30)
    assert reference.ttest_1samp(wide, 0).pvalue > 0.2
    assert class_tests.equivalence(wide, 0.2)[0] > 0.05


def test_few_clusters_leave_equivalence_open():
    assert class_tests.equivalence(np.zeros(19), 0.2) is None


def test_values_without_spread():
    assert class_tests.equivalence(np.tile([0.125, 0.25], (20, 1)), 0.25).tolist() == [0, 1]


def test_the_power_to_find_silence_is_the_share_of_silent_samples():
    """Against the normal formula for one column: P(|mean| < margin - t x error), were the mean 0."""
    rng = np.random.default_rng(0)
    column = rng.normal(3.0, 1.0, 50)  # the mean does not matter
    error, t = column.std() / np.sqrt(50), reference.t.ppf(0.95, 49)
    for margin in (0.3, 0.4, 0.6):
        normal = max(0.0, 2 * reference.norm.cdf(margin / error - t) - 1)
        assert class_tests.equivalence_power(column, margin) == pytest.approx(normal, abs=0.05)
    both = class_tests.equivalence_power(np.column_stack([column, column]), 0.4)
    assert both == class_tests.equivalence_power(column, 0.4)  # they pass together
    assert class_tests.equivalence_power(column, 0.1) == 0 and class_tests.equivalence_power(column[:19], 0.4) is None


@pytest.mark.parametrize("margin", [0, -0.1, np.nan, np.inf])
def test_a_margin_must_be_positive(margin):
    with pytest.raises(ValueError, match="margin"):
        class_tests.equivalence(np.ones(20), margin)


# --- interaction


def sides(seed: int, quads: int = 60, sites: int = 6, planted: float = 0.0, names: str = "ABCD", loud: float = 1.0):
    """Quads of two sides: effects, gaps, meetings, quads. Sites have one profile in all classes, but for `planted` more
    of class A's part of the gap at the first site; class A's noise is `loud` times the others'."""
    rng = np.random.default_rng([seed, 17])
    label = np.array([rng.choice(len(names), 2, replace=False) for _ in range(quads)])
    label = np.stack([label, label[:, ::-1]], axis=1).reshape(-1, 2)
    gaps = np.repeat(rng.gamma(8, 1, quads), 2) * (2 + label.sum(1))  # classes differ in scale
    profile = np.tile(np.linspace(0.5, 0, sites), (2 * quads, 1))
    profile[:, 0] += planted * (label == 0).any(1) / 2
    noise = rng.standard_t(5, (2 * quads, sites)) + np.repeat(rng.normal(size=(quads, sites)), 2, axis=0)
    effects = gaps[:, None] * (profile + 0.1 * noise * np.where(label[:, 0] == 0, loud, 1)[:, None])
    return effects, gaps, np.array(list(names))[label], np.repeat(np.arange(quads), 2)


def exact(planted: float = 0.0, answer: float = 0.0, common: float = 0.0):
    """24 quads in which four classes meet equally often, and sites of next to no noise: 1 has `planted` more of class
    A's part of the gap and 2 as much less; 3 has `answer` more of a pair that A answers, and as much less of one that A
    does not; 4 does more where A meets B and where C meets D, and no class more than another; `common`: all of A."""
    pairs = [(a, b) for a in range(4) for b in range(a)]
    label = np.array([ends for n in range(24) for ends in (pairs[n % 6], pairs[n % 6][::-1])])
    has, wins = (label == 0).any(1), (label[:, 0] == 0) * 1.0 - (label[:, 1] == 0)
    shares = np.array([0.6, 0.0, 1.0, 0.4, 0.7]) + np.outer(has, common + planted * np.array([0, 1, -1, 0, 0])) / 2
    shares += np.outer(wins, answer * np.eye(5)[3]) + np.outer(np.isin(label.sum(1), (1, 5)), 0.1 * np.eye(5)[4])
    shares += 1e-6 * np.random.default_rng(0).normal(size=shares.shape)
    return 20 * shares, np.full(48, 20.0), np.array(list("ABCD"))[label], np.repeat(np.arange(24), 2)


@pytest.mark.parametrize("planted", [0.5, 0.2])
def test_a_part_of_one_class_is_found_though_every_quad_of_it_is_alike(planted):
    result = class_tests.interaction(*exact(planted), Settings(flips=500))
    assert result.p[1] == result.p[2] == result.p_overall == 1 / 500
    assert (result.p[[0, 3, 4]] > 0.5).all()  # what the others do is not theirs because one class has more
    off = result.shares.loc["A"] - result.shares.loc["B"]
    assert off.tolist() == pytest.approx([0, planted, -planted, 0, 0], abs=1e-4)


def test_a_site_that_acts_for_the_answer_alone_is_found_and_what_all_do_alike_is_no_interaction():
    result = class_tests.interaction(*exact(answer=0.1), Settings(flips=500))
    assert result.p[3] == 1 / 500 and (np.delete(result.p, 3) > 0.5).all()
    assert result.shares[3].tolist() == pytest.approx([0.55, 0.35, 0.35, 0.35], abs=0.001)
    alike = class_tests.interaction(*exact(common=0.5), Settings(flips=500))
    assert alike.p_overall > 0.5 and alike.p.min() == 1 / 500  # yet each site's share of the gap does differ


@pytest.mark.parametrize("least", [class_tests.LEAST, 0.0])
def test_shares_that_are_next_to_alike_are_alike(least, monkeypatch):
    """A site with 0.04 more of one class, surely: less than counts."""
    monkeypatch.setattr(class_tests, "LEAST", least)
    result = class_tests.interaction(*exact(0.04), Settings(flips=200))
    assert result.p[1] == (1 if least else 1 / 200)


def test_a_planted_interaction_is_found_at_its_site():
    result = class_tests.interaction(*sides(0, planted=0.5), Settings(flips=500))
    assert result.p_overall == result.p[0] == 1 / 500 and result.p[1:].min() > 0.05
    assert result.shares.loc["A", 0] - result.shares.loc["B", 0] == pytest.approx(0.5, abs=0.15)


def test_the_regression_written_out():
    """Shares and errors of the sums: weights of the gaps, and errors half of equal spread, half HC2."""
    effects, gaps, meetings, quads = sides(2, sites=1)
    [sums, _] = class_tests._halves(effects, gaps, class_tests._ends(meetings, "ABCD"), quads)
    order = np.arange(60)[None]
    shares, errors = sums.fitted(order, np.ones(order.shape))
    x = np.array([[name in own for name in "ABCD"] for own in meetings[::2].tolist()]) / 2
    gap, change = gaps[::2] * 2, effects[::2, 0] + effects[1::2, 0]
    scale = x @ ((x.T @ gap) / x.sum(0))
    gap, change = gap / scale, change / scale
    bread = np.linalg.inv(x.T @ np.diag(gap) @ x)
    own = bread @ x.T @ change
    left, hat = change - gap * (x @ own), gap * np.diag(x @ bread @ x.T)
    spread = (left**2 / (1 - hat) + (left**2).sum() / 56) / 2
    np.testing.assert_allclose(shares[0, 0], own)
    np.testing.assert_allclose(errors[0, 0], bread @ x.T @ np.diag(spread) @ x @ bread, rtol=1e-5)
    across = np.array([[1, -1, 0, 0], [0, 1, -1, 0], [0, 0, 1, -1]])
    wald = across @ own @ np.linalg.inv(across @ errors[0, 0] @ across.T) @ across @ own
    np.testing.assert_allclose(class_tests._wald(shares, errors)[0, 0], wald)


def test_a_class_of_larger_logits_makes_no_interaction():
    effects, gaps, meetings, quads = sides(3)
    larger = np.where((meetings == "C").any(1), 2, 1)
    before, after = (
        class_tests.interaction(effects * size[:, None], gaps * size, meetings, quads, Settings(flips=300))
        for size in (np.ones(len(gaps)), larger)
    )
    assert before.p_overall > 0.05 and after.p_overall > 0.05
    np.testing.assert_allclose(after.shares, before.shares, atol=0.05)


@pytest.mark.parametrize("loud", [1.0, 2.0])
def test_interaction_holds_its_level(loud, monkeypatch):
    """200 simulations of 24 quads, with nothing that is too little to count: the standard error of 5% is 1.5%."""
    monkeypatch.setattr(class_tests, "LEAST", 0.0)
    results = [
        class_tests.interaction(*sides(seed, 24, 4, loud=loud), Settings(flips=99, seed=seed)) for seed in range(200)
    ]
    for rate in (np.mean([r.p.min() <= 0.05 for r in results]), np.mean([r.p_overall <= 0.05 for r in results])):
        assert rate <= 0.05 + 3 * 0.0154
    assert 0.4 < np.mean([r.p_overall for r in results]) < 0.6


def test_the_resolution_is_found_nine_times_in_ten():
    least = np.median(
        [class_tests.interaction(*sides(seed, 40, 3), Settings(flips=99)).resolution for seed in range(20)]
    )
    found = [class_tests.interaction(*sides(seed, 40, 3, planted=least), Settings(flips=99)).p[0] for seed in range(60)]
    assert np.mean(np.array(found) <= 0.05) > 0.8


def test_quads_exchange_their_meetings_those_of_both_ways_among_themselves():
    draws = list(class_tests._orders(5, 3, 1, Settings(flips=200)))
    order, ways = (np.concatenate(parts) for parts in zip(*draws, strict=True))
    assert order.shape == ways.shape == (200, 5) and (order[0] == np.arange(5)).all() and (ways[0] == 1).all()
    assert (np.sort(order[:, :3]) == np.arange(3)).all() and (np.sort(order[:, 3:]) == [3, 4]).all()
    assert len(np.unique(order, axis=0)) == 12 and set(ways.ravel()) == {-1, 1}


def test_two_classes_that_share_every_quad_cannot_be_told_apart():
    with pytest.raises(ValueError, match="how the classes meet leaves their shares open"):
        class_tests.interaction(*sides(4, names="AB"))


def test_quads_of_one_side_count_for_the_sums():
    effects, gaps, meetings, quads = (part[::2] for part in sides(0, planted=0.8))
    result = class_tests.interaction(effects, gaps, meetings, quads, Settings(flips=200))
    assert result.p[0] == 1 / 200


def test_chunks_do_not_show_and_a_seed_decides(monkeypatch):
    whole = class_tests.interaction(*sides(5), Settings(flips=100, seed=3))
    assert (whole.p != class_tests.interaction(*sides(5), Settings(flips=100, seed=4)).p).any()
    monkeypatch.setattr(stats, "CHUNK", 5_000)
    pieces = class_tests.interaction(*sides(5), Settings(flips=100, seed=3))
    np.testing.assert_array_equal(whole.p, pieces.p)


def test_units_that_do_not_fit_are_refused():
    effects, gaps, meetings, quads = sides(6)
    with pytest.raises(ValueError, match="a gap, two classes and a cluster per unit"):
        class_tests.interaction(effects, gaps[:-1], meetings, quads)
    with pytest.raises(ValueError, match="gap does not exceed 0"):
        class_tests.interaction(effects, np.where(quads == 0, -1.0, gaps), meetings, quads)


# --- agreement between classes


def ranked(classes: int = 3, quads: int = 40, sites: int = 20, noise: float = 1.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    means = np.arange(sites) / sites * 3
    return {name: means + noise * rng.normal(size=(quads, sites)) for name in "ABC"[:classes]}


def test_agreement_of_classes_and_of_their_halves():
    effects = ranked(2)
    table = class_tests.between_classes(effects, Settings(resamples=300)).set_index(["class_a", "class_b"])
    assert list(table.index) == [("A", "A"), ("A", "B"), ("B", "B")]
    between = table.loc[("A", "B")]
    expected = reference.spearmanr(effects["A"].mean(0), effects["B"].mean(0)).statistic
    assert between["estimate"] == pytest.approx(expected)
    assert between["low"] < expected < between["high"] and (between["n_a"], between["n_b"]) == (40, 40)
    own = table.loc[("A", "A")]
    assert own["estimate"] == own["halves"] and np.isnan(own["low"])
    # the same effects in both classes: halves of two classes agree as halves of one do
    assert between["halves"] == pytest.approx((own["halves"] + table.loc[("B", "B"), "halves"]) / 2, abs=0.02)
    assert between["halves"] < between["estimate"]


def test_classes_that_rank_sites_the_other_way():
    effects = ranked(2, noise=0.3)
    effects["B"] = -effects["B"]
    table = class_tests.between_classes(effects, Settings(resamples=300)).set_index(["class_a", "class_b"])
    assert table.loc[("A", "B"), "high"] < -0.8 and table.loc[("B", "B"), "estimate"] > 0.9


def test_agreement_covers_the_correlation_to_be_expected():
    """200 simulations of 30 and 40 quads: the standard error of 95% is 1.5%."""
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 25)) + rng.normal(size=25)

    def draw(seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([seed, 5])
        return {"A": one + 2 * rng.normal(size=(30, 25)), "B": two + 2 * rng.normal(size=(40, 25))}

    means = ({name: x.mean(0) for name, x in draw(10_000 + seed).items()} for seed in range(2_000))
    expected = np.mean([reference.spearmanr(x["A"], x["B"]).statistic for x in means])
    rows = [class_tests.between_classes(draw(seed), Settings(resamples=200)).iloc[1] for seed in range(200)]
    assert np.mean([row["low"] <= expected <= row["high"] for row in rows]) >= 0.95 - 3 * 0.0154


def test_small_classes_have_estimates_without_intervals():
    effects = ranked(3)
    effects["B"], effects["C"] = effects["B"][:19], effects["C"][:1]
    table = class_tests.between_classes(effects, Settings(resamples=100)).set_index(["class_a", "class_b"])
    assert np.isnan(table.loc[("A", "B"), "low"]) and table.loc[("A", "B"), "estimate"] > 0
    assert np.isnan(table.loc[("C", "C"), "estimate"]) and table.loc[("A", "C"), "n_b"] == 1
    with pytest.raises(ValueError, match="same sites, at least 3"):
        class_tests.between_classes({"A": np.ones((30, 4)), "B": np.ones((30, 5))})
