"""File to file is the same as through the model."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from core import export as core_export
from core.config import PRESETS, ConfigWarning
from experiments import cli
from experiments import export as program
from tests.experiments import tiny
from tests.export import quantized as q

CT, MODELOPT = "compressed-tensors", "modelopt"


def weights_only(folder: Path, out: Path, config: Any, **options: Any) -> core_export.Artefact:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConfigWarning)
    core_export.export_weights(folder, out, config, **options)
  return core_export.read(out)


@pytest.mark.parametrize(
  ("name", "layout"),
  [
    ("INT8_WEIGHT_ONLY_CFG", CT), ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", MODELOPT), ("FP8_PER_CHANNEL_PER_TOKEN_CFG", MODELOPT),
    ("W4A16_NVFP4_CFG", CT), ("W4A16_NVFP4_CFG", MODELOPT), ("MXFP8_DEFAULT_CFG", CT), ("INT4_ASYMMETRIC", CT), ("MIXED", CT),
  ],
)  # fmt: skip
def test_same_bytes_as_through_the_model(llama: Path, tmp_path: Path, name: str, layout: str) -> None:
  made = q.quantized("torch", llama, name)
  q.exported(made, tmp_path / "model", layout, llama)
  weights_only(llama, tmp_path / "files", q.OWN.get(name) or PRESETS[name], layout=layout)
  for file in (tmp_path / "model").iterdir():
    assert file.read_bytes() == (tmp_path / "files" / file.name).read_bytes(), file.name


def test_siblings_in_fp8(llama: Path, tmp_path: Path) -> None:
  """One scale for q, k and v, as the model shares it."""
  config = q.config({"num_bits": (4, 3), "axis": None})
  q.OWN["FP8_WEIGHT_ONLY"] = config
  made = q.quantized("torch", llama, "FP8_WEIGHT_ONLY")
  artefact = weights_only(llama, tmp_path / "files", config)
  assert q.compared(made, artefact) == 294_912
  scales = [float(artefact.stored(f"model.layers.0.self_attn.{name}_proj").weight.scale) for name in "qkv"]
  assert len(set(scales)) == 1
  alone = weights_only(llama, tmp_path / "alone", config, group_rules=())
  assert len({float(alone.stored(f"model.layers.0.self_attn.{name}_proj").weight.scale) for name in "qkv"}) == 3


def test_sequences(llama: Path, tmp_path: Path) -> None:
  """W4A8's second format is calibrated on what the first returns; the input's scale needs data, so it is left out here."""
  config = q.config([{"num_bits": 4, "block_sizes": {-1: 128}}, {"num_bits": (4, 3), "axis": None}])
  source = core_export.FolderSource(llama, config)
  q.OWN["W4A8_WEIGHTS"] = config
  made = q.quantized("torch", llama, "W4A8_WEIGHTS")
  leaves = made.leaves()
  for layer in source.weighted():
    stages = source.weight_stages(layer)
    for stage, leaf in zip(stages, leaves.get(f"{layer}.weight_quantizer", ()), strict=True):
      assert stage.amax is not None and stage.amax.tobytes() == leaf.amax.tobytes()
  with pytest.raises(ValueError, match="passes 2 formats in sequence"):
    weights_only(llama, tmp_path / "out", config)


def test_shards_are_read_and_written(tmp_path: Path) -> None:
  folder = tiny.llama_folder(tmp_path / "m", shards="40KB", hidden_size=64, intermediate_size=128)
  assert len(list(folder.glob("*.safetensors"))) > 2
  artefact = weights_only(folder, tmp_path / "out", PRESETS["INT8_WEIGHT_ONLY_CFG"], max_shard_size="30KB")
  assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
  assert q.compared(q.quantized("torch", folder, "INT8_WEIGHT_ONLY_CFG"), artefact) > 60_000


@pytest.mark.parametrize(
  ("name", "reason"),
  [
    ("INT8_DEFAULT_CFG", "have static scales, which need data"), ("NVFP4_DEFAULT_CFG", "have static scales, which need data"),
    ("INT4_AWQ_CFG", "the algorithm awq_lite needs the model"), ("MXFP6_DEFAULT_CFG", "cannot express this model"),
  ],
)  # fmt: skip
def test_refusals(llama: Path, tmp_path: Path, name: str, reason: str) -> None:
  with pytest.raises(ValueError, match=reason):
    weights_only(llama, tmp_path / "out", PRESETS[name])
  assert not list(tmp_path.iterdir())


def test_not_twice(llama: Path, tmp_path: Path) -> None:
  weights_only(llama, tmp_path / "out", PRESETS["MXFP8_DEFAULT_CFG"])
  with pytest.raises(ValueError, match="is quantized already"):
    weights_only(tmp_path / "out", tmp_path / "again", PRESETS["MXFP8_DEFAULT_CFG"])


def run(*flags: str) -> dict[str, Any]:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConfigWarning)
    return program.run(cli.parse(program.Options, ["export", *flags]))


def test_program(llama: Path, tmp_path: Path) -> None:
  common = ("--config=W4A16_NVFP4_CFG", "--layout=compressed-tensors")
  found = run("--weights_only", f"--source={llama}", *common, f"--out={tmp_path / 'files'}")
  assert found["layers"] == 14 and 4.5 < found["bits_per_quantized_weight"] < 4.51
  text = tmp_path / "text.txt"
  text.write_text("w1 w2 w3 w4 " * 2000)
  shutil.copytree(llama, tmp_path / "m")
  more = (f"--text_file={text}", "--calib_samples=2", "--calib_tokens=8", f"--report={tmp_path / 'report.json'}")
  made = run(f"--model={tmp_path / 'm'}", "--backend=torch", *common, *more, f"--out={tmp_path / 'model'}")
  assert made["bits_per_quantized_weight"] == found["bits_per_quantized_weight"]
  files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("files", "model")]
  assert files[0] == files[1]
  assert "experiments.export" in (tmp_path / "model" / "README.md").read_text()


def test_program_says_what_is_missing(llama: Path, tmp_path: Path) -> None:
  with pytest.raises(ValueError, match="--out is empty"):
    run("--weights_only", f"--source={llama}")
  with pytest.raises(ValueError, match="needs --source"):
    run("--weights_only", f"--out={tmp_path / 'x'}")
  with pytest.raises(ValueError, match="needs the model"):
    run("--weights_only", f"--source={llama}", "--algorithm=gptq", f"--out={tmp_path / 'x'}")


def test_report_is_json(tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
  flags = (
    "--weights_only",
    f"--source={llama}",
    "--config=MXFP8_DEFAULT_CFG",
    f"--out={tmp_path / 'o'}",
    f"--report={tmp_path / 'r.json'}",
  )
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConfigWarning)
    assert program.main(cli.parse(program.Options, ["export", *flags])) == 0
  assert json.loads((tmp_path / "r.json").read_text())["layers"] == 14 and "bits_per_quantized_weight" in capsys.readouterr().out
