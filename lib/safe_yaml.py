"""YAML's safe part, in which no mapping has a key twice; PyYAML by itself takes the last and says nothing."""

from pathlib import Path
from typing import Any

import yaml


class _KeysOnce(yaml.SafeLoader):
    """The safe loader that refuses a second key."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Checked as written: a key beside the one that `<<` brings in is no second one."""
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"key {key.value!r} stands there twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
        return node


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, read safely. ValueError for what is not YAML, and for a key given twice."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_KeysOnce)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from None
