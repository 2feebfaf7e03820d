"""What the minimal circuit and gradient attribution come to: tables, numbers and sentences, without the model.

The numbers that a page hands on (`numbers`), each of `estimate`, `low`, `high` (None where there are too few quads);
shares are of what the model has over the circuit without sites, F(model) - F(nothing), confirmation half:

circuit      `sites` (names in order of joining), `size`, `grown` (size before pruning), `searched` (faithfulness that
             the search saw), `reached` (whether it got to the share asked for); `why` alone where there is no circuit.
             `faithfulness`, `faithfulness_discovery`: what the circuit keeps when all else is resampled (share).
             `faithfulness_counterfactual`: the same when all else is taken from the pair's corrupt prompt.
             `necessity`: what the model keeps when the circuit is resampled (share; 0 is best).
             `leads`: share of pairs in which the answer leads the candidates under the circuit alone.
             `members`: per site `site`, `estimate`, `low`, `high`, `p` (what its removal from the circuit costs,
             logits, all members together), `share`, `matters`. `weakest` is the member of least cost; `failing` names
             those whose cost is not shown.
             `incompleteness`: the largest |F(C without K) - F(model without K)| over the sampled K (share), `subsets`
             how many, `worst` its members.
             `areas`: per order (`circuit`, `recovery`, `damage`, `attribution`, `random`) the area under faithfulness
             against size, and `minus` the circuit's area less that order's.
             `overlap`: with the slice of step 04, `sites` in both, `jaccard`, `p` by chance.
attribution  `methods`: rows of `nodes` (sites, queries), `method` (atp, atp_qk, grad_drop), `estimate`, `low`, `high`
             (Spearman), `kendall`, `top10`, `top20` (share of the exact top that is found), `signs` (share right),
             `missed` (names of the exact top 10 outside the estimated top 20).
             `cost`: rows of `method`, `token_layers` per pair beside the two plain runs, `ratio` (exact over it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from lib import stats
from lib.effects import HALVES, columns, familywise, named
from report.words import interval, listed
from steps.generality.page import jaccard
from steps.story.circuits import Circuit
from steps.story.measure import Story

METHODS = {"atp": "AtP", "atp_qk": "AtP with QK fix", "grad_drop": "AtP with QK fix and GradDrop"}
ORDERS = {
    "circuit": "the search", "recovery": "recovery (step 04)", "damage": "damage", "attribution": "attribution",
    "random": "random",
}  # fmt: skip


# --- the plan -----------------------------------------------------------------------------------------------------


def grown(search: pd.DataFrame) -> list[str]:
    """Sites in the order in which they joined."""
    return search.loc[search["chosen"] & (search["phase"] == "grow"), "site"].tolist()


def circuit_of(search: pd.DataFrame) -> list[str]:
    """The circuit: what was grown, less what was pruned."""
    gone = set(search.loc[search["chosen"] & (search["phase"] == "prune"), "site"])
    return [site for site in grown(search) if site not in gone]


def subsets_of(sites: Sequence[str], count: int, rng: np.random.Generator) -> list[tuple[str, ...]]:
    """Random subsets of the circuit, every member in each with probability one half; none empty or the whole."""
    if len(sites) < 2:
        return []
    drawn = [rng.permutation(len(sites))[: 1 + rng.binomial(len(sites) - 2, 0.5)] for _ in range(count)]
    return [tuple(sites[index] for index in sorted(own)) for own in drawn]


def ranked(table: pd.DataFrame, value: str, sites: Sequence[str]) -> list[str]:
    """Those of the sites that are in a table by their mean on the discovery half (or the only one), largest first."""
    own = table[table["half"] == (HALVES[0] if (table["half"] == HALVES[0]).any() else table["half"].iloc[0])]
    own = own.assign(site=named(own))
    return own[own["site"].isin(sites)].groupby("site")[value].mean().sort_values(ascending=False).index.tolist()


def orders_of(
    exact: pd.DataFrame, gradients: pd.DataFrame, recovery: pd.DataFrame, sites: Sequence[str]
) -> dict[str, list[str]]:
    """The sites by single effects: recovery of step 04 (where it left a table), exact damage and attribution."""
    out = {"damage": ranked(exact, "exact", sites), "attribution": ranked(gradients, "atp", sites)}
    if recovery.empty:
        return out
    rise = recovery["logit_diff_after"] - recovery["logit_diff_before"]
    return {"recovery": ranked(recovery.assign(rise=rise), "rise", sites)} | out


def sizes_of(limit: int, own: int) -> list[int]:
    """Sizes at which circuits are compared."""
    return sorted({1, 2, own, *range(max(1, limit // 10), limit + 1, max(1, limit // 10))})


def tests_of(
    search: pd.DataFrame,
    orders: Mapping[str, Sequence[str]],
    everything: Sequence[str],
    subsets: Sequence[Sequence[str]],
    params: Story,
    rng: np.random.Generator,
) -> dict[str, Circuit]:
    """Every circuit that the page asks about, by name."""
    sites, path = circuit_of(search), grown(search)
    out = {"circuit": Circuit(True, tuple(sites)), "necessity": Circuit(False, tuple(sites))}
    sizes = sizes_of(params.circuit_limit, len(path))
    for order, ranking in {"circuit": path, **orders}.items():
        out |= {f"{order} {size}": Circuit(True, tuple(ranking[:size])) for size in sizes if size <= len(ranking)}
    for number in range(params.random_sets):
        drawn = [everything[index] for index in rng.permutation(len(everything))]
        out |= {f"random {size} {number}": Circuit(True, tuple(drawn[:size])) for size in sizes if size <= len(drawn)}
    for site in sites:
        out[f"member {site}"] = Circuit(True, tuple(other for other in sites if other != site))
    for number, own in enumerate(subsets):
        out[f"kept {number}"] = Circuit(True, tuple(site for site in sites if site not in own))
        out[f"model {number}"] = Circuit(False, tuple(own))
    return out


def site_names(layers: Sequence[int], n_heads: int) -> list[str]:
    """Every head and MLP of the layers."""
    return [name for layer in layers for name in (*(f"{layer}.{head}" for head in range(n_heads)), f"mlp {layer}")]


# --- the tests ----------------------------------------------------------------------------------------------------


def sums(frame: pd.DataFrame) -> pd.DataFrame:
    """F(test) - F(nothing) of each quad (rows) and test (columns), summed over the quad's pairs."""
    wide = frame.pivot(index=["quad_id", "pair_id"], columns="test", values="logit_diff")
    return wide.sub(wide["nothing"], axis=0).groupby("quad_id").sum()


