"""Prompts, roles, candidates and pairs, on the bundled model's tokenizer and on small ones made here."""

from pathlib import Path

import pandas as pd
import pytest
from professions import QUESTION, SUPERSETS, TEMPLATES
from tokenizers import Regex, Tokenizer, decoders, normalizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lib import models, tasks
from lib.tasks import Template, make_pair, make_prompt

PEOPLE = Path(__file__).resolve().parents[1] / "data" / "people.csv"
ROW = {
    "pair_id": "p0", "quad_id": "q0", "half": "discovery", "task": "superset", "template": "profession_both",
    "clean_a": "Brad Pitt", "clean_b": "Pablo Picasso", "corrupt_a": "Isaac Newton", "corrupt_b": "Albert Einstein",
    "answer": "artist", "corrupt_answer": "scientist",
}  # fmt: skip
ODD = ROW | {
    "task": "odd_one_out", "template": "odd_one_out",
    "clean_a": "Isaac Newton", "clean_b": "Brad Pitt", "clean_c": "Leonardo DiCaprio",
    "corrupt_a": "Isaac Newton", "corrupt_b": "Albert Einstein", "corrupt_c": "Leonardo DiCaprio",
    "answer": "a", "corrupt_answer": "c",
}  # fmt: skip


def words_tokenizer(*texts: str, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """Every word with its leading space is one token, and so are runs of what is not a letter."""
    splitter = Split(Regex(r" ?[^\W\d_]+|[^\w ]+| "), "isolated")
    pieces = [piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *pieces]))}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = splitter
    inner.post_processor = TemplateProcessing(
        single=f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", clean_up_tokenization_spaces=False)


def llama_tokenizer(*texts: str) -> PreTrainedTokenizerFast:
    """Words as Llama 2's tokenizer has them: a space is put before the text, and one token alone is decoded without."""
    words = [f"▁{word}" for text in texts for word in text.split(" ")]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(dict.fromkeys(["<unk>", "<s>", *words]))}, "<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = Split(Regex("▁[^▁]*"), "isolated")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", clean_up_tokenization_spaces=False)


def pieces(tokenizer, prompt, role):
    """A role's tokens as the text they stand for."""
    return [tokenizer.decode([prompt.ids[i]]) for i in prompt.roles[role]]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", [False, True])
def test_roles_are_exactly_the_names(smollm_tokenizer, name, chat):
    template = TEMPLATES[name]
    names = ["Isaac Newton", "Pelé", "50 Cent"][: len(template.slots)]
    prompt = make_prompt(smollm_tokenizer, template, names, chat)
    for slot, person in zip(template.slots, names, strict=True):
        at_start = prompt.text.startswith(person)
        assert "".join(pieces(smollm_tokenizer, prompt, f"name_{slot}")) == ("" if at_start or chat and
               f"\n{person}" in prompt.text else " ") + person  # fmt: skip
    own = [i for slot in template.slots for i in prompt.roles[f"name_{slot}"]]
    assert prompt.roles["names"] == tuple(own)
    assert prompt.roles["last"] == (len(prompt.ids) - 1,)
    assert prompt.roles["all"] == tuple(range(len(prompt.ids)))
    shared_out = [prompt.roles.get(role, ()) for role in ("names", "between", "last", "rest")]
    assert sorted(sum(shared_out, ())) == list(prompt.roles["all"]), "every token has one of the four roles"
    assert smollm_tokenizer.decode(prompt.ids) == prompt.text
    assert prompt.text.endswith(template.answer_prefix)


def test_a_name_has_its_leading_space_only_where_the_template_has_one(smollm_tokenizer):
    inside = make_prompt(smollm_tokenizer, TEMPLATES["profession_both"], ["Isaac Newton", "Brad Pitt"])
    first = make_prompt(smollm_tokenizer, TEMPLATES["both_famous"], ["Isaac Newton", "Brad Pitt"])
    assert pieces(smollm_tokenizer, inside, "name_a") == [" Isaac", " Newton"]
    assert pieces(smollm_tokenizer, first, "name_a") == ["Isa", "ac", " Newton"]


def test_the_tokens_around_the_names(smollm_tokenizer):
    both = make_prompt(smollm_tokenizer, TEMPLATES["profession_both"], ["Isaac Newton", "Brad Pitt"])
    assert pieces(smollm_tokenizer, both, "between") == [" is", " that", " they", " are"]
    assert pieces(smollm_tokenizer, both, "rest") == ["The", " profession", " of", " and"]
    alone = make_prompt(smollm_tokenizer, TEMPLATES["profession_is"], ["Isaac Newton"])
    assert "between" not in alone.roles and pieces(smollm_tokenizer, alone, "rest") == ["The", " profession", " of"]
    at_end = make_prompt(smollm_tokenizer, Template("x", "one_name", "{a}"), ["Isaac Newton"])
    assert set(at_end.roles) == {"name_a", "names", "last", "all"}, "a role without a token is not there"


