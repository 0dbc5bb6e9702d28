"""Real worker processes come with the load and go with it, and no token is lost."""

import os
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from gateway_calls import CARD
from process_streams import num_leased
from waiting import until

from sagellm import Graph, Sampling
from sagellm.builder import RESOLVER
from sagellm.gateway.metrics.exposition import GatewayMeters
from sagellm.graphs.sections import ReplicaBounds
from sagellm.graphs.text.yaml import dump, load, load_file
from sagellm.load.workload import read_workload
from sagellm.opening.checking import check_graph
from sagellm.opening.decisions import DecisionFile, replay
from sagellm.operators.autoscale import AutoscaleOptions
from sagellm.session import Session
from sagellm.simulation.simulation_run import SimulationPoint, simulate

ROOT = Path(__file__).resolve().parents[2]
GRAPH = """
sagellm: 1
name: elastic
engines:
  g: ENGINE
operators:
  autoscale:
    op: autoscale
    engines: {g: {min: 1, max: MOST, start_s: 1, drain_s: DRAIN}}
    interval_s: 0.25
    cool_down_s: 1.5
    slo_ttft_s: 0.5
    retry_s: RETRY
  sort:      {op: policy_sort, policy: fifo}
  route:     {op: route, strategy: load_balanced}
  generate:  {op: generate, engine: g}
  metrics:   {op: metrics_sink}
edges:
  - source -> autoscale -> sort -> route -> generate -> metrics -> sink
executor: {kind: processes, ping_s: 0.05, num_spares: 0}
"""
# Four sequences at a time, of 40 tokens and 0.8 s each: five requests a second.
MODELLED = """{kind: modelled, model: "null", max_num_seqs: 4, num_blocks: 256, max_model_len: 512,
      decode_step_s: 0.02}"""
TINY = "{model: sage-tiny, deterministic: true, max_num_seqs: 1, num_blocks: 128, threads: 1}"
NUM_TOKENS = 40


def written(
    folder: Path, engine: str, *, most: int = 3, drain: float = 5.0, retry: float = 30.0
) -> Path:
    path = folder / "elastic.yaml"
    text = GRAPH.replace("ENGINE", engine).replace("DRAIN", f"{drain:g}").replace("MOST", str(most))
    path.write_text(text.replace("RETRY", f"{retry:g}"))
    return path


def prompt(number: int) -> list[int]:
    return [number % 200 + 1, *range(1, 30)]


