"""Step 09 on its page, single neurons: from the tables to numbers, figures and sentences.

1. `singles` and `shares` report the leading neurons, alone and together, on the confirmation half.
2. `selective` says whom the activations tell apart; `card_table` what single neurons write, and for whom.
3. `part` puts the numbers into sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib import style
from scipy import stats as tests

from lib import effects, stats
from lib.effects import in_halves, reported
from pipeline.step import Step
from report import interactive, plots
from report.plots import BLUE, STYLE, VERMILION, WIDTH, Figure
from report.words import counted, in_logits, interval, is_are, listed, number_word, of_row, tabled
from steps.neurons.measure import Measured, Neurons
from steps.neurons.picks import NEURON, Set, means

QUANTITY = {"mean": "damage", "clean": "recovery"}  # damage under a class-neutral ablation: the other is its mirror
CARD_WORDS = 5  # names and tokens on a card
HALF = 0.5  # "carry" means more than half of the MLPs' joint effect
TOLD = [*NEURON, "superset", "discovery", "adjusted", "confirmation", "p", "mean", "mean_others", "picked", "selective"]
TOLD += ["promoted", "suppressed", "site"]
CLAIMED = {"quantity": "damage", "n_sites": 10}  # what the claim of page 10 about a few neurons is about
WRITES = {"up": "most", "down": "least"}
CAPTIONS = {
    "top": "The neurons of largest effect either way, picked on the discovery half: fall of logit_diff when each "
    "is given its corrupt value in the clean run (negative: it rises, the neuron opposes the answer), both halves. "
    "Intervals hold for all of the top neurons together.",
    "joint": "Joint effect of the top neurons as a share of that of the same layers' whole MLPs, beside the sum of "
    "their single effects and random neurons of the same layers that write as much. Confirmation half, "
    "studentised bootstrap intervals over quads.",
}


# --- effects ---


def added_up(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Confirmation effects added up in the order of the discovery effects, of the neurons that "help" the answer on
    discovery and of those that "oppose" it (logits)."""
    halves = [means(part) for _, part in in_halves(frame)]
    both = halves[0].merge(halves[-1], on=NEURON, suffixes=("", "_last"))
    both = both.sort_values("effect", key=np.abs, ascending=False, kind="stable")
    signs = {"help": both["effect"] > 0, "oppose": both["effect"] < 0}
    return {does: both.loc[keep, "effect_last"].cumsum().to_numpy() for does, keep in signs.items()}


def with_sets(table: pd.DataFrame, sets: Sequence[Set]) -> pd.DataFrame:
    """The rows of the sweep of `roster` with their set's `kind` and `n_sites`."""
    kinds, sizes = np.array([own.kind for own in sets]), np.array([own.n_sites for own in sets])
    return table.assign(kind=kinds[table["site_set"]], n_sites=sizes[table["site_set"]])


def singles(table: pd.DataFrame, sets: Sequence[Set], params: Neurons) -> dict[str, pd.DataFrame]:
    """`effects.both_halves` of the top neurons for each ablation, in the order of their discovery rank."""
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
    sure = table[effects.significant(table, params)]
    sign = np.sign(sure["estimate"]).groupby(sure["site"])
    agreed = (sign.nunique() == 1) & (sign.size() == table["half"].nunique())
    return sign.first()[agreed]


def discovery_shares(table: pd.DataFrame, sets: Sequence[Set], params: Neurons) -> pd.DataFrame:
    """`shares` on the discovery half (the only half, where there is one)."""
    return shares(in_halves(table)[0][1], sets, params)


def shares(table: pd.DataFrame, sets: Sequence[Set], params: Neurons) -> pd.DataFrame:
    """Joint effects of the growing sets, and the sums of the single ones, as shares of the MLPs' joint effect.

    Of the last half in the table; `quantity` is damage or recovery, `logits` the mean effect, `mlps` that of the MLPs.
    `above_random` is the lower end of the interval of helping minus random neurons (logits). No rows where the
    MLPs have no positive effect.
    """
    own = reported(with_sets(table, sets))
    own, out = own.assign(effect=effects.effect(own)), []
    alone = {one.sites[0]: index for index, one in enumerate(sets) if one.kind == "single"}
    for ablation, quantity in QUANTITY.items():
        rows = own[own["ablation"] == ablation]
        if rows.empty:  # no pair has donors of a mean
            continue
        by_set = rows.pivot_table(index="quad_id", columns="site_set", values="effect", aggfunc="sum")
        whole = by_set[len(sets) - 1]
        pairs = rows.groupby("quad_id")["pair_id"].nunique()
        if not (whole.sum() > 0 and effects.is_loss(whole / pairs, params)):
            continue
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


