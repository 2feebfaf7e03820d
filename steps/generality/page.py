"""What step 07 found: effects class by class, circuits tested on classes they were not picked on, controls, the rule.

1. `groups` puts damage and recovery of the slice side by side for every superset, profession, template and order.
2. `ranks` and `interaction` ask whether the same sites carry every class, and equally.
3. `circuit_table` and `transfer` test circuits picked without a superset, or on it alone.
4. `rule_lines` draws the rules of `steps.generality.rule`. Controls: `control_report`; sentences: `generality_statements`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from lib import effects, records
from lib.effects import SITE, jaccard, quad_matrix, site_name
from lib.hooks import Site
from lib.tasks import SUPERSETS
from pipeline import keys
from pipeline.step import Step, single_sites  # noqa: F401
from steps.generality import class_tests
from steps.generality.class_tests import Interaction
from steps.generality.measure import Circuit, Generality, numbered_sets
from steps.generality.rule import RuleResult

QUANTITY = {"noise": "damage", "denoise": "recovery"}


def quads(step: Step) -> pd.DataFrame | None:
    """The quads of step 01 that the pairs were made of; None for a user's own pairs."""
    path = keys.find_pairs(step.name, step.params).with_name("baselines.quads.parquet")
    return records.read(path) if step.params.pairs_file is None and path.is_file() else None


# --- effects by group ---------------------------------------------------------------------------------------------


def with_pairs(frame: pd.DataFrame, grid: pd.DataFrame) -> pd.DataFrame:
    """Records of the grid with what its table says of their pairs."""
    known = ["answer", "corrupt_answer", "order", "clean_profession_a", "clean_profession_b"]
    return frame.join(grid.set_index("pair_id")[known], on="pair_id")


def joint_effect(rows: pd.DataFrame, params: Generality) -> dict[str, Any]:
    """Damage or recovery of the rows (one set of sites, one direction): a ratio of sums with an interval over quads.

    NaN where the gaps do not add up to more than 0, or there are no rows.
    """
    sizes = {"pairs": rows["pair_id"].nunique(), "quads": rows["quad_id"].nunique()}
    gap = (rows["logit_diff_clean"] - rows["logit_diff_corrupt"]).sum()
    if not gap > 0:
        return {"estimate": np.nan, "low": np.nan, "high": np.nan} | sizes
    ends = effects.curve(rows, params, by=[]).iloc[0]
    return {key: float(ends[key]) if ends[key] is not None else np.nan for key in ("estimate", "low", "high")} | sizes


def both_ways(rows: pd.DataFrame, params: Generality, **about: Any) -> list[dict[str, Any]]:
    """`joint_effect` in both directions, as rows of a table."""
    parts = ((quantity, rows[rows["direction"] == direction]) for direction, quantity in QUANTITY.items())
    return [about | {"quantity": quantity} | joint_effect(part, params) for quantity, part in parts]


def groups(joint: pd.DataFrame, grid: pd.DataFrame, params: Generality) -> pd.DataFrame:
    """Joint damage and recovery of the slice (`site_set` 0) for every group of pairs: `kind`, `group`, `quantity`.

    Groups are of the profile's own template, except those of `template`. A pair is of the superset that its clean names
    are in, of each of their professions, and of "one profession" or "two professions".
    """
    slice_rows = with_pairs(joint[joint["site_set"] == 0], grid)
    own = slice_rows[slice_rows["template"] == grid["template"].iloc[0]]
    a, b = own["clean_profession_a"], own["clean_profession_b"]
    labels = {
        "superset": own["answer"],
        "two names": pd.Series(np.where(a == b, "one profession", "two professions"), own.index).where(
            (a != "") & (b != "")
        ),
        "order": own["order"].where(own["order"] != ""),
        "supersets": own["answer"] + " / " + own["corrupt_answer"],
    }
    out = both_ways(own, params, kind="all", group="all pairs")
    for template, rows in slice_rows.groupby("template", sort=False):
        out += both_ways(rows, params, kind="template", group=template)
    for kind, label in labels.items():
        order = (
            [name for name in SUPERSETS if name in set(label)] if kind == "superset" else sorted(set(label.dropna()))
        )
        for group in order:
            out += both_ways(own[label == group], params, kind=kind, group=group)
    for profession in sorted({*a, *b} - {""}):
        out += both_ways(own[(a == profession) | (b == profession)], params, kind="profession", group=profession)
    return pd.DataFrame(out)


