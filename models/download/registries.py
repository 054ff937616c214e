"""Locates package files with the indexes and registries that the user's `pip` and `npm` use.

Indexes, credentials and certificates are read with public interfaces: `pip config list`, the Simple
Repository API (PEP 503, PEP 691), `pip install --dry-run --report` and `npm view`. No registry's
address is written here.

- If an index is configured, its page for the package is read directly. This downloads no package.
- Otherwise the location comes from pip's report. Its default index serves metadata separately, so
  this downloads no package either.
- If neither gives a location, pip downloads the file (`pip_download`), which cannot be resumed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path

from muxjax.errors import DownloadError
from muxjax.models.download import network
from muxjax.models.download.download import Location, open_url
from muxjax.models.download.network import NetworkDown

_TIMEOUT_S = 120.0
_PIP_DOWNLOAD_RETRIES = ("--retries", "5")
"""pip's default. Without retries, pip does not print that the network failed."""
_PIP_RETRIES = ("--retries", "2")
_NPM_RETRIES = ("--fetch-retries=1", "--fetch-retry-mintimeout=1000")
"""Retries of questions, for some seconds; the defaults of npm wait for more than a minute."""
_SIMPLE_API = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"


def locate_wheel(name: str, version: str) -> Location | None:
    """The location of a package's wheel; None if pip has to download it.

    Raises:
      DownloadError: there is no pip, or the network does not answer pip.
    """
    pip = _pip_command()
    settings = _pip_settings(pip)
    ca_file = settings.get("cert")
    indexes = settings.get("index-url", "").split() + settings.get("extra-index-url", "").split()
    if settings.get("no-index", "false").lower() in ("1", "true", "yes", "on"):
        indexes = []
    for index in indexes:
        url = _find_on_index(index, name, version, ca_file)
        if url is not None:
            return Location(url, ca_file)
    if "index-url" in settings and not settings.get("find-links"):
        return None
    return _location_from_report(pip, name, version, ca_file)


def pip_download(name: str, version: str, folder: Path) -> Path:
    """Downloads a package's file with pip into an empty folder, without its dependencies.

    Raises:
      DownloadError: pip failed.
    """
    command = [*_pip_command(), "download", "--no-deps", "--quiet", *_PIP_DOWNLOAD_RETRIES]
    result = _run([*command, "--dest", str(folder), f"{name}=={version}"], timeout=None)
    files = list(folder.iterdir())
    if result.returncode != 0 or len(files) != 1:
        _raise_if_unreachable(f"{name}=={version}", result)
        raise DownloadError(f"pip could not download {name}=={version}{_last_error(result)}")
    return files[0]


