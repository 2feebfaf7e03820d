"""Step 05's tables and candidates, from the split of total effects (`steps.hydra.measure`) and the joint ablations.

1. `changes` gathers each pair's parts: total = slice's direct effect + later heads + later MLPs + final norm's scale.
2. `split_table`, `compensation` and `distribution` say how much of the slice's direct effect later sites make up for.
3. `rises` tests every later site's rise of direct effect; `candidates` are picked on discovery; `joint_tests` asks on
   the confirmation half whether slice + candidate costs more than the two apart. Both: the site is a backup.
4. `rounds_table` and `missed` say what widening came to, and how large a backup could be there unseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib import effects, stats
from lib.effects import SITE, columns, in_halves, named, quad_matrix, reported
from lib.hooks import Site
from report.words import interval
from steps.hydra.measure import Hydra

LATER = {"heads and MLPs": ["heads", "mlps"], "heads": ["heads"], "MLPs": ["mlps"]}
WORDS = {
    "total": "total",
    "direct": "slice itself",
    "heads": "later heads",
    "mlps": "later MLPs",
    "scale": "final norm's scale",
}
ENDS = ("estimate", "low", "high")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Round(NamedTuple):
    """One round of widening: what was ablated, the split, and the tests that name backups."""

    sites: list[Site]
    frame: pd.DataFrame  # `steps.hydra.measure.SCHEMA`
    rises: pd.DataFrame
    tests: pd.DataFrame  # empty where there were no candidates, or the profile's limit was reached


def changes(frame: pd.DataFrame) -> pd.DataFrame:
    """Per pair, slice and ablation, the change (ablated - intact, logits) of each part, summed over its sites."""
    by = ["task", "template", "half", "quad_id", "pair_id", "slice", "ablation", "part"]
    wide = (frame["after"] - frame["before"]).groupby([frame[name] for name in by], sort=False).sum().unstack()
    return wide.reindex(columns=[*WORDS, "residual"], fill_value=0.0).fillna(0.0).reset_index()


def split_table(frame: pd.DataFrame, params: Hydra) -> pd.DataFrame:
    """Mean change of each part over the confirmation quads, with intervals, for each ablation and for the slice and
    the random slices (their mean)."""
    own = in_halves(changes(frame))[-1][1]
    own = own.assign(slice=own["slice"].where(own["slice"] == "slice", "random slices"))
    parts = []
    order = [(kind, name) for kind in params.ablations for name in own["slice"].unique()]
    for ablation, name in order:
        rows = own[(own["slice"] == name) & (own["ablation"] == ablation)]
        if rows.empty:
            continue
        quads = rows.groupby("quad_id")[list(WORDS)].mean()
        spans = stats.mean_intervals(quads.to_numpy(), params)
        parts.append(pd.DataFrame({"part": list(WORDS)} | columns(spans)).assign(slice=name, ablation=ablation))
    out = pd.concat(parts, ignore_index=True)
    return out.assign(name=out["part"].map(WORDS))


def compensation(frame: pd.DataFrame, params: Hydra) -> pd.DataFrame:
    """-(sum of the later sites' change) / (sum of the slice's direct effect) over pairs, for each ablation and half.

    1 is full repair, above 1 overshoot; below 0, later sites lose as well. NaN where the slice's direct effect does not
    fall: then there is nothing to make up for.
    """
    parts = []
    for half, own in in_halves(changes(frame[frame["slice"] == "slice"])):
        for ablation, rows in own.groupby("ablation", sort=False):
            quads = rows.groupby("quad_id")[list(WORDS)].sum()
            gains = np.stack([quads[later].sum(axis=1) for later in LATER.values()], axis=1)
            spans = [stats.Interval(float("nan"), None, None, params.level, len(quads), "no loss")] * len(LATER)
            if quads["direct"].sum() < 0:
                spans = stats.ratio_intervals(gains, -quads["direct"], params)
            parts.append(pd.DataFrame({"later": list(LATER)} | columns(spans)).assign(ablation=ablation, half=half))
    return pd.concat(parts, ignore_index=True)


def pair_ratios(frame: pd.DataFrame, params: Hydra) -> pd.DataFrame:
    """Compensation of each confirmation pair whose slice has a direct effect beyond the floor, by ablation."""
    own = in_halves(changes(frame[frame["slice"] == "slice"]))[-1][1]
    own = own[own["direct"].abs() > params.direct_floor]
    return own.assign(ratio=-(own["heads"] + own["mlps"]) / own["direct"])[["quad_id", "pair_id", "ablation", "ratio"]]


def distribution(ratios: pd.DataFrame, params: Hydra) -> list[dict]:
    """For each ablation: how many pairs, the shares above 0 (repair) and above 1 (overshoot), and quantiles."""
    out = []
    for ablation, rows in ratios.groupby("ablation", sort=False):
        shares = {}
        for name, above in (("repaired", 0), ("overshot", 1)):
            units = (rows["ratio"] > above).groupby(rows["quad_id"]).agg(["sum", "count"])
            shares[name] = stats.proportion_interval(units["sum"], units["count"], params)
        quantiles = {f"{q:.2f}": value for q, value in rows["ratio"].quantile(QUANTILES).items()}
        out.append({"ablation": ablation, "pairs": len(rows), **shares, "quantiles": quantiles})
    return out


def lead_of(frame: pd.DataFrame, params: Hydra) -> str:
    """The ablation that decides: the first of the parameters that both halves have (a pair may lack a pool)."""
    there = set.intersection(*(set(rows["ablation"]) for _, rows in in_halves(frame))) or set(frame["ablation"])
    return next(kind for kind in params.ablations if kind in there)


def rises(frame: pd.DataFrame, params: Hydra) -> pd.DataFrame:
    """Rise of every later site's direct effect (ablated - intact, logits) under the leading ablation, in both halves:
    familywise intervals, and one-sided familywise p values for "it does not rise"."""
    own = frame[(frame["slice"] == "slice") & frame["part"].isin(["heads", "mlps"])]
    own = own[own["ablation"] == lead_of(frame, params)].assign(change=lambda rows: rows["after"] - rows["before"])
    parts = []
    for half, rows in in_halves(own):
        matrix = quad_matrix(rows, "change", SITE)
        together = stats.simultaneous(matrix.values, params)
        test = stats.max_t(matrix.values, params, tail="greater")
        means = {when: quad_matrix(rows, when, SITE).values.mean(0) for when in ("before", "after")}
        parts.append(matrix.sites.assign(half=half, **columns(together), p=test.p, **means, quads=len(matrix.quads)))
    if not parts:  # the slice's last site is the model's last: nothing comes after
        return pd.DataFrame(columns=[*SITE, "half", "estimate", "low", "high", "p", "before", "after", "quads", "site"])
    out = pd.concat(parts, ignore_index=True)
    return out.assign(site=named(out))


def candidates(table: pd.DataFrame, params: Hydra) -> pd.DataFrame:
    """Sites whose rise is familywise significant on discovery, the largest there first, with their reported rows."""
    if table.empty:
        return table
    first = in_halves(table)[0][1]
    good = first[(first["p"] <= 1 - params.level) & (first["estimate"] > 0)]
    order = good.sort_values("estimate", ascending=False)["site"]
    return reported(table).set_index("site", drop=False).loc[order].reset_index(drop=True)


def leading(table: pd.DataFrame, count: int) -> pd.DataFrame:
    """The `count` sites of largest change either way on discovery, from rise to fall, with both halves' rows."""
    first = in_halves(table)[0][1]
    first = first.loc[first["estimate"].abs().nlargest(count).index].sort_values("estimate", ascending=False)
    return pd.concat([table[table["site"] == site] for site in first["site"]], ignore_index=True)


