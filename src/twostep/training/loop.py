"""The training loop: turns, saving, validation, stopping."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twostep.backbones.model import Decoder
from twostep.backbones.zimage import PromptBatch
from twostep.config import Recipe, RecipeError
from twostep.devices import pick_device
from twostep.errors import UserError
from twostep.files import write_atomically
from twostep.pictures import image_grid
from twostep.pipeline import save_student
from twostep.provenance import git_commit, machine
from twostep.reals import ExternalReals
from twostep.roles import build_roles
from twostep.rollout import TwoStep
from twostep.teacher_cache import Plan, TeacherCache
from twostep.training.draws import Draws
from twostep.training.ema import Ema
from twostep.training.monitor import Monitor
from twostep.training.progress import TurnProgress
from twostep.training.state import Progress, TrainingState, list_checkpoints
from twostep.training.turns import Batch, CriticTurn, StudentTurn
from twostep.training.validation import Validation, Validator

# What may change between a run and its continuation: how long and how often, not what is learnt.
_MAY_CHANGE = {
    "turns", "minutes", "log_every", "sample_every", "sample_prompts", "validate_every",
    "save_every", "keep_checkpoints", "tensorboard", "max_non_finite", "compile", "device",
    "checkpoint_activations",
}  # fmt: skip


class TrainingStopped(UserError):
    """Training cannot go on; the message says why."""

    exit_code = 1


class Interrupted(UserError):
    """SIGTERM or Ctrl-C; the state has been saved."""

    exit_code = 130


class Trainer:
    """One distillation, from a finished teacher cache to a student folder.

    Raises:
        RecipeError, ModelError, CacheError: for what cannot work, before training begins.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, settings = recipe, recipe.training
        self.device = pick_device(settings.device)
        self.plan = Plan.of(recipe)
        self.folder = recipe.run_folder
        _check_same_recipe(recipe, self.folder)
        self.cache = TeacherCache(self.plan)
        self.shift = self.plan.shift
        self.schedule = TwoStep(self.plan.step2_sigma, recipe.student.transition)
        self.roles = build_roles(recipe, self.device)
        self.student_turn = StudentTurn(recipe, self.roles, self.schedule, self.shift)
        self.critic_turn = CriticTurn(recipe, self.roles, self.student_turn)
        self.decoder = Decoder.load(self.plan.teacher)
        self.reals = None
        if recipe.data.reals != "teacher":
            size = (recipe.data.height, recipe.data.width)
            self.reals = ExternalReals(Path(recipe.data.reals), self.plan.teacher, size)
        wants_trajectory = recipe.losses.warmup_step1_target == "trajectory"
        if wants_trajectory and self.cache.read([0]).trajectory is None:
            raise RecipeError(
                "losses.warmup_step1_target: trajectory needs step2_sigma on the teacher's "
                f"grid {self.plan.sigmas}, got {self.plan.step2_sigma}"
            )
        self.state = TrainingState(
            self.roles.trained_modules(),
            self._optimizers(),
            Ema(self.roles.student_parameters(), settings.ema_decay),
            Progress(),
        )
        checkpoints = list_checkpoints(self.folder / "checkpoints")
        if checkpoints:
            self.state.load(checkpoints[-1])
        self.empty = PromptBatch.collate([self.cache.empty_embeds], self.device)

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        recipe = self.recipe

        def adamw(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
            return torch.optim.AdamW(
                parameters, lr=rate, betas=recipe.training.betas,
                weight_decay=recipe.training.weight_decay,
            )  # fmt: skip

        return {
            "student": adamw(self.roles.student_parameters(), recipe.training.learning_rate),
            "fake": adamw(self.roles.fake_parameters(), recipe.fake.learning_rate),
            "critic": adamw(list(self.roles.critic.parameters()), recipe.critic.learning_rate),
        }

    @property
    def progress(self) -> Progress:
        return self.state.progress

    def _share_done(self) -> float:
        """How much of the run is behind us, by turns or by time, whichever is further; 0 to 1."""
        settings = self.recipe.training
        share = self.progress.turn / settings.turns
        if settings.minutes is not None:
            share = max(share, self.progress.seconds / (60 * settings.minutes))
        return min(1.0, share)

    def train(self) -> Path:
        """Trains to the end and returns the student's folder.

        Raises:
            Interrupted: after SIGTERM or Ctrl-C, once the state is saved.
            TrainingStopped: too many turns in a row were not finite.
        """
        settings, progress = self.recipe.training, self.progress
        self._describe_run()
        with self._autocast():
            validator = Validator(
                self.recipe, self.roles, self.cache, self.schedule, self.shift, self.device
            )
        monitor = Monitor(self.folder, settings.tensorboard, progress.turn)
        with _catch_signals() as caught, TurnProgress(settings.turns, settings.minutes) as bar:
            while self._share_done() < 1:
                started = time.monotonic()
                values = self._one_turn()
                progress.seconds += time.monotonic() - started
                turn, last = progress.turn, self._share_done() >= 1
                started = time.monotonic()
                if turn % settings.validate_every == 0 or last:
                    values |= self._validate(
                        validator, draw=last or turn % settings.sample_every == 0
                    )
                progress.seconds += time.monotonic() - started
                if values and (turn % settings.log_every == 0 or "validation/diversity" in values):
                    for alarm in monitor.record(turn, values):
                        bar.print(f"[yellow]alarm[/] {alarm}")
                    bar.show(turn, progress.seconds, values)
                if turn % settings.save_every == 0 or last or caught:
                    self.state.save(self.folder / "checkpoints", settings.keep_checkpoints)
                if caught:
                    monitor.close()
                    raise Interrupted(
                        f"stopped by {caught[0]} at turn {turn}; state saved. Run it again to go on"
                    )
        monitor.close()
        return self.export()

    def _one_turn(self) -> dict[str, float]:
        """A student turn, after the critic turns that go before it; what to log of it."""
        settings, progress = self.recipe.training, self.progress
        warming = progress.turn < self.recipe.losses.warmup_turns
        self._set_rates()
        logged: dict[str, Tensor] = {}
        if not warming:
            first = progress.critic_turn == 0
            count = settings.critic_turns + first * settings.critic_warmup_turns
            for _ in range(count):
                logged |= self._critic_step()
        logged |= self._student_step(warming)
        progress.turn += 1
        if progress.turn % settings.log_every and progress.turn < settings.turns:
            return {}  # reading a value waits for the device
        return {key: float(value) for key, value in logged.items()}

    def _critic_step(self) -> dict[str, Tensor]:
        number = self.progress.critic_turn
        self.progress.critic_turn += 1
        # Other data than the student turns read, in an order of its own.
        batch = self._batch(number, self.recipe.training.seed + 2)
        with self._autocast():
            draws = Draws(self.recipe.training.seed, number, "critic", self.device)
            turn = self.critic_turn(batch, draws)
        if not turn.terms:
            return {}
        for name in ("fake", "critic"):
            self.state.optimizers[name].zero_grad()
        turn.loss.backward()
        trained = {
            "fake": self.roles.fake_parameters(),
            "critic": list(self.roles.critic.parameters()),
        }
        norms = {name: self._clip(parameters) for name, parameters in trained.items()}
        if self._accept(turn.loss, *norms.values()):
            for name in trained:
                self.state.optimizers[name].step()
        return turn.terms

    def _student_step(self, warming: bool) -> dict[str, Tensor]:
        number = self.progress.turn
        batch = self._batch(number, self.recipe.training.seed)
        optimizer = self.state.optimizers["student"]
        with self._autocast():
            draws = Draws(self.recipe.training.seed, number, "student", self.device)
            turn = (self.student_turn.warmup if warming else self.student_turn)(batch, draws)
        optimizer.zero_grad()
        turn.loss.backward()
        norms = {"gradient_norm/first": _norm(self.roles.first.parameters())}
        if not self.roles.shared:
            norms["gradient_norm/second"] = _norm(self.roles.second.parameters())
        total = self._clip(self.roles.student_parameters())
        if self._accept(turn.loss, total):
            optimizer.step()
            self.state.ema.update()
        return {"loss": turn.loss.detach(), **turn.terms, **norms}

    def _accept(self, *values: Tensor) -> bool:
        """Whether a step may be taken; counts the refused ones and gives up after too many."""
        progress = self.progress
        if bool(torch.stack([v.detach() for v in values]).isfinite().all()):
            progress.skipped_in_a_row = 0
            return True
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row > self.recipe.training.max_non_finite:
            raise TrainingStopped(
                f"turn {progress.turn}: loss or gradient was not finite "
                f"{progress.skipped_in_a_row} times in a row (training.max_non_finite is "
                f"{self.recipe.training.max_non_finite}). The last checkpoint is sound; begin a "
                "new run with a lower training.learning_rate"
            )
        return False

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, self.recipe.training.max_gradient_norm)

    def _set_rates(self) -> None:
        settings, share = self.recipe.training, self._share_done()
        factor = 1.0
        if settings.learning_rate_decay:
            factor = min(1.0, 0.1 + 0.9 * (1 - share) / settings.learning_rate_decay)
        rates = {
            "student": self._student_rate(),
            "fake": self.recipe.fake.learning_rate,
            "critic": self.recipe.critic.learning_rate,
        }
        for name, optimizer in self.state.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name] * factor

    def _student_rate(self) -> float:
        """Before the decay at the end of the run."""
        settings, turns = self.recipe.training, self.recipe.losses.warmup_turns
        left = max(0.0, 1 - self.progress.turn / turns) if turns else 0.0
        first = settings.warmup_learning_rate or settings.learning_rate
        return settings.learning_rate + left * (first - settings.learning_rate)

    def _batch(self, number: int, seed: int) -> Batch:
        size = self.recipe.training.batch_size
        samples = self.cache.read(self.cache.batch_ids(number, size, seed))
        latents = samples.latents.to(self.device)
        prompts = PromptBatch.collate(samples.embeds, self.device)
        reals, real_prompts = latents, prompts
        if self.reals is not None:
            reals, embeds = self.reals.draw(number, size)
            reals = reals.to(self.device)
            if embeds is not None:
                real_prompts = PromptBatch.collate(embeds, self.device)
        trajectory = samples.trajectory
        return Batch(
            noise=samples.noise.to(self.device),
            latents=latents,
            trajectory=None if trajectory is None else trajectory.to(self.device),
            reals=reals,
            real_prompts=real_prompts,
            prompts=prompts,
            empty=self.empty.expand(size),
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.recipe.training.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _validate(self, validator: Validator, draw: bool) -> dict[str, float]:
        with self.state.ema.applied(), self._autocast():
            seen = validator.measure()
        score, progress = seen.metrics["kernel_distance"], self.progress
        if progress.best_score is None or score < progress.best_score:
            progress.best_score, progress.best_turn = score, progress.turn
            best = {str(i): v.cpu().clone() for i, v in enumerate(self.state.ema.values)}
            write_atomically(self.folder / "best.safetensors", lambda p: save_file(best, p))
        if draw:
            self._draw(validator, seen)
        return {f"validation/{k}": v for k, v in seen.metrics.items()}

    def _draw(self, validator: Validator, seen: Validation) -> None:
        k = self.recipe.training.sample_prompts
        latents = {
            "teacher": validator.teacher_latents,
            "naive": validator.naive_latents,
            "preview": seen.rollout.clean1,
            "student": seen.rollout.clean2,
        }
        panels = {name: self.decoder.decode(x[:k]) for name, x in latents.items()}
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        image_grid(panels).save(folder / f"turn-{self.progress.turn:07d}.png")

    def export(self) -> Path:
        """Writes the best student as a diffusers folder and returns it."""
        best = load_file(self.folder / "best.safetensors")
        with torch.no_grad():
            for index, value in enumerate(self.state.ema.values):
                value.copy_(best[str(index)])
        folder = self.folder / "student"
        with self.state.ema.applied():
            save_student(
                self.plan.teacher,
                self.roles.first.transformer(),
                self.roles.second.transformer(),
                self.schedule,
                folder,
            )
        return folder

    def _describe_run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        packages = ("twostep", "torch", "diffusers", "transformers", "safetensors")
        description = {
            "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
            "commit": git_commit(),
            "device": str(self.device),
            "machine": machine(),
        }
        recipe = self.recipe.to_yaml()
        write_atomically(self.folder / "recipe.yaml", lambda p: p.write_text(recipe, "utf-8"))
        text = json.dumps(description, indent=1)
        write_atomically(self.folder / "run.json", lambda p: p.write_text(text))


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return nn.utils.get_total_norm(gradients)


def _check_same_recipe(recipe: Recipe, folder: Path) -> None:
    """Refuses to go on with a run that another recipe began."""
    path = folder / "recipe.yaml"
    if not list_checkpoints(folder / "checkpoints") or not path.exists():
        return
    begun, now = (_flatten(r.model_dump(mode="json")) for r in (Recipe.load(path), recipe))
    differing = [
        f"{key} was {begun.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(begun.keys() | now.keys())
        if begun.get(key) != now.get(key) and key.removeprefix("training.") not in _MAY_CHANGE
    ]
    if differing:
        raise RecipeError(
            f"{folder} holds a run of another recipe ({'; '.join(differing)}). "
            "Choose another name or output, or remove the folder"
        )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@contextmanager
def _catch_signals() -> Iterator[list[str]]:
    """Collects SIGTERM and SIGINT instead of dying of them; a second one kills."""
    caught: list[str] = []
    previous = {}

    def remember(number: int, _: Any) -> None:
        if caught:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        caught.append(signal.Signals(number).name)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, remember)
    except ValueError:  # not the main thread: the caller handles signals
        previous.clear()
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
