"""Checkpoints of PEFT's other methods: written by PEFT, read here, the same outputs."""

import json

import pytest
import torch
from peft_folders import gpt2, later, logits
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import finespun as fs
from finespun.errors import FileError, StrictError, TargetError
from finespun.files.peft.methods import check_options
from finespun.files.peft.table import METHODS, PEFT_TYPES

CONFIGS = {
    "boft": later("BOFTConfig", boft_block_size=4),
    "c3a": later("C3AConfig", block_size=8),
    "delora": later("DeloraConfig", r=4),
    "c3a-deep": later("C3AConfig", block_size=8, block_size_pattern={"up": 4}),
    "delora-pattern": later("DeloraConfig", r=30, rank_pattern={"up": 2}, lambda_pattern={"up": 3}),
    "fourierft": later("FourierFTConfig", n_frequency=40, scaling=20.0, random_loc_seed=5),
    "fourierft-deep": later("FourierFTConfig", n_frequency=40, n_frequency_pattern={"up": 9}),
    "gralora": later("GraloraConfig", r=8, alpha=20, gralora_k=4, hybrid_r=4),
    "gralora-plain": later("GraloraConfig", r=8, gralora_k=2),
    "hira": later("HiraConfig", r=4),
    # PEFT 0.21 forgets the pattern
    "hira-large": later("HiraConfig", r=20, rank_pattern={"up": 2}),
    "hira-conv": later("HiraConfig", r=2),
    "hira-table": later("HiraConfig", r=2),
    "boft-cores": later("BOFTConfig", boft_block_size=2),
    "ia3-cores": later("IA3Config", feedforward_modules=["down"]),
    "ia3": later("IA3Config", feedforward_modules=["down"]),
    "loha": later("LoHaConfig", r=4, alpha=12),
    "loha-conv": later("LoHaConfig", r=2, alpha=12),
    "loha-cores": later("LoHaConfig", r=2, alpha=12, use_effective_conv2d=True),
    "loha-large": later("LoHaConfig", r=40, alpha=12),
    "loha-pattern": later(
        "LoHaConfig", r=4, alpha=12, rank_pattern={"up": 50}, alpha_pattern={"d.*": 5}
    ),
    "lokr": later("LoKrConfig", r=4, alpha=12),
    "lokr-both": later("LoKrConfig", r=1, alpha=3, decompose_both=True, decompose_factor=4),
    "lokr-conv": later("LoKrConfig", r=1, alpha=3),
    "lokr-cores": later("LoKrConfig", r=1, alpha=3, use_effective_conv2d=True),
    "lokr-large": later("LoKrConfig", r=100, alpha=1200),
    "lokr-pattern": later(
        "LoKrConfig", r=30, alpha=12, rank_pattern={"up": 1}, alpha_pattern={"^down": 50}
    ),
    "miss": later("MissConfig", r=4),
    "miss-mini": later("MissConfig", r=4, mini_r=8, init_weights="mini"),
    "oft": later("OFTConfig", oft_block_size=4),
    "oft-count": later("OFTConfig", r=4, oft_block_size=0),
    "oft-shared": later("OFTConfig", oft_block_size=4, block_share=True),
    "oft-bound": later("OFTConfig", oft_block_size=8, coft=True, eps=0.5),
    "oft-bound-shared": later("OFTConfig", oft_block_size=4, coft=True, eps=0.3, block_share=True),
    "oft-three": later("OFTConfig", oft_block_size=8, num_cayley_neumann_terms=3),
    "oft-exact": later("OFTConfig", oft_block_size=4, use_cayley_neumann=False),
    "randlora": later("RandLoraConfig", r=5, randlora_alpha=9),
    "shira": later("ShiraConfig", r=2),
    "unilora": later("UniLoraConfig", r=3, theta_d_length=50, save_indices=True),
    "unilora-drawn": later("UniLoraConfig", r=3, theta_d_length=50, proj_seed=9),
    "unilora-few": later("UniLoraConfig", r=1, theta_d_length=100),
    "vblora": later("VBLoRAConfig", r=3, num_vectors=20, vector_length=4, topk=3),
    "vblora-chosen": later(
        "VBLoRAConfig", r=3, num_vectors=300, vector_length=4, topk=3, save_only_topk_weights=True
    ),
    "vblora-one": later(
        "VBLoRAConfig", r=3, num_vectors=20, vector_length=4, topk=1, save_only_topk_weights=True
    ),
    "vera": later("VeraConfig", r=8, projection_prng_key=5),
}
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.down(torch.tanh(self.up(x))))
        return out


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Convs(nn.Module):
    """Convolutions of two dimensions, or of two and one, and a head of one pixel."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.flat = nn.Conv2d(4, 6, 2, padding=1), flat
        self.down = nn.Conv1d(6, 8, 9) if flat else nn.Conv2d(6, 8, 3)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.up(x.view(-1, 4, 2, 2))
        h = self.down(pixels.flatten(2))[..., None] if self.flat else self.down(pixels)
        out: Tensor = self.head(h).flatten(1)
        return out


# of PEFT 0.21 a LoKr with cores fails in one dimension
class Table(nn.Module):
    """A table of rows, two of which each input takes; a linear layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Embedding(9, 8), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = (x[:, :2].abs() * 7).long() % 9
        out: Tensor = self.head(torch.tanh(self.down(self.up(rows).flatten(1))))
        return out


