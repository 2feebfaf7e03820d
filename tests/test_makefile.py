"""The Makefile: short names for `python -m steps`, and what it refuses before it does anything."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("baselines", "coarse_sweep", "necessity", "sufficiency")
# Writes what it is asked for, with the profile and the card that it finds in the environment.
STAND_IN = """#!/usr/bin/env bash
[ "$1" = - ] || echo "$* [$PROFILE] [${DEVICE-}]" >> log
"""


class Project:
    """A copy of the Makefile with empty notebooks, run with the stand-in."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        for name in ("notebooks", "params", "build"):
            (folder / name).mkdir()
        for number, step in enumerate(STEPS, 1):
            (folder / "notebooks" / f"{number:02}_{step}.ipynb").write_text("{}")
        for path in ("params/smollm2-135m.yaml", "params/smoke.yaml", "log"):
            (folder / path).touch()
        (folder / "python").write_text(STAND_IN)
        (folder / "python").chmod(0o755)

    def make(self, *arguments: str, status: int = 0, **variables: str) -> tuple[list[str], subprocess.CompletedProcess]:
        """Run make; returns (what the stand-in was asked for, the finished process)."""
        (self.folder / "log").write_text("")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("CONDA", "MAKE", "MFLAGS", "PROFILE", "PY"))}
        clean.pop("DEVICE", None)
        python = () if variables else ("PY=./python",)
        done = subprocess.run(
            ["make", *arguments, *python], cwd=self.folder, capture_output=True, text=True, env=clean | variables
        )
        assert done.returncode == status, done.stdout + done.stderr
        return (self.folder / "log").read_text().splitlines(), done


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.mark.parametrize(
    ("target", "asked"),
    [
        ("book", "-m steps run"),
        ("step-necessity", "-m steps run necessity"),
        ("clean-coarse_sweep", "-m steps clean coarse_sweep"),
        ("plan", "-m steps.plan"),
    ],
)
def test_a_target_asks_python(project, target, asked):
    assert project.make(target)[0] == [f"{asked} [smollm2-135m] []"]
    assert project.make(target, "PROFILE=smoke", "DEVICE=NVIDIA H100 80GB")[0] == [
        f"{asked} [smoke] [NVIDIA H100 80GB]"
    ]


def test_the_notebooks_are_opened_in_jupyterlab_without_a_browser_where_there_is_no_screen(project):
    (asked,), _ = project.make("lab", "DISPLAY=", "WAYLAND_DISPLAY=")
    assert asked.startswith("-m jupyterlab --LabApp.default_url=/lab/tree/notebooks ") and "--no-browser" in asked
    (asked,), _ = project.make("lab", "DISPLAY=:0")
    assert "--no-browser" not in asked and ("--allow-root" in asked) == (os.geteuid() == 0)


