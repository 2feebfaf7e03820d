"""How often the intervals of `lib.stats` cover the truth, and how often its tests and those between classes reject it.

    python -m bench.coverage            # about ten minutes on one core; writes bench/results/coverage.json
    python -m bench.coverage --trials 200 --out /dev/stdout

Every figure is a share of independent simulated experiments, nominally 0.95 (intervals) or 0.05 (tests);
`standard_error` says how far chance alone moves a figure of nominal value. The distributions are of one value per
quad: normal, Student's t of 3 degrees (heavy tails), and lognormal (skew). Beside each method stand others that could
take its place. `summary` leads: for each kind of figure the smallest and the largest over its cells, and in how many
of them an interval covers 93 to 97%, or a test rejects at most 5% plus 3 standard errors.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy
from scipy.stats import t as student

from lib import stats
from lib.stats import Settings
from report import site_tables
from steps.baselines.measure import p_above
from steps.generality import class_tests

OUT = Path(__file__).parent / "results" / "coverage.json"
LEVEL, RESAMPLES, FLIPS = 0.95, 999, 999
QUADS = (20, 50, 99)
BAND = (0.93, 0.97)
DRAWS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {  # all of mean 0
    "normal": lambda rng, shape: rng.normal(size=shape),
    "t3": lambda rng, shape: rng.standard_t(3, shape),
    "lognormal": lambda rng, shape: rng.lognormal(0, 1, shape) - np.exp(0.5),
}


def share(values: object) -> float:
    return round(float(np.mean(values)), 4)


def covered(intervals: list[stats.Interval], truth: float) -> float:
    return share([interval.low <= truth <= interval.high for interval in intervals])


def compared(rng: np.random.Generator, numerator: np.ndarray, denominator: np.ndarray, truth: float) -> dict:
    """Coverage of one ratio per column: the symmetric bootstrap-t of `lib.stats`, its equal-tailed form, the mean of
    the two forms' ends, and Student's t."""
    seed = int(rng.integers(2**31))
    settings = Settings(LEVEL, RESAMPLES, seed=seed)
    made = stats.ratio_intervals(numerator, denominator, settings)
    ratios = stats._Ratios.of(numerator, denominator)
    pivot = (ratios.estimate - truth) / ratios.error
    t = np.vstack(list(ratios.t_values(settings)))
    low, high = np.nanquantile(t, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    reach = np.nanquantile(np.abs(t), LEVEL, axis=0)
    fixed = student.ppf((1 + LEVEL) / 2, len(numerator) - 1)
    return {
        "bootstrap_t": covered(made, truth),
        "truth_below": share([truth < interval.low for interval in made]),
        "truth_above": share([truth > interval.high for interval in made]),
        "equal_tailed": share((low <= pivot) & (pivot <= high)),
        "mean_of_both": share(((low - reach) / 2 <= pivot) & (pivot <= (high + reach) / 2)),
        "student_t": share(np.abs(pivot) <= fixed),
        "reach_over_student": round(float(np.median(reach)) / fixed, 3),
    }


def intervals(rng: np.random.Generator, trials: int) -> list[dict]:
    """Means, and ratios of sums of one effect and one gap per quad."""
    rows = []
    for name, draw in DRAWS.items():
        for quads in QUADS:
            gap = rng.gamma(4, 1.5, (quads, trials))
            for kind, numerator, denominator, truth in (
                ("mean", draw(rng, (quads, trials)), np.ones((quads, 1)), 0.0),
                ("ratio", 0.3 * gap + draw(rng, (quads, trials)), gap, 0.3),
            ):
                found = compared(rng, numerator, denominator, truth)
                rows.append({"values": name, "statistic": kind, "quads": quads} | found)
    return rows


def clusters(rng: np.random.Generator, trials: int) -> list[dict]:
    """Ratios of sums over quads of 2 or 4 correlated pairs, added up per quad; "1-4": quads differ in their number."""
    rows = []
    for name, draw in DRAWS.items():
        for quads in QUADS:
            for pairs in ("2", "4", "1-4"):
                most = int(pairs[-1])
                gap = rng.gamma(4, 1.5, (quads, 1, trials)) * rng.gamma(9, 1 / 9, (quads, most, trials))
                effect = 0.3 * gap + draw(rng, (quads, 1, trials)) + draw(rng, (quads, most, trials))
                there = np.arange(most) < rng.integers(1 if pairs == "1-4" else most, most + 1, (quads, 1))
                effect, gap = ((values * there[..., None]).sum(1) for values in (effect, gap))
                rows.append({"values": name, "pairs": pairs, "quads": quads} | compared(rng, effect, gap, 0.3))
    return rows


def rows_or_quads(rng: np.random.Generator, trials: int) -> list[dict]:
    """What happens when the four pairs of a quad are taken for independent."""
    rows = []
    for name, draw in DRAWS.items():
        pairs = draw(rng, (50, 1, trials)) + draw(rng, (50, 4, trials)) / 2
        quads, single = pairs.mean(1), pairs.reshape(200, trials)
        level = {}
        for unit, values in (("quads", quads), ("pairs", single)):
            tests = [stats.max_t(values[:, [i]], Settings(flips=FLIPS, seed=i))[0] for i in range(min(trials, 1_000))]
            level[unit] = round(float(np.mean(np.array(tests) <= 0.05)), 4)
        rows.append({
            "values": name, "quads": 50, "pairs_per_quad": 4,
            "coverage_by_quads": covered(stats.mean_intervals(quads, Settings(LEVEL, RESAMPLES)), 0.0),
            "coverage_by_pairs": covered(stats.mean_intervals(single, Settings(LEVEL, RESAMPLES)), 0.0),
            "level_by_quads": level["quads"], "level_by_pairs": level["pairs"],
        })  # fmt: skip
    return rows


def families(rng: np.random.Generator, trials: int) -> list[dict]:
    """300 sites, independent or correlated: familywise coverage of the intervals, level of the sign flips, and of the
    mark that asks for both: p of the flips at most 5%, and zero outside the interval."""
    rows = []
    for name, draw in DRAWS.items():
        for quads in QUADS:
            for shared in (0.0, 1.0):
                tails = ("two-sided", "greater", "less")
                found: dict[str, list[bool]] = {name: [] for name in ("simultaneous", *tails, "marked")}
                for seed in range(trials):
                    matrix = draw(rng, (quads, 300)) + shared * draw(rng, (quads, 1))
                    settings = Settings(LEVEL, RESAMPLES, FLIPS, seed)
                    made = stats.simultaneous(matrix, settings)
                    found["simultaneous"].append(all(interval.low <= 0 <= interval.high for interval in made))
                    p = {tail: stats.max_t(matrix, settings, tail) for tail in tails}
                    for tail in tails:
                        found[tail].append(p[tail].min() <= 0.05)
                    off = np.array([interval.low > 0 or interval.high < 0 for interval in made])
                    found["marked"].append((off & (p["two-sided"] <= 0.05)).any())
                rows.append(
                    {"values": name, "sites": 300, "correlation": shared / 2, "quads": quads}
                    | {"symmetric_under_the_null": name != "lognormal"}
                    | {key: share(list_) for key, list_ in found.items()}
                )
    return rows


def proportions(rng: np.random.Generator, trials: int) -> list[dict]:
    """Quads of two trials with a common difficulty: Wilson on effective trials, and a cluster bootstrap."""
    rows, settings = [], Settings(LEVEL, RESAMPLES)
    for truth in (0.2, 0.5, 0.8, 0.95):
        for correlation in (0.0, 0.3, 0.8):
            size = 1 / correlation - 1 if correlation else None
            chance = rng.beta(truth * size, (1 - truth) * size, (50, trials)) if size else np.full((50, trials), truth)
            hits = rng.binomial(2, chance)
            two = np.full(50, 2)
            rows.append({
                "truth": truth, "correlation": correlation, "quads": 50,
                "wilson": covered([stats.proportion_interval(column, two, settings) for column in hits.T], truth),
                "bootstrap_t": covered(stats.ratio_intervals(hits.astype(float), two, settings), truth),
                "level_above_chance": round(
                    float(np.mean([p_above(column, two, truth) < 1 - LEVEL for column in hits.T])), 4
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

            expected = np.mean([site_tables.spearman(*(x.mean(0)[None] for x in draw()))[0] for _ in range(2_000)])
            made = [site_tables.rank_agreement(*draw(), Settings(LEVEL, 300, seed=seed)) for seed in range(trials)]
            rows.append({
                "noise": noise, "quads": quads, "sites": 50, "coverage": covered(made, expected),
                "true_effects": round(float(site_tables.spearman(means[None], other[None])[0]), 3),
                "expected": round(float(expected), 3),
            })  # fmt: skip
    return rows


def classes(rng: np.random.Generator, trials: int) -> list[dict]:
    """Agreement of two classes' rankings, of 9 and of 50 sites: coverage of what is expected with so many quads."""
    rows = []
    for sites in (9, 50):
        for noise in (0.5, 2.0):
            means = rng.standard_t(3, sites)
            other = 0.7 * means + 0.5 * rng.normal(size=sites)

            def draw(means=means, other=other, noise=noise, sites=sites) -> dict[str, np.ndarray]:
                shapes = {"a": (means, 40), "b": (other, 25)}
                return {key: m + noise * rng.standard_t(4, (n, sites)) for key, (m, n) in shapes.items()}

            def spearman(drawn: dict[str, np.ndarray]) -> float:
                return float(site_tables.spearman(*(x.mean(0)[None] for x in drawn.values()))[0])

            expected = np.mean([spearman(draw()) for _ in range(2_000)])
            made = [
                class_tests.between_classes(draw(), Settings(LEVEL, 300, seed=seed)).iloc[1] for seed in range(trials)
            ]
            rows.append({
                "sites": sites, "noise": noise, "quads": [40, 25], "expected": round(float(expected), 3),
                "coverage": share([row["low"] <= expected <= row["high"] for row in made]),
            })  # fmt: skip
    return rows


