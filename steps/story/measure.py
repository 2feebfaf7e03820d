"""Step 10, measured."""

from __future__ import annotations

from pydantic import Field

from pipeline.params import OfSlice, Share


class Story(OfSlice):
    """10: the claims ledger, the minimal circuit and the sentence."""

    pairs: int | None = Field(None, ge=1, description="pairs on which circuits are tested; default all")
    search_pairs: int = Field(40, ge=1, description="discovery pairs on which the circuit is searched")
    circuit_limit: int = Field(40, ge=1, description="most sites of a circuit")
    faithful_share: Share = Field(0.8, description="share of logit_diff that a faithful circuit keeps")
    random_sets: int = Field(10, ge=2, description="random circuits of each size")
    subsets: int = Field(20, ge=2, description="subsets of the circuit in the test of completeness")
    attribution_pairs: int = Field(
        32, ge=1, description="pairs on which gradient attribution is compared with patching"
    )
    claims: dict[str, float] = Field(default_factory=dict, description="threshold of each claim; none may be missing")
