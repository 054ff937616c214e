"""Reads YAML with the line of every key, and rejects duplicate keys. Imports no JAX."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from muxjax.errors import FleetConfigError

_MAX_DEPTH = 8
"""Maximum depth of recorded lines. A fleet file has four levels; an alias can form a cycle."""


def read_yaml(path: Path) -> tuple[object, dict[str, int]]:
    """Parses a file; see `parse_yaml`.

    Raises:
      FleetConfigError: the file cannot be read, or is not valid YAML in UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FleetConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise FleetConfigError(f"{path}: {error.strerror or error}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> tuple[object, dict[str, int]]:
    """Returns the document in `text`, and the line of each key path (`models[0].dtype` -> 4).

    Raises:
      FleetConfigError: `text` is not valid YAML, or has a duplicate key; the message begins with
        `where` and the line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: dict[str, int] = {}
        _collect_lines(node, "", 0, lines)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise FleetConfigError(f"{where}{line}: not valid YAML: {error.problem}") from error
    except RecursionError as error:
        raise FleetConfigError(f"{where}: not valid YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise FleetConfigError(f"{where}: not valid YAML: {reason}") from error


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys; PyYAML's safe loader silently uses the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[object] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            keys.add(key)
        return super().construct_mapping(node, deep)


def _collect_lines(node: yaml.Node, path: str, depth: int, lines: dict[str, int]) -> None:
    if depth >= _MAX_DEPTH:
        return
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{path}.{key.value}" if path else str(key.value)
            lines[inner] = key.start_mark.line + 1
            _collect_lines(value, inner, depth + 1, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            inner = f"{path}[{index}]"
            lines[inner] = value.start_mark.line + 1
            _collect_lines(value, inner, depth + 1, lines)