# --- classes and cards ---


def p_of_auc(auc: pd.Series, n: pd.Series, others: pd.Series) -> np.ndarray:
    """Two-sided p of an area under the ROC curve by Mann and Whitney's normal approximation."""
    return 2 * tests.norm.sf(np.abs(auc - 0.5) / np.sqrt((n + others + 1) / (12 * n * others)))


def selective(classes: pd.DataFrame, params: Neurons, column: str = "auc") -> pd.DataFrame:
    """For each neuron the superset, of those in both halves, that its activation tells best from the others on the
    discovery half; no rows where the halves have none in common.

    `discovery` and `confirmation` are its areas there; `picked` where the discovery area is significant (Benjamini and
    Hochberg over neurons x supersets), `selective` where the confirmation area, of the same side, is so among the
    picked. `promoted` and `suppressed`: the supersets whose logits the neuron's output raises most and least on the
    prompts of its superset, against the others.
    """
    table = classes.assign(p=p_of_auc(classes[column], classes["n"], classes["n_others"]), auc=classes[column])
    halves = [part for _, part in in_halves(table)]
    there = {*halves[0]["superset"]} & {*halves[-1]["superset"]}  # of few pairs, a half may lack a superset
    first, last = (half[half["superset"].isin(there)].copy() for half in (halves[0], halves[-1]))
    if first.empty:
        return pd.DataFrame(columns=TOLD).astype({"picked": bool, "selective": bool, "confirmation": float})
    first["adjusted"] = tests.false_discovery_control(first["p"])
    best = first.loc[(first["auc"] - 0.5).abs().groupby([first["layer"], first["head"]]).idxmax()]
    keys = [*NEURON, "superset"]
    out = best[[*keys, "auc", "adjusted"]].rename(columns={"auc": "discovery"})
    held = last[[*keys, "auc", "p", "mean", "mean_others"]].rename(columns={"auc": "confirmation"})
    out = out.merge(held, on=keys)
    out["picked"] = out["adjusted"] <= 1 - params.level
    sure = (out["discovery"] > 0.5) == (out["confirmation"] > 0.5)
    adjusted = pd.Series(1.0, index=out.index)
    if out["picked"].any():
        adjusted[out["picked"]] = tests.false_discovery_control(out.loc[out["picked"], "p"])
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
    own = reported(classes)
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
    own, rows = reported(activations), []
    for card in cards.itertuples():
        mine = own[(own["layer"] == card.layer) & (own["head"] == card.head)]
        for superset, part in mine.groupby("superset"):
            values = part.groupby("quad_id")["activation"].mean().to_numpy(dtype=float)
            span = stats.mean_interval(values, params)
            rows.append({"site": card.site, "superset": superset, **effects.columns([span])})
    return pd.DataFrame(rows).explode(["estimate", "low", "high"], ignore_index=True)


def card_words(activations: pd.DataFrame, tokens: pd.DataFrame, card: Any, count: int = 3) -> dict[str, list[str]]:
    """The words of a card: its names of highest and lowest activation, and the tokens that one unit of it writes on
    most and least. `activations` as of `named_prompts`."""
    mine = activations[(activations["layer"] == card.layer) & (activations["head"] == card.head)]
    names = mine.groupby("names")["activation"].mean().sort_values()
    own = tokens[(tokens["layer"] == card.layer) & (tokens["head"] == card.head) & (tokens["rank"] <= count)]
    shown = {"highest": names[::-1][:count], "lowest": names[:count]}
    out = {how: [f"{who} ({round(value, 2) + 0.0:.2f})" for who, value in part.items()] for how, part in shown.items()}
    return out | {
        f"writes {WRITES[end]} on": [f'"{token}"' for token in part["token"]] for end, part in own.groupby("end")
    }


def singled_out(tokens: pd.DataFrame, card: Any) -> dict[str, float]:
    """The share of the layer's neurons that single out their first word as much, for both ends."""
    own = tokens[(tokens["layer"] == card.layer) & (tokens["head"] == card.head)]
    return {f"writes {WRITES[end]} on": float(part["p"].iloc[0]) for end, part in own.groupby("end")}


