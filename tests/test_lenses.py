"""Logit lens and patchscope: ranks against the model's own modules and full passes, and what the page makes of them."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from professions import QUESTION
from test_sweep import PAIRS, captured

from lib import hooks, records
from lib.hooks import Site
from lib.readout import readout
from pipeline.params import Shared
from steps.coarse_sweep import lenses, lenses_page, measure, page
from steps.coarse_sweep.lenses import LENS, PATCHSCOPE, Said

TARGET = [5, 6, 7, 8]
HOW = {"seed": 0, "memory": 1.0}
SETTINGS = Shared(model="config:none.json", resamples=500, flips=500)


def lexicon(pair) -> dict:
    """The pair's answers, and two professions in the clean prompt of which one has two forms."""
    tokens = pair.clean_tokens
    own = {("superset", "clean"): Said("x", (tokens[pair.answer],))}
    own |= {("superset", "corrupt"): Said("y", (tokens[pair.corrupt_answer],))}
    return own | {("name_a", "clean"): Said("poet", (70, 71)), ("name_b", "clean"): Said("actor", (72,))}


def rank(logits: torch.Tensor, tokens: tuple[int, ...]) -> int:
    return 1 + int((logits > logits[list(tokens)].max()).sum())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_ranks_are_those_of_the_models_own_norm_and_of_full_passes(tiny, name):
    model, pairs = tiny(name), PAIRS[:2]
    table = lenses.read(model, pairs, [lexicon(pair) for pair in pairs], readout(model).norm, TARGET, **HOW)
    records.conform(table, lenses.SCHEMA)
    ranks = table.set_index(["instrument", "pair_id", "source", "position", "layer", "word", "of"])["rank"]
    assert len(table) == 2 * 4 * (2 * 2 * 3 * model.n_layers + model.n_layers + 1)  # random, and the prompt as it is
    body = model.model.transformer if name == "gpt2" else model.model.model
    norm = body.ln_f if name == "gpt2" else body.norm
    for pair in pairs:
        for source, role, layer in (("clean", "name_a", 0), ("corrupt", "name_b", 1), ("clean", "last", 2)):
            prompt = getattr(pair, source)
            stream = captured(model, prompt.ids)[Site(layer, "resid")][0, prompt.roles[role][-1]]

            def put(value, stream=stream):
                value[0, -1] = stream

            with torch.no_grad(), hooks.removing() as handles:
                lens = model.logits(norm(stream))
                handles.append(hooks.on_activation(model, layer, "resid", put))
                scope = model.model(torch.tensor([TARGET])).logits[0, -1]
            for (word, of), said in lexicon(pair).items():
                where = (pair.pair_id, source, role, layer, word, of)
                assert ranks[LENS, *where] == rank(lens, said.tokens)
                assert ranks[PATCHSCOPE, *where] == rank(scope, said.tokens)
    plain = model.model(torch.tensor([TARGET])).logits[0, -1]
    assert ranks[PATCHSCOPE, "p0", "none", "last", 0, "name_a", "clean"] == rank(plain, (70, 71))
    last = table[(table["layer"] == model.n_layers - 1) & table["source"].isin(lenses.SIDES)]
    two = last.pivot_table(index=["pair_id", "source", "position", "word", "of"], columns="instrument", values="rank")
    assert (two[LENS] == two[PATCHSCOPE]).all()  # after the last layer there is nothing left of the prompt


def test_random_directions_are_of_the_pair_alone_and_as_long_as_the_stream(tiny):
    like = torch.randn(2, 8, dtype=torch.float64)
    one = lenses.random_directions(PAIRS[:2], like, 0)
    assert torch.allclose(one.norm(dim=1), like.norm(dim=1))
    assert torch.allclose(one[1:], lenses.random_directions(PAIRS[1:2], like[1:], 0))
    assert not torch.allclose(one, lenses.random_directions(PAIRS[:2], like, 1))


def test_words_have_their_forms_of_one_token(smollm_tokenizer, two_pairs):
    row = {"clean_profession_a": "actor", "clean_profession_b": "tennis player"}
    said = lenses.words_of(smollm_tokenizer, two_pairs[0], row, QUESTION)
    assert set(said) == {("superset", "clean"), ("superset", "corrupt"), ("name_a", "clean")}
    words = {key: [smollm_tokenizer.decode([token]) for token in own.tokens] for key, own in said.items()}
    assert words["superset", "clean"] == [" artists", " artist"] and words["name_a", "clean"] == [" actor", " actors"]


def test_no_words_are_read_where_the_answer_is_a_name():
    for task, tables in (("superset", [measure.SWEEP, lenses.READ]), ("odd_one_out", [measure.SWEEP])):
        case = SimpleNamespace(params=SimpleNamespace(task=task))
        assert [table for (table,) in measure.assumed(case)] == tables
    m = measure.Measured(None, None, None, None)
    assert page.ranks_figure(None, m) is page.compared_figure(None, m) is None
    assert page.read_table(None, m).data.startswith("No words were read")


