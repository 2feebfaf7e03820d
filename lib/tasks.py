"""Prompts, token roles and candidate answers: the words of a pair, before any model is run.

1. A `Template` is a text with slots. `make_prompt` fills the slots and keeps where each name stands in the text.
2. The tokenizer's offset mapping on the *whole* text says which tokens carry a name. A name is never tokenised alone:
   without its leading space it has other tokens (" Isaac" is one token, "Isaac" is "Isa" + "ac").
3. `candidates` gives one answer token per superset in the template's form; odd-one-out takes them from the names.
4. `make_pair` puts a clean and a corrupt prompt together and refuses a pair whose tokens do not line up one to one.

Nothing here needs torch: any Hugging Face *fast* tokenizer will do. All bad input raises ValueError.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from typing import Any

from lib import questions
from lib.questions import SLOT, SLOTS, SUPERSET, TASKS, Form, Question, Template

# The day that a chat template is told where it asks for today's: that of Llama 3.3's own example. With another one each
# day, prompts of the same parameters would differ.
DATE = date(2024, 7, 26)
_NOW = re.compile(r"""strftime_now\s*\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")

__all__ = ["SLOTS", "TASKS", "Form", "Pair", "Prompt", "Question", "Template"]
DEFAULT_ATTRIBUTES = ("profession", "school")  # that the bi-association prompt lists


def find_template(
    name: str, task: str = "superset", form: Form = "plural", question: str | Question = questions.DEFAULT
) -> Template:
    """The question's template of that name, or, if `name` holds slots, a template of the user's own with that text."""
    return questions.load(question).find(name, task, form)


@dataclass(frozen=True)
class Prompt:
    """A text, its token ids, and the absolute token positions of every role (see `outside_names`)."""

    text: str
    ids: tuple[int, ...]
    roles: dict[str, tuple[int, ...]] = field(hash=False)


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupt prompt whose tokens line up one to one; `answer` indexes `candidates` (see make_pair)."""

    pair_id: str
    quad_id: str
    half: str  # "discovery" or "confirmation"
    task: str
    template: str
    clean: Prompt  # both prompts have the same length and role positions; roles hold "swapped" as well
    corrupt: Prompt
    candidates: tuple[str, ...]  # superset names, or the slots a, b, c in odd_one_out
    answer: int  # the clean prompt's answer
    corrupt_answer: int
    clean_tokens: tuple[int, ...]  # the candidates' token ids in each prompt: equal except in odd_one_out
    corrupt_tokens: tuple[int, ...]
    clean_seconds: tuple[int, ...] = ()  # odd_one_out: second token of each name, () if a name has only one
    corrupt_seconds: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()  # words recorded beside the candidates
    label_tokens: tuple[int, ...] = ()


def encoded(tokenizer: Any, text: str, special: bool = True) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """The token ids of a prompt, the tokenizer's own special tokens (unless not `special`) before it, and the
    characters that each token stands for. ValueError for a tokenizer that is not fast or appends a token of its own,
    or writes its first one twice, and for a prompt longer than its model can read."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("a fast tokenizer is needed: this one gives no offset mapping")
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)
    ids, offsets = tuple(encoding["input_ids"]), encoding["offset_mapping"]
    if not ids:
        raise ValueError(f"the text {text!r} has no tokens; give one that has some")
    if offsets[-1][0] == offsets[-1][1]:
        raise ValueError(
            f"this tokenizer appends {tokenizer.convert_ids_to_tokens(ids[-1])!r}; the last token must be the prompt's "
            "own, so that the model predicts the answer after it"
        )
    first = text[slice(*offsets[0])]
    if ids[:1] == ids[1:2] and (not first or first in special_tokens(tokenizer)):
        raise ValueError(f"the prompt begins with {tokenizer.convert_ids_to_tokens(ids[0])!r} twice; once is right")
    if len(ids) > (limit := getattr(tokenizer, "model_max_length", len(ids))):
        raise ValueError(f"the prompt has {len(ids)} tokens, and the model reads {limit}; choose shorter names")
    return ids, offsets


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """What each token stands for after another word, with its leading space. Decoded alone, a token that begins a word
    loses the space in tokenizers of Llama 2's kind."""
    before = tokenizer("both", add_special_tokens=False).input_ids
    start = len(tokenizer.decode(before))
    return [text[start:] for text in tokenizer.batch_decode([[*before, token] for token in tokens])]


