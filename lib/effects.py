"""What records say about sites: effects by quad, and tables of sites with intervals and p values in both halves.

1. `effect` and `gap` read each record; `quad_matrix` gathers them by quad and site.
2. `curve` and `ratios` are ratios of sums over records: damage (noise) and recovery (denoise). `tested` has the sites'
   mean effects with familywise intervals and p values; `site_effects` is both.
3. Sites are picked on the discovery half and reported on the confirmation half: `by_half`, `both_halves`, `reported`,
   `confirmed`. `shares_of_ceiling` sets a site's damage beside what its ablation takes away of all there
   is; `critical_slice` says how many sites that is.

Records are data frames with the columns of `lib.records`; effects are in logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from lib import stats
from lib.data import HALVES
from lib.hooks import site_name
from lib.stats import Interval, Settings

SITE = ["layer", "component", "head"]
LOGITS = ("effect", "margin_effect", "change")  # values of records in logits, to which the floor of settings applies
# What a set of records must agree on before it is averaged, unless the caller groups by it.
CONSTANT = ("profile", "task", "template", "direction", "ablation", "position")


def effect(frame: pd.DataFrame, value: Literal["logit_diff", "metric"] = "logit_diff") -> pd.Series:
    """Raw effect of each record in logits: before - after for noise, after - before for denoise, so that it is positive
    where ablating hurts the answer, or patching helps it."""
    known = frame["direction"].isin(["noise", "denoise"])
    if not known.all():
        raise ValueError(f"direction must be noise or denoise; got {sorted(set(frame['direction'][~known]))}")
    sign = np.where(frame["direction"] == "denoise", 1.0, -1.0)
    return sign * (frame[f"{value}_after"].astype(float) - frame[f"{value}_before"].astype(float))


def gap(frame: pd.DataFrame) -> pd.Series:
    """logit_diff of the clean run minus that of the corrupt run, of each record: what there is to lose or regain."""
    return frame["logit_diff_clean"].astype(float) - frame["logit_diff_corrupt"].astype(float)


def _agree(frame: pd.DataFrame, grouped: Sequence[str]) -> None:
    """ValueError if records would be averaged over ablations, directions, ... that the caller did not group by."""
    for column in CONSTANT:
        if column in frame.columns and column not in grouped and len(values := frame[column].unique()) != 1:
            raise ValueError(f"expected records with one {column}; got {sorted(map(str, values)) or 'no records'}")


class QuadMatrix(NamedTuple):
    """Values per quad and site."""

    values: np.ndarray  # (quads, sites)
    quads: np.ndarray  # quad ids, sorted
    sites: pd.DataFrame  # one row per site, sorted; columns are the site columns asked for


def quad_matrix(
    frame: pd.DataFrame, value: str = "effect", sites: Sequence[str] = SITE, reduce: Literal["mean", "sum"] = "mean"
) -> QuadMatrix:
    """Records as a matrix of quads x sites: the mean (or sum) over a quad's pairs.

    `value` is `effect` (raw, logit_diff), `margin_effect`, `gap` (clean - corrupt) or a numeric column. `sites` are the
    columns that tell sites apart; an empty list gives one column. With `reduce="sum"`, the matrices of `effect` and
    `gap` are the numerators and denominators of `stats.ratio_intervals`.

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


def columns(intervals: Sequence[Interval], prefix: str = "") -> dict[str, list]:
    """Estimates and ends of intervals as columns of a table."""
    return {f"{prefix}{key}": [getattr(i, key) for i in intervals] for key in ("estimate", "low", "high")}


def named(table: pd.DataFrame) -> pd.Series:
    """`site_name` of each row."""
    return pd.Series([site_name(*site) for site in table[SITE].itertuples(index=False)], index=table.index)


