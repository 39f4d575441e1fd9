"""A plan as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from twostep.planning.stages import TrainingPlan


def tables(found: TrainingPlan) -> Iterator[Table | str]:
    """What a person wants to see of a plan."""
    roles = Table(title=f"Memory of each of {found.processes} processes, GiB", title_justify="left")
    for column in ("role", "parameters", "weights", "gradients", "optimizer", "average", "total"):
        roles.add_column(column, justify="left" if column == "role" else "right")
    for role in found.roles:
        sizes = (role.weights, role.gradients, role.optimizer, role.average, role.total)
        roles.add_row(role.name, f"{role.parameters:,}", *(_gib(size) for size in sizes))
    yield roles
    stages = Table(
        title=f"Stages, turns {found.micro_batch} samples at a time", title_justify="left"
    )
    for column in ("stage", "device, GiB", "host, GiB", "disk, GiB", "1e12 operations a sample"):
        stages.add_column(column, justify="left" if column == "stage" else "right")
    for stage in found.stages:
        needed = (stage.device, stage.host, stage.disk)
        operations = f"{stage.operations / 1e12:,.3g}" if stage.operations else ""
        stages.add_row(stage.name, *(_gib(size) if size else "" for size in needed), operations)
    yield stages
    verdict = "fits in" if found.fits else "does not fit in"
    yield (
        f"peak {_gib(found.peak)} GiB ({found.peak_stage.name}, and {_gib(found.reserved)} for the "
        f"device itself): {verdict} {_gib(found.memory)} GiB"
    )
    yield (
        f"disk: teacher cache {_gib(found.cache)} GiB, a checkpoint {_gib(found.checkpoint)} GiB "
        f"({found.seconds_per_checkpoint:.0f} s), the student {_gib(found.student)} GiB"
    )
    yield (
        f"an update of the student: {found.forwards_of_a_turn:.1f} forwards a sample ("
        + ", ".join(
            f"{n} {name} turn{'s' * (n > 1)} of {found.forwards[name]:.1f}"
            for name, n in found.turns_of_a_student.items()
        )
        + ")"
    )
    if found.seconds_per_1000_turns is not None:
        yield f"1,000 student turns: {found.seconds_per_1000_turns / 3600:.1f} hours"
    yield from found.advice


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"
