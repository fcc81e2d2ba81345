"""Quantizers whose `calibrator` is "histogram": amax from a histogram on the host (`core.calibrate.calibrators`).

Maxima are gathered inside the jitted step; histograms are not. So where a quantizer asks for one, the forward loop runs once more, after
max calibration, and must give the same data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from core.calibrate import calibrators
from core.calibrate.histogram import Histogram
from core.config import ConfigWarning
from jax_backend import taps, tree
from jax_backend.quantizer import QUANTIZE, AnyQuantizer, Quantizer
from jax_backend.tree import Path
from jax_backend.watch import Watch

Key = tuple[Path, str]


def of_weight(quantizer: Quantizer, weight: Any, name: str) -> Any:
  """amax of a weight per tensor, one for each stacked copy.

  Args:
    quantizer: its calibrator is "histogram".
    weight: stored weight, stacked axes in front.
    name: for messages.

  Returns:
    [stacked axes] float32.
  """
  found = np.zeros(weight.shape[: len(quantizer.stack)], np.float32)
  for index in np.ndindex(found.shape):
    held = calibrators.histogram(quantizer.config)
    held.add(np.asarray(quantizer.prepare(weight[index]), np.float32))
    found[index] = calibrators.amax(held, quantizer.config, name)
  return jnp.asarray(found)


def calibrated(
  qmodule: Any, qvariables: Mapping[str, Any], forward_loop: Callable[[Any], Any], chosen: Collection[Key] | None = None
) -> dict[str, Any]:
  """The quantizer tree with the amax of histograms where activation quantizers ask for it; as it is where none does.

  Args:
    qmodule: the model.
    qvariables: its variables after max calibration.
    forward_loop: runs it on the calibration data once more, in float.
    chosen: quantizers that were calibrated; None for all.

  Raises:
    ValueError: a format that one histogram cannot serve.
  """
  held = {(path, name): q for path, name, q in tree.items(qvariables["quant"])}
  keys = [k for k, q in held.items() if q.param is None and (chosen is None or k in chosen) and any(map(_wants, q.leaves))]
  if not keys:
    return dict(qvariables["quant"])
  counts: dict[tuple[Key, int, tuple[int, ...]], Histogram] = {}

  def seen(members: Sequence[Key], x: np.ndarray, mask: Any) -> None:
    for key in members:
      for index in np.ndindex(x.shape[: len(held[key].leaves[0].stack)]):
        for place, value in _inputs(held[key], x[index]):
          if (key, place, index) not in counts:
            counts[key, place, index] = calibrators.histogram(held[key].leaves[place].config)
          counts[key, place, index].add(value)

  forward_loop(Watch(qmodule, qvariables, keys, taps.UNROUNDED, seen, False))
  if not counts:
    warnings.warn(
      "the second run of forward_loop, for quantizers with calibrator 'histogram', gave no data, so they keep max calibration; a "
      "forward_loop must run the model on the same data each time it is called",
      ConfigWarning,
      stacklevel=5,
    )
  done = {key: _with_amax(quantizer, key, counts) for key, quantizer in held.items()}
  return tree.build(done)


def _wants(quantizer: Quantizer) -> bool:
  return quantizer.needs_calibration and quantizer.config.calibrator == "histogram" and quantizer.amax is not None


def _inputs(quantizer: AnyQuantizer, x: Any) -> list[tuple[int, np.ndarray]]:
  """(place, what it sees) of the quantizers of a sequence that want histograms: each sees what the one before makes of this batch."""
  found = []
  for place, leaf in enumerate(quantizer.leaves):
    if _wants(leaf):
      found.append((place, np.asarray(x, np.float32)))
    if place + 1 < len(quantizer.leaves) and leaf.is_enabled:
      plain = leaf.replace(mode=QUANTIZE, stack=(), bias=None, pre_quant_scale=None, config=leaf.config.replace(rotate=None))
      x = plain.with_amax(leaf.config.constant_amax)(jnp.asarray(x))
  return found


def _with_amax(quantizer: AnyQuantizer, key: Key, counts: Mapping[tuple[Key, int, tuple[int, ...]], Histogram]) -> AnyQuantizer:
  places = iter(range(len(quantizer.leaves)))

  def one(leaf: Quantizer) -> Quantizer:
    place = next(places)
    found = {index: hist for (k, p, index), hist in counts.items() if k == key and p == place and hist.amax is not None}
    if not found:
      return leaf
    amax = np.array(leaf.amax, np.float32)
    for index, hist in found.items():
      amax[index] = calibrators.amax(hist, leaf.config, tree.full_name(*key))
    return leaf.with_amax(amax)

  return quantizer.map(one)
