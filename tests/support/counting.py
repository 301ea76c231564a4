"""What a GPU would wait for, counted on a CPU."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")
"""Operations whose result, or its shape, the host waits for."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


PRODUCTS = (
    "addmm",
    "baddbmm",
    "bmm",
    "convolution",
    "convolution_backward",
    "mm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)
"""Matrix products, convolutions and attention, forwards and backwards."""


class Operations(TorchDispatchMode):
    """Counts operations by name, and those that would synchronise.

    A host that reads a tensor in whole (`tolist`, `cpu`) calls no operation on a CPU; such calls
    are counted where they are made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.paused = False  # while the host works on tensors of its own
        self.products: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name.removeprefix("aten::")
        self.names[name] += 1
        chosen = args[1] if name in INDEXING else ()
        by_mask = any(each is not None and each.dtype == torch.bool for each in chosen)
        if not self.paused and (by_mask or any(name.startswith(each) for each in ASKING)):
            self.waits[name] += 1
        if name in PRODUCTS:
            given = tuple(each.detach() if isinstance(each, Tensor) else each for each in args)
            self.products.append((function, given, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def replay(self) -> None:
        """Do the matrix products, convolutions and attention again, and nothing else."""
        for function, given, named in self.products:
            function(*given, **named)

    def not_counting(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, in which no wait is counted."""

        def run(*given: Any, **named: Any) -> Any:
            before, self.paused = self.paused, True
            try:
                return work(*given, **named)
            finally:
                self.paused = before

        return run


@contextmanager
def counted() -> Iterator[Operations]:
    """Inside, every operation and every wait of this thread's forward and backward is counted."""
    operations = Operations()

    def watched(name: str) -> Any:
        before = getattr(Tensor, name)

        def read(self: Tensor, *given: Any, **named: Any) -> Any:
            operations.waits[name] += not operations.paused
            return before(self, *given, **named)

        return mock.patch.object(Tensor, name, read)

    with watched("tolist"), watched("cpu"), operations:
        yield operations
