"""Groups of options become options of a command, and help lists them by panel."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer

from muxjax.cli import main as cli
from muxjax.cli.options import (
    ArrivalOptions,
    SloOptions,
    expand_option_groups,
    parse_choices,
    parse_model_map,
    parse_numbers,
    register_command,
)
from muxjax.errors import BenchError, WorkloadError


@dataclass(frozen=True)
class Fruit:
    """An option group."""

    apples: Annotated[int, typer.Option(help="A number.", rich_help_panel="Fruit")] = 1
    sort_by: Annotated[str | None, typer.Option(help="A key.", rich_help_panel="Fruit")] = None


def test_option_groups_become_options_and_are_rebuilt(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer(rich_markup_mode=None)

    def buy(fruit: Fruit, fast: Annotated[bool, typer.Option("--fast")] = False) -> None:
        print(fruit, fast)

    register_command(app, buy)
    app(["--apples", "3", "--sort-by", "size", "--fast"], standalone_mode=False)
    assert capsys.readouterr().out == "Fruit(apples=3, sort_by='size') True\n".replace(
        "Fruit(", repr(Fruit()).partition("(")[0] + "("
    )
    expand_option_groups(buy)(fruit_apples=2, fruit_sort_by=None, fast=False)
    assert "apples=2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "headings"),
    [
        ((), ("Serve:", "Models and files:", "Plan and measure:")),
        (("serve",), ("Arguments:", "Access:", "Units and hosts:", "Logs and traces:")),
        (("simulate",), ("Placement:", "Workload:", "Latency targets:", "Output:")),
        (("bench", "http"), ("Server and models:", "Data set:", "Load:", "Sampling:", "Metrics:")),
    ],
)
def test_help_is_grouped_and_fits_80_columns(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    headings: tuple[str, ...],
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["muxjax", *command, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert set(headings) <= set(lines)
    assert max(map(len, lines)) <= 80


def test_values_are_parsed() -> None:
    assert parse_numbers("1,2.5", "--x") == (1.0, 2.5)
    assert parse_numbers(None, "--x") is None
    assert parse_model_map(["a=b"]) == {"a": "b"}
    assert parse_choices("b,a", "--x", ("a", "b")) == ("b", "a")
    assert ArrivalOptions(on_off="1,2").parsed_on_off() == (1.0, 2.0)
    assert SloOptions().is_default
    assert not SloOptions(ttft=1.0).is_default
    for text in ("c", "a,a", ""):
        with pytest.raises(BenchError, match="--x"):
            parse_choices(text, "--x", ("a", "b"))
    with pytest.raises(WorkloadError, match="TRACE=MODEL"):
        parse_model_map(["a"])
    with pytest.raises(WorkloadError, match="two numbers"):
        ArrivalOptions(on_off="1").parsed_on_off()
