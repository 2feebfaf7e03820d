"""What the circuit over all tokens comes to, and how it, the circuit at the last token and the slice go together.

1. `numbers`: the tests of `circuits_page.tested_numbers`, what the circuit loses without its nodes at each role, random
   circuits of as many nodes at each role, and every set of sites under the same tests (`measure.everywhere_tests`).
2. `curve` is the figure, `joint_table` and `site_table` set the three sets beside each other; sentences; `part`.

Shares are of what the model has over the run in which nothing is kept, confirmation half, as in `circuits_page`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from lib.effects import familywise
from pipeline.step import Step
from report import plots
from report.words import capital, listed, number_word, tabled, with_ends
from steps.story import measure
from steps.story.circuits_page import (
    by_order,
    share,
    shares,
    shown,
    sums,
    tested_numbers,
    tested_sentences,
)
from steps.story.measure import Everywhere, Measured, Story, at_roles
from steps.story.sentences import ITEM, ROLES, by_construction, unpruned

SETS = {"slice": "slice (step 04)", "last": "circuit at the last token", "everywhere": "circuit over all tokens"}
TESTS = {
    "there": "kept when all else at the last token is resampled",
    "alone": "kept when all else is resampled at every token",
    "removed": "kept by the model when it is resampled",
}
CAPTION = (
    "Faithfulness against the number of nodes (a head or MLP at a role) that are kept when all else is resampled at "
    "every token: in the order of attribution, at random with as many at each role, and the circuit after pruning. "
    "Below, how many of the first nodes by attribution are at each role. Confirmation half, studentised bootstrap "
    "intervals over quads; dashed: the share asked for."
)


def numbers(e: Everywhere, params: Story) -> dict[str, Any]:
    """The numbers of the circuit over all tokens; `sites` alone, with `why`, where there is none."""
    out = tested_numbers(e, params)
    if not out["sites"]:
        return out
    rows, each, there = shown(e), at_roles(out["sites"]), at_roles(e.sites)
    wide = sums(rows)
    random = by_order(wide)[[("random", out["size"])]].set_axis(["random"], axis=1)
    both = random.assign(over=wide["circuit"] - random["random"])
    random, over = (row.to_dict() for _, row in shares(both, wide["everything"], params).iterrows())
    parts = [
        {"role": role, "nodes": each.get(role, 0), "of": count} | (share(rows, f"without {role}", params) or {})
        for role, count in there.items()
        if role in each
    ]
    sets = {name: {test: share(rows, f"{name} {test}", params) for test in TESTS} for name in SETS}
    growing = by_order(wide)["attribution"]
    grown = shares(growing, wide["everything"], params).rename_axis("nodes").reset_index().to_dict("records")
    return out | {
        "nodes": len(e.sites),
        "judged": judged(out["faithfulness"], grown, len(e.sites), params),
        "curve": grown,
        "random": random,
        "without_random": without_random(wide, params),
        "over_random": over,
        "roles": parts,
        "sets": sets,
    }


def without_random(wide: pd.DataFrame, params: Story) -> dict[str, Any]:
    """What the model keeps without as many random nodes at each role as the circuit has, mean over the draws."""
    drawn = wide.filter(like="random removed ").mean(axis=1)
    return shares(drawn.to_frame(), wide["everything"], params).iloc[0].to_dict()


def judged(kept: Mapping[str, Any], grown: Sequence[Mapping[str, Any]], nodes: int, params: Story) -> dict[str, Any]:
    """What the circuit keeps; `why` that decides nothing where no circuit of fewer than all nodes passes at these
    quads, so that none could have."""
    asked, part = params.claims["circuit_everywhere"], [row for row in grown if row["nodes"] < nodes]
    lows = [row["low"] for row in part]
    if any(low is None or np.isnan(low) or low > asked for low in lows) or kept["low"] is None or kept["low"] > asked:
        return dict(kept)
    best = max(part, key=lambda row: row["low"])
    return {
        "why": f"{with_ends(kept)}; no circuit of fewer than all {nodes} nodes has a lower end above {asked:g} here: "
        f"the first {best['nodes']} by attribution come nearest, {with_ends(best)}"
    }


def ranking(e: Everywhere) -> list[str]:
    """Every node, in the order of attribution."""
    return e.search.loc[e.search["phase"] == "grow", "site"].tolist()


def curve(step: Step, m: Measured | None) -> Figure | None:
    """`CAPTION`."""
    if m is None or not measure.circuit_of(m.everywhere.search):
        return None
    e, order = m.everywhere, ranking(m.everywhere)
    wide = sums(shown(e))
    table = shares(by_order(wide), wide["everything"], step.params).rename_axis(["name", "n_sites"]).reset_index()
    one = shares(wide[["circuit"]], wide["everything"], step.params)
    one = one.assign(name="pruned", n_sites=len(measure.circuit_of(e.search)))
    table = pd.concat([table, one], ignore_index=True)
    sizes = sorted(set(table["n_sites"]))
    composed = pd.DataFrame([at_roles(order[:size]) for size in sizes], index=sizes).fillna(0)
    composed = composed.reindex(columns=[role for role in ROLES if role in composed])
    return plots.node_curve(table, composed.rename(columns=ROLES), step.params.faithful_share)


def joint_table(step: Step, m: Measured | None) -> pd.DataFrame | None:
    """What each set of sites keeps under the same tests, shares of what the model has."""
    if m is None:
        return None
    e, wide = m.everywhere, sums(shown(m.everywhere))

    def column(name: str) -> list[str]:
        table = shares(wide[[f"{name} {test}" for test in TESTS]], wide["everything"], step.params)
        at_last = name != "everywhere"
        alike = [by_construction if at_last and test == "alone" else with_ends for test in TESTS]
        return [written(row) for written, row in zip(alike, table.to_dict("records"), strict=True)]

    columns = {f"{words} ({len(e.tests[f'{name} alone'].sites)})": column(name) for name, words in SETS.items()}
    return pd.DataFrame(columns, index=pd.Index(TESTS.values(), name="share of what the model has"))


def site_table(step: Step, m: Measured | None) -> pd.DataFrame | None:
    """Every site that one of the three sets has at the last token: in which, at which roles the circuit over all tokens
    has it, and what resampling it alone at the last token takes from the model (logits, familywise)."""
    if m is None:
        return None
    rows, sets = shown(m.everywhere), {name: set(m.everywhere.tests[f"{name} alone"].sites) for name in SETS}
    tests = [name for name in m.everywhere.tests if name.startswith("single ")]
    wide = rows.pivot(index=["quad_id", "pair_id"], columns="test", values="logit_diff").groupby("quad_id").mean()
    cost = pd.DataFrame(familywise(wide[tests].rsub(wide["everything"], axis=0).to_numpy(), step.params))
    table = []
    for test, row in zip(tests, cost.to_dict("records"), strict=True):
        site = test.removeprefix("single ").removesuffix(" at last")
        own = {SETS[name]: "yes" if f"{site} at last" in sets[name] else "" for name in ("slice", "last")}
        roles = [role for role in ROLES if f"{site} at {role}" in sets["everywhere"]]
        own[f"{SETS['everywhere']}, at"] = ", ".join(roles)
        table.append({"site": site} | own | {"cost of resampling it alone there (logits)": with_ends(row)})
    return pd.DataFrame(table).iloc[cost["estimate"].argsort()[::-1]].set_index("site")


def sentences(found: Mapping[str, Any], params: Story) -> list[str]:
    """What the circuit over all tokens is, how it does in its tests, and the other two sets under the same tests."""
    if not found["sites"]:
        return [f"No circuit over all tokens was searched for: {found['why']}."]
    spare = found["grown"] - found["size"]
    cut = f"The first {found['grown']} in the order of attribution keep {found['searched']:.2f} of what the model "
    cut += "has on the pairs that were searched"
    cut += "" if found["reached"] else f", less than the {params.faithful_share:g} asked for, and no more were tried"
    sets, parts = found["sets"], found["roles"]
    first = [(row["nodes"], with_ends(row)) for row in found["curve"] if row["estimate"] > 0.1]
    many = listed(f"{number_word(row['nodes'])} at {ROLES[row['role']]}" for row in parts)
    without = [(ROLES[row["role"]], by_construction(row) if row["role"] == "last" else with_ends(row)) for row in parts]
    names = {"everywhere": "it", "last": "the circuit at the last token", "slice": "the slice of step 04"}
    alone = {name: with_ends if name == "everywhere" else by_construction for name in names}
    tests = [(names[name], alone[name](sets[name]["alone"]), with_ends(sets[name]["there"])) for name in names]
    tested = ("", "all else resampled at every token", "all else resampled at the last token alone")
    return [
        f"The circuit over all tokens has {found['size']} of {found['nodes']} nodes, a node being a head or MLP at a "
        f"role ({many}). {cut} (no interval: they were picked on these pairs). Of them, {number_word(spare)} "
        f"{'was' if spare == 1 else 'were'} pruned.",
        "The curve goes on to all nodes; what the first by attribution keep on the confirmation half:\n\n"
        + tabled(("nodes", "share of what the model has"), first),
        *([f"{capital(pruned.removeprefix(ITEM).replace(ITEM, '; '))}."] if (pruned := unpruned(found)) else []),
        *tested_sentences(found, params, "at every token"),
        f"As many random nodes at each role keep {with_ends(found['random'])}, {with_ends(found['over_random'])} less. "
        f"With such random nodes resampled instead, and all else intact, the model keeps "
        f"{with_ends(found['without_random'])}.\n\n" + tabled(("without its nodes at", "the circuit keeps"), without),
        f"What each set keeps under the same tests:\n\n{tabled(tested, tests)}",
    ]


def part(step: Step, m: Measured) -> dict[str, Any]:
    """What this part of step 10 hands on (see `report.words.joined`)."""
    found, figure = numbers(m.everywhere, step.params), curve(step, m)
    return {
        "everywhere": found,
        "sentences": sentences(found, step.params),
        "figures": {"everywhere": figure} if figure else {},
        "captions": {"everywhere": CAPTION},
        "headline": [],
    }


def statement(part: Mapping[str, Any] | None) -> Markdown | None:
    """Every sentence of `part`."""
    return None if part is None else Markdown("\n\n".join(part["sentences"]))
