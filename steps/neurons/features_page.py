"""Step 09 on its page, features: quality, stability, what features mean, and what they do; no torch.

Features and neurons are picked on the discovery half by the same measure, and reported on the confirmation half.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment

from lib import stats
from lib.effects import columns, in_halves, is_loss, quad_matrix, reported
from pipeline.step import Step
from report import interactive, plots
from report.plots import class_matrices
from report.words import capital, counted, interval, is_are, listed, number_word, tabled
from steps.neurons.measure import Measured, Neurons
from steps.neurons.picks import aucs, best_features, class_directions, selective, stacked

CARD_NAMES = 8  # prompts on a card
KINDS = ("features", "neurons", "directions", "random features", "random directions")
MATCHED = 0.7  # cosine from which two decoder rows count as one feature (Paulo and Belrose 2025, arXiv 2501.16615)
CAPTIONS = {
    "feature-budgets": "What SAE features, neurons and class directions recover and damage when the most effective of "
    "them are patched together, as a share of patching the whole site, beside random features and directions of the "
    "same norm as the features' change. Confirmation half, studentised bootstrap intervals over quads. Dashed: all "
    "features.",
}


def quality_table(sae: pd.DataFrame) -> pd.DataFrame:
    """One row per SAE for the page."""
    names = {"explained_train": "training", "explained": "held out", "explained_last": "held out, `last`"}
    shown = sae[["seed", *names, "l0", "dead"]].rename(columns={k: f"explained, {v}" for k, v in names.items()})
    return shown.round(3).assign(sha256=sae["sha256"].fillna("published").str[:16])


def stability(sae: pd.DataFrame, selective: Sequence[int], rng: np.random.Generator) -> pd.DataFrame:
    """How well decoder rows of two seeds match, over pairs of seeds: the mean largest cosine, and the share matched
    one to one (Hungarian) with a cosine of at least `MATCHED`.

    Rows: features alive on held-out prompts; the class-selective ones of the first seed, matched into the others; and a
    control, the alive features against those of the other seed with their coordinates shuffled.
    """
    if len(sae) < 2 or sae["decoder"].isna().any() or not all(np.any(fires) for fires in sae["fires"]):
        return pd.DataFrame()
    decoders = [np.reshape(row.decoder, (row.features, row.width)) for row in sae.itertuples()]
    alive = [np.flatnonzero(fires) for fires in sae["fires"]]
    parts = []
    for a, b in combinations(range(len(sae)), 2):
        cosines = decoders[a][alive[a]] @ decoders[b][alive[b]].T
        chance = decoders[a][alive[a]] @ decoders[b][alive[b]][:, rng.permutation(decoders[b].shape[1])].T
        for kind, own in (("alive", cosines), ("shuffled", chance)):
            parts.append({"features": kind} | matched(own, np.arange(len(own))))
        if a == 0 and len(chosen := np.flatnonzero(np.isin(alive[a], selective))):
            parts.append({"features": "class-selective"} | matched(cosines, chosen))
    return pd.DataFrame(parts).groupby("features", sort=False).mean().reset_index()


def matched(cosines: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """The chosen rows' mean largest cosine and the share of them matched one to one."""
    rows, others = linear_sum_assignment(-cosines)
    kept = np.isin(rows, chosen)
    pairs = (cosines[rows, others] >= MATCHED)[kept]
    return {"cosine": cosines[chosen].max(1).mean(), "matched": pairs.sum() / len(chosen), "count": len(chosen)}


def auc_interval(rows: pd.DataFrame, values: np.ndarray, superset: str, params: Neurons) -> stats.Interval:
    """An AUC with its interval over quads, from each prompt's part in it (DeLong et al. 1988, summed over quads); none
    where the prompts of the superset, or the others, are of too few quads."""
    own = (rows["superset"] == superset).to_numpy()
    above = (values[own][:, None] > values[~own]) + 0.5 * (values[own][:, None] == values[~own])
    area, parts = above.mean(), np.zeros(len(rows))
    fewest = min(rows.loc[side, "quad_id"].nunique() for side in (own, ~own))
    if reason := stats.too_few(fewest, "quads"):
        return stats.Interval(float(area), None, None, params.level, fewest, reason)
    parts[own], parts[~own] = (above.mean(1) - area) / own.sum(), (above.mean(0) - area) / (~own).sum()
    sums = pd.Series(parts).groupby(rows["quad_id"].to_numpy()).sum().to_numpy()
    return stats.mean_interval(area + len(sums) * sums, params)


