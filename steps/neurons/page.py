"""Step 09 on its page: its two parts, neurons and features, as one."""

from __future__ import annotations

from typing import Any

from pipeline.step import Step
from report import words
from steps.neurons import features_page, neurons_page
from steps.neurons.measure import Measured


def findings(step: Step, m: Measured) -> dict[str, Any]:
    """The findings of step 09. Where no neuron does anything, the page ends here."""
    if m.top.empty:
        words.ends_here(step.write_findings(idle(step)))
    return step.write_findings(words.joined(step, [neurons_page.part(step, m), features_page.part(step, m)]))


def idle(step: Step) -> dict[str, Any]:
    """The findings where no neuron moves the answer by more than the noise."""
    floor = f"the model's noise ({step.params.floor:g} logits), on the discovery half"
    why = f"No neuron of the MLPs asked about moves logit_diff by more than {floor}: none is picked."
    about = {"model": words.about_model(step), "task": step.params.task}
    return about | {"able": False, "sentences": [why], "headline": [why], "figures": []}
