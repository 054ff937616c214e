"""Rules of the source tree: import order, no cycles, small folders, names and docstrings."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.source_tree import PACKAGES, ROOT, imports, modules, tree

# From top to bottom. A layer imports only from the layers below it; the other top-level modules of
# `muxjax` (errors, sampling_params, grammar, ...) are below all.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("muxjax.cli",),
    ("muxjax.serve",),
    ("muxjax.cluster",),
    ("muxjax.bench",),
    ("muxjax.compile_check",),
    ("muxjax.fleet", "muxjax.model_handle"),
    ("muxjax.units",),
    ("muxjax.engine",),
    ("muxjax.executor",),
    ("muxjax.config",),
    ("muxjax.placement.simulator",),
    ("muxjax.placement.planner",),
    ("muxjax.placement.workload", "muxjax.placement.costs"),
    ("muxjax.outputs", "muxjax.testing"),
    ("muxjax.scheduling",),
    ("muxjax.models",),
    ("muxjax.pallas_kernels",),
)
MAX_MODULES = 20
TIC_WORDS = (
    r"anew|nobody|whoever|everybody|can be had|takes in|goes by|come and go|so many|of its own"
)


def layer_of(module: str) -> int:
    """Returns the index of the layer of a module."""
    for index, packages in enumerate(LAYERS):
        if any(module == package or module.startswith(f"{package}.") for package in packages):
            return index
    return len(LAYERS)


def test_imports_go_down_the_layers() -> None:
    upward = [
        f"{module} -> {target}"
        for module, targets in imports().items()
        for target in targets
        # The package and its `__main__` only import names from other modules.
        if module not in ("muxjax", "muxjax.__main__") and layer_of(target) < layer_of(module)
    ]
    assert upward == []


def test_there_is_no_import_cycle() -> None:
    # `muxjax/__init__.py` imports the public names on first use.
    graph = {module: targets - {"muxjax"} for module, targets in imports().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_no_folder_has_too_many_modules() -> None:
    sizes = Counter(path.parent.relative_to(ROOT) for path in modules().values())
    assert {str(folder): n for folder, n in sizes.items() if n - 1 > MAX_MODULES} == {}
    assert len(list((ROOT / "benchmarks").glob("*.py"))) <= MAX_MODULES


def test_class_names_are_unique() -> None:
    paths_by_name = defaultdict(list)
    scripts = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    for path in [*modules().values(), *scripts]:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                paths_by_name[node.name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in paths_by_name.items() if len(paths) > 1} == {}


def annotation_names(path: Path) -> set[str]:
    """Names in the annotations of all functions of a module."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for annotation in (node.returns, *(argument.annotation for argument in arguments)):
                if annotation is not None:
                    parts = ast.walk(annotation)
                    names |= {part.id for part in parts if isinstance(part, ast.Name)}
    return names


def test_names_of_signatures_are_imported_at_run_time() -> None:
    """The run-time type checker of the tests needs every name of a signature.

    Optional dependencies, such as matplotlib, may be missing at run time.
    """
    hidden = []
    for name, path in modules().items():
        for node in tree(path).body:
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                imported = [
                    alias.asname or alias.name
                    for statement in node.body
                    if isinstance(statement, ast.ImportFrom)
                    and (statement.module or "").startswith("muxjax")
                    for alias in statement.names
                ]
                used = set(imported) & annotation_names(path)
                hidden += [f"{name}: {used_name}" for used_name in used]
    assert hidden == []


def test_public_functions_and_classes_have_docstrings() -> None:
    undocumented = [
        f"{name}.{node.name}"
        for name, path in modules().items()
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]
    assert undocumented == []


def pages() -> list[Path]:
    """All pages of the documentation."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_in_plain_english(page: Path) -> None:
    assert re.findall(rf"\b({TIC_WORDS})\b", page.read_text("utf-8"), re.IGNORECASE) == []


@pytest.mark.parametrize("folder", PACKAGES)
def test_sources_are_in_plain_english(folder: str) -> None:
    words_by_path = {}
    for path in sorted((ROOT / folder).rglob("*")):
        if path.suffix in (".py", ".js", ".html", ".cc", ".h"):
            words = re.findall(rf"\b({TIC_WORDS})\b", path.read_text("utf-8"), re.IGNORECASE)
            if words:
                words_by_path[str(path.relative_to(ROOT))] = words
    assert words_by_path == {}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_named_on_pages_exist(page: Path) -> None:
    """Checks paths in backquotes that begin with a folder of the checkout."""
    tops = "|".join([*PACKAGES, "tests", "benchmarks", "examples", "scripts", "docs"])
    paths = re.findall(rf"`((?:{tops})/[\w./-]*\w)`", page.read_text("utf-8"))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_test_files_do_not_import_each_other() -> None:
    """Shared helpers are in separate modules, such as `harness.py`."""
    test_imports = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                test_imports += [
                    f"{path.relative_to(ROOT)}: {module}{alias.name}"
                    for alias in node.names
                    if re.match(r"tests\.(.*\.)?test_", f"{module}{alias.name}")
                ]
    assert test_imports == []
