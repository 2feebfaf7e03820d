"""Directions that carry the class at `last`: where they are fitted, and the table of them.

1. `halves` takes apart the pairs that directions are fitted on and those they are patched in.
2. `CLASS_MEANS` runs the fitting half's prompts plainly, those of every template, and keeps the class means at the
   slice's layers: differences between them are the class directions.
3. `DIRECTIONS` adds, after one layer, nested orthonormal bases of the class means, of a linear probe's weights and of
   the means of the professions, the principal components of the model's own activations, and a learned rotation.

`steps.subspace.direction_sweeps` puts them into the model.

Source: Geiger et al. 2023 (arXiv 2303.02536: distributed alignment search).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn.utils.parametrizations import orthogonal

from lib import hooks, tasks
from lib.hooks import Model
from lib.single_pass import BaseRun, base_run, plain_runs, rerun, token_ids
from lib.tasks import Pair
from pipeline import costs
from pipeline.assumed import Case, tokens_of
from pipeline.costs import Work, plain
from pipeline.declaration import Table
from pipeline.params import Shared
from pipeline.population import aligned, people_of
from pipeline.step import Step
from pipeline.units import Unit, subsample, without_labels

VARIANCE = 0.95  # share of the variance that the principal components hold
BATCH = 32  # prompts of a pass, and pairs of a step in which a rotation is learned
RATE = 0.02  # Adam's
MEANS = ["template", "layer", "class_name", "prompts", "vector"]
COLUMNS = ["template", "layer", "method", "k", "class_name", "index", "vector", "prompts", "variance", "between"]
Vectors = Mapping[str, Float[np.ndarray, " width"]]  # by class


# --- pairs and prompts --------------------------------------------------------------------------------------------


def halves(step: Step, table: pd.DataFrame) -> tuple[pd.DataFrame, list[Pair]]:
    """The rows of the pairs table that directions are fitted on (the discovery half, or the only one), and the pairs,
    of both halves, on which they are patched: those whose two classes the fitting half has."""
    own = table[table["half"] == "discovery"]
    own = own if len(own) else table
    classes = {*own["answer"], *own["corrupt_answer"]}
    there = table[table["answer"].isin(classes) & table["corrupt_answer"].isin(classes)]
    return own, without_labels(subsample(step.prompts(there), step.params.pairs))


def reported(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs of the confirmation half, or all where there are none."""
    return [pair for pair in pairs if pair.half == "confirmation"] or list(pairs)


def templates(params: Shared) -> list[str]:
    """The profile's own template and the others between which directions are moved."""
    return list(dict.fromkeys([params.template, *params.templates]))


