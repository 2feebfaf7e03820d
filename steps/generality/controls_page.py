"""The negative controls of step 07, scored: is the slice silent where there is no superset to find?

1. `aligned_changes` puts the candidates' changes of a control's prompts in the order in which they are compared.
2. `scored` tests them, control by control, against what was expected (`EXPECTATIONS`).
3. `leaders` follows the candidate that leads each prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from lib import stats
from lib.effects import columns
from steps.generality import class_tests
from steps.generality.measure import Generality

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


def scored(
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
            spans = stats.simultaneous(matrix.to_numpy(), params)
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
        span = stats.mean_interval(part.groupby("quad_id")["fall"].mean(), params)
        out.append({"control": control, "estimate": span.estimate, "low": span.low, "high": span.high})
    return pd.DataFrame(out)
