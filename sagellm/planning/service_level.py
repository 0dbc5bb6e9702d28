"""The service level that a placement has to meet: bounds of latencies, and a share of requests."""

from dataclasses import dataclass
from math import isfinite

from sagellm.graphs.vocabulary import nearest
from sagellm.load.report import Objective
from sagellm.simulation.figures import SimulationSummary

_KEYS = ("ttft", "tpot", "attainment")
_FIX = "write ttft=SECONDS,tpot=SECONDS,attainment=SHARE, as ttft=2,tpot=0.05,attainment=0.9"
_ATTAINMENT = 0.9  # as in DistServe: the rate that 90 % of requests are served at in time


class PlanError(ValueError):
    """Something cannot be planned. The message has the cause, `fix` what to change."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """At least the share `attainment` of all requests has its first token within `ttft_s`, and
    `tpot_s` for each later token on average. None is no bound.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    attainment: float = _ATTAINMENT

    @property
    def objective(self) -> Objective:
        return Objective(self.ttft_s, self.tpot_s)

    def is_met(self, summary: SimulationSummary) -> bool:
        return (summary.slo_attainment or 0.0) >= self.attainment

    def use(self, summary: SimulationSummary) -> float:
        """The p99 of TTFT or TPOT over its bound: the higher of both. Above 1, it is missed."""
        pairs = ((summary.ttft_ms, self.ttft_s), (summary.tpot_ms, self.tpot_s))
        shares = [one.p99 / 1e3 / bound for one, bound in pairs if one is not None and bound]
        return max(shares, default=0.0)

    def __str__(self) -> str:
        bounds = (("TTFT", self.ttft_s), ("TPOT", self.tpot_s))
        named = [f"{name} <= {bound:g} s" for name, bound in bounds if bound is not None]
        return f"{' and '.join(named)} for {self.attainment:.4g} of requests"


def parse_service_level(text: str) -> ServiceLevel:
    """Read `ttft=2,tpot=0.05,attainment=0.9`. Raises PlanError."""
    values: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (one.strip() for one in part.partition("="))
        if name not in _KEYS:
            close = nearest(name, _KEYS)
            raise PlanError(
                f"--slo {part}: no such bound", f"did you mean {close}?" if close else _FIX
            )
        if name in values:
            raise PlanError(f"--slo {text}: {name} is given twice", "leave one out")
        values[name] = _positive(part, number if equals else "")
    attainment = values.pop("attainment", _ATTAINMENT)
    if attainment > 1:
        raise PlanError(f"--slo attainment={attainment:g}: a share is at most 1", _FIX)
    if not values:
        raise PlanError(f"--slo {text}: neither TTFT nor TPOT has a bound", _FIX)
    return ServiceLevel(values.get("ttft"), values.get("tpot"), attainment)


def _positive(part: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not isfinite(number) or number <= 0:
        raise PlanError(f"--slo {part}: no number above 0", _FIX)
    return number
