"""The peer: plain diffusers behind FastAPI, one picture at a time, as tutorials have it.

The same weights' folder, `ZImagePipeline` at two steps: the work of a two-step student, without
batches, kept prompts or previews.
"""

from __future__ import annotations

import base64
import io
import sys
import threading
from typing import Any

import torch
import uvicorn
from diffusers import ZImagePipeline
from fastapi import FastAPI
from pydantic import BaseModel


class Body(BaseModel):
    prompt: str
    seed: int = 0


def create(folder: str, size: int) -> FastAPI:
    pipe = ZImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    lock, app = threading.Lock(), FastAPI()

    @app.post("/v1/images/generations")
    def generate(body: Body) -> dict[str, Any]:
        with lock:  # a pipeline is not made for several threads
            image = pipe(
                body.prompt,
                height=size,
                width=size,
                num_inference_steps=2,
                guidance_scale=0.0,
                generator=torch.Generator().manual_seed(body.seed),
            ).images[0]
        file = io.BytesIO()
        image.save(file, format="PNG")
        return {"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]}

    @app.get("/ready")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    return app


if __name__ == "__main__":
    uvicorn.run(create(sys.argv[1], int(sys.argv[2])), port=int(sys.argv[3]), log_level="error")
