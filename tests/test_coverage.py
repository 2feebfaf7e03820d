"""The committed figures of coverage and level: complete, and what their summary says follows from their rows."""

import json

import numpy as np
import pytest

from bench import coverage

RESULT = json.loads(coverage.OUT.read_text(encoding="utf-8"))


def test_the_summary_follows_from_the_rows():
    assert list(RESULT)[0] == "summary" and set(coverage.SECTIONS) < set(RESULT)
    assert coverage.summary(RESULT) == RESULT["summary"]


def test_intervals_of_heavy_tailed_effects_cover():
    """93 to 97%, within 2 standard errors, for means and ratios, one to four pairs per quad, 20 to 99 quads."""
    figures = [row for row in RESULT["summary"] if row["values"] == "t3" and row["figure"].startswith("interval of a")]
    assert sum(row["cells"] for row in figures) == 15
    for row in figures:
        assert row["from"] >= 0.93 - 2 * row["standard_error"] and row["to"] <= 0.97 + 2 * row["standard_error"]


def test_tests_hold_their_level_where_effects_are_symmetric():
    figures = [row for row in RESULT["summary"] if row["figure"].startswith(("max-T", "equivalence"))]
    kept = [row for row in figures if row["values"] in ("normal", "t3")]
    assert len(kept) == 6 and all(row["inside"] == row["cells"] for row in kept)


def test_a_mark_that_asks_for_both_is_no_looser_than_either_under_skew():
    (mark,) = [
        row
        for row in RESULT["summary"]
        if "zero outside the interval" in row["figure"] and row["values"] == "lognormal"
    ]
    assert mark["to"] <= 0.05 + 3 * mark["standard_error"], mark
    for row in RESULT["families"]["rows"]:
        assert row["marked"] <= min(row["two-sided"], 1 - row["simultaneous"]) + 1e-9


def test_the_methods_compared_agree_where_theory_says_so():
    """Normal values, 99 of them: all forms are Student's t up to the bootstrap's error."""
    rng = np.random.default_rng(0)
    found = coverage.compared(rng, rng.normal(size=(99, 1_000)), np.ones((99, 1)), 0.0)
    for form in ("bootstrap_t", "equal_tailed", "mean_of_both", "student_t"):
        assert found[form] == pytest.approx(0.95, abs=0.03)
    assert found["truth_below"] + found["truth_above"] == pytest.approx(1 - found["bootstrap_t"], abs=1e-4)
    assert found["reach_over_student"] == pytest.approx(1, abs=0.02)
