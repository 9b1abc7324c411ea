"""Other people's pruning tools, run as themselves; they are extras of the benchmark."""

from __future__ import annotations

import bisect
import copy
import itertools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autowidth.cost import count_macs, macs_cost
from autowidth.errors import AutoWidthError
from autowidth.lab.data import ImageSet
from autowidth.lab.loop_parts import probe_batches
from autowidth.lab.models import initialise, spec
from autowidth.policy import BudgetError
from autowidth.trace import trace

STEPS = 400
"""Steps in which Torch-Pruning walks to the target when it ranks the whole network; fine enough to end near it."""

SQUARED = 256
"""Images whose gradients are squared one by one for Torch-Pruning's Hessian measure."""

NARROWEST = 0.9
"""The largest share of a layer's filters that may go when the whole network is ranked."""

SEEN = 4
"""Probe batches from which GroMo takes its statistics, and on which the length of its step is searched."""

SCALES = tuple(2 ** (-number / 2) for number in range(-2, 9))
"""The lengths that are tried for a step of GroMo, its own scaling factor: 2 down to 1/16."""


class MissingToolError(AutoWidthError, ImportError):
    """A tool that is not installed."""


class UnfitModelError(AutoWidthError, ValueError):
    """A model that a tool cannot work on."""


# ---- Torch-Pruning ---------------------------------------------------------------------------------------------------


def torch_pruned(
    network: nn.Module,
    images: ImageSet,
    *,
    importance: str,
    scope: Literal["layer", "network"],
    macs: float,
    seed: int,
    only: Sequence[str] | None = None,
) -> nn.Module:
    """The network, pruned by Torch-Pruning to the share `macs` of its MACs; the one that is passed stays as it is.

    importance: `magnitude` (its group magnitude, L2), `bn-scale`, `taylor` (first order, gradients summed over two
    probe batches) or `hessian` (squared gradients of `SQUARED` images one by one). scope: `layer` prunes every layer by
    the same share, the smallest that meets the target; `network` by its global ranking with the default normalisation.
    The last linear layer keeps its outputs; with `only`, names of layers, all others do.

    Raises MissingToolError where the tool is not installed.
    """
    tp, device = _torch_pruning(), images.train.labels.device
    tool = _TorchPruning(
        tp=tp, network=network, example=torch.zeros(2, *images.image_shape, device=device), importance=importance,
        scope=scope, gradients=_gradients(network, images, seed, squared=importance == "hessian"),
        fixed=_fixed_layers(network, only),
    )  # fmt: skip
    target = macs * count_macs(network, tool.example)
    if scope == "network":
        return tool.pruned(NARROWEST + 0.05, STEPS, target)
    met = bisect.bisect_left(range(99), True, key=lambda n: tool.macs(tool.pruned(n / 100, 1, target)) <= target)
    return tool.pruned(met / 100, 1, target)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TorchPruning:
    """The tool with a network, the gradients that its measures read, and the layers that keep their outputs."""

    tp: Any
    network: nn.Module
    example: Tensor
    importance: str
    scope: Literal["layer", "network"]
    gradients: Mapping[str, Tensor]
    fixed: Sequence[str]

    def pruned(self, ratio: float, steps: int, target: float) -> nn.Module:
        """A copy, pruned by this ratio in equal steps, up to the first that meets the target."""
        candidate = copy.deepcopy(self.network).eval()
        for name, parameter in candidate.named_parameters():
            parameter.grad = self.gradients[name].clone()
        pruner = self.tp.pruner.BasePruner(
            candidate, self.example, importance=_importance(self.tp, self.importance),
            global_pruning=self.scope == "network", pruning_ratio=ratio,
            max_pruning_ratio=NARROWEST if self.scope == "network" else 1.0, iterative_steps=steps,
            ignored_layers=[candidate.get_submodule(name) for name in self.fixed],
        )  # fmt: skip
        _walk(pruner, candidate, self.example, steps, target)
        return candidate

    def macs(self, candidate: nn.Module) -> int:
        """What a copy costs."""
        return count_macs(candidate, self.example)


def _torch_pruning() -> Any:
    """The tool itself. Raises MissingToolError."""
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingToolError("Torch-Pruning is not installed: pip install 'autowidth[bench]'") from error
    return torch_pruning


def _importance(tp: Any, name: str) -> Any:
    """The tool's own importance measure of this name."""
    if name == "magnitude":
        return tp.importance.GroupMagnitudeImportance(p=2)
    kinds = {"taylor": "GroupTaylorImportance", "hessian": "GroupHessianImportance", "bn-scale": "BNScaleImportance"}
    return getattr(tp.importance, kinds[name])()


