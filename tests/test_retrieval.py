"""Attention and heads' outputs: against the model's own, by brute force, and on numbers whose answer is known."""

import copy
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from professions import SUPERSETS

from lib import models, paths, records
from lib.hooks import Site
from lib.readout import post_norms
from lib.single_pass import SweepError
from lib.tasks import Pair, Prompt
from lib.weights import ModelError
from pipeline import params
from pipeline.step import Step
from steps.registry import PLAN
from steps.retrieval_heads import attention, outputs, page, routes
from steps.retrieval_heads import measure as retrieval
from steps.story import claims

ROLES = {"name_a": (3, 4), "name_b": (6,), "names": (3, 4, 6), "swapped": (3, 4, 6), "last": (8,), "all": range(9)}
ROLES = {role: tuple(positions) for role, positions in ROLES.items()}


def pair_of(index: int, clean: list[int], corrupt: list[int], half: str = "discovery") -> Pair:
    """A pair of nine-token prompts with the given tokens at 3, 4 (name_a) and 6 (name_b)."""
    prompts = []
    for names in (clean, corrupt):
        ids = [1, 2, 3, *names[:2], 4, names[2], 5, 6]
        prompts.append(Prompt("", tuple(ids), ROLES))
    return Pair(f"p{index}", f"q{index}", half, "superset", "t", *prompts, SUPERSETS, 0, 1, (), (), (), (), (), ())


PAIRS = [pair_of(0, [20, 21, 22], [23, 24, 25]), pair_of(1, [26, 27, 28], [29, 30, 31], "confirmation")]


# --- attention ---


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
def test_attention_is_the_models_own(tiny, name):
    """Every share against the sum over the model's own output_attentions."""
    model = tiny(name)
    before = model.model.config._attn_implementation
    frame = attention.attention_to_names(model, PAIRS, batch=1)
    assert model.model.config._attn_implementation == before
    records.conform(frame, attention.ATTENTION)
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

    monkeypatch.setattr(attention, "_pattern", broken)
    with pytest.raises(KeyError):
        attention.attention_to_names(model, PAIRS)
    assert model.model.config._attn_implementation == before
    assert len(model.attns[0]._forward_hooks) == hooked


def test_attention_without_a_pattern_is_an_error(tiny, monkeypatch):
    monkeypatch.setattr(attention, "eager", lambda model: nullcontext())  # sdpa gives none
    with pytest.raises(ModelError, match="layer 0 gives no pattern of shape"):
        attention.attention_to_names(tiny("llama"), PAIRS)


def test_attention_that_does_not_add_up_is_an_error(tiny):
    model = tiny("llama")
    halve = lambda _, __, output: (output[0], None if output[1] is None else output[1] / 2)  # noqa: E731
    handle = model.attns[1].register_forward_hook(halve)
    try:
        with pytest.raises(ModelError, match="layer 1 does not add up to 1 but is off by 0.5"):
            attention.attention_to_names(model, PAIRS)
    finally:
        handle.remove()


def test_an_eager_run_that_differs_is_an_error(tiny, monkeypatch):
    model, eager = tiny("llama"), attention.eager

    @contextmanager
    def other(model):
        with eager(model):
            model.final_norm.weight.mul_(1.5)
            try:
                yield
            finally:
                model.final_norm.weight.div_(1.5)

    monkeypatch.setattr(attention, "eager", other)
    with pytest.raises(SweepError, match="with eager attention a logit differs from the ordinary run"):
        attention.attention_to_names(model, PAIRS)


def test_names_are_needed(tiny):
    pair = SimpleNamespace(**vars(PAIRS[0]))
    pair.clean = Prompt("", PAIRS[0].clean.ids, {"last": (8,)})
    with pytest.raises(ValueError, match="pair p0: template 't' has no role name_a"):
        attention.attention_to_names(tiny("llama"), [pair])


# --- outputs ---

TOKENS = dict(zip(SUPERSETS, (50, 51, 52, 53, 54), strict=True))
WORDS = {"painter": "artist", "poet": "writer", "chemist": "scientist", "novelist": "writer"}