def in_halves(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The records of each half that has any, discovery first."""
    return [(half, part) for half in HALVES if len(part := frame[frame["half"] == half])]


def by_half(frame: pd.DataFrame, table: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
    """A table made of each half's records, one above the other, with the column `half`."""
    return pd.concat([table(part).assign(half=half) for half, part in in_halves(frame)], ignore_index=True)


def reported(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the confirmation half; where there is only one half, that one."""
    return in_halves(frame)[-1][1]


def curve(frame: pd.DataFrame, settings: Settings, by: Sequence[str] = ("layer",)) -> pd.DataFrame:
    """Damage or recovery (a ratio of sums, with its own interval) for each combination of `by`; one direction."""
    change = quad_matrix(frame, "effect", by, reduce="sum")
    gap = quad_matrix(frame, "gap", by, reduce="sum")
    spans = stats.ratio_intervals(change.values, gap.values, settings)
    return change.sites.assign(**columns(spans), quads=len(change.quads))


def specific(
    own: pd.DataFrame, placebo: pd.DataFrame, by: Sequence[str], settings: Settings, factor: float
) -> pd.DataFrame:
    """The same sets of sites in two kinds of pairs that share nobody: `curve` of each, and what the two say together.

    Columns: estimate, low, high (share of the gap in `own`), `placebo_*` (in the placebo), `quotient_*` (placebo over
    own, each set by itself), `beyond_*` (placebo less `factor` times own, familywise over the sets), and `verdict` by
    it: "specific" below 0, "general" above, else "open"; None without an interval.
    """
    by, shares = list(by), []
    for frame in (own, placebo):
        change, gaps = (quad_matrix(frame, value, by, reduce="sum") for value in ("effect", "gap"))
        shares.append(stats.Shares(change.values, gaps.values))
    one, other = (stats.ratio_intervals(*each, settings) for each in shares)
    beyond = stats.contrasts(shares[1], shares[0], factor, settings)
    quotient = columns(stats.quotients(shares[1], shares[0], settings), "quotient_")
    verdict = [
        None if b.low is None else "specific" if b.high < 0 else "general" if b.low > 0 else "open" for b in beyond
    ]
    counts = {"quads": len(shares[0].numerators), "placebo_quads": len(shares[1].numerators), "verdict": verdict}
    table = change.sites.assign(**columns(one), **columns(other, "placebo_"), **quotient)
    return table.assign(**columns(beyond, "beyond_"), **counts)


def specific_or_general(low: float | None, high: float | None, bound: float) -> str | None:
    """What an interval says against a bound: "specific" below it, "general" above it, else "open"; None without one."""
    return None if low is None else "specific" if high < bound else "general" if low > bound else "open"


def ratios(frame: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    """`curve` without intervals, indexed by `by`: NaN where the gaps do not add up to more than 0."""
    by = list(by)
    _agree(frame, by)
    records = frame.assign(change=effect(frame), gap=gap(frame))
    per_quad = records.groupby([*by, "quad_id"], observed=True)[["change", "gap"]].sum()
    sums = per_quad.groupby(by, observed=True).sum()
    return (sums["change"] / sums["gap"]).where(sums["gap"] > 0)


def familywise(
    matrix: Float[np.ndarray, "quads sites"],
    settings: Settings,
    tail: stats.Tail = "two-sided",
    floor: float | None = None,
) -> dict[str, Sequence[float]]:
    """Columns of a table of sites: the mean of each site, its interval and p value, for all sites together.

    A mean up to `floor`, however alike the quads, is no effect: p 1.
    """
    p = stats.max_t(matrix, settings, tail)
    if floor is not None:
        p = np.where(np.abs(np.mean(matrix, axis=0)) <= floor, 1.0, p)
    return columns(stats.simultaneous(matrix, settings)) | {"p": p}


def is_loss(values: Float[np.ndarray, " quads"], settings: Settings) -> bool:
    """Whether what each quad loses (logits) can be the denominator of a ratio: its mean lies above the floor, with the
    whole interval where there are enough quads for one."""
    loss = stats.mean_interval(values, settings)
    return bool((loss.estimate if loss.low is None else loss.low) > settings.floor)


def tested(
    frame: pd.DataFrame,
    settings: Settings,
    value: str = "effect",
    by: Sequence[str] = SITE,
    tail: stats.Tail = "two-sided",
) -> pd.DataFrame:
    """The mean over quads of a value (see `quad_matrix`) at each site of one half, direction and ablation.

    What is in logits (`LOGITS`) must exceed the floor of the settings.
    """
    matrix, floor = quad_matrix(frame, value, by), settings.floor if value in LOGITS else None
    return matrix.sites.assign(**familywise(matrix.values, settings, tail, floor), quads=len(matrix.quads))


def site_effects(frame: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """`tested` on the raw effect (logits), and beside it the ratio of sums with an interval of its own; NaN where the
    gaps do not add up to more than 0."""
    ends = ["estimate", "low", "high"]
    own = curve(frame, settings, SITE) if gap(frame).sum() > 0 else pd.DataFrame(np.nan, [0], ends)
    return tested(frame, settings).assign(ratio=own["estimate"], ratio_low=own["low"], ratio_high=own["high"])


def both_halves(frame: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """`site_effects` of each half, with the column `half` and the site's name."""
    out = by_half(frame, lambda part: site_effects(part, settings))
    return out.assign(site=named(out))


def significant(table: pd.DataFrame, settings: Settings) -> pd.Series:
    """Which sites are significant familywise: by the test of sign flips, which holds its level where effects are spread
    evenly about 0, and by the familywise interval, which holds it where they are skewed, too. None where there are too
    few quads for an interval."""
    low, high = (table[end].astype(float) for end in ("low", "high"))
    return (table["p"] <= 1 - settings.level) & ((low > 0) | (high < 0))


def confirmed(table: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Sites with a positive effect that is familywise significant on discovery and again on confirmation."""
    good = table[significant(table, settings) & (table["estimate"] > 0)]
    both = good.groupby("site")["half"].nunique() == table["half"].nunique()
    out = reported(table)
    return out[out["site"].isin(both[both].index)].sort_values("estimate", ascending=False)


def damages(frame: pd.DataFrame, settings: Settings) -> dict[str, Interval]:
    """Damage under each ablation, over all of the records: a ratio of sums."""
    return {
        kind: stats.ratio_intervals(*(quad_matrix(rows, of, [], "sum").values for of in ("effect", "gap")), settings)[0]
        for kind, rows in frame.groupby("ablation", sort=False)
    }


def shares_of_ceiling(
    frame: pd.DataFrame, whole: pd.DataFrame, settings: Settings, by: Sequence[str] = SITE
) -> pd.DataFrame:
    """The damage of each combination of `by` as a share of its ablation's ceiling, its damage in `whole`, the records
    of the whole final residual stream. (No bound: a part can do more.)

    A ratio of sums over the quads of both, for the ablations whose ceiling is a loss (`is_loss`), in sum too. Columns:
    `by`, ablation, estimate, low, high.
    """
    parts = [pd.DataFrame(columns=[*by, "ablation", "estimate", "low", "high"])]
    for kind, limit in whole.groupby("ablation", sort=False):
        most = quad_matrix(limit, "effect", [], "sum").values[:, 0]
        if most.sum() > 0 and is_loss(quad_matrix(limit, "effect", []).values[:, 0], settings):
            lost = quad_matrix(frame[frame["ablation"] == kind], "effect", by, "sum")
            spans = stats.ratio_intervals(lost.values, most, settings)
            parts.append(lost.sites.assign(ablation=kind, **columns(spans)))
    return pd.concat(parts[1:] or parts, ignore_index=True)


class CriticalSlice(NamedTuple):
    """The first `size` sites of an order, and what they do together."""

    size: int
    recovery: float
    damage: float
    reached: bool  # both reach the share; otherwise these are all sites that were measured


def critical_slice(joint_recovery: Sequence[float], joint_damage: Sequence[float], share: float) -> CriticalSlice:
    """The smallest slice whose joint recovery and joint counterfactual damage both reach `share`, or else as many sites
    as were measured. Entry k - 1 of the two sequences is of the first k sites, in order of discovery recovery."""
    measured = len(joint_recovery)
    if measured == 0 or measured != len(joint_damage):
        raise ValueError(f"need joint recovery and damage for the same sets; got {measured} and {len(joint_damage)}")
    both = np.minimum(joint_recovery, joint_damage) >= share
    size = int(np.argmax(both)) + 1 if both.any() else measured
    return CriticalSlice(size, float(joint_recovery[size - 1]), float(joint_damage[size - 1]), bool(both.any()))
