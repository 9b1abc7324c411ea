"""A callback for Lightning: the engine beside an unmodified LightningModule, with its loggers and its checkpoints."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from autowidth.channels import ChannelMap, IndexMap, ResizePlan
from autowidth.engine import AutoWidth
from autowidth.errors import AutoWidthError
from autowidth.history import Event
from autowidth.policy import Policy
from autowidth.review.batches import Loss
from autowidth.review.effort import Effort
from autowidth.surgery import apply_
from autowidth.trace import Inputs, trace
from autowidth.unwrapping import inner_optimizer


class LightningMissingError(AutoWidthError, ImportError):
    """Lightning is not installed."""


class CallbackError(AutoWidthError, ValueError):
    """A LightningModule or a Trainer that the callback cannot work with as it is."""


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
            from pytorch_lightning import Callback
        else:
            from lightning.pytorch import Callback
    except ModuleNotFoundError as error:
        try:
            from pytorch_lightning import Callback
        except ModuleNotFoundError:
            raise LightningMissingError(
                "autowidth.integrations.lightning needs Lightning: pip install 'autowidth[lightning]'"
            ) from error

ONE_DEVICE_OR_DDP = ("SingleDeviceStrategy", "DDPStrategy")


class AutoWidthCallback(Callback):
    """Reviews the widths of a LightningModule while a Trainer trains it.

        trainer = L.Trainer(max_epochs=30, callbacks=[AutoWidthCallback(policy=aw.Budget(macs=0.5))])
        trainer.fit(module, loader)

    The module needs a `forward` through the layers that are to be resized. What its optimizers, schedulers, precision
    plugin and gradient accumulation do stays as it is; reviews run in float32, between two optimizer steps. Copies of
    Lightning's own WeightAveraging are resized with it.

    policy: as for `AutoWidth`. probe: a loader of training data that reviews look at, best without augmentation; None
        for the training data of the Trainer, in another order. loss: loss(model, batch), a mean over samples; None for
        what `training_step` returns, of which nothing is logged meanwhile.
    part: the name of the submodule that is resized, such as "backbone"; the whole module if it is empty.
    example_inputs: what that is called with; None for `example_input_array` of the module, or else the first input of a
        batch. total_steps: optimizer steps of the whole run; None for what the Trainer estimates.
    effort, resize_frozen, history, seed: as for `AutoWidth`. log: whether widths, cost and the quality of the worths go
        to the loggers of the Trainer.

    The engine is `callback.engine`, once training has begun. Checkpoints carry its state: `trainer.fit(ckpt_path=...)`
    goes on across a resize, and `test`, `validate` and `predict` take the widths of the checkpoint; `load_` does so
    without a Trainer. Raises CallbackError when training begins, and what `AutoWidth` raises.
    """

    def __init__(
        self,
        *,
        policy: Policy | None = None,
        probe: Iterable[Any] | None = None,
        loss: Loss | None = None,
        part: str = "",
        example_inputs: Inputs | None = None,
        total_steps: int | None = None,
        effort: Effort | None = None,
        resize_frozen: bool = False,
        history: str | os.PathLike[str] | None = None,
        seed: int = 0,
        log: bool = True,
    ) -> None:
        super().__init__()
        self.policy, self.probe, self.loss, self.part = policy, probe, loss, part
        self.example_inputs, self.total_steps, self.effort = example_inputs, total_steps, effort
        self.resize_frozen, self.history, self.seed, self.log = resize_frozen, history, seed, log
        self._engine: AutoWidth | None = None
        self._state: Mapping[str, Any] | None = None
        self._inputs: Inputs | None = None
        self._steps = 0

    @property
    def engine(self) -> AutoWidth:
        """The engine. Raises CallbackError before training has begun."""
        if self._engine is None:
            raise CallbackError("the callback has no engine yet: it is attached when trainer.fit begins to train")
        return self._engine

    @property
    def state_key(self) -> str:
        """What its state is found by in a checkpoint: callbacks for several parts have one each."""
        return self._generate_state_key(part=self.part)

    # ---- checkpoints: shapes come before weights, and the engine goes on where it was

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _check_strategy(trainer)
        found = pl_module.on_load_checkpoint

        def shaped(checkpoint: dict[str, Any]) -> None:  # Lightning calls it right before it loads the weights
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            if state is not None:
                _reshape(pl_module, self.part, state, self.example_inputs, _averaged(trainer, self.part))
            found(checkpoint)

        pl_module.on_load_checkpoint = shaped  # type: ignore[method-assign]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def state_dict(self) -> dict[str, Any]:
        if self._engine is None:
            return dict(self._state or {})
        return {"engine": self._engine.state_dict(), "inputs": _described(self._inputs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict

    # ---- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._engine is not None:
            self._engine.abandon()  # of an earlier fit
        self._engine = self._attached(trainer, pl_module)
        self._steps = trainer.global_step
        if self._state:
            state, self._state = self._state["engine"], None
            longer = state["made_with"]["total_steps"] != self._engine.total_steps
            self._engine.load_state_dict(state, differing=("total_steps",) if longer else ())
        self._tell(trainer, pl_module, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps:  # in the middle of an accumulation
            return
        self._steps = trainer.global_step
        if tuple(map(inner_optimizer, trainer.optimizers)) != self.engine.optimizers:
            raise CallbackError(
                f"the optimizers of {type(pl_module).__name__} have changed while it was trained, and the state of the "
                "new ones would not be resized: configure all of them in configure_optimizers"
            )
        with _muted(pl_module):
            event = self.engine.step()
        if event is not None:
            self._tell(trainer, pl_module, event)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._engine is not None:
            self._engine.abandon()

    def _attached(self, trainer: Trainer, pl_module: LightningModule) -> AutoWidth:
        """The engine of a run that is about to train."""
        if not any(group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups):
            raise CallbackError(
                f"configure_optimizers of {type(pl_module).__name__} gives no optimizer, so that nothing of it trains: "
                "return one, or leave the callback away"
            )
        probe = _OnDevice(trainer, self.probe if self.probe is not None else _probe_of(trainer, self.seed))
        self._inputs = _inputs_of(pl_module, self.part, self.example_inputs, probe)
        with _muted(pl_module):
            return AutoWidth(
                _part(pl_module, self.part), trainer.optimizers, example_inputs=self._inputs, probe=probe,
                loss=self.loss or _training_loss(pl_module), policy=self.policy,
                total_steps=self.total_steps or _steps_of(trainer, pl_module), followers=_averaged(trainer, self.part),
                effort=self.effort, resize_frozen=self.resize_frozen, history=self.history, seed=self.seed,
                batch_size=probe.batch_size and probe.batch_size * trainer.accumulate_grad_batches,
            )  # fmt: skip

    def _tell(self, trainer: Trainer, pl_module: LightningModule, event: Event | None) -> None:
        """Gives every logger what has become of the network."""
        if not self.log:
            return
        metrics = _metrics(self.engine, event)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if event is not None:  # for callbacks that watch a metric
            pl_module.log_dict({name: float(metrics[name]) for name in (MACS, PARAMS)}, logger=False)


MACS, PARAMS = "autowidth/macs", "autowidth/params"


def load_(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    part: str = "",
    example_inputs: Inputs | None = None,
) -> None:
    """Gives a fresh LightningModule the widths and the weights of a checkpoint, without a Trainer.

    What `LightningModule.load_from_checkpoint` cannot do, since it expects the widths of the class. `part` and
    `example_inputs` as they were for the callback. Raises CallbackError for a checkpoint without its state.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    key = f"{AutoWidthCallback.__qualname__}{ ({'part': part})!r}"
    state = checkpoint.get("callbacks", {}).get(key)
    if not state:
        raise CallbackError(f"checkpoint {path} has no state of an AutoWidthCallback for part={part!r}")
    _reshape(module, part, state, example_inputs, ())
    module.load_state_dict(checkpoint["state_dict"])


