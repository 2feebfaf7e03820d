"""Odd-one-out from the pairs file to the findings, on a small model that solves it.

The model's first attention module writes nothing, so what must come out is known: after layer 0 all that differs
between the two prompts of a pair still stands at the swapped name, and nothing of it at the last token.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import odd_one_out_model
import pandas as pd
import pytest
import torch
import yaml

from lib import data, effects, hooks, models, records, sweep, tasks
from lib.hooks import Site
from pipeline.params import ROOT

NOTEBOOKS = ("02_coarse_sweep", "03_necessity", "04_sufficiency")
NECESSITY = ("zero", "mean", "resample", "counterfactual")
# Pairs that swap the name of one slot have the same two answers: there is no third to resample from.
ABLATIONS = {"coarse_sweep": {"clean", "counterfactual"}, "necessity": {"zero", "mean", "counterfactual"}}
ABLATIONS |= {"sufficiency": {"clean"}}
PROFILE = {
    "profile": "odd-one-out-test",
    "device": "cpu",
    "task": "odd_one_out",
    "layers": "all",
    "memory": 1.0,
    "resamples": 200,
    "flips": 200,
    "slice_limit": 6,
    "coarse_sweep": {"roles": ["swapped", "last"]},
    "necessity": {
        "ablations": list(NECESSITY),
        "name_roles": ["swapped"],
        "name_components": ["resid", "attn", "mlp"],
        "name_pairs": 20,
    },
}
TOLERANCE = 1e-4  # x max(1, the row's largest logit change), as for every sweep


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The trained model, its tokenizer and the pairs file."""
    folder = odd_one_out_model.make(tmp_path_factory.mktemp("odd_one_out") / "model")
    odd_one_out_model.pairs_table().to_csv(folder.parent / "pairs.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> models.Model:
    return models.load(str(folder), device="cpu")


@pytest.fixture(scope="module")
def pairs(folder, model) -> list[tasks.Pair]:
    table = data.load_pairs_file(folder.parent / "pairs.csv")
    return [tasks.make_pair(model.tokenizer, row) for row in table.to_dict("records")]


@pytest.fixture(scope="module")
def results(folder) -> Path:
    """What the three notebooks leave, each run by papermill as a user would."""
    profile, out = folder.parent / f"{PROFILE['profile']}.yaml", folder.parent / "results"
    profile.write_text(yaml.safe_dump(PROFILE | {"model": str(folder)}))
    for name in NOTEBOOKS:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "papermill",
                f"notebooks/{name}.ipynb",
                folder.parent / f"{name}.ipynb",
                "-f",
                profile,
            ]
            + ["-p", "pairs_file", folder.parent / "pairs.csv", "-p", "results_dir", out]
            + ["-k", "python3", "--log-level", "ERROR", "--no-progress-bar"],
            cwd=ROOT,
            env=os.environ | {"JUPYTER_PREFER_ENV_PATH": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
    return out


@pytest.fixture(scope="module")
def coarse(results) -> pd.DataFrame:
    return records.read(results / "coarse_sweep.parquet")


def found(results: Path, step: str) -> dict:
    return json.loads((results / f"{step}.findings.json").read_text())


# --- the model and its pairs


def test_the_model_solves_what_it_was_not_trained_on(model, pairs):
    sides = [(pair.clean, pair.clean_tokens[pair.answer], pair.clean_seconds[pair.answer]) for pair in pairs]
    sides += [
        (pair.corrupt, pair.corrupt_tokens[pair.corrupt_answer], pair.corrupt_seconds[pair.corrupt_answer])
        for pair in pairs
    ]
    first = models.next_logits(model, [prompt.ids for prompt, _, _ in sides]).argmax(1)
    second = models.next_logits(model, [(*prompt.ids, token) for prompt, token, _ in sides]).argmax(1)
    assert np.mean(first == [token for _, token, _ in sides]) > 0.95
    assert np.mean(second == [token for _, _, token in sides]) > 0.95


def test_training_keeps_the_matching_two_of_a_quad_apart():
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        people, slot = odd_one_out_model.triples(4000, rng, held_out)
        odd = people[np.arange(4000), slot]
        others = people[np.arange(3) != slot[:, None]].reshape(-1, 2)
        professions = others // odd_one_out_model.EACH
        assert (professions[:, 0] == professions[:, 1]).all()
        assert (odd // odd_one_out_model.EACH != professions[:, 0]).all()
        assert (others[:, 0] != others[:, 1]).all()
        assert ((others[:, 0] // 2 == others[:, 1] // 2) == held_out).all()


def test_pairs_swap_one_name_of_two_tokens_and_quads_share_no_one(model, pairs):
    quads: dict[str, set] = {}
    for pair in pairs:
        assert len(pair.clean.roles["swapped"]) == 2
        differ = [
            i for i, (one, other) in enumerate(zip(pair.clean.ids, pair.corrupt.ids, strict=True)) if one != other
        ]
        assert differ == list(pair.clean.roles["swapped"])
        # the tokens that the model is asked for are those of the prompt, with their leading space
        assert all(model.tokenizer.decode([token])[0] == " " for token in pair.clean_tokens + pair.clean_seconds)
        assert [pair.clean.ids[pair.clean.roles[f"name_{s}"][0]] for s in "abc"] == list(pair.clean_tokens)
        assert [pair.clean.ids[pair.clean.roles[f"name_{s}"][1]] for s in "abc"] == list(pair.clean_seconds)
        quads.setdefault(pair.quad_id, set()).update(pair.clean_tokens, pair.corrupt_tokens)
    assert len(quads) == 40 and all(len(firsts) == 4 for firsts in quads.values())
    assert len(set().union(*quads.values())) == 160
    halves = pd.Series({pair.quad_id: pair.half for pair in pairs}).value_counts()
    assert halves.to_dict() == {"discovery": 20, "confirmation": 20}


# --- the sweep against plain forward passes


def both_by_hand(model: models.Model, pair: tasks.Pair, direction: str, edits: dict, role: str) -> np.ndarray:
    """(2, candidates): logit of each name's first token, and of its second after the first, with the edits in place."""
    base = pair.clean if direction == "noise" else pair.corrupt
    firsts, seconds = (
        (pair.clean_tokens, pair.clean_seconds) if direction == "noise" else (pair.corrupt_tokens, pair.corrupt_seconds)
    )
    out = []
    with hooks.patch(model, edits, base.roles[role]), torch.no_grad():
        out.append([model.model(torch.tensor([base.ids])).logits[0, -1, token].item() for token in firsts])
        said = [model.model(torch.tensor([(*base.ids, token)])).logits[0, -1] for token in firsts]
        out.append([logits[token].item() for logits, token in zip(said, seconds, strict=True)])
    return np.array(out)


def margin(logits: np.ndarray, answer: int) -> float:
    return float(logits[answer] - np.delete(logits, answer).max())


@pytest.mark.parametrize("direction,ablation", [("noise", "zero"), ("noise", "counterfactual"), ("denoise", "clean")])
@pytest.mark.parametrize("role", ["swapped", "last"])
def test_margins_over_one_and_both_tokens_equal_plain_passes(model, pairs, direction, ablation, role):
    chosen = {pair.pair_id: pair for pair in pairs[:6]}  # every slot is swapped twice
    frame = sweep.run(
        model, list(chosen.values()), direction=direction, role=role, ablations=["zero", "counterfactual"]
    )
    frame = frame[frame["ablation"] == ablation]
    moved = (frame["metric_both_after"] - frame["metric_both_before"]).abs().max()
    assert moved > 1, "no intervention moves the margin: this test could not see an error"
    for row in frame.groupby("component").sample(4, random_state=0).itertuples():
        pair, site = chosen[row.pair_id], Site(row.layer, row.component, row.head)
        other = pair.corrupt if direction == "noise" else pair.clean
        with hooks.capture(model, [site], other.roles[role]) as seen, torch.no_grad():
            model.model(torch.tensor([other.ids]))
        value = torch.zeros(1, 1, 1) if ablation == "zero" else seen[site]
        for when, edits in (("before", {}), ("after", {site: value})):
            first, second = both_by_hand(model, pair, direction, edits, role)
            allowed = TOLERANCE * max(1.0, float(np.abs(row.logits_after - row.logits_before).max()))
            assert np.abs(getattr(row, f"logits_{when}") - first).max() <= allowed
            assert getattr(row, f"metric_{when}") == pytest.approx(margin(first, pair.answer), abs=2 * allowed)
            both = margin(first + second, pair.answer)
            assert getattr(row, f"metric_both_{when}") == pytest.approx(both, abs=4 * allowed)
    # the two margins are not the same number under two names
    assert (frame["metric_both_after"] - frame["metric_after"]).abs().max() > 0.1


# --- the notebooks


def test_each_notebook_leaves_its_files_with_the_designs_columns(results, folder):
    for name in NOTEBOOKS:
        step = name[3:]
        frame = records.read(results / f"{step}.parquet")
        assert list(frame.columns) == list(records.SCHEMA.columns)
        records.conform(frame)
        assert frame[["metric_both_before", "metric_both_after"]].notna().all(axis=None)
        assert set(frame["task"]) == {"odd_one_out"} and set(frame["layer"]) == {0, 1, 2}
        assert set(frame["ablation"]) == ABLATIONS[step]
        last = frame[frame["position"] == "last"]
        assert last["pair_id"].nunique() == 80 and last["quad_id"].nunique() == 40
        assert records.read_metadata(results / f"{step}.parquet")["candidates"] == ["a", "b", "c"]
        assert len(found(results, step)["sentences"]) >= 5 and found(results, step)["able"]
        assert (folder.parent / f"{name}.ipynb").is_file()
    joint = records.read(results / "sufficiency.slice.parquet")
    assert joint["metric_both_after"].notna().all() and set(joint["site_set"]) == set(
        range(joint["site_set"].max() + 1)
    )


def test_the_records_show_that_the_model_does_the_task(coarse):
    assert (coarse["metric_clean"] > 0).mean() > 0.95 and (coarse["metric_corrupt"] < 0).mean() > 0.95
    assert (coarse["metric_both_before"][coarse["direction"] == "noise"] > 0).mean() > 0.95
    assert (coarse["metric_both_before"][coarse["direction"] == "denoise"] < 0).mean() > 0.95


def test_the_signal_leaves_the_swapped_name_and_reaches_the_last_token(coarse):
    for direction in ("denoise", "noise"):
        curve = effects.ratios(coarse[coarse["direction"] == direction], ["position", "layer"])
        assert curve["swapped"][0] == pytest.approx(1, abs=1e-4) and curve["swapped"][2] == pytest.approx(0, abs=1e-4)
        assert curve["last"][0] == pytest.approx(0, abs=1e-4) and curve["last"][2] == pytest.approx(1, abs=1e-4)
        assert curve["swapped"][1] < 0.95 and curve["last"].is_monotonic_increasing


def test_the_clean_residual_at_the_swapped_name_gives_back_the_clean_run(coarse, model, pairs):
    rows = coarse[(coarse["position"] == "swapped") & (coarse["layer"] == 0) & (coarse["direction"] == "denoise")]
    assert (rows["logit_diff_after"] - rows["logit_diff_clean"]).abs().max() < 1e-3
    assert (rows["metric_after"] > 0).mean() > 0.8
    site, by_id = Site(0, "resid"), {pair.pair_id: pair for pair in pairs}
    for row in rows.sample(6, random_state=0).itertuples():
        pair = by_id[row.pair_id]
        with hooks.capture(model, [site], pair.clean.roles["swapped"]) as seen, torch.no_grad():
            model.model(torch.tensor([pair.clean.ids]))
        first, second = both_by_hand(model, pair, "denoise", dict(seen), "swapped")
        assert row.metric_after == pytest.approx(margin(first, pair.answer), abs=1e-3)
        assert row.metric_both_after == pytest.approx(margin(first + second, pair.answer), abs=1e-3)
        # a corrupt run is scored with the corrupt prompt's names; with the clean ones its margin is the clean run's
        with hooks.patch(model, dict(seen), pair.corrupt.roles["swapped"]), torch.no_grad():
            logits = model.model(torch.tensor([pair.corrupt.ids])).logits[0, -1].numpy()
        assert row.metric_clean == pytest.approx(margin(logits[list(pair.clean_tokens)], pair.answer), abs=1e-3)


def test_the_findings_say_what_the_numbers_say(results, coarse):
    critical = found(results, "coarse_sweep")
    assert critical["critical_layers"] and set(critical["critical_layers"]) <= {1, 2}
    assert critical["first_flip_layer"]["denoise"] in (1, 2)
    assert any(
        "At `swapped` the estimate of recovery crosses one half downwards" in sentence
        for sentence in critical["sentences"]
    )
    for step, column in (("necessity", "mean"), ("sufficiency", "clean")):
        frame = records.read(results / f"{step}.parquet")
        frame = frame[(frame["position"] == "last") & (frame["ablation"] == column)]
        frame = frame[frame["half"] == "confirmation"].assign(effect=effects.effect)
        by_site = (
            frame.groupby(["layer", "component", "head", "quad_id"])["effect"].mean().groupby(level=[0, 1, 2]).mean()
        )
        for site in found(results, step)["sites"]:
            own = by_site[site["layer"], site["component"], site["head"]]
            assert site["estimate"] == pytest.approx(own, abs=1e-9)
            if site["layer"] == 0:  # these cannot matter, and nothing may be claimed of them
                assert site["estimate"] == pytest.approx(0, abs=1e-4) and site["high"] < 0.01


def test_the_sentence_on_single_sites_follows_the_definition(results):
    sufficiency = found(results, "sufficiency")
    frame = records.read(results / "sufficiency.parquet")
    frame = frame[(frame["half"] == "confirmation") & frame["component"].isin(["head", "mlp"])]
    restored = (frame["metric_after"] > 0).groupby([frame["layer"], frame["component"], frame["head"]]).mean()
    expected = [
        site["site"]
        for site in sufficiency["sites"]
        if site["component"] != "attn"
        and restored[site["layer"], site["component"], site["head"]] >= 0.5
        and site["ratio_low"] > 0.5
    ]
    assert sufficiency["restoring"] == expected
    opening = "Single sites that restore" if expected else "No single head or MLP restores the answer"
    assert sufficiency["sentences"][0].startswith(opening)
    assert all(site["layer"] > 0 for site in sufficiency["critical_slice"])
    assert any("The critical slice" in sentence for sentence in sufficiency["sentences"])
