"""The source tree as data: modules, their imports, and the definitions in them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Folder of the checkout -> package.
PACKAGES = {
    "muxjax": "muxjax",
    "models": "muxjax.models",
    "pallas_kernels": "muxjax.pallas_kernels",
    "placement": "muxjax.placement",
    "serve": "muxjax.serve",
}


@cache
def modules() -> dict[str, Path]:
    """The path of every module of the package, by its dotted name."""
    paths = {}
    for folder, package in PACKAGES.items():
        # `rglob` does not follow the symbolic links muxjax/models, muxjax/serve, ...
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            paths[".".join(parts)] = path
    return paths


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


@cache
def imports() -> dict[str, frozenset[str]]:
    """The modules of the package that each module imports, including inside functions."""
    known = modules()
    graph = {}
    for name, path in known.items():
        targets = set()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    targets.add(inner if inner in known else node.module)
        graph[name] = frozenset(target for target in targets if target in known) - {name}
    return graph
