"""Step 07 on its page: effects class by class, circuits tested on classes they were not picked on, and the verdict.

1. `groups` puts damage and recovery of the slice side by side for every superset, profession, template and order.
   Damage is under a class-neutral ablation, as a share of its ceiling; the counterfactual one stands beside.
2. `ranks` and `interaction` ask whether the same sites carry every class, and equally.
3. `circuit_table` and `transfer` test circuits picked without a superset, or on it alone.
4. `decide` gives the verdict; every sentence is built from the numbers in it. Controls: `controls_page`; placebo:
   `placebo_page`; the rule: `name_rule`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from lib import effects, stats
from lib.effects import SITE, quad_matrix, site_name
from lib.questions import Question
from pipeline.params import Shared
from pipeline.step import Step
from report import plots, site_tables, words
from report.words import about_model, finished, listed, of_row, shown, with_ends
from steps.generality import class_tests, controls_page, name_rule, placebo, placebo_page
from steps.generality.class_circuits import Circuit
from steps.generality.class_tests import Interaction
from steps.generality.measure import WHOLE, Measured
from steps.generality.name_rule import RuleResult

CAPTIONS = {
    "forest": "Joint recovery of the critical slice by group of pairs (share of the gap), its damage under a "
    "class-neutral ablation (share of what the whole final residual stream takes away), and its counterfactual damage. "
    "Studentised bootstrap intervals over quads; hollow: fewer than 20 quads. At the right the number of quads, in "
    "the order of the legend where it differs. Dashed: the floor of the verdict.",
    "left-out": "Circuits picked on the discovery pairs without a superset, tested on the confirmation pairs that this "
    "superset answers, beside the slice; intervals over quads. Dashed: the floor of the verdict.",
    "controls": "Change of each candidate's logit, less the mean of all candidates, when the slice is ablated by the "
    "mean over ordinary prompts; intervals hold for a control's candidates together. Shaded: the margin of silence; "
    "dashed: the fall of the answer in ordinary prompts (random heads: when the slice's heads are ablated).",
    "rule": "What one name in either slot, and two names, add to the logit of their class, above the classes of "
    "neither name, with intervals over prompts; lines: what each rule would make of it.",
    "placebo": placebo_page.CAPTION,
}
NO_RULE = name_rule.sentences(None)["steps"]
SHARE = "joint effect (share of the gap, or of the ceiling)"
JUDGED, MIRRORED = ("damage", "recovery"), "counterfactual damage"
EVERY, NOT_EVERY, UNTESTABLE = "every superset", "not shown for every superset", "not testable here"
UNSELECTED = "before any selection"
COARSE = 0.5  # a class that has so much more of a site than others, the test of interaction must be able to find
SELECTIONS = ("selection", "answers", "matching")  # kinds of groups that say how pairs were selected


class Tables(NamedTuple):
    """What the page computes from what was measured."""

    groups: pd.DataFrame
    sites: pd.DataFrame
    heads: Mapping[str, effects.QuadMatrix]
    ranks: pd.DataFrame
    interaction: tuple[Interaction | None, pd.DataFrame, str]
    circuits: pd.DataFrame
    transfer: pd.DataFrame
    specific: pd.DataFrame
    candidates: pd.DataFrame
    controls: pd.DataFrame
    leaders: pd.DataFrame
    rule: RuleResult | None


def tables(step: Step, m: Measured) -> Tables:
    """Everything that the page's figures and sentences are made of."""
    p, joint, alone = step.params, with_pairs(m.joint, m.grid), with_pairs(m.sites, m.grid)
    sets = numbered(m)
    heads = class_matrices(alone[alone["component"] == "head"], p.topic.supersets)
    candidates, verdicts, leaders = controls_page.tables(m, p)
    tested, moved = circuit_table(joint, m.circuits, m.slice, p), transfer(joint, m.circuits, p)
    by_group, by_site = groups(joint, p), site_effects(joint, behind(sets), m.slice, p)
    if len(m.unselected):
        before = pd.DataFrame(both_ways(m.unselected, p, kind="selection", group=UNSELECTED))
        by_group = pd.concat([by_group, before[before["quantity"] == "recovery"]], ignore_index=True)
    same, shares = ranks(heads, p), interaction(alone, m.slice, p)
    rule = name_rule.compare(m.people, p) if m.people["prompt"].nunique() > 1 else None
    specific = placebo_page.specificity(joint, m.placebo, sets, p)
    return Tables(by_group, by_site, heads, same, shares, tested, moved, specific, candidates, verdicts, leaders, rule)


