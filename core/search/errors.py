"""The words of what goes wrong while a model is scored, the same in every backend."""

from __future__ import annotations


def loss_is_not_finite(batch: int, value: float) -> ValueError:
  """The loss of one batch is NaN or infinite."""
  return ValueError(
    f"the loss of scoring batch {batch} is {value}; look for an overflow in the model or in loss_func, or score in float32 or bfloat16"
  )


def loss_is_independent(batch: int) -> ValueError:
  """No layer that is searched has a part in the loss."""
  return ValueError(
    f"the loss of scoring batch {batch} does not depend on the parameters of any layer that is searched, so gradients say nothing; compute "
    "it from what forward_step(model, batch) returns, with the model that is passed in, without detaching it, and outside of no_grad"
  )


def gradient_is_not_finite(batch: int, layer: str, count: int, of: int) -> ValueError:
  """Gradients of a layer's output hold NaN or infinity."""
  return ValueError(
    f"the gradient of the loss with respect to the output of {layer!r} holds {count} NaN or infinite of {of} values in scoring batch "
    f"{batch}; look for an overflow behind this layer, scale the loss down, or score in float32 or bfloat16"
  )


def quantized_output_is_not_finite(batch: int, layer: str, format_name: str) -> ValueError:
  """A layer's quantized output holds NaN or infinity."""
  return ValueError(
    f"the output of {layer!r} in format {format_name!r} holds NaN or infinity in scoring batch {batch}, though the float model's gradient "
    "is finite; look at its calibration (print_quant_summary), or leave the format out for this layer (module_search_spaces)"
  )


def output_is_not_finite(batch: int, what: str) -> ValueError:
  """The model's output holds NaN or infinity."""
  return ValueError(f"the output of {what} holds NaN or infinity in scoring batch {batch}; method 'kl_div' needs finite logits")


def no_logits(kind: str) -> ValueError:
  """The output is nothing that a softmax can be taken of."""
  return ValueError(
    f"method 'kl_div' takes logits [..., V], but forward_step returned {kind}; return a tensor, or a mapping (a transformers output) with "
    "'logits'"
  )


def needs(method: str, what: str) -> ValueError:
  """An argument that a method cannot do without."""
  return ValueError(f"method {method!r} needs {what}; give it, or use method 'sqnr', which needs no data")


def input_changed(layer: str) -> ValueError:
  """What a layer read was overwritten before its gradient came."""
  return ValueError(
    f"the input of {layer!r} is overwritten in place by the model after the layer has read it, so its quantized output cannot be computed "
    "in the backward pass; make that operation out of place, or use method 'kl_div'"
  )
