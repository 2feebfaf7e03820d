"""Keys change exactly when they should, from contents alone."""

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

from lib import records
from pipeline import keys, params
from pipeline import step as steps
from pipeline.declaration import Table
from pipeline.params import ParameterError
from pipeline.units import Unit
from steps.registry import PLAN

STEPS = PLAN.names
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
    for name in ("lib", "pipeline", "report", "steps", "params"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "people.csv").write_text("name,profession\n")
    (tmp_path / "data" / "controls.csv").write_text("kind,name\n")
    (tmp_path / "data" / "sentences.csv").write_text("kind,text\n")
    (tmp_path / "data" / "odd_one_out.csv").write_text("clean_a\n")
    (tmp_path / "data" / "filter_heads_llama-3.3-70b.csv").write_text("layer,head\n")
    (tmp_path / "data" / "claims.schema.json").write_text("{}")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(params, "ROOT", tmp_path)
    for step in STEPS:
        PLAN.notebook(step).write_text(json.dumps(NOTEBOOK))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begin(step: str, namespace: dict) -> steps.Step:
    """A step of the plan that this process computes."""
    return steps.begin(PLAN, step, namespace, lambda _: None)


def fake_baselines(seed: int = 0, able: bool = True, pairs: pd.DataFrame = PAIRS) -> None:
    """What step 01 leaves: a run record, pairs, findings."""
    step = begin("baselines", {"profile": "smoke", "seed": seed, "overwrite": True})
    step.table(
        Table(
            "baselines",
            lambda _: [Unit("u", (), {"able": able})],
            lambda _: lambda unit: pd.DataFrame({"accuracy": [0.9]}),
            lambda *_: None,
            schema=None,
        )
    )
    step.write_extra("pairs.parquet", pairs)
    step.write_findings({"able": {"superset": {"able": able, "why": "measured"}}})


