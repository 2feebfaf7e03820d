"""What the rule of two names is read from: prompts of two known people, the logit of each class, and who is in it.

Known is who the model gives the own superset when asked alone, as in step 01. Two people of one superset and two of
different ones take turns, every combination and order alike, each person once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice, permutations

import numpy as np
import pandas as pd
from jaxtyping import Float

from lib import models, tasks
from pipeline.population import add_fame, add_tokens, ask_alone, people_of, readings, unambiguous
from pipeline.step import Step
from steps.generality.grid import of_step_01, prompt_options

COLUMNS = ["prompt", "name_a", "name_b", "superset_class", "y", "n_a", "n_b", "evidence_a", "evidence_b"]


def two_known_people(step: Step) -> pd.DataFrame:
    """Logits of every class (`y`, less the mean of the classes of neither name), a row per prompt and class; none where
    the model knows too few people.

    `n_a` and `n_b` are 1 where that name is in the class. `evidence_a` and `evidence_b` are what the name alone says of
    the class (`evidence`, logits).
    """
    p, model, rng = step.params, step.model, step.rng("rule")
    template = tasks.find_template(p.template, p.task, question=p.question)
    people = known_people(step, template, rng)
    free = {name: list(group.itertuples()) for name, group in people.groupby("superset")}
    turns = zip(cycle([(name, name) for name in free]), cycle(permutations(free, 2)))
    drawn = []
    for own in islice((both for turn in turns for both in turn), p.rule_prompts):
        if all(len(free[name]) >= own.count(name) for name in own):
            drawn.append([free[name].pop() for name in own])
    if not drawn:
        return pd.DataFrame(columns=COLUMNS)
    made = [tasks.make_prompt(model.tokenizer, template, [x.name for x in two], **prompt_options(p)) for two in drawn]
    words, tokens = tasks.candidates(model.tokenizer, template)
    prompts = [prompt.ids for prompt in made]
    score = partial(models.next_logits, model)
    logits = readings(score, prompts, lambda read, _: {"own": read[:, tokens]})["own"].astype(float)
    rows = []
    for number, ((a, b), own) in enumerate(zip(drawn, logits, strict=True)):
        in_a, in_b = (np.array([word == person.superset for word in words]) for person in (a, b))
        if (in_a | in_b).all():  # of two classes in all: there is none of neither name
            continue
        row = {"prompt": f"rule{number:03d}", "name_a": a.name, "name_b": b.name, "superset_class": words}
        row |= {"y": own - own[~(in_a | in_b)].mean(), "n_a": in_a.astype(int), "n_b": in_b.astype(int)}
        rows.append(pd.DataFrame(row | {"evidence_a": a.evidence, "evidence_b": b.evidence}))
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=COLUMNS)


def known_people(step: Step, template: tasks.Template, rng: np.random.Generator) -> pd.DataFrame:
    """People of one superset who are known, with the `evidence` of their names; drawn from twice as many as needed, of
    whom those come first whom step 01 has asked about."""
    p, tokenizer, before = step.params, step.model.tokenizer, of_step_01(step, "alone")
    people = people_of(step)
    people = add_tokens(unambiguous(people), tokenizer, template, **prompt_options(p)).sample(frac=1, random_state=rng)
    if before is not None:
        people = people.iloc[np.argsort(~people["name"].isin(before["name"]), kind="stable")]
    asked = people.groupby("superset").head(-(-4 * p.rule_prompts // people["superset"].nunique()))
    score = partial(models.next_logits, step.model)
    asked = add_fame(ask_alone(asked, tokenizer, score, p.chat_template, before, p.question), p.question)
    if asked.empty:
        return asked
    own = evidence(np.stack(asked["evidence"].to_list()), asked["superset"], p.topic.supersets)
    asked = asked.assign(evidence=list(own))
    return asked[asked["known"]]


def evidence(
    logits: Float[np.ndarray, "people classes"], supersets: Sequence[str], classes: Sequence[str]
) -> Float[np.ndarray, "people classes"]:
    """What each name alone says of each class, 0 on average for people outside it.

    Its logit, less its mean over the person's other classes, and less the mean of that over people outside the class.
    """
    outside = np.asarray(supersets)[:, None] != np.asarray(classes)
    centred = logits - (logits * outside).sum(1, keepdims=True) / outside.sum(1, keepdims=True)
    return centred - (centred * outside).sum(0) / np.maximum(outside.sum(0), 1)
