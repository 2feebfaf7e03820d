"""The page on single pairs: what it reads of the steps' tables, what it says is missing, and how it is chosen from."""

import json
import re
from html import escape
from pathlib import Path

import book_checks
import pandas as pd
import pytest
from IPython.display import HTML
from markdown_it import MarkdownIt

from lib import questions, records
from pipeline.step import Remembered
from report import interactive, pairs

ARTISTS = [("Brad Pitt", "Pablo Picasso"), ("Bob Dylan", "David Bowie"), ("Johnny Cash", "Frida Kahlo")]
SCIENTISTS = [("Isaac Newton", "Albert Einstein"), ("Marie Curie", "Niels Bohr"), ("Max Planck", "Alan Turing")]
QUADS = tuple(zip(ARTISTS, SCIENTISTS, strict=True))
TOPIC = questions.load(questions.DEFAULT)


def asked(names=QUADS) -> pd.DataFrame:
    """A table of pairs as step 01 leaves it; the gap of the n-th is 4 + n."""
    rows = []
    for number, (clean, corrupt) in enumerate(names):
        people = {"clean_a": clean[0], "clean_b": clean[1], "corrupt_a": corrupt[0], "corrupt_b": corrupt[1]}
        rows.append(people | {"pair_id": f"q{number}", "half": "confirmation", "logit_diff_clean": 3.0 + number})
    about = {"task": "superset", "template": "profession_both", "answer": "artist", "corrupt_answer": "scientist"}
    return pd.DataFrame(rows).assign(**about, logit_diff_corrupt=-1.0, clean_c="", corrupt_c="")


def swept(table: pd.DataFrame, layers: int, heads: int, direction: str, position: str, resid: bool) -> pd.DataFrame:
    """A sweep in which layer l, head h, moves logit_diff of the n-th pair by l + h / 10 + n / 100."""
    parts = [("head", head) for head in range(heads)] + [("attn", -1), ("mlp", -1)]
    sites = [(layer, *part) for layer in range(layers) for part in ([("resid", -1)] if resid else parts)]
    frame = pd.DataFrame(sites, columns=["layer", "component", "head"]).merge(table[["pair_id"]], how="cross")
    change = frame["layer"] + frame["head"].clip(0) / 10 + frame["pair_id"].str[1:].astype(int) / 100
    sign = 1 if direction == "denoise" else -1
    plain = {"denoise": [-1.0, 1.5], "noise": [2.5, 0.5]}[direction]
    frame = frame.assign(
        direction=direction, position=position, logit_diff_before=0.0, logits_before=[plain] * len(frame)
    )
    return frame.assign(logit_diff_after=sign * change)


def left(folder: Path, table: pd.DataFrame, layers: int = 3, heads: int = 2, tokenizer=None) -> Path:
    """A results folder with what steps 01, 02, 04 and 06 leave of these pairs."""
    about = {"candidates": ["artist", "scientist"]}
    records.write(folder / pairs.PAIRS[1], table, {}, None)
    curves = [
        swept(table, layers, heads, *how, True)
        for how in (("denoise", "last"), ("noise", "last"), ("denoise", "names"))
    ]
    records.write(folder / pairs.LAYERS[1], pd.concat(curves), about, None)
    records.write(folder / pairs.SITES[1], swept(table, layers, heads, "denoise", "last", False), about, None)
    heads_of = swept(table, layers, heads, "denoise", "last", False).query("component == 'head'")[
        ["pair_id", "layer", "head"]
    ]
    looks = heads_of.merge(pd.DataFrame({"onto": ["name_a", "name_b"], "share": [0.25, 0.5]}), how="cross")
    records.write(folder / pairs.ATTENTION[1], looks.assign(position="last", uniform=0.125), {}, None)
    if tokenizer is not None:
        step, given = pairs.SITES[0], {"chat_template": False, "attributes": ["profession"]}
        (folder / f"{step}.run.json").write_text(json.dumps({"step": step, "parameters": given}))
        words = Remembered(lambda: tokenizer)
        pairs.split(table, words, TOPIC, **given)
        words.keep(folder / f"{step}.tokens.parquet")
    return folder


def data_of(fields: dict) -> dict:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', fields["figure"], re.S)[1])


