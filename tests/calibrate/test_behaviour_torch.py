"""Calibration at its edges that both backends share, run in both; and those of torch alone."""

from __future__ import annotations

import dataclasses
import io
import re
from typing import Any

import numpy as np
import pytest
import torch

import jax_backend
import torch_backend
from core.calibrate import Change, algorithms, register_algorithm, registry, unregister_algorithm
from core.config import ConfigWarning, read_algorithm
from core.config.algorithms import ALGORITHMS
from tests.calibrate import twins
from tests.calibrate.twins import BACKENDS, FORMATS, OFF

algorithms.load()
INT4, INT8 = FORMATS["int4"], FORMATS["int8"]
MANY = ("tokens", "amax", "mean_abs", "mean", "hessian", "samples")
LAYERWISE = pytest.mark.parametrize("layerwise", [False, True])
BACKEND = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def seen():
  """An algorithm that changes nothing and keeps the statistics of every layer."""
  kept: dict[str, dict[str, Any]] = {}

  @register_algorithm("look", statistics=MANY)
  def look(layer):
    kept[layer.name] = dict(layer.statistics)
    return Change(report={"tokens": layer.tokens})

  yield kept
  unregister_algorithm("look")


def call(twin: Any, *arrays: np.ndarray, **named: np.ndarray) -> Any:
  """A loop of one batch."""
  make = torch.from_numpy if isinstance(twin, twins.Torch) else np.asarray
  return lambda model: model(*map(make, arrays), **{key: make(value) for key, value in named.items()})


@BACKEND
@LAYERWISE
@pytest.mark.parametrize("by_position", [False, True])
def test_padding_is_as_if_it_were_not_there(backend, layerwise, by_position, seen):
  """Rows of this net are independent: with the mask, statistics are those of the unpadded rows, in the first layer to the last bit."""
  x = twins.batches(1, (3, 20))[0]
  mask = np.ones((3, 20), np.int64)
  mask[1, 7:] = mask[2, :5] = 0
  padded, plain = x.copy(), x[mask.astype(bool)][None]
  padded[mask == 0] = 1e4
  options = {"method": "look", "layerwise": layerwise, "exclude_padding": True}
  one = BACKENDS[backend]()
  one.quantize(options, INT4, call(one, padded, mask) if by_position else call(one, padded, attention_mask=mask))
  masked = dict(seen)
  other = BACKENDS[backend]()
  other.quantize(options, INT4, call(other, plain))
  assert {row["tokens"] for row in one.report if "tokens" in row} == {int(mask.sum())}
  assert masked.keys() == seen.keys() and len(masked) == (6 if layerwise else 7)
  for name, statistics in seen.items():
    for key, value in statistics.items():
      if name == "layers.0.gate_proj":
        np.testing.assert_array_equal(masked[name][key], value)
      else:  # rows of matmuls of another height: float32 rounding
        np.testing.assert_allclose(masked[name][key], value, atol=1e-5 * np.abs(value).max(), rtol=0)


@BACKEND
@LAYERWISE
def test_padding_counts_unless_it_is_left_out(backend, layerwise, seen):
  x, mask = twins.batches(1)[0], np.zeros((2, 20), np.int64)
  one = BACKENDS[backend]()
  one.quantize({"method": "look", "layerwise": layerwise}, INT4, call(one, x, attention_mask=mask))
  assert {entry["tokens"] for entry in seen.values()} == {40}


@BACKEND
@LAYERWISE
@pytest.mark.parametrize("shapes", [[(2, 0), (1, 1), (2, 9)], [(2, 9), (0, 4)], [(1, 1)], [(1, 30), (2, 3), (4, 1)]])
def test_any_lengths(backend, layerwise, shapes, seen):
  data = [twins.batches(1, shape, seed)[0] for seed, shape in enumerate(shapes)]
  BACKENDS[backend](data).quantize({"method": "look", "layerwise": layerwise}, INT8)
  rows = np.concatenate([x.reshape(-1, twins.WIDTH) for x in data])
  assert {entry["tokens"] for entry in seen.values()} == {len(rows)}
  first = seen["layers.0.gate_proj"]
  np.testing.assert_array_equal(first["amax"], np.abs(rows).max(axis=0))
  np.testing.assert_allclose(first["mean_abs"], np.abs(rows).mean(axis=0), rtol=1e-5)  # float32 sums
  np.testing.assert_allclose(first["hessian"], rows.T @ rows / len(rows), atol=1e-5 * np.square(rows).max())
  np.testing.assert_array_equal(first["samples"], rows)


