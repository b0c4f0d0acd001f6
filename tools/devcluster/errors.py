"""One exception: everything that can go wrong here is told to a person, who then does something about it."""

from __future__ import annotations


class DevClusterError(Exception):
    """The message says what failed, why, and what to do."""
