"""Sibling groups by rule, in both spellings."""

from __future__ import annotations

import pytest

from core.config import EXPERT_GROUPS, group


def test_llama_names_in_both_frameworks():
  layer = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
  torch_names = [f"model.layers.{i}.{part}" for i in (0, 1) for part in layer]
  jax_names = [f"model/layers_{i}/{part.replace('.', '/')}" for i in (0, 1) for part in layer]
  expected = [tuple(torch_names[7 * i + j] for j in members) for i in (0, 1) for members in ((0, 1, 2), (4, 5))]
  assert group(torch_names) == expected
  place = {name: index for index, name in enumerate(torch_names)}
  assert [tuple(place[torch_names[jax_names.index(name)]] for name in members) for members in group(jax_names)] == [
    tuple(place[name] for name in members) for members in expected
  ]


def test_bert_mixtral_t5():
  bert = [f"encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")] + ["encoder.layer.0.attention.output.dense"]
  assert group(bert) == [tuple(bert[:3])]
  experts = [f"layers.0.block_sparse_moe.experts.{i}.{name}" for i in (0, 1) for name in ("w1", "w2", "w3")]
  assert group(experts) == [(experts[0], experts[2]), (experts[3], experts[5])]
  assert group(experts, EXPERT_GROUPS) == [(experts[0], experts[3], experts[2], experts[5])]
  assert group(["block/0/DenseReluDense/wi_0", "block/0/DenseReluDense/wi_1"]) == [
    ("block/0/DenseReluDense/wi_0", "block/0/DenseReluDense/wi_1")]  # fmt: skip


def test_cross_attention_leaves_the_query_out():
  names = [f"decoder.layers.0.encoder_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
  assert group(names) == [(names[1], names[2])]
  own = [f"decoder.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
  assert group(own + names) == [tuple(own), (names[1], names[2])]


def test_rules_of_the_user():
  names = ["a.x", "a.y", "b.x", "a.z", "c.y"]
  assert group(names, ["x|y"]) == [("a.x", "a.y")]
  assert group(names, ["y|x"]) == [("a.y", "a.x")]
  assert group(names, ["[xy]|z"]) == [("a.x", "a.y", "a.z")]
  assert group(names, ["x|y", "y|z"]) == [("a.x", "a.y")]
  assert group(names, ()) == []
  assert group(["x", "y"], ["x|y"]) == [("x", "y")]
  assert group([]) == []


@pytest.mark.parametrize("rule", ["", "a||b", "|", 3])
def test_bad_rules(rule):
  with pytest.raises(ValueError, match=r"group rule .* is not allowed; write the last path parts"):
    group(["a"], [rule])
