"""Tests between classes of prompts, and tests that an effect is nearly nothing.

1. `equivalence`: two one-sided t tests per column; a control is silent if every candidate's passes.
   `equivalence_power`: how probable that is at this size where there is nothing.
2. `interaction`: does a site's share of the gap differ between classes? Both classes of a pair have a part in its gap,
   so effects are regressed on the classes that meet in a quad; a site's statistic is Wald's, of the differences between
   its classes' shares; and whole quads exchange their classes.
3. `between_classes`: do two classes rank the sites alike, and as alike as two halves of one class do?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy import stats as reference

from lib import stats
from lib.stats import DEFAULTS, Settings
from report.site_tables import spearman

MINIMUM_QUADS = 10  # quads of a class that takes part in the test of interaction
LEAST = 0.05  # shares of classes that lie no farther apart than this count as the same
ROUNDING = 1e-4  # share of the gap: an error smaller than this is none to divide by
POWER = 0.9  # with which the test finds a class that lies off all others by its resolution
SPLITS = 100  # random halves behind each agreement of halves


def equivalence(matrix: Float[np.ndarray, "quads sites"], margin: float) -> Float[np.ndarray, " sites"] | None:
    """p of two one-sided t tests of "the mean lies outside +- margin", per column (Schuirmann 1987): the larger one.

    All columns lie within the margin if their largest p is below 1 - level: an intersection-union test has the level of
    each of its tests, uncorrected (Berger and Hsu 1996). `margin` is in the units of the values and is taken as known.
    None with fewer than stats.MINIMUM_CLUSTERS quads. ValueError for a margin that is not positive.
    """
    values = stats._matrix(matrix, "matrix")
    if not (margin > 0 and np.isfinite(margin)):
        raise ValueError(f"the margin of an equivalence test must be positive; got {margin}")
    n, p = len(values), []
    for column in values.T:
        error = column.std(ddof=1) / np.sqrt(n)
        with np.errstate(divide="ignore", invalid="ignore"):  # no spread: t is infinite, or 0/0 at the margin itself
            t = (margin - np.abs(column.mean())) / np.float64(error)
        p.append(1.0 if np.isnan(t) else reference.t.sf(t, n - 1))
    return None if stats.too_few(n) else np.array(p)


def equivalence_power(
    matrix: Float[np.ndarray, "quads sites"], margin: float, settings: Settings = DEFAULTS
) -> float | None:
    """Probability that all columns pass `equivalence` at this size, were there no effect at all.

    The share of resamples of whole quads, with each column's mean taken off, in which they do. None with too few quads.
    """
    values = stats._matrix(matrix, "matrix")
    n = len(values)
    if stats.too_few(n):
        return None
    passed, quantile, nothing = [], reference.t.ppf(settings.level, n - 1), values - values.mean(0)
    for weights in stats.weights(n, values.shape[1], settings.resamples, settings.seed):
        mean = weights @ nothing / n
        error = np.sqrt(np.maximum(weights @ nothing**2 / n - mean**2, 0) / (n - 1))
        passed.append((margin - np.abs(mean) > quantile * error).all(1))
    return float(np.concatenate(passed).mean())


@dataclass(frozen=True)
class Interaction:
    """A test of class x site interaction."""

    shares: pd.DataFrame  # class x site: the site's share of the class's part of the gap, where that is the answer
    p: Float[np.ndarray, " sites"]  # familywise over sites (max-T); the smallest is 1 / flips
    p_overall: float  # familywise, of effects less their mean over sites
    resolution: float  # by how much one class's share must lie off all others' to be found at any site (`POWER`)


def interaction(
    effects: Float[np.ndarray, "units sites"],
    gaps: ArrayLike,
    meetings: Sequence[tuple[str, str]],
    clusters: Sequence,
    settings: Settings = DEFAULTS,
) -> Interaction:
    """Permutation test of "a site's share of the gap is the same in all classes, up to `LEAST`".

    A unit is what one cluster (quad) has of one answer and one corrupt answer, its `meetings`: its summed effects (one
    per site) and its summed gap. A site that writes the logit of one class moves logit_diff wherever that class is the
    answer or the corrupt answer. So a pair's gap is taken as half its answer's and half its corrupt answer's, and a
    site does gap / 2 x (a[answer] + b[corrupt answer]). (a + b) / 2 is read from the sums of the clusters, (a - b) / 2
    from the differences in those that have their two classes both ways round.

    1. Gaps are scaled to mean 1 per class. The regressions' errors are the mean of those of equal spread and of HC2
       (MacKinnon and White 1985), which with ten quads a class are small by chance.
    2. The statistic is Wald's, of the differences between the classes' shares; the observed ones are first drawn
       together by `LEAST`, so that what is less than that does not count.
    3. Clusters exchange their meetings (those both ways round among themselves, and their ways), and all is computed
       anew; `settings.flips` counts the observed meetings. By permutation, the studentised statistic is right in the
       limit where classes differ in spread, too (DiCiccio and Romano 2017).

    The p values of sites are single-step (Westfall and Young 1993) over sites, sums and differences. `p_overall` is the
    least of them where effects are centred over sites: a class in which every site does more by a constant has no part
    in it. At a nominal 5%, a site was found in 1 of 425 simulations of shares that are alike, and an overall p in 2
    (`bench/coverage.py`: 17 kinds of values, classes and quads).

    ValueError for shapes that do not match, clusters whose gap does not exceed 0, and classes whose shares the meetings
    leave open (`determined`).
    """
    values, gap = stats._matrix(effects, "effects"), np.asarray(gaps, dtype=float)
    if not len(values) == gap.size == len(meetings) == len(clusters) or gap.ndim != 1:
        raise ValueError(f"need a gap, two classes and a cluster per unit; got {values.shape}, {gap.shape}")
    if settings.flips < 1:
        raise ValueError(f"flips must be at least 1; got {settings.flips}")
    if not determined(meetings, clusters):
        raise ValueError("how the classes meet leaves their shares open")
    names, sites = sorted({name for meeting in meetings for name in meeting}), values.shape[1]
    both = np.hstack([values, values - values.mean(1, keepdims=True)])
    halves = _halves(both, gap, _ends(meetings, names), pd.factorize(np.asarray(clusters))[0])
    drawn, first = [], None
    for order, ways in _orders(len(halves[0].gaps), len(halves[-1].gaps), 2 * sites * len(names), settings):
        fits = [half.fitted(order, signs) for half, signs in zip(halves, (np.ones(order.shape), ways), strict=False)]
        first = first or [(shares[0], errors[0]) for shares, errors in fits]
        drawn.append(np.stack([_wald(*fit) for fit in fits], axis=1))
    drawn = np.concatenate(drawn)  # draws x halves x columns
    drawn[0] = [_wald(_drawn_together(shares), errors) for shares, errors in first]
    own, centred = (_familywise(drawn[..., part]) for part in (slice(sites), slice(sites, None)))
    shares = pd.DataFrame(sum(shares[:sites] for shares, _ in first).T, pd.Index(names, name="class"))
    least = _resolution(first[0][1][:sites], drawn[1:, :, :sites], settings.level)
    return Interaction(shares, own, float(centred.min()), least)


def determined(meetings: Sequence[tuple[str, str]], clusters: Sequence) -> bool:
    """Whether the classes that meet in clusters tell their shares apart. It takes three that meet each other: of two
    that always meet, what a site does for one cannot be told from what it does for the other."""
    names = sorted({name for meeting in meetings for name in meeting})
    sums = pd.DataFrame(sum(_ends(meetings, names))).groupby(np.asarray(clusters)).sum()
    return bool(np.linalg.matrix_rank(sums) == len(names))


def _ends(meetings: Sequence[tuple[str, str]], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(units, classes): which class is the answer, and which the corrupt answer."""
    answers, others = zip(*meetings, strict=True)
    return tuple(np.eye(len(names))[[names.index(name) for name in side]] for side in (answers, others))


