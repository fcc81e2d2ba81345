"""Calibration algorithms: statistics in, scales and weights out. numpy on the host, so both backends choose the same numbers.

One algorithm a file, as plain functions of arrays; `registry` names them for configurations, `driver` runs them over a model that a
backend's `Host` shows layer by layer. Nothing here knows torch or jax.
"""

from core.calibrate.layer import Change, Layer
from core.calibrate.registry import register_algorithm, unregister_algorithm

__all__ = ["Change", "Layer", "register_algorithm", "unregister_algorithm"]
