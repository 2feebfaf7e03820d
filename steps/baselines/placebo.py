"""Step 01, measured: the placebo, pairs of one superset whose names differ in another attribute.

Patching between two prompts moves everything in which their names differ. In a placebo pair all four people are of one
superset and differ in an attribute that the prompt does not ask for; it is read by that attribute's own answers
(`Question.answers`). A site that is about supersets leaves it alone.

1. `classes` says who is of which class of the attribute.
2. `build` makes quads superset by superset, matched as those of the task are but for the attribute, and in fame as
   closely as the people allow, without anyone who is in a quad of the task. Every quad is built once: none is tried
   again with other people.
3. A quad is `kept` where each of its pairs has a gap of the right sign above the noise. The others stay in the table,
   so that later steps can say what the choice does.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd

from lib import questions, tasks
from lib.data import halves
from lib.questions import Question
from pipeline import population
from pipeline.params import Shared
from pipeline.population import Score, pairs_of
from steps.baselines.quads import Filters, choose, describe

FAME = 100.0  # nats: no difference in fame is too large for a match, the closest are taken
ASKED = 3  # people of each superset and class asked about, for each that is wanted


def classes(people: pd.DataFrame, attribute: str, topic: Question) -> pd.Series:
    """Each person's class of an attribute, "" for those who have none of its classes. ValueError if none is known."""
    if attribute not in topic.answers:
        raise ValueError(f"question {topic.name} has no answers about the attribute {attribute!r}")
    known = people[attribute]
    for other, values in topic.attributes[attribute].only.items():
        known = known.where(people[other].astype(str).isin(values), "")
    return known.where(known.isin(topic.answers[attribute].keys()), "")


def build(
    people: pd.DataFrame,
    asked: pd.DataFrame,
    taken: Collection[str],
    tokenizer: Any,
    score: Score,
    params: Shared,
    attribute: str,
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """The placebo pairs of one attribute, both halves, and what each filter dropped. Of the people who were `asked`
    about for the task's quads, and are not `taken` by one, those whom the model knows come first, and the others last:
    none need be asked again.

    Columns as in `pipeline.population.add_margins`, with `attribute`, `shared` (the superset of all four people) and
    `gap` (clean less corrupt, on the two answers). ValueError where nobody is left, or an answer is not a single token.
    """
    words = tasks.find_template(params.template, params.task, question=params.question)
    topic, own = words.question, population.unambiguous(people)
    own = own.assign(kind=classes(own, attribute, topic))
    tasks.candidates(tokenizer, words, attribute)
    rng, filters = np.random.default_rng([params.seed, crc32(attribute.encode())]), Filters(params.template)
    prompting = {"chat_template": params.chat_template, "attributes": params.attributes}
    wanted = -(-2 * params.placebo_quads_per_half // len(topic.supersets))

    free = filters.keep(own[own["kind"] != ""], f"no class of {attribute}", len(people))
    others = filters.keep(free[~free["name"].isin(taken)], "in a quad of the task", len(free))
    shuffled = others.iloc[rng.permutation(len(others))]
    first = shuffled.iloc[np.argsort(turns(shuffled, asked, params.question), kind="stable")]
    sampled = first.groupby(["superset", "kind"]).head(2 * ASKED * wanted).sort_index()
    sampled = filters.keep(sampled, "not sampled", len(others))
    told = population.ask_alone(sampled, tokenizer, score, params.chat_template, asked, params.question)
    told = population.add_fame(told, params.question)
    known = filters.keep(told[told["known"]], "not known by the model", len(told))
    free = population.add_tokens(known, tokenizer, words, **prompting)
    free = filters.keep(free, "name merges with the template", len(known))

    made, alike = [], [[column for column in columns if column != attribute] for columns in topic.shared]
    for superset, members in free.groupby("superset"):
        sides = members.assign(superset=members["kind"])
        planned = choose(sides, {tuple(topic.answers[attribute]): wanted}, FAME, rng, alike)
        made += describe(planned, sides, words).assign(shared=superset).to_dict("records")
    quads = filters.keep(pd.DataFrame(made), "no match in token count", wanted * len(topic.supersets), "quads")
    quads["quad_id"] = [f"{attribute}{number:03d}" for number in range(len(quads))]
    pairs = pairs_of(quads, params.pairs_per_quad).assign(attribute=attribute)
    pairs = population.add_margins(pairs, tokenizer, score, question=params.question, **prompting)
    pairs["gap"] = pairs["metric_clean"] - pairs["metric_corrupt"]  # of two answers, the margin is their difference
    return pairs.join(quads.set_index("quad_id")["shared"], on="quad_id"), filters.drops


def turns(people: pd.DataFrame, asked: pd.DataFrame, question: str = questions.DEFAULT) -> pd.Series:
    """0 for people whom the model knows by what it was `asked` before, 1 for those it was not, 2 for the others."""
    before = people[["name", "superset"]].merge(asked[["name", "evidence"]], on="name")
    if before.empty:
        return pd.Series(1, index=people.index)
    known = population.add_fame(before, question).set_index("name")["known"]
    return people["name"].map(known.map({True: 0, False: 2})).fillna(1)


def chosen(pairs: pd.DataFrame, noise: float, seed: int) -> pd.DataFrame:
    """The pairs with `kept` (each gap of the quad is above the noise) and `half`, of which both have as many kept."""
    kept = pairs["gap"].gt(noise).groupby(pairs["quad_id"]).transform("all")
    quads = pairs.assign(kept=kept).drop_duplicates("quad_id")
    strata = list(zip(quads["kept"], quads["shared"], quads["bucket"], strict=True))
    half = dict(zip(quads["quad_id"], halves(strata, np.random.default_rng(seed)), strict=True))
    return pairs.assign(kept=kept, half=pairs["quad_id"].map(half))
