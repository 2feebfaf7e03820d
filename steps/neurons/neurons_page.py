"""What single neurons come to: from the tables of `steps.neurons.neurons` to numbers, figures and sentences.

1. `top` ranks neurons on the discovery half; `roster` lists what is then replaced in more pairs: each of them alone,
   growing sets, random neurons of the same layers that write as much, and the whole MLPs.
2. `singles` and `shares` report both on the confirmation half; `selective` says whom the activations tell apart.
`steps.neurons.neuron_statements` puts the numbers into sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import style
from scipy import stats as tests

from lib import effects, stats
from lib.effects import in_halves
from lib.hooks import Site
from report import plots
from report.plots import BLUE, STYLE, VERMILION, WIDTH, Figure
from steps.neurons.measure import Neurons

NEURON = ["layer", "head"]
NEAREST = 20  # random neurons are drawn from as many that write about as much
QUANTITY = {"counterfactual": "damage", "clean": "recovery"}


class Set(NamedTuple):
    """Sites that are replaced together."""

    kind: str  # "single", "helping", "opposing", "random" or "MLPs"
    n_sites: int
    sites: tuple[Site, ...]


# --- ranking and sets ---------------------------------------------------------------------------------------------


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


def top(frame: pd.DataFrame, params: Neurons) -> pd.DataFrame:
    """The `top_neurons` of largest mean effect either way on the discovery half (the only half, where there is one):
    `layer`, `head` (the number), `site`, `effect`, `direct`, `written`, largest first."""
    own = means(in_halves(frame)[0][1]).drop(columns="half")
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


def roster(frame: pd.DataFrame, chosen: pd.DataFrame, params: Neurons, rng: np.random.Generator) -> list[Set]:
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


def added_up(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Confirmation effects added up in the order of the discovery effects, of the neurons that "help" the answer on
    discovery and of those that "oppose" it (logits)."""
    halves = [means(part) for _, part in in_halves(frame)]
    both = halves[0].merge(halves[-1], on=NEURON, suffixes=("", "_last"))
    both = both.sort_values("effect", key=np.abs, ascending=False, kind="stable")
    signs = {"help": both["effect"] > 0, "oppose": both["effect"] < 0}
    return {does: both.loc[keep, "effect_last"].cumsum().to_numpy() for does, keep in signs.items()}


# --- effects ------------------------------------------------------------------------------------------------------


def with_sets(table: pd.DataFrame, sets: Sequence[Set]) -> pd.DataFrame:
    """The rows of the sweep of `roster` with their set's `kind` and `n_sites`."""
    kinds, sizes = np.array([own.kind for own in sets]), np.array([own.n_sites for own in sets])
    return table.assign(kind=kinds[table["site_set"]], n_sites=sizes[table["site_set"]])


def singles(table: pd.DataFrame, sets: Sequence[Set], params: Neurons) -> dict[str, pd.DataFrame]:
    """`findings.both_halves` of the top neurons for each ablation, in the order of their discovery rank."""
    own = with_sets(table, sets)
    own = own[own["kind"] == "single"]
    order = {effects.site_name(*one.sites[0]): rank for rank, one in enumerate(sets) if one.kind == "single"}
    out = {}
    for ablation, rows in own.groupby("ablation", sort=False):
        both = effects.both_halves(rows, params)
        out[ablation] = both.assign(rank=both["site"].map(order)).sort_values(["half", "rank"], ignore_index=True)
    return out


def significant(table: pd.DataFrame, params: Neurons) -> pd.Series:
    """Sites of `singles` that are familywise significant in each half with one sign; their sign."""
    sure = table[table["p"] <= 1 - params.level]
    sign = np.sign(sure["estimate"]).groupby(sure["site"])
    agreed = (sign.nunique() == 1) & (sign.size() == table["half"].nunique())
    return sign.first()[agreed]


