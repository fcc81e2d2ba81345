"""Formats, groups and costs: what is counted, by hand."""

from __future__ import annotations

import json
import math

import pytest

import core
from core.config import PRESETS, matches_name, normalize
from core.search import configs, spaces
from core.search.costs import Counting, stored_bits
from core.search.groups import search_groups
from core.search.host import SearchLayer
from core.search.plan import make_plan
from core.search.resume import ScoreFile
from core.search.state import bits_per_weight

QUANTIZERS = ("input_quantizer", "weight_quantizer", "output_quantizer")


def layer(name, shape=(64, 128), classes=("nn.Linear",), copies=1):
  return SearchLayer(name, shape, QUANTIZERS, classes, copies)


LLAMA = [
  layer(f"model.layers.{i}.{part}")
  for i in range(2)
  for part in (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
  )
] + [layer("lm_head")]

# Bits of one [64, 128] weight of 8192 elements, counted by hand.
STORED = {
  "INT8_DEFAULT_CFG": 8192 * 8 + 64 * 32,  # a float32 scale per output channel
  "FP8_DEFAULT_CFG": 8192 * 8 + 32,  # one scale
  "NVFP4_DEFAULT_CFG": 8192 * 4 + 512 * 8 + 32,  # E4M3 per 16, a tensor scale
  "MXFP4_DEFAULT_CFG": 8192 * 4 + 256 * 8,  # E8M0 per 32
  "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": 8192 * 4 + 64 * 32,  # a float32 scale per 128
  "W4A8_AWQ_BETA_CFG": 8192 * 4 + 64 * 32 + 128 * 16,  # the same, FP8 of it is not stored; AWQ's factor per input channel
  "INT4_AWQ_CFG": 8192 * 4 + 64 * 32 + 128 * 16,
  "INT8_SMOOTHQUANT_CFG": 8192 * 8 + 64 * 32 + 128 * 16,
  "NVFP4_SVDQUANT_DEFAULT_CFG": 8192 * 4 + 512 * 8 + 32 + 128 * 16 + 32 * (64 + 128) * 16,
}
# The peer's: element bits of the weight or input, whichever is less, or what the configuration declares.
MODELOPT = {
  "INT8_DEFAULT_CFG": 8, "FP8_DEFAULT_CFG": 8, "NVFP4_DEFAULT_CFG": 4.5, "MXFP4_DEFAULT_CFG": 4, "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": 4,
  "W4A8_AWQ_BETA_CFG": 4, "INT4_AWQ_CFG": 4, "INT8_SMOOTHQUANT_CFG": 8, "NVFP4_SVDQUANT_DEFAULT_CFG": 4.5,
}  # fmt: skip


@pytest.mark.parametrize("name", STORED)
def test_stored_bits_by_hand(name):
  one = spaces.read_format(name)
  assert stored_bits(layer("a"), one, Counting()) == STORED[name]
  assert stored_bits(layer("a", copies=3), one, Counting()) == 3 * STORED[name]
  assert stored_bits(layer("a"), one, Counting("modelopt")) == 8192 * MODELOPT[name]
  assert stored_bits(layer("lm_head"), one, Counting()) == 8192 * 16  # the presets leave it alone
  assert stored_bits(layer("lm_head"), one, Counting(unquantized_bits=32)) == 8192 * 32


def test_the_peers_count_is_the_least_of_all_rules():
  w8a4 = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}, "*input_quantizer": {"num_bits": 4}}}
  declared = {**w8a4, "effective_bits": 5.5}
  assert stored_bits(layer("a"), spaces.read_format(w8a4), Counting("modelopt")) == 8192 * 4
  assert stored_bits(layer("a"), spaces.read_format(declared), Counting("modelopt")) == 8192 * 5.5
  assert stored_bits(layer("a"), spaces.read_format(declared), Counting()) == STORED["INT8_DEFAULT_CFG"]


def test_whole_plan_sums_over_groups():
  plan = make_plan(LLAMA, spaces.read_formats(["NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"]))
  assert [one.name for one in plan.layers] == [one.name for one in LLAMA[:-1]]
  assert list(plan.groups) == sorted(plan.groups) and len(plan.groups) == 8
  cheapest = dict.fromkeys(plan.groups, "NVFP4_DEFAULT_CFG")
  assert plan.effective_bits(cheapest) == STORED["NVFP4_DEFAULT_CFG"] / 8192
  assert plan.weight_bytes(cheapest) == 14 * STORED["NVFP4_DEFAULT_CFG"] / 8
  assert bits_per_weight(plan)["model.layers.0.mlp.(gate_proj|up_proj)"]["FP8_DEFAULT_CFG"] == STORED["FP8_DEFAULT_CFG"] / 8192
  assert plan.limits({"effective_bits": STORED["NVFP4_DEFAULT_CFG"] / 8192})[0].least() == STORED["NVFP4_DEFAULT_CFG"] / 8192
  with pytest.raises(ValueError, match=r"effective_bits of 4.5 cannot be reached: the least possible is 4.503907, "):
    plan.limits({"effective_bits": 4.5})
  assert core.effective_bits(core.QuantSpec.named("nvfp4"), (64, 128)) == STORED["NVFP4_DEFAULT_CFG"] / 8192


