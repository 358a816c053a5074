"""Texts are continued as without a cache, alone or together, until the end, in whole characters."""

from typing import Any

import pytest
import torch

from encoders.lm.documents import start_token
from encoders.lm.generation import GenerationOptions, generate
from encoders.lm.generation_speed import measure_speeds
from feature_repo.errors import EncoderError
from tests.encoders.lm.planted_models import (
    NUM_TOKENS,
    byte_tokenizer,
    chain,
    planted_model,
    small_model,
)

TOKENIZER = byte_tokenizer()


def without_cache(model: Any, prompt: str, num: int) -> str:
    """The likeliest tokens, the whole text computed again for each."""
    row = [start_token(TOKENIZER), *TOKENIZER(prompt)["input_ids"]]
    width = len(row)
    for _ in range(num):
        with torch.inference_mode():
            row.append(int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
        if row[-1] == TOKENIZER.eos_token_id:
            row.pop()
            break
    return str(TOKENIZER.decode(row[width:])).rstrip("\N{REPLACEMENT CHARACTER}")


def test_greedy_is_the_likeliest_token_each_time_alone_or_together() -> None:
    model = small_model()
    prompts = ["a", "some longer prompt", "", "ünïcode", "four"]
    options = GenerationOptions(max_tokens=12, batch_texts=3)
    together = generate(model, TOKENIZER, prompts, options)
    assert all(together)
    for prompt, text in zip(prompts, together, strict=True):
        assert text == without_cache(model, prompt, 12)
        assert generate(model, TOKENIZER, [prompt], options) == [text]


def test_it_stops_at_the_end_and_streams_no_half_characters() -> None:
    answer = "né中🎁x"
    model = planted_model(chain(TOKENIZER, ":" + answer))
    pieces: list[str] = []
    assert generate(model, TOKENIZER, ["12:"], on_text=pieces.append) == [answer]
    assert pieces == list(answer)
    # Cut off inside of a character: three of the gift's four bytes are written.
    pieces.clear()
    cut = GenerationOptions(max_tokens=len("né中".encode()) + 3)
    assert generate(model, TOKENIZER, ["12:"], cut, on_text=pieces.append) == ["né中"]
    assert pieces == list("né中")
    # Texts that end at different places, in one batch.
    assert generate(model, TOKENIZER, [":", ":n", "x"]) == [answer, answer[1:], ""]


def test_special_tokens_are_written() -> None:
    follows = {TOKENIZER.convert_tokens_to_ids("<|answer|>"): TOKENIZER("b")["input_ids"][0]}
    first = TOKENIZER("a")["input_ids"][0]
    model = planted_model({first: TOKENIZER.convert_tokens_to_ids("<|answer|>"), **follows})
    assert generate(model, TOKENIZER, ["a"]) == ["<|answer|>b"]


def test_draws_follow_the_seed_and_the_temperature() -> None:
    model = small_model()
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.5}
    state = torch.random.get_rng_state()
    first = generate(model, TOKENIZER, ["a"], GenerationOptions(**options, seed=1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert generate(model, TOKENIZER, ["a"], GenerationOptions(**options, seed=1)) == first
    assert generate(model, TOKENIZER, ["a"], GenerationOptions(**options, seed=2)) != first
    # With next to no temperature, or nothing but the likeliest token, it is greedy.
    greedy = generate(model, TOKENIZER, ["a"], GenerationOptions(max_tokens=20))
    for near in ({"temperature": 1e-4}, {"top_p": 1e-6}):
        drawn = GenerationOptions(**{**options, **near})
        assert generate(model, TOKENIZER, ["a"], drawn) == greedy


def test_all_tokens_can_be_drawn() -> None:
    """transformers draws from the 50 likeliest unless it is told not to."""
    model = planted_model({})  # every other token is equally likely
    drawn = {
        text
        for seed in range(3)
        for text in generate(
            model, TOKENIZER, ["a"] * 100, GenerationOptions(1, 100.0, seed=seed, batch_texts=100)
        )
    }
    assert len(drawn) > 60


def test_the_length_of_the_model_is_the_limit() -> None:
    model = small_model(length=16)
    full = "a" * 15
    assert len(generate(model, TOKENIZER, ["a" * 10])[0]) <= 5 * 4
    with pytest.raises(
        EncoderError, match="shorter than the model's 16 tokens, its start token included, got 16"
    ):
        generate(model, TOKENIZER, [full])
    with pytest.raises(ValueError, match="exactly one prompt, got 2"):
        generate(model, TOKENIZER, ["a", "b"], on_text=print)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_the_options_are_checked(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(EncoderError, match=sentence):
        GenerationOptions(**change)


def test_longer_tokens_write_the_same_text_faster() -> None:
    texts = ["white hanging heart t-light holder"] * 6
    longer = byte_tokenizer(texts, num_tokens=NUM_TOKENS + 40)
    models = {
        "bytes": (small_model(NUM_TOKENS + 40), TOKENIZER),
        "merged": (small_model(NUM_TOKENS + 40), longer),
    }
    speeds = measure_speeds(models, texts, rounds=3)
    one, other = speeds["bytes"], speeds["merged"]
    assert one.num_characters == other.num_characters == sum(map(len, texts))
    assert one.num_tokens == one.num_characters
    assert other.characters_per_token > 3 * one.characters_per_token
    assert len(one.seconds) == 3
    assert other.characters_per_s > 1.5 * one.characters_per_s
    assert one.characters_per_s == pytest.approx(one.tokens_per_s * one.characters_per_token)
    with pytest.raises(EncoderError, match="at least one text, got none"):
        measure_speeds(models, [])
    with pytest.raises(EncoderError, match="a text of 201 tokens does not fit a model of 128"):
        measure_speeds(models, ["a" * 200])
