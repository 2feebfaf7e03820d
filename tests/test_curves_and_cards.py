"""Curves whose points can be read, and cards: their JSON, and what the book's scripts make of it in a browser."""

import json
import re
from pathlib import Path

import book_checks
import numpy as np
import pandas as pd
import pytest

from report import interactive
from steps.generality import name_rule

STEPS = pd.DataFrame({"line": ["first", "first", "second"], "x": [1, 2, 1], "estimate": [1.25, 2, -0.5]})
STEPS = STEPS.assign(low=[1, np.nan, -0.75], high=[1.5, np.nan, -0.25])
WORSE = pd.DataFrame({"line": "numbers", "x": [0, 1], "estimate": [0, 3.0], "low": [-1, 2], "high": [1, 4.0]})


def data_of(html) -> dict:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', html.data, re.S)[1])


def drawn() -> list[interactive.Panel]:
    return [
        interactive.Panel(STEPS, "names", "logit", "logits", bare={"additive": [0, 1, 2]}),
        interactive.Panel(WORSE, "rule", "error", "squared logits", "How much worse", ("OR", "AND")),
    ]


def test_curves_hold_their_points_with_intervals_and_their_lines_without():
    first, second = data_of(interactive.curves("fig", "rule", drawn()))["panels"]
    assert first["lines"] == [
        {"name": "first", "points": [[1, 125, 100, 150], [2, 200, None, None]]},
        {"name": "second", "points": [[1, -50, -75, -25]]},
        {"name": "additive", "bare": True, "points": [[0, 0], [1, 100], [2, 200]]},
    ]
    assert first["ticks"] is None and second["ticks"] == ["OR", "AND"] and second["name"] == "How much worse"


@pytest.mark.parametrize("uneven", [False, True])
def test_the_rule_is_shown_for_both_bases(uneven):
    people = pd.DataFrame({"n_a": [1, 1, 0], "n_b": [0, 1, 0]})
    terms = pd.DataFrame({"term": ["one name", "first slot", "second slot", "two names"], "estimate": [2, 2.5, 1.5, 4]})
    terms = terms.assign(low=1.0, high=5.0)
    rules = ("none", "additive", "OR", "AND", "additive by slot", "OR by slot", "free")
    errors = pd.DataFrame([(basis, rule) for basis in name_rule.BASES for rule in rules], columns=["basis", "rule"])
    errors = errors.assign(worse=np.arange(14) / 10, low=0, high=1, error=1)
    names = name_rule.Names("second", None, uneven)
    fit = name_rule.RuleResult(errors, {}, {}, terms, None, names, 0.1, 3, 3, 2)
    steps, worse = data_of(name_rule.touched(fit, people))["panels"]
    assert [line["name"] for line in steps["lines"]] == ["first slot", "second slot", "two names", *name_rule.RULES]
    assert [line["points"][0][:2] for line in steps["lines"][:3]] == [[1, 250], [1, 150], [2, 400]]
    assert worse["ticks"] == (["additive by slot", "OR by slot", "AND"] if uneven else ["additive", "OR", "AND"])
    (first, second) = ({x: y for x, y, *_ in line["points"]} for line in worse["lines"])
    assert [first[x] for x in range(3)] == ([40, 50, 30] if uneven else [10, 20, 30])
    assert [second[x] for x in range(3)] == ([110, 120, 100] if uneven else [80, 90, 100])
    assert name_rule.touched(None, people) is None


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("curves")
    interactive.save(interactive.curves("fig", "rule", drawn()), folder / "curves.html", "The rule")
    bars = pd.DataFrame({"name": ["artist", "李"], "estimate": [0.5, -1.5], "low": [0.25, None], "high": [0.75, None]})
    shown = [
        interactive.Card(
            f"neuron 3.{n}", f"tells {what} apart", {"highest": [f"{what} <b>", "Bo"]}, {"activation": bars}
        )
        for n, what in enumerate(("artist", "writer"))
    ]
    cards = interactive.cards("", "neuron", shown, pd.DataFrame({"neuron": ["3.0"], "highest": ["artist <b>"]}))
    interactive.save(cards, folder / "cards.html", "Cards")
    (folder / "bare.html").write_text(f'<!doctype html><meta charset="utf-8">{cards.data}')
    return folder


def test_points_are_read_by_keys_and_pinned_in_the_address(page):
    look = """window => {
      const told = () => window.document.querySelector(".told").innerText, seen = [told()];
      const press = key => window.document.activeElement.dispatchEvent(
        new window.KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
      window.document.querySelector(".mark[tabindex='0']").focus(); seen.push(told());
      press("ArrowRight"); seen.push(told());
      press("ArrowDown"); seen.push(told());
      press("Enter"); seen.push(window.location.hash);
      return {seen, marks: window.document.querySelectorAll(".curves .mark[role]").length,
        width: window.document.documentElement.scrollWidth};
    }"""
    fresh, cited = book_checks.looked_at(
        page, ["curves.html", "curves.html#rule=1,1,numbers"], look, width=390
    ).values()
    start, first, right, down, address = fresh["seen"]
    assert start.startswith("Each point can be read") and first == "first, names 1: 1.25 [1.00, 1.50] logits"
    assert right == "first, names 2: 2.00 (no interval: too few) logits" and fresh["marks"] == 5
    assert down == "second, names 1: −0.50 [−0.75, −0.25] logits" and "rule=0%2C1%2Csecond" in address
    assert cited["seen"][0] == "How much worse; numbers, AND: 3.00 [2.00, 4.00] squared logits"
    assert fresh["width"] <= 390


def test_a_card_is_found_unfolded_and_cited(page):
    look = """async window => {
      const all = what => [...window.document.querySelectorAll(what)];
      const open = () => all("details[open] summary").map(part => part.innerText);
      const later = () => new Promise(done => setTimeout(done, 50));
      await later();
      const seen = {start: open(), rows: all("caption + tbody tr").map(row => row.innerText)};
      const find = all("input")[0];
      if (!find) return {...seen, text: window.document.body.innerText};
      find.value = "writer"; find.dispatchEvent(new window.Event("input"));
      seen.found = all(".about").filter(card => !card.hidden).map(card => card.querySelector("strong").innerText);
      all(".about:not([hidden]) summary")[0].click();
      await later();
      return {...seen, open: open(), hash: window.location.hash, width: window.document.documentElement.scrollWidth};
    }"""
    pages = ["cards.html", "cards.html#neuron=neuron+3.0", "bare.html"]
    fresh, cited, bare = book_checks.looked_at(page, pages, look, width=390).values()
    assert fresh["start"] == [] and cited["start"] == ["neuron 3.0 tells artist apart"]
    assert [row.split("\t")[-1] for row in cited["rows"][:2]] == ["0.50 [0.25, 0.75]", "−1.50"]
    assert fresh["found"] == ["neuron 3.1"] and fresh["open"] == ["neuron 3.1 tells writer apart"]
    assert fresh["hash"] == "#neuron=neuron+3.1" and fresh["width"] <= 390
    assert "artist <b>" in bare["text"], "readers without scripts have the table"
