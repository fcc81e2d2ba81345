"""quantize: find a module's layers, make their quantizers by the rules, calibrate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn

from core import compression
from core.config import rules
from core.state import as_given
from jax_backend import discover, edit, groups, tree
from jax_backend.apply import QuantModule
from jax_backend.calibrate import ForwardLoop, run
from jax_backend.discover import Found


def quantize(
  module: nn.Module,
  variables: Mapping[str, Any],
  config: Mapping[str, Any],
  forward_loop: ForwardLoop | None = None,
  *,
  example_inputs: Any = None,
  group_rules: Iterable[str] | None = None,
  report: list[dict[str, Any]] | None = None,
) -> tuple[QuantModule, dict[str, Any]]:
  """Quantize a linen module: find its layers, apply the rules, calibrate. Nothing that is given is changed.

  >>> qmodule, qvariables = quantize(module, variables, INT8_DEFAULT_CFG, lambda model: [model(batch) for batch in data])
  >>> y = qmodule.apply(qvariables, x)

  Args:
    module: any linen module, unmodified.
    variables: its variables, {"params": ..., ...}. Quantizers of an earlier call are dropped.
    config: {"quant_cfg": ..., "algorithm": ...}, for example `INT8_DEFAULT_CFG`; axes are those of the torch layout ([out, in], OIHW).
    forward_loop: called once with a runner; runs it on calibration data, as `model(batch)`. Static activation quantizers need it; without
      data they warn and take amax from each input.
    example_inputs: arguments of one call (a tuple, a dict of keyword arguments, or one array; jax.ShapeDtypeStruct will do), so that the
      layers are found without a forward_loop. With neither, inputs are guessed from the parameters.
    group_rules: siblings that share tensor-level scales, for example ["q_proj|k_proj|v_proj"]; None is the default list, () turns it off.
    report: a list that gets one dict per layer and algorithm: what was chosen, error before and after (`print_calibration_report`).

  Returns:
    (qmodule, qvariables): a frozen module without arrays, and {"params": as given, "quant": quantizers, other collections}.

  Raises:
    ValueError: the configuration is wrong or quantizes nothing, the calibration data hold NaN or infinity, or the layers cannot be found.
    TypeError: module is no linen module, variables no mapping, or forward_loop no function.
  """
  check_module(module, variables)
  compression.refuse_compressed(tree.compressed_layers(variables.get("quant", {})), "quantize")
  plan = rules.normalize(config)
  group_rules = group_rules if group_rules is None or isinstance(group_rules, str) else tuple(group_rules)
  plain = {name: value for name, value in variables.items() if name != "quant"}
  qmodule = QuantModule(module, as_given(config))
  checked = False

  def create(found: list[Found]) -> dict[str, Any]:
    nonlocal checked
    made = edit.create(found, plan.entries)
    if not checked:
      names = [(".".join((*path, name)), q.leaves[0].parent_classes) for (path, name), q in made.items()]
      rules.check_effect(plan.entries, names, stacklevel=3)
      checked = True
    return groups.assign(tree.build(made), group_rules)

  if example_inputs is None and forward_loop is not None:
    return qmodule, run(qmodule, plain, plan.algorithm, forward_loop, report, create)
  args, kwargs = example(example_inputs) if example_inputs is not None else (discover.guess_inputs(module, plain), {})
  found = discover.trace(module, plain, args, kwargs, rngs=None, method=None, mutable=False)
  return qmodule, run(qmodule, {**plain, "quant": create(found)}, plan.algorithm, forward_loop, report)


def check_module(module: Any, variables: Any) -> None:
  if not isinstance(module, nn.Module):
    raise TypeError(f"quantize takes a flax.linen.Module, got {type(module).__name__}")
  if not isinstance(variables, Mapping):
    raise TypeError(f"variables must be a mapping such as module.init(...) returns, got {type(variables).__name__}")
  if "params" not in variables:
    raise ValueError(
      f"variables has no 'params' (collections: {', '.join(variables) or 'none'}); pass what module.init returned, not its params"
    )


def example(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
  if isinstance(inputs, Mapping):
    return (), dict(inputs)
  return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}
