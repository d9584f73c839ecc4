"""What only a GPU can show: `make gpu`, or `python tests/gpu.py`, on a machine that has one.

The tests of every claim run on a CPU in each check. Here FINESPUN_DEVICE names the GPU, and a line
says of each claim whether it stands. Until then all are unverified: `--list` prints them.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
NO_DEVICE, FAILED = 2, 1


@dataclass(frozen=True)
class Claim:
    """What is claimed of a GPU, and the tests, or files of them, that show it."""

    text: str
    tests: tuple[str, ...]


CLAIMS = (
    Claim(
        "frozen random numbers are those of the CPU, bit for bit, in every dtype",
        ("test_device.py::test_frozen_numbers_are_the_same_on_every_device_and_in_every_dtype",),
    ),
    Claim(
        "every structure starts with the parameters that it starts with on the CPU",
        ("test_device.py::test_a_start_is_the_same_on_every_device",),
    ),
    Claim(
        "every structure's outputs and gradients are those of the CPU, to 1e-4 in float32",
        ("test_device.py::test_a_model_computes_what_its_copy_on_the_cpu_computes",),
    ),
    Claim(
        "files written from a GPU are those of the CPU, byte for byte",
        ("test_device.py::test_files_written_on_a_device_are_those_of_the_cpu",),
    ),
    Claim(
        "step 0 changes nothing, in float32 and bfloat16",
        ("hosts/test_hosts.py::test_step_zero_changes_nothing_bit_for_bit",),
    ),
    Claim(
        "the fused product: its gradients, its dropout, other dtypes and autocast",
        (
            "kernels/test_kernel_lowrank.py",
            "test_device.py::test_dropout_draws_its_mask_on_the_device",
        ),
    ),
    Claim(
        "products with a few entries, their gradients, and writing them by index",
        ("kernels/test_entries.py",),
    ),
    Claim(
        "bfloat16 and float16 bases and autocast are near, trained parameters stay float32",
        (
            "test_device.py::test_low_precision_is_near_and_its_gradients_are_finite",
            "test_ecosystem.py::test_precision_of_the_base_and_of_the_trained_numbers",
        ),
    ),
    Claim("merging, and unmerging to the very tensors", ("hosts/test_merging.py",)),
    Claim("another adapter for each row of a batch", ("hosts/test_rows.py",)),
    Claim(
        "compiled models, by aot_eager and by inductor",
        (
            "test_ecosystem.py::test_compiled_in_one_graph",
            "test_ecosystem.py::test_compiled_by_inductor",
        ),
    ),
    Claim(
        "the fused AdamW takes the CPU's steps, to 1e-4",
        ("test_device.py::test_the_fused_optimiser_takes_the_steps_of_the_cpu",),
    ),
    Claim("a run repeats bit for bit", ("test_device.py::test_a_run_repeats_bit_for_bit",)),
    Claim(
        "a dry run waits for the GPU, and predicts its memory within a factor of 2",
        (
            "test_device.py::test_an_estimate_waits_for_a_gpu",
            "test_device.py::test_a_real_run_holds_the_memory_that_was_estimated",
        ),
    ),
    Claim("bases quantised by bitsandbytes and torchao", ("hosts/test_quantised.py",)),
    Claim(
        "the benchmarks run, agree with PEFT first, and wait for the GPU",
        (
            "bench/test_benchmarks.py::test_parts_run_and_leave_their_models_as_they_were",
            "bench/test_benchmarks.py::test_on_another_device_the_clock_waits_for_it",
        ),
    ),
)


def verify(claim: Claim, device: str) -> tuple[bool, str]:
    """Whether a claim's tests pass on a device, and pytest's last line; its output where not."""
    tests = [f"tests/{name}" for name in claim.tests]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *tests],
        cwd=ROOT,
        env={**os.environ, "FINESPUN_DEVICE": device},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return True, "verified"
    return False, f"FAILED\n{done.stdout[-4000:]}{done.stderr[-1000:]}"


def chosen(words: str) -> list[Claim]:
    """The claims whose text holds these words."""
    return [claim for claim in CLAIMS if words in claim.text]


def main(arguments: Sequence[str] | None = None) -> int:
    """Verify the claims one by one; the exit code says whether all of them stand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; cpu tries the script out")
    parser.add_argument("--only", default="", help="claims that hold these words")
    parser.add_argument("--list", action="store_true", help="print the claims; run nothing")
    asked = parser.parse_args(arguments)
    claims = chosen(asked.only)
    if asked.list or not claims:
        print("\n".join(f"unverified  {claim.text}" for claim in claims) or "no such claim")
        return 0 if claims else FAILED
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: torch finds no CUDA GPU here: nothing was verified", file=sys.stderr)
        return NO_DEVICE
    name = torch.cuda.get_device_name(asked.device) if asked.device != "cpu" else "the CPU"
    print(f"On {name}, torch {torch.__version__}:", flush=True)
    stand = 0
    for claim in claims:
        stands, told = verify(claim, asked.device)
        stand += stands
        print(f"{claim.text}: {told}", flush=True)
    print(f"{stand} of {len(claims)} claims verified on {name}")
    return 0 if stand == len(claims) else FAILED


if __name__ == "__main__":
    sys.exit(main())
