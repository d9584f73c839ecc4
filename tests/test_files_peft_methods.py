"""Checkpoints of PEFT's other methods: written by PEFT, read here, the same outputs."""

import json

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import finespun as fs
from finespun.errors import FileError, TargetError
from finespun.files.peft_methods import KINDS

CONFIGS = {
    "boft": peft.BOFTConfig(boft_block_size=4),
    "c3a": peft.C3AConfig(block_size=8),
    "delora": peft.DeloraConfig(r=4),
    "fourierft": peft.FourierFTConfig(n_frequency=40, scaling=20.0, random_loc_seed=5),
    "gralora": peft.GraloraConfig(r=8, alpha=20, gralora_k=4, hybrid_r=4),
    "gralora-plain": peft.GraloraConfig(r=8, gralora_k=2),
    "hira": peft.HiraConfig(r=4),
    "ia3": peft.IA3Config(feedforward_modules=["down"]),
    "loha": peft.LoHaConfig(r=4, alpha=12),
    "lokr": peft.LoKrConfig(r=4, alpha=12),
    "lokr-both": peft.LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=4),
    "miss": peft.MissConfig(r=4),
    "oft": peft.OFTConfig(oft_block_size=4),
    "oft-three": peft.OFTConfig(oft_block_size=8, num_cayley_neumann_terms=3),
    "oft-exact": peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False),
    "randlora": peft.RandLoraConfig(r=5, randlora_alpha=9),
    "shira": peft.ShiraConfig(r=2),
    "vblora": peft.VBLoRAConfig(r=3, num_vectors=20, vector_length=4, topk=3),
    "vera": peft.VeraConfig(r=8, projection_prng_key=5),
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


def written(config, folder) -> Tensor:
    """PEFT's stirred adapter in a folder; what its model gives for X."""
    config.target_modules, config.modules_to_save = ["up", "down"], ["head"]
    model = get_peft_model(Net(), config).eval()
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
    theirs = written(CONFIGS[name], tmp_path / "adapter")
    model = Net().eval()
    adapter = fs.load(model, tmp_path / "adapter")
    with torch.no_grad():
        far = float((theirs - Net().eval()(X)).norm())
        assert float((model(X) - theirs).norm()) <= 1e-5 * max(far, 1.0)
        assert far > 0.01
    adapter.save(tmp_path / "own")
    again = Net().eval()
    fs.load(again, tmp_path / "own")
    with torch.no_grad():
        torch.testing.assert_close(again(X), model(X))


def test_every_method_that_is_read_is_tested():
    read = {config.peft_type.value for config in CONFIGS.values()}
    assert read == set(KINDS) - {"LORA", "TRAINABLE_TOKENS"}


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
        ("c3a", {"block_size_pattern": {"up": 4}}, "block_size_pattern"),
        ("miss", {"init_weights": "bat"}, "init_weights"),
        ("oft", {"coft": True}, "coft"),
        ("oft-r", {}, r"oft_block_size is \[4, 6\]"),
        ("vblora", {"save_only_topk_weights": True}, "save_only_topk_weights"),
        ("loha", {"rank_pattern": {"up": 2}}, "rank_pattern"),
        ("hira", {"bias": "all"}, "bias"),
    ],
)
def test_an_option_that_is_not_read_is_named(name, values, what, tmp_path):
    blocks = peft.OFTConfig(r=4, oft_block_size=0)
    written(blocks if name == "oft-r" else CONFIGS[name], tmp_path)
    changed(tmp_path, **values)
    with pytest.raises(FileError, match=what):
        fs.load(Net(), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_named(tmp_path):
    written(CONFIGS["hira"], tmp_path)
    changed(tmp_path, tensors=lambda key: key.replace("up.hira_A", "up.hira_C"))
    with pytest.raises(FileError, match=r"up\.hira_C.*unknown.*hira_"):
        fs.load(Net(), tmp_path)
    changed(tmp_path, tensors=lambda key: key.replace("up.hira_C", "top.hira_A"))
    with pytest.raises(TargetError, match=r"'top'"):
        fs.load(Net(), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_projections_that_were_not_saved_are_asked_for(tmp_path):
    written(peft.VeraConfig(r=8, save_projection=False), tmp_path)
    with pytest.raises(FileError, match="save_projection=True"):
        fs.load(Net(), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_method_that_is_not_read_is_named(tmp_path):
    written(CONFIGS["hira"], tmp_path)
    changed(tmp_path, peft_type="ADALORA")
    with pytest.raises(FileError, match="'ADALORA', which is not read; read are LORA"):
        fs.load(Net(), tmp_path)
