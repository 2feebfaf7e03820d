"""The chapter on validation: what the steps make of models whose circuits are known. No model, no torch.

1. `fields` fills `book/validation.md` from what `bench/validation.py` and `bench/planted_faults.py` have measured.
2. `by_method` and `by_option` are the models of no noise: precision and recall, over all of them and option by option.
3. `noise_figure` and `fails_from`: at which noise each method starts to fail. `nothing`: models without a circuit.
4. `beside`: where this book's own model is a planted one, its truth and what was found, side by side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import style

from report import plots, scores
from report.scale import figure, joined, measured_on, paragraph, seconds, stale, table
from report.words import counted, listed

COMMANDS = {"validation": "make validation", "planted_faults": "python -m bench.planted_faults"}
HELD_OUT = 110  # seeds from here on were first run when nothing was to be mended any more
# Models of no circuit: what they are called, and their options.
NOTHING = {kind: f"no_circuit={kind}" for kind in ("constant", "random", "lookup")}
NOTHING |= {"lookup of the second": "no_circuit=lookup,lookup=second"}
PLAIN = "–"

Found = Mapping[str, Any]


def fields(results: Path, to: Path, own: Path) -> dict[str, str]:
    """Every section of the chapter as MyST; `own` is the results folder of the book's profile."""
    out = dict.fromkeys(("summary", "methods", "options", "noise", "nothing", "failures"), "")
    path = results / "validation.json"
    if path.is_file():
        out |= sections(json.loads(path.read_text(encoding="utf-8")), to)
    else:
        out["summary"] = f"Not measured yet: run `{COMMANDS['validation']}`."
    return out | {"faults": joined(faults(results), mutants(results)), "beside": beside(own)}


def sections(found: Found, to: Path) -> dict[str, str]:
    """The sections that rest on `validation.json`."""
    asked = scored(found["runs"])
    quiet = asked[asked["noise"] == 0]
    noisy = asked[asked["series"]]
    return {
        "summary": summary(found, quiet),
        "methods": by_method(quiet, noisy),
        "options": by_option(quiet),
        "failures": failures(quiet),
        "noise": joined(noise_sentence(found["runs"]), figure(noise_figure(noisy), to, "noise", CAPTION, "validation")),
        "nothing": nothing(found["runs"]),
    }


CAPTION = """Precision (blue) and recall (orange) of each method as all weights that have no role in the circuit write
    noise of a growing size into the residual stream: the mean over the models of the series. Where a model no longer
    does its task nothing is scored, and the line ends."""


def scored(runs: Sequence[Found]) -> pd.DataFrame:
    """One row per score of a planted circuit: group, spec, noise, whether the run is of the series of noise, and what
    `report.scores.Score` holds."""
    rows = [
        {key: run[key] for key in ("group", "spec", "noise", "series", "seed")} | score
        for run in runs
        if run["group"] not in NOTHING
        for score in run["scores"]
    ]
    return pd.DataFrame(rows)


def summary(found: Found, quiet: pd.DataFrame) -> str:
    """How much was measured, where, and how much of it is right."""
    circuits = [run for run in found["runs"] if run["group"] not in NOTHING]
    seeds, options = {run["seed"] for run in circuits}, {run["group"] for run in circuits}
    right, wrong = int(quiet["right"].sum()), sorted(set(quiet.loc[~quiet["right"].astype(bool), "method"]))
    left = f"Not always right: {listed(wrong)}." if wrong else "Every method was right on every one."
    whole = found["planned"] - len(found["runs"])
    return joined(
        stale(found, COMMANDS["validation"]),
        paragraph(f"""{counted(len(circuits), "model")} with a planted circuit, of {counted(len(seeds), "seed")} and
            {counted(len(options), "kind")}, and {counted(len(found["runs"]) - len(circuits), "model")} without one went
            through all steps in {seconds(found["seconds"])} on one thread, at commit
            `{(found["commit"] or "none")[:7]}`{" with changes" * bool(found["dirty"])}.
            {measured_on(found)} {f"Still to run: {whole} of {found['planned']}." if whole > 0 else ""}"""),
        paragraph(f"""Without noise, {right} of {counted(len(quiet), "answer")} ({right / max(len(quiet), 1):.0%}) are
            exactly the planted truth: every item found that must be, none that is not there, each number within its
            tolerance. {left}"""),
        paragraph(f"""All of their seeds, from {HELD_OUT} on, were first run when nothing was to be mended any more:
            methods and scoring were mended while models of other seeds were looked at."""),
    )


def two(value: float | None) -> str:
    return PLAIN if value is None or pd.isna(value) else f"{value:.2f}".rstrip("0").rstrip(".")


