"""Prompts of a wanted number of tokens for a server whose tokenizer may not be at hand.

Who counts tokens, by what is there, the first that is:

1. `--tokenizer`: a tokenizer.json, or a folder with one;
2. the server's own `/tokenize` (vLLM's, and ours);
3. nobody: completions are asked with token ids, of which the number is known. The ids are
   `SAFE_IDS`, which every usual vocabulary has;
4. nobody, and the server takes text only (chats): a word is taken for a token. The report says so.

With 1 and 2, completions are sent as token ids too, cut from tokenised words, so that they have
exactly the wanted number. Chats are sent as text whose count is brought to the wanted one word by
word; the chat template's own tokens come on top, as with vLLM's benchmark. Whatever was wanted, the
server's count is what is reported, where it gives one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from muxjax.bench.http.client import Server
from muxjax.errors import BenchError

SAFE_IDS = range(10, 250)
_WORDS = tuple(
    """
    time year people way day man thing woman life child world school state family student group
    country problem hand part place case week company system program question work number night
    point home water room mother area money story fact month lot right study book eye job word
    business issue side kind head house service friend father power hour game line end member
    law car city name team minute idea body back parent face level office door health person art
    war history party result change morning reason research girl guy moment air teacher force
    """.split()  # noqa: SIM905  a list of them would take a line each
)
_FILLERS = (" a", " I", ".", " the", " and", ",", "!")

Count = Callable[[str], list[int]]
"""Token ids of a text, without special ones."""


@dataclass
class PromptGenerator:
    """Makes prompts of wanted lengths.

    Attributes:
      how: who counts tokens, for the report: 'tokenizer', 'server', 'token ids' or 'words'.
      encode: token ids of a text; None where nobody counts.
      as_text: prompts are texts.
      rng: what is drawn from.
    """

    how: str
    encode: Count | None
    as_text: bool
    rng: random.Random

    def __post_init__(self) -> None:
        self._tokens: list[int] = []

    def make(self, tokens: int) -> str | tuple[int, ...]:
        """A prompt of so many tokens."""
        if self.as_text:
            return self._text(tokens)
        if self.encode is None:
            return tuple(self.rng.choices(SAFE_IDS, k=tokens))
        while len(self._tokens) < tokens:
            self._tokens += self.encode(self._words(4 * tokens + 100))
        start = self.rng.randrange(len(self._tokens) - tokens + 1)
        self.rng.shuffle(self._tokens)
        return tuple(self._tokens[start : start + tokens])

    def cut(self, text: str, tokens: int) -> str | tuple[int, ...]:
        """A given prompt, as the server takes it; `tokens` says how long it is."""
        if self.as_text or self.encode is None:
            return text
        return tuple(self.encode(text)[:tokens])

    def count(self, text: str) -> int:
        """Tokens of a text; of words, where nobody counts."""
        return len(text.split()) if self.encode is None else len(self.encode(text))

    def _words(self, count: int) -> str:
        return " ".join(self.rng.choices(_WORDS, k=count))

    def _text(self, tokens: int) -> str:
        if self.encode is None:
            return self._words(tokens)
        words = self.rng.choices(_WORDS, k=tokens)
        low, high = 0, len(words)  # words that are surely not too many, and surely are enough
        while low < high:
            middle = (low + high + 1) // 2
            if self.count(" ".join(words[:middle])) <= tokens:
                low = middle
            else:
                high = middle - 1
        text = " ".join(words[: max(1, low)])
        for filler in _FILLERS * 4:
            if self.count(text) >= tokens:
                break
            if self.count(text + filler) <= tokens:
                text += filler
        return text


def build_prompt_generator(
    client: httpx.Client,
    server: Server,
    model: str,
    *,
    seed: int,
    tokenizer: Path | None = None,
) -> PromptGenerator:
    """Finds out who counts tokens.

    Args:
      client: asks the server, as long as prompts are made.
      server: whom the prompts are for.
      model: the model's name there.
      seed: of what is drawn.
      tokenizer: a tokenizer.json, or a folder with one.

    Raises:
      BenchError: a tokenizer that cannot be read.
    """
    as_text = server.backend == "openai-chat"
    rng = random.Random(f"{seed} {model}")
    if tokenizer is not None:
        return PromptGenerator("tokenizer", _local(tokenizer), as_text, rng)
    encode = _remote(client, server, model)
    if encode is not None:
        return PromptGenerator("server", encode, as_text, rng)
    return PromptGenerator("words" if as_text else "token ids", None, as_text, rng)


def _local(path: Path) -> Count:
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise BenchError(f"--tokenizer {path}: no tokenizer.json there")
    try:
        found = Tokenizer.from_file(str(file))
    except Exception as error:
        raise BenchError(f"--tokenizer {file}: {error}") from error
    return lambda text: found.encode(text, add_special_tokens=False).ids


def _remote(client: httpx.Client, server: Server, model: str) -> Count | None:
    """The server's `/tokenize`, if it has one that works."""

    def encode(text: str) -> list[int]:
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        response = client.post(f"{server.base}/tokenize", json=body, headers=dict(server.headers))
        response.raise_for_status()
        return [int(token) for token in response.json()["tokens"]]

    try:
        ids = encode("a short text")
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    return encode if ids else None
