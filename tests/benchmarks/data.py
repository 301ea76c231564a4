"""Reading a million conversations: `python -m tests.benchmarks.data`, ten minutes, 4 GB of disk.

Memory of workers is what they wrote (`Private_Dirty` of /proc: mapped pages of the index belong to
the system's cache); peaks are those of the reading process, imports included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.support.memory import peak_memory

WORDS = [f"word{number}" for number in range(3_000)]


def write_conversations(path: Path, count: int) -> None:
    """LLaVA JSON of about 1.1 kB a row: an image's name and three questions with answers."""
    numbers = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for row in range(count):
            said = []
            for turn in range(3):
                mark = "<image>\n" if turn == 0 else ""
                said.append({"from": "human", "value": mark + sentence(numbers, 12)})
                said.append({"from": "gpt", "value": sentence(numbers, 24)})
            told = {"id": f"{row:09d}", "image": f"images/{row:09d}.jpg", "conversations": said}
            file.write((",\n" if row else "") + json.dumps(told))
        file.write("]")


def sentence(numbers: np.random.Generator, length: int) -> str:
    return " ".join(WORDS[word] for word in numbers.integers(0, len(WORDS), length))


def private_memory() -> int:
    """Bytes that this process wrote and shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_Dirty"))


def start(path: Path) -> None:
    """What a training does before its first batch, and what a worker adds over an epoch."""
    begun = time.perf_counter()
    from kd_bench.distill.conversations import Conversations, data_digest, read_conversations
    from kd_bench.distill.recipe import DataSource

    found, broken = read_conversations(DataSource(path=str(path)))
    assert isinstance(found, Conversations)
    assert not broken
    data_digest(found)
    first = [found[int(index)] for index in np.random.default_rng(0).permutation(len(found))[:32]]
    assert len(first) == 32
    seconds = time.perf_counter() - begun
    told = {"seconds": seconds, "peak": peak_memory(), "private": private_memory()}
    reader, writer = os.pipe()
    for part in range(8):
        if os.fork() == 0:
            before = private_memory()
            for index in range(part, len(found), 8):
                found[index]
            os.write(writer, f"{private_memory() - before}\n".encode())
            os._exit(0)
    for _ in range(8):
        os.wait()
    os.close(writer)
    with os.fdopen(reader) as grown:
        told["workers"] = sum(int(line) for line in grown)
    sys.stdout.write(json.dumps(told) + "\n")


NEEDED = 0.4 * 989e12 / (6 * 0.5e9 + 6 * 3e9)
"""Tokens a second of an H100 at 40 % of its bfloat16 peak, estimated: 6 FLOPs a weight of the 0.5B
student; of the 3B teacher 2 for its own pass, 2 for the switched one, 2 for that one's gradient."""


def loader_tokens(folder: Path, batches: int = 40, workers: int = 2) -> float:
    """Tokens a second of the loader alone: 8 JPEGs of 640x480 a batch, 576 image tokens each."""
    from PIL import Image
    from torch.utils.data import DataLoader

    from kd_bench.distill.conversations import read_conversations
    from kd_bench.distill.encoding import BatchOrder, Collator, ConversationDataset, Encoder
    from kd_bench.distill.recipe import DataSource
    from tests.support import tiny

    numbers = np.random.default_rng(0)
    for number in range(32):
        small = Image.fromarray(numbers.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    rows = [
        {
            "image": f"{row % 32}.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\n" + "what colour is it ? " * 8},
                {"from": "gpt", "value": "a red square " * 16},
            ],
        }
        for row in range(8 * batches)
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    processor = tiny.processor(side=384)
    processor.patch_size = 16
    found, _ = read_conversations(DataSource(path=str(folder / "rows.json")))
    dataset = ConversationDataset(found, Encoder(processor, 2048))
    loader = DataLoader(
        dataset,
        batch_sampler=BatchOrder(dataset, 8, 8, seed=0),
        collate_fn=Collator(0),
        num_workers=workers,
    )
    tokens, begun = 0, 0.0
    for number, batch in enumerate(loader):
        if number == 4:
            begun = time.perf_counter()
        if number >= 4:
            tokens += int(batch["attention_mask"].sum())
    return tokens / (time.perf_counter() - begun)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=1_000_000)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.start:
        start(given.start)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "conversations.json"
        write_conversations(path, given.conversations)
        size = path.stat().st_size
        environment = {**os.environ, "KD_BENCH_CACHE": str(Path(folder) / "cache")}
        command = [sys.executable, "-m", "tests.benchmarks.data", "--start", str(path)]
        runs = [
            json.loads(subprocess.run(command, env=environment, check=True,
                                      capture_output=True, text=True).stdout)
            for _ in range(2)
        ]  # fmt: skip
    print(f"{given.conversations:,} conversations, {size / 1e9:.2f} GB of JSON\n")  # noqa: T201
    print("| | first start | second start |\n|---|---|---|")  # noqa: T201
    for name, key, unit, scale in (
        ("seconds to the first batch, digest included", "seconds", "s", 1.0),
        ("peak memory of the process", "peak", "MB", 1e-6),
        ("of its own afterwards", "private", "MB", 1e-6),
        ("eight workers over an epoch, together", "workers", "MB", 1e-6),
    ):
        cells = " | ".join(f"{run[key] * scale:,.1f} {unit}" for run in runs)
        print(f"| {name} | {cells} |")  # noqa: T201
    with tempfile.TemporaryDirectory() as folder:
        tokens = loader_tokens(Path(folder))
    print(  # noqa: T201
        f"\nLoader alone, 8 JPEGs of 640x480 a batch, 2 workers: {tokens:,.0f} tokens a second "
        f"(a Switch-KD step of 0.5B and 3B on an H100 would take {NEEDED:,.0f}, estimated)"
    )


if __name__ == "__main__":
    main()
