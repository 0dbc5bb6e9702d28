"""The length of prompts from which it pays to give prompts and answers devices of their own.

    python benchmarks/simulation/break_even.py --slo ttft=1,tpot=0.015 --lengths 128 1024 8192

For each length it finds the highest Poisson rate at which the level is met: of devices alike, with
steps of several sizes, and of splits in several ratios, with as many devices. It prints a line of a
Markdown table for each length.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sagellm.load.synthetic import parse_synthetic
from sagellm.planning.layouts import Placement, Pool
from sagellm.planning.plan_task import PlanTask
from sagellm.planning.service_level import ServiceLevel, parse_service_level
from sagellm.runtime.engine.costs.parallel import Parallelism
from sagellm.runtime.engine.costs.profile import read_profile
from sagellm.runtime.engine.costs.roofline import RooflineForm
from sagellm.runtime.models.shapes import SHAPES
from sagellm.simulation.sweep import measure

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
RATIOS = ((1, 1), (1, 3), (2, 2), (3, 1))
STEPS = (512, 2048)  # tokens of a step of devices alike
SPLIT_STEP = 8192  # of devices for prompts
SEQS = 256
ONE = Parallelism()


@dataclass(frozen=True)
class Study:
    """A model on devices, the length of answers, and how long each simulation lasts."""

    model: str
    gpu: str
    level: ServiceLevel
    output_len: int
    kv_link: float | None
    seconds: float
    least_requests: int

    def attains(self, placement: Placement, input_len: int, rate: float) -> bool:
        """Whether a placement meets the level at a rate of requests."""
        number = max(self.least_requests, int(rate * self.seconds))
        text = (
            f"synthetic:rate={rate!r},requests={number},input={input_len},output={self.output_len}"
        )
        profile = read_profile(self.gpu)
        device = profile.cost
        assert isinstance(device, RooflineForm)
        task = PlanTask(
            self.model,
            SHAPES[self.model],
            self.gpu,
            profile,
            device.memory_bytes,
            0.9,
            self.kv_link or device.link_bytes_per_s,
            self.level,
            list(parse_synthetic(text).generate()),
        )
        return self.level.is_met(measure(task.point(placement, task.workload)))

    def capacity(self, placement: Placement, input_len: int) -> float:
        """The highest rate at which the level is met, within 3 %; 0: not even at a low rate."""
        return highest_rate(lambda rate: self.attains(placement, input_len, rate))


def highest_rate(holds: Callable[[float], bool], least: float = 1.0) -> float:
    """The highest rate for which `holds`, within 3 %, if it holds below and not above."""
    if not holds(least):
        return 0.0
    low, high = least, 2 * least
    while holds(high):
        low, high = high, 2 * high
    while high / low > 1.03:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def alike(num_devices: int, tokens: int) -> Placement:
    return Placement((Pool(ONE, num_devices),), SEQS, tokens)


def split(num_prefill: int, num_decode: int) -> Placement:
    return Placement((Pool(ONE, num_prefill), Pool(ONE, num_decode)), SEQS, SPLIT_STEP)


def placements() -> dict[str, Placement]:
    """The columns of the table."""
    found: dict[str, Placement] = {}
    for num_devices in sorted({sum(ratio) for ratio in RATIOS}):
        for tokens in STEPS:
            found[f"{num_devices} alike, {tokens}"] = alike(num_devices, tokens)
        for ratio in RATIOS:
            if sum(ratio) == num_devices:
                found[f"{ratio[0]}:{ratio[1]}"] = split(*ratio)
    return found


def rows(study: Study, lengths: Sequence[int], columns: Mapping[str, Placement]) -> Iterator[str]:
    """The lines of the table."""
    yield f"| prompt | {' | '.join(columns)} |"
    yield "|---" * (1 + len(columns)) + "|"
    for length in lengths:
        rates = [study.capacity(one, length) for one in columns.values()]
        yield f"| {length:,} | {' | '.join(f'{rate:.3g}' for rate in rates)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3-8b", choices=list(SHAPES))
    parser.add_argument("--gpu", default="h100-sxm", help="a roofline profile")
    parser.add_argument("--slo", default="ttft=1,tpot=0.015", type=parse_service_level)
    parser.add_argument("--output-len", default=256, type=int)
    parser.add_argument("--kv-link", type=float, help="bytes a second between pools")
    parser.add_argument("--seconds", default=20.0, type=float, help="of each simulation")
    parser.add_argument("--least-requests", default=300, type=int)
    parser.add_argument("--lengths", default=LENGTHS, nargs="+", type=int)
    names = list(placements())
    parser.add_argument("--columns", default=names, nargs="+", choices=names, metavar="NAME")
    given = parser.parse_args()
    study = Study(
        given.model,
        given.gpu,
        given.slo,
        given.output_len,
        given.kv_link,
        given.seconds,
        given.least_requests,
    )
    columns = {name: placements()[name] for name in given.columns}
    for row in rows(study, given.lengths, columns):
        print(row, flush=True)


if __name__ == "__main__":
    main()