def card_table(activations: pd.DataFrame, tokens: pd.DataFrame, cards: pd.DataFrame, count: int = 3) -> pd.DataFrame:
    """`card_words` of each card, with the share of the layer's neurons that single a word out as much."""
    rows = []
    for card in cards.itertuples():
        words, shares = card_words(activations, tokens, card, count), singled_out(tokens, card)
        said = {end: f"{', '.join(words[end])} ({share:.0%})" for end, share in shares.items()}
        people = {how: "; ".join(words[how]) for how in ("highest", "lowest")}
        rows.append({"neuron": card.site, **people, "writes most on": said["writes most on"]})
        rows[-1]["writes least on"] = said["writes least on"]
    return pd.DataFrame(rows).set_index("neuron")


# --- figures ---


def concentration(frame: pd.DataFrame) -> Figure:
    """`added_up` as curves."""
    with style.context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2))
        axes = figure.subplots()
        for (does, total), colour in zip(added_up(frame).items(), (BLUE, VERMILION), strict=True):
            axes.plot(np.arange(1, len(total) + 1), total, color=colour, label=f"{does} the answer on discovery")
        plots.zero_line(axes)
        axes.set(xscale="log", xlabel="neurons added, largest discovery effect first", ylabel="sum of effects (logits)")
        axes.legend(loc="upper left")
    return figure


def direct_figure(frame: pd.DataFrame, chosen: pd.DataFrame, named: int = 6) -> Figure:
    """The whole effect of each chosen neuron against its direct effect, confirmation half, the first ones named."""
    own = chosen[NEURON].merge(means(reported(frame)), on=NEURON)
    own = own.assign(of="layer " + own["layer"].astype(str)).sort_values("layer")
    words = "effect for the answer (logits)"
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
            plots.draw_points(axes, np.arange(len(part)), part, BLUE, "o", label="", across=True)
            plots.zero_line(axes, across=True)
            axes.set_yticks(range(len(part)), part["superset"], fontsize=8)
            axes.grid(False, axis="y")
            axes.set(title=site, ylim=(len(part) - 0.4, -0.6))
        for axes in panels[len(sites) :]:
            axes.set_visible(False)
        figure.supxlabel("activation", fontsize=10)
    return figure


def ranked_figure(step: Step, m: Measured) -> Figure:
    """The first twenty of the leading neurons, both halves."""
    lead = singles(m.joint, m.sets, step.params)["counterfactual"]
    return plots.ranked_sites(lead[lead["rank"] < 20], "fall of logit_diff (logits)")


def joint_figure(step: Step, m: Measured) -> Figure | None:
    """The growing sets as shares of the MLPs' joint effect, where that is positive."""
    carried = shares(m.joint, m.sets, step.params)
    if carried.empty:
        return None
    return plots.slice_curve(carried, HALF, "kind", "quantity", "share of the MLPs' joint effect")


def classes_figure(step: Step, m: Measured) -> Figure | None:
    """How well the leading neurons tell supersets apart, in both halves, where these have some in common."""
    apart = selective(m.classes, step.params).merge(m.top[["site"]], on="site")
    if apart.empty:
        return None
    axes = [f"area under the ROC curve, {half} half" for half in ("discovery", "confirmation")]
    return plots.agreement(apart, "discovery", "confirmation", *axes, by="superset")


def direct_table(step: Step, m: Measured) -> pd.DataFrame:
    """What the first of the leading neurons write on each superset's logit."""
    return direct_by_class(m.classes, m.top.head(step.params.cards)).round(3)


def cards(step: Step, m: Measured) -> Figure:
    """Activation of the first of the leading neurons by superset."""
    return cards_figure(by_class(m.activations, m.top.head(step.params.cards), step.params))


def words_table(step: Step, m: Measured) -> pd.DataFrame:
    """Names and tokens of the first of the leading neurons."""
    return card_table(named_prompts(m.activations, step.pairs()), m.tokens, m.top.head(step.params.cards))


