"""What the last token reads elsewhere: against attention written out by hand, and what the page makes of it."""

import functools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from test_sweep import FP64_TOLERANCE, PAIRS, plain

from lib import batches, hooks, paths, records, token_reads
from lib.hooks import Site
from lib.token_reads import Read, read_elsewhere
from pipeline.params import Shared
from steps.retrieval_heads import hops, hops_page

SETTINGS = Shared(model="config:none.json", resamples=500, flips=500)
PAIR = PAIRS[0]
ARCHITECTURES = ["llama", "qwen3", "gemma2", "gpt2"]


def both(model, pairs=(PAIR,)):
    return batches.both_runs(model, list(pairs), pairs[0].clean.roles["last"], ())


def by_hand(model, read: Read) -> torch.Tensor:
    """GPT-2's clean run with attention written out; the last query alone meets the corrupt run's keys and values."""
    kept: dict[int, list[torch.Tensor]] = {}

    def attend(layer: int, taken: bool, hidden_states: torch.Tensor, **_) -> tuple:
        attention = model.attns[layer]
        q, k, v = (
            part.unflatten(-1, (model.n_heads, -1)).transpose(1, 2)
            for part in attention.c_attn(hidden_states).split(32, 2)
        )
        if not taken:
            kept[layer] = [k, v]
        tokens, out = q.shape[2], []
        for query in range(tokens):
            keys, values = k.clone(), v.clone()
            if taken and query == tokens - 1:
                for at, head in read.heads or [(layer, head) for head in range(model.n_heads)]:
                    for token in read.tokens if at == layer else ():
                        keys[:, head, token], values[:, head, token] = (part[:, head, token] for part in kept[layer])
            scores = (q[:, :, query : query + 1] @ keys[:, :, : query + 1].transpose(2, 3)) / math.sqrt(q.shape[-1])
            out.append(scores.softmax(-1) @ values[:, :, : query + 1])
        return attention.c_proj(torch.cat(out, 2).transpose(1, 2).flatten(2)), None

    for taken, ids in ((False, PAIR.corrupt.ids), (True, PAIR.clean.ids)):
        forwards = [(model.attns[layer], functools.partial(attend, layer, taken)) for layer in range(model.n_layers)]
        with torch.no_grad(), hooks.with_forwards(forwards):
            out = model.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return out


@pytest.mark.parametrize("heads", [None, ((0, 1),), ((1, 0), (1, 3), (2, 2))])
@pytest.mark.parametrize("role", ["names", "between", "rest"])
def test_only_the_last_query_meets_the_other_runs_keys_and_values(tiny, heads, role):
    model = tiny("gpt2")
    read = Read(heads, PAIR.clean.roles[role])
    base, (found,) = read_elsewhere(model, *both(model), [read])
    expected = by_hand(model, read)
    assert torch.allclose(model.logits(found)[0], expected, atol=FP64_TOLERANCE)
    assert torch.allclose(model.logits(base)[0], plain(model, PAIR.clean.ids), atol=FP64_TOLERANCE)
    moved = (expected - plain(model, PAIR.clean.ids)).abs().max()
    if heads == ((0, 1),):  # in the first layer a token holds itself alone: only the names differ
        assert (moved > 1e-6) == (role == "names")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_heads_at_all_tokens_give_the_other_run_in_passes_of_any_size(tiny, name, monkeypatch):
    model, pairs = tiny(name), PAIRS[:2]
    every = Read(None, tuple(range(9)))
    some = Read(((1, 0),), (3, 4, 6))
    _, found = read_elsewhere(model, *both(model, pairs), [some, every, Read(None, ())])
    for place, pair in enumerate(pairs):
        assert torch.allclose(model.logits(found[1, place]), plain(model, pair.corrupt.ids), atol=FP64_TOLERANCE)
        assert torch.allclose(model.logits(found[2, place]), plain(model, pair.clean.ids), atol=FP64_TOLERANCE)
    monkeypatch.setattr(token_reads.single_pass, "row_limit", lambda *_: 2)
    assert torch.allclose(read_elsewhere(model, *both(model, pairs), [some])[1][0], found[0], atol=FP64_TOLERANCE)


