"""torch.compile must tell specifications apart: one module class, many specifications, one process.

Dynamo misses a guard where an object of the specification is also a global that is compared with it (see core.formats.TRACED_E4M3): the
graph of the first specification then runs, silently, for all others. Traced with the "eager" backend, so no C++ is compiled.
"""

from __future__ import annotations

import pytest
import torch

import core
from tests.spec.specs import KEY, SPECS


class Quantizer(torch.nn.Module):
  def __init__(self, spec: core.QuantSpec) -> None:
    super().__init__()
    self.spec = spec

  def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    key = KEY if self.spec.rounding == "stochastic" else None
    return core.fake_quantize(x, self.spec, key=key), core.quantize(x, self.spec, key=key).codes


@pytest.mark.parametrize("order", (1, pytest.param(-1, marks=pytest.mark.slow)))
def test_one_class_many_specifications(order, compared):
  torch.compiler.reset()
  torch._dynamo.config.recompile_limit = 10_000
  specs = {
    **SPECS,
    "e4m3": core.QuantSpec.named("fp8_e4m3"),
    "e2m1": core.QuantSpec(core.formats.E2M1),
    "uint8": core.QuantSpec(core.formats.UINT8),
  }
  x = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
  x = x.repeat(1, 3)[:, :384]
  for label in ["e4m3", *[s for s in specs if s != "e4m3"]][::order]:
    module = Quantizer(specs[label])
    values, codes = torch.compile(module, fullgraph=True, dynamic=False, backend="eager")(x)
    expected_values, expected_codes = module(x)
    compared(2 * x.numel())
    assert torch.equal(values, expected_values), label
    assert torch.equal(codes, expected_codes), label
