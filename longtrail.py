"""The command line: one list of commands per folder, and the demo, which runs them in order."""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import click

from encoders import cli as encoder_commands
from feature_repo import cli as feature_commands
from feature_repo import cli_versions as version_commands
from feature_repo.command import SentenceGroup, Settings, emit, pass_settings, say
from feature_repo.dataset import DATASETS, load_dataset
from feature_repo.home import DEFAULT_HOME, HOME_VARIABLE, Home
from feature_repo.progress import BarLine, progress_bar
from feature_repo.publish import publish
from feature_repo.services import cli as service_commands
from feature_repo.services import local
from feature_repo.shop import ShopConfig, best_auc, generate_shop
from serving import cli as serving_commands
from serving import cli_served as served_commands
from training import cli as training_commands

BASELINES = ("popularity", "repeat_count", "mean_pooling", "din_text", "trees")
SHOWN_METRICS = ("auc", "gauc", "logloss", "ne")


@click.group(cls=SentenceGroup)
@click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    envvar=HOME_VARIABLE,
    default=DEFAULT_HOME,
    show_default="var/ in the project",
    help="Folder of all data and artifacts.",
)
@click.option(
    "--profile",
    envvar="LONGTRAIL_PROFILE",
    default="embedded",
    show_default=True,
    help="Which stores: embedded (files and SQLite) or production (PostgreSQL and Redis; local "
    "ones where DATABASE_URL or REDIS_URL is not set).",
)
@click.option("--verbose", is_flag=True, help="Log what the libraries do.")
@click.pass_context
def main(context: click.Context, home: Path, profile: str, verbose: bool) -> None:
    """Click models on what users did, in words: features, training, ranking.

    Every command prints one JSON line on stdout and its progress on stderr. Exit code 1 is a
    mistake that one sentence explains, 2 a wrong use of the command.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    # Feast and its libraries warn about their own insides; --verbose shows them.
    if not verbose:
        # Not by a filter: Feast sets filters of its own when it is imported.
        logging.captureWarnings(True)
        for name in ("py.warnings", "feast", "httpx", "transformers", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
    # Which servers start, and how long they stay, is news to everyone.
    logging.getLogger(local.__name__).setLevel(logging.INFO)
    context.call_on_close(local.release_all)
    context.obj = Settings(Home(home), profile)


@main.command()
@click.option(
    "--dataset",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A data set file.  [default: the generated shop]",
)
@click.option("--recipe", default="bahe_small", show_default=True, help="The model to train.")
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Items.")
@pass_settings
def demo(settings: Settings, dataset: Path | None, recipe: str, top: int) -> None:
    """Run every step in order, from raw logs to a ranked list for one user.

    Example: longtrail demo --dataset feature_repo/datasets/online_retail.toml
    """
    from feature_repo.ingest import ingest
    from feature_repo.live_events import live_source

    began = time.perf_counter()
    home = settings.home
    if dataset is None:
        say("generate the shop")
        shop = home.root / "shop"
        generate_shop(shop, ShopConfig())
        loaded = load_dataset(DATASETS / "shop.toml", data_dir=shop)
    else:
        loaded = load_dataset(dataset)
    with progress_bar("ingest", "steps") as progress:
        live = live_source(home, settings.profile, loaded.content.name)
        summary = ingest(home, loaded, live=live, progress=progress)
    for note in summary.notes:
        say(f"Note: {note}.")
    result = _demo_model(settings, recipe, top)
    if dataset is None:
        result["best_auc"] = _best_auc(home)
    result["seconds"] = round(time.perf_counter() - began, 1)
    _summarize(result)
    emit(result)


def _demo_model(settings: Settings, recipe: str, top: int) -> dict[str, Any]:
    """From canonical tables to the demo's result."""
    # torch, Feast and transformers take seconds to import: no other command's help waits for them.
    import numpy as np
    import pyarrow.parquet as pq

    from encoders.config import EncoderConfig
    from encoders.encode import encode_behaviors
    from feature_repo.manifest import load_manifest
    from feature_repo.materialize import apply, materialize
    from serving.ranker import Ranker
    from training.export import export_embeddings
    from training.recipes import RECIPES
    from training.sources import Sources
    from training.train import read_splits, train

    home, profile = settings.home, settings.profile
    manifest = load_manifest(home)
    with progress_bar("encode", "texts") as progress:
        encode_behaviors(home, EncoderConfig(), progress)
    feature_commands.build_features(settings)
    publish(settings)
    apply(home, profile)

    sources = Sources.open(home, profile)
    baselines = [*BASELINES, *(["item_only"] if manifest.impressions == "sampled" else [])]
    metrics = {}
    run = ""
    longest = max(RECIPES[name]().sequence_length for name in (*baselines, recipe))
    with progress_bar("read features", "impressions") as progress:
        # The given requests alone: a first look shall not take four times as long.
        data = read_splits(sources, longest, progress, with_extra=False)
    for name in (*baselines, recipe):
        with BarLine() as bars:
            done = train(
                sources,
                RECIPES[name](),
                data=data,
                learning=bars.bar(f"train {name}", "impressions"),
                scoring=bars.bar(f"score {name}", "impressions"),
            )
        metrics[name] = done.metrics["test"]
        run = done.run
    with progress_bar("export", "users") as progress:
        export_embeddings(sources, run, users=progress)
    publish(settings)
    apply(home, profile)
    materialize(home, profile, bars=feature_commands.row_bars)

    impressions = pq.read_table(home.impressions, columns=["user_id", "split"]).to_pandas()
    of_test = impressions.loc[impressions["split"] == "test", "user_id"]
    # The user with the most test impressions: there is a history to show.
    user_id = str(np.sort(of_test.value_counts()[lambda n: n == n.max()].index.to_numpy())[0])
    ranking = Ranker.open(home, profile, run).rank(user_id, top_k=top)
    return {
        "dataset": manifest.dataset,
        "profile": profile,
        "num_events": manifest.num_events,
        "num_users": manifest.num_users,
        "num_distinct_behaviors": manifest.num_behaviors,
        "num_impressions": manifest.num_impressions,
        "impressions": manifest.impressions,
        "run": run,
        "test": {key: metrics[recipe][key] for key in SHOWN_METRICS},
        "baselines": {
            name: {key: metrics[name][key] for key in SHOWN_METRICS} for name in baselines
        },
        "user_id": user_id,
        "history": [entry.text for entry in ranking.history[:20]],
        "ranked": [
            {"item_id": r.item_id, "text": r.text, "score": r.score, "reason": r.reason}
            for r in ranking.ranked
        ],
    }


