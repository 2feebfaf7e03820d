"""The comparison of two trees finds a planted difference of each kind, and nothing where there is none."""

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, PngImagePlugin

from lib import records
from pipeline import units
from tests import same

ABOUT = {
    "step": "necessity", "data_key": "aa", "commit": "bb", "dirty": False, "started": "2025-01-01", "seconds": 1.5,
    "versions": {"numpy": "2"}, "machine": {"cores": 2}, "candidates": ["artist", "writer"], "rows": 3, "units": 1,
    "memory_gb": 0.5, "parameters": {"seed": 0, "level": 0.95}, "log": ["identity patch: 0.0"],
}  # fmt: skip
HTML = "<table><tr><td>0.25</td></tr><tr><td>0.50</td></tr></table>"


def png(shade: int = 0, note: str = "", width: int = 4) -> bytes:
    """A small PNG; `note` changes its bytes and no pixel."""
    pixels = np.full((3, width, 3), 200, dtype=np.uint8)
    pixels[1, 2] = shade
    text = PngImagePlugin.PngInfo()
    text.add_text("note", note)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", pnginfo=text)
    return out.getvalue()


def displayed(**data: str | bytes) -> dict:
    """An output of a cell, by the end of its MIME type."""
    kinds = {"png": "image/png", "html": "text/html", "markdown": "text/markdown", "plain": "text/plain"}
    plain = {key: base64.b64encode(value).decode() if key == "png" else value for key, value in data.items()}
    return {"output_type": "display_data", "data": {kinds[key]: value for key, value in plain.items()}, "metadata": {}}


def code(*outputs: dict, figure: str = "") -> dict:
    """A cell of code with its outputs; `figure` names what it shows."""
    about = {"mystnb": {"figure": {"name": figure, "caption": f"The caption of {figure}."}}} if figure else {}
    return {"cell_type": "code", "metadata": about, "source": "x = 1", "outputs": list(outputs)}


