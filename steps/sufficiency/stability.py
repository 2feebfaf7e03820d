"""Step 04, measured: what tells whether the slice has an edge, and whether its sites add up.

1. `OTHERS`: every head and MLP alone, in the discovery pairs asked in other templates: do the same sites lead there?
2. `COUPLES`: every two of the leading sites replaced together, in the confirmation pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import pandas as pd

from lib import records, tasks
from lib.data import HALVES
from lib.hooks import Site
from lib.tasks import Pair
from pipeline.assumed import Case, of_sweep, pair_of
from pipeline.declaration import EFFECTS, SUPERSET_TASKS, Table
from pipeline.population import aligned
from pipeline.step import Step, swept
from pipeline.units import Unit, subsample, sweep_units, without_labels


def of_half(step: Step | Case, number: int) -> list[Pair]:
    """The swept pairs of a half; all of them where they form a single one."""
    pairs = subsample(step.prompts(), step.params.pairs)
    return [pair for pair in pairs if pair.half == HALVES[number]] or pairs


def in_templates(step: Step) -> list[Pair]:
    """The swept discovery pairs in each other template, those whose prompts line up there."""
    p, table = step.params, step.pairs()
    table, out = table[table["pair_id"].isin({pair.pair_id for pair in of_half(step, 0)})], []
    for template in other_templates(p):
        about = {"template": template.name, "task": template.task, "pair_id": table["pair_id"] + f"@{template.name}"}
        how = {"chat_template": p.chat_template, "attributes": p.attributes, "question": p.question}
        out += step.prompts(aligned(table.assign(**about), step.tokenizer, **how)[0])
    return without_labels(out)


def other_templates(params: Any) -> list[tasks.Template]:
    """The templates beside the profile's own, where both ask about two names."""
    if params.task not in SUPERSET_TASKS:
        return []
    found = [
        tasks.find_template(name, params.task, question=params.question)
        for name in params.order_templates
        if name != params.template
    ]
    return [template for template in found if template.task in SUPERSET_TASKS]


def assumed_in_templates(case: Case) -> list[Pair]:
    """Stand-ins of `in_templates`: all pairs line up."""
    out = []
    for template in other_templates(case.params):
        for quad, pair in enumerate(of_half(case, 0)):
            names = [len(pair.clean.roles[f"name_{slot}"]) for slot in "ab"]
            out.append(pair_of(template, quad, 0, pair.half, names, 0))
    return out


def other_units(step: Step | Case, pairs: Sequence[Pair]) -> list[Unit]:
    """Every head and MLP alone."""
    how = {"direction": "denoise", "role": "last", "components": ["head", "mlp"], "layers": step.layers}
    return sweep_units("others", pairs, **how)


def swept_others(step: Step, pairs: Sequence[Pair]) -> Callable[[Unit], pd.DataFrame]:
    """A sweep of pairs that are no pairs of step 01."""
    return step.sweeper(pairs)


def couples(order: Sequence[Site], count: int) -> list[tuple[Site, ...]]:
    """Every two of the first `count` sites of an order."""
    return list(combinations(order[:count], 2))


def couple_units(step: Step | Case, sets: Sequence[tuple[Site, ...]]) -> list[Unit]:
    """The sets, clean into corrupt, in the confirmation pairs; the table's `site_set` counts them."""
    return sweep_units("couples", of_half(step, 1), direction="denoise", role="last", site_sets=list(sets))


OTHERS = Table("others", other_units, swept_others, of_sweep, columns=EFFECTS)
COUPLES = Table("couples", couple_units, swept, of_sweep, records.SET_SCHEMA, (*EFFECTS, "site_set"))
