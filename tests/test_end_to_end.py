"""The whole line with the profile `smoke`: make, papermill, Jupyter Book and a browser, in a copy of the tree."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import book_checks
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = tuple(sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")))


def make(tree: Path, *words: str) -> subprocess.CompletedProcess:
    """`make ... PROFILE=smoke` with this interpreter; not as a child of the make that runs the tests."""
    command = ["make", *words, "PROFILE=smoke", f"PY={sys.executable}"]
    own = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=900, env=own)


def papermill(tree: Path, notebook: str, *words: str) -> list[str]:
    """The command line that runs one notebook by hand."""
    out = tree / "build" / f"{notebook}-{len(words)}.ipynb"
    out.parent.mkdir(exist_ok=True)
    base = [sys.executable, "-m", "papermill", f"notebooks/{notebook}.ipynb", str(out), "-f", "params/smoke.yaml"]
    return [*base, "-k", "python3", "--no-progress-bar", *words]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks or would track, with its smoke book built."""
    tree = tmp_path_factory.mktemp("tree") / "superset"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    done = make(tree, "book")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert (tree / done.stdout.strip().splitlines()[-1]).is_file(), "the last line must be the book's path"
    return tree


def stamps(tree: Path, *patterns: str) -> dict[str, int]:
    """Modification times of the files that match."""
    return {str(path): path.stat().st_mtime_ns for pattern in patterns for path in tree.glob(pattern)}


def test_the_book_is_whole_and_asks_nothing_of_the_network(tree, tmp_path):
    html = tree / "build/smoke/book/_build/html"
    assert book_checks.missing_local_files(html) == []
    assert book_checks.outside_urls(html) == []
    installed = str(Path(pytest.__file__).parents[1])
    assert book_checks.machine_paths(html, str(tree), str(Path.home()), installed) == []
    pages = [html / "index.html", *sorted(html.glob("executed/*.html"))]
    assert len(pages) == 1 + len(NOTEBOOKS)
    for page in pages:
        assert book_checks.requests_made(page) == [], page.name


def test_every_finding_stands_on_its_page_and_the_undoable_task_is_named(tree):
    for notebook in NOTEBOOKS:
        step = notebook[3:]
        findings = json.loads((tree / f"results/smoke/{step}.findings.json").read_text())
        page = (tree / f"build/smoke/executed/{notebook}.ipynb").read_text()
        assert len(findings["sentences"]) > 2
        for sentence in findings["sentences"]:
            assert json.dumps(sentence, ensure_ascii=False)[1:-1] in page, sentence
    baselines = json.loads((tree / "results/smoke/baselines.findings.json").read_text())
    assert baselines["able"]["superset"]["able"] is True
    assert baselines["able"]["odd_one_out"]["able"] is False
    assert "cannot do `odd_one_out`" in " ".join(baselines["sentences"])


def test_nothing_runs_twice_and_a_sentence_redraws_without_sweeping(tree):
    everything = ("results/smoke/*.parquet", "build/smoke/executed/*", "build/smoke/book/.stamp")
    before = stamps(tree, *everything)
    assert make(tree, "book").returncode == 0
    assert stamps(tree, *everything) == before
    notebook = tree / "notebooks/03_necessity.ipynb"
    notebook.write_text(notebook.read_text().replace("**Question.**", "**The question.**", 1))
    assert make(tree, "book").returncode == 0
    after = stamps(tree, *everything)
    changed = {Path(path).name for path in before if after[path] != before[path]}
    assert changed == {"03_necessity.ipynb", ".stamp"}
    assert "The question." in (tree / "build/smoke/book/_build/html/executed/03_necessity.html").read_text()


def test_a_parameter_of_a_step_reruns_it_and_what_depends_on_it(tree):
    tables = "results/smoke/*.parquet"
    before = stamps(tree, tables)
    profile = tree / "params/smoke.yaml"
    profile.write_text(profile.read_text().replace("name_roles: [names]", "name_roles: [name_a]", 1))
    assert make(tree, "book").returncode == 0
    after = stamps(tree, tables)
    changed = {Path(path).name for path in before if after[path] != before[path]}
    assert changed == {"necessity.parquet"}


