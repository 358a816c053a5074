"""The real application over the toy shop, in a thread of this process, for a browser to ask."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from socket import create_server

import numpy as np
import uvicorn
from numpy.typing import NDArray

from feature_repo.errors import StoreError
from feature_repo.features import UserFeatures
from serving.app import AppSettings, create_app
from serving.deployment import Deployment
from tests.serving.conftest import ITEMS, USERS, ToyReader, World, toy_manifest
from tests.serving.stand_in import toy_directory

METRICS = {
    "test": {"auc": 0.7756, "auc_low": 0.7639, "auc_high": 0.7869, "num_rows": 100_000},
    "valid": {"auc": 0.7956, "auc_low": 0.785, "auc_high": 0.8067, "num_rows": 50_000},
}
START_TIMEOUT_S = 30


class SwitchableReader(ToyReader):
    """A store that can be away."""

    is_away = False

    def online_users(
        self, user_ids: NDArray[np.object_], *, at: datetime | None = None
    ) -> UserFeatures:
        if self.is_away:
            raise StoreError("the online store does not answer: start it")
        return super().online_users(user_ids, at=at)


@dataclass
class Site:
    """A running server."""

    url: str
    reader: SwitchableReader


@contextmanager
def running_site(world: World, settings: AppSettings | None = None) -> Iterator[Site]:
    """Serve ``world`` with a reader of its own until the block ends."""
    reader = SwitchableReader(USERS, ITEMS)
    artifact = replace(world.artifact, manifest=toy_manifest(metrics=METRICS))
    ranker = replace(world, reader=reader).ranker(artifact)
    ranker.warm_up()
    # What the page says of the store is that of now, not of a test before.
    settings = replace(settings or AppSettings(), check_age_s=0)
    app = create_app(Deployment(ranker), directory=toy_directory(), settings=settings)
    with create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
        # A daemon: it ends with the process, whatever ends that.
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield Site(f"http://127.0.0.1:{listener.getsockname()[1]}", reader)
        finally:
            server.should_exit = True
            thread.join(START_TIMEOUT_S)
