"""Presets: the editing idiom works, nothing can change the library, files hold them."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from core import config
from core.config import INT8_DEFAULT_CFG, PRESETS, W4A8_AWQ_BETA_CFG, normalize, preset, presets

NAMES = sorted(PRESETS)


def snapshot() -> str:
  return repr(PRESETS)


@pytest.fixture(autouse=True)
def library_is_unchanged():
  before = snapshot()
  yield
  assert snapshot() == before


def ways(value) -> dict:
  return {
    "copy method": value.copy(),
    "copy.copy": copy.copy(value),
    "deepcopy": copy.deepcopy(value),
    "pickle": pickle.loads(pickle.dumps(value)),
    "json": json.loads(json.dumps(value)),
    "or": value | {},
    "inside": copy.deepcopy({"a": [value]})["a"][0],
  }


def test_the_editing_idiom():
  edited = INT8_DEFAULT_CFG.copy()
  edited["quant_cfg"]["*input_quantizer"]["enable"] = False
  states = [config.resolve(normalize(c).entries, "fc.input_quantizer").enable for c in (edited, INT8_DEFAULT_CFG)]
  assert states == [False, True]


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_independent_at_every_depth(name):
  original = PRESETS[name]
  for way, made in ways(original).items():
    assert type(made) is dict, way
    assert normalize(made) == normalize(original), way
    for key, value in made["quant_cfg"].items():
      if isinstance(value, dict):
        value["enable"] = "spoiled"
        value.get("block_sizes", {})["spoiled"] = key
      else:
        value[0]["num_bits"] = "spoiled"
        value.append("spoiled")
    made["quant_cfg"].clear()
    made["algorithm"] = "spoiled"


@pytest.mark.parametrize(
  "attempt",
  [
    lambda p: p.__setitem__("algorithm", "mse"),
    lambda p: p["quant_cfg"].__setitem__("*", {}),
    lambda p: p["quant_cfg"]["*weight_quantizer"].__setitem__("num_bits", 4),
    lambda p: p["quant_cfg"]["*weight_quantizer"].update(num_bits=4),
    lambda p: p["quant_cfg"].pop("default"),
    lambda p: p["quant_cfg"].popitem(),
    lambda p: p.clear(),
    lambda p: p.setdefault("x", 1),
    lambda p: p.__delitem__("algorithm"),
    lambda p: p.__ior__({"x": 1}),
    lambda p: dict(p)["quant_cfg"].clear(),
    lambda p: {**p}["quant_cfg"]["default"].update(enable=True),
  ],
)
def test_writing_into_a_preset_raises_and_says_what_to_do(attempt):
  with pytest.raises(TypeError, match=r"presets are read-only; edit a copy: config = PRESET\.copy\(\)"):
    attempt(INT8_DEFAULT_CFG)


def test_sequential_list_is_locked_too():
  with pytest.raises((TypeError, AttributeError)):
    W4A8_AWQ_BETA_CFG["quant_cfg"]["*weight_quantizer"].append({})
  with pytest.raises(TypeError, match="read-only"):
    W4A8_AWQ_BETA_CFG["quant_cfg"]["*weight_quantizer"][0]["num_bits"] = 8
  assert isinstance(W4A8_AWQ_BETA_CFG.copy()["quant_cfg"]["*weight_quantizer"], list)


def test_merging_with_or_gives_plain_dicts():
  assert type({"a": 1} | INT8_DEFAULT_CFG) is dict
  merged = INT8_DEFAULT_CFG | {"algorithm": "mse"}
  merged["quant_cfg"]["*weight_quantizer"]["num_bits"] = 4
  assert merged["algorithm"] == "mse"


def test_names():
  assert len(NAMES) == 39
  assert config.choices == set(NAMES)
  assert len(presets.KV_PRESETS) == 5
  for name in NAMES:
    assert getattr(presets, name) is PRESETS[name] is getattr(config, name)
    assert type(preset(name)) is dict
  with pytest.raises(ValueError, match=r"preset 'INT8_DEFALT_CFG' is unknown \(did you mean 'INT8_DEFAULT_CFG'\?\); allowed are FP8_2D"):
    preset("INT8_DEFALT_CFG")


@pytest.mark.parametrize("name", NAMES)
def test_list_form_of_each_preset_means_the_same(name):
  checked = normalize(PRESETS[name])
  assert normalize(checked.to_dict()) == checked
  assert normalize(json.loads(json.dumps(checked.to_dict()))) == checked
  listed = {**preset(name), "quant_cfg": config.normalize_quant_cfg_list(preset(name)["quant_cfg"])}
  assert normalize(listed) == checked
  assert normalize(name) == checked


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
@pytest.mark.parametrize("name", NAMES)
def test_files_hold_every_preset(name, suffix, tmp_path):
  path = tmp_path / f"config{suffix}"
  assert config.save_config(PRESETS[name], path) == path
  assert normalize(config.load_config(path)) == normalize(PRESETS[name])
  config.save_config(normalize(PRESETS[name]), path)
  assert normalize(config.load_config(path)) == normalize(PRESETS[name])
  assert [file.name for file in tmp_path.iterdir()] == [path.name]
