"""Every test, started by `make test` or by hand: one thread a process, and nothing fetched.

Several threads sum in another order: values that a test compares to the bit then differ, and small operations take many
times as long on a busy machine.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"):
    os.environ.setdefault(_name, "1")
