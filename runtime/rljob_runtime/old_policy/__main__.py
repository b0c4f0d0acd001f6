"""Process 1 of an old-policy pod: `python -m rljob_runtime.old_policy`.

The kernel keeps a SIGTERM from process 1 as long as it has no handler for it, and the imports of a worker take seconds: a
pod that is deleted while it starts would live to the end of its grace period.
"""

from __future__ import annotations

import signal
import sys

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the worker has its own

from rljob_runtime.old_policy.main import main  # noqa: E402

raise SystemExit(main())