def cards_touched(step: Step, m: Measured) -> HTML:
    """A card for each of the first of the leading neurons: what it does, for whom it is active, what it writes."""
    first, prompts = m.top.head(step.params.cards), named_prompts(m.activations, step.pairs())
    active = by_class(m.activations, first, step.params).rename(columns={"superset": "name"})
    direct = direct_by_class(m.classes, first)
    told = selective(m.classes, step.params).set_index("site")
    lead = singles(m.joint, m.sets, step.params)["counterfactual"]
    shown = []
    for card in first.itertuples():
        fall = lead[lead["site"] == card.site]
        facts: dict[str, Any] = {
            "fall of logit_diff when it takes its corrupt value (logits)": [
                f"{row.half} half: {of_row(row)}" for row in fall.itertuples()
            ]
        }
        gist = ""
        if card.site in told.index:
            row = told.loc[card.site]
            gist = f"tells {row['superset']} apart: {row['confirmation']:.2f}"
            sure = "" if row["selective"] else "not "
            facts["area under the ROC curve of the superset it tells best"] = (
                f"{row['superset']}: {row['discovery']:.2f} on the discovery half, {row['confirmation']:.2f} on the "
                f"confirmation half ({sure}selective)"
            )
        words, shares = card_words(prompts, m.tokens, card, CARD_WORDS), singled_out(m.tokens, card)
        facts |= {f"names of {how} activation": words[how] for how in ("highest", "lowest")}
        for what, share in sorted(shares.items(), reverse=True):  # most before least
            facts[what] = f"{', '.join(words[what])} (of the layer's neurons, {share:.0%} single one out as much)"
        writes = direct.loc[card.site].rename("estimate").rename_axis("name").reset_index().assign(low=None, high=None)
        bars = {"activation, confirmation half": active[active["site"] == card.site]}
        bars["what it writes directly on each superset's logit, on that superset's prompts"] = writes
        shown.append(interactive.Card(card.site, gist, facts, bars))
    return interactive.cards("fig-neurons-cards", "neuron", shown, words_table(step, m))


# --- sentences ---


def share_sentence(table: pd.DataFrame, quantity: str) -> str:
    """How much of the MLPs' joint effect the growing sets make up, one direction."""
    own = table[table["quantity"] == quantity]
    rows = {(row.kind, row.n_sites): interval(row.estimate, row.low, row.high) for row in own.itertuples()}
    how = " (replaced by means, which take no side)" if quantity == "damage" else ""
    text = (
        f"The whole MLPs of these layers have a joint {quantity} of {own['mlps'].iloc[0]:.2f} logits{how}; it is the "
    )
    text += "unit of the shares below, and has no interval of its own."
    cells: list[tuple[object, ...]] = []
    for kind, does in (("helping", "help"), ("opposing", "oppose")):
        sizes = [n for name, n in rows if name == kind]
        if not sizes:
            continue
        own_sizes = [n for n in sizes if n in (1, 10, max(sizes))]
        cells += [(f"that {does} the answer on discovery, together", n, rows[kind, n]) for n in own_sizes]
        added = rows[f"{kind}, summed", max(sizes)]
        cells.append((f"that {does} the answer on discovery, single effects added up", max(sizes), added))
        if kind == "helping" and ("random", max(sizes)) in rows:
            cells.append(("random ones that write as much, together", max(sizes), rows["random", max(sizes)]))
    return f"{text}\n\n{tabled(('neurons', 'how many', 'share of it'), cells)}" if cells else text


def enough(table: pd.DataFrame) -> pd.Series:
    """For each number of helping neurons that was tried, whether they make up more than half of the MLPs' effect in
    both directions (lower ends of the intervals), and more of it than random ones."""
    own = table[table["kind"] == "helping"]
    sure = own[(own["low"] > HALF) & (own["above_random"] > 0)].groupby("n_sites")["quantity"].nunique()
    return sure.reindex(sorted(own["n_sites"].unique()), fill_value=0) == len(QUANTITY)


