"""Rate limits of one API key: requests and tokens per minute, and concurrent calls.

Windows slide: an admitted request counts for 60 seconds, so no interval of 60 seconds exceeds the
limit. The tokens of the prompt and of the maximum output are reserved before generation, because a
later check could only find that the limit was exceeded. Unused tokens are refunded when the output
ends.
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
"""Length of a window in seconds."""


@dataclass(slots=True)
class Reservation:
    """Reserved units of a window.

    Attributes:
      time: time of the reservation in seconds, on the window's clock.
      units: number of reserved units, without refunded ones.
    """

    time: float
    units: int


class SlidingWindow:
    """Admits at most `limit` units in any `WINDOW` seconds.

    Args:
      limit: maximum number of units.
      clock: current time in seconds.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._reservations: deque[Reservation] = deque()
        self._total = 0

    def reserve(self, units: int = 1) -> Reservation | float:
        """Reserves units, or returns the seconds until they are available (`inf` for never)."""
        now = self._clock()
        while self._reservations and now - self._reservations[0].time >= WINDOW:
            self._total -= self._reservations.popleft().units
        if self._total + units <= self.limit:
            self._total += units
            self._reservations.append(Reservation(now, units))
            return self._reservations[-1]
        missing = self._total + units - self.limit
        for reservation in self._reservations:
            missing -= reservation.units
            if missing <= 0:
                return reservation.time + WINDOW - now
        return math.inf

    def refund(self, reservation: Reservation, units: int) -> None:
        """Refunds unused units of a reservation, unless it has expired."""
        units = min(units, reservation.units)
        if self._clock() - reservation.time < WINDOW:
            self._total -= units
            reservation.units -= units


class KeyLimits:
    """Usage of one key, checked against its limits.

    Attributes:
      running: number of calls in progress.
    """

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic) -> None:
        self.running = 0
        self._key = key
        self._requests = (
            None
            if key.requests_per_minute is None
            else SlidingWindow(key.requests_per_minute, clock)
        )
        self._tokens = (
            None if key.tokens_per_minute is None else SlidingWindow(key.tokens_per_minute, clock)
        )

    def enter(self) -> None:
        """Admits a call; `leave` must follow.

        Raises:
          ApiError: 429, the limit of concurrent calls or of requests per minute is reached.
        """
        concurrency = self._key.concurrency
        if concurrency is not None and self.running >= concurrency:
            raise rate_limited(f"this key is limited to {concurrency} concurrent calls", 1.0)
        if self._requests is not None:
            reserved = self._requests.reserve()
            if not isinstance(reserved, Reservation):
                raise rate_limited(
                    f"this key is limited to {self._requests.limit} requests per minute", reserved
                )
        self.running += 1

    def leave(self) -> None:
        """Ends an admitted call."""
        self.running -= 1

    def reserve(self, tokens: int) -> Reservation | None:
        """Reserves tokens for a prompt and its maximum output; returns None without a limit.

        Raises:
          ApiError: 429, too few tokens are left in this minute; 400, the limit is below `tokens`.
        """
        if self._tokens is None:
            return None
        reserved = self._tokens.reserve(tokens)
        if isinstance(reserved, Reservation):
            return reserved
        if math.isinf(reserved):
            raise ApiError(
                f"prompt and max_tokens add up to {tokens} tokens, but this key is limited to "
                f"{self._tokens.limit} tokens per minute; lower max_tokens",
                param="max_tokens",
                code="tokens_exceed_limit",
            )
        raise rate_limited(
            f"this key is limited to {self._tokens.limit} tokens per minute", reserved
        )

    def refund(self, reservation: Reservation | None, tokens: int) -> None:
        """Refunds reserved tokens that were not used."""
        if self._tokens is not None and reservation is not None:
            self._tokens.refund(reservation, tokens)


def rate_limited(message: str, seconds: float) -> ApiError:
    """Builds a 429 error with `Retry-After`; `seconds` is rounded up to whole seconds."""
    wait = max(1, math.ceil(seconds))
    return ApiError(
        f"{message}; retry in {wait} s",
        status=429,
        code="rate_limit_exceeded",
        headers={"retry-after": str(wait)},
    )
