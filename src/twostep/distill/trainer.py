"""The training loop: turns, saving, validation, stopping."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twostep.data.cache.build import TeacherCache
from twostep.data.cache.spec import Plan
from twostep.distill.batches import Batches
from twostep.distill.checkpoint import Progress, TrainingState, list_checkpoints
from twostep.distill.ema import Ema
from twostep.distill.monitor import Monitor
from twostep.distill.objectives.draws import Draws
from twostep.distill.objectives.roles import build_roles
from twostep.distill.objectives.turns import Batch, CriticTurn, ScoreTurn, StudentTurn, Turn
from twostep.distill.optimizers import build_optimizers
from twostep.distill.progress import TurnProgress
from twostep.distill.sharding import Sharder, whole_transformer
from twostep.distill.tensor_files import load_tensors, save_folder
from twostep.distill.validation import Validation, Validator
from twostep.errors import RecipeError, UserError
from twostep.inference.pipeline import save_student
from twostep.method.rollout import TwoStep
from twostep.models.folder import (
    Decoder,
)
from twostep.recipe.schema import (
    Recipe,
)
from twostep.runtime.devices import pick_device, plain_attention
from twostep.runtime.distributed import World, whole
from twostep.runtime.files import write_atomically
from twostep.runtime.images import image_grid
from twostep.runtime.processes import local_device
from twostep.runtime.provenance import git_commit, machine

# What may change between a run and its continuation: how long and how often, not what is learnt.
_MAY_CHANGE = {
    "turns", "minutes", "log_every", "sample_every", "sample_prompts", "validate_every",
    "save_every", "keep_checkpoints", "tensorboard", "max_non_finite", "compile", "device",
    "checkpoint_activations", "checkpoint_share", "micro_batch", "async_saves",
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
        self.device = local_device(pick_device(settings.device))
        self.world = World(self.device)
        self.rows = self.world.rows(settings.batch_size, settings.micro_batch)
        self.plan = Plan.of(recipe)
        self.folder = recipe.run_folder
        _check_same_recipe(recipe, self.folder)
        self.cache = TeacherCache(self.plan)
        self.shift = self.plan.shift
        self.schedule = TwoStep(self.plan.step2_sigma, recipe.student.transition)
        sharded = recipe.distributed.sharding == "shard" and self.world.size > 1
        load = Sharder(recipe, self.world).load if sharded else None
        self.roles = build_roles(recipe, self.device, load)
        self.student_turn = StudentTurn(recipe, self.roles, self.schedule, self.shift)
        self.critic_turn = CriticTurn(recipe, self.roles, self.student_turn)
        self.score_turn = ScoreTurn(recipe, self.roles, self.shift)
        self.decoder = Decoder.load(self.plan.teacher)
        self.batches = Batches(recipe, self.plan, self.cache, self.device)
        wants_trajectory = recipe.losses.warmup_step1_target == "trajectory"
        if wants_trajectory and self.cache.read([0]).trajectory is None:
            raise RecipeError(
                "losses.warmup_step1_target: trajectory needs step2_sigma on the teacher's "
                f"grid {self.plan.sigmas}, got {self.plan.step2_sigma}"
            )
        self.state = TrainingState(
            self.roles.trained_modules(),
            build_optimizers(recipe, self.roles),
            Ema(self.roles.student_parameters(), settings.ema_decay),
            Progress(),
        )
        checkpoints = list_checkpoints(self.folder / "checkpoints")
        if checkpoints:
            self.state.load(checkpoints[-1])

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
        """Trains to the end and returns the student's folder. Every process must call it.

        Raises:
            Interrupted: after SIGTERM or Ctrl-C, once the state is saved.
            TrainingStopped: too many turns in a row were not finite.
        """
        try:
            self._run()
            return self.export()
        finally:
            self.world.leave()

    def _run(self) -> None:
        settings, progress, is_first = self.recipe.training, self.progress, self.world.is_first
        if is_first:
            self._describe_run()
        with self._computing():
            validator = Validator(
                self.recipe, self.roles, self.cache, self.schedule, self.shift, self.device,
                self.world,
            )  # fmt: skip
        records: AbstractContextManager[Monitor | None] = nullcontext()
        if is_first:
            records = closing(Monitor(self.folder, settings.tensorboard, self._number))
        fit_turns = self.recipe.score.fit_turns
        progress_bar = TurnProgress(
            settings.turns, settings.minutes, fit_turns, hidden=not is_first
        )
        with records as monitor, _catch_signals() as caught, progress_bar as bar:
            while self._share_done() < 1:
                started = time.monotonic()
                fitting = progress.score_turn < fit_turns
                values = self._one_score_turn() if fitting else self._one_turn()
                progress.seconds, signalled = self.world.largest(
                    [progress.seconds + time.monotonic() - started, len(caught)]
                )
                self.state.settle(self.world)
                turn, last = self._number, self._share_done() >= 1
                if (turn % settings.validate_every == 0 and not fitting) or last:
                    started = time.monotonic()
                    values |= self._validate(
                        validator, draw=last or turn % settings.sample_every == 0
                    )
                    spent = progress.seconds + time.monotonic() - started
                    (progress.seconds,) = self.world.largest([spent])
                worth_a_line = turn % settings.log_every == 0 or "validation/diversity" in values
                if monitor is not None and values and worth_a_line:
                    for alarm in monitor.record(turn, values):
                        bar.print(f"[yellow]alarm[/] {alarm}")
                    bar.show(turn, progress.seconds, values)
                if turn % settings.save_every == 0 or last or signalled:
                    folder = self.folder / "checkpoints"
                    beside = settings.async_saves and not (last or signalled)
                    self.state.save(folder, settings.keep_checkpoints, self.world, beside)
                if signalled:
                    raise Interrupted(
                        f"stopped by {caught[0] if caught else 'another process'} at turn {turn}; "
                        "state saved. Run it again to go on"
                    )

    @property
    def _number(self) -> int:
        """The student's turns so far; below 0 while the score is fitted."""
        progress = self.progress
        return progress.turn + progress.score_turn - self.recipe.score.fit_turns

    def _one_score_turn(self) -> dict[str, float]:
        """A turn of fitting the score; what to log of it."""
        progress, settings = self.progress, self.recipe.score
        optimizer, parameters = self.state.optimizers["score"], self.roles.score.parameters()
        left = 1 - progress.score_turn / settings.fit_turns
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, 2 * left)
        optimizer.zero_grad()
        seed = self.recipe.training.seed + 3
        terms = self._gradients(self.score_turn, progress.score_turn, seed, "score")
        self.world.average_gradients(parameters)
        if self._accept(terms["loss"], self._clip(parameters)):
            optimizer.step()
        progress.score_turn += 1
        if progress.score_turn == settings.fit_turns:
            optimizer.zero_grad()
            optimizer.state.clear()  # done with: its memory is the student's now
        if self._number % self.recipe.training.log_every:
            return {}
        return {key: float(value) for key, value in terms.items() if key != "loss"}

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
        trained = {
            "fake": self.roles.fake_parameters(),
            "critic": list(self.roles.critic.parameters()),
        }
        for name in trained:
            self.state.optimizers[name].zero_grad()
        # Other data than the student turns read, in an order of its own.
        seed = self.recipe.training.seed + 2
        terms = self._gradients(self.critic_turn, number, seed, "critic")
        if not terms:
            return {}
        for parameters in trained.values():
            self.world.average_gradients(parameters)
        norms = {name: self._clip(parameters) for name, parameters in trained.items()}
        if self._accept(terms.pop("loss"), *norms.values()):
            for name in trained:
                self.state.optimizers[name].step()
        return terms

    def _student_step(self, warming: bool) -> dict[str, Tensor]:
        optimizer, parameters = self.state.optimizers["student"], self.roles.student_parameters()
        optimizer.zero_grad()
        turn = self.student_turn.warmup if warming else self.student_turn
        terms = self._gradients(turn, self.progress.turn, self.recipe.training.seed, "student")
        self.world.average_gradients(parameters)
        norms = {"gradient_norm/first": _norm(self.roles.first.parameters())}
        if not self.roles.shared:
            norms["gradient_norm/second"] = _norm(self.roles.second.parameters())
        total = self._clip(parameters)
        if self._accept(terms["loss"], total):
            optimizer.step()
            self.state.ema.update()
        return {**terms, **norms}

    def _gradients(
        self, compute: Callable[[Batch, Draws], Turn], number: int, seed: int, purpose: str
    ) -> dict[str, Tensor]:
        """Adds up the gradients of this process's rows; `loss` and its terms, of the whole batch.

        Empty if there is nothing to learn.
        """
        total: dict[str, Tensor] = {}
        settings = self.recipe.training
        for rows in self.rows:
            batch = self.batches.read(number, seed, rows)
            draws = Draws(settings.seed, number, purpose, self.device, rows, settings.batch_size)
            with self._computing():
                turn = compute(batch, draws)
            if not turn.terms:
                return {}
            (turn.loss / len(self.rows)).backward()
            for key, value in {"loss": turn.loss.detach(), **turn.terms}.items():
                part = value / len(self.rows)
                total[key] = total[key] + part if key in total else part
        return self.world.mean(total)

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
        limit = self.recipe.training.max_gradient_norm
        return whole(nn.utils.clip_grad_norm_(parameters, limit))

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
        for name, rate in rates.items():
            for group in self.state.optimizers[name].param_groups:
                group["lr"] = rate * factor

    def _student_rate(self) -> float:
        """Before the decay at the end of the run."""
        settings, turns = self.recipe.training, self.recipe.losses.warmup_turns
        left = max(0.0, 1 - self.progress.turn / turns) if turns else 0.0
        first = settings.warmup_learning_rate or settings.learning_rate
        return settings.learning_rate + left * (first - settings.learning_rate)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """The precision and the attention kernel of every forward."""
        settings = self.recipe.training
        precision = torch.autocast(self.device.type, torch.bfloat16, settings.autocast)
        # Compiled for a CPU, plain matrix products beat flash attention, whose backward pass there
        # takes a third of a turn (docs/log.md).
        plain = settings.compile and self.device.type == "cpu"
        with precision, plain_attention() if plain else nullcontext():
            yield

    def _validate(self, validator: Validator, draw: bool) -> dict[str, float]:
        with self.state.ema.applied(), self._computing():
            seen = validator.measure()
        progress = self.progress
        # All processes must see the same number, whatever their rounding.
        (score,) = self.world.largest([seen.metrics["kernel_distance"]])
        if progress.best_score is None or score < progress.best_score:
            progress.best_score, progress.best_turn = score, progress.turn
            save_folder(self._best(), self.folder / "best", self.world)
        if draw and self.world.is_first:
            self._draw(validator, seen)
        return {f"validation/{k}": v for k, v in seen.metrics.items()}

    def _best(self) -> dict[str, Tensor]:
        return {str(index): value for index, value in enumerate(self.state.ema.values)}

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
        load_tensors(self._best(), self.folder / "best")
        folder = self.folder / "student"
        with self.state.ema.applied():
            steps = (self.roles.first, self.roles.second)
            first, second = (whole_transformer(role.transformer()) for role in steps)
            if self.world.is_first:
                save_student(self.plan.teacher, first, second, self.schedule, folder)
        self.world.wait()
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
    return whole(nn.utils.get_total_norm(gradients))


def _check_same_recipe(recipe: Recipe, folder: Path) -> None:
    """Refuses to go on with a run that another recipe began."""
    path = folder / "recipe.yaml"
    if not list_checkpoints(folder / "checkpoints") or not path.exists():
        return
    begun, now = (_flatten(r.model_dump(mode="json")) for r in (Recipe.load(path), recipe))
    differing = [
        f"{key} was {begun.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(begun.keys() | now.keys())
        if begun.get(key) != now.get(key)
        and key.removeprefix("training.") not in _MAY_CHANGE
        and not key.startswith("distributed.")
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
