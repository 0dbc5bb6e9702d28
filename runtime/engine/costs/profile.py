"""Profiles: the cost model of an engine with where it comes from, in a JSON file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sagellm.graphs.models import ModelFacts
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.engine.costs.fitted import FittedCost, FittedForm
from sagellm.runtime.engine.costs.parallel import ALONE, Parallelism
from sagellm.runtime.engine.costs.roofline import RooflineCost, RooflineForm, RooflineModel
from sagellm.runtime.engine.costs.spread import StepSpread, check_spread
from sagellm.runtime.engine.costs.table import (
    KernelShape,
    TableError,
    TableForm,
    read_kernels,
    read_steps,
)
from sagellm.runtime.engine.step_cost import CostModel

_SHIPPED = Path(__file__).parent / "profiles"
_SUFFIX = ".json"


class ProfileError(ValueError):
    """A profile cannot be found, read or used. The message has the cause and the fix."""


class HostCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The time of a request outside of steps, in seconds.

    `submit_s`, `submit_token_s`: of a request, and of a token of its prompt, before it is in the
    engine. `deliver_s`, `deliver_row_s`: of a step, and of a sequence in it, until its tokens reach
    their readers.
    """

    submit_s: float
    submit_token_s: float
    deliver_s: float
    deliver_row_s: float


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The cost of an engine's steps.

    `model`: the model that was measured; None: any. `device`: what computes. `method`: how the
    figures came about. `made_on`: the date. `machine`: where it was measured. `cost`: the cost
    model. `spread`: how measured steps vary about it, by their expected time; empty: not at all.
    `host`: the time outside of steps; None: none. `kv_token_bytes`: keys and values of one token,
    if known. `options`: the engine's when it was measured. `source`: where published figures are
    from.
    """

    name: str
    model: str | None
    device: str
    method: str
    made_on: str
    cost: FittedForm | RooflineForm | TableForm
    machine: str = ""
    spread: tuple[StepSpread, ...] = ()
    host: HostCost | None = None
    kv_token_bytes: float | None = None
    options: dict[str, Any] = {}
    source: str = ""


@dataclass(frozen=True, slots=True)
class CostedModel:
    """The model that a profile is combined with. `kv_bytes`: keys and values of one token, in
    bytes. `group`: the devices of one replica.
    """

    name: str
    facts: ModelFacts
    dtype: str
    kv_bytes: float
    group: Parallelism = ALONE


def shipped_profiles() -> list[str]:
    """The names of the profiles that come with sagellm."""
    return sorted(file.stem for file in _SHIPPED.glob(f"*{_SUFFIX}"))


def profile_file(name: str) -> Path:
    """The file of a shipped name or of a path. Raises ProfileError."""
    if name in shipped_profiles():
        return _SHIPPED / f"{name}{_SUFFIX}"
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name.endswith(_SUFFIX) or os.sep in name:
        raise ProfileError(f"profile: there is no file {name}; check the path")
    begun = (one for one in shipped_profiles() if name and one.startswith(name))
    close = next(begun, nearest(name, shipped_profiles()))
    fix = f"did you mean {close}?" if close else f"there are {', '.join(shipped_profiles())}"
    raise ProfileError(f"profile: {name!r} is unknown; {fix}")


def read_profile(name: str) -> Profile:
    """The profile of a shipped name or a file. Raises ProfileError."""
    path = profile_file(name)
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
        check_spread(profile.spread)
        return profile
    except OSError as error:
        raise ProfileError(f"profile: {path}: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        raise ProfileError(f"profile: {path} is no profile: {error}") from None


def write_profile(path: Path, profile: Profile) -> None:
    """Write a profile. Raises OSError."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")


def cost_of(profile: Profile, model: CostedModel, folder: Path) -> CostModel:
    """The cost model of a profile for a model. `folder`: where the profile's tables are.

    Raises ProfileError for a model that the profile was not made for, and for a faulty table.
    """
    names = (model.name, Path(model.name).name)  # a folder is known by its own name
    if profile.model is not None and profile.model not in names and model.name != "null":
        raise ProfileError(
            f"profile: {profile.name} was measured with model {profile.model}, not {model.name}; "
            f"give another profile, or model: {profile.model}"
        )
    if not isinstance(profile.cost, RooflineForm) and model.group.num_devices > 1:
        raise ProfileError(
            f"tensor_parallel_size, pipeline_parallel_size, expert_parallel_size: {profile.name} "
            "is of one engine as it was measured; drop them"
        )
    misfit = model.group.misfit(model.facts)
    if misfit:
        raise ProfileError(f"profile: {profile.name}: {misfit}")
    try:
        return _cost(profile.cost, model, folder)
    except (TableError, ValueError) as error:
        raise ProfileError(f"profile: {profile.name}: {error}") from None


def _cost(
    form: FittedForm | RooflineForm | TableForm, model: CostedModel, folder: Path
) -> CostModel:
    if isinstance(form, FittedForm):
        return FittedCost.of(form)
    if isinstance(form, RooflineForm):
        sizes = RooflineModel.of(model.facts, dtype=model.dtype, kv_bytes=model.kv_bytes)
        return RooflineCost(form, sizes, model.group)
    file = folder / form.file
    if file.is_dir():
        if model.facts.experts is not None:
            raise TableError("tables of kernels are of dense models; give a roofline")
        return read_kernels(file, kernel_shape(model.facts), form.step_s)
    return read_steps(file, form.step_s)


def kernel_shape(facts: ModelFacts) -> KernelShape:
    """The sizes of the kernels of a dense model with gated linears."""
    hidden, width = facts.hidden_size, facts.num_heads * facts.head_dim
    kv_width = facts.num_kv_heads * facts.head_dim
    num_tables = 1 if facts.tie_embeddings else 2
    layers = facts.num_parameters - num_tables * facts.vocab_size * hidden - hidden
    attention = hidden * (2 * width + 2 * kv_width)
    inner = int(layers / facts.num_layers - attention - 2 * hidden) // (3 * hidden)
    return KernelShape(
        facts.num_layers,
        facts.num_heads,
        facts.num_kv_heads,
        facts.head_dim,
        ((width + 2 * kv_width, hidden), (hidden, width), (2 * inner, hidden), (hidden, inner)),
        (facts.vocab_size, hidden),
    )
