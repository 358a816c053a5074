"""Are the features that serving reads those that training reads? Compared value by value."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from feature_repo.catalog import Catalog
from feature_repo.features import ItemFeatures, UserFeatures
from feature_repo.home import Home
from feature_repo.progress import Progress, silent
from feature_repo.reader import FeatureReader

_FIRST_DIFFERENCES = 20


@dataclass
class ParityReport:
    """Outcome of a comparison.

    Args:
        num_users: Users compared.
        num_items: Items compared.
        num_behaviors: Behaviour vectors compared.
        compared_values: Numbers and words compared, list elements one by one.
        mismatches: How many differ.
        differences: The first of them.
    """

    num_users: int
    num_items: int
    num_behaviors: int
    compared_values: int = 0
    mismatches: int = 0
    differences: list[dict[str, Any]] = field(default_factory=list)

    def compare(
        self, name: str, keys: NDArray[Any], offline: NDArray[Any], online: NDArray[Any]
    ) -> None:
        """Count equal and different values of one field; NaN equals NaN, bits must agree."""
        if offline.shape != online.shape:
            raise ValueError(f"{name}: shapes differ, {offline.shape} and {online.shape}")
        equal = offline == online
        if offline.dtype.kind == "f":
            equal |= np.isnan(offline) & np.isnan(online)
        self.compared_values += offline.size
        self.mismatches += int((~equal).sum())
        for place in np.argwhere(~equal)[: _FIRST_DIFFERENCES - len(self.differences)]:
            index = tuple(place)
            self.differences.append(
                {
                    "feature": name,
                    "key": str(keys[place[0]]),
                    "position": [int(p) for p in place[1:]],
                    "offline": str(offline[index]),
                    "online": str(online[index]),
                }
            )


def check_parity(
    home: Home, profile: str, *, sample: int, progress: Progress = silent
) -> ParityReport:
    """Compare offline features as of now with online ones, for ``sample`` keys of each kind.

    Offline means Feast's own historical join. Keys are chosen by their hash, so that every run
    looks at the same ones, and an unknown user and item are among them.
    """
    reader = FeatureReader(home, profile)
    now = reader.manifest.now()
    events = sorted(home.events.glob("*.parquet"))
    users = _sample({u for f in events for u in _column(f, "user_id")}, sample)
    items = _sample(Catalog.load(home).item_ids, sample)
    behaviors = np.array(
        _sample(pq.read_table(home.behaviors, columns=["behavior_id"])[0].to_pylist(), sample),
        dtype=np.int64,
    )
    users, items = np.append(users, "no such user"), np.append(items, "no such item")
    report = ParityReport(len(users), len(items), len(behaviors))

    user_times = reader.request_times(len(users), now)
    offline_users = reader.historical_users(users, user_times, join="feast")
    _compare_all(report, users, offline_users, reader.online_users(users, at=now))
    progress(1, 3)
    item_times = reader.request_times(len(items), now)
    offline_items = reader.historical_items(items, item_times, join="feast")
    _compare_all(report, items, offline_items, reader.online_items(items, at=now))
    progress(1, 3)
    report.compare(
        "embedding",
        behaviors,
        reader.vectors(behaviors, source="offline", at=now),
        reader.vectors(behaviors, source="online", at=now),
    )
    progress(1, 3)
    return report


def _column(file: Any, name: str) -> list[Any]:
    values: list[Any] = pq.read_table(file, columns=[name])[name].unique().to_pylist()
    return values


def _sample(keys: Iterable[Any], number: int) -> NDArray[np.object_]:
    """The ``number`` keys with the smallest hashes."""
    ordered = sorted(set(keys), key=lambda k: hashlib.blake2b(str(k).encode()).digest())
    return np.array(ordered[:number], dtype=object)


def _compare_all(
    report: ParityReport,
    keys: NDArray[np.object_],
    offline: UserFeatures | ItemFeatures,
    online: UserFeatures | ItemFeatures,
) -> None:
    pairs = zip(_arrays(offline), _arrays(online), strict=True)
    for (name, values), (other_name, other_values) in pairs:
        assert name == other_name
        report.compare(name, keys, values, other_values)


def _arrays(features: UserFeatures | ItemFeatures) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every array that a model can see, by name."""
    yield "found", features.found
    for number, name in enumerate(features.dense_names):
        yield name, features.dense[:, number]
    if isinstance(features, UserFeatures):
        for scene, sequence in features.sequences.items():
            yield f"{scene}_behavior_ids", sequence.behavior_ids
            yield f"{scene}_item_keys", sequence.item_keys
            yield f"{scene}_timestamps", sequence.timestamps
            yield f"{scene}_total", sequence.total
    else:
        yield "text_id", features.text_ids
        yield "neighbor_keys", features.neighbor_keys
        yield "neighbor_weights", features.neighbor_weights
        yield from features.categorical.items()
