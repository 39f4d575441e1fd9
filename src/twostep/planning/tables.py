"""A plan as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from twostep.planning.training import TrainingPlan


def tables(found: TrainingPlan) -> Iterator[Table | str]:
    """What a person wants to see of a plan."""
    roles = Table(title=f"Memory of each of {found.processes} processes, GiB", title_justify="left")
    for column in ("role", "parameters", "weights", "gradients", "optimizer", "average", "total"):
        roles.add_column(column, justify="left" if column == "role" else "right")
    for role in found.roles:
        sizes = (role.weights, role.gradients, role.optimizer, role.average, role.total)
        roles.add_row(role.name, f"{role.parameters:,}", *(_gib(size) for size in sizes))
    yield roles
    turns = Table(title=f"Turns, {found.micro_batch} samples at a time", title_justify="left")
    for column in ("turn", "activations, GiB", "operations, 1e12"):
        turns.add_column(column, justify="left" if column == "turn" else "right")
    for name, size in found.activations.items():
        turns.add_row(name, _gib(size), f"{found.flops[name] / 1e12:,.3g}")
    yield turns
    verdict = "fits in" if found.fits else "does not fit in"
    yield f"peak {_gib(found.peak)} GiB: {verdict} {_gib(found.memory)} GiB"
    yield f"disk: teacher cache {_gib(found.cache)} GiB, a checkpoint {_gib(found.checkpoint)} GiB"
    if found.seconds_per_1000_turns is not None:
        yield f"1,000 student turns: {found.seconds_per_1000_turns / 3600:.1f} hours"
    yield from found.advice


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"
