"""What the circuit at the last token and gradient attribution come to: numbers, figures and sentences.

1. `tested_numbers`: is a circuit faithful, necessary, minimal and complete? `circuit_numbers`: is that at the last
   token better than other orders of sites?
2. `compared`: how gradient attribution ranks sites and queries beside the exact effects; `cost`: what it saves.
3. A function per figure; sentences; `part` hands on all of it.

Numbers are `estimate`, `low`, `high` (None where there are too few quads). Shares are of what the model has over the
circuit without sites, F(model) - F(nothing); all are of the confirmation half unless their name says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure
from scipy import stats as scipy_stats

from lib import stats
from lib.effects import columns, familywise, in_halves, is_loss, named, reported
from lib.hooks import site_name
from pipeline.step import Step
from report import plots, site_tables
from report.words import capital, counted, is_are, listed, number_word, of_row, sites, tabled, with_ends
from steps.story import measure
from steps.story.measure import Everywhere, Measured, Story

METHODS = {"atp": "AtP", "atp_qk": "AtP with QK fix", "grad_drop": "AtP with QK fix and GradDrop"}
ORDERS = {"circuit": "the search", "recovery": "recovery (step 04)"}
ORDERS |= {name: name for name in ("damage", "attribution", "random")}
ENDS = ["estimate", "low", "high"]
NAMED = 20  # that a sentence lists at most
LEFT = 0.2  # share that the model must keep without a subset, for a circuit to be seen to do as it does
CAPTIONS = {
    "circuit": "Faithfulness against the number of sites kept at the last token when all else there is resampled, in "
    "the order of the search, of single effects and of attribution, and at random; confirmation half, studentised "
    "bootstrap intervals over quads.",
    "attribution": "Attribution patching against the exact cost of replacing each head and MLP at the last token by "
    "its corrupt value (logits, mean over pairs).",
}


# --- the circuit --------------------------------------------------------------------------------------------------


def shown(m: Measured | Everywhere) -> pd.DataFrame:
    """The circuits' rows that the page is about: confirmation half, the ablation of the search."""
    return reported(m.tested[m.tested["ablation"] == m.ablation])


def sums(frame: pd.DataFrame) -> pd.DataFrame:
    """F(test) - F(nothing) of each quad (rows) and test (columns), summed over the quad's pairs."""
    wide = frame.pivot(index=["quad_id", "pair_id"], columns="test", values="logit_diff")
    return wide.sub(wide["nothing"], axis=0).groupby("quad_id").sum()


def shares(values: pd.DataFrame, whole: pd.Series, params: Story) -> pd.DataFrame:
    """Each column's share of what the model has over nothing: `estimate`, `low`, `high`."""
    if values.empty or not (whole.sum() > 0 and is_loss(whole, params)):
        return pd.DataFrame(np.nan, index=values.columns, columns=ENDS)
    spans = stats.ratio_intervals(values.to_numpy(), whole.to_numpy(), params)
    return pd.DataFrame(columns(spans), index=values.columns)


def share(frame: pd.DataFrame, test: str, params: Story) -> dict[str, float] | None:
    """What one test keeps, None where it was not tested."""
    if frame.empty:
        return None
    wide = sums(frame)
    return shares(wide[[test]], wide["everything"], params).iloc[0].to_dict()


def by_order(wide: pd.DataFrame) -> pd.DataFrame:
    """`sums` of the circuits of each order (random circuits of one size: their mean), columns (order, size)."""
    names = rf"^({'|'.join(ORDERS)}) (\d+)"
    parts = wide.columns.str.extract(names).set_index(wide.columns).dropna()
    keys = [parts[0].to_dict(), parts[1].astype(int).to_dict()]
    return wide[parts.index].T.groupby(keys).mean().T


def curves(frame: pd.DataFrame, params: Story) -> pd.DataFrame:
    """Faithfulness against size for every order."""
    wide = sums(frame)
    out = shares(by_order(wide), wide["everything"], params).rename_axis(["order", "n_sites"]).reset_index()
    return out.assign(name=out["order"].map(ORDERS)).sort_values("order", key=lambda order: order.map([*ORDERS].index))


