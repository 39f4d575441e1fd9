"""`twostep plan`: what a recipe needs, worked out before anything is loaded.

The turns of the trainer itself run on fake tensors, which have a shape, a type and a life, but no
memory. Bytes alive are counted as storages come and go, operations by torch's own formulas.
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from twostep.backbones.model import (
    ModelError,
    latent_shape,
    read_architecture,
    read_shift,
    resolve,
    unloaded_transformer,
)
from twostep.backbones.zimage import SEQUENCE_MULTIPLE, PromptBatch, ZImageVelocity
from twostep.config import Recipe, RecipeError
from twostep.flow import sigma_schedule
from twostep.roles import Role, Roles, build_roles
from twostep.rollout import TwoStep
from twostep.training.draws import Draws
from twostep.training.turns import Batch, CriticTurn, ScoreTurn, StudentTurn, Turn

SHAPES = Path(__file__).parent / "shapes"
# Models whose shape is known without asking the hub.
_KNOWN = {"Tongyi-MAI/Z-Image-Turbo": "z-image-turbo", "Tongyi-MAI/Z-Image": "z-image-turbo"}
_CPU = torch.device("cpu")
# The CUDA context, cuBLAS workspaces and what the allocator cannot reuse.
_RESERVED_BYTES = 2 << 30


@dataclass(frozen=True)
class RolePlan:
    """Bytes of one role on one process, while the student is trained."""

    name: str
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average


@dataclass(frozen=True)
class Needs:
    """What a recipe needs; bytes on each process.

    Attributes:
        activations: by turn: what comes alive at its peak beside what `roles` hold.
        flops: by turn: operations of one turn over the whole batch, all processes together.
        peak: of the largest turn, `roles` and the device's own needs included.
        cache, checkpoint: on disk.
    """

    roles: list[RolePlan]
    activations: dict[str, int]
    flops: dict[str, int]
    peak: int
    cache: int
    checkpoint: int
    micro_batch: int


@dataclass(frozen=True)
class Plan(Needs):
    """Needs against what there is.

    Attributes:
        memory: bytes of each process.
        seconds_per_1000_turns: the critic's turns included; None without a rate.
        advice: which settings would make it fit, where it does not.
    """

    processes: int
    memory: int
    seconds_per_1000_turns: float | None
    advice: list[str]

    @property
    def fits(self) -> bool:
        return self.peak <= self.memory

    def as_json(self) -> str:
        return json.dumps(asdict(self) | {"fits": self.fits}, indent=1)


def plan(
    recipe: Recipe,
    processes: int = 1,
    memory_gib: float = 80.0,
    prompt_tokens: int = 128,
    tflops: float | None = None,
) -> Plan:
    """Works out what `recipe` needs.

    Args:
        processes: GPUs.
        memory_gib: of each.
        prompt_tokens: length of a caption, in tokens.
        tflops: achieved rate of each process, in 1e12 operations per second.

    Raises:
        RecipeError, ModelError: for a recipe that cannot run.
    """
    needs, memory = _measure(recipe, processes, prompt_tokens), int(memory_gib * 2**30)
    seconds = None
    if tflops is not None:
        critic_turns = recipe.training.critic_turns
        operations = needs.flops["student"] + critic_turns * needs.flops["critic"]
        seconds = 1000 * operations / (tflops * 1e12 * processes)
    advice: list[str] = []
    if needs.peak > memory:
        advice.extend(_advice(recipe, processes, prompt_tokens, memory))
    return Plan(
        **vars(needs),
        processes=processes,
        memory=memory,
        seconds_per_1000_turns=seconds,
        advice=advice,
    )


def _measure(recipe: Recipe, processes: int, prompt_tokens: int) -> Needs:
    folder = shape_folder(recipe.teacher.model)
    settings = recipe.training
    if settings.batch_size % processes:
        raise RecipeError(
            f"training.batch_size: {settings.batch_size} cannot be divided among "
            f"{processes} processes"
        )
    rows = min(settings.micro_batch or settings.batch_size, settings.batch_size // processes)
    changes: dict[str, Any] = {"teacher": recipe.teacher.model_copy(update={"model": str(folder)})}
    if recipe.score.model is not None:
        score = str(shape_folder(recipe.score.model))
        changes["score"] = recipe.score.model_copy(update={"model": score})
    recipe = recipe.model_copy(update=changes)
    with torch.device("meta"):
        roles = build_roles(recipe, _CPU, _load_nothing)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for role in (roles.teacher, roles.score, roles.first, roles.second, *roles.fakes):
            _make_fake(role.model)
        _make_fake(roles.critic)
        shards = processes if recipe.distributed.sharding == "shard" else 1
        if recipe.distributed.shard_size is not None:
            shards = recipe.distributed.shard_size
        held = _roles(recipe, roles, shards)
        shift = recipe.shift or read_shift(folder)
        step2_sigma = recipe.step2_sigma or sigma_schedule(2, shift)[1]
        student = StudentTurn(recipe, roles, TwoStep(step2_sigma, recipe.student.transition), shift)
        batch = random_batch(recipe, folder, rows, prompt_tokens)
        turns: dict[str, Callable[[Batch, Draws], Turn]] = {
            "warm-up": student.warmup,
            "student": student,
            "critic": CriticTurn(recipe, roles, student),
        }
        if not recipe.losses.warmup_turns:
            del turns["warm-up"]
        if recipe.score.fit_turns:
            turns["score"] = ScoreTurn(recipe, roles, shift)
        runs = {name: _run(turn, roles, batch, recipe) for name, turn in turns.items()}
    gathered = _gathered_bytes(roles) if shards > 1 else 0
    activations = {name: found.peak + gathered for name, found in runs.items()}
    static = sum(role.total for role in held)
    trained = sum(r.parameters for r in held if r.gradients)
    averaged = sum(r.parameters for r in held if r.average)
    fitted = sum(p.numel() for p in roles.score.parameters())
    return Needs(
        roles=held,
        activations=activations,
        flops={name: found.flops * (settings.batch_size // rows) for name, found in runs.items()},
        peak=static + max(activations.values()) + _RESERVED_BYTES,
        cache=_cache_bytes(recipe, folder, prompt_tokens),
        checkpoint=4 * (3 * trained + averaged + fitted),
        micro_batch=rows,
    )


def shape_folder(model: str) -> Path:
    """A folder with at least the configurations of `model`; weights are not fetched.

    Raises:
        ModelError: if there is none, here or on the hub.
    """
    if model in _KNOWN:
        return SHAPES / _KNOWN[model]
    is_local = model.startswith(("zoo:", ".", "~", "/")) or model.count("/") != 1
    if is_local or Path(model).is_dir():
        return resolve(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{model!r} is no local folder, nor could the hub be asked: {error}"
        ) from error


def _load_nothing(folder: Path, part: str, dtype: torch.dtype) -> ZImageVelocity:
    with torch.device("meta"):
        transformer = unloaded_transformer(folder, part, dtype)
    return ZImageVelocity(transformer).eval()


def _make_fake(module: nn.Module) -> None:
    """Fake tensors on the CPU for the module's parameters: unlike meta tensors they autocast."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not isinstance(parameter, FakeTensor):
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=_CPU)
                setattr(owner, name, nn.Parameter(fake, parameter.requires_grad))