def both(step: str, **given) -> tuple[str, str]:
    own = params.validate(PLAN.sections, step, params.load_profile("smoke") | given)
    data = keys.hash_json(keys.ingredients(PLAN[step], own))
    return data, keys.page_key(PLAN, step, own, data)


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
# The steps whose tables rest on picks that statistics decide: they choose layers, sites, candidates, circuits.
CHOOSING = {step for step in STEPS if "lib.stats" in keys.measuring(PLAN[step])}
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
    "how a notebook begins": (lambda house: append(house / "steps/registry.py", "\nEXTRA = 1\n"), NONE, set(STEPS)),
    "a sentence of one step": (
        lambda house: edit(house / "steps/necessity/page.py", "not measured", "was not asked"),
        NONE,
        {"necessity"},
    ),
    "what a parameter means, in words": (
        lambda house: edit(house / "steps/necessity/measure.py", "pairs at the other roles", "pairs there"),
        NONE,
        NONE,
    ),
    "how one step measures": (
        lambda house: append(house / "steps/necessity/measure.py", "\nEXTRA = 1\n"),
        {"necessity"},
        {"necessity"},
    ),
    "how work is cut into units": (
        lambda house: append(house / "pipeline/units.py", "\nEXTRA = 1\n"),
        set(STEPS),
        set(STEPS),
    ),
    "whom the study asks": (
        lambda house: append(house / "pipeline/population.py", "\nEXTRA = 1\n"),
        ASKING | {"sufficiency"},  # lines its pairs up in other templates
        ASKING | {"sufficiency"},
    ),
    "the odd-one-out items": (
        lambda house: append(house / "data/odd_one_out.csv", "x\n"),
        {"baselines"},
        {"baselines"},
    ),
    "published heads": (
        lambda house: append(house / "data/filter_heads_llama-3.3-70b.csv", "1,2\n"),
        NONE,
        {"story"},
    ),
    "the growing pass": (lambda house: append(house / "lib/single_pass.py", "\nEXTRA = 1\n"), set(STEPS), set(STEPS)),
    "the style file": (lambda house: append(house / "report/superset.mplstyle", "\nfont.size: 9\n"), NONE, set(STEPS)),
    "statistics": (lambda house: append(house / "lib/stats.py", "\nEXTRA = 1\n"), CHOOSING, set(STEPS)),
    "a comment in a module that computes": (lambda house: append(house / "lib/sweep.py", "\n# why\n"), NONE, NONE),
    "the sweep": (lambda house: append(house / "lib/sweep.py", "\nEXTRA = 1\n"), set(STEPS), set(STEPS)),
    "the models": (lambda house: append(house / "lib/models.py", "\nEXTRA = 1\n"), set(STEPS), set(STEPS)),
    "a step's own parameter": (
        lambda house: edit(house / "params/smoke.yaml", "  pairs: 8\n  ablations", "  pairs: 3\n  ablations"),
        {"necessity"},
        {"necessity"},
    ),
    "what a page alone asks of its table": (
        lambda house: edit(house / "params/smoke.yaml", "rounds: 1", "rounds: 1\n  direct_floor: 0.75"),
        NONE,
        {"hydra"},
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
    own, file = PAIRS.assign(pair_id="p1"), house / "results/smoke/pairs.parquet"
    records.write(file, own, {}, schema=None)
    with pytest.raises(records.RecordError, match="pairs.parquet is not the file that step baselines wrote"):
        all_keys()
    fake_baselines(seed=7, pairs=own)
    after = all_keys()
    assert changed(before, after) == (SWEEPING, SWEEPING)


def test_findings_count_only_where_they_are_read(house):
    fake_baselines()
    given = {"layers": "auto"}
    before, all_layers = both("necessity", **given), both("necessity")
    coarse = begin("coarse_sweep", {"profile": "smoke"})
    coarse.write_findings({"critical_layers": [21], "note": "x"})
    after = both("necessity", **given)
    assert after[0] != before[0]  # auto: the critical layers are part of the data
    assert both("necessity")[0] == all_layers[0] and both("necessity")[1] != all_layers[1]
    coarse.write_findings({"critical_layers": [21], "note": "y"})
    again = both("necessity", **given)
    assert again[0] == after[0] and again[1] != after[1]  # another note redraws, and sweeps nothing


def test_findings_of_another_model_are_not_read(house):
    fake_baselines()
    own = params.validate(PLAN.sections, "necessity", params.load_profile("smoke"))
    assert keys.find_findings("baselines", own)["able"]["superset"]["able"] is True
    other = own.model_copy(update={"model": "./other", "model_sha256": None})
    assert keys.find_findings("baselines", other) is None
    with pytest.raises(ParameterError, match=r"results/smoke has none of model ./other as it is now and task superset"):
        keys.find_pairs("necessity", other)


def test_what_was_found_of_a_folder_does_not_count_once_the_folder_is_another(house, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    own = params.validate(PLAN.sections, "baselines", params.load_profile("smoke"))
    own = own.model_copy(update={"model": str(folder), "model_sha256": None})
    found = {"able": {"superset": {"able": True, "why": "yes"}}, "about": keys.about(own)}
    place = keys.results_folder(own) / "baselines.findings.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(found), encoding="utf-8")
    assert keys.find_findings("baselines", own) == found
    (folder / "model.safetensors").write_bytes(b"others!")
    assert keys.find_findings("baselines", own) is None


def test_a_task_the_model_cannot_do_needs_no_pairs(house):
    fake_baselines()
    with pytest.raises(ParameterError, match="run 01_baselines first"):
        both("necessity", task="odd_one_out", template="odd_one_out")
    step = begin("baselines", {"profile": "smoke"})
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


def test_a_folders_config_and_tokenizer_are_in_the_key_though_a_sha256_is_given(house):
    folder = house / "own"
    folder.mkdir()
    files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name in files:
        (folder / name).write_text("1")
    own = params.validate(PLAN.sections, "necessity", {"model": "./own", "model_sha256": "0" * 64})
    made = {keys.hash_json(keys.weights(own))}
    for name in files:
        edit(folder / name, "1", "2")
        made.add(keys.hash_json(keys.weights(own)))
    assert len(made) == 1 + len(files)
    assert keys.model_contents("package:no.such/a.gguf") is None  # loading says what is missing


def test_a_local_models_weights_are_known_by_their_contents(house):
    folder = house / "m"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1")
    own = params.validate(PLAN.sections, "necessity", {"model": "./m", "profile": "mine"})
    before = keys.weights(own)
    os.utime(folder / "model.safetensors", (1, 1))
    assert keys.weights(own) == before
    (folder / "model.safetensors").write_bytes(b"2")
    assert keys.weights(own) != before


# --- what is reached -------------------------------------------------------------------------------------


def test_what_measures_is_found_by_import():
    """Nothing is listed by hand: every module of lib that a measure file reaches counts, and nothing that draws."""
    for step in PLAN:
        found = keys.measuring(step)
        assert {f"steps.{step.name}.measure", "pipeline.units", "lib.single_pass", "lib.sweep"} <= set(found)
        assert not [name for name in found if name.startswith("report") or "page" in name]
        assert {name.split(".")[1] for name in found if name.startswith("steps.")} == {step.name}
        assert set(found) <= set(keys.drawing(step)) | {"pipeline.units"}
    assert {"coarse_sweep", "sufficiency", "hydra", "retrieval_heads"} <= CHOOSING


def test_an_import_inside_a_function_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(params, "ROOT", tmp_path)
    (tmp_path / "lib").mkdir()
    for name, text in {
        "a": "from lib import b\n",
        "b": "def f():\n    from lib.c import x\n",
        "c": "import lib.d\n",
        "d": "",
        "e": "",
    }.items():
        (tmp_path / "lib" / f"{name}.py").write_text(text)
    assert list(keys.reached(["lib.a"], lambda name: True)) == ["lib.a", "lib.b", "lib.c", "lib.d"]


@pytest.mark.parametrize("step", STEPS[4:])
def test_another_slice_is_another_key(step, house):
    fake_baselines()
    before = both(step)
    earlier = begin("sufficiency", {"profile": "smoke"})
    earlier.write_findings({"able": True, "critical_slice": [{"site": "21.6"}]})
    with_slice = both(step)
    earlier.write_findings({"able": True, "critical_slice": [{"site": "21.6"}, {"site": "mlp 23"}]})
    assert len({key for key, _ in (before, with_slice, both(step))}) == 3
