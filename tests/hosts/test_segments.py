"""Packed batches and threads: who may change what the layers do, and for which positions."""

import threading

import pytest
import torch
from torch import nn

import finespun as fs
from finespun import hosts
from finespun.errors import InputError, StateError


class Packed(nn.Module):
    """Positions do not mix, so a packed batch must give what its pieces give alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.up = nn.Linear(8, 12)
        self.classifier = nn.Linear(12, 3)

    def forward(self, ids):
        return self.classifier(torch.tanh(self.up(self.table(ids))))


def two_adapters():
    torch.manual_seed(0)
    model = Packed()
    for name, structure in (("fr", fs.LoRA(rank=2)), ("de", fs.LSR(rank=2, separation_rank=2))):
        adapter = fs.adapt(
            model, structure, ["table", "up"], train_modules=["classifier"], name=name
        )
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return model


def alone(model, ids, name):
    fs.activate(model, name)
    return model(ids)


def test_each_segment_of_a_packed_batch_has_its_own_adapter():
    model, ids = two_adapters(), torch.randint(0, 20, (1, 11))
    names, lengths = ["fr", None, "de", "fr"], [4, 3, 3, 1]
    pieces = [alone(model, piece, name) for piece, name in zip(ids.split(lengths, dim=1), names)]
    with fs.rows(model, names, lengths):
        packed = model(ids)
    torch.testing.assert_close(packed, torch.cat(pieces, dim=1), atol=1e-6, rtol=1e-5)


def test_positions_may_lie_in_several_rows():
    model, ids = two_adapters(), torch.randint(0, 20, (2, 5))
    with fs.rows(model, ["fr", "de"], [7, 3]):
        packed = model(ids).flatten(0, 1)
    flat = ids.view(1, -1)
    torch.testing.assert_close(packed[:7], alone(model, flat[:, :7], "fr")[0])
    torch.testing.assert_close(packed[7:], alone(model, flat[:, 7:], "de")[0])


def test_positions_that_do_not_add_up_are_refused():
    model, ids = two_adapters(), torch.randint(0, 20, (1, 11))
    with fs.rows(model, ["fr", "de"], [4, 6]), pytest.raises(StateError, match="11 positions"):
        model(ids)
    with pytest.raises(InputError, match="2 names need as many lengths"):
        fs.rows(model, ["fr", "de"], [11]).__enter__()


def in_another_thread(work):
    seen = []

    def run():
        try:
            seen.append(work())
        except StateError as error:
            seen.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.parametrize("change", ["rows", "disabled"])
def test_another_thread_may_not_run_or_change_what_this_one_has_changed(change):
    model, ids = two_adapters(), torch.randint(0, 20, (2, 5))
    context = fs.rows(model, ["fr", None]) if change == "rows" else fs.disabled(model)
    with context:
        inside = model(ids)
        assert "another thread" in str(in_another_thread(lambda: model(ids)))
        assert "another thread" in str(in_another_thread(lambda: fs.disabled(model).__enter__()))
        assert torch.equal(model(ids), inside)
    assert torch.equal(in_another_thread(lambda: model(ids)), model(ids))


def test_rows_wait_while_another_thread_runs_the_model():
    model, ids = two_adapters(), torch.randint(0, 20, (2, 5))
    said = []

    def peek(*_):
        said.append(in_another_thread(lambda: fs.rows(model, ["fr", None]).__enter__()))

    handle = model.up.register_forward_pre_hook(peek)
    model(ids)
    handle.remove()
    assert "another thread is using this model" in str(said[0])
    with fs.rows(model, ["fr", None]):
        model(ids)


CHANGES = {
    "activate": lambda model: fs.activate(model, "fr"),
    "activate none": lambda model: fs.activate(model, None),
    "merge": lambda model: hosts.merge(model, {"de": 1.0}),
    "evict": lambda model: fs.evict(model, "fr"),
    "detach": lambda model: fs.Adapter(model, "fr").detach(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_changes_while_another_thread_runs_the_model(change):
    """Half a pass with one adapter and half with another would be nobody's output."""
    model, ids = two_adapters(), torch.randint(0, 20, (2, 5))
    fs.activate(model, "de")
    y, said = model(ids), []
    handle = model.up.register_forward_pre_hook(
        lambda *_: said.append(in_another_thread(lambda: change(model)))
    )
    assert torch.equal(model(ids), y)
    handle.remove()
    assert "another thread is using this model" in str(said[0])
    assert torch.equal(model(ids), y)
    assert not isinstance(in_another_thread(lambda: change(model)), StateError)


def test_rows_cannot_be_merged_into():
    model, ids = two_adapters(), torch.randint(0, 20, (2, 5))
    with fs.rows(model, ["fr", None]):
        y = model(ids)
        with pytest.raises(StateError, match=r"leave rows\(\) before merging"):
            fs.Adapter(model, "fr").merge()
        assert torch.equal(model(ids), y)


def test_two_threads_train_as_one_would():
    """Factors that are formed for a pass belong to the thread that runs it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)))
    adapter = fs.adapt(model, fs.LSR(rank=4, separation_rank=2), [str(i) for i in range(8)])
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn_like(p))
    batches, turn = [torch.randn(4, 16) for _ in range(2)], threading.Barrier(2)

    def gradients(i):
        loss = model(batches[i]).square().sum()
        return torch.autograd.grad(loss, adapter.parameters())

    wanted = [gradients(i) for i in range(2)]
    found = {}

    def work(i):
        found[i] = gradients(i)

    handle = model[3].register_forward_pre_hook(lambda *_: (turn.wait(timeout=30), None)[1])
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    for i in range(2):
        for a, b in zip(found[i], wanted[i]):
            torch.testing.assert_close(a, b)


def test_two_threads_give_what_one_gives():
    model = two_adapters().eval()
    batches = [torch.randint(0, 20, (2, 5)) for _ in range(40)]
    with torch.no_grad():
        wanted = [model(ids) for ids in batches]

    @torch.no_grad()
    def work():
        return [model(ids) for ids in batches]

    found = {}
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, work())) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs in found.values():
        assert all(torch.equal(a, b) for a, b in zip(outputs, wanted))
    assert len(found) == 2
