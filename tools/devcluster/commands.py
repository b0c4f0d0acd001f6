"""Run a program to its end, always with a deadline; a failure becomes a sentence."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tools.devcluster.errors import DevClusterError

Command = Sequence["str | Path"]


def run(
    command: Command,
    *,
    timeout_seconds: float = 60,
    environment: Mapping[str, str] | None = None,
    text_input: str | None = None,
    hint: str = "",
) -> str:
    """Standard output of `command`. `hint` is what to do when it fails."""
    words = [str(word) for word in command]
    try:
        result = subprocess.run(
            words,
            input=text_input,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            env=environment,
            check=False,
        )
    except FileNotFoundError:
        raise DevClusterError(f"{words[0]} is not installed. {hint}".strip()) from None
    except subprocess.TimeoutExpired:
        raise DevClusterError(f"`{' '.join(words)}` did not end within {timeout_seconds:g} s. {hint}".strip()) from None
    if result.returncode != 0:
        said = (result.stderr or result.stdout).strip()[-2000:]
        raise DevClusterError(f"`{' '.join(words)}` ended with code {result.returncode}: {said} {hint}".strip())
    return result.stdout


def wait_until(
    what: str, holds: Callable[[], bool], *, timeout_seconds: float, every_seconds: float = 0.1, hint: str = ""
) -> None:
    """Ask until it holds; the error names what did not come true."""
    deadline = time.monotonic() + timeout_seconds
    while not holds():
        if time.monotonic() > deadline:
            raise DevClusterError(f"{what}: not within {timeout_seconds:g} s. {hint}".strip())
        time.sleep(every_seconds)
