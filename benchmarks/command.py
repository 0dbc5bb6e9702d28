"""What the commands of `sagellm bench` share."""

from cyclopts import App

from sagellm.cli.errors import Failure, show_failure


def run_command(app: App) -> int:
    """Measure, and return the exit status. Shows a user's mistake as `sagellm` does."""
    try:
        app(result_action="return_none")
    except Failure as failure:
        show_failure(failure)
        return failure.code
    return 0
