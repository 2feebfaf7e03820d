"""Whom the study asks about: people, what a model knows of them, and the pairs that quads of them make.

1. `load_people` reads and checks the table of people.
2. `ask_alone` asks the model about each person alone; `add_fame`: is the own superset its first choice, and how sure is
   it? `add_tokens` counts the tokens of each name.
3. `pairs_of` turns quads (four people, a, b of one superset and c, d of another) into pairs.
4. `aligned` keeps the pairs whose prompts line up token by token; `add_margins` asks the model for their answers, and
   `right_signed` keeps the quads whose prompts differ as they should.

A model is only ever seen through `score`: a function from a list of token id tuples to fp32 next-token logits
(prompts, vocabulary), in the order given (`lib.models.next_logits`). Bad input raises ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pandera.pandas as pa
from scipy.special import log_softmax

from lib import questions, tasks
from lib.errors import Refusal
from lib.metrics import margins
from lib.questions import ITEM, Attribute, Question, Template
from lib.tables import read_table, unusable, wrong_name
from lib.tasks import Prompt

Score = Callable[[Sequence[Sequence[int]]], np.ndarray]
PER_QUAD = 8  # people of each superset whom the model is asked about alone, for each quad of a half
CHUNK = 256  # prompts scored at once: their full-vocabulary logits are 50 MB at 50,000 tokens


def schema_of(question: Question) -> pa.DataFrameSchema:
    """What a table of people must be: name, profession, superset, whether it is in two, the question's attributes, and
    who else bears the name."""

    def column(own: Attribute) -> pa.Column:
        if own.whole:
            return pa.Column(int, pa.Check.in_range(*own.whole))
        return pa.Column(str, pa.Check.isin(own.allowed) if own.allowed else pa.Check.str_length(min_value=1))

    columns = {
        "name": pa.Column(str, pa.Check.str_matches(r"^\S(.*\S)?$"), unique=True),
        "profession": pa.Column(str, pa.Check.str_matches(r"^\S(.*\S)?$")),
        "superset": pa.Column(str, pa.Check.isin(question.supersets)),
        "two_supersets": pa.Column(bool),
        "second_superset": pa.Column(str, pa.Check.isin((*question.supersets, ""))),
        "namesake": pa.Column(str),  # who else bears the name, about as well known; "" if no one
    }
    return pa.DataFrameSchema(columns | {name: column(own) for name, own in question.attributes.items()}, strict=True)


# What a table of people may leave out, and what then stands there: a text, or what another column has.
MISSING = {"profession": "superset", "two_supersets": "false", "second_superset": "", "namesake": ""}


def load_people(path: str | Path, question: str | Question = questions.DEFAULT) -> pd.DataFrame:
    """The table of people, checked: one row per name, superset and profession known, flags consistent.

    Columns: name, profession (the superset, where the table has none), superset, two_supersets, second_superset ("" if
    none), the question's attributes, namesake ("" if none); under the names that the question's `columns` give them.
    Raises ValueError naming the file's line, the column, the value and what is allowed.
    """
    topic = questions.load(question)
    table = read_table(Path(path), "people_file", *topic.item_columns)
    where = f"{path}, {table.index.name}"
    table = table.rename(columns={topic.columns.get(own, own): own for own in ITEM})
    if faults := {place: f"{name!r} {wrong}" for place, name in table["name"].items() if (wrong := wrong_name(name))}:
        raise Refusal(unusable(f"people_file {path}", table, faults))
    table = table.assign(**{name: table.get(name, table.get(own, own)) for name, own in MISSING.items()})
    flags = {"true": True, "True": True, "false": False, "False": False}
    whole = [name for name, own in topic.attributes.items() if own.whole]
    for column, allowed in (("two_supersets", flags), *((name, None) for name in whole)):
        known = table[column].isin(allowed) if allowed else table[column].str.fullmatch(r"-?\d+")
        if not known.all():
            row = known.idxmin()
            what = "true, false" if allowed else "a whole number"
            raise Refusal(f"{where} {row}: {column} is {table[column][row]!r}; allowed: {what}")
        table[column] = table[column].map(allowed) if allowed else table[column].astype(int)
    try:
        table = schema_of(topic).validate(table, lazy=True)
    except pa.errors.SchemaErrors as error:
        first = error.failure_cases.iloc[0]
        row = path if pd.isna(first["index"]) else f"{where} {first['index']}"
        raise Refusal(f"{row}: {first['column']} {first['failure_case']!r} fails {first['check']}") from None
    odd = table[(table.two_supersets != table.second_superset.ne("")) | (table.second_superset == table.superset)]
    if len(odd):
        raise Refusal(
            f"{where} {odd.index[0]}: {odd['name'].iloc[0]!r}: second_superset must be given where "
            "two_supersets is true, be empty where it is false, and differ from superset"
        )
    try:
        superset_by_profession(table)
    except ValueError as error:
        raise Refusal(f"{path}: {error}") from None
    return table.reset_index(drop=True)


def people_of(step: Any) -> pd.DataFrame:
    """The step's table of people."""
    return load_people(step.people_file, step.params.question)


