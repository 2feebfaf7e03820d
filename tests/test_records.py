"""Step tables: the schema, whole files or none, work units that survive a kill."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import records
from lib.records import RecordError
from pipeline import units
from pipeline.units import Unit

ROOT = Path(__file__).resolve().parents[1]


def fake_frame(rows: int, seed: int = 0) -> pd.DataFrame:
    """A valid table of random numbers, without the nullable columns."""
    rng = np.random.default_rng(seed)
    frame = {}
    for name, column in records.SCHEMA.columns.items():
        if column.nullable:
            continue
        kind = str(column.dtype)
        if kind == "object":
            frame[name] = list(rng.normal(size=(rows, 5)).astype(np.float32))
        elif kind.startswith("float"):
            frame[name] = rng.normal(size=rows)
        else:
            frame[name] = ["x"] * rows if kind.startswith("str") else np.ones(rows, dtype=np.int64)
    words = {"component": "resid", "half": "discovery", "direction": "noise", "ablation": "zero", "position": "last"}
    frame |= {name: [word] * rows for name, word in words.items()}
    frame["head"], frame["answer"] = np.full(rows, -1), ["y"] * rows
    frame["pair_id"] = [f"p{seed}-{index}" for index in range(rows)]
    return pd.DataFrame(frame)


def fake_compute(unit: Unit) -> pd.DataFrame:
    frame = fake_frame(4, unit.options["index"])
    frame.attrs["log"] = ["halved for memory"] if unit.options["index"] == 1 else []
    frame.attrs["facts"] = {"candidates": ["artist", "writer"]}
    return frame


PLAN = {"data_key": "k" * 64, "memory_gb": 2.0}


def fake_plan(count: int) -> list[Unit]:
    return [Unit(f"u-{index}", ("p",), {"index": index}) for index in range(count)]


# --- the schema ---


def test_columns_are_those_of_the_design_and_the_plans_own_lead():
    names = list(records.SCHEMA.columns)
    assert names[:5] == ["layer", "component", "head", "metric_before", "metric_after"]
    assert " ".join(names[5:33]) == (
        "profile task template pair_id quad_id half direction ablation position seed metric_clean metric_corrupt "
        "logit_diff_before logit_diff_after logit_diff_clean logit_diff_corrupt answer foil_before foil_after "
        "logits_before logits_after top_token_after top_logit_after logsumexp_after rank_after kl_after "
        "site_delta fired"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": -1}, "'layer' breaks .*-1"),
        ({"layer": 1.5}, "'layer' holds values that are not whole"),
        ({"component": "hed"}, "'component' breaks .*hed"),
        ({"head": 3}, "head >= 0 exactly for heads"),
        ({"component": "head"}, "head >= 0 exactly for heads"),
        ({"metric_after": np.nan}, "'metric_after' breaks"),
        ({"metric_after": np.inf}, "'metric_after' breaks 'finite'.*inf"),
        ({"ablation": "clean"}, "'clean' exactly when denoising"),
        ({"direction": "denoise"}, "'clean' exactly when denoising"),
        ({"half": "both"}, "'half' breaks"),
        ({"position": "first"}, "'position' breaks"),
        ({"pair_id": "same"}, "two rows are the same pair, site"),
        ({"task": 3}, "'task' holds values that are not text"),
        ({"task": None}, "'task' holds values that are not text"),
        ({"extra": 1}, "unknown columns .'extra'"),
    ],
)
def test_a_broken_rule_is_one_error_that_names_it(change, message, tmp_path):
    frame = fake_frame(3).assign(**change)
    with pytest.raises(RecordError, match=message):
        records.write(tmp_path / "x.parquet", frame, {})
    assert not list(tmp_path.iterdir())


def test_missing_column_and_infinite_logits():
    with pytest.raises(RecordError, match="lacks columns .'kl_after'"):
        records.conform(fake_frame(2).drop(columns="kl_after"))
    frame = fake_frame(2)
    frame["logits_after"] = [np.array([1, np.nan], dtype=np.float32)] * 2
    with pytest.raises(RecordError, match="'logits_after' breaks 'finite numbers'"):
        records.conform(frame)


def test_site_sets_may_share_their_first_site():
    frame = pd.concat([fake_frame(2).assign(site_set=0), fake_frame(2).assign(site_set=1)], ignore_index=True)
    assert len(records.conform(frame, records.SET_SCHEMA)) == 4
    with pytest.raises(RecordError, match="two rows"):
        records.conform(frame.assign(site_set=0), records.SET_SCHEMA)


# --- files ---


def test_the_readme_has_every_column():
    table = (ROOT / "README.md").read_text().partition("| columns of a sweep |")[2].partition("\n\n")[0]
    named = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(named) == sorted(records.SCHEMA.columns)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 5),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=6),
    metric=st.floats(allow_nan=False, allow_infinity=False),
    labels=st.booleans(),
)
def test_every_number_comes_back_to_the_bit(tmp_path_factory, rows, values, metric, labels):
    path = tmp_path_factory.mktemp("records") / "x.parquet"
    frame = fake_frame(rows).assign(metric_after=metric)
    frame["logits_after"] = [np.array(values, dtype=np.float32)] * rows
    if labels:
        frame["label_logits_after"] = [np.array(values, dtype=np.float32)] * rows
    records.write(path, frame, {"seed": 3, "name": "ä"})
    back = records.read(path)
    assert records.read_metadata(path) == {"seed": 3, "name": "ä"}
    assert list(back) == list(records.SCHEMA.columns)
    assert np.array_equal(back["metric_after"], frame["metric_after"])
    for column in ("logits_after", "logits_before") + (("label_logits_after",) if labels else ()):
        assert all(row.dtype == np.float32 for row in back[column])
        assert all(np.array_equal(a, b) for a, b in zip(back[column], frame[column], strict=True))
    pd.testing.assert_frame_equal(records.conform(frame), records.conform(back), check_dtype=False)


def test_compression_list_type_and_chosen_columns(tmp_path):
    path = tmp_path / "x.parquet"
    records.write(path, fake_frame(3), {})
    file = pq.ParquetFile(path)
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    assert str(file.schema_arrow.field("logits_before").type) == "list<element: float>"
    assert str(file.schema_arrow.field("label_logits_before").type) == "list<element: float>"
    assert list(records.read(path, ["head", "layer"])) == ["head", "layer"]
    with pytest.raises(RecordError, match="x.parquet has no column 'nope'; it has layer"):
        records.read(path, ["nope"])


def test_other_files_are_refused(tmp_path):
    with pytest.raises(RecordError, match="there is no"):
        records.read(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("layer,head\n")
    with pytest.raises(RecordError, match="not a Parquet file"):
        records.read(tmp_path / "text.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "foreign.parquet")
    with pytest.raises(RecordError, match="not written by this project"):
        records.read_metadata(tmp_path / "foreign.parquet")


def test_equal_tables_give_equal_bytes(tmp_path):
    for name in "ab":
        records.write(tmp_path / name, fake_frame(50), {"b": 1, "a": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file_and_one_message(tmp_path, monkeypatch, number):
    path = tmp_path / "x.parquet"
    records.write(path, fake_frame(2), {})
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no room left to write x.parquet .*free some space and run again") as caught:
        records.write(path, fake_frame(3), {})
    assert caught.value.errno == number
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"] and path.read_bytes() == before


def test_a_write_the_kernel_cuts_short_leaves_nothing(tmp_path):
    """The kernel itself refuses to let the file grow (RLIMIT_FSIZE), in the middle of a unit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # Python ignores SIGXFSZ: the write fails with EFBIG
    try:
        with pytest.raises(OSError, match="no room left to write u-0") as caught:
            units.run_units(tmp_path / "u", fake_plan(1), lambda _: fake_frame(500), plan=PLAN, label="x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert [p.name for p in (tmp_path / "u").iterdir()] == ["plan.json"]


# --- work units ---


def test_a_units_id_is_its_content():
    unit = Unit("last-0000", ("p1", "p2"), {"layers": [1, 2]})
    assert units.content_id(unit) == units.content_id(Unit("last-0000", ("p1", "p2"), {"layers": [1, 2]}))
    for other in (
        Unit("last-0001", ("p1", "p2"), {"layers": [1, 2]}),
        Unit("last-0000", ("p2", "p1"), {"layers": [1, 2]}),
    ):
        assert units.content_id(unit) != units.content_id(other)
    assert units.content_id(unit) != units.content_id(Unit("last-0000", ("p1", "p2"), {"layers": [1]}))
    with pytest.raises(TypeError, match="not plain data"):
        units.content_id(Unit("x", (), {"model": object()}))


def test_done_units_are_kept_and_joined_in_order(tmp_path):
    calls = []

    def compute(unit: Unit) -> pd.DataFrame:
        calls.append(unit.id)
        return fake_compute(unit)

    units.run_units(tmp_path / "u", fake_plan(2), compute, plan=PLAN, label="x")
    parts = units.run_units(tmp_path / "u", fake_plan(3)[::-1], compute, plan=PLAN, label="x")
    assert calls == ["u-0", "u-1", "u-2"]
    about = units.assemble(tmp_path / "all.parquet", parts, {"step": "x"})
    frame = records.read(tmp_path / "all.parquet")
    assert list(frame["pair_id"].iloc[::4]) == ["p2-0", "p1-0", "p0-0"]
    assert about == records.read_metadata(tmp_path / "all.parquet")
    assert about["log"] == ["halved for memory"] and about["rows"] == 12 and about["units"] == 3
    assert about["candidates"] == ["artist", "writer"] and about["step"] == "x"
    units.remove_units(tmp_path / "u")
    assert not (tmp_path / "u").exists()


def test_units_that_do_not_fit_together_are_refused(tmp_path):
    folder = tmp_path / "u"
    with pytest.raises(RecordError, match="nothing to compute"):
        units.run_units(folder, [], fake_compute, plan=PLAN, label="x")
    with pytest.raises(RecordError, match="two work units are the same"):
        units.run_units(folder, fake_plan(1) * 2, fake_compute, plan=PLAN, label="x")
    units.run_units(folder, fake_plan(1), fake_compute, plan=PLAN, label="x")
    with pytest.raises(RecordError, match="another run"):
        units.run_units(folder, fake_plan(1), fake_compute, plan=PLAN | {"data_key": "other"}, label="x")
    same = [Unit(f"v-{index}", (), {"index": 7}) for index in range(2)]
    parts = units.run_units(tmp_path / "v", same, fake_compute, plan=PLAN, label="x")
    with pytest.raises(RecordError, match="two work units give the same row"):
        units.assemble(tmp_path / "all.parquet", parts, {})
    assert not (tmp_path / "all.parquet").exists()


def test_parts_without_a_plan_are_not_trusted(tmp_path):
    units.run_units(tmp_path / "u", fake_plan(2), fake_compute, plan=PLAN, label="x")
    (tmp_path / "u" / "plan.json").unlink()
    calls = []
    units.run_units(tmp_path / "u", fake_plan(2), lambda u: calls.append(u) or fake_compute(u), plan=PLAN, label="x")
    assert len(calls) == 2


KILLED = """
import sys, time
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/tests"]
from pathlib import Path
from pipeline import units
from test_records import PLAN, fake_compute, fake_plan

def slow(unit):
    print(unit.id, flush=True)
    time.sleep(0.2)
    return fake_compute(unit)

units.run_units(Path(sys.argv[1]), fake_plan(8), slow, plan=PLAN, label="x")
"""


def test_a_killed_run_resumes_to_the_same_data_without_repeating_units(tmp_path):
    """SIGKILL in the middle; the second run computes the rest, and the table equals that of an undisturbed run."""
    folder = tmp_path / "u"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, folder, ROOT], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert 3 <= len(done) < 8
    (folder / ".u-9.parquet.1.tmp").write_bytes(b"half")  # what a kill while writing leaves

    calls = []
    parts = units.run_units(folder, fake_plan(8), lambda u: calls.append(u.id) or fake_compute(u), plan=PLAN, label="x")
    assert len(calls) == 8 - len(done)
    assert all((folder / name).stat().st_mtime_ns == when for name, when in done.items())
    assert not list(folder.glob(".*.tmp"))
    units.assemble(tmp_path / "resumed.parquet", parts, {})

    parts = units.run_units(tmp_path / "v", fake_plan(8), fake_compute, plan=PLAN, label="x")
    units.assemble(tmp_path / "undisturbed.parquet", parts, {})
    tables = [pq.read_table(tmp_path / name) for name in ("resumed.parquet", "undisturbed.parquet")]
    assert tables[0].equals(tables[1])


def test_progress_reads_well_in_a_log_file(tmp_path, capsys):
    units.run_units(tmp_path / "u", fake_plan(3), fake_compute, plan=PLAN, label="necessity")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("necessity: 100% 3 of 3, ") and lines[-1].endswith("left")
    assert lines.count("halved for memory") == 1 and len(lines) <= 4
    assert "\r" not in "".join(lines)


def test_json_is_sorted_whole_and_without_nan(tmp_path):
    path = tmp_path / "x.json"
    units.write_json(path, {"b": 1, "a": "ä"})
    assert path.read_text() == '{\n "a": "ä",\n "b": 1\n}\n' and json.loads(path.read_text())["b"] == 1
    with pytest.raises(ValueError, match="Out of range"):
        units.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text())["b"] == 1
