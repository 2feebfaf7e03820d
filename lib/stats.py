"""Intervals and tests over quads.

The unit of everything here is the quad (in general, the cluster): pairs of one quad share people, quads share nobody.
So each function takes one value per quad, or one value per quad and site, and resamples or flips whole quads.

1. Intervals: the studentised bootstrap (bootstrap-t; Efron and Tibshirani 1993, chapter 12.5) in its symmetric form
   (Hall 1988), for means, ratios of sums and differences, and for all sites together by the largest |t|. With heavy
   tails it covers better than the equal-tailed form.
2. Two sets of quads that share nobody: one ratio over the other, or less a part of the other; both are resampled.
3. Tests over many sites: the sign of whole quads is flipped, and the largest statistic over sites is compared (max-T;
   Westfall and Young 1993).
4. `p_of_interval` reads a p value off an interval, so that claims decided by intervals can be corrected together.
5. Proportions: Wilson's interval, with the number of trials reduced for what trials of one quad share.

Resamples are drawn once per call as a matrix of weights and used for all sites, so that everything is a matrix
product, done in chunks; a seed decides everything. `bench/coverage.py` measures coverage and level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from scipy import stats

MINIMUM_CLUSTERS = 20  # below it, estimates are given without intervals
CHUNK = 2**21  # elements of the largest temporary: 16 MB in fp64
TAILS = 7  # degrees of freedom of the Student's t whose tails stand in for a bootstrap's, see `p_of_interval`
ZERO = 1e-12  # a variance below this share of the values' mean square is rounding, not spread
SPREAD = 0.15  # a resample counts at a site whose error in it reaches this share of its own


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; None for its ends where there are too few clusters (`method` says so)."""

    estimate: float
    low: float | None
    high: float | None
    level: float
    n: int  # clusters
    method: str

    def __format__(self, spec: str) -> str:
        """`f"{interval:.3f}"` formats all three numbers; the default is two decimals."""
        spec = spec or ".2f"
        if self.low is None:
            return f"{self.estimate:{spec}} ({self.method})"
        return f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return format(self, "")


@dataclass(frozen=True)
class Settings:
    """How intervals and tests are made; the parameters of a step, which hold the same five, stand in for it."""

    level: float = 0.95  # confidence of intervals
    resamples: int = 2000  # of the bootstrap
    flips: int = 2000  # of the signs of whole quads
    seed: int = 0
    floor: float = 0.0  # logits: the model's own noise; no mean change up to it is an effect (`lib.effects`)


DEFAULTS = Settings()
Tail = Literal["two-sided", "greater", "less"]


def too_few(n: int, unit: str = "clusters") -> str | None:
    """Why there is no interval over n clusters, or None if there are enough."""
    return f"no interval: {n} {unit}, fewer than {MINIMUM_CLUSTERS}" if n < MINIMUM_CLUSTERS else None


def _matrix(values: ArrayLike, name: str) -> Float[np.ndarray, "quads sites"]:
    """Values per quad, or per quad and site, as a finite matrix."""
    matrix = np.asarray(values, dtype=float)
    matrix = matrix[:, None] if matrix.ndim == 1 else matrix
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{name}: expected one row per quad; got an array of shape {np.shape(values)}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name}: NaN or infinite values in quads {np.flatnonzero(~np.isfinite(matrix).all(1))[:10]}")
    return matrix


def check(settings: Settings) -> None:
    if not 0 < settings.level < 1:
        raise ValueError(f"level must lie in (0, 1); got {settings.level}")
    if settings.resamples < 100:
        raise ValueError(f"resamples must be at least 100; got {settings.resamples}")


