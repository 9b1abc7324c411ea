"""What people wrap a model in for several processes: looked through, made fit again after surgery, or refused.

DistributedDataParallel (DDP) has a reducer, which keeps buckets of the shapes that gradients had when it was built. It
is built anew inside the same DDP object, as unpickling one does; everything else of the object stays.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from autowidth.errors import AutoWidthError


class ShardedModelError(AutoWidthError, TypeError):
    """A model whose parameters are divided among devices, or that is wrapped in what cannot be resized."""


class WrapperError(AutoWidthError, ValueError):
    """A DistributedDataParallel with a setting that cannot be made fit again after surgery."""


_NEEDS = ("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper")
"""What DDP builds its reducer with, in all versions of torch that were tried (2.6 to 2.13)."""

# ---- refused ---------------------------------------------------------------------------------------------------------

_DENSE = "train it whole with DistributedDataParallel until its widths have settled, then save it and shard it"

_REFUSED: dict[str, tuple[str, str]] = {
    "FullyShardedDataParallel": ("FSDP keeps pieces of flattened parameters, in which no channel can be found", _DENSE),
    "FSDPModule": ("FSDP2 keeps a piece of every parameter on each rank", _DENSE),
    "DeepSpeedEngine": ("DeepSpeed keeps the parameters, and the optimizer state, in flattened buffers", _DENSE),
    "PipelineModule": ("a pipeline keeps some layers on each rank, and a channel group may span two of them", _DENSE),
    "_PipelineStageBase": (
        "a stage of torch.distributed.pipelining holds some layers, and a channel group may span two of them", _DENSE,
    ),
    "_PipelineSchedule": (
        "a schedule of torch.distributed.pipelining runs layers of several ranks, and a channel group may span two of "
        "them", _DENSE,
    ),
    "DataParallel": (
        "DataParallel copies the model to every device in each forward pass",
        "pass its .module and train that on one device, or start a process per device by torchrun and use "
        "DistributedDataParallel",
    ),
}  # fmt: skip
"""Class name, of the object or of one that it is derived from -> why it is refused, and what to do instead."""


def refuse_sharded(model: object) -> None:
    """Raises ShardedModelError for a model, or a part of one, that is sharded or wrapped in something else than DDP."""
    parts = list(model.named_modules()) if isinstance(model, nn.Module) else [("", model)]
    for path, part in parts:
        for kind in type(part).__mro__:
            if kind.__name__ in _REFUSED and kind.__module__.partition(".")[0] in ("torch", "deepspeed"):
                reason, remedy = _REFUSED[kind.__name__]
                where = f" at {path!r}" if path else ""
                raise ShardedModelError(f"model is a {type(part).__name__}{where}: {reason}; {remedy}")
        if isinstance(part, DistributedDataParallel) and path:
            raise ShardedModelError(
                f"the part {path!r} of the model is wrapped in DistributedDataParallel: wrap the whole model, and pass "
                "that, or what is inside"
            )
    if isinstance(model, nn.Module):
        _refuse_shards(model)


def _refuse_shards(model: nn.Module) -> None:
    """Raises ShardedModelError for parameters of which a rank holds a piece."""
    for name, parameter in model.named_parameters():
        kinds = {kind.__name__ for kind in type(parameter.data).__mro__ + type(parameter).__mro__}
        if found := kinds & {"DTensor", "ShardedTensor", "FlatParameter"}:
            raise ShardedModelError(
                f"parameter {name!r} is a {min(found)}, of which each rank holds a piece (FSDP2 or tensor parallel): "
                f"{_DENSE}"
            )
        if hasattr(parameter, "ds_id"):
            raise ShardedModelError(f"parameter {name!r} is sharded by DeepSpeed (ZeRO 3): {_DENSE}")


# ---- looked through --------------------------------------------------------------------------------------------------


def inner(model: nn.Module) -> nn.Module:
    """The model inside of a DDP wrapper, or of an averaged copy of one; any other model itself."""
    if isinstance(model, AveragedModel) and isinstance(model.module, DistributedDataParallel):
        return inner(model.module)
    return inner(model.module) if isinstance(model, DistributedDataParallel) else model


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The process group of a DDP wrapper; None for any other model."""
    return model.process_group if isinstance(model, DistributedDataParallel) else None


