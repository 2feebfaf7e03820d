"""PyTorch's own hooks on the transformers model: one forward pass per site, or the best that a few lines of them do.

Batched, every site is a row of one batch behind the KV cache of the tokens before. Path patching is by two passes per
sender, with attention held.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from bench.paths import OneByOne
from bench.peers.work import PATHS, TASKS, Run, Task, Tool, Work
from lib import hooks


def prepare(work: Work) -> dict[str, Run]:
    """A forward pass for each site, with a hook on its module."""
    model = work.model

    @torch.no_grad()
    def one_by_one(task: Task) -> Tensor:
        sites, positions, base = work.sites(task), work.positions(task), work.base(task)
        if task.zero:
            values = {site: torch.zeros(1, 1, 1) for site in sites}
        else:
            with hooks.capture(model, sites, positions) as values:
                model.model(work.source(), logits_to_keep=1)
        out = []
        for site in sites:
            with hooks.patch(model, {site: values[site]}, positions):
                out.append(model.model(base, use_cache=False, logits_to_keep=1).logits[0, -1])
        return torch.stack(out)

    def send() -> Tensor:
        receivers, senders = work.ways()
        return OneByOne(model, work.pair, "last", receivers).run(senders)

    return {task.name: lambda task=task: one_by_one(task) for task in TASKS} | {PATHS: send}


def prepare_batched(work: Work) -> dict[str, Run]:
    """One batch of as many copies of the prompt as there are sites."""
    model = work.model

    @torch.no_grad()
    def batched(task: Task) -> Tensor:
        sites, positions, base = work.sites(task), work.positions(task), work.base(task)
        start = min(positions)
        offsets = [position - start for position in positions]
        with hooks.capture(model, sites, positions) as values:
            model.model(work.source(), logits_to_keep=1)
        cache = DynamicCache()
        model.model(base[:, :start], past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(len(sites))
        handles = []
        with hooks.removing(handles):
            for layer in range(model.n_layers):
                here = [(row, site) for row, site in enumerate(sites) if site.layer == layer]

                def edit(activation: Tensor, here: list = here) -> None:
                    for row, site in here:  # in place: the tensor is this pass's own
                        activation[row, offsets, work.columns(site)] = 0 if task.zero else values[site][0]

                handles.append(hooks.on_activation(model, layer, task.component, edit))
            rest = base[:, start:].expand(len(sites), -1)
            return model.model(rest, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    return {task.name: lambda task=task: batched(task) for task in TASKS}


TOOLS = [
    Tool(
        "plain hooks, one by one",
        None,
        "one forward pass per site, `logits_to_keep=1`; path patching by two passes per sender, attention held",
        prepare,
    ),
    Tool(
        "plain hooks, batched",
        None,
        "all sites as rows of one batch, behind the cached keys and values of the tokens before the first changed one",
        prepare_batched,
    ),
]
