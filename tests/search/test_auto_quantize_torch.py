"""auto_quantize in PyTorch: what comes out, that it can be repeated and resumed, and what is refused."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import torch_backend as tb
from core.search.report import rows_of
from tests.search.nets import (
  FORMATS,
  INT4,
  classify,
  cross_entropy,
  experts,
  features,
  first,
  language,
  llama_batches,
  quantized,
)
from tests.torch_backend.models import tiny_llama

AWQ = {**INT4, "algorithm": {"method": "awq_lite", "alpha_step": 0.25}}
GPTQ = {**INT4, "algorithm": "gptq"}
SVD = {"quant_cfg": {"*weight_quantizer": {"num_bits": 8, "axis": 0}}, "algorithm": {"method": "svdquant", "lowrank": 4}}
METHODS = ("gradient", "fisher", "kl_div", "hessian", "sqnr")


def logits(model, batch):
  with torch.no_grad():
    return model(**batch).logits


@pytest.mark.parametrize("method", METHODS)
def test_the_choice_equals_exhaustive_search_and_keeps_the_budget(method):
  _, state = language({"effective_bits": 6}, FORMATS, method=method)
  groups = list(state["scores"])
  assert len(groups) == 8
  numel = sum(state["weights"].values())
  best = None
  for chosen in itertools.product(*(state["choices"][g] for g in groups)):
    bits = sum(state["bits"][g][f] * state["weights"][g] for g, f in zip(groups, chosen, strict=True))
    if bits <= 6 * numel:
      score = sum(state["scores"][g][f] for g, f in zip(groups, chosen, strict=True))
      best = score if best is None else min(best, score)
  assert best is not None
  assert state["objective"] == pytest.approx(best, rel=1e-12, abs=0)  # the order of a sum of eight
  assert state["effective_bits"] <= 6 and state["proven"]
  assert len(set(state["assignment"].values())) > 1


def test_the_configuration_repeats_the_model_here_and_after_json():
  model, state = language({"effective_bits": 5.5}, [*FORMATS, None])
  state = json.loads(json.dumps(state))
  batch = llama_batches()[0]
  again = quantized(tiny_llama(), tb.get_auto_quantize_config(state), llama_batches(), lambda m, b: m(**b))
  assert torch.equal(logits(again, batch), logits(model, batch))
  other, found = language({"effective_bits": 7}, [*FORMATS, None])
  repeated = quantized(tiny_llama(), tb.get_auto_quantize_config(state, {"effective_bits": 7}), llama_batches(), lambda m, b: m(**b))
  assert found["assignment"] != state["assignment"]
  assert torch.equal(logits(repeated, batch), logits(other, batch))


def test_formats_keep_their_algorithms():
  formats = {"awq": AWQ, "gptq": GPTQ, "svd": SVD, "fp8": "FP8_DEFAULT_CFG"}
  spaces = {"*q_proj": ["awq"], "*k_proj": ["awq"], "*v_proj": ["awq"], "*o_proj": ["gptq"], "*layers.0.mlp*": ["svd"]}
  model, state = language({"effective_bits": 16}, formats, module_search_spaces={**spaces, "*layers.1.mlp.*": ["fp8", "awq"]})
  config = tb.get_auto_quantize_config(state)
  assert [step if isinstance(step, str) else step["method"] for step in config["algorithm"]] == ["max", "awq_lite", "gptq", "svdquant"]
  layers = model.model.layers
  assert layers[0].self_attn.q_proj.input_quantizer.pre_quant_scale is not None
  assert layers[0].mlp.up_proj.weight_quantizer.has_low_rank
  assert not layers[1].self_attn.o_proj.weight_quantizer.has_low_rank and layers[1].self_attn.o_proj.input_quantizer.pre_quant_scale is None
  untouched = tiny_llama().model.layers[1]
  assert not torch.equal(layers[1].self_attn.o_proj.stored_weight, untouched.self_attn.o_proj.weight)
  assert state["assignment"]["model.layers.1.mlp.(gate_proj|up_proj)"] == "fp8"
  assert torch.equal(layers[1].mlp.up_proj.stored_weight, untouched.mlp.up_proj.weight)
  again = quantized(tiny_llama(), config, llama_batches(), lambda m, b: m(**b))
  assert torch.equal(logits(again, llama_batches()[0]), logits(model, llama_batches()[0]))


@pytest.mark.parametrize("config", [AWQ, "NVFP4_DEFAULT_CFG", "W4A8_AWQ_BETA_CFG"])
def test_one_format_for_all_is_plain_quantize(config):
  model, state = classify(experts(), {"effective_bits": 16}, [config])
  plain = quantized(experts(), config, features(), first)
  x = features(1, seed=9)[0][0]
  with torch.no_grad():
    assert torch.equal(model(x), plain(x))
  assert state["objective"] == 0  # no choice, so nothing was scored


def test_siblings_and_experts_share_a_format():
  _, state = classify(experts(), {"effective_bits": 6}, FORMATS)
  assert state["groups"] == {
    "attn.(q_proj|k_proj)": ["attn.k_proj", "attn.q_proj"],
    "experts.(*.gate_proj|*.up_proj)": [
      "experts.0.gate_proj", "experts.0.up_proj", "experts.1.gate_proj", "experts.1.up_proj",
    ],
    "experts.(*.down_proj)": ["experts.0.down_proj", "experts.1.down_proj"],
    "head": ["head"],
  }  # fmt: skip
  _, alone = classify(experts(), {"effective_bits": 6}, FORMATS, groups=())
  assert all([group] == members for group, members in alone["groups"].items()) and len(alone["groups"]) == 9
  _, own = classify(experts(), {"effective_bits": 6}, FORMATS, groups=["q_proj|k_proj", "experts.*.*_proj"])
  assert len(own["groups"]) == 3


def test_disabled_layers_stay_and_count():
  model, state = classify(experts(), {"effective_bits": 8}, ["NVFP4_DEFAULT_CFG", "INT8_DEFAULT_CFG"], disabled_layers=["*q_proj", "head"])
  assert state["assignment"]["attn.(q_proj|k_proj)"] == state["assignment"]["head"] == "none"
  assert not model.attn["k_proj"].weight_quantizer.is_enabled
  assert state["bits"]["head"] == {"none": 16.0}
  total = sum(state["bits"][g][f] * state["weights"][g] for g, f in state["assignment"].items()) / sum(state["weights"].values())
  assert state["effective_bits"] == pytest.approx(total, rel=1e-15) and total <= 8
  with pytest.raises(ValueError, match=r"effective_bits of 5 cannot be reached: the least possible is 6\.\d+"):
    classify(experts(), {"effective_bits": 5}, ["NVFP4_DEFAULT_CFG"], disabled_layers=["*q_proj", "head"])


def test_budgets_in_bytes_in_a_table_and_both():
  _, state = classify(experts(), {"weight_bytes": 7000}, FORMATS)
  assert state["weight_bytes"] <= 7000 and state["limits"] == {"weight_bytes": state["weight_bytes"]}
  costs = {"latency": {"*": {"NVFP4_DEFAULT_CFG": 1, "FP8_DEFAULT_CFG": 3, "INT8_DEFAULT_CFG": 2}, "head": {"FP8_DEFAULT_CFG": 1}}}
  _, both = classify(experts(), {"latency": 20, "effective_bits": 7}, FORMATS, costs=costs)
  assert both["limits"]["latency"] <= 20 and both["limits"]["effective_bits"] <= 7
  assert tb.get_auto_quantize_config(json.loads(json.dumps(both)), {"latency": 9})["quant_cfg"][1]["cfg"]["num_bits"] == [2, 1]
  with pytest.raises(ValueError, match=r"costs\['latency'\] has no cost of layer 'attn.k_proj' in format 'INT8_DEFAULT_CFG'"):
    classify(experts(), {"latency": 20}, FORMATS, costs={"latency": {"*": {"NVFP4_DEFAULT_CFG": 1, "FP8_DEFAULT_CFG": 3}}})


def test_active_experts_count_by_their_share():
  cost = {"cost_model": "active_moe", "cost": {"active_moe_expert_ratio": 0.5, "excluded_module_name_patterns": ["head"]}}
  _, state = classify(experts(), {"effective_bits": 6, **cost}, ["NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"])
  assert state["weights"]["head"] == 0 and state["assignment"]["head"] == "FP8_DEFAULT_CFG"
  assert state["weights"]["experts.(*.down_proj)"] == 2 * 32 * 48 / 2
  assert state["limits"]["effective_bits"] <= 6


def test_the_front_descends():
  _, state = language({"effective_bits": 6}, [*FORMATS, None])
  front = tb.pareto_front(json.loads(json.dumps(state)), 12)
  assert len(front) > 4
  for before, after in itertools.pairwise(front):
    assert before["value"] < after["value"] and before["objective"] > after["objective"]
  assert front[0]["value"] == pytest.approx(4.5, abs=0.02) and front[-1]["objective"] == 0
  exact = tb.pareto_front(state, [6.0])
  assert exact[0]["assignment"] == state["assignment"]


class Stopped(Exception):
  pass


def test_an_interrupted_search_goes_on(tmp_path):
  calls = []

  def step(model, batch, stop=None):
    if torch.is_grad_enabled():
      calls.append(1)
      if len(calls) == stop:
        raise Stopped
    return model(batch[0])

  file = tmp_path / "scores.json"
  model = experts()
  with pytest.raises(Stopped):
    classify(model, {"effective_bits": 6}, FORMATS, features(5), forward_step=lambda m, b: step(m, b, 4), checkpoint=file)
  assert len(json.loads(file.read_text())["rows"]) == 3
  calls.clear()
  _, resumed = classify(model, {"effective_bits": 6}, FORMATS, features(5), forward_step=step, checkpoint=file)
  assert len(calls) == 2
  _, whole = classify(model, {"effective_bits": 6}, FORMATS, features(5))
  assert resumed == whole
  calls.clear()
  _, other = classify(model, {"effective_bits": 7}, FORMATS, features(5), forward_step=step, checkpoint=file)
  assert not calls and other["scores"] == whole["scores"] and other["assignment"] != whole["assignment"]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.json"]


def test_files_of_other_searches_are_refused(tmp_path):
  file = tmp_path / "scores.json"
  classify(experts(), {"effective_bits": 6}, FORMATS, features(1), checkpoint=file)
  before = file.read_text()
  with pytest.raises(ValueError, match=r"holds the scores of another model"):
    classify(experts(1), {"effective_bits": 6}, FORMATS, features(1), checkpoint=file)
  with pytest.raises(
    ValueError,
    match=r"another formats and another choice of layers and formats \(formats: NVFP4_DEFAULT_CFG, FP8_DEFAULT_CFG, INT8_DEFAULT_CFG there",
  ):
    classify(experts(), {"effective_bits": 6}, FORMATS[:2], features(1), checkpoint=file)
  changed = {"NVFP4_DEFAULT_CFG": "NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG": "FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG": "MXINT8_DEFAULT_CFG"}
  with pytest.raises(ValueError, match=r"another formats \(formats: .* here, with other settings\)"):
    classify(experts(), {"effective_bits": 6}, changed, features(1), checkpoint=file)
  with pytest.raises(ValueError, match=r"another method"):
    classify(experts(), {"effective_bits": 6}, FORMATS, features(1), checkpoint=file, method="kl_div")
  assert file.read_text() == before
  file.write_text("{")
  with pytest.raises(ValueError, match=r"is no file of scores"):
    classify(experts(), {"effective_bits": 6}, FORMATS, features(1), checkpoint=file)


KILLED = """
import os, signal, sys, torch
from tests.search.nets import FORMATS, classify, experts, features
count = 0
def step(model, batch):
  global count
  if torch.is_grad_enabled():
    count += 1
    if count == 3:
      os.kill(os.getpid(), signal.SIGKILL)
  return model(batch[0])