class _Half(NamedTuple):
    """Sums of clusters, or differences between their two ways: effects are gaps x design @ shares, plus errors."""

    effects: Float[np.ndarray, "clusters columns"]
    gaps: Float[np.ndarray, " clusters"]
    design: Float[np.ndarray, "clusters classes"]
    basis: Float[np.ndarray, "classes parameters"]  # of the shares that such a design can tell

    def fitted(
        self, order: Int[np.ndarray, "draws clusters"], ways: Float[np.ndarray, "draws clusters"]
    ) -> tuple[Float[np.ndarray, "draws columns classes"], Float[np.ndarray, "draws columns classes classes"]]:
        """The classes' shares and their covariances, each cluster having another's design."""
        n = len(self.gaps)
        x = (self.design @ self.basis)[order[:, :n]] * ways[:, :n, None]
        turned = x.swapaxes(1, 2)
        inverse = np.linalg.inv((turned * self.gaps) @ x)
        estimate = inverse @ (turned @ self.effects)
        left = self.effects - self.gaps[:, None] * (x @ estimate)
        leverage = np.minimum(self.gaps * ((x @ inverse) * x).sum(2), 1 - 1e-9)[..., None]
        pooled = (left**2).sum(1, keepdims=True) / (n - x.shape[2])
        squares = (left**2 / (1 - leverage) + pooled) / 2 + (ROUNDING * self.gaps[:, None]) ** 2
        products = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:2], -1)
        middle = (squares.swapaxes(1, 2) @ products).reshape(len(x), -1, *inverse.shape[1:])
        side = self.basis @ inverse[:, None]
        return (self.basis @ estimate).swapaxes(1, 2), side @ middle @ side.swapaxes(2, 3)


