"""What step 07 found: effects class by class, circuits tested on classes they were not picked on, controls, the rule.

1. `groups` puts damage and recovery of the slice side by side for every superset, profession, template and order.
2. `ranks` and `interaction` ask whether the same sites carry every class, and equally.
3. `circuit_table` and `transfer` test circuits picked without a superset, or on it alone.
4. `control_table` scores every candidate's logit under ablation where no class, or half of one, should be found.
5. `rule_lines` draws the rules of `lib.rule`. The verdict and its sentences: `lib.generality_statements`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from lib import class_tests, findings, stats
from lib.class_tests import Interaction
from lib.effects import quad_matrix
from lib.findings import SITE, columns, site_name
from lib.params import Generality
from lib.rule import RuleResult
from lib.tasks import SUPERSETS

QUANTITY = {"noise": "damage", "denoise": "recovery"}
# How each control should come out; written before any was run. Silent: every candidate's logit stays within the margin.
LISTED = ("invented names", "things")
EXPECTATIONS = {
    "two supersets": "their two own supersets fall, each by less than an ordinary answer",
    "mixed": "the supersets of both names fall, each by less than an ordinary answer",
    "invented names": "silent",
    "things": "silent",
    "shuffled labels": "silent",
    "random heads": "silent, against what the slice's own heads do",
}


# --- effects by group ---------------------------------------------------------------------------------------------


def with_pairs(frame: pd.DataFrame, grid: pd.DataFrame) -> pd.DataFrame:
    """Records of the grid with what its table says of their pairs."""
    known = ["answer", "corrupt_answer", "order", "clean_profession_a", "clean_profession_b"]
    return frame.join(grid.set_index("pair_id")[known], on="pair_id")


def joint_effect(rows: pd.DataFrame, params: Generality) -> dict[str, Any]:
    """Damage or recovery of the rows (one set of sites, one direction): a ratio of sums with an interval over quads.

    NaN where the gaps do not add up to more than 0, or there are no rows.
    """
    sizes = {"pairs": rows["pair_id"].nunique(), "quads": rows["quad_id"].nunique()}
    gap = (rows["logit_diff_clean"] - rows["logit_diff_corrupt"]).sum()
    if not gap > 0:
        return {"estimate": np.nan, "low": np.nan, "high": np.nan} | sizes
    ends = findings.curve(rows, params, by=[]).iloc[0]
    return {key: float(ends[key]) if ends[key] is not None else np.nan for key in ("estimate", "low", "high")} | sizes


def both_ways(rows: pd.DataFrame, params: Generality, **about: Any) -> list[dict[str, Any]]:
    """`joint_effect` in both directions, as rows of a table."""
    parts = ((quantity, rows[rows["direction"] == direction]) for direction, quantity in QUANTITY.items())
    return [about | {"quantity": quantity} | joint_effect(part, params) for quantity, part in parts]


def groups(joint: pd.DataFrame, grid: pd.DataFrame, params: Generality) -> pd.DataFrame:
    """Joint damage and recovery of the slice (`site_set` 0) for every group of pairs: `kind`, `group`, `quantity`.

    Groups are of the profile's own template, except those of `template`. A pair is of the superset that its clean names
    are in, of each of their professions, and of "one profession" or "two professions".
    """
    slice_rows = with_pairs(joint[joint["site_set"] == 0], grid)
    own = slice_rows[slice_rows["template"] == grid["template"].iloc[0]]
    a, b = own["clean_profession_a"], own["clean_profession_b"]
    labels = {
        "superset": own["answer"],
        "names": pd.Series(np.where(a == b, "one profession", "two professions"), own.index).where(
            (a != "") & (b != "")
        ),
        "order": own["order"].where(own["order"] != ""),
        "supersets": own["answer"] + " / " + own["corrupt_answer"],
    }
    out = both_ways(own, params, kind="all", group="all pairs")
    for template, rows in slice_rows.groupby("template", sort=False):
        out += both_ways(rows, params, kind="template", group=template)
    for kind, label in labels.items():
        order = (
            [name for name in SUPERSETS if name in set(label)] if kind == "superset" else sorted(set(label.dropna()))
        )
        for group in order:
            out += both_ways(own[label == group], params, kind=kind, group=group)
    for profession in sorted({*a, *b} - {""}):
        out += both_ways(own[(a == profession) | (b == profession)], params, kind="profession", group=profession)
    return pd.DataFrame(out)


def site_effects(
    joint: pd.DataFrame, grid: pd.DataFrame, first: int, sites: Sequence, params: Generality
) -> pd.DataFrame:
    """Damage and recovery of single sites (sets `first`, `first` + 1, ...) by superset and template: one row each."""
    frame = with_pairs(joint, grid)
    own, out = frame["template"] == grid["template"].iloc[0], []
    kinds = [("superset", name, own & (frame["answer"] == name)) for name in SUPERSETS]
    kinds += [("template", name, frame["template"] == name) for name in frame["template"].unique()]
    for kind, group, chosen in kinds:
        rows = frame[chosen]
        for index, site in enumerate(sites):
            part = rows[rows["site_set"] == first + index]
            if len(part):
                out += both_ways(part, params, kind=kind, group=group, site=site_name(*site))
    return pd.DataFrame(out)


# --- do the same sites carry every class? -------------------------------------------------------------------------


def class_matrices(frame: pd.DataFrame, grid: pd.DataFrame, value: str = "effect", reduce: str = "mean") -> dict:
    """Each superset's counterfactual effects as quads x sites (`effects.QuadMatrix`), over pairs that it answers."""
    noise = with_pairs(frame[frame["direction"] == "noise"], grid)
    return {
        name: quad_matrix(rows, value, SITE, reduce)
        for name in SUPERSETS
        if len(rows := noise[noise["answer"] == name])
    }


