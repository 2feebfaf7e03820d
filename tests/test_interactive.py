"""Figures that a reader can touch: their JSON, and what the book's script makes of it in a browser."""

import json
import re
import shutil
from pathlib import Path

import book_checks
import numpy as np
import pandas as pd
import pytest

from lib import safe_yaml
from lib.hooks import site_name
from report import interactive
from report.words import site_rows

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "book" / "_config.yml"
SCRIPTS = "".join(f'<script src="{name}"></script>' for name in interactive.scripts())


def rows(layers: int, heads: int, seed: int = 0) -> pd.DataFrame:
    """Both halves of a table of sites, by chance, whose confirmation half is larger by 1."""
    places = [(layer, "head", head) for layer in range(layers) for head in range(heads)]
    places += [(layer, name, -1) for layer in range(layers) for name in interactive.MODULES]
    draw = np.random.default_rng(seed)
    halves = []
    for half, more in (("discovery", 0), ("confirmation", 1)):
        table = pd.DataFrame(places, columns=["layer", "component", "head"]).assign(half=half, p=0.5)
        table["estimate"] = draw.normal(size=len(table)).round(2) + more
        table["site"] = [site_name(*place) for place in places]
        ends = {"low": table["estimate"] - 0.5, "high": table["estimate"] + 0.5}
        shares = {f"ratio{end}": table["estimate"] / 10 for end in ("", "_low", "_high")}
        halves.append(table.assign(**ends, **shares))
    return pd.DataFrame(site_rows(pd.concat(halves, ignore_index=True)))


def in_pairs(table: pd.DataFrame, count: int, name: str = "Ann and Bo") -> pd.DataFrame:
    pairs = pd.DataFrame({"pair_id": [f"q{number}" for number in range(count)]})
    pairs = pairs.assign(half="confirmation", gap=4.0, clean=f"{name} (artist)", corrupt="Cy and Di (writer)")
    out = pairs.merge(table[["site"]], how="cross")
    return out.assign(effect=out["pair_id"].str[1:].astype(float) / 10)


def data_of(html) -> dict:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', html.data, re.S)[1])


def test_a_map_holds_each_sites_numbers_in_its_place():
    table = rows(3, 2)
    table.loc[0, ["low", "high"]] = np.nan
    shown = [interactive.SiteEffects("put back", "rises", table.iloc[1:], table.iloc[1:]["site"] == "1.1")]
    pairs = in_pairs(table, 2, name="</script>李白 and Bo")
    data = data_of(interactive.site_map("fig", shown, ["1.1"], pairs))
    assert data["layers"] == [0, 1, 2] and data["lines"] == ["1", "0", "attn", "mlp"]
    own, place = data["shown"][0], 1  # head 1 at layer 1
    row = table.set_index("site").loc["1.1"]
    assert own["estimate"][place] == round(100 * row["estimate"]) and own["low"][place] == own["estimate"][place] - 50
    assert own["discovery"][place] == round(100 * row["discovery"]) and own["share"][place] == round(
        10 * row["estimate"]
    )
    assert own["sure"] == [int(index == place) for index in range(12)]
    assert own["estimate"][3] is None, "0.0, the row left out, is not measured"
    assert data["effects"]["1.1"] == [0, 10] and data["pairs"][0] == [
        "</script>李白 and Bo (artist)",
        "Cy and Di (writer)",
        "confirmation",
        400,
        "q0",
    ]


def test_a_large_model_with_many_pairs_stays_small_in_the_page():
    table = rows(80, 64)
    shown = [interactive.SiteEffects(name, "rises", table, table["p"] < 0.1) for name in ("put back", "taken out")]
    leading = table.assign(size=table["estimate"].abs()).nlargest(30, "size")
    html = interactive.site_map("fig", shown, [], in_pairs(leading, 1000)).data
    assert len(html.encode()) < 400_000 and len(data_of(interactive.site_map("fig", shown, []))["effects"]) == 0
    assert len(json.loads(re.search(r">(\{.*?)</script>", html)[1])["effects"]) == interactive.PAIR_VALUES // 1000


def test_the_book_has_every_script_in_its_place_and_they_stay_small():
    assert (
        safe_yaml.parse(CONFIG.read_text(), CONFIG.name)["sphinx"]["config"]["html_js_files"] == interactive.scripts()
    )
    assert sum((interactive.ASSETS / name).stat().st_size for name in interactive.scripts()) < 80_000


