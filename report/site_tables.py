"""Tables that several pages draw, from the records of a sweep: `lib.effects` arranged for a figure.

1. `answer_and_foil`: what happens to the two logits that logit_diff is made of (`logit_changes`).
2. `layer_table`: damage or recovery of whole modules, layer by layer.
3. `heads_matrix` and `side_by_side` turn a table of sites for a map of heads and for a scatter; `picked` takes the
   leading sites.
4. `rank_agreement` and `jaccard`: how alike two orders, two sets of sites are. `restores`: what the design calls so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats as reference

from lib import stats
from lib.effects import SITE, columns, curve, named, quad_matrix, reported
from lib.stats import DEFAULTS, Interval, Settings


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


def picked(table: pd.DataFrame, count: int) -> pd.DataFrame:
    """The `count` sites of largest discovery effect, each with its rows of both halves, in that order."""
    order = table[table["half"] == table["half"].iloc[0]].nlargest(count, "estimate")["site"]
    return pd.concat([table[table["site"] == site] for site in order], ignore_index=True)


def rank_agreement(
    first: Float[np.ndarray, "quads sites"], second: Float[np.ndarray, "quads sites"], settings: Settings = DEFAULTS
) -> Interval:
    """Spearman's correlation between the sites' mean effects under two ablations, the same quads and sites in both.

    The interval is z +- Student's t x the bootstrap's standard deviation of z, Fisher's transform, resampling the same
    quads in both. It is about the correlation to be expected with this many quads: where noise rivals the differences
    between sites, that lies below the correlation of the true effects, and no resampling of quads can tell how far.
    """
    stats.check(settings)
    level = settings.level
    a, b = stats._matrix(first, "first"), stats._matrix(second, "second")
    if a.shape != b.shape or a.shape[1] < 3:
        raise ValueError(f"rank agreement needs the same quads and at least 3 sites; got {a.shape} and {b.shape}")
    n = len(a)
    estimate = float(spearman(a.mean(0)[None], b.mean(0)[None])[0])
    reason = stats.too_few(n)
    if reason or np.isnan(estimate):
        return Interval(estimate, None, None, level, n, reason or "no interval: all sites have equal effects")
    drawn = [spearman(w @ a, w @ b) for w in stats.weights(n, a.shape[1], settings.resamples, settings.seed)]
    # z of 1 is infinite: clip
    z, middle = (np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12)) for value in (np.concatenate(drawn), estimate))
    reach = reference.t.ppf((1 + level) / 2, n - 1) * np.nanstd(z)
    low, high = np.tanh(middle - reach), np.tanh(middle + reach)
    return Interval(estimate, float(low), float(high), level, n, "bootstrap on Fisher's z")


def spearman(a: Float[np.ndarray, "rows sites"], b: Float[np.ndarray, "rows sites"]) -> Float[np.ndarray, " rows"]:
    """Spearman's correlation of each row of a with the same row of b; NaN where one is constant."""
    x, y = (reference.rankdata(values, axis=1) for values in (a, b))
    x, y = (ranks - ranks.mean(1, keepdims=True) for ranks in (x, y))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))


def jaccard(one: Iterable, other: Iterable) -> float:
    """What two sets share, of all that is in either; NaN for two empty ones."""
    one, other = {*one}, {*other}
    return len(one & other) / len(one | other) if one | other else np.nan


def restores(frame: pd.DataFrame, interval: Interval, share: float = 0.5, floor: float = 0.5) -> bool | None:
    """Whether a site's denoise records restore the answer, by the design's definition.

    True if the top candidate is the clean answer (`metric_after` above 0) in at least `share` of the pairs that are
    `answered`, and the lower end of recovery's `interval` is above `floor`. None where there is no such pair, or the
    share is reached but there are too few clusters for an interval: not decided, so not claimed.
    """
    if set(frame["direction"]) != {"denoise"}:
        raise ValueError("only denoise records can restore the answer; got noise records")
    own = frame[answered(frame)]
    if len(own) and (own["metric_after"] > 0).mean() < share:
        return False
    return None if own.empty or interval.low is None else bool(interval.low > floor)


def answered(frame: pd.DataFrame) -> pd.Series:
    """Which records are of pairs whose clean answer comes first in the clean prompt, and not in the corrupt one."""
    return (frame["metric_clean"] > 0) & (frame["metric_corrupt"] < 0)