# how common the five classes are, and the spread of their effects
KINDS = {
    "equal classes": ((1, 1, 1, 1, 1), (1, 1, 1, 1, 1)),
    "one class 4 times as common": ((4, 1, 1, 1, 1), (1, 1, 1, 1, 1)),
    "one class 2 times as spread": ((1, 1, 1, 1, 1), (2, 1, 1, 1, 1)),
    "one class 3 times as spread": ((1, 1, 1, 1, 1), (3, 1, 1, 1, 1)),
    "the rarest class 2 times as spread": ((1, 3, 3, 3, 3), (2, 1, 1, 1, 1)),
    "four classes": ((1, 1, 1, 1), (1, 1, 1, 1)),
}


def interactions(rng: np.random.Generator, trials: int) -> list[dict]:
    """Two sides per quad, of two classes, with what they share; classes differ in scale. At one site the first class
    has `planted` more of its part of the gap, which is half of that of each pair it is in."""

    def rates(name: str, kind: str, quads: int, sites: int, planted: float) -> dict:
        draw, (common, spread) = DRAWS[name], KINDS[kind]
        size, profile = np.array(common) / sum(common), np.linspace(0.3, 0, sites)
        found = []
        for seed in range(trials):
            label = np.array([rng.choice(len(size), 2, replace=False, p=size) for _ in range(quads)])
            meetings = np.stack([label, label[:, ::-1]], axis=1).reshape(-1, 2)
            own, label = np.repeat((label == 0).any(1) / 2, 2), label.ravel()
            gap = np.repeat(rng.gamma(6, 1 / 6, quads), 2) * np.array([5, 2, 3, 3, 3])[meetings].mean(1)
            both = np.repeat(draw(rng, (quads, sites)), 2, axis=0) / 2
            noise = (draw(rng, (2 * quads, sites)) + both) * (0.1 * np.array(spread))[label][:, None]
            ratio = profile + planted * np.outer(own, np.arange(sites) == 1)
            given = gap[:, None] * (ratio + noise), gap, meetings.astype(str), np.repeat(np.arange(quads), 2)
            test = class_tests.interaction(*given, Settings(LEVEL, flips=199, seed=seed))
            found.append((test.p.min() <= 0.05, test.p[1] <= 0.05, test.p_overall <= 0.05))
        any_site, planted_site, overall = np.mean(found, axis=0).round(4).tolist()
        row = {"values": name, "kind": kind, "quads": quads, "sites": sites, "planted": planted}
        return row | {"any_site": any_site, "that_site": planted_site, "overall": overall}

    cells = [(name, kind, 99, 10, 0.0) for name in DRAWS for kind in list(KINDS)[:-1]]
    cells += [("t3", "equal classes", 50, 10, 0.0), ("t3", "four classes", 24, 4, 0.0)]
    cells += [("t3", "equal classes", quads, 10, planted) for quads in (50, 99) for planted in (0.2, 0.5)]
    cells += [("t3", "four classes", 24, 4, planted) for planted in (0.2, 0.5)]
    return [rates(*cell) for cell in cells]