def shares(values: pd.DataFrame, whole: pd.Series, params: Story) -> pd.DataFrame:
    """Each column's share of what the model has over nothing: `estimate`, `low`, `high`."""
    if not whole.sum() > 0 or values.empty:
        return pd.DataFrame({key: np.nan for key in ("estimate", "low", "high")}, index=values.columns)
    spans = stats.ratio_intervals(values.to_numpy(), whole.to_numpy(), params)
    return pd.DataFrame(columns(spans), index=values.columns)


def curves(frame: pd.DataFrame, params: Story) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Faithfulness against size for every order, and the area under it up to the size that the search reached (mean
    faithfulness over these sizes, from nothing on; trapezoids), with the circuit's area less each other's."""
    wide = sums(frame)
    parts = (
        wide.columns.str.extract(r"^(circuit|recovery|damage|attribution|random) (\d+)")
        .set_index(wide.columns)
        .dropna()
    )
    by = [parts[0].to_dict(), parts[1].astype(int).to_dict()]
    means = wide[parts.index].T.groupby([by[0], by[1]]).mean().T  # random circuits of one size: their mean
    out = shares(means, wide["everything"], params).rename_axis(["order", "n_sites"]).reset_index()
    end = out.loc[out["order"] == "circuit", "n_sites"].max()
    areas = {}
    for order in [name for name in ORDERS if name in means]:
        own = means[order].loc[:, lambda table: table.columns <= end]
        points = np.concatenate([np.zeros((len(own), 1)), own.to_numpy()], axis=1)
        areas[order] = np.trapezoid(points, np.array([0, *own.columns]) / own.columns.max(), axis=1)
    areas = pd.DataFrame(areas, index=wide.index)
    minus = shares(areas.rsub(areas["circuit"], axis=0), wide["everything"], params).add_prefix("minus_")
    table = shares(areas, wide["everything"], params).join(minus).rename_axis("order").reset_index()
    out = out.assign(name=out["order"].map(ORDERS)).sort_values("order", key=lambda order: order.map([*ORDERS].index))
    return out, table


def members(frame: pd.DataFrame, params: Story) -> pd.DataFrame:
    """What the removal of each member costs the circuit (logits), all together: familywise intervals and p values."""
    own = frame[frame["test"].str.startswith(("member ", "circuit")) & ~frame["test"].str.match(r"circuit \d")]
    wide = own.pivot(index=["quad_id", "pair_id"], columns="test", values="logit_diff").groupby("quad_id").mean()
    cost = wide.drop(columns="circuit").rsub(wide["circuit"], axis=0)
    out = pd.DataFrame(familywise(cost.to_numpy(), params, tail="greater"))
    out = out.assign(site=cost.columns.str.removeprefix("member "))
    whole = sums(frame)["everything"]
    pairs = frame[frame["test"] == "everything"].groupby("quad_id").size()
    out = out.assign(share=out["estimate"] / (whole.sum() / pairs.sum()), matters=out["low"].astype(float) > 0)
    return out.sort_values("estimate", ascending=False, ignore_index=True)


def incompleteness(frame: pd.DataFrame, params: Story) -> tuple[dict[str, Any], pd.DataFrame]:
    """F(C without K) beside F(model without K), as shares, for every sampled K; and the largest difference, between
    the largest lower and the largest upper end of the |differences| that hold for all K together."""
    wide = sums(frame)
    numbers = [name.removeprefix("kept ") for name in wide if name.startswith("kept ")]
    if not numbers or not wide["everything"].sum() > 0:
        return {"estimate": None, "low": None, "high": None, "subsets": 0, "worst": None}, pd.DataFrame()
    kept, left = (wide[[f"{which} {number}" for number in numbers]] for which in ("kept", "model"))
    apart = pd.DataFrame(kept.to_numpy() - left.to_numpy(), index=wide.index)
    spans = stats.simultaneous(apart.to_numpy(), params)
    scale = wide["everything"].mean()
    table = pd.DataFrame(columns(spans)).astype(float) / scale
    table = table.assign(
        circuit=kept.sum().to_numpy() / wide["everything"].sum(), model=left.sum().to_numpy() / wide["everything"].sum()
    )
    size, worst = table["estimate"].abs(), int(table["estimate"].abs().argmax())
    low, high = np.maximum(0, np.maximum(table["low"], -table["high"])), np.maximum(-table["low"], table["high"])
    ends = {"low": None, "high": None} if table["low"].isna().any() else {"low": low.max(), "high": high.max()}
    return {"estimate": size.max(), **ends, "subsets": len(numbers), "worst": worst}, table


def circuit_numbers(
    search: pd.DataFrame, frame: pd.DataFrame, subsets: Sequence[Sequence[str]], slice_: Sequence[str],
    everything: Sequence[str], params: Story,
) -> dict[str, Any]:  # fmt: skip
    """The numbers of the minimal circuit (see the top of this file)."""
    sites = circuit_of(search)
    if not sites:
        return {"sites": [], "why": "the model keeps nothing over the resampled run, so there is nothing to search for"}
    lead = frame["ablation"].iloc[0]
    halves = {half: rows for half in HALVES if len(rows := frame[frame["half"] == half])}
    last = list(halves.values())[-1]
    own, other = last[last["ablation"] == lead], last[last["ablation"] != lead]

    def share(rows: pd.DataFrame, test: str) -> dict[str, float] | None:
        if rows.empty:
            return None
        wide = sums(rows)
        return shares(wide[[test]], wide["everything"], params).iloc[0].to_dict()

    first = next(iter(halves.values()))
    table, (worst, _) = members(own, params), incompleteness(own, params)
    _, areas = curves(own, params)
    leads = own[own["test"] == "circuit"].assign(hit=lambda rows: rows["metric"] > 0).groupby("quad_id")["hit"]
    hits = leads.agg(["sum", "count"])
    span = stats.proportion_interval(hits["sum"], hits["count"], params)
    shared = [site for site in sites if site in slice_]
    chance = scipy_stats.hypergeom.sf(len(shared) - 1, len(everything), len(slice_), len(sites))
    reached = search.loc[search["chosen"] & (search["phase"] == "grow"), "faithfulness"].max()
    return {
        "sites": sites, "size": len(sites), "grown": len(grown(search)), "searched": reached,
        "reached": bool(reached >= params.faithful_share), "ablation": lead, "quads": own["quad_id"].nunique(),
        "faithfulness": share(own, "circuit"),
        "faithfulness_discovery": share(first[first["ablation"] == lead], "circuit"),
        "faithfulness_counterfactual": share(other, "circuit"),
        "necessity": share(own, "necessity"),
        "leads": {"estimate": span.estimate, "low": span.low, "high": span.high},
        "members": table.to_dict("records"),
        "weakest": table.iloc[-1].to_dict(),
        "failing": table.loc[~table["matters"], "site"].tolist(),
        "incompleteness": worst | {"worst": list(subsets[worst["worst"]]) if worst["subsets"] else []},
        "areas": areas.to_dict("records"),
        "overlap": {"sites": shared, "jaccard": jaccard(sites, slice_), "p": float(chance)},
    }  # fmt: skip


# --- attribution --------------------------------------------------------------------------------------------------


def compared(attribution: pd.DataFrame, exact: pd.DataFrame, params: Story) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Each method beside the exact effects, for sites and for queries; and the nodes' means (logits)."""
    keys = ["pair_id", "quad_id", "half", "layer", "component", "head"]
    both = attribution.merge(exact, on=keys)
    both = both.assign(nodes=np.where(both["component"] == "query", "queries", "sites"), site=named(both))
    both["site"] = both["site"].where(
        both["component"] != "query", both["layer"].astype(str) + "." + both["head"].astype(str)
    )
    rows, means = [], both.groupby(["nodes", "site"], sort=False)[[*METHODS, "exact"]].mean()
    for nodes, part in both.groupby("nodes", sort=False):
        wide = {name: part.pivot_table(index="quad_id", columns="site", values=name) for name in (*METHODS, "exact")}
        own = means.loc[nodes]
        order = own["exact"].abs().nlargest(20).index
        for method in METHODS:
            if nodes == "sites" and method == "atp_qk":
                continue  # the fix is about queries
            truth, guess = own["exact"], own[method]
            if method == "grad_drop":  # unsigned
                truth, span = truth.abs(), None
                rank = scipy_stats.spearmanr(guess, truth).statistic
            else:
                span = stats.rank_agreement(wide["exact"].to_numpy(), wide[method].to_numpy(), params)
                rank = span.estimate
            top = guess.abs().nlargest(20).index
            rows.append(
                {
                    "nodes": nodes,
                    "method": method,
                    "estimate": rank,
                    "low": span and span.low,
                    "high": span and span.high,
                    "kendall": scipy_stats.kendalltau(guess, truth).statistic,
                    "top10": len({*order[:10]} & {*top[:10]}) / min(10, len(order)),
                    "top20": len({*order} & {*top}) / len(order),
                    "signs": None if method == "grad_drop" else float((np.sign(guess) == np.sign(truth))[order].mean()),
                    "missed": [site for site in order[:10] if site not in top],
                }
            )
    return pd.DataFrame(rows), means.reset_index()


