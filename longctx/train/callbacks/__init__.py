"""Callbacks: logging, checkpoints, validation, trackers."""

from longctx.train.callbacks.checkpoints import Checkpoints
from longctx.train.callbacks.metrics import MetricsFile, StepLine
from longctx.train.callbacks.trackers import TensorBoard, Wandb
from longctx.train.callbacks.validation import Validation

__all__ = ["Checkpoints", "MetricsFile", "StepLine", "TensorBoard", "Validation", "Wandb"]
