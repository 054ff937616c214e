"""`muxjax serve` and `muxjax key`. Heavy imports wait until a command needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from muxjax.cli_trace import recorded


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command()(serve)
    app.command()(key)


def serve(
    fleet_file: Annotated[Path, typer.Argument(metavar="FLEET", help="The fleet file (YAML).")],
    host: Annotated[
        str, typer.Option(help="Address to serve on. Others than this machine's need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.", min=0, max=65535)] = 8000,
    plan: Annotated[
        Path | None,
        typer.Option(help="Serve the units of this plan (`muxjax plan --output`), not one unit."),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(help="File of API keys (docs/serving.md). Also: MUXJAX_API_KEY."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve to other machines without keys.")
    ] = False,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Serve over HTTPS with this certificate (PEM).")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's private key.")] = None,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="Form of the logs on standard error.")
    ] = "text",
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(help="Send traces of calls there by OTLP over HTTP; needs muxjax[otel]."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write who ran when (Chrome trace, JSON) at the end: the latest 100,000 steps."
        ),
    ] = None,
) -> None:
    """Serve a fleet over HTTP in OpenAI's schema, with a live page at /.

    Ctrl-C and SIGTERM let running requests end first; once more ends at once. SIGHUP reads the
    fleet file again and applies it.
    """
    from muxjax.config import load_fleet_config

    config = load_fleet_config(fleet_file)
    if (tls_cert is None) != (tls_key is None):
        raise typer.BadParameter("--tls-cert and --tls-key go together")

    from muxjax.serve import logs
    from muxjax.serve.keys import load_keys
    from muxjax.serve.server import Tls, bind, check_exposure, is_local, sigterm_interrupts
    from muxjax.serve.server import serve as serve_fleet
    from muxjax.serve.settings import Settings
    from muxjax.serve.tracing import Tracing

    found = load_keys(keys, [model.name for model in config.models])
    tracing = None if otlp_endpoint is None else Tracing.to(otlp_endpoint)
    tls = None if tls_cert is None or tls_key is None else Tls(tls_cert, tls_key)
    if tls is not None:
        tls.check()
    with sigterm_interrupts(), bind(host, port) as bound:
        settings = Settings.of(
            config,
            keys=found,
            local_only=is_local(bound),
            tracing=tracing,
            fleet_file=fleet_file,
        )
        check_exposure(bound, settings, insecure=insecure)
        logs.configure(log_format)

        from muxjax.fleet import Fleet

        with recorded(trace) as timeline, Fleet.load(config, plan=plan) as fleet:
            if timeline is not None:
                fleet.record(timeline)
            serve_fleet(
                fleet,
                bound,
                say=lambda text: print(text, flush=True),
                settings=settings,
                tls=tls,
            )


def key(
    name: Annotated[str, typer.Argument(help="What logs call the holder.")],
) -> None:
    """Make an API key: the secret for its holder, and the entry for the key file."""
    from muxjax.serve.keys import new_entry

    secret, entry = new_entry(name)
    print(f"# The secret, shown only now:\n#   {secret}\n{entry}")
