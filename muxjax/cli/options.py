"""Options that several commands share, and commands whose parameters are groups of options.

A group of options is a frozen dataclass whose fields are annotated with `typer.Option`. A command
takes groups as parameters; `register_command` presents each field to Typer as a separate option
and builds the dataclasses before the command runs. The help of a command lists its parameters in
order of declaration, under the heading of their `rich_help_panel`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from muxjax.errors import BenchError, WorkloadError

WORKLOAD_PANEL = "Workload"
SLO_PANEL = "Latency targets"
OUTPUT_PANEL = "Output"
ARGUMENTS, OPTIONS, HELP = "Arguments", "Options", "Help"
# `<list[str]>` and `<int range>` of Typer.
_METAVAR = re.compile(r"<(?:list\[)?(\w+)(?:\]| range)>")

FleetFile = Annotated[Path, typer.Argument(metavar="FLEET", help="The fleet file (YAML).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT_PANEL)]
Trace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write a Chrome trace (JSON) of the latest 100,000 executed steps.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
OutputFolder = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Write results, request records and plots to this folder.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
ModelMap = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="TRACE=MODEL",
        help="Serve a model of the trace with this model. May be repeated.",
        rich_help_panel=WORKLOAD_PANEL,
    ),
]


@dataclass(frozen=True)
class ArrivalOptions:
    """The requests of a workload and their arrivals, for `simulate` and `bench serve`."""

    workload: Annotated[
        str,
        typer.Option(
            metavar="KIND|FILE",
            help="Arrivals: poisson, gamma, bursts or drift, or a trace file: .jsonl (Mooncake), "
            ".csv (Azure, BurstGPT) or .json (MuxServe).",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = "poisson"
    requests: Annotated[
        int | None,
        typer.Option(help="Maximum number of requests.", rich_help_panel=WORKLOAD_PANEL),
    ] = None
    rate: Annotated[
        float | None,
        typer.Option(
            help="Total requests per second. By default the sum of the models' rates.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Distribute the total rate over the models, in order of their rates, by a power "
            "law with this exponent.",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None
    cv: Annotated[
        float | None,
        typer.Option(
            help="Coefficient of variation of the gaps between requests, for gamma. [default: 4]",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None
    on_off: Annotated[
        str | None,
        typer.Option(
            metavar="ON,OFF",
            help="Mean seconds with and without requests, for bursts. [default: 10,30]",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None
    change_points: Annotated[
        str | None,
        typer.Option(
            metavar="T1,T2,...",
            help="Times in seconds at which the models swap rates, for drift. "
            "[default: each quarter]",
            rich_help_panel=WORKLOAD_PANEL,
        ),
    ] = None

    def parsed_on_off(self) -> tuple[float, float] | None:
        """Parses the two numbers of `--on-off`.

        Raises:
          WorkloadError: it is not two numbers.
        """
        numbers = parse_numbers(self.on_off, "--on-off")
        if numbers is None:
            return None
        if len(numbers) != 2:
            raise WorkloadError(f"--on-off takes two numbers, not {self.on_off}")
        return numbers[0], numbers[1]


@dataclass(frozen=True)
class SloOptions:
    """Latency targets, for `simulate` and `bench serve`."""

    scale: Annotated[
        float | None,
        typer.Option(
            "--slo-scale",
            help="Allowed latency, as a multiple of the request's isolated latency. "
            "[default: 8, if no other target is given]",
            rich_help_panel=SLO_PANEL,
        ),
    ] = None
    ttft: Annotated[
        float | None,
        typer.Option(
            "--slo-ttft", help="Time to first token, in seconds.", rich_help_panel=SLO_PANEL
        ),
    ] = None
    tpot: Annotated[
        float | None,
        typer.Option(
            "--slo-tpot",
            help="Time per output token after the first, in seconds.",
            rich_help_panel=SLO_PANEL,
        ),
    ] = None

    @property
    def is_default(self) -> bool:
        """Whether no target is given."""
        return self.scale is None and self.ttft is None and self.tpot is None


def parse_numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """Parses comma-separated numbers.

    Raises:
      WorkloadError: a part is not a number.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise WorkloadError(f"{option} takes comma-separated numbers, not {text!r}") from error


