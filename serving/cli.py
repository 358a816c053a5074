"""``longtrail rank`` and ``longtrail serve``."""

import time
from typing import TYPE_CHECKING

import click

from feature_repo.command import Settings, emit, pass_settings, say

if TYPE_CHECKING:
    from serving.ranker import Ranker

# The commands import PyTorch, Feast and FastAPI inside: `longtrail --help` stays instant.


def _open(settings: Settings, run: str | None, threads: int) -> "Ranker":
    from serving.ranker import Ranker, RankerConfig

    return Ranker.open(
        settings.home, settings.profile, run, config=RankerConfig(num_threads=threads)
    )


_run_option = click.option("--run", help="Name of a run.  [default: the one that is current]")
_threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Threads of one call of the model; more than one pays on idle cores only.",
)


@click.command()
@click.argument("user_id")
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Most items to return.",
)
@_run_option
@click.option(
    "--candidates",
    metavar="ID,ID,...",
    help="Item ids to rank.  [default: the whole catalogue]",
)
@click.option(
    "--history",
    "num_history",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="Most behaviours of the user to return, newest first.",
)
@_threads_option
@pass_settings
def rank(
    settings: Settings,
    user_id: str,
    top: int,
    run: str | None,
    candidates: str | None,
    num_history: int,
    threads: int,
) -> None:
    """Rank items for USER_ID, with the reason for each.

    Example: longtrail rank 14911 --top 5
    """
    wanted = None
    if candidates is not None:
        wanted = [part.strip() for part in candidates.split(",") if part.strip()]
        if not wanted:
            raise click.BadParameter("names no item id", param_hint="--candidates")
    ranker = _open(settings, run, threads)
    start = time.perf_counter()
    ranking = ranker.rank(user_id, candidates=wanted, top_k=top)
    seconds = time.perf_counter() - start
    emit(
        {
            "user_id": ranking.user_id,
            "known": ranking.known,
            "model": ranking.model,
            "history": [
                {"text": entry.text, "scene": entry.scene, "time": entry.time.isoformat()}
                for entry in ranking.history[:num_history]
            ],
            "ranked": [
                {
                    "item_id": item.item_id,
                    "text": item.text,
                    "score": item.score,
                    "reason": item.reason,
                }
                for item in ranking.ranked
            ],
            "num_scored": ranking.num_scored,
            "unknown_items": list(ranking.unknown_items),
            "notes": list(ranking.notes),
            "seconds": round(seconds, 4),
        }
    )


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=8080,
    show_default=True,
    help="Port to listen on; 0 for any free one.",
)
@_run_option
@_threads_option
@pass_settings
def serve(settings: Settings, host: str, port: int, run: str | None, threads: int) -> None:
    """Answer over HTTP: POST /v1/rank, GET /v1/users/{user_id}/features, /healthz, /docs.

    Prints its address as one JSON line once it listens; stops on SIGTERM or Ctrl-C after the
    running requests have ended.

    Example: longtrail serve --port 8080
    """
    from serving.ranker import Ranker
    from serving.server import is_loopback, run_server

    if not is_loopback(host):
        say(
            f"Warning: {host} can be reached from other machines and the service asks for no key; "
            "put it behind something that does, or use --host 127.0.0.1"
        )
    say("reading the catalogue's features ...")

    def announce(url: str, ranker: Ranker) -> None:
        emit({"url": url, "run": ranker.manifest.run})

    run_server(lambda: _open(settings, run, threads), host=host, port=port, announce=announce)


commands: list[click.Command] = [rank, serve]