class Load:
    """Asks for answers while it is told to, and keeps them all."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.answers: dict[int, list[int]] = {}
        self.num_asked = 0

    async def ask(self, number: int) -> None:
        sampling = Sampling(max_tokens=NUM_TOKENS, ignore_eos=True, seed=number, temperature=1.0)
        tokens: list[int] = []
        async for event in self.session.stream(prompt(number), sampling=sampling):
            tokens += event.token_ids
        self.answers[number] = tokens

    async def run(self, nursery: trio.Nursery, gap_s: float, until_true: Any) -> None:
        while not until_true():
            nursery.start_soon(self.ask, self.num_asked)
            self.num_asked += 1
            await trio.sleep(gap_s)


def num_ready(session: Session) -> int:
    assert session.supervisor is not None
    return sum(worker.state == "ready" for worker in session.supervisor.workers)


def pids(session: Session) -> set[int]:
    assert session.supervisor is not None
    return {worker.pid for worker in session.supervisor.workers if worker.pid is not None}


async def one_process_answers(folder: Path, engine: str, numbers: int) -> dict[int, list[int]]:
    """The same answers from one process, without an operator that scales."""
    plain = folder / "plain.yaml"
    begin, end = GRAPH.index("  autoscale:"), GRAPH.index("  sort:")
    text = (GRAPH[:begin] + GRAPH[end:]).replace("source -> autoscale", "source")
    plain.write_text(text[: text.index("executor:")].replace("ENGINE", engine))
    async with Graph.load(str(plain)).open() as session:
        load = Load(session)
        async with trio.open_nursery() as nursery:
            for number in range(numbers):
                nursery.start_soon(load.ask, number)
        return load.answers


@pytest.mark.parametrize(
    ("engine", "gap_s", "drain", "most"),
    [
        (MODELLED, 0.08, 5.0, 3),
        pytest.param(MODELLED, 0.08, 0.0, 3, marks=pytest.mark.soak),
        (TINY, 0.05, 5.0, 2),
    ],
    ids=["drained", "moved", "computed"],
)
async def test_replicas_come_with_the_load_and_go_with_it(
    tmp_path: Path, engine: str, gap_s: float, drain: float, most: int
) -> None:
    path, log, seen = (
        written(tmp_path, engine, most=most, drain=drain),
        tmp_path / "log",
        set[int](),
    )
    graph = Graph.load(str(path)).open()
    graph.record_to(DecisionFile(log))
    with trio.fail_after(60):
        async with graph as session:
            load, meters = Load(session), metered(session)
            async with trio.open_nursery() as nursery:
                await load.run(nursery, gap_s, lambda: num_ready(session) >= most)
                seen |= pids(session)
                shown = (await meters.exposition())[0].decode()
                await load.run(nursery, 0.5, lambda: num_ready(session) <= 1)
            await until(lambda: num_ready(session) == 1 and len(pids(session)) == 1)
            gone = seen - pids(session)
            assert len(gone) == most - 1
            await until(lambda: not any(psutil.pid_exists(pid) for pid in gone))
            await session.idle()
            session.executor.core.ledger.check()
            assert num_leased(session) == 0
    assert not any(psutil.pid_exists(pid) for pid in seen)
    assert len(load.answers) == load.num_asked
    assert load.answers == await one_process_answers(tmp_path, engine, load.num_asked)
    labels = '{engine="g",graph="elastic"}'
    assert f"sagellm_autoscale_ready_replicas{labels} {most}.0" in shown
    assert f"sagellm_autoscale_wanted_replicas{labels} {most}.0" in shown
    assert "sagellm_autoscale_changes_total" in shown
    assert replay(log, functions={}).difference is None


def metered(session: Session) -> GatewayMeters:
    return GatewayMeters(session, models=(CARD,), endpoints=("/v1/completions",), compat=())


async def test_the_example_serves() -> None:
    async with Graph.load(str(ROOT / "examples" / "autoscaled.yaml")).open() as session:
        answer = await session.generate("Once", sampling=Sampling(max_tokens=5, ignore_eos=True))
        assert len(answer.token_ids) == 5
        assert num_ready(session) == 1


@pytest.mark.parametrize("folder", ["examples", "benchmarks/simulation"])
def test_the_graphs_of_the_documents_are_right(folder: str) -> None:
    document = load_file(ROOT / folder / "autoscaled.yaml")
    graph = check_graph(document, RESOLVER)
    assert load(dump(graph), file="again").graph == graph
    found = simulate(
        SimulationPoint(
            document,
            read_workload("synthetic:rate=40,arrivals=constant,output=400,requests=1600"),
            {"g.kind": "modelled", "g.profile": "h100-sxm", "g.model": "llama-3-8b"},
        )
    )
    assert max(count for _, count in found.counts["g"]) > found.counts["g"][0][1]


def test_the_yaml_in_the_document_is_right() -> None:
    text = (ROOT / "docs" / "autoscaling.md").read_text().split("```yaml")[1].split("```")[0]
    assert check_graph(load(text, file="docs"), RESOLVER).name == "elastic"


def test_the_document_has_every_option_with_its_default() -> None:
    text = (ROOT / "docs" / "autoscaling.md").read_text()
    for options in (AutoscaleOptions, ReplicaBounds):
        for option in fields(options):
            default = "" if option.default is MISSING else option.default
            shown = {None: r"none|learned", "holt": "`holt`"}.get(default, f"{default}")
            shown = shown.removesuffix(".0") if option.name != "slo_ttft_s" else shown
            assert re.search(rf"\| `{option.name}` \| ({shown}) ?\|", text), option.name


@pytest.mark.soak
async def test_a_replica_that_cannot_start_is_tried_again_after_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Graph.load(str(written(tmp_path, MODELLED, retry=0.5))).open() as session:
        assert session.supervisor is not None
        launcher: Any = session.supervisor._lifecycle._launcher
        launched: list[float] = []
        start = launcher.launch

        def launch(epoch: int) -> Any:
            launched.append(trio.current_time())
            return start(epoch)

        monkeypatch.setattr(launcher, "launch", launch)
        monkeypatch.setattr(launcher, "_module", "no_such_module")
        load = Load(session)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                begun_s = trio.current_time()
                await load.run(nursery, 0.08, lambda: trio.current_time() > begun_s + 4.0)
                scaling = session.executor.core.meter.scaling("g")
                assert 2 <= len(launched) <= 4  # after pauses of 0.5, 1 and 2 s
                assert scaling.num_failed in (len(launched), len(launched) - 1)
                assert num_ready(session) == 1
                monkeypatch.setattr(launcher, "_module", "sagellm.opening.worker_main")
                await load.run(nursery, 0.08, lambda: num_ready(session) >= 2)
        await session.idle()
        session.executor.core.ledger.check()
    assert {len(tokens) for tokens in load.answers.values()} == {NUM_TOKENS}


async def test_the_graph_may_be_closed_while_a_replica_starts(tmp_path: Path) -> None:
    children = psutil.Process(os.getpid()).children
    before = {child.pid for child in children(recursive=True)}
    async with Graph.load(str(written(tmp_path, MODELLED))).open() as session:
        load = Load(session)
        async with trio.open_nursery() as nursery:
            await load.run(nursery, 0.02, lambda: len(pids(session)) >= 2)
            nursery.cancel_scope.cancel()
    await until(lambda: {child.pid for child in children(recursive=True)} <= before)
