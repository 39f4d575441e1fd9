"""The updates of a run: of the score, of fakes and critic, of the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from twostep.data.cache.read import TeacherCache
from twostep.distill.batches import Batches, rows_of
from twostep.distill.checkpoint import Progress, TrainingState
from twostep.distill.ema import Ema
from twostep.distill.objectives.roles import Roles
from twostep.distill.objectives.turns import Objectives
from twostep.distill.optimizers import build_optimizers
from twostep.distill.outcome import followed
from twostep.distill.rates import rates, score_rate
from twostep.distill.run_folder import RunFolder
from twostep.distill.update import Gradients, build_updates
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import plain_attention
from twostep.runtime.distributed import World


class Learner:
    """Takes turns. Where it stands, and all that changes, is its `state`.

    Every process must make the same calls.

    Args:
        folder: in which a fitted score is kept.
    """

    def __init__(
        self,
        recipe: Recipe,
        cache: TeacherCache,
        roles: Roles,
        *,
        folder: RunFolder,
        device: torch.device,
        world: World,
    ) -> None:
        self.recipe, self.roles, self.folder = recipe, roles, folder
        self.device, self.world = device, world
        self.objectives = Objectives.build(recipe, roles, cache.spec.schedule)
        self.batches = Batches(recipe, cache, device)
        self.state = TrainingState(
            roles.trained_modules(),
            build_optimizers(recipe, roles),
            Ema(roles.student_parameters(), recipe.training.ema_decay),
            Progress(),
            facts={"recipe": recipe.model_dump(mode="json"), "data": cache.spec.fingerprint},
        )
        gradients = Gradients(
            recipe,
            self.batches,
            rows_of(recipe.training, world),
            world=world,
            device=device,
            computing=self.computing,
        )
        self.updates = build_updates(roles, self.state, gradients)
        # Told of each turn of fakes and critic before the student's first with them, and their sum.
        self.on_warmup: Callable[[int, int], None] = lambda done, count: None

    @property
    def progress(self) -> Progress:
        return self.state.progress

    @property
    def share_done(self) -> float:
        """How much of the run is behind us, by turns or by time, whichever is further; 0 to 1."""
        settings = self.recipe.training
        share = self.progress.turn / settings.turns
        if settings.minutes is not None:
            share = max(share, self.progress.seconds / (60 * settings.minutes))
        return min(1.0, share)

    @property
    def number(self) -> int:
        """The student's turns so far; below 0 while the score is fitted."""
        progress = self.progress
        return progress.turn + progress.score_turn - self.recipe.score.fit_turns

    @property
    def is_fitting(self) -> bool:
        """Whether the next turn is the score's."""
        return self.progress.score_turn < self.recipe.score.fit_turns

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
        if self.number % self.recipe.training.log_every:
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
                warmup = settings.critic_warmup_turns if first else 0
                for done in range(warmup):
                    logged |= self.critic_step()
                    self.on_warmup(done + 1, warmup)
                for _ in range(alone):
                    logged |= self.critic_step()
            logged |= self.student_step(warming=warming)
        progress.turn += 1
        if progress.turn % settings.log_every and progress.turn < settings.turns:
            return {}  # reading a value waits for the device
        return {key: float(value) for key, value in logged.items()} | self._skipped()

    def set_rates(self) -> None:
        """The learning rates of the next turn, and the critic's factor."""
        progress = self.progress
        begin, end = self.recipe.critic.weight_over_run
        self.objectives.student.critic_factor = begin + (end - begin) * self.share_done
        now = rates(
            self.recipe,
            turn=progress.turn,
            critic_turn=progress.critic_turn,
            share_done=self.share_done,
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
