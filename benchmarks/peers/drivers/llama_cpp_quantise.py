"""Makes a quantised copy of a GGUF file: python llama_cpp_quantise.py FILE COPY q8_0 | q4_0."""

import sys

import llama_cpp as api

TYPES = {"q8_0": api.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": api.LLAMA_FTYPE_MOSTLY_Q4_0}


def main() -> None:
    file, copy, name = sys.argv[1:]
    options = api.llama_model_quantize_default_params()
    options.ftype = TYPES[name]
    failed = api.llama_model_quantize(file.encode(), copy.encode(), options)
    if failed:
        raise SystemExit(f"llama_model_quantize returned {failed}")


if __name__ == "__main__":
    main()