def test_clean_leaves_the_results_and_everything_else(project):
    for name in ("build/smoke/page", "build/other/page", "results/smoke/table"):
        (project.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (project.folder / name).touch()
    project.make("clean", "PROFILE=smoke")
    assert not (project.folder / "build/smoke").exists()
    assert (project.folder / "build/other/page").exists() and (project.folder / "results/smoke/table").exists()


@pytest.mark.parametrize("target", ["clean", "book", "plan", "clean-necessity"])
@pytest.mark.parametrize(
    "name",
    ["", "..", ".", "../lib", "smoke victim", "smoke/../victim", "/tmp", "-rf", "~", "*", "$(shell touch x)"]
    + ["$$(touch x)", "`touch x`", ";touch x", "a;touch x", "'", '"', "a,b", "a|b", "\u00e9", "a\nb"]
    + [" ", "smoke ~", "../../victim", "smoke/", "{smoke,other}", '"; touch x; "'],
)
def test_what_is_no_name_is_refused_before_anything_is_done(project, target, name):
    (project.folder / "victim").mkdir()
    before = sorted(project.folder.rglob("*"))
    log, done = project.make(target, f"PROFILE={name}", status=2)
    assert "PROFILE must be the name of a file in params/, of letters, digits, dots" in done.stderr
    assert "profiles: smoke smollm2-135m" in done.stderr
    assert log == [] and sorted(project.folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["$(shell touch x)", "$$(touch x)", "`touch x`", "", "smoke victim", "../victim"])
def test_a_name_from_the_environment_is_held_to_the_same(project, name):
    (project.folder / "victim").mkdir()
    before = sorted(project.folder.rglob("*"))
    log, done = project.make("clean", "PY=./python", status=2, PROFILE=name)
    assert "PROFILE must be" in done.stderr
    assert log == [] and sorted(project.folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["smollm2-135m", "Llama-3.3_70b", "a", "3"])
def test_an_ordinary_name_is_taken(project, name):
    for folder in (name, "other"):
        (project.folder / "build" / folder).mkdir()
    project.make("clean", f"PROFILE={name}")
    assert [path.name for path in (project.folder / "build").iterdir()] == ["other"]


@pytest.mark.parametrize(
    "card", ["$(shell touch x)", "`touch x`", "'; touch x; '", '"; touch x; "', "$(touch x)", "$$(touch x)"]
)
def test_a_cards_name_is_never_executed(project, card):
    for arguments, variables in ((f"DEVICE={card}", {}), ("PY=./python", {"DEVICE": card})):
        log, _ = project.make("plan", arguments, **variables)
        assert log == [f"-m steps.plan [smollm2-135m] [{card}]"] and not (project.folder / "x").exists()


def test_tests_without_a_browser_say_the_one_command(project):
    """No rights to install one: said at once, before anything else is done."""
    tools = project.folder / "tools"
    tools.mkdir()
    for name in ("make", "bash", "id", "mkdir", "ls", "sed"):
        (tools / name).symlink_to(shutil.which(name))
    _, done = project.make("test", "PY=./python", status=2, PATH=str(tools))
    assert "sudo apt-get install chromium" in done.stderr


def test_help_has_a_line_for_every_target(project):
    _, done = project.make("help")
    listed = dict(re.findall(r"^  ([\w-]+) +(\S.*)$", done.stdout, re.MULTILINE))
    assert {"book", "lab", "test", "bench", "lint", "clean", "help"} <= set(listed)
    assert {f"clean-{step}" for step in STEPS} <= set(listed)
    assert "conda" in done.stdout and "smoke smollm2-135m" in done.stdout


def test_an_activated_conda_environment_is_used_as_it_is(project):
    environment = project.folder / "conda"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").write_text(STAND_IN)
    (environment / "bin" / "python").chmod(0o755)
    log, _ = project.make("book", CONDA_PREFIX=str(environment), CONDA_DEFAULT_ENV="superset-circuit")
    assert log[-1] == "-m steps run [smollm2-135m] []"
    assert not (project.folder / ".venv").exists()


@pytest.mark.parametrize(
    "conda", [{"CONDA_PREFIX": "/nowhere", "CONDA_DEFAULT_ENV": "base"}, {"CONDA_DEFAULT_ENV": ""}]
)
def test_otherwise_a_virtual_environment_is_made(project, conda):
    (project.folder / "requirements.lock").touch()
    (project.folder / "requirements-no-deps.lock").touch()
    _, done = project.make("-n", "book", **conda)
    assert "-m venv --clear .venv" in done.stdout and "/nowhere" not in done.stdout


def test_locks_dated_in_the_future_do_not_make_it_again_each_time(project):
    later = time.time() + 1e6
    for name in ("requirements.lock", "requirements-no-deps.lock"):
        (project.folder / name).touch()
        os.utime(project.folder / name, (later, later))
    (project.folder / "python").write_text(
        '[ "$2" != venv ] || { mkdir -p .venv/bin; ln -sf ../../python .venv/bin/; }\n'
    )
    python = f"PYTHON={project.folder / 'python'}"
    assert "making .venv" in project.make("env", python, CONDA_DEFAULT_ENV="")[1].stdout
    assert "making .venv" not in project.make("env", python, CONDA_DEFAULT_ENV="")[1].stdout


def test_an_interpreter_that_is_too_old_is_refused(project):
    (project.folder / "requirements.lock").touch()
    (project.folder / "requirements-no-deps.lock").touch()
    _, done = project.make("lint", "PYTHON=false", status=2, CONDA_DEFAULT_ENV="")
    assert "PYTHON=false is not a working Python 3.11" in done.stderr and not (project.folder / ".venv").exists()