def answer_ids(tokenizer: Any, words: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of each " word" as the model would predict it, after another word (() if the two merge)."""
    if not words:
        return []
    prefix = tuple(tokenizer("both", add_special_tokens=False).input_ids)
    full = tokenizer([f"both{word}" for word in words], add_special_tokens=False).input_ids
    return [tuple(ids[len(prefix) :]) if tuple(ids[: len(prefix)]) == prefix else () for ids in full]


def _distinct(names: Sequence[str], tokens: Sequence[int], where: str) -> None:
    for i, token in enumerate(tokens):
        if token in tokens[:i]:
            other = names[list(tokens).index(token)]
            raise ValueError(f"{where}: {other!r} and {names[i]!r} share their first token; they cannot be told apart")


def candidates(
    tokenizer: Any, template: Template, attribute: str = SUPERSET
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The classes of an attribute and, for each, the token id of its answer in the template's form with its leading
    space. ValueError if an answer is not a single token for this tokenizer, one without the space, or if two share
    one."""
    words = answers(template, attribute)
    ids = answer_ids(tokenizer, words)
    for word, tokens in zip(words, ids, strict=True):
        if len(tokens) != 1:
            raise ValueError(
                f"template {template.name!r}: the answer {word!r} is {len(tokens)} tokens for this tokenizer, not one; "
                "give the class another word, or use a template whose answers have another form"
            )
    firsts = [tokens[0] for tokens in ids]
    for word, read in zip(words, token_texts(tokenizer, firsts), strict=True):
        if not read.startswith(" "):
            raise ValueError(f"template {template.name!r}: the answer {word!r} is read as {read!r}, without its space")
    _distinct(words, firsts, f"template {template.name!r}")
    return tuple(template.question.answers[attribute]), tuple(firsts)


def answers(template: Template, attribute: str) -> list[str]:
    """The answers to a template about an attribute, with their leading space. ValueError for an unknown attribute."""
    known = template.question.answers
    if attribute not in known:
        raise ValueError(f"unknown attribute {attribute!r}; allowed: {', '.join(known)}")
    return [f" {template.question.in_form(word, template.form)}" for word in known[attribute].values()]


def labels(tokenizer: Any, template: Template) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Words recorded beside the candidates, and their tokens: professions (plural, singular) and singular supersets, of
    one token, and no candidate itself. Odd-one-out has none: its answers are names."""
    if template.task == "odd_one_out":
        return (), ()
    taken = set(candidates(tokenizer, template)[1])
    forms: tuple[Form, ...] = ("plural", "singular", *(["capitalised"] if template.form == "capitalised" else []))
    own = template.question
    words = dict.fromkeys([own.in_form(p, f) for f in forms for p in own.labels] + list(own.classes.values()))
    kept: dict[int, str] = {}
    for word, ids in zip(words, answer_ids(tokenizer, [f" {word}" for word in words]), strict=True):
        if len(ids) == 1 and ids[0] not in taken:
            kept.setdefault(ids[0], word)
    return tuple(kept.values()), tuple(kept)


def recorded(tokenizer: Any, template: Template, attribute: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """What is recorded beside the candidates of a pair about an attribute: `labels`, and the answers of the others."""
    words, tokens = labels(tokenizer, template)
    kept = dict(zip(tokens, words, strict=True))
    others = [word for other in template.question.answers if other != attribute for word in answers(template, other)]
    for word, ids in zip(others, answer_ids(tokenizer, others), strict=True):
        if len(ids) == 1:
            kept[ids[0]] = word.strip()
    return tuple(kept.values()), tuple(kept)


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts that a tokenizer reads as one of its special tokens, wherever they stand."""
    return tuple(token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special)


def fill(template: Template, names: Sequence[str], attributes: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """The filled text and each name's character span in it."""
    if len(names) != len(template.slots):
        raise ValueError(f"template {template.name!r} needs {len(template.slots)} names, got {list(names)}")
    for name in names:
        if not isinstance(name, str) or not name or name != name.strip():
            raise ValueError(f"a name must be a text without spaces around it, got {name!r}")
    fillers = dict(zip(template.slots, names, strict=True))
    if "{attributes}" in template.text or "{examples}" in template.text:
        fillers |= _listed(template, attributes)
    text, spans = "", []
    for i, part in enumerate(SLOT.split(template.text)):  # text, slot, text, slot, ..., text
        piece = fillers[part] if i % 2 else part
        if i % 2 and part in SLOTS:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    return text, spans


def _listed(template: Template, attributes: Sequence[str]) -> dict[str, str]:
    """What fills the slots {attributes} and {examples}."""
    known = template.question.listed
    if not attributes or set(attributes) - set(known):
        raise ValueError(f"unknown attributes in {list(attributes)}; allowed, one or more: {', '.join(known)}")

    def formed(found: re.Match) -> str:
        return template.question.in_form(found[1], template.form)

    lines = [f"{i}. {known[name].line}" for i, name in enumerate(attributes, 1)]
    examples = [re.sub(r"\[([a-z ]+)\]", formed, known[name].example) for name in attributes]
    return {"attributes": "\n".join(lines), "examples": "\n\n".join(examples)}


def make_prompt(
    tokenizer: Any,
    template: Template,
    names: Sequence[str],
    chat_template: bool = False,
    attributes: Sequence[str] = DEFAULT_ATTRIBUTES,
) -> Prompt:
    """Fill `template` with `names`, one per slot, tokenise it once with the tokenizer's own special tokens, and find
    the roles.

    `chat_template` wraps the text as a user message in the tokenizer's chat template, with its generation prompt. The
    answer prefix then opens the reply; without one, a reply may not begin with a leading-space token. `attributes` are
    what the bi-association prompt asks about.

    Raises ValueError for a wrong number of names, a name that is not found in the wrapped prompt or holds a special
    token, a token that mixes a name with the text around it, a prompt longer than the tokenizer's model can read, and a
    tokenizer that is not fast or appends a token of its own.
    """
    text, spans = fill(template, names, attributes)
    if special := [token for token in special_tokens(tokenizer) if any(token in name for name in names)]:
        raise ValueError(f"{list(names)} holds {special[0]!r}, which this tokenizer reads as a special token")
    if chat_template:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("chat_template is true, but this tokenizer has none; set chat_template to false")
        message = [{"role": "user", "content": text}]
        wrapped = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, **dated(tokenizer.chat_template)
        )
        start = wrapped.find(text)
        if start < 0:
            raise ValueError(
                f"the names {list(names)} were not found in the prompt: the chat template changed {text!r}"
            )
        text, spans = wrapped, [(s + start, e + start) for s, e in spans]
    text += template.answer_prefix
    # A chat template writes the special tokens itself; adding the tokenizer's would double the first one.
    ids, offsets = encoded(tokenizer, text, special=not chat_template)
    roles: dict[str, tuple[int, ...]] = {}
    for slot, name, (start, end) in zip(template.slots, names, spans, strict=True):
        roles[f"name_{slot}"] = _name_tokens(text, offsets, name, start, end)
    roles["names"] = tuple(p for positions in roles.values() for p in positions)
    return Prompt(text, ids, roles | outside_names(roles["names"], len(ids)))


def dated(template: Any) -> dict[str, str]:
    """The option of `apply_chat_template` that tells a template DATE where it asks for today's date; none where it does
    not ask. ValueError for a date in a form that cannot be told from the template."""
    template = template.get("default") if isinstance(template, Mapping) else template  # which is applied of several
    calls = re.findall(r"strftime_now\s*\(", template) if isinstance(template, str) else []
    if not calls:
        return {}
    forms = {double or single for double, single in _NOW.findall(template)}
    if len(_NOW.findall(template)) < len(calls):
        raise ValueError("the chat template writes today's date in a form it works out; set chat_template to false")
    days = {form: DATE.strftime(form) for form in sorted(forms)}
    # on a line of its own, whose end jinja drops
    return {"chat_template": f"{{% macro strftime_now(form) %}}{{{{ {days!r}[form] }}}}{{% endmacro %}}\n{template}"}


def outside_names(names: Sequence[int], length: int) -> dict[str, tuple[int, ...]]:
    """The roles of a prompt beside its names, which they share out with them: `between` (after the names, before the
    last token), `last`, `rest` (what no other role has); and `all`. A role without a token is left out."""
    between = range(max(names) + 1, length - 1)
    rest = set(range(length - 1)) - {*names, *between}
    roles = {"between": between, "last": (length - 1,), "rest": sorted(rest), "all": range(length)}
    return {role: tuple(tokens) for role, tokens in roles.items() if tokens}


def _name_tokens(text: str, offsets: Sequence[tuple[int, int]], name: str, start: int, end: int) -> tuple[int, ...]:
    """Positions of the tokens of text[start:end], its leading space included; no token may hold more than that."""
    first = start - 1 if start > 0 and text[start - 1] == " " else start
    positions = tuple(i for i, (s, e) in enumerate(offsets) if s < end and e > first)
    if text[start:end] != name or not positions:
        raise ValueError(f"the name {name!r} was not found in the prompt {text!r}")
    outside = [text[s:e] for s, e in (offsets[positions[0]], offsets[positions[-1]]) if s < first or e > end]
    if outside:
        raise ValueError(
            f"the token {outside[0]!r} holds part of the name {name!r} and of the text around it; use another template"
        )
    return positions


def make_pair(
    tokenizer: Any,
    row: Mapping[str, Any],
    chat_template: bool = False,
    attributes: Sequence[str] = DEFAULT_ATTRIBUTES,
    question: str | Question = questions.DEFAULT,
) -> Pair:
    """Build and check one pair from a row of pairs.parquet or of a pairs_file: pair_id, quad_id, half, task, template,
    clean_a, clean_b, corrupt_a, corrupt_b (and clean_c, corrupt_c), answer, corrupt_answer: superset names, or a slot
    (a, b, c) in odd_one_out; with `attribute`, values of that one of the question's.

    Raises ValueError for names with different token counts, tokens outside the names that differ, clean and corrupt
    names the same, an unknown answer, answers that are the same, and for what make_prompt and candidates refuse.
    """
    template = find_template(row["template"], row["task"], question=question)
    where = f"pair {row['pair_id']!r}"
    if template.task != row["task"]:
        raise ValueError(f"{where}: template {template.name!r} is of task {template.task!r}, not {row['task']!r}")
    names = {side: [row[f"{side}_{slot}"] for slot in template.slots] for side in ("clean", "corrupt")}
    clean, corrupt = (make_prompt(tokenizer, template, n, chat_template, attributes) for n in names.values())
    if clean.roles["last"][0] in clean.roles["names"]:
        raise ValueError(f"template {template.name!r} ends in a name: the last token must be the prompt's own")
    swapped = _swapped(clean, corrupt, names["clean"], names["corrupt"], where)
    clean, corrupt = (replace(prompt, roles=prompt.roles | {"swapped": swapped}) for prompt in (clean, corrupt))

    attribute = row.get("attribute", SUPERSET)
    beside: tuple[tuple, tuple] = ((), ())
    if template.task == "odd_one_out":
        words: tuple[str, ...] = template.slots
        own, other = (_name_answers(*each, where) for each in zip((clean, corrupt), names.values(), strict=True))
    else:
        words, shared, beside = _answer_words(tokenizer, template, template.question, attribute)
        own = other = (shared, ())
    places = []
    for column in ("answer", "corrupt_answer"):
        if row[column] not in words:
            raise ValueError(f"{where}: {column} {row[column]!r} is unknown; allowed: {', '.join(words)}")
        places.append(words.index(row[column]))
    if places[0] == places[1]:
        raise ValueError(f"{where}: answer and corrupt_answer are both {row['answer']!r}; they must differ")
    about = (str(row[name]) for name in ("pair_id", "quad_id", "half"))
    prompts = (template.task, template.name, clean, corrupt)
    tokens = (own[0], other[0], own[1], other[1])
    return Pair(*about, *prompts, words, *places, *tokens, *beside)


@lru_cache(maxsize=256)
def _answer_words(tokenizer: Any, template: Template, question: Question, attribute: str) -> tuple:
    """The candidates of all pairs of a template, their tokens, and what is recorded beside them; `question` only tells
    equal templates of two questions apart."""
    return *candidates(tokenizer, template, attribute), recorded(tokenizer, template, attribute)


def _swapped(
    clean: Prompt, corrupt: Prompt, names: Sequence[str], others: Sequence[str], where: str
) -> tuple[int, ...]:
    """Positions of the names that differ, after a check that the two prompts line up and differ nowhere else."""
    positions: tuple[int, ...] = ()
    unequal = []
    for slot, one, other in zip(SLOTS, names, others, strict=False):
        own, theirs = (prompt.roles[f"name_{slot}"] for prompt in (clean, corrupt))
        if len(own) != len(theirs):
            unequal.append(f"in slot {slot} {one!r} has {len(own)}, {other!r} has {len(theirs)}")
        positions += own if one != other else ()
    if unequal:
        counts = "; ".join(unequal)
        raise ValueError(f"{where}: the names have different token counts: {counts}; choose names of equal counts")
    outside = set(clean.roles["all"]) - set(clean.roles["names"])
    if clean.roles != corrupt.roles or any(clean.ids[i] != corrupt.ids[i] for i in outside):
        raise ValueError(f"{where}: the two prompts differ outside their names: {clean.text!r} and {corrupt.text!r}")
    if not positions:
        raise ValueError(f"{where}: the clean and the corrupt prompt have the same names {list(names)}")
    return positions


def two_prompts(
    tokenizer: Any,
    *,
    clean: str | Sequence[str],
    corrupt: str | Sequence[str],
    answer: str | Sequence[str],
    corrupt_answer: str | Sequence[str],
    foils: Sequence = (),
    roles: Mapping | Sequence[Mapping] | None = None,
    pair_id: str | Sequence[str] | None = None,
) -> Pair | list[Pair]:
    """A pair from any two texts whose tokens line up, without a template: roles `swapped`, `last` and `all`.

    Lists of texts give a list of pairs: whatever else is no list of as many holds for all of them.

    answer, corrupt_answer, foils  the candidates, written as they continue the text (" Paris"); the first token of each
                                   is read.
    roles                          more roles by name: the words that have it, of both texts or of each.
    pair_id                        each is a cluster by itself; default: "two_prompts", or "two_prompts 1", ...

    Raises ValueError for different token counts, the same text twice, white space at a text's end, candidates that
    share a first token, a role whose words are not there once, or not at the same tokens of both texts, lists of
    different lengths, a text longer than the model can read, and a pair_id given twice.
    """
    given = {"clean": clean, "corrupt": corrupt, "answer": answer, "corrupt_answer": corrupt_answer}
    given |= {"foils": foils, "roles": roles or {}, "pair_id": pair_id}
    if isinstance(clean, str):
        return _two_prompts(tokenizer, **given | {"pair_id": "two_prompts" if pair_id is None else pair_id})
    if pair_id is None:
        given["pair_id"] = [f"two_prompts {number}" for number in range(1, len(clean) + 1)]
    listed = {name for name, value in given.items() if not isinstance(value, str | Mapping)}
    if all(isinstance(word, str) for word in foils):
        listed.discard("foils")
    for name in sorted(listed | {"clean", "corrupt", "pair_id"}):
        if isinstance(given[name], str) or len(given[name]) != len(clean):
            raise ValueError(f"two_prompts: {name} is no list of {len(clean)}, as clean is: {given[name]!r}")
    if twice := sorted({one for one in given["pair_id"] if list(given["pair_id"]).count(one) > 1}):
        raise ValueError(f"two_prompts: pair_id {twice[0]!r} stands there more than once; give each pair its own")
    rows = [{name: value[at] if name in listed else value for name, value in given.items()} for at in range(len(clean))]
    return [_two_prompts(tokenizer, **row) for row in rows]


def _two_prompts(
    tokenizer: Any,
    clean: str,
    corrupt: str,
    answer: str,
    corrupt_answer: str,
    foils: Sequence[str],
    roles: Mapping[str, str | tuple[str, str]],
    pair_id: str,
) -> Pair:
    """`two_prompts` of one pair."""
    where, texts = f"two_prompts, pair {pair_id!r}", (clean, corrupt)
    for text in texts:
        if text != text.rstrip():
            raise ValueError(f"{where}: {text!r} ends in white space; give it to the answers instead")
    sides = [encoded(tokenizer, text)[0] for text in texts]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"{where}: {clean!r} has {len(sides[0])} tokens, {corrupt!r} has {len(sides[1])}; they must agree"
        )
    swapped = tuple(i for i, (one, other) in enumerate(zip(*sides, strict=True)) if one != other)
    if not swapped:
        raise ValueError(f"{where}: the clean and the corrupt prompt are the same: {clean!r}")
    places = {"swapped": swapped, "last": (len(sides[0]) - 1,), "all": tuple(range(len(sides[0])))}
    for role, words in roles.items():
        if role in places:
            raise ValueError(f"{where}: role {role!r} is there by itself; give yours another name")
        each = (words, words) if isinstance(words, str) else words
        found = [words_tokens(tokenizer, text, own) for text, own in zip(texts, each, strict=True)]
        if found[0] != found[1]:
            raise ValueError(
                f"{where}: role {role!r}: {each[0]!r} has tokens {found[0]}, {each[1]!r} {found[1]}: not the same"
            )
        places[role] = found[0]
    candidates = (answer, corrupt_answer, *foils)
    tokens = [_continuations(tokenizer, text, ids, candidates) for text, ids in zip(texts, sides, strict=True)]
    for own in tokens:
        _distinct(candidates, own, where)
    about = {"pair_id": pair_id, "quad_id": pair_id, "half": "discovery", "task": "superset", "template": "two_prompts"}
    prompts = {"clean": Prompt(clean, sides[0], places), "corrupt": Prompt(corrupt, sides[1], places)}
    answers = {"answer": 0, "corrupt_answer": 1, "clean_tokens": tokens[0], "corrupt_tokens": tokens[1]}
    return Pair(**about, **prompts, candidates=candidates, **answers)


