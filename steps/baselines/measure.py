"""Step 01, measured: does the model do the task at all, and which pairs of prompts are fair?

1. `ACCURACY`: people drawn before any selection, for every task and template; with a `pairs_file`, the names of its
   pairs. One row per prompt: what was asked, what the model chose among the candidates, where the right word stands in
   its whole vocabulary, and what it would have said itself.
2. `ALONE`: what the model makes of each name alone.
3. `QUADS`: four people each, matched; `PAIRS`: the pairs that every later step sweeps, written as pairs.parquet.
4. `UNSELECTED`: as many pairs of other people before any selection.
5. `PLACEBO`: pairs of one superset whose names differ in another attribute, written as placebo.parquet.
6. `GIVEN`: the pairs of a `pairs_file` with the model's answers, in the place of 2 to 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from pydantic import Field
from scipy.special import logsumexp
from scipy.stats import beta

from lib import data, models, stats, tasks
from lib.hooks import Model
from lib.metrics import margins
from lib.tasks import Template
from pipeline import keys
from pipeline.assumed import Case
from pipeline.costs import Work, total
from pipeline.declaration import SUPERSET_TASKS, Declaration, Table
from pipeline.params import Names, ParameterError, Shared, Words
from pipeline.population import (
    PER_QUAD,
    add_margins,
    aligned,
    ask_alone,
    pairs_of,
    people_of,
    readings,
    right_signed,
    solved,
    unambiguous,
)
from pipeline.step import Step
from pipeline.units import Unit
from steps.baselines import placebo
from steps.baselines.quads import build_quads, generate_odd_one_out, sample_pairs, to_ask, unselected_quads


class Baselines(Shared):
    """01: people, quads and pairs; does the model do the task at all?"""

    templates: Words = Field(("profession_both",), description="templates whose accuracy is measured")
    quads_per_half: int = Field(100, ge=1, description="most quads in each half")
    pairs_per_quad: int = Field(2, ge=1, le=4, description="pairs taken from a quad")
    fame_tolerance: float = Field(
        0.25,
        gt=0,
        description="largest difference in fame between matched people, nats of log-probability",
    )
    min_bucket: int = Field(
        4, ge=2, description="fewest quads of one half, template and token counts (means and resamples come from them)"
    )
    odd_one_out_items: int = Field(60, ge=0, description="most generated odd-one-out items, beside the question's own")
    accuracy_pairs: int = Field(200, ge=1, description="most pairs per template on which accuracy is measured")
    placebo_attributes: Names = Field(
        ("region",),
        description="attributes in which placebo pairs' names, all of one superset, differ; [] for none",
    )
    placebo_quads_per_half: int = Field(40, ge=1, description="most placebo quads of an attribute in each half")


# For the planner: people asked about, and quads tried for one that is found, as in the default book.
ASKED, TRIED = 3000, 1.1
GIVEN_SIZE = 500  # given pairs a work unit
SIDED = 0.46  # of those asked about, how many are of a placebo's classes and in no quad, in the quick book
BUILT_FROM = ("quads_per_half", "pairs_per_quad", "fame_tolerance", "min_bucket", "odd_one_out_items", "seed")


def score(model: Model) -> Callable[[Sequence[Sequence[int]]], np.ndarray]:
    """What `pipeline.population` asks a model with: token ids to fp32 next-token logits."""
    return lambda prompts: models.next_logits(model, prompts)


def asked(params: Baselines) -> list[Template]:
    """The templates whose accuracy is measured: those of the profile, its own task's, one name, odd one out."""
    topic = params.topic
    odd = [template.name for template in topic.of_task("odd_one_out")]
    names = dict.fromkeys([*params.templates, params.template, topic.fame[0], *odd])
    return [topic.find(name, params.task) for name in names]


def accuracy_units(step: Step | Case) -> list[Unit]:
    """One work unit per template."""
    params = step.params
    options = {"seed": params.seed, "pairs": params.accuracy_pairs, "items": params.odd_one_out_items}
    return [Unit(template.name, (), options | {"task": template.task}) for template in asked(params)]


