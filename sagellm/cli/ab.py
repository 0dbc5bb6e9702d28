"""`sagellm ab`: compares the arms of an A/B test, and says whether the test may end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from sagellm.cli.errors import Failure
from sagellm.experiments.arms import BLOCK_S, ArmsComparison, NoArms, compare_arms, read_arms
from sagellm.experiments.confidence import EQUAL, MIN_UNITS, OPEN, ABTest
from sagellm.runtime.core.decision_log import LogError

_FIX = "name a file that --decisions wrote, or the CSV of `sagellm simulate`"
_POSITIVE = Number(gt=0)


def run(
    log: Path,
    /,
    *,
    metric: Literal["ttft", "tpot", "e2e", "attainment", "unserved"] = "ttft",
    operator: str | None = None,
    alpha: Annotated[float, Parameter(validator=Number(gt=0, lt=0.5))] = 0.05,
    planned: Annotated[int, Parameter(validator=Number(gte=1))] = 1000,
    block: Annotated[float, Parameter(validator=_POSITIVE)] = BLOCK_S,
    margin: Annotated[float, Parameter(validator=Number(gte=0))] = 0.0,
    slo_ttft: Annotated[float | None, Parameter(validator=_POSITIVE)] = None,
    json: bool = False,
) -> int:
    """Compare the arms of an `ab_split`, with confidence intervals, and say whether to stop.

    The log may be read as often as you like while it grows: the rule has at most `alpha` false
    alarms over the whole test. It holds for one metric, chosen before the test.

    Parameters
    ----------
    log
        What --decisions wrote, or the CSV of `sagellm simulate`.
    metric
        The metric that decides.
    operator
        The `ab_split`, where the graph has several.
    alpha
        The probability of a false alarm.
    planned
        The number of requests for which the intervals are made as short as possible.
    block
        Seconds. Requests that arrive in one block share queues, and count as one observation; it
        should be several times as long as a burst.
    margin
        Stop, too, once the arms differ by less than this share of arm a.
    slo_ttft
        The TTFT objective, in seconds, of requests that have none.
    json
        Print one JSON object for each metric.
    """
    try:
        requests = read_arms(log, operator)
    except OSError as error:
        raise Failure(f"{error.strerror}", _FIX, str(log)) from None
    except LogError as error:
        raise Failure(str(error), _FIX, str(log)) from None
    except NoArms as error:
        raise Failure(str(error), error.fix, str(log)) from None
    test = ABTest(alpha, planned)
    found = compare_arms(requests, test, block_s=block, margin=margin, slo_ttft_s=slo_ttft)
    if json:
        for one in found:
            print(msgspec.json.encode(_object(one, is_primary=one.metric.name == metric)).decode())
        return 0
    _show(found, metric, alpha)
    return 0


def _object(one: ArmsComparison, *, is_primary: bool) -> dict[str, Any]:
    found = one.found
    halves = {"interval": found.fixed, "always_valid_interval": found.always}
    intervals = {
        name: None if half is None else [found.difference - half, found.difference + half]
        for name, half in halves.items()
    }
    return {
        "metric": one.metric.name,
        "decides": is_primary,
        "a": {"mean": found.mean_a, "requests": one.num_a, "units": one.units_a},
        "b": {"mean": found.mean_b, "requests": one.num_b, "units": one.units_b},
        "blocks": one.num_blocks,
        "block_correlation": one.correlation,
        "difference": found.difference,
        **intervals,
        "verdict": one.verdict,
        "decided_at": one.decided_at,
        "requests_needed": one.num_more,
    }


def _show(found: Sequence[ArmsComparison], metric: str, alpha: float) -> None:
    console = Console(highlight=False, soft_wrap=True)
    level = f"{1 - alpha:.0%}"
    table = Table("mean", "a", "b", "b - a", f"{level} interval", "always valid", "verdict")
    for one in found:
        scale, unit = one.metric.scale, one.metric.unit
        means = (f"{mean * scale:.2f}" for mean in (one.found.mean_a, one.found.mean_b))
        halves = (
            "" if half is None else f"+- {half * scale:.2f}"
            for half in (one.found.fixed, one.found.always)
        )
        difference = f"{one.found.difference * scale:+.2f}"
        table.add_row(f"{one.metric.title}, {unit}", *means, difference, *halves, one.verdict)
    console.print(table)
    primary = next((one for one in found if one.metric.name == metric), None)
    if primary is None:
        console.print(f"{metric}: an arm has no request with it yet: keep going")
        return
    console.print(_counts(primary), markup=False)
    console.print(f"{primary.metric.title}: {_advice(primary)}", markup=False)


def _counts(one: ArmsComparison) -> str:
    a, b = f"{one.num_a} requests of {one.units_a}", f"{one.num_b} of {one.units_b}"
    return f"a: {a} units; b: {b}; {one.num_blocks} blocks of time"


def _advice(one: ArmsComparison) -> str:
    """The advice, by the metric that decides."""
    if one.is_dependent:
        return (
            f"a block of time tells of the next (correlation {one.correlation:.2f}), so the "
            "intervals are too narrow: take longer blocks with --block"
        )
    if one.verdict == EQUAL:
        return f"stop: no difference beyond the margin, after {one.decided_at} requests"
    if one.verdict != OPEN:
        return f"stop: {one.verdict}, after {one.decided_at} of {one.num_a + one.num_b} requests"
    if min(one.units_a, one.units_b, one.num_blocks) < MIN_UNITS:
        return f"keep going: each arm needs {MIN_UNITS} units, and the test {MIN_UNITS} blocks"
    if one.num_more is None:
        return "keep going: no difference so far"
    more = f"about {one.num_more} more requests would decide, if the difference stays"
    return f"keep going: no difference so far; {more}"
