"""Checking that a change of several layers left the function of the model as it was."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from core.calibrate.host import Host

ROWS = 16
# Relative, in the 2-norm. A model in bfloat16 moves by about 2^-8 with every tensor that is rounded in another place.
TOLERANCE = 0.05


class Witness:
  """Float outputs of layers on the first tokens of the calibration data, before and after a change.

  Args:
    host: the model before the change.
    moved: layers whose output is meant to change.
    enable: False looks at nothing.
  """

  def __init__(self, host: Host, moved: Collection[str] = (), enable: bool = True) -> None:
    self._host = host
    self._moved = set(moved)
    self._before = self._outputs() if enable else {}

  def check(self) -> float:
    """Compare.

    Returns:
      The largest relative difference of a layer's output; 0 where there is nothing to compare.

    Raises:
      ValueError: it is more than `TOLERANCE`; names the first such layer.
    """
    after = self._outputs() if self._before else {}
    worst = 0.0
    for name, y in self._before.items():
      error = float(np.linalg.norm(after[name] - y) / max(np.linalg.norm(y), 1e-30)) if name in after else 0.0
      if not error <= TOLERANCE:
        raise ValueError(
          f"the output of layer {name!r} changed by {error:.3g} of its norm, where the function of the model should stay as it is (up to "
          f"{TOLERANCE:g}): one of the relations does not hold in this model, for example because something else reads the same tensor; "
          "correct relations=[...]. If the forward loop gives its batches in another order every time, set verify to False"
        )
      worst = max(worst, error)
    return worst

  def _outputs(self) -> dict[str, np.ndarray]:
    rows: dict[str, np.ndarray] = {}

    def visit(names: tuple[str, ...], x: np.ndarray) -> None:
      for name in names:
        if name not in rows and name not in self._moved:
          rows[name] = np.array(x[:ROWS], np.float64)

    self._host.observe(visit)
    weights = {name: self._host.parameter(f"{name}.weight") for name in rows if self._host.layer(name).linear}
    return {name: rows[name] @ weight.T for name, weight in weights.items() if weight is not None}
