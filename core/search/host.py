"""SearchHost: what a backend lets the search do with a model. Names are dotted, in torch's spelling; numbers are Python floats (float64).

The driver calls, in this order: `layers`, `fingerprint`; `prepare` once per format; then, batch after batch, one of `gradient_scores`,
`kl_scores` and `hessian_traces`, or once `weight_errors`; last `finish`. Until `finish` the model that the user gave is not changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Choices = Mapping[str, Sequence[str]]
"""Layer name -> names of the formats that are to be scored there (never the unquantized one, whose score is 0)."""
Scores = dict[str, dict[str, float]]
"""Layer (or group) name -> format name -> score. Not negative; smaller is better."""


@dataclasses.dataclass(frozen=True)
class SearchLayer:
  """A layer with a weight that rules of a configuration can quantize.

  Attributes:
    name: dotted path of its module, in torch's spelling: "model.layers.0.self_attn.q_proj". Stacked copies (nn.scan) are one layer,
      without an index, since they have one quantizer and therefore one format.
    shape: of one copy's weight in torch's layout ([N, K], OIHW).
    quantizers: names of its quantizers below it: ("input_quantizer", "weight_quantizer", "output_quantizer").
    classes: names of the classes that its module is an instance of, as rules with `parent_class` match them ("nn.Linear").
    copies: number of stacked copies.
  """

  name: str
  shape: tuple[int, ...]
  quantizers: tuple[str, ...]
  classes: tuple[str, ...] = ()
  copies: int = 1


class SearchHost(Protocol):
  """A float model during a search, with one quantized twin per format once `prepare` has run.

  In a twin every layer of the format is calibrated on the float model's data, all of them together, exactly as `quantize(config)` would.
  The float model runs in evaluation mode and is never quantized itself; layers are scored one at a time, all others in float.
  """

  backend: str

  def layers(self) -> list[SearchLayer]:
    """All layers with a weight (embeddings included), in the model's order, whether or not a format will quantize them."""
    ...

  def fingerprint(self) -> str:
    """A hash of the names, shapes and values of all parameters: tells whether a file of an interrupted search belongs to this model."""
    ...

  def prepare(self, name: str, config: Mapping[str, Any], report: list[dict[str, Any]]) -> None:
    """Make and calibrate the quantized twin of one format.

    Args:
      name: the format, as in `Choices`.
      config: an ordinary configuration in list form that quantizes exactly the layers that may get this format; run it through the
        backend's own `quantize` with the calibration batches and the user's `group_rules`.
      report: `quantize`'s report.
    """
    ...

  def gradient_scores(self, number: int, batch: Any, choices: Choices, by_position: bool = False) -> Scores:
    """sum over the elements of a layer's output Y, over all its calls, of (g (Q(Y) - Y))^2, with g = dLoss/dY of the float model.

    Q(Y) is what the format's twin of this one layer returns for the float model's input X: inputs, weight and output quantized as the
    format says, with pre_quant_scale, low-rank branch and changed weights of its algorithm. One forward and one backward pass per batch
    serve all layers and formats. Products are float32, their squares are summed in float64.

    Args:
      number: of the batch, from 0, for messages.
      batch: one batch of the user's data_loader.
      choices: what to score.
      by_position: sum g (Q(Y) - Y) over the outputs of a position (the last axis; a convolution's channels) before it is squared: the
        first-order change of the loss through that position. Errors that outputs share, those of a quantized input, then count as one.

    Returns:
      A score for every layer and format of `choices`; 0 for layers that the loss does not depend on.

    Raises:
      ValueError: the loss is not finite, does not depend on the model's layers at all, or a gradient or a quantized output is not finite
        (names the layer); the words are in `core.search.errors`.
    """
    ...

  def kl_scores(self, number: int, batch: Any, choices: Choices, groups: Mapping[str, Sequence[str]]) -> Scores:
    """KL(p || q) of the output distributions over the whole vocabulary, summed over all positions, forward only.

    p is the float model's softmax, q that of the model with the layers of one group in one format and everything else in float.

    Args:
      number: of the batch, from 0, for messages.
      batch: one batch of the user's data_loader.
      choices: what to score, by layer.
      groups: group name -> its layers. A layer without the format in its `choices` stays in float.

    Returns:
      Group name -> every format that any of its layers may have -> sum of KL in nats, float64.

    Raises:
      ValueError: the output holds NaN or infinity (`errors.output_is_not_finite`).
    """
    ...

  def hessian_traces(self, number: int, batch: Any, layers: Sequence[str], probes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Hutchinson's estimate of the trace of the loss's Hessian with respect to each layer's weight.

    Args:
      number: of the batch, from 0, for messages.
      batch: one batch of the user's data_loader.
      layers: layer names.
      probes: each layer name -> a zero-argument function that returns the layer's vector v of +-1, float32, in torch's layout
        ([copies, *shape] where there are copies). The vectors of all layers of one probe make one Hessian-vector product.

    Returns:
      Layer name -> mean over the probes of v . (H v), float64; v . (H v) is the layer's own part of the product.

    Raises:
      ValueError: as `gradient_scores`.
    """
    ...

  def weight_errors(self, choices: Choices) -> dict[str, dict[str, tuple[float, float]]]:
    """Layer -> format -> (sum of w^2, sum of (Q(w) - w)^2) in float64, over all copies.

    w is the weight that the float model has. Q(w) is the weight the layer then acts with on the float model's input: the twin's quantized
    weight times its pre_quant_scale per input channel, plus its low-rank product b a. Data are not needed.
    """
    ...

  def finish(self, config: Mapping[str, Any], report: list[dict[str, Any]]) -> None:
    """Quantize the user's model by the chosen configuration: plain `quantize` with the calibration batches and `group_rules`."""
    ...
