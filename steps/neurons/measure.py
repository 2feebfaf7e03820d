"""Step 09, measured."""

from __future__ import annotations

from pydantic import Field

from pipeline.params import Counts, OfSlice, SaeSite, Share


class Neurons(OfSlice):
    """09: every MLP neuron of the slice's layers; features of sparse autoencoders."""

    pairs: int = Field(16, ge=1, description="pairs on which every neuron is swept")
    top_neurons: int = Field(50, ge=1, description="neurons of largest effect, swept on all pairs")
    top_pairs: int | None = Field(None, ge=1, description="pairs on which the top neurons are swept; default all")
    random_sets: int = Field(3, ge=1, description="sets of random neurons replaced beside the top ones")
    cards: int = Field(8, ge=1, description="neurons and features that get a card")
    sae_site: SaeSite | None = Field(
        None,
        description="where features are read: mlp 23 or resid 23; default: the MLP of the slice with most recovery",
    )
    sae_file: str | None = Field(None, description="folder or file of a published SAE, instead of training one")
    sae_features: int = Field(1024, ge=2, description="features of a trained SAE")
    sae_active: int = Field(32, ge=1, description="features that are active at once (k of the top-k)")
    sae_prompts: int = Field(3000, ge=1, description="sentences that activations are harvested from")
    sae_epochs: int = Field(4, ge=1, description="passes over the harvested activations")
    sae_seeds: int = Field(3, ge=2, description="trainings from different seeds, whose features are compared")
    sae_selective: Share = Field(
        0.8, description="area under the curve from which a feature or a neuron counts as selective for a superset"
    )
    budgets: Counts = Field(
        (1, 2, 4, 8, 16, 32), description="numbers of neurons, features and directions patched together"
    )
