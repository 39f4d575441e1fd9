"""`twostep serve --ray`: the application on a cluster, or on one that this process starts."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from twostep.errors import InputError, UserError
from twostep.runtime.ray_cluster import connect_ray, is_own_cluster
from twostep.runtime.signals import catch_hangup, catch_signals
from twostep.serving.logs import log, log_error, log_to_stderr


class ClusterError(UserError, RuntimeError):
    """The application could not be deployed."""

    exit_code = 1


class Cluster:
    """A connection to Ray, with Serve's HTTP door at one address.

    Args:
        host, port: where it listens; a Serve that runs already keeps its own address.
        option: what asked for it, as the user typed it.
    """

    def __init__(self, host: str, port: int, *, option: str = "--ray") -> None:
        self.is_own = is_own_cluster()
        self.ray = connect_ray(option)
        from ray import serve

        self.serve = serve
        port = port or _free_port(host)
        where = "HeadOnly" if self.is_own else "EveryNode"
        serve.start(proxy_location=where, http_options={"host": host, "port": port})
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def gpus(self) -> float:
        """Of all machines."""
        return float(self.ray.cluster_resources().get("GPU", 0))

    def check_room(self, wanted: Mapping[str, float]) -> None:
        """Raises InputError if a cluster of this machine alone has less than is wanted.

        Others may start machines as they need them.
        """
        has = self.ray.cluster_resources()
        for kind, amount in wanted.items():
            if self.is_own and amount > has.get(kind, 0):
                raise InputError(
                    f"--replicas, --share: {amount:g} {kind}s are needed for all replicas, this "
                    f"machine has {has.get(kind, 0):g}; fewer, or a smaller share"
                )

    def deploy(self, application: Any) -> None:
        """Returns once the application can be used; what ran before serves until then.

        Raises:
            ClusterError: if its replicas do not start.
        """
        from twostep.serving.on_ray import APP

        try:
            self.serve.run(application, name=APP, route_prefix="/")
        except RuntimeError as error:
            raise ClusterError(f"the application could not be deployed: {error}") from error

    def end(self) -> None:
        """Takes no more, finishes what is open, ends Serve, and Ray with it where it is our own."""
        from twostep.serving.on_ray import APP, FRONT

        try:
            self.serve.get_deployment_handle(FRONT, APP).drain.remote().result()
        except Exception as error:  # the front may be dead
            log_error("the front could not be drained", error)
        self.serve.shutdown()
        if self.is_own:
            self.ray.shutdown()


def serve_on_cluster(
    cluster: Cluster,
    build: Callable[[], Any],
    *,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Deploys; on a cluster of its own then serves until SIGTERM or SIGINT, and deploys anew, what
    runs serving meanwhile, on SIGHUP.

    Raises:
        ClusterError: if it cannot be deployed; later ones are logged, and the old ones serve on.
    """
    log_to_stderr()
    log("starting", url=cluster.url)
    with catch_signals() as caught, catch_hangup() as hangups:
        cluster.deploy(build())
        log("ready", url=cluster.url)
        on_ready(cluster.url)
        if not cluster.is_own:
            return
        while not caught:
            time.sleep(0.1)
            if hangups:
                hangups.clear()
                try:
                    cluster.deploy(build())
                    log("updated", url=cluster.url)
                except UserError as error:
                    log_error("not updated", error)
        log("draining", signal=caught[0])
        cluster.end()
    log("ended")


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=_family(host)) as listening:
        port: int = listening.getsockname()[1]
    return port


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
