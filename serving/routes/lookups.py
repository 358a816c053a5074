"""Users and items: what the store knows of them, what is like them, and how to find them."""

from typing import Annotated

from fastapi import FastAPI, HTTPException, Path, Query

from serving.event_rules import MAX_ID_LENGTH
from serving.rendering import similar_answer, user_answer
from serving.responses import FoundItems, FoundUsers, ItemEntry, SimilarResponse, UserResponse
from serving.schemas import MAX_FOUND, MAX_TOP_K, Identifier
from serving.service import FAILURES, Json, Service, encoded

_UserId = Annotated[
    Identifier, Path(description=f"At most {MAX_ID_LENGTH} characters", examples=["14911"])
]
_ItemId = Annotated[
    Identifier, Path(description=f"At most {MAX_ID_LENGTH} characters", examples=["85123A"])
]
_Limit = Annotated[int, Query(ge=1, le=MAX_FOUND, description="Most to return")]
_NOT_KNOWN = "no such item in the data set"


def add_users(app: FastAPI, service: Service) -> None:
    """Add the addresses of users."""

    @app.get(
        "/v1/users",
        response_model=FoundUsers,
        responses=FAILURES,
        summary="Find users of the data set",
        tags=["users"],
    )
    async def find_users(
        prefix: Annotated[
            Identifier | None,
            Query(description="How their ids begin; left out: any", examples=["149"]),
        ] = None,
        limit: _Limit = 20,
    ) -> Json:
        find = service.directory.users
        return Json({"users": await service.work.run(lambda: find(prefix or "", limit))})

    # ":path", because an id may hold a slash.
    @app.get(
        "/v1/users/{user_id:path}",
        response_model=UserResponse,
        responses=FAILURES,
        summary="What the online store knows of a user",
        tags=["users"],
    )
    async def user(user_id: _UserId) -> Json:
        ranker = service.deployment.ranker()
        return Json(
            await service.work.run(lambda: encoded(user_answer(user_id, ranker.user(user_id))))
        )


def add_items(app: FastAPI, service: Service) -> None:
    """Add the addresses of items."""

    @app.get(
        "/v1/items",
        response_model=FoundItems,
        responses=FAILURES,
        summary="Find items by title",
        tags=["items"],
    )
    async def find_items(
        query: Annotated[
            Identifier,
            Query(description="Words of the title, or how the id begins", examples=["heart"]),
        ],
        limit: _Limit = 20,
    ) -> Json:
        found = await service.work.run(lambda: service.directory.items(query, limit))
        return Json({"items": [{"item_id": item_id, "text": text} for item_id, text in found]})

    # Before the item itself, whose id may hold a slash too.
    @app.get(
        "/v1/items/{item_id:path}/similar",
        response_model=SimilarResponse,
        responses=FAILURES,
        summary="Items near one, by the model's vectors",
        tags=["items"],
    )
    async def similar(
        item_id: _ItemId,
        top_k: Annotated[int, Query(ge=1, le=MAX_TOP_K, description="Most to return")] = 10,
    ) -> Json:
        ranker = service.deployment.ranker()
        found = await service.work.run(lambda: ranker.similar(item_id, top_k=top_k))
        return Json(similar_answer(item_id, found))

    @app.get(
        "/v1/items/{item_id:path}",
        response_model=ItemEntry,
        responses=FAILURES,
        summary="An item of the data set",
        tags=["items"],
    )
    async def item(item_id: _ItemId) -> Json:
        title = await service.work.run(lambda: service.directory.title(item_id))
        if title is None:
            raise HTTPException(404, _NOT_KNOWN)
        return Json({"item_id": item_id, "text": title})
