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
    """Quads of two sides: effects, gaps, classes, quads. Sites have one profile in all classes, but for `planted` more
    of the first site in class A; class A's noise is `loud` times the others'."""
    rng = np.random.default_rng([seed, 17])
    label = np.array([rng.choice(len(names), 2, replace=False) for _ in range(quads)]).ravel()
    gaps = rng.gamma(8, 1, 2 * quads) * (1 + label)  # classes differ in scale
    profile = np.tile(np.linspace(0.5, 0, sites), (2 * quads, 1))
    profile[label == 0, 0] += planted
    noise = rng.standard_t(5, (2 * quads, sites)) + np.repeat(rng.normal(size=(quads, sites)), 2, axis=0)
    effects = gaps[:, None] * (profile + 0.1 * noise * np.where(label == 0, loud, 1)[:, None])
    return effects, gaps, np.array(list(names))[label], np.repeat(np.arange(quads), 2)


def test_a_planted_interaction_is_found_at_its_site():
    result = class_tests.interaction(*sides(0, planted=0.25), permutations=500)
    assert result.p_overall == result.p[0] == 1 / 500
    assert result.statistic.argmax() == 0
    assert result.ratios.loc["A", 0] - result.ratios.loc["B", 0] == pytest.approx(0.25, abs=0.08)


def test_ratios_are_ratios_of_sums():
    effects, gaps, classes, quads = sides(1)
    result = class_tests.interaction(effects, gaps, classes, quads, permutations=1)
    for name in "ABCD":
        own = classes == name
        np.testing.assert_allclose(result.ratios.loc[name], effects[own].sum(0) / gaps[own].sum())
    assert result.p_overall == 1 and (result.p == 1).all()  # the identity alone


def test_the_statistic_written_out():
    effects, gaps, classes, quads = sides(2)
    got = class_tests.interaction(effects, gaps, classes, quads, permutations=1).statistic
    centred = effects - effects.mean(1, keepdims=True)
    ratio, error = [], []
    for name in "ABCD":
        own, gap = centred[classes == name], gaps[classes == name]
        ratio.append(own.sum(0) / gap.sum())
        residual = own - np.outer(gap, ratio[-1])
        error.append(np.sqrt((residual**2).sum(0) * len(gap) / (len(gap) - 1)) / gap.sum())
    weight = 1 / np.array(error) ** 2
    middle = np.average(ratio, axis=0, weights=weight)
    np.testing.assert_allclose(got, (weight * (np.array(ratio) - middle) ** 2).sum(0))


def test_a_class_that_is_stronger_by_a_constant_makes_no_interaction():
    effects, gaps, classes, quads = sides(3)
    shifted = effects + 0.3 * gaps[:, None] * (classes == "B")[:, None]
    before, after = (class_tests.interaction(x, gaps, classes, quads, permutations=300) for x in (effects, shifted))
    np.testing.assert_allclose(after.statistic, before.statistic)
    assert after.p_overall == before.p_overall > 0.05
    doubled = class_tests.interaction(
        effects * np.where(classes == "C", 2, 1)[:, None], gaps * np.where(classes == "C", 2, 1), classes, quads, 300
    )
    np.testing.assert_allclose(doubled.statistic, before.statistic)
    np.testing.assert_allclose(doubled.p, before.p)


@pytest.mark.parametrize("loud", [1.0, 2.0])
def test_interaction_holds_its_level(loud):
    """200 simulations: the standard error of a rate of 5% is 1.5%."""
    results = [class_tests.interaction(*sides(seed, loud=loud), permutations=99, seed=seed) for seed in range(200)]
    for rate in (np.mean([r.p.min() <= 0.05 for r in results]), np.mean([r.p_overall <= 0.05 for r in results])):
        assert rate <= 0.05 + 3 * 0.0154
    assert 0.4 < np.mean([r.p_overall for r in results]) < 0.6


def test_labels_move_in_whole_quads():
    """Quads keep two sides of two classes, and each set of classes stays as frequent as it was."""
    label = np.array([0, 1, 0, 1, 0, 2, 1, 2, 0, 2, 1])
    cluster = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 5])  # quad 4 has one side
    chunks = np.vstack(list(class_tests._labels(label, cluster, 200, 1, 0)))
    assert (chunks[0] == label).all() and len(np.unique(chunks, axis=0)) > 20
    sets = sorted(tuple(sorted(label[cluster == quad])) for quad in range(6))
    for row in chunks:
        assert sorted(tuple(sorted(row[cluster == quad])) for quad in range(6)) == sets
    assert len(np.unique(chunks[:, 0])) == 3  # sides change places: two classes in all quads can still be permuted


def test_two_classes_that_share_every_quad_can_be_told_apart():
    result = class_tests.interaction(*sides(4, planted=0.25, names="AB"), permutations=200)
    assert result.p[0] == 1 / 200


def test_chunks_do_not_show_and_a_seed_decides(monkeypatch):
    whole = class_tests.interaction(*sides(5), permutations=100, seed=3)
    assert (whole.p != class_tests.interaction(*sides(5), permutations=100, seed=4).p).any()
    monkeypatch.setattr(stats, "CHUNK", 5_000)
    pieces = class_tests.interaction(*sides(5), permutations=100, seed=3)
    np.testing.assert_array_equal(whole.p, pieces.p)


def test_a_small_class_is_shown_but_not_tested():
    effects, gaps, classes, quads = sides(6)
    classes = np.where((classes == "D") & (np.cumsum(classes == "D") > 4), "E", classes)
    result = class_tests.interaction(effects, gaps, classes, quads, permutations=50)
    without = classes != "D"
    alone = class_tests.interaction(effects[without], gaps[without], classes[without], quads[without], 1)
    np.testing.assert_allclose(result.statistic, alone.statistic)
    assert (classes == "D").sum() == 4 and "D" in result.ratios.index
    with pytest.raises(ValueError, match="2 classes with 10 units.*A 3"):
        class_tests.interaction(effects[:6], gaps[:6], list("ABABAB"), quads[:6])


def test_a_silent_site_is_not_significant():
    effects, gaps, classes, quads = sides(7, sites=3)
    level = np.hstack([effects, np.zeros((120, 1))])
    level[:, 3] = level[:, :3].mean(1)  # after centring, 0 in every unit
    result = class_tests.interaction(level, gaps, classes, quads, permutations=50)
    assert result.statistic[3] == pytest.approx(0, abs=1e-6) and np.isfinite(result.statistic).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, g, c, q: (e, g, c, np.zeros(len(q))), "two units of one class"),
        (lambda e, g, c, q: (e, -g, c, q), "do not add up to more than 0"),
        (lambda e, g, c, q: (e, g[:-1], c, q), "a gap, a class and a cluster per unit"),
        (lambda e, g, c, q: (e, g, c, q, 0), "permutations must be at least 1; got 0"),
        (lambda e, g, c, q: (e * np.nan, g, c, q), "NaN"),
    ],
)
def test_bad_units_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        class_tests.interaction(*change(*sides(8)))


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
