"""The negative controls on the page: is the slice silent where there is no superset to find?

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
from IPython.display import Markdown
from matplotlib.figure import Figure

from lib import stats
from lib.effects import columns
from lib.stats import MINIMUM_CLUSTERS
from pipeline.params import Shared
from report import plots
from report.words import TOO_FEW, counted, listed, of_row
from steps.generality import class_tests
from steps.generality.controls import ABLATIONS, LISTED
from steps.generality.measure import Measured

# How each control should come out. Silent: every candidate's logit stays within the margin.
EXPECTATIONS = {
    "two supersets": "their two own supersets fall, each by less than an ordinary answer",
    "mixed": "the supersets of both names fall, each by less than an ordinary answer",
    "invented names": "silent",
    "things": "silent",
    "shuffled labels": "silent",
    "random heads": "silent, against what the slice's own heads do",
}

NOT_RUN = "The controls were not run: no ordinary prompt has another quad of its token counts to take a mean from."


def tables(m: Measured, params: Shared) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The candidates of every control, the verdicts, the leaders; empty where nothing was ablated."""
    if m.changes is None:
        return pd.DataFrame(), pd.DataFrame(), pd.DataFrame()
    rows = with_controls(m.changes, m.controls, m.grid)
    return *scored(rows, m.candidates, params), leaders(rows, params)


def with_controls(changes: pd.DataFrame, prompts: pd.DataFrame, grid: pd.DataFrame) -> pd.DataFrame:
    """The rows under ablation with their control ("ordinary" in the grid) and the classes of their names.

    `before` and `change` (after - before) are fp64 over the candidates.
    """
    about = pd.concat([prompts, grid.assign(control="ordinary", classes=grid["answer"])])
    rows = changes.merge(about[["pair_id", "control", "classes"]], on="pair_id")
    before, after = (np.stack(rows[name].to_list()).astype(float) for name in ("before", "after"))
    return rows.assign(before=list(before), change=list(after - before))


def aligned_changes(rows: pd.DataFrame, words: Sequence[str], control: str, seed: int) -> pd.DataFrame:
    """The candidates' changes in the order in which the control compares them, a column each.

    Two supersets, mixed: the two own classes, then the mean of the others. Prompts with an answer: the answer, then the
    other candidates in turn. Shuffled labels: the same after one permutation of the labels for each quad. Else: the
    candidates by name.
    """
    change = np.stack(rows["change"].to_list())
    if control in LISTED:
        return pd.DataFrame(change, rows.index, list(words))
    own = np.array([[words.index(name) for name in text.split(",")] for text in rows["classes"]])
    if control in ("two supersets", "mixed"):
        names = ["first name's", "second name's"] if control == "mixed" else ["first own", "second own"]
        both = pd.DataFrame(np.take_along_axis(change, own, axis=1), rows.index, names)
        if len(words) == 2:
            return both
        return both.assign(
            **{"others, mean": [np.delete(row, two).mean() for row, two in zip(change, own, strict=True)]}
        )
    if control == "shuffled labels":
        rng = np.random.default_rng(seed)
        drawn = {quad: rng.permutation(len(words)) for quad in sorted(set(rows["quad_id"]))}
        change = np.stack([row[drawn[quad]] for row, quad in zip(change, rows["quad_id"], strict=True)])
    turned = np.stack([np.roll(row, -by) for row, (by,) in zip(change, own, strict=True)])
    return pd.DataFrame(turned, rows.index, ["answer", *(f"other {i}" for i in range(1, len(words)))])


def control_matrix(rows: pd.DataFrame, words: Sequence[str], control: str, seed: int) -> pd.DataFrame:
    """The aligned changes as clusters (quads, or prompts of their own) x candidates; random sets stand side by side."""
    aligned = aligned_changes(rows, words, control, seed)
    if control != "random heads":
        return aligned.groupby(rows["quad_id"]).mean()
    sets = [aligned[rows["number"] == number].groupby(rows["quad_id"]).mean() for number in sorted(set(rows["number"]))]
    return pd.concat([part.add_suffix(f", set {index}") for index, part in enumerate(sets, 1)], axis=1)