def areas(frame: pd.DataFrame, params: Story) -> pd.DataFrame:
    """The area under faithfulness against size for every order, up to the size that the search reached (mean
    faithfulness over these sizes, from nothing on; trapezoids), with the circuit's area less each other's."""
    wide = sums(frame)
    whole, means, out = wide["everything"], by_order(wide), {}
    end = max(means["circuit"])
    for order in [name for name in ORDERS if name in means]:
        sums_by_size = means[order].loc[:, lambda table: table.columns <= end]
        points = np.concatenate([np.zeros((len(sums_by_size), 1)), sums_by_size.to_numpy()], axis=1)
        out[order] = np.trapezoid(points, np.array([0, *sums_by_size.columns]) / sums_by_size.columns.max(), axis=1)
    table = pd.DataFrame(out, index=wide.index)
    minus = shares(table.rsub(table["circuit"], axis=0), whole, params).add_prefix("minus_")
    return shares(table, whole, params).join(minus).rename_axis("order").reset_index()


def at_size(frame: pd.DataFrame, params: Story) -> list[dict[str, Any]]:
    """Faithfulness of as many sites in every order as the search took: `order`, `size`, `estimate`, `low`, `high`, and
    the search's less it (`minus_*`)."""
    wide = sums(frame)
    means = by_order(wide)
    size = max(means["circuit"])
    own = means.xs(size, axis=1, level=1)
    table = shares(own, wide["everything"], params)
    minus = shares(own.rsub(own["circuit"], axis=0), wide["everything"], params).add_prefix("minus_")
    return table.join(minus).assign(size=size).rename_axis("order").reset_index().to_dict("records")


def members(frame: pd.DataFrame, params: Story) -> pd.DataFrame:
    """What the removal of each member costs the circuit (logits), all together: familywise intervals and p values."""
    tested = frame[frame["test"].str.startswith("member ") | (frame["test"] == "circuit")]
    wide = tested.pivot(index=["quad_id", "pair_id"], columns="test", values="logit_diff").groupby("quad_id").mean()
    cost = wide.drop(columns="circuit").rsub(wide["circuit"], axis=0)
    out = pd.DataFrame(familywise(cost.to_numpy(), params, "greater", params.floor))
    out = out.assign(site=cost.columns.str.removeprefix("member "))
    mean = sums(frame)["everything"].sum() / (frame["test"] == "everything").sum()
    out = out.assign(share=out["estimate"] / mean, matters=out["low"].astype(float) > params.floor)
    return out.sort_values("estimate", ascending=False, ignore_index=True)


def without_subsets(frame: pd.DataFrame, params: Story) -> pd.DataFrame:
    """F(C without K) (`circuit`) and F(model without K) (`model`) for every sampled K, and their difference with an
    interval that holds for all K together; shares. Empty where there are no subsets, or the model has nothing."""
    wide = sums(frame)
    numbers = [name.removeprefix("kept ") for name in wide if name.startswith("kept ")]
    whole = wide["everything"]
    if not numbers or not whole.sum() > 0:
        return pd.DataFrame()
    kept, left = (wide[[f"{which} {number}" for number in numbers]].to_numpy() for which in ("kept", "model"))
    table = pd.DataFrame(columns(stats.simultaneous(kept - left, params))).astype(float) / whole.mean()
    return table.assign(circuit=kept.sum(0) / whole.sum(), model=left.sum(0) / whole.sum())


