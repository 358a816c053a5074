"""Encode against sentence-transformers: same texts, same shallow half, same run.

From the project's root: ``python -m benchmarks.bench_encode``. The texts are the distinct ones of
Online Retail II (``LONGTRAIL_DATA_DIR``, default ``../shared/data``), else generated. Contenders
take turns within each round and the speed-ups are medians of the rounds' ratios. On a machine that
others use too, each turn waits for a quiet moment and is taken again if other processes came in
between, whatever its result; turns set aside are in the file. sentence-transformers, which comes
with the default model's package, is given its default batch size and its best, and the headline is
against the faster.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import duckdb
import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from benchmarks.results_file import write_result
from benchmarks.turns import ratio
from encoders.config import DEFAULT_MODEL, DEFAULT_MODEL_SPLIT, EncoderConfig
from encoders.fingerprint import describe_encoder
from encoders.layout import keep_layers
from encoders.pretrained import find_model_folder, quiet_transformers
from encoders.text_encoder import TextEncoder
from feature_repo.home import PROJECT_ROOT

BATCH_SIZES = (32, 64, 128, 256)
"""Tried with sentence-transformers on every eighth text; its best and its default are measured."""
DEFAULT_BATCH_SIZE = 32
QUIET_SHARE = 0.05
"""Of the processors' time: other processes may take so much of a quiet turn."""
PAUSE_S = 0.5
"""Looked at before a turn: the machine must be quiet for so long."""
TRIAL_STRIDE = 8
LARGEST_DIFFERENCE = 1e-5
"""Between the two's float32 vectors, absolute."""
NUM_GENERATED = 5000

Encode = Callable[[], NDArray[np.float32]]


def retail_texts(path: Path) -> list[str]:
    """Read the distinct purchase texts of Online Retail II."""
    query = (
        "SELECT DISTINCT 'bought ' || lower(trim(Description)) AS text "
        f"FROM '{path}' WHERE Description IS NOT NULL ORDER BY text"
    )
    return [row[0] for row in duckdb.sql(query).fetchall()]


def generated_texts() -> list[str]:
    """Make texts of about the same lengths."""
    random = np.random.default_rng(0)
    words = ["red", "white", "heart", "lantern", "glass", "ball", "set of 3", "vintage", "tin"]
    chosen = (random.choice(words, size=random.integers(2, 7)) for _ in range(2 * NUM_GENERATED))
    return list(dict.fromkeys("bought " + " ".join(row) for row in chosen))[:NUM_GENERATED]


def sentence_transformer(dtype: torch.dtype, *, split_layer: int | None) -> SentenceTransformer:
    """Load the default model in sentence-transformers, whole or its shallow half."""
    with quiet_transformers():
        model = SentenceTransformer(str(find_model_folder(DEFAULT_MODEL)), device="cpu").to(dtype)
    if split_layer is None:
        return model
    transformer, pooling = model[0], model[1]
    keep_layers(transformer.auto_model, 0, split_layer)
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


