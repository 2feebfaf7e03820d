"""Interchange interventions: is the answer the one that the causal model predicts? (Geiger et al. 2021.)

The causal model: each name has a class, the evidence of the two classes is added up, and the answer is the class with
most of it. It predicts the class of two names that share one, and leaves two classes of one name each in a tie.

1. `cases`. A base prompt names one person of each of a quad's two classes: the tie. A source prompt differs from it in
   one name. If that name is of the `other` class, putting its class into the base prompt makes both names of one class,
   and the model predicts that class; the base prompt's other name, swapped likewise, makes it the other one. So what
   does not depend on the source's class is right in at most half of the cases. If the source's name is of the `same`
   class, the evidence stays what it was, and so must the answer.
2. `fitted` reads the fitting half's prompts. Its bases: what the class means span at `last` and at a name's last token,
   the one before it and those before that (`PLACES`; of both names alike), and rotations learned on interchanges of the
   fitting half, at `last` after each of the slice's layers.
3. `SWAPS` put the part of source - base along a basis into the base prompt: at the tokens of the name that is swapped,
   or at the last token. Beside it a random subspace whose change has the norm of the class means', and the whole
   residual stream.

Sources: Geiger, Lu, Icard and Potts 2021 (arXiv 2106.02997); Geiger et al. 2023 (arXiv 2303.02536: learned rotations).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lib.batches import distinct_prompts
from lib.hooks import Site
from lib.single_pass import Activations, BaseRun, plain_runs
from lib.tasks import Pair
from pipeline.assumed import Case
from pipeline.costs import Work, plain, total
from pipeline.declaration import Table
from pipeline.population import aligned
from pipeline.step import Step
from pipeline.units import Unit, without_labels
from steps.subspace.direction_sweeps import Changes, along, table_of
from steps.subspace.directions import BATCH, class_means, of_rotation, opposed, rotations, spanned

PLACES = ("name", "name -1", "name -2")  # a name's last token, the one before it, those before that
MEANS, RANDOM, WHOLE, LEARNED = "class means", "random", "whole", "rotation"
COLUMNS = ["place", "layer", "method", "index", "vector", "prompts"]


# --- prompts and layers -------------------------------------------------------------------------------------------


def slice_layers(step: Step | Case) -> list[int]:
    """The layers of the slice, in order."""
    return sorted({site.layer for site in step.slice()})


def before_slice(step: Step | Case) -> int:
    """The layer before the slice."""
    return max(0, slice_layers(step)[0] - 1)


def layers_of(step: Step | Case) -> list[int]:
    """The slice's layers, the one before them and the model's last; before those, `earlier_layers` evenly spaced."""
    own, count = slice_layers(step), step.params.earlier_layers
    earlier = [int((number + 0.5) * own[0] / count) for number in range(count)]
    return sorted({*earlier, before_slice(step), *own, step.n_layers - 1})


def cases(step: Step, table: pd.DataFrame) -> list[Pair]:
    """The cases of the quads of a pairs table, or of each given pair: `clean` is the source, `corrupt` the base prompt,
    and `answer` the class that is predicted of sources of the other class (for those of the same class, too: there it
    must not come)."""
    rows, name_of = [], "quad_id" if step.params.pairs_file is None else "pair_id"
    for number, row in enumerate(table.drop_duplicates(name_of).to_dict("records")):
        a, b, c, d = (row[name] for name in ("clean_a", "clean_b", "corrupt_a", "corrupt_b"))
        sources = {"a other": (c, d), "b other": (a, b), "a same": (b, d), "b same": (a, c)}
        for name in named(number):
            clean = {"clean_a": sources[name][0], "clean_b": sources[name][1], "corrupt_a": a, "corrupt_b": d}
            classes = (row["corrupt_answer"], row["answer"])[:: 1 if name[0] == "a" else -1]
            answers = {"answer": classes[0], "corrupt_answer": classes[1]}
            rows.append(row | clean | answers | {"pair_id": f"{row[name_of]} {name}"})
    p = step.params
    how = {"chat_template": p.chat_template, "attributes": p.attributes, "question": p.question}
    own, _ = aligned(pd.DataFrame(rows), step.tokenizer, **how)
    return without_labels(step.prompts(own))


def named(number: int) -> list[str]:
    """The cases of a quad by its number: both names, and, name by name in turn, a source of the same class."""
    return ["a other", "b other", f"{'ab'[number % 2]} same"]


def assumed_cases(pairs: Sequence[Pair]) -> list[Pair]:
    """Stand-ins for the cases of these pairs' quads."""
    out = []
    for number, pair in enumerate({pair.quad_id: pair for pair in pairs}.values()):
        for name in named(number):
            roles = pair.clean.roles | {"swapped": pair.clean.roles[f"name_{name[0]}"]}
            sides = {side: replace(getattr(pair, side), roles=roles) for side in ("clean", "corrupt")}
            out.append(replace(pair, pair_id=f"{pair.quad_id} {name}", **sides))
    return without_labels(out)


