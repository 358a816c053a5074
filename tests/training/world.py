"""A small world with a known answer: users click what reads like what they viewed."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from encoders.evidence import evidence_names
from encoders.split import DeepHalf
from encoders.table import EmbeddingTable
from feature_repo.behavior import behavior_id, hash63_array, item_key
from feature_repo.features import ItemFeatures, SceneSequence, UserFeatures
from feature_repo.home import Home
from feature_repo.manifest import DataManifest, Split
from training.config import BaheConfig
from training.recipes import Recipe, TrainingConfig
from training.schema import InputSchema
from training.sources import Sources

START = datetime(2024, 1, 1, tzinfo=UTC)
WIDTH = 16
LENGTH = 8
SCENES = ("buy", "view")
NUM_TOPICS = 8
ITEMS_PER_TOPIC = 6


def small_deep_half(num_layers: int | None = None) -> nn.Module:
    """Two BERT layers with fixed random weights; ``num_layers`` takes the first ones."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = BertConfig(
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            vocab_size=30,
            max_position_embeddings=32,
        )
        model = BertModel(config, add_pooling_layer=False)
    return DeepHalf(model, split_layer=1, num_layers=num_layers)


def small_bahe(**changes: object) -> BaheConfig:
    values: dict[str, object] = {
        "deep_length": LENGTH,
        "use_bfloat16": False,
        "output_width": 8,
        "num_bins": 4,
        "numeric_width": 2,
        "cross_rank": 4,
        "hidden": (16,),
        "dropout": 0.1,
        "num_kernels": 3,
        "num_age_scales": 2,
    }
    return BaheConfig(**(values | changes))  # type: ignore[arg-type]


def small_recipe(name: str = "bahe_tiny", **training: object) -> Recipe:
    values: dict[str, object] = {
        "epochs": 3,
        "batch_contexts": 16,
        "learning_rate": 5e-3,
        "deep_learning_rate": 1e-3,
        "warmup_steps": 5,
        "average_decay": 0.9,
    }
    return Recipe(
        name=name,
        model=small_bahe(),
        training=TrainingConfig(**(values | training)),  # type: ignore[arg-type]
        sequence_length=LENGTH,
    )


def small_schema() -> InputSchema:
    return InputSchema(
        scenes=SCENES,
        sequence_length=LENGTH,
        vector_width=WIDTH,
        user_dense_names=("view_total",),
        item_dense_names=("price", "view_count_90d"),
        context_names=("hour",),
        evidence_names=evidence_names(SCENES),
        category_vocabularies={"brand": ("a", "b")},
    )