def scored(rows: pd.DataFrame, words: Sequence[str], params: Shared) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The controls' candidates, a row each, and a verdict for each control; both by `ablation` and `scoring`.

    `rows` are those of `with_controls`. The first ablation and scoring decide. Scoring is `centred` (less the mean
    change of all candidates, which moves no answer) or `raw`. The margin is a share of the ordinary effect: the fall of
    the answer's logit in ordinary prompts, scored alike, when the slice is ablated (for random heads: when its heads
    alone are).
    """
    parts, verdicts, raw = [], [], np.stack(rows["change"].to_list())
    changes = {"centred": raw - raw.mean(1, keepdims=True), "raw": raw}
    for (scoring, change), ablation in product(changes.items(), dict.fromkeys(rows["ablation"])):
        fall = {}
        for control, own in samples(rows.assign(change=list(change))[rows["ablation"] == ablation]).items():
            matrix = control_matrix(own, words, control, params.seed)
            if control in ("ordinary", "slice's heads"):
                fall[control] = -float(matrix["answer"].mean())
            about = {"ablation": ablation, "scoring": scoring}
            about["fall"] = fall["slice's heads" if control == "random heads" else "ordinary"]
            spans = pd.DataFrame(columns(stats.simultaneous(matrix.to_numpy(), params)), dtype=float)
            spans.insert(0, "candidate", list(matrix))
            parts.append(spans.assign(control=control, **about))
            sizes = {"prompts": own["pair_id"].nunique(), "clusters": len(matrix), "candidates": len(spans)}
            verdict = verdict_of(control, matrix, spans, about["fall"], params)
            verdicts.append({"control": control, **about, **sizes, **verdict})
    return pd.concat(parts, ignore_index=True), pd.DataFrame(verdicts)


def samples(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows that each control is scored by, where there are any; the ordinary effects come first."""
    of_set = {name: part for name, part in rows.groupby("set")}
    ordinary = {name: part[part["control"] == "ordinary"] for name, part in of_set.items()}
    drawn = {name: of_set["slice"][of_set["slice"]["control"] == name] for name in EXPECTATIONS}
    out = {"ordinary": ordinary["slice"], **drawn, "shuffled labels": ordinary["slice"]}
    del out["random heads"]
    if "random" in ordinary:
        out |= {"slice's heads": ordinary["heads"], "random heads": ordinary["random"]}
    return {name: part for name, part in out.items() if len(part)}


def verdict_of(control: str, matrix: pd.DataFrame, table: pd.DataFrame, fall: float, params: Shared) -> dict[str, Any]:
    """`verdict` (silent, active, partial, not partial, undecided), whether the expectation is `met` (None: undecided,
    or none was held), `p`, the largest of the tests', and the `power` to find silence, were there nothing.

    Silent: every candidate passes the equivalence test. Active: some candidate's interval lies outside the margin.
    Partial: both own candidates fall, each by less than the ordinary answer; the intervals hold together.
    """
    undecided = {"verdict": "undecided", "met": None, "p": None, "power": None}
    if not fall > 0 or table["low"].isna().any():
        return undecided
    margin, own = params.silence_margin * fall, table.head(2)
    if control in ("two supersets", "mixed"):
        rows = list(own.itertuples())
        p = max(
            max(stats.p_of_interval(row.estimate, row.high, 0, above=False, level=params.level) for row in rows),
            max(stats.p_of_interval(row.estimate, row.low, -fall, above=True, level=params.level) for row in rows),
        )
        partial = (own["high"] < 0).all() and (own["low"] > -fall).all()
        against = (own["low"] >= 0).any() or (own["high"] <= -fall).any()
        known = {"verdict": "partial" if partial else "not partial", "met": bool(partial), "p": p, "power": None}
        return known if partial or against else undecided
    p = float(class_tests.equivalence(matrix.to_numpy(), margin).max())
    power = class_tests.equivalence_power(matrix.to_numpy(), margin, params)
    silent, active = p < 1 - params.level, ((table["low"] > margin) | (table["high"] < -margin)).any()
    if not (silent or active):
        return undecided | {"p": p, "power": power}
    met = bool(silent) if control in EXPECTATIONS else None
    return {"verdict": "silent" if silent else "active", "met": met, "p": p, "power": power}