def rows_of(labels: list[str], quads: list[int], professions: list[str] | None = None) -> pd.DataFrame:
    """Rows of prompts; every second four quads are of the other half."""
    half = [("discovery", "confirmation")[quad // 4 % 2] for quad in quads]
    frame = pd.DataFrame({"quad_id": quads, "half": half, "label": labels}).astype(str)
    return frame.assign(profession="" if professions is None else professions)


def test_a_probe_tells_a_class_that_is_written_and_nothing_from_noise():
    rng, codes = np.random.default_rng(0), np.arange(400) % 4
    means = 3 * rng.normal(size=(4, 8))
    values = np.stack([means[codes] + rng.normal(size=(400, 8)), rng.normal(size=(400, 8))], 1)
    found = outputs.told(values, rows_of([f"c{code}" for code in codes], list(np.arange(400) // 2)), "label", 0)
    assert found[:, 0].mean() == pytest.approx(0.75, abs=0.02) and abs(found[:, 1].mean()) < 0.08


def test_a_probe_tells_a_code_among_small_noise_at_any_scale():
    """Were each feature divided by its own spread, the noise would count as much: 0.5 above chance."""
    rng, codes = np.random.default_rng(0), np.arange(60) % 4
    code = np.pad(np.eye(4)[codes], ((0, 0), (0, 252))) + 0.1 * rng.normal(size=(60, 256))
    rows = rows_of([f"c{code}" for code in codes], list(np.arange(60)))
    for scale in (1e-3, 1, 1e3):
        assert outputs.told(scale * code[:, None], rows, "label", 0).mean() == pytest.approx(0.75, abs=0.01)


def test_a_probe_does_not_know_the_people_it_is_tried_on():
    """Each quad has an output of its own, and a class at random: known by heart in training, at chance held out."""
    rng, quads = np.random.default_rng(0), np.arange(400) // 4
    own, labels = 5 * rng.normal(size=(100, 1, 64)), rng.integers(0, 2, size=100)
    values = own[quads] + 0.1 * rng.normal(size=(400, 1, 64))
    found = outputs.told(values, rows_of([f"c{labels[quad]}" for quad in quads], list(quads)), "label", 0)
    assert abs(found.mean()) < 0.15


def test_a_frequent_class_counts_no_more_than_a_rare_one():
    """An output that is the same for all: the classifier says one class, which is right for a third of the classes."""
    labels = ["common"] * 200 + ["rare"] * 50 + ["rarer"] * 20
    found = outputs.told(np.ones((270, 1, 4)), rows_of(labels, list(range(270))), "label", 0)
    assert found.mean() == pytest.approx(0, abs=0.05)


def test_the_profession_is_told_among_those_of_its_own_superset():
    """An output that has the superset alone tells no profession; one that has the profession tells it."""
    rng, codes = np.random.default_rng(0), np.arange(480) % 4
    superset, quads = codes // 2, list(np.arange(480))
    means = 4 * rng.normal(size=(4, 8))
    values = np.stack([means[superset], means[codes]], 1) + 0.1 * rng.normal(size=(480, 2, 8))
    rows = rows_of([f"s{one}" for one in superset], quads, [f"p{one}" for one in codes])
    found = outputs.told(values, rows, "profession", 0, within=("label",))
    assert abs(found[:, 0].mean()) < 0.1 and found[:, 1].mean() == pytest.approx(0.5, abs=0.01)
    alone = rows.assign(profession=rows["label"])  # one profession each: there is nothing to tell
    assert np.isnan(outputs.told(values, alone, "profession", 0, within=("label",))).all()


def test_few_quads_of_a_class_are_not_probed():
    rows = rows_of(["a", "b"] * 4, list(range(8)))
    assert np.isnan(outputs.told(np.ones((8, 1, 2)), rows, "label", 0)).all()


def many_pairs() -> tuple[list[Pair], dict]:
    """Pairs of three professions in turn, both halves. No two prompts are the same: a first name is in one of them."""
    pairs, own, names = [], {}, list(WORDS)[:3]
    for index in range(18):
        sides = {"clean": index % 3, "corrupt": (index + 1) % 3}
        tokens = [[7 + index // 3 * 2 + turn, 20 + one, 20 + one] for turn, one in enumerate(sides.values())]
        pairs.append(pair_of(index, *tokens, ("discovery", "confirmation")[index // 3 % 2]))
        own |= {(f"p{index}", side): {"name_a": names[one], "name_b": names[one]} for side, one in sides.items()}
    return pairs, own


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("position, site", [("names", Site(2, "head", 3)), ("last", Site(2, "mlp"))])
def test_a_share_is_what_a_head_makes_up_at_the_receiver(tiny, name, position, site):
    """By brute force: the receiver's own modules on what the head wrote, at the norm's scale, along the classes'
    means."""
    torch.manual_seed(0)
    model = copy.deepcopy(tiny(name).model)
    for key, weight in model.named_parameters():
        if "norm" in key or "ln_" in key:
            weight += 0.5 * torch.rand_like(weight)
    model = models.find_handles(model, None, name)
    pairs, own = many_pairs()
    about = outputs.About(own, WORDS, TOKENS)
    receiver = outputs.receiver(model, site)
    seen = outputs.read(model, pairs, about, position, {receiver.module, model.final_norm})
    stream = seen.streams[receiver.module]

    def heard(vector):
        """What the receiver makes of a part of the stream, whose scale is the whole's."""
        centred = vector - vector.mean(-1, keepdim=True) if receiver.norm.centres else vector
        normed = receiver.norm.gain * centred / receiver.norm.scale(stream)[:, None]
        if site.component == "mlp":
            names = ("c_fc",) if name == "gpt2" else ("gate_proj", "up_proj")
            readers = [getattr(model.mlps[2], part) for part in names]
            return torch.cat([part(normed) - part(torch.zeros_like(normed)) for part in readers], 1)
        project, first = paths.projection(model, model.attns[2], "v")
        place = first + site.head * model.n_kv_heads // model.n_heads * model.head_size
        value = (project(normed) - project(torch.zeros_like(normed)))[:, place : place + model.head_size]
        full = torch.zeros(len(value), model.n_heads * model.head_size, dtype=value.dtype)
        full[:, site.head * model.head_size : (site.head + 1) * model.head_size] = value
        return model.o_projs[2](full) - model.o_projs[2](torch.zeros_like(full))

    labels, half = seen.rows["label"].to_numpy(), seen.rows["half"].to_numpy()
    z = torch.from_numpy(seen.heads[:, 1]).double()
    z[:, : model.head_size] = 0
    z[:, 2 * model.head_size :] = 0
    written = model.o_projs[1](z) - model.o_projs[1](torch.zeros_like(z))
    if (post := post_norms(model)[1].attn) is not None:
        written = post.gain * written / torch.from_numpy(seen.scales[:, 1, None])
    whole, part = heard(stream), heard(written)
    means = {one: whole[(labels == one) & (half == "discovery")].mean(0) for one in WORDS.values() if one in labels}
    sides = {one: means[one] - sum(means[other] for other in means if other != one) / 2 for one in means}
    aim = torch.stack([sides[one] for one in labels])
    late = half == "confirmation"
    expected = ((part * aim).sum(1)[late].sum() / (whole * aim).sum(1)[late].sum()).item()
    found = outputs.table(model, pairs, about, [site], position, 0)
    records.conform(found, outputs.OUTPUTS)
    one = found[(found.layer == 1) & (found["head"] == 1) & (found.half == "confirmation")]
    assert one.share.mean() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert found[found.layer == 2].share.isna().all() == (position == "names")


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
    for place, token in enumerate(TOKENS.values()):
        model.lm_head.weight[token, 24 + place] = 1
    model.model.layers[1].mlp.up_proj.weight[:] = torch.eye(32)[24:]  # its MLP reads features 24 to 31
    attention = model.model.layers[1].self_attn
    for feature, target in write.items():
        attention.v_proj.weight[(head // 2) * 12 + feature, feature] = 1
        attention.o_proj.weight[target, head * 12 + feature] += 1
    return models.find_handles(model, None, "planted")


def test_a_head_that_copies_the_class_is_all_that_the_slice_is_given():
    """At the last token nothing else that the MLP reads differs between prompts: its share is 1, a probe tells the
    class, and at the unembedding it says what it writes there. What another head writes where the MLP does not read,
    however large, takes nothing from it."""
    model, (pairs, own) = planted({0: 24, 1: 28, 2: 25}), many_pairs()
    attention = model.attns[1]
    for feature in (0, 1, 2):
        attention.o_proj.weight[8 + feature, 3 * 12 + feature] = 10
    about = outputs.About(own, WORDS, TOKENS)
    found = outputs.table(model, pairs, about, [Site(1, "mlp")], "last", 0)
    head, large = (found.layer == 1) & (found["head"] == 2), (found.layer == 1) & (found["head"] == 3)
    assert found[large].share.abs().max() < 1e-6 and found[large].told.mean() == pytest.approx(2 / 3)
    assert found[head].share.mean() == pytest.approx(1, abs=1e-4) and found[~head].share.abs().max() < 1e-6
    assert found[head].told.mean() == pytest.approx(2 / 3) and found[~head & ~large].told.mean() < 0.1
    assert found[head].unembedded.min() > 0.5 and found[~head].unembedded.abs().max() == 0
    deaf = planted({0: 0, 1: 1, 2: 2})
    deaf.mlps[1].up_proj.weight[:] = torch.eye(32)[:8]
    blind = outputs.table(deaf, pairs, about, [Site(1, "mlp")], "last", 0)[head]
    assert blind.told.mean() == pytest.approx(2 / 3) and blind.unembedded.abs().max() < 1e-6


def test_a_head_that_always_says_the_same_makes_up_nothing():
    """Head 1.3 promotes artists a little whatever the names: it sees the tokens that every prompt has."""
    model, (pairs, own) = planted({0: 24, 1: 28, 2: 25}), many_pairs()
    attention = model.attns[1]
    attention.v_proj.weight[12 + 11, 31] = 1
    attention.o_proj.weight[24, 3 * 12 + 11] = 0.02
    about = outputs.About(own, WORDS, TOKENS)
    found = outputs.table(model, pairs, about, [Site(1, "mlp")], "last", 0)
    same = found[(found.layer == 1) & (found["head"] == 3) & (found.half == "confirmation")]
    for found in (same.share, same.unembedded):
        assert found.abs().max() > 0.01 and abs(found.mean()) < 0.05 * found.abs().max()


def test_professions_come_from_the_table_or_from_people():
    people = {"name": ["Ann", "Bo"], "profession": ["poet", "chemist"], "superset": ["writer", "scientist"]}
    people = pd.DataFrame(people)
    row = {"pair_id": "p", "clean_a": "Ann", "clean_b": "Bo", "clean_c": "", "corrupt_a": "Cy", "corrupt_b": "Di"}
    row |= {"answer": "a", "corrupt_answer": "b"}
    given = {"corrupt_profession_a": "actor", "corrupt_profession_b": "dancer"}
    found = outputs.professions_of(pd.DataFrame([row | given]), people)
    assert found["p", "clean"] == {"name_a": "poet", "name_b": "chemist"}
    assert found["p", "corrupt"] == {"name_a": "actor", "name_b": "dancer"}
    found = outputs.professions_of(pd.DataFrame([row | {"answer": "writer", "corrupt_answer": "artist"}]), people)
    assert found["p", "clean"] == {"name_a": "poet", "name_b": ""}  # Bo is of another class there than in the pair
    assert found["p", "corrupt"] == {"name_a": "", "name_b": ""}


def test_names_of_unknown_profession_are_of_the_class_that_their_prompt_asks_for(tiny):
    """They stand in no table of people: nothing is told of professions, and everything of classes."""
    pairs, own = many_pairs()
    blank = {key: dict.fromkeys(at, "") for key, at in own.items()}
    about = outputs.About(blank, WORDS, TOKENS)
    table = outputs.table(tiny("llama"), pairs, about, [Site(2, "head", 3)], "names", 0)
    heads = table[table["component"] == "head"]
    assert heads["profession_told"].isna().all() and heads["told"].notna().any()


def test_baselines_are_the_same_classifier_on_what_is_known_without_the_model(tiny):
    """A region of its own for each class tells the class; one that is the same for all tells nothing."""
    model, (pairs, own) = tiny("llama"), many_pairs()
    found = {}
    for name in ("region", "nothing"):
        known = {}
        for key, at in own.items():
            regions = at if name == "region" else dict.fromkeys(at, "Europe")
            known[key] = {role: (f"N{key[0]}", regions[role], "20", "male") for role in at}
        about = outputs.About(own, WORDS, TOKENS, known)
        table = outputs.table(model, pairs, about, [Site(2, "mlp")], "last", 0)
        records.conform(table, outputs.OUTPUTS)
        found[name] = table[table["component"].isin(outputs.BASELINES)].set_index("component")["told"]
    assert found["region"].loc["metadata"].mean() == pytest.approx(2 / 3)
    assert found["nothing"].loc["metadata"].mean() < 0.1 and found["region"].loc["letters"].notna().all()
    people = pd.DataFrame({"name": ["Ann"], "region": ["Asia"], "century": [20], "gender": ["female"]})
    row = {"pair_id": "p", "clean_a": "Ann", "clean_b": "Bo", "corrupt_a": "Cy", "corrupt_b": "Ann"}
    said = outputs.described(pd.DataFrame([row]), people, ["region", "century", "gender"])["p", "clean"]
    assert said == {"name_a": ("Ann", "Asia", "20", "female"), "name_b": ("Bo", "", "", "")}


# --- the whole step ---


def test_nothing_that_comes_after_a_site_speaks_to_it_and_all_that_comes_before_does():
    heads = lambda layers: tuple(Site(layer, "head", head) for layer in range(layers) for head in range(2))  # noqa: E731
    mlps = tuple(Site(layer, "mlp") for layer in range(2))
    embedding = (paths.EMBED,)
    for into, before in (
        ([Site(2, "head", 1)], [(*embedding, *heads(2), *mlps), embedding, mlps, heads(2)]),
        ([Site(2, "mlp"), Site(1, "head", 0)], [(*embedding, *heads(3), *mlps), embedding, mlps, heads(3)]),
        ([Site(0, "mlp")], [(*embedding, *heads(1)), embedding, (), heads(1)]),
        ([Site(0, "head", 1)], [embedding, embedding, (), ()]),
    ):
        assert routes.groups(into, 2) == before
        receivers = [paths.Receiver(site.layer, "mlp" if site.component == "mlp" else "q", 0, "last") for site in into]
        assert all(any(paths.before(site, one) for one in receivers) for own in before for site in own)
    assert routes.modules([Site(0, "head", 1)]) == []


def test_a_slice_of_mlps_alone_goes_through_the_whole_step(tmp_path):
    """Senders are patched at the last token into the MLPs' inputs; nothing is asked about the names."""
    names = ["Suzanne Collins, Dorothy Sayers, Salvador Dali, Fred Astaire, writer, artist"]
    names += ["Galileo Galilei, Wallace Carothers, Ken Follett, Elizabeth Barrett Browning, scientist, writer"]
    columns = ["clean_a", "clean_b", "corrupt_a", "corrupt_b", "answer", "corrupt_answer"]
    pd.DataFrame([row.split(", ") for row in names], columns=columns).to_csv(tmp_path / "mine.csv", index=False)
    given = params.load_profile("smoke") | {"pairs_file": str(tmp_path / "mine.csv"), "slice_sites": "mlp 4,mlp 6"}
    given |= {"results_dir": str(tmp_path / "results"), "memory": 1.0}
    step = Step(PLAN, "retrieval_heads", params.validate(PLAN.sections, "retrieval_heads", given))
    m = retrieval.run(step)
    assert set(m.routes) == {"slice at last"} and m.families.keys() == {"last"}
    rows = pd.concat(records.read(step.path(name)) for name in (None, "confirmed", "groups", "edges"))
    assert set(rows["position"]) == {"last"} and set(rows["half"]) == {"discovery", "confirmation"}
    found = page.findings(step, m)
    assert "the slice's MLPs are given at the last token" in " ".join(found["sentences"])
    assert found["verdicts"]["one_stage"] is None and all("why" in found[name] for name in ("one_stage", "two_stages"))
    asked = [claim for claim in claims.CLAIMS if claim.path.startswith("written")]  # page 10 reads the reason
    assert [claims.numbers_of(claim, found, step.params).why for claim in asked] == [page.NONE_READ] * 2
    assert {row["verdict"] for row in found["tests"]} <= {page.NOT_TESTABLE, ""}
    figures = (page.groups_figure, page.writes_figure, page.looks_figure, page.tests_figure, page.two_hop)
    assert [draw(step, m) for draw in figures] and page.ranked(m, "names") is None and page.pairs_and_names(m) is None
