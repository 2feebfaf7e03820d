"""Work units on a real Ray cluster of several nodes on this machine: the same rows, also when a node is lost."""

import os
import threading
import time
from collections import Counter
from itertools import islice, permutations
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from lib import records
from pipeline import machine, params, units, workers
from pipeline import step as steps
from pipeline.declaration import Table
from pipeline.workers import WorkersError
from steps.registry import PLAN

PEOPLE = {
    "scientist": ["Isaac Newton", "Albert Einstein", "Marie Curie", "Charles Darwin"],
    "artist": ["Brad Pitt", "Pablo Picasso", "Bob Dylan", "Claude Monet"],
}


@pytest.fixture(scope="module")
def cluster():
    """A head without work and two nodes with room for one replica each."""
    own = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    own.workers = [own.add_node(num_cpus=1) for _ in range(2)]
    own.wait_for_nodes()
    yield own
    ray.shutdown()
    own.shutdown()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a file of pairs."""
    monkeypatch.chdir(tmp_path)
    both = islice(zip(*(permutations(names, 2) for names in PEOPLE.values()), strict=True), 8)
    rows = [[f"p{index}", a, b, c, d, "scientist", "artist"] for index, ((a, b), (c, d)) in enumerate(both)]
    columns = ["pair_id", "clean_a", "clean_b", "corrupt_a", "corrupt_b", "answer", "corrupt_answer"]
    pd.DataFrame(rows, columns=columns).to_csv("mine.csv", index=False)
    return tmp_path


@pytest.fixture
def begin(here):
    """Makes steps; their replicas end with the test, so that the next one has room."""
    made: list[steps.Step] = []
    yield lambda *where, **how: made.append(begun(*where, **how)) or made[-1]
    for replica in (replica for step in made if step.engine for replica in step.engine.actors):
        ray.kill(replica)


def begun(folder: str, address: str | None = None, replicas: int = 2) -> steps.Step:
    who = {"engine": "ray", "address": address, "replicas": replicas} if address else {}
    own = {"pairs_file": "mine.csv", "results_dir": folder, "layers": [21, 23], "workers": who}
    checked = params.validate(PLAN.sections, "necessity", params.load_profile("smoke") | own)
    return steps.Step(PLAN, "necessity", checked, workers.engine_of(checked))


def table(plan: list[units.Unit], compute, schema=None) -> Table:
    """The step's table, of these units."""
    return Table("necessity", lambda step: plan, lambda step: compute, lambda *_: None, schema=schema)


def planned(step: steps.Step) -> tuple[list[units.Unit], object]:
    """A unit per pair, and what computes it; which units were computed is written to a file, wherever it happened."""
    pairs, computed = step.prompts(), Path("computed").resolve()
    options = {"direction": "noise", "role": "names", "layers": [21, 23], "components": ["head"], "ablations": ["zero"]}
    inner = step.sweeper(pairs)

    def compute(unit: units.Unit) -> pd.DataFrame:
        with computed.open("a") as file:
            file.write(f"{unit.id}\n")
        return inner(unit)

    return [units.Unit(f"u-{index:02d}", (pair,), options) for index, pair in enumerate(pairs)], compute


def swept(step: steps.Step) -> pa.Table:
    """The step's table as it lies on disk."""
    step.table(table(*planned(step), records.SCHEMA))
    return pq.read_table(step.path())


def test_an_address_that_does_not_answer_is_one_sentence(begin):
    with pytest.raises(WorkersError, match=r"no Ray cluster answers at '127.0.0.1:1'.*ray start --head.*engine: local"):
        swept(begin("out", "127.0.0.1:1"))


def test_more_replicas_than_the_cluster_has_room_for(cluster, here, begin):
    with pytest.raises(WorkersError, match="3 replicas with 1 CPU each ask for 3; the Ray cluster has 2"):
        swept(begin("out", cluster.address, replicas=3))


def test_replicas_of_other_code_libraries_or_weights_are_refused(cluster, here, begin, monkeypatch):
    step = begin("out", cluster.address, replicas=1)
    with monkeypatch.context() as patched, pytest.raises(WorkersError, match="another code"):
        patched.setattr(workers, "code_hash", lambda: "0" * 64)
        swept(step)
    with monkeypatch.context() as patched, pytest.raises(WorkersError, match=r"another library torch \(.*, not 0.1"):
        here_too = machine.versions() | {"torch": "0.1"}
        patched.setattr(machine, "versions", lambda: here_too)
        swept(step)
    step.model.final_norm.weight[3] += 1  # the driver's own
    with pytest.raises(WorkersError, match="another weights"):
        swept(step)
    assert not Path("computed").exists() and not list(Path("out").glob("*.parquet"))


