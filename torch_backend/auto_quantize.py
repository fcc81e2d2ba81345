"""auto_quantize: the best format for every layer of a torch model under a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from core import compression
from core.search import DEFAULT_FORMATS
from torch_backend.names import compressed_layers

ForwardStep = Callable[[nn.Module, Any], Any]


def auto_quantize(
  model: nn.Module,
  constraints: Mapping[str, Any] | None = None,
  quantization_formats: Any = DEFAULT_FORMATS,
  data_loader: Iterable[Any] | None = None,
  forward_step: ForwardStep | None = None,
  loss_func: Callable[[Any, Any], Tensor] | None = None,
  forward_backward_step: Callable[[nn.Module, Any], Any] | None = None,
  disabled_layers: str | Sequence[str] | None = None,
  num_calib_steps: int = 512,
  num_score_steps: int = 128,
  verbose: bool = False,
  method: str = "gradient",
  module_search_spaces: Mapping[str, Sequence[Any]] | None = None,
  checkpoint: Any = None,
  *,
  groups: Iterable[str] | None = None,
  group_rules: Iterable[str] | None = None,
  costs: Mapping[str, Any] | None = None,
  accounting: str = "stored",
  unquantized_bits: int = 16,
  num_probes: int = 1,
  seed: int = 0,
  report: list[dict[str, Any]] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
  """Find the best format for every layer under a budget, and quantize the model so, in place.

  >>> model, state = auto_quantize(
  ...   model, {"effective_bits": 4.8}, ["NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"], data_loader=batches,
  ...   forward_step=lambda model, batch: model(**batch), loss_func=lambda output, batch: output.loss)

  Layers are scored one at a time, everything else in float; the model that is passed to `forward_step` is a copy in evaluation mode that
  shares the parameters' memory. If anything raises, the model is as it was.

  Args:
    model: a float model.
    constraints: {"effective_bits": bits per weight}, {"weight_bytes": bytes}, a table of `costs` by its name, or several of them; None is
      {"effective_bits": 4.8}. ModelOpt's "cost_model": "active_moe" with "cost" {"active_moe_expert_ratio",
      "excluded_module_name_patterns"} counts experts by the share that a token meets.
    quantization_formats: preset names, configurations, and None for the choice to leave a layer unquantized; or a mapping from names of
      your own to these. Each keeps its calibration algorithm.
    data_loader: batches; it is gone through once per format and once for the scores.
    forward_step: (model, batch) -> output; None calls the model with the batch.
    loss_func: (output, batch) -> scalar loss, for "gradient", "fisher" and "hessian".
    forward_backward_step: (model, batch), runs the loss backward itself, in place of loss_func, for "gradient" and "fisher".
    disabled_layers: patterns of layers that stay unquantized, with all layers that would share their format.
    num_calib_steps: batches that calibrate each format.
    num_score_steps: batches that score.
    verbose: print the summary.
    method: "gradient" (squared gradient times squared output error), "fisher" (the same summed over a position's outputs before it is
      squared: the empirical Fisher information, with what errors of outputs have in common), "kl_div" (KL of the outputs, forward only),
      "hessian" (trace of the loss's Hessian times squared weight error) or "sqnr" (weights alone, no data).
    module_search_spaces: pattern of layer names -> formats that these may have; the last pattern that matches counts.
    checkpoint: a file for the scores, so that an interrupted search goes on, and another budget needs no scoring.
    groups: rules of layers that share a format, such as "q_proj|k_proj|v_proj"; None is `core.search.groups.SEARCH_GROUPS`, () none.
    group_rules: siblings that share tensor-level scales, as in `quantize`.
    costs: tables of your own, name -> pattern of layers -> format ("none" for unquantized) -> cost of one layer.
    accounting: "stored" counts what is stored, scales included; "modelopt" as the peer does.
    unquantized_bits: bits of a weight that stays unquantized, 16 or 32.
    num_probes: random vectors per batch, for "hessian".
    seed: of these.
    report: a list that gets one dict per layer and algorithm from calibration.

  Returns:
    (model, search_state). search_state is plain data: scores, bits, assignment, groups and all that `get_auto_quantize_config` needs.

  Raises:
    ValueError: a budget that cannot be reached (before any calibration; names the least possible), a format that quantizes nothing, a
      checkpoint of another search, or a loss that is not finite, does not depend on the layers, or has gradients that are not finite.
    TypeError: model is no nn.Module, or data_loader can be gone through only once.

  References: nvidia-modelopt 0.47, auto_quantize; Dong et al., 2019, arXiv:1911.03852 (HAWQ-V2) for "hessian".
  """
  # Imported where used: `import torch_backend` stays light.
  from core.search import driver
  from core.search.driver import Request, check_data
  from torch_backend.search_host import TorchSearchHost

  if not isinstance(model, nn.Module):
    raise TypeError(f"auto_quantize takes an nn.Module, got {type(model).__name__}")
  compression.refuse_compressed(compressed_layers(model), "auto_quantize")
  check_data(data_loader, {"num_calib_steps": num_calib_steps, "num_score_steps": num_score_steps, "num_probes": num_probes}, method)
  functions = {"forward_step": forward_step, "loss_func": loss_func, "forward_backward_step": forward_backward_step}
  driver.check_functions(method, twice=False, **functions)
  step = driver.default_forward_step if forward_step is None else forward_step
  host = TorchSearchHost(model, data_loader, num_calib_steps, step, loss_func, forward_backward_step, group_rules)
  request = Request(
    constraints={"effective_bits": 4.8} if constraints is None else constraints,
    quantization_formats=quantization_formats,
    data_loader=data_loader,
    disabled_layers=disabled_layers,
    module_search_spaces=module_search_spaces,
    groups=groups,
    costs=costs,
    accounting=accounting,
    unquantized_bits=unquantized_bits,
    method=method,
    num_score_steps=num_score_steps,
    num_probes=num_probes,
    seed=seed,
    checkpoint=checkpoint,
    verbose=verbose,
    report=report,
  )
  return model, driver.search(host, request)
