"""The findings of step 05: sentences built from the tables of `steps.hydra.page`, and the numbers handed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lib import effects, stats
from lib.effects import in_halves, reported
from pipeline.step import Step
from report.words import OVER_QUADS, about_model, interval, listed
from steps.hydra.measure import Hydra
from steps.hydra.page import WORDS, Round, backups_of, candidates, changes, lead_of, missed, rounds_table

KINDS = {"head": "a head", "mlp": "an MLP"}
CAPTIONS = {
    "split": "What ablating the critical slice at the last token does to logit_diff, and its parts: the slice's own "
    "direct effect, later heads, later MLPs and the final norm's scale; beside it random slices of the same make-up "
    f"(their mean); {OVER_QUADS}. A later site's bar above zero is repair.",
    "rises": "Later sites whose direct effect changes most when the slice is ablated, picked on the discovery half, "
    "with both halves and intervals that hold for all later sites together. To the right: the site makes up for it.",
}


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
            out.append(f"{text}; the limit of rounds ({params.rounds}) was reached, so they were not ablated with it.")
            continue
        if rising.empty:
            out.append(f"{text}.")
            continue
        sure = own.tests["backup"]
        each = [f"{row.site} ({interval(row.estimate, row.low, row.high, 3)})" for row in own.tests[sure].itertuples()]
        most = f"; at most {own.tests.loc[~sure, 'estimate'].max():.3f} among the others" if not sure.all() else ""
        out.append(
            f"{text}. Of the {len(own.tests)} that rise most, those that cost more together with it than apart "
            f"(logits, confirmation half, familywise intervals above zero) are: {listed(each)}{most}."
        )
        for row in own.tests[sure].itertuples():
            gone = interval(row.gone_estimate, row.gone_low, row.gone_high, 3)
            less = "its cost rises, but is not shown to be above zero, so it does not stand in for the slice"
            how = "it stands in for the slice" if row.stands_in else less
            out.append(
                f"{row.site} passes both tests of a backup. When {which} is ablated its direct effect goes from "
                f"{row.intact:+.3f} to {row.ablated:+.3f} logits; its own ablation costs {row.alone_estimate:.3f} "
                f"alone and {gone} once the slice is gone: {how}."
            )
    return out


def ending(rounds: Sequence[Round], params: Hydra) -> str:
    """What the search for backups comes to, and how large a backup it could have missed."""
    last, stand_in = rounds[-1], any(one.tests["stands_in"].any() for one in rounds if len(one.tests))
    names = [effects.site_name(*site) for one in rounds for site in backups_of(one.tests)]
    if last.rises.empty:
        left = "the pathway is unique in that no other site comes after the slice"
        return f"Backups by both tests: {listed(names)}; {left}."
    bounds, unique = missed(last, params), "the pathway is unique as far as this test can see"
    if not bounds:
        return f"Backups by both tests: {listed(names)}. There are too few quads to confirm one, or to rule one out."
    if not names:
        text = f"No backup was found: {unique}."
    else:
        stopped = len(candidates(last.rises, params)) and last.tests.empty
        text = f"Backups by both tests: {listed(names)}; "
        text += f"the limit of rounds ({params.rounds}) was reached." if stopped else "no further one after widening."
        text += "" if stand_in else f" None of them is shown to stand in for the slice: in that sense {unique}."
    each = [
        f"{KINDS[bound['component']]} whose direct effect rises by up to "
        f"{bound['logits']:.2f} logits ({bound['site']}"
        + ("" if bound["share"] is None else f"; {bound['share']:.0%} of the slice's own")
        + ")"
        for bound in bounds
    ]
    return f"{text} It could have missed {' or '.join(each)}: upper ends of intervals that hold for all later sites."


def control_sentences(split: pd.DataFrame) -> list[str]:
    """The random slices beside the slice, for each ablation."""
    out = []
    for ablation, rows in split.groupby("ablation", sort=False):
        own = {row.part: row for row in rows[rows["slice"] != "slice"].itertuples()}
        if own:
            real = rows[(rows["slice"] == "slice") & (rows["part"] == "total")].iloc[0]
            apart = own["total"].low is not None and own["total"].low > real["high"]
            each = [f"{WORDS[part]} {shown(row)}" for part, row in own.items() if part not in ("total", "direct")]
            out.append(
                f"Control (`{ablation}`): random slices of the same make-up change logit_diff by {shown(own['total'])} "
                f"logits (their own direct effect {shown(own['direct'])}, {listed(each)}). Expected was clearly less "
                f"than the slice: {'so it is' if apart else 'that is not shown'}."
            )
    return out


def findings_of(
    step: Step, rounds: Sequence[Round], split: pd.DataFrame, ratios: pd.DataFrame, spread: Sequence[dict]
) -> dict:
    """The findings of step 05."""
    params, first, last = step.params, rounds[0], rounds[-1]
    own = in_halves(changes(first.frame))[-1][1]
    residual = max(changes(own.frame)["residual"].abs().max() for own in rounds)
    end, compared = ending(rounds, params), split_sentences(split, ratios, spread, params)
    sentences = [
        f"The slice ({listed(effects.site_name(*site) for site in first.sites)}) was ablated as a whole at `last`; "
        f"what follows is about {own['pair_id'].nunique()} pairs of {own['quad_id'].nunique()} quads of the "
        f"{own['half'].iloc[0]} half. In every pair the parts add up to the total change: the largest residual is "
        f"{residual:.1e} logits.",
        *compared,
        *control_sentences(split),
        *backup_sentences(rounds, params),
        end,
    ]
    backups = [
        {"round": number} | row
        for number, one in enumerate(rounds)
        for row in (one.tests[one.tests["backup"]].to_dict("records") if len(one.tests) else [])
    ]
    return {
        "model": about_model(step),
        "task": params.task,
        "able": True,
        "backups": backups,
        "widened_slice": [{"site": effects.site_name(*site), **site._asdict()} for site in last.sites],
        "compensation": reported(ratios).to_dict("records"),
        "per_pair": list(spread),
        "split": split.to_dict("records"),
        "rounds": rounds_table(rounds, params).to_dict("records"),
        "missed": missed(last, params),
        "largest_residual": residual,
        "sentences": sentences,
        "headline": [end, compared[0].partition(" In the ")[0]],  # without the spread over single pairs
    }
