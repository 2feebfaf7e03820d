"""One hop or two: what the last token reads of the names at their own tokens, and what at tokens they have spoken to.

The prompts of a pair differ at the names alone. So what the slice's heads read at the names comes to them in one hop,
and what they read at the tokens `between` (or at the `rest`) in two or more: names -> there -> the last token. Keys and
values at one role are taken from the corrupt run, for the last token's queries alone (`lib.token_reads`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from lib import paths, records
from lib.batches import both_runs, grouped
from lib.hooks import Model, Site, site_name
from lib.tasks import Pair
from lib.token_reads import Read, read_elsewhere
from pipeline import costs
from pipeline.assumed import Case
from pipeline.costs import Work, total
from pipeline.units import Unit
from steps.retrieval_heads.routes import heads_of

EVERY, SLICE = "all heads", "the slice"
ROLES = ("names", "between", "rest")  # every token before the last has one of these roles
LOGIT_DIFF = [f"logit_diff_{when}" for when in ("before", "after", "clean", "corrupt")]
SCHEMA = records.table_schema(
    "table of what the last token reads",
    {
        **{name: records.text() for name in ("half", "quad_id", "pair_id", "reader")},
        "direction": records.text(("noise",)),
        "position": records.text(records.ROLES),
        **{name: records.number() for name in LOGIT_DIFF},
    },
    unique=["pair_id", "reader", "position"],
)


Heads = tuple[tuple[int, int], ...]  # layers and key-value heads


def readers(model: Model, sites: Sequence[Site]) -> dict[str, Heads | None]:
    """Whose keys and values are taken from the other run: those of all heads, of the slice's heads together, and of
    those that share them."""
    own: dict[Heads, list[str]] = {}
    for head in heads_of(sites):
        shared = tuple((r.layer, r.head) for r in paths.receivers_of(model, [head], {"k": "last"}))
        own.setdefault(shared, []).append(site_name(*head))
    out: dict[str, Heads | None] = {EVERY: None}
    if own:
        out[SLICE] = tuple(dict.fromkeys(place for shared in own for place in shared))
    return out | {" + ".join(sorted(names)): shared for shared, names in own.items()}


def read(model: Model, pairs: Sequence[Pair], sites: Sequence[Site], memory: float) -> pd.DataFrame:
    """A row for each pair, reader and role."""
    parts = []
    for group in grouped(pairs):
        clean, corrupt = both_runs(model, group, group[0].clean.roles["last"], ())
        roles = {role: group[0].clean.roles[role] for role in ROLES if role in group[0].clean.roles}
        reads = {(n, role): Read(h, at) for n, h in readers(model, sites).items() for role, at in roles.items()}
        before, after = read_elsewhere(model, clean, corrupt, list(reads.values()), memory)
        answers = [(pair.clean_tokens, pair.answer, pair.corrupt_answer) for pair in group]
        asked = torch.tensor([[tokens[answer], tokens[other]] for tokens, answer, other in answers])
        logits = model.logits(torch.stack([before, clean.hidden, corrupt.hidden, *after]), asked)
        differences = (logits[..., 0] - logits[..., 1]).double().cpu().numpy()  # runs x pairs
        about = {name: [getattr(pair, name) for pair in group] for name in ("half", "quad_id", "pair_id")}
        about |= dict(zip(("logit_diff_before", "logit_diff_clean", "logit_diff_corrupt"), differences, strict=False))
        for (reader, role), own in zip(reads, differences[3:], strict=True):
            named = {"reader": reader, "direction": "noise", "position": role, "logit_diff_after": own}
            parts.append(pd.DataFrame(about | named))
    return pd.concat(parts, ignore_index=True)[list(SCHEMA.columns)]


def cost(case: Case, units: Sequence[Unit], *chosen: Any) -> Work:
    """Both prompts of the pairs, and the last token anew for every reader and role."""
    each = []
    for unit in units:
        count, tokens = len(unit.pairs), len(unit.pairs[0].clean.ids)
        rows = count * (2 + len(ROLES) * (2 + len(heads_of(case.slice()))))
        grown = costs.of_rows(case.shape, [0] * rows, 1, tokens)
        each.append(costs.plain(case.shape, 2 * count, tokens) + costs.vocabulary(case.shape, 4 * count))
        each.append(Work(passes=1, grown=grown, light=rows, table=60 * rows))
    return total(each)