# ---- what the engine is given ----------------------------------------------------------------------------------------


def _check_strategy(trainer: Trainer) -> None:
    """Raises CallbackError for a strategy that shards parameters, or that nobody has tried."""
    names = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    if not set(ONE_DEVICE_OR_DDP) & set(names):
        raise CallbackError(
            f"the Trainer has a {names[0]}, and widths change only on one device or under ddp, where every rank holds "
            "all parameters: pass strategy='ddp', and shard once the widths have settled"
        )


def _part(module: nn.Module, name: str) -> nn.Module:
    """The part of the module that is resized. Raises CallbackError where there is none of that name."""
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        names = ", ".join(child for child, _ in module.named_children())
        raise CallbackError(f"part={name!r} is no part of {type(module).__name__}, which has {names}") from error


def _steps_of(trainer: Trainer, module: LightningModule) -> int:
    """The optimizer steps of the run. Raises CallbackError where Lightning cannot know them."""
    steps = trainer.estimated_stepping_batches
    if not module.automatic_optimization:
        raise CallbackError(
            f"{type(module).__name__} steps its optimizers by hand (automatic_optimization is False), so that their "
            "steps cannot be counted beforehand: pass total_steps, the number of batches after which one has stepped"
        )
    if steps in (float("inf"), -1):
        raise CallbackError("the Trainer has no end (neither max_steps nor max_epochs): pass total_steps")
    return int(steps)


