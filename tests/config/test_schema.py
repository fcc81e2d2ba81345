"""Attributes to QuantSpec and QuantizerConfig: every attribute, every refusal with the value in it, round trips."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import formats
from core.config import ATTRIBUTES, BiasSpec, QuantizerConfig, RotateSpec, register_calibrator, spec_from_attributes
from core.formats import CodebookFormat, FloatFormat, int_format
from core.spec import NAMED, QuantSpec

NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}


@pytest.mark.parametrize(
  ("attributes", "spec"),
  [
    ({}, QuantSpec(formats.INT8)),
    ({"num_bits": 8, "axis": 0}, QuantSpec(formats.INT8, axis=(0,))),
    ({"num_bits": 8, "axis": [0, -1]}, QuantSpec(formats.INT8, axis=(0, -1))),
    ({"num_bits": 8, "axis": "0", "type": "dynamic"}, QuantSpec(formats.INT8, axis=(0,), dynamic=True)),
    ({"num_bits": 2}, QuantSpec(int_format(2))),
    ({"num_bits": "int4", "narrow_range": True}, QuantSpec(int_format(4, narrow_range=True))),
    ({"unsigned": True, "zero_point": True}, QuantSpec(formats.UINT8, zero_point=True)),
    ({"num_bits": (4, 3)}, QuantSpec(formats.E4M3)),
    ({"num_bits": "E5M2"}, QuantSpec(formats.E5M2)),
    ({"num_bits": [3, 2], "axis": 0}, QuantSpec(formats.E3M2, axis=(0,))),
    ({"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}}, QuantSpec(formats.E4M3, blocks=((-1, None),), dynamic=True)),
    ({"num_bits": 8, "type": "dynamic"}, QuantSpec(formats.INT8, dynamic=True)),
    ({"num_bits": (4, 3), "block_sizes": {"-1": 128, "-2": 128}}, QuantSpec(formats.E4M3, blocks=((-1, 128), (-2, 128)))),
    (NVFP4, NAMED["nvfp4"]),
    (
      {"num_bits": (2, 1), "block_sizes": {-1: 16, -2: 16, "type": "static", "scale_bits": "e4m3", "four_over_six": 1}},
      NAMED["nvfp4"].replace(blocks=((-1, 16), (-2, 16)), dynamic=False, four_over_six=True),
    ),
    ({"num_bits": 8, "block_sizes": {-1: 32, "scale_bits": [8, 0]}}, NAMED["mxint8"]),
    ({"num_bits": (2, 1), "block_sizes": {-1: 32, "scale_bits": (8, 0), "e8m0_rule": "even"}}, NAMED["mxfp4"].replace(e8m0_rule="even")),
    ({"num_bits": (2, 1), "block_sizes": {-1: 32, "scale_bits": (8, 0)}, "e8m0_rule": "floor"}, NAMED["mxfp4"].replace(e8m0_rule="floor")),
    ({"num_bits": 4, "block_sizes": {-1: 64, "scale_bits": 8, "scale_block_sizes": {-1: 256}}}, NAMED["nf4_double"]),
    ({"num_bits": 4, "block_sizes": {-1: 64, "scale_bits": 8}}, NAMED["nf4_double"]),
    (
      {"format": "int4", "block_sizes": {-1: 64, "scale_bits": 8, "scale_block_sizes": {"-1": 8}}},
      QuantSpec(formats.INT4, blocks=((-1, 64),), scale_format=formats.UINT8, scale_block=8),
    ),
    (
      {"num_bits": 4, "block_sizes": {-1: 128, "scale_bits": (5, 10)}},
      QuantSpec(formats.INT4, blocks=((-1, 128),), scale_format=formats.FLOAT16),
    ),
    ({"format": "NF4"}, NAMED["nf4"]),
    ({"format": "NF4", "num_bits": 4, "block_sizes": None}, QuantSpec(formats.NF4)),
    ({"format": "int4", "axis": 0}, QuantSpec(formats.INT4, axis=(0,))),
    ({"format": "mxfp4", "block_sizes": {-1: 16}}, NAMED["mxfp4"].replace(blocks=((-1, 16),))),
    ({"format": "mxint8"}, NAMED["mxint8"]),
    ({"bound": "127.5", "rounding": "stochastic", "pad": True}, QuantSpec(formats.INT8, bound=127.5, rounding="stochastic", pad=True)),
    ({"bound": 127}, QuantSpec(formats.INT8)),
    ({"num_bits": np.int64(4), "block_sizes": {np.int32(-1): np.int64(8)}}, QuantSpec(formats.INT4, blocks=((-1, 8),))),
  ],
)
def test_spec_from_attributes(attributes, spec):
  assert spec_from_attributes(attributes) == spec
  assert QuantSpec.from_attributes(attributes) == spec


@pytest.mark.parametrize("name", sorted(NAMED))
def test_every_named_specification_is_a_format_attribute(name):
  assert spec_from_attributes({"format": name.upper()}) == NAMED[name]
  config = QuantizerConfig(NAMED[name])
  assert QuantizerConfig.from_attributes(config.to_attributes()) == config


@pytest.mark.parametrize(
  ("attributes", "message"),
  [
    ({"num_bit": 8}, r"unknown key 'num_bit' \(value 8\) \(did you mean 'num_bits'\?\); allowed are enable, num_bits"),
    ({"num_bits": 9}, r"num_bits is 9; allowed are the integers 2 to 8 and .*\(4, 3\) \(E4M3\)"),
    ({"num_bits": 1}, r"num_bits is 1;"),
    ({"num_bits": True}, r"num_bits is True;"),
    ({"num_bits": (1, 2)}, r"num_bits is \(1, 2\);"),
    ({"num_bits": "e9m9"}, r"num_bits is 'e9m9';"),
    ({"num_bits": 4.0}, r"num_bits is 4\.0;"),
    ({"num_bits": None}, r"num_bits is None;"),
    ({"axis": "x"}, r"axis is 'x'; allowed are None, an integer"),
    ({"axis": [0, 0]}, r"axis is \[0, 0\];"),
    ({"axis": []}, r"axis is \[\];"),
    ({"axis": True}, r"axis is True;"),
    ({"axis": 0, "block_sizes": {-1: 16}}, r"axis 0 and block_sizes \{-1: 16\} exclude each other"),
    ({"block_sizes": 16}, r"block_sizes is 16; a mapping such as"),
    ({"block_sizes": {}}, r"block_sizes \{\} names no axis"),
    ({"block_sizes": {"type": "dynamic"}}, r"block_sizes \{'type': 'dynamic'\} names no axis"),
    ({"block_sizes": {-1: 0}}, r"block_sizes\[-1\] is 0; allowed are a positive integer, or None"),
    ({"block_sizes": {-1: 2.5}}, r"block_sizes\[-1\] is 2\.5;"),
    ({"block_sizes": {-1: True}}, r"block_sizes\[-1\] is True;"),
    ({"block_sizes": {-1: 16, "-1": 32}}, r"gives axis -1 twice"),
    ({"block_sizes": {-1: 16, "scale_bit": 8}}, r"block_sizes: unknown key 'scale_bit' \(value 8\) \(did you mean 'scale_bits'\?\)"),
    ({"block_sizes": {-1: 16, "type": "dyn"}}, r"block_sizes\['type'\] is 'dyn'.*'static', 'dynamic'"),
    ({"block_sizes": {-1: 16, "scale_bits": (5, 2)}}, r"scale_bits'\] is \(5, 2\); allowed are \(8, 0\) \(E8M0\)"),
    ({"block_sizes": {-1: 16, "scale_bits": 16}}, r"scale_bits'\] is 16;"),
    ({"block_sizes": {-1: 16, "scale_block_sizes": {-1: 4}}}, r"scale_block_sizes'\] is \{-1: 4\}, which needs 'scale_bits': 8"),
    ({"block_sizes": {-1: 16, "scale_bits": 8, "scale_block_sizes": {0: 4}}}, r"scale_block_sizes'\] is \{0: 4\}; allowed is one size"),
    ({"block_sizes": {-1: 16, "scale_bits": 8, "scale_block_sizes": -3}}, r"scale_block_sizes'\] is -3; allowed is a positive integer"),
    ({"block_sizes": {-1: 16, "four_over_six": "yes"}}, r"four_over_six'\] is 'yes'; allowed are True and False"),
    ({"block_sizes": {-1: 16, "four_over_six": True}}, r"four_over_six=True needs E2M1 elements with an E4M3 block scale; got INT8"),
    ({"type": "dynamic", "block_sizes": {-1: 16, "type": "static"}}, r"type 'dynamic' contradicts block_sizes\['type'\] 'static'"),
    ({"block_sizes": {-1: 32, "type": "static", "scale_bits": (8, 0)}}, r"type 'static' with scale_bits \(8, 0\).*only 'dynamic'"),
    ({"type": "auto"}, r"type is 'auto', which is unknown; allowed are 'static', 'dynamic'"),
    ({"e8m0_rule": "floor"}, r"e8m0_rule 'floor' needs a power-of-two scale"),
    ({"e8m0_rule": "flor", "format": "mxfp4"}, r"e8m0_rule is 'flor'.*did you mean 'floor'\?.*'rceil'"),
    (
      {"e8m0_rule": "even", "num_bits": 8, "block_sizes": {-1: 32, "scale_bits": (8, 0), "e8m0_rule": "ceil"}},
      r"e8m0_rule 'even' contradicts block_sizes\['e8m0_rule'\] 'ceil'",
    ),
    ({"format": "nf5"}, r"format is 'nf5', which is unknown.*did you mean 'nf4'\?.*allowed are int8"),
    ({"format": 4}, r"format is 4, which is unknown"),
    ({"format": "nf4", "num_bits": 8}, r"num_bits 8 contradicts format 'nf4' \(4 bits\)"),
    ({"unsigned": True, "num_bits": (4, 3)}, r"unsigned is True, which needs an integer format; the element format is E4M3"),
    ({"narrow_range": True, "format": "nf4"}, r"narrow_range is True, which needs an integer format; the element format is NF4"),
    ({"narrow_range": True, "unsigned": True}, r"narrow_range is True together with unsigned True"),
    ({"unsigned": "no"}, r"unsigned is 'no'; allowed are True and False"),
    ({"zero_point": True, "num_bits": (4, 3)}, r"zero_point is True, which needs an integer format; the element format is E4M3"),
    ({"zero_point": True, "bound": 127.5}, r"bound 127\.5 has no meaning with zero_point True"),
    ({"bound": 0}, r"bound is 0; allowed is a number above 0 and at most 254 for INT8"),
    ({"bound": "wide"}, r"bound is 'wide';"),
    ({"bound": float("nan")}, r"bound is nan;"),
    ({"rounding": "up"}, r"rounding is 'up'.*'nearest', 'stochastic'"),
    ({"pad": 2}, r"pad is 2; allowed are True and False"),
  ],
)
def test_spec_refusals(attributes, message):
  with pytest.raises(ValueError, match=message):
    spec_from_attributes(attributes)
  with pytest.raises(ValueError, match=message):
    QuantizerConfig.from_attributes(attributes)


@pytest.mark.parametrize(
  ("attributes", "message"),
  [
    ({"enable": "on"}, r"enable is 'on'; allowed are True and False"),
    ({"learn_amax": True}, r"learn_amax is True, which is deprecated; allowed is False"),
    ({"calibrator": "maxx"}, r"calibrator is 'maxx'.*did you mean 'max'\?.*'max', 'histogram'"),
    ({"calibrator": ["max", {"num_bins": 2}]}, r"calibrator 'max' takes no options; got \{'num_bins': 2\}"),
    ({"calibrator": ["histogram", {"bins": 2}]}, r"calibrator 'histogram': unknown key 'bins' \(value 2\)"),
    ({"calibrator": ["histogram"]}, r"calibrator is \['histogram'\]; allowed are a name, or a pair"),
    ({"constant_amax": 0}, r"constant_amax is 0; allowed is a finite number above 0"),
    ({"constant_amax": float("inf")}, r"constant_amax is inf;"),
    ({"constant_amax": 2.0, "use_constant_amax": True}, r"use_constant_amax True \(amax 448\) and constant_amax 2 exclude each other"),
    ({"effective_bits": 17}, r"effective_bits is 17; allowed is a number above 0 and at most 16"),
    ({"effective_bits": True}, r"effective_bits is True;"),
    ({"trt_high_precision_dtype": "float"}, r"trt_high_precision_dtype is 'float'.*did you mean 'Float'"),
    ({"backend": 3}, r"backend is 3; allowed is the name"),
    ({"backend_extra_args": [1]}, r"backend_extra_args is \[1\]; a mapping"),
    ({"backend_extra_args": {"a": {1, 2}}}, r"option \{1, 2\} of type set cannot be kept"),
    ({"pass_through_bwd": "x"}, r"pass_through_bwd is 'x'"),
    ({"fake_quant": None}, r"fake_quant is None"),
    ({"bias": {"type": "static"}}, r"bias \{'type': 'static'\} names no axis"),
    ({"bias": {-1: 3}}, r"bias\[-1\] is 3; allowed is None"),
    ({"bias": {-1: None, "enable": True}}, r"bias: unknown key 'enable' \(value True\); allowed are type, method"),
    ({"bias": {-1: None, "method": "median"}}, r"bias\['method'\] is 'median'.*'mean', 'max_min'"),
    ({"bias": True}, r"bias is True; a mapping"),
    ({"rotate": "yes"}, r"rotate is 'yes'; allowed are True, False"),
    ({"rotate": {"mode": "rotate"}}, r"rotate \{'mode': 'rotate'\} does not say whether it is on"),
    ({"rotate": {"enable": True, "mode": "back"}}, r"rotate\['mode'\] is 'back'.*'rotate_back'"),
    ({"rotate": {"enable": True, "block_size": 24}}, r"rotate\['block_size'\] is 24; allowed are powers of two"),
    ({"rotate": {"enable": True, "seed": -1}}, r"rotate\['seed'\] is -1;"),
    ({"rotate": {"enable": True, "blocks": 2}}, r"rotate: unknown key 'blocks' \(value 2\)"),
  ],
)
def test_config_refusals(attributes, message):
  with pytest.raises(ValueError, match=message):
    QuantizerConfig.from_attributes(attributes)


def test_not_a_mapping():
  with pytest.raises(TypeError, match=r"quantizer attributes are 8; a mapping such as"):
    QuantizerConfig.from_attributes(8)  # pyright: ignore


def test_every_attribute_of_modelopt_is_accepted():
  attributes = {
    "enable": True, "num_bits": 8, "effective_bits": 8.5, "axis": None, "fake_quant": False, "unsigned": False, "narrow_range": True,
    "learn_amax": False, "type": "static", "block_sizes": None, "bias": {-2: None, "-4": None, "type": "dynamic", "method": "max_min"},
    "trt_high_precision_dtype": "Half", "calibrator": ["histogram", {"num_bins": 64}],
    "rotate": {"enable": True, "mode": "rotate_back", "rotate_fp32": True, "block_size": 16, "seed": 7}, "pass_through_bwd": False,
    "backend": "mine", "backend_extra_args": {"a": [1, {"b": 2}]}, "use_constant_amax": False, "constant_amax": 2.5,
  }  # fmt: skip
  ours = {"format", "e8m0_rule", "rounding", "zero_point", "bound", "pad"}
  assert set(attributes) | ours == set(ATTRIBUTES)
  config = QuantizerConfig.from_attributes(attributes)
  assert config.bias == BiasSpec((-2, -4), True, "max_min")
  assert config.rotate == RotateSpec("rotate_back", True, 16, 7)
  assert (config.calibrator, config.calibrator_options["num_bins"]) == ("histogram", 64)
  assert (config.constant_amax, config.effective_bits, config.fake_quant, config.pass_through_bwd) == (2.5, 8.5, False, False)
  assert (config.backend, config.backend_extra_args) == ("mine", {"a": [1, {"b": 2}]})
  again = QuantizerConfig.from_attributes(json.loads(json.dumps(config.to_attributes())))
  assert again == config
  assert hash(again) == hash(config)
  assert pickle.loads(pickle.dumps(config)) == config


def test_small_attributes():
  assert QuantizerConfig.from_attributes({"use_constant_amax": True}).constant_amax == 448.0
  assert QuantizerConfig.from_attributes({"rotate": True}).rotate == RotateSpec()
  assert QuantizerConfig.from_attributes({"rotate": {"enable": False, "seed": 1}}).rotate is None
  assert QuantizerConfig.from_attributes({}).spec.pad
  assert not QuantizerConfig.from_attributes({"pad": False}).spec.pad
  assert QuantizerConfig.from_attributes({"pad": False}).to_attributes()["pad"] is False
  register_calibrator("test-mean", ("power",))
  assert QuantizerConfig.from_attributes({"calibrator": ["test-mean", {"power": 2}]}).calibrator == "test-mean"


@pytest.mark.parametrize(
  ("attributes", "dynamic", "needs"),
  [
    ({"num_bits": 8}, False, True),
    ({"num_bits": 8, "constant_amax": 3.0}, False, False),
    ({"num_bits": 8, "type": "dynamic"}, True, False),
    ({"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}}, True, False),
    ({"format": "mxfp4"}, True, False),
    (NVFP4, True, True),
    ({**NVFP4, "constant_amax": 2688.0}, True, False),
    ({"num_bits": (2, 1), "block_sizes": {-1: 16, "scale_bits": (4, 3)}}, False, True),
    ({"num_bits": 4, "block_sizes": {-1: 128, "type": "dynamic"}}, True, False),
  ],
)
def test_dynamic_and_needs_calibration(attributes, dynamic, needs):
  config = QuantizerConfig.from_attributes(attributes)
  assert (config.dynamic, config.needs_calibration) == (dynamic, needs)


@pytest.mark.parametrize(
  ("attributes", "text"),
  [
    ({"num_bits": 8, "axis": 0}, "INT8 axis 0"),
    ({"num_bits": (4, 3)}, "E4M3 per tensor"),
    ({"num_bits": (4, 3), "type": "dynamic", "block_sizes": {-1: None}}, "E4M3 per token dynamic"),
    ({"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 64}}, "E4M3 block 64x128"),
    ({"num_bits": 4, "block_sizes": {0: 8}}, "INT4 block 8 of axis 0"),
    (NVFP4, "NVFP4 block 16 dynamic"),
    ({"format": "nvfp4_four_over_six", "block_sizes": {-1: 16, "type": "static"}}, "NVFP4 block 16 static four-over-six"),
    ({"format": "mxfp4", "e8m0_rule": "floor"}, "MXFP4 block 32 floor"),
    ({"format": "mxfp6_e3m2"}, "MXFP6-E3M2 block 32"),
    ({"format": "mxint8"}, "MXINT8 block 32"),
    ({"format": "nf4_double"}, "NF4 block 64 double"),
    ({"num_bits": 4, "block_sizes": {-1: 128, "scale_bits": (5, 10)}}, "INT4 block 128 fp16-scale"),
    ({"unsigned": True, "zero_point": True}, "UINT8 per tensor zero-point"),
    ({"bound": 127.5, "narrow_range": True, "rounding": "stochastic"}, "INT8 narrow per tensor bound 127.5 stochastic"),
  ],
)
def test_describe(attributes, text):
  assert QuantizerConfig.from_attributes(attributes).describe() == text


def test_a_new_format_by_name(monkeypatch):
  grid = FloatFormat("E2M2", 2, 2, 7.0)
  with pytest.raises(ValueError, match=r"element format 'E2M2' has no name in core\.spec\.NAMED.*NAMED\['e2m2'\]"):
    QuantizerConfig(QuantSpec(grid)).to_attributes()
  monkeypatch.setitem(NAMED, "e2m2", QuantSpec(grid, blocks=((-1, 32),), scale_format=formats.E8M0, dynamic=True, e8m0_rule="floor"))
  book = CodebookFormat("two", (-1.0, 1.0))
  monkeypatch.setitem(NAMED, "two", QuantSpec(book, bound=0.5, rounding="stochastic"))
  mx, plain = NAMED["e2m2"], QuantSpec(grid)
  specs = [mx, mx.replace(e8m0_rule="rceil"), plain, plain.replace(axis=(0,)), plain.replace(blocks=((-1, 8),))]
  specs += [NAMED["two"], QuantSpec(book), QuantSpec(book, blocks=((-1, 8),), scale_format=formats.E4M3)]
  for spec in specs:
    config = QuantizerConfig(spec)
    assert QuantizerConfig.from_attributes(json.loads(json.dumps(config.to_attributes()))) == config


bits = st.one_of(st.integers(2, 8), st.sampled_from(sorted(formats.FLOAT_FORMATS)))
sizes = st.dictionaries(st.integers(-3, 3), st.one_of(st.none(), st.integers(1, 256)), min_size=1, max_size=3)


@st.composite
def attribute_sets(draw) -> dict:
  """Attribute sets that are valid by construction."""
  num_bits = draw(bits)
  attributes: dict = {"num_bits": num_bits}
  shape = draw(st.sampled_from(["tensor", "axis", "blocks", "mx", "two", "double", "half"]))
  if shape == "axis":
    attributes["axis"] = draw(st.lists(st.integers(-3, 3), min_size=1, max_size=3, unique=True))
  elif shape != "tensor":
    block_sizes: dict = dict(draw(sizes))
    scale = {"blocks": None, "mx": (8, 0), "two": (4, 3), "double": 8, "half": (5, 10)}[shape]
    block_sizes |= {} if scale is None else {"scale_bits": scale}
    if shape != "mx":
      block_sizes["type"] = draw(st.sampled_from(["static", "dynamic"]))
    attributes["block_sizes"] = block_sizes
  if shape in ("tensor", "axis"):
    attributes["type"] = draw(st.sampled_from(["static", "dynamic"]))
  if shape == "mx":
    attributes["e8m0_rule"] = draw(st.sampled_from(["rceil", "floor", "ceil", "even"]))
  if isinstance(num_bits, int) and not (shape == "double" and num_bits == 4):
    attributes[draw(st.sampled_from(["unsigned", "narrow_range"]))] = draw(st.booleans())
    attributes["zero_point"] = shape in ("tensor", "axis", "blocks") and draw(st.booleans())
  attributes["rounding"] = draw(st.sampled_from(["nearest", "stochastic"]))
  attributes["pad"] = draw(st.booleans())
  extras = {
    "effective_bits": st.floats(0.5, 16), "fake_quant": st.booleans(), "pass_through_bwd": st.booleans(),
    "constant_amax": st.floats(1e-3, 1e3), "rotate": st.booleans(), "bias": st.just({-1: None}), "calibrator": st.just("histogram"),
    "trt_high_precision_dtype": st.sampled_from(["Float", "Half", "BFloat16"]), "enable": st.booleans(),
  }  # fmt: skip
  for key in draw(st.lists(st.sampled_from(sorted(extras)), unique=True)):
    attributes[key] = draw(extras[key])
  return attributes


@settings(max_examples=300, deadline=None)
@given(attribute_sets())
def test_attributes_round_trip(attributes):
  config = QuantizerConfig.from_attributes(attributes)
  written = config.to_attributes()
  assert json.loads(json.dumps(written)) == written
  again = QuantizerConfig.from_attributes(written)
  assert again == config
  assert hash(again) == hash(config)
  assert again.to_attributes() == written
  assert config.describe()