def shares(table: pd.DataFrame, sets: Sequence[Set], params: Neurons) -> pd.DataFrame:
    """Joint effects of the growing sets, and the sums of the single ones, as shares of the MLPs' joint effect.

    Confirmation half; `quantity` is damage or recovery, `logits` the mean effect, `mlps` that of the MLPs.
    `above_random` is the lower end of the interval of helping minus random neurons (logits). No rows where the
    MLPs have no positive effect.
    """
    own = in_halves(with_sets(table, sets))[-1][1]
    own, out = own.assign(effect=effects.effect(own)), []
    alone = {one.sites[0]: index for index, one in enumerate(sets) if one.kind == "single"}
    for ablation, quantity in QUANTITY.items():
        rows = own[own["ablation"] == ablation]
        by_set = rows.pivot_table(index="quad_id", columns="site_set", values="effect", aggfunc="sum")
        whole = by_set[len(sets) - 1]
        if not whole.sum() > 0:
            continue
        pairs = rows.groupby("quad_id")["pair_id"].nunique()
        sums: dict[tuple[str, int], pd.Series] = {}
        for kind, n in dict.fromkeys((one.kind, one.n_sites) for one in sets if one.kind not in ("single", "MLPs")):
            same = [index for index, one in enumerate(sets) if (one.kind, one.n_sites) == (kind, n)]
            sums[kind, n] = by_set[same].mean(axis=1)
            if kind != "random":
                sums[f"{kind}, summed", n] = by_set[[alone[site] for site in sets[same[0]].sites]].sum(axis=1)
        if not sums:
            continue
        matrix = np.stack(list(sums.values()), axis=1)
        spans = stats.ratio_intervals(matrix, whole.to_numpy(), params)
        for ((kind, n), column), span in zip(sums.items(), spans, strict=True):
            row = {"quantity": quantity, "kind": kind, "n_sites": n, "logits": float((column / pairs).mean())}
            row |= {"estimate": span.estimate, "low": span.low, "high": span.high}
            if kind == "helping" and ("random", n) in sums:
                beyond = ((column - sums["random", n]) / pairs).to_numpy()
                row["above_random"] = stats.mean_interval(beyond, params).low
            out.append(row | {"mlps": float((whole / pairs).mean()), "quads": len(whole)})
    return pd.DataFrame(out)


# --- classes and cards --------------------------------------------------------------------------------------------


def p_of_auc(auc: pd.Series, n: pd.Series, others: pd.Series) -> np.ndarray:
    """Two-sided p of an area under the ROC curve by Mann and Whitney's normal approximation."""
    return 2 * tests.norm.sf(np.abs(auc - 0.5) / np.sqrt((n + others + 1) / (12 * n * others)))


def selective(classes: pd.DataFrame, params: Neurons, column: str = "auc") -> pd.DataFrame:
    """For each neuron the superset that its activation tells best from the others on the discovery half.

    `discovery` and `confirmation` are its areas there; `picked` where the discovery area is significant (Benjamini and
    Hochberg over neurons x supersets), `selective` where the confirmation area, of the same side, is so among the
    picked. `promoted` and `suppressed`: the supersets whose logits the neuron's output raises most and least on the
    prompts of its superset, against the others.
    """
    table = classes.assign(p=p_of_auc(classes[column], classes["n"], classes["n_others"]), auc=classes[column])
    halves = [part for _, part in in_halves(table)]
    first, last = halves[0].copy(), halves[-1]
    first["adjusted"] = stats.benjamini_hochberg(first["p"])
    best = first.loc[(first["auc"] - 0.5).abs().groupby([first["layer"], first["head"]]).idxmax()]
    keys = [*NEURON, "superset"]
    out = best[[*keys, "auc", "adjusted"]].rename(columns={"auc": "discovery"})
    held = last[[*keys, "auc", "p", "mean", "mean_others"]].rename(columns={"auc": "confirmation"})
    out = out.merge(held, on=keys)
    out["picked"] = out["adjusted"] <= 1 - params.level
    sure = (out["discovery"] > 0.5) == (out["confirmation"] > 0.5)
    adjusted = pd.Series(1.0, index=out.index)
    if out["picked"].any():
        adjusted[out["picked"]] = stats.benjamini_hochberg(out.loc[out["picked"], "p"])
    out["selective"] = out["picked"] & sure & (adjusted <= 1 - params.level)
    weights = last.pivot_table(index=NEURON, columns="superset", values="weight").reset_index()
    joined = out[NEURON].merge(weights, on=NEURON, how="left").drop(columns=NEURON)
    change = (out["mean"] - out["mean_others"]).to_numpy()[:, None] * joined.to_numpy(dtype=float)
    for name, at in (("promoted", change.argmax(1)), ("suppressed", change.argmin(1))):
        out[name] = joined.columns.to_numpy()[at]
    return out.assign(site=effects.named(out.assign(component="neuron")))


