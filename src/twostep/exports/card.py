"""Model cards: how to run an export, what it was made of, how close it comes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from twostep.evaluation.report.words import verdict
from twostep.method.schedule import Schedule

_HEAD = """---
library_name: diffusers
pipeline_tag: text-to-image
tags: [two-step, distillation, z-image]
---

# {name}
"""

_STUDENT = """
A two-step text-to-image student: `transformer` runs at sigma 1, `transformer_2` at sigma
{sigma:.4g} ({transition} transition), without guidance.

With diffusers alone (the folder carries its own `pipeline.py`; read it before you trust it):

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
image = pipe("a red fox in the snow", height=1024, width=1024).images[0]
```

With the package `twostep`, which is faster and runs no code of the folder:

```python
from twostep.inference.pipeline import TwoStepPipeline

pipe = TwoStepPipeline.from_pretrained("{name}")
```
"""

_LORA = """
Two LoRA files (rank {rank}, alpha {rank}) that turn `{teacher}` into a two-step model: `first` for
sigma 1, `second` for sigma {sigma:.4g}. No package but diffusers and peft is needed:

```python
from diffusers import ZImagePipeline

pipe = ZImagePipeline.from_pretrained("{teacher}")
for step in ("first", "second"):
    pipe.load_lora_weights("{name}", weight_name=f"{{step}}.safetensors", adapter_name=step)


def next_step(pipe, step, time, tensors):
    pipe.set_adapters("second")
    return tensors


pipe.set_adapters("first")
image = pipe(
    "a red fox in the snow", height=1024, width=1024, num_inference_steps=2, guidance_scale=0.0,
    sigmas=[1.0, {before_shift:.6g}], callback_on_step_end=next_step,
).images[0]
```

{lines}
"""

_LICENCE = """
## Licence

The weights derive from the teacher's and from images it made: the teacher's licence applies. The
code in this folder, if any, is Apache-2.0.
"""


def student_card(name: str, schedule: Schedule, facts: Mapping[str, Any]) -> str:
    """For a diffusers folder."""
    text = _STUDENT.format(name=name, sigma=schedule.step2_sigma, transition=schedule.transition)
    return _HEAD.format(name=name) + text + _origin(facts) + _LICENCE


def lora_card(
    name: str,
    teacher: str,
    schedule: Schedule,
    *,
    rank: int,
    facts: Mapping[str, Any],
    lines: Sequence[str],
) -> str:
    """For a pair of LoRA files.

    Args:
        lines: what the truncation lost.
    """
    sigma = schedule.step2_sigma
    text = _LORA.format(
        name=name,
        teacher=teacher,
        sigma=sigma,
        before_shift=schedule.before_shift([sigma])[0],
        rank=rank,
        lines="\n".join(f"- {line}" for line in lines),
    )
    return _HEAD.format(name=name) + text + _origin(facts) + _LICENCE


def _origin(facts: Mapping[str, Any]) -> str:
    text = ""
    if "figures" in facts:
        figures = facts["figures"]
        text += f"\n## How close it comes\n\n{verdict(figures)}\n\n"
        text += (
            f"{figures.get('images')} images of {figures.get('prompts')} prompts, features "
            f"{figures.get('extractor')}, {figures.get('date')}, commit {figures.get('commit')}.\n"
        )
    outcome = facts.get("outcome", {})
    if outcome.get("skipped") or outcome.get("diverged"):
        text += "\n## What went wrong in training\n\n"
        text += "".join(
            f"- {count} updates or validations ({kind}) were refused: not finite\n"
            for kind, count in outcome.get("skipped", {}).items()
        )
        text += "".join(f"- diverged: {phrase}\n" for phrase in outcome.get("diverged", []))
    if "recipe" in facts:
        text += f"\n## Recipe\n\n```yaml\n{facts['recipe']}```\n"
    return text


def _public(recipe: str) -> str:
    """A recipe for a card: of folders and files on this machine the last name alone."""

    def public(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: public(each) for key, each in value.items()}
        if isinstance(value, list):
            return [public(each) for each in value]
        is_place = isinstance(value, str) and value.startswith(("/", "~", "./", "../"))
        return Path(value).name if is_place else value

    try:
        values = yaml.safe_load(recipe)
    except yaml.YAMLError:
        return ""
    return yaml.safe_dump(public(values), sort_keys=False, allow_unicode=True)


def origin_of(student: Path) -> dict[str, Any]:
    """What a run folder around the student tells about it: recipe and figures, if there."""
    facts: dict[str, Any] = {}
    recipe = student.parent / "recipe.yaml"
    if recipe.is_file():
        facts["recipe"] = _public(recipe.read_text(encoding="utf-8"))
    run = student.parent / "run.json"
    if run.is_file():
        with suppress(ValueError, KeyError, TypeError):
            facts["outcome"] = dict(json.loads(run.read_text(encoding="utf-8"))["outcome"])
    for path in (student.parent / "check" / "metrics.json", student.parent / "report.json"):
        if path.is_file():
            facts["figures"] = json.loads(path.read_text(encoding="utf-8"))
            break
    return facts
