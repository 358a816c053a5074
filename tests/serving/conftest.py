"""A shop small enough to rank by hand: its store, its vectors, and an exported program.

``ToyModel`` is a formula, so that every test can compute the right answer without torch.
"""

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from encoders.evidence import evidence_names
from encoders.loaded_artifact import Artifact, load_artifact
from encoders.table import EmbeddingTable
from feature_repo.artifact import PROGRAM_INPUTS, ArtifactManifest
from feature_repo.behavior import behavior_id, item_key
from feature_repo.catalog import Catalog
from feature_repo.features import ItemFeatures, SceneSequence, UserFeatures
from feature_repo.home import Home
from serving.preparation import RankerConfig
from serving.ranker import Ranker

NOW = datetime(2024, 6, 1, 12, tzinfo=UTC)
SCENES = ("purchase", "search")
KEPT = 6  # N, behaviours that the store keeps
READ = 4  # M, behaviours that the model reads
FINGERPRINT = "toy-encoder"
RUN = "toy-run"
EVIDENCE = evidence_names(SCENES)
NEAR_WEIGHT = 0.25
"""Of an item's neighbour, over baskets; over users half of that."""

VECTORS = {
    # lamps, boats, and one thing that is like nothing else
    "red lamp": (1.0, 0.0, 0.0, 0.0),
    "green lamp": (0.96, 0.28, 0.0, 0.0),
    "sail boat": (0.0, 1.0, 0.0, 0.0),
    "row boat": (0.0, 0.96, 0.28, 0.0),
    "anvil": (0.0, 0.0, 0.0, 1.0),
    "looking for a lamp": (0.8, 0.6, 0.0, 0.0),
}


@dataclass(frozen=True)
class ToyItem:
    text: str
    price: float = 1.0
    kind: str | None = "lamp"
    recent: float = 0.0
    near: str | None = None


@dataclass(frozen=True)
class ToyUser:
    """Events are (scene, text, item id or None, days ago), oldest first."""

    events: tuple[tuple[str, str, str | None, float], ...] = ()
    activity: float = float("nan")


ITEMS = {
    "L1": ToyItem("red lamp", price=2.0, recent=9),
    "L2": ToyItem("green lamp", price=1.0),
    "B1": ToyItem("sail boat", price=1.0, kind="boat"),
    "B2": ToyItem("row boat", price=1.0, kind="boat", near="B1"),
    # Two of one text, one price and one kind: they tie for everyone.
    "A2": ToyItem("anvil", price=float("nan"), kind=None),
    "A1": ToyItem("anvil", price=float("nan"), kind=None),
}
USERS = {
    "ann": ToyUser(
        (
            ("purchase", "red lamp", "L1", 40),
            ("search", "looking for a lamp", None, 20),
            ("purchase", "red lamp", "L1", 12),
        ),
        activity=0.5,
    ),
    "bob": ToyUser((("purchase", "sail boat", "B1", 3),), activity=0.25),
    "idle": ToyUser(activity=0.125),
}


class ToyReader:
    """The online store: columns in another order than the model's, and it counts its reads."""

    def __init__(self, users: Mapping[str, ToyUser], items: Mapping[str, ToyItem]) -> None:
        self.users = dict(users)
        self.items = dict(items)
        self.item_reads: list[int] = []
        self.item_dense_names = ("purchase_count_30d", "price")
        self.user_dense_names = ("activity",)

    def online_users(
        self, user_ids: NDArray[np.object_], *, at: datetime | None = None
    ) -> UserFeatures:
        at = at or NOW
        rows = [self.users.get(user_id, ToyUser()) for user_id in user_ids]
        return UserFeatures(
            user_ids=user_ids,
            request_times=_micros(at, len(rows)),
            found=np.array([user_id in self.users for user_id in user_ids], dtype=bool),
            sequences={scene: self._sequence(rows, scene) for scene in SCENES},
            dense=np.array([[row.activity] for row in rows], dtype=np.float32),
            dense_names=self.user_dense_names,
        )

    def online_items(
        self, item_ids: NDArray[np.object_], *, at: datetime | None = None
    ) -> ItemFeatures:
        self.item_reads.append(len(item_ids))
        nothing = ToyItem("", price=float("nan"), kind=None, recent=float("nan"))
        rows = [self.items.get(item_id, nothing) for item_id in item_ids]
        return ItemFeatures(
            item_ids=item_ids,
            request_times=_micros(at or NOW, len(rows)),
            found=np.array([item_id in self.items for item_id in item_ids], dtype=bool),
            item_keys=np.array([item_key(item_id) for item_id in item_ids], dtype=np.int64),
            text_ids=np.array([behavior_id(r.text) if r.text else 0 for r in rows], dtype=np.int64),
            dense=np.array([[r.recent, r.price] for r in rows], dtype=np.float32).reshape(-1, 2),
            dense_names=self.item_dense_names,
            categorical={"kind": np.array([r.kind for r in rows], dtype=object)},
            neighbor_keys=np.array([[0, item_key(r.near)] for r in rows]).reshape(-1, 2),
            neighbor_weights=np.array(
                [[(0, 0), (NEAR_WEIGHT, NEAR_WEIGHT / 2)] for _ in rows], dtype=np.float32
            ).reshape(-1, 2, 2),
        )

    def _sequence(self, rows: list[ToyUser], scene: str) -> SceneSequence:
        arrays = np.zeros((3, len(rows), KEPT), dtype=np.int64)
        total = np.zeros(len(rows), dtype=np.int64)
        for r, row in enumerate(rows):
            events = [event for event in row.events if event[0] == scene]
            total[r] = len(events)
            kept = events[-KEPT:]
            for i, (_, text, item_id, days) in enumerate(kept, start=KEPT - len(kept)):
                seconds = int((NOW - timedelta(days=days)).timestamp())
                arrays[:, r, i] = behavior_id(text), item_key(item_id), seconds
        return SceneSequence(arrays[0], arrays[1], arrays[2], total=total)


