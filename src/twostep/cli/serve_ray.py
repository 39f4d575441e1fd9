"""`twostep serve --ray`, and the same application for a cluster's manifest."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from typing import Any

import typer

from twostep.cli import serve_options
from twostep.cli.serve_options import Asked
from twostep.errors import InputError
from twostep.serving import cluster_models
from twostep.serving.cluster import Cluster, serve_on_cluster
from twostep.serving.server import under_own_names


def serve_on_ray(asked: Asked, *, on_ready: Callable[[str], None]) -> None:
    """Deploys on the cluster of RAY_ADDRESS and returns, or serves from one of its own.

    Raises:
        UserError: for what cannot be used or deployed.
    """
    # What is wrong with a model is said before a cluster is started.
    _stages(asked, "cpu")
    cluster = Cluster(asked.server.host, asked.server.port)
    has_gpus = cluster.gpus > 0
    cluster.check_room(_room(asked, has_gpus=has_gpus))
    serve_on_cluster(cluster, partial(_build, asked, has_gpus=has_gpus), on_ready=on_ready)


def application(arguments: dict[str, Any]) -> Any:
    """For a Serve configuration: `import_path: twostep.cli.serve_ray:application`.

    Args:
        arguments: `options`, the words of `twostep serve` on one line without host and port, which
            are the configuration's; and `gpus`, whether replicas get GPUs (true).

    Raises:
        InputError, ModelError: for options or models that cannot be used, or without keys.
    """
    from twostep.cli import app

    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    words = ["--ray", *shlex.split(arguments.get("options", ""))]
    with command.make_context("serve", words) as context:
        asked = serve_options.read(context.params)
    if not asked.server.app.keys:
        raise InputError("others can reach a cluster: it needs the variable TWOSTEP_API_KEY")
    return _build(asked, has_gpus=arguments.get("gpus", True))


def _build(asked: Asked, *, has_gpus: bool) -> Any:
    from twostep.serving.on_ray import ClusterOptions, build

    replication = asked.replication
    assert replication is not None
    on_gpu = _on_gpu(asked, has_gpus=has_gpus)
    server = asked.server
    options = ClusterOptions(
        replicas=replication.replicas,
        autoscale=replication.autoscale,
        gpus=replication.share if on_gpu else 0.0,
        cpus=0.0 if on_gpu else replication.share,
        line=server.line,
        max_batch=server.max_batch,
        batch_wait=server.batch_wait,
        app=under_own_names(server),
    )
    catalogue = partial(cluster_models.catalogue_of, asked.choices, asked.size)
    return build(_stages(asked, "cuda" if on_gpu else "cpu"), catalogue, options)


def _stages(asked: Asked, device: str) -> Any:
    assert asked.replication is not None
    return cluster_models.stages_of(
        asked.choices,
        size=asked.size,
        holding=asked.holding(device),
        two_stage=asked.replication.two_stage,
    )


def _on_gpu(asked: Asked, *, has_gpus: bool) -> bool:
    """The machine where this runs may have no GPU where the replicas' have."""
    if asked.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device: with --ray expected auto, cpu or cuda, got {asked.device!r}")
    return has_gpus if asked.device == "auto" else asked.device == "cuda"


def _room(asked: Asked, *, has_gpus: bool) -> dict[str, float]:
    """GPUs or CPUs of all replicas, as many as there may be."""
    replication = asked.replication
    assert replication is not None
    most = replication.autoscale[1] if replication.autoscale else replication.replicas
    kind = "GPU" if _on_gpu(asked, has_gpus=has_gpus) else "CPU"
    return {kind: most * replication.share * (2 if replication.two_stage else 1)}
