"""auto_quantize: the best format for every layer under a budget."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from core import compression
from core.search import DEFAULT_FORMATS
from jax_backend import tree
from jax_backend.apply import QuantModule
from jax_backend.convert import check_module


def auto_quantize(
  module: nn.Module,
  variables: Mapping[str, Any],
  constraints: Mapping[str, Any] | None = None,
  quantization_formats: Any = DEFAULT_FORMATS,
  data_loader: Iterable[Any] | None = None,
  forward_step: Callable[[Any, Any], Any] | None = None,
  loss_func: Callable[[Any, Any], Any] | None = None,
  forward_backward_step: Callable[[Any, Any], Any] | None = None,
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
) -> tuple[tuple[QuantModule, dict[str, Any]], dict[str, Any]]:
  """Find the best format for every layer under a budget, and quantize by it. Nothing that is given is changed.

  >>> (qmodule, qvariables), state = auto_quantize(
  ...   module, variables, {"effective_bits": 4.8}, ["NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"], data_loader=batches,
  ...   forward_step=lambda model, batch: model(batch["input_ids"]), loss_func=lambda logits, batch: cross_entropy(logits, batch["labels"]))

  Layers are scored one at a time, everything else in float. The functions run as they are written, in JAX, and may look at the values of a
  batch; only the calls of the model inside them are compiled.

  Args:
    module: any linen module, unmodified; nn.scan, nn.vmap, nn.remat and nn.jit inside it are understood. Layers that a scan stacks have one
      format.
    variables: its variables, {"params": ..., ...}. Quantizers of an earlier call are dropped.
    constraints: {"effective_bits": bits per weight}, {"weight_bytes": bytes}, a table of `costs` by its name, or several of them; None is
      {"effective_bits": 4.8}. ModelOpt's "cost_model": "active_moe" with "cost" {"active_moe_expert_ratio",
      "excluded_module_name_patterns"} counts experts by the share that a token meets.
    quantization_formats: preset names, configurations, and None for the choice to leave a layer unquantized; or a mapping from names of
      your own to these. Each keeps its calibration algorithm.
    data_loader: batches; it is gone through once per format and once for the scores.
    forward_step: (model, batch) -> output. `model` is called as the module is, without variables, as in a forward_loop; gradients go
      through it. None calls the model with the batch.
    loss_func: (output, batch) -> scalar loss of jax.numpy, for "gradient", "fisher" and "hessian".
    forward_backward_step: in place of loss_func: (model, batch) -> scalar loss. JAX differentiates what it returns; there is no backward
      pass to run in it.
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
    ((qmodule, qvariables), search_state). search_state is plain data, the same as in PyTorch: scores, bits, assignment, groups and all that
    `get_auto_quantize_config` needs.

  Raises:
    ValueError: a budget that cannot be reached (before any calibration; names the least possible), a format that quantizes nothing, a
      checkpoint of another search, or a loss that is no scalar, is not finite, does not depend on the layers, or has gradients that are
      not finite.
    TypeError: module is no linen module, a function is none, or data_loader can be gone through only once.

  References: nvidia-modelopt 0.47, auto_quantize; Dong et al., 2019, arXiv:1911.03852 (HAWQ-V2) for "hessian".
  """
  # Imported where used: `import jax_backend` stays light.
  from core.search import driver
  from core.search.driver import Request
  from jax_backend.search_host import JaxSearchHost
  from jax_backend.search_scores import Step

  check_module(module, variables)
  compression.refuse_compressed(tree.compressed_layers(variables.get("quant", {})), "auto_quantize")
  driver.check_data(data_loader, {"num_calib_steps": num_calib_steps, "num_score_steps": num_score_steps, "num_probes": num_probes}, method)
  functions = {"forward_step": forward_step, "loss_func": loss_func, "forward_backward_step": forward_backward_step}
  driver.check_functions(method, twice=True, **functions)
  step = Step(driver.default_forward_step if forward_step is None else forward_step, loss_func, forward_backward_step)
  batches = None if data_loader is None else functools.partial(driver.limited, data_loader, num_calib_steps)
  host = JaxSearchHost(module, variables, batches, step, group_rules)
  state = driver.search(
    host,
    Request(
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
    ),
  )
  assert host.result is not None
  return host.result, state
