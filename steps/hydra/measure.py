"""Step 05, measured: the slice ablated, the sites whose effect rises after it, and the slice widened by its backups.

1. `SPLITS`: the slice, in the first round beside random slices, is ablated; its effect is split (`steps.hydra.splits`).
2. `RISES`: the slice, the slice with each later site, and each later site alone are ablated. What a site costs once the
   slice is gone, less what it costs in the intact run, is the rise of its effect, whoever reads the site: the final
   norm, a later head, a later MLP. (Direct effects would miss a site that is read by others.)
3. `candidates` are picked by their rise on the discovery half; `joint_tests` asks on the confirmation half whether the
   slice and a candidate together cost more than the two apart, which is the rise: then the candidate is a backup.
4. The slice is widened by its backups, and the next round begins, until nothing rises or `rounds` is reached.
5. `INSIDE`: does one member of the slice stand in for those before it? (A backup may be a member: replaced beside the
   others, it no longer speaks against them.)
6. `NEEDED`: the slice as it was, ablated class-neutrally, beside all that such an ablation can take away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from pydantic import Field

from lib import records, stats
from lib.batches import NEUTRAL, grouped
from lib.effects import SITE, by_half, columns, familywise, in_halves, is_loss, named, quad_matrix, reported
from lib.hooks import Site
from lib.readout import post_norms, readout
from lib.tasks import Pair
from lib.weights import Shape
from pipeline import costs
from pipeline.assumed import Case, of_sweep
from pipeline.costs import Work, total
from pipeline.declaration import ANALYSED, EFFECTS, Declaration, Table
from pipeline.params import Ablations, OfSlice
from pipeline.step import Step, swept
from pipeline.units import Unit, subsample, sweep_units, without_labels
from steps.hydra import splits

WIDENED = 1  # times that the slice was widened in the default book
DIRECT = 10  # bytes of a row of direct effects in Parquet


class Hydra(OfSlice):
    """05: the slice ablated; who stands in for it?"""

    pairs: int | None = Field(None, ge=1, description="pairs on which the slice is ablated; default all")
    ablations: Ablations = Field(
        ("resample", "zero"), description="how the slice is ablated; the first one decides what is a backup"
    )
    rounds: int = Field(3, ge=1, description="most times that the slice is widened by the backups found")
    candidates: int = Field(8, ge=1, description="most candidates that are tested for a backup in a round")
    direct_floor: float = Field(0.5, gt=0, description="logits; single pairs count where the slice itself loses more")


# --- what is measured ---


def split_units(step: Step | Case, slices: Mapping[str, Sequence[Site]]) -> list[Unit]:
    """The slices ablated in every pair."""
    pairs = subsample(step.prompts(), step.params.pairs)
    return sweep_units("split", pairs, step.prompts(), ablations=step.params.ablations, slices=slices)


def splitter(step: Step, slices: Mapping[str, Sequence[Site]]) -> Callable[[Unit], pd.DataFrame]:
    """What splits the effects in a unit's pairs; all pairs are donors of means and resamples."""
    pairs, pools = step.prompts(), step.shared("pools", dict)
    reading = step.shared("reading", lambda: cache(lambda: splits.Reading(readout(step.model), post_norms(step.model))))

    def compute(unit: Unit) -> pd.DataFrame:
        how = {"pool": pairs, "pools": pools, "seed": step.params.seed, "reading": reading()}
        return splits.run(step.model, unit.pairs, **how, **unit.options)

    return compute


def split_cost(case: Case, units: Sequence[Unit], slices: Mapping[str, Sequence[Site]]) -> Work:
    """The units, the pool they share, and the rows of direct effects."""
    first = min(site.layer for sites in slices.values() for site in sites)
    work = [
        split_unit(case.shape, unit.pairs, list(slices.values()), len(unit.options["ablations"]), first)
        for unit in units
    ]
    later = (case.n_layers - first) * (case.n_heads + 1)
    rows = sum(len(unit.pairs) for unit in units) * len(case.params.ablations) * len(slices) * later
    return total([*work, case.pool(units, case.pairs), Work(table=DIRECT * rows, other={"parts": rows})])


