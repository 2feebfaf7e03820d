"""Tests between classes of prompts, and tests that an effect is nearly nothing.

1. `equivalence`: two one-sided t tests per column; a control is silent if every candidate's passes.
   `equivalence_power`: how probable that is at this size where there is nothing.
2. `interaction`: does a site's share of the effect differ between classes? A unit is one side of a quad, its class the
   answer there. Each unit's effects are centred over sites, so that a class in which everything is stronger makes no
   interaction; each class gets its ratio of sums; a site's statistic is the spread of its classes' ratios around their
   precision-weighted mean (Welch 1951); and the labels of whole quads change places.
3. `between_classes`: do two classes rank the sites alike, and as alike as two halves of one class do?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy import stats as reference

from lib import stats
from lib.stats import DEFAULTS, Settings
from report.site_tables import spearman

MINIMUM_UNITS = 10  # units of a class that takes part in the test of interaction
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

    ratios: pd.DataFrame  # class x site: sum(effects) / sum(gaps), all classes
    statistic: Float[np.ndarray, " sites"]  # of the classes with MINIMUM_UNITS units or more
    p: Float[np.ndarray, " sites"]  # familywise over sites (max-T); the smallest is 1 / permutations
    p_overall: float  # of the sum of the statistics over sites


def interaction(
    effects: Float[np.ndarray, "units sites"],
    gaps: ArrayLike,
    classes: Sequence[str],
    clusters: Sequence,
    permutations: int = 2_000,
    seed: int = 0,
) -> Interaction:
    """Permutation test of "the sites' ratios of sums differ between classes by no more than a constant per class".

    A unit is what one cluster (quad) has of one class: its summed effects (one per site) and its summed gap. The ratio
    is effect per unit of gap. Sites that do nothing pull a class's mean over sites towards 0, so give it the sites of
    a circuit rather than every site.

    Clusters with equally many units exchange their sets of labels, and the units of a cluster exchange labels among
    themselves, so what a quad's two sides share stays with them. Gaps are first scaled to mean 1 per class, and ratios,
    errors and weights are computed anew each time: by permutation, a test of plain means is off where classes differ in
    spread and size, the studentised statistic is right in the limit (Pauly, Brunner and Konietschke 2015). The p values
    of sites are single-step (Westfall and Young 1993). By `bench/coverage.py`, the nominal 5% is 4 to 7% over a
    circuit's sites where classes differ in size or spread, 8 to 11% where effects are lognormal as well; over all 300
    sites of a real model, most of them silent but for a few quads, it was 37 to 70%.

    ValueError for shapes that do not match, a cluster with two units of one class, gaps of a class that do not add up
    to more than 0, and fewer than 2 classes with MINIMUM_UNITS units.
    """
    values, gap = stats._matrix(effects, "effects"), np.asarray(gaps, dtype=float)
    names, label = np.unique(np.asarray(classes, dtype=str), return_inverse=True)
    cluster = pd.factorize(np.asarray(clusters))[0]
    _check_units(values, gap, label, cluster, permutations)
    onehot = np.eye(len(names))[label]
    units, totals = onehot.sum(0), onehot.T @ gap
    if not (totals > 0).all():
        raise ValueError(f"the gaps of {', '.join(names[~(totals > 0)])} do not add up to more than 0: no ratio")
    ratios = pd.DataFrame((onehot.T @ values) / totals[:, None], index=pd.Index(names, name="class"))
    enough = units >= MINIMUM_UNITS
    if enough.sum() < 2:
        counts = ", ".join(f"{name} {count:.0f}" for name, count in zip(names, units, strict=True))
        raise ValueError(f"an interaction needs 2 classes with {MINIMUM_UNITS} units or more; got {counts}")
    used = enough[label]
    scale = (totals / units)[label[used]]
    centred = (values - values.mean(1, keepdims=True))[used] / scale[:, None]
    kept = np.searchsorted(np.flatnonzero(enough), label[used])
    drawn = _labels(kept, cluster[used], permutations, centred.shape[1], seed)
    return Interaction(ratios, *_permuted(centred, gap[used] / scale, drawn))


def _check_units(
    values: np.ndarray, gap: np.ndarray, label: np.ndarray, cluster: np.ndarray, permutations: int
) -> None:
    """ValueError where the units do not fit together."""
    if not len(values) == gap.size == len(label) == len(cluster) or gap.ndim != 1:
        raise ValueError(f"need a gap, a class and a cluster per unit; got {gap.shape}, {len(label)}, {len(cluster)}")
    if len(set(zip(cluster, label, strict=True))) < len(label):
        raise ValueError("a cluster has two units of one class; add up their effects and gaps first")
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1; got {permutations}")


def _permuted(
    effects: Float[np.ndarray, "units sites"],
    gaps: Float[np.ndarray, " units"],
    labels: Iterator[Int[np.ndarray, "chunk units"]],
) -> tuple[Float[np.ndarray, " sites"], Float[np.ndarray, " sites"], float]:
    """The observed statistic (of the first labels), its familywise p, and the p of its sum over sites."""
    floor = stats.ZERO * (effects**2).sum(0) / len(effects) ** 2
    observed, largest, total, count = None, 0, 0, 0
    for chunk in labels:
        spread = _spread(np.eye(chunk.max() + 1)[chunk].swapaxes(1, 2), effects, gaps, floor)
        observed = spread[0] if observed is None else observed
        # what is equal up to rounding counts as reaching the observed value: the identity must count itself
        reached = observed * (1 - 1e-9)
        largest = largest + len(chunk) - np.searchsorted(np.sort(spread.max(1)), reached)
        total += int((spread.sum(1) >= reached.sum()).sum())
        count += len(chunk)
    return observed, largest / count, total / count


def _labels(
    label: Int[np.ndarray, " units"], cluster: Int[np.ndarray, " units"], total: int, sites: int, seed: int
) -> Iterator[Int[np.ndarray, "chunk units"]]:
    """Labels as observed, then permuted: clusters of one size exchange sets of labels, in random order within each."""
    rng = np.random.default_rng(seed)
    order = np.argsort(cluster, kind="stable")
    sizes = np.bincount(cluster)[cluster[order]]
    blocks = [order[sizes == size].reshape(-1, size) for size in np.unique(sizes)]
    step = max(1, stats.CHUNK // ((int(label.max()) + 1) * max(len(label), sites)))
    for start in range(0, total, step):
        out = np.tile(label, (min(step, total - start), 1))
        for row in out[start == 0 :]:
            for block in blocks:
                row[block] = rng.permuted(label[rng.permutation(block)], axis=1)
        yield out


def _spread(
    member: Float[np.ndarray, "chunk classes units"],
    effects: Float[np.ndarray, "units sites"],
    gaps: Float[np.ndarray, " units"],
    floor: Float[np.ndarray, " sites"],
) -> Float[np.ndarray, "chunk sites"]:
    """Sum over classes of (ratio - weighted mean of ratios)^2 / error^2, the weights being 1 / error^2.

    A class without spread at a site (an error below `floor`) has no weight there; a relabelled class whose gaps do not
    add up to more than 0 counts as infinitely far out.
    """
    n, total = member.sum(2)[..., None], (member @ gaps)[..., None]
    total = np.where(total > 0, total, np.nan)
    ratio = (member @ effects) / total
    squares = member @ effects**2 + ratio * (
        ratio * (member @ gaps**2)[..., None] - 2 * (member @ (effects.T * gaps).T)
    )
    variance = squares / total**2 * (n / (n - 1))
    weight = np.divide(1.0, variance, out=np.zeros_like(variance), where=~(variance <= floor))
    middle = (weight * ratio).sum(1, keepdims=True) / np.maximum(weight.sum(1, keepdims=True), 1e-300)
    return np.nan_to_num((weight * (ratio - middle) ** 2).sum(1), nan=np.inf)


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