def test_a_name_that_also_stands_in_the_template_is_found_in_its_slot(smollm_tokenizer):
    prompt = make_prompt(smollm_tokenizer, TEMPLATES["bi_association"], ["Person Y", "Person Z"])
    start = prompt.text.rindex("Q: Person Y")
    before = len(smollm_tokenizer(prompt.text[: start + 2]).input_ids)
    assert prompt.roles["name_a"][0] == before


def test_special_tokens_are_added_once():
    text = "The profession of Ada Lovelace is"
    plain, with_bos = words_tokenizer(text), words_tokenizer(text, bos=True)
    one, other = (make_prompt(t, TEMPLATES["profession_is"], ["Ada Lovelace"]) for t in (plain, with_bos))
    assert other.ids == (1, *one.ids)
    assert other.roles["name_a"] == tuple(i + 1 for i in one.roles["name_a"])
    with_bos.chat_template = (
        "<s>{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} is{% endif %}"
    )
    with_bos.add_special_tokens({"bos_token": "<s>"})
    chat = make_prompt(with_bos, TEMPLATES["profession_is"], ["Ada Lovelace"], chat_template=True)
    assert chat.ids.count(1) == 1 and chat.ids[0] == 1


@pytest.mark.parametrize("name", ["profession_both", "both_famous", "odd_one_out"])
def test_offsets_without_the_leading_space_give_the_same_roles(smollm_tokenizer, name):
    """GPT-2's tokenizer leaves the space out of a token's offsets."""
    inner = Tokenizer.from_str(smollm_tokenizer.backend_tokenizer.to_str())
    inner.post_processor = ByteLevel(add_prefix_space=False, trim_offsets=True)
    trimmed = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert trimmed(" a Pitt", return_offsets_mapping=True)["offset_mapping"] == [(1, 2), (3, 7)]
    names = ["Isaac Newton", "Pelé", "50 Cent"][: len(TEMPLATES[name].slots)]
    one, other = (make_prompt(t, TEMPLATES[name], names) for t in (smollm_tokenizer, trimmed))
    assert one == other


def test_bad_prompts_say_what_is_wrong(smollm_tokenizer):
    template = TEMPLATES["profession_both"]
    for names, message in (
        (["Brad Pitt"], "needs 2 names"),
        (["Brad Pitt", " Bob"], "without spaces around it"),
        (["Brad Pitt", ""], "without spaces around it"),
    ):
        with pytest.raises(ValueError, match=message):
            make_prompt(smollm_tokenizer, template, names)
    with pytest.raises(ValueError, match="unknown attributes.*hobby.*allowed.*nationality"):
        make_prompt(smollm_tokenizer, TEMPLATES["bi_association"], ["A B", "C D"], attributes=["hobby"])
    with pytest.raises(ValueError, match="part of the name 'Ken Griffey Jr.'"):  # ".," is one token
        make_prompt(smollm_tokenizer, TEMPLATES["odd_one_out"], ["Ken Griffey Jr.", "Brad Pitt", "Bob Dylan"])
    with pytest.raises(ValueError, match="appends '</s>'"):
        make_prompt(words_tokenizer("The profession of Ada is", eos=True), TEMPLATES["profession_is"], ["Ada"])
    plain = words_tokenizer("The profession of Ada is")
    with pytest.raises(ValueError, match="chat_template is true"):
        make_prompt(plain, TEMPLATES["profession_is"], ["Ada"], chat_template=True)
    plain.chat_template = "{{ messages[0].content | upper }}"
    with pytest.raises(ValueError, match="'Ada'.*not found in the prompt"):
        make_prompt(plain, TEMPLATES["profession_is"], ["Ada"], chat_template=True)


def test_templates_of_ones_own_and_unknown_ones():
    own = tasks.find_template("{a} met {b}; both are", "superset")
    assert (own.name, own.slots, own.form) == ("{a} met {b}; both are", ("a", "b"), "plural")
    with pytest.raises(ValueError, match="unknown template 'professions'.*profession_both"):
        tasks.find_template("professions")
    with pytest.raises(ValueError, match=r"must hold the slots \{a\}, \{b\} once each"):
        tasks.find_template("{a} and {a} are both")
    with pytest.raises(ValueError, match="unknown task 'hobby'.*one_name"):
        Template("x", "hobby", "{a}")
    assert next(iter(TEMPLATES)) == "profession_both"
    assert sum(t.task == "superset" for t in TEMPLATES.values()) >= 3
    assert {t.task for t in TEMPLATES.values()} == set(tasks.TASKS)


