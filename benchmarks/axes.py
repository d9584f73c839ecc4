"""A step of every value of dynamics and objectives beside the same structure plain."""

import torch
from torch import nn

import finespun as fs
from benchmarks.measure import Line, Work, report, timed
from benchmarks.models import LINEARS, tokens
from finespun.contract.axis import AxisValue
from finespun.driver import Driver, prepare
from finespun.methods.dynamics import (
    GGPO,
    MGPO,
    ALLoRA,
    LoRAFA,
    LoRAPlus,
    LoRAPro,
    Muon,
    Riemannian,
)
from finespun.methods.objectives import GLAD, BALoRA

WIDTH, LAYERS, COUNT, RANK = 384, 2, 256, 8
STEPS = 10**6
VALUES: dict[str, AxisValue] = {
    "lora_plus": LoRAPlus(),
    "riemannian": Riemannian(),
    "lora_fa": LoRAFA(),
    "lora_pro light": LoRAPro(),
    "lora_pro full": LoRAPro(mode="full"),
    "lora_pro factored": LoRAPro(mode="factored"),
    "allora": ALLoRA(),
    "mgpo": MGPO(),
    "ggpo": GGPO(),
    "muon": Muon(),
    "ba_lora": BALoRA(),
    "glad": GLAD(),
    "glad every=5": GLAD(every=5),
}
STRUCTURES = {"lora": fs.LoRA(rank=RANK), "lsr": fs.LSR(rank=RANK, separation_rank=8)}


def language_model() -> nn.Module:
    """A random Llama with a head and a loss, the same every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=6,
    )
    return LlamaForCausalLM(config).requires_grad_(False).train()


def step(structure: fs.Structure, value: AxisValue | None) -> Work:
    """One whole step: forward, backward, hooks, optimiser."""
    model = language_model()
    adapter = fs.adapt(model, structure, LINEARS, ())
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.01 * torch.randn_like(p))
    prepared = prepare(model, "default", [] if value is None else [value], steps=STEPS)
    optimizer = prepared.optimizer(1e-4)
    driver = Driver(model, "default", optimizer, 1.0, prepared)
    ids = tokens(1, COUNT)

    def work() -> None:
        optimizer.zero_grad()
        driver.micro_batch(True, 1.0)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    work()
    return work


def measure() -> list[Line]:
    """Every value, the structure plain in turn with it."""
    lines = []
    for name, structure in STRUCTURES.items():
        for kind, value in VALUES.items():
            found = timed({"plain": step(structure, None), "ours": step(structure, value)})
            ratio = found.median("ours") / found.median("plain")
            note = f"{LAYERS} layers of width {WIDTH}, {COUNT} tokens, rank {RANK}"
            lines.append(
                Line.of(f"{kind} on {name}", found, "plain", f"{note}; {ratio:.2f} x plain")
            )
    return lines


if __name__ == "__main__":
    report(measure)
