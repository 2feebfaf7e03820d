"""Step 04 on its page: how stable the order and the slice are, and whether its sites add up.

1. `stability` draws the discovery quads again and puts the sites in order anew: how often each is among as many first
   sites as the slice has, between which ranks it lies, and its rank on the other half and in other templates.
2. `additivity` sets joint recovery beside the sum of single recoveries, `interactions` two sites beside each alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from lib import effects, stats
from lib.effects import SITE, columns, in_halves, named, quad_matrix, reported
from report import plots
from report.words import capital, counted, interval, is_are, of_row, sites
from steps.sufficiency.measure import Measured, Sufficiency

HALF = "confirmation half"
JOINT, SUM, BEYOND, LEFT = "joint recovery", "sum of single recoveries", "joint less sum", "still to come"
TOO_FEW = "too few quads"
CAPTION = (
    "Ranks of the leading sites by recovery: on the discovery half, with the interval of their ranks in bootstraps "
    "of its quads, on the confirmation half and in other templates. Dashed: where the critical slice is cut off."
)


class Order(NamedTuple):
    """The leading sites in another order than the discovery half's."""

    name: str
    ranks: list[int]
    shared: int  # of as many first sites as the slice has, how many are the slice's
    quads: int


class Stability(NamedTuple):
    """How stable the order of sites is. What rests on bootstraps is NaN where there are too few quads."""

    sites: pd.DataFrame  # the leading sites: site, rank, `included` (probability), `rank_low`, `rank_high`
    same: float  # share of bootstraps in which the slice's sites are the first, in whatever order
    kept: float  # how many of the slice's sites are among as many first, mean over bootstraps
    sizes: tuple[float, float]  # between which the critical size lies; one above all measured: not reached
    others: list[Order]
    quads: int


def single(frame: pd.DataFrame) -> pd.DataFrame:
    """Records of heads and MLPs alone."""
    return frame[frame["component"].isin(["head", "mlp"])]


def other_records(m: Measured, floor: float) -> Iterator[tuple[str, pd.DataFrame]]:
    """Records of single sites in which their order can be asked again: of the other half, and of each template, there
    without quads whose gap has the wrong sign."""
    halves = in_halves(single(m.records))
    if len(halves) > 1:
        yield HALF, halves[1][1]
    for template, rows in [] if m.others is None else m.others.groupby("template", sort=False):
        gaps = effects.gap(rows).groupby(rows["quad_id"]).mean()
        if (gaps > floor).any():
            yield template, rows[rows["quad_id"].map(gaps) > floor]


def ranks(change: Float[np.ndarray, "rows sites"]) -> Int[np.ndarray, "rows sites"]:
    """Each site's place in the order of its row, from 1, the largest change first. All sites share their gaps, so that
    is the order of recovery."""
    return (-change).argsort(axis=1, kind="stable").argsort(axis=1) + 1


def stability(m: Measured, params: Sufficiency) -> Stability:
    """The order of sites in bootstraps of the discovery quads, on the other half and in other templates."""
    leading, size = m.order["site"].tolist(), m.critical.size
    change = quad_matrix(in_halves(single(m.records))[0][1], "effect", SITE, reduce="sum")
    names, n, level = named(change.sites).tolist(), len(change.quads), params.level
    places, tails = [names.index(site) for site in leading], ((1 - level) / 2, (1 + level) / 2)
    out = pd.DataFrame({"site": leading, "rank": ranks(change.values.sum(0)[None])[0, places]})
    out = out.assign(included=np.nan, rank_low=np.nan, rank_high=np.nan)
    same, kept, sizes = np.nan, np.nan, (np.nan, np.nan)
    if stats.too_few(n) is None:
        drawn = np.concatenate(list(stats.weights(n, len(names), params.resamples, params.seed)))
        again = ranks(drawn @ change.values)[:, places]
        low, high = np.quantile(again, tails, axis=0, method="nearest")
        out = out.assign(included=(again <= size).mean(0), rank_low=low, rank_high=high)
        there = (again[:, :size] <= size).sum(1)
        same, kept = float((there == size).mean()), float(there.mean())
        sizes = tuple(np.quantile(sizes_again(m, params, drawn), tails, method="nearest").tolist())
    others = []
    for name, rows in other_records(m, params.floor):
        other = quad_matrix(rows, "effect", SITE, reduce="sum")
        places = [named(other.sites).tolist().index(site) for site in leading]
        own = ranks(other.values.sum(0)[None])[0, places].tolist()
        others.append(Order(name, own, sum(rank <= size for rank in own[:size]), len(other.quads)))
    return Stability(out, same, kept, sizes, others, n)


