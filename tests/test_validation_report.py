"""The chapter on validation says what its JSON says, whatever that is."""

import json
from pathlib import Path

import pytest
from test_scores import TRUTH, found

from pipeline import keys, units
from report import validation

ROOT = Path(__file__).resolve().parent.parent
PLACE = {
    "machine": {"cores": 2, "cpu": "Some CPU", "memory_gb": 8.0, "gpus": [], "system": "Linux"},
    "versions": {"python": "3.11", "torch": "2.13.0", "transformers": "5.23.0"},
    "threads": 1,
    "commit": "0123456789",
    "dirty": False,
    "seconds": 600.0,
}


def answer(method: str, step: str, wanted: object, found: object, precision: float = 1, recall: float = 1) -> dict:
    number = not isinstance(wanted, list)
    own = {"method": method, "step": step, "wanted": wanted, "found": found}
    error = None if not number or found is None else found - wanted
    right = error is not None and abs(error) < 1e-3 if number else precision == recall == 1
    shares = {"precision": None, "recall": None} if number else {"precision": precision, "recall": recall}
    return own | shares | {"error": error, "right": right}


def run(group: str, seed: int, noise: float = 0.0, *answers: dict, series: bool = False, able: bool = True) -> dict:
    own = {"group": group, "seed": seed, "noise": noise, "series": series, "able": able, "seconds": {}}
    return own | {"spec": f"planted:seed={seed},noise={noise:g}", "scores": list(answers), "why": ""}


def measured() -> dict:
    good = answer("necessity", "necessity", ["3.2", "mlp 5"], ["3.2", "mlp 5"])
    bad = answer("necessity", "necessity", ["3.2", "mlp 5"], ["3.2", "6.1"], 0.5, 0.5)
    ratio = answer("backups, ratio", "hydra", 0.7, 0.7004)
    runs = [
        run("additive", 0, 0.0, good, ratio, series=True),
        run("or", 1, 0.0, bad, answer("backups, ratio", "hydra", 0.7, None)),
        run("additive", 0, 0.03, good, series=True),
        run("additive", 0, 0.1, bad, series=True),
        run("additive", 0, 0.3, series=True, able=False),
        run("random", 0, 0.0, answer("necessity", "necessity", [], []), able=False),
    ]
    return PLACE | {"code": keys.code("lib"), "planned": 6, "runs": runs}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "validation.json").write_text(json.dumps(measured()), encoding="utf-8")
    return tmp_path


def fields(folder: Path, own: Path = Path("nowhere")) -> dict[str, str]:
    return validation.fields(folder, folder / "to", own)


def test_the_tables_hold_the_scores(folder):
    made = fields(folder)
    assert "| necessity | 1 of 2 | 0.75 | 0.75 | – | 0.1 |" in made["methods"]
    assert "| backups, ratio | 1 of 2 | – | – | 0.0004 | above 0 |" in made["methods"]
    assert "| necessity | 1 / 1 | 0.5 / 0.5 |" in made["options"] and "| 0.0004 | none |" in made["options"]
    assert "| `planted:seed=1,noise=0` | necessity | mlp 5 | 6.1 |" in made["failures"]
    assert (
        "2 of 4 answers (50%)" in made["summary"]
        and "Not always right: backups, ratio and necessity" in made["summary"]
    )
    assert "From 0.3 on a model no longer does its task" in made["noise"]
    assert (folder / "to" / "figures" / "validation-noise.png").is_file()


def test_models_without_a_circuit_are_counted_by_step(folder):
    assert "None was found in them that is not there." in fields(folder)["nothing"]
    other = measured()
    other["runs"][-1]["scores"] = [answer("necessity", "necessity", [], ["1.1", "2.2"], 0)]
    (folder / "validation.json").write_text(json.dumps(other), encoding="utf-8")
    said = fields(folder)["nothing"]
    assert "2 items were found in them" in said and "| random | 1 | 0 | not run | 2 |" in said


def test_what_is_right_everywhere_is_said(folder):
    other = measured()
    other["runs"] = other["runs"][:1]
    other |= {"code": {"lib": "another"}, "planned": 9}
    (folder / "validation.json").write_text(json.dumps(other), encoding="utf-8")
    made = fields(folder)
    assert "Every method was right" in made["summary"] and made["failures"] == "None."
    assert "has changed since" in made["summary"] and "Still to run: 8 of 9" in made["summary"]
    assert made["nothing"] == ""


def test_what_is_not_measured_gives_its_command(tmp_path):
    made = validation.fields(tmp_path, tmp_path / "to", tmp_path)
    assert "make validation" in made.pop("summary") and set(made.values()) == {""}
    page = (ROOT / "book" / "validation.md").read_text(encoding="utf-8")
    assert all(f"${name}" in page for name in (*made, "summary"))


def test_faults_stand_with_their_checks(tmp_path):
    rows = [
        {"defect": "a hook that does not fire", "check": "single_pass.prove", "message": "fired 0 | not `1`"},
        {"defect": "positions off by one", "check": "", "message": ""},
    ]
    (tmp_path / "planted_faults.json").write_text(json.dumps(rows), encoding="utf-8")
    said = validation.fields(tmp_path, tmp_path / "to", tmp_path)["faults"]
    assert "1 of 2 do" in said and "`fired 0 \\| not '1'`" in said and "| positions off by one | **none** | – |" in said


def test_mutants_stand_by_module_with_those_that_live(tmp_path):
    lived = [{"change": "- a | b\n+ a & b", "why": "both are true"}]
    made = {"stats": {"killed": 29, "mutants": 548, "score": 0.967, "survivors": lived}}
    (tmp_path / "mutants.json").write_text(json.dumps(made), encoding="utf-8")
    said = fields(tmp_path)["faults"]
    assert "| `lib/stats.py` | 548 | 30 | 29 | 0.97 |" in said and "1 change that no fast test" in said
    assert "| `stats` | `- a \\| b + a & b` | both are true |" in said


def test_a_planted_book_has_its_truth_beside_its_findings(tmp_path):
    made = found() | {"baselines": {"model": {"sha256": "ab" * 32}, "able": {}}}
    made["necessity"]["sites"].pop(0)
    made["subspace"]["able"] = False  # its vectors are in a table
    units.write_json(tmp_path / "retrieval_heads.run.json", {"parameters": {}})
    for step, findings in made.items():
        units.write_json(tmp_path / ("claims.json" if step == "claims" else f"{step}.findings.json"), findings)
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH | {"sha256": "ab" * 32, "spec": "planted:seed=1"}))
    said = fields(tmp_path.parent, tmp_path)["beside"]
    assert (
        "| necessity | 3.2, 4.5, mlp 5 | 4.5, mlp 5 | **no** |" in said
        and "| rule | additive | additive | yes |" in said
    )
    assert "| 4.5 | retrieval | `last` | 4 | 4 |" in said
    units.write_json(tmp_path / "coarse_sweep.findings.json", {"able": False})
    assert "does not do its task, so nothing is scored" in fields(tmp_path.parent, tmp_path)["beside"]
