"""lib alone, copied into an empty folder with the three examples: a method developer has everything."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib import tasks

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
# Put first on the path: what stands above lib cannot be imported, wherever it lies.
NOTHING_ABOVE = """import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("pipeline", "report", "steps", "pandera", "papermill", "IPython"):
            raise ModuleNotFoundError(f"{name} is not for lib")

sys.meta_path.insert(0, Refused())
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder that holds lib and the examples, and nothing else of the repository."""
    folder = tmp_path_factory.mktemp("alone")
    for name in ("lib", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "sitecustomize.py").write_text(NOTHING_ABOVE)
    return folder


def test_there_are_three():
    assert EXAMPLES == ["heads.py", "own_pairs.py", "paths_into_a_head.py"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("heads.py", r"layer component +head +recovery"),
        ("own_pairs.py", r"recovery at `landmark`, [23] pairs:  0: (0\.9\d|1\.\d+).*\n.*recovery at `last`.*29: 1\.0"),
        ("paths_into_a_head.py", r"head \d+\.\d of 30 x 9\n(.*\n)*senders at `swapped`:\n(.*\n)*senders at `last`:"),
    ],
)
def test_an_example_runs_with_lib_alone(alone, name, says):
    own = os.environ | {"PYTHONPATH": str(alone)}
    done = subprocess.run(
        [sys.executable, f"examples/{name}"], cwd=alone, capture_output=True, text=True, timeout=600, env=own
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(says, done.stdout), done.stdout
    assert "nan" not in done.stdout


def test_roles_by_words(smollm_tokenizer):
    texts = {"clean": "The Eiffel Tower stands in", "corrupt": "The Brandenburg Gate stands in"}
    own = {"answer": " Paris", "corrupt_answer": " Berlin", "pair_id": "mine"}
    pair = tasks.two_prompts(smollm_tokenizer, **texts, **own, roles={"verb": ("stands", "stands")})
    assert (pair.pair_id, pair.quad_id) == ("mine", "mine")
    words = smollm_tokenizer.convert_ids_to_tokens(list(pair.clean.ids))
    assert [words[i] for i in pair.clean.roles["verb"]] == ["\u0120stands"]
    for roles, message in (
        ({"x": ("sits", "stands")}, "'sits' stands 0 times"),
        ({"x": ("e", "stands")}, r"'e' stands \d times"),
        ({"x": ("The", "stands")}, "not the same"),
        ({"x": ("", "stands")}, "give words that stand there once"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.two_prompts(smollm_tokenizer, **texts, **own, roles=roles)
