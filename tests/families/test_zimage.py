"""The batched forward against diffusers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from peft import LoraConfig

from tiny import TEXT_WIDTH, as_velocity, random_transformer
from twostep.errors import ModelError
from twostep.families import zimage_network
from twostep.families.family import LatentSpace, PromptBatch
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.models.codec import Decoder
from twostep.models.folder import ModelFolder
from twostep.models.prompt_encoder import PromptEncoder
from twostep.runtime.memory_meter import live_bytes


def diffusers_velocity(transformer, latents, sigma, embeds):
    out = transformer([x[:, None] for x in latents], 1 - sigma, embeds, return_dict=False)[0]
    return -torch.stack(out)[:, :, 0]


def inputs(lengths: list[int], height: int, width: int):
    torch.manual_seed(len(lengths) + height)
    embeds = [torch.randn(n, TEXT_WIDTH) for n in lengths]
    return torch.randn(len(lengths), 8, height, width), torch.rand(len(lengths)), embeds


@pytest.mark.parametrize(
    ("lengths", "height", "width"),
    [
        ([7, 32, 1], 16, 16),  # one bucket, no image padding
        ([5, 40, 64, 70], 12, 20),  # three buckets, not square
        ([33, 3], 6, 10),  # image tokens padded
        ([50], 4, 4),
    ],
)
@torch.no_grad()
def test_velocity_equals_diffusers(lengths: list[int], height: int, width: int) -> None:
    transformer = random_transformer()
    latents, sigma, embeds = inputs(lengths, height, width)
    theirs = diffusers_velocity(transformer, latents, sigma, embeds)
    ours = as_velocity(transformer)(latents, sigma, PromptBatch.collate(embeds)).velocity
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_batches_one_after_another_are_the_batches_alone() -> None:
    field = as_velocity(random_transformer())
    latents, sigma, embeds = inputs([7, 9, 40], 8, 8)
    short, long = PromptBatch.collate(embeds[:2]), PromptBatch.collate(embeds[2:])
    joined = PromptBatch.cat([short, long])
    assert not joined.one_bucket
    assert PromptBatch.cat([short, short]).one_bucket
    # The mask chooses another attention kernel, whose rounding random weights amplify.
    together = field(latents, sigma, joined).velocity
    torch.testing.assert_close(
        together[:2], field(latents[:2], sigma[:2], short).velocity, atol=2e-4, rtol=0
    )
    torch.testing.assert_close(
        together[2:], field(latents[2:], sigma[2:], long).velocity, atol=2e-4, rtol=0
    )


@torch.no_grad()
def test_hidden_states_are_the_image_tokens_of_the_layers_asked_for() -> None:
    transformer = random_transformer()
    seen = {}
    for index, layer in enumerate(transformer.layers):
        layer.register_forward_hook(lambda _, __, out, index=index: seen.update({index: out}))
    latents, sigma, embeds = inputs([7, 9], 12, 20)
    field = as_velocity(transformer)
    hidden = field(latents, sigma, PromptBatch.collate(embeds), taps=(0, 2)).hidden
    assert [h.shape for h in hidden] == [(2, 60, 64)] * 2
    assert torch.equal(hidden[0], seen[0][:, :60])
    assert torch.equal(hidden[1], seen[2][:, :60])


def test_gradients_are_the_same_with_activation_checkpointing() -> None:
    latents, sigma, embeds = inputs([7, 40], 8, 8)
    gradients, held = [], []
    for share in (None, 0.5, 1.0):
        field = as_velocity(random_transformer())
        if share is not None:
            field.recompute_layers(share)
        with live_bytes() as live:
            loss = field(latents, sigma, PromptBatch.collate(embeds)).velocity.square().mean()
        held.append(live.now)
        loss.backward()
        gradients.append([p.grad for p in field.parameters() if p.grad is not None])
    assert len(gradients[0]) > 40
    for found in gradients[1:]:
        for a, b in zip(gradients[0], found, strict=True):
            torch.testing.assert_close(a, b)
    assert field.kept == frozenset()
    # Two of three layers are kept at a half: int(1 * .5) == int(0), int(3 * .5) == int(2 * .5).
    assert held[0] > 1.15 * held[1] > 1.3 * held[2]


def test_replaced_prompts_are_the_others_rows() -> None:
    _, _, embeds = inputs([7, 40, 3], 8, 8)
    batch, other = PromptBatch.collate(embeds), PromptBatch.collate(embeds[2:]).expand(3)
    found = batch.replace(torch.tensor([True, False, False]), other)
    expected = PromptBatch.collate([embeds[2], embeds[1], embeds[2]])
    assert torch.equal(found.embeds, expected.embeds)
    assert found.lengths.tolist() == [3, 40, 3]
    assert not found.one_bucket


@torch.no_grad()
def test_lora_adapters_of_the_diffusers_model_act() -> None:
    transformer = random_transformer()
    latents, sigma, embeds = inputs([7, 9], 8, 8)
    field, prompts = as_velocity(transformer), PromptBatch.collate(embeds)
    before = field(latents, sigma, prompts).velocity
    transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    after = field(latents, sigma, prompts).velocity
    stock = random_transformer()
    stock.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"]))
    stock.load_state_dict(transformer.state_dict())
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(
        after, diffusers_velocity(stock, latents, sigma, embeds), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_attention_backend_of_the_diffusers_model_is_used() -> None:
    transformer = random_transformer()
    latents, sigma, embeds = inputs([7, 9], 8, 8)
    field, prompts = as_velocity(transformer), PromptBatch.collate(embeds)
    expected = field(latents, sigma, prompts).velocity
    transformer.set_attention_backend("_native_math")
    try:
        torch.testing.assert_close(
            field(latents, sigma, prompts).velocity, expected, atol=1e-4, rtol=1e-4
        )
        assert transformer.layers[0].attention.processor._attention_backend == "_native_math"
    finally:
        transformer.reset_attention_backend()


def test_forward_compiles_to_one_graph() -> None:
    field = as_velocity(random_transformer())
    latents, sigma, embeds = inputs([7, 9], 8, 8)
    prompts = PromptBatch.collate(embeds)
    compiled = torch.compile(field, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = field(latents, sigma, prompts).velocity
        torch.testing.assert_close(
            compiled(latents, sigma, prompts).velocity, expected, atol=1e-5, rtol=1e-5
        )
    explained = torch._dynamo.explain(field)(latents, sigma, prompts)
    assert explained.graph_count == 1
    assert explained.graph_break_count == 0


def test_prompts_are_encoded_as_the_pipeline_does(tiny_folder: Path) -> None:
    prompts = ["a dog on a red background", "三只猫，蓝色背景", "a dog on a red background"]
    asked = list(prompts)
    encoder = PromptEncoder.load(tiny_folder)
    ours = encoder.encode(prompts)
    assert prompts == asked
    pipe = ZImagePipeline.from_pretrained(tiny_folder)
    theirs, _ = pipe.encode_prompt(list(asked), do_classifier_free_guidance=False)
    assert [len(e) for e in ours] == [len(e) for e in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_an_encoded_prompt_is_remembered(tiny_folder: Path) -> None:
    encoder = PromptEncoder.load(tiny_folder)
    calls = []
    encoder.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    first = encoder.encode(["a dog", "a cat"])
    again = encoder.encode(["a cat", "a dog"])
    assert len(calls) == 1
    assert torch.equal(first[0], again[1])
    encoder.forget()
    encoder.encode(["a dog"])
    assert len(calls) == 2


@pytest.fixture
def pipelines_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds time as diffusers does, by way of timesteps of 0 to 1000.

    The time embedding multiplies the last bit's difference to our `1 - sigma` by 1000, and a random
    network magnifies it to 4e-4 over eight steps; with the same bits the images are the same.
    """
    monkeypatch.setattr(zimage_network, "model_time", lambda sigma: (1000 - sigma * 1000) / 1000)


