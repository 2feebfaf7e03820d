"""A question: which class do some items have in common? Its items, classes, words and templates, as data.

1. A question is a folder with `question.yaml` and a table of items: one of data/questions/, or one of your own. `load`
   reads and checks it; whatever is wrong is a ValueError of one sentence that names the file and the key.
2. `Question.answers` has the words that a prompt can be answered with: of the classes (the attribute `superset`), and
   of every attribute of the items that has answers of its own, for placebo pairs.
3. A `Template` is a text with slots, of a question. What it asks about is its `task`.

Whatever the question, records and code call its items people, its classes supersets and its finer labels professions,
as the first question does; `Question.reworded` puts what is said of them into the question's own words.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lib.safe_yaml import read_yaml
from lib.tables import read_rows, read_table, unusable

ROOT = Path(__file__).resolve().parents[1]
FOLDER, DEFAULT = ROOT / "data" / "questions", "professions"
SUPERSET = "superset"  # the attribute that is asked for
Form = Literal["plural", "singular", "capitalised"]
Task = Literal["superset", "bi_association", "odd_one_out", "one_name"]
TASKS = ("superset", "bi_association", "odd_one_out", "one_name")
SLOTS = ("a", "b", "c")
_N_NAMES = {"superset": 2, "bi_association": 2, "odd_one_out": 3, "one_name": 1}
SLOT = re.compile(r"\{(a|b|c|attributes|examples)\}")
ITEM = ("name", "superset", "profession")  # columns of items that a question may call otherwise
FLAGS = ("two_supersets", "second_superset", "namesake")
_ASKED = {"evidence", "fame", "known", "first", "n_tokens", "first_token", "kind", "key"}  # what is found out of items
# What pages call the classes together, a direction of no class, and circuits picked on one class.
_TAKEN = {"all", "random", "only"}
KINDS = {"controls": ("invented", "thing"), "sentences": ("person", "thing", "general")}
_BRACES = re.compile(r"\{[^{}]*\}")


def _list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _answers(value: Any) -> Any:
    """Classes with their answer words; a list where each is its own."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return value
    if twice := [name for number, name in enumerate(value) if name in value[:number]]:
        raise ValueError(f"{twice[0]!r} stands there twice")
    return {name: name for name in value}


def _named(classes: dict[str, str]) -> dict[str, str]:
    """Names of classes that pages and records can tell apart."""
    for name in classes:
        if name.lower() in _TAKEN or set(name) & set("+|,"):
            raise ValueError(f"{name!r} cannot name a class (nor can all, random, only, or what holds + | or a comma)")
    words = [*classes.values()]
    if twice := [word for number, word in enumerate(words) if word in words[:number]]:
        raise ValueError(f"{twice[0]!r} is the answer of two classes; they cannot be told apart")
    return classes