def cost(n_layers: int, n_heads: int, tokens: float) -> pd.DataFrame:
    """What each method runs for a pair beside the two plain runs, in tokens x layers (a backward pass counts as a
    forward pass), and how often that goes into the exact sweep of all heads and MLPs; `with_runs` counts those too."""
    own = {
        "exact": (n_heads + 1) * n_layers * (n_layers + 1) / 2,
        "atp": 2 * n_layers,
        "atp_qk": 5 * n_layers,  # the corrupt queries, and two rows under them
        "grad_drop": 3 * n_layers + 2 * n_layers * (1 + n_layers),
    }
    plain = 2 * tokens * n_layers
    out = pd.DataFrame({"method": list(own), "token_layers": list(own.values())})
    ratios = [(own["exact"] + extra) / (out["token_layers"] + extra) for extra in (0, plain)]
    return out.assign(ratio=ratios[0], with_runs=ratios[1])


# --- sentences ----------------------------------------------------------------------------------------------------


def said(row: Mapping[str, Any] | None, digits: int = 2) -> str:
    """An estimate with its interval."""
    return "not measured" if row is None else interval(row["estimate"], row["low"], row["high"], digits)


def verdict(low: Any, high: Any, above: float | None = None, below: float | None = None) -> str:
    """Whether an interval lies beyond a bound."""
    if low is None or high is None or np.isnan(low) or np.isnan(high):
        return "too few quads to say more"
    met = low > above if above is not None else high < below
    return "shown" if met else "not shown"


