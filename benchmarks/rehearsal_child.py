"""One command of a rehearsal, its stages measured: `rehearsal_child.py OUT COMMAND ...`.

A stage is a call of the project's own code; its time and its peak of memory go to OUT, a line each.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from transformers import AutoModel

_STATUS, _EVERY = Path("/proc/self/status"), 0.02


class Allocated:
    """The most memory that this process allocated, looked at fifty times a second.

    Without pages of mapped files, which the system takes back when it needs them.
    """

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def now(self) -> int:
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(_EVERY)


_ALLOCATED = Allocated()


def reset_peak() -> None:
    """Forgets the peak so far."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        _ALLOCATED.peak = _ALLOCATED.now()


def peak_bytes() -> int:
    """Of the GPU's allocator, or of the process where there is none."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return max(_ALLOCATED.peak, _ALLOCATED.now())


def copy_weights_out_of_files() -> None:
    """On a CPU weights stay in the files that they are mapped from; a GPU has a copy of them."""
    for kind in (AutoModel, AutoencoderKL, ZImageTransformer2DModel):
        kind.from_pretrained = _copying(kind.from_pretrained)


def _copying(load: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def call(*args: Any, **kwargs: Any) -> Any:
        found = load(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found  # with what its files lacked
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return found

    return call


@contextmanager
def one_stage(name: str, out: Path) -> Iterator[None]:
    """What runs inside becomes a line of `out`."""
    reset_peak()
    started = time.perf_counter()
    try:
        yield
    finally:
        line = {
            "name": name,
            "peak_bytes": peak_bytes(),
            "seconds": time.perf_counter() - started,
        }
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def measured(owner: Any, attribute: str, stage: str, out: Path) -> None:
    """Each call of `owner.attribute` becomes a line of `out`; a class method stays one."""
    original = getattr(owner, attribute, None)
    if original is None:
        raise SystemExit(f"{owner} has no {attribute} to measure")

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        with one_stage(stage, out):
            return original(*args, **kwargs)

    static = isinstance(vars(owner).get(attribute), staticmethod)
    setattr(owner, attribute, staticmethod(call) if static else call)


def measure_stages(out: Path) -> None:
    """Every stage of teach and distill, by the names that `twostep plan` gives them."""
    from twostep.data.cache import build
    from twostep.distill.best import BestStudent
    from twostep.distill.checkpoint import TrainingState
    from twostep.distill.learner import Learner
    from twostep.distill.sample_sheet import SampleSheet
    from twostep.distill.validation import Validator

    stages: list[tuple[Any, str, str]] = [
        (build.EncodedPrompts, "encode", "teach: prompts"),
        (build, "build", "teach: pictures"),
        (Learner, "fit_score", "score fit"),
        (Learner, "critic_step", "critic turn"),
        (Learner, "student_step", "student turn"),
        (Validator, "measure", "validation"),
        (SampleSheet, "draw", "sample sheet"),
        (TrainingState, "save", "checkpoint"),
        (BestStudent, "export", "end of run"),
    ]
    for owner, attribute, stage in stages:
        measured(owner, attribute, stage, out)


def main() -> None:
    out, arguments = Path(sys.argv[1]), sys.argv[2:]
    if arguments[0] == "--time":
        from rehearsal_timing import time_all

        teacher, student, size, device = arguments[1:]
        time_all(teacher, student, size=int(size), device=device, out=out)
        return
    from twostep.cli import app

    if not torch.cuda.is_available():
        copy_weights_out_of_files()
    if arguments[0] in ("teach", "distill"):
        measure_stages(out)
    names = (
        {"export": f"export: {arguments[arguments.index('--to') + 1]}"}
        if ("--to" in arguments)
        else {}
    )
    if arguments[0] == "generate":
        names["generate"] = f"generate: {arguments[arguments.index('--memory') + 1]}"

    def run() -> None:
        app(arguments, standalone_mode=True)

    if arguments[0] in names:
        with one_stage(names[arguments[0]], out):
            run()
    else:
        run()


if __name__ == "__main__":
    main()
