"""The policies of `policy_sort`, by name. A new one is a file beside these and a line below."""

from dataclasses import fields
from types import ModuleType

from sagellm.graphs.vocabulary import nearest
from sagellm.operators.policies import adaptive, cost_optimized, fifo, priority, slo_aware
from sagellm.operators.policies.options import Options
from sagellm.operators.policies.order import Policy

POLICIES: dict[str, ModuleType] = {
    "fifo": fifo,
    "priority": priority,
    "slo_aware": slo_aware,
    "cost_optimized": cost_optimized,
    "adaptive": adaptive,
}


def find_policy(name: str, options: Options) -> Policy:
    """The policy of that name.

    Raises ValueError for an unknown name, and for an option that the policy does not use.
    """
    if name not in POLICIES:
        close = nearest(name, list(POLICIES))
        hint = f"did you mean {close}?" if close else f"known are {', '.join(POLICIES)}"
        raise ValueError(f"unknown policy {name!r}: {hint}")
    refuse_unused(name, POLICIES[name].USES, options)
    found: Policy = POLICIES[name].policy(options)
    return found


def refuse_unused(name: str, uses: frozenset[str], options: Options) -> None:
    """Raises ValueError where an option was changed that only other policies use."""
    for option in fields(Options):
        users = [other for other, module in POLICIES.items() if option.name in module.USES]
        is_changed = getattr(options, option.name) != option.default
        if users and is_changed and option.name not in uses:
            raise ValueError(
                f"policy {name} does not use {option.name}: leave it out, "
                f"or choose {' or '.join(users)}"
            )
