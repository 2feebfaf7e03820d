"""Interchange interventions: prompts, what they change against full forward passes, and how answers are counted."""

from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tokenizers
import torch
import transformers
from professions import SUPERSETS, TEMPLATES

from lib import hooks, tasks
from lib.hooks import Site
from steps.subspace import interchange, interchange_page
from tests.test_directions import PARAMS, step_of
from tests.test_sweep import PAIRS, captured

PEOPLE = {"a": "Ann Lee", "b": "Bob Orr", "c": "Cid Poe", "d": "Dan Roy"}


def quad_row(**changes):
    """The first pair of a quad: two writers, two athletes."""
    row = {"pair_id": "q0.0", "quad_id": "q0", "half": "discovery", "task": "superset", "template": "profession_both"}
    names = dict(zip(("clean_a", "clean_b", "corrupt_a", "corrupt_b"), PEOPLE.values(), strict=True))
    return row | names | {"answer": "writer", "corrupt_answer": "athlete"} | changes


def word_step(*rows):
    """A step with a tokenizer of whole words, and its pairs."""
    template = TEMPLATES["profession_both"]
    text = [template.text, *PEOPLE.values(), "Eve Joy Sue", *tasks.answers(template, "superset"), "both"]
    words = ["unk", *dict.fromkeys(" ".join(text).replace("{a}", "").replace("{b}", "").split())]
    level = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="unk")
    own = tokenizers.Tokenizer(level)
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=own)
    params = SimpleNamespace(
        chat_template=False, attributes=tasks.DEFAULT_ATTRIBUTES, question="professions", pairs_file=None
    )
    made = lambda table: [tasks.make_pair(tokenizer, row) for row in table.to_dict("records")]  # noqa: E731
    return SimpleNamespace(params=params, tokenizer=tokenizer, prompts=made), pd.DataFrame(rows)


def test_one_name_is_swapped_and_the_class_of_both_is_predicted():
    step, table = word_step(quad_row(), quad_row(pair_id="q0.1"), quad_row(quad_id="q1"))
    found = {pair.pair_id: pair for pair in interchange.cases(step, table)}
    assert set(found) == {"q0 a other", "q0 b other", "q0 a same", "q1 a other", "q1 b other", "q1 b same"}
    base = "The profession of Ann Lee and Dan Roy is that they are both"
    wanted = {
        "q0 a other": ("Cid Poe", "Dan Roy", "athlete"),
        "q0 b other": ("Ann Lee", "Bob Orr", "writer"),
        "q0 a same": ("Bob Orr", "Dan Roy", "athlete"),
        "q1 b same": ("Ann Lee", "Cid Poe", "writer"),
    }
    for name, (one, two, answer) in wanted.items():
        pair = found[name]
        assert pair.corrupt.text == base and pair.candidates[pair.answer] == answer
        assert pair.clean.text == base.replace("Ann Lee", one).replace("Dan Roy", two)
        assert pair.clean.roles["swapped"] == pair.clean.roles[f"name_{name[3]}"]
    longer, table = word_step(quad_row(clean_b="Eve Joy Sue", corrupt_b="Eve Joy Sue"))
    short = {pair.pair_id for pair in interchange.cases(longer, table)}  # a name of three words fits no slot of two
    assert "q0 a same" not in short and "q0 a other" in short


def bases_table(layers, k=2):
    """Orthonormal bases of no meaning at every place."""
    rng, rows = np.random.default_rng(5), []
    for place in ("last", *interchange.PLACES[:2]):
        for layer in layers:
            for method in (interchange.MEANS, interchange.LEARNED)[: 1 + (place == "last")]:
                basis = np.linalg.qr(rng.standard_normal((32, k)))[0].T
                rows += [(place, layer, method, index, vector, 9) for index, vector in enumerate(basis)]
    return pd.DataFrame(rows, columns=interchange.COLUMNS)


