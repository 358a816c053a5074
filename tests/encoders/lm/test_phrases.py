"""The phrase trainer, beside one that counts everything anew for every merge."""

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.lm.phrases import Pair, learn_phrases

Texts = Mapping[tuple[str, ...], int]


def merged(tokens: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    out: list[str] = []
    for token in tokens:
        if out and (out[-1], token) == pair:
            out[-1:] = ["".join(pair)]
            # A merged token takes part in no merge of this round.
            out.append("")
        else:
            out.append(token)
    return tuple(token for token in out if token)


def naive(
    texts: Texts, vocabulary: set[str], num_merges: int, min_frequency: int, min_texts: int
) -> list[Pair]:
    rows = [(tuple(tokens), count) for tokens, count in texts.items()]
    known, merges = set(vocabulary), []
    while len(merges) < num_merges:
        frequency: Counter[Pair] = Counter()
        places: Counter[Pair] = Counter()
        for tokens, count in rows:
            for pair in pairwise(tokens):
                frequency[pair] += count
            places.update(set(pairwise(tokens)))
        allowed = [
            (-count, pair)
            for pair, count in frequency.items()
            if count >= min_frequency
            and places[pair] >= min_texts
            and "".join(pair) not in known
            and sum(c in "0123456789" for c in "".join(pair)) <= 3
        ]
        if not allowed:
            break
        _, best = min(allowed)
        merges.append(best)
        known.add("".join(best))
        rows = [(merged(tokens, best), count) for tokens, count in rows]
    return merges


TEXTS = st.dictionaries(
    st.lists(st.sampled_from(["a", "b", "ab", "1", "23"]), max_size=8).map(tuple),
    st.integers(1, 5),
    max_size=8,
)


@settings(derandomize=True, max_examples=300)
@given(TEXTS, st.integers(1, 12), st.integers(1, 4), st.integers(1, 3))
def test_it_is_the_same_as_counting_anew(
    texts: Texts, num_merges: int, min_frequency: int, min_texts: int
) -> None:
    vocabulary = {"a", "b", "ab", "1", "23"}
    found = learn_phrases(
        texts,
        vocabulary,
        num_merges=num_merges,
        min_frequency=min_frequency,
        min_texts=min_texts,
    )
    assert found == naive(texts, vocabulary, num_merges, min_frequency, min_texts)


def learned(texts: Texts, **changes: int) -> list[str]:
    options = {"num_merges": 100, "min_frequency": 1, "min_texts": 2} | changes
    vocabulary = {token for tokens in texts for token in tokens}
    return ["".join(pair) for pair in learn_phrases(texts, vocabulary, **options)]


SHOP = {
    ("red", " lunch", " bag"): 1000,
    ("blue", " lunch", " bag"): 2,
    ("set", " of", " 3", " lunch", " bag"): 5,
}


def test_what_one_text_says_is_not_memorised_however_often() -> None:
    assert learned(SHOP) == [" lunch bag"]
    assert "red lunch bag" in learned(SHOP, min_texts=1)


def test_rare_pairs_are_left_apart() -> None:
    assert learned(SHOP, min_frequency=1008) == []
    assert learned(SHOP, min_frequency=1007) == [" lunch bag"]


def test_no_phrase_has_more_than_three_digits() -> None:
    texts = {("of", " 12", "34", " a"): 9, ("of", " 12", "34", " b"): 9}
    assert learned(texts) == ["of 12"]


def test_a_phrase_has_one_way_of_being_made() -> None:
    # "abc" comes of ("a", "bc") first; ("ab", "c") would be a second way to the same token.
    texts = {("a", "bc", "x"): 9, ("a", "bc", "y"): 9, ("ab", "c", "x"): 2, ("ab", "c", "y"): 2}
    assert learned(texts) == ["abc"]


def test_news_are_told() -> None:
    told: list[int] = []
    learn_phrases(
        SHOP,
        set(),
        num_merges=5,
        min_frequency=1,
        min_texts=2,
        progress=lambda advance, _total, **_figures: told.append(advance),
    )
    assert told == [1]
