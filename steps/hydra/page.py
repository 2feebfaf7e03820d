"""Step 05 on its page: what stands in for the slice when it is removed?

1. `changes` gathers each pair's parts: total = slice's direct effect + later heads + later MLPs + final norm's scale.
2. `split_table`, `compensation` and `distribution` say how much of the slice's direct effect later sites make up for.
3. `tests_table` and `rounds_table` say what widening came to, `missed` how large a backup could be there unseen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from lib import effects, stats
from lib.batches import NEUTRAL
from lib.effects import columns, in_halves, reported
from pipeline.step import Step
from report import plots
from report.words import (
    OVER_QUADS,
    TOO_FEW,
    about_model,
    capital,
    counted,
    finished,
    interval,
    number_word,
    of_row,
    sites,
    tabled,
)
from steps.hydra.measure import Hydra, Round, backups_of, candidates, costs_of, lead_of

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
KINDS = {"head": "a head", "mlp": "an MLP"}
CAPTIONS = {
    "split": "What ablating the critical slice at the last token does to logit_diff, and its parts: the slice's own "
    "direct effect, later heads, later MLPs and the final norm's scale. Beside it random slices of the same make-up "
    f"(their mean). {capital(OVER_QUADS)}. A later site's bar above zero is repair.",
    "rises": "Later sites whose ablation costs more, or less, once the slice is gone than in the intact run, with both "
    "halves and intervals that hold for all later sites together. First, with a star, those that rise significantly on "
    "the discovery half, then those of largest change there either way. To the right: the site matters more without "
    "the slice.",
}


# --- tables ---


def changes(frame: pd.DataFrame) -> pd.DataFrame:
    """Per pair, slice and ablation, the change (ablated - intact, logits) of each part, summed over its sites."""
    by = ["task", "template", "half", "quad_id", "pair_id", "slice", "ablation", "part"]
    wide = (frame["after"] - frame["before"]).groupby([frame[name] for name in by], sort=False).sum().unstack()
    return wide.reindex(columns=[*WORDS, "residual"], fill_value=0.0).fillna(0.0).reset_index()


def split_table(frame: pd.DataFrame, params: Hydra) -> pd.DataFrame:
    """Mean change of each part over the confirmation quads, with intervals, for each ablation and for the slice and
    the random slices (their mean)."""
    own = reported(changes(frame))
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
    surely fall by more than the floor. `above_noise`: whether the later sites' mean change is more than the floor.
    """
    parts = []
    for half, own in in_halves(changes(frame[frame["slice"] == "slice"])):
        for ablation, rows in own.groupby("ablation", sort=False):
            quads = rows.groupby("quad_id")[list(WORDS)].sum()
            gains = np.stack([quads[later].sum(axis=1) for later in LATER.values()], axis=1)
            spans = [stats.Interval(float("nan"), None, None, params.level, len(quads), "no loss")] * len(LATER)
            lost = -rows.groupby("quad_id")["direct"].mean().to_numpy()
            if quads["direct"].sum() < 0 and effects.is_loss(lost, params):
                spans = stats.ratio_intervals(gains, -quads["direct"], params)
            means = rows.groupby("quad_id")[list(WORDS)].mean().mean()
            above = [abs(means[later].sum()) > params.floor for later in LATER.values()]
            table = pd.DataFrame({"later": list(LATER)} | columns(spans))
            parts.append(table.assign(above_noise=above, ablation=ablation, half=half))
    return pd.concat(parts, ignore_index=True)


def pair_ratios(frame: pd.DataFrame, params: Hydra) -> pd.DataFrame:
    """Compensation of each confirmation pair whose slice loses more of its direct effect than `direct_floor`, by
    ablation: where it gains, there is no loss to be made up for."""
    own = reported(changes(frame[frame["slice"] == "slice"]))
    own = own[own["direct"] < -params.direct_floor]
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


def untested(rises: pd.DataFrame) -> bool:
    """Whether the discovery half has too few quads for an interval: then candidates are picked, and none is marked."""
    return bool(in_halves(rises)[0][1]["low"].isna().any())


