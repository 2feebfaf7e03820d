"""Step 06 from its tables to its sentences: which sites feed the slice, by which of four kinds of evidence.

1. `senders_table`, `shares`, `difference`: path effects with familywise intervals, and what whole groups carry.
2. `contrast_table`, `attention_table`: what the sites write and where they look, tested over sites.
3. `verification_table`: the margin under an ablated path, against matched random heads.
4. `four_tests` puts them side by side; `verdicts` and `findings_of` say what follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lib import findings, stats
from lib.effects import quad_matrix
from lib.findings import SITE, in_halves, interval, listed, picked, reported
from lib.hooks import Site
from lib.params import RetrievalHeads
from lib.records import ANALYSED
from lib.statements import ONE_HALF, about_model
from lib.steps import Step

COLUMNS = [*ANALYSED, "site_set", "sender", "receivers", "mlps"]
TESTS = ("path", "writes the profession", "attends to the names", "ablation of the path")
CAPTIONS = {
    "retrieval_heads-two-hop": "From the names to the answer: the width of an edge is the effect of its path on "
    "logit_diff (logits, confirmation half); dashed edges are not significant over all edges together.",
    "retrieval_heads-senders": "The senders of largest path effect into the slice, picked on the discovery half, with "
    "their effect in both halves and intervals that hold for all senders together.",
}


def senders_table(records: pd.DataFrame, params: RetrievalHeads) -> pd.DataFrame:
    """`findings.both_halves` over the senders of one route."""
    table = findings.both_halves(records.assign(component=records["sender"]), params)
    return table.assign(site=table["site"].replace("embed -1", "embedding"))


def shares(records: pd.DataFrame, names: Sequence[str], params: RetrievalHeads) -> pd.DataFrame:
    """What each set of senders carries of the clean-to-corrupt gap, confirmation half, by receivers and MLP mode."""
    own = in_halves(records)[-1][1]
    parts = []
    for (receivers, mlps), rows in own.groupby(["receivers", "mlps"], sort=False):
        parts.append(findings.curve(rows, params, ["site_set"]).assign(receivers=receivers, mlps=mlps))
    out = pd.concat(parts, ignore_index=True)
    return out.assign(senders=[names[index] for index in out["site_set"]])


def difference(records: pd.DataFrame, one: int, other: int, params: RetrievalHeads) -> stats.Interval:
    """The effect of one set of senders less that of another, per quad (logits), confirmation half."""
    matrix = quad_matrix(in_halves(records)[-1][1], "effect", ["site_set"]).values
    return stats.mean_interval(matrix[:, one] - matrix[:, other], params.level, params.resamples, params.seed)


def tested(records: pd.DataFrame, value: str, params: RetrievalHeads) -> pd.DataFrame:
    """Mean of a column per site over quads, both halves, familywise intervals and p values."""
    parts = []
    for half, own in in_halves(records.dropna(subset=[value])):
        matrix = quad_matrix(own, value, SITE)
        spans = stats.simultaneous(matrix.values, params.level, params.resamples, params.seed)
        test = stats.max_t(matrix.values, params.flips, params.seed)
        parts.append(matrix.sites.assign(**findings.columns(spans), p=test.p, quads=len(matrix.quads), half=half))
    out = pd.concat(parts, ignore_index=True)
    return out.assign(site=findings.named(out))


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
    spans = stats.mean_intervals(matrix.values, params.level, params.resamples, params.seed)
    flipped = (own["metric_before"] > 0) & (own["metric_after"] < 0)
    out = matrix.sites.assign(**findings.columns(spans), flips=flipped.groupby(own["site_set"]).mean().to_numpy())
    out = out.assign(
        kind=[sets[index][0] for index in out["site_set"]],
        site=[listed(findings.site_name(*site) for site in sets[index][1]) for index in out["site_set"]],
    )
    for kinds, other in ((("candidate", "slice"), "random"), (("together",), "random together")):
        random = out.loc[out["kind"] == other, "estimate"].to_numpy()
        for index in out.index[out["kind"].isin(kinds)]:
            larger = (random >= out.loc[index, "estimate"]).sum()
            out.loc[index, "p_random"] = (1 + larger) / (1 + len(random)) if len(random) else np.nan
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
        name = findings.site_name(*site)
        for test, table in zip(TESTS, (path, writes, looks), strict=False):
            passed = name in set(findings.confirmed(table, params)["site"])
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
    """Edges of the two-hop path, confirmation half: source, target, mean effect (logits), interval over all edges of
    one kind together, and whether it is above or below zero."""
    own = in_halves(records)[-1][1].assign(component=lambda frame: frame["sender"])
    own = own.assign(source=findings.named(own).replace("embed -1", "names"), target=own["receivers"])
    parts = []
    for _, rows in own.groupby(["position", "mlps"], sort=False):
        matrix = quad_matrix(rows, "effect", ["source", "target"])
        spans = stats.simultaneous(matrix.values, params.level, params.resamples, params.seed)
        parts.append(matrix.sites.assign(**findings.columns(spans)))
    out = pd.concat(parts, ignore_index=True)
    above = [
        low is not None and not pd.isna(low) and low * high > 0
        for low, high in zip(out["low"], out["high"], strict=True)
    ]
    return out.assign(significant=above)


def probe_table(probes: pd.DataFrame, params: RetrievalHeads) -> pd.DataFrame:
    """Share of people whose superset or profession comes out right, by template, raw and centred on labels' means."""
    rows = []
    for template, own in probes.groupby("template", sort=False):
        for kind in ("superset", "profession"):
            for how in ("", "_centred"):
                right = own[f"{kind}_right{how}"].dropna()
                if right.empty:
                    continue
                span = stats.proportion_interval(right.to_numpy(), np.ones(len(right)), params.level)
                chance = float(own.loc[right.index, f"{kind}_chance"].mean())
                about = {"template": template, "label": kind, "centred": bool(how), "people": len(right)}
                ends = {key: getattr(span, key) for key in ("estimate", "low", "high")}
                rows.append(about | ends | {"chance": chance})
    return pd.DataFrame(rows)


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