def sizes_again(m: Measured, params: Sufficiency, drawn: Float[np.ndarray, "bootstraps quads"]) -> list[int]:
    """The critical size in each bootstrap of the discovery quads, along the order that was measured; one more than was
    measured where the share is not reached."""
    both = []
    for _, rows in in_halves(m.joint)[0][1].groupby("direction"):
        change, gaps = (quad_matrix(rows, value, ["site_set"], reduce="sum").values for value in ("effect", "gap"))
        both.append((drawn @ change) / (drawn @ gaps))
    found = [effects.critical_slice(one, other, params.slice_share) for one, other in zip(*both, strict=True)]
    return [own.size if own.reached else own.size + 1 for own in found]


def additivity(m: Measured, params: Sufficiency) -> pd.DataFrame:
    """Joint recovery of the first site, the first two, ..., the sum of their single recoveries, the difference, and
    what joint recovery still gains from there to the last of them: shares of the gap, confirmation half."""
    joint = reported(m.joint)
    joint = joint[joint["direction"] == "denoise"]
    together, gaps = (quad_matrix(joint, value, ["site_set"], reduce="sum").values for value in ("effect", "gap"))
    alone = quad_matrix(reported(single(m.records)), "effect", SITE, reduce="sum")
    names = named(alone.sites).tolist()
    added = alone.values[:, [names.index(site) for site in m.order["site"]]].cumsum(axis=1)
    numbers = {JOINT: together, SUM: added, BEYOND: together - added, LEFT: together[:, -1:] - together}
    parts = [
        pd.DataFrame(columns(stats.ratio_intervals(values, gaps, params))).assign(quantity=name)
        for name, values in numbers.items()
    ]
    return pd.concat([part.assign(n_sites=range(1, len(part) + 1)) for part in parts], ignore_index=True)


def interactions(m: Measured, params: Sufficiency) -> pd.DataFrame | None:
    """What two leading sites do together less what each does alone (logits), confirmation half, familywise over all
    twos; below zero, they share what they carry. None where there are no two."""
    if m.couples is None:
        return None
    sites, frame = m.order["site"].head(params.coupled_sites).tolist(), reported(m.couples)
    both = quad_matrix(frame, "effect", ["site_set"]).values
    alone = single(m.records)
    alone = quad_matrix(alone[alone["pair_id"].isin(frame["pair_id"])], "effect", SITE)
    places = [named(alone.sites).tolist().index(site) for site in sites]
    apart = np.stack([alone.values[:, [*two]].sum(1) for two in combinations(places, 2)], axis=1)
    out = pd.DataFrame(combinations(sites, 2), columns=["site", "other"])
    tested = effects.familywise(both - apart, params, floor=params.floor)
    out = out.assign(together=both.mean(0), apart=apart.mean(0), **tested, quads=len(both))
    return out.assign(sure=effects.significant(out, params))


def twos(m: Measured, params: Sufficiency) -> pd.DataFrame:
    """Joint recovery of every two leading sites, as a share of the gap, confirmation half; no rows where none were
    patched."""
    if m.couples is None:
        return pd.DataFrame(columns=["site", "other", "estimate", "low", "high"])
    names = combinations(m.order["site"].head(params.coupled_sites), 2)
    sites = dict(enumerate(names))
    out = effects.curve(reported(m.couples), params, ["site_set"])
    return out.assign(
        **{name: [sites[number][at] for number in out["site_set"]] for at, name in enumerate(("site", "other"))}
    )


# --- figures and tables ---


