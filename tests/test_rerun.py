"""What runs again after a change, where the smoke book is built: nothing, a page, or what depends on a parameter."""

import subprocess
import sys
from pathlib import Path

import pytest
from smoke_book import make, stamps


def test_nothing_runs_twice_and_a_sentence_redraws_without_sweeping(own_tree):
    everything = ("results/smoke/*.parquet", "build/smoke/executed/*", "build/smoke/book/_build/html/index.html")
    before = stamps(own_tree, *everything)
    assert make(own_tree, "book").returncode == 0
    assert stamps(own_tree, *everything) == before
    notebook = own_tree / "notebooks/03_necessity.ipynb"
    notebook.write_text(notebook.read_text().replace("**Question.**", "**The question.**", 1))
    assert make(own_tree, "book").returncode == 0
    after = stamps(own_tree, *everything)
    changed = {Path(path).name for path in before if after[path] != before[path]}
    assert changed == {"03_necessity.ipynb", "index.html"}
    assert "The question." in (own_tree / "build/smoke/book/_build/html/executed/03_necessity.html").read_text()


@pytest.mark.long
def test_a_parameter_of_a_step_reruns_it_and_redraws_what_depends_on_it(own_tree):
    tables, pages = "results/smoke/*.parquet", "build/smoke/executed/*"
    before = stamps(own_tree, tables, pages)
    profile = own_tree / "params/smoke.yaml"
    profile.write_text(profile.read_text().replace("name_roles: [names,", "name_roles: [name_a,", 1))
    assert make(own_tree, "step-sufficiency").returncode == 0
    after = stamps(own_tree, tables, pages)
    changed = {Path(path).name for path in before if after[path] != before[path]}
    assert changed == {"necessity.parquet", "necessity.tokens.parquet", "03_necessity.ipynb", "04_sufficiency.ipynb"}


def test_results_of_other_parameters_are_refused(own_tree):
    command = [sys.executable, "-m", "papermill", "notebooks/03_necessity.ipynb", str(own_tree / "build/out.ipynb")]
    command += ["-f", "params/smoke.yaml", "-k", "python3", "-p", "ablations", "zero"]
    before = stamps(own_tree, "results/smoke/necessity.*")
    done = subprocess.run(command, cwd=own_tree, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "overwrite true" in done.stderr and "ablations" in done.stderr
    assert stamps(own_tree, "results/smoke/necessity.*") == before
