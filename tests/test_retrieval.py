"""Attention and value vectors: against the model's own outputs, and on weights whose answer is known by hand."""

import copy
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lib import models, records, tasks
from lib.readout import post_norms, readout
from lib.single_pass import SweepError, base_run
from lib.tasks import Pair, Prompt
from lib.weights import ModelError
from steps.retrieval_heads import measure as retrieval
from steps.retrieval_heads import values
from steps.retrieval_heads.one_name import FIRST, NOT, WHOLE, Labels

ROLES = {"name_a": (3, 4), "name_b": (6,), "names": (3, 4, 6), "swapped": (3, 4, 6), "last": (8,), "all": range(9)}
ROLES = {role: tuple(positions) for role, positions in ROLES.items()}


def pair_of(index: int, clean: list[int], corrupt: list[int], half: str = "discovery") -> Pair:
    """A pair of nine-token prompts with the given tokens at 3, 4 (name_a) and 6 (name_b)."""
    prompts = []
    for names in (clean, corrupt):
        ids = [1, 2, 3, *names[:2], 4, names[2], 5, 6]
        prompts.append(Prompt("", tuple(ids), ROLES))
    return Pair(
        f"p{index}", f"q{index}", half, "superset", "t", *prompts, tasks.SUPERSETS, 0, 1, (), (), (), (), (), ()
    )


PAIRS = [pair_of(0, [20, 21, 22], [23, 24, 25]), pair_of(1, [26, 27, 28], [29, 30, 31], "confirmation")]


# --- attention ---


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_attention_is_the_models_own(tiny, name):
    """Every share against the sum over the model's own output_attentions."""
    model = tiny(name)
    before = model.model.config._attn_implementation
    frame = values.attention_to_names(model, PAIRS, batch=1)
    assert model.model.config._attn_implementation == before
    records.conform(frame, values.ATTENTION)
    assert len(frame) == 2 * model.n_layers * model.n_heads * 4
    model.model.set_attn_implementation("eager")
    own = [model.model(torch.tensor([p.clean.ids]), output_attentions=True).attentions for p in PAIRS]
    model.model.set_attn_implementation(before)
    for row in frame.itertuples():
        query = ROLES[row.position][-1]
        pattern = own[int(row.pair_id[1])][row.layer][0, row.head, query]
        assert row.share == pytest.approx(pattern[list(ROLES[row.onto])].sum().item(), abs=1e-6)
        assert row.uniform == pytest.approx(len(ROLES[row.onto]) / (query + 1))
    assert set(zip(frame.position, frame.onto, strict=True)) == {
        ("last", "name_a"), ("last", "name_b"), ("name_a", "name_a"), ("name_b", "name_b"),
    }  # fmt: skip


def test_attention_form_comes_back_after_an_error(tiny, monkeypatch):
    model = tiny("llama")
    before, hooked = model.model.config._attn_implementation, len(model.attns[0]._forward_hooks)
    assert before != "eager"

    def broken(*_):
        assert model.model.config._attn_implementation == "eager"
        raise KeyError

    monkeypatch.setattr(values, "_pattern", broken)
    with pytest.raises(KeyError):
        values.attention_to_names(model, PAIRS)
    assert model.model.config._attn_implementation == before
    assert len(model.attns[0]._forward_hooks) == hooked


def test_attention_without_a_pattern_is_an_error(tiny, monkeypatch):
    monkeypatch.setattr(values, "eager", lambda model: nullcontext())  # sdpa gives none
    with pytest.raises(ModelError, match="layer 0 gives no pattern of shape"):
        values.attention_to_names(tiny("llama"), PAIRS)


def test_attention_that_does_not_add_up_is_an_error(tiny):
    model = tiny("llama")
    halve = lambda _, __, output: (output[0], None if output[1] is None else output[1] / 2)  # noqa: E731
    handle = model.attns[1].register_forward_hook(halve)
    try:
        with pytest.raises(ModelError, match="layer 1 does not add up to 1 but is off by 0.5"):
            values.attention_to_names(model, PAIRS)
    finally:
        handle.remove()


def test_an_eager_run_that_differs_is_an_error(tiny, monkeypatch):
    model, eager = tiny("llama"), values.eager

    @contextmanager
    def other(model):
        with eager(model):
            model.final_norm.weight.mul_(1.5)
            try:
                yield
            finally:
                model.final_norm.weight.div_(1.5)

    monkeypatch.setattr(values, "eager", other)
    with pytest.raises(SweepError, match="with eager attention a logit differs from the ordinary run"):
        values.attention_to_names(model, PAIRS)