def words(quads: int = 24, professions: tuple[str, str] = ("poet", "actor")) -> pd.DataFrame:
    """Ranks of 1000 everywhere; from layer 1 on 100 where the superset is right at the last token, in the patchscope,
    and from layer 2 on 10 for a person's own profession at the name. With a spread between quads."""
    rng, rows = np.random.default_rng(0), []
    for number in range(quads):
        about = {"half": "confirmation", "quad_id": f"q{number:02d}", "pair_id": f"q{number:02d}.0"}
        for instrument, source, position, layer in (
            (i, s, p, n)
            for i in (LENS, PATCHSCOPE)
            for s in lenses.SIDES
            for p in ("name_a", "name_b", "last")
            for n in range(3)
        ):
            for word in ("superset", "name_a", "name_b"):
                for of in lenses.SIDES:
                    rank = 1000
                    if instrument == PATCHSCOPE and source == of:
                        rank = 100 if (word, position) == ("superset", "last") and layer > 0 else rank
                        rank = 10 if word == position and layer > 1 else rank
                    text = of if word == "superset" else of + professions[["name_a", "name_b"].index(word)]
                    where = {"instrument": instrument, "source": source, "position": position, "layer": layer}
                    spread = round(rank * 10 ** rng.normal(0, 0.02))
                    rows.append(about | where | {"word": word, "of": of, "text": text, "rank": spread})
        none = {"instrument": PATCHSCOPE, "source": "none", "position": "last", "layer": 0}
        rows.append(about | none | {"word": "superset", "of": "clean", "text": "clean", "rank": 5000})
        rows.append(
            about | none | {"word": "superset", "of": "clean", "text": "clean", "rank": 5000, "source": "random"}
        )
    return pd.DataFrame(rows)


def test_a_word_is_read_where_it_ranks_better_than_where_it_is_wrong():
    table = words()
    found = lenses_page.where_read(
        lenses_page.compared(table, SETTINGS), lenses_page.typical(table, SETTINGS), SETTINGS
    )
    own = found.set_index(["read", "instrument"])
    first = own["first after layer"].xs(PATCHSCOPE, level="instrument")
    assert first.tolist() == ["2", "none", "1"]  # in the order of READINGS
    assert set(own["first after layer"].xs(LENS, level="instrument")) == {"none"}
    best = own.loc[(lenses_page.PROFESSION.about, PATCHSCOPE)]
    assert best["most after layer"] == best["rises most at layer"] == 2 and best["quads"] == 24
    assert float(best["times better than where wrong"].split()[0]) == pytest.approx(100, rel=0.05)
    assert float(best["rank there"].split()[0]) == pytest.approx(10, abs=1)
    said = lenses_page.sentences(table, SETTINGS)
    assert "by the patchscope first after layer 2, by" in said[0] and "lens after no layer (" in said[0]
    assert "rises most at layer 2 and is largest after layer 2 (picked on the same pairs). There the word" in said[1]
    assert "the word ranks 98.7 [" in said[1] and "where it is wrong, at 10 [" in said[1]
    assert (
        "by the patchscope first after layer 1, by" in said[2]
        and "where it is wrong, at 100 [" in said[3]
        and "superset's word at 5000" in said[4]
    )
    assert "random" not in " ".join(said), (
        "it was put in after layer 0 alone, and the superset is largest after another"
    )
    most = int(own.loc[(lenses_page.AT_LAST.about, PATCHSCOPE), "most after layer"])
    moved = table.assign(layer=table["layer"].mask(table["source"] == "random", most))
    assert "a random direction put in after that layer it ranks at 5000" in lenses_page.sentences(moved, SETTINGS)[3]


def test_few_quads_are_not_testable_and_people_of_one_profession_say_nothing():
    table = words(6)
    found = lenses_page.where_read(
        lenses_page.compared(table, SETTINGS), lenses_page.typical(table, SETTINGS), SETTINGS
    )
    assert set(found["first after layer"]) == {"not testable"}
    said = lenses_page.sentences(table, SETTINGS)
    assert said[0].endswith("(of the same superset) is not testable (6 quads, 20 needed).") and len(said) == 3
    alike = words(6, ("poet", "poet"))
    abouts = set(lenses_page.compared(alike, SETTINGS)["about"])
    assert abouts == {asked.about for asked in lenses_page.READINGS[1:]}
    first = [lenses_page.sentences(own, SETTINGS)[0] for own in (alike, table[table["word"] == "superset"])]
    assert first[0].startswith("Professions at the names were not compared: in no prompt")
    assert first[1].startswith("Professions were not read at the names: the pairs do not say them")


def test_figures_are_drawn():
    layers = pd.DataFrame({"layer": range(3), "estimate": 0.5, "low": 0.4, "high": 0.6, "half": "confirmation"})
    curves = layers.assign(direction="denoise", position="last")
    figure = lenses_page.ranks_figure(curves, words(), SETTINGS, (1,))
    assert len(figure.axes) == 4 and len(lenses_page.compared_figure(words(), SETTINGS, (1,)).axes) == 2
