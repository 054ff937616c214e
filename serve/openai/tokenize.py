"""`/tokenize` and `/detokenize`, in vLLM's shapes: what a model makes of a text, and back."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import JSONResponse, Response

from muxjax.serve.errors import ApiError
from muxjax.serve.fleet_protocol import FleetLike, ModelLike, TokenizerLike
from muxjax.serve.openai.chat import conversation_ids
from muxjax.serve.find_model import find_model
from muxjax.serve.openai.requests import TokenizeRequest, parse_detokenize, parse_tokenize


async def tokenize(fleet: FleetLike, data: dict[str, Any]) -> Response:
    """The token ids of a text or of a conversation.

    Raises:
      ApiError, InvalidRequest: there are none.
    """
    asked = parse_tokenize(data)
    model = find_model(fleet, asked.model)
    tokenizer = _tokenizer(model)
    tokens = await asyncio.to_thread(_tokens, model, tokenizer, asked)
    texts = [tokenizer.token_text(token) for token in tokens] if asked.return_token_strs else None
    return JSONResponse(
        {
            "count": len(tokens),
            "max_model_len": model.max_model_len,
            "tokens": tokens,
            "token_strs": texts,
        }
    )


async def detokenize(fleet: FleetLike, data: dict[str, Any]) -> Response:
    """The text of some tokens, special ones by their names.

    Raises:
      ApiError: a token that the model does not have.
    """
    asked = parse_detokenize(data)
    tokenizer = _tokenizer(find_model(fleet, asked.model))
    for token in asked.tokens:
        if not 0 <= token < tokenizer.vocab_size:
            raise ApiError(
                f"{token} is not a token id of {asked.model}: they are 0 to "
                f"{tokenizer.vocab_size - 1}",
                param="tokens",
            )
    text = b"".join(tokenizer.token_bytes(token) for token in asked.tokens)
    return JSONResponse({"prompt": text.decode("utf-8", "replace")})


def _tokenizer(model: ModelLike) -> TokenizerLike:
    if model.tokenizer is None:
        raise ApiError(f"{model.name} has no tokenizer", param="model")
    return model.tokenizer


def _tokens(model: ModelLike, tokenizer: TokenizerLike, asked: TokenizeRequest) -> list[int]:
    if asked.messages is None:
        return tokenizer.encode(asked.prompt or "", asked.add_special_tokens is not False)
    more = asked.add_generation_prompt is not False
    special = bool(asked.add_special_tokens)
    return conversation_ids(
        model, asked.messages, list(asked.tools or ()), more=more, special=special
    )
