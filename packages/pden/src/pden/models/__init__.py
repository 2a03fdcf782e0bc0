"""Task models: encoder F, classifier C and projection head P in one module."""

from pden.models.build import build_model, model_names
from pden.models.task import TaskModel, TaskOutput

__all__ = ["TaskModel", "TaskOutput", "build_model", "model_names"]