def random_inputs(
    num_contexts: int, num_candidates: int, num_rows: int, *, seed: int = 0
) -> list[Tensor]:
    """Program inputs of :func:`small_schema`, the first context without any history."""
    generator = torch.Generator().manual_seed(seed)
    history = (num_contexts, len(SCENES), LENGTH)
    block = (num_contexts, num_candidates)

    def whole(high: int, shape: tuple[int, ...], low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    rows = whole(num_rows, history, 1)
    lengths = whole(LENGTH + 1, history[:2])
    lengths[0] = 0
    there = torch.arange(LENGTH) >= LENGTH - lengths.unsqueeze(-1)
    rows = rows * there
    dense = torch.randn((*block, 2), generator=generator)
    dense[0, 0, 0] = torch.nan
    table = torch.randn((num_rows, WIDTH), generator=generator)
    table[0] = 0
    return [
        table,
        rows,
        rows * 11,
        torch.rand(history, generator=generator) * 1e6 * there,
        lengths.float(),
        torch.randn((num_contexts, 1), generator=generator),
        candidates := whole(num_rows, block, 1),
        candidates * 11,
        dense,
        whole(3, (*block, 1)),
        torch.randn((*block, 1), generator=generator),
        _some_missing(torch.randn((*block, len(evidence_names(SCENES))), generator=generator)),
    ]


def _some_missing(values: Tensor) -> Tensor:
    values[values > 1] = torch.nan
    return values


class MemoryReader:
    """Features computed from a list of events in memory: strictly before the request."""

    sequence_length = 12

    def __init__(self, events: pd.DataFrame, texts: dict[str, int]) -> None:
        self._by_user = {
            user: rows.sort_values(["time", "item_id"]) for user, rows in events.groupby("user_id")
        }
        self._times_by_item = {
            item: np.sort(rows["time"].to_numpy()) for item, rows in events.groupby("item_id")
        }
        self._texts = texts
        keys = np.sort(hash63_array(np.array(list(texts), object)))
        following = dict(zip(keys.tolist(), np.roll(keys, -1).tolist(), strict=True))
        # The item whose key comes next, which has nothing to do with the topic.
        self._neighbors = {item: following[item_key(item)] for item in texts}

    def historical_users(self, user_ids: np.ndarray, request_times: np.ndarray) -> UserFeatures:
        num, length = len(user_ids), self.sequence_length
        arrays = {
            scene: [np.zeros((num, length), np.int64) for _ in range(3)] + [np.zeros(num, np.int64)]
            for scene in SCENES
        }
        dense = np.full((num, 1), np.nan, np.float32)
        for row, (user, time) in enumerate(zip(user_ids, request_times, strict=True)):
            known = self._by_user.get(user)
            if known is None:
                continue
            known = known[known["time"] < time]
            for scene in SCENES:
                rows = known[known["scene"] == scene]
                last = rows.tail(length)
                if len(last):
                    ids, keys, times, _ = arrays[scene]
                    ids[row, -len(last) :] = [self._texts[item] for item in last["item_id"]]
                    keys[row, -len(last) :] = [item_key(item) for item in last["item_id"]]
                    times[row, -len(last) :] = last["time"].to_numpy() // 1_000_000
                arrays[scene][3][row] = len(rows)
            dense[row] = arrays["view"][3][row]
        return UserFeatures(
            user_ids=user_ids,
            request_times=request_times,
            found=~np.isnan(dense[:, 0]),
            sequences={scene: SceneSequence(*parts) for scene, parts in arrays.items()},
            dense=dense,
            dense_names=("view_total",),
        )

    def historical_items(self, item_ids: np.ndarray, request_times: np.ndarray) -> ItemFeatures:
        counts = [
            np.searchsorted(self._times_by_item.get(item, np.array([])), time)
            for item, time in zip(item_ids, request_times, strict=True)
        ]
        known = np.array([item in self._texts for item in item_ids])
        dense = np.stack([np.where(known, 1.5, np.nan), np.array(counts, float)], axis=1)
        return ItemFeatures(
            item_ids=item_ids,
            request_times=request_times,
            found=known,
            item_keys=hash63_array(item_ids),
            text_ids=np.array([self._texts.get(item, 0) for item in item_ids], np.int64),
            dense=dense.astype(np.float32),
            dense_names=("price", "view_count_90d"),
            categorical={
                "brand": np.array(["ab"[hash63 % 2] for hash63 in hash63_array(item_ids)], object)
            },
            neighbor_keys=np.array(
                [self._neighbors.get(item, 0) for item in item_ids], np.int64
            ).reshape(-1, 1),
            neighbor_weights=np.full((len(item_ids), 1, 2), 0.5, np.float32),
        )

    def online_users(self, user_ids: np.ndarray, *, at: datetime | None = None) -> UserFeatures:
        assert at is not None
        return self.historical_users(user_ids, np.full(len(user_ids), microseconds(at)))

    def online_items(self, item_ids: np.ndarray, *, at: datetime | None = None) -> ItemFeatures:
        assert at is not None
        return self.historical_items(item_ids, np.full(len(item_ids), microseconds(at)))


def microseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1e6)


@dataclass(frozen=True)
class World:
    sources: Sources
    events: pd.DataFrame
    impressions: pd.DataFrame
    topic: dict[str, int]


