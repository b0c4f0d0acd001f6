"""The same job without rljob: sample every group with the current weights, train on it, go on. Plain transformers and torch.

What it takes from the product is the numbers that stand for chance, and the log-probability kernel with its order of
sums (tests/unit/trainer/test_logprobs.py holds that one against torch's own).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from rljob_api.messages import Task
from rljob_runtime.rollout.episode import sampling_seed
from rljob_runtime.rollout.simulated_engine import uniform
from rljob_runtime.trainer.intake import task_seed
from rljob_runtime.trainer.logprobs import chunked_logprobs

END, BEGIN, FIRST_CHARACTER, SAMPLES = 1, 2, 3, 4


def synchronous_run(
    model_directory: Path, spec: dict[str, Any], *, delay: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """Weights of version 0, 1, ... of a digit-copy job with credit Turn and one update a step.

    `delay` samples with weights that many versions old: what an asynchronous run may do, and this one must not.
    """
    training, exercise = spec["training"], spec["environment"]["parameters"]
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    versions = [copy.deepcopy(model)]
    yield versions[-1].state_dict()
    for step in range(training["steps"]):
        rows: list[tuple[list[int], torch.Tensor]] = []
        for task in range(step * training["tasksPerStep"], (step + 1) * training["tasksPerStep"]):
            sampler = versions[max(0, step - delay)]
            played = [play(sampler, task, sample, spec["sampling"]["maxTokens"], exercise) for sample in range(SAMPLES)]
            rewards_GJ = torch.tensor([rewards for _, _, rewards in played], dtype=torch.float64)
            advantages_GJ = (rewards_GJ - rewards_GJ.mean(0)) / (rewards_GJ.std(0) + 1e-4)
            advantages_GJ[:, rewards_GJ.amax(0) == rewards_GJ.amin(0)] = 0.0
            rows += [
                (tokens, torch.tensor([advantages_J[turn] if turn >= 0 else torch.nan for turn in turns]).float())
                for (tokens, turns, _), advantages_J in zip(played, advantages_GJ, strict=True)
            ]
        rows.sort(key=lambda row: -len(row[0]))
        tokens_BT = pad_sequence([torch.tensor(tokens) for tokens, _ in rows], batch_first=True)
        advantages_BT = pad_sequence([row for _, row in rows], batch_first=True, padding_value=torch.nan)[:, 1:]
        hidden_BTD = model.get_decoder()(tokens_BT, use_cache=False).last_hidden_state[:, :-1]
        logprobs_N, _ = chunked_logprobs(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            model.get_output_embeddings().weight,
            tokens_BT[:, 1:].reshape(-1),
            temperature=1.0,
            chunk_tokens=1 << 20,
            with_entropy=False,
        )
        is_model_BT = ~advantages_BT.isnan()
        loss = -(logprobs_N.view(len(rows), -1) * advantages_BT.nan_to_num()).sum() / is_model_BT.sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = training["learningRate"] * min(1.0, (step + 1) / 10)
        optimizer.step()
        optimizer.zero_grad()
        versions.append(copy.deepcopy(model))
        yield versions[-1].state_dict()


@torch.inference_mode()
def play(model: Any, task: int, sample: int, max_tokens: int, exercise: dict[str, int]) -> tuple[Any, Any, Any]:
    """(tokens, turn of each token or -1, reward of each turn) of one sample."""
    seed = task_seed(0, task)
    key = str(sampling_seed(Task(task=task, sample=sample, epoch=1, min_version=0, seed=seed)))
    digits, tokens, turns, rewards = random.Random(seed), [BEGIN], [-1], []
    for turn in range(exercise["turns"]):
        question = [FIRST_CHARACTER + digits.randrange(10) for _ in range(exercise["digits"])]
        tokens, turns, answer = [*tokens, *question, FIRST_CHARACTER + 10], [*turns, *[-1] * (len(question) + 1)], []
        while len(answer) < max_tokens and END not in answer:
            logprobs_V = torch.log_softmax(model(torch.tensor([tokens]), use_cache=False).logits[0, -1], -1)
            cumulative_V = logprobs_V.double().exp().cumsum(0)
            drawn = int((cumulative_V <= uniform(key, len(tokens)) * cumulative_V[-1]).sum())
            tokens, turns, answer = [*tokens, drawn], [*turns, turn], [*answer, drawn]
        written = [token for token in answer if token in range(FIRST_CHARACTER, FIRST_CHARACTER + 11)]
        rewards.append(sum(a == b for a, b in zip(written, question, strict=False)) / len(question))
    return tokens, turns, rewards
