"""Step 05's tables, candidates and findings, from the split of total effects (`lib.hydra`) and the joint ablations.

1. `changes` gathers each pair's parts: total = slice's direct effect + later heads + later MLPs + final norm's scale.
2. `split_table`, `compensation` and `distribution` say how much of the slice's direct effect later sites make up for.
3. `rises` tests every later site's rise of direct effect; `candidates` are picked on discovery; `joint_tests` asks on
   the confirmation half whether slice + candidate costs more than the two apart. Both: the site is a backup.
4. `findings_of` turns the rounds of widening into numbers and sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lib import findings, stats
from lib.effects import quad_matrix
from lib.findings import SITE, columns, in_halves, interval, listed, named, reported
from lib.hooks import Site
from lib.params import Hydra
from lib.statements import OVER_QUADS, about_model
from lib.steps import Step

LATER = {"heads and MLPs": ["heads", "mlps"], "heads": ["heads"], "MLPs": ["mlps"]}
WORDS = {
    "total": "total",
    "direct": "slice itself",
    "heads": "later heads",
    "mlps": "later MLPs",
    "scale": "final norm's scale",
}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CAPTIONS = {
    "split": "What ablating the critical slice at the last token does to logit_diff, and its parts: the slice's own "
    "direct effect, later heads, later MLPs and the final norm's scale; beside it random slices of the same make-up "
    f"(their mean); {OVER_QUADS}. A later site's bar above zero is repair.",
    "rises": "Later sites whose direct effect changes most when the slice is ablated, picked on the discovery half, "
    "with both halves and intervals that hold for all later sites together. To the right: the site makes up for it.",
}


class Round(NamedTuple):
    """One round of widening: what was ablated, the split, and the tests that name backups."""

    sites: list[Site]
    frame: pd.DataFrame  # `lib.hydra.SCHEMA`
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
        spans = stats.mean_intervals(quads.to_numpy(), params.level, params.resamples, params.seed)
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
                spans = stats.ratio_intervals(gains, -quads["direct"], params.level, params.resamples, params.seed)
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
            shares[name] = stats.proportion_interval(units["sum"], units["count"], params.level)
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
        together = stats.simultaneous(matrix.values, params.level, params.resamples, params.seed)
        test = stats.max_t(matrix.values, params.flips, params.seed, tail="greater")
        means = {when: quad_matrix(rows, when, SITE).values.mean(0) for when in ("before", "after")}
        parts.append(matrix.sites.assign(half=half, **columns(together), p=test.p, **means, quads=len(matrix.quads)))
    if not parts:  # the slice's last site is the model's last: nothing comes after
        return pd.DataFrame(columns=[*SITE, "half", "estimate", "low", "high", "p", "before", "after", "quads", "site"])
    out = pd.concat(parts, ignore_index=True)
    return out.assign(site=named(out))


def candidates(table: pd.DataFrame, params: Hydra) -> pd.DataFrame:
    """Sites whose rise is familywise significant on discovery, the largest first."""
    if table.empty:
        return table
    first = in_halves(table)[0][1]
    good = first[(first["p"] <= 1 - params.level) & (first["estimate"] > 0)]
    return good.sort_values("estimate", ascending=False, ignore_index=True)


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


def joint_tests(joint: pd.DataFrame, table: pd.DataFrame, params: Hydra) -> pd.DataFrame:
    """What slice + candidate costs beyond the two apart (logits), on the confirmation half, familywise over candidates.

    `backup` where the whole interval is above 0. `alone` is the candidate's own cost, `together` the joint one.
    """
    own = in_halves(joint)[-1][1]
    matrix = quad_matrix(own, "effect", ["site_set"]).values
    count = len(table)
    slice_, together, alone = matrix[:, :1], matrix[:, 1 : 1 + count], matrix[:, 1 + count :]
    spans = stats.simultaneous(together - slice_ - alone, params.level, params.resamples, params.seed)
    out = table[["site", *SITE, "before", "after"]].rename(columns={"before": "intact", "after": "ablated"})
    out = out.assign(**columns(spans), together=together.mean(0), slice=slice_.mean(), alone=alone.mean(0))
    return out.assign(backup=[span.low is not None and span.low > 0 for span in spans])


def backups_of(tests: pd.DataFrame) -> list[Site]:
    """The sites that a round confirmed."""
    return [] if tests.empty else [Site(*site) for site in tests.loc[tests["backup"], SITE].itertuples(index=False)]


def rounds_table(rounds: Sequence[Round], params: Hydra) -> pd.DataFrame:
    """The curve of widening: joint damage (logits) and compensation ratio of each round's slice, by half."""
    parts = []
    for number, own in enumerate(rounds):
        lead, about = lead_of(own.frame, params), {"round": number, "n_sites": len(own.sites)}
        frame = own.frame[(own.frame["slice"] == "slice") & (own.frame["ablation"] == lead)]
        ratios = compensation(frame, params)
        for half, rows in in_halves(changes(frame)):
            damage = -rows.groupby("quad_id")["total"].mean().to_numpy()
            span = stats.mean_interval(damage, params.level, params.resamples, params.seed)
            ratio = ratios[(ratios["half"] == half) & (ratios["later"] == "heads and MLPs")]
            parts.append(pd.DataFrame(columns([span])).assign(quantity="joint damage (logits)", half=half, **about))
            ratio = ratio[["estimate", "low", "high"]]
            parts.append(ratio.assign(quantity="compensation ratio", half=half, **about))
    return pd.concat(parts, ignore_index=True)


