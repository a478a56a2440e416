"""Whole models: their convolutions become hyper-convolutions, and back."""

from .convert import convert
from .materialize import materialize
from .report import LayerReport, Report

__all__ = ["LayerReport", "Report", "convert", "materialize"]