def ranks_figure(m: Measured, params: Sufficiency) -> Figure:
    """The ranks, in every order, of twice as many leading sites as the slice has."""
    found, shown = stability(m, params), 2 * m.critical.size
    rows = found.sites.head(shown).rename(columns={"rank": "estimate", "rank_low": "low", "rank_high": "high"})
    parts = [rows.assign(order="discovery half")]
    for other in found.others:
        parts.append(rows.assign(estimate=other.ranks[:shown], low=np.nan, high=np.nan, order=other.name))
    figure = plots.ranked_sites(pd.concat(parts), "rank by recovery", by="order", lines=[m.critical.size + 0.5])
    figure.axes[0].set(xscale="log")  # a site may come last in some draws
    figure.axes[0].set_xticks(ticks := [1, 2, 5, 10, 20, 50, 100, 200], map(str, ticks))
    figure.axes[0].minorticks_off()
    return figure


def table(m: Measured, params: Sufficiency) -> pd.DataFrame:
    """The leading sites with inclusion probability and ranks, and what they recover up to each."""
    found, sums = stability(m, params), additivity(m, params)
    drawn = [f"{row.rank_low:.0f} to {row.rank_high:.0f}" for row in found.sites.itertuples()]
    few = found.sites["included"].isna().any()
    joint, added = ([of_row(row) for row in sums[sums["quantity"] == name].itertuples()] for name in (JOINT, SUM))
    own = {
        "site": found.sites["site"],
        f"among the first {m.critical.size}": TOO_FEW if few else found.sites["included"].map("{:.0%}".format),
        "rank": found.sites["rank"],
        "rank in bootstraps": TOO_FEW if few else drawn,
    }
    own |= {f"rank, {other.name}": other.ranks for other in found.others}
    return pd.DataFrame(own | {"joint recovery up to it": joint, SUM: added})


def sums_figure(m: Measured, params: Sufficiency) -> Figure:
    """Joint recovery beside the sum of single recoveries."""
    rows, names = additivity(m, params), m.order["site"].tolist()
    rows = rows[rows["quantity"].isin([JOINT, SUM])]
    return plots.slice_curve(rows, params.slice_share, panel=None, ylabel="share of the gap", sites=names)


def interactions_table(m: Measured, params: Sufficiency, count: int = 10) -> pd.DataFrame | None:
    """The largest interactions either way (logits)."""
    rows = interactions(m, params)
    if rows is None:
        return None
    rows = rows.loc[rows["estimate"].abs().nlargest(count).index]
    columns = {
        "sites": rows["site"] + " with " + rows["other"],
        "together": rows["together"].round(3),
        "one by one": rows["apart"].round(3),
        "together less one by one": [interval(row.estimate, row.low, row.high, 3) for row in rows.itertuples()],
        "significant": np.where(rows["low"].isna(), TOO_FEW, np.where(rows["sure"], "yes", "no")),
    }
    return pd.DataFrame(columns)


# --- findings ---


def findings(m: Measured, params: Sufficiency) -> dict[str, Any]:
    """Numbers and sentences: `curve` comes before the slice is named, `sentences` after."""
    found, sums, twos = stability(m, params), additivity(m, params), interactions(m, params)
    by = {name: rows.set_index("n_sites") for name, rows in sums.groupby("quantity")}
    return {
        "stability": found._replace(sites=found.sites.to_dict("records")),
        "additivity": sums.to_dict("records"),
        "interactions": [] if twos is None else twos.to_dict("records"),
        "curve": curve_sentence(m, by, params),
        "sentences": [
            stability_sentence(m, found, params),
            additivity_sentence(m, by, params),
            *([] if twos is None else [interactions_sentence(twos)]),
        ],
    }


def curve_sentence(m: Measured, by: dict[str, pd.DataFrame], params: Sufficiency) -> str:
    """What the growing set recovers as it grows, and whether it has an edge where the slice is cut off."""
    size, last = m.critical.size, len(m.order)
    told = (
        "Heads and MLPs put into the corrupt run together, in order of discovery recovery, bring back "
        f"{of_row(by[JOINT].loc[size])} of the gap with the first {size} ({HALF})."
    )
    if size == last:
        return f"{told} No more were measured, so whether the curve has an edge there is not known."
    more = by[LEFT].loc[size]
    rises = f"from there to all that were measured ({counted(last, 'site')}) the curve rises by {of_row(more)}"
    if pd.isna(more["low"]):
        return f"{told} There are too few quads to test whether there is an edge at {size}: {rises}."
    if more["low"] > 0:
        return (
            f"{told} But there is no edge at {size}: {rises}. What is called the critical slice is cut off where the "
            f"share that the profile asks for ({params.slice_share:.0%}) is reached."
        )
    return f"{told} That the curve goes on rising is not shown: {rises}."