def _best_auc(home: Home) -> float:
    import pyarrow.parquet as pq

    impressions = pq.read_table(home.impressions).to_pandas()
    return best_auc(home.root / "shop", impressions[impressions["split"] == "test"])


def _summarize(result: dict[str, Any]) -> None:
    """For a person: what was learned, and what it ranks."""
    what = "click" if result["impressions"] == "logged" else "purchase"
    say("")
    say(
        f"{result['dataset']}: {result['num_events']:,} events of {result['num_users']:,} users, "
        f"{result['num_distinct_behaviors']:,} distinct texts, "
        f"{result['num_impressions']:,} {result['impressions']} impressions"
    )
    say(f"\n{what} prediction on the test period")
    say(f"  {'model':<16}{'AUC':>8}{'GAUC':>8}{'logloss':>9}{'NE':>8}")
    rows = {**result["baselines"], result["run"].rsplit("-", 2)[0]: result["test"]}
    for name, values in rows.items():
        say(
            f"  {name:<16}{values['auc']:8.4f}{values['gauc']:8.4f}{values['logloss']:9.4f}"
            f"{values['ne']:8.4f}"
        )
    if "best_auc" in result:
        say(f"  {'best reachable':<16}{result['best_auc']:8.4f}   (from the planted probabilities)")
    say(f"\nuser {result['user_id']}, newest behaviours first")
    for text in result["history"][:8]:
        say(f"  {text}")
    say("\nranked items")
    for place, item in enumerate(result["ranked"], start=1):
        say(f"  {place:>2}. {item['score']:.3f}  {item['text']}  ({item['reason']})")
    say(f"\n{result['seconds']:.0f} s")


for group in (
    feature_commands,
    version_commands,
    service_commands,
    encoder_commands,
    training_commands,
    serving_commands,
    served_commands,
):
    for command in group.commands:
        main.add_command(command)


if __name__ == "__main__":
    main()