def make_world(root: Path, *, num_users: int = 240, seed: int = 0) -> World:
    """Users who view items of one topic, then are shown four items and click the one of it.

    The clicked item was never viewed by the user, and all items are equally popular: neither ids
    nor popularity tell anything, the texts tell everything. Every twentieth user has no history.
    """
    generator = np.random.default_rng(seed)
    items = [f"item{i:03d}" for i in range(NUM_TOPICS * ITEMS_PER_TOPIC)]
    topic = {item: i // ITEMS_PER_TOPIC for i, item in enumerate(items)}
    texts = {item: behavior_id(f"thing {item}") for item in items}
    centers = generator.normal(size=(NUM_TOPICS, WIDTH))
    ids = np.array(sorted(texts.values()))
    item_of = {text: item for item, text in texts.items()}
    vectors = np.zeros((len(ids) + 1, WIDTH), np.float32)
    for row, text in enumerate(ids):
        noise = 0.3 * generator.normal(size=WIDTH)
        vectors[row + 1] = 2.0 + centers[topic[item_of[int(text)]]] + noise
    events, impressions = [], []
    for user in range(num_users):
        name, liked = f"user{user:03d}", user % NUM_TOPICS
        own = [item for item in items if topic[item] == liked]
        generator.shuffle(own)
        first_time = START + timedelta(hours=user)
        if user % 20:
            for step, item in enumerate(own[: 2 + user % 3]):
                time = first_time + timedelta(minutes=10 * step)
                events.append((name, time, "view", item))
        others = [item for item in items if topic[item] != liked]
        for request in range(2):
            time = first_time + timedelta(hours=2, minutes=request)
            shown = [own[-1 - request], *generator.choice(others, 3, replace=False)]
            split = "train" if user < num_users * 0.7 else "valid"
            split = "test" if user >= num_users * 0.85 else split
            for place, item in enumerate(shown):
                click = int(place == 0)
                impressions.append((f"{user}-{request}", name, item, time, click, split, 12.0))
    event_frame = pd.DataFrame(events, columns=["user_id", "event_timestamp", "scene", "item_id"])
    impression_frame = pd.DataFrame(
        impressions,
        columns=["request_id", "user_id", "item_id", "event_timestamp", "clicked", "split", "hour"],
    )
    for frame in (event_frame, impression_frame):  # as ingest writes them
        frame["event_timestamp"] = frame["event_timestamp"].astype("datetime64[us, UTC]")
    event_frame["time"] = [microseconds(t) for t in event_frame["event_timestamp"]]
    home = Home(root)
    home.events.mkdir(parents=True)
    event_frame.drop(columns="time").to_parquet(home.events / "part-00000.parquet")
    impression_frame.to_parquet(home.impressions)
    pd.DataFrame({"item_id": items, "event_timestamp": START, "text_id": list(texts.values())}
    ).to_parquet(home.items)  # fmt: skip
    pd.DataFrame({"behavior_id": ids, "text": [f"thing {item_of[i]}" for i in ids]}).to_parquet(
        home.behaviors
    )
    last = event_frame["event_timestamp"].max().to_pydatetime()
    manifest = DataManifest(
        dataset="small",
        scenes=SCENES,
        item_columns=(),
        context_columns=("hour",),
        impressions="logged",
        negatives=None,
        split=Split(valid=START + timedelta(hours=168), test=START + timedelta(hours=204)),
        replay=True,
        lowercase=True,
        availability_delay_us=1,
        label_delay_us=0,
        num_events=len(event_frame),
        num_users=num_users,
        num_items=len(items),
        num_behaviors=len(ids),
        num_impressions=len(impression_frame),
        num_rejected=0,
        first_event=START,
        last_event=last,
        num_buckets=1,
        source_fingerprint="small",
    )
    manifest.save(home.manifest)
    sources = Sources(
        home=home,
        manifest=manifest,
        reader=MemoryReader(event_frame, texts),
        table=EmbeddingTable(ids, vectors, "table-1"),
        deep_half=small_deep_half,
    )
    return World(sources, event_frame, impression_frame, topic)
