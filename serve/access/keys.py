"""API keys: who may ask for what.

A key is a secret text that a client sends as `Authorization: Bearer SECRET`. The server keeps only
its SHA-256 digest, which is enough for secrets that are drawn at random (`new_secret` has 256 bits:
there is nothing to guess, so a slow hash would guard nothing). A secret that comes is hashed and
compared with every digest in constant time, whichever matches: how long it takes says nothing about
how much of it is right, nor about which keys there are.

The key file is YAML (docs/serving.md):

    keys:
      - name: alice
        sha256: 2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683
        models: [chat]
        requests_per_minute: 60
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from muxjax.config.yaml_lines import parse_yaml
from muxjax.errors import FleetConfigError, KeyFileError
from muxjax.sampling_params import MAX_PRIORITY

Right = Literal["generate", "metrics", "admin"]
ALL_RIGHTS: tuple[Right, ...] = ("generate", "metrics", "admin")
ENVIRONMENT = "MUXJAX_API_KEY"
"""Names the variable that may hold secrets, separated by commas; their keys have all rights."""
_SHORTEST = 16

Count = Annotated[int, Field(ge=1)]
KeyName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[\w.@-]+$")]
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]


class Key(BaseModel):
    """A key without its secret: what its holder may do."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: KeyName = Field(description="What logs call the holder.")
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(
        description="The secret's SHA-256 digest, in lower-case hexadecimal."
    )
    models: Annotated[Names, Field(min_length=1)] | None = Field(
        default=None, description="The models it may use and see; by default all."
    )
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = Field(
        default=None, description="Of prompts and outputs together."
    )
    concurrency: Count | None = Field(default=None, description="Calls that may run at once.")
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = Field(
        default=0, description="Of its requests, and the highest that they may ask for."
    )
    cache_group: KeyName | None = Field(
        default=None,
        description="Keys of one group share what the prefix cache has; by default each is alone.",
    )
    rights: Annotated[tuple[Right, ...], Field(strict=False, min_length=1)] = ("generate",)

    def sees(self, model: str) -> bool:
        """Whether the model exists as far as the holder is concerned."""
        return self.models is None or model in self.models


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    keys: Annotated[tuple[Key, ...], Field(min_length=1, strict=False)]


class Keys:
    """All keys of a server."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = list(keys)
        self._found = [None, *self._keys]
        self._digests = [bytes.fromhex(key.sha256) for key in self._keys]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def find(self, secret: str) -> Key | None:
        """The key of a secret, compared with all keys and in the same time for each."""
        presented = digest_of(secret)
        place = 0
        for number, digest in enumerate(self._digests, start=1):
            # Arithmetic, for a branch takes longer when it is taken.
            place += number * hmac.compare_digest(digest, presented)
        return self._found[place]


def digest_of(secret: str) -> bytes:
    """A secret's SHA-256 digest."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def new_secret() -> str:
    """A secret that nobody can guess."""
    return f"mux-{secrets.token_urlsafe(32)}"


def new_entry(name: str) -> tuple[str, str]:
    """A new secret, and the entry of the key file for it.

    Raises:
      KeyFileError: a name that the key file does not take.
    """
    secret = new_secret()
    try:
        key = Key(name=name, sha256=digest_of(secret).hex())
    except ValidationError as error:
        raise KeyFileError(
            f"{name!r} is no name for a key: 1 to 64 letters, digits and ._@- are"
        ) from error
    return secret, f"  - name: {key.name}\n    sha256: {key.sha256}"


def load_keys(
    path: Path | None, models: Iterable[str], environment: Mapping[str, str] = os.environ
) -> Keys:
    """The keys of a file and of the variable `MUXJAX_API_KEY`; none if there is neither.

    Args:
      path: the key file.
      models: the names that there are.
      environment: variables by name.

    Raises:
      KeyFileError: the file is not valid, a secret is too short, or one stands twice.
    """
    keys = [*_of_environment(environment.get(ENVIRONMENT, ""))]
    if path is not None:
        keys += _of_file(path)
    known = list(models)
    faults = []
    names: set[str] = set()
    digests: dict[str, str] = {}
    for key in keys:
        where = f"{path}: key {key.name}" if path else f"key {key.name}"
        if key.name in names:
            faults.append(f"{where}: the name stands twice")
        elif key.sha256 in digests:
            faults.append(f"{where}: has the secret of {digests[key.sha256]}")
        names.add(key.name)
        digests[key.sha256] = key.name
        faults += [
            f"{where}: models: no model {model!r} in the fleet; there are {', '.join(known)}"
            for model in key.models or ()
            if model not in known
        ]
    if faults:
        raise KeyFileError("\n".join(faults))
    return Keys(keys)


def _of_environment(value: str) -> list[Key]:
    secrets_given = [secret.strip() for secret in value.split(",") if secret.strip()]
    for secret in secrets_given:
        if len(secret) < _SHORTEST:
            raise KeyFileError(
                f"{ENVIRONMENT}: a key of {len(secret)} characters can be guessed; at least "
                f"{_SHORTEST} are needed (`muxjax key NAME` makes one)"
            )
    return [
        Key(name=f"environment-{index}", sha256=digest_of(secret).hex(), rights=ALL_RIGHTS)
        for index, secret in enumerate(secrets_given, start=1)
    ]


def _of_file(path: Path) -> tuple[Key, ...]:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        data, lines = parse_yaml(text, str(path))
    except UnicodeDecodeError as error:
        raise KeyFileError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror or error}") from error
    except FleetConfigError as error:
        raise KeyFileError(str(error)) from error
    if not isinstance(data, dict):
        raise KeyFileError(f"{path}: a key file is a mapping with `keys:`")
    try:
        return _KeyFile.model_validate(data).keys
    except ValidationError as error:
        faults = []
        for details in error.errors(include_url=False, include_input=False):
            place = "".join(
                f"[{part}]" if isinstance(part, int) else f".{part}" for part in details["loc"]
            ).removeprefix(".")
            line = f":{lines[place]}" if place in lines else ""
            # The value is not shown: it may be a secret in the wrong place.
            faults.append(f"{path}{line}: {place}: {details['msg']}")
        raise KeyFileError("\n".join(faults)) from error
