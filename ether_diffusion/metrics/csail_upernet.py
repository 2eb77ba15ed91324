"""UPerNet over a ResNet-101 (Xiao et al. 2018), with the names and the arithmetic of CSAIL's published weights.

transformers' UperNet is another network: it enlarges the pooled features after their ReLU, not before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

POOL_SCALES = (1, 2, 3, 6)


class Encoder(nn.Module):
    """A ResNet with a stem of three 3x3 convolutions.

    Args:
        blocks: The numbers of bottlenecks in the four stages.
        width: Channels inside the first stage's bottlenecks, 64 in the published one; its output has four times those.
    """

    def __init__(self, blocks: Sequence[int] = (3, 4, 23, 3), width: int = 64) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 64, 3, stride=2), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = _conv(64, 64, 3), nn.BatchNorm2d(64)
        self.conv3, self.bn3 = _conv(64, 128, 3), nn.BatchNorm2d(128)
        channels = 128
        for stage, count in enumerate(blocks):
            inner, stride = width * 2**stage, 1 if stage == 0 else 2
            shortcut = nn.Sequential(_conv(channels, 4 * inner, 1, stride), nn.BatchNorm2d(4 * inner))
            first = Bottleneck(channels, inner, stride, shortcut)
            channels = 4 * inner
            rest = [Bottleneck(channels, inner) for _ in range(count - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """The outputs of the four stages, at 1/4, 1/8, 1/16 and 1/32 of (B, 3, H, W)."""
        x = F.relu(self.bn1(self.conv1(pixels)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        found = []
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
            found.append(x)
        return found


class Decoder(nn.Module):
    """Pyramid pooling over the last stage, then a feature pyramid over all four.

    Args:
        channels: Of the four stages.
        width: Channels of all inner layers.
    """

    def __init__(
        self, num_classes: int = 150, channels: Sequence[int] = (256, 512, 1024, 2048), width: int = 512
    ) -> None:
        super().__init__()
        top = channels[-1]
        self.ppm_conv = nn.ModuleList([_conv_bn_relu(top, width, 1) for _ in POOL_SCALES])
        self.ppm_last_conv = _conv_bn_relu(top + len(POOL_SCALES) * width, width, 3)
        self.fpn_in = nn.ModuleList([_conv_bn_relu(below, width, 1) for below in channels[:-1]])
        self.fpn_out = nn.ModuleList([nn.Sequential(_conv_bn_relu(width, width, 3)) for _ in channels[:-1]])
        self.conv_last = nn.Sequential(
            _conv_bn_relu(len(channels) * width, width, 3), nn.Conv2d(width, num_classes, kernel_size=1)
        )

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Logits (B, classes, H / 4, W / 4)."""
        top = stages[-1]
        pooled = [
            convolve(_sized(F.adaptive_avg_pool2d(top, scale), top))
            for scale, convolve in zip(POOL_SCALES, self.ppm_conv, strict=True)
        ]
        x = self.ppm_last_conv(torch.cat([top, *pooled], dim=1))
        pyramid = [x]
        for stage in reversed(range(len(stages) - 1)):
            lateral = self.fpn_in[stage](stages[stage])
            x = lateral + _sized(x, lateral)
            pyramid.insert(0, self.fpn_out[stage](x))
        return self.conv_last(torch.cat([_sized(level, pyramid[0]) for level in pyramid], dim=1))


def _conv(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)


def _conv_bn_relu(channels: int, out: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(_conv(channels, out, kernel), nn.BatchNorm2d(out), nn.ReLU())


def _sized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)
