"""Models that lmms-eval brings, run through our store and journal as they are."""

import inspect
from typing import Any

from kd_bench.errors import UsageError, closest, one_line
from kd_bench.evals.adapter import StockAdapter
from kd_bench.evals.checkpoint import StockModel
from kd_bench.evals.upstream import lmms_eval

# Packages whose module has another name, as far as lmms-eval's models import them.
_PACKAGES = {"PIL": "pillow", "cv2": "opencv-python-headless", "decord": "eva-decord"}


def load_stock(wanted: StockModel, batch_size: int | None) -> StockAdapter:
    """The model behind its journal.

    Raises:
        UsageError: lmms-eval does not know it, or it cannot be made with these arguments.
    """
    name, arguments = wanted.name, wanted.arguments
    lmms_eval()
    from lmms_eval.models import get_model, list_available_models

    known = list_available_models(include_aliases=True)
    if name not in known:
        raise UsageError(
            f"lmms-eval has no model {name!r}.{closest(name, known)}",
            f"It has {len(known)}, among them llava_hf, qwen2_5_vl and internvl_hf.",
        )
    try:
        kind: Any = get_model(name)
        extra: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
        extra |= _on_this_machine(kind, arguments)
        model = kind.create_from_arg_string(arguments, extra)
    except (ImportError, ModuleNotFoundError) as error:
        lacking = (error.name or "").partition(".")[0]
        raise UsageError(
            f"lmms-eval's {name} cannot be loaded: {one_line(error)}.",
            f"Install what it needs: pip install {_PACKAGES.get(lacking, lacking) or name}",
        ) from error
    except Exception as error:
        raise UsageError(
            f"lmms-eval's {name} cannot be made with {arguments!r}: "
            f"{type(error).__name__}: {one_line(error)}",
            "Correct --model-args.",
        ) from error
    return StockAdapter(model, batch_size)


def _on_this_machine(kind: Any, arguments: str) -> dict[str, str]:
    """Arguments for a CPU: upstream's defaults place models on an accelerator, or nowhere."""
    import torch

    if torch.cuda.is_available():
        return {}
    known = inspect.signature(kind.__init__).parameters
    given = {part.partition("=")[0] for part in arguments.split(",")}
    return {name: "cpu" for name in ("device", "device_map") if name in known and name not in given}
