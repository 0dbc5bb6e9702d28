"""Grammars, bent by atheris: `python -m fuzz_grammars -max_total_time=60`."""

import sys

import atheris

with atheris.instrument_imports(include=["sagellm.runtime.grammars"]):
    from random_grammars import take

if __name__ == "__main__":
    atheris.Setup(sys.argv, take)
    atheris.Fuzz()
