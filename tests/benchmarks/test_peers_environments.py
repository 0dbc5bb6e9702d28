import pytest

from benchmarks.peers.engines import PEERS
from benchmarks.peers.environments import ENVIRONMENTS, avx512_options

ZEN5 = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 avx512vbmi avx512_vnni\n"


def test_ik_llama_cpp_is_built_with_the_instruction_sets_of_the_cpu() -> None:
    assert avx512_options(ZEN5).split() == [
        "-DGGML_AVX512=ON",
        "-DGGML_AVX512_VBMI=ON",
        "-DGGML_AVX512_VNNI=ON",
        "-DGGML_AVX512_BF16=ON",
    ]
    assert avx512_options("flags : avx2 avx512f avx512vl\n") == "-DGGML_AVX512=ON"


@pytest.mark.parametrize("listing", ["", "flags\t: fpu avx2\n", "Features : asimd\n"])
def test_a_cpu_without_avx512_has_no_options_of_it(listing: str) -> None:
    assert avx512_options(listing) == ""


def test_every_peer_has_a_driver_and_an_environment_with_versions() -> None:
    for peer in PEERS.values():
        assert peer.driver.is_file()
        if peer.environment is not None:
            assert "==" in ENVIRONMENTS[peer.environment].requirements.read_text()