def parse_model_map(pairs: Sequence[str] | None) -> dict[str, str]:
    """Parses the values of `--map`.

    Raises:
      WorkloadError: a value is not TRACE=MODEL.
    """
    model_map: dict[str, str] = {}
    for pair in pairs or ():
        source, _, target = pair.partition("=")
        if not (source and target):
            raise WorkloadError(f"--map takes TRACE=MODEL, not {pair!r}")
        model_map[source] = target
    return model_map


def parse_choices(text: str, option: str, choices: Sequence[str]) -> tuple[str, ...]:
    """Parses comma-separated names from a set of choices.

    Raises:
      BenchError: an unknown or repeated name, or no name.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in choices:
            raise BenchError(f"{option}: no {name!r}; there are {', '.join(choices)}")
    if not names or len(set(names)) < len(names):
        raise BenchError(f"{option} must list at least one value, each once, not {text!r}")
    return names


class GroupedCommand(TyperCommand):
    """A command whose help lists options under the headings of their `rich_help_panel`.

    Headings are in order of use: arguments, options without a heading, the other headings in order
    of declaration, output, and `--help`. The help is plain text: importing rich would triple the
    time that `--help` takes.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {ARGUMENTS: [], OPTIONS: []}
        # Within a section, what must be given comes first.
        for parameter in sorted(self.get_params(ctx), key=lambda entry: not entry.required):
            record = parameter.get_help_record(ctx)
            if record is not None:
                names, text = record
                names = _METAVAR.sub(r"<\1>", names)
                sections.setdefault(_heading(parameter), []).append((names, text))
        for last in (OUTPUT_PANEL, HELP):
            sections[last] = sections.pop(last, [])
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def _heading(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return ARGUMENTS
    if "--help" in parameter.opts:
        return HELP
    return getattr(parameter, "rich_help_panel", None) or OPTIONS


class GroupedGroup(TyperGroup):
    """A group of commands listed in order of registration under their `rich_help_panel`."""

    def list_commands(self, ctx: Any) -> list[str]:
        del ctx
        return list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, Any]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is None or command.hidden:
                continue
            panel = getattr(command, "rich_help_panel", None)
            heading = panel if isinstance(panel, str) else "Commands"
            sections.setdefault(heading, []).append((name, command))
        width = max((len(name) for name in self.commands), default=0)
        for heading, commands in sections.items():
            with formatter.section(heading):
                formatter.write_dl(
                    [
                        (name.ljust(width), command.get_short_help_str(200))
                        for name, command in commands
                    ]
                )


def register_command(
    app: typer.Typer,
    function: Callable[..., None],
    *,
    name: str | None = None,
    panel: str | None = None,
    command_class: type[TyperCommand] = GroupedCommand,
) -> None:
    """Adds a command to an app; parameters that are option groups become their options."""
    app.command(name, cls=command_class, rich_help_panel=panel)(expand_option_groups(function))


def expand_option_groups(function: Callable[..., None]) -> Callable[..., None]:
    """Returns a function whose parameters are the fields of the option groups of `function`."""
    hints = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[type[Any], Sequence[str]]] = {}
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
            parameters.append(
                parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)
            )
            continue
        field_hints = get_type_hints(hint, include_extras=True)
        names = [field.name for field in dataclasses.fields(hint)]
        groups[parameter.name] = hint, names
        parameters += [
            inspect.Parameter(
                f"{parameter.name}_{field.name}",
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=_named_option(field_hints[field.name], field.name),
            )
            for field in dataclasses.fields(hint)
        ]

    def command(**values: Any) -> None:
        arguments: dict[str, Any] = {}
        for group, (cls, names) in groups.items():
            arguments[group] = cls(**{name: values.pop(f"{group}_{name}") for name in names})
        function(**values, **arguments)

    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {
        **{parameter.name: parameter.annotation for parameter in parameters},
        "return": None,
    }
    return command


def _named_option(hint: Any, field: str) -> Any:
    """Returns the annotation with an explicit option name: the parameter's name has a prefix."""
    metadata: Mapping[str, Any] = vars(hint)
    (info,) = metadata["__metadata__"]
    if isinstance(info, typer.models.OptionInfo) and info.default is ...:
        info = typer.Option(
            f"--{field.replace('_', '-')}",
            **{
                key: getattr(info, key)
                for key in ("help", "metavar", "min", "max", "rich_help_panel")
            },
        )
    return Annotated[hint.__origin__, info]