Word = Annotated[str, Field(pattern=r"^\S(.*\S)?$")]
Texts = Annotated[tuple[Word, ...], BeforeValidator(_list)]
Some = Annotated[Texts, Field(min_length=1)]
Answers = Annotated[dict[Word, Word], BeforeValidator(_answers), Field(min_length=2), AfterValidator(_named)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Attribute(_Strict):
    """What else the table says of its items: what may stand there, and the answers by which placebo pairs are read."""

    allowed: Texts | None = None  # None: any text
    whole: Annotated[tuple[int, int], BeforeValidator(_list)] | None = None  # whole numbers, from and to
    answers: Annotated[dict[Word, Word], Field(min_length=2, max_length=2)] | None = None  # two values, and their words
    only: dict[str, Texts] = {}  # items in placebo pairs have one of these values of another attribute


class Listed(_Strict):
    """What the bi-association prompt lists, and a worked example; a [word] in it takes the template's form."""

    line: str
    example: str


class Text(_Strict):
    """A template as it is written down."""

    task: Task
    text: str
    form: Form = "plural"
    answer_prefix: str = ""


class Question(_Strict):
    """A question as its file has it. Paths are from its folder; see docs in book/question.md."""

    name: str
    folder: Path = Field(exclude=True)
    stamps: tuple[int, ...] = Field(exclude=True)  # when its files were changed
    items: str  # CSV with columns name, superset, profession, or those of `columns`
    columns: dict[Literal["name", "superset", "profession"], Word] = {}
    title: str  # of its book, and the paragraph under it
    introduction: str
    words: dict[Word, Word] = {}  # what pages call people, supersets, professions, ... where it is not that
    classes: Answers
    attributes: dict[Word, Attribute] = {}
    match: Texts = ()  # attributes in which people of a quad are matched where they can be, and those after them
    match_also: Texts = ()
    plurals: dict[str, str] = {}  # irregular ones
    inflect: bool = True  # false: answers and labels are written as they are, whatever the form
    templates: Annotated[dict[Word, Text], Field(min_length=1)]
    fame: Some  # one-name templates by which an item is known
    alone: Word  # the one-name template of the later steps
    # one-name templates, or texts in a form, by which steps ask for class and label; default: those of `fame`
    probes: Annotated[tuple[Annotated[tuple[Form, str], BeforeValidator(_list)], ...], BeforeValidator(_list)] = ()
    listed: dict[str, Listed] = {}
    defaults: dict[str, str | Texts] = {}  # of parameters that name templates
    controls: str | None = None  # CSV: kind (invented, thing), name
    sentences: str | None = None  # CSV: kind (person, thing, general), text
    odd_one_out: str | None = None  # CSV of pairs

    def model_post_init(self, _: Any) -> None:
        """What one key says of another, and of the files. ValueError."""
        self.__dict__["probes"] = self.probes or tuple(("plural", name) for name in self.fame)
        every = self.find  # makes the templates, and checks them
        for key in ("fame", "alone", "probes"):
            value = getattr(self, key)
            for name in (value,) if isinstance(value, str) else [one if key == "fame" else one[1] for one in value]:
                if key != "probes" and name not in self.texts and SLOT.search(name):
                    raise ValueError(f"{key}: {name!r} is a text; give it a name under templates, and that name here")
                if every(name, "one_name").task != "one_name":
                    raise ValueError(f"{key}: template {name!r} is of task {every(name).task}, not one_name")
        if not any(template.task == "superset" for template in self.texts.values()):
            raise ValueError("templates: none is of task superset")
        for name, template in self.texts.items():
            if not self.listed and {"attributes", "examples"} & {*SLOT.findall(template.text)}:
                raise ValueError(f"templates.{name} lists attributes, and `listed` has none")
        self._check_attributes()
        for key in ("items", "controls", "sentences", "odd_one_out"):
            if (path := self.file(key)) and not (ROOT / path).is_file():
                raise ValueError(f"{key}: there is no file {path}")
            if path and not path.lower().endswith(".csv"):
                raise ValueError(f"{key}: {path} must be a CSV file")
        self.table("controls"), self.table("sentences")  # read, and checked
        if without := set(self.supersets) - {*self._rows()[self.columns.get("superset", "superset")]}:
            raise ValueError(f"classes: no row of {self.items} is of {', '.join(sorted(without))}")

    def _check_attributes(self) -> None:
        """ValueError for an attribute that is not there, that the table has under another name, or whose answers none
        of its items can have."""
        for key in ("match", "match_also"):
            if unknown := set(getattr(self, key)) - self.attributes.keys():
                raise ValueError(f"{key}: no attribute is called {', '.join(sorted(unknown))}")
        taken = {*ITEM, *FLAGS, *self.columns.values(), *_ASKED}
        for name, own in self.attributes.items():
            if name in taken:
                raise ValueError(f"attributes: {name} is a column of its own already; call the attribute otherwise")
            if unknown := set(own.only) - self.attributes.keys():
                raise ValueError(f"attributes.{name}.only: no attribute is called {', '.join(sorted(unknown))}")
            allowed = () if own.whole else own.allowed or own.answers or ()
            if impossible := set(own.answers or ()) - set(allowed):
                raise ValueError(f"attributes.{name}.answers: no item can be {', '.join(sorted(impossible))}")

    def __hash__(self) -> int:
        return hash((self.name, self.folder))

    def file(self, key: str) -> str | None:
        """The path of `items`, `controls`, `sentences` or `odd_one_out`, from the repository where it lies inside."""
        name = getattr(self, key)
        path = None if name is None else Path(os.path.normpath(self.folder / name))
        return path and str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)

    @property
    def supersets(self) -> tuple[str, ...]:
        """The classes, in order."""
        return tuple(self.classes)

    @cached_property
    def answers(self) -> dict[str, dict[str, str]]:
        """Of each attribute with answers, the classes and the word for one such item; those asked for come first."""
        return {SUPERSET: self.classes} | {name: own.answers for name, own in self.attributes.items() if own.answers}

    @property
    def shared(self) -> tuple[tuple[str, ...], ...]:
        """Attributes that two matched items may share, the strictest set first."""
        return tuple(dict.fromkeys(((*self.match, *self.match_also), self.match, ())))

    @property
    def item_columns(self) -> tuple[list[str], list[str]]:
        """What the columns of the table of items are called there: those it must have, and those it may have."""
        name, superset, profession = (self.columns.get(own, own) for own in ITEM)
        return [name, superset, *self.attributes], [profession, *FLAGS]

    def _rows(self) -> pd.DataFrame:
        """The table of items as it is written; `pipeline.population.load_people` checks what its cells say."""
        return read_rows(ROOT / self.file("items"), "items", *self.item_columns)[0]

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The finer labels of the table of items; none where it has no column of them."""
        return tuple(sorted({*self._rows().get(self.columns.get("profession", "profession"), ())} - {""}))

    def table(self, key: Literal["controls", "sentences"]) -> pd.DataFrame:
        """The question's controls (columns `kind`, `name`) or sentences (`kind`, `text`); no rows where it has none.

        ValueError naming every row that cannot be used: of another kind than KINDS, or a sentence about an item
        without its slot {a}."""
        columns = ["kind", "name" if key == "controls" else "text"]
        if (path := self.file(key)) is None:
            return pd.DataFrame(columns=columns, dtype=str)
        table, faults = read_table(ROOT / path, key, columns), {}
        for place, kind, text in table[columns].itertuples():
            if kind not in KINDS[key]:
                faults[place] = f"kind {kind!r} is unknown; allowed: {', '.join(KINDS[key])}"
            elif not text or (key == "sentences" and kind != "general" and "{a}" not in text):
                faults[place] = f"{columns[1]} {text!r} is empty, or lacks the slot {{a}} of what it is about"
        if faults:
            raise ValueError(unusable(key, table, faults))
        return table.reset_index(drop=True)

    @cached_property
    def texts(self) -> "dict[str, Template]":
        """The templates."""
        return {name: Template(name, question=self, **own.model_dump()) for name, own in self.templates.items()}

    def of_task(self, task: str) -> "list[Template]":
        """The templates of a task, in order; none where the question does not declare it."""
        return [template for template in self.texts.values() if template.task == task]

    def find(self, name: str, task: str = "superset", form: Form = "plural") -> "Template":
        """The template of that name, or, if `name` holds slots, a template of the user's own with that text."""
        if name in self.texts:
            return self.texts[name]
        if SLOT.search(name):
            return Template(name, task, name, form, question=self)
        raise ValueError(
            f"unknown template {name!r}; allowed: {', '.join(self.texts)}, or a text of your own with slots {{a}} and "
            "{b}"
        )

    def plural(self, word: str) -> str:
        """The plural of a label or class: dancers, tennis players, coaches."""
        regular = word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")
        return self.plurals.get(word) or (regular if self.inflect else word)

    def in_form(self, word: str, form: Form) -> str:
        """`word` as a template of that form would be continued, without its leading space."""
        return {"plural": self.plural, "singular": str, "capitalised": str.capitalize}[form](word)

    @property
    def template_defaults(self) -> dict[str, Any]:
        """What parameters that name templates and attributes are by default: as `defaults` has it, else all of them."""
        own = [template.name for template in self.of_task("superset")]
        alone = [name for _, name in self.probes]
        out = {"templates": own, "order_templates": own[1:] or own, "probe_template": own[-1], "probe_questions": alone}
        out |= {"attributes": [*self.listed]} if self.listed else {}
        return {key: value if isinstance(value, str) else tuple(value) for key, value in (out | self.defaults).items()}

    @property
    def placebo(self) -> str:
        """The attribute by which placebo pairs are judged, the first that has answers; "" where there is none."""
        return next((name for name in self.answers if name != SUPERSET), "")

    def reworded(self, text: str) -> str:
        """A text in the question's own words (`words`), in the same case and with their article; `code` is left."""
        if not self.words:
            return text
        words = {key.lower(): word for key, word in self.words.items()}
        keys = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
        pattern = re.compile(rf"`[^`]*`|\b(?:(an?) )?({keys})\b", re.IGNORECASE)

        def put(found: re.Match) -> str:
            if found[2] is None:
                return found[0]
            word = words[found[2].lower()]
            word = word[0].upper() + word[1:] if found[2][0].isupper() else word
            return f"{found[1][0]}{'n' * (word[0].lower() in 'aeiou')} {word}" if found[1] else word

        return pattern.sub(put, text)


