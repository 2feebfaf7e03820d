"""Step 03, measured."""

from __future__ import annotations

from pydantic import Field

from pipeline.params import Ablations, Components, Roles, Shared


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