def direct_by_class(classes: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
    """The direct effect of the chosen neurons on each superset's logit (confirmation half): what activation on the
    superset's prompts, above that on the others, writes on its logit."""
    own = in_halves(classes)[-1][1]
    own = own.assign(direct=(own["mean"] - own["mean_others"]) * own["weight"])
    table = own.pivot_table(index=NEURON, columns="superset", values="direct").reset_index()
    return chosen[[*NEURON, "site"]].merge(table, on=NEURON).drop(columns=NEURON).set_index("site")


def named_prompts(activations: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """The activations with the `names` in each prompt, in alphabetical order."""
    table = pairs.set_index("pair_id")
    slots = [slot for slot in "abc" if f"clean_{slot}" in table]
    texts = {
        (pair_id, side): ", ".join(sorted(name for slot in slots if (name := row[f"{side}_{slot}"])))
        for pair_id, row in table.to_dict("index").items()
        for side in ("clean", "corrupt")
    }
    keys = zip(activations["pair_id"], activations["side"], strict=True)
    return activations.assign(names=[texts[key] for key in keys])


def by_class(activations: pd.DataFrame, cards: pd.DataFrame, params: Neurons) -> pd.DataFrame:
    """Mean activation of each card's neuron by superset, with intervals over quads, confirmation half."""
    own, rows = in_halves(activations)[-1][1], []
    for card in cards.itertuples():
        mine = own[(own["layer"] == card.layer) & (own["head"] == card.head)]
        for superset, part in mine.groupby("superset"):
            values = part.groupby("quad_id")["activation"].mean().to_numpy(dtype=float)
            span = stats.mean_interval(values, params)
            rows.append({"site": card.site, "superset": superset, **effects.columns([span])})
    return pd.DataFrame(rows).explode(["estimate", "low", "high"], ignore_index=True)


def card_table(activations: pd.DataFrame, tokens: pd.DataFrame, cards: pd.DataFrame, count: int = 3) -> pd.DataFrame:
    """The words of each card: its names of highest and lowest activation, and the tokens that one unit of it writes on
    most and least. `activations` as of `named_prompts`."""
    rows = []
    for card in cards.itertuples():
        mine = activations[(activations["layer"] == card.layer) & (activations["head"] == card.head)]
        names = mine.groupby("names")["activation"].mean().sort_values()
        own = tokens[(tokens["layer"] == card.layer) & (tokens["head"] == card.head) & (tokens["rank"] <= count)]
        said = {end: ", ".join(f'"{token}"' for token in part["token"]) for end, part in own.groupby("end")}
        shown = {"highest": names[::-1][:count], "lowest": names[:count]}
        people = {how: "; ".join(f"{who} ({value:.2f})" for who, value in part.items()) for how, part in shown.items()}
        rows.append({"neuron": card.site, **people, "writes most on": said["up"], "writes least on": said["down"]})
    return pd.DataFrame(rows).set_index("neuron")


# --- figures ------------------------------------------------------------------------------------------------------


def concentration(frame: pd.DataFrame) -> Figure:
    """`added_up` as curves."""
    with style.context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2))
        axes = figure.subplots()
        for (does, total), colour in zip(added_up(frame).items(), (BLUE, VERMILION), strict=True):
            axes.plot(np.arange(1, len(total) + 1), total, color=colour, label=f"{does} the answer on discovery")
        plots._zero(axes)
        axes.set(xscale="log", xlabel="neurons added, largest discovery effect first", ylabel="sum of effects (logits)")
        axes.legend(loc="upper left")
    return figure


def direct_figure(frame: pd.DataFrame, chosen: pd.DataFrame, named: int = 6) -> Figure:
    """The whole effect of each chosen neuron against its direct effect, confirmation half, the first ones named."""
    own = chosen[NEURON].merge(means(in_halves(frame)[-1][1]), on=NEURON)
    own = own.assign(of="layer " + own["layer"].astype(str)).sort_values("layer")
    words = "effect on logit_diff (logits)"
    first = list(chosen["site"].head(named))
    return plots.agreement(own, "direct", "effect", f"direct {words}", f"whole {words}", by="of", named=first)


def cards_figure(spans: pd.DataFrame) -> Figure:
    """A panel for each card: mean activation by superset with its interval (`by_class`)."""
    sites = list(dict.fromkeys(spans["site"]))
    rows = -(-len(sites) // 2)
    with style.context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + 1.35 * rows))
        panels = figure.subplots(rows, 2, squeeze=False).ravel()
        for axes, site in zip(panels, sites, strict=False):
            part = spans[spans["site"] == site]
            plots._points(axes, np.arange(len(part)), part, BLUE, "o", label="", across=True)
            plots._zero(axes, across=True)
            axes.set_yticks(range(len(part)), part["superset"], fontsize=8)
            axes.grid(False, axis="y")
            axes.set(title=site, ylim=(len(part) - 0.4, -0.6))
        for axes in panels[len(sites) :]:
            axes.set_visible(False)
        figure.supxlabel("activation", fontsize=10)
    return figure