def equivalences(rng: np.random.Generator, trials: int) -> list[dict]:
    """Margin of 0.5 standard deviations: how often one candidate, and five, pass. At the margin they should not."""
    rows = []
    for name, draw in DRAWS.items():
        for quads in QUADS:
            scale = 0.5 * {"normal": 1.0, "t3": np.sqrt(3), "lognormal": np.sqrt((np.e - 1) * np.e)}[name]
            candidates = [draw(rng, (quads, trials)) for _ in range(5)]

            def passed(shifts: tuple[float, ...], scale: float = scale, candidates: list = candidates) -> float:
                given = [values + shift * scale for values, shift in zip(candidates, shifts, strict=False)]
                p = np.stack([class_tests.equivalence(values, scale) for values in given])
                return share(p.max(0) < 1 - LEVEL)

            rows.append({
                "values": name, "quads": quads, "one_at_the_upper_margin": passed((1,)),
                "one_at_the_lower_margin": passed((-1,)), "five_one_at_the_margin": passed((1, 0, 0, 0, 0)),
                "five_without_effect": passed((0,) * 5),
            })  # fmt: skip
    return rows


# section -> (simulation, share of `trials` that it runs: families are 300 times as large)
SECTIONS = {
    "intervals": (intervals, 2.0),
    "clusters": (clusters, 1.0),
    "rows_or_quads": (rows_or_quads, 1.0),
    "families": (families, 0.25),
    "proportions": (proportions, 1.0),
    "agreement": (agreement, 0.1),
    "classes": (classes, 0.25),
    "interactions": (interactions, 0.05),
    "equivalences": (equivalences, 1.0),
}
# what -> sections, columns, nominal value; rows of planted effects stay out
FIGURES = {
    "interval of a mean or ratio of sums": ("intervals", ("bootstrap_t",), 0.95),
    "interval of a ratio, pairs added up per quad": ("clusters", ("bootstrap_t",), 0.95),
    "the same two with the mean of both forms' ends": ("intervals clusters", ("mean_of_both",), 0.95),
    "the same two with Student's t": ("intervals clusters", ("student_t",), 0.95),
    "intervals of 300 means together": ("families", ("simultaneous",), 0.95),
    "interval of a proportion": ("proportions", ("wilson",), 0.95),
    "interval of rank agreement of two ablations": ("agreement", ("coverage",), 0.95),
    "interval of rank agreement of two classes": ("classes", ("coverage",), 0.95),
    "max-T over 300 sites": ("families", ("two-sided", "greater", "less"), 0.05),
    "max-T over 300 sites and zero outside the interval": ("families", ("marked",), 0.05),
    "proportion above chance": ("proportions", ("level_above_chance",), 0.05),
    "class x site interaction, any site": ("interactions", ("any_site",), 0.05),
    "class x site interaction, overall": ("interactions", ("overall",), 0.05),
    "equivalence at the margin": (
        "equivalences", ("one_at_the_upper_margin", "one_at_the_lower_margin", "five_one_at_the_margin"), 0.05,
    ),
}  # fmt: skip


