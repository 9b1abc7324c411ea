"""What each rank looks at, and what all of them found, added up.

Everything that a review measures is a sum over samples, so that ranks with a share each equal one with all of it.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DistributedSampler

from autowidth.channels import ChannelMap, ParamAxis
from autowidth.ranks import Ranks
from autowidth.review.batches import Batches, count, cuttable, samples_of, take
from autowidth.review.effort import FittedEffort
from autowidth.review.profit import Sums
from autowidth.review.reconstruct import Moments, co_channel_positions

LEAST = 16
"""Samples that every rank looks at, at least: a norm needs several, and fewer take as long on an accelerator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Probe data for one review: a part to score filters, and the next, held out, for trials.

    scored, held: samples of both parts on all ranks together.
    """

    scoring: Batches
    held_out: Batches
    scored: int
    held: int


def look(probe: Iterable[Any], effort: FittedEffort, ranks: Ranks) -> Look:
    """The share of this rank in the samples that a review may look at.

    Where the first batch is the same on all ranks, they have the same probe, and divide it; else everyone looks at its
    own, which then is a part of the whole.
    """
    stream = iter(probe)
    wanted = [n and max(n, LEAST * ranks.count) for n in (effort.probe_samples, effort.audit_samples)]
    if ranks.count == 1:
        scoring, held_out = take(stream, effort.probe_samples), take(stream, effort.audit_samples)
    elif same_on_all(first := list(itertools.islice(stream, 1)), ranks):
        stream = itertools.chain(first, stream)
        scoring, held_out = (list(divided(take(stream, samples), ranks)) for samples in wanted)
    else:
        stream = itertools.chain(first, stream)
        scoring, held_out = (take(stream, part(samples, ranks)) for samples in wanted)
    scored, held = ranks.totals(count(scoring), count(held_out))
    return Look(scoring=scoring, held_out=held_out, scored=round(scored), held=round(held))


def part(samples: int, ranks: Ranks) -> int:
    """How many of the samples are this rank's."""
    return samples * (ranks.rank + 1) // ranks.count - samples * ranks.rank // ranks.count


def divided(batches: Batches, ranks: Ranks) -> Batches:
    """The batches of this rank, of those that all of them hold.

    Every rank takes whole batches where there are enough; else a part of each; where neither can be, all take all.
    """
    if len(batches) >= ranks.count:
        return batches[ranks.rank :: ranks.count]
    if count(batches) < 2 * ranks.count or not all(map(cuttable, batches)):
        return batches
    mine = [tree_map_only(Tensor, lambda t: t[ranks.rank :: ranks.count], batch) for batch in batches]
    return [batch for batch in mine if count([batch])]


def same_on_all(batches: Batches, ranks: Ranks) -> bool:
    """Whether all ranks hold the same content."""
    digest = 0
    for leaf in tree_leaves(list(batches)):
        if isinstance(leaf, Tensor):
            content = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest = zlib.crc32(content.numpy().tobytes(), zlib.crc32(repr(leaf.shape).encode(), digest))
    return ranks.agree(digest)


def samples_on_all(probe: Iterable[Any], first: Any, ranks: Ranks) -> int | None:
    """The number of samples that the probes of all ranks run through; None where only iterating would tell."""
    mine = samples_of(probe)
    if ranks.count == 1:
        return mine
    whole = isinstance(getattr(probe, "sampler", None), DistributedSampler)
    shared = same_on_all([first], ranks) or whole
    total, known = ranks.totals(mine or 0, mine is not None)
    if known < ranks.count:
        return None
    return round(total / ranks.count if shared else total)


# ---- added up --------------------------------------------------------------------------------------------------------


def add_moments(
    moments: dict[ParamAxis, Moments], channel_map: ChannelMap, device: torch.device, ranks: Ranks
) -> dict[ParamAxis, Moments]:
    """The moments of all ranks. An axis that some of them have not seen is that of the others."""
    if ranks.count == 1:
        return moments
    found = {place.axis for group in channel_map.groups for place in group.with_role("read")}
    axes = sorted(found, key=lambda axis: (axis.name, axis.dim))
    whole = {axis: moments.get(axis) or _nothing(len(co_channel_positions(channel_map, axis)), device) for axis in axes}
    inputs = torch.tensor([float(whole[axis].inputs) for axis in axes], dtype=torch.float64)
    ranks.add_([inputs])
    ranks.add_([tensor for axis in axes for tensor in (whole[axis].gram, whole[axis].total)])
    offsets = _offsets_of_all({axis: m.offset for axis, m in moments.items()}, ranks)
    for axis, number in zip(axes, inputs.tolist(), strict=True):
        whole[axis].inputs, whole[axis].offset = round(number), offsets.get(axis)
    return {axis: sums for axis, sums in whole.items() if sums.inputs}


def _nothing(channels: int, device: torch.device) -> Moments:
    return Moments(gram=torch.zeros(channels, channels, device=device), total=torch.zeros(channels, device=device))


def _offsets_of_all(offsets: Mapping[ParamAxis, str | None], ranks: Ranks) -> Mapping[ParamAxis, str | None]:
    """The tensors that can take a constant, on all ranks that have seen their axis."""
    said = sorted((axis.name, axis.dim, offset or "") for axis, offset in offsets.items())
    if ranks.agree(zlib.crc32(repr(said).encode())):
        return offsets
    seen: dict[ParamAxis, set[str | None]] = {}
    for theirs in ranks.gathered(dict(offsets)):
        for axis, offset in theirs.items():
            seen.setdefault(axis, set()).add(offset)
    return {axis: min(names, key=str) if len(names) == 1 else None for axis, names in seen.items()}


def add_sums(sums: Sums, channel_map: ChannelMap, ranks: Ranks) -> Sums:
    """The sums of all ranks."""
    if ranks.count > 1:
        samples, sums.loss = ranks.totals(sums.samples, sums.loss)
        sums.samples = round(samples)
        groups = [group.name for group in channel_map.groups]
        of_groups = (sums.first, sums.second, sums.rest_first, sums.rest_second)
        for found in of_groups:
            found.update({name: found[name].clone() for name in groups})
        ranks.add_([found[name] for found in of_groups for name in groups])
    return sums


def mean_scores(scores: Mapping[str, Tensor], samples: int, ranks: Ranks) -> dict[str, Tensor]:
    """What an importance says, as a mean over ranks, weighted by their samples: of it nothing else is known."""
    if ranks.count == 1:
        return dict(scores)
    (total,) = ranks.totals(samples)
    found = {name: scores[name].detach().cpu().double() * (samples / total) for name in sorted(scores)}
    ranks.add_(list(found.values()))
    return {name: found[name] for name in scores}
