"""The circuit over all tokens: its ranking against finite differences, its search and its page on known circuits."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from test_circuits import EVERYWHERE
from test_hydra import norm64
from test_sweep import PAIRS

from lib import hooks, records
from pipeline import params
from report import plots
from steps.registry import PLAN
from steps.story import circuits, everywhere, everywhere_page, graph_page, measure
from steps.story.circuits import Circuit

P = params.validate(PLAN.sections, "story", params.load_profile("smoke") | {"random_sets": 2, "everywhere_limit": 8})
WORTH = {"mlp 0 at names": 0.4, "1.1 at between": 0.2, "2.0 at last": 0.3, "mlp 2 at last": 0.1}


def test_slopes_are_those_of_finite_differences(tiny, monkeypatch):
    model, pair, part, step = tiny("llama"), PAIRS[1], 0.3, 1e-5
    monkeypatch.setattr(type(model.final_norm), "forward", norm64)  # norms compute in fp32, too coarse for small steps
    (batch,) = circuits.ready(model, [pair], ablations=("counterfactual",), roles=circuits.EVERYWHERE)
    found, tokens = everywhere.slopes(model, batch, part), list(circuits.tokens_of(pair, circuits.EVERYWHERE))
    with torch.no_grad():
        ends = (run["embed", -1] for run in (batch.sources, batch.base.activations))
        embedding = {hooks.EMBED: torch.lerp(*ends, part)}
        for site in hooks.all_sites(model, ("head", "mlp"))[::3]:
            moved = batch.base.activations[site.component, site.layer] - batch.sources[site.component, site.layer]
            columns, values = hooks.columns_of(model, site), []
            with hooks.patch(model, embedding, tokens), hooks.capture(model, [site], tokens) as seen:
                model.model(torch.tensor([pair.clean.ids]))
            for sign in (1, -1):
                patched = {site: seen[site] + sign * step * moved[..., columns]}
                with hooks.patch(model, embedding, tokens), hooks.patch(model, patched, tokens):
                    logits = model.model(torch.tensor([pair.clean.ids])).logits[0, -1]
                own, other = (pair.clean_tokens[answer] for answer in (pair.answer, pair.corrupt_answer))
                values.append((logits[own] - logits[other]).item())
            slope = (moved * found[site.component, site.layer])[..., columns].sum().item()
            assert slope == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-6)


def test_attribution_goes_to_the_nodes_own_role(tiny):
    """Tokens are summed by role."""
    model = tiny("llama")
    (batch,) = circuits.ready(model, PAIRS[:2], ablations=("counterfactual",), roles=circuits.EVERYWHERE)
    total = everywhere.attributed(model, batch)
    points = [everywhere.slopes(model, batch, (n + 0.5) / everywhere.POINTS) for n in range(everywhere.POINTS)]
    moved = batch.base.activations["mlp", 1] - batch.sources["mlp", 1]
    each = (moved * torch.stack([point["mlp", 1] for point in points]).mean(0)).sum((0, -1)).numpy()
    assert total.shape == (3, 5, 4)
    assert total[1, -1] == pytest.approx([each[[0, 1, 3]].sum(), each[2], each[[4, 5]].sum(), each[6]], abs=1e-12)
    still = replace(batch, sources=batch.base.activations)
    assert not everywhere.attributed(model, still).any(), "what the donor does not move adds nothing"
    nodes = [f"{hooks.site_name(*site)} at names" for site in hooks.all_sites(model, ("head", "mlp"))]
    order = everywhere.ranking(model, [batch], nodes)
    assert sorted(order) == sorted(nodes) and order[0] == nodes[total[..., 0].argmax()]


def test_the_fewest_that_reach_a_share():
    asked = []

    def keep(sizes):
        asked.extend(sizes)
        return [0.9 if size in (3, 7) or size >= 61 else size / 100 for size in sizes]

    assert everywhere.fewest(keep, [5, 10, 20, 40, 80], 0.8)[0] == 61
    assert len(asked) < 25 and len(set(asked)) == len(asked)
    size, tested = everywhere.fewest(keep, [2, 4, 8], 0.8)
    assert (size, tested) == (8, {2: 0.02, 4: 0.04, 8: 0.08}), "never reached: the most"
    assert everywhere.fewest(lambda sizes: [1.0] * len(sizes), [5, 10], 0.8)[0] == 1
    assert everywhere.ladder(30) == [5, 10, 20, 30] and everywhere.ladder(5) == [5]


def test_the_search_cuts_the_ranking_and_prunes_what_is_spare(tiny, monkeypatch):
    nodes = [f"{hooks.site_name(*site)} at {role}" for role in circuits.EVERYWHERE for site in hooks.all_sites(
        tiny("llama"), ("head", "mlp"))]  # fmt: skip
    order = [*nodes[:3], "mlp 0 at names", *nodes[5:9], "2.0 at last", "1.1 at between", *nodes[20:25], "mlp 2 at last"]
    order = [*dict.fromkeys(order), *(node for node in nodes if node not in order)]

    def logits(model, batch, tested):
        out = np.zeros((2 + len(tested), 1, len(batch.pairs), 4))
        for row, circuit in zip(out, (circuits.ALL, circuits.NOTHING, *tested), strict=True):
            for index, pair in enumerate(batch.pairs):
                row[0, index, pair.answer] = sum(v for k, v in WORTH.items() if (k in circuit.sites) == circuit.only)
        return out

    monkeypatch.setattr(circuits, "scored", logits)
    monkeypatch.setattr(everywhere, "ranking", lambda model, batches, sites: order)
    monkeypatch.setattr(everywhere, "CHUNKS", (4, 1))
    frame = everywhere.search(tiny("llama"), PAIRS, nodes, share=0.85, limit=40, pool=PAIRS)
    records.conform(frame, everywhere.SCHEMA)
    assert measure.grown(frame) == order[: order.index("1.1 at between") + 1]
    assert set(measure.circuit_of(frame)) == {"mlp 0 at names", "2.0 at last", "1.1 at between"}
    tested = frame[(frame["phase"] == "grow") & frame["faithfulness"].notna()].set_index("round")["faithfulness"]
    assert tested[order.index("1.1 at between")] == pytest.approx(0.9) and tested[39] == pytest.approx(1.0)
    less = everywhere.search(tiny("llama"), PAIRS, nodes, share=0.95, limit=10, pool=PAIRS)
    assert len(measure.grown(less)) == 10 and len(measure.circuit_of(less)) == 3, "not reached: the most, pruned"
    monkeypatch.setattr(circuits, "scored", lambda *a: np.zeros((2, 1, len(a[1].pairs), 4)))
    assert everywhere.search(tiny("llama"), PAIRS, nodes, share=0.9, limit=8, pool=PAIRS).empty


def test_everything_is_the_sum_of_the_roles_that_are_tested(tiny):
    """On a real pass: a circuit that has all nodes is the model, one that lacks a role is not."""
    model = tiny("llama")
    nodes = [f"{hooks.site_name(*site)} at {role}" for role in circuits.EVERYWHERE for site in hooks.all_sites(
        model, ("head", "mlp"))]  # fmt: skip
    tests = {"all": Circuit(True, tuple(nodes)), "none": Circuit(False, tuple(nodes)), **EVERYWHERE}
    tests["no names"] = Circuit(True, tuple(node for node in nodes if not node.endswith("names")))
    frame = circuits.run(model, PAIRS[:2], tests, pool=PAIRS, roles=circuits.EVERYWHERE)
    wide = frame.pivot(index="pair_id", columns="test", values="logit_diff")
    assert (wide["all"] - wide["everything"]).abs().max() < 1e-9 and (wide["none"] - wide["nothing"]).abs().max() < 1e-9
    assert (wide["no names"] - wide["everything"]).abs().min() > 1e-3


# --- the page -----------------------------------------------------------------------------------------------------


@pytest.fixture
def measured():
    """Additive nodes of known worth; 0.3 at last is spare and was kept. 24 quads of other sizes."""
    rng, sites = np.random.default_rng(0), [*WORTH, "0.3 at last"]
    nodes = [f"{site} at {role}" for role in circuits.EVERYWHERE for site in ("0.3", "mlp 0", "1.1", "2.0", "mlp 2")]
    order = [*sites, *(node for node in nodes if node not in sites)]
    rows = [("grow", at, site, 1.0 if at == 4 else None, at < 5) for at, site in enumerate(order)]
    search = pd.DataFrame(rows, columns=list(everywhere.SCHEMA.columns))
    others = {"slice": ["2.0"], "last": ["2.0", "mlp 2"]}
    subsets, tests = measure.everywhere_tests(search, others, nodes, P, rng)
    rows = []
    for quad in range(24):
        for name, circuit in (tests | {"everything": circuits.ALL, "nothing": circuits.NOTHING}).items():
            kept = [node for node in nodes if (node in circuit.sites) == circuit.only]
            value = 1 + (2 + 0.1 * quad) * sum(WORTH.get(node, 0) for node in kept)
            about = {"half": "confirmation", "quad_id": f"q{quad}", "pair_id": f"p{quad}", "ablation": "resample"}
            rows.append(about | {"test": name, "logit_diff": value, "metric": value - 2})
    return measure.Everywhere(nodes, search, subsets, tests, "resample", pd.DataFrame(rows))


def test_random_circuits_have_as_many_nodes_at_each_role(measured):
    for number in range(2):
        drawn = measured.tests[f"random 5 {number}"].sites
        assert measure.at_roles(drawn) == measure.at_roles(measured.tests["circuit"].sites) and len(set(drawn)) == 5
    assert "random 10 0" not in measured.tests, "beyond the limit"
    assert measured.tests["slice there"].sites == ("0.3 at last", "mlp 0 at last", "1.1 at last", "mlp 2 at last")
    assert {name for name in measured.tests if name.startswith("single ")} == {
        f"single {site} at last" for site in ("2.0", "mlp 2", "0.3")
    }


def test_the_numbers_tables_and_sentences_of_a_known_circuit(measured):
    found = everywhere_page.numbers(measured, P)
    assert found["size"] == 5 and found["faithfulness"]["estimate"] == pytest.approx(1)
    assert found["failing"] == ["0.3 at last"] and found["necessity"]["estimate"] == pytest.approx(0)
    assert {row["role"]: (row["nodes"], row["of"], round(row["estimate"], 9)) for row in found["roles"]} == {
        "names": (1, 5, 0.6), "between": (1, 5, 0.8), "last": (3, 5, 0.6),
    }  # fmt: skip
    kept = {name: [round(row["estimate"], 9) for row in tests.values()] for name, tests in found["sets"].items()}
    assert kept == {"slice": [0.9, 0.3, 0.7], "last": [1.0, 0.4, 0.6], "everywhere": [1.0, 1.0, 0.0]}
    assert found["over_random"]["low"] > 0 and found["random"]["estimate"] < 0.7
    text = " ".join(everywhere_page.sentences(found, P))
    assert "5 of 20 nodes" in text and "one at the names, one at the tokens after the names and three at the" in text
    assert "| it | 1.00 [1.00, 1.00] | " in text and "| the circuit at the last token | 0.40" in text
    assert "nan" not in text
    pruned = " ".join(everywhere_page.sentences(found | {"grown": 8}, P))
    assert "The first 10 by attribution, before pruning, keep 1.00 [" in pruned
    assert "before pruning" not in text
    step, m = SimpleNamespace(params=P), SimpleNamespace(everywhere=measured)
    joint = everywhere_page.joint_table(step, m)
    assert joint.columns.tolist() == [
        "slice (step 04) (1)", "circuit at the last token (2)", "circuit over all tokens (5)"
    ]  # fmt: skip
    assert joint.iloc[1].str[:4].tolist() == ["0.30", "0.40", "1.00"]
    sites = everywhere_page.site_table(step, m)
    assert sites.index.tolist() == ["2.0", "mlp 2", "0.3"]
    assert sites.iloc[:, 0].tolist() == ["yes", "", ""] and sites.iloc[:, 1].tolist() == ["yes", "yes", ""]
    assert sites.iloc[:, 2].tolist() == ["last"] * 3
    assert sites.iloc[:, 3].str[:3].tolist() == ["0.9", "0.3", "0.0"]  # 0.3 and 0.1 x the mean scale of 3.15
    assert [(row["nodes"], round(row["estimate"], 9)) for row in found["curve"]] == [(5, 1.0), (10, 1.0), (20, 1.0)]
    figure = everywhere_page.curve(step, m)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[1].get_lines()}
    assert lines["the last token"][[0, -1]].tolist() == [3, 5] and figure.axes[0].get_xscale() == "log"
    assert figure.axes[1].get_lines()[0].get_xdata().tolist() == [5, 10, 20]
    assert found["without_random"]["estimate"] == pytest.approx(1 - found["random"]["estimate"])


def test_a_circuit_over_all_tokens_is_judged_where_some_circuit_could_pass():
    kept = {"estimate": 0.48, "low": 0.21, "high": 0.75}
    low, high = ({"nodes": nodes, "estimate": 0.7, "low": end, "high": 1.0} for nodes, end in ((160, 0.37), (320, 0.6)))
    whole = {"nodes": 1200, "estimate": 1.0, "low": 1.0, "high": 1.0}
    assert everywhere_page.judged(kept, [low, high, whole], 1200, P) == kept
    why = everywhere_page.judged(kept, [low, whole], 1200, P)["why"]
    assert why.startswith("0.48 [0.21, 0.75]; no circuit of fewer than all 1200 nodes") and "first 160" in why
    passing = kept | {"low": 0.55}
    assert everywhere_page.judged(passing, [low, whole], 1200, P) == passing
    few = kept | {"low": None}
    assert everywhere_page.judged(few, [low, whole], 1200, P) == few


def test_a_curve_that_never_reaches_the_share_and_no_circuit_are_said(measured):
    less = measured.search.assign(faithfulness=0.4)
    text = " ".join(everywhere_page.sentences(everywhere_page.numbers(measured._replace(search=less), P), P))
    assert "keep 0.40 of what the model has" in text and "less than the 0.8 asked for, and no more were tried" in text
    none = everywhere_page.numbers(measured._replace(search=less.head(0)), P)
    assert everywhere_page.sentences(none, P)[0].startswith("No circuit over all tokens was searched for")
    few = measured.tested[measured.tested["quad_id"].isin(["q0", "q1"])]
    text = everywhere_page.sentences(everywhere_page.numbers(measured._replace(tested=few), P), P)
    assert "too few quads" in " ".join(text) and "nan" not in " ".join(text)


def test_the_graph_has_the_sites_of_both_circuits_and_the_paths_of_step_06():
    rows = [("names", "mlp 0 at names", 2.0), ("mlp 0 at names", "2.1", 1.0), ("2.1", "answer", 0.5)]
    edges = pd.DataFrame(rows, columns=["source", "target", "estimate"])
    everywhere = ["mlp 0 at names", "1.1 at between", "mlp 2 at last", "0.1 at names"]
    found = graph_page.graph(edges, everywhere, ["mlp 2", "2.0"])
    assert found.lanes == [
        ("names", ["names"]),
        ("at the names", ["0.1 at names", "mlp 0 at names"]),
        ("after them", ["1.1 at between"]),
        ("last token", ["2.0", "2.1", "mlp 2"]),
        ("answer", ["answer"]),
    ]
    assert "2.1" not in found.kept and set(found.kept) == {*everywhere[:2], "mlp 2", "0.1 at names", "2.0"}
    many = graph_page.graph(edges.iloc[:0], [f"{layer}.0 at last" for layer in range(60)], ["7.0"])
    assert [name for name, _ in many.lanes] == ["last token"], "without paths there are no names and no answer"
    assert len(many.kept) == graph_page.NODES and many.hidden == 20
    assert len(plots.circuit_graph(many.lanes, many.edges.assign(significant=False), many.kept).axes[0].texts) > 40


def test_a_note_says_in_which_circuit_a_site_is_and_what_its_removal_costs():
    cost = pd.DataFrame(
        {"site": ["1.1 at names", "2.0"], "estimate": [0.5, 0.25], "low": [0.4, None], "high": [0.6, None]}
    )
    circuits = {"over all tokens": (["1.1 at names", "1.1 at last"], cost), "at the last token": (["2.0", "1.1"], cost)}
    assert graph_page.notes(circuits) == {
        "1.1": "in the circuit over all tokens at names (removal costs it 0.50 [0.40, 0.60] logits) and at last ("
        "removal not tested); in the circuit at the last token (removal not tested)",
        "2.0": "in the circuit at the last token (removal costs it 0.25 logits)",
    }