def _fixed_layers(network: nn.Module, only: Sequence[str] | None) -> list[str]:
    """The layers that keep their outputs: the last linear one, or all but those that are named."""
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    if only is None:
        return [name for name, module in layers.items() if isinstance(module, nn.Linear)][-1:]
    return [name for name in layers if name not in only]


def _walk(pruner: Any, candidate: nn.Module, example: Tensor, steps: int, target: float) -> None:
    """Prunes the candidate step by step, up to the first that meets the target, and drops its gradients."""
    for _ in range(steps):
        pruner.step()
        if count_macs(candidate, example) <= target:
            break
    for parameter in candidate.parameters():
        parameter.grad = None


def _gradients(network: nn.Module, images: ImageSet, seed: int, *, squared: bool) -> dict[str, Tensor]:
    """What its importance measures read, by parameter: gradients summed over two probe batches, as Taylor wants them.

    With `squared` the mean squares of the gradients of single images, the diagonal of the Fisher matrix, as its Hessian
    measure wants them. (Its own `accumulate_grad` keeps those of the last image only.)
    """
    scored = copy.deepcopy(network).eval()
    named = dict(scored.named_parameters())
    sums = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    batches = list(itertools.islice(iter(probe_batches(images, seed)), 2))
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    pieces = zip(x[:SQUARED].split(1), y[:SQUARED].split(1), strict=True) if squared else batches
    count = 0
    for piece, labels in pieces:
        scored.zero_grad()
        F.cross_entropy(scored(piece), labels).backward()
        count += 1
        for name, parameter in named.items():
            if parameter.grad is not None:
                sums[name] += parameter.grad.square() if squared else parameter.grad
    return {name: total / count if squared else total for name, total in sums.items()}


# ---- GroMo -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthPlan:
    """What GroMo is to end with: `blocks` per stage, `stream` channels in the first stage (2 and 4 times as many in
    the others), and the inner width of the blocks of each of the three stages."""

    blocks: int
    stream: int
    inner: tuple[int, ...]

    def inner_at(self, share: float) -> tuple[int, ...]:
        """The inner widths times the share, rounded, at least 1."""
        return tuple(max(1, round(width * share)) for width in self.inner)


