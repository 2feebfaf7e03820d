"""Circuits against one-by-one patching, and the search on a model whose circuit is known."""

import contextlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_sweep import PAIRS

from lib import hooks, records, single_pass, sweep
from steps.story import circuits, measure
from steps.story.circuits import ALL, NOTHING, Circuit

TESTS = {
    "two": Circuit(True, ("1.2", "mlp 2")),
    "one head": Circuit(True, ("0.3",)),
    "without": Circuit(False, ("0.1", "mlp 1", "2.0", "2.3")),
    "whole layer": Circuit(False, ("1.0", "1.1", "1.2", "1.3", "mlp 1")),
    "again": Circuit(True, ("mlp 2", "1.2")),
}


EVERYWHERE = {
    "few": Circuit(True, ("0.1 at names", "mlp 0 at rest", "1.2 at between", "mlp 2 at last", "2.0")),
    "names": Circuit(True, ("mlp 0 at names", "1.3 at names")),
    "without": Circuit(False, ("0.3 at names", "mlp 1 at between", "2.2 at last", "1.1 at rest")),
    "no MLP": Circuit(False, tuple(f"mlp {n} at {role}" for n in range(3) for role in circuits.EVERYWHERE)),
    "at last": Circuit(True, ("1.2", "mlp 2")),
}


def by_hand(model, pair, circuit, ids, roles=circuits.AT_LAST):
    """logit_diff and margin with every site outside the circuit patched, by plain hooks and full forward passes."""
    every, named = hooks.all_sites(model, ("head", "mlp")), {name.removesuffix(" at last") for name in circuit.sites}
    with hooks.capture(model, every) as seen:
        model.model(torch.tensor([ids]))
    with contextlib.ExitStack() as patches:
        for role in roles:
            tokens, end = list(pair.clean.roles[role]), "" if role == "last" else f" at {role}"
            gone = [site for site in every if (hooks.site_name(*site) + end in named) != circuit.only]
            patches.enter_context(hooks.patch(model, {site: seen[site][:, tokens] for site in gone}, tokens))
        logits = model.model(torch.tensor([pair.clean.ids])).logits[0, -1]
    own = logits[list(pair.clean_tokens)]
    others = torch.cat([own[: pair.answer], own[pair.answer + 1 :]])
    return (own[pair.answer] - own[pair.corrupt_answer]).item(), (own[pair.answer] - others.max()).item()


@pytest.mark.parametrize("roles", [circuits.AT_LAST, circuits.EVERYWHERE])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2", "qwen3"])
@torch.no_grad()
def test_every_circuit_equals_patching_one_by_one(tiny, name, roles):
    model, pairs, tests = tiny(name), PAIRS[:3], TESTS if roles == circuits.AT_LAST else EVERYWHERE
    how = {"ablations": ("resample", "counterfactual"), "pool": PAIRS, "seed": 3, "roles": roles}
    frame = circuits.run(model, pairs, tests, **how)
    records.conform(frame, circuits.SCHEMA)
    assert len(frame) == 3 * 2 * (2 + len(tests))
    rows = frame.set_index(["pair_id", "ablation", "test"])
    for pair in pairs:
        donors = {"resample": circuits.resampled(pair, PAIRS, 3), "counterfactual": pair.corrupt.ids}
        for kind, ids in donors.items():
            for test, circuit in (tests | {"everything": ALL, "nothing": NOTHING}).items():
                found = rows.loc[(pair.pair_id, kind, test), ["logit_diff", "metric"]].tolist()
                assert found == pytest.approx(by_hand(model, pair, circuit, ids, roles), abs=1e-9), (kind, test)
    assert rows["logit_diff"].groupby("test").std().min() > 0.01


@torch.no_grad()
def test_on_the_bundled_model_and_against_the_sweep(smollm, two_pairs):
    tests = {"circuit": Circuit(True, ("21.6", "27.1", "mlp 29")), "without": Circuit(False, ("21.6", "mlp 23"))}
    frame = circuits.run(smollm, two_pairs, tests, ablations=("counterfactual",)).set_index(["pair_id", "test"])
    for pair in two_pairs:
        for test, circuit in tests.items():
            wanted = by_hand(smollm, pair, circuit, pair.corrupt.ids)
            assert frame.loc[(pair.pair_id, test), ["logit_diff", "metric"]].tolist() == pytest.approx(wanted, abs=1e-4)


def test_resamples_are_those_of_the_sweep(tiny):
    model, names = tiny("llama"), {"gone": Circuit(False, ("1.2", "mlp 0"))}
    own = circuits.run(model, PAIRS, names, seed=5).query("test == 'gone'").set_index("pair_id")["logit_diff"]
    sets = [[hooks.Site(1, "head", 2), hooks.Site(0, "mlp")]]
    joint = sweep.run(model, PAIRS, site_sets=sets, ablations=("resample",), seed=5).set_index("pair_id")
    assert (own - joint["logit_diff_after"]).abs().max() < 1e-6


def test_circuits_share_what_they_share(tiny):
    """Rows of a layer: no more than there are ways up to it."""
    model = tiny("llama")
    kept = circuits.kept_parts(model, [Circuit(True, (f"2.{head}",)) for head in range(4)] + [ALL, NOTHING])
    tree, place = circuits.branches(kept)
    assert [len(branch.parent) for branch in tree] == [2, 2, 6]
    assert sorted(place) == list(range(6)) and (tree[2].kept[place] == kept[:, 2]).all()
    with pytest.raises(ValueError, match="resid.*heads and MLPs"):
        circuits.kept_parts(model, [Circuit(True, ("resid 1",))])
    with pytest.raises(ValueError, match="layer 9 is not in"):
        circuits.kept_parts(model, [Circuit(True, ("mlp 9",))])
    with pytest.raises(ValueError, match="at names cannot be in a circuit: its sites are heads and MLPs at last"):
        circuits.kept_parts(model, [Circuit(True, ("mlp 1 at names",))])


