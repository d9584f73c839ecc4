"""`fs.integrations.keep_adapter`: Accelerate's states hold the adapter, and resume is exact."""

import pytest
import torch
from tiny import built
from torch import nn

import finespun as fs
from finespun.driver import Driver
from finespun.errors import FinespunError
from finespun.integrations import keep_adapter

pytestmark = pytest.mark.slow
IDS = torch.tensor([[4 + (i + j) % 30 for j in range(6)] for i in range(4)])


class Run:
    """A loop on Accelerate, with another small model beside the adapted one."""

    def __init__(self, rank=2):
        from accelerate import Accelerator

        torch.manual_seed(1)
        self.accelerator = Accelerator(cpu=True)
        model = built("llama").train()
        self.adapter = fs.adapt(model, fs.LoRA(rank=rank), "all-linear")
        self.other = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(self.adapter.parameters(), 1e-2)
        self.driver = Driver(model, "default", optimizer)
        keep_adapter(self.accelerator, self.adapter, self.driver)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.accelerator.prepare(self.other)

    def steps(self, count):
        for _ in range(count):
            self.optimizer.zero_grad()
            self.accelerator.backward(self.model(IDS, labels=IDS).loss)
            self.optimizer.step()

    def values(self):
        return [p.detach().clone() for p in self.adapter.parameters()]


def test_a_state_holds_the_adapter_and_resumes_bit_equal(tmp_path):
    whole = Run()
    whole.steps(2)
    whole.accelerator.save_state(str(tmp_path / "state"))
    kept = whole.other.weight.detach().clone()
    whole.steps(2)
    held = sum(p.stat().st_size for p in tmp_path.rglob("model*.safetensors"))
    assert held < 1000  # the other model alone
    again = Run()
    again.accelerator.load_state(str(tmp_path / "state"))
    assert again.driver.step == 2
    assert torch.equal(again.other.weight, kept)
    again.steps(2)
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), again.values()))
    plain = built("llama")
    fs.load(plain, tmp_path / "state")
    with pytest.raises(FinespunError, match="expected"):
        Run(rank=3).accelerator.load_state(str(tmp_path / "state"))


def test_a_state_without_the_adapter_is_refused(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(built("llama"))
    accelerator.save_state(str(tmp_path))
    with pytest.raises(FinespunError, match=r"holds no adapter\.json"):
        Run().accelerator.load_state(str(tmp_path))
