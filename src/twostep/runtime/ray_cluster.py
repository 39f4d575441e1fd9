"""Ray: connecting to a cluster, or starting one that only this machine can reach."""

from __future__ import annotations

import os
from typing import Any

from twostep.errors import missing_extra


def connect_ray(option: str) -> Any:
    """The `ray` module, connected to the cluster that RAY_ADDRESS names, or to one of its own here.

    Ray's usage reports are off, and what it starts here listens on the loopback.

    Args:
        option: what asked for it, as the user typed it.

    Raises:
        MissingExtraError: without this package's extra `ray`.
    """
    prepare_environment()
    try:
        import ray
    except ImportError as error:
        raise missing_extra("ray", error, option=option) from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=True)
    return ray


def is_own_cluster() -> bool:
    """Whether `connect_ray` starts a cluster that ends with this process."""
    return os.environ.get("RAY_ADDRESS", "local") in ("", "local")


def prepare_environment() -> None:
    """Variables that Ray reads when it is imported; what the user has set stays."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would build an environment of its own for each worker when it is itself run by uv.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if is_own_cluster():
        # Its workers would give way to whatever else runs here.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Despite its name, on any system this keeps Ray to the loopback.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
