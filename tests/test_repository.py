"""What may not be in git: outputs, secrets, paths of somebody's machine, addresses of registries, bulk."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import params

ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 2_000_000
NOT_SOURCE = {
    ".git",
    ".venv",
    "build",
    "results",
    "shared",
    "__pycache__",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
}

# Written so that this file does not match itself.
SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "an AWS key": r"\bAKI[A][0-9A-Z]{16}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_[p]at_[A-Za-z0-9_]{40,}",
    "a key for a service": r"\bsk-[A-Za-z0-9_-]{32,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE [K]EY-----",
    "a password in an address": r"://[^/\s:@]+:[^/\s:@{}$<]+@",
}
MACHINE_PATHS = r"(?<![\w.~/-])/(?:work|root|home/[\w.-]+|Users/[\w.-]+|tmp|opt)/"
REGISTRIES = "|".join(
    (
        r"pypi[.]org/simple",
        r"files[.]pythonhosted[.]org",
        r"registry[.]npmjs[.]org",
        r"download[.]pytorch[.]org",
        r"deb[.]debian[.]org",
        r"conda[.]anaconda[.]org",
        r"--(?:extra-)?index[-]url",
        r"--find[-]links",
    )
)


def source_files() -> list[Path]:
    """Files in git and those about to be (not ignored); without git, everything that make does not write."""
    git = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if git.returncode == 0:
        found = [ROOT / name for name in git.stdout.split("\0") if name]
    else:
        found = [path for path in ROOT.rglob("*") if not NOT_SOURCE & set(path.relative_to(ROOT).parts)]
    return sorted(path for path in set(found) if path.is_file())


FILES = source_files()
NOTEBOOKS = [path for path in FILES if path.suffix == ".ipynb"]


def texts() -> list[tuple[str, str]]:
    """(name, text) of every file that is text."""
    found = []
    for path in FILES:
        data = path.read_bytes()
        if b"\0" not in data[:8192]:
            found.append(
                (path.relative_to(ROOT).as_posix(), data.decode("utf-8"))
            )  # text in another encoding: an error
    assert len(found) > 10
    return found


def matches(pattern: str, files: list[tuple[str, str]]) -> list[str]:
    """ "name:line: text" of every match."""
    return [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
        for name, text in files
        for match in re.finditer(pattern, text)
    ]


def third_party(name: str) -> bool:
    """Scripts of others that the book carries, minified."""
    return name.startswith("book/assets/") and name.endswith((".js", ".css"))


def test_there_is_something_to_look_at():
    names = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert {"Makefile", "pyproject.toml", "lib/sweep.py"} <= names
    assert len(NOTEBOOKS) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stripped_and_take_parameters(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    assert not [cell["source"] for cell in code if cell["outputs"]], "run `make format` to strip the outputs"
    assert not [cell["source"] for cell in code if cell["execution_count"] is not None]
    assert not [cell for cell in code if "execution" in cell["metadata"]], "times of a run"
    assert "widgets" not in notebook["metadata"] and "papermill" not in notebook["metadata"]
    tags = [tag for cell in code for tag in cell["metadata"].get("tags", [])]
    assert tags.count("parameters") == 1 and "injected-parameters" not in tags
    kernel = notebook["metadata"]["kernelspec"]
    assert (kernel["name"], kernel.get("language")) == ("python3", "python"), "papermill asks for both"


@pytest.mark.parametrize("kind", SECRETS)
def test_no_secrets(kind):
    assert not matches(SECRETS[kind], texts())


def test_no_machine_paths():
    files = [(name, text) for name, text in texts() if not name.startswith("tests/") and not third_party(name)]
    assert not matches(MACHINE_PATHS, files)


def test_no_registry_addresses():
    assert not matches(REGISTRIES, [(name, text) for name, text in texts() if not third_party(name)])


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (SECRETS["a Hugging Face token"], "token='hf_" + "a1" * 17 + "'"),
        (SECRETS["an AWS key"], "AKIA" + "A1" * 8),
        (SECRETS["a private key"], "-----BEGIN RSA PRIVATE " + "KEY-----"),
        (MACHINE_PATHS, 'open("/' + 'home/ann/people.csv")'),
        (MACHINE_PATHS, "cd /" + "work/main"),
        (REGISTRIES, "--index" + "-url x"),
        (REGISTRIES, "https://pypi" + ".org/simple"),
    ],
)
def test_patterns_find_what_they_are_for(pattern, text):
    assert re.search(pattern, text)


def test_patterns_leave_ordinary_text_alone():
    relative = ("./" + "work/main", "https://example.org/" + "home/ann/", "a/" + "tmp/b")
    for text in (*relative, "HF_TOKEN", "hf_quantizer", "user@host"):
        assert not any(re.search(pattern, text) for pattern in (*SECRETS.values(), MACHINE_PATHS, REGISTRIES)), text


def test_nothing_large_is_committed():
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in FILES}
    assert len(sizes) > 10
    assert not {name: size for name, size in sizes.items() if size > MAX_BYTES}


NAME = r"(?:Mac|Mc|De|Di|Kr)?[A-Z][a-z]+(?:-[A-Z][a-z]+)?"
CITED = re.compile(rf"\b({NAME}|nostalgebraist)((?:, {NAME})* and {NAME}| et al\.)?,? \(?((?:19|20)\d\d)\b")
MONTHS = ("November", "Article")  # words before a year that name nobody


def test_whom_the_code_and_the_pages_cite_is_in_the_references():
    """Every "Name 1999" or "Name et al. 1999" is a first author with that year, or one beside it (preprints)."""
    source = (ROOT / "book/references.bib").read_text(encoding="utf-8").replace("{\\'a}", "a")
    keys = re.findall(r"^@\w+{([^,]+),", source, re.M)
    assert len(set(keys)) == len(keys)
    entries = re.findall(r"author = \{+(\w[\w -]*)\}?,? ?.*?year = \{(\d+)\}", source, re.S)
    known = {(name.split()[-1].rpartition("-")[2], int(year) + by) for name, year in entries for by in (-1, 0, 1)}
    files = [path for room in ("lib", "planted", "pipeline", "report", "steps") for path in (ROOT / room).rglob("*.py")]
    missing = []
    for path in [*files, *(ROOT / "book").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            text = " ".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        for name, _, year in CITED.findall(" ".join(text.split())):
            if name not in MONTHS and (name.rpartition("-")[2], int(year)) not in known:
                missing.append(f"{path.name}: {name} {year}")
    assert not missing


def test_a_kernel_that_starts_beside_the_notebooks_has_the_packages():
    names = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    assert {"lib", "pipeline", "report", "steps"} <= set(names)
    for name in names:
        own = [sys.executable, "-c", f"import {name}, {', '.join(names)}; print({name}.__path__[0])"]
        done = subprocess.run(own, cwd=ROOT / "notebooks", capture_output=True, text=True, check=False)
        assert done.stdout.strip() == str(ROOT / name), (name, done.stderr)
    assert params.ROOT == ROOT, "by which such a notebook finds results"