def test_a_pair_has_its_own_numbers_from_every_table(tmp_path, smollm_tokenizer):
    fields = pairs.fields(left(tmp_path, asked(), tokenizer=smollm_tokenizer), tmp_path, TOPIC)
    data = data_of(fields)
    at = [pair[0] for pair in data["pairs"]].index("q1")
    assert data["pairs"][at][1:4] == ["confirmation", "artist", "scientist"]
    assert data["pairs"][at][4:] == [["Bob Dylan", "David Bowie"], ["Marie Curie", "Niels Bohr"], 400, -100]
    words = data["words"]
    assert words["around"] == [["The", " profession", " of"], [" and"], [" is", " that", " they", " are", " both"]]
    assert words["own"][at]["clean"] == [[" Bob", " D", "ylan"], [" David", " Bow", "ie"]]
    assert data["logits"]["clean"][at] == [250, 50] and data["logits"]["corrupt"][at] == [-100, 150]
    assert data["curves"]["shown"] == [["denoise", "last"], ["noise", "last"], ["denoise", "names"]]
    assert data["curves"]["values"][at] == [1, 101, 201] * 3
    grid = data["map"]
    assert grid["lines"] == ["1", "0", "attn", "mlp"] and grid["values"][at] == [11, 111, 211] + [1, 101, 201] * 3
    assert grid["places"] == list(range(12)) and grid["all"] == 12
    assert data["looks"]["heads"][0] == "2.1" and data["looks"]["values"][at][:4] == [12, 12, 25, 50]
    assert (tmp_path / "figures" / "pairs-sites.png").is_file() and ":name: fig-pairs" in fields["figure"]
    assert (
        "| q1 | Bob Dylan and David Bowie (artist) | Marie Curie and Niels Bohr (scientist) | confirmation | 5.00 |"
        in fields["table"]
    )


def test_many_pairs_of_a_large_model_are_cut_to_what_a_page_has_room_for(tmp_path):
    names = [((f"Ann {n}", f"Bo {n}"), (f"Cy {n}", f"Di {n}")) for n in range(130)]
    fields = pairs.fields(left(tmp_path, asked(names), layers=20, heads=24), tmp_path, TOPIC)
    data = data_of(fields)
    kept = {pair[0] for pair in data["pairs"]}
    assert kept == {f"q{n}" for n in range(30, 130)} and data["all"] == 130, "those of largest gap"
    grid = data["map"]
    assert grid["all"] == 520 and len(grid["places"]) == len(grid["values"][0]) == 330
    assert fields["table"].startswith("Of 130 pairs, the 100 of which most was measured, then of largest gap:\n\n:::")
    assert min(grid["places"]) == 6 and grid["lines"][0] == "23", (
        "of largest effect: those of the first layers are left out"
    )
    assert data["curves"]["left"] == [] and len(fields["figure"]) < 280_000


def test_what_is_not_there_is_left_to_be_said(tmp_path):
    assert pairs.fields(tmp_path, tmp_path, TOPIC) == {"figure": pairs.NONE, "table": ""}
    records.write(tmp_path / pairs.PAIRS[1], asked(), {}, None)
    fields = pairs.fields(tmp_path, tmp_path, TOPIC)
    data = data_of(fields)
    assert len(data["pairs"]) == 3 and not (tmp_path / "figures").exists()
    assert [data[name] for name in ("words", "logits", "curves", "map", "looks")] == [None] * 5


def test_names_stand_in_the_table_as_they_are_written(tmp_path):
    table = asked([(("<script>x</script>", "A|B"), ("*C*", "D &amp; [E](F)"))])
    records.write(tmp_path / pairs.PAIRS[1], table, {}, None)
    said = MarkdownIt("commonmark").enable("table").render(pairs.fields(tmp_path, tmp_path, TOPIC)["table"])
    for name in ("<script>x</script> and A|B (artist)", "*C* and D &amp; [E](F) (scientist)"):
        assert f"<td>{escape(name, quote=False)}</td>" in said


def test_dollars_in_the_figure_are_no_formula(tmp_path):
    pairs.fields(left(tmp_path, asked().assign(answer="$x^{$")), tmp_path, TOPIC)
    assert "$x^{$" in (tmp_path / "figures" / "pairs-sites.svg").read_text(encoding="utf-8")


def test_without_heads_nothing_is_said_of_where_they_look(tmp_path):
    left(tmp_path, asked())
    frame = swept(asked(), 3, 2, "denoise", "last", False).query("component != 'head'")
    records.write(tmp_path / pairs.SITES[1], frame, {"candidates": ["artist", "scientist"]}, None)
    data = data_of(pairs.fields(tmp_path, tmp_path, TOPIC))
    assert data["looks"] is None and data["map"]["lines"] == ["attn", "mlp"]


