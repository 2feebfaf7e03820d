"""Tables that several pages draw, from the records of a sweep: `lib.effects` arranged for a figure.

1. `answer_and_foil`: what happens to the two logits that logit_diff is made of (`logit_changes`).
2. `layer_table`: damage or recovery of whole modules, layer by layer.
3. `heads_matrix` and `side_by_side` turn a table of sites for a map of heads and for a scatter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lib import stats
from lib.effects import SITE, columns, curve, named, quad_matrix, reported
from lib.stats import Settings


def logit_changes(frame: pd.DataFrame, candidates: Sequence[str]) -> pd.DataFrame:
    """after - before of the answer's logit (`answer_change`) and of the base run's foil (`foil_change`), per record.

    `candidates` gives the order of the lists `logits_before` and `logits_after` (the file's metadata hold it). The foil
    is the one before the intervention, so that both columns follow one token. Names not in `candidates`: ValueError.
    """
    order = pd.Index(candidates)
    change = np.stack(list(frame["logits_after"])) - np.stack(list(frame["logits_before"]))
    columns = {}
    for name, column in (("answer_change", "answer"), ("foil_change", "foil_before")):
        index = order.get_indexer(frame[column])
        if (index < 0).any():
            unknown = sorted(set(frame[column][index < 0]))
            raise ValueError(f"{column} holds {unknown}, which are not among the candidates {list(candidates)}")
        columns[name] = np.take_along_axis(change, index[:, None], 1)[:, 0]
    return pd.DataFrame(columns, index=frame.index)


def answer_and_foil(
    records: pd.DataFrame, sites: Sequence[str], candidates: Sequence[str], settings: Settings
) -> pd.DataFrame:
    """Change of the answer's and of the foil's logit at each of the sites (names), confirmation half."""
    own = reported(records)
    own = own[own["position"] == "last"].assign(site=lambda frame: named(frame))
    own = own[own["site"].isin(sites)]
    own = own.join(logit_changes(own, candidates))
    parts = []
    for logit in ("answer", "foil"):
        matrix = quad_matrix(own, f"{logit}_change", ["site"])
        means = stats.mean_intervals(matrix.values, settings)
        parts.append(matrix.sites.assign(logit=logit, **columns(means)))
    out = pd.concat(parts)
    order = {site: index for index, site in enumerate(sites)}
    return out.sort_values("site", key=lambda column: column.map(order), kind="stable").reset_index(drop=True)


def layer_table(records: pd.DataFrame, settings: Settings, components: Sequence[str] = ("attn", "mlp")) -> pd.DataFrame:
    """Damage or recovery per layer and component, confirmation half, for each position; whole components only."""
    own = reported(records[records["component"].isin(components)])
    parts = [curve(rows, settings, SITE).assign(position=role) for role, rows in own.groupby("position", sort=False)]
    return pd.concat(parts, ignore_index=True)


def heads_matrix(table: pd.DataFrame, value: str = "estimate") -> np.ndarray:
    """(layers, heads) of a column of one half's table of heads; NaN (False) where not measured."""
    return table[table["component"] == "head"].pivot(index="layer", columns="head", values=value).to_numpy()


def side_by_side(table: pd.DataFrame, column: str, value: str = "estimate") -> pd.DataFrame:
    """One row per site, a column for each value of `column`, for a scatter."""
    return table.pivot(index=["site", *SITE], columns=column, values=value).reset_index()
