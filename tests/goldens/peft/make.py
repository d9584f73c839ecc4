"""Write the folders beside this file with the PEFT that is installed, and what it computes.

    PYTHONPATH=<a folder with that PEFT and a transformers of its time> python make.py

One folder for each minor version: a sub-folder for each case, and `outputs.safetensors`.
"""

import sys
from pathlib import Path

sys.modules["torchao"] = None  # type: ignore[assignment]  # old PEFTs refuse newer ones
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import peft  # noqa: E402
import torch  # noqa: E402
from peft_kinds import CASES, IDS, Kinds  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

CHOSEN = ("patterns", "dora", "bias", "own bias", "tokens", "table")


def main() -> None:
    minor = ".".join(peft.__version__.split(".")[:2])
    outputs = {}
    for name in CHOSEN:
        options = dict(CASES[name])
        kind = peft.LoraConfig
        if "token_indices" in options or "trainable_token_indices" in options:
            if not hasattr(peft, "TrainableTokensConfig"):
                continue
            kind = peft.TrainableTokensConfig if "token_indices" in options else kind
        if kind is peft.LoraConfig:
            options = {"r": 2, **options}
        model = peft.get_peft_model(Kinds().eval(), kind(**options)).eval()
        for i, number in enumerate(p for p in model.parameters() if p.requires_grad):
            wave = torch.arange(number.numel(), dtype=torch.float64) * 0.9 + i
            number.data += (wave.cos() / 5).float().view(number.shape)
        folder = HERE / minor / name.replace(" ", "_")
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        again = peft.PeftModel.from_pretrained(Kinds().eval(), folder).eval()
        with torch.no_grad():
            outputs[folder.name] = again(IDS)
    save_file(outputs, HERE / minor / "outputs.safetensors")


main()
