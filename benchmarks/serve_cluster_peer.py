"""The peer on a cluster: `ZImagePipeline` at two steps in Ray Serve, batches by `@serve.batch`.

As Ray's own guides have it: a batch is whole pictures, so nobody joins between the steps and there
is no preview.
"""

from __future__ import annotations

import base64
import io
import signal
import sys
from typing import Any

from starlette.requests import Request

from twostep.serving.cluster import Cluster


def application(folder: str, size: int, replicas: int, batch: int) -> Any:
    from ray import serve

    @serve.deployment(
        num_replicas=replicas, ray_actor_options={"num_cpus": 0.5}, max_ongoing_requests=4 * batch
    )
    class Peer:
        def __init__(self) -> None:
            from diffusers import ZImagePipeline

            self.pipe = ZImagePipeline.from_pretrained(folder)
            self.pipe.set_progress_bar_config(disable=True)

        @serve.batch(max_batch_size=batch, batch_wait_timeout_s=0.01)
        async def pictures(self, asked: list[dict[str, Any]]) -> list[str]:
            import torch

            images = self.pipe(
                [each["prompt"] for each in asked],
                height=size,
                width=size,
                num_inference_steps=2,
                guidance_scale=0.0,
                generator=[torch.Generator().manual_seed(each["seed"]) for each in asked],
            ).images
            found = []
            for image in images:
                file = io.BytesIO()
                image.save(file, format="PNG")
                found.append(base64.b64encode(file.getvalue()).decode())
            return found

        async def __call__(self, request: Request) -> Any:
            if request.method == "GET":
                return {"status": "ready"}
            return {"data": [{"b64_json": await self.pictures(await request.json())}]}

    return Peer.bind()


if __name__ == "__main__":
    folder, size, port, replicas, batch = sys.argv[1], *map(int, sys.argv[2:])
    cluster = Cluster("127.0.0.1", port)
    cluster.deploy(application(folder, size, replicas, batch))
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    cluster.serve.shutdown()
    cluster.ray.shutdown()