def weights(n: int, sites: int, resamples: int, seed: int | Sequence[int]) -> Iterator[Float[np.ndarray, "chunk n"]]:
    """Bootstrap resamples as counts per quad, chunk by chunk; the draws depend on n, resamples and seed alone."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // max(n, sites))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(float)


def p_of_interval(estimate: float, end: float, threshold: float, above: bool, level: float = 0.95) -> float:
    """p of "the value is beyond the threshold", from an interval: one minus the highest level whose interval would
    still lie beyond it. `end` is the interval's end towards the threshold: the lower one if `above`.

    With the bootstrap's draws at hand, that is the share of |t*| that reach (estimate - threshold) / error. A stored
    interval keeps one quantile of |t*|; the others are taken to stand to it as in Student's t with `TAILS` degrees of
    freedom. Those tails were heavier than the bootstrap's own with normal values and with those of the default model,
    mostly with Student's t of 3, and lighter with lognormal ones, from 20 quads on. p is below 1 - level exactly where
    the interval lies beyond the threshold, and 1 where not even the estimate does.
    """
    distance = estimate - threshold if above else threshold - estimate
    if distance <= 0:
        return 1.0
    reach, quantile = abs(estimate - end), stats.t.ppf((1 + level) / 2, TAILS)
    return float(2 * stats.t.sf(quantile * distance / reach, TAILS)) if reach else 0.0


class _Ratios(NamedTuple):
    """Ratios of sums, one per site, with delta-method standard errors. A mean is a ratio with denominators of 1."""

    estimate: Float[np.ndarray, " sites"]
    error: Float[np.ndarray, " sites"]
    residual: Float[np.ndarray, "n sites"]  # (numerator - estimate x denominator) / mean denominator
    denominator: Float[np.ndarray, "n sites"]  # over its mean; one column if all sites share it

    @classmethod
    def of(cls, numerator: Float[np.ndarray, "n sites"], denominator: Float[np.ndarray, "n sites"]) -> _Ratios:
        n, mean = len(numerator), denominator.mean(0)
        if not (mean > 0).all():
            raise ValueError(
                f"the denominators of {int((mean <= 0).sum())} of {len(mean)} ratios do not add up to more than 0: "
                "the ratio is not defined; keep pairs whose corrupt prompt lowers the answer"
            )
        numerator, denominator = numerator / mean, denominator / mean
        estimate = numerator.mean(0)
        residual = numerator - estimate * denominator
        variance = (residual**2).sum(0) / max(n - 1, 1)
        spread = variance > ZERO * (numerator**2).mean(0)
        return cls(estimate, np.sqrt(np.where(spread, variance, 0.0) / n), residual, denominator)

    def columns(self, part: slice) -> _Ratios:
        """Some of the sites."""
        shared = self.denominator.shape[1] == 1
        denominator = self.denominator if shared else self.denominator[:, part]
        return _Ratios(self.estimate[part], self.error[part], self.residual[:, part], denominator)

    def resampled(
        self, settings: Settings, seed: int | Sequence[int]
    ) -> Iterator[tuple[Float[np.ndarray, "chunk sites"], Float[np.ndarray, "chunk sites"]]]:
        """How far the ratio moved in each resample, and that resample's own standard error.

        With weights w, residuals e and denominators d of mean 1, the ratio moves by delta = sum(w e) / sum(w d), and
        the resample's own residuals are e - delta d. NaN where these have no spread, or sum(w d) is not positive.
        """
        n, e, d = len(self.residual), self.residual, self.denominator
        for w in weights(n, len(self.error), settings.resamples, seed):
            total = w @ d
            total = np.where(total > 0, total, np.nan)
            delta = (w @ e) / total
            squares = w @ e**2 + delta * (delta * (w @ d**2) - 2 * (w @ (e * d)))
            squares = np.where(squares > ZERO * n * n * self.error**2, squares, np.nan)
            yield delta, np.sqrt(squares / (n * (n - 1))) * (n / total)

    def t_values(self, settings: Settings) -> Iterator[Float[np.ndarray, "chunk sites"]]:
        """t per resample and site: how far the ratio moved, over the resample's own standard error; NaN where that is
        less than a share SPREAD of the ratio's."""
        for delta, error in self.resampled(settings, settings.seed):
            yield np.where((self.error > 0) & (error >= SPREAD * self.error), delta / error, np.nan)


