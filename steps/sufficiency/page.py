"""Step 04 on its page: which sites bring the answer back, and the critical slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from IPython.display import HTML, Markdown
from matplotlib.figure import Figure

from lib.effects import effect, gap, named, reported, significant
from lib.stats import Interval
from pipeline.params import Shared
from pipeline.step import Step
from report import interactive, plots, site_tables
from report.words import (
    about_model,
    capital,
    counted,
    ends_here,
    finished,
    heads_or_mlps,
    interval,
    listed,
    site_rows,
    sites,
    top_sites_sentence,
)
from steps.sufficiency import measure, placebo_page, stability_page
from steps.sufficiency.measure import Measured

CAPTIONS = {
    "slice": "Joint recovery and joint counterfactual damage as heads and MLPs are added in order of "
    "discovery recovery, both halves, studentised bootstrap intervals over quads.",
    "ranks": stability_page.CAPTION,
    "ranked": "The sites whose clean activation at the last token recovers most, picked on the discovery "
    "half, with their effect in both halves and intervals that hold for all sites together.",
    "placebo": placebo_page.CAPTION,
}


def restoring_sites(records: pd.DataFrame, sites: pd.DataFrame, params: Shared) -> list[str]:
    """Single heads and MLPs that restore the answer by the design's definition, on the confirmation half."""
    own = reported(records[records["component"].isin(["head", "mlp"])])
    out = []
    for row in reported(sites).itertuples():
        if row.component == "attn" or row.ratio_low is None or not row.ratio_low > params.restores_recovery:
            continue
        site = own[(own["layer"] == row.layer) & (own["component"] == row.component) & (own["head"] == row.head)]
        span = Interval(row.ratio, row.ratio_low, row.ratio_high, params.level, row.quads, "")
        if site_tables.restores(site, span, params.restores_share, params.restores_recovery):
            out.append(row.site)
    return out


def slice_restores(joint: pd.DataFrame, held: pd.DataFrame, params: Shared) -> dict[str, Any]:
    """Whether the slice restores the answer, by the same definition as a single site; confirmation half.

    `held` are the slice's rows of the curves. `share`: answered pairs in which the clean answer comes first, None
    without such pairs. `restores` is None where too few quads leave it open.
    """
    row = held[held["quantity"] == "recovery"].iloc[0]
    own = reported(joint)
    own = own[(own["direction"] == "denoise") & (own["site_set"] == row["site_set"])]
    span = Interval(row["estimate"], row["low"], row["high"], params.level, row["quads"], "")
    met = site_tables.restores(own, span, params.restores_share, params.restores_recovery)
    right = own[site_tables.answered(own)]
    back = int((right["metric_after"] > 0).sum())
    share = back / len(right) if len(right) else None
    return {"share": share, "pairs": len(right), "back": back, "restores": met}


def with_earlier(sites: pd.DataFrame, ablated: Sequence[dict]) -> pd.DataFrame:
    """Each site's rise when patched beside its fall when ablated in step 03, confirmation half."""
    fall = pd.DataFrame(ablated)[["site", "estimate"]].rename(columns={"estimate": "fall"})
    rise = reported(sites)[["site", "component", "estimate"]].rename(columns={"estimate": "rise"})
    return rise.merge(fall, on="site")


# --- figures ---


def heads(step: Step, m: Measured) -> Figure | Markdown:
    """Rise of logit_diff for every head, where heads were swept; dots where it is significant familywise."""
    if "head" not in step.params.components:
        return Markdown("Heads were not swept: `components` does not name them.")
    own = reported(m.sites)
    sure = site_tables.heads_matrix(own.assign(sure=significant(own, step.params)), "sure")
    return plots.heat_map(site_tables.heads_matrix(own), "rise of logit_diff (logits)", sure, layers=step.layers)


def site_map(step: Step, m: Measured) -> HTML:
    """What every site does, put back here and taken out in step 03, to be asked site by site and pair by pair."""
    rows = pd.DataFrame(site_rows(m.sites))
    shown = [interactive.SiteEffects("put back", "rises", rows, significant(rows, step.params))]
    if earlier := step.beside("necessity"):
        rows = pd.DataFrame(earlier["sites"])
        name = f"taken out ({earlier['ablation']}; step 03)"
        shown.append(interactive.SiteEffects(name, "falls", rows, significant(rows, step.params)))
    members = m.order["site"].head(m.critical.size) if m.critical else ()
    return interactive.site_map("fig-sufficiency-heads", shown, members, by_pair(step, m), step.params.level)