def numbered(m: Measured) -> dict[str, list[int]]:
    """The places of sets in the grid's tables: of the slice, of the circuit picked without each superset (under its
    name), of the circuits picked on one alone, of random sets."""
    picked = [circuit for circuit in m.circuits if circuit.sites]
    out = {placebo.SLICE: [0], "only": []}
    for place, circuit in enumerate(picked, 1):
        out.setdefault(circuit.superset if circuit.kind == "without" else "only", []).append(place)
    place = 1 + len(picked)
    for name, count in m.random.items():
        out[name], place = [*range(place, place + count)], place + count
    return out


def behind(sets: Mapping[str, Sequence[int]]) -> int:
    """The place of the first single site: behind all of `numbered`, some of which may be empty."""
    return max(place for places in sets.values() for place in places) + 1


def with_pairs(frame: pd.DataFrame, grid: pd.DataFrame) -> pd.DataFrame:
    """Records of the grid with what its table says of their pairs; `own`: in the profile's template."""
    known = ["answer", "corrupt_answer", "order", "clean_profession_a", "clean_profession_b", "solved", "matched"]
    own = frame["template"] == grid["template"].iloc[0]
    return frame.join(grid.set_index("pair_id").reindex(columns=known), on="pair_id").assign(own=own)


def divided(frame: pd.DataFrame, topic: Question) -> dict[str, dict[str, pd.DataFrame]]:
    """Records in every group of pairs, by kind of group and by group.

    Groups are of the profile's own template, except those of `template`. A pair is of the superset that its clean names
    are in, of each of their professions, and of "one profession" or "two professions".
    """
    own = frame[frame["own"]]
    a, b = own["clean_profession_a"], own["clean_profession_b"]
    both = pd.Series(np.where(a == b, "one profession", "two professions"), own.index)
    matching = {True: f"matched in {listed(topic.match)}", False: "not matched"}
    labels = {
        "superset": own["answer"],
        "two names": both.where((a != "") & (b != "")),
        "order": own["order"].where(own["order"] != ""),
        "supersets": own["answer"] + " / " + own["corrupt_answer"],
        "answers": own["solved"].map({True: "solved", False: "not solved"}),
        "matching": own["matched"].map(matching if topic.match else {}),
    }
    out = {"all": {"all pairs": own}, "template": dict(list(frame.groupby("template", sort=False)))}
    out |= {kind: dict(list(own.groupby(label))) for kind, label in labels.items()}
    out["superset"] = {name: out["superset"][name] for name in topic.supersets if name in out["superset"]}
    return out | {"profession": {name: own[(a == name) | (b == name)] for name in sorted({*a, *b} - {""})}}


def both_ways(rows: pd.DataFrame, params: Shared, **about: Any) -> list[dict[str, Any]]:
    """What one set of sites does in some pairs, as rows of a table: ratios of sums, with intervals over quads.

    `recovery` and `counterfactual damage` are shares of the gap; `damage`, under the class-neutral ablation that
    judges, is a share of what that takes away from the whole final residual stream (the set `WHOLE`). NaN where what
    they are a share of is not above 0, or there are no rows.
    """
    noise, counterfactual = rows["direction"] == "noise", rows["ablation"] == "counterfactual"
    ceiling, out = rows[noise & (rows["site_set"] == WHOLE)], []
    kinds = {"damage": noise & ~counterfactual & (rows["site_set"] != WHOLE), "recovery": ~noise}
    for quantity, chosen in (kinds | {MIRRORED: noise & counterfactual}).items():
        own, found = rows[chosen], pd.DataFrame()
        if quantity == "damage" and len(own):
            found = effects.shares_of_ceiling(own, ceiling, params, [])
        elif effects.gap(own).sum() > 0 and effects.is_loss(effects.quad_matrix(own, "gap", []).values[:, 0], params):
            found = effects.curve(own, params, by=[])
        ends = dict.fromkeys(("estimate", "low", "high"), np.nan)
        if len(found):
            ends = {key: np.nan if found[key].iloc[0] is None else float(found[key].iloc[0]) for key in ends}
        sizes = {"pairs": own["pair_id"].nunique(), "quads": own["quad_id"].nunique()}
        out.append(about | {"quantity": quantity} | ends | sizes)
    return out


def groups(frame: pd.DataFrame, params: Shared) -> pd.DataFrame:
    """The slice (`site_set` 0) in every group of pairs: `kind`, `group`, `quantity`, as in `both_ways`."""
    out = []
    for kind, parts in divided(frame[frame["site_set"].isin([0, WHOLE])], params.topic).items():
        for group, rows in parts.items():
            out += both_ways(rows, params, kind=kind, group=group)
    return pd.DataFrame(out)


