"""What a user would build instead: `feast serve` for features, and a plain FastAPI model server.

For every request it asks Feast's own feature server, over HTTP, for the user and all candidates,
makes the model's inputs with the same code as training, and runs the same exported program. It
gives ids and scores: no texts, no reasons. ``--keep-items`` reads the items once, when it starts,
as a user does who has found out what they cost::

    python -m benchmarks.rival_server --home HOME --feast-url http://127.0.0.1:6566 --port 8090
"""

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import torch
import uvicorn
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import BaseModel, Field

from encoders.evidence import candidate_evidence
from encoders.inputs import ItemInputs, item_inputs, user_inputs
from encoders.loaded_artifact import load_artifact
from encoders.table import EmbeddingTable
from feature_repo.artifact import current_run
from feature_repo.catalog import Catalog
from feature_repo.columns import Column, Columns, Ragged
from feature_repo.home import Home
from feature_repo.reader import FeatureReader
from feature_repo.view_reader import ReadView

_CHUNK = 500
"""Items in one question to the feature server."""


class RankRequest(BaseModel):
    """As in :class:`serving.schemas.RankRequest`, the part that is measured."""

    user_id: str
    candidates: list[str] = Field(min_length=1, max_length=1000)
    top_k: int = Field(10, ge=1, le=1000)


class FeatureServer:
    """Asks `feast serve`.

    Args:
        url: Its address.
        reader: Knows which features the model reads, and gives them their form; it reads nothing.
    """

    def __init__(self, url: str, reader: FeatureReader) -> None:
        self._client = httpx.AsyncClient(
            base_url=url, timeout=30, headers={"content-type": "application/json"}
        )
        self._reader = reader

    async def users(self, ids: Sequence[str]) -> bytes:
        """Answer for users."""
        return await self._ask("user_id", ids, self._reader._user_views)

    async def items(self, ids: Sequence[str]) -> bytes:
        """Answer for items."""
        return await self._ask("item_id", ids, self._reader._item_views)

    async def _ask(self, key: str, ids: Sequence[str], views: Sequence[ReadView]) -> bytes:
        question = {
            "features": [f"{view.name}:{name}" for view in views for name in view.kinds],
            "entities": {key: list(ids)},
            "full_feature_names": True,
        }
        answer = await self._client.post("/get-online-features", content=orjson.dumps(question))
        answer.raise_for_status()
        return answer.content

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


