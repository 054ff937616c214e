"""Imports between the packages of the server: one direction, no cycles."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import muxjax.serve

FOLDER = Path(muxjax.serve.__file__).parent
LAYERS = (
    {"server"},
    {"app"},
    {"openapi", "settings", "api_page"},
    {"openai", "ops", "live"},
    {"access"},
    {"find_model", "body", "request_model"},
    {"address", "errors", "fleet_protocol", "logs", "schemas", "tracing"},
)
"""Layers from top to bottom. A package imports only from lower layers."""


def imports() -> dict[str, set[str]]:
    """Returns the modules that each module of the server imports."""
    paths = {".".join(p.relative_to(FOLDER).with_suffix("").parts): p for p in FOLDER.rglob("*.py")}
    graph = {}
    for module, path in paths.items():
        targets = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("muxjax.serve"):
                package = (node.module or "").removeprefix("muxjax.serve").removeprefix(".")
                for alias in node.names:
                    target = f"{package}.{alias.name}".removeprefix(".")
                    targets.add(target if target in paths else package)
        graph[module] = targets
    return graph


def test_imports_have_no_cycles() -> None:
    TopologicalSorter(imports()).prepare()


def test_packages_import_only_lower_layers() -> None:
    layer = {package: number for number, packages in enumerate(LAYERS) for package in packages}
    for module, targets in imports().items():
        package = module.partition(".")[0]
        if package == "__init__":
            continue
        for target in (target.partition(".")[0] for target in targets):
            if target != package:
                assert layer[target] > layer[package], f"{module} imports {target}"