def notebook() -> dict:
    """An executed page: two figures, one cell with two, a table, texts and prose."""
    noise = {"output_type": "stream", "name": "stderr", "text": "12% 3 of 25, 1.07 units/s"}
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["# A step\n", "\n", "**Question.** What?"]},
        code(noise, displayed(png=png(), plain="<Figure>"), figure="fig-one"),
        code(displayed(png=png(10)), displayed(png=png(20)), figure="fig-two"),
        code(displayed(html=HTML, plain="0.25")),
        code(displayed(markdown="First, 0.33 [0.28, 0.38].\n\nSecond."), {"output_type": "stream", "name": "stdout",
             "text": ["a line\n"]}),
    ]  # fmt: skip
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal checkouts with the results and the build of a profile."""
    results, build = (tmp_path / "old" / kind / "smoke" for kind in ("results", "build"))
    frame = pd.DataFrame(
        {
            "layer": np.array([0, 1, 2], dtype="int32"),
            "effect": [0.0, np.nan, 2.5],
            "position": ["last", "names", "last"],
            "logits": [np.array([1.0, np.nan], "float32"), None, np.array([3.0], "float32")],
            "correct": [True, False, True],
        }
    )
    records.write(results / "necessity.parquet", frame, ABOUT, schema=None)
    records.write(results / "pairs.parquet", frame[["layer", "position"]], {}, schema=None)
    units.write_json(
        results / "necessity.findings.json", {"sites": [{"site": "2.1", "p": 0.04}], "sentences": ["One thing."]}
    )
    units.write_json(results / "claims.json", {"claims": [{"id": "slice", "verdict": "supported", "low": 0.8}]})
    units.write_json(results / "necessity.run.json", ABOUT | {"ingredients": {"modules": {"sweep": "cc"}}})
    (results / "figures").mkdir()
    (results / "figures" / "necessity-ranked.png").write_bytes(png())
    (results / "figures" / "necessity-ranked.svg").write_text("<svg>\n<path d='1'/>\n</svg>\n")
    (build / "executed").mkdir(parents=True)
    (build / "executed" / "03_necessity.ipynb").write_text(json.dumps(notebook()))
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    return tmp_path / "old", tmp_path / "new"


def rewritten(new: Path, change: Callable[[pd.DataFrame, dict], pd.DataFrame | None]) -> None:
    """Write the table of a tree again, its frame or metadata changed (in place, or as the frame returned)."""
    path = new / "results" / "smoke" / "necessity.parquet"
    frame, about = records.read(path), records.read_metadata(path)
    changed = change(frame, about)
    records.write(path, frame if changed is None else changed, about, schema=None)


def edited(new: Path, name: str, *swap: str | bytes) -> None:
    """Replace one text by another in a file of a tree."""
    path = next(new.rglob(name))
    content = path.read_bytes()
    before, after = (part if isinstance(part, bytes) else part.encode() for part in swap)
    assert before in content
    path.write_bytes(content.replace(before, after))


def page(new: Path, change: Callable[[list], object]) -> None:
    """Change the cells of the page of a tree."""
    path = next(new.rglob("03_necessity.ipynb"))
    whole = json.loads(path.read_text())
    change(whole["cells"])
    path.write_text(json.dumps(whole))


def found(old: Path, new: Path) -> list[same.Difference]:
    """The differences of two trees."""
    out = same.Comparison()
    for kind in ("results", "build"):
        same.compare(old / kind / "smoke", new / kind / "smoke", out)
    return out.differences


def test_equal_trees_have_no_difference(trees, capsys):
    old, new = trees
    assert found(old, new) == []
    assert same.main([str(old), str(new), "--profile", "smoke"]) == 0
    said = capsys.readouterr().out
    assert "no difference" in said
    rows = {line[:16].strip(): line[16:].split() for line in said.splitlines()[1:] if line[16:17] == " "}
    # two tables with their metadata, and of the page three figures, two captions, a table, three texts, two of prose
    assert rows["table"] == rows["metadata"] == ["2", "2", "0"]
    assert [rows[name][0] for name in ("findings", "claims", "run record", "saved figure")] == ["1"] * 4
    counts = {name: rows[f"page {name}"][0] for name in ("figure", "captions", "tables", "texts", "prose")}
    assert counts == {"figure": "3", "captions": "2", "tables": "1", "texts": "3", "prose": "2"}


def test_what_depends_on_code_machine_and_clock_is_aside(trees):
    old, new = trees
    other = {
        "data_key": "zz", "commit": "yy", "dirty": True, "started": "2026-02-02", "seconds": 99.0,
        "versions": {"numpy": "3"}, "machine": {"cores": 64}, "files": {"necessity.parquet": "xx"}, "check": "ww",
    }  # fmt: skip
    assert set(other) == set(same.ASIDE) - {"ingredients"}
    rewritten(new, lambda _, about: about.update(other | {"log": ABOUT["log"] * 2}))  # as a resumed run has it
    record = ABOUT | other | {"ingredients": {"modules": {"effects": "dd"}}}
    units.write_json(new / "results" / "smoke" / "necessity.run.json", record)
    (new / "results" / "smoke" / "figures" / "necessity-ranked.png").write_bytes(png(note="another writer"))
    page(new, lambda cells: cells[1]["outputs"][0].update(text="100% 25 of 25"))
    page(new, lambda cells: cells[1].update(source="y = 2"))
    # texts dealt out to two cells are the same texts, and a figure written by another library the same pixels
    page(new, lambda cells: cells[4]["outputs"].insert(1, displayed(markdown="Second.")))
    page(new, lambda cells: cells[4]["outputs"].__setitem__(0, displayed(markdown="First, 0.33 [0.28, 0.38].")))
    page(new, lambda cells: cells[1]["outputs"].__setitem__(1, displayed(png=png(note="x"))))
    assert found(old, new) == []


def zero_turned(frame: pd.DataFrame, _: dict) -> None:
    frame.loc[0, "effect"] = -0.0


def last_bit(frame: pd.DataFrame, _: dict) -> None:
    frame.loc[2, "effect"] = np.nextafter(2.5, 3)


def nan_filled(frame: pd.DataFrame, _: dict) -> None:
    frame.loc[1, "effect"] = 0.0


def word(frame: pd.DataFrame, _: dict) -> None:
    frame.loc[1, "position"] = "swapped"


def listed_value(frame: pd.DataFrame, _: dict) -> None:
    frame["logits"] = [*frame["logits"][:2], np.nextafter([3.0], [4.0], dtype="float32")]


def list_longer(frame: pd.DataFrame, _: dict) -> None:
    frame.at[2, "logits"] = np.array([3.0, 0.0], "float32")


def list_there(frame: pd.DataFrame, _: dict) -> None:
    frame.at[1, "logits"] = np.array([], "float32")


def flag(frame: pd.DataFrame, _: dict) -> None:
    frame.loc[0, "correct"] = False


TABLES = [
    (zero_turned, "column effect", "1 of 3 rows, first row 0: 0.0 / -0.0; largest difference 0"),
    (last_bit, "column effect", "1 of 3 rows, first row 2: 2.5 / 2.5000000000000004; largest difference 4.44e-16"),
    (nan_filled, "column effect", "first row 1: None / 0.0"),
    (word, "column position", "first row 1: 'names' / 'swapped'"),
    (listed_value, "column logits", "first row 2: [3.0] / [3.0000002"),
    (list_longer, "column logits", "first row 2: [3.0] / [3.0, 0.0]"),
    (list_there, "column logits", "first row 1: None / []"),
    (flag, "column correct", "first row 0: True / False"),
    (lambda frame, _: frame.astype({"layer": "int64"}), "column layer", "type int32 / int64"),
    (lambda frame, _: frame[["effect", "layer", *frame.columns[2:]]], "columns", "in another order"),
    (lambda frame, _: frame.drop(columns="correct"), "column correct", "only in OLD"),
    (lambda frame, _: frame.assign(more=1), "column more", "only in NEW"),
    (lambda frame, _: frame[:2], "rows", "3 / 2"),
    (lambda frame, _: frame[::-1].reset_index(drop=True), "column layer", "2 of 3 rows, first row 0: 0 / 2"),
]


@pytest.mark.parametrize(("change", "place", "what"), TABLES)
def test_a_difference_in_a_table_is_found(trees, change, place, what):
    rewritten(trees[1], change)
    kind, where, said = found(*trees)[0]
    assert (kind, where) == ("table", f"necessity.parquet: {place}") and what in said


def test_null_is_not_nan_and_nan_payloads_are_equal():
    null, nan = same.pa.array([None, 1.0]), same.pa.array([float("nan"), 1.0])
    other = same.pa.array(np.array([0x7FF8000000000001, 0x3FF0000000000000], "uint64").view("float64"))
    assert same.unlike(null, nan).tolist() == [True, False]
    assert same.unlike(nan, other).tolist() == [False, False]
    assert same.unlike(null, null).tolist() == [False, False]
    pair = [same.pa.array([{"a": 1}, {"a": value}]) for value in (2, 3)]
    assert same.unlike(*pair).tolist() == [False, True]


METADATA = [
    ({"candidates": ["artist", "poet"]}, "candidates[1]", "'writer' / 'poet'"),
    ({"rows": 4}, "rows", "3 / 4"),
    ({"units": 2}, "units", "1 / 2"),
    ({"memory_gb": 1.0}, "memory_gb", "0.5 / 1.0"),
    ({"parameters": {"seed": 0, "level": 0.9}}, "parameters.level", "0.95 / 0.9"),
    ({"parameters": {"seed": 0, "level": 0.95, "seconds": 3}}, "parameters.seconds", "only in NEW"),
    ({"log": []}, "log", "1 / 0 entries"),
]


@pytest.mark.parametrize(("change", "place", "what"), METADATA)
def test_a_difference_in_metadata_is_found(trees, change, place, what):
    rewritten(trees[1], lambda _, about: about.update(change))
    assert found(*trees) == [("metadata", f"necessity.parquet: {place}", what)]
    units.write_json(trees[1] / "results" / "smoke" / "necessity.run.json", ABOUT | change | {"ingredients": {}})
    assert ("run record", f"necessity.run.json: {place}", what) in found(*trees)


EDITS = [
    ("necessity.findings.json", "0.04", "0.05", "findings", "sites[0].p", "0.04 / 0.05"),
    ("necessity.findings.json", "One thing", "Two things", "findings", "sentences[0]", "'One thing.' / 'Two things.'"),
    ("necessity.findings.json", '"p"', '"q"', "findings", "sites[0].p", "only in OLD"),
    ("claims.json", '"supported"', '"not supported"', "claims", "claims[0].verdict", "'supported' / 'not supported'"),
    ("claims.json", "0.8", "1", "claims", "claims[0].low", "0.8 / 1"),
    ("necessity-ranked.svg", "d='1'", "d='2'", "saved drawing", "", "d='1'"),
]


@pytest.mark.parametrize(("name", "before", "after", "kind", "place", "what"), EDITS)
def test_a_difference_in_a_file_is_found(trees, name, before, after, kind, place, what):
    edited(trees[1], name, before, after)
    first = found(*trees)[0]
    assert first.kind == kind and first.place.endswith(f"{name}{place and ': ' + place}") and what in first.what


def test_a_whole_number_is_not_the_same_as_a_fraction():
    assert same.json_differences({"a": 1}, {"a": 1.0}) == [("a", "1 / 1.0")]
    assert same.json_differences({"a": True}, {"a": 1}) == [("a", "True / 1")]
    assert same.json_differences([float("nan")], [float("nan")]) == []


def test_pixels_of_saved_figures(trees):
    image = trees[1] / "results" / "smoke" / "figures" / "necessity-ranked.png"
    image.write_bytes(png(3))
    assert found(*trees) == [
        ("saved figure", "figures/necessity-ranked.png", "1 of 12 pixels, first at (2, 1), by at most 3 of 255")
    ]
    image.write_bytes(png(width=5))
    assert found(*trees) == [("saved figure", "figures/necessity-ranked.png", "size (4, 3) / (5, 3)")]
    image.write_bytes(b"no image")
    (first,) = found(*trees)
    assert first.kind == "file" and "cannot be read" in first.what


def swapped(cells: list) -> None:
    cells[1], cells[2] = cells[2], cells[1]


PAGES = [
    (lambda cells: cells[1]["outputs"].__setitem__(1, displayed(png=png(9))), "page figure", "fig-one", "1 of 12"),
    (lambda cells: cells[2]["outputs"].pop(), "page figure", "fig-two (2)", "only in OLD"),
    (lambda cells: cells[2]["outputs"].reverse(), "page figure", "fig-two", "by at most 10 of 255"),
    (lambda cells: cells.append(code(displayed(png=png()))), "page figure", "unnamed", "only in NEW"),
    (swapped, "figure order", "", "fig-one, fig-two, fig-two (2) / fig-two, fig-two (2), fig-one"),
    (lambda cells: cells[1]["metadata"]["mystnb"]["figure"].update(caption="Another."), "page captions",
     "number 1", "'The caption of fig-one.' / 'Another.'"),
    (lambda cells: cells[3]["outputs"].__setitem__(0, displayed(html=HTML.replace("0.25", "0.26"))), "page tables",
     "number 1", "0.25"),
    (lambda cells: cells[4]["outputs"].__setitem__(0, displayed(markdown="First, 0.34 [0.28, 0.38].\n\nSecond.")),
     "page texts", "number 1", "'First, 0.33 [0.28, 0.38].' / 'First, 0.34 [0.28, 0.38].'"),
    (lambda cells: cells[4]["outputs"][1].update(text="another line"), "page texts", "number 3", "'a line'"),
    (lambda cells: cells[4]["outputs"].append({"output_type": "error", "ename": "KeyError", "evalue": "'x'"}),
     "page texts", "number 4", "only in NEW: \"KeyError: 'x'\""),
    (lambda cells: cells[0].update(source="# A step\n\nWhat?"), "page prose", "number 2", "'**Question.** What?'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "place", "what"), PAGES)
def test_a_difference_in_a_page_is_found(trees, change, kind, place, what):
    page(trees[1], change)
    kinds = [difference for difference in found(*trees) if difference.kind == kind]
    assert kinds and kinds[0].place.endswith(place) and "03_necessity.ipynb" in kinds[0].place
    assert what in kinds[0].what


def test_one_more_text_moves_no_other(trees):
    page(trees[1], lambda cells: cells.insert(1, code(displayed(markdown="Something new."))))
    assert found(*trees) == [("page texts", "executed/03_necessity.ipynb, number 1", "only in NEW: 'Something new.'")]


@pytest.mark.parametrize("name", ["pairs.parquet", "necessity.findings.json", "03_necessity.ipynb"])
def test_a_file_of_one_side_is_a_difference(trees, name):
    next(trees[1].rglob(name)).unlink()
    (first,) = found(*trees)
    assert first.kind == "file" and first.place.endswith(name) and first.what == "only in OLD"
    (back,) = found(*reversed(trees))
    assert back.what == "only in NEW"


def test_an_unfinished_run_is_not_equal(trees):
    for tree in trees:
        (tree / "results" / "smoke" / "hydra.units").mkdir()
        (tree / "results" / "smoke" / "hydra.units" / "a.parquet").write_bytes(b"")
    (first,) = found(*trees)
    assert first[:2] == ("unfinished", "hydra.units")


def test_the_command_line(trees, capsys, tmp_path):
    old, new = trees
    (new / "results" / "smoke" / "notes.txt").write_text("x")
    edited(new, "claims.json", "0.8", "0.9")
    assert same.main([str(old / "results" / "smoke"), str(new / "results" / "smoke")]) == 1
    said = capsys.readouterr().out
    assert "1 differences" in said and "- claims, claims.json: claims[0].low: 0.8 / 0.9" in said
    assert "not looked at: notes.txt" in said
    assert same.main([str(old / "build" / "smoke"), str(new / "build" / "smoke")]) == 0
    (tmp_path / "empty").mkdir()
    assert same.main([str(tmp_path / "empty"), str(tmp_path / "empty")]) == 2
    assert same.main([str(old), str(tmp_path / "nowhere"), "--profile", "smoke"]) == 2
    assert "there is no folder" in capsys.readouterr().err
