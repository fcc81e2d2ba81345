"""The files: readable by safetensors, types kept, damage found, older versions read, nothing lost when something goes wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_backend as jb
import torch_backend as tb
from core import state as files
from core.state import document, tensors, upgrade
from core.state.tensors import Tensor
from jax_backend.state import state_of as jax_state
from tests.state import nets
from torch_backend.state import state_of as torch_state

GOLDEN = Path(__file__).with_name("golden_v1")
# Of the quantized weights, when these files were written (format version 1).
WEIGHTS = {
  "up": "000456cd25ccc5e3e52d3aaeaa2ccd131b517a0227d454a58e9114193a689153",
  "down": "57929f4f79dd939359a83e376ef5c50ae5187bfaef70090f52a9599ed3037447",
}


class Net(torch.nn.Module):
  def __init__(self) -> None:
    super().__init__()
    self.up, self.down = torch.nn.Linear(32, 24), torch.nn.Linear(24, 6)

  def forward(self, x):
    return self.down(torch.relu(self.up(x)))


class FlaxNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(6, name="down")(nn.relu(nn.Dense(24, name="up")(x)))


def test_files_of_version_1_are_read():
  assert json.loads((GOLDEN / files.DOCUMENT).read_text())["version"] == 1 < upgrade.VERSION
  net = tb.restore(Net(), GOLDEN)
  for name, value in nets.torch_weights(net).items():
    assert hashlib.sha256(value.tobytes()).hexdigest() == WEIGHTS[name]
  variables = FlaxNet().init(__import__("jax").random.key(0), jnp.ones((1, 32)))
  qmodule, qvariables = jb.restore(FlaxNet(), variables, GOLDEN)
  nets.assert_same_state(torch_state(net), jax_state(qmodule, qvariables))
  x = torch.from_numpy(nets.data(3))
  with torch.no_grad():
    apart = np.abs(np.asarray(qmodule.apply(qvariables, jnp.asarray(x.numpy()))) - net(x).numpy()).max()
  assert apart < 1e-4  # sums of 32 and 24 products in another order, before an FP8 and an INT8 quantizer that round alike


def test_saving_files_of_version_1_again_makes_the_present_version(tmp_path):
  net = tb.restore(Net(), GOLDEN)
  tb.save(net, tmp_path)
  assert json.loads((tmp_path / files.DOCUMENT).read_text())["version"] == upgrade.VERSION
  nets.assert_same_state(torch_state(net), torch_state(tb.restore(Net(), tmp_path)))


@pytest.mark.parametrize(
  "version, words", [(0, "version is 0"), ("2", "version is '2'"), (99, "version 99 is newer than 2"), (True, "True")]
)
def test_versions_that_are_none(version, words, tmp_path):
  shutil.copytree(GOLDEN, tmp_path / "state")
  _edit(tmp_path / "state", lambda held: held.update(version=version))
  with pytest.raises(ValueError, match=words):
    files.read(tmp_path / "state")


def test_every_type_through_a_file_and_through_the_safetensors_library(tmp_path):
  import safetensors.numpy
  import safetensors.torch

  rng = np.random.default_rng(0)
  held = {}
  for name, carrier in tensors.CARRIERS.items():
    values = rng.integers(0, 2 if name == "BOOL" else 120, (3, 5)).astype(carrier)
    held[f"t.{name}"] = Tensor(name, values.shape, lambda values=values: values)
  held["scalar"] = Tensor.of(np.float32(3.5).reshape(()))
  held["empty"] = Tensor.of(np.empty((0, 4), np.int8))
  path = tmp_path / "x.safetensors"
  assert tensors.write(path, held) == tensors.sha256(path)
  found = tensors.read(path)
  assert set(found) == set(held)
  for name, tensor in held.items():
    assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
    assert found[name].load().tobytes() == tensor.load().tobytes()
  for name, value in safetensors.torch.load_file(path).items():
    assert value.reshape(-1).view(torch.uint8).numpy().tobytes() == held[name].load().tobytes()
  other = tmp_path / "other.safetensors"
  safetensors.numpy.save_file({"b": np.arange(6, dtype=np.float16), "a": np.ones((2, 2))}, other, metadata={"who": "library"})
  assert {name: tensor.describe() for name, tensor in tensors.read(other).items()} == {"a": "F64 [2, 2]", "b": "F16 [6]"}


def test_saving_over_an_earlier_state_leaves_other_files_alone_and_no_rubbish(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  first, second = nets.quantized_torch(tb.preset("INT8_DEFAULT_CFG")), nets.quantized_torch(tb.preset("MXFP4_DEFAULT_CFG"), seed=4)
  tb.save(first, tmp_path)
  tb.save(second, tmp_path)
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names[0] == "config.json" and names[1].endswith(".safetensors") and names[2:] == [files.DOCUMENT]
  assert np.array_equal(nets.torch_output(tb.restore(nets.torch_net(), tmp_path)), nets.torch_output(second))


def test_a_failure_while_saving_leaves_the_earlier_state(tmp_path, monkeypatch):
  net = nets.quantized_torch(tb.preset("INT8_DEFAULT_CFG"))
  tb.save(net, tmp_path)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

  def full(*args):
    raise OSError(28, "No space left on device")

  for place in ("fsync", "replace"):
    monkeypatch.setattr(f"core.state.tensors.os.{place}", full)
    with pytest.raises(OSError, match="No space left"):
      tb.save(nets.quantized_torch(tb.preset("MXFP4_DEFAULT_CFG"), seed=4), tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda held: held.pop("tied"), "lacks 'tied'"),
    (lambda held: held.update(more=1), "unknown key 'more'"),
    (lambda held: held.update(backend="caffe"), "backend is 'caffe'; allowed are 'torch', 'jax'"),
    (lambda held: held.update(files={"../quant_state-0123456789abcdef.safetensors": {}}), "is not allowed; names look like"),
    (lambda held: held.update(files={"/etc/passwd": {}}), "'/etc/passwd' is not allowed"),
    (lambda held: held.update(tied={"a": "b"}), "'a' is said to be the same parameter as 'b'"),
    (lambda held: held["quantizers"]["up.weight_quantizer"].pop(), r"tensors of another|holds 1 tensors that the model has not|none of"),
    (lambda held: held["quantizers"]["up.weight_quantizer"][0].update(mode="on"), "mode is 'on'; allowed are 'quantize', 'pass'"),
    (lambda held: held["quantizers"]["up.weight_quantizer"][0]["attributes"].update(num_bits=77), "up.weight_quantizer.*77"),
    (lambda held: held["quantizers"]["up.input_quantizer"][0]["tensors"].remove("amax"), "up.input_quantizer.amax"),
    (lambda held: held["quantizers"]["down.input_quantizer"][0]["tensors"].append("bias"), "'down.input_quantizer.bias' is in none"),
    (
      lambda held: held["quantizers"].update(x=[{"attributes": {"num_bits": 8}, "mode": "quantize"}]),
      "quantizers that the model has not: x",
    ),
    (lambda held: held["packed"].update(q={}), "packed weight 'q': an object with"),
  ],
)
def test_documents_that_contradict_themselves_or_the_tensors(change, words, tmp_path):
  folder = tmp_path / "state"
  tb.save(tb.restore(Net(), GOLDEN), folder)
  _edit(folder, change)
  net = Net()
  with pytest.raises(ValueError, match=words):
    tb.restore(net, folder)
  assert not tb.is_quantized(net)


def test_damage_is_found_and_named(tmp_path):
  folder = tmp_path / "state"
  tb.save(tb.restore(Net(), GOLDEN), folder)
  (path,) = folder.glob("*.safetensors")
  data = path.read_bytes()
  path.write_bytes(data[:-1])
  with pytest.raises(ValueError, match=r"has \d+ bytes, quant_state.json says"):
    files.read(folder)
  path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  with pytest.raises(ValueError, match=r"SHA-256 .* was damaged or changed"):
    files.read(folder)
  path.unlink()
  with pytest.raises(FileNotFoundError, match="copy the whole directory"):
    files.read(folder)
  text = (folder / files.DOCUMENT).read_text()
  (folder / files.DOCUMENT).write_text(text.replace('"num_bits": 4', '"num_bits": 3', 1))
  with pytest.raises(ValueError, match="damaged or edited"):
    files.read(folder)


def _edit(folder: Path, change) -> None:
  """Change the document and sign it anew, as somebody would who knows how."""
  path = folder / files.DOCUMENT
  held = json.loads(path.read_text())
  change(held)
  held["sha256"] = document.digest(held)
  path.write_text(json.dumps(held))
