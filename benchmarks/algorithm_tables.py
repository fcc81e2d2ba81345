"""Figures of a run, and the columns that show them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from benchmarks.algorithm_cases import Case
from benchmarks.algorithm_runs import TEXTS, Run
from core.metrics import mean_and_error
from experiments.report import Column

ERRORS_LIMIT = 2.0

PEER = (
  Column("name", "run"),
  Column("ppl_first", "perplexity 1", ".4f"),
  Column("added_first", "added NLL 1", "+.5f"),
  Column("added_se_first", "+-", ".5f"),
  Column("kl_first", "KL 1", ".5f"),
  Column("ppl_second", "perplexity 2", ".4f"),
  Column("added_second", "added NLL 2", "+.5f"),
  Column("added_se_second", "+-", ".5f"),
  Column("kl_second", "KL 2", ".5f"),
  Column("cpu_seconds", "CPU s", ".1f"),
  Column("wall_seconds", "wall s", ".1f"),
  Column("peak_mib", "peak MiB", ".0f"),
  Column("start_mib", "before MiB", ".0f"),
)

PAIRS = (
  Column("name", "run"),
  Column("backend", "backend"),
  Column("verdict", "verdict"),
  *(
    Column(f"{key}_{text}", f"{heading} {number}", form)
    for number, text in enumerate(TEXTS, 1)
    for key, heading, form in (
      ("ours_ppl", "perplexity", ".4f"),
      ("peer_ppl", "ModelOpt", ".4f"),
      ("ours_added", "added NLL", "+.5f"),
      ("peer_added", "ModelOpt", "+.5f"),
      ("difference", "difference", "+.5f"),
      ("difference_se", "paired +-", ".5f"),
      ("ours_kl", "KL", ".5f"),
      ("peer_kl", "ModelOpt", ".5f"),
    )
  ),
  Column("ours_cpu_seconds", "CPU s", ".1f"),
  Column("peer_cpu_seconds", "ModelOpt", ".1f"),
  Column("cpu_ratio", "ratio", ".2f"),
  Column("ours_peak_mib", "peak MiB", ".0f"),
  Column("peer_peak_mib", "ModelOpt", ".0f"),
)

FOUR = (
  Column("name", "run"),
  Column("backend", "backend"),
  Column("verdict", "verdict"),
  *(
    Column(f"{key}_{text}", f"{heading} {number}", form)
    for number, text in enumerate(TEXTS, 1)
    for key, heading, form in (
      ("added", "added NLL", "+.5f"),
      ("added_se", "+-", ".5f"),
      ("best_added", "best of ModelOpt", "+.5f"),
      ("added_ratio", "ratio", ".3f"),
      ("kl", "KL", ".5f"),
      ("best_kl", "best of ModelOpt", ".5f"),
      ("kl_ratio", "ratio", ".3f"),
    )
  ),
  Column("added_limit", "NLL ratio allowed", ".3f"),
  Column("kl_limit", "KL ratio allowed", ".3f"),
  Column("cpu_seconds", "CPU s", ".1f"),
  Column("cpu_limit", "allowed", ".0f"),
  Column("peak_mib", "peak MiB", ".0f"),
)


def row(name: str, arrays: dict[str, np.ndarray], facts: dict[str, Any], base: dict[str, np.ndarray]) -> dict[str, Any]:
  """Figures of one run.

  Args:
    name: of the run.
    arrays: as `algorithm_runs.kept` returns them.
    facts: likewise.
    base: negative log-likelihoods of the float model, text -> [predicted tokens].

  Returns:
    Per text: perplexity, NLL added over float with its paired standard error, KL from the float model with its own; and the cost.
  """
  found: dict[str, Any] = {"name": name}
  for text in TEXTS:
    nll = arrays[f"nll_{text}"]
    found[f"ppl_{text}"] = math.exp(float(nll.mean()))
    found[f"added_{text}"], found[f"added_se_{text}"] = mean_and_error(nll - base[text])
    found[f"kl_{text}"], found[f"kl_se_{text}"] = mean_and_error(arrays[f"kl_{text}"])
  return found | {key: facts[key] for key in ("cpu_seconds", "wall_seconds", "peak_mib", "start_mib")}


def pair(case: Case, backend: str, ours: Run | None, theirs: Run | None, base: dict[str, np.ndarray]) -> dict[str, Any]:
  """One configuration on both sides; "no worse" where the difference is at most `ERRORS_LIMIT` paired standard errors on every text.

  Args:
    case: the configuration.
    backend: of our run.
    ours: our run; None where it failed.
    theirs: ModelOpt's.
    base: negative log-likelihoods of the float model, text -> [predicted tokens].
  """
  found: dict[str, Any] = {"name": case.name, "backend": backend}
  for side, run in (("ours", ours), ("peer", theirs)):
    if run is not None:
      found |= {f"{side}_{key}": value for key, value in row(case.name, *run, base).items() if key != "name"}
  if ours is None or theirs is None:
    return found | {"verdict": "FAILED" if ours is None else "ModelOpt FAILED", "passed": False}
  passed = True
  for text in TEXTS:
    difference, error = mean_and_error(ours[0][f"nll_{text}"] - theirs[0][f"nll_{text}"])
    passed = passed and difference <= ERRORS_LIMIT * error
    found |= {f"difference_{text}": difference, f"difference_se_{text}": error}
  if not case.nvfp4:
    found["cpu_ratio"] = found["ours_cpu_seconds"] / found["peer_cpu_seconds"]
  return found | {"verdict": "no worse" if passed else "WORSE", "passed": passed}


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """The least added NLL and the least KL on each text, and which run has it; empty without rows."""
  found: dict[str, Any] = {}
  for key in [f"{figure}_{text}" for text in TEXTS for figure in ("added", "kl")] if rows else []:
    least = min(rows, key=lambda one: one[key])
    found |= {f"best_{key}": least[key], f"best_{key}_run": least["name"]}
  return found


def against_best(case: Case, backend: str, run: Run | None, least: dict[str, Any], base: dict[str, np.ndarray]) -> dict[str, Any]:
  """One of our own configurations; "better" where added NLL, KL and CPU seconds are within the case's limits.

  Args:
    case: the configuration.
    backend: of the run.
    run: our run; None where it failed.
    least: from `best`.
    base: negative log-likelihoods of the float model, text -> [predicted tokens].
  """
  found: dict[str, Any] = {"name": case.name, "backend": backend, **least}
  if run is None or not least:
    return found | {"verdict": "FAILED" if run is None else "ModelOpt FAILED", "passed": False}
  found |= row(case.name, *run, base)
  passed = True
  for key in (f"{figure}_{text}" for text in TEXTS for figure in ("added", "kl")):
    figure, text = key.split("_")
    found[f"{figure}_ratio_{text}"] = found[key] / least[f"best_{key}"]
    limit = getattr(case, f"{figure}_limit") if text == TEXTS[0] else 1.0
    passed = passed and found[f"{figure}_ratio_{text}"] <= limit and found[key] < least[f"best_{key}"]
  passed = passed and (case.cpu_limit is None or found["cpu_seconds"] <= case.cpu_limit)
  found |= {"added_limit": case.added_limit, "kl_limit": case.kl_limit, "cpu_limit": case.cpu_limit}
  return found | {"verdict": "better" if passed else "NOT BETTER", "passed": passed}
