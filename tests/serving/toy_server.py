"""The process that ``test_server`` starts: the real server over the toy shop.

Arguments: folder of the home, host, port, seconds that the reading of a user takes.
"""

import json
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from feature_repo.features import UserFeatures
from feature_repo.home import Home
from serving.artifact import load_artifact
from serving.ranker import Ranker
from serving.server import run_server
from tests.serving.conftest import ITEMS, NOW, RUN, USERS, ToyReader, toy_catalog, toy_table


class SlowReader(ToyReader):
    """Takes its time over the user "slow", so that a stop can find a request running."""

    delay_s = 0.0

    def online_users(
        self, user_ids: NDArray[np.object_], *, at: datetime | None = None
    ) -> UserFeatures:
        if "slow" in user_ids:
            time.sleep(self.delay_s)
        return super().online_users(user_ids, at=at)


def main(home: str, host: str, port: str, delay_s: str) -> None:
    reader = SlowReader(USERS, ITEMS)
    reader.delay_s = float(delay_s)

    def open_ranker() -> Ranker:
        return Ranker(
            load_artifact(Home(Path(home)), RUN),
            reader,
            toy_table(),
            toy_catalog(ITEMS),
            clock=lambda: NOW,
        )

    def announce(url: str, ranker: Ranker) -> None:
        print(json.dumps({"url": url, "run": ranker.manifest.run}), flush=True)  # noqa: T201

    run_server(open_ranker, host=host, port=int(port), announce=announce)


if __name__ == "__main__":
    main(*sys.argv[1:])
