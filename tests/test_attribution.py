"""Gradient attribution against finite differences and exact patching, and the numbers of the page on known tables."""

import numpy as np
import pandas as pd
import pytest
import torch
from test_hydra import norm64
from test_sweep import PAIRS

from lib import hooks, records
from lib.batches import both_runs
from lib.single_pass import base_run
from pipeline import params
from steps.registry import PLAN
from steps.story import attribution, circuits_page, measure
from steps.story.circuits import SEARCH_SCHEMA, Circuit

P = params.validate(PLAN.sections, "story", params.load_profile("smoke") | {"random_sets": 2, "circuit_limit": 4})
IDENTITY = ["pair_id", "layer", "component", "head"]


def logit_diff(model, pair):
    logits = model.model(torch.tensor([pair.clean.ids])).logits[0, -1]
    return (logits[pair.clean_tokens[pair.answer]] - logits[pair.clean_tokens[pair.corrupt_answer]]).item()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_estimates_are_slopes_and_grad_drop_leaves_a_layer_out(tiny, name, monkeypatch):
    model, pair = tiny(name), PAIRS[1]
    if name != "gpt2":  # norms compute in fp32, too coarse for small steps
        monkeypatch.setattr(type(model.final_norm), "forward", norm64)
    frame = attribution.attribute(model, PAIRS[:2])
    records.conform(frame, attribution.SCHEMA)
    rows, step = frame.set_index(IDENTITY), 1e-5
    sites = hooks.all_sites(model, ("head", "mlp"))
    with torch.no_grad():
        runs = []
        for prompt in (pair.clean, pair.corrupt):
            with hooks.capture(model, sites, [9]) as seen:
                model.model(torch.tensor([prompt.ids]))
            runs.append(dict(seen))
        for site in sites:
            ends = []
            for sign in (1, -1):
                value = runs[0][site] + sign * step * (runs[1][site] - runs[0][site])
                with hooks.patch(model, {site: value}, [9]):
                    ends.append(logit_diff(model, pair))
            slope = -(ends[0] - ends[1]) / (2 * step)
            row = rows.loc[(pair.pair_id, site.layer, site.component, site.head)]
            assert row["atp"] == pytest.approx(slope, abs=1e-6 * max(1, abs(slope)))
            assert row["atp_qk"] == row["atp"]
    # the last layer has nothing behind it: dropping any other layer leaves its own estimate, dropping it leaves nothing
    last = rows.xs(2, level="layer").query("component == 'mlp'")
    assert last["grad_drop"].to_numpy() == pytest.approx(last["atp"].abs().to_numpy(), rel=1e-6)
    assert (frame["grad_drop"] >= 0).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_the_fix_is_exact_where_what_follows_is_linear(tiny, name):
    """A query acts on its head's output alone: (fixed - exact) is what the network bends, and vanishes with it."""
    model = tiny(name)
    clean, corrupt = both_runs(model, PAIRS[:2], PAIRS[0].clean.roles["last"], attribution.KEPT)
    queries, heads = attribution.queried(model, clean, corrupt)
    layer = 1
    with torch.no_grad():
        seen = {}
        first = attribution.on_queries(model, layer, lambda q: torch.cat([q[:, :-1], queries["query", layer]], dim=1))
        second = hooks.on_activation(model, layer, "head", lambda z: seen.update(z=z[:, -1:].clone()))
        model.body(input_ids=clean.ids, use_cache=False)
        first.remove()
        second.remove()
    assert (seen["z"] - heads["head", layer]).abs().max() < 1e-9
    assert (heads["head", layer] - clean.activations["head", layer]).abs().max() > 1e-3
    same = attribution.queried(model, clean, clean)[1]
    assert (same["head", layer] - clean.activations["head", layer]).abs().max() < 1e-9