def incompleteness(table: pd.DataFrame, subsets: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The largest |difference| of `without_subsets`, between the largest lower and upper end of all of them."""
    if table.empty:
        return dict.fromkeys([*ENDS, "model"]) | {"subsets": 0, "worst": []}
    size, low, high = table["estimate"].abs(), table["low"], table["high"]
    ends = {"low": np.maximum(0, np.maximum(low, -high)).max(), "high": np.maximum(-low, high).max()}
    ends = dict.fromkeys(ends) if low.isna().any() else ends
    about = {"subsets": len(table), "worst": list(subsets[int(size.argmax())]), "model": table["model"].max()}
    return {"estimate": size.max(), **ends, **about}


def leads(rows: pd.DataFrame, test: str, params: Story) -> dict[str, float | None]:
    """Share of pairs in which the answer leads the candidates in a test, over quads."""
    own = rows[rows["test"] == test]
    hits = (own["metric"] > 0).groupby(own["quad_id"]).agg(["sum", "count"])
    span = stats.proportion_interval(hits["sum"], hits["count"], params)
    return {end: getattr(span, end) for end in ENDS}


def tested_numbers(m: Measured | Everywhere, params: Story) -> dict[str, Any]:
    """Is a circuit faithful, necessary, minimal and complete? `why` alone where there is none."""
    sites, path = measure.circuit_of(m.search), measure.grown(m.search)
    if not sites:
        return {"sites": [], "why": "the model keeps nothing over the resampled run, so there is nothing to search for"}
    rows, last = shown(m), reported(m.tested)
    first = in_halves(m.tested[m.tested["ablation"] == m.ablation])[0][1]
    table, subsets = members(rows, params), without_subsets(rows, params)
    chosen = m.search[m.search["chosen"]]
    grown = chosen.loc[chosen["phase"] == "grow", "faithfulness"].iloc[-1]
    return {
        "sites": sites,  # in order of joining
        "size": len(sites),
        "grown": len(path),  # size before pruning
        "searched": grown,  # faithfulness that the search saw, before pruning
        "reached": bool(grown >= params.faithful_share),
        "ablation": m.ablation,
        "quads": rows["quad_id"].nunique(),
        "faithfulness": share(rows, "circuit", params),  # kept when all else is ablated
        "faithfulness_discovery": share(first, "circuit", params),
        "faithfulness_counterfactual": share(last[last["ablation"] != m.ablation], "circuit", params),
        "necessity": share(rows, "necessity", params),  # kept by the model when the circuit is ablated; 0 is best
        "leads": leads(rows, "circuit", params),  # share of pairs in which the answer leads under the circuit, and
        "leads_untouched": leads(rows, "everything", params),  # in the model
        "members": table.to_dict("records"),
        "weakest": table.iloc[-1].to_dict(),
        "failing": table.loc[~table["matters"], "site"].tolist(),
        "incompleteness": incompleteness(subsets, m.subsets),
    }


def circuit_numbers(m: Measured, slice_: Sequence[str], params: Story) -> dict[str, Any]:
    """The numbers of the circuit at the last token; `slice_` is the slice of step 04."""
    numbers = tested_numbers(m, params)
    if sites := numbers["sites"]:
        both = [site for site in sites if site in slice_]
        numbers["searched"] = m.search.loc[m.search["chosen"], "faithfulness"].iloc[-1]  # that of what is left
        numbers["areas"] = areas(shown(m), params).to_dict("records")
        numbers["at_size"] = at_size(shown(m), params)
        numbers["overlap"] = {"sites": both, "jaccard": site_tables.jaccard(sites, slice_)}
    return numbers


# --- attribution --------------------------------------------------------------------------------------------------


def beside_exact(gradients: pd.DataFrame, exact: pd.DataFrame) -> pd.DataFrame:
    """Every method's estimate beside the exact effect, with `nodes` (sites or queries) and the node's name `site`."""
    both = gradients.merge(exact)
    query = both["component"] == "query"
    names = named(both.assign(component=both["component"].replace("query", "head")))
    return both.assign(nodes=np.where(query, "queries", "sites"), site=names)


def node_means(both: pd.DataFrame) -> pd.DataFrame:
    """Means over pairs (logits), by nodes and site."""
    return both.groupby(["nodes", "site"], sort=False)[[*METHODS, "exact"]].mean()


def compared(both: pd.DataFrame, params: Story) -> pd.DataFrame:
    """How each method agrees with the exact effects (`beside_exact`), for sites and for queries.

    `estimate`, `low`, `high`: Spearman; `kendall`; `top10`, `top20`: share of the exact top that is found; `signs`:
    share right; `missed`: names of the exact top 10 outside the estimated top 20.
    """
    rows, means = [], node_means(both)
    for (nodes, part), method in product(both.groupby("nodes", sort=False), METHODS):
        if nodes == "sites" and method == "atp_qk":
            continue  # the fix is about queries
        truth, guess = means.loc[nodes, "exact"], means.loc[nodes, method]
        order, top = truth.abs().nlargest(20).index, guess.abs().nlargest(20).index
        row = {"nodes": nodes, "method": method, "low": None, "high": None, "signs": None}
        if method == "grad_drop":  # unsigned
            truth = truth.abs()
            row["estimate"] = scipy_stats.spearmanr(guess, truth).statistic
        else:
            wide = [part.pivot_table(index="quad_id", columns="site", values=name) for name in ("exact", method)]
            span = site_tables.rank_agreement(*(table.to_numpy() for table in wide), params)
            row |= {end: getattr(span, end) for end in ENDS}
            row["signs"] = float((np.sign(guess) == np.sign(truth))[order].mean())
        row["kendall"] = scipy_stats.kendalltau(guess, truth).statistic
        row["top10"] = len({*order[:10]} & {*top[:10]}) / min(10, len(order))
        row["top20"] = len({*order} & {*top}) / len(order)
        rows.append(row | {"missed": [site for site in order[:10] if site not in top]})
    return pd.DataFrame(rows)


def cost(n_layers: int, n_heads: int, tokens: float) -> pd.DataFrame:
    """What each method runs for a pair beside the two plain runs, in tokens x layers (a backward pass counts as a
    forward pass), and how often that goes into the exact sweep of all heads and MLPs; `with_runs` counts those too."""
    layers = {
        "exact": (n_heads + 1) * n_layers * (n_layers + 1) / 2,
        "atp": 2 * n_layers,
        "atp_qk": 5 * n_layers,  # the corrupt queries, and two rows under them
        "grad_drop": 3 * n_layers + 2 * n_layers * (1 + n_layers),
    }
    plain = 2 * tokens * n_layers
    out = pd.DataFrame({"method": list(layers), "token_layers": list(layers.values())})
    ratios = [(layers["exact"] + extra) / (out["token_layers"] + extra) for extra in (0, plain)]
    return out.assign(ratio=ratios[0], with_runs=ratios[1])


def in_placebo(m: Measured, params: Story) -> list[dict[str, Any]]:
    """What the circuit keeps of the gap in the placebo pairs of each attribute (`estimate`), and that over what it
    keeps in the task's pairs (`quotient_*`), all else from the corrupt prompt; confirmation half."""
    rows, task = [], reported(m.tested)
    own = sums(task[task["ablation"] == "counterfactual"])
    for attribute, frame in () if m.placebo is None else m.placebo.groupby("attribute", sort=False):
        half = frame[frame["half"] == task["half"].iloc[0]]
        wide = sums(half) if len(half) else own.iloc[:0]
        below = (wide["everything"], own["everything"], own["circuit"])  # denominators of the shares and their quotient
        if not all(len(loss) and loss.sum() > 0 and is_loss(loss, params) for loss in below):
            continue
        one, other = (stats.Shares(part[["circuit"]].values, part[["everything"]].values) for part in (wide, own))
        numbers = columns(stats.ratio_intervals(*one, params))
        numbers |= columns(stats.quotients(one, other, params), "quotient_")
        rows.append({name: value[0] for name, value in numbers.items()} | {"attribute": attribute, "quads": len(wide)})
    return rows


def placebo_sentences(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether the circuit is about supersets."""
    return [
        f"Placebo: in pairs of one superset whose names differ in {row['attribute']}, the circuit at the "
        f"last token keeps {with_ends(row)} of the gap between that attribute's answers ({row['quads']} quads). That "
        f"is "
        f"{with_ends(row, prefix='quotient_')} times as much as of the superset gap, all else there from the corrupt "
        "prompt."
        for row in found
    ]


# --- figures ------------------------------------------------------------------------------------------------------


def circuit_curves(step: Step, m: Measured | None) -> Figure | None:
    """Faithfulness against size, a line for each order."""
    if m is None:
        return None
    share = step.params.faithful_share
    return plots.slice_curve(curves(shown(m), step.params), share, by="name", panel=None, ylabel="faithfulness (share)")


def circuit_members(step: Step, m: Measured | None) -> Figure | None:
    """What each member's removal costs, where there are several."""
    if m is None or len(measure.circuit_of(m.search)) < 2:
        return None
    return plots.ranked_sites(members(shown(m), step.params).assign(half="confirmation"), "cost of removal (logits)")


def circuit_completeness(step: Step, m: Measured | None) -> Figure | None:
    """Circuit against model without each subset, where there are subsets."""
    table = pd.DataFrame() if m is None else without_subsets(shown(m), step.params)
    if table.empty:
        return None
    return plots.agreement(table, "model", "circuit", "F(model without K) (share)", "F(C without K) (share)")


def attribution(m: Measured | None) -> Figure | None:
    """AtP against the exact effects of heads and MLPs; the largest are named."""
    if m is None:
        return None
    means = node_means(beside_exact(m.gradients, m.exact)).loc["sites"].reset_index()
    largest = means.loc[means["exact"].abs().nlargest(8).index, "site"].tolist()
    return plots.agreement(means, "exact", "atp", "exact (logits)", "AtP (logits)", named=largest)


# --- sentences ----------------------------------------------------------------------------------------------------


def verdict(row: Mapping[str, Any], above: float | None = None, below: float | None = None) -> str:
    """Whether an interval lies beyond a bound."""
    low, high = row["low"], row["high"]
    if low is None or high is None or np.isnan(low) or np.isnan(high):
        return "too few quads to say more"
    met = low > above if above is not None else high < below
    return "shown" if met else "not shown"


def tested_sentences(found: Mapping[str, Any], params: Story, where: str) -> list[str]:
    """Whether a circuit is faithful, necessary, minimal and complete; what is resampled `where` the words say."""
    weak, worst, failing = found["weakest"], found["incompleteness"], found["failing"]
    named = sites(failing) if len(failing) < NAMED else f"{len(failing)} of {len(found['members'])} members"
    named = (
        f"Not shown to cost more than zero (familywise): {named}" if failing else "Every one is shown to cost something"
    )
    few = weak["low"] is None or np.isnan(weak["low"])
    named = "There are too few quads to say which costs more than zero" if few else named
    some = len(found["members"]) < found["size"]
    which = f" (of the last {len(found['members'])} in their order)" if some else ""
    out = [
        f"Faithfulness, that it keeps {params.faithful_share:g} or more when all else {where} is resampled, is "
        f"{verdict(found['faithfulness'], above=params.faithful_share)}: {with_ends(found['faithfulness'])} on the "
        f"confirmation half ({found['quads']} quads). On the discovery half it is "
        f"{with_ends(found['faithfulness_discovery'])}, with all else from the corrupt prompt "
        f"{with_ends(found['faithfulness_counterfactual'])}. The answer leads the candidates in "
        f"{with_ends(found['leads'])} of the pairs, in the model itself in {with_ends(found['leads_untouched'])}.",
        "Necessity, that less than half is left with the circuit resampled and all else intact, is "
        f"{verdict(found['necessity'], below=0.5)}: the model keeps {with_ends(found['necessity'])}.",
        f"Minimality: {named}. Removed one by one{which}, {sites([weak['site']])} costs least: {with_ends(weak, 3)} "
        f"logits, {weak['share']:.0%} of what the model has.",
    ]
    if worst["subsets"]:
        without = f"; K = {sites(worst['worst'])}" if len(worst["worst"]) < NAMED else ""
        nothing = ": nothing is set against nothing, so this shows no completeness" if worst["model"] < LEFT else ""
        out.append(
            f"Completeness: the circuit without K and the model without K are at most {with_ends(worst)} apart, over "
            f"{worst['subsets']} random subsets K (share of what the model has{without}). Without them the model "
            f"itself keeps at most {worst['model']:.2f} (the largest of several estimates, no interval){nothing}."
        )
    return out


def circuit_sentences(found: Mapping[str, Any], params: Story) -> list[str]:
    """What the circuit at the last token is, how it does in its tests, and how it compares with other orders."""
    if not found["sites"]:
        return [f"No circuit was searched for: {found['why']}."]
    kind = {"resample": "another prompt's values", "counterfactual": "the corrupt prompt's values"}[found["ablation"]]
    less = "" if found["reached"] else f", which is less than the {params.faithful_share:g} asked for"
    spare = found["grown"] - found["size"]
    pruned = f"{capital(number_word(spare))} more {'was' if spare == 1 else 'were'} pruned"
    out = [
        f"The circuit at the last token has {counted(found['size'], 'site')}, in the order in which they joined: "
        f"{sites(found['sites'])}. {pruned}. On the pairs that it was searched on it keeps {found['searched']:.2f} of "
        f"what the model has when everything else there has {kind}{less} (no interval: they were picked on these "
        "pairs).",
        *tested_sentences(found, params, "at the last token"),
    ]
    table, over = {row["order"]: row for row in found["areas"]}, found["overlap"]
    circuit = table.pop("circuit", None)
    if circuit is not None:
        each = [(ORDERS[order], with_ends(row), with_ends(row, prefix="minus_")) for order, row in table.items()]
        out.append(
            "Area under faithfulness at the last token against size, up to the size that was grown; sites in other "
            "orders beside those of the search.\n\n"
            + tabled(("order", "area", "less by"), [("the search", with_ends(circuit), ""), *each])
        )
        out.append(at_size_sentence(found["at_size"]))
    out.append(
        f"Of the critical slice of step 04, {sites(over['sites'])} {is_are(len(over['sites']))} in the circuit "
        f"({over['jaccard']:.0%} of the sites in either). Both were picked by effect on the same half, so that they "
        "overlap is no second finding."
    )
    return out


def at_size_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """What as many sites keep in every order as the search took."""
    own = next(row for row in rows if row["order"] == "circuit")
    others = [row for row in rows if row["order"] != "circuit"]
    each = [(ORDERS[row["order"]], with_ends(row), with_ends(row, prefix="minus_")) for row in others]
    kinds: dict[str, list[str]] = {"ahead of": [], "behind": [], "not shown to differ from": []}
    for row in others:
        ends = (row["minus_low"], row["minus_high"])
        low, high = (np.nan if end is None else end for end in ends)
        kind = "ahead of" if low > 0 else "behind" if high < 0 else "not shown to differ from"
        kinds[kind].append(ORDERS[row["order"]])
    said = listed(f"{kind} {listed(names)}" for kind, names in kinds.items() if names)
    so = f" At this size the search is {said} (each interval by itself)." if others else ""
    if pd.isna(own["low"]):
        so = " There are too few quads to say whether the search is ahead at this size." * bool(others)
    table = tabled(("order", "keeps", "the search less it"), each)
    return (
        f"Of {counted(own['size'], 'site')}, as many as were grown, the search's keep {with_ends(own)}.{so}"
        + f"\n\n{table}" * bool(each)
    )


def attribution_sentences(table: pd.DataFrame, costs: pd.DataFrame, pairs: int) -> list[str]:
    """How much of the exact ranking attribution finds, at what cost."""
    rows = []
    for row in table.itertuples():
        unsigned = row.signs is None or np.isnan(row.signs)
        ranks = (of_row(row), f"{row.kendall:.2f}", f"{row.top10:.0%}", f"{row.top20:.0%}")
        signs = "no sign" if unsigned else f"{row.signs:.0%}"
        rows.append((f"{METHODS[row.method]} for {row.nodes}", *ranks, signs, ", ".join(row.missed) or "none"))
    columns = ("method", "Spearman", "Kendall", "finds of the top 10", "finds of the top 20")
    columns += ("right sign in the top 20", "of the top 10, its top 20 missed")
    cheap = costs.set_index("method")
    steps = cheap["token_layers"]
    return [
        f"How attribution ranks the nodes beside their exact effects ({counted(pairs, 'pair')}; a method without a "
        f"sign is set against the sizes).\n\n{tabled(columns, rows)}",
        f"The exact sweep takes {cheap.loc['atp', 'ratio']:.0f} times as much as AtP beside the two plain runs, and "
        f"{cheap.loc['atp', 'with_runs']:.1f} times with these, which both need. In tokens x layers a pair, AtP takes "
        f"{steps['atp']:.0f} and the exact sweep {steps['exact']:.0f}. GradDrop takes {steps['grad_drop']:.0f}.",
    ]


# --- what is handed on --------------------------------------------------------------------------------------------


def part(step: Step, m: Measured) -> dict[str, Any]:
    """What this part of step 10 hands on (see `report.words.joined`)."""
    params = step.params
    numbers = circuit_numbers(m, [site_name(*site) for site in step.slice()], params)
    methods = compared(beside_exact(m.gradients, m.exact), params)
    costs = cost(step.n_layers, step.n_heads, m.gradients["tokens"].mean())
    placebo = in_placebo(m, params)
    return {
        "circuit": numbers | {"placebo": placebo},
        "attribution": {"methods": methods.to_dict("records"), "cost": costs.to_dict("records")},
        "sentences": [
            *circuit_sentences(numbers, params),
            *placebo_sentences(placebo),
            *attribution_sentences(methods, costs, len(measure.attributed_pairs(step))),
        ],
        "figures": {"circuit": circuit_curves(step, m), "attribution": attribution(m)},
        "captions": CAPTIONS,
        "headline": [],
    }


def statement(step: Step, part: Mapping[str, Any] | None) -> Markdown | None:
    """How long attribution and the exact sweep took, and every sentence of `part`."""
    if part is None:
        return None
    methods, exact = (step.metadata(table)["seconds"] for table in (measure.ATTRIBUTION, measure.EXACT))
    pairs = len(measure.attributed_pairs(step))
    took = (
        f"On the machine of the run record, attribution by all three methods took {methods:.0f} s for "
        f"{pairs} pairs, the exact sweep of sites and queries {exact:.0f} s."
    )
    return Markdown("\n\n".join([took, *part["sentences"]]))