@pytest.mark.parametrize("steps", [2, 8])
@pytest.mark.usefixtures("pipelines_time")
def test_sampler_equals_the_stock_pipeline(tiny_folder: Path, steps: int) -> None:
    sampler = Sampler.load(str(tiny_folder))
    prompts = ["a dog on a red background", "两只猫"]
    noise = seeded_noise([3, 4], sampler.noise_shape(32, 48))
    ours = sampler.sample(prompts, noise, steps)
    pipe = ZImagePipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"height": 32, "width": 48, "guidance_scale": 0.0, "latents": noise}
    # The same embeddings: a random network magnifies the text encoder's rounding.
    arguments["prompt_embeds"] = sampler.encoder.encode(prompts)
    theirs = pipe(num_inference_steps=steps, output_type="latent", **arguments)
    assert theirs.images.std() > 0.5
    torch.testing.assert_close(ours.latents, theirs.images, atol=5e-5, rtol=1e-4)
    assert ours.preview is None


@pytest.mark.usefixtures("pipelines_time")
def test_sampler_guidance_equals_the_stock_pipeline(tiny_folder: Path) -> None:
    sampler = Sampler.load(str(tiny_folder))
    noise = seeded_noise([3], sampler.noise_shape(32, 32))
    ours = sampler.sample(["a dog"], noise, 4, guidance_scale=2.0).latents
    pipe = ZImagePipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt_embeds=sampler.encoder.encode(["a dog"]),
        negative_prompt_embeds=sampler.encoder.encode([""]),
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=2.0,
        latents=noise,
        output_type="latent",
    ).images
    # diffusers runs both halves as one batch; rounding, tripled by guidance, is 4e-5 here.
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_decoder_scales_and_shifts_as_the_pipeline_does(tiny_folder: Path) -> None:
    decoder = Decoder.load(tiny_folder)
    latents = torch.randn(2, 8, 8, 8)
    pipe = ZImagePipeline.from_pretrained(tiny_folder)
    unscaled = latents / 0.8 + 0.1
    expected = pipe.vae.decode(unscaled).sample.clamp(-1, 1)
    torch.testing.assert_close(decoder.decode(latents), expected)
    images = decoder.decode(latents)
    code = pipe.vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(decoder.encode(images), (code - 0.1) * 0.8)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        PromptBatch.collate([torch.zeros(0, 4)])
    space = LatentSpace(8, 4, 2, positions=(32, 16))
    assert space.shape(256, 128) == (8, 64, 32)
    with pytest.raises(ValueError, match="width must be a positive multiple of 8, got 30"):
        space.shape(32, 30)
    with pytest.raises(ValueError, match="width must be at most 128 for this model, got 136"):
        space.shape(256, 136)
    with pytest.raises(ModelError, match="no model folder at"):
        ModelFolder.open("./nowhere")
    with pytest.raises(ModelError, match="zoo:emoji-teacher"):
        ModelFolder.open("zoo:nonsense")


def test_a_folder_with_missing_parts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ModelError, match="missing scheduler, text_encoder"):
        ModelFolder.open(str(tmp_path))
