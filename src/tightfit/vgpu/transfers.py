"""Copies between the host, which has real tensors, and the virtual card."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.kernels.cost import kernel_of
from tightfit.kernels.temporaries import Argument, Options
from tightfit.vgpu.fakes import compressed_parts, has_fake, plain
from tightfit.vgpu.untouched import copied_lazily, is_untouched

if TYPE_CHECKING:
    from tightfit.vgpu.device import VirtualDevice


class Transfers:
    """Operators that copy from one to the other, or within one of them."""

    def __init__(self, card: "VirtualDevice") -> None:
        self._card = card

    def across(
        self,
        func: OpOverload,
        source: Tensor,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        memory_format: torch.memory_format | None = None,
        **kwargs: Argument,
    ) -> Argument:
        """Run `_to_copy`."""
        target = source.device.type if device is None else device.type
        if dtype is not None:
            kwargs["dtype"] = dtype
        if memory_format is not None:
            kwargs["memory_format"] = memory_format
        if target == "cuda":
            self._card.check_ordinal(None if device is None else device.index)
            if isinstance(source, FakeTensor):
                return self._card.execute(func, (source,), {**kwargs, "device": self._card.where})
            with self._card.fake.lock:
                return self._upload(plain(source), func, dtype or source.dtype, memory_format or torch.preserve_format)
        if device is not None:
            kwargs["device"] = device
        if isinstance(source, FakeTensor) and target == "cpu":
            if source.fake_device.type == "cpu":
                return self._card.without_data(func, (source,), kwargs)
            return self._card.values.on_host(source, dtype or source.dtype)
        if target == "cpu" and (lazy := copied_lazily(source, dtype, memory_format)) is not None:
            return lazy
        out: Argument = func(source, **kwargs)
        return out

    def cloned(self, func: OpOverload, source: Tensor, *, memory_format: torch.memory_format | None = None) -> Argument:
        """Run `clone`."""
        options: Options = {} if memory_format is None else {"memory_format": memory_format}
        if has_fake((source,)):
            return self._card.execute(func, (source,), options)
        lazy = copied_lazily(source, memory_format=memory_format)
        out: Argument = func(source, **options) if lazy is None else lazy
        return out

    def _upload(
        self,
        source: Tensor,
        func: OpOverload,
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> Tensor:
        """Return a copy of a host tensor on the device."""
        if source.layout != torch.strided:
            return self._upload_sparse(source, func, dtype)
        phase = self._card.phases.now()
        with self._card.fake:
            strides = torch.empty_like(source, device="meta", memory_format=memory_format).stride()
            out = torch.empty_strided(source.shape, strides, dtype=dtype, device=self._card.where)
        self._card.track(out, func, (source,), phase)
        if not isinstance(source, nn.Parameter) and phase != "setup":
            self._card.recorder.mark(out, "inputs")
        self._card.values.learn(out, source)
        return out

    def _upload_sparse(self, source: Tensor, func: OpOverload, dtype: torch.dtype) -> Tensor:
        if source.layout == torch.sparse_coo:
            values, indices = (
                self._upload(source._values(), func, dtype),
                self._upload(source._indices(), func, torch.int64),
            )
            with self._card.fake:
                return torch.sparse_coo_tensor(
                    indices, values, source.shape, is_coalesced=source.is_coalesced(), check_invariants=False
                )
        *places, values = compressed_parts(source)
        parts = [torch.empty_like(each, device="meta") for each in (*places, values.to(dtype))]
        make: Callable[..., Tensor] = torch.sparse_compressed_tensor
        made = make(*parts, source.shape, layout=source.layout, check_invariants=False)
        out = FakeTensor(self._card.fake, made, self._card.where)  # fake tensors cannot be made into one
        self._card.track(out, func, (source,), self._card.phases.now())
        return out

    def into(self, func: OpOverload, target: Tensor, source: Tensor | complex, *rest: Argument) -> Argument:
        """Run `copy_`; of a number, which torch makes a tensor of the host."""
        if not isinstance(source, Tensor):
            source = torch.tensor(source, device="cpu")
        args = (target, source, *rest)
        to_host = target.device.type == "cpu"
        if (
            to_host
            and self._card.observer
            and isinstance(source, FakeTensor)
            and (copy := kernel_of(func, args, {}, target))
        ):
            self._card.observer(copy)
        if not isinstance(target, FakeTensor):
            if not isinstance(source, FakeTensor):
                if not (is_untouched(source) and is_untouched(target)):
                    func(*args)
            elif source.fake_device.type == "cuda":
                target.copy_(self._card.values.on_host(source, target.dtype))
            return target
        if to_host:
            return target  # a parameter without data
        if isinstance(source, FakeTensor):
            return self._card.execute(func, args, {})
        self._card.values.follow(func, args, {}, target)
        return target
