"""What a step is, said once: its parameters, what its data rest on, and its tables.

1. A `Table` says which work units it has, how a unit is computed and what the units cost. Notebook, planner, keys and
   workers all use this one declaration.
2. A `Declaration` is a step: `steps/<step>/measure.py` makes it.
3. A `Plan` is the steps in order: `steps/registry.py` makes it. Whatever in `pipeline` needs to know of other steps is
   handed a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from pandera.pandas import DataFrameSchema

from lib import records
from pipeline import params as parameters
from pipeline.costs import Work
from pipeline.params import Sections, Shared, step_model
from pipeline.units import Unit

SUPERSET_TASKS = ("superset", "bi_association")
# What steps hand to all others, by the step that leaves it: pairs, and which tasks the model does; layers; the slice.
PAIRS, CRITICAL_LAYERS, SLICE = "baselines", "coarse_sweep", "sufficiency"
# What the findings of steps 02 to 04 read of a table: leaving out the long lists of labels makes reading quick.
ANALYSED = tuple(name for name in records.SCHEMA.columns if not name.startswith("label_logits"))
# What raw effects are read from: which site in which pair, and logit_diff.
EFFECTS = (
    *("layer", "component", "head"),
    *("profile", "task", "template", "pair_id", "quad_id", "half", "direction", "ablation", "position"),
    *("logit_diff_before", "logit_diff_after", "logit_diff_clean", "logit_diff_corrupt"),
)


@dataclass(frozen=True)
class Table:
    """A table of a step. What was chosen from earlier tables is handed to all three functions behind the first
    argument, in the same order.

    name      of its file; the step's own name for the leading table
    units     from the step (or, in the planner, from a `Case`, which answers as a step does) to the units in order: a
              pure function of the parameters, the pairs and what was chosen
    compute   from the step to the function that makes a unit's rows; called only when rows are missing
    cost      from a `Case` and the units to their work, what they share included
    schema    None takes any columns
    columns   those that are read back; None for all
    """

    name: str
    units: Callable[..., Sequence[Unit]]
    compute: Callable[..., Callable[[Unit], pd.DataFrame]]
    cost: Callable[..., Work]
    schema: DataFrameSchema | None = field(default_factory=lambda: records.SCHEMA)
    columns: tuple[str, ...] | None = None

    @classmethod
    def whole(cls, name: str, make: Callable[..., pd.DataFrame], cost: Callable[..., Work], **options: Any) -> Table:
        """A table of one unit, of its own name, and any columns: what `make` gives for the step and what was chosen."""

        def compute(step: Any, *chosen: Any) -> Callable[[Unit], pd.DataFrame]:
            return lambda unit: make(step, *chosen)

        return cls(name, lambda step, *chosen: [Unit(name)], compute, cost, **{"schema": None, **options})


@dataclass(frozen=True)
class Declaration:
    """A step of the plan.

    name          section of profiles, folder in steps/, and name of its results
    params        its parameters
    assumed       from a `Case` to the step's tables in order, each with what the planner assumes to be chosen by then
    layered       whether it goes through the model's layers (the others take those of the slice)
    tasks         the tasks it can be asked about; empty for all
    always        its notebook runs to the end where the model does not do the task, too
    reads         findings of earlier steps that its data rest on: step -> keys
    placebo       whether it sweeps the placebo pairs of step 01, too
    reads_tables  earlier steps whose tables it reads
    files         what its data rest on beside the pairs: parameters that name files, or paths in the repository
    page_keys     keys of its own section that only its page depends on
    page_files    as `files`, what only its page depends on; such a file may be missing
    extra_files   what it leaves in its folder beside <step>.*
    samples       units to time when a machine is calibrated: (model, shape, machine) -> work and what runs it
    timings       seconds of its work beside the model, from the hidden size, by the names used in `Work.other`
    """

    name: str
    params: type[Shared]
    assumed: Callable[[Any], Iterable[tuple[Any, ...]]]
    layered: bool = False
    tasks: tuple[str, ...] = ()
    always: bool = False
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    placebo: bool = False
    reads_tables: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    page_keys: tuple[str, ...] = ()
    page_files: tuple[str, ...] = ()
    extra_files: tuple[str, ...] = ()
    samples: Callable[..., Iterator[tuple[Work, Callable[[], Any]]]] | None = None
    timings: Callable[[int], Mapping[str, float]] | None = None


class Plan:
    """The steps in order; `module` is where the plan can be imported from, by workers too, as PLAN."""

    def __init__(self, module: str, declarations: Sequence[Declaration]) -> None:
        self.module = module
        self.declarations = {declaration.name: declaration for declaration in declarations}

    def __iter__(self) -> Iterator[Declaration]:
        return iter(self.declarations.values())

    def __getitem__(self, step: str) -> Declaration:
        """ParameterError for a step that is not in the plan."""
        step_model(self.sections, step)
        return self.declarations[step]

    @property
    def names(self) -> list[str]:
        return list(self.declarations)

    @property
    def sections(self) -> Sections:
        """Each step's name and parameters."""
        return {declaration.name: declaration.params for declaration in self}

    def before(self, step: str) -> list[str]:
        """The steps that come before one."""
        return self.names[: self.names.index(step)]

    def page(self, step: str) -> str:
        """The name of a step's page and notebook: 04_sufficiency."""
        return f"{self.names.index(step) + 1:02d}_{step}"

    def notebook(self, step: str) -> Path:
        return parameters.ROOT / "notebooks" / f"{self.page(step)}.ipynb"
