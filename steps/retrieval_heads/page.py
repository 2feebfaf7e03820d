"""Step 06 on its page: which sites feed the slice, by which of four kinds of evidence.

1. `shares`, `direct_difference`: what whole groups of senders carry.
2. `outputs_table`, `attention_table`: what heads write and where they look, tested over heads; `margins`: the margin
   under an ablated path. `ranks` compares a head's numbers with those of other heads of the nearest layers.
3. `four_tests` puts them side by side, each with its verdict; `verdicts` says what follows, `findings` gathers numbers
   and sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import HTML, Markdown
from matplotlib.figure import Figure

from lib import effects, stats
from lib.effects import quad_matrix, reported
from lib.hooks import Site
from lib.paths import MLPS
from pipeline.population import people_of
from pipeline.step import Step
from report import interactive, plots, site_tables
from report.site_tables import picked
from report.words import (
    ONE_HALF,
    about_model,
    counted,
    finished,
    in_logits,
    interval,
    listed,
    number_word,
    of_row,
    shown,
    sites,
    tabled,
    top_sites,
    with_ends,
)
from steps.retrieval_heads import hops_page
from steps.retrieval_heads.measure import Family, Measured, RetrievalHeads, needed
from steps.retrieval_heads.outputs import BASELINES
from steps.retrieval_heads.routes import GROUPS, heads_of

UNITS = {
    "path": "logit_diff (logits)",
    "output tells the class": "accuracy above baseline",
    "written into the slice": "share of its input",
    "attends to the names": "share beyond even",
    "ablation of the path": "margin (logits)",
}
TESTS = tuple(UNITS)
# The four tests and their parts: a head writes the class that passes both parts of that test.
FOUR = {"path": TESTS[:1], "writes the class": TESTS[1:3], "attends to the names": TESTS[3:4], TESTS[4]: TESTS[4:]}
NUMBERED = {test: f"{number} {test}" for number, test in zip(("1", "2a", "2b", "3", "4"), TESTS, strict=True)}
# By a rank among other heads of the nearest layers. Not the probe: most heads' outputs tell the class, so that a rank
# among probes could never pick one out. It is a condition that a head must meet; the write and the path pick.
RANKED = (TESTS[2], TESTS[4])
BESIDE = ("at the unembedding", "output tells the profession")  # beside them, without a verdict
EMPTY = ["site", "component", "half", "estimate", "low", "high", "p", "quads"]
READ = "k and v at names"  # what the slice's heads read
CHANCE = "chance"
PASSED = "passed of 4"
PASSES = {"null": "ranked among", "smallest": "smallest p"}
SUPPORTED, NOT_SUPPORTED, NOT_TESTABLE = "supported", "not supported", "not testable"
NONE_READ = "the slice has no heads, or what they read at the names is not shown to carry anything"
NOT_WRITTEN = [{"senders": group, "mlps": mlps, "why": NONE_READ} for group, mlps in product(GROUPS, MLPS)]
NOT_MADE = "its tests were not made, or rest on too few quads"
CAPTIONS = {
    "groups": "What groups of senders carry of the gap to what the slice reads, other MLPs frozen and recomputed; "
    "confirmation half, intervals over quads.",
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


def written(records: pd.DataFrame, receivers: str, params: RetrievalHeads) -> pd.DataFrame:
    """What each set of senders carries of what these receivers are given, all that everything carries; confirmation
    half, by MLP mode. A ratio of sums, with its interval over quads; no rows where everything carries nothing."""
    own, parts = reported(records[records["receivers"] == receivers]), []
    for mlps, rows in own.groupby("mlps", sort=False):
        carried = quad_matrix(rows, "effect", ["site_set"], "sum")
        whole = carried.values[:, carried.sites["site_set"] == GROUPS.index("everything")]
        if effects.is_loss(whole[:, 0], params):
            spans = effects.columns(stats.ratio_intervals(carried.values, whole, params))
            parts.append(carried.sites.assign(**spans, receivers=receivers, mlps=mlps, quads=len(whole)))
    out = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["site_set"])
    return out.assign(senders=[GROUPS[index] for index in out["site_set"]])


def difference(records: pd.DataFrame, one: int, other: int, params: RetrievalHeads) -> stats.Interval:
    """The effect of one set of senders less that of another, per quad (logits), confirmation half; a kind of which
    there is none carries nothing."""
    matrix = quad_matrix(reported(records), "effect", ["site_set"])
    carried = {number: own for number, own in zip(matrix.sites["site_set"], matrix.values.T, strict=True)}
    none = np.zeros(len(matrix.quads))
    return stats.mean_interval(carried.get(one, none) - carried.get(other, none), params)


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
    """The fall of the margin (logits) under the ablated path of each set of senders; no rows where none was ablated."""
    own = m.ablation[m.ablation["position"] == role]
    if own.empty:
        return pd.DataFrame(columns=[*EMPTY, "kind", "ablation"])
    own = reported(own)
    matrix = quad_matrix(own, "margin_effect", ["site_set"])
    kinds, sets = zip(*(m.sets[role][index] for index in matrix.sites["site_set"]), strict=True)
    spans = effects.columns(stats.mean_intervals(matrix.values, params))
    return pd.DataFrame(spans).assign(
        kind=kinds,
        site=[listed(effects.site_name(*site) for site in together) for together in sets],
        ablation=own["ablation"].iloc[0],
        quads=len(matrix.quads),
    )


def flips(records: pd.DataFrame, params: RetrievalHeads) -> str:
    """How many of the answers that were right an ablation flips, with the share's interval over quads; one half."""
    right = records[records["metric_before"] > 0]  # the others have no answer to flip
    if right.empty:
        return "no answer, for every one was wrong already"
    units = (right["metric_after"] < 0).groupby(right["quad_id"]).agg(["sum", "count"])
    span = stats.proportion_interval(units["sum"], units["count"], params)
    share = interval(span.estimate, span.low, span.high)
    return f"{units['sum'].sum()} of the {len(right)} answers that were right ({share})"


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
    """The verdict of one test of one head, and why it cannot be tested, or which half fails (see `four_tests`)."""
    alpha = 1 - params.level
    if pd.isna(row["estimate"]):
        return NOT_TESTABLE, "not measured: too few quads of a class, or nothing of the slice behind it"
    if row["quads"] < stats.MINIMUM_CLUSTERS:
        return NOT_TESTABLE, f"{row['quads']:g} quads, {stats.MINIMUM_CLUSTERS} needed"
    if ranked and row["smallest"] > alpha:
        return NOT_TESTABLE, f"ranked among {row['null']:g} heads, {needed(family, params.level)} needed"
    here = pd.notna(row["low"]) and row["low"] > row.get("floor", 0) and row["p"] <= alpha
    if pd.notna(row["high"]) and row["high"] < 0:
        return NOT_SUPPORTED, "below zero"
    if not here and row["p"] <= alpha:
        return NOT_SUPPORTED, "its interval holds zero" if row["low"] <= 0 else "not above the model's noise"
    if here and not ranked and not row["passed"]:
        return NOT_SUPPORTED, "not significant in the discovery half"
    return (SUPPORTED if (here if ranked else row["passed"]) else NOT_SUPPORTED), ""


