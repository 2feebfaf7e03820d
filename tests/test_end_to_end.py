"""The whole line with the profile `smoke`: make, papermill, Jupyter Book and a browser, in a copy of the tree."""

import json
import re
from pathlib import Path

import book_checks
import numpy as np
import pandas as pd
import prose
import pytest
from smoke_book import NOTEBOOKS

from lib import weights
from pipeline import assumed, costs, params
from steps.registry import PLAN


def test_the_book_is_whole_and_asks_nothing_of_the_network(smoke_tree, tmp_path):
    html = smoke_tree / "build/smoke/book/_build/html"
    assert book_checks.missing_local_files(html) == []
    assert book_checks.outside_urls(html) == []
    installed = str(Path(pytest.__file__).parents[1])
    assert book_checks.machine_paths(html, str(smoke_tree), str(Path.home()), installed) == []
    pages = [html / "index.html", html / "pairs.html", *sorted(html.glob("executed/*.html"))]
    assert len(pages) == 2 + len(NOTEBOOKS)
    for page in pages:
        assert book_checks.requests_made(page) == [], page.name


def test_every_finding_stands_on_its_page_and_the_undoable_task_is_named(smoke_tree):
    for notebook in NOTEBOOKS:
        step = notebook[3:]
        findings = json.loads((smoke_tree / f"results/smoke/{step}.findings.json").read_text())
        page = json.loads((smoke_tree / f"build/smoke/executed/{notebook}.ipynb").read_text())
        outputs = [output.get("data", {}) for cell in page["cells"] for output in cell.get("outputs", ())]
        said = "".join("".join(text) for data in outputs for text in data.values() if isinstance(text, list | str))
        assert len(findings["sentences"]) > 2
        for sentence in findings["sentences"]:
            assert sentence in said, sentence
    baselines = json.loads((smoke_tree / "results/smoke/baselines.findings.json").read_text())
    assert baselines["able"]["superset"]["able"] is True
    assert baselines["able"]["odd_one_out"]["able"] is False
    assert "cannot do `odd_one_out`" in " ".join(baselines["sentences"])


def test_what_the_pages_say_keeps_the_style_of_the_report(smoke_tree):
    texts = [*prose.of_findings(smoke_tree / "results/smoke")]
    told = [sentence for _, text in texts for sentence in prose.sentences_of(text)]
    found = prose.faults(iter(texts))
    assert [fault for fault in found if fault.rule in ("site beside a number", "something left out")] == []
    count = prose.counts(found)  # what is measured of 4 quads has no intervals, so the rule on those is not asked here
    left = {"singular and plural": 6, "none in prose": 0, "exception as prose": 15}  # these may fall, and not rise
    left |= {"more than two numbers": 24, "longer than 40 words": 18}
    assert len(told) > 450 and {rule: count[rule] for rule, most in left.items() if count[rule] > most} == {}


def test_the_page_on_single_pairs_has_the_numbers_of_the_tables(smoke_tree):
    html = (smoke_tree / "build/smoke/book/_build/html/pairs.html").read_text()
    data = json.loads(re.search(r'pair-explorer"[^>]*><script type="application/json">(.*?)</script>', html, re.S)[1])
    table = pd.read_parquet(smoke_tree / "results/smoke/sufficiency.parquet").query("position == 'last'")
    pair = table["pair_id"].iloc[0]
    at = [row[0] for row in data["pairs"]].index(pair)
    own = table[(table["pair_id"] == pair) & (table["component"] == "mlp")].set_index("layer")
    grid, size = data["map"], len(data["map"]["layers"])
    rows = grid["lines"].index("mlp") * size + np.arange(size)
    shown = np.array(grid["values"][at])[[grid["places"].index(row) for row in rows]]
    change = 100 * (own["logit_diff_after"] - own["logit_diff_before"]).loc[grid["layers"]]
    np.testing.assert_allclose(shown, change, atol=0.51)
    assert all(data[part]["values"][at] for part in ("curves", "looks")) and data["logits"]["clean"][at]
    words = data["words"]["own"][at]["clean"]
    assert ["".join(tokens).strip() for tokens in words] == data["pairs"][at][4]


def test_directions_of_the_book_agree_with_each_other_and_with_the_coarse_sweep(smoke_tree):
    def table(name: str) -> pd.DataFrame:
        return pd.read_parquet(smoke_tree / f"results/smoke/{name}.parquet")

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


# Tables whose units depend on what the run chose: the planner assumes as many rounds of widening, heads whose path is
# ablated, and sites at the names as the default book found, pairs that line up in another template, too, and every
# superset in the fitting half; on a handful of pairs fewer are found, or none.
CHOSEN = {
    "sufficiency": {"others"},
    "hydra": {"round1", "joint1"},
    "retrieval_heads": {"confirmed", "ablation", "edges"},
    "subspace": {"direction_transfer", "direction_placebo"},
}


# Of which a unit more or less may run: which names line up in another template, and with how many tokens, is not known
# before they are put into it.
ROUGH = {"generality": {"placebo"}}


@pytest.mark.parametrize("step", PLAN.names)
def test_the_plan_has_the_tables_and_the_units_of_the_run(smoke_tree, step):
    """One declaration: what `make plan` counts is what the notebook ran, table by table and unit by unit."""
    given = params.load_profile("smoke") | {"results_dir": str(smoke_tree / "results/smoke")}
    shape, place = weights.shape_of(weights.config_of(given["model"])), costs.Machine(2.0, "float32")
    case = assumed.case_of(PLAN, step, given, shape, place)
    planned = {table.name: len(table.units(case, *chosen)) for table, *chosen in PLAN[step].assumed(case)}
    record = json.loads((smoke_tree / f"results/smoke/{step}.run.json").read_text())["tables"]
    ran = {name.removeprefix(f"{step}."): table["units"] for name, table in record.items()}
    chosen, rough = CHOSEN.get(step, set()), ROUGH.get(step, set())
    assert set(ran) <= set(planned) and set(planned) - set(ran) <= chosen
    exact = set(ran) - chosen - rough
    assert {name: planned[name] for name in exact} == {name: ran[name] for name in exact}
    assert all(abs(ran[name] - planned[name]) <= 2 for name in rough)
    assert all(ran[name] <= planned[name] for name in chosen & set(ran))