def items(
    people: pd.DataFrame, tokenizer: object, template: Template, params: Baselines, given: pd.DataFrame | None = None
) -> pd.DataFrame:
    """What is asked with one template: `names` (a tuple), `answer`, `superset`, `professions`, `item`.

    Pairs and single names are drawn at random, each person once, fewer than `accuracy_pairs` where the smallest
    superset does not have so many; odd-one-out has the plan's items and generated ones.
    `given` pairs of the template's kind are asked about in their place, each prompt once; an item is a quad of theirs.
    """
    if given is not None and (template.task == "odd_one_out") == (params.task == "odd_one_out"):
        return given_items(given, template, params)
    if template.task == "odd_one_out":
        pairs = odd_pairs(people, tokenizer, params)
        rows = [
            {"names": tuple(row[f"{side}_{slot}"] for slot in "abc"), "answer": row[answer], "item": row["quad_id"]}
            for row in pairs.to_dict("records")
            for side, answer in (("clean", "answer"), ("corrupt", "corrupt_answer"))
        ]
        return pd.DataFrame(rows).assign(superset="", professions="")
    drawn = sample_pairs(people, min(params.accuracy_pairs, most_pairs(people)), params.seed, params.question)
    rows = []
    for index, row in enumerate(drawn.to_dict("records")):
        subject = {"answer": row["superset"], "superset": row["superset"]}
        if template.task == "one_name":
            each = [((row[slot],), row[f"profession_{slot}"], f"{index}{slot}") for slot in "ab"]
        else:
            each = [((row["a"], row["b"]), f"{row['profession_a']}, {row['profession_b']}", str(index))]
        rows += [subject | {"names": names, "professions": own, "item": item} for names, own, item in each]
    return pd.DataFrame(rows)


