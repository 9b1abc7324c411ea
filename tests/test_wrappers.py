"""What people wrap a model in for several processes: refused with the remedy, or looked through, and made fit again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from autowidth import AutoWidth, Budget, Never
from autowidth.attach import AttachError
from autowidth.review.state import quiet
from autowidth.surgery import all_or_nothing
from autowidth.wrappers import ShardedModelError, WrapperError, check_wrapper, inner, rebuild, wrappers_of

IMAGE = torch.zeros(2, 1, 8, 8)


@pytest.fixture(autouse=True)
def _one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)
    )


def attach(model: nn.Module, parameters: nn.Module | None = None) -> AutoWidth:
    optimizer = torch.optim.SGD((parameters or model).parameters(), lr=0.1)
    probe = [(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))]
    return AutoWidth(
        model, optimizer, example_inputs=IMAGE, probe=probe, loss_fn=F.cross_entropy, policy=Never(), total_steps=4
    )


# ------------------------------------------------------------------------------------------------------------- refused


def fully_sharded() -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(net(), device_id=torch.device("cpu"))


def sharded_in_place() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


def tensor_parallel() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    return parallelize_module(net(), init_device_mesh("cpu", (1,)), {"5": ColwiseParallel()})


def stage() -> object:
    from torch.distributed.pipelining import PipelineStage

    return PipelineStage(net(), 0, 1, torch.device("cpu"))


def schedule() -> object:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    return ScheduleGPipe(PipelineStage(net(), 0, 1, torch.device("cpu")), 1)


def wrapped_inside() -> nn.Module:
    return nn.Sequential(DistributedDataParallel(net()[:3]), *net()[3:])


def deep_speed() -> nn.Module:
    """An object that looks like DeepSpeed's engine, which needs a compiler and is not installed for a test."""

    class DeepSpeedEngine(nn.Module):
        pass

    DeepSpeedEngine.__module__ = "deepspeed.runtime.engine"
    return DeepSpeedEngine()


def zero_3() -> nn.Module:
    model = net()
    model[0].weight.ds_id = 0  # type: ignore[union-attr]
    return model


@pytest.mark.filterwarnings("ignore")  # FSDP has a few for CPUs
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (fully_sharded, ("FullyShardedDataParallel", "pieces", "DistributedDataParallel")),
        (sharded_in_place, ("FSDP2", "save it and shard it")),
        (tensor_parallel, ("DTensor", "tensor parallel", "save it and shard it")),
        (stage, ("PipelineStage", "some layers")),
        (schedule, ("ScheduleGPipe", "several ranks")),
        (lambda: DataParallel(net()), ("DataParallel", ".module", "torchrun")),
        (wrapped_inside, ("'0'", "wrap the whole model")),
        (deep_speed, ("DeepSpeed", "flattened")),
        (zero_3, ("ZeRO 3", "'0.weight'")),
    ],
)
def test_what_is_sharded_is_refused_with_the_way_round(make: object, words: tuple[str, ...]) -> None:
    with pytest.raises(ShardedModelError) as refusal:
        attach(make(), net())  # type: ignore[operator]
    for word in words:
        assert word in str(refusal.value)


def test_a_namesake_of_ones_own_is_no_wrapper() -> None:
    class DataParallelish(nn.Sequential):
        pass

    DataParallelish.__name__ = "DataParallel"
    attach(DataParallelish(*net()))
    with pytest.raises(AttachError, match=r"pass the nn.Module first"):
        attach(torch.optim.SGD(net().parameters(), lr=1.0), net())  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*is deprecated")  # torch's own use
def test_an_optimizer_that_steps_in_backward_is_refused() -> None:
    wrapper = DistributedDataParallel(net())
    wrapper._register_fused_optim(torch.optim.SGD, 0.1)
    with pytest.raises(WrapperError, match="inside of backward"):
        attach(wrapper)


def test_mixed_precision_of_the_wrapper_is_refused() -> None:
    wrapper = DistributedDataParallel(net())
    wrapper.mixed_precision = object()  # torch builds one on an accelerator only
    with pytest.raises(WrapperError, match="mixed_precision"):
        check_wrapper(wrapper)


# ------------------------------------------------------------------------------------------------------ looked through


def test_wrapped_and_averaged_models_are_looked_through() -> None:
    model = net()
    wrapper = DistributedDataParallel(model)
    assert inner(model) is model
    assert inner(wrapper) is model
    average = AveragedModel(wrapper)
    assert inner(average) is average.module.module
    assert wrappers_of([model]) == [wrapper]
    assert attach(wrapper).model is model


def test_a_process_alone_exchanges_nothing() -> None:
    engine = attach(DistributedDataParallel(net()))
    assert (engine.ranks.rank, engine.ranks.count, engine.ranks.exchanged) == (0, 1, 0)


# ----------------------------------------------------------------------------------------------------- made fit again


