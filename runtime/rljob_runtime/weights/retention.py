"""Which blobs no version needs any more."""

from __future__ import annotations

import re

_VERSIONED = re.compile(r"^[wm]-(?P<epoch>\d+)-(?P<version>\d+)-")


def unneeded_blobs(names: set[str], *, oldest: int) -> set[str]:
    """Chunks and manifests of versions below `oldest`; model files and unknown names stay.

    Version numbers rise over epochs too, so the number alone decides.
    """
    found = ((name, _VERSIONED.match(name)) for name in names)
    return {name for name, match in found if match is not None and int(match["version"]) < oldest}