def toy_table(fingerprint: str = FINGERPRINT, width: int = 4) -> EmbeddingTable:
    """Vectors by hand, below the zero vector; wider ones are filled with zeros."""
    texts = sorted(VECTORS, key=behavior_id)
    ids = np.array([behavior_id(text) for text in texts], dtype=np.int64)
    vectors = np.zeros((len(texts) + 1, width), dtype=np.float32)
    vectors[1:, :4] = [VECTORS[text] for text in texts]
    return EmbeddingTable(ids, vectors, fingerprint)


def toy_catalog(items: Mapping[str, ToyItem]) -> Catalog:
    """Texts of all behaviours, and the items with one more that the store does not know."""
    titles = {item_id: behavior_id(item.text) for item_id, item in items.items()}
    titles["GONE"] = behavior_id("anvil")
    return Catalog(
        item_ids=np.array(sorted(titles), dtype=object),
        title_ids=titles,
        text_by_id={behavior_id(text): text for text in VECTORS},
    )


class ToyModel(nn.Module):
    """Logit = text match + exact matches + price + kind + user activity + context, minus 1.

    Of the evidence it adds half of how often all that is kept holds the candidate, and the sum of
    the weights of the basket's neighbours.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = [EVIDENCE.index(f"same_{scene}_count") for scene in SCENES]
        self.near = EVIDENCE.index("near_basket_sum")
        self.bias = nn.Parameter(torch.tensor(-1.0))

    def forward(
        self,
        table: Tensor,
        history_rows: Tensor,
        history_item_keys: Tensor,
        history_ages: Tensor,
        history_totals: Tensor,
        user_dense: Tensor,
        candidate_rows: Tensor,
        candidate_item_keys: Tensor,
        candidate_dense: Tensor,
        candidate_categories: Tensor,
        context: Tensor,
        evidence: Tensor,
    ) -> Tensor:
        freshness = torch.exp(-history_ages / 864_000.0) * (history_rows > 0)
        taste = (table[history_rows] * freshness[..., None]).sum(dim=(1, 2))
        text = torch.einsum("bd,bcd->bc", taste, table[candidate_rows])
        keys = history_item_keys.flatten(1)[:, None, :]
        exact = (candidate_item_keys[:, :, None] == keys).sum(-1)
        price = torch.nan_to_num(candidate_dense[..., 0])
        kind = candidate_categories[..., 0]
        activity = torch.nan_to_num(user_dense)[:, :1] * history_totals.sum(1, keepdim=True)
        return (
            (text + exact - 0.125 * price + 0.0625 * kind + activity)
            + torch.nan_to_num(context)[..., 0]
            + 0.5 * torch.nan_to_num(evidence[..., self.counts]).sum(-1)
            + evidence[..., self.near]
            + self.bias
        )


def expected_logit(user: ToyUser, item_id: str, item: ToyItem, slot: float = 0.0) -> float:
    """The formula of :class:`ToyModel` over the plain data, last READ behaviours per scene.

    The evidence counts the last KEPT.
    """
    logit = -1.0 + slot - 0.125 * np.nan_to_num(item.price)
    logit += 0.0625 * {"lamp": 1, "boat": 2}.get(item.kind or "", 0)
    logit += float(np.nan_to_num(user.activity)) * len(user.events)
    for scene in SCENES:
        for _, text, event_item, days in [e for e in user.events if e[0] == scene][-READ:]:
            match = float(np.dot(VECTORS[text], VECTORS[item.text]))
            logit += match * float(np.exp(-days / 10)) + (event_item == item_id)
    kept = [e for scene in SCENES for e in [e for e in user.events if e[0] == scene][-KEPT:]]
    logit += 0.5 * sum(event_item == item_id for *_, event_item, _ in kept)
    if item.near and item.near in {event_item for *_, event_item, _ in kept}:
        logit += NEAR_WEIGHT
    return float(logit)


def toy_manifest(**changes: Any) -> ArtifactManifest:
    values: dict[str, Any] = {
        "run": RUN,
        "created": NOW,
        "dataset": "toy-shop",
        "source_fingerprint": "toy-source",
        "feature_service": "ctr_v1",
        "scenes": SCENES,
        "sequence_length": READ,
        "user_dense_names": ("activity",),
        "item_dense_names": ("price", "purchase_count_30d"),
        "context_names": ("slot",),
        "evidence_names": EVIDENCE,
        "category_vocabularies": {"kind": ("lamp", "boat")},
        "encoder_fingerprint": FINGERPRINT,
        "encoder_width": 4,
        "recipe": "toy",
        "config": {},
        "seed": 0,
        "git_revision": None,
        "versions": {},
        "train_start": NOW,
        "train_end": NOW,
        "metrics": {},
    }
    return ArtifactManifest.model_validate(values | changes)


def export_program(model: nn.Module, *, keep_examples: bool = False) -> bytes:
    """What training writes: the program without example inputs, B, C and V dynamic."""
    batch, candidates, rows = torch.export.Dim("B"), torch.export.Dim("C"), torch.export.Dim("V")
    b, c, s = 3, 5, len(SCENES)
    example = (
        torch.zeros(7, 4),
        torch.zeros((b, s, READ), dtype=torch.int64),
        torch.zeros((b, s, READ), dtype=torch.int64),
        torch.zeros(b, s, READ),
        torch.zeros(b, s),
        torch.zeros(b, 1),
        torch.zeros((b, c), dtype=torch.int64),
        torch.zeros((b, c), dtype=torch.int64),
        torch.zeros(b, c, 2),
        torch.zeros((b, c, 1), dtype=torch.int64),
        torch.zeros(b, c, 1),
        torch.zeros(b, c, len(EVIDENCE)),
    )
    sizes: dict[str, Any] = {"table": {0: rows}}
    for name in PROGRAM_INPUTS[1:]:
        of_item = name.startswith("candidate") or name in ("context", "evidence")
        sizes[name] = {0: batch, 1: candidates} if of_item else {0: batch}
    program = torch.export.export(model.eval(), example, dynamic_shapes=sizes)
    if not keep_examples:
        program._example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def rewritten(
    archive: bytes,
    change: Callable[[str, bytes], bytes],
    *,
    extra: Mapping[str, bytes] | None = None,
) -> bytes:
    """A copy of a zip whose members went through ``change``, with further members at the end."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, content in (extra or {}).items():
            new.writestr(name, content)
    return buffer.getvalue()


