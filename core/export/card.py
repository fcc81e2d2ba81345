"""The model card: what was done to the model, what was measured, and which clients read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from core.export.plan import Plan

READERS = {
  "compressed-tensors": "transformers with the package compressed-tensors, and vLLM",
  "modelopt": "vLLM, TensorRT-LLM and SGLang; not transformers",
  "gguf": 'transformers (`gguf_file="model.gguf"`) and llama.cpp',
}


def text(plan: Plan, facts: Mapping[str, Any]) -> str:
  """README.md of an exported folder.

  Args:
    plan: what was written.
    facts: what the caller knows: "title", "base_model", "license", "recipe" (text or a mapping), "metrics" (name -> number), all optional;
      other keys become lines of the recipe.
  """
  front = [f"{key}: {facts[key]}" for key in ("base_model", "license") if facts.get(key)]
  lines = ["---", *front, "library_name: transformers", "tags:", "- quantized", f"- {plan.layout}", "---", ""]
  lines += [f"# {facts.get('title') or 'A quantized model'}", "", f"Layout `{plan.layout}`, read by {READERS[plan.layout]}.", ""]
  lines += ["## What is quantized", "", "| layers | scheme |", "|---|---|"]
  lines += [f"| {count} | {scheme} |" for scheme, count in Counter(_scheme(p.scheme) for p in plan.layers.values()).items()]
  recipe = facts.get("recipe")
  more = dict(recipe) if isinstance(recipe, Mapping) else {"recipe": recipe} if recipe else {}
  more |= {key: value for key, value in facts.items() if key not in ("title", "base_model", "license", "recipe", "metrics")}
  lines += ["", "## Recipe", "", *(f"- {key}: {value}" for key, value in more.items())] if more else []
  metrics = facts.get("metrics")
  if metrics:
    lines += ["", "## Measured", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in dict(metrics).items())]
  lines += ["", "## What clients do", "", *(f"- {note}." for note in plan.notes)] if plan.notes else []
  return "\n".join([*lines, "", "Codes and scales are those that the simulated model computed with, bit for bit.", ""])


def _scheme(scheme: Mapping[str, Any]) -> str:
  if "quant_algo" in scheme:
    size = scheme.get("group_size")
    return f"{scheme['quant_algo']}{f', groups of {size}' if size else ''}{', pre_quant_scale' if scheme.get('pre_quant_scale') else ''}"
  if "weights" not in scheme:
    return f"{scheme['format']}: blocks of 32"
  weights, inputs = scheme["weights"], scheme["input_activations"]
  return f"{scheme['format']}: weights {_args(weights)}; inputs {_args(inputs) if inputs else 'float'}"


def _args(args: Mapping[str, Any]) -> str:
  size = args.get("group_size") or args.get("block_structure") or ""
  kind = {True: ", dynamic", "local": ", dynamic blocks"}.get(args["dynamic"], "")
  return f"{args['num_bits']} bits {args['type']}, {args['strategy']}{f' {size}' if size else ''}{kind}"