def _roles(recipe: Recipe, roles: Roles, shards: int) -> list[RolePlan]:
    """Every role once; what several of them share stands with the first."""
    named: list[tuple[str, Role]] = [("teacher", roles.teacher), ("score", roles.score)]
    named += [("first", roles.first), ("second", roles.second)]
    named += [(f"fake{i + 1}", fake) for i, fake in enumerate(roles.fakes)]
    seen: set[int] = set()
    result = []
    for name, role in named:
        trained = {id(p) for p in role.parameters()}
        own = [p for p in role.model.parameters() if id(p) not in seen]
        if recipe.student.parameters == "lora" and trained:
            own = [p for p in own if id(p) in trained]
        elif recipe.student.parameters == "lora":
            own = [p for p in own if not p.requires_grad]
        if not own:
            continue
        seen.update(id(p) for p in own)
        if name == "score":
            # Its gradients and optimizer states are gone before the student's are there.
            trained = set()
        averaged = name in ("first", "second")
        result.append(_role_plan(name, own, trained, averaged, shards))
    critic = list(roles.critic.parameters())
    result.append(_role_plan("critic", critic, {id(p) for p in critic}, False, 1))
    return result


def _role_plan(
    name: str, own: list[nn.Parameter], trained: set[int], averaged: bool, shards: int
) -> RolePlan:
    learnt = sum(p.numel() for p in own if id(p) in trained)
    return RolePlan(
        name,
        sum(p.numel() for p in own),
        sum(p.numel() * p.element_size() for p in own) // shards,
        4 * learnt // shards,
        2 * 4 * learnt // shards,
        4 * learnt * averaged // shards,
    )


def _gathered_bytes(roles: Roles) -> int:
    """With sharded weights: a block as it runs and the next, whole, and its gradients."""
    blocks = roles.teacher.model.transformer.layers
    return max(sum(p.numel() for p in block.parameters()) for block in blocks) * (2 * 2 + 4)


def random_batch(
    recipe: Recipe,
    folder: Path,
    rows: int,
    prompt_tokens: int,
    device: torch.device = _CPU,
) -> Batch:
    """A batch of noise in the shapes that the recipe's turns have."""
    channels, scale = _latents(folder)
    shape = (rows, *latent_shape(channels, scale, recipe.data.height, recipe.data.width))
    width = int(read_architecture(folder)["cap_feat_dim"])
    tokens = prompt_tokens + (-prompt_tokens) % SEQUENCE_MULTIPLE
    lengths = torch.full((rows,), prompt_tokens, device=device)
    prompts = PromptBatch(torch.randn(rows, tokens, width, device=device), lengths, True)
    latents = torch.randn(shape, device=device)
    return Batch(latents, latents, latents, latents, prompts, prompts, prompts)


