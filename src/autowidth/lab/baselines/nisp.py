"""Neuron importance score propagation (Yu, Li, Chen, Lai, Morariu, Han, Gao, Lin, Davis 2018, arXiv 1711.05908)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from autowidth.channels import ChannelMap
from autowidth.lab.baselines import registry
from autowidth.lab.baselines.axes import channels, empty
from autowidth.lab.baselines.calls import MIXING, Call, watched
from autowidth.review.batches import Batches, Loss
from autowidth.review.statistics import effective_weights

_MIX = 0.5
"""Share of dissimilarity against that of spread in an edge of Inf-FS: the default of its authors' code."""

_DAMPING = 0.99
"""Factor per step of a path in Inf-FS, in units of 1 / (spectral radius): that of its authors' code."""


@registry.importance(name="nisp", unit=None, scope="layer", source="Yu et al. 2018, arXiv 1711.05908")
def importance(
    model: nn.Module,
    channel_map: ChannelMap,
    batches: Batches,
    loss: Loss,
    *,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """A channel's importance for the final responses in units of its group's mean, (width,) by channel group.

    The final responses are what the last layer reads; Inf-FS scores them as the paper does (`final_scores`). From
    there a score goes back from each neuron to all that it was made of, times the absolute weight, and a channel's
    importance is the sum over its pixels and over all layers that read it. On a residual stream no path counts twice.

    Where the rule of absolute weights does not decide, we chose: a batch norm is linear with its running statistics, a
    factor |scale| / deviation; norms without fixed statistics are a factor |scale|; pooling spreads a score evenly over
    its window, maxima too, since which pixel wins depends on the image; of a product of two responses (gates) both get
    the score. Activations pass scores on. The paper prunes every layer by a share of its own, so nothing is lost by the
    unit, and without it scores would grow with the number of layers behind. A group that nothing is seen to read gets
    NaN.
    """
    final = final_scores(_final_responses(model, batches))
    image = torch.zeros_like(batches[0][0][:1], dtype=torch.float64)
    weights = effective_weights(model)
    importances = {}
    found = propagated(model, image, torch.tensor(final, device=image.device))
    for group in channel_map.groups:
        places = [place for place in group.with_role("read") if place.axis.name in found]
        total = sum((channels(found[place.axis.name], place) for place in places), empty(group, weights).double())
        mean = total.mean().clamp_min(torch.finfo(total.dtype).tiny)
        importances[group.name] = (total / mean).float() if places else torch.full((group.width,), torch.nan)
    return importances


def final_scores(responses: np.ndarray) -> np.ndarray:
    """Inf-FS without labels (Roffo, Melzi, Cristani 2015), (features,), for responses (samples, features).

    Edges are half the larger standard deviation of two features, scaled to 0..1 over all pairs, and half one minus the
    size of their Spearman correlation. A score is the sum over all paths of any length from the feature, each step
    damped. A feature that never changes is left without edges: score zero. Where none changes, all score one.
    """
    ranks = rankdata(responses, axis=0)
    ranks -= ranks.mean(axis=0)
    length = np.linalg.norm(ranks, axis=0)
    alive = length > 0
    unit = ranks / np.where(alive, length, 1)
    deviation = responses.std(axis=0, ddof=min(1, len(responses) - 1))
    spread = np.maximum(deviation[:, None], deviation)
    spread = spread - spread.min()
    spread = spread / (spread.max() or 1)
    edges = _MIX * (1 - np.abs(unit.T @ unit)) + (1 - _MIX) * spread
    edges *= alive[:, None] & alive
    radius = np.abs(np.linalg.eigvalsh(edges)).max()
    if radius < np.finfo(edges.dtype).eps:
        return np.ones(len(edges))
    paths = np.eye(len(edges)) - _DAMPING / radius * edges
    scores: np.ndarray = np.linalg.solve(paths, np.ones(len(edges))) - 1
    return scores


def propagated(model: nn.Module, image: Tensor, final: Tensor) -> dict[str, Tensor]:
    """The scores of what every weight reads, (channels read,) by the weight's name, given those of the last layer.

    Propagation is the gradient of a network that is the model with absolute weights, no biases and nothing that bends:
    the calls are redirected while the model runs on `image` (1, ...), whose content does not matter.
    """
    with torch.enable_grad(), parametrize.cached():
        effective_weights(model)  # computed once, before the calls are redirected
        with _Absolute():
            _, calls = watched(model, lambda: model(image.clone().requires_grad_()))
        total = (calls[-1].source.movedim(calls[-1].dim, -1) * final).sum()
        gradients = torch.autograd.grad(total, [call.source for call in calls], allow_unused=True)
    found: dict[str, Tensor] = {}
    for call, gradient in zip(calls, gradients, strict=True):
        if gradient is not None:
            score = gradient.movedim(call.dim, -1).flatten(0, -2).sum(0)
            found[call.weight] = found[call.weight] + score if call.weight in found else score
    return found


def _final_responses(model: nn.Module, batches: Sequence[tuple[Any, Any]]) -> np.ndarray:
    """What the last layer reads, averaged over positions, (samples, features)."""
    rows = []
    with torch.no_grad():
        for inputs, _ in batches:
            _, calls = watched(model, lambda x=inputs: model(x))  # type: ignore[misc]
            last: Call = calls[-1]
            rows.append(last.source.movedim(last.dim, -1).reshape(len(inputs), -1, last.source.size(last.dim)).mean(1))
    found: np.ndarray = torch.cat(rows).double().cpu().numpy()
    return found


class _Absolute(TorchFunctionMode):
    """Makes every call linear, with coefficients that are not negative."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MIXING:
            return _mixed(func, *args, **kwargs)
        name = func.__name__.strip("_")
        if name in _REPLACED:
            return _REPLACED[name](*args, **kwargs)
        if name in _PASSED_ON:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)


def _mixed(
    func: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Any = None, *rest: Any, **more: Any
) -> Any:
    return func(input, weight.detach().abs().to(input.dtype), None, *rest, **more)


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Any = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    out = _scaled(input, weight)
    return out if running_var is None else _scaled(out, (running_var + eps).rsqrt())


def _group_norm(input: Tensor, num_groups: int, weight: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return _scaled(input, weight)


def _layer_norm(input: Tensor, shape: Any, weight: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return input if weight is None else input * weight.detach().abs()


def _scaled(input: Tensor, scale: Tensor | None) -> Tensor:
    """The input (N, C, ...) times the absolute scale (C,)."""
    return input if scale is None else input * scale.detach().abs().view(-1, *(1,) * (input.dim() - 2))


def _pooled(average: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def pool(
        input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Tensor:  # fmt: skip
        return average(input, kernel_size, stride or kernel_size, padding, ceil_mode, count_include_pad=False)

    return pool


def _adapted(average: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda input, output_size, return_indices=False: average(input, output_size)


def _product(input: Any, other: Any) -> Any:
    """Both factors of two responses; a response times the size of anything else."""
    response, factor = (input, other) if _is_response(input) else (other, input)
    if _is_response(factor):
        return response + factor
    return response * (factor.detach().abs() if isinstance(factor, Tensor) else abs(factor))


def _is_response(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _sum(input: Any, other: Any, **more: Any) -> Any:
    return input + other


_REPLACED: Mapping[str, Callable[..., Any]] = {
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "instance_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "max_pool1d": _pooled(F.avg_pool1d),
    "max_pool2d": _pooled(F.avg_pool2d),
    "max_pool3d": _pooled(F.avg_pool3d),
    "adaptive_max_pool1d": _adapted(F.adaptive_avg_pool1d),
    "adaptive_max_pool2d": _adapted(F.adaptive_avg_pool2d),
    "adaptive_max_pool3d": _adapted(F.adaptive_avg_pool3d),
    **dict.fromkeys(("mul", "multiply", "rmul", "imul"), _product),
    **dict.fromkeys(("sub", "subtract", "rsub", "isub"), _sum),
}
"""What takes the place of a call, by its name without underscores."""

_PASSED_ON = frozenset({
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
    "hardsigmoid", "hardtanh", "sigmoid", "logsigmoid", "tanh", "softplus", "softsign", "threshold", "clamp", "abs",
    "neg", "dropout", "local_response_norm",
})  # fmt: skip
"""Calls that hand a score on as it is."""
