"""Norm and rotation against their textbook definitions; the dtypes that come in and out."""

import cmath

import pytest
import torch
import torch.nn.functional as F

from models.layers import Linear, RMSNorm, SwiGLU, rotary_angles, rotate


def test_rms_norm_matches_torch():
    norm, x = RMSNorm(16, eps=1e-6), torch.randn(3, 16)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-6))


def test_rms_norm_of_bf16_is_computed_in_float32():
    norm, x = RMSNorm(16, eps=1e-6), torch.randn(3, 16).bfloat16()
    torch.testing.assert_close(norm(x), norm(x.float()).bfloat16(), rtol=0, atol=0)


def test_rotation_is_multiplication_of_complex_numbers():
    """Dimensions i and i + D/2 are the real and imaginary parts of a number that is turned."""
    positions, theta, dims = torch.tensor([[0, 1, 29]]), 10_000.0, 8
    x = torch.randn(1, 3, 2, dims)
    rotated = rotate(x, rotary_angles(positions, dims, theta))
    for t, position in enumerate(positions[0].tolist()):
        for i in range(dims // 2):
            turn = cmath.exp(1j * position * theta ** (-2 * i / dims))
            for head in range(2):
                number = complex(x[0, t, head, i], x[0, t, head, i + dims // 2]) * turn
                assert rotated[0, t, head, i].item() == pytest.approx(number.real, abs=1e-5)
                assert rotated[0, t, head, i + dims // 2].item() == pytest.approx(
                    number.imag, abs=1e-5
                )


def test_rotated_products_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)

    def product(query_position, key_position):
        at = [torch.tensor([[p]]) for p in (query_position, key_position)]
        rotated = [rotate(x, rotary_angles(p, 32, 1e4)) for x, p in zip((q, k), at, strict=True)]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(product(7, 3), product(107, 103), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(product(7, 3), product(7, 4))


def test_rotation_keeps_bf16_but_computes_in_float32():
    x = torch.randn(1, 4, 2, 16).bfloat16()
    rotation = rotary_angles(torch.arange(2000, 2004)[None], 16, 1e4)
    torch.testing.assert_close(
        rotate(x, rotation), rotate(x.float(), rotation).bfloat16(), rtol=0, atol=0
    )


def test_float32_weights_serve_bf16_and_get_float32_gradients():
    layer = SwiGLU(8, 16)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    out = layer(torch.randn(2, 8, dtype=torch.bfloat16))
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


def test_linear_has_no_bias():
    assert [name for name, _ in Linear(3, 5).named_parameters()] == ["weight"]
