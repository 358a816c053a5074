"""BAHE against the full text: what is counted, and that a run writes a whole result file."""

import json
from dataclasses import replace
from multiprocessing.dummy import Process as Thread

import click
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaModel

from benchmarks import bench_bahe_vs_full_text as bench
from benchmarks.efficiency_cases import (
    BACKBONES,
    Case,
    TrainingStep,
    encode_seconds_per_text,
    peak_flops_per_s,
)
from encoders.split import DeepHalf
from training.full_text import FullText
from training.model import Bahe

TINY = BACKBONES["tiny"]
CASE = Case(
    method="full_text",
    backbone=TINY,
    num_layers=4,
    num_behaviors=4,
    tokens_per_behavior=8,
    num_contexts=2,
    num_candidates=3,
    device="cpu",
    threads=1,
    use_bfloat16=False,
    gradient_checkpointing=False,
)
BAHE = replace(CASE, method="bahe", num_layers=1)


@pytest.mark.parametrize("length", [8, 64])
def test_flops_are_those_that_torch_counts(length):
    model = LlamaModel(TINY.config(3, length))
    tokens = torch.zeros(1, length, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=tokens)
    # torch computes and counts both halves of the attention's square; we count what is needed.
    other_half = 3 * 2 * TINY.width * length**2
    assert counter.get_total_flops() == TINY.forward_flops(3, length) + other_half


def test_a_steps_flops_by_hand():
    of = TINY.forward_flops
    assert CASE.step_flops() == 3 * 2 * (of(4, 32) + 3 * of(4, 8))
    assert BAHE.step_flops() == 3 * 2 * (of(1, 4) + 3 * of(1, 1))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", [CASE, BAHE], ids=["full_text", "bahe"])
def test_a_step_learns_with_all_layers_of_the_case(case, checkpointing):
    step = TrainingStep(replace(case, gradient_checkpointing=checkpointing, use_bfloat16=True))
    before = float(step.loss().detach())
    assert all(step.run() > 0 for _ in range(5))
    assert float(step.loss().detach()) < before
    model = step._model
    if case.method == "full_text":
        assert isinstance(model, FullText)
        assert len(model.deep_half.layers) == 4
    else:
        assert isinstance(model, Bahe)
        halves = [m for m in model.modules() if isinstance(m, DeepHalf)]
        assert [len(half.model.layers) for half in halves] == [1]
    weights = sum(p.numel() for p in model.parameters()) * 4
    assert step.state_bytes() >= 4 * weights  # weights, gradients, two moments


def test_the_full_text_reads_every_token_and_bahe_every_behaviour():
    step = TrainingStep(CASE)
    table, history, _, ages = step._inputs[:4]
    model = step._model.eval()
    seen = []
    model._states = lambda x, keep: seen.append(keep.sum(1)) or torch.zeros_like(x)
    model.user_vectors(table, history, ages)
    assert seen[0].tolist() == [CASE.num_tokens, CASE.num_tokens]
    bahe = TrainingStep(BAHE)
    rows = bahe._inputs[1]
    assert bahe._model.config.deep_length == rows.shape[-1] == 4
    assert (rows != 0).all()


def test_rates_are_positive():
    assert peak_flops_per_s("cpu", use_bfloat16=True, size=64) > 0
    assert encode_seconds_per_text(TINY, 3, 8, "cpu", use_bfloat16=True) > 0


def test_rows_of_the_result_hold_ratios_of_what_was_measured(tmp_path):
    row = bench.measure_length(CASE, 2, 1e9, process=Thread)
    bench.add_encoding(row, {4: 0.5, 2: 0.25}, num_texts=10, num_contexts=20, case=CASE)
    whole, quarter = row["full_text"], row["bahe_1_4"]
    assert (whole["num_layers"], quarter["num_layers"], row["bahe_1_2"]["num_layers"]) == (4, 1, 2)
    assert len(whole["step_s_all"]) == 2
    assert row["num_tokens"] == 32
    turns = [a / b for a, b in zip(whole["step_s_all"], quarter["step_s_all"], strict=True)]
    assert row["time_ratio"] == quarter["time_ratio"] == sum(turns) / 2
    assert row["time_ratio_of_turns"]["lowest"] == min(turns)
    assert row["memory_ratio"] == whole["peak_bytes"] / quarter["peak_bytes"]
    assert quarter["encoding_s_per_step"] == 0.5 * 10 * 2 / 20
    assert row["time_ratio_with_encoding"] == pytest.approx(
        sum(a / (b + 0.5) for a, b in zip(whole["step_s_all"], quarter["step_s_all"], strict=True))
        / 2
    )
    assert whole["share_of_limit"] == pytest.approx(CASE.step_flops() / whole["step_s"] / 1e9)
    assert json.loads(json.dumps(row)) == row
    assert bench.table([row]).count("\n") == 2
    bench.plot([row, {**row, "num_tokens": 64}], tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text(encoding="utf-8")


def test_throughput_is_of_bahe_alone():
    found = bench.measure_throughput(replace(BAHE, num_contexts=3), 2, 1e9, process=Thread)
    assert (found["contexts"], found["num_layers"]) == (3, 1)
    assert found["rows_per_day"] == pytest.approx(3 * 3 / found["step_s"] * 86_400)


def test_a_process_that_ended_is_reported():
    class Ended(Thread):
        def run(self):
            return None

    sentence = "the process of full_text at 32 tokens ended"
    with pytest.raises(click.ClickException, match=sentence), bench.Contender(CASE, Ended) as one:
        one.ask("step")


def test_projection_by_hand():
    projection = bench.project(replace(CASE, tokens_per_behavior=16, num_candidates=4))
    llama = BACKBONES["1b"]
    per_history = llama.forward_flops(6, 128) + 4 * llama.forward_flops(6, 1)
    expected = 989e12 * 0.3 / (3 * per_history / 4) * 86_400
    assert projection["bahe_rows_per_day"] == pytest.approx(expected)
    assert projection["full_text_rows_per_day"] < projection["bahe_rows_per_day"] / 20
    assert "2048 tokens = 128 behaviours" in projection["assumptions"]