def _halves(
    values: np.ndarray, gap: np.ndarray, ends: tuple[np.ndarray, np.ndarray], cluster: np.ndarray
) -> list[_Half]:
    """The sums, and the differences where they are enough; clusters that have both ways round lead the others."""
    answer, other = ends
    pairs = [units for number in range(cluster.max() + 1) if len(units := np.flatnonzero(cluster == number)) == 2]
    pairs = np.array([own for own in pairs if (answer[own] == other[own[::-1]]).all() and (gap[own] > 0).all()], int)
    one, two = pairs.reshape(-1, 2).T
    rest = np.setdiff1d(cluster, cluster[one])
    member = (np.concatenate([cluster[one], rest])[:, None] == cluster).astype(float)
    total = member @ gap
    if not (total > 0).all():
        raise ValueError("a cluster's gap does not exceed 0: there are no shares of it")
    design = member @ (gap[:, None] * (answer + other) / 2) / total[:, None]
    scale = design @ (design.T @ total / design.sum(0))
    sums = _Half(member @ values / scale[:, None], total / scale, design, np.eye(design.shape[1]))
    turned, basis = (answer[one] - answer[two]) / 2, _contrasts(design.shape[1]).T
    if stats.too_few(len(one)) or np.linalg.matrix_rank(turned) < basis.shape[1]:
        return [sums]
    size = sums.gaps[: len(one)]
    apart = (values[one] / gap[one, None] - values[two] / gap[two, None]) / 2 * size[:, None]
    return [sums, _Half(apart, size, turned, basis)]


def _orders(n: int, mirrored: int, width: int, settings: Settings) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Whose meetings each cluster has, and which way round: as observed, then exchanged, the first `mirrored` apart."""
    rng = np.random.default_rng(settings.seed)
    blocks = [np.tile(np.arange(*ends), (settings.flips, 1)) for ends in ((mirrored,), (mirrored, n))]
    order = np.hstack([rng.permuted(block, axis=1) for block in blocks])
    ways = rng.choice([-1.0, 1.0], size=order.shape)
    order[0], ways[0] = np.arange(n), 1.0
    step = max(1, stats.CHUNK // (n * width))
    for start in range(0, settings.flips, step):
        yield order[start : start + step], ways[start : start + step]


def _contrasts(classes: int) -> Float[np.ndarray, "contrasts classes"]:
    """Orthonormal differences between classes."""
    return np.linalg.svd(np.ones((1, classes)))[2][1:]


def _wald(shares: Float[np.ndarray, "*any classes"], errors: Float[np.ndarray, "*any classes classes"]) -> np.ndarray:
    """Wald's statistic of the differences between classes."""
    across = _contrasts(shares.shape[-1])
    apart = (shares @ across.T)[..., None]
    return (apart * np.linalg.solve(across @ errors @ across.T, apart)).sum((-2, -1))


def _drawn_together(shares: Float[np.ndarray, "*any classes"]) -> np.ndarray:
    """Shares by half of `LEAST` nearer to the middle of the largest and the smallest, or in it."""
    apart = shares - (shares.max(-1, keepdims=True) + shares.min(-1, keepdims=True)) / 2
    return np.sign(apart) * np.maximum(np.abs(apart) - LEAST / 2, 0)


