"""Step 01 on its page: does the model do the task, and which pairs are fair?"""

from __future__ import annotations

from typing import Any

import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from pipeline.params import Shared
from pipeline.step import Step
from report import plots
from report.words import about_model, finished, interval, listed
from steps.baselines.measure import Measured, accuracies, people_of

CAPTIONS = {
    "accuracy": "Accuracy per template among the candidates, on people drawn before any selection; Wilson "
    "intervals. The dashed line is chance for five supersets (odd-one-out: one third).",
}


# --- figures and tables ---


def about(step: Step) -> Markdown:
    """The model, and who it is asked about."""
    people = people_of(step)
    return Markdown(f"Model `{step.params.model}`; {len(people)} people, {people['profession'].nunique()} professions.")


def accuracy_figure(m: Measured) -> Figure:
    """Accuracy per template, by task."""
    return plots.accuracy_bars(m.accuracy, 1 / 5, "template", by="task")


def supersets_figure(step: Step, m: Measured) -> Figure | None:
    """Accuracy per superset on the profile's template."""
    asked = m.records[(m.records["template"] == step.params.template) & (m.records["superset"] != "")]
    if asked.empty:
        return None
    return plots.accuracy_bars(accuracies(asked, step.params, ["task", "superset"]), 1 / 5, "superset")


def commonest(words: pd.Series, count: int) -> str:
    """The commonest words with their shares."""
    top = words.value_counts(normalize=True).head(count)
    return ", ".join(f'"{word}" {share:.0%}' for word, share in top.items())


def free_speech(m: Measured) -> pd.DataFrame:
    """What the model says by itself, template by template."""
    by_template = m.records.groupby("template", sort=False)
    tokens = by_template["top_token"].agg(lambda words: commonest(words, 4))
    columns = {
        "candidate_probability": "probability of the supersets",
        "label_probability": "probability of profession labels",
    }
    answers = by_template[list(columns)].mean().round(2).astype(object).fillna("")
    return answers.rename(columns=columns).assign(**{"top tokens": tokens})


def drops_table(m: Measured) -> pd.DataFrame | Markdown | None:
    """How many people or quads each filter dropped and left, in order; else why there are no pairs."""
    if m.drops:
        return pd.DataFrame(m.drops)[["filter", "unit", "dropped", "left"]]
    return Markdown(m.failed) if m.failed else None


def fame_figure(m: Measured) -> Figure | None:
    """Fame of the two sides of each pair, where it is known."""
    known = m.pairs is not None and "fame_clean" in m.pairs
    return plots.fame_match(m.pairs, "fame (nats)") if known else None


def margins_figure(m: Measured) -> Figure | None:
    """The clean answer's margin in both prompts of each pair."""
    if m.pairs is None:
        return None
    axes = ("metric_clean", "metric_corrupt", "clean margin (logits)", "corrupt margin (logits)")
    return plots.agreement(m.pairs, *axes, by="half", identity=False)


# --- findings ---


def placebo_sentences(m: Measured) -> list[str]:
    """The placebo pairs of each attribute: how many, how many were dropped, or why there are none."""
    out = []
    for about in m.about_placebo:
        if about["why"]:
            out.append(f"There are no placebo pairs that differ in {about['attribute']}: {about['why']}.")
            continue
        quads = m.placebo[m.placebo["attribute"] == about["attribute"]].groupby("quad_id").first()
        kept = quads[quads["kept"]]
        halves = listed(f"{count} {half}" for half, count in kept["half"].value_counts().sort_index().items())
        out.append(
            f"Placebo: {len(quads)} quads of people of one superset who differ in {about['attribute']}, none in a "
            "quad of the task. The gap between that attribute's answers is above the noise and of the right sign in "
            f"{len(kept)} ({halves}), {kept['gap'].mean():.2f} logits on average; {len(quads) - len(kept)} are "
            "dropped, and stay in the file."
        )
    return out


def abilities(accuracy: pd.DataFrame, pairs: pd.DataFrame | None, params: Shared) -> dict[str, dict]:
    """Which tasks the model can do: accuracy above chance, and, for the profile's own task, enough solved pairs."""
    out = {}
    for row in accuracy.itertuples():
        if row.task == params.task and row.template != params.template:
            continue
        value = interval(row.estimate, row.low, row.high)
        why = f"accuracy {value} on {row.prompts} prompts of template `{row.template}`, chance {row.chance:.2f}"
        able, why = row.above, why if row.above else f"{why}: not above chance with {params.level:.0%} confidence"
        if row.task == params.task and row.above:
            count = 0 if pairs is None else len(pairs)
            able = count >= params.min_pairs
            why += f"; {count} solved pairs" + ("" if able else f", fewer than the {params.min_pairs} asked for")
        known = out.get(row.task)
        if known is None or (able and not known["able"]):
            out[row.task] = {"able": bool(able), "why": why}
    return out


def findings(step: Step, m: Measured) -> dict[str, Any]:
    """The findings of step 01: what the model can do, what it says itself, and the pairs that are left."""
    params, sentences = step.params, []
    able = abilities(m.accuracy, m.pairs, params)
    for task, verdict in able.items():
        can = "can do" if verdict["able"] else "cannot do"
        sentences.append(f"The model {can} `{task}`: {verdict['why']}.")
    own = m.records[(m.records["task"] == params.task) & (m.records["template"] == params.template)]
    said = own["top_token"].value_counts(normalize=True).head(5)
    words = [f'"{token}" ({share:.0%})' for token, share in said.items()]
    sentences.append(f"Its own top tokens on `{params.template}` are {listed(words)}.")
    if own["label_probability"].notna().any():
        sentences.append(
            f"It gives the supersets a total probability of {own['candidate_probability'].mean():.2f} and the "
            f"single-token profession labels {own['label_probability'].mean():.2f}, on average over prompts."
        )
    if m.pairs is not None:
        quads = m.pairs.groupby("half")["quad_id"].nunique()
        gap = (m.pairs["fame_clean"] - m.pairs["fame_corrupt"]).abs().max() if "fame_clean" in m.pairs else None
        fame = "" if gap is None else f" The fame of the two sides of a pair differs by {gap:.2f} nats at most."
        sentences.append(
            f"{len(m.pairs)} pairs in {listed(f'{count} {half} quads' for half, count in quads.items())} are left; "
            f"every one has a margin above zero in the clean prompt and below zero in the corrupt one.{fame}"
        )
    sentences += placebo_sentences(m)
    if m.failed:
        sentences.append(m.failed)
    main = able.get(params.task, {"able": False})
    found = {
        "model": about_model(step),
        "task": params.task,
        "able": able,
        "pairs": 0 if m.pairs is None else len(m.pairs),
        "drops": m.drops,
        "accuracy": m.accuracy.to_dict("records"),
        "sentences": sentences,
        "headline": sentences[: len(able)] if main["able"] else sentences,
    }
    return finished(step, found, {"accuracy": accuracy_figure(m)}, CAPTIONS)