def ranks(frame: pd.DataFrame, grid: pd.DataFrame, params: Generality) -> pd.DataFrame:
    """How alike two supersets rank the heads (`class_tests.between_classes`); no rows with fewer than two of them."""
    heads = class_matrices(frame[frame["component"] == "head"], grid)
    enough = {name: matrix.values for name, matrix in heads.items() if len(matrix.values) > 1}
    if len(enough) < 2:
        return pd.DataFrame()
    return class_tests.between_classes(enough, params.level, params.resamples, params.seed)


def square(ranks: pd.DataFrame, value: str) -> pd.DataFrame:
    """A column of `ranks` as classes x classes."""
    both = pd.concat([ranks, ranks.rename(columns={"class_a": "class_b", "class_b": "class_a"})])
    names = list(dict.fromkeys(ranks["class_a"]))
    return (
        both.drop_duplicates(["class_a", "class_b"])
        .pivot(index="class_a", columns="class_b", values=value)
        .loc[names, names]
    )


def interaction(
    frame: pd.DataFrame, grid: pd.DataFrame, params: Generality
) -> tuple[Interaction | None, pd.DataFrame, str]:
    """The test of class x site interaction over all heads and MLPs; its sites' `p`; why there is none, else ""."""
    change, gap = (class_matrices(frame, grid, value, "sum") for value in ("effect", "gap"))
    names = [name for name, matrix in change.items() for _ in matrix.quads]
    values, gaps = (np.vstack([matrix.values for matrix in each.values()]) for each in (change, gap))
    quads = np.concatenate([matrix.quads for matrix in change.values()])
    try:
        test = class_tests.interaction(values, gaps[:, 0], names, quads, params.flips, params.seed)
    except ValueError as error:
        return None, pd.DataFrame(), str(error)
    sites = next(iter(change.values())).sites
    spread = test.ratios.to_numpy().max(0) - test.ratios.to_numpy().min(0)
    table = sites.assign(site=findings.named(sites), p=test.p, spread=spread, most=test.ratios.to_numpy().argmax(0))
    return (
        test,
        table.assign(most=test.ratios.index[table["most"]]).sort_values(["p", "spread"], ascending=[True, False]),
        "",
    )


# --- circuits picked class by class -------------------------------------------------------------------------------