def by_method(quiet: pd.DataFrame, noisy: pd.DataFrame) -> str:
    """Methods by precision, recall, error and the noise from which they fail."""
    lines = []
    for method, rows in quiet.groupby("method", sort=False):
        worst = rows["error"].abs().max()
        lines.append(
            [method, f"{int(rows['right'].sum())} of {len(rows)}", two(rows["precision"].mean())]
            + [two(rows["recall"].mean()), PLAIN if pd.isna(worst) else f"{worst:.2g}", fails_from(noisy, method)]
        )
    head = ["method", "models it was right on", "precision", "recall", "largest error", "fails from noise"]
    return table(head, lines)


def fails_from(noisy: pd.DataFrame, method: str) -> str:
    """The smallest noise of the series at which the method is wrong on any model."""
    rows = noisy[noisy["method"] == method]
    if rows.empty:
        return PLAIN
    wrong = rows.loc[~rows["right"].astype(bool), "noise"]
    return f"{wrong.min():g}" if len(wrong) else f"above {rows['noise'].max():g}"


def by_option(quiet: pd.DataFrame) -> str:
    """Methods by the models' options: precision / recall, or the error of a number, means over models."""
    groups, lines = list(dict.fromkeys(quiet["group"])), []
    for method, rows in quiet.groupby("method", sort=False):
        cells = []
        for group in groups:
            own = rows[rows["group"] == group]
            if own.empty:
                cells.append(PLAIN)
            elif own["precision"].notna().all():
                cells.append(f"{two(own['precision'].mean())} / {two(own['recall'].mean())}")
            else:
                cells.append("none" if own["error"].isna().any() else f"{own['error'].abs().max():.1g}")
        lines.append([method, *cells])
    return table(["method", *groups], lines)


def failures(quiet: pd.DataFrame) -> str:
    """Every wrong answer on a model without noise."""
    wrong = quiet[~quiet["right"].astype(bool)]
    if wrong.empty:
        return "None."
    lines = [
        [f"`{row.spec}`", row.method, *(shown(one) for one in difference(row.wanted, row.found))]
        for row in wrong.itertuples()
    ]
    return table(["model", "method", "there, not found", "found, not there"], lines)


def difference(wanted: Any, found: Any) -> tuple[Any, Any]:
    """What was missed and what was found beside it; of numbers, both."""
    if not isinstance(wanted, list):
        return wanted, found
    return [one for one in wanted if one not in found], [one for one in found if one not in wanted]


def shown(value: Any) -> str:
    """Items, the first of many, or a number."""
    if not isinstance(value, list):
        return PLAIN if value is None else f"{value:.4g}"
    return ", ".join(value[:8]) + f" and {len(value) - 8} more" * (len(value) > 8) or PLAIN


def noise_sentence(runs: Sequence[Found]) -> str:
    """Which noise was tried, and where models stop doing their task."""
    series = [run for run in runs if run["series"]]
    noises = sorted({run["noise"] for run in series})
    undone = sorted({run["noise"] for run in series if not run["able"]})
    told = f"From {undone[0]:g} on a model no longer does its task: nothing is scored." if undone else ""
    later = sorted({run["commit"][:7] for run in series if run.get("commit")})  # of runs that were made apart
    told += f" These models were measured at commit {listed(f'`{commit}`' for commit in later)}." if later else ""
    return paragraph(f"""Noise of {listed(f"{noise:g}" for noise in noises)} was tried, on
        {counted(len({run["seed"] for run in series}), "seed")}. {told}""")