def split_unit(shape: Shape, pairs: Sequence[Pair], slices: Sequence[Sequence[Site]], kinds: int, first: int) -> Work:
    """A unit of `splits.run`: one pass over the last token, each head's output apart; candidates alone are scored."""
    out = Work()
    for group in grouped(pairs):
        count, tokens = len(group), len(group[0].clean.ids)
        rows = count * (1 + kinds * len(slices))
        apart = 2 * shape.hidden * shape.n_heads * shape.head_size * (rows * (shape.n_heads + 1))
        grown = costs.of_rows(shape, [0] * rows, 1, tokens) + apart * (shape.n_layers - first)
        out += costs.plain(shape, count, tokens) + costs.vocabulary(shape, 2 * count)
        out += Work(passes=1, grown=grown, light=rows, other={"jobs": 1, "split layers": shape.n_layers - first})
    return out


def rise_units(step: Step | Case, ablation: str, sites: Sequence[Site]) -> list[Unit]:
    """The slice, the slice with each later site, and each later site alone, in this order, ablated in every pair."""
    pairs, later = subsample(step.prompts(), step.params.pairs), splits.later_sites(sites, step.n_layers, step.n_heads)
    sets = [tuple(sites), *((*sites, site) for site in later), *((site,) for site in later)]
    how = {"role": "last", "ablations": [ablation], "site_sets": sets}
    return sweep_units("rise", without_labels(pairs), step.prompts(), **how)


def in_order(sites: Sequence[Site]) -> list[Site]:
    """The sites as the model computes them."""
    return sorted(sites, key=lambda site: (site.layer, site.component == "mlp", site.head))


def inside_units(step: Step | Case, ablation: str, sites: Sequence[Site]) -> list[Unit]:
    """The slice's first member in the model's order, the first two, ..., and each alone, ablated in every pair."""
    pairs, order = subsample(step.prompts(), step.params.pairs), in_order(sites)
    sets = [*(tuple(order[: size + 1]) for size in range(len(order))), *((site,) for site in order)]
    how = {"role": "last", "ablations": [ablation], "site_sets": sets}
    return sweep_units("inside", without_labels(pairs), step.prompts(), **how)


def needed_units(step: Step | Case, sites: Sequence[Site]) -> list[Unit]:
    """The slice and, as the ceiling, the whole final residual stream: ablated class-neutrally, and counterfactually."""
    pairs, whole = subsample(step.prompts(), step.params.pairs), Site(step.n_layers - 1, "resid")
    how = {"role": "last", "ablations": [*NEUTRAL, "counterfactual"], "site_sets": [tuple(sites), (whole,)]}
    return sweep_units("needed", pairs, step.prompts(), **how)


SPLITS = Table("hydra", split_units, splitter, split_cost, schema=splits.SCHEMA)
RISES = Table("joint", rise_units, swept, of_sweep, records.SET_SCHEMA, (*EFFECTS, "site_set"))
INSIDE = Table("inside", inside_units, swept, of_sweep, records.SET_SCHEMA, (*EFFECTS, "site_set"))
NEEDED = Table("needed", needed_units, swept, of_sweep, records.SET_SCHEMA, (*ANALYSED, "site_set"))


def numbered(table: Table, number: int) -> Table:
    """The table of a round: hydra, round1, round2, ...; joint0, joint1, ..."""
    name = f"round{number}" if table is SPLITS else f"joint{number}"
    return table if table is SPLITS and number == 0 else replace(table, name=name)


