"""YAML and JSON files: string axes, preset imports, refusals, atomic writes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from core import config
from core.config import INT8_DEFAULT_CFG, load_config, normalize, save_config


def write(path, text):
  path.write_text(text, encoding="utf-8")
  return path


def test_both_forms_and_string_axes(tmp_path):
  listed = write(
    tmp_path / "list.yaml",
    """
quant_cfg:
  - {quantizer_name: "*", enable: false}
  - quantizer_name: "*weight_quantizer"
    cfg: {num_bits: [2, 1], block_sizes: {"-1": 16, type: dynamic, scale_bits: [4, 3]}}
algorithm: {method: awq_lite, alpha_step: 0.1}
""",
  )
  pairs = write(
    tmp_path / "dict.yml",
    """
quant_cfg:
  "*weight_quantizer": {num_bits: e2m1, block_sizes: {-1: 16, type: dynamic, scale_bits: e4m3}}
  default: {enable: false}
algorithm: {method: awq_lite, alpha_step: 0.1}
""",
  )
  assert normalize(load_config(listed)) == normalize(load_config(pairs))
  assert load_config(listed)["quant_cfg"][1]["cfg"]["block_sizes"][-1] == 16


def test_preset_import(tmp_path):
  path = write(tmp_path / "c.yaml", "preset: INT8_DEFAULT_CFG\nquant_cfg:\n  - {quantizer_name: '*fc1*', enable: false}\n")
  loaded = normalize(load_config(path))
  assert loaded.entries[:-1] == normalize(INT8_DEFAULT_CFG).entries
  assert loaded.entries[-1].label == "*fc1*"
  assert [step.method for step in loaded.algorithm] == ["max"]


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("c.yaml", "quant_cfg: [", r"c\.yaml: is not valid YAML"),
    ("c.json", "{", r"c\.json: "),
    ("c.yaml", "- 1", r"c\.yaml: holds list, not a mapping"),
    ("c.yaml", "quant_cfg: {'*': {num_bits: 99}}", r"c\.yaml: quant_cfg entry '\*': num_bits is 99"),
    ("c.yaml", "preset: NOPE", r"c\.yaml: preset 'NOPE' is unknown"),
    ("c.yaml", "a: !!python/object/apply:os.getcwd []", r"c\.yaml: is not valid YAML"),
    ("c.txt", "", r"suffix '\.txt' is unknown; allowed are \.yaml, \.yml, \.json"),
  ],
)
def test_refusals(tmp_path, name, text, message):
  with pytest.raises(ValueError, match=message):
    load_config(write(tmp_path / name, text))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = save_config(INT8_DEFAULT_CFG, tmp_path / "c.yaml")
  before = path.read_text()
  with pytest.raises(ValueError, match="num_bits is 99"):
    save_config({"quant_cfg": {"*": {"num_bits": 99}}}, path)

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(OSError, match="disk full"):
    save_config(config.FP8_DEFAULT_CFG, path)
  assert path.read_text() == before
  assert [file.name for file in tmp_path.iterdir()] == ["c.yaml"]


def test_files_do_not_keep_presets_apart_from_the_users_edits(tmp_path):
  edited = INT8_DEFAULT_CFG.copy()
  edited["quant_cfg"]["*input_quantizer"]["enable"] = False
  path = save_config(edited, tmp_path / "c.yaml")
  assert load_config(path)["quant_cfg"]["*input_quantizer"] == {"num_bits": 8, "axis": None, "enable": False}


def test_importing_the_configuration_brings_no_yaml_and_no_framework():
  code = "import sys, core.config; print([m for m in ('yaml', 'torch', 'jax', 'flax', 'absl', 'scipy') if m in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
  assert done.stdout.strip() == "[]"
