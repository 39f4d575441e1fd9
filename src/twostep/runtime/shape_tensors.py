"""Tensors with a shape, a type and a life, but no memory and no values.

As torch's own fake tensors, which do several times as much for each operation: a turn of a model of
34 blocks is counted in seconds. To autocast, autograd and attention they are tensors of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU, _META = torch.device("cpu"), torch.device("meta")
_READ = torch.ops.aten._local_scalar_dense.default
# Shape, strides and type of a result.
_Spec = tuple[torch.Size, tuple[int, ...], torch.dtype]
# An operation, the tensors that go in and come out (all of the meta device), arguments and result.
Watcher = Callable[[Any, list[Tensor], list[Tensor], tuple[Sequence[Any], Any]], None]


class ShapeTensor(Tensor):
    """Stands for `meta`, a tensor of the meta device, whose storage lives as long as it does."""

    meta: Tensor

    @staticmethod
    def of(meta: Tensor) -> ShapeTensor:
        """Around a tensor of the meta device."""
        made: ShapeTensor = Tensor._make_wrapper_subclass(
            ShapeTensor,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=CPU,
        )
        made.meta = meta
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} on a tensor without values, outside ShapesOnly")

    def tolist(self) -> Any:
        """Zeros: what asks for them has drawn at random."""
        return [0] * len(self)


class ShapesOnly(TorchDispatchMode):
    """Inside, operations give tensors without values; ordinary ones may go in.

    A value that is read is 1, or True.

    Attributes:
        watchers: told of each operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watchers: list[Watcher] = []
        self._results: dict[Any, list[_Spec] | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _READ:
            return _one(args[0].dtype)
        theirs: list[Tensor] = []
        inner: list[Tensor] = []
        own = [_open(value, theirs, inner) for value in args]
        named = {k: _open(v, theirs, inner) for k, v in (kwargs or {}).items() if k != "generator"}
        if kwargs and "generator" in kwargs:
            func = _without_generator(func)
        if "device" in named:
            named["device"] = _META
        named.pop("pin_memory", None)
        result = self._run(func, own, named, inner)
        made: list[Tensor] = []
        closed = _close(result, theirs, inner, made)
        for watcher in self.watchers:
            watcher(func, inner, made, (own, result))
        return closed

    def _run(self, func: Any, args: list[Any], named: dict[str, Any], inner: list[Tensor]) -> Any:
        """The operation on the meta device, or as it came out before for the same arguments."""
        key = (func, _key(args), *(part for k, v in named.items() for part in (k, _key(v))))
        try:
            specs = self._results.get(key)
        except TypeError:  # an argument that cannot be looked up
            return func(*args, **named)
        if specs is not None:
            made = [torch.empty_strided(*spec[:2], dtype=spec[2], device=_META) for spec in specs]
            return made[0] if len(made) == 1 else tuple(made)
        result = func(*args, **named)
        results = (result,) if isinstance(result, Tensor) else result
        if isinstance(results, tuple) and len(results) and all(_is_plain(r) for r in results):
            given = {tensor.untyped_storage()._cdata for tensor in inner}
            own = [tensor.untyped_storage()._cdata for tensor in results]
            if len({*given, *own}) == len(given) + len(own):
                self._results[key] = [(r.shape, r.stride(), r.dtype) for r in results]
        return result


# Not closures that call themselves: those are cycles, which keep what they saw alive.
def _open(value: Any, theirs: list[Tensor], inner: list[Tensor]) -> Any:
    """The meta tensors of an argument, noted beside what they stand for."""
    if isinstance(value, Tensor):
        meta = value.meta if isinstance(value, ShapeTensor) else _shape_of(value)
        inner.append(meta)
        theirs.append(value)
        return meta
    if isinstance(value, list | tuple):
        return [_open(item, theirs, inner) for item in value]
    return value


def _close(value: Any, theirs: list[Tensor], inner: list[Tensor], made: list[Tensor]) -> Any:
    """Shape tensors around a result; what came in as an argument is given back itself."""
    if isinstance(value, Tensor):
        for meta, given in zip(inner, theirs, strict=True):
            if value is meta:
                return given
        made.append(value)
        return ShapeTensor.of(value)
    if isinstance(value, list | tuple):
        return type(value)(_close(item, theirs, inner, made) for item in value)
    return value


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.storage_offset() == 0


def _key(value: Any) -> Any:
    """What a result's shape depends on; 1, 1.0 and True are not the same."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple([_key(item) for item in value])
    return value.__class__, value


def _without_generator(func: Any) -> Any:
    """The overload that takes no generator; the meta device has none."""
    name = func._overloadname.replace("generator_", "").replace("generator", "default")
    return getattr(func.overloadpacket, name or "default")


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)


def _one(dtype: torch.dtype) -> float | int | bool:
    if dtype is torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1