def _familywise(drawn: Float[np.ndarray, "draws halves sites"]) -> Float[np.ndarray, " sites"]:
    """The share of draws whose largest statistic reaches a site's in the first draw, the larger of its two.

    What is equal up to rounding counts as reached: the first must count itself."""
    return (drawn.max((1, 2))[:, None] >= drawn[0].max(0) * (1 - 1e-9)).mean(0)


def _resolution(errors: Float[np.ndarray, "sites classes classes"], drawn: np.ndarray, level: float) -> float:
    """See `Interaction`: the statistic that counts as large, and the power's normal quantile, in a class's errors."""
    across = _contrasts(errors.shape[-1])
    information = np.einsum("kc,skl,lc->sc", across, np.linalg.inv(across @ errors @ across.T), across)
    limit = np.quantile(drawn.max((1, 2)), level) if len(drawn) else np.inf
    least = (np.sqrt(limit) + reference.norm.ppf(POWER)) / np.sqrt(information.min())
    return float(least + LEAST)


def between_classes(
    effects: Mapping[str, Float[np.ndarray, "quads sites"]], settings: Settings = DEFAULTS
) -> pd.DataFrame:
    """Spearman's correlation of the sites' mean effects between classes, and between halves of one class.

    One row per two classes: `class_a`, `class_b`, `estimate`, `low`, `high` (as in `rank_agreement`, but each class's
    quads are resampled on their own; NaN with fewer than stats.MINIMUM_CLUSTERS of either), `n_a`, `n_b` (quads), and
    `halves`: the mean correlation over random halves of the quads. With class_a = class_b the halves are
    disjoint and `estimate` is that mean, without an interval: the agreement that noise alone leaves. No Spearman-Brown
    correction is applied, so it lies below what two samples of full size would reach; `halves` of two classes compare
    like with like. Where a quad has sides of both classes, noise that they share raises their agreement a little.
    """
    stats.check(settings)
    values = {name: stats._matrix(matrix, name) for name, matrix in effects.items()}
    shapes = {name: matrix.shape for name, matrix in values.items()}
    if len({sites for _, sites in shapes.values()}) != 1 or min(sites for _, sites in shapes.values()) < 3:
        raise ValueError(f"agreement needs the same sites, at least 3, in all classes; got {shapes}")
    drawn, halves = {}, {}
    for number, (name, matrix) in enumerate(values.items()):
        n, rng = len(matrix), np.random.default_rng([settings.seed, 1, number])
        weights = stats.weights(n, matrix.shape[1], settings.resamples, [settings.seed, 0, number])
        drawn[name] = np.vstack([w @ matrix for w in weights]) if n >= stats.MINIMUM_CLUSTERS else None
        orders = rng.permuted(np.tile(np.arange(n), (SPLITS, 1)), axis=1)
        parts = (orders[:, : n // 2], orders[:, n // 2 : n // 2 * 2])
        halves[name] = [matrix[part].mean(1) if n > 1 else np.full((SPLITS, matrix.shape[1]), np.nan) for part in parts]
    rows = []
    for a, b in combinations_with_replacement(values, 2):
        between_halves = float(spearman(halves[a][0], halves[b][1]).mean())
        estimate, low, high = between_halves, np.nan, np.nan
        if a != b:
            estimate = float(spearman(values[a].mean(0)[None], values[b].mean(0)[None])[0])
            if drawn[a] is not None and drawn[b] is not None and not np.isnan(estimate):
                # z of 1 is infinite: clip half way between 1 and the largest correlation of ranks below it
                sites = values[a].shape[1]
                most = 1 - 6 / (sites * (sites**2 - 1))
                both = (spearman(drawn[a], drawn[b]), estimate)
                z, middle = (np.arctanh(np.clip(value, -most, most)) for value in both)
                degrees = min(len(values[a]), len(values[b])) - 1
                reach = reference.t.ppf((1 + settings.level) / 2, degrees) * np.nanstd(z)
                low, high = min(estimate, np.tanh(middle - reach)), max(estimate, np.tanh(middle + reach))
        rows.append((a, b, estimate, low, high, len(values[a]), len(values[b]), between_halves))
    return pd.DataFrame(rows, columns=["class_a", "class_b", "estimate", "low", "high", "n_a", "n_b", "halves"])
