"""Tasks ask what the tables say, hold out what is measured, and see nothing of the future."""

import json
from collections import Counter
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from encoders.lm.corpus_builder import CorpusConfig, build_corpus
from encoders.lm.examples import Example, TaskConfig, examples_fingerprint
from encoders.lm.filters import FilterConfig
from encoders.lm.queries import Queries
from encoders.lm.records import plain
from encoders.lm.task_scores import score, score_tasks, word_f1
from encoders.lm.tasks import build_examples, choose
from feature_repo.behavior import hash63
from feature_repo.errors import DataSetError, EncoderError, MissingStepError
from feature_repo.home import Home
from feature_repo.manifest import load_manifest
from tests.encoders.lm.shop_home import NEW, TITLES, VALID, bought, make_home, price_of

CONFIG = TaskConfig(test_share=0.25, valid_share=0.1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_home(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def examples(home: Home) -> list[Example]:
    return build_examples(home, CONFIG)


def of(examples: list[Example], task: str, split: str | None = None) -> list[Example]:
    return [e for e in examples if e.task == task and split in (None, e.split)]


def title_in(example: Example) -> str:
    return example.record.split("<|title|>")[1]


def test_there_is_one_task_per_kind_of_question(examples: list[Example]) -> None:
    """The code is an identity, the stock is always the same: nothing can be asked of them."""
    found = {example.task for example in examples}
    assert found == {
        *("attribute:price", "attribute:shelf"),
        *("query", "title", "next_purchase"),
    }


def test_bands_are_fifths_of_what_is_learned(examples: list[Example]) -> None:
    found = of(examples, "attribute:price")
    names = ["lowest", "low", "middle", "high", "highest"]
    assert {e.instruction for e in found} == {"price band"}
    for one in found:
        for other in found:
            if price_of(title_in(one)) < price_of(title_in(other)):
                assert names.index(one.answers[0]) <= names.index(other.answers[0])
    # The price is that of the last version before the validation period: 99 is that of others.
    counted = Counter(e.answers[0] for e in found if e.split == "train")
    assert set(counted) == set(names)
    assert max(counted.values()) <= 0.4 * counted.total()
    most = {e.rules["most_frequent"] for e in found}
    assert most == {min(counted, key=lambda name: (-counted[name], name))}


def test_a_categorical_column_is_its_value(examples: list[Example]) -> None:
    for example in of(examples, "attribute:shelf"):
        color = title_in(example).split(" ")[0]
        assert example.answers == (f"shelf of {color}",)
        assert example.prompt == (
            f"<|instruction|>shelf<|listing|><|title|>{title_in(example)}<|answer|>"
        )


def test_titles_come_from_columns_and_neighbours(examples: list[Example]) -> None:
    titles = of(examples, "title")
    assert {e.answers[0] for e in titles} == {*TITLES, *NEW}
    for example in titles:
        assert example.answers[0] not in example.record
        if example.is_new:
            assert "<|order|>" not in example.record
            assert example.rules == {"first_neighbor": ""}
            continue
        color = example.answers[0].split(" ")[0]
        assert f"<|field:shelf|>shelf of {color}" in example.record
        assert f"<|field:price|>{price_of(example.answers[0]):g}" in example.record
        neighbors = example.record.split("<|scene:purchase|>")[1:]
        # Only things of one colour are bought together.
        assert neighbors
        assert all(text.startswith(color) for text in neighbors)
        assert example.rules == {"first_neighbor": neighbors[0]}


def test_items_are_held_out_by_title_in_all_tasks(examples: list[Example]) -> None:
    split_of: dict[str, str] = {}
    for example in examples:
        if example.task != "next_purchase":
            assert split_of.setdefault(example.key, example.split) == example.split
    assert Counter(split_of.values())["test"] > len(NEW)
    assert set(split_of.values()) == {"train", "valid", "test"}
    new = {e.key for e in examples if e.is_new}
    assert new == {f"item {title}" for title in NEW}
    assert all(split_of[key] == "test" for key in new)


def test_the_next_basket_is_foretold_from_what_came_before(examples: list[Example]) -> None:
    found = of(examples, "next_purchase")
    assert {e.split for e in found} == {"train", "valid", "test"}
    days = {"train": range(1, 20), "valid": range(20, 24), "test": range(24, 28)}
    for example in found:
        user = int(example.key.removeprefix("u"))
        fitting = [
            day
            for day in days[example.split]
            if set(example.answers) == set(bought(user, day))
            and example.record.endswith("<|days|>1")
        ]
        assert fitting
        shown = example.record.removeprefix("<|history|>").split("<|scene:purchase|>")[1:]
        texts = [text.split("<|")[0] for text in shown]
        # The newest 20 lines, the last two of which are the day before's.
        assert any(set(texts[-2:]) == set(bought(user, day - 1)) for day in fitting)
        assert len(texts) <= CONFIG.history_lines
        assert example.rules["users_usual"] in texts
    assert len({e.rules["popular"] for e in found}) == 1
    assert max(Counter((e.key, e.split) for e in found).values()) == CONFIG.user_baskets


@pytest.mark.parametrize("searches", [False, True])
def test_later_events_and_versions_change_no_learned_example(
    tmp_path: Path, searches: bool
) -> None:
    before = make_home(tmp_path / "before", searches=searches)
    events = pq.read_table(before.events / "part-00000.parquet")
    valid = load_manifest(before).split.valid
    past = [row for row in events.to_pylist() if row["event_timestamp"] < valid]
    learned = [e for e in build_examples(before, CONFIG) if e.split == "train"]
    pq.write_table(events.from_pylist(past, events.schema), before.events / "part-00000.parquet")
    items = pq.read_table(before.items)
    kept = [row for row in items.to_pylist() if row["event_timestamp"] < valid]
    pq.write_table(items.from_pylist(kept, items.schema), before.items)
    again = [e for e in build_examples(before, CONFIG) if e.split == "train"]
    assert again == learned
    # And what comes before does.
    pq.write_table(
        events.from_pylist(past[: len(past) // 2], events.schema),
        before.events / "part-00000.parquet",
    )
    assert [e for e in build_examples(before, CONFIG) if e.split == "train"] != learned


def test_draws_are_bounded_and_repeatable(home: Home, examples: list[Example]) -> None:
    few = replace(CONFIG, max_train=3, max_valid=0, max_test=2)
    counted = Counter((e.task, e.split) for e in build_examples(home, few))
    assert set(counted.values()) == {3, 2}
    assert {split for _, split in counted} == {"train", "test"}
    assert examples_fingerprint(build_examples(home, CONFIG)) == examples_fingerprint(examples)
    other = build_examples(home, replace(few, seed=1))
    assert examples_fingerprint(other) != examples_fingerprint(build_examples(home, few))
    with pytest.raises(DataSetError, match="no task has an example in the split valid"):
        choose(other, "valid")


def test_queries_are_the_most_telling_words(home: Home) -> None:
    titles = ["red oak cup", "red oak bowl", "red tin cup", "blue oak lamp", "tin x9", "tin x9"]
    queries = Queries.read(home, load_manifest(home), titles, 2, plain)
    assert queries.num_titles["red"] == 3
    # cup is in 2 titles, oak and red in 3; of oak and red the later one. lamp is in one only.
    assert queries.of("", "red oak cup", "train") == ("oak cup",)
    assert queries.of("", "blue oak lamp", "test") == ()
    assert queries.of("", "tin x9", "train") == ()  # a code is no word


def test_where_searches_are_logged_they_are_the_queries(tmp_path: Path) -> None:
    home = make_home(tmp_path, searches=True)
    found = of(build_examples(home, CONFIG), "query")
    assert found
    for example in found:
        # What was searched for a minute before is the last word of one of the two things bought.
        assert example.answers[0] in {"cup", "bowl", "lamp", "box", "tray"}
    assert any(e.answers[0] == title_in(e).split(" ")[-1] for e in found)


def test_later_searches_are_told_and_never_learned(tmp_path: Path) -> None:
    """From the validation period on all search in other words."""
    home = make_home(tmp_path, searches=True)
    path = home.events / "part-00000.parquet"
    events = pq.read_table(path)
    rows = events.to_pylist()
    for row in rows:
        # A minute before, for the first of them was answered in that period.
        if row["scene"] == "search" and row["event_timestamp"] >= VALID - timedelta(minutes=1):
            row["behavior_id"] = hash63("later words")
    pq.write_table(events.from_pylist(rows, events.schema), path)
    behaviors = pq.read_table(home.behaviors)
    more = {**behaviors.to_pylist()[0], "text": "later words", "behavior_id": hash63("later words")}
    pq.write_table(
        behaviors.from_pylist([*behaviors.to_pylist(), more], behaviors.schema), home.behaviors
    )
    found = of(build_examples(home, CONFIG), "query")
    assert {e.split for e in found} >= {"train", "test"}
    assert all("later words" not in e.answers for e in found if e.split == "train")
    assert any("later words" in e.answers for e in found if e.split != "train")


def test_where_the_corpus_was_scrubbed_so_are_the_tasks(tmp_path: Path) -> None:
    home = make_home(tmp_path, searches=True)
    behaviors = pq.read_table(home.behaviors)
    rows = [{**row, "text": f"{row['text']} for a@b.de"} for row in behaviors.to_pylist()]
    pq.write_table(behaviors.from_pylist(rows, behaviors.schema), home.behaviors)
    items = pq.read_table(home.items)
    rows = [{**row, "shelf": f"{row['shelf']}, a@b.de"} for row in items.to_pylist()]
    pq.write_table(items.from_pylist(rows, items.schema), home.items)
    listings = CorpusConfig(sources=("listings",))
    for scrub, kept, gone in ((False, "a@b.de", "[email]"), (True, "[email]", "a@b.de")):
        build_corpus(home, replace(listings, filters=FilterConfig(scrub=scrub)))
        found = build_examples(home, CONFIG)
        assert {"attribute:shelf", "query", "title", "next_purchase"} < {e.task for e in found}
        for example in found:
            told = json.dumps(asdict(example))
            assert kept in told
            assert gone not in told


def test_scores_by_hand() -> None:
    assert word_f1("red oak cup", "red tin cup") == pytest.approx(2 / 3)
    assert word_f1("a a b", "a b b") == pytest.approx(2 / 3)
    assert word_f1("", "a") == 0
    assert word_f1("", "") == 1
    one = Example("t", "test", "k1", "i", "r", ("red cup", "blue cup"), {"rule": "blue cup"})
    two = Example("t", "test", "k2", "i", "r", ("tin",), {"rule": ""}, is_new=True)
    found = score([one, two], [" blue cup ", "box"])
    assert (found.num, found.exact, found.word_f1) == (2, 0.5, 0.5)
    assert (found.low, found.high) == (0.0, 1.0)
    by_task = score_tasks([one, two], ["green cup", "tin"])["t"]
    assert by_task.model.exact == 0.5
    assert by_task.model.word_f1 == pytest.approx(0.75)
    assert by_task.new is not None
    assert (by_task.new.num, by_task.new.exact, by_task.new.low) == (1, 1.0, None)
    assert by_task.rules["rule"].exact == 0.5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"test_share": 1.0}, r"test_share must be in \[0, 1\), got 1.0"),
        ({"test_share": 0.6, "valid_share": 0.5}, "must leave items to learn from"),
        ({"max_train": 0}, "max_train must be at least 1, got 0"),
        ({"num_neighbors": -1}, "num_neighbors must be at least 0, got -1"),
    ],
)
def test_the_configuration_is_checked(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EncoderError, match=sentence):
        TaskConfig(**change)


def test_without_tables_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MissingStepError, match="run `longtrail ingest` first"):
        build_examples(Home(tmp_path))
