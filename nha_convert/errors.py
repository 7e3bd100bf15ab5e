"""The two ways a command ends badly, and the helper that finds the name somebody meant. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """What the user gave is wrong; nothing was touched. The command line exits with 2.

    The message names the field or file, what was found, what is allowed and what fixes it;
    one line per problem.
    """


class WorkError(Exception):
    """The work failed; what was done is kept. The command line exits with 1.

    The message says where it stopped and how to resume.
    """


def nearest(name: str, options: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The option closest to a mistyped name, or None where nothing is close."""
    found = difflib.get_close_matches(name, list(options), n=1, cutoff=cutoff)
    return found[0] if found else None