@pytest.mark.parametrize("swap", interchange.SWAPS, ids=lambda swap: swap.table.name)
def test_interchanges_arrive_in_the_model(tiny, swap):
    """Every row against a full forward pass."""
    model, bases = tiny("llama"), bases_table([0, 1, 2])
    pair, step = PAIRS[1], step_of(model, [Site(1, "mlp")])
    step.n_layers, step.params = 3, step.params.model_copy(update={"earlier_layers": 0})
    layers = [0, 1, 2]
    frame = step.table(swap.table, swap.changes(step, [pair], bases)).set_index(["variant", "layer"])
    at_name = swap.where == "name"
    places = ("name -1", "name") if at_name else ("last",)
    positions = list(pair.corrupt.roles["swapped" if at_name else "last"])
    for layer in layers:
        site = Site(layer, "resid")
        clean, corrupt = (captured(model, prompt.ids)[site][0, positions] for prompt in (pair.clean, pair.corrupt))
        for name in (interchange.MEANS, interchange.LEARNED, interchange.WHOLE):
            if (name, layer) not in frame.index:
                continue
            value = []
            for place, delta in zip(places, clean - corrupt, strict=True):
                own = bases[(bases["place"] == place) & (bases["layer"] == layer) & (bases["method"] == name)]
                q = torch.tensor(np.stack(own["vector"].tolist())) if len(own) else torch.eye(32).double()
                value.append(q.T @ (q @ delta))
            values = {site: (corrupt + torch.stack(value))[None]}
            with hooks.patch(model, values, positions):
                ids = torch.tensor([pair.corrupt.ids])
                wanted = model.model(ids).logits[0, -1, list(pair.corrupt_tokens)].numpy()
            assert np.abs(frame.loc[(name, layer), "logits_after"] - wanted).max() < 1e-5
        size = frame["site_delta"].xs(layer, level="layer")
        assert size[interchange.RANDOM] == pytest.approx(size[interchange.MEANS], rel=1e-6)
        assert size[interchange.MEANS] < size[interchange.WHOLE]
    assert len(frame) == len(swap.methods) * len(layers)


def test_tokens_that_the_fitting_half_lacks_take_the_nearest_basis():
    bases = bases_table([0])
    far, near = (interchange.basis_at(bases, interchange.MEANS, place, 0) for place in ("name -2", "name -1"))
    assert torch.equal(far, near)
    assert interchange.place_of(5) == "name -2"


def test_bases_span_the_class_means_of_the_fitting_prompts(tiny, monkeypatch):
    """At `last` and at each token of a name, from plain captures; and rotations at the slice's layers alone."""
    model = tiny("llama", "float32")
    pairs = [replace(pair, candidates=SUPERSETS[:4], pair_id=f"{pair.pair_id} other") for pair in PAIRS]
    monkeypatch.setattr(interchange, "cases", lambda step, fit: pairs)
    step = step_of(model, [Site(1, "mlp")])
    step.params, step.prompts = (
        step.params.model_copy(update={"interchange_steps": 2}),
        lambda fit: pairs,
    )
    found = interchange.fitted(step, pd.DataFrame(), [0, 1])
    learned = found[found["method"] == interchange.LEARNED]
    assert set(zip(learned["place"], learned["layer"], strict=True)) == {("last", 1)} and len(learned) == 3
    sides = {p.ids: a for x in pairs for p, a in ((x.clean, x.answer), (x.corrupt, x.corrupt_answer))}
    for layer in (0, 1):
        for place, tokens in (("last", [9]), ("name", [4, 6]), ("name -1", [3])):
            read = [(a, captured(model, ids)[Site(layer, "resid")][0, tokens]) for ids, a in sides.items()]
            means = torch.stack([torch.cat([v for a, v in read if a == one]).mean(0) for one in range(4)])
            basis = interchange.basis_at(found, interchange.MEANS, place, layer)[0].T
            apart = (means - means.mean(0)).double()
            assert basis.shape == (3, 32) and torch.allclose(basis @ basis.T, torch.eye(3).double(), atol=1e-5)
            assert torch.allclose(apart @ basis.T @ basis, apart, atol=1e-4)


