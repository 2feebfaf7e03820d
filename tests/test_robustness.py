"""Robustness: what is said of two tables of effects whose difference is known, and the page made of such results."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax

from bench import robustness
from bench.robustness import Effects
from pipeline import keys
from report import robustness as page

SITES = [f"{i // 9}.{i % 9}" for i in range(90)]


def table(means, noise=0.1, quads=24, seed=0, gap=5.0):
    rng = np.random.default_rng(seed)
    values = means + noise * rng.normal(size=(quads, len(means)))
    return Effects(values, np.array([f"q{i:02d}" for i in range(quads)]), np.full(quads, gap))


@pytest.fixture
def means():
    return np.sort(np.random.default_rng(1).gamma(1.0, size=90))[::-1].copy()


def test_the_same_effects_agree_and_others_do_not(means):
    same = robustness.compared(SITES, table(means), table(means, seed=1))
    assert same["rank"]["low"] > 0.97 and same["shared"]["estimate"] >= 8 and not same["signs"]
    shuffled = np.random.default_rng(2).permutation(means)
    other = robustness.compared(SITES, table(means), table(shuffled, seed=1), paired=False)
    assert abs(other["rank"]["estimate"]) < 0.3 and other["shared"]["high"] <= 3


def test_heads_that_leave_enter_and_turn_are_named(means):
    changed = means.copy()
    changed[2], changed[50], changed[0] = 0.0, means[0] + 1, -means[0]
    found = robustness.compared(SITES, table(means, 0.01), table(changed, 0.01, seed=1))
    assert {one["site"] for one in found["left"]} == {SITES[0], SITES[2]} and [
        one["site"] for one in found["signs"]
    ] == ["0.0"]
    assert SITES[50] in {one["site"] for one in found["entered"]} and found["shared"]["estimate"] == 7
    own = next(one for one in found["entered"] if one["site"] == SITES[50])
    assert own["top"] == [0.0, 1.0] and own["effects"][1] == pytest.approx(means[0] + 1, abs=0.02)
    small = robustness.compared(SITES, table(means / 1e4, 1e-6), table(-means / 1e4, 1e-6, seed=1), floor=1e-3)
    assert not small["signs"]  # below the model's noise nothing has a sign


def test_paired_tables_are_compared_on_the_quads_that_both_have(means):
    one, other = table(means), table(means, seed=3)
    few = other.of(other.quads[:20][::-1])
    assert robustness.compared(SITES, one, few)["quads"] == [20, 20]
    wanted = robustness.compared(SITES, one.of(one.quads[:20]), other.of(other.quads[:20]))
    assert robustness.compared(SITES, one, few)["rank"] == wanted["rank"]
    assert robustness.compared(SITES, one.of(one.quads[:12]), few)["rank"]["low"] is None  # too few for an interval


def test_noise_is_taken_out_of_the_agreement_and_the_interval_covers(means):
    """Noise as large as the effects: it halves the plain correlation of two tables that measure the same."""
    rng, held, other = np.random.default_rng(0), 0, means + rng_gamma(90)
    truth = robustness.correlations(means[None], other[None])[0]
    plain = []
    for _ in range(8):
        shared = 3 * rng.normal(size=(24, 90))
        tables = [own + shared + 3 * rng.normal(size=(24, 90)) for own in (means, other)]
        found = robustness.rank_agreement(*tables, paired=True)
        held += found["low"] < truth < found["high"]
        plain.append(found["plain"])
        same = robustness.rank_agreement(tables[0], means + 3 * rng.normal(size=(24, 90)), paired=False)
        held += same["low"] < 1 < same["high"]
        plain.append(same["plain"])
    assert held >= 14 and np.mean(plain[1::2]) < 0.75
    nothing = robustness.rank_agreement(rng.normal(size=(24, 90)), tables[0], paired=True)
    assert nothing["estimate"] is None and nothing["low"] is None and abs(nothing["plain"]) < 0.5


def rng_gamma(size):
    return np.random.default_rng(5).gamma(1.0, size=size)


def test_variance_components_are_the_planted_ones():
    rng = np.random.default_rng(0)
    head, template, quad = 2 * rng.normal(size=400), rng.normal(size=(12, 1, 400)), 0.5 * rng.normal(size=(1, 24, 400))
    values = head + template + quad + 3 * rng.normal(size=(12, 24, 400)) + 7 * rng.normal(size=(12, 24, 1))
    found = robustness.variances(values)
    for name, planted in {"head": 4, "template": 1, "quad": 0.25, "rest": 9}.items():
        assert found[name] == pytest.approx(planted, rel=0.15, abs=0.05)
    whole = robustness.components(values)
    assert whole["consistency"]["low"] < 0.8 < whole["consistency"]["high"]
    assert sum(whole["shares"].values()) == pytest.approx(1)


def test_of_each_leading_head_the_template_is_named_where_it_is_least():
    values = np.tile(np.arange(20, dtype=float), (3, 24, 1)) + 0.01 * np.random.default_rng(0).normal(size=(3, 24, 20))
    values[1, :, 19] = 0.0
    first = robustness.by_template([f"0.{i}" for i in range(20)], values, ["x", "y", "z"])[0]
    assert first["site"] == "0.18" and first["top"] == 3 and first["spread"] < 0.01
    turned = {
        one["site"]: one for one in robustness.by_template([f"0.{i}" for i in range(20)], values, ["x", "y", "z"])
    }
    assert (
        turned["0.19"]["where"] == "y"
        and turned["0.19"]["top"] == 2
        and turned["0.19"]["spread"] == pytest.approx(10.97, rel=0.01)
    )


def test_the_answers_log_probability_is_that_of_the_whole_vocabulary():
    rng, words = np.random.default_rng(0), ["artist", "writer"]
    places = [robustness.tasks.find_template(robustness.TEMPLATES[0]).question.supersets.index(word) for word in words]
    before, after = rng.normal(size=(2, 2, 50))
    frame = pd.DataFrame({"answer": words, "logits_before": list(before[:, :5]), "logits_after": list(after[:, :5])})
    full = [log_softmax(logits, axis=1) for logits in (before, after)]
    frame["candidate_probability_before"] = np.exp(full[0][:, :5]).sum(1)
    frame["logsumexp_after"] = np.log(np.exp(after).sum(1))
    wanted = [full[1][i, place] - full[0][i, place] for i, place in enumerate(places)]
    assert robustness.log_probability(frame).to_numpy() == pytest.approx(wanted)


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(means):
    """A result as the bench writes it, of made-up effects."""
    changed = means.copy()
    changed[3], changed[70] = 0.0, 9.0
    one, sites = table(means, 0.05), SITES
    kinds = [("half", "the other half", table(means, 0.05, seed=4), False)]
    kinds += [
        ("metric", "margin", table(means, 0.05, seed=1), True),
        ("ablation", "zero", table(changed, 0.05, seed=2), True),
    ]
    kinds += [("random weights", "random weights of the same shape", table(0 * means, 1, seed=3, gap=0.1), True)]
    rows = [
        {"group": group, "name": name} | robustness.compared(sites, one, other, paired)
        for group, name, other, paired in kinds
    ]
    texts = robustness.TEMPLATES[:3]
    values = np.stack([table(means, 0.3, seed=seed).values / 5 for seed in range(3)])
    found = {"templates": {"gaps": dict.fromkeys(texts, 5.0), "no gap": [], **robustness.components(values)}}
    found["templates"]["sites"] = robustness.by_template(sites, values, texts)
    leading = [{"site": site, "estimate": 2.0, "low": 1.0, "high": 3.0} for site in sites[:9]]
    found |= {"comparisons": rows, "leading": leading, "heads": 90, "top": 9, "quads": 24, "all quads": 40, "gap": 5.0}
    found |= {
        "model": "a model",
        "reference": "clean into corrupt",
        "seconds": 60.0,
        "commit": "0123456789",
        "dirty": False,
    }
    place = {"cores": 2, "cpu": "Some CPU", "memory_gb": 8.0, "gpus": [], "system": "Linux"}
    found |= {"machine": place, "threads": 1, "versions": {"torch": "2.13.0", "transformers": "5.23.0"}}
    return found | {"code": keys.code("lib")}


def written(found, folder):
    (folder / "robustness.json").write_text(json.dumps(found), encoding="utf-8")
    return page.fields(folder, folder / "to")


def test_the_page_says_what_stays_and_names_what_flips(measured, tmp_path):
    made = written(measured, tmp_path)
    assert "Not under at least one of the 2: `0.3`." in made["summary"] and "`0.0`, `0.1`, `0.2`" in made["summary"]
    assert "has changed since" not in made["summary"]
    assert (
        "(agreement surely above 0.9) under margin;" in made["agreements"]
        and "under zero: 8 of 9." in made["agreements"]
    )
    (line,) = (line for line in made["flips"].splitlines() if line.startswith("| zero |"))
    assert line.split("|")[2].startswith(" `0.3` (") and line.split("|")[3].startswith(" `7.7` (")
    assert "`0.3` under zero and `7.7` under zero." in made["flips"]
    assert "random" not in made["flips"] and "of either sign" not in made["flips"]
    assert "In 3 templates" in made["templates"] and made["templates"].count("\n| `0.") == 9
    assert "0.9 would be by chance" in made["random"] and "noise taken out: cannot be said" in made["random"]
    assert (tmp_path / "to" / "figures" / "robustness-agreement.png").is_file()


def test_the_page_is_marked_where_the_code_is_another_and_empty_where_nothing_is_measured(measured, tmp_path):
    assert "`lib` has changed since" in written(measured | {"code": {"lib": "another"}}, tmp_path)["summary"]
    (tmp_path / "robustness.json").unlink()
    made = page.fields(tmp_path, tmp_path / "to")
    assert page.COMMAND in made.pop("summary") and set(made.values()) == {""}
    book = (Path(page.__file__).parent.parent / "book" / "robustness.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\$(\w+)", book)) == {*made, "summary"}


def test_what_is_nowhere_is_said(measured, tmp_path):
    few = [row | {"left": [], "entered": [], "signs": []} for row in measured["comparisons"]]
    made = written(measured | {"comparisons": few}, tmp_path)
    assert "Not under at least one of the 2: none." in made["summary"] and made["flips"].startswith("Nothing: ")
    for row in few:
        row["rank"] = row["rank"] | {"estimate": 0.5, "low": None, "high": None}
    assert "it is open under margin and zero" in written(measured | {"comparisons": few}, tmp_path)["agreements"]


def test_the_committed_result_fills_the_page(tmp_path):
    results = Path(page.__file__).parent.parent / "bench" / "results"
    found, made = json.loads((results / "robustness.json").read_text(encoding="utf-8")), page.fields(results, tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", found["commit"]) and found["dirty"] is False
    assert {row["group"] for row in found["comparisons"]} >= {
        "half",
        "metric",
        "ablation",
        "template",
        "people",
        "precision",
    }
    assert len(found["templates"]["gaps"]) >= 10 and all(made.values())
