"""Published conformance vectors: inputs, and the codes, scales and values that SPEC.md demands, as hex. See README of the vectors below.

Each file under `vectors/` holds cases made in exact rationals by a script that does not import `core`. A case is
`{"name", "spec", "shape", "x", "amax"?, "tensor_amax"?, "key"?, "expected"}`: float32 values are 8 hex digits each (bits, most significant
first, row-major), codes are 2 hex digits (two's complement). `python -m core.conformance --backend=numpy` runs them.
"""

from core.conformance.runner import FileResult, Runtime, check_case, run
from core.conformance.vectors_io import load, names, spec_from_json

__all__ = ["FileResult", "Runtime", "check_case", "load", "names", "run", "spec_from_json"]
