"""The verdict of step 07 and the sentences that state it, each built from the numbers in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from pipeline.step import Step
from report.words import about_model, interval, listed
from steps.generality.class_tests import Interaction
from steps.generality.controls_page import EXPECTATIONS
from steps.generality.measure import Generality
from steps.generality.rule import RuleResult

CAPTIONS = {
    "forest": "Joint damage and recovery of the critical slice by group of pairs, with 95% studentised bootstrap "
    "intervals over quads; hollow: fewer than 20 quads. Dashed: the floor of the verdict.",
    "left-out": "Circuits picked on the discovery pairs without a superset, tested on the confirmation pairs that this "
    "superset answers, beside the slice; 95% intervals over quads. Dashed: the floor of the verdict.",
    "controls": "Change of each candidate's logit, less the mean of all candidates, when the slice is ablated by the "
    "mean over ordinary prompts; intervals hold for a control's candidates together. Shaded: the margin of silence; "
    "dashed: the fall of the answer in ordinary prompts (random heads: when the slice's heads are ablated).",
    "rule": "What one name in either slot, and two names, add to the logit of their class, above the classes of "
    "neither name, with 95% intervals over prompts; lines: what each rule would make of it.",
}


class Tables(NamedTuple):
    """What the page has computed."""

    counts: Sequence[Mapping[str, Any]]  # per template
    mirrored: int  # pairs of the own template whose mirror is in the grid
    groups: pd.DataFrame
    sites: pd.DataFrame
    ranks: pd.DataFrame
    interaction: tuple[Interaction | None, pd.DataFrame, str]
    circuits: pd.DataFrame
    transfer: pd.DataFrame
    candidates: pd.DataFrame
    controls: pd.DataFrame
    leaders: pd.DataFrame
    rule: RuleResult | None


class Verdict(NamedTuple):
    """Whether the slice and the circuits picked without a class hold in every class."""

    verdict: str  # general, class-specific, not testable here
    tested: list[str]
    untested: list[str]  # classes with too few quads
    failing: pd.DataFrame


def decide(groups: pd.DataFrame, circuits: pd.DataFrame, params: Generality) -> Verdict:
    """General if in every superset with enough quads the lower ends of damage and recovery exceed the floor, for the
    slice and for the circuit picked without the superset; where there are no such circuits, for the slice alone."""
    own = groups[groups["kind"] == "superset"]
    tests = own.assign(superset=own["group"], circuit="the slice")
    if len(circuits):
        held_out = circuits[circuits["kind"] == "without"].assign(circuit="the circuit picked without it")
        tests = pd.concat([tests, held_out], ignore_index=True)
    enough = own.groupby("group", sort=False)["low"].agg(lambda low: low.notna().all())
    tested, untested = enough.index[enough].tolist(), enough.index[~enough].tolist()
    failing = tests[tests["superset"].isin(tested) & ~(tests["low"] > params.general_floor)]
    verdict = "not testable here" if not tested else "class-specific" if len(failing) else "general"
    return Verdict(verdict, tested, untested, failing)


def value(row: Any) -> str:
    """A row's estimate with its interval."""
    return "not measured" if pd.isna(row.estimate) else interval(row.estimate, row.low, row.high)


def each(rows: pd.DataFrame, name: str = "group") -> str:
    """Every row's name with its value."""
    return listed(f"{getattr(row, name)} {value(row)}" for row in rows.itertuples())


def quantities(rows: pd.DataFrame) -> str:
    """ "damage is 0.8 [0.7, 0.9] and recovery is ..." of the rows of one group."""
    return listed(f"{row.quantity} is {value(row)}" for row in rows.itertuples())


def of_kind(groups: pd.DataFrame, kind: str, quantity: str | None = None) -> pd.DataFrame:
    rows = groups[groups["kind"] == kind]
    return rows if quantity is None else rows[rows["quantity"] == quantity]