def missed(last: Round, params: Hydra) -> dict[str, Any] | None:
    """The largest backup that could be there unseen: the largest upper end of the rises' simultaneous interval among
    sites that are no backup (logits, and as a share of the slice's direct effect); None without intervals."""
    if last.rises.empty or reported(last.rises)["high"].isna().any():
        return None
    own = reported(last.rises)
    own = own[~own["site"].isin(last.tests.loc[last.tests["backup"], "site"] if len(last.tests) else [])]
    if own.empty:
        return None
    row = own.loc[own["high"].astype(float).idxmax()]
    lead = changes(
        last.frame[(last.frame["slice"] == "slice") & (last.frame["ablation"] == lead_of(last.frame, params))]
    )
    direct = in_halves(lead)[-1][1].groupby("quad_id")["direct"].mean().mean()
    return {"site": row["site"], "logits": row["high"], "share": row["high"] / -direct if direct < 0 else None}


def shown(row: Any) -> str:
    """An estimate with its interval, from a row of a table."""
    return interval(row.estimate, row.low, row.high)


def split_sentences(split: pd.DataFrame, ratios: pd.DataFrame, spread: Sequence[dict], params: Hydra) -> list[str]:
    """What ablating the slice does, and how much of it later sites make up for; a paragraph for each ablation."""
    out = []
    for ablation, rows in split[split["slice"] == "slice"].groupby("ablation", sort=False):
        part = {row.part: shown(row) for row in rows.itertuples()}
        text = (
            f"Ablating the slice (`{ablation}`) changes logit_diff by {part['total']} logits: the slice's own direct "
            f"effect by {part['direct']}, later heads by {part['heads']}, later MLPs by {part['mlps']}, the final "
            f"norm's scale by {part['scale']}."
        )
        own = reported(ratios)
        own = {row.later: row for row in own[own["ablation"] == ablation].itertuples()}
        whole = own["heads and MLPs"]
        if np.isnan(whole.estimate):
            out.append(f"{text} The slice's direct effect does not fall, so there is nothing to make up for.")
            continue
        text += (
            f" The compensation ratio is {shown(whole)} (heads {shown(own['heads'])}, MLPs {shown(own['MLPs'])}): "
            f"{verdict(whole)}."
        )
        for rows in (entry for entry in spread if entry["ablation"] == ablation):
            q = rows["quantiles"]
            text += (
                f" In the {rows['pairs']} pairs whose slice has a direct effect beyond {params.direct_floor:g} logits "
                f"its median is {q['0.50']:.2f} and its middle 90% {q['0.05']:.2f} to {q['0.95']:.2f}; later sites "
                f"make up for something in {share(rows['repaired'])} of them and for more than was lost in "
                f"{share(rows['overshot'])}."
            )
        out.append(text)
    return out


def verdict(ratio: Any) -> str:
    """A compensation ratio in words."""
    if ratio.low is None or np.isnan(ratio.low):
        return "too few quads to say more"
    if ratio.high < 0:
        return "later sites, which read the slice, lose as well; on the whole they repair nothing"
    if ratio.low > 0:
        return f"later sites make up for {ratio.estimate:.0%} of what the slice itself loses"
    return "on the whole later sites neither repair nor lose, within the interval"


def share(span: stats.Interval) -> str:
    """A proportion with its interval, in percent."""
    ends = "" if span.low is None else f" [{span.low:.0%}, {span.high:.0%}]"
    return f"{span.estimate:.0%}{ends}"


