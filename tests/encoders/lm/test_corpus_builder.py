"""The corpus: nothing of the future in training, every line in its place, kills and repetitions."""

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from encoders.lm.corpus import SPLITS, MixtureConfig, load_corpus, read_documents
from encoders.lm.corpus_builder import CorpusConfig, build_corpus
from encoders.lm.filters import FilterConfig
from encoders.lm.text_files import FileSource
from encoders.lm.tokenizer import train_tokenizer
from encoders.lm.tokenizer_config import TokenizerConfig
from feature_repo.behavior import hash63
from feature_repo.errors import DataSetError, LongtrailError, MissingStepError
from feature_repo.home import Home
from feature_repo.manifest import ItemColumn, load_manifest
from tests.encoders.lm.planted_shop import NUM_DAYS, TITLES, items, make_shop, orders
from tests.encoders.planted import DAY, START, TEST, VALID

RECORDS = CorpusConfig(sources=("listings", "baskets", "histories"))
SENTENCES = [
    f"Number {n}: these {'wooden ' * (n % 7)}plates are {n}th of their kind." for n in range(200)
]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_shop(tmp_path / "home")


@pytest.fixture
def reviews(tmp_path: Path) -> FileSource:
    folder = tmp_path / "reviews"
    folder.mkdir()
    for place, sentence in enumerate(SENTENCES):
        (folder / f"{place}.txt").write_text(sentence)
    return FileSource("reviews", "domain", str(folder / "*.txt"))


def texts(home: Home, split: Any, source: str) -> list[str]:
    found: list[str] = read_documents(home, split, source)["text"].to_pylist()
    return found


def contents(home: Home) -> dict[str, bytes]:
    return {str(p.relative_to(home.root)): p.read_bytes() for p in home.corpus.rglob("*.parquet")}


def test_documents_are_split_by_time_and_nothing_is_lost(home: Home) -> None:
    manifest = build_corpus(home, RECORDS)
    assert manifest == load_corpus(home)
    assert manifest.until == VALID
    bounds = {"train": (START, VALID), "valid": (VALID, TEST), "test": (TEST, START + 200 * DAY)}
    for name, summary in manifest.sources.items():
        for split, (first, stop) in bounds.items():
            table = read_documents(home, split, name)
            documents = table["text"].to_pylist()
            assert table["document_id"].to_pylist() == [hash63(text) for text in documents]
            assert all(first <= time < stop for time in table["time"].to_pylist())
            assert summary.splits[split].documents == len(documents) > 0
            assert summary.splits[split].bytes == sum(len(text.encode()) for text in documents)
    lines = orders()
    for name in ("baskets", "histories"):
        kept = [text for split in SPLITS for text in texts(home, split, name)]
        assert len(re.findall(r"<\|scene:(buy|return)\|>", "".join(kept))) == len(lines)
    baskets = [text for split in SPLITS for text in texts(home, split, "baskets")]
    assert len(baskets) == len({line[:2] for line in lines})
    listed = [text for split in SPLITS for text in texts(home, split, "listings")]
    assert len(listed) + sum(manifest.sources["listings"].dropped.values()) == len(TITLES)
    first = items()[1]
    assert f"<|listing|><|title|>{first[2]}<|field:price|>2.25<|field:shelf|>home & gifts" in listed
    special = set(manifest.special_tokens)
    everything = "".join([*listed, *baskets, *kept])
    assert set(re.findall(r"<\|[^|]+\|>", everything)) <= special


def test_a_later_event_changes_nothing_in_training(home: Home, tmp_path: Path) -> None:
    build_corpus(home, RECORDS)
    past = [line for line in orders() if line[1] < VALID]
    future = [("user1", VALID, "buy", TITLES[0]), ("user7", TEST, "buy", "never seen before")]
    known = [item for item in items() if item[1] < VALID]
    changed = make_shop(
        tmp_path / "changed", [*past, *future], [*known, ("item0", VALID, TITLES[3], 9.0, None)]
    )
    build_corpus(changed, RECORDS)
    for name in RECORDS.sources:
        assert texts(home, "train", name) == texts(changed, "train", name)
        assert texts(home, "valid", name) != texts(changed, "valid", name)


def test_a_history_spans_neither_a_cut_nor_a_period(home: Home) -> None:
    build_corpus(home, replace(RECORDS, history_days=30))
    for split in SPLITS:
        for text in texts(home, split, "histories"):
            gaps = [int(days) for days in re.findall(r"<\|days\|>(\d+)", text)]
            assert sum(gaps) < 30
            assert text.count("<|order|>") == len(gaps) + 1
    longest = build_corpus(home, replace(RECORDS, history_days=1000)).sources["histories"]
    assert longest.splits["train"].documents == 6  # one per user