def site_effects(
    joint: pd.DataFrame, grid: pd.DataFrame, first: int, sites: Sequence, params: Generality
) -> pd.DataFrame:
    """Damage and recovery of single sites (sets `first`, `first` + 1, ...) by superset and template: one row each."""
    frame = with_pairs(joint, grid)
    own, out = frame["template"] == grid["template"].iloc[0], []
    kinds = [("superset", name, own & (frame["answer"] == name)) for name in SUPERSETS]
    kinds += [("template", name, frame["template"] == name) for name in frame["template"].unique()]
    for kind, group, chosen in kinds:
        rows = frame[chosen]
        for index, site in enumerate(sites):
            part = rows[rows["site_set"] == first + index]
            if len(part):
                out += both_ways(part, params, kind=kind, group=group, site=site_name(*site))
    return pd.DataFrame(out)


# --- do the same sites carry every class? -------------------------------------------------------------------------


def class_matrices(frame: pd.DataFrame, grid: pd.DataFrame, value: str = "effect", reduce: str = "mean") -> dict:
    """Each superset's counterfactual effects as quads x sites (`effects.QuadMatrix`), over pairs that it answers."""
    noise = with_pairs(frame[frame["direction"] == "noise"], grid)
    return {
        name: quad_matrix(rows, value, SITE, reduce)
        for name in SUPERSETS
        if len(rows := noise[noise["answer"] == name])
    }


def ranks(frame: pd.DataFrame, grid: pd.DataFrame, params: Generality) -> pd.DataFrame:
    """How alike two supersets rank the heads (`class_tests.between_classes`); no rows with fewer than two of them."""
    heads = class_matrices(frame[frame["component"] == "head"], grid)
    enough = {name: matrix.values for name, matrix in heads.items() if len(matrix.values) > 1}
    if len(enough) < 2:
        return pd.DataFrame()
    return class_tests.between_classes(enough, params)


def square(ranks: pd.DataFrame, value: str) -> pd.DataFrame:
    """A column of `ranks` as classes x classes."""
    both = pd.concat([ranks, ranks.rename(columns={"class_a": "class_b", "class_b": "class_a"})])
    names = list(dict.fromkeys(ranks["class_a"]))
    return (
        both.drop_duplicates(["class_a", "class_b"])
        .pivot(index="class_a", columns="class_b", values=value)
        .loc[names, names]
    )


def interaction(
    frame: pd.DataFrame, grid: pd.DataFrame, slice_sites: Sequence, params: Generality
) -> tuple[Interaction | None, pd.DataFrame, str]:
    """The test of class x site interaction over the slice's sites; its sites' `p`; why there is none, else "".

    Only these: hundreds of sites whose effects are next to nothing, but for a few quads, break the test's level.
    """
    own = pd.MultiIndex.from_frame(frame[SITE]).isin([tuple(site) for site in slice_sites])
    frame = frame[own]
    if len(frame.groupby(SITE)) < 2:
        return None, pd.DataFrame(), "fewer than two sites of the slice were swept one by one"
    change, gap = (class_matrices(frame, grid, value, "sum") for value in ("effect", "gap"))
    names = [name for name, matrix in change.items() for _ in matrix.quads]
    values, gaps = (np.vstack([matrix.values for matrix in each.values()]) for each in (change, gap))
    quads = np.concatenate([matrix.quads for matrix in change.values()])
    try:
        test = class_tests.interaction(values, gaps[:, 0], names, quads, params.flips, params.seed)
    except ValueError as error:
        return None, pd.DataFrame(), str(error)
    sites = next(iter(change.values())).sites
    ratios, sure = test.ratios.to_numpy(), test.p <= 1 - params.level
    table = sites.assign(site=effects.named(sites), p=test.p, sure=sure, spread=np.ptp(ratios, axis=0))
    table["most"] = test.ratios.index[ratios.argmax(0)]
    return test, table.sort_values(["sure", "spread"], ascending=False), ""


# --- circuits picked class by class -------------------------------------------------------------------------------


def orders(frame: pd.DataFrame, limit: int) -> list[Circuit]:
    """For each superset, the order of sites without it and the order by it alone; none where too little is left."""
    out = []
    for superset in sorted({*frame["answer"], *frame["corrupt_answer"]}, key=SUPERSETS.index):
        without = (frame["answer"] != superset) & (frame["corrupt_answer"] != superset)
        for kind, own in (("without", without), ("only", frame["answer"] == superset)):
            rows, order = frame[own], pd.DataFrame(columns=SITE)
            if len(rows):
                recovery = effects.ratios(rows, SITE)
                order = recovery[recovery > 0].nlargest(limit).reset_index()
            sites = tuple(Site(*site) for site in order[SITE].itertuples(index=False))
            out.append(Circuit(kind, superset, tuple(dict.fromkeys(rows["pair_id"])), sites))
    return out


