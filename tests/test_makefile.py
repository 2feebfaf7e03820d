"""The Makefile's dependency graph, with a stand-in for Python that writes keys and pages and keeps a log."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("baselines", "coarse_sweep", "necessity", "sufficiency")
PAGES = tuple(f"{i:02}_{step}" for i, step in enumerate(STEPS, 1))
# `python -m pipeline.keys STEP --profile P --output FILE`: the key is the content of the file wanted/STEP.
# `python -m papermill IN OUT -f params/P.yaml ...`: fails after having written OUT if the file fail/NN_STEP is there.
STAND_IN = """#!/usr/bin/env bash
set -eu
case "$2" in
pipeline.keys) if [ "$6" = --clean ]; then rm results/$5/$3.*; exit; fi
    echo "key $3" >> log; cmp -s "wanted/$3" "$7" || cp "wanted/$3" "$7" ;;
papermill) name=$(basename "$3" .ipynb); echo "page $name" >> log; cp "$3" "$4"
    if [ -e "fail/$name" ]; then echo "ValueError: no" >&2; exit 1; fi
    to=$(sed -n 's/results_dir: \\([^ ]*\\).*/\\1/p' "$6"); to=${to:-results/$(basename "$6" .yaml)}
    mkdir -p "$to"; touch "$to/${name#*_}.run.json" ;;
report.book) echo book >> log; echo noise; mkdir -p "build/$4/book"
    echo _build/html/index.html > "build/$4/book/.stamp" ;;
-) ;;
*) echo "$*" >> log ;;
esac
"""


class Project:
    """A copy of the Makefile with empty notebooks, run with the stand-in."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        for name in ("notebooks", "params", "book", "lib", "report", "wanted", "fail"):
            (folder / name).mkdir()
        for page, step in zip(PAGES, STEPS, strict=True):
            (folder / "notebooks" / f"{page}.ipynb").write_text("{}")
            (folder / "wanted" / step).write_text("1")
        for path in ("params/smollm2-135m.yaml", "params/smoke.yaml", "book/index.md", "report/book.py", "log"):
            (folder / path).touch()
        (folder / "python").write_text(STAND_IN)
        (folder / "python").chmod(0o755)

    def make(self, *arguments: str, status: int = 0, **variables: str) -> tuple[list[str], subprocess.CompletedProcess]:
        """Run make; returns (what the stand-in was asked for, the finished process)."""
        (self.folder / "log").write_text("")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("CONDA", "MAKE", "MFLAGS", "PROFILE", "PY"))}
        python = () if variables else ("PY=./python",)
        done = subprocess.run(
            ["make", *arguments, *python], cwd=self.folder, capture_output=True, text=True, env=clean | variables
        )
        time.sleep(0.05)  # dates of files have ticks of some ms; what a test changes next must be later than this run
        assert done.returncode == status, done.stdout + done.stderr
        return (self.folder / "log").read_text().splitlines(), done

    def path(self, name: str) -> Path:
        return self.folder / "build" / "smollm2-135m" / name


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture
def built(project):
    project.make("book")
    return project


def executed(log: list[str]) -> list[str]:
    return [line for line in log if not line.startswith("key")]


def test_the_first_run_takes_every_step_in_order_and_ends_with_the_path(project):
    log, done = project.make("book")
    wanted = [line for page, step in zip(PAGES, STEPS, strict=True) for line in (f"key {step}", f"page {page}")]
    assert log == [*wanted, "book"]
    assert done.stdout.splitlines()[-1] == "build/smollm2-135m/book/_build/html/index.html"
    assert done.stdout.count("index.html") == 1 and "noise" not in done.stdout


def test_the_second_run_only_asks_for_keys(built):
    log, done = built.make("book")
    assert log == [f"key {step}" for step in STEPS]
    assert done.stdout.splitlines() == ["build/smollm2-135m/book/_build/html/index.html"]


def test_a_changed_key_reruns_its_step_and_the_book_alone(built):
    (built.folder / "wanted" / "coarse_sweep").write_text("2")
    log, _ = built.make("book")
    assert executed(log) == ["page 02_coarse_sweep", "book"]
    # the later keys are read after the new page, because they cover its findings
    assert log.index("page 02_coarse_sweep") < log.index("key necessity")
    assert executed(built.make("book")[0]) == []


def test_a_date_alone_reruns_nothing(built):
    for name in ("notebooks/03_necessity.ipynb", "params/smollm2-135m.yaml"):
        os.utime(built.folder / name)
    assert executed(built.make("book")[0]) == []


@pytest.mark.parametrize("change", ["book/index.md", "book/new.md", "report/book.py"])
def test_a_changed_page_of_the_book_builds_the_book_alone(built, change):
    (built.folder / change).write_text("new")
    assert executed(built.make("book")[0]) == ["book"]


def test_a_page_taken_away_builds_the_book(project):
    (project.folder / "book" / "extra.md").touch()
    project.make("book")
    (project.folder / "book" / "extra.md").unlink()
    assert executed(project.make("book")[0]) == ["book"]