MODELS = {"conv": lambda: Convs(flat=True), "cores": Convs, "deep": Deep, "table": Table}


def model_of(name: str) -> nn.Module:
    return MODELS.get(name.partition("-")[2], Net)().eval()


def written(config, folder, model: nn.Module | None = None) -> Tensor:
    """PEFT's stirred adapter in a folder; what its model gives for X."""
    from peft import get_peft_model

    config.target_modules, config.modules_to_save = ["up", "down"], ["head"]
    model = get_peft_model(Net() if model is None else model, config).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * (0.5 if "theta" in name else 0.2))
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(X)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_those_of_peft_from_its_own_file(name, tmp_path):
    theirs = written(CONFIGS[name](), tmp_path / "adapter", model_of(name))
    model = model_of(name)
    adapter = fs.load(model, tmp_path / "adapter")
    with torch.no_grad():
        far = float((theirs - model_of(name)(X)).norm())
        assert float((model(X) - theirs).norm()) <= 1e-5 * max(far, 1.0)
        assert far > 0.01
    adapter.save(tmp_path / "own")
    again = model_of(name)
    loaded = fs.load(again, tmp_path / "own")
    with torch.no_grad():
        assert torch.equal(again(X), model(X))
        loaded.merge()
        torch.testing.assert_close(again(X), theirs, atol=1e-5, rtol=1e-5)


def test_every_method_that_is_read_is_tested():
    read = {config.peft_type.value for config in (make() for make in CONFIGS.values())}
    assert read == set(PEFT_TYPES) - {"LORA", "TRAINABLE_TOKENS"}


