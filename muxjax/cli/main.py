"""The command line: `muxjax generate | serve | models | plan | simulate | bench | ...`.

Nothing heavy is imported before a command needs it, so that help and mistakes in arguments answer
at once; a fleet file is checked before JAX is imported.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from muxjax._version import __version__
from muxjax.cli import bench as cli_bench
from muxjax.cli import convert as cli_convert
from muxjax.cli import plan as cli_plan
from muxjax.cli import serve as cli_serve
from muxjax.cli import simulate as cli_simulate
from muxjax.errors import FleetConfigError, InvalidRequest, MuxError, UnknownModel

app = typer.Typer(
    rich_markup_mode=None,  # with rich `--help` takes three times as long, 0.57 s of CPU
    name="muxjax",
    help="Serve many language models from one set of accelerators.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"max_content_width": 100},
    pretty_exceptions_enable=False,
)

FleetFile = Annotated[Path, typer.Argument(metavar="FLEET", help="The fleet file (YAML).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Runs the command line. An error that MuxJAX foresaw is a line on stderr and exit status 2."""
    try:
        app()
    except MuxError as error:
        for line in str(error).splitlines():
            print(f"muxjax: {line}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"muxjax {__version__}")
        raise typer.Exit


@app.command()
def generate(
    fleet_file: FleetFile,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to continue or answer.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Needed when the fleet has several.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to make.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus: keep this much probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the best.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the output; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt: the text as it comes, or one JSON object."""
    from muxjax.config.fleet_file import load_fleet_config
    from muxjax.sampling_params import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    config = load_fleet_config(fleet_file)
    name = _chosen([entry.name for entry in config.models], model)
    # One prompt needs no other model in memory.
    alone = config.model_copy(
        update={"models": tuple(entry for entry in config.models if entry.name == name)}
    )

    from muxjax.fleet import Fleet

    with Fleet.load(alone) as fleet:
        tokenizer = fleet.models[name].tokenizer
        tokens: str | list[int] = prompt
        if chat:
            if tokenizer is None:
                raise InvalidRequest(f"{name} has no tokenizer, so no chat template")
            text = tokenizer.apply_chat([{"role": "user", "content": prompt}])
            tokens = tokenizer.encode(text, add_special=False)
        if as_json:
            (completion,) = fleet.generate(name, [tokens], params)
            answer = {
                "model": name,
                "text": completion.text,
                "token_ids": list(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "num_prompt_tokens": completion.num_prompt_tokens,
            }
            print(json.dumps(answer, ensure_ascii=False))
            return
        for delta in fleet.stream(name, tokens, params):
            print(delta.text, end="", flush=True)
        print()


@app.command()
def models(fleet_file: FleetFile, as_json: AsJson = False) -> None:
    """Load a fleet, compile nothing, and say what it holds: shapes, bytes, where from."""
    from muxjax.config.fleet_file import load_fleet_config

    config = load_fleet_config(fleet_file)

    from muxjax.cli.models_table import describe_models, table_of
    from muxjax.fleet import Fleet

    with Fleet.load(config, warm_up=False) as fleet:
        rows = describe_models(fleet)
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return

    from rich.console import Console

    Console().print(table_of(rows))


@app.command("compile-check")
def compile_check(
    fleet_file: FleetFile,
    target: Annotated[
        str,
        typer.Option(help="What to compile for: v5e:2x4, v6e:2x2, tpu7x:2x2x1, ..., h100, 8xh200."),
    ],
    as_json: AsJson = False,
) -> None:
    """Compile a fleet's steps for devices that are not here: does it compile, does it fit?

    The fleet is cut for as many devices of the target as its `tensor_parallel` says. Exit status 1
    if something does not compile or does not fit.
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

    with ExitStack() as shown:
        bars: list[Bars] = []

        def started(total: int) -> None:
            bars.append(shown.enter_context(Bars({"compiling": total}, show=True)))

        def compiled(program: CheckedProgram) -> None:
            bars[0].advance("compiling", 1, program.name)

        check = check_fleet(config, devices, on_start=started, on_compiled=compiled)
    if as_json:
        print(json.dumps(check.as_json(), indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        Console().print(check_table(check))
        for fault in check_faults(check):
            print(f"muxjax: {fault}", file=sys.stderr)
    if not check.passed:
        raise typer.Exit(1)


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Demo models; all by default.")
    ] = None,
) -> None:
    """Fetch demo models into the cache, with their licences. What is there is not fetched again."""
    from muxjax.models.download.demo import DEMO_MODELS, fetch_demo

    unknown = [name for name in names or () if name not in DEMO_MODELS]
    if unknown:
        known = ", ".join(DEMO_MODELS)
        raise UnknownModel(f"no demo model {unknown[0]!r}; there are {known}", field="name")
    for name in names or DEMO_MODELS:
        print(f"{name}: {fetch_demo(name)}")


@app.command()
def schema() -> None:
    """Print the fleet file's JSON Schema, which editors complete and check by."""
    from muxjax.config.fleet_file import fleet_json_schema

    print(json.dumps(fleet_json_schema(), indent=2))


cli_convert.register(app)
cli_plan.register(app)
cli_serve.register(app)
cli_simulate.register(app)
cli_bench.register(app)


def _chosen(names: list[str], model: str | None) -> str:
    """The name of the model to use."""
    if model is None and len(names) == 1:
        return names[0]
    if model is None:
        raise FleetConfigError(f"choose a model with --model: {', '.join(names)}")
    if model not in names:
        raise UnknownModel(f"no model {model!r} in the fleet; there are {', '.join(names)}")
    return model