@pytest.mark.long
def test_a_unit_that_kills_every_replica_ends_the_run(cluster, here, begin, monkeypatch):
    monkeypatch.setattr(workers, "DEATHS", 0)
    plan = [units.Unit("deadly")]
    with pytest.raises(WorkersError, match="deadly took 1 replicas with it"):
        begin("out", cluster.address).table(table(plan, lambda _: os._exit(1)))


def test_an_error_in_the_work_is_the_one_that_was_raised(cluster, here, begin):
    def compute(unit: units.Unit) -> pd.DataFrame:
        raise ValueError(f"{unit.id} has no rows")

    with pytest.raises(ValueError, match="^u has no rows$"):
        begin("out", cluster.address, replicas=1).table(table([units.Unit("u")], compute))


def test_a_unit_short_of_memory_is_done_again_with_half(cluster, here, begin):
    step = begin("out", cluster.address, replicas=1)

    def pretended_shortage(unit: units.Unit) -> pd.DataFrame:
        if unit.id == "large" and step.memory > 0.3:
            raise torch.OutOfMemoryError("pretended")
        return pd.DataFrame({"memory": [step.memory]})

    frame = step.table(table([units.Unit("large"), units.Unit("small")], pretended_shortage))
    full = step.record["memory_gb"]
    halvings = next(n for n in range(20) if full / 2**n <= 0.3)
    assert list(frame["memory"]) == [full / 2**halvings, full]
    assert step.record["log"] == [
        f"unit large ran out of memory and was done again with {full / 2**halvings:g} GB for a pass"
    ]


def test_a_unit_whose_replica_never_answers_is_done_by_an_idle_one(monkeypatch):
    """A call that reaches a replica just as its node goes down is never answered. The replicas here are made up, and so
    is what waits for them: no cluster loses a node at a given microsecond."""
    answered, asked = [], []
    monkeypatch.setattr(workers, "refuse_unlike", lambda *_: None)
    monkeypatch.setattr(workers, "ask", lambda replica: (replica.name, None))
    monkeypatch.setattr("ray.put", lambda value: value)
    monkeypatch.setattr("ray.get", lambda reference: answer(reference))

    class Mute:
        """Answers what it is, and never computes; the other one does."""

        def __init__(self, name: str) -> None:
            self.name, self.compute = name, SimpleNamespace(remote=self.remote)

        def remote(self, table, work, unit, share):
            asked.append((self.name, unit.id))
            return self.name, unit.id

    def answer(reference):
        name, unit = reference
        return {"alike": {"weights": "w"}} if unit is None else SimpleNamespace(unit=unit, frame=None, by=name)

    def wait(references, timeout):
        able = [one for one in references if one[1] is None or one[0] == "able"]
        answered.append(timeout)
        return able[:1], []

    monkeypatch.setattr("ray.wait", wait)
    plan = [units.Unit("u-0"), units.Unit("u-1"), units.Unit("u-2")]
    step = SimpleNamespace()
    run = workers.Distribution([Mute("mute"), Mute("able")], step, 1.0, plan, lambda unit: None).run()
    assert sorted((done.unit, done.by) for done in run) == [("u-0", "able"), ("u-1", "able"), ("u-2", "able")]
    assert asked.count(("mute", "u-0")) == 1 and len(asked) == 4
    assert set(answered) == {workers.START_S, workers.PATIENCE_S}


def test_a_lost_node_costs_its_units_alone_and_the_rows_are_those_of_a_local_run(
    cluster, here, begin, caplog, monkeypatch
):
    monkeypatch.setattr(workers, "PATIENCE_S", 20)
    local = swept(begin("local"))
    Path("computed").unlink()

    def lose_a_node() -> None:
        while len(list(here.glob("ray/necessity.units/*.parquet"))) < 2:
            time.sleep(0.02)
        cluster.remove_node(cluster.workers[1], allow_graceful=False)

    losing = threading.Thread(target=lose_a_node)
    losing.start()
    step = begin("ray", cluster.address)
    assert swept(step).equals(local)
    losing.join()
    assert "a replica died" in caplog.text
    computed = Counter(Path("computed").read_text().split())
    # A node may be lost before its unit has begun: then not even that one is computed twice.
    assert len(computed) == 8 and computed.total() <= 9
    about, alone = step.record, begin("local").record
    assert about["model"] == alone["model"] and about["data_key"] == alone["data_key"]
    assert about["tables"]["necessity"]["rows"] == len(local)


@pytest.mark.long
def test_a_run_goes_on_with_other_workers(cluster, here, begin):
    step = begin("out")
    plan, compute = planned(step)

    def interrupted(unit: units.Unit) -> pd.DataFrame:
        if unit.id == "u-03":
            raise KeyboardInterrupt
        return compute(unit)

    with pytest.raises(KeyboardInterrupt):
        step.table(table(plan, interrupted, records.SCHEMA))
    mixed = swept(begin("out", cluster.address, replicas=1))
    assert Counter(Path("computed").read_text().split()) == {unit.id: 1 for unit in plan}
    assert mixed.equals(swept(begin("local")))
