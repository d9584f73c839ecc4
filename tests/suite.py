"""The shared suite's cases and models: a structure added to CASES is tested by all of it.

The checks themselves are the tests parametrised with `every(...)`: test_structures.py (mathematics
of one structure), test_hosts.py, test_merging.py and test_rows.py (in a model), test_calculus.py,
test_ecosystem.py (compile, pickle, transformers, Opacus) and test_distributed.py.
"""

import copy
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from methods import IA3, Bypass, DoRA, HiRA, UniLoRA
from tiers import drawn, sampled
from torch import Tensor, nn
from torch.func import functional_call

import finespun as fs
from finespun import contract
from finespun.contract import Delta, Structure, TensorSite
from finespun.methods import structures

Test = TypeVar("Test", bound=Callable[..., Any])
DEVICE = torch.device(os.environ.get("FINESPUN_DEVICE", "cpu"))
WIDTH, INNER, CLASSES = 24, 40, 5
FEW = ("lora", "lsr", "map", "through", "bank", "block")  # kinds for the slowest checks


@dataclass(frozen=True)
class Case:
    """One structure under test.

    `tolerance` bounds the relative distance of any path from the definition in float32.
    `kind` groups cases for checks too slow to run for all: one of a kind runs in the quick suite.
    `constant` says that part of the update is held constant in the gradient on purpose.
    `exact_start` is passed to `adapt`; `inductor` asks for the compiled smoke as well;
    `one_graph` says that compilation needs no break.
    """

    name: str
    structure: Structure
    kind: str = "factors"
    tolerance: float = 1e-6
    constant: bool = False
    exact_start: bool = False
    inductor: bool = False
    one_graph: bool = True

    @property
    def zero(self) -> bool:
        """Whether the adapted model starts as its base."""
        return self.structure.starts_at_zero or self.exact_start

    @property
    def block(self) -> bool:
        """Whether it goes around blocks instead of into weights."""
        return self.structure.site_kind == "block"

    @property
    def targets(self) -> str:
        """Its targets in a Net."""
        return r"blocks\.\d" if self.block else r"blocks\.\d\.(up|down)"

    def delta(self, dtype: torch.dtype = torch.float32) -> Delta:
        """A delta without a model, on a 40 x 24 weight (24 x 24 for a block), not stirred."""
        rows = WIDTH if self.block else INNER
        site = TensorSite(
            "site",
            draw(rows, WIDTH, seed=5, dtype=dtype) / 5,
            draw(rows, seed=6, dtype=dtype) / 5,
            self.structure.site_kind,
        )
        plan = self.structure.plan([site])
        built = self.structure.build(site, plan, self.structure.bank(plan))
        if self.exact_start and not self.structure.starts_at_zero:
            built.keep_start()
        return built