def _latents(folder: Path) -> tuple[int, int]:
    """The model's latent channels and its VAE's pixels per latent."""
    vae = json.loads((folder / "vae" / "config.json").read_text())
    return int(read_architecture(folder)["in_channels"]), 2 ** (len(vae["block_out_channels"]) - 1)


def _cache_bytes(recipe: Recipe, folder: Path, prompt_tokens: int) -> int:
    channels, scale = _latents(folder)
    numbers = channels * (recipe.data.height // scale) * (recipe.data.width // scale)
    width = int(read_architecture(folder)["cap_feat_dim"])
    prompts = recipe.data.prompt_count
    # Latents at the end and, where the student's second level is the teacher's, on the way.
    return 4 * prompts * (2 * numbers * recipe.data.samples_per_prompt + prompt_tokens * width)


# torch knows how many operations CUDA's attention kernels take; fake tensors call the CPU's.
_OPERATIONS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ],
}
# Operations that a fake tensor meets for the first time between two collections.
_COLLECT_EVERY = 20


@dataclass(frozen=True)
class _Found:
    peak: int
    flops: int


def _run(
    turn: Callable[[Batch, Draws], Turn], roles: Roles, batch: Batch, recipe: Recipe
) -> _Found:
    """One turn forwards and backwards; bytes alive at the peak beside weights and gradients."""
    with _live_bytes() as live:
        autocast = recipe.training.autocast
        with torch.autocast("cpu", torch.bfloat16, autocast):
            found = turn(batch, Draws(0, 0, "student", _CPU))
        if found.terms:
            found.loss.backward()
    return _Found(max(0, live.peak - _drop_gradients(roles)), live.operations)


def _drop_gradients(roles: Roles) -> int:
    """How many bytes they took."""
    parameters = chain(
        roles.student_parameters(), roles.fake_parameters(), roles.critic.parameters(),
        roles.score.parameters(),
    )  # fmt: skip
    gradients = 0
    for parameter in parameters:
        if parameter.grad is not None:
            gradients += parameter.grad.numel() * parameter.grad.element_size()
            parameter.grad = None
    return gradients


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that came alive inside and still are, and the most there were.

    Also counts operations, since torch's own counter keeps tensors alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._met = FakeTensorMode.cache_misses
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What first comes up as an argument was there before: a view of it is nothing new.
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._add(storage, storage.nbytes())
        if (count := _OPERATIONS.get(func._overloadpacket)) is not None:
            self.operations += int(count(*args, **(kwargs or {}), out_val=result))
        # What is kept about an operation met for the first time holds its tensors in a cycle.
        if FakeTensorMode.cache_misses - self._met >= _COLLECT_EVERY:
            self._met = FakeTensorMode.cache_misses
            gc.collect()
        return result

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def _live_bytes() -> Iterator[_LiveBytes]:
    gc.collect()
    gc.freeze()  # so that collections look at what is new only
    try:
        with _LiveBytes() as mode:
            yield mode
    finally:
        gc.unfreeze()


def tables(found: Plan) -> Iterator[Table | str]:
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


def _advice(recipe: Recipe, processes: int, prompt_tokens: int, memory: int) -> Iterator[str]:
    """Settings that would make it fit, one at a time and then all together."""
    own = recipe.training.batch_size // processes
    steps: list[tuple[str, dict[str, dict[str, Any]]]] = []
    if not recipe.training.checkpoint_activations:
        steps.append(
            ("training.checkpoint_activations=true", {"training": {"checkpoint_activations": True}})
        )
    if (recipe.training.micro_batch or own) > 1:
        steps.append(("training.micro_batch=1", {"training": {"micro_batch": 1}}))
    if recipe.student.parameters != "lora":
        steps.append(("teacher.dtype=bfloat16", {"teacher": {"dtype": "bfloat16"}}))
        if processes > 1 and recipe.distributed.sharding == "replicate":
            steps.append(("distributed.sharding=shard", {"distributed": {"sharding": "shard"}}))
        lora = {"student": {"parameters": "lora"}, "distributed": {"sharding": "replicate"}}
        steps.append(("student.parameters=lora", lora))
    applied: list[str] = []
    for name, changes in steps:
        applied.append(name)
        recipe = _with(recipe, changes)
        peak = _measure(recipe, processes, prompt_tokens).peak
        if peak <= memory:
            yield f"{' '.join(applied)} would fit: {peak / 2**30:.1f} GiB"
            return
    yield "no setting of this recipe makes it fit: fewer pixels, or more memory"


def _with(recipe: Recipe, changes: dict[str, dict[str, Any]]) -> Recipe:
    sections = {
        name: getattr(recipe, name).model_copy(update=values) for name, values in changes.items()
    }
    return recipe.model_copy(update=sections)
