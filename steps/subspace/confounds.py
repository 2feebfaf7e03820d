"""What else there is in the class directions: the people's region, century and gender, at `last` after one layer.

1. `ATTRIBUTE_SPANS`, on the fitting half: the span along which an attribute of the two people moves the activation
   within a class (with the class means taken off, what differs between classes is not in it by itself), and the share
   of each class direction's squared norm that lies in it, beside spans of attributes dealt out anew within classes.
   In the same way fitted: the direction between the two classes of a placebo attribute, on the placebo pairs.
2. `in_pairs`: the class difference's change split into its parts inside and outside the attributes' span.
3. `in_placebo`: directions between supersets in pairs whose four people are of one superset. Such a pair has no class
   difference of its own: the directions from its superset to each of the others stand in, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from lib.hooks import Site
from lib.tasks import Pair
from pipeline.assumed import Case
from pipeline.costs import Work, plain
from pipeline.declaration import Table
from pipeline.population import people_of
from pipeline.step import Step
from pipeline.units import Unit, subsample, without_labels
from steps.subspace import direction_sweeps, directions
from steps.subspace.direction_sweeps import FEW, PARTS, Changes, Variant, fixed, patching
from steps.subspace.directions import Vectors, spanned, unit, vectors_of

LEAST = 5  # people of an attribute's value, below which their mean is not asked for
DEALT = 200  # times that the attributes are dealt out anew
TOGETHER, DEALT_OUT = "all three", "dealt out"  # attributes, as many as the question has
MEAN = "class differences, mean"
COLUMNS = ["what", "name", "vector", "attribute", "share", "by_chance", "highest", "p", "k", "prompts"]


# --- spans --------------------------------------------------------------------------------------------------------


def within_classes(
    values: Float[np.ndarray, "prompts width"], prompts: pd.DataFrame
) -> tuple[Float[np.ndarray, "couples width"], pd.DataFrame]:
    """The mean activation of each couple of people (asked about in either order), less their class's mean; and the
    couples: superset and names."""
    key = [tuple(sorted(names)) for names in prompts["names"]]
    couples = pd.DataFrame({"names": key, "superset": prompts["superset"].to_numpy()})
    number = couples.groupby("names").ngroup().to_numpy()
    each = np.stack([values[number == n].mean(0) for n in range(number.max() + 1)])
    couples = couples.assign(number=number).drop_duplicates("number").sort_values("number").reset_index(drop=True)
    for _, rows in couples.groupby("superset"):
        each[rows.index] -= each[rows.index].mean(0)
    return each, couples


def counts_of(
    people: pd.DataFrame, names: Sequence[Sequence[str]], attributes: Sequence[str]
) -> dict[str, Float[np.ndarray, "couples values"]]:
    """How many of each couple are of each value of each attribute that has people enough; of strangers to the table
    nothing is known."""
    known, out = people.set_index("name"), {}
    for attribute in attributes:
        value_of = known[attribute].astype(str).to_dict()
        each = pd.DataFrame([[value_of.get(name, "unknown") for name in both] for both in names])
        sizes = each.stack().value_counts().drop("unknown", errors="ignore")
        kept = sizes.index[sizes >= LEAST]
        out[attribute] = (
            np.array([(each == value).sum(axis=1) for value in kept], float).reshape(len(kept), len(each)).T
        )
    return out


def span_of(
    values: Float[np.ndarray, "couples width"], counts: Sequence[Float[np.ndarray, "couples values"]]
) -> Float[np.ndarray, "k width"]:
    """An orthonormal basis of the means of the attributes' values, those of each attribute less their own mean; no
    rows where no attribute has two values."""
    means = [own.T @ values / own.sum(0)[:, None] for own in counts if own.shape[1] > 1]
    return spanned(np.concatenate([own - own.mean(0) for own in means])) if means else np.empty((0, values.shape[1]))


def shares(vectors: Float[np.ndarray, "directions width"], basis: Float[np.ndarray, "k width"]) -> np.ndarray:
    """Of each vector's squared norm, the share that lies in a span."""
    return ((vectors @ basis.T) ** 2).sum(1) / (vectors**2).sum(1)


def dealt(rng: np.random.Generator, couples: pd.DataFrame) -> np.ndarray:
    """The couples in an order in which each place is taken by one of the same superset."""
    order = np.arange(len(couples))
    for _, rows in couples.groupby("superset"):
        order[rows.index] = rng.permutation(rows.index)
    return order


