"""Saved runs as a stranger, a bad disk or a bad transfer might make them, and a process that tries to load them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "saved_runs"

# ---- mutations -------------------------------------------------------------------------------------------------------

Mutation = Callable[[Path, random.Random], None]
"""Changes a run folder in place."""


def pick(folder: Path, chance: random.Random) -> Path:
    """One of the files of a run, staged ones included."""
    return chance.choice(sorted(path for path in folder.iterdir() if path.is_file()))


def some_bytes(chance: random.Random, most: int) -> bytes:
    return chance.randbytes(chance.randint(1, most))


def truncated(folder: Path, chance: random.Random) -> None:
    path = pick(folder, chance)
    os.truncate(path, chance.randrange(path.stat().st_size))


def appended(folder: Path, chance: random.Random) -> None:
    with pick(folder, chance).open("ab") as file:
        file.write(some_bytes(chance, 5000))


def flipped(folder: Path, chance: random.Random) -> None:
    path = pick(folder, chance)
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def overwritten(folder: Path, chance: random.Random) -> None:
    path = pick(folder, chance)
    data = bytearray(path.read_bytes())
    start, length = chance.randrange(len(data)), chance.randint(1, 600)
    data[start : start + length] = chance.choice((b"\0", b"\xff", b"[", b'"', b"9"))[:1] * min(
        length, len(data) - start
    )
    path.write_bytes(data)


def shuffled(folder: Path, chance: random.Random) -> None:
    """Two pieces of a file change places."""
    path = pick(folder, chance)
    data = path.read_bytes()
    a, b, c = sorted(chance.sample(range(len(data)), 3))
    path.write_bytes(data[:a] + data[b:c] + data[a:b] + data[c:])


def emptied(folder: Path, chance: random.Random) -> None:
    pick(folder, chance).write_bytes(b"")


def removed(folder: Path, chance: random.Random) -> None:
    pick(folder, chance).unlink()


def enormous(folder: Path, chance: random.Random) -> None:
    """A file that claims to have up to a terabyte, and takes no room."""
    os.truncate(pick(folder, chance), chance.choice((1 << 26, 1 << 32, 1 << 40)))


def from_another_run(folder: Path, chance: random.Random) -> None:
    other = chance.choice(sorted(CORPUS.glob("schema_*/*")))
    path = pick(folder, chance)
    name = next(n for n in ("run.json", "model.safetensors", "history.jsonl") if n in path.name)
    if (other / name).is_file():
        shutil.copy(other / name, path)


def exchanged(folder: Path, chance: random.Random) -> None:
    """Two files have each other's content."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    first, second = chance.sample(files, 2)
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])


def special(folder: Path, chance: random.Random) -> None:
    """Something that is no file, or a link, stands where a file was."""
    path = pick(folder, chance)
    kept = path.with_name("moved")
    path.rename(kept)
    kind = chance.choice(("pipe", "folder", "socket", "device", "zero", "random", "outside", "loop", "nowhere", "proc"))
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = os.open(folder, os.O_RDONLY)
            server.bind(f"/proc/self/fd/{here}/{path.name}")  # the name of a socket is short
            os.close(here)
    elif kind == "device":
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero, where this is allowed
        except OSError:
            path.symlink_to("/dev/zero")
    elif kind == "outside":
        outside = folder.parent / "outside"
        shutil.copy(kept, outside)
        path.symlink_to(outside)
    else:
        goals = {
            "zero": "/dev/zero",
            "random": "/dev/urandom",
            "loop": path.name,
            "nowhere": "gone",
            "proc": "/proc/kcore",
        }
        path.symlink_to(goals[kind])


def inner_link(folder: Path, chance: random.Random) -> None:
    """A link inside the folder, to the content that was there: it loads."""
    path = pick(folder, chance)
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def planted(folder: Path, chance: random.Random) -> None:
    """Files beside the run that look like leftovers of a save."""
    token = chance.choice(("0" * 16, "not a token", json.loads((folder / "run.json").read_text())["token"]))
    name = chance.choice(("model.safetensors", "history.jsonl", "run.json", "evil.json"))
    (folder / f".{name}.{token}").write_bytes(some_bytes(chance, 400))


