"""A Ray cluster for as long as something runs on it; comparisons and searches share it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from paperback.errors import MissingExtraError, PaperbackError
from paperback.study.wording import one_sentence

CONNECT_SECONDS = 10.0


@contextmanager
def ray_cluster(address: str = "") -> Iterator[ModuleType]:
    """The ray module, connected; a connection that was there before is used and left.

    Args:
        address: of a running cluster; empty for the one that Ray finds, or one that it starts here.

    Yields:
        The module.

    Raises:
        PaperbackError: if the cluster cannot be reached.
        MissingExtraError: if Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError('the engine "ray" needs Ray; install paperback[ray].') from error
    if ray.is_initialized():
        yield ray
        return
    _check_address(address)
    try:
        ray.init(address=address or None, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PaperbackError(f"Ray could not be started or reached ({one_sentence(error)})") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse an address where nobody listens: Ray itself would end this process without an exception."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # "", "auto", "local": Ray looks for itself
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise PaperbackError(f"there is no Ray cluster at {address} ({error}); check the address.") from error
