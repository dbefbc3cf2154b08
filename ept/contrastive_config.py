"""``ContrastiveConfig``: task embeddings and their contrastive loss, which EPT and MoRE have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from .adapter_config import AdapterConfig, check, is_int, is_number


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
        check(
            self.task_embedding_dim is None or (is_int(self.task_embedding_dim) and self.task_embedding_dim >= 1),
            f"task_embedding_dim must be None or an integer >= 1, got {self.task_embedding_dim!r}",
        )
        check(
            is_number(self.task_similarity) and 0 <= self.task_similarity < 1,
            f"task_similarity must be a number in [0, 1), got {self.task_similarity!r}",
        )
        check(
            is_number(self.temperature) and self.temperature > 0,
            f"temperature must be a number > 0, got {self.temperature!r}",
        )
        check(
            is_number(self.contrastive_weight) and self.contrastive_weight >= 0,
            f"contrastive_weight must be a number >= 0, got {self.contrastive_weight!r}",
        )