def prompts_of(step: Step, table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The prompts of a template with the names of both sides of the pairs, each once (of a one-name template: a prompt
    for each name that can be told from its text). Columns: ids, superset, names."""
    p, rows = step.params, {}
    options = {"chat_template": p.chat_template, "attributes": p.attributes}
    template = tasks.find_template(name, p.task, question=p.question)
    if name != p.template and p.pairs_file is None:  # a quad's first pair has all its people
        table = table.drop_duplicates("quad_id")
    if len(template.slots) == 2:
        table, _ = aligned(
            table.assign(template=name, task=template.task), step.tokenizer, question=p.question, **options
        )
    for row in table.to_dict("records"):
        for side, superset in (("clean", row["answer"]), ("corrupt", row["corrupt_answer"])):
            both = [row[f"{side}_a"], row[f"{side}_b"]]
            for names in [both] if len(template.slots) == 2 else [[one] for one in both]:
                with suppress(ValueError):  # a name that merges with the text of a one-name template
                    ids = tasks.make_prompt(step.tokenizer, template, names, **options).ids
                    rows.setdefault(ids, {"ids": ids, "superset": superset, "names": tuple(names)})
    return pd.DataFrame(list(rows.values()), columns=["ids", "superset", "names"])


def read_on(step: Step, fit: pd.DataFrame, layer: int) -> tuple[pd.DataFrame, Float[np.ndarray, "prompts width"]]:
    """The fitting half's prompts in the profile's template, and their activations after a layer; read once."""
    prompts = prompts_of(step, fit, step.params.template)

    def read() -> Float[np.ndarray, "prompts width"]:
        return activations(step.model, prompts["ids"].tolist(), [layer])[layer]

    return prompts, step.shared(f"activations after layer {layer}", read)


def activations(
    model: Model, prompts: Sequence[Sequence[int]], layers: Sequence[int]
) -> dict[int, Float[np.ndarray, "prompts width"]]:
    """The residual stream at the last token after each of the layers, in fp64."""
    out: dict[int, np.ndarray] = {}
    for places, run in plain_runs(model, prompts, [-1], ("resid",), size=BATCH, layers=layers):
        for layer in layers:
            value = run.activations["resid", layer][:, 0].cpu().double().numpy()
            out.setdefault(layer, np.empty((len(prompts), value.shape[-1])))[places] = value
    return out


# --- class means --------------------------------------------------------------------------------------------------


def class_means(values: Float[np.ndarray, "prompts width"], labels: Sequence[str], supersets: Sequence[str]) -> Vectors:
    """The mean of each class, in the order of `supersets`. ValueError for fewer than two classes."""
    labels = np.asarray(labels)
    found = [name for name in supersets if (labels == name).any()]
    if len(found) < 2:
        raise ValueError(
            f"a class direction needs prompts of two supersets; the fitting half has {', '.join(found) or 'none'}"
        )
    return {name: values[labels == name].mean(0) for name in found}


def mean_units(step: Step | Case, fit: pd.DataFrame, layers: Sequence[int]) -> list[Unit]:
    """A unit for each template and for the one-name template, on the prompts of the pairs `fit`."""
    names, pairs = dict.fromkeys([*templates(step.params), step.params.topic.alone]), tuple(fit["pair_id"])
    return [Unit(f"means-{i}", pairs, {"template": name, "layers": layers}) for i, name in enumerate(names)]


def fitted_means(step: Step, fit: pd.DataFrame, layers: Sequence[int]) -> Callable[[Unit], pd.DataFrame]:
    """Class means of a template at the layers (MEANS)."""

    def compute(unit: Unit) -> pd.DataFrame:
        name, rows = unit.options["template"], []
        prompts = prompts_of(step, fit, name)
        if name != step.params.template and prompts["superset"].nunique() < 2:  # too few line up there: not a source
            return pd.DataFrame(columns=MEANS)
        counts = Counter(prompts["superset"])
        for layer, own in activations(step.model, prompts["ids"].tolist(), layers).items():
            for superset, vector in class_means(own, prompts["superset"], step.params.topic.supersets).items():
                rows.append((name, layer, superset, counts[superset], vector.astype(np.float32)))
        return pd.DataFrame(rows, columns=MEANS)

    return compute


def of_means(case: Case, units: Sequence[Unit], fit: pd.DataFrame, layers: Sequence[int]) -> Work:
    """The cost of class means: two prompts a pair in each template, four one-name prompts a quad."""
    shape, count, tokens = case.shape, 2 * len(fit), len(case.pairs[0].clean.ids)
    one, _ = tokens_of(case.params.topic.find(case.params.topic.alone), [3])
    both = plain(shape, count, tokens, -(-count // 32)).times(len(units) - 1)
    return (
        both + plain(shape, count, one, -(-count // 32)) + Work(table=7 * shape.hidden * 5 * len(layers) * len(units))
    )


CLASS_MEANS = Table("class_means", mean_units, fitted_means, of_means, schema=None)


def vectors_of(means: pd.DataFrame, template: str, layer: int) -> Vectors:
    """Class means of one template and layer."""
    own = means[(means["template"] == template) & (means["layer"] == layer)]
    return {name: np.asarray(v, dtype=float) for name, v in zip(own["class_name"], own["vector"], strict=True)}


# --- bases --------------------------------------------------------------------------------------------------------


def unit(vector: Float[np.ndarray, " width"]) -> Float[np.ndarray, "1 width"]:
    return (vector / np.linalg.norm(vector))[None]


def spanned(vectors: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, "k width"]:
    """An orthonormal basis of the differences between the rows, the direction of most spread first: at most one less
    than there are rows."""
    centred = vectors - vectors.mean(0)
    _, size, basis = np.linalg.svd(centred, full_matrices=False)
    return basis[: min(len(vectors) - 1, int((size > 1e-6 * size[0]).sum()))]


def against_rest(vectors: Vectors, name: str) -> Float[np.ndarray, " width"]:
    """From the mean of the other classes to this one's."""
    return vectors[name] - np.mean([vectors[other] for other in vectors if other != name], axis=0)


def basis_units(
    step: Step | Case, pairs: Sequence[Pair], fit: pd.DataFrame, layer: int, means: pd.DataFrame
) -> list[Unit]:
    """One unit: everything is fitted on the same activations."""
    return [Unit("directions", tuple(pair.pair_id for pair in pairs), {"layer": layer, "fit": list(fit["pair_id"])})]


def found(
    step: Step, pairs: Sequence[Pair], fit: pd.DataFrame, layer: int, means: pd.DataFrame
) -> Callable[[Unit], pd.DataFrame]:
    """All directions: class means at the slice's layers, of all templates, and at `layer` unit vectors.

    Columns: template, layer, method, k (directions fitted together; 0: nested, the first n span the subspace of n),
    class_name ("" where it belongs to none), index, vector, prompts, half (of the fit), and for unit vectors what the
    model's activations on the patched pairs of the last half do along them: `variance`, over its median along 200
    random directions, and `between`, the share of it that lies between classes.
    """
    p = step.params

    def compute(_: Unit) -> pd.DataFrame:
        prompts, values = read_on(step, fit, layer)
        profession = people_of(step).set_index("name")["profession"].to_dict()
        professions = prompts["names"].map(lambda names: [profession.get(name) for name in names])
        bases = subspaces(values, prompts["superset"], professions, p.topic.supersets)
        sizes = sorted({1, min(len(bases["class means", 0]), max(p.dimensions))})
        training = subsample(step.prompts(fit), p.pairs)
        learned = rotations(step.model, opposed(step.model, training, [layer]), layer, sizes, p.rotation_steps, p.seed)
        bases |= {("rotation", k): basis for k, basis in learned.items()}
        there, classes = seen(step, pairs, layer)
        random = step.rng("median direction").standard_normal((200, there.shape[1]))
        median = np.median((there @ (random / np.linalg.norm(random, axis=1, keepdims=True)).T).var(0))
        parts = []
        for (method, k), basis in bases.items():
            variance, between = spread_along(there, classes, basis)
            about = {"method": method, "k": k, "index": range(len(basis)), "vector": list(basis.astype(np.float32))}
            parts.append(pd.DataFrame(about | {"variance": variance / median, "between": between}))
        out = pd.concat(parts).assign(template=p.template, layer=layer, class_name="", prompts=len(prompts))
        return pd.concat([mean_rows(means), out])[COLUMNS].assign(half=fit["half"].iloc[0])

    return compute


def mean_rows(means: pd.DataFrame) -> pd.DataFrame:
    """Class means as rows of the table of directions."""
    index = means.groupby(["template", "layer"]).cumcount()
    return means.assign(method="class mean", k=0, index=index, variance=np.nan, between=np.nan)


def seen(step: Step, pairs: Sequence[Pair], layer: int) -> tuple[Float[np.ndarray, "prompts width"], np.ndarray]:
    """Activations of the prompts of the reported half after a layer, each prompt once, and their classes."""
    classes: dict[tuple[int, ...], str] = {}
    for pair in reported(pairs):
        classes[pair.clean.ids] = pair.candidates[pair.answer]
        classes[pair.corrupt.ids] = pair.candidates[pair.corrupt_answer]
    return activations(step.model, list(classes), [layer])[layer], np.array(list(classes.values()))


def of_bases(
    case: Case, units: Sequence[Unit], pairs: Sequence[Pair], fit: pd.DataFrame, layer: int, means: pd.DataFrame
) -> Work:
    """The cost of the bases: what is read, and two learned rotations."""
    shape, tokens = case.shape, len(case.pairs[0].clean.ids)
    learned = of_rotation(case, layer, 2 * case.params.rotation_steps)
    return plain(shape, 4 * len(reported(pairs)), tokens, 8) + learned + Work(table=4 * shape.hidden * 220)


def of_rotation(case: Case, layer: int, steps: int) -> Work:
    """The cost of learning a rotation after a layer in so many steps."""
    shape, tokens = case.shape, len(case.pairs[0].clean.ids)
    grown = 2.0 * steps * costs.block(shape, BATCH * (shape.n_layers - layer), tokens)
    return Work(passes=2 * steps, grown=grown, other={"rotations": steps})


DIRECTIONS = Table("directions", basis_units, found, of_bases, schema=None)


def subspaces(
    values: Float[np.ndarray, "prompts width"],
    labels: Sequence[str],
    professions: Sequence[Sequence[str | None]],
    supersets: Sequence[str],
) -> dict[tuple[str, int], Float[np.ndarray, "k width"]]:
    """Nested orthonormal bases by (method, 0): of class means, of a linear probe's weights, of the means of the
    professions (of all prompts with a name of each), and the principal components that hold VARIANCE of the variance.

    The probe is a ridge regression on the one-hot class. Its penalty is the total variance, so that it halves the
    weight of a component that holds just one prompt's share.
    """
    means, labels, centred = class_means(values, labels, supersets), np.asarray(labels), values - values.mean(0)
    hot = np.stack([labels == name for name in means], axis=1).astype(float)
    out = {("class means", 0): spanned(np.stack(list(means.values())))}
    out["probe", 0] = spanned(Ridge(alpha=centred.var(0).sum()).fit(values, hot).coef_)
    known = sorted({name for own in professions for name in own if name is not None})
    if len(known) > 1:
        rows = [values[[name in own for own in professions]].mean(0) for name in known]
        out["profession means", 0] = spanned(np.stack(rows))
    _, size, components = np.linalg.svd(centred, full_matrices=False)
    share = np.cumsum(size**2) / (size**2).sum()
    out["component", 0] = components[: int(np.searchsorted(share, VARIANCE)) + 1]
    return out


def spread_along(
    values: Float[np.ndarray, "prompts width"], labels: Sequence[str], basis: Float[np.ndarray, "k width"]
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Variance along each unit vector, and the share of it that lies between classes."""
    along_it, labels = values @ basis.T, np.asarray(labels)
    means = np.empty_like(along_it)
    for name in np.unique(labels):
        means[labels == name] = along_it[labels == name].mean(0)
    variance = along_it.var(0)
    return variance, means.var(0) / np.maximum(variance, 1e-12)


class Opposed(NamedTuple):
    """Pairs of one length: what rotations after any of some layers are learned from."""

    pairs: list[Pair]
    corrupt: BaseRun
    clean: Mapping[int, Float[Tensor, "pairs width"]]  # residual stream at the last token, by layer


def opposed(model: Model, pairs: Sequence[Pair], layers: Sequence[int]) -> list[Opposed]:
    """Both runs of each pair, once for all layers."""
    out = []
    for length in sorted({len(pair.clean.ids) for pair in pairs}):
        own = [pair for pair in pairs if len(pair.clean.ids) == length]
        corrupt = base_run(model, token_ids(model, [p.corrupt.ids for p in own]), [length - 1], ("resid",))
        read = activations(model, [p.clean.ids for p in own], layers)
        clean = {layer: torch.tensor(value).to(corrupt.activations["resid", layer]) for layer, value in read.items()}
        out.append(Opposed(own, corrupt, clean))
    return out


def rotations(
    model: Model, groups: Sequence[Opposed], layer: int, sizes: Sequence[int], steps: int, seed: int
) -> dict[int, Float[np.ndarray, "k width"]]:
    """For each of `sizes`, so many orthonormal directions, learned by gradient descent (arXiv 2303.02536, section 3):
    the change along them, clean into corrupt, after `layer`, is to make the clean answer the top candidate
    (cross-entropy over the candidates, before any soft cap)."""
    shares, out = np.array([len(group.pairs) for group in groups]) / sum(len(group.pairs) for group in groups), {}
    like = groups[0].clean[layer]
    for k in sizes:
        rng = np.random.default_rng([seed, k])
        torch.manual_seed(seed)
        turn = orthogonal(torch.nn.Linear(like.shape[1], k, bias=False, device=like.device))
        optimiser = torch.optim.Adam(turn.parameters(), lr=RATE)
        for _ in range(steps):
            own, corrupt, clean = groups[rng.choice(len(groups), p=shares)]
            before, wanted = corrupt.activations["resid", layer][:, 0], clean[layer]
            batch = torch.tensor(rng.permutation(len(own))[:BATCH])
            basis, start = turn.weight.to(before.dtype), before[batch]
            final = resumed(model, corrupt, layer, start + (wanted[batch] - start) @ basis.T @ basis, batch)
            weights, _ = model.unembedding([own[i].corrupt_tokens for i in batch])
            logits = (weights @ final.to(weights)[:, :, None])[:, :, 0].float()
            answers = torch.tensor([own[i].answer for i in batch], device=weights.device)
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(logits, answers).backward()
            optimiser.step()
        out[k] = turn.weight.detach().cpu().double().numpy()
    return out


def resumed(
    model: Model, base: BaseRun, layer: int, hidden: Float[Tensor, "rows width"], owner: Int[Tensor, " rows"]
) -> Float[Tensor, "rows width"]:
    """The final hidden state at the last token of runs in which block `layer` gave `hidden`; `owner` is each row's
    prompt among the base runs. Earlier blocks are skipped, and gradients flow through the later ones."""
    forwards = [(block, lambda x, *_, **__: x) for block in model.blocks[:layer]]
    forwards.append((model.blocks[layer], lambda *_, **__: hidden[:, None]))
    with hooks.with_forwards(forwards):
        return rerun(model, base, base.ids.shape[1] - 1, owner.to(base.ids.device))


# --- what a plan assumes ------------------------------------------------------------------------------------------


def assumed_means(params: Shared, layers: Sequence[int], width: int = 64) -> pd.DataFrame:
    """Class means of every template, of no meaning."""
    rng, names = np.random.default_rng(0), [*templates(params), params.topic.alone]
    rows = [(*key, 1, rng.standard_normal(width)) for key in product(names, layers, params.topic.supersets)]
    return pd.DataFrame(rows, columns=MEANS)


def assumed_table(params: Shared, layer: int, means: pd.DataFrame) -> pd.DataFrame:
    """A table of directions with as many of each method as there can be."""
    own, width = mean_rows(means[means["layer"] == layer]), len(means["vector"].iloc[0])
    cap = len(params.topic.supersets) - 1
    counts = {("class means", 0): cap, ("probe", 0): cap, ("profession means", 0): width, ("component", 0): width}
    counts |= {("rotation", k): k for k in sorted({1, min(cap, max(params.dimensions))})}
    rows = [(method, k, layer, vector) for (method, k), count in counts.items() for vector in np.eye(width)[:count]]
    return pd.concat([own, pd.DataFrame(rows, columns=["method", "k", "layer", "vector"])])