def jaccard(one: Sequence, other: Sequence) -> float:
    """What two sets share, of all that is in either; NaN for two empty ones."""
    both = {*one, *other}
    return len({*one} & {*other}) / len(both) if both else np.nan


def circuit_table(
    joint: pd.DataFrame, grid: pd.DataFrame, circuits: Sequence, sites: Sequence, params: Generality
) -> pd.DataFrame:
    """Each `grid.Circuit` (those with sites are sets 1, 2, ... of `joint`) on the pairs that its superset answers.

    Two rows each, for damage and recovery: without a superset, that is a test on the class held out. `overlap` is with
    the critical slice `sites`, as a share of the sites in either. A circuit that could not be picked keeps its rows.
    """
    frame, out = with_pairs(joint, grid), []
    own = frame[frame["template"] == grid["template"].iloc[0]]
    tested = [circuit for circuit in circuits if circuit.sites]
    for circuit in circuits:
        about = {"kind": circuit.kind, "superset": circuit.superset, "picked_on": len(circuit.pairs)}
        about |= {"size": len(circuit.sites), "sites": ", ".join(site_name(*site) for site in circuit.sites)}
        about |= {"overlap": jaccard(circuit.sites, sites), "reached": bool(circuit.chosen and circuit.chosen.reached)}
        number = 1 + tested.index(circuit) if circuit.sites else -1
        rows = own[(own["site_set"] == number) & (own["answer"] == circuit.superset)]
        out += both_ways(rows, params, **about)
    return pd.DataFrame(out)


def beside_slice(circuits: pd.DataFrame, groups: pd.DataFrame) -> pd.DataFrame:
    """For each superset, the slice and the circuit picked without it: rows for `circuit_plots.forest`."""
    slices = groups[groups["kind"] == "superset"].assign(kind=lambda rows: rows["group"], group="the slice")
    held_out = circuits[circuits["kind"] == "without"]
    held_out = held_out.assign(kind=held_out["superset"], group="picked without it")
    both = pd.concat([slices, held_out[held_out["superset"].isin(slices["kind"])]], ignore_index=True)
    return both.sort_values("kind", key=lambda names: names.map(SUPERSETS.index), kind="stable")


def transfer(joint: pd.DataFrame, grid: pd.DataFrame, circuits: Sequence, params: Generality) -> pd.DataFrame:
    """Every superset's own circuit (and, first, the slice) on every superset's pairs: `picked_on`, `tested_on`, ..."""
    frame, tested = with_pairs(joint, grid), [circuit for circuit in circuits if circuit.sites]
    own, out = frame[frame["template"] == grid["template"].iloc[0]], []
    numbers = {"the slice": 0} | {c.superset: 1 + index for index, c in enumerate(tested) if c.kind == "only"}
    for picked_on, number in numbers.items():
        for name in SUPERSETS:
            rows = own[(own["site_set"] == number) & (own["answer"] == name)]
            if len(rows):
                out += both_ways(rows, params, picked_on=picked_on, tested_on=name)
    return pd.DataFrame(out)


def overlaps(circuits: Sequence, sites: Sequence) -> pd.DataFrame:
    """What the classes' own circuits and the slice share with each other, as shares of the sites in either."""
    sets = {"the slice": tuple(sites)} | {c.superset: c.sites for c in circuits if c.kind == "only" and c.sites}
    return pd.DataFrame({a: {b: jaccard(own, other) for b, other in sets.items()} for a, own in sets.items()})


# --- controls -----------------------------------------------------------------------------------------------------


