"""A small data set of CSV files with column names of its own, three scenes, logged impressions."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_repo.dataset import LoadedDataSet, load_dataset
from feature_repo.home import Home
from feature_repo.profiles import PROFILES

TOML = """
name = "kitchen"
replay = true

[events]
sql = '''
SELECT customer AS user_id, moment AS event_timestamp, kind AS scene, words AS text,
    product AS item_id
FROM '{dir}/log.csv'
'''

[items]
sql = '''
SELECT sku AS item_id, title AS text, cost AS price, shelf
FROM '{dir}/products.csv'
'''

[impressions]
sql = '''
SELECT request AS request_id, customer AS user_id, product AS item_id, moment AS event_timestamp,
    clicked, position
FROM '{dir}/shown.csv'
'''

[split]
valid = 2024-03-01
test = 2024-03-15
"""
WORDS = ("oak table", "steel pan", "blue plate", "linen towel", "glass bowl", "copper pot")


def write_files(folder: Path) -> None:
    """30 users, 6 products, 90 days; every number follows from a counter."""
    log, shown = (
        ["customer,moment,kind,words,product"],
        ["request,customer,product,moment,clicked,position"],
    )
    for n in range(600):
        user, day, product = n * 7 % 30, n % 90, n * 5 % 6
        at = f"2024-{1 + day // 30:02d}-{1 + day % 28:02d} {n % 24:02d}:{n // 10:02d}:00"
        kind = ("buy", "look", "search")[n // 7 % 3]
        words = WORDS[product] if kind != "search" else f"looking for {WORDS[product]}"
        log.append(f"{user},{at},{kind},{words},{'' if kind == 'search' else f'P{product}'}")
        if kind == "buy" and n % 2:  # a basket: two things at one time
            log.append(f"{user},{at},{kind},{WORDS[(product + 1) % 6]},P{(product + 1) % 6}")
        for slot in range(3):
            sku = f"P{(product + slot) % 6}"
            shown.append(f"{n},{user},{sku},{at},{int(slot == n % 4)},{slot}")
    products = ["sku,title,cost,shelf"]
    products += [f"P{n},{w.title()},{1.5 * n},{'wood' if n < 3 else 'metal'}" for n, w in
                 enumerate(WORDS)]  # fmt: skip
    for name, lines in (("log", log), ("shown", shown), ("products", products)):
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def kitchen_folder(tmp_path: Path) -> Path:
    """Folder with the CSV files and the data set file."""
    folder = tmp_path / "kitchen"
    folder.mkdir()
    write_files(folder)
    (folder / "kitchen.toml").write_text(TOML, encoding="utf-8")
    return folder


@pytest.fixture
def kitchen(kitchen_folder: Path) -> LoadedDataSet:
    """The data set, loaded."""
    return load_dataset(kitchen_folder / "kitchen.toml")


@pytest.fixture(params=PROFILES)
def profile(request: pytest.FixtureRequest) -> str:
    """Every profile in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def home(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Home]:
    """The kitchen in the stores of every profile."""
    from tests.feature_repo.live_homes import live_kitchen  # which needs this module

    with live_kitchen(tmp_path_factory.mktemp("kitchen"), request) as home:
        yield home
