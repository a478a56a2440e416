"""Batch norms folded into the convolutions before them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from .swap import become

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def fold_batch_norms(model: nn.Module, convs: Mapping[str, Any]) -> dict[str, str]:
    """Fold the batch norm behind each of `convs`, where one follows and nothing else uses the output.

    Args:
        model: in evaluation mode.
        convs: nn.ConvNds in it, by name.

    Returns:
        Of each layer whose batch norm, if it has one, was not folded: the reason.
    """
    aliases: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        aliases[module] = aliases.get(module, 0) + 1
    reasons = {}
    wanted = set(convs.values())
    places = dict(_places(model, wanted))
    for name, conv in convs.items():
        if conv not in places:
            reasons[name] = "torch.fx cannot trace the module that it is in"
            continue
        norm, reason = _following(*places[conv], conv)
        if norm is None:
            continue
        reason = reason or _obstacle(conv, norm) or ("it is shared" if aliases[conv] > 1 else "")
        if reason or aliases[norm] > 1:
            reasons[name] = reason or "its batch norm is shared"
            continue
        _fold(conv, norm)
        become(norm, nn.Identity().eval())
    return reasons


class _Around(fx.Tracer):
    """Traces what is around some layers: whatever has none of them in it is one node."""

    def __init__(self, wanted: set[nn.Module]) -> None:
        super().__init__()
        self.wanted = wanted

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether none of the layers is in it."""
        return not _inside(m, self.wanted)


def _inside(module: nn.Module, wanted: set[nn.Module]) -> bool:
    return any(part in wanted for part in module.modules() if part is not module)


def _places(
    module: nn.Module, wanted: set[nn.Module]
) -> Iterator[tuple[nn.Module, tuple[nn.Module, fx.Graph]]]:
    """Of each layer: the largest module around it that can be traced, and its graph."""
    if not _inside(module, wanted):
        return
    parameters = inspect.signature(module.forward).parameters.values()
    usual = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    try:
        graph = _Around(wanted).trace(module, concrete_args=usual)
    except Exception:  # a forward may do what it likes with what is no tensor
        for child in module.children():
            yield from _places(child, wanted)
        return
    for part in module.modules():
        if part in wanted:
            yield part, (module, graph)


def _following(root: nn.Module, graph: fx.Graph, conv: nn.Module) -> tuple[Any, str]:
    """(the batch norm that follows, or None; why it cannot be folded, or '')."""
    calls = [node for node in graph.nodes if _called(root, node) is conv]
    norms = [user for node in calls for user in node.users if isinstance(_called(root, user), _NORMS)]
    if not norms:
        return None, ""
    norm = _called(root, norms[0])
    reads = [n for n in graph.nodes if n.op == "get_attr" and _holds(root, n.target, conv)]
    if len(calls) > 1 or len(calls[0].users) > 1 or reads:
        return norm, "its output or its weight is used elsewhere, too"
    if sum(_called(root, node) is norm for node in graph.nodes) > 1:
        return norm, "its batch norm is used elsewhere, too"
    return norm, ""


def _called(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _holds(root: nn.Module, target: Any, conv: nn.Module) -> bool:
    owner, _, _ = str(target).rpartition(".")
    return bool(owner) and root.get_submodule(owner) is conv


def _obstacle(conv: Any, norm: Any) -> str:
    if type(norm) not in _NORMS:
        return f"{type(norm).__name__} does more than a batch norm"
    if norm.training or norm.running_mean is None:
        return "its batch norm has no statistics of its own in use"
    if conv._forward_hooks or conv._backward_hooks or conv._backward_pre_hooks:
        return "it has hooks, which would see other values"
    if any(hooks for name, hooks in vars(norm).items() if "_hooks" in name and isinstance(hooks, dict)):
        return "its batch norm has hooks"
    return ""


def _fold(conv: Any, norm: Any) -> None:
    """Scale `conv`'s weight, and shift its bias, as `norm` in evaluation mode does its output."""
    weight = conv.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean.to(wide) * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    if conv.bias is not None:
        shift = shift + scale * conv.bias
    taps = (1,) * (weight.dim() - 2)
    if conv.transposed:  # [C_in, C_out/groups, ...], of which C_in lies group by group
        grouped = scale.view(conv.groups, 1, -1).expand(-1, weight.shape[0] // conv.groups, -1)
        factors = grouped.reshape(*weight.shape[:2], *taps)
    else:
        factors = scale.view(-1, 1, *taps)
    scaled = (weight.to(wide) * factors).to(weight.dtype)
    conv.weight = nn.Parameter(scaled, weight.requires_grad)
    conv.bias = nn.Parameter(shift.to(weight.dtype), weight.requires_grad)
