"""Re-scores recorded rows with plain transformers: nothing of the trainer's own code takes part.

Shapes: T tokens of one row, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from rljob_api.errors import StorageError

CHUNK_TOKENS = 512
COMPUTE_TYPES = {"Float32": torch.float32, "BFloat16": torch.bfloat16}


def score_rows(
    model_files: Path,
    weights: Path,
    compute_type: str,
    rows: Sequence[tuple[NDArray[np.int32], float]],
) -> list[NDArray[np.float32]]:
    """Log-probability of each token [T] after the tokens before it, at the row's temperature; 0 for its first token.

    Each row is scored alone, without padding.

    Args:
        model_files: folder with config.json.
        weights: safetensors file with the whole model in the compute type.
        compute_type: Float32 or BFloat16.
        rows: (token ids [T], temperature) of each row.

    Raises:
        StorageError: the weights do not fit the model.
    """
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="rljob-verify-") as folder:
        for file in model_files.iterdir():
            (Path(folder) / file.name).symlink_to(file.resolve())
        (Path(folder) / "model.safetensors").symlink_to(weights.resolve())
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder, dtype=COMPUTE_TYPES[compute_type], output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise StorageError(f"{weights} cannot be loaded into the recorded model: {error}") from error
        strange = sorted({*loading["missing_keys"], *loading["unexpected_keys"]})
        if strange:
            raise StorageError(f"{weights} does not fit the recorded model: {', '.join(map(str, strange[:5]))}")
        model.eval()
        with torch.inference_mode():
            return [_score(model, tokens, temperature) for tokens, temperature in rows]


def _score(model: torch.nn.Module, row: NDArray[np.int32], temperature: float) -> NDArray[np.float32]:
    tokens_T = torch.from_numpy(row.astype(np.int64))
    logits_TV = model(input_ids=tokens_T[None], use_cache=False).logits[0]
    scored_T = torch.zeros(tokens_T.shape, dtype=torch.float32)
    for start in range(1, len(row), CHUNK_TOKENS):
        end = min(start + CHUNK_TOKENS, len(row))
        # Row t of the logits is about token t + 1.
        logprobs = torch.log_softmax(logits_TV[start - 1 : end - 1].float() / temperature, dim=-1)
        scored_T[start:end] = logprobs.gather(1, tokens_T[start:end, None]).squeeze(1)
    return scored_T.numpy()
