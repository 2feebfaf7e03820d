"""The price before the run: fits or not, counted from the profile, beside what was measured."""

import json

import pytest

from lib import models, weights
from lib.weights import ModelError
from pipeline import assumed, costs, keys, params, rates, units
from pipeline.params import ParameterError
from steps import plan
from steps.registry import PLAN
from tests.conftest import CONFIGS, SMOLLM

LLAMA = "meta-llama/Llama-3.3-70B-Instruct"
CARD = "NVIDIA H100 80GB"


@pytest.fixture(scope="module")
def seventy():
    return weights.shape_of(weights.config_of(LLAMA))


def test_the_70b_shape_without_the_network(seventy):
    assert seventy.parameters == pytest.approx(70.55e9, rel=1e-3)  # as its model card says: 70.6B
    assert weights.weight_gb(seventy, "bfloat16") == pytest.approx(141.1, abs=0.1)
    assert 38 < weights.weight_gb(seventy, "bfloat16", "nf4") < 41
    assert 71 < weights.weight_gb(seventy, "bfloat16", "int8") < 75


@pytest.mark.parametrize("name", [*CONFIGS, "gemma3 with images", "phi3", "mixtral"])
def test_weights_are_those_of_the_model(tiny, name):
    model = tiny(name, "float32")
    shape = weights.shape_of(model.model.config)
    assert shape.parameters == sum(own.numel() for own in model.model.parameters())
    own = (shape.n_layers, shape.n_heads, shape.n_kv_heads, shape.head_size)
    assert own == (model.n_layers, model.n_heads, model.n_kv_heads, model.head_size)
    block = sum(own.numel() for name, own in model.mlps[0].named_parameters() if name.endswith(("weight", "proj")))
    if model.down_projs:
        assert shape.n_neurons == model.n_neurons and shape.mlp == block
    else:  # two of four experts, and not the router
        assert shape.mlp == (block - model.mlps[0].gate.weight.numel()) / 2


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(weights.SHAPES.read_text())[LLAMA]))
    monkeypatch.setattr(weights, "memory_gb", lambda: 25.3)
    monkeypatch.setattr(models, "find_handles", None)  # what a loaded model would be given to
    said = r"70\.6 billion weights in bfloat16 take 141\.1 GB and one small pass 0\.6 GB, but cpu has 25\.3 GB; "
    ways = r"use quantisation: nf4 \(40 GB.*\), or device_map: auto with an offload_folder.*\(141 GB on disk\)"
    with pytest.raises(ModelError, match=said + ways):
        models.load(f"config:{file}", dtype="bfloat16", device="cpu")


def test_what_works_is_not_refused(monkeypatch):
    monkeypatch.setattr(weights, "memory_gb", lambda: 24.0)
    weights.check(SMOLLM, "float32", "cpu")
    weights.check(LLAMA, "bfloat16", "auto", offload_folder="anywhere")
    weights.check(LLAMA, "bfloat16", {"": "disk"})
    weights.check(LLAMA, "bfloat16", CARD, "nf4", room=80.0)
    with pytest.raises(ModelError, match="device_map names has 24.0 GB"):
        weights.check(LLAMA, "bfloat16", "auto", "nf4")
    with pytest.raises(ModelError, match="has 8.6 GB"):  # max_memory is in GiB
        weights.check(LLAMA, "bfloat16", "auto", max_memory={"cpu": 8})


def test_the_plan_of_the_70b_profile(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert plan.main(["--profile", "llama-3.3-70b", "--device", CARD, "--json", str(file)]) == 0
    made = json.loads(file.read_text())
    assert [step["step"] for step in made["steps"]] == PLAN.names
    assert any("assumed, not measured" in line for line in made["assumptions"])
    for step in made["steps"]:
        assert step["seconds"] > 0 and step["operations"] > 1e15 and step["measured_seconds"] is None
        assert 40 < step["memory_gb"] < 80
    necessity = next(step for step in made["steps"] if step["step"] == "necessity")
    assert necessity["rows"] == pytest.approx(200 * 4 * 5360 + 40 * 4 * 240, rel=0.02)
    assert "necessity" in capsys.readouterr().out


def test_the_plan_of_a_profile_that_cannot_fit_says_so(capsys, monkeypatch):
    monkeypatch.setattr(weights, "memory_gb", lambda: 25.3)
    assert plan.main(["--profile", "llama-3.3-70b"]) == 1
    assert "does not fit" in capsys.readouterr().err
    assert plan.main(["--profile", "llama-3.3-70b", "--device", "abacus"]) == 1
    assert "'abacus' is not listed" in capsys.readouterr().err


def test_rates_are_found_again():
    known = {"passes": 0.01, "plain": 5e-12, "grown": 4e-12, "rows": 1e-3, "jobs": 0.2}
    works = [
        costs.Work(passes=n % 3 + 1, plain=n * 1e11, grown=(n * 7 % 5) * 1e11, rows=n * n % 11, other={"jobs": 1})
        for n in range(1, 12)
    ]
    found = rates.solved([(work, rates.seconds(work, known)) for work in works], {})
    assert {name: found[name] for name in known} == pytest.approx(known, rel=1e-3)


def test_more_pairs_cost_more_and_rows_are_counted(tmp_path):
    given = params.load_profile("smollm2-135m") | {"results_dir": str(tmp_path)}
    shape, place = weights.shape_of(weights.config_of(SMOLLM)), costs.Machine(2.0, "float32")
    counts = {}
    for pairs in (100, 200):
        given = given | {"coarse_sweep": given["coarse_sweep"] | {"pairs": pairs}}
        case = assumed.case_of(PLAN, "coarse_sweep", given, shape, place)
        (table,), _ = PLAN["coarse_sweep"].assumed(case)
        counts[pairs] = work = table.cost(case, table.units(case))
        assert work.rows == 30 * 2 * (pairs + 5 * 40)
    assert counts[100].operations < counts[200].operations < 2 * counts[100].operations


def test_against_a_run(tmp_path, monkeypatch):
    p = params.validate(PLAN.sections, "necessity", params.load_profile("smoke") | {"results_dir": str(tmp_path)})
    assert plan.measured("necessity", p) == {}
    tables = {"necessity": {"seconds": 3.0}, "necessity.more": {"seconds": 1.0}}
    units.write_json(keys.results_folder(p) / "necessity.run.json", {"tables": tables})
    assert plan.measured("necessity", p) == {"necessity": 3.0, "more": 1.0}
    shape, place = weights.shape_of(weights.config_of(p.model)), costs.Machine(2.0, "float32")
    given = params.load_profile("smoke") | {"results_dir": str(tmp_path)}
    own = plan.step_plan("necessity", given, shape, place, {"passes": 0.01, "grown": 1e-11}, True)
    assert own["measured_seconds"] == 4.0 and own["ratio"] == pytest.approx(own["seconds"] / 4)
    print(plan.line(own))
    with pytest.raises(ParameterError, match="nowhere"):
        plan.plan("nowhere")
