"""The planted model of the generated shop: who likes what, and how probable a click is.

A user u who sees item i at time t clicks with probability ``sigmoid(z)``,

    z = -3 + c(u) + utility(u, i, t) + repeat(u, i, t) - 0.06 slot

    utility = taste(u, t)[theme(i)] + 0.6 taste(u, t)[second theme(i)] + liking(u)[family(i)]
            + 1.3 need(u, i, t) + 0.35 quality(i) + 0.2 (1 - (price(i) - level(u))^2)

where (all hidden but the price, which is in standard deviations within its kind)

- taste(u, t), one number per theme, is 2.0 for the user's two lasting favourites, plus 2.4 for the
  two favourites of the present phase, plus N(0, 0.3^2). A user has three phases in the year, so
  recent behaviours tell more than old ones;
- liking(u) ~ N(0, 0.4^2), one number per family of materials; c(u) ~ N(0, 0.25^2);
- need = exp(-age / 4 days) if i is of the kind that the user's latest search was for, else 0;
- repeat = -1.5 within 21 days after u bought i in a basket, +0.9 later, 0 if u never did;
- quality(i) ~ N(0, 1), which makes an item popular; level(u) ~ N(0, 1), cheap to dear.

What a user searches for and puts into baskets is drawn from the same utility
(:mod:`.shop_history`), and titles and queries express theme and family in changing words
(:mod:`.shop_texts`). No column names the theme, so text reveals what ids do not: most items are
seen too rarely to be learned one by one.

Shapes: U = users, I = items (in the order of their listing), T = themes, F = families of materials,
P = phases, R = rows, C = candidates per row. Times are int64 microseconds since the shop's start.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from feature_repo.shop_texts import BRANDS, KIND_FAMILIES, KINDS, MATERIALS, NONE, THEMES

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

DAY_US = 86_400_000_000
NUM_PHASES = 3
OLD_SHARE = 0.35
"""Share of the items that are listed before the history starts."""
NEW_ARRIVAL_DAYS = 60
"""How long an item counts as a new arrival."""

# The strengths of the formula. They are chosen so that the best reachable AUC is about .85, trees
# on exact ids, counts and popularity reach about .62, and one impression in six is clicked.
BIAS = -3.0
SLOT_EFFECT = -0.06
QUALITY_EFFECT = 0.35
PRICE_EFFECT = 0.2
NEED_EFFECT = 1.3
NEED_DECAY_US = 4 * DAY_US
SECOND_THEME_SHARE = 0.6
NUM_LASTING, LASTING_EFFECT = 2, 2.0
NUM_PASSING, PASSING_EFFECT = 2, 2.4
INDIFFERENCE_SPREAD = 0.3
LIKING_SPREAD = 0.4
CLICKINESS_SPREAD = 0.25
REPEAT_SOON, REPEAT_LATER = -1.5, 0.9
REPEAT_SOON_US = 21 * DAY_US


class Timeline:
    """Moments of many groups, sorted, to be asked what lies strictly before a time.

    Args:
        group: int [R], any integers.
        time_us: int [R], not negative; compared to the millisecond.
    """

    def __init__(self, group: Ints, time_us: Ints) -> None:
        self._groups, rank = np.unique(group, return_inverse=True)
        keys = self._keys(rank, time_us)
        self.order: Ints = np.argsort(keys, kind="stable")
        """Row at each position."""
        self._sorted: Ints = keys[self.order]

    def before(self, group: Ints, time_us: Ints) -> tuple[Ints, Ints]:
        """Range ``[first, stop)`` of positions in the group before the time; empty if none."""
        rank = np.searchsorted(self._groups, group)
        known = rank < len(self._groups)
        known[known] = self._groups[rank[known]] == group[known]
        first = np.searchsorted(self._sorted, self._keys(rank, np.zeros_like(time_us)))
        stop = np.searchsorted(self._sorted, self._keys(rank, time_us))
        return first, np.where(known, stop, first)

    def pick(self, rng: np.random.Generator, group: Ints, time_us: Ints, size: int) -> Ints:
        """Draw any rows of the group before each time, int [R, size]; NONE where there are none."""
        first, stop = self.before(group, time_us)
        position = np.where((first < stop)[:, None], between(rng, first, stop, size), NONE)
        return np.append(self.order, NONE)[position]  # position NONE is the end, which says NONE

    def latest(self, group: Ints, time_us: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """Find the last row of the group before each time, int [R], and whether there is one."""
        first, stop = self.before(group, time_us)
        known = first < stop
        return np.append(self.order, NONE)[np.where(known, stop - 1, NONE)], known

    @staticmethod
    def _keys(rank: Ints, time_us: Ints) -> Ints:
        """Order by group, then time: 36 bits hold two years of milliseconds."""
        return (rank << 36) | (time_us // 1000)


@dataclass(frozen=True)
class Catalogue:
    """The items, in the order of their listing.

    Args:
        listed_us: int [I]; before 0 for what was there before the history starts.
        kind: int [I].
        theme: int [I].
        second_theme: int [I], NONE where an item has one theme.
        family: int [I].
        brand: int [I].
        quality: float [I].
        price: float [I], pounds.
        price_level: float [I], standard deviations within the kind, cheap to dear.
        demand: float [I], running sum of the weights with which popular items are drawn.
    """

    listed_us: Ints
    kind: Ints
    theme: Ints
    second_theme: Ints
    family: Ints
    brand: Ints
    quality: Floats
    price: NDArray[np.float64]
    price_level: Floats
    demand: NDArray[np.float64]

    @classmethod
    def draw(cls, rng: np.random.Generator, num_items: int, num_days: int) -> Self:
        """Draw items: 35 % are there from the start, the others appear evenly over time."""
        old = np.arange(num_items) < OLD_SHARE * num_items
        from_start = -rng.integers(1, 365, size=num_items) * DAY_US
        later = np.floor(rng.random(num_items) * num_days * DAY_US).astype(np.int64)
        listed_us = np.sort(np.where(old, from_start, later), kind="stable")
        kind = rng.integers(len(KINDS), size=num_items)
        theme = rng.integers(len(THEMES), size=num_items)
        other = (theme + rng.integers(1, len(THEMES), size=num_items)) % len(THEMES)
        brand = rng.integers(len(BRANDS), size=num_items)
        brand_level = rng.standard_normal(len(BRANDS))
        level = 0.6 * brand_level[brand] + 0.8 * rng.standard_normal(num_items)
        usual = np.array([kind.price for kind in KINDS])[kind]
        quality = rng.standard_normal(num_items)
        weight = np.exp(0.7 * quality + 0.5 * rng.standard_normal(num_items))
        return cls(
            listed_us=listed_us,
            kind=kind,
            theme=theme,
            second_theme=np.where(rng.random(num_items) < 0.3, other, NONE),
            family=choose(rng, np.where(KIND_FAMILIES[kind], 0.0, -np.inf).astype(np.float32)),
            brand=brand,
            quality=quality.astype(np.float32),
            price=np.round(usual * np.exp(0.35 * level), 2),
            price_level=level.astype(np.float32),
            demand=np.cumsum(weight),
        )

    def popular(self, rng: np.random.Generator, time_us: Ints, size: int) -> Ints:
        """Items listed before each time, by demand, int [R, size]."""
        listed = np.searchsorted(self.listed_us, time_us)
        at = rng.random((len(time_us), size)) * self.demand[listed - 1][:, None]
        return np.minimum(np.searchsorted(self.demand, at, side="right"), listed[:, None] - 1)

    def new_arrivals(self, rng: np.random.Generator, time_us: Ints, size: int) -> Ints:
        """Items listed in the last 60 days, else any listed before, int [R, size]."""
        stop = np.searchsorted(self.listed_us, time_us)
        first = np.searchsorted(self.listed_us, time_us - NEW_ARRIVAL_DAYS * DAY_US)
        first = np.where(first < stop, first, 0)
        return between(rng, first, stop, size)

    def shelf(self, rng: np.random.Generator, time_us: Ints, size: int) -> Ints:
        """Neighbours on a random shelf, int [R, size]: distinct where enough items are listed."""
        listed = np.searchsorted(self.listed_us, time_us)
        start = between(rng, np.zeros_like(listed), listed, 1)
        return (start + np.arange(size)) % listed[:, None]


@dataclass(frozen=True)
class Shoppers:
    """The users.

    Args:
        first_day: int [U], the first day on which a user comes.
        activity: float [U], running sum of the weights with which users come.
        phase_start_us: int [U, P]; the first is 0.
        taste: float [U, P, T].
        liking: float [U, F].
        price_level: float [U].
        clickiness: float [U].
    """

    first_day: Ints
    activity: NDArray[np.float64]
    phase_start_us: Ints
    taste: Floats
    liking: Floats
    price_level: Floats
    clickiness: Floats

    @classmethod
    def draw(cls, rng: np.random.Generator, num_users: int, num_days: int) -> Self:
        """Draw users: 75 % may come from the start, the others join evenly over time."""
        joins = rng.integers(num_days, size=num_users)
        phase_start = np.sort(rng.random((num_users, NUM_PHASES)), axis=1) * num_days * DAY_US
        phase_start[:, 0] = 0
        noise = rng.standard_normal((num_users, 1, len(THEMES)), dtype=np.float32)
        lasting = _favourites(rng, (num_users, 1, len(THEMES)), NUM_LASTING)
        passing = _favourites(rng, (num_users, NUM_PHASES, len(THEMES)), NUM_PASSING)
        taste = INDIFFERENCE_SPREAD * noise + LASTING_EFFECT * lasting + PASSING_EFFECT * passing
        return cls(
            first_day=np.where(rng.random(num_users) < 0.75, 0, joins),
            activity=np.cumsum(rng.gamma(1.2, size=num_users)),
            phase_start_us=phase_start.astype(np.int64),
            taste=taste.astype(np.float32),
            liking=LIKING_SPREAD
            * rng.standard_normal((num_users, len(MATERIALS)), dtype=np.float32),
            price_level=rng.standard_normal(num_users, dtype=np.float32),
            clickiness=CLICKINESS_SPREAD * rng.standard_normal(num_users, dtype=np.float32),
        )

    def tastes(self, user: Ints, time_us: Ints) -> Floats:
        """taste(u, t) of every row, float [R, T]."""
        phase = (self.phase_start_us[user, 1:] <= time_us[:, None]).sum(axis=1)
        tastes: Floats = self.taste[user, phase]
        return tastes


def utility(
    catalogue: Catalogue,
    shoppers: Shoppers,
    user: Ints,
    time_us: Ints,
    items: Ints,
    need_kind: Ints,
    need: Floats,
) -> Floats:
    """Say what each candidate is worth to the user: the formula at the top.

    Args:
        catalogue: The items.
        shoppers: The users.
        user: int [R].
        time_us: int [R].
        items: int [R, C], the candidates.
        need_kind: int [R], the kind of the latest search, NONE if there was none.
        need: float [R], in [0, 1]: exp(-age / 4 days).

    Returns:
        float32 [R, C].
    """
    row = np.arange(len(user))[:, None]
    tastes = shoppers.tastes(user, time_us)
    second = catalogue.second_theme[items]
    distance = catalogue.price_level[items] - shoppers.price_level[user][:, None]
    worth: Floats = (
        tastes[row, catalogue.theme[items]]
        + np.where(second == NONE, 0, SECOND_THEME_SHARE * tastes[row, second])
        + shoppers.liking[user[:, None], catalogue.family[items]]
        + NEED_EFFECT * need[:, None] * (catalogue.kind[items] == need_kind[:, None])
        + QUALITY_EFFECT * catalogue.quality[items]
        + PRICE_EFFECT * (1 - distance**2)
    ).astype(np.float32)
    return worth


def _favourites(
    rng: np.random.Generator, shape: tuple[int, int, int], num_favourites: int
) -> NDArray[np.bool_]:
    """Mark ``num_favourites`` different ones on the last axis."""
    return rng.random(shape).argsort(axis=-1).argsort(axis=-1) < num_favourites


def choose(rng: np.random.Generator, scores: Floats) -> Ints:
    """One column of each row with probability softmax(scores), int [R]."""
    column: Ints = (scores + gumbel(rng, scores.shape)).argmax(axis=1)
    return column


def gumbel(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Noise that turns the largest of noisy scores into a softmax draw, float32.

    Source:
        Gumbel-top-k: the k largest are k draws without replacement (arXiv:1903.06059).
    """
    waiting = rng.standard_exponential(shape, dtype=np.float32)
    return -np.log(np.maximum(waiting, np.float32(1e-30)))


def between(rng: np.random.Generator, first: Ints, stop: Ints, size: int) -> Ints:
    """Whole numbers evenly from each ``[first, stop)``, int [R, size]; first where empty."""
    width = np.maximum(stop - first, 1)[:, None]
    offset: Ints = np.floor(rng.random((len(first), size)) * width).astype(np.int64)
    return first[:, None] + offset


def repeated(items: Ints) -> NDArray[np.bool_]:
    """Mark items that stand further left in the row too: bool [R, C], True means repeated."""
    same = np.zeros(items.shape, dtype=bool)
    for column in range(1, items.shape[1]):
        same[:, column] = (items[:, :column] == items[:, column : column + 1]).any(axis=1)
    return same
