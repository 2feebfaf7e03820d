"""Linear probes: what can be read off the residual stream about the people in a prompt, layer by layer.

1. Two kinds of prompts. `of_pairs`: the clean prompts of the quads. `of_people`: one-name prompts about other people,
   drawn evenly over supersets and, within them, over professions. Each is asked in two templates, and read at `names`
   (the mean over the last tokens of its names: one reading per prompt, whatever their token counts) and at `last`.
2. A probe is a ridge regression on one-hot classes (scikit-learn's `RidgeCV`: its strength is chosen for each class by
   leave-one-out error inside the training folds; standardised inputs), and a prompt gets the class whose training mean
   lies nearest in the regression's output. All label permutations are fitted side by side, in one factorisation.
3. Reduced rank: the fitted outputs are projected on their first r singular vectors (reduced-rank regression; Izenman
   1975; with the nearest mean it is discriminant analysis, Hastie, Buja and Tibshirani 1995).
4. Folds `people`: no person of a test fold is in training; quads stay whole. The same probes are tried on the held-out
   people's prompts in the other template and of the other kind, centred on their own training folds' mean. Folds
   `prompts`: every person is on both sides, in one template each; only there a *control* means something: labels
   permuted between people can be learned by heart (Hewitt and Liang 2019, arXiv 1909.03368).
5. `spectrum`: the class means' singular values beside those of permuted labels, and words at the directions' ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lib import data, tasks
from lib.batches import token_ids
from lib.hooks import Model, Site
from lib.readout import readout
from lib.single_pass import base_run
from lib.tasks import Prompt
from pipeline.step import Step, StepError
from pipeline.units import Unit

POSITIONS = ("names", "last")
STRENGTHS = (0.1, 1.0, 10.0)  # ridge strengths, times the width: the mean square of a standardised activation
WHOLE = -1  # the rank of a probe that is not reduced; the number of labels that are not permuted
BATCH = 32  # prompts of one pass
WORDS, DIRECTIONS = 6, 4  # words named at each end of a direction, and leading directions that are

Readings = Mapping[str, Float[np.ndarray, "templates layers prompts hidden"]]  # by position


class Asked(NamedTuple):
    """Prompts of one kind about the same people, in several templates."""

    kind: str  # "pair" or "one-name"
    rows: pd.DataFrame  # item (who the prompt is about), unit (quad or person), fold, and a column per target
    targets: tuple[str, ...]  # "" in a target's column: a class of too few people
    templates: tuple[str, ...]
    prompts: tuple[tuple[Prompt, ...], ...]  # templates x rows
    dropped: tuple[str, ...]  # what was left out, and why


class Labels(NamedTuple):
    """One target: its classes, and labels as codes, the true ones first, then permutations of them."""

    target: str
    classes: np.ndarray
    there: np.ndarray  # rows with a class
    codes: Int[np.ndarray, "labellings rows"]

    @property
    def one_hot(self) -> Float[np.ndarray, "labellings rows classes"]:
        return np.eye(len(self.classes))[self.codes] * self.there[:, None]


def of_pairs(step: Step) -> Asked:
    """The clean prompts of the pairs, each couple of names once, in the profile's template and the other one."""
    p, pairs = step.params, step.pairs()
    couple = [" and ".join(sorted(names)) for names in zip(pairs["clean_a"], pairs["clean_b"], strict=True)]
    names = pd.Series(pairs[["clean_a", "clean_b"]].to_numpy().tolist())
    rows = pd.DataFrame({"item": couple, "unit": pairs["quad_id"], "superset": pairs["answer"], "people": names})
    rows = rows.drop_duplicates("item").reset_index(drop=True)
    return asked(step, "pair", rows, ("superset",), dict.fromkeys((p.template, p.probe_template)), p.task)


def of_people(step: Step) -> Asked:
    """One-name prompts about `probe_people` people of whom no pair speaks."""
    p, pairs = step.params, step.pairs()
    known = set(pairs[[f"{side}_{slot}" for side in ("clean", "corrupt") for slot in "ab"]].to_numpy().ravel())
    everyone = data.load_people(step.people_file)
    drawn = draw(everyone[~everyone["name"].isin(known)], p.probe_people, p.probe_folds, step.rng("probe people"))
    rows = drawn[["superset", "profession"]].assign(
        item=drawn["name"], unit=drawn["name"], people=[[n] for n in drawn["name"]]
    )
    return asked(step, "one-name", rows, ("superset", "profession"), p.probe_questions, "one_name")


