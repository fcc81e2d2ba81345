"""Checkpoints for serving engines, the same bytes from every backend: `write` a folder, `read` it back.

`source` is what exporting sees of a model; `plan` decides and refuses before anything is written; `compressed_tensors` and `modelopt` are
the layouts; `folder` and `card` make whole Hugging Face folders, streamed and atomic; `weights_only` goes from folder to folder without a
model.
"""

from core.export.folder import check_free, write
from core.export.layout import Stored
from core.export.plan import LAYOUTS, plan
from core.export.read import Artefact, read
from core.export.safetensors_file import File
from core.export.source import Source, Stage
from core.export.weights_only import FolderSource, export_weights

__all__ = [
  "LAYOUTS",
  "Artefact",
  "File",
  "FolderSource",
  "Source",
  "Stage",
  "Stored",
  "check_free",
  "export_weights",
  "plan",
  "read",
  "write",
]