def test_tokens_that_no_step_has_asked_for_are_not_guessed(tmp_path, smollm_tokenizer):
    left(tmp_path, asked(), tokenizer=smollm_tokenizer)
    other = asked([(("Brad Pitt", "Somebody Else"), ("Isaac Newton", "Albert Einstein"))])
    records.write(tmp_path / pairs.PAIRS[1], other, {}, None)
    assert data_of(pairs.fields(tmp_path, tmp_path, TOPIC))["words"] is None


@pytest.fixture(scope="module")
def page(tmp_path_factory, smollm_tokenizer) -> Path:
    """The figure of three pairs, one with names in another script; and one of a folder with pairs alone."""
    folder = tmp_path_factory.mktemp("pairs")
    table = asked([(ARTISTS[0], SCIENTISTS[0]), (("李白", "</script>Bob"), SCIENTISTS[1]), (ARTISTS[2], SCIENTISTS[2])])
    for name, own in (("all", left(folder / "all", table)), ("bare", folder / "bare")):
        records.write(folder / name / pairs.PAIRS[1], table, {}, None)
        figure = re.search(r'<div class="interactive.*</div>', pairs.fields(own, own, TOPIC)["figure"], re.S)[0]
        interactive.save(HTML(figure), folder / f"{name}.html", "Pairs")
    return folder


def test_a_pair_is_found_by_a_name_and_stands_in_the_address(page):
    look = """window => {
      const one = what => window.document.querySelector(what), seen = {}, select = one("select");
      const parts = () => [...window.document.querySelectorAll(".pair-explorer section")].map(part => part.innerText);
      seen.start = select.value;
      const find = one("input[type=search]");
      find.value = "李白"; find.dispatchEvent(new window.Event("input"));
      seen.found = [...select.options].map(option => option.text);
      select.value = select.options[0].value; select.dispatchEvent(new window.Event("change"));
      seen.hash = window.location.hash;
      seen.parts = parts();
      const mark = one(".pair-explorer .mark");
      if (mark) {
        mark.focus();
        const press = key => window.document.activeElement.dispatchEvent(
          new window.KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
        press("End"); press("ArrowDown");
        seen.read = one(".told").innerText;
        one('[role=grid] [data-index="2"]').focus(); press("Enter");
        seen.kept = window.document.activeElement.dataset.index === "2";
        seen.site = [window.location.hash, parts()[3]];
        window.document.querySelectorAll("[type=radio]")[1].click();
        seen.act = [window.location.hash, parts()[2]];
      }
      return seen;
    }"""
    whole, bare = book_checks.looked_at(page, ["all.html#pair=q2", "bare.html"], look).values()
    assert whole["kept"] is True, "the focus stays in the grid when a site is pinned by key"
    assert whole["start"] == "q2" and whole["hash"] == "#pair=q1&at=fig-pairs"
    (found,) = whole["found"]
    assert found == "李白 and </script>Bob (artist) against Marie Curie and Niels Bohr (scientist)"
    prompts, candidates, layers, sites, looks = whole["parts"]
    assert "a gap of 5.00" in prompts and "the names stand alone" in prompts
    assert re.search(r"artist\s+2.50\s+−1.00\s+scientist\s+0.50\s+1.50", candidates)
    assert whole["read"] == "the names, layer 2: logit_diff rises by 2.01 logits, 0.40 of the gap."
    address, told = whole["site"]
    assert "site=2.1" in address and "2.1: its clean value, put back at the last token, raises logit_diff" in told
    assert "by 2.11 logits, 0.42 of its gap." in told
    assert "act=1" in whole["act"][0] and "the names" not in whole["act"][1]
    assert re.search(r"2.1\s+0.25\s+0.50", looks) and re.search(r"even attention\s+0.12\s+0.12", looks)
    assert [re.search(r"(?:Step|The tokens|Steps) .*", part)[0][:40] for part in bare["parts"]] == [
        "The tokens are not among the stored resu",
        "Steps 02 to 04 hold no plain run of this",
        "Step 02 has not swept the layers in this",
        "Step 04 has not swept the sites in this ",
        "Step 06 has stored no attention in this ",
    ]


def test_the_figure_fits_a_phone_and_asks_nothing_of_the_network(page):
    look = "window => ({width: window.document.documentElement.scrollWidth})"
    assert all(seen["width"] <= 390 for seen in book_checks.looked_at(page, ["all.html"], look, width=390).values())
    assert book_checks.outside_urls(page) == []
