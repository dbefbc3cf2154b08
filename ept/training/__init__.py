"""Multi-task training, evaluation and reports."""

from ..extras import train_extra

with train_extra("ept.training"):
    from ..trainers import EPTTrainerMixin, TaskBalancedSampler, TaskCollator
    from .arguments import EPTTrainingArguments
    from .checkpointing import newest_checkpoint
    from .collator import (
        CausalCollator,
        EncoderCollator,
        Seq2SeqCollator,
        TaskIdsCollator,
        TaskRows,
        evaluation_rows,
        make_collator,
        training_rows,
    )
    from .evaluate import baselines, evaluate_tasks, mean_headline
    from .multitask import MultiTaskEncoder, add_task
    from .saving import load_base, load_trained, save_trained
    from .trainer import EPTTrainer

__all__ = [
    "CausalCollator",
    "EPTTrainer",
    "EPTTrainerMixin",
    "EPTTrainingArguments",
    "EncoderCollator",
    "MultiTaskEncoder",
    "Seq2SeqCollator",
    "TaskBalancedSampler",
    "TaskCollator",
    "TaskIdsCollator",
    "TaskRows",
    "add_task",
    "baselines",
    "evaluate_tasks",
    "evaluation_rows",
    "load_base",
    "load_trained",
    "make_collator",
    "mean_headline",
    "newest_checkpoint",
    "save_trained",
    "training_rows",
]
