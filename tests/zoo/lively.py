"""Networks that feel every channel, what they return, and one training step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves


def lively(build: Callable[[], nn.Module], inputs: Tensor) -> nn.Module:
    """A network in evaluation mode in which every channel matters and no signal dies or explodes.

    As they are built, many networks multiply whole branches by zero or a millionth, and running statistics are those
    of no data: a change would go unseen. Constant parameters become random, norms take the statistics of the inputs.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = build()
        for parameter in model.parameters():
            if parameter.is_floating_point() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.copy_(_random_like(parameter))
        model.eval()
        norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum, norm.training = 1.0, True
        model(inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum, norm.training = momentum, False
    return model


def _random_like(constant: Tensor) -> Tensor:
    """Factors near 1 for a constant that is not zero, numbers near 0 for one that is."""
    if bool(constant.flatten()[0] != 0):
        return torch.rand_like(constant) + 0.5
    return torch.randn_like(constant) * (0.1 if constant.dim() < 2 else constant[0].numel() ** -0.5)


def outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Every tensor that the model returns for the inputs, which are brought to its dtype; without gradients."""
    with torch.no_grad():
        found = tree_leaves(model(inputs.to(next(model.parameters()).dtype)))
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor) -> None:
    """One training step towards the first class. Raises ValueError where the loss is not finite."""
    optimizer.zero_grad()
    found = [leaf for leaf in tree_leaves(model.train()(inputs)) if isinstance(leaf, Tensor)]
    loss = sum((-F.log_softmax(out.flatten(1), 1)[:, 0].mean() for out in found), torch.zeros(()))
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss is {loss.item()}")
    loss.backward()
    optimizer.step()
