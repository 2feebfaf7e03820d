"""A tokenizer that remembers, so that a page is drawn again from its tables where the model cannot be had.

Prompts are made anew whenever a page is, because its work units are made of them. `Remembered` stands in for the
model's tokenizer: what a step has asked is kept in <step>.tokens.parquet, and the tokenizer is loaded for what is new.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from lib import records


class Encoding(dict):
    """Token ids and character offsets, by key or by attribute, as a tokenizer gives them."""

    @property
    def input_ids(self) -> list:
        return self["input_ids"]


class Remembered:
    """What `lib.tasks` and `lib.data` ask of a tokenizer. `load` gives the real one, `path` holds known answers."""

    def __init__(self, load: Callable[[], Any], path: Path | None = None) -> None:
        table = records.read(path).to_dict("list") if path and path.exists() else {"asked": [], "answer": []}
        self.load, self.answers = load, dict(zip(table["asked"], map(json.loads, table["answer"]), strict=True))
        self.kept = len(self.answers)

    @cached_property
    def own(self) -> Any:
        """The real tokenizer."""
        return self.load()

    def _answer(self, asked: list, ask: Callable[[], Any]) -> Any:
        key = json.dumps(asked, ensure_ascii=False)
        if key not in self.answers:
            self.answers[key] = json.loads(json.dumps(ask()))  # as it will be read
        return self.answers[key]

    def __call__(self, text: str | list[str], **options: bool) -> Encoding:
        """Ids, and offsets where they are asked for, of a text or of several."""

        def ask() -> dict[str, list]:
            said = self.own(text, **options)
            return {key: said[key] for key in ("input_ids", "offset_mapping") if key in said}

        return Encoding(self._answer(["tokens", text, options], ask))

    def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> str:
        """The messages as the model was trained to read them."""
        return self._answer(["chat", messages, options], lambda: self.own.apply_chat_template(messages, **options))

    @property
    def chat_template(self) -> str | None:
        return self._answer(["chat_template"], lambda: getattr(self.own, "chat_template", None))

    @property
    def is_fast(self) -> bool:
        return self._answer(["is_fast"], lambda: getattr(self.own, "is_fast", False))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)  # all else is asked of the real one

    def keep(self, path: Path) -> None:
        """Write all answers, if there are new ones."""
        if len(self.answers) > self.kept:
            table = pd.DataFrame({"asked": list(self.answers), "answer": map(json.dumps, self.answers.values())})
            records.write(path, table, {}, schema=None)
            self.kept = len(self.answers)
