"""Damaged and hostile files by the thousand: each is read as it should be, or refused by name.

    python tests/fuzz.py --files 10000          all formats, a line for every failure, then a table
    python tests/fuzz.py --only 0/1234          one file again, with its error in full

For every file a valid folder is copied, one to three files in it are damaged (`fuzz_damage`), and
the folder is used (`fuzz_formats`). Lawful ends: what was read is what the files say, or an error
of Finespun's own that names the file or the key. Anything else fails: other errors, a process that
dies, more than 20 seconds, more than 256 MiB, a pickle that was opened.
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from fuzz_damage import CANARY, damage, plain
from fuzz_formats import FORMATS, Format

from finespun.errors import BaseMismatch, FinespunError

SECONDS, MEBIBYTES = 20.0, 256
STARVED = re.compile(r"can't allocate|[Uu]nable to allocate|not enough memory|MemoryError")


@dataclass(frozen=True)
class Outcome:
    """What became of one file: `end` is "read", the name of an error of ours, or "FAILED"."""

    case: str
    format: str
    damage: str
    end: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.case}  {self.format}  [{self.damage}]  {self.end}  {self.detail}"


class Templates:
    """One valid folder for each format, written once below `root`."""

    def __init__(self, root: Path, formats: tuple[Format, ...] = FORMATS) -> None:
        self.root, self.formats, self.folders = root, formats, dict[str, Path]()
        for number, one in enumerate(formats):
            torch.manual_seed(number)
            place = root / f"valid-{number}"
            place.mkdir()
            one.write(place)
            self.folders[one.name] = place


def run_case(case: str, templates: Templates, loud: bool = False) -> Outcome:
    """Damage and use the folder that `case` stands for."""
    draw = random.Random(case)
    chosen = draw.choices(templates.formats, [f.weight for f in templates.formats])[0]
    room = templates.root / "room"
    shutil.rmtree(room, ignore_errors=True)
    folder = room / "folder"
    shutil.copytree(templates.folders[chosen.name], folder)
    inner = folder / chosen.inner
    names = known_names(inner)
    told = "; ".join(damage(inner, draw) for _ in range(draw.choice([1, 1, 1, 2, 3])))
    if draw.random() < 0.7:
        mend_digests(inner, chosen)
    names |= known_names(inner)
    end, detail = "read", ""
    try:
        chosen.use(folder, draw)
    except FinespunError as error:
        end, detail = type(error).__name__, " ".join(str(error).split())
        if not (names_something(detail, names, room) or isinstance(error, BaseMismatch)):
            end, detail = "FAILED", f"names neither file nor key: {end}: {detail}"
        elif STARVED.search(detail):
            end, detail = "FAILED", f"tried to take the memory: {detail}"
        if loud:
            traceback.print_exc()
    except Exception as error:
        end, detail = "FAILED", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if loud:
            traceback.print_exc()
    if (inner / CANARY).exists():
        end, detail = "FAILED", "a pickle was opened"
    return Outcome(case, chosen.name, told, end, detail)


def mend_digests(folder: Path, chosen: Format) -> None:
    """Let the digest be that of the damaged tensors, so that what comes after it is tried too."""
    for name, tensors in chosen.digests.items():
        if plain(folder / name) and plain(folder / tensors):
            try:
                content = json.loads((folder / name).read_bytes())
            except (ValueError, RecursionError):
                continue
            if isinstance(content, dict):
                content["sha256"] = hashlib.sha256((folder / tensors).read_bytes()).hexdigest()
                (folder / name).write_text(json.dumps(content))


def known_names(folder: Path) -> set[str]:
    """Files, keys of JSON, names of tensors, and the sites and modules in them."""
    found = {p.name for p in folder.iterdir()}
    for path in filter(plain, folder.iterdir()):
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            data = data[8 : 8 + int.from_bytes(data[:8], "little")]
        if path.suffix == ".yaml":
            found |= set(re.findall(r"^ *(\w+):", data.decode(errors="replace"), re.MULTILINE))
        if path.suffix in (".json", ".safetensors"):
            found |= set(re.findall(r'"([\w.$/]+)"', data.decode(errors="replace")))
    parts = {p for name in found for p in (name.partition("/")[2].rpartition("/")[0],)}
    return found | {p for p in parts if p}


def names_something(message: str, names: set[str], room: Path) -> bool:
    """Whether an error names a file of the folder, or quotes a key or name=value."""
    if str(room) in message or any(n in message for n in names if "." in n and len(n) > 6):
        return True
    quoted = set(re.findall(r"'([^']+)'", message)) | set(re.findall(r"\b(\w+)(?:=| ')", message))
    ends = {part for name in names for part in re.split(r"[./]", name)}
    return any(q in names or ends & set(re.split(r"[./]", q)) for q in quoted)


# --- many files, in processes that may die ------------------------------------------------------
def run_many(cases: list[str], templates: Templates, seconds: float = SECONDS) -> Iterator[Outcome]:
    """The outcome of every case. A process that hangs or dies is one case's failure; another goes
    on after it."""
    context, done = multiprocessing.get_context("fork"), 0
    while done < len(cases):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_work, args=(cases[done:], templates, theirs))
        child.start()
        theirs.close()
        while done < len(cases):
            try:
                alive = ours.poll(seconds)
                outcome = ours.recv() if alive else None
            except EOFError:
                child.join()
                outcome, alive = None, True
            if outcome is None:
                why = f"the process died ({child.exitcode})" if alive else f"over {seconds} seconds"
                yield Outcome(cases[done], "?", "?", "FAILED", why)
            else:
                yield outcome
            done += 1
            if outcome is None:
                break
        child.kill()
        child.join()
        ours.close()


def _work(cases: list[str], templates: Templates, pipe: Connection) -> None:
    torch.set_num_threads(1)
    for case in cases:
        before = _peak()
        outcome = run_case(case, templates)
        if _peak() - before > MEBIBYTES:
            detail = f"took {_peak() - before} MiB; {outcome.end} {outcome.detail}"
            outcome = Outcome(case, outcome.format, outcome.damage, "FAILED", detail)
        pipe.send(outcome)


def _peak() -> int:
    """The most memory that this process ever held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one case, such as 0/1234, in this process")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        templates = Templates(root)
        if options.only:
            print(run_case(options.only, templates, loud=True))
            return 0
        began = time.monotonic()
        ends, formats, failed = Counter[str](), Counter[tuple[str, str]](), 0
        for outcome in run_many([f"{options.seed}/{i}" for i in range(options.files)], templates):
            ends[outcome.end] += 1
            formats[outcome.format, outcome.end] += 1
            if outcome.end == "FAILED":
                failed += 1
                print(outcome, flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for (name, end), count in sorted(formats.items()):
        print(f"{name:<28} {end:<14} {count:>6}")
    told = ", ".join(f"{end} {count}" for end, count in ends.most_common())
    print(f"{options.files} files in {time.monotonic() - began:.0f} seconds: {told}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
