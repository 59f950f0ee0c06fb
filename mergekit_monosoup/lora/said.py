"""Say each thing once: the plan of a merge reads the same adapters as the merge."""

from __future__ import annotations

import logging
from functools import lru_cache


@lru_cache(256)
def warn_once(logger: logging.Logger, message: str, *values: str) -> None:
    """Log a warning, unless the same has been said lately."""
    logger.warning(message, *values)
