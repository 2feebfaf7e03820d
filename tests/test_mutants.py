"""Mutants of lib: the committed table is whole and explained, and of a sample tried again tests notice most."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "bench/results/mutants.json"


def scores(path: Path) -> dict[str, float]:
    """The share of mutants that were killed, by module."""
    found = json.loads(path.read_text(encoding="utf-8"))
    for own in found.values():
        assert own["killed"] + len(own["survivors"]) == own["tried"] and own["killed"] <= own["mutants"]
        assert own["score"] == pytest.approx(own["killed"] / own["tried"], abs=1e-3)
    return {name: own["score"] for name, own in found.items()}


def test_every_survivor_of_the_committed_table_is_explained():
    assert set(scores(TABLE)) == {"metrics", "stats", "effects", "single_pass", "sweep", "paths"}
    found = json.loads(TABLE.read_text(encoding="utf-8"))
    silent = [own["change"] for module in found.values() for own in module["survivors"] if not own["why"]]
    assert not silent, silent


@pytest.mark.long
def test_most_mutants_are_noticed(tmp_path):
    """Which mutants are tried changes with the code: 30 of each module, of which three in five at least."""
    command = [sys.executable, "-m", "bench.mutants", "--to", str(tmp_path / "mutants.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = scores(tmp_path / "mutants.json")
    assert len(found) == 6 and min(found.values()) >= 0.6, (tmp_path / "mutants.json").read_text()