def respaced(folder: Path, chance: random.Random) -> None:
    """The same JSON in another layout: it loads."""
    path = folder / "run.json"
    record = json.loads(path.read_text())
    items = list(record.items())
    chance.shuffle(items)
    path.write_text(json.dumps(dict(items), indent=chance.choice((None, 0, 7))))


NUMBERS = (-1, 0, 1, 7, 8, 9, 10**7, 2**31, 2**62, 2**63, 2**64, 10**30, 0.5, 7.0, 1e300, True, None, "7", [], {})


def wrong_entry(record: Any, chance: random.Random) -> None:
    """Somewhere in the record stands another value."""
    path = [record]
    while isinstance(path[-1], dict | list) and path[-1] and (len(path) == 1 or chance.random() < 0.8):
        here = path[-1]
        key = chance.choice(list(here) if isinstance(here, dict) else range(len(here)))
        if not isinstance(here[key], dict | list) or chance.random() < 0.3:
            here[key] = chance.choice((*NUMBERS, "../../etc/passwd", "/etc/passwd", "\0", "a" * 5000, [[]] * 50))
            return
        path.append(here[key])


def missing_entry(record: Any, chance: random.Random) -> None:
    record.pop(chance.choice(list(record)))


def more_entries(record: Any, chance: random.Random) -> None:
    record[chance.choice(("folder", "__class__", "path", "a" * 3000, ""))] = chance.choice(NUMBERS)


def other_schema(record: Any, chance: random.Random) -> None:
    record["schema"] = chance.choice((*NUMBERS, 3, 2.0, 1, -5, "2"))


def wide(record: Any, chance: random.Random) -> None:
    """A width that the tensors do not have, everywhere in the record."""
    old, new = 7, chance.choice((10**5, 10**7, 2**40, 2**62))
    record["shapes"] = {n: [new if s == old else s for s in shape] for n, shape in record["shapes"].items()}
    record["widths"] = dict.fromkeys(record["widths"] or {}, new)


def traversal(record: Any, chance: random.Random) -> None:
    name = chance.choice(("../outside", "/etc/passwd", "a/../../outside", "..", ".", "", "model.safetensors/", "x\0"))
    if "files" in record and chance.random() < 0.5:
        record["files"][name] = record["files"].pop("model.safetensors")
    else:
        record["token"] = chance.choice(("../../../../etc", "0" * 15 + "/", name))


def deep(folder: Path, chance: random.Random) -> None:
    """JSON with very many levels, where `extra` or an entry of the header stands."""
    path = folder / "run.json"
    levels = chance.choice((40, 900, 100_000, 1_000_000))
    text = chance.choice(("[" * levels + "]" * levels, '{"a":' * levels + "1" + "}" * levels, "[" * levels))
    path.write_text(path.read_text().replace('"extra": {', f'"extra": {{"deep": {text}, ', 1))


def twice(folder: Path, chance: random.Random) -> None:
    """A key that stands twice in one object: readers of JSON differ in which one they take."""
    path = folder / "run.json"
    record = json.loads(path.read_text())
    key = chance.choice(list(record))
    path.write_text(path.read_text().replace("{", f"{{{json.dumps(key)}: {json.dumps(record[key])}, ", 1))