def parsed(records: pd.DataFrame) -> pd.DataFrame:
    """The columns `kind` and `k` (0: no budget), out of "random features 4.2"."""
    parts = records["variant"].str.extract(r"^(?P<kind>.*?)(?: (?P<k>\d+)(?:\.\d+)?)?$")
    return records.assign(kind=parts["kind"], k=parts["k"].fillna("0").astype(int))


def budget_table(records: pd.DataFrame, params: Neurons) -> pd.DataFrame:
    """Each kind's effect at each budget as a share of the whole site's own, confirmation half, with its interval over
    quads; the random draws of a pair are averaged. NaN where the whole site has no effect in the right direction."""
    parts = []
    for direction, rows in parsed(reported(records)).groupby("direction", sort=False):
        matrix = quad_matrix(rows, "effect", ["kind", "k"])
        whole = matrix.values[:, matrix.sites["kind"] == "whole"]
        out = matrix.sites.assign(quantity="recovery" if direction == "denoise" else "damage", quads=len(whole))
        logits = stats.mean_intervals(matrix.values, params)
        spans = columns(logits, "logits_") | dict.fromkeys(("estimate", "low", "high"), np.nan)
        if is_loss(whole[:, 0], params):
            spans |= columns(stats.ratio_intervals(matrix.values, whole, params))
        parts.append(out.assign(**spans, moved=rows.groupby(["kind", "k"])["site_delta"].mean().to_numpy()))
    return pd.concat(parts, ignore_index=True)


def compared(records: pd.DataFrame, params: Neurons) -> pd.DataFrame:
    """SAE features less each other kind at equal budget (logits, confirmation half): paired over quads, intervals that
    hold for all budgets and kinds of one direction together."""
    parts = []
    for direction, rows in parsed(reported(records)).groupby("direction", sort=False):
        matrix = quad_matrix(rows[rows["k"] > 0], "effect", ["kind", "k"])
        values = pd.DataFrame(matrix.values, columns=pd.MultiIndex.from_frame(matrix.sites))
        others = [kind for kind in KINDS[1:] if kind in values]
        keys = [(kind, k) for kind in others for k in params.budgets]
        gaps = np.stack([values["features"][k] - values[kind][k] for kind, k in keys], axis=1)
        spans = stats.simultaneous(gaps, params)
        frame = pd.DataFrame(keys, columns=["other", "k"]).assign(**columns(spans))
        parts.append(frame.assign(quantity="recovery" if direction == "denoise" else "damage"))
    return pd.concat(parts, ignore_index=True)


def map_table(rows: pd.DataFrame, params: Neurons, pairs: pd.DataFrame) -> pd.DataFrame:
    """For every superset, the feature of largest AUC on discovery: its AUC with interval on confirmation, the share of
    the superset's and of other prompts on which it fires, and the names on which it fires most."""
    (_, first), (_, own) = in_halves(rows)[0], in_halves(rows)[-1]
    areas, values = aucs(first, "features"), stacked(own, "features")
    out = []
    for superset, feature in best_features(rows).items():
        mine = (own["superset"] == superset).to_numpy()
        column = values[:, feature]
        row = {"superset": superset, "feature": feature, "discovery": areas[superset].max(), "n": int(mine.sum())}
        row |= {"n quads": own.loc[mine, "quad_id"].nunique()}
        row |= {"estimate": np.nan, "low": np.nan, "high": np.nan, "fires": np.nan, "fires elsewhere": np.nan}
        if 0 < mine.sum() < len(mine):
            span = columns([auc_interval(own, column, superset, params)])
            row |= {key: value[0] and min(value[0], 1.0) for key, value in span.items()}
            row |= {"fires": (column[mine] > 0).mean(), "fires elsewhere": (column[~mine] > 0).mean()}
        out.append(row | {"top pairs of names": "; ".join(top_names(own, column, pairs))})
    return pd.DataFrame(out)


def top_names(own: pd.DataFrame, column: np.ndarray, pairs: pd.DataFrame, count: int = 3) -> dict[str, float]:
    """The names of the prompts on which a feature fires most, of `count` prompts, with its activation there."""
    first = [index for index in np.argsort(-column, kind="stable")[:count] if column[index] > 0]
    names = own.iloc[first][["pair_id", "side"]].merge(pairs, on="pair_id", how="left")
    each = [" and ".join(row[f"{row['side']}_{slot}"] for slot in "ab") for _, row in names.iterrows()]
    return {name: float(column[first[each.index(name)]]) for name in dict.fromkeys(each)}