def site_effects(frame: pd.DataFrame, first: int, sites: Sequence, params: Shared) -> pd.DataFrame:
    """Counterfactual damage and recovery of single sites (sets `first`, `first` + 1, ...) by superset and template."""
    parts, out = divided(frame[frame["site_set"] >= first], params.topic), []
    for kind in ("superset", "template"):
        for group, rows in parts[kind].items():
            for number, own in rows.groupby("site_set"):
                out += both_ways(own, params, kind=kind, group=group, site=site_name(*sites[number - first]))
    return pd.DataFrame([row for row in out if row["quantity"] != "damage"])


def class_matrices(
    frame: pd.DataFrame, supersets: Sequence[str], value: str = "effect", reduce: str = "mean"
) -> dict[str, effects.QuadMatrix]:
    """Each superset's counterfactual effects as quads x sites, over the pairs that it answers."""
    parts = dict(list(frame[frame["direction"] == "noise"].groupby("answer")))
    return {name: quad_matrix(parts[name], value, SITE, reduce) for name in supersets if name in parts}


def ranks(heads: Mapping[str, effects.QuadMatrix], params: Shared) -> pd.DataFrame:
    """How alike two supersets rank the heads (`class_tests.between_classes`); no rows with fewer than two of them."""
    enough = {name: matrix.values for name, matrix in heads.items() if len(matrix.values) > 1}
    return class_tests.between_classes(enough, params) if len(enough) > 1 else pd.DataFrame()


def interaction(
    frame: pd.DataFrame, slice_sites: Sequence, params: Shared
) -> tuple[Interaction | None, pd.DataFrame, str]:
    """The test of class x site interaction over the slice's sites; its sites' `p`; why there is none, else "".

    Only these: hundreds of sites whose effects are next to nothing, but for a few quads, break the test's level. A test
    that finds nothing, and would have missed a class that has `COARSE` more or less of a site, is none.
    """
    frame = frame[pd.MultiIndex.from_frame(frame[SITE]).isin([tuple(site) for site in slice_sites])]
    if len(frame.groupby(SITE)) < 2:
        return None, pd.DataFrame(), "fewer than two sites of the slice were swept one by one"
    keys, noise = ["quad_id", "answer", "corrupt_answer"], frame[frame["direction"] == "noise"]
    noise = noise.assign(effect=effects.effect(noise), gap=effects.gap(noise))
    sums = noise.groupby([*keys, *SITE])[["effect", "gap"]].sum().unstack(SITE)
    sums = well_covered(sums[sums["gap"].iloc[:, 0].groupby(level="quad_id").transform("sum") > 0])
    if why := untestable(sums.index):
        return None, pd.DataFrame(), why
    quads, *meetings = (sums.index.get_level_values(key) for key in keys)
    test = class_tests.interaction(
        sums["effect"].to_numpy(), sums["gap"].iloc[:, 0], list(zip(*meetings, strict=True)), quads, params
    )
    sites = sums["effect"].columns.to_frame(index=False)
    shares, sure = test.shares.to_numpy(), test.p <= 1 - params.level
    if not sure.any() and test.p_overall > 1 - params.level and test.resolution > COARSE:
        times, used = (test.resolution / COARSE) ** 2, quads.nunique()
        why = (
            f"in {used} quads, a superset that has {COARSE:g} more or less of a site than the others could be missed; "
            f"it would take about {used * times:.0f}"
        )
        return None, pd.DataFrame(), why
    table = sites.assign(site=effects.named(sites), p=test.p, sure=sure, spread=np.ptp(shares, axis=0))
    table["most"] = test.shares.index[shares.argmax(0)]
    return test, table.sort_values(["sure", "spread"], ascending=False), ""


def well_covered(units: pd.DataFrame) -> pd.DataFrame:
    """The units of quads whose supersets are all in `class_tests.MINIMUM_QUADS` of them; all where none is."""
    left = units
    while len(left):
        few = [name for name, count in quads_in(left.index).items() if count < class_tests.MINIMUM_QUADS]
        if not few:
            return left
        ends = left.index.to_frame()[["answer", "corrupt_answer"]].isin(few).any(axis=1)
        left = left[~ends.groupby(level="quad_id").transform("any")]
    return units


def quads_in(units: pd.MultiIndex) -> pd.Series:
    """In how many quads each superset is, most first."""
    table = units.to_frame(index=False)
    ends = pd.concat(
        [table[["quad_id", end]].set_axis(["quad_id", "superset"], axis=1) for end in ("answer", "corrupt_answer")]
    )
    return ends.drop_duplicates()["superset"].value_counts()