def backup_sentences(rounds: Sequence[Round], params: Hydra) -> list[str]:
    """Round by round: which sites rise, what their joint ablation costs, and which are backups."""
    out = []
    for number, own in enumerate(rounds):
        which = "the slice" if number == 0 else f"the slice widened {number} time{'s' * (number > 1)}"
        if own.rises.empty:
            out.append(f"No head or MLP comes after {which}: nothing could stand in for it.")
            continue
        count, rising = own.rises["site"].nunique(), candidates(own.rises, params)
        text = (
            f"When {which} ({len(own.sites)} sites) is ablated (`{lead_of(own.frame, params)}`), the direct effect of "
            f"{len(rising)} of {count} later sites rises significantly on the discovery half (one-sided, familywise)"
        )
        if len(rising) and own.tests.empty:
            out.append(f"{text}; the limit of {params.rounds} rounds was reached, so they were not ablated with it.")
            continue
        if rising.empty:
            out.append(f"{text}.")
            continue
        each = [f"{row.site} {shown(row)} beyond the two apart" for row in own.tests.itertuples()]
        out.append(
            f"{text}. Ablated together with it, the {len(own.tests)} that rise most cost (logits, confirmation half, "
            f"intervals that hold for all of them): {listed(each)}."
        )
        for row in own.tests[own.tests["backup"]].itertuples():
            how = (
                "carries the answer in its place"
                if row.ablated > 0
                else "opposes the answer less, but does not carry it"
            )
            out.append(
                f"{row.site} is a backup: its direct effect goes from {row.intact:+.2f} to {row.ablated:+.2f} logits "
                f"when {which} is ablated; it {how}."
            )
    return out


def ending(rounds: Sequence[Round], params: Hydra) -> str:
    """What the search for backups comes to, and how large a backup it could have missed."""
    found = [site for own in rounds for site in backups_of(own.tests)]
    last = rounds[-1]
    names = [findings.site_name(*site) for site in found]
    if last.rises.empty and not found:
        return "The pathway is unique in that nothing comes after the slice."
    if not found:
        text = "No backup was found: the pathway is unique as far as this test can see."
    elif len(candidates(last.rises, params)) and last.tests.empty:
        text = (
            f"Backups are {listed(names)}; the search stopped at the limit of {params.rounds} rounds, not at its end."
        )
    else:
        text = f"Backups are {listed(names)}; once the slice is widened by them, no further one is found."
    bound = missed(last, params)
    if bound is None:
        return f"{text} There are too few quads to say how large a backup it could have missed."
    relative = "" if bound["share"] is None else f", {bound['share']:.0%} of the slice's own direct effect"
    return (
        f"{text} It could have missed a site whose direct effect rises by up to {bound['logits']:.2f} logits{relative} "
        f"({bound['site']}: the upper end of its interval, which holds for all later sites together)."
    )


def control_sentence(split: pd.DataFrame) -> str | None:
    """The random slices beside the slice, under the leading ablation."""
    lead = split["ablation"].iloc[0]
    own = {row.part: row for row in split[(split["slice"] != "slice") & (split["ablation"] == lead)].itertuples()}
    if not own:
        return None
    real = split[(split["slice"] == "slice") & (split["ablation"] == lead)].set_index("part").loc["total"]
    apart = own["total"].low is not None and own["total"].low > real["high"]
    return (
        f"Control: random slices of the same make-up (`{lead}`) change logit_diff by {shown(own['total'])} logits, "
        f"their own direct effect by {shown(own['direct'])}, later heads by {shown(own['heads'])} and later MLPs by "
        f"{shown(own['mlps'])}. Expected was clearly less than the slice: that is {'so' if apart else 'not shown'}."
    )


def findings_of(
    step: Step, rounds: Sequence[Round], split: pd.DataFrame, ratios: pd.DataFrame, spread: Sequence[dict]
) -> dict:
    """The findings of step 05."""
    params, first, last = step.params, rounds[0], rounds[-1]
    own = in_halves(changes(first.frame))[-1][1]
    residual = max(changes(own.frame)["residual"].abs().max() for own in rounds)
    end, compared = ending(rounds, params), split_sentences(split, ratios, spread, params)
    sentences = [
        f"The slice ({listed(findings.site_name(*site) for site in first.sites)}) was ablated as a whole at `last`; "
        f"what follows is about {own['pair_id'].nunique()} pairs of {own['quad_id'].nunique()} quads of the "
        f"{own['half'].iloc[0]} half. In every pair the parts add up to the total change: the largest residual is "
        f"{residual:.1e} logits.",
        *compared,
        *filter(None, [control_sentence(split)]),
        *backup_sentences(rounds, params),
        end,
    ]
    backups = [
        {"round": number} | {key: value for key, value in row.items() if key != "backup"}
        for number, one in enumerate(rounds)
        for row in (one.tests[one.tests["backup"]].to_dict("records") if len(one.tests) else [])
    ]
    return {
        "model": about_model(step),
        "task": params.task,
        "able": True,
        "backups": backups,
        "widened_slice": [{"site": findings.site_name(*site), **site._asdict()} for site in last.sites],
        "compensation": reported(ratios).to_dict("records"),
        "per_pair": list(spread),
        "split": split.to_dict("records"),
        "rounds": rounds_table(rounds, params).to_dict("records"),
        "missed": missed(last, params),
        "largest_residual": residual,
        "sentences": sentences,
        "headline": [end, compared[0]],
    }