def four_tests(
    family: Mapping[str, Sequence[str]], tables: Mapping[str, pd.DataFrame], params: RetrievalHeads
) -> pd.DataFrame:
    """One row per head of a family and test, confirmation half: estimate, interval, p, the null's size, verdict.

    `family`: each head's null, by names; `tables` by test. In a RANKED test a head passes whose interval is above zero
    and whose rank among its null is significant (`ranks`); in the others one that is positive and familywise
    significant, over all senders or heads that were measured, in both halves.
    """
    rows, keep = [], ["estimate", "low", "high", "p", "alone", "null", "smallest", "quads"]
    floors = {TESTS[4]: params.floor}  # the only one of RANKED in logits
    for test, table in tables.items():
        own = (reported(table) if "half" in table and len(table) else table).set_index("site")
        if test in RANKED:
            known = {site: among for site, among in family.items() if site in own.index}
            own = own.drop(columns="p", errors="ignore").join(ranks(own["estimate"], known))
        elif len(own):
            own = own.assign(passed=own.index.isin(effects.confirmed(table, params)["site"]))
        for site, row in own.reindex(family).reindex(columns=[*keep, "passed"]).iterrows():
            row["floor"] = floors.get(test, 0)
            said, why = ("", "") if test in BESIDE else verdict(row, test in RANKED, len(family), params)
            rows.append({"site": site, "test": test, **row[keep], "verdict": said, "why": why})
    return pd.DataFrame(rows)


def tables_of(m: Measured, role: str, params: RetrievalHeads) -> dict[str, pd.DataFrame]:
    """What the four tests of heads at a role read, by test."""
    return {
        TESTS[0]: m.routes[f"slice at {role}"],
        TESTS[1]: beyond_baseline(m.outputs, role, params),
        TESTS[2]: outputs_table(m.outputs, role, "share", params),
        TESTS[3]: attention_table(m.attention, role, params),
        TESTS[4]: margins(m, role, params).query("kind != 'together'"),
        BESIDE[0]: outputs_table(m.outputs, role, "unembedded", params),
        BESIDE[1]: outputs_table(m.outputs, role, "profession_told", params),
    }


