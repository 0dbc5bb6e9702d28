"""The meaning of the options of `sagellm serve`, and invalid options."""

import os
import sys
from pathlib import Path

import pytest

from sagellm import Graph
from sagellm.cli import main
from sagellm.cli.errors import Failure
from sagellm.cli.graph_argument import choose_graph, choose_graphs, choose_model
from sagellm.cli.serve import (
    bound_socket,
    check_server_installed,
    engine_overrides,
    held_data_dir,
    served_names,
)
from sagellm.cli.serve_options import (
    ListenOptions,
    ObservabilityOptions,
    ServedModelOptions,
    read_settings,
)
from sagellm.gateway.settings import Settings
from sagellm.graphs.sections import served_models


@pytest.fixture(autouse=True)
def _no_keys_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAGELLM_API_KEY", raising=False)
    monkeypatch.delenv("SAGELLM_ADMIN_KEY", raising=False)


def test_keys_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGELLM_API_KEY", "alice=from-outside")
    monkeypatch.setenv("SAGELLM_ADMIN_KEY", "root")
    settings = read_settings(ListenOptions(), ("m",))
    assert (settings.api_keys, settings.admin_key) == ({"alice": "from-outside"}, "root")
    given = read_settings(ListenOptions(api_key=("k",), admin_key="a"), ("m",))
    assert (given.api_keys, given.admin_key) == ({"key-1": "k"}, "a")


@pytest.mark.parametrize("keys", [("a=k", "b=k"), ("admin-key",)])
def test_no_two_callers_have_one_key(keys: tuple[str, ...]) -> None:
    """A user with the admin's key would be admin."""
    with pytest.raises(Failure, match="twice"):
        read_settings(ListenOptions(api_key=keys, admin_key="admin-key"), ("m",))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.com"])
def test_an_open_address_needs_a_key(host: str) -> None:
    with pytest.raises(Failure, match="no API key"):
        read_settings(ListenOptions(host=host), ("m",))
    assert read_settings(ListenOptions(host=host, insecure=True), ("m",)).host == host
    assert read_settings(ListenOptions(host=host, api_key=("k",)), ("m",)).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert read_settings(ListenOptions(host=host), ("m",)).api_keys == {}


def test_a_model_is_served_by_its_name() -> None:
    graph, model = choose_graph("sage-tiny", None)
    assert served_names(graph, model, ServedModelOptions()) == ("sage-tiny",)


def test_a_graph_is_served_by_the_name_of_its_model() -> None:
    graph, model = choose_graph("graphs/pd.yaml", None)
    assert served_names(graph, model, ServedModelOptions()) == ("sage-tiny",)


def test_a_folder_is_served_by_its_name(tmp_path: object) -> None:
    graph, _ = choose_graph("joint", None)
    assert served_names(graph, f"{tmp_path}/", ServedModelOptions())[0] not in ("", str(tmp_path))
    named = ServedModelOptions(served_model_name=("a", "b"))
    assert served_names(graph, str(tmp_path), named) == ("a", "b")


def test_several_models_have_the_names_of_their_table() -> None:
    graph, model = choose_graphs(["sage-tiny", "null"], None)
    assert served_names(graph, model, ServedModelOptions()) == ("sage-tiny", "null")
    assert [one.engines for one in served_models(graph.ir)] == [("sage-tiny",), ("null",)]
    with pytest.raises(Failure, match="several are served"):
        served_names(graph, model, ServedModelOptions(served_model_name=("a",)))


@pytest.mark.parametrize(
    ("names", "model", "says"),
    [
        (["pd", "sage-tiny"], None, "pd is a graph"),
        (["sage-tiny", "pd"], None, "pd is a graph"),
        (["sage-tiny", "sage-tiny"], None, "two of the models are called sage-tiny"),
        (["sage-tiny", "null"], "null", "several models are named"),
        (["sage-tiny", "sage-tny"], None, "no graph and no model"),
    ],
)
def test_names_beside_each_other_are_models(names: list[str], model: str | None, says: str) -> None:
    with pytest.raises(Failure, match=says):
        choose_graphs(names, model)


