"""Which Ray cluster to work on, and the connection to it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mergekit_monosoup.errors import ConfigurationError

# Seconds to wait for a cluster to answer.
_PATIENCE = 10


@dataclass(frozen=True)
class RayOptions:
    """Where to run, and what each worker takes of the cluster.

    Args:
        address: of a running cluster, `auto` for the one this machine belongs to, `local` for one of our own.
        cpus, gpus: of each worker; absent: one processor, and a GPU where the work is done on GPUs.
    """

    address: str
    cpus: float | None = None
    gpus: float | None = None


@contextmanager
def connected(options: RayOptions) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine for as long as it is needed.

    A connection that this process has already is used and left as it is.

    Raises:
        ConfigurationError: Ray is not installed, or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "--ray needs Ray, which is not installed; pip install 'mergekit-monosoup[ray]'"
        ) from error
    own = not ray.is_initialized()
    if own:
        _require_answer(options.address)
        where: dict[str, Any] = {"include_dashboard": False} if options.address == "local" else {}
        try:
            ray.init(address=options.address, log_to_driver=False, logging_level=logging.ERROR, **where)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigurationError(
                f"no Ray cluster answers at {options.address!r} ({error}); start one with "
                "`ray start --head`, or pass --ray local"
            ) from error
    try:
        yield
    finally:
        if own:
            ray.shutdown()


def _require_answer(address: str) -> None:
    """Refuse an address where nobody answers; Ray itself tries for minutes.

    Raises:
        ConfigurationError: there is no connection.
    """
    host_name, _, port = address.removeprefix("ray://").rpartition(":")
    if not host_name or not port.isdecimal():
        return
    try:
        socket.create_connection((host_name.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except OSError as error:
        raise ConfigurationError(
            f"no Ray cluster answers at {address!r} ({error.strerror or error}); start one with "
            "`ray start --head`, or pass --ray local"
        ) from error
