"""How much a review looks at, fitted to the run unless it is given."""

from __future__ import annotations

from dataclasses import dataclass

from autowidth.errors import AutoWidthError

FULL_PROBE, FULL_AUDIT = 512, 256
"""Samples with which rankings are as good as they get in short runs; twice as many are looked at where time is left."""

FILTERS = 4
"""Filters that an audit ablates: samples are worth more than audits (docs/decisions/007)."""

SHARE = 0.04
"""The share of the run's computation that reviews take, about."""


class EffortError(AutoWidthError, ValueError):
    """An effort out of range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much a review may look at: samples for the probe, samples and filters for the audit.

    None: what makes reviews take about a twenty-fifth of the run (see `fitted`). Raises EffortError out of range.
    """

    probe_samples: int | None = None
    audit_samples: int | None = None
    audit_filters: int | None = None

    def __post_init__(self) -> None:
        least = {"probe_samples": 1, "audit_samples": 0, "audit_filters": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise EffortError(f"{name}={value}: need {name} >= {bound}, or None for what fits the run")

    def fitted(self, training_samples: int, reviews: int, *, groups: int, share: float = SHARE) -> FittedEffort:
        """This effort, with what is None so that reviews take about `share` of the computation of the run.

        `training_samples` is steps x batch size of the whole run. Counted in forward passes of one sample: training
        takes 3; a probe sample 6 (precise norms, two passes, their sums), an audit sample one for each audited filter
        and each of the `groups` whose weakest filters leave together, and five more (the plan tried, the losses before,
        what reconstruction costs). Surgery comes on top; it takes as long as a few steps.
        """
        each = share * 3 * training_samples / max(reviews, 1)
        probe = min(2 * FULL_PROBE, max(64, round(0.3 * each / 6)))
        audit = min(2 * FULL_AUDIT, max(64, round(0.7 * each / (FILTERS + groups + 5))))
        return FittedEffort(
            probe_samples=probe if self.probe_samples is None else self.probe_samples,
            audit_samples=audit if self.audit_samples is None else self.audit_samples,
            audit_filters=FILTERS if self.audit_filters is None else self.audit_filters,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedEffort:
    """How much a review looks at, every number known."""

    probe_samples: int
    audit_samples: int
    audit_filters: int