def _intervals(
    numerator: np.ndarray, denominator: np.ndarray, settings: Settings, together: bool = False
) -> list[Interval]:
    """Symmetric bootstrap-t intervals, estimate +- (quantile of |t|) x error, for each site or for all together.

    Two degenerate cases. No spread between quads: the interval is the estimate itself. More than a share 1 - level of
    the resamples almost without spread (`SPREAD`; a quad or two apart from others that are nearly alike): their |t| may
    be anything, the quantile is not determined, and Student's t stands in (Bonferroni over sites). Fewer are left out.
    """
    check(settings)
    n, sites = numerator.shape
    level = settings.level
    ratios = _Ratios.of(numerator, denominator)
    if reason := too_few(n):
        return [Interval(float(estimate), None, None, level, n, reason) for estimate in ratios.estimate]
    if together:
        largest = [np.fmax.reduce(np.abs(t), axis=1) for t in ratios.t_values(settings)]
        critical = np.full(sites, _quantiles(np.concatenate(largest)[:, None], level)[0])
        method = f"max-|t| over {sites} sites"
    else:
        width = max(1, CHUNK // settings.resamples)  # sites at a time, all with the same resamples
        blocks = [ratios.columns(slice(start, start + width)) for start in range(0, sites, width)]
        tables = (np.vstack(list(block.t_values(settings))) for block in blocks)
        critical, method = np.concatenate([_quantiles(np.abs(table), level) for table in tables]), "bootstrap-t"
    intervals = []
    for estimate, error, quantile in zip(*(x.tolist() for x in (ratios.estimate, ratios.error, critical)), strict=True):
        how = method
        if error == 0:
            quantile, how = 0.0, "no spread between clusters"
        elif np.isnan(quantile):
            several = sites if together else 1  # Bonferroni
            quantile, how = float(stats.t.ppf(1 - (1 - level) / 2 / several, n - 1)), "Student's t"
        intervals.append(Interval(estimate, estimate - quantile * error, estimate + quantile * error, level, n, how))
    return intervals


def _quantiles(t: Float[np.ndarray, "resamples sites"], level: float) -> Float[np.ndarray, " sites"]:
    """The quantile of each column's numbers; NaN where less than a share `level` of them are numbers."""
    missing = np.isnan(t)
    quantiles = np.quantile(t, level, axis=0)
    for site in np.flatnonzero(missing.any(0)):
        numbers = t[~missing[:, site], site]
        quantiles[site] = np.quantile(numbers, level) if len(numbers) >= level * len(t) else np.nan
    return quantiles


def mean_intervals(matrix: Float[np.ndarray, "quads sites"], settings: Settings = DEFAULTS) -> list[Interval]:
    """Bootstrap-t interval for the mean of each column; each holds on its own (`simultaneous`: all together)."""
    values = _matrix(matrix, "matrix")
    return _intervals(values, np.ones((len(values), 1)), settings)


def mean_interval(values: ArrayLike, settings: Settings = DEFAULTS) -> Interval:
    """Bootstrap-t interval for the mean of one value per quad; for the difference of two ablations, of differences."""
    return mean_intervals(np.ravel(values)[:, None], settings)[0]


def ratio_intervals(numerators: ArrayLike, denominators: ArrayLike, settings: Settings = DEFAULTS) -> list[Interval]:
    """Bootstrap-t interval, with delta-method errors, for each column's sum(numerator) / sum(denominator).

    For damage and recovery: the quads' sums of effects and of clean - corrupt. `numerators` are (quads, sites), or
    (quads,) for one site; `denominators` likewise, (quads,) also where all sites share them. ValueError if they do not
    add up to more than 0.
    """
    top, bottom = _matrix(numerators, "numerators"), _matrix(denominators, "denominators")
    if len(top) != len(bottom) or bottom.shape[1] not in (1, top.shape[1]):
        raise ValueError(f"numerators {top.shape} and denominators {bottom.shape} must have the same quads and sites")
    return _intervals(top, bottom, settings)


class Shares(NamedTuple):
    """Ratios of sums to compare with others: one row per quad, one column per site."""

    numerators: Float[np.ndarray, "quads sites"]
    denominators: Float[np.ndarray, "quads sites"]


def quotients(one: Shares, other: Shares, settings: Settings = DEFAULTS) -> list[Interval]:
    """One ratio of sums over another, site by site, of quads that the two have not in common.

    Symmetric bootstrap-t: each sample is resampled by itself, and each resample's quotient has its own delta-method
    error, sqrt(e1^2 + q^2 e2^2) / r2. No interval where the ratio below is not above 0 in a share `level` of the
    resamples: its quotients may then be anything (Fieller 1954).
    """

    def divided(a: np.ndarray, ea: np.ndarray, b: np.ndarray, eb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        below = np.where(b > 0, b, np.nan)
        return a / below, np.sqrt(ea**2 + (a / below * eb) ** 2) / below

    return _of_two(one, other, divided, settings, together=False)


def contrasts(one: Shares, other: Shares, factor: float, settings: Settings = DEFAULTS) -> list[Interval]:
    """One ratio of sums less `factor` times another, for all sites together (see `simultaneous`); quads of the two are
    resampled apart. Below 0: the quotient is below `factor`, without dividing by what may be 0."""

    def subtracted(a: np.ndarray, ea: np.ndarray, b: np.ndarray, eb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return a - factor * b, np.sqrt(ea**2 + (factor * eb) ** 2)

    return _of_two(one, other, subtracted, settings, together=True)


def _of_two(one: Shares, other: Shares, combine: Callable, settings: Settings, together: bool) -> list[Interval]:
    """Intervals of what `combine` makes of two samples' ratios and their errors: value and error, per site."""
    check(settings)
    level, samples = settings.level, [_Ratios.of(*shares) for shares in (one, other)]
    n = min(len(ratios.residual) for ratios in samples)
    estimate, error = combine(*(part for ratios in samples for part in (ratios.estimate, ratios.error)))
    if reason := too_few(n):
        return [Interval(float(value), None, None, level, n, reason) for value in estimate]
    drawn = []
    for place, ratios in enumerate(samples):  # each with draws of its own
        moved, own = map(np.concatenate, zip(*ratios.resampled(settings, [settings.seed, place]), strict=True))
        drawn += [ratios.estimate + moved, own]
    values, errors = combine(*drawn)
    t = np.abs(values - estimate) / errors
    defined = np.isfinite(t).mean(0) >= level
    t = np.where(errors >= SPREAD * error, t, np.nan)
    t = np.fmax.reduce(t, axis=1, keepdims=True) if together else t
    critical = np.broadcast_to(_quantiles(t, level), estimate.shape)
    student = stats.t.ppf(1 - (1 - level) / 2 / (len(estimate) if together else 1), n - 1)  # as in `_intervals`
    critical = np.where(error == 0, 0.0, np.where(np.isnan(critical) & defined, student, critical))
    intervals = []
    for value, reach in zip(estimate.tolist(), (critical * error).tolist(), strict=True):
        known = np.isfinite(reach)
        ends = (value - reach, value + reach) if known else (None, None)
        why = "bootstrap-t of both" if known else "no interval: the ratio below is not surely above 0"
        intervals.append(Interval(value, *ends, level, n, why))
    return intervals


def simultaneous(matrix: Float[np.ndarray, "quads sites"], settings: Settings = DEFAULTS) -> list[Interval]:
    """Intervals for the mean of each column that cover all of them together with probability `level` (familywise).

    Each is estimate +- c standard errors, where c is the quantile of the largest |t| over sites in resamples of whole
    quads, so the correlation between sites is kept (Romano and Wolf 2005). A site does not count towards the largest
    in a resample that misses nearly all of its spread (`SPREAD`): else one site whose effect is a single quad's would
    make every interval as wide as one likes. Where no site counts in more than a share 1 - level of the resamples,
    Student's t stands in. In simulations of 300 sites they covered in some 95% or more with normal,
    heavy-tailed and lognormal values alike, from 20 quads on (`bench/coverage.py`).
    """
    values = _matrix(matrix, "matrix")
    return _intervals(values, np.ones((len(values), 1)), settings, together=True)


def max_t(
    matrix: Float[np.ndarray, "quads sites"], settings: Settings = DEFAULTS, tail: Tail = "two-sided"
) -> Float[np.ndarray, " sites"]:
    """Familywise p values for "this site's mean effect is 0", by flipping the sign of whole quads.

    All sites of a quad flip together, and each site's t is compared with the largest t over sites (Westfall and Young
    1993; single step). The assumption: under the null, a quad's effects are as likely as their negatives (symmetry
    about 0). If that holds at some sites only, those are still protected. Skewed effects of mean 0 break it: 300
    lognormal sites gave a rejection in 22 to 100% of simulations. So what is called significant must lie off 0 with its
    interval for all sites together as well (`lib.effects.significant`). When 2 ** n <= `flips`, every pattern is
    enumerated; else `flips` patterns count, the identity among them (Phipson and Smyth 2010: no p is 0).

    A sign flip leaves the sum of squares q alone, so t is one rising function of sum(s x) / sqrt(q) for all sites: that
    is compared, and each chunk of patterns costs one matrix product. Sites that are 0 in every quad get p = 1.
    """
    values = _matrix(matrix, "matrix")
    n, sites = values.shape
    if settings.flips < 1:
        raise ValueError(f"flips must be at least 1; got {settings.flips}")
    if tail not in get_args(Tail):
        raise ValueError(f"tail must be two-sided, greater or less; got {tail!r}")
    norm = np.sqrt((values**2).sum(0))
    scaled = np.divide(values, norm, out=np.zeros_like(values), where=norm > 0)
    reshape = {"two-sided": np.abs, "greater": np.positive, "less": np.negative}[tail]
    total = scaled.sum(0)
    # What is equal up to rounding counts as reaching the observed value: the identity must count itself.
    reached = reshape(total) - 1e-9
    exact = n <= 60 and 2**n <= settings.flips
    count = 2**n if exact else settings.flips
    familywise = np.zeros(sites)
    for signs in _signs(n, sites, count, exact, settings.seed):
        largest = np.sort(reshape(signs @ scaled).max(1))
        familywise += len(signs) - np.searchsorted(largest, reached)
    return familywise / count


def _signs(n: int, sites: int, total: int, exact: bool, seed: int) -> Iterator[Float[np.ndarray, "chunk n"]]:
    """Sign patterns, the identity first: all 2 ** n, or random ones that depend on n, total and seed alone."""
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // max(n, sites))
    for start in range(0, total, step):
        numbers = np.arange(start, min(start + step, total))
        if exact:
            negative: Bool[np.ndarray, "chunk n"] = (numbers[:, None] >> np.arange(n)) & 1 == 1
        else:
            negative = rng.random((len(numbers), n)) < 0.5
            negative[numbers == 0] = False
        yield np.where(negative, -1.0, 1.0)


def holm(p: Sequence[float]) -> Float[np.ndarray, " tests"]:
    """p values corrected for how many they are (Holm 1979, step-down)."""
    order = np.argsort(p)
    out = np.empty(len(p))
    out[order] = np.minimum(np.maximum.accumulate(np.sort(p) * np.arange(len(p), 0, -1)), 1)
    return out


def effective_trials(successes: ArrayLike, n: ArrayLike) -> tuple[float, float]:
    """Successes and trials, reduced for what the trials of one unit share: both over the design effect.

    The design effect is the proportion's variance between units over the binomial one (Kish 1965), at least 1. At a
    proportion of 0 or 1 it is unknown, and each unit counts as one trial.
    """
    hits, trials = np.atleast_1d(np.asarray(successes, float)), np.atleast_1d(np.asarray(n, float))
    if hits.shape != trials.shape or not ((trials > 0) & (hits >= 0) & (hits <= trials)).all():
        raise ValueError(f"need 0 <= successes <= n and n > 0 per unit; got {hits[:10]} of {trials[:10]}")
    units, total, p = len(hits), trials.sum(), hits.sum() / trials.sum()
    if (trials == 1).all() or units == 1:
        return float(hits.sum()), float(total)
    if p in (0.0, 1.0):
        return float(p * units), float(units)
    variance = units / (units - 1) * ((hits - p * trials) ** 2).sum() / total**2
    effective = total / max(1.0, variance * total / (p * (1 - p)))
    return float(p * effective), float(effective)


def proportion_interval(successes: ArrayLike, n: ArrayLike, settings: Settings = DEFAULTS) -> Interval:
    """Wilson's interval for a proportion, from successes and trials per unit (two arrays, one entry per quad).

    Units of several trials enter with their `effective_trials`. (A cluster bootstrap covers 85 to 88% at a true
    proportion of 0.95 and 50 units of two trials, and has no width at 0 or 1; this covers 96 to 97% there.)
    """
    k, trials = effective_trials(successes, n)
    units, p = len(np.atleast_1d(successes)), k / trials
    check(settings)
    level = settings.level
    if reason := too_few(units):
        return Interval(p, None, None, level, units, reason)
    z = float(stats.norm.ppf((1 + level) / 2))
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    reach = z / (1 + z * z / trials) * np.sqrt(p * (1 - p) / trials + (z / (2 * trials)) ** 2)
    # rounding must not push the interval off its estimate at 0 and 1
    low, high = min(p, max(0.0, float(middle - reach))), max(p, min(1.0, float(middle + reach)))
    return Interval(p, low, high, level, units, "Wilson")
