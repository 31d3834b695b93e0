"""A second device without hardware, `fake:0`: tensors in CPU memory that are held apart from the CPU's.

    with SecondDevice() as device:
        model.to("fake")  # what mixes its tensors with the CPU's raises, as on a GPU
    device.syncs  # how often the host waited for the device, by line of the package

Tensors that are made there are marked by their storage. Inside the block their `device` says so and every operation is
checked. The kernels are the CPU's, so results must have the CPU's bits. The name is torch's for a backend of others
(PrivateUse1), renamed in the whole process: use it in a process of its own.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = (str(ROOT / "optimum_barber"), str(ROOT / "integrations"))
NAME = "fake"
aten = torch.ops.aten
SYNCS = {  # the host reads a value, or the size of the result depends on one
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten.bincount.default, aten._unique2.default, aten.unique_consecutive.default, aten.unique_dim.default,
    aten.repeat_interleave.Tensor, aten._linalg_check_errors.default, aten._linalg_eigh.default,
}  # fmt: skip
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Stream(torch.Stream):
    """A stream that does its work at once."""

    def record_event(self, event=None):
        return event

    def wait_event(self, event):
        pass


class Backend:
    """The module `torch.fake`."""

    Stream = current_stream = Stream

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def manual_seed_all(self, seed):
        pass

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    @contextmanager
    def stream(self, stream):
        yield stream


@cache
def registered():
    """The device, which torch knows from now on."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
    return torch.device(NAME, 0)


def tensors_in(*nested):
    """All tensors in nested sequences."""
    for part in nested:
        for item in part:
            if isinstance(item, Tensor):
                yield item
            elif isinstance(item, list | tuple):
                yield from tensors_in(item)


def caller():
    """The line of the package that is at work."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}" if frame else "elsewhere"


class SecondDevice:
    """Context manager in which the device is there.

    Attributes:
        syncs: how often the host waited for the device, by line of the package.
        copies: how often a tensor was copied to the device or from it, by direction and line.
    """

    def __init__(self):
        self.syncs, self.copies = Counter(), Counter()
        self._storages = {}  # by address, which is not used again while the weak reference is held
        self.at_work = False
        self._modes = FunctionMode(self), OperationMode(self)

    def __enter__(self):
        registered()
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    @contextmanager
    def working(self):
        """Inside a function of torch that works on the device, which makes further tensors where its own are."""
        before, self.at_work = self.at_work, True
        try:
            yield
        finally:
            self.at_work = before

    def holds(self, tensor):
        """Whether it is a tensor of the device."""
        if tensor.is_meta or tensor.layout != torch.strided:
            return False
        return tensor.untyped_storage()._cdata in self._storages

    def add(self, tensor):
        """Make it a tensor of the device."""
        if len(self._storages) > 10_000:
            self._storages = {key: held for key, held in self._storages.items() if not held.expired()}
        storage = tensor.untyped_storage()
        if not tensor.is_meta and storage._cdata not in self._storages:
            self._storages[storage._cdata] = StorageWeakRef(storage)

    def synced(self):
        self.syncs[caller()] += 1

    def copied(self, there, here):
        """Count a copy; True is the device, False the CPU."""
        if there != here:
            self.copies[f"{'to' if here else 'from'} device, {caller()}"] += 1
        if there and not here:
            self.synced()


class FunctionMode(DeviceContext):
    """What a tensor is asked without an operation: its device, its numbers, itself on another device.

    Gradients are computed without modes; torch's checkpointing restores those of this class while it recomputes.
    """

    __enter__, __exit__ = TorchFunctionMode.__enter__, TorchFunctionMode.__exit__

    def __init__(self, owner):
        super().__init__(torch.device("cpu"))
        self.owner = owner

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")  # torch would copy the numbers there without an operation to be seen
            return function(*args, **kwargs).to(device)
        if not any(map(self.owner.holds, tensors_in(args, kwargs.values()))):
            return function(*args, **kwargs)
        if getattr(function, "__self__", None) is Tensor.device:
            return registered()
        name = getattr(function, "__name__", "")
        own = function is Tensor.to or (isinstance(args[0], Tensor) and self.owner.holds(args[0]))
        answer = getattr(self, f"_{name.strip('_')}", None) if own else None
        with self.owner.working():
            return function(*args, **kwargs) if answer is None else answer(*args, **kwargs)

    def _to(self, tensor, *args, **kwargs):
        device, dtype = self.destination(*args, **kwargs)
        here = self.owner.holds(tensor)
        if device is None or here == (device.type == NAME):
            return tensor.to(dtype or tensor.dtype, copy=kwargs.get("copy", False))
        return aten._to_copy.default(tensor, dtype=dtype, device=device)

    def destination(self, first=None, *rest, device=None, dtype=None, **_):
        """Which device and dtype `Tensor.to` is to give, None for the tensor's own."""
        if isinstance(first, Tensor):
            return registered() if self.owner.holds(first) else first.device, first.dtype
        for value in (first, *rest):
            if isinstance(value, torch.dtype):
                dtype = value
        device = first if isinstance(first, str | torch.device) else device
        return None if device is None else torch.device(device), dtype

    def _cpu(self, tensor):
        return self._to(tensor, "cpu")

    def _tolist(self, tensor):
        self.owner.synced()
        return tensor.tolist()

    def _deepcopy(self, tensor, memo):
        copy = tensor.__deepcopy__(memo)
        self.owner.add(copy)
        return copy

    def _numpy(self, tensor, **kwargs):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")

    _array = _numpy

    def _record_stream(self, tensor, stream):
        pass

    def _get_device(self, tensor):
        return 0


class OperationMode(TorchDispatchMode):
    """Operations: those of the device's tensors give tensors of the device, and take no others."""

    def __init__(self, owner):
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = list(tensors_in(args, kwargs.values()))
        inputs = [self.owner.holds(tensor) for tensor in tensors]
        if operation is aten.copy_.default:
            self.owner.copied(there=inputs[1], here=inputs[0])
            return operation(*args, **kwargs)
        there = any(inputs)
        here = self.makes(there, kwargs.get("device"), bool(tensors))
        if operation is aten._to_copy.default:
            self.owner.copied(there, here)
        if there:
            self.check(operation, tensors, inputs)
        if here and isinstance(kwargs.get("generator"), torch.Generator):
            raise RuntimeError(f"Expected a {NAME!r} device type for generator but found 'cpu'")
        if here and "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        result = operation(*args, **kwargs)
        if here:
            for tensor in tensors_in([result]):
                self.owner.add(tensor)
        return result

    def makes(self, there, device, takes):
        """Whether the result is the device's, by the inputs', what is asked for, and whether there are inputs."""
        inherits = self.owner.at_work and not takes
        return inherits or (there if device is None else device.type == NAME)

    def check(self, operation, tensors, inputs):
        """Count the syncs of an operation; refuse it if it mixes devices, but for numbers and indices."""
        strangers = []
        for tensor, ours in zip(tensors, inputs, strict=True):
            if not ours and tensor.dim():
                strangers.append(tensor)
        if operation == torch.ops.aten.is_same_size.default:  # looks at shapes alone
            return
        if strangers and not (operation in INDEXED and inputs[0]):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {operation} got {NAME}:0 and cpu")
        for _ in strangers:
            self.owner.copied(there=False, here=True)
        masked = operation in INDEXED and any(tensor.dtype == torch.bool for tensor in tensors[1:])
        if operation in SYNCS or masked:
            self.owner.synced()
