"""The policy: a transformers causal LM, sharded with FSDP2, that returns token log-probabilities.

Masters and optimizer state are fp32. Forward and backward run in the compute type, and every parameter is used through
`MixedPrecisionPolicy(param_dtype=...)`, never through autocast: so a forward sees exactly the numbers that `full_state`
publishes, and log-probabilities of the resident version are bitwise those of scoring the published blob on the same
batch layout. Buffers keep their type: `model.to(bfloat16)` would also round the rotary inverse frequencies, which moves
log-probabilities by 0.05.

Rows are padded on the right and no attention mask is passed. Under causal attention no real token can see what stands
to its right, so its log-probability is exact; what stands in the padding is computed and ignored.

Shapes: B rows, T tokens, D hidden width, N = B * (T - 1) predicted tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

from rljob_api.errors import SpecError, Violation
from rljob_api.spec import ComputeType
from rljob_runtime.trainer.logprobs import chunked_logprobs

_PREFIX = "causal_lm."
_LOGITS_AT_ONCE = 1 << 26
"""Elements of one chunk of logits: 256 MB in fp32. A measure of memory only, the results do not depend on it."""


class TokenScores(NamedTuple):
    """Log-probabilities and entropies; column t belongs to token t given the tokens before it, column 0 is 0."""

    logprobs_BT: Tensor
    entropy_BT: Tensor | None


class Policy(nn.Module):
    """A causal LM as a map from tokens to their log-probabilities. Make it with `build_policy`.

    The output layer is applied inside this module's forward: its weight, the embedding and the last norm belong to the
    FSDP root, and are whole only while the root's forward or backward runs.
    """

    def __init__(self, causal_lm: nn.Module, compute_type: ComputeType) -> None:
        super().__init__()
        self.causal_lm: Any = causal_lm
        self.compute_type = compute_type
        vocab_size, _ = causal_lm.get_output_embeddings().weight.shape  # type: ignore[operator]
        self.vocab_size = int(vocab_size)
        self.chunk_tokens = max(1, _LOGITS_AT_ONCE // self.vocab_size)

    @property
    def device(self) -> torch.device:
        """Where the shards of this process live."""
        return next(self.parameters()).device

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output layer shares its weight with the input embedding."""
        return self.causal_lm.get_output_embeddings().weight is self.causal_lm.get_input_embeddings().weight

    def published_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under the names of the model directory; tied ones once."""
        for name, parameter in self.named_parameters():
            yield name.removeprefix(_PREFIX), parameter

    def forward(self, tokens_BT: Tensor, *, temperature: float, with_entropy: bool) -> TokenScores:
        """Log-probability (fp32) of each token after the ones before it, and on request the entropy there. Collective.

        Args:
            tokens_BT: int64 token ids, padded on the right with any valid id.
            temperature: > 0, divides the logits.
            with_entropy: also return the entropy, in nats.
        """
        rows, length = tokens_BT.shape
        hidden_BTD = self.causal_lm.get_decoder()(input_ids=tokens_BT, use_cache=False).last_hidden_state
        logprobs_N, entropy_N = chunked_logprobs(
            hidden_BTD[:, :-1].reshape(rows * (length - 1), -1),
            self.causal_lm.get_output_embeddings().weight,
            tokens_BT[:, 1:].reshape(-1),
            temperature=temperature,
            chunk_tokens=self.chunk_tokens,
            with_entropy=with_entropy,
        )
        return TokenScores(_after_first(logprobs_N, rows), None if entropy_N is None else _after_first(entropy_N, rows))


def _after_first(values_N: Tensor, rows: int) -> Tensor:
    return nn.functional.pad(values_N.view(rows, -1), (1, 0))


def build_policy(model_directory: Path, *, compute_type: ComputeType, device: torch.device, mesh: DeviceMesh) -> Policy:
    """Load a model directory as fp32 masters and shard it over the mesh: each decoder layer, and the rest as the root.

    Dropout is off for good. Collective.

    Raises:
        SpecError: the model computes its logits in a way that the trainer does not reproduce.
    """
    causal_lm = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    _check_output_layer(causal_lm)
    policy = Policy(causal_lm.to(device), compute_type).eval()
    mixed_precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if compute_type is ComputeType.BFLOAT16 else None, reduce_dtype=torch.float32
    )
    for layer in causal_lm.get_decoder().layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed_precision)
    # By default the root stays gathered after a forward without gradient: its parameters would then be copies in the
    # compute type, and snapshots and switches must reach the fp32 masters.
    fully_shard(policy, mesh=mesh, mp_policy=mixed_precision, reshard_after_forward=True)
    return policy


def _check_output_layer(causal_lm: Any) -> None:
    config = causal_lm.config
    violations = []
    if causal_lm.get_output_embeddings().bias is not None:
        violations.append(("an output layer with a bias", "lm_head.bias"))
    if getattr(config, "final_logit_softcapping", None):
        violations.append(("logits with a soft cap", f"final_logit_softcapping {config.final_logit_softcapping}"))
    for name in ("logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            violations.append(("scaled logits", f"{name} {getattr(config, name)}"))
    if violations:
        raise SpecError(
            tuple(
                Violation(
                    path="spec.model",
                    value=value,
                    reason=f"the model has {what}, which the trainer does not compute",
                    remedy="Use a model whose logits are the plain product of hidden states and output weights.",
                )
                for what, value in violations
            )
        )


def full_state(policy: Policy) -> dict[str, Tensor]:
    """The weights as published: compute type, on the CPU, under the names of the model directory. Collective.

    Whole on rank 0, empty on every other rank. With tied embeddings the output layer is left out: it is the embedding.
    """
    state = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    output_name = f"{_PREFIX}lm_head.weight"
    return {
        name.removeprefix(_PREFIX): tensor.to(compute_dtype(policy.compute_type))
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and not (policy.tied_embeddings and name == output_name)
    }


def compute_dtype(compute_type: ComputeType) -> torch.dtype:
    """The torch type of a compute type."""
    return torch.bfloat16 if compute_type is ComputeType.BFLOAT16 else torch.float32
