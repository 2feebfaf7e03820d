"""Step 06 on its page: which sites feed the slice, by which of four kinds of evidence.

1. `shares`, `direct_difference`: what whole groups of senders carry.
2. `outputs_table`, `attention_table`: what heads write and where they look, tested over heads; `margins`: the margin
   under an ablated path. `ranks` compares a head's numbers with those of other heads of the nearest layers.
3. `four_tests` puts them side by side, each with its verdict; `verdicts` says what follows, `findings` gathers numbers
   and sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from lib import effects, stats
from lib.effects import quad_matrix, reported
from lib.hooks import Site
from pipeline.step import Step
from report import plots, site_tables
from report.site_tables import picked
from report.words import ONE_HALF, about_model, finished, in_logits, interval, listed, shown, top_sites
from steps.retrieval_heads import hops_page
from steps.retrieval_heads.measure import Measured, RetrievalHeads, needed
from steps.retrieval_heads.outputs import BASELINES
from steps.retrieval_heads.routes import GROUPS, heads_of

UNITS = {
    "path": "logit_diff (logits)",
    "output tells the class": "accuracy above baseline",
    "written into the slice": "share of its input",
    "attends to the names": "share beyond even",
    "ablation of the path": "margin (logits)",
}
TESTS = tuple(UNITS)  # the second and third are one test: both must be passed
# By a rank among other heads of the nearest layers. Not the probe: most heads' outputs tell the class, so that a rank
# among probes could never pick one out. It is a condition that a head must meet; the write and the path pick.
RANKED = (TESTS[2], TESTS[4])
BESIDE = ("at the unembedding", "output tells the profession")  # beside them, without a verdict
EMPTY = ["site", "component", "half", "estimate", "low", "high", "p", "quads"]
READ = "k and v at names"  # what the slice's heads read
CHANCE = "chance"
PASSES = {"null": "ranked among", "smallest": "smallest p"}
SUPPORTED, NOT_SUPPORTED, NOT_TESTABLE = "supported", "not supported", "not testable"
CAPTIONS = {
    "groups": "What groups of senders carry of the gap to what the slice reads, other MLPs frozen and recomputed; "
    "confirmation half, 95% intervals over quads.",
    "senders": "The senders of largest path effect into the slice, picked on the discovery half, with "
    "their effect in both halves and intervals that hold for all senders together.",
}


# --- tables ---


def shares(records: pd.DataFrame, params: RetrievalHeads) -> pd.DataFrame:
    """What each set of senders carries of the clean-to-corrupt gap, confirmation half, by receivers and MLP mode."""
    own = reported(records)
    parts = []
    for (receivers, mlps), rows in own.groupby(["receivers", "mlps"], sort=False):
        parts.append(effects.curve(rows, params, ["site_set"]).assign(receivers=receivers, mlps=mlps))
    out = pd.concat(parts, ignore_index=True)
    return out.assign(senders=[GROUPS[index] for index in out["site_set"]])


def difference(records: pd.DataFrame, one: int, other: int, params: RetrievalHeads) -> stats.Interval:
    """The effect of one set of senders less that of another, per quad (logits), confirmation half."""
    matrix = quad_matrix(reported(records), "effect", ["site_set"]).values
    return stats.mean_interval(matrix[:, one] - matrix[:, other], params)


def direct_difference(m: Measured, where: str, params: RetrievalHeads) -> stats.Interval:
    """What MLPs carry into the slice beyond what heads carry, directly: MLPs between are frozen."""
    direct = only(m.groups, where, "frozen")
    return difference(direct, GROUPS.index("MLPs"), GROUPS.index("heads"), params)


def tested(records: pd.DataFrame, value: str, params: RetrievalHeads) -> pd.DataFrame:
    """Mean of a column per site over quads, both halves, familywise intervals and p values."""
    out = effects.by_half(records.dropna(subset=[value]), lambda own: effects.tested(own, params, value))
    return out.assign(site=effects.named(out))


def outputs_table(outputs: pd.DataFrame, role: str, value: str, params: RetrievalHeads) -> pd.DataFrame:
    """One of `outputs.MEASURES` of every head at a role: `tested`; without rows where there was too little to read."""
    own = outputs[(outputs["position"] == role) & (outputs["component"] == "head")].dropna(subset=[value])
    return tested(own.drop(columns="position"), value, params) if len(own) else pd.DataFrame(columns=EMPTY)


def baseline(outputs: pd.DataFrame, role: str) -> tuple[str, pd.DataFrame]:
    """What tells the class best at a role without the model, on the discovery half: chance, or one of
    `outputs.BASELINES`; and its accuracy above chance, `told`, of each quad of both halves."""
    own = outputs[(outputs["position"] == role) & outputs["component"].isin(BASELINES)].dropna(subset=["told"])
    first = effects.in_halves(own)[0][1].groupby("component")["told"].mean() if len(own) else pd.Series(dtype=float)
    best = first.idxmax() if len(first) and first.max() > 0 else CHANCE
    return best, own.loc[own["component"] == best, ["quad_id", "half", "told"]]


def beyond_baseline(outputs: pd.DataFrame, role: str, params: RetrievalHeads) -> pd.DataFrame:
    """How much better a probe of each head's output tells the class than the `baseline`, quad by quad: `tested`."""
    _, known = baseline(outputs, role)
    own = outputs.merge(known.rename(columns={"told": "known"}), on=["quad_id", "half"], how="left")
    beyond = own.assign(told=own["told"] - own["known"].fillna(0)).drop(columns="known")
    return outputs_table(beyond, role, "told", params)


