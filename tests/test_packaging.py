"""All kinds of installation import all sub-packages, from any working folder.

The folders `models`, `pallas_kernels`, `placement` and `serve` are sub-packages of `muxjax` through
relative symbolic links.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Top-level folder of the checkout -> package.
PACKAGES = {
    "muxjax": "muxjax",
    "models": "muxjax.models",
    "pallas_kernels": "muxjax.pallas_kernels",
    "placement": "muxjax.placement",
    "serve": "muxjax.serve",
}
IMPORTS = (
    "import muxjax, muxjax.cli.main, muxjax.config.fleet_file, muxjax.scheduling.steps,"
    " muxjax.models.nn.config, muxjax.pallas_kernels.layout, muxjax.placement,"
    " muxjax.serve.body as b, sys; print(muxjax.__file__, b.__file__, sep='\\n')"
)
GENERIC = ("models", "serve", "placement", "pallas_kernels")


def source_modules() -> set[str]:
    """The installed paths of all modules of the checkout."""
    modules = set()
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.relative_to(ROOT / folder).as_posix()
            modules.add(f"{package.replace('.', '/')}/{inner}")
    return modules


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, because setuptools writes beside the sources."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE", *PACKAGES):
        (copy / name).symlink_to(ROOT / name)
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(copy))
    (built,) = out.iterdir()
    return built


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    completed = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        # Build processes of pip must not import from the checkout.
        cwd="/",
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr


def imported(folder: Path, *search: Path) -> list[Path]:
    """The paths of `muxjax` and `muxjax.serve.body` in a Python that is started in `folder`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, search))}
    # Python must search the working folder first, which PYTHONSAFEPATH would prevent.
    environment.pop("PYTHONSAFEPATH", None)
    completed = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return [Path(line) for line in completed.stdout.split()]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files, as in a site-packages folder."""
    target = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", str(target), str(wheel))
    return target


def test_the_wheel_contains_exactly_the_modules(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {name for name in names if name.endswith(".py")}
    assert modules == source_modules()
    assert "muxjax/py.typed" in names
    page_files = {
        f"muxjax/serve/live/{path.name}"
        for path in (ROOT / "serve" / "live").iterdir()
        if path.is_file()
    }
    assert page_files <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"muxjax"}


@pytest.mark.parametrize("name", GENERIC)
def test_root_folders_are_linked_into_the_package(name: str) -> None:
    link = ROOT / "muxjax" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


def test_a_wheel_imports_from_any_folder(installed: Path, tmp_path: Path) -> None:
    paths = imported(tmp_path, installed)
    assert paths == [installed / "muxjax/__init__.py", installed / "muxjax/serve/body.py"]


def test_folders_of_a_user_with_the_same_names_are_not_imported(
    installed: Path, tmp_path: Path
) -> None:
    for name in GENERIC:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('must not be imported')")
    assert imported(tmp_path, installed)[1] == installed / "muxjax/serve/body.py"


def test_python_in_the_checkout_imports_the_checkout(installed: Path) -> None:
    assert imported(ROOT, installed) == [ROOT / "muxjax/__init__.py", ROOT / "muxjax/serve/body.py"]


def test_the_checkout_can_be_imported_from_pythonpath(tmp_path: Path) -> None:
    assert imported(tmp_path, ROOT) == [ROOT / "muxjax/__init__.py", ROOT / "muxjax/serve/body.py"]


def test_an_editable_install_imports_from_any_folder(tmp_path: Path) -> None:
    target = tmp_path / "site"
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *PACKAGES):
        (copy / name).symlink_to(ROOT / name)
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--target", str(target))
    pip("install", *options, "--editable", str(copy))
    # Python reads `.pth` files only in site folders.
    program = f"import site; site.addsitedir({str(target)!r}); {IMPORTS}"
    for folder in (tmp_path, ROOT):
        completed = subprocess.run(
            [sys.executable, "-c", program],
            cwd=folder,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert completed.returncode == 0, completed.stderr
        paths = [Path(line).resolve() for line in completed.stdout.split()]
        assert paths == [ROOT / "muxjax/__init__.py", ROOT / "serve/body.py"]
