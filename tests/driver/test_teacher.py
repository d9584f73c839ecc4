"""The teacher, and the second pass over a step's micro-batches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hook_toys import Noise
from suite import draw
from test_hooks import LORA, LSR, Losing, ready, rows, step
from test_slots import Asking
from torch.utils.checkpoint import checkpoint

import finespun as fs
from finespun.contract import Need, TrainingHooks
from finespun.driver import Driver, prepare
from finespun.errors import InputError


# --- teacher and second pass ----------------------------------------------------------------------
class Taught(TrainingHooks):
    """Asks the teacher in every extra loss and keeps what it said."""

    needs = frozenset({Need.TEACHER, Need.ROOT_LOSS})

    def __init__(self, heads="own"):
        self.heads, self.said = heads, []

    def begin(self, context):
        self.snapshot = context.snapshot()

    def extra_loss(self, context, batch, outputs):
        heads = self.snapshot if self.heads == "snapshot" else self.heads
        z = context.teacher(batch, heads).logits
        self.said.append(z)
        assert not z.requires_grad
        return (outputs.logits - z).square().mean()


@pytest.mark.parametrize("heads", ["own", "fresh", "snapshot"])
def test_the_teacher_is_the_base_with_the_heads_that_are_asked_for(heads):
    model = Losing()
    plain = copy.deepcopy(model).eval()
    adapter = fs.adapt(model, fs.LoRA(rank=3, dropout=0.5), ["up", "down"], ("inner.head",))
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.add_(draw(*p.shape, seed=i) / 9)
    taught = Taught(heads)
    start = copy.deepcopy(adapter.attached.copies["inner.head"])
    prepared = prepare(model.train(), "default", [taught, Noise()])
    optimizer = prepared.optimizer(0.05)
    with Driver(model, "default", optimizer, 0.0, prepared):
        for seed in (1, 2):
            modes = [m.training for m in model.modules()]
            own = copy.deepcopy(adapter.attached.copies["inner.head"])
            torch.manual_seed(7)
            step(model, optimizer, seed)
            told = torch.rand(3)
            assert [m.training for m in model.modules()] == modes
            plain.inner.head = {"own": own, "snapshot": start}.get(heads, plain.inner.head)
            assert torch.equal(taught.said[-1], plain(**rows(10 * seed)).logits)
    taught.said.clear()
    torch.manual_seed(7)
    model(**rows(20)).loss.backward()
    assert torch.equal(torch.rand(3), told)
    assert not taught.said


def test_the_teacher_does_not_disturb_a_recomputation():
    class Deep(Losing):
        def forward(self, x, labels=None):
            from transformers.modeling_outputs import SequenceClassifierOutput

            run = (
                self.inner
                if not self.training
                else lambda h: checkpoint(self.inner, h, use_reentrant=False)
            )
            logits = run(x)
            return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)

    grads = []
    for kind in (Losing, Deep):
        model, adapter, _, _ = ready(Taught(), structure=LSR, model=kind())
        model(**rows(1)).loss.backward()
        grads.append([p.grad for p in adapter.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_heads_that_do_not_fit_are_refused():
    model, adapter, _, _ = ready(Asking(lambda c: None, Need.TEACHER), structure=LORA)
    model(**rows(1))
    context = _driver_context(model, adapter)
    for heads, told in (("his", "'own', 'fresh' or"), ({"x/weight": torch.ones(1)}, "'x/weight'")):
        with pytest.raises(InputError, match=told):
            context.teacher(rows(1), heads)


def _driver_context(model, adapter):
    hooks = Asking(lambda c: None, Need.TEACHER)
    return Driver(model, "default", torch.optim.SGD(adapter.parameters()), 0.0, [hooks]).contexts[0]


def test_the_second_pass_is_the_first_once_more():
    class Again(TrainingHooks):
        needs = frozenset({Need.REPLAY})

        def gradients_ready(self, context):
            mine = context.adapter.parameters()
            self.first = [p.grad.clone() for p in mine]
            self.second = [torch.zeros_like(p) for p in mine]
            for batch, share in context.replay():
                loss = context.call(batch).loss * share
                for total, g in zip(self.second, torch.autograd.grad(loss, mine)):
                    total += g

    again = Again()
    model, _, optimizer, driver = ready(again, Noise(), structure=fs.LoRA(rank=3, dropout=0.5))
    for seed in (1, 2):
        optimizer.zero_grad()
        for micro, share in enumerate((0.25, 0.75)):
            driver.micro_batch(first=micro == 0, share=share)
            (model(**rows(10 * seed + micro)).loss * share).backward()
        before = torch.get_rng_state()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)
        for a, b in zip(again.first, again.second):
            torch.testing.assert_close(a, b)
            assert a.norm() > 1e-4