def attention_table(attention: pd.DataFrame, role: str, params: RetrievalHeads) -> pd.DataFrame:
    """Attention to the names' tokens beyond an even spread: from `last` to all names, from a name to its own tokens."""
    at = attention["position"].str.startswith("name_") if role == "names" else attention["position"] == role
    by = ["pair_id", "quad_id", "half", "layer", "head", "position"]
    own = attention[at].groupby(by, sort=False, observed=True)[["share", "uniform"]].sum().reset_index()
    own = own.assign(component="head", excess=own["share"] - own["uniform"])
    table = tested(own.drop(columns="position"), "excess", params)
    shares = own.groupby(["half", "layer", "head"])["share"].mean()
    return table.join(shares, on=["half", "layer", "head"])


def looks_of(m: Measured, params: RetrievalHeads) -> dict[str, pd.DataFrame]:
    """Where the heads look, from the names and from the last token."""
    return {role: attention_table(m.attention, role, params) for role in ("names", "last")}


def only(records: pd.DataFrame, receivers: str, mlps: str) -> pd.DataFrame:
    """The rows of one route and MLP mode."""
    return records[(records["receivers"] == receivers) & (records["mlps"] == mlps)]


def beside(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Each sender's effect in pair prompts (`pair`) and in one-name prompts (`one`), confirmation half."""
    own = reported(one)[["site", "component", "estimate"]].rename(columns={"estimate": "pair"})
    return own.merge(reported(other)[["site", "estimate"]].rename(columns={"estimate": "one"}), on="site")


def margins(m: Measured, role: str, params: RetrievalHeads) -> pd.DataFrame:
    """The fall of the margin (logits) under the ablated path of each set of senders, and answers that flip."""
    own = reported(m.ablation[m.ablation["position"] == role])
    matrix = quad_matrix(own, "margin_effect", ["site_set"])
    right = own[own["metric_before"] > 0]  # the others have no answer to flip
    flips = (right["metric_after"] < 0).groupby(right["site_set"]).mean().reindex(matrix.sites["site_set"]).fillna(0)
    kinds, sites = zip(*(m.sets[role][index] for index in matrix.sites["site_set"]), strict=True)
    spans = effects.columns(stats.mean_intervals(matrix.values, params))
    return pd.DataFrame(spans).assign(
        kind=kinds,
        site=[listed(effects.site_name(*site) for site in together) for together in sites],
        flips=flips.to_numpy(),
        ablation=own["ablation"].iloc[0],
        quads=len(matrix.quads),
    )


def ranks(estimates: pd.Series, family: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The rank p of each head of a family among its null, alone and after Holm's correction over the family; the size
    of the null, and the smallest p that it can give after the correction. `estimates` by site's name."""
    rows = {}
    for site, among in family.items():
        null = estimates.reindex(among).dropna()
        rows[site] = ((1 + (null >= estimates[site]).sum()) / (1 + len(null)), len(null), len(family) / (1 + len(null)))
    out = pd.DataFrame.from_dict(rows, orient="index", columns=["alone", "null", "smallest"])
    return out.assign(p=stats.holm(out["alone"].to_numpy()) if rows else ())


def verdict(row: Mapping[str, Any], ranked: bool, family: int, params: RetrievalHeads) -> tuple[str, str]:
    """The verdict of one test of one head, and why it cannot be tested (see `four_tests`)."""
    alpha = 1 - params.level
    if pd.isna(row["estimate"]):
        return NOT_TESTABLE, "not measured: too few quads of a class, or nothing of the slice behind it"
    if row["quads"] < stats.MINIMUM_CLUSTERS:
        return NOT_TESTABLE, f"{row['quads']:g} quads, {stats.MINIMUM_CLUSTERS} needed"
    if ranked and row["smallest"] > alpha:
        return NOT_TESTABLE, f"ranked among {row['null']:g} heads, {needed(family, params.level)} needed"
    passed = row["low"] > 0 and row["p"] <= alpha if ranked else row["passed"]
    return (SUPPORTED if passed else NOT_SUPPORTED), ""


def four_tests(
    family: Mapping[str, Sequence[str]], tables: Mapping[str, pd.DataFrame], params: RetrievalHeads
) -> pd.DataFrame:
    """One row per head of a family and test, confirmation half: estimate, interval, p, the null's size, verdict.

    `family`: each head's null, by names; `tables` by test. In a RANKED test a head passes whose interval is above zero
    and whose rank among its null is significant (`ranks`); in the others one that is positive and familywise
    significant, over all senders or heads that were measured, in both halves.
    """
    rows, keep = [], ["estimate", "low", "high", "p", "alone", "null", "smallest", "quads"]
    for test, table in tables.items():
        own = (reported(table) if "half" in table and len(table) else table).set_index("site")
        if test in RANKED:
            known = {site: among for site, among in family.items() if site in own.index}
            own = own.drop(columns="p", errors="ignore").join(ranks(own["estimate"], known))
        elif len(own):
            own = own.assign(passed=own.index.isin(effects.confirmed(table, params)["site"]))
        for site, row in own.reindex(family).reindex(columns=[*keep, "passed"]).iterrows():
            said, why = ("", "") if test in BESIDE else verdict(row, test in RANKED, len(family), params)
            rows.append({"site": site, "test": test, **row[keep], "verdict": said, "why": why})
    return pd.DataFrame(rows)


def tests_of(m: Measured, params: RetrievalHeads) -> pd.DataFrame:
    """The four tests of each role's candidates, and of the slice's own heads (`inside`) at the last token."""
    parts = []
    for role, asked in m.families.items():
        if not asked:
            continue
        tables = {
            TESTS[0]: m.routes[f"slice at {role}"],
            TESTS[1]: beyond_baseline(m.outputs, role, params),
            TESTS[2]: outputs_table(m.outputs, role, "share", params),
            TESTS[3]: attention_table(m.attention, role, params),
            TESTS[4]: margins(m, role, params).query("kind != 'together'"),
            BESIDE[0]: outputs_table(m.outputs, role, "unembedded", params),
            BESIDE[1]: outputs_table(m.outputs, role, "profession_told", params),
        }
        for inside in (False, True):
            own = {site: among for site, among in asked.items() if (site in m.slice_sites) == inside}
            named = {effects.site_name(*s): [effects.site_name(*other) for other in among] for s, among in own.items()}
            if named:
                parts.append(four_tests(named, tables, params).assign(role=role, inside=inside))
    columns = ["site", "test", "estimate", "low", "high", "p", "alone", "null", "smallest", "quads", "verdict", "why"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*columns, "role", "inside"])


def passing(tests: pd.DataFrame, which: Sequence[str] = TESTS) -> dict[str, str]:
    """Of each head, by name and role, what these tests say together: supported if all are, not supported if one is not,
    else not testable."""
    said = tests[tests["test"].isin(which)].groupby(["site", "role"], sort=False)["verdict"].agg(set)
    one = {True: NOT_SUPPORTED, False: NOT_TESTABLE}
    return {key: SUPPORTED if all_of == {SUPPORTED} else one[NOT_SUPPORTED in all_of] for key, all_of in said.items()}


def passes(tests: pd.DataFrame) -> pd.DataFrame:
    """Which head passes which test, a row for each head: "yes", "no", or why that cannot be tested; the size of the
    null that its ranks are among, and the smallest p that they can give after the correction."""
    own = tests[tests["test"].isin(TESTS)]
    said = {SUPPORTED: "yes", NOT_SUPPORTED: "no"}
    own = own.assign(
        head=own["site"] + " at " + own["role"] + np.where(own["inside"].astype(bool), " (slice)", ""),
        said=own["verdict"].map(said).fillna(own["why"]),
    )
    wide = own.pivot_table(index="head", columns="test", values="said", aggfunc="first", sort=False)
    ranked = own.groupby("head", sort=False)[["null", "smallest"]].max()
    return wide.reindex(columns=list(TESTS)).join(ranked).rename(columns=PASSES).reset_index()


def edges_table(records: pd.DataFrame, params: RetrievalHeads) -> pd.DataFrame:
    """Edges of the two-hop path, confirmation half: source, target, mean effect (logits), and whether it is other than
    zero (familywise over all edges at one token, above the model's noise; nothing is claimed of too few quads)."""
    own = reported(records).assign(component=lambda frame: frame["sender"])
    there = np.where(own["position"] == "names", " at names", "")
    own = own.assign(source=effects.named(own) + there, target=own["receivers"])
    own = own.replace({"source": {"embed -1 at names": "names"}})
    parts = []
    for _, rows in own.groupby(["position", "mlps"], sort=False):
        matrix = quad_matrix(rows, "effect", ["source", "target"])
        found = matrix.sites.assign(**effects.familywise(matrix.values, params, floor=params.floor))
        parts.append(found.assign(significant=effects.significant(found, params)))
    return pd.concat(parts, ignore_index=True)


def probe_table(probes: pd.DataFrame, params: RetrievalHeads) -> pd.DataFrame:
    """Share of people whose superset or profession comes out right, by template, raw and centred on labels' means."""
    rows = []
    for template, own in probes.groupby("template", sort=False):
        for kind in ("superset", "profession"):
            for how in ("", "_centred"):
                right = own[f"{kind}_right{how}"].dropna()
                if right.empty:
                    continue
                span = stats.proportion_interval(right.to_numpy(), np.ones(len(right)), params)
                chance = float(own.loc[right.index, f"{kind}_chance"].mean())
                about = {"template": template, "label": kind, "centred": bool(how), "people": len(right)}
                ends = {key: getattr(span, key) for key in ("estimate", "low", "high")}
                rows.append(about | ends | {"chance": chance})
    return pd.DataFrame(rows)


def shown_tests(tests: pd.DataFrame) -> pd.DataFrame:
    """The tests as the page shows them: a row for each head and test."""
    said = [interval(row.estimate, row.low, row.high) if pd.notna(row.estimate) else "" for row in tests.itertuples()]
    out = tests.assign(head=tests["site"] + " at " + tests["role"], found=said)
    out["null heads"] = tests["null"].map(lambda size: f"{size:g}" if pd.notna(size) else "")
    out["verdict"] = out["verdict"] + tests["why"].map(lambda why: f" ({why})" if why else "")
    return out[["head", "test", "found", "p", "null heads", "smallest", "verdict"]].reset_index(drop=True)


def head_panels(tables: Mapping[str, pd.DataFrame], params: RetrievalHeads) -> dict[str, dict[str, np.ndarray]]:
    """What `plots.heat_map` takes: heads' estimates at each role, and which are significant; confirmation half."""
    own = {f"at {role}": reported(table) for role, table in tables.items()}
    sure = {role: table.assign(sure=effects.significant(table, params)) for role, table in own.items()}
    return {
        "matrix": {role: site_tables.heads_matrix(table) for role, table in own.items()},
        "significant": {role: site_tables.heads_matrix(table, "sure") for role, table in sure.items()},
    }


def graph(edges: pd.DataFrame, senders: Sequence[Site], slice_sites: Sequence[Site]) -> tuple[list, pd.DataFrame]:
    """The columns of the two-hop graph, from the names to the answer, and its edges."""
    written = [effects.site_name(*site) + " at names" for site in senders if site.layer >= 0]
    own = [effects.site_name(*site) for site in sorted(slice_sites)]
    before = [("names", ["names"]), ("sites at the names", written)] if written else []
    return [*before, ("slice at the last token", own), ("answer", ["answer"])], edges


# --- figures ---


def probes_figure(step: Step, m: Measured) -> Figure:
    """Superset and profession from one name."""
    return plots.probe_bars(probe_table(m.probes, step.params))


def ranked(m: Measured, role: str) -> Figure | None:
    """The senders of largest path effect at a role, if the slice hears any there."""
    table = m.routes.get(f"slice at {role}")
    return None if table is None else plots.ranked_sites(picked(table, 15), "path effect on logit_diff (logits)")


def pairs_and_names(m: Measured) -> Figure | None:
    """Leading senders at the names, pair prompts against one-name prompts, where these were patched."""
    alone = m.routes.get("slice in one-name prompts")
    if alone is None:
        return None
    at_names = m.routes["slice at names"]
    leaders = picked(at_names, 6)["site"].drop_duplicates().tolist()
    axes = ("pair", "one", "pair prompts (logits)", "one-name prompts (logits)")
    return plots.agreement(beside(at_names, alone), *axes, by="component", named=leaders)


def groups_figure(step: Step, m: Measured) -> Figure:
    """What each group of senders carries."""
    carried = shares(m.groups, step.params)
    labelled = carried.assign(site=carried["senders"] + ", " + carried["receivers"].str.removesuffix(" at names"))
    return plots.ranked_sites(labelled, "share of the clean-to-corrupt gap", by="mlps")


def writes_figure(step: Step, m: Measured) -> Figure | None:
    """What a probe tells from each head's output."""
    told = {role: outputs_table(m.outputs, role, "told", step.params) for role in m.heads}
    told = {role: table for role, table in told.items() if len(table)}
    return plots.heat_map(**head_panels(told, step.params), label="accuracy above chance") if told else None


def looks_figure(step: Step, m: Measured) -> Figure:
    """How much each head looks at the names."""
    panels = head_panels(looks_of(m, step.params), step.params)
    return plots.heat_map(**panels, label="attention beyond an even spread (share)")


def tests_figure(step: Step, m: Measured) -> Figure | None:
    """The four tests, where any head was put to them."""
    tests = tests_of(m, step.params)
    tests = tests[~tests["test"].isin(BESIDE)]
    lines = {test: fill(test, 14) for test in TESTS}
    about = {"site": tests["site"] + " at " + tests["role"], "test": tests["test"].map(lines)}
    named = tests.assign(passed=tests["verdict"] == SUPPORTED, **about)
    return plots.four_tests(named, {lines[test]: unit for test, unit in UNITS.items()}) if len(tests) else None


def tests_table(step: Step, m: Measured) -> pd.DataFrame | Markdown:
    """The four tests in numbers."""
    return shown(shown_tests(tests_of(m, step.params)), 3, "No head was put to the tests.")


def passes_table(step: Step, m: Measured) -> pd.DataFrame | Markdown:
    """Which head passes which test."""
    tests = tests_of(m, step.params)
    return shown(passes(tests) if len(tests) else tests, 3, "No head was put to the tests.")


def hops_table(step: Step, m: Measured) -> pd.DataFrame:
    """What the last token reads at which tokens."""
    return hops_page.table(hops_page.shares(m.hops, step.params))


def two_hop(step: Step, m: Measured) -> Figure:
    """The path from the names to the answer."""
    return plots.two_hop(*graph(edges_table(m.edges, step.params), m.senders, m.slice_sites))


# --- sentences ---


def probe_sentences(table: pd.DataFrame, probes: pd.DataFrame) -> list[str]:
    """What the one-name prompts show, and how labels of several tokens were scored."""
    out = []
    for template, own in table.groupby("template", sort=False):
        each = [
            f"{row.label} {'(centred) ' * row.centred}{interval(row.estimate, row.low, row.high)} "
            f"(chance {row.chance:.2f}, {row.people} people)"
            for row in own.itertuples()
        ]
        out.append(f'After "{template}" the right label comes first: {listed(each)}.')
    parts = probes.drop_duplicates("profession").groupby("scored")["profession"].apply(sorted)
    for how in ("first token", "not: shares its first token"):
        if how in parts.index:
            what = "scored by their first token" if how == "first token" else "not scored, because they share it"
            out.append(f"Profession labels of several tokens, {what}: {listed(parts[how])}.")
    return out


def share_of(table: pd.DataFrame, senders: str, receivers: str, mlps: str) -> str:
    """One share of the gap with its interval, for a sentence."""
    own = table[(table["senders"] == senders) & (table["receivers"] == receivers) & (table["mlps"] == mlps)].iloc[0]
    return interval(own["estimate"], own["low"], own["high"])


def route_sentences(table: pd.DataFrame, gap: stats.Interval, where: str) -> list[str]:
    """What the slice is given, and which kinds of sites wrote it; `where`: `k and v at names`, or its MLPs' inputs."""
    direct = {name: share_of(table, name, where, "frozen") for name in ("MLPs", "heads", "embedding")}
    through = {name: share_of(table, name, where, "recomputed") for name in direct}
    every = share_of(table, "everything", where, "recomputed")
    whole = f"Replacing all that the slice's MLPs are given at the last token takes away {every} of the gap"
    if where == READ:
        alone = {kind: share_of(table, "everything", f"{kind} at names", "recomputed") for kind in ("v", "k")}
        whole = (
            f"Replacing all that the slice's heads read at the names' tokens takes away {every} of the gap between "
            f"clean and corrupt; their values alone {alone['v']}, their keys alone {alone['k']}"
        )
    more = "more than" if gap.low is not None and gap.low > 0 else "not significantly more than"
    more = "less than" if gap.high is not None and gap.high < 0 else more
    return [
        f"{whole}.",
        f"Directly (other MLPs frozen), the MLPs there carry {direct['MLPs']} of it, the heads {direct['heads']} and "
        f"the embedding {direct['embedding']}; with the MLPs that listen recomputed, {through['MLPs']}, "
        f"{through['heads']} and {through['embedding']}.",
        f"Directly, the MLPs there carry {more if gap.low is not None else 'an effect that differs from'} the heads': "
        f"a difference of {interval(gap.estimate, gap.low, gap.high)} logits"
        + ("." if gap.low is not None else f", not testable ({gap.n} quads, {stats.MINIMUM_CLUSTERS} needed)."),
    ]


def ablation_sentences(m: Measured, params: RetrievalHeads) -> list[str]:
    """What ablating the paths of the candidates costs."""
    out = []
    for role, heads in m.heads.items():
        if not heads:
            quads = int(m.routes[f"slice at {role}"]["quads"].min())
            few = f": this is {NOT_TESTABLE} with {quads} quads, {stats.MINIMUM_CLUSTERS} are needed"
            out.append(
                f"No head at `{role}` outside the slice has a path into it that is significant on discovery"
                + few * (quads < stats.MINIMUM_CLUSTERS)
                + "."
            )
            continue
        row = margins(m, role, params).query("kind == 'together'").iloc[0]
        out.append(
            f"Ablating only the paths into the slice of {row['site']} at `{role}` ({row['ablation']}) lowers the "
            f"margin by {interval(row['estimate'], row['low'], row['high'])} logits and flips {row['flips']:.0%} of "
            "the answers."
        )
    return out


def verdicts(tests: pd.DataFrame, m: Measured, reads: pd.Series | None, gap: stats.Interval) -> dict:
    """The possible answers of the step, each true, false or None (not testable), with the heads concerned.

    `reads`: the share of the gap that the slice reads at the names, with its interval; `gap`: MLPs less heads there.
    Where no head is a candidate, enough quads to find one decide that there is none.
    """
    outside, inside = (
        passing(tests[~tests["inside"].astype(bool)]),
        passing(tests[tests["inside"].astype(bool)], TESTS[1:4]),
    )
    decided = NOT_TESTABLE not in outside.values() and all(
        m.heads[role] or m.routes[f"slice at {role}"]["quads"].min() >= stats.MINIMUM_CLUSTERS for role in m.heads
    )
    heads: dict[str, list[str]] = {}
    for (site, role), said in outside.items():
        if said == SUPPORTED:
            heads.setdefault(role, []).append(site)
    own = [site for (site, _), said in inside.items() if said == SUPPORTED]
    low = None if reads is None else reads["low"]
    unknown = low is None or pd.isna(low) or (not own and NOT_TESTABLE in inside.values())
    return {
        "retrieval_heads": heads,
        "two_stages": True if heads else False if decided else None,
        "slice_heads_that_retrieve": own,
        "one_stage": None if unknown else bool(own) and bool(low > 0.5),
        "mlps_at_the_names": None if gap.low is None or reads is None else gap.low > 0,
    }


def verdict_sentences(found: dict, tests: pd.DataFrame) -> list[str]:
    """The verdicts in words."""
    heads = [f"{listed(sites)} at `{role}`" for role, sites in found["retrieval_heads"].items()]
    outside = tests[~tests["inside"].astype(bool)]
    open_ones = [f"{site} at `{role}`" for (site, role), said in passing(outside).items() if said == NOT_TESTABLE]
    asked = outside.groupby("role", sort=False)["site"].nunique().sum()
    answers = {True: SUPPORTED, False: NOT_SUPPORTED, None: f"{NOT_TESTABLE} here"}
    why = f"{NOT_TESTABLE} here (too few quads, or the slice has no heads)"
    more = {True: "so it is", False: "this is not shown", None: why}
    return [
        f"Retrieval heads outside the slice, by all four tests: {listed(heads)}, of {asked} heads put to them"
        + f" ({NOT_TESTABLE} at this size: {listed(open_ones)})" * bool(open_ones)
        + f". Two stages, names to retrieval heads to slice: {answers[found['two_stages']]}.",
        "Retrieval and aggregation are one stage, the slice's own heads reading the names and writing the class: "
        f"{answers[found['one_stage']]}. Slice heads that attend to the names, tell the class, and write more of it "
        f"than the heads that they are ranked among: {listed(found['slice_heads_that_retrieve'])}.",
        "Directly, MLPs at the names write more of what the slice reads than heads there: "
        f"{more[found['mlps_at_the_names']]}. How much of it each writes, page 10 judges.",
    ]


def deciding(found: Mapping[str, Any], tests: pd.DataFrame, senders: pd.DataFrame) -> list[dict]:
    """The tests that decide whether heads outside the slice retrieve, ranks uncorrected: nothing where that is not
    testable, the leading sender where no head was put to the tests."""
    if found["two_stages"] is None:
        return []
    own = tests[~tests["inside"].astype(bool) & tests["test"].isin(TESTS)]
    own = own.assign(p=own["alone"].fillna(own["p"]), smallest=1 / (1 + own["null"].astype(float)))
    own = own.assign(site=own["site"] + " at " + own["role"])
    rows = own if len(own) else senders.head(1).assign(smallest=np.nan)
    return rows[["site", "estimate", "low", "p", "smallest"]].to_dict("records")


def test_sentences(tests: pd.DataFrame) -> list[str]:
    """How many heads pass each test, and what the ranks can resolve; the table has each head's way through them."""
    out = []
    for inside, words in ((False, "outside the slice"), (True, "of the slice")):
        own = tests[(tests["inside"] == inside) & tests["test"].isin(TESTS)]
        count = own.groupby(["site", "role"]).ngroups
        if not count:
            continue
        held = own[own["verdict"] == SUPPORTED].groupby("test").size().reindex(TESTS, fill_value=0)
        unclear = own[own["verdict"] == NOT_TESTABLE].groupby("test").size().reindex(TESTS, fill_value=0)
        each = [f"{test} {held[test]}" + f" ({unclear[test]} {NOT_TESTABLE})" * bool(unclear[test]) for test in TESTS]
        out.append(f"Heads {words} that pass each test, of {count}: {listed(each)}.")
        if len(null := own["null"].dropna()):
            out.append(
                f"Each of these is ranked among {null.min():g} to {null.max():g} other heads; the smallest p that a "
                f"rank can give, after Holm's correction, is {own['smallest'].max():.2g}."
            )
    return out


def probe_sentence(m: Measured, role: str, params: RetrievalHeads) -> str:
    """How many heads' outputs tell the class better than what is known without the model."""
    told, (best, known) = beyond_baseline(m.outputs, role, params), baseline(m.outputs, role)
    if told.empty or reported(told)["quads"].min() < stats.MINIMUM_CLUSTERS:
        return f"What a probe tells from heads' outputs at `{role}` is {NOT_TESTABLE}: too few quads."
    sure, of, against = effects.confirmed(told, params), told["site"].nunique(), CHANCE
    if best != CHANCE:
        against = f"the people's {best} do ({reported(known)['told'].mean():.2f} above chance)"
    said = (
        f"At `{role}`, a held-out linear probe tells the class from the outputs of {len(sure)} of {of} heads better "
        f"than {against}, in both halves."
    )
    return said + " So many meet this condition that it singles out none." * (len(sure) > of / 2)


def senders_sentence(table: pd.DataFrame, role: str, params: RetrievalHeads, count: int = 6) -> str:
    """The leading senders of a route."""
    leading = reported(picked(table, count))
    sure = effects.confirmed(table, params)
    sites = {"head": "heads", "attn": "attention modules", "mlp": "MLPs"}
    there = {kind: word for kind, word in sites.items() if kind in {*table["component"]}}
    kinds = [f"{(sure['component'] == kind).sum()} {word}" for kind, word in there.items()]
    kinds = ["the embedding"] * (not sure["component"].isin(list(sites)).all()) + kinds
    asked, few = reported(table)["site"].nunique(), int(reported(table)["quads"].min())
    told = f"significant in both halves are {listed(kinds)}, of {asked} that were followed to the other half"
    if few < stats.MINIMUM_CLUSTERS:
        told = f"whether they are significant is {NOT_TESTABLE} ({few} quads, {stats.MINIMUM_CLUSTERS} needed)"
    return (
        f"At `{role}`, the senders of largest path effect into the slice, of {table['site'].nunique()}, are "
        f"{top_sites(table, count)} ({in_logits(leading, 'familywise intervals')}); {told}."
        + ONE_HALF
        * (table["half"].nunique() == 1)
    )


def attention_sentence(looks: Mapping[str, pd.DataFrame], slice_sites: Sequence[Site]) -> str:
    """How the slice's heads attend from the last token."""
    table = reported(looks["last"]).set_index("site")
    heads = [effects.site_name(*site) for site in slice_sites if site.component == "head"]
    each = [f"{head} {table.loc[head, 'share']:.0%}" for head in heads if head in table.index]
    even = (table["share"] - table["estimate"]).mean()
    return (
        f"From the last token the slice's heads pay to the names' tokens {listed(each)} of their attention (an even "
        f"spread would give {even:.0%})."
    )


def findings(step: Step, m: Measured) -> dict[str, Any]:
    """The findings of step 06."""
    p, keep = step.params, ["site", "estimate", "low", "high", "p"]
    where = READ if heads_of(m.slice_sites) else m.groups["receivers"].iloc[0]
    carried, more = shares(m.groups, p), direct_difference(m, where, p)
    tests = tests_of(m, p)
    everything = carried[(carried["senders"] == "everything") & (carried["receivers"] == READ)]
    roles, between = list(m.heads), m.routes.get("slice at between")
    found = verdicts(tests, m, everything.iloc[0] if len(everything) else None, more)
    why = "what the slice reads at the names, or its heads' tests, rest on too few quads, or it has no heads"
    conclusions, routed = verdict_sentences(found, tests), route_sentences(carried, more, where)
    sentences = [
        *probe_sentences(probe_table(m.probes, p), m.probes),
        *(senders_sentence(m.routes[f"slice at {role}"], role, p) for role in roles),
        *routed,
        *hops_page.sentences(hops_page.shares(m.hops, p)),
        *([senders_sentence(between, "between", p)] if between is not None else []),
        *(probe_sentence(m, role, p) for role in roles),
        *([attention_sentence(looks_of(m, p), m.slice_sites)] if "names" in roles else []),
        *ablation_sentences(m, p),
        *test_sentences(tests),
        *conclusions,
    ]
    senders = {role: reported(table)[keep].nlargest(20, "estimate") for role, table in m.routes.items()}
    findings = {
        "model": about_model(step),
        "task": p.task,
        "able": True,
        "verdicts": found,
        "carried": carried.to_dict("records"),
        "hops": hops_page.shares(m.hops, p).to_dict("records"),
        "tests": tests.to_dict("records"),
        "deciding": deciding(found, tests, senders[f"slice at {roles[0]}"]),
        "one_stage": {"why": why} if found["one_stage"] is None else everything.iloc[0].to_dict(),
        "senders": {role: table.to_dict("records") for role, table in senders.items()},
        "sentences": sentences,
        "headline": [routed[0], *conclusions],
    }
    return finished(step, findings, {"groups": groups_figure(step, m), "senders": ranked(m, roles[0])}, CAPTIONS)
