"""The fused step against the plain modules: values, gradients, memory; its elementwise steps."""

import gc
import weakref

import pytest
import torch

from models import elementwise
from models.fused import MEMORY
from models.transformer import Transformer

CUTS = [[5, 13], [], [23]]


def gradients(model, batch):
    model.zero_grad()
    hidden = model(*batch)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    hidden.backward(upstream.to(hidden))
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.fixture
def model(tiny) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(tiny, dtype=torch.float64).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # all ones would hide a norm in the wrong place
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("memory", MEMORY)
def test_values_and_gradients_are_those_of_the_modules(model, documents, memory):
    batch = documents(model.config.vocab_size, 24, CUTS)
    expected = gradients(model, batch)
    model.fuse_blocks(memory)
    ours = gradients(model, batch)
    # Norms, rotations and SwiGLU are float32 in the modules whatever the dtype.
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
