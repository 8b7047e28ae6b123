"""The encoder of the demo: a small convolutional network for small images."""

from __future__ import annotations

from torch import Tensor, nn

SMALLEST = 32  # images; four pixels are left of their side at the end


class Encoder(nn.Module):
    """Images float [B, channels, s, s] in [0, 1] -> embeddings [B, embedding_size], not normalised.

    Four convolutions, `width` to 8 * `width` channels. The last feature map is brought to 4 x 4,
    which it is for images of 32 pixels, and flattened, not averaged: where a stroke is matters as
    much as that it is there.
    """

    OUTPUT = "layers.15.weight"  # its first dimension is embedding_size

    def __init__(self, embedding_size: int = 128, width: int = 16, channels: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_convolution(channels, width, kernel=5, stride=2),  # 16 x 16 of 32 x 32
            *_convolution(width, 2 * width),
            nn.MaxPool2d(2),  # 8 x 8
            *_convolution(2 * width, 4 * width),
            nn.MaxPool2d(2),  # 4 x 4
            *_convolution(4 * width, 8 * width),
            # In one, so that the names of what follows are those in checkpoints.
            nn.Sequential(_ToFourByFour(), nn.Flatten()),
            nn.Linear(8 * width * 16, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),  # no direction outweighs the others in a cosine
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class _ToFourByFour(nn.AdaptiveAvgPool2d):
    """Leaves a map alone that is 4 x 4: as a mean of single pixels its gradient takes as long as
    the last product's."""

    def __init__(self) -> None:
        super().__init__(4)

    def forward(self, images: Tensor) -> Tensor:
        return images if images.shape[-2:] == (4, 4) else super().forward(images)


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]
