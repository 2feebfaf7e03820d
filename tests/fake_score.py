"""A stand-in for a model, for tests of what asks one: who is known, and which prompts are answered."""

import numpy as np
import pandas as pd
from professions import SUPERSETS, TEMPLATES

from lib import tasks


def fake_score(tokenizer, people, skill: float, seed: int = 0):
    """A stand-in for a model: each name in the prompt votes for its superset, noise of the prompt's own votes against.

    With a large `skill` every prompt is answered rightly; at 0 the answers are random. Logits depend on the ids alone.
    """
    superset = dict(zip(people.name, people.superset.map(SUPERSETS.index), strict=True))
    tokens = [tasks.candidates(tokenizer, TEMPLATES[name])[1] for name in ("profession_both", "bi_association")]
    width = max(map(max, tokens)) + 1

    def score(prompts):
        out = np.zeros((len(prompts), width), dtype=np.float32)
        for row, ids in zip(out, prompts, strict=True):
            text = tokenizer.decode(list(ids))
            logits = np.random.default_rng([seed, *ids]).normal(size=len(SUPERSETS))
            for name in (name for name in superset if name in text):
                logits[superset[name]] += skill
            for own in tokens:
                row[list(own)] = logits
        return out

    return score


def some_people(people, per_superset: int, seed: int) -> pd.DataFrame:
    """A random few of each superset, none of whose names is a part of another's."""
    ordinary = people[~people.two_supersets & (people.name.str.count(" ") == 1)]
    order = ordinary.iloc[np.random.default_rng(seed).permutation(len(ordinary))]
    return order.groupby("superset").head(per_superset).reset_index(drop=True)
