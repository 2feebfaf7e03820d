"""Path patching against two full forward passes per path, and whole checks by arithmetic."""

import functools
from dataclasses import replace

import brute_force_paths as brute_force
import numpy as np
import pytest
import torch
from brute_force_paths import Place, before, plain, receiver, singles, values_at
from test_sweep import PAIRS as SWEEP_PAIRS
from test_sweep import ROLES

from lib import batches, paths, records
from lib.hooks import Site, all_sites
from lib.paths import EMBED, Receiver

FP64_TOLERANCE = 1e-9
FP32_TOLERANCE = 1e-4  # x max(1, the path's largest logit change)
MODELS = ("llama", "gpt2", "qwen3", "gemma3")
MLPS = ("frozen", "recomputed")
# every token of the vocabulary is a label, so that a row keeps all its logits
LABELS = {"labels": tuple(f"token {token}" for token in range(101)), "label_tokens": tuple(range(101))}
PAIRS = [replace(pair, **LABELS) for pair in SWEEP_PAIRS]
ELSEWHERE = {role: tuple(i if role in ("last", "all") else i - 1 for i in at) for role, at in ROLES.items()}
MOVED = replace(
    PAIRS[5],
    pair_id="moved",
    clean=replace(PAIRS[5].clean, roles=ELSEWHERE),
    corrupt=replace(PAIRS[5].corrupt, roles=ELSEWHERE),
)


# sender role and receivers; key-value heads are grouped in all models but GPT-2
CASES = {
    "q": ("last", ["q 1.3 last", "q 2.1 last"]),
    "k": ("names", ["k 1.1 names", "k 2.0 names"]),
    "v": ("name_a", ["v 1.0 name_a", "v 2.1 names", "v 2.0 all"]),
    "mlp": ("last", ["mlp 1 last", "mlp 2 all"]),
    "mlp at a name": ("name_a", ["mlp 0 names", "mlp 1 name_a"]),
    "block": ("swapped", ["block 2 all"]),
    "first block": ("names", ["block 0 name_b"]),
    "final": ("last", ["final last"]),
    "final, behind all": ("all", ["block 1 names", "final last"]),
    "every kind": ("all", ["q 1.0 all", "k 1.1 names", "v 2.1 all", "mlp 1 name_a", "mlp 2 last", "q 2.3 swapped"]),
    # a receiver that no changed token reaches is held at its base value, whatever changes before it
    "held": ("names", ["k 1.0 names", "v 1.0 names", "mlp 1 name_b", "q 2.2 last", "mlp 2 last", "k 2.1 names"]),
}


def lender(model, pair, seed, pool=PAIRS):
    """The prompt that a pair's resample is taken from; the choice depends on the pair and the seed alone."""
    lent = batches.pooled(model, {}, pool, pair, "last", [[Site(0, "mlp")]])
    chosen = int(lent.weights(pair, "resample", seed).argmax())
    assert lent.quad[chosen] != pair.quad_id
    return list(dict.fromkeys(ids for own in pool for ids in (own.clean.ids, own.corrupt.ids)))[chosen]


@functools.lru_cache(maxsize=4096)
def by_definition(model, pair_id, direction, ablation, seed, senders, role, receivers, mlps):
    """Logits by the definition, the base run's logits, and how far the receivers' inputs moved."""
    pair = next(pair for pair in (*PAIRS, MOVED) if pair.pair_id == pair_id)
    base, other = [side.ids for side in (pair.clean, pair.corrupt)][:: 1 if direction == "noise" else -1]
    where = pair.clean.roles[role]
    source = values_at(model, lender(model, pair, seed) if ablation == "resample" else other, senders, where)
    if ablation == "zero":
        source = {site: torch.zeros_like(value) for site, value in source.items()}
    logits, arrived = brute_force.patched(model, base, source, where, receivers, pair.clean.roles, mlps)
    return logits, plain(model, base)[0], arrived


