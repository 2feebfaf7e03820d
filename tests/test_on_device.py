"""What runs on a card, as far as a CPU can show it: the rule of rows, parts that are written as they go, what lacks."""

import functools
import json
import math
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import bitsandbytes
import packaging
import pytest
import torch
from packaging.utils import canonicalize_name
from test_environment import ROOT, lock

from bench import lacking, nf4_layer, parts, scale_70b


def test_a_product_has_at_most_4_rows_or_more_than_1536():
    assert all(scale_70b.rows_run(rows) == rows for rows in (1, 2, 3, 4, 1537, 5000))
    assert all(scale_70b.rows_run(rows) == 1537 for rows in range(5, 1537))


def test_one_kernel_serves_every_row_of_the_sweeps_and_changes_no_number_beyond_noise(monkeypatch):
    model, seen = scale_70b.build("tiny", "nf4", torch.float32, "cpu"), []
    ways = scale_70b.Ways(model, scale_70b.made_up_pair(512), "cpu", alike=True)
    plain, real = ways.plain(ways.corrupt), bitsandbytes.nn.Linear4bit.forward

    def noted(self, x):
        seen.append(math.prod(x.shape[:-1]))
        return real(self, x)

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", noted)
    ways.sweep("last")
    with ways.kernel():
        assert (ways.plain(ways.corrupt) - plain).abs().max() < 1e-3
        model.mlps[0](torch.randn(3, 1, 128))
    assert set(seen) == {1537, 3}
    seen.clear()
    ways.plain(ways.corrupt)
    assert set(seen) == {18}, "outside, rows are left as they are"


# --- parts -----------------------------------------------------------------------------------------------------------


def read(path):
    return json.loads(path.read_text())


def test_what_is_known_is_written_after_each_part_and_a_whole_result_takes_the_name(tmp_path):
    path, result, there = tmp_path / "x.json", {"shape": "tiny"}, []
    unfinished = tmp_path / "x.part.json"

    def part(name):
        there.append(read(unfinished) if unfinished.exists() else None)
        result[name] = 1

    own = {name: functools.partial(part, name) for name in "abc"}
    assert parts.run(own, result, path, math.inf) == parts.COMPLETE
    assert there == [None, {"shape": "tiny", "a": 1}, {"shape": "tiny", "a": 1, "b": 1}]
    assert read(path) == {"shape": "tiny", "a": 1, "b": 1, "c": 1} and not unfinished.exists()


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path):
    result = {}

    def fails():
        raise ValueError("of no use")

    own = {"first": lambda: result.update(a=1), "second": fails, "third": lambda: result.update(c=1)}
    assert parts.run(own, result, tmp_path / "x.json", math.inf) == parts.FAILED
    expected = {"a": 1, "c": 1, "failed": {"second": "ValueError: of no use"}, "left_out": []}
    assert read(tmp_path / "x.part.json") == expected
    assert parts.run({"first": fails, "second": fails}, {}, tmp_path / "y.json", math.inf) == parts.FAILED
    assert read(tmp_path / "y.part.json")["left_out"] == ["second"], "the first makes what the others need"
    assert not list(tmp_path.glob("?.json"))


def test_no_part_runs_past_the_time(tmp_path):
    result, begun = {}, time.perf_counter()
    own = {"first": lambda: result.update(a=1), "second": lambda: time.sleep(60), "third": lambda: None}
    assert parts.run(own, result, tmp_path / "x.json", time.time() + 0.3) == parts.OUT_OF_TIME
    assert time.perf_counter() - begun < 10
    assert read(tmp_path / "x.part.json") == {"a": 1, "failed": {}, "left_out": ["second", "third"]}


@pytest.mark.parametrize("took,left,runs", [(1, 100, 4), (1, 8.5, 3), (1, 3, 1)])
def test_runs_are_repeated_as_often_as_time_allows(took, left, runs, monkeypatch):
    """On a card: one that only warms up, and three more."""
    done = []
    monkeypatch.setattr(scale_70b, "once", lambda run, device: done.append(run) or took)
    assert scale_70b.seconds_within(None, "cuda", 3, left) == took
    assert len(done) == runs


# --- the measurements, on the tiny shape -----------------------------------------------------------------------------


