"""Neuron merging (Kim, Kim, Park, Kang 2020, NeurIPS, arXiv 2010.13160): a removed filter is merged into a similar one.

Letters: filters n (goes) and k (stays) of one layer, w their weights, gamma, beta, mu, sigma of the norm behind them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from autowidth.channels import ChannelGroup, ChannelMap, IndexMap
from autowidth.review.state import named_tensors
from autowidth.surgery import apply_

THRESHOLD = 0.1
"""The least cosine similarity at which a filter is merged; what is less similar is just removed."""

WEIGHT = 0.85
"""How much the cosine distance counts, and the rest the distance of biases. Both as published for ResNet-56."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """The filters of a layer with a norm behind it: w (n, values), and the norm's (n,) each; sigma a deviation."""

    w: Tensor
    gamma: Tensor
    beta: Tensor
    mu: Tensor
    sigma: Tensor


def merged(network: nn.Module, channel_map: ChannelMap, removed: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy without these channels, each merged into the most similar filter that stays; by channel group.

    The groups are those of `mergeable`. Raises KeyError for another one.
    """
    network = copy.deepcopy(network)
    tensors, able = named_tensors(network), mergeable(network, channel_map)
    for name, gone in removed.items():
        group = channel_map.group(name)
        kept = [c for c in range(group.width) if c not in set(gone)]
        scales = scaling(_filters(group, tensors, network.get_submodule(able[name])), kept)
        (reader,) = group.with_role("read")
        with torch.no_grad():
            tensors[reader.axis.name].copy_(_scaled(tensors[reader.axis.name], scales))
    plan = {n: IndexMap.removing(gone, channel_map.group(n).width) for n, gone in removed.items() if gone}
    if plan:
        apply_(network, channel_map, plan)
    return network


def mergeable(network: nn.Module, channel_map: ChannelMap) -> dict[str, str]:
    """Channel groups that can be merged, by name, each with the name of its norm.

    Those inside of a block: one convolution writes, one reads, one batch norm lies between; what stands between is
    taken for a ReLU, as in the paper, which is linear in the sizes that merging multiplies by.
    """
    norms = {name for name, module in network.named_modules() if isinstance(module, _NormBase) and module.affine}
    found = {}
    for group in channel_map.groups:
        carriers = {place.axis.name.rpartition(".")[0] for place in group.with_role("carry")}
        ends = [*group.with_role("write"), *group.with_role("read")]
        plain = tuple((channel,) for channel in range(group.width))
        in_order = all(place.index == plain for place in group.places) and ends[-1].axis.dim == 1
        if len(ends) == 2 and len(carriers & norms) == 1 and in_order:
            (found[group.name],) = carriers & norms
    return found


def scaling(filters: Filters, kept: Sequence[int]) -> Tensor:
    """Z (kept, n): how much of each filter every kept one stands in for; a column holds one number at most.

    With x_n = s x_k and s = |w_n| / |w_k|, norms turn y_k into y_n = S y_k + B, where
        S = s (gamma_n / gamma_k) (sigma_k / sigma_n)
        B = (gamma_n / sigma_n) (s (mu_k - sigma_k beta_k / gamma_k) - mu_n) + beta_n.
    Taken is the k of least lambda (1 - cos) + (1 - lambda) |B| / S, the latter brought to 0 to 1 over the candidates
    (section 3.3 and algorithm 2 of the paper; the code published with it has the variance for sigma and S the other way
    round, which we take for a slip). Only a positive S passes a ReLU.
    """
    f, index = filters, torch.tensor(kept)
    unit = f.w / f.w.norm(dim=1, keepdim=True).clamp_min(1e-12)
    cosine = unit[index] @ unit.T
    s = f.w.norm(dim=1)[None] / f.w.norm(dim=1)[index, None].clamp_min(1e-12)
    gamma, beta, mu, sigma = (t[index, None] for t in (f.gamma, f.beta, f.mu, f.sigma))
    ratio = (f.gamma / f.sigma)[None] * sigma / gamma
    scale = s * ratio
    bias = (f.gamma / f.sigma)[None] * (s * (mu - sigma * beta / gamma) - f.mu[None]) + f.beta[None]
    possible = (scale > 0) & torch.isfinite(scale)
    apart = torch.where(possible, bias.abs() / scale.clamp_min(1e-12), torch.inf)
    least = apart.amin(0)
    most = torch.where(possible, apart, -torch.inf).amax(0)
    spread = (apart - least) / (most - least).clamp_min(1e-12)
    best = torch.where(possible, WEIGHT * (1 - cosine) + (1 - WEIGHT) * spread, torch.inf).argmin(0)
    columns = torch.arange(f.w.size(0))
    result = torch.zeros_like(scale)
    good = possible[best, columns] & (cosine[best, columns] >= THRESHOLD)
    result[best[good], columns[good]] = scale[best[good], columns[good]]
    result[:, index] = torch.eye(len(kept), dtype=scale.dtype)
    return _among_all(result, index, f.w.size(0))


def _among_all(rows: Tensor, index: Tensor, width: int) -> Tensor:
    """Rows (kept, n) as (n, n), those of filters that go being zero."""
    whole = rows.new_zeros(width, width)
    whole[index] = rows
    return whole


def _filters(group: ChannelGroup, tensors: Mapping[str, Tensor], norm: nn.Module) -> Filters:
    """The filters that write a group, and what the norm behind them holds, on the CPU in double precision."""
    assert isinstance(norm, _NormBase), "mergeable groups have one"
    (writer,) = group.with_role("write")
    gamma, beta, mu, var = (
        tensor.detach().cpu().double()  # type: ignore[union-attr]
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    weight = tensors[writer.axis.name].detach().cpu().double()
    return Filters(w=weight.flatten(1), gamma=gamma, beta=beta, mu=mu, sigma=(var + norm.eps).sqrt())


def _scaled(weight: Tensor, scales: Tensor) -> Tensor:
    """A reader's weight (o, n, ...) once kept filters stand in for others: Z (n, n)."""
    return torch.einsum("on...,kn->ok...", weight, scales.to(weight))