# --- bases --------------------------------------------------------------------------------------------------------


def fitted(step: Step, fit: pd.DataFrame, layers: Sequence[int]) -> pd.DataFrame:
    """Orthonormal bases at each place and layer (COLUMNS), from prompts of the pairs `fit`."""
    seen: dict[tuple[str, int], list] = {}  # by place and layer: classes and activations
    prompts = distinct_prompts(step.prompts(fit))
    places = [tokens_of_places(getattr(*own).roles) for own in prompts.values()]
    classes = [
        pair.candidates[pair.answer if side == "clean" else pair.corrupt_answer] for pair, side in prompts.values()
    ]
    reading = step.model, list(prompts), [[token for token, _ in own] for own in places], ("resid",)
    for batch, run in plain_runs(*reading, size=BATCH, layers=layers):
        for layer in layers:
            values = run.activations["resid", layer].cpu().double().numpy()
            for row, prompt in enumerate(batch):
                for (_, place), vector in zip(places[prompt], values[row], strict=True):
                    seen.setdefault((place, layer), []).append((classes[prompt], vector))
    rows = []
    for (place, layer), read in seen.items():
        labels, vectors = zip(*read, strict=True)
        if len(set(labels)) > 1:
            basis = spanned(
                np.stack(list(class_means(np.stack(vectors), labels, step.params.topic.supersets).values()))
            )
            rows += [(place, layer, MEANS, *each, len(read)) for each in enumerate(basis.astype(np.float32))]
    training, p = [pair for pair in cases(step, fit) if pair.pair_id.endswith("other")], step.params
    groups = opposed(step.model, training, slice_layers(step))
    for layer in slice_layers(step):
        size = sum(row[:3] == ("last", layer, MEANS) for row in rows)
        basis = rotations(step.model, groups, layer, [size], p.interchange_steps, p.seed)[size]
        rows += [("last", layer, LEARNED, *each, len(training)) for each in enumerate(basis.astype(np.float32))]
    return pd.DataFrame(rows, columns=COLUMNS)


def tokens_of_places(roles: Mapping[str, Sequence[int]]) -> list[tuple[int, str]]:
    """The last token and those of both names, each with its place."""
    named = [(token, place_of(end)) for slot in "ab" for end, token in enumerate(reversed(roles[f"name_{slot}"]))]
    return [(roles["last"][0], "last"), *named]


def place_of(end: int) -> str:
    """The place of a name's token, counted from the name's end."""
    return PLACES[min(end, len(PLACES) - 1)]


