"""The run-time type checker that tests/conftest.py puts on every function of `muxjax`."""

from collections.abc import Callable
from typing import TypeVar

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float (PEP 484)
F = TypeVar("F", bound=Callable[..., object])


def checked[F: Callable[..., object]](function: F) -> F:
    """`beartype`, with two exceptions.

    Methods that return `Self`: it checks those only on whole classes. And the `__init__` that a
    dataclass gets: JAX rebuilds pytrees with leaves of its own that are no arrays.
    """
    if function.__name__ == "__init__" and function.__code__.co_filename == "<string>":
        return function
    try:
        return _check(function)
    except BeartypeDecorHintPep673Exception:
        return function
