"""What a card's reader copies: scripts and commands that run a student without this package."""

from __future__ import annotations

from pathlib import Path

_PLAIN = """
A two-step text-to-image student: `transformer` runs at sigma 1, `transformer_2` at sigma
{sigma:.4g} ({transition} transition), without guidance.

With diffusers alone (the folder carries its own `pipeline.py`; read it before you trust it):

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", {trust})
# On a GPU: dtype=torch.bfloat16 above, then pipe.to("cuda").
prompts = ["a red fox in the snow"]
images = pipe(
    prompts, height={height}, width={width}, generator=torch.Generator().manual_seed(0)
).images
```
"""

_STUDENT = """
With the package `twostep`, which is faster and runs no code of the folder:

```python
from twostep import TwoStepPipeline

pipe = TwoStepPipeline.from_pretrained("{name}")
```
"""

_SERVER = """
This folder is for servers: its `model_index.json` names the pipeline's class by a plain string, for
neither of the two below takes diffusers' list. A plain `ZImagePipeline.from_pretrained` of it would
drop the second transformer without a word; the folder that `twostep export --to diffusers` writes
has the list, which refuses that. Both servers run the folder's `pipeline.py`.

vLLM-Omni:

```bash
vllm serve {name} --omni --diffusion-load-format diffusers \\
  --diffusers-load-kwargs '{{"custom_pipeline": "pipeline", "trust_remote_code": true}}'
```

SGLang, which finds the `pipeline.py` by itself:

```bash
sglang serve --model-path {name} --backend diffusers
```

Ask for {width}x{height} pixels. The two steps are fixed: what a server sends of steps, guidance and
negative prompts is ignored, with a warning.
"""

_LORA = """
Two LoRA files (rank {rank}, alpha {rank}) that turn `{teacher}` into a two-step model: `first` for
sigma 1, `second` for sigma {sigma:.4g}. {needs}:

```python
import torch
from diffusers import ZImagePipeline
{imports}
pipe = ZImagePipeline.from_pretrained({base})
# On a GPU: dtype=torch.bfloat16 above, then pipe.to("cuda").
for step in ("first", "second"):
    pipe.load_lora_weights("{name}", weight_name=f"{{step}}.safetensors", adapter_name=step)


def next_step(pipe, step, time, tensors):
    pipe.set_adapters("second" if step == 0 else "first")
    return tensors


pipe.set_adapters("first")
prompts = ["a red fox in the snow"]
images = pipe(
    list(prompts),  # a copy: diffusers writes into the list
    height={height}, width={width}, num_inference_steps=2, guidance_scale=0.0,
    sigmas=[1.0, {before_shift:.6g}], callback_on_step_end=next_step,
    generator=torch.Generator().manual_seed(0),
).images
```

{lines}
"""


def student_script(
    name: str, *, sigma: float, transition: str, size: tuple[int, int], server: bool
) -> str:
    """Of a folder of two transformers.

    Args:
        name: where the reader finds it: a folder's name, or an id of the hub.
        size: (height, width) in pixels, one that the model was made for.
        server: whether the class in its index is a plain string.
    """
    height, width = size
    custom = 'custom_pipeline="pipeline", ' if server else ""
    plain = _PLAIN.format(
        name=name, sigma=sigma, transition=transition, height=height, width=width,
        trust=f"{custom}trust_remote_code=True",
    )  # fmt: skip
    more = _SERVER if server else _STUDENT
    return plain + more.format(name=name, height=height, width=width)


def lora_script(
    name: str, teacher: str, *,
    sigma: float, before_shift: float, rank: int, size: tuple[int, int], lines: str,
) -> str:  # fmt: skip
    """Of two LoRA files.

    Args:
        name: as in `student_script`.
        teacher: an id of the hub, `zoo:NAME`, or a folder, of which the last name is told.
        before_shift: `sigma` as diffusers takes it, before its time shift.
    """
    shown, imports, base = teacher, "", f'"{teacher}"'
    needs = "No package but diffusers and peft is needed"
    if teacher.startswith("zoo:"):  # only the package knows where
        imports = "from twostep.zoo import zoo_folder\n"
        base, needs = f'zoo_folder("{teacher}")', "With diffusers, peft and `twostep`'s models"
    elif Path(teacher).is_absolute() or Path(teacher).is_dir():
        shown = Path(teacher).name
        base, needs = f'"{shown}"', f"{needs}, and the folder of `{shown}`"
    return _LORA.format(
        name=name, teacher=shown, imports=imports, base=base, needs=needs, sigma=sigma,
        before_shift=before_shift, rank=rank, lines=lines, height=size[0], width=size[1],
    )  # fmt: skip