def attribute_spans(step: Step, fit: pd.DataFrame, layer: int, means: pd.DataFrame) -> pd.DataFrame:
    """Rows of three kinds (`what`): `span` and `dealt`, vectors of the bases of all attributes together, true and of
    attributes dealt out anew; `difference`, one unit vector for each placebo attribute; `share`, by direction (`name`)
    and attribute, with the mean share `by_chance`, its quantile at the profile's level (`highest`), p, and the
    span's dimensions k."""
    prompts, read = directions.read_on(step, fit, layer)
    values, couples = within_classes(read, prompts)
    people, rng = people_of(step), step.rng("attributes dealt")
    counts = counts_of(people, couples["names"].tolist(), [*step.params.topic.attributes])
    orders = [dealt(rng, couples) for _ in range(DEALT)]
    of_each = {attribute: [own] for attribute, own in counts.items()} | {TOGETHER: [*counts.values()]}
    spans = {name: span_of(values, own) for name, own in of_each.items()}
    rows = [{"what": "span", "name": TOGETHER, "vector": row} for row in spans[TOGETHER]]
    for n, order in enumerate(orders[:FEW]):
        basis = span_of(values, [own[order] for own in of_each[TOGETHER]])
        rows += [{"what": "dealt", "name": f"{DEALT_OUT} {n}", "vector": row} for row in basis]
    rows += [{"what": "difference", "name": name, "vector": row} for name, row in placebo_differences(step, layer)]
    names, vectors = class_directions(vectors_of(means, step.params.template, layer))
    for attribute, own in of_each.items():
        other = [shares(vectors, span_of(values, [one[order] for one in own])) for order in orders]
        about = {"what": "share", "attribute": attribute, "k": len(spans[attribute])}
        rows += share_rows(names, shares(vectors, spans[attribute]), np.stack(other), about, step.params.level)
    return pd.DataFrame(rows, columns=COLUMNS).assign(prompts=len(couples))


def span_units(step: Step | Case, fit: pd.DataFrame, layer: int, means: pd.DataFrame) -> list[Unit]:
    """One unit. The layer was chosen, and quantiles stand in the table: both rest on keys that only pages depend on."""
    return [Unit("attribute_spans", (), {"layer": layer, "level": step.params.level})]


def spans_reader(step: Step, *chosen: Any) -> Callable[[Unit], pd.DataFrame]:
    """What makes the table."""
    return lambda _: attribute_spans(step, *chosen)


def class_directions(vectors: Vectors) -> tuple[list[str], Float[np.ndarray, "directions width"]]:
    """The differences between two classes, and each class against the rest."""
    names = [*vectors]
    out = {f"{a} - {b}": vectors[a] - vectors[b] for n, a in enumerate(names) for b in names[n + 1 :]}
    out |= {f"{name} against the rest": directions.against_rest(vectors, name) for name in names}
    return [*out], np.stack([*out.values()])


def share_rows(names: Sequence[str], found: np.ndarray, chance: np.ndarray, about: Mapping, level: float) -> list[dict]:
    """The share of each direction beside those of the spans dealt out (draws x directions), and their mean over the
    differences between classes."""
    between = [" - " in name for name in names]
    found, chance = np.append(found, found[between].mean()), np.column_stack([chance, chance[:, between].mean(1)])
    p = (1 + (chance >= found).sum(0)) / (1 + len(chance))
    table = {"name": [*names, MEAN], "share": found, "by_chance": chance.mean(0), "p": p}
    frame = pd.DataFrame(table | {"highest": np.quantile(chance, level, axis=0)})
    return [row | about | {"vector": []} for row in frame.to_dict("records")]


def placebo_differences(step: Step, layer: int) -> list[tuple[str, Float[np.ndarray, " width"]]]:
    """For each placebo attribute the direction between the mean activations of its two classes, on the half of its
    pairs that is not reported (or the only one), whatever the sign of their gaps."""
    out = []
    for attribute, pairs in placebo_pairs(step).items():
        fit = [pair for pair in pairs if pair.half == "discovery"] or pairs
        fit = {pair.quad_id: pair for pair in fit}.values()  # a quad's pairs have the same people
        class_of = {p.clean.ids: p.answer for p in fit} | {p.corrupt.ids: p.corrupt_answer for p in fit}
        values, own = directions.activations(step.model, [*class_of], [layer])[layer], np.array([*class_of.values()])
        out.append((attribute, unit(values[own == 0].mean(0) - values[own == 1].mean(0))[0]))
    return out


def placebo_pairs(step: Step | Case) -> dict[str, list[Pair]]:
    """The placebo pairs by attribute."""
    every = {
        name: [p for p in step.placebo() if p.candidates == tuple(own)]
        for name, own in step.params.topic.answers.items()
    }
    return {name: pairs for name, pairs in every.items() if pairs}


