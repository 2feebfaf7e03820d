"""What `python -m steps run` does: which steps run again, in which order, and what a failure leaves.

Keys are real, on a copy of the code; executing a notebook and building the HTML are stand-ins that keep a log.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from lib import questions
from pipeline import keys, units
from report.book import BookError
from steps import __main__ as driver
from steps.registry import PLAN
from tests.test_keys import PAIRS, ROOT, append, begin, edit, house  # noqa: F401

PAGES = [PLAN.page(step) for step in PLAN.names]


@pytest.fixture
def project(house, monkeypatch):  # noqa: F811
    """The copy, with stand-ins; `project.log` has what was executed, `project.fail` what is to fail."""
    (house / "book").mkdir()
    (house / "book" / "index.md").write_text("prose")
    house_log, failing = [], set()

    def execute(build: driver.Build, step: str) -> None:
        house_log.append(step)
        if step in failing:
            raise BookError(f"step {step} failed")
        own = begin(step, {"profile": build.profile, "results_dir": str(build.results), "overwrite": True})
        if step == "baselines":
            own.write_extra("pairs.parquet", PAIRS)
        for kind in ("png", "svg"):
            drawn = build.results / f"figures/{step}-a.{kind}"
            drawn.parent.mkdir(exist_ok=True)
            drawn.write_text(step)
        able = {"superset": {"able": True, "why": "x"}} if step == "baselines" else True
        own.write_findings({"able": able, "figures": [{"file": f"figures/{step}-a.png"}]})
        page = build.page(step)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(PLAN.notebook(step).read_text())

    def make(folder) -> None:
        house_log.append("book")
        index = folder / "_build" / "html" / "index.html"
        index.parent.mkdir(parents=True, exist_ok=True)
        index.write_text("html")

    monkeypatch.setattr(driver, "execute", execute)
    monkeypatch.setattr(driver.book, "assemble", lambda *_: None)
    monkeypatch.setattr(driver.book, "build", make)

    class Project:
        folder, log, fail = house, house_log, failing

        def run(self, *arguments: str, status: int = 0) -> list[str]:
            house_log.clear()
            assert driver.main(["run", *arguments, "--profile", "smoke"], {}) == status
            return list(house_log)

    return Project()


def test_the_first_run_takes_every_step_in_order_and_ends_with_the_path(project, capsys):
    assert project.run() == [*PLAN.names, "book"]
    assert capsys.readouterr().out.splitlines()[-1] == "build/smoke/book/_build/html/index.html"


def test_the_second_run_does_nothing(project, capsys):
    project.run()
    capsys.readouterr()
    assert project.run() == []
    assert capsys.readouterr().out == "build/smoke/book/_build/html/index.html\n"


def test_one_step_takes_the_steps_before_it(project):
    assert project.run("coarse_sweep") == ["baselines", "coarse_sweep"]


@pytest.mark.parametrize("year", [1, 4_000_000_000], ids=["the past", "the future"])
def test_dates_mean_nothing(project, year):
    """A page dated in the future is no more up to date than another."""
    project.run()
    for path in project.folder.rglob("*"):
        os.utime(path, (year, year))
    assert project.run() == []
    edit(project.folder / "notebooks/03_necessity.ipynb", "A sentence.", "Another.")
    os.utime(project.folder / "notebooks/03_necessity.ipynb", (1, 1))
    assert project.run() == ["necessity", "book"]


def test_a_changed_page_of_the_book_builds_the_book_alone(project):
    project.run()
    append(project.folder / "book/index.md", "more")
    assert project.run() == ["book"]
    (project.folder / "book/new.md").write_text("new")
    assert project.run() == ["book"]
    (project.folder / "book/new.md").unlink()
    assert project.run() == ["book"]


def test_a_damaged_or_missing_page_is_made_again(project):
    project.run()
    append(project.folder / "build/smoke/executed/03_necessity.ipynb", " ")
    assert project.run() == ["necessity"]
    (project.folder / "build/smoke/keys/hydra.key").write_bytes(b"\xff\x00")
    assert project.run() == ["hydra"]
    (project.folder / "build/smoke/executed/04_sufficiency.ipynb").unlink()
    assert project.run() == ["sufficiency"]
    (project.folder / "build/smoke/book/_build/html/index.html").unlink()
    assert project.run() == ["book"]


def test_results_taken_away_are_made_again(project):
    project.run()
    (project.folder / "results/smoke/necessity.findings.json").unlink()
    assert "necessity" in project.run()
    shutil.rmtree(project.folder / "results")
    assert project.run()[:2] == ["baselines", "coarse_sweep"]


def test_a_failed_step_stops_and_goes_on_there(project, capsys):
    project.fail.add("necessity")
    assert project.run(status=1) == ["baselines", "coarse_sweep", "necessity"]
    assert capsys.readouterr().err == "error: step necessity failed\n"
    project.fail.clear()
    assert project.run()[0] == "necessity"


def test_a_failed_rerun_does_not_pass_for_up_to_date(project):
    project.run()
    text = (project.folder / "notebooks/03_necessity.ipynb").read_text()
    edit(project.folder / "notebooks/03_necessity.ipynb", "A sentence.", "Another.")
    project.fail.add("necessity")
    project.run(status=1)
    (project.folder / "notebooks/03_necessity.ipynb").write_text(text)  # undone: the old key again
    project.fail.clear()
    assert project.run() == ["necessity"]


def test_stale_results_are_set_aside_and_fresh_ones_are_not(project, capsys):
    project.run("baselines")
    folder = project.folder / "results/smoke"
    old = keys.stored_key(folder, "baselines")
    edit(project.folder / "params/smoke.yaml", "pairs_per_quad: 2", "pairs_per_quad: 1")
    assert project.run("baselines") == ["baselines"]
    assert f"set aside in results/smoke/stale/baselines-{old[:8]}" in capsys.readouterr().out
    aside = folder / "stale" / f"baselines-{old[:8]}"
    assert {path.name for path in aside.iterdir()} == {"baselines.run.json", "baselines.findings.json", "pairs.parquet"}


def test_unfinished_work_of_another_key_is_set_aside(project, capsys):
    project.run("baselines")
    folder = project.folder / "results/smoke"
    units.write_json(folder / "coarse_sweep.units/plan.json", {"data_key": "old", "ingredients": {"parameters": {}}})
    project.run("coarse_sweep")
    assert "coarse_sweep: results of other parameters, inputs or code set aside" in capsys.readouterr().out
    assert not (folder / "coarse_sweep.units").exists()


def test_a_profile_may_keep_its_results_anywhere(project, tmp_path_factory):
    """A space, a tilde or a dollar in the folder's name is a part of the name."""
    where = tmp_path_factory.mktemp("else") / "a b" / "~c $(touch x)"
    append(project.folder / "params/smoke.yaml", f"results_dir: '{where}'\n")
    project.run("coarse_sweep")
    assert (where / "coarse_sweep.run.json").is_file() and project.run("coarse_sweep") == []
    assert not list(project.folder.rglob("x"))


