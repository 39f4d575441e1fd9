"""What a card says is run, twice in a row; and as the two servers would, by their own accounts."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import dynamic_modules_utils

from tiny import random_transformer
from twostep.exports.registry import ExportOptions, export
from twostep.inference.pipeline import TwoStepPipeline
from twostep.method.schedule import Schedule
from twostep.models.student import save_student

PROMPT = "a red fox in the snow"


def nudged(seed: int) -> Any:
    """The tiny teacher with a change of rank 2 in every linear layer."""
    model, generator = random_transformer(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                a = torch.randn(2, module.in_features, generator=generator)
                module.weight += 0.02 * torch.randn(module.out_features, 2, generator=generator) @ a
    return model


@pytest.fixture(scope="module")
def exported(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the student of a run in it, and what is exported of it, by its kind."""
    home = tmp_path_factory.mktemp("cards")
    student = home / "run" / "student"
    save_student(
        tiny_folder, nudged(1), nudged(2),
        schedule=Schedule(3.0, 0.75), folder=student, dtype=torch.float32, sizes=[(32, 40)],
    )  # fmt: skip
    (home / "run" / "recipe.yaml").write_text(
        f"name: fox\nteacher:\n  model: {tiny_folder}\ndata:\n  height: 32\n  width: 40\n"
    )
    for kind in ("diffusers", "server", "lora"):
        options = ExportOptions(teacher=str(tiny_folder), rank=2)
        export(str(student), kind, home / kind, options)
    (home / tiny_folder.name).symlink_to(tiny_folder)  # what the LoRA card calls it
    with pytest.MonkeyPatch.context() as patch:
        # Where diffusers keeps copies of a folder's code: not beside another test's.
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(home / "modules"))
        yield home


def own(folder: Path, count: int = 1) -> np.ndarray:
    """The pictures of the package's pipeline, 0 to 1, (count, 32, 40, 3)."""
    pipe = TwoStepPipeline.from_pretrained(folder / "diffusers")
    generator = torch.Generator().manual_seed(0)
    return pipe(
        PROMPT, 32, 40, generator=generator, output_type="np", num_images_per_prompt=count
    ).images