CASES = (
    Case("lora", fs.LoRA(rank=3), kind="lora", inductor=True),
    Case("lora-rslora", fs.LoRA(rank=4, rslora=True, start="gaussian")),
    Case("lsr", fs.LSR(rank=4, separation_rank=3), kind="lsr", inductor=True),
    Case("lsr-formed", fs.LSR(rank=6, separation_rank=2, path="formed", start="matched")),
    Case("lsr-factorised", fs.LSR(rank=4, separation_rank=2, path="factorised", start="frames")),
    Case("lsr-three", fs.LSR(rank=8, separation_rank=3, rank_split=(2, 2, 2))),
    Case("lsr-official", fs.LSR(rank=4, separation_rank=4, start="official"), kind="moved"),
    Case("lsr-shadow", fs.LSR(rank=4, start="official"), exact_start=True, kind="shadow"),
    Case("dora", DoRA(rank=2), kind="map", constant=True, inductor=True),
    Case("hira", HiRA(rank=2), kind="delta"),
    Case("ia3", IA3(), kind="through"),
    Case("uni", UniLoRA(rank=2), kind="bank"),
    Case("uni-shadow", UniLoRA(rank=2), exact_start=True),
    Case("bypass", Bypass(rank=2), kind="block"),
    Case("gralora", structures.GraLoRA(rank=4, k=2), kind="direct"),
    Case("vera", structures.VeRA(rank=6), kind="frozen"),
    Case("lora_xs", structures.LoRAXS(rank=5)),
    Case("lora_xs-noise", structures.LoRAXS(rank=4, noise=0.3)),
    Case("nola", structures.NOLA(rank=3, k=20), kind="formed"),
    Case(
        "nola-chunk",
        structures.NOLA(rank=3, k=20, l=14, share_basis=False, chunk=8),
        one_graph=False,
    ),
    Case("unilora", structures.UniLoRA(size=60, bound=0.4), kind="formed bank"),
    Case("unilora-shadow", structures.UniLoRA(size=60, bound=0.4), exact_start=True),
    Case("tera", structures.TeRA(rank=3)),
    Case("tied_lora", structures.TiedLoRA(rank=3), kind="direct bank"),
    Case("s2_lora", structures.S2LoRA(rank=4)),
    Case("s2_lora-slice", structures.S2LoRA(rank=4, share="slice")),
    Case("block_lora", structures.BlockLoRA()),
    Case("block_lora-literal", structures.BlockLoRA(layout="literal")),
    Case("block_lora-input", structures.BlockLoRA(layout="input")),
    Case("melora", structures.MELoRA(rank=4)),
    Case("kadaptation", structures.KAdaptation(terms=2)),
    Case("randlora", structures.RandLoRA(rank=5)),
    Case("vblora", structures.VBLoRA(num_vectors=9, vector_length=4, bound=0.4)),
    Case("vblora-shadow", structures.VBLoRA(num_vectors=9, vector_length=4), exact_start=True),
    Case("gralora-hybrid", structures.GraLoRA(rank=4, k=4, hybrid_rank=2)),
    Case("tokens", structures.Tokens(tokens=(3, 0, 7))),
    Case("dora-through", structures.DoRA(rank=2), kind="around", constant=True),
    Case("hira-own", structures.HiRA(rank=2)),
    Case("ia3-own", structures.IA3()),
    Case("ia3-input", structures.IA3(feedforward=("site", "up", "down"))),
    Case("oft", structures.OFT(block_size=4), kind="turned"),
    Case("oft-series", structures.OFT(block_size=2, neumann=5)),
    Case("boft", structures.BOFT(block_size=2, factors=2)),
    Case("loha", structures.LoHa(rank=2)),
    Case("loha-dense", structures.LoHa(rank=5)),
    Case("krona", structures.KronA(), kind="straight"),
    Case("lokr", structures.LoKr(rank=2)),
    Case("lokr-both", structures.LoKr(rank=2, decompose_both=True, factor=2)),
    Case("lokr-full", structures.LoKr(rank=8)),
    Case("miss", structures.MiSS(rank=5)),
    Case("mora", structures.MoRA(rank=2)),
    Case("mora-sum", structures.MoRA(rank=2, sharing="sum")),
    Case("delora", structures.DeLoRA(rank=2, alpha=3.0)),
    Case("delora-drawn", structures.DeLoRA(rank=2, start="drawn"), exact_start=True),
    Case("c3a", structures.C3A(block_size=4)),
    Case("fourierft", structures.FourierFT(frequencies=40), kind="dense"),
    Case("shira", structures.SHiRA(rank=5), kind="entries"),
    Case("shira-structured", structures.SHiRA(rank=1, mask="structured")),
    Case("shira-magnitude", structures.SHiRA(rank=5, mask="magnitude")),
    Case("s2ft", structures.S2FT(channels=0.2), kind="columns"),
    Case("s2ft-outputs", structures.S2FT(channels=0.2, outputs=("site", "up")), kind="rows"),
    Case("lor2c", structures.LoR2C(rank=2)),
    Case("lor2c-shared", structures.LoR2C(rank=2, share=True)),
)


def accepted(case: Case) -> bool:
    """What the tables below keep where nothing is said: every case."""
    return True


def every(keep: Callable[[Case], bool] = accepted) -> Callable[[Test], Test]:
    """Run a test for the cases that `keep` accepts: the first of each kind is quick, for kinds
    differ in how a host treats them; of the others a half is slow and a half full."""
    return table(keep, lambda case: case.kind, seen={"factors"})


def every_structure(keep: Callable[[Case], bool] = accepted) -> Callable[[Test], Test]:
    """As `every`, for what costs little: the first case of each structure is quick."""
    return table(keep, lambda case: (type(case.structure), case.exact_start))


def table(
    keep: Callable[[Case], bool], group: Callable[[Case], Any], seen: Collection[Any] = ()
) -> Callable[[Test], Test]:
    """The cases that `keep` accepts; the first of a group, and the very first, are quick."""
    cases, met = [case for case in CASES if keep(case)], set(seen)
    first: set[str] = {case.name for case in cases[:1]}
    for case in cases:
        if group(case) not in met:
            met.add(group(case))
            first.add(case.name)

    late = [case for case in cases if case.name not in first]

    def mark(test: Test) -> Test:
        half = sampled(late, 0.0, 0.5, attrgetter("name"), test.__name__, least=0)
        marks = {drawn.id: drawn.marks for drawn in half}
        made = [pytest.param(c, id=c.name, marks=marks.get(c.name, ())) for c in cases]
        return pytest.mark.parametrize("case", made)(test)

    return mark


