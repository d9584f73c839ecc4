"""Methods that reach the layers without the root's forward; torch's own uses of a model."""

import pytest
import torch
from suite import relative, stir
from tiny import built, reals, words
from torch import nn
from torch.nn.functional import cross_entropy

import finespun as fs
from finespun.errors import StateError

LSR = fs.LSR(rank=4, separation_rank=3)


def two(model, targets="attention"):
    """Adapters "one" and "two", stirred."""
    for seed, name in enumerate(("one", "two")):
        stir(fs.adapt(model, LSR, targets, (), name).parameters(), 3 + seed)
    return model


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_of_an_encoder_and_decoder(beams):
    model, plain, ids = two(built("t5")), built("t5"), words(3)
    options = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    alone = {}
    for name in ("one", "two", None):
        fs.activate(model, name)
        alone[name] = model.generate(ids, **options)
    assert torch.equal(alone[None], plain.generate(ids, **options))
    with fs.rows(model, ["one", None, "two"]):
        mixed = model.generate(ids, **options)
    for i, name in enumerate(("one", None, "two")):
        assert torch.equal(mixed[i], alone[name][i]), (beams, name)
    assert len({tuple(a.flatten().tolist()) for a in alone.values()}) == 3


@torch.no_grad()
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_generate_repeats_the_rows_it_is_given_and_no_others(family):
    model, ids = two(built(family)), words(4)
    fs.activate(model, "one")
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    wanted = model.generate(ids, num_beams=2, num_return_sequences=2, **options)
    with fs.rows(model, ["one"] * 4):
        got = model.generate(ids, num_beams=2, num_return_sequences=2, **options)
    assert torch.equal(got, wanted)
    assert "generate" not in model.__dict__
    for names in (["one"], ["one", "two"], ["one"] * 3):
        message = f"given 4 rows .* names {len(names)}"
        with pytest.raises(StateError, match=message), fs.rows(model, names):
            model.generate(ids, **options)
        with pytest.raises(StateError, match=message), fs.rows(model, names):
            model.generate(inputs=ids, **options)


def features(model):
    found = model.get_text_features(words()), model.get_image_features(reals(3, 3, 8, 8))
    return [getattr(f, "pooler_output", f) for f in found]


def test_features_of_clip_are_adapted_trained_and_routed():
    model, plain = two(built("clip")), built("clip")
    fs.activate(model, "one")
    first = features(model)
    with torch.no_grad():
        base = features(plain)
        assert all(relative(a, b) > 1e-3 for a, b in zip(first, base))
        assert all(relative(a, b) < 1e-6 for a, b in zip(features(model), first))
        with fs.rows(model, ["one", None, "one"]):
            mixed = features(model)
        for got, adapted, own in zip(mixed, first, base):
            assert relative(got[[0, 2]], adapted[[0, 2]]) < 1e-5
            assert relative(got[1], own[1]) < 1e-6
    one = fs.Adapter(model, "one").make_trainable()
    sum(f.sum() for f in features(model)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in one.parameters())
    with torch.no_grad():
        for p in one.parameters():
            p.mul_(0.5)
    assert all(relative(a, b) > 1e-3 for a, b in zip(features(model), first))


def test_a_step_of_the_privacy_engine_clips_each_row():
    from opacus import PrivacyEngine

    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).train()
    adapter = fs.adapt(model, fs.LSR(rank=2, separation_rank=3), ["0", "2"])
    stir(adapter.parameters())
    data = torch.utils.data.TensorDataset(reals(4, 12) * 5, torch.arange(4) % 3)
    before = [p.detach().clone() for p in adapter.parameters()]
    rows = []
    for x, goal in data:
        loss = cross_entropy(model(x[None]), goal[None])
        rows.append(torch.autograd.grad(loss, adapter.parameters()))
    norms = [torch.cat([g.flatten() for g in row]).norm() for row in rows]
    limit = float(torch.stack(norms).min()) * 0.5
    wanted = [
        sum(row[k] * limit / n for row, n in zip(rows, norms)) / 4 for k in range(len(before))
    ]

    private, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(adapter.parameters(), lr=1.0),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=0.0,
        max_grad_norm=limit,
        poisson_sampling=False,
    )
    for x, goal in loader:
        optimizer.zero_grad()
        cross_entropy(private(x), goal).backward()
        optimizer.step()
    for old, new, step in zip(before, adapter.parameters(), wanted):
        assert relative(old - new, step) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_may_move_after_adapting(dtype):
    model = two(built("bert")).eval()
    fs.activate(model, "one")
    with torch.no_grad():
        y = model(words()).logits
        model.to(dtype)
        assert model(words()).logits.dtype == dtype
        assert relative(model(words()).logits, y) < (1e-5 if dtype == torch.float64 else 0.1)
    model.to("meta")
    assert {p.device.type for p in fs.Adapter(model, "two").parameters()} == {"meta"}