def test_a_wrapper_is_resized_by_hand() -> None:
    from autowidth import IndexMap, resize_, trace

    wrapper = DistributedDataParallel(net(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1, momentum=0.9)
    name = trace(wrapper, IMAGE).groups[0].name
    plan = {name: IndexMap((0, 2, -1, 5), 6)}
    resize_(wrapper, plan, example_inputs=IMAGE, optimizer=optimizer)
    for _ in range(3):
        assert all(map(torch.equal, gradients(wrapper), gradients(wrapper.module)))
        optimizer.step()
    assert wrapper.module[0].out_channels == 4


def test_a_resize_that_fails_leaves_a_wrapper_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from autowidth import IndexMap, resize_, trace
    from autowidth.surgery import surgery

    wrapper = DistributedDataParallel(net())
    gradients(wrapper)
    before = [p.clone() for p in wrapper.parameters()]
    name = trace(wrapper, IMAGE).groups[0].name

    real = surgery.attributes

    def fail(module: nn.Module, journal: object) -> object:
        if module is wrapper.module[0]:  # what tracing rehearses on is another one
            raise MemoryError("no more")
        return real(module, journal)

    monkeypatch.setattr(surgery, "attributes", fail)
    with pytest.raises(MemoryError):
        resize_(wrapper, {name: IndexMap.removing([1], 6)}, example_inputs=IMAGE)
    assert all(map(torch.equal, before, wrapper.parameters()))
    for _ in range(3):
        assert all(map(torch.equal, gradients(wrapper), gradients(wrapper.module)))


def test_shrinking_takes_the_model_inside() -> None:
    from autowidth import shrink_
    from autowidth.review.untrained import ShrinkError

    batches = [(torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64))]
    with pytest.raises(ShrinkError, match=r"pass its \.module"):
        shrink_(DistributedDataParallel(net()), example_inputs=IMAGE, batches=batches, loss_fn=F.cross_entropy)


def resize(wrapper: DistributedDataParallel, width: int) -> None:
    """Another number of filters in the first layer, as surgery writes it."""
    from autowidth import IndexMap, trace
    from autowidth.surgery import operate

    model = wrapper.module
    channel_map = trace(model, IMAGE)
    group = channel_map.groups[0]
    with all_or_nothing() as journal:
        operate(journal, model, channel_map, {group.name: IndexMap.removing(range(width, group.width), group.width)})


def gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    F.cross_entropy(model(torch.ones(2, 1, 8, 8)), torch.tensor([0, 1])).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    "settings",
    [{}, {"static_graph": True}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}],
    ids=str,
)
def test_a_wrapper_is_itself_after_it_was_rebuilt(settings: dict[str, bool]) -> None:
    wrapper = DistributedDataParallel(net(), **settings)
    reached: list[str] = []
    wrapper.register_forward_hook(lambda *_: reached.append("forward"))

    def hook(state, bucket):  # annotations as text are refused by torch
        state.append("comm")
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    wrapper.register_comm_hook(reached, hook)
    for _ in range(2):
        gradients(wrapper)
    before = {name: value for name, value in vars(wrapper).items() if name not in ("reducer", "logger")}
    resize(wrapper, 4)
    rebuild(wrapper)
    assert vars(wrapper).keys() - {"reducer", "logger"} == before.keys()
    reached.clear()
    for _ in range(3):  # the buckets are built anew before the second one
        assert all(map(torch.equal, gradients(wrapper), gradients(wrapper.module)))
    assert reached == ["forward", "comm"] * 3
    assert wrapper._get_ddp_logging_data()["comm_hook"].endswith("hook")


def test_a_hook_of_torchs_own_stays() -> None:
    from torch.distributed import BuiltinCommHookType

    wrapper = DistributedDataParallel(net())
    wrapper._register_builtin_comm_hook(BuiltinCommHookType.FP16_COMPRESS)
    resize(wrapper, 4)
    rebuild(wrapper)
    assert "FP16_COMPRESS" in wrapper._get_ddp_logging_data()["comm_hook"]
    assert len(gradients(wrapper)) == 6


def test_without_rebuilding_torch_raises() -> None:
    """What the rebuilding is for."""
    wrapper = DistributedDataParallel(net())
    gradients(wrapper)
    resize(wrapper, 4)
    gradients(wrapper)  # silently without the other ranks
    with pytest.raises(RuntimeError, match="finished reduction"):
        gradients(wrapper)


def test_norms_that_talk_keep_quiet_in_a_review() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SyncBatchNorm(4))
    with quiet(model):
        assert type(model[1]) is not nn.SyncBatchNorm
        model[1].train()(torch.randn(4, 4, 2, 2))  # a SyncBatchNorm would ask for a GPU here
    assert type(model[1]) is nn.SyncBatchNorm


def test_budgets_of_one_process_need_no_ranks() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = [(torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)) for _ in range(20)]
    engine = AutoWidth(
        DistributedDataParallel(model), optimizer, example_inputs=IMAGE, probe=probe, loss_fn=F.cross_entropy,
        policy=Budget(macs=0.5), total_steps=10,
    )  # fmt: skip
    assert engine.review().macs <= engine.macs_start