def few(picking: pd.DataFrame, table: pd.DataFrame) -> str:
    """Whether a few neurons carry the MLPs' effect: the fewest that are enough by `picking`, the discovery half, and
    what as many make up on the confirmation half."""
    both = [part[part["kind"] == "helping"] if len(part) else part for part in (picking, table)]
    if any(own.empty or own["low"].isna().any() for own in both):
        return "There are too few quads, or no neurons, to say whether a few neurons carry the MLPs' effect."
    reached, held = enough(picking), enough(table)
    size = int(reached.index[reached].min()) if reached.any() else int(reached.index.max())
    there = both[1][both[1]["n_sites"] == size]
    each = listed(f"{of_row(row)} of the {row.quantity}" for row in there.itertuples())
    each += "" if len(there) == len(QUANTITY) else " (in the other direction the MLPs have no effect to carry)"
    if not reached.any():
        return (
            "That a few neurons carry the MLPs' effect is not supported: on the discovery half no number of them that "
            f"was tried, up to {size}, is shown to make up more than half of it in both directions. On the "
            f"confirmation half those that help make up {each}."
        )
    more = "more than half there, too, and more than" if held.get(size, False) else "not shown to be more than half and"
    more += "" if held.get(size, False) else " more than"
    return (
        f"On the discovery half {counted(size, 'neuron')} {is_are(size)} the fewest, of the numbers tried, that surely "
        "carry more than half of what the MLPs do together. On the confirmation half they make up "
        f"{each}, {more} random neurons that write as much. These are shares of a net effect, which neurons that "
        "oppose the answer have already lowered."
    )


def claimed(table: pd.DataFrame) -> str:
    """The number that page 10 judges, which is another than that of `few`; "" where it was not measured."""
    own = table[(table["kind"] == "helping") & (table[list(CLAIMED)] == pd.Series(CLAIMED)).all(axis=1)]
    return "".join(
        f" Here sets of every size are asked in both directions; the claim of page 10 is about {row.quantity} alone, "
        f"by the {row.n_sites} that help most on discovery: {of_row(row)}."
        for row in own.itertuples()
    )


def asked(frame: pd.DataFrame, chosen: pd.DataFrame) -> str:
    """From how many neurons, and on how many quads, those were picked that are asked."""
    half, first = in_halves(frame)[0]
    return (
        f" Those asked were picked, {len(chosen)} of {len(frame[NEURON].drop_duplicates()):,}, on "
        f"{counted(first['quad_id'].nunique(), f'{half} quad')}: others, missed there, may do more."
    )


def others_sentence(sites: Sequence[Mapping[str, Any]], layers: Sequence[int], params: Neurons) -> list[str]:
    """Which MLPs outside the layers do something, by step 04's `sites`: the slice ends before all is in it."""
    surely = (row for row in sites if row["low"] is not None and row["low"] > 0 and row["p"] <= 1 - params.level)
    others = [row for row in surely if row["component"] == "mlp" and row["layer"] not in layers]
    if not others:
        return []
    most, one = max(others, key=lambda row: row["ratio"]), len(others) == 1
    return [
        f"Not asked about are the neurons of {counted(len(others), 'other MLP')} that alone surely "
        f"recover{'s' * one} a share of the gap on page 04, most of all {most['site']} ({most['ratio']:.2f} over all "
        "supersets; of a single one it may be more)."
    ]


def scope_sentences(frame: pd.DataFrame, chosen: pd.DataFrame) -> tuple[list[str], dict]:
    """What was swept, and how far the effects of single neurons repeat in the other half."""
    halves = [means(part) for _, part in in_halves(frame)]
    both = halves[0].merge(halves[-1], on=NEURON, suffixes=("", "_last"))
    quads = [counted(part["quad_id"].nunique(), f"{half} quad") for half, part in in_halves(frame)]
    layers = sorted(frame["layer"].unique())
    numbers = {"neurons": len(both), "layers": [int(layer) for layer in layers], "pairs": frame["pair_id"].nunique()}
    sentences = [
        f"Each of the {len(both):,} neurons of layer{'s' * (len(layers) > 1)} {listed(layers)} was replaced at `last` "
        f"by its corrupt value in the clean run, and by its clean value in the corrupt run. These are {len(frame):,} "
        f"runs in {counted(numbers['pairs'], 'pair')} ({listed(quads)}), each of which proved its edit."
    ]
    if len(quads) > 1:
        numbers["replication"] = float(tests.spearmanr(both["effect"], both["effect_last"]).statistic)
        picked = both.merge(chosen[NEURON], on=NEURON)
        kept = (np.sign(picked["effect"]) * picked["effect_last"]).sum() / picked["effect"].abs().sum()
        numbers["kept"] = float(kept)
        sentences.append(
            f"The {counted(len(picked), 'neuron')} of largest discovery effect, either way, keep {kept:.0%} of it, "
            "signs counted, in the quads they were not picked on. Over all neurons the mean effects in the two halves "
            f"have a Spearman correlation of {numbers['replication']:.2f} (no interval: a layer's neurons are no "
            "independent draws)."
        )
        totals = {does: total for does, total in added_up(frame).items() if len(total) and total[-1] != 0}
        each = "".join(
            f" Those of the neurons that {does} on discovery reach {total[-1]:+.2f} logits in sum, half of it after "
            f"{1 + int(np.argmax(total / total[-1] >= HALF)):,} of {len(total):,} neurons."
            for does, total in totals.items()
        )
        sentences.append(
            f"The confirmation effects were added up in the order of the discovery effects (sums, no intervals).{each}"
        )
    return sentences, numbers


