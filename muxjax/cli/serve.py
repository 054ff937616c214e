"""`muxjax serve` and `muxjax key`. Heavy imports wait until a command needs them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from muxjax.cli.trace import recorded

if TYPE_CHECKING:
    from muxjax.cluster.host_list import Hosts
    from muxjax.config.fleet_file import FleetConfig
    from muxjax.fleet import Fleet


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
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run each unit as a process of a Ray cluster: HOST:PORT, 'auto' for this "
            "machine's, 'local' to start Ray here; needs muxjax[ray].",
        ),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve with other processes, on other hosts, whose devices are one mesh: where "
            "the first of them listens; the same for all.",
        ),
    ] = None,
    process: Annotated[
        int, typer.Option(help="With --coordinator: which process this is; 0 serves.", min=0)
    ] = 0,
    processes: Annotated[
        int, typer.Option(help="With --coordinator: how many processes there are.", min=1)
    ] = 1,
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
    from muxjax.cluster.host_list import Hosts
    from muxjax.config.fleet_file import load_fleet_config

    config = load_fleet_config(fleet_file)
    if (tls_cert is None) != (tls_key is None):
        raise typer.BadParameter("--tls-cert and --tls-key go together")
    if coordinator is not None and (plan is not None or ray is not None):
        raise typer.BadParameter(
            "--coordinator makes one unit: it goes with no --plan and no --ray"
        )
    hosts = None if coordinator is None else Hosts(coordinator, process, processes)
    if hosts is not None and hosts.process > 0:
        from muxjax.cluster.follower import follow

        follow(hosts)
        return
    if ray is not None and trace is not None:
        raise typer.BadParameter(
            "--trace records steps of this process; with --ray they are others'"
        )

    from muxjax.serve import logs
    from muxjax.serve.access.keys import load_keys
    from muxjax.serve.server import Tls, bind, check_exposure, is_local, sigterm_interrupts
    from muxjax.serve.server import serve as serve_fleet
    from muxjax.serve.settings import ServerSettings
    from muxjax.serve.tracing import Tracing

    found = load_keys(keys, [model.name for model in config.models])
    tracing = None if otlp_endpoint is None else Tracing.to_endpoint(otlp_endpoint)
    tls = None if tls_cert is None or tls_key is None else Tls(tls_cert, tls_key)
    if tls is not None:
        tls.check()
    with sigterm_interrupts(), bind(host, port) as bound:
        settings = ServerSettings.from_config(
            config,
            keys=found,
            local_only=is_local(bound),
            tracing=tracing,
            fleet_file=fleet_file,
        )
        check_exposure(bound, settings, insecure=insecure)
        logs.configure(log_format)

        with recorded(trace) as timeline, _loaded(config, plan, ray, hosts) as fleet:
            if timeline is not None:
                fleet.record(timeline)
            serve_fleet(
                fleet,
                bound,
                say=lambda text: print(text, flush=True),
                settings=settings,
                tls=tls,
            )


def _loaded(
    config: FleetConfig, plan: Path | None, ray: str | None, hosts: Hosts | None
) -> AbstractContextManager[Fleet]:
    if hosts is not None:
        from muxjax.cluster.leader import leading

        return leading(config, hosts)
    if ray is not None:
        from muxjax.cluster.ray_fleet import ray_fleet

        return ray_fleet(config, plan=plan, address=ray)
    from muxjax.fleet import Fleet

    return Fleet.load(config, plan=plan)


def key(
    name: Annotated[str, typer.Argument(help="What logs call the holder.")],
) -> None:
    """Make an API key: the secret for its holder, and the entry for the key file."""
    from muxjax.serve.access.keys import new_entry

    secret, entry = new_entry(name)
    print(f"# The secret, shown only now:\n#   {secret}\n{entry}")
