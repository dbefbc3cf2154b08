"""``ContrastiveConfig``: task embeddings and their contrastive loss, which EPT and MoRE have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from .adapter_config import AdapterConfig, check, check_size, is_number

#: Below it, logits (a cosine over the temperature) and their gradients leave the range of fp32.
LEAST_TEMPERATURE = 1e-6


@dataclass
class ContrastiveConfig(AdapterConfig):
    """``AdapterConfig`` with a table of task embeddings, placed by a contrastive loss (spec section 3).

    Args (beyond those of ``AdapterConfig``):
        task_embedding_dim: width of a task embedding. None: the commonest input width among the adapted layers, so that
            the contrastive loss can compare the embeddings with representations.
        task_similarity: expected cosine of two tasks' embeddings at the start, in [0, 1): how much the tasks begin
            alike.
        temperature: of the contrastive loss's cosine similarities.
        contrastive_weight: weight of the contrastive loss in the total; 0 switches it off.
    """

    task_embedding_dim: int | None = field(default=None, metadata={"help": "Width of a task embedding."})
    task_similarity: float = field(default=0.75, metadata={"help": "Cosine of two task embeddings at the start."})
    temperature: float = field(default=0.05, metadata={"help": "Temperature of the contrastive loss."})
    contrastive_weight: float = field(default=0.1, metadata={"help": "Weight of the contrastive loss."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_embedding_dim is not None:
            check_size("task_embedding_dim", self.task_embedding_dim, "None or an integer >= 1")
        check(
            is_number(self.task_similarity) and 0 <= self.task_similarity < 1,
            f"task_similarity must be a number in [0, 1), got {self.task_similarity!r}",
        )
        check(
            is_number(self.temperature) and self.temperature > 0,
            f"temperature must be a number > 0, got {self.temperature!r}",
        )
        check(
            self.temperature >= LEAST_TEMPERATURE,
            f"temperature must be at least {LEAST_TEMPERATURE}, got {self.temperature!r}",
        )
        check(
            is_number(self.contrastive_weight) and self.contrastive_weight >= 0,
            f"contrastive_weight must be a number >= 0, got {self.contrastive_weight!r}",
        )
