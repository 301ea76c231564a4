"""DBiLD against the pair list, the knee against a full sort: `python -m tests.benchmarks.losses`.

Takes about two minutes and 2 GB on one core.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_bench.distill.knee import top_logits
from kd_bench.distill.losses import dbild
from tests.benchmarks.figures import Figure, peak_memory, print_table, seconds, timed

VOCABULARY = 151_936
ROWS = 1024


def pair_list_dbild(teacher: Tensor, other: Tensor, k: int, temperature: float = 3.0) -> Tensor:
    """DBiLD with all differences of the k leading logits in memory, as its formula reads."""
    i, j = torch.triu_indices(k, k, 1)
    total = torch.zeros(len(teacher))
    for leader in (teacher, other.detach()):
        ids = leader.topk(k).indices  # [N, k]
        t, s = teacher.gather(1, ids) / temperature, other.gather(1, ids) / temperature
        log_t = F.log_softmax(t[:, i] - t[:, j], dim=-1)  # [N, pairs]
        log_s = F.log_softmax(s[:, i] - s[:, j], dim=-1)
        total = total + (log_s.exp() * (log_s - log_t)).sum(dim=-1)
    return total


def pair_figures(rows: int = 256, k: int = 1024, part: int = 32) -> list[Figure]:
    """Value and gradient of the same loss, both ways; every logit leads, as k = V.

    The pair list is measured on a part of the rows and multiplied: its time and memory are
    proportional to them, and the whole of it would take 4 GB.
    """
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(rows, k, generator=generator) * 3
    other = (torch.randn(rows, k, generator=generator) * 3).requires_grad_()

    def ours() -> Tensor:
        loss = dbild(teacher, other, k_min=k)
        return torch.autograd.grad(loss.sum(), other)[0]

    def theirs() -> Tensor:
        loss = pair_list_dbild(teacher[:part], other[:part], k)
        return torch.autograd.grad(loss.sum(), other)[0][:part]

    difference = (ours()[:part] - theirs()).abs().max().item()
    times = seconds(ours, 10), seconds(theirs, 2) * rows / part
    peaks = peak_memory(ours), peak_memory(theirs) * rows / part
    name = f"dbild forward + backward, N = {rows}, k = {k}"
    return [
        Figure(
            f"{name}: time (pair list on {part} rows, x {rows // part}; gradients differ by "
            f"{difference:.0e})",
            f"{times[0] * 1e3:.1f} ms",
            f"{times[1]:.1f} s",
            times[1] / times[0],
            100,
        ),
        Figure(
            f"{name}: memory (pair list on {part} rows, x {rows // part})",
            f"{peaks[0] / 2**20:.1f} MB",
            f"{peaks[1] / 2**20:.0f} MB",
            peaks[1] / peaks[0],
            100,
        ),
    ]


def logits_of(shape: str, rows: int) -> Tensor:
    """Random logits [rows, V] of one of four shapes."""
    normal = torch.randn(rows, VOCABULARY)
    if shape == "Gaussian":
        return normal * 2.5
    if shape == "peaked":
        return torch.where(torch.rand_like(normal) < 1e-4, normal * 2 + 12, normal * 2)
    if shape == "Gumbel":
        return -torch.empty_like(normal).exponential_().log()
    chi_squared = torch.randn(3, rows, VOCABULARY).square().sum(dim=0)
    return normal / (chi_squared / 3).sqrt()  # Student-t with 3 degrees of freedom


def knee_of_sorted(ordered: Tensor) -> Tensor:
    """Knees of rows in falling order, by the definition."""
    curve = ordered.double()
    y = (curve - curve[:, -1:]) / (curve[:, :1] - curve[:, -1:])
    gap = 1 - torch.arange(VOCABULARY).double() / (VOCABULARY - 1) - y
    return gap.argmax(dim=-1).clamp(min=2)


def knee_figures(at_a_time: int = 32) -> list[Figure]:
    """Knee and sorted selection of [1024, 151,936], a few rows at a time to save memory."""
    figures = []
    torch.manual_seed(1)
    for shape in ("Gaussian", "peaked", "Gumbel", "Student-t"):
        ours = theirs = 0.0
        same = 0
        knees = []
        for _ in range(ROWS // at_a_time):
            logits = logits_of(shape, at_a_time)
            top, spent = timed(lambda logits=logits: top_logits(logits))
            ours += spent
            (ordered, ids), spent = timed(
                lambda logits=logits: torch.sort(logits, dim=-1, descending=True, stable=True)
            )
            theirs += spent
            knees.append(top.k)
            for row, k in enumerate(knee_of_sorted(ordered).tolist()):
                same += k == top.k[row] and torch.equal(top.ids[row, :k], ids[row, :k])
        figures.append(
            Figure(
                f"knee + selection of [{ROWS}, {VOCABULARY}], {shape}: same k and ids on {same} "
                f"rows (median k {int(torch.cat(knees).median())})",
                f"{ours:.2f} s",
                f"{theirs:.2f} s",
                theirs / ours,
                3,
            )
        )
    return figures


def small_figures(rows: int = 200, vocabulary: int = 600) -> list[Figure]:
    """What a step of the embedded recipe pays for one DBiLD term."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(rows, vocabulary, generator=generator) * 3
    other = (torch.randn(rows, vocabulary, generator=generator) * 3).requires_grad_()
    time = seconds(lambda: dbild(teacher, other).sum().backward(), 30)
    top = top_logits(teacher)
    shared = seconds(lambda: dbild(teacher, other, teacher_top=top).sum().backward(), 30)
    name = f"dbild forward + backward, N = {rows}, V = {vocabulary}"
    return [
        Figure(name, f"{time * 1e3:.1f} ms"),
        Figure(f"{name}, the teacher's top logits shared", f"{shared * 1e3:.1f} ms"),
    ]


def main() -> None:
    torch.set_num_threads(1)
    figures = [*pair_figures(), *knee_figures(), *small_figures()]
    print_table("Losses", figures)


if __name__ == "__main__":
    main()
