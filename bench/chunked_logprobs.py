"""Memory and time of chunked log-probabilities with their gradient, over the plain way, at a vocabulary of 49,152.

The plain way holds all logits, their log-softmax and its gradient at once, in fp32. Each measurement is a process of its
own, so that peak memory is its own; both ways in turn.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import torch

from bench.measure import Figure, repeated
from rljob_runtime.trainer.logprobs import chunked_logprobs

TOKENS, WIDTH, WORDS = 4096, 576, 49_152
CHUNK_TOKENS = (1 << 26) // WORDS
"""What the trainer takes: 256 MB of logits."""
ROUNDS = 5


def main() -> None:
    """Measure and print; with an argument, be one measurement."""
    if len(sys.argv) > 1:
        print(json.dumps(_one(sys.argv[1])))
        return
    chunked, plain = [], []
    for _ in range(ROUNDS):
        chunked.append(_in_a_process("chunked"))
        plain.append(_in_a_process("plain"))
    for name, key in (("chunked_memory", "bytes"), ("chunked_time", "seconds")):
        value, low, high = repeated([one[key] / other[key] for one, other in zip(chunked, plain, strict=True)])
        middle = sorted(range(ROUNDS), key=lambda i: chunked[i][key])[ROUNDS // 2]
        scale, unit = (1e-6, "MB") if key == "bytes" else (1.0, "s")
        detail = (
            f"{chunked[middle][key] * scale:,.1f} over {plain[middle][key] * scale:,.1f} {unit}, {TOKENS:,} tokens of "
            f"width {WIDTH}; norms of the gradients agree to {_agreement(chunked[0], plain[0]):.1e}"
        )
        Figure(name, value, low, high, f"{ROUNDS} rounds, smallest and largest", detail).print()


def _in_a_process(kind: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-m", __spec__.name, kind], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _one(kind: str) -> dict[str, float]:
    torch.manual_seed(0)
    hidden_ND = torch.randn(TOKENS, WIDTH, requires_grad=True)
    weight_VD = (torch.randn(WORDS, WIDTH) * 0.02).requires_grad_()
    targets_N = torch.randint(0, WORDS, (TOKENS,))
    torch.autograd.backward(
        (hidden_ND[:8] @ weight_VD[:8].T).sum()
    )  # the matrix library's own buffers are not what is measured
    hidden_ND.grad, weight_VD.grad = None, torch.zeros_like(weight_VD)  # the weight's gradient is there in both ways
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    if kind == "chunked":
        logprobs_N, _ = chunked_logprobs(
            hidden_ND, weight_VD, targets_N, temperature=1.0, chunk_tokens=CHUNK_TOKENS, with_entropy=False
        )
    else:
        logprobs_NV = torch.log_softmax((hidden_ND @ weight_VD.T).float(), dim=-1)
        logprobs_N = logprobs_NV.gather(1, targets_N[:, None])[:, 0]
    torch.autograd.backward(logprobs_N.mean())
    seconds = time.perf_counter() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024.0
    return {
        "seconds": seconds,
        "bytes": peak,
        "logprob": float(logprobs_N.mean()),
        "hidden_grad": _gradient_norm(hidden_ND),
        "weight_grad": _gradient_norm(weight_VD),
    }


def _gradient_norm(tensor: torch.Tensor) -> float:
    assert tensor.grad is not None
    return float(tensor.grad.norm())


def _agreement(one: dict[str, float], other: dict[str, float]) -> float:
    """Largest relative difference of the results; the last digits are the order of sums."""
    return max(abs(one[key] / other[key] - 1) for key in ("logprob", "hidden_grad", "weight_grad"))


if __name__ == "__main__":
    main()