def test_names_are_needed(tiny):
    pair = SimpleNamespace(**vars(PAIRS[0]))
    pair.clean = Prompt("", PAIRS[0].clean.ids, {"last": (8,)})
    for measure in (values.attention_to_names, lambda m, p: values.value_vectors(m, p, {}, LABELS)):
        with pytest.raises(ValueError, match="pair p0: template 't' has no role name_a"):
            measure(tiny("llama"), [pair])


# --- value vectors ---

LABELS = Labels(
    words=("painter", "poet", "chemist", "novelist"),
    supersets=("artist", "writer", "scientist", "writer"),
    tokens=((40,), (41,), (42, 43), (44,)),
    scored=(WHOLE, WHOLE, WHOLE, FIRST),
    candidates=(50, 51, 52, 53, 54),
)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "gpt2"])
def test_what_sites_say_adds_up_to_the_logits(tiny, name):
    """Embedding + every head + every MLP + biases, at the run's own scales, is the logit of every label."""
    torch.manual_seed(0)
    model = copy.deepcopy(tiny(name).model)
    for key, weight in model.named_parameters():
        if "norm" in key or "ln_" in key or "bias" in key:  # else gains are one and biases zero
            weight += 0.5 * torch.rand_like(weight)
    model = models.find_handles(model, None, name)
    ids, positions = torch.tensor([p.clean.ids for p in PAIRS]), [4, 6, 8]
    read, posts = readout(model), post_norms(model)
    base = base_run(model, ids, positions)
    maps = values._label_maps(model, read, posts, LABELS)
    said = values._said(model, base, read, posts, maps).astype(float).sum(2)
    entered = []
    handle = model.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    hidden = model.body(input_ids=ids).last_hidden_state[:, positions]
    handle.remove()
    tokens = [*LABELS.candidates, *(own for group in LABELS.tokens for own in group)]
    scale = read.norm.scale(base.activations["resid", model.n_layers - 1])[..., None]
    rest = entered[0][:, positions].clone()
    for layer, post in enumerate(posts):
        if post.attn is None and getattr(model.o_projs[layer], "bias", None) is not None:
            rest += model.o_projs[layer].bias
        for component in ("attn", "mlp"):
            if getattr(post, component) is not None:
                rest += getattr(post, component).bias
    direct = rest @ read.directions(tokens).T / scale + read.norm.bias @ read.unembed[tokens].T
    logits = hidden @ read.unembed[tokens].T - direct
    logits = torch.cat([logits[..., :7], logits[..., 7:9].mean(-1, keepdim=True), logits[..., 9:]], dim=-1)
    assert np.allclose(said, logits.numpy(), atol=1e-4 * logits.abs().max().item(), rtol=0)