def test_a_pass_over_all_tokens_starts_at_the_names(tiny):
    pair, roles = PAIRS[0], circuits.EVERYWHERE
    assert list(circuits.tokens_of(pair, roles)) == [3, 4, 5, 6, 7, 8, 9]
    assert [roles[number] for number in circuits.role_at(pair, roles)] == (
        ["names", "names", "rest", "names", "between", "between", "last"]
    )
    assert circuits.roles_of(pair) == list(roles) and circuits.roles_of(pair, ("last",)) == ["last"]
    other = replace(pair.corrupt, ids=(9, *pair.corrupt.ids[1:]))
    pairs = [replace(pair, corrupt=other)]
    with pytest.raises(single_pass.SweepError, match="differ before the names"):
        circuits.run(tiny("llama"), pairs, {}, ablations=("counterfactual",), roles=roles)


def test_a_pass_proves_itself(tiny, monkeypatch):
    model = tiny("llama")
    every = circuits.kept_parts
    for which, wrong in ((0, "everything differs"), (1, "nothing differs")):
        with monkeypatch.context() as patched:

            def flipped(model, tested, roles, which=which):
                kept = every(model, tested, roles)
                kept[which, 1, 2] ^= True
                return kept

            patched.setattr(circuits, "kept_parts", flipped)
            with pytest.raises(single_pass.SweepError, match=f"pair p0: the circuit of {wrong}"):
                circuits.run(model, PAIRS[:1], {}, ablations=("counterfactual",))


def test_the_search_finds_a_known_circuit(tiny, monkeypatch):
    """Two sites that work only together, one that helps alone, one that helps until the two are there."""
    worth = {"mlp 0": 0.3, "1.1": 0.02, "2.0": 0.02, "0.2": 0.25}

    def logits(model, ready, tested):
        rows = []
        for circuit in (ALL, NOTHING, *tested):
            sites = set(circuit.sites) if circuit.only else set(worth)
            value = sum(worth.get(site, 0) for site in sites) + 0.66 * ({"1.1", "2.0"} <= sites)
            value -= 0.25 * ({"1.1", "2.0", "0.2"} <= sites)
            rows.append(np.zeros((1, len(ready.pairs), 4)))
            for index, pair in enumerate(ready.pairs):
                rows[-1][0, index, pair.answer] = value
        return np.array(rows)

    monkeypatch.setattr(circuits, "scored", logits)
    sites = [hooks.site_name(*site) for site in hooks.all_sites(tiny("llama"), ("head", "mlp"))]
    frame = circuits.search(tiny("llama"), PAIRS, sites, share=0.9, limit=8)
    records.conform(frame, circuits.SEARCH_SCHEMA)
    grown = frame[frame["chosen"] & (frame["phase"] == "grow")]["site"].tolist()
    assert grown[:2] == ["mlp 0", "0.2"] and {"1.1", "2.0"} <= set(grown)
    pruned = frame[frame["chosen"] & (frame["phase"] == "prune")]["site"].tolist()
    assert set(grown) - set(pruned) == {"mlp 0", "1.1", "2.0"}
    assert frame[frame["chosen"]]["faithfulness"].iloc[-1] == pytest.approx(1.0)
    monkeypatch.setattr(circuits, "scored", lambda *a: np.zeros((2, 1, len(a[1].pairs), 4)))
    assert circuits.search(tiny("llama"), PAIRS, sites, share=0.9, limit=8).empty


@pytest.mark.parametrize("alone", [0.0, 0.2])
def test_the_search_finds_a_chain_of_which_no_site_does_anything_alone(tiny, monkeypatch, alone):
    """The second time beside a site that does something by itself, so that more is reached than the average."""
    sites = [hooks.site_name(*site) for site in hooks.all_sites(tiny("llama"), ("head", "mlp"))]
    chain, single = {"1.1", "2.0", "mlp 2"}, {"0.1"} if alone else set()

    def logits(model, ready, tested):
        kept = [set(one.sites) if one.only else set(sites) - {*one.sites} for one in (ALL, NOTHING, *tested)]
        rows = np.zeros((len(kept), 1, len(ready.pairs), 4))
        for row, own in zip(rows, kept, strict=True):
            for index, pair in enumerate(ready.pairs):
                done = (1 - alone) * (chain <= own) + alone * (single <= own)
                row[0, index, pair.answer] = done + 0.001 * len(own - chain - single)
        return rows

    monkeypatch.setattr(circuits, "scored", logits)
    frame = circuits.search(tiny("llama"), PAIRS, sites, share=0.9, limit=8)
    assert set(frame[frame["chosen"] & (frame["phase"] == "grow")]["site"]) == chain | single


def test_pairs_without_donors(tiny):
    alone = [PAIRS[0], PAIRS[1]]  # one quad
    assert measure.of_one_kind(alone, alone) == (alone, "counterfactual")
    assert measure.of_one_kind(PAIRS, PAIRS) == (PAIRS, "resample")
    frame = circuits.run(tiny("llama"), alone, {}, ablations=("counterfactual",))
    assert isinstance(frame, pd.DataFrame) and set(frame["test"]) == {"everything", "nothing"}
