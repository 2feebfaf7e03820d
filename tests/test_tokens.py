"""The tokenizer that remembers: the same pairs without the real one."""

import pytest

from lib import records, tasks
from pipeline.step import Remembered

ROW = {"pair_id": "p", "quad_id": "q", "half": "discovery", "answer": "artist", "corrupt_answer": "scientist"}
NAMES = {
    "clean_a": "Brad Pitt",
    "clean_b": "Pablo Picasso",
    "corrupt_a": "Isaac Newton",
    "corrupt_b": "Albert Einstein",
}


def gone():
    raise AssertionError("the tokenizer was loaded")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("template", ["profession_both", "bi_association"])
def test_what_was_asked_once_needs_no_tokenizer(smollm_tokenizer, tmp_path, template, chat):
    row = ROW | NAMES | {"task": tasks.find_template(template).task, "template": template}
    path = tmp_path / "step.tokens.parquet"
    first = Remembered(lambda: smollm_tokenizer)
    made = tasks.make_pair(first, row, chat)
    assert made == tasks.make_pair(smollm_tokenizer, row, chat) and made.clean.roles["names"]
    first.keep(path)
    again = Remembered(gone, path)
    assert tasks.make_pair(again, row, chat) == made
    assert tasks.make_pair(again, row, chat).clean.roles == made.clean.roles  # which equality leaves out
    with pytest.raises(AssertionError, match="was loaded"):
        tasks.make_pair(again, row | {"clean_a": "Bob Dylan"}, chat)


def test_a_file_is_written_only_for_what_is_new(smollm_tokenizer, tmp_path):
    path = tmp_path / "step.tokens.parquet"
    words = Remembered(lambda: smollm_tokenizer, path)  # there is no such file yet
    words.keep(path)
    assert not path.exists()
    assert words("both artists").input_ids == smollm_tokenizer("both artists").input_ids
    words.keep(path)
    before = path.stat().st_mtime_ns
    again = Remembered(lambda: smollm_tokenizer, path)
    assert again("both artists")["input_ids"] == words("both artists")["input_ids"]
    again.keep(path)
    assert path.stat().st_mtime_ns == before
    again("both writers")
    again.keep(path)
    assert len(records.read(path)) == 2
    assert again.decode([0]) == smollm_tokenizer.decode([0])
