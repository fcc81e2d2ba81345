"""The quantized torch layers. Each is a class of its own, importable by name, so that a converted model can be copied and inspected."""

from __future__ import annotations

from torch import Tensor, nn

from torch_backend.modules.base import QuantInput, QuantTable, QuantWeight


class QuantLinear(QuantWeight, nn.Linear):
  """Weight [out, in]."""


class QuantConv1d(QuantWeight, nn.Conv1d):
  """Weight [out, in/groups, k]."""


class QuantConv2d(QuantWeight, nn.Conv2d):
  """Weight [out, in/groups, kh, kw]."""


class QuantConv3d(QuantWeight, nn.Conv3d):
  """Weight [out, in/groups, kd, kh, kw]."""


class TransposedWeight(QuantWeight):
  """A transposed convolution stores [in, out/groups, ...]; its quantizer sees [out, in/groups, ...], so axis 0 is the output channel.

  Input channels are stored group by group, output channels are numbered group by group:
  [g * in/g, out/g, ...] -> [g, in/g, out/g, ...] -> [g, out/g, in/g, ...] -> [g * out/g, in/g, ...], which is its own inverse.
  """

  groups: int

  def canonical(self, weight: Tensor) -> Tensor:
    return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

  def stored(self, weight: Tensor) -> Tensor:
    return self.canonical(weight)


class QuantConvTranspose1d(TransposedWeight, nn.ConvTranspose1d):
  """Weight stored [in, out/groups, k], quantized [out, in/groups, k]."""


class QuantConvTranspose2d(TransposedWeight, nn.ConvTranspose2d):
  """Weight stored [in, out/groups, kh, kw], quantized [out, in/groups, kh, kw]."""


class QuantConvTranspose3d(TransposedWeight, nn.ConvTranspose3d):
  """Weight stored [in, out/groups, kd, kh, kw], quantized [out, in/groups, kd, kh, kw]."""


class InOutWeight(QuantWeight):
  """A layer that stores [in, out], as Hugging Face's Conv1D (GPT-2); its quantizer sees [out, in]."""

  def canonical(self, weight: Tensor) -> Tensor:
    return weight.transpose(0, 1)

  def stored(self, weight: Tensor) -> Tensor:
    return weight.transpose(0, 1)


class QuantEmbedding(QuantTable, nn.Embedding):
  """Weight [entries, features]."""


class QuantLayerNorm(QuantInput, nn.LayerNorm):
  pass


class QuantRMSNorm(QuantInput, nn.RMSNorm):
  pass


class QuantInstanceNorm1d(QuantInput, nn.InstanceNorm1d):
  pass


class QuantInstanceNorm2d(QuantInput, nn.InstanceNorm2d):
  pass


class QuantInstanceNorm3d(QuantInput, nn.InstanceNorm3d):
  pass


class QuantBatchNorm1d(QuantInput, nn.BatchNorm1d):
  pass


class QuantBatchNorm2d(QuantInput, nn.BatchNorm2d):
  pass


class QuantBatchNorm3d(QuantInput, nn.BatchNorm3d):
  pass


class QuantLeakyReLU(QuantInput, nn.LeakyReLU):
  pass


class QuantMaxPool1d(QuantInput, nn.MaxPool1d):
  pass


class QuantMaxPool2d(QuantInput, nn.MaxPool2d):
  pass


class QuantMaxPool3d(QuantInput, nn.MaxPool3d):
  pass


class QuantAvgPool1d(QuantInput, nn.AvgPool1d):
  pass


class QuantAvgPool2d(QuantInput, nn.AvgPool2d):
  pass


class QuantAvgPool3d(QuantInput, nn.AvgPool3d):
  pass


class QuantAdaptiveAvgPool1d(QuantInput, nn.AdaptiveAvgPool1d):
  pass


class QuantAdaptiveAvgPool2d(QuantInput, nn.AdaptiveAvgPool2d):
  pass


class QuantAdaptiveAvgPool3d(QuantInput, nn.AdaptiveAvgPool3d):
  pass


LAYERS: tuple[type[QuantInput], ...] = (
  QuantLinear, QuantConv1d, QuantConv2d, QuantConv3d, QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d, QuantEmbedding,
  QuantLayerNorm, QuantRMSNorm, QuantInstanceNorm1d, QuantInstanceNorm2d, QuantInstanceNorm3d, QuantBatchNorm1d, QuantBatchNorm2d,
  QuantBatchNorm3d, QuantLeakyReLU, QuantMaxPool1d, QuantMaxPool2d, QuantMaxPool3d, QuantAvgPool1d, QuantAvgPool2d, QuantAvgPool3d,
  QuantAdaptiveAvgPool1d, QuantAdaptiveAvgPool2d, QuantAdaptiveAvgPool3d,
)  # fmt: skip
