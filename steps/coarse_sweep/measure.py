"""Step 02, measured: the residual stream at every role, every layer; which layers are critical."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from lib.effects import curve, in_halves
from lib.sweep import DIRECTIONS
from pipeline.assumed import Case, of_sweep
from pipeline.declaration import ANALYSED, SUPERSET_TASKS, Declaration, Table
from pipeline.params import Roles, Shared
from pipeline.step import Step, swept, with_gap
from pipeline.units import Unit, subsample, sweep_units
from steps.coarse_sweep import lenses


class CoarseSweep(Shared):
    """02: the residual stream at every role, every layer."""

    roles: Roles = Field(
        ("name_a", "name_b", "names", "between", "last", "rest"), min_length=1, description="token roles that are swept"
    )
    pairs: int | None = Field(None, ge=1, description="pairs at `last`; default all")
    name_pairs: int = Field(80, ge=1, description="pairs at the other roles")
    lens_pairs: int = Field(60, ge=1, description="confirmation pairs whose streams are read as words")


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


SWEEP = Table("coarse_sweep", units, swept, of_sweep, columns=ANALYSED)


def assumed(case: Case) -> Iterator[tuple[Any, ...]]:
    """The tables in order."""
    yield (SWEEP,)
    if case.params.task in SUPERSET_TASKS:
        yield (lenses.READ,)


STEP = Declaration("coarse_sweep", CoarseSweep, assumed, layered=True, page_files=("data/patching_llama-3.3-70b.csv",))


def coarse_curves(sweep: pd.DataFrame, params: Shared) -> pd.DataFrame:
    """Damage and recovery by half, direction, role and layer."""
    parts = []
    for half, records_of_half in in_halves(sweep):
        for direction, rows in records_of_half.groupby("direction", sort=False):
            for position, part in rows.groupby("position", sort=False):
                parts.append(curve(part, params).assign(half=half, direction=direction, position=position))
    return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True)
class CriticalLayers:
    """The fewest layers whose rises reach a share of the curve's total."""

    layers: tuple[int, ...]  # in order of layer
    rises: tuple[float, ...]  # the rise at each of them, in units of recovery
    total: float  # recovery at the last layer of the curve: the sum of all rises
    share: float  # what the chosen rises add up to, as a share of the total


def critical_layers(curves: pd.DataFrame, share: float) -> CriticalLayers:
    """The critical layers by the denoise curve at `last` of the discovery half (the design's definition)."""
    at_last = curves[(curves["direction"] == "denoise") & (curves["position"] == "last")]
    first = at_last[at_last["half"] == at_last["half"].iloc[0]]
    return fewest_layers(first.set_index("layer")["estimate"], share)


def fewest_layers(recovery_by_layer: Mapping[int, float] | pd.Series, share: float) -> CriticalLayers:
    """The fewest layers whose rises of the denoise curve add up to `share` of its total.

    The rise of a layer is its recovery minus that of the layer before it in the curve; the first layer's is taken
    against 0. The total is the sum of all rises, which is the recovery at the last layer: 1 for `resid` at `last` when
    every layer was swept. The largest rises are taken first, ties by layer, so no smaller set reaches the share.
    In a curve with gaps, a rise belongs to the layer at its upper end.

    Raises ValueError for an empty curve, NaN, a total that is not positive, or a share outside (0, 1].
    """
    curve = pd.Series(dict(recovery_by_layer), dtype=float).sort_index()
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1]; got {share}")
    if curve.empty or curve.isna().any():
        raise ValueError(f"the denoise curve needs a recovery for every layer; got {curve.to_dict()}")
    total = float(curve.iloc[-1])
    if total <= 0:
        raise ValueError(f"recovery at the last layer is {total:.3g}, not positive: there are no rises to share out")
    rises = curve.diff().fillna(curve.iloc[0])
    ranked = rises.sort_values(ascending=False, kind="stable")
    size = int(np.argmax(ranked.cumsum().to_numpy() >= share * total - 1e-9)) + 1
    chosen = ranked.iloc[:size].sort_index()
    return CriticalLayers(
        tuple(int(layer) for layer in chosen.index), tuple(chosen.tolist()), total, float(chosen.sum() / total)
    )


class Measured(NamedTuple):
    """What step 02 has measured, and the layers chosen from it."""

    records: pd.DataFrame
    curves: pd.DataFrame  # damage and recovery by half, direction, role and layer
    critical: CriticalLayers
    words: pd.DataFrame | None  # ranks of words read from the stream, where the answer is a superset


def run(step: Step) -> Measured:
    """Measure, or read what is there."""
    sweep = with_gap(step.table(SWEEP))
    curves = coarse_curves(sweep, step.params)
    words = step.table(lenses.READ) if step.params.task in SUPERSET_TASKS else None
    return Measured(sweep, curves, critical_layers(curves, step.params.critical_share), words)
