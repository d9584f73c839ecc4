"""Targets on models of many families: what each word means there, and that adapting them works."""

import re

import pytest
import torch
from tiers import sampled
from tiny import DECODER, FAMILIES, SIZE, built, hugging, words
from torch import nn

import finespun as fs
from finespun import hosts
from finespun.driver import Driver
from finespun.errors import InputError, TargetError

LSR = fs.LSR(rank=4, separation_rank=3)
BERT = ({"query", "key", "value", "attention.output.dense"}, {"intermediate.dense", "output.dense"})
LLAMA = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"})
CLIP = ({"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"})
DIFFUSERS = {"to_q", "to_k", "to_v", "to_out.0"}
# What "attention" and "mlp" mean, what "all-linear" adds, and how many the first two are.
MEANT = {
    "bert": (*BERT, {"pooler.dense"}, 12, 6),
    "roberta": (*BERT, set(), 12, 6),
    "deberta": (
        {"query_proj", "key_proj", "value_proj", "attention.output.dense"},
        BERT[1],
        {"pooler.dense"},
        12,
        6,
    ),
    "t5": ({"q", "k", "v", "o"}, {"wi", "wo"}, set(), 36, 12),
    "gpt2": ({"attn.c_attn", "attn.c_proj"}, {"mlp.c_fc", "mlp.c_proj"}, set(), 6, 6),
    "llama": (*LLAMA, set(), 12, 9),
    "qwen2": (*LLAMA, set(), 12, 9),
    "qwen3": (*LLAMA, set(), 12, 9),
    "mistral": (*LLAMA, set(), 12, 9),
    "vit": (LLAMA[0], CLIP[1], set(), 12, 6),
    "whisper": (*CLIP, set(), 36, 12),
    "clip": (*CLIP, {"visual_projection", "text_projection"}, 24, 12),
    "timm vit": ({"attn.qkv", "attn.proj"}, CLIP[1], set(), 6, 6),
    "diffusers dit": (
        DIFFUSERS,
        {"ff.net.0.proj", "ff.net.2", "norm1.linear", "linear_1", "linear_2"},
        {"proj_out_1", "proj_out_2"},
        12,
        15,
    ),
    "diffusers unet": (
        DIFFUSERS,
        {"ff.net.0.proj", "ff.net.2", "time_emb_proj"},
        {"time_embedding.linear_1", "time_embedding.linear_2"},
        32,
        16,
    ),
    "sentence transformer": (*BERT, {"pooler.dense"}, 12, 6),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
some_families = pytest.mark.parametrize("family", sampled(FAMILIES, 0.2))


def ends(names, leaves):
    return {leaf for leaf in leaves if any(n == leaf or n.endswith("." + leaf) for n in names)}


@some_families
def test_words_mean_the_layers_one_expects(family):
    model = built(family)
    attention, mlp, rest, *counts = MEANT[family]
    found = {word: hosts.find(model, word) for word in ("attention", "mlp", "all-linear")}
    for word, leaves, count in zip(found, (attention, mlp), counts):
        assert ends(found[word], leaves) == leaves
        assert all(ends([name], leaves) for name in found[word])
        assert len(found[word]) == count
    assert not set(found["attention"]) & set(found["mlp"])
    more = set(found["all-linear"]) - set(found["attention"]) - set(found["mlp"])
    assert ends(more, rest) == rest
    assert len(more) == len(rest)
    middle = hosts.find(model, "attention", layers=[1])
    assert middle
    assert all(re.search(r"\.1(\.|$)", name) for name in middle)
    fewer = hosts.find(model, "all-linear", exclude="mlp")
    assert set(fewer) == set(found["all-linear"]) - set(found["mlp"])
    last = found["attention"][-1]
    assert hosts.find(model, re.escape(last)) == [last]
    assert hosts.find(model, r".*", exclude="attention", layers=[1])


@some_families
def test_adapting_trains_saves_merges_and_leaves_no_trace(family, tmp_path):
    model, plain, call = built(family), built(family), FAMILIES[family].call
    plain.requires_grad_(False)  # attention takes another path where T5's position bias is trained
    y0 = call(plain)
    adapter = fs.adapt(model, LSR, ["attention", "mlp"], train_modules=())
    assert torch.equal(call(model), y0)

    goal = torch.randn(y0.shape, generator=torch.Generator().manual_seed(6))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.3)
    driver = Driver(model, "default", optimizer)
    before = (call(model) - goal).square().mean()
    before.backward()
    optimizer.step()
    driver.close()
    y = call(model).detach()
    assert (y - goal).square().mean() < before
    adapter.save(tmp_path / "adapter")
    fresh = built(family).requires_grad_(False)
    fs.load(fresh, tmp_path / "adapter")
    assert torch.equal(call(fresh), y)

    adapter.merge()
    torch.testing.assert_close(call(model), y, atol=2e-5, rtol=1e-4)
    adapter.unmerge()
    assert torch.equal(call(model), y)
    adapter.detach()
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in built(family).parameters()
    ]
    assert torch.equal(call(model.requires_grad_(False)), y0)
    wanted, left = plain.state_dict(), model.state_dict()
    assert list(left) == list(wanted)
    assert all(torch.equal(left[k], wanted[k]) for k in wanted)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_slices_of_a_fused_projection_are_targets_of_their_own():
    model, call = built("timm vit"), FAMILIES["timm vit"].call
    y0 = call(model).detach()
    adapter = fs.adapt(model, LSR, ["qkv:q", "qkv:v"], ["head"])
    assert list(adapter.deltas)[:2] == ["blocks.0.attn.qkv:q", "blocks.0.attn.qkv:v"]
    assert adapter.attached.trained == ("head",)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.2 * torch.randn_like(p))
    y = call(model).detach()
    before = model.blocks[0].attn.qkv.weight.detach().clone()
    adapter.merge()
    torch.testing.assert_close(call(model), y, atol=1e-5, rtol=1e-4)
    moved = (model.blocks[0].attn.qkv.weight - before).abs().amax(1) > 0
    assert moved.tolist() == [True] * 24 + [False] * 24 + [True] * 24
    adapter.unmerge()
    adapter.detach()
    assert torch.equal(call(model), y0)


