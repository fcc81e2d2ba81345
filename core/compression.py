"""What both backends say about compressed weights: which layers are chosen, what each one takes, and the words of refusals."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from core.config import ConfigWarning, matches_name
from core.spec import QuantSpec

COLUMNS = ("layer", "format", "shape", "bytes", "bits per weight", "as float")


@dataclasses.dataclass(frozen=True)
class WeightSize:
  """What one weight takes in memory.

  Attributes:
    name: of the layer.
    format: of its weight; "" where it is held as floats.
    shape: in torch's layout, [out, in, ...].
    nbytes: bytes of codes and scales, or of the float weight.
    float_bytes: bytes of the weight as floats.
    compressed: whether it is held as codes.
  """

  name: str
  format: str
  shape: tuple[int, ...]
  nbytes: int
  float_bytes: int
  compressed: bool

  @property
  def numel(self) -> int:
    return math.prod(self.shape)

  @property
  def bits(self) -> float:
    """Bits per weight, scales included."""
    return 8 * self.nbytes / self.numel if self.numel else 0.0


@dataclasses.dataclass(frozen=True)
class CompressionReport:
  """What a model takes in memory.

  Attributes:
    weights: one entry per layer with a quantizable weight; a tensor that several layers share counts with the first.
    other_bytes: bytes of all other parameters and quantizer state.
  """

  weights: tuple[WeightSize, ...]
  other_bytes: int

  @property
  def compressed(self) -> tuple[WeightSize, ...]:
    return tuple(w for w in self.weights if w.compressed)

  @property
  def bits_per_weight(self) -> float:
    """Bits per compressed weight, scales included; NaN where nothing is compressed."""
    count = sum(w.numel for w in self.compressed)
    return 8 * sum(w.nbytes for w in self.compressed) / count if count else math.nan

  @property
  def total_bytes(self) -> int:
    return sum(w.nbytes for w in self.weights) + self.other_bytes

  @property
  def float_bytes(self) -> int:
    """Bytes of the model with every weight held as floats."""
    return sum(w.float_bytes for w in self.weights) + self.other_bytes

  def summary(self) -> str:
    held = self.compressed
    if not held:
      return f"no weight is compressed; the model takes {self.total_bytes:,} bytes"
    count = sum(w.numel for w in held)
    return (
      f"{len(held)} of {len(self.weights)} weights compressed: {count:,} values in {sum(w.nbytes for w in held):,} bytes, "
      f"{self.bits_per_weight:.4f} bits per weight; the model takes {self.total_bytes:,} bytes, {self.float_bytes:,} as floats"
    )

  def print(self) -> None:
    """Print one line per weight and the totals: a table on a terminal, plain columns otherwise."""
    import sys

    rows = [_cells(w) for w in self.weights]
    if sys.stdout.isatty():
      _print_table(rows)
    else:
      lines = [COLUMNS, *rows]
      widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
      for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(self.summary())


def _cells(w: WeightSize) -> tuple[str, ...]:
  return w.name, w.format or "float", str(list(w.shape)), f"{w.nbytes:,}", f"{w.bits:.3f}", f"{w.float_bytes:,}"


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text

  table = Table()
  for column in COLUMNS:
    table.add_column(column, overflow="fold", justify="left" if column in COLUMNS[:3] else "right")
  for row in rows:
    table.add_row(*(Text(cell) for cell in row))
  Console().print(table)


def selected(include: str | Iterable[str] | None, names: Sequence[str]) -> list[str]:
  """The layers that patterns name.

  Args:
    include: a pattern or several, matched against "model.layers.0.mlp.up_proj" and "model.layers.0.mlp.up_proj.weight_quantizer";
      None chooses every layer.
    names: of the layers.

  Raises:
    TypeError: include is neither.
    ValueError: a pattern that matches no layer.
  """
  if include is None:
    return list(names)
  patterns = (include,) if isinstance(include, str) else tuple(include)
  if not all(isinstance(pattern, str) for pattern in patterns):
    raise TypeError(f"include is a pattern such as '*mlp*' or a list of them, got {include!r}")
  found = {
    pattern: [n for n in names if matches_name(pattern, n) or matches_name(pattern, f"{n}.weight_quantizer")] for pattern in patterns
  }
  empty = [pattern for pattern, matched in found.items() if not matched]
  if empty or not patterns:
    raise ValueError(f"include: {', '.join(map(repr, empty)) or 'an empty list'} matches none of the layers {_some(names)}")
  chosen = {name for matched in found.values() for name in matched}
  return [name for name in names if name in chosen]


def refusal(specs: Sequence[QuantSpec]) -> str | None:
  """Why a weight of these formats, one after the other, cannot be held as codes; None where it can."""
  if any(spec.rounding == "stochastic" for spec in specs):
    return "it is rounded stochastically, anew in every call"
  if specs[0].element.bits > 8:
    return f"codes of {specs[0].element.name} have {specs[0].element.bits} bits, and 8 are the most that can be packed"
  return None


NOT_EQUAL = "its codes do not stand for what the simulation computes (NaN or infinity in the weight)"


def report_refusals(refused: Mapping[str, str], done: int, stacklevel: int = 3) -> None:
  """Warn about layers that stay as they are; raise where nothing at all was compressed.

  Args:
    refused: layer -> reason.
    done: number of layers that were compressed.
    stacklevel: of the warning.

  Raises:
    ValueError: done is 0.
  """
  listed = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:20])
  listed += f" and {len(refused) - 20} more" if len(refused) > 20 else ""
  if not done:
    raise ValueError(f"nothing was compressed. {listed or 'No chosen layer has an enabled weight quantizer.'}")
  if refused:
    warnings.warn(f"weights that stay simulated, not compressed: {listed}", ConfigWarning, stacklevel=stacklevel)


def refuse_compressed(names: Iterable[str], what: str) -> None:
  """Raises:
  ValueError: there are compressed weights; they have no float values that `what` could start from.
  """
  names = list(names)
  if names:
    raise ValueError(
      f"{what} needs float weights, but {len(names)} are compressed ({_some(names)}); call decompress first, which puts the values in "
      "their place that the codes stand for"
    )


def _some(names: Sequence[Any]) -> str:
  return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
