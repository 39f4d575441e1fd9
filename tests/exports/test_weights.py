"""What exports and assembled students hold: every tensor of their sources, in the stored type."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tiny import lora_matrices, random_transformer
from twostep.cli import app
from twostep.errors import InputError, ModelError
from twostep.exports.combine import assemble, average
from twostep.exports.comfyui import to_comfyui
from twostep.exports.registry import ExportOptions, export
from twostep.method.schedule import Schedule
from twostep.models.student import save_student
from twostep.runtime.files import write_atomically


@pytest.fixture(scope="module")
def student(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in bf16, as students are."""
    folder = tmp_path_factory.mktemp("weights") / "student"
    steps = random_transformer(1), random_transformer(2)
    save_student(tiny_folder, *steps, schedule=Schedule(3.0, 0.75), folder=folder)
    return folder


def types(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def is_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_exports_keep_the_stored_type_and_give_another_if_asked(
    student: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    teacher = str(tiny_folder)
    for dtype, name in ((None, "BF16"), (torch.float32, "F32")):
        options = ExportOptions(dtype=dtype, teacher=teacher, rank=4)
        for target in ("diffusers", "comfyui", "lora"):
            out = tmp_path / name / target
            export(str(student), target, out, options)
            for step in ("transformer", "transformer_2") if target == "diffusers" else ("",):
                files = [p for p in (out / step).glob("*.safetensors") if "base" not in p.name]
                assert files
                assert {t for p in files for t in types(p)} == {name}
    kept = weights(tmp_path / "BF16" / "diffusers", "transformer_2")
    assert is_equal(kept, weights(student, "transformer_2"))
    average([str(student), str(student)], out=tmp_path / "mean")
    assert is_equal(weights(tmp_path / "mean", "transformer"), weights(student, "transformer"))
    call = ["export", "--model", str(student), "--to", "diffusers", "--out", str(tmp_path / "x")]
    result = CliRunner().invoke(app, [*call, "--dtype", "int4"])
    assert isinstance(result.exception, InputError)
    assert "--dtype: expected one of float32, bfloat16, float16, got 'int4'" in str(
        result.exception
    )


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_assemble_reads_whole_transformers_in_comfyuis_layout(
    prefix: str, student: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    files = []
    for part in ("transformer", "transformer_2"):
        converted = to_comfyui(weights(student, part))
        files.append(tmp_path / f"{part}.safetensors")
        save_file({prefix + key: value for key, value in converted.items()}, files[-1])
    assemble(str(tiny_folder), *map(str, files), out=tmp_path / "made")
    for part in ("transformer", "transformer_2"):
        assert is_equal(weights(tmp_path / "made", part), weights(student, part))


def test_assemble_reads_a_lora_with_comfyuis_names(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        f"diffusion_model.{name}.lora_{side}.weight": matrix
        for name, sides in lora_matrices().items()
        for side, matrix in zip("AB", sides, strict=True)
    }
    save_file(tensors, path)
    assemble(str(tiny_folder), str(path), str(path), out=tmp_path / "made")
    made, plain = weights(tmp_path / "made", "transformer"), random_transformer().state_dict()
    changed = {key for key in made if not torch.equal(made[key], plain[key])}
    assert changed == {f"{name}.weight" for name in lora_matrices()}


def test_assemble_takes_each_step_of_a_student(
    student: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    assemble(str(tiny_folder), str(student), str(student), out=tmp_path / "made")
    for part in ("transformer", "transformer_2"):
        assert is_equal(weights(tmp_path / "made", part), weights(student, part))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layers.1.attention.qkv.weight"), r"attention\.to_k\.weight is missing"),
        (lambda w: w.update(stray=torch.ones(3)), "stray is 3 in the file, missing there"),
        (
            lambda w: w.update(cap_pad_token=torch.ones(1, 7)),
            "cap_pad_token is 1x7 in the file, 1x64 there",
        ),
        (lambda w: w.update(cap_pad_token=torch.ones(1, 64).to(torch.float8_e4m3fn)), "float8"),
    ],
)
def test_assemble_uses_every_tensor_or_writes_nothing(
    change: object, message: str, student: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    converted = to_comfyui(weights(student, "transformer"))
    change(converted)
    path = tmp_path / "a.safetensors"
    save_file(converted, path)
    with pytest.raises(ModelError, match=rf"--first: .*{message}"):
        assemble(str(tiny_folder), str(path), str(path), out=tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_lora_folder_with_strange_keys_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    from twostep.inference.sampler import Sampler
    from twostep.models.student import write_lora_index

    folder = tmp_path / "pair"
    folder.mkdir()
    for step in ("first", "second"):
        save_file({"x.to_q.lora_A.weight": torch.ones(2, 64)}, folder / f"{step}.safetensors")
    write_lora_index(folder, teacher=(str(tiny_folder), None), schedule=Schedule(3.0, 0.75))
    with pytest.raises(ModelError, match=r"first\.safetensors is no LoRA for the transformer"):
        Sampler.load(str(folder))


def test_files_are_for_those_whom_the_umask_lets(student: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export(str(student), "comfyui", tmp_path / "out")
        write_atomically(tmp_path / "a.safetensors", lambda p: save_file({"x": torch.ones(1)}, p))
    finally:
        os.umask(before)
    paths = [tmp_path / "a.safetensors", *(tmp_path / "out").iterdir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o640}