def cards(found: pd.DataFrame, promoted: pd.DataFrame, candidates: Sequence[str]) -> pd.DataFrame:
    """`map_table` with what each feature's decoder row promotes, for the page."""
    most = [candidates[int(np.argmax(logits))] for logits in promoted["logits"]]
    own = promoted.assign(**{"candidate promoted most": most})[["feature", "candidate promoted most", "promotes"]]
    spans = [interval(*row) for row in found[["estimate", "low", "high"]].to_numpy(dtype=float)]
    names = {"discovery": "AUC, discovery", "n": "prompts", "n quads": "quads"}
    shown = found.round(2).assign(**{"AUC, confirmation": spans}).rename(columns=names)
    return shown.drop(columns=["estimate", "low", "high"]).merge(own.drop_duplicates("feature"), on="feature")


def map_figure(m: Measured) -> Figure:
    """AUC of the shown features for every superset, both halves."""
    tables = {half: aucs(part, "features").loc[list(m.shown)] for half, part in in_halves(m.reads)}
    return class_matrices(tables, "area under the curve", "superset", "feature")


def budget_curves(table: pd.DataFrame) -> Figure:
    """Effect against the number of features, neurons or directions patched together, a panel per quantity."""
    own = table[table["k"] > 0]
    order = {k: place for place, k in enumerate(sorted(own["k"].unique()))}
    with plots.stacked_panels(own, "quantity", 2.8) as (figure, panels):
        groups = plots.styles_of(pd.DataFrame({"kind": [kind for kind in KINDS if kind in set(own["kind"])]}), "kind")
        for axes, part in panels:
            for index, (kind, (colour, marker)) in enumerate(groups.items()):
                line = part[part["kind"] == kind].sort_values("k")
                at = line["k"].map(order).to_numpy(dtype=float) + (index - (len(groups) - 1) / 2) * 0.1
                axes.plot(at, line["estimate"], color=colour, lw=1, alpha=0.6)
                plots.draw_points(axes, at, line, colour, marker, label=kind)
            rest = part_of(table, part["quantity"].iloc[0], "reconstruction")
            axes.axhline(rest["estimate"], color=plots.BLACK, lw=1, ls="--", label="all features")
            plots.zero_line(axes)
            axes.set_xticks(list(order.values()), [str(k) for k in order])
        axes.set_xlabel("features, neurons or directions patched together")
        plots.shared_ylabel(figure, "share of the whole site's effect")
        plots.add_legend(figure)
    return figure


def part_of(table: pd.DataFrame, quantity: str, kind: str, k: int = 0) -> pd.Series:
    """One row of `budget_table`."""
    return table[(table["quantity"] == quantity) & (table["kind"] == kind) & (table["k"] == k)].iloc[0]


def sae_sentences(sae: pd.DataFrame, stable: pd.DataFrame, params: Neurons) -> list[str]:
    """How the autoencoders are, and how alike."""
    row, mean = sae.iloc[0], sae.mean(numeric_only=True)
    what = f"{capital(number_word(len(sae)))} SAEs of {row['features']} features were trained from different seeds"
    what = f"The published SAE `{params.sae_file}` ({row['features']} features) was read" if params.sae_file else what
    out = [
        f"{what} at {row['site']}, on {row['samples']:,} activations. On held-out ones ({row['held_samples']:,} "
        f"prompts of the confirmation half) {mean['l0']:.1f} features fire on average (L0), and {mean['dead']:.0%} "
        f"never do. The variance explained is {mean['explained']:.2f} there and {mean['explained_train']:.2f} in "
        f"training (means over seeds, no intervals). At `last` it is {mean['explained_last']:.2f} (no interval). First "
        f"tokens were left out: their mean norm is {row['first_norm']:.0f}, that of the others {row['norm']:.0f}."
    ]
    if stable.empty:
        return [*out, "Stability over seeds cannot be measured on a single SAE."]
    own = stable.set_index("features")
    alive = own.loc["alive"]
    verdict = "Most features come back" if alive["matched"] >= 0.5 else "Most features belong to their seed"
    names = {"alive": "all that fire", "class-selective": "class-selective", "shuffled": "shuffled rows"}
    rows = [
        (name, f"{own.loc[key, 'cosine']:.2f}", f"{own.loc[key, 'matched']:.0%}")
        for key, name in names.items()
        if key in own.index
    ]
    columns = ("features", "largest cosine, on average", f"matched one to one at {MATCHED:g} or more")
    text = f"{verdict}: what a feature's decoder row finds in another seed's (counted, no intervals)."
    return [*out, f"{text}\n\n{tabled(columns, rows)}"]


