"""What step 09 picks: neurons and features of largest effect, and the sets of them that are then replaced.

Everything is picked on the discovery half (the only half, where there is one) and reported on the other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from lib import effects
from lib.effects import in_halves, quad_matrix
from lib.hooks import Site
from pipeline.params import Shared

NEURON = ["layer", "head"]
NEAREST = 20  # random neurons are drawn from as many that write about as much


class Set(NamedTuple):
    """Sites that are replaced together."""

    kind: str  # "single", "helping", "opposing", "random" or "MLPs"
    n_sites: int
    sites: tuple[Site, ...]


# --- neurons ---


def means(frame: pd.DataFrame) -> pd.DataFrame:
    """Each neuron's mean over quads, by half: `effect` and `direct` effect on logit_diff (logits, both directions
    alike, positive where the neuron helps the answer) and `written`."""
    sign = np.where(frame["direction"] == "denoise", 1.0, -1.0)
    own = frame[["half", "quad_id", *NEURON]].assign(
        effect=effects.effect(frame), direct=sign * frame["direct"], written=frame["written"].astype(float)
    )
    per_quad = own.groupby(["half", "quad_id", *NEURON], sort=False).mean()
    out = per_quad.groupby(["half", *NEURON]).mean().reset_index()
    return out.assign(site=effects.named(out.assign(component="neuron")))


def top(frame: pd.DataFrame, params: Shared) -> pd.DataFrame:
    """The `top_neurons` of largest mean effect either way on the discovery half (the only half, where there is one),
    those above the floor: `layer`, `head` (the number), `site`, `effect`, `direct`, `written`, largest first."""
    own = means(in_halves(frame)[0][1]).drop(columns="half")
    own = own[own["effect"].abs() > params.floor]
    return own.sort_values("effect", key=np.abs, ascending=False, kind="stable", ignore_index=True).head(
        params.top_neurons
    )


def matched(frame: pd.DataFrame, own: pd.DataFrame, taken: pd.DataFrame, rng: np.random.Generator) -> list[Site]:
    """For each of `own` another neuron of its layer, drawn from the nearest in what it writes; none twice or taken."""
    every, out = means(in_halves(frame)[0][1]), []
    free = every[~every["site"].isin(taken["site"])]
    for row in own.itertuples():
        left = free[free["layer"] == row.layer]
        if left.empty:
            continue
        near = (left["written"] - row.written).abs().nsmallest(NEAREST).index
        pick = int(rng.choice(near))
        out.append(Site(row.layer, "neuron", int(free.loc[pick, "head"])))
        free = free.drop(index=pick)
    return out


def roster(frame: pd.DataFrame, chosen: pd.DataFrame, params: Shared, rng: np.random.Generator) -> list[Set]:
    """The sets to replace: the chosen neurons alone, in order; growing sets of those that help the answer on discovery,
    and of those that oppose it; for the helping ones, of matched random neurons; and the whole MLPs."""
    out = [Set("single", 1, (Site(layer, "neuron", number),)) for layer, number in chosen[NEURON].to_numpy().tolist()]
    for kind, own in (("helping", chosen[chosen["effect"] > 0]), ("opposing", chosen[chosen["effect"] < 0])):
        sizes = sorted({n for n in (1, 10, *params.budgets) if n < len(own)} | {len(own)} - {0})
        orders = {kind: [Site(layer, "neuron", number) for layer, number in own[NEURON].to_numpy().tolist()]}
        if kind == "helping":
            orders |= {f"random {index}": matched(frame, own, chosen, rng) for index in range(params.random_sets)}
        for name, order in orders.items():
            word = kind if name == kind else "random"
            out += [Set(word, n, tuple(order[:n])) for n in sizes if n <= len(order)]
    layers = sorted(int(layer) for layer in frame["layer"].unique())
    return [*out, Set("MLPs", len(layers), tuple(Site(layer, "mlp") for layer in layers))]


# --- features ---


def stacked(rows: pd.DataFrame, column: str) -> np.ndarray:
    """A column of lists as a matrix."""
    return np.stack(list(rows[column])).astype(np.float32)


def aucs(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Area under the curve of each feature or neuron for each superset against the rest, over the prompts of a half."""
    values, labels = stacked(rows, column), rows["superset"].to_numpy()
    ranks, out = scipy_stats.rankdata(values, axis=0), {}
    for superset in sorted(set(labels)):
        own = labels == superset
        if 0 < own.sum() < len(own):
            out[superset] = (ranks[own].sum(0) - own.sum() * (own.sum() + 1) / 2) / (own.sum() * (~own).sum())
    return pd.DataFrame(out)


