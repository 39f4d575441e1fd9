"""The training loop: turns, saving, validation, stopping."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from twostep.data.cache.read import TeacherCache
from twostep.distill.batches import Batches, rows_of
from twostep.distill.checkpoint import Progress, TrainingState
from twostep.distill.ema import Ema
from twostep.distill.monitor import Monitor
from twostep.distill.objectives.build import build_roles, load_whole
from twostep.distill.objectives.turns import Objectives
from twostep.distill.optimizers import build_optimizers
from twostep.distill.progress import TurnProgress
from twostep.distill.rates import rates, score_rate
from twostep.distill.run_folder import RunFolder
from twostep.distill.sharding import Sharder
from twostep.distill.tensor_files import load_tensors, save_folder
from twostep.distill.update import Gradients, Update
from twostep.distill.validation import Validation, Validator
from twostep.errors import UserError
from twostep.models.codec import Decoder
from twostep.models.student import save_student
from twostep.models.transformer import whole_transformer
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import pick_device, plain_attention
from twostep.runtime.distributed import World
from twostep.runtime.images import image_grid
from twostep.runtime.processes import local_device
from twostep.runtime.signals import catch_signals


class Interrupted(UserError):
    """SIGTERM or Ctrl-C; the state has been saved."""

    exit_code = 130


class Trainer:
    """One distillation, from a finished teacher cache to a student folder.

    Args:
        cache: of this recipe (`open_cache`).

    Raises:
        RecipeError, ModelError: for what cannot work, before training begins.
    """

    def __init__(self, recipe: Recipe, cache: TeacherCache) -> None:
        recipe = recipe.with_lora_checksums([lora.sha256 for lora in cache.spec.teacher.loras])
        self.recipe, self.cache = recipe, cache
        self.device = local_device(pick_device(recipe.training.device))
        self.world = World(self.device)
        rows = rows_of(recipe.training, self.world)
        self.folder = RunFolder(recipe.run_folder)
        self.folder.check_same_recipe(recipe)
        self.schedule, teacher = cache.spec.schedule, cache.spec.teacher
        sharded = recipe.distributed.sharding == "shard" and self.world.size > 1
        load = Sharder(recipe, self.world).load if sharded else load_whole(self.device)
        self.roles = build_roles(recipe, teacher, device=self.device, load=load)
        self.objectives = Objectives.build(recipe, self.roles, self.schedule)
        self.decoder = Decoder.load(teacher.base)
        self.batches = Batches(recipe, cache, self.device)
        self.state = TrainingState(
            self.roles.trained_modules(),
            build_optimizers(recipe, self.roles),
            Ema(self.roles.student_parameters(), recipe.training.ema_decay),
            Progress(),
        )
        self.updates = self._build_updates(
            Gradients(
                recipe,
                self.batches,
                rows,
                world=self.world,
                device=self.device,
                computing=self.computing,
            )
        )
        checkpoint = self.folder.last_checkpoint()
        if checkpoint is not None:
            self.state.load(checkpoint)

    def _build_updates(self, gradients: Gradients) -> dict[str, Update]:
        """By purpose: score, critic, student."""
        roles = self.roles
        watched = {"first": roles.first.parameters()}
        if not roles.shared:
            watched["second"] = roles.second.parameters()
        critic = {"fake": roles.fake_parameters(), "critic": list(roles.critic.heads.parameters())}
        student = {"student": roles.student_parameters()}

        def update(purpose: str, parameters: dict, watched: dict) -> Update:
            optimizers = {name: self.state.optimizers[name] for name in parameters}
            return Update(
                gradients,
                self.progress,
                purpose=purpose,
                optimizers=optimizers,
                parameters=parameters,
                watched=watched,
            )

        updates = {
            "critic": update("critic", critic, {}),
            "student": update("student", student, watched),
        }
        if self.recipe.score.fit_turns:
            score = {"score": roles.score.parameters()}
            updates["score"] = update("score", score, {})
        return updates

    @property
    def progress(self) -> Progress:
        return self.state.progress

    @property
    def _share_done(self) -> float:
        """How much of the run is behind us, by turns or by time, whichever is further; 0 to 1."""
        settings = self.recipe.training
        share = self.progress.turn / settings.turns
        if settings.minutes is not None:
            share = max(share, self.progress.seconds / (60 * settings.minutes))
        return min(1.0, share)

    @property
    def _number(self) -> int:
        """The student's turns so far; below 0 while the score is fitted."""
        progress = self.progress
        return progress.turn + progress.score_turn - self.recipe.score.fit_turns

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
        settings, is_first = self.recipe.training, self.world.is_first
        if is_first:
            self.folder.describe(self.recipe, str(self.device))
        with self.computing():
            validator = Validator(
                self.recipe, self.roles, self.cache, device=self.device, world=self.world
            )
        records: AbstractContextManager[Monitor | None] = nullcontext()
        if is_first:
            records = closing(Monitor(self.folder.path, settings.tensorboard, self._number))
        bar = TurnProgress(
            settings.turns, settings.minutes, self.recipe.score.fit_turns, hidden=not is_first
        )
        with records as monitor, catch_signals() as caught, bar:
            while self._share_done < 1:
                self._one_round(validator, monitor, bar, caught)

    def _one_round(
        self, validator: Validator, monitor: Monitor | None, bar: TurnProgress, caught: list[str]
    ) -> None:
        """A turn, and what comes due with it: validation, records, a checkpoint, stopping."""
        settings, progress = self.recipe.training, self.progress
        fitting = progress.score_turn < self.recipe.score.fit_turns
        with self._timed():
            values = self.fit_score() if fitting else self.turn()
        (signalled,) = self.world.largest([len(caught)])
        self.state.settle(self.world)
        turn, last = self._number, self._share_done >= 1
        if (turn % settings.validate_every == 0 and not fitting) or last:
            with self._timed():
                draw = last or turn % settings.sample_every == 0
                values |= self.validate(validator, draw=draw)
        worth_a_line = turn % settings.log_every == 0 or "validation/diversity" in values
        if monitor is not None and values and worth_a_line:
            for alarm in monitor.record(turn, values):
                bar.print(f"[yellow]alarm[/] {alarm}")
            bar.show(turn, progress.seconds, values)
        if turn % settings.save_every == 0 or last or signalled:
            beside = settings.async_saves and not (last or signalled)
            self.state.save(
                self.folder.checkpoints, settings.keep_checkpoints, self.world, background=beside
            )
        if signalled:
            raise Interrupted(
                f"stopped by {caught[0] if caught else 'another process'} at turn {turn}; "
                "state saved. Run it again to go on"
            )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Counts what runs inside as time of the run, the same for all processes."""
        started = time.monotonic()
        yield
        spent = self.progress.seconds + time.monotonic() - started
        (self.progress.seconds,) = self.world.largest([spent])

    def fit_score(self) -> dict[str, float]:
        """A turn of fitting the score; what to log of it."""
        progress, update = self.progress, self.updates["score"]
        update.set_rates({"score": score_rate(self.recipe, turn=progress.score_turn)})
        with self._counting("fit_evaluations"):
            terms, _ = update(self.objectives.score, progress.score_turn)
        progress.score_turn += 1
        if progress.score_turn == self.recipe.score.fit_turns:
            update.zero()
            update.optimizers["score"].state.clear()  # its memory is the student's now
        if self._number % self.recipe.training.log_every:
            return {}
        return {key: float(value) for key, value in terms.items() if key != "loss"}

    def turn(self) -> dict[str, float]:
        """A student turn, after the critic turns that go before it; what to log of it."""
        settings, progress = self.recipe.training, self.progress
        warming = progress.turn < self.recipe.losses.warmup_turns
        self.set_rates()
        logged: dict[str, Tensor] = {}
        with self._counting("evaluations"):
            if not warming:
                first = progress.critic_turn == 0
                for _ in range(settings.critic_turns + first * settings.critic_warmup_turns):
                    logged |= self.critic_step()
            logged |= self.student_step(warming=warming)
        progress.turn += 1
        if progress.turn % settings.log_every and progress.turn < settings.turns:
            return {}  # reading a value waits for the device
        return {key: float(value) for key, value in logged.items()}

    def set_rates(self) -> None:
        """The learning rates of the next student turn."""
        now = rates(self.recipe, turn=self.progress.turn, share_done=self._share_done)
        for name in ("critic", "student"):
            self.updates[name].set_rates(now)

    def critic_step(self) -> dict[str, Tensor]:
        """One update of fakes and critic; their terms."""
        number = self.progress.critic_turn
        self.progress.critic_turn += 1
        terms, _ = self.updates["critic"](self.objectives.critic, number)
        return {key: value for key, value in terms.items() if key != "loss"}

    def student_step(self, *, warming: bool) -> dict[str, Tensor]:
        """One update of the student; its terms."""
        turn = self.objectives.student.warmup if warming else self.objectives.student
        terms, accepted = self.updates["student"](turn, self.progress.turn)
        if accepted:
            self.state.ema.update()
        return terms

    @contextmanager
    def _counting(self, count: str) -> Iterator[None]:
        """Adds the evaluations of what runs inside to a count of the progress."""
        before = self.roles.evaluations
        yield
        spent = (self.roles.evaluations - before) * self.world.size
        setattr(self.progress, count, getattr(self.progress, count) + spent)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The precision and the attention kernel of every forward."""
        settings = self.recipe.training
        precision = torch.autocast(self.device.type, torch.bfloat16, settings.autocast)
        # Compiled for a CPU, plain matrix products beat flash attention, whose backward pass there
        # takes a third of a turn (docs/log.md).
        plain = settings.compile and self.device.type == "cpu"
        with precision, plain_attention() if plain else nullcontext():
            yield

    def validate(self, validator: Validator, *, draw: bool) -> dict[str, float]:
        """Measures the averaged student and keeps it if it is the best so far; what to log."""
        with self.state.ema.applied(), self.computing():
            seen = validator.measure()
        progress = self.progress
        # All processes must see the same number, whatever their rounding.
        (distance,) = self.world.largest([seen.metrics["kernel_distance"]])
        if progress.best_distance is None or distance < progress.best_distance:
            progress.best_distance, progress.best_turn = distance, progress.turn
            save_folder(self._best(), self.folder.best, self.world)
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
        image_grid(panels).save(self.folder.sample_sheet(self.progress.turn))

    def export(self) -> Path:
        """Writes the best student as a diffusers folder and returns it."""
        load_tensors(self._best(), self.folder.best)
        with self.state.ema.applied():
            steps = (self.roles.first, self.roles.second)
            first, second = (whole_transformer(role.transformer()) for role in steps)
            if self.world.is_first:
                save_student(
                    self.cache.spec.teacher.base,
                    first,
                    second,
                    schedule=self.schedule,
                    folder=self.folder.student,
                )
        self.world.wait()
        return self.folder.student
