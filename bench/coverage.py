"""How often the intervals of `lib.stats` cover the truth, and how often its tests reject what is true.

    python -m bench.coverage            # a few minutes on one core; writes bench/results/coverage.json
    python -m bench.coverage --trials 200 --out /dev/stdout

Every figure is a share of independent simulated experiments, nominally 0.95 (intervals) or 0.05 (tests);
`standard_error` says how far chance alone moves a figure of nominal value. The distributions are of one value per
quad: normal, Student's t of 3 degrees (heavy tails), and lognormal (skew). Beside each method stand the ones it was
preferred to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy
from scipy.stats import t as student

from lib import stats

OUT = Path(__file__).parent / "results" / "coverage.json"
LEVEL, RESAMPLES, FLIPS = 0.95, 999, 999
QUADS = (20, 50, 100)
DRAWS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {  # all of mean 0
    "normal": lambda rng, shape: rng.normal(size=shape),
    "t3": lambda rng, shape: rng.standard_t(3, shape),
    "lognormal": lambda rng, shape: rng.lognormal(0, 1, shape) - np.exp(0.5),
}


def covered(intervals: list[stats.Interval], truth: float) -> float:
    return round(float(np.mean([interval.low <= truth <= interval.high for interval in intervals])), 4)


def intervals(rng: np.random.Generator, trials: int) -> list[dict]:
    """Means and ratios of sums: the symmetric bootstrap-t, its equal-tailed form, and Student's t."""
    rows = []
    for name, draw in DRAWS.items():
        for quads in QUADS:
            gap = rng.gamma(4, 1.5, (quads, trials))
            for kind, numerator, denominator, truth in (
                ("mean", draw(rng, (quads, trials)), np.ones((quads, 1)), 0.0),
                ("ratio", 0.3 * gap + draw(rng, (quads, trials)), gap, 0.3),
            ):
                seed = int(rng.integers(2**31))
                made = stats.ratio_intervals(numerator, denominator, LEVEL, RESAMPLES, seed)
                ratios = stats._Ratios.of(numerator, denominator)
                pivot = (ratios.estimate - truth) / ratios.error
                t = np.vstack(list(ratios.t_values(RESAMPLES, seed)))
                low, high = np.nanquantile(t, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
                rows.append({
                    "values": name, "statistic": kind, "quads": quads, "bootstrap_t": covered(made, truth),
                    "truth_below": round(float(np.mean([truth < interval.low for interval in made])), 4),
                    "truth_above": round(float(np.mean([truth > interval.high for interval in made])), 4),
                    "equal_tailed": round(float(np.mean((low <= pivot) & (pivot <= high))), 4),
                    "student_t": round(float(np.mean(np.abs(pivot) <= student.ppf((1 + LEVEL) / 2, quads - 1))), 4),
                })  # fmt: skip
    return rows


def rows_or_quads(rng: np.random.Generator, trials: int) -> list[dict]:
    """What happens when the four pairs of a quad are taken for independent."""
    rows = []
    for name, draw in DRAWS.items():
        pairs = draw(rng, (50, 1, trials)) + draw(rng, (50, 4, trials)) / 2
        quads, single = pairs.mean(1), pairs.reshape(200, trials)
        level = {}
        for unit, values in (("quads", quads), ("pairs", single)):
            tests = [stats.max_t(values[:, [i]], FLIPS, seed=i).p[0] for i in range(min(trials, 1_000))]
            level[unit] = round(float(np.mean(np.array(tests) <= 0.05)), 4)
        rows.append({
            "values": name, "quads": 50, "pairs_per_quad": 4,
            "coverage_by_quads": covered(stats.mean_intervals(quads, LEVEL, RESAMPLES), 0.0),
            "coverage_by_pairs": covered(stats.mean_intervals(single, LEVEL, RESAMPLES), 0.0),
            "level_by_quads": level["quads"], "level_by_pairs": level["pairs"],
        })  # fmt: skip
    return rows


def families(rng: np.random.Generator, trials: int) -> list[dict]:
    """200 correlated sites: familywise coverage of the intervals, and familywise level of the sign flips."""
    rows = []
    for name, draw in DRAWS.items():
        for quads in QUADS:
            together, rejected = [], {"two-sided": [], "greater": [], "less": []}
            for seed in range(trials):
                matrix = draw(rng, (quads, 200)) + draw(rng, (quads, 1))
                made = stats.simultaneous(matrix, LEVEL, RESAMPLES, seed)
                together.append(all(interval.low <= 0 <= interval.high for interval in made))
                for tail, list_ in rejected.items():
                    list_.append(stats.max_t(matrix, FLIPS, seed, tail).p.min() <= 0.05)
            rows.append({
                "values": name, "sites": 200, "quads": quads, "simultaneous": round(float(np.mean(together)), 4),
                "symmetric_under_the_null": name != "lognormal",
                "max_t": {tail: round(float(np.mean(list_)), 4) for tail, list_ in rejected.items()},
            })  # fmt: skip
    return rows


def proportions(rng: np.random.Generator, trials: int) -> list[dict]:
    """Quads of two trials with a common difficulty: Wilson on effective trials, and a cluster bootstrap."""
    rows = []
    for truth in (0.2, 0.5, 0.8, 0.95):
        for correlation in (0.0, 0.3, 0.8):
            size = 1 / correlation - 1 if correlation else None
            chance = rng.beta(truth * size, (1 - truth) * size, (50, trials)) if size else np.full((50, trials), truth)
            hits = rng.binomial(2, chance)
            two = np.full(50, 2)
            rows.append({
                "truth": truth, "correlation": correlation, "quads": 50,
                "wilson": covered([stats.proportion_interval(column, two, LEVEL) for column in hits.T], truth),
                "bootstrap_t": covered(stats.ratio_intervals(hits.astype(float), two, LEVEL, RESAMPLES), truth),
                "level_above_chance": round(
                    float(np.mean([stats.above_chance(column, two, truth).above for column in hits.T])), 4
                ),
            })  # fmt: skip
    return rows


def agreement(rng: np.random.Generator, trials: int) -> list[dict]:
    """Spearman's correlation of 50 sites under two ablations: coverage of the value expected with so many quads."""
    rows = []
    for noise in (0.5, 2.0):
        for quads in (50, 100):
            means = rng.standard_t(3, 50)
            other = 0.7 * means + 0.5 * rng.normal(size=50)

            def draw(means=means, other=other, noise=noise, quads=quads) -> tuple[np.ndarray, np.ndarray]:
                shared = rng.standard_t(4, (quads, 1))
                one, two = (m + noise * (rng.normal(size=(quads, 50)) + shared / 2) for m in (means, other))
                return one, two

            expected = np.mean([stats._spearman(*(x.mean(0)[None] for x in draw()))[0] for _ in range(2_000)])
            made = [stats.rank_agreement(*draw(), LEVEL, 300, seed) for seed in range(trials)]
            rows.append({
                "noise": noise, "quads": quads, "sites": 50, "coverage": covered(made, expected),
                "true_effects": round(float(stats._spearman(means[None], other[None])[0]), 3),
                "expected": round(float(expected), 3),
            })  # fmt: skip
    return rows


# section -> (simulation, share of `trials` that it runs: families are 200 times as large)
SECTIONS = {
    "intervals": (intervals, 1.0),
    "rows_or_quads": (rows_or_quads, 1.0),
    "families": (families, 0.25),
    "proportions": (proportions, 1.0),
    "agreement": (agreement, 0.1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4_000, help="experiments per figure (families run fewer)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    result = {
        "machine": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "cpu_count": os.cpu_count(),
        },
        "settings": {"seed": given.seed, "level": LEVEL, "resamples": RESAMPLES, "flips": FLIPS},
    }
    for number, (name, (simulate, part)) in enumerate(SECTIONS.items()):
        trials, start = max(20, int(given.trials * part)), time.perf_counter()
        rows = simulate(np.random.default_rng([given.seed, number]), trials)
        result[name] = {
            "trials": trials,
            "standard_error": round(float(np.sqrt(0.95 * 0.05 / trials)), 4),
            "seconds": round(time.perf_counter() - start, 1),
            "rows": rows,
        }
        print(f"{name}: {result[name]['seconds']} s", flush=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
