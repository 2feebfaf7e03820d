"""Step 06 on its page: which sites feed the slice, by which of four kinds of evidence.

1. `shares`, `direct_difference`: what whole groups of senders carry.
2. `contrast_table`, `attention_table`: what the sites write and where they look, tested over sites.
3. `verification_table`: the margin under an ablated path, against matched random heads.
4. `four_tests` puts them side by side; `verdicts` says what follows, `findings` gathers numbers and sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lib import effects, stats
from lib.effects import quad_matrix, reported
from lib.hooks import Site
from pipeline.step import Step
from report import plots, site_tables
from report.site_tables import picked
from report.words import ONE_HALF, about_model, finished, in_logits, interval, listed, top_sites
from steps.retrieval_heads.measure import Measured, RetrievalHeads
from steps.retrieval_heads.routes import GROUPS

UNITS = {
    "path": "logit_diff (logits)",
    "writes the profession": "contrast (logits)",
    "attends to the names": "share beyond even",
    "ablation of the path": "margin (logits)",
}
TESTS = tuple(UNITS)
CAPTIONS = {
    "two-hop": "From the names to the answer: the width of an edge is the effect of its path on "
    "logit_diff (logits, confirmation half); dashed edges are not significant over all edges at "
    "their token together.",
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


def direct_difference(m: Measured, params: RetrievalHeads) -> stats.Interval:
    """What MLPs at the names carry beyond what heads there carry, directly: MLPs between are frozen."""
    direct = only(m.groups, "k and v at names", "frozen")
    return difference(direct, GROUPS.index("MLPs"), GROUPS.index("heads"), params)


def tested(records: pd.DataFrame, value: str, params: RetrievalHeads) -> pd.DataFrame:
    """Mean of a column per site over quads, both halves, familywise intervals and p values."""
    out = effects.by_half(records.dropna(subset=[value]), lambda own: effects.tested(own, params, value))
    return out.assign(site=effects.named(out))


def contrast_table(values: pd.DataFrame, role: str, kind: str, params: RetrievalHeads) -> pd.DataFrame:
    """What the sites at `names` or `last` write: `tested` for a contrast (profession, within, superset)."""
    at = values["position"].str.startswith("name_") if role == "names" else values["position"] == role
    return tested(values[at].drop(columns="position"), f"{kind}_contrast", params)


def attention_table(attention: pd.DataFrame, role: str, params: RetrievalHeads) -> pd.DataFrame:
    """Attention to the names' tokens beyond an even spread: from `last` to all names, from a name to its own tokens."""
    at = attention["position"].str.startswith("name_") if role == "names" else attention["position"] == role
    by = ["pair_id", "quad_id", "half", "layer", "head", "position"]
    own = attention[at].groupby(by, sort=False, observed=True)[["share", "uniform"]].sum().reset_index()
    own = own.assign(component="head", excess=own["share"] - own["uniform"])
    table = tested(own.drop(columns="position"), "excess", params)
    shares = own.groupby(["half", "layer", "head"])["share"].mean()
    return table.join(shares, on=["half", "layer", "head"])


def writes_of(m: Measured, params: RetrievalHeads) -> dict[str, pd.DataFrame]:
    """What the sites write of the right profession, at the names and at the last token."""
    return {role: contrast_table(m.values, role, "within", params) for role in ("names", "last")}


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


