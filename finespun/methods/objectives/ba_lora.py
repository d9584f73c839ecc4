"""BA-LoRA: near to the base, not collapsed, and few strong directions, seen in the logits."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from finespun.contract import Need, Objective, Setup, StepContext, TrainingHooks, register
from finespun.contract.structure import must_be_one_of, must_be_positive
from finespun.errors import InputError, TrainingError
from finespun.methods.objectives.pieces.outputs import (
    concentration,
    consistency,
    correlation,
    distance,
    negative_entropy,
)

Head = Literal["own", "fresh", "warm"]
PENALTIES = {  # of consistency, diversity, spectrum
    ("2026", True): (0.025, 0.005, 0.005),
    ("2026", False): (0.15, 0.03, 0.03),
    ("2024", True): (1e-4, 3e-4, 1e-4),
    ("2024", False): (1e-4, 3e-4, 1e-4),
}
WARM, QUIET, RAMP = 0.1, 0.2, 0.05  # shares of the run
CLASSES = "ba_lora needs logits of 2 classes or more, (rows, classes) or (rows, tokens, vocabulary)"


@register
@dataclass(frozen=True, kw_only=True)
class BALoRA(Objective):
    """L + l1 · CR + l2 · DR + l3 · SR on logits Z of the model, Z_P of its base.

    Good for: small or unbalanced data that pull a model from what its base knows.
    Not for: forgetting on purpose; models of one output.

    CR = T² KL(Z_P ‖ Z); DR = off-diagonal covariance of the classes, or −entropy of the `top`
    largest logits of a token; SR = −Σ_{i≤k} s_i / Σ s_i, or / ‖Z‖_F for tokens. Only tokens that
    are predicted count, at most `tokens` of them, drawn, in DR and SR of a language model. Weights,
    k and T are those of the version and of the kind of model unless given; a language model's l1
    falls by a cosine to a tenth, l2 and l3 are 0 for a fifth of the run and full after a quarter.
    The teacher's trained modules: head="own", the present ones on the base's features; "fresh",
    those of the base; "warm", the run's after a tenth of its steps, without CR until then.
    """

    version: str = "2026"
    consistency: float | None = None
    diversity: float | None = None
    spectrum: float | None = None
    k: int | None = None
    temperature: float | None = None
    top: int = 20
    tokens: int = 512
    head: Head = "own"

    kind = "ba_lora"
    title = "BA-LoRA"
    source = "arXiv 2408.04556"

    def __post_init__(self) -> None:
        must_be_one_of("version", self.version, ("2026", "2024"))
        must_be_one_of("head", self.head, get_args(Head))
        must_be_positive(
            k=(self.k, 5),
            temperature=(self.temperature, 2.0),
            top=(self.top, 20),
            tokens=(self.tokens, 512),
        )
        for name in ("consistency", "diversity", "spectrum"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name}={value} must be 0 or positive; try 0.03")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.ROOT_LOSS, Need.TEACHER})

    def weights(self, language: bool, share: float) -> tuple[float, float, float]:
        """l1, l2, l3 after a share of the run."""
        given = self.consistency, self.diversity, self.spectrum
        usual = PENALTIES[self.version, language]
        l1, l2, l3 = (u if g is None else g for g, u in zip(given, usual))
        if self.version == "2026" and language:
            l1 *= 0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2
            ramp = min(1.0, max(0.0, (share - QUIET) / RAMP))
            l2, l3 = l2 * ramp, l3 * ramp
        return l1, l2, l3

    def hooks(self) -> "Regularised":
        return Regularised(self)


class Regularised(TrainingHooks):
    """The extra loss of one run; the warm teacher's modules are kept in checkpoints."""

    def __init__(self, form: BALoRA) -> None:
        self.form, self.steps = form, 1
        self.heads: dict[str, Tensor] = {}

    def prepare(self, setup: Setup) -> None:
        self.steps = setup.steps

    def before_step(self, context: StepContext) -> None:
        if self.form.head == "warm" and not self.heads and context.step >= WARM * self.steps:
            self.heads = context.snapshot()

    def extra_loss(self, context: StepContext, batch: Any, outputs: Any) -> Tensor | None:
        form, logits = self.form, getattr(outputs, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim not in (2, 3) or logits.shape[-1] < 2:
            seen = None if logits is None else tuple(getattr(logits, "shape", ()))
            raise TrainingError(f"{CLASSES}; the model returns {seen}")
        language = logits.ndim == 3
        l1, l2, l3 = form.weights(language, context.step / self.steps)
        rows = valid(batch, logits) if language else None
        Z = chosen(logits, rows)
        loss = Z.new_zeros(())
        if form.head == "warm" and context.step < WARM * self.steps:
            l1 = 0.0
        if l1 > 0 and len(Z):
            heads: Any = self.heads if form.head == "warm" else form.head
            base = chosen(context.teacher(batch, heads).logits, rows)
            loss = loss + l1 * self.near(Z, base, language, len(logits))
        g = context.generator("rows", context.step, context.micro)
        if language and len(Z) > form.tokens:
            Z = Z[torch.randperm(len(Z), generator=g)[: form.tokens].to(Z.device)]
        if len(Z) < 2:
            return loss
        k = form.k or (3 if form.version == "2024" else 10 if language else 5)
        by_norm = language and form.version == "2026"
        if l2 > 0:
            top = form.top if form.version == "2026" else None
            loss = loss + l2 * (negative_entropy(Z, top) if language else correlation(Z))
        if l3 > 0:
            loss = loss + l3 * concentration(Z, k, by_norm, g)
        return loss

    def near(self, Z: Tensor, base: Tensor, language: bool, rows: int) -> Tensor:
        """CR of the version."""
        old = self.form.version == "2024"
        if old and not language:
            return distance(Z, base)
        T = self.form.temperature or (1.0 if old else 2.0)
        found = consistency(Z, base, T)
        return found * len(Z) / rows if old else found

    def state_dict(self) -> dict[str, Any]:
        return {"heads": dict(self.heads)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.heads = dict(state["heads"])


def valid(batch: Any, logits: Tensor) -> Tensor:
    """Which positions of Z[:, :-1] predict a token that counts. Raises TrainingError where the
    batch has no labels."""
    labels = batch.get("labels") if isinstance(batch, dict) else None
    if not isinstance(labels, Tensor):
        raise TrainingError("ba_lora needs the labels of a language model in the model's batch")
    if labels.shape != logits.shape[:2]:
        raise TrainingError(
            f"ba_lora: labels {tuple(labels.shape)} do not go with logits {tuple(logits.shape)}"
        )
    return labels[:, 1:] != -100


def chosen(logits: Tensor, rows: Tensor | None) -> Tensor:
    """(rows, classes) in float32 at least."""
    Z = logits if rows is None else logits[:, :-1][rows.to(logits.device)]
    return Z.to(torch.promote_types(Z.dtype, torch.float32))
