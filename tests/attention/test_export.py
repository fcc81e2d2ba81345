"""Key/value caches in exported folders: the scales are those of the model, the same from both backends, and transformers computes with
them."""

from __future__ import annotations

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
from core.config import ConfigWarning, update_quant_cfg_with_kv_cache_quant
from experiments import models
from tests.experiments import tiny
from tests.export import clients

IDS = tiny.tokens(2, 12)
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
CT, MODELOPT = "compressed-tensors", "modelopt"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
  return tiny.llama_folder(tmp_path_factory.mktemp("llama") / "model", **SIZES)


def _config(cache: str, base: str = "INT8_WEIGHT_ONLY_CFG") -> dict[str, Any]:
  return update_quant_cfg_with_kv_cache_quant(torch_backend.preset(base), torch_backend.preset(cache)["quant_cfg"])


def _torch(llama: Path, cache: str) -> Any:
  return torch_backend.quantize(models.load_torch(llama)[0], _config(cache), lambda m: m(torch.from_numpy(IDS).long()))


def _write(export: Any, *args: Any, **options: Any) -> core_export.Artefact:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConfigWarning)
    return core_export.read(export(*args, **options))


@pytest.mark.parametrize(("cache", "layout"), [("FP8_KV_CFG", CT), ("FP8_KV_CFG", MODELOPT), ("NVFP4_KV_CFG", MODELOPT)])
@pytest.mark.parametrize("scan", [False, True])
def test_scales_of_both_backends(llama: Path, tmp_path: Path, cache: str, layout: str, scan: bool) -> None:
  model = _torch(llama, cache)
  module, variables, _ = models.load_jax(llama, scan_layers=scan)
  qmodule, qvariables = jax_backend.quantize(module, variables, _config(cache), lambda m: m(IDS))
  ours = _write(torch_backend.export, model, tmp_path / "torch", layout=layout, source=llama)
  theirs = _write(jax_backend.export, qmodule, qvariables, tmp_path / "jax", layout=layout, source=llama)
  assert ours.caches == theirs.caches and len(ours.caches) == 4
  assert ours.config["quantization_config"]["kv_cache_scheme"] == theirs.config["quantization_config"]["kv_cache_scheme"] is not None
  found = torch_backend.quantizers(model)
  for name in ours.caches:
    module_name, _, leaf = name.removesuffix("_scale").rpartition(".")
    amax = found[f"{module_name.removesuffix(f'.{leaf}_proj')}.{leaf}_bmm_quantizer"].amax
    assert amax is not None
    wanted = core.scales(amax.numpy(), core.QuantSpec.named("fp8_e4m3")).scale
    assert np.array_equal(ours.tensor(name).reshape(()), np.asarray(wanted).reshape(()))
    np.testing.assert_allclose(theirs.tensor(name), ours.tensor(name), rtol=1e-5)  # keys are sums of 128 products in another order


def test_transformers_computes_with_the_cache(llama: Path, tmp_path: Path) -> None:
  model = _torch(llama, "FP8_KV_CFG")
  _write(torch_backend.export, model, tmp_path / "out", source=llama)
  with torch.no_grad():
    simulated = model(torch.from_numpy(IDS).long()).logits.numpy()
    torch_backend.disable_quantizer(model, "*bmm_quantizer")
    without = model(torch.from_numpy(IDS).long()).logits.numpy()
  client = clients.load(tmp_path / "out", dequantize=False)
  got = clients.logits(client, IDS)
  print(clients.difference(got, simulated), clients.difference(got, without), clients.difference(simulated, without))
  assert clients.difference(got, simulated) < 0.01 * clients.difference(got, without)


def test_verify_counts_the_cache(llama: Path, tmp_path: Path) -> None:
  model = _torch(llama, "FP8_KV_CFG")
  _write(torch_backend.export, model, tmp_path / "out", source=llama)
  report = torch_backend.verify(model, tmp_path / "out", clients=("numpy",))
  assert report.passed
  model.model.layers[1].self_attn.v_bmm_quantizer.amax = 3.0
  assert not torch_backend.verify(model, tmp_path / "out", clients=("numpy",)).passed


@pytest.mark.parametrize(("cache", "layout"), [("FP8_AFFINE_KV_CFG", CT), ("NVFP4_KV_CFG", CT), ("NVFP4_KV_ROTATE_CFG", MODELOPT)])
def test_refused(llama: Path, tmp_path: Path, cache: str, layout: str) -> None:
  with pytest.raises(ValueError, match=r"cannot express model\.layers\.0\.self_attn\.k_bmm_quantizer: a key/value cache of"):
    torch_backend.export(_torch(llama, cache), tmp_path / "out", layout=layout, source=llama)
  assert not (tmp_path / "out").exists()
