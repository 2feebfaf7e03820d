"""What a set of records says about a site, and the design's definitions that rest on it.

1. `effect`, `gap` and `logit_changes` read one record; `damage` and `recovery` are ratios of sums over records.
2. `by_site` and `quad_matrix` gather them per site and per quad: the raw effects that `lib.stats` tests and puts
   intervals on.
3. `critical_layers`, `first_flip_layer`, `restores` and `critical_slice` say what those words mean.

Records are data frames with the columns of `lib.records`; effects are in logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from lib import stats
from lib.data import HALVES
from lib.hooks import site_name
from lib.stats import Interval, Settings

SITE = ["layer", "component", "head"]
SITE_AND_POSITION = ("layer", "component", "head", "position")
# What a set of records must agree on before it is averaged, unless the caller groups by it.
CONSTANT = ("profile", "task", "template", "direction", "ablation", "position")


def effect(frame: pd.DataFrame, value: Literal["logit_diff", "metric"] = "logit_diff") -> pd.Series:
    """Raw effect of each record in logits: before - after for noise, after - before for denoise.

    Positive where ablating hurts the answer, or patching helps it.
    """
    known = frame["direction"].isin(["noise", "denoise"])
    if not known.all():
        raise ValueError(f"direction must be noise or denoise; got {sorted(set(frame['direction'][~known]))}")
    sign = np.where(frame["direction"] == "denoise", 1.0, -1.0)
    return sign * (frame[f"{value}_after"].astype(float) - frame[f"{value}_before"].astype(float))


def gap(frame: pd.DataFrame) -> pd.Series:
    """logit_diff of the clean run minus that of the corrupt run, of each record: what there is to lose or regain."""
    return frame["logit_diff_clean"].astype(float) - frame["logit_diff_corrupt"].astype(float)


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


def damage(frame: pd.DataFrame) -> float:
    """sum(before - after) / sum(clean - corrupt) of noise records, on logit_diff.

    Raises ValueError for records of another direction, for no records, and where sum(clean - corrupt) is not positive:
    then the corrupt prompt does not lower the answer, and there is no damage to speak of.
    """
    return _ratio(frame, "noise")


def recovery(frame: pd.DataFrame) -> float:
    """sum(after - before) / sum(clean - corrupt) of denoise records, on logit_diff. Errors as for `damage`."""
    return _ratio(frame, "denoise")


def _ratio(frame: pd.DataFrame, direction: str) -> float:
    if _only(frame, "direction") != direction:
        raise ValueError(f"expected records of direction {direction!r}; got {_only(frame, 'direction')!r}")
    total = gap(frame).sum()
    if not total > 0:
        raise ValueError(
            f"sum(clean - corrupt) of logit_diff over {frame['pair_id'].nunique()} pairs is {total:.3g}, not positive: "
            "the ratio is not defined; keep pairs whose corrupt prompt lowers the answer"
        )
    return float(effect(frame).sum() / total)


def _only(frame: pd.DataFrame, column: str) -> str:
    """The one value of a column; ValueError if there are none or several."""
    values = frame[column].unique()
    if len(values) != 1:
        raise ValueError(f"expected records with one {column}; got {sorted(map(str, values)) or 'no records'}")
    return values[0]


def _agree(frame: pd.DataFrame, grouped: Sequence[str]) -> None:
    """ValueError if records would be averaged over ablations, directions, ... that the caller did not group by."""
    for column in CONSTANT:
        if column in frame.columns and column not in grouped:
            _only(frame, column)


class QuadMatrix(NamedTuple):
    """Values per quad and site."""

    values: np.ndarray  # (quads, sites)
    quads: np.ndarray  # quad ids, sorted
    sites: pd.DataFrame  # one row per site, sorted; columns are the site columns asked for


def quad_matrix(
    frame: pd.DataFrame,
    value: str = "effect",
    sites: Sequence[str] = SITE_AND_POSITION,
    reduce: Literal["mean", "sum"] = "mean",
) -> QuadMatrix:
    """Records as a matrix of quads x sites: the mean (or sum) over a quad's pairs.

    `value` is `effect` (raw, logit_diff), `margin_effect`, `gap` (clean - corrupt) or a numeric column. `sites` are the
    columns that tell sites apart; an empty list gives one column. With `reduce="sum"`, the matrices of `effect` and
    `gap` are the numerators and denominators of `stats.ratio_interval`.

    Raises ValueError for no records, for records that differ in direction, ablation, task, ... without being told
    apart by `sites`, and for a site that some quads lack: a test over sites needs every quad at every site.
    """
    sites = list(sites)
    if frame.empty:
        raise ValueError("no records to average")
    _agree(frame, sites)
    named = {"effect": effect, "margin_effect": lambda records: effect(records, "metric"), "gap": gap}
    unknown = [column for column in (*sites, value) if column not in frame.columns and column not in named]
    if unknown:
        raise ValueError(f"the records have no column {', '.join(unknown)}; they have {', '.join(frame.columns)}")
    values = np.asarray(named[value](frame) if value in named else frame[value], dtype=float)
    quad, quads = pd.factorize(frame["quad_id"], sort=True)
    groups = frame.groupby(sites, sort=True, observed=True) if sites else None
    site = groups.ngroup().to_numpy() if sites else np.zeros(len(frame), dtype=int)
    keys = groups.size().index.to_frame(index=False) if sites else pd.DataFrame(index=[0])
    shape = (len(quads), len(keys))
    cell = quad * shape[1] + site
    count = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape)
    if (count == 0).any():
        row, column = np.argwhere(count == 0)[0]
        raise ValueError(
            f"{(count == 0).sum()} of {count.size} quad x site cells have no record, first quad {quads[row]!r} at "
            f"{keys.iloc[column].to_dict()}; select quads and sites that were swept together"
        )
    total = np.bincount(cell, weights=values, minlength=count.size).reshape(shape)
    return QuadMatrix(total / count if reduce == "mean" else total, np.asarray(quads), keys)


def by_site(frame: pd.DataFrame, by: Sequence[str] = SITE_AND_POSITION) -> pd.DataFrame:
    """One row per site: mean raw effects in logits, the ratio of sums, and what they rest on.

    Columns: `by`, `effect` and `margin_effect` (means over quads of the quads' means, as in `quad_matrix`), `damage`
    (noise) or `recovery` (denoise), `pairs`, `quads`. Where sum(clean - corrupt) is not positive the ratio is NaN; the
    raw effects stand. Raises ValueError for records of both directions and for mixtures, as `quad_matrix` does.
    """
    by = list(by)
    name = {"noise": "damage", "denoise": "recovery"}[_only(frame, "direction")]
    _agree(frame, by)
    records = frame.assign(effect=effect(frame), margin_effect=effect(frame, "metric"), gap=gap(frame))
    per_quad = records.groupby([*by, "quad_id"], observed=True).agg(
        effect=("effect", "mean"),
        margin_effect=("margin_effect", "mean"),
        change=("effect", "sum"),
        gap=("gap", "sum"),
        pairs=("pair_id", "nunique"),
    )
    groups = per_quad.groupby(by, observed=True)
    result, sums = groups[["effect", "margin_effect"]].mean(), groups[["change", "gap", "pairs"]].sum()
    result[name] = (sums["change"] / sums["gap"]).where(sums["gap"] > 0)
    return result.assign(pairs=sums["pairs"], quads=groups.size()).reset_index()


@dataclass(frozen=True)
class CriticalLayers:
    """The fewest layers whose rises reach a share of the curve's total."""

    layers: tuple[int, ...]  # in order of layer
    rises: tuple[float, ...]  # the rise at each of them, in units of recovery
    total: float  # recovery at the last layer of the curve: the sum of all rises
    share: float  # what the chosen rises add up to, as a share of the total


def critical_layers(recovery_by_layer: Mapping[int, float] | pd.Series, share: float = 0.8) -> CriticalLayers:
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


def flip_share(frame: pd.DataFrame) -> pd.Series:
    """Share of pairs whose margin changes sign, by layer: from above 0 to below it (noise), the other way (denoise).

    A pair that already was on the far side counts as not flipped. One component, head and position at a time.
    """
    for column in ("component", "head", *CONSTANT):
        if column in frame.columns:
            _only(frame, column)
    towards = 1 if _only(frame, "direction") == "denoise" else -1
    flipped = (towards * frame["metric_before"] < 0) & (towards * frame["metric_after"] > 0)
    return flipped.groupby(frame["layer"]).mean().rename("flip_share")


def first_flip_layer(frame: pd.DataFrame, share: float = 0.5) -> int | None:
    """The first layer at which the margin's sign flips in at least `share` of the pairs; None if there is none."""
    shares = flip_share(frame)
    enough = shares.index[shares >= share]
    return int(enough[0]) if len(enough) else None


def restores(frame: pd.DataFrame, interval: Interval, share: float = 0.5, floor: float = 0.5) -> bool | None:
    """Whether a site's denoise records restore the answer, by the design's definition.

    True if in at least `share` of the pairs the top candidate is the clean answer (`metric_after` above 0) and the
    lower end of recovery's `interval` is above `floor`. None where the share is reached but there are too few
    clusters for an interval: not decided, so not claimed.
    """
    if _only(frame, "direction") != "denoise":
        raise ValueError("only denoise records can restore the answer; got noise records")
    if (frame["metric_after"] > 0).mean() < share:
        return False
    return None if interval.low is None else bool(interval.low > floor)


@dataclass(frozen=True)
class CriticalSlice:
    """The first `size` sites of an order, and what they do together."""

    size: int
    recovery: float
    damage: float
    reached: bool  # both reach the share; otherwise the limit, or the end of the order, stopped it


def critical_slice(
    joint_recovery: Sequence[float], joint_damage: Sequence[float], share: float = 0.8, limit: int | None = None
) -> CriticalSlice:
    """How many sites, in order of discovery recovery, the critical slice has.

    Entry k - 1 of the two sequences is the joint recovery, or joint counterfactual damage, of the first k sites. The
    size is the smallest k at which both reach `share`, or else `limit` (default: as many as were measured). Raises
    ValueError for sequences of different length, empty ones, a limit below 1 or beyond what was measured.
    """
    measured = len(joint_recovery)
    if measured == 0 or measured != len(joint_damage):
        raise ValueError(f"need joint recovery and damage for the same sets; got {measured} and {len(joint_damage)}")
    limit = measured if limit is None else limit
    if not 1 <= limit <= measured:
        raise ValueError(f"limit must lie in 1..{measured}, the sets measured; got {limit}")
    both = np.minimum(joint_recovery, joint_damage)[:limit] >= share
    size = int(np.argmax(both)) + 1 if both.any() else limit
    return CriticalSlice(size, float(joint_recovery[size - 1]), float(joint_damage[size - 1]), bool(both.any()))


def jaccard(one: Iterable, other: Iterable) -> float:
    """What two sets share, of all that is in either; NaN for two empty ones."""
    one, other = {*one}, {*other}
    return len(one & other) / len(one | other) if one | other else np.nan


# --- tables of sites by half ---


def columns(intervals: Sequence[Interval], prefix: str = "") -> dict[str, list]:
    """Estimates and ends of intervals as columns of a table."""
    return {f"{prefix}{key}": [getattr(i, key) for i in intervals] for key in ("estimate", "low", "high")}


def named(table: pd.DataFrame) -> pd.Series:
    """`site_name` of each row."""
    return pd.Series([site_name(*site) for site in table[SITE].itertuples(index=False)], index=table.index)


def in_halves(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The records of each half that has any, discovery first."""
    return [(half, part) for half in HALVES if len(part := frame[frame["half"] == half])]


def curve(frame: pd.DataFrame, settings: Settings, by: Sequence[str] = ("layer",)) -> pd.DataFrame:
    """Damage or recovery (a ratio of sums, with its own interval) for each combination of `by`; one direction."""
    by = list(by)
    change = quad_matrix(frame, "effect", by, reduce="sum")
    gap = quad_matrix(frame, "gap", by, reduce="sum")
    ratios = stats.ratio_intervals(change.values, gap.values, settings)
    return change.sites.assign(**columns(ratios), quads=len(change.quads))


def site_effects(frame: pd.DataFrame, settings: Settings, by: Sequence[str] = tuple(SITE)) -> pd.DataFrame:
    """The sites of one half, direction and ablation: mean raw effect on logit_diff (logits) with familywise intervals
    and p values (max-T over all sites of the frame), and the ratio of sums with an interval of its own."""
    by = list(by)
    matrix = quad_matrix(frame, "effect", by)
    together = stats.simultaneous(matrix.values, settings)
    test = stats.max_t(matrix.values, settings)
    margin = quad_matrix(frame, "margin_effect", by).values.mean(0)
    out = matrix.sites.assign(**columns(together), p=test.p, t=test.t, margin_effect=margin, quads=len(matrix.quads))
    ratios = curve(frame, settings, by)
    return out.assign(ratio=ratios["estimate"], ratio_low=ratios["low"], ratio_high=ratios["high"])


def both_halves(frame: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """`site_effects` of each half, one above the other, with the column `half` and the site's name."""
    parts = [site_effects(part, settings).assign(half=half) for half, part in in_halves(frame)]
    out = pd.concat(parts, ignore_index=True)
    return out.assign(site=named(out))


def picked(table: pd.DataFrame, count: int) -> pd.DataFrame:
    """The `count` sites of largest discovery effect, each with its rows of both halves, in that order."""
    order = table[table["half"] == table["half"].iloc[0]].nlargest(count, "estimate")["site"]
    return pd.concat([table[table["site"] == site] for site in order], ignore_index=True)


def reported(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the confirmation half; where there is only one half, that one."""
    half = HALVES[1] if (table["half"] == HALVES[1]).any() else table["half"].iloc[0]
    return table[table["half"] == half]


def confirmed(table: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Sites with a positive effect that is familywise significant on discovery and again on confirmation."""
    alpha = 1 - settings.level
    good = table[(table["p"] <= alpha) & (table["estimate"] > 0)]
    both = good.groupby("site")["half"].nunique() == table["half"].nunique()
    out = reported(table)
    return out[out["site"].isin(both[both].index)].sort_values("estimate", ascending=False)


def heads_matrix(table: pd.DataFrame, value: str = "estimate") -> np.ndarray:
    """(layers, heads) of a column of one half's table of heads; NaN (False) where not measured."""
    return table[table["component"] == "head"].pivot(index="layer", columns="head", values=value).to_numpy()


def ablation_tables(records: pd.DataFrame, settings: Settings) -> dict[str, pd.DataFrame]:
    """`both_halves` for each ablation (denoise: "clean") at `last`, without `resid`: one family of tests each."""
    own = records[(records["position"] == "last") & (records["component"] != "resid")]
    return {kind: both_halves(rows, settings) for kind, rows in own.groupby("ablation", sort=False)}


def layer_table(records: pd.DataFrame, settings: Settings, components: Sequence[str] = ("attn", "mlp")) -> pd.DataFrame:
    """Damage or recovery per layer and component, confirmation half, for each position; whole components only."""
    own = in_halves(records[records["component"].isin(components)])[-1][1]
    parts = [curve(rows, settings, SITE).assign(position=role) for role, rows in own.groupby("position", sort=False)]
    return pd.concat(parts, ignore_index=True)


def answer_and_foil(
    records: pd.DataFrame, sites: Sequence[str], candidates: Sequence[str], settings: Settings
) -> pd.DataFrame:
    """Change of the answer's and of the foil's logit at each of the sites (names), confirmation half."""
    own = in_halves(records)[-1][1]
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


def side_by_side(table: pd.DataFrame, column: str, value: str = "estimate") -> pd.DataFrame:
    """One row per site, a column for each value of `column`, for a scatter."""
    return table.pivot(index=["site", *SITE], columns=column, values=value).reset_index()
