"""The course of a search, the same in every backend: check, calibrate each format, score batch by batch, solve, quantize."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from core.calibrate.progress import progress
from core.config import ConfigWarning
from core.config.frozen import check_choice
from core.search import DEFAULT_FORMATS, configs, errors, report, scores, spaces
from core.search.costs import Counting, read_cost_model
from core.search.host import SearchHost
from core.search.plan import Plan, make_plan
from core.search.resume import ScoreFile
from core.search.scores import BY_GRADIENT, METHODS, TRACE
from core.search.state import State, config_of, make_state


@dataclasses.dataclass(frozen=True)
class Request:
  """What a user asks for; `auto_quantize` of either backend says what each field means."""

  constraints: Mapping[str, Any]
  quantization_formats: Any = DEFAULT_FORMATS
  data_loader: Iterable[Any] | None = None
  disabled_layers: Any = None
  module_search_spaces: Mapping[str, Sequence[Any]] | None = None
  groups: Iterable[str] | None = None
  costs: Mapping[str, Any] | None = None
  accounting: str = "stored"
  unquantized_bits: int = 16
  method: str = "gradient"
  num_score_steps: int = 128
  num_probes: int = 1
  seed: int = 0
  checkpoint: Any = None
  verbose: bool = False
  report: list[dict[str, Any]] | None = None


def default_forward_step(model: Any, batch: Any) -> Any:
  """The model on a batch: a mapping as keyword arguments, a tuple or list as arguments, anything else as the one argument."""
  if isinstance(batch, Mapping):
    return model(**batch)
  return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def check_functions(method: str, twice: bool, **functions: Any) -> None:
  """Checks the user's functions.

  Args:
    method: how layers are scored.
    twice: whether `forward_backward_step` can be differentiated twice, which "hessian" needs.
    **functions: `forward_step`, `loss_func` and `forward_backward_step`, or None.

  Raises:
    ValueError: the method needs one that is missing.
    TypeError: one is no function.
  """
  for name, function in functions.items():
    if function is not None and not callable(function):
      raise TypeError(f"{name} must be a function, got {type(function).__name__}")
  no_loss, no_step = functions["loss_func"] is None, functions["forward_backward_step"] is None
  if no_loss and no_step and (method in BY_GRADIENT or (method == "hessian" and twice)):
    raise errors.needs(method, "loss_func or forward_backward_step")
  if no_loss and method == "hessian" and not twice:
    raise errors.needs(method, "loss_func (the loss is differentiated twice, which forward_backward_step cannot do)")


def check_data(data_loader: Any, steps: Mapping[str, int], method: str) -> None:
  """Raises:
  ValueError: an unknown method, steps that are no positive number, or no data where the method needs them.
  TypeError: a loader that can be gone through only once.
  """
  check_choice("method", method, METHODS)
  for name, value in steps.items():
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f"{name} is {value!r}; allowed are whole numbers of at least 1")
  if data_loader is None:
    if method != "sqnr":
      raise errors.needs(method, "data_loader")
    return
  if iter(data_loader) is data_loader:
    raise TypeError(
      "data_loader can be gone through only once, and calibration and scoring each go through it; pass a list or a DataLoader"
    )


def search(host: SearchHost, request: Request) -> State:
  """Run a search and quantize the host's model.

  Args:
    host: the model.
    request: what is asked for.

  Returns:
    The search_state.

  Raises:
    ValueError: something of the request is wrong or cannot be met (before anything is calibrated), a checkpoint of another search, or
      losses, gradients or outputs that are not finite.
  """
  plan = plan_for(host, request)
  file = ScoreFile(request.checkpoint, _identity(host, request, plan))
  found: list[dict[str, Any]] = [] if request.report is None else request.report
  batches = _score(host, request, plan, file, found)
  table = scores.table(request.method, plan, file.rows[:batches], file.errors)
  _warn_without_influence(request.method, plan, table["scores"])
  facts = {"method": request.method, "seed": request.seed, "batches": batches, "backend": host.backend}
  state = make_state(plan, request.constraints, table, **facts)
  if request.verbose:
    report.print_auto_quantize_summary(state)
  if all(choice == spaces.NONE for choice in state["assignment"].values()):
    warnings.warn("within this budget every layer may stay unquantized, so nothing was quantized; lower it", ConfigWarning, stacklevel=3)
  else:
    host.finish(config_of(plan, state["assignment"]), found)
  return state


def plan_for(host: SearchHost, request: Request) -> Plan:
  """The problem, checked: formats, patterns, and that the limits can be kept."""
  formats, named = spaces.read_spaces(spaces.read_formats(request.quantization_formats), request.module_search_spaces)
  counting = read_cost_model(request.constraints, Counting(request.accounting, request.unquantized_bits))
  plan = make_plan(
    host.layers(),
    formats,
    spaces=named,
    disabled=request.disabled_layers or (),
    group_rules=request.groups,
    counting=counting,
    tables=request.costs,
  )
  plan.limits(request.constraints)
  return plan


def _identity(host: SearchHost, request: Request, plan: Plan) -> dict[str, Any]:
  """What scores depend on. Budgets, groups that only gather scores, and ways of counting may change between runs."""
  if request.checkpoint is None:
    return {}
  used = {name for names in plan.to_score().values() for name in names}
  held = {"seed": request.seed, "probes": request.num_probes} if request.method == "hessian" else {}
  return {
    "model": host.fingerprint(),
    "method": request.method,
    "formats": {name: value for name, value in spaces.to_plain(plan.formats).items() if name in used},
    "choice of layers and formats": [list(column) for column in scores.columns(request.method, plan)],
    **held,
  }


def _score(host: SearchHost, request: Request, plan: Plan, file: ScoreFile, found: list[dict[str, Any]]) -> int:
  """Fill the file; returns the number of batches that count."""
  choices = plan.to_score()
  needs_errors = request.method in ("hessian", "sqnr") and file.errors is None
  steps = 0 if request.method == "sqnr" else request.num_score_steps
  if not choices or (len(file.rows) >= steps and not needs_errors):
    return min(steps, len(file.rows))
  if request.method != "hessian" or needs_errors:
    _prepare(host, plan, choices, found)
  if needs_errors:
    file.set_errors(_checked_errors(host.weight_errors(choices)))
  return _rows(host, request, plan, file) if steps else 0


def _prepare(host: SearchHost, plan: Plan, choices: Mapping[str, Sequence[str]], found: list[dict[str, Any]]) -> None:
  wanted = [one for name, one in plan.formats.items() if any(name in names for names in choices.values())]
  with progress(len(wanted), "calibrating") as step:
    for one in wanted:
      step(one.name)
      rows: list[dict[str, Any]] = []
      host.prepare(one.name, configs.covering(one, choices, plan.layers, plan.formats), rows)
      found += [{"format": one.name, **row} for row in rows]


def _rows(host: SearchHost, request: Request, plan: Plan, file: ScoreFile) -> int:
  assert request.data_loader is not None
  columns, choices = scores.columns(request.method, plan), plan.to_score()
  count = 0
  with progress(request.num_score_steps, f"scoring ({request.method})") as step:
    for number, batch in enumerate(itertools.islice(request.data_loader, request.num_score_steps)):
      step(f"batch {number}")
      count += 1
      if number < len(file.rows):
        continue
      row = _measure(host, request, plan, choices, number, batch)
      values = [float(row[unit][name]) for unit, name in columns]
      for (unit, name), value in zip(columns, values, strict=True):
        if not math.isfinite(value):
          raise errors.quantized_output_is_not_finite(number, unit, name)
      file.add(values)
  if not count:
    raise ValueError("data_loader gave no batch, so nothing can be scored; pass data, or use method 'sqnr'")
  return count


def _measure(host: SearchHost, request: Request, plan: Plan, choices: Any, number: int, batch: Any) -> dict[str, dict[str, float]]:
  if request.method in BY_GRADIENT:
    return host.gradient_scores(number, batch, choices, by_position=request.method == "fisher")
  if request.method == "kl_div":
    return host.kl_scores(number, batch, choices, plan.groups)
  layers = plan.by_name
  shapes = {name: (layers[name].copies, *layers[name].shape) if layers[name].copies > 1 else layers[name].shape for name in choices}
  probes = [{name: scores.probe(request.seed, number, i, name, shape) for name, shape in shapes.items()} for i in range(request.num_probes)]
  return {name: {TRACE: trace} for name, trace in host.hessian_traces(number, batch, list(choices), probes).items()}


def _checked_errors(found: dict[str, dict[str, tuple[float, float]]]) -> dict[str, dict[str, tuple[float, float]]]:
  for layer, row in found.items():
    for name, pair in row.items():
      if not all(math.isfinite(value) for value in pair):
        raise ValueError(f"the weight of {layer!r}, or what format {name!r} makes of it, is not finite; look at the model's parameters")
  return found


def _warn_without_influence(method: str, plan: Plan, table: Mapping[str, Mapping[str, float]]) -> None:
  if method == "sqnr":
    return
  free = [group for group, names in plan.choices.items() if len(names) > 1]
  idle = [group for group in free if not any(table[group].values())]
  if idle:
    shown = ", ".join(idle[:8]) + (f" and {len(idle) - 8} more" if len(idle) > 8 else "")
    why = "the estimated trace of the loss's Hessian is not positive there; take more batches or probes"
    if method != "hessian":
      why = "the loss does not depend on them; use one that they have a part in, or name them in disabled_layers"
    warnings.warn(
      f"{len(idle)} of {len(free)} groups have score 0 in every format, so they get the fewest bits ({shown}): {why}",
      ConfigWarning,
      stacklevel=4,
    )


def limited(data_loader: Iterable[Any] | None, steps: int) -> Iterator[Any]:
  """The first batches of a loader."""
  return iter(()) if data_loader is None else itertools.islice(data_loader, steps)
