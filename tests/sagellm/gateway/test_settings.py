"""What no gateway can be set up with."""

from pathlib import Path

import pytest
import trio
from gateway_calls import gateway_before, playing

from sagellm.gateway.http.app import build_app
from sagellm.gateway.lifecycle import server_class
from sagellm.gateway.settings import Settings, bind


@pytest.mark.parametrize("half", ["tls_certificate", "tls_key"])
def test_half_of_a_tls_setup_is_not_served_in_the_clear(half: str) -> None:
    with pytest.raises(ValueError, match="both"):
        Settings(**{half: Path("x.pem")})  # type: ignore[arg-type]


async def test_a_thread_that_cannot_start_says_why(tmp_path: Path) -> None:
    missing = tmp_path / "none.pem"
    settings = Settings(server="uvicorn", tls_certificate=missing, tls_key=missing)
    app = build_app(gateway_before(playing(), settings=settings))
    with bind("127.0.0.1", 0) as sock, trio.fail_after(20):
        server = server_class("uvicorn")(app, settings, sock)
        with pytest.RaisesGroup(FileNotFoundError):
            await server.run()
