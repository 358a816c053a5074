"""What the users of the generated shop did: sessions of searches that often end in a basket.

A session has a need, the kind of thing looked for. Its one to three searches name the kind, mostly
a theme and sometimes a family of materials, drawn with probability ``softmax(1.6 taste)`` and
``softmax(1.6 liking)``. Seven of ten sessions end in a basket of one to five different items, all
at the same microsecond, drawn without replacement from 32 candidates with probability
``softmax(1.6 utility)``; the candidates are drawn by demand and by the needed kind, not by taste.

Shapes: S = sessions, E = events, C = candidates. Times: see :mod:`.shop_model`.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from feature_repo.shop_model import (
    DAY_US,
    Catalogue,
    Ints,
    Shoppers,
    Timeline,
    between,
    choose,
    gumbel,
    repeated,
    utility,
)
from feature_repo.shop_texts import KIND_FAMILIES, KINDS, NONE, Attributes, queries

SECOND_US = 1_000_000
SHARPNESS = 1.6
"""How closely behaviour follows utility: the inverse temperature of its softmax."""
MAX_SESSION_EVENTS = 8
_SEARCH_SHARES = (0.6, 0.3, 0.1)  # of sessions with 1, 2, 3 searches
_BASKET_SHARES = (0.3, 0.28, 0.18, 0.12, 0.08, 0.04)  # of sessions with 0, 1, ... 5 items
_NUM_CANDIDATES = 32
_CHUNK = 50_000
"""Sessions whose candidates are held in memory at a time."""


@dataclass(frozen=True)
class Sessions:
    """Visits.

    Args:
        user: int [S].
        time_us: int [S], time of the first search.
        need_kind: int [S].
        num_searches: int [S], at least 1.
        basket_size: int [S], 0 where nothing was bought.
    """

    user: Ints
    time_us: Ints
    need_kind: Ints
    num_searches: Ints
    basket_size: Ints


@dataclass(frozen=True)
class Searches:
    """Queries: user int [E], time int [E], text string [E]."""

    user: Ints
    time_us: Ints
    text: pa.Array


@dataclass(frozen=True)
class Purchases:
    """Bought items: user int [E], time int [E], item int [E]."""

    user: Ints
    time_us: Ints
    item: Ints


def visit_times(rng: np.random.Generator, shoppers: Shoppers, user: Ints, num_days: int) -> Ints:
    """Draw when users come: any day since they joined, mostly in the evening, before 23:00."""
    day = between(rng, shoppers.first_day[user], np.full(len(user), num_days), 1)[:, 0]
    return day * DAY_US + np.floor(rng.beta(3, 1.6, len(user)) * 23 / 24 * DAY_US).astype(np.int64)


def draw_sessions(
    rng: np.random.Generator, shoppers: Shoppers, num_events: int, num_days: int
) -> Sessions:
    """Draw sessions of exactly ``num_events`` events, at least one of every user.

    Args:
        rng: Source of everything random.
        shoppers: The users; at most ``num_events / MAX_SESSION_EVENTS``.
        num_events: Searches and basket items together.
        num_days: Length of the history.
    """
    num_users = len(shoppers.first_day)
    num_searches = 1 + rng.choice(3, size=num_events, p=_SEARCH_SHARES)
    basket_size = rng.choice(6, size=num_events, p=_BASKET_SHARES)
    total = np.cumsum(num_searches + basket_size)
    size = int(np.searchsorted(total, num_events)) + 1
    num_searches, basket_size = num_searches[:size], basket_size[:size]
    # The last session is cut where it would exceed the number of events; its first search stays.
    excess = int(total[size - 1]) - num_events
    from_basket = min(excess, int(basket_size[-1]))
    basket_size[-1] -= from_basket
    num_searches[-1] -= excess - from_basket
    anyone = np.searchsorted(shoppers.activity, rng.random(size) * shoppers.activity[-1])
    user = np.where(np.arange(size) < num_users, np.arange(size), anyone)
    return Sessions(
        user=user,
        time_us=visit_times(rng, shoppers, user, num_days),
        need_kind=rng.integers(len(KINDS), size=size),
        num_searches=num_searches,
        basket_size=basket_size,
    )


def draw_searches(rng: np.random.Generator, shoppers: Shoppers, sessions: Sessions) -> Searches:
    """Word the searches of every session, 20 to 90 seconds from one to the next."""
    session = np.repeat(np.arange(len(sessions.user)), sessions.num_searches)
    first = np.cumsum(sessions.num_searches) - sessions.num_searches
    nth = np.arange(len(session)) - first[session]
    gap = rng.integers(20 * SECOND_US, 90 * SECOND_US, size=len(session))
    waited = np.cumsum(np.where(nth == 0, 0, gap))
    user = sessions.user[session]
    kind = sessions.need_kind[session]
    time_us = sessions.time_us[session] + waited - waited[first[session]]
    theme = choose(rng, SHARPNESS * shoppers.tastes(user, time_us))
    possible = np.where(KIND_FAMILIES[kind], SHARPNESS * shoppers.liking[user], -np.inf)
    family = choose(rng, possible.astype(np.float32))
    size = len(session)
    named = rng.random(size) < 0.85
    second = named & (rng.random(size) < 0.5)
    about = Attributes(
        kind=kind,
        theme=np.where(named, theme, NONE),
        second_theme=np.where(second, theme, NONE),
        family=np.where(rng.random(size) < 0.3, family, NONE),
    )
    return Searches(user, time_us, queries(rng, about, shoppers.price_level[user]))


def fill_baskets(
    rng: np.random.Generator, catalogue: Catalogue, shoppers: Shoppers, sessions: Sessions
) -> Purchases:
    """Fill the baskets, 5 to 40 minutes after the first search of their sessions."""
    buying = np.flatnonzero(sessions.basket_size)
    wait = rng.integers(5 * 60 * SECOND_US, 40 * 60 * SECOND_US, size=len(buying))
    by_kind = Timeline(catalogue.kind, np.maximum(catalogue.listed_us, 0))
    chosen = []
    for start in range(0, len(buying), _CHUNK):
        part = buying[start : start + _CHUNK]
        items = _basket_candidates(rng, catalogue, by_kind, sessions, part)
        scores = SHARPNESS * utility(
            catalogue,
            shoppers,
            sessions.user[part],
            sessions.time_us[part],
            items,
            sessions.need_kind[part],
            np.ones(len(part), dtype=np.float32),
        )
        scores = np.where(repeated(items), -np.inf, scores + gumbel(rng, items.shape))
        best = np.take_along_axis(items, np.argsort(-scores, axis=1, kind="stable"), axis=1)
        chosen.append(best[np.arange(_NUM_CANDIDATES) < sessions.basket_size[part][:, None]])
    basket = np.repeat(np.arange(len(buying)), sessions.basket_size[buying])
    return Purchases(
        user=sessions.user[buying][basket],
        time_us=(sessions.time_us[buying] + wait)[basket],
        item=np.concatenate([*chosen, np.zeros(0, dtype=np.int64)]),
    )


def _basket_candidates(
    rng: np.random.Generator,
    catalogue: Catalogue,
    by_kind: Timeline,
    sessions: Sessions,
    part: Ints,
) -> Ints:
    """Draw what baskets are chosen from, int [S, C], five distinct items at the least."""
    time_us = sessions.time_us[part]
    popular = catalogue.popular(rng, time_us, _NUM_CANDIDATES // 2)
    needed = by_kind.pick(rng, sessions.need_kind[part], time_us, _NUM_CANDIDATES // 2 - 5)
    shelf = catalogue.shelf(rng, time_us, 5)  # neighbours differ from each other
    needed = np.where(needed == NONE, popular[:, : needed.shape[1]], needed)
    return np.concatenate([popular, needed, shelf], axis=1)
