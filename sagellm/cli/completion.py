"""`sagellm completion`: a script that lets a shell complete commands, options and values."""

from typing import Literal

from sagellm.cli import APP


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print the completion script of a shell.

    Parameters
    ----------
    shell
        bash reads it from ~/.local/share/bash-completion/completions/sagellm, zsh from _sagellm in
        a folder of fpath, fish from ~/.config/fish/completions/sagellm.fish.
    """
    print(_with_file_names(APP.generate_completion(shell=shell)))


def _with_file_names(script: str) -> str:
    """Let bash complete file names where no option or command fits: graphs and models are paths."""
    return script.replace("complete -F _sagellm", "complete -o default -F _sagellm")
