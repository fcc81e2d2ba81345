"""Host and Block: what a backend lets calibration see of a model. Names are dotted, in torch's spelling; tensors are numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np

from core.calibrate.distill import Student
from core.calibrate.layer import Change, Layer
from core.config.schema import QuantizerConfig
from core.quantize import QuantizedTensor
from core.spec import QuantSpec

Visit = Callable[[tuple[str, ...], np.ndarray], None]
"""Called with the names of the layers that read one tensor, and that tensor as [T, K] float32, or float64 in a float64 model."""
TensorVisit = Callable[[str, np.ndarray], None]
"""Called with the name of an activation quantizer and what it would round: float32 in torch's layout, [T, K] where padding is left out."""

PREPARED = "prepared"  # the input times pre_quant_scale, rotated: what the input quantizer rounds
QUANTIZED = "quantized"  # the same after the input quantizer: what the weight is multiplied with


class Block(Protocol):
  """One of a chain of equal parts of a model, such as a decoder layer: it turns hidden states into hidden states."""

  name: str
  layers: tuple[str, ...]

  def run(self, batch: int, hidden: Any, quantized: Collection[str] = (), visit: Visit | None = None, point: str = PREPARED) -> Any:
    """Run the block on one batch.

    Args:
      batch: number of the calibration batch whose other arguments (masks, positions) are used.
      hidden: [B, T, K], an array of the backend.
      quantized: names of the layers that compute quantized; the others compute in float.
      visit: called with the input of every layer.
      point: PREPARED or QUANTIZED.

    Returns:
      [B, T, K], an array of the backend.
    """
    ...

  def gradient(
    self, batch: int, hidden: Any, target: Any, values: dict[str, np.ndarray], quantized: Collection[str] = ()
  ) -> tuple[float, dict[str, np.ndarray]]:
    """Mean squared error of the block's output and its gradient.

    Args:
      batch: as in `run`.
      hidden: [B, T, K].
      target: [B, T, K], what the output should be.
      values: parameters to put in and to differentiate by: "<layer>.weight" in torch's layout, or the name of another parameter of
        the block such as "input_layernorm.weight", relative to the block.
      quantized: names of the layers whose inputs are quantized (straight through); weights are taken from `values` as they are.

    Returns:
      (loss, gradients by the same names, float32).
    """
    ...

  def parameters(self) -> dict[str, np.ndarray]:
    """The block's parameters that are no quantized weight (norms, biases), by name relative to the block."""
    ...

  def set_parameters(self, values: dict[str, np.ndarray]) -> None:
    """Replace some of `parameters`."""
    ...


class Host(Protocol):
  """A quantized model during one run of calibration."""

  def layers(self) -> list[str]:
    """Names of all layers with an enabled weight or input quantizer, in the model's order."""
    ...

  def layer(self, name: str) -> Layer:
    """What is known of a layer now; no statistics."""
    ...

  def apply(self, name: str, change: Change) -> None:
    """Carry out a change."""
    ...

  def settle(self) -> None:
    """Bring everything that depends on several layers up to date: scales that siblings share, amax of inputs whose scale changed."""
    ...

  def calibrate_missing(self, inputs: bool = True) -> None:
    """Max-calibrate every static quantizer that has no amax; weights alone without `inputs`."""
    ...

  def observe(self, visit: Visit, names: Collection[str] | None = None, point: str = PREPARED) -> None:
    """Run the forward loop in float and show the input of every layer (of those named)."""
    ...

  def observe_tensors(self, visit: TensorVisit, names: Collection[str]) -> None:
    """Run the forward loop in float and show the input of these activation quantizers (names of `activation_configs`)."""
    ...

  def activation_specs(self) -> dict[str, QuantSpec]:
    """Formats of the enabled activation quantizers (the first of a sequence), by name."""
    ...

  def activation_configs(self) -> dict[str, QuantizerConfig]:
    """What the enabled activation quantizers are told (the first of a sequence), by name; those with a constant amax left out.

    Stacked copies of one quantizer come one by one: "model.layers.mlp.up_proj[1].input_quantizer".
    """
    ...

  def activation_amax(self, name: str) -> np.ndarray | None:
    """amax of one of `activation_configs` now; None before calibration."""
    ...

  def set_amax(self, name: str, amax: np.ndarray | float) -> None:
    """Set amax of one activation quantizer, by its name in `activation_configs`."""
    ...

  def blocks(self) -> Sequence[Block]:
    """The model's chain of blocks; empty where there is none."""
    ...

  def block_inputs(self) -> list[Any]:
    """Hidden states that enter the first block, one array per calibration batch."""
    ...

  def student(self) -> Student:
    """The model beside the outputs of its float self (`core.calibrate.distill`).

    Raises:
      ValueError: nothing was recorded.
    """
    ...

  def float_weights(self) -> dict[str, np.ndarray]:
    """The layers' weights before the first algorithm changed them, by name; only where a teacher was recorded."""
    ...

  def weighted(self) -> list[str]:
    """Names of all layers with a weight, whether it is quantized or not, embeddings included, in the model's order."""
    ...

  def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
    """Shapes, in torch's layout, of all parameters of the model by name, such as "model.layers.0.input_layernorm.weight"."""
    ...

  def parameter(self, name: str) -> np.ndarray | None:
    """A copy of a parameter in torch's layout, float64 where the model's is, else float32; None where there is none of that name."""
    ...

  def set_parameter(self, name: str, value: np.ndarray) -> None:
    """Replace a parameter. A layer's weight gets its amax anew, as max finds it; a tensor that was shared becomes one of its own.

    Raises:
      ValueError: there is no such parameter.
    """
    ...

  def norm(self, name: str) -> str:
    """What a normalization does: "rms", "layer" or "other", as `core.calibrate.relations.norm_kind` says."""
    ...

  def is_table(self, name: str) -> bool:
    """Whether a layer is an embedding: [entries, K]."""
    ...

  def head_dim(self) -> int | None:
    """Head size, from the model's config; None where it does not say."""
    ...

  def pre_quant_scale(self, name: str) -> np.ndarray | None:
    """[K] or [] float32 factor on a layer's input, or None."""
    ...

  def clear_pre_quant_scale(self, name: str) -> None:
    """Take a layer's pre_quant_scale away; its input's amax stays."""
    ...

  def low_rank(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(a [r, K], b [N, r]) of a layer's branch beside its weight, or None."""
    ...

  def stored(self, name: str) -> QuantizedTensor | None:
    """Codes and scales of a layer's compressed weight as they are held, in torch's layout, numpy arrays; None where it is not compressed.

    Of a sequence of quantizers these are the codes of the first; the others are applied to what they stand for.
    """
    ...

  def recalibrate(self, names: Collection[str]) -> None:
    """Activation quantizers whose static amax `settle` is to find anew."""
    ...

  def fingerprint(self) -> str:
    """A hash of the model's weights and quantizers, to tell whether files of an interrupted run belong to it."""
    ...
