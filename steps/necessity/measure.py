"""Step 03, measured: every site ablated in the clean run, under each kind of ablation.

With counterfactual values, noise in a pair is denoise in its mirror pair, run for run: that cannot tell a site which is
needed from one which suffices. So sites are judged under a class-neutral ablation (NEUTRAL), and each kind is set
beside what it can take away at most: the whole residual stream of the last layer, ablated likewise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd
from pydantic import Field

from lib import effects
from lib.batches import NEUTRAL
from pipeline.assumed import Case, of_sweep
from pipeline.declaration import ANALYSED, Declaration, Table
from pipeline.params import Ablations, Components, Roles, Shared
from pipeline.step import Step, StepError, swept, with_gap
from pipeline.units import Unit, subsample, sweep_units


class Necessity(Shared):
    """03: every site ablated in the clean run."""

    components: Components = Field(("resid", "attn", "mlp", "head"), description="components swept at `last`")
    ablations: Ablations = Field(
        ("zero", "mean", "resample", "counterfactual"), description="kinds of ablation at `last`"
    )
    pairs: int | None = Field(None, ge=1, description="pairs at `last`; default all")
    name_roles: Roles = Field(
        ("name_a", "name_b", "names", "between"), description="other roles swept, counterfactual only"
    )
    name_components: Components = Field(("resid", "attn", "mlp"), description="components swept at the other roles")
    name_pairs: int = Field(40, ge=1, description="pairs at the other roles")


def units(step: Step | Case) -> list[Unit]:
    """Every site at `last` under each ablation, the whole final residual among them; the other roles' modules under the
    counterfactual one."""
    p, prompts, layers, final = step.params, step.prompts(), step.layers, step.n_layers - 1
    last, names = subsample(prompts, p.pairs), subsample(prompts, p.name_pairs)
    how = {"role": "last", "ablations": p.ablations}
    out = sweep_units("last", last, prompts, components=p.components, layers=layers, **how)
    if "resid" not in p.components or final not in layers:
        out += sweep_units("ceiling", last, prompts, components=["resid"], layers=[final], **how)
    for role in p.name_roles:
        out += sweep_units(role, names, role=role, components=p.name_components, layers=layers)
    return out


SWEEP = Table("necessity", units, swept, of_sweep, columns=ANALYSED)


def assumed(case: Case) -> Iterator[tuple[Any, ...]]:
    """The one table."""
    yield (SWEEP,)


STEP = Declaration("necessity", Necessity, assumed, layered=True)


def ablation_tables(records: pd.DataFrame, settings: Shared) -> dict[str, pd.DataFrame]:
    """`both_halves` for each ablation at `last`, without `resid`: one family of tests each."""
    own = records[(records["position"] == "last") & (records["component"] != "resid")]
    return {kind: effects.both_halves(rows, settings) for kind, rows in own.groupby("ablation", sort=False)}


class Measured(NamedTuple):
    """What step 03 has measured."""

    records: pd.DataFrame
    sites: dict[str, pd.DataFrame]  # effects of sites at `last` by half, for each ablation; the leading one first
    lead: str  # the ablation that sites are ranked by


def lead_of(tables: Mapping[str, pd.DataFrame]) -> str:
    """The ablation that judges: the first class-neutral one that both halves have (a pair may lack donors), else the
    first of all."""
    halves = {kind: {*table["half"]} for kind, table in tables.items()}
    whole = [kind for kind in tables if halves[kind] == set.union(*halves.values())]
    return next((kind for kind in NEUTRAL if kind in whole), [*whole, *tables][0])


def run(step: Step) -> Measured:
    """Measure, or read what is there."""
    sweep = with_gap(step.table(SWEEP))
    tables = ablation_tables(sweep, step.params)
    if not tables:
        kinds = ", ".join(step.params.ablations)
        raise StepError(f"no pair has donors for the ablations {kinds}: give zero or counterfactual as well")
    lead = lead_of(tables)
    return Measured(sweep, {lead: tables[lead], **tables}, lead)
