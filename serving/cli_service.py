"""``longtrail serve`` and ``longtrail key``: the service, and who may ask it."""

import ipaddress
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from feature_repo.artifact import load_current_run, load_run_manifest
from feature_repo.command import Settings, emit, pass_settings, say
from feature_repo.errors import LongtrailError
from serving.metrics_folder import metrics_folder
from serving.security import (
    KEYS_VARIABLE,
    NAME_PATTERN,
    SCOPES,
    ApiKeys,
    Scope,
    hosts_allowed,
    is_loopback,
    new_key,
)

if TYPE_CHECKING:
    from serving.opening import ServiceOptions

# The commands import PyTorch, Feast and FastAPI inside: `longtrail --help` stays instant.

model_threads_option = click.option(
    "--model-threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Threads of one call of the model; more than one pays on idle cores only.",
)


def _origins(_: click.Context, __: click.Parameter, origins: tuple[str, ...]) -> tuple[str, ...]:
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
            raise click.BadParameter(
                f"expected scheme and host without a path, such as https://shop.example, "
                f"got {origin!r}"
            )
    return origins


def _proxies(_: click.Context, __: click.Parameter, addresses: tuple[str, ...]) -> tuple[str, ...]:
    for address in addresses:
        try:
            ipaddress.ip_network(address, strict=False)
        except ValueError:
            raise click.BadParameter(
                f"expected an address or a network, such as 10.0.0.7 or 10.0.0.0/24, "
                f"got {address!r}"
            ) from None
    return addresses


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=8080,
    show_default=True,
    help="Port to listen on; 0 for any free one.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes that answer; one per core that serving may have.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Requests that one worker computes side by side; more workers serve better than threads.",
)
@model_threads_option
@click.option(
    "--max-waiting",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Requests that may wait in one worker; more are answered 503 at once.",
)
@click.option("--run", help="Name of a run, for good.  [default: follow the one that is current]")
@click.option(
    "--shadow",
    metavar="RUN",
    help="A run that ranks too, unseen, to be compared.  [default: none]",
)
@click.option(
    "--shadow-share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.1,
    show_default=True,
    help="Part of the rankings that the shadow repeats.",
)
@click.option(
    "--keys",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar=KEYS_VARIABLE,
    help=f"File of API keys; also {KEYS_VARIABLE}.  [default: no key is asked for]",
)
@click.option(
    "--rate-limit",
    metavar="RATE",
    help="Requests of one key or address, as 100/second, in each worker.  [default: no limit]",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    callback=_origins,
    metavar="ORIGIN",
    help="Origin whose pages may ask; can be repeated.  [default: none]",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Name under which it may be asked besides localhost, * for any; can be repeated.  "
    "[default: any with --keys or beyond this machine, else none]",
)
@click.option(
    "--trusted-proxy",
    "trusted_proxies",
    multiple=True,
    callback=_proxies,
    metavar="ADDRESS",
    help="Proxy whose X-Forwarded-For names the caller; can be repeated.  [default: none]",
)
@click.option(
    "--events/--no-events",
    "takes_events",
    default=True,
    show_default=True,
    help="Take live events at /v1/events; every worker then has the encoder in memory.",
)
@click.option(
    "--on-store-error",
    type=click.Choice(["answer", "fail"]),
    default="answer",
    show_default=True,
    help="While the online store is away: rank an empty history and say so, or 503.",
)
@click.option(
    "--store-failures",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Failures in a row after which the online store is left alone.",
)
@click.option(
    "--store-pause",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="Seconds that it is then left alone.",
)
@click.option(
    "--store-slow",
    type=click.FloatRange(0, min_open=True),
    default=0.5,
    show_default=True,
    help="Seconds of a read that count as a failure.",
)
@click.option(
    "--served-log",
    "served_share",
    metavar="SHARE",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Part of the rankings whose features are logged, for `longtrail parity --served`.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Form of the log lines on stderr.",
)
@click.option(
    "--access-log/--no-access-log",
    default=True,
    show_default=True,
    help="One log line per request.",
)
@pass_settings
def serve(
    settings: Settings,
    /,
    *,
    host: str,
    port: int,
    workers: int,
    trusted_proxies: tuple[str, ...],
    log_format: Literal["text", "json"],
    access_log: bool,
    **options: Any,
) -> None:
    """Answer over HTTP: rankings, explanations, live events, and a page for people at /.

    Prints its address as one JSON line once all workers answer; while the feature store is away
    they answer that they cannot rank yet, and load the model when they can. SIGTERM or Ctrl-C stops
    it after the running requests have ended; SIGHUP makes it look at once for another current run
    and for changed keys. /openapi.json describes the interface, /readyz and /metrics tell how it
    does.

    Example: longtrail serve --port 8080 --workers 2 --keys keys.toml
    """
    keys = ApiKeys(options["keys"]) if options["keys"] else None
    if keys is None and not is_loopback(host):
        say(
            f"Warning: {host} can be reached from other machines and the service asks for no key; "
            "use --keys, put it behind something that asks, or use --host 127.0.0.1"
        )
    _check_rate_limit(options["rate_limit"])
    hosts = hosts_allowed(host, options["allowed_hosts"], asks_for_keys=keys is not None)
    # A mistake is said before anything heavy is imported. A home without a run is one: nobody knows
    # when there will be one, and a service that waits for it would hide that the home is wrong.
    if options["run"] is None:
        load_current_run(settings.home)
    for run in filter(None, (options["run"], options["shadow"])):
        load_run_manifest(settings.home, run)
    with metrics_folder(workers) as folder:
        from serving.logs import configure_logs
        from serving.opening import look_again, open_service
        from serving.server import run_server

        service_options = _service_options(options, keys, hosts)
        configure_logs(log_format, access=access_log)
        say("reading the catalogue's features ...")
        run_server(
            partial(
                open_service,
                settings.home,
                settings.profile,
                service_options,
                metrics_folder=folder,
            ),
            host=host,
            port=port,
            announce=lambda url, run: emit({"url": url, "run": run, "workers": workers}),
            workers=workers,
            trusted_proxies=trusted_proxies,
            on_worker_gone=_worker_forgetter(folder),
            on_hangup=partial(look_again, [keys.reload] if keys else []),
        )


