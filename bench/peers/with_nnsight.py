"""nnsight: a trace per site, or a trace per batch of sites with an invoke per site.

nnsight reads the source of a `with` block, so the blocks stand in plain functions.
"""

from __future__ import annotations

import nnsight
import torch
from nnsight import Envoy
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor

from bench.peers.work import TASKS, Run, Task, Tool, Work

BATCH = 45  # sites of a trace; a layer at a time, as in its documentation, and 90 were no faster


def wrapped(work: Work) -> TransformersModel:
    """The model as nnsight takes a loaded one."""
    return TransformersModel(work.network(), tokenizer=work.model.tokenizer)


def place(model: TransformersModel, task: Task, layer: int) -> Envoy:
    """The module of a site: a head is a slice of o_proj's input."""
    block = model.model.layers[layer]
    return block.self_attn.o_proj if task.component == "head" else block.mlp


def clean_values(model: TransformersModel, work: Work, task: Task) -> list[Tensor]:
    """What the sites' modules hold in the clean prompt, one per layer."""
    positions, layers = work.positions(task), range(work.model.n_layers)
    with model.trace(work.source(), logits_to_keep=1):
        values = nnsight.save([place(model, task, layer).input[:, positions] for layer in layers])
    return values


def prepare_serial(work: Work) -> dict[str, Run]:
    """A trace for each site."""
    model = wrapped(work)

    @torch.no_grad()
    def serial(task: Task) -> Tensor:
        base, positions, out = work.base(task), work.positions(task), []
        values = None if task.zero else clean_values(model, work, task)
        for site in work.sites(task):
            own, module = work.columns(site), place(model, task, site.layer)
            with model.trace(base, logits_to_keep=1):
                if task.zero:
                    module.output[:, positions] = 0
                else:
                    module.input[:, positions, own] = values[site.layer][..., own]
                logits = model.lm_head.output[0, -1].save()
            out.append(logits)
        return torch.stack(out)

    return {task.name: lambda task=task: serial(task) for task in TASKS}


def prepare_batched(work: Work) -> dict[str, Run]:
    """A trace for each batch of sites."""
    model = wrapped(work)

    @torch.no_grad()
    def batched(task: Task) -> Tensor:
        base, positions, sites, out = work.base(task), work.positions(task), work.sites(task), []
        values = None if task.zero else clean_values(model, work, task)
        for at in range(0, len(sites), BATCH):
            with model.trace(logits_to_keep=1) as tracer:
                rows = nnsight.save([])
                for site in sites[at : at + BATCH]:
                    with tracer.invoke(base):
                        own, module = work.columns(site), place(model, task, site.layer)
                        if task.zero:
                            module.output[:, positions] = 0
                        else:
                            module.input[:, positions, own] = values[site.layer][..., own]
                        rows.append(model.lm_head.output[0, -1])
            out += rows
        return torch.stack(out)

    return {task.name: lambda task=task: batched(task) for task in TASKS}


NOTE = "`logits_to_keep=1`, the clean values from one trace; it has no path patching of its own"
TOOLS = [
    Tool("nnsight, serial", "nnsight", f"a trace per site, {NOTE}", prepare_serial),
    Tool("nnsight, batched", "nnsight", f"a trace per {BATCH} sites with an invoke per site, {NOTE}", prepare_batched),
]
