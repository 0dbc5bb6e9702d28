"""llama.cpp: each sequence has its own KV cache.

The unified cache, the default of llama.cpp's Python class, costs 16 to 47 % here.
"""

import ctypes
from typing import Any

import llama_cpp as api
from llama_sequences import Llama
from wire import serve


@api.llama_log_callback  # type: ignore[untyped-decorator]
def _quiet(level: int, text: bytes, data: Any) -> None:
    pass


class LlamaCpp(Llama):  # type: ignore[misc]
    """llama.cpp without its log."""

    def load_options(self) -> Any:
        api.llama_log_set(_quiet, ctypes.c_void_p(0))
        return super().load_options()

    def context_options(self) -> Any:
        options = super().context_options()
        options.kv_unified = False
        return options

    def clear(self) -> None:
        api.llama_memory_clear(api.llama_get_memory(self.context), True)


if __name__ == "__main__":
    serve(LlamaCpp(api))
