"""Every way to multiply gives the same numbers, within float32."""

from types import SimpleNamespace

import pytest
import torch

from sagellm.backends.cpu import torch_linear as ways

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
ROWS = pytest.mark.parametrize("rows", [1, 6, 300])


def operands(rows, dtype):
    torch.manual_seed(2)
    x, weight, bias = torch.randn(rows, 48), torch.randn(70, 48).to(dtype), torch.randn(70)
    return x, weight, bias, (x.double() @ weight.double().T + bias).float()


@DTYPES
@ROWS
@pytest.mark.parametrize("way", [ways.upcast, ways.row_by_row])
def test_ways_in_torch(way, rows, dtype):
    x, weight, bias, wanted = operands(rows, dtype)
    assert torch.allclose(way(weight, bias)(x), wanted, atol=1e-4)


def test_upcast_goes_by_blocks_of_the_weight(monkeypatch):
    monkeypatch.setattr(ways, "_BLOCK_NUMBERS", 48 * 9)
    x, weight, bias, wanted = operands(5, torch.bfloat16)
    assert torch.allclose(ways.upcast(weight, bias)(x), wanted, atol=1e-4)


@ROWS
def test_packed_by_onednn(rows):
    x, weight, bias, wanted = operands(rows, torch.float32)
    assert torch.allclose(ways.packed(weight, bias)(x), wanted, atol=1e-4)


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_tile"])
def test_bfloat16_products_need_their_instructions(monkeypatch, feature):
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.delattr(torch.cpu, f"_is_{name}_supported", raising=False)
    assert not ways.has_bfloat16_products()
    monkeypatch.setattr(torch.cpu, f"_is_{feature}_supported", lambda: True, raising=False)
    assert ways.has_bfloat16_products() == torch._C._has_mkldnn


@pytest.mark.skipif(not ways.has_bfloat16_products(), reason="a CPU without bfloat16 products")
@ROWS
def test_packed_in_bfloat16(rows):
    x, weight, bias, wanted = operands(rows, torch.bfloat16)
    found = ways.packed(weight, bias)(x)
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


@pytest.mark.parametrize(
    ("native", "products", "bfloat16", "exact", "whole", "deterministic"),
    [
        (True, False, "native", "native", "native", "native"),
        (True, True, "native", "native", "native", "native"),
        (False, False, "upcast", "upcast", "packed", "row_by_row"),
        (False, True, "packed", "upcast", "packed", "row_by_row"),
    ],
)
def test_choice(monkeypatch, native, products, bfloat16, exact, whole, deterministic):
    for way in ("packed", "native", "upcast", "row_by_row"):
        monkeypatch.setattr(ways, way, lambda *_, way=way, **__: way)
    monkeypatch.setattr(ways, "has_bfloat16_products", lambda: products)
    monkeypatch.setattr(torch._C, "_has_mkldnn", True)
    binding = SimpleNamespace(native=native, deterministic=False, uses_tiles=False)
    half, single = torch.zeros(2, 2, dtype=torch.bfloat16), torch.zeros(2, 2)
    assert ways.linear(binding, half, None) == bfloat16
    assert ways.linear(binding, half, None, exact=True) == exact
    assert ways.linear(binding, single, None) == whole
    binding.deterministic = True
    assert {ways.linear(binding, weight, None) for weight in (half, single)} == {deterministic}