def test_exact_effects_are_those_of_patching(tiny):
    model, pair = tiny("llama"), PAIRS[0]
    frame = attribution.exact(model, [pair])
    records.conform(frame, attribution.EXACT_SCHEMA)
    rows = frame.set_index(IDENTITY)["exact"]
    assert len(rows) == 3 * (4 + 4 + 1)
    runs = [base_run(model, torch.tensor([prompt.ids]), [9]) for prompt in (pair.clean, pair.corrupt)]
    values = {"query": attribution.queried(model, *runs)[1]["head", 1], "head": runs[1].activations["head", 1]}
    with torch.no_grad():
        plain = logit_diff(model, pair)
        for component, value in values.items():
            site = hooks.Site(1, "head", 2)
            with hooks.patch(model, {site: value[..., hooks.columns_of(model, site)]}, [9]):
                wanted = plain - logit_diff(model, pair)
            assert rows[pair.pair_id, 1, component, 2] == pytest.approx(wanted, abs=1e-6)


# --- the page's numbers -------------------------------------------------------------------------------------------


def test_curves_areas_members_and_completeness_by_hand():
    """Three additive sites of worth 0.5, 0.3 and 0.2 and a spare one, over 24 quads of other sizes."""
    rng, sites = np.random.default_rng(0), ["0.0", "0.1", "mlp 0", "0.2"]
    worth = dict(zip(sites, (0.5, 0.3, 0.2, 0.0), strict=True))
    tested = [("grow", i, site, sum(list(worth.values())[: i + 1]), True) for i, site in enumerate(sites)]
    tested += [("prune", 0, "0.2", 1.0, True), ("prune", 1, "mlp 0", 0.8, False)]
    search = pd.DataFrame(tested, columns=list(SEARCH_SCHEMA.columns))
    assert measure.circuit_of(search) == sites[:3] and measure.grown(search) == sites
    subsets = measure.subsets_of(sites[:3], 3, rng)
    assert all(0 < len(own) < 3 for own in subsets)
    orders = {"damage": sites[::-1]}
    tests = measure.tests_of(search, orders, sites, subsets, P, rng)
    tests |= {"everything": Circuit(False, ()), "nothing": Circuit(True, ())}
    rows = []
    for quad in range(24):
        scale = 2 + 0.1 * quad
        for name, circuit in tests.items():
            kept = set(circuit.sites) if circuit.only else set(sites) - set(circuit.sites)
            value = 1 + scale * sum(worth[site] for site in kept)
            about = {"half": "confirmation", "quad_id": f"q{quad}", "pair_id": f"p{quad}", "ablation": "resample"}
            rows.append(about | {"test": name, "logit_diff": value, "metric": value - 2})
    frame = pd.DataFrame(rows)
    curve, areas = circuits_page.curves(frame, P), circuits_page.areas(frame, P)
    found = curve[curve["order"] == "circuit"].set_index("n_sites")["estimate"]
    assert found.to_dict() == pytest.approx({1: 0.5, 2: 0.8, 3: 1.0, 4: 1.0})
    area = areas.set_index("order")["estimate"]
    assert area["circuit"] == pytest.approx((0.25 + 0.65 + 0.9 + 1.0) / 4)
    assert area["damage"] == pytest.approx((0 + 0.1 + 0.35 + 0.75) / 4)
    assert areas.set_index("order")["minus_estimate"]["damage"] == pytest.approx(area["circuit"] - area["damage"])
    m = measure.Measured(sites, search, None, None, subsets, tests, "resample", frame)
    numbers = circuits_page.circuit_numbers(m, ["0.0", "0.3"], P)
    assert numbers["size"] == 3 and numbers["grown"] == 4 and numbers["reached"]
    assert numbers["faithfulness"]["estimate"] == pytest.approx(1) and numbers["necessity"]["estimate"] == 0
    assert numbers["weakest"]["site"] == "mlp 0" and numbers["weakest"]["share"] == pytest.approx(0.2)
    assert numbers["failing"] == [] and numbers["incompleteness"]["estimate"] == pytest.approx(0, abs=1e-9)
    assert numbers["overlap"]["sites"] == ["0.0"] and numbers["faithfulness_counterfactual"] is None
    # a backup: without any member the model keeps 0.3 more than the circuit does
    backed = frame.assign(logit_diff=frame["logit_diff"] + 0.3 * frame["test"].str.startswith("model "))
    worst = circuits_page.incompleteness(circuits_page.without_subsets(backed, P), subsets)
    assert worst["estimate"] == pytest.approx(0.3 / (2 + 0.1 * 11.5)) and worst["low"] <= worst["estimate"]
    text = " ".join(circuits_page.circuit_sentences(numbers, P))
    assert (
        "head 0.0, head 0.1 and mlp 0" in text
        and "Necessity, that less than half is left with the circuit" in text
        and "nan" not in text
    )
    few = frame[frame["quad_id"].isin(["q0", "q1"])]
    numbers = circuits_page.circuit_numbers(m._replace(tested=few), ["0.0"], P)
    assert "too few quads" in " ".join(circuits_page.circuit_sentences(numbers, P))
    none = circuits_page.circuit_numbers(m._replace(search=search.head(0), subsets=[]), ["0.0"], P)
    assert "No circuit was searched for" in circuits_page.circuit_sentences(none, P)[0]


