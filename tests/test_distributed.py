"""The shared suite, part six: one pair of gloo processes trains every structure under DDP and under
FSDP2, and both loss curves are those of one process."""

import json
import warnings
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as mp
from suite import CASES, FEW, batch, draw, net, relative, stirred
from torch.nn.parallel import DistributedDataParallel

from finespun.errors import StateError

STEPS, ROWS = 4, 4
PATIENCE = timedelta(seconds=120)


def losses(case, model, adapter, rank, world):
    """Loss of every step on this process's share of the rows, averaged over all processes."""
    import torch.distributed as dist

    optimizer = torch.optim.AdamW(adapter.parameters(), lr=2e-3)
    share, found = slice(rank * ROWS // world, (rank + 1) * ROWS // world), []
    x, goal = batch(ROWS), draw(ROWS, 5, seed=60)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x[share]) - goal[share]).square().mean()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        found.append(float(total) / world)
    return found


def alone(case):
    model, adapter = stirred(case, net().train(), ("head",))
    return losses(case, model, adapter, 0, 1)


def data_parallel(case, rank, world):
    model, adapter = stirred(case, net().train(), ("head",))
    return losses(case, DistributedDataParallel(model), adapter, rank, world)


def sharded(case, rank, world):
    """The loss curve, and which parameters were not sharded after all."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    model, adapter = stirred(case, net().train(), ("head",))
    mesh = init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = losses(case, model, adapter, rank, world)
    plain = [n for n, p in model.named_parameters() if not isinstance(p, DTensor)]
    plain += [p.shape for p in adapter.parameters() if not isinstance(p, DTensor)]
    return found, plain + gathered(case, model, adapter)


def gathered(case, model, adapter):
    """What goes wrong after training: half an adapter is neither merged nor saved, and the whole
    one computes the same."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    wrong = []
    for act in (lambda: adapter.save("nowhere"), lambda: adapter.attached.tensors()):
        try:
            act()
            wrong.append("a shard was taken for the whole")
        except StateError as error:
            wrong += [] if "sharded over processes" in str(error) else [str(error)]
    try:
        adapter.merge()
        wrong.append("a shard was merged")
    except StateError as error:
        allowed = ("sharded over processes", "cannot be merged")
        wrong += [] if any(part in str(error) for part in allowed) else [str(error)]
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    x = batch(ROWS)
    y = model.eval()(x).detach()
    if dist.get_rank() == 0:
        whole, _ = stirred(case, net(), ("head",))
        whole.load_state_dict(state)
        wrong += [] if relative(whole(x), y) < 1e-5 else ["the gathered adapter is another"]
    return wrong


def work(rank, world, file, results, cases):
    """One process: all these structures, both ways."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=PATIENCE
    )
    found = {}
    for case in cases:
        found[case.name] = {"ddp": data_parallel(case, rank, world)}
        found[case.name]["fsdp"], found[case.name]["whole"] = sharded(case, rank, world)
    if rank == 0:
        results.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def first_of_each(kinds):
    return [next(case for case in CASES if case.kind == kind) for kind in kinds]


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(first_of_each(FEW), id="few"),
        pytest.param(list(CASES), id="all", marks=pytest.mark.full),
    ],
)
def test_two_processes_train_as_one(tmp_path, cases):
    results = tmp_path / "results.json"
    mp.spawn(work, (2, tmp_path / "meeting", results, cases), nprocs=2)
    found = json.loads(results.read_text())
    assert set(found) == {case.name for case in cases}
    for case in cases:
        wanted, got = torch.tensor(alone(case)), found[case.name]
        assert wanted[-1] < wanted[0], case.name
        assert got["whole"] == [], case.name
        for way in ("ddp", "fsdp"):
            error = (torch.tensor(got[way]) - wanted).abs() / wanted
            assert error.max() <= 1e-5, (case.name, way, error)
