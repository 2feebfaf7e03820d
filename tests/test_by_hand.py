"""A step run by hand on someone's own pairs, with papermill and cell by cell in a notebook that was opened: results, a
killed run that resumes, cells run twice, parameters changed in their cell, and mistakes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient

from lib import records

ROOT = Path(__file__).resolve().parents[1]
HEADER = "clean_a,clean_b,corrupt_a,corrupt_b,answer,corrupt_answer\n"
TWO = """Brad Pitt,Pablo Picasso,Isaac Newton,Albert Einstein,artist,scientist
Isaac Newton,Albert Einstein,Brad Pitt,Pablo Picasso,scientist,artist
"""
# Nobody stands in two of these, and all names have three tokens: they lend each other means and resamples.
SIX = """Fred Astaire,Piet Mondrian,Christopher Hitchens,Edgar Allan Poe,artist,writer
Andy Warhol,Celia Cruz,Emily Bronte,Nicholas Kristof,artist,writer
Mark Rothko,Duke Ellington,Julian Schwinger,John von Neumann,artist,scientist
Neville Chamberlain,Chuck Grassley,Robert Millikan,Paul Dirac,politician,scientist
Maria Callas,Vincent van Gogh,Moliere,Laurence Sterne,artist,writer
Miriam Makeba,Spike Lee,Sydney Brenner,Willard Gibbs,artist,scientist
"""


def papermill(folder: Path, notebook: str, pairs: str, *words: str) -> list[str]:
    """The command that runs a notebook on these pairs; results go to folder/out."""
    folder.mkdir(exist_ok=True)
    (folder / "mine.csv").write_text(HEADER + pairs)
    own = ["-p", "profile", "by-hand", "-p", "pairs_file", str(folder / "mine.csv"), "-p", "results_dir"]
    command = [sys.executable, "-m", "papermill", f"notebooks/{notebook}.ipynb", str(folder / f"{notebook}.ipynb")]
    how = ["-f", "params/smoke.yaml", "-k", "python3", "--no-progress-bar"]
    return [*command, *how, *own, str(folder / "out"), *words]


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


class Opened:
    """A notebook as JupyterLab and VS Code open it: a kernel that starts in the notebook's folder runs cell by cell."""

    def __init__(self, notebook: Path):
        code = [cell for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
        place = {"metadata": {"path": str(notebook.parent)}}
        self.client = NotebookClient(nbformat.v4.new_notebook(cells=code), kernel_name="python3", resources=place)
        self.cells = self.client.nb.cells

    def change(self, **given: object) -> None:
        """Write values into the parameters cell."""
        for name, value in given.items():
            text, times = re.subn(rf"^{name} = .*", f"{name} = {value!r}", self.cells[0].source, flags=re.M)
            assert times == 1, name
            self.cells[0].source = text

    def run(self, times: int = 1, first: int | None = None) -> tuple[int, str]:
        """Run every cell so often, or the `first` ones; how many figures there are, and all that was printed."""
        outputs = []
        for number, cell in enumerate(self.cells[:first]):
            for _ in range(times):
                self.client.execute_cell(cell, number)
                outputs += cell.outputs
        figures = sum("image/png" in output.get("data", {}) for output in outputs)
        return figures, "".join(output.get("text", "") for output in outputs)


@pytest.mark.long
def test_a_killed_step_resumes_and_ends_with_the_same_data(tmp_path):
    words = ("-p", "layers", "21,23", "-p", "name_roles", "name_a,name_b,names")
    whole, killed = (papermill(tmp_path / name, "03_necessity", SIX, *words) for name in ("whole", "killed"))
    assert (done := run(whole)).returncode == 0, done.stderr[-3000:]
    process = subprocess.Popen(
        killed, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    out = tmp_path / "killed" / "out"
    units = out / "necessity.units"
    deadline = time.monotonic() + 300
    while len(list(units.glob("*.parquet"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = sorted(units.glob("*.parquet"))
    assert len(finished) >= 2 and not (out / "necessity.parquet").exists(), "the step must be caught in the middle"
    # mark the finished units: each claims 1,000 s of work, which only a run that reads them can add up
    for path in finished:
        records.write_table(path, pq.read_table(path), records.read_metadata(path) | {"seconds": 1000.0})
    assert (done := run(killed)).returncode == 0, done.stderr[-3000:]
    one, other = (pq.read_table(tmp_path / name / "out" / "necessity.parquet") for name in ("whole", "killed"))
    assert one.equals(other) and set(one["ablation"].to_pylist()) == {"zero", "mean", "resample", "counterfactual"}
    assert json.loads((out / "necessity.run.json").read_text())["seconds"] >= 1000 * len(finished)


def test_a_step_runs_on_someones_own_pairs(tmp_path):
    out = tmp_path / "out"
    done = run(papermill(tmp_path, "03_necessity", TWO, "-p", "layers", "19,21,23,29"))
    assert done.returncode == 0, done.stderr[-3000:]
    opened = Opened(ROOT / "notebooks/04_sufficiency.ipynb")
    opened.change(profile="smoke", pairs_file=str(tmp_path / "mine.csv"), results_dir=str(out), layers="19,21,23,29")
    with opened.client.setup_kernel():
        figures, _ = opened.run()
        assert figures > 5
        for step in ("necessity", "sufficiency"):
            table = pq.read_table(out / f"{step}.parquet").to_pandas()
            assert set(table["layer"]) == {19, 21, 23, 29}
            assert list(table.columns[:5]) == ["layer", "component", "head", "metric_before", "metric_after"]
            assert table["pair_id"].nunique() == 2
        first = (out / "sufficiency.parquet").read_bytes()
        # other values in the parameters cell: what was there is kept; cells run twice, up to the first figure
        opened.change(layers="21,23", components="mlp,head")
        assert "results of sufficiency made otherwise set aside in" in opened.run(times=2, first=4)[1]
        table = pq.read_table(out / "sufficiency.parquet").to_pandas()
        assert set(table["layer"]) == {21, 23} and set(table["component"]) == {"mlp", "head"}
        # and comes back with the old values; variables of one's own are left alone
        opened.change(layers="19,21,23,29", components=None)
        opened.cells.insert(1, nbformat.v4.new_code_cell("note, roles = 'mine', ['last']"))
        opened.run(first=4)
        assert (out / "sufficiency.parquet").read_bytes() == first
    sentences = json.loads((out / "necessity.findings.json").read_text())["sentences"]
    assert not any("[" in sentence for sentence in sentences), "one cluster is too few for intervals"
    assert "picked and reported on the same data" in " ".join(sentences), "pairs that share names are one cluster"


@pytest.mark.parametrize(
    "words,message",
    [
        (["-p", "ablation", "zero"], "unknown parameter ablation = 'zero'"),
        (["-p", "layers", "30"], "layer 30 is not in"),
        (["-p", "pairs_file", "nowhere.csv"], "nowhere.csv"),
        (["-p", "model_sha256", "0" * 64], "SHA-256"),
    ],
)
def test_a_mistake_ends_in_one_message_and_leaves_nothing(tmp_path, words, message):
    done = run(papermill(tmp_path, "03_necessity", TWO, *words))
    assert done.returncode != 0
    assert message in done.stderr
    assert not list(tmp_path.glob("out/*.parquet")) and not list(tmp_path.glob("out/*.json"))