@dataclass(frozen=True)
class Template:
    """A prompt text with slots {a}, {b}, {c}; `form` is how its answers are written, `answer_prefix` how they begin."""

    name: str
    task: str
    text: str
    form: Form = "plural"
    answer_prefix: str = ""
    question: Question = field(default_factory=lambda: load(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"template {self.name!r}: unknown task {self.task!r}; allowed: {', '.join(TASKS)}")
        unknown = [braces for braces in _BRACES.findall(self.text) if not SLOT.fullmatch(braces)]
        if unknown:
            known = "slots are {a}, {b} and {c}"
            raise ValueError(f"template {self.name!r}: {', '.join(unknown)} is no slot; {known}")
        if self.text != self.text.rstrip():
            raise ValueError(
                f"template {self.name!r} ends in white space, and answers begin with a space of their own: take it off "
                "(in YAML, `>-` and `|-` leave out the last line break)"
            )
        found = [slot for slot in SLOT.findall(self.text) if slot in SLOTS]
        if found != list(self.slots):
            raise ValueError(
                f"template {self.name!r} of task {self.task!r} must hold the slots "
                f"{', '.join('{' + s + '}' for s in self.slots)} once each, in this order; it holds {found}"
            )

    @property
    def slots(self) -> tuple[str, ...]:
        """The name slots of the task: ("a",), ("a", "b") or ("a", "b", "c")."""
        return SLOTS[: _N_NAMES[self.task]]


_READ: dict[Path, tuple[Path, ...]] = {}  # the files of each question that was read


def load(name: str | Question = DEFAULT) -> Question:
    """The question of that name in data/questions/, or of a folder of your own that holds a question.yaml; one that is
    loaded is given back. It takes 0.1 ms to see whether its files have changed: not to be done for each of many pairs.
    """
    if isinstance(name, Question):
        return name
    places = [folder / "question.yaml" for folder in (FOLDER / name, Path(name), ROOT / name)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        known = sorted(place.parent.name for place in FOLDER.glob("*/question.yaml"))
        raise ValueError(
            f"question {name!r} is unknown; there are {', '.join(known)}, or give a folder that holds a question.yaml"
        )
    folder = path.parent.resolve()
    files = (path, *_READ.get(folder, ()))
    question = _read(folder, tuple(file.stat().st_mtime_ns for file in files if file.is_file()))
    return question if len(files) > 1 else load(name)  # which files it has is known now


@cache
def _read(folder: Path, stamps: tuple[int, ...]) -> Question:
    path = folder / "question.yaml"
    given = read_yaml(path)
    if not isinstance(given, Mapping):
        raise ValueError(f"{path} must hold keys and values, not {type(given).__name__}")
    own = {"name": folder.name, "folder": folder, "stamps": stamps}
    if taken := own.keys() & given.keys():
        raise ValueError(f"{path}: {sorted(taken)[0]}: the folder's name is the question's; take this key out")
    try:
        question = Question.model_validate({**given, **own})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {key + ': ' if key else ''}{first['msg'].removeprefix('Value error, ')}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    named = (question.file(key) for key in ("items", "controls", "sentences", "odd_one_out"))
    _READ[folder] = tuple(ROOT / name for name in named if name)
    return question