@pytest.mark.parametrize("kind", ["diffusers", "server", "lora"])
def test_a_cards_script_gives_the_same_picture_twice(
    exported: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (exported / kind / "README.md").read_text(encoding="utf-8")
    assert str(exported) not in card
    assert "/tmp" not in card
    monkeypatch.chdir(exported)
    names: dict[str, Any] = {}
    script, *others = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    assert "twostep" not in script
    pictures = []
    for _ in range(2):  # the whole script
        exec(script, names)
        pictures += names["images"]
    exec(script[script.index("images = pipe(") :], names)  # the call alone, in a session that lasts
    pictures += names["images"]
    assert names["prompts"] == [PROMPT]
    found = [np.asarray(picture, np.float32) / 255 for picture in pictures]
    assert found[0].shape == (32, 40, 3)
    assert all(np.array_equal(each, found[0]) for each in found)
    assert np.abs(found[0] - own(exported)[0]).max() < 3 / 255
    for other in others:
        exec(other, names)
        assert isinstance(names["pipe"], TwoStepPipeline)


# The two servers, as their own sources behave: vLLM-Omni's `OmniDiffusionConfig.enrich_config` and
# `diffusers_adapter`, SGLang's `multimodal_gen` registry and `diffusers_pipeline` (August 2026).

ASKED = {"height": 32, "width": 40, "seed": 0, "prompt": PROMPT, "count": 2}


def vllm_omni(folder: Path, **sampling: Any) -> Any:
    """Its adapter's pictures; `--diffusers-load-kwargs` are those of the card."""
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    with suppress(KeyError, AttributeError):  # what it allows for: it warns and goes on
        getattr(diffusers, name)
    (text,) = re.findall(r"--diffusers-load-kwargs '(.*?)'", (folder / "README.md").read_text())
    pipe = DiffusionPipeline.from_pretrained(
        str(folder), torch_dtype=torch.float32, **json.loads(text)
    )
    pipe.to("cpu")
    taken = set(inspect.signature(pipe.__call__).parameters)
    pipe.enable_vae_slicing()
    pipe.enable_vae_tiling()
    pipe.disable_vae_tiling()  # it would change a picture of two tiles
    pipe.transformer.set_attention_backend("native")
    arguments = {k: v for k, v in sampling.items() if k in taken and v is not None}
    count = sampling.get("num_outputs_per_prompt", 1)
    arguments |= {k: count for k in taken if re.match(r"num_[a-z]+_per_prompt", k)}
    arguments["generator"] = torch.Generator().manual_seed(sampling["seed"])
    with torch.inference_mode():
        return pipe(**arguments).images


def sglang(folder: Path, **asked: Any) -> Any:
    """Its backend's pictures."""
    index = json.loads((folder / "model_index.json").read_text())
    assert "image" not in index["_class_name"].lower()  # looked for among its own models
    load: dict[str, Any] = {
        "torch_dtype": torch.float32,
        "trust_remote_code": False,
        "revision": None,
    }
    try:
        pipe = DiffusionPipeline.from_pretrained(str(folder), **load)
    except AttributeError as error:
        if "has no attribute" not in str(error):
            raise
        load |= {"custom_pipeline": str(folder), "trust_remote_code": True}
        pipe = DiffusionPipeline.from_pretrained(str(folder), **load)
    parameters = inspect.signature(pipe.__call__).parameters
    assert not any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    arguments = {
        "num_inference_steps": 30, "guidance_scale": 7.5, "true_cfg_scale": 4.0, "output_type": "pt",
        "generator": torch.Generator().manual_seed(asked.pop("seed")),
        "num_images_per_prompt": asked.pop("count"), **asked,
    }  # fmt: skip
    with torch.no_grad(), warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        return pipe(**{k: v for k, v in arguments.items() if k in parameters}).images


def test_vllm_omni_loads_and_calls_the_servers_folder(exported: Path) -> None:
    with pytest.warns(UserWarning, match="num_inference_steps is fixed"):  # its first, dummy run
        vllm_omni(
            exported / "server", prompt="dummy run", height=64, width=64, num_inference_steps=1, seed=0
        )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        images = vllm_omni(
            exported / "server", prompt=PROMPT, negative_prompt="", height=32, width=40, seed=0,
            num_inference_steps=50, guidance_scale=4.0, num_outputs_per_prompt=2, output_type="pil",
            num_frames=1, eta=None,
        )  # fmt: skip
    found = np.stack([np.asarray(image, np.float32) / 255 for image in images])
    assert found.shape == (2, 32, 40, 3)
    assert np.abs(found - own(exported, 2)).max() < 3 / 255
    with pytest.raises(TypeError, match="attribute name must be string"):
        vllm_omni(exported / "diffusers", seed=0)


def test_sglang_loads_and_calls_the_servers_folder(exported: Path) -> None:
    images = sglang(exported / "server", **ASKED)
    assert images.shape == (2, 3, 32, 40)
    assert np.abs(images.permute(0, 2, 3, 1).numpy() - own(exported, 2)).max() < 3 / 255
    with pytest.raises(AttributeError, match="'list' object has no attribute 'lower'"):
        sglang(exported / "diffusers", **ASKED)


def test_the_servers_folder_is_a_student_to_this_package(exported: Path) -> None:
    index = json.loads((exported / "server" / "model_index.json").read_text())
    assert index["_class_name"] == "TwoStepPipeline"
    pipe = TwoStepPipeline.from_pretrained(exported / "server")
    assert json.loads(pipe.to_json_string())["_class_name"] == ["pipeline", "TwoStepPipeline"]
