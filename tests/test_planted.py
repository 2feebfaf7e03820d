"""Planted models: their truth, by formula, is what the transformer does, by plain hooks, one forward pass a site."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from planted import build
from planted.circuit import Head
from planted.effects import Contrast
from planted.options import parse
from planted.question import CLASSES, FOLDER

TEXT = "We know {} and {} are both"
PEOPLE = pd.read_csv(FOLDER / "people.csv")
EXACT = 1e-3  # of the gap


@pytest.fixture(scope="module")
def words():
    return build.tokenizer()


def named(superset: str, length: int, region: str = "north", start: int = 0) -> list[str]:
    """Two people of a class with names of so many tokens."""
    own = PEOPLE[(PEOPLE.superset == superset) & (PEOPLE.region == region)]
    return own[own.name.str.count(" ") == length - 1].name.tolist()[start : start + 2]


class Hooked:
    """A transformer seen through plain hooks: prompts of names, logits of answers, sites replaced."""

    def __init__(self, spec: str, words) -> None:
        self.o = parse(spec)
        self.model, _, self.parts = build.weights(self.o)
        self.words = words
        self.classes = [words.get_vocab()[f" {c}s"] for c in CLASSES]
        self.regions = [words.get_vocab()[f" {c}erners"] for c in ("north", "south")]

    def module(self, part):
        layer = self.model.model.layers[part.layer]
        return layer.self_attn.o_proj if isinstance(part, Head) else layer.mlp

    def tokens(self, part, ids):
        """Where a part acts: the name's tokens, those between, the last."""
        known = self.words.convert_ids_to_tokens(ids)
        ends = (known.index(" know") + 1, known.index(" and"), known.index(" are"))
        names = [*range(ends[0], ends[1]), *range(ends[1] + 1, ends[2])]
        return {"names": names, "between": [ends[2]], "last": [len(ids) - 1]}[part.position]

    @torch.no_grad()
    def run(self, names, part=None, values=None):
        """The logits, and what the part wrote (before the projection of a head); `values` replaces it."""
        ids = self.words(TEXT.format(*names)).input_ids
        kept = {}

        def hook(at, z):
            columns = slice(32 * part.head, 32 * part.head + 32) if isinstance(part, Head) else slice(None)
            kept["z"] = z[0, at, columns].clone()
            if values is not None:
                z = z.clone()
                z[0, at, columns] = values
            return z

        handle = None
        if part is not None:
            at = self.tokens(part, ids)
            if isinstance(part, Head):
                handle = self.module(part).register_forward_pre_hook(lambda _, args: (hook(at, args[0]),))
            else:
                handle = self.module(part).register_forward_hook(lambda _, args, z: hook(at, z))
        try:
            logits = self.model(torch.tensor([ids])).logits[0, -1]
        finally:
            if handle is not None:
                handle.remove()
        return logits, kept.get("z")


SPECS = [
    "planted:",
    "planted:seed=1,rule=or,retrieval=3,between=0.3",
    "planted:seed=2,rule=and,retrieval=4,n_kv_heads=2,n_layers=12",
    "planted:seed=3,backup=0.7,backup_read=mlp,backup_wakes=unsaid,logits=40",
    "planted:seed=4,backup=0.5,aggregator=both,rotated=true",
    "planted:seed=5,decoys=attends+large+negative,class_only=true,placebo=true",
    "planted:seed=6,routes=v+k+q,aggregator=head",
    "planted:seed=7,no_circuit=lookup",
]


@pytest.mark.parametrize("spec", SPECS)
def test_every_effect_of_the_truth_is_what_plain_hooks_measure(spec, words):
    own = Hooked(spec, words)
    for pair in ((0, 1), (1, 2), (2, 3)):
        for i, part in enumerate(own.parts):
            gathers = part.role == "gather"
            length = part.offset + 1 if gathers else 1 if part.role == "lookup" else 2
            formula = Contrast(own.o, own.parts, pair, length)
            clean, corrupt = (named(CLASSES[c], length) for c in pair)
            (one, z), (other, w) = own.run(clean, part), own.run(corrupt, part)

            def metric(logits, pair=pair):
                return float(logits[own.classes[pair[0]]] - logits[own.classes[pair[1]]])

            bound = EXACT * formula.gap()
            assert metric(one) - metric(other) == pytest.approx(formula.gap(), abs=bound)
            lost = metric(one) - metric(own.run(clean, part, 0 * z)[0])
            assert lost == pytest.approx(formula.zero(i), abs=bound), (part.role, "zero")
            if not gathers:
                lost = metric(one) - metric(own.run(clean, part, w)[0])
                assert lost == pytest.approx(formula.counterfactual(i), abs=bound), (part.role, "counterfactual")
                won = metric(own.run(corrupt, part, z)[0]) - metric(other)
                assert won == pytest.approx(formula.recovery(i), abs=bound), (part.role, "recovery")
