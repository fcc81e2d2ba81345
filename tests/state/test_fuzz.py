"""A thousand damaged states: each is refused by a clear error, with the model left alone, or does no harm."""

from __future__ import annotations

import collections
import hashlib
import json
import random
import resource
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

import jax_backend as jb
import torch_backend as tb
from core import state as files
from core.state import document
from tests.state import nets
from tests.state.test_files import GOLDEN, FlaxNet, Net
from torch_backend.state import state_of

COUNT = 1000
ODD: tuple[Any, ...] = (
  None, True, -1, 0, 1, 3, 2**31, 2**63, 2**200, 1e308, "", "x", "F32", "F8_E4M3", "BF16", "../../etc/passwd", "/dev/zero", "..\\x", "\x00",
  [], [[]], [2**40, 2**40], [0, 2**63], {}, {"a": 1}, [1] * 50,
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, bytes]:
  """A state with a sequence of quantizers, low-rank factors and a compressed weight."""
  folder = tmp_path_factory.mktemp("saved")
  net = tb.restore(Net(), GOLDEN)
  tb.compress(net, "down")
  tb.save(net, folder)
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def _flipped(data: bytes, rng: random.Random, low: int = 0, high: int | None = None) -> bytes:
  changed = bytearray(data)
  for _ in range(rng.choice((1, 1, 1, 2, 8))):
    changed[rng.randrange(low, min(len(data), high or len(data)))] ^= 1 << rng.randrange(8)
  return bytes(changed)


def damaged(saved: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
  """As disks, networks and editors do it: nobody has made the hashes fit."""
  held = dict(saved)
  name = rng.choice(sorted(held))
  data = held[name]
  at = rng.randrange(len(data))
  kind = rng.choice(("flip", "header", "cut", "longer", "zeros", "twice", "gone", "word", "length"))
  if kind == "gone":
    del held[name]
  elif kind == "length":
    held[name] = rng.choice((2**63, 2**40, len(data), 0)).to_bytes(8, "little") + data[8:]
  elif kind == "word":
    words = data.split(b'"')
    words[rng.randrange(len(words))] = rng.choice((b"quantize", b"off", b"folded", b"../x", b"amax", b"\xff\xfe", b"1e999"))
    held[name] = b'"'.join(words)
  else:
    held[name] = {
      "flip": lambda: _flipped(data, rng),
      "header": lambda: _flipped(data, rng, 0, 900),
      "cut": lambda: data[:at],
      "longer": lambda: data + rng.randbytes(rng.choice((1, 8, 4096))),
      "zeros": lambda: data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :],
      "twice": lambda: data[:at] + data[at : at + 100] + data[at:],
    }[kind]()
  return held


def forged(saved: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
  """By somebody who makes the hashes fit again: dtypes, shapes, sizes, offsets, names, paths, attributes."""
  (name,) = (n for n in saved if n.endswith(".safetensors"))
  data, held = saved[name], json.loads(saved[files.DOCUMENT])
  if rng.random() < 0.5:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    _mutate(header, rng)
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    if rng.random() < 0.1:
      data = _flipped(data, rng, 0, 8)
  else:
    for _ in range(rng.choice((1, 1, 2))):
      _mutate(held, rng)
  sha = hashlib.sha256(data).hexdigest()
  new = f"quant_state-{sha[:16]}.safetensors"
  if isinstance(held.get("files"), dict) and name in held["files"]:
    del held["files"][name]
    held["files"][new] = {"sha256": sha, "bytes": len(data)}
  held["sha256"] = document.digest(held)
  return {new: data, files.DOCUMENT: json.dumps(held).encode()}


def _mutate(node: Any, rng: random.Random) -> None:
  """Change one thing somewhere in a JSON value."""
  while True:
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
      return
    key = rng.choice(keys)
    if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.9:
      node = node[key]
      continue
    kind = rng.choice(("replace", "replace", "remove", "rename", "number"))
    if kind == "remove":
      del node[key]
    elif kind == "rename" and isinstance(node, dict):
      node[rng.choice(("x", "weight", "../y", str(key) + "\u0000"))] = node.pop(key)
    elif kind == "number" and isinstance(node[key], int):
      node[key] = node[key] + rng.choice((-1, 1, 2**33))
    else:
      node[key] = rng.choice(ODD)
    return


def _write(folder: Path, held: dict[str, bytes]) -> None:
  for path in folder.iterdir():
    path.unlink()
  for name, data in held.items():
    (folder / name).write_bytes(data)


def _picture(net: torch.nn.Module) -> list[Any]:
  return [(n, type(m)) for n, m in net.named_modules()] + [(n, id(p), p.sum().item()) for n, p in net.named_parameters()]


def test_a_thousand_mutations(saved, tmp_path, record_property):
  _write(tmp_path, saved)
  original = state_of(tb.restore(Net(), tmp_path))
  net = Net()
  picture = _picture(net)
  rng = random.Random(7)
  memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  seen: collections.Counter[str] = collections.Counter()
  for i in range(COUNT):
    is_forged = i % 2 == 1
    _write(tmp_path, (forged if is_forged else damaged)(saved, rng))
    try:
      tb.restore(net, tmp_path)
    except (ValueError, OSError) as error:
      assert str(error).strip() and _picture(net) == picture, i
      seen["refused"] += 1
      continue
    if not is_forged:
      nets.assert_same_state(original, state_of(net))  # white space, or a file that nobody needs
    seen["forged and valid" if is_forged else "harmless"] += 1
    net = Net()
    picture = _picture(net)
  assert seen["refused"] > 0.9 * COUNT, seen
  # Sizes that a header claims are compared with the file before anything is allocated. KiB; the states have 10.
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000
  record_property("outcomes", dict(seen))
  print(dict(seen))


def test_mutations_in_jax(saved, tmp_path):
  variables = FlaxNet().init(jax.random.key(0), jnp.ones((1, 32)))
  rng = random.Random(8)
  refused = 0
  for _ in range(60):
    _write(tmp_path, forged(saved, rng))
    try:
      jb.restore(FlaxNet(), variables, tmp_path)
    except (ValueError, OSError) as error:
      refused += bool(str(error).strip())
  assert refused > 45
