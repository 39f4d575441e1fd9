"""A folder that a stranger made: what is refused before any library reads it."""

from __future__ import annotations

import ast
import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import twostep
from twostep.errors import ModelError
from twostep.models import prompt_encoder
from twostep.models.folder import ModelFolder
from twostep.models.foreign import check_folder
from twostep.runtime.devices import Placement
from twostep.zoo import zoo_folder

LOADERS = {"from_pretrained", "from_config"}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_every_loader_is_told_to_run_no_code_of_a_folder() -> None:
    """Libraries that are not told ask on the terminal, and a piped `y` answers."""
    checked = 0
    for path in Path(twostep.__file__).parent.rglob("*.py"):
        if path.match("zoo/*/pipeline.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") not in LOADERS:
                continue
            owner = ast.unparse(node.func)
            if owner.startswith(("LoraConfig.", "AutoConfig.for_model")):  # plain JSON
                continue
            said = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if owner == "super().from_pretrained":  # the pipeline's options, set one line above
                assert '"trust_remote_code": False' in path.read_text()
            else:
                assert said.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
            checked += 1
    assert checked >= 9


def write_object(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | changes))


def link(folder: Path, name: str, target: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def header(folder: Path, length: int, *, content: bytes = b"") -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + content)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "link out": (lambda f: link(f, "tokenizer/notes.txt", Path("/etc/hostname")), "link out"),
    "linked folder": (
        lambda f: (shutil.rmtree(f / "vae"), link(f, "vae", zoo_folder("emoji-base").parents[1])),
        "link out",
    ),
    "dangling": (lambda f: link(f, "tokenizer/x.json", f / "nothing"), "link to nothing"),
    "pipe": (lambda f: os.mkfifo(f / "tokenizer" / "added.json"), "is a pipe, a device"),
    "folder for a file": (
        lambda f: (f / "tokenizer" / "added.json").mkdir(),
        "is a folder, expected a file",
    ),
    "index outside": (
        lambda f: write_object(
            f, "text_encoder/model.safetensors.index.json", weight_map={"a": "../../x.safetensors"}
        ),
        "names '../../x.safetensors'",
    ),
    "index of a pickle": (
        lambda f: write_object(
            f, "text_encoder/model.safetensors.index.json", weight_map={"a": "model.bin"}
        ),
        "names 'model.bin'",
    ),
    "index of a missing file": (
        lambda f: write_object(
            f, "transformer/x.safetensors.index.json", weight_map={"a": "b.safetensors"}
        ),
        "b.safetensors is missing",
    ),
    "huge header": (lambda f: header(f, 1 << 40), "a header of 1099511627776 bytes"),
    "no header": (lambda f: header(f, 2, content=b"[]" * 9), "its header cannot be read"),
    "cut short": (
        lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 7),
        "is cut short or damaged",
    ),
    "code in the tokenizer": (
        lambda f: write_object(f, "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": "x.T"}),
        "code of its own",
    ),
    "code in the text encoder": (
        lambda f: write_object(f, "text_encoder/config.json", auto_map={"AutoModel": "x.M"}),
        "code of its own",
    ),
    "half a configuration": (
        lambda f: (f / "scheduler/scheduler_config.json").write_text('{"shift": 3.'),
        "scheduler_config.json cannot be read as JSON",
    ),
    "a list": (
        lambda f: (f / "text_encoder/config.json").write_text("[]"),
        "must hold an object, found list",
    ),
    "nested": (
        lambda f: (f / "vae/config.json").write_text("[" * 100_000),
        "nested too deeply",
    ),
    "not text": (
        lambda f: (f / "vae/config.json").write_bytes(b"\xff\xfe{}"),
        "cannot be read as JSON",
    ),
    "a long template": (
        lambda f: (f / "tokenizer/chat_template.jinja").write_text("x" * (1 << 20 | 1)),
        "has 1048577 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_is_refused_and_its_file_named(
    fault: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    check_folder(folder)
    change, message = FAULTS[fault]
    change(folder)
    with pytest.raises(ModelError, match=message.replace("[", r"\[")) as error:
        ModelFolder.open(folder)
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 1000


def test_links_of_the_hub_and_of_the_package_are_followed(
    tiny_folder: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    shutil.copytree(tiny_folder, snapshot)
    blob = tmp_path / "models--x" / "blobs" / "1"
    blob.parent.mkdir()
    (snapshot / WEIGHTS).rename(blob)
    link(snapshot, WEIGHTS, Path("../../../blobs/1"))
    assert ModelFolder.open(snapshot).kind == "teacher"
    assert ModelFolder.open("zoo:emoji-student").kind == "student"


def test_broken_parts_end_in_a_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    """What only the library can tell is wrong."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "text_encoder" / "model.safetensors").unlink()
    (folder / "vae" / "config.json").write_text(
        '{"_class_name": "AutoencoderKL", "block_out_channels": [3]}'
    )
    write_object(folder, "transformer/config.json", dim="wide")
    model, placement = ModelFolder.open(folder), Placement.on("cpu")
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        model.encoder(placement)
    with pytest.raises(ModelError, match="vae cannot be loaded"):
        model.decoder(placement)
    with pytest.raises(ModelError, match="transformer cannot be loaded"):
        model.velocities(placement)
    shutil.copytree(tiny_folder / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    with pytest.raises(ModelError, match="text_encoder cannot be loaded"):
        model.encoder(placement).encode(["a dog"])


def test_a_template_without_end_is_given_up(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    loops = "{% for i in range(20000) %}" * 3 + "{% endfor %}" * 3
    (folder / "tokenizer" / "chat_template.jinja").write_text(
        "{% if false %}" + loops + "{% endif %}a"
    )
    encoder = ModelFolder.open(folder).encoder(Placement.on("cpu"))
    assert encoder.count_tokens("a dog") >= 1
    monkeypatch.setattr(prompt_encoder, "_TEMPLATE_SECONDS", 0.05)
    # Enough to be late, and over soon: the thread outlives the test.
    slow = "{% for i in range(4000) %}{% for j in range(4000) %}{% endfor %}{% endfor %}"
    encoder.tokenizer.chat_template = slow
    started = time.monotonic()
    with pytest.raises(ModelError, match="chat template is not done"):
        encoder.count_tokens("a dog")
    assert time.monotonic() - started < 2
    encoder.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ModelError, match="template cannot be used: no"):
        encoder.count_tokens("a dog")
