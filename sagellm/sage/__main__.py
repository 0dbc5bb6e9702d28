"""`python -m sagellm.sage --host --port --log-level`: the gateway, started as SAGE starts one.

The environment variable SAGELLM_ENGINE_MODEL names the model; SAGE probes `/health`.
"""

import os
import sys
from typing import Annotated, Literal

from cyclopts import App, Parameter

from sagellm.__main__ import command

MODEL_VARIABLE = "SAGELLM_ENGINE_MODEL"
DEFAULT_MODEL = "sage-tiny"


def arguments(
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    log_level: Literal["debug", "info", "warning", "error"] = "info",
    control_plane: Annotated[bool, Parameter(negative=())] = False,
) -> list[str]:
    """The arguments of `sagellm serve`.

    Parameters
    ----------
    control_plane
        Not taken: `sagellm engine` and `sagellm gateway` change what runs.
    """
    if control_plane:
        print(
            "error: --control-plane is not built; leave it out (enable_control_plane=False)",
            file=sys.stderr,
        )
        sys.exit(2)
    model = os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL
    return [model, "--host", host, "--port", str(port), "--log-level", log_level]


def serve() -> int:
    """Serve until the end of the gateway, and return its exit code."""
    app = App(name="sagellm.sage", result_action="return_value", default_command=arguments)
    found: list[str] = app()
    sys.argv = ["sagellm", "serve", *found]
    return command()


if __name__ == "__main__":
    sys.exit(serve())