def planted(write: dict[int, int], head: int = 2) -> models.Model:
    """A two-layer Llama that does one thing: `head` of layer 1 attends evenly and, for each token of feature i that
    it sees, adds to feature write[i]. Token t has feature t - 20; label token t is feature 16 + t - 40."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        intermediate_size=8, vocab_size=60, tie_word_embeddings=False, rms_norm_eps=1e-12,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.fill_(1.0 if "norm" in name else 0.0)
    for token in range(1, 32):
        model.model.embed_tokens.weight[token, token - 20 if token >= 20 else 31] = 1
    for token in (40, 41, 42, 43, 44):
        model.lm_head.weight[token, 16 + token - 40] = 1
    for place, token in enumerate((50, 51, 52, 53, 54)):
        model.lm_head.weight[token, 24 + place] = 1
    attention = model.model.layers[1].self_attn
    for feature, target in write.items():
        attention.v_proj.weight[(head // 2) * 12 + feature, feature] = 1
        attention.o_proj.weight[target, head * 12 + feature] += 1
    return models.find_handles(model, None, "planted")


def professions(*each: tuple[str, str]) -> dict:
    """For p0 clean, p0 corrupt, p1 clean, ... the professions of both names."""
    keys = [(f"p{index // 2}", ("clean", "corrupt")[index % 2]) for index in range(len(each))]
    return {key: dict(zip(("name_a", "name_b"), own, strict=True)) for key, own in zip(keys, each, strict=True)}


# Features 0 to 3 stand for painter, poet, chemist, novelist; 4 and 5 for nothing. One discovery half.
QUADS = [pair_of(0, [24, 20, 20], [24, 22, 22]), pair_of(1, [24, 21, 23], [25, 20, 20])]
OWN = professions(("painter",) * 2, ("chemist",) * 2, ("poet", "novelist"), ("painter",) * 2)
LEARNT = {0: 16, 1: 17, 2: 18, 3: 20}  # feature -> its label


def test_a_head_that_copies_the_profession_is_found():
    """The contrasts of the planted head, by hand; every other site says nothing."""
    frame = values.value_vectors(planted(LEARNT), QUADS, OWN, LABELS)
    records.conform(frame, values.VALUES)
    found = frame[(frame.component == "head") & (frame.layer == 1) & (frame["head"] == 2)]
    rest = frame.drop(found.index)
    assert len(rest) == 4 * 3 * (2 * 5 - 1)
    assert (rest[[f"{kind}_contrast" for kind in ("profession", "superset")]] == 0).all(axis=None)

    # Four prompts, nine tokens each. After the input norm a token's one feature is sqrt(32); the head's mean over nine
    # tokens writes it once per name token. Chemist is read at the mean of two forms, of which one is written.
    x = np.sqrt(32) / 9
    wrote = np.array([[2, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1], [2, 0, 0, 0]]) * x  # painter poet chemist novelist
    squares = np.array([1 + 4 * x**2, 1 + 4 * x**2, 1 + 2 * x**2, 1 + 4 * x**2])  # of the last token's residual
    said = wrote / np.sqrt(squares / 32)[:, None]
    by_superset = [said[[0, 3]].mean(0), said[1], said[2]]  # artist, scientist, writer
    said = said - np.mean(by_superset, axis=0)
    own = [[0], [2], [1, 3], [0]]
    expected = [said[i, mine].mean() - np.delete(said[i], mine).mean() for i, mine in enumerate(own)]
    last = found[found.position == "last"].set_index(["pair_id", "side"]).profession_contrast
    order = [("p0", "clean"), ("p0", "corrupt"), ("p1", "clean"), ("p1", "corrupt")]
    assert np.allclose(last.loc[order], expected, rtol=1e-5)
    assert (found.profession_top[found.position == "last"] == 1).all()
    chance = found[found.position == "last"].set_index(["pair_id", "side"]).profession_chance
    assert chance.loc[order].tolist() == [0.25, 0.25, 0.5, 0.25]
    # a name of two tokens is read at its second one, where its profession has been seen
    assert (found.profession_contrast[found.position == "name_a"] > 0.1).all()
    # a and b of p1 clean are the only writers: no other writer is left to compare with at `last` ...
    within = found.set_index(["pair_id", "side", "position"]).within_contrast
    assert within.isna().all()  # ... nor at a name, where the other name's profession counts for neither side


def test_within_compares_with_the_own_superset_alone():
    """A head that writes every profession of the right superset finds the class, not the profession."""
    people = professions(("poet", "poet"), ("novelist", "novelist"), ("poet", "poet"), ("painter", "painter"))
    prompts = [pair_of(0, [24, 21, 21], [24, 23, 23]), pair_of(1, [25, 21, 21], [24, 20, 20])]
    exact = values.value_vectors(planted(LEARNT), prompts, people, LABELS)
    model = planted(LEARNT)
    for feature, both in ((1, 20), (3, 17)):  # poets as novelists too, and novelists as poets
        model.o_projs[1].weight[both, 2 * 12 + feature] = 1
    broad = values.value_vectors(model, prompts, people, LABELS)
    head = (exact.component == "head") & (exact.layer == 1) & (exact["head"] == 2) & (exact.position == "last")
    writers = head & exact.within_contrast.notna()
    assert writers.sum() == 3
    assert (exact.within_contrast[writers] > 0.1).all() and (exact.profession_contrast[writers] > 0.1).all()
    assert broad.within_contrast[writers].abs().max() < 1e-6 and (broad.profession_contrast[writers] > 0.1).all()
    assert exact.within_chance[writers].unique() == 0.5
    novelists = values.value_vectors(planted({0: 16, 1: 20, 2: 18, 3: 20}), prompts, people, LABELS)  # for any writer
    assert novelists.within_contrast[writers].abs().max() < 1e-6


def test_mixed_names_each_compete_with_their_own_kin():
    """A poet and a chemist: the poet against the novelist; no other scientist is there for the chemist."""
    contest = values._contest("within", ["poet", "chemist"], ["poet", "chemist"], LABELS)
    assert contest.weights.tolist() == [0] * 5 + [0, 1, 0, -1]
    assert contest.asked.tolist() == [False] * 5 + [False, True, True, True]
    contest = values._contest("superset", ["poet"], ["poet", "chemist"], LABELS)
    assert contest.weights.tolist() == pytest.approx([-1 / 3, 0, -1 / 3, -1 / 3, 1] + [0] * 4)


def test_a_head_that_always_says_the_same_scores_nothing():
    """Feature 4 or 5 is in every prompt: the head promotes painters whatever the names."""
    frame = values.value_vectors(planted({4: 16, 5: 16}), QUADS, OWN, LABELS)
    for kind in ("profession", "superset"):
        assert frame[f"{kind}_contrast"].abs().max() < 1e-6


def test_superset_contrast_and_mlps():
    """A head that writes the superset's candidate scores on supersets alone; so does an MLP that does the same."""
    frame = values.value_vectors(planted({0: 24, 2: 25, 1: 28, 3: 28}), QUADS, OWN, LABELS)
    last = frame[(frame.position == "last") & (frame.layer == 1) & (frame["head"] == 2)]
    assert (last.superset_contrast > 0.1).all() and (last.superset_top == 1).all()
    assert last.profession_contrast.abs().max() == 0 and last.superset_chance.unique() == np.float32(0.2)
    model = planted({})
    for feature, target in {0: 24, 2: 25, 1: 28, 3: 28}.items():
        model.mlps[0].gate_proj.weight[feature, feature] = model.mlps[0].up_proj.weight[feature, feature] = 1
        model.mlps[0].down_proj.weight[target, feature] = 1
    frame = values.value_vectors(model, QUADS, OWN, LABELS)
    at_b = frame[(frame.position == "name_b")]
    assert (at_b.superset_contrast[(at_b.component == "mlp") & (at_b.layer == 0)] > 0.1).all()
    assert at_b.superset_contrast[(at_b.component != "mlp") | (at_b.layer != 0)].abs().max() == 0
    assert frame.superset_contrast[frame.position == "last"].abs().max() == 0