def test_the_search_is_behind_only_where_the_difference_is_shown():
    ends = {"recovery": (-0.2, -0.1), "damage": (-0.1, 0.1), "attribution": (None, None), "random": (0.5, 0.6)}
    rows = [{"order": "circuit", "size": 9, "estimate": 0.7, "low": 0.6, "high": 0.8}]
    rows += [{"order": order, "estimate": 0.8, "low": 0.7, "high": 0.9, "minus_estimate": -0.1, "minus_low": low,
              "minus_high": high} for order, (low, high) in ends.items()]  # fmt: skip
    assert (
        circuits_page.at_size_sentence(rows)
        .partition("\n\n")[0]
        .endswith(
            ". At this size the search is ahead of random, behind recovery (step 04) and not shown to differ from "
            "damage and attribution (each interval by itself)."
        )
    )
    assert "At this size" not in circuits_page.at_size_sentence(rows[:1])


def test_a_ranking_takes_the_discovery_half_and_the_sites_asked_for():
    table = pd.DataFrame(
        [("confirmation", 0, "head", 1, 9.0), ("discovery", 0, "head", 1, 1.0), ("discovery", 0, "query", 1, 8.0)]
        + [("discovery", 1, "mlp", -1, 3.0), ("discovery", 1, "mlp", -1, 0.0), ("discovery", 2, "mlp", -1, 7.0)],
        columns=["half", "layer", "component", "head", "exact"],
    )
    assert measure.ranked(table, "exact", ["0.1", "mlp 1", "0.0"]) == ["mlp 1", "0.1"]


def test_what_attribution_finds_and_costs():
    rng, rows = np.random.default_rng(1), []
    truth = np.linspace(-1, 2, 30)
    for quad in range(24):
        for head, value in enumerate(truth):
            about = {"pair_id": f"p{quad}", "quad_id": f"q{quad}", "half": "discovery", "layer": 0, "head": head}
            real = value + 0.01 * rng.normal()
            guess = {"atp": 0.0 if head == 29 else real, "atp_qk": real, "grad_drop": abs(real)}
            rows += [about | {"component": kind, "exact": real, **guess} for kind in ("head", "query")]
    both = pd.DataFrame(rows)
    beside = circuits_page.beside_exact(both.drop(columns="exact"), both[[*IDENTITY, "quad_id", "half", "exact"]])
    table, means = circuits_page.compared(beside, P), circuits_page.node_means(beside)
    found = table.set_index(["nodes", "method"])
    assert len(means) == 60 and ("sites", "atp_qk") not in found.index
    assert found.loc[("queries", "atp"), "missed"] == ["0.29"] and found.loc[("queries", "atp"), "top10"] == 0.9
    fixed = found.loc[("queries", "atp_qk")]
    assert fixed["estimate"] > 0.99 > found.loc[("queries", "atp"), "estimate"] and fixed["signs"] == 1
    costs = circuits_page.cost(30, 9, 20).set_index("method")
    assert costs.loc["exact", "token_layers"] == 4650 and costs.loc["atp", "ratio"] == 77.5
    text = " ".join(circuits_page.attribution_sentences(table, costs.reset_index(), 24))
    assert "| 0.29 |" in text and "78 times" in text
    assert text.count("| no sign |") == 2, "GradDrop has no sign, for sites and for queries"
