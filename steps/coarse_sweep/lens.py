"""The logit lens: every layer's residual stream read as if it were the last one (nostalgebraist 2020).

The stream at the last token of each name, and at the last token of all, goes through the final norm and the
unembedding; what is kept is the rank of the clean prompt's answer over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pandas as pd

from lib import records
from lib.hooks import Model
from lib.readout import FixedNorm, readout
from lib.single_pass import plain_runs
from lib.tasks import Pair
from pipeline import costs
from pipeline.assumed import Case
from pipeline.costs import Work, total
from pipeline.declaration import Table
from pipeline.step import Step
from pipeline.units import Unit, subsample, sweep_units

SIZE = 16  # pairs of a unit
SCHEMA = records.table_schema(
    "table of the logit lens",
    {
        **{name: records.text() for name in ("half", "quad_id", "pair_id")},
        "position": records.text(records.ROLES),
        "layer": records.whole(0),
        "rank": records.whole(1, "int64"),  # of the answer in the vocabulary, 1 is first
    },
    unique=["pair_id", "position", "layer"],
)


def roles_of(pair: Pair) -> list[str]:
    """The names and the last token."""
    return [role for role in pair.clean.roles if role.startswith("name_")] + ["last"]


def read(model: Model, pairs: Sequence[Pair], norm: FixedNorm) -> pd.DataFrame:
    """The rank of the answer after every layer, for pairs of one group."""
    roles, prompts = roles_of(pairs[0]), [pair.clean for pair in pairs]
    tokens = [prompts[0].roles[role][-1] for role in roles]
    ((_, run),) = plain_runs(model, [prompt.ids for prompt in prompts], tokens, ("resid",), size=len(pairs))
    answers = np.array([pair.clean_tokens[pair.answer] for pair in pairs])
    parts = []
    for layer in range(model.n_layers):
        logits = model.logits(norm(run.activations["resid", layer]).float()).cpu().numpy()
        own = logits[np.arange(len(pairs)), :, answers]
        ranks = 1 + (logits > own[..., None]).sum(-1)  # pairs x roles
        for role, rank in zip(roles, ranks.T, strict=True):
            about = {name: [getattr(pair, name) for pair in pairs] for name in ("half", "quad_id", "pair_id")}
            parts.append(pd.DataFrame(about | {"position": role, "layer": np.int32(layer), "rank": rank}))
    return pd.concat(parts, ignore_index=True)


def units(step: Step | Case) -> list[Unit]:
    """The pairs that are swept at the names."""
    return sweep_units("lens", subsample(step.prompts(), step.params.name_pairs), size=SIZE)


def reader(step: Step) -> Callable[[Unit], pd.DataFrame]:
    """What reads a unit's pairs."""
    norm = cache(lambda: readout(step.model).norm)
    return lambda unit: read(step.model, unit.pairs, norm())


def cost(case: Case, planned: Sequence[Unit]) -> Work:
    """A plain run of every prompt, and logits after every layer."""
    each = []
    for unit in planned:
        rows = len(unit.pairs) * len(roles_of(unit.pairs[0])) * case.n_layers
        each.append(costs.plain(case.shape, len(unit.pairs), len(unit.pairs[0].clean.ids)))
        each.append(costs.vocabulary(case.shape, rows) + Work(light=rows, table=8 * rows))
    return total(each)


LENS = Table("lens", units, reader, cost, schema=SCHEMA)
