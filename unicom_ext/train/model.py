"""The encoder of the demo: a small convolutional network for 32 x 32 images."""

from __future__ import annotations

from torch import Tensor, nn


class Encoder(nn.Module):
    """Images float [B, channels, 32, 32] in [0, 1] -> embeddings [B, embedding_size].

    They are not normalised. Four convolutions, `width` to 8 * `width` channels. The last feature
    map (4 x 4) is flattened, not averaged: where a stroke is matters as much as that it is there.
    """

    def __init__(self, embedding_size: int = 128, width: int = 16, channels: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_convolution(channels, width, kernel=5, stride=2),  # 16 x 16
            *_convolution(width, 2 * width),
            nn.MaxPool2d(2),  # 8 x 8
            *_convolution(2 * width, 4 * width),
            nn.MaxPool2d(2),  # 4 x 4
            *_convolution(4 * width, 8 * width),
            nn.Flatten(),
            nn.Linear(8 * width * 16, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),  # no direction outweighs the others in a cosine
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]
