"""The rule on the section `budgets`: shares of latency objectives."""

from collections.abc import Iterator

from sagellm.graphs.diagnostics import VALUE, Diagnostic
from sagellm.graphs.ir import FrozenMap, Value
from sagellm.graphs.rules.option_types import check_options
from sagellm.graphs.rules.rule import CheckContext, choice
from sagellm.graphs.sections import SHARES, BudgetOptions

_ROUNDING = 1e-9  # of the sum of shares


def budgets(context: CheckContext) -> Iterator[Diagnostic]:
    """Shares belong to operators of the graph, and sum to at most 1 along every path."""
    values = context.graph.attrs.get("budgets")
    if values is None:
        return
    if not isinstance(values, FrozenMap):
        yield Diagnostic("wrong-type", ("budgets",), "`budgets` must be a mapping", "name options")
        return
    mistakes = list(check_options(("budgets",), values, BudgetOptions, context.facts))
    yield from mistakes
    for option in SHARES if not mistakes else ():
        shares = values.get(option, FrozenMap())
        assert isinstance(shares, FrozenMap)
        yield from _wrong_shares(context, option, shares)


def _wrong_shares(context: CheckContext, option: str, shares: FrozenMap) -> Iterator[Diagnostic]:
    """Mistakes in single shares, or else a path on which they sum to more than 1."""
    found = [*_wrong_entries(context, option, shares)]
    yield from found or _overspent(context, option, shares)


def _wrong_entries(context: CheckContext, option: str, shares: FrozenMap) -> Iterator[Diagnostic]:
    for name, share in shares.items():
        path = ("budgets", option, name)
        if name not in context.graph.names:
            hint = choice(name, context.graph.names)
            yield Diagnostic("unknown-operator", path, f"no operator is called `{name}`", hint)
        elif not isinstance(share, int | float) or not 0 <= share <= 1:
            message = f"the share of `{name}` must be from 0 to 1, not {share}"
            yield Diagnostic("out-of-range", (*path, VALUE), message, "write a share, such as 0.25")


def _overspent(context: CheckContext, option: str, shares: FrozenMap) -> Iterator[Diagnostic]:
    try:
        order = context.graph.topological()
    except ValueError:  # a cycle, which another rule reports
        return
    total = dict[str, float]()
    for node in order:
        before = (total.get(edge.source, 0.0) for edge in context.graph.inputs(node.name))
        total[node.name] = max(before, default=0.0) + _share(shares.get(node.name))
    longest = max(total, key=lambda name: total[name], default="")
    if total and total[longest] > 1 + _ROUNDING:
        message = f"the shares up to `{longest}` sum to {total[longest]:g}, which is above 1"
        yield Diagnostic("out-of-range", ("budgets", option), message, "lower some of them")


def _share(value: Value) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
