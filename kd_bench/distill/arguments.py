"""A recipe's stage in the words of transformers' Trainer."""

import netrc
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import TrainingArguments

from kd_bench.distill.recipe import Recipe, Stage
from kd_bench.errors import UsageError


def check_loggers(names: Sequence[str]) -> None:
    """Whether the loggers of `report_to` can start here.

    Raises:
        UsageError: a package is missing, or Weights & Biases knows no key.
    """
    for name in names:
        if find_spec(name) is None:
            raise UsageError(
                f"report_to: the package {name} is not installed.", f"pip install {name}"
            )
    needs_key = "wandb" in names and os.environ.get("WANDB_MODE") not in ("offline", "disabled")
    if needs_key and not (os.environ.get("WANDB_API_KEY") or _has_wandb_login()):
        raise UsageError(
            "report_to: Weights & Biases has no key on this machine.",
            "Run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline.",
        )


def _has_wandb_login() -> bool:
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].strip("/")
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def trainer_arguments(
    recipe: Recipe, stage: Stage, folder: Path, steps: int, piece: int, seed: int
) -> TrainingArguments:
    """The stage's settings in the Trainer's words.

    Args:
        folder: where its checkpoints go.
        steps: optimizer steps in all.
        piece: samples that one device takes at a time.
    """
    schedule = "constant_with_warmup" if stage.schedule == "constant" else stage.schedule
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=piece,
        gradient_accumulation_steps=stage.gradient_accumulation,
        max_steps=steps,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=stage.warmup,
        weight_decay=stage.weight_decay,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        max_grad_norm=stage.max_grad_norm,
        bf16=stage.precision == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=stage.log_every,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="steps" if stage.save_every else "no",
        save_steps=stage.save_every or 500,
        report_to=list(recipe.report_to) or "none",
        project="kd-bench",
        run_name=f"{recipe.output_folder.name}-{stage.name}",
        seed=seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=stage.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=True,  # terms on the switch alone leave the language model out
        average_tokens_across_devices=True,
    )
