"""`rljob validate FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from rljob.loader import load_document
from rljob_api.errors import SpecError
from rljob_api.validate import ignored_locally, parse_job

EXIT_INVALID = 2


def validate(path: Path, out: TextIO) -> int:
    """Say whether a file is a valid RLJob; one line per violation."""
    try:
        job = parse_job(load_document(path))
    except SpecError as error:
        print(f"{path}: {len(error.violations)} problem(s)", file=out)
        for violation in error.violations:
            print(f"  {violation}", file=out)
        return EXIT_INVALID
    print(f"{path}: valid", file=out)
    ignored = ignored_locally(job)
    if ignored:
        print(f"  `rljob run` ignores: {', '.join(ignored)}", file=out)
    return 0
