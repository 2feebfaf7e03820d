"""Keys change exactly when they should, from contents alone."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from lib import records
from pipeline import keys, params
from pipeline import step as steps
from pipeline.params import ParameterError
from pipeline.units import Unit

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = {
    "cells": [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["A sentence."]},
        {"cell_type": "code", "id": "b", "metadata": {}, "source": "1", "outputs": [], "execution_count": None},
    ],
    "metadata": {},
    "nbformat": 4,
    "nbformat_minor": 5,
}
PAIRS = pd.DataFrame({"pair_id": ["p0"], "quad_id": ["q0"], "task": ["superset"]})


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A copy of the repository's code and profiles, with stand-ins for people and notebooks."""
    for name in ("lib", "report", "params"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "people.csv").write_text("name,profession\n")
    (tmp_path / "data" / "controls.csv").write_text("kind,name\n")
    (tmp_path / "data" / "sentences.csv").write_text("kind,text\n")
    (tmp_path / "notebooks").mkdir()
    for path in keys.NOTEBOOKS.values():
        (tmp_path / path).write_text(json.dumps(NOTEBOOK))
    monkeypatch.setattr(params, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fake_baselines(seed: int = 0, able: bool = True) -> None:
    """What step 01 leaves: a run record, pairs, findings."""
    step = steps.begin("baselines", {"profile": "smoke", "seed": seed, "overwrite": True})
    step.table("baselines", [Unit("u", (), {"able": able})], lambda _: pd.DataFrame({"accuracy": [0.9]}), schema=None)
    step.write_extra("pairs.parquet", PAIRS)
    step.write_findings({"able": {"superset": {"able": able, "why": "measured"}}})


def both(step: str, **given) -> tuple[str, str]:
    own = params.validate(step, params.load_profile("smoke") | given)
    data = keys.data_key(keys.ingredients(step, own))
    return data, keys.page_key(step, own, data)


def all_keys() -> dict[str, tuple[str, str]]:
    return {step: both(step) for step in STEPS}


def changed(before: dict, after: dict) -> tuple[set[str], set[str]]:
    """Steps whose data key, and whose page key, changed."""
    return tuple({step for step in STEPS if before[step][i] != after[step][i]} for i in (0, 1))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


SWEEPING = set(STEPS) - {"baselines"}
ASKING = {
    "baselines",
    "retrieval_heads",
    "generality",
    "subspace",
    "neurons",
}  # the steps that ask about people by name
CONTROLLED = {"generality", "subspace", "neurons"}  # those that read the prompts without a superset
NONE: set[str] = set()
EDITS = {
    "a sentence in a notebook": (
        lambda house: edit(house / "notebooks/03_necessity.ipynb", "A sentence.", "Another."),
        NONE,
        {"necessity"},
    ),
    "outputs in a notebook": (
        lambda house: edit(house / "notebooks/03_necessity.ipynb", '"outputs": []', '"outputs": [{}]'),
        NONE,
        NONE,
    ),
    "plots": (lambda house: append(house / "report/plots.py", "\nCOLOUR = 1\n"), NONE, set(STEPS)),
    "the style file": (lambda house: append(house / "report/superset.mplstyle", "\nfont.size: 9\n"), NONE, set(STEPS)),
    "statistics": (lambda house: append(house / "lib/stats.py", "\nEXTRA = 1\n"), NONE, set(STEPS)),
    "a comment in a module that computes": (lambda house: append(house / "lib/sweep.py", "\n# why\n"), NONE, NONE),
    "the sweep": (lambda house: append(house / "lib/sweep.py", "\nEXTRA = 1\n"), SWEEPING, SWEEPING),
    "the models": (lambda house: append(house / "lib/models.py", "\nEXTRA = 1\n"), set(STEPS), set(STEPS)),
    "a step's own parameter": (
        lambda house: edit(house / "params/smoke.yaml", "necessity:", "necessity:\n  pairs: 3"),
        {"necessity"},
        {"necessity"},
    ),
    "a comment in the profile": (lambda house: append(house / "params/smoke.yaml", "\n# why\n"), NONE, NONE),
    "a number of resamples": (
        lambda house: edit(house / "params/smoke.yaml", "resamples: 500", "resamples: 501"),
        NONE,
        set(STEPS),
    ),
    "the layers": (
        lambda house: edit(house / "params/smoke.yaml", "layers: [0, ", "layers: ["),
        {"coarse_sweep", "necessity", "sufficiency", "generality", "subspace", "story"},
        set(STEPS),
    ),
    "the seed": (lambda house: edit(house / "params/smoke.yaml", "seed: 0", "seed: 1"), set(STEPS), set(STEPS)),
    "the weights": (
        lambda house: edit(house / "params/smoke.yaml", "model_sha256: b", "model_sha256: c"),
        set(STEPS),
        set(STEPS),
    ),
    "people": (lambda house: append(house / "data/people.csv", "x,y\n"), ASKING, ASKING),
    "controls": (lambda house: append(house / "data/controls.csv", "thing,X Y\n"), CONTROLLED, CONTROLLED),
    "the threshold of a claim": (
        lambda house: edit(house / "params/smoke.yaml", "task_done: 0.05", "task_done: 0.06"),
        NONE,
        {"story"},
    ),
    "dates": (lambda house: [os.utime(path, (1, 1)) for path in house.rglob("*")], NONE, NONE),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_each_edit_changes(name, house):
    fake_baselines()
    before = all_keys()
    act, data, page = EDITS[name]
    act(house)
    if name == "the weights":  # other weights have no pairs yet: step 01 comes first
        fake_other = params.load_profile("smoke")["model_sha256"]
        assert fake_other.startswith("c")
        with pytest.raises(ParameterError, match="run 01_baselines first"):
            both("necessity")
        assert both("baselines") != before["baselines"]
        return
    assert changed(before, all_keys()) == (data, page)


def test_keys_do_not_depend_on_where_the_repository_lies(house, tmp_path_factory, monkeypatch):
    fake_baselines()
    before = all_keys()
    other = tmp_path_factory.mktemp("elsewhere") / "clone"
    shutil.copytree(house, other)
    monkeypatch.setattr(params, "ROOT", other)
    monkeypatch.chdir(other)
    assert all_keys() == before


def test_later_steps_follow_the_pairs_not_the_run_that_made_them(house):
    fake_baselines()
    before = all_keys()
    fake_baselines(seed=7)  # other parameters, the same pairs
    assert both("necessity") == before["necessity"]
    records.write(house / "results/smoke/pairs.parquet", PAIRS.assign(pair_id="p1"), {}, schema=None)
    after = all_keys()
    assert changed(before, after) == (SWEEPING, SWEEPING)


def test_findings_count_only_where_they_are_read(house):
    fake_baselines()
    given = {"layers": "auto"}
    before, all_layers = both("necessity", **given), both("necessity")
    coarse = steps.begin("coarse_sweep", {"profile": "smoke"})
    coarse.write_findings({"critical_layers": [21], "note": "x"})
    after = both("necessity", **given)
    assert after[0] != before[0]  # auto: the critical layers are part of the data
    assert both("necessity")[0] == all_layers[0] and both("necessity")[1] != all_layers[1]
    coarse.write_findings({"critical_layers": [21], "note": "y"})
    again = both("necessity", **given)
    assert again[0] == after[0] and again[1] != after[1]  # another note redraws, and sweeps nothing


def test_findings_of_another_model_are_not_read(house):
    fake_baselines()
    own = params.validate("necessity", params.load_profile("smoke"))
    assert keys.find_findings("baselines", own)["able"]["superset"]["able"] is True
    other = own.model_copy(update={"model": "./other", "model_sha256": None})
    assert keys.find_findings("baselines", other) is None
    with pytest.raises(ParameterError, match=r"results/smoke has none of model ./other and task superset"):
        keys.find_pairs("necessity", other)


def test_a_task_the_model_cannot_do_needs_no_pairs(house):
    fake_baselines()
    with pytest.raises(ParameterError, match="run 01_baselines first"):
        both("necessity", task="odd_one_out", template="odd_one_out")
    step = steps.begin("baselines", {"profile": "smoke"})
    step.write_findings({"able": {"odd_one_out": {"able": False, "why": "accuracy 27%"}}})
    assert both("necessity", task="odd_one_out", template="odd_one_out")


def test_own_pairs_are_known_by_their_contents(house):
    (house / "mine.csv").write_text("a\n")
    before = both("necessity", pairs_file="mine.csv")
    os.rename("mine.csv", "yours.csv")
    assert both("necessity", pairs_file="yours.csv") == before
    (house / "yours.csv").write_text("b\n")
    assert both("necessity", pairs_file="yours.csv") != before
    with pytest.raises(ParameterError, match="there is no file 'mine.csv'"):
        both("necessity", pairs_file="mine.csv")


def test_a_local_models_weights_are_known_by_their_contents(house):
    folder = house / "m"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1")
    own = params.validate("necessity", {"model": "./m", "profile": "mine"})
    before = keys.weights(own)
    os.utime(folder / "model.safetensors", (1, 1))
    assert keys.weights(own) == before
    (folder / "model.safetensors").write_bytes(b"2")
    assert keys.weights(own) != before


# --- the command line ---


def test_the_file_is_written_only_when_something_changed(house, capsys):
    fake_baselines()
    out = house / "build/keys/baselines.key"
    assert keys.main(["baselines", "--profile", "smoke", "--output", str(out)]) == 0
    words = out.read_text().split()
    assert words[0] == "data" and words[2] == "page" and len(words[1]) == len(words[3]) == 64
    os.utime(out, (1, 1))
    assert keys.main(["baselines", "--profile", "smoke", "--output", str(out)]) == 0
    assert out.stat().st_mtime == 1
    edit(house / "notebooks/01_baselines.ipynb", "A sentence.", "Another.")
    assert keys.main(["baselines", "--profile", "smoke", "--output", str(out)]) == 0
    assert out.read_text().split()[1] == words[1] and out.read_text().split()[3] != words[3]
    assert capsys.readouterr().out == ""
    # results that someone deleted: make must run the step
    assert keys.main(["baselines", "--profile", "smoke", "--clean"]) == 0
    assert capsys.readouterr().out == "baselines: removed 4 result files from results/smoke\n"
    os.utime(out, (1, 1))
    assert keys.main(["baselines", "--profile", "smoke", "--output", str(out)]) == 0
    assert out.stat().st_mtime > 1


def test_stale_results_are_set_aside_and_fresh_ones_are_not(house, capsys):
    fake_baselines()
    folder = house / "results/smoke"
    old = keys.stored_key(folder, "baselines")
    names = {"baselines.parquet", "baselines.run.json", "baselines.findings.json", "pairs.parquet"}
    assert {path.name for path in folder.iterdir()} == names
    edit(house / "params/smoke.yaml", "pairs_per_quad: 2", "pairs_per_quad: 1")
    assert keys.main(["baselines", "--profile", "smoke"]) == 0
    assert f"set aside in results/smoke/stale/baselines-{old[:8]}" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["stale"]
    assert {path.name for path in (folder / "stale" / f"baselines-{old[:8]}").iterdir()} == names
    assert keys.main(["necessity", "--profile", "smoke"]) == 1
    assert "step necessity needs pairs" in capsys.readouterr().err


def test_unfinished_work_of_another_key_is_set_aside(house, capsys):
    fake_baselines()
    folder = house / "results/smoke"
    plan = {"data_key": "old", "ingredients": {"parameters": {"seed": 9}}}
    records.write_json(folder / "necessity.units/plan.json", plan)
    assert keys.main(["necessity", "--profile", "smoke"]) == 0
    assert "set aside" in capsys.readouterr().out and not (folder / "necessity.units").exists()
    (folder / "necessity.units").mkdir()  # killed before its plan was written: nothing to set aside
    assert keys.main(["necessity", "--profile", "smoke"]) == 0
    assert "set aside" not in capsys.readouterr().out


def test_cleaning_one_step_leaves_the_others(house, capsys):
    fake_baselines()
    for name in ("necessity.parquet", "necessity.joint.parquet", "sufficiency.parquet"):
        (house / "results/smoke" / name).write_text("x")
    assert keys.main(["necessity", "--profile", "smoke", "--clean"]) == 0
    left = {path.name for path in (house / "results/smoke").iterdir()}
    assert not any(name.startswith("necessity") for name in left) and "sufficiency.parquet" in left
    assert "pairs.parquet" in left and "removed 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["necesity", "--profile", "smoke"], "did you mean 'necessity'?"),
        (["necessity", "--profile", "smok"], "did you mean 'smoke'?"),
        (["necessity", "--profile", "smoke"], "run 01_baselines first"),
    ],
)
def test_mistakes_are_one_line_and_exit_1(arguments, message, house, capsys):
    out = house / "x.key"
    assert keys.main([*arguments, "--output", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not out.exists()


def test_it_starts_quickly_and_loads_nothing_heavy(house):
    fake_baselines()
    code = (
        "import sys; from lib import keys; status = keys.main(['necessity', '--profile', 'smoke']); "
        "heavy = {'torch', 'pandas', 'numpy', 'pyarrow', 'transformers'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else status)"
    )
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=house, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - begun < 5  # about 0.3 s on an idle machine
    assert done.stdout == "data {}\npage {}\n".format(*both("necessity"))


# --- the tables of modules ---


def lib_imports(name: str) -> set[str]:
    """Modules of lib that a module imports, anywhere in it."""
    out = set()
    for node in ast.walk(ast.parse((ROOT / "lib" / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lib":
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lib."):
            out.add(node.module.split(".")[1])
    return out


def test_every_module_of_lib_is_in_a_key_or_known_to_be_in_none():
    compute = {name for names in keys.COMPUTE.values() for name in names}
    page = set(keys.DRAWING)
    # keys and params decide by value; machine gives facts about a run; fit only refuses, and the others count costs
    neither = {"__init__", "keys", "params", "step_params", "machine"}
    neither |= {"fit", "costs", "standins", "planned", "rates", "plan", "workers"}
    assert {path.stem for path in (ROOT / "lib").glob("*.py")} == compute | page | neither
    assert not compute & page


def test_nothing_in_lib_needs_the_report():
    """One way through the house: what is measured cannot depend on how it is told."""
    for path in (ROOT / "lib").glob("*.py"):
        assert not re.search(r"^\s*(from|import) report\b", path.read_text(), flags=re.M), path.name


@pytest.mark.parametrize("step", STEPS)
def test_what_a_computing_module_imports_computes_too(step):
    for name in keys.COMPUTE[step]:
        # hooks and single_pass are what models proves itself with; params and steps lend ability their types
        assert lib_imports(name) <= {
            *keys.COMPUTE[step],
            "hooks",
            "single_pass",
            "params",
            "step_params",
            "steps",
            "fit",
        }, name


@pytest.mark.parametrize("step", list(STEPS)[4:])
def test_another_slice_is_another_key(step, house):
    fake_baselines()
    before = both(step)
    earlier = steps.begin("sufficiency", {"profile": "smoke"})
    earlier.write_findings({"able": True, "critical_slice": [{"site": "21.6"}]})
    with_slice = both(step)
    earlier.write_findings({"able": True, "critical_slice": [{"site": "21.6"}, {"site": "mlp 23"}]})
    assert len({key for key, _ in (before, with_slice, both(step))}) == 3
