"""The shared suite, part five: what the rest of the world does to a model while it is adapted."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from suite import (
    CASES,
    DEVICE,
    FEW,
    adapted,
    batch,
    bytes_of,
    draw,
    every,
    net,
    one_of_each_kind,
    per_sample,
    relative,
    same,
    stir,
    stirred,
    twin,
)

import finespun as fs
from finespun import hosts


def bert(**options):
    """A tiny BERT classifier in eval mode."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        num_labels=3,
        **options,
    )
    return transformers.BertForSequenceClassification(config).to(DEVICE).eval()


def llama():
    """A tiny decoder in eval mode."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).to(DEVICE).eval()


def attach(case, model, train=(), name="default"):
    """The case's adapter on a transformer, stirred."""
    targets = r".*\.layers?\.\d" if case.block else ["query", "value", "q_proj", "v_proj"]
    if not case.block:
        kinds = {n.rsplit(".", 1)[-1] for n, _ in model.named_modules()}
        targets = [t for t in targets if t in kinds]
    adapter = fs.adapt(model, case.structure, targets, train, name, exact_start=case.exact_start)
    stir(adapter.parameters(), seed=3 + len(name))
    return adapter


def words(rows=3, vocabulary=30):
    return torch.randint(3, vocabulary, (rows, 7), generator=torch.Generator().manual_seed(4)).to(
        DEVICE
    )


# --- copies ---------------------------------------------------------------------------------------


@every()
def test_a_deep_copy_is_independent(case):
    model, adapter = stirred(case, net(), ("head",))
    x = batch()
    y, before = model(x), bytes_of(model)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), y)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    theirs = fs.Adapter(other, "default")
    stir(theirs.parameters(), seed=40)
    assert relative(other(x), y) > 1e-4
    theirs.detach()
    assert {type(m) for m in other.modules()} == {type(m) for m in net().modules()}
    assert torch.equal(other(x), net()(x))
    assert torch.equal(model(x), y)
    assert same(bytes_of(model), before)
    assert adapter.name in fs.hosts.adapter_set_of(adapter.model).attached