def _check_rate_limit(rate: str | None) -> None:
    from serving.rate_limit import RateLimit

    if rate is not None:
        try:
            RateLimit(rate)
        except LongtrailError as error:
            raise click.BadParameter(str(error), param_hint="--rate-limit") from error


def _service_options(
    options: dict[str, Any], keys: ApiKeys | None, hosts: tuple[str, ...]
) -> "ServiceOptions":
    from serving.app import AppSettings
    from serving.opening import BreakerOptions, ServiceOptions
    from serving.preparation import RankerConfig

    return ServiceOptions(
        run=options["run"],
        shadow_run=options["shadow"],
        shadow_share=options["shadow_share"],
        served_share=options["served_share"],
        takes_events=options["takes_events"],
        ranker=RankerConfig(
            num_threads=options["model_threads"], on_store_error=options["on_store_error"]
        ),
        breaker=BreakerOptions(
            fail_max=options["store_failures"],
            reset_s=options["store_pause"],
            slow_s=options["store_slow"],
        ),
        app=AppSettings(
            threads=options["threads"],
            max_waiting=options["max_waiting"],
            keys=keys,
            rate_limit=options["rate_limit"],
            cors_origins=options["cors_origins"],
            allowed_hosts=hosts,
        ),
    )


def _worker_forgetter(folder: Path | None) -> Callable[[int], None]:
    from serving.metrics import forget_worker

    return (lambda _: None) if folder is None else partial(forget_worker, folder)


@click.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(SCOPES),
    multiple=True,
    default=("read",),
    show_default=True,
    help="What it opens: read rankings, or write events; can be repeated.",
)
def key(name: str, scopes: tuple[Scope, ...]) -> None:
    """Make an API key called NAME: its secret, to be seen this once, and its entry for the file.

    The file holds digests alone: whoever reads it can use no key. A running service takes a changed
    file on SIGHUP.

    Example: longtrail key dashboard --scope read | tee /dev/stderr | jq -r .entry >> keys.toml
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise click.BadParameter(
            f"expected letters, digits, - and _, at most 64 of them, got {name!r}",
            param_hint="NAME",
        )
    secret, entry = new_key(name, tuple(dict.fromkeys(scopes)))
    emit({"name": name, "key": secret, "scopes": list(dict.fromkeys(scopes)), "entry": entry})
    say("Keep the key now: it is stored nowhere. Put the entry into the file of --keys.")