def grid_sentences(tables: Tables) -> list[str]:
    """What is in the grid, and what was left out of it."""
    first, *others = tables.counts
    professions, supersets = (of_kind(tables.groups, kind, "damage") for kind in ("profession", "supersets"))
    same = ": over all pairs damage and recovery are read from nearly the same runs, by superset they are not"
    out = [
        f"The grid has {first['left']} pairs of {first['quads']} quads in `{first['template']}`, with "
        f"{len(professions)} professions and {len(supersets)} ordered pairs of supersets. {tables.mirrored} of these "
        f"pairs have their mirror in the grid{same if tables.mirrored > first['left'] / 2 else ''}."
    ]
    for count in others:
        why = f" (the first that does not: {count['why']})" if count["why"] else ""
        out.append(
            f"In `{count['template']}`, never used for picking, {count['aligned']} of {count['possible']} pairs line "
            f"up token by token{why}; of {count['asked']} asked, {count['left']} in {count['quads']} quads are solved "
            "and used."
        )
    return out


def group_sentences(tables: Tables) -> list[str]:
    """The slice by superset, profession, template, order of the names."""
    groups = tables.groups
    out = [f"Over all pairs, jointly, the slice's {quantities(of_kind(groups, 'all'))}."]
    for quantity in ("damage", "recovery"):
        rows = of_kind(groups, "superset", quantity).sort_values("estimate")
        out.append(f"By superset, joint {quantity} is {each(rows)}.")
    others = of_kind(groups, "template").query("group != @tables.counts[0]['template']")
    for name, rows in others.groupby("group", sort=False):
        out.append(f"In `{name}`, jointly, its {quantities(rows)} ({rows['quads'].max()} quads).")
    for kind in ("two names", "order"):
        rows = of_kind(groups, kind, "damage")
        if len(rows) > 1:
            out.append(f"Joint damage by {kind}: {each(rows)}.")
    rows = of_kind(groups, "profession", "damage")
    sure = rows[rows["low"].notna()].sort_values("estimate")
    if len(rows):
        text = (
            f"{len(rows) - len(sure)} of {len(rows)} professions are in fewer than 20 quads: estimates without interval"
        )
        if len(sure):
            ends = sure.iloc[[0, -1]] if len(sure) > 1 else sure
            ends = " to ".join(f"{row.group} {value(row)}" for row in ends.itertuples())
            text += f"; among the others joint damage runs from {ends}"
        out.append(f"{text}.")
    return out


def same_sites_sentences(tables: Tables, params: Generality) -> list[str]:
    """Ranks between classes, and class x site interaction."""
    out, ranks = [], tables.ranks
    if len(ranks):
        within = ranks[ranks["class_a"] == ranks["class_b"]]
        between = ranks[ranks["class_a"] != ranks["class_b"]].sort_values("estimate")
        ends = [f"{row.class_a} and {row.class_b} {value(row)}" for row in between.iloc[[0, -1]].itertuples()]
        out.append(
            f"Ranked by their damage, the heads of two supersets correlate (Spearman) between {' and '.join(ends)}. "
            f"Between halves of two supersets the mean correlation is {between['halves'].mean():.2f}, between halves "
            f"of one superset {within['halves'].mean():.2f}: the most that noise leaves."
        )
    test, sites, why = tables.interaction
    if test is None:
        return [*out, f"Class x site interaction was not tested: {why}."]
    sure = sites[sites["sure"]]
    some = listed(
        f"{row.site} (most in {row.most}, by {row.spread:.2f} of the gap)" for row in sure.head(6).itertuples()
    )
    lead = "" if sure.empty else f", led by {some}"
    out.append(
        f"Class x site interaction (labels of whole quads permuted): p = {test.p_overall:.4f} over the "
        f"{len(sites)} sites of the slice; {len(sure)} of them differ between supersets familywise{lead}."
    )
    return out


