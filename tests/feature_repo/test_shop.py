"""The generated shop keeps its promises: size, determinism, time and the planted signal."""

import hashlib
import re
import tomllib
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from feature_repo.errors import DataSetError, LongtrailError
from feature_repo.home import PROJECT_ROOT
from feature_repo.shop import START, ShopConfig, ShopSummary, best_auc, generate_shop
from feature_repo.shop_model import DAY_US, Catalogue, Shoppers, Timeline, utility
from feature_repo.shop_texts import KIND_FAMILIES, KINDS, MATERIALS, THEMES

TABLES = ("events", "items", "impressions", "truth")
SMALL = ShopConfig(num_users=40, num_events=1500, num_impressions=1200)
TOML = tomllib.loads((PROJECT_ROOT / "feature_repo" / "datasets" / "shop.toml").read_text())
VALID, TEST = (pd.Timestamp(TOML["split"][name], tz="UTC") for name in ("valid", "test"))


class Shop:
    """A generated folder and its tables."""

    def __init__(self, folder: Path, config: ShopConfig) -> None:
        self.folder = folder
        self.config = config
        self.summary: ShopSummary = generate_shop(folder, config)
        self.events, self.items, self.impressions, self.truth = (
            pd.read_parquet(folder / f"{name}.parquet") for name in TABLES
        )


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """The shop that `longtrail demo` uses."""
    return Shop(tmp_path_factory.mktemp("shop") / "default", ShopConfig())


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_same_config_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = generate_shop(tmp_path / "a", SMALL), generate_shop(tmp_path / "b", SMALL)
    assert first == second
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert sorted(digests(tmp_path / "a")) == sorted(f"{name}.parquet" for name in TABLES)


def test_another_seed_gives_another_shop(tmp_path: Path) -> None:
    generate_shop(tmp_path / "a", SMALL)
    generate_shop(tmp_path / "b", ShopConfig(40, 1500, seed=1, num_impressions=1200))
    first, second = digests(tmp_path / "a"), digests(tmp_path / "b")
    assert all(first[name] != second[name] for name in first)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        ShopConfig(num_users=1, num_events=10, num_impressions=6),
        ShopConfig(num_users=3, num_events=30, num_impressions=150),
        ShopConfig(num_users=100, num_events=1000, num_items=400, slate_size=20),
        ShopConfig(num_users=50, num_events=2000, num_items=120, num_impressions=10_000, seed=7),
    ],
)
def test_sizes_are_exact_and_rows_are_unique(tmp_path: Path, config: ShopConfig) -> None:
    shop = Shop(tmp_path / "shop", config)
    assert len(shop.events) == config.num_events == shop.summary.num_events
    assert shop.events["user_id"].nunique() == config.num_users == shop.summary.num_users
    assert len(shop.items) == shop.summary.num_items
    shown = config.num_impressions or config.num_events
    assert len(shop.impressions) == shown - shown % config.slate_size
    assert len(shop.impressions) == shop.summary.num_impressions == len(shop.truth)
    assert (shop.impressions.groupby("request_id").size() == config.slate_size).all()
    assert not shop.impressions.duplicated(["request_id", "item_id"]).any()
    assert not shop.events.duplicated().any()
    assert shop.items["item_id"].is_unique
    assert set(shop.impressions["user_id"]) <= set(shop.events["user_id"])


