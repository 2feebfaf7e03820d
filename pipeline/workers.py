"""Work units spread over Ray actors that each hold the model.

1. `RayEngine` asks the cluster for replicas. Each loads the step's model itself and says what it runs: libraries, code
   and weights. One that differs from the others is refused, because its rows would not be theirs.
2. A free replica is given the next unit. Units are done whole wherever they run, so the rows are those of a local run.
3. Frames come back to the driver, which alone writes them, in the order in which they are finished.
4. When a replica dies, its unit goes back to the queue and the others go on; Ray restarts the replica where it can.
   A unit that ran out of memory is done again with half the memory for a pass, and its log says so.

What travels is the work of a table once per replica, and a step as its name and parameters: never a model. All nodes
see the repository, and the results of earlier steps, under the same path (Ray, https://docs.ray.io).
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pipeline import keys, machine
from pipeline.params import ROOT, ParameterError, Shared, Workers
from pipeline.step import Step
from pipeline.units import Done, Unit, done

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from lib.hooks import Model

SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
ANSWER_S, START_S = 10, 900  # how long a cluster may take to answer, and a replica to come up
PATIENCE_S = 300  # how long a unit may be out before an idle replica does it, too
DEATHS = 3  # replicas that one unit may take with it
NONE_UP = f"workers: no replica was up after {START_S} s; see `ray status` for what they wait for"

log = logging.getLogger(__name__)
# a cached closure travels as what it caches, and caches anew where it arrives
copyreg.pickle(functools._lru_cache_wrapper, lambda cached: (functools.cache, (cached.__wrapped__,)))


class WorkersError(ParameterError):
    """Workers that cannot do the step's work: not there, not alike, or dying."""


def code_hash() -> str:
    """One hash of the sources of all that computes."""
    files = [path for room in ("lib", "planted", "pipeline", "steps") for path in sorted((ROOT / room).rglob("*.py"))]
    return keys.hash_json({str(path.relative_to(ROOT)): keys.hash_source(path) for path in files})


def weights_hash(model: Model) -> str:
    """One hash of the first values of every parameter and buffer: tells other weights, in seconds at any size."""
    import torch

    found = hashlib.sha256()
    for name, value in sorted(model.model.state_dict().items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if not value.is_meta:
            found.update(value.flatten()[:256].contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


class Replica:
    """What runs in an actor: a step with its model, and the work of the table at hand."""

    def __init__(self, step: Step, threads: int, folder: str) -> None:
        import torch

        os.chdir(folder)  # relative paths of the parameters are the driver's
        torch.set_num_threads(threads)  # sums are cut into as many parts as in the driver
        self.step, self.table, self.work = step, None, None

    def about(self) -> dict[str, Any]:
        """What this replica runs, and what its model is."""
        own, p = self.step.model, self.step.params
        told = {f"library {name}": version for name, version in machine.versions().items()}
        told |= {"code": code_hash(), "weights": weights_hash(own)}
        memory = machine.pass_memory(None if p.device == "cpu" else own)
        return {"alike": told, "model": self.step.model_facts, "memory": memory}

    def compute(self, table: str, work: Sequence[Any], unit: Unit, memory: float) -> Done:
        """A unit of a table, with `memory` GB for a pass; `work` is a reference to the table's function in a list."""
        import ray

        if self.table != table:
            self.table, self.work = table, ray.get(work[0])
        self.step.__dict__["memory"] = memory
        return done(unit, self.work)


def connect(address: str) -> None:
    """Join the Ray cluster at the address (`auto`: the one of this machine; `local`: start one here), unless joined."""
    os.environ |= SETTINGS
    if address != "local":  # one try, of 41 s, at an address where something else listens; Ray's own 20 take 820 s
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    import ray

    if ray.is_initialized():
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host:
            socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
        own = {"include_dashboard": False} if address == "local" else {}
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, ValueError, RuntimeError) as error:
        raise WorkersError(
            f"workers: no Ray cluster answers at {address!r} ({type(error).__name__}); start one with "
            "`ray start --head` and name its address, or use engine: local"
        ) from error


def engine_of(params: Shared) -> RayEngine | None:
    """Who computes a step with these parameters: replicas on a Ray cluster, or None for this process."""
    return RayEngine(params.workers) if params.workers.engine == "ray" else None


class RayEngine:
    """Actors of one step on a Ray cluster, asked for when they are first needed (see `pipeline.units.Engine`)."""

    def __init__(self, asked: Workers) -> None:
        self.asked, self.actors = asked, []

    def replicas(self, step: Step) -> list[ActorHandle]:
        """The actors, not waited for. WorkersError when the cluster has no place for them."""
        self.actors = self.actors or hire(step, self.asked)
        return self.actors

    def about(self, step: Step) -> dict[str, Any]:
        """What the first replica that is up says of itself (`Replica.about`)."""
        import ray

        up, _ = ray.wait([ask(replica) for replica in self.replicas(step)], timeout=START_S)
        if not up:
            raise WorkersError(NONE_UP)
        return ray.get(up[0])

    def distributed(self, step: Step, memory: float) -> Callable[[Sequence[Unit], Callable], Iterator[Done]]:
        """Hands units to the step's replicas, with `memory` GB for a pass."""
        return lambda todo, compute: Distribution(self.replicas(step), step, memory, todo, compute).run()


def hire(step: Step, asked: Workers) -> list[ActorHandle]:
    """New actors for a step."""
    import ray
    import torch

    connect(asked.address)
    threads, have = torch.get_num_threads(), ray.cluster_resources()
    for kind, count in {"CPU": threads, "GPU": asked.gpus_per_replica}.items():
        if count * asked.replicas > have.get(kind, 0):
            raise WorkersError(
                f"workers: {asked.replicas} replicas with {count:g} {kind} each ask for {count * asked.replicas:g}; "
                f"the Ray cluster has {have.get(kind, 0):g}. Ask for fewer replicas, or add nodes"
            )
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), **SETTINGS}
    how = {"num_cpus": threads, "num_gpus": asked.gpus_per_replica, "runtime_env": {"env_vars": variables}}
    actor = ray.remote(max_restarts=-1, **how)(Replica)
    return [actor.remote(step, threads, os.getcwd()) for _ in range(asked.replicas)]


