"""Multi-task training, evaluation and reports."""

from ept.extras import train_extra

with train_extra("ept.training"):
    from ept.training.adding import add_task
    from ept.training.arguments import EPTTrainingArguments
    from ept.training.checkpoints import newest_checkpoint
    from ept.training.collator import (
        CausalCollator,
        EncoderCollator,
        Seq2SeqCollator,
        TaskIdsCollator,
        make_collator,
    )
    from ept.training.evaluate import baselines, evaluate_tasks, mean_headline
    from ept.training.multitask import MultiTaskEncoder
    from ept.training.rows import TaskRows, evaluation_rows, training_rows
    from ept.training.sampler import TaskBalancedSampler
    from ept.training.saving import load_base, load_trained, save_trained
    from ept.training.trainer import EPTTrainer

__all__ = [
    "CausalCollator",
    "EPTTrainer",
    "EPTTrainingArguments",
    "EncoderCollator",
    "MultiTaskEncoder",
    "Seq2SeqCollator",
    "TaskBalancedSampler",
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
