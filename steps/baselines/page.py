"""Step 01 on its page: does the model do the task, and which pairs are fair?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from lib import data, effects, stats
from lib.questions import Question
from lib.tasks import SLOTS
from pipeline.params import Shared
from pipeline.population import people_of
from pipeline.step import Step
from report import plots
from report.words import about_model, counted, extremes, finished, have, interval, is_are, listed, number_word, of_row
from steps.baselines.measure import Measured, accuracies

DRAWN = "drawn before any selection"
SOLVED = "kept and solved"
CAPTIONS = {
    "accuracy": f"Accuracy per template among the candidates, on people {DRAWN}; Wilson intervals. Dashed: "
    "chance, bar by bar.",
}


# --- figures and tables ---


def about(step: Step) -> Markdown:
    """The model, and who it is asked about."""
    people, given = people_of(step), step.params.pairs_file
    own = "" if given is None else f"the pairs of `{Path(given).name}`, and beside them "
    table = f"{len(people)} people, {people['profession'].nunique()} professions"
    return Markdown(f"Model `{step.params.model}`; {own}{table}.")


def accuracy_figure(m: Measured) -> Figure:
    """Accuracy per template, by task."""
    return plots.accuracy_bars(m.accuracy, "template", by="task")


def centred(asked: pd.DataFrame, supersets: Sequence[str]) -> pd.Series:
    """Whether the right word comes first once each word's mean over prompts, every superset counting alike, is off.

    A model prefers some words whatever the names. With as many prompts of each superset, taking a prompt's own logits
    out of the mean would scale what is left and change no order.
    """
    logits, own = np.stack(asked["logits"].to_list()).astype(float), asked["answer"].map(supersets.index).to_numpy()
    logits -= np.mean([logits[own == answer].mean(0) for answer in np.unique(own)], axis=0)
    return pd.Series(logits.argmax(1) == own, index=asked.index)


def ability(m: Measured, params: Shared) -> pd.DataFrame:
    """How the profile's template is answered, by superset and, first, by all: a row for each `scoring`.

    Scorings: the right word is first of the candidates, `raw` or `centred`, or the `first word` of the vocabulary.
    Beside them: its median `place` there (1 is first), its mean `probability`, and that of the candidates together.
    """
    asked = m.records[(m.records["template"] == params.template) & (m.records["superset"] != "")]
    if asked.empty:
        return pd.DataFrame()
    scored = {
        "raw": asked["correct"],
        "centred": centred(asked, params.topic.supersets),
        "first word": asked["rank"] == 0,
    }
    rows = []
    for name, right in scored.items():
        for whole in (asked.assign(superset="all"), asked):
            rows.append(accuracies(whole.assign(correct=right), params, ["task", "superset"]).assign(scoring=name))
    table = pd.concat(rows, ignore_index=True)
    numbers = ["probability", "candidate_probability"]
    means = pd.concat([whole.groupby("superset")[numbers].mean() for whole in (asked.assign(superset="all"), asked)])
    places = pd.concat([whole.groupby("superset")["rank"].median() for whole in (asked.assign(superset="all"), asked)])
    return table.join(means, on="superset").assign(place=table["superset"].map(places + 1))


def supersets_figure(step: Step, m: Measured) -> Figure | None:
    """Accuracy per superset on the profile's template, raw and centred."""
    table = ability(m, step.params)
    if table.empty:
        return None
    of_candidates = table["scoring"] != "first word"  # which comes first of the whole vocabulary
    return plots.accuracy_bars(table.assign(chance=table["chance"].where(of_candidates)), "superset", by="scoring")


def ability_table(step: Step, m: Measured) -> pd.DataFrame | None:
    """Every number of `ability`, a row for each superset."""
    table = ability(m, step.params)
    if table.empty:
        return None
    order = table["superset"].unique()
    shares = table.assign(share=[of_row(row) for row in table.itertuples()])
    shares = shares.pivot(index="superset", columns="scoring", values="share").loc[order, table["scoring"].unique()]
    kept = {
        "prompts": "prompts",
        "place": "median place",
        "candidate_probability": f"probability of the {number_word(len(step.params.topic.supersets))}",
    }
    rest = table.drop_duplicates("superset").set_index("superset")[list(kept)].rename(columns=kept).round(3)
    return shares.join(rest)


