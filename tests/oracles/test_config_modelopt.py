"""The presets against those of the installed ModelOpt 0.47: every rule's attributes, the algorithm, and whether data is needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from core import config

# ModelOpt's import takes seconds and patches what it imports, so it runs in an interpreter of its own, with a time limit.
SCRIPT = """
import json, sys
from modelopt.torch.quantization import config as peer

def plain(value):
  if isinstance(value, dict):
    return {str(key): plain(item) for key, item in value.items()}
  return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

presets = {name: plain(getattr(peer, name)) for name in sorted(peer.choices)}
needs = {name: peer.need_calibration(getattr(peer, name)) for name in sorted(peer.choices) if "_KV_" not in name}
sys.stdout.write("RESULT" + json.dumps({"presets": presets, "needs": needs}))
"""


@pytest.fixture(scope="module")
def peer() -> dict:
  done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=True)
  return json.loads(done.stdout.partition("RESULT")[2])


def effective(entries: tuple[config.Entry, ...]) -> dict[tuple[str, str | None], tuple]:
  """Last rule of each pattern: attributes and switch."""
  return {(entry.quantizer_name, entry.parent_class): (entry.cfg, entry.enables) for entry in entries}


def test_same_names(peer):
  assert set(peer["presets"]) == set(config.choices) == set(config.PRESETS)
  assert len(config.choices) == 39


@pytest.mark.parametrize("name", sorted(config.choices))
def test_same_rules_and_algorithm(peer, name):
  theirs, ours = peer["presets"][name], config.PRESETS[name]
  assert effective(config.normalize(ours).entries) == effective(config.normalize(theirs).entries)
  assert config.normalize(ours).algorithm == config.normalize(theirs).algorithm
  assert ours.get("algorithm") == theirs.get("algorithm")
  assert set(ours) == set(theirs)


@pytest.mark.parametrize("name", sorted(config.choices))
def test_same_attributes_as_written(peer, name):
  """Literally: the dict values, tuples as lists, before any normalisation of ours. The last of two rules with one pattern counts."""

  def flat(quant_cfg):
    return {(e["quantizer_name"], e.get("parent_class")): (_spell(e.get("cfg")), e.get("enable", True)) for e in quant_cfg}

  written = {}
  for pattern, value in config.preset(name)["quant_cfg"].items():
    inner = {(key, pattern): item for key, item in value.items()} if pattern.startswith("nn.") else {(pattern, None): value}
    for (key, parent), item in inner.items():
      attributes = item if isinstance(item, list) else {field: entry for field, entry in item.items() if field != "enable"}
      enable = True if isinstance(item, list) else item.get("enable", True)
      written["*" if key == "default" else key, parent] = (_spell(attributes or None), enable)
  assert written == flat(peer["presets"][name]["quant_cfg"])


def _spell(value):
  if isinstance(value, dict):
    return {str(key): _spell(item) for key, item in value.items()}
  return [_spell(item) for item in value] if isinstance(value, list | tuple) else value


def test_order_of_rules_has_the_same_effect(peer):
  """On the quantizer names of several architectures, both orders resolve alike."""
  names = [
    "model.layers.0.self_attn.q_proj.weight_quantizer", "model.layers.0.mlp.up_proj.input_quantizer", "lm_head.weight_quantizer",
    "model.layers.0.mlp.experts.3.w1.weight_quantizer", "model.layers.0.block_sparse_moe.gate.weight_quantizer",
    "model.layers.0.block_sparse_moe.experts.1.w2.input_quantizer", "backbone.layers.0.mixer.in_proj.weight_quantizer",
    "backbone.layers.0.mixer.up_proj.weight_quantizer", "model.layers.0.self_attn.o_proj.output_quantizer", "mtp.fc.weight_quantizer",
    "model.layers.0.self_attn.k_bmm_quantizer", "model.layers.0.self_attn.q_bmm_quantizer", "model.visual.fc.weight_quantizer",
  ]  # fmt: skip
  compared = 0
  for preset in config.choices:
    ours, theirs = config.normalize(config.PRESETS[preset]).entries, config.normalize(peer["presets"][preset]).entries
    for name in names:
      for classes in (("nn.Linear", "Linear"), ("nn.Embedding", "Embedding")):
        assert config.resolve(ours, name, classes) == config.resolve(theirs, name, classes), (preset, name)
        compared += 1
  assert compared == 39 * len(names) * 2


def test_need_calibration(peer):
  """Equal, but for whole MX presets: ModelOpt asks for data there although MX quantizers keep no amax; here they need none."""
  ours = {name: config.need_calibration(config.PRESETS[name]) for name in peer["needs"]}
  gap = {name for name in ours if ours[name] != peer["needs"][name]}
  assert gap == {"MXFP8_DEFAULT_CFG", "MXFP6_DEFAULT_CFG", "MXFP4_DEFAULT_CFG", "MXINT8_DEFAULT_CFG"}
  assert not any(ours[name] for name in gap)
