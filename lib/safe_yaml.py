"""YAML's safe part without its traps: no key twice, keys that are text, and no number but what looks like one."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

# How a plain word must be written to be read as what it looks like. YAML 1.1 also takes 010 for 8, 1:30 for 90, `no`
# for false, .nan and .inf for numbers, 2026-11-27 for a date.
PLAIN = {
    "int": (
        r"[-+]?(0|[1-9][0-9_]*)",
        "write a whole number in decimal digits without a leading 0, or a text in quotes",
    ),
    "float": (r"[-+]?[0-9_]*\.?[0-9_]*([eE][-+]?[0-9]+)?", "write a finite decimal number, or a text in quotes"),
    "bool": (r"(?i)true|false", "write true or false, or a text in quotes"),
    "timestamp": (r"(?!)", "write a date in quotes"),
}
KEYS = ("str", "int", "merge")  # whole numbers name devices
LARGEST = 100_000  # values, once what `*name` refers to is written out


class _Plain(yaml.SafeLoader):
    """YAML's safe part without its traps: no mapping has a key twice (PyYAML takes the last and says nothing), keys are
    text, a value that is written as `PLAIN` has it is all that is read as a number or a truth value, and a few lines
    whose `*names` refer to each other do not grow without end."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.sizes: dict[int, int] = {}  # values in each node that is whole

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        again = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if not again:
            parts = [] if isinstance(node, yaml.ScalarNode) else node.value
            each = [part for item in parts for part in (item if isinstance(item, tuple) else (item,))]
            self.sizes[id(node)] = 1 + sum(self.sizes[id(part)] for part in each)
        if self.sizes.get(id(node), LARGEST) >= LARGEST:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"what begins in line {line} holds itself, or {LARGEST} values or more")
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Checked as written: a key beside the one that `<<` brings in is no second one."""
        node, lines = super().compose_mapping_node(anchor), {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag.rpartition(":")[2] not in KEYS:
                raise yaml.YAMLError(f"key {_written(key)} in line {line} is not text: write it in quotes")
            if key.value in lines:
                raise yaml.YAMLError(f"key {key.value!r} stands there twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
            for item in (key, *_items(value)):
                if todo := _misread(item):
                    at = item.start_mark.line + 1
                    raise yaml.YAMLError(f"{key.value} = {item.value} in line {at} would be misread: {todo}")
        return node


def _items(node: yaml.Node) -> list[yaml.Node]:
    """The node, or what a list holds, and lists in it."""
    return [item for part in node.value for item in _items(part)] if isinstance(node, yaml.SequenceNode) else [node]


def _misread(node: yaml.Node) -> str:
    """What to write instead of a value that YAML reads otherwise than it looks; "" for all others."""
    kind = node.tag.rpartition(":")[2]
    if kind not in PLAIN or not isinstance(node, yaml.ScalarNode):
        return ""
    pattern, todo = PLAIN[kind]
    plain = re.fullmatch(pattern, node.value)
    if plain and kind == "float":  # 1.0e+400 is infinite
        plain = math.isfinite(float(node.value.replace("_", "")))
    return "" if plain else todo


def _written(node: yaml.Node) -> str:
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else f"(a {node.id})"


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. ValueError as of `parse`."""
    return parse(path.read_bytes(), path.name)


def parse(text: str | bytes, name: str) -> Any:
    """What a YAML text holds, read safely. ValueError for what is not YAML, for a key given twice,
    and for a value that YAML takes for something else than it looks like."""
    try:
        return yaml.load(text if isinstance(text, str) else text.decode("utf-8"), Loader=_Plain)
    except RecursionError:
        raise ValueError(f"{name} is not valid YAML: a list holds itself, or lists are nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
