"""The InceptionV3 of 2015-12-05 that FID is defined by, under the names of its two .pth files.

It is not torchvision's network: average pools do not count the padding, the last block pools by the
maximum, and the classifier has 1008 outputs. The feature is the pooled 2048-vector before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, CLASSES = 2048, 1008


class FidInception(nn.Module):
    """Features [n, 2048] of pixels [n, 3, 299, 299] in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _BlockA(192, 32)
        self.Mixed_5c = _BlockA(256, 64)
        self.Mixed_5d = _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(768, 128)
        self.Mixed_6c = _BlockC(768, 160)
        self.Mixed_6d = _BlockC(768, 160)
        self.Mixed_6e = _BlockC(768, 192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b = _BlockE(1280, pools_maximum=False)
        self.Mixed_7c = _BlockE(2048, pools_maximum=True)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels))
        hidden = F.max_pool2d(self.Conv2d_2b_3x3(hidden), 3, stride=2)
        hidden = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden))
        hidden = F.max_pool2d(hidden, 3, stride=2)
        for block in (
            *(self.Mixed_5b, self.Mixed_5c, self.Mixed_5d),
            *(self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e),
            *(self.Mixed_7a, self.Mixed_7b, self.Mixed_7c),
        ):
            hidden = block(hidden)
        return hidden.mean(dim=(2, 3))


class _Conv(nn.Module):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(hidden)), inplace=True)


def _average(hidden: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(hidden, 3, stride=1, padding=1, count_include_pad=False)


def _chain(hidden: torch.Tensor, layers: Sequence[nn.Module]) -> torch.Tensor:
    for layer in layers:
        hidden = layer(hidden)
    return hidden


class _BlockA(nn.Module):
    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inputs, 64, 1)
        self.branch5x5_1 = _Conv(inputs, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(inputs, pooled, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        double = (self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        branches = [
            self.branch1x1(hidden),
            _chain(hidden, (self.branch5x5_1, self.branch5x5_2)),
            _chain(hidden, double),
            self.branch_pool(_average(hidden)),
        ]
        return torch.cat(branches, dim=1)


class _BlockB(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(inputs, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        double = (self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        branches = [
            self.branch3x3(hidden),
            _chain(hidden, double),
            F.max_pool2d(hidden, 3, stride=2),
        ]
        return torch.cat(branches, dim=1)


class _BlockC(nn.Module):
    def __init__(self, inputs: int, inner: int) -> None:
        super().__init__()
        wide, high = (0, 3), (3, 0)
        self.branch1x1 = _Conv(inputs, 192, 1)
        self.branch7x7_1 = _Conv(inputs, inner, 1)
        self.branch7x7_2 = _Conv(inner, inner, (1, 7), padding=wide)
        self.branch7x7_3 = _Conv(inner, 192, (7, 1), padding=high)
        self.branch7x7dbl_1 = _Conv(inputs, inner, 1)
        self.branch7x7dbl_2 = _Conv(inner, inner, (7, 1), padding=high)
        self.branch7x7dbl_3 = _Conv(inner, inner, (1, 7), padding=wide)
        self.branch7x7dbl_4 = _Conv(inner, inner, (7, 1), padding=high)
        self.branch7x7dbl_5 = _Conv(inner, 192, (1, 7), padding=wide)
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        double = (
            *(self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3),
            *(self.branch7x7dbl_4, self.branch7x7dbl_5),
        )
        branches = [
            self.branch1x1(hidden),
            _chain(hidden, (self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)),
            _chain(hidden, double),
            self.branch_pool(_average(hidden)),
        ]
        return torch.cat(branches, dim=1)


class _BlockD(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(inputs, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(inputs, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        long = (
            *(self.branch7x7x3_1, self.branch7x7x3_2),
            *(self.branch7x7x3_3, self.branch7x7x3_4),
        )
        branches = [
            _chain(hidden, (self.branch3x3_1, self.branch3x3_2)),
            _chain(hidden, long),
            F.max_pool2d(hidden, 3, stride=2),
        ]
        return torch.cat(branches, dim=1)


class _BlockE(nn.Module):
    def __init__(self, inputs: int, *, pools_maximum: bool) -> None:
        super().__init__()
        self._pools_maximum = pools_maximum
        self.branch1x1 = _Conv(inputs, 320, 1)
        self.branch3x3_1 = _Conv(inputs, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Conv(inputs, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Conv(inputs, 192, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        single = self.branch3x3_1(hidden)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(hidden))
        if self._pools_maximum:
            pooled = F.max_pool2d(hidden, 3, stride=1, padding=1)
        else:
            pooled = _average(hidden)
        branches = [
            self.branch1x1(hidden),
            *(self.branch3x3_2a(single), self.branch3x3_2b(single)),
            *(self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, dim=1)