def aligned_changes(rows: pd.DataFrame, words: Sequence[str], control: str, rng: np.random.Generator) -> pd.DataFrame:
    """The candidates' changes in the order in which the control compares them, a column each.

    Two supersets, mixed: the two own classes, then the mean of the others. Prompts with an answer: the answer, then the
    other candidates in turn. Shuffled labels: the same after one permutation of the labels for each quad. Else: the
    candidates by name.
    """
    change = np.stack(rows["change"].to_list())
    own = [[words.index(name) for name in text.split(",") if name] for text in rows["classes"]]
    if control in ("two supersets", "mixed"):
        others = [[index for index in range(len(words)) if index not in two] for two in own]
        first, second = (change[np.arange(len(own)), [two[i] for two in own]] for i in (0, 1))
        rest = np.array([row[index].mean() for row, index in zip(change, others, strict=True)])
        names = ["first name's", "second name's"] if control == "mixed" else ["first own", "second own"]
        return pd.DataFrame(np.column_stack([first, second, rest]), rows.index, [*names, "others, mean"])
    if control in LISTED:
        return pd.DataFrame(change, rows.index, list(words))
    shift = np.array([one for (one,) in own])
    if control == "shuffled labels":
        drawn = {quad: rng.permutation(len(words)) for quad in sorted(set(rows["quad_id"]))}
        change = np.stack([row[drawn[quad]] for row, quad in zip(change, rows["quad_id"], strict=True)])
    turned = np.stack([np.roll(row, -by) for row, by in zip(change, shift, strict=True)])
    return pd.DataFrame(turned, rows.index, ["answer", *(f"other {i}" for i in range(1, len(words)))])


