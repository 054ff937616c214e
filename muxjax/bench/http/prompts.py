"""Generates prompts of a given number of tokens, with or without the server's tokenizer.

Tokens are counted by the first of these that is available:

1. `--tokenizer`: a tokenizer.json, or a folder that contains one;
2. the server's `/tokenize` endpoint (vLLM and MuxJAX have it);
3. for completions, no counting is needed: prompts are token ids from `SAFE_IDS`, which are valid in
   every common vocabulary;
4. for chats, which are text, each word counts as one token. The report marks the lengths as
   approximate.

With 1 and 2, completions are also sent as token ids, sliced from tokenized words, so that the
length is exact. Chats are sent as text, adjusted word by word to the requested length; the tokens
of the chat template are additional, as in vLLM's benchmark. The reported length is the server's
count if it sends one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx2

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
    """.split()  # noqa: SIM905  a list would have one line per word
)
_FILLERS = (" a", " I", ".", " the", " and", ",", "!")

Count = Callable[[str], list[int]]
"""Encodes a text into token ids, without special tokens."""


@dataclass
class PromptGenerator:
    """Generates prompts of requested lengths for one model.

    Attributes:
      counted_by: how tokens are counted: 'tokenizer', 'server', 'token ids' or 'words'.
      encode: encodes a text into token ids; None without a tokenizer.
      as_text: whether prompts are text.
      rng: source of randomness.
    """

    counted_by: str
    encode: Count | None
    as_text: bool
    rng: random.Random

    def __post_init__(self) -> None:
        self._tokens: list[int] = []

    def generate(self, tokens: int) -> str | tuple[int, ...]:
        """A random prompt of `tokens` tokens."""
        if self.as_text:
            return self._text(tokens)
        if self.encode is None:
            return tuple(self.rng.choices(SAFE_IDS, k=tokens))
        while len(self._tokens) < tokens:
            self._tokens += self.encode(self._words(4 * tokens + 100))
        start = self.rng.randrange(len(self._tokens) - tokens + 1)
        self.rng.shuffle(self._tokens)
        return tuple(self._tokens[start : start + tokens])

    def count(self, text: str) -> int:
        """Number of tokens of a text; without a tokenizer, its number of words."""
        return len(text.split()) if self.encode is None else len(self.encode(text))

    def _words(self, count: int) -> str:
        return " ".join(self.rng.choices(_WORDS, k=count))

    def _text(self, tokens: int) -> str:
        if self.encode is None:
            return self._words(tokens)
        words = self.rng.choices(_WORDS, k=tokens)
        low, high = 0, len(words)  # bounds of the number of words
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
    client: httpx2.Client,
    server: Server,
    model: str,
    *,
    seed: int,
    tokenizer: Path | None = None,
) -> PromptGenerator:
    """Builds the generator for one model with the best available token counter.

    Args:
      client: must stay open while prompts are generated.
      server: the server that the prompts are for.
      model: the model's name at the server.
      seed: seed of the prompts.
      tokenizer: a tokenizer.json, or a folder that contains one.

    Raises:
      BenchError: the tokenizer cannot be read.
    """
    as_text = server.backend == "openai-chat"
    rng = random.Random(f"{seed} {model}")
    if tokenizer is not None:
        return PromptGenerator("tokenizer", _load_tokenizer(tokenizer), as_text, rng)
    encode = _server_tokenizer(client, server, model)
    if encode is not None:
        return PromptGenerator("server", encode, as_text, rng)
    return PromptGenerator("words" if as_text else "token ids", None, as_text, rng)


def _load_tokenizer(path: Path) -> Count:
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise BenchError(f"--tokenizer {path}: no tokenizer.json found")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise BenchError(f"--tokenizer {file}: {error}") from error
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _server_tokenizer(client: httpx2.Client, server: Server, model: str) -> Count | None:
    """An encoder that uses the server's `/tokenize` endpoint; None if the endpoint fails."""

    def encode(text: str) -> list[int]:
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        response = client.post(f"{server.base}/tokenize", json=body, headers=dict(server.headers))
        response.raise_for_status()
        return [int(token) for token in response.json()["tokens"]]

    try:
        ids = encode("a short text")
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        return None
    return encode if ids else None