def test_halves_do_not_know_of_each_other():
    """Centring is within the half: the other half's prompts change nothing."""
    other = pair_of(2, [24, 22, 23], [24, 21, 20], "confirmation")
    own = OWN | {("p2", "clean"): {"name_a": "chemist", "name_b": "novelist"}}
    own |= {("p2", "corrupt"): {"name_a": "poet", "name_b": "painter"}}
    model = planted(LEARNT)
    alone = values.value_vectors(model, QUADS, own, LABELS)
    both = values.value_vectors(model, [*QUADS, other], own, LABELS)
    pd.testing.assert_frame_equal(alone, both[both.half == "discovery"].reset_index(drop=True))
    units = retrieval.reading_units("values", None, retrieval.Subject([], [*QUADS, other], []))
    assert [unit.id for unit in units] == ["values-discovery", "values-confirmation"]
    assert [[pair.pair_id for pair in unit.pairs] for unit in units] == [["p0", "p1"], ["p2"]]


def test_a_label_that_is_not_scored_has_no_contrast():
    labels = LABELS._replace(tokens=((), *LABELS.tokens[1:]), scored=(NOT, *LABELS.scored[1:]))
    frame = values.value_vectors(planted(LEARNT), QUADS, OWN, labels)
    painters = (frame.pair_id == "p0") & (frame.side == "clean") | (frame.pair_id == "p1") & (frame.side == "corrupt")
    for column in ("profession_contrast", "profession_top", "profession_chance"):
        assert (frame[column].isna() == painters).all()
    assert frame.superset_contrast.notna().all()
    assert frame.attrs["facts"] == {"professions": list(labels.words), "scored": list(labels.scored)}


def test_a_prompt_is_read_once():
    again = [*QUADS, pair_of(2, [24, 22, 22], [24, 20, 20])]
    own = OWN | {("p2", "clean"): OWN["p0", "corrupt"], ("p2", "corrupt"): OWN["p0", "clean"]}
    assert len(values.value_vectors(planted(LEARNT), again, own, LABELS)) == 4 * 3 * 10


def test_professions_come_from_the_table_or_from_people():
    people = pd.DataFrame({"name": ["Ann", "Bo"], "profession": ["poet", "chemist"]})
    row = {"pair_id": "p", "clean_a": "Ann", "clean_b": "Bo", "clean_c": "", "corrupt_a": "Cy", "corrupt_b": "Di"}
    given = {"corrupt_profession_a": "actor", "corrupt_profession_b": "dancer"}
    found = values.professions_of(pd.DataFrame([row | given]), people)
    assert found["p", "clean"] == {"name_a": "poet", "name_b": "chemist"}
    assert found["p", "corrupt"] == {"name_a": "actor", "name_b": "dancer"}
    with pytest.raises(ValueError, match="the professions of 2 people are not known: Cy, Di; add them to the people"):
        values.professions_of(pd.DataFrame([row]), people)
    with pytest.raises(ValueError, match="profession 'actor' is not among the labels painter"):
        values.value_vectors(planted({}), QUADS, found, LABELS)
