"""Counts the bytes that are alive while code runs, and its operations; on shapes alone, too."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from twostep.runtime.shape_tensors import ShapesOnly

# torch knows how many operations CUDA's attention kernels take; shapes alone call the CPU's.
_OPERATIONS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ],
}
_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}
# Growth of what is alive that is worth a collection.
_NEW_PEAK = 1.05


class LiveBytes:
    """Bytes of the storages that came alive inside and still are, and the most there were.

    Also counts operations, since torch's own counter keeps tensors alive.
    """

    def __init__(self) -> None:
        self.now = self.peak = self.operations = 0
        self._collected_at = 0.0
        # Marks tensors whose storage is known; operations' formulas by id.
        self._mark = object()
        self._formulas: dict[int, tuple[Any, Any]] = {}
        self._products: dict[Any, int] = {}
        self._known: dict[int, weakref.ref[Any]] = {}

    def saw(
        self,
        func: Any,
        given: Sequence[Tensor],
        made: Iterable[Tensor],
        call: tuple[Sequence[Any], Any],
    ) -> None:
        """Counts one operation on `given`, of which `made` came; `call` is arguments and result."""
        args, result = call
        # What first comes up as an argument was there before: a view of it is nothing new.
        mark = self._mark
        for tensor in given:
            if getattr(tensor, "known_by", None) is not mark:
                self._add(tensor.untyped_storage(), 0)
                tensor.known_by = mark  # type: ignore[attr-defined]
        for tensor in made:
            storage = tensor.untyped_storage()
            self._add(storage, storage.nbytes())
            tensor.known_by = mark  # type: ignore[attr-defined]
        found = self._formulas.get(id(func))
        if found is None:
            found = func, _OPERATIONS.get(func._overloadpacket)
            self._formulas[id(func)] = found
        if found[1] is None:
            return
        if func._overloadpacket in _PRODUCTS:
            # Of shapes alone, and torch's formula takes longer than all else here.
            key = id(func), *[tensor.shape for tensor in given]
            if key not in self._products:
                self._products[key] = int(found[1](*args, out_val=result))
            self.operations += self._products[key]
        else:
            self.operations += int(found[1](*args, out_val=result))

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        if not size:
            return
        self.now += size
        if self.now > _NEW_PEAK * self._collected_at:
            # What only a cycle still holds is no peak, whoever ran in this process before.
            gc.collect()
            self._collected_at = self.now
        self.peak = max(self.peak, self.now)


class _Watching(TorchDispatchMode):
    """Tells `live` of operations on ordinary tensors."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self.live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Before it runs: what it makes may be a view of what goes in.
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.live.saw(func, given, made, (args, result))
        return result


@contextmanager
def live_bytes() -> Iterator[LiveBytes]:
    """Counts what runs inside, on ordinary tensors or on those of an active `ShapesOnly`."""
    live, mode = LiveBytes(), _get_current_dispatch_mode()
    gc.collect()
    gc.freeze()  # so that collections look at what is new only
    automatic = gc.isenabled()
    gc.disable()  # `LiveBytes` collects where it matters
    try:
        if isinstance(mode, ShapesOnly):
            mode.watchers.append(live.saw)
            try:
                yield live
            finally:
                mode.watchers.remove(live.saw)
        else:
            with _Watching(live):
                yield live
    finally:
        gc.unfreeze()
        if automatic:
            gc.enable()


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of the modules' parameters and buffers, shared ones once."""
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@contextmanager
def gradients_dropped(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, a parameter's gradient is let go as soon as it is there.

    What is alive is then activations alone; gradients that stay are as large as the parameters.
    """

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
