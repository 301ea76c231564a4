"""The gate on answers of a real checkpoint of the embedded world, printed as one table.

    python -m tests.statistics.real_answers CHECKPOINT [FOLDER]

The same checkpoint at batch 1 and 16 must pass. With a share of its weights replaced by noise of
the same spread, verdicts and intervals are reported, and a tenth of them must be caught.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np

from kd_bench.errors import ExitCode
from kd_bench.gate import GateReport, check
from kd_bench.policy import load_policy
from kd_bench.store import Run

SHARES = (0.01, 0.03, 0.10)


def noised(checkpoint: Path, folder: Path, share: float, seed: int = 0) -> Path:
    """A copy whose weights are, with probability `share`, drawn anew from their tensor's spread."""
    from safetensors.torch import load_file, save_file

    target = folder / f"noised-{share:g}-{seed}"
    shutil.copytree(checkpoint, target, dirs_exist_ok=True)
    import torch

    generator = torch.Generator().manual_seed(seed)
    for file in sorted(target.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            values = tensor.float()
            hit = torch.rand(values.shape, generator=generator) < share
            noise = torch.randn(values.shape, generator=generator)
            spread = values.std() if values.numel() > 1 else values.abs()
            drawn = values.mean() + noise * spread
            tensors[name] = torch.where(hit, drawn, values).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return target


def answers(checkpoint: Path, name: str, batch: int, world: Path, results: Path) -> Run:
    """Evaluate a checkpoint on the ten mini benchmarks of a world."""
    from kd_bench.evals.run import EvalSettings, evaluate

    settings = EvalSettings(
        name=name, batch_size=batch, data=world / "test", results=results, progress=False
    )
    return evaluate(checkpoint, settings)


def row(title: str, report: GateReport) -> str:
    """One line of the table."""
    average = report.verdicts[-1]
    counts = {
        verdict: sum(each.verdict == verdict for each in report.verdicts[:-1])
        for verdict in ("regressed", "inconclusive", "not worse than the margin", "improved")
    }
    change = average.difference
    return (
        f"| {title} | {report.outcome} ({report.exit_code:d}) | "
        f"{' / '.join(str(count) for count in counts.values())} | {average.verdict} | "
        f"{change.value:+.1f} ({change.interval.low:+.1f} to {change.interval.high:+.1f}) |"
    )


def measure(checkpoint: Path, folder: Path, seeds: tuple[int, ...] = (0, 1)) -> bool:
    """Print the table; whether equal answers passed and a tenth of noise was caught."""
    from kd_bench.world.build import build_world

    policy = load_policy()
    held = True
    print("| run | outcome | regressed / inconclusive / equal / improved | average | difference |")  # noqa: T201
    print("|---|---|---|---|---|")  # noqa: T201
    for seed in seeds:
        world, results = folder / f"world-{seed}", folder / f"results-{seed}"
        build_world(world, seed)
        baseline = answers(checkpoint, "batch-1", 1, world, results)
        same = check(answers(checkpoint, "batch-16", 16, world, results), baseline, policy)
        print(row(f"batch 16 against batch 1, world {seed}", same), flush=True)  # noqa: T201
        held &= same.exit_code == ExitCode.PASS
        for share in SHARES:
            damaged = noised(checkpoint, folder, share)
            run = answers(damaged, f"noised-{share:g}", 16, world, results)
            report = check(run, baseline, policy)
            print(row(f"{share:.0%} of the weights noised, world {seed}", report), flush=True)  # noqa: T201
            held &= share < max(SHARES) or report.exit_code == ExitCode.REGRESSION
    return bool(np.all(held))


def main() -> None:
    """Measure one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(tempfile.mkdtemp()))
    arguments = parser.parse_args()
    held = measure(arguments.checkpoint, arguments.folder)
    print("as demanded" if held else "NOT as demanded")  # noqa: T201


if __name__ == "__main__":
    main()