def circuit_sentences(tables: Tables, verdict: Verdict) -> list[str]:
    """Circuits picked without a class, and on one alone."""
    circuits = tables.circuits
    if circuits.empty:
        return ["No circuits were picked class by class: step 04's table of single sites is not in the results."]
    held_out = [
        f"{name} {value(rows.iloc[0])} and {value(rows.iloc[1])}"
        if rows["size"].iloc[0]
        else f"{name}: none could be picked"
        for name, rows in circuits[circuits["kind"] == "without"].groupby("superset", sort=False)
    ]
    out = [
        "Picked on the discovery pairs without a superset and tested on the confirmation pairs that it answers, "
        f"circuits have joint damage and recovery: {'; '.join(held_out)}."
    ]
    own = circuits[(circuits["kind"] == "only") & (circuits["quantity"] == "damage")]
    shared = listed(f"{row.superset} {row.overlap:.2f} ({row.size} sites)" for row in own.itertuples() if row.size)
    out.append(f"Circuits picked on one superset alone share with the slice, of the sites in either: {shared}.")
    if verdict.verdict == "class-specific":
        out += [f"The circuit of {row.superset}: {row.sites}." for row in own.itertuples() if row.size]
    return out


def verdict_sentence(verdict: Verdict, tables: Tables, params: Generality) -> str:
    """The verdict by the profile's rule, and beside it whether the sites' shares differ between classes."""
    floor, (test, sites, _) = f"{params.general_floor:g}", tables.interaction
    few = f" Too few quads for an interval: {listed(verdict.untested)}." if verdict.untested else ""
    alone = " (circuits picked without a class were not there to test)" if tables.circuits.empty else ""
    if verdict.verdict == "not testable here":
        return f"Whether the circuit is general cannot be tested here: no superset has enough quads.{few}"
    if verdict.verdict == "class-specific":
        fails = [
            f"{row.circuit} in {row.superset} ({row.quantity} {value(row)})" for row in verdict.failing.itertuples()
        ]
        return f"Verdict: class-specific. The lower end does not exceed {floor} for {listed(fails)}{alone}.{few}"
    shares = ""
    if test is not None and test.p_overall <= 1 - params.level:
        shares = (
            f" General does not mean equal: the shares of {int(sites['sure'].sum())} sites differ between supersets."
        )
    return (
        f"Verdict: general. In {listed(verdict.tested)} the lower ends of joint damage and recovery exceed {floor}, "
        f"for the slice and for the circuit picked without the superset{alone}.{shares}{few}"
    )


def control_sentences(tables: Tables, params: Generality) -> list[str]:
    """Every control against its expectation, by the scoring and ablation that decide; the others beside."""
    if tables.controls.empty:
        return [
            "The controls were not run: no ordinary prompt has another quad of its token counts to take a mean from."
        ]
    lead, *_ = tables.controls.to_dict("records")
    out = [
        f"Ablated by `{lead['ablation']}`, the slice takes {lead['fall']:.2f} logits from the ordinary answer, against "
        f"the candidates' mean; the margin of silence is {params.silence_margin:.0%} of that, "
        f"{params.silence_margin * lead['fall']:.2f}."
    ]
    for control, expected in EXPECTATIONS.items():
        own = tables.controls[tables.controls["control"] == control]
        if own.empty:
            out.append(f"Control {control}: not run, there were no prompts or heads for it.")
            continue
        first = own.iloc[0]
        met = {True: "met", False: "not met"}.get(first["met"], "not decided")
        beside = listed(f"{row.scoring} under `{row.ablation}`: {row.verdict}" for row in own.iloc[1:].itertuples())
        rows = tables.candidates[tables.candidates["control"] == control].head(first["candidates"])
        few = ", too few for a test" if rows["low"].isna().any() else ""
        far = rows.loc[rows["estimate"].abs().idxmax()]
        out.append(
            f"Control {control} ({first['prompts']} prompts{few}; expected: {expected}): {first['verdict']}, "
            f"expectation {met}; the largest change is that of {far['candidate']}, {value(far)} logits. Beside that, "
            f"{beside}."
        )
    falls = listed(f"{value(row)} ({row.control})" for row in tables.leaders.itertuples())
    out.append(
        "By name, a control's candidates can rise in one prompt and fall in the next. The candidate that leads a "
        f"prompt before the ablation falls, against the candidates' mean, by {falls} logits."
    )
    return out