def leading(table: pd.DataFrame, count: int, params: Hydra) -> pd.DataFrame:
    """`count` sites with both halves' rows: first, with a star behind their name, those that rise significantly on
    discovery (none where that is `untested`), then those of largest change there either way, from rise to fall."""
    first = in_halves(table)[0][1].set_index("site")
    rising = [] if untested(table) else candidates(table, params)["site"].tolist()[:count]
    others = first["estimate"].drop(rising)
    others = others.loc[others.abs().nlargest(count - len(rising)).index].sort_values(ascending=False)
    rows = pd.concat([table[table["site"] == site] for site in (*rising, *others.index)], ignore_index=True)
    return rows.assign(site=rows["site"].where(~rows["site"].isin(rising), rows["site"] + " *"))


def rise_map(table: pd.DataFrame, n_heads: int, params: Hydra) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Rises of the later heads (layers x heads, NaN in the slice), which of them are significant, and the layers."""
    own = reported(table[table["component"] == "head"])
    maps = [
        own.assign(value=values).pivot(index="layer", columns="head", values="value").reindex(columns=range(n_heads))
        for values in (own["estimate"], effects.significant(own, params).astype(float))
    ]
    return maps[0].to_numpy(), maps[1].to_numpy(), maps[0].index.tolist()


def tests_table(rounds: Sequence[Round]) -> pd.DataFrame:
    """Every candidate's numbers for the page (logits, confirmation half)."""
    each = [one.tests.assign(round=number) for number, one in enumerate(rounds) if len(one.tests)]
    tests = pd.concat(each, ignore_index=True)
    shown_as = {"alone_": "alone", "gone_": "once the slice is gone", "": "costs more by", "ratio_": "makes up for"}
    spans = {
        name: [interval(*ends, 3) for ends in tests[[f"{key}{end}" for end in ENDS]].itertuples(index=False)]
        for key, name in shown_as.items()
    }
    said = np.where(tests["low"].isna(), TOO_FEW, np.where(tests["backup"], "yes", "no"))
    return tests[["round", "site"]].assign(**spans, backup=said)


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
    simultaneous intervals over sites that are no backup (logits; as a share of what ablating the slice costs, beside
    the `rise` that the interval is about; None where the slice's ablation costs nothing above the noise)."""
    names = [effects.site_name(*site) for site in backups_of(last.tests)]
    own = reported(last.rises) if len(last.rises) else last.rises
    own = own[~own["site"].isin(names)].dropna(subset="high").astype({"high": float})
    if own.empty:
        return []
    damage = costs_of(reported(last.costs)).whole[:, 0]
    loss = damage.mean() if effects.is_loss(damage, params) else None
    tops = [rows.loc[rows["high"].idxmax()] for _, rows in own.groupby("component")]
    return [
        {key: row[key] for key in ("site", "component")}
        | {"logits": row["high"]}
        | {name: row[end] / loss if loss else None for name, end in (("rise", "estimate"), ("share", "high"))}
        for row in tops
    ]


# --- figures ---


def split_figure(step: Step, rounds: Sequence[Round]) -> Figure:
    """The total effect and its parts."""
    return plots.part_bars(split_table(rounds[0].frame, step.params), "change of logit_diff (logits)")


def pairs_figure(step: Step, rounds: Sequence[Round]) -> Figure | Markdown:
    """The compensation ratio of single pairs, where some have a direct effect beyond the floor."""
    single = pair_ratios(rounds[0].frame, step.params)
    if single.empty:
        return Markdown(
            f"In no pair does the slice lose more than {step.params.direct_floor:g} logits of its direct effect."
        )
    return plots.pair_histogram(single, "ratio", "compensation ratio of the pair")


def heads(step: Step, rounds: Sequence[Round]) -> Figure | None:
    """Rises of later heads, where there are any."""
    risen = rounds[0].rises
    if not (risen["component"] == "head").any():
        return None
    rise, sure, rows = rise_map(risen, step.n_heads, step.params)
    return plots.heat_map(rise, "rise of the effect (logits)", sure, layers=rows)


def ranked(step: Step, rounds: Sequence[Round]) -> Figure | Markdown:
    """The later sites that rise significantly and those of largest change either way, where there are any."""
    risen = rounds[0].rises
    if risen.empty:
        return Markdown("No head or MLP comes after the slice.")
    return plots.ranked_sites(leading(risen, 15, step.params), "cost without the slice less cost alone (logits)")


def candidates_table(step: Step, rounds: Sequence[Round]) -> pd.DataFrame | Markdown:
    """The tests of all rounds, or why there were none."""
    if any(len(one.tests) for one in rounds):
        return tests_table(rounds)
    risen = rounds[0].rises
    rising = candidates(risen, step.params) if len(risen) else risen
    none = "no later site rises significantly on the discovery half"
    if len(risen) and untested(risen):
        none = "no later site rises on the discovery half by the test of sign flips, all that so few quads allow"
    why = f"the limit of rounds ({step.params.rounds}) was reached" if len(rising) else none
    return Markdown(f"None was tested for a backup: {why}.")


def widening(step: Step, rounds: Sequence[Round]) -> Figure | None:
    """The slice as it is widened, where it was."""
    return plots.widening_curve(rounds_table(rounds, step.params)) if len(rounds) > 1 else None


# --- sentences ---


def shown(row: Any) -> str:
    """An estimate with its interval, from a row of a table."""
    return interval(row.estimate, row.low, row.high)


def split_sentences(split: pd.DataFrame, ratios: pd.DataFrame, spread: Sequence[dict], params: Hydra) -> list[str]:
    """What ablating the slice does, and how much of it later sites make up for; a paragraph for each ablation."""
    out = []
    for ablation, rows in split[split["slice"] == "slice"].groupby("ablation", sort=False):
        part = {row.part: shown(row) for row in rows.itertuples()}
        text = (
            f"Ablating the slice (`{ablation}`) changes logit_diff by {part['total']} logits, of which the slice's own "
            f"direct effect is {part['direct']}."
        )
        own = reported(ratios)
        own = {row.later: row for row in own[own["ablation"] == ablation].itertuples()}
        whole = own["heads and MLPs"]
        if np.isnan(whole.estimate):
            out.append(
                f"{text} The slice's own direct effect does not surely fall by more than the model's noise "
                f"({params.floor:g} logits), so there is no compensation ratio of direct effects."
            )
            continue
        text += (
            f" {capital(verdict(whole))}{apart(whole, own)}: the compensation ratio is {shown(whole)}. By themselves, "
            f"later heads have {shown(own['heads'])} and later MLPs {shown(own['MLPs'])}."
        )
        for rows in (entry for entry in spread if entry["ablation"] == ablation):
            q = rows["quantiles"]
            text += (
                f" In single pairs whose slice loses more than {params.direct_floor:g} logits of its direct effect "
                f"({counted(rows['pairs'], 'pair')}), the median ratio is {q['0.50']:.2f}, without an interval. Nine "
                f"in ten of these pairs lie from {q['0.05']:.2f} to {q['0.95']:.2f} (quantiles, no intervals). Later "
                f"sites make up for part of the loss or more in {share(rows['repaired'])} of them, and for more than "
                f"was lost in {share(rows['overshot'])}."
            )
        out.append(text)
    return out


def verdict(ratio: Any) -> str:
    """A compensation ratio in words."""
    if ratio.low is None or np.isnan(ratio.low):
        return "too few quads to say more"
    return {
        -1: "later sites, which read the slice, lose as well; on the whole they repair nothing",
        0: "neither repair nor loss by later sites together is shown",
        1: "later sites make up for part of what the slice itself loses",
    }[signed(ratio)]


def apart(whole: Any, own: Mapping[str, Any]) -> str:
    """What later heads or MLPs are shown to do by themselves where later sites together are not shown to do it."""
    return "".join(
        f"; later {part} by themselves {does}"
        for part in ("heads", "MLPs")
        for does, sign in (("repair", 1), ("lose as well", -1))
        if signed(own[part]) == sign != signed(whole)
    )


def signed(ratio: Any) -> int:
    """1 where an interval lies above zero, -1 below; 0 where it holds zero, there is none, or the change is noise."""
    known = ratio.low is not None and not np.isnan(ratio.low) and ratio.above_noise
    return int(ratio.low > 0) - int(ratio.high < 0) if known else 0


def share(span: stats.Interval) -> str:
    """A proportion with its interval, in percent."""
    ends = "" if span.low is None else f" [{span.low:.0%}, {span.high:.0%}]"
    return f"{span.estimate:.0%}{ends}"


def backup_sentences(rounds: Sequence[Round], params: Hydra) -> list[str]:
    """Round by round: which sites rise, and which of them are backups."""
    out = []
    for number, own in enumerate(rounds):
        which = "the slice" if number == 0 else f"the slice widened {number_word(number)} time{'s' * (number > 1)}"
        if own.rises.empty:
            out.append(f"No head or MLP comes after {which}: nothing could stand in for it.")
            continue
        count, rising = own.rises["site"].nunique(), candidates(own.rises, params)
        text = (
            f"Once {which} is gone ({counted(len(own.sites), 'site')}; `{lead_of(own.frame, params)}`), {len(rising)} "
            f"of the {counted(count, 'later site')} {'costs' if len(rising) == 1 else 'cost'} more than when ablated "
            f"alone, {rising_by(own.rises, params)}"
        )
        if len(rising) and own.tests.empty:
            out.append(f"{text}. The limit of rounds ({params.rounds}) was reached, so nothing was tested further.")
        elif rising.empty:
            out.append(f"{text}.")
        elif own.tests["low"].isna().any():
            most = own.tests["estimate"].max()
            out.append(
                f"{text}. There are too few quads to test on the confirmation half whether one costs more together "
                f"than apart; the largest estimate there is {most:.3f} logits."
            )
        else:
            sure = own.tests["backup"]
            held = own.tests.loc[sure, "site"].tolist()
            out.append(
                f"{text}. Of these, the {counted(len(own.tests), 'site')} of largest rise "
                f"{'was' if len(own.tests) == 1 else 'were'} tested. {capital(sites(held))} "
                f"{'costs' if len(held) < 2 else 'cost'} more together than apart on the confirmation half, too "
                "(familywise intervals above that noise)."
            )
            out += [stand_in(row, which) for row in own.tests[sure].itertuples()]
    return out


def rise_of(row: Any) -> str:
    """The rise of a tested site, with its interval."""
    return interval(row.estimate, row.low, row.high, 3)


def stand_in(row: Any, which: str) -> str:
    """What a backup costs alone and without the slice, and whether it stands in for it, by how much."""
    alone, gone = (
        interval(row.alone_estimate, None, None, 3),
        interval(row.gone_estimate, row.gone_low, row.gone_high, 3),
    )
    name = capital(sites([row.site]))
    text = (
        f"Its own ablation costs {gone} logits once {which} is gone, and {alone} when nothing else is (no interval). "
        f"The rise is {rise_of(row)}."
    )
    if row.gone_high is not None and row.gone_high < 0:
        return f"{name} works against the answer, less so without the slice: it does not stand in for it. {text}"
    if not row.stands_in:
        return f"{name} is not shown to stand in for the slice: its cost rises, but not surely above the noise. {text}"
    if np.isnan(row.ratio_estimate):
        return f"{name} stands in for the slice. {text}"
    saves = f"it makes up for {share_of(row)} of what {which} would cost without it"
    return f"{name} stands in for the slice: {saves}. {text}"


def share_of(row: Any) -> str:
    """A tested site's compensation, with its interval."""
    return interval(row.ratio_estimate, row.ratio_low, row.ratio_high)


def rising_by(rises: pd.DataFrame, params: Hydra) -> str:
    """By which test later sites are said to rise on the discovery half."""
    noise = f"by more than the model's noise of {params.floor:g} logits"
    if not untested(rises):
        return f"significantly on the discovery half (one-sided, familywise, {noise})"
    quads = int(in_halves(rises)[0][1]["quads"].max())
    return (
        f"on the discovery half by the test of sign flips alone (one-sided, familywise, {noise}): its {quads} quads "
        "are too few for an interval, so this picks what is looked at further, and shows of no site that it rises"
    )


def ending(rounds: Sequence[Round], params: Hydra) -> str:
    """What the search for backups comes to, and how large a backup it could have missed."""
    last = rounds[-1]
    rows = [row for one in rounds if len(one.tests) for row in one.tests[one.tests["backup"]].itertuples()]
    text, bounds = backups_in_words(rows), missed(last, params)
    if last.rises.empty:
        return f"{text} No other site comes after the slice, so none could stand in for it."
    if not bounds:
        return f"{text} There are too few quads to confirm a backup, or to rule one out."
    if rows:
        stopped = len(candidates(last.rises, params)) and last.tests.empty
        text += f" The limit of rounds ({params.rounds}) was reached." if stopped else " No further one after widening."
    if bounds[0]["share"] is None:
        text += (
            " Ablating the slice does not surely cost more than the model's noise, so there is little to stand in for."
        )
    first, *others = (f"{KINDS[one['component']]} whose cost rises by up to {size_of(one, params)}" for one in bounds)
    text += f" By the upper ends of intervals that hold for all later sites, the search could have missed {first}."
    return text + "".join(f" It could have missed {other}, too." for other in others)


def backups_in_words(rows: Sequence[Any]) -> str:
    """Which sites stand in for the slice, and which only cost more once it is gone."""
    backups, others = ([row.site for row in rows if bool(row.stands_in) == own] for own in (True, False))
    text = "No site at the last token outside the slice is shown to stand in for it."
    if backups:
        text = (
            f"{capital(sites(backups))} {'stand' if len(backups) > 1 else 'stands'} in for the slice when it is gone."
        )
    if others:
        does = "cost more once it is gone, but do" if len(others) > 1 else "costs more once it is gone, but does"
        text += f" {capital(sites(others))} {does} not stand in for it."
    return text


def size_of(bound: Mapping[str, Any], params: Hydra) -> str:
    """One of what was `missed`: logits, site and share; nothing smaller than the noise is told apart from it."""
    if bound["logits"] <= params.floor:
        return f"the model's noise ({params.floor:g} logits)"
    share = "" if bound["share"] is None else f"; {bound['share']:.0%} of what ablating the slice costs"
    return f"{bound['logits']:.2g} logits ({sites([bound['site']])}{share})"


def control_sentences(split: pd.DataFrame, params: Hydra) -> list[str]:
    """The random slices beside the slice, for each ablation."""
    out = []
    for ablation, rows in split.groupby("ablation", sort=False):
        own = {row.part: row for row in rows[rows["slice"] != "slice"].itertuples()}
        if own:
            real = rows[(rows["slice"] == "slice") & (rows["part"] == "total")].iloc[0]
            few = pd.isna(own["total"].low) or pd.isna(real["high"])
            apart = "there are too few quads to test that" if few else "that is not shown"
            apart = "so it is" if not few and own["total"].low - real["high"] > params.floor else apart
            out.append(
                f"Control (`{ablation}`): of random slices of the same make-up, clearly less was expected than of the "
                f"slice, and {apart}. They change logit_diff by {shown(own['total'])} logits, of which their own "
                f"direct effect is {shown(own['direct'])}."
            )
    return out


def necessity(frame: pd.DataFrame, params: Hydra) -> pd.DataFrame:
    """The slice's damage under each kind of ablation, confirmation half: `damage` and `ceiling` (text) of the gap, and,
    in `estimate`, as a share of the ceiling; `pairs` and `quads` of each kind. `judges`: the first class-neutral kind
    that both halves have."""
    own = reported(frame)
    slice_alone, whole = own[own["site_set"] == 0], own[own["site_set"] == 1]
    damage, limits = effects.damages(slice_alone, params), effects.damages(whole, params)
    out = effects.shares_of_ceiling(slice_alone, whole, params, ["site_set"]).drop(columns="site_set")
    both = set.intersection(*({*rows["ablation"]} for _, rows in in_halves(frame)))
    lead = next((kind for kind in NEUTRAL if kind in both), None)
    of_gap = {
        "damage": [str(damage[kind]) for kind in out["ablation"]],
        "ceiling": [str(limits[k]) for k in out["ablation"]],
    }
    sizes = slice_alone.groupby("ablation")[["pair_id", "quad_id"]].nunique().set_axis(["pairs", "quads"], axis=1)
    out = out.join(sizes, on="ablation")
    return out.assign(**of_gap, judges=out["ablation"] == lead)


def necessity_sentences(table: pd.DataFrame) -> list[str]:
    """Whether the slice is needed: as the judging ablation has it, and as the others have it."""

    judge, others = (list(table[table["judges"] == wanted].itertuples()) for wanted in (True, False))
    told = [
        f"Ablated as a whole by values that take no side (`{row.ablation}`), the slice takes away {of_row(row)} of "
        f"what the whole final residual stream does. In shares of the gap that is {row.damage}, against {row.ceiling}. "
        f"This is over {counted(row.pairs, 'pair')} of {counted(row.quads, 'quad')}; page 07 gives it over its own "
        "pairs, as a rule more of each quad."
        for row in judge
    ] or ["Whether the slice is needed is not testable: no class-neutral ablation has a ceiling above zero here."]
    cells = [(f"`{row.ablation}`", of_row(row), row.damage, row.ceiling) for row in others]
    columns = ("ablation", "share of the ceiling", "slice (share of the gap)", "ceiling (share of the gap)")
    lead = "Under the other ablations it takes away as follows; `counterfactual` is recovery in mirror pairs."
    return told + [f"{lead}\n\n{tabled(columns, cells)}"] * bool(cells)


def inside_sentences(tests: pd.DataFrame) -> list[str]:
    """Which members of the slice stand in for others."""
    if tests.empty:
        return []
    lead = "Each member of the slice was ablated alone, and together with those before it in the model"
    if tests["low"].isna().any():
        return [f"{lead}: there are too few quads to test whether one costs more once those are gone."]
    own = tests[tests["stands_in"] & tests["backup"]]
    if own.empty:
        most = tests["estimate"].max()
        return [
            f"No member is shown to stand in for others. {lead}: "
            f"the largest rise of a cost is {most:.3f} logits (no interval)."
        ]
    held = (
        f"{capital(sites(own['site']))} {'stands' if len(own) == 1 else 'stand'} in for other members, inside the slice"
    )
    return [f"{held}. {lead}."] + [
        f"{capital(sites([row.site]))} costs {interval(row.gone_estimate, row.gone_low, row.gone_high, 3)} logits once "
        f"the members before it are gone, and {row.alone_estimate:.3f} alone (no interval)."
        + f" It makes up for {share_of(row)} of what they would cost without."
        * (not np.isnan(row.ratio_estimate))
        for row in own.itertuples()
    ]


def findings(step: Step, rounds: Sequence[Round], needed: pd.DataFrame, inside: pd.DataFrame) -> dict[str, Any]:
    """The findings of step 05."""
    params, first, last = step.params, rounds[0], rounds[-1]
    split, ratios = split_table(first.frame, params), compensation(first.frame, params)
    spread = distribution(pair_ratios(first.frame, params), params)
    own = reported(changes(first.frame))
    residual = max(changes(one.frame)["residual"].abs().max() for one in rounds)
    taken = necessity(needed, params)
    needed_told = necessity_sentences(taken)
    within = inside_sentences(inside)
    end, compared = ending(rounds, params), split_sentences(split, ratios, spread, params)
    sentences = [
        f"The slice ({sites(effects.site_name(*site) for site in first.sites)}) was ablated as a whole at `last`; what "
        f"follows is about {counted(own['pair_id'].nunique(), 'pair')} of {counted(own['quad_id'].nunique(), 'quad')} "
        f"of the {own['half'].iloc[0]} half. In every pair the parts add up to the total change: the largest residual "
        f"is {residual:.1e} logits.",
        *needed_told,
        *compared,
        *control_sentences(split, params),
        *backup_sentences(rounds, params),
        *within,
        end,
    ]
    backups = [
        {"round": number} | row
        for number, one in enumerate(rounds)
        for row in (one.tests[one.tests["backup"]].to_dict("records") if len(one.tests) else [])
    ]
    found = {
        "model": about_model(step),
        "task": params.task,
        "able": True,
        "backups": backups,
        "inside": inside.to_dict("records"),
        "needed": taken.to_dict("records"),
        "widened_slice": [{"site": effects.site_name(*site), **site._asdict()} for site in last.sites],
        "compensation": reported(ratios).to_dict("records"),
        "per_pair": list(spread),
        "split": split.to_dict("records"),
        "rounds": rounds_table(rounds, params).to_dict("records"),
        "missed": missed(last, params),
        "largest_residual": residual,
        "sentences": sentences,
        "headline": [
            " ".join([end, *within[: len(within) > 1]]),
            needed_told[0],
            compared[0].partition(" In single pairs")[0],
        ],  # without the spread over single pairs
    }
    figures = {"split": split_figure(step, rounds)}
    if len(first.rises):
        figures["rises"] = ranked(step, rounds)
    return finished(step, found, figures, CAPTIONS)
