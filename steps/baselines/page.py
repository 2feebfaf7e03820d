"""Step 01 on its page: does the model do the task, and which pairs are fair?"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lib import stats
from pipeline.params import Shared
from pipeline.step import Step
from report.words import about_model, interval, listed
from steps.baselines.measure import CHANCE

CAPTIONS = {
    "baselines-accuracy": "Accuracy per template among the candidates, on people drawn before any selection; Wilson "
    "intervals. The dashed line is chance for five supersets (odd-one-out: one third).",
}


def accuracies(frame: pd.DataFrame, params: Shared, by: list[str]) -> pd.DataFrame:
    """Share of prompts answered right, with Wilson intervals; each item is a unit (its people are in no other)."""
    rows = []
    for key, part in frame.groupby(by, sort=False):
        units = part.groupby("item")["correct"].agg(["sum", "count"])
        span = stats.proportion_interval(units["sum"], units["count"], params)
        chance = CHANCE[part["task"].iloc[0]]
        test = stats.above_chance(units["sum"], units["count"], chance, params.level)
        numbers = {"estimate": span.estimate, "low": span.low, "high": span.high, "prompts": len(part)}
        rows.append(dict(zip(by, key, strict=True)) | numbers | {"chance": chance, "above": test.above, "p": test.p})
    return pd.DataFrame(rows)


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


def drops_table(drops: Sequence[dict]) -> pd.DataFrame:
    """How many people or quads each filter dropped and left, in order."""
    return pd.DataFrame(drops)[["filter", "unit", "dropped", "left"]]


def baselines(
    step: Step, frame: pd.DataFrame, accuracy: pd.DataFrame, pairs: pd.DataFrame | None, drops: list[dict], failed: str
) -> dict:
    """The findings of step 01: what the model can do, what it says itself, and the pairs that are left."""
    params, sentences = step.params, []
    able = abilities(accuracy, pairs, params)
    for task, verdict in able.items():
        can = "can do" if verdict["able"] else "cannot do"
        sentences.append(f"The model {can} `{task}`: {verdict['why']}.")
    own = frame[(frame["task"] == params.task) & (frame["template"] == params.template)]
    said = own["top_token"].value_counts(normalize=True).head(5)
    words = [f'"{token}" ({share:.0%})' for token, share in said.items()]
    sentences.append(f"Its own top tokens on `{params.template}` are {listed(words)}.")
    if own["label_probability"].notna().any():
        sentences.append(
            f"It gives the supersets a total probability of {own['candidate_probability'].mean():.2f} and the "
            f"single-token profession labels {own['label_probability'].mean():.2f}, on average over prompts."
        )
    if pairs is not None:
        quads = pairs.groupby("half")["quad_id"].nunique()
        gap = (pairs["fame_clean"] - pairs["fame_corrupt"]).abs().max() if "fame_clean" in pairs else None
        fame = "" if gap is None else f" The fame of the two sides of a pair differs by {gap:.2f} nats at most."
        sentences.append(
            f"{len(pairs)} pairs in {listed(f'{count} {half} quads' for half, count in quads.items())} are left; "
            f"every one has a margin above zero in the clean prompt and below zero in the corrupt one.{fame}"
        )
    if failed:
        sentences.append(failed)
    main = able.get(params.task, {"able": False})
    return {
        "model": about_model(step),
        "task": params.task,
        "able": able,
        "pairs": 0 if pairs is None else len(pairs),
        "drops": drops,
        "accuracy": accuracy.to_dict("records"),
        "sentences": sentences,
        "headline": sentences[: len(able)] if main["able"] else sentences,
        "figures": [],
    }