def test_runs_that_cannot_be_told_apart_by_what_is_read_are_refused(tiny):
    model = tiny("llama")
    clean, corrupt = both(model)
    other = corrupt.ids.clone()
    other[:, -1] = 50
    with pytest.raises(ValueError, match="last tokens differ"):
        read_elsewhere(model, clean, token_reads.BaseRun(other, (9,), corrupt.hidden, {}, corrupt.cache), [])
    broken = token_reads.BaseRun(corrupt.ids, (9,), corrupt.hidden + 1, {}, corrupt.cache)
    with pytest.raises(token_reads.single_pass.SweepError, match="with everything read elsewhere"):
        read_elsewhere(model, clean, broken, [])


def test_the_slices_heads_read_what_their_keys_and_values_hold(tiny):
    model, sites = tiny("llama"), [Site(1, "head", 3), Site(1, "head", 0), Site(2, "mlp")]
    table = hops.read(model, PAIRS[:3], sites, 1.0)
    records.conform(table, hops.SCHEMA)
    assert list(dict.fromkeys(table["reader"])) == [hops.EVERY, hops.SLICE, "1.3", "1.0"]
    shared = hops.readers(model, [Site(1, "head", 3), Site(1, "head", 2)])
    assert shared == {hops.EVERY: None, hops.SLICE: ((1, 1),), "1.2 + 1.3": ((1, 1),)}
    first = table[(table["pair_id"] == "p0") & (table["position"] == "names")].set_index("reader")
    whole = ((1, paths.receivers_of(model, sites[:1], {"k": "last"})[0].head), (1, 0))
    _, (found,) = read_elsewhere(model, *both(model), [Read(whole, PAIR.clean.roles["names"])])
    logits = model.logits(found)[0]
    answer, other = (PAIR.clean_tokens[place] for place in (PAIR.answer, PAIR.corrupt_answer))
    assert first.loc[hops.SLICE, "logit_diff_after"] == pytest.approx((logits[answer] - logits[other]).item(), abs=1e-9)
    assert first["logit_diff_before"].tolist() == pytest.approx([first["logit_diff_clean"].iloc[0]] * 4, abs=1e-9)
    assert hops.read(model, PAIRS[:1], [Site(2, "mlp")], 1.0)["reader"].unique().tolist() == [hops.EVERY]


def read_records(quads: int = 30) -> pd.DataFrame:
    """Of a gap of 8 the slice reads 4 at the names and 2 between, of which head 27.1 reads all."""
    rng = np.random.default_rng(0)
    lost = {(hops.SLICE, "names"): 4, (hops.SLICE, "between"): 2, (hops.SLICE, "rest"): 0}
    lost |= {("21.6", "names"): 4, ("21.6", "between"): 0.5, ("27.1", "names"): 0, ("27.1", "between"): 2}
    rows = [
        {"quad_id": f"q{quad}", "pair_id": f"q{quad}.0", "reader": reader, "position": role,
         "logit_diff_after": 4 - value + 0.01 * rng.normal()}
        for quad in range(quads) for (reader, role), value in lost.items()
    ]  # fmt: skip
    fixed = {"half": "confirmation", "direction": "noise", "logit_diff_before": 4.0, "logit_diff_clean": 4.0}
    return pd.DataFrame(rows).assign(**fixed, logit_diff_corrupt=-4.0)


def test_shares_add_up_to_one_and_sentences_name_who_reads_between():
    shares = hops_page.shares(read_records(), SETTINGS)
    own = shares[shares["reader"] == hops.SLICE].set_index("position")["estimate"]
    assert own.to_dict() == pytest.approx({"names": 0.5, "between": 0.25, "rest": 0, "remainder": 0.25}, abs=0.01)
    assert shares.loc[shares["position"] == "remainder", "reader"].tolist() == [hops.SLICE]
    said = hops_page.sentences(shares)
    alike = "with those that share their keys and values"
    assert said[0].startswith(f"What the slice's heads, {alike}, read at the last token: 0.25 [")
    assert "| `names` | 0.50 [0.50, 0.50] |\n| `between` | 0.25" in said[0]
    assert said[1].startswith(f"Of the slice's heads, {alike}, head 27.1 reads most at `between`: 0.25 [")
    assert said[1].endswith("picked and reported on the same pairs).")
    assert len(hops_page.sentences(shares.assign(low=-0.1))) == len(said) - 1, "most of what may be nothing"
    assert hops_page.table(shares).columns.tolist() == ["reader", "names", "between", "rest", "remainder"]
    assert "| `names` | 0.50 |" in hops_page.sentences(hops_page.shares(read_records(4), SETTINGS))[0]  # no interval