def check_row(row, pair, logits, base, arrived, tolerance) -> float:
    """Everything a row says of its logits, against the logits by the definition; returns the largest logit change."""
    logits, base = logits.double(), base.double()
    effect = (logits - base).abs().max().item()
    allowed = tolerance * max(1.0, effect)
    close = functools.partial(pytest.approx, rel=0)
    tokens, rest = list(pair.clean_tokens), [i for i in range(len(pair.candidates)) if i != pair.answer]
    stored = max(allowed, 1e-6 * logits.abs().max().item())  # the list columns are stored in fp32
    assert np.abs(np.array(row.logits_after) - logits[tokens].numpy()).max() <= stored
    assert np.abs(np.array(row.label_logits_after) - logits[list(pair.label_tokens)].numpy()).max() <= stored
    for when, own in (("after", logits), ("before", base)):
        candidates = own[tokens].numpy()
        margin = candidates[pair.answer] - candidates[rest].max()
        difference = candidates[pair.answer] - candidates[pair.corrupt_answer]
        assert getattr(row, f"metric_{when}") == close(margin, abs=2 * allowed)
        assert getattr(row, f"logit_diff_{when}") == close(difference, abs=2 * allowed)
    assert row.top_logit_after == close(logits.max().item(), abs=allowed)
    assert row.logsumexp_after == close(logits.logsumexp(0).item(), abs=allowed)
    kl = torch.nn.functional.kl_div(logits.log_softmax(0), base.softmax(0), reduction="sum").item()
    assert row.kl_after == close(kl, abs=10 * allowed)
    assert row.arrived == close(arrived, abs=max(allowed, 10 * tolerance * arrived))
    assert row.fired == 1
    return effect


def check_frame(model, frame, sets, role, receivers, mlps, tolerance, rows=16) -> float:
    """A sample of rows against the definition; returns the largest logit change."""
    known, effects = {pair.pair_id: pair for pair in (*PAIRS, MOVED)}, []
    for row in frame.sample(min(rows, len(frame)), random_state=1).itertuples():
        senders = sets[row.site_set]
        assert (row.layer, row.sender, row.head) == tuple(senders[0]) and row.component == "path"
        asked = (row.pair_id, row.direction, row.ablation, row.seed, senders, role, receivers, mlps)
        effects.append(check_row(row, known[row.pair_id], *by_definition(model, *asked), tolerance))
    return max(effects)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("mlps", MLPS)
@pytest.mark.parametrize("name", MODELS)
def test_every_sender_alone_equals_the_definition(tiny, name, mlps, case):
    model, (role, names) = tiny(name), CASES[case]
    receivers = tuple(map(receiver, names))
    options = {"receivers": receivers, "sender_role": role, "mlps": mlps, "seed": 3, "label": case}
    kinds = ("counterfactual", "zero", "resample")
    frames = [
        paths.run(model, PAIRS[:2], direction="noise", ablations=kinds, pool=PAIRS, **options),
        paths.run(model, PAIRS[:2], direction="denoise", **options),
    ]
    sets = singles(model, receivers)
    assert [len(frame) for frame in frames] == [2 * 3 * len(sets), 2 * len(sets)]
    largest = []
    for frame in frames:
        assert (frame.position == role).all() and (frame.mlps == mlps).all() and (frame.receivers == case).all()
        firsts = frame.drop_duplicates("site_set").sort_values("site_set")
        order = [(Site(row.layer, row.sender, row.head),) for row in firsts.itertuples()]
        assert sorted(order) == sorted(sets)
        largest.append(check_frame(model, frame, order, role, receivers, mlps, FP64_TOLERANCE))
    assert max(largest) > 0.1, "the paths hardly move the logits: this test could not see an error"


SETS = (
    (Site(0, "head", 1), Site(0, "head", 3), Site(1, "head", 0)),
    (EMBED, Site(0, "mlp"), Site(1, "head", 2)),
    (Site(0, "attn"), Site(1, "mlp")),
    (Site(1, "attn"),),
    (Site(1, "mlp"), EMBED, Site(0, "head", 0), Site(0, "mlp")),
)


@pytest.mark.parametrize("role", ["last", "names"])
@pytest.mark.parametrize("mlps", MLPS)
@pytest.mark.parametrize("name", MODELS)
def test_sets_of_senders_equal_the_definition(tiny, name, mlps, role):
    model = tiny(name)
    receivers = tuple(receiver(f"{n} {role}") for n in ("q 1.2", "k 2.1", "v 2.0", "q 2.1", "mlp 1", "mlp 2"))
    for direction in ("noise", "denoise"):
        frame = paths.run(
            model, PAIRS[:2], senders=SETS, receivers=receivers, sender_role=role, mlps=mlps, direction=direction
        )
        assert len(frame) == 2 * len(SETS)
        effect = check_frame(model, frame, SETS, role, receivers, mlps, FP64_TOLERANCE)
        assert effect > 0.1, "the paths hardly move the logits: this test could not see an error"


