"""Which check stops which planted defect, and in what words: what tests/test_planted_faults.py found, as a table.

    python -m bench.planted_faults

Runs those tests, the long ones on the bundled model among them, and writes bench/results/planted_faults.json: a list
of {defect, check, message}. Nothing is written if a defect was not stopped.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.units import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "planted_faults.json"


class Table:
    """A pytest plugin that keeps the lines which tests record."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.rows += [row for name, row in report.user_properties if name == "planted"]


def main() -> None:
    table = Table()
    tests = ROOT / "tests" / "test_planted_faults.py"
    if status := pytest.main(["-q", str(tests), "-k", "not committed"], plugins=[table]):
        raise SystemExit(status)
    write_json(RESULT, sorted(table.rows, key=lambda row: row["defect"]))
    print(f"{len(table.rows)} defects, each stopped by a check: {RESULT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
