"""Where packages can be had, as the user's own `pip` and `npm` know it.

No registry's address is written here: mirrors, extra indexes, local folders, credentials and
certificates are those of the user's configuration. pip has no command that says where a file is
without fetching all of it first (`install --dry-run --report` downloads wheels from every index
that does not serve metadata files), so pip's own finder is asked, in a process of its own. It is
not a public interface; where it has changed, `pip download` is used, which cannot be resumed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from muxjax.errors import DownloadError
from muxjax.models.download.download import Location

_TIMEOUT_S = 120.0

_ASK_PIP = """
import json, sys
from pip._internal.commands import create_command
from pip._internal.req.constructors import install_req_from_line
name, version = sys.argv[1:]
requirement = install_req_from_line(name + "==" + version)
command = create_command("download")
options, _ = command.parse_args(["--quiet", "--no-deps", name])
with command.main_context():
    session = command.get_default_session(options)
    finder = command._build_package_finder(options=options, session=session)
    best = finder.find_best_candidate(requirement.name, requirement.specifier).best_candidate
    if best is None:
        sys.exit(3)
    from pip._vendor import certifi
    print(json.dumps({"url": best.link.url_without_fragment,
                      "ca_file": options.cert or certifi.where()}))
"""
_NOT_FOUND = 3


def locate_wheel(name: str, version: str) -> Location | None:
    """Where the user's pip finds a package's file; None when it has to be asked to fetch it.

    Raises:
      DownloadError: there is no pip, or its indexes do not have the package.
    """
    found = _run([*_pip(), "-c", _ASK_PIP, name, version])
    if found.returncode == _NOT_FOUND:
        raise DownloadError(f"pip finds no {name}=={version} in its indexes{_said(found)}")
    if found.returncode != 0:
        return None
    try:
        return Location(**json.loads(found.stdout.strip().splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        return None


def pip_download(name: str, version: str, folder: Path) -> Path:
    """Lets pip fetch a package's file into an empty folder, without its dependencies.

    Raises:
      DownloadError: pip failed.
    """
    command = [*_pip(), "-m", "pip", "download", "--no-deps", "--quiet"]
    done = _run([*command, "--dest", str(folder), f"{name}=={version}"], timeout=None)
    files = list(folder.iterdir())
    if done.returncode != 0 or len(files) != 1:
        raise DownloadError(f"pip could not download {name}=={version}{_said(done)}")
    return files[0]


def locate_tarball(name: str, version: str) -> Location:
    """Where the user's npm finds a package's tarball.

    Raises:
      DownloadError: there is no npm, or its registry does not have the package.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise DownloadError(f"npm is needed to find {name}@{version}, and is not installed")
    found = _run([npm, "view", f"{name}@{version}", "dist.tarball", "--json"])
    try:
        url = json.loads(found.stdout)
    except ValueError:
        url = None
    if found.returncode != 0 or not isinstance(url, str):
        raise DownloadError(f"npm finds no {name}@{version}{_said(found)}")
    ca_file = _run([npm, "config", "get", "cafile"]).stdout.strip()
    return Location(url, ca_file if ca_file and Path(ca_file).is_file() else None)


def _pip() -> list[str]:
    """The Python whose pip is used: this one, or (a `uv` environment has no pip) the path's."""
    for python in (sys.executable, shutil.which("python3"), shutil.which("python")):
        if python and _run([python, "-m", "pip", "--version"]).returncode == 0:
            return [python]
    raise DownloadError(
        "pip is needed to find the demo models and neither this Python nor the one on the path has "
        "it: try `python -m ensurepip`"
    )


def _run(
    command: list[str], timeout: float | None = _TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise DownloadError(f"{Path(command[0]).name} gave no answer in {timeout:.0f} s") from error
    except OSError as error:
        raise DownloadError(f"{command[0]} cannot be run: {error}") from error


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    return f": {lines[-1]}" if lines else ""
