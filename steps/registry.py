"""The plan: its steps in order, and how a notebook begins one of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import Markdown, display

from lib import weights
from pipeline import step as steps
from pipeline import workers
from pipeline.declaration import Plan
from pipeline.step import Step
from planted import build
from planted.options import PREFIX
from report import words
from steps.baselines import measure as baselines
from steps.coarse_sweep import measure as coarse_sweep
from steps.generality import measure as generality
from steps.hydra import measure as hydra
from steps.necessity import measure as necessity
from steps.neurons import measure as neurons
from steps.retrieval_heads import measure as retrieval_heads
from steps.story import measure as story
from steps.subspace import measure as subspace
from steps.sufficiency import measure as sufficiency

ORDER = (
    baselines,
    coarse_sweep,
    necessity,
    sufficiency,
    hydra,
    retrieval_heads,
    generality,
    subspace,
    neurons,
    story,
)
weights.MAKERS[PREFIX] = build.folder  # models whose circuit is set by hand
PLAN = Plan(__name__, [step.STEP for step in ORDER])


def given(step: Step) -> str:
    """What a page says of the pairs that it was given; they are read and checked here, before anything is computed."""
    pairs, name = step.pairs(), Path(step.params.pairs_file).name
    few = "" if pairs["quad_id"].is_unique else ": pairs that share a name, or have one quad_id, count as one"
    others = " What is asked about single names, and what is probed, is of the table of people, not of these pairs."
    of_table = others * ("people_file" in step.declaration.files)
    asked, fewer = getattr(step.params, "pairs", None), ""
    if isinstance(asked, int) and asked < len(pairs):
        what = type(step.params).model_fields["pairs"].description or "how many are taken"
        fewer = f" Not all are taken: `pairs` is {asked} ({what.partition(';')[0]})."
    return f" Pairs: the {len(pairs)} of `{name}`, in {pairs['quad_id'].nunique()} quads{few}.{fewer}{of_table}"


def begin(name: str, namespace: Mapping[str, Any]) -> Step:
    """The step of a notebook, from its `globals()`, with a line on what it is about.

    Where the model does not do the task, or there is no slice to ask about, the page ends here: its findings say so.
    """
    for limit in ("max_colwidth", "max_rows"):  # a page's tables are whole
        pd.set_option(f"display.{limit}", None)
    step = steps.begin(PLAN, name, namespace, workers.engine_of)
    own = step.declaration
    if step.params.model.startswith(PREFIX):
        build.copy_truth(step.params.model, step.results)
    if own.name == PLAN.names[0]:  # it is what the others ask
        return step
    able = step.able()
    layers = f" Swept: {step.layers_from}." if own.layered and able else ""
    pairs = given(step) if step.params.pairs_file and able else ""
    display(Markdown(f"Model `{step.params.model}`, task `{step.params.task}`: {able.why}.{pairs}{layers}"))
    if not able and not own.always:
        words.ends_here(step.write_findings(words.not_done(step)))
    return step