@BACKEND
@LAYERWISE
@pytest.mark.parametrize("count", [None, 0])
def test_without_data_layers_keep_max_and_say_so(backend, layerwise, count):
  """No forward loop, and one that has nothing left when it is called again."""
  one, plain = (BACKENDS[backend](twins.batches(1)).quantize("max", INT4) for _ in range(2))
  loop = None if count is None else lambda model: None
  report: list[dict[str, Any]] = []
  options = {"method": "gptq", "layerwise": layerwise}
  with pytest.warns(ConfigWarning, match="gptq saw no calibration data, so all 7 layers keep max"):
    if backend == "torch":
      torch_backend.calibrate(one.model, options, loop, report=report)
    else:
      one.variables = jax_backend.calibrate(one.module, one.variables, options, loop, report=report)
  assert len(report) == 7 and all("max calibration" in row["kept"] for row in report)
  twins.assert_same(twins.state(one.host()), twins.state(plain.host()))


@BACKEND
@LAYERWISE
@pytest.mark.parametrize("form", ["int4", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_are_not_finite_name_the_first_layer(backend, layerwise, form, value):
  """In the middle of the run: the model is as it was, and calibrates well afterwards."""
  data = twins.batches(2)
  data[1][0, 3, 5] = value
  one = BACKENDS[backend](data)
  held = None if backend == "torch" else one.variables
  before = one.output()
  with pytest.raises(ValueError, match=r"'layers\.0\.gate_proj.*holds"):
    one.quantize({"method": "gptq", "layerwise": layerwise}, FORMATS[form])
  np.testing.assert_array_equal(one.output(), before)
  if backend == "torch":
    assert not torch_backend.is_quantized(one.model)
    for parameter, other in zip(one.model.parameters(), twins.torch_net().parameters(), strict=True):
      assert torch.equal(parameter, other)
  else:
    assert one.variables is held and list(held) == ["params"]
  one.data = data[:1]
  one.quantize({"method": "gptq", "layerwise": layerwise}, FORMATS[form])
  assert np.isfinite(one.output()).all()


@BACKEND
@LAYERWISE
def test_an_overflow_inside_is_named_where_it_appears(backend, layerwise):
  net = twins.torch_net()
  for layer in (net.layers[1].gate_proj, net.layers[1].up_proj):
    layer.weight.data *= 1e20
  one = twins.Torch(net=net) if backend == "torch" else twins.Jax(variables=twins.flax_variables(net))
  with pytest.raises(ValueError, match=r"layer 'layers\.1\.down_proj' holds 0 NaN and [1-9]\d* infinite"):
    one.quantize({"method": "gptq", "layerwise": layerwise}, INT4)
  if backend == "torch":  # the first block, which has changed by then, is put back
    assert torch.equal(one.model.layers[0].up_proj.weight, twins.torch_net().layers[0].up_proj.weight)


@BACKEND
@LAYERWISE
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_sums_that_overflow_name_statistic_and_layer(backend, layerwise):
  """Products of 1e20 in the first block: their squares are more than float32 holds. The second block's gates are shut."""
  net = twins.torch_net()
  for parameter in net.layers[1].gate_proj.parameters():
    parameter.data *= 0
  data = [np.float32(1e10) * x for x in twins.batches(1)]
  one = twins.Torch(data, net) if backend == "torch" else twins.Jax(data, variables=twins.flax_variables(net))
  with pytest.raises(ValueError, match=r"statistic 'hessian' of layer 'layers\.0\.down_proj' overflows"):
    one.quantize({"method": "gptq", "layerwise": layerwise}, INT4)


@BACKEND
@pytest.mark.parametrize("method", ["awq_full", "gptq", "svdquant", "smoothquant", "adaround"])
def test_order_of_batches_changes_nothing_but_rounding(backend, method):
  """Sums in another order move statistics by 1e-6; a choice that was a tie, or a code on its edge, may flip: outputs stay within 1 %."""
  data = twins.batches(4)
  form = FORMATS["int8" if method == "smoothquant" else "int4"]
  outputs = []
  for order in (data, data[::-1]):
    one = BACKENDS[backend](order).quantize({"method": method}, form)
    one.data = data
    outputs.append(one.output())
  np.testing.assert_allclose(*outputs, atol=0.01 * np.abs(outputs[0]).max(), rtol=0)


@BACKEND
def test_loops_may_use_what_the_model_returns(backend):
  def loop(model):
    for x in twins.batches(3):
      y = model(torch.from_numpy(x) if backend == "torch" else np.asarray(x))
      assert y.shape == (2, 20, twins.OUT) and np.isfinite(float(y.sum()))

  one = BACKENDS[backend]().quantize({"method": "gptq", "layerwise": True, "correction": 0.5}, INT8, loop)
  other = BACKENDS[backend]().quantize({"method": "gptq", "layerwise": True, "correction": 0.5}, INT8)
  twins.assert_same(twins.state(one.host()), twins.state(other.host()))


class Killed(BaseException):
  """Stands for a run that ends from outside."""


def killing(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
  """Counts the calls of an algorithm's function; ends the run at call number `stop`."""
  original = registry.ALGORITHMS[name]
  state: dict[str, Any] = {"calls": [], "stop": 0}

  def function(layers, **options):
    if len(state["calls"]) == state["stop"] - 1:
      raise Killed
    state["calls"].append((layers[0] if original.grouped else layers).name)
    return original.function(layers, **options)

  monkeypatch.setitem(registry.ALGORITHMS, name, dataclasses.replace(original, function=function))
  return state


@BACKEND
@pytest.mark.parametrize(("options", "form", "stop", "done"), [
  ({"method": "gptq", "act_order": True}, "int4", 3, 2),
  ({"method": "gptq", "layerwise": True, "correction": 0.5}, "nvfp4_static", 4, 2),  # two groups in the first block, one in the second
  ({"method": "gptq", "layerwise": True, "true_sequential": True}, "int8", 4, 2),
  ({"method": "svdquant", "lowrank": 4}, "nvfp4", 3, 2),
  ({"method": "smoothquant", "alpha": 0.5}, "int8", 2, 1),
  ({"method": "bias_correction"}, "int4", 5, 3),  # in the middle of a group of two
  ({"method": "mse"}, "nvfp4_static", 5, 4),
])  # fmt: skip
def test_an_interrupted_run_ends_with_the_same_bits(backend, options, form, stop, done, tmp_path, monkeypatch):
  """`done` calls of the function belong to finished steps, which are groups of layers or whole blocks; these are not repeated."""
  whole = BACKENDS[backend]().quantize(options, FORMATS[form])
  state = killing(options["method"], monkeypatch)
  kept = {**options, "checkpoint_dir": str(tmp_path)}
  state["stop"] = stop
  with pytest.raises(Killed):
    BACKENDS[backend]().quantize(kept, FORMATS[form])
  before, state["calls"], state["stop"] = state["calls"], [], 0
  steps = list(tmp_path.glob("step-*.npz"))
  assert steps and len(before) == stop - 1
  for step in steps:  # arrays of numbers, nothing that runs when it is read
    with np.load(step, allow_pickle=False) as held:
      assert all(held[name].dtype.kind in "fiu" for name in held)
  (tmp_path / "tmpxyz.part").write_bytes(b"a run that was killed while it wrote")
  resumed = BACKENDS[backend]().quantize(kept, FORMATS[form])
  assert state["calls"][: stop - 1 - done] == before[done:] and not set(before[:done]) & set(state["calls"])
  twins.assert_same(twins.state(resumed.host()), twins.state(whole.host()))
  np.testing.assert_array_equal(resumed.output(), whole.output())
  assert resumed.report == whole.report
  assert list(tmp_path.iterdir()) == []


@BACKEND
@pytest.mark.parametrize(("change", "named"), [
  ({"method": "awq_lite"}, "method"),
  ({"act_order": True}, "options"),
  ({"layerwise": True}, "options"),
  ({"exclude_padding": True}, "options"),
  ({"weights": 2.0}, "model"),
  ({"prior": "mse"}, "model"),
  ({"format": "int8"}, "model"),
])  # fmt: skip
def test_files_of_another_run_are_refused(backend, change, named, tmp_path, monkeypatch):
  options = {"method": "gptq", "checkpoint_dir": str(tmp_path)}
  state = killing("gptq", monkeypatch)
  state["stop"] = 2
  with pytest.raises(Killed):
    BACKENDS[backend]().quantize(options, INT4)
  files = sorted(path.name for path in tmp_path.iterdir())
  net, change = twins.torch_net(), dict(change)
  net.head.weight.data *= change.pop("weights", 1.0)
  other = twins.Torch(net=net) if backend == "torch" else twins.Jax(variables=twins.flax_variables(net))
  form, prior = FORMATS[change.pop("format", "int4")], change.pop("prior", None)
  state["stop"] = 0
  with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} holds an interrupted run with another {named}.*choose another"):
    other.quantize([*([prior] if prior else []), {**options, **change}], form)
  assert sorted(path.name for path in tmp_path.iterdir()) == files


class TorchExperts(torch.nn.Module):
  """A router that sends tokens to two of three experts."""

  def __init__(self) -> None:
    super().__init__()
    self.up = torch.nn.Linear(twins.WIDTH, twins.WIDTH)
    self.experts = torch.nn.ModuleList(torch.nn.Linear(twins.WIDTH, twins.OUT) for _ in range(3))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = torch.relu(self.up(x)).reshape(-1, twins.WIDTH)
    chosen = (x[:, 0] > x[:, 1]).long()
    y = x.new_zeros(len(x), twins.OUT)
    for i, expert in enumerate(self.experts):
      where = (chosen == i).nonzero()[:, 0]
      y = y.index_add(0, where, expert(x[where]))
    return y


@pytest.mark.parametrize("method", ["gptq", "awq_full", "local_hessian", "svdquant"])
def test_experts_without_tokens_keep_max(method, seen):
  torch.manual_seed(0)
  one = twins.Torch(net=TorchExperts().eval())
  one.quantize([{"method": method}, "look"], INT4)
  torch.manual_seed(0)
  plain = twins.Torch(net=TorchExperts().eval()).quantize("max", INT4)
  kept = {row["layer"]: row["kept"] for row in one.report if "kept" in row and row["method"] == method}
  assert kept == {"experts.2": "max calibration (no tokens)"}
  assert seen["experts.0"]["tokens"] + seen["experts.1"]["tokens"] == seen["up"]["tokens"] == 120
  assert 0 < seen["experts.0"]["tokens"] < 120 and "experts.2" not in seen
  states = [{k: v for k, v in twins.state(twin.host()).items() if k.startswith("experts.2.")} for twin in (one, plain)]
  twins.assert_same(*states)


def test_tied_embeddings(tmp_path):
  """A head that is not quantized stays the table; one that is becomes a parameter of its own, and the table stays as it was."""
  from experiments.models import load_torch_twin
  from tests.experiments import tiny

  folder = tiny.llama_folder(tmp_path, tie_word_embeddings=True)
  data = [tiny.tokens(2, 12, seed).astype(np.int64) for seed in range(2)]
  rules = {"default": OFF, "*weight_quantizer": {"num_bits": 4, "block_sizes": {-1: 8}}, "*embed*": OFF}
  table = load_torch_twin(folder)[0].model.embed_tokens.weight
  for head in (OFF, {}):
    one = twins.Torch(data, load_torch_twin(folder)[0]).quantize("gptq", {**rules, **({"*lm_head*": head} if head else {})})
    assert torch.equal(one.model.model.embed_tokens.weight, table)
    assert (one.model.lm_head.weight is one.model.model.embed_tokens.weight) == bool(head)


def test_errors_of_options_name_the_algorithm_and_what_it_takes():
  for name, algorithm in registry.ALGORITHMS.items():
    with pytest.raises(ValueError, match=f"algorithm '{name}': unknown key 'nonsense'") as error:
      read_algorithm({"method": name, "nonsense": 1})
    assert all(option in str(error.value) for option in (*algorithm.options, "layerwise", "checkpoint_dir"))
  with pytest.raises(ValueError, match=r"layerwise is \{'enabled': True\}; allowed are .*enable"):
    twins.Torch().quantize({"method": "gptq", "layerwise": {"enabled": True}}, INT4)
  with pytest.raises(ValueError, match="gptq scale_search is 'mse'; allowed are"):
    twins.Torch().quantize({"method": "gptq", "scale_search": "mse"}, INT4)


def test_a_forgotten_algorithm_is_unknown():
  register_algorithm("brief")(lambda layer: None)
  assert "brief" in ALGORITHMS
  unregister_algorithm("brief")
  with pytest.raises(ValueError, match="'brief', which is unknown"):
    read_algorithm("brief")


ROWS = [
  {"layer": "layers.0.up_proj", "method": "awq_lite", "alpha": 0.5, "error_before": 2.0, "error": 1.0},
  {"layer": "layers.0.down_proj", "method": "svdquant", "alpha": 0.25, "rank": 8, "error_before": 1.0, "error": 0.1},
  {"layer": "layers.0.gate_proj", "method": "mse", "multiplier": np.float32(0.9375), "error_before": 0.0, "error": 0.0},
  {"layer": "experts.2", "method": "awq_lite", "kept": "max calibration (no tokens)"},
]


def test_report_as_text(capsys):
  torch_backend.print_calibration_report(ROWS)
  head, *lines, last = capsys.readouterr().out.splitlines()
  assert re.split(r"\s{2,}", head) == ["layer", "method", "chosen", "rank", "error before", "error after", "gain dB", "kept"]
  assert re.split(r"\s{2,}", lines[0]) == ["layers.0.up_proj", "awq_lite", "alpha 0.5", "2", "1", "3.01"]
  assert re.split(r"\s{2,}", lines[1]) == ["layers.0.down_proj", "svdquant", "alpha 0.25", "8", "1", "0.1", "10.00"]
  assert re.split(r"\s{2,}", lines[2]) == ["layers.0.gate_proj", "mse", "multiplier 0.9375", "0", "0"]
  assert re.split(r"\s{2,}", lines[3]) == ["experts.2", "awq_lite", "max calibration (no tokens)"]
  assert lines[3].index("max calibration") == head.index("kept")
  assert last == "4 lines, 1 kept; awq_lite: 3.01 dB over 1; svdquant: 10.00 dB over 1"


def test_report_on_a_terminal(monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self) -> bool:
      return True

  out = Terminal()
  monkeypatch.setattr("sys.stdout", out)
  monkeypatch.setenv("COLUMNS", "160")
  jax_backend.print_calibration_report(ROWS)
  text = out.getvalue()
  assert all(word in text for word in ("gain dB", "layers.0.down_proj", "multiplier 0.9375", "10.00", "1 kept"))


def test_report_of_a_run(capsys):
  one = twins.Torch().quantize(["awq_clip", "gptq", "bias_correction"], INT4)
  torch_backend.print_calibration_report(one.report)
  out = capsys.readouterr().out
  assert len(out.splitlines()) == 1 + 3 * 7 + 1 and "clip 0." in out and "no bias to correct" in out
  with pytest.raises(ValueError, match=r"lacks method"):
    torch_backend.print_calibration_report([{"layer": "x"}])