def growth_plan(model: str, images: ImageSet, macs: float) -> GrowthPlan:
    """The residual network of at most so many MACs that GroMo can grow into and that is most nearly uniform.

    Its streams are in the ratio 1 : 2 : 4, because GroMo builds no others; the inner widths, in the same ratio up to
    rounding, take what the streams leave of the target. Raises UnfitModelError for a model that is no resnetN with
    projection shortcuts, BudgetError for a target below one channel, MissingToolError where the tool is not installed.
    """
    plan = GrowthPlan(blocks=_blocks_per_stage(model), stream=16, inner=(16, 32, 64))
    channel_map = trace(_residual(plan, images, plan.inner, "cpu"), torch.zeros(2, *images.image_shape))
    cost, widths = macs_cost(channel_map), channel_map.widths

    def fits(stream: int, inner: float) -> bool:
        """Whether a network with these widths in its first stage costs no more than the target."""
        found = {n: math.floor(w // 16 * inner) if "first_layer" in n else w // 16 * stream for n, w in widths.items()}
        return cost.at(found) <= macs

    if not fits(1, 1):
        raise BudgetError(f"{model} of one channel already has more than {macs:.0f} MACs")
    stream = next(n for n in itertools.count(1) if not fits(n + 1, n + 1))
    pairs = [(n, _widest(partial(fits, n))) for n in (stream, stream + 1) if fits(n, 1)]
    stream, inner = min(pairs, key=lambda pair: abs(math.log(pair[1] / pair[0])))
    return GrowthPlan(blocks=plan.blocks, stream=stream, inner=tuple(math.floor(times * inner) for times in (1, 2, 4)))


def _widest(fits: Callable[[float], bool]) -> float:
    """The largest width, at least 1 and in quarters, that fits: four times as many stand in the last stage."""
    return next(n for n in itertools.count(4) if not fits((n + 1) / 4)) / 4


def _blocks_per_stage(model: str) -> int:
    match = re.fullmatch(r"resnet(\d+)", model)
    if match is None:
        raise UnfitModelError(
            f"gromo grows residual networks of basic blocks only, not {model}; models that work: resnet20, resnet32, "
            "resnet56, resnet110 and every other resnetN with N = 6n+2, without -padding"
        )
    spec(model)  # refuses other depths
    return (int(match[1]) - 2) // 6


def growing_network(plan: GrowthPlan, images: ImageSet, *, share: float, device: torch.device) -> nn.Module:
    """GroMo's ResNet with this share of the plan's inner widths, its weights drawn from the global generator.

    Its layers are those of our ResNet with projection shortcuts, for small images: a 3x3 stem with norm and ReLU,
    blocks of two 3x3 convolutions whose ReLU comes after the addition, 1x1 shortcuts with norm where the stride is 2,
    average pooling, one linear layer. The initialisation is ours as well. What differs: between the convolutions of
    a block stands a dropout of rate 0, and streams keep the ratio 1 : 2 : 4. (N, C, H, W) -> (N, classes). Raises
    MissingToolError where the tool is not installed.
    """
    network = _residual(plan, images, plan.inner_at(share), device)
    initialise(network)
    return network


def _residual(plan: GrowthPlan, images: ImageSet, inner: Sequence[int], device: torch.device | str) -> nn.Module:
    try:
        from gromo.containers.resnet import init_full_resnet_structure
    except ImportError as error:
        raise MissingToolError(
            "GroMo is not installed: pip install 'autowidth[bench]', with Python 3.11 or newer"
        ) from error
    network: nn.Module = init_full_resnet_structure(
        input_shape=images.image_shape, out_features=len(images.classes), device=torch.device(device),
        hidden_channels=tuple(inner), number_of_blocks_per_stage=plan.blocks, nb_stages=len(inner),
        inplanes=plan.stream, small_inputs=True, skip_first_downsample=False, use_preactivation=False,
    )  # fmt: skip
    return network


def inner_widths(network: nn.Module) -> list[list[int]]:
    """The inner width of every block of GroMo's ResNet, stage by stage."""
    return [[block.hidden_neurons for block in blocks] for blocks in _blocks(network)]


def _blocks(network: nn.Module) -> list[list[Any]]:
    stages: Any = network.stages
    return [[block for block in stage if hasattr(block, "second_layer")] for stage in stages]


def gromo_grown(network: nn.Module, images: ImageSet, *, inner: Sequence[int], seed: int) -> nn.Module:
    """GroMo's ResNet, its blocks grown to the inner width of their stage; the one that is passed stays as it is.

    One growth step of GroMo for all blocks at once: its statistics over probe batches, its optimal updates (the best
    change of the weights that are there, and the best new neurons) with the normalisation that it has by default, its
    change, at the scaling factor of those in `SCALES` that leaves the least loss on the same batches. Where it finds
    fewer directions than neurons are wanted, fewer are added. Its norms start the new neurons with mean 0 and variance
    1: what was measured is what the network computes in evaluation mode, in training mode batches scale them at once.
    """
    grown: Any = copy.deepcopy(network)
    on_device = images.to(next(network.parameters()).device)
    batches = list(itertools.islice(iter(probe_batches(on_device, seed)), SEEN))
    wanted = [width for width, blocks in zip(inner, _blocks(grown), strict=True) for _ in blocks]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"gromo\.")  # its solvers tell when they fall back on another
        missing = [width - block.hidden_neurons for width, block in zip(wanted, _flat(grown), strict=True)]
        grown.set_growing_layers("all")
        _find_updates(grown, batches, most=max(missing))
        for block, count in zip(_flat(grown), missing, strict=True):
            _keep(block, count)
        grown.set_scaling_factor(_best_scale(grown, batches))
        for block in _flat(grown):
            if block.eigenvalues_extension is not None:
                block.apply_change()
            block.delete_update()
            block.first_layer.delete_update()
    for parameter in grown.parameters():
        parameter.grad = None
    return grown  # type: ignore[no-any-return]


def _flat(network: nn.Module) -> list[Any]:
    return [block for blocks in _blocks(network) for block in blocks]


def _find_updates(network: Any, batches: Sequence[tuple[Tensor, Tensor]], most: int) -> None:
    """Leaves the optimal updates on the network, at most so many new neurons for every block."""
    network.init_computation()
    network.eval()
    for x, y in batches:
        network.zero_grad()
        F.cross_entropy(network(x), y, reduction="sum").backward()
        network.update_computation()
    network.compute_optimal_updates(maximum_added_neurons=most, statistical_threshold=0.0)
    network.reset_computation()


def _keep(block: Any, count: int) -> None:
    """Keeps the first `count` of the new neurons, which are the best, and brings the update to its usual size."""
    found = block.eigenvalues_extension
    if count < 1 or found is None or not len(found):
        block.delete_update()
        return
    block.sub_select_optimal_added_parameters(keep_neurons=min(count, len(found)))
    block.normalize_optimal_updates()


@torch.no_grad()
def _best_scale(network: Any, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The scaling factor that leaves the least loss on these batches."""

    def loss(scale: float) -> float:
        network.set_scaling_factor(scale)
        total = sum(F.cross_entropy(network.extended_forward(x), y, reduction="sum").item() for x, y in batches)
        return total if math.isfinite(total) else math.inf

    return min(SCALES, key=loss)