def _continuations(tokenizer: Any, text: str, ids: tuple[int, ...], words: Sequence[str]) -> tuple[int, ...]:
    """The first token of each of the words, as the text goes on with it."""
    out = []
    for word in words:
        whole = encoded(tokenizer, text + word)[0]
        if whole[: len(ids)] != ids or len(whole) == len(ids):
            raise ValueError(f"{word!r} after {text!r} begins no token of its own; begin it with a space")
        out.append(whole[len(ids)])
    return tuple(out)


def words_tokens(tokenizer: Any, text: str, words: str) -> tuple[int, ...]:
    """The tokens of a text in which some words of it stand. ValueError where they are not there exactly once."""
    if not words.strip() or text.count(words) != 1:
        raise ValueError(f"{words!r} stands {text.count(words)} times in {text!r}; give words that stand there once")
    start = text.index(words)
    offsets = encoded(tokenizer, text)[1]
    return tuple(i for i, (low, high) in enumerate(offsets) if low < start + len(words) and high > start)


def _name_answers(prompt: Prompt, names: Sequence[str], where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First tokens of the names of an odd-one-out prompt, and the second ones: () if a name has only one token."""
    ids = [[prompt.ids[p] for p in prompt.roles[f"name_{slot}"]] for slot in SLOTS]
    firsts = tuple(i[0] for i in ids)
    _distinct(names, firsts, where)
    return firsts, tuple(i[1] for i in ids) if all(len(i) > 1 for i in ids) else ()
