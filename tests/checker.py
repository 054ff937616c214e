"""The run-time type checker that tests/conftest.py applies to every function of `muxjax`."""

from collections.abc import Callable
from typing import TypeVar

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float (PEP 484)
F = TypeVar("F", bound=Callable[..., object])


def checked[F: Callable[..., object]](function: F) -> F:
    """Applies `beartype`, with two exceptions.

    It supports methods that return `Self` only if a class is decorated, not a method. In the
    generated `__init__` of a dataclass, JAX passes pytree leaves that are not arrays.
    """
    if function.__name__ == "__init__" and function.__code__.co_filename == "<string>":
        return function
    try:
        return _check(function)
    except BeartypeDecorHintPep673Exception:
        return function