def superset_by_profession(people: pd.DataFrame) -> dict[str, str]:
    """The superset of each profession of a table of people. ValueError for a profession found in two."""
    found = people.groupby("profession")["superset"].unique()
    twice = found[found.map(len) > 1]
    if len(twice):
        raise ValueError(
            f"profession {twice.index[0]!r} stands under the supersets {', '.join(twice.iloc[0])}; give it one superset"
        )
    return {profession: supersets[0] for profession, supersets in found.items()}


def controls_of(step: Any) -> pd.DataFrame:
    """The question's control names: `kind` (invented, thing) and `name`; no rows where it has none."""
    return step.params.topic.table("controls")


def unambiguous(people: pd.DataFrame) -> pd.DataFrame:
    """The people of one superset whose names are no one else's: of whom it is clear what a model should say."""
    return people[~people["two_supersets"] & people["namesake"].eq("")]


def readings(
    score: Score, prompts: Sequence[Sequence[int]], read: Callable[[np.ndarray, slice], Mapping], size: int = 64
) -> dict[str, np.ndarray]:
    """What `read` makes of the prompts' logits, scored `size` prompts at a time in the order given, so that the logits
    of all are never held at once. `read` is given the logits and which prompts they are of, and returns arrays with a
    row for each."""
    parts = []
    for at in range(0, len(prompts), size):
        part = slice(at, at + size)
        parts.append(read(np.asarray(score(prompts[part])), part))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def logits_of(score: Score, prompts: Sequence[tuple[int, ...]], tokens: Sequence[Sequence[int]]) -> np.ndarray:
    """Logits (prompts, k) of k tokens per prompt."""
    own = np.asarray(tokens)
    read = readings(score, prompts, lambda logits, at: {"own": np.take_along_axis(logits, own[at], 1)}, CHUNK)
    out = read["own"]
    if not (finite := np.isfinite(out).all(1)).all():
        raise ValueError(f"the model gives NaN or infinite logits, first for prompt {int(np.argmin(finite))}")
    return out


def ask_alone(
    people: pd.DataFrame,
    tokenizer: Any,
    score: Score,
    chat_template: bool = False,
    asked: pd.DataFrame | None = None,
    question: str | Question = questions.DEFAULT,
) -> pd.DataFrame:
    """`people` with `evidence`: for each superset the logit of its word on the one-name prompts, their mean over the
    question's `fame` templates. Who is in `asked`, an earlier answer, is not asked again; whose name cannot be told
    from the text of one of the templates is left out."""
    known = {} if asked is None else dict(zip(asked["name"], asked["evidence"], strict=True))
    topic = questions.load(question)
    templates, parts = [topic.find(name) for name in topic.fame], []
    made = alone([name for name in people["name"] if name not in known], tokenizer, templates, chat_template)
    for number, template in enumerate(templates if made else ()):
        _, tokens = tasks.candidates(tokenizer, template)
        prompts = [own[number].ids for own in made.values()]
        parts.append(logits_of(score, prompts, [tokens] * len(prompts)).astype(np.float64))
    known |= dict(zip(made, np.mean(parts, axis=0), strict=True)) if made else {}
    people = people[people["name"].isin(known)]
    return people.assign(evidence=[np.asarray(known[name]) for name in people["name"]])


def alone(
    names: Iterable[str], tokenizer: Any, templates: Sequence[Template], chat_template: bool = False, **options: Any
) -> dict[str, list[Prompt]]:
    """The prompts of one-name templates, by name; of the names that can be told from the text of all of them."""
    made = {}
    for name in names:
        with suppress(ValueError):
            made[name] = [tasks.make_prompt(tokenizer, own, [name], chat_template, **options) for own in templates]
    return made


def add_fame(people: pd.DataFrame, question: str | Question = questions.DEFAULT) -> pd.DataFrame:
    """`people`, asked alone, with `fame` (nats, at most 0), `known`, and `first` (the superset that the name is given).

    A model prefers some words whatever the name, so fame and first choice rest on evidence that is centred on its mean
    over people, every superset counting alike (batch calibration, Zhou et al. 2023, arXiv 2309.17249). Fame is the
    log-softmax of the own superset's.
    """
    supersets = questions.load(question).supersets
    if people.empty:
        return people.assign(fame=[], known=np.zeros(0, bool), first=[])
    evidence, own = np.stack(people["evidence"].to_list()), people["superset"].map(supersets.index).to_numpy()
    centred = evidence - np.mean([evidence[own == s].mean(0) for s in np.unique(own)], axis=0)
    first, fame = centred.argmax(1), log_softmax(centred, axis=1)[np.arange(len(own)), own]
    return people.assign(fame=fame, known=first == own, first=[supersets[i] for i in first])


