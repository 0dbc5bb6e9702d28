"""Model families from outside the tree: registered by a program, or offered by a package."""

import sys
from pathlib import Path

import pytest

from sagellm.graphs.kernels import verify
from sagellm.graphs.models import (
    FAMILIES,
    Decoder,
    ModelFamily,
    UnsupportedModel,
    build,
    facts,
    read_decoder,
    register_model_family,
)
from sagellm.graphs.models import family as families
from sagellm.graphs.models.config import Config, same_windows

NAME = "OwnForCausalLM"
CONFIG = {
    "architectures": [NAME],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PACKAGE = """\
from sagellm.graphs.models import FAMILIES, ModelFamily

FAMILY = ModelFamily("OwnForCausalLM", FAMILIES["LlamaForCausalLM"].shape)
"""


def shape(config: Config) -> Decoder:
    return read_decoder(config, "own", windows=same_windows(config, None), qkv_bias=True)


FAMILY = ModelFamily(NAME, shape)


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that a test adds is gone after the test."""
    monkeypatch.setattr(families, "FAMILIES", dict(FAMILIES))
    monkeypatch.setattr(families, "_registered", {})


def offer(site: Path, monkeypatch: pytest.MonkeyPatch, value: str, package: str = "own") -> None:
    """Install a distribution with one entry point, as far as Python can see."""
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    entry = f"[sagellm.model_families]\n{NAME} = {value}\n"
    (info / "entry_points.txt").write_text(entry)
    (site / "own_package.py").write_text(PACKAGE)
    monkeypatch.setattr(sys, "path", [*dict.fromkeys((*sys.path, str(site)))])
    monkeypatch.delitem(sys.modules, "own_package", raising=False)


def test_a_registered_family_is_built() -> None:
    register_model_family(FAMILY)
    assert verify(build(CONFIG)) == ()
    assert facts(CONFIG).family == "own"


def test_a_taken_architecture_is_refused_unless_the_family_is_the_same() -> None:
    register_model_family(FAMILY)
    register_model_family(FAMILY)
    for name in (NAME, "LlamaForCausalLM"):
        with pytest.raises(ValueError, match=f"'{name}' has a model family already"):
            register_model_family(ModelFamily(name, lambda config: shape(config)))


def test_only_a_family_is_registered() -> None:
    with pytest.raises(TypeError, match="must be a ModelFamily, not function"):
        register_model_family(shape)  # type: ignore[arg-type]


def test_a_package_offers_a_family_that_is_imported_when_a_config_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(tmp_path, monkeypatch, "own_package:FAMILY")
    facts({**CONFIG, "architectures": ["LlamaForCausalLM"]})
    assert "own_package" not in sys.modules
    assert facts(CONFIG).family == "llama"
    assert "own_package" in sys.modules


def test_an_unknown_architecture_is_answered_with_all_that_packages_offer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(tmp_path, monkeypatch, "own_package:FAMILY")
    with pytest.raises(UnsupportedModel, match=f"Qwen3ForCausalLM, {NAME}"):
        build({**CONFIG, "architectures": ["FalconForCausalLM"]})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("nowhere:FAMILY", "cannot be loaded: ModuleNotFoundError: .*fix or remove package own"),
        ("own_package:FAMILIES", "is no ModelFamily, but a dict; fix or remove package own"),
    ],
)
def test_a_package_without_the_family_is_named(
    value: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(tmp_path, monkeypatch, value)
    with pytest.raises(UnsupportedModel, match=says):
        build(CONFIG)


def test_two_packages_of_one_architecture_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(tmp_path, monkeypatch, "own_package:FAMILY")
    offer(tmp_path, monkeypatch, "own_package:OTHER", "other")
    with pytest.raises(UnsupportedModel, match="offered by package own and package other"):
        build(CONFIG)


def test_a_name_that_a_package_offers_is_taken_before_the_package_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(tmp_path, monkeypatch, "own_package:FAMILY")
    with pytest.raises(ValueError, match="has a model family already"):
        register_model_family(FAMILY)
    assert "own_package" not in sys.modules


def test_a_package_may_not_offer_a_family_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(tmp_path, monkeypatch, "own_package:OTHER")
    other = PACKAGE.replace("FAMILY = ", "OTHER = ").replace(f'"{NAME}"', '"OtherForCausalLM"')
    (tmp_path / "own_package.py").write_text(other)
    with pytest.raises(UnsupportedModel, match="is a family of OtherForCausalLM, not of"):
        build(CONFIG)


def test_a_reloaded_module_may_register_its_family_again() -> None:
    register_model_family(FAMILY)

    def reloaded(config: Config) -> Decoder:
        return shape(config)

    reloaded.__module__, reloaded.__qualname__ = shape.__module__, shape.__qualname__
    again = ModelFamily(NAME, reloaded)
    register_model_family(again)
    assert families.FAMILIES[NAME] is again
