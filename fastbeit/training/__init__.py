"""Training: optimizer, schedule, distribution, step, checkpoint, control and progress."""

from fastbeit.training.optimizer import param_groups
from fastbeit.training.schedule import cosine_schedule

__all__ = ["cosine_schedule", "param_groups"]
