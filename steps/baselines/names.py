"""From a table of names to pairs whose prompts line up, for `make pairs`.

1. `read_names` reads the table: `name` and `superset`; the other columns of data/people.csv may be there, too.
2. `put_together` counts the tokens of each name in the profile's template, and makes quads: a, b of one superset and c,
   d of another, with as many tokens in a as in c, and in b as in d.
3. `write_pairs` writes their pairs as a `pairs_file`, and says who is left over and why.

The model itself is not asked. Bad input raises ValueError.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib import models, tables
from lib.questions import Question
from lib.records import atomic
from lib.stats import MINIMUM_CLUSTERS
from pipeline.declaration import SUPERSET_TASKS
from pipeline.population import MISSING, add_tokens, pairs_of
from steps.baselines.measure import Baselines

COLUMNS = ["pair_id", "quad_id", "clean_a", "clean_b", "corrupt_a", "corrupt_b", "answer", "corrupt_answer"]
NAMED = 20  # people that a sentence names
BARE = {"profession": "", "fame": np.nan}  # what `pairs_of` takes along, and a pairs_file has not
Groups = Mapping[tuple, Sequence[str]]  # token counts and superset -> names
Quad = tuple[tuple[str, str], tuple[str, str], tuple[str, str]]  # the two supersets; a and c; b and d


def read_names(path: Path, topic: Question) -> pd.DataFrame:
    """The table of names. ValueError naming every row that cannot be used."""
    table = tables.read_table(path, "table of names", ("name", "superset"), [*MISSING, *topic.attributes])
    twice, faults = table["name"].duplicated(), {}
    for place, row in table.iterrows():
        if not row["name"]:
            faults[place] = "name is empty"
        elif wrong := tables.wrong_name(row["name"]):
            faults[place] = f"{row['name']!r} {wrong}"
        elif row["superset"] not in topic.supersets:
            faults[place] = f"superset {row['superset']!r} is unknown; allowed: {', '.join(topic.supersets)}"
        elif twice[place]:
            faults[place] = f"{row['name']!r} stands there already"
    if faults:
        raise ValueError(tables.unusable(f"table of names {path.name}", table, faults))
    return table.reset_index(drop=True)


def quads_of(groups: Groups) -> list[Quad]:
    """As many quads as people taken from the largest groups first allow; no one is in two."""
    swaps: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for shape in sorted({shape for shape, _ in groups}):
        free = {superset: list(names) for (own, superset), names in groups.items() if own == shape}
        while True:
            two = sorted(free, key=lambda superset: -len(free[superset]))[:2]
            if len(two) < 2 or not free[two[1]]:
                break
            key = tuple(sorted(two))
            for _ in range(min(2, len(free[two[1]]))):  # two at once are a quad: fewer are left without a second
                swaps[key].append(tuple(free[superset].pop() for superset in key))
    return [(key, one, other) for key, own in swaps.items() for one, other in zip(own[0::2], own[1::2], strict=False)]


def put_together(people: pd.DataFrame, tokenizer: Any, params: Baselines) -> tuple[pd.DataFrame, dict[str, list[str]]]:
    """The pairs, as a `pairs_file` has them, and who is left over, by the reason."""
    template = params.topic.find(params.template, params.task)
    known = people
    for column, is_set in (("two_supersets", "true"), ("namesake", None)):
        if column in people:
            own = known[column].str.strip().str.lower()
            known = known[own.ne(is_set) if is_set else own.eq("")]
    how = {"chat_template": params.chat_template, "attributes": params.attributes}
    counted = add_tokens(known, tokenizer, template, **how)
    drawn = counted.iloc[np.random.default_rng(params.seed).permutation(len(counted))]
    quads = quads_of({key: list(own["name"]) for key, own in drawn.groupby(["n_tokens", "superset"])})
    rows = []
    for number, ((superset, other), (a, c), (b, d)) in enumerate(quads):
        row = {"quad_id": f"q{number:03d}", "half": "", "task": template.task, "template": template.name}
        row |= {"superset": superset, "other": other, "a": a, "b": b, "c": c, "d": d}
        rows.append(row | {f"{key}_{slot}": value for slot in "abcd" for key, value in BARE.items()})
    used = {name for quad in rows for name in (quad[slot] for slot in "abcd")}
    left = {
        "of two supersets, or with a namesake": people[~people["name"].isin(known["name"])],
        "whose name makes one token with the template's text": known[~known["name"].isin(counted["name"])],
        "for whom no one of another superset with as many tokens was left": counted[~counted["name"].isin(used)],
    }
    pairs = pairs_of(pd.DataFrame(rows), params.pairs_per_quad)[COLUMNS] if rows else pd.DataFrame(columns=COLUMNS)
    return pairs, {why: list(own["name"]) for why, own in left.items() if len(own)}


def too_few(quads: int) -> str:
    """What so few quads leave open, and how many more people they take; "" where they are enough."""
    lacking = 2 * MINIMUM_CLUSTERS - quads
    return (
        f"  estimates will have no interval, and most claims of page 10 no verdict: that takes {MINIMUM_CLUSTERS} "
        f"quads in each of the two halves, {lacking} more than these, of at least {4 * lacking} more people"
    ) * (lacking > 0)


def write_pairs(names: Path, to: Path, params: Baselines) -> str:
    """Write the pairs that the names make to a CSV file that is not there yet; what to say of it."""
    if params.task not in SUPERSET_TASKS:
        raise ValueError(f"pairs are made for the tasks {', '.join(SUPERSET_TASKS)}, not for {params.task}")
    if to.exists():
        raise ValueError(f"{to} is there already; name another file, or remove it")
    people = read_names(names, params.topic)
    own = (params.tokenizer, None, params.model) if params.tokenizer else (params.model, params.model_sha256)
    pairs, left = put_together(people, models.tokenizer(*own), params)
    if pairs.empty:
        counts = "; ".join(f"{len(own)} {why}" for why, own in left.items())
        raise ValueError(f"the {len(people)} names of {names.name} make no pair: {counts}")
    with atomic(to) as file:
        file.write(pairs.to_csv(index=False).encode())
    quads = pairs["quad_id"].nunique()
    lines = [f"{to}: {len(pairs)} pairs of {quads} quads, for template {params.template!r}"]
    lines += filter(None, [too_few(quads)])
    lines += [f"{sum(map(len, left.values()))} of {len(people)} people are left over" + ":" * bool(left)]
    for why, own in left.items():
        more = f" and {len(own) - NAMED} more" if len(own) > NAMED else ""
        lines.append(f"  {len(own)} {why}: {', '.join(own[:NAMED])}{more}")
    return "\n".join(lines)
