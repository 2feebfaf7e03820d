"""Step 09 on its page: its two parts, neurons and features, as one."""

from __future__ import annotations

from typing import Any

from pipeline.step import Step
from report import words
from steps.neurons import features_page, neurons_page
from steps.neurons.measure import Measured


def findings(step: Step, m: Measured) -> dict[str, Any]:
    """The findings of step 09."""
    return step.write_findings(words.joined(step, [neurons_page.part(step, m), features_page.part(step, m)]))
