"""What stands on, or in, a frozen network: the projection head of the towers, and LoRA."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """(B, d_in) → (B, d_out): h = W1 x + b1; LayerNorm(Dropout(W2 GELU(h) + b2) + h). Parameters in that order."""

    def __init__(self, d_in: int, d_out: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.projection = nn.Linear(d_in, d_out)
        self.fc = nn.Linear(d_out, d_out)
        self.norm = nn.LayerNorm(d_out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, texts: Tensor) -> Tensor:
        hidden = self.projection(texts)
        return self.norm(self.dropout(self.fc(F.gelu(hidden))) + hidden)


class LoRALinear(nn.Module):
    """A frozen linear layer plus (alpha / rank) · B A; A (rank, in) is random, B (out, rank) zero: it starts as is."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.A), self.B) * self.scale

    # Some attention layers read the weights of their linear layers instead of calling them.
    @property
    def weight(self) -> Tensor:
        return self.linear.weight + self.B @ self.A * self.scale

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias
