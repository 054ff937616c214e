"""The command line: `muxjax serve | generate | models | plan | simulate | bench | ...`.

Heavy modules are imported when a command needs them, so that help and argument errors appear
without delay. A fleet file is checked before JAX is imported.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated

import typer

from muxjax._version import __version__
from muxjax.cli import bench as cli_bench
from muxjax.cli import convert as cli_convert
from muxjax.cli import plan as cli_plan
from muxjax.cli import serve as cli_serve
from muxjax.cli import simulate as cli_simulate
from muxjax.cli.options import AsJson, FleetFile, GroupedGroup, register_command
from muxjax.errors import (
    FleetConfigError,
    InsufficientMemory,
    InvalidRequest,
    MuxError,
    UnknownModel,
)
from muxjax.stop_signals import ends_by_sigint

app = typer.Typer(
    cls=GroupedGroup,
    rich_markup_mode=None,  # importing rich would triple the time of `--help`
    name="muxjax",
    help="Serve many language models from one set of accelerators.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"max_content_width": 100},
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Runs the command line. A `MuxError` is printed on standard error, with exit status 2.

    The exit status is 1 if the input is valid and this machine has too little memory for it.
    """
    try:
        with ends_by_sigint():
            app()
    except MuxError as error:
        for line in str(error).splitlines():
            print(f"muxjax: {line}", file=sys.stderr)
        sys.exit(1 if isinstance(error, InsufficientMemory) else 2)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"muxjax {__version__}")
        raise typer.Exit


@dataclass(frozen=True)
class GenerateOptions:
    """Sampling parameters of `generate`."""

    max_tokens: Annotated[
        int,
        typer.Option(help="Maximum number of tokens to generate.", rich_help_panel="Sampling"),
    ] = 128
    temperature: Annotated[
        float,
        typer.Option(
            help="Temperature of sampling; 0 selects greedily.", rich_help_panel="Sampling"
        ),
    ] = 0.0
    top_p: Annotated[
        float,
        typer.Option(
            help="Nucleus sampling: sample from the most likely tokens with this total "
            "probability.",
            rich_help_panel="Sampling",
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        typer.Option(
            help="Sample from the k most likely tokens; 0 is no limit.",
            rich_help_panel="Sampling",
        ),
    ] = 0
    min_p: Annotated[
        float,
        typer.Option(
            help="Minimum probability of a token, relative to the most likely one.",
            rich_help_panel="Sampling",
        ),
    ] = 0.0
    seed: Annotated[
        int | None,
        typer.Option(help="Seed that makes sampling repeatable.", rich_help_panel="Sampling"),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help="Text that ends the output. May be repeated.", rich_help_panel="Sampling"
        ),
    ] = None


def generate(
    fleet_file: FleetFile,
    sampling: GenerateOptions,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The prompt.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The model. Required if the fleet has several."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the model's chat template to the prompt.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Generate text from one prompt and print it as it is generated."""
    from muxjax.config.fleet_file import load_fleet_config
    from muxjax.sampling_params import SamplingParams

    params = SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        stop=tuple(sampling.stop or ()),
    )
    config = load_fleet_config(fleet_file)
    name = _choose_model([entry.name for entry in config.models], model)
    # Only the chosen model is loaded.
    single = config.model_copy(
        update={"models": tuple(entry for entry in config.models if entry.name == name)}
    )

    from muxjax.fleet import Fleet

    with Fleet.load(single) as fleet:
        tokenizer = fleet.models[name].tokenizer
        tokens: str | list[int] = prompt
        if chat:
            if tokenizer is None:
                raise InvalidRequest(f"{name} has no tokenizer and therefore no chat template")
            text = tokenizer.apply_chat([{"role": "user", "content": prompt}])
            tokens = tokenizer.encode(text, add_special=False)
        if as_json:
            (completion,) = fleet.generate(name, [tokens], params)
            result = {
                "model": name,
                "text": completion.text,
                "token_ids": list(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "num_prompt_tokens": completion.num_prompt_tokens,
            }
            print(json.dumps(result, ensure_ascii=False))
            return
        for delta in fleet.stream(name, tokens, params):
            print(delta.text, end="", flush=True)
        print()


def models(
    fleet_file: FleetFile,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Instead, check the models' files against the digests stored for them. The exit "
            "status is 1 if a file is damaged or missing.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Load a fleet without compiling it and print its models: shapes, sizes and sources."""
    from muxjax.config.fleet_file import load_fleet_config

    config = load_fleet_config(fleet_file)
    if verify:
        from muxjax.cli.models_table import print_verified

        if not print_verified({entry.name: entry.source for entry in config.models}, as_json):
            raise typer.Exit(1)
        return

    from muxjax.cli.models_table import build_table, describe_models
    from muxjax.fleet import Fleet

    with Fleet.load(config, warm_up=False) as fleet:
        rows = describe_models(fleet)
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return

    from rich.console import Console

    Console().print(build_table(rows))


def compile_check(
    fleet_file: FleetFile,
    target: Annotated[
        str,
        typer.Option(
            metavar="DEVICES",
            help="The target devices: v5e:2x4, v6e:2x2, tpu7x:2x2x1, ..., h100, 8xh200.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Check that a fleet compiles for devices that are not present, and fits in their memory.

    The fleet is sharded over `tensor_parallel` devices of the target. The exit status is 1 if a
    program does not compile or does not fit.
    """
    from muxjax.compile_check.targets import set_environment
    from muxjax.config.fleet_file import load_fleet_config

    config = load_fleet_config(fleet_file)
    set_environment(target)  # before JAX is imported

    from muxjax.compile_check.check import CheckedProgram, check_faults, check_table
    from muxjax.compile_check.check import compile_check as check_fleet
    from muxjax.compile_check.devices import describe_devices
    from muxjax.progress import Bars

    devices = describe_devices(target)

    with ExitStack() as stack:
        bars: list[Bars] = []

        def on_start(total: int) -> None:
            bars.append(stack.enter_context(Bars({"compiling": total}, show=True)))

        def on_compiled(program: CheckedProgram) -> None:
            bars[0].advance("compiling", 1, program.name)

        check = check_fleet(config, devices, on_start=on_start, on_compiled=on_compiled)
    if as_json:
        print(json.dumps(check.as_json(), indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        Console().print(check_table(check))
        for fault in check_faults(check):
            print(f"muxjax: {fault}", file=sys.stderr)
    if not check.passed:
        raise typer.Exit(1)


def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Demo models. By default all.")
    ] = None,
) -> None:
    """Download demo models and their licenses into the cache, unless they are already there.

    Checks the digests of files that are there, and downloads damaged files again.
    """
    from muxjax.models.download.demo import fetch_demo
    from muxjax.models.download.demo_models import DEMO_MODELS

    unknown = [name for name in names or () if name not in DEMO_MODELS]
    if unknown:
        known = ", ".join(DEMO_MODELS)
        raise UnknownModel(f"no demo model {unknown[0]!r}; there are {known}", field="name")
    for name in names or DEMO_MODELS:
        print(f"{name}: {fetch_demo(name, verify=True)}")


def schema() -> None:
    """Print the JSON Schema of the fleet file, for completion and validation in editors."""
    from muxjax.config.fleet_file import fleet_json_schema

    print(json.dumps(fleet_json_schema(), indent=2))


cli_serve.register(app)
register_command(app, generate, panel="Serve")
register_command(app, models, panel="Models and files")
register_command(app, fetch, panel="Models and files")
cli_convert.register(app)
register_command(app, schema, panel="Models and files")
cli_plan.register(app)
cli_simulate.register(app)
register_command(app, compile_check, name="compile-check", panel="Plan and measure")
cli_bench.register(app)


def _choose_model(names: list[str], model: str | None) -> str:
    """Returns the name of the model to use; by default the fleet's only model."""
    if model is None and len(names) == 1:
        return names[0]
    if model is None:
        raise FleetConfigError(f"choose a model with --model: {', '.join(names)}")
    if model not in names:
        raise UnknownModel(f"no model {model!r} in the fleet; there are {', '.join(names)}")
    return model