def test_the_bi_association_prompt_lists_the_attributes_asked_for(smollm_tokenizer):
    texts = {
        attributes: make_prompt(
            smollm_tokenizer, TEMPLATES["bi_association"], ["Brad Pitt", "Bob Dylan"], attributes=attributes
        ).text
        for attributes in (("profession",), ("profession", "school"), ("nationality", "profession"))
    }
    assert texts["profession",].startswith("# Task: Find Common Attributes Between Two People\nYou will be given")
    assert all(text.endswith("Q: Brad Pitt and Bob Dylan\nA: Yes -") for text in texts.values())
    assert "1. Same profession →" in texts["profession",] and "school" not in texts["profession",]
    assert "2. Same school →" in texts["profession", "school"]
    assert "1. Same nationality →" in texts["nationality", "profession"]
    assert "A: Yes - doctor - they are both doctors." in texts["profession",]
    capitals = make_prompt(smollm_tokenizer, TEMPLATES["bi_association_capitalised"], ["Brad Pitt", "Bob Dylan"]).text
    assert "A: Yes - Doctor - they are both doctors." in capitals


@pytest.mark.parametrize("name", ["profession_both", "both_famous", "bi_association", "profession_is"])
def test_candidates_are_single_tokens_with_their_leading_space(smollm_tokenizer, name):
    template = TEMPLATES[name]
    names, tokens = tasks.candidates(smollm_tokenizer, template)
    assert names == SUPERSETS and len(set(tokens)) == len(SUPERSETS)
    ending = "s" if template.form == "plural" else ""
    assert [smollm_tokenizer.decode([t]) for t in tokens] == [f" {word}{ending}" for word in SUPERSETS]


def test_candidates_that_are_not_one_token_or_not_distinct_are_errors(smollm_tokenizer):
    with pytest.raises(ValueError, match="' Athlete' is 2 tokens.*another form"):
        tasks.candidates(smollm_tokenizer, TEMPLATES["bi_association_capitalised"])
    unknown = words_tokenizer("both artists")  # every other answer is the unknown token
    with pytest.raises(ValueError, match="' scientists' and ' athletes' share their first token"):
        tasks.candidates(unknown, TEMPLATES["profession_both"])


def test_labels_are_the_professions_of_the_table_and_the_singular_supersets(smollm_tokenizer):
    table = pd.read_csv(PEOPLE, keep_default_na=False)
    assert set(QUESTION.labels) == set(table.profession)
    words, tokens = tasks.labels(smollm_tokenizer, TEMPLATES["profession_both"])
    assert [smollm_tokenizer.decode([token]) for token in tokens] == [f" {word}" for word in words]
    assert {"actors", "actor", "physicists", "novelist", *SUPERSETS} <= set(words)
    assert len(set(tokens)) == len(tokens)
    assert not set(tokens) & set(tasks.candidates(smollm_tokenizer, TEMPLATES["profession_both"])[1])
    assert "boxers" not in words  # two tokens
    assert not set(tasks.labels(smollm_tokenizer, TEMPLATES["bi_association"])[0]) & set(SUPERSETS)
    assert QUESTION.plural("tennis player") == "tennis players" and QUESTION.plural("coach") == "coaches"


def test_a_pair_lines_up_token_by_token(smollm_tokenizer):
    pair = make_pair(smollm_tokenizer, ROW)
    outside = set(pair.clean.roles["all"]) - set(pair.clean.roles["names"])
    assert pair.clean.roles == pair.corrupt.roles
    assert all(pair.clean.ids[i] == pair.corrupt.ids[i] for i in outside)
    assert pair.clean.roles["swapped"] == pair.clean.roles["names"]
    assert (pair.candidates[pair.answer], pair.candidates[pair.corrupt_answer]) == ("artist", "scientist")
    assert smollm_tokenizer.decode([pair.clean_tokens[pair.answer]]) == " artists"
    assert pair.clean_tokens == pair.corrupt_tokens and pair.clean_seconds == ()
    assert len(pair.labels) == len(pair.label_tokens) > 20
    one_changed = make_pair(smollm_tokenizer, ROW | {"corrupt_b": "Pablo Picasso"})
    assert one_changed.clean.roles["swapped"] == one_changed.clean.roles["name_a"]


