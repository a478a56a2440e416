"""The layers in a graph of `torch.fx`: nodes that call the module, as torch.nn's own layers are."""

from __future__ import annotations

from typing import Any

from torch import fx, nn


def call_in_trace(layer: nn.Module, input: fx.Proxy, **kwargs: Any) -> Any:
    """The node `call_module` of `layer` on `input`, whatever the tracer takes for a leaf.

    A layer that is itself the root of the trace has no name in it; the root is then a module around it.
    """
    tracer: Any = input.tracer
    given = {name: value for name, value in kwargs.items() if value is not None}
    if tracer.root is layer:
        tracer.root = nn.ModuleDict({"layer": layer})
        return tracer.create_proxy("call_module", "layer", (input,), given)
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), given)