def selection(m: Measured, params: Shared) -> pd.DataFrame:
    """The gap (logits, mean over quads) before selection, of the pairs that are kept or given, and of some of those.

    `right`: share of quads whose gap is above zero; `solved`: share of quads whose every pair is answered.
    """
    if m.pairs is None:
        return pd.DataFrame()
    sets = {"kept": m.pairs, "kept and solved": m.pairs[m.pairs["solved"]]}
    if m.given:
        kept = m.pairs[m.pairs["kept"]]
        sets = {"given": m.pairs, "a gap above the noise": kept, "that and solved": kept[kept["solved"]]}
    if m.unselected is not None:
        matched, topic = m.pairs[m.pairs["matched"]], params.topic
        sets = {"before any selection": m.unselected} | sets
        sets |= {"kept and matched": matched} if topic.match else {}
        sets |= {alike_too(topic): matched[matched["same_gender"]]} if topic.match_also else {}
    rows = []
    for name, pairs in sets.items():
        own = pairs.assign(gap=pairs["logit_diff_clean"] - pairs["logit_diff_corrupt"]).groupby("quad_id")
        gaps, answered = own["gap"].mean(), own["solved"].all()
        span = (
            stats.mean_interval(gaps, params) if len(gaps) else stats.Interval(np.nan, None, None, params.level, 0, "")
        )
        numbers = {"quads": len(gaps), "pairs": len(pairs), "right": (gaps > 0).mean(), "solved": answered.mean()}
        rows.append({"pairs of": name, "estimate": span.estimate, "low": span.low, "high": span.high} | numbers)
    return pd.DataFrame(rows)


def alike_too(topic: Question) -> str:
    """What quads are called that are matched in everything that they are matched in where they can be."""
    return f"kept, matched, of one {listed(topic.match_also)}"


def selection_table(step: Step, m: Measured) -> pd.DataFrame | None:
    """`selection` in words."""
    table = selection(m, step.params)
    if table.empty:
        return None
    words = {"right": "share of quads with a gap above 0", "solved": "share of quads that are solved"}
    gaps = [of_row(row) for row in table.itertuples()]
    shown = table[["pairs of", "quads", "pairs"]].assign(**{"mean gap (logits)": gaps})
    return shown.join(table[list(words)].round(2).rename(columns=words)).set_index("pairs of")


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
        by_quad = m.placebo[m.placebo["attribute"] == about["attribute"]].groupby("quad_id")
        quads = by_quad[["kept", "half"]].first().assign(gap=by_quad["gap"].mean())
        kept = quads[quads["kept"]]
        out.append(
            f"Placebo: {counted(len(quads), 'quad')} of people of one superset differ in {about['attribute']}; they "
            "share no person with a quad of the task. The gap between that attribute's answers is above the noise and "
            f"of the right sign in {len(kept)} of {len(quads)} ({listed(halves(kept.reset_index()))}); the others are "
            f"dropped, and stay in the file. It is {kept['gap'].mean():.2f} logits on average (no interval: it "
            "decides nothing)."
        )
    return out


def no_gap(m: Measured, table: pd.DataFrame, params: Shared) -> str:
    """Why the gap of pairs that nobody selected by it is not surely above the model's noise; "" where it is, or where
    there are none. `table` is `selection`. (Of pairs kept for their gap, it is above zero whatever the model does.)"""
    before = {row["pairs of"]: row for _, row in table.iterrows()}
    row = before.get("given", before.get("before any selection"))
    if row is None and params.task == "odd_one_out" and m.pairs is not None and (gaps := odd_gaps(m.records)):
        span = stats.mean_interval(gaps, params)
        row = pd.Series({"estimate": span.estimate, "low": span.low, "high": span.high, "quads": span.n})
    if row is None or (row["estimate"] if pd.isna(row["low"]) else row["low"]) > params.floor:
        return ""
    return (
        f"the gap between clean and corrupt prompts of {int(row['quads'])} quads that were not selected by it, "
        f"{of_row(row)} logits, is not surely above the model's noise ({params.floor:g})"
    )


def odd_gaps(frame: pd.DataFrame) -> list[float]:
    """The gap (logits) of each odd-one-out item that was asked on both sides, none of them selected."""
    out = []
    for _, rows in frame[frame["task"] == "odd_one_out"].groupby("item", sort=False):
        if len(rows) == 2:
            answer, other = (SLOTS.index(slot) for slot in rows["answer"])
            lead = [logits[answer] - logits[other] for logits in rows["logits"]]
            out.append(float(lead[0] - lead[1]))
    return out


