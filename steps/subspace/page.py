"""Step 08 on its page: what probes read off the residual stream, what its directions do, and interchanges."""

from __future__ import annotations

from typing import Any, NamedTuple

from pipeline.step import Step
from report.words import about_model, finished
from steps.subspace import confounds_page, directions_page, interchange_page, probes_page
from steps.subspace.measure import Measured


class Numbers(NamedTuple):
    """Everything that the page says, in numbers."""

    probes: probes_page.Numbers | None
    directions: directions_page.Numbers
    interchange: interchange_page.Numbers
    confounds: confounds_page.Numbers


def numbers(step: Step, m: Measured) -> Numbers:
    """What figures, sentences and findings rest on."""
    parts = (probes_page, directions_page, interchange_page, confounds_page)
    return Numbers(*(part.numbers(m, step.params) for part in parts))


def findings(step: Step, m: Measured, n: Numbers) -> dict[str, Any]:
    """The findings of step 08: probes, the rank of the map, directions."""
    sentences, headline = directions_page.sentences(m, n.directions, step.params)
    found = {
        "model": about_model(step),
        "task": step.params.task,
        "able": True,
        **probes_page.found(n.probes),
        "directions": directions_page.found(m, n.directions),
        "confounds": n.confounds.found(),
        "interchange": interchange_page.found(n.interchange),
        "sentences": [
            *probes_page.sentences(m, n.probes, step.params.pairs_file is not None, probes_page.looked_up(step)),
            *sentences,
            *interchange_page.sentences(n.interchange),
            *confounds_page.sentences(m, n.confounds, step.params),
        ],
        "headline": headline,  # what directions can do says more than probes
    }
    figures = {
        "probes": probes_page.accuracy_figure(n.probes),
        "rank": probes_page.rank_figure(n.probes),
        "layers": directions_page.layer_figure(n.directions),
        "numbers": directions_page.number_figure(n.directions),
        "doses": directions_page.dose_figure(n.directions),
        "interchange": interchange_page.figure(n.interchange),
    }
    figures = {name: figure for name, figure in figures.items() if figure is not None}
    return finished(step, found, figures, probes_page.CAPTIONS | directions_page.CAPTIONS | interchange_page.CAPTIONS)
