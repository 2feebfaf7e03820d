"""From records to the tables that the notebooks draw and hand on: effects of sites with intervals, by half.

Sites are picked on the discovery half and reported on the confirmation half.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from lib import effects, stats
from lib.effects import CriticalLayers, CriticalSlice, quad_matrix
from lib.hooks import Site, site_name
from lib.stats import Interval
from lib.step_params import Shared

SITE = ["layer", "component", "head"]
HALVES = ("discovery", "confirmation")


def named(table: pd.DataFrame) -> pd.Series:
    """`site_name` of each row."""
    return pd.Series([site_name(*site) for site in table[SITE].itertuples(index=False)], index=table.index)


def listed(words: Iterable[object]) -> str:
    """Words as a sentence lists them: "a", "a and b", "a, b and c"; "none" for nothing."""
    words = [str(word) for word in words]
    return " and ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:]) or "none"


def interval(estimate: float, low: float | None, high: float | None, digits: int = 2) -> str:
    """An estimate with its interval, "0.33 [0.28, 0.38]", or alone where there is none."""
    bare = low is None or high is None or np.isnan(low) or np.isnan(high)
    shown = [round(value, digits) + 0.0 for value in ((estimate,) if bare else (estimate, low, high))]  # no "-0.00"
    texts = [f"{value:.{digits}f}" for value in shown]
    return texts[0] + ("" if bare else f" [{texts[1]}, {texts[2]}]")


def columns(intervals: Sequence[Interval], prefix: str = "") -> dict[str, list]:
    """Estimates and ends of intervals as columns of a table."""
    return {f"{prefix}{key}": [getattr(i, key) for i in intervals] for key in ("estimate", "low", "high")}


def curve(frame: pd.DataFrame, params: Shared, by: Sequence[str] = ("layer",)) -> pd.DataFrame:
    """Damage or recovery (a ratio of sums, with its own interval) for each combination of `by`; one direction."""
    by = list(by)
    change = quad_matrix(frame, "effect", by, reduce="sum")
    gap = quad_matrix(frame, "gap", by, reduce="sum")
    ratios = stats.ratio_intervals(change.values, gap.values, params.level, params.resamples, params.seed)
    return change.sites.assign(**columns(ratios), quads=len(change.quads))


def site_effects(frame: pd.DataFrame, params: Shared, by: Sequence[str] = tuple(SITE)) -> pd.DataFrame:
    """The sites of one half, direction and ablation: mean raw effect on logit_diff (logits) with familywise intervals
    and p values (max-T over all sites of the frame), and the ratio of sums with an interval of its own."""
    by = list(by)
    matrix = quad_matrix(frame, "effect", by)
    together = stats.simultaneous(matrix.values, params.level, params.resamples, params.seed)
    test = stats.max_t(matrix.values, params.flips, params.seed)
    margin = quad_matrix(frame, "margin_effect", by).values.mean(0)
    out = matrix.sites.assign(**columns(together), p=test.p, t=test.t, margin_effect=margin, quads=len(matrix.quads))
    ratios = curve(frame, params, by)
    return out.assign(ratio=ratios["estimate"], ratio_low=ratios["low"], ratio_high=ratios["high"])


def both_halves(frame: pd.DataFrame, params: Shared) -> pd.DataFrame:
    """`site_effects` of each half, one above the other, with the column `half` and the site's name."""
    parts = [site_effects(part, params).assign(half=half) for half, part in in_halves(frame)]
    out = pd.concat(parts, ignore_index=True)
    return out.assign(site=named(out))


