"""`twostep teach`, `distill` and `plan`: what is made of a recipe."""

from __future__ import annotations

import os
import shlex
from typing import Annotated

import typer

from twostep.cli.arguments import OverridesArgument, RecipeArgument
from twostep.cli.console import alarm, note, say
from twostep.runtime.progress import working


def _is_first() -> bool:
    """Whether this process speaks for those that torchrun started."""
    return os.environ.get("RANK", "0") in ("", "0")


def teach(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="rebuild corrupt, truncated or foreign shards")
    ] = False,
) -> None:
    """Cache the teacher's samples. Goes on where an interrupted build stopped.

    Example: twostep teach zoo:emoji-demo data.prompt_count=512

    Several processes share the work: torchrun --nproc-per-node 8 -m twostep teach RECIPE
    """
    from twostep.planning.first_look import first_look
    from twostep.recipe.schema import Recipe

    resolved = Recipe.load(recipe, overrides or ())
    first_look(resolved)
    with working(f"teach: checking {resolved.name}", hidden=not _is_first()):
        from twostep.data.cache import build
        from twostep.planning import preflight

        preflight.check_here(resolved, teaching=True, repair=repair)
    cache = build.open_cache(resolved, repair=repair)
    if _is_first():
        say(f"cache: {cache.spec.location} ({len(cache)} samples)")
        note(f"next: twostep distill {shlex.join([recipe, *(overrides or ())])}")


def distill(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, print the resolved recipe, stop")
    ] = False,
    ray: Annotated[
        int | None, typer.Option(min=1, help="run on this many workers of a Ray cluster")
    ] = None,
) -> None:
    """Distil the teacher into two steps. Run it again to resume; builds the cache if need be.

    Ends with 3 where the student came out worse than the teacher's own weights in two steps.

    Example: twostep distill zoo:emoji-demo training.turns=500
    """
    from twostep.planning.first_look import first_look
    from twostep.recipe.schema import Recipe

    resolved = Recipe.load(recipe, overrides or ())
    first_look(resolved)
    with working(f"distill: checking {resolved.name}", hidden=not _is_first()):
        from twostep.planning import preflight

        if ray is None:  # the machines of a cluster have disks of their own
            preflight.check_here(resolved, fetch=not dry_run)
        else:
            preflight.check_plan(resolved, processes=ray)
    if dry_run:
        print(resolved.to_yaml(), end="")
        return
    if ray is not None:
        from twostep.distill import on_ray

        folder, outcome = on_ray.distill_on_ray(resolved, ray), None
    else:
        from twostep.data.cache import build
        from twostep.distill import trainer

        cache = build.open_cache(resolved)
        with working(f"distill: loading {resolved.teacher.model}", hidden=not _is_first()):
            run = trainer.Trainer(resolved, cache)
        folder = run.train()
        outcome = run.outcome
    if not _is_first():
        return
    say(f"student: {folder}")
    if outcome is not None:
        note(f"{outcome.in_words()}; the best is of turn {outcome.best_turn}")
    note(f"sheets: {resolved.run_folder / 'samples'}")
    note(f'next: twostep generate --model {shlex.quote(str(folder))} "a prompt"')
    if outcome is not None:
        for line in outcome.warnings():
            alarm(line)
        outcome.check()


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpus: Annotated[int, typer.Option(min=1, help="processes, one a GPU")] = 1,
    memory: Annotated[float, typer.Option(min=0.1, help="GiB of each")] = 80.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="tokens of a caption")] = 128,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="achieved rate of each, for the time")
    ] = None,
    disk_rate: Annotated[
        float, typer.Option(min=0.001, help="1e9 bytes a second, for the time of a checkpoint")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Work out memory, disk and time of every stage. Loads no weights; needs none.

    Example: twostep plan zoo:z-image-turbo-lora --gpus 1 --memory 80 --tflops 400
    """
    from twostep.planning.first_look import first_look
    from twostep.recipe.schema import Recipe

    resolved = Recipe.load(recipe, overrides or ())
    first_look(resolved, planning=True)
    with working(f"plan: checking {resolved.name}"):
        from twostep.planning import preflight, tables, training

        roles = preflight.check_plan(resolved, processes=gpus)
    found = training.plan(
        resolved,
        processes=gpus,
        memory_gib=memory,
        prompt_tokens=prompt_tokens,
        tflops=tflops,
        disk_rate=disk_rate,
        roles=roles,
    )
    if as_json:
        print(found.as_json())
        return
    for part in tables.tables(found):
        say(part)
