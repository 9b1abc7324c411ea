"""Optimizer state: which keys are indexed by channel, and what a fresh entry holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autowidth.surgery.edits import Fill
from autowidth.surgery.refusals import UnsupportedOptimizerError


@dataclass(frozen=True, slots=True)
class State:
    """One key of an optimizer's state: how fresh entries are filled, which dim of the parameter it holds averaged."""

    fill: Fill
    collapsed: int | None = None


# First moments start at rest: a newborn has no past direction. RMSprop's grad_avg is one too: the centred second
# moment `square_avg - grad_avg^2` then stays positive. Rprop's prev = 0 means "no sign seen yet".
_REST = State("zero")
# Second moments, their running maxima and step sizes divide or scale the update. At a high step count a zero would make
# the first update explode (bias correction is long over), or freeze it (Rprop, Adadelta): take what the siblings have.
_SCALE = State("mean")
# An average of past weights: of a newborn the only weight there has ever been is the one it is born with.
_AVERAGE = State("weight")
# Counters and products of constants, the same for all channels.
_COUNTER = None

_ADAM: dict[str, State | None] = {"step": _COUNTER, "exp_avg": _REST, "exp_avg_sq": _SCALE, "max_exp_avg_sq": _SCALE}

OPTIMIZER_STATE: dict[type[Optimizer], dict[str, State | None]] = {
    torch.optim.SGD: {"momentum_buffer": _REST},
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.NAdam: {"step": _COUNTER, "mu_product": _COUNTER, "exp_avg": _REST, "exp_avg_sq": _SCALE},
    torch.optim.RAdam: {"step": _COUNTER, "exp_avg": _REST, "exp_avg_sq": _SCALE},
    torch.optim.SparseAdam: {"step": _COUNTER, "exp_avg": _REST, "exp_avg_sq": _SCALE},
    torch.optim.Adamax: {"step": _COUNTER, "exp_avg": _REST, "exp_inf": _SCALE},
    torch.optim.Adadelta: {"step": _COUNTER, "square_avg": _SCALE, "acc_delta": _SCALE},
    torch.optim.Adagrad: {"step": _COUNTER, "sum": _SCALE},
    torch.optim.RMSprop: {"step": _COUNTER, "square_avg": _SCALE, "momentum_buffer": _REST, "grad_avg": _REST},
    torch.optim.Rprop: {"step": _COUNTER, "prev": _REST, "step_size": _SCALE},
    torch.optim.ASGD: {"step": _COUNTER, "eta": _COUNTER, "mu": _COUNTER, "ax": _AVERAGE},
    # row_var and col_var are means over the last and the last but one dim: along that dim there is nothing to move.
    torch.optim.Adafactor: {
        "step": _COUNTER,
        "variance": _SCALE,
        "row_var": State("mean", collapsed=-1),
        "col_var": State("mean", collapsed=-2),
    },
}
"""Exact optimizer class -> state key -> what to do with it; None: not per channel, stays."""
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    OPTIMIZER_STATE[torch.optim.Muon] = {"momentum_buffer": _REST}


def check_optimizers(optimizers: Iterable[Optimizer]) -> None:
    """Raises UnsupportedOptimizerError for an optimizer outside of `OPTIMIZER_STATE`, such as LBFGS."""
    for optimizer in optimizers:
        if type(optimizer) not in OPTIMIZER_STATE:
            known = ", ".join(sorted(c.__name__ for c in OPTIMIZER_STATE))
            raise UnsupportedOptimizerError(
                f"the state of optimizer {type(optimizer).__module__}.{type(optimizer).__name__} cannot be resized, "
                f"only that of exactly {known}: use one of these (of a wrapper pass the inner optimizer), or enter the "
                "class with its state keys in autowidth.surgery.OPTIMIZER_STATE"
            )


def holders(optimizers: Sequence[Optimizer], model: nn.Module, names: Iterable[str]) -> tuple[Optimizer, ...]:
    """Those optimizers that hold one of the model's parameters of these names. Names of buffers are passed over."""
    wanted = set(names)
    parameters = {id(parameter) for name, parameter in model.named_parameters() if name in wanted}
    return tuple(optimizer for optimizer in optimizers if not held(optimizer).isdisjoint(parameters))


def held(optimizer: Optimizer) -> set[int]:
    """The ids of the parameters that an optimizer holds."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def states(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor, State]]:
    """The state tensors of one parameter that are indexed by channel. Raises UnsupportedOptimizerError."""
    table = OPTIMIZER_STATE[type(optimizer)]
    if parameter not in optimizer.state:
        return
    for key, value in optimizer.state[parameter].items():
        if key not in table:
            raise UnsupportedOptimizerError(
                f"optimizer {type(optimizer).__name__} holds a state {key!r} that cannot be resized, known are "
                f"{', '.join(table)}: remove it from optimizer.state, or enter it in autowidth.surgery.OPTIMIZER_STATE"
            )
        spec = table[key]
        if spec is not None and isinstance(value, Tensor):
            yield key, value, spec