def write_run(home: Home, program: bytes, manifest: ArtifactManifest | None = None) -> None:
    """An artifact folder as training leaves it, and current."""
    folder = home.runs / RUN
    folder.mkdir(parents=True, exist_ok=True)
    (manifest or toy_manifest()).save(folder / "manifest.json")
    (folder / "score.pt2").write_bytes(program)
    (home.runs / "current.json").write_text(json.dumps({"run": RUN}))


@dataclass
class World:
    """Everything a ranker needs, each part replaceable; the run also lies in ``home``."""

    home: Home
    program: bytes
    artifact: Artifact
    reader: ToyReader = field(default_factory=lambda: ToyReader(USERS, ITEMS))
    table: EmbeddingTable = field(default_factory=toy_table)
    now: datetime = NOW

    @property
    def folder(self) -> Path:
        return self.home.runs / RUN

    def ranker(self, artifact: Artifact | None = None, **config: Any) -> Ranker:
        return Ranker(
            artifact or self.artifact,
            self.reader,
            self.table,
            toy_catalog(self.reader.items),
            clock=lambda: self.now,
            config=RankerConfig(**config),
        )


def _micros(at: datetime, num_rows: int) -> NDArray[np.int64]:
    return np.full(num_rows, int(at.timestamp()) * 1_000_000, dtype=np.int64)


@pytest.fixture(scope="session")
def toy_program() -> bytes:
    return export_program(ToyModel())


@pytest.fixture(scope="session")
def toy_artifact(toy_program: bytes, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    home = Home(tmp_path_factory.mktemp("toy"))
    write_run(home, toy_program)
    return load_artifact(home, RUN)


@pytest.fixture
def world(tmp_path: Path, toy_program: bytes, toy_artifact: Artifact) -> World:
    home = Home(tmp_path)
    write_run(home, toy_program)
    return World(home, toy_program, toy_artifact)
