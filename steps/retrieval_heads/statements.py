"""Step 06 in sentences, built from the tables of `steps.retrieval_heads.page`.

`verdicts` answers the step's question; `findings_of` gathers every number and sentence that is handed on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from lib import effects, stats
from lib.effects import picked, reported
from lib.hooks import Site
from pipeline.step import Step
from report.words import ONE_HALF, about_model, interval, listed
from steps.retrieval_heads.measure import RetrievalHeads
from steps.retrieval_heads.page import TESTS, one_table, passing

CAPTIONS = {
    "two-hop": "From the names to the answer: the width of an edge is the effect of its path on "
    "logit_diff (logits, confirmation half); dashed edges are not significant over all edges at "
    "their token together.",
    "senders": "The senders of largest path effect into the slice, picked on the discovery half, with "
    "their effect in both halves and intervals that hold for all senders together.",
}


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
    top = [f"{r.site} ({interval(r.estimate, r.low, r.high)})" for r in reported(picked(table, count)).itertuples()]
    sure = effects.confirmed(table, params)
    kinds = [f"{(sure['component'] == kind).sum()} {word}" for kind, word in (("head", "heads"), ("mlp", "MLPs"))]
    return (
        f"At `{role}`, the senders of largest path effect into the slice are {listed(top)} (logits, familywise "
        f"intervals); significant in both halves are {listed(kinds)} of {table['site'].nunique()} senders."
        + ONE_HALF
        * (table["half"].nunique() == 1)
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
        held = listed(sorted(own & set(sure["site"])))
        count = f"{len(sure)} of {table['site'].nunique()} heads and MLPs"
        parts.append(f"at `{role}` {count}, most of all {listed(top)}; of the slice {held}")
    return (
        "Of what the slice can hear, the right profession is favoured over the others of its superset, in both halves, "
        f"by {'; '.join(parts)} (logits, familywise intervals)."
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


def findings_of(
    step: Step, known: pd.DataFrame, probes: pd.DataFrame, routes: Mapping[str, pd.DataFrame], carried: pd.DataFrame,
    more: stats.Interval, writes: Mapping[str, pd.DataFrame], looks: Mapping[str, pd.DataFrame],
    margins: Mapping[str, pd.DataFrame], tests: Mapping[str, pd.DataFrame], slice_sites: Sequence[Site],
) -> dict:  # fmt: skip
    """The findings of step 06."""
    p, keep = step.params, ["site", "estimate", "low", "high", "p"]
    everything = carried[(carried["senders"] == "everything") & (carried["receivers"] == "k and v at names")].iloc[0]
    heard = {role: set(routes[f"slice at {role}"]["site"]) for role in writes}
    found = verdicts(tests, slice_sites, everything, more)
    said = verdict_sentences(found, tests)
    sentences = [
        *probe_sentences(known, probes),
        *(senders_sentence(routes[f"slice at {role}"], role, p) for role in ("names", "last")),
        *route_sentences(carried, more),
        write_sentence(writes, heard, slice_sites, p),
        attention_sentence(looks, slice_sites),
        *ablation_sentences(margins, p),
        *said,
    ]
    return {
        "model": about_model(step),
        "task": p.task,
        "able": True,
        "verdicts": found,
        "carried": carried.to_dict("records"),
        "tests": one_table(tests).to_dict("records"),
        "senders": {role: reported(table)[keep].nlargest(20, "estimate").to_dict("records")
                    for role, table in routes.items()},
        "sentences": sentences,
        "headline": [route_sentences(carried, more)[0], *said],
    }  # fmt: skip