def summary(result: dict) -> list[dict]:
    """The smallest and the largest of each kind of figure, and how many cells are as they should be."""
    rows = []
    for figure, (sections, columns, nominal) in FIGURES.items():
        cells = [row for section in sections.split() for row in result[section]["rows"] if not row.get("planted")]
        error = max(result[section]["standard_error"] for section in sections.split())
        low, high = BAND if nominal == 0.95 else (0.0, round(0.05 + 3 * error, 4))
        for name in dict.fromkeys(row.get("values") for row in cells):
            values = [row[column] for row in cells if row.get("values") == name for column in columns]
            rows.append({
                "figure": figure, "values": name, "nominal": nominal, "from": min(values), "to": max(values),
                "standard_error": error, "band": f"{low}-{high}", "cells": len(values),
                "inside": sum(low <= value <= high for value in values),
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4_000, help="experiments per figure (families run fewer)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    machine = {
        "python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__,
        "cpu_count": os.cpu_count(),
    }  # fmt: skip
    settings = {"seed": given.seed, "level": LEVEL, "resamples": RESAMPLES, "flips": FLIPS}
    result: dict = {"summary": [], "machine": machine, "settings": settings}
    for number, (name, (simulate, part)) in enumerate(SECTIONS.items()):
        trials, start = max(20, int(given.trials * part)), time.perf_counter()
        rows = simulate(np.random.default_rng([given.seed, number]), trials)
        error, seconds = round(float(np.sqrt(0.95 * 0.05 / trials)), 4), round(time.perf_counter() - start, 1)
        result[name] = {"trials": trials, "standard_error": error, "seconds": seconds, "rows": rows}
        print(f"{name}: {seconds} s", flush=True)
    result["summary"] = summary(result)
    text = re.sub(r"\{[^{}]*\}", lambda row: " ".join(row[0].split()), json.dumps(result, indent=1))  # a row a line
    given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