def map_sentences(rows: pd.DataFrame, found: pd.DataFrame, params: Neurons) -> list[str]:
    """How many features and neurons are selective for a superset, and the best feature of each."""
    parts = []
    for kind in ("features", "neurons"):
        if kind in rows:
            own = selective(rows, kind, params)
            again, total = int((own["confirmation"] >= params.sae_selective).sum()), len(rows[kind].iloc[0])
            parts.append(
                f" {len(own)} of {total} {kind} {is_are(len(own))} selective on discovery, and {again} of them again "
                "on confirmation."
            )
    neurons = best_neurons(rows)
    best = [
        (r.superset, r.feature, interval(r.estimate, r.low, r.high), r.n, r.quads)
        + ((neurons[r.superset],) if r.superset in neurons else ())
        for r in found.rename(columns={"n quads": "quads"}).itertuples()
    ]
    few = found["low"].isna().any()
    why = f" There is no interval where the superset is in fewer than {stats.MINIMUM_CLUSTERS} quads." * bool(few)
    columns = ("superset", "feature", "AUC", "prompts", "quads", *["best neuron's AUC"] * bool(neurons))
    beside = ", beside it the best of the site's single neurons, picked alike" * bool(neurons)
    of_each = "No superset is in both halves, so no feature is said to be the best of one."
    if best:
        of_each = f"The best feature of each superset by discovery, with its AUC on confirmation{beside}.{why}"
        of_each += f"\n\n{tabled(columns, best)}"
    return [
        f"Selective for a superset is called an AUC of at least {params.sae_selective:g}, one against the rest, at "
        f"`last`.{''.join(parts)}",
        of_each,
    ]


def best_neurons(rows: pd.DataFrame) -> dict[str, str]:
    """For every superset, the AUC on confirmation of the single neuron that is best on discovery, in words; {} where
    none was read."""
    if "neurons" not in rows:
        return {}
    first, last = (aucs(part, "neurons") for part in (in_halves(rows)[0][1], in_halves(rows)[-1][1]))
    return {name: f"{last[name][first[name].idxmax()]:.2f}" for name in first if name in last}


def effect_sentences(table: pd.DataFrame, gaps: pd.DataFrame, params: Neurons, directions: int) -> list[str]:
    """What features do at equal budget beside neurons, directions (there are so many) and random ones; the verdict
    comes last."""
    out, verdicts = [], []
    for quantity, own in table.groupby("quantity", sort=False):
        whole = part_of(own, quantity, "whole")
        text = interval(whole["logits_estimate"], whole["logits_low"], whole["logits_high"])
        budgets = list(dict.fromkeys((min(params.budgets), max(params.budgets))))
        each = [
            (
                f"directions (there are {directions})" if kind == "directions" and max(budgets) > directions else kind,
                *(shown(part_of(own, quantity, kind, k)) for k in budgets),
            )
            for kind in KINDS
            if kind in set(own["kind"])
        ]
        rest, error = (shown(part_of(own, quantity, kind)) for kind in ("reconstruction", "error"))
        out.append(
            f"Patching the whole site gives a {quantity} of {text} logits. Of it all features together make up {rest}, "
            f"and the error that they leave {error}.\n\n"
            + tabled(("share of it", *(f"at a budget of {k}" for k in budgets)), each)
        )
        for other, part in gaps[gaps["quantity"] == quantity].groupby("other", sort=False):
            low, high = part["low"].astype(float), part["high"].astype(float)
            if low.isna().all():
                continue
            more, less = part["k"][low > 0].tolist(), part["k"][high < 0].tolist()
            said = [f"{word} than {other} {at_budgets(ks)}" for word, ks in (("more", more), ("less", less)) if ks]
            said = " and ".join(said) or f"neither more nor less than {other} at any budget"
            verdicts.append((quantity, said, other, bool(more), bool(less)))
    if not verdicts:
        return [*out, "There are too few quads to compare SAE features with neurons and directions."]
    for quantity in dict.fromkeys(table["quantity"]):
        said = "\n".join(f"- {text}" for which, text, *_ in verdicts if which == quantity)
        out.append(f"In {quantity}, SAE features do, familywise over kinds and budgets:\n\n{said}")
    if max(params.budgets) > directions:
        out.append(
            f"There are {directions} class directions: beyond a budget of as many, features stand against all of "
            "them, not against as many as there are features."
        )
    return [*out, rivals_sentence(verdicts)]


