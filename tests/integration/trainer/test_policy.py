"""The policy's log-probabilities against transformers' own logits, and its published weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.integration.trainer.toy import VOCAB, make_model, make_policy, publish
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

from rljob_api.errors import BlobCorrupt, SpecError
from rljob_api.spec import ComputeType
from rljob_runtime.correction.snapshots import SnapshotStore
from rljob_runtime.trainer.distributed import World, broadcast_bytes, distributed_world
from rljob_runtime.trainer.model import Policy, full_state
from rljob_runtime.trainer.probe import make_probe, probe_tokens
from rljob_runtime.trainer.scoring import score, token_tensor


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with distributed_world("cpu", timeout_seconds=30) as joined:
        yield joined


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def rows_of(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(2, VOCAB, length).astype(np.int32) for length in lengths]


def reference(directory: Path, row: np.ndarray, dtype: torch.dtype, temperature: float) -> torch.Tensor:
    """[2, T - 1] in float64: log-probability of each token but the first, and the entropy there."""
    causal_lm = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    tokens_T = torch.from_numpy(row).long()
    with torch.no_grad():
        logits_TV = causal_lm(tokens_T[None]).logits[0, :-1].double() / temperature
    logprobs_TV = torch.log_softmax(logits_TV, -1)
    return torch.stack(
        [logprobs_TV.gather(1, tokens_T[1:, None]).squeeze(1), -(logprobs_TV.exp() * logprobs_TV).sum(-1)]
    )


@pytest.mark.parametrize("compute_type", list(ComputeType))
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_are_those_of_transformers(
    model: Path, world: World, compute_type: ComputeType, temperature: float
) -> None:
    policy = make_policy(model, world, compute_type)
    (row,) = rows_of(33)
    with torch.no_grad():
        scores = policy(token_tensor([row], world.device), temperature=temperature, with_entropy=True)
    assert scores.logprobs_BT.dtype == torch.float32 and scores.logprobs_BT[0, 0] == 0
    assert scores.entropy_BT is not None
    dtype = torch.bfloat16 if compute_type is ComputeType.BFLOAT16 else torch.float32
    expected = reference(model, row, dtype, temperature)
    found = torch.stack([scores.logprobs_BT[0, 1:], scores.entropy_BT[0, 1:]]).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    # Control: the two compute types differ by far more than the tolerance.
    other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    assert (reference(model, row, other, temperature) - expected).abs().max() > 1e-3


def test_padding_and_company_do_not_change_a_row(model: Path, world: World) -> None:
    policy = make_policy(model, world)
    rows = rows_of(5, 40, 12, 2, 31)
    together = score(policy, rows, temperature=1.0, token_budget=1000)
    alone = [score(policy, [row], temperature=1.0, token_budget=1)[0] for row in rows]
    for row, one, other in zip(rows, together, alone, strict=True):
        assert one.shape == other.shape == row.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
    # Control: on the left it would change everything.
    shifted = score(policy, [np.concatenate([np.zeros(8, np.int32), rows[1]])], temperature=1.0, token_budget=1)[0]
    assert np.abs(shifted[9:] - alone[1][1:]).max() > 0.1


def test_scoring_nothing_is_still_a_collective_that_ends(model: Path, world: World) -> None:
    assert score(make_policy(model, world), [], temperature=1.0, token_budget=16) == []


def test_after_a_pass_without_gradient_parameters_are_the_masters_again(model: Path, world: World) -> None:
    """Why `build_policy` does not leave the root's resharding to its default."""

    def masters_only(policy: Policy) -> bool:
        score(policy, rows_of(20), temperature=1.0, token_budget=64)
        return all(
            isinstance(parameter, DTensor) and parameter.dtype == torch.float32 for parameter in policy.parameters()
        )

    assert masters_only(make_policy(model, world, ComputeType.BFLOAT16))
    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    careless = Policy(causal_lm, ComputeType.BFLOAT16).eval()
    for module in (*causal_lm.model.layers, careless):
        fully_shard(module, mesh=world.mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert not masters_only(careless)


def test_rounding_the_rotary_frequencies_would_be_seen(model: Path, world: World) -> None:
    (row,) = rows_of(100)
    rounded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(torch.bfloat16)
    proper = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    tokens = torch.from_numpy(row).long()[None]
    with torch.no_grad():
        assert (rounded(tokens).logits - proper(tokens).logits).abs().max() > 0.01
    assert make_policy(model, world, ComputeType.BFLOAT16).causal_lm.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
def test_the_published_state_is_a_model_directory(tmp_path: Path, world: World, tied: bool) -> None:
    source = make_model(tmp_path / "model", tied=tied)
    policy = make_policy(source, world, ComputeType.BFLOAT16)
    state = full_state(policy)
    assert ("lm_head.weight" in state) is not tied
    assert state.keys() == load_file(source / "model.safetensors").keys()
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(
        publish(policy, source, tmp_path / "out"), dtype=torch.float32
    ).state_dict()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor.float())


def test_the_probe_is_at_temperature_one(model: Path, world: World) -> None:
    tokens = probe_tokens(VOCAB, seed=3, num=40)
    probe = make_probe(make_policy(model, world), tokens)
    assert (probe.tokens, probe.compute_type, len(probe.logprobs)) == (tokens, "Float32", 39)
    expected = reference(model, np.array(tokens, np.int32), torch.float32, 1.0)[0]
    np.testing.assert_allclose(probe.logprobs, expected, atol=2e-5)


def test_a_published_file_of_other_tensors_is_refused(tmp_path: Path, model: Path, world: World) -> None:
    policy, store = make_policy(model, world), SnapshotStore(torch.float32)
    state = load_file(model / "model.safetensors")
    for name, change, message in (
        (
            "narrow",
            {"model.norm.weight": state["model.norm.weight"].bfloat16()},
            "model.norm.weight in .* is torch.bfl",
        ),
        ("small", {"lm_head.weight": state["lm_head.weight"][:5]}, r"lm_head.weight in .* is torch.float32 \[5, 64\]"),
    ):
        save_file(state | change, tmp_path / name)
        with pytest.raises(BlobCorrupt, match=message):
            store.load_full(4, policy, tmp_path / name)
    (tmp_path / "short").write_bytes((model / "model.safetensors").read_bytes()[:-10])
    for name in ("short", "absent"):
        with pytest.raises(BlobCorrupt, match="version 4 cannot be read from"):
            store.load_full(4, policy, tmp_path / name)
    assert store.versions == ()


def test_a_model_with_scaled_logits_is_refused(tmp_path: Path, world: World) -> None:
    config = GraniteConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        logits_scaling=8.0,
    )
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"spec.model: the model has scaled logits.*\(got logits_scaling 8.0\)"):
        make_policy(tmp_path, world)


@pytest.mark.parametrize("data", [b"", b"\x00\xff" * 1000])
def test_bytes_are_broadcast_as_they_are(world: World, data: bytes) -> None:
    assert broadcast_bytes(data, world.device) == data
    with pytest.raises(ValueError, match="rank 0 gives the bytes"):
        broadcast_bytes(None, world.device)
