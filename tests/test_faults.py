"""Faults in the world: kills, full disks, files that are not as they were written, two who write at once.

The short tests plant a fault in results that stand-ins have made. The long ones plant it in a copy of the built smoke
book, and each says in one line of the summary what was tried, how often, and how often something was lost or wrong.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from smoke_book import make

from lib import records
from lib.records import RecordError
from pipeline import units
from pipeline.step import WRITING, StepError
from steps.registry import PLAN
from tests.test_keys import house  # noqa: F401
from tests.test_records import fake_compute, fake_frame, fake_plan
from tests.test_run import project  # noqa: F401
from tests.test_steps import begin, counting, here, table  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    """40 bytes of it are others."""
    out, draw = bytearray(content), random.Random(0)
    for place in draw.sample(range(len(out)), min(40, len(out))):
        out[place] ^= draw.randrange(1, 256)
    return bytes(out)


def zeros(content: bytes) -> bytes:
    return bytes(len(content))


DAMAGES = {"truncated": truncated, "flipped": flipped, "zeros": zeros, "empty": lambda content: b""}


@pytest.fixture
def damage(request) -> Callable[[Path], None]:
    """Damages a file in the way that the test asks for."""
    return lambda path: path.write_bytes(DAMAGES[request.param](path.read_bytes()))


damaged = pytest.mark.parametrize("damage", DAMAGES, indirect=True)


# --- tables and units ---


@damaged
def test_a_damaged_table_is_named_with_the_way_out(here, damage):  # noqa: F811
    own, calls = table("necessity", fake_plan(3), counting([])), []
    before = begin().table(own)
    path = here / "out" / "necessity.parquet"
    damage(path)
    with pytest.raises(RecordError, match=r"necessity.parquet .*; delete it, and run again what writes it"):
        begin().table(own)
    path.unlink()
    assert begin().table(table("necessity", fake_plan(3), counting(calls))).equals(before) and len(calls) == 3


def test_a_table_of_another_seed_is_not_used(here):  # noqa: F811
    own = table("necessity", fake_plan(2), fake_compute)
    begin().table(own)
    begin(seed=4, results_dir="other").table(own)
    shutil.copy(here / "other" / "necessity.parquet", here / "out" / "necessity.parquet")
    key = begin().data_key[:8]
    with pytest.raises(
        StepError, match=rf"out/necessity.parquet is of another run .*\(seed 4, .*not {key}\); delete it"
    ):
        begin().table(own)
    (here / "out" / "necessity.run.json").unlink()  # its key is then all there is
    with pytest.raises(StepError, match="seed was 4, now 0"):
        begin()


@damaged
def test_a_damaged_unit_is_computed_again_and_the_log_says_so(here, damage):  # noqa: F811
    whole = begin(results_dir="whole").table(table("necessity", fake_plan(3), fake_compute))
    interrupt(fake_plan(3), 2)
    unit = here / "out" / "necessity.units" / f"{units.content_id(fake_plan(3)[0])}.parquet"
    damage(unit)
    step, calls = begin(), []
    assert step.table(table("necessity", fake_plan(3), counting(calls))).equals(whole)
    assert calls == ["u-0", "u-2"]
    assert step.record["log"][0].startswith("unit u-0 was computed again: its file is ")
    assert str(here) not in json.dumps(step.record)


def test_a_unit_of_another_key_is_computed_again(here):  # noqa: F811
    interrupt(fake_plan(3), 2)
    interrupt(fake_plan(3), 2, seed=4, results_dir="other")
    name = f"necessity.units/{units.content_id(fake_plan(3)[0])}.parquet"
    shutil.copy(here / "other" / name, here / "out" / name)
    step, calls = begin(), []
    step.table(table("necessity", fake_plan(3), counting(calls)))
    assert calls == ["u-0", "u-2"] and "its file held u-0 of key" in step.record["log"][0]


def interrupt(plan: list, at: int, **given) -> None:
    """A sitting that fails at a unit, as another process would leave it."""

    def compute(unit):
        if unit is plan[at]:
            raise RuntimeError("stopped")
        return fake_compute(unit)

    with pytest.raises(RuntimeError, match="stopped"):
        begin(**given).table(table("necessity", plan, compute))


def test_a_table_flipped_a_hundred_times_is_never_read(tmp_path):
    """One bit at a time, wherever it lies: in a page, its header, the footer, the metadata, the checksum."""
    path, draw = tmp_path / "x.parquet", random.Random(1)
    records.write(path, fake_frame(20), {"seed": 0})
    content = path.read_bytes()
    for place in draw.sample(range(len(content)), 100):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :])
        with pytest.raises(RecordError, match="x.parquet"):
            records.read(path)


# --- what is beside tables ---


def test_the_models_facts_outlive_a_kill_between_the_last_unit_and_the_table(here, monkeypatch):  # noqa: F811
    facts = {"name": "m", "sha256": "s", "dtype": "float32", "device": "cpu", "n_layers": 30, "n_heads": 9}
    step = begin()
    step.__dict__.update(model="loaded", model_facts=facts | {"noise": 1e-3})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(units, "assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        step.table(table("necessity", fake_plan(2), fake_compute))
    calls = []
    again = begin()
    again.table(table("necessity", fake_plan(2), counting(calls)))
    assert calls == [] and again.record["model"] == facts | {"noise": 1e-3}
    (here / "out" / "necessity.run.json").unlink()
    begin().table(table("necessity", fake_plan(2), counting(calls)))
    assert calls == [] and begin().record["model"]["n_layers"] == 30


@damaged
@pytest.mark.parametrize("name", ["necessity.run.json", "necessity.units/plan.json"])
def test_a_damaged_record_or_plan_is_named_with_the_way_out(here, damage, name):  # noqa: F811
    interrupt(fake_plan(3), 2)
    path, calls = here / "out" / name, []
    if not path.exists():
        begin().table(table("necessity", fake_plan(3), fake_compute))
    damage(path)
    with pytest.raises(RecordError, match=rf"{name} is .*; delete it, and run again what writes it"):
        begin().table(table("necessity", fake_plan(3), counting(calls)))
    path.unlink()
    begin().table(table("necessity", fake_plan(3), counting(calls)))
    assert len(calls) == (0 if name.endswith("run.json") else 3)


def test_a_digit_of_a_record_is_a_checksum_away(here):  # noqa: F811
    begin().table(table("necessity", fake_plan(3), fake_compute))
    path = here / "out" / "necessity.run.json"
    path.write_text(path.read_text().replace('"rows": 12', '"rows": 13'))
    with pytest.raises(RecordError, match="necessity.run.json is damaged: its checksum is that of another text"):
        begin()


@damaged
def test_damaged_findings_are_not_read_by_the_steps_after(here, damage):  # noqa: F811
    begin("coarse_sweep").write_findings({"critical_layers": [22]})
    damage(here / "out" / "coarse_sweep.findings.json")
    with pytest.raises(RecordError, match="coarse_sweep.findings.json is not the file that step coarse_sweep wrote"):
        begin().find("coarse_sweep")
    begin("coarse_sweep").write_findings({"critical_layers": [22]})
    assert begin().find("coarse_sweep")["critical_layers"] == [22]


def test_findings_of_another_seed_are_not_read_either(here):  # noqa: F811
    begin("coarse_sweep").write_findings({"critical_layers": [22]})
    begin("coarse_sweep", seed=4, results_dir="other").write_findings({"critical_layers": [3]})
    shutil.copy(here / "other" / "coarse_sweep.findings.json", here / "out")
    with pytest.raises(RecordError, match="is not the file that step coarse_sweep wrote"):
        begin().find("coarse_sweep")


def test_make_makes_damaged_findings_figures_and_pairs_again_and_sweeps_nothing_for_it(project):  # noqa: F811
    names = ("coarse_sweep.findings.json", "figures/coarse_sweep-a.png", "figures/coarse_sweep-a.svg", "pairs.parquet")
    paths = [project.folder / "results/smoke" / name for name in names]
    project.run()
    before = [path.read_bytes() for path in paths]
    for path, content in zip(paths, before, strict=True):
        path.write_bytes(flipped(content))
        assert project.run() == ["baselines" if path.suffix == ".parquet" else "coarse_sweep"], path
        assert [path.read_bytes() for path in paths] == before
    assert project.run() == []


def test_make_builds_the_book_again_where_any_of_its_pages_is_damaged(project):  # noqa: F811
    project.run()
    other = project.folder / "build/smoke/book/_build/html/_static/x.svg"
    other.parent.mkdir()
    other.write_text("new")
    assert project.run() == ["book"]


# --- one writer ---

HOLDER = """import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from lib.records import Lock
lock = Lock(Path(sys.argv[2]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that writes to a folder."""
    begun = []

    def hold(folder: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(ROOT), str(folder / ".lock")]
        begun.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert begun[-1].stdout.readline() == "held\n"
        return begun[-1]

    yield hold
    for process in begun:
        process.kill()
        process.communicate()


def test_a_second_writer_gets_one_sentence_and_a_dead_one_is_no_obstacle(here, holder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(records, "PATIENCE", 0.2)
    first = holder(here / "out")
    says = (
        rf"out is being written to by process {first.pid} on \S+: wait for it, or stop it, or give another results_dir"
    )
    with pytest.raises(StepError, match=says):
        begin().table(table("necessity", fake_plan(1), fake_compute))
    assert not list((here / "out").glob("necessity*"))
    first.kill()
    first.wait()
    left = here / "out" / ".necessity.parquet.7.tmp"
    left.write_bytes(b"half")
    begin().table(table("necessity", fake_plan(1), fake_compute))
    assert not left.exists() and (here / "out").resolve() in WRITING
    begin().write_findings({})
    assert not (here / "out" / ".lock").exists() and (here / "out").resolve() not in WRITING


def test_a_second_make_gets_one_sentence(project, holder, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(records, "PATIENCE", 0.2)
    first = holder(project.folder / "build/smoke")
    assert project.run(status=1) == []
    error = capsys.readouterr().err
    assert f"build/smoke is being written to by process {first.pid} on " in error and error.count("\n") == 1


# --- the long ones: real steps, in a copy of the built smoke book ---


def results(tree: Path, step: str) -> dict[str, object]:
    """What a step has left, but for times: its tables, and the bytes of findings, figures and extra files."""
    folder = tree / "results/smoke"
    found = {path.name: pq.read_table(path).replace_schema_metadata(None) for path in folder.glob(f"{step}*.parquet")}
    names = [f"{step}.findings.json", *PLAN[step].extra_files]
    files = [*(folder / name for name in names), *folder.glob(f"figures/{step}-*")]
    return found | {path.name: path.read_bytes() for path in files if path.is_file()}


def end(process: subprocess.Popen) -> None:
    """SIGKILL for a process and all that it has started, kernels in sessions of their own among them."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.long
@pytest.mark.parametrize("step", PLAN.names)
def test_three_kills_at_random_moments_and_the_data_are_the_same(own_tree, step, record_property):
    before, draw = results(own_tree, step), random.Random(step)
    page = own_tree / f"build/smoke/executed/{PLAN.page(step)}.ipynb"
    seconds = json.loads(page.read_text())["metadata"]["papermill"]["duration"]
    assert make(own_tree, f"clean-{step}").returncode == 0 and not page.exists()
    command = [sys.executable, "-m", "steps", "run", step, "--profile", "smoke"]
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(command, cwd=own_tree, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(draw.uniform(2, 2 + seconds))
        except subprocess.TimeoutExpired:
            end(process)
            kills += 1
    done = make(own_tree, f"step-{step}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    after = results(own_tree, step)
    wrong = [name for name in {*before, *after} if not same(before.get(name), after.get(name))]
    record_property("fault", f"SIGKILL of {step} | {kills} | {len(wrong)}")
    assert not wrong
    left = [path for path in (own_tree / "results").rglob("*") if path.name.startswith(".") or path.suffix == ".units"]
    assert not left


def same(one: object, other: object) -> bool:
    return one.equals(other) if hasattr(one, "equals") and other is not None else one == other


# Files that steps leave, by what is to happen where one is not as it was written: it is made again by itself, or named.
HEALED = (
    *("results/smoke/coarse_sweep.findings.json", "results/smoke/pairs.parquet", "results/smoke/claims.json"),
    *("results/smoke/figures/coarse_sweep-curves.png", "results/smoke/figures/coarse_sweep-curves.svg"),
    *("build/smoke/executed/02_coarse_sweep.ipynb", "build/smoke/keys/coarse_sweep.key"),
    *("build/smoke/book/_build/html/index.html", "build/smoke/book/_build/html/executed/02_coarse_sweep.html"),
)
NAMED = ("results/smoke/coarse_sweep.parquet", "results/smoke/coarse_sweep.run.json")
NAMED += ("results/smoke/coarse_sweep.tokens.parquet",)


@pytest.mark.long
@pytest.mark.parametrize("name", HEALED + NAMED)
def test_damaged_files_of_every_kind_are_found(own_tree, name, record_property):
    path, before = own_tree / name, {step: results(own_tree, step) for step in PLAN.names}
    content, wrong = path.read_bytes(), 0
    foreign = next(other for other in sorted(path.parent.glob(f"*{path.suffix}")) if other.read_bytes() != content)
    tries = {"truncated": truncated(content), "flipped": flipped(content), "foreign": foreign.read_bytes()}
    for damage in tries.values():  # noqa: F402
        path.write_bytes(damage)
        done = make(own_tree, "book")
        if done.returncode:
            told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert len(told) == 1 and path.name in told[0] and "delete it" in told[0], done.stderr
            path.unlink()
            assert make(own_tree, "book").returncode == 0
        after = {step: results(own_tree, step) for step in PLAN.names}
        wrong += any(
            not same(before[step].get(file), after[step].get(file)) for step in before for file in {*before[step]}
        )
        assert make(own_tree, "book").stdout.count("==>") == 0
    record_property("fault", f"{', '.join(tries)}: {name} | {len(tries)} | {wrong}")
    assert not wrong


def sweep(tree: Path, folder: Path, page: Path) -> subprocess.CompletedProcess:
    """Step 03 of the smoke profile by papermill into a folder."""
    command = [sys.executable, "-m", "papermill", "notebooks/03_necessity.ipynb", str(page / "out.ipynb")]
    command += [
        "-f",
        "params/smoke.yaml",
        "-k",
        "python3",
        "--no-progress-bar",
        "-r",
        "results_dir",
        str(folder),
    ]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=600)


def necessity(folder: Path) -> object:
    return pq.read_table(folder / "necessity.parquet").replace_schema_metadata(None)


@pytest.mark.long
def test_a_full_disk_is_one_sentence_and_then_the_same_data(smoke_tree, tmp_path, record_property):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of its own size needs the right to mount one")
    try:
        done = sweep(smoke_tree, disk / "out", tmp_path)
        assert done.returncode and "no room left to write" in done.stderr
        assert not list(disk.rglob("*.tmp")) and not list(disk.rglob("necessity.parquet"))
        units_there = len(list(disk.glob("out/*.units/*.parquet")))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert sweep(smoke_tree, disk / "out", tmp_path).returncode == 0
        wrong = not same(necessity(disk / "out"), necessity(smoke_tree / "results/smoke"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    record_property("fault", f"disk full after {units_there} units | 1 | {int(wrong)}")
    assert not wrong and units_there


@pytest.mark.long
def test_folders_with_odd_names_and_folders_that_cannot_be_written(smoke_tree, tmp_path, record_property):
    odd = tmp_path / "ä b" / "$x ~'\" ü#%"
    done = sweep(smoke_tree, odd, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    wrong = not same(necessity(odd), necessity(smoke_tree / "results/smoke"))
    file = tmp_path / "file"
    file.write_text("x")
    done = sweep(smoke_tree, file / "out", tmp_path)
    assert done.returncode and "give another results_dir" in done.stderr
    shut = tmp_path / "shut"
    shut.mkdir()
    if not subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(shut)], capture_output=True).returncode:
        try:
            done = sweep(smoke_tree, shut / "out", tmp_path)
        finally:
            subprocess.run(["umount", str(shut)], check=True)
        assert done.returncode and "Read-only file system" in done.stderr and "give another results_dir" in done.stderr
    record_property("fault", f"odd folder, read-only folder, file for a folder | 3 | {int(wrong)}")
    assert not wrong


@pytest.mark.long
def test_two_writers_at_once(smoke_tree, tmp_path, record_property):
    """Of two runs into one folder one is told in a sentence, and the data are as if the other had been alone."""
    command = [sys.executable, "-m", "papermill", "notebooks/03_necessity.ipynb"]
    how = ["-f", "params/smoke.yaml", "-k", "python3", "--no-progress-bar", "-r", "results_dir", str(tmp_path / "out")]
    both = [
        subprocess.Popen(
            [*command, str(tmp_path / f"{number}.ipynb"), *how], cwd=smoke_tree, stderr=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=600)[1] for process in both]
    failed = [text for process, text in zip(both, said, strict=True) if process.returncode]
    assert len(failed) == 1 and "is being written to by process" in failed[0], said
    wrong = not same(necessity(tmp_path / "out"), necessity(smoke_tree / "results/smoke"))
    record_property("fault", f"two writers | 1 | {int(wrong)}")
    assert not wrong


@pytest.mark.long
def test_an_interrupted_make_says_how_to_go_on(own_tree):
    assert make(own_tree, "clean-necessity").returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "steps", "run", "necessity", "--profile", "smoke"],
        cwd=own_tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(own_tree.glob("results/smoke/necessity.units/*.parquet")):
        time.sleep(0.1)
    begun = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "interrupted; what is done is kept; run the same command to go on\n"
    gone, alive = psutil.wait_procs(begun, timeout=10)
    assert not alive
    assert make(own_tree, "step-necessity").returncode == 0