def test_building_again_changes_nothing_until_the_data_does(
    home: Home, reviews: FileSource
) -> None:
    first = build_corpus(home, RECORDS)
    before = {path: path.stat().st_mtime_ns for path in home.corpus.rglob("*")}
    assert build_corpus(home, RECORDS) == first
    assert {path: path.stat().st_mtime_ns for path in home.corpus.rglob("*")} == before

    read: list[int] = []

    def count(advance: int, total: int, **figures: float) -> None:
        read.append(advance)

    kept = contents(home)
    more = build_corpus(home, replace(RECORDS, files=(reviews,)), count)
    assert sum(read) == len(SENTENCES)  # the tables are not read again
    assert kept.items() <= contents(home).items()
    assert more.fingerprint != first.fingerprint
    (home.corpus / "test" / "listings.parquet").unlink()
    with pytest.raises(MissingStepError, match="run `longtrail lm corpus` again"):
        read_documents(home, "test", "listings")
    weighed = replace(RECORDS, mixture=MixtureConfig(general_share=0.5))
    assert build_corpus(home, weighed).fingerprint == first.fingerprint
    assert load_corpus(home).mixture.general_share == 0.5
    assert contents(home) == kept


def ingest_again(home: Home, **changes: Any) -> None:
    """What an ingest of other data would leave in the manifest."""
    changes["source_fingerprint"] = "1"
    load_manifest(home).model_copy(update=changes).save(home.manifest)


def test_a_corpus_of_other_tables_is_refused_until_it_is_built_again(home: Home) -> None:
    first = build_corpus(home, RECORDS)
    assert first.tables == "0"
    ingest_again(home)
    with pytest.raises(MissingStepError, match=r"of other tables .* `longtrail lm corpus` again"):
        load_corpus(home)
    second = build_corpus(home, RECORDS)
    assert second.tables == "1"
    assert load_corpus(home) == second
    home.manifest.unlink()  # a home that keeps its models alone
    assert load_corpus(home) == second


def test_a_corpus_of_files_is_of_no_tables_but_knows_their_fields(
    home: Home, reviews: FileSource
) -> None:
    config = CorpusConfig(sources=(), files=(reviews,))
    first = build_corpus(home, config)
    assert first.tables is None
    kept = contents(home)
    small = TokenizerConfig(vocab_size=400, phrase_share=0.0)
    before = train_tokenizer(home, small).report
    columns = (*load_manifest(home).item_columns, ItemColumn(name="size", kind="numeric"))
    ingest_again(home, item_columns=columns)
    assert load_corpus(home) == first
    second = build_corpus(home, config)
    assert (second.fingerprint, contents(home)) == (first.fingerprint, kept)
    assert set(second.special_tokens) - set(first.special_tokens) == {"<|field:size|>"}
    # The same text, but other tokens: not the tokenizer that was there.
    after = train_tokenizer(home, small)
    assert after.report.num_special == before.num_special + 1
    assert len(AutoTokenizer.from_pretrained(after.folder).encode("<|field:size|>")) == 1


class Killed(BaseException):
    """Stands for a signal: nothing but the files remains."""


def test_a_killed_build_keeps_finished_sources(home: Home, tmp_path: Path) -> None:
    undisturbed = make_shop(tmp_path / "undisturbed")
    build_corpus(undisturbed, RECORDS)

    def kill(advance: int, total: int, **figures: float) -> None:
        seen.append(advance)
        if len(seen) == 2:
            raise Killed

    seen: list[int] = []
    with pytest.raises(Killed):
        build_corpus(home, RECORDS, kill)
    assert not home.corpus.exists()
    seen = [0, 0]
    build_corpus(home, RECORDS, kill)
    assert len(seen) == 4  # two sources of three, each one batch
    assert contents(home) == contents(undisturbed)
    assert [path.name for path in home.corpus.parent.iterdir()] == ["corpus"]


def prose(folder: Path, texts: Sequence[str]) -> FileSource:
    folder.mkdir()
    for place, text in enumerate(texts):
        (folder / f"{place}.txt").write_text(text)
    return FileSource(folder.name, "general", str(folder / "*.txt"))


