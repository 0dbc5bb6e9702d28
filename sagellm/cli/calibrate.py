"""`sagellm calibrate`: measures an engine on this machine, and writes a profile of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import msgspec
import trio
from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console

from sagellm.backends.cpu.native.tuning import default_threads
from sagellm.builder import Graph
from sagellm.calibration.fitting import fit, line, spread
from sagellm.calibration.measuring import Measurement, Sizes, measure
from sagellm.calibration.recording import RECORDED, RecordedEngine, recorded_kind
from sagellm.cli.doctor import cpu_name
from sagellm.cli.errors import Failure
from sagellm.cli.graph_argument import (
    Assignments,
    engine_failures,
    parse_assignments,
    public_model_name,
)
from sagellm.cli.plotting import request_progress
from sagellm.cli.terminal import show_start_progress
from sagellm.cli.tune import warn_of_load
from sagellm.errors import naming_file
from sagellm.opening.open_graph import OpenGraph
from sagellm.runtime.engine.costs.fitted import FittedCost, FittedForm
from sagellm.runtime.engine.costs.profile import HostCost, Profile, write_profile
from sagellm.runtime.engine.costs.spread import SHARES
from sagellm.runtime.models.folder import ModelFolder, resolve_model

_GRAPH, _ENGINE = "joint", "g"
_LONGEST = 4096  # tokens: a longer context takes long to measure
_NUM_TOKENS = 32_768  # of the pool
_BLOCK_SIZE = 16
_REFUSED = {"kind": "local", "replicas": "1", "speculation": "none"}


@dataclass(frozen=True, slots=True)
class Calibration:
    """The model to measure. `options`: of the graph, by name."""

    model: str
    options: Mapping[str, Any]
    seconds: float
    seed: int

    def option(self, name: str, default: Any) -> Any:
        return self.options.get(f"{_ENGINE}.{name}", default)


def run(
    model: str,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    set_: Assignments = (),
    seconds: Annotated[float, Parameter(validator=Number(gt=0, lte=3600))] = 20.0,
    seed: int = 0,
    json: bool = False,
) -> int:
    """Measure the steps of a model on this machine, and write a profile for `sagellm simulate`.

    The engine runs in the graph joint, in a real session: prompts alone, batches that decode, and
    mixed loads. Measure while the machine is idle, with the options that will be simulated.

    Parameters
    ----------
    model
        A built-in name, a folder, or a Hub id.
    output
        The file of the profile [default: MODEL.json].
    set_
        Change an option of the engine, as g.threads=1; may be repeated.
    seconds
        About how long to measure; at least each size is measured once.
    seed
        Of the random prompts and arrivals.
    json
        Print the profile.
    """
    calibration = Calibration(model, _checked(parse_assignments(set_)), seconds, seed)
    file = output or Path(f"{public_model_name(model)}.json")
    if not file.resolve().parent.is_dir():
        raise Failure("there is no such folder", "make it first", str(file.parent))
    warn_of_load("calibrate")
    with engine_failures(model):
        found, opened = _measured(calibration)
    profile = _profile(calibration, file.stem, found, opened)
    with naming_file(file):
        write_profile(file, profile)
    if json:
        print(msgspec.json.encode(profile).decode())
    else:
        _show(profile, found, file)
    return 0


def _checked(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raise Failure for options of an engine that cannot be measured."""
    for name, fixed in _REFUSED.items():
        if f"{_ENGINE}.{name}" in options:
            cause = f"--set {_ENGINE}.{name}: calibrate measures one engine with {name} {fixed}"
            raise Failure(cause, "leave it out")
    return options


@dataclass(frozen=True, slots=True)
class _Opened:
    """The facts of the engine that was measured."""

    kv_token_bytes: float
    longest: int


def _measured(calibration: Calibration) -> tuple[Measurement, _Opened]:
    folder = resolve_model(calibration.model)
    graph = Graph.load(_GRAPH)
    opening = graph.open(set=_overrides(calibration, folder), model=calibration.model)
    with recorded_kind(), show_start_progress() as progress:
        opening.report_to(progress)
        return trio.run(_measure, opening, calibration, folder)