def untestable(units: pd.MultiIndex) -> str:
    """Why sites' shares cannot be compared between supersets, in words; "" if they can. `units` are quads by answer and
    corrupt answer."""
    counts, least = quads_in(units), class_tests.MINIMUM_QUADS
    if counts.empty:
        return "no pair has a gap above zero to take shares of"
    if (counts < least).any():
        there = listed(f"{name} in {count}" for name, count in counts.head(3).items())
        return f"it takes three supersets that are each in {least} quads or more, and the best covered are {there}"
    quads, *meetings = (units.get_level_values(key) for key in ("quad_id", "answer", "corrupt_answer"))
    if not class_tests.determined(list(zip(*meetings, strict=True)), quads):
        return (
            f"{listed(counts.index)} meet so that what a site does for one cannot be told from what it does for another"
        )
    used = quads.nunique()
    return f"{used} quads are too few ({stats.MINIMUM_CLUSTERS} are needed)" if stats.too_few(used) else ""


def records_of(frame: pd.DataFrame, circuits: Sequence[Circuit]) -> list[tuple[Circuit, pd.DataFrame]]:
    """Each circuit with its records in the profile's template: those with sites are sets 1, 2, ..."""
    own, number, out = frame[frame["own"]], 0, []
    for circuit in circuits:
        number += bool(circuit.sites)
        out.append((circuit, own[own["site_set"].isin([number, WHOLE])] if circuit.sites else own.head(0)))
    return out


def circuit_table(frame: pd.DataFrame, circuits: Sequence[Circuit], sites: Sequence, params: Shared) -> pd.DataFrame:
    """Each circuit on the pairs that its superset answers: without a superset, that is a test on the class held out.

    A row for each quantity of `both_ways`. `overlap` is with the critical slice `sites`, as a share of the sites in
    either. A circuit that could not be picked keeps its rows.
    """
    out = []
    for circuit, rows in records_of(frame, circuits):
        about = {"kind": circuit.kind, "superset": circuit.superset, "picked_on": len(circuit.pairs)}
        about |= {"size": len(circuit.sites), "sites": ", ".join(site_name(*site) for site in circuit.sites)}
        about |= {"overlap": site_tables.jaccard(circuit.sites, sites), "reached": circuit.reached}
        out += both_ways(rows[rows["answer"] == circuit.superset], params, **about)
    return pd.DataFrame(out)


def transfer(frame: pd.DataFrame, circuits: Sequence[Circuit], params: Shared) -> pd.DataFrame:
    """Every superset's own circuit (and, first, the slice) on every superset's pairs: `picked_on`, `tested_on`, ..."""
    sets = {"the slice": frame[frame["own"] & frame["site_set"].isin([0, WHOLE])]}
    sets |= {own.superset: rows for own, rows in records_of(frame, circuits) if own.kind == "only" and own.sites}
    out = []
    for picked_on, rows in sets.items():
        parts = dict(list(rows.groupby("answer")))
        for name in (name for name in params.topic.supersets if name in parts):
            out += both_ways(parts[name], params, picked_on=picked_on, tested_on=name)
    return pd.DataFrame(out)


def counted(m: Measured) -> pd.DataFrame:
    """How many pairs of each template could be made, line up, were asked and are left."""
    return pd.DataFrame(m.counts).set_index("template")[["possible", "aligned", "asked", "left", "quads"]]


def forest(step: Step, rows: pd.DataFrame) -> Figure | None:
    """Joint effects with the floor of the verdict, where there are any."""
    return plots.forest(rows, SHARE, lines=[step.params.general_floor]) if len(rows) else None


def by_group(
    step: Step,
    t: Tables,
    kinds: Sequence[str] = ("all", "selection", "answers", "matching", "template", "superset", "two names", "order"),
) -> Figure | None:
    """The slice by groups of pairs of some kinds."""
    return forest(step, t.groups[t.groups["kind"].isin(kinds)])


def squares(rows: pd.DataFrame, by: str, index: str, columns: str) -> dict[str, pd.DataFrame]:
    """Estimates as a table for each value of `by`, all in the order of the rows."""
    return {
        name: own.pivot(index=index, columns=columns, values="estimate").loc[own[index].unique(), own[columns].unique()]
        for name, own in rows.groupby(by, sort=False)
    }


def site_figure(t: Tables) -> Figure:
    """Counterfactual damage of each site of the slice alone, by superset and by template."""
    rows = t.sites[t.sites["quantity"] == MIRRORED]
    panels = squares(rows, "kind", "site", "group")
    return plots.class_matrices(panels, f"{MIRRORED} (share of the gap)", limit=rows["estimate"].max())


def site_table(t: Tables) -> pd.DataFrame:
    """Recovery and counterfactual damage of each site of the slice by superset, with intervals."""
    rows = t.sites[t.sites["kind"] == "superset"]
    rows = rows.assign(effect=[of_row(row) for row in rows.itertuples()])
    return rows.pivot(index=["quantity", "site"], columns="group", values="effect").fillna("not measured")


