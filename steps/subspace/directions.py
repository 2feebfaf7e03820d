"""Directions that carry the class at `last`: where they are fitted, and the table of them.

1. `halves` takes apart the pairs that directions are fitted on and those they are patched in.
2. `fitted_means` runs the fitting half's prompts plainly, those of every template, and keeps the class means at the
   slice's layers: differences between them are the class directions.
3. `found` adds, after one layer, nested orthonormal bases of the class means, of a linear probe's weights and of the
   means of the professions, the principal components of the model's own activations, and a learned rotation.

`steps.subspace.direction_sweeps` puts them into the model; `direction_report.load` reads the table without torch.

Source: Geiger et al. 2023 (arXiv 2303.02536: distributed alignment search).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn.utils.parametrizations import orthogonal

from lib import batches, data, hooks, tasks
from lib.hooks import Model, Site, materialised
from lib.single_pass import BaseRun, SharedPrefix, base_run
from lib.tasks import SUPERSETS, Pair
from pipeline.step import Step
from pipeline.units import Unit

ONE_NAME = "profession_is"
VARIANCE = 0.95  # share of the variance that the principal components hold
BATCH, RATE = 32, 0.02  # pairs a step and Adam's rate, of the learned rotation
MEANS = ["template", "layer", "class_name", "prompts", "vector"]
COLUMNS = ["template", "layer", "method", "k", "class_name", "index", "vector", "prompts", "variance", "between"]
Vectors = Mapping[str, Float[np.ndarray, " width"]]  # by class


def halves(step: Step, table: pd.DataFrame) -> tuple[pd.DataFrame, list[Pair]]:
    """The rows of the pairs table that directions are fitted on (the discovery half, or the only one), and the pairs,
    of both halves, on which they are patched: those whose two classes the fitting half has."""
    own = table[table["half"] == "discovery"]
    own = own if len(own) else table
    classes = {*own["answer"], *own["corrupt_answer"]}
    there = table[table["answer"].isin(classes) & table["corrupt_answer"].isin(classes)]
    pairs = batches.subsample(step.prompts(there), step.params.pairs)
    return own, [replace(pair, labels=(), label_tokens=()) for pair in pairs]


def prompts_of(step: Step, table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The prompts of a template with the names of both sides of the pairs, each once (of a one-name template: a prompt
    for each name). Columns: ids, superset, names."""
    p, rows = step.params, {}
    options = {"chat_template": p.chat_template, "attributes": p.attributes}
    template = tasks.find_template(name, p.task)
    if name != p.template:  # a quad's first pair has all its people
        table = table.drop_duplicates("quad_id")
    if len(template.slots) == 2:
        table, _ = data.aligned(table.assign(template=name, task=template.task), step.tokenizer, **options)
    for row in table.to_dict("records"):
        for side, superset in (("clean", row["answer"]), ("corrupt", row["corrupt_answer"])):
            both = [row[f"{side}_a"], row[f"{side}_b"]]
            for names in [both] if len(template.slots) == 2 else [[one] for one in both]:
                ids = tasks.make_prompt(step.tokenizer, template, names, **options).ids
                rows.setdefault(ids, {"ids": ids, "superset": superset, "names": tuple(names)})
    return pd.DataFrame(list(rows.values()), columns=["ids", "superset", "names"])


@torch.no_grad()
def activations(
    model: Model, prompts: Sequence[Sequence[int]], layers: Sequence[int]
) -> dict[int, Float[np.ndarray, "prompts width"]]:
    """The residual stream at the last token after each of the layers, in fp64."""
    sites = [Site(layer, "resid") for layer in layers]
    out: dict[int, np.ndarray] = {}
    for length in sorted({len(ids) for ids in prompts}):
        index = np.flatnonzero([len(ids) == length for ids in prompts])
        for at in range(0, len(index), 32):
            chunk = index[at : at + 32]
            with hooks.capture(model, sites, [-1]) as seen:
                model.body(input_ids=batches.token_ids(model, [prompts[i] for i in chunk]), use_cache=False)
            for site, value in seen.items():
                own = out.setdefault(site.layer, np.empty((len(prompts), value.shape[-1])))
                own[chunk] = value[:, 0].cpu().double().numpy()
    return out