def _training_loss(module: LightningModule) -> Loss:
    """The loss that `training_step` returns."""
    more = len(inspect.signature(module.training_step).parameters) > 1

    def loss(model: nn.Module, batch: Any) -> Tensor:
        result = module.training_step(batch, 0) if more else module.training_step(batch)
        value = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(value, Tensor):
            raise CallbackError(
                f"training_step of {type(module).__name__} returns no loss: pass loss=, a function of (model, batch)"
            )
        return value

    if not module.automatic_optimization:
        raise CallbackError(
            f"training_step of {type(module).__name__} steps its optimizers itself (automatic_optimization is False), "
            "so that a review cannot ask it for the loss: pass loss=, a function of (model, batch), and total_steps"
        )
    return loss


def _probe_of(trainer: Trainer, seed: int) -> DataLoader[Any]:
    """The training data again, by a loader of its own: that of the Trainer is being run through."""
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise CallbackError(
            f"the training data are a {type(loader).__name__}, of which no second loader can be made: pass probe=, a "
            "loader of training data"
        )
    data, source = loader.dataset, torch.Generator().manual_seed(seed)
    sampler: DistributedSampler[Any] | None = None
    if trainer.world_size > 1 and not isinstance(data, IterableDataset):
        sampler = DistributedSampler(
            data, num_replicas=trainer.world_size, rank=trainer.global_rank, shuffle=True, seed=seed
        )  # fmt: skip
    shuffle = None if sampler is not None or isinstance(data, IterableDataset) else True
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    return DataLoader(
        data, batch_size=size, shuffle=shuffle, sampler=sampler, collate_fn=loader.collate_fn, generator=source
    )


