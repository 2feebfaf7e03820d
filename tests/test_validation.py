"""The bench of planted circuits: what it plans, what it runs of a notebook, and that it goes on where it was."""

import json

import pytest

from bench import validation
from pipeline import params
from planted.options import parse
from report.validation import HELD_OUT, NOTHING
from steps.registry import PLAN


def test_the_plan_has_the_seeds_options_and_noise_that_are_promised():
    runs = validation.plan()
    circuits = [run for run in runs if run.group not in NOTHING]
    assert len({run.seed for run in circuits}) == validation.SEEDS >= 20
    assert {run.group for run in circuits if not run.noise} == set(validation.OPTIONS)
    assert all(run.seed >= HELD_OUT for run in runs)
    assert {run.noise for run in runs if run.series} == {0, *validation.NOISES}
    assert {run.group for run in runs} >= set(NOTHING)
    assert len({run.spec for run in runs}) == len(runs)
    for run in runs:
        assert parse(run.spec).seed == run.seed  # every spec is one that can be planted


@pytest.mark.parametrize("step", PLAN.names)
def test_of_a_notebook_all_is_run_up_to_its_findings(step):
    code = list(validation.cells(step))
    assert f'begin("{step}", globals())' in code[0] and "measure.run(step)" in "".join(code)
    assert "found = page.findings(" in code[-1]


def scored(run: validation.Run) -> dict:
    return run._asdict() | {"spec": run.spec, "seconds": {"a": 1.0}, "able": True, "why": "", "scores": []}


@pytest.fixture
def three(tmp_path, monkeypatch):
    """Three models to measure, and a file of its own."""
    runs = validation.plan()[:3]
    monkeypatch.setattr(validation, "RESULT", tmp_path / "validation.json")
    monkeypatch.setattr(validation, "plan", lambda: runs)
    monkeypatch.setattr("sys.argv", ["validation"])
    return runs


def test_a_run_that_was_stopped_goes_on(three, monkeypatch):
    made = []

    def measure(run):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(run.spec)
        return scored(run)

    monkeypatch.setattr(validation, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        validation.main()
    found = json.loads(validation.RESULT.read_text())
    assert len(found["runs"]) == 2 and found["planned"] == 3
    first = made.copy()
    made.clear()
    validation.main()
    assert made == [run.spec for run in three if run.spec not in first] and len(made) == 1
    found = json.loads(validation.RESULT.read_text())
    assert [run["spec"] for run in found["runs"]] == [run.spec for run in three] and found["seconds"] == 3


def test_what_other_code_has_measured_is_measured_again(three, monkeypatch):
    old = scored(three[0]) | {"seconds": {"a": 9.0}}
    validation.RESULT.write_text(json.dumps({"code": {"lib": "another"}, "runs": [old]}))
    monkeypatch.setattr(validation, "measure", scored)
    validation.main()
    assert json.loads(validation.RESULT.read_text())["seconds"] == 3


@pytest.mark.parametrize("group", ["additive", "class only"])
def test_every_step_takes_the_parameters_that_models_are_run_with(group, tmp_path):
    run = validation.Run(group, validation.OPTIONS[group], 0)
    given = validation.parameters(run, str(tmp_path))
    for step in PLAN.names:
        own = params.validate(PLAN.sections, step, given)
        assert own.model == run.spec and own.results_dir == str(tmp_path)
        assert all(getattr(own, key) == value for key, value in validation.LESS.items() if not isinstance(value, dict))