def stability_sentence(m: Measured, found: Stability, params: Sufficiency) -> str:
    """How often the same sites come back."""
    size = m.critical.size
    told = "".join(
        f" In the order of {where(one)}, {one.shared} of the first {size} {is_are(one.shared)} the slice's."
        for one in found.others
    )
    if np.isnan(found.same):
        return f"There are too few discovery quads ({found.quads}) to say how often the same sites come back.{told}"
    sure = found.sites.head(size)
    sure = sure.loc[sure["included"] >= params.level, "site"].tolist()
    always = f"{capital(sites(sure))} {is_are(len(sure))}" if sure else "No site is"
    many = f", and {found.kept:.1f} of the {size} on average" * (size > 1)
    return (
        f"The slice's {'site comes' if size == 1 else 'sites come'} first again in {found.same:.0%} of bootstraps of "
        f"the discovery quads ({counted(found.quads, 'quad')}){many}. {always} among the first {size} in at least "
        f"{params.level:.0%} of them. Along the order that was measured, both curves reach the share that the profile "
        f"asks for {reach(found.sizes, len(m.order))} in the middle {params.level:.0%} of draws.{told}"
    )


def reach(sizes: tuple[float, float], measured: int) -> str:
    """Between which sizes a share is reached, of so many that were measured."""
    low, high = sizes
    if low > measured:
        return f"not within the {counted(measured, 'site')} measured"
    if low == high:
        return f"at {counted(int(low), 'site')}"
    return f"at {low:.0f} to " + (f"more than {measured} sites" if high > measured else f"{high:.0f} sites")


def where(order: Order) -> str:
    """An order in words, with its quads."""
    name = f"the {order.name}" if order.name == HALF else f"template `{order.name}`"
    return f"{name} ({counted(order.quads, 'quad')})"


def additivity_sentence(m: Measured, by: dict[str, pd.DataFrame], params: Sufficiency) -> str:
    """Whether the leading sites recover more or less together than one by one."""
    count = min(params.coupled_sites, len(m.order))
    beyond = by[BEYOND].loc[count]
    who = f"The {counted(count, 'leading site')} {is_are(count)}"
    verdict = f"{who} neither shown to be sub-additive nor super-additive"
    if pd.isna(beyond["low"]):
        verdict = f"Of how the {counted(count, 'leading site')} add up, too few quads allow to say more"
    elif beyond["high"] < 0:
        verdict = f"{who} sub-additive: part of what one carries, others carry as well or pass on"
    elif beyond["low"] > 0:
        verdict = f"{who} super-additive: part of what they do, they do only together"
    return (
        f"{verdict}. Together they recover {of_row(by[JOINT].loc[count])} of the gap; less what they recover one by "
        f"one, that is {of_row(beyond)}."
    )


def interactions_sentence(twos: pd.DataFrame) -> str:
    """Which two of the leading sites interact."""
    if twos["low"].isna().all():
        return f"Two by two, there are too few quads ({twos['quads'].iloc[0]}) to test which of them interact."
    sure = twos[twos["sure"]]
    less, most = (sure["estimate"] < 0).sum(), twos.loc[twos["estimate"].abs().idxmax()]
    share = f"; {less} of the {len(sure)} recover less together than one by one" * bool(len(sure))
    return (
        f"{len(sure)} of the {len(twos)} twos among them {'interacts' if len(sure) == 1 else 'interact'} significantly "
        f"(familywise, above the model's noise){share}. The largest interaction, that of {sites([most['site']])} with "
        f"{sites([most['other']])}, is {interval(most['estimate'], most['low'], most['high'], 3)} logits."
    )
