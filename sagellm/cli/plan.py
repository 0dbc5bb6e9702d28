"""`sagellm plan`: the cheapest placement of a model that meets a service level, in simulation."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number

from sagellm.cli.errors import RESOURCES, Failure, suggestion
from sagellm.cli.explain import (
    explained,
    measurer,
    plan_failures,
    read_service_level,
    verdict,
    wide_console,
)
from sagellm.cli.simulate import SimulatedLoad, read_load, simulation_failures
from sagellm.errors import naming_file
from sagellm.graphs.text.yaml import dump
from sagellm.load.traces import PlannedRequest
from sagellm.operators.policies import POLICIES
from sagellm.planning.layouts import SearchAxes
from sagellm.planning.plan_report import plan_fields, show_plan
from sagellm.planning.plan_task import PlanTask, check_lengths
from sagellm.planning.search import Candidate, PlanResult, Search
from sagellm.runtime.engine.costs.profile import ProfileError, read_profile
from sagellm.runtime.engine.costs.roofline import RooflineForm
from sagellm.runtime.engine.options import EngineOptionError, num_bytes
from sagellm.runtime.models.shapes import resolve_shape

_COUNT, _POSITIVE = Number(gte=1), Number(gt=0)
_EXPLAINED = 1000  # requests of the trace with which the nearest placement is explained


@Parameter(name="*", group="Devices")
@dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices, and what they cost."""

    gpus: Annotated[int, Parameter(validator=Number(gte=1, lte=64))]
    """The most devices that a placement may have."""

    gpu: str
    """Their type: a shipped profile (h100-sxm, ...), or a profile file (docs/profiles.md)."""

    price: Annotated[float | None, Parameter(validator=_POSITIVE)] = None
    """The price of a device's hour; without one, costs are in seconds of a device."""

    gpu_memory: str | None = None
    """The memory of a device, as 80GB [default: that of its profile]."""

    memory_utilization: Annotated[float, Parameter(validator=Number(gt=0, lte=1))] = 0.9
    """The share of the memory that weights and KV may take."""

    kv_link: Annotated[float | None, Parameter(validator=_POSITIVE)] = None
    """Bytes a second from a device for prompts to one for answers [default: the profile's link]."""


