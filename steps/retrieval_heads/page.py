"""Step 06 from its tables to its sentences: which sites feed the slice, by which of four kinds of evidence.

1. `senders_table`, `shares`, `difference`: path effects with familywise intervals, and what whole groups carry.
2. `contrast_table`, `attention_table`: what the sites write and where they look, tested over sites.
3. `verification_table`: the margin under an ablated path, against matched random heads.
4. `four_tests` puts them side by side; `verdicts` and `findings_of` say what follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from lib import effects, stats
from lib.effects import SITE, in_halves, quad_matrix, reported
from lib.hooks import Site
from lib.records import ANALYSED
from report.words import listed
from steps.retrieval_heads.measure import RetrievalHeads

COLUMNS = [*ANALYSED, "site_set", "sender", "receivers", "mlps"]
UNITS = {
    "path": "logit_diff (logits)",
    "writes the profession": "contrast (logits)",
    "attends to the names": "share beyond even",
    "ablation of the path": "margin (logits)",
}
TESTS = tuple(UNITS)


def senders_table(records: pd.DataFrame, params: RetrievalHeads) -> pd.DataFrame:
    """`findings.both_halves` over the senders of one route."""
    table = effects.both_halves(records.assign(component=records["sender"]), params)
    return table.assign(site=table["site"].replace("embed -1", "embedding"))


def shares(records: pd.DataFrame, names: Sequence[str], params: RetrievalHeads) -> pd.DataFrame:
    """What each set of senders carries of the clean-to-corrupt gap, confirmation half, by receivers and MLP mode."""
    own = in_halves(records)[-1][1]
    parts = []
    for (receivers, mlps), rows in own.groupby(["receivers", "mlps"], sort=False):
        parts.append(effects.curve(rows, params, ["site_set"]).assign(receivers=receivers, mlps=mlps))
    out = pd.concat(parts, ignore_index=True)
    return out.assign(senders=[names[index] for index in out["site_set"]])


def difference(records: pd.DataFrame, one: int, other: int, params: RetrievalHeads) -> stats.Interval:
    """The effect of one set of senders less that of another, per quad (logits), confirmation half."""
    matrix = quad_matrix(in_halves(records)[-1][1], "effect", ["site_set"]).values
    return stats.mean_interval(matrix[:, one] - matrix[:, other], params)


def tested(records: pd.DataFrame, value: str, params: RetrievalHeads) -> pd.DataFrame:
    """Mean of a column per site over quads, both halves, familywise intervals and p values."""
    parts = []
    for half, own in in_halves(records.dropna(subset=[value])):
        matrix = quad_matrix(own, value, SITE)
        spans = stats.simultaneous(matrix.values, params)
        test = stats.max_t(matrix.values, params)
        parts.append(matrix.sites.assign(**effects.columns(spans), p=test.p, quads=len(matrix.quads), half=half))
    out = pd.concat(parts, ignore_index=True)
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


def only(records: pd.DataFrame, receivers: str, mlps: str) -> pd.DataFrame:
    """The rows of one route and MLP mode."""
    return records[(records["receivers"] == receivers) & (records["mlps"] == mlps)]


def beside(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """Each sender's effect in pair prompts (`pair`) and in one-name prompts (`one`), confirmation half."""
    own = reported(one)[["site", "component", "estimate"]].rename(columns={"estimate": "pair"})
    return own.merge(reported(other)[["site", "estimate"]].rename(columns={"estimate": "one"}), on="site")


def leading(table: pd.DataFrame, count: int) -> list[Site]:
    """The senders of largest discovery effect, in the order of the layers."""
    first = table[table["half"] == table["half"].iloc[0]].nlargest(count, "estimate")
    return sorted(Site(*row) for row in first[SITE].itertuples(index=False))


def verification_table(
    records: pd.DataFrame, sets: Sequence[tuple[str, tuple]], params: RetrievalHeads
) -> pd.DataFrame:
    """The margin under an ablated path, per set of senders: its fall (logits) with an interval, and answers that flip.

    `sets` are (kind, sites) in the order of `site_set`; kinds are `candidate`, `together`, `slice`, `random`,
    `random together`. `p_random`: the share of matched random ones whose fall is at least as large, itself counted.
    """
    own = in_halves(records)[-1][1]
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


def candidates(table: pd.DataFrame, slice_sites: Sequence[Site], params: RetrievalHeads) -> list[Site]:
    """Heads outside the slice whose path into it is significant familywise on the discovery half, largest first."""
    own = table[(table["half"] == table["half"].iloc[0]) & (table["component"] == "head") & (table["estimate"] > 0)]
    own = own[own["p"] <= 1 - params.level].sort_values("estimate", ascending=False)
    sites = [Site(*row) for row in own[SITE].itertuples(index=False)]
    return [site for site in sites if site not in slice_sites][: params.candidates]


def four_tests(
    sites: Sequence[Site], path: pd.DataFrame, writes: pd.DataFrame, looks: pd.DataFrame, ablated: pd.DataFrame,
    params: RetrievalHeads,
) -> pd.DataFrame:  # fmt: skip
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


def passing(tests: pd.DataFrame, which: Sequence[str] = TESTS) -> list[str]:
    """Sites that pass all of these tests; a site at which one was not made does not."""
    own = tests[tests["test"].isin(which)]
    count = own.groupby("site", sort=False)["passed"].sum()
    return count.index[count == len(which)].tolist()


def edges_table(records: pd.DataFrame, params: RetrievalHeads) -> pd.DataFrame:
    """Edges of the two-hop path, confirmation half: source, target, mean effect (logits), and whether it is other than
    zero (max-T over all edges at one token; nothing is claimed of too few quads)."""
    own = in_halves(records)[-1][1].assign(component=lambda frame: frame["sender"])
    there = np.where(own["position"] == "names", " at names", "")
    own = own.assign(source=effects.named(own) + there, target=own["receivers"])
    own = own.replace({"source": {"embed -1 at names": "names"}})
    parts = []
    for _, rows in own.groupby(["position", "mlps"], sort=False):
        matrix = quad_matrix(rows, "effect", ["source", "target"])
        sure = stats.max_t(matrix.values, params).p <= 1 - params.level
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
        "matrix": {role: effects.heads_matrix(table) for role, table in own.items()},
        "significant": {role: effects.heads_matrix(table, "sure") for role, table in sure.items()},
    }


def graph(edges: pd.DataFrame, senders: Sequence[Site], slice_sites: Sequence[Site]) -> tuple[list, pd.DataFrame]:
    """The columns of the two-hop graph, from the names to the answer, and its edges."""
    written = [effects.site_name(*site) + " at names" for site in senders if site.layer >= 0]
    own = [effects.site_name(*site) for site in sorted(slice_sites)]
    columns = [("names", ["names"]), ("sites at the names", written), ("slice at the last token", own)]
    return [*columns, ("answer", ["answer"])], edges