def test_cleaning_one_step_leaves_the_others(project, capsys):
    project.run("sufficiency")
    assert driver.main(["clean", "necessity", "--profile", "smoke"], {}) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "necessity: removed 2 result files from results/smoke"
    left = {path.name for path in (project.folder / "results/smoke").iterdir()}
    assert not any(name.startswith("necessity") for name in left) and "sufficiency.run.json" in left
    assert not (project.folder / "build/smoke/executed/03_necessity.ipynb").exists()
    assert project.run("sufficiency")[0] == "necessity"


def test_keys_are_printed(project, capsys):
    project.run("baselines")
    assert driver.main(["key", "necessity", "--profile", "smoke"], {}) == 0
    words = capsys.readouterr().out.split()[-4:]
    assert words[0] == "data" and words[2] == "page" and len(words[1]) == len(words[3]) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "necesity", "--profile", "smoke"], "did you mean 'necessity'?"),
        (["key", "necessity", "--profile", "smok"], "did you mean 'smoke'?"),
        (["key", "necessity", "--profile", "smoke"], "run 01_baselines first"),
        (["clean", "necessity", "--profile", "../lib"], "profile '../lib': a name has letters, digits, dots"),
        (["run", "--profile", ""], "profile '': a name has letters"),
        (["run", "--profile", "smoke /some/folder"], "a name has letters"),
    ],
)
def test_mistakes_are_one_line_and_exit_1(arguments, message, project, capsys):
    assert driver.main(arguments, {}) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (project.folder / "build").exists()


