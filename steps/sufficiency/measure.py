"""Step 04, measured: every site patched from the clean into the corrupt run, and which sites make the critical slice.

1. `SITES`: each head, attention module, MLP and residual stream at `last`, one at a time.
2. `slice_order` puts heads and MLPs in order of their recovery on the discovery half.
3. `SETS`: the first of them, the first two, ... replaced together, in both directions.
4. `critical_slice` says how many of them the critical slice has.
5. `stability`: single sites in other templates, and the leading sites two by two.
6. `placebo.TABLE`: the same sites in pairs whose names differ in something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd
from pydantic import Field

from lib import effects, records
from lib.effects import SITE, CriticalSlice, curve, in_halves
from lib.hooks import Site
from lib.tasks import Pair
from pipeline.assumed import Case, of_sweep, order_of
from pipeline.declaration import ANALYSED, Declaration, Table
from pipeline.params import Components, Shared, Words
from pipeline.step import Step, swept, with_gap
from pipeline.units import Unit, subsample, sweep_units
from steps.sufficiency import placebo, stability
from steps.sufficiency.placebo import Specificity


class Sufficiency(Shared):
    """04: every site patched from the clean into the corrupt run."""

    components: Components = Field(("resid", "attn", "mlp", "head"), description="components swept at `last`")
    pairs: int | None = Field(None, ge=1, description="pairs at `last`; default all")
    order_templates: Words = Field(
        ("both_famous",), description="templates in which single sites are put in order, too; the profile's own is"
    )
    coupled_sites: int = Field(10, ge=2, description="leading sites that are patched two by two")
    placebo_pairs: int | None = Field(None, ge=1, description="placebo pairs of each attribute; default all")
    placebo_sites: int = Field(
        15, ge=1, description="leading sites patched alone in placebo pairs, the slice's at least"
    )
    specific_ratio: float = Field(
        0.5,
        gt=0,
        le=1,
        description="specific: share of the placebo gap over share of the task's gap surely below this",
    )


# --- what is measured ---


def pairs_at_last(step: Step | Case) -> list[Pair]:
    """The pairs that are swept."""
    return subsample(step.prompts(), step.params.pairs)


def site_units(step: Step | Case) -> list[Unit]:
    """Every site alone."""
    how = {"direction": "denoise", "role": "last", "components": step.params.components, "layers": step.layers}
    return sweep_units("last", pairs_at_last(step), **how)


def set_units(step: Step | Case, order: Sequence[Site]) -> list[Unit]:
    """The first site of an order, the first two, ... together: clean into corrupt, and corrupt into clean."""
    sets, pairs = [tuple(order[: size + 1]) for size in range(len(order))], pairs_at_last(step)
    denoise = sweep_units("denoise", pairs, direction="denoise", role="last", site_sets=sets)
    return denoise + sweep_units("noise", pairs, direction="noise", role="last", site_sets=sets)


SITES = Table("sufficiency", site_units, swept, of_sweep, columns=ANALYSED)
SETS = Table("slice", set_units, swept, of_sweep, schema=records.SET_SCHEMA, columns=(*ANALYSED, "site_set"))


def assumed(case: Case) -> Iterator[tuple[Any, ...]]:
    """The tables in order; the slice is assumed to grow to its limit."""
    yield (SITES,)
    yield SETS, order_of(case, case.params.slice_limit)
    if others := stability.assumed_in_templates(case):
        yield stability.OTHERS, others
    yield stability.COUPLES, stability.couples(order_of(case, case.params.slice_limit), case.params.coupled_sites)
    if case.placebo():
        size = len(case.slice())
        yield placebo.TABLE, order_of(case, max(size, case.params.placebo_sites)), size


STEP = Declaration("sufficiency", Sufficiency, assumed, layered=True, placebo=True, page_keys=("specific_ratio",))


# --- what is chosen ---


def slice_order(sites: pd.DataFrame, limit: int, floor: float = 0.0) -> pd.DataFrame:
    """Heads and MLPs in order of discovery recovery, those that recover anything (their rise is above the floor,
    logits), at most `limit`."""
    own = sites[(sites["half"] == sites["half"].iloc[0]) & sites["component"].isin(["head", "mlp"])]
    return own[(own["ratio"] > 0) & (own["estimate"] > floor)].nlargest(limit, "ratio")


def slice_curves(joint: pd.DataFrame, params: Shared) -> pd.DataFrame:
    """Joint recovery and joint counterfactual damage of the growing sets of sites, by half; `n_sites` counts them."""
    parts = []
    for half, own in in_halves(joint):
        for direction, rows in own.groupby("direction", sort=False):
            quantity = "recovery" if direction == "denoise" else "damage"
            parts.append(curve(rows, params, ["site_set"]).assign(half=half, quantity=quantity))
    out = pd.concat(parts, ignore_index=True)
    return out.assign(n_sites=out["site_set"] + 1)


def critical_slice(curves: pd.DataFrame, share: float) -> CriticalSlice:
    """The size of the critical slice by the discovery half (the design's definition)."""
    first = curves[curves["half"] == curves["half"].iloc[0]]
    joint = {name: rows.sort_values("n_sites")["estimate"].tolist() for name, rows in first.groupby("quantity")}
    return effects.critical_slice(joint["recovery"], joint["damage"], share)


class Measured(NamedTuple):
    """What step 04 has measured, and what was chosen from it."""

    records: pd.DataFrame  # single sites
    sites: pd.DataFrame  # their effects by half
    order: pd.DataFrame  # heads and MLPs in order of discovery recovery
    joint: pd.DataFrame | None = None  # the growing sets; None, as all that follows, where no site is in order
    curves: pd.DataFrame | None = None  # what they do together, by half
    critical: CriticalSlice | None = None
    specificity: Specificity | None = None  # where step 01 has left placebo pairs
    others: pd.DataFrame | None = None  # single sites in other templates, where pairs line up there
    couples: pd.DataFrame | None = None  # every two of the leading sites, where there are two


def run(step: Step) -> Measured:
    """Measure, or read what is there; single sites alone where none recovers anything."""
    p, swept_sites = step.params, with_gap(step.table(SITES))
    sites = effects.both_halves(swept_sites[swept_sites["component"] != "resid"], p)
    order = slice_order(sites, p.slice_limit, p.floor)
    if order.empty:
        return Measured(swept_sites, sites, order)
    members = [Site(*site) for site in order[SITE].itertuples(index=False)]
    joint = step.table(SETS, members)
    curves = slice_curves(joint, p)
    critical = critical_slice(curves, p.slice_share)
    specific = specificity_of(step, members, critical.size)
    elsewhere, couples = stability.in_templates(step), stability.couples(members, p.coupled_sites)
    others = step.table(stability.OTHERS, elsewhere) if elsewhere else None
    twos = step.table(stability.COUPLES, couples) if couples else None
    return Measured(swept_sites, sites, order, joint, curves, critical, specific, others, twos)


def specificity_of(step: Step, members: Sequence[Site], size: int) -> Specificity | None:
    """The slice in placebo pairs, where there are any."""
    pairs = step.placebo_pairs()
    if pairs is None:
        return None
    leading = members[: max(size, step.params.placebo_sites)]
    quads = pairs.drop_duplicates("quad_id").set_index("quad_id")[["kept", "shared"]]
    sets = [*placebo.site_sets(leading, size, step.n_layers - 1)]
    return placebo.specificity(step.table(placebo.TABLE, leading, size), quads, sets, step.params)