def heads(step: Step, t: Tables) -> Figure:
    """Every head's mean damage, by superset."""
    means = {name: matrix.sites.assign(estimate=matrix.values.mean(0)) for name, matrix in t.heads.items()}
    panels = {name: site_tables.heads_matrix(table) for name, table in means.items()}
    return plots.heat_map(panels, "fall of logit_diff (logits)", layers=step.layers)


def rank_figure(t: Tables) -> Figure | None:
    """Agreement of halves of two supersets, where there are two."""
    if t.ranks.empty:
        return None
    both = pd.concat([t.ranks, t.ranks.rename(columns={"class_a": "class_b", "class_b": "class_a"})])
    names = list(dict.fromkeys(t.ranks["class_a"]))
    square = both.drop_duplicates(["class_a", "class_b"]).pivot(index="class_a", columns="class_b", values="halves")
    return plots.class_matrices({"": square.loc[names, names]}, "Spearman correlation")


def interaction_table(t: Tables) -> pd.DataFrame | Markdown | None:
    """The sites whose shares differ most between supersets, or why that was not tested."""
    _, sites, why = t.interaction
    return shown(sites.head(10), 4, why)


def circuits(t: Tables) -> pd.DataFrame | Markdown | None:
    """The circuits picked class by class, a row each."""
    if t.circuits.empty:
        return shown(t.circuits, 2, "Step 04's table of single sites is not in the results.")
    effects = {name: [of_row(row) for row in rows.itertuples()] for name, rows in t.circuits.groupby("quantity")}
    rows = t.circuits.drop_duplicates(["superset", "kind"]).set_index(["superset", "kind"])
    rows = rows[["picked_on", "size", "overlap", "reached", "quads", "sites"]].round(2).assign(**effects)
    return rows[[name for name in rows if name != "sites"] + ["sites"]]


def left_out(step: Step, t: Tables) -> Figure | None:
    """For each superset, the slice and the circuit picked without it."""
    if t.circuits.empty:
        return None
    slices = t.groups[t.groups["kind"] == "superset"].assign(kind=lambda rows: rows["group"], group="the slice")
    held_out = t.circuits[(t.circuits["kind"] == "without") & t.circuits["superset"].isin(slices["kind"])]
    both = pd.concat([slices, held_out.assign(kind=held_out["superset"], group="picked without it")], ignore_index=True)
    supersets = step.params.topic.supersets
    return forest(step, both.sort_values("kind", key=lambda names: names.map(supersets.index), kind="stable"))


def transfer_figure(t: Tables) -> Figure | None:
    """Every superset's own circuit on every superset's pairs."""
    if t.circuits.empty:
        return None
    panels = squares(t.transfer[t.transfer["quantity"].isin(JUDGED)], "quantity", "picked_on", "tested_on")
    return plots.class_matrices(panels, SHARE, "tested on", "picked on")


class Verdict(NamedTuple):
    """Whether the slice and the circuits picked without a class hold in every class."""

    verdict: str  # EVERY, NOT_EVERY, UNTESTABLE
    tested: list[str]
    untested: list[str]  # classes with too few quads
    failing: pd.DataFrame


def decide(groups: pd.DataFrame, circuits: pd.DataFrame, params: Shared) -> Verdict:
    """EVERY if in every superset with intervals of both the lower ends of damage and recovery exceed the floor, for the
    slice and for the circuit picked without the superset; where there are no such circuits, for the slice alone."""
    own = groups[(groups["kind"] == "superset") & groups["quantity"].isin(JUDGED)]
    tests = own.assign(superset=own["group"], circuit="the slice")
    if len(circuits):
        held_out = circuits[(circuits["kind"] == "without") & circuits["quantity"].isin(JUDGED)]
        held_out = held_out.assign(circuit="the circuit picked without it")
        tests = pd.concat([tests, held_out], ignore_index=True)
    enough = own.groupby("group", sort=False)["low"].agg(lambda low: low.notna().all())
    tested, untested = enough.index[enough].tolist(), enough.index[~enough].tolist()
    failing = tests[tests["superset"].isin(tested) & ~(tests["low"] > params.general_floor)]
    verdict = UNTESTABLE if not tested else NOT_EVERY if len(failing) else EVERY
    return Verdict(verdict, tested, untested, failing)


def quantities(rows: pd.DataFrame) -> str:
    """ "damage is 0.8 [0.7, 0.9] and recovery is ..." of the rows of one group."""
    return listed(f"{row.quantity} is {of_row(row)}" for row in rows[rows["quantity"].isin(JUDGED)].itertuples())


