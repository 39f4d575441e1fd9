"""One run of the study in a process of its own: trains, and counts the network's evaluations.

python studies/ablation/one_run.py RECIPE.yaml
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from twostep.backbones.zimage import Prediction
from twostep.config import Recipe
from twostep.files import write_atomically
from twostep.training.loop import Trainer

# A call whose result is differentiated costs about two forwards more.
_WITH_GRADIENT = 3


class CountingTrainer(Trainer):
    """Counts evaluations for each image, those of validation left out.

    The count is of this process: a run that was interrupted is begun anew by the study.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.evaluations = 0
        roles = self.roles
        models = [r.model for r in (roles.teacher, roles.score, roles.first, roles.second)]
        models += [fake.model for fake in roles.fakes]
        self._counting = False
        for model in {id(m): m for m in models}.values():
            model.register_forward_hook(self._count)

    def _count(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Prediction) -> None:
        if self._counting:
            cost = _WITH_GRADIENT if output.velocity.requires_grad else 1
            self.evaluations += cost * len(inputs[0])

    def _one_turn(self) -> dict[str, float]:
        self._counting = True
        try:
            return super()._one_turn()
        finally:
            self._counting = False


def main(path: Path) -> None:
    """Writes `done.json` into the run's folder."""
    recipe = Recipe.load(path)
    started = time.monotonic()
    trainer = CountingTrainer(recipe)
    trainer.train()
    record: dict[str, Any] = {
        "seconds": round(time.monotonic() - started, 1),
        "evaluations": trainer.evaluations,
        "best_turn": trainer.progress.best_turn,
    }
    text = json.dumps(record)
    write_atomically(recipe.run_folder / "done.json", lambda p: p.write_text(text))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
