"""Step 08, measured."""

from __future__ import annotations

from pydantic import Field

from pipeline.params import Counts, Doses, OfSlice, Words


class Subspace(OfSlice):
    """08: probes, the rank of the map, patching and steering along directions."""

    pairs: int | None = Field(None, ge=1, description="pairs on which directions are patched; default all")
    probe_people: int = Field(500, ge=1, description="most people that probes ask about with one-name prompts")
    probe_template: str = Field("common_both", description="the pairs' second template, which probes are tried in")
    probe_questions: Words = Field(
        ("profession_is", "What {a} does for a living is"), description="one-name templates; the first one leads"
    )
    probe_folds: int = Field(5, ge=2, description="folds of the probes")
    permutations: int = Field(20, ge=2, description="permutations of the labels in the probes' null")
    ranks: Counts = Field((1, 2, 3, 4, 8, 14), description="ranks of the reduced probes, beside the largest there is")
    dimensions: Counts = Field((1, 2, 3, 4, 8, 16), description="numbers of directions that are patched together")
    random_directions: int = Field(10, ge=2, description="norm-matched random subspaces patched beside each number")
    rotation_steps: int = Field(100, ge=1, description="optimiser steps in which a rotation is learned")
    templates: Words = Field(
        ("profession_both", "both_famous", "common_both"), description="templates that directions are moved between"
    )
    steering_pairs: int = Field(
        40, ge=1, description="prompts that are steered, of each kind: mixed, invented names, things"
    )
    doses: Doses = Field(
        (-2, -1, -0.5, 0, 0.5, 1, 2), description="multiples of class mean - mean of all classes that are added"
    )
