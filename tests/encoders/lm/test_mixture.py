"""The mixture's shares, by hand."""

from datetime import UTC, datetime

import pytest

from encoders.lm.corpus import CorpusManifest, MixtureConfig, SourceSummary, SplitSize
from encoders.lm.mixture import CONTINUED_GENERAL_SHARE, mixture
from feature_repo.errors import DataSetError


def corpus(**train_bytes: int) -> CorpusManifest:
    sources = {
        name: SourceSummary(
            kind="general" if name.startswith("general") else "domain",
            origin="",
            fingerprint="",
            splits={
                "train": SplitSize(documents=1, bytes=size),
                "valid": SplitSize(),
                "test": SplitSize(),
            },
            dropped={},
            languages={},
            scrubbed={},
        )
        for name, size in train_bytes.items()
    }
    moment = datetime(2024, 1, 1, tzinfo=UTC)
    return CorpusManifest(
        created=moment,
        fingerprint="",
        dataset="",
        until=moment,
        sources=sources,
        special_tokens=(),
        mixture=MixtureConfig(temperature=2),
        options={},
    )


SMALL = corpus(listings=100, orders=900, general=4000, general_empty=0)


def test_shares_are_proportional_to_bytes() -> None:
    shares = mixture(SMALL, MixtureConfig(temperature=1))
    assert shares == {"listings": 0.02, "orders": 0.18, "general": 0.8}


def test_temperature_lifts_small_sources_and_the_corpus_own_is_the_default() -> None:
    total = 10 + 30 + 4000**0.5
    expected = {"listings": 10 / total, "orders": 30 / total, "general": 4000**0.5 / total}
    assert mixture(SMALL) == pytest.approx(expected)


def test_general_text_is_half_where_a_model_goes_on() -> None:
    shares = mixture(SMALL, MixtureConfig(temperature=1, general_share=CONTINUED_GENERAL_SHARE))
    assert shares == pytest.approx({"listings": 0.05, "orders": 0.45, "general": 0.5})
    alone = corpus(listings=1, orders=3)
    assert mixture(alone, MixtureConfig(temperature=1, general_share=0.5)) == {
        "listings": 0.25,
        "orders": 0.75,
    }


def test_weights_are_factors_and_0_leaves_out() -> None:
    shares = mixture(
        SMALL, MixtureConfig(temperature=1, weights={"listings": 10.0, "general": 0.0})
    )
    assert shares == pytest.approx({"listings": 1000 / 1900, "orders": 900 / 1900})


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (MixtureConfig(weights={"lists": 1}), "'lists', but the corpus has the sources listings,"),
        (MixtureConfig(weights={"listings": -1}), "weight of listings must be at least 0, got -1"),
        (
            MixtureConfig(weights={"listings": 0, "orders": 0, "general": 0}),
            "no source of the corpus has training text and a weight above 0",
        ),
    ],
)
def test_sentences(config: MixtureConfig, sentence: str) -> None:
    with pytest.raises(DataSetError, match=sentence):
        mixture(SMALL, config)