def verification_table(
    records: pd.DataFrame, sets: Sequence[tuple[str, tuple]], params: RetrievalHeads
) -> pd.DataFrame:
    """The margin under an ablated path, per set of senders: its fall (logits) with an interval, and answers that flip.

    `sets` are (kind, sites) in the order of `site_set`; kinds are `candidate`, `together`, `slice`, `random`,
    `random together`. `p_random`: the share of matched random ones whose fall is at least as large, itself counted.
    """
    own = reported(records)
    matrix = quad_matrix(own, "margin_effect", ["site_set"])
    spans = stats.mean_intervals(matrix.values, params)
    flipped = (own["metric_before"] > 0) & (own["metric_after"] < 0)
    out = matrix.sites.assign(**effects.columns(spans), flips=flipped.groupby(own["site_set"]).mean().to_numpy())
    out = out.assign(
        kind=[sets[index][0] for index in out["site_set"]],
        site=[listed(effects.site_name(*site) for site in sets[index][1]) for index in out["site_set"]],
    )
    for kinds, other in ((("candidate", "slice"), "random"), (("together",), "random together")):
        random = out.loc[out["kind"] == other, "estimate"].to_numpy()
        for index in out.index[out["kind"].isin(kinds)]:
            larger = (random >= out.loc[index, "estimate"]).sum()
            out.loc[index, "p_random"] = (1 + larger) / (1 + len(random)) if len(random) else np.nan
    return out


def verification_tables(
    records: pd.DataFrame, sets: Mapping[str, Sequence[tuple[str, tuple]]], params: RetrievalHeads
) -> dict[str, pd.DataFrame]:
    """`verification_table` of each role, with the ablation that was run (see `hops.ablation_units`)."""
    out = {}
    for role, own in sets.items():
        rows = records[records["position"] == role]
        if len(rows):
            out[role] = verification_table(rows, own, params).assign(ablation=rows["ablation"].iloc[0])
    return out


def four_tests(
    sites: Sequence[Site],
    path: pd.DataFrame,
    writes: pd.DataFrame,
    looks: pd.DataFrame,
    ablated: pd.DataFrame,
    params: RetrievalHeads,
) -> pd.DataFrame:
    """One row per site and test, confirmation half: estimate, interval, and whether it passed.

    The path, what is written (within the own superset) and the attention pass when familywise significant and positive
    in both halves; the ablation when its interval is above zero and no more than 5% of matched random heads do as much.
    """
    rows = []
    for site in sites:
        name = effects.site_name(*site)
        for test, table in zip(TESTS, (path, writes, looks), strict=False):
            passed = name in set(effects.confirmed(table, params)["site"])
            own = reported(table)
            rows += [
                (name, test, row.estimate, row.low, row.high, passed) for row in own[own["site"] == name].itertuples()
            ]
        for row in ablated[(ablated["site"] == name) & ablated["kind"].isin(["candidate", "slice"])].itertuples():
            low = -np.inf if row.low is None or pd.isna(row.low) else row.low
            rows.append((name, TESTS[3], row.estimate, row.low, row.high, low > 0 and row.p_random <= 1 - params.level))
    return pd.DataFrame(rows, columns=["site", "test", "estimate", "low", "high", "passed"])


def tests_of(m: Measured, params: RetrievalHeads) -> dict[str, pd.DataFrame]:
    """The four tests of each role's candidates and of the slice's own heads."""
    margins = verification_tables(m.ablation, m.sets, params)
    writes, looks = writes_of(m, params), looks_of(m, params)
    return {
        role: four_tests(
            [*sites, *inside(m.sets[role])],
            m.routes[f"slice at {role}"],
            writes[role],
            looks[role],
            margins[role],
            params,
        )
        for role, sites in m.heads.items()
        if role in margins
    }


def passing(tests: pd.DataFrame, which: Sequence[str] = TESTS) -> list[str]:
    """Sites that pass all of these tests; a site at which one was not made does not."""
    own = tests[tests["test"].isin(which)]
    count = own.groupby("site", sort=False)["passed"].sum()
    return count.index[count == len(which)].tolist()


