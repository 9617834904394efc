"""A host with two GPUs that there are not: tensors on them compute on the CPU, and behave as on a GPU where it shows.

Products of tensors on two devices are errors, `.numpy()` is one, kernels are chosen as on CUDA, streams, events and
graphs exist, and the allocator counts. Emulated is what torch tells and refuses, not how a GPU computes: numbers are
those of the CPU, and a kernel that CUDA alone has is stood in for (`STAND_INS`).
"""

import contextlib
import time
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default,
           aten._unsafe_index.Tensor}  # fmt: skip
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}
GRAPH_BROKEN = "operation not permitted when stream is capturing"
# Of the operations that throw under torch.use_deterministic_algorithms (its docstring has the list), those of decoders
UNDETERMINED = {"aten::nll_loss2d_forward", "aten::histc", "aten::put_", "aten::median.dim", "aten::kthvalue"}


class _Held:
    """A tensor in the emulated memory of a device; while one lives, its storage is allocated there."""

    def __init__(self, tensor, device, host):
        self.tensor, self.device, self.host = tensor, device, host
        self.storage = tensor.untyped_storage().data_ptr()
        host.hold(self)

    def __del__(self):
        self.host.release(self)


class OnCuda(torch.Tensor):
    """A tensor whose device is an emulated GPU."""

    @staticmethod
    def __new__(cls, held):
        real = held.tensor
        shell = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="meta")
        self = torch.Tensor._make_subclass(cls, shell)
        self.held = held
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        raise RuntimeError(f"{function} on a tensor of an emulated GPU that has been switched off")

    @property
    def device(self):
        return self.held.device

    def untyped_storage(self):
        return self.held.tensor.untyped_storage()

    def __setitem__(self, index, value):
        if not isinstance(value, torch.Tensor):  # C++ would make it on the device that it takes this tensor to be on
            value = torch.tensor(value, dtype=self.dtype).to(self.device)
        super().__setitem__(index, value)

    def data_ptr(self):
        return self.held.tensor.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.held.tensor.clone().__reduce_ex__(protocol)

    @property
    def is_cuda(self):
        return True

    @property
    def is_meta(self):
        return False

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        requires, gradient = self.requires_grad, self.grad
        self.requires_grad_(False)
        if isinstance(value, OnCuda):
            torch.Tensor.data.__set__(self, OnCuda(value.held))
            self.held = value.held
        else:
            raise NotImplementedError("moving by .data")
        self.requires_grad_(requires)
        self.grad = gradient

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = self.detach().clone()
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]


def _host_of(value):
    return value.held.tensor if isinstance(value, OnCuda) else value


