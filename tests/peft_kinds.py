"""A tiny model with a layer of every kind that PEFT's LoRA adapts, for the tests of its format."""

import torch
from torch import Tensor, nn

IDS = torch.arange(24).view(3, 8) % 11


class Kinds(nn.Module):
    """Embedding, linear, Conv1D, norm, two convolutions and a head; parameters by a formula."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 8)
        self.fc = Conv1D(8, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv2d(2, 3, (3, 1), padding=(1, 0))
        self.one = nn.Conv2d(3, 2, 1)
        self.head = nn.Linear(8, 3)
        for i, number in enumerate(self.parameters()):
            wave = torch.arange(number.numel(), dtype=torch.float64) * (1.7 + i)
            number.data = (wave.sin() / 2).float().view(number.shape)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.fc(torch.tanh(self.up(self.embed(ids)))))
        h = h + self.one(self.conv(torch.stack([h, h.flip(1)], 1))).mean(1)
        out: Tensor = self.head(h)
        return out


KINDS = ["conv", "embed", "fc", "one", "up"]
CASES = {
    "kinds": {"target_modules": KINDS},
    "patterns": {
        "target_modules": KINDS,
        "rank_pattern": {"e.*": 3, "^up": 1, "one|fc": 2},
        "alpha_pattern": {"conv": 5, "u.": 7},
        "use_rslora": True,
    },
    "dora": {"target_modules": KINDS, "use_dora": True, "lora_alpha": 3},
    "dora, rslora": {"target_modules": ["up"], "use_dora": True, "use_rslora": True},
    "bias": {"target_modules": ["up"], "bias": "all", "modules_to_save": ["head"]},
    "own bias": {"target_modules": ["up", "conv", "fc"], "bias": "lora_only"},
    "dora, bias": {"target_modules": ["up", "conv"], "bias": "all", "use_dora": True},
    "saved": {"target_modules": ["fc"], "modules_to_save": ["head", "norm"]},
    "tokens": {"target_modules": ["up"], "trainable_token_indices": {"embed": [7, 2]}},
    "table": {"target_modules": ["embed"], "token_indices": [7, 2]},
}
