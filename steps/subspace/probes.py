"""Linear probes: what can be read off the residual stream about the people in a prompt, layer by layer.

1. Two kinds of prompts. `of_pairs`: the prompts of the quads. `of_people`: one-name prompts about other people,
   drawn evenly over supersets and, within them, over professions. Each is asked in two templates, and read at `names`
   (the mean over the last tokens of its names: one reading per prompt, whatever their token counts) and at `last`.
2. A probe is a ridge regression on one-hot classes (`centred_ridge`: its strength is chosen for each class by
   leave-one-out error inside the training folds), and a prompt gets the class whose training mean lies nearest in the
   regression's output. All label permutations are fitted side by side, in one factorisation.
3. Reduced rank: the fitted outputs are projected on their first r singular vectors (reduced-rank regression; Izenman
   1975; with the nearest mean it is discriminant analysis, Hastie, Buja and Tibshirani 1995).
4. Folds `people`: no person of a test fold is in training; quads stay whole. The same probes are tried on the held-out
   people's prompts in the other template and of the other kind, centred on their own training folds' mean. Folds
   `prompts`: every person is on both sides, in one template each; only there a *control* means something: labels
   permuted between people can be learned by heart (Hewitt and Liang 2019, arXiv 1909.03368).
5. `spectrum`: the class means' singular values beside those of permuted labels, and words at the directions' ends.
6. `baselines`: the same regression on what is known of the people without the model, in the very folds `people`: their
   region, century and gender, or the letters of their names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from lib import questions, tasks
from lib.data import NAMES, clusters
from lib.hooks import Model
from lib.readout import readout
from lib.single_pass import plain_runs
from lib.tasks import Prompt, token_texts
from pipeline.assumed import Case, tokens_of
from pipeline.costs import Work, plain
from pipeline.declaration import Table
from pipeline.params import Shared
from pipeline.population import people_of, unambiguous
from pipeline.rates import timed
from pipeline.step import Step, StepError
from pipeline.units import Unit

POSITIONS = ("names", "last")
STRENGTHS = (1e-6, 1e-4, 0.01, 0.1, 1.0, 10.0)  # of a ridge regression, times the inputs' total variance
WHOLE = -1  # the rank of a probe that is not reduced; the number of labels that are not permuted
BATCH = 32  # prompts of one pass
WORDS, DIRECTIONS = 6, 4  # words named at each end of a direction, and leading directions that are
PROFESSIONS = 70  # that have enough people for a probe, in the default book
# What a baseline sees: how many of the people are of each region, ..., or the n-grams of their names' letters.
BASELINES = {
    "metadata": partial(CountVectorizer, analyzer=list),
    "letters": partial(TfidfVectorizer, analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True),
}


class Asked(NamedTuple):
    """Prompts of one kind about the same people, in several templates."""

    kind: str  # "pair" or "one-name"
    rows: pd.DataFrame  # item (who the prompt is about), unit (quad or person), fold, and a column per target
    targets: tuple[str, ...]  # "" in a target's column: a class of too few people
    templates: tuple[str, ...]
    prompts: tuple[tuple[Prompt, ...], ...]  # templates x rows
    dropped: tuple[str, ...]  # what was left out, and why
    people: tuple[tuple[str, ...], ...] = ()  # names, by row


class Labels(NamedTuple):
    """One target: its classes, and labels as codes, the true ones first, then permutations of them."""

    target: str
    classes: np.ndarray
    there: np.ndarray  # rows with a class
    codes: Int[np.ndarray, "labellings rows"]

    @property
    def one_hot(self) -> Float[np.ndarray, "labellings rows classes"]:
        return np.eye(len(self.classes))[self.codes] * self.there[:, None]


class Seen(NamedTuple):
    """What was read of one kind of prompts at one layer and position."""

    asked: Asked
    position: str
    values: Float[np.ndarray, "templates prompts hidden"]

    def labels(self, params: Shared) -> list[Labels]:
        """Of each target."""
        return [labelled(self.asked.rows, name, params.permutations, params.seed) for name in self.asked.targets]


Readings = Callable[[int], list[list[Seen]]]  # of a layer: by kind of prompts, by position


def kinds_of(step: Step) -> tuple[list[Asked], list[str]]:
    """Both kinds of prompts, as far as there are enough for probes, and why there are none of a kind."""
    kinds, missing = [], []
    for make in (of_pairs, of_people):
        try:
            kinds.append(make(step))
        except StepError as error:
            missing.append(f"Not made: {error}.")
    return kinds, missing


def of_pairs(step: Step) -> Asked:
    """The prompts of the pairs, each couple of names once, in the profile's template and the other one."""
    p, pairs, parts = step.params, step.pairs(), []
    for side, answer in (("clean", "answer"), ("corrupt", "corrupt_answer")):
        names = pairs[[f"{side}_a", f"{side}_b"]].to_numpy().tolist()
        about = {"item": [" and ".join(sorted(both)) for both in names], "people": names}
        parts.append(pd.DataFrame(about | {"unit": pairs["quad_id"], "superset": pairs[answer]}))
        if p.pairs_file is not None:  # whose quads may share a name
            quads = pairs.assign(quad="quad " + pairs["quad_id"])
            parts[-1]["unit"] = clusters(quads, (*NAMES, "quad")).astype(str)
    rows = pd.concat(parts, ignore_index=True).drop_duplicates("item").reset_index(drop=True)
    return asked(step, "pair", rows, ("superset",), dict.fromkeys((p.template, p.probe_template)), p.task)


