"""The training loop: turns, saving, validation, stopping."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path

from twostep.data.cache.read import TeacherCache
from twostep.distill.batches import rows_of
from twostep.distill.checkpoint import CheckpointError, Progress, TrainingState
from twostep.distill.checkup import Checkup
from twostep.distill.learner import Learner
from twostep.distill.monitor import Monitor
from twostep.distill.objectives.build import build_roles, load_whole
from twostep.distill.outcome import Outcome
from twostep.distill.progress import TurnProgress
from twostep.distill.run_folder import RunFolder
from twostep.distill.sharding import Sharder
from twostep.distill.trackers import Trackers
from twostep.distill.update import TrainingStopped
from twostep.errors import UserError
from twostep.evaluation.scorers import load_scorer
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import pick_device
from twostep.runtime.distributed import World
from twostep.runtime.processes import local_device
from twostep.runtime.progress import working
from twostep.runtime.signals import catch_signals

# As a shell counts them.
_EXIT_CODES = {"SIGTERM": 143, "SIGHUP": 129}


class Interrupted(UserError):
    """SIGTERM, SIGHUP or Ctrl-C; the state has been saved."""

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
        rows_of(recipe.training, self.world)  # says at once what cannot be divided
        self.folder = RunFolder(recipe.run_folder)
        self.folder.check_same_recipe(recipe, cache.spec.fingerprint)
        sharded = recipe.distributed.sharding == "shard" and self.world.size > 1
        load = Sharder(recipe, self.world).load if sharded else load_whole(self.device)
        self.roles = build_roles(recipe, cache.spec.teacher, device=self.device, load=load)
        self.learner = Learner(
            recipe,
            cache,
            self.roles,
            folder=self.folder,
            device=self.device,
            world=self.world,
        )
        checkpoint = self.folder.last_checkpoint()
        self._begun_at = checkpoint
        self._turn_started = 0.0
        if checkpoint is not None:
            self.state.load(checkpoint, self.folder.frozen)

    @property
    def progress(self) -> Progress:
        return self.learner.progress

    @property
    def state(self) -> TrainingState:
        return self.learner.state

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
                with working("distil: writing the student", hidden=not self.world.is_first):
                    student = checkup.best.export(self.cache.spec)
                if self.world.is_first:
                    self.folder.end(self.outcome.as_dict())
                    checkup.best.describe(self.cache.spec)
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
        records: AbstractContextManager[Monitor | None] = nullcontext()
        if is_first:
            trackers = Trackers(self.recipe, self.folder.path) if settings.report_to else None
            records = closing(Monitor(self.folder.path, self.learner.number, trackers))
        bar = self._bar()
        with records as monitor, catch_signals() as caught, bar:
            checkup = Checkup(
                self.recipe,
                self.cache,
                self.roles,
                self.state,
                folder=self.folder,
                device=self.device,
                world=self.world,
                scorers=self.scorers,
                computing=self.learner.computing,
            )
            self.learner.on_warmup = lambda done, count: bar.advance(
                self._seconds_now(),
                turn=self.progress.turn,
                phase=f"fakes and critic alone, {done} of {count}",
            )
            while self.learner.share_done < 1:
                self._one_round(checkup, monitor, bar, caught)
        return checkup

    def _bar(self) -> TurnProgress:
        """Of all that takes time, with what an earlier run did."""
        recipe, settings, progress = self.recipe, self.recipe.training, self.progress
        warmup = settings.critic_warmup_turns * (recipe.losses.warmup_turns < settings.turns)
        validations = -(-settings.turns // settings.validate_every)
        bar = TurnProgress(
            settings.turns,
            settings.minutes,
            others=recipe.score.fit_turns + warmup + validations,
            hidden=not self.world.is_first,
        )
        done = progress.turn + progress.score_turn + progress.turn // settings.validate_every
        bar.begin(done + warmup * (progress.critic_turn > 0), progress.seconds)
        bar.turn = progress.turn
        return bar

    def _seconds_now(self) -> float:
        """Of the run, with those of the turn that is under way."""
        return self.progress.seconds + time.monotonic() - self._turn_started

    def _one_round(
        self, checkup: Checkup, monitor: Monitor | None, bar: TurnProgress, caught: list[str]
    ) -> None:
        """A turn, and what comes due with it: validation, records, a checkpoint, stopping."""
        settings, progress = self.recipe.training, self.progress
        fitting = self.learner.is_fitting
        with self._timed():
            values = self.learner.fit_score() if fitting else self.learner.turn()
        name = f"fitting the score, {progress.score_turn} of {self.recipe.score.fit_turns}"
        bar.advance(progress.seconds, turn=progress.turn, phase=name if fitting else "turns")
        drawn = False
        (signalled,) = self.world.largest([len(caught)])
        self.state.settle(self.world)
        turn, last = self.learner.number, self.learner.share_done >= 1
        if (turn % settings.validate_every == 0 and not fitting) or last:
            bar.phase("validation")
            with self._timed():
                drawn = last or turn % settings.sample_every == 0
                values |= checkup(draw=drawn)
            bar.advance(progress.seconds, turn=progress.turn)
        worth_a_line = turn % settings.log_every == 0 or "validation/diversity" in values
        if monitor is not None and values and worth_a_line:
            if drawn:
                monitor.sheet(turn, self.folder.sample_sheet(turn))
            for alarm in monitor.record(turn, values):
                bar.print(f"alarm: {alarm}")
            bar.show(values)
        if turn % settings.save_every == 0 or last or signalled:
            bar.phase("saving")
            beside = settings.async_saves and not (last or signalled)
            self.state.save(
                self.folder.checkpoints, settings.keep_checkpoints, self.world, background=beside
            )
        if signalled:
            where = f"at turn {turn}" if turn > 0 or not fitting else "while the score was fitted"
            raise Interrupted(
                exit_code=_EXIT_CODES.get(caught[0] if caught else "", 130),
                message=f"stopped by {caught[0] if caught else 'another process'} {where}; "
                "state saved. Run it again to go on",
            )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Counts what runs inside as time of the run, the same for all processes."""
        self._turn_started = started = time.monotonic()
        yield
        spent = self.progress.seconds + time.monotonic() - started
        (self.progress.seconds,) = self.world.largest([spent])