def rise_map(table: pd.DataFrame, n_heads: int, params: Hydra) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Rises of the later heads (layers x heads, NaN in the slice), which of them are significant, and the layers."""
    own = reported(table[table["component"] == "head"])
    maps = [
        own.assign(value=values).pivot(index="layer", columns="head", values="value").reindex(columns=range(n_heads))
        for values in (own["estimate"], (own["p"] <= 1 - params.level).astype(float))
    ]
    return maps[0].to_numpy(), maps[1].to_numpy(), maps[0].index.tolist()


def joint_sets(sites: Sequence[Site], table: pd.DataFrame) -> list[tuple[Site, ...]]:
    """The slice, the slice with each candidate, and each candidate: the sets of the joint ablation, in this order."""
    chosen = [Site(*site) for site in table[SITE].itertuples(index=False)]
    return [tuple(sites), *((*sites, site) for site in chosen), *((site,) for site in chosen)]


def joint_tests(joint: pd.DataFrame, rising: pd.DataFrame, params: Hydra) -> pd.DataFrame:
    """What slice + candidate costs beyond the two apart (logits), on the confirmation half, familywise over candidates.

    `backup` where the whole interval is above 0. It is the candidate's cost once the slice is gone (`gone`) less its
    cost alone (`alone`), so that a site which opposes the answer through the slice passes too; `stands_in` where the
    whole interval of `gone` is above 0.
    """
    matrix = quad_matrix(in_halves(joint)[-1][1], "effect", ["site_set"]).values
    count, spans = len(rising), {}
    whole, together, alone = matrix[:, :1], matrix[:, 1 : 1 + count], matrix[:, 1 + count :]
    for name, values in {"": together - whole - alone, "gone_": together - whole, "alone_": alone}.items():
        spans |= columns(stats.simultaneous(values, params), name)
    names = {"before": "intact", "after": "ablated", "estimate": "rise", "low": "rise_low", "high": "rise_high"}
    out = rising[["site", *SITE, *names]].rename(columns=names).assign(**spans)
    above = {"backup": "low", "stands_in": "gone_low"}
    return out.assign(**{name: out[end].astype(float) > 0 for name, end in above.items()})


def backups_of(tests: pd.DataFrame) -> list[Site]:
    """The sites that a round confirmed."""
    return [] if tests.empty else [Site(*site) for site in tests.loc[tests["backup"], SITE].itertuples(index=False)]


def tests_table(rounds: Sequence[Round]) -> pd.DataFrame:
    """Every candidate's numbers for the page (logits, confirmation half)."""
    each = [one.tests.assign(round=number) for number, one in enumerate(rounds) if len(one.tests)]
    tests = pd.concat(each, ignore_index=True)
    shown_as = {"": "costs more by", "alone_": "alone", "gone_": "once the slice is gone"}
    spans = {
        name: [interval(*ends, 3) for ends in tests[[f"{key}{end}" for end in ENDS]].itertuples(index=False)]
        for key, name in shown_as.items()
    }
    effects = tests[["intact", "ablated"]].round(3).add_prefix("direct effect, ")
    return tests[["round", "site"]].join(effects).assign(**spans, backup=tests["backup"])