def rivals_sentence(verdicts: Sequence[tuple]) -> str:
    """Whether features do more or less than neurons and directions at any budget; `verdicts` end in the other kind, and
    whether features do more and less than it."""
    words = {
        (True, False): "do more than {} at some budget, and never less",
        (True, True): "do more than {} in some comparisons, and less in others",
        (False, True): "do less than {} at some budget, and never more",
        (False, False): "are not shown to do more or less than {} at any budget",
    }
    kinds: dict[tuple[bool, bool], list[str]] = {}
    for rival in ("neurons", "directions"):
        if own := [(more, less) for *_, other, more, less in verdicts if other == rival]:
            kinds.setdefault(tuple(any(held) for held in zip(*own, strict=True)), []).append(rival)
    each = [words[kind].format(" or ".join(others)) for kind, others in kinds.items()]
    return f"SAE features {'; they '.join(each)} here (familywise over kinds and budgets)."


def at_budgets(sizes: Sequence[int]) -> str:
    """At which budgets, in words."""
    if len(sizes) > 2:
        return f"at {number_word(len(sizes))} budgets, of {sizes[0]} to {sizes[-1]}"
    return f"at a budget of {sizes[0]}" if len(sizes) == 1 else f"at budgets of {listed(sizes)}"


def shown(row: pd.Series) -> str:
    """A share with its interval."""
    bare = np.isnan(float(row["estimate"]))
    return "not defined" if bare else interval(row["estimate"], row["low"], row["high"])


def stable_over_seeds(step: Step, m: Measured) -> pd.DataFrame:
    """`stability` with the class-selective features apart."""
    units = selective(m.reads, "features", step.params)["unit"]
    return stability(m.saes, units, step.rng("shuffled features"))


def cards_table(step: Step, m: Measured) -> pd.DataFrame:
    """What the best features mean."""
    return cards(map_table(m.reads, step.params, step.pairs()), m.promoted, step.params.topic.supersets)


def cards_touched(step: Step, m: Measured) -> HTML:
    """A card for the best feature of each superset."""
    pairs, own = step.pairs(), in_halves(m.reads)[-1][1]
    values = stacked(own, "features")
    shown = []
    for row in cards_table(step, m).to_dict("records"):
        column = values[:, row["feature"]]
        top = top_names(own, column, pairs, CARD_NAMES)
        means = pd.Series(column).groupby(own["superset"].to_numpy()).mean()
        on = f"{counted(row['prompts'], 'prompt')} of {counted(row['quads'], 'quad')}"
        facts = {
            "area under the ROC curve, discovery half": f"{row['AUC, discovery']:.2f}",
            f"area under the ROC curve, confirmation half ({on})": row["AUC, confirmation"],
            "fires on": f"{row['fires']:.0%} of the superset's prompts, {row['fires elsewhere']:.0%} of the others",
            "promotes": f"{row['promotes']} (of the candidates most: {row['candidate promoted most']})",
            "prompts on which it fires most": [f"{name} ({value:.2f})" for name, value in top.items()],
        }
        mean = pd.DataFrame({"name": means.index, "estimate": means.to_numpy(), "low": None, "high": None})
        gist = f"feature {row['feature']}, AUC {row['AUC, confirmation']}"
        bars = {"mean activation, confirmation half": mean}
        shown.append(interactive.Card(row["superset"], gist, facts, bars))
    return interactive.cards("", "feature", shown, cards_table(step, m))


def budgets_figure(step: Step, m: Measured) -> Figure:
    """What features, neurons and directions do at each budget."""
    return budget_curves(budget_table(m.features, step.params))


def part(step: Step, m: Measured) -> dict[str, Any]:
    """What the page says of features, its figure, and the numbers handed on under `features`."""
    params, stable = step.params, stable_over_seeds(step, m)
    found = map_table(m.reads, params, step.pairs())
    table, gaps = budget_table(m.features, params), compared(m.features, params)
    effects = effect_sentences(table, gaps, params, len(class_directions(m.reads)))
    about = ["seed", "site", "sha256", "features", "active", "samples", "explained", "explained_last", "l0", "dead"]
    return {
        "sentences": [*sae_sentences(m.saes, stable, params), *map_sentences(m.reads, found, params), *effects],
        "headline": effects[-1:],
        "figures": {"feature-budgets": budget_curves(table)},
        "captions": CAPTIONS,
        "features": {
            "saes": m.saes[about].to_dict("records"),
            "stability": stable.to_dict("records"),
            "map": found.to_dict("records"),
            "budgets": table.to_dict("records"),
            "compared": gaps.to_dict("records"),
        },
    }
