"""Step 04, measured: every site patched from the clean into the corrupt run; which sites make the critical slice."""

from __future__ import annotations

import pandas as pd

from lib import effects
from lib.effects import SITE, CriticalSlice, curve, in_halves
from lib.hooks import Site
from steps.parameters import Shared


def slice_order(table: pd.DataFrame, limit: int) -> pd.DataFrame:
    """Heads and MLPs in order of discovery recovery, those that recover anything, at most `limit`."""
    own = table[(table["half"] == table["half"].iloc[0]) & table["component"].isin(["head", "mlp"])]
    return own[own["ratio"] > 0].nlargest(limit, "ratio")


def growing_sets(order: pd.DataFrame) -> list[tuple[Site, ...]]:
    """The first site, the first two, ... of an order."""
    sites = [Site(*site) for site in order[SITE].itertuples(index=False)]
    return [tuple(sites[: size + 1]) for size in range(len(sites))]


def slice_curves(records: pd.DataFrame, params: Shared) -> pd.DataFrame:
    """Joint recovery and joint counterfactual damage of the growing sets of sites, by half; `n_sites` counts them."""
    parts = []
    for half, own in in_halves(records):
        for direction, rows in own.groupby("direction", sort=False):
            quantity = "recovery" if direction == "denoise" else "damage"
            parts.append(curve(rows, params, ["site_set"]).assign(half=half, quantity=quantity))
    out = pd.concat(parts, ignore_index=True)
    return out.assign(n_sites=out["site_set"] + 1)


def critical_slice(curves: pd.DataFrame, params: Shared) -> CriticalSlice:
    """The size of the critical slice by the discovery half (the design's definition)."""
    first = curves[curves["half"] == curves["half"].iloc[0]]
    joint = {name: rows.sort_values("n_sites")["estimate"].tolist() for name, rows in first.groupby("quantity")}
    return effects.critical_slice(joint["recovery"], joint["damage"], params.slice_share)