def most_pairs(people: pd.DataFrame) -> int:
    """How many pairs of one superset there can be, each person once and as many of each superset."""
    sizes = unambiguous(people)["superset"].value_counts()
    if sizes.min() < 2:
        raise ParameterError(f"superset {sizes.idxmin()!r} has one person in all, and a pair takes two")
    return len(sizes) * int(sizes.min() // 2)


def given_items(given: pd.DataFrame, template: Template, params: Baselines) -> pd.DataFrame:
    """The prompts of `accuracy_pairs` of the given pairs, or of all, as `items` has them."""
    given = given.sample(min(len(given), params.accuracy_pairs), random_state=params.seed).sort_index()
    rows = []
    for row in given.to_dict("records"):
        for side, answer in (("clean", row["answer"]), ("corrupt", row["corrupt_answer"])):
            names = [row[f"{side}_{slot}"] for slot in tasks.SLOTS if row[f"{side}_{slot}"]]
            for own in [tuple(names)] if len(template.slots) == len(names) else [(name,) for name in names]:
                rows.append({"names": own, "answer": answer, "item": row["quad_id"]})
    table = pd.DataFrame(rows).drop_duplicates(["names", "answer"], ignore_index=True)
    superset = "" if template.task == "odd_one_out" else table["answer"]
    return table.assign(superset=superset, professions="")


def odd_pairs(people: pd.DataFrame, tokenizer: object, params: Baselines) -> pd.DataFrame:
    """Odd-one-out items: the plan's own, then generated ones of other people."""
    file, count, taken, parts = params.odd_one_out_file, params.odd_one_out_items, set(), []
    if file:
        own = data.load_pairs_file(keys.input_file(file), question=params.question)
        taken = {name for side in ("clean", "corrupt") for slot in tasks.SLOTS for name in own[f"{side}_{slot}"]}
        parts.append(own.drop(columns="line"))
    if count:
        others = people[~people["name"].isin(taken)].reset_index(drop=True)
        parts.append(generate_odd_one_out(others, tokenizer, count, params.seed, params.chat_template, params.question))
    if not parts:
        raise ValueError("odd_one_out_items is 0, and the question has no odd-one-out items of its own: ask for some")
    return pd.concat(parts, ignore_index=True)


def measure(
    model: Model, people: pd.DataFrame, template: Template, params: Baselines, given: pd.DataFrame | None = None
) -> pd.DataFrame:
    """One row per prompt of a template: the model's choice among the candidates and its own top token.

    `rank` is how many tokens of the vocabulary have a higher logit than the right word, `probability` is its share.
    Names that cannot be told from the template's text are left out; `attrs["log"]` says how many.
    """
    words = model.tokenizer
    table, prompts, reasons = items(people, words, template, params, given), [], []
    for names in table["names"]:
        try:
            prompts.append(tasks.make_prompt(words, template, names, params.chat_template, params.attributes))
        except ValueError as error:
            prompts.append(None)
            reasons.append(str(error))
    if not any(prompts):
        raise ParameterError(f"template {template.name!r}: {reasons[0]}")
    table, prompts = table[[one is not None for one in prompts]].reset_index(drop=True), list(filter(None, prompts))
    if template.task == "odd_one_out":
        names = np.array([tasks.SLOTS] * len(table))
        tokens = np.array([[p.ids[p.roles[f"name_{slot}"][0]] for slot in tasks.SLOTS] for p in prompts])
        labels: tuple[str, ...] = ()
    else:
        candidates, ids = tasks.candidates(words, template)
        names, tokens = np.array([candidates] * len(table)), np.array([ids] * len(table))
        labels, label_ids = tasks.labels(words, template)

    def read(logits: np.ndarray, part: slice) -> dict[str, np.ndarray]:
        own = np.take_along_axis(logits, tokens[part], 1)
        total = logsumexp(logits, axis=1, keepdims=True)
        right = own[np.arange(len(own)), answer[part]][:, None]
        out = {"candidates": own, "top": logits.argmax(1), "candidate_probability": np.exp(own - total).sum(1)}
        out |= {"rank": (logits > right).sum(1), "probability": np.exp(right - total)[:, 0]}
        labelled = np.exp(logits[:, list(label_ids)] - total).sum(1) if labels else np.full(len(own), np.nan)
        return out | {"label_probability": labelled}

    answer = np.array([row.tolist().index(word) for row, word in zip(names, table["answer"], strict=True)])
    scored = readings(score(model), [prompt.ids for prompt in prompts], read, 128)
    margin, _ = margins(scored["candidates"], answer)
    out = table.assign(
        task=template.task,
        template=template.name,
        names=table["names"].map(", ".join),
        chosen=np.take_along_axis(names, scored["candidates"].argmax(1)[:, None], 1)[:, 0],
        correct=margin > 0,
        margin=margin.astype(float),
        logits=list(scored["candidates"].astype(np.float32)),
        rank=scored["rank"],
        **{key: scored[key].astype(float) for key in ("probability", "candidate_probability", "label_probability")},
        top_token=tasks.token_texts(words, scored["top"].tolist()),
    )
    out.attrs["log"] = [f"{len(reasons)} prompts left out: {reasons[0]}"] if reasons else []
    return out


def make_quads(model: Model, people: pd.DataFrame, alone: pd.DataFrame, params: Baselines) -> pd.DataFrame:
    """The quads of the profile's task; what each filter dropped is in `attrs["facts"]["drops"]`."""
    own = to_ask(people, params)[0].merge(alone, on="name", validate="1:1")
    quads, drops = build_quads(people, own, model.tokenizer, score(model), params, model.noise)
    quads.attrs["facts"] = {"drops": drops}
    return quads


def answered(model: Model, pairs: pd.DataFrame, params: Baselines) -> pd.DataFrame:
    """Pairs with what the model makes of both prompts; `solved`: it answers every pair of the quad."""
    options = {"chat_template": params.chat_template, "attributes": params.attributes}
    out = add_margins(pairs, model.tokenizer, score(model), question=params.question, **options)
    return out.assign(solved=solved(out))


def make_pairs(model: Model, people: pd.DataFrame, quads: pd.DataFrame | None, params: Baselines) -> pd.DataFrame:
    """The pairs that every later step sweeps: of the quads, or the odd-one-out pairs with a gap of the right sign."""
    if quads is not None:
        return answered(model, pairs_of(quads, params.pairs_per_quad), params)
    options = {"chat_template": params.chat_template, "question": params.question}
    odd = odd_pairs(people, model.tokenizer, params).assign(template=params.template)
    pairs, _ = aligned(odd, model.tokenizer, **options)
    return right_signed(answered(model, pairs, params), model.noise)


def make_unselected(model: Model, people: pd.DataFrame, quads: pd.DataFrame, params: Baselines) -> pd.DataFrame:
    """Pairs of as many quads of other people, put together before anything was asked."""
    taken = set(quads[list("abcd")].to_numpy().ravel())
    drawn = unselected_quads(people, model.tokenizer, params, taken)
    return answered(model, pairs_of(drawn, params.pairs_per_quad), params)


def make_placebo(
    model: Model, people: pd.DataFrame, alone: pd.DataFrame, pairs: pd.DataFrame, params: Baselines
) -> pd.DataFrame:
    """The placebo pairs of every attribute; `attrs["facts"]` says what each filter dropped, and why there are none."""
    names = [f"{side}_{slot}" for side in ("clean", "corrupt") for slot in "ab"]
    taken, made, about = {*pairs[names].to_numpy().ravel()}, [], []
    for attribute in params.placebo_attributes:
        facts: dict[str, Any] = {"attribute": attribute, "drops": [], "why": ""}
        try:
            own, facts["drops"] = placebo.build(people, alone, taken, model.tokenizer, score(model), params, attribute)
            made.append(placebo.chosen(own, model.noise, params.seed))
        except ValueError as error:
            facts["why"] = str(error)
        about.append(facts)
    out = pd.concat(made, ignore_index=True) if made else pd.DataFrame(columns=["attribute", "quad_id", "kept"])
    out.attrs["facts"] = {"placebo": about}
    return out


# --- what is measured ---


def accuracy_of(step: Step) -> Callable[[Unit], pd.DataFrame]:
    """What measures a template. ParameterError for answers of several tokens in any template that steps ask with."""
    topic = step.params.topic
    alone = [topic.find(text, "one_name", form) for form, text in topic.probes]
    try:
        for template in (*asked(step.params), *map(topic.find, (*topic.fame, topic.alone)), *alone):
            if template.task != "odd_one_out":
                tasks.candidates(step.tokenizer, template)
    except ValueError as error:
        raise ParameterError(f"question {topic.name}: {error}") from None
    templates, people = {template.name: template for template in asked(step.params)}, people_of(step)
    given = None if step.params.pairs_file is None else step.pairs()
    return lambda unit: measure(step.model, people, templates[unit.id], step.params, given)


def given_units(step: Step | Case) -> list[Unit]:
    """So many of the given pairs a unit that each is a matter of minutes."""
    pairs = [pair.pair_id for pair in step.prompts()]
    return [Unit(f"given-{at:06d}", tuple(pairs[at : at + GIVEN_SIZE])) for at in range(0, len(pairs), GIVEN_SIZE)]


def given_of(step: Step) -> Callable[[Unit], pd.DataFrame]:
    """What asks about given pairs: `answered`, a pair for itself, and whether its gap is above the noise (`kept`)."""
    table = step.pairs().set_index("pair_id", drop=False)

    def ask(unit: Unit) -> pd.DataFrame:
        own = table.loc[list(unit.pairs)].reset_index(drop=True)
        out = answered(step.model, own.assign(quad_id=own["pair_id"]), step.params)
        gap = out["logit_diff_clean"] - out["logit_diff_corrupt"]
        return out.assign(quad_id=own["quad_id"], gap=gap, kept=gap > step.model.noise)

    return ask


def whole(step: Step | Case, *chosen: Any) -> list[Unit]:
    """One unit: quads, and pairs, are made together."""
    return [Unit("all", (), step.params.model_dump(mode="json", include=set(BUILT_FROM)))]


def alone_units(step: Step | Case) -> list[Unit]:
    """A unit for each superset's people."""
    p = step.params
    return [
        Unit(superset, (), p.model_dump(mode="json", include={"quads_per_half", "seed"}))
        for superset in p.topic.supersets
    ]


def alone_of(step: Step) -> Callable[[Unit], pd.DataFrame]:
    """What asks about the people of a superset: `name` and `evidence`, which `ask_alone` gives."""
    drawn, model = to_ask(people_of(step), step.params)[0], step.model

    def ask(unit: Unit) -> pd.DataFrame:
        own = drawn[drawn["superset"] == unit.id]
        how = {"chat_template": step.params.chat_template, "question": step.params.question}
        return ask_alone(own, model.tokenizer, score(model), **how)[["name", "evidence"]]

    return ask


def quads_of(step: Step, alone: pd.DataFrame) -> Callable[[Unit], pd.DataFrame]:
    """What makes the quads."""
    return lambda _: make_quads(step.model, people_of(step), alone, step.params)


def placebo_units(step: Step | Case, *chosen: Any) -> list[Unit]:
    """One unit: all attributes."""
    names = {*BUILT_FROM, "placebo_attributes", "placebo_quads_per_half"}
    return [Unit("all", (), step.params.model_dump(mode="json", include=names))]


def placebo_from(step: Step, alone: pd.DataFrame, pairs: pd.DataFrame) -> Callable[[Unit], pd.DataFrame]:
    """What makes the placebo pairs."""
    return lambda _: make_placebo(step.model, people_of(step), alone, pairs, step.params)


def pairs_from(step: Step, quads: pd.DataFrame | None) -> Callable[[Unit], pd.DataFrame]:
    """What makes the pairs."""
    return lambda _: make_pairs(step.model, people_of(step), quads, step.params)


def unselected_from(step: Step, quads: pd.DataFrame) -> Callable[[Unit], pd.DataFrame]:
    """What makes the pairs before any selection."""
    return lambda _: make_unselected(step.model, people_of(step), quads, step.params)


def accuracy_cost(case: Case, units: Sequence[Unit]) -> Work:
    """Every template asked."""
    p, work = case.params, Work()
    counts = {"one_name": 2 * p.accuracy_pairs, "odd_one_out": 2 * (p.odd_one_out_items + 3)}
    for template in asked(p):
        work += case.asked(counts.get(template.task, p.accuracy_pairs), template, 128)
    return work


def alone_cost(case: Case, units: Sequence[Unit]) -> Work:
    """Everyone asked about alone."""
    topic = case.params.topic
    people = min(ASKED, PER_QUAD * case.params.quads_per_half * len(topic.supersets))
    return total(case.asked(people, topic.find(name)) for name in topic.fame)


def quads_cost(case: Case, units: Sequence[Unit], alone: None) -> Work:
    """The prompts of the quads that are tried."""
    p = case.params
    return case.asked(round(TRIED * 2 * len(case.pairs)), tasks.find_template(p.template, p.task, question=p.question))


def pairs_cost(case: Case, units: Sequence[Unit], quads: None) -> Work:
    """Both prompts of each pair."""
    return case.asked(
        2 * len(case.pairs), tasks.find_template(case.params.template, case.params.task, question=case.params.question)
    )


def placebo_cost(case: Case, units: Sequence[Unit], alone: None, pairs: None) -> Work:
    """Those of the attributes' classes asked about alone who have not been, and both prompts of each pair."""
    p = case.params
    quads = 2 * p.placebo_quads_per_half * len(p.placebo_attributes)
    wanted, before = 4 * placebo.ASKED * quads, PER_QUAD * p.quads_per_half * len(p.topic.supersets)
    people = max(wanted - round(SIDED * before), 0)
    more = total(case.asked(people, p.topic.find(name)) for name in p.topic.fame)
    return more + case.asked(2 * p.pairs_per_quad * quads, tasks.find_template(p.template, p.task, question=p.question))


GIVEN = Table("pairs", given_units, given_of, lambda case, units: pairs_cost(case, units, None), schema=None)
ACCURACY = Table("baselines", accuracy_units, accuracy_of, accuracy_cost, schema=None)
ALONE = Table("alone", alone_units, alone_of, alone_cost, schema=None)
QUADS = Table("quads", whole, quads_of, quads_cost, schema=None)
PAIRS = Table("pairs", whole, pairs_from, pairs_cost, schema=None)
UNSELECTED = Table("unselected", whole, unselected_from, pairs_cost, schema=None)
PLACEBO = Table("placebo", placebo_units, placebo_from, placebo_cost, schema=None)


def assumed(case: Case) -> Iterator[tuple[Any, ...]]:
    """The tables in order; nothing is built where pairs are given."""
    yield (ACCURACY,)
    if case.params.pairs_file is not None:
        yield (GIVEN,)
    else:
        if case.params.task != "odd_one_out":
            yield (ALONE,)
            yield QUADS, None
            yield UNSELECTED, None
        yield PAIRS, None
        if case.params.task in SUPERSET_TASKS and case.params.placebo_attributes:
            yield PLACEBO, None, None


STEP = Declaration(
    "baselines",
    Baselines,
    assumed,
    always=True,
    files=("people_file", "odd_one_out_file"),
    extra_files=("pairs.parquet", "placebo.parquet"),
)


# --- what is decided ---


def p_above(successes: ArrayLike, n: ArrayLike, chance: float) -> float:
    """p of a proportion against chance: the exact one-sided binomial test, P(at least k of n).

    `successes` and `n` are totals of independent trials, or one entry per unit, which enter with their
    `stats.effective_trials`; to fractions the probability is continued by the incomplete beta function.
    """
    k, trials = stats.effective_trials(successes, n)
    return float(beta.cdf(chance, k, trials - k + 1)) if k > 0 else 1.0


def accuracies(frame: pd.DataFrame, params: Shared, by: list[str]) -> pd.DataFrame:
    """Share of prompts answered right, with Wilson intervals; each item is a unit (its people are in no other)."""
    rows = []
    for key, part in frame.groupby(by, sort=False):
        units = part.groupby("item")["correct"].agg(["sum", "count"])
        span = stats.proportion_interval(units["sum"], units["count"], params)
        options = 3 if part["task"].iloc[0] == "odd_one_out" else len(params.topic.supersets)
        chance = 1 / options
        p = p_above(units["sum"], units["count"], chance)
        numbers = {"estimate": span.estimate, "low": span.low, "high": span.high, "prompts": len(part)}
        numbers |= {"chance": chance, "above": p < 1 - params.level, "p": p}
        rows.append(dict(zip(by, key, strict=True)) | numbers)
    return pd.DataFrame(rows)


class Measured(NamedTuple):
    """What step 01 has measured."""

    records: pd.DataFrame  # a row per prompt asked
    accuracy: pd.DataFrame  # a row per task and template
    pairs: pd.DataFrame | None  # None where none were built; `failed` says why
    unselected: pd.DataFrame | None  # pairs before any selection, where quads were built
    drops: list[dict[str, Any]]  # what each filter dropped and left, in order
    failed: str
    placebo: pd.DataFrame | None = None  # None where none were asked for; empty where none could be built
    about_placebo: Sequence[dict[str, Any]] = ()  # of each attribute, what each filter dropped, or why there are none
    given: str = ""  # the file that the pairs come from, if they were given


def run(step: Step) -> Measured:
    """Measure, or read what is there. Writes pairs.parquet.

    With a `pairs_file` its pairs are asked about, and nothing is built or written; on a task that the model answers no
    better than chance nothing is built. ValueError with every filter's counts when the filters leave nothing.
    """
    params, frame = step.params, step.table(ACCURACY)
    accuracy = accuracies(frame, params, ["task", "template"])
    if params.pairs_file is not None:
        name = Path(params.pairs_file).name
        why = f"The pairs are those of `{name}`; none were built."
        return Measured(frame, accuracy, step.table(GIVEN), None, [], why, given=name)
    asked_for = accuracy[(accuracy["task"] == params.task) & (accuracy["template"] == params.template)]
    if not asked_for["above"].all():
        return Measured(frame, accuracy, None, None, [], f"No pairs were built: the model does not do `{params.task}`.")
    quads, unselected, drops = None, None, []
    if params.task != "odd_one_out":
        alone = step.table(ALONE)
        quads, drops = step.table(QUADS, alone), step.metadata(QUADS)["drops"]
        unselected = step.table(UNSELECTED, quads)
    pairs = step.table(PAIRS, quads)
    step.write_extra("pairs.parquet", pairs)
    if params.task not in SUPERSET_TASKS or not params.placebo_attributes:
        return Measured(frame, accuracy, pairs, unselected, drops, "")
    made = step.table(PLACEBO, alone, pairs)
    if len(made):
        step.write_extra("placebo.parquet", made)
    return Measured(frame, accuracy, pairs, unselected, drops, "", made, step.metadata(PLACEBO)["placebo"])