def test_a_rule_for_some_layers_leaves_the_others_unquantized():
  plan = make_plan(LLAMA, spaces.read_formats(["NVFP4_MLP_ONLY_CFG", "FP8_DEFAULT_CFG"]))
  bits = bits_per_weight(plan)
  assert bits["model.layers.0.self_attn.o_proj"]["NVFP4_MLP_ONLY_CFG"] == 16
  assert bits["model.layers.0.mlp.down_proj"]["NVFP4_MLP_ONLY_CFG"] == STORED["NVFP4_DEFAULT_CFG"] / 8192
  assert plan.to_score()["model.layers.0.self_attn.o_proj"] == ("FP8_DEFAULT_CFG",)


def test_spaces_by_pattern_the_last_match_counts():
  formats, named = spaces.read_spaces(
    spaces.read_formats(["NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"]), {"*mlp*": ["FP8_DEFAULT_CFG", None], "*layers.1*": ["MXFP8_DEFAULT_CFG"]}
  )
  plan = make_plan(LLAMA, formats, spaces=named)
  assert plan.choices["model.layers.0.mlp.down_proj"] == ("FP8_DEFAULT_CFG", "none")
  assert plan.choices["model.layers.1.mlp.down_proj"] == ("MXFP8_DEFAULT_CFG",)
  assert "model.layers.1.mlp.down_proj" not in plan.to_score()  # no choice, nothing to score


def test_groups_by_default():
  names = [
    "m.mlp.experts.0.w1",
    "m.mlp.experts.0.w2",
    "m.mlp.experts.0.w3",
    "m.mlp.experts.11.w1",
    "m.mlp.experts.11.w2",
    "m.mlp.experts.11.w3",
  ]
  assert search_groups([*names, "b.attention.self.query", "b.attention.self.key", "b.attention.self.value", "head"]) == {
    "b.attention.self.(query|key|value)": ("b.attention.self.key", "b.attention.self.query", "b.attention.self.value"),
    "head": ("head",),
    "m.mlp.experts.(*.w1|*.w3)": ("m.mlp.experts.0.w1", "m.mlp.experts.0.w3", "m.mlp.experts.11.w1", "m.mlp.experts.11.w3"),
    "m.mlp.experts.(*.w2)": ("m.mlp.experts.0.w2", "m.mlp.experts.11.w2"),
  }
  assert search_groups(["q_proj", "k_proj"]) == {"(q_proj|k_proj)": ("k_proj", "q_proj")}
  assert search_groups([""]) == {"": ("",)}


@pytest.mark.parametrize("name", sorted(n for n in PRESETS if "_KV_" not in n))
def test_every_preset_is_a_format_and_survives_json(name):
  one = spaces.read_format(name)
  assert spaces.read_format(PRESETS[name]).config == one.config
  plain = json.loads(json.dumps(spaces.to_plain({name: one})))
  assert spaces.from_plain(plain) == {name: one}


def test_a_composed_configuration_says_what_each_format_says():
  formats = spaces.read_formats(["NVFP4_DEFAULT_CFG", "INT4_AWQ_CFG", "INT8_SMOOTHQUANT_CFG", None])
  names = [one.name for one in LLAMA]
  chosen = dict(zip(names, ["NVFP4_DEFAULT_CFG", "INT4_AWQ_CFG", "INT8_SMOOTHQUANT_CFG", "none"] * 3, strict=False))
  config = configs.compose(chosen, LLAMA, formats)
  plan = normalize(json.loads(json.dumps(config)))
  rules = spaces.Format("all", plan)
  for one in LLAMA:
    own = formats[chosen[one.name]] if one.name in chosen else formats["none"]
    assert rules.resolve(one) == own.resolve(one)
  awq = next(step for step in config["algorithm"] if step != "max" and step["method"] == "awq_lite")
  assert awq["include"] == [name for name in names if chosen.get(name) == "INT4_AWQ_CFG"] and awq["alpha_step"] == 0.1
  assert configs.compose(dict.fromkeys(names, "INT4_AWQ_CFG"), LLAMA, formats)["algorithm"] == {"method": "awq_lite", "alpha_step": 0.1}


def test_names_without_wildcards_match_as_globs_do():
  for pattern, name, expected in (
    ("model.layers.0.q", "model/layers_0/q", True),
    ("model/layers_0/q", "model.layers.0.q", True),
    ("model.layers.0.q", "model.layers.0.q_proj", False),
    ("layers.0.q", "model.layers.0.q", False),
    ("*layers.0.q", "model/layers_0/q", True),
  ):
    assert matches_name(pattern, name) is expected


def test_a_file_keeps_every_digit(tmp_path):
  path = tmp_path / "new" / "scores.json"
  values = [math.pi * 1e-300, 0.1 + 0.2, 5e-324]
  file = ScoreFile(path, {"model": "a"})
  file.add(values)
  file.set_errors({"x": {"f": (1 / 3, 2 / 3)}})
  again = ScoreFile(path, {"model": "a"})
  assert again.rows == [values] and again.errors == {"x": {"f": (1 / 3, 2 / 3)}}
