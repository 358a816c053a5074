"""Rows hold whole examples, of which the answers are learned; a batch is a function of its step."""

from collections import Counter

import numpy as np
import pytest
import torch

from encoders.lm.documents import start_token
from encoders.lm.examples import Example
from encoders.lm.instruction_rows import InstructionStream, prompt_tokens
from encoders.lm.loss import IGNORED, LanguageModelLoss
from encoders.lm.packing import PackedRows
from feature_repo.errors import EncoderError
from tests.encoders.lm.planted_models import byte_tokenizer, small_model

TOKENIZER = byte_tokenizer()
LENGTH = 48


def examples(num: int) -> list[Example]:
    random = np.random.default_rng(0)
    return [
        Example("t", "train", str(n), "ask", "x" * random.integers(1, 20), (f"a{n}",), {})
        for n in range(num)
    ]


def stream(num: int = 23, *, rows: int = 4, seed: int = 0) -> InstructionStream:
    return InstructionStream(
        examples(num), TOKENIZER, sequence_length=LENGTH, batch_rows=rows, seed=seed
    )


def learned(rows: PackedRows) -> list[str]:
    """What each example in the rows answers, and the end, as text."""
    found = []
    for targets in rows.targets.tolist():
        text = TOKENIZER.decode([t if t != IGNORED else 0 for t in targets])
        found += [answer for answer in text.split("<|end|>") if answer]
    return found


def test_every_example_is_learned_once_in_an_epoch_and_none_is_cut() -> None:
    made = stream()
    first = made.rows(0, made.num_rows)
    assert Counter(learned(first)) == Counter(f"a{n}" for n in range(23))
    # The second epoch holds them again, in another order.
    both = learned(made.rows(0, 2 * made.num_rows + 4))
    assert Counter(both[:46]) == Counter([f"a{n}" for n in range(23)] * 2)
    assert both[:23] != both[23:46]


def test_inputs_are_the_start_the_prompt_and_the_answer() -> None:
    example = examples(1)[0]
    row = InstructionStream([example], TOKENIZER, sequence_length=LENGTH, batch_rows=1, seed=0)
    rows = row.batch(0)
    prompt, answer = (TOKENIZER(text)["input_ids"] for text in (example.prompt, "a0"))
    num = len(prompt) + len(answer) + 1
    assert rows.inputs[0, :num].tolist() == [start_token(TOKENIZER), *prompt, *answer]
    expected = [IGNORED] * len(prompt) + [*answer, TOKENIZER.eos_token_id]
    assert rows.targets[0, :num].tolist() == expected
    assert (rows.targets[0, num:] == IGNORED).all()
    assert rows.positions[0, :num].tolist() == list(range(num))
    assert rows.positions[0, num] == 0
    assert rows.num_targets == len(answer) + 1


def test_a_batch_is_a_function_of_its_step_and_the_seed() -> None:
    made = stream()
    later = [made.batch(step) for step in range(8)]
    fresh = stream().batch(7)
    assert torch.equal(fresh.inputs, later[7].inputs)
    assert torch.equal(fresh.targets, later[7].targets)
    assert torch.equal(fresh.positions, later[7].positions)
    assert not torch.equal(stream(seed=1).batch(0).inputs, later[0].inputs)
    assert made.num_steps(2) == round(2 * made.num_rows / 4)
    assert made.num_steps(1e-6) == 1


def test_the_loss_of_packed_rows_is_that_of_the_examples_alone() -> None:
    model = LanguageModelLoss(small_model(length=LENGTH))
    made = stream(9)
    with torch.no_grad():
        together = made.rows(0, made.num_rows)
        packed = float(model(together.inputs, together.targets, together.positions))
        alone = 0.0
        for example in examples(9):
            row = InstructionStream(
                [example], TOKENIZER, sequence_length=LENGTH, batch_rows=1, seed=0
            ).batch(0)
            alone += float(model(row.inputs, row.targets, row.positions))
    assert packed == pytest.approx(alone, rel=1e-4)


def test_a_long_record_loses_what_comes_first() -> None:
    example = Example("t", "train", "k", "ask", "".join(map(chr, range(97, 123))), ("a",), {})
    whole = prompt_tokens(TOKENIZER, [example], longest=100)[0]
    assert TOKENIZER.decode(whole) == example.prompt
    cut = prompt_tokens(TOKENIZER, [example], longest=15)[0]
    assert len(cut) == 15
    assert TOKENIZER.decode(cut) == "<|instruction|>askqrstuvwxyz<|answer|>"
    with pytest.raises(EncoderError, match="the instruction 'ask' alone is longer than the 4"):
        prompt_tokens(TOKENIZER, [example], longest=4)
    with pytest.raises(EncoderError, match="at least one example, got none"):
        InstructionStream([], TOKENIZER, sequence_length=8, batch_rows=1, seed=0)
