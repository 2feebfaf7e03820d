"""The dense grid: pairs of confirmation quads, in the profile's template and in templates never used for picking.

1. `candidates` lines up every pair that could be in it, each beside its mirror: the same two prompts the other way
   round.
2. `kept_pairs` keeps the quads with a gap of the right sign in other templates as well; `unselected` are pairs of other
   people before any selection.
3. A pair's noise run *is* its mirror's denoise run: where both are in the grid, one run says what is necessary and what
   is sufficient. `mirrored_units` runs no more than that, `with_mirrors` reads it both ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from lib import models, records, tasks
from lib.data import HALVES
from lib.tasks import Pair
from pipeline import keys
from pipeline.assumed import Case
from pipeline.params import ParameterError, Shared
from pipeline.population import add_margins, aligned, pairs_of, people_of, right_signed, solved
from pipeline.step import Step, StepError
from pipeline.units import Unit, subsample, sweep_units, without_labels

LOGIT_DIFFS = [f"logit_diff_{run}" for run in ("before", "after", "clean", "corrupt")]
# The pairs of a quad, each followed by its mirror; every second quad begins with the other order of its names.
TURNS = ((0, 2, 1, 3), (1, 3, 0, 2))


def prompt_options(params: Shared) -> dict[str, Any]:
    """How prompts are made: the arguments that `lib.tasks` and `pipeline.population` share."""
    return {"chat_template": params.chat_template, "attributes": params.attributes}


def pair_options(params: Shared) -> dict[str, Any]:
    """How pairs are made of prompts."""
    return prompt_options(params) | {"question": params.question}


def candidates(step: Step) -> pd.DataFrame:
    """Every pair that could be in the grid: four of each confirmation quad of step 01; without quads, the pairs there
    are.

    `order` is "better known first" or "better known second", by the mean fame of the two names in each slot; "" where
    fame is not known. Professions that are not in the pairs come from the table of people, "" if it has none.
    """
    quads = of_step_01(step, "quads")
    if quads is None:
        pairs, people = last_half(step.pairs()), people_of(step).set_index("name")["profession"]
        own = {f"clean_profession_{slot}": pairs[f"clean_{slot}"].map(people).fillna("") for slot in "ab"}
        return pairs.assign(**{name: pairs.get(name, column) for name, column in own.items()}, order="")
    quads = last_half(quads)
    fame = {quad[slot]: quad[f"fame_{slot}"] for quad in quads.to_dict("records") for slot in "abcd"}
    pairs = pairs_of(quads, 4)
    first, second = (pairs[f"clean_{slot}"].map(fame) + pairs[f"corrupt_{slot}"].map(fame) for slot in "ab")
    pairs["order"] = np.where(first > second, "better known first", "better known second")
    number, quad = pairs.groupby("quad_id").cumcount(), pd.factorize(pairs["quad_id"])[0]
    turn = [TURNS[q % 2].index(n) for q, n in zip(quad, number, strict=True)]
    return pairs.iloc[np.lexsort((turn, quad))].reset_index(drop=True)


def last_half(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the confirmation half; all of them if they form one half."""
    own = table[table["half"] == HALVES[1]]
    return (own if len(own) else table).reset_index(drop=True)


def kept_pairs(step: Step) -> pd.DataFrame:
    """The candidates that line up, template by template, with the counts in `attrs`; `solved`: the quad is, there.

    Step 01 has kept quads for their gap in the profile's template; in others those with a gap of the right sign are
    kept. StepError when nothing is left anywhere.
    """
    p, model, source, kept, counts = step.params, step.model, candidates(step), [], []
    for name in dict.fromkeys([p.template, *p.templates]):
        template, own = tasks.find_template(name, p.task, question=p.question), name == p.template
        rows = source if own else source.assign(pair_id=source["pair_id"] + f"@{name}", template=name)
        rows, why = aligned(rows.assign(task=template.task), model.tokenizer, **pair_options(p))
        each = p.pairs_per_quad if own else p.template_pairs
        asked = rows.groupby("quad_id").head(each) if p.pairs_file is None else rows
        left = asked
        if len(asked):
            left = add_margins(asked, model.tokenizer, partial(models.next_logits, model), **pair_options(p))
            left = left.assign(solved=solved(left))
            left = left if own else right_signed(left, model.noise)
        left = pd.DataFrame(subsample(list(left.itertuples(index=False)), p.pairs), columns=left.columns)
        kept.append(left)
        sizes = {"possible": len(source), "aligned": len(rows), "asked": len(asked), "left": len(left)}
        counts.append({"template": name, **sizes, "quads": left["quad_id"].nunique(), "why": why[0] if why else ""})
    grid = pd.concat(kept, ignore_index=True)
    if grid.empty:
        raise StepError(f"no pairs are left for the grid: {counts}")
    grid.attrs["facts"] = {"templates": counts}
    return grid


def of_step_01(step: Step | Case, name: str) -> pd.DataFrame | None:
    """A table of step 01: "quads"; "unselected", its pairs before any selection; "alone", its answers about each name.
    None where it has left none."""
    if step.params.pairs_file is not None:
        return None
    try:
        folder = keys.find_pairs(step.name, step.params).parent
    except ParameterError:
        return None
    path = keys.left(folder, keys.PAIRS, f"{keys.PAIRS}.{name}.parquet")
    return None if path is None else records.read(path)


def unselected(step: Step) -> list[Pair]:
    """Step 01's pairs before any selection, as prompts."""
    table = of_step_01(step, "unselected")
    return [] if table is None else without_labels(step.prompts(table))


def mirrors(pairs: Sequence[Pair]) -> dict[str, str]:
    """For each pair that has one, its mirror: the same two prompts, clean and corrupt exchanged."""
    own = {(x.template, x.clean.ids, x.corrupt.ids, x.answer, x.corrupt_answer): x.pair_id for x in pairs}
    turned = [(x.template, x.corrupt.ids, x.clean.ids, x.corrupt_answer, x.answer) for x in pairs]
    return {pair.pair_id: own[key] for pair, key in zip(pairs, turned, strict=True) if key in own}


def mirrored_units(pairs: Sequence[Pair], **options: Any) -> list[Unit]:
    """Noise at `last` in every pair; denoising in those alone whose mirror's noise run does not say it."""
    pairs, mirror = without_labels(pairs), mirrors(pairs)
    alone = [pair for pair in pairs if pair.pair_id not in mirror]
    noise = sweep_units("noise", pairs, direction="noise", role="last", **options)
    return noise + sweep_units("denoise", alone, direction="denoise", role="last", **options)


def with_mirrors(frame: pd.DataFrame, mirror: Mapping[str, str]) -> pd.DataFrame:
    """`frame` and the denoise rows that its counterfactual noise rows are, read as their mirror's.

    Noise in a pair puts its corrupt activation into its clean prompt: its mirror's clean activation into its mirror's
    corrupt prompt. The logit difference changes sign, and clean and corrupt change places.
    """
    noise = frame[(frame["direction"] == "noise") & frame["pair_id"].isin(mirror)]
    turned = {
        name: -noise[name.replace("clean", "x").replace("corrupt", "clean").replace("x", "corrupt")]
        for name in LOGIT_DIFFS
    }
    same = noise.assign(pair_id=noise["pair_id"].map(mirror), direction="denoise", ablation="clean", **turned)
    return pd.concat([frame, same], ignore_index=True)
