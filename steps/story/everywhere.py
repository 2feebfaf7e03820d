"""The search for a circuit over all tokens: which heads and MLPs, at which role, keep the task?

A node is a site at a role of `circuits.EVERYWHERE`; what is not in the circuit is resampled at every token.

1. `ranking`: integrated gradients. The gradient of logit_diff at every node, averaged over runs whose embeddings lie
   between the donor's prompt and the clean one, times what the node differs by (EAP-IG, Hanna et al. 2024, for nodes).
   Gradients rank; nothing else rests on them.
2. `fewest`: how many nodes from the top of a ranking keep the share, by exact tests: a ladder of sizes, then the sizes
   between the last that does not and the first that does, a few at a time.
3. `search` cuts the ranking there, then prunes: chunks of neighbours in the ranking are ordered by what the removal of
   each costs, exactly, and of those that cost least as many are dropped at once as leaves the share; first in chunks
   of CHUNKS[0] nodes, then in smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib import hooks, records
from lib.hooks import Model, site_name
from lib.single_pass import rerun
from steps.story.circuits import EVERYWHERE, SEARCH_SCHEMA, Faithfulness, Ready, ready, role_at

POINTS = 4  # runs between the two prompts, at the middles of as many parts
CHUNKS = (8, 3)  # nodes that are removed together in each round of pruning
TOGETHER = 7  # sizes that are tested in a pass
KEPT = ("head", "mlp")
LADDER = (5, 10, 20, 40, 80, 160, 320, 640)  # sizes of the curve

# One row per node, by rank: `faithfulness` of it and all before it, where tested; then one per round and member.
SCHEMA = records.table_schema(
    "table of the search over all tokens",
    SEARCH_SCHEMA.columns | {"faithfulness": records.number(nullable=True)},
    unique=["phase", "round", "site"],
)


def ladder(limit: int) -> list[int]:
    """The sizes of the curve up to a limit, which is one of them."""
    return [*(size for size in LADDER if size < limit), limit]


def slopes(model: Model, batch: Ready, part: float) -> dict[tuple[str, int], Float[Tensor, "pairs tokens width"]]:
    """Gradients of logit_diff at heads and MLPs, where the embeddings lie at `part` of the way from the donors'."""
    nodes: dict[tuple[str, int], Tensor] = {}
    donor, clean = (run["embed", -1][: len(batch.pairs)] for run in (batch.sources, batch.base.activations))

    def keep(value: Tensor, key: tuple[str, int]) -> None:
        nodes[key] = value

    with hooks.removing() as handles, torch.enable_grad():
        start = torch.lerp(donor, clean, part).requires_grad_()
        handles.append(hooks.on_activation(model, -1, "embed", lambda _: start))
        for key in ((component, layer) for layer in range(model.n_layers) for component in KEPT):
            handles.append(hooks.on_activation(model, key[1], key[0], partial(keep, key=key)))
        hidden = rerun(model, batch.base, min(batch.base.positions), torch.arange(len(donor), device=model.device))
        tokens = [[pair.clean_tokens[pair.answer], pair.clean_tokens[pair.corrupt_answer]] for pair in batch.pairs]
        logits = model.logits(hidden, torch.tensor(tokens))
        found = torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), list(nodes.values()))
    return dict(zip(nodes, found, strict=True))


def attributed(model: Model, batch: Ready) -> Float[np.ndarray, "layers parts roles"]:
    """What each node adds to logit_diff by integrated gradients, summed over pairs (logits): heads, then the MLP."""
    points = [slopes(model, batch, (number + 0.5) / POINTS) for number in range(POINTS)]
    out = np.zeros((model.n_layers, model.n_heads + 1, len(batch.roles)))
    for component, layer in points[0]:
        key, parts = (component, layer), 1 if component == "mlp" else model.n_heads
        moved = batch.base.activations[key] - batch.sources[key][: len(batch.pairs)]
        each = (moved * sum(point[key] for point in points)).double() / POINTS
        by_token = each.unflatten(-1, (parts, -1)).sum((0, -1)).cpu().numpy()  # (tokens, parts)
        place = slice(-1, None) if component == "mlp" else slice(0, -1)
        np.add.at(out[layer, place].T, role_at(batch.pairs[0], batch.roles), by_token)
    return out