def class_means(values: Float[np.ndarray, "prompts width"], labels: Sequence[str]) -> Vectors:
    """The mean of each class, in the order of SUPERSETS. ValueError for fewer than two classes."""
    labels = np.asarray(labels)
    found = [name for name in SUPERSETS if (labels == name).any()]
    if len(found) < 2:
        raise ValueError(
            f"a class direction needs prompts of two supersets; the fitting half has {', '.join(found) or 'none'}"
        )
    return {name: values[labels == name].mean(0) for name in found}


def fitted_means(step: Step, fit: pd.DataFrame, layers: Sequence[int], kept: dict[int, np.ndarray]) -> pd.DataFrame:
    """Class means at the layers for the profile's own template, the others and the one-name template (MEANS).

    The caller keeps `kept` between calls: the own template's activations by layer, if they were computed here.
    """
    p = step.params
    names = list(dict.fromkeys([p.template, *p.templates, ONE_NAME]))

    def compute(unit: Unit) -> pd.DataFrame:
        name, rows = unit.options["template"], []
        prompts = prompts_of(step, fit, name)
        if name != p.template and prompts["superset"].nunique() < 2:  # too few line up there: not a source
            return pd.DataFrame(columns=MEANS)
        values = activations(step.model, prompts["ids"].tolist(), layers)
        kept.update(values if name == p.template else {})
        counts = Counter(prompts["superset"])
        for layer, own in values.items():
            for superset, vector in class_means(own, prompts["superset"]).items():
                rows.append((name, layer, superset, counts[superset], vector.astype(np.float32)))
        return pd.DataFrame(rows, columns=MEANS)

    plan = [Unit(f"means-{i}", tuple(fit["pair_id"]), {"template": n, "layers": layers}) for i, n in enumerate(names)]
    return step.table("class_means", plan, compute, schema=None)


def vectors_of(means: pd.DataFrame, template: str, layer: int) -> Vectors:
    """Class means of one template and layer."""
    own = means[(means["template"] == template) & (means["layer"] == layer)]
    return {name: np.asarray(v, dtype=float) for name, v in zip(own["class_name"], own["vector"], strict=True)}


def spanned(vectors: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, "k width"]:
    """An orthonormal basis of the differences between the rows, the direction of most spread first: at most one less
    than there are rows."""
    centred = vectors - vectors.mean(0)
    _, size, basis = np.linalg.svd(centred, full_matrices=False)
    return basis[: min(len(vectors) - 1, int((size > 1e-6 * size[0]).sum()))]


def against_rest(vectors: Vectors, name: str) -> Float[np.ndarray, " width"]:
    """From the mean of the other classes to this one's."""
    return vectors[name] - np.mean([vectors[other] for other in vectors if other != name], axis=0)


def found(
    step: Step,
    pairs: Sequence[Pair],
    fit: pd.DataFrame,
    layer: int,
    means: pd.DataFrame,
    kept: Mapping[int, np.ndarray],
) -> pd.DataFrame:
    """The table of all directions: class means at the slice's layers, of all templates, and at `layer` unit vectors.

    Columns: template, layer, method, k (directions fitted together; 0: nested, the first n span the subspace of n),
    class_name ("" where it belongs to none), index, vector, prompts, half (of the fit), and for unit vectors what the
    model's activations on the patched pairs of the last half do along them: `variance`, over its median along 200
    random directions, and `between`, the share of it that lies between classes.
    """
    p = step.params

    def compute(_: Unit) -> pd.DataFrame:
        prompts, own = prompts_of(step, fit, p.template), reported(pairs)
        ids = prompts["ids"].tolist()
        values = kept[layer] if layer in kept else activations(step.model, ids, [layer])[layer]
        profession = data.load_people(step.people_file).set_index("name")["profession"].to_dict()
        professions = prompts["names"].map(lambda names: [profession.get(name) for name in names])
        bases = subspaces(values, prompts["superset"], professions)
        sizes = {1, min(len(bases["class means", 0]), max(p.dimensions))}
        training = batches.subsample(step.prompts(fit), p.pairs)
        learned = rotations(step.model, training, layer, sorted(sizes), p.rotation_steps, p.seed)
        bases |= {("rotation", k): basis for k, basis in learned.items()}
        seen = {side.ids: pair.candidates[answer] for pair in own
                for side, answer in ((pair.clean, pair.answer), (pair.corrupt, pair.corrupt_answer))}  # fmt: skip
        there = activations(step.model, list(seen), [layer])[layer]
        random = step.rng("median direction").standard_normal((200, there.shape[1]))
        median = np.median((there @ (random / np.linalg.norm(random, axis=1, keepdims=True)).T).var(0))
        parts = []
        for (method, k), basis in bases.items():
            variance, between = spread_along(there, np.array(list(seen.values())), basis)
            about = {"method": method, "k": k, "index": range(len(basis)), "vector": list(basis.astype(np.float32))}
            parts.append(pd.DataFrame(about | {"variance": variance / median, "between": between}))
        out = pd.concat(parts).assign(template=p.template, layer=layer, class_name="", prompts=len(prompts))
        lead = means.assign(method="class mean", k=0, index=means.groupby(["template", "layer"]).cumcount())
        return pd.concat([lead.assign(variance=np.nan, between=np.nan), out])[COLUMNS].assign(half=fit["half"].iloc[0])

    plan = [Unit("directions", tuple(pair.pair_id for pair in pairs), {"layer": layer, "fit": list(fit["pair_id"])})]
    return step.table("directions", plan, compute, schema=None)


def reported(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs of the confirmation half, or all where there are none."""
    return [pair for pair in pairs if pair.half == "confirmation"] or list(pairs)


def subspaces(
    values: Float[np.ndarray, "prompts width"], labels: Sequence[str], professions: Sequence[Sequence[str | None]]
) -> dict[tuple[str, int], Float[np.ndarray, "k width"]]:
    """Nested orthonormal bases by (method, 0): of class means, of a linear probe's weights, of the means of the
    professions (of all prompts with a name of each), and the principal components that hold VARIANCE of the variance.

    The probe is a ridge regression on the one-hot class. Its penalty is the total variance, so that it halves the
    weight of a component that holds just one prompt's share.
    """
    means, labels, centred = class_means(values, labels), np.asarray(labels), values - values.mean(0)
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


def rotations(
    model: Model, pairs: Sequence[Pair], layer: int, sizes: Sequence[int], steps: int, seed: int
) -> dict[int, Float[np.ndarray, "k width"]]:
    """For each of `sizes`, so many orthonormal directions, learned by gradient descent (arXiv 2303.02536, section 3):
    the change along them, clean into corrupt, after `layer`, is to make the clean answer the top candidate
    (cross-entropy over the candidates, before any soft cap)."""
    groups, weights = [], materialised(model.unembed)
    for length in sorted({len(pair.clean.ids) for pair in pairs}):
        own = [pair for pair in pairs if len(pair.clean.ids) == length]
        corrupt = base_run(model, batches.token_ids(model, [p.corrupt.ids for p in own]), [length - 1], ("resid",))
        before = corrupt.activations["resid", layer][:, 0]
        wanted = torch.tensor(activations(model, [p.clean.ids for p in own], [layer])[layer]).to(before)
        groups.append((own, corrupt, before, wanted))
    shares, out = np.array([len(own) for own, *_ in groups]) / len(pairs), {}
    for k in sizes:
        rng = np.random.default_rng([seed, k])
        torch.manual_seed(seed)
        turn = orthogonal(torch.nn.Linear(before.shape[1], k, bias=False, device=before.device))
        optimiser = torch.optim.Adam(turn.parameters(), lr=RATE)
        for _ in range(steps):
            own, corrupt, before, wanted = groups[rng.choice(len(groups), p=shares)]
            batch = torch.tensor(rng.permutation(len(own))[:BATCH])
            basis, start = turn.weight.to(before.dtype), before[batch]
            final = resumed(model, corrupt, layer, start + (wanted[batch] - start) @ basis.T @ basis, batch)
            tokens = torch.tensor([own[i].corrupt_tokens for i in batch], device=weights.device)
            logits = (weights[tokens] @ final.to(weights)[:, :, None])[:, :, 0].float()
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
    start, owner = base.ids.shape[1] - 1, owner.to(base.ids.device)
    with hooks.with_forwards(forwards):
        out = model.body(
            input_ids=base.ids[owner, start:],
            past_key_values=SharedPrefix(base.cache, start, owner),
            position_ids=torch.tensor([[start]], device=base.ids.device),
            use_cache=True,
        )
    return out.last_hidden_state[:, -1]


def unit(vector: Float[np.ndarray, " width"]) -> Float[np.ndarray, "1 width"]:
    return (vector / np.linalg.norm(vector))[None]
