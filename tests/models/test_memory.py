from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import nn
from typer.testing import CliRunner

from tiny import CPU, as_velocity, network_of, random_transformer
from twostep.cli import app
from twostep.errors import ModelError
from twostep.exports.combine import assemble
from twostep.exports.registry import ExportOptions, export
from twostep.inference.generate import PictureRequest, SamplerOptions, generate
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.method.schedule import Schedule
from twostep.models.codec import Decoder
from twostep.models.folder import ModelFolder
from twostep.models.int8 import Int8Linear, is_packed, pack_int8
from twostep.models.prompt_encoder import PromptEncoder
from twostep.models.student import save_student
from twostep.models.student_index import StudentIndex
from twostep.runtime.devices import Placement

PROMPTS = ["a dog", "two cats on a red background"]
NOISE = seeded_noise([1, 2], (8, 8, 8))


@pytest.fixture(scope="module")
def student(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "student"
    teacher = random_transformer()
    parts = [random_transformer() for _ in range(2)]
    for seed, part in enumerate(parts):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    a = torch.randn(2, module.in_features, generator=generator)
                    module.weight += 0.02 * torch.randn(len(module.weight), 2) @ a
    assert not torch.equal(
        parts[0].layers[0].attention.to_q.weight, teacher.layers[0].attention.to_q.weight
    )
    save_student(
        tiny_folder,
        parts[0],
        parts[1],
        schedule=Schedule(3.0, 0.75),
        folder=folder,
        dtype=torch.float32,
    )
    return folder


@pytest.fixture(scope="module")
def pair(student: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student as two LoRA files that say all of it."""
    folder = tmp_path_factory.mktemp("memory") / "pair"
    export(str(student), "lora", folder, ExportOptions(teacher=str(tiny_folder), rank=2))
    return folder


def latents(sampler: Sampler) -> torch.Tensor:
    return sampler.sample(PROMPTS, NOISE).latents


def test_offloaded_weights_give_the_same_picture(student: Path) -> None:
    plain = Sampler.load(str(student))
    offloaded = Sampler.load(str(student), placement=Placement(CPU, memory="offload"))
    for _ in range(2):
        assert torch.equal(latents(offloaded), latents(plain))
    # Between uses nothing is held: the layer's tensor says nothing.
    waiting = network_of(offloaded.velocities[0]).layers[1].feed_forward.w1.weight
    assert not torch.equal(
        waiting, network_of(plain.velocities[0]).layers[1].feed_forward.w1.weight
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_are_the_nearest_of_each_row(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 6).to(dtype)
    packed = Int8Linear(linear)
    assert packed.packed.dtype == torch.int8
    restored = packed.weight
    assert restored.dtype == linear.weight.dtype
    exact = packed.packed.float() * packed.scale.float()
    assert ((exact - linear.weight).abs() <= 0.51 * packed.scale.float()).all()
    torch.testing.assert_close(packed.scale[:, 0] * 127, linear.weight.abs().amax(1))
    x = torch.randn(3, 24, dtype=dtype)
    torch.testing.assert_close(packed(x), nn.functional.linear(x, restored, linear.bias))


def test_int8_packs_the_blocks_and_nothing_else() -> None:
    transformer = random_transformer()
    before = as_velocity(random_transformer())
    pack_int8(transformer)
    packed = {n for n, m in transformer.named_modules() if isinstance(m, Int8Linear)}
    linear = {n for n, m in before.named_modules() if isinstance(m, nn.Linear)}
    assert "layers.0.attention.to_q" in packed
    assert "context_refiner.0.feed_forward.w2" in packed
    kept = linear - packed
    assert {"cap_embedder.1", "t_embedder.mlp.0", "all_final_layer.2-1.linear"} <= kept
    assert not any("attention" in name or "feed_forward" in name for name in kept)
    assert not is_packed("layers.0.attention.to_q.lora_A.first", nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["student", "pair"])
def test_int8_is_close_to_the_whole_weights(name: str, request: pytest.FixtureRequest) -> None:
    folder = str(request.getfixturevalue(name))
    whole, packed = (
        Sampler.load(folder),
        Sampler.load(folder, placement=Placement(CPU, memory="int8")),
    )
    weights = [m for m in network_of(packed.velocities[0]).modules() if isinstance(m, Int8Linear)]
    assert weights
    error = (latents(packed) - latents(whole)).norm() / latents(whole).norm()
    assert 0 < error < 0.05


def test_lora_files_are_a_student_on_one_set_of_weights(
    student: Path, pair: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    assert ModelFolder.open(str(pair)).schedule() == Schedule(3.0, 0.75)
    sampler = Sampler.load(str(pair))
    assert sampler.is_student
    assert network_of(sampler.velocities[0]) is network_of(sampler.velocities[1])
    torch.testing.assert_close(
        latents(sampler), latents(Sampler.load(str(student))), atol=5e-3, rtol=5e-3
    )
    files = [str(pair / f"{n}.safetensors") for n in ("second", "first")]
    assemble(str(tiny_folder), files[0], files[1], out=tmp_path / "swapped")
    assert (latents(sampler) - latents(Sampler.load(str(tmp_path / "swapped")))).abs().max() > 0.05


def test_lora_files_make_pictures_from_the_command_line(pair: Path, tmp_path: Path) -> None:
    arguments = ["generate", "--model", str(pair), "a dog", "--size", "32", "--json", "--preview"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout.splitlines()[0])
    assert record["steps"] == 2
    assert Path(record["preview"]).is_file()


def test_a_broken_pair_says_what_is_missing(pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair, tmp_path / "a")
    (tmp_path / "a" / "second.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"second\.safetensors is missing; checksums\.json lists it"
    ):
        Sampler.load(str(tmp_path / "a"))
    shutil.copytree(pair, tmp_path / "b")
    (tmp_path / "b" / "twostep.json").write_text('{"teacher": "x"}')
    with pytest.raises(ModelError, match="expected teacher, step2_sigma and transition"):
        StudentIndex.read(tmp_path / "b")


def test_prompts_on_disk_need_no_text_encoder(tiny_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "prompts"
    first = PromptEncoder.load(tiny_folder, prompt_cache=store).encode(PROMPTS)
    blind = PromptEncoder.load(tiny_folder, prompt_cache=store)
    blind._load = None  # what would read the text encoder
    for a, b in zip(first, blind.encode(PROMPTS), strict=True):
        assert torch.equal(a, b)
    # A torn file is encoded again; another encoder's are not read.
    for path in store.glob("*.safetensors"):
        path.write_bytes(b"torn")
    again = PromptEncoder.load(tiny_folder, prompt_cache=store).encode(PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = PromptEncoder.load(tiny_folder, torch.bfloat16, prompt_cache=store)
    assert other.store is not None
    assert other.store.read(PROMPTS) == {}


def test_text_encoder_is_gone_before_pictures_are_made(student: Path) -> None:
    sampler = SamplerOptions(device=CPU).load(ModelFolder.open(student), PROMPTS)
    assert sampler.encoder._model is None
    assert torch.equal(latents(sampler), latents(Sampler.load(str(student))))
    assert sampler.encoder._model is None
    sampler.sample(["a prompt that it does not know"], NOISE[:1])
    assert sampler.encoder._model is not None


def test_where_all_pictures_are_there_no_weights_are_read(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list(generate(PictureRequest(str(student), PROMPTS, size=(32, 32)), tmp_path))
    assert all(picture.made for picture in made)
    monkeypatch.setattr(Sampler, "load", None)
    again = list(generate(PictureRequest(str(student), PROMPTS, size=(32, 32)), tmp_path))
    assert [p.path for p in again] == [p.path for p in made]
    assert not any(picture.made for picture in again)
    # The same weights held otherwise are other pictures.
    with pytest.raises(TypeError):
        list(
            generate(
                PictureRequest(
                    str(student), PROMPTS, size=(32, 32), options=SamplerOptions("int8")
                ),
                tmp_path,
            )
        )


def test_tiny_decoder_takes_the_vaes_place(student: Path, tmp_path: Path) -> None:
    whole = Decoder.load(student)
    torch.manual_seed(0)
    channels, stages = whole.vae.config.latent_channels, len(whole.vae.config.block_out_channels)

    def save(name: str, latent_channels: int, stages: int) -> str:
        sizes = {f"{part}_block_out_channels": (8,) * stages for part in ("encoder", "decoder")}
        blocks = {f"num_{part}_blocks": (1,) * stages for part in ("encoder", "decoder")}
        AutoencoderTiny(latent_channels=latent_channels, **sizes, **blocks).save_pretrained(
            tmp_path / name
        )
        return str(tmp_path / name)

    tiny = save("tiny", channels, stages)
    sampler = Sampler.load(str(student), tiny_decoder=tiny)
    images = sampler.generate(PROMPTS, NOISE)
    assert images.shape == (2, 3, 8 * whole.scale, 8 * whole.scale)
    alone = AutoencoderTiny.from_pretrained(tiny).decode(latents(sampler)).sample.clamp(-1, 1)
    torch.testing.assert_close(images, alone)
    for wrong in (save("channels", channels + 1, stages), save("scale", channels, stages + 1)):
        with pytest.raises(ModelError, match="reads latents of"):
            Sampler.load(str(student), tiny_decoder=wrong)
    with pytest.raises(ModelError, match="must hold an AutoencoderTiny"):
        Sampler.load(str(student), tiny_decoder=str(student))


def test_embedded_tiny_decoder_is_close_to_the_vae() -> None:
    whole = Sampler.load("zoo:emoji-student")
    tiny = Decoder.load_tiny("zoo:emoji-tiny-decoder", whole.decoder)
    found = whole.sample(
        ["a dog", "two cats on a red background"], seeded_noise([1, 2], (8, 16, 16))
    )
    error = (tiny.decode(found.latents) - whole.decoder.decode(found.latents)).square().mean()
    assert 10 * torch.log10(4 / error) > 30


def test_unknown_memory_is_named() -> None:
    asked = ["generate", "--model", "zoo:emoji-student", "--memory", "fp4", "x"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2
    told = " ".join(result.stderr.replace("│", " ").split())
    assert "'fp4' is not one of 'plain', 'int8', 'fp8', 'offload'" in told