def draw(people: pd.DataFrame, count: int, least: int, rng: np.random.Generator) -> pd.DataFrame:
    """About `count` people at random, as many of each superset and, in it, of each profession as there are.

    With few people per superset only its most frequent professions are drawn, so that each gets `least` of them. People
    of two supersets are left out.
    """
    people = people[~people["two_supersets"]]
    people, quota = people.iloc[rng.permutation(len(people))], -(-count // people["superset"].nunique())
    sizes = people.groupby(["superset", "profession"]).size().sort_values(ascending=False, kind="stable")
    kept = sizes.groupby("superset").head(max(1, quota // least)).index.get_level_values("profession")
    people = people[people["profession"].isin(kept)]
    turn = people.groupby("profession").cumcount()
    return people.iloc[np.argsort(turn, kind="stable")].groupby("superset").head(quota).reset_index(drop=True)


def asked(
    step: Step, kind: str, rows: pd.DataFrame, targets: Sequence[str], templates: Sequence[str], task: str
) -> Asked:
    """Classes checked, folds dealt and prompts made."""
    p, dropped = step.params, []
    for target in targets:
        kept, why = large_enough(rows, target, p.probe_folds, kind)
        rows, dropped = rows.assign(**{target: rows[target].where(rows[target].isin(kept), "")}), [*dropped, *why]
    rows = rows.assign(fold=folds_of(rows, targets[-1], p.probe_folds, p.seed))
    found = [tasks.find_template(name, task) for name in templates]
    options = {"chat_template": p.chat_template, "attributes": p.attributes}
    try:
        prompts = [
            tuple(tasks.make_prompt(step.tokenizer, template, names, **options) for names in rows["people"])
            for template in found
        ]
    except ValueError as error:
        raise StepError(str(error)) from None
    return Asked(kind, rows.drop(columns="people"), tuple(targets), tuple(templates), tuple(prompts), tuple(dropped))


def large_enough(rows: pd.DataFrame, target: str, folds: int, kind: str) -> tuple[list[str], list[str]]:
    """Classes with one unit (what folds keep whole) per fold, and what was dropped; StepError for fewer than two."""
    sizes, word = rows.groupby(target)["unit"].nunique(), "quads" if kind == "pair" else "people"
    kept, small = sizes.index[sizes >= folds], sizes[sizes < folds]
    said = ", ".join(f"{name} ({size} {word})" for name, size in small.items())
    if len(kept) < 2:
        raise StepError(
            f"probes of {target} from {kind} prompts: {len(kept)} classes have at least {folds} {word}, one per fold; "
            f"too small are {said}: give more people, or fewer probe_folds"
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


def read(model: Model, questions: Asked, layers: Sequence[int]) -> Readings:
    """The residual stream (block outputs) at both positions, as float32 on the CPU."""
    width = model.unembed.weight.shape[1]
    shape = (len(questions.templates), len(layers), len(questions.rows), width)
    out = {position: np.empty(shape, dtype=np.float32) for position in POSITIONS}
    for template, prompts in enumerate(questions.prompts):
        groups: dict[tuple, list[int]] = {}
        for index, prompt in enumerate(prompts):
            ends = tuple(prompt.roles[f"name_{slot}"][-1] for slot in "ab" if f"name_{slot}" in prompt.roles)
            groups.setdefault((len(prompt.ids), *ends), []).append(index)
        for (length, *ends), own in groups.items():
            for at in range(0, len(own), BATCH):
                chunk = own[at : at + BATCH]
                ids = token_ids(model, [prompts[index].ids for index in chunk])
                kept = base_run(model, ids, (*ends, length - 1), ("resid",)).activations
                for place, layer in enumerate(layers):
                    seen = kept["resid", layer].float().cpu().numpy()
                    out["names"][template, place, chunk] = seen[:, :-1].mean(1)
                    out["last"][template, place, chunk] = seen[:, -1]
    return out


def labelled(rows: pd.DataFrame, target: str, permutations: int, seed: int) -> Labels:
    """The true labels of a target, and as many permutations of them between the rows that have one."""
    there = (rows[target] != "").to_numpy()
    classes, codes = np.unique(rows.loc[there, target], return_inverse=True)
    rng, out = np.random.default_rng(seed), np.zeros((permutations + 1, len(rows)), dtype=int)
    out[:, there] = [codes, *(rng.permutation(codes) for _ in range(permutations))]
    return Labels(target, classes, there, out)


class Probe:
    """Ridge probes of several targets and labellings, fitted together on the same prompts."""

    def __init__(self, x: Float[np.ndarray, "rows hidden"], labels: Sequence[Labels], train: np.ndarray) -> None:
        self.labels, self.train = labels, train
        self.scaler = StandardScaler().fit(x[train])
        columns = [own.one_hot[:, train] for own in labels]
        self.blocks = np.cumsum([0] + [block.shape[0] * block.shape[2] for block in columns])
        stacked = np.concatenate([block.transpose(1, 0, 2).reshape(train.sum(), -1) for block in columns], axis=1)
        strengths = [strength * x.shape[1] for strength in STRENGTHS]
        self.ridge = RidgeCV(strengths, alpha_per_target=True).fit(self.scaler.transform(x[train]), stacked)
        self.fitted = self.outputs(x[train])

    def outputs(self, x: Float[np.ndarray, "rows hidden"], mean: np.ndarray | None = None) -> list[np.ndarray]:
        """For each target (labellings, rows, classes); `mean` takes the training mean's place."""
        values = (x - (self.scaler.mean_ if mean is None else mean)) / self.scaler.scale_
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


def people_folds(
    own: Asked, other: Asked, x: Readings, far: Readings, place: int, position: str, permutations: int,
    ranks: Sequence[int], seed: int,
) -> Iterator[pd.DataFrame]:  # fmt: skip
    """Accuracies on people that the probe has not seen: in its own template, the other one, and the other kind."""
    labels = [labelled(own.rows, target, permutations, seed) for target in own.targets]
    mine, theirs = x[position][:, place], far[position][0, place]
    folds, far_folds = own.rows["fold"].to_numpy(), other.rows["fold"].to_numpy()
    away, caps = labelled(other.rows, "superset", 0, seed), [len(one.classes) - 1 for one in labels]
    asked_ranks = [[WHOLE, *sorted({min(rank, cap) for rank in (*ranks, cap) if ranks})] for cap in caps]
    predicted = [np.zeros((len(r), *one.codes.shape), dtype=int) for r, one in zip(asked_ranks, labels, strict=True)]
    moved = [np.zeros((len(mine) - 1, len(folds)), dtype=int) for _ in labels]
    crossed = np.zeros(len(far_folds), dtype=int)
    for fold in range(folds.max() + 1):
        train, held, far_held = folds != fold, folds == fold, far_folds == fold
        probe = Probe(mine[0], labels, train)
        outputs = probe.outputs(mine[0, held])
        for number, own_ranks in enumerate(asked_ranks):
            for index, rank in enumerate(own_ranks):
                for labelling in range(permutations + 1):
                    predicted[number][index, labelling, held] = probe.predict(outputs, number, labelling, rank)
        for template in range(1, len(mine)):
            outputs = probe.outputs(mine[template, held], mine[template, train].mean(0))
            for number in range(len(labels)):
                moved[number][template - 1, held] = probe.predict(outputs, number, 0)
        outputs = probe.outputs(theirs[far_held], theirs[~far_held].mean(0))
        crossed[far_held] = probe.predict(outputs, 0, 0)
    about = {"position": position, "trained": own.templates[0], "folds": "people"}
    for number, one in enumerate(labels):
        for index, rank in enumerate(asked_ranks[number]):
            found = predicted[number][index]
            yield scored(own, one, found[0], **about, template=own.templates[0], rank=rank)
            rights = [
                weighted(codes[one.there], (guess == codes)[one.there], len(one.classes)).mean()
                for codes, guess in zip(one.codes[1:], found[1:], strict=True)
            ]
            null = pd.DataFrame({"score": rights, "permutation": np.arange(len(rights))})
            yield null.assign(kind=own.kind, target=one.target, labels="permuted", rank=rank, **about,
                              template=own.templates[0])  # fmt: skip
        for template, found in zip(own.templates[1:], moved[number], strict=True):
            yield scored(own, one, found, **about, template=template)
    if list(labels[0].classes) == list(away.classes):
        yield scored(other, away, crossed, **about, template=other.templates[0])


def scored(own: Asked, one: Labels, found: np.ndarray, **about: object) -> pd.DataFrame:
    """A row per prompt with a class: who, what, what the probe said, and its weighted score."""
    there, codes = one.there, one.codes[0][one.there]
    rows = own.rows.loc[there, ["item", "unit", "fold"]]
    return rows.assign(
        kind=own.kind, target=one.target, labels="true", label=one.classes[codes],
        predicted=one.classes[found[there]], score=weighted(codes, found[there] == codes, len(one.classes)), **about,
    )  # fmt: skip


def prompt_folds(
    own: Asked, x: Readings, place: int, position: str, permutations: int, seed: int
) -> Iterator[pd.DataFrame]:
    """Accuracies with every person on both sides, in one template each: the task, and the mean of the controls."""
    labels = [labelled(own.rows, target, permutations, seed) for target in own.targets]
    values, everyone = x[position][:2, place], np.arange(len(own.rows))
    side = np.random.default_rng(seed).integers(2, size=len(everyone))
    values = values - values.mean(1, keepdims=True)  # what tells the templates apart tells nothing of people
    totals = [np.zeros(one.codes.shape) for one in labels]
    for fold in (0, 1):
        probe = Probe(values[side ^ fold, everyone], labels, np.ones(len(everyone), dtype=bool))
        outputs = probe.outputs(values[1 - side ^ fold, everyone])
        for number, one in enumerate(labels):
            for labelling, codes in enumerate(one.codes):
                right = (probe.predict(outputs, number, labelling) == codes)[one.there]
                totals[number][labelling, one.there] += weighted(codes[one.there], right, len(one.classes)) / 2
    about = {"kind": own.kind, "position": position, "trained": "both", "template": "both", "folds": "prompts"}
    for one, total in zip(labels, totals, strict=True):
        for name, score in (("true", total[0]), ("control", total[1:].mean(0))):
            rows = own.rows[["item", "unit"]].assign(target=one.target, labels=name, score=score, **about)
            yield rows[one.there]


def rank_layers(layers: Sequence[int], sites: Sequence[Site]) -> list[int]:
    """The slice's layers among those that are swept, its leading site's first; the last layer if there are none."""
    return list(dict.fromkeys(site.layer for site in sites if site.layer in layers)) or [layers[-1]]


def plan(layers: Sequence[int], slice_layers: Sequence[int], ranks: Sequence[int]) -> list[Unit]:
    """A unit per layer; ranks are reduced in the layers of the slice."""
    reduced = {layer: list(ranks) * (layer in slice_layers) for layer in layers}
    return [Unit(f"layer-{layer:03d}", (), {"layer": layer, "ranks": own}) for layer, own in reduced.items()]


def prober(step: Step, pairs: Asked, people: Asked, layers: Sequence[int]) -> tuple[Callable, Callable]:
    """What `Step.table` computes units of `plan` with: accuracies, class means. Activations are harvested once."""
    p, kinds = step.params, (pairs, people)
    harvest = cache(lambda: tuple(read(step.model, one, layers) for one in kinds))

    def accuracies(unit: Unit) -> pd.DataFrame:
        x, place, parts = harvest(), list(layers).index(unit.options["layer"]), []
        for mine in (0, 1):
            for position in POSITIONS:
                common = (place, position, p.permutations)
                parts += people_folds(
                    kinds[mine], kinds[1 - mine], x[mine], x[1 - mine], *common, unit.options["ranks"], p.seed
                )
                if len(kinds[mine].templates) > 1:
                    parts += prompt_folds(kinds[mine], x[mine], *common, p.seed)
        frame = pd.concat(parts, ignore_index=True).assign(layer=unit.options["layer"])
        whole = {"fold": -1, "rank": WHOLE, "permutation": WHOLE, "item": "", "unit": "", "label": "", "predicted": ""}
        return frame.fillna(whole).astype({"fold": "int32", "rank": "int32", "permutation": "int32", "layer": "int32"})

    def spectra(unit: Unit) -> pd.DataFrame:
        x, place, parts = harvest(), list(layers).index(unit.options["layer"]), []
        for own, seen in zip(kinds, x, strict=True):
            for position in POSITIONS:
                for target in own.targets:
                    one = labelled(own.rows, target, p.permutations, p.seed)
                    rows = spectrum(step.model, seen[position][0, place], one)
                    parts.append(rows.assign(kind=own.kind, position=position, target=target))
        frame = pd.concat(parts, ignore_index=True).assign(layer=unit.options["layer"])
        return frame.fillna({"permutation": WHOLE}).astype({"permutation": "int32", "layer": "int32"})

    return accuracies, spectra


def spectrum(model: Model, x: Float[np.ndarray, "rows hidden"], one: Labels) -> pd.DataFrame:
    """Class means: singular values under each labelling, coordinates of the true ones, and words at their ends.

    The residual stream is scaled to unit spread within classes (the true ones); the mean of the means is taken off.
    Columns: what, name, permutation, values (list), words.
    """
    x, rows = x[one.there].astype(np.float64), []
    member = one.one_hot[:, one.there]
    means = [own.T @ x / own.sum(0)[:, None] for own in member]
    scale = (x - means[0][one.codes[0, one.there]]).std(0).clip(1e-12)
    for number, own in enumerate(means):
        u, s, v = np.linalg.svd((own - own.mean(0)) / scale, full_matrices=False)
        s = s[: len(one.classes) - 1]
        rows.append({"what": "singular values", "name": "", "permutation": number - 1, "values": s, "words": ""})
        if number == 0:
            coordinates, vectors = u[:, : len(s)] * s, v[:DIRECTIONS] * scale
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
    texts = model.tokenizer.batch_decode([[token] for token in range(min(size, len(out.unembed)))])
    kept = [token for token, text in enumerate(texts) if re.fullmatch(r" [A-Za-z]{4,}", text)]
    directions = torch.nn.functional.normalize(out.directions(kept).float(), dim=-1)
    return [texts[token].strip() for token in kept], directions
