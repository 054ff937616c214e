"""API keys: authentication of callers, their rights and their limits.

A key is a secret that a client sends as `Authorization: Bearer SECRET`. The server stores only its
SHA-256 digest. That is sufficient for random secrets: `new_secret` has 256 bits, which cannot be
guessed, so a slow password hash would add nothing. A received secret is hashed and compared with
every digest in constant time. The response time therefore reveals neither how much of a secret is
correct nor which keys exist.

The key file is YAML (docs/guides/serving.md):

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
"""Environment variable with secrets, separated by commas; their keys have all rights."""
_MIN_SECRET_LENGTH = 16
"""Minimum number of characters of a secret in the environment."""

Count = Annotated[int, Field(ge=1)]
KeyName = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[\w.@-]+$")]
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]


class Key(BaseModel):
    """An API key without its secret: name, rights and limits of its holder."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: KeyName = Field(description="Name of the holder in logs.")
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] = Field(
        description="The secret's SHA-256 digest, in lower-case hexadecimal."
    )
    models: Annotated[Names, Field(min_length=1)] | None = Field(
        default=None, description="Models that the holder may list and use; by default all."
    )
    requests_per_minute: Count | None = Field(
        default=None, description="Maximum number of calls in any minute."
    )
    tokens_per_minute: Count | None = Field(
        default=None,
        description="Maximum number of prompt and output tokens together in any minute.",
    )
    concurrency: Count | None = Field(
        default=None, description="Maximum number of concurrent calls."
    )
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = Field(
        default=0, description="Default and maximum priority of the key's requests."
    )
    cache_group: KeyName | None = Field(
        default=None,
        description="Keys of one group share prefix cache entries; by default nothing is shared.",
    )
    rights: Annotated[tuple[Right, ...], Field(strict=False, min_length=1)] = Field(
        default=("generate",), description="Groups of endpoints that the holder may call."
    )

    def permits(self, model: str) -> bool:
        """Whether the holder may list and use a model."""
        return self.models is None or model in self.models


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    keys: Annotated[tuple[Key, ...], Field(min_length=1, strict=False)]


class Keys:
    """The API keys of a server; empty if it requires none."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = list(keys)
        self._by_number = [None, *self._keys]  # 0: no key
        self._digests = [bytes.fromhex(key.sha256) for key in self._keys]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def find(self, secret: str) -> Key | None:
        """Returns the key of a secret, or None, after comparing it with all keys."""
        presented = digest_of(secret)
        match = 0
        for number, digest in enumerate(self._digests, start=1):
            # Arithmetic instead of a branch, so that a match takes no extra time.
            match += number * hmac.compare_digest(digest, presented)
        return self._by_number[match]


def digest_of(secret: str) -> bytes:
    """Returns the SHA-256 digest of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def new_secret() -> str:
    """Generates a random secret of 256 bits."""
    return f"mux-{secrets.token_urlsafe(32)}"


def new_entry(name: str) -> tuple[str, str]:
    """Generates a secret and its entry for the key file.

    Raises:
      KeyFileError: the name is not valid.
    """
    secret = new_secret()
    try:
        key = Key(name=name, sha256=digest_of(secret).hex())
    except ValidationError as error:
        raise KeyFileError(
            f"{name!r} is not a valid key name: use 1 to 64 letters, digits and ._@-"
        ) from error
    return secret, f"  - name: {key.name}\n    sha256: {key.sha256}"


def load_keys(
    path: Path | None, models: Iterable[str], environment: Mapping[str, str] = os.environ
) -> Keys:
    """Loads the keys of a key file and of the environment variable `MUXJAX_API_KEY`.

    Args:
      path: the key file; None for no file.
      models: names of the models in the fleet.
      environment: environment variables by name.

    Raises:
      KeyFileError: the file is not valid, a secret is too short, or a name or secret is not unique.
    """
    keys = [*_load_environment(environment.get(ENVIRONMENT, ""))]
    if path is not None:
        keys += _load_file(path)
    model_names = list(models)
    errors = []
    names: set[str] = set()
    digests: dict[str, str] = {}
    for key in keys:
        where = f"{path}: key {key.name}" if path else f"key {key.name}"
        if key.name in names:
            errors.append(f"{where}: duplicate name")
        elif key.sha256 in digests:
            errors.append(f"{where}: same secret as key {digests[key.sha256]}")
        names.add(key.name)
        digests[key.sha256] = key.name
        errors += [
            f"{where}: models: no model {model!r} in the fleet; it has {', '.join(model_names)}"
            for model in key.models or ()
            if model not in model_names
        ]
    if errors:
        raise KeyFileError("\n".join(errors))
    return Keys(keys)


def _load_environment(value: str) -> list[Key]:
    values = [secret.strip() for secret in value.split(",") if secret.strip()]
    for secret in values:
        if len(secret) < _MIN_SECRET_LENGTH:
            raise KeyFileError(
                f"{ENVIRONMENT}: a secret of {len(secret)} characters can be guessed; it needs at "
                f"least {_MIN_SECRET_LENGTH} (`muxjax key NAME` generates one)"
            )
    return [
        Key(name=f"environment-{index}", sha256=digest_of(secret).hex(), rights=ALL_RIGHTS)
        for index, secret in enumerate(values, start=1)
    ]


def _load_file(path: Path) -> tuple[Key, ...]:
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
        raise KeyFileError(f"{path}: a key file must be a mapping with `keys:`")
    try:
        return _KeyFile.model_validate(data).keys
    except ValidationError as error:
        errors = []
        for detail in error.errors(include_url=False, include_input=False):
            field = "".join(
                f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"]
            ).removeprefix(".")
            line = f":{lines[field]}" if field in lines else ""
            # Without the value, which may be a secret in the wrong place.
            errors.append(f"{path}{line}: {field}: {detail['msg']}")
        raise KeyFileError("\n".join(errors)) from error
