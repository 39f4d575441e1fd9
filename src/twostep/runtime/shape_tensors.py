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
# Shape, strides and type of a tensor.
_Spec = tuple[torch.Size, tuple[int, ...], torch.dtype]
# An operation, the tensors that go in and come out (all of the meta device), arguments and result.
Watcher = Callable[[Any, list[Tensor], list[Tensor], tuple[Sequence[Any], Any]], None]
# A number for each spec, which is compared faster.
_NUMBERS: dict[_Spec, int] = {}


class ShapeTensor(Tensor):
    """Stands for `meta`, a tensor of the meta device, whose storage lives as long as it does.

    Attributes:
        number: of its spec.
    """

    meta: Tensor
    number: int

    @staticmethod
    def of(meta: Tensor, spec: _Spec | None = None, number: int = -1) -> ShapeTensor:
        """Around a tensor of the meta device; `spec` and its number, if they are known."""
        offset: Any = 0
        if spec is None:
            spec, offset = _spec_of(meta), meta.storage_offset()
            number = _number(spec)
        made: ShapeTensor = Tensor._make_wrapper_subclass(
            ShapeTensor,
            spec[0],
            strides=spec[1],
            storage_offset=offset,
            dtype=spec[2],
            device=CPU,
        )
        made.meta, made.number = meta, number
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
        self._results: dict[Any, tuple[Any, list[tuple[_Spec, int]]] | None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled; guarding each operation against it takes an eighth longer."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _READ:
            return _one(args[0].dtype)
        if kwargs and "generator" in kwargs:
            func = _without_generator(func)
        theirs: list[Tensor] = []
        inner: list[Tensor] = []
        # What a result's shape depends on; 1, 1.0 and True are not the same.
        key: list[Any] = [id(func)]
        own = [_open(value, theirs, inner, key) for value in args]
        named: dict[str, Any] = {}
        for name, value in (kwargs or {}).items():
            if name not in ("generator", "pin_memory"):
                key.append(name)
                named[name] = _open(value, theirs, inner, key)
        if "device" in named:
            named["device"] = _META
        try:
            known = self._results.get(tuple(key))
        except TypeError:  # an argument that cannot be looked up
            key, known = [], None
        made: list[Tensor] = []
        result: Any
        if known is not None:
            made = [torch.empty_strided(s[0], s[1], dtype=s[2], device=_META) for s, _ in known[1]]
            closed = [ShapeTensor.of(m, s, n) for m, (s, n) in zip(made, known[1], strict=True)]
            result = made[0] if len(made) == 1 else tuple(made)
            closed_result: Any = closed[0] if len(closed) == 1 else tuple(closed)
        else:
            result = func(*own, **named)
            if key:
                self._remember(func, tuple(key), inner, result)
            closed_result = _close(result, theirs, inner, made)
        for watcher in self.watchers:
            watcher(func, inner, made, (own, result))
        return closed_result

    def _remember(self, func: Any, key: Any, inner: list[Tensor], result: Any) -> None:
        """How it came out for these arguments, if it is nothing but new tensors."""
        results = (result,) if isinstance(result, Tensor) else result
        if isinstance(results, tuple) and len(results) and all(_is_plain(r) for r in results):
            given = {tensor.untyped_storage()._cdata for tensor in inner}
            own = [tensor.untyped_storage()._cdata for tensor in results]
            if len({*given, *own}) == len(given) + len(own):
                specs = [_spec_of(r) for r in results]
                # The operation itself, so that no other one gets its id.
                self._results[key] = func, [(spec, _number(spec)) for spec in specs]


def _spec_of(tensor: Tensor) -> _Spec:
    return tensor.shape, tensor.stride(), tensor.dtype


def _number(spec: _Spec) -> int:
    return _NUMBERS.setdefault(spec, len(_NUMBERS))


# Not closures that call themselves: those are cycles, which keep what they saw alive.
def _open(value: Any, theirs: list[Tensor], inner: list[Tensor], key: list[Any]) -> Any:
    """The meta tensors of an argument, noted beside what they stand for, and its part of the key.

    A tensor is a number in it, anything else its class and itself.
    """
    if isinstance(value, ShapeTensor):
        inner.append(value.meta)
        theirs.append(value)
        key.append(value.number)
        return value.meta
    if isinstance(value, Tensor):
        meta = _shape_of(value)
        inner.append(meta)
        theirs.append(value)
        key.append(_number(_spec_of(value)))
        return meta
    kind = value.__class__
    key.append(kind)
    if kind is list or kind is tuple or isinstance(value, list | tuple):
        key.append(len(value))
        return [_open(item, theirs, inner, key) for item in value]
    key.append(value)
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