def by_pair(step: Step, m: Measured) -> pd.DataFrame:
    """What each site does in each pair, with the names and the answer of its prompts."""
    own = m.records[m.records["component"] != "resid"]
    asked = step.pairs()
    told = {}
    for side, word in (("clean", "answer"), ("corrupt", "corrupt_answer")):
        names = asked.reindex(columns=[f"{side}_{slot}" for slot in "abc"]).astype(object).fillna("")
        told[side] = [
            f"{listed(filter(None, row))} ({answer})" for *row, answer in names.assign(answer=asked[word]).values
        ]
    table = own[["pair_id", "half"]].assign(site=named(own), effect=effect(own), gap=gap(own))
    return table.merge(asked[["pair_id"]].assign(**told), on="pair_id")


def modules(step: Step, m: Measured) -> Figure:
    """Recovery of whole attention and MLP modules."""
    by_layer = site_tables.layer_table(m.records, step.params)
    return plots.layer_bars(by_layer, "recovery (share of the gap)", panel="position")


def ranked(m: Measured) -> Figure:
    """The leading sites with their effect in both halves."""
    return plots.ranked_sites(site_tables.picked(m.sites, 15), "rise of logit_diff (logits)")


def halves(m: Measured) -> Figure | None:
    """Every site, discovery against confirmation, where there are two halves."""
    return plots.halves(m.sites)


def against_necessity(step: Step, m: Measured) -> Figure | Markdown:
    """Every site's rise when patched against its fall when ablated, where step 03 has been run."""
    earlier = step.beside("necessity")
    if not earlier:
        return Markdown("Step 03 has left no findings of this run: there is nothing to set the rises against.")
    both = with_earlier(m.sites, earlier["sites"])
    named = site_tables.picked(m.sites, 6)["site"].drop_duplicates().tolist()
    return plots.agreement(
        both, "fall", "rise", "fall when ablated (logits)", "rise when patched (logits)", named=named
    )


def answer_and_foil(step: Step, m: Measured) -> Figure:
    """Change of the answer's and of the foil's logit at the leading sites."""
    names = site_tables.picked(m.sites, 10)["site"].drop_duplicates().tolist()
    candidates = step.metadata(measure.SITES)["candidates"]
    return plots.answer_and_foil(site_tables.answer_and_foil(m.records, names, candidates, step.params))


def slice_figure(step: Step, m: Measured) -> Figure:
    """Joint recovery and damage of the growing sets."""
    return plots.slice_curve(m.curves, step.params.slice_share, sites=m.order["site"].tolist())


def slice_builder(step: Step, m: Measured) -> HTML:
    """The same, for sets that a reader puts together, as far as they were measured."""
    order = m.order["site"].tolist()
    alone = m.sites[["site", "half"]].assign(**{end: m.sites[f"ratio{end}"] for end in ("", "_low", "_high")})
    alone = alone.rename(columns={"": "estimate", "_low": "low", "_high": "high"})
    sums = stability_page.additivity(m, step.params).query("quantity == @stability_page.SUM")
    growth = interactive.Growth(order, alone, m.curves, sums, stability_page.twos(m, step.params))
    size, reached = m.critical.size, bool(m.critical.reached)
    return interactive.slice_builder("fig-slice", growth, size, reached, step.params.slice_share)


# --- findings ---


def findings(step: Step, m: Measured) -> dict[str, Any]:
    """The findings of step 04: single sites, and the critical slice. Without one, the page ends here."""
    params = step.params
    if m.order.empty:
        ends_here(without_slice(step, m))
    restoring = restoring_sites(m.records, m.sites, params)
    held = reported(m.curves)
    held = held[held["n_sites"] == m.critical.size]
    together, stable = slice_restores(m.joint, held, params), stability_page.findings(m, params)
    alone = alone_sentence(m, restoring)
    leading = [top_sites_sentence(m.sites, params, 6, "recovery"), heads_or_mlps(m.sites, params, "recovery")]
    of_slice = [
        stable.pop("curve"),
        *slice_sentences(m, held, params),
        restores_sentence(together, params.restores_share),
    ]
    again, *added = stable.pop("sentences")
    placebo = placebo_page.findings(m.specificity, params)
    found = {
        "model": about_model(step),
        "task": params.task,
        "able": True,
        "sites": site_rows(m.sites),
        "restoring": restoring,
        "critical_slice": m.order[["site", "layer", "component", "head"]].head(m.critical.size).to_dict("records"),
        "critical_slice_reached": m.critical.reached,
        "slice_restores": together,
        "joint": held[["quantity", "estimate", "low", "high"]].to_dict("records"),
        **stable,
        **placebo,
        "sentences": [alone, *leading, *of_slice, again, *added, *placebo["sentences"]],
        "headline": [alone, *of_slice, again, *placebo["headline"]],
    }
    interactive.save(site_map(step, m), step.results / f"{step.name}.map.html", "Which parts bring the answer back?")
    figures = {
        "slice": slice_figure(step, m),
        "ranks": stability_page.ranks_figure(m, params),
        "ranked": ranked(m),
        "placebo": placebo_page.figure(m.specificity),
    }
    return finished(step, found, {name: own for name, own in figures.items() if own is not None}, CAPTIONS)


