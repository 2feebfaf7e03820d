"""Step 02, measured: the residual stream at the names and at the last token, every layer; which layers are critical."""

from __future__ import annotations

import pandas as pd
from pydantic import Field

from lib import effects
from lib.effects import CriticalLayers, curve, in_halves
from pipeline.params import Roles, Shared


class CoarseSweep(Shared):
    """02: the residual stream at the names and at the last token, every layer."""

    roles: Roles = Field(("name_a", "name_b", "names", "last"), min_length=1, description="token roles that are swept")
    pairs: int | None = Field(None, ge=1, description="pairs at `last`; default all")
    name_pairs: int = Field(80, ge=1, description="pairs at the name roles")


def coarse_curves(records: pd.DataFrame, params: Shared) -> pd.DataFrame:
    """Damage and recovery by half, direction, role and layer."""
    parts = []
    for half, own in in_halves(records):
        for direction, rows in own.groupby("direction", sort=False):
            for position, part in rows.groupby("position", sort=False):
                parts.append(curve(part, params).assign(half=half, direction=direction, position=position))
    return pd.concat(parts, ignore_index=True)


def critical_layers(curves: pd.DataFrame, params: Shared) -> CriticalLayers:
    """The critical layers by the denoise curve at `last` of the discovery half (the design's definition)."""
    own = curves[(curves["direction"] == "denoise") & (curves["position"] == "last")]
    first = own[own["half"] == own["half"].iloc[0]]
    return effects.critical_layers(first.set_index("layer")["estimate"], params.critical_share)