def abilities(accuracy: pd.DataFrame, pairs: pd.DataFrame | None, params: Shared, flat: str = "") -> dict[str, dict]:
    """Which tasks the model can do: accuracy above chance, and, for the profile's own task, a gap above zero (`flat`
    says why it is not: `no_gap`) and enough pairs with one."""
    out = {}
    for row in accuracy.itertuples():
        if row.task == params.task and row.template != params.template:
            continue
        value = f"{interval(row.estimate, row.low, row.high)} ({row.prompts} prompts of template `{row.template}`)"
        other = params.pairs_file is not None and (row.task == "odd_one_out") != (params.task == "odd_one_out")
        whose = " (not of the given pairs, whose names do not fit it)" * other
        why = f"accuracy {value}{whose} against a chance of {row.chance:.2f}"
        able, why = row.above, why if row.above else f"{why}: not above chance with {params.level:.0%} confidence"
        if able and row.task == params.task and flat:
            able, why = False, f"{why}. But {flat}"
        elif row.task == params.task and row.above:
            count = 0 if pairs is None else len(pairs)
            what = f"{count} pairs are left, whose quads have a gap of the right sign"
            if pairs is not None and "kept" in pairs:
                count = int(pairs["kept"].sum())
                what = f"{count} of the {len(pairs)} given pairs have a gap of the right sign"
            able = count >= params.min_pairs
            few = f", fewer than the {params.min_pairs} asked for (min_pairs): give more people, or a smaller min_pairs"
            why += f". {what}" + ("" if able else few)
        known = out.get(row.task)
        if known is None or (able and not known["able"]):
            above = bool(row.above and not (flat and row.task == params.task))
            out[row.task] = {"able": bool(able), "above": above, "why": why}
    return out


def ability_sentences(table: pd.DataFrame, topic: Question, given: str = "") -> dict[str, str]:
    """How well the classes' words are told apart, one by one, and how far they are from what the model would say."""
    rows = {(row.superset, row.scoring): row for row in table.itertuples()}
    raw, centred, first = (rows["all", name] for name in ("raw", "centred", "first word"))
    names = [name for name in table["superset"].unique() if name != "all"]
    five = number_word(len(topic.supersets))
    classes = pd.DataFrame([rows[name, "raw"] for name in names]).assign(name=[topic.plural(name) for name in names])
    few = " (too few prompts of some for an interval)" * bool(classes["low"].isna().any())
    whose = f"names are those of `{given}`" if given else f"names were {DRAWN}"
    prompts = f"{raw.prompts} prompts, whose {whose}"
    says = (
        f"so what it says next is most often another word, and what is measured here is which of the {five} it prefers"
        if first.estimate < 0.5
        else "so the right word is what it says next most often"
    )
    return {
        "five words": f"Among the {five} words the right one comes first in {of_row(raw)} "
        f"({prompts}), against {1 / len(topic.supersets):.2f} by chance. Each word's mean over people taken off, it "
        f"comes first in {of_row(centred)}.",
        "classes": f"Class by class, the right word comes first in {extremes(classes, 'name')}; the table has every "
        f"class{few}.",
        "vocabulary": f"In the whole vocabulary the right word comes first in {of_row(first)} of these prompts, "
        f"{says}. Its place is {raw.place:g} in the median, and the {five} words together have "
        f"{raw.candidate_probability:.0%} of the probability.",
    }


def halves(pairs: pd.DataFrame) -> list[str]:
    """How many quads each half has: "24 discovery quads"."""
    return [counted(own["quad_id"].nunique(), f"{half} quad") for half, own in effects.in_halves(pairs)]


def places(rows: pd.DataFrame) -> str:
    """Where rows of a pairs_file stand in it, the first twenty by number."""
    word = "line" if "line" in rows else "row"
    shown = [*rows[word].head(20), *[f"{len(rows) - 20} more"] * (len(rows) > 20)]
    return f"{word}{'s' * (len(rows) > 1)} {listed(shown)}"


def given_sentences(m: Measured, table: pd.DataFrame) -> list[str]:
    """How many given pairs there are, how many the model answers, and which have a gap of the wrong sign."""
    pairs, gap = m.pairs, table.set_index("pairs of")
    sizes = halves(pairs)
    by_name = data.clusters(pairs)
    kept, solved = int(pairs["kept"].sum()), int((pairs["kept"] & pairs["solved"]).sum())
    out = [
        f"`{m.given}` gives {counted(len(pairs), 'pair')} ({listed(sizes)}). Pairs of one quad_id or, where the file "
        "has no such column, pairs that share a name are one quad, which counts once in every interval and test. All "
        "of them are asked about here, and later steps sweep them all.",
        f"{counted(kept, 'pair')} {have(kept)} a gap, the clean less the corrupt logit_diff, above the model's noise. "
        f"{solved} of these {is_are(solved)} solved: the right word comes first in the clean prompt, and not in the "
        f"corrupt one. The gap is {of_row(gap.loc['given'])} logits on average.",
    ]
    wrong = pairs[~pairs["kept"] & (pairs["gap"] < 0)]
    if len(wrong):
        out.append(
            f"The gap has the wrong sign in {places(wrong)} of the file: there the answer has less of a lead over "
            "corrupt_answer in the clean prompt than in the corrupt one. See whether the two answers, or the two "
            "sides, have changed places."
        )
    if len(set(by_name)) < len(set(zip(by_name, pairs["quad_id"], strict=True))):
        out.append("Names stand in several quads of the file, so that intervals over quads are too narrow.")
    return out


