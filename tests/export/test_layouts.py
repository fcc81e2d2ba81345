"""What a layout refuses, and what it writes for models that are not the plain case."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import core
import jax_backend
import torch_backend
from core import export as core_export
from core.config import ConfigWarning, QuantizerConfig
from core.export import Stage
from core.export.source import Granularity, granularity, label
from core.quantize import QuantizedTensor
from experiments import models
from tests.calibrate import twins
from tests.export import quantized as q
from torch_backend.export import ExportHost

CT, MODELOPT = "compressed-tensors", "modelopt"
INT8 = {"num_bits": 8, "axis": 0}
NVFP4_32 = {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (4, 3)}}


def twin(weights: Any, inputs: Any = None, algorithm: Any = "max", **rules: Any) -> Any:
  quant_cfg = {"default": {"enable": False}, "*weight_quantizer": weights} | ({"*input_quantizer": inputs} if inputs else {}) | rules
  return twins.Torch().quantize(algorithm, quant_cfg).model


def write(model: Any, out: Path, layout: str = CT) -> core_export.Artefact:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConfigWarning)
    torch_backend.export(model, out, layout)
  return core_export.read(out)


@pytest.mark.parametrize(
  ("weights", "inputs", "layout", "reason"),
  [
    ({"num_bits": 4, "block_sizes": {-1: 48}}, None, CT, "groups of 48 do not divide its"),
    ({"num_bits": 3, "block_sizes": {-1: 32}}, None, CT, "3-bit codes are packed differently"),
    ({"num_bits": 3, "block_sizes": {-1: 32}}, None, MODELOPT, "no name in this layout"),
    ({"num_bits": 8, "axis": 1}, None, CT, "shared by no tensor, channel, group or block"),
    ({"num_bits": 8, "axis": 0, "unsigned": True}, None, CT, "unsigned"),
    ({"num_bits": (5, 2), "axis": 0}, None, CT, "no E5M2 weight"),
    ({"format": "nf4"}, None, CT, "no NF4 weight"),
    ({"format": "nf4_double"}, None, MODELOPT, "no name in this layout"),
    ({"format": "mxfp6_e3m2"}, None, CT, r"none of the MX formats.*no layout can"),
    (NVFP4_32, {"num_bits": (4, 3)}, CT, r"blocks of 16.*'modelopt' can"),
    ({"num_bits": 8, "zero_point": True}, None, CT, "read only packed"),
    ({**INT8, "rotate": True}, None, CT, "its weight is rotated"),
    (INT8, {"num_bits": 8, "rotate": True}, CT, "its input is rotated"),
    (INT8, {"num_bits": 8, "bias": {-1: None, "type": "dynamic"}}, CT, "its input has an affine bias"),
    ({**INT8, "rounding": "stochastic"}, None, CT, "stochastic"),
    (INT8, {"num_bits": 8, "zero_point": True}, CT, "zero point are computed by no client"),
    (INT8, {"num_bits": 6}, MODELOPT, "no name in this layout"),
    (INT8, {"num_bits": (5, 2)}, CT, "computed by no client"),
    ([INT8, {"num_bits": (4, 3)}], None, CT, "2 formats in sequence"),
    ({"num_bits": (4, 3), "block_sizes": {-1: 32, -2: 32}}, None, MODELOPT, "expect 128x128"),
  ],
)  # fmt: skip
def test_refused_by_name(tmp_path: Path, weights: Any, inputs: Any, layout: str, reason: str) -> None:
  model = twin(weights, inputs)
  with pytest.raises(ValueError, match=reason) as error:
    write(model, tmp_path / "out", layout)
  assert "layers.0." in str(error.value) and "nothing was written" in str(error.value) and not list(tmp_path.iterdir())


def test_quantizers_without_a_place(tmp_path: Path) -> None:
  with pytest.raises(ValueError, match=r"no place for the quantizers .*output_quantizer"):
    write(twin(INT8, None, **{"*up_proj*output_quantizer": {"num_bits": 8}}), tmp_path / "out")
  with pytest.raises(ValueError, match=r"no place for the quantizers head\.input_quantizer"):
    write(twin(INT8, {"num_bits": 8}, **{"*head*weight_quantizer": {"enable": False}}), tmp_path / "out")
  assert not list(tmp_path.iterdir())


def test_not_calibrated(tmp_path: Path) -> None:
  net = twins.torch_net()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConfigWarning)
    torch_backend.quantize(net, {"quant_cfg": twins.FORMATS["int8"], "algorithm": "max"})
  with pytest.raises(ValueError, match="was not calibrated; call calibrate with a forward_loop"):
    write(net, tmp_path / "out")


def test_folded_and_unquantized_models(tmp_path: Path) -> None:
  model = twin(INT8)
  torch_backend.fold_weight(model)
  with pytest.raises(ValueError, match="export the model before folding it"):
    write(model, tmp_path / "out")
  with pytest.raises(ValueError, match="no quantized modules"):
    write(twins.torch_net(), tmp_path / "out")
  with pytest.raises(ValueError, match="no quantizers"):
    jax_backend.export(None, {"params": {}}, tmp_path / "out")  # type: ignore[arg-type]
  with pytest.raises(ValueError, match="no weight of the model is quantized"):
    write(twin(INT8, {"num_bits": 8}, **{"*weight_quantizer": {"enable": False}}), tmp_path / "out")
  with pytest.raises(ValueError, match="layout 'awq' is unknown; allowed are 'compressed-tensors', 'modelopt', 'gguf'"):
    write(twin(INT8), tmp_path / "out", "awq")


def test_convolutions_are_no_linear_layers(tmp_path: Path) -> None:
  net = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 4))
  torch_backend.quantize(net, {"quant_cfg": {"default": {"enable": False}, "*weight_quantizer": INT8}, "algorithm": "max"})
  with pytest.raises(ValueError, match=r"0: a weight of shape \[4, 4, 3, 3\] that is no Linear's"):
    write(net, tmp_path / "out")
  torch_backend.disable_quantizer(net, "0.*")
  artefact = write(net, tmp_path / "out")
  assert artefact.layers == ["2"] and artefact.tensor("0.weight").shape == (4, 4, 3, 3) and artefact.settings["ignore"] == []


def test_scales_on_inputs_are_folded_or_refused(tmp_path: Path) -> None:
  """Scales that an algorithm moved into the layer before are gone; the layout takes the model then."""
  model = twin(INT8, None, {"method": "awq_lite", "alpha_step": 0.5})
  with pytest.raises(ValueError, match="fold it before exporting"):
    write(model, tmp_path / "out")
  artefact = write(model, tmp_path / "out", MODELOPT)
  layer = next(iter(artefact.layers))
  scale = artefact.stored(layer).pre_quant_scale
  held = model.get_submodule(layer).input_quantizer.pre_quant_scale
  assert scale is not None and np.array_equal(scale, held.numpy())
  assert json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["pre_quant_scale"] is True


def test_mixed_precision(llama: Path, tmp_path: Path) -> None:
  made = q.quantized("torch", llama, "MIXED")
  ours = q.exported(made, tmp_path / "ct", CT, llama)
  assert ours.settings["format"] == "pack-quantized" and len(ours.settings["config_groups"]) == 2
  assert ours.settings["ignore"] == ["lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
  peers = q.exported(made, tmp_path / "mo", MODELOPT, llama)
  details = peers.settings["quantization"]
  assert details["quant_algo"] == "MIXED_PRECISION"
  assert details["quantized_layers"]["model.layers.0.mlp.up_proj"] == {
    "quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False, "pre_quant_scale": False,
  }  # fmt: skip
  assert details["quantized_layers"]["model.layers.0.self_attn.q_proj"] == {"quant_algo": "W8A16"}
  assert q.compared(made, peers) == q.compared(made, ours)


def test_low_rank_branches(llama: Path, tmp_path: Path) -> None:
  made = q.quantized("torch", llama, "NVFP4_SVDQUANT_DEFAULT_CFG")
  artefact = q.exported(made, tmp_path / "out", MODELOPT, llama)
  assert artefact.settings["quantization"]["quant_algo"] == "NVFP4_SVD" and artefact.settings["quantization"]["lora_rank"] == 32
  layer = artefact.layers[0]
  quantizer = made.model.get_submodule(layer).weight_quantizer
  a, b = artefact.stored(layer).low_rank or (None, None)
  assert np.array_equal(a, quantizer.low_rank_a.detach().numpy()) and np.array_equal(b, quantizer.low_rank_b.detach().numpy())


def test_clients_that_differ_are_named(llama: Path, tmp_path: Path) -> None:
  made = q.quantized("torch", llama, "FP8_PER_CHANNEL_PER_TOKEN_CFG")
  with pytest.warns(ConfigWarning, match="transformers reads FP8_PER_CHANNEL_PER_TOKEN of this layout silently wrong"):
    made.export(tmp_path / "a", layout=MODELOPT, source=llama)
  assert "silently wrong" in (tmp_path / "a" / "README.md").read_text()
  made = q.quantized("torch", llama, "INT8_DYNAMIC")
  with pytest.warns(ConfigWarning, match=r"127\.5"):
    made.export(tmp_path / "b", source=llama)
  made = q.quantized("torch", llama, "NVFP4_DEFAULT_CFG", group_rules=())
  with pytest.warns(ConfigWarning, match="keep the largest"):
    made.export(tmp_path / "c", source=llama)


@pytest.mark.slow
def test_scanned_stacks(llama: Path, tmp_path: Path) -> None:
  """Layers that nn.scan stacks are the same bytes as layers one by one."""
  config = q.OWN["MIXED"]
  for scan in (False, True):
    module, variables, _ = models.load_jax(llama, "float32", scan_layers=scan)
    qmodule, qvariables = jax_backend.quantize(module, variables, config, None)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", ConfigWarning)
      jax_backend.export(qmodule, qvariables, tmp_path / str(scan), source=llama)
  for name in ("model.safetensors", "config.json"):
    assert (tmp_path / "True" / name).read_bytes() == (tmp_path / "False" / name).read_bytes()


def test_names_of_stacks() -> None:
  assert label("model.layers.mlp.up_proj[3].weight") == "model.layers.3.mlp.up_proj.weight"
  assert label("h.attn[12].bias") == "h.12.attn.bias" and label("model.norm.weight") == "model.norm.weight"
  with pytest.raises(ValueError, match="no checkpoint name is known"):
    label("decoder.mlp[1].weight")


@pytest.mark.parametrize("name", ["NVFP4_DEFAULT_CFG", "INT8_WEIGHT_ONLY_CFG"])
def test_compressed_models(llama: Path, tmp_path: Path, name: str) -> None:
  """The codes that a compressed model holds are the ones that are written."""
  made = q.quantized("torch", llama, name)
  q.exported(made, tmp_path / "float", CT, llama)
  torch_backend.compress(made.model)
  q.exported(made, tmp_path / "packed", CT, llama)
  for file in (tmp_path / "float").iterdir():
    assert file.read_bytes() == (tmp_path / "packed" / file.name).read_bytes(), file.name


@pytest.mark.slow
def test_compressed_variables(tmp_path: Path) -> None:
  """The same in JAX."""
  made = twins.Jax().quantize("max", twins.FORMATS["nvfp4"])
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConfigWarning)
    jax_backend.export(made.module, made.variables, tmp_path / "float")
    jax_backend.export(made.module, jax_backend.compress(made.module, made.variables), tmp_path / "packed")
  for file in (tmp_path / "float").iterdir():
    assert file.read_bytes() == (tmp_path / "packed" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
  ("attributes", "wanted"),
  [
    ({"num_bits": 8}, Granularity("tensor")), ({"num_bits": 8, "axis": 0}, Granularity("channel")),
    ({"num_bits": 8, "axis": -2}, Granularity("channel")), ({"num_bits": 8, "axis": 1}, Granularity("other")),
    ({"num_bits": 8, "block_sizes": {-1: None}}, Granularity("channel")),
    ({"num_bits": 8, "block_sizes": {-1: 16}}, Granularity("group", (16,))),
    ({"num_bits": 8, "block_sizes": {-1: 16, -2: 8}}, Granularity("block", (8, 16))),
    ({"num_bits": 8, "block_sizes": {-1: None, -2: None}}, Granularity("tensor")),
  ],
)  # fmt: skip
def test_granularity(attributes: Any, wanted: Granularity) -> None:
  assert granularity(core.QuantSpec.from_attributes(attributes)) == wanted


class WithCache(ExportHost):
  """A model whose attention quantizes keys and values."""

  def __init__(self, model: Any, stage: Stage) -> None:
    super().__init__(model)
    self.stage = stage

  def activation_stages(self) -> dict[str, tuple[Stage, ...]]:
    caches = {f"model.layers.{i}.self_attn.{part}_bmm_quantizer": (self.stage,) for i in range(2) for part in "kv"}
    return super().activation_stages() | caches


@pytest.mark.parametrize("layout", [CT, MODELOPT])
def test_key_value_cache(llama: Path, tmp_path: Path, layout: str) -> None:
  made = q.quantized("torch", llama, "INT8_WEIGHT_ONLY_CFG")
  fp8 = QuantizerConfig.from_attributes({"num_bits": (4, 3)})
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConfigWarning)
    core_export.write(WithCache(made.model, Stage(fp8, np.float32(7.0))), tmp_path / "out", layout=layout, base=llama)
  artefact = core_export.read(tmp_path / "out")
  part = "k_proj.k_scale" if layout == MODELOPT else "k_scale"
  assert artefact.caches[0] == f"model.layers.0.self_attn.{part}" and len(artefact.caches) == 4
  assert float(artefact.tensor(artefact.caches[0]).reshape(())) == float(np.float32(7.0) / np.float32(448.0))
  scheme = artefact.config["quantization_config"]["kv_cache_scheme"]
  assert scheme["num_bits"] == 8 and scheme["type"] == "float"
  if layout == MODELOPT:
    assert artefact.settings["quantization"]["kv_cache_quant_algo"] == "FP8"
  int4 = QuantizerConfig.from_attributes({"num_bits": 4})
  with pytest.raises(ValueError, match=r"cannot express model\.layers\.0\.self_attn\.k_bmm_quantizer"):
    core_export.write(WithCache(made.model, Stage(int4, np.float32(7.0))), tmp_path / "other", layout=layout, base=llama)
  with pytest.raises(ValueError, match="was not calibrated"):
    core_export.write(WithCache(made.model, Stage(fp8)), tmp_path / "other", layout=layout, base=llama)


def test_transformers_takes_the_cache(llama: Path, tmp_path: Path) -> None:
  from tests.export import clients

  made = q.quantized("torch", llama, "INT8_WEIGHT_ONLY_CFG")
  fp8 = QuantizerConfig.from_attributes({"num_bits": (4, 3)})
  core_export.write(WithCache(made.model, Stage(fp8, np.float32(7.0))), tmp_path / "out", base=llama)
  client = clients.load(tmp_path / "out", dequantize=False)
  clients.logits(client, q.IDS)
  assert float(client.model.layers[1].self_attn.v_scale) == float(np.float32(7.0) / np.float32(448.0))


def test_exported_tensor_scale_is_exact(tmp_path: Path) -> None:
  """1 / fl(1 / s) is not s for every s; the reader gets s."""
  scales = np.arange(1.5, 1.6, 0.001).astype(np.float32)
  lost = scales[np.float32(1) / (np.float32(1) / scales) != scales]
  net = twins.torch_net()
  with torch.no_grad():
    for parameter, scale in zip(net.parameters(), lost, strict=False):
      parameter.view(-1)[0] = torch.tensor(scale) * 2688
  quant_cfg = {"default": {"enable": False}, "*weight_quantizer": twins.FORMATS["nvfp4"]["*weight_quantizer"]}
  torch_backend.quantize(net, {"quant_cfg": quant_cfg, "algorithm": "max"}, group_rules=())
  artefact = write(net, tmp_path / "out")
  found = {layer: np.float32(artefact.stored(layer).weight.tensor_scale) for layer in artefact.layers}
  assert any(np.float32(1) / (np.float32(1) / scale) != scale for scale in found.values())
  for layer, scale in found.items():
    module = net.get_submodule(layer)
    assert scale == np.float32(core.scales(module.weight_quantizer.amax.numpy(), module.weight_quantizer.spec).tensor_scale)
    assert np.array_equal(artefact.stored(layer).values(), module.compute_weight().detach().numpy())


def test_stored_values_are_typed() -> None:
  codes = np.asarray([[1, -2]], np.int8)
  held = core_export.Stored(QuantizedTensor(codes, np.float32(0.5), None, None, core.QuantSpec.named("int8"), (1, 2)))
  assert held.values().tolist() == [[0.5, -1.0]] and held.values(np.zeros((), np.float16)).dtype == np.float16
