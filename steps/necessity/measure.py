"""Step 03, measured: every site ablated in the clean run, under each kind of ablation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd
from pydantic import Field

from lib import effects
from pipeline.assumed import Case, of_sweep
from pipeline.declaration import ANALYSED, Declaration, Table
from pipeline.params import Ablations, Components, Roles, Shared
from pipeline.step import Step, swept
from pipeline.units import Unit, subsample, sweep_units


class Necessity(Shared):
    """03: every site ablated in the clean run."""

    components: Components = Field(("resid", "attn", "mlp", "head"), description="components swept at `last`")
    ablations: Ablations = Field(
        ("zero", "mean", "resample", "counterfactual"), description="kinds of ablation at `last`"
    )
    pairs: int | None = Field(None, ge=1, description="pairs at `last`; default all")
    name_roles: Roles = Field(("name_a", "name_b", "names"), description="name roles swept, counterfactual only")
    name_components: Components = Field(("resid", "attn", "mlp"), description="components swept at the name roles")
    name_pairs: int = Field(40, ge=1, description="pairs at the name roles")


def units(step: Step | Case) -> list[Unit]:
    """Every site at `last` under each ablation; the names' modules under the counterfactual one."""
    p, prompts, layers = step.params, step.prompts(), step.layers
    last, names = subsample(prompts, p.pairs), subsample(prompts, p.name_pairs)
    out = sweep_units("last", last, role="last", components=p.components, ablations=p.ablations, layers=layers)
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


def run(step: Step) -> Measured:
    """Measure, or read what is there. The counterfactual ablation leads where it was run."""
    sweep = step.table(SWEEP)
    tables = ablation_tables(sweep, step.params)
    lead = "counterfactual" if "counterfactual" in tables else next(iter(tables))
    return Measured(sweep, {lead: tables[lead], **tables}, lead)