def test_the_views_of_a_site_that_figures_link_to_are_there():
    for view in interactive.VIEWS[:-1]:
        cells = json.loads((ROOT / "notebooks" / f"{view.page}.ipynb").read_text(encoding="utf-8"))["cells"]
        assert view.figure in [cell["metadata"].get("mystnb", {}).get("figure", {}).get("name") for cell in cells]
    last = interactive.VIEWS[-1]
    assert (ROOT / "book" / f"{last.page}.md").is_file() and last not in interactive.others(last.figure)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A page with a map and a table of claims, as the book has them."""
    folder = tmp_path_factory.mktemp("page")
    table = rows(3, 2)
    shown = [
        interactive.SiteEffects("put back", "rises", table, table["site"] == "1.1"),
        interactive.SiteEffects(
            "taken out", "falls", table.assign(estimate=-0.25, low=None, high=None), table["p"] < 0
        ),
    ]
    body = interactive.site_map("fig", shown, ["1.1"], in_pairs(table, 2)).data
    claims = "".join(f"<tr><td>claim {n}</td><td>{'yes' if n % 2 else 'no'}</td></tr>" for n in (2, 10, 1))
    head = "<tr><th>claim</th><th>verdict</th></tr>"
    inside = f"<thead>{head}</thead><tbody>{claims}</tbody></table></div>"
    body += f'<div class="sortable"><table>{inside}<div><table class="sortable" id="T_other">{inside}'
    shutil.copytree(interactive.ASSETS, folder, dirs_exist_ok=True)
    (folder / "page.html").write_text(
        f'<!doctype html><meta charset="utf-8">{SCRIPTS}'
        f'<figure id="fig"><img alt="twin"><figcaption>Map.</figcaption></figure>{body}',
        encoding="utf-8",
    )
    return folder


def test_a_site_is_read_by_keys_and_pinned_in_the_address(page):
    look = """window => {
      const one = what => window.document.querySelector(what), told = [];
      const press = key => window.document.activeElement.dispatchEvent(
        new window.KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
      const tell = () => told.push([one(".told").innerText, window.location.hash]);
      tell();
      one('[role=grid] [tabindex="0"]').focus();
      press("ArrowDown"); tell();
      press("Enter"); tell();
      window.document.querySelectorAll("[type=radio]")[1].click(); tell();
      const grid = one("#fig [role=grid]"), cell = one('[aria-selected="true"]');
      return {told, name: cell.getAttribute("aria-label"), cells: grid.querySelectorAll("[role=gridcell]").length,
        pairs: one(".pairs tbody").innerText, otherwise: one("[data-twin]")};
    }"""
    seen = book_checks.looked_at(page, ["page.html", "page.html#site=2.0&act=1", "page.html#site=9.9"], look)
    first, again, unknown = seen.values()
    table = rows(3, 2).set_index("site")
    value, low, high = (f"{table.loc['1.1', key]:.2f}".replace("-", "−") for key in ("estimate", "low", "high"))
    (start, no_address), (below, still_none), (_, pinned), (out, taken_out) = first["told"]
    assert start.startswith(f"1.1, attention head of the critical slice: put back, logit_diff rises by {value} logits")
    assert f"[{low}, {high}]" in start and start.endswith("this is significant.") and no_address == ""
    assert below.startswith("1.0, attention head: ") and "not significant" in below and still_none == ""
    assert pinned == "#site=1.0&at=fig" and taken_out == "#site=1.0&at=fig&act=1"
    assert "taken out, logit_diff rises by 0.25 logits (no interval: too few quads)" in out
    assert first["cells"] == 12 and first["name"] == "1.0: −0.25 logits" and first["otherwise"] is None
    assert "Ann and Bo (artist)" in first["pairs"] and "0.10" in first["pairs"]
    assert again["told"][0][0].startswith("2.0, attention head: taken out")
    assert unknown["told"][0][0].startswith("1.1"), "an address of no site shows the first of the slice"


def test_one_site_is_pinned_for_all_views_and_goes_along_to_other_pages(page):
    """A site chosen in one map is lit in the other, in a table of sites, and in the address of the next page."""
    body = (page / "page.html").read_text(encoding="utf-8")
    body += re.search(r'<div class="interactive site-map".*?</div>', body, re.S)[0].replace('"fig"', '"other"')
    body += '<table id="sites"><thead><tr><th>site</th><th>gap</th></tr></thead>'
    body += "<tbody><tr><td>1.0 at names</td><td>1.0</td></tr><tr><td>11.0</td><td>1.0</td></tr></tbody></table>"
    body += '<nav><a id="next" href="next.html">next</a><a id="part" href="next.html#part">part</a></nav><p id="other">'
    (page / "both.html").write_text(body, encoding="utf-8")
    look = """async window => {
      const all = what => [...window.document.querySelectorAll(what)];
      const pinned = () => all('[aria-selected="true"]').map(cell => cell.getAttribute("aria-label").split(":")[0]);
      const seen = [pinned()];
      const find = all('.site-map input[type=search]')[1];
      find.value = "1.0"; find.onchange(); seen.push(pinned());
      const lit = all("#sites .lit").map(cell => cell.innerText);
      find.value = "7.7"; find.onchange(); seen.push(pinned());
      const none = all(".told")[1].innerText;
      window.location.hash = "site=mlp+2"; await new Promise(done => setTimeout(done, 100)); seen.push(pinned());
      window.location.hash = "part"; await new Promise(done => setTimeout(done, 100)); seen.push(pinned());
      const follow = id => {
        const link = window.document.getElementById(id);
        link.addEventListener("click", event => event.preventDefault()); link.click();
        return link.hash;
      };
      return {seen, none, lit, reached: all("figure")[0].tabIndex, next: follow("next"), part: follow("part")};
    }"""
    seen = book_checks.looked_at(page, ["both.html", "both.html#site=1.0&at=top"], look, width=390)
    start, again = seen.values()
    assert start["seen"] == [["1.1", "1.1"], ["1.0", "1.0"], ["1.0", "1.0"], *[["mlp 2", "mlp 2"]] * 2]
    assert 'no site "7.7" here' in start["none"] and start["lit"] == ["1.0 at names"]
    assert start["next"] == "#site=mlp+2&at=top" and start["part"] == "#site=mlp+2&at=part"
    assert again["seen"][0] == ["1.0", "1.0"] and start["reached"] == 0, "a figure scrolls by keyboard on a phone"


def test_a_map_on_a_page_of_its_own_needs_no_other_file(tmp_path):
    table = rows(3, 2)
    shown = [interactive.SiteEffects("put back", "rises", table, table["site"] == "1.1")]
    interactive.save(interactive.site_map("fig", shown, ["1.1"]), tmp_path / "map.html", "Which parts?")
    look = """window => ({told: window.document.querySelector(".told").innerText,
      cells: window.document.querySelectorAll("td.marked").length,
      width: window.document.documentElement.scrollWidth})"""
    (seen,) = book_checks.looked_at(tmp_path, ["map.html"], look, width=390).values()
    assert seen["told"].startswith("1.1, attention head of the critical slice") and seen["cells"] == 1
    assert seen["width"] <= 390 and book_checks.outside_urls(tmp_path) == []


def test_a_table_is_searched_sorted_and_cited(page):
    look = """window => {
      const one = what => window.document.querySelector(".sortable " + what);
      const shown = () => [...one("tbody").rows].filter(row => !row.hidden)
        .map(row => row.cells[0].textContent);
      const seen = [shown()];
      one("th button").click(); seen.push(shown());
      one("th button").click(); seen.push(shown(), one("th").getAttribute("aria-sort"));
      const verdict = one("label:last-of-type select");
      verdict.value = "no"; verdict.onchange(); seen.push(shown(), one("output").textContent);
      one("input").value = "CLAIM 10"; one("input").oninput(); seen.push(shown());
      return {seen, hash: window.location.hash};
    }"""
    addresses = ["page.html", "page.html#claim.verdict=yes", "page.html#T_other.verdict=yes"]
    whole, cited, other = book_checks.looked_at(page, addresses, look).values()
    start, up, down, order, chosen, counted, found = whole["seen"]
    assert start == ["claim 2", "claim 10", "claim 1"] and up == ["claim 1", "claim 2", "claim 10"]
    assert down == up[::-1] and order == "descending"
    assert chosen == ["claim 10", "claim 2"] and counted == "2 of 3 found" and found == ["claim 10"]
    assert {"claim.find=CLAIM+10", "claim.sort=-0", "claim.verdict=no"} == {*whole["hash"][1:].split("&")}
    assert cited["seen"][0] == ["claim 1"] and other["seen"][0] == start, (
        "each table has a place of its own in the address"
    )


def test_a_long_table_shows_its_first_rows_until_all_are_asked_for(tmp_path):
    frame = pd.DataFrame({"claim": [f"claim {n}" for n in range(60)]})
    shutil.copytree(interactive.ASSETS, tmp_path, dirs_exist_ok=True)
    style = '<link rel="stylesheet" href="superset.css">'
    body = (
        f'<div class="sortable">{frame.to_html()}</div><div>{frame.to_html()}</div><div>{frame.head(9).to_html()}</div>'
    )
    body = body.replace('class="dataframe"', "", 1)
    (tmp_path / "page.html").write_text(f'<!doctype html><meta charset="utf-8">{style}{SCRIPTS}{body}')
    look = """window => {
      const all = what => [...window.document.querySelectorAll(what)];
      const shown = () => all("table").map(table => [...table.tBodies[0].rows].filter(row => row.offsetHeight).length);
      const seen = [shown()];
      all("input")[0].value = "claim 59"; all("input")[0].oninput(); seen.push(shown()[0]);
      all("input")[0].value = ""; all("input")[0].oninput();
      for (const button of all("button.more")) button.click();
      return {seen: [...seen, shown()], left: all("button.more").filter(button => button.offsetHeight).length};
    }"""
    (found,) = book_checks.looked_at(tmp_path, ["page.html"], look).values()
    (first, long, short), few, whole = found["seen"]
    assert first == 12 and 5 < long < 30 and short == 9 and few == 1
    assert whole == [60, 60, 9] and found["left"] == 0


LANES = [
    ("names", ["names"]),
    ("at the names", ["mlp 1 at names"]),
    ("slice, last token", ["2.1", "mlp 3"]),
    ("answer", ["answer"]),
]
PATHS = pd.DataFrame(
    [
        ("names", "mlp 1 at names", 4.0), ("mlp 1 at names", "2.1", 1.0), ("2.1", "mlp 3", -0.25),
        ("2.1", "answer", 0.5), ("mlp 3", "answer", 0.04),
    ],
    columns=["source", "target", "estimate"],
)  # fmt: skip
RANGES = PATHS.assign(
    low=None, high=None, significant=False, least=PATHS["estimate"] - 1, most=PATHS["estimate"] + 1, quads=6
)


def test_a_graph_lights_the_paths_of_a_site_and_goes_by_its_threshold(tmp_path):
    tested = RANGES.assign(low=RANGES["least"], high=RANGES["most"], significant=RANGES["least"] > 0)
    for name, edges in (("few", RANGES), ("enough", tested)):
        figure = interactive.circuit_graph("fig", LANES, edges)
        interactive.save(figure, tmp_path / f"{name}.html", "A circuit")
    look = """window => {
      const all = what => [...window.document.querySelectorAll(what)], one = what => all(what)[0];
      const table = () => all(".edges tbody tr").map(row => [...row.cells].map(cell => cell.innerText).join(" | "));
      const seen = () => ({told: one(".told").innerText, table: table(), hash: window.location.hash,
        lines: all(".edge").length, dim: all(".edge.dim").length, dashed: all(".unsure").length});
      const start = seen(), node = all(".node").find(part => part.getAttribute("aria-label") === "2.1");
      node.dispatchEvent(new window.KeyboardEvent("keydown", {key: "Enter", bubbles: true, cancelable: true}));
      const pinned = seen(), focused = window.document.activeElement.getAttribute("aria-label");
      const slider = one("[type=range]");
      slider.value = 50; slider.oninput(); slider.onchange();
      return {start, pinned, focused, thin: seen(), output: one("output").innerText,
        width: window.document.documentElement.scrollWidth, head: one(".edges thead").innerText};
    }"""
    pages = ["few.html", "enough.html", "few.html#site=9.9", "few.html#site=mlp+1&min=0.9"]
    few, enough, unknown, cited = book_checks.looked_at(tmp_path, pages, look, width=390).values()
    assert few["start"] | {"table": 0} == {
        "told": "No site is pinned.",
        "table": 0,
        "hash": "",
        "lines": 5,
        "dim": 0,
        "dashed": 0,
    }
    assert (
        few["start"]["table"][0] == "names | mlp 1 at names | 4.00 | 3.00 to 5.00"
        and "range over quads (6)" in few["head"]
    )
    assert few["pinned"]["told"] == "2.1: Of the paths to or from it, 3 measured, 3 at the threshold or above."
    assert few["pinned"]["dim"] == 2 and few["pinned"]["hash"] == "#site=2.1&at=fig" and few["focused"] == "2.1"
    assert few["pinned"]["table"][2] == "2.1 | mlp 3 | −0.25 | −1.25 to 0.75"
    assert few["thin"]["lines"] == 2 and few["thin"]["hash"] == "#site=2.1&at=fig&min=1.00"
    assert few["output"] == "1.00 logits or more: 2 of 5" and few["width"] <= 390
    assert (
        "95% interval" in enough["head"]
        and enough["start"]["dashed"] == 4
        and enough["start"]["table"][0].endswith("| 3.00 to 5.00 | yes")
    )
    assert unknown["start"]["told"] == "9.9: No path to or from it was measured here."
    assert cited["start"]["lines"] == 2 and cited["start"]["dim"] == 0, "both are paths of mlp 1"


def growth(halves=("discovery", "confirmation")) -> interactive.Growth:
    """Four sites, whose joint effects are no sums: the first n recover 0.3, 0.5, 0.6, 0.65."""

    def row(value: float, **about) -> dict:
        return about | {"estimate": value, "low": value - 0.05, "high": value + 0.05}

    order, alone, joint = ["2.1", "mlp 3", "2.0", "0.1"], [0.3, 0.25, 0.2, 0.11], [0.3, 0.5, 0.6, 0.65]
    singles = [row(value, site=site, half=half) for half in halves for site, value in zip(order, alone, strict=True)]
    curves = [
        row(value - less, n_sites=number, quantity=quantity, half=half)
        for half in halves
        for quantity, less in (("recovery", 0), ("damage", 0.1))
        for number, value in enumerate(joint, 1)
    ]
    sums = [row(value, n_sites=number) for number, value in enumerate(np.cumsum(alone), 1)]
    twos = [
        row(0.42, site="2.1", other="2.0"),
        row(0.5, site="2.1", other="mlp 3"),
        row(0.4, site="mlp 3", other="2.0"),
    ]
    return interactive.Growth(order, *map(pd.DataFrame, (singles, curves, sums, twos)))


def test_a_set_of_sites_says_what_was_measured_of_it_and_what_was_not(tmp_path):
    figure = interactive.slice_builder("fig", growth(), 3, False, 0.8)
    interactive.save(figure, tmp_path / "slice.html", "The slice")
    few = [table.assign(low=None, high=None) for table in growth(["all"])[1:]]
    one = interactive.slice_builder("fig", interactive.Growth(growth().order, *few), 3, True, 0.8)
    interactive.save(one, tmp_path / "one.html", "")
    look = """window => {
      const all = what => [...window.document.querySelectorAll(what)];
      const seen = [], tell = () => seen.push(all(".told")[0].innerText);
      const press = text => { all("button").find(part => part.innerText === text).click(); tell(); };
      tell(); press("Add the next"); press("None"); press("2.0"); press("2.1"); press("0.1"); press("mlp 3");
      return {seen, hash: window.location.hash, width: window.document.documentElement.scrollWidth,
        note: all(".note")[0].innerText, pressed: all(".chip[aria-pressed=true]").length, dots: all("circle").length};
    }"""
    pages = ["slice.html", "slice.html#set=mlp+3,0.1&site=9.9", "one.html#set=2"]
    whole, cited, one = book_checks.looked_at(tmp_path, pages, look, width=390).values()
    start, four, none, single, two, three, full = whole["seen"]
    assert start.startswith(
        "The first 3 sites in order: joint recovery 0.60 [0.55, 0.65], joint damage 0.50 [0.45, 0.55] (conf"
    )
    assert "0.55] (discovery half). One by one they recover 0.75 [0.70, 0.80] in all (confirmation half)." in start
    assert four.startswith("The first 4 sites in order: joint recovery 0.65") and none.startswith(
        "No site is put back: choose some."
    )
    assert (
        single.startswith("2.0 alone: recovery 0.20 [0.15, 0.25] (confirmation half)")
        and "damage alone was not" in single
    )
    assert two.startswith(
        "2.1 and 2.0: joint recovery 0.42 [0.37, 0.47] (confirmation half). Their joint damage was not"
    )
    assert (
        three.startswith("2.1, 2.0 and 0.1 together were not measured.") and "2.1 with 2.0 0.42 [0.37, 0.47]." in three
    )
    assert "the first 4 sites in order: joint recovery 0.65" in three and "it is not added up" in three
    assert "0.61" not in three and full.startswith("The first 4 sites"), "2.1, 2.0 and 0.1 recover 0.61 one by one"
    assert whole["hash"] == "#set=4&site=mlp+3&at=fig" and whole["pressed"] == 4 and whole["dots"] == 2
    assert whole["width"] <= 390 and cited["seen"][0].startswith("mlp 3 and 0.1 together were not measured.")
    assert cited["seen"][0].endswith("9.9, pinned, is not among the 4 sites in this order.")
    assert one["seen"][0].startswith("The first 2 sites in order: joint recovery 0.50, joint damage 0.40. One by one")
    assert "half" not in one["seen"][0] and "too few quads for intervals" in one["note"]
    assert "too few" not in whole["note"]