def names_of(family: Family) -> dict[str, list[str]]:
    """A family's heads and those that they are ranked among, by name."""
    return {effects.site_name(*site): [effects.site_name(*other) for other in own] for site, own in family.items()}


def tests_of(m: Measured, params: RetrievalHeads) -> pd.DataFrame:
    """The four tests of each role's candidates, and of the slice's own heads (`inside`) at the last token."""
    parts = []
    for role, asked in m.families.items():
        tables = tables_of(m, role, params) if asked else {}
        for inside in (False, True):
            if own := {site: among for site, among in asked.items() if (site in m.slice_sites) == inside}:
                tests = four_tests(names_of(own), tables, params)
                parts.append(tests.assign(role=role, inside=inside))
    columns = ["site", "test", "estimate", "low", "high", "p", "alone", "null", "smallest", "quads", "verdict", "why"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*columns, "role", "inside"])


def named_tests(m: Measured, params: RetrievalHeads) -> pd.DataFrame:
    """The four tests of the heads that the profile names, at the names; nothing is claimed of them."""
    tests = four_tests(names_of(m.named), tables_of(m, "names", params), params)
    return tests.assign(role="names", inside=False)


def passing(tests: pd.DataFrame, which: Sequence[str] = TESTS) -> dict[str, str]:
    """Of each head, by name and role, what these tests say together: supported if all are, not supported if one is not,
    else not testable."""
    said = tests[tests["test"].isin(which)].groupby(["site", "role"], sort=False)["verdict"].agg(set)
    one = {True: NOT_SUPPORTED, False: NOT_TESTABLE}
    return {key: SUPPORTED if all_of == {SUPPORTED} else one[NOT_SUPPORTED in all_of] for key, all_of in said.items()}


def passes(tests: pd.DataFrame) -> pd.DataFrame:
    """Which head passes which test, a row for each head: "yes", "no", or why that cannot be tested; how many of the
    four; the size of the null that its ranks are among, and the smallest p that they can give after the correction."""
    own = tests[tests["test"].isin(TESTS)]
    said = {SUPPORTED: "yes", NOT_SUPPORTED: "no"}
    own = own.assign(
        head=own["site"] + " at " + own["role"] + np.where(own["inside"].astype(bool), " (slice)", ""),
        said=own["verdict"].map(said).fillna(own["why"]),
    )
    wide = own.pivot_table(index="head", columns="test", values="said", aggfunc="first", sort=False)
    wide = wide.reindex(columns=list(TESTS)).rename(columns=NUMBERED)
    both = [(wide[[NUMBERED[part] for part in parts]] == "yes").all(axis=1) for parts in FOUR.values()]
    wide[PASSED] = pd.concat(both, axis=1).sum(axis=1)
    ranked = own.groupby("head", sort=False)[["null", "smallest"]].max().astype({"null": "Int64", "smallest": float})
    return wide.join(ranked).rename(columns=PASSES).reset_index()


def leaders(table: pd.DataFrame) -> pd.DataFrame:
    """The senders of largest discovery effect, in that order, with what the confirmation half gives."""
    return reported(picked(table, 20))[["site", "estimate", "low", "high", "p"]]