def leaders(rows: pd.DataFrame, params: Shared) -> pd.DataFrame:
    """How far the candidate falls that leads a prompt before the slice is ablated by mean, less the candidates' mean.

    A candidate leads by most above its average over ordinary prompts, every answer counting alike. By name, a control's
    candidates can rise in one prompt and fall in the next; this fall cannot cancel so.
    """
    rows = rows[(rows["set"] == "slice") & (rows["ablation"] == rows["ablation"].iloc[0])]
    before, change = (np.stack(rows[name].to_list()) for name in ("before", "change"))
    ordinary = (rows["control"] == "ordinary").to_numpy()
    answers = rows["classes"][ordinary].to_numpy()
    prior = np.mean([before[ordinary][answers == name].mean(0) for name in sorted(set(answers))], axis=0)
    rows = rows.assign(fall=change.mean(1) - change[np.arange(len(rows)), (before - prior).argmax(1)])
    out = []
    for control, part in rows.groupby("control", sort=False):
        span = stats.mean_interval(part.groupby("quad_id")["fall"].mean(), params)
        out.append({"control": control, "estimate": span.estimate, "low": span.low, "high": span.high})
    return pd.DataFrame(out)


def leaders_table(leaders: pd.DataFrame) -> pd.DataFrame | None:
    """`leaders` for the page; an estimate without ends rests on too few quads for an interval."""
    if leaders.empty:
        return None
    falls = [of_row(row) for row in leaders.itertuples()]
    return leaders[["control"]].assign(**{"fall of the leading candidate (logits)": falls})


def figure(candidates: pd.DataFrame, margin: float) -> Figure | None:
    """Every control's candidates by the ablation and scoring that decide, where any was run."""
    if candidates.empty:
        return None
    first = candidates[(candidates["ablation"] == ABLATIONS[0]) & (candidates["scoring"] == "centred")]
    return plots.controls(first, margin, "change of the logit, less the candidates' mean (logits)")


def headline(verdicts: pd.DataFrame, margin: float) -> list[str]:
    """Which controls came out as expected, by the scoring and ablation that decide, and how many other scorings agree;
    nothing if none was run."""
    said: dict[bool, list[str]] = {True: [], False: []}
    same, others = 0, 0
    parts = dict(list(without_blind(verdicts, margin)[0].groupby("control"))) if len(verdicts) else {}
    for control in (name for name in EXPECTATIONS if name in parts):
        own = parts[control]
        said[bool(own["met"].iloc[0])].append(control)
        same, others = same + same_verdict(own), others + len(own) - 1
    if not any(said.values()):
        return []
    names = {True: "as expected", False: "not as expected, or not decided"}
    each = "; ".join(f"{names[met]}: {listed(controls)}" for met, controls in said.items() if controls)
    return [
        f"Controls by the primary scoring ({named(verdicts.iloc[0])}), each by itself, {each}. Of their "
        f"{counted(others, 'other scoring')}, {same} {'comes' if same == 1 else 'come'} to the same verdict. Page 10 "
        "judges them with all other claims."
    ]


def named(row: pd.Series) -> str:
    """A scoring and its ablation in words."""
    return f"{row['scoring']} under `{row['ablation']}`"


def without_blind(verdicts: pd.DataFrame, margin: float) -> tuple[pd.DataFrame, list[str]]:
    """The verdicts that count, and a sentence on every scoring that does not: one, other than the first, by which the
    slice's own heads are silent, whose margin is wider than what these do. Random heads are held against the heads."""
    heads = verdicts[verdicts["control"] == "slice's heads"].iloc[1:]
    out = []
    for row in heads[heads["verdict"] == "silent"].itertuples():
        same = (verdicts["scoring"] == row.scoring) & (verdicts["ablation"] == row.ablation)
        verdicts = verdicts[~same | (verdicts["control"] == "random heads")]
        out.append(
            f"{row.scoring.capitalize()} under `{row.ablation}` is counted as another scoring for random heads alone: "
            f"there the slice takes {row.fall:.2f} logits from the ordinary answer, and by a margin of {margin:.0%} of "
            "that its own heads are silent."
        )
    return verdicts, out