class _OnDevice:
    """A loader whose batches come to the device, and into the precision, in which the Trainer trains."""

    def __init__(self, trainer: Trainer, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.batch_size: int | None = getattr(loader, "batch_size", None)
        for name in ("dataset", "generator", "sampler", "batch_sampler"):  # where it stands is kept with the engine
            setattr(self, name, getattr(loader, name, None))
        self._strategy = trainer.strategy

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield self._strategy.batch_to_device(self._strategy.precision_plugin.convert_input(batch))


def _inputs_of(module: LightningModule, part: str, given: Inputs | None, probe: Iterable[Any]) -> Inputs:
    """What the part is called with. Raises CallbackError where that cannot be known."""
    found: Any = given if given is not None else getattr(module, "example_input_array", None) if not part else None
    if found is None:
        batch = next(iter(probe), None)
        found = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(found, Tensor):
            raise CallbackError(
                f"a batch of {type(module).__name__} does not begin with a tensor, so that what its forward takes is "
                "not known: set example_input_array on the module, or pass example_inputs"
            )
        found = found[:2]
    inputs: Inputs = tree_map_only(Tensor, lambda tensor: tensor.to(module.device), found)
    return inputs


def _averaged(trainer: Trainer, part: str) -> tuple[nn.Module, ...]:
    """The copies that Lightning's own averaging of weights keeps."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = [getattr(callback, "_average_model", None) for callback in callbacks]
    return tuple(_part(average.module, part) for average in found if isinstance(average, AveragedModel))


@contextmanager
def _muted(module: LightningModule) -> Iterator[None]:
    """While it lasts, what the module logs goes nowhere, and metrics that it keeps count nothing."""
    metrics = [part for part in module.modules() if hasattr(part, "_copy_state_dict") and hasattr(part, "_computed")]
    kept = [(m, m._copy_state_dict(), m._update_count, m._computed) for m in metrics]  # type: ignore[operator]
    for name in ("log", "log_dict"):
        module.__dict__[name] = _nothing
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            module.__dict__.pop(name, None)
        for metric, state, count, computed in kept:
            for name, value in state.items():
                setattr(metric, name, value)
            metric._update_count, metric._computed = count, computed


def _nothing(*args: object, **options: object) -> None:
    """Logs nothing."""


def _metrics(engine: AutoWidth, event: Event | None) -> dict[str, float]:
    """What the loggers are told: cost, widths, and after a review how well worths had predicted."""
    found: dict[str, float] = {
        MACS: engine.macs, PARAMS: engine.params, "autowidth/macs_share": engine.macs / engine.macs_start,
        **{f"autowidth/width/{name}": width for name, width in engine.widths.items()},
    }  # fmt: skip
    if event is None:
        return found
    fidelity = event.fidelity
    more: dict[str, float | None] = {
        "loss": event.loss, "predicted": event.predicted, "measured": event.measured,
        "worth_spearman": None if fidelity is None else fidelity.spearman,
        "worth_slope": None if fidelity is None else fidelity.slope,
        "review_seconds": event.seconds_total, "bytes": event.memory.get("after"),
    }  # fmt: skip
    return found | {f"autowidth/{name}": float(value) for name, value in more.items() if value is not None}


# ---- shapes out of a checkpoint --------------------------------------------------------------------------------------


def _reshape(
    module: nn.Module, part: str, state: Mapping[str, Any], given: Inputs | None, followers: Iterable[nn.Module]
) -> None:
    """Resizes the part, and averaged copies, to the widths of a state. What fresh channels hold is loaded later."""
    model = _part(module, part)
    device = next(model.parameters()).device
    inputs = given if given is not None else _again(state["inputs"])
    if inputs is None:
        inputs = getattr(module, "example_input_array", None)
    if inputs is None:
        raise CallbackError(
            f"the checkpoint does not say what {type(module).__name__} is called with: pass example_inputs"
        )
    channel_map = trace(model, tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs))
    plan = _plan(channel_map, state["engine"]["widths"], type(module).__name__)
    if plan:
        apply_(model, channel_map, plan, followers=tuple(followers), generator=torch.Generator())


def _plan(channel_map: ChannelMap, widths: Mapping[str, int], name: str) -> ResizePlan:
    """A plan that leads to these widths. Raises CallbackError for groups that the module does not have."""
    groups = {group.name: group.width for group in channel_map.groups}
    if missing := sorted(widths.keys() - groups.keys()):
        raise CallbackError(
            f"the checkpoint is of another network: {name} has no channel group {missing[0]!r}; build the module with "
            "the arguments that it was saved with"
        )
    return {group: IndexMap.between(groups[group], width) for group, width in widths.items() if width != groups[group]}


def _described(inputs: Inputs | None) -> dict[str, Any] | None:
    """Shape and type of inputs that are one tensor, as plain data; None for others."""
    if not isinstance(inputs, Tensor):
        return None
    return {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}


def _again(described: Mapping[str, Any] | None) -> Tensor | None:
    """A tensor of zeros of this shape and type."""
    return None if described is None else torch.zeros(described["shape"], dtype=getattr(torch, described["dtype"]))