def route_sentences(table: pd.DataFrame, gap: stats.Interval, mlps: str) -> list[str]:
    """What the slice's heads read at the names, and which kinds of sites wrote it."""
    every = {kind: share_of(table, "everything", f"{kind} at names", mlps) for kind in ("k and v", "v", "k")}
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
        f"Directly, the MLPs at the names carry {'less than' if less else more} the heads there: a difference of {gap} "
        "logits.",
    ]


def ablation_sentences(tables: dict[str, pd.DataFrame], ablation: str, params: RetrievalHeads) -> list[str]:
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
        out.append(
            f"Ablating only the paths into the slice of {row['site']} at `{role}` ({ablation}) lowers the margin by "
            f"{interval(row['estimate'], row['low'], row['high'])} logits and flips {row['flips']:.0%} of the answers: "
            f"{verdict} matched random heads ({beside})."
        )
    return out


def verdicts(
    tests: dict[str, pd.DataFrame], slice_sites: Sequence[Site], reads: pd.Series, gap: stats.Interval
) -> dict:
    """The four possible answers of the step, each true, false or None (not decided), with the heads concerned.

    `reads`: the share of the gap that the slice reads at the names, with its interval; `gap`: MLPs less heads there.
    """
    own = {findings.site_name(*site) for site in slice_sites}
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


def verdict_sentences(found: dict, tests: dict[str, pd.DataFrame]) -> list[str]:
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
    top = [f"{r.site} ({interval(r.estimate, r.low, r.high)})" for r in reported(picked(table, count)).itertuples()]
    sure = findings.confirmed(table, params)
    kinds = [f"{(sure['component'] == kind).sum()} {word}" for kind, word in (("head", "heads"), ("mlp", "MLPs"))]
    return (
        f"At `{role}`, the senders of largest path effect into the slice are {listed(top)} (logits, familywise "
        f"intervals); significant in both halves are {listed(kinds)} of {table['site'].nunique()} senders."
        + ONE_HALF
        * (table["half"].nunique() == 1)
    )


def findings_of(step: Step, found: dict, sentences: Sequence[str], headline: Sequence[str], **numbers: object) -> dict:
    """The findings of step 06."""
    subject = {"model": about_model(step), "task": step.params.task, "able": True}
    return {**subject, "verdicts": found, **numbers, "sentences": list(sentences), "headline": list(headline)}
