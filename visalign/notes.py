"""Say where an exception came from without changing it: a note on its way out, which ``visalign`` prints beneath the message."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def noting(note: str) -> Iterator[None]:
    """Attach ``note`` to an exception that leaves the block; before Python 3.11, which has no notes, it is logged."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):
            error.add_note(note)
        else:
            logger.error("%s: %s", note, error)
        raise