def in_halves(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The records of each half that has any, discovery first."""
    return [(half, part) for half in HALVES if len(part := frame[frame["half"] == half])]


def picked(table: pd.DataFrame, count: int) -> pd.DataFrame:
    """The `count` sites of largest discovery effect, each with its rows of both halves, in that order."""
    order = table[table["half"] == table["half"].iloc[0]].nlargest(count, "estimate")["site"]
    return pd.concat([table[table["site"] == site] for site in order], ignore_index=True)


def reported(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the confirmation half; where there is only one half, that one."""
    half = HALVES[1] if (table["half"] == HALVES[1]).any() else table["half"].iloc[0]
    return table[table["half"] == half]


def confirmed(table: pd.DataFrame, params: Shared) -> pd.DataFrame:
    """Sites with a positive effect that is familywise significant on discovery and again on confirmation."""
    alpha = 1 - params.level
    good = table[(table["p"] <= alpha) & (table["estimate"] > 0)]
    both = good.groupby("site")["half"].nunique() == table["half"].nunique()
    out = reported(table)
    return out[out["site"].isin(both[both].index)].sort_values("estimate", ascending=False)


def heads_matrix(table: pd.DataFrame, value: str = "estimate") -> np.ndarray:
    """(layers, heads) of a column of one half's table of heads; NaN (False) where not measured."""
    return table[table["component"] == "head"].pivot(index="layer", columns="head", values=value).to_numpy()


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


def crossing(curves: pd.DataFrame, position: str, direction: str = "denoise") -> tuple[int | None, pd.Series | None]:
    """Where the confirmation curve at a role crosses one half: upwards at `last`, downwards at the names. The layer
    after which it stays on the far side, and its row; None if it never does."""
    own = reported(curves)
    own = own[(own["direction"] == direction) & (own["position"] == position)].sort_values("layer")
    far = own["estimate"] > 0.5 if position == "last" else own["estimate"] < 0.5
    stays = far[::-1].cummin()[::-1]
    return (None, None) if not stays.any() else (int(own.loc[stays.idxmax(), "layer"]), own.loc[stays.idxmax()])


def rises_of(curves: pd.DataFrame, layers: Sequence[int]) -> float:
    """What the rises at these layers make up of the confirmation curve at `last`."""
    own = reported(curves)
    own = own[(own["direction"] == "denoise") & (own["position"] == "last")].set_index("layer")["estimate"].sort_index()
    rises = own.diff().fillna(own.iloc[0])
    return float(rises[list(layers)].sum() / own.iloc[-1])


def ablation_tables(records: pd.DataFrame, params: Shared) -> dict[str, pd.DataFrame]:
    """`both_halves` for each ablation (denoise: "clean") at `last`, without `resid`: one family of tests each."""
    own = records[(records["position"] == "last") & (records["component"] != "resid")]
    return {kind: both_halves(rows, params) for kind, rows in own.groupby("ablation", sort=False)}


def layer_table(records: pd.DataFrame, params: Shared, components: Sequence[str] = ("attn", "mlp")) -> pd.DataFrame:
    """Damage or recovery per layer and component, confirmation half, for each position; whole components only."""
    own = in_halves(records[records["component"].isin(components)])[-1][1]
    parts = [curve(rows, params, SITE).assign(position=role) for role, rows in own.groupby("position", sort=False)]
    return pd.concat(parts, ignore_index=True)


def agreement(records: pd.DataFrame, kinds: Sequence[str], params: Shared) -> dict[str, Interval]:
    """Spearman's correlation, over sites at `last`, of each ablation's effects with the first one's; confirmation."""
    own = records[(records["position"] == "last") & (records["component"] != "resid")]
    own = in_halves(own)[-1][1]
    quads = [set(rows["quad_id"]) for _, rows in own.groupby("ablation")]
    own = own[own["quad_id"].isin(set.intersection(*quads))]  # a quad without a pool has no mean and no resample
    if own.empty:
        return {}
    matrices = {kind: quad_matrix(own[own["ablation"] == kind], "effect", SITE).values for kind in kinds}
    first = matrices[kinds[0]]
    return {
        kind: stats.rank_agreement(first, matrices[kind], params.level, params.resamples, params.seed)
        for kind in kinds[1:]
    }


def answer_and_foil(
    records: pd.DataFrame, sites: Sequence[str], candidates: Sequence[str], params: Shared
) -> pd.DataFrame:
    """Change of the answer's and of the foil's logit at each of the sites (names), confirmation half."""
    own = in_halves(records)[-1][1]
    own = own[own["position"] == "last"].assign(site=lambda frame: named(frame))
    own = own[own["site"].isin(sites)]
    own = own.join(effects.logit_changes(own, candidates))
    parts = []
    for logit in ("answer", "foil"):
        matrix = quad_matrix(own, f"{logit}_change", ["site"])
        means = stats.mean_intervals(matrix.values, params.level, params.resamples, params.seed)
        parts.append(matrix.sites.assign(logit=logit, **columns(means)))
    out = pd.concat(parts)
    order = {site: index for index, site in enumerate(sites)}
    return out.sort_values("site", key=lambda column: column.map(order), kind="stable").reset_index(drop=True)


def restoring(records: pd.DataFrame, table: pd.DataFrame, params: Shared) -> list[str]:
    """Single heads and MLPs that restore the answer by the design's definition, on the confirmation half."""
    own = in_halves(records[records["component"].isin(["head", "mlp"])])[-1][1]
    out = []
    for row in reported(table).itertuples():
        if row.component == "attn" or row.ratio_low is None or not row.ratio_low > params.restores_recovery:
            continue
        site = own[(own["layer"] == row.layer) & (own["component"] == row.component) & (own["head"] == row.head)]
        span = Interval(row.ratio, row.ratio_low, row.ratio_high, params.level, row.quads, "")
        if effects.restores(site, span, params.restores_share, params.restores_recovery):
            out.append(row.site)
    return out


def slice_order(table: pd.DataFrame, limit: int) -> pd.DataFrame:
    """Heads and MLPs in order of discovery recovery, those that recover anything, at most `limit`."""
    own = table[(table["half"] == table["half"].iloc[0]) & table["component"].isin(["head", "mlp"])]
    return own[own["ratio"] > 0].nlargest(limit, "ratio")


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


def growing_sets(order: pd.DataFrame) -> list[tuple[Site, ...]]:
    """The first site, the first two, ... of an order."""
    sites = [Site(*site) for site in order[SITE].itertuples(index=False)]
    return [tuple(sites[: size + 1]) for size in range(len(sites))]


def side_by_side(table: pd.DataFrame, column: str, value: str = "estimate") -> pd.DataFrame:
    """One row per site, a column for each value of `column`, for a scatter."""
    return table.pivot(index=["site", *SITE], columns=column, values=value).reset_index()


def by_kind(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Each site under the first ablation and, in `other`, under each of the others; confirmation half."""
    (lead, first), *rest = tables.items()
    own = reported(first)[["site", "estimate"]].rename(columns={"estimate": lead})
    parts = [
        own.merge(reported(table)[["site", "estimate"]], on="site")
        .rename(columns={"estimate": "other"})
        .assign(ablation=kind)
        for kind, table in rest
    ]
    return pd.concat(parts, ignore_index=True)


def with_earlier(table: pd.DataFrame, sites: Sequence[dict]) -> pd.DataFrame:
    """Each site's rise when patched beside its fall when ablated in step 03, confirmation half."""
    fall = pd.DataFrame(sites)[["site", "estimate"]].rename(columns={"estimate": "fall"})
    rise = reported(table)[["site", "component", "estimate"]].rename(columns={"estimate": "rise"})
    return rise.merge(fall, on="site")


def shares(words: pd.Series, count: int) -> str:
    """The commonest words with their shares, for a table."""
    top = words.value_counts(normalize=True).head(count)
    return ", ".join(f'"{word}" {share:.0%}' for word, share in top.items())


def drops_table(drops: Sequence[dict]) -> pd.DataFrame:
    """How many people or quads each filter dropped and left, in order."""
    return pd.DataFrame(drops)[["filter", "unit", "dropped", "left"]]
