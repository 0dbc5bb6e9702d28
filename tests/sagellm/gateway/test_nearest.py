"""Paths in answers: bounded and escaped; the nearest route is named."""

from sagellm.gateway.http.call import MAX_PATH_LEN, no_such_path, shown
from sagellm.gateway.http.routes import PATHS


def test_a_path_is_shown_escaped_and_bounded() -> None:
    assert shown(b"/v1/x y\n\x1b[0m\xff<b>") == "/v1/x%20y%0A%1B%5B0m%FF%3Cb%3E"
    assert shown(b"/" + b"x" * 10_000) == "/" + "x" * (MAX_PATH_LEN - 1) + "..."
    assert len(shown(b"\xff" * 10_000)) <= MAX_PATH_LEN + 3


def test_a_path_unlike_any_route_names_no_other() -> None:
    assert no_such_path(b"/wp-login.php", PATHS).startswith("there is no such path: /wp-login.php;")
    assert "did you mean" not in no_such_path(b"/wp-login.php", PATHS)


def test_paths_of_other_apis_name_what_is_here() -> None:
    for path, here in ((b"/api/chat", "/v1/chat/completions"), (b"/api/embed", "/v1/embeddings")):
        assert f"this server has {here}" in no_such_path(path, PATHS)
