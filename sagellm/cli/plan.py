"""`sagellm plan`: the cheapest placement of a model that meets a service level, in simulation."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

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
from sagellm.planning.deployment import Deployment, check_lengths
from sagellm.planning.placement import SearchAxes
from sagellm.planning.search import Candidate, Certainty, PlanResult, Search
from sagellm.runtime.engine.costs.profile import ProfileError, read_profile
from sagellm.runtime.engine.costs.roofline import RooflineForm
from sagellm.runtime.engine.options import EngineOptionError, num_bytes
from sagellm.runtime.models.shapes import resolve_shape

_COUNT, _POSITIVE = Number(gte=1), Number(gt=0)
_EXPLAINED = 1000  # requests of the trace with which the nearest placement is explained
_SHOWN_MISFITS = 8


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
        deployment = _deployment(model, slo, devices, read_load(load))
        check_lengths(deployment, _longest(model))
    axes = _axes(search)
    with simulation_failures(model):
        found = Search(deployment, devices.gpus, axes, measurer(search.processes)).run(search.seeds)
    if output is not None and found.winner is not None:
        with naming_file(output):
            output.write_text(dump(deployment.graph(found.winner.placement).ir), encoding="utf-8")
    command = _command(deployment, found.winner, load, output)
    if json:
        print(msgspec.json.encode(_fields(deployment, found, command)).decode())
    else:
        _show(wide_console(), deployment, found, top, command)
    if found.winner is None:
        raise _unmet(deployment, found, devices, search)
    return 0


# ---- what is asked ---------------------------------------------------------------------------


def _deployment(
    model: str, slo: str, devices: Devices, workload: Sequence[PlannedRequest]
) -> Deployment:
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
    return Deployment(
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
    deployment: Deployment, winner: Candidate | None, load: SimulatedLoad, output: Path | None
) -> str:
    """The command that simulates the graph of the winner to the same figures."""
    if winner is None:
        return ""
    level, replay = deployment.level, asdict(load.replay)
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
    for name, price in deployment.prices(winner.placement).items():
        words += ["--price", f"{name}={price!r}"]
    return shlex.join(words)


def _show(
    console: Console, deployment: Deployment, found: PlanResult, top: int, command: str
) -> None:
    workload, profile = deployment.workload, deployment.profile
    span_s = workload[-1].at_s - workload[0].at_s
    rate = f", {(len(workload) - 1) / span_s:.2f} requests/s" if span_s > 0 else ""
    lines = [
        ("model", f"{deployment.model} on {profile.name} ({profile.method} profile)"),
        ("level", str(deployment.level)),
        ("trace", f"{len(workload)} requests in {span_s:.1f} s{rate}"),
        ("placement", found.winner.placement.name if found.winner else "none meets the level"),
    ]
    if found.winner is not None:
        lines.append(("cost", _cost(deployment, found.winner)))
        lines.append(("certainty", _certainty(deployment, found.winner, found.certainty)))
    for label, text in lines:
        console.print(f"{label + ':':12}{text}", markup=False)
    shown = [found.winner or found.nearest, *found.runners_up[:top]]
    console.print(_table(deployment, found, [one for one in shown if one is not None]))
    for line in _left_out(found):
        console.print(line, markup=False)
    if command:
        console.print(f"to simulate the placement: {command}", markup=False)


def _cost(deployment: Deployment, one: Candidate) -> str:
    each = one.summary.cost_per_1k_tokens or 0.0
    gpus = one.placement.num_gpus
    devices = f"{gpus} device{'s' if gpus > 1 else ''}"
    if deployment.price is None:
        return f"{devices}, {each:.4g} s of a device for 1,000 tokens"
    return f"{devices} at {deployment.price:g} an hour, {each:.4g} for 1,000 tokens"


def _certainty(deployment: Deployment, one: Candidate, certainty: Certainty | None) -> str:
    room = f"the worst p99 is at {deployment.level.use(one.summary):.0%} of its bound"
    margin = f"{one.attained:.1%} attained, {one.attained - deployment.level.attainment:+.1%}"
    parts = [margin, room]
    if certainty is not None:
        total = len(certainty.attained)
        parts.append(
            f"{certainty.num_met} of {total} resampled traces meet the level "
            f"({certainty.mean:.1%} +- {certainty.deviation:.1%}, least "
            f"{min(certainty.attained):.1%})"
        )
    if deployment.profile.method != "measured":
        parts.append(f"the profile is a {deployment.profile.method}, not measured")
    return "; ".join(parts)


def _table(deployment: Deployment, found: PlanResult, shown: Sequence[Candidate]) -> Table:
    money = "device-s" if deployment.price is None else "cost"
    latencies = "TTFT p50, ms", "p99", "TPOT p50, ms", "p99"
    names = ("placement", "devices", "attained", *latencies, "goodput")
    table = Table(*names, f"{money}/1k", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for one in shown:
        table.add_row(*_row(one.placement.name, one))
    for advice in found.advice:
        if advice.found is None:
            table.add_row(f"advised: {advice.layout}", advice.reason)
        else:
            table.add_row(*_row(f"advised: {advice.found.placement.name}", advice.found))
    return table


def _row(name: str, one: Candidate) -> Iterable[str]:
    summary = one.summary
    latencies = [
        f"{value:.1f}"
        for each in (summary.ttft_ms, summary.tpot_ms)
        for value in ((each.p50, each.p99) if each is not None else ())
    ] or [""] * 4
    attained = f"{one.attained:.1%}{'' if one.is_met else ' no'}"
    cost = f"{summary.cost_per_1k_tokens or 0.0:.4g}"
    latencies += [""] * (4 - len(latencies))
    goodput = f"{summary.goodput_rps or 0.0:.2f}"
    return name, str(one.placement.num_gpus), attained, *latencies, goodput, cost


def _left_out(found: PlanResult) -> Iterable[str]:
    """Why placements are not among those that were simulated."""
    for name, reason in list(found.misfits.items())[:_SHOWN_MISFITS]:
        yield f"left out: {name}: {reason}"
    more = len(found.misfits) - _SHOWN_MISFITS
    if more > 0:
        yield f"left out: {more} further groups of devices"
    for bound, number in found.pruned.items():
        yield f"left out: {number} placements cannot meet the level, whatever the schedule: {bound}"
    counts = f"{found.num_placements} placements, {found.num_simulations} simulations"
    yield f"searched: {counts}; {found.num_dearer} cannot be cheaper than the best"


def _unmet(
    deployment: Deployment, found: PlanResult, devices: Devices, search: SearchOptions
) -> Failure:
    """No placement meets the level: the nearest, and what bounds it."""
    cause = f"no placement on up to {devices.gpus} x {devices.gpu} meets {deployment.level}"
    near = found.nearest
    if near is None:
        reasons = [f"{name}: {reason}" for name, reason in found.misfits.items() if name != "EP"]
        reasons += [f"{number} placements: {bound}" for bound, number in found.pruned.items()]
        return Failure(cause, f"loosen --slo or raise --gpus: {'; '.join(reasons)}", code=RESOURCES)
    point = deployment.point(near.placement, deployment.workload[:_EXPLAINED])
    bound = verdict(explained(point, deployment.level, search.processes))
    nearest = f"the nearest, {near.placement.name}, attains {near.attained:.1%}"
    return Failure(f"{cause}; {nearest}", f"it is bound by {bound}", code=RESOURCES)


def _fields(deployment: Deployment, found: PlanResult, command: str) -> dict[str, Any]:
    """A result as JSON."""
    level = deployment.level
    certainty = found.certainty
    return {
        "is_met": found.winner is not None,
        "model": deployment.model,
        "profile": {"name": deployment.profile.name, "method": deployment.profile.method},
        "slo": {"ttft_s": level.ttft_s, "tpot_s": level.tpot_s, "attainment": level.attainment},
        "cost_unit": "device_seconds" if deployment.price is None else "price",
        "winner": found.winner and _placed(deployment, found.winner, is_whole=True),
        "nearest": found.nearest and _placed(deployment, found.nearest, is_whole=True),
        "runners_up": [_placed(deployment, one) for one in found.runners_up],
        "advised": [
            {"layout": one.layout, "reason": one.reason}
            if one.found is None
            else {"layout": one.layout, **_placed(deployment, one.found)}
            for one in found.advice
        ],
        "certainty": certainty and {"attained": certainty.attained, "met": certainty.num_met},
        "misfits": found.misfits,
        "pruned": found.pruned,
        "searched": {
            "placements": found.num_placements,
            "simulations": found.num_simulations,
            "dearer": found.num_dearer,
        },
        "command": command,
    }


def _placed(deployment: Deployment, one: Candidate, *, is_whole: bool = False) -> dict[str, Any]:
    """A placement with its figures; a whole one with its graph too."""
    summary = msgspec.to_builtins(one.summary)
    del summary["engines"]
    graph = {"graph": dump(deployment.graph(one.placement).ir)} if is_whole else {}
    return {
        "name": one.placement.name,
        "gpus": one.placement.num_gpus,
        "is_met": one.is_met,
        "figures": summary,
        **graph,
    }