def edges_table(records: pd.DataFrame, params: RetrievalHeads) -> pd.DataFrame:
    """Edges of the two-hop path, confirmation half: source, target, mean effect (logits), its range over `quads`
    (`least`, `most`), and whether it is other than zero (familywise over all edges at one token, above the model's
    noise; nothing is claimed of too few quads)."""
    own = reported(records).assign(component=lambda frame: frame["sender"])
    there = np.where(own["position"] == "names", " at names", "")
    own = own.assign(source=effects.named(own) + there, target=own["receivers"])
    own = own.replace({"source": {"embed -1 at names": "names"}})
    parts = []
    for _, rows in own.groupby(["position", "mlps"], sort=False):
        matrix = quad_matrix(rows, "effect", ["source", "target"])
        found = matrix.sites.assign(**effects.familywise(matrix.values, params, floor=params.floor))
        ends = {"least": matrix.values.min(0), "most": matrix.values.max(0), "quads": len(matrix.quads)}
        parts.append(found.assign(significant=effects.significant(found, params), **ends))
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
    """The tests as the page shows them: a row for each head and test, but for what stands beside them where it was not
    measured."""
    tests = tests[tests["estimate"].notna() | ~tests["test"].isin(BESIDE)]
    said = [interval(row.estimate, row.low, row.high) if pd.notna(row.estimate) else "" for row in tests.itertuples()]
    out = tests.assign(head=tests["site"] + " at " + tests["role"], found=said, test=tests["test"].replace(NUMBERED))
    out["p"] = tests["p"].map(lambda p: f"{p:.2g}" if pd.notna(p) else "")
    out["null heads"] = tests["null"].map(lambda size: f"{size:g}" if pd.notna(size) else "")
    out["smallest"] = tests["smallest"].map(lambda p: f"{p:.2g}" if pd.notna(p) else "")
    out["verdict"] = out["verdict"] + tests["why"].map(lambda why: f" ({why})" if why else "")
    columns = ["head", "test", "found", "p", "null heads", "smallest", "verdict"]
    return out[columns].rename(columns=PASSES).reset_index(drop=True)


def head_panels(tables: Mapping[str, pd.DataFrame], params: RetrievalHeads) -> dict[str, dict[str, np.ndarray]]:
    """What `plots.heat_map` takes: heads' estimates at each role, and which are significant; confirmation half."""
    own = {f"at {role}": reported(table) for role, table in tables.items()}
    sure = {role: table.assign(sure=effects.significant(table, params)) for role, table in own.items()}
    return {
        "matrix": {role: site_tables.heads_matrix(table) for role, table in own.items()},
        "significant": {role: site_tables.heads_matrix(table, "sure") for role, table in sure.items()},
    }


def graph(edges: pd.DataFrame, senders: Sequence[Site], slice_sites: Sequence[Site]) -> tuple[list, pd.DataFrame]:
    """The lanes of the two-hop graph, from the names to the answer, and its edges."""
    written = [effects.site_name(*site) + " at names" for site in senders if site.layer >= 0]
    own = [effects.site_name(*site) for site in sorted(slice_sites)]
    before = [("names", ["names"]), ("sites at the names", written)] if written else []
    return [*before, ("slice, last token", own), ("answer", ["answer"])], edges


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
    sizes = (f"{counted(int(reported(table)['quads'].max()), 'quad')}" for table in (at_names, alone))
    axes = [f"{kind} prompts (logits, {size})" for kind, size in zip(("pair", "one-name"), sizes, strict=True)]
    return plots.agreement(beside(at_names, alone), "pair", "one", *axes, by="component", named=leaders)


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
    lines = {test: fill(NUMBERED[test], 14) for test in TESTS}
    whole = {part: test for test, parts in FOUR.items() for part in parts}
    about = {"site": tests["site"] + " at " + tests["role"], "test": tests["test"].map(lines)}
    named = tests.assign(passed=tests["verdict"] == SUPPORTED, whole=tests["test"].map(whole), **about)
    return plots.four_tests(named, {lines[test]: unit for test, unit in UNITS.items()}) if len(tests) else None


def named_table(step: Step, m: Measured) -> pd.DataFrame | Markdown:
    """Which of the heads that the profile names passes which test."""
    none = "The profile names no heads (`named_heads`)."
    return shown(passes(named_tests(m, step.params)), 3, none) if m.named else Markdown(none)


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
    return plots.circuit_graph(*graph(edges_table(m.edges, step.params), m.senders, m.slice_sites))


def circuit_graph(step: Step, m: Measured) -> HTML:
    """The same, to be asked site by site."""
    lanes, edges = graph(edges_table(m.edges, step.params), m.senders, m.slice_sites)
    return interactive.circuit_graph("fig-two-hop", lanes, edges, step.params.level)


# --- sentences ---


def edges_sentence(edges: pd.DataFrame) -> list[str]:
    """That the edges of the two-hop path have no intervals, where there are too few quads."""
    own = reported(edges) if len(edges) else edges
    quads, pairs = (own[name].nunique() for name in ("quad_id", "pair_id"))
    if not len(own) or quads >= stats.MINIMUM_CLUSTERS:
        return []
    return [
        f"The two-hop path is followed edge by edge on {pairs} pairs ({quads} quads) of the confirmation half, too few "
        f"for intervals ({stats.MINIMUM_CLUSTERS} quads needed): its edges are sizes, without a test."
    ]