def ask(replica: ActorHandle) -> Any:
    """A reference to what a replica is; waits for one that is being restarted."""
    return replica.about.options(max_task_retries=-1).remote()


def refuse_unlike(told: Mapping[str, str | None], model: Mapping[str, str | None]) -> None:
    """WorkersError when a replica (`told`) runs other code or libraries than the driver, or other weights than `model`
    says."""
    here = {f"library {name}": version for name, version in machine.versions().items()} | {"code": code_hash()}
    for name, expected in (here | dict(model)).items():
        if told[name] != expected:
            raise WorkersError(
                f"workers: a replica has another {name} ({str(told[name])[:12]}, not {str(expected)[:12]}); its rows "
                "would not be those of this run. Install the same versions, and check out the same commit, on every "
                "node"
            )


class Distribution:
    """The units of one table on their way through the replicas."""

    def __init__(
        self, replicas: Sequence[ActorHandle], step: Step, memory: float, todo: Sequence[Unit], compute: Callable
    ) -> None:
        import ray

        self.memory, self.table, self.work = memory, uuid4().hex, [ray.put(compute)]
        # what is awaited: a replica with its unit, or with None while it only says what it is
        self.busy: dict[Any, tuple[Any, Unit | None]] = {ask(replica): (replica, None) for replica in replicas}
        self.queue, self.deaths, self.halvings = deque(todo), Counter(), Counter()
        self.idle: list[Any] = []  # replicas that nothing is left for
        self.given: Counter[str] = Counter()  # how many replicas have a unit
        self.finished: set[str] = set()
        self.weights = {"weights": weights_hash(step.model)} if "model" in step.__dict__ else {}

    def run(self) -> Iterator[Done]:
        """Units as they are finished."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        while self.queue or self.computing:
            ready, _ = ray.wait(list(self.busy), timeout=PATIENCE_S if self.computing else START_S)
            if not ready and not self.computing:
                raise WorkersError(NONE_UP)
            if not ready:
                self.ask_another()
                continue
            replica, unit = self.busy.pop(ready[0])
            if unit:
                self.given[unit.id] -= 1
            try:
                answer = ray.get(ready[0])
            except (RayActorError, RayTaskError) as error:
                self.failed(unit, error, dead=isinstance(error, RayActorError))
                self.busy[ask(replica)] = (replica, None)
                self.share_out()
                continue
            if unit is None:
                refuse_unlike(answer["alike"], self.weights)
                self.weights = {"weights": answer["alike"]["weights"]}
            elif unit.id not in self.finished:
                self.finished.add(unit.id)
                yield self.noted(unit, answer)
            self.idle.append(replica)
            self.share_out()

    def share_out(self) -> None:
        """Give what is queued to replicas that are idle."""
        while self.queue and self.idle:
            self.give(self.idle.pop(), self.queue.popleft())

    def give(self, replica: ActorHandle, unit: Unit) -> None:
        """Have a replica compute a unit."""
        share = self.memory / 2 ** self.halvings[unit.id]
        self.busy[replica.compute.remote(self.table, self.work, unit, share)] = (replica, unit)
        self.given[unit.id] += 1

    def ask_another(self) -> None:
        """Give an idle replica a unit that another one has had for long: it may have been given it while its node went
        down, and then waits for a node that never comes. Whichever is done first counts; both give the same rows."""
        late = [unit for _, unit in self.busy.values() if unit and self.given[unit.id] == 1]
        late = [unit for unit in late if unit.id not in self.finished]
        if late and self.idle:
            log.warning("%s has been out for %g s; another replica does it, too", late[0].id, PATIENCE_S)
            self.give(self.idle.pop(), late[0])

    @property
    def computing(self) -> bool:
        """Whether a replica has a unit that is not done."""
        return any(unit and unit.id not in self.finished for _, unit in self.busy.values())

    def failed(self, unit: Unit | None, error: Exception, dead: bool) -> None:
        """Put a unit back whose replica died or ran out of memory. Raises what is neither, or happens too often."""
        from lib.batches import is_short

        cause, name = getattr(error, "cause", None), unit.id if unit else "about"
        short = "memory" in str(error) if dead else is_short(cause)
        self.deaths[name] += 1
        if self.deaths[name] > DEATHS or not (dead or (unit and short)):
            if not dead:
                raise (cause or error) from None
            raise WorkersError(f"workers: {name} took {self.deaths[name]} replicas with it: {error}") from error
        log.warning("a replica %s; %s goes to the next one", "died" if dead else "ran out of memory", name)
        if unit and unit.id not in self.finished and not self.given[name]:
            self.halvings[name] += short
            self.queue.appendleft(unit)

    def noted(self, unit: Unit, answer: Done) -> Done:
        """A finished unit, its log saying so if it had to do with less memory."""
        if halved := self.halvings[unit.id]:
            share = f"{self.memory / 2**halved:g} GB for a pass"
            line = f"unit {unit.id} ran out of memory and was done again with {share}"
            answer.frame.attrs["log"] = [line, *answer.frame.attrs.get("log", [])]
        return answer