def locate_tarball(name: str, version: str) -> Location:
    """The location of a package's tarball in the user's npm registry.

    Raises:
      DownloadError: there is no npm, or its registry does not have the package.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise DownloadError(f"npm is needed to find {name}@{version}, and is not installed")
    wanted = f"{name}@{version}"
    result = _run([npm, "view", wanted, "dist.tarball", "--json", *_NPM_RETRIES], wanted=wanted)
    try:
        url = json.loads(result.stdout)
    except ValueError:
        url = None
    if result.returncode != 0 or not isinstance(url, str):
        _raise_if_unreachable(wanted, result)
        raise DownloadError(f"npm cannot find {wanted}{_last_error(result)}")
    ca_file = _run([npm, "config", "get", "cafile"]).stdout.strip()
    return Location(url, ca_file if ca_file and Path(ca_file).is_file() else None)


def _pip_command() -> list[str]:
    """The command for this Python's pip, or, in environments without pip (uv), the path's."""
    for python in (sys.executable, shutil.which("python3"), shutil.which("python")):
        command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        if python and _run([*command, "--version"]).returncode == 0:
            return command
    raise DownloadError(
        "pip is needed to find the demo models, and neither this Python nor the one on the path "
        "has it: try `python -m ensurepip`"
    )


def _pip_settings(pip: list[str]) -> Mapping[str, str]:
    """The settings that apply to `pip download`, from files and the environment."""
    settings: dict[tuple[int, str], str] = {}
    sections = {"global": 0, "download": 1, ":env:": 2}
    for line in _run([*pip, "config", "list"]).stdout.splitlines():
        key, mark, value = line.partition("=")
        section, _, option = key.partition(".")
        if mark and section in sections:
            settings[sections[section], option] = value.strip().strip("'\"").replace("\\n", " ")
    return {option: value for (_, option), value in sorted(settings.items())}


def _find_on_index(index: str, name: str, version: str, ca_file: str | None) -> str | None:
    """The URL of a wheel on an index; None if the index does not have it or does not answer."""
    page = f"{index.rstrip('/')}/{name}/"
    if page.startswith("file:"):
        page += "index.html"
    try:
        response = open_url(Location(page, ca_file), headers={"Accept": _SIMPLE_API})
        with response:
            content = response.read().decode()
            base = _with_credentials(response.geturl(), page)
    except (OSError, HTTPException, ValueError, DownloadError):
        return None
    prefix = f"{name}-{version}-".replace("-", "_").lower()
    for filename, link in _links(content):
        if filename.endswith(".whl") and filename.replace("-", "_").lower().startswith(prefix):
            return _with_credentials(urllib.parse.urljoin(base, link).partition("#")[0], page)
    return None


def _links(content: str) -> Iterator[tuple[str, str]]:
    """The file names and URLs on a page of the Simple Repository API, JSON or HTML."""
    if content.lstrip().startswith("{"):
        for file in json.loads(content).get("files", ()):
            yield file["filename"], file["url"]
        return
    parser = _LinkParser()
    parser.feed(content)
    for link in parser.links:
        path = urllib.parse.urlsplit(link).path
        yield urllib.parse.unquote(path.rpartition("/")[2]), link


class _LinkParser(HTMLParser):
    """Collects the targets of links."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for key, value in attrs if key == "href" and value]


def _with_credentials(url: str, source: str) -> str:
    """The URL with the user name and password of `source`, if both have the same host."""
    parts, source_parts = urllib.parse.urlsplit(url), urllib.parse.urlsplit(source)
    host = source_parts.netloc.rpartition("@")[2]
    if parts.netloc == host:
        parts = parts._replace(netloc=source_parts.netloc)
    return parts.geturl()


def _location_from_report(
    pip: list[str], name: str, version: str, ca_file: str | None
) -> Location | None:
    """The location in the report of `pip install --dry-run`; None without a report."""
    command = [*pip, "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
    command += _PIP_RETRIES
    wanted = f"{name}=={version}"
    result = _run([*command, "--report", "-", wanted], wanted=wanted)
    try:
        (package,) = json.loads(result.stdout)["install"]
        return Location(package["download_info"]["url"], ca_file)
    except (ValueError, KeyError, TypeError):
        _raise_if_unreachable(wanted, result)
        return None


def _raise_if_unreachable(wanted: str, result: subprocess.CompletedProcess[str]) -> None:
    reason = network.failure_in(result.stdout + result.stderr)
    if reason is not None:
        raise NetworkDown(wanted, reason)


def _run(
    command: list[str], *, timeout: float | None = _TIMEOUT_S, wanted: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs pip or npm.

    Args:
      command: with its arguments.
      timeout: in seconds.
      wanted: what the command asks the network for; None if it does not use the network.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        reason = f"{Path(command[0]).name} had no answer within {timeout:.0f} s"
        if wanted is not None:
            raise NetworkDown(wanted, reason) from error
        raise DownloadError(reason) from error
    except OSError as error:
        raise DownloadError(f"{command[0]} cannot be run: {error}") from error


def _last_error(result: subprocess.CompletedProcess[str]) -> str:
    lines = result.stderr.strip().splitlines()
    return f": {lines[-1]}" if lines else ""