def of_fitted(case: Case, units: Sequence[Unit], fit: pd.DataFrame, layers: Sequence[int]) -> Work:
    """The cost of the bases: two prompts a pair and four a quad, and the learned rotations."""
    shape, quads, tokens = case.shape, {pair.quad_id for pair in case.half(0)}, len(case.pairs[0].clean.ids)
    count = 2 * len(fit) + 4 * len(quads)
    out = plain(shape, count, tokens, -(-count // BATCH)) + Work(table=4 * shape.hidden * 16 * len(layers))
    return total([out, *(of_rotation(case, layer, case.params.interchange_steps) for layer in slice_layers(case))])


BASES = Table.whole("interchange_bases", fitted, of_fitted)


# --- interchanges -------------------------------------------------------------------------------------------------


class Swap(NamedTuple):
    """A table of interchanges: where, and what is put in."""

    table: Table
    where: str  # "name": the tokens of the name that is swapped; "last": the last token
    methods: tuple[str, ...]

    def changes(self, step: Step | Case, pairs: Sequence[Pair], bases: pd.DataFrame | None) -> Changes:
        """What is put into the model, one set of sites for each layer; a planner knows no `bases`."""
        layers, methods, role = layers_of(step), list(self.methods), "swapped" if self.where == "name" else "last"

        def make(own: Sequence[Pair], base: BaseRun, other: BaseRun) -> dict[str, Activations]:
            out: dict[str, dict] = {name: {} for name in methods}
            for layer in layers:
                before = base.activations["resid", layer]
                delta = (other.activations["resid", layer] - before).cpu().double()
                for name in methods:
                    new = out[name]["resid", layer] = before.clone()
                    for at, moved in enumerate(delta.unbind(1)):
                        place = "last" if role == "last" else place_of(delta.shape[1] - 1 - at)
                        new[:, at] += change(step, bases, name, (place, layer), moved).to(new)
            return out

        sets = [(Site(layer, "resid"),) for layer in layers]
        options = {"layers": layers, "variants": methods, "role": role}
        return Changes(pairs, sets, methods, make, options)


SWAPS = (
    Swap(table_of("interchange_name"), "name", (MEANS, RANDOM, WHOLE)),
    Swap(table_of("interchange_last"), "last", (MEANS, RANDOM, WHOLE, LEARNED)),
)


def change(
    step: Step, bases: pd.DataFrame, name: str, where: tuple[str, int], delta: Float[Tensor, "pairs width"]
) -> Float[Tensor, "pairs width"]:
    """What an interchange changes of a token at a place and layer, of `delta`, source - base: all of it, the part along
    a basis, or along a random subspace of the class means' dimensions, scaled to the length of theirs. Nothing where no
    rotation was learned."""
    if name == WHOLE:
        return delta
    basis = basis_at(bases, name if name != RANDOM else MEANS, *where)
    if basis is None:
        return torch.zeros_like(delta)
    own = along(delta, basis)
    if name != RANDOM:
        return own
    rng = step.rng(f"random interchange {where}")  # the same whatever else is computed
    random = along(delta, torch.tensor(np.linalg.qr(rng.standard_normal(basis.shape[1:]))[0])[None])
    return random * (own.norm(dim=1) / random.norm(dim=1).clamp_min(1e-12))[:, None]


def basis_at(bases: pd.DataFrame, method: str, place: str, layer: int) -> Float[Tensor, "1 width k"] | None:
    """The basis of a method at a place and layer, if there is one. Tokens of a name that the fitting half lacks take
    that of the place nearer to the name's end."""
    there = bases[(bases["layer"] == layer) & (bases["method"] == method)]
    nearer = [place] if place == "last" else PLACES[PLACES.index(place) :: -1]
    own = next((rows for name in nearer if len(rows := there[there["place"] == name])), None)
    return None if own is None else torch.tensor(np.stack(own["vector"].tolist()).astype(float).T)[None]


def run(step: Step, fit: pd.DataFrame, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The records of the interchanges by where they are: of the quads of the pairs `table`, with bases from the pairs
    `fit`."""
    bases, pairs = step.table(BASES, fit, layers_of(step)), cases(step, table)
    found = {swap.where: step.table(swap.table, swap.changes(step, pairs, bases)) for swap in SWAPS}
    learned = bases.loc[bases["method"] == LEARNED, "layer"]
    return {where: own[(own["variant"] != LEARNED) | own["layer"].isin(learned)] for where, own in found.items()}
