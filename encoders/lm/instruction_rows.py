"""Examples as tokens: prompts that fit a model, and rows of whole examples to learn from.

Shapes: B = rows of a batch, T = tokens of a row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from encoders.lm.documents import end_token, start_token
from encoders.lm.examples import Example
from encoders.lm.fertility import token_ids
from encoders.lm.loss import IGNORED
from encoders.lm.packing import PackedRows, pack
from encoders.lm.records import ANSWER, INSTRUCTION
from feature_repo.errors import EncoderError


def prompt_tokens(tokenizer: Any, examples: Sequence[Example], *, longest: int) -> list[list[int]]:
    """Token ids of every prompt, without a start token.

    Of a record that does not fit, its newest part is kept: the end of it, without what comes first.

    Args:
        tokenizer: Any.
        examples: N.
        longest: Tokens of a prompt.

    Raises:
        EncoderError: If an instruction alone is longer.
    """
    heads = token_ids(tokenizer, [INSTRUCTION + example.instruction for example in examples])
    bodies = token_ids(tokenizer, [example.record + ANSWER for example in examples])
    room = [longest - len(head) for head in heads]
    if room and min(room) < 1:
        raise EncoderError(
            f"the instruction {examples[int(np.argmin(room))].instruction!r} alone is longer than "
            f"the {longest} tokens that the model's length leaves to a prompt: take a longer model"
        )
    return [
        head + body[max(0, len(body) - left) :]
        for head, body, left in zip(heads, bodies, room, strict=True)
    ]


class InstructionStream:
    """Batches of whole examples, of whose tokens only the answer's are learned.

    In every epoch the examples come in another order and are put into rows one after the other, so
    that none is cut; attention stays inside each. Row r of the run, and so the batch of step s, is
    a function of the seed alone.

    Args:
        examples: At least one.
        tokenizer: The model's.
        sequence_length: T; longer prompts are cut, see :func:`prompt_tokens`.
        batch_rows: B.
        seed: Of the orders.

    Raises:
        EncoderError: If there is no example, or an answer leaves no room for its prompt.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Any,
        *,
        sequence_length: int,
        batch_rows: int,
        seed: int,
    ) -> None:
        if not examples:
            raise EncoderError("instruction tuning needs at least one example, got none")
        self._inputs, self._targets = _learned(tokenizer, examples, sequence_length)
        self._lengths = np.array([len(row) for row in self._inputs])
        self._shape = (batch_rows, sequence_length)
        self._seed = seed
        self._epochs: list[list[NDArray[np.int64]]] = [self._fill_rows(0)]
        self._starts = [0, len(self._epochs[0])]
        """First row of each epoch, and of the one after."""

    @property
    def num_rows(self) -> int:
        """Rows in which every example comes once: the first so many."""
        return len(self._epochs[0])

    def num_steps(self, epochs: float) -> int:
        """Steps in which the examples come about so many times; at least 1."""
        return max(1, round(epochs * self.num_rows / self._shape[0]))

    def batch(self, step: int) -> PackedRows:
        """The rows of a step, from 0."""
        return self.rows(step * self._shape[0], (step + 1) * self._shape[0])

    def rows(self, first: int, stop: int) -> PackedRows:
        """Some rows of the run."""
        num_rows, length = stop - first, self._shape[1]
        inputs = np.zeros((num_rows, length), dtype=np.int64)
        targets = np.full((num_rows, length), IGNORED, dtype=np.int64)
        begins = np.zeros((num_rows, length), dtype=bool)
        for place in range(num_rows):
            at = 0
            for example in self._row(first + place):
                part = slice(at, at + self._lengths[example])
                inputs[place, part] = self._inputs[example]
                targets[place, part] = self._targets[example]
                begins[place, at] = True
                at = part.stop
            begins[place, at : at + 1] = True  # what fills up sees no example
        return pack(inputs.ravel(), targets.ravel(), begins.ravel(), rows=num_rows, length=length)

    def _row(self, number: int) -> NDArray[np.int64]:
        """The examples in a row of the run."""
        while number >= self._starts[-1]:
            self._epochs.append(self._fill_rows(len(self._epochs)))
            self._starts.append(self._starts[-1] + len(self._epochs[-1]))
        epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._epochs[epoch][number - self._starts[epoch]]

    def _fill_rows(self, epoch: int) -> list[NDArray[np.int64]]:
        """One epoch's order, cut where the next example no longer fits."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._lengths))
        cuts, filled = [], 0
        for place, example in enumerate(order):
            if filled + self._lengths[example] > self._shape[1]:
                cuts.append(place)
                filled = 0
            filled += self._lengths[example]
        return np.split(order, cuts)


def _learned(
    tokenizer: Any, examples: Sequence[Example], length: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Inputs and targets of every example; targets of the prompt are not learned."""
    start, end = start_token(tokenizer), end_token(tokenizer)
    answers = token_ids(tokenizer, [example.answers[0] for example in examples])
    longest = max(map(len, answers))
    prompts = prompt_tokens(tokenizer, examples, longest=length - longest - 1)
    inputs, targets = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        inputs.append(np.array([start, *prompt, *answer], dtype=np.int64))
        targets.append(np.array([IGNORED] * len(prompt) + [*answer, end], dtype=np.int64))
    return inputs, targets
