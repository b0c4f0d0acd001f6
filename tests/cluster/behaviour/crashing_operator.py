"""The operator as a process that dies, as by kill -9, right after its N-th write to the API server.

Started by tests only: `python -m tests.cluster.behaviour.crashing_operator N`. Leases and Events do not count.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from rljob_operator.main import main
from rljob_operator.shell.api import Api

_WRITES = ("create", "patch", "update", "delete")
_NOT_COUNTED = ("leases", "events")


def die_after(writes: int) -> None:
    """Let the process end once so many writes have been answered."""
    call = Api._call
    left = writes

    async def counted(self: Api, verb: str, kind: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal left
        answer = await call(self, verb, kind, *arguments, **named)
        if verb in _WRITES and kind.plural not in _NOT_COUNTED:
            left -= 1
            if left == 0:
                print(f"write: {verb} {kind.plural}", flush=True)
                os._exit(9)
        return answer

    Api._call = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    die_after(int(sys.argv[1]))
    raise SystemExit(main())