def test_the_tiny_shape_goes_all_the_way(tmp_path):
    """fp32, which every CPU multiplies fast; other formats have tests of their own."""
    own = scale_70b.Measurement("tiny", "nf4", "float32", 1, math.inf)
    chosen = {name: part for name, part in own.parts().items() if not name.startswith("other")}
    assert len(own.parts()) == len(chosen) + len(scale_70b.FORMATS)
    assert parts.run(chosen, own.result, tmp_path / "scale_tiny.json", math.inf) == parts.COMPLETE
    found, page = read(tmp_path / "scale_tiny.json"), read(scale_70b.RESULTS / "scale_70b.json")
    assert set(page) - {"others"} <= set(found), "the page on scale needs them"
    for key in ("memory_gb", "limits", "paths", "exactness"):
        assert set(page[key]) == set(found[key])
    assert [set(row) for row in found["sweeps"]] == [set(row) for row in page["sweeps"]]
    assert found["one_kernel"] and found["any_kernel"]["seconds"] > 0
    assert found["exactness"]["largest_difference"] < 1e-3 < 1 < found["exactness"]["largest_effect"]


def test_a_layer_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(nf4_layer, "SIZES", (16, 8))
    monkeypatch.setattr(nf4_layer, "ROWS", 16)
    assert nf4_layer.main(["--shape", "tiny", "--dtype", "float32", "--out", str(tmp_path)]) == 0
    found = read(tmp_path / "nf4_layer_tiny.json")
    assert [row["rows"] for row in found["layer"]] == [16, 8]
    assert [row["name"] for row in found["matrices"]] == list(nf4_layer.MATRICES)
    assert all(row["share_of_product"] > 0 and row["share_of_sheet"] is None for row in found["layer"])
    assert found["assumed_share"] == 0.2


@pytest.mark.parametrize(
    "device,sheet",
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB"),
        ("NVIDIA H200", "NVIDIA H200 141GB"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_a_card_is_found_among_the_sheets(device, sheet):
    assert nf4_layer.sheet_of(device, read(ROOT / "data" / "devices.json")["devices"]) == sheet


# --- what lacks ------------------------------------------------------------------------------------------------------


def wheel(folder, name, version, *needs):
    """A wheel with nothing but its metadata."""
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}-{version}.dist-info/METADATA", "Metadata-Version: 2.1\n" + "\n".join(lines) + "\n\n")


def test_wheels_are_wanted_where_a_package_is_missing_or_does_not_go_with_them(tmp_path):
    wheel(tmp_path, "nowhere_to_be_found", "1.0", "packaging>=1", "numpy>=999", "absent; extra == 'more'")
    wheel(tmp_path, "packaging", "99.0")
    wheel(tmp_path, "numpy", "999.0")
    wanted = [path.name.split("-")[0] for path in lacking.wanted(tmp_path)]
    assert wanted == ["nowhere_to_be_found", "numpy"]
    assert lacking.missing() == [] and lacking.missing(["sys", "no_such_module"]) == ["no_such_module"]


def test_the_wheels_are_pinned_by_the_lock():
    # Not as a child of the make that runs the tests: it would say which folder it enters and leaves.
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", "wheels", f"PY={sys.executable}"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=env).stdout
    names = made.replace("\\\n", " ").split("--dest .whl", 1)[1].split()
    assert "bitsandbytes" in names and {canonicalize_name(name) for name in names} <= set(lock())


def script(*options, python, out):
    return subprocess.run(
        ["bash", "bench/on_device.sh", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "/usr/bin:/bin", "PY": str(python), "OUT": str(out), "WHEELS": str(out / "none")},
    )


def test_the_script_says_at_once_what_lacks(tmp_path):
    bare = tmp_path / "python"
    folder = Path(packaging.__file__).parent
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "packaging").symlink_to(folder)
    bare.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/only exec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    done = script("--shape", "tiny", python=bare, out=tmp_path / "out")
    assert done.returncode == 2 and "lacks accelerate, bitsandbytes, " in done.stdout and "make wheels" in done.stdout
    assert done.stdout == (tmp_path / "out" / "on_device.log").read_text()
    assert script("--shapes", python=bare, out=tmp_path).returncode == 2


def test_the_script_ends_in_time(tmp_path):
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\ncase $* in *lacking*) exit 0 ;; esac\nexec sleep 100\n")
    slow.chmod(0o755)
    begun = time.perf_counter()
    done = script("--shape", "tiny", "--seconds", "16", python=slow, out=tmp_path)
    assert done.returncode == 1 and time.perf_counter() - begun < 16 + 10
    assert "tests: ended, its time was over" in done.stdout and "layer: not run, no time was left" in done.stdout