def circuit_sentences(found: Mapping[str, Any], params: Story) -> list[str]:
    """What the circuit is, and whether it is faithful, necessary, minimal and complete."""
    if not found["sites"]:
        return [f"No circuit was searched for: {found['why']}."]
    kind = {"resample": "another prompt's values", "counterfactual": "the corrupt prompt's values"}[found["ablation"]]
    got = "" if found["reached"] else f", which is less than the {params.faithful_share:g} asked for"
    weak, worst, over = found["weakest"], found["incompleteness"], found["overlap"]
    unsure = "there are too few quads to say"
    none_left = "none was spare" if found["grown"] == found["size"] else f"{found['grown'] - found['size']} were pruned"
    out = [
        f"The circuit at the last token, in the order in which its sites joined: {listed(found['sites'])}. It has "
        f"{found['size']} sites ({none_left}). On the pairs that it was searched on it keeps "
        f"{found['searched']:.2f} of logit_diff when everything else there has {kind}{got}.",
        f"Faithfulness on the confirmation half is {said(found['faithfulness'])} ({found['quads']} quads), on the "
        f"discovery half {said(found['faithfulness_discovery'])}; with all else from the corrupt prompt "
        f"{said(found['faithfulness_counterfactual'])}. The answer leads the candidates in {said(found['leads'])} of "
        f"the pairs. It keeps {params.faithful_share:g} or more: "
        f"{verdict(found['faithfulness']['low'], found['faithfulness']['high'], above=params.faithful_share)}.",
        f"Necessity: with the circuit resampled and all else intact the model keeps {said(found['necessity'])}. Less "
        f"than half is left: {verdict(found['necessity']['low'], found['necessity']['high'], below=0.5)}.",
        f"Minimality: removing {weak['site']}, the member of least cost, takes {said(weak, 3)} logits from the circuit "
        f"({weak['share']:.2f} of what the model has). Members whose cost is not shown to be above zero (familywise): "
        f"{unsure if weak['low'] is None or np.isnan(weak['low']) else listed(found['failing'])}.",
    ]
    if worst["subsets"]:
        out.append(
            f"Completeness: over {worst['subsets']} random subsets K, the circuit without K and the model without K "
            f"are at most {said(worst)} apart (share of what the model has; K = {listed(worst['worst'])})."
        )
    areas = {row["order"]: row for row in found["areas"]}
    each = []
    for order, row in areas.items():
        if order != "circuit":
            ends = {key: row[f"minus_{key}"] for key in ("estimate", "low", "high")}
            each.append(f"{ORDERS[order]} {said(row)} (less by {said(ends)})")
    if "circuit" in areas:
        out.append(
            f"Area under faithfulness against size, up to the size that was grown: {said(areas['circuit'])}; sites in "
            f"other orders: {'; '.join(each)}."
        )
    out.append(
        f"Of the critical slice of step 04, {listed(over['sites'])} are in the circuit ({over['jaccard']:.0%} of the "
        f"sites in either; p = {over['p']:.2g} for as many by chance)."
    )
    return out


