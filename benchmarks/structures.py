"""A training step of every structure: against PEFT's own where PEFT has it, else our LoRA's.

PEFT writes its adapter to a folder, we read it: both then compute the same function. The peak is
that of memory allocated during a step, above what stands before it. Where PEFT is faster, the note
names the operators that take the time on both sides.
"""

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import peft
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import finespun as fs
from benchmarks.measure import Line, Work, report, timed
from benchmarks.models import hidden, llama, same, tokens
from benchmarks.training_step import step, trained

WIDTH, LAYERS, COUNT, RANK = 384, 2, 256, 8
TARGETS = ["q_proj", "v_proj"]
SHOWN = 3


def theirs() -> Mapping[str, peft.PeftConfig]:
    """PEFT's configs, each at a size near LoRA's of rank 8 where it can be chosen."""
    b = WIDTH // 12
    return {
        "lora": peft.LoraConfig(r=RANK, lora_alpha=2 * RANK),
        "dora": peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, use_dora=True),
        "gralora": peft.GraloraConfig(r=RANK, gralora_k=2),
        "hira": peft.HiraConfig(r=RANK),
        "delora": peft.DeloraConfig(r=RANK),
        "miss": peft.MissConfig(r=2 * RANK),
        "shira": peft.ShiraConfig(r=RANK),
        "loha": peft.LoHaConfig(r=RANK // 2, alpha=RANK),
        "lokr": peft.LoKrConfig(r=RANK, alpha=2 * RANK),
        "vera": peft.VeraConfig(r=32),
        "randlora": peft.RandLoraConfig(r=4 * RANK),
        "vblora": peft.VBLoRAConfig(r=4, num_vectors=64, vector_length=b),
        "fourierft": peft.FourierFTConfig(n_frequency=1000),
        "c3a": peft.C3AConfig(block_size=2 * b),
        "oft": peft.OFTConfig(oft_block_size=b),
        "boft": peft.BOFTConfig(boft_block_size=b),
        "ia3": peft.IA3Config(feedforward_modules=[]),
    }


# VeRA and RandLoRA are timed as what we train, whose frozen numbers are drawn in another way than
# PEFT's: sizes are equal, outputs are not compared here but in the tests.
DRAWN = {"vera": {"rank": 32}, "randlora": {"rank": 4 * RANK}}
OWN: Mapping[str, Mapping[str, Any]] = {
    "lsr": {"rank": RANK},
    "lora_xs": {"rank": 2 * RANK},
    "nola": {"k": 512},
    "unilora": {"size": 2048},
    "tera": {},
    "block_lora": {},
    "s2_lora": {"rank": RANK},
    "tied_lora": {"rank": RANK},
    "melora": {"rank": RANK},
    "mora": {"rank": RANK},
    "krona": {},
    "kadaptation": {},
}


def ours_and_theirs(kind: str, config: peft.PeftConfig, folder: str) -> tuple[nn.Module, nn.Module]:
    """PEFT's stirred model, and ours with the very same adapter."""
    config.target_modules = list(TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(llama(WIDTH, LAYERS), config).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trained(wrapped):
            p.add_(torch.randn_like(p) * 0.01)
    model = llama(WIDTH, LAYERS)
    if kind in DRAWN:
        fs.adapt(model, fs.make(kind, **DRAWN[kind]), TARGETS, ())
        return model.train(), wrapped
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
        fs.load(model, folder, trainable=True)
    return model.train(), wrapped


def peak(work: Work) -> float:
    """Megabytes that a step allocates at most, above what stands before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most / 2**20


def heaviest(work: Work) -> str:
    """The operators with most time of their own, and their shares."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    rows = sorted(seen.key_averages(), key=lambda e: e.self_cpu_time_total, reverse=True)
    whole = sum(e.self_cpu_time_total for e in rows)
    return ", ".join(
        f"{e.key.removeprefix('aten::')} {e.self_cpu_time_total / whole:.0%} in {e.count}"
        for e in rows[:SHOWN]
    )


def beside_peft() -> Iterator[Line]:
    ids = tokens(1, COUNT)
    for kind, config in theirs().items():
        with tempfile.TemporaryDirectory() as folder:
            mine, wrapped = ours_and_theirs(kind, config, folder)
        if kind not in DRAWN:
            same(hidden(mine, ids), hidden(wrapped, ids), f"hidden states of {kind}")
        arms = {
            "ours": step(mine, ids, trained(mine)),
            "PEFT": step(wrapped, ids, trained(wrapped)),
        }
        found = timed(arms)
        memory = {name: peak(arm) for name, arm in arms.items()}
        note = f"peak {memory['ours']:.0f} MB, PEFT's {memory['PEFT']:.0f} MB"
        line = Line.of(kind, found, note=note)
        if line.ratio < 1.0:
            told = {name: heaviest(arm) for name, arm in arms.items()}
            note += f"; ours: {told['ours']}; PEFT: {told['PEFT']}"
        yield Line.of(kind, found, note=f"{kind}: {note}")


def beside_lora() -> Iterator[Line]:
    ids = tokens(1, COUNT)
    plain = llama(WIDTH, LAYERS).train()
    fs.adapt(plain, fs.LoRA(rank=RANK), TARGETS, ())
    for kind, options in OWN.items():
        model = llama(WIDTH, LAYERS).train()
        fs.adapt(model, fs.make(kind, **options), TARGETS, ())
        arms = {
            "ours": step(model, ids, trained(model)),
            "LoRA": step(plain, ids, trained(plain)),
        }
        found = timed(arms)
        note = f"{kind}: peak {peak(arms['ours']):.0f} MB, LoRA's {peak(arms['LoRA']):.0f} MB"
        yield Line.of(kind, found, "LoRA", note=note)


def measure() -> list[Line]:
    """Every structure once: 2 layers of width 384, 256 tokens, updates on q and v."""
    return [*beside_peft(), *beside_lora()]


if __name__ == "__main__":
    report(measure)
