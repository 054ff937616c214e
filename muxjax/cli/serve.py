"""`muxjax serve` and `muxjax key`. Heavy modules are imported when a command needs them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from muxjax.cli.options import FleetFile, Trace, register_command
from muxjax.cluster.host_list import Hosts

CLUSTER, ACCESS, LOGS = "Units and hosts", "Access", "Logs and traces"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    register_command(app, serve, panel="Serve")
    register_command(app, key, panel="Serve")


@dataclass(frozen=True)
class ClusterOptions:
    """The processes and devices on which the units run."""

    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Serve the units of this plan (see `muxjax plan --output`) instead of one unit.",
            rich_help_panel=CLUSTER,
        ),
    ] = None
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run each unit as a process of a Ray cluster: HOST:PORT, 'auto' for this "
            "machine's cluster, or 'local' to start Ray here. Needs muxjax[ray].",
            rich_help_panel=CLUSTER,
        ),
    ] = None
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve one mesh that spans the devices of several processes. Give every process "
            "this address, which is that of the first.",
            rich_help_panel=CLUSTER,
        ),
    ] = None
    process: Annotated[
        int,
        typer.Option(
            min=0,
            help="With --coordinator: the index of this process. Process 0 serves requests.",
            rich_help_panel=CLUSTER,
        ),
    ] = 0
    processes: Annotated[
        int,
        typer.Option(
            min=1, help="With --coordinator: the number of processes.", rich_help_panel=CLUSTER
        ),
    ] = 1


@dataclass(frozen=True)
class AccessOptions:
    """The address to listen on, and access control."""

    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. An address that other machines can reach needs API keys.",
            rich_help_panel=ACCESS,
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        typer.Option(
            min=0,
            max=65535,
            help="Port to listen on; 0 selects a free port.",
            rich_help_panel=ACCESS,
        ),
    ] = 8000
    keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The API keys (see docs/guides/serving.md). Alternatively, set MUXJAX_API_KEY.",
            rich_help_panel=ACCESS,
        ),
    ] = None
    insecure: Annotated[
        bool,
        typer.Option(help="Serve other machines without API keys.", rich_help_panel=ACCESS),
    ] = False
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Serve over HTTPS with this certificate (PEM).",
            rich_help_panel=ACCESS,
        ),
    ] = None
    tls_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The private key of --tls-cert.", rich_help_panel=ACCESS),
    ] = None


def serve(
    fleet_file: FleetFile,
    access: AccessOptions,
    cluster: ClusterOptions,
    log_format: Annotated[
        Literal["text", "json"],
        typer.Option(help="Format of the logs on standard error.", rich_help_panel=LOGS),
    ] = "text",
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Send traces of requests to this endpoint by OTLP over HTTP. Needs muxjax[otel].",
            rich_help_panel=LOGS,
        ),
    ] = None,
    trace: Trace = None,
) -> None:
    """Serve a fleet over HTTP with OpenAI's API, and a live page at /.

    Ctrl-C or SIGTERM stops after running requests are finished; a second one stops at once. SIGHUP
    reloads the fleet file.
    """
    from muxjax.config.fleet_file import load_fleet_config

    config = load_fleet_config(fleet_file)
    hosts = _check_options(access, cluster, trace)
    if hosts is not None and hosts.process > 0:
        from muxjax.cluster.follower import follow

        follow(hosts)
        return

    # Bound before slow imports and loading, so that a second server on the port fails at once.
    from muxjax.serve.address import bind
    from muxjax.stop_signals import interrupted_by_stop_signals

    with interrupted_by_stop_signals(), bind(access.host, access.port) as bound:
        from muxjax.cluster.load_fleet import load_fleet
        from muxjax.scheduling.timeline import recorded_timeline
        from muxjax.serve import logs
        from muxjax.serve.access.keys import load_keys
        from muxjax.serve.address import is_local
        from muxjax.serve.server import Tls, check_exposure
        from muxjax.serve.server import serve as serve_fleet
        from muxjax.serve.settings import ServerSettings
        from muxjax.serve.tracing import Tracing

        api_keys = load_keys(access.keys, [model.name for model in config.models])
        tracing = None if otlp_endpoint is None else Tracing.to_endpoint(otlp_endpoint)
        tls = None
        if access.tls_cert is not None and access.tls_key is not None:
            tls = Tls(access.tls_cert, access.tls_key)
            tls.check()
        settings = ServerSettings.from_config(
            config,
            keys=api_keys,
            local_only=is_local(bound),
            tracing=tracing,
            fleet_file=fleet_file,
        )
        check_exposure(bound, settings, insecure=access.insecure)
        logs.configure(log_format)

        fleet_context = load_fleet(config, plan=cluster.plan, ray_address=cluster.ray, hosts=hosts)
        with recorded_timeline(trace) as timeline, fleet_context as fleet:
            if timeline is not None:
                fleet.record(timeline)
            serve_fleet(
                fleet,
                bound,
                say=lambda text: print(text, flush=True),
                settings=settings,
                tls=tls,
            )


def _check_options(
    access: AccessOptions, cluster: ClusterOptions, trace: Path | None
) -> Hosts | None:
    """Checks that no options exclude each other.

    Returns:
      The processes of a mesh over several processes; None for one process.
    """
    if (access.tls_cert is None) != (access.tls_key is None):
        raise typer.BadParameter("--tls-cert and --tls-key must be given together")
    if cluster.ray is not None and trace is not None:
        raise typer.BadParameter(
            "--trace records the steps of this process; with --ray, other processes run the steps"
        )
    if cluster.coordinator is None:
        return None
    if cluster.plan is not None or cluster.ray is not None:
        raise typer.BadParameter("--coordinator serves one unit; omit --plan and --ray")
    return Hosts(cluster.coordinator, cluster.process, cluster.processes)


def key(
    name: Annotated[str, typer.Argument(help="The name of the key's holder in logs.")],
) -> None:
    """Create an API key: the secret for its holder, and the entry for the key file."""
    from muxjax.serve.access.keys import new_entry

    secret, entry = new_entry(name)
    print(f"# The secret, which is not shown again:\n#   {secret}\n{entry}")