def ends(rows: pd.DataFrame, name: str = "group") -> str:
    """ "from 0.6 [0.5, 0.7] (one) to 0.9 [0.8, 1.0] (another)": the lowest and the highest of some rows."""
    known = rows.dropna(subset="estimate").sort_values("estimate")
    each = [f"{of_row(row)} ({getattr(row, name)})" for row in known.iloc[[0, -1][: len(known)]].itertuples()]
    return f"from {' to '.join(each)}" if len(each) > 1 else "".join(each) or "not measured"


def few(rows: pd.DataFrame) -> str:
    """Why some estimates of these rows have no interval, where that is so."""
    without = bool(rows["low"].isna().any())
    return f" (no interval where there are fewer than {stats.MINIMUM_CLUSTERS} quads)" * without


def of_kind(groups: pd.DataFrame, kind: str, quantity: str = "recovery") -> pd.DataFrame:
    """One quantity of the groups of one kind."""
    return groups[(groups["kind"] == kind) & (groups["quantity"] == quantity)]


def grid_sentences(counts: Sequence[Mapping[str, Any]], groups: pd.DataFrame, given: int = 0) -> list[str]:
    """What is in the grid, and what was left out of it; `given` is how many pairs a `pairs_file` has."""
    first, *others = counts
    professions, supersets = (of_kind(groups, kind) for kind in ("profession", "supersets"))
    out = [
        f"The grid has {words.counted(first['left'], 'pair')} ({words.counted(first['quads'], 'quad')}) in "
        f"`{first['template']}`. "
        f"There are {words.counted(len(professions), 'profession')} and {len(supersets)} ordered couples of supersets "
        f"in it."
    ]
    if given and first["possible"] == given:
        fewer = f", of which {first['left']} are taken, as `pairs` asks for" if first["left"] < given else ""
        out.append(
            f"The {given} pairs of the `pairs_file` form a single half{fewer}: sites were picked on pairs of the same."
        )
    elif given:
        fewer = f"; {first['left']} are taken, as `pairs` asks for" if first["left"] < first["possible"] else ""
        out.append(
            f"Of the {given} pairs of the `pairs_file`, {first['possible']} are in the half that nothing was picked on"
            f"{fewer}."
        )
    for count in others:
        why = f" (the first that does not: {count['why']})" if count["why"] else ""
        out.append(
            f"In `{count['template']}`, never used for picking, {count['aligned']} of {count['possible']} pairs line "
            f"up token by token{why}. {count['left']} of the {count['asked']} asked have a gap of the right sign and "
            f"are "
            f"used ({words.counted(count['quads'], 'quad')})."
        )
    return out


def needed_sentences(groups: pd.DataFrame, judge: str | None, earlier: Mapping[str, Any] | None = None) -> list[str]:
    """What the slice does over all pairs of the profile's template, taken out and put back; beside it what the
    findings of step 05, `earlier`, have under the same ablation."""
    rows = {row.quantity: row for row in groups[groups["kind"] == "all"].itertuples()}
    back, quads = of_row(rows["recovery"]), rows["recovery"].quads
    lost = "How much the slice is needed was not asked: no pair has donors of other classes."
    if judge is not None:
        lost = (
            f"Ablated by `{judge}`, which favours neither class of a pair, it takes away {of_row(rows['damage'])} of "
            f"what the whole final residual stream takes away so, its damage ({rows['damage'].pairs} pairs of "
            f"{rows['damage'].quads} quads)."
        )
        there = [row for row in (earlier or {}).get("needed", ()) if row["ablation"] == judge and "pairs" in row]
        lost += "".join(
            f" Page 05 has {with_ends(row)} ({row['pairs']} pairs of {row['quads']} quads): fewer or other pairs, and "
            "another share."
            for row in there
        )
    return [
        f"Over all pairs the slice's clean activations recover {back} of the gap ({quads} quads).",
        lost,
        f"Counterfactual damage is {of_row(rows[MIRRORED])} of the gap, but that is recovery in mirror pairs and no "
        "second finding.",
    ]


