"""Rules: the three ways of writing, order, switches, names and classes in both frameworks' spellings, warnings and refusals."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import config
from core.config import (
  INT8_DEFAULT_CFG,
  NVFP4_DEFAULT_CFG,
  AlgorithmConfig,
  ConfigWarning,
  Entry,
  QuantConfig,
  QuantizerConfig,
  Resolved,
  canonical_name,
  check_effect,
  matches_class,
  matches_name,
  normalize,
  normalize_entries,
  resolve,
  unmatched_patterns,
)  # fmt: skip

INT8, INT4 = {"num_bits": 8}, {"num_bits": 4, "block_sizes": {-1: 128}}
FP8 = {"num_bits": (4, 3)}
NAMES = {
  "fc1.input_quantizer": ("nn.Linear",),
  "fc1.weight_quantizer": ("nn.Linear",),
  "fc1.output_quantizer": ("nn.Linear",),
  "lm_head.input_quantizer": ("nn.Linear",),
  "lm_head.weight_quantizer": ("nn.Linear",),
  "conv.weight_quantizer": ("nn.Conv2d",),
}


def made(*sets) -> tuple[QuantizerConfig, ...]:
  return tuple(QuantizerConfig.from_attributes(attributes) for attributes in sets)


def on(entries, name, classes=("nn.Linear",)) -> bool:
  return resolve(entries, name, classes).enable


def test_list_and_dict_form_are_equal():
  listed = [
    {"quantizer_name": "*", "enable": False},
    {"quantizer_name": "*weight_quantizer", "cfg": [INT4, FP8], "enable": True},
    {"quantizer_name": "*input_quantizer", "cfg": INT8, "enable": False},
    {"quantizer_name": "*weight_quantizer", "parent_class": "nn.Conv2d", "enable": False},
    {"quantizer_name": "*lm_head*", "enable": False},
  ]
  pairs = {
    "*weight_quantizer": [{**INT4, "enable": True}, {**FP8, "enable": True}],
    "*input_quantizer": {**INT8, "enable": False},
    "nn.Conv2d": {"*weight_quantizer": {"enable": False}},
    "*lm_head*": {"enable": False},
    "default": {"enable": False},
  }
  single = [{key: value} for key, value in pairs.items()]
  expected = normalize_entries(listed)
  assert expected == normalize_entries(pairs) == normalize_entries(single) == normalize_entries(expected)
  assert expected[1].cfg == made(INT4, FP8)
  assert normalize({"quant_cfg": pairs, "algorithm": "max"}) == QuantConfig(expected, (AlgorithmConfig("max"),))
  assert normalize_entries(config.normalize_quant_cfg_list(pairs)) == expected


@pytest.mark.parametrize("place", range(3))
def test_default_stands_first_wherever_it_is_written(place):
  pairs = [("*weight_quantizer", INT8), ("*lm_head*", {"enable": False})]
  pairs.insert(place, ("default", {"enable": False}))
  for form in (dict(pairs), [{key: value} for key, value in pairs]):
    entries = normalize_entries(form)
    assert [entry.quantizer_name for entry in entries] == ["*", "*weight_quantizer", "*lm_head*"]
    assert [on(entries, name) for name in NAMES] == [False, True, False, False, False, True]


def test_a_star_stays_where_it_is_written():
  entries = normalize_entries({"*weight_quantizer": INT8, "*": {"enable": False}})
  assert not on(entries, "fc1.weight_quantizer")


def test_attributes_replace_the_whole_set_and_a_toggle_keeps_it():
  entries = normalize_entries(
    [
      {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "axis": 0, "narrow_range": True}},
      {"quantizer_name": "a.*", "cfg": {"num_bits": 8}},
      {"quantizer_name": "b.*", "enable": False},
      {"quantizer_name": "b.x.*", "enable": True},
    ]
  )
  assert resolve(entries, "a.weight_quantizer").configs == made({"num_bits": 8})
  first = made({"num_bits": 4, "axis": 0, "narrow_range": True})
  assert resolve(entries, "b.weight_quantizer") == Resolved(first, False)
  assert resolve(entries, "b.x.weight_quantizer") == Resolved(first, True)


def test_attributes_with_enable_false_are_set_and_switched_off():
  for form in (
    {"*weight_quantizer": {"num_bits": 4, "axis": 0, "enable": False}},
    [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "axis": 0}, "enable": False}],
    [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "axis": 0, "enable": False}}],
  ):
    assert resolve(normalize_entries(form), "fc.weight_quantizer") == Resolved(made({"num_bits": 4, "axis": 0}), False)


def test_before_any_rule_a_quantizer_is_off():
  assert resolve((), "fc.weight_quantizer") == Resolved(made({"num_bits": 8, "axis": 0}), False)
  assert resolve((), "fc.input_quantizer") == Resolved(made(INT8), False)
  given_state = Resolved(made(FP8), True)
  assert resolve((), "fc.input_quantizer", initial=given_state) == given_state
  assert resolve(normalize_entries({"*": {"enable": True}}), "fc.weight_quantizer") == Resolved(made({"num_bits": 8, "axis": 0}), True)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["*", "*weight*", "a.*", "b.*"]), st.sampled_from([None, 4, 8]), st.booleans()), max_size=8))
def test_last_match_wins(rules):
  listed = [
    {"quantizer_name": pattern, "enable": enable} | ({} if width is None else {"cfg": {"num_bits": width}})
    for pattern, width, enable in rules
  ]
  entries = normalize_entries(listed)
  for name in ("a.weight_quantizer", "b.input_quantizer"):
    hits = [rule for rule in rules if matches_name(rule[0], name)]
    widths = [width for _, width, _ in hits if width is not None]
    state = resolve(entries, name)
    assert state.enable == (hits[-1][2] if hits else False)
    if widths:
      assert state.configs[0].spec.element.bits == widths[-1]


@pytest.mark.parametrize(
  ("quant_cfg", "message"),
  [
    (3, r"quant_cfg is 3; a list of entries or a dict"),
    ([3], r"quant_cfg entry 3: a mapping with 'quantizer_name'"),
    ([{"quantizer": "*", "enable": False}], r"has no 'quantizer_name' \(did you mean 'quantizer_name'\?\)"),
    ([{"cfg": {"num_bits": 8}}], r"has no 'quantizer_name'"),
    ([{"quantizer_name": "*", "enabled": False}], r"entry '\*': unknown key 'enabled' \(value False\) \(did you mean 'enable'\?\)"),
    ([{"quantizer_name": "*"}], r"entry '\*' says nothing \(cfg None\)"),
    ([{"quantizer_name": "*", "cfg": {}}], r"entry '\*' says nothing \(cfg \{\}\)"),
    ([{"quantizer_name": "*", "cfg": []}], r"entry '\*': cfg is an empty list"),
    ([{"quantizer_name": "", "enable": False}], r"quantizer_name is ''; a glob"),
    ([{"quantizer_name": 7, "enable": False}], r"quantizer_name is 7; a glob"),
    ([{"quantizer_name": "*", "enable": "off"}], r"entry '\*': enable is 'off'; allowed are True and False"),
    ([{"quantizer_name": "*", "parent_class": 3, "enable": False}], r"entry '\*': parent_class is 3; a class name"),
    ([{"quantizer_name": "*", "cfg": 8}], r"entry '\*': quantizer attributes are 8; a mapping"),
    ([{"quantizer_name": "*", "cfg": {"num_bits": 8, "enable": False}, "enable": True}], r"enable True contradicts enable False inside"),
    ([{"quantizer_name": "*", "cfg": {"num_bits": 99}}], r"entry '\*': num_bits is 99; allowed"),
    ({"*weight_quantizer": {"num_bit": 8}}, r"entry '\*weight_quantizer': quantizer attributes: unknown key 'num_bit'"),
    ({"*weight_quantizer": {"block_size": {-1: 8}}}, r"entry '\*weight_quantizer': .*unknown key 'block_size'.*did you mean 'block_sizes'"),
    ({"*weight_quantizer": 8}, r"quant_cfg\['\*weight_quantizer'\] is 8; a dict of attributes"),
    ({"*": [INT8, {**FP8, "enable": False}]}, r"switches parts of one sequential quantizer on and off"),
    ({"*": [{**INT8, "enable": True}, {**FP8, "enable": False}]}, r"switches parts of one sequential quantizer on and off"),
    ({"nn.Linear": {"*weight_quantizer": {"num_bits": 77}}}, r"entry '\*weight_quantizer': num_bits is 77"),
  ],
)
def test_refusals(quant_cfg, message):
  with pytest.raises(ValueError, match=message):
    normalize({"quant_cfg": quant_cfg, "algorithm": "max"})


@pytest.mark.parametrize(
  ("value", "error", "message"),
  [
    (8, TypeError, r"config is 8; a mapping with 'quant_cfg'"),
    ({"algorithm": "max"}, ValueError, r"config \{'algorithm': 'max'\} has no 'quant_cfg'"),
    ({"quant_config": []}, ValueError, r"config: unknown key 'quant_config' \(value \[\]\) \(did you mean 'quant_cfg'\?\)"),
    ({"quant_cfg": [], "effective_bits": 20}, ValueError, r"effective_bits is 20; allowed"),
    ({"quant_cfg": [], "algorithm": "maxx"}, ValueError, r"algorithm is 'maxx'.*did you mean 'max'\?.*'gptq'"),
    ({"quant_cfg": [], "algorithm": 3}, ValueError, r"algorithm is 3; allowed are None, a name"),
    ({"quant_cfg": [], "algorithm": {"alpha": 1}}, ValueError, r"algorithm \{'alpha': 1\} names no method"),
    ({"quant_cfg": [], "algorithm": {"method": "awq"}}, ValueError, r"algorithm\['method'\] is 'awq', which is unknown"),
    (
      {"quant_cfg": [], "algorithm": {"method": "awq_lite", "alpha_stp": 1}},
      ValueError,
      r"algorithm 'awq_lite': unknown key 'alpha_stp' \(value 1\) \(did you mean 'alpha_step'\?\)",
    ),
    ("INT8_DEFAULT", ValueError, r"preset 'INT8_DEFAULT' is unknown \(did you mean 'INT8_DEFAULT_CFG'\?\)"),
  ],
)
def test_whole_config_refusals(value, error, message):
  with pytest.raises(error, match=message):
    normalize(value)


def test_algorithms():
  steps = config.read_algorithm(["smoothquant", {"method": "awq_lite", "alpha_step": 0.1, "layerwise": {"enable": True}}, None])
  assert [step.method for step in steps] == ["smoothquant", "awq_lite"]
  assert steps[1].options == {"alpha_step": 0.1, "layerwise": {"enable": True}}
  assert config.read_algorithm([step.to_dict() for step in steps]) == steps
  assert config.read_algorithm(None) == config.read_algorithm({"method": None}) == ()
  assert hash(steps[1]) == hash(config.read_algorithm(steps[1].to_dict())[0])


def test_options_of_an_algorithm_are_checked(monkeypatch):
  from core.config import algorithms

  config.read_algorithm("max")  # the built-in ones are there
  monkeypatch.setattr(algorithms, "ALGORITHMS", dict(algorithms.ALGORITHMS))
  config.register_algorithm_name("mine", ("strength",))
  assert config.read_algorithm({"method": "mine", "strength": 2})[0].options == {"strength": 2}
  with pytest.raises(ValueError, match=r"algorithm 'mine': unknown key 'power'"):
    config.read_algorithm({"method": "mine", "power": 2})


@pytest.mark.parametrize(
  ("path", "canonical"),
  [
    ("model/layers_0/self_attn/q_proj", "model.layers.0.self_attn.q_proj"),
    ("model/layers_12/mlp", "model.layers.12.mlp"),
    ("layers_3", "layers.3"),
    ("model.layers.0.q_proj.weight_quantizer", "model.layers.0.q_proj.weight_quantizer"),
    ("encoder/layer_0/fc_1x/fc1", "encoder.layer.0.fc_1x.fc1"),
    ("Dense_0/weight_quantizer", "Dense.0.weight_quantizer"),
  ],
)
def test_canonical_name(path, canonical):
  assert canonical_name(path) == canonical
  assert canonical_name(canonical) == canonical


@pytest.mark.parametrize(
  ("pattern", "name", "expected"),
  [
    ("*layers.0.*", "model/layers_0/q_proj/weight_quantizer", True),
    ("*layers_0.*", "model/layers_0/q_proj/weight_quantizer", True),
    ("*layers_0.*", "model.layers.0.q_proj.weight_quantizer", True),
    ("model/layers_0/*", "model.layers.0.q_proj.weight_quantizer", True),
    ("*layers.0.*", "model.layers.10.q_proj.weight_quantizer", False),
    ("*[qk]_proj*", "model/layers_0/k_proj.input_quantizer", True),
    ("*Q_proj*", "model.q_proj.input_quantizer", False),
    ("*weight_quantizer", "a.weight_quantizer", True),
    ("*weight_quantizer", "a.weight_quantizer.x", False),
    ("output.*", "model.output.weight_quantizer", False),
  ],
)
def test_name_patterns(pattern, name, expected):
  assert matches_name(pattern, name) is expected


@pytest.mark.parametrize(
  ("pattern", "classes", "expected"),
  [
    ("nn.Linear", ("nn.Linear",), True),
    ("Linear", ("torch.nn.modules.linear.Linear",), True),
    ("nn.Linear", ("Dense",), True),
    ("nn.Linear", ("flax.linen.linear.DenseGeneral",), True),
    ("flax.linen.Dense", ("Dense",), True),
    ("Dense", ("nn.Linear",), True),
    ("Dense", ("Conv",), False),
    ("nn.Conv2d", ("Conv",), True),
    ("nn.Conv1d", ("Conv", "Conv2d"), False),
    ("nn.Conv2d", ("Conv", "Conv2d"), True),
    ("Conv", ("nn.Conv3d",), True),
    ("nn.ConvTranspose2d", ("ConvTranspose",), True),
    ("nn.Conv2d", ("ConvTranspose",), False),
    ("nn.Embedding", ("Embed",), True),
    ("Embed", ("nn.Embedding",), True),
    ("nn.LayerNorm", ("flax.linen.LayerNorm",), True),
    ("RMSNorm", ("flax.linen.normalization.RMSNorm",), True),
    ("nn.BatchNorm1d", ("BatchNorm",), True),
    ("nn.BatchNorm1d", ("nn.BatchNorm2d",), False),
    ("my.module.MyLinear", ("my.module.MyLinear", "Linear"), True),
    ("MyLinear", ("my.module.MyLinear",), True),
    ("other.module.MyLinear", ("my.module.MyLinear",), False),
    ("mylib.Linear", ("torch.nn.modules.linear.Linear",), False),
    ("mylib.Linear", ("Dense",), False),
    ("nn.Linear", (), False),
    ("linear", ("Linear",), False),
  ],
)
def test_class_patterns(pattern, classes, expected):
  assert matches_class(pattern, classes) is expected


def test_parent_class_entries():
  entries = normalize_entries({"default": {"enable": False}, "*weight_quantizer": INT8, "nn.Embedding": {"*": {"enable": False}}})
  assert on(entries, "fc.weight_quantizer", ("Dense",))
  assert not on(entries, "embed.weight_quantizer", ("Embed",))
  assert entries[-1] == Entry("*", "nn.Embedding", None, False)


def test_unmatched_patterns_warn_by_name():
  entries = normalize_entries({**INT8_DEFAULT_CFG.copy()["quant_cfg"], "*q_porj*": INT8, "nn.Conv3d": {"*weight_quantizer": INT8}})
  assert unmatched_patterns(entries, NAMES) == ["*q_porj*", "nn.Conv3d: *weight_quantizer"]
  with pytest.warns(
    ConfigWarning, match=r"match no quantizer: '\*q_porj\*', 'nn.Conv3d: \*weight_quantizer'; there are.*'fc1\.input_quant"
  ):
    check_effect(entries, NAMES)


@pytest.mark.parametrize(
  "name", [name for name in sorted(config.choices) if "_KV_" not in name and "MHA" not in name and "EXPERTS" not in name]
)
def test_presets_are_silent_on_an_ordinary_model(name):
  names = {f"layers.0.{layer}.{kind}": ("nn.Linear",) for layer in ("mlp.up_proj", "self_attn.o_proj", "self_attn.out")
           for kind in ("input_quantizer", "weight_quantizer")}  # fmt: skip
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    resolved = check_effect(normalize(name).entries, names)
  assert list(resolved) == list(names)
  assert any(state.enable for state in resolved.values())


def test_nothing_quantized_raises():
  with pytest.raises(ValueError, match=r"quantizes nothing: all 6 quantizers are off \('fc1\.input_quantizer', .*\); add an entry such as"):
    check_effect(normalize_entries({"*nowhere*": INT8}), NAMES)
  with pytest.raises(ValueError, match=r"quantizes nothing: all 0 quantizers are off \(the model has none\)"):
    check_effect(normalize(INT8_DEFAULT_CFG).entries, {})


def test_weights_asked_for_but_off_raises():
  rules = {"*weight_quantizer": INT8, "*input_quantizer": INT8, "fc1.weight*": {"enable": False}, "*lm_head*": {"enable": False}}
  rules["conv*"] = {"enable": False}
  with pytest.raises(ValueError, match=r"asks for weight quantization \('\*weight_quantizer'\), but none of the 3 weight quantizers is on"):
    check_effect(normalize_entries(rules), NAMES)
  taken_back = normalize_entries([*({key: value} for key, value in rules.items()), {"*weight_quantizer": {"enable": False}}])
  assert check_effect(taken_back, NAMES)["fc1.input_quantizer"].enable


def test_key_value_cache_fragments_say_when_no_attention_is_there():
  merged = config.update_quant_cfg_with_kv_cache_quant(INT8_DEFAULT_CFG, config.FP8_KV_CFG)
  with pytest.warns(ConfigWarning, match=r"'\*\[kv\]_bmm_quantizer' name quantizers inside attention.*no module here has such.*no effect"):
    check_effect(normalize(merged).entries, NAMES)
  for name in config.KV_PRESETS:
    with pytest.raises(ValueError, match=r"quantizes nothing.*name quantizers inside attention.*no module here has such"):
      check_effect(normalize(name).entries, NAMES)
  assert check_effect(normalize("FP8_KV_CFG").entries, {**NAMES, "attn.k_bmm_quantizer": ("Attention",)})["attn.k_bmm_quantizer"].enable


@pytest.mark.parametrize("kv", config.KV_PRESETS)
@pytest.mark.parametrize("as_list", [False, True])
def test_merging_key_value_cache_fragments(kv, as_list):
  base = NVFP4_DEFAULT_CFG.copy()
  if as_list:
    base["quant_cfg"] = config.normalize_quant_cfg_list(base["quant_cfg"])
  fragment = config.preset(kv)["quant_cfg"]
  for given_fragment in (fragment, config.preset(kv), config.normalize_quant_cfg_list(fragment)):
    merged = config.update_quant_cfg_with_kv_cache_quant(base, given_fragment)
    assert normalize(merged).entries == normalize(NVFP4_DEFAULT_CFG).entries + normalize(kv).entries
  weights_only = config.update_quant_cfg_with_kv_cache_quant(config.MXFP4_DEFAULT_CFG, fragment)
  assert weights_only["algorithm"] == "max"
  assert config.MXFP4_DEFAULT_CFG["algorithm"] is None


def test_a_rule_written_again_moves_behind():
  base = {"quant_cfg": {"*[kv]_bmm_quantizer": INT8, "*": {"enable": False}}, "algorithm": "max"}
  merged = config.update_quant_cfg_with_kv_cache_quant(base, config.FP8_KV_CFG)
  assert on(normalize(merged).entries, "a.k_bmm_quantizer")


def test_finding_entries():
  listed = [{"quantizer_name": "*a", "enable": False}, {"quantizer_name": "*a", "enable": True}]
  assert config.find_quant_cfg_entry_by_path(listed, "*a") is listed[1]
  assert config.find_quant_cfg_entry_by_path(INT8_DEFAULT_CFG["quant_cfg"], "*input_quantizer")["cfg"] == {"num_bits": 8}
  assert config.find_quant_cfg_entry_by_path(INT8_DEFAULT_CFG["quant_cfg"], "default")["enable"] is False
  with pytest.raises(KeyError, match=r"no quant_cfg entry has the pattern '\*b'; there are '\*a'"):
    config.find_quant_cfg_entry_by_path(listed, "*b")


def test_extending_a_preset():
  extended = {"preset": "INT8_DEFAULT_CFG", "quant_cfg": {"*fc1*": {"enable": False}}, "algorithm": "mse"}
  checked = normalize(extended)
  assert checked.entries == (*normalize(INT8_DEFAULT_CFG).entries, Entry("*fc1*", None, None, False))
  assert [step.method for step in checked.algorithm] == ["mse"]
  both = normalize({"preset": ["NVFP4_DEFAULT_CFG", "FP8_KV_CFG"]})
  assert both.entries == normalize(NVFP4_DEFAULT_CFG).entries + normalize("FP8_KV_CFG").entries
  assert [step.method for step in both.algorithm] == ["max"]
  with pytest.raises(ValueError, match="preset 'X' is unknown"):
    normalize({"preset": "X"})
  with pytest.raises(ValueError, match=r"preset is \[\]"):
    normalize({"preset": []})
  with pytest.raises(ValueError, match=r"preset is 3"):
    normalize({"preset": 3})
