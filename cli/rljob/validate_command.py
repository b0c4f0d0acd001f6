"""`rljob validate FILE`: would this job run here, or on a cluster, and what of it is for a cluster only?"""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from rljob.loader import load_document
from rljob_api.errors import SpecError
from rljob_api.validate import ignored_locally, parse_job, violations_on_cluster

EXIT_VALID = 0
EXIT_REFUSED = 2


def validate(path: Path, out: TextIO, *, on_cluster: bool = False) -> int:
    """Write the verdict on a file: valid, with the fields that `rljob run` ignores, or one line for each violation.

    Args:
        on_cluster: judge as the apiserver and the operator do, which ask for more than `rljob run`.

    Returns:
        The exit code: 0 for a valid file, 2 for a refused one.
    """
    try:
        document = load_document(path)
        if on_cluster and (violations := violations_on_cluster(document)):
            raise SpecError(violations)
        job = parse_job(document)
    except SpecError as error:
        out.writelines(f"{violation}\n" for violation in error.violations)
        return EXIT_REFUSED
    if on_cluster:
        out.write(f"{path}: valid on a cluster\n")
        return EXIT_VALID
    out.write(f"{path}: valid\n")
    out.writelines(f"  {field} is for a cluster: `rljob run` ignores it\n" for field in ignored_locally(job))
    return EXIT_VALID