def group_sentences(groups: pd.DataFrame, template: str) -> list[str]:
    """The slice by superset, profession, template, order of the names: the lowest and the highest."""
    supersets = {name: of_kind(groups, "superset", name) for name in JUDGED}
    out = [f"By superset, joint {name} runs {ends(rows)}{few(rows)}." for name, rows in supersets.items()]
    chosen = groups[groups["kind"].isin(SELECTIONS) & (groups["quantity"] == "recovery")]
    before = chosen[chosen["group"] == UNSELECTED].itertuples()
    each = "".join(f" In pairs {row.group} it is {of_row(row)} ({words.counted(row.quads, 'quad')})." for row in before)
    out += [f"By how pairs were selected, joint recovery runs {ends(chosen)}.{each}"] * bool(len(chosen))
    others = groups[(groups["kind"] == "template") & (groups["group"] != template)]
    for name, rows in others.groupby("group", sort=False):
        out.append(f"In `{name}`, jointly, its {quantities(rows)} ({quads_of(rows)}).")
    for kind in ("two names", "order"):
        rows = of_kind(groups, kind)
        if len(rows) > 1:
            out.append(f"By {kind}, joint recovery runs {ends(rows)}{few(rows)}.")
    rows = of_kind(groups, "profession")
    sure = rows[rows["low"].notna()]
    if len(rows):
        out.append(
            f"{len(rows) - len(sure)} of {len(rows)} professions are in fewer than {stats.MINIMUM_CLUSTERS} quads: "
            f"estimates "
            "without interval."
            + (f" Of the {len(sure)} with more, joint recovery runs {ends(sure)}." if len(sure) else "")
        )
    return out


def quads_of(rows: pd.DataFrame) -> str:
    """How many quads damage and recovery of one group rest on: "21 quads", or each where they differ."""
    own = rows[rows["quantity"].isin(JUDGED)]
    if own["quads"].nunique() == 1:
        return f"{own['quads'].iloc[0]} quads"
    return f"quads: {listed(f'{row.quads} for {row.quantity}' for row in own.itertuples())}"


def same_sites_sentences(t: Tables, params: Shared) -> list[str]:
    """Ranks between classes, and class x site interaction."""
    out = []
    if len(t.ranks):
        within = t.ranks[t.ranks["class_a"] == t.ranks["class_b"]]
        between = t.ranks[t.ranks["class_a"] != t.ranks["class_b"]]
        two = between.assign(both=between["class_a"] + " and " + between["class_b"])
        out += [
            f"Ranked by counterfactual damage, the heads of two supersets correlate (Spearman) {ends(two, 'both')}.",
            f"Between halves of two supersets the mean correlation is {between['halves'].mean():.2f}, between halves "
            f"of one superset {within['halves'].mean():.2f}: the most that noise leaves (means, no intervals).",
        ]
    test, sites, why = t.interaction
    if test is None:
        return [*out, f"Whether the slice's sites share the work alike in all supersets was not tested: {why}."]
    sure = sites[sites["sure"]]
    lead = f", most of all {words.sites([sure['site'].iloc[0]])}" if len(sure) else ""
    return [
        *out,
        *alike_sentence(t, params),
        f"Familywise, {len(sure)} of them {'differs' if len(sure) == 1 else 'differ'} between supersets{lead}.",
    ]


def alike_sentence(t: Tables, params: Shared) -> list[str]:
    """Whether the sites share the work alike, where that was tested, and who decides it."""
    test, sites, _ = t.interaction
    if test is None:
        return []
    alike = "do not share the work" if shares_differ(t, params) else "are not shown to share the work otherwise than"
    return [
        f"The slice's {words.counted(len(sites), 'site')} {alike} alike in all supersets (class x site interaction, "
        f"labels of "
        f"whole quads permuted, p = {test.p_overall:.4f}). These pairs would show, nine times in ten, a superset whose "
        f"share of a site lies {test.resolution:.2f} off the others' (a bound, no estimate); page 10 judges the claim "
        "that they differ, on fresh people where it has some."
    ]


def shares_differ(t: Tables, params: Shared) -> bool:
    """Whether the test of class x site interaction was made and is significant."""
    test = t.interaction[0]
    return test is not None and test.p_overall <= 1 - params.level


def circuit_sentences(circuits: pd.DataFrame) -> list[str]:
    """Circuits picked without a class, and on one alone."""
    if circuits.empty:
        return ["No circuits were picked class by class: step 04's table of single sites is not in the results."]
    held_out = circuits[circuits["kind"] == "without"]
    picked, none = held_out[held_out["size"] > 0], held_out.loc[held_out["size"] == 0, "superset"].unique()
    out = [
        "Picked on the discovery pairs without a superset and tested on the confirmation pairs that it answers, "
        f"circuits have joint {name} {ends(rows, 'superset')}{few(rows)}."
        for name, rows in picked.groupby("quantity")
        if name in JUDGED
    ]
    out += [f"Without {listed(none)} no circuit could be picked."] * bool(len(none))
    alike = picked.loc[picked["overlap"] == 1, "superset"].unique()
    out += [
        f"Picked without {listed(alike)}, the circuit is the slice itself: there its numbers are the slice's, and no "
        "second test."
    ] * bool(len(alike))
    own = circuits[(circuits["kind"] == "only") & (circuits["quantity"] == "recovery") & (circuits["size"] > 0)]
    shared = own.sort_values("overlap").iloc[[0, -1][: len(own)]]
    each = " to ".join(
        f"{row.overlap:.0%} ({row.superset}, "
        f"{words.counted(row.size, 'site')}{', the slice itself' * (row.overlap == 1)})"
        for row in shared.itertuples()
    )
    return out + [f"Circuits picked on one superset alone share with the slice {each} of the sites in either."] * bool(
        len(own)
    )