@pytest.mark.parametrize("mlps", MLPS)
@pytest.mark.parametrize("name", MODELS)
def test_fp32_equals_the_definition(tiny, name, mlps):
    model, (role, names) = tiny(name, "float32"), CASES["every kind"]
    receivers = tuple(map(receiver, names))
    sets = singles(model, receivers)
    frame = paths.run(model, PAIRS[:4], senders=sets, receivers=receivers, sender_role=role, mlps=mlps)
    assert check_frame(model, frame, sets, role, receivers, mlps, FP32_TOLERANCE) > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_vocabulary_equals_the_definition(tiny, name, monkeypatch):
    model, (role, names) = tiny(name), CASES["every kind"]
    receivers, passes, real = tuple(map(receiver, names)), [], paths.grow_paths

    def watched(model, base, rows, *rest):
        passes.append((base, rows, real(model, base, rows, *rest)))
        return passes[-1][-1]

    monkeypatch.setattr(paths, "grow_paths", watched)
    sets = [*singles(model, receivers), *SETS]
    paths.run(model, PAIRS[:3], senders=sets, receivers=receivers, sender_role=role)
    rows = [
        (tuple(base.ids[row.owner].tolist()), row.sites, logits)
        for base, rows, grown in passes
        for row, logits in zip(rows, model.logits(grown.hidden), strict=True)
    ]
    assert len(rows) == 3 * len(sets)
    known = {pair.clean.ids: pair.pair_id for pair in PAIRS}
    for ids, senders, logits in rows:
        asked = (known[ids], "noise", "counterfactual", 0, tuple(senders), role, receivers, "recomputed")
        assert (logits - by_definition(model, *asked)[0]).abs().max() < FP64_TOLERANCE, senders


def test_smollm_equals_the_definition(smollm, two_pairs):
    slice_heads = [Site(21, "head", 6), Site(27, "head", 1), Site(27, "head", 2), Site(27, "head", 0)]
    slice_sites = [*slice_heads, Site(23, "mlp"), Site(29, "mlp")]
    told = paths.receivers_of(smollm, slice_sites, {"q": "last", "mlp": "last"})
    named = paths.receivers_of(smollm, slice_heads, {"k": "names", "v": "names"})
    early = ((Site(20, "mlp"),), (Site(5, "head", 0), EMBED), (Site(12, "head", 4),))
    late = ((Site(23, "mlp"),), (Site(27, "head", 1), Site(25, "head", 8)), (Site(29, "head", 2),))
    asked = [("last", told, early + late, "recomputed"), ("last", told, late, "frozen")]
    asked += [("names", named, early, "recomputed"), ("names", named, early[:2], "frozen")]
    for role, receivers, sets, mlps in asked:
        pair, largest = two_pairs[0], 0.0
        frame = paths.run(smollm, [pair], senders=sets, receivers=receivers, sender_role=role, mlps=mlps)
        for row in frame.itertuples():
            where = pair.clean.roles[role]
            source = values_at(smollm, pair.corrupt.ids, sets[row.site_set], where)
            logits, arrived = brute_force.patched(
                smollm, pair.clean.ids, source, where, receivers, pair.clean.roles, mlps
            )
            base = plain(smollm, pair.clean.ids)[0]
            largest = max(largest, check_row(row, pair, logits, base, arrived, FP32_TOLERANCE))
        assert largest > 0.1


# --- whole checks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["last", "name_a", "all"])
@pytest.mark.parametrize("mlps", MLPS)
@pytest.mark.parametrize("name", MODELS)
def test_all_senders_together_give_the_receivers_what_the_other_run_gives(tiny, name, mlps, role):
    model, pair = tiny(name), PAIRS[0]
    everyone = (EMBED, *all_sites(model, ("head", "mlp")))
    kinds = ["q 1.2", "q 2.1", "k 1.0", "v 2.1", "mlp 1", "mlp 2"]
    effects = []
    for names in (kinds, ["block 1"], ["block 2", "v 1.1"], ["final"] if role == "last" else ["mlp 0"]):
        receivers = tuple(receiver(f"{n} {role}") for n in names)
        sets = (tuple(site for site in everyone if before(site, receivers)),)
        frame = paths.run(model, [pair], senders=sets, receivers=receivers, sender_role=role, mlps=mlps)
        wanted = brute_force.replaced(model, pair.clean.ids, pair.corrupt.ids, receivers, pair.clean.roles)
        base = plain(model, pair.clean.ids)[0]
        arrived = by_definition(model, pair.pair_id, "noise", "counterfactual", 0, sets[0], role, receivers, mlps)[2]
        effects.append(check_row(next(frame.itertuples()), pair, wanted, base, arrived, FP64_TOLERANCE))
    assert max(effects) > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_into_the_first_block_give_the_other_run(tiny, name):
    model, pair = tiny(name), PAIRS[1]
    frame = paths.run(
        model, [pair], senders=[[EMBED]], receivers=[receiver("block 0 all")], sender_role="all", direction="denoise"
    )
    wanted, base = plain(model, pair.clean.ids)[0], plain(model, pair.corrupt.ids)[0]
    moved = plain(model, pair.clean.ids)[1][Place("embed")] - plain(model, pair.corrupt.ids)[1][Place("embed")]
    assert check_row(next(frame.itertuples()), pair, wanted, base, moved.norm().item(), FP64_TOLERANCE) > 0.1


