"""Work units spread over Ray actors that each hold the model.

1. `spread` asks the cluster for replicas. Each loads the step's model itself and says what it runs: libraries, code and
   weights. One that differs from the others is refused, because its rows would not be theirs.
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
import importlib
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pipeline import keys, machine
from pipeline.params import ROOT, ParameterError
from pipeline.units import Done, Unit, done

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from lib.hooks import Model
    from pipeline.params import Shared
    from pipeline.step import Step

SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
ANSWER_S, START_S = 10, 900  # how long a cluster may take to answer, and a replica to come up
DEATHS = 3  # replicas that one unit may take with it

log = logging.getLogger(__name__)
# a cached closure travels as what it caches, and caches anew where it arrives
copyreg.pickle(functools._lru_cache_wrapper, lambda cached: (functools.cache, (cached.__wrapped__,)))


class WorkersError(ParameterError):
    """Workers that cannot do the step's work: not there, not alike, or dying."""


def code_hash() -> str:
    """One hash of the sources of all that computes."""
    files = [path for room in ("lib", "pipeline", "steps") for path in sorted((ROOT / room).rglob("*.py"))]
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


RESIDENT: dict[str, Step] = {}


def resident(plan: str, step: str, given: Shared) -> Step:
    """The step of this name and these parameters in this process: its model stays from one table to the next. `plan` is
    the module that has the plan."""
    from pipeline.step import Step

    whole = importlib.import_module(plan).PLAN
    return RESIDENT.setdefault(f"{plan} {step} {given.model_dump_json()}", Step(whole, step, given))


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


def replicas(step: Step) -> list[ActorHandle]:
    """The actors of a step, asked for once and not waited for. WorkersError when the cluster has no place for them."""
    if "replicas" not in step.__dict__:
        step.__dict__["replicas"] = hired(step)
    return step.__dict__["replicas"]


def hired(step: Step) -> list[ActorHandle]:
    """New actors for a step."""
    import ray
    import torch

    asked = step.params.workers
    connect(asked.address)
    threads = torch.get_num_threads()
    each = {"CPU": threads, "GPU": asked.gpus_per_replica}
    have = ray.cluster_resources()
    for kind, count in each.items():
        if count * asked.replicas > have.get(kind, 0):
            raise WorkersError(
                f"workers: {asked.replicas} replicas with {count:g} {kind} each ask for {count * asked.replicas:g}; "
                f"the Ray cluster has {have.get(kind, 0):g}. Ask for fewer replicas, or add nodes"
            )
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), **SETTINGS}
    how = {"num_cpus": threads, "num_gpus": asked.gpus_per_replica, "runtime_env": {"env_vars": variables}}
    own = ray.remote(max_restarts=-1, **how)(Replica)
    return [own.remote(step, threads, os.getcwd()) for _ in range(asked.replicas)]


def asking(replica: ActorHandle) -> Any:
    """A reference to what a replica is; waits for one that is being restarted."""
    return replica.about.options(max_task_retries=-1).remote()


def first_answer(step: Step) -> dict[str, Any]:
    """What the first replica that is up says of itself (`Replica.about`)."""
    import ray

    up, _ = ray.wait([asking(replica) for replica in replicas(step)], timeout=START_S)
    if not up:
        raise WorkersError(f"workers: no replica was up after {START_S} s; see `ray status` for what it waits for")
    return ray.get(up[0])


def refuse_unlike(step: Step, told: Mapping[str, str | None], model: Mapping[str, str | None]) -> None:
    """WorkersError when a replica (`told`) runs other code or libraries than the driver, or other weights than `model`
    says."""
    here = {f"library {name}": version for name, version in machine.versions().items()} | {"code": code_hash()}
    for name, own in (here | dict(model)).items():
        if told[name] != own:
            raise WorkersError(
                f"workers: a replica has another {name} ({str(told[name])[:12]}, not {str(own)[:12]}); its rows would "
                "not be those of this run. Install the same versions, and check out the same commit, on every node"
            )


def spread(step: Step, memory: float) -> Callable[[Sequence[Unit], Callable], Iterator[Done]]:
    """The engine of `pipeline.units.run_units` that hands units to the step's replicas, with `memory` GB for a pass."""

    def engine(todo: Sequence[Unit], compute: Callable) -> Iterator[Done]:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        from lib.batches import is_short

        table, work = uuid4().hex, [ray.put(compute)]
        busy: dict[Any, tuple[Any, Unit | None]] = {asking(replica): (replica, None) for replica in replicas(step)}
        queue, deaths, halvings = deque(todo), Counter(), Counter()
        weights = {"weights": weights_hash(step.model)} if "model" in step.__dict__ else {}
        while queue or any(unit for _, unit in busy.values()):
            ready, _ = ray.wait(list(busy), timeout=None if any(unit for _, unit in busy.values()) else START_S)
            if not ready:
                raise WorkersError(
                    f"workers: no replica was up after {START_S} s; see `ray status` for what they wait for"
                )
            replica, unit = busy.pop(ready[0])
            try:
                answer = ray.get(ready[0])
            except (RayActorError, RayTaskError) as error:
                cause = getattr(error, "cause", None)
                dead, name = isinstance(error, RayActorError), unit.id if unit else "about"
                short = "memory" in str(error) if dead else is_short(cause)
                deaths[name] += 1
                if deaths[name] > DEATHS or not (dead or (unit and short)):
                    if not dead:
                        raise (cause or error) from None
                    raise WorkersError(f"workers: {name} took {deaths[name]} replicas with it: {error}") from error
                log.warning("a replica %s; %s goes to the next one", "died" if dead else "ran out of memory", name)
                if unit:
                    halvings[name] += short
                    queue.appendleft(unit)
                busy[asking(replica)] = (replica, None)
                continue
            if unit is None:
                told = answer["alike"]
                refuse_unlike(step, told, weights)
                weights = {"weights": told["weights"]}
            else:
                if halved := halvings[unit.id]:
                    line = (
                        f"unit {unit.id} ran out of memory and was done again with {memory / 2**halved:g} GB for a pass"
                    )
                    answer.frame.attrs["log"] = [line, *answer.frame.attrs.get("log", [])]
                yield answer
            if queue:
                unit = queue.popleft()
                share = memory / 2 ** halvings[unit.id]
                busy[replica.compute.remote(table, work, unit, share)] = (replica, unit)

    return engine