def theirs(model: SentenceTransformer, texts: Sequence[str], batch_size: int) -> Encode:
    def encode() -> NDArray[np.float32]:
        vectors = model.encode(texts, batch_size=batch_size, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

    return encode


def ours(precision: str, texts: Sequence[str]) -> Encode:
    config = EncoderConfig(dtype=precision)  # type: ignore[arg-type]
    encoder = TextEncoder.load(describe_encoder(config))
    return lambda: encoder.encode(texts)


def busy_seconds() -> float | None:
    """Processor seconds that all processes have used so far; None where the system hides them."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split(maxsplit=9)[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, *interrupts = map(int, fields)
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Turn:
    """One encoding of all texts."""

    contender: str
    seconds: float
    cpu_seconds: float
    others_share: float
    """Of the processors' time, what other processes took; 0 where the system hides it."""


def others_share(busy: float | None, wall_s: float, own_s: float) -> float:
    """Compute what others took since all processes together had used ``busy`` seconds."""
    now = busy_seconds()
    if busy is None or now is None:
        return 0.0
    return max(0.0, now - busy - own_s) / (wall_s * (os.cpu_count() or 1))


def take_turn(contender: str, encode: Encode) -> Turn:
    busy, started, started_cpu = busy_seconds(), time.perf_counter(), time.process_time()
    encode()
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
    return Turn(contender, wall_s, cpu_s, others_share(busy, wall_s, cpu_s))


def take_quiet_turn(contender: str, encode: Encode, deadline: float) -> tuple[Turn, list[Turn]]:
    """Take turns until one was quiet or time is up.

    Returns:
        The quietest turn, and those set aside.
    """
    turns: list[Turn] = []
    while not turns or (turns[-1].others_share > QUIET_SHARE and time.monotonic() < deadline):
        while time.monotonic() < deadline:
            busy = busy_seconds()
            time.sleep(PAUSE_S)
            if others_share(busy, PAUSE_S, 0.0) <= QUIET_SHARE:
                break
        turns.append(take_turn(contender, encode))
        click.echo(
            f"{contender}: {turns[-1].seconds:.2f} s, others took "
            f"{turns[-1].others_share:.0%} of the machine",
            err=True,
        )
    quietest = min(turns, key=lambda turn: turn.others_share)
    return quietest, [turn for turn in turns if turn is not quietest]


def measure(precision: str, texts: list[str], num_rounds: int, limit_s: float) -> dict[str, Any]:
    """Time all contenders in one precision."""
    dtype = getattr(torch, precision)
    half = sentence_transformer(dtype, split_layer=DEFAULT_MODEL_SPLIT)
    whole = sentence_transformer(dtype, split_layer=None)
    contenders = {"longtrail": ours(precision, texts)}
    sample = texts[::TRIAL_STRIDE]
    theirs(half, sample, DEFAULT_BATCH_SIZE)()  # the first run is slower than all others
    deadline = time.monotonic() + limit_s
    tried = {
        size: take_quiet_turn(f"trial_{size}", theirs(half, sample, size), deadline)[0].seconds
        for size in BATCH_SIZES
    }
    for size in {DEFAULT_BATCH_SIZE, min(tried, key=tried.__getitem__)}:
        contenders[f"same_half_batch_{size}"] = theirs(half, texts, size)
        contenders[f"full_depth_batch_{size}"] = theirs(whole, texts, size)

    vectors = contenders["longtrail"]()
    reference = contenders[f"same_half_batch_{DEFAULT_BATCH_SIZE}"]()
    difference = float(np.abs(vectors - reference).max())
    if precision == "float32" and difference > LARGEST_DIFFERENCE:
        raise click.ClickException(f"the vectors differ by {difference}")

    rounds: list[dict[str, Turn]] = []
    set_aside: list[Turn] = []
    for _ in range(num_rounds):
        turns = {}
        for name, encode in contenders.items():
            turns[name], noisy = take_quiet_turn(name, encode, deadline)
            set_aside += noisy
        rounds.append(turns)
    seconds = {name: median(turns[name].seconds for turns in rounds) for name in contenders}

    def speedup(name: str) -> dict[str, float]:
        ours = [turns["longtrail"].seconds for turns in rounds]
        return ratio([turns[name].seconds for turns in rounds], ours)

    def best(kind: str) -> str:
        return min((name for name in seconds if name.startswith(kind)), key=seconds.__getitem__)

    return {
        "largest_difference_of_vectors": difference,
        "texts_per_s": {name: len(texts) / s for name, s in seconds.items()},
        "best_same_half": best("same_half"),
        "best_full_depth": best("full_depth"),
        "speedup_vs_best_same_half": speedup(best("same_half")),
        "speedup_vs_default_same_half": speedup(f"same_half_batch_{DEFAULT_BATCH_SIZE}"),
        "speedup_vs_best_full_depth": speedup(best("full_depth")),
        "speedup_vs_default_full_depth": speedup(f"full_depth_batch_{DEFAULT_BATCH_SIZE}"),
        "largest_share_of_others": max(t.others_share for turns in rounds for t in turns.values()),
        "rounds": [[asdict(turn) for turn in turns.values()] for turns in rounds],
        "turns_set_aside": [asdict(turn) for turn in set_aside],
        "seconds_of_trial_by_batch_size": tried,
    }


@click.command()
@click.option("--rounds", "num_rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=os.cpu_count(), show_default=True)
@click.option(
    "--every",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Take every so many-th text: shorter turns, for a machine that is seldom quiet.",
)
@click.option(
    "--limit-s",
    type=float,
    default=150.0,
    show_default=True,
    help="Seconds per precision after which turns are no longer taken again.",
)
def main(num_rounds: int, threads: int, every: int, limit_s: float) -> None:
    """Measure and write the result file."""
    torch.set_num_threads(threads)
    folder = Path(os.environ.get("LONGTRAIL_DATA_DIR") or PROJECT_ROOT.parent / "shared" / "data")
    path = folder / "online_retail_ii.parquet"
    texts = (retail_texts(path) if path.exists() else generated_texts())[::every]
    figures = {
        precision: measure(precision, texts, num_rounds, limit_s)
        for precision in ("float32", "bfloat16")
    }
    float32 = figures["float32"]
    result = write_result(
        "encode",
        f"python -m benchmarks.bench_encode --rounds {num_rounds} --threads {threads} "
        f"--every {every}",
        {
            "texts": "distinct texts of Online Retail II" if path.exists() else "generated",
            "every": every,
            "num_texts": len(texts),
            "model": DEFAULT_MODEL,
            "split_layer": DEFAULT_MODEL_SPLIT,
            "threads": threads,
            "load_average_1min": os.getloadavg()[0],
            "speedup_vs_sentence_transformers_same_half": float32["speedup_vs_best_same_half"][
                "median"
            ],
            "speedup_vs_sentence_transformers_full_depth": float32["speedup_vs_best_full_depth"][
                "median"
            ],
            **figures,
        },
    )
    click.echo(json.dumps({"result": str(result)}))


if __name__ == "__main__":
    main()