def cut(circuits: Sequence[Circuit], grown: pd.DataFrame, params: Generality) -> list[Circuit]:
    """The circuits with as many of their sites as the critical slice's rule takes on their own discovery pairs."""
    number, out = numbered_sets(circuits), []
    for circuit in circuits:
        places, joint = [number[sites] for sites in circuit.growing], {}
        rows = grown[grown["pair_id"].isin(circuit.pairs) & grown["site_set"].isin(places)]
        for direction, quantity in QUANTITY.items():
            own = rows[rows["direction"] == direction]
            ratios = effects.ratios(own, ["site_set"]) if len(own) else pd.Series()
            joint[quantity] = ratios.reindex(places).tolist()
        if places and np.isfinite([*joint["recovery"], *joint["damage"]]).all():
            chosen = effects.critical_slice(joint["recovery"], joint["damage"], params.slice_share)
            circuit = replace(circuit, size=chosen.size, reached=chosen.reached)
        out.append(circuit)
    return out


def circuit_table(
    joint: pd.DataFrame, grid: pd.DataFrame, circuits: Sequence[Circuit], sites: Sequence, params: Generality
) -> pd.DataFrame:
    """Each `grid.Circuit` (those with sites are sets 1, 2, ... of `joint`) on the pairs that its superset answers.

    Two rows each, for damage and recovery: without a superset, that is a test on the class held out. `overlap` is with
    the critical slice `sites`, as a share of the sites in either. A circuit that could not be picked keeps its rows.
    """
    frame, out = with_pairs(joint, grid), []
    own = frame[frame["template"] == grid["template"].iloc[0]]
    tested = [circuit for circuit in circuits if circuit.sites]
    for circuit in circuits:
        about = {"kind": circuit.kind, "superset": circuit.superset, "picked_on": len(circuit.pairs)}
        about |= {"size": len(circuit.sites), "sites": ", ".join(site_name(*site) for site in circuit.sites)}
        about |= {"overlap": jaccard(circuit.sites, sites), "reached": circuit.reached}
        number = 1 + tested.index(circuit) if circuit.sites else -1
        rows = own[(own["site_set"] == number) & (own["answer"] == circuit.superset)]
        out += both_ways(rows, params, **about)
    return pd.DataFrame(out)


def beside_slice(circuits: pd.DataFrame, groups: pd.DataFrame) -> pd.DataFrame:
    """For each superset, the slice and the circuit picked without it: rows for `circuit_plots.forest`."""
    slices = groups[groups["kind"] == "superset"].assign(kind=lambda rows: rows["group"], group="the slice")
    held_out = circuits[circuits["kind"] == "without"]
    held_out = held_out.assign(kind=held_out["superset"], group="picked without it")
    both = pd.concat([slices, held_out[held_out["superset"].isin(slices["kind"])]], ignore_index=True)
    return both.sort_values("kind", key=lambda names: names.map(SUPERSETS.index), kind="stable")


def transfer(joint: pd.DataFrame, grid: pd.DataFrame, circuits: Sequence[Circuit], params: Generality) -> pd.DataFrame:
    """Every superset's own circuit (and, first, the slice) on every superset's pairs: `picked_on`, `tested_on`, ..."""
    frame, tested = with_pairs(joint, grid), [circuit for circuit in circuits if circuit.sites]
    own, out = frame[frame["template"] == grid["template"].iloc[0]], []
    numbers = {"the slice": 0} | {c.superset: 1 + index for index, c in enumerate(tested) if c.kind == "only"}
    for picked_on, number in numbers.items():
        for name in SUPERSETS:
            rows = own[(own["site_set"] == number) & (own["answer"] == name)]
            if len(rows):
                out += both_ways(rows, params, picked_on=picked_on, tested_on=name)
    return pd.DataFrame(out)


def rule_lines(fit: RuleResult, asked: pd.DataFrame) -> dict[str, list[float]]:
    """What each rule makes of no, one and two names: its least-squares fit to the free fit's two steps."""
    terms = fit.fitted.set_index("term")["estimate"]
    one, two = terms["one name"], terms["two names"]
    first, second = ((asked["n_a"] + asked["n_b"] == count).sum() for count in (1, 2))
    slope = (first * one + 2 * second * two) / (first + 4 * second)
    level = (first * one + second * two) / (first + second)
    return {"additive": [0, slope, 2 * slope], "OR": [0, level, level], "AND": [0, 0, two]}
