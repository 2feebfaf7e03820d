"""Directions put into the model: patched clean into corrupt, moved to other prompts, and steered along.

1. A *change* is the part along an orthonormal basis Q of what patching would change, Q Q^T (clean - corrupt)
   (`along`). At a head it is taken in the space of the head's values: a head writes W_O z, so the least change of z
   that keeps what is written along Q is its projection onto the span of W_O^T Q (`pulled`).
2. `Changes` are what a table puts into the model (`lib.sweep.run_variants`). `by_layer`: by layer and in the slice as
   a whole. `by_number`: by number of directions after one layer, beside random subspaces of equal norm and split into
   the parts inside and outside the span in which the model's activations vary. `transfer`: directions of other prompts.
3. `steering` adds multiples of a class's direction to prompts that have no one class.

Source: Makelov, Lange, Geiger and Nanda 2024 (arXiv 2311.17030: a change along a patched direction may work through a
part of it along which the model's own activations do not vary).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib import hooks, records, sweep, tasks
from lib.hooks import Model, Site
from lib.single_pass import Activations, BaseRun
from lib.tasks import Pair
from pipeline.assumed import Case
from pipeline.costs import Work
from pipeline.declaration import Table
from pipeline.population import aligned, controls_of
from pipeline.step import Step
from pipeline.units import Unit, sweep_units, without_labels
from steps.subspace.directions import Vectors, against_rest, reported, spanned, unit, vectors_of

PARTS = ("inside", "outside")
FEW = 3  # random draws where they are only a check: all of `random_directions` stand beside the numbers of directions


# --- changes ------------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """A change by name: "method|number of directions|part"."""

    name: str
    basis: Callable[[Sequence[Pair], int], Float[Tensor, "#pairs width k"]] | None  # of pairs, layer; None: everything
    like: str = ""  # the variant whose norm it is scaled to, pair by pair
    within: Float[Tensor, "width k"] | None = None  # of an "inside" or "outside" part: the span


def fixed(name: str, basis: Float[np.ndarray, "k width"], like: str = "") -> Variant:
    """A variant of one orthonormal basis for all pairs and layers."""
    chosen = torch.tensor(np.array(basis, dtype=float).T)[None]
    return Variant(name, lambda pairs, layer: chosen, like)


def difference(name: str, vectors: Mapping[int, Vectors]) -> Variant:
    """The one direction from the mean of each pair's corrupt class to that of its clean class; `vectors` by layer."""

    def basis(pairs: Sequence[Pair], layer: int) -> Float[Tensor, "pairs width 1"]:
        own = vectors[layer]
        rows = np.stack([own[p.candidates[p.answer]] - own[p.candidates[p.corrupt_answer]] for p in pairs])
        return torch.tensor(rows / np.linalg.norm(rows, axis=1, keepdims=True))[:, :, None]

    return Variant(name, basis)


def random_variants(step: Step | Case, width: int, like: Mapping[int, str], draws: int) -> list[Variant]:
    """Random subspaces of each number of dimensions; their changes get the norm of the variants `like`."""
    rng = step.rng("random directions")
    each = [(k, name, draw) for k, name in like.items() for draw in range(draws)]
    return [fixed(f"random|{k}|{n}", np.linalg.qr(rng.standard_normal((width, k)))[0].T, name) for k, name, n in each]


def along(delta: Float[Tensor, "pairs width"], basis: Float[Tensor, "#pairs width k"]) -> Float[Tensor, "pairs width"]:
    """The part of each row along its orthonormal basis."""
    return (basis @ (basis.mT @ delta[:, :, None]))[:, :, 0]