def test_free_text_leaves_out_what_earlier_free_text_says(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("aeioulmnrst"), size=6)) for _ in range(500)]
    said = [f"{' '.join(random.choice(words, size=20))}." for _ in range(90)]
    first = prose(tmp_path / "first", said[:60])
    second = prose(tmp_path / "second", [f"{text}!" for text in said[:30]] + said[50:])
    both = CorpusConfig(sources=("listings",), files=(first, second))
    at_once = make_shop(tmp_path / "at_once")
    sources = build_corpus(at_once, both).sources
    assert sources["first"].dropped == {}
    assert sources["second"].dropped == {"near_duplicate": 30, "exact_duplicate": 10}

    def kill(advance: int, total: int, **figures: float) -> None:
        seen.append(advance)
        if len(seen) == 3:
            raise Killed

    seen: list[int] = []
    killed = make_shop(tmp_path / "killed")
    with pytest.raises(Killed):
        build_corpus(killed, both, kill)
    build_corpus(killed, both)
    later = make_shop(tmp_path / "later")
    build_corpus(later, replace(both, files=(first,)))
    build_corpus(later, both)
    assert contents(at_once) == contents(killed) == contents(later)
    # Where the first is another one, the second is too.
    prose(tmp_path / "other", said[80:])
    changed = replace(both, files=(replace(first, pattern=str(tmp_path / "other" / "*")), second))
    assert build_corpus(later, changed).sources["second"].dropped == {"exact_duplicate": 10}


def test_free_text_is_filtered_labelled_and_split_by_hash(home: Home, reviews: FileSource) -> None:
    folder = Path(reviews.pattern).parent
    for name, text in {
        "copy": SENTENCES[0],
        "near": SENTENCES[1] + "!",
        "german": "Diese Teller sind aus Holz und halten viele Jahre, auch im Garten.",
        "short": "plates",
        "mail": "Write to the makers of these plates at anna@example.com for more of them.",
        "mail_again": "Write to the makers of these plates at otto@example.com for more of them.",
        "forged": "The maker wrote <|end|> on all of these plates, which looks a little odd.",
    }.items():
        (folder / f"{name}.txt").write_text(text)
    (folder / "half.jsonl").write_text(r'{"text": "half a pair \ud800 of surrogates, sadly"}')
    reviews = replace(reviews, pattern=str(folder / "*"))
    filters = FilterConfig(near_duplicates=0.9, languages=("en",), scrub=True)
    config = CorpusConfig(sources=(), files=(reviews,), filters=filters)
    summary = build_corpus(home, config).sources["reviews"]
    dropped = dict(summary.dropped)
    assert dropped.pop("near_duplicate") >= 1
    assert dropped.pop("repeated_words", 0) < 40
    assert dropped == {"exact_duplicate": 2, "language": 1, "too_short": 1, "broken_encoding": 1}
    assert set(summary.languages) == {"en"}
    assert summary.scrubbed == {"email": 1}  # the second letter is the first without its address
    sizes = {split: size.documents for split, size in summary.splits.items()}
    assert sizes["train"] > 20 * max(sizes["valid"], 1)
    kept = [text for split in SPLITS for text in texts(home, split, "reviews")]
    assert any("at [email] for" in text for text in kept)
    assert any("wrote < |end|> on" in text for text in kept)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sources": ("lists",)}, "no built-in source 'lists': choose of listings, baskets, "),
        ({"sources": ()}, "a corpus needs at least one source, got none"),
        ({"sources": ("baskets", "baskets")}, "there are two sources 'baskets': give each"),
        ({"history_days": 0}, "history_days must be at least 1, got 0"),
    ],
)
def test_the_configuration_is_checked(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataSetError, match=sentence):
        CorpusConfig(**change)


def test_sentences(home: Home, tmp_path: Path) -> None:
    with pytest.raises(MissingStepError, match="run `longtrail lm corpus` first"):
        load_corpus(home)
    with pytest.raises(MissingStepError, match="run `longtrail ingest` first"):
        build_corpus(Home(tmp_path / "new"), RECORDS)
    with pytest.raises(DataSetError, match=r"must be alike by a number in \(0, 1\), got 1.5"):
        FilterConfig(near_duplicates=1.5)
    with pytest.raises(DataSetError, match="the mixture weighs 'lists', but the corpus has"):
        replace(RECORDS, mixture=MixtureConfig(weights={"lists": 1.0}))
    (tmp_path / "short.txt").write_text("short")
    files = (FileSource("mine", "domain", str(tmp_path / "short.txt")),)
    with pytest.raises(DataSetError, match=r"source mine gives no document \(1 too_short\)"):
        build_corpus(home, replace(RECORDS, files=files))
    assert not home.corpus.exists()
    with home.lock("corpus"), pytest.raises(LongtrailError, match="another process is writing"):
        build_corpus(home, RECORDS)
    late = make_shop(
        tmp_path / "late",
        orders(first_day=80, num_days=NUM_DAYS - 80),
        [(n, t + timedelta(days=200), *rest) for n, t, *rest in items()],  # type: ignore[misc]
    )
    with pytest.raises(DataSetError, match="no source of the corpus has training text and"):
        build_corpus(late, RECORDS)
    build_corpus(home, RECORDS)
    with pytest.raises(
        DataSetError, match="no source 'lists': it has baskets, histories, listings;"
    ):
        read_documents(home, "train", "lists")
