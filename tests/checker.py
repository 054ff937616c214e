"""The run-time type checker that tests/conftest.py puts on every function of `muxjax`."""

from collections.abc import Callable
from typing import TypeVar

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep673Exception

F = TypeVar("F", bound=Callable[..., object])


def checked(function: F) -> F:
    """`beartype`, but for methods that return `Self`: it checks those only on whole classes."""
    try:
        return beartype(function)
    except BeartypeDecorHintPep673Exception:
        return function
