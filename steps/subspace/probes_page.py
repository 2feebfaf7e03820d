"""Step 08, probes: from the tables of `steps.subspace.probes` to curves, ranks, figures and sentences.

1. `curves`, `nulls` and `selectivity`: balanced accuracy over layers with intervals over quads or people, beyond the
   better of the `baselines`, beside permuted labels and the control task.
2. `rank_table` and `spectra`: accuracy against rank, and the spectrum of the class means, each beside permuted labels;
   `verdicts` says whether the map is of low rank, by rules that it can fail.
3. `ends` names the leading directions, `clusters` groups class means.
4. `numbers` gathers all this; figures and sentences follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import dendrogram, fcluster, linkage
from sklearn.metrics import adjusted_rand_score

from lib import stats
from lib.effects import columns
from pipeline.population import people_of
from pipeline.step import Step
from report.plots import BLACK, BLUE, GREY, WIDTH, Figure, _canvas, add_legend, draw_points, layer_curve
from report.words import counted, interval, is_are, listed, tabled
from steps.subspace.measure import Measured, Subspace
from steps.subspace.probes import WHOLE

ASKED = ["kind", "target"]
CURVE = [*ASKED, "position"]
MOVED = [*CURVE, "trained", "template"]
LEADS = (("pair", "superset", "last"), ("one-name", "profession", "last"))  # the two maps whose rank is asked for
ENOUGH = 0.9  # share of the accuracy above chance that a low-rank probe must keep
HOME = "a probe has on the tested kind of prompts when it is trained on them, in their first template"
LOW = 0.5  # share of its cap that a low rank may have at most
CAPTIONS = {
    "probes": "Balanced accuracy of linear probes of the residual stream after each layer, on people that the probe "
    "has not seen, at the names and at the last token; studentised bootstrap intervals over quads or people. "
    "Beside it two baselines on the same folds, the people's metadata and the letters of their names alone, and the "
    "range under permuted labels.",
    "rank": "Accuracy of reduced-rank probes at the slice's layer on people that the probe has not seen; the last rank "
    "is the cap. Grey: the range under permuted labels.",
}


# --- numbers ----------------------------------------------------------------------------------------------------------


def estimates(frame: pd.DataFrame, params: Subspace, by: Sequence[str]) -> pd.DataFrame:
    """Mean score with an interval over units for each combination of `by`; units that are in all of them."""
    keys = list(by)
    sums = frame.groupby(["unit", *keys])["score"].agg(["sum", "count"]).unstack(keys).dropna()
    total, count = sums["sum"], sums["count"]
    spans = stats.ratio_intervals(total.to_numpy(), count.to_numpy(), params)
    least = min(0, frame["score"].min())  # accuracies are not below 0; differences of them are
    ends = {name: pd.Series(own, dtype=float).clip(least, 1) for name, own in columns(spans).items()}
    return total.columns.to_frame(index=False).assign(**ends, units=len(total))


def of_people(frame: pd.DataFrame, labels: str = "true") -> pd.DataFrame:
    """Rows on unseen people, whole probes."""
    return frame[(frame["folds"] == "people") & (frame["labels"] == labels) & (frame["rank"] == WHOLE)]


def by_group(frame: pd.DataFrame, params: Subspace, groups: Sequence[str], by: Sequence[str]) -> pd.DataFrame:
    """`estimates` of each group, with the units that are in all combinations of `by` there."""
    parts = [estimates(rows, params, [*groups, *by]) for _, rows in frame.groupby([*groups], sort=False)]
    return pd.concat(parts, ignore_index=True)


def baseline_table(scores: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """Accuracy of each baseline by kind and target; `better` is the higher one's."""
    out = by_group(scores, params, ASKED, ["baseline"])
    order = out.groupby(ASKED)["estimate"].rank(ascending=False, method="first")
    return out.assign(better=order == 1)