class Model:
    """The exported program over what the feature server answered.

    Args:
        home: Where the run, its vectors and the registry's profile are.
        profile: Whose registry tells the features.
        threads: Of one call of the program.
    """

    def __init__(self, home: Home, profile: str, *, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        artifact = load_artifact(home, current_run(home))
        self.reader = FeatureReader(home, profile)
        self.manifest = artifact.manifest
        self._program = artifact.score
        self._table = EmbeddingTable.open(home, fingerprint=self.manifest.encoder_fingerprint)
        self._vectors = torch.from_numpy(self._table.vectors)

    def items(self, ids: Sequence[str], answer: bytes) -> ItemInputs:
        """The program's item side, one row per id."""
        columns = columns_of(answer, self.reader._item_views)
        times = self.reader.request_times(len(ids))
        features = self.reader._items(np.array(ids, dtype=object), times, columns)
        return item_inputs(features, self._table, vocabularies=self.manifest.category_vocabularies)

    def rank(self, request: RankRequest, answer: bytes, items: ItemInputs) -> bytes:
        """JSON of the best items, scored for the user whose features ``answer`` holds."""
        columns = columns_of(answer, self.reader._user_views)
        ids = np.array([request.user_id], dtype=object)
        users = self.reader._users(ids, self.reader.request_times(1), columns)
        user = user_inputs(users, self._table, scenes=self.manifest.scenes)
        # What the run does not read is not computed, as by ours.
        evidence = candidate_evidence(user, 0, items, self._table, self.manifest.evidence_kinds)
        newest = user.last(self.manifest.sequence_length)
        context = np.full(
            (len(request.candidates), len(self.manifest.context_names)), np.nan, dtype=np.float32
        )
        of_user = (
            newest.history_rows,
            newest.history_item_keys,
            newest.history_ages,
            newest.history_totals,
            newest.user_dense,
        )
        of_items = (
            items.candidate_rows,
            items.candidate_item_keys,
            items.candidate_dense,
            items.candidate_categories,
            context,
            evidence,
        )
        with torch.inference_mode():
            logits = self._program(
                self._vectors,
                *(torch.from_numpy(np.ascontiguousarray(array)) for array in of_user),
                *(torch.from_numpy(np.ascontiguousarray(array))[None] for array in of_items),
            )[0]
            scores, order = logits.sigmoid().sort(descending=True, stable=True)
        ranked = [
            {"item_id": request.candidates[place], "score": score}
            for score, place in zip(
                scores[: request.top_k].tolist(), order[: request.top_k].tolist(), strict=True
            )
        ]
        return orjson.dumps({"user_id": request.user_id, "ranked": ranked})


def columns_of(answer: bytes, views: Sequence[ReadView]) -> dict[str, Columns]:
    """View -> the columns of a JSON answer of `feast serve`."""
    document = orjson.loads(answer)
    names = document["metadata"]["feature_names"]
    results = dict(zip(names, document["results"], strict=True))
    columns = {}
    for view in views:
        values: dict[str, Column] = {}
        present = np.zeros(len(document["results"][0]["values"]), dtype=bool)
        for name, kind in view.kinds.items():
            found = results[f"{view.name}__{name}"]["values"]
            present |= [value is not None for value in found]
            values[name] = _column(found, kind)
        columns[view.name] = Columns(present, values)
    return columns


def _column(values: list[Any], kind: str) -> Column:
    if kind.endswith("_list_val"):
        dtype: Any = np.int64 if kind == "int64_list_val" else np.float32
        lists = [value or [] for value in values]
        lengths = np.array([len(one) for one in lists], dtype=np.int64)
        return Ragged(np.array([x for one in lists for x in one], dtype=dtype), lengths)
    if kind == "int64_val":
        return np.array([value or 0 for value in values], dtype=np.int64)
    if kind == "string_val":
        return np.array(values, dtype=object)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def create_app(model: Model, feast_url: str, *, keep_items: bool) -> FastAPI:
    """The model server.

    Args:
        model: Ready to rank.
        feast_url: Address of `feast serve`.
        keep_items: Read every item once, at the start.
    """
    features = FeatureServer(feast_url, model.reader)
    kept: dict[str, int] = {}
    catalogue: list[ItemInputs] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if keep_items:
            ids = [str(item_id) for item_id in Catalog.load(model.reader.home).item_ids]
            parts = []
            for start in range(0, len(ids), _CHUNK):
                some = ids[start : start + _CHUNK]
                parts.append(model.items(some, await features.items(some)))
            catalogue.append(
                ItemInputs(
                    **{
                        name: np.concatenate([getattr(part, name) for part in parts])
                        for name in ItemInputs.__dataclass_fields__
                    }
                )
            )
            kept.update({item_id: row for row, item_id in enumerate(ids)})
        yield
        await features.close()

    app = FastAPI(lifespan=lifespan)

    @app.post("/rank")
    async def rank(request: RankRequest) -> Response:
        if keep_items:
            answer = await features.users([request.user_id])
            rows = np.array([kept[item_id] for item_id in request.candidates])
            items = catalogue[0].take(rows)
            body = await run_in_threadpool(model.rank, request, answer, items)
        else:
            answer, of_items = await asyncio.gather(
                features.users([request.user_id]), features.items(request.candidates)
            )

            def score() -> bytes:
                return model.rank(request, answer, model.items(request.candidates, of_items))

            body = await run_in_threadpool(score)
        return Response(body, media_type="application/json")

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--profile", default="production")
    parser.add_argument("--feast-url", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep-items", action="store_true")
    options = parser.parse_args()
    model = Model(Home(options.home), options.profile, threads=options.threads)
    app = create_app(model, options.feast_url, keep_items=options.keep_items)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