class EmulatedHost(TorchDispatchMode):
    """See the module; a context manager. `capabilities` are those of its GPUs."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __init__(self, capabilities=((8, 0), (8, 0))):
        super().__init__()
        self.capabilities, self.count, self.current = capabilities, len(capabilities), 0
        self.asked = []  # (function, index of the device) of every call that is about a device
        self.storages = {}
        self.peaks = dict.fromkeys(range(self.count), 0)
        self.tape = None
        self.functions = set()

    # --- tensors ------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is torch.ops.prim.device.default:
            return torch.device("meta")
        if function._can_decompose():  # under inference_mode
            with self:
                return function.decompose(*arguments, **options)
        given = [t for t in tree_iter((arguments, options)) if isinstance(t, torch.Tensor)]
        devices = {t.held.device for t in given if isinstance(t, OnCuda)}
        target = options.get("device")
        if devices and target is not None and target.type == "meta":  # what C++ takes for the device of an argument
            options, target = {key: value for key, value in options.items() if key != "device"}, None
        on_cuda = target is not None and target.type == "cuda"
        if not devices and not on_cuda:
            return function(*arguments, **options)
        self._check(function, arguments, given, devices)
        if self.tape is not None and (function in WAITS or (target is not None and target.type == "cpu")):
            raise RuntimeError(f"{function}: {GRAPH_BROKEN}")
        if on_cuda:
            options = {**options, "device": torch.device("cpu")}
            where = torch.device("cuda", self.current if target.index is None else target.index)
        else:
            where = None if target is not None else next(iter(devices))
        self.functions.add(function)
        if function is aten._to_copy.default and devices == {where} and options.get("dtype") in (None, given[0].dtype):
            return OnCuda(given[0].held)  # it is there
        found = self._run(function, arguments, options, where)
        if self.tape is not None:
            self.tape.append((function, arguments, options, found))
        return found

    def _run(self, function, arguments, options, where):
        wrappers = {id(t.held.tensor): t for t in tree_iter((arguments, options)) if isinstance(t, OnCuda)}
        stand_in = STAND_INS.get(function.name().removeprefix("aten::"), function)
        with torch.inference_mode(False), torch.no_grad():
            return self._wrapped(stand_in, arguments, options, where, wrappers)

    def _wrapped(self, function, arguments, options, where, wrappers):
        made = function(*tree_map(_host_of, arguments), **tree_map(_host_of, options))

        def wrap(value):
            if not isinstance(value, torch.Tensor) or where is None or isinstance(value, OnCuda):
                return value
            return wrappers.get(id(value)) if id(value) in wrappers else OnCuda(_Held(value, where, self))

        return tree_map(wrap, made)

    def _check(self, function, arguments, given, devices):
        if function in COPIES:
            return
        if function in INDEXED:
            owner = arguments[0]
            if not isinstance(owner, OnCuda) and devices:
                raise RuntimeError(f"{function}: indices on {devices} of a tensor on {owner.device}")
            given = [t for t in given if isinstance(t, OnCuda)]
        elsewhere = {t.device for t in given if not isinstance(t, OnCuda) and t.dim()}
        if len(devices | elsewhere) > 1:
            raise RuntimeError(
                f"{function}: expected all tensors to be on the same device, but found {devices | elsewhere}"
            )
        if torch.are_deterministic_algorithms_enabled():
            name = function.name()
            floating = any(t.is_floating_point() for t in given)
            if name in UNDETERMINED or (name == "aten::cumsum" and floating):
                raise RuntimeError(f"{name} does not have a deterministic implementation")

    # --- memory -------------------------------------------------------------------------------------------------------

    def hold(self, held):
        key = (held.device.index, held.storage)
        count, _ = self.storages.get(key, (0, 0))
        self.storages[key] = (count + 1, held.tensor.untyped_storage().nbytes())
        self.peaks[key[0]] = max(self.peaks[key[0]], self.allocated(key[0]))

    def release(self, held):
        key = (held.device.index, held.storage)
        count, size = self.storages[key]
        if count > 1:
            self.storages[key] = (count - 1, size)
        else:
            del self.storages[key]

    def _memory_stats(self, device=None):
        index = self.ask("memory_stats", device)
        return {"requested_bytes.all.current": self.allocated(index), "requested_bytes.all.peak": self.peaks[index]}

    def allocated(self, index):
        return sum(size for (on, _), (_, size) in self.storages.items() if on == index)

    # --- torch.cuda ---------------------------------------------------------------------------------------------------

    def ask(self, name, device=None):
        """The index that a call of torch.cuda is about."""
        index = device if device is None or isinstance(device, int) else torch.device(device).index
        index = self.current if index is None else index
        assert index < self.count, f"torch.cuda.{name}: there is no GPU {index}"
        self.asked.append((name, index))
        return index

    def patch(self, patch):
        """Let torch.cuda tell of this host, as long as the patch lasts."""

        def exchange(index):
            before, self.current = self.current, self.current if index < 0 else index
            return before

        def reset(device=None):
            index = self.ask("reset_peak_memory_stats", device)
            self.peaks[index] = self.allocated(index)

        def properties(device=None):
            major, minor = self.capabilities[self.ask("get_device_properties", device)]
            return SimpleNamespace(name="Emulated GPU", total_memory=16 * 2**30, major=major, minor=minor, uuid="e-1")

        answers = {
            "is_available": lambda: True, "device_count": lambda: self.count, "current_device": lambda: self.current,
            "_exchange_device": exchange, "_maybe_exchange_device": exchange, "_lazy_init": lambda: None,
            "is_initialized": lambda: True, "empty_cache": lambda: None, "manual_seed_all": lambda seed: None,
            "set_device": self._refuse_to_set, "reset_peak_memory_stats": reset,
            "synchronize": lambda device=None: self.ask("synchronize", device) and None,
            "get_device_capability": lambda d=None: self.capabilities[self.ask("get_device_capability", d)],
            "get_device_name": lambda d=None: properties(d).name, "get_device_properties": properties,
            "mem_get_info": lambda d=None: (15 * 2**30, properties(d).total_memory),
            "memory_allocated": lambda d=None: self.allocated(self.ask("memory_allocated", d)),
            "memory_stats": self._memory_stats,
            "max_memory_allocated": lambda d=None: self.peaks[self.ask("max_memory_allocated", d)],
            "get_rng_state": lambda d="cuda": torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda state, d="cuda": None,
            "is_bf16_supported": lambda *_: self.capabilities[self.current] >= (8, 0),
            "Event": _Event, "Stream": type("Stream", (_Stream,), {"host": self}),
            "current_stream": lambda device=None: _Stream.on(self, self.ask("current_stream", device)),
            "stream": self._stream, "CUDAGraph": type("CUDAGraph", (_Graph,), {"host": self}), "graph": self._capture,
        }  # fmt: skip
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(torch, "tensor", _tensor_by_copy(torch.tensor))
        patch.setattr(torch, "where", _of_tensors(torch.where))
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        patch.setattr(torch.cuda.random, "get_rng_state", answers["get_rng_state"])
        patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
        torch._C._ensureCUDADeviceGuardSet()

    def _refuse_to_set(self, device):
        raise AssertionError(f"torch.cuda.set_device({device}): the current device is that of the process")

    @contextlib.contextmanager
    def _stream(self, stream):
        before, self.current = self.current, stream.index
        yield
        self.current = before

    @contextlib.contextmanager
    def _capture(self, graph, **_):
        self.ask("graph")
        self.tape = []
        try:
            yield
            graph.tape = self.tape
        finally:
            self.tape = None


class _Event:
    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


class _Stream:
    host = None

    def __init__(self, device=None):
        self.index = self.host.ask("Stream", device)

    @classmethod
    def on(cls, host, index):
        stream = cls.__new__(cls)
        stream.index = index
        return stream

    def wait_stream(self, other):
        assert self.index == other.index, "streams of two devices"


class _Graph:
    """What was captured runs again on the same tensors, whatever Python would decide now."""

    host = tape = None

    def replay(self):
        for function, arguments, options, found in self.tape:
            where = next((t.held.device for t in tree_iter(found) if isinstance(t, OnCuda)), None)
            again = self.host._run(function, arguments, options, where)
            for before, now in zip(tree_iter(found), tree_iter(again), strict=True):
                if isinstance(before, OnCuda) and before is not now:
                    before.held.tensor.copy_(now.held.tensor)


def _tensor_by_copy(tensor):
    """torch.tensor makes what it makes out of sight of modes."""

    def made(data, *, device=None, **more):
        return tensor(data, **more) if device is None else tensor(data, **more).to(device)

    return made


def _of_tensors(where):
    """torch.where puts numbers on the device that C++ takes its condition to be on."""

    def chosen(condition, *choices, **more):
        kinds = [choice.dtype for choice in choices if isinstance(choice, torch.Tensor)]
        choices = [
            torch.full((), choice, dtype=kinds[0]) if kinds and not isinstance(choice, torch.Tensor) else choice
            for choice in choices
        ]
        return where(condition, *choices, **more)

    return chosen


def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention by its definition: torch's own makes tensors out of sight of modes."""
    assert not dropout_p
    if enable_gqa:
        k, v = (each.repeat_interleave(q.shape[-3] // each.shape[-3], -3) for each in (k, v))
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1, dtype=torch.float32).nan_to_num().to(q.dtype) @ v


def _int4_pack(codes, inner):
    rows, half = codes.shape
    return codes.contiguous().view(torch.int32).view(rows // 8, 2 * half // (inner * 16), 32, inner // 2)


def _int4_product(x, layout, group, scales_and_offsets):
    columns = layout.shape[1] * 16 * layout.shape[3] * 2
    codes = layout.contiguous().view(torch.uint8).view(-1, columns // 2)
    q = torch.stack([codes >> 4, codes & 15], -1).flatten(1).float()
    scales, offsets = scales_and_offsets.float().transpose(0, 1).repeat_interleave(group, 1).unbind(-1)
    return (x.float() @ ((q - 8) * scales + offsets).t()).to(x.dtype)


def _int8_product(x, layout, scales):
    return ((x.float() @ layout.float().t()) * scales.float()).to(x.dtype)


STAND_INS = {
    "_convert_weight_to_int4pack": _int4_pack,
    "_weight_int4pack_mm": _int4_product,
    "_weight_int8pack_mm": _int8_product,
}


@contextlib.contextmanager
def emulated_host(patch, **options):
    """`EmulatedHost` with torch.cuda patched by a MonkeyPatch."""
    from compression.layers.kernels import torch_products

    host = EmulatedHost(**options)
    with patch.context() as inner, host:
        host.patch(inner)
        inner.setattr(torch_products, "missing_op", lambda op, spec: None)
        inner.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
        yield host
