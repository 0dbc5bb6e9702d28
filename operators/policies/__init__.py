"""The policies of `policy_sort`, by name. A new one is a file beside these and a line below; those
of users are registered, or offered by packages as entry points `sagellm.policies`.
"""

from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from types import ModuleType
from typing import Any

from sagellm.graphs.diagnostics import Path
from sagellm.operators.policies import order
from sagellm.operators.policies.order import Policy, PolicySortOptions, RankingPolicy
from sagellm.runtime.registry import (
    Registry,
    check_and_read_options,
    check_callable,
    check_user_class,
    refuse_options,
)


@dataclass(frozen=True, slots=True)
class RegisteredPolicy:
    """One policy: what makes it from the options of `policy_sort`, and which of them it uses."""

    policy: Callable[[PolicySortOptions], Policy] | type[RankingPolicy]
    USES: frozenset[str] = frozenset()


def check_policy(name: str, policy: Any, uses: Iterable[str] = ()) -> RegisteredPolicy:
    """Raises TypeError and ValueError for parts that are none."""
    if isinstance(policy, type):
        check_user_class(f"policy {name!r}", policy, ("initial", "rank"))
    else:
        check_callable(name, policy, takes=("options",))
    used, known = frozenset(uses), {option.name for option in fields(PolicySortOptions)}
    if used - known:
        raise ValueError(f"policy {name!r} uses {min(used - known)!r}, no option of policy_sort")
    return RegisteredPolicy(policy, used)


def _read(name: str, found: Any) -> RegisteredPolicy:
    """An entry point is a module as those beside this one, or the function `policy` alone."""
    return check_policy(name, getattr(found, "policy", found), getattr(found, "USES", ()))


POLICIES: Registry[ModuleType | RegisteredPolicy] = Registry(
    "policy",
    "sagellm.policies",
    {
        "fifo": order,
        "priority": order,
        "slo_aware": order,
        "cost_optimized": order,
        "adaptive": order,
    },
    _read,
)
OWN = "own"  # the order of `function`


def find_policy(name: str, options: PolicySortOptions, path: Path = ()) -> Policy | RankingPolicy:
    """The policy of that name; `path`: of `policy_sort` in the graph.

    Raises ValueError for an unknown name, and for an option that the policy does not use.
    """
    module = POLICIES.find(name)
    refuse_unused(name, module.USES, options)
    made, where = module.policy, (*path, "policy_options")
    if isinstance(made, type):
        return check_and_read_options(made, options.policy_options, where)
    refuse_options(f"policy `{name}`", options.policy_options, where)
    found = made(options)
    if not isinstance(found, Policy):
        raise ValueError(f"policy {name} made {type(found).__name__}; a Policy was wanted")
    return found


def refuse_unused(name: str, uses: frozenset[str], options: PolicySortOptions) -> None:
    """Raises ValueError where an option was changed that only other policies use."""
    for option in fields(PolicySortOptions):
        users = [other for other, each in POLICIES.at_hand.items() if option.name in each.USES]
        is_changed = option.default is not MISSING and (
            getattr(options, option.name) != option.default
        )
        if users and is_changed and option.name not in uses:
            raise ValueError(
                f"policy {name} does not use {option.name}: leave it out, "
                f"or choose {' or '.join(users)}"
            )