@pytest.mark.parametrize(
    ("model", "means"), [(None, (None, "")), ("echo", (None, "echo")), ("tiny", (None, "tiny"))]
)
def test_of_several_models_the_option_chooses_one(
    model: str | None, means: tuple[str | None, str]
) -> None:
    graph = Graph.load(Path("examples/two_models.yaml"))
    assert choose_model(graph, model) == means
    assert choose_model(Graph.load("pd"), model) == (model, "")


def test_a_model_that_none_of_several_is_called_is_refused() -> None:
    with pytest.raises(Failure, match="no such model") as failed:
        choose_model(Graph.load(Path("examples/two_models.yaml")), "defaul")
    assert failed.value.fix == "did you mean default?"


def test_the_length_goes_to_every_engine() -> None:
    graph, _ = choose_graph("pd", None)
    changed = engine_overrides(graph, ServedModelOptions(max_model_len=64))
    assert changed == {"p.max_model_len": 64, "d.max_model_len": 64}
    assert engine_overrides(graph, ServedModelOptions()) == {}


@pytest.mark.parametrize(
    "options",
    [ServedModelOptions(tensor_parallel_size=2), ServedModelOptions(gpu_memory_utilization=0.9)],
)
def test_what_nothing_obeys_is_refused(options: ServedModelOptions) -> None:
    graph, _ = choose_graph("pd", None)
    with pytest.raises(Failure):
        engine_overrides(graph, options)


def test_a_port_that_is_taken_ends_it_before_any_weight(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagellm.opening.open_graph.open_engines", None)
    with bound_socket(Settings(port=0)) as sock:
        sock.listen()
        port = sock.getsockname()[1]
        assert main(["serve", "pd", "--port", str(port)]) == 3
    shown = capsys.readouterr().err
    assert "the port is in use" in shown
    assert "--port" in shown
    assert "Traceback" not in shown


def test_an_address_of_another_machine_is_told() -> None:
    with pytest.raises(Failure, match="no such address"), bound_socket(Settings(host="192.0.2.7")):
        pass


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sagellm.gateway.http.uvicorn", raising=False)
    monkeypatch.setitem(sys.modules, "uvloop", None)
    with pytest.raises(Failure, match="uvloop"):
        check_server_installed("uvicorn")


@pytest.mark.parametrize(
    ("watch", "named"),
    [
        (ObservabilityOptions(otlp_endpoint="collector:4318"), "--otlp-endpoint"),
        (
            ObservabilityOptions(otlp_endpoint="http://collector:4318", trace_sample=2.0),
            "--trace-sample",
        ),
        (ObservabilityOptions(trace_sample=0.5), "--trace-sample"),
    ],
)
def test_traces_that_cannot_be_sent_are_refused_at_once(watch, named):
    with pytest.raises(Failure, match=named):
        read_settings(ListenOptions(), ("m",), watch)


def test_traces_go_where_they_are_asked_to_go():
    watch = ObservabilityOptions(otlp_endpoint="http://collector:4318", trace_sample=0.5)
    settings = read_settings(ListenOptions(), ("m",), watch)
    assert (settings.otlp_endpoint, settings.trace_sample) == ("http://collector:4318", 0.5)


def test_gateway_processes_need_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    with pytest.raises(Failure, match="gateway processes need Linux"):
        read_settings(ListenOptions(gateways=2), ("m",))
    read_settings(ListenOptions(), ("m",))


def test_the_page_is_served_unless_it_is_switched_off() -> None:
    assert read_settings(ListenOptions(), ("m",)).page
    assert not read_settings(ListenOptions(page=False), ("m",)).page


def test_a_data_folder_that_cannot_be_used_ends_it_before_any_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for wrong in (file, file / "below"):
        assert main(["serve", "joint", "--data-dir", str(wrong)]) == 2
        said = capsys.readouterr().err
        assert "--data-dir cannot be used" in said
        assert str(wrong) in said


def test_a_data_folder_is_made_for_its_user_alone(tmp_path: Path) -> None:
    with held_data_dir(tmp_path / "a"):
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    with held_data_dir(None):
        pass


def test_a_second_server_on_a_data_folder_is_told_who_holds_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held_data_dir(tmp_path):
        assert main(["serve", "joint", "--data-dir", str(tmp_path)]) == 3
    said = capsys.readouterr().err
    assert f"--data-dir is in use: the server of process {os.getpid()} on " in said
    assert str(tmp_path) in said
    assert "a folder of its own" in said