def pair_sentences(m: Measured, table: pd.DataFrame, topic: Question) -> list[str]:
    """Which pairs are left, and how the gap depends on how they were selected."""
    if m.pairs is None:
        return []
    if m.given:
        return given_sentences(m, table)
    count = len(m.pairs)
    left = (
        f"{counted(count, 'pair')} ({listed(halves(m.pairs))}) {is_are(count)} left: every quad's gap, the clean less "
        "the corrupt logit_diff, is above the model's noise."
    )
    if "fame_clean" in m.pairs:
        apart = (m.pairs["fame_clean"] - m.pairs["fame_corrupt"]).abs().max()
        left += f" No pair's two sides differ in fame by more than {apart:.2f} nats."
    rows, count = table.set_index("pairs of"), table.set_index("pairs of")["quads"]
    solved = count["kept and solved"]
    gaps = [
        f"Their gap is {of_row(rows.loc['kept'])} logits on average. {solved} of {counted(count['kept'], 'quad')} "
        f"{is_are(solved)} solved: every pair has the right word first of all candidates in the clean prompt, and not "
        f"in the corrupt one.{f' The gap of these is {of_row(rows.loc[SOLVED])} logits.' * bool(solved)}"
    ]
    if "before any selection" in rows.index:
        before = rows.loc["before any selection"]
        gaps += [
            f"Before any selection, the gap is {of_row(before)} logits on average "
            f"({counted(count['before any selection'], 'quad')}), and it is above zero in {before.right:.0%} of quads. "
            "The people of the pairs that are kept are, beside that, known to the model by the name alone, and matched "
            "in fame.",
        ]
    if "kept and matched" in rows.index:
        also = f", in {count[alike_too(topic)]} in {listed(topic.match_also)} as well" * bool(topic.match_also)
        gaps.append(
            f"In {count['kept and matched']} of {counted(count['kept'], 'quad')} the people who are swapped for each "
            f"other agree in {listed(topic.match)}{also}. The gap of the matched quads is "
            f"{of_row(rows.loc['kept and matched'])} logits."
        )
    return [left, *gaps]


def verdicts(able: dict[str, dict]) -> dict[str, str]:
    """A sentence for each task."""
    said = {task: "can do" if own["above"] else "cannot do" for task, own in able.items()}
    said |= {task: "can do, but has too few pairs for," for task, own in able.items() if own["above"] > own["able"]}
    return {task: f"The model {said[task]} `{task}`: {own['why']}." for task, own in able.items()}


def findings(step: Step, m: Measured) -> dict[str, Any]:
    """The findings of step 01: what the model can do, what it says itself, and the pairs that are left."""
    params, answers, kept = step.params, ability(m, step.params), selection(m, step.params)
    able = abilities(m.accuracy, m.pairs, params, no_gap(m, kept, params))
    said = verdicts(able)
    own = m.records[(m.records["task"] == params.task) & (m.records["template"] == params.template)]
    first = own["top_token"].value_counts(normalize=True).head(2)
    words = " or ".join(f'"{token}" ({share:.0%} of prompts)' for token, share in first.items())
    spoken = [f"Its own first word on `{params.template}` is {words}."]
    known = {} if answers.empty else ability_sentences(answers, params.topic, m.given)
    if own["label_probability"].notna().any():
        spoken[0] += f" Single-token profession labels have {own['label_probability'].mean():.0%} of the probability."
    built = [*pair_sentences(m, kept, params.topic), *placebo_sentences(m), *[m.failed] * bool(m.failed)]
    if m.unselected is not None and not params.placebo_attributes:
        none = "No placebo pairs were asked for."
        built.append(
            none
            if params.topic.placebo
            else "The question has no attribute that placebo pairs could differ in: there are none."
        )
    main = able.get(params.task, {"able": False})
    lead = [said.pop(params.task)] if params.task in said else []
    sentences = [*lead, *known.values(), *spoken, *said.values(), *built]
    short = [text for name, text in known.items() if name != "classes"]
    found = {
        "model": about_model(step),
        "task": params.task,
        "able": able,
        "pairs": 0 if m.pairs is None else len(m.pairs),
        "drops": m.drops,
        "accuracy": m.accuracy.to_dict("records"),
        "ability": answers.to_dict("records"),
        "selection": kept.to_dict("records"),
        "sentences": sentences,
        "headline": [*lead, *short, *said.values()] if main["able"] else sentences,
    }
    captions = CAPTIONS | (
        {"accuracy": CAPTIONS["accuracy"].replace(DRAWN, "of given pairs, where they fit it")} if m.given else {}
    )
    return finished(step, found, {"accuracy": accuracy_figure(m)}, captions)
