"""Folders of PEFT's other methods: read, they compute what PEFT computes."""

import json

import peft
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import finespun as fs
from finespun.errors import FileError


class Two(nn.Module):
    """Two linear layers with biases, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.tanh(self.up(x))))


def two():
    torch.manual_seed(1)
    return Two()


CONFIGS = {
    "loha": lambda: peft.LoHaConfig(r=2, alpha=5),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=5),
    "lokr-both": lambda: peft.LoKrConfig(r=1, decompose_both=True, decompose_factor=4),
    "lokr-full": lambda: peft.LoKrConfig(r=8),
    "hira": lambda: peft.HiraConfig(r=2),
    "miss": lambda: peft.MissConfig(r=4),
    "delora": lambda: peft.DeloraConfig(r=2, delora_lambda=7),
    "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, alpha=20),
    "gralora-hybrid": lambda: peft.GraloraConfig(r=4, gralora_k=2, hybrid_r=2),
    "c3a": lambda: peft.C3AConfig(block_size=8),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False),
    "oft-series": lambda: peft.OFTConfig(r=0, oft_block_size=4, num_cayley_neumann_terms=4),
    "ia3": lambda: peft.IA3Config(feedforward_modules=["down"]),
    "vblora": lambda: peft.VBLoRAConfig(r=2, vector_length=8, num_vectors=10, topk=3),
}


def written(folder, name, modules=None):
    """A folder that PEFT wrote with numbers of a usual size, and PEFT's outputs."""
    config = CONFIGS[name]()
    config.target_modules = ["up", "down"]
    config.modules_to_save = modules
    model = get_peft_model(two(), config).eval()
    with torch.no_grad():
        for number in model.parameters():
            if number.requires_grad:
                number.add_(0.2 * torch.randn(number.shape))
    model.save_pretrained(folder)
    x = torch.randn(5, 16)
    return x, model(x).detach()


@pytest.mark.parametrize("modules", [None, ["head"]], ids=["alone", "head"])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_pefts(name, modules, tmp_path):
    x, theirs = written(tmp_path / "peft", name, modules)
    model = two()
    base = model(x)
    adapter = fs.load(model, tmp_path / "peft")
    assert adapter.structure.kind == name.partition("-")[0]
    assert (model(x) - theirs).norm() <= 1e-5 * (theirs - base).norm()
    assert adapter.entry.trained == (() if modules is None else ("head",))
    adapter.save(tmp_path / "own")
    again = two()
    fs.load(again, tmp_path / "own")
    torch.testing.assert_close(again(x), model(x), rtol=1e-6, atol=1e-6)
    with adapter.disabled():
        assert torch.equal(model(x), base)


def edited(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("loha", {"rank_pattern": {"up": 4}}, "not read for LOHA: rank_pattern"),
        ("miss", {"init_weights": "bat"}, "init_weights=bat"),
        ("oft", {"coft": True}, "coft=True"),
        ("c3a", {"bias": "all"}, "bias=all"),
        ("hira", {"brand_new": 3}, "brand_new=3 is unknown"),
        ("lokr", {"r": 0}, "rank=0"),
        ("loha", {"peft_type": "HIRA"}, "belongs to nothing that is read"),
        ("hira", {"peft_type": "VERA"}, "peft_type is 'VERA'"),
    ],
)
def test_what_is_not_read_is_named(name, changes, told, tmp_path):
    written(tmp_path, name)
    edited(tmp_path, **changes)
    model = two()
    before = set(model.state_dict())
    with pytest.raises(FileError, match=told):
        fs.load(model, tmp_path)
    assert set(model.state_dict()) == before


@pytest.mark.parametrize(
    ("name", "changes"), [("hira", {"r": 3}), ("boft", {"boft_n_butterfly_factor": 2})]
)
def test_numbers_of_another_size_are_refused(name, changes, tmp_path):
    """Without its GPU extension PEFT trains one butterfly factor, whatever its config says."""
    written(tmp_path, name)
    edited(tmp_path, **changes)
    with pytest.raises(FileError, match="does not fit"):
        fs.load(two(), tmp_path)