def test_layers_that_do_not_move_are_named_at_the_first_step():
    model, call = built("sentence transformer"), FAMILIES["sentence transformer"].call
    adapter = fs.adapt(model, LSR, "all-linear")
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    Driver(model, "default", optimizer)
    call(model).square().sum().backward()
    with pytest.warns(UserWarning, match=r"^1 layers did not move.*: 0.auto_model.pooler.dense$"):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "config", "head"),
    [
        ("RobertaForSequenceClassification", "RobertaConfig", "classifier.out_proj"),
        ("BertForMaskedLM", "BertConfig", "cls.predictions.decoder"),
        ("BertForQuestionAnswering", "BertConfig", "qa_outputs"),
        ("ElectraForSequenceClassification", "ElectraConfig", "classifier.dense"),
        ("LlamaForSequenceClassification", "LlamaConfig", "score"),
        ("LlamaForCausalLM", "LlamaConfig", "lm_head"),
    ],
)
def test_the_output_head_is_adapted_only_by_name(name, config, head):
    sizes = {**DECODER, "num_hidden_layers": 1} if "Llama" in name else SIZE
    model = hugging(name, config, **sizes)()
    found = hosts.find(model, "all-linear")
    assert head not in found
    assert hosts.find(model, [head]) == [head]
    assert hosts.find(model, ["all-linear", head]) == [*found, head]
    adapter = fs.adapt(model, fs.LoRA(rank=1), [head], train_modules=())
    assert list(adapter.deltas) == [head]


def test_numbers_in_front_count_where_there_are_no_others():
    model = nn.Sequential(*(nn.Sequential() for _ in range(3)))
    for i, block in enumerate(model):
        block.add_module("attn", nn.Linear(4, 4))
        block.add_module("up", nn.Linear(4, 4 + i))
    assert hosts.find(model, "attention", layers=[0, 2]) == ["0.attn", "2.attn"]
    assert hosts.find(model, "mlp") == ["0.up", "1.up", "2.up"]


@pytest.mark.parametrize(
    ("name", "config", "options", "fused"),
    [
        (
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
            "gate_up_proj",
        ),
        ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}, "down_proj"),
        (
            "GptOssForCausalLM",
            "GptOssConfig",
            {"num_local_experts": 4, "num_experts_per_tok": 2},
            "gate_up_proj",
        ),
    ],
)
def test_fused_experts_are_refused_by_name(name, config, options, fused):
    import transformers

    made = getattr(transformers, config)(**{**DECODER, "head_dim": 12, **options})
    model = getattr(transformers, name)(made).eval()
    with pytest.raises(TargetError, match=rf"'model\.layers\.0\.mlp\.experts\.{fused}' is a bare"):
        fs.adapt(model, LSR, [fused])
    with pytest.raises(TargetError, match="Experts"):
        fs.adapt(model, LSR, ["experts"])
    assert "_finespun_adapters" not in model.__dict__
    y0 = model(words())[0]
    adapter = fs.adapt(model, LSR, "all-linear")
    assert all("experts" not in target for target in adapter.deltas)
    assert torch.equal(model(words())[0], y0)


class Attends(nn.Module):
    """A module around torch's own attention and encoder layer."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        )
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.encoder(self.attention(x, x, x)[0]))


@pytest.mark.parametrize(
    ("target", "parent"),
    [
        ("attention.out_proj", "MultiheadAttention"),
        ("encoder.layers.0.linear1", "TransformerEncoderLayer"),
        ("linear2", "TransformerEncoderLayer"),
        ("encoder.layers.1.self_attn.out_proj", "MultiheadAttention"),
    ],
)
def test_layers_that_torch_reads_without_calling_are_refused(target, parent):
    model, x = Attends().eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        y0 = model(x)
        with pytest.raises(TargetError, match=rf"a {parent}, whose fast path"):
            fs.adapt(model, fs.LoRA(rank=2), [target])
        assert torch.equal(model(x), y0)
    assert hosts.find(model, "all-linear") == ["out"]


def test_a_name_that_should_stand_in_a_list_is_told_so():
    model = nn.ModuleDict({"a": nn.ModuleDict({"query": nn.Linear(4, 4)})})
    with pytest.raises(TargetError, match=r"matches no whole name.*\['query'\]"):
        fs.adapt(model, fs.LoRA(rank=2), "query")


def test_what_is_no_model_is_told_so(tmp_path):
    for call in (
        lambda: fs.adapt(None, fs.LoRA(), ["x"]),
        lambda: fs.load(str(tmp_path), nn.Linear(2, 2)),
    ):
        with pytest.raises(InputError, match=r"the model comes first, an nn\.Module, not a"):
            call()