def scored_controls(
    frame: pd.DataFrame, prompts: pd.DataFrame, grid: pd.DataFrame, words: Sequence[str], params: Generality
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The controls' candidates, a row each, and a verdict for each control; both by `ablation` and `scoring`.

    `frame` is `controls.ablated`'s, `prompts` the rows of `controls.control_prompts`. The first ablation and scoring
    decide. Scoring is `centred` (less the mean change of all candidates, which moves no answer) or `raw`. The margin is
    a share of the ordinary effect: the fall of the answer's logit in ordinary prompts, scored alike, when the slice is
    ablated (for random heads: when its heads alone are).
    """
    about = pd.concat([prompts, grid.assign(control="ordinary", classes=grid["answer"])])
    rows = frame.merge(about[["pair_id", "control", "classes"]], on="pair_id")
    before, after = (np.stack(rows[name].to_list()).astype(float) for name in ("before", "after"))
    raw = after - before
    changes = {"centred": raw - raw.mean(1, keepdims=True), "raw": raw}
    parts, verdicts = [], []
    for (scoring, change), ablation in product(changes.items(), dict.fromkeys(rows["ablation"])):
        own = rows.assign(change=list(change))[rows["ablation"] == ablation]
        ordinary = {name: part for name, part in own[own["control"] == "ordinary"].groupby("set")}
        drawn = {name: own[(own["control"] == name) & (own["set"] == "slice")] for name in EXPECTATIONS}
        kinds = {"ordinary": ordinary["slice"], **drawn, "shuffled labels": ordinary["slice"]}
        del kinds["random heads"]
        if "random" in ordinary:
            kinds |= {"slice's heads": ordinary["heads"], "random heads": ordinary["random"]}
        fall = {}
        for control, part in kinds.items():
            if part.empty:
                continue
            rng = np.random.default_rng(params.seed)
            matrix = control_matrix(part, words, control, rng)
            if control in ("ordinary", "slice's heads"):
                fall[control] = -float(matrix["answer"].mean())
            whole = fall["slice's heads" if control == "random heads" else "ordinary"]
            spans = stats.simultaneous(matrix.to_numpy(), params.level, params.resamples, params.seed)
            table = pd.DataFrame({"control": control, "candidate": list(matrix)} | columns(spans)).astype(
                {"low": float, "high": float}
            )
            keys = {"ablation": ablation, "scoring": scoring}
            parts.append(table.assign(**keys, fall=whole, prompts=len(part["pair_id"].unique()), clusters=len(matrix)))
            sizes = {"prompts": part["pair_id"].nunique(), "clusters": len(matrix), "candidates": len(table)}
            verdict = verdict_of(control, matrix, table, whole, params)
            verdicts.append({"control": control, **keys, "fall": whole, **sizes, **verdict})
    return pd.concat(parts, ignore_index=True), pd.DataFrame(verdicts)


def control_matrix(rows: pd.DataFrame, words: Sequence[str], control: str, rng: np.random.Generator) -> pd.DataFrame:
    """The aligned changes as clusters (quads, or prompts of their own) x candidates; random sets stand side by side."""
    aligned = aligned_changes(rows, words, control, rng)
    if control != "random heads":
        return aligned.groupby(rows["quad_id"]).mean()
    sets = [aligned[rows["number"] == number].groupby(rows["quad_id"]).mean() for number in sorted(set(rows["number"]))]
    return pd.concat([part.add_suffix(f", set {index}") for index, part in enumerate(sets, 1)], axis=1)


def verdict_of(
    control: str, matrix: pd.DataFrame, table: pd.DataFrame, fall: float, params: Generality
) -> dict[str, Any]:
    """`verdict` (silent, active, partial, not partial, undecided), whether the expectation is `met` (None: undecided,
    or none was held), and `p`, the largest of the equivalence tests'.

    Silent: every candidate passes the equivalence test. Active: some candidate's interval lies outside the margin.
    Partial: both own candidates fall, each by less than the ordinary answer; the intervals hold together.
    """
    undecided = {"verdict": "undecided", "met": None, "p": None}
    if not fall > 0 or table["low"].isna().any():
        return undecided
    margin, own = params.silence_margin * fall, table.head(2)
    if control in ("two supersets", "mixed"):
        partial = (own["high"] < 0).all() and (own["low"] > -fall).all()
        against = (own["low"] >= 0).any() or (own["high"] <= -fall).any()
        known = {"verdict": "partial" if partial else "not partial", "met": bool(partial), "p": None}
        return known if partial or against else undecided
    tests = class_tests.equivalence(matrix.to_numpy(), margin, params.level)
    active = bool(((table["low"] > margin) | (table["high"] < -margin)).any())
    silent, p = bool(class_tests.all_equivalent(tests)), max(test.p for test in tests)
    if not (silent or active):
        return undecided | {"p": p}
    return {"verdict": "silent" if silent else "active", "met": silent if control in EXPECTATIONS else None, "p": p}


def leaders(frame: pd.DataFrame, prompts: pd.DataFrame, grid: pd.DataFrame, params: Generality) -> pd.DataFrame:
    """How far the candidate falls that leads a prompt before the slice is ablated by mean, less the candidates' mean.

    A candidate leads by most above its average over ordinary prompts, every answer counting alike. By name, a control's
    candidates can rise in one prompt and fall in the next; this fall cannot cancel so.
    """
    about = pd.concat([prompts, grid.assign(control="ordinary", classes=grid["answer"])])
    rows = frame[(frame["set"] == "slice") & (frame["ablation"] == frame["ablation"].iloc[0])]
    rows = rows.merge(about[["pair_id", "control", "classes"]], on="pair_id")
    before, after = (np.stack(rows[name].to_list()).astype(float) for name in ("before", "after"))
    ordinary = (rows["control"] == "ordinary").to_numpy()
    answers = rows["classes"][ordinary].to_numpy()
    prior = np.mean([before[ordinary][answers == name].mean(0) for name in sorted(set(answers))], axis=0)
    change = after - before
    rows["fall"] = change.mean(1) - change[np.arange(len(rows)), (before - prior).argmax(1)]
    out = []
    for control, part in rows.groupby("control", sort=False):
        span = stats.mean_interval(part.groupby("quad_id")["fall"].mean(), params.level, params.resamples, params.seed)
        out.append({"control": control, "estimate": span.estimate, "low": span.low, "high": span.high})
    return pd.DataFrame(out)


def rule_lines(fit: RuleResult, asked: pd.DataFrame) -> dict[str, list[float]]:
    """What each rule makes of no, one and two names: its least-squares fit to the free fit's two steps."""
    terms = fit.fitted.set_index("term")["estimate"]
    one, two = terms["one name"], terms["two names"]
    first, second = ((asked["n_a"] + asked["n_b"] == count).sum() for count in (1, 2))
    slope = (first * one + 2 * second * two) / (first + 4 * second)
    level = (first * one + second * two) / (first + second)
    return {"additive": [0, slope, 2 * slope], "OR": [0, level, level], "AND": [0, 0, two]}