def edges_table(records: pd.DataFrame, params: RetrievalHeads) -> pd.DataFrame:
    """Edges of the two-hop path, confirmation half: source, target, mean effect (logits), and whether it is other than
    zero (max-T over all edges at one token; nothing is claimed of too few quads)."""
    own = reported(records).assign(component=lambda frame: frame["sender"])
    there = np.where(own["position"] == "names", " at names", "")
    own = own.assign(source=effects.named(own) + there, target=own["receivers"])
    own = own.replace({"source": {"embed -1 at names": "names"}})
    parts = []
    for _, rows in own.groupby(["position", "mlps"], sort=False):
        matrix = quad_matrix(rows, "effect", ["source", "target"])
        sure = stats.max_t(matrix.values, params) <= 1 - params.level
        few = stats.too_few(len(matrix.quads)) is not None
        parts.append(matrix.sites.assign(estimate=matrix.values.mean(0), significant=sure & (not few)))
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


def inside(sets: Sequence[tuple[str, tuple]]) -> list[Site]:
    """The slice's own heads among the sets whose path was ablated."""
    return [own[0] for kind, own in sets if kind == "slice"]


def one_table(tests: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The four tests of both roles, the role beside the site's name."""
    parts = [table.assign(site=table["site"] + f" at {role}") for role, table in tests.items()]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["site", "test"])


def head_panels(tables: Mapping[str, pd.DataFrame], params: RetrievalHeads) -> dict[str, dict[str, np.ndarray]]:
    """What `plots.heat_map` takes: heads' estimates at each role, and which are significant; confirmation half."""
    own = {f"at {role}": reported(table) for role, table in tables.items()}
    sure = {role: table.assign(sure=table["p"] <= 1 - params.level) for role, table in own.items()}
    return {
        "matrix": {role: site_tables.heads_matrix(table) for role, table in own.items()},
        "significant": {role: site_tables.heads_matrix(table, "sure") for role, table in sure.items()},
    }


def graph(edges: pd.DataFrame, senders: Sequence[Site], slice_sites: Sequence[Site]) -> tuple[list, pd.DataFrame]:
    """The columns of the two-hop graph, from the names to the answer, and its edges."""
    written = [effects.site_name(*site) + " at names" for site in senders if site.layer >= 0]
    own = [effects.site_name(*site) for site in sorted(slice_sites)]
    columns = [("names", ["names"]), ("sites at the names", written), ("slice at the last token", own)]
    return [*columns, ("answer", ["answer"])], edges


# --- figures ---


def probes_figure(step: Step, m: Measured) -> Figure:
    """Superset and profession from one name."""
    return plots.probe_bars(probe_table(m.probes, step.params))


def ranked(m: Measured, role: str) -> Figure:
    """The senders of largest path effect at a role."""
    return plots.ranked_sites(picked(m.routes[f"slice at {role}"], 15), "path effect on logit_diff (logits)")


def pairs_and_names(m: Measured) -> Figure:
    """Senders at the names, pair prompts against one-name prompts."""
    at_names = m.routes["slice at names"]
    both = beside(at_names, m.routes["slice in one-name prompts"])
    leaders = picked(at_names, 6)["site"].drop_duplicates().tolist()
    axes = ("pair", "one", "pair prompts (logits)", "one-name prompts (logits)")
    return plots.agreement(both, *axes, by="component", named=leaders)


def groups_figure(step: Step, m: Measured) -> Figure:
    """What each group of senders carries."""
    carried = shares(m.groups, step.params)
    labelled = carried.assign(site=carried["senders"] + ", " + carried["receivers"].str.removesuffix(" at names"))
    return plots.ranked_sites(labelled, "share of the clean-to-corrupt gap", by="mlps")


def writes_figure(step: Step, m: Measured) -> Figure:
    """What each head writes of the right profession."""
    panels = head_panels(writes_of(m, step.params), step.params)
    return plots.heat_map(**panels, label="profession contrast within the superset (logits)")


def looks_figure(step: Step, m: Measured) -> Figure:
    """How much each head looks at the names."""
    panels = head_panels(looks_of(m, step.params), step.params)
    return plots.heat_map(**panels, label="attention beyond an even spread (share)")


def tests_figure(step: Step, m: Measured) -> Figure | None:
    """The four tests, where a path was ablated."""
    tests = tests_of(m, step.params)
    return plots.four_tests(one_table(tests), UNITS) if tests else None


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


