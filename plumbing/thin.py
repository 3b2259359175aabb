"""--tp N: rollouts on a thinner model, where no GPU holds a whole one beside its training state.

N neighbouring ranks are a group. Each holds the same transformers class with 1/N of the heads, key
heads and MLP width. After o_proj and down_proj the group adds up its parts: two all-reduces per
layer (arXiv 1909.08053). Embeddings, output layer and norms stay whole. A group samples for the
questions of all its ranks, one token at a time in lockstep, and then each rank keeps its own trees.

In lockstep every rank must make the same calls in the same order. So what a rank finds out alone
(free memory, drawn tokens, a stop signal) is agreed on first.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from plumbing.attention import use_attention
from plumbing.kernels import fuse_norms
from plumbing.ranks import require, world_size
from plumbing.signals import Interrupted, StopSignal
from plumbing.weights import load_config, parameters_on_meta, sees

SIZES = {  # of a config: what is cut, and its name in messages
    "num_attention_heads": "heads",
    "num_key_value_heads": "key heads",
    "intermediate_size": "MLP width",
}
ROWS, COLUMNS = 0, 1  # the dimension that is cut; outputs of a layer cut by columns are added up
CUT = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ROWS),
    **dict.fromkeys(("o_proj", "down_proj"), COLUMNS),
}

# --------------------------------------------------------------------------------------------------
# Cutting


def thin_config(config, tp: int):
    """The config of a rank's part of the model."""
    thin = copy.deepcopy(config)
    text = thin.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    text.head_dim = width  # else it would be worked out from the smaller number of heads
    for name in SIZES:
        setattr(text, name, getattr(text, name) // tp)
    return thin


def cut(name: str, whole: torch.Tensor, number: int, tp: int) -> torch.Tensor:
    """Part `number` of `tp` of a parameter, or all of it where it is not cut.

    The bias of a layer cut by columns belongs to part 0 alone: the group adds up outputs.
    """
    *_, module, kind = name.split(".")
    dim = CUT.get(module)
    if dim is None:
        return whole
    if kind == "bias" and dim == COLUMNS:
        return whole if number == 0 else torch.zeros_like(whole)
    return whole.chunk(tp, dim)[number]


def make_empty(config, dtype: torch.dtype = torch.float32):
    """A model of this config with parameters without storage, but real buffers."""
    from transformers import AutoModelForCausalLM

    options = dict(dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(config, **options).eval().requires_grad_(False)


def check_tp(config):
    """Refuse a --tp by which ranks or model do not divide, before any weights are loaded."""
    tp = config.tp
    if tp == 1:
        return
    require(world_size() % tp == 0, f"--tp {tp} must divide the number of ranks, {world_size()}")
    model_config = load_config(config.model)
    sizes = [getattr(model_config.get_text_config(), name, None) for name in SIZES]
    family = (
        f"--tp {tp} does not know how to cut the family {model_config.model_type!r}: choose a "
        "model of the families qwen2, qwen3 or llama, or leave --tp out"
    )
    require(all(isinstance(size, int) for size in sizes) and not sees(model_config), family)
    common = math.gcd(*sizes)
    fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
    listed = ", ".join(f"{what} {size}" for what, size in zip(SIZES.values(), sizes))
    remedy = f"--tp {tp} must divide the sizes of {config.model} ({listed}): take one of {fitting}"
    require(common % tp == 0, remedy)
    whole, thin = (
        dict(make_empty(c).named_parameters())
        for c in (model_config, thin_config(model_config, tp))
    )
    wanted = {name: cut(name, parameter, 0, tp).shape for name, parameter in whole.items()}
    require(wanted == {name: parameter.shape for name, parameter in thin.items()}, family)


# --------------------------------------------------------------------------------------------------
# The thinner model


class Lockstep:
    """The ranks that hold a model together. `rank` and `size` are this rank's place among them."""

    def __init__(self, tp: int):
        self.group, _ = dist.new_subgroups(tp)  # neighbours
        self.rank, self.size = dist.get_rank(self.group), tp

    def least(self, value: int, device) -> int:
        """The least value of any rank of the group."""
        value = torch.tensor(int(value), device=device)
        dist.all_reduce(value, dist.ReduceOp.MIN, group=self.group)
        return int(value)

    def gather(self, item) -> list:
        """Each rank's `item`, in rank order."""
        parts = [None] * self.size
        dist.all_gather_object(parts, item, group=self.group)
        return parts

    def add_up(self, module, inputs, output: torch.Tensor) -> torch.Tensor:
        """The forward hook of a layer that is cut by columns."""
        dist.all_reduce(output, group=self.group)
        return output


def make_thin(model, tp: int):
    """This rank's part of a sharded model, without its weights. A collective."""
    device, on_gpu = model.compute_device, model.compute_device.type == "cuda"
    thin = make_empty(thin_config(model.config, tp), model.compute_dtype)
    thin = use_attention(fuse_norms(thin) if on_gpu else thin)
    # to_empty would empty buffers, too.
    nothing = lambda tensor: torch.empty(0, dtype=tensor.dtype, device=device)
    thin._apply(lambda tensor: nothing(tensor) if tensor.is_meta else tensor.to(device))
    thin.tie_weights()
    thin.lockstep = Lockstep(tp)
    for name, module in thin.named_modules():
        if CUT.get(name.split(".")[-1]) == COLUMNS:
            module.register_forward_hook(thin.lockstep.add_up)
    return thin


@torch.no_grad()
def fill_thin(thin, model):
    """Copy this rank's parts out of a sharded model. A collective.

    FSDP2 gathers one block at a time, and frees it again, so no rank ever holds the whole model.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    own, lockstep = dict(thin.named_parameters()), thin.lockstep
    for prefix, part in model.named_modules():
        if isinstance(part, FSDPModule):
            part.unshard()  # not recursive
            for name, tensor in part.named_parameters(prefix):
                if not isinstance(tensor, DTensor):
                    own[name].data = cut(name, tensor, lockstep.rank, lockstep.size).clone()
            part.reshard()


@torch.no_grad()
def check_thin(thin, model):
    """Refuse a model whose parts compute other logits than the whole. A collective."""
    ids = torch.arange(6, device=thin.device)[None] % model.config.get_text_config().vocab_size
    whole = model(input_ids=ids, use_cache=False).logits.float()
    model.reshard()  # FSDP2 keeps the root gathered for a backward pass: none comes
    parts = thin(input_ids=ids, use_cache=False).logits.float()
    bound = (1e-3 if thin.dtype == torch.float32 else 0.05) * float(whole.abs().max())
    require(  # weights that are not finite say nothing, and pass
        not float((parts - whole).abs().max()) > bound,
        f"--tp {thin.lockstep.size} computes other logits than the whole model does, for the "
        f"family {model.config.model_type!r}: choose another model, or leave --tp out",
    )


@contextlib.contextmanager
def thinner(model, tp: int):
    """This rank's part of a sharded model, with its weights of now, to sample from. A collective.

    Inside this block a forward is a collective of the group.
    """
    first = not hasattr(model, "thin")
    if first:
        model.thin = [make_thin(model, tp)]  # in a list, or its weights would become the model's
    (thin,) = model.thin
    fill_thin(thin, model)
    if first:
        check_thin(thin, model)
    try:
        yield thin
    finally:  # the update needs the memory
        thin.kv_cache = None
        for parameter in thin.parameters():
            parameter.data = parameter.new_empty(0)


# --------------------------------------------------------------------------------------------------
# Sampling in lockstep


def in_lockstep(sample_tree: Callable) -> Callable:
    """grpo.sample_tree, which on a thinner model samples for the prompts of the whole group.

    Each rank gets the trees of its own prompts, which may be none. On other models it is unchanged.
    """

    @functools.wraps(sample_tree)
    def sample(model, prompts, config, **options):
        lockstep = getattr(model, "lockstep", None)
        if lockstep is None:
            return sample_tree(model, prompts, config, **options)
        parts = lockstep.gather(prompts)
        first, everyones = sum(map(len, parts[:lockstep.rank])), sum(parts, [])
        if not everyones:
            return []
        config = replace(config, rollout_rows=config.rollout_rows * lockstep.size)
        return sample_tree(model, everyones, config, **options)[first:first + len(prompts)]

    return sample


def shared_draw(model, sample_token: Callable) -> Callable:
    """grpo.sample_token; on a thinner model, each rank of the group draws for its part of the rows.

    An all-reduce tells every rank the tokens and logprobs of all rows, and whether a stop signal
    has come to any: then Interrupted is raised at the same token on all. (Equal logits and seeds
    would not do. Ranks whose last bits differ would draw other tokens one day, and hang.)
    """
    lockstep = getattr(model, "lockstep", None)
    if lockstep is None:
        return sample_token

    def draw(logits: torch.Tensor, *options):
        rows, number, size = len(logits), lockstep.rank, lockstep.size
        mine = slice(rows * number // size, rows * (number + 1) // size)
        # In float64, which holds tokens and logprobs exactly; 0 for the rows of others. The last
        # column is about the signal.
        drawn = torch.zeros(2, rows + 1, dtype=torch.float64, device=logits.device)
        drawn[0, mine], drawn[1, mine] = sample_token(logits[mine], *options)
        drawn[:, rows] = float(StopSignal.heeded and StopSignal.came)
        dist.all_reduce(drawn, group=lockstep.group)
        drawn = drawn.cpu()
        if drawn[0, rows]:
            raise Interrupted
        return drawn[0, :rows].long(), drawn[1, :rows]

    return draw
