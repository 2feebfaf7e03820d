"""The style of generated sentences: each rule on sentences that once broke it, and all that the smoke book says."""

import pandas as pd
import prose
import pytest

from report import words

BROKEN = {
    "more than two numbers": "Ablating the slice changes logit_diff by -4.01 [-4.02, -3.99]: the slice by -10.01 "
    "[-10.04, -9.98], later heads by 0.00 [0.00, 0.00].",
    "longer than 40 words": " ".join(["word"] * 41),
    "singular and plural": "Put into the run of other names, 1 heads and MLPs bring the answer over.",
    "site beside a number": "The largest interactions are mlp 8 with 6.7 -9.603 [-9.628, -9.578].",
    "none in prose": "A smaller share is carried by none, a larger by mlp 8.",
    "exception as prose": "Not tested: an interaction needs 2 classes with 10 units or more; got artist 9.",
    "something left out": "Backups by both tests: , and no further one.",
    "estimate without interval": "By superset, joint recovery runs from 0.71 (artist) to 0.93 (writer).",
}
FINE = [
    "mlp 8 recovers 1.00 [0.97, 1.04] of the gap (24 pairs of 24 quads, confirmation half), against 0.89 [0.85, 0.92].",
    "5 of 120 sites are significant in both halves, with a fall above the model's noise (0.001 logits).",
    "Heads 21.6, 22.0 and 27.1 read most after layers 6 and 8, each with a 95% interval on page 06.",
    "The slice (head 21.6 and mlp 23) recovers 0.82 [0.75, 0.90] of it.",
    "The median ratio is 0.60, without an interval.",
]


@pytest.mark.parametrize(("rule", "sentence"), BROKEN.items())
def test_a_sentence_that_breaks_a_rule_is_found(rule, sentence):
    assert rule in {fault.rule for fault in prose.faults(iter([("here", sentence)]))}


@pytest.mark.parametrize("sentence", FINE)
def test_a_sentence_in_style_is_let_through(sentence):
    assert prose.faults(iter([("here", sentence)])) == []


def test_tables_items_and_chains_are_read_apart():
    table = "| part | share |\n| --- | --- |\n| a | 0.1 |"
    text = f"The parts, each alone:\n\n{table}\n\n**So**:\n\n- one holds;\n- mlp 8 too."
    assert prose.sentences_of(text) == ["The parts, each alone:", "So:", "one holds;", "mlp 8 too."]
    assert len(prose.sentences_of("The names → layer 6 does (0.60 [0.50, 0.70]) → the answer.")) == 3


def test_sites_are_named_with_their_kind_and_tables_are_markdown():
    assert words.sites([]) == "no site" and words.sites(["6.7"]) == "head 6.7"
    assert words.sites(["6.7", "8.3"]) == "heads 6.7 and 8.3"
    assert words.sites(["mlp 8", "6.7"]) == "mlp 8 and head 6.7"
    assert words.sites(["6.7", "8.3", "9.1"], 2) == "heads 6.7, 8.3 and 1 more"
    assert words.capital("the slice") == "The slice" and words.capital("mlp 8 too") == "mlp 8 too"
    rows = pd.DataFrame({"name": ["b", "a", "c"], "estimate": [0.5, 0.25, None], "low": [0.4, None, None], "high": 0.6})
    assert words.extremes(rows, "name") == "0.25 (a) to 0.50 [0.40, 0.60] (b)"
    assert words.tabled(("x", "y"), [(1, "z")]) == "| x | y |\n| --- | --- |\n| 1 | z |"


def test_a_page_begins_with_one_answer_and_lists_the_others():
    found = {"headline": ["Layer 6 is critical.", "It fills there.", "So:\n\n| a |\n| --- |"], "sentences": ["All."]}
    assert words.answer(found).data == "Layer 6 is critical.\n\n- It fills there.\n\n- So:\n\n| a |\n| --- |"
    assert words.answer(found | {"headline": []}).data == "All."
