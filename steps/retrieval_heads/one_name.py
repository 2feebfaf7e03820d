"""What the model says of each person alone: superset or profession, and how such labels are scored.

1. `labels_of` finds the tokens that stand for each label. A label is scored by its own token where it is one. A label
   of several tokens is scored by its first token if no other label begins so, and not at all otherwise; `scored` says
   which.
2. `probe` asks with one-name prompts. Supersets and professions are scored apart.
3. A model prefers some words whatever the name, so each score is also `centred`: its mean over people is taken off,
   every superset counting alike (batch calibration, Zhou et al. 2023, arXiv 2309.17249; as in `add_fame`). Within
   a superset it prefers some professions of that superset, so there it is `centred_within`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pandera.pandas as pa
from jaxtyping import Float
from scipy.special import logsumexp

from lib import models, tasks
from lib.hooks import Model
from lib.tasks import Form, Template
from pipeline.population import readings, unambiguous

CHUNK = 256  # prompts whose full-vocabulary logits are held at once
# superset: among the candidates; profession: the own one among all; within: among those of the own superset
KINDS = ("superset", "profession", "within")
WHOLE, FIRST, NOT = "whole", "first token", "not: shares its first token"

_share = pa.Column("float64", pa.Check.in_range(0, 1 + 1e-9), nullable=True)  # NaN: the own label is not scored
_logit = pa.Column("float64", nullable=True)
PROBES = pa.DataFrameSchema(
    {
        "name": pa.Column(str),
        "superset": pa.Column(str),
        "profession": pa.Column(str),
        "template": pa.Column(str),
        "form": pa.Column(str),
        "scored": pa.Column(str, pa.Check.isin((WHOLE, FIRST, NOT))),  # how the profession's label is
        # 1 where the own label is the top one, 0 where it is not; and the share that a blind choice gets
        **{f"{kind}_right{how}": _share for kind in KINDS for how in ("", "_centred")},
        **{f"{kind}_chance": _share for kind in KINDS},
        "superset_log_probability": _logit,  # of the own label, nats
        "profession_log_probability": _logit,
        "superset_probability": _share,  # of all candidates together
        "profession_probability": _share,  # of all professions that are one token
        "first_token_probability": _share,  # of all professions scored by their first token: an upper bound
        "top_token": pa.Column(str),
        "superset_logits": pa.Column(object),  # in the order of the metadata's "candidates"; NaN: not scored
        "profession_logits": pa.Column(object),  # in the order of the metadata's "professions"
        "logsumexp": pa.Column("float64"),
    },
    strict=True,
    unique=["name", "template"],
    name="table of one-name probes",
)


class Labels(NamedTuple):
    """The labels that are scored after a template: professions and, after them, the candidates."""

    words: tuple[str, ...]  # professions
    supersets: tuple[str, ...]  # of each profession
    tokens: tuple[tuple[int, ...], ...]  # of each profession: none, one, or two forms of one word
    scored: tuple[str, ...]  # how each profession is
    candidates: tuple[int, ...]  # token of each of the supersets

    @property
    def superset_of(self) -> dict[str, str]:
        """The superset of each profession."""
        return dict(zip(self.words, self.supersets, strict=True))


def labels_of(tokenizer: Any, template: Template, superset_of: Mapping[str, str], forms: Sequence[Form]) -> Labels:
    """The tokens that stand for each profession after `template`, in any of the forms.

    Every form that is one token of its own counts; without any, the first token in the first of the forms counts, if
    it begins no other label and is no candidate (" gymn" for gymnasts).
    """
    _, candidates = tasks.candidates(tokenizer, template)
    ids = [
        tasks.answer_ids(tokenizer, [f" {template.question.in_form(word, form)}" for form in forms])
        for word in superset_of
    ]
    begun = Counter(first for own in ids for first in {form[0] for form in own if form})
    tokens, scored = [], []
    for own in ids:
        whole = tuple(dict.fromkeys(form[0] for form in own if len(form) == 1 and form[0] not in candidates))
        first = tuple(form[0] for form in own[:1] if form and begun[form[0]] == 1 and form[0] not in candidates)
        tokens.append(whole or first)
        scored.append(WHOLE if whole else FIRST if first else NOT)
    return Labels(tuple(superset_of), tuple(superset_of.values()), tuple(tokens), tuple(scored), candidates)


def draw_people(people: pd.DataFrame, count: int, seed: int = 0) -> pd.DataFrame:
    """About `count` people at random before any selection, as many of each superset (all, where there are fewer).

    People of two supersets, and those with a namesake, are left out.
    """
    people = unambiguous(people)
    drawn = people.iloc[np.random.default_rng(seed).permutation(len(people))]
    return drawn.groupby("superset").head(-(-count // people.superset.nunique())).reset_index(drop=True)


def can_follow(template: Template, word: str) -> bool:
    """Whether the article before the answer, if any, allows `word`: after "a" a consonant, after "an" a vowel.

    Letters stand for sounds, which holds for every label of the tables here.
    """
    article = (template.text + template.answer_prefix).split(" ")[-1]
    vowel = word[0].lower() in "aeiou"
    return {"a": not vowel, "an": vowel}.get(article, True)


def probe(
    model: Model,
    people: pd.DataFrame,
    templates: Sequence[Template],
    superset_of: Mapping[str, str],
    chat_template: bool = False,
) -> pd.DataFrame:
    """Ask the model about each person alone: a row per person x template (schema PROBES).

    `superset_right`: the own superset is the top one of the candidates; `profession_right`: the own profession is the
    top one of all professions; `within_right`: of those of the own superset. After an article only labels that can
    follow it are scored; a person whose own label is not scored has NaN.

    Args:
        people: columns name, superset, profession (see `draw_people`).
        templates: of task one_name, in any form; a text of one's own through `tasks.find_template`.
        superset_of: every profession that is scored (see `superset_by_profession`).
    """
    for template in templates:
        if template.task != "one_name":
            raise ValueError(f"template {template.name!r} is of task {template.task!r}; a probe needs one_name")
    out = pd.concat([_probe(model, people, template, superset_of, chat_template) for template in templates])
    out.attrs["facts"] = {"candidates": list(templates[0].question.supersets), "professions": list(superset_of)}
    return out.reset_index(drop=True)


def _probe(
    model: Model, people: pd.DataFrame, template: Template, superset_of: Mapping[str, str], chat_template: bool
) -> pd.DataFrame:
    """The rows of one template."""
    supersets = template.question.supersets
    words, count = list(superset_of), len(supersets)
    labels = labels_of(model.tokenizer, template, superset_of, [template.form])
    tokens = (*labels.candidates, *(own[0] if own else 0 for own in labels.tokens))
    scored = np.array([can_follow(template, word) for word in (*supersets, *words)])
    scored[count:] &= [bool(own) for own in labels.tokens]
    prompts = [tasks.make_prompt(model.tokenizer, template, [name], chat_template).ids for name in people["name"]]

    def read(logits: np.ndarray, _: slice) -> dict[str, np.ndarray]:
        logits = logits.astype(np.float64)
        return {"own": logits[:, list(tokens)], "total": logsumexp(logits, axis=1), "top": logits.argmax(1)}

    answers = readings(partial(models.next_logits, model), prompts, read, CHUNK)
    logits, total, top = np.where(scored, answers["own"], np.nan), answers["total"], answers["top"]
    own = {
        "superset": people["superset"].map(supersets.index).to_numpy(),
        "profession": count + people["profession"].map(words.index).to_numpy(),
    }
    frame = people[["name", "superset", "profession"]].assign(
        template=template.name, form=template.form, scored=np.array(labels.scored)[own["profession"] - count]
    )
    is_superset = np.arange(len(tokens)) < count
    kin = np.array([*[""] * count, *superset_of.values()]) == people["superset"].to_numpy()[:, None]
    for kind, rivals in (("superset", is_superset), ("profession", ~is_superset), ("within", kin)):
        index = own.get(kind, own["profession"])
        frame[f"{kind}_right"] = _is_top(np.where(rivals, logits, np.nan), index)
        calibrated = (centred_within if kind == "within" else centred)(logits, people["superset"])
        frame[f"{kind}_right_centred"] = _is_top(np.where(rivals, calibrated, np.nan), index)
        asked = np.isfinite(logits[np.arange(len(people)), index])
        frame[f"{kind}_chance"] = np.where(asked, 1 / (np.isfinite(logits) & rivals).sum(1).clip(min=1), np.nan)
    probability = np.exp(logits - total[:, None])
    whole = np.array([False] * count + [how == WHOLE for how in labels.scored])
    for kind, group in (("superset", is_superset), ("profession", whole), ("first_token", ~is_superset & ~whole)):
        frame[f"{kind}_probability"] = np.nansum(probability[:, group], axis=1)
    for kind, index in own.items():
        frame[f"{kind}_log_probability"] = logits[np.arange(len(people)), index] - total
    return frame.assign(
        top_token=tasks.token_texts(model.tokenizer, top.tolist()),
        superset_logits=list(logits[:, :count]),
        profession_logits=list(logits[:, count:]),
        logsumexp=total,
    )[list(PROBES.columns)]


def _is_top(scores: Float[np.ndarray, "rows labels"], own: np.ndarray) -> Float[np.ndarray, " rows"]:
    """1 where the own label has the highest score, else 0; NaN where it is not scored."""
    right = np.nan_to_num(scores, nan=-np.inf).argmax(1) == own
    return np.where(np.isfinite(scores[np.arange(len(own)), own]), right, np.nan).astype(float)


def centred(values: Float[np.ndarray, "rows ..."], superset: Sequence[str]) -> Float[np.ndarray, "rows ..."]:
    """Values less their mean over the rows, every superset counting alike."""
    superset = np.asarray(superset)
    return values - np.mean([values[superset == one].mean(0) for one in np.unique(superset)], axis=0)


def centred_within(values: Float[np.ndarray, "rows ..."], superset: Sequence[str]) -> Float[np.ndarray, "rows ..."]:
    """Values less their mean over the rows of the same superset: a preference for a word of the class goes as well."""
    superset, out = np.asarray(superset), values.copy()
    for one in np.unique(superset):
        out[superset == one] -= values[superset == one].mean(0)
    return out
