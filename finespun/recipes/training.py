"""The section of a recipe that says how to learn."""

from typing import Annotated, Literal

from pydantic import Field

from finespun.recipes.yaml import Section

HEAD_LR = 3e-3  # measured: docs/recipes.md


class Training(Section):
    """How to learn: AdamW, its learning rate over time, batches, and what is repeated exactly."""

    epochs: int = Field(3, ge=1)
    batch_size: int = Field(32, ge=1)
    accumulate: int = Field(1, ge=1, description="batches to a step")
    pack: bool = Field(False, description="with a prompt: a batch as one row, without padding")
    lr: float | None = Field(None, gt=0, description="null: the structure's own, 1e-3 for most")
    head_lr: Annotated[float, Field(gt=0)] | Literal["lr"] | None = Field(
        None,
        description="of modules trained whole, beside updates; lr: the same; null: 3e-3 for the "
        "untrained head, lr for modules that train_modules names",
    )
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_share: float = Field(
        0.06, ge=0, lt=1, description="the share of steps in which lr rises"
    )
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0: gradients are not clipped")
    max_length: int = Field(128, ge=1, description="tokens of a row; the rest is cut")
    seed: int = Field(0, ge=0, description="the head's start, the order of rows, dropout")
    threads: int | None = Field(None, ge=1, le=1024, description="null: as many as torch takes")
    device: str | None = Field(None, description="cpu, cuda, ...; null: a GPU where there is one")
    eval_batch_size: int = Field(64, ge=1)
    checkpoint_every: int | None = Field(None, ge=1, description="steps; null: every epoch")
    checkpoint_minutes: float | None = Field(
        10, gt=0, description="a checkpoint too when the last is so old; null: never"
    )
