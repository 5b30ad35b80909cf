"""Two sharded workers against the loop that anyone would write in plain PyTorch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from manta.config import Config
from manta.train import train
from running import logged, max_difference, max_gap, order_of, prepared_of, run_of, small_config, weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

STEPS, WARMUP = 20, 4


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small_config(
        tmp_path,
        full_ft=True,
        max_steps=STEPS,
        warmup_steps=WARMUP,
        learning_rate=2e-3,
        min_learning_rate=1e-4,
        weight_decay=0.1,
        max_grad_norm=1.0,
        eval_steps=0,
        save_steps=STEPS,
    )


def rate(config: Config, step: int) -> float:
    """Learning rate of `step` (from 0): linear warm-up, then half a cosine down to min_learning_rate."""
    if step < WARMUP:
        return config.learning_rate * step / WARMUP
    share = (step - WARMUP) / (STEPS - WARMUP)
    low = config.min_learning_rate
    return low + (config.learning_rate - low) * (1 + math.cos(math.pi * share)) / 2


def plain_loop(config: Config) -> tuple[dict[int, float], dict[int, float], dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    samples, order = prepared_of(config).tokenized("training"), order_of(config)
    model = AutoModelForCausalLM.from_pretrained(config.hf_model_id, dtype=torch.float32).train()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]  # all but the norms
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    )
    losses, norms = {}, {}
    for step in range(STEPS):
        rows = [row for index in range(order.micro_batches) for row in order.micro_batch(step, index)]
        total, tokens = torch.zeros(()), 0
        for row in rows:  # one at a time: no padding
            ids, labels = torch.tensor(samples[row]["input_ids"]), torch.tensor(samples[row]["labels"])
            logits = model(input_ids=ids[None]).logits[0, :-1]
            total = total + cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
            tokens += int((labels[1:] != -100).sum())
        loss = total / tokens
        loss.backward()
        norms[step + 1] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm))
        for group in optimizer.param_groups:
            group["lr"] = rate(config, step)
        optimizer.step()
        optimizer.zero_grad()
        losses[step + 1] = float(loss.detach())
    return losses, norms, model.state_dict()


def test_full_fine_tuning_on_two_workers_equals_a_plain_loop(config, record_property):
    run = run_of(train(config))
    losses, norms, last = plain_loop(config)
    gaps = {
        "loss": max_gap(logged(run, "loss"), losses),
        "grad_norm": max_gap(logged(run, "grad_norm"), norms),
        "weights": max_difference(weights(run, STEPS), last),
    }
    record_property("gaps", str(gaps))
    assert losses[STEPS] < losses[1] - 1  # it learned something, so the gap is not that of two still models
    assert max(norms.values()) > config.max_grad_norm  # and was clipped
    assert gaps["loss"] <= 1e-4
    assert gaps["grad_norm"] <= 1e-3
    assert gaps["weights"] <= 1e-4
    rates = logged(run, "learning_rate")
    assert all(rates[step + 1] == pytest.approx(rate(config, step), rel=1e-5, abs=1e-12) for step in range(STEPS))