def test_tables_have_the_promised_columns(shop: Shop) -> None:
    events, items, impressions = shop.events, shop.items, shop.impressions
    assert list(events) == ["user_id", "event_timestamp", "scene", "text", "item_id"]
    assert list(items) == ["item_id", "title", "listed_at", "price", "category"]
    assert str(events["event_timestamp"].dtype) == "datetime64[us, UTC]"
    assert str(items["listed_at"].dtype) == "datetime64[us, UTC]"
    assert set(events["scene"]) == {"search", "purchase"}
    is_search = events["scene"] == "search"
    assert events.loc[is_search, "item_id"].isna().all()
    bought = events[~is_search].merge(items, on="item_id", how="left", validate="m:1")
    assert (bought["text"] == bought["title"]).all()
    assert (events["text"].str.strip() == events["text"]).all()
    assert not events["text"].str.contains("  ").any()
    assert not items["title"].str.contains("  ").any()
    assert (items["price"] > 0).all()
    assert events["event_timestamp"].is_monotonic_increasing
    assert events["event_timestamp"].min() >= START
    assert events["event_timestamp"].max() < pd.Timestamp("2024-01-01", tz="UTC")
    assert set(impressions["slot"]) == set(range(shop.config.slate_size))


def test_baskets_share_a_timestamp_and_hold_different_items(shop: Shop) -> None:
    purchases = shop.events[shop.events["scene"] == "purchase"]
    baskets = purchases.groupby(["user_id", "event_timestamp"])["item_id"]
    assert (baskets.size() == baskets.nunique()).all()
    assert (baskets.size() > 1).sum() > 3000
    assert baskets.size().max() == 5


def test_nothing_happens_to_an_item_before_it_is_listed(shop: Shop) -> None:
    for table in (shop.events.dropna(subset="item_id"), shop.impressions):
        rows = table.merge(shop.items, on="item_id", how="left", validate="m:1")
        assert (rows["listed_at"] < rows["event_timestamp"]).all()


def test_the_test_period_shows_items_that_training_never_saw(shop: Shop) -> None:
    impressions = shop.impressions.merge(shop.items, on="item_id")
    when = impressions["event_timestamp"]
    assert 0.15 < (when >= TEST).mean() < 0.3
    assert 0.08 < ((when >= VALID) & (when < TEST)).mean() < 0.15
    late = impressions[when >= TEST]
    assert (late["listed_at"] >= VALID).mean() > 0.2
    seen = set(shop.events.loc[shop.events["event_timestamp"] < VALID, "item_id"])
    assert (~late["item_id"].isin(seen)).mean() > 0.25


def test_clicks_follow_the_planted_probabilities(shop: Shop) -> None:
    clicked, probability = shop.impressions["clicked"], shop.truth["probability"]
    assert 0.1 < clicked.mean() < 0.2
    for _, rows in probability.groupby(pd.qcut(probability, 10), observed=True):
        error = clicked[rows.index].mean() - rows.mean()
        assert abs(error) < 4 * np.sqrt(rows.mean() * (1 - rows.mean()) / len(rows))


def test_the_best_auc_is_that_of_the_probabilities(shop: Shop) -> None:
    late = shop.impressions[shop.impressions["event_timestamp"] >= TEST]
    expected = roc_auc_score(late["clicked"], shop.truth.loc[late.index, "probability"])
    shuffled = late.sample(frac=1, random_state=0)
    assert best_auc(shop.folder, shuffled) == pytest.approx(expected, abs=1e-12)
    assert 0.78 < expected < 0.88
    assert best_auc(shop.folder, shop.impressions) == pytest.approx(shop.summary.best_auc)


def test_some_clicks_lead_to_a_purchase_of_the_same_item(shop: Shop) -> None:
    shown = shop.impressions.merge(
        shop.events[shop.events["scene"] == "purchase"],
        on=["user_id", "item_id"],
        suffixes=("", "_bought"),
    )
    wait = shown["event_timestamp_bought"] - shown["event_timestamp"]
    soon = shown[(wait > pd.Timedelta(0)) & (wait <= pd.Timedelta(days=3))]
    assert soon["clicked"].sum() >= len(shop.impressions) // 50
    assert soon["clicked"].mean() > 0.8


def theme_counts(texts: pd.Series) -> np.ndarray:
    """How many words of each theme stand in each text, [texts, themes]."""
    theme_of = {word: index for index, words in enumerate(THEMES.values()) for word in words}
    pattern = re.compile(r"\b(?:" + "|".join(map(re.escape, theme_of)) + r")\b")
    counts = np.zeros((len(texts), len(THEMES)))
    for row, text in enumerate(texts):
        for word in pattern.findall(text):
            counts[row, theme_of[word]] += 1
    return counts


