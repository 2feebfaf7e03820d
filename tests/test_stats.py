"""Intervals and tests: known examples, invariances, coverage and level by simulation (more in bench/coverage.py)."""

import itertools
import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as reference

from lib import effects, stats
from lib.stats import Settings
from report import site_tables
from steps.baselines.measure import p_above

QUADS = 30
VALUES = arrays(float, QUADS, elements=st.floats(-100, 100, allow_subnormal=False).map(lambda x: round(x, 3)))


def ends(interval: stats.Interval) -> tuple[float, float, float]:
    return interval.low, interval.estimate, interval.high


def heavy_tailed(quads: int, trials: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Effects and gaps of quads (quads, trials): gaps gamma, effects 0.3 of them plus Student's t of 3 degrees."""
    rng = np.random.default_rng(seed)
    gap = rng.gamma(4, 1.5, (quads, trials))
    return 0.3 * gap + 0.8 * rng.standard_t(3, (quads, trials)), gap


# --- what an interval is


def test_an_interval_prints_itself():
    interval = stats.Interval(1 / 3, 0.28, 0.3812, 0.95, 50, "bootstrap-t")
    assert str(interval) == f"{interval}" == "0.33 [0.28, 0.38]"
    assert f"{interval:.3f}" == "0.333 [0.280, 0.381]"
    assert json.loads(json.dumps(asdict(interval)))["low"] == 0.28
    assert pd.DataFrame([interval, interval])["high"].tolist() == [0.3812, 0.3812]


@pytest.mark.parametrize("tail", ["normal", "heavy"])
def test_the_p_value_of_an_interval_is_that_of_its_bootstrap(tail):
    """Against the share of |t*| in the very resamples that made the interval: it errs towards larger p values."""
    rng, given = np.random.default_rng(1), Settings(resamples=20_000)
    for n in (20, 40, 100):
        values = rng.normal(size=n) if tail == "normal" else rng.standard_t(3, size=n)
        interval = stats.mean_interval(values, given)
        table = np.concatenate(list(stats._Ratios.of(values[:, None], np.ones((n, 1))).t_values(given)))
        for wanted in (0.2, 0.05, 0.01, 0.002):  # thresholds at which the bootstrap itself has these p values
            t = np.quantile(np.abs(table), 1 - wanted)
            threshold = interval.estimate - t * values.std(ddof=1) / np.sqrt(n)
            p = stats.p_of_interval(interval.estimate, interval.low, threshold, above=True)
            assert 0.8 * wanted < p < 5 * wanted, (n, wanted, p)
            mirrored = stats.p_of_interval(-interval.estimate, -interval.low, -threshold, above=False)
            assert mirrored == pytest.approx(p)
            assert wanted == 0.05 or (p < 0.05) == (interval.low > threshold) == (wanted < 0.05)


def test_the_p_value_of_an_interval_at_its_ends():
    assert stats.p_of_interval(0.5, 0.3, 0.3, above=True) == pytest.approx(0.05)
    assert stats.p_of_interval(0.5, 0.3, 0.3, above=True, level=0.9) == pytest.approx(0.1)
    assert stats.p_of_interval(0.5, 0.3, 0.5, above=True) == stats.p_of_interval(0.5, 0.6, 0.4, above=False) == 1
    assert stats.p_of_interval(0.5, 0.5, 0.4, above=True) == 0  # no spread


def test_too_few_clusters_give_estimates_without_intervals():
    assert stats.too_few(20) is None
    few = np.arange(19.0)
    intervals = [
        stats.mean_interval(few),
        stats.ratio_intervals(few, few + 1)[0],
        stats.simultaneous(few[:, None])[0],
        stats.proportion_interval(np.ones(19), np.ones(19)),
        site_tables.rank_agreement(np.eye(19), np.eye(19)),
    ]
    for interval in intervals:
        assert interval.low is None and interval.high is None and interval.n == 19
        assert "19 clusters, fewer than 20" in str(interval)
    assert str(intervals[0]) == "9.00 (no interval: 19 clusters, fewer than 20)"


# --- the studentised bootstrap


def test_a_mean_interval_equals_the_bootstrap_written_out():
    values = np.random.default_rng(3).standard_t(3, 25)
    got = stats.mean_interval(values, Settings(0.9, 500, seed=7))
    drawn = np.random.default_rng(7).integers(25, size=(500, 25))
    t = [
        abs(resample.mean() - values.mean()) / (resample.std(ddof=1) / 5)
        for resample in (values[indices] for indices in drawn)
    ]
    reach = np.quantile(t, 0.9) * values.std(ddof=1) / 5
    assert ends(got) == pytest.approx((values.mean() - reach, values.mean(), values.mean() + reach), rel=1e-9)
    assert (got.method, got.n, got.level) == ("bootstrap-t", 25, 0.9)


def test_a_ratio_interval_equals_the_bootstrap_written_out():
    effect, gap = (column[:, 0] for column in heavy_tailed(25, 1))

    def ratio(e: np.ndarray, g: np.ndarray) -> tuple[float, float]:
        r = e.sum() / g.sum()
        return r, np.sqrt(((e - r * g) ** 2).sum() / (25 * 24)) / g.mean()

    estimate, error = ratio(effect, gap)
    drawn = np.random.default_rng(1).integers(25, size=(400, 25))
    t = [abs(r - estimate) / s for r, s in (ratio(effect[indices], gap[indices]) for indices in drawn)]
    reach = np.quantile(t, 0.95) * error
    got = stats.ratio_intervals(effect, gap, Settings(resamples=400, seed=1))[0]
    assert ends(got) == pytest.approx((estimate - reach, estimate, estimate + reach), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(values=VALUES, scale=st.sampled_from([1e-3, 2.0, 1e4]), shift=st.floats(-10, 10))
def test_scale_and_shift_carry_over(values, scale, shift):
    before = stats.mean_interval(values, Settings(resamples=200))
    after = stats.mean_interval(values * scale + shift, Settings(resamples=200))
    size = np.abs(values * scale).max() + abs(shift) + 1e-9
    if before.method == "bootstrap-t":  # others sit at the edge of what counts as spread
        np.testing.assert_allclose(ends(after), np.array(ends(before)) * scale + shift, atol=1e-6 * size)
    ratio = stats.ratio_intervals(values, np.full(QUADS, 4.0), Settings(resamples=200))[0]
    np.testing.assert_allclose(np.array(ends(ratio)) * 4, ends(before), atol=1e-9 * (np.abs(values).max() + 1))


def test_the_order_of_quads_moves_an_interval_by_simulation_error_only():
    values = heavy_tailed(60, 1)[0][:, 0]
    first = stats.mean_interval(values, Settings(resamples=20_000))
    second = stats.mean_interval(values[::-1], Settings(resamples=20_000))
    width = first.high - first.low
    np.testing.assert_allclose(ends(first), ends(second), atol=0.03 * width)
    assert first == stats.mean_interval(values, Settings(resamples=20_000))


def test_columns_share_resamples_and_chunks_do_not_show(monkeypatch):
    effect, gap = heavy_tailed(40, 7)
    few = Settings(resamples=300)
    whole = stats.ratio_intervals(effect, gap, few), stats.simultaneous(effect, few)
    tests = stats.max_t(effect, Settings(flips=500))
    alone = stats.ratio_intervals(effect[:, 4], gap[:, 4], few)[0]
    assert ends(whole[0][4]) == pytest.approx(ends(alone), rel=1e-12)
    monkeypatch.setattr(stats, "CHUNK", 700)
    pieces = stats.ratio_intervals(effect, gap, few), stats.simultaneous(effect, few)
    for one, other in zip(sum(whole, []), sum(pieces, []), strict=True):
        assert ends(one) == pytest.approx(ends(other), rel=1e-12)
    again = stats.max_t(effect, Settings(flips=500))
    assert again.tolist() == tests.tolist()


def test_degenerate_values():
    assert ends(stats.mean_interval(np.full(30, 0.1))) == pytest.approx((0.1, 0.1, 0.1), abs=1e-15)
    assert stats.mean_interval(np.full(30, 0.1)).method == "no spread between clusters"
    assert stats.ratio_intervals(0.3 * np.arange(1, 31), np.arange(1, 31))[0].method == "no spread between clusters"
    # one quad differs: a third of the resamples miss it and have no spread
    lone = np.zeros(30)
    lone[4] = 1.0
    interval = stats.mean_interval(lone)
    assert interval.method == "Student's t"
    reach = reference.t.ppf(0.975, 29) * lone.std(ddof=1) / np.sqrt(30)
    assert ends(interval) == pytest.approx((1 / 30 - reach, 1 / 30, 1 / 30 + reach))
    together = stats.simultaneous(np.column_stack([np.zeros(30), np.random.default_rng(0).normal(size=30), lone]))
    assert ends(together[0]) == (0, 0, 0)
    assert together[1].low < together[1].estimate < together[1].high


def test_coverage_with_heavy_tails():
    """4,000 trials: the standard error of a coverage of 95% is 0.35%."""
    effect, gap = heavy_tailed(50, 4_000, seed=5)
    for intervals, truth in (
        (stats.ratio_intervals(effect, gap, Settings(resamples=400)), 0.3),
        (stats.mean_intervals(effect, Settings(resamples=400)), 0.3 * 6),
    ):
        covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
        assert 0.93 <= covered <= 0.97


def test_simultaneous_intervals_cover_all_sites_together():
    rng = np.random.default_rng(8)
    together = alone = 0
    for trial in range(300):
        shared = rng.standard_t(4, (60, 1))  # sites of one quad go together
        sites = rng.standard_t(4, (60, 25)) + shared
        together += all(i.low <= 0 <= i.high for i in stats.simultaneous(sites, Settings(resamples=200, seed=trial)))
        alone += all(i.low <= 0 <= i.high for i in stats.mean_intervals(sites, Settings(resamples=200, seed=trial)))
    assert 0.92 <= together / 300 <= 0.99
    assert alone / 300 < 0.75  # what intervals that hold one by one would do


def test_one_site_is_its_own_family():
    values = heavy_tailed(40, 1)[0]
    assert ends(stats.simultaneous(values)[0]) == ends(stats.mean_interval(values[:, 0]))


# --- sign flips


def brute_force(values: np.ndarray, tail: str) -> np.ndarray:
    """Familywise p values with t computed anew for every sign pattern."""
    n = len(values)

    def statistic(x: np.ndarray) -> np.ndarray:
        t = x.mean(0) / (x.std(0, ddof=1) / np.sqrt(n))
        return {"two-sided": np.abs(t), "greater": t, "less": -t}[tail]

    observed = statistic(values)
    flipped = np.array([statistic(np.array(s)[:, None] * values) for s in itertools.product((1, -1), repeat=n)])
    largest = flipped.max(1)[:, None] >= observed - 1e-9 * (1 + np.abs(observed))
    return largest.mean(0)


@pytest.mark.parametrize("tail", ["two-sided", "greater", "less"])
def test_enumerated_flips_equal_brute_force(tail):
    rng = np.random.default_rng(2)
    values = rng.standard_t(3, (9, 5)) + [0, 0.5, 1, -1, 2]
    got = stats.max_t(values, Settings(flips=512), tail=tail)
    assert (512 * got == np.rint(512 * got)).all()
    np.testing.assert_allclose(got, brute_force(values, tail))


def test_three_quads_by_hand():
    """Signs of (1, 2, 3): |sum| is 6 for the identity and its mirror image; sum is 6 for the identity alone."""
    values = np.array([[1.0], [2.0], [3.0]])
    assert stats.max_t(values, Settings(flips=8)).tolist() == [2 / 8]
    assert stats.max_t(values, Settings(flips=8), tail="greater").tolist() == [1 / 8]
    assert stats.max_t(values, Settings(flips=8), tail="less").tolist() == [1.0]
    # a site that is 0 everywhere never counts, and the other site's p is what it was
    assert stats.max_t(np.hstack([values, 0 * values]), Settings(flips=8)).tolist() == [2 / 8, 1.0]


def test_random_flips_estimate_the_enumeration_and_count_the_identity():
    values = np.random.default_rng(4).standard_t(3, (12, 6)) + 0.4
    exact, drawn = stats.max_t(values, Settings(flips=4096)), stats.max_t(values, Settings(flips=4095, seed=1))
    np.testing.assert_allclose(drawn, exact, atol=4 * 0.5 / np.sqrt(4095))
    huge = np.full((40, 2), 1.0) + 0.01 * np.random.default_rng(0).normal(size=(40, 2))
    assert stats.max_t(huge, Settings(flips=999)).tolist() == [1 / 999] * 2
    one, again, other = (stats.max_t(values, Settings(flips=500, seed=seed)).tolist() for seed in (3, 3, 4))
    assert one == again != other


@settings(max_examples=25, deadline=None)
@given(
    values=arrays(float, (8, 3), elements=st.integers(-20, 20).map(float)),
    scales=st.lists(st.sampled_from([1e-6, 1.0, 37.0]), min_size=3, max_size=3),
    order=st.permutations(range(8)),
)
def test_flips_do_not_mind_scale_or_order(values, scales, order):
    before = stats.max_t(values, Settings(flips=256))
    after = stats.max_t(values[list(order)] * scales, Settings(flips=256))
    assert after.tolist() == before.tolist()
    less = stats.max_t(-values, Settings(flips=256), tail="less")
    assert less.tolist() == stats.max_t(values, Settings(flips=256), tail="greater").tolist()
    alone = np.array([stats.max_t(values[:, [site]], Settings(flips=256))[0] for site in range(3)])
    assert (before >= alone).all()


def test_the_familywise_level_holds():
    """600 families of 20 sites without effect, heavy-tailed and correlated: 5% +- 4 standard errors."""
    rng = np.random.default_rng(6)
    rejected = sum(
        stats.max_t(rng.standard_t(3, (40, 20)) + rng.standard_t(3, (40, 1)), Settings(flips=200, seed=trial)).min()
        <= 0.05
        for trial in range(600)
    )
    assert abs(rejected / 600 - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 600)


def test_by_test_and_interval_the_level_holds_under_skew_too():
    """100 families of 100 lognormal sites of mean 0: flips alone reject in most, with the interval in at most 5% + 3
    standard errors."""
    rng, found = np.random.default_rng(0), []
    for trial in range(100):
        matrix = rng.lognormal(0, 1, (24, 100)) - np.exp(0.5)
        given = Settings(resamples=300, flips=300, seed=trial)
        table = pd.DataFrame(effects.familywise(matrix, given))
        found.append(((table["p"] <= 0.05).any(), effects.significant(table, given).any()))
    flips, both = np.mean(found, axis=0)
    assert flips > 0.5 and both <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100)


def test_a_site_of_a_single_quad_does_not_widen_all_intervals_without_end():
    """One quad of 30 differs, all others by next to nothing: a resample without it has an error of next to nothing."""
    rng = np.random.default_rng(0)
    lone = 1e-6 * rng.normal(size=(30, 1))
    lone[4] = 1.0
    ordinary = rng.normal(size=(30, 5))
    alone, beside = stats.simultaneous(ordinary), stats.simultaneous(np.hstack([ordinary, lone]))
    widths = [one.high - one.low for one in beside[:5]]
    assert max(widths) < 4 * max(one.high - one.low for one in alone) and beside[5].high - beside[5].low < 2


@pytest.mark.parametrize("apart", [1, 2])
def test_quads_that_are_nearly_alike_but_for_one_or_two_have_intervals_of_their_own_size(apart):
    """Many resamples hold none of those that are apart: their own error is rounding, and their t may be anything."""
    values = np.random.default_rng(0).normal(0, 1e-6, (24, 3))
    values[:apart] += 1
    rows = (values, np.ones((24, 1)))
    shares, other = stats.Shares(1 + values, rows[1]), stats.Shares(1 + values[::-1], rows[1])
    error = values[:, 0].std(ddof=1) / np.sqrt(24)
    for told, sites in (
        (stats.mean_intervals(values), 1),
        (stats.ratio_intervals(*rows), 1),
        (stats.simultaneous(values), 3),
    ):
        reach = reference.t.ppf(1 - 0.025 / sites, 23) * error
        assert [own.high - own.low for own in told] == pytest.approx([2 * reach] * 3, rel=1e-3)
    for told in (*stats.quotients(shares, other), *stats.contrasts(shares, other, 1.0)):
        assert told.high - told.low < 10 * error
    exact = stats.Shares(np.full((24, 2), 2.0), rows[1])
    assert [(own.low, own.high) for own in stats.contrasts(exact, exact, 0.5)] == [(1.0, 1.0)] * 2


# --- rank agreement


def test_rank_agreement():
    rng = np.random.default_rng(0)
    means, noise = np.linspace(-2, 2, 30), rng.normal(size=(50, 30))
    first, second = means + noise, 0.5 * means + rng.normal(size=(50, 30))
    got = site_tables.rank_agreement(first, second, Settings(resamples=500))
    assert got.estimate == pytest.approx(reference.spearmanr(first.mean(0), second.mean(0)).statistic)
    assert got.low < got.estimate < got.high < 1
    assert site_tables.rank_agreement(second, first, Settings(resamples=500)) == got
    same = site_tables.rank_agreement(first, np.exp(1) * first, Settings(resamples=500))
    assert ends(same) == pytest.approx((1, 1, 1), abs=1e-6)
    assert "equal effects" in site_tables.rank_agreement(first, np.zeros_like(first)).method
    with pytest.raises(ValueError, match="same quads and at least 3 sites"):
        site_tables.rank_agreement(first, second[:, :5])


# --- proportions


@pytest.mark.parametrize(("successes", "n"), [(0, 40), (1, 40), (37, 40), (40, 40), (11, 25)])
def test_single_trials_give_wilson_and_the_binomial_test(successes, n):
    hits = np.arange(n) < successes
    wanted = reference.binomtest(successes, n).proportion_ci(0.9, "wilson")
    got = stats.proportion_interval(hits, np.ones(n), Settings(0.9))
    assert (got.low, got.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    for chance in (0.2, 0.9):
        p = reference.binomtest(successes, n, chance, alternative="greater").pvalue
        assert p_above(successes, n, chance) == pytest.approx(p)
        assert p_above(successes, n, chance) == p_above(hits, np.ones(n), chance)


def test_trials_that_go_together_count_once():
    single = np.arange(40) < 30
    wilson = stats.proportion_interval(single, np.ones(40))
    twice = stats.proportion_interval(2 * single, np.full(40, 2))  # both trials of a unit always agree
    assert ends(twice) == pytest.approx(ends(wilson), abs=0.005)
    assert stats.effective_trials(2 * single, np.full(40, 2))[1] == pytest.approx(39)
    # trials that tell units apart less than chance would are counted as they are, never as more
    assert stats.effective_trials(np.ones(40), np.full(40, 2)) == (40, 80)
    # at 0 and 1 every unit counts once
    assert stats.effective_trials(np.full(40, 2), np.full(40, 2)) == (40, 40)
    sure = stats.proportion_interval(np.full(40, 2), np.full(40, 2))
    assert sure.high == sure.estimate == 1 and 0.9 < sure.low < 0.93


def test_coverage_of_proportions_of_quads():
    """50 quads of two trials that share a quad's difficulty, true proportion 0.95."""
    rng = np.random.default_rng(9)
    hits = rng.binomial(2, rng.beta(0.95, 0.05, (2_000, 50)))
    intervals = [stats.proportion_interval(row, np.full(50, 2)) for row in hits]
    assert 0.93 <= np.mean([interval.low <= 0.95 <= interval.high for interval in intervals]) <= 0.98


def test_holm_by_hand():
    assert stats.holm([0.04, 0.01, 0.03, 0.5]).tolist() == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert stats.holm([0.9, 0.6]).tolist() == [1, 1]


def test_resamples_without_spread_are_left_out_where_they_are_few():
    t = np.tile(np.arange(100.0)[:, None], 2)
    t[:4, 0], t[:6, 1] = np.nan, np.nan
    own, none = stats._quantiles(t, 0.95)
    assert own == np.quantile(np.arange(4, 100), 0.95) and np.isnan(none)


# --- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.mean_interval([1.0, np.nan] * 15), r"NaN or infinite values in quads \[ *1 "),
        (lambda: stats.mean_interval([]), "^matrix: expected one row per quad"),
        (lambda: stats.simultaneous([]), "^matrix: expected one row per quad"),
        (lambda: stats.max_t([]), "^matrix: expected one row per quad"),
        (lambda: stats.mean_interval(np.ones(30), Settings(level=95)), "level"),
        (lambda: stats.mean_interval(np.ones(30), Settings(resamples=10)), "resamples"),
        (lambda: stats.ratio_intervals(np.ones(30), -np.ones(30)), "not defined"),
        (lambda: stats.ratio_intervals(np.ones(30), np.ones(29)), "same quads"),
        (lambda: stats.max_t(np.ones((30, 2)), tail="up"), "tail"),
        (lambda: stats.max_t(np.ones((30, 2)), Settings(flips=0)), "flips"),
        (lambda: stats.proportion_interval([3], [2]), "successes"),
    ],
)
def test_bad_input_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_quad_has_a_p_of_one_and_no_warning(recwarn):
    test = stats.max_t(np.array([[1.0, -2.0, 0.5]]))
    assert test.tolist() == [1, 1, 1] and not recwarn.list
