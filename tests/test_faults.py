"""Faults in the world: kills, full disks, files that are not as they were written, two who write at once.

The short tests plant a fault in results that stand-ins have made. The long ones plant it in a copy of the built smoke
book, and each says in one line of the summary what was tried, how often, and how often something was lost or wrong.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from smoke_book import make

from lib import locks, records
from lib.records import RecordError
from pipeline import keys, units
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
    with pytest.raises(RecordError, match=r"necessity.parquet .*; delete it, and run again what writes it") as caught:
        begin().table(own)
    assert caught.value._render_traceback_() == [f"RecordError: {caught.value}"]  # all that a notebook shows
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


def test_a_kill_while_results_are_moved_aside_or_back_loses_nothing(here, monkeypatch):  # noqa: F811
    before, step, out = begin().table(table("necessity", fake_plan(2), fake_compute)), PLAN["necessity"], here / "out"
    begin().table(table("joint", fake_plan(1), fake_compute))
    begin().write_findings({})
    files, move = sorted(path.name for path in out.iterdir()), os.replace

    def killed_after(count: int, act: Callable, *given: object) -> None:
        moves = []

        def replace(*paths: Path) -> None:
            moves.append(paths)
            if len(moves) > count:
                raise KeyboardInterrupt
            move(*paths)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, "replace", replace)
            act(*given)

    for count in range(len(files)):
        killed_after(count, keys.set_aside, out, step)
        aside = keys.set_aside(out, step)
        assert sorted(path.name for path in aside.iterdir()) == files
        killed_after(count, begin)
        calls = []
        assert begin().table(table("necessity", fake_plan(2), counting(calls))).equals(before) and not calls
        begin().write_findings({})
        assert sorted(path.name for path in out.iterdir()) == sorted([*files, "stale"])


# --- one writer ---

HOLDER = """import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from lib.locks import Lock
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
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
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


def test_nothing_is_set_aside_under_another_writer(here, holder, monkeypatch):  # noqa: F811
    begin().table(table("necessity", fake_plan(2), fake_compute))
    begin().write_findings({})
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    first, by_hand = holder(here / "out"), {"In": ["", 'profile = "smoke"']}
    with pytest.raises(StepError, match=f"is being written to by process {first.pid} on"):
        begin(seed=4, **by_hand)
    (here / "out" / ".lock").write_bytes(b"")
    with pytest.raises(StepError, match="is being written to by another process: wait for it"):
        begin(seed=4, **by_hand)
    assert (here / "out" / "necessity.parquet").exists() and not (here / "out" / "stale").exists()


def test_a_file_system_without_locks_is_said(here, monkeypatch):  # noqa: F811
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with pytest.raises(
        StepError, match=r"out cannot be written to: its file system has no locks .*another results_dir"
    ):
        begin().table(table("necessity", fake_plan(1), fake_compute))