def test_a_killed_step_resumes_and_ends_with_the_same_data(tree, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = papermill(tree, "03_necessity", "-p", "layers", "21,23")
    subprocess.run([*command, "-p", "results_dir", str(whole)], cwd=tree, check=True, capture_output=True, timeout=600)
    process = subprocess.Popen(
        [*command, "-p", "results_dir", str(killed)],
        cwd=tree,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    units = killed / "necessity.units"
    deadline = time.monotonic() + 300
    while len(list(units.glob("*.parquet"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = stamps(units, "*.parquet")
    assert len(done) >= 2 and not (killed / "necessity.parquet").exists(), "the step must be caught in the middle"
    # mark the finished units: each claims 1,000 s of work, which only a run that reads them can add up
    for path in map(Path, done):
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"superset_circuit"]) | {"seconds": 1000.0}
        pq.write_table(table.replace_schema_metadata({b"superset_circuit": json.dumps(about).encode()}), path)
    subprocess.run([*command, "-p", "results_dir", str(killed)], cwd=tree, check=True, capture_output=True, timeout=600)
    one, other = (pq.read_table(folder / "necessity.parquet") for folder in (whole, killed))
    assert one.equals(other)
    assert json.loads((killed / "necessity.run.json").read_text())["seconds"] >= 1000 * len(done)


def test_a_step_runs_by_hand_on_someones_own_pairs(tree, tmp_path):
    mine, out = tmp_path / "mine.csv", tmp_path / "out"
    mine.write_text(
        "clean_a,clean_b,corrupt_a,corrupt_b,answer,corrupt_answer\n"
        "Brad Pitt,Pablo Picasso,Isaac Newton,Albert Einstein,artist,scientist\n"
        "Isaac Newton,Albert Einstein,Brad Pitt,Pablo Picasso,scientist,artist\n"
    )
    own = ["-p", "pairs_file", str(mine), "-p", "results_dir", str(out), "-p", "layers", "all"]
    for notebook in ("03_necessity", "04_sufficiency"):
        done = subprocess.run(papermill(tree, notebook, *own), cwd=tree, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        table = pq.read_table(out / f"{notebook[3:]}.parquet").to_pandas()
        assert set(table["layer"]) == set(range(30))
        assert list(table.columns[:5]) == ["layer", "component", "head", "metric_before", "metric_after"]
        assert table["pair_id"].nunique() == 2
    sentences = json.loads((out / "necessity.findings.json").read_text())["sentences"]
    assert not any("[" in sentence for sentence in sentences), "one cluster is too few for intervals"
    assert "picked and reported on the same data" in " ".join(sentences), "pairs that share names are one cluster"


@pytest.mark.parametrize(
    "words,message",
    [
        (["-p", "ablation", "zero"], "unknown parameter ablation = 'zero'"),
        (["-p", "layers", "30"], "layer 30 is not in"),
        (["-p", "components", "heads"], "components"),
        (["-p", "task", "guess"], "task"),
        (["-p", "pairs_file", "nowhere.csv"], "nowhere.csv"),
        (["-p", "model_sha256", "0" * 64], "SHA-256"),
    ],
)
def test_bad_parameters_end_in_one_message_and_leave_nothing(tree, tmp_path, words, message):
    out = tmp_path / "out"
    command = papermill(tree, "03_necessity", *words, "-p", "results_dir", str(out))
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert message in done.stderr
    assert not list(out.glob("*.parquet")) and not list(out.glob("*.json"))


def test_results_of_other_parameters_are_refused(tree):
    command = papermill(tree, "03_necessity", "-p", "ablations", "zero", "-p", "results_dir", "results/smoke")
    before = stamps(tree, "results/smoke/necessity.*")
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "overwrite true" in done.stderr and "ablations" in done.stderr
    assert stamps(tree, "results/smoke/necessity.*") == before
