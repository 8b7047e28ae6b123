"""UNICOM's vision transformer (An et al., ICLR 2023), under the names of its released files.

It has no class token: all tokens are flattened into one linear layer. So a network is made for one
size of image, and weights for it alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Width, blocks and heads by the letters in vit-LETTERS-PATCH.
SIZES = {
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
}
PATCHES = (4, 32)  # the smallest and the largest
DROP_PATH = 0.1  # share of the samples that skip the last block in training, as UNICOM trains


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # [B, tokens, 3 * width] -> three of [B, heads, tokens, width / heads]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.ReLU6()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Tokens [B, tokens, width] -> [B, tokens, width].

    In training a sample skips either half with probability `drop_path`, drawn from torch's global
    generator; what is left is scaled so that its mean stays.
    """

    def __init__(self, width: int, heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self.attn(self.norm1(x)))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x
        kept = 1 - self.drop_path
        return x * x.new_empty(len(x), 1, 1).bernoulli_(kept).div_(kept)


class PatchEmbedding(nn.Module):
    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Images float [B, 3, image_size, image_size] -> embeddings [B, embedding_size], not
    normalised.

    What follows the blocks is computed in the type of the weights, also under autocast, as UNICOM
    does.

    Args:
        image_size: side of the images in pixels; what is left over by the patches is not seen.
        patch: side of a patch.
        width, depth, heads: of tokens, of the network, of a block.
        embedding_size: of the output.
        drop_path: of the last block; it rises linearly from 0 in the first.
    """

    OUTPUT = "feature.2.weight"  # its first dimension is embedding_size

    def __init__(
        self,
        image_size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        embedding_size: int,
        drop_path: float = DROP_PATH,
    ) -> None:
        super().__init__()
        tokens = (image_size // patch) ** 2
        self.patch_embed = PatchEmbedding(patch, width)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, drop_path * i / max(depth - 1, 1)) for i in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(tokens * width, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size, eps=2e-5),
        )
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        with torch.autocast(x.device.type, enabled=False):
            x = self.norm(x.to(self.norm.weight.dtype))
            return self.feature(x.flatten(1))


# UNICOM's released networks: size of the images and of the embeddings.
RELEASED = (
    ("vit-b-32", 224, 512),
    ("vit-b-16", 224, 768),
    ("vit-l-14", 224, 768),
    ("vit-l-14", 336, 768),
)


def released_as(tensors: Mapping[str, Tensor]) -> str:
    """Which of the released networks tensors of these names and shapes belong to; "" if none."""
    for name, image_size, embedding_size in RELEASED:
        width, depth, _, patch = parsed(name)
        tokens = (image_size // patch) ** 2
        shapes = {
            "patch_embed.proj.weight": [width, 3, patch, patch],
            "pos_embed": [1, tokens, width],
            "feature.0.weight": [width, tokens * width],
            "feature.2.weight": [embedding_size, width],
        }
        found = {key: list(tensors[key].shape) for key in shapes if key in tensors}
        if found == shapes and f"blocks.{depth - 1}.norm1.weight" in tensors:
            return f"{name} at {image_size} px"
    return ""


def parsed(name: str) -> tuple[int, int, int, int]:
    """Width, blocks, heads and patch of vit-LETTERS-PATCH."""
    _, letters, patch = name.split("-")
    return (*SIZES[letters], int(patch))