def pulled(model: Model, site: Site, basis: Float[Tensor, "#pairs width k"]) -> Float[Tensor, "#pairs size k"]:
    """An orthonormal basis of the span of W_O^T Q in the space of a head's values.

    A change dz of the values writes W_O dz, whose part along Q is Q^T W_O dz. Projected onto the span of W_O^T Q, dz
    loses only what is orthogonal to it and so writes the same along Q: the least change of the values that does. (What
    the remaining change writes beside Q stays.) W_O is read off o_proj's gradient, whatever its kind.
    """
    module = model.o_projs[site.layer]
    wanted = basis.mT.flatten(0, 1).to(model.device, model.dtype)
    with torch.enable_grad():
        z = torch.zeros(len(wanted), model.n_heads * model.head_size, dtype=model.dtype, device=model.device)
        read = torch.autograd.grad(module(z.requires_grad_()), z, wanted)[0]
    own = read[:, hooks.columns_of(model, site)].unflatten(0, (len(basis), -1)).cpu().double()
    return torch.linalg.qr(own.mT)[0]


def changed(
    variants: Sequence[Variant],
    delta: Float[Tensor, "pairs width"],
    bases: Callable[[Variant], Float[Tensor, "#pairs width k"]],
) -> dict[str, Float[Tensor, "pairs width"]]:
    """What each variant changes of a site, by name. `delta` is what the whole patch would change."""
    out: dict[str, Tensor] = {}
    for variant in variants:
        change = delta if variant.basis is None else along(delta, bases(variant))
        if variant.like:
            change = change * (out[variant.like].norm(dim=1) / change.norm(dim=1).clamp_min(1e-12))[:, None]
        if variant.within is not None:
            inside = along(change, variant.within[None])
            change = inside if variant.name.endswith("inside") else change - inside
        out[variant.name] = change
    return out


# --- tables -------------------------------------------------------------------------------------------------------


class Changes(NamedTuple):
    """What a table puts into the model."""

    pairs: Sequence[Pair]
    sets: Sequence[tuple[Site, ...]]
    names: list[str]  # of the variants
    make: sweep.Variants
    options: Mapping[str, Any]  # of its work units
    direction: str = "denoise"


def table_of(name: str) -> Table:
    """A table of `sweep.run_variants`."""

    def units(step: Step | Case, own: Changes) -> list[Unit]:
        return sweep_units(name, own.pairs, **own.options)

    def compute(step: Step, own: Changes) -> Callable[[Unit], pd.DataFrame]:
        def rows(unit: Unit) -> pd.DataFrame:
            how = {"seed": step.params.seed, "memory": step.memory, "profile": step.params.profile}
            how |= {"direction": own.direction, "role": own.options.get("role", "last")}
            lines = step.prove(unit.pairs[0])
            frame = sweep.run_variants(step.model, unit.pairs, own.sets, own.names, own.make, **how)
            frame.attrs["log"] = lines + frame.attrs["log"]
            if len({pair.candidates for pair in own.pairs}) > 1:  # several attributes: no unit's are the table's
                frame.attrs.pop("facts")
            return frame

        return rows

    def cost(case: Case, units: Sequence[Unit], own: Changes) -> Work:
        options = {"direction": own.direction, "site_sets": own.sets, "variants": own.names}
        options["role"] = own.options.get("role", "last")
        return case.swept([replace(unit, options=options) for unit in units])

    columns = tuple(name for name in records.VARIANT_SCHEMA.columns if "label" not in name)
    return Table(name, units, compute, cost, records.VARIANT_SCHEMA, columns)


LAYERS = table_of("direction_layers")
PATCHES = table_of("direction_patches")
TRANSFER = table_of("direction_transfer")
STEERING = table_of("steering")


def patching(
    step: Step | Case,
    table: Table,
    pairs: Sequence[Pair],
    sets: Sequence[tuple[Site, ...]],
    variants: Sequence[Variant],
) -> Changes:
    """The variants' changes put into the corrupt runs at the sets of sites."""
    names, sites = [variant.name for variant in variants], sorted({site for own in sets for site in own})

    def make(own: Sequence[Pair], base: BaseRun, other: BaseRun) -> dict[str, Activations]:
        out: dict[str, dict] = {variant: {} for variant in names}
        for site in sites:
            key, part = (site.component, site.layer), hooks.columns_of(step.model, site)
            before = base.activations[key]
            delta = (other.activations[key] - before)[:, 0, part].cpu().double()
            for variant, change in changed(variants, delta, partial(basis_at, step, own, site)).items():
                new = out[variant].setdefault(key, before.clone())
                new[:, 0, part] += change.to(new)
        return out

    options = {"name": table.name, "variants": names, "sets": [[list(site) for site in own] for own in sets]}
    return Changes(pairs, sets, names, make, options)


def basis_at(step: Step, pairs: Sequence[Pair], site: Site, variant: Variant) -> Float[Tensor, "#pairs size k"]:
    """A variant's basis in the space of a site's activations."""
    found = variant.basis(pairs, site.layer)
    return pulled(step.model, site, found) if site.component == "head" else found


def by_layer(step: Step | Case, pairs: Sequence[Pair], means: pd.DataFrame) -> Changes:
    """Class directions patched in the residual stream after each layer of the slice (one set each, in order), and in
    all of the slice's sites together (the last set): one direction, all of them, random ones, everything."""
    sites, template = step.slice(), step.params.template
    vectors = {layer: vectors_of(means, template, layer) for layer in sorted({site.layer for site in sites})}
    bases = {layer: torch.tensor(spanned(np.stack(list(own.values()))).T)[None] for layer, own in vectors.items()}
    one = difference("class difference|1|", vectors)
    every = Variant(f"class means|{next(iter(bases.values())).shape[-1]}|", lambda own, layer: bases[layer])
    random = random_variants(step, len(means["vector"].iloc[0]), {1: one.name}, FEW)
    sets = [(Site(layer, "resid"),) for layer in vectors] + [tuple(sites)]
    return patching(step, LAYERS, pairs, sets, [one, every, *random, Variant("whole|0|", None)])


def by_number(step: Step | Case, pairs: Sequence[Pair], layer: int, table: pd.DataFrame) -> Changes:
    """Changes in the residual stream after `layer`, by method and number of directions; each method's largest also
    split into its parts inside and outside the span of the model's principal components."""
    p, own = step.params, table[table["layer"] == layer]
    vectors = vectors_of(own[own["method"] == "class mean"], p.template, layer)
    groups = own[own["method"] != "class mean"].groupby(["method", "k"])
    bases = {key: np.stack(rows["vector"].tolist()).astype(float) for key, rows in groups}
    within, most = torch.tensor(bases.pop(("component", 0)).T), max(p.dimensions)
    one = difference("class difference|1|", {layer: vectors})
    variants, like = [one, Variant("whole|0|", None)], {1: one.name}
    variants += [fixed(f"{name} against the rest|1|", unit(against_rest(vectors, name))) for name in vectors]
    for (method, k), basis in bases.items():
        sizes = [k] if k else sorted({size for size in p.dimensions if size <= len(basis)} | {min(most, len(basis))})
        variants += [fixed(f"{method}|{size}|", basis[:size]) for size in sizes]
        if method.endswith("means"):  # class means come first, and lend their norms as far as they go
            like = {size: f"{method}|{size}|" for size in sizes} | like
    cap = min(most, len(bases["class means", 0]))
    split = [v for v in variants if v.name in (one.name, f"class means|{cap}|", "whole|0|") or "rotation" in v.name]
    variants += [v._replace(name=v.name + part, within=within) for v in split for part in PARTS]
    variants += random_variants(step, len(within), like, p.random_directions)
    return patching(step, PATCHES, pairs, [(Site(layer, "resid"),)], variants)


def in_other_templates(step: Step, table: pd.DataFrame, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs in the other templates, those that line up there."""
    p, rows, out = step.params, table[table["pair_id"].isin([pair.pair_id for pair in pairs])], []
    prompting = {"chat_template": p.chat_template, "attributes": p.attributes, "question": p.question}
    for name in dict.fromkeys(p.templates):
        if name != p.template:
            other = rows.assign(template=name, task=tasks.find_template(name, p.task, question=p.question).task)
            other, _ = aligned(other, step.tokenizer, **prompting)
            out += without_labels(step.prompts(other.assign(pair_id=other["pair_id"] + f"@{name}")))
    return out


def transfer(step: Step | Case, pairs: Sequence[Pair], layer: int, means: pd.DataFrame) -> Changes:
    """Class differences and subspaces of class means of every template and of one-name prompts, each patched in all
    pairs, beside random ones and everything; after `layer`."""
    variants, like, classes = [], {}, set(vectors_of(means, step.params.template, layer))
    for name in dict.fromkeys([step.params.template, *means["template"]]):
        vectors = vectors_of(means, name, layer)
        if set(vectors) != classes:  # too few prompts line up in that template
            continue
        basis = spanned(np.stack(list(vectors.values())))
        every = {len(basis): fixed(f"{name}|{len(basis)}|", basis)}
        every[1] = difference(f"{name}|1|", {layer: vectors})
        like = like or {k: variant.name for k, variant in every.items()}
        variants += every.values()
    variants += [*random_variants(step, basis.shape[1], like, FEW), Variant("whole|0|", None)]
    return patching(step, TRANSFER, pairs, [(Site(layer, "resid"),)], variants)


def steering_prompts(step: Step, table: pd.DataFrame, pairs: Sequence[Pair]) -> tuple[list[Pair], dict[str, str]]:
    """Prompts without one class, and the kind of each by its id: `mixed` (a quad's two classes, either first), and two
    `invented names` or two `things` of the question's controls. As pairs whose two sides are equal."""
    p, out, kinds = step.params, [], {}
    template = tasks.find_template(p.template, p.task, question=p.question)
    rows = table[table["pair_id"].isin([pair.pair_id for pair in reported(pairs)])].drop_duplicates("quad_id")
    names = {"mixed": [(row.clean_a, row.corrupt_b) for row in rows.itertuples()]}
    listed = controls_of(step).sample(frac=1, random_state=p.seed)
    for kind, word in (("invented names", "invented"), ("things", "thing")):
        own = listed.loc[listed["kind"] == word, "name"].tolist()
        names[kind] = list(zip(own[::2], own[1::2], strict=False))
    for kind, drawn in names.items():
        for number, both in enumerate(drawn[: p.steering_pairs]):
            both = both if number % 2 else both[::-1]
            name = f"{kind} {number}"
            try:
                prompt = tasks.make_prompt(step.tokenizer, template, both, p.chat_template, p.attributes)
            except ValueError:  # a name that merges with the text in the other slot
                continue
            prompt = replace(prompt, roles={"last": prompt.roles["last"]})
            out.append(replace(pairs[0], pair_id=name, quad_id=name, half="confirmation", clean=prompt, corrupt=prompt))
            kinds[name] = kind
    return without_labels(out), kinds


def steering(step: Step | Case, prompts: Sequence[Pair], layer: int, means: pd.DataFrame) -> Changes:
    """Each dose of each class's direction (class mean - mean of the class means) added to the residual stream after
    `layer`, and of random directions of the first class's length. Variants: "class|dose|", "random|dose|number"."""
    p, vectors = step.params, vectors_of(means, step.params.template, layer)
    grand, rng = np.mean(list(vectors.values()), axis=0), step.rng("random steering")
    added = {(name, ""): vector - grand for name, vector in vectors.items()}
    length = np.linalg.norm(next(iter(added.values())))
    added |= {("random", n): length * unit(rng.standard_normal(len(grand)))[0] for n in range(FEW)}
    doses = {f"{name}|{dose:g}|{n}": dose * vector for (name, n), vector in added.items() for dose in p.doses}

    def make(own: Sequence[Pair], base: BaseRun, other: BaseRun) -> dict[str, Activations]:
        before = base.activations["resid", layer]
        return {name: {("resid", layer): before + torch.tensor(v).to(before)} for name, v in doses.items()}

    options = {"layer": layer, "variants": list(doses)}
    return Changes(prompts, [(Site(layer, "resid"),)], list(doses), make, options, "noise")