def probe_sentences(table: pd.DataFrame, probes: pd.DataFrame) -> list[str]:
    """What the one-name prompts show, and how labels of several tokens were scored."""
    out = []
    for template, own in table.groupby("template", sort=False):
        each = [
            (f"{row.label}{', centred' * row.centred}", of_row(row), f"{row.chance:.2f}", row.people)
            for row in own.itertuples()
        ]
        columns = ("label", "comes first", "chance", "people")
        out.append(f'How often the right label comes first after "{template}":\n\n{tabled(columns, each)}')
    if probes["profession"].equals(probes["superset"]):  # the question has no finer labels
        return out
    parts = probes.drop_duplicates("profession").groupby("scored")["profession"].apply(sorted)
    for how in ("first token", "not: shares its first token"):
        if how in parts.index:
            what = "scored by their first token" if how == "first token" else "not scored, because they share it"
            out.append(f"Profession labels of several tokens, {what}: {listed(parts[how])}.")
    return out


def share_of(table: pd.DataFrame, senders: str, receivers: str, mlps: str) -> str:
    """One share with its interval, for a sentence."""
    own = table[(table["senders"] == senders) & (table["receivers"] == receivers) & (table["mlps"] == mlps)].iloc[0]
    return interval(own["estimate"], own["low"], own["high"])


def kinds_sentences(table: pd.DataFrame, parts: pd.DataFrame, where: str) -> list[str]:
    """What each kind of sites wrote: as shares of what all carry together (`written`), and of the gap (`shares`)."""
    given, shares = "read there" if where == READ else "given there", {"the whole gap": table}
    if {"frozen", "recomputed"} <= {*parts.get("mlps", ())}:
        shares = {f"what is {given}": parts} | shares
    names = {"MLPs": "MLPs", "heads": "heads", "embedding": "the embedding"}
    there = {kind: name for kind, name in names.items() if kind in {*table["senders"]}}
    how = {"frozen": "directly", "recomputed": "with MLPs that listen"}
    columns = ["written by", *(f"{way}, of {whole}" for whole in shares for way in how.values())]
    rows = [
        (name, *(share_of(own, kind, where, mlps) for own in shares.values() for mlps in how))
        for kind, name in there.items()
    ]
    return [
        f"Who wrote what is {given}, directly (other MLPs frozen) and with the MLPs that listen recomputed. The latter "
        "shares overlap, for what heads and the embedding write reaches the slice through MLPs, too.\n\n"
        + tabled(columns, rows)
    ]