classify(experts(), {"effective_bits": 6}, FORMATS, features(5), forward_step=step, checkpoint=sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_search_goes_on(tmp_path):
  file = tmp_path / "scores.json"
  done = subprocess.run([sys.executable, "-c", KILLED, str(file)], capture_output=True, timeout=300)
  assert done.returncode == -9, done.stderr
  assert len(json.loads(file.read_text())["rows"]) == 2
  _, resumed = classify(experts(), {"effective_bits": 6}, FORMATS, features(5), checkpoint=file)
  _, whole = classify(experts(), {"effective_bits": 6}, FORMATS, features(5))
  assert resumed == whole


def test_layers_without_influence_are_named():
  class Idle(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      self.used, self.idle = nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
      self.idle(x)
      return self.used(x)

  with pytest.warns(tb.ConfigWarning, match=r"1 of 2 groups have score 0 in every format.*\(idle\): the loss does not depend on them"):
    _, state = tb.auto_quantize(Idle(), {"effective_bits": 7.6}, ["INT8_DEFAULT_CFG", INT4], features(), first, cross_entropy)
  assert state["assignment"] == {"idle": "format_1", "used": "INT8_DEFAULT_CFG"}


def test_everything_may_stay_unquantized():
  model = experts()
  with pytest.warns(tb.ConfigWarning, match=r"every layer may stay unquantized, so nothing was quantized"):
    found, state = tb.auto_quantize(model, {"effective_bits": 16}, ["FP8_DEFAULT_CFG", None], features(), first, cross_entropy)
  assert found is model and not tb.is_quantized(model) and state["objective"] == 0
  with pytest.raises(ValueError, match=r"leaves every layer unquantized"):
    tb.get_auto_quantize_config(state)


def test_a_quantized_model_starts_over():
  plain, expected = classify(experts(), {"effective_bits": 6}, FORMATS)
  again, found = classify(quantized(experts(), "INT8_DEFAULT_CFG", features(), first), {"effective_bits": 6}, FORMATS)
  assert found == expected
  x = features(1)[0][0]
  with torch.no_grad():
    assert torch.equal(again(x), plain(x))


def test_the_summary_and_its_csv(tmp_path, capsys):
  _, state = classify(experts(), {"effective_bits": 6}, FORMATS)
  tb.print_auto_quantize_summary(state, tmp_path / "layers.csv")
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].split() == ["layer", "chosen", "bits", *FORMATS] and len(lines) == 1 + 9 + 2
  assert "9 layers in 4 groups" in lines[-2] and "scored by gradient over 3 batches" in lines[-1]
  written = (tmp_path / "layers.csv").read_text().splitlines()
  assert len(written) == 1 + 27 and written[0] == "layer,group,format,chosen,score,mean,std,bits,weights"
  rows = rows_of(state)
  for group, row in state["scores"].items():
    for name, score in row.items():
      assert sum(r["score"] for r in rows if r["group"] == group and r["format"] == name) == pytest.approx(score, rel=1e-12)
  assert all(r["std"] > 0 for r in rows)


def test_a_search_state_is_asked_for():
  with pytest.raises(ValueError, match=r"this is no search_state of auto_quantize"):
    tb.get_auto_quantize_config({"assignment": {}})
