"""API keys: the key file, the environment, and lookups in constant time."""

from __future__ import annotations

import hmac
from pathlib import Path

import pytest

from muxjax.errors import KeyFileError
from muxjax.serve.access.keys import ALL_RIGHTS, Key, Keys, digest_of, load_keys, new_secret

MODELS = ("chat", "base")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def key(name: str, secret: str, **fields: object) -> Key:
    return Key.model_validate({"name": name, "sha256": digest_of(secret).hex(), **fields})


def test_a_secret_identifies_its_key() -> None:
    secrets = [new_secret() for _ in range(3)]
    assert len(set(secrets)) == 3
    keys = Keys(key(f"k{index}", secret) for index, secret in enumerate(secrets))
    for index, secret in enumerate(secrets):
        match = keys.find(secret)
        assert match is not None
        assert match.name == f"k{index}"
    for wrong in ("", "mux-", secrets[0][:-1], secrets[0] + "x", "\ud800"):
        assert keys.find(wrong) is None


def test_every_lookup_compares_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of comparisons and of compared bytes does not depend on the secret."""
    compared: list[tuple[int, int]] = []
    compare_digest = hmac.compare_digest

    def count(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return compare_digest(left, right)

    keys = Keys([key("a", "first secret here"), key("b", "second secret here")])
    monkeypatch.setattr(hmac, "compare_digest", count)
    for secret in ("first secret here", "second secret here", "f", "x" * 10_000):
        compared.clear()
        keys.find(secret)
        assert compared == [(32, 32)] * 2


def test_keys_are_loaded_from_a_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f"""
keys:
  - name: alice
    sha256: {digest_of("a secret of Alice").hex()}
    models: [chat]
    requests_per_minute: 60
    tokens_per_minute: 1000
    concurrency: 2
  - name: watcher
    sha256: {digest_of("a secret of the watcher").hex()}
    rights: [metrics]
""",
    )
    keys = load_keys(path, MODELS, {})
    assert len(keys) == 2
    alice = keys.find("a secret of Alice")
    assert alice is not None
    assert (alice.models, alice.concurrency) == (("chat",), 2)
    assert alice.rights == ("generate",)
    assert alice.permits("chat")
    assert not alice.permits("base")


def test_keys_are_loaded_from_the_environment(tmp_path: Path) -> None:
    keys = load_keys(None, MODELS, {"MUXJAX_API_KEY": "sixteen letters!, another long secret"})
    assert [key.name for key in keys] == ["environment-1", "environment-2"]
    match = keys.find("another long secret")
    assert match is not None
    assert match.rights == ALL_RIGHTS
    assert len(load_keys(None, MODELS, {})) == 0
    with pytest.raises(KeyFileError, match="a secret of 5 characters can be guessed"):
        load_keys(None, MODELS, {"MUXJAX_API_KEY": "short"})


DIGEST = digest_of("x").hex()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a key file must be a mapping"),
        ("- a", "a key file must be a mapping"),
        ("keys: []", "keys: Tuple should have at least 1 item"),
        ("keys: [{name: a}]", r"keys\[0\].sha256: Field required"),
        (f"keys:\n- {{name: a, sha256: {DIGEST}, modles: [chat]}}", r":2: keys\[0\].modles: Extra"),
        (f"keys: [{{name: a, sha256: {DIGEST}, models: [gone]}}]", "no model 'gone' in the fleet"),
        (f"keys: [{{name: a, sha256: {DIGEST}, models: []}}]", "at least 1 item"),
        (f"keys: [{{name: a, sha256: {DIGEST}, concurrency: 0}}]", "greater than or equal to 1"),
        (f"keys: [{{name: a, sha256: {DIGEST}, rights: [root]}}]", "Input should be 'generate'"),
        (
            f"keys: [{{name: a, sha256: {DIGEST}}}, {{name: b, sha256: {DIGEST}}}]",
            "same secret as key a",
        ),
        (f"keys: [{{name: a, sha256: {DIGEST}}}, {{name: a, sha256: {DIGEST}}}]", "duplicate name"),
        ("keys: [", "not valid YAML"),
    ],
)
def test_an_invalid_key_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(KeyFileError, match=message) as caught:
        load_keys(path, MODELS, {})
    assert str(path) in str(caught.value)


def test_errors_do_not_show_secrets(tmp_path: Path) -> None:
    path = write(tmp_path, "keys: [{name: a, sha256: my-own-secret-in-plain}]")
    with pytest.raises(KeyFileError) as caught:
        load_keys(path, MODELS, {})
    assert "my-own-secret" not in str(caught.value)


def test_a_missing_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        load_keys(tmp_path / "none.yaml", MODELS, {})