def route_sentences(
    table: pd.DataFrame, parts: pd.DataFrame, gap: stats.Interval, where: str, floor: float = 0.0
) -> list[str]:
    """What the slice is given, and which kinds of sites wrote it; `where`: `k and v at names`, or its MLPs' inputs."""
    every = share_of(table, "everything", where, "recomputed")
    whole = f"Replacing all that the slice's MLPs are given at the last token takes away {every} of the gap"
    if where == READ:
        inputs = ("v at names", "k at names", "q at last")
        values, keys, queries = (share_of(table, "everything", one, "recomputed") for one in inputs)
        whole = (
            f"Replacing all that the slice's heads read at the names' tokens takes away {every} of the gap between "
            f"clean and corrupt. Their values alone take away {values}, their keys alone {keys}. What their queries "
            f"are given at the last token, replaced alone, takes away {queries}"
        )
    more = "more than" if gap.low is not None and gap.low > floor else "not significantly more than"
    more = "less than" if gap.high is not None and gap.high < -floor else more
    return [
        f"{whole}.",
        *kinds_sentences(table, parts, where),
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
        together = [kind for kind, _ in m.sets[role]].index("together")
        own = reported(m.ablation[(m.ablation["position"] == role) & (m.ablation["site_set"] == together)])
        which = sites(effects.site_name(*site) for site in m.sets[role][together][1])
        out.append(
            f"Ablating only the paths into the slice of {which} at `{role}` ({row['ablation']}) lowers the margin by "
            f"{of_row(row)} logits. It flips {flips(own, params)}."
        )
    return out


def outside_of(tests: pd.DataFrame) -> pd.DataFrame:
    """The tests of heads outside the slice."""
    return tests[~tests["inside"].astype(bool) & tests["test"].isin(TESTS)]


def any_head(tests: pd.DataFrame) -> dict[str, float]:
    """Whether any head outside the slice passes all its tests: how many do; the p value of that, the smallest over them
    of a head's largest, ranks uncorrected, times all heads put to the tests at all roles; and the smallest p that the
    ranks could give."""
    own = outside_of(tests)
    p = own["alone"].astype(float).fillna(own["p"].astype(float)).fillna(1.0)
    largest = p.groupby([own["site"], own["role"]]).max()
    passed = [key for key, said in passing(own).items() if said == SUPPORTED]
    smallest = (1 / (1 + own["null"].dropna().astype(float))).max() if len(own) else np.nan
    return {
        "estimate": len(passed),
        "p": min([1.0, *(len(largest) * largest[key] for key in passed)]),
        "smallest": 0.0 if np.isnan(smallest) else len(largest) * smallest,
        "heads": len(largest),
    }


def verdicts(
    tests: pd.DataFrame, m: Measured, reads: pd.Series | None, gap: stats.Interval, params: RetrievalHeads
) -> dict:
    """The possible answers of the step, each true, false or None (not testable), with the heads concerned.

    `reads`: the share of the gap that the slice reads at the names, with its interval; `gap`: MLPs less heads there.
    Where no head is a candidate, enough quads to find one decide that there is none. The slice's own heads face the
    same tests as the candidates.
    """
    outside, inside = (passing(tests[tests["inside"].astype(bool) == own]) for own in (False, True))
    decided = NOT_TESTABLE not in outside.values() and all(
        m.heads[role] or m.routes[f"slice at {role}"]["quads"].min() >= stats.MINIMUM_CLUSTERS for role in m.heads
    )
    heads: dict[str, list[str]] = {}
    for (site, role), said in outside.items():
        if said == SUPPORTED:
            heads.setdefault(role, []).append(site)
    some, alpha = any_head(tests), 1 - params.level
    could = some["smallest"] < alpha if heads else decided
    own = [site for (site, _), said in inside.items() if said == SUPPORTED]
    low = None if reads is None else reads["low"]
    unknown = low is None or pd.isna(low) or (not own and NOT_TESTABLE in inside.values())
    return {
        "retrieval_heads": heads,
        "two_stages": True if heads and some["p"] < alpha else False if could else None,
        "slice_heads_that_retrieve": own,
        "one_stage": None if unknown else bool(own) and bool(low > 0.5),
        "mlps_at_the_names": None if gap.low is None or reads is None else gap.low > params.floor,
    }


def verdict_sentences(found: dict, tests: pd.DataFrame, reads: pd.Series | None = None) -> list[str]:
    """The verdicts in words; `reads` as `verdicts` takes it."""
    heads = [f"{sites(own)} at `{role}`" for role, own in found["retrieval_heads"].items()] or ["no head"]
    each, some = passing(outside_of(tests)), any_head(tests)
    open_ones = [f"{site} at `{role}`" for (site, role), said in each.items() if said == NOT_TESTABLE]
    inside = tests.loc[tests["inside"].astype(bool), "site"].nunique()
    answers = {True: SUPPORTED, False: NOT_SUPPORTED, None: f"{NOT_TESTABLE} here"}
    why = f"{NOT_TESTABLE} here (too few quads, or the slice has no heads)"
    more = {True: "shown", False: "not shown", None: why}
    there = "" if reads is None else f" ({with_ends(reads)}, with what they pass on at the tokens between)"
    p = f" (p = {some['p']:.2g}, corrected for all heads of all roles)" * bool(found["retrieval_heads"])
    inside_heads = found["slice_heads_that_retrieve"]
    by_themselves = f"Of the slice's {counted(inside, 'head')}, {sites(inside_heads)} by "
    by_themselves += f"{'itself passes' if len(inside_heads) == 1 else 'themselves pass'} the same four tests."
    if not inside_heads:
        by_themselves = "No head of the slice passes the same four tests by itself."
    put = counted(some["heads"], "head")
    return [
        f"Retrieval heads outside the slice, by all four tests: {listed(heads)} of the {put} put to them"
        + f" ({NOT_TESTABLE} at this size: {sites(open_ones)})" * bool(open_ones)
        + f". Two stages, names to retrieval heads to slice: {answers[found['two_stages']]}{p}.",
        f"One stage, the slice's own heads together reading over half of the gap at the names{there}, and one of them "
        f"at least passing all four tests: {answers[found['one_stage']]}. {by_themselves}",
        "That MLPs at the names write directly more of what the slice reads there than heads do is "
        f"{more[found['mlps_at_the_names']]}. How much of it each writes, page 10 judges.",
    ]


def heads_tests(tests: pd.DataFrame) -> str:
    """Which of the four tests each head passes."""
    by_test = {test: passing(tests, parts) for test, parts in FOUR.items()}
    out = []
    for site, role in dict.fromkeys(zip(tests["site"], tests["role"], strict=True)):
        held = [test for test, said in by_test.items() if said[site, role] == SUPPORTED]
        passed = "all four" if len(held) == len(FOUR) else " and ".join(held) or "no test"
        out.append(f"{sites([site])}: {passed}")
    return "; ".join(out)


def passed_by(tests: pd.DataFrame, test: str) -> list[tuple[str, int, int]]:
    """How many heads pass one of the four tests, and of how many it is not testable; of one of two parts, each part."""
    parts = FOUR.get(test, (test,))
    said = [*passing(tests, parts).values()]
    rows = [(test, said.count(SUPPORTED), said.count(NOT_TESTABLE))]
    return rows + [row for part in parts if len(parts) > 1 for row in passed_by(tests, part)]


def test_sentences(tests: pd.DataFrame) -> list[str]:
    """How many heads pass each test, and what the ranks can resolve; the table has each head's way through them."""
    out = []
    for inside, words in ((False, "outside the slice"), (True, "of the slice")):
        own = tests[(tests["inside"] == inside) & tests["test"].isin(TESTS)]
        count = own.groupby(["site", "role"]).ngroups
        if not count:
            continue
        each = [row for test in FOUR for row in passed_by(own, test)]
        which = f" Which head passes which: {heads_tests(own)}." * inside
        columns = ("test", "passed by", NOT_TESTABLE)
        out.append(
            f"How many of the {counted(count, 'head')} {words} pass each test.{which}\n\n{tabled(columns, each)}"
        )
        if len(null := own["null"].dropna().astype(int)):
            least, most, family = null.min(), null.max(), "of the slice" if inside else "of a role"
            out.append(
                f"Each of these is ranked among {least}{f' to {most}' * bool(most > least)} other heads; the smallest "
                f"p that a rank can give, after Holm's correction over the heads {family}, is "
                f"{own['smallest'].max():.2g}."
            )
    return out


def named_sentences(m: Measured, params: RetrievalHeads) -> list[str]:
    """What the tests say of the heads that the profile names."""
    if not m.named:
        return []
    tests = named_tests(m, params)
    return [
        f"The {counted(len(m.named), 'head')} that the profile names, tested at `names` as a family of their own, pass "
        f"as follows: {heads_tests(tests)}. The smallest p that a rank can give them, after the correction, is "
        f"{tests['smallest'].max():.2g}."
    ]


def probe_sentence(m: Measured, role: str, params: RetrievalHeads) -> str:
    """How many heads' outputs tell the class better than what is known without the model."""
    told, (best, known) = beyond_baseline(m.outputs, role, params), baseline(m.outputs, role)
    if told.empty or reported(told)["quads"].min() < stats.MINIMUM_CLUSTERS:
        return f"What a probe tells from heads' outputs at `{role}` is {NOT_TESTABLE}: too few quads."
    sure, of, against = effects.confirmed(told, params), told["site"].nunique(), CHANCE
    if best != CHANCE:
        against = f"the people's {best} do (these are {reported(known)['told'].mean():.2f} above chance)"
    said = (
        f"At `{role}`, a held-out linear probe tells the class from the outputs of {len(sure)} of {of} heads better "
        f"than {against}, in both halves."
    )
    return said + " So many meet this condition that it singles out none." * (len(sure) > of / 2)


def senders_sentence(table: pd.DataFrame, role: str, params: RetrievalHeads, count: int = 6) -> str:
    """The leading senders of a route."""
    leading = reported(picked(table, count))
    sure = effects.confirmed(table, params)
    words = {"head": "head", "attn": "attention module", "mlp": "MLP"}
    there = {kind: word for kind, word in words.items() if kind in {*table["component"]}}
    counts = {word: int((sure["component"] == kind).sum()) for kind, word in there.items()}
    kinds = [f"{number_word(count)} {word}{'s' * (count != 1)}" for word, count in counts.items()]
    kinds = ["the embedding"] * (not sure["component"].isin(list(words)).all()) + kinds
    asked, few = reported(table)["site"].nunique(), int(reported(table)["quads"].min())
    told = f"Significant in both halves are {listed(kinds)}, of {asked} that were followed to the other half"
    if few < stats.MINIMUM_CLUSTERS:
        told = f"Whether they are significant is {NOT_TESTABLE} ({few} quads, {stats.MINIMUM_CLUSTERS} needed)"
    return (
        f"At `{role}`, of {counted(table['site'].nunique(), 'sender')}, the largest path effect into the slice on the "
        f"discovery half is that of {top_sites(table, count)}; in brackets what the confirmation half gives "
        f"({in_logits(leading, 'familywise intervals')}). {told}." + ONE_HALF * (table["half"].nunique() == 1)
    )


def attention_sentence(looks: Mapping[str, pd.DataFrame], slice_sites: Sequence[Site]) -> str:
    """How the slice's heads attend from the last token."""
    table = reported(looks["last"]).set_index("site")
    heads = [effects.site_name(*site) for site in slice_sites if site.component == "head"]
    each = sorted((table.loc[head, "share"], head) for head in heads if head in table.index)
    even = (table["share"] - table["estimate"]).mean()
    if not each:
        return "No head of the slice attends from the last token: it has none in this table."
    ends = [f"{share:.0%} ({sites([head])})" for share, head in (each if len(each) == 1 else (each[0], each[-1]))]
    return (
        f"From the last token the slice's heads pay {' to '.join(ends)} of their attention to the names' tokens; an "
        f"even spread would give {even:.0%}."
    )


def given_sentences(step: Step, m: Measured) -> list[str]:
    """What could not be asked of the pairs of a `pairs_file`."""
    if step.params.pairs_file is None:
        return []
    pairs, people, out = step.pairs(), people_of(step), []
    names = pairs[[f"{side}_{slot}" for side in ("clean", "corrupt") for slot in "abc"]].to_numpy().ravel()
    if missed := [name for name in dict.fromkeys(names) if name and name not in set(people["name"])]:
        few = ", ".join(missed[:10]) + ", ..." * (len(missed) > 10)
        out.append(
            f"The professions of {counted(len(missed), 'name')} of the pairs are not known ({few}: not in the table of "
            "people), so that a profession is not told from what heads write at these names; the class is the pair's."
        )
    if heads_of(m.slice_sites) and step.params.one_name_pairs and "slice in one-name prompts" not in m.routes:
        out.append(
            f"No two names that stand for each other line up in `{step.params.topic.alone}`, a prompt of one name: "
            "senders were not patched there."
        )
    return out


def findings(step: Step, m: Measured) -> dict[str, Any]:
    """The findings of step 06."""
    p = step.params
    where = READ if heads_of(m.slice_sites) else m.groups["receivers"].iloc[0]
    carried, more, parts = shares(m.groups, p), direct_difference(m, where, p), written(m.groups, where, p)
    tests, hops = tests_of(m, p), hops_page.shares(m.hops, p)
    everything = carried[(carried["senders"] == "everything") & (carried["receivers"] == READ)]
    roles, between = list(m.heads), m.routes.get("slice at between")
    reads = everything.iloc[0] if len(everything) else None
    found = verdicts(tests, m, reads, more, p)
    why = "what the slice reads at the names, or its heads' tests, rest on too few quads, or it has no heads"
    conclusions, routed = verdict_sentences(found, tests, reads), route_sentences(carried, parts, more, where, p.floor)
    sentences = [
        *probe_sentences(probe_table(m.probes, p), m.probes),
        *(senders_sentence(m.routes[f"slice at {role}"], role, p) for role in roles),
        *routed,
        *hops_page.sentences(hops),
        *hops_page.both_hops(hops, everything),
        *([senders_sentence(between, "between", p)] if between is not None else []),
        *(probe_sentence(m, role, p) for role in roles),
        *([attention_sentence(looks_of(m, p), m.slice_sites)] if "names" in roles else []),
        *ablation_sentences(m, p),
        *test_sentences(tests),
        *named_sentences(m, p),
        *edges_sentence(m.edges),
        *given_sentences(step, m),
        *conclusions,
    ]
    findings = {
        "model": about_model(step),
        "task": p.task,
        "able": True,
        "verdicts": found,
        "carried": carried.to_dict("records"),
        "written": parts.to_dict("records") if where == READ and len(parts) else NOT_WRITTEN,
        "hops": hops.to_dict("records"),
        "tests": tests.to_dict("records"),
        "named_tests": named_tests(m, p).to_dict("records") if m.named else [],
        "two_stages": {"why": NOT_MADE}
        if found["two_stages"] is None and not found["retrieval_heads"]
        else any_head(tests),
        "one_stage": {"why": why} if found["one_stage"] is None else everything.iloc[0].to_dict(),
        "edges": edges_table(m.edges, p).to_dict("records"),
        "senders": {role: leaders(table).to_dict("records") for role, table in m.routes.items()},
        "sentences": sentences,
        "headline": [routed[0], *conclusions],
    }
    return finished(step, findings, {"groups": groups_figure(step, m), "senders": ranked(m, roles[0])}, CAPTIONS)