def attribution_sentences(table: pd.DataFrame, costs: pd.DataFrame, pairs: int) -> list[str]:
    """How much of the exact ranking attribution finds, at what cost."""
    out = []
    for row in table.itertuples():
        signs = "" if row.signs is None or np.isnan(row.signs) else f", the right sign in {row.signs:.0%} of the top 20"
        out.append(
            f"{METHODS[row.method]} for {row.nodes} ({pairs} pairs): Spearman "
            f"{interval(row.estimate, row.low, row.high)}, Kendall {row.kendall:.2f} with the exact effects; it finds "
            f"{row.top10:.0%} of the exact top 10 and {row.top20:.0%} of the top 20{signs}; "
            f"missed: {listed(row.missed)}."
        )
    cheap = costs.set_index("method")
    out.append(
        f"Beside the two plain runs, AtP takes {cheap.loc['atp', 'token_layers']:.0f} tokens x layers a pair, GradDrop "
        f"{cheap.loc['grad_drop', 'token_layers']:.0f}, the exact sweep {cheap.loc['exact', 'token_layers']:.0f}: "
        f"{cheap.loc['atp', 'ratio']:.0f} times as much as AtP, and {cheap.loc['atp', 'with_runs']:.1f} times with the "
        "plain runs that both need."
    )
    return out


CAPTIONS = {
    "circuit": "Faithfulness against the number of sites kept at the last token when all else there is resampled, in "
    "the order of the search, of single effects and of attribution, and at random; confirmation half, 95% studentised "
    "bootstrap intervals over quads.",
    "attribution": "Attribution patching against the exact cost of replacing each head and MLP at the last token by "
    "its corrupt value (logits, mean over pairs).",
}
