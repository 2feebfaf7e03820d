"""Step 02, measured: the residual stream at the names and at the last token, every layer; which layers are critical."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd
from pydantic import Field

from lib import effects, records
from lib.batches import subsample
from lib.effects import CriticalLayers, curve, in_halves
from lib.sweep import DIRECTIONS
from pipeline.assumed import Case, of_sweep
from pipeline.declaration import Declaration, Table
from pipeline.params import Roles, Shared
from pipeline.step import Step, swept
from pipeline.units import Unit, sweep_units


class CoarseSweep(Shared):
    """02: the residual stream at the names and at the last token, every layer."""

    roles: Roles = Field(("name_a", "name_b", "names", "last"), min_length=1, description="token roles that are swept")
    pairs: int | None = Field(None, ge=1, description="pairs at `last`; default all")
    name_pairs: int = Field(80, ge=1, description="pairs at the name roles")


def units(step: Step | Case) -> list[Unit]:
    """Every role in both directions."""
    p, prompts = step.params, step.prompts()
    last, names = subsample(prompts, p.pairs), subsample(prompts, p.name_pairs)
    out = []
    for role in p.roles:
        for direction in reversed(DIRECTIONS):
            how = {"role": role, "direction": direction, "components": ["resid"]}
            out += sweep_units(f"{role}-{direction}", last if role == "last" else names, **how)
    return out


SWEEP = Table("coarse_sweep", units, swept, of_sweep, columns=tuple(records.ANALYSED))


def assumed(case: Case) -> Iterator[tuple[Any, ...]]:
    """The one table."""
    yield (SWEEP,)


STEP = Declaration("coarse_sweep", CoarseSweep, assumed, layered=True)


def coarse_curves(sweep: pd.DataFrame, params: Shared) -> pd.DataFrame:
    """Damage and recovery by half, direction, role and layer."""
    parts = []
    for half, records_of_half in in_halves(sweep):
        for direction, rows in records_of_half.groupby("direction", sort=False):
            for position, part in rows.groupby("position", sort=False):
                parts.append(curve(part, params).assign(half=half, direction=direction, position=position))
    return pd.concat(parts, ignore_index=True)


def critical_layers(curves: pd.DataFrame, share: float) -> CriticalLayers:
    """The critical layers by the denoise curve at `last` of the discovery half (the design's definition)."""
    at_last = curves[(curves["direction"] == "denoise") & (curves["position"] == "last")]
    first = at_last[at_last["half"] == at_last["half"].iloc[0]]
    return effects.critical_layers(first.set_index("layer")["estimate"], share)


class Measured(NamedTuple):
    """What step 02 has measured, and the layers chosen from it."""

    records: pd.DataFrame
    curves: pd.DataFrame  # damage and recovery by half, direction, role and layer
    critical: CriticalLayers


def run(step: Step) -> Measured:
    """Measure, or read what is there."""
    sweep = step.table(SWEEP)
    curves = coarse_curves(sweep, step.params)
    return Measured(sweep, curves, critical_layers(curves, step.params.critical_share))
