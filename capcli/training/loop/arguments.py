"""The options of a run as arguments of transformers' Trainer."""

from __future__ import annotations

import math
import os

import torch
from transformers import Seq2SeqTrainingArguments

from capcli.captioning.model import choose_dtype
from capcli.errors import UsageError
from capcli.loading import default_workers, usable_cpus
from capcli.options import TrainOptions


def training_arguments(options: TrainOptions, folder: str) -> Seq2SeqTrainingArguments:
    """The Trainer's arguments, with checkpoints in `folder`. ScheduleCallback decides when to log, evaluate and save.

    Under torchrun or accelerate launch this initialises the process group. Raises UsageError for a dtype that the device
    does not support.
    """
    dtype = chosen_dtype(options)
    plateau = options.schedule == "reduce_lr_on_plateau"
    arguments = Seq2SeqTrainingArguments(
        output_dir=folder,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        adam_beta2=options.adam_beta2,
        max_grad_norm=options.max_grad_norm,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        seed=options.data.seed,
        data_seed=options.data.seed,
        dataloader_num_workers=loader_workers(options),
        dataloader_prefetch_factor=4 if loader_workers(options) else None,
        ddp_find_unused_parameters=options.unfreeze_after is not None,
        ddp_timeout=6 * 3600,  # seconds: the other processes wait while the first one checks all images
        metric_for_best_model=("eval_loss" if options.select == "loss" else "eval_CIDEr") if plateau else None,
        greater_is_better=options.select == "cider" if plateau else None,
        use_cpu=options.device == "cpu" or not torch.cuda.is_available(),
        label_names=["labels"],
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        logging_nan_inf_filter=False,
        logging_strategy="no",
        eval_strategy="steps" if plateau else "no",  # "no" is refused with this schedule
        save_strategy="no",
        report_to="none",
        log_level="critical",  # capcli writes its own messages
        log_level_replica="critical",
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # noqa: SLF001  one device per process: torchrun starts a process for each
    return arguments


def chosen_dtype(options: TrainOptions) -> str:
    """The dtype of the computation; the weights stay float32. `auto` is bfloat16 on a GPU that supports it, else float32."""
    on_cpu = options.device == "cpu" or not torch.cuda.is_available()
    if on_cpu and options.dtype == "float16":
        raise UsageError("--dtype float16 needs a GPU, which this run does not use: on a CPU give bfloat16")
    if options.dtype != "auto":
        return options.dtype
    if on_cpu:
        return "float32"
    return choose_dtype("auto", torch.device("cuda"))


def loader_workers(options: TrainOptions) -> int:
    """The number of processes that load images, by default as many as there are spare cores for each training process."""
    if options.workers is not None:
        return options.workers
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cpus = max(1, usable_cpus() // processes)
    return default_workers(cpus, on_gpu=torch.cuda.is_available() and options.device != "cpu")


def total_steps(arguments: Seq2SeqTrainingArguments, pairs: int) -> int:
    """The number of steps as the Trainer counts them: the last step of an epoch may have fewer batches."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batches: int = math.ceil(pairs / (arguments.per_device_train_batch_size * arguments.world_size))
    updates: int = math.ceil(batches / arguments.gradient_accumulation_steps)
    return math.ceil(float(arguments.num_train_epochs) * updates)