def without_slice(step: Step, m: Measured) -> dict[str, Any]:
    """The findings where no head or MLP recovers anything: `why` is what the later steps say."""
    params = step.params
    why = (
        "there is no critical slice: no head or MLP alone, its clean value put into the corrupt run at `last`, raises "
        f"logit_diff by more than the model's noise ({params.floor:g} logits) on the discovery half"
    )
    sentences = [f"{why[0].upper()}{why[1:]}.", top_sites_sentence(m.sites, params, 6, "recovery")]
    none: dict[str, Any] = {name: [] for name in ("restoring", "critical_slice", "joint", "specific")}
    none |= {"critical_slice_reached": False, "slice_restores": {"why": why}, "why": why}
    found = {"model": about_model(step), "task": params.task, "able": True, "sites": site_rows(m.sites), **none}
    found |= {"sentences": sentences, "headline": sentences[:1]}
    return finished(step, found, {"ranked": ranked(m)}, CAPTIONS)


def alone_sentence(m: Measured, restoring: Sequence[str]) -> str:
    """Which single heads and MLPs restore the answer, and what the first of the order recovers."""
    single = reported(m.sites[m.sites["component"].isin(["head", "mlp"])])
    first = single[single["site"] == m.order["site"].iloc[0]].iloc[0]
    if restoring:
        which = f"Single sites that restore the answer on their own: {sites(restoring)}"
    elif single["ratio_low"].isna().all():
        which = "There are too few quads to say of a single head or MLP that it restores the answer on its own"
    else:
        which = "No single head or MLP restores the answer on its own"
    share = interval(first["ratio"], first["ratio_low"], first["ratio_high"])
    leader = capital(sites([first["site"]]))
    return f"{which}. {leader}, first in order of discovery recovery, recovers {share} of the gap."


def two_orders(m: Measured) -> str:
    """Where the slice's order, by shares of the gap, leaves that of the leading sites, by logits; "" if nowhere."""
    size, single = m.critical.size, m.sites[m.sites["component"].isin(["head", "mlp"])]
    logits, shares = (list(dict.fromkeys(own["site"]))[:size] for own in (site_tables.picked(single, size), m.order))
    apart = [place for place in range(size) if logits[place] != shares[place]]
    if not apart:
        return ""
    place = apart[0]
    return (
        " This order goes by the share of the gap, sums over pairs; single sites are ranked by their rise in logits, "
        "mean over quads. The two are alike where every quad has as many pairs; here they part at place "
        f"{place + 1}: {sites([shares[place]])} by share, {sites([logits[place]])} by logits."
    )


def restores_sentence(together: Mapping[str, Any], share: float) -> str:
    """Whether the slice as a whole restores the answer."""
    words = {
        True: "The slice as a whole restores the answer",
        False: "The slice as a whole does not restore the answer",
        None: "Too few quads leave open whether the slice as a whole restores the answer",
    }
    if together["share"] is None:
        return (
            "No confirmation pair is answered rightly without a patch, so there is no answer for the slice to restore."
        )
    return (
        f"{words[together['restores']]}: with its clean values the clean answer comes first in {together['back']} of "
        f"the {together['pairs']} confirmation pairs whose clean prompt is answered rightly, and whose corrupt prompt "
        f"otherwise. By definition, as for single sites, a share of {share:g} is asked for, whatever its interval."
    )


def slice_sentences(m: Measured, held: pd.DataFrame, params: Shared) -> list[str]:
    """What the critical slice is, and what it does on the confirmation half (`held`: its rows there)."""
    critical, members = m.critical, m.order["site"].tolist()[: m.critical.size]
    joint = {row.quantity: interval(row.estimate, row.low, row.high) for row in held.itertuples()}
    reached = (
        f"reaches {params.slice_share:.0%} in both on the discovery half"
        if critical.reached
        else f"does not reach {params.slice_share:.0%} in both on the discovery half"
    )
    least = f" There its recovery is {critical.recovery:.2f} and its damage {critical.damage:.2f} (no intervals)."
    least *= not critical.reached
    return [
        "The critical slice, heads and MLPs added in order of discovery recovery, has "
        f"{counted(critical.size, 'site')} and {reached}: {sites(members)}.{least}{two_orders(m)}",
        f"On the confirmation half its joint recovery is {joint['recovery']} of the gap and its joint counterfactual "
        f"damage {joint['damage']}.",
    ]
