"""`/tokenize` and `/detokenize`, with the request and response fields of vLLM."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import JSONResponse, Response

from muxjax.models.tokenizers.tokenizer import Tokenizer
from muxjax.serve.errors import ApiError
from muxjax.serve.find_model import find_model
from muxjax.serve.fleet_protocol import FleetLike, ModelLike
from muxjax.serve.openai.chat import encode_conversation
from muxjax.serve.openai.requests import TokenizeRequest, parse_detokenize, parse_tokenize


async def tokenize(fleet: FleetLike, data: dict[str, Any]) -> Response:
    """Returns the token ids of a text or of a conversation.

    Raises:
      ApiError, InvalidRequest: the text cannot be tokenized.
    """
    body = parse_tokenize(data)
    model = find_model(fleet, body.model)
    tokenizer = _require_tokenizer(model)
    tokens = await asyncio.to_thread(_encode, model, tokenizer, body)
    texts = [tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
    return JSONResponse(
        {
            "count": len(tokens),
            "max_model_len": model.max_model_len,
            "tokens": tokens,
            "token_strs": texts,
        }
    )


async def detokenize(fleet: FleetLike, data: dict[str, Any]) -> Response:
    """Returns the text of token ids, with special tokens by name.

    Raises:
      ApiError: a token id is not in the vocabulary.
    """
    body = parse_detokenize(data)
    tokenizer = _require_tokenizer(find_model(fleet, body.model))
    for token in body.tokens:
        if not 0 <= token < tokenizer.vocab_size:
            raise ApiError(
                f"{token} is not a token id of {body.model}: valid ids are 0 to "
                f"{tokenizer.vocab_size - 1}",
                param="tokens",
            )
    text = b"".join(tokenizer.token_bytes(token) for token in body.tokens)
    return JSONResponse({"prompt": text.decode("utf-8", "replace")})


def _require_tokenizer(model: ModelLike) -> Tokenizer:
    if model.tokenizer is None:
        raise ApiError(f"{model.name} has no tokenizer", param="model")
    return model.tokenizer


def _encode(model: ModelLike, tokenizer: Tokenizer, body: TokenizeRequest) -> list[int]:
    if body.messages is None:
        return tokenizer.encode(body.prompt or "", body.add_special_tokens is not False)
    return encode_conversation(
        model,
        body.messages,
        list(body.tools or ()),
        add_generation_prompt=body.add_generation_prompt is not False,
        add_special=bool(body.add_special_tokens),
    )