def ranking(model: Model, batches: Sequence[Ready], sites: Sequence[str]) -> list[str]:
    """The nodes, those that add most to logit_diff first."""
    total = sum(attributed(model, batch) for batch in batches)
    every = hooks.all_sites(model, KEPT)
    value = {
        f"{site_name(*site)} at {role}": total[site.layer, site.head, number]
        for site in every
        for number, role in enumerate(EVERYWHERE)
    }
    return sorted(sites, key=lambda name: -value[name])


def fewest(
    keep: Callable[[list[int]], list[float]], sizes: Sequence[int], share: float
) -> tuple[int, dict[int, float]]:
    """The fewest nodes with which `keep`, the faithfulness of so many, reaches the share, and all that was tested; the
    most, where it never does."""
    tested = dict(zip(sizes, keep(list(sizes)), strict=True))
    high = min((size for size in sizes if tested[size] >= share), default=None)
    if high is None:
        return max(sizes), tested
    while True:
        low = max((size for size in tested if size < high), default=0)
        between = np.linspace(low, high, TOGETHER + 2).astype(int)[1:-1].tolist()
        between = sorted({*between} - {low, high} - tested.keys())
        if not between:
            return high, tested
        tested |= zip(between, keep(between), strict=True)
        high = min(size for size in (*between, high) if tested[size] >= share)


def search(
    model: Model, pairs: Sequence[Any], sites: Sequence[str], share: float, limit: int, **how: Any
) -> pd.DataFrame:
    """Rank, cut and prune: every node by rank (those before the cut are `chosen`), then every member by what is left
    without its chunk (those dropped are `chosen`). `SCHEMA`; empty where the model has nothing to keep. `how` goes to
    `ready`."""
    batches = ready(model, pairs, roles=EVERYWHERE, **how)
    faithfulness, rows = Faithfulness(model, batches), []
    if faithfulness.noise < np.inf:
        order = ranking(model, batches, sites)
        size, tested = fewest(
            lambda sizes: faithfulness.of([order[:size] for size in sizes]), ladder(min(limit, len(order))), share
        )
        rows += [("grow", at, site, tested.get(at + 1), at < size) for at, site in enumerate(order)]
        rows += pruned(faithfulness, order[:size], faithfulness.least(share, tested[size]))
    frame = pd.DataFrame(rows, columns=list(SCHEMA.columns))
    return frame.astype({"round": "int64", "faithfulness": float, "chosen": bool, "phase": str, "site": str})


def pruned(faithfulness: Faithfulness, members: list[str], floor: float) -> list[tuple]:
    """Rows of `search`: in each round, what is left without each member's chunk, and whether it was dropped."""
    rows: list[tuple] = []
    for number, size in enumerate(CHUNKS):
        chunks = [members[at : at + size] for at in range(0, len(members), size)]
        left = faithfulness.of([[site for site in members if site not in chunk] for chunk in chunks])
        dear = np.argsort(left, kind="stable")  # least is left without the first

        def joined(counts: list[int], dear: np.ndarray = dear, chunks: list = chunks) -> list[list[str]]:
            return [[site for index in dear[:count] for site in chunks[index]] for count in counts]

        some = sorted({max(1, len(chunks) * part // (TOGETHER + 1)) for part in range(1, TOGETHER + 2)})
        kept, _ = fewest(lambda counts, joined=joined: faithfulness.of(joined(counts)), some, floor)
        (own,) = joined([kept])
        rows += [("prune", number, site, left[at // size], site not in own) for at, site in enumerate(members)]
        members = [site for site in members if site in own]
    return rows