@every()
def test_a_pickle_of_ones_own_comes_back(case):
    model, _ = stirred(case, net(), ("head",))
    x, y = batch(), None
    y = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(other(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    with hosts.disabled(other):
        assert torch.equal(other(x), net()(x))
    fs.Adapter(other, "default").detach()
    assert torch.equal(other(x), net()(x))


# --- precision ------------------------------------------------------------------------------------


@every()
def test_precision_of_the_base_and_of_the_trained_numbers(case):
    model, adapter = stirred(case, net(), ("head",))
    x, y = batch(), None
    y = model(x)
    numbers = [p.detach().clone() for d in adapter.deltas.values() for p in d.trained_parameters()]
    model.to(torch.bfloat16)
    assert model.blocks[0].up.weight.dtype == torch.bfloat16
    own = [p for d in adapter.deltas.values() for p in d.trained_parameters()]
    assert all(p.dtype == torch.float32 and torch.equal(p, q) for p, q in zip(own, numbers))
    half = model(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert relative(half, y) < 5e-2
    half.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in own)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        model.float()
        assert relative(model(x), y) < 5e-2
    model.double()
    assert all(p.dtype == torch.float64 for p in adapter.parameters())
    assert model(x.double()).dtype == torch.float64


# --- compiled -------------------------------------------------------------------------------------


def compiled_equals_eager(case, backend):
    torch._dynamo.reset()
    model, adapter = stirred(case, net().train(), ("head",))
    x, goal = batch(), draw(6, 5, seed=9)
    wanted = model(x)
    expected = torch.autograd.grad((wanted * goal).sum(), adapter.parameters())
    fast = torch.compile(model, backend=backend, fullgraph=True)
    y = fast(x)
    assert relative(y, wanted) <= 1e-5
    for a, b in zip(torch.autograd.grad((y * goal).sum(), adapter.parameters()), expected):
        assert relative(a, b) <= 1e-4


@pytest.mark.slow
@one_of_each_kind(lambda case: case.one_graph, kinds=FEW, share=0.2)
def test_compiled_in_one_graph(case):
    compiled_equals_eager(case, "aot_eager")


@pytest.mark.slow
def test_a_compiled_model_follows_what_is_active():
    torch._dynamo.reset()
    model, adapter = stirred(CASES[0], net(), ("head",))
    fast, x, plain = torch.compile(model, backend="eager", fullgraph=True), batch(), net()
    with torch.no_grad():
        wanted = model(x)
        assert relative(fast(x), wanted) <= 1e-6
        with adapter.disabled():
            assert relative(fast(x), plain(x)) <= 1e-6
        adapter.scale = 0.0
        assert relative(fast(x), plain(x)) > 1e-3
        adapter.scale = 1.0
        assert relative(fast(x), wanted) <= 1e-6


@pytest.mark.slow
@every(lambda case: case.inductor)
def test_compiled_by_inductor(case):
    compiled_equals_eager(case, "inductor")


# --- transformers ---------------------------------------------------------------------------------


@one_of_each_kind()
def test_save_pretrained_writes_the_base(case, tmp_path):
    import transformers

    model, plain = bert(), bert()
    attach(case, model, ("classifier",))
    model.save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path).to(DEVICE)
    assert same(bytes_of(loaded), bytes_of(plain))
    assert loaded.config.architectures == ["BertForSequenceClassification"]


@one_of_each_kind()
def test_gradient_checkpointing_of_transformers(case):
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    adapter = attach(case, model, ("classifier",))
    ids, labels = words(), torch.arange(3, device=DEVICE)

    def gradients():
        return torch.autograd.grad(model(ids, labels=labels).loss, adapter.parameters())

    wanted = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(gradients(), wanted):
        assert relative(a, b) <= 1e-5


@pytest.mark.slow
@one_of_each_kind()
def test_generate_with_beams_and_an_adapter_for_each_row(case):
    model, plain = llama(), llama()
    for name in ("one", "another"):
        adapter = attach(case, model, (), name)
        adapter.scale = 10.0 / max(adapter.norms().values())
    ids = words(3, 40)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for beams in (1, 2):
        alone = {}
        for name in ("one", "another", None):
            fs.activate(model, name)
            alone[name] = model.generate(ids, num_beams=beams, **options)
        assert torch.equal(alone[None], plain.generate(ids, num_beams=beams, **options))
        names = ["one", None, "another"]
        with fs.rows(model, names):
            mixed = model.generate(ids, num_beams=beams, **options)
        for i, name in enumerate(names):
            assert torch.equal(mixed[i], alone[name][i]), (beams, name)
        assert len({tuple(alone[name][0].tolist()) for name in alone}) > 1


def test_pipelines_and_isinstance_do_not_notice():
    model = bert()
    before = {n: type(m) for n, m in model.named_modules()}
    adapter = attach(CASES[0], model, None)
    assert adapter.attached.trained == ("classifier",)
    assert type(model) is before[""]
    assert all(isinstance(m, before[n]) for n, m in model.named_modules() if n in before)
    assert model.num_parameters() == bert().num_parameters() + sum(
        p.numel() for p in adapter.parameters()
    )
    assert str(adapter).startswith("Adapter 'default': LoRA(")
    assert "4 sites (query, value; 24x24), trains classifier" in str(adapter)


# --- privacy --------------------------------------------------------------------------------------


@one_of_each_kind(per_sample)
def test_per_sample_gradients_equal_a_loop_over_the_rows(case):
    from opacus import GradSampleModule

    model, adapter = stirred(case, net().train(), ("head",))
    x, goal = batch(4), torch.arange(4, device=DEVICE) % 5
    loop = []
    for i in range(4):
        loss = F.cross_entropy(model(x[i : i + 1]), goal[i : i + 1])
        loop.append(torch.autograd.grad(loss, adapter.parameters()))
    private = GradSampleModule(model, loss_reduction="sum", strict=False)
    F.cross_entropy(private(x), goal, reduction="sum").backward()
    for k, parameter in enumerate(adapter.parameters()):
        assert parameter.grad_sample.shape == (4, *parameter.shape)
        for i in range(4):
            assert relative(parameter.grad_sample[i], loop[i][k]) <= 1e-4
    private.remove_hooks()
    assert relative(model(x), twin(adapted(case, net())[0])(x)) > 1e-4