@Parameter(name="*", group="Search")
@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What is searched."""

    max_num_seqs: tuple[Annotated[int, Parameter(validator=_COUNT)], ...] = (64, 256)
    """Sequences of a step; may be repeated."""

    max_num_batched_tokens: tuple[Annotated[int, Parameter(validator=Number(gte=2))], ...] = (
        512,
        2048,
        8192,
    )
    """Tokens of a step that computes prompts; may be repeated."""

    policy: tuple[str, ...] = ("fifo", "slo_aware")
    """Orders of waiting requests; may be repeated."""

    seeds: Annotated[int, Parameter(validator=Number(gte=0))] = 5
    """Resampled traces on which the result is tried."""

    processes: Annotated[int, Parameter(validator=_COUNT)] = 1
    """Run so many simulations at a time."""


def run(
    model: str,
    /,
    *,
    slo: str,
    devices: Devices,
    load: SimulatedLoad,
    rate: Annotated[float | None, Parameter(validator=_POSITIVE)] = None,
    search: SearchOptions = SearchOptions(),
    top: Annotated[int, Parameter(validator=Number(gte=0))] = 5,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    json: bool = False,
) -> int:
    """Find the cheapest placement of a model that meets a service level on a trace.

    Placements differ in tensor, pipeline, data and expert parallelism, in whether prompts and
    answers have devices of their own, in the limits of steps, and in the policy. Each is simulated.
    Equal arguments give equal results. The exit code is 3 if no placement meets the level.

    Parameters
    ----------
    model
        A public model's name (docs/profiles.md), or a folder with a config.json.
    slo
        The level, as ttft=2,tpot=0.05,attainment=0.9: seconds, and a share of all requests.
    rate
        Play the trace at so many requests a second on average.
    top
        How many further placements to list.
    output
        A file for the graph of the placement, which `sagellm simulate` runs to the same figures.
    json
        Print one JSON object.
    """
    load = _at_rate(load, rate)
    with plan_failures(model):
        task = _task(model, slo, devices, read_load(load))
        check_lengths(task, _longest(model))
    axes = _axes(search)
    with simulation_failures(model):
        found = Search(task, devices.gpus, axes, measurer(search.processes)).run(search.seeds)
    if output is not None and found.winner is not None:
        with naming_file(output):
            output.write_text(dump(task.graph(found.winner.placement).ir), encoding="utf-8")
    command = _command(task, found.winner, load, output)
    if json:
        print(msgspec.json.encode(plan_fields(task, found, command)).decode())
    else:
        show_plan(wide_console(), task, found, top, command)
    if found.winner is None:
        raise _unmet(task, found, devices, search)
    return 0


# ---- what is asked ---------------------------------------------------------------------------


def _task(model: str, slo: str, devices: Devices, workload: Sequence[PlannedRequest]) -> PlanTask:
    """Raises Failure, ModelError, UnsupportedModel, PlanError."""
    level, facts = read_service_level(slo), resolve_shape(model).facts
    try:
        profile = read_profile(devices.gpu)
    except ProfileError as error:
        raise Failure(f"--gpu: {error}", "docs/profiles.md lists profiles") from None
    if profile.model is not None and profile.model != model:
        cause = f"--gpu {devices.gpu} was measured with model {profile.model}, not {model}"
        raise Failure(cause, f"plan {profile.model}, or give another profile")
    cost = profile.cost
    memory = cost.memory_bytes if isinstance(cost, RooflineForm) else None
    if devices.gpu_memory is not None:
        memory = _memory(devices.gpu_memory)
    if memory is None:
        cause = f"--gpu {devices.gpu}: its profile does not say how much memory it has"
        raise Failure(cause, "give --gpu-memory, as 80GB")
    link = devices.kv_link or (cost.link_bytes_per_s if isinstance(cost, RooflineForm) else 10e9)
    return PlanTask(
        model,
        facts,
        devices.gpu,
        profile,
        memory,
        devices.memory_utilization,
        link,
        level,
        workload,
        devices.price,
    )


def _memory(text: str) -> float:
    try:
        return num_bytes(text)
    except EngineOptionError:
        fix = "write a number and a unit, as 80GB or 64GiB"
        raise Failure(f"--gpu-memory {text} is not a size", fix) from None


def _longest(model: str) -> int | None:
    """The context of a model with files; one without has any."""
    folder = resolve_shape(model)
    return None if folder.path is None else folder.facts.max_model_len


def _at_rate(load: SimulatedLoad, rate: float | None) -> SimulatedLoad:
    """The load with the speedup that gives a mean rate. Raises Failure."""
    if rate is None:
        return load
    if load.replay.speedup is not None:
        raise Failure("--rate and --speedup both say how fast the trace is", "leave one out")
    workload = read_load(load)
    span_s = workload[-1].at_s - workload[0].at_s
    if span_s <= 0:
        raise Failure("--rate: all requests arrive at once", "leave it out")
    speedup = rate * span_s / (len(workload) - 1)
    return replace(load, replay=replace(load.replay, speedup=speedup))


def _axes(search: SearchOptions) -> SearchAxes:
    """The axes, each value once. Raises Failure for an unknown policy."""
    for name in search.policy:
        if name not in POLICIES:
            raise Failure(f"--policy {name}: no such policy", suggestion(name, POLICIES.at_hand))
    return SearchAxes(
        tuple(dict.fromkeys(search.max_num_seqs)),
        tuple(dict.fromkeys(search.max_num_batched_tokens)),
        tuple(dict.fromkeys(search.policy)),
    )


# ---- what is found ---------------------------------------------------------------------------


def _command(
    task: PlanTask, winner: Candidate | None, load: SimulatedLoad, output: Path | None
) -> str:
    """The command that simulates the graph of the winner to the same figures."""
    if winner is None:
        return ""
    level, replay = task.level, asdict(load.replay)
    given = {
        "trace": load.trace,
        "num_requests": load.num_requests,
        **replay,
        "slo_ttft": level.ttft_s,
        "slo_itl": level.tpot_s,
    }
    words = ["sagellm", "simulate", str(output or "plan.yaml")]
    for name, value in given.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for name, price in task.prices(winner.placement).items():
        words += ["--price", f"{name}={price!r}"]
    return shlex.join(words)


def _unmet(task: PlanTask, found: PlanResult, devices: Devices, search: SearchOptions) -> Failure:
    """No placement meets the level: the nearest, and what bounds it."""
    cause = f"no placement on up to {devices.gpus} x {devices.gpu} meets {task.level}"
    near = found.nearest
    if near is None:
        reasons = [f"{name}: {reason}" for name, reason in found.misfits.items() if name != "EP"]
        reasons += [f"{number} placements: {bound}" for bound, number in found.pruned.items()]
        return Failure(cause, f"loosen --slo or raise --gpus: {'; '.join(reasons)}", code=RESOURCES)
    point = task.point(near.placement, task.workload[:_EXPLAINED])
    bound = verdict(explained(point, task.level, search.processes))
    nearest = f"the nearest, {near.placement.name}, attains {near.attained:.1%}"
    return Failure(f"{cause}; {nearest}", f"it is bound by {bound}", code=RESOURCES)