def of_spans(case: Case, units: Sequence[Unit], fit: pd.DataFrame, layer: int, means: pd.DataFrame) -> Work:
    """The cost of what is read: two prompts of a pair of each placebo quad (of the others, it has been read)."""
    count, tokens = len({pair.quad_id for pair in case.placebo()}), len(case.pairs[0].clean.ids)
    return plain(case.shape, count, tokens, -(-count // 32)) + Work(table=8 * case.shape.hidden * 20)


ATTRIBUTE_SPANS = Table("attribute_spans", span_units, spans_reader, of_spans, schema=None)
IN_PAIRS, IN_PLACEBO = direction_sweeps.table_of("direction_attributes"), direction_sweeps.table_of("direction_placebo")


# --- changes ------------------------------------------------------------------------------------------------------


def bases_of(spans: pd.DataFrame, what: str) -> dict[str, Float[np.ndarray, "k width"]]:
    """The vectors of a kind by name."""
    own = spans[spans["what"] == what]
    return {name: np.stack(rows["vector"].tolist()).astype(float) for name, rows in own.groupby("name", sort=False)}


def shared_variants(step: Step | Case, vectors: Vectors, spans: pd.DataFrame, like: str) -> list[Variant]:
    """What both kinds of pairs get: each placebo attribute's own direction, all directions of the class means, random
    ones with changes of the norm of the variant `like`, and everything."""
    basis = spanned(np.stack(list(vectors.values())))
    own = [fixed(f"{name} difference|1|", rows) for name, rows in bases_of(spans, "difference").items()]
    random = direction_sweeps.random_variants(step, basis.shape[1], {1: like}, FEW)
    return [*own, fixed(f"class means|{len(basis)}|", basis), *random, Variant("whole|0|", None)]


def in_pairs(step: Step | Case, pairs: Sequence[Pair], layer: int, means: pd.DataFrame, spans: pd.DataFrame) -> Changes:
    """The class difference: all of its change, and its parts inside and outside the attributes' span and the spans of
    attributes dealt out anew; and what the placebo pairs get, too (`shared_variants`)."""
    vectors = vectors_of(means, step.params.template, layer)
    one = direction_sweeps.difference("class difference|1|", {layer: vectors})
    within = bases_of(spans, "span") | bases_of(spans, "dealt")
    split = [
        one._replace(name=f"{one.name}{name} {part}", within=torch.tensor(basis.T))
        for name, basis in within.items()
        for part in PARTS
    ]
    variants = [one, *split, *shared_variants(step, vectors, spans, one.name)]
    return patching(step, IN_PAIRS, pairs, [(Site(layer, "resid"),)], variants)


def in_placebo(
    step: Step | Case, layer: int, means: pd.DataFrame, spans: pd.DataFrame, shared: Mapping[str, str]
) -> Changes:
    """Directions between supersets, and the placebo attributes' own, in the reported placebo pairs; `shared` is the
    superset of a pair's people, of the pairs that may be taken (none: all). Pairs of a superset that the fitting half
    lacks are left out; `pairs` of the parameters is how many there are of each attribute."""
    vectors = vectors_of(means, step.params.template, layer)
    by: dict[tuple[str, ...], list[Pair]] = {}
    for pair in directions.reported([p for p in step.placebo() if not shared or shared.get(p.pair_id) in vectors]):
        by.setdefault(pair.candidates, []).append(pair)
    own = without_labels([pair for pairs in by.values() for pair in subsample(pairs, step.params.pairs)])

    def other(number: int) -> Callable[[Sequence[Pair], int], torch.Tensor]:
        def basis(pairs: Sequence[Pair], layer: int) -> torch.Tensor:
            rows = []
            for pair in pairs:
                name = shared[pair.pair_id]
                rows.append(unit(vectors[name] - vectors[[n for n in vectors if n != name][number]])[0])
            return torch.tensor(np.stack(rows))[:, :, None]

        return basis

    each = [Variant(f"class difference|1|{n}", other(n)) for n in range(len(vectors) - 1)]
    variants = [*each, *shared_variants(step, vectors, spans, each[0].name)]
    return patching(step, IN_PLACEBO, own, [(Site(layer, "resid"),)], variants)


def assumed_spans(case: Case, width: int = 64) -> pd.DataFrame:
    """Spans of no meaning, for a plan."""
    own = [("span", TOGETHER, row) for row in np.eye(width)[:15]]
    own += [("dealt", f"{DEALT_OUT} {n}", row) for n in range(FEW) for row in np.eye(width)[:15]]
    own += [("difference", name, np.eye(width)[0]) for name in placebo_pairs(case)]
    return pd.DataFrame(own, columns=COLUMNS[:3])


def run(
    step: Step, fit: pd.DataFrame, shown: Sequence[Pair], layer: int, means: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame | None]:
    """The three tables; that of the placebo pairs, where there are any, with their `attribute`, those kept alone."""
    spans = step.table(ATTRIBUTE_SPANS, fit, layer, means)
    beside = step.table(IN_PAIRS, in_pairs(step, shown, layer, means, spans))
    about, placebo = step.placebo_pairs(), None
    if about is not None and about["kept"].any():
        about = about[about["kept"].astype(bool)].set_index("pair_id")[["attribute", "shared"]]
        own = in_placebo(step, layer, means, spans, about["shared"].to_dict())
        placebo = step.table(IN_PLACEBO, own).join(about, on="pair_id") if own.pairs else None
    return spans, beside, placebo