def last_before(times: np.ndarray, users: np.ndarray, size: int, shop: Shop) -> np.ndarray:
    """Rows of the last ``size`` events of each user before each time, -1 where there is none."""
    codes = pd.Categorical(users, categories=sorted(set(shop.events["user_id"]))).codes
    events = pd.Categorical(shop.events["user_id"], categories=sorted(set(shop.events["user_id"])))
    timeline = Timeline(events.codes.astype(np.int64), microseconds(shop.events["event_timestamp"]))
    first, stop = timeline.before(codes.astype(np.int64), times)
    position = stop[:, None] - 1 - np.arange(size)
    return np.where(position >= first[:, None], timeline.order[position], -1)


def microseconds(times: pd.Series) -> np.ndarray:
    return ((times - START) // pd.Timedelta(microseconds=1)).to_numpy(np.int64)  # type: ignore[no-any-return]


def test_text_reveals_the_taste_that_ids_hide(shop: Shop) -> None:
    late = shop.impressions[shop.impressions["event_timestamp"] >= TEST]
    times = microseconds(late["event_timestamp"])
    rows = last_before(times, late["user_id"].to_numpy(), 20, shop)
    history = np.vstack([theme_counts(shop.events["text"]), np.zeros(len(THEMES))])
    titles = theme_counts(shop.items.set_index("item_id").loc[late["item_id"], "title"])
    recent = history[rows[:, :8]].sum(axis=1)
    text_auc = roc_auc_score(late["clicked"], (recent * titles).sum(axis=1))
    old = history[rows[:, 12:]].sum(axis=1)
    old_auc = roc_auc_score(late["clicked"], (old * titles).sum(axis=1))
    bought = shop.events.loc[shop.events["event_timestamp"] < TEST, "item_id"].value_counts()
    popularity_auc = roc_auc_score(late["clicked"], late["item_id"].map(bought).fillna(0))
    assert text_auc > popularity_auc + 0.08
    assert text_auc > 0.65
    assert text_auc > old_auc + 0.01  # tastes drift: recent behaviours tell more


def test_exact_ids_tell_that_something_was_bought_before(shop: Shop) -> None:
    purchases = shop.events[shop.events["scene"] == "purchase"]
    earlier = shop.impressions.merge(purchases, on=["user_id", "item_id"], suffixes=("", "_b"))
    age = earlier["event_timestamp"] - earlier["event_timestamp_b"]
    recent = earlier[(age > pd.Timedelta(0)) & (age < pd.Timedelta(days=21))]
    older = earlier[age >= pd.Timedelta(days=21)]
    assert len(recent) > 300
    assert older["clicked"].mean() > recent["clicked"].mean() + 0.1


def test_the_toml_reads_what_is_written(shop: Shop) -> None:
    rows = {
        name: duckdb.sql(TOML[name]["sql"].format(dir=shop.folder)).fetchall()
        for name in ("events", "items", "impressions")
    }
    assert {name: len(rows[name]) for name in rows} == {
        "events": len(shop.events),
        "items": len(shop.items),
        "impressions": len(shop.impressions),
    }
    assert TOML["replay"] is True


def test_words_are_told_apart() -> None:
    words = [word for words in (*THEMES.values(), *MATERIALS.values()) for word in words]
    assert len(words) == len(set(words))
    assert KIND_FAMILIES.shape == (len(KINDS), len(MATERIALS))
    assert KIND_FAMILIES.any(axis=1).all()


def test_utility_is_the_formula() -> None:
    rng = np.random.default_rng(3)
    items, users = Catalogue.draw(rng, 200, 365), Shoppers.draw(rng, 9, 365)
    user, time_us = rng.integers(9, size=30), rng.integers(365 * DAY_US, size=30)
    shown, need_kind = rng.integers(200, size=(30, 7)), rng.integers(-1, len(KINDS), size=30)
    need_kind[:10] = items.kind[shown[:10, 0]]
    need = rng.random(30, dtype=np.float32)
    worth = utility(items, users, user, time_us, shown, need_kind, need)
    for row in range(30):
        u, t = user[row], time_us[row]
        phase = max(p for p in range(3) if users.phase_start_us[u, p] <= t)
        for column, i in enumerate(shown[row]):
            expected = users.taste[u, phase, items.theme[i]] + users.liking[u, items.family[i]]
            if items.second_theme[i] >= 0:
                expected += 0.6 * users.taste[u, phase, items.second_theme[i]]
            if items.kind[i] == need_kind[row]:
                expected += 1.3 * need[row]
            expected += 0.35 * items.quality[i]
            expected += 0.2 * (1 - (items.price_level[i] - users.price_level[u]) ** 2)
            assert worth[row, column] == pytest.approx(expected, abs=1e-5)
    assert len({phase for u in range(9) for phase in map(tuple, users.taste[u] > 1.2)}) > 9
    # Two lasting favourites in every phase, at most two more in each.
    favourites = (users.taste > 1.2).sum(axis=2)
    assert favourites.min() >= 2
    assert favourites.max() == 4


def test_timeline_finds_what_lies_strictly_before() -> None:
    rng = np.random.default_rng(0)
    group, time_us = rng.integers(5, size=60), rng.integers(30, size=60) * 1000
    timeline = Timeline(group, time_us)
    asked, at = rng.integers(-1, 7, size=200), rng.integers(31, size=200) * 1000
    first, stop = timeline.before(asked, at)
    for row in range(200):
        expected = {i for i in range(60) if group[i] == asked[row] and time_us[i] < at[row]}
        assert set(timeline.order[first[row] : stop[row]]) == expected
        latest, known = timeline.latest(asked[row : row + 1], at[row : row + 1])
        assert known[0] == bool(expected)
        if expected:
            assert time_us[latest[0]] == max(time_us[i] for i in expected)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"num_users": 0}, "number of users must be at least 1, got 0"),
        ({"num_users": 100, "num_events": 999}, "at least 10 per user, so 1000 for 100 users, got"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"slate_size": 1}, r"slate size must be in \[2, 20\], got 1"),
        ({"num_items": 119}, r"at least 20 times the slate size \(120\), got 119"),
        ({"num_impressions": 5}, r"number of impressions must be in \[6, .*got 5"),
        ({"num_impressions": 10**7}, r"number of impressions must be in .*got 10000000"),
    ],
)
def test_a_bad_config_is_refused(values: dict[str, int], sentence: str) -> None:
    with pytest.raises(LongtrailError, match=sentence):
        ShopConfig(**values)


def test_best_auc_refuses_other_rows(shop: Shop) -> None:
    rows = shop.impressions.head(600)
    with pytest.raises(DataSetError, match=r"lack the column\(s\) clicked"):
        best_auc(shop.folder, rows.drop(columns="clicked"))
    with pytest.raises(DataSetError, match="600 of 600 impressions are not of the shop"):
        best_auc(shop.folder, rows.assign(request_id="other"))
    with pytest.raises(DataSetError, match="got only one sort"):
        best_auc(shop.folder, rows[rows["clicked"] == 0])


def test_a_folder_with_other_files_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(LongtrailError, match="holds other files and would be replaced"):
        generate_shop(tmp_path / "mine", SMALL)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "precious"


def test_an_earlier_shop_is_replaced(tmp_path: Path) -> None:
    generate_shop(tmp_path / "shop", SMALL)
    generate_shop(tmp_path / "shop", ShopConfig(40, 1000, num_impressions=600))
    assert len(pd.read_parquet(tmp_path / "shop" / "events.parquet")) == 1000
    assert [path.name for path in tmp_path.iterdir()] == ["shop"]
