"""absl flags from a dataclass: the fields of an experiment's `Options` are its flags, and a run can print the command that repeats it."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

OptionsType = TypeVar("OptionsType")


def flag(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
  """A dataclass field that becomes a flag: its default, its help text, and for strings the values allowed."""
  return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


def define(options: type, flag_values: Any = None) -> None:
  """Define one absl flag per field. Types: str, int, float, bool, tuple[str, ...] and tuple[int, ...] (comma-separated)."""
  from absl import flags

  hints = typing.get_type_hints(options)
  where = {} if flag_values is None else {"flag_values": flag_values}
  single = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}
  for field in dataclasses.fields(options):
    text, choices = field.metadata["help"], field.metadata["choices"]
    if choices is not None:
      flags.DEFINE_enum(field.name, field.default, choices, text, **where)
    elif hints[field.name] in single:
      single[hints[field.name]](field.name, field.default, text, **where)
    else:
      flags.DEFINE_list(field.name, [str(v) for v in field.default], text, **where)


def parse(options: type[OptionsType], argv: Sequence[str]) -> OptionsType:
  """Options from command line arguments (`argv[0]` is the program).

  Raises:
    ValueError: a list of numbers holds something else.
    absl.flags.Error: an unknown flag or a value of the wrong kind.
  """
  from absl import flags

  values = flags.FlagValues()
  define(options, values)
  rest = values(list(argv))
  if len(rest) > 1:
    raise flags.UnrecognizedFlagError(rest[1], suggestions=[])
  return from_flags(options, values)


def from_flags(options: type[OptionsType], values: Any) -> OptionsType:
  """Options from parsed flags.

  Raises:
    ValueError: a list of numbers holds something else.
  """
  hints = typing.get_type_hints(options)
  given = {}
  for field in dataclasses.fields(options):  # type: ignore[arg-type]
    value = values[field.name].value
    if isinstance(value, list):
      kind = typing.get_args(hints[field.name])[0]
      try:
        value = tuple(kind(item) for item in value)
      except ValueError as error:
        raise ValueError(f"--{field.name}={','.join(value)}: expected comma-separated {kind.__name__} values") from error
    given[field.name] = value
  return options(**given)


def command(module: str, options: Any) -> str:
  """The command line that runs `module` with these very options, defaults spelled out."""
  parts = ["python", "-m", module]
  for field in dataclasses.fields(options):
    value = getattr(options, field.name)
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    if text:
      parts.append(f"--{field.name}={text}")
  return shlex.join(parts)


def main(options: type, run: Callable[[Any], int]) -> None:
  """Run an experiment from the command line. A mistake in the flags or the configuration ends with its message and status 2."""
  from absl import app, flags, logging

  define(options)
  logging.set_verbosity(logging.WARNING)

  def start(argv: Sequence[str]) -> int:
    if len(argv) > 1:
      raise app.UsageError(f"unexpected argument {argv[1]!r}; every option is a flag, --name=value")
    try:
      return run(from_flags(options, flags.FLAGS))
    except (ValueError, FileNotFoundError, FileExistsError) as error:
      print(f"error: {error}", file=sys.stderr)
      return 2

  app.run(start)