def slices_of(step: Step | Case, sites: Sequence[Site], number: int) -> dict[str, Sequence[Site]]:
    """What is ablated in a round: the slice, in the first one beside random slices."""
    if number:
        return {"slice": sites}
    rng = step.rng("random slices")
    return {"slice": sites} | splits.random_slices(step.n_layers, step.n_heads, sites, rng)


def assumed(case: Case) -> Iterator[tuple[Any, ...]]:
    """The tables in order: as many rounds as in the default book; what the slice is widened by is left out."""
    sites, lead = case.slice(), case.params.ablations[0]
    for number in range(1 + min(WIDENED, case.params.rounds)):
        yield numbered(SPLITS, number), slices_of(case, sites, number)
        if splits.later_sites(sites, case.n_layers, case.n_heads):
            yield numbered(RISES, number), lead, sites
    if len(sites) > 1:
        yield INSIDE, lead, sites
    yield NEEDED, sites


STEP = Declaration("hydra", Hydra, assumed, reads={"sufficiency": ("critical_slice",)}, page_keys=("direct_floor",))


# --- what is chosen ---


class Round(NamedTuple):
    """One round of widening: what was ablated, the split, and the tests that name backups."""

    sites: list[Site]
    frame: pd.DataFrame  # `steps.hydra.splits.SCHEMA`
    costs: pd.DataFrame  # records of `RISES`; empty where nothing comes after the slice
    rises: pd.DataFrame
    tests: pd.DataFrame  # empty where there were no candidates, or the profile's limit was reached


def lead_of(frame: pd.DataFrame, params: Hydra) -> str:
    """The ablation that decides: the first of the parameters that both halves have (a pair may lack a pool)."""
    there = set.intersection(*(set(rows["ablation"]) for _, rows in in_halves(frame))) or set(frame["ablation"])
    return next(kind for kind in params.ablations if kind in there)


class Costs(NamedTuple):
    """What ablations cost in logit_diff (logits), by quad: positive where the answer loses."""

    whole: Float[np.ndarray, "quads later"]  # what is gone before each later site: the slice
    gone: Float[np.ndarray, "quads later"]  # each later site, once that is gone
    alone: Float[np.ndarray, "quads later"]  # each later site, in the intact run


def costs_of(records: pd.DataFrame) -> Costs:
    """The costs in one half's records of `RISES`."""
    matrix = quad_matrix(records, "effect", ["site_set"]).values
    together, alone = np.split(matrix[:, 1:], 2, axis=1)
    whole = np.broadcast_to(matrix[:, :1], alone.shape)
    return Costs(whole, together - whole, alone)


def inside_of(records: pd.DataFrame) -> Costs:
    """The costs in one half's records of `INSIDE`: of each member but the first, the members before it being gone."""
    together, alone = np.split(quad_matrix(records, "effect", ["site_set"]).values, 2, axis=1)
    return Costs(together[:, :-1], np.diff(together), alone[:, 1:])


def rises(costs: pd.DataFrame, later: Sequence[Site], params: Hydra) -> pd.DataFrame:
    """Rise of every later site's effect (`gone` - `alone`, logits) in both halves: familywise intervals, and one-sided
    familywise p values for "it does not rise", 1 for rises up to the floor. `place` is the site's in the list."""

    def one_half(rows: pd.DataFrame) -> pd.DataFrame:
        own = costs_of(rows)
        spans = familywise(own.gone - own.alone, params, "greater", params.floor)
        return pd.DataFrame(later).assign(**spans, place=range(len(later)), quads=len(own.whole))

    if not later:  # the slice's last site is the model's last
        return pd.DataFrame(columns=[*SITE, "half", "estimate", "low", "high", "p", "place", "quads", "site"])
    out = by_half(costs, one_half)
    return out.assign(site=named(out))