def test_pairs_that_do_not_line_up_name_the_names_and_counts(smollm_tokenizer):
    for change, message in (
        ({"corrupt_a": "Usain Bolt"}, "slot a.*'Brad Pitt' has 2, 'Usain Bolt' has 4"),
        ({"corrupt_a": "Brad Pitt", "corrupt_b": "Pablo Picasso"}, "same names"),
        ({"answer": "plumber"}, "answer 'plumber' is unknown; allowed: artist, scientist"),
        ({"corrupt_answer": "artist"}, "both 'artist'"),
        ({"template": "nonsense"}, "unknown template 'nonsense'"),
        ({"task": "one_name"}, "is of task 'superset', not 'one_name'"),
        ({"template": "Who is like {a} and {b}"}, "ends in a name: the last token must be the prompt's own"),
    ):
        with pytest.raises(ValueError, match=message):
            make_pair(smollm_tokenizer, ROW | change)


def test_odd_one_out_reads_the_names_own_tokens(smollm_tokenizer):
    pair = make_pair(smollm_tokenizer, ODD)
    assert pair.candidates == ("a", "b", "c") and (pair.answer, pair.corrupt_answer) == (0, 2)
    decode = smollm_tokenizer.decode
    assert [decode([t]) for t in pair.clean_tokens] == [" Isaac", " Brad", " Leonardo"]
    assert [decode([t]) for t in pair.corrupt_tokens] == [" Isaac", " Albert", " Leonardo"]
    assert [decode([t]) for t in pair.clean_seconds] == [" Newton", " Pitt", " Di"]
    assert pair.clean.roles["swapped"] == pair.clean.roles["name_b"]
    assert pair.labels == ()
    with pytest.raises(ValueError, match="'Isaac Newton' and 'Isaac Brown' share their first token"):
        make_pair(smollm_tokenizer, ODD | {"corrupt_b": "Isaac Brown"})
    one_token = make_pair(smollm_tokenizer, ODD | {"clean_a": "Homer", "corrupt_a": "Homer"})
    assert len(one_token.clean.roles["name_a"]) == 1
    assert one_token.clean_seconds == one_token.corrupt_seconds == ()


def test_two_prompts_need_no_template(smollm_tokenizer):
    answers = {"answer": " Paris", "corrupt_answer": " Berlin"}
    pair = tasks.two_prompts(smollm_tokenizer, clean="The Louvre is in", corrupt="The Spree is in", **answers)
    differ = [i for i, (one, other) in enumerate(zip(pair.clean.ids, pair.corrupt.ids, strict=True)) if one != other]
    assert pair.clean.roles["swapped"] == tuple(differ)
    with pytest.raises(ValueError, match="must agree"):
        tasks.two_prompts(smollm_tokenizer, clean="one", corrupt="one two", **answers)
    with pytest.raises(ValueError, match="are the same"):
        tasks.two_prompts(smollm_tokenizer, clean="one", corrupt="one", **answers)
    with pytest.raises(ValueError, match="share their first token"):
        tasks.two_prompts(smollm_tokenizer, clean="one", corrupt="two", answer=" Paris", corrupt_answer=" Paris now")
    with pytest.raises(ValueError, match="'one ' ends in white space; give it to the answers"):
        tasks.two_prompts(smollm_tokenizer, clean="one ", corrupt="two ", answer="Paris", corrupt_answer="Berlin")
    with pytest.raises(ValueError, match="role 'last' is there by itself"):
        tasks.two_prompts(smollm_tokenizer, clean="one", corrupt="two", roles={"last": "one"}, **answers)
    with pytest.raises(ValueError, match="begins no token of its own; begin it with a space"):
        tasks.two_prompts(smollm_tokenizer, clean="The cit", corrupt="The fit", answer="ies", corrupt_answer="ness")
    eos = words_tokenizer("one two Paris Berlin", eos=True)
    with pytest.raises(ValueError, match="appends '</s>'; the last token must be the prompt's own"):
        tasks.two_prompts(eos, clean="one", corrupt="two", **answers)
    with pytest.raises(ValueError, match="appends '</s>'"):
        tasks.words_tokens(eos, "one two", "one")