def rounds_table(rounds: Sequence[Round], params: Hydra) -> pd.DataFrame:
    """The curve of widening: joint damage (logits) and compensation ratio of each round's slice, by half."""
    parts = []
    for number, own in enumerate(rounds):
        lead, about = lead_of(own.frame, params), {"round": number, "n_sites": len(own.sites)}
        frame = own.frame[(own.frame["slice"] == "slice") & (own.frame["ablation"] == lead)]
        ratios = compensation(frame, params)
        for half, rows in in_halves(changes(frame)):
            damage = -rows.groupby("quad_id")["total"].mean().to_numpy()
            span = stats.mean_interval(damage, params)
            ratio = ratios[(ratios["half"] == half) & (ratios["later"] == "heads and MLPs")]
            parts.append(pd.DataFrame(columns([span])).assign(quantity="joint damage (logits)", half=half, **about))
            ratio = ratio[["estimate", "low", "high"]]
            parts.append(ratio.assign(quantity="compensation ratio", half=half, **about))
    return pd.concat(parts, ignore_index=True)


def missed(last: Round, params: Hydra) -> list[dict]:
    """How large a backup could be there unseen, among heads and among MLPs: the largest upper end of the rises'
    simultaneous intervals over sites that are no backup (logits, and as a share of the slice's direct effect)."""
    lead = last.frame[(last.frame["slice"] == "slice") & (last.frame["ablation"] == lead_of(last.frame, params))]
    direct = in_halves(changes(lead))[-1][1].groupby("quad_id")["direct"].mean().mean()
    names = [effects.site_name(*site) for site in backups_of(last.tests)]
    own = reported(last.rises) if len(last.rises) else last.rises
    own = own[~own["site"].isin(names)].dropna(subset="high").astype({"high": float})
    tops = [rows.loc[rows["high"].idxmax()] for _, rows in own.groupby("component")]
    return [
        {key: row[key] for key in ("site", "component")}
        | {"logits": row["high"], "share": row["high"] / -direct if direct < 0 else None}
        for row in tops
    ]