def changed(folder, tensors=None, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    if tensors is not None:
        held = load_file(folder / "adapter_model.safetensors")
        save_file({tensors(k): v for k, v in held.items()}, folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "values", "what"),
    [
        ("miss", {"init_weights": "bat"}, r"init_weights=bat is not read: .*W0·M \+ M.*merge it"),
        ("vblora", {"save_only_topk_weights": True}, r"lacks 'vblora_logits_A_topk_indices'"),
        ("loha", {"rank_pattern": {"up": 2}}, "'up' is of rank 4, the config gives it 2"),
        ("hira", {"bias": "all"}, "bias=all is not read: .*merge it"),
        ("vera", {"bias": "vera_only"}, "bias=vera_only is not read"),
        ("hira", {"new": 5}, "new=5 is unknown"),
        ("oft", {"num_cayley_neumann_terms": 10**9}, "is more than 100"),
        ("vblora", {"topk": True}, "topk=True must be a whole number"),
        ("vblora", {"num_vectors": 21}, r"vector_bank' is \(20, 4\), expected \(21, 4\)"),
        ("loha", {"modules_to_save": []}, r"head\.(weight|bias)' is "),
    ],
)
def test_an_option_that_is_not_read_is_named(name, values, what, tmp_path):
    written(CONFIGS[name](), tmp_path)
    changed(tmp_path, **values)
    with pytest.raises(FileError, match=what):
        fs.load(Net(), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_lenience_is_offered_for_what_is_unknown_only(tmp_path):
    theirs = written(CONFIGS["hira"](), tmp_path)
    changed(tmp_path, new=5)
    with pytest.raises(StrictError, match="new=5 is unknown") as caught:
        fs.load(Net(), tmp_path)
    assert caught.value.__notes__ == ["strict=False skips it"]
    model = Net().eval()
    with pytest.warns(UserWarning, match="new=5 is unknown"):
        fs.load(model, tmp_path, strict=False)
    torch.testing.assert_close(model(X), theirs)
    changed(tmp_path, bias="all")
    with pytest.raises(FileError, match="bias=all is not read") as refused:
        fs.load(Net(), tmp_path, strict=False)
    assert not hasattr(refused.value, "__notes__")


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_named(tmp_path):
    written(CONFIGS["hira"](), tmp_path)
    changed(tmp_path, tensors=lambda key: key.replace("up.hira_A", "up.hira_C"))
    with pytest.raises(FileError, match=r"up\.hira_C.*unknown.*hira_"):
        fs.load(Net(), tmp_path)
    changed(tmp_path, tensors=lambda key: key.replace("up.hira_C", "top.hira_A"))
    with pytest.raises(TargetError, match=r"'top'"):
        fs.load(Net(), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_rotated_patches_and_tables_are_refused(tmp_path):
    written(CONFIGS["oft"](), tmp_path / "conv", Convs())
    with pytest.raises(FileError, match="is a convolution, whose patches PEFT turns"):
        fs.load(Convs(), tmp_path / "conv")
    written(CONFIGS["oft"](), tmp_path / "table", Table())
    with pytest.raises(FileError, match=r"up\.oft_embedding_R\.weight' is unknown"):
        fs.load(Table(), tmp_path / "table")


@pytest.mark.filterwarnings("ignore")
def test_projections_that_were_not_saved_are_asked_for(tmp_path):
    import peft

    written(peft.VeraConfig(r=8, save_projection=False), tmp_path)
    with pytest.raises(FileError, match="save_projection=True"):
        fs.load(Net(), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_method_that_is_not_read_is_named(tmp_path):
    written(CONFIGS["hira"](), tmp_path)
    changed(tmp_path, peft_type="ADALORA")
    with pytest.raises(FileError, match="'ADALORA', which is not read; read are LORA"):
        fs.load(Net(), tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["c_attn", "c_fc"], r".*c_(attn|proj)", "all-linear"])
def test_unilora_takes_its_places_in_the_order_of_the_model(targets, tmp_path):
    import peft
    from peft import get_peft_model

    config = peft.UniLoraConfig(r=2, theta_d_length=40, target_modules=targets)
    theirs = get_peft_model(gpt2(), config).eval()
    theirs.base_model.unilora_theta_d["default"].data.normal_()
    theirs.save_pretrained(tmp_path)
    model = gpt2()
    fs.load(model, tmp_path)
    far = (logits(theirs) - logits(gpt2())).norm()
    assert far > 0.1
    assert (logits(model) - logits(theirs)).norm() <= 1e-5 * far


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"layers_to_transform": [0]}, "layers_to_transform decides .* save_indices=True"),
        ({"target_modules": ["left"]}, "target_modules names no layer .* save_indices=True"),
        ({"target_modules": "(a*)*"}, "could take without end"),
        ({"theta_d_length": 51}, "theta_d_length is 51, the file holds 50"),
        ({"r": 10**9}, "bytes would be made"),
    ],
)
def test_unilora_without_places_that_can_be_drawn_asks_for_them(changes, what, tmp_path):
    written(CONFIGS["unilora-drawn"](), tmp_path)
    changed(tmp_path, **changes)
    with pytest.raises(FileError, match=what):
        fs.load(Net(), tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["vblora-chosen", "oft-shared", "oft-bound", "miss-mini"])
def test_what_training_on_would_change_is_told(name, tmp_path):
    written(CONFIGS[name](), tmp_path)
    with pytest.warns(UserWarning, match="train"):
        adapter = fs.load(Net(), tmp_path, trainable=True)
    adapter.model(X).square().sum().backward()
    moved = [p.grad for p in adapter.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in moved)
    assert any(bool(g.any()) for g in moved)


def test_every_option_of_every_method_is_known():
    """So that an option of PEFT 0.21 is either read or refused by name, and never passed over."""
    for make in CONFIGS.values():
        options = make().to_dict()
        method = METHODS[options["peft_type"].value]
        told = {k: v for k, v in options.items() if not k.startswith("_") and k != "bias"}
        odd = {k: "?" for k in told if k not in (*method.fixed, "peft_type", "modules_to_save")}
        assert not check_options(method, {**odd, "peft_type": "?"}, strict=True)
