"""A GPU for a machine without one: a stage does all that it does on GPUs only.

    python tests/pretend_gpu.py grpo.py --model ...   any stage and its flags; prints counts of use

Tensors stay in CPU memory, but those "on the GPU" say so, and what a GPU refuses fails: an
operation on tensors of both kinds, numpy() of a GPU tensor; and while a CUDA graph is captured, a
copy between devices or a wait for a result. Graphs replay the operations that were captured, on the
same memory. FSDP2 runs over gloo, with the GPU's bf16 compute, under torchrun too. The split-KV
kernel has a slow stand-in. Other kernels, streams, nccl and sizes of memory are not pretended.
"""

import contextlib
import importlib
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.distributed.device_mesh as device_mesh
import torch.distributed.fsdp  # before torch is changed below, as the next ones
import torch.distributed.tensor
import transformers.modeling_utils  # noqa: F401
from torch.distributed.fsdp import _fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plumbing.signals import guarded

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
places: dict[int, tuple[StorageWeakRef, torch.device]] = {}  # storage -> where it pretends to be
used, capturing = Counter(), []
real_empty, real_to, RealGenerator = torch.empty, torch.Tensor.to, torch.Generator

# These look at a tensor, or change what hangs on it, without computing: allowed anywhere.
LOOKS = set(
    """size dim __len__ __hash__ numel stride requires_grad_ is_floating_point is_complex
    element_size data_ptr untyped_storage storage_offset is_contiguous backward register_hook
    is_pinned _has_compatible_shallow_copy_type""".split()
)
WAITS = set("item tolist __bool__ __int__ __float__ __index__ nonzero cpu numpy".split())
FACTORIES = set("tensor zeros ones arange full from_numpy as_tensor frombuffer asarray".split())


def storage(tensor: torch.Tensor):
    tensor = getattr(tensor, "_local_tensor", tensor)  # a DTensor is where its part is
    return None if tensor.is_meta else tensor.untyped_storage()


def place(tensor: torch.Tensor) -> torch.device | None:
    """GPU or CPU. None if the tensor may be either: it was made where we do not look (autograd)."""
    reference, device = places.get(getattr(storage(tensor), "_cdata", None), (None, None))
    return None if reference is None or reference.expired() else device


def put(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if (memory := storage(tensor)) is not None:
        places[memory._cdata] = StorageWeakRef(memory), device
    return tensor


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def is_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def refuse_while_capturing(what: str):
    if capturing:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


def to(tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Tensor.to, where a change of place is a copy."""
    everything = (*args, kwargs.pop("device", None))
    names = [a for a in everything if isinstance(a, (str, torch.device))]
    names += [place(a) or CPU for a in args if isinstance(a, torch.Tensor)]
    if not names or tensor.is_meta or torch.device(names[0]).type == "meta":
        device = {"device": names[0]} if names and names[0] not in args else {}
        return real_to(tensor, *args, **kwargs, **device)
    dtypes = [a for a in (*args, kwargs.get("dtype")) if isinstance(a, torch.dtype)]
    new, before = (real_to(tensor, *dtypes) if dtypes else tensor), place(tensor)
    if is_gpu(names[0]) != (before == GPU):
        refuse_while_capturing("a copy between devices")
        used["copies"] += 1
        new = new.clone() if new is tensor else new
    return put(new, GPU if is_gpu(names[0]) else CPU)


def empty(*size, device=None, **options) -> torch.Tensor:
    if is_gpu(device):
        return put(real_empty(*size, **options), GPU)
    return real_empty(*size, device=device, **options)


def attribute(function, args, kwargs):
    """Read or set an attribute of a tensor."""
    name = getattr(getattr(function, "__self__", None), "__name__", "")
    reading = function.__name__ == "__get__"
    if reading and name in ("device", "is_cuda") and place(args[0]) == GPU:
        return GPU if name == "device" else True
    value = function(*args, **kwargs)
    if name == "grad" and reading and value is not None and place(args[0]):
        put(value, place(args[0]))
    return value


class PretendGPU(TorchFunctionMode):
    """Sees every call of torch from Python."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name in ("__get__", "__set__"):
            return attribute(function, args, kwargs)
        if name in LOOKS:
            return function(*args, **kwargs)
        wanted = kwargs.get("device")
        if is_gpu(wanted):
            kwargs["device"] = CPU
            if name == "tensor":
                refuse_while_capturing("torch.tensor of Python numbers on a GPU")
                used["copies"] += 1
        found = tensors((args, kwargs))
        gpu = [t for t in found if place(t) == GPU]
        cpu = [t for t in found if place(t) == CPU and t.dim() > 0]  # a number may be anywhere
        if name in WAITS and gpu:
            refuse_while_capturing(name)
            if name == "numpy":
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            if name == "cpu":
                return put(args[0].clone(), CPU)
        if name == "pin_memory":
            return args[0]
        if gpu and cpu and name == "__getitem__" and place(args[0]) == GPU:
            refuse_while_capturing("a copy of an index")  # else it may lie in CPU memory
            used["copies"] += 1
        elif gpu and cpu and name != "copy_":
            where = [(str(place(t)), tuple(t.shape)) for t in found]
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices in "
                f"{name}: {where}"
            )
        result = function(*args, **kwargs)
        used["operations"] += bool(gpu)
        if name != "copy_" and (wanted is not None or gpu or cpu or name in FACTORIES):
            for tensor in tensors(result):
                put(tensor, GPU if is_gpu(wanted) or gpu and wanted is None else CPU)
        return result


def split_kv(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None,
    window_size=None, enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):
    """What the kernel of varlen_attn computes for one query per row, refusing what it refuses."""
    rows, heads, width = query.shape
    indices = (cu_seq_q, cu_seq_k, seqused_k)
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in indices)
    assert [len(x) for x in indices] == [rows + 1, rows + 1, rows] and block_table is None
    assert cu_seq_q.tolist() == list(range(rows + 1)) and max_q == 1
    assert window_size is None or list(window_size) == [-1, -1]
    assert 2 <= num_splits <= 8 and enable_gqa and width % 8 == 0 and heads > key.shape[1]
    assert int(seqused_k.max()) <= max_k and query.stride(-1) == key.stride(-1) == 1
    used["split_kv"] += 1
    place = torch.arange(int(seqused_k.max()), device=key.device)
    seen = (cu_seq_k[:-1, None] + place).clamp_max(len(key) - 1)  # (B, S)
    keys, values = (
        x[seen].float().repeat_interleave(heads // x.shape[1], dim=2) for x in (key, value)
    )
    scores = torch.einsum("bhd,bshd->bhs", query.float(), keys) * (scale or width**-0.5)
    scores = scores.masked_fill(place >= seqused_k[:, None, None], -torch.inf)
    out = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), values).to(query.dtype)
    return out, query.new_empty(heads, rows).float(), torch.zeros(2, dtype=torch.uint64)