def odd_text(folder: Path, chance: random.Random) -> None:
    """JSON in another encoding, or with what only some readers take."""
    path = folder / "run.json"
    text = path.read_text()
    change = chance.randrange(5)
    if change < 2:
        path.write_bytes(text.encode(("utf-16", "utf-32")[change]))
    elif change == 2:
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    else:
        number = chance.choice(("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "01", "0x7", "1_000"))
        path.write_text(text.replace('"extra": {', f'"extra": {{"number": {number}, ', 1))


def many(folder: Path, chance: random.Random) -> None:
    """A record of some megabytes of very small values, or of one text."""
    path = folder / "run.json"
    count = chance.choice((50_000, 1_000_000, 5_000_000))
    text = chance.choice(('"' + "\\u0061" * (count // 4) + '"', "[" + "[]," * count + "1]", "[" + "0," * count + "1]",
                          '"' + "\\" * (2 * (count // 2)) + '"', "[" + '"",' * count + "1]"))  # fmt: skip
    path.write_text(path.read_text().replace('"extra": {', f'"extra": {{"many": {text}, ', 1))


def in_record(change: Callable[[Any, random.Random], None]) -> Mutation:
    def mutation(folder: Path, chance: random.Random) -> None:
        path = folder / "run.json"
        record = json.loads(path.read_text())
        change(record, chance)
        path.write_text(json.dumps(record))

    mutation.__name__ = change.__name__
    return mutation


RECORD = (wrong_entry, missing_entry, more_entries, other_schema, wide, traversal)

DAMAGES: tuple[Mutation, ...] = (
    truncated, appended, flipped, flipped, flipped, overwritten, shuffled, emptied, removed, enormous, from_another_run,
    exchanged, special, special, inner_link, planted, respaced, deep, twice, odd_text, many, *map(in_record, RECORD),
)  # fmt: skip
"""What happens to a folder without the knowledge of checksums: it loads as it was, or not at all."""


# ---- forgeries: the checksums are made to fit ------------------------------------------------------------------------


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: bytes, rest: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + rest


def forged_header(data: bytes, chance: random.Random) -> bytes:
    """A tensor file whose header says something else."""
    header, rest = header_of(data)
    name = chance.choice([n for n in header if n != "__metadata__"])
    change = chance.randrange(10)
    if change == 0:
        return with_header(data[8:], rest, chance.choice((2**63, 2**64 - 1, 2**40, 10**9, 0, 1)))
    if change == 1:
        levels = chance.choice((50, 100_000, 2_000_000))
        return with_header(b'{"a":' * levels, rest)
    if change == 2:
        text = json.dumps(header)
        return with_header(text.replace("{", f"{{{json.dumps(name)}: {json.dumps(header[name])},", 1).encode(), rest)
    if change == 3:
        header[name]["dtype"] = chance.choice(("F64", "I8", "BF16", "F8_E4M3", "F4", "BOOL", "C64", "X", 3, None))
    elif change == 4:
        header[name]["shape"] = [chance.choice(NUMBERS) for _ in range(chance.choice((0, 1, 4, 5000)))]
    elif change == 5:
        header[name]["data_offsets"] = [chance.choice(NUMBERS), chance.choice(NUMBERS)]
    elif change == 6:
        other = chance.choice([n for n in header if n not in ("__metadata__", name)])
        header[name], header[other] = header[other], header[name]
    elif change == 7:
        header["../../" + name] = header.pop(name)
    elif change == 8:
        header["__metadata__"] = chance.choice(({}, [], None, {"token": "0" * 16}, {"token": 5}, {"a": "b" * 10**6}))
    else:
        header |= {f"more {n}": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]} for n in range(20_000)}
    return with_header(json.dumps(header).encode(), rest)


def widened(data: bytes, chance: random.Random) -> bytes:
    """A tensor file that says, against its content or with no content at all, that widths are very large."""
    header, rest = header_of(data)
    new, empty = chance.choice((10**5, 10**7, 2**40, 2**62)), chance.random() < 0.5
    for entry in header.values():
        if entry.get("shape"):
            entry["shape"] = (
                [new if s == 7 else s for s in entry["shape"]]
                if not empty
                else [
                    0,
                    *entry["shape"][1:],
                ]
            )
            if empty:
                entry["data_offsets"] = [0, 0]
    return with_header(json.dumps(header).encode(), rest)


def forged_tensors(folder: Path, chance: random.Random) -> None:
    path = next(p for p in sorted(folder.iterdir()) if "model.safetensors" in p.name)
    path.write_bytes(chance.choice((forged_header, forged_header, widened))(path.read_bytes(), chance))
    if chance.random() < 0.5:  # and a record that says the same
        record = json.loads((folder / "run.json").read_text())
        try:
            header, _ = header_of(path.read_bytes())
            shapes = {n: entry["shape"] for n, entry in header.items() if n != "__metadata__"}
        except (ValueError, TypeError, KeyError, RecursionError, MemoryError):
            return
        record["shapes"] = shapes | {n: record["shapes"].get(o) for n, o in record["tied"].items()}
        (folder / "run.json").write_text(json.dumps(record))


def forged_history(folder: Path, chance: random.Random) -> None:
    path = next((p for p in sorted(folder.iterdir()) if "history.jsonl" in p.name), None)
    if path is None:
        return
    head, *events = path.read_bytes().splitlines()
    change = chance.randrange(6)
    line = json.loads(events[0])
    if change == 0:
        wrong_entry(line, chance)
        events = [json.dumps(line).encode()]
    elif change == 1:
        events = [b"[" * chance.choice((100, 1_000_000))]
    elif change == 2:
        start = json.loads(head)
        wrong_entry(start, chance)
        head = json.dumps(start).encode()
    elif change == 3:
        events = [events[0].replace(b"{", b'{"step":1,', 1)]
    elif change == 4:
        events = [events[0].replace(b'"size":6', b'"size":' + str(chance.choice((10**9, 2**62, 10**40))).encode())]
    else:
        events = events * chance.choice((2, 50)) + [events[0][:100]]
    path.write_bytes(b"\n".join((head, *events)) + b"\n" * chance.randrange(2))


FORGERIES: tuple[Mutation, ...] = (
    forged_tensors, forged_tensors, forged_history, flipped, truncated, shuffled, overwritten, deep, twice, odd_text,
    *map(in_record, RECORD),
)  # fmt: skip
"""What a stranger may write who knows the format."""


def sealed(folder: Path) -> None:
    """Sizes and checksums in run.json are made to fit what is there, as far as it is JSON."""
    path = folder / "run.json"
    try:
        record = json.loads(path.read_bytes())
        for name, kept in record["files"].items():
            staged = folder / f".{name}.{record['token']}"
            data = (staged if staged.is_file() else folder / name).read_bytes()
            kept |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        record.pop("sha256", None)
        text = json.dumps(record, sort_keys=True, separators=(",", ":"))
        record["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps(record))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        return


# ---- the process that loads ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one attempt to load a folder."""

    said: str
    """`loaded DIGEST`, `refused`, or the class of an error that leaked."""
    detail: str
    seconds: float
    """Of the processor."""
    megabytes: float
    """Of memory, at most, above what the process had before."""
    outside: list[str]
    """What was opened outside of the folder, and programs that were started."""


class Loader:
    """A process that is used again and again; one that does not answer in time is ended and counted."""

    PATIENCE = 60.0
    """Seconds on the clock until an attempt is taken for one that hangs: other programs may be busy."""

    def __init__(self) -> None:
        self.process = self._started()

    @staticmethod
    def _started() -> subprocess.Popen[str]:
        here = str(Path(__file__).parent)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([here, *sys.path]),
            "MALLOC_MMAP_THRESHOLD_": str(2**20),  # or glibc keeps some freed tensors, now these and now those
        }
        program = [sys.executable, "-c", "import hostile; hostile.serve()"]
        return subprocess.Popen(program, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def load(self, folder: Path, network: str) -> Outcome:
        """Has the process load the folder into a fresh network of the corpus."""
        self.process.stdin.write(json.dumps([str(folder), network]) + "\n")
        self.process.stdin.flush()
        readable, _, _ = select.select([self.process.stdout], [], [], self.PATIENCE)
        line = self.process.stdout.readline() if readable else ""
        if not line:
            self.__exit__()
            self.process = self._started()
            said = "hangs" if not readable else "the process died"
            return Outcome(said=said, detail="", seconds=self.PATIENCE, megabytes=0, outside=[])
        return Outcome(**json.loads(line))


def deep(width: int = 4) -> Any:
    """Ten convolutions of this width and a head."""
    from torch import nn

    blocks = [m for n in range(10) for m in (nn.Conv2d(width if n else 3, width, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def serve() -> None:
    """Loads the folders whose names come in, and says what came of it, line by line."""
    from test_checkpoint import INPUT, fresh
    from test_saved_runs import NETWORKS

    answers, seen = os.fdopen(os.dup(1), "w"), Watch()
    os.dup2(2, 1)
    for line in sys.stdin:
        folder, network = json.loads(line)
        model = fresh({**NETWORKS, "deep": deep}[network], seed=9)
        example = INPUT.to(next(model.parameters()).dtype)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        memory = reset_peak()
        start = time.process_time()
        with seen.watching(folder):
            said, detail, found = attempt(Path(folder), model, example)
        seconds, megabytes = time.process_time() - start, peak() - memory
        if found is not None:
            said = f"{said} {digest(*found, model)}"
        if not said.startswith("loaded") and not same(model.state_dict(), before):
            said = "refused, but the network has changed"
        outcome = {"said": said, "detail": detail, "seconds": seconds, "megabytes": megabytes, "outside": seen.outside}
        answers.write(json.dumps(outcome) + "\n")
        answers.flush()


def attempt(folder: Path, model: Any, example: Any) -> tuple[str, str, tuple[Any, list[bytes]] | None]:
    """Everything that a saved run can be asked for: what came of it, why, and what was found in it."""
    import warnings

    from autowidth.checkpoint import CheckpointError, load_, read_run

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = read_run(folder)
            history = run.history()
            lines = [] if history is None else list(history.lines())
            load_(model, folder, example_inputs=example)
    except CheckpointError as error:
        return "refused", str(error)[:300], None
    except BaseException as error:
        return type(error).__name__, repr(error)[:300], None
    return "loaded", "", (run, lines)


def digest(run: Any, lines: list[bytes], model: Any) -> str:
    """Of everything that was saved."""
    told = json.dumps([run.widths, run.extra, run.events, run.tied, run.shapes, run.torch_version, run.token])
    found = hashlib.sha256(told.encode() + b"".join(lines))
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.double().numpy().tobytes())
    return found.hexdigest()


def same(state: dict[str, Any], before: dict[str, Any]) -> bool:
    return state.keys() == before.keys() and all(bool((state[name] == before[name]).all()) for name in state)


class Watch:
    """Listens to what Python opens and starts."""

    QUIET = (
        "/proc/self/",
        "/sys/",
        "/usr/",
        "/etc/localtime",
        sys.prefix,
        sys.base_prefix,
        str(Path(__file__).parents[1]),
    )

    def __init__(self) -> None:
        self.folder: str | None = None
        self.outside: list[str] = []
        sys.addaudithook(self._heard)

    def watching(self, folder: str) -> Watch:
        self.folder, self.outside = folder, []
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.folder = None

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "os.remove",
                     "os.rename", "os.mkdir", "os.truncate", "shutil.rmtree", "pickle.find_class"):  # fmt: skip
            self.outside.append(event)
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith((os.path.realpath(self.folder), *self.QUIET)):
                self.outside.append(path)


def reset_peak() -> float:
    """Forgets how much memory the process has had at most; returns how much it has now, in MB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return peak()


def peak() -> float:
    """How much memory the process has had at most, in MB."""
    try:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- many of them ----------------------------------------------------------------------------------------------------


def cases(
    count: int, mutations: tuple[Mutation, ...], schema: int, seed: int = 0
) -> Iterator[tuple[str, Path, Mutation, int]]:
    """(What it is, the run, what to do with it, seed) of that many mutations, each kind in turn."""
    runs = sorted(path for path in (CORPUS / f"schema_{schema}").iterdir())
    for number in range(count):
        mutation = mutations[number % len(mutations)]
        run = runs[(number // len(mutations)) % len(runs)]
        yield f"{mutation.__name__} of {run.name}, seed {number}", run, mutation, number