def test_two_prompts_take_lists(smollm_tokenizer):
    texts = {"clean": ["The Louvre is in", "The Museum is in"], "corrupt": ["The Spree is in", "The River is in"]}
    texts |= {"answer": [" Paris", " Madrid"], "corrupt_answer": [" Berlin", " London"], "foils": [" Rome"]}
    pairs = tasks.two_prompts(smollm_tokenizer, **texts, roles={"verb": "is"}, pair_id=["louvre", "prado"])
    assert [(pair.pair_id, pair.quad_id) for pair in pairs] == [("louvre", "louvre"), ("prado", "prado")]
    for at, pair in enumerate(pairs):
        one = {name: value if name == "foils" else value[at] for name, value in texts.items()}
        assert pair == tasks.two_prompts(smollm_tokenizer, **one, roles={"verb": ("is", "is")}, pair_id=pair.pair_id)
        assert [smollm_tokenizer.decode([pair.clean.ids[i]]) for i in pair.clean.roles["verb"]] == [" is"]
    numbered = tasks.two_prompts(smollm_tokenizer, **texts | {"foils": [[" Rome"], [" Oslo", " Rome"]]})
    assert [pair.pair_id for pair in numbered] == ["two_prompts 1", "two_prompts 2"]
    assert [len(pair.candidates) for pair in numbered] == [3, 4]
    for change, message in (
        ({"pair_id": ["x", "x"]}, "pair_id 'x' stands there more than once"),
        ({"pair_id": "x"}, "pair_id is no list of 2, as clean is: 'x'"),
        ({"answer": [" Paris"]}, "answer is no list of 2"),
        ({"corrupt": "The Spree is in"}, "corrupt is no list of 2"),
        ({"clean": ["The Louvre is in", "The River is in"]}, "pair 'two_prompts 2': .* are the same"),
        ({"roles": [{"verb": "is"}, {"verb": "was"}]}, "'was' stands 0 times in 'The Museum is in'"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.two_prompts(smollm_tokenizer, **texts | change)


def test_words_that_begin_as_llama_2_has_them():
    text = "The profession of Ada Lovelace and Isaac Newton is that they are both Alan Turing in Paris Berlin"
    own = llama_tokenizer(text, " ".join(f"{QUESTION.plural(name)} {name}" for name in SUPERSETS))
    token = own.get_vocab()
    assert own("in Paris").input_ids == [1, token["▁in"], token["▁Paris"]] and own.decode([token["▁Paris"]]) == "Paris"
    assert tasks.token_texts(own, [token["▁Paris"], token["▁artists"]]) == [" Paris", " artists"]
    names = {"clean": "Ada in", "corrupt": "Isaac in", "answer": " Paris", "corrupt_answer": " Berlin"}
    pair = tasks.two_prompts(own, **names)
    assert pair.clean_tokens == pair.corrupt_tokens == (token["▁Paris"], token["▁Berlin"])
    assert pair.clean.roles["swapped"] == (1,)
    words, ids = tasks.candidates(own, TEMPLATES["profession_both"])
    assert words == SUPERSETS and ids == tuple(token[f"▁{word}s"] for word in SUPERSETS)
    assert set(tasks.labels(own, TEMPLATES["profession_both"])[0]) >= set(SUPERSETS)
    prompt = make_prompt(own, TEMPLATES["profession_both"], ["Ada Lovelace", "Isaac Newton"])
    assert tasks.token_texts(own, [prompt.ids[i] for i in prompt.roles["name_b"]]) == [" Isaac", " Newton"]


@pytest.mark.parametrize("name", ["{{ strftime_now ('%d %b %Y') }}", '{% set d = strftime_now("%Y-%m-%d") %}{{ d }}'])
def test_a_chat_template_that_asks_for_the_date_is_told_a_fixed_one(monkeypatch, name):
    own = words_tokenizer("The profession of Ada is")
    chat = "Today is " + name + ".\n{% for m in messages %}{{ m.content }}{% endfor %}"
    day = tasks.DATE.strftime("%Y-%m-%d" if "-%m" in name else "%d %b %Y")
    for own.chat_template in (chat, {"tool_use": "", "default": chat}):
        text = make_prompt(own, TEMPLATES["profession_is"], ["Ada"], chat_template=True).text
        assert text == f"Today is {day}.\nThe profession of Ada is"
    own.chat_template = "{{ messages[0].content }}{% set f = '%Y' %}{{ strftime_now(f) }}"
    with pytest.raises(ValueError, match="writes today's date in a form it works out; set chat_template to false"):
        make_prompt(own, TEMPLATES["profession_is"], ["Ada"], chat_template=True)


def test_the_model_answers_the_plans_example(smollm, smollm_tokenizer):
    row = make_pair(smollm_tokenizer, ROW)
    clean, corrupt = models.next_logits(smollm, [row.clean.ids, row.corrupt.ids])
    assert clean[list(row.clean_tokens)].argmax() == row.answer
    assert corrupt[list(row.corrupt_tokens)].argmax() == row.corrupt_answer
    assert smollm_tokenizer.decode([int(clean.argmax())]).strip() in {"artists", "musicians", "actors"}