def test_a_page_is_cut_where_its_notebook_ended_itself(tmp_path):
    """Where the model cannot do the task, the first cell says so and stops; what was not run does not stay."""
    path = tmp_path / "page.ipynb"
    said = {"output_type": "display_data", "data": {"text/markdown": "Nothing was computed"}}
    ended = {"output_type": "error", "ename": "SystemExit", "evalue": "0", "traceback": []}
    cells = [{"cell_type": "markdown"}, {"cell_type": "code", "outputs": [said, ended]}, {"cell_type": "code"}]
    path.write_text(json.dumps({"cells": cells}))
    driver.cut_short(path)
    assert json.loads(path.read_text())["cells"] == [cells[0], {"cell_type": "code", "outputs": [said]}]


def test_a_failed_notebook_is_one_sentence(tmp_path):
    """The error that ended it, without papermill's traceback; where no cell failed, the last thing that was said."""
    path = tmp_path / "page.ipynb"
    error = {"output_type": "error", "ename": "StepError", "evalue": "no pairs\n  are left", "traceback": ["a"] * 57}
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown"}, {"cell_type": "code", "outputs": [error]}]}))
    said = f"StepError: no pairs are left (the notebook as far as it came, with the traceback: {path})"
    assert driver.reason(path, "Traceback\nPapermillExecutionError: x\n") == said
    path.write_text(json.dumps({"cells": []}))
    log = path.with_suffix(".log")
    assert driver.reason(path, "Traceback\n\nDeadKernelError: Kernel died\n") == (
        f"DeadKernelError: Kernel died (all that was said: {log})"
    )
    assert log.read_text().startswith("Traceback")


def test_a_page_that_the_disk_cut_short_is_no_traceback(tmp_path, monkeypatch):
    path = tmp_path / "page.ipynb"
    path.write_text('{"cells": [{"cell_ty')
    assert driver.reason(path, "OSError: no space\n").startswith("OSError: no space (all that was said: ")
    path.with_suffix(".log").unlink()
    path.with_suffix(".log").mkdir()
    assert driver.reason(path, "x").startswith("x (and what else was said could not be written down: ")


def test_a_notebook_that_is_none_is_one_sentence(project, capsys):
    (project.folder / "notebooks/03_necessity.ipynb").write_text('{"cells": [\n<<<<<<< HEAD')
    assert project.run(status=1) == ["baselines", "coarse_sweep"]
    error = capsys.readouterr().err
    assert error.startswith("error: notebooks/03_necessity.ipynb is not a notebook (") and error.count("\n") == 1


def test_what_of_a_question_is_edited_is_made_again(project):
    """Its title is the book's alone; its templates are in every step."""
    own = project.folder / "data/questions/mine"
    shutil.copytree(questions.FOLDER / questions.DEFAULT, own)
    for name in ("people.csv", "controls.csv", "sentences.csv"):  # a question is read with its tables
        shutil.copy(questions.FOLDER.parent / name, project.folder / "data")
    append(project.folder / "params/smoke.yaml", "question: data/questions/mine\n")
    assert project.run() == [*PLAN.names, "book"]
    edit(own / "question.yaml", "title: Where", "title: In which layer")
    assert project.run() == ["book"]
    edit(own / "question.yaml", "are both famous", "are famous")
    assert project.run() == [*PLAN.names, "book"]


def test_an_interruption_that_falls_into_a_callback_comes_again():
    """Python prints and forgets what a weak reference's callback raises."""
    script = """
import signal, sys, time, weakref
from steps.__main__ import tell_again
sys.unraisablehook = tell_again
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
class Thing: pass
def interrupted(_): raise KeyboardInterrupt
thing = Thing()
kept = weakref.ref(thing, interrupted)
del thing
try:
    time.sleep(5)
except KeyboardInterrupt:
    print("again")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("again\n", "")


def test_an_interruption_is_no_failure(project, capsys, monkeypatch):
    monkeypatch.setattr(driver, "execute", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert project.run(status=130) == []
    assert capsys.readouterr().err == "interrupted; what is done is kept; run the same command to go on\n"