def test_a_second_make_gets_one_sentence(project, holder, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    first = holder(project.folder / "build/smoke")
    assert project.run(status=1) == []
    error = capsys.readouterr().err
    assert f"build/smoke is being written to by process {first.pid} on " in error and error.count("\n") == 1


# --- the long ones: real steps, in a copy of the built smoke book ---


def results(tree: Path, step: str) -> dict[str, object]:
    """What a step has left, but for times: its tables, and the bytes of findings, figures and extra files. Not what its
    tokenizer was asked: where units were done before, that is less."""
    folder = tree / "results/smoke"
    tables = {*folder.glob(f"{step}*.parquet")} - {folder / f"{step}.tokens.parquet"}
    found = {path.name: pq.read_table(path).replace_schema_metadata(None) for path in tables}
    names = [f"{step}.findings.json", *PLAN[step].extra_files]
    files = [*(folder / name for name in names), *folder.glob(f"figures/{step}-*")]
    return found | {path.name: path.read_bytes() for path in files if path.is_file()}


def same(one: object, other: object) -> bool:
    """Tables by their values; NaN, of which Arrow says that it is no NaN, is one."""
    if not (isinstance(one, pa.Table) and isinstance(other, pa.Table)):
        return one == other
    return one.schema == other.schema and one.to_pandas().equals(other.to_pandas())


def others(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """What is lost, new, or not the same."""
    return [name for name in {*before, *after} if not same(before.get(name), after.get(name))]


def end(process: subprocess.Popen) -> None:
    """SIGKILL for a process and all that it has started, kernels in sessions of their own among them."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.long
@pytest.mark.parametrize("step", PLAN.names)
def test_three_kills_at_random_moments_and_the_data_are_the_same(own_tree, step, record_property):
    before, draw = results(own_tree, step), random.Random(step)
    page = own_tree / f"build/smoke/executed/{PLAN.page(step)}.ipynb"
    seconds = json.loads(page.read_text())["metadata"]["papermill"]["duration"]
    command, kills = [sys.executable, "-m", "steps", "run", step, "--profile", "smoke"], 0
    while kills < 3:
        if page.exists():  # it was not there yet, or has been done in time
            assert make(own_tree, f"clean-{step}").returncode == 0 and not page.exists()
        process = subprocess.Popen(command, cwd=own_tree, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert process.wait(draw.uniform(5, 5 + seconds)) == 0
        except subprocess.TimeoutExpired:
            end(process)
            kills += 1
    done = make(own_tree, f"step-{step}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    wrong = others(before, results(own_tree, step))
    record_property("fault", f"SIGKILL of {step} | {kills} | {len(wrong)}")
    assert not wrong
    left = [path for path in (own_tree / "results").rglob("*") if path.name.startswith(".") or path.suffix == ".units"]
    assert not left


def foreign(path: Path) -> bytes:
    """Another file of the kind."""
    content = path.read_bytes()
    return next(own for other in sorted(path.parent.glob(f"*{path.suffix}")) if (own := other.read_bytes()) != content)


PLANTED = {"truncated": truncated, "flipped": flipped}  # and foreign
# A file of each kind that make makes again by itself, of another step each where it can be.
HEALED = {
    "results/smoke/pairs.parquet": "baselines",
    "results/smoke/baselines.findings.json": "baselines",
    "results/smoke/coarse_sweep.findings.json": "coarse_sweep",
    "results/smoke/figures/necessity-*.png": "necessity",
    "results/smoke/figures/sufficiency-*.svg": "sufficiency",
    "build/smoke/executed/05_hydra.ipynb": "hydra",
    "build/smoke/keys/retrieval_heads.key": "retrieval_heads",
    "results/smoke/claims.json": "story",
}
PAGES = ("index.html", "executed/02_coarse_sweep.html", "_static/*.css")
# Those of a step that are named, with the way out.
NAMED = ("coarse_sweep.parquet", "coarse_sweep.tokens.parquet", "coarse_sweep.run.json")


def plant(path: Path, damage: str) -> None:
    path.write_bytes(PLANTED[damage](path.read_bytes()) if damage in PLANTED else foreign(path))


@pytest.mark.long
@pytest.mark.parametrize("damage", [*PLANTED, "foreign"])
def test_damaged_files_of_every_kind_are_made_again(own_tree, damage, record_property):
    before = {step: results(own_tree, step) for step in PLAN.names}
    for pattern in HEALED:
        plant(sorted(own_tree.glob(pattern))[0], damage)
    done = make(own_tree, "book")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    again = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("==> ")]
    assert again == [*(PLAN.page(step) for step in dict.fromkeys(HEALED.values())), "book"]
    wrong = [name for step in PLAN.names for name in others(before[step], results(own_tree, step))]
    html = own_tree / "build/smoke/book/_build/html"
    for pattern in PAGES:
        plant(sorted(html.glob(pattern))[0], damage)
        assert make(own_tree, "book").stdout.count("==> book") == 1, pattern
    assert "==>" not in make(own_tree, "book").stdout
    record_property("fault", f"{damage}: {', '.join([*HEALED, *PAGES])} | {len(HEALED) + len(PAGES)} | {len(wrong)}")
    assert not wrong


@pytest.mark.long
@pytest.mark.parametrize("name", NAMED)
def test_damaged_files_that_cannot_be_made_again_unasked_are_named(own_tree, name, record_property):
    path, before, step = own_tree / "results/smoke" / name, results(own_tree, "coarse_sweep"), "step-coarse_sweep"
    wrong = []
    for damage in (*PLANTED, "foreign"):
        plant(path, damage)
        done = make(own_tree, step)
        if done.returncode:
            told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert len(told) == 1 and name in told[0] and "delete it" in told[0], done.stderr
            path.unlink()
            assert make(own_tree, step).returncode == 0
        wrong += others(before, results(own_tree, "coarse_sweep"))
        assert "==>" not in make(own_tree, step).stdout
    record_property("fault", f"{', '.join(PLANTED)}, foreign: {name} | 3 | {len(wrong)}")
    assert not wrong


def papermill(folder: Path, page: Path) -> list[str]:
    """The command that runs step 03 of the smoke profile into a folder."""
    command = [sys.executable, "-m", "papermill", "notebooks/03_necessity.ipynb", str(page), "-f", "params/smoke.yaml"]
    return [*command, "-k", "python3", "--no-progress-bar", "-r", "results_dir", str(folder)]


def sweep(tree: Path, folder: Path, page: Path) -> subprocess.CompletedProcess:
    command = papermill(folder, page / "out.ipynb")
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=600)


def necessity(folder: Path) -> object:
    return pq.read_table(folder / "necessity.parquet").replace_schema_metadata(None)


@pytest.fixture
def mount(tmp_path):
    """Puts a small file system at a folder."""
    mounted = []

    def at(folder: Path, how: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("a file system of its own size needs the right to mount one")
        mounted.append(folder)
        return folder

    yield at
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def make_larger(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)


@pytest.mark.long
def test_a_full_disk_is_one_sentence_and_then_the_same_data(smoke_tree, tmp_path, mount, record_property):
    disk = mount(tmp_path / "disk", "size=500k")
    for _ in range(2):  # the second finds it full
        done = sweep(smoke_tree, disk / "out", tmp_path)
        assert done.returncode and "no room left to write" in done.stderr and "Traceback" not in said(tmp_path)
        assert not list(disk.rglob("*.tmp")) and not list(disk.rglob("necessity.parquet"))
    units_there = len(list(disk.glob("out/*.units/*.parquet")))
    make_larger(disk)
    assert sweep(smoke_tree, disk / "out", tmp_path).returncode == 0
    wrong = not same(necessity(disk / "out"), necessity(smoke_tree / "results/smoke"))
    record_property("fault", f"disk full after {units_there} units | 2 | {int(wrong)}")
    assert not wrong and units_there


def said(folder: Path) -> str:
    """The errors that stand in a page."""
    cells = json.loads((folder / "out.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ()) if output["output_type"] == "error"]
    return "".join(line for output in outputs for line in output["traceback"])


@pytest.mark.long
def test_a_disk_that_is_full_for_pages_is_one_sentence_and_then_the_same_book(own_tree, mount, record_property):
    before = results(own_tree, "baselines")
    disk = mount(own_tree / "build/smoke", "size=100k")
    done = make(own_tree, "step-baselines")
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and len(told) == 1 and "No space left" in told[0] and "Traceback" not in done.stderr
    make_larger(disk)
    assert make(own_tree, "step-baselines").returncode == 0
    wrong = others(before, results(own_tree, "baselines"))
    record_property("fault", f"disk full for pages | 1 | {len(wrong)}")
    assert not wrong


@pytest.mark.long
def test_folders_with_odd_names_and_folders_that_cannot_be_written(smoke_tree, tmp_path, mount, record_property):
    odd = tmp_path / "ä b" / "$x ~'\" ü#%"
    done = sweep(smoke_tree, odd, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    wrong = not same(necessity(odd), necessity(smoke_tree / "results/smoke"))
    file = tmp_path / "file"
    file.write_text("x")
    done = sweep(smoke_tree, file / "out", tmp_path)
    assert done.returncode and "give another results_dir" in done.stderr
    done = sweep(smoke_tree, mount(tmp_path / "shut", "ro") / "out", tmp_path)
    assert done.returncode and "Read-only file system" in done.stderr and "give another results_dir" in done.stderr
    record_property("fault", f"odd folder, read-only folder, file for a folder | 3 | {int(wrong)}")
    assert not wrong


@pytest.mark.long
def test_two_writers_at_once(smoke_tree, tmp_path, record_property):
    """Of two runs into one folder one is told in a sentence, and the data are as if the other had been alone."""
    commands = [papermill(tmp_path / "out", tmp_path / f"{number}.ipynb") for number in range(2)]
    both = [subprocess.Popen(own, cwd=smoke_tree, stderr=subprocess.PIPE, text=True) for own in commands]
    told = [process.communicate(timeout=600)[1] for process in both]
    failed = [text for process, text in zip(both, told, strict=True) if process.returncode]
    assert len(failed) == 1 and "is being written to by process" in failed[0], told
    wrong = not same(necessity(tmp_path / "out"), necessity(smoke_tree / "results/smoke"))
    record_property("fault", f"two writers | 1 | {int(wrong)}")
    assert not wrong


@pytest.mark.long
@pytest.mark.parametrize("year", [1, 4_000_000_000], ids=["the past", "the future"])
def test_a_copy_with_other_dates_and_links_for_folders_is_up_to_date(smoke_tree, tmp_path, year, record_property):
    """As it would be on another machine: nothing is made again."""
    tree = Path(shutil.copytree(smoke_tree, tmp_path / "ä b" / "copy", symlinks=True))
    for path in tree.rglob("*"):
        os.utime(path, (year, year))
    for name in ("results", "build"):
        (tree / name).rename(tmp_path / name)
        (tree / name).symlink_to(tmp_path / name)
    done = make(tree, "book")
    assert done.returncode == 0 and "==>" not in done.stdout and "aside" not in done.stdout, done.stdout + done.stderr
    record_property("fault", "a copy elsewhere, its files of another date, links for its folders | 1 | 0")


@pytest.mark.long
@pytest.mark.parametrize("what", ["a sweep", "the book"])
def test_an_interrupted_make_says_how_to_go_on(own_tree, what, record_property):
    step, before = {"a sweep": ["necessity"], "the book": []}[what], results(own_tree, "necessity")
    if step:
        assert make(own_tree, "clean-necessity").returncode == 0
    else:
        page = own_tree / "book/index.md"
        page.write_text(page.read_text() + "\nA line.\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "steps", "run", *step, "--profile", "smoke"],
        cwd=own_tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # what is started in the background ignores Ctrl-C, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (process.stdout.readline() or "==>").startswith("==>"):
        pass
    while step and not list(own_tree.glob("results/smoke/necessity.units/*.parquet")) and process.poll() is None:
        time.sleep(0.1)
    time.sleep(2)
    begun = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "interrupted; what is done is kept; run the same command to go on\n"
    _, alive = psutil.wait_procs(begun, timeout=10)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
    assert make(own_tree, "book").returncode == 0
    wrong = others(before, results(own_tree, "necessity"))
    record_property("fault", f"Ctrl-C in {what} | 1 | {len(wrong)}")
    assert not wrong
