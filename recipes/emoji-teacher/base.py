"""Stages `base` and `teacher`: flow matching from scratch, then guidance distillation."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dataset import Scenes
from diffusers import ZImageTransformer2DModel
from timed_run import Average, TimedRun, warm_then_linear
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

from twostep.emoji.scenes import OBJECTS
from twostep.families.family import PromptBatch
from twostep.families.zimage import ZImage
from twostep.method.flow import add_noise, guide, velocity_target
from twostep.method.schedule import Schedule
from twostep.runtime.devices import plain_attention

BATCH = 48
TEXT_WIDTH = 128
# Layer whose hidden states must tell which object covers each image token (see `train_base`).
OCCUPANCY_LAYER = 3
OCCUPANCY_WEIGHT = 0.2
# Noise levels are drawn as the sampler visits them: at shift 3 a third of them lies above 0.85,
# where objects and their places are decided. Levels centred lower taught no relations.
SHIFT = 3.0
# Guidance distilled into the teacher, in diffusers' sense (0 is none).
GUIDANCE_SCALE = 2.0


def new_transformer(width: int, layers: int) -> ZImageTransformer2DModel:
    model = ZImageTransformer2DModel(
        dim=width,
        n_layers=layers,
        n_refiner_layers=1,
        n_heads=width // 32,
        n_kv_heads=width // 32,
        cap_feat_dim=TEXT_WIDTH,
        in_channels=8,
        axes_dims=[8, 12, 12],
        axes_lens=[512, 64, 64],
    )
    for block in [*model.layers, *model.noise_refiner]:
        nn.init.normal_(block.adaLN_modulation[0].weight, std=0.02)
        nn.init.zeros_(block.adaLN_modulation[0].bias)
    nn.init.normal_(model.x_pad_token, std=0.02)
    nn.init.normal_(model.cap_pad_token, std=0.02)
    nn.init.zeros_(model.all_final_layer["2-1"].linear.weight)
    nn.init.zeros_(model.all_final_layer["2-1"].linear.bias)
    return model


def new_text_encoder(vocabulary: int) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        use_cache=False,
    )
    return Qwen3Model(config)


class TextEncoder:
    """Captions to a `PromptBatch`, as `ZImagePipeline.encode_prompt` does, with gradients."""

    def __init__(self, tokenizer: Any, model: Qwen3Model, length: int = 32) -> None:
        self.tokenizer, self.model, self.length = tokenizer, model, length

    def __call__(self, captions: list[str]) -> PromptBatch:
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True
            )
            for caption in captions
        ]
        # Every caption of this world fits one bucket of 32 tokens: one shape, one compiled graph.
        batch = self.tokenizer(
            texts, padding="max_length", max_length=self.length, return_tensors="pt"
        ).to(self.model.device)
        if batch.input_ids.shape[1] != self.length:
            raise ValueError(f"a caption has more than {self.length} tokens: {max(texts, key=len)}")
        hidden = self.model(**batch, output_hidden_states=True).hidden_states[-2]
        mask = batch.attention_mask
        return PromptBatch(hidden * mask[..., None], mask.sum(1), one_bucket=True)


def muon_and_adamw(modules: list[nn.Module]) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrices, rest = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            in_block = "layers." in name or "refiner." in name
            is_matrix = parameter.ndim == 2 and in_block and "adaLN" not in name
            (matrices if is_matrix else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _attention(device: str) -> AbstractContextManager[Any]:
    # On CPU the backward of flash attention took a third of a step at 96 tokens; plain attention,
    # fused by the compiler, made the step 1.37 times as fast (2026-11-23, 2 cores, batch 48).
    if device != "cpu":
        return nullcontext()
    return plain_attention()


def _set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * factor


def _step(optimizers: list[torch.optim.Optimizer], parameters: list[nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def train_base(
    work: Path, minutes: float, device: str, width: int, layers: int, compiled: bool
) -> None:
    """Writes `work/base` (transformer) and `work/text_encoder`, trained together.

    Besides flow matching, a linear head on a middle layer predicts which object covers each image
    token. The renderer knows the answer for free; the head is thrown away afterwards.
    """
    torch.manual_seed(0)
    scenes = Scenes(work)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    field = ZImage().as_velocity(new_transformer(width, layers)).to(device)
    text = TextEncoder(tokenizer, new_text_encoder(len(tokenizer)).to(device))
    occupancy_head = nn.Linear(width, len(OBJECTS) + 1).to(device)
    modules: list[nn.Module] = [field, text.model, occupancy_head]
    parameters = [p for module in modules for p in module.parameters()]
    optimizers = muon_and_adamw(modules)
    average = Average(parameters)
    forward = torch.compile(field) if compiled else field
    run = TimedRun(
        work / "base.pt",
        minutes,
        {
            "transformer": field,
            "text_encoder": text.model,
            "head": occupancy_head,
            "muon": optimizers[0],
            "adamw": optimizers[1],
            "average": average,
        },
    )
    losses: np.ndarray | None = None
    for progress in run:
        rng = np.random.default_rng((3, run.steps))
        generator = torch.Generator().manual_seed(run.steps)
        _set_learning_rate(optimizers, warm_then_linear(progress, run.steps, 100, hold=0.7))
        picks = scenes.draw(BATCH, rng)
        clean = scenes.latents[picks].float().to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        sigma = Schedule.of(SHIFT).draw(BATCH, generator).to(device)
        with torch.autocast(device, torch.bfloat16), _attention(device):
            prompts = text(scenes.captions(picks, rng))
            out = forward(add_noise(clean, noise, sigma), sigma, prompts, (OCCUPANCY_LAYER,))
            logits = occupancy_head(out.hidden[0])
        flow_loss = (out.velocity - velocity_target(clean, noise)).square().mean()
        target = scenes.occupancy[picks].flatten().long().to(device)
        occupancy_loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), target)
        with _attention(device):
            (flow_loss + OCCUPANCY_WEIGHT * occupancy_loss).backward()
        _step(optimizers, parameters)
        average.update()
        if run.steps % 10 == 0:
            now = np.array([flow_loss.item(), occupancy_loss.item()])
            losses = now if losses is None else 0.95 * losses + 0.05 * now
            run.values = {"flow": float(losses[0]), "occupancy": float(losses[1])}

    average.copy_to_parameters()
    field.save_pretrained(work / "base")
    text.model.save_pretrained(work / "text_encoder")


def distil_guidance(work: Path, minutes: float, device: str, compiled: bool) -> None:
    """Writes `work/teacher`: the base with guidance in one forward, as Z-Image Turbo has it.

    Regresses the guided velocity of the frozen base (arXiv 2210.03142, stage one).
    """
    torch.manual_seed(1)
    scenes = Scenes(work)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    text = TextEncoder(
        tokenizer, Qwen3Model.from_pretrained(work / "text_encoder").float().to(device).eval()
    )
    base = ZImageTransformer2DModel.from_pretrained(work / "base", torch_dtype=torch.float32)
    student = ZImage().as_velocity(copy.deepcopy(base).to(device))
    frozen = ZImage().as_velocity(base.to(device)).requires_grad_(False)
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.98), weight_decay=0.0)
    average = Average(parameters)
    forward = torch.compile(student) if compiled else student
    forward_frozen = torch.compile(frozen) if compiled else frozen
    run = TimedRun(
        work / "teacher.pt",
        minutes,
        {"student": student, "optimizer": optimizer, "average": average},
    )
    smoothed: float | None = None
    for progress in run:
        rng = np.random.default_rng((4, run.steps))
        generator = torch.Generator().manual_seed(10_000_000 + run.steps)
        _set_learning_rate([optimizer], warm_then_linear(progress, run.steps, 50))
        picks = scenes.draw(BATCH, rng)
        clean = scenes.latents[picks].float().to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        sigma = Schedule.of(SHIFT).draw(BATCH, generator).clamp_min(0.02).to(device)
        noisy = add_noise(clean, noise, sigma)
        with torch.autocast(device, torch.bfloat16), _attention(device):
            with torch.no_grad():
                prompts = text(scenes.captions(picks, rng))
                empty = text([""]).expand(BATCH)
                target = guide(
                    forward_frozen(noisy, sigma, prompts).velocity,
                    forward_frozen(noisy, sigma, empty).velocity,
                    GUIDANCE_SCALE,
                )
            velocity: Tensor = forward(noisy, sigma, prompts).velocity
        loss = (velocity - target).square().mean()
        with _attention(device):
            loss.backward()
        _step([optimizer], parameters)
        average.update()
        now = loss.item()
        smoothed = now if smoothed is None else 0.98 * smoothed + 0.02 * now
        run.values = {"loss": smoothed}

    average.copy_to_parameters()
    student.transformer.save_pretrained(work / "teacher")