def _overrides(calibration: Calibration, folder: ModelFolder) -> dict[str, Any]:
    """The options of the graph: the user's, and a pool that is small enough to be written once."""
    longest = min(folder.facts.max_model_len, _LONGEST)
    longest = int(calibration.option("max_model_len", longest))
    num_tokens = max(_NUM_TOKENS, 2 * longest)
    found: dict[str, Any] = {"kind": RECORDED, "max_model_len": longest}
    if calibration.option("kv_memory", None) is None:
        found["num_blocks"] = -(-num_tokens // int(calibration.option("block_size", _BLOCK_SIZE)))
    return {f"{_ENGINE}.{name}": value for name, value in found.items()} | dict(calibration.options)


async def _measure(
    opening: OpenGraph, calibration: Calibration, folder: ModelFolder
) -> tuple[Measurement, _Opened]:
    async with opening as session:
        (engine,) = session.executor.engines[_ENGINE]
        assert isinstance(engine, RecordedEngine)
        facts = engine.facts
        sizes = Sizes(
            facts.max_model_len,
            facts.num_blocks * facts.block_size,
            engine.limits.max_num_batched_tokens,
            engine.limits.max_num_seqs,
            folder.facts.vocab_size,
        )
        with _share_progress() as progress:
            found = await measure(
                session,
                engine,
                sizes,
                spend_s=calibration.seconds,
                seed=calibration.seed,
                progress=progress,
            )
        return found, _Opened(facts.kv_block_bytes / facts.block_size, facts.max_model_len)


@contextmanager
def _share_progress() -> Iterator[Callable[[float], None]]:
    """Show a bar; yield a callable that takes the share that is done."""
    num_shown = 0

    with request_progress(100, "measured, %") as advance:

        def show(share: float) -> None:
            nonlocal num_shown
            for _ in range(num_shown, int(100 * share)):
                advance(None)
            num_shown = max(num_shown, int(100 * share))

        yield show


def _profile(calibration: Calibration, name: str, found: Measurement, opened: _Opened) -> Profile:
    form = fit(found.steps)
    device = str(calibration.option("device", "cpu"))
    threads = int(calibration.option("threads", default_threads()))
    return Profile(
        name=name,
        model=public_model_name(calibration.model),
        device=device,
        method="measured",
        made_on=datetime.now(UTC).date().isoformat(),
        cost=form,
        machine=f"{cpu_name()}, {threads} {'thread' if threads == 1 else 'threads'}",
        spread=spread(form, found.steps),
        host=host_cost(found),
        kv_token_bytes=opened.kv_token_bytes,
        options=dict(calibration.options),
    )


def host_cost(found: Measurement) -> HostCost:
    """The time of requests outside of steps: before the first step of those that were alone, and
    after the step of the first token.
    """
    alone = [one for one in found.requests if one.is_alone]
    submit = line([(one.prompt_len, one.started_s - one.sent_s) for one in alone])
    deliver = line([(one.num_rows, one.read_s - one.sampled_s) for one in found.requests])
    return HostCost(*submit, *deliver)


def _show(profile: Profile, found: Measurement, file: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for label, value in _lines(profile, found):
        console.print(f"{label + ':':18}{value}", markup=False)
    console.print(f"kept in {file}; use it with `sagellm simulate --profile {file}`", markup=False)


def _lines(profile: Profile, found: Measurement) -> Iterator[tuple[str, str]]:
    assert isinstance(profile.cost, FittedForm)
    cost, steps = FittedCost.of(profile.cost), found.steps
    errors = [abs(seconds / cost.seconds(shape) - 1) for shape, seconds in steps]
    yield "measured", f"{len(steps)} steps of {len(found.requests)} requests, {profile.machine}"
    counted = f"{len(found.quiet)} of {len(found.periods)} periods count"
    yield "other programs", f"{found.others:.2f} CPUs; {counted}"
    yield "error of a step", f"{median(errors):.1%} (median)"
    middle = SHARES.index(0.5)
    for one in profile.spread:
        low, high = one.ratios[middle - 1], one.ratios[middle + 1]
        outer = f"{one.ratios[1]:.2f} to {one.ratios[-2]:.2f}"
        yield f"over {one.from_s * 1e3:.2f} ms", f"half {low:.2f} to {high:.2f}, 90 % {outer}"
    if profile.host is not None:
        host = profile.host
        submitted = f"{host.submit_s * 1e3:.2f} ms and {host.submit_token_s * 1e6:.2f} us a token"
        delivered = f"{host.deliver_s * 1e3:.2f} ms and {host.deliver_row_s * 1e6:.0f} us a row"
        yield "host", f"{submitted} to submit; {delivered} to deliver"
