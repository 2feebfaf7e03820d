"""Step 07, measured: is the slice about supersets in every class and every template? The placebo, asked there.

In a placebo pair all four people are of one superset and differ in another attribute (step 01). Step 04 patches the
slice there in the profile's own template. Here the same sets as in the grid are patched, in all of its templates:

1. `prompts`: step 01's placebo pairs of both halves (no site was picked on any of them), template by template.
2. `units`: the slice, the circuits picked class by class and random sites, clean into corrupt.
3. `specificity`: a set's share of the placebo gap beside its share of the superset gap, over all pairs of a template
   and, in the profile's own, in the pairs of one superset: the answer there, and what all four people are here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from lib import effects
from lib.hooks import Site
from lib.tasks import Pair, find_template
from pipeline.assumed import Case
from pipeline.params import Shared
from pipeline.population import aligned, right_signed
from pipeline.step import Step
from pipeline.units import Unit, subsample, sweep_units, without_labels
from steps.generality.grid import pair_options

SLICE, RANDOM = "the slice", ("random heads", "random MLPs", "random heads and MLPs")
ALL = "all pairs"


def pairs_of(step: Step | Case) -> list[Pair]:
    """The kept placebo pairs (for the planner, all), at most `placebo_pairs` of each attribute in each template in
    which they line up."""
    p, out = step.params, []
    for name in dict.fromkeys([p.template, *p.templates] if step.placebo() else ()):
        if isinstance(step, Case):
            own = [
                replace(pair, template=find_template(name, p.task, question=p.question).name) for pair in step.placebo()
            ]
        else:
            rows = step.placebo_pairs()
            rows = rows[rows["kept"]].assign(template=name)
            own = step.prompts(aligned(rows, step.tokenizer, **pair_options(p))[0])
        for classes in dict.fromkeys(pair.candidates for pair in own):
            chosen = subsample([pair for pair in own if pair.candidates == classes], p.placebo_pairs)
            out += [replace(pair, pair_id=f"{pair.pair_id}@{name}") for pair in chosen]
    return without_labels(out)


def units(step: Step | Case, pairs: Sequence[Pair], sets: Sequence[Sequence[Site]]) -> list[Unit]:
    """Every set in every pair; pairs of one attribute and template share their units."""
    groups: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.candidates, pair.template), []).append(pair)
    how, out = {"direction": "denoise", "role": "last", "site_sets": list(sets)}, []
    for number, own in enumerate(groups.values()):
        out += sweep_units(f"placebo{number}", own, **how)
    return out


def compute(step: Step, pairs: Sequence[Pair], *chosen: Any) -> Callable[[Unit], pd.DataFrame]:
    """A sweep without the names of its candidates, which are another attribute's in the next unit."""
    sweep = step.sweeper(pairs)

    def run(unit: Unit) -> pd.DataFrame:
        frame = sweep(unit)
        frame.attrs.pop("facts")
        return frame

    return run


def of_quads(frame: pd.DataFrame, placebo: pd.DataFrame, noise: float) -> pd.DataFrame:
    """The records with their pair's `attribute` and `shared` superset; as in the grid, of quads that step 01 has kept
    and whose gap is of the right sign in the template of the record as well."""
    about = placebo.set_index("pair_id")[["attribute", "shared", "kept"]]
    frame = frame.join(about, on=frame["pair_id"].str.partition("@")[0].rename("placebo"))
    good = [right_signed(rows, noise) for _, rows in frame[frame["kept"]].groupby("template", sort=False)]
    return pd.concat(good) if good else frame.head(0)


def specificity(
    joint: pd.DataFrame, placebo: pd.DataFrame, sets: Mapping[str, Sequence[int]], params: Shared
) -> pd.DataFrame:
    """Shares of the two gaps (`lib.effects.specific`): a row per attribute, template, group (`ALL` pairs, a superset)
    and set, with its verdict on its own.

    `joint` are the grid's records, `placebo` those of `of_quads`; `sets` gives the places of SLICE, of each of RANDOM
    that there is (their mean) and, under a superset's name, of the circuit picked without it. A group without a gap
    above 0 in either kind of pairs has no row.
    """
    if placebo.empty:
        return pd.DataFrame()
    out, own = [], joint[joint["direction"] == "denoise"]
    for (attribute, template), other in placebo.groupby(["attribute", "template"], sort=False):
        there = own[own["template"] == template]
        groups = {ALL: (there, other)}
        if there["own"].any():
            groups |= {
                name: (there[there["answer"] == name], other[other["shared"] == name])
                for name in params.topic.supersets
            }
        for group, frames in groups.items():
            chosen = {name: sets.get(name) for name in (SLICE, *RANDOM)} | {"picked without it": sets.get(group)}
            for name, places in chosen.items():
                rows = [frame[frame["site_set"].isin(places or ())] for frame in frames]
                if not all(effects.gap(each).sum() > 0 for each in rows):
                    continue
                about = {"attribute": attribute, "template": template, "group": group, "set": name}
                out.append(effects.specific(*rows, [], params, params.specific_ratio).assign(**about))
    return pd.concat(out, ignore_index=True) if out else pd.DataFrame()