def top_sentences(tables: dict[str, pd.DataFrame], table: pd.DataFrame, params: Neurons) -> tuple[list[str], dict]:
    """The top neurons in more pairs: their effects, and how many are significant in both halves, by ablation."""
    lead, last = tables["counterfactual"], reported(table)
    own = reported(lead).sort_values("rank")
    first, *others = own.head(6).itertuples()
    pairs, quads = (last[f"{name}_id"].nunique() for name in ("pair", "quad"))
    sample = f"{counted(pairs, 'pair')} of {counted(quads, 'quad')}, {last['half'].iloc[0]} half"
    counts = {kind: significant(rows, params) for kind, rows in tables.items()}
    words = {
        "counterfactual": "their corrupt value",
        "clean": "their clean value in the corrupt run",
        "mean": "the mean",
    }
    sentences = [
        f"The neuron of largest effect, picked on discovery, is {first.site}: where its corrupt value replaces it, "
        f"logit_diff falls by {of_row(first)} ({in_logits(own, 'familywise intervals')}; {sample})."
        + f" Next come {listed(row.site for row in others)}."
        * bool(others),
        "Of the leading neurons, significant familywise with the same sign in both halves are"
        + ";".join(f" {both_ways(sign)}, under {words[kind]}" for kind, sign in counts.items())
        + "."
        if lead["low"].notna().all()
        else f"There are too few quads to say of any of the {len(own)} neurons that it is significant.",
    ]
    return sentences, {"significant": {kind: sign.to_dict() for kind, sign in counts.items()}}


def both_ways(sign: pd.Series) -> str:
    """How many neurons of `significant` help the answer and how many oppose it."""
    counts = {"help": int((sign > 0).sum()), "oppose": int((sign < 0).sum())}
    each = (f"{number_word(number)} that {does}{'s' * (number == 1)}" for does, number in counts.items() if number)
    return " and ".join(each) or "no neurons"


def direct_sentence(frame: pd.DataFrame, chosen: pd.DataFrame) -> str:
    """How much of the top neurons' effect is direct, by layer."""
    last = reported(frame)
    own = means(last).merge(chosen[NEURON], on=NEURON)
    each = [
        (layer, len(rows), f"{rows['direct'].sum():+.2f}", f"{rows['effect'].sum():+.2f}")
        for layer, rows in own.groupby("layer")
    ]
    return (
        "What the top neurons write directly on logit_diff, without what later layers make of it, and their whole "
        "effect: sums by layer, without intervals (logits, positive: for the answer; "
        f"{counted(last['quad_id'].nunique(), 'quad')}, {last['half'].iloc[0]} half).\n\n"
        + tabled(("layer", "neurons", "written directly", "whole effect"), each)
    )


def class_sentence(told: pd.DataFrame, chance: pd.DataFrame, chosen: pd.DataFrame, quads: int) -> tuple[str, dict]:
    """How many neurons tell a superset from the others, among all and among the top; and whether they promote it."""
    own = told.merge(chosen[NEURON], on=NEURON)
    numbers = {"selective": int(told["selective"].sum()), "selective_chance": int(chance["selective"].sum())}
    numbers |= {"top_selective": int(own["selective"].sum())}
    for name, rows in (("area", told), ("top_area", own)):
        numbers[name] = float((rows["confirmation"] - 0.5).abs().median())
    higher = own[own["confirmation"] > 0.5]
    for name in ("promoted", "suppressed"):
        numbers[name] = int((higher["superset"] == higher[name]).sum())
    numbers["higher"] = len(higher)
    if reason := stats.too_few(quads, "quads"):
        return f"How many neurons are selective for a superset was not tested ({reason}).", numbers
    most = ", so many that this singles none out" if numbers["selective"] > len(told) / 2 else ""
    return (
        f"By its activation at `last`, {numbers['selective']:,} of {len(told):,} neurons tell a superset from the "
        f"others{most}; dealing out each half's labels anew gives {numbers['selective_chance']:,}. That is counted "
        "where a neuron is significant over neurons and supersets on discovery, and again on confirmation with the "
        f"same side. It is so of {numbers['top_selective']} of the {counted(len(own), 'top neuron')}. The area's "
        f"median distance from one half is {numbers['area']:.2f} over all neurons and {numbers['top_area']:.2f} over "
        f"the top ones (medians, no intervals). Higher for their superset {is_are(numbers['higher'])} "
        f"{counted(numbers['higher'], 'top neuron')}, of which {numbers['promoted']} "
        f"{'raises' if numbers['promoted'] == 1 else 'raise'} its own logit most, of all supersets. It is lowered most "
        f"by {numbers['suppressed']}.",
        numbers,
    )


