"""The logit lens against the model's own final norm and unembedding."""

import pytest
import torch
from test_sweep import PAIRS, captured

from lib.hooks import Site
from lib.readout import readout
from steps.coarse_sweep import lens


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_rank_is_that_behind_the_models_own_norm_and_unembedding(tiny, name):
    model = tiny(name)
    table = lens.read(model, PAIRS[:2], readout(model).norm)
    assert len(table) == 2 * model.n_layers * 3
    ranks = table.set_index(["pair_id", "position", "layer"])["rank"]
    body = model.model.transformer if name == "gpt2" else model.model.model
    norm = body.ln_f if name == "gpt2" else body.norm
    for pair in PAIRS[:2]:
        seen, token = captured(model, pair.clean.ids), pair.clean_tokens[pair.answer]
        for role, at in (("name_a", 4), ("name_b", 6), ("last", 9)):
            for layer in range(model.n_layers):
                with torch.no_grad():
                    logits = model.logits(norm(seen[Site(layer, "resid")][0, at]))
                assert ranks[pair.pair_id, role, layer] == 1 + int((logits > logits[token]).sum())
    assert ranks.nunique() > 3
