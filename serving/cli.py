"""The commands of serving; ``longtrail rank`` itself is here."""

import time

import click

from feature_repo.command import Settings, emit, pass_settings
from serving.cli_service import key, model_threads_option, serve


@click.command()
@click.argument("user_id")
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Most items to return.",
)
@click.option("--run", help="Name of a run.  [default: the one that is current]")
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
@model_threads_option
@pass_settings
def rank(
    settings: Settings,
    user_id: str,
    top: int,
    run: str | None,
    candidates: str | None,
    num_history: int,
    model_threads: int,
) -> None:
    """Rank items for USER_ID, with the reason for each.

    Example: longtrail rank 14911 --top 5
    """
    from serving.preparation import RankerConfig
    from serving.ranker import Ranker

    wanted = None
    if candidates is not None:
        wanted = [part.strip() for part in candidates.split(",") if part.strip()]
        if not wanted:
            raise click.BadParameter("names no item id", param_hint="--candidates")
    config = RankerConfig(num_threads=model_threads)
    ranker = Ranker.open(settings.home, settings.profile, run, config=config)
    start = time.perf_counter()
    ranking = ranker.rank(user_id, candidates=wanted, top_k=top, num_history=num_history)
    seconds = time.perf_counter() - start
    emit(
        {
            "user_id": ranking.user_id,
            "known": ranking.known,
            "model": ranking.model,
            "history": [
                {"text": entry.text, "scene": entry.scene, "time": entry.time.isoformat()}
                for entry in ranking.history
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
            "path": ranking.path,
            "notes": list(ranking.notes),
            "seconds": round(seconds, 4),
        }
    )


commands: list[click.Command] = [rank, serve, key]