def candidates(table: pd.DataFrame, params: Hydra) -> pd.DataFrame:
    """Sites whose rise is familywise significant and above the floor on discovery, by test and interval where there is
    one, the largest there first, with their reported rows."""
    if table.empty:
        return table
    first = in_halves(table)[0][1]
    low = first["low"].astype(float)
    good = first[(first["p"] <= 1 - params.level) & (first["estimate"] > params.floor) & ~(low <= params.floor)]
    order = good.sort_values("estimate", ascending=False)["site"]
    return reported(table).set_index("site", drop=False).loc[order].reset_index(drop=True)


def sites_of(table: pd.DataFrame) -> list[Site]:
    """The sites of a table's rows."""
    return [Site(*site) for site in table[SITE].itertuples(index=False)]


def joint_tests(
    costs: pd.DataFrame,
    rising: pd.DataFrame,
    params: Hydra,
    read: Callable[[pd.DataFrame], Costs] = costs_of,
) -> pd.DataFrame:
    """What slice + candidate costs beyond the two apart (logits), on the confirmation half, familywise over candidates.

    `backup` where the whole interval is above the floor. It is the candidate's cost once the slice is gone (`gone`)
    less its cost alone (`alone`), so that a site which opposes the answer through the slice passes too; `stands_in`
    where the whole interval of `gone` is above the floor. `ratio` is the compensation: the share that the candidate
    makes up for of what the slice would cost were the candidate silent all along, (the two together) - `alone`. NaN
    where that is no loss.
    """
    own, at = read(reported(costs)), rising["place"].to_numpy()
    gone, alone, spans = own.gone[:, at], own.alone[:, at], {}
    for name, values in {"": gone - alone, "gone_": gone, "alone_": alone}.items():
        spans |= columns(stats.simultaneous(values, params), name)
    out = rising[["site", *SITE]].assign(**spans)
    above = {"backup": "low", "stands_in": "gone_low"}
    out = out.assign(**{name: out[end].astype(float) > params.floor for name, end in above.items()})
    unaided = own.whole[:, at] + gone - alone
    none = stats.Interval(float("nan"), None, None, params.level, len(unaided), "no loss")
    ratios = [
        stats.ratio_intervals(rise, lost, params)[0] if is_loss(lost, params) else none
        for rise, lost in zip((gone - alone).T, unaided.T, strict=True)
    ]
    return out.assign(**columns(ratios, "ratio_"))


def backups_of(tests: pd.DataFrame) -> list[Site]:
    """The sites that a round confirmed."""
    return [] if tests.empty else sites_of(tests[tests["backup"]])


def run(step: Step) -> list[Round]:
    """Measure round after round, or read what is there."""
    p, sites, rounds = step.params, step.slice(), []
    while not rounds or sites != rounds[-1].sites:
        number = len(rounds)
        frame = step.table(numbered(SPLITS, number), slices_of(step, sites, number))
        later = splits.later_sites(sites, step.n_layers, step.n_heads)
        costs = step.table(numbered(RISES, number), lead_of(frame, p), sites) if later else pd.DataFrame()
        risen = rises(costs, later, p)
        rising = candidates(risen, p).head(p.candidates if number < p.rounds else 0)
        tests = joint_tests(costs, rising, p) if len(rising) else rising
        rounds.append(Round(sites, frame, costs, risen, tests))
        sites = [*sites, *backups_of(tests)]
    return rounds


def inside(step: Step, first: Round) -> pd.DataFrame:
    """`joint_tests` of each member of the slice but its first, against the members before it. No site was picked by
    this, so the confirmation half alone decides, familywise over the members."""
    order = in_order(first.sites)
    if len(order) < 2:
        return pd.DataFrame()
    records = step.table(INSIDE, lead_of(first.frame, step.params), order)
    members = pd.DataFrame(order[1:], columns=SITE)
    members = members.assign(site=named(members), place=range(len(members)))
    return joint_tests(records, members, step.params, inside_of)


def needed(step: Step) -> pd.DataFrame:
    """The records of `NEEDED`, the slice in `site_set` 0 and the whole final residual stream in 1."""
    return step.table(NEEDED, step.slice())
