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
from twostep.distill.checkpoint import CheckpointError, Progress, TrainingState
from twostep.distill.checkup import Checkup
from twostep.distill.ema import Ema
from twostep.distill.monitor import Monitor
from twostep.distill.objectives.build import build_roles, load_whole
from twostep.distill.objectives.turns import Objectives
from twostep.distill.optimizers import build_optimizers
from twostep.distill.outcome import Outcome, followed
from twostep.distill.progress import TurnProgress
from twostep.distill.rates import rates, score_rate
from twostep.distill.run_folder import RunFolder
from twostep.distill.sharding import Sharder
from twostep.distill.update import Gradients, TrainingStopped, build_updates
from twostep.errors import UserError
from twostep.evaluation.scorers import load_scorer
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import pick_device, plain_attention
from twostep.runtime.distributed import World
from twostep.runtime.processes import local_device
from twostep.runtime.signals import catch_signals


class Interrupted(UserError):
    """SIGTERM or Ctrl-C; the state has been saved."""

    def __init__(self, message: str, *, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


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
        self.scorers = [load_scorer(name) for name in recipe.training.validation_scores]
        self.device = local_device(pick_device(recipe.training.device))
        self.world = World(self.device)
        rows = rows_of(recipe.training, self.world)
        self.folder = RunFolder(recipe.run_folder)
        self.folder.check_same_recipe(recipe, cache.spec.fingerprint)
        self.schedule = cache.spec.schedule
        sharded = recipe.distributed.sharding == "shard" and self.world.size > 1
        load = Sharder(recipe, self.world).load if sharded else load_whole(self.device)
        self.roles = build_roles(recipe, cache.spec.teacher, device=self.device, load=load)
        self.objectives = Objectives.build(recipe, self.roles, self.schedule)
        self.batches = Batches(recipe, cache, self.device)
        self.state = TrainingState(
            self.roles.trained_modules(),
            build_optimizers(recipe, self.roles),
            Ema(self.roles.student_parameters(), recipe.training.ema_decay),
            Progress(),
            facts={"recipe": recipe.model_dump(mode="json"), "data": cache.spec.fingerprint},
        )
        gradients = Gradients(
            recipe,
            self.batches,
            rows,
            world=self.world,
            device=self.device,
            computing=self.computing,
        )
        self.updates = build_updates(self.roles, self.state, gradients)
        checkpoint = self.folder.last_checkpoint()
        self._begun_at = checkpoint
        if checkpoint is not None:
            self.state.load(checkpoint, self.folder.frozen)

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
            with self.folder.taken() if self.world.is_first else nullcontext():
                if self.folder.last_checkpoint() != self._begun_at:
                    raise CheckpointError(
                        f"{self.folder.path} was changed by another process; run it again"
                    )
                checkup = self._run()
                self._check_learnt()
                student = checkup.best.export(self.cache.spec)
                if self.world.is_first:
                    self.folder.end(self.outcome.as_dict())
            return student
        finally:
            self.world.leave()

    @property
    def outcome(self) -> Outcome:
        """How the run went so far."""
        return Outcome.of(self.progress)

    def _check_learnt(self) -> None:
        """Raises TrainingStopped where no update of the student was ever taken."""
        progress = self.progress
        if progress.turn and progress.skipped.get("student", 0) >= progress.turn:
            raise TrainingStopped(
                f"each of the {progress.turn} student turns was refused, since loss or gradient "
                "was not finite: there is no student. Look at the weights in losses.* and the rates"
            )
        if progress.best_turn is None:
            raise TrainingStopped(
                f"no validation in {progress.turn} turns was finite: there is no student. Begin a "
                "new run with a lower training.learning_rate"
            )

    def _run(self) -> Checkup:
        """The turns; gives back what watched them."""
        settings, is_first = self.recipe.training, self.world.is_first
        if is_first:
            self.folder.describe(self.recipe, str(self.device))
        checkup = Checkup(
            self.recipe,
            self.cache,
            self.roles,
            self.state,
            folder=self.folder,
            device=self.device,
            world=self.world,
            scorers=self.scorers,
            computing=self.computing,
        )
        records: AbstractContextManager[Monitor | None] = nullcontext()
        if is_first:
            records = closing(Monitor(self.folder.path, settings.tensorboard, self._number))
        bar = TurnProgress(
            settings.turns, settings.minutes, self.recipe.score.fit_turns, hidden=not is_first
        )
        with records as monitor, catch_signals() as caught, bar:
            while self._share_done < 1:
                self._one_round(checkup, monitor, bar, caught)
        return checkup

    def _one_round(
        self, checkup: Checkup, monitor: Monitor | None, bar: TurnProgress, caught: list[str]
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
                values |= checkup(draw=draw)
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
            where = f"at turn {turn}" if turn > 0 or not fitting else "while the score was fitted"
            raise Interrupted(
                exit_code=143 if "SIGTERM" in caught else 130,
                message=f"stopped by {caught[0] if caught else 'another process'} {where}; "
                "state saved. Run it again to go on",
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
            self.roles.start_fakes()
            update.zero()
            update.optimizers["score"].state.clear()  # its memory is the student's now
            self.state.freeze("score", self.folder.frozen, self.world)
        if self._number % self.recipe.training.log_every:
            return {}
        logged = {key: float(value) for key, value in terms.items() if key != "loss"}
        loss = float(terms["loss"])
        progress.score_loss = followed(progress.score_loss, loss)
        if progress.score_start is None:
            progress.score_start = loss
        return logged | self._skipped()

    def _skipped(self) -> dict[str, float]:
        """Updates that were refused so far, by kind."""
        return {f"skipped/{kind}": float(n) for kind, n in self.progress.skipped.items()}

    def turn(self) -> dict[str, float]:
        """A student turn, after the critic turns that go before it; what to log of it."""
        settings, progress = self.recipe.training, self.progress
        warming = progress.turn < self.recipe.losses.warmup_turns
        logged: dict[str, Tensor] = {}
        with self._counting("evaluations"):
            if not warming:
                first = progress.critic_turn == 0
                alone = settings.critic_turns - settings.joint_turns
                for _ in range(alone + first * settings.critic_warmup_turns):
                    logged |= self.critic_step()
            logged |= self.student_step(warming=warming)
        progress.turn += 1
        if progress.turn % settings.log_every and progress.turn < settings.turns:
            return {}  # reading a value waits for the device
        return {key: float(value) for key, value in logged.items()} | self._skipped()

    def set_rates(self) -> None:
        """The learning rates of the next turn."""
        progress = self.progress
        now = rates(
            self.recipe,
            turn=progress.turn,
            critic_turn=progress.critic_turn,
            share_done=self._share_done,
        )
        self.updates["joint"].set_rates(now)

    def critic_step(self) -> dict[str, Tensor]:
        """One update of fakes and critic; their terms."""
        self.set_rates()
        number = self.progress.critic_turn
        self.progress.critic_turn += 1
        terms, _ = self.updates["critic"](self.objectives.critic, number)
        return {key: value for key, value in terms.items() if key != "loss"}

    def student_step(self, *, warming: bool) -> dict[str, Tensor]:
        """One update of the student; its terms."""
        self.set_rates()
        if self.recipe.training.joint_turns and not warming:
            terms, accepted = self.updates["joint"](self.objectives.joint, self.progress.turn)
            self.progress.critic_turn += 1
        else:
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
