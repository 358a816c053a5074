"""What the generated shop showed its users, and what they clicked.

A request shows a slate of different items. Each slot is filled from one source, none of which knows
the user's taste: 35 % by demand, 20 % any item, 20 % new arrivals, 15 % any item of the kind that
was searched for last, 10 % any item of the user's own earlier baskets (by demand where there is no
such item). Three of five requests come 10 to 240 seconds after the first search of a session, the
others on visits of their own. Clicks follow the formula of :mod:`.shop_model`.

Shapes: R = requests, K = slots of a slate. Times: see :mod:`.shop_model`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feature_repo.shop_history import SECOND_US, Purchases, Sessions, visit_times
from feature_repo.shop_model import (
    BIAS,
    NEED_DECAY_US,
    REPEAT_LATER,
    REPEAT_SOON,
    REPEAT_SOON_US,
    SLOT_EFFECT,
    Catalogue,
    Floats,
    Ints,
    Shoppers,
    Timeline,
    between,
    repeated,
    utility,
)
from feature_repo.shop_texts import NONE

SOURCE_SHARES = (0.35, 0.2, 0.2, 0.15, 0.1)
"""Demand, any item, new arrivals, the searched kind, the user's own baskets."""
_IN_SESSION_SHARE = 0.6
_CHUNK = 50_000
"""Requests whose candidates are held in memory at a time."""


@dataclass(frozen=True)
class Slates:
    """Requests in the order of time.

    Args:
        user: int [R].
        time_us: int [R].
        items: int [R, K], all different.
        probability: float [R, K], of a click.
        clicked: bool [R, K].
    """

    user: Ints
    time_us: Ints
    items: Ints
    probability: Floats
    clicked: NDArray[np.bool_]


def show_slates(
    rng: np.random.Generator,
    catalogue: Catalogue,
    shoppers: Shoppers,
    sessions: Sessions,
    baskets: Purchases,
    *,
    num_requests: int,
    slate_size: int,
    num_days: int,
) -> Slates:
    """Draw requests, their slates and the clicks."""
    user, time_us = _requests(rng, shoppers, sessions, num_requests, num_days)
    history = _History(catalogue, sessions, baskets)
    items = np.zeros((num_requests, slate_size), dtype=np.int64)
    probability = np.zeros((num_requests, slate_size), dtype=np.float32)
    for start in range(0, num_requests, _CHUNK):
        part = slice(start, start + _CHUNK)
        need_kind, need = history.needs(user[part], time_us[part])
        items[part] = history.fill(rng, user[part], time_us[part], need_kind, slate_size)
        worth = utility(
            catalogue, shoppers, user[part], time_us[part], items[part], need_kind, need
        )
        logit = (
            BIAS
            + shoppers.clickiness[user[part]][:, None]
            + worth
            + history.repeat_effect(user[part], time_us[part], items[part])
            + SLOT_EFFECT * np.arange(slate_size)
        )
        probability[part] = 1 / (1 + np.exp(-logit))
    clicked = rng.random(items.shape) < probability
    return Slates(user, time_us, items, probability, clicked)


def purchases_after_clicks(
    rng: np.random.Generator, slates: Slates, num_purchases: int, end_us: int
) -> Purchases:
    """Draw clicks that led to a purchase, single items bought 3 minutes to 3 days later.

    Where fewer items were clicked than purchases are asked for, the rest were seen but not clicked.
    """
    order = rng.random(slates.clicked.size) - slates.clicked.ravel()  # the clicked ones come first
    row, slot = np.divmod(np.argsort(order, kind="stable")[:num_purchases], slates.items.shape[1])
    seen_us = slates.time_us[row]
    soon_us = rng.integers(3 * 60 * SECOND_US, 40 * 60 * SECOND_US, size=len(row))
    later_us = rng.integers(3 * 60 * SECOND_US, 3 * 86_400 * SECOND_US, size=len(row))
    time_us = np.where(seen_us + later_us < end_us, seen_us + later_us, seen_us + soon_us)
    return Purchases(slates.user[row], time_us, slates.items[row, slot])


def _requests(
    rng: np.random.Generator,
    shoppers: Shoppers,
    sessions: Sessions,
    num_requests: int,
    num_days: int,
) -> tuple[Ints, Ints]:
    """User and time of each request, in the order of time."""
    session = rng.integers(len(sessions.user), size=num_requests)
    user = sessions.user[session]
    wait = rng.integers(10 * SECOND_US, 240 * SECOND_US, size=num_requests)
    time_us = np.where(
        rng.random(num_requests) < _IN_SESSION_SHARE,
        sessions.time_us[session] + wait,
        visit_times(rng, shoppers, user, num_days),
    )
    order = np.lexsort((user, time_us))
    return user[order], time_us[order]


class _History:
    """What the shop knows of its users when it fills a slate."""

    def __init__(self, catalogue: Catalogue, sessions: Sessions, baskets: Purchases) -> None:
        self._catalogue = catalogue
        self._sessions = sessions
        self._baskets = baskets
        self._num_items = len(catalogue.kind)
        self._by_kind = Timeline(catalogue.kind, np.maximum(catalogue.listed_us, 0))
        self._visits = Timeline(sessions.user, sessions.time_us)
        self._bought = Timeline(baskets.user, baskets.time_us)
        self._bought_item = Timeline(self._pair(baskets.user, baskets.item), baskets.time_us)

    def _pair(self, user: Ints, item: Ints) -> Ints:
        return user * self._num_items + item

    def needs(self, user: Ints, time_us: Ints) -> tuple[Ints, Floats]:
        """Kind of the latest search, NONE if none, int [R]; exp(-age / 4 days), float [R]."""
        session, known = self._visits.latest(user, time_us)
        age_us = time_us - self._sessions.time_us[session]
        need = np.where(known, np.exp(-age_us / NEED_DECAY_US), 0)
        return np.where(known, self._sessions.need_kind[session], NONE), need.astype(np.float32)

    def fill(
        self, rng: np.random.Generator, user: Ints, time_us: Ints, need_kind: Ints, size: int
    ) -> Ints:
        """Fill slates with different items, int [R, K]."""
        popular = self._catalogue.popular(rng, time_us, size)
        listed = np.searchsorted(self._catalogue.listed_us, time_us)
        row = self._bought.pick(rng, user, time_us, size)
        own = np.append(self._baskets.item, NONE)[row]
        sources = [
            popular,
            between(rng, np.zeros_like(listed), listed, size),
            self._catalogue.new_arrivals(rng, time_us, size),
            self._by_kind.pick(rng, need_kind, time_us, size),
            own,
        ]
        source = rng.choice(len(sources), size=popular.shape, p=SOURCE_SHARES)
        drawn = np.choose(source, sources)
        drawn = np.where(drawn == NONE, popular, drawn)
        # The shelf's items differ from each other, so there are always enough to replace repeats.
        items = np.concatenate([drawn, self._catalogue.shelf(rng, time_us, size)], axis=1)
        order = np.argsort(repeated(items), axis=1, kind="stable")[:, :size]
        return np.take_along_axis(items, order, axis=1)

    def repeat_effect(self, user: Ints, time_us: Ints, items: Ints) -> Floats:
        """repeat(u, i, t), float [R, K]."""
        pair = self._pair(user[:, None], items).ravel()
        when = np.repeat(time_us, items.shape[1])
        row, known = self._bought_item.latest(pair, when)
        soon = when - np.append(self._baskets.time_us, 0)[row] < REPEAT_SOON_US
        effect = np.where(known, np.where(soon, REPEAT_SOON, REPEAT_LATER), 0)
        return effect.reshape(items.shape).astype(np.float32)
