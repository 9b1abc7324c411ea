"""When to review and which resizes to make: pure; numbers in, plan out.

limits.py < situation.py < schedule.py, allocate.py < targets.py. To add a policy: a class in targets.py under
`@policy("name")`, and a row in the table of tests/test_policy.py.
"""

from autowidth.policy.allocate import shrunk, uniform_share
from autowidth.policy.limits import Limits, PolicyError
from autowidth.policy.schedule import Schedule
from autowidth.policy.situation import (
    Cost,
    Costs,
    Decision,
    GroupReport,
    Policy,
    Situation,
    Start,
    Unit,
)
from autowidth.policy.targets import POLICIES, Auto, Budget, BudgetError, Never, Price

__all__ = [
    "POLICIES",
    "Auto",
    "Budget",
    "BudgetError",
    "Cost",
    "Costs",
    "Decision",
    "GroupReport",
    "Limits",
    "Never",
    "Policy",
    "PolicyError",
    "Price",
    "Schedule",
    "Situation",
    "Start",
    "Unit",
    "shrunk",
    "uniform_share",
]
