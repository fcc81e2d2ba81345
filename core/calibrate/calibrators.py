"""The quantizer attribute `calibrator`: amax of one quantizer from a histogram of what it sees, in place of the largest magnitude.

It holds wherever a backend calibrates by max, for activations and for weights, and so under every algorithm; one that chooses amax itself
has the last word.

ModelOpt has the attribute, and raises TypeError when it is used. Its `compute_amax` has no default method; ours is "entropy".
"""

from __future__ import annotations

from core.calibrate.histogram import NUM_BINS, Histogram, amax_of
from core.config.options import HISTOGRAM_METHODS
from core.config.schema import QuantizerConfig


def histogram(config: QuantizerConfig) -> Histogram:
  """An empty histogram with the bins that the configuration asks for."""
  options = config.calibrator_options
  return Histogram(options.get("num_bins", NUM_BINS), options.get("skip_zeros", False))


def amax(held: Histogram, config: QuantizerConfig, name: str) -> float:
  """amax by the configuration's method.

  Args:
    held: filled histogram.
    config: calibrator "histogram".
    name: the quantizer's, for messages.

  Returns:
    amax, representable in float32.

  Raises:
    ValueError: a format that one histogram cannot serve, or an empty histogram; names the quantizer.
  """
  method = config.calibrator_options.get("method", HISTOGRAM_METHODS[0])
  options = {key: value for key, value in config.calibrator_options.items() if key == "percentile"}
  try:
    return amax_of(held, config.spec, method, **options)
  except ValueError as error:
    raise ValueError(f"quantizer {name!r}: {error}") from error