def records(obeys, quads=24, bias=6.0):
    """Records of interchanges in a model that adds evidence of 2 logits a name, and prefers the first word.

    `obeys`: by basis, whether the swapped name's evidence arrives.
    """
    rows, turns = [], list(combinations(range(len(SUPERSETS)), 2))
    for quad in range(quads):
        one, two = turns[quad % len(turns)]
        tip = 0.1 * (-1) ** quad  # a tie falls to either side
        for slot, answer in (("a", two), ("b", one)):
            for kind in ("other", "same"):
                before = np.eye(len(SUPERSETS))[0] * bias + 0.0
                before[[one, two]] += [2 + tip, 2 - tip]
                for basis, moves in obeys.items():
                    now = before.copy()
                    if moves and kind == "other":
                        now[answer] += 2
                        now[one + two - answer] -= 2
                    about = {"pair_id": f"q{quad} {slot} {kind}", "quad_id": f"q{quad}", "layer": 3, "variant": basis}
                    rows.append(about | {"answer": SUPERSETS[answer], "logits_before": before, "logits_after": now})
    return pd.DataFrame(rows)


def page_of(obeys, quads=24):
    """The numbers of a page with the same records at both places."""
    own = records(obeys, quads)
    by_layer, pair = pd.DataFrame({"layer": [-1, 4]}), SimpleNamespace(candidates=SUPERSETS)
    m = SimpleNamespace(by_layer=by_layer, layer=3, pairs=[pair], interchange={"name": own, "last": own})
    return interchange_page.numbers(m, PARAMS)


OBEYS = {interchange.MEANS: True, interchange.RANDOM: False, interchange.WHOLE: True}


def test_a_model_that_adds_evidence_is_right_and_one_that_does_not_move_is_right_by_half():
    n = page_of(OBEYS)
    own = n.accuracies[n.accuracies["where"] == "name"].set_index(["scoring", "kind", "basis"])["estimate"]
    assert own["centred", "other", interchange.MEANS] == 1
    for basis in (interchange.RANDOM, interchange_page.NOTHING):
        assert own["centred", "other", basis] == 0.5
    assert own["raw", "other", interchange.MEANS] < 0.6  # the first word leads whatever the names: raw hides the rule
    assert (own.xs("same", level="kind") == 0).all()
    gains = n.gains[n.gains["where"] == "last"].set_index(["basis", "against"])
    assert gains.loc[(interchange.MEANS, interchange_page.NOTHING), "estimate"] == pytest.approx(0.5)
    assert gains.loc[(interchange.RANDOM, interchange_page.NOTHING), "estimate"] == 0
    text = " ".join(interchange_page.sentences(n))
    assert "With nothing swapped it comes in 24 of 48 cases (24 quads)" in text
    assert "not shown: random, equal norm" in text and "single draw" not in text
    lucky = n.gains.assign(low=n.gains["low"].mask(n.gains["basis"] == interchange.RANDOM, 0.01))
    assert "The random subspace is a single draw" in interchange_page.gain_words(lucky)
    still = interchange_page.table(n).xs("nothing swapped", level="what")
    assert not still.apply(lambda column: column.str.contains("[", regex=False)).any(axis=None)
    assert "after layer 3" in text and "nan" not in text
    interchange_page.figure(n)._repr_mimebundle_()
    assert interchange_page.table(n).shape == (8, 4)
    assert set(n.gains.loc[n.gains["against"] == interchange.RANDOM, "basis"]) == {interchange.MEANS}
    alone = n._replace(accuracies=n.accuracies[n.accuracies["kind"] == "other"])
    assert "without need was not asked" in interchange_page.sentences(alone)[-1]


def test_a_bias_for_a_class_cannot_pass_for_the_rule():
    """Both names of a base prompt are swapped in turn: answering always with one class is right in at most half."""
    own = records({interchange.MEANS: False}, bias=0.0)
    leaning = own.assign(logits_after=[np.eye(5)[0] * 50] * len(own))
    cases = interchange_page.scored(leaning, SUPERSETS)
    right = cases[cases["kind"] == "other"].groupby(["scoring", "quad_id"])["right"].mean()
    assert right.max() == 0.5
    moved = cases[(cases["kind"] == "same") & (cases["scoring"] == "raw")]["moved"]
    assert moved.any()  # and it shows as answers that moved without need


def test_few_quads_give_numbers_without_intervals():
    n = page_of(OBEYS, 5)
    assert n.accuracies["low"].isna().all()
    text = " ".join(interchange_page.sentences(n))
    assert "too few quads" in text and "[" not in text