def one_of_each_kind(
    keep: Callable[[Case], bool] = accepted,
    kinds: Collection[str] | None = None,
    share: float = 1.0,
) -> pytest.MarkDecorator:
    """As `every`, with all but the first case of each kind marked slow; kind "factors" is slow,
    and so is every kind that is not in `kinds` where these are given. Only this share of them is
    slow, what is left is full."""
    seen, cases = {"factors"}, []
    for case in filter(keep, CASES):
        late = case.kind in seen or (kinds is not None and case.kind not in kinds)
        seen.add(case.kind)
        tier = pytest.mark.slow if drawn(case.name, share) else pytest.mark.full
        cases.append(pytest.param(case, id=case.name, marks=[tier] if late else []))
    return pytest.mark.parametrize("case", cases)


def mergeable(case: Case) -> bool:
    """Whether the case's class says that it merges."""
    return case.delta().mergeable


def per_sample(case: Case) -> bool:
    """Whether the case's class says that per-sample gradients are right."""
    return case.delta().per_sample


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same normal numbers for the same seed, on the device under test."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(DEVICE, dtype)


def relative(got: Tensor, wanted: Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())


class Block(nn.Module):
    """h + down(tanh(up(norm(h))))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(torch.tanh(self.up(self.norm(h))))


class Net(nn.Module):
    """Two blocks over (batch, tokens, 24), the mean over tokens, and a head of 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def net(dtype: torch.dtype = torch.float32, seed: int = 1) -> Net:
    """A Net in eval mode, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net().to(DEVICE, dtype).eval()


def batch(rows: int = 6, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    """Inputs (rows, 3 tokens, 24)."""
    return draw(rows, 3, WIDTH, seed=seed, dtype=dtype)


def adapted(
    case: Case, model: nn.Module | None = None, train: tuple[str, ...] = (), name: str = "default"
) -> tuple[Net, fs.Adapter]:
    """A net with the case's adapter, at its start."""
    model = net() if model is None else model
    return model, fs.adapt(
        model, case.structure, case.targets, train, name, exact_start=case.exact_start
    )


def stirred(case: Case, *args: object, **kwargs: object) -> tuple[Net, fs.Adapter]:
    """As `adapted`, with every trained parameter moved away from its start."""
    model, adapter = adapted(case, *args, **kwargs)
    stir(adapter.parameters(), seed=3 + len(adapter.name))
    return model, adapter


def stir(parameters: list[nn.Parameter], seed: int = 3) -> None:
    """Move parameters by a fifth, or where they are zero to a fifth, of a typical size."""
    with torch.no_grad():
        for i, p in enumerate(parameters):
            size = float(p.double().square().mean().sqrt()) or 0.2
            p.add_(0.5 * size * draw(*p.shape, seed=seed + 17 * i, dtype=p.dtype))


def by_definition(plain: Net, adapter: fs.Adapter, x: Tensor, strength: float = 1.0) -> Tensor:
    """The adapted net with every W0 + c·ΔW and b0 + c·Δb written out, differentiable in the
    trained parameters; `plain` is the net before it was adapted."""
    changed, around = {}, {}
    for name, delta in adapter.deltas.items():
        if isinstance(delta, contract.Bypass):
            A, B = delta.factors()
            around[name] = strength * delta.scale * (B @ A)
            continue
        W0 = plain.get_parameter(f"{name}.weight").detach()
        changed[f"{name}.weight"] = W0 + strength * delta.dense(W0)
        if (moved := delta.bias_change()) is not None:
            changed[f"{name}.bias"] = (
                plain.get_parameter(f"{name}.bias").detach() + strength * moved
            )
    for i, block in enumerate(plain.blocks):
        prefix = f"blocks.{i}."
        own = {k.removeprefix(prefix): v for k, v in changed.items() if k.startswith(prefix)}
        added = F.linear(x, around[f"blocks.{i}"]) if f"blocks.{i}" in around else 0.0
        x = functional_call(block, own, (x,)) + added
    head = adapter.attached.copies.get("head", plain.head)
    return head(x.mean(1))


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares nothing."""
    return copy.deepcopy(model)


def bytes_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole state dict."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
