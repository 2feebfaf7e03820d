"""What the last token reads at which tokens: keys and values of another run in the place of its own.

Two prompts that differ at earlier tokens alone differ at their last token by what it reads there, through keys and
values. `read_elsewhere` runs the last token anew behind the base prompts' KV cache, with some of what is cached taken
from the other run. Only the last token's queries meet it: the tokens in between stay as they are, so what is read at a
token counts there, and not once more wherever it has been carried on to. All heads at all earlier tokens give the other
run itself.

With grouped queries, keys and values are those of a group: all its query heads read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lib import single_pass
from lib.hooks import Model
from lib.single_pass import BaseRun, SharedPrefix, suffix


class Read(NamedTuple):
    """Keys and values that are taken from the other run."""

    heads: tuple[tuple[int, int], ...] | None  # layers and key-value heads; None: all
    tokens: tuple[int, ...]  # before the last


class OtherReads(SharedPrefix):
    """The base prompts' cache, once for each read, with what the read takes from the other run's."""

    def __init__(self, base: BaseRun, other: BaseRun, owner: Tensor, reads: Sequence[Read]) -> None:
        super().__init__(base.cache, base.ids.shape[1] - 1, owner)
        self.other, self.prompts, self.reads = other.cache, len(base.ids), reads

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        whole = super().update(keys, values, layer_idx)
        for place, read in enumerate(self.reads):
            heads = range(keys.shape[1]) if read.heads is None else [h for layer, h in read.heads if layer == layer_idx]
            rows = slice(place * self.prompts, (place + 1) * self.prompts)
            where = torch.tensor(list(heads), dtype=torch.long)[:, None], torch.tensor(read.tokens, dtype=torch.long)
            for mine, others in zip(whole, self.other[layer_idx], strict=True):
                mine[rows, *where] = others[:, *where].to(mine)
        return whole


@torch.no_grad()
def read_elsewhere(
    model: Model, base: BaseRun, other: BaseRun, reads: Sequence[Read], memory: float = 2.0
) -> tuple[Float[Tensor, "prompts hidden"], Float[Tensor, "reads prompts hidden"]]:
    """Final hidden states at the last token of the base prompts: with nothing read elsewhere, and for each read. Both
    runs have their caches, and the last token as a position. `memory`: GB that a pass may take.

    Raises ValueError where the last tokens differ, SweepError where nothing read elsewhere is not the base run, or
    everything is not the other.
    """
    prompts, last = base.ids.shape[0], base.ids.shape[1] - 1
    if not torch.equal(base.ids[:, -1], other.ids[:, -1]):
        raise ValueError("the prompts' last tokens differ, so that what they read is not all that sets them apart")
    size, out = max(1, single_pass.row_limit(model, base, memory) // prompts), []
    every = [Read(None, ()), Read(None, tuple(range(last))), *reads]
    for first in range(0, len(every), size):
        some = every[first : first + size]
        owner = torch.arange(prompts, device=base.ids.device).repeat(len(some))
        given = suffix(base, last, owner) | {"past_key_values": OtherReads(base, other, owner, some)}
        out.append(model.body(**given).last_hidden_state[:, -1].unflatten(0, (len(some), prompts)))
    found = torch.cat(out)
    for mine, run, what in ((found[0], base, "nothing"), (found[1], other, "everything")):
        words = partial(proof_failed, what)
        single_pass.prove_same(model, model.logits(mine), model.logits(run.hidden), words)
    return found[0], found[2:]


def proof_failed(what: str, prompt: int, off: float) -> str:
    """What `prove_same` says."""
    return f"prompt {prompt}: with {what} read elsewhere, the last token is {off:.3g} logits away from what it must be"