def rule_sentences(rule: RuleResult | None) -> list[str]:
    """Which rule fits."""
    if rule is None:
        return ["The rule was not read: too few known people."]
    terms = rule.fitted.set_index("term")
    shown = {name: value(next(terms.loc[[name]].itertuples())) for name in terms.index}
    out = [
        f"On {rule.prompts} prompts of two known people, one name in a class raises its logit by {shown['one name']} "
        f"above the classes of neither name (first slot {shown['first slot']}, second {shown['second slot']}), two "
        f"names by {shown['two names']}."
    ]
    if rule.ratio is not None:
        ratio = interval(rule.ratio.estimate, rule.ratio.low, rule.ratio.high)
        out.append(f"The second name's step is {ratio} of the first's (1: additive; 0: OR).")
    for basis, verdict in rule.verdict.items():
        what = "the number of names" if basis == "number" else "what each name says alone"
        if verdict is None:
            out.append(f"By {what}, no rule is decided: {rule.reason}.")
            continue
        own = rule.errors[rule.errors["basis"] == basis].set_index("rule")
        explained = listed(f"{name} {own.loc[name, 'explained']:.1%}" for name in ("additive", "OR", "AND", "free"))
        passing = [name for name in rule.fitting[basis] if name != verdict]
        words = {"neither": "each of the three rules is worse than free", "none": "nothing beats class priors"}
        out.append(
            f"By {what}, cross-validated over people, {words.get(verdict, f'{verdict} fits')}; of the error that class "
            f"priors leave, {explained} are explained"
            + (f"; not significantly worse than free either: {listed(passing)}." if passing else ".")
        )
    return out


def generality(step: Step, tables: Tables) -> dict[str, Any]:
    """The findings of step 07."""
    params = step.params
    verdict = decide(tables.groups, tables.circuits, params)
    spoken = verdict_sentence(verdict, tables, params)
    controls, rule = control_sentences(tables, params), rule_sentences(tables.rule)
    test, sites, why = tables.interaction
    sentences = [
        *grid_sentences(tables),
        *group_sentences(tables),
        *same_sites_sentences(tables, params),
        *circuit_sentences(tables, verdict),
        spoken,
        *controls,
        *rule,
    ]
    met = first_verdicts(tables.controls)
    kept, missed = ([name for name, good in met.items() if (good is True) == wanted] for wanted in (True, False))
    headline = [spoken]
    if kept or missed:
        headline.append(f"Controls as expected: {listed(kept)}; not, or not decided: {listed(missed)}.")
    return {
        "model": about_model(step),
        "task": params.task,
        "able": True,
        "verdict": verdict.verdict,
        "failing": verdict.failing[["superset", "circuit", "quantity", "estimate", "low", "high"]].to_dict("records"),
        "untested": verdict.untested,
        "grid": list(tables.counts),
        "classes": tables.groups.to_dict("records"),
        "sites": tables.sites.to_dict("records"),
        "ranks": tables.ranks.to_dict("records"),
        "interaction": {"p": test.p_overall, "sites": sites.head(20).to_dict("records")} if test else {"why": why},
        "leave_one_out": tables.circuits[tables.circuits["kind"] == "without"].to_dict("records")
        if len(tables.circuits)
        else [],
        "circuits": tables.circuits[tables.circuits["kind"] == "only"].to_dict("records")
        if len(tables.circuits)
        else [],
        "transfer": tables.transfer.to_dict("records"),
        "controls": tables.controls.to_dict("records"),
        "leaders": tables.leaders.to_dict("records"),
        "rule": None if tables.rule is None else rule_numbers(tables.rule),
        "sentences": sentences,
        "headline": [*headline, *rule[:1], *rule[2:3]],
    }


def first_verdicts(controls: pd.DataFrame) -> dict[str, bool | None]:
    """Whether each control's expectation is met, by the scoring and ablation that decide."""
    if controls.empty:
        return {}
    first = controls.drop_duplicates("control").set_index("control")["met"]
    return {name: first[name] for name in EXPECTATIONS if name in first}


def rule_numbers(rule: RuleResult) -> dict[str, Any]:
    """The rule's result as findings take it."""
    return {
        "verdict": rule.verdict,
        "fitting": rule.fitting,
        "errors": rule.errors.to_dict("records"),
        "fitted": rule.fitted.to_dict("records"),
        "ratio": rule.ratio,
        "prompts": rule.prompts,
        "reason": rule.reason,
    }