def wrappers_of(models: Sequence[nn.Module]) -> list[DistributedDataParallel]:
    """Every DDP wrapper that is alive around one of these models, whoever holds it.

    They are looked up among all objects: a user may wrap a model after the engine was attached, or again.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    wanted = set(map(id, models))
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), DistributedDataParallel)]
    return [w for w in found if "_modules" in w.__dict__ and any(id(m) in wanted for m in w.module.modules())]


# ---- made fit again --------------------------------------------------------------------------------------------------


def check_wrapper(wrapper: DistributedDataParallel) -> None:
    """Raises WrapperError for a setting of the wrapper that holds shapes and cannot be built anew."""
    hooks = [(hook, state) for hook, state in getattr(wrapper, "_comm_hooks", [])]
    kinds = {type(state).__name__ for _, state in hooks}
    names = [getattr(hook, "__qualname__", type(hook).__qualname__) for hook, _ in hooks]
    overlapped = any(hasattr(p, "_in_backward_optimizers") for p in wrapper.module.parameters())
    remedy = "leave it out while widths change"
    for wrong, what in (
        (not all(hasattr(wrapper, name) for name in _NEEDS), "a reducer that this library cannot build anew"),
        (
            getattr(wrapper, "mixed_precision", None) is not None,
            "mixed_precision, which keeps old shapes",
        ),
        (
            getattr(wrapper, "_delay_all_reduce_params", []),
            "delay_all_reduce_named_params, which keeps old shapes",
        ),
        ("PowerSGDState" in kinds, "the comm hook PowerSGD, whose state has the shapes of the old buckets"),
        ("PostLocalSGDState" in kinds, "the comm hook post-local SGD, under which ranks have different weights"),
        (overlapped or any("optim" in name for name in names), "an optimizer that steps inside of backward"),
    ):
        if wrong:
            raise WrapperError(f"the DistributedDataParallel wrapper has {what}: {remedy}")


def check_no_join(wrappers: Sequence[DistributedDataParallel]) -> None:
    """Raises WrapperError inside of `with ddp.join()`, where ranks that have run out of data come to no review."""
    if any(wrapper._join_config.enable for wrapper in wrappers):
        raise WrapperError(
            "a review inside of `with ddp.join():`, where ranks that have run out of data take no part: give every "
            "rank equally many batches, as DistributedSampler does"
        )


def rebuild(wrapper: DistributedDataParallel) -> None:
    """Gives a DDP wrapper a reducer for the shapes that its model has now.

    The wrapper, its module, hooks on modules and parameters, comm hooks, buffers, `no_sync`, `static_graph`, buckets
    as views and the like stay as they are. Every rank calls it at the same place.
    """
    from torch._C._distributed_c10d import BuiltinCommHookType, _register_comm_hook  # not every build of torch has it

    builtin = _builtin_hook(wrapper)
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    if wrapper.static_graph:
        wrapper._static_graph_delay_allreduce_enqueued = False
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()  # type: ignore[union-attr]
    wrapper._has_rebuilt_buckets = False
    for hook, state in wrapper._comm_hooks:
        wrapper.logger._set_comm_hook_name(hook.__qualname__)  # type: ignore[union-attr]
        _register_comm_hook(wrapper.reducer, state, hook)
    if builtin:
        wrapper._register_builtin_comm_hook(getattr(BuiltinCommHookType, builtin))


@contextmanager
def rebuilt(models: Sequence[nn.Module]) -> Iterator[None]:
    """A block that resizes these models; afterwards wrappers around them fit, and weights are those of the first rank.

    Raises WrapperError before it, where a wrapper cannot be made fit again.
    """
    wrappers = wrappers_of(models)
    for wrapper in wrappers:
        check_wrapper(wrapper)
    try:
        yield
    finally:
        for wrapper in wrappers:
            rebuild(wrapper)
    for wrapper in wrappers:
        _take_over(wrapper)


def _take_over(wrapper: DistributedDataParallel) -> None:
    """Gives every rank the weights of the first one, as DDP does when it is built."""
    first = dist.get_process_group_ranks(wrapper.process_group)[0]
    for parameter in wrapper.module.parameters():
        if not getattr(parameter, "_ddp_ignored", False):
            content = parameter.detach().clone(memory_format=torch.contiguous_format)
            dist.broadcast(content, first, group=wrapper.process_group)
            parameter.data.copy_(content)


def _builtin_hook(wrapper: DistributedDataParallel) -> str:
    """The name of the comm hook of torch's own that the wrapper has: it is kept nowhere but in the log."""
    return str(wrapper._get_ddp_logging_data().get("comm_hook") or "").partition("BuiltinCommHookType.")[2]


# ---- norms that talk -------------------------------------------------------------------------------------------------


class _LocalNorm(nn.SyncBatchNorm):
    """A SyncBatchNorm that takes the statistics of this rank: what is added up over ranks is added up elsewhere."""

    forward = _BatchNorm.forward


@contextmanager
def local_norms(model: nn.Module) -> Iterator[None]:
    """While it lasts, every SyncBatchNorm keeps to itself: ranks look at different numbers of batches."""
    norms = [module for module in model.modules() if type(module) is nn.SyncBatchNorm]
    try:
        for norm in norms:
            norm.__class__ = _LocalNorm
        yield
    finally:
        for norm in norms:
            norm.__class__ = nn.SyncBatchNorm