def route_sentences(table: pd.DataFrame, gap: stats.Interval) -> list[str]:
    """What the slice's heads read at the names, and which kinds of sites wrote it."""
    every = {kind: share_of(table, "everything", f"{kind} at names", "recomputed") for kind in ("k and v", "v", "k")}
    direct = {name: share_of(table, name, "k and v at names", "frozen") for name in ("MLPs", "heads", "embedding")}
    through = {name: share_of(table, name, "k and v at names", "recomputed") for name in direct}
    more = "more than" if gap.low is not None and gap.low > 0 else "not significantly more than"
    less = gap.high is not None and gap.high < 0
    return [
        f"Replacing all that the slice's heads read at the names' tokens takes away {every['k and v']} of the gap "
        f"between clean and corrupt; their values alone {every['v']}, their keys alone {every['k']}.",
        f"Directly (other MLPs frozen), the MLPs at the names carry {direct['MLPs']} of it, the heads "
        f"{direct['heads']} and the embedding {direct['embedding']}; with the MLPs that listen recomputed, "
        f"{through['MLPs']}, {through['heads']} and {through['embedding']}.",
        f"Directly, the MLPs at the names carry {'less than' if less else more} the heads there: a difference of "
        f"{interval(gap.estimate, gap.low, gap.high)} logits.",
    ]


def ablation_sentences(tables: Mapping[str, pd.DataFrame], params: RetrievalHeads) -> list[str]:
    """What ablating the paths of the candidates costs, beside matched random heads."""
    out = []
    for role, table in tables.items():
        together = table[table["kind"] == "together"]
        if together.empty:
            out.append(f"No head at `{role}` outside the slice has a path into it that is significant on discovery.")
            continue
        row, random = together.iloc[0], table[table["kind"] == "random together"]
        beside = f"{random['estimate'].mean():.2f} on average over {len(random)} sets of matched random heads"
        verdict = "more than" if row["p_random"] <= 1 - params.level else "not significantly more than"
        fall = interval(row["estimate"], row["low"], row["high"])
        out.append(
            f"Ablating only the paths into the slice of {row['site']} at `{role}` ({row['ablation']}) lowers the "
            f"margin by {fall} logits and flips {row['flips']:.0%} of the answers: {verdict} matched random heads "
            f"({beside})."
        )
    return out


def verdicts(
    tests: Mapping[str, pd.DataFrame], slice_sites: Sequence[Site], reads: pd.Series, gap: stats.Interval
) -> dict:
    """The four possible answers of the step, each true, false or None (not decided), with the heads concerned.

    `reads`: the share of the gap that the slice reads at the names, with its interval; `gap`: MLPs less heads there.
    """
    own = {effects.site_name(*site) for site in slice_sites}
    heads = {role: [site for site in passing(table) if site not in own] for role, table in tests.items()}
    inside = [site for site in passing(tests["last"], TESTS[1:3]) if site in own] if "last" in tests else []
    low = reads["low"]
    return {
        "retrieval_heads": {role: sites for role, sites in heads.items() if sites},
        "two_stages": any(heads.values()),
        "slice_heads_that_retrieve": inside,
        "one_stage": None if low is None or pd.isna(low) else bool(inside) and bool(low > 0.5),
        "mlps_at_the_names": None if gap.low is None else gap.low > 0,
    }


def verdict_sentences(found: dict, tests: Mapping[str, pd.DataFrame]) -> list[str]:
    """The verdicts in words."""
    heads = [f"{listed(sites)} at `{role}`" for role, sites in found["retrieval_heads"].items()]
    asked = sum(table["site"].nunique() for table in tests.values())
    answers = {True: "supported", False: "not supported", None: "not decided"}
    return [
        f"Retrieval heads outside the slice, by all four tests: {listed(heads)}, of {asked} heads put to them "
        f"(the slice's own included). Two stages, names to retrieval heads to slice: {answers[found['two_stages']]}.",
        f"Retrieval and aggregation are one stage, the slice's own heads reading the names and writing professions: "
        f"{answers[found['one_stage']]}; slice heads that attend to the names and write the right profession: "
        f"{listed(found['slice_heads_that_retrieve'])}.",
        f"MLPs at the names, not heads, write what the slice reads: {answers[found['mlps_at_the_names']]}.",
    ]