def of_people(step: Step) -> Asked:
    """One-name prompts about `probe_people` people of whom no pair speaks."""
    p, pairs = step.params, step.pairs()
    known = set(pairs[[f"{side}_{slot}" for side in ("clean", "corrupt") for slot in "ab"]].to_numpy().ravel())
    everyone = people_of(step)
    drawn = draw(everyone[~everyone["name"].isin(known)], p.probe_people, p.probe_folds, step.rng("probe people"))
    rows = drawn[["superset", "profession"]].assign(
        item=drawn["name"], unit=drawn["name"], people=[[n] for n in drawn["name"]]
    )
    return asked(step, "one-name", rows, ("superset", "profession"), p.probe_questions, "one_name")


def draw(people: pd.DataFrame, count: int, least: int, rng: np.random.Generator) -> pd.DataFrame:
    """About `count` people at random, as many of each superset and, in it, of each profession as there are.

    With few people per superset only its most frequent professions are drawn, so that each gets `least` of them. People
    of two supersets, and those with a namesake, are left out.
    """
    people = unambiguous(people)
    if people.empty:
        return people
    people, quota = people.iloc[rng.permutation(len(people))], -(-count // people["superset"].nunique())
    sizes = people.groupby(["superset", "profession"]).size().sort_values(ascending=False, kind="stable")
    kept = sizes.groupby("superset").head(max(1, quota // least)).index.get_level_values("profession")
    people = people[people["profession"].isin(kept)]
    turn = people.groupby("profession").cumcount()
    return people.iloc[np.argsort(turn, kind="stable")].groupby("superset").head(quota).reset_index(drop=True)


def asked(
    step: Step, kind: str, rows: pd.DataFrame, targets: Sequence[str], templates: Sequence[str], task: str
) -> Asked:
    """Classes checked, folds dealt and prompts made; targets but the first are left out where they have no classes."""
    p, used, original = step.params, [], rows[targets[0]]
    rows, prompts, dropped = in_templates(step, rows, [p.topic.find(name, task) for name in templates])
    for target in targets:
        if used and rows[target].equals(original[rows.index]):
            continue  # the table has no finer labels than classes
        try:
            kept, why = large_enough(rows, target, p.probe_folds, kind)
        except StepError as error:
            if not used:
                raise
            dropped.append(f"Not made: {error}.")
            continue
        rows = rows.assign(**{target: rows[target].where(rows[target].isin(kept), "")})
        dropped, used = [*dropped, *why], [*used, target]
    rows = rows.reset_index(drop=True)
    rows = rows.assign(fold=folds_of(rows, used[-1], p.probe_folds, p.seed))
    people, rows = tuple(map(tuple, rows["people"])), rows.drop(columns="people")
    return Asked(kind, rows, tuple(used), tuple(templates), prompts, tuple(dropped), people)


def in_templates(
    step: Step, rows: pd.DataFrame, templates: Sequence[tasks.Template]
) -> tuple[pd.DataFrame, tuple[tuple[Prompt, ...], ...], list[str]]:
    """The rows whose names can be told from the text of every template, their prompts, and what was left out."""
    p, made, reasons = step.params, {}, []
    options = {"chat_template": p.chat_template, "attributes": p.attributes}
    for place, names in rows["people"].items():
        try:
            made[place] = [tasks.make_prompt(step.tokenizer, template, names, **options) for template in templates]
        except ValueError as error:
            reasons.append(str(error))
    said = [f"Left out of the probes: {len(reasons)} of {len(rows)} prompts ({reasons[0]})."] if reasons else []
    return rows.loc[[*made]], tuple(zip(*made.values(), strict=True)) or ((),) * len(templates), said


def large_enough(rows: pd.DataFrame, target: str, folds: int, kind: str) -> tuple[list[str], list[str]]:
    """Classes with one unit (what folds keep whole) per fold, and what was dropped; StepError for fewer than two."""
    sizes, word = rows.groupby(target)["unit"].nunique(), "quads" if kind == "pair" else "people"
    kept, small = sizes.index[sizes >= folds], sizes[sizes < folds]
    said = ", ".join(f"{name} ({size} {word})" for name, size in small.items())
    if len(kept) < 2:
        raise StepError(
            f"probes of {target} from {kind} prompts: {len(kept)} classes have at least {folds} {word}, one per fold; "
            f"too small are {said or 'all'}: give more people, or fewer probe_folds"
        )
    text = f"Left out of the probes of {target} ({kind} prompts), with fewer than {folds} {word}, one per fold: {said}."
    return list(kept), [text] * bool(len(small))


def folds_of(rows: pd.DataFrame, target: str, folds: int, seed: int) -> Int[np.ndarray, " rows"]:
    """A fold for each row, classes spread evenly, units whole. StepError where a person is in two units."""
    units = rows.explode("people").groupby("people")["unit"].nunique()
    if (units > 1).any():
        raise StepError(f"{units.idxmax()!r} is in {units.max()} quads: folds that share no person cannot be made")
    dealer, fold = StratifiedGroupKFold(folds, shuffle=True, random_state=seed), np.empty(len(rows), dtype=int)
    for number, (_, held) in enumerate(dealer.split(rows, rows[target], rows["unit"])):
        fold[held] = number
    return fold


def read(
    model: Model, questions: Asked, layers: Sequence[int]
) -> Mapping[str, Float[np.ndarray, "templates layers prompts hidden"]]:
    """The residual stream (block outputs) by position, as float32 on the CPU."""
    width = model.unembed.weight.shape[1]
    shape = (len(questions.templates), len(layers), len(questions.rows), width)
    out = {position: np.empty(shape, dtype=np.float32) for position in POSITIONS}
    for template, prompts in enumerate(questions.prompts):
        ids, at = [prompt.ids for prompt in prompts], [ends(prompt) for prompt in prompts]
        for places, run in plain_runs(model, ids, at, ("resid",), size=BATCH, layers=layers):
            for place, layer in enumerate(layers):
                seen = run.activations["resid", layer].float().cpu().numpy()
                out["names"][template, place, places] = seen[:, :-1].mean(1)
                out["last"][template, place, places] = seen[:, -1]
    return out


def ends(prompt: Prompt) -> tuple[int, ...]:
    """The last token of each name, and the prompt's last one."""
    names = [f"name_{slot}" for slot in "ab"]
    return *(prompt.roles[name][-1] for name in names if name in prompt.roles), len(prompt.ids) - 1


def readings(step: Step, kinds: Sequence[Asked]) -> Readings:
    """What gives the readings of a layer; the model reads the prompts once, when it is first asked."""
    every = cache(lambda: [read(step.model, one, step.layers) for one in kinds])

    def at(layer: int) -> list[list[Seen]]:
        place = step.layers.index(layer)
        both = zip(kinds, every(), strict=True)
        return [[Seen(one, name, seen[name][:, place]) for name in POSITIONS] for one, seen in both]

    return at


def labelled(rows: pd.DataFrame, target: str, permutations: int, seed: int) -> Labels:
    """The true labels of a target, and as many permutations of them between the rows that have one."""
    there = (rows[target] != "").to_numpy()
    classes, codes = np.unique(rows.loc[there, target], return_inverse=True)
    rng, out = np.random.default_rng(seed), np.zeros((permutations + 1, len(rows)), dtype=int)
    out[:, there] = [codes, *(rng.permutation(codes) for _ in range(permutations))]
    return Labels(target, classes, there, out)


def centred_ridge(x: Float[np.ndarray, "rows width"], y: Float[np.ndarray, "rows outputs"]) -> RidgeCV:
    """Ridge regression on centred inputs that keep their own units, its strength chosen for each output by
    leave-one-out error on the same rows.

    Inputs divided each by its own spread would make dimensions of mere noise count as much as those with a code, and
    names' rare n-grams as much as common ones. Strengths are times the total variance, so that they mean the same at
    any scale; the least ones are for a code beside dimensions that vary far more and say nothing.
    """
    total = max(float(np.var(x, axis=0, dtype=float).sum()), 1e-12)
    return RidgeCV([strength * total for strength in STRENGTHS], alpha_per_target=True).fit(x, y)


class Probe:
    """Ridge probes of several targets and labellings, fitted together on the same prompts."""

    def __init__(self, x: Float[np.ndarray, "rows width"], labels: Sequence[Labels], train: np.ndarray) -> None:
        self.labels, self.train, self.mean = labels, train, x[train].mean(0)
        columns = [own.one_hot[:, train] for own in labels]
        self.blocks = np.cumsum([0] + [block.shape[0] * block.shape[2] for block in columns])
        stacked = np.concatenate([block.transpose(1, 0, 2).reshape(train.sum(), -1) for block in columns], axis=1)
        self.ridge = centred_ridge(x[train], stacked)
        self.fitted = self.outputs(x[train])

    def outputs(self, x: Float[np.ndarray, "rows width"], mean: np.ndarray | None = None) -> list[np.ndarray]:
        """For each target (labellings, rows, classes); `mean` takes the training mean's place."""
        values = x if mean is None else x + (self.mean - mean)
        flat = np.split(self.ridge.predict(values), self.blocks[1:-1], axis=1)
        shapes = [(len(x), len(own.codes), len(own.classes)) for own in self.labels]
        return [own.reshape(shape).transpose(1, 0, 2) for own, shape in zip(flat, shapes, strict=True)]

    def predict(self, outputs: list[np.ndarray], target: int, labelling: int, rank: int = WHOLE) -> np.ndarray:
        """The code of the class whose training mean lies nearest, in the first `rank` singular directions."""
        fitted, found, own = self.fitted[target][labelling], outputs[target][labelling], self.labels[target]
        middle = fitted.mean(0)
        fitted, found = fitted - middle, found - middle
        if rank != WHOLE:
            directions = np.linalg.svd(fitted, full_matrices=False)[2][:rank].T
            fitted, found = fitted @ directions, found @ directions
        member = own.one_hot[labelling, self.train]
        sizes = member.sum(0)
        means = member.T @ fitted / sizes[:, None].clip(1)
        nearness = found @ means.T - (means**2).sum(1) / 2
        return np.where(sizes > 0, nearness, -np.inf).argmax(1)  # a class that no training fold has is never said


def weighted(codes: np.ndarray, right: np.ndarray, classes: int) -> Float[np.ndarray, " rows"]:
    """1 or 0, weighted so that the mean over all rows is the balanced accuracy."""
    return right * len(codes) / (classes * np.bincount(codes, minlength=classes)[codes])


def people_folds(own: Seen, other: Seen | None, ranks: Sequence[int], params: Shared) -> Iterator[pd.DataFrame]:
    """Accuracies on people that the probe has not seen: in its own template (whole, and at each of `ranks` and the
    largest, if any are asked for), in the other ones, and on the other kind of prompts, if there is one."""
    asked, labels = own.asked, own.labels(params)
    folds = asked.rows["fold"].to_numpy()
    caps = [len(one.classes) - 1 for one in labels]
    whole_and = [[WHOLE, *sorted({min(rank, cap) for rank in (*ranks, cap) if ranks})] for cap in caps]
    found: dict[tuple, np.ndarray] = defaultdict(lambda: np.zeros(len(folds), dtype=int))
    far_folds = folds[:0] if other is None else other.asked.rows["fold"].to_numpy()
    crossed = np.zeros(len(far_folds), dtype=int)
    for fold in range(folds.max() + 1):
        train, held, far_held = folds != fold, folds == fold, far_folds == fold
        far = None if other is None else other.values[0]
        probe = Probe(own.values[0], labels, train)
        for template, values in enumerate(own.values):
            outputs = probe.outputs(values[held], values[train].mean(0) if template else None)
            for target in range(len(labels)):
                for rank, labelling in product(whole_and[target], range(params.permutations + 1)):
                    if template == 0 or (rank, labelling) == (WHOLE, 0):
                        guess = probe.predict(outputs, target, labelling, rank)
                        found[target, template, rank, labelling][held] = guess
        if far is not None:
            outputs = probe.outputs(far[far_held], far[~far_held].mean(0))
            crossed[far_held] = probe.predict(outputs, 0, 0)
    about = {"position": own.position, "trained": asked.templates[0], "folds": "people"}
    for target, one in enumerate(labels):
        for rank in whole_and[target]:
            at = about | {"template": asked.templates[0], "rank": rank}
            yield scored(asked, one, found[target, 0, rank, 0], **at)
            guesses = [found[target, 0, rank, labelling] for labelling in range(1, len(one.codes))]
            yield permuted(one, guesses).assign(kind=asked.kind, target=one.target, labels="permuted", **at)
        for template, name in enumerate(asked.templates[1:], 1):
            yield scored(asked, one, found[target, template, WHOLE, 0], **about, template=name)
    away = None if other is None else labelled(other.asked.rows, "superset", 0, params.seed)
    if away and list(labels[0].classes) == list(away.classes):
        yield scored(other.asked, away, crossed, **about, template=other.asked.templates[0])


def scored(own: Asked, one: Labels, found: np.ndarray, **about: object) -> pd.DataFrame:
    """A row per prompt with a class: who, what, what the probe said, and its weighted score."""
    there, codes = one.there, one.codes[0][one.there]
    rows = own.rows.loc[there, ["item", "unit", "fold"]].assign(kind=own.kind, target=one.target, labels="true")
    score = weighted(codes, found[there] == codes, len(one.classes))
    return rows.assign(label=one.classes[codes], predicted=one.classes[found[there]], score=score, **about)


def permuted(one: Labels, guesses: Sequence[np.ndarray]) -> pd.DataFrame:
    """The balanced accuracy under each permutation of the labels."""
    rights = [
        weighted(codes[one.there], (guess == codes)[one.there], len(one.classes)).mean()
        for codes, guess in zip(one.codes[1:], guesses, strict=True)
    ]
    return pd.DataFrame({"score": rights, "permutation": np.arange(len(rights))})


def prompt_folds(own: Seen, params: Shared) -> Iterator[pd.DataFrame]:
    """Accuracies with every person on both sides, in one template each: the task, and the mean of the controls."""
    rows, labels, values = own.asked.rows, own.labels(params), own.values[:2]
    everyone = np.arange(len(rows))
    side = np.random.default_rng(params.seed).integers(2, size=len(everyone))
    values = values - values.mean(1, keepdims=True)  # what tells the templates apart tells nothing of people
    totals = [np.zeros(one.codes.shape) for one in labels]
    for fold in (0, 1):
        probe = Probe(values[side ^ fold, everyone], labels, np.ones(len(everyone), dtype=bool))
        outputs = probe.outputs(values[1 - side ^ fold, everyone])
        for number, one in enumerate(labels):
            for labelling, codes in enumerate(one.codes):
                right = (probe.predict(outputs, number, labelling) == codes)[one.there]
                totals[number][labelling, one.there] += weighted(codes[one.there], right, len(one.classes)) / 2
    about = {"kind": own.asked.kind, "position": own.position, "trained": "both", "template": "both"}
    for one, total in zip(labels, totals, strict=True):
        for name, score in (("true", total[0]), ("control", total[1:].mean(0))):
            found = rows[["item", "unit"]].assign(target=one.target, labels=name, score=score, **about, folds="prompts")
            yield found[one.there]


# --- baselines ----------------------------------------------------------------------------------------------------


def seen_without_model(
    people: pd.DataFrame, names: Sequence[Sequence[str]], question: str = questions.DEFAULT
) -> dict[str, list]:
    """What each baseline sees of the people of each prompt: words for their attributes (and for those that quads
    are matched in together), or their names. Of people who are not in the table nothing is known."""
    topic = questions.load(question)
    known = people.set_index("name")[[*topic.attributes]].astype(str)
    if len(topic.match) > 1:
        known[" and ".join(topic.match)] = known[list(topic.match)].agg(" ".join, axis=1)
    words = {name: [f"{key} {value}" for key, value in row.items()] for name, row in known.to_dict("index").items()}
    metadata = [[word for name in both for word in words.get(name) or ["unknown"]] for both in names]
    return {"metadata": metadata, "letters": [" ".join(both) for both in names]}


def baseline_folds(own: Asked, seen: Mapping[str, Sequence], seed: int) -> Iterator[pd.DataFrame]:
    """As `people_folds`, from what each of BASELINES sees; whatever it counts is chosen in the training folds."""
    labels, folds = [labelled(own.rows, target, 0, seed) for target in own.targets], own.rows["fold"].to_numpy()
    for name, vectoriser in BASELINES.items():
        guesses = np.zeros((len(labels), len(folds)), dtype=int)
        for fold in range(folds.max() + 1):
            held = folds == fold
            fitted = vectoriser().fit([one for one, out in zip(seen[name], held, strict=True) if not out])
            x = fitted.transform(seen[name]).toarray()
            probe = Probe(x, labels, ~held)
            outputs = probe.outputs(x[held])
            for target in range(len(labels)):
                guesses[target, held] = probe.predict(outputs, target, 0)
        for one, guess in zip(labels, guesses, strict=True):
            yield scored(own, one, guess, baseline=name)


def baselines(step: Step, kinds: Sequence[Asked]) -> pd.DataFrame:
    """Accuracies of the baselines: a row per prompt."""
    people = people_of(step)
    each = (
        baseline_folds(own, seen_without_model(people, own.people, step.params.question), step.params.seed)
        for own in kinds
    )
    return pd.concat([frame for frames in each for frame in frames], ignore_index=True)


def of_baselines(case: Case, units: Sequence[Unit], kinds: None) -> Work:
    """The cost of the baselines: fits of few labels on many columns, each about as long as a probe's."""
    folds, rows = len(BASELINES) * case.params.probe_folds, len(case.pairs) + case.params.probe_people
    return Work(table=60 * rows, other={"pair probes": folds, "people probes": folds})


BASELINE_SCORES = Table.whole("probe_baselines", baselines, of_baselines)


# --- tables -------------------------------------------------------------------------------------------------------


def slice_layers(step: Step | Case) -> list[int]:
    """The slice's layers among those that are swept, its leading site's first; the last layer if there are none."""
    return list(dict.fromkeys(site.layer for site in step.slice() if site.layer in step.layers)) or [step.layers[-1]]


def layer_unit(layer: int, ranks: Sequence[int]) -> Unit:
    """A layer; `ranks` are those of its reduced probes."""
    return Unit(f"layer-{layer:03d}", (), {"layer": layer, "ranks": list(ranks)})


def every_layer(step: Step | Case, at: Readings | None) -> list[Unit]:
    """Every layer; ranks are reduced in those of the slice."""
    few = slice_layers(step)
    return [layer_unit(layer, step.params.ranks if layer in few else ()) for layer in step.layers]


def of_slice(step: Step | Case, at: Readings | None) -> list[Unit]:
    """The layers of the slice."""
    return [layer_unit(layer, ()) for layer in slice_layers(step)]


def accuracies(step: Step, at: Readings) -> Callable[[Unit], pd.DataFrame]:
    """Accuracies of the probes of a layer: a row per prompt, or per permutation of the labels."""
    p = step.params

    def compute(unit: Unit) -> pd.DataFrame:
        layer, parts = unit.options["layer"], []
        kinds = at(layer)
        for number, one in enumerate(kinds):
            other = kinds[1 - number] if len(kinds) > 1 else [None] * len(one)
            for own, far in zip(one, other, strict=True):
                parts += people_folds(own, far, unit.options["ranks"], p)
                if len(own.values) > 1:
                    parts += prompt_folds(own, p)
        frame = pd.concat(parts, ignore_index=True).assign(layer=layer)
        whole = {"fold": -1, "rank": WHOLE, "permutation": WHOLE, "item": "", "unit": "", "label": "", "predicted": ""}
        return frame.fillna(whole).astype(dict.fromkeys(("fold", "rank", "permutation", "layer"), "int32"))

    return compute


def spectra(step: Step, at: Readings) -> Callable[[Unit], pd.DataFrame]:
    """Class means of a layer (`spectrum`), of both kinds of prompts at both positions."""

    def compute(unit: Unit) -> pd.DataFrame:
        layer, parts = unit.options["layer"], []
        for own in (own for kind in at(layer) for own in kind):
            for one in own.labels(step.params):
                about = {"kind": own.asked.kind, "position": own.position, "target": one.target}
                parts.append(spectrum(step.model, own.values[0], one).assign(**about))
        frame = pd.concat(parts, ignore_index=True).assign(layer=layer)
        return frame.fillna({"permutation": WHOLE}).astype({"permutation": "int32", "layer": "int32"})

    return compute


def of_accuracies(case: Case, units: Sequence[Unit], at: None) -> Work:
    """The cost of the probes, and of reading the prompts, two templates of each kind."""
    p, shape = case.params, case.shape
    pairs, people = 2 * len(case.pairs), 2 * p.probe_people
    read = plain(shape, pairs, len(case.pairs[0].clean.ids), -(-pairs // 16))
    read += plain(shape, people, tokens_of(p.topic.find(p.topic.alone), [3])[0], -(-people // 16))
    fits = len(units) * 2 * (p.probe_folds + 2)
    table = len(units) * (p.permutations + 1) * 1400
    return read + Work(table=table, other={"pair probes": fits, "people probes": fits})


def of_spectra(case: Case, units: Sequence[Unit], at: None) -> Work:
    """The cost of the class means."""
    return Work(table=20000 * len(units), other={"spectra": len(units)})


ACCURACIES = Table("probes", every_layer, accuracies, of_accuracies, schema=None)
SPECTRA = Table("spectra", of_slice, spectra, of_spectra, schema=None)


def timings(hidden: int) -> dict[str, float]:
    """Seconds of fitting the probes of a fold and of predicting with them, at the sizes of the default profile."""
    rng, out = np.random.default_rng(0), {}
    for name, rows, classes in (("pair probes", 314, (5,)), ("people probes", 400, (5, PROFESSIONS))):
        x = rng.standard_normal((rows, hidden)).astype(np.float32)
        labels = [Labels("", np.arange(n), np.ones(rows, bool), rng.integers(n, size=(21, rows))) for n in classes]

        def fitted(x: np.ndarray = x, labels: Sequence[Labels] = labels) -> None:
            probe = Probe(x, labels, np.ones(len(x), bool))
            outputs = probe.outputs(x[:80])
            for target, labelling in product(range(len(labels)), range(21)):
                probe.predict(outputs, target, labelling)

        out[name] = timed(fitted, 1)
    return out


def spectrum(model: Model, x: Float[np.ndarray, "rows hidden"], one: Labels) -> pd.DataFrame:
    """Class means: singular values under each labelling, coordinates of the true ones, and words at their ends.

    Their unit is the spread within classes (the true ones; root of the mean variance of a dimension), one for all
    dimensions; the mean of the means is taken off.
    Columns: what, name, permutation, values (list), words.
    """
    x, rows = x[one.there].astype(np.float64), []
    member = one.one_hot[:, one.there]
    means = [own.T @ x / own.sum(0)[:, None] for own in member]
    scale = max(float(np.sqrt((x - means[0][one.codes[0, one.there]]).var(0).mean())), 1e-12)
    for number, own in enumerate(means):
        u, s, v = np.linalg.svd((own - own.mean(0)) / scale, full_matrices=False)
        s = s[: len(one.classes) - 1]
        rows.append({"what": "singular values", "name": "", "permutation": number - 1, "values": s, "words": ""})
        if number == 0:
            coordinates, vectors = u[:, : len(s)] * s, v[:DIRECTIONS]
    rows += [
        {"what": "class mean", "name": name, "values": own, "words": ""}
        for name, own in zip(one.classes, coordinates, strict=True)
    ]
    for number, own in enumerate(torch.from_numpy(vectors)):
        for sign, name in ((1, "high"), (-1, "low")):
            said = ", ".join(words(model, sign * own))
            rows.append({"what": "words", "name": f"{number + 1} {name}", "values": [], "words": said})
    return pd.DataFrame(rows)


def words(model: Model, vector: Float[Tensor, " hidden"], count: int = WORDS) -> list[str]:
    """The words whose unembedding, before the final norm, lies nearest to a vector of the residual stream (cosine).

    Only tokens that are whole words (a space, then four letters or more), since rare pieces lie far out everywhere.
    """
    texts, directions = _vocabulary(model)
    nearest = (directions @ vector.float()).topk(min(count, len(texts))).indices
    return [texts[index] for index in nearest.tolist()]


@lru_cache(maxsize=1)
def _vocabulary(model: Model) -> tuple[list[str], Float[Tensor, "words hidden"]]:
    """Tokens that are words, and their directions of unit length."""
    out, size = readout(model), len(model.tokenizer)
    texts = token_texts(model.tokenizer, range(min(size, len(out.unembed))))
    kept = [token for token, text in enumerate(texts) if re.fullmatch(r" [A-Za-z]{4,}", text)]
    directions = torch.nn.functional.normalize(out.directions(kept).float(), dim=-1)
    return [texts[token].strip() for token in kept], directions