def selective(rows: pd.DataFrame, column: str, params: Shared) -> pd.DataFrame:
    """Features or neurons with an AUC of at least `sae_selective` for a superset on discovery: unit, superset, AUC in
    both halves, from the best on."""
    halves = [aucs(part, column) for _, part in in_halves(rows)]
    if halves[0].empty or halves[-1].empty:
        return pd.DataFrame(columns=["unit", "superset", "discovery", "confirmation"])
    best, classes = halves[0].max(axis=1), halves[0].idxmax(axis=1)
    units = best[best >= params.sae_selective].sort_values(ascending=False, kind="stable").index
    later = [halves[-1].get(classes[unit], pd.Series(np.nan, halves[-1].index))[unit] for unit in units]
    frame = {"unit": units, "superset": classes[units].to_numpy(), "discovery": best[units].to_numpy()}
    return pd.DataFrame(frame | {"confirmation": later})


def shortlist(rows: pd.DataFrame, params: Shared) -> dict[str, list[int]]:
    """Features and neurons of largest attributed effect (clean into corrupt, mean over quads, discovery half), twice as
    many as the largest budget, from the best on."""
    own = in_halves(rows)[0][1].query("side == 'corrupt'")
    out = {}
    for kind, column in (("features", "feature_attribution"), ("neurons", "neuron_attribution")):
        if column in own:
            mean = pd.DataFrame(stacked(own, column)).groupby(own["quad_id"].to_numpy()).mean().mean()
            out[kind] = [int(unit) for unit in mean.nlargest(2 * max(params.budgets)).index]
    return out


def ranked(records: pd.DataFrame, listed: dict[str, list[int]]) -> dict[str, list[int]]:
    """The shortlist in order of what each one recovers when it is patched alone; ties in the shortlist's order."""
    matrix = quad_matrix(records, "effect", ["variant"])
    mean = pd.Series(matrix.values.mean(0), matrix.sites["variant"])
    return {kind: sorted(own, key=lambda unit: -mean[f"{kind} {unit}"]) for kind, own in listed.items()}


def class_directions(rows: pd.DataFrame) -> np.ndarray:
    """Orthonormal directions that the class means of the site's activations vary in on the discovery half, from the
    largest on; one fewer than there are supersets. Empty where there is a single class."""
    own = in_halves(rows)[0][1]
    means = pd.DataFrame(stacked(own, "activation").astype(float)).groupby(own["superset"].to_numpy()).mean().to_numpy()
    _, sizes, directions = np.linalg.svd(means - means.mean(0), full_matrices=False)
    return directions[: len(means) - 1][sizes[: len(means) - 1] > 1e-9]


def best_features(rows: pd.DataFrame) -> dict[str, int]:
    """For every superset, the feature of largest AUC on discovery."""
    areas = aucs(in_halves(rows)[0][1], "features")
    return {superset: int(areas[superset].idxmax()) for superset in areas}


def shown_features(rows: pd.DataFrame, params: Shared) -> list[int]:
    """The features whose tokens are read: the best of each superset, and the most selective ones."""
    selected = selective(rows, "features", params)["unit"][: params.cards]
    return list(dict.fromkeys([*best_features(rows).values(), *selected])) or [0]