def senders_sentence(table: pd.DataFrame, role: str, params: RetrievalHeads, count: int = 6) -> str:
    """The leading senders of a route."""
    leading = reported(picked(table, count))
    sure = effects.confirmed(table, params)
    sites = {"head": "heads", "mlp": "MLPs"}
    kinds = [f"{(sure['component'] == kind).sum()} {word}" for kind, word in sites.items()]
    kinds = ["the embedding"] * (not sure["component"].isin(list(sites)).all()) + kinds
    return (
        f"At `{role}`, the senders of largest path effect into the slice are {top_sites(table, count)} "
        f"({in_logits(leading, 'familywise intervals')}); significant in both halves are {listed(kinds)}, of "
        f"{table['site'].nunique()} senders." + ONE_HALF * (table["half"].nunique() == 1)
    )


def write_sentence(
    writes: Mapping[str, pd.DataFrame], heard: Mapping[str, set], slice_sites: Sequence[Site], params: RetrievalHeads
) -> str:
    """How many of the sites that the slice can hear write the right profession, and which lead."""
    own = {effects.site_name(*site) for site in slice_sites}
    parts = []
    for role, table in writes.items():
        table = table[table["site"].isin(heard[role])]
        sure = effects.confirmed(table, params)
        top = [f"{row.site} ({interval(row.estimate, row.low, row.high)})" for row in sure.head(4).itertuples()]
        count = f"at `{role}` {len(sure)} of {table['site'].nunique()} heads and MLPs"
        if top:
            scale = in_logits(sure, "familywise intervals")
            count += f", most of all {listed(top)} ({scale}); of the slice {listed(sorted(own & set(sure['site'])))}"
        parts.append(count)
    return (
        "Of what the slice can hear, the right profession is favoured over the others of its superset, significantly "
        f"in both halves, by {'; '.join(parts)}."
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
    carried, more = shares(m.groups, step.params), direct_difference(m, step.params)
    writes, looks = writes_of(m, step.params), looks_of(m, step.params)
    margins = verification_tables(m.ablation, m.sets, step.params)
    tests = tests_of(m, step.params)
    p, keep = step.params, ["site", "estimate", "low", "high", "p"]
    everything = carried[(carried["senders"] == "everything") & (carried["receivers"] == "k and v at names")].iloc[0]
    heard = {role: set(m.routes[f"slice at {role}"]["site"]) for role in writes}
    found = verdicts(tests, m.slice_sites, everything, more)
    conclusions = verdict_sentences(found, tests)
    sentences = [
        *probe_sentences(probe_table(m.probes, p), m.probes),
        *(senders_sentence(m.routes[f"slice at {role}"], role, p) for role in ("names", "last")),
        *route_sentences(carried, more),
        write_sentence(writes, heard, m.slice_sites, p),
        attention_sentence(looks, m.slice_sites),
        *ablation_sentences(margins, p),
        *conclusions,
    ]
    findings = {
        "model": about_model(step),
        "task": p.task,
        "able": True,
        "verdicts": found,
        "carried": carried.to_dict("records"),
        "tests": one_table(tests).to_dict("records"),
        "senders": {
            role: reported(table)[keep].nlargest(20, "estimate").to_dict("records") for role, table in m.routes.items()
        },
        "sentences": sentences,
        "headline": [route_sentences(carried, more)[0], *conclusions],
    }
    return finished(step, findings, {"two-hop": two_hop(step, m), "senders": ranked(m, "names")}, CAPTIONS)
