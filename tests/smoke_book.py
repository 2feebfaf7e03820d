"""A copy of the tree with its smoke book built, once for all processes that test, and what is asked of such a tree."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = tuple(sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")))


def make(tree: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """`make ... PROFILE=smoke` with this interpreter; not as a child of the make that runs the tests."""
    command = ["make", *words, "PROFILE=smoke", f"PY={sys.executable}"]
    own = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=1800, env=own | variables)


def built(folder: Path) -> Path:
    """The tree in a folder that the processes share: the first that comes builds it, the others wait."""
    tree = folder / "superset"
    with (folder / "superset.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.exists():
            build(tree)
    return tree


def build(tree: Path) -> None:
    """Copy the tree, and make its smoke book. A tree that could not be built is not kept."""
    done = make(copied(tree), "book")
    book = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode or not (tree / book).is_file():
        shutil.rmtree(tree)
        raise AssertionError(f"the last line must be the book's path\n{(done.stdout + done.stderr)[-4000:]}")


def copied(tree: Path) -> Path:
    """What git tracks or would track, in another folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def stamps(tree: Path, *patterns: str) -> dict[str, int]:
    """Modification times of the files that match."""
    return {str(path): path.stat().st_mtime_ns for pattern in patterns for path in tree.glob(pattern)}