def helps(row: pd.Series) -> str:
    """Whether a neuron helps the answer or opposes it, where its interval lies off zero; its effect (logits)."""
    low, high = (np.nan if row[end] is None else float(row[end]) for end in ("low", "high"))
    does = "helps" if low > 0 else "opposes" if high < 0 else "is not shown to help or oppose"
    does = "is measured in too few quads to be said to help or oppose" if np.isnan(low) else does
    return f"{does} the answer (effect {interval(row['estimate'], low, high)} logits)"


def card_sentence(
    told: pd.DataFrame, words: pd.DataFrame, lead: pd.DataFrame, plural: Callable[[str], str], count: int = 3
) -> str:
    """The first cards in words."""
    rows = told.set_index("site").reindex(words.index[:count]).dropna(subset="superset")
    if rows.empty:
        return "No superset is in both halves, so that none is said of single neurons."
    effect = reported(lead).set_index("site")
    each = [
        f"{site} {helps(effect.loc[site])}; it is {'higher' if row.mean > row.mean_others else 'lower'} for "
        f"{plural(row.superset)}. It writes most on {words.loc[site, 'writes most on']}, and least on "
        f"{words.loc[site, 'writes least on']}."
        for site, row in zip(rows.index, rows.itertuples(), strict=True)
    ]
    return (
        "\n\n".join(each)
        + "\n\nIn brackets behind the words: how many of the layer's neurons single out a word as much."
    )


def part(step: Step, m: Measured) -> dict[str, Any]:
    """Sentences, figures for the landing page, and numbers of the part on single neurons."""
    params, alone = step.params, singles(m.joint, m.sets, step.params)
    carried = shares(m.joint, m.sets, params)
    scope, numbers = scope_sentences(m.neurons, m.top)
    scope += others_sentence((step.find("sufficiency") or {}).get("sites", ()), numbers["layers"], params)
    leading, sure = top_sentences(alone, m.joint, params)
    joint = [share_sentence(carried, q) for q in carried.get("quantity", pd.Series(dtype=str)).unique()]
    apart, chance = (selective(m.classes, params, column) for column in ("auc", "auc_chance"))
    quads = int(in_halves(m.classes)[0][1].groupby("superset")["n"].first().sum() / 2)
    about_class, counted = class_sentence(apart, chance, m.top, quads)
    verdict = "The MLPs of these layers have no joint effect to be carried."
    if joint:
        verdict = few(discovery_shares(m.joint, m.sets, params), carried) + claimed(carried) + asked(m.neurons, m.top)
    ranked = m.top.merge(apart[["site", "superset", "promoted", "discovery", "confirmation"]], on="site")
    by_kind = {kind: reported(rows)[["site", "estimate", "low", "high", "p", "ratio"]] for kind, rows in alone.items()}
    figures = {"top": ranked_figure(step, m), "joint": joint_figure(step, m)}
    figures = {name: figure for name, figure in figures.items() if figure}
    last = card_sentence(apart, words_table(step, m), alone["counterfactual"], params.topic.plural)
    return {
        "sentences": [*scope, *leading, *joint, verdict, direct_sentence(m.neurons, m.top), about_class, last],
        "headline": [verdict, leading[1]],
        "figures": figures,
        "captions": {name: CAPTIONS[name] for name in figures},
        "neurons": numbers
        | sure
        | counted
        | {"top": ranked.to_dict("records"), "shares": carried.to_dict("records")}
        | {"effects": {kind: rows.to_dict("records") for kind, rows in by_kind.items()}},
    }