@pytest.mark.parametrize("mlps", MLPS)
@pytest.mark.parametrize("name", MODELS)
def test_a_source_that_is_the_base_changes_nothing(tiny, name, mlps):
    model, (role, names) = tiny(name), CASES["every kind"]
    same = replace(PAIRS[0], corrupt=PAIRS[0].clean)
    frame = paths.run(model, [same], receivers=tuple(map(receiver, names)), sender_role=role, mlps=mlps)
    assert (frame.arrived < FP64_TOLERANCE).all() and (frame.site_delta < FP64_TOLERANCE).all()
    assert (frame.kl_after < FP64_TOLERANCE).all()
    assert (frame.metric_after - frame.metric_before).abs().max() < FP64_TOLERANCE
    assert np.abs(np.stack(frame.label_logits_after) - np.stack(frame.label_logits_before)).max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_the_final_norm_with_frozen_mlps_hears_the_direct_effect(tiny, name):
    model, pair = tiny(name), PAIRS[2]
    clean, corrupt = (plain(model, side.ids)[1] for side in (pair.clean, pair.corrupt))
    sets = [(Site(0, "head", 2),), (Site(1, "mlp"),), (Site(2, "head", 0), Site(2, "head", 3)), (EMBED,)]
    frame = paths.run(model, [pair], senders=sets, receivers=[receiver("final last")], mlps="frozen")

    def written(sites: tuple[Site, ...], held: dict) -> torch.Tensor:
        """What the sites' module adds to the residual stream at the last token, other heads at their clean values."""
        layer, kind = sites[0].layer, sites[0].component
        if kind == "embed":
            return held[Place("embed")][-1]
        if kind == "mlp":
            norm = getattr(model.blocks[layer], "post_feedforward_layernorm", torch.nn.Identity())
            return norm(held[Place("mlp", layer)][-1])
        z = clean[Place("heads", layer)][-1].clone().unflatten(0, (model.n_heads, -1))
        for site in sites:
            z[site.head] = held[Place("head", layer, site.head)][-1]
        # elsewhere than in Gemma, the norm of that name stands before the MLP
        after = hasattr(model.blocks[layer], "post_feedforward_layernorm")
        norm = model.blocks[layer].post_attention_layernorm if after else torch.nn.Identity()
        return norm(model.o_projs[layer](z.flatten()[None]))[0]

    for row in frame.itertuples():
        sites = sets[row.site_set]
        told = written(sites, corrupt) - written(sites, clean)
        logits = model.logits(model.final_norm((clean[Place("final")][-1] + told)[None]))[0]
        effect = check_row(row, pair, logits, plain(model, pair.clean.ids)[0], told.norm().item(), FP64_TOLERANCE)
        # at the last token the embeddings of the two prompts are the same
        assert effect == 0 if sites == (EMBED,) else effect > 1e-3


# --- receivers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_with_grouped_queries_a_path_reaches_the_whole_group(tiny, name):
    model = tiny(name)
    size = model.n_heads // model.n_kv_heads
    for kind, count in (("q", model.n_heads), ("k", model.n_kv_heads), ("v", model.n_kv_heads)):
        for head in range(count):
            told = Receiver(1, kind, head, "names")
            wanted = (head,) if kind == "q" else tuple(range(head * size, (head + 1) * size))
            # the heads whose output changes when the input is set to another prompt's
            place = brute_force.place_of(told)
            at = list(ROLES["names"])
            value = plain(model, PAIRS[0].corrupt.ids)[1][place][at]
            write = [brute_force.Write(place, at, value)]
            _, seen = brute_force.forward(model, PAIRS[0].clean.ids, write, [Place("heads", 1)])
            moved = (seen[Place("heads", 1)] - plain(model, PAIRS[0].clean.ids)[1][Place("heads", 1)]).abs()
            heads = moved.unflatten(-1, (model.n_heads, -1)).amax((0, 2)) > 1e-6
            assert tuple(torch.nonzero(heads).flatten().tolist()) == wanted


