"""The table of the policies of `policy_sort`, by name.

To ship a policy, add a function to `order.py`, or a class to a file of its own, and an entry to the
table below. Users register
their own policies with `sagellm.register_policy`; packages offer policies as entry points
`sagellm.policies`.
"""

from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from typing import Any

from sagellm.graphs.diagnostics import Path
from sagellm.operators.policies.load_levels import adaptive
from sagellm.operators.policies.longest_prefix import LongestPrefixMatch
from sagellm.operators.policies.order import (
    Policy,
    PolicySortOptions,
    QueueOrder,
    RankingPolicy,
    cost_optimized,
    fifo,
    least_slack,
    priority,
    slo_aware,
    weighted_shortest_prefill,
)
from sagellm.operators.policies.turns import Aegaeon, Fair
from sagellm.runtime.registry import (
    Registry,
    check_and_read_options,
    check_callable,
    check_user_class,
    refuse_options,
)

__all__ = [
    "OWN",
    "POLICIES",
    "UNAVAILABLE",
    "Policy",
    "PolicySortOptions",
    "QueueOrder",
    "RankingPolicy",
    "RegisteredPolicy",
    "check_policy",
    "find_policy",
    "refuse_unused",
]


@dataclass(frozen=True, slots=True)
class RegisteredPolicy:
    """The function or class that makes a policy, and the options of `policy_sort` that it uses."""

    policy: Callable[[PolicySortOptions], Policy] | type[RankingPolicy]
    uses: frozenset[str] = frozenset()


def check_policy(name: str, policy: Any, uses: Iterable[str] = ()) -> RegisteredPolicy:
    """Make the table's entry of a user's policy; `uses`: the options of `policy_sort` that it uses.

    Raises TypeError if `policy` is not a policy, and ValueError if `policy_sort` lacks an option.
    """
    if isinstance(policy, type):
        check_user_class(f"policy {name!r}", policy, ("initial", "rank"))
    else:
        check_callable(name, policy, takes=("options",))
    used, known = frozenset(uses), {option.name for option in fields(PolicySortOptions)}
    if used - known:
        raise ValueError(f"policy {name!r} uses {min(used - known)!r}, no option of policy_sort")
    return RegisteredPolicy(policy, used)


def _read_entry_point(name: str, found: Any) -> RegisteredPolicy:
    """Make the table's entry of an entry point: a policy, or a module with `policy` and perhaps
    `USES`.
    """
    return check_policy(name, getattr(found, "policy", found), getattr(found, "USES", ()))


POLICIES: Registry[RegisteredPolicy] = Registry(
    "policy",
    "sagellm.policies",
    {
        "fifo": RegisteredPolicy(fifo),
        "priority": RegisteredPolicy(priority, frozenset({"aging_s"})),
        "slo_aware": RegisteredPolicy(slo_aware, frozenset({"prefill_tokens_per_s"})),
        "cost_optimized": RegisteredPolicy(cost_optimized),
        "adaptive": RegisteredPolicy(
            adaptive, frozenset({"prefill_tokens_per_s", "busy_queued", "overloaded_queued"})
        ),
        "least_slack": RegisteredPolicy(least_slack, frozenset({"prefill_tokens_per_s", "late"})),
        "weighted_shortest_prefill": RegisteredPolicy(
            weighted_shortest_prefill, frozenset({"prefill_tokens_per_s", "doubling_s"})
        ),
        "longest_prefix_match": RegisteredPolicy(LongestPrefixMatch),
        "fair": RegisteredPolicy(Fair),
        "aegaeon": RegisteredPolicy(Aegaeon),
    },
    _read_entry_point,
)
# Policies that other systems have and this one cannot have yet, each with the reason.
UNAVAILABLE = {
    "hybrid": (
        "policy hybrid batches embedding requests between LLM requests of one engine, and texts to "
        "embed have engines of their own here: choose another policy"
    )
}
OWN = "own"  # ranks by the option `function`; not in the table, as `policy_sort` makes it itself


def find_policy(name: str, options: PolicySortOptions, path: Path = ()) -> Policy | RankingPolicy:
    """Make the policy `name`. `path`: the place of `policy_sort` in the graph, for messages.

    Raises ValueError for an unknown or unavailable name, and for an option that the policy does not
    use. Raises GraphError for wrong `policy_options`.
    """
    if name in UNAVAILABLE and name not in POLICIES:
        raise ValueError(UNAVAILABLE[name])
    registered = POLICIES.find(name)
    refuse_unused(name, registered.uses, options)
    made, where = registered.policy, (*path, "policy_options")
    if isinstance(made, type):
        return check_and_read_options(made, options.policy_options, where)
    refuse_options(f"policy `{name}`", options.policy_options, where)
    found = made(options)
    if not isinstance(found, Policy):
        raise ValueError(f"policy {name} made {type(found).__name__}; a Policy was wanted")
    return found


def refuse_unused(name: str, uses: frozenset[str], options: PolicySortOptions) -> None:
    """Raise ValueError if `options` changes an option that only policies other than `name` use."""
    for option in fields(PolicySortOptions):
        users = [other for other, each in POLICIES.at_hand.items() if option.name in each.uses]
        is_changed = option.default is not MISSING and (
            getattr(options, option.name) != option.default
        )
        if users and is_changed and option.name not in uses:
            raise ValueError(
                f"policy {name} does not use {option.name}: leave it out, "
                f"or choose {' or '.join(users)}"
            )