def noise_figure(noisy: pd.DataFrame) -> plots.Figure:
    """A panel per method: precision and recall against noise."""
    means = noisy.dropna(subset="precision").groupby(["method", "noise"], sort=False)[["precision", "recall"]].mean()
    methods = list(dict.fromkeys(means.index.get_level_values("method")))
    noises = sorted(set(means.index.get_level_values("noise")))
    rows = max(1, -(-len(methods) // 4))
    with style.context(plots.STYLE):
        drawn = plots.Figure(figsize=(plots.WIDTH, 1.5 * rows + 0.5))
        panels = list(drawn.subplots(rows, 4, squeeze=False, sharex=True, sharey=True).flat)
        for axes, method in zip(panels, methods, strict=False):
            own = means.loc[method].sort_index()
            at = [noises.index(noise) for noise in own.index]
            axes.plot(at, own["precision"], "o-", color=plots.BLUE, label="precision")
            axes.plot(at, own["recall"], "s--", color=plots.VERMILION, label="recall")
            axes.set_title(method, fontsize=8)
            axes.set_xticks(range(len(noises)), [f"{noise:g}" for noise in noises], fontsize=7)
            axes.set_ylim(-0.05, 1.05)
        for axes in panels[len(methods) :]:
            axes.remove()
        drawn.supxlabel("noise (size of what all else writes)", fontsize=9)
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return drawn


def nothing(runs: Sequence[Found]) -> str:
    """Models without a circuit: what each step picks that is not there."""
    steps = list(dict.fromkeys(step for step, _, _ in scores.METHODS.values()))
    lines, total = [], 0
    for kind in NOTHING:
        own = [run for run in runs if run["group"] == kind]
        if not own:
            continue
        wrong = dict.fromkeys(steps, 0)
        for score in (score for run in own for score in run["scores"]):
            if isinstance(score["found"], list):
                wrong[score["step"]] += len(set(score["found"]) - set(score["wanted"]))
        total += sum(wrong.values())
        done = sum(run["able"] for run in own)
        counts = (str(count) if done or count else "not run" for count in wrong.values())
        lines.append([kind, str(len(own)), str(done), *counts])
    if not lines:
        return ""
    said = "None was found" if not total else f"{counted(total, 'item')} {'was' if total == 1 else 'were'} found"
    head = ["model", "models", "do the task", *(step.replace("_", " ") for step in steps)]
    refused = """Where step 01 finds that a model does not do the task, the steps after it do not run: that verdict is
        then all that is tested."""
    return joined(paragraph(f"{said} in them that is not there. {refused}"), table(head, lines))


def faults(results: Path) -> str:
    """Defects put into the tool on purpose, and the check that stopped each."""
    path = results / "planted_faults.json"
    if not path.is_file():
        return ""
    rows = json.loads(path.read_text(encoding="utf-8"))
    rows = rows["faults"] if isinstance(rows, Mapping) else rows
    lines = [[row["defect"], row["check"] or "**none**", said(row["message"])] for row in rows]
    caught = sum(bool(row["check"]) for row in rows)
    return joined(
        "## Faults in the tool",
        paragraph(f"""Each of these defects was put into the tool by a test, and the run must then stop with an error of
            the tool's own. {caught} of {len(rows)} do; the table is written only where all tests pass."""),
        table(["defect", "the check that stops it", "what it says"], lines),
    )


def mutants(results: Path) -> str:
    """Small changes of the code that measures: how many the tests notice, and why the others may live."""
    path = results / "mutants.json"
    if not path.is_file():
        return ""
    modules = json.loads(path.read_text(encoding="utf-8"))
    lines, left = [], []
    for name, one in modules.items():
        tried = one["killed"] + len(one["survivors"])
        lines.append([f"`lib/{name}.py`", f"{one['mutants']:,}", str(tried), str(one["killed"]), f"{one['score']:.2f}"])
        left += [[f"`{name}`", said(mutant["change"]), mutant["why"] or PLAIN] for mutant in one["survivors"]]
    folded = table(["module", "change", "why no test notices it"], left)
    return joined(
        "### Mutants",
        paragraph("""One small change of the code at a time, of a sample of all that there could be: a change is killed
            if the fast tests of its module fail. So few are tried that a share killed could as well be several
            hundredths lower; those that live were looked at one by one, and some of them killed by new tests."""),
        table(["module", "possible changes", "tried", "killed", "share killed"], lines),
        f"::::{{dropdown}} {counted(len(left), 'change')} that no fast test notices\n\n{folded}\n::::" if left else "",
    )


def said(message: str | None) -> str:
    """A message as code in a table."""
    return "`" + " ".join(message.split()).replace("`", "'").replace("|", "\\|") + "`" if message else PLAIN


def beside(results: Path) -> str:
    """This book's own truth and findings; nothing where its model is no planted one."""
    if not (results / "truth.json").is_file():
        return ""
    truth, found = scores.load(results)
    head, spec = "## This book's own model", truth["spec"]
    if not scores.able(found["coarse_sweep"]):
        return joined(head, f"`{spec}`: the model does not do its task, so nothing is scored.")
    own = scores.score(truth, found)
    lines = [[one.method, shown(one.wanted), shown(one.found), "yes" if one.right else "**no**"] for one in own]
    sites = [
        [scores.name_of(site), site["role"], f"`{site['position']}`"]
        + [two(of and of["mean"]) for of in (site["necessity"].get("counterfactual"), site["recovery"])]
        for site in truth["sites"]
    ]
    return joined(
        head,
        paragraph(f"""`{spec}`: {sum(one.right for one in own)} of {len(own)} answers are the planted truth, whose gap
            is {truth["gap"]["mean"]:.3g} logits."""),
        table(["method", "planted", "found (of what is scored)", "right"], lines),
        "The planted sites, with what each takes away and brings back by the construction (logits):",
        table(["site", "role", "at", "counterfactual damage", "recovery"], sites),
    )
