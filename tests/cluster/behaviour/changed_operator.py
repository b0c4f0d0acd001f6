"""An operator of another release: all it builds carries one more annotation. Started by tests only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rljob_operator.core.builders import trainer_job, worker_deployment
from rljob_operator.core.builders.pod_template import pod_template
from rljob_operator.main import main


def changed(*arguments: Any) -> Mapping[str, Any]:
    """What the present release builds, and an annotation."""
    template = pod_template(*arguments)
    template["metadata"]["annotations"]["rljob.dev/builder"] = "changed"
    return template


if __name__ == "__main__":
    worker_deployment.pod_template = changed  # type: ignore[assignment]
    trainer_job.pod_template = changed  # type: ignore[assignment]
    raise SystemExit(main())