def add_tokens(
    people: pd.DataFrame, tokenizer: Any, template: Template, chat_template: bool = False, **options: Any
) -> pd.DataFrame:
    """`people` with `n_tokens` and `first_token`: tuples, how many tokens the name has in each slot and its first one.

    People whose name cannot be told from the template's text in some slot ("Jr.," is one token) are left out.
    """
    kept, counts, firsts = [], [], []
    for index, name in people.name.items():
        try:
            prompt = tasks.make_prompt(tokenizer, template, [name] * len(template.slots), chat_template, **options)
        except ValueError:
            continue
        places = [prompt.roles[f"name_{slot}"] for slot in template.slots]
        kept.append(index)
        counts.append(tuple(map(len, places)))
        firsts.append(tuple(prompt.ids[place[0]] for place in places))
    return people.loc[kept].assign(n_tokens=counts, first_token=firsts)


# The pairs of a quad: clean names, corrupt names. The first two show both sides and both orders.
_PAIRS = (("ab", "cd"), ("dc", "ba"), ("cd", "ab"), ("ba", "dc"))


def pairs_of(quads: pd.DataFrame, pairs_per_quad: int = 2) -> pd.DataFrame:
    """The pairs table: one row per pair, `pairs_per_quad` (1 to 4) of each quad, made of the quads frame alone."""
    if not 1 <= pairs_per_quad <= 4:
        raise ValueError(f"pairs_per_quad must be 1 to 4, got {pairs_per_quad}")
    rows = []
    for quad in quads.to_dict("records"):
        for number, (clean, corrupt) in enumerate(_PAIRS[:pairs_per_quad]):
            row = {"pair_id": f"{quad['quad_id']}.{number}"}
            row |= {key: quad[key] for key in ("quad_id", "half", "task", "template")}
            for side, people in (("clean", clean), ("corrupt", corrupt)):
                row |= {f"{side}_{slot}": quad[person] for slot, person in zip("ab", people, strict=True)}
                row |= {f"{side}_profession_{s}": quad[f"profession_{p}"] for s, p in zip("ab", people, strict=True)}
                row[f"{side}_c"] = row[f"{side}_profession_c"] = ""
                row[f"fame_{side}"] = float(np.mean([quad[f"fame_{person}"] for person in people]))
            for answer, people in (("answer", clean), ("corrupt_answer", corrupt)):
                row[answer] = quad["superset" if people[0] in "ab" else "other"]
            about = [key for key in ("n_tokens_a", "n_tokens_b", "bucket", "matched", "same_gender") if key in quad]
            rows.append(row | {key: quad[key] for key in about})
    return pd.DataFrame(rows)


def with_question(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of make_pair with the question itself, loaded once for all pairs."""
    return {**options, "question": questions.load(options.get("question", questions.DEFAULT))}


def aligned(pairs: pd.DataFrame, tokenizer: Any, **options: Any) -> tuple[pd.DataFrame, list[str]]:
    """The pairs whose prompts line up token by token under this tokenizer, and why each of the others does not."""
    reasons, options = {}, with_question(options)
    for place, row in enumerate(pairs.to_dict("records")):
        try:
            tasks.make_pair(tokenizer, row, **options)
        except ValueError as error:
            reasons[place] = str(error)
    return pairs[[place not in reasons for place in range(len(pairs))]], list(reasons.values())


def add_margins(pairs: pd.DataFrame, tokenizer: Any, score: Score, **options: Any) -> pd.DataFrame:
    """`pairs` with the clean answer's margin in both prompts and their logit_diffs, in logits.

    Options (chat_template, attributes) go to make_pair. `metric_clean`, `metric_corrupt`: the logit of the clean
    prompt's answer minus the highest other candidate's; `logit_diff_clean`, `logit_diff_corrupt`: minus the corrupt
    answer's.
    """
    options = with_question(options)
    made = [tasks.make_pair(tokenizer, row, **options) for row in pairs.to_dict("records")]
    tokens = {ids: own for p in made for ids, own in ((p.clean.ids, p.clean_tokens), (p.corrupt.ids, p.corrupt_tokens))}
    logits = dict(zip(tokens, logits_of(score, list(tokens), list(tokens.values())), strict=True))
    rows, columns = np.arange(len(made)), {}
    answer, other = ([getattr(pair, key) for pair in made] for key in ("answer", "corrupt_answer"))
    for side in ("clean", "corrupt"):
        own = np.stack([logits[getattr(pair, side).ids] for pair in made]).astype(float)
        columns[f"metric_{side}"] = margins(own, answer)[0]
        columns[f"logit_diff_{side}"] = own[rows, answer] - own[rows, other]
    return pairs.assign(**columns)


def right_signed(pairs: pd.DataFrame, noise: float) -> pd.DataFrame:
    """The pairs of those quads whose gap, clean less corrupt logit_diff and the mean of its pairs, is above `noise`."""
    gap = pairs["logit_diff_clean"] - pairs["logit_diff_corrupt"]
    return pairs[gap.groupby(pairs["quad_id"]).transform("mean") > noise]


def solved(pairs: pd.DataFrame) -> pd.Series:
    """Whether every pair of a pair's quad has metric_clean > 0 > metric_corrupt: the answer comes first, and goes."""
    own = (pairs["metric_clean"] > 0) & (pairs["metric_corrupt"] < 0)
    return own.groupby(pairs["quad_id"]).transform("all")