def test_a_failed_step_leaves_no_page_and_is_kept_for_a_look(project):
    (project.folder / "fail" / "03_necessity").touch()
    log, done = project.make("book", status=2)
    assert log[-1] == "page 03_necessity"
    assert "build/smollm2-135m/failed/03_necessity.ipynb" in done.stderr
    assert project.path("failed/03_necessity.ipynb").exists()
    assert sorted(p.name for p in project.path("executed").iterdir()) == ["01_baselines.ipynb", "02_coarse_sweep.ipynb"]
    assert not list(project.path("running").iterdir()) and not project.path("book").exists()

    (project.folder / "fail" / "03_necessity").unlink()
    log, _ = project.make("book")
    assert executed(log) == ["page 03_necessity", "page 04_sufficiency", "book"]
    assert not list(project.path("failed").iterdir())


def test_a_failed_rerun_keeps_the_last_page_but_does_not_pass_for_up_to_date(built):
    (built.folder / "wanted" / "necessity").write_text("2")
    (built.folder / "fail" / "03_necessity").touch()
    built.make("book", status=2)
    (built.folder / "fail" / "03_necessity").unlink()
    assert executed(built.make("book")[0]) == ["page 03_necessity", "book"]


def test_one_step_takes_the_steps_before_it(project):
    assert executed(project.make("step-coarse_sweep")[0]) == ["page 01_baselines", "page 02_coarse_sweep"]


def test_clean_step(built):
    results = built.folder / "results" / "smollm2-135m"
    built.make("clean-necessity")
    assert sorted(path.name for path in results.iterdir()) == [
        f"{s}.run.json" for s in sorted(STEPS) if s != "necessity"
    ]
    assert not built.path("executed/03_necessity.ipynb").exists()
    assert executed(built.make("book")[0]) == ["page 03_necessity", "book"]


def test_results_taken_away_are_made_again(built):
    shutil.rmtree(built.folder / "results")
    assert executed(built.make("book")[0]) == [*(f"page {page}" for page in PAGES), "book"]


def test_a_profile_may_keep_its_results_elsewhere(project):
    (project.folder / "params" / "smoke.yaml").write_text("results_dir: elsewhere  # here\n")
    project.make("book", "PROFILE=smoke")
    assert (project.folder / "elsewhere" / "necessity.run.json").exists()
    assert executed(project.make("book", "PROFILE=smoke")[0]) == []


def test_clean_leaves_the_results(built):
    built.make("clean")
    assert (built.folder / "results" / "smollm2-135m").exists() and not built.path("").exists()


def test_profiles_do_not_share_pages(built):
    assert executed(built.make("book", "PROFILE=smoke")[0])[-1] == "book"
    assert (built.folder / "build/smoke/executed/04_sufficiency.ipynb").exists()
    assert executed(built.make("book")[0]) == []


def test_an_unknown_profile_is_named_and_nothing_is_made(project):
    log, done = project.make("book", "PROFILE=nope", status=2)
    assert "no profile nope" in done.stderr and "smoke smollm2-135m" in done.stderr
    assert log == [] and not (project.folder / "build").exists()


def test_help_has_a_line_for_every_target(project):
    _, done = project.make("help")
    listed = dict(re.findall(r"^  ([\w-]+) +(\S.*)$", done.stdout, re.MULTILINE))
    assert {"book", "test", "bench", "lint", "clean", "help"} <= set(listed)
    assert {f"clean-{step}" for step in STEPS} <= set(listed)
    assert "conda" in done.stdout and "smoke smollm2-135m" in done.stdout


def test_an_activated_conda_environment_is_used_as_it_is(project):
    environment = project.folder / "conda"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").write_text(STAND_IN.replace("-) ;;", "*find_spec*) exit 0 ;;"))
    (environment / "bin" / "python").chmod(0o755)
    log, _ = project.make("book", CONDA_PREFIX=str(environment), CONDA_DEFAULT_ENV="superset-circuit")
    assert executed(log) == [*(f"page {page}" for page in PAGES), "book"]
    assert not (project.folder / ".venv").exists()


@pytest.mark.parametrize(
    "conda", [{"CONDA_PREFIX": "/nowhere", "CONDA_DEFAULT_ENV": "base"}, {"CONDA_DEFAULT_ENV": ""}]
)
def test_otherwise_a_virtual_environment_is_made(project, conda):
    (project.folder / "requirements.lock").touch()
    (project.folder / "requirements-no-deps.lock").touch()
    _, done = project.make("-n", "book", **conda)
    assert "-m venv --clear .venv" in done.stdout and "/nowhere" not in done.stdout


def test_an_interpreter_that_is_too_old_is_refused(project):
    (project.folder / "requirements.lock").touch()
    (project.folder / "requirements-no-deps.lock").touch()
    _, done = project.make("lint", "PYTHON=false", status=2, CONDA_DEFAULT_ENV="")
    assert "PYTHON=false is not a working Python 3.11" in done.stderr and not (project.folder / ".venv").exists()
