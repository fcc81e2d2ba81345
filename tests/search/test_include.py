"""`include`: an algorithm on some layers, max calibration on the others, in both backends."""

from __future__ import annotations

import pytest

from core.config import read_algorithm
from tests.calibrate.twins import BACKENDS, Jax, Torch, assert_same, state

INT4 = {"num_bits": 4, "block_sizes": {-1: 16}}
WEIGHTS = {"*weight_quantizer": INT4, "default": {"enable": False}}
BOTH = {**WEIGHTS, "*input_quantizer": {"num_bits": 8}}
CHOSEN = ["layers.0.gate_proj", "layers.0.up_proj", "head"]
STEPS = {
  "awq_lite": {"method": "awq_lite", "alpha_step": 0.25},
  "gptq": {"method": "gptq"},
  "gptq layerwise": {"method": "gptq", "layerwise": True},
  "mse": {"method": "mse"},
  "svdquant": {"method": "svdquant", "lowrank": 4},
}


def parts(found, chosen):
  return {name: value for name, value in found.items() if (name.rpartition(".")[0] in CHOSEN) is chosen}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", STEPS)
def test_the_chosen_layers_get_the_algorithm_and_the_others_max(backend, step):
  limited = BACKENDS[backend]().quantize(["max", {**STEPS[step], "include": CHOSEN}], WEIGHTS)
  found, plain = state(limited.host()), state(BACKENDS[backend]().quantize("max", WEIGHTS).host())
  assert_same(parts(found, False), parts(plain, False))
  assert {row["layer"] for row in limited.report if "kept" not in row} <= set(CHOSEN)
  assert any(row["layer"] == "layers.0.gate_proj" for row in limited.report)
  if "layerwise" not in step:  # block by block the inputs come through layers that are quantized otherwise
    assert_same(parts(found, True), parts(state(BACKENDS[backend]().quantize(STEPS[step], WEIGHTS).host()), True))


def test_both_backends_leave_the_same_state():
  algorithm = ["max", {"method": "awq_clip", "include": ["*.gate_proj"]}, {"method": "mse", "include": ["head"]}]
  ours, theirs = Torch().quantize(algorithm, WEIGHTS), Jax().quantize(algorithm, WEIGHTS)
  assert [(row["layer"], row["method"]) for row in ours.report] == [(row["layer"], row["method"]) for row in theirs.report]
  assert {row["layer"]: row["method"] for row in ours.report} == {
    "layers.0.gate_proj": "awq_clip", "layers.1.gate_proj": "awq_clip", "head": "mse",
  }  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_algorithms_take_the_layers_of_their_quantizers(backend):
  net = BACKENDS[backend]().quantize(["max", {"method": "percentile", "percentile": 90.0, "include": ["*.down_proj"]}], BOTH)
  plain = BACKENDS[backend]().quantize("max", BOTH)
  for name in net.host().activation_configs():
    smaller = float(net.host().activation_amax(name)) < float(plain.host().activation_amax(name))
    assert smaller == name.endswith("down_proj.input_quantizer"), name


def test_wrong_uses_are_refused():
  with pytest.raises(ValueError, match=r"algorithm 'max' has 'include', which it does not take"):
    read_algorithm({"method": "max", "include": ["*"]})
  with pytest.raises(ValueError, match=r"algorithm 'mse': include is '\*q_proj'; a list of patterns of layer names is needed"):
    read_algorithm({"method": "mse", "include": "*q_proj"})
  with pytest.raises(ValueError, match=r"algorithm 'cross_layer_equalization' changes layers together and cannot be limited to \['head'\]"):
    Torch().quantize({"method": "cross_layer_equalization", "include": ["head"]}, WEIGHTS)