def verdict_sentence(verdict: Verdict, t: Tables, params: Shared) -> str:
    """The verdict by the profile's rule, and beside it whether the sites' shares differ between classes."""
    floor = f"{params.general_floor:g}"
    few = (
        " No interval of damage and recovery both (too few quads, no donors of another class, or an ablation that "
        f"takes nothing away): {listed(verdict.untested)}."
    ) * bool(verdict.untested)
    alone = " (circuits picked without a class were not there to test)" if t.circuits.empty else ""
    if verdict.verdict == UNTESTABLE:
        return f"Whether the slice carries every superset cannot be tested here.{few}"
    if verdict.verdict == NOT_EVERY:
        weakest = verdict.failing.sort_values("estimate").iloc[0]
        fails = listed(f"{row.circuit} in {row.superset} ({row.quantity})" for row in verdict.failing.itertuples())
        return (
            f"Verdict: not all that is asked of a general slice is shown. The lower end does not exceed {floor} for "
            f"{fails}{alone}. The weakest is {of_row(weakest)}.{few}"
        )
    shares = ""
    if shares_differ(t, params):
        differ = t.interaction[1]["sure"].sum()
        shares = f" Site by site it does not do so alike: the shares of {differ} differ between supersets."
    return (
        f"Verdict: the slice as a whole carries every superset. In {listed(verdict.tested)} the lower ends of joint "
        f"damage and recovery exceed {floor}, for the slice and for the circuit picked without the superset{alone}."
        f"{shares}{few}"
    )


def numbers(step: Step, m: Measured, t: Tables) -> dict[str, Any]:
    """The findings of step 07, without their figures."""
    verdict = decide(t.groups, t.circuits, step.params)
    spoken, rule = verdict_sentence(verdict, t, step.params), name_rule.sentences(t.rule)
    specific = placebo_page.sentences(t.specific, step.params)
    told = verdict.verdict == EVERY and shares_differ(t, step.params)  # then the verdict says so
    alike = [] if told else alike_sentence(t, step.params)
    test, sites, why = t.interaction
    tables = {"classes": t.groups, "sites": t.sites, "ranks": t.ranks, "transfer": t.transfer}
    tables |= {"specific": t.specific, "controls": t.controls, "leaders": t.leaders}
    for name, kind in (("leave_one_out", "without"), ("circuits", "only")):
        tables[name] = t.circuits[t.circuits["kind"] == kind] if len(t.circuits) else t.circuits
    tables["failing"] = verdict.failing[["superset", "circuit", "quantity", "estimate", "low", "high"]]
    sentences = [
        *grid_sentences(m.counts, t.groups, len(step.pairs()) if step.params.pairs_file else 0),
        *needed_sentences(t.groups, m.judge, step.find("hydra")),
        *group_sentences(t.groups, m.counts[0]["template"]),
        *same_sites_sentences(t, step.params),
        *circuit_sentences(t.circuits),
        spoken,
        *specific,
        *controls_page.sentences(t.controls, t.candidates, t.leaders, step.params.silence_margin),
        *rule.values(),
    ]
    return {
        "model": about_model(step),
        "task": step.params.task,
        "able": True,
        "verdict": verdict.verdict,
        "judge": m.judge,
        "untested": verdict.untested,
        "grid": m.counts,
        **{name: table.to_dict("records") for name, table in tables.items()},
        "interaction": {"p": test.p_overall, "sites": sites.head(20).to_dict("records")} if test else {"why": why},
        "rule": None if t.rule is None else name_rule.numbers(t.rule),
        "sentences": sentences,
        "headline": [
            spoken,
            *alike,
            *specific[:1],
            *controls_page.headline(t.controls, step.params.silence_margin),
            *(rule[name] for name in ("steps", "ratio") if name in rule),
        ],
    }


def findings(step: Step, m: Measured, t: Tables) -> dict[str, Any]:
    """The findings of step 07."""
    figures = {
        "forest": by_group(step, t),
        "left-out": left_out(step, t),
        "controls": controls_page.figure(t.candidates, step.params.silence_margin),
        "rule": name_rule.figure(t.rule, m.people),
        "placebo": placebo_page.figure(t.specific),
    }
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    return finished(step, numbers(step, m, t), drawn, CAPTIONS)