def curves(frame: pd.DataFrame, scores: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """Accuracy over layers by kind, target, position, template trained on, and template tested on (`own`: the same).

    `beyond` (with its ends): what it is above the better `baseline` on the same prompts, paired by units.
    """
    true, best = of_people(frame), baseline_table(scores, params)
    best = scores.merge(best.loc[best["better"], [*ASKED, "baseline"]])[[*ASKED, "item", "baseline", "score"]]
    paired = true.merge(best, on=[*ASKED, "item"], suffixes=("", "_of_baseline"), validate="many_to_one")
    paired["score"] -= paired["score_of_baseline"]
    key, names = [*MOVED, "layer"], ["beyond", "beyond_low", "beyond_high"]
    above = by_group(paired, params, [*MOVED, "baseline"], ["layer"]).drop(columns="units")
    above = above.rename(columns=dict(zip(("estimate", "low", "high"), names, strict=True)))
    out = by_group(true, params, MOVED, ["layer"]).merge(above, on=key, validate="one_to_one")
    return out.assign(own=out["trained"] == out["template"])


def nulls(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and range over permutations by kind, target, position and layer, and the curve's familywise threshold."""
    rows = of_people(frame, "permuted")
    out = rows.groupby([*CURVE, "layer"], sort=False)["score"].agg(estimate="mean", low="min", high="max")
    return out.reset_index().assign(threshold=lambda table: table.groupby(CURVE)["high"].transform("max"))


def selectivity(frame: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """Task accuracy, control accuracy and their difference (with intervals) over layers, on folds by prompt."""
    rows = frame[frame["folds"] == "prompts"]
    parts = []
    for _, own in rows.groupby(CURVE, sort=False):
        wide = own.pivot(index=["unit", "item", "layer"], columns="labels", values="score").reset_index()
        differences = wide.assign(score=wide["true"] - wide["control"], **own.iloc[0][CURVE])
        means = wide.groupby("layer")[["true", "control"]].mean().reset_index()
        parts.append(estimates(differences, params, [*CURVE, "layer"]).merge(means, on="layer"))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*CURVE, "layer"])


def rank_table(frame: pd.DataFrame, params: Subspace) -> pd.DataFrame:
    """Accuracy against rank by kind, target, position and layer: `labels` true with intervals over units, or permuted
    with its range. The largest rank is the cap, classes less one."""
    rows = frame[(frame["folds"] == "people") & (frame["rank"] != WHOLE)]
    by = [*CURVE, "layer"]
    true = rows[rows["labels"] == "true"]
    parts = [estimates(own, params, [*by, "rank"]).assign(labels="true") for _, own in true.groupby(by, sort=False)]
    null = rows[rows["labels"] == "permuted"].groupby([*by, "rank"])["score"]
    null = null.agg(estimate="mean", low="min", high="max").reset_index()
    return pd.concat([*parts, null.assign(labels="permuted")], ignore_index=True)


def effective_rank(values: np.ndarray) -> float:
    """exp of the entropy of the shares of variance (Roy and Vetterli 2007, with variances for singular values)."""
    shares = values**2 / (values**2).sum()
    return float(np.exp(-(shares[shares > 0] * np.log(shares[shares > 0])).sum()))


def spectra(means: pd.DataFrame) -> pd.DataFrame:
    """Effective rank of the class means, and the share of their variance in the first k directions (`explained`, a
    list), for the true labels (permutation -1) and each permutation."""
    rows = means[means["what"] == "singular values"]
    variances = [np.asarray(values, dtype=float) ** 2 for values in rows["values"]]
    return rows[[*CURVE, "layer", "permutation"]].assign(
        effective=[effective_rank(np.sqrt(own)) for own in variances],
        explained=[np.cumsum(own) / own.sum() for own in variances],
    )


def verdicts(ranks: pd.DataFrame, spectrum: pd.DataFrame) -> pd.DataFrame:
    """Whether each map (kind, target, position) is of low rank at each layer, and the numbers that say so.

    Low rank: a probe of at most half the cap keeps ENOUGH of the accuracy above chance (`rank needed`), and the class
    means' effective rank is below that of every permutation of the labels. `low rank` is None, not decided, where the
    probe at the cap is not above every permutation, and of two classes. `explained`: share of the class means' variance
    in the first half of the cap's directions; `permuted ...`: the least effective rank and the largest share under
    permuted labels.
    """
    out = []
    for key, own in ranks.groupby([*CURVE, "layer"], sort=False):
        true = own[own["labels"] == "true"].set_index("rank")["estimate"].sort_index()
        cap, tops = int(true.index.max()), own[own["labels"] == "permuted"].set_index("rank")["high"]
        chance, half, accuracy = 1 / (cap + 1), max(1, int(cap * LOW)), float(true[cap])
        needed = int(true.index[true >= min(accuracy, chance + ENOUGH * (accuracy - chance))].min())
        there = spectrum[(spectrum[[*CURVE, "layer"]] == list(key)).all(axis=1)]
        (effective, *others), (first, *rest) = there["effective"], [values[half - 1] for values in there["explained"]]
        asked = cap > 1 and accuracy > tops[cap]  # of two classes every map has rank one
        low = bool(needed <= half and effective < min(others)) if asked else None
        numbers = {"cap": cap, "chance": chance, "accuracy": accuracy, "at rank 1": float(true.iloc[0])}
        numbers |= {"rank needed": needed, "effective rank": effective, "permuted effective rank": min(others)}
        numbers |= {"explained": float(first), "permuted explained": float(max(rest)), "low rank": low}
        out.append(dict(zip([*CURVE, "layer"], key, strict=True)) | numbers)
    return pd.DataFrame(out)


def only(table: pd.DataFrame, lead: tuple[str, str, str], layer: int) -> pd.DataFrame:
    """The rows of one map at one layer."""
    return table[(table[[*CURVE, "layer"]] == [*lead, layer]).all(axis=1)]


def coordinates(means: pd.DataFrame, lead: tuple[str, str, str], layer: int) -> pd.DataFrame:
    """Class means in their singular directions: classes x directions."""
    rows = only(means[means["what"] == "class mean"], lead, layer)
    return pd.DataFrame([np.asarray(v, dtype=float) for v in rows["values"]], index=rows["name"].tolist())


def ends(means: pd.DataFrame, lead: tuple[str, str, str], layer: int) -> list[dict]:
    """For each leading direction: its share of the class means' variance, the classes at its ends, and their words."""
    places = coordinates(means, lead, layer)
    said = only(means[means["what"] == "words"], lead, layer).set_index("name")["words"]
    shares = (places**2).sum() / (places**2).to_numpy().sum()
    return [
        {"direction": k + 1, "share": float(shares[k]), "high": places[k].idxmax(), "low": places[k].idxmin()}
        | {f"{end}_words": said[f"{k + 1} {end}"] for end in ("high", "low")}
        for k in range(min(places.shape[1], len(said) // 2))
    ]


def clusters(places: pd.DataFrame, superset_of: dict[str, str], permutations: int, seed: int) -> dict | None:
    """Average linkage on the correlation of class means, cut into as many clusters as supersets; its adjusted Rand
    index with these, and p by permutation. None for fewer means than a correlation needs, or no more than supersets."""
    if len(places) < 4 or len(places) <= len({superset_of[name] for name in places.index}):
        return None
    tree = linkage(places.to_numpy(), "average", metric="correlation")
    own = [superset_of[name] for name in places.index]
    cut = fcluster(tree, len(set(own)), "maxclust")
    index, rng = adjusted_rand_score(own, cut), np.random.default_rng(seed)
    chance = [adjusted_rand_score(rng.permutation(own), cut) for _ in range(permutations)]
    groups = pd.Series(places.index).groupby(cut).agg(list).tolist()
    p = (1 + sum(value >= index for value in chance)) / (1 + permutations)
    return {"tree": tree.tolist(), "names": list(places.index), "groups": groups, "rand": float(index), "p": float(p)}


def transfer_table(curve: pd.DataFrame, layer: int) -> pd.DataFrame:
    """Every probe at one layer on prompts unlike its own, about other people, with the own probe of those beside it."""
    rows = curve[curve["layer"] == layer]
    own = rows[rows["own"]].set_index(CURVE)["estimate"].rename("own probe")
    return rows[~rows["own"]].join(own, on=CURVE).drop(columns="own")


def superset_of(frame: pd.DataFrame) -> dict[str, str]:
    """The superset of each profession, by the people who were asked about."""
    rows = frame[(frame["kind"] == "one-name") & (frame["label"] != "")]
    labels = rows.drop_duplicates(["item", "target"]).pivot(index="item", columns="target", values="label")
    labels = labels.reindex(columns=["profession", "superset"])
    return dict(labels.dropna().itertuples(index=False, name=None))


class Numbers(NamedTuple):
    """What the page says of probes."""

    layer: int  # of the slice's leading site
    curve: pd.DataFrame
    baselines: pd.DataFrame
    null: pd.DataFrame
    selectivity: pd.DataFrame
    ranks: pd.DataFrame
    verdicts: pd.DataFrame
    places: pd.DataFrame  # class means of the supersets along their directions
    ends: Mapping[str, list[dict]]  # by target
    clusters: dict | None
    superset_of: Mapping[str, str]
    moved: pd.DataFrame
    leads: Sequence[tuple[str, str, str]]  # those of LEADS that there are probes of


def numbers(m: Measured, params: Subspace) -> Numbers | None:
    """Everything that the page says of probes, in numbers; None where there are none."""
    frame, means, layer = m.accuracies, m.spectra, m.probe_layers[0]
    if frame.empty:
        return None
    leads = [lead for lead in LEADS if ((frame["kind"] == lead[0]) & (frame["target"] == lead[1])).any()]
    curve, null, ranks = curves(frame, m.baselines, params), nulls(frame), rank_table(frame, params)
    verdict = verdicts(ranks, spectra(means))
    named = {
        lead[1]: ends(means, lead, layer)
        for lead in leads
        if lead[1] == "superset" or only(verdict, lead, layer)["low rank"].eq(True).any()
    }
    of, places = superset_of(frame), [coordinates(means, lead, layer) for lead in LEADS]
    groups = clusters(places[1], of, params.flips, params.seed)
    read = curve, baseline_table(m.baselines, params), null, selectivity(frame, params)
    moved = transfer_table(curve, layer)
    return Numbers(layer, *read, ranks, verdict, places[0], named, groups, of, moved, leads)


# --- figures ----------------------------------------------------------------------------------------------------------


def titled(table: pd.DataFrame) -> pd.Series:
    """A panel's title: the target and the kind of prompts."""
    return table["target"] + " (" + table["kind"] + " prompts)"


def accuracy_figure(n: Numbers | None) -> Figure | None:
    """Accuracy over layers at both positions, that of the baselines, and the range of permuted labels."""
    if n is None:
        return None
    both = n.null.groupby(["kind", "target", "layer"], sort=False).agg(
        estimate=("estimate", "mean"), low=("low", "min"), high=("high", "max")
    )
    flat = n.baselines.merge(n.curve[["layer"]].drop_duplicates(), how="cross")  # no model, no layers
    flat = flat.assign(position=flat["baseline"] + " alone")
    frame = pd.concat([n.curve[n.curve["own"]], flat, both.reset_index().assign(position="permuted labels")])
    return layer_curve(frame.assign(panel=titled(frame)), "balanced accuracy", "position", "panel")


def selectivity_figure(n: Numbers | None) -> Figure | None:
    """Selectivity over layers at both positions, where a kind of prompts has two templates."""
    if n is None or n.selectivity.empty:
        return None
    table = n.selectivity
    return layer_curve(table.assign(panel=titled(table)), "selectivity (difference of accuracy)", "position", "panel")


def rank_figure(n: Numbers | None) -> Figure | None:
    """Accuracy against rank for the leading maps, a panel each; grey: the range of permuted labels."""
    if n is None or not n.leads:
        return None
    with _canvas((WIDTH, 2.6 * len(n.leads)), len(n.leads)) as (figure, panels):
        for axes, lead in zip(panels, n.leads, strict=True):
            own = only(n.ranks, lead, n.layer).sort_values("rank")
            true, null = own[own["labels"] == "true"], own[own["labels"] == "permuted"]
            look = {"color": GREY, "alpha": 0.3, "lw": 0, "label": "permuted labels"}
            axes.fill_between(null["rank"], null["low"], null["high"], **look)
            axes.plot(true["rank"], true["estimate"], color=BLUE, lw=1, alpha=0.6)
            draw_points(axes, true["rank"].to_numpy(), true, BLUE, "o", "true labels")
            axes.axhline(1 / (true["rank"].max() + 1), color=BLACK, lw=1, ls="--", label="chance")
            axes.set(title=f"{lead[1]} ({lead[0]} prompts, {lead[2]})", ylabel="balanced accuracy", xscale="log")
        every = np.unique(n.ranks["rank"])
        axes.set_xticks(every, [str(rank) for rank in every])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("rank of the probe")
        add_legend(figure)
    return figure


def verdict_table(n: Numbers | None) -> pd.DataFrame | None:
    """The verdicts on every map, and the numbers that say so."""
    return None if n is None else n.verdicts.round(2)


def means_figure(n: Numbers | None) -> Figure | None:
    """Class means along their first two directions."""
    if n is None or n.places.empty:
        return None
    places = n.places
    with _canvas((WIDTH, 3.6)) as (figure, (axes,)):
        y = places[1] if places.shape[1] > 1 else places[0] * 0
        axes.scatter(places[0], y, color=BLUE)
        for turn, name in enumerate(y.sort_values().index):  # below and above in turn: neighbours do not overlap
            axes.annotate(name, (places[0][name], y[name]), (5, 4 if turn % 2 else -12), textcoords="offset points")
        axes.margins(0.15)
        axes.set(xlabel="first direction (mean spreads within classes)", ylabel="second direction")
    return figure


def cluster_figure(n: Numbers | None) -> Figure | None:
    """The tree of class means, each named with its superset, where there are enough."""
    if n is None or n.clusters is None:
        return None
    found = n.clusters
    with _canvas((WIDTH, 1.0 + 0.17 * len(found["names"]))) as (figure, (axes,)):
        names = [f"{name} ({n.superset_of[name]})" for name in found["names"]]
        tree = np.array(found["tree"])
        dendrogram(tree, labels=names, orientation="right", ax=axes, color_threshold=0, above_threshold_color=BLUE)
        axes.grid(False)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_xlabel("1 - correlation of class means")
    return figure


# --- sentences --------------------------------------------------------------------------------------------------------


def shown(row: pd.Series) -> str:
    return interval(row["estimate"], row["low"], row["high"])


def layers_beyond(own: pd.DataFrame) -> str:
    """After which layers the accuracy is above that of the better baseline, each by its own interval."""
    layers = sorted(own.loc[own["beyond_low"].astype(float) > 0, "layer"])
    if own["beyond_low"].isna().any():
        return "asked of too few to say where it is above the better baseline"
    where = f" (from layer {layers[0]} to layer {layers[-1]})" if layers else ""
    better = f"the better baseline ({own['baseline'].iloc[0]})"
    return f"above {better}, each layer's interval by itself, after {len(layers)} of {len(own)} layers{where}"


def baseline_sentence(table: pd.DataFrame, null: pd.DataFrame, permutations: int) -> str:
    """What is read without the model, and what permuted labels give."""
    each, names = [], list(dict.fromkeys(table["baseline"]))
    for key, own in table.groupby(ASKED, sort=False):
        top = null.loc[(null[ASKED] == list(key)).all(axis=1), "threshold"].max()
        by = {row["baseline"]: shown(row) for _, row in own.iterrows()}
        each.append((f"{key[1]} from {key[0]} prompts", *(by.get(name, "") for name in names), f"{top:.2f}"))
    return (
        "Probes are set against the better of two baselines that see nothing of the model: the people's attributes "
        "beside the class (metadata), and the n-grams of their names' letters (letters). They are fitted and tested on "
        "the probes' own folds. Their balanced accuracy, each interval by itself, and the highest that permuted labels "
        f"reach at any layer ({permutations} permutations):\n\n" + tabled(("", *names, "permuted labels"), each)
    )


def accuracy_sentences(curve: pd.DataFrame, layers: Sequence[int]) -> list[str]:
    """For each target, kind and position: from where it is above the better baseline, the best layer, the slice's."""
    out = []
    for key, own in curve[curve["own"]].groupby(CURVE, sort=False):
        best, at = own.loc[own["estimate"].idxmax()], own.set_index("layer").sort_index()
        slices = [
            f"At layer {layer}, where the slice {where}, it is {shown(at.loc[layer])}, {beyond(at.loc[layer])} beyond "
            "the baseline."
            for layer, where in spans(layers).items()
        ]
        out.append(
            f"{key[1].capitalize()} from {key[0]} prompts at `{key[2]}`, of people not seen, is {layers_beyond(own)}. "
            f"The balanced accuracy is {shown(at.iloc[0])} at layer {at.index[0]} and highest after layer "
            f"{best['layer']} ({shown(best)}). {' '.join(slices)}"
        )
    return out


def spans(layers: Sequence[int]) -> dict[int, str]:
    """What the slice does at its first and at its last layer."""
    first, last = min(layers), max(layers)
    return {first: "lies"} if first == last else {first: "begins", last: "ends"}


def beyond(row: pd.Series) -> str:
    """What a probe's accuracy is above the better baseline's."""
    return interval(row["beyond"], row["beyond_low"], row["beyond_high"])


def selectivity_sentence(table: pd.DataFrame, layer: int) -> list[str]:
    """Task, control and selectivity at the slice's layer."""
    rows = table[table["layer"] == layer]
    each = [
        (
            f"{row['target']} from {row['kind']} prompts at `{row['position']}`",
            f"{row['true']:.3f}",
            f"{row['control']:.3f}",
            interval(row["estimate"], row["low"], row["high"], 3)
            + ("" if row["low"] is None or np.isnan(row["low"]) or row["low"] > 0 else " (not shown to be above 0)"),
        )
        for _, row in rows.iterrows()
    ]
    return [
        f"Selectivity after layer {layer}, with every person on both sides of the folds: how far the accuracy on the "
        "task is above that on random labels, one per person.\n\n"
        + tabled(("", "accuracy", "on random labels", "selectivity"), each)
    ] * bool(each)


def rank_sentence(one: pd.Series, ranks: pd.DataFrame) -> str:
    """What is known of the rank of one map; `ranks` are its accuracies by rank (`rank_table`)."""
    where = f"{one['target']} ({one['kind']} prompts, `{one['position']}`, layer {one['layer']}; cap {one['cap']})"
    if one["cap"] < 2:
        return f"The map to {where} has two classes, and so rank one whatever it is."
    if one["low rank"] is None:
        return f"The rank of the map to {where} is not decided: the probe is not above every permutation of the labels."
    tried = ranks[ranks["labels"] == "true"].astype({"rank": int}).set_index("rank").sort_index()
    mark = one["chance"] + ENOUGH * (one["accuracy"] - one["chance"])
    lower = tried[tried.index < one["rank needed"]]
    alike = lower.index[lower["high"].astype(float) >= mark]
    unsure = f" (so, by their intervals, may rank {listed(alike)})" if len(alike) else ""
    return (
        f"The map to {where} needs rank {one['rank needed']}, the first of the ranks tried that keeps {ENOUGH:.0%} of "
        f"the accuracy above chance{unsure}. The accuracy is {one['accuracy']:.2f} at the cap and "
        f"{one['at rank 1']:.2f} for a single direction, where chance is {one['chance']:.2f} (the figure has the "
        f"intervals). The class means' effective rank is {one['effective rank']:.1f}, at least "
        f"{one['permuted effective rank']:.1f} under permuted labels. Half the cap's directions hold "
        f"{one['explained']:.0%} of their variance, at most {one['permuted explained']:.0%} under permuted labels."
    )


def direction_sentence(found: Sequence[dict], target: str) -> str:
    rows = [
        (
            own["direction"],
            f"{own['share']:.0%}",
            f"{own['low']} ({own['low_words']})",
            f"{own['high']} ({own['high_words']})",
        )
        for own in found
    ]
    columns = ("direction", "share of the class means' variance", "from (nearest words)", "to (nearest words)")
    return f"The leading directions of the {target} means; the nearest words are untested.\n\n{tabled(columns, rows)}"


def cluster_sentence(found: dict, target: str) -> str:
    groups = "; ".join(listed(group) for group in found["groups"])
    alike = "agree" if found["p"] <= 0.05 else "are not shown to agree"
    return (
        f"Clusters of the {target} means {alike} with the supersets more than chance: the adjusted Rand index is "
        f"{found['rand']:.2f} of 1 (p = {found['p']:.2g} by permutation). They are: {groups}."
    )


def transfer_sentence(table: pd.DataFrame, layer: int) -> list[str]:
    """How probes do on prompts that they were not trained on."""
    each = [
        (
            f"{row['target']} at `{row['position']}`",
            f"`{row['trained']}`",
            f"`{row['template']}`",
            shown(row),
            beyond(row),
            f"{row['own probe']:.2f}",
        )
        for _, row in table.iterrows()
    ]
    good = int((table["beyond_low"].astype(float) > 0).sum())
    columns = ("", "fitted on", "asked in", "accuracy", "beyond the baseline", "own probe")
    return [
        f"{good} of {len(table)} probes, moved to other prompts about other people after layer {layer}, "
        f"{is_are(good)} above the better baseline of the people asked about, each by itself. The last column is the "
        f"accuracy that {HOME}.\n\n{tabled(columns, each)}"
    ] * bool(each)


def sentences(m: Measured, n: Numbers | None, given: bool = False, more: Sequence[str] = ()) -> list[str]:
    """Everything that the page says of probes, in words; `given`: of a `pairs_file`; `more`: what else of it."""
    if n is None:
        return ["No probe was fitted.", *m.dropped, *more]
    frame, out = m.accuracies, []
    for lead in n.leads:
        ranks = only(n.ranks, lead, n.layer)
        out += [rank_sentence(row, ranks) for _, row in only(n.verdicts, lead, n.layer).iterrows()]
        out += [direction_sentence(n.ends[lead[1]], lead[1])] if lead[1] in n.ends else []
    return [
        f"Probes were read from {prompts_read(frame, given)}.",
        *m.dropped,
        baseline_sentence(n.baselines, n.null, frame["permutation"].max() + 1),
        *more,
        *accuracy_sentences(n.curve, m.probe_layers),
        *selectivity_sentence(n.selectivity, n.layer),
        *out,
        *([cluster_sentence(n.clusters, "profession")] if n.clusters else []),
        *transfer_sentence(n.moved, n.layer),
    ]


def looked_up(step: Step) -> list[str]:
    """Where the attributes of the people of a `pairs_file` come from, and of how many there are none."""
    p, about = step.params, list(step.params.topic.attributes)
    if p.pairs_file is None or not about:
        return []
    columns = [f"{side}_{slot}" for side in ("clean", "corrupt") for slot in "abc"]
    names = [name for name in dict.fromkeys(step.pairs()[columns].to_numpy().ravel()) if name]
    known = set(people_of(step)["name"])
    missed, rest = [name for name in names if name not in known], ""
    if missed:
        few = ", ".join(missed[:10]) + ", ..." * (len(missed) > 10)
        which = "all" if len(missed) == len(names) else "the other"
        rest = f"; {which} {len(missed)} count{'s' * (len(missed) == 1)} as unknown ({few})"
        rest += ", so that the metadata baseline sees nothing of them" * (len(missed) == len(names))
    return [
        f"The {listed(about)} of the pairs' people are looked up by name in the table of people: it has "
        f"{len(names) - len(missed)} of their {counted(len(names), 'name')}{rest}."
    ]


def prompts_read(frame: pd.DataFrame, given: bool) -> str:
    """How many prompts of which kind were read; `given`: of a `pairs_file`, of which nothing is taken out."""
    sizes, out = frame[frame["labels"] == "true"].groupby("kind")[["unit", "item"]].nunique(), []
    if "pair" in sizes.index:
        count = f"{sizes.loc['pair', 'item']} pair prompts ({counted(sizes.loc['pair', 'unit'], 'quad')})"
        if given:
            out.append(
                f"{count} (those that share a name count as one), whose people were taken from the `pairs_file` "
                "whatever the model answers,"
            )
        else:
            out.append(
                f"{count}, whose people the model tells apart by selection (an accuracy near one at the last token of "
                "late layers is built in),"
            )
    if "one-name" in sizes.index:
        out.append(f"from one-name prompts about {sizes.loc['one-name', 'item']} other people, unselected")
    return " and ".join(out).removeprefix("from ").removesuffix(",")


def found(n: Numbers | None) -> dict[str, dict]:
    """What the findings hold of probes."""
    if n is None:
        none = dict.fromkeys(("accuracy", "baselines", "thresholds", "selectivity", "transfer"), [])
        return {"probes": none, "rank": {"layer": None, "verdicts": [], "directions": {}, "clusters": None}}
    own = n.curve[n.curve["own"]].drop(columns="own")
    return {
        "probes": {
            "accuracy": own.to_dict("records"),
            "baselines": n.baselines.to_dict("records"),
            "thresholds": n.null.drop_duplicates(CURVE)[[*CURVE, "threshold"]].to_dict("records"),
            "selectivity": n.selectivity.to_dict("records"),
            "transfer": n.moved.to_dict("records"),
        },
        "rank": {
            "layer": n.layer,
            "verdicts": n.verdicts.to_dict("records"),
            "directions": n.ends,
            "clusters": n.clusters,
        },
    }
