"""This library: every site in one growing pass."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.paths import COMPONENTS
from bench.peers.work import PATHS, TASKS, Run, Task, Tool, Work
from lib import batches, paths
from lib.single_pass import Row, base_run, grow


def prepare(work: Work) -> dict[str, Run]:
    """One plain run of the prompts, then one growing pass."""
    model = work.model

    def logits(hidden: Tensor) -> Tensor:
        return torch.cat([model.logits(part) for part in hidden.split(batches.LOGIT_ROWS)])

    def sweep(task: Task) -> Tensor:
        ids = work.base(task) if task.zero else torch.cat([work.source(), work.base(task)])
        runs = base_run(model, ids, work.positions(task), (task.component,))
        source = runs.part(0, 1).activations
        if task.zero:
            source = {key: torch.zeros_like(value) for key, value in source.items()}
        rows = [Row((site,), 0, 0) for site in work.sites(task)]
        return logits(grow(model, runs.part(len(ids) - 1, len(ids)), rows, source).hidden)

    def send() -> Tensor:
        receivers, senders = work.ways()
        ids = torch.cat([work.source(), torch.tensor([work.pair.corrupt.ids])])
        runs = base_run(model, ids, work.pair.clean.roles["last"], COMPONENTS)
        source, base = runs.part(0, 1).activations, runs.part(1, 2)
        route = paths.Route(receivers, work.pair.corrupt.roles, "recomputed")
        rows = [Row((site,), 0, 0) for site in senders]
        return logits(paths.grow_paths(model, base, rows, source, route).hidden)

    return {task.name: lambda task=task: sweep(task) for task in TASKS} | {PATHS: send}


NOTE = "one run of both prompts, then one growing pass over all sites, without the scores and tables of a sweep"
TOOLS = [Tool("this library", None, NOTE, prepare)]
