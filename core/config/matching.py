"""Which rules a quantizer answers to: names in both frameworks' spellings, classes in both frameworks' words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import lru_cache

# Each word a class pattern may use -> the classes of the other framework that it also means. A Flax Conv has no rank in its name.
CLASS_ALIASES: dict[str, tuple[str, ...]] = {
  "Linear": ("Dense", "DenseGeneral", "LinearGeneral"),
  "Dense": ("Linear", "DenseGeneral", "LinearGeneral"),
  "DenseGeneral": ("Linear", "LinearGeneral"),
  "LinearGeneral": ("Linear", "DenseGeneral"),
  "Conv": ("Conv1d", "Conv2d", "Conv3d"),
  "ConvTranspose": ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
  "BatchNorm": ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"),
  "InstanceNorm": ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
  "Embed": ("Embedding",),
  "Embedding": ("Embed",),
}
RANKED = re.compile(r"(Conv|ConvTranspose|BatchNorm|InstanceNorm)([123])d")
# Prefixes that only say which library a name is from.
LIBRARIES = ("nn", "torch.nn", "linen", "flax.linen", "nnx", "flax.nnx")
_NUMBERED = re.compile(r"_(\d+)(?=[./*?]|$)")


@lru_cache(maxsize=65536)
def canonical_name(path: str) -> str:
  """`model/layers_0/self_attn/q_proj` -> `model.layers.0.self_attn.q_proj`: "/" to ".", a trailing `_N` of a path part to `.N`."""
  return _NUMBERED.sub(r".\1", path).replace("/", ".")


@lru_cache(maxsize=65536)
def _without_glob(pattern: str) -> str | None:
  """The canonical spelling of a pattern that names one thing; None where it holds a wildcard."""
  return None if any(character in pattern for character in "*?[") else canonical_name(pattern)


def matches_name(pattern: str, name: str) -> bool:
  """Whether a glob matches a quantizer name, either as spelled (with "." for "/") or both in canonical spelling. Case matters."""
  exact = _without_glob(pattern)  # a configuration may hold a rule for each of many layers
  return _matches_glob(pattern, name) if exact is None else canonical_name(name) == exact


@lru_cache(maxsize=262144)
def _matches_glob(pattern: str, name: str) -> bool:
  dotted, canonical = name.replace("/", "."), canonical_name(name)
  glob = pattern.replace("/", ".")
  return fnmatchcase(dotted, glob) or fnmatchcase(canonical, glob) or fnmatchcase(canonical, canonical_name(pattern))


def matches_class(pattern: str, classes: Iterable[str]) -> bool:
  """Whether a class pattern ("nn.Linear", "Linear", "flax.linen.Dense", "Dense", "my.module.MyLinear") names one of the classes.

  The classes are those a module is an instance of, as simple or as dotted names. Words of the other framework count
  (`CLASS_ALIASES`); where the rank of a convolution or norm is known ("Conv2d" among the classes), `nn.Conv1d` does not match it.
  """
  prefix, _, word = pattern.rpartition(".")
  own = tuple(classes)
  if any(pattern == name or _same_class(prefix, word, name) for name in own):
    return True
  if prefix and prefix not in LIBRARIES:
    return False
  simple = {name.rpartition(".")[2] for name in own}
  ranked = RANKED.fullmatch(word)
  if ranked:
    known_rank = any((other := RANKED.fullmatch(name)) and other[1] == ranked[1] for name in simple)
    return ranked[1] in simple and not known_rank
  return not simple.isdisjoint(CLASS_ALIASES.get(word, ()))


def _same_class(prefix: str, word: str, name: str) -> bool:
  other_prefix, _, other = name.rpartition(".")
  if other != word:
    return False
  # A prefix that names a library, or a name without one, says nothing that could contradict.
  return prefix in ("", *LIBRARIES) or not other_prefix or name.endswith(f".{prefix}.{word}")
