"""The expected load of a model, as the fleet file, planner and scheduler use it."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEAN_PROMPT_TOKENS = 161.0
MEAN_OUTPUT_TOKENS = 338.0
"""Mean tokens of the first turns of ShareGPT conversations (Kwon et al., SOSP 2023, figure 11)."""


@dataclass(frozen=True, slots=True)
class ExpectedLoad:
    """Expected request rate and mean lengths of one model.

    Attributes:
      rate: requests per second.
      prompt_tokens: mean tokens of a prompt.
      output_tokens: mean tokens of an output.

    Raises:
      ValueError: a value that is negative, NaN or infinite.
    """

    rate: float = 1.0
    prompt_tokens: float = MEAN_PROMPT_TOKENS
    output_tokens: float = MEAN_OUTPUT_TOKENS

    def __post_init__(self) -> None:
        for name, unit in (
            ("rate", "requests per second"),
            ("prompt_tokens", "tokens"),
            ("output_tokens", "tokens"),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"{name} must be a finite number of {unit}, 0 or more, not {value}"
                )

    @property
    def request_tokens(self) -> float:
        """Mean tokens of a request, prompt and output."""
        return self.prompt_tokens + self.output_tokens

    @property
    def decode_context(self) -> float:
        """Mean tokens that a sequence holds in the KV cache while it decodes."""
        return self.prompt_tokens + self.output_tokens / 2
