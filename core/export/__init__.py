"""Checkpoints for serving engines, the same bytes from every backend: `write` a folder, `read` it back.

source          what exporting sees of a model
plan            what is written, decided and refused before anything is
compressed_tensors, modelopt   the layouts
folder, card    whole Hugging Face folders, streamed and atomic
read            a folder back into codes and scales
"""

from core.export.folder import write
from core.export.layout import Stored
from core.export.plan import LAYOUTS, plan
from core.export.read import Artefact, read
from core.export.safetensors_file import File
from core.export.source import Source, Stage

__all__ = ["LAYOUTS", "Artefact", "File", "Source", "Stage", "Stored", "plan", "read", "write"]