def test_a_slice_as_receivers_has_the_keys_and_values_of_a_group_once(tiny):
    sites = [Site(1, "head", 0), Site(1, "head", 1), Site(2, "head", 3), Site(2, "mlp")]
    roles = {"q": "last", "k": "names", "v": "names", "mlp": "last"}
    got = paths.receivers_of(tiny("llama"), sites, roles)
    wanted = ["q 1.0 last", "q 1.1 last", "k 1.0 names", "v 1.0 names", "q 2.3 last", "k 2.1 names", "v 2.1 names"]
    assert len(got) == 8 and set(got) == {receiver(name) for name in [*wanted, "mlp 2 last"]}
    assert len(paths.receivers_of(tiny("gpt2"), sites, roles)) == 10  # a group of one
    assert set(paths.receivers_of(tiny("llama"), sites, {"k": "all"})) == {receiver("k 1.0 all"), receiver("k 2.1 all")}


def test_receivers_without_a_label_are_listed(tiny):
    receivers = [receiver("k 1.1 names"), receiver("mlp 2 last")]
    frame = paths.run(tiny("llama"), PAIRS[:1], senders=[[EMBED]], receivers=receivers, sender_role="names")
    assert list(records.conform(frame, records.PATH_SCHEMA).columns) == list(records.PATH_SCHEMA.columns)
    assert frame.receivers[0] and all(str(r) in frame.receivers[0] for r in receivers)


def test_packing_changes_nothing_beyond_the_noise(tiny):
    options = {"receivers": tuple(map(receiver, CASES["every kind"][1])), "sender_role": "all"}
    whole = paths.run(tiny("gemma3"), PAIRS, **options)
    apart = paths.run(tiny("gemma3"), PAIRS, memory=1e-5, **options)
    single = paths.run(tiny("gemma3"), PAIRS[5:6], **options)
    own = whole[whole.pair_id == "p5"].reset_index(drop=True)
    for column in ("metric_after", "kl_after", "arrived", "site_delta"):
        assert (whole[column] - apart[column]).abs().max() < FP64_TOLERANCE
        assert (own[column] - single[column]).abs().max() < FP64_TOLERANCE


def test_pairs_whose_roles_stand_elsewhere_run_together(tiny):
    model, receivers = tiny("llama"), tuple(map(receiver, CASES["held"][1]))
    sets = singles(model, receivers)
    frame = paths.run(model, [PAIRS[0], MOVED, PAIRS[1]], senders=sets, receivers=receivers, sender_role="names")
    assert frame.pair_id.drop_duplicates().tolist() == ["p0", "moved", "p1"]
    for _, own in frame.groupby("pair_id"):
        assert check_frame(model, own, sets, "names", receivers, "recomputed", FP64_TOLERANCE) > 0.1


def test_second_tokens_of_names_are_scored_along_the_path(tiny):
    model, role, receivers = tiny("llama"), "names", tuple(map(receiver, CASES["held"][1]))
    pair = replace(PAIRS[0], clean_seconds=(21, 31, 41, 51), corrupt_seconds=(22, 32, 42, 52))
    sets, roles = SETS[:3], pair.clean.roles
    frame = paths.run(model, [pair], senders=sets, receivers=receivers, sender_role=role)
    for row in frame.itertuples():
        source = values_at(model, pair.corrupt.ids, sets[row.site_set], roles[role])
        both = []
        for said, second in zip(pair.clean_tokens, pair.clean_seconds, strict=True):
            first, then = (
                brute_force.patched(model, ids, source, roles[role], receivers, roles, "recomputed")[0]
                for ids in (pair.clean.ids, (*pair.clean.ids, said))
            )
            both.append(first[said] + then[second])
        margin = both[pair.answer] - max(both[i] for i in range(4) if i != pair.answer)
        assert row.metric_both_after == pytest.approx(margin.item(), abs=1e-5)
        assert abs(row.metric_both_after - row.metric_both_before) > 1e-3