def same_verdict(own: pd.DataFrame) -> int:
    """How many of the other scorings of a control come to the verdict of the first."""
    return int((own["verdict"].iloc[1:] == own["verdict"].iloc[0]).sum())


def agreeing(own: pd.DataFrame) -> str:
    """How many of the other scorings of a control come to the verdict of the first, and what each comes to."""
    same, others = same_verdict(own), own.iloc[1:]
    if others.empty:
        return "no other scoring was made"
    each = [f"{named(row)} {row['verdict']}" for _, row in others.iterrows()]
    agree = "agrees" if same == 1 else "agree"
    return f"of {counted(len(others), 'other scoring')} {same} {agree} ({'; '.join(each)})"


def sentences(verdicts: pd.DataFrame, candidates: pd.DataFrame, leaders: pd.DataFrame, margin: float) -> list[str]:
    """Every control against its expectation, by the scoring and ablation that decide, and how many of the others
    agree."""
    if verdicts.empty:
        return [NOT_RUN]
    ablation, fall = verdicts[["ablation", "fall"]].iloc[0]
    out = [
        f"Ablated by `{ablation}`, the slice takes {fall:.2f} logits from the ordinary answer, against the candidates' "
        f"mean (the scale of what follows, no interval). The margin of silence is {margin:.0%} of that. This scoring, "
        f"{named(verdicts.iloc[0])}, is the primary one: verdicts, figure and claims go by it."
    ]
    verdicts, uncounted = without_blind(verdicts, margin)
    out += uncounted
    for control, expected in EXPECTATIONS.items():
        own = verdicts[verdicts["control"] == control]
        if own.empty:
            out.append(f"Control {control}: not run, there were no prompts or heads for it.")
            continue
        first = own.iloc[0]
        good = {True: "met", False: "not met"}.get(first["met"], "not decided")
        rows = candidates[candidates["control"] == control].head(first["candidates"])
        few = ", too few for a test" if rows["low"].isna().any() else ""
        power = (
            ""
            if pd.isna(first["power"])
            else f" Were there nothing, silence would have been shown with a probability of {first['power']:.0%}."
        )
        far = rows.loc[rows["estimate"].abs().idxmax()]
        out.append(
            f"Control {control} ({first['prompts']} prompts{few}): {first['verdict']}, the expectation {good}. "
            f"Expected "
            f"was: {expected}.{power} The largest change is that of {far['candidate']}, {of_row(far)} logits; "
            f"{agreeing(own)}."
        )
    others = leaders[leaders["control"] != "ordinary"].sort_values("estimate")
    ends = " to ".join(f"{of_row(row)} ({row.control})" for row in others.iloc[[0, -1][: len(others)]].itertuples())
    out.append(
        "By name, a control's candidates can rise in one prompt and fall in the next. The candidate that leads a "
        f"control's prompt before the ablation falls, against the candidates' mean, by {ends} logits."
    )
    return out


def verdict_table(verdicts: pd.DataFrame, digits: int = 3) -> pd.DataFrame | Markdown:
    """The verdicts for the page; an empty place where nothing was expected or tested."""
    if verdicts.empty:
        return Markdown(NOT_RUN)
    met = verdicts["met"].map({True: "met", False: "not met"})
    expected = met.where(met.notna(), "not decided").where(verdicts["clusters"] >= MINIMUM_CLUSTERS, TOO_FEW)
    expected = expected.where(verdicts["control"].isin([*EXPECTATIONS]), "")
    out = verdicts.assign(expectation=expected).drop(columns="met")
    numbers = {name: out[name].map(lambda x: "" if pd.isna(x) else f"{x:.{digits}f}") for name in ("p", "power")}
    return out.assign(**numbers, fall=out["fall"].round(digits))
