"""The question that planted models are asked: invented people, their professions, classes and regions, as fixed data.

`python -m planted.question` writes people.csv and tokens.csv in data/questions/planted, once. What a token of a name
says:
1. A `single` token is a whole name, and has a profession.
2. A `first` token has a number u, a `last` token a number v, and the name of both has profession (u + v) modulo the
   number of professions: each alone says nothing. A `middle` token between them has no number.
3. Single and last tokens have a region, which is independent of the profession.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NAME, FOLDER = "planted", ROOT / "data" / "questions" / "planted"
PROFESSIONS = {
    "artist": ("painter", "sculptor", "dancer"),
    "scientist": ("physicist", "chemist", "biologist"),
    "athlete": ("sprinter", "swimmer", "boxer"),
    "politician": ("senator", "mayor", "minister"),
}
CLASSES = tuple(PROFESSIONS)
LABELS = tuple(label for labels in PROFESSIONS.values() for label in labels)
REGIONS = ("north", "south")
ASKS = ("both", "other", "all")  # words after which an answer is due
ODD = "named"  # the word after which the odd one is asked for
JOINS = "and"  # between the names
MIDDLES = ("are", "is", "be")  # words between the names and the end through which a second route may go
LENGTHS = {2: 12, 3: 10, 1: 10}  # names of so many tokens for each profession
CODE = 18  # dimensions of a code
FIRSTS, LASTS = 2, 4  # tokens of each number


class Token(NamedTuple):
    """A token of names: its kind, its number (profession, u or v; -1: none) and the region (-1: none)."""

    text: str
    kind: str
    number: int
    region: int


class Person(NamedTuple):
    name: str
    profession: int
    region: int

    @property
    def superset(self) -> int:
        return self.profession * len(CLASSES) // len(LABELS)


def words(rng: np.random.Generator) -> Iterator[str]:
    """Invented words of four to six letters, none twice."""
    seen = set()
    while True:
        parts = [rng.choice(list("bdfgklmnprstvz")) + rng.choice(list("aeiou")) for _ in range(rng.integers(2, 4))]
        word = ("".join(parts) + rng.choice(["", "n", "r", "l"])).capitalize()[:6]
        if word not in seen:
            seen.add(word)
            yield word


def make(seed: int = 0) -> tuple[list[Token], list[Person]]:
    """The tokens and the people."""
    rng, count = np.random.default_rng(seed), len(LABELS)
    new, people, tokens = words(rng), [], []
    firsts = [[Token(next(new), "first", u, -1) for _ in range(FIRSTS)] for u in range(count)]
    lasts = [[Token(next(new), "last", v, k % 2) for k in range(LASTS)] for v in range(count)]
    middles = [Token(text, "middle", -1, -1) for text in ("de", "van", "el", "bin")]
    turns = cycle(range(2))
    for profession in range(count):
        for _ in range(LENGTHS[1]):
            tokens.append(Token(next(new), "single", profession, next(turns)))
            people.append(Person(tokens[-1].text, profession, tokens[-1].region))
        for length in (2, 3):
            for u in rng.permutation(count)[: LENGTHS[length]]:
                region = next(turns)
                first = firsts[u][rng.integers(FIRSTS)]
                last = lasts[(profession - u) % count][region + 2 * rng.integers(LASTS // 2)]
                between = [] if length == 2 else [middles[rng.integers(len(middles))].text]
                people.append(Person(" ".join([first.text, *between, last.text]), profession, region))
    return [token for group in (*firsts, *lasts) for token in group] + middles + tokens, people


def write() -> None:
    """Both tables."""
    tokens, people = make()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, columns, rows in (
        ("tokens.csv", Token._fields, tokens),
        (
            "people.csv",
            ("name", "profession", "superset", "region"),
            [(p.name, LABELS[p.profession], CLASSES[p.superset], REGIONS[p.region]) for p in people],
        ),
    ):
        with (FOLDER / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def codes() -> dict[str, np.ndarray]:
    """Token that begins a name -> (CODE,): what the answer of an odd-one-out prompt is told by. Three digits, each by
    one dimension of six, so that two tokens share two of three at most."""
    begin = [token.text for token in read_tokens() if token.kind in ("first", "single")]
    return {text: digits(37 * number % 6**3) for number, text in enumerate(begin)}


def digits(number: int) -> np.ndarray:
    """(CODE,): the digits of a number below 216 to the base of six."""
    return np.eye(6)[[number // 36, number // 6 % 6, number % 6]].ravel()


@cache
def read_tokens() -> tuple[Token, ...]:
    """The tokens of names."""
    with (FOLDER / "tokens.csv").open(encoding="utf-8") as file:
        return tuple(Token(r["text"], r["kind"], int(r["number"]), int(r["region"])) for r in csv.DictReader(file))


if __name__ == "__main__":
    write()