def pretend_split_kv():
    """Let varlen_attn compute on a CPU, for good."""
    from torch.nn.attention.varlen import _varlen_attn

    _varlen_attn.register_kernel("cpu")(split_kv)


class Graph:
    """What torch.cuda.CUDAGraph does: the captured operations again, on the memory they had."""

    def __init__(self):
        self.calls = []

    def pool(self):
        return "pool"

    def replay(self):
        used["replays"] += 1
        for function, args, kwargs, before in self.calls:
            for old, new in zip(tensors(before), tensors(function(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                    old.copy_(new)


class Capture(TorchDispatchMode):
    """What torch.cuda.graph does.

    Unlike there, the operations do run. A replay writes again what they have written.
    """

    def __init__(self, graph: Graph, pool=None):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, result))
        return result

    def __enter__(self):
        used["captures"] += 1
        capturing.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        capturing.pop()
        return super().__exit__(*error)


def pretend():
    """Change torch, for good: call it in a process that does nothing else."""
    cuda = dict(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        get_device_name=lambda i=0: "a pretended GPU",
        empty_cache=lambda: None,
        mem_get_info=lambda device=None: (4 * 10**9, 80 * 10**9),
        CUDAGraph=Graph,
        graph=Capture,
        current_stream=lambda: None,
        stream=contextlib.nullcontext,
    )
    for name, value in cuda.items():
        setattr(torch.cuda, name, value)
    pretend_split_kv()
    torch.Tensor.to, torch.empty = to, empty
    torch.Generator = lambda device=None: RealGenerator()
    start_group, make_mesh = dist.init_process_group, device_mesh.init_device_mesh
    dist.init_process_group = lambda backend, **options: start_group("gloo", **options)
    device_mesh.init_device_mesh = lambda kind, *args, **kwargs: make_mesh("cpu", *args, **kwargs)
    handle = device_mesh._get_device_handle
    inside = dict(
        _get_device_from_mesh=lambda mesh: GPU, _get_device_handle=lambda kind: handle("cpu")
    )
    parts = "_fully_shard _fsdp_init _fsdp_param _fsdp_param_group _fsdp_state _fsdp_collectives"
    for part in parts.split():
        module = importlib.import_module(f"{_fully_shard.__name__}.{part}")
        for name, value in inside.items():
            if hasattr(module, name):
                setattr(module, name, value)


if __name__ == "__main__":
    pretend()
    stage = importlib.import_module(Path(sys.argv.pop(1)).stem)

    def main():
        with PretendGPU():
            stage.main()
        print(json.dumps(used))

    guarded(main)
