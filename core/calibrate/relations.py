"""Which layers read what another part of the model returns: rules as data, and finding what they name in a model.

A rule is "source -> reader" or "source -> part.(reader|reader)", names in torch's spelling relative to any module: the rule
"mlp.up_proj -> mlp.down_proj" matches once in every decoder layer. It says two things that no list of layers shows, so who adds a rule
answers for them: channel j of the source's output is channel j of each reader's input but for a factor that does not depend on the source
(the other branch of a gated product, attention weights), and nothing else reads that output. A norm whose output also feeds the residual
(BERT's) must have no rule. `core.calibrate.unchanged` catches rules that are false for a model.

Grouped-query attention repeats the source's heads: reader channel ((g R + r) D + d) is source channel (g D + d), with D the head size and R
the number of query heads that share head g.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from core.calibrate.host import Host

NORMS = ("input_layernorm -> self_attn.(q_proj|k_proj|v_proj)", "post_attention_layernorm -> mlp.(gate_proj|up_proj)")
LINEARS = (
  "self_attn.v_proj -> self_attn.o_proj",
  "mlp.up_proj -> mlp.down_proj",
  "attention.self.value -> attention.output.dense",  # BERT
)
HEAD = ("model.norm -> lm_head",)

_PARTS = re.compile(r"([^()|\s]*)(?:\(([^()\s]+)\))?([^()|\s]*)")
_INDEX = re.compile(r"(.*?)(\[[\d,]+\])?")


@dataclasses.dataclass(frozen=True)
class Relation:
  """One place in a model where a rule holds.

  Attributes:
    source: dotted name of the norm or layer.
    readers: names of the layers that read its output, all of them.
  """

  source: str
  readers: tuple[str, ...]


def parse(rule: str) -> Relation:
  """A rule as (source, readers), both still relative.

  Raises:
    ValueError: it is not understood.
  """
  source, arrow, readers = (part.strip() for part in str(rule).partition("->"))
  found = _PARTS.fullmatch(readers)
  if not arrow or not source or not readers or found is None or set(source) & set("()| "):
    raise ValueError(
      f"relation {rule!r} is not understood; write 'source -> reader' or 'source -> part.(reader|reader)', for example {NORMS[0]!r}"
    )
  before, choices, after = found.groups()
  return Relation(source, tuple(f"{before}{choice}{after}" for choice in (choices or "").split("|")))


def find(host: Host, rules: Sequence[str]) -> list[Relation]:
  """Every place where a rule's source and all its readers exist, rule by rule, in the model's order.

  Args:
    host: the model.
    rules: a list of rules; where a scan stacks layers the names get its index behind them ("model.layers.mlp.up_proj[3]").

  Raises:
    ValueError: a rule that is not understood, or one string in place of a list.
  """
  if isinstance(rules, str):
    raise ValueError(f"relations is {rules!r}; give a list of rules, such as [{rules!r}]")
  layers = host.weighted()
  known, shapes = set(layers), host.parameter_shapes()
  return [match for rule in map(parse, rules) for layer in layers if (match := _at(rule, layer, known, shapes)) is not None]


def _at(rule: Relation, layer: str, layers: set[str], shapes: Mapping[str, tuple[int, ...]]) -> Relation | None:
  """The relation whose first reader is that layer, or None."""
  base, index = _split(layer)
  prefix = base.removesuffix(rule.readers[0])
  if prefix == base or (prefix and not prefix.endswith(".")):
    return None
  match = Relation(f"{prefix}{rule.source}{index}", tuple(f"{prefix}{reader}{index}" for reader in rule.readers))
  return match if set(match.readers) <= layers and f"{match.source}.weight" in shapes else None


def matching(layers: Sequence[str], names: Sequence[str]) -> list[str]:
  """The layers whose dotted name is, or ends in, one of these."""
  return [layer for layer in layers if any(f".{_split(layer)[0]}".endswith(f".{name}") for name in names)]


def _split(name: str) -> tuple[str, str]:
  found = _INDEX.fullmatch(name)
  assert found is not None
  return found[1], found[2] or ""


def sees_output(host: Host, source: str) -> str:
  """Name of an enabled quantizer of the source's output (its own, or of the values of its attention), or ""."""
  base = _split(source)[0]
  values = f"{base.rpartition('.')[0]}.v_bmm_quantizer" if base.endswith("v_proj") else ""
  return next((name for name in host.activation_specs() if name in (f"{base}.output_quantizer", values)), "")


def by_source(values: np.ndarray, outputs: int, head_dim: int | None) -> np.ndarray:
  """What belongs to each channel of the source, of something that is given for the reader's channels.

  Args:
    values: [..., K], one for every input channel of the reader.
    outputs: number N of channels of the source; K = R N where heads repeat.
    head_dim: head size, needed where R > 1.

  Returns:
    [..., R, N].

  Raises:
    ValueError: K is no multiple of N, or the head size is unknown or does not divide N.
  """
  repeats = _repeats(values.shape[-1], outputs, head_dim)
  if repeats == 1:
    return values[..., None, :]
  split = values.reshape(*values.shape[:-1], -1, repeats, int(head_dim or 0))
  return np.moveaxis(split, -2, -3).reshape(*values.shape[:-1], repeats, outputs)


def by_reader(values: np.ndarray, inputs: int, head_dim: int | None) -> np.ndarray:
  """The inverse of `by_source` for values that all repeats share: [N] -> [K].

  Raises:
    ValueError: as `by_source`.
  """
  repeats = _repeats(inputs, len(values), head_dim)
  return values if repeats == 1 else np.repeat(values.reshape(-1, 1, int(head_dim or 0)), repeats, axis=1).reshape(-1)


def _repeats(inputs: int, outputs: int, head_dim: int | None) -> int:
  if inputs % outputs:
    raise ValueError(f"a source of {outputs} channels cannot feed a reader of {inputs}; the relation does not hold in this model")
  if inputs != outputs and (not head_dim or outputs % head_dim):
    raise ValueError(
      f"a reader of {inputs} channels repeats heads of a source of {outputs}, and the head size is {head_dim}; give head_dim, a divisor of "
      f"{outputs}"
    )
  return inputs // outputs


def norm_kind(norm: Callable[[np.ndarray, np.ndarray], np.ndarray], size: int) -> str:
  """What a normalization does, found out by calling it.

  Args:
    norm: (x [T, K], weight [K]) -> [T, K], any bias being 0.
    size: K.

  Returns:
    "rms": weight * x / rms(x), which commutes with orthogonal matrices once its weight is 1; "layer": weight times something that does
    not change when a constant is added to x; "other": anything else, such as a norm that multiplies with 1 + weight.
  """
  rng = np.random.default_rng(0)
  x, weight = rng.normal(size=(4, size)), 1 + 0.5 * rng.random(size)
  plain = norm(x, np.ones(size))
  if not np.allclose(norm(x, weight), weight * plain, rtol=1e-2, atol=1e-2):  # a norm in bfloat16 has 8 bits
    return "other"
  if np.allclose(plain, x / np.sqrt(np.mean(x * x, axis=1, keepdims=True)), rtol=2e-2, atol=2e-2) and size > 1:
    return "rms"
  return "layer" if np.allclose(norm(x + 3, np.ones(size)), plain, rtol=5e-2, atol=5e-2) else "other"
