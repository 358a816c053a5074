"""The process that ``test_server`` starts: the real server over the toy shop.

Its one argument is a JSON object of :class:`Options`. It stops when its standard input ends, so
that it does not outlive the test, however that ends.
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serving.metrics_folder import metrics_folder


@dataclass(frozen=True)
class Options:
    """What the server is like.

    Args:
        home: Folder of the home.
        delay_s: Seconds that the reading of the user "slow" takes.
        workers: Processes.
        log_format: Of its lines.
        asks_for_keys: Whether callers need one of the keys in keys.toml of the home.
    """

    home: str
    delay_s: float = 0.0
    workers: int = 1
    log_format: str = "text"
    asks_for_keys: bool = False


def main(options: Options, folder: Path | None) -> None:
    from encoders.loaded_artifact import load_artifact
    from feature_repo.artifact import current_run
    from feature_repo.features import UserFeatures
    from feature_repo.home import Home
    from serving.app import AppSettings, create_app
    from serving.deployment import Deployment, HomeFollower
    from serving.logs import configure_logs
    from serving.metrics import Metrics, forget_worker
    from serving.opening import look_again
    from serving.ranker import Ranker
    from serving.security import ApiKeys
    from serving.server import OpenedApp, run_server
    from tests.serving.conftest import ITEMS, NOW, USERS, ToyReader, toy_catalog, toy_table
    from tests.serving.stand_in import EventList, toy_directory

    class SlowReader(ToyReader):
        """Takes its time over one user, so that a stop can find a request running."""

        def online_users(
            self, user_ids: NDArray[np.object_], *, at: datetime | None = None
        ) -> UserFeatures:
            if "slow" in user_ids:
                time.sleep(options.delay_s)
            return super().online_users(user_ids, at=at)

    home = Home(Path(options.home))
    keys = ApiKeys(home.root / "keys.toml") if options.asks_for_keys else None
    reload_keys = [keys.reload] if keys else []

    def open_ranker(run: str) -> Ranker:
        return Ranker(
            load_artifact(home, run),
            SlowReader(USERS, ITEMS),
            toy_table(),
            toy_catalog(ITEMS),
            clock=lambda: NOW,
        )

    def open_app(_is_replacement: bool) -> OpenedApp:
        ranker = open_ranker(current_run(home))
        ranker.warm_up()
        deployment = Deployment(ranker, metrics=Metrics(folder))
        follower = HomeFollower(home, "embedded", deployment, open_ranker, interval_s=0.1)
        follower.start()
        app = create_app(
            deployment,
            directory=toy_directory(),
            events=EventList(),
            settings=AppSettings(keys=keys),
        )
        refresh = partial(look_again, [follower.wake, *reload_keys])
        return OpenedApp(app, ranker.manifest.run, refresh, follower.stop)

    def announce(url: str, run: str) -> None:
        print(json.dumps({"url": url, "run": run}), flush=True)  # noqa: T201

    configure_logs("json" if options.log_format == "json" else "text")
    run_server(
        open_app,
        host="127.0.0.1",
        port=0,
        announce=announce,
        workers=options.workers,
        on_hangup=partial(look_again, reload_keys),
        on_worker_gone=lambda process_id: forget_worker(folder, process_id) if folder else None,
    )


def stop_with_input() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=stop_with_input, daemon=True).start()
    given = Options(**json.loads(sys.argv[1]))
    with metrics_folder(given.workers) as shared:
        main(given, shared)
