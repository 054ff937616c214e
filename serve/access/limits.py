"""Limits of one key: requests and tokens in any minute, and calls at once. Exact at the edge.

A window slides: what was let in counts for sixty seconds from then, so no minute, wherever it
begins, holds more than the limit. Tokens are reserved before they are made (the prompt and the most
that may come), since a limit that is noticed afterwards has been passed; what was not made is given
back when the output ends.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from muxjax.serve.access.keys import Key
from muxjax.serve.errors import ApiError

WINDOW = 60.0
"""Seconds."""


@dataclass(slots=True)
class Reservation:
    """Units of a window; `units` shrinks when some are given back."""

    at: float
    units: int


class Window:
    """At most `limit` units in any `WINDOW` seconds."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._taken: deque[Reservation] = deque()
        self._total = 0

    def take(self, units: int = 1) -> Reservation | float:
        """Units of the window, or in how many seconds there will be as many; `inf` if never."""
        now = self._clock()
        while self._taken and now - self._taken[0].at >= WINDOW:
            self._total -= self._taken.popleft().units
        if self._total + units <= self.limit:
            self._total += units
            self._taken.append(Reservation(now, units))
            return self._taken[-1]
        missing = self._total + units - self.limit
        for reservation in self._taken:
            missing -= reservation.units
            if missing <= 0:
                return reservation.at + WINDOW - now
        return math.inf

    def give_back(self, reservation: Reservation, units: int) -> None:
        """Returns units that were not used, if they still count."""
        units = min(units, reservation.units)
        if self._clock() - reservation.at < WINDOW:
            self._total -= units
            reservation.units -= units


class KeyLimits:
    """What one key has used of its limits."""

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = key
        self.running = 0
        self._requests = (
            None if key.requests_per_minute is None else Window(key.requests_per_minute, clock)
        )
        self._tokens = (
            None if key.tokens_per_minute is None else Window(key.tokens_per_minute, clock)
        )

    def enter(self) -> None:
        """Lets a call in; `leave` must follow.

        Raises:
          ApiError: 429: as many calls run, or came in the last minute, as may.
        """
        most = self._key.concurrency
        if most is not None and self.running >= most:
            raise too_many(f"{most} calls of this key run already, as many as may at once", 1.0)
        if self._requests is not None:
            taken = self._requests.take()
            if not isinstance(taken, Reservation):
                raise too_many(f"{self._requests.limit} requests a minute are this key's", taken)
        self.running += 1

    def leave(self) -> None:
        """Ends a call that was let in."""
        self.running -= 1

    def reserve(self, tokens: int) -> Reservation | None:
        """Tokens of a prompt and of all that may follow; None where there is no limit.

        Raises:
          ApiError: 429: so many are not left of this minute; 400: so many never will be.
        """
        if self._tokens is None:
            return None
        taken = self._tokens.take(tokens)
        if isinstance(taken, Reservation):
            return taken
        if math.isinf(taken):
            raise ApiError(
                f"prompt and max_tokens come to {tokens} tokens, and this key has "
                f"{self._tokens.limit} a minute; lower max_tokens",
                param="max_tokens",
                code="tokens_exceed_limit",
            )
        raise too_many(f"{self._tokens.limit} tokens a minute are this key's", taken)

    def give_back(self, reservation: Reservation | None, tokens: int) -> None:
        """Returns reserved tokens that were not made."""
        if self._tokens is not None and reservation is not None:
            self._tokens.give_back(reservation, tokens)


def too_many(message: str, seconds: float) -> ApiError:
    """The answer 429, with the time to wait."""
    wait = max(1, math.ceil(seconds))
    return ApiError(
        f"{message}; try again in {wait} s",
        status=429,
        code="rate_limit_exceeded",
        headers={"retry-after": str(wait)},
    )
