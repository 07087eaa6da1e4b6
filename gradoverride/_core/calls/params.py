"""The trainable parameters of a module in one call: which the rule answers for, and which are left to autograd.

One is *aliased* when the rule or the kept graph answers for it, so that the forward meets an alias; and *natural* when
it is left to torch's own graph, so that the forward meets the parameter itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradoverride._core.autograd.ambient import EAGER, TRACED, TRANSFORMED
from gradoverride._core.autograd.nodes import leaves_behind
from gradoverride._core.binding.contract import Meta
from gradoverride._core.private.dynamo import fail
from gradoverride._core.python.scan import mentions
from gradoverride._core.values.tensors import is_tracked
from gradoverride.errors import RuleSignatureError, UnsupportedError

if TYPE_CHECKING:
    from gradoverride._core.calls.call import Call

__all__ = ["Param", "find_params", "settle_params"]


class Param:
    """A trainable parameter of the module, in one call."""

    __slots__ = ("asked", "meta", "name", "names", "tensor")

    def __init__(self, name: str, tensor: Any, meta: Meta) -> None:
        self.name = name
        self.names = [name]  # a tied parameter has several
        self.tensor = tensor
        self.meta = meta
        self.asked = False


def find_params(call: Call, module: nn.Module) -> None:
    """Sort the trainable parameters of `module` into those the rule answers for and those left to autograd."""
    plan = call.plan
    found: dict[Tensor, Param] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        if call.mode == EAGER and type(tensor) is not nn.Parameter:
            _check_present(call, module, name, tensor)
        if tensor in found:
            found[tensor].names.append(name)
        elif tensor.requires_grad or (call.mode == TRANSFORMED and is_tracked(tensor)):
            found[tensor] = Param(name, tensor, Meta(tensor))
        else:
            call.frozen[name] = tensor
    params = _with_parametrized(call, module, list(found.values()))
    # A buffer or parameter called `params` comes before the reserved name.
    asks_all = plan.asks_params and "params" not in module._buffers and "params" not in module._parameters
    for param in params:
        names = plan.asked_of_module.intersection(param.names)
        param.asked = asks_all or plan.class_form or bool(names - plan.may_be_residuals)
        call.unsettled = call.unsettled or (bool(names) and not param.asked)
        if asks_all and not plan.class_form and all([name in call.groups for name in param.names]):
            _refuse_same_name(call, param.name)
    # Left to autograd, but reached through an alias: where the rule may answer for it all the same, and where
    # torch would run the parameter's hooks once more when the kept graph is asked for its gradient.
    explicit = call.mode == TRANSFORMED or plan.through_aliases or call.unsettled
    explicit = explicit or any(name in plan.may_answer for param in params for name in param.names)
    explicit = explicit or (call.mode == EAGER and any(param.tensor._backward_hooks for param in params))
    explicit = explicit or (call.mode == TRACED and plan.asks_vjp and any([not p.tensor.is_leaf for p in params]))
    kept = _behind_attributes(module, plan.fn) if explicit and call.mode == EAGER else ()
    # (Dynamo would guard each id that it sees.)
    aliased = [param.asked or (explicit and not (kept and id(param.tensor) in kept)) for param in params]
    call.aliased = [param for param, through_alias in zip(params, aliased, strict=True) if through_alias]
    call.natural = [param for param, through_alias in zip(params, aliased, strict=True) if not through_alias]
    if plan.class_form and plan.asks_vjp:
        for param in params:
            param.asked = False
    call.params = [*call.aliased, *call.natural]


def settle_params(call: Call, residuals: dict[str, Any]) -> None:
    """The forward has run and handed these over: what else it could have is a parameter, and asked for."""
    for param in call.aliased:
        param.asked = param.asked or any(
            [name in call.plan.asked_of_module and name not in residuals for name in param.names]
        )
    if not call.plan.asks_vjp and all([param.asked for param in call.aliased]):
        call.graph = None  # was kept for their own gradients


def _check_present(call: Call, module: nn.Module, name: str, tensor: Tensor) -> None:
    who = call.plan.forward.who
    if is_lazy(tensor):
        fail(
            UnsupportedError,
            f"{who} must have all its parameters when a gradient is wanted; '{name}' of "
            f"'{type(module).__name__}' is lazy and not there yet. Call the module once under torch.no_grad()",
        )
    part = _sharded_part(module, name) if hasattr(tensor, "full_tensor") else None
    if part is not None:
        fail(
            UnsupportedError,
            f"{who} must have all its parameters when a gradient is wanted; '{name}' is put together later, for "
            f"'{part}' is sharded on its own. Override '{part}' and the other parts instead, or shard "
            "the whole at once",
        )


def _sharded_part(module: nn.Module, name: str) -> str | None:
    """The part of `module` on the way to the parameter `name` that FSDP2 shards on its own."""
    from torch.distributed.fsdp import FSDPModule

    steps = name.split(".")[:-1]
    paths = [".".join(steps[: index + 1]) for index in range(len(steps))]
    return next((path for path in paths if isinstance(module.get_submodule(path), FSDPModule)), None)


def _with_parametrized(call: Call, module: nn.Module, params: list[Param]) -> list[Param]:
    """A parametrized weight that the rule asks for under its plain name stands in for what it is computed from."""
    if "parametrizations" not in module._modules:
        return params
    table: Any = module._modules["parametrizations"]
    asked = [name for name, source in call.plan.sources.items() if source == "deferred"]
    for name in list(table._modules):
        if name in asked or call.plan.class_form:
            prefix = f"parametrizations.{name}."
            value = getattr(module, name)
            params = [param for param in params if not param.name.startswith(prefix)]
            if value.requires_grad or call.mode == TRANSFORMED:
                params.append(Param(name, value, Meta(value)))
            else:
                call.frozen[name] = value
    return params


def _refuse_same_name(call: Call, name: str) -> None:
    fail(
        RuleSignatureError,
        f"{call.plan.who} asks for 'params' and could not answer for the "
        f"parameter '{name}', for an argument of the forward has that name and comes first. Rename the argument, "
        "or ask for other parameters by name",
    )


def _behind_attributes(module: nn.Module, fn: Any) -> set[int]:
    """The ids of parameters that attributes of `module` were computed from before `fn`, which meets these: by the hooks
    of `prune` and of the older `weight_norm` and `spectral_norm`.
    """
    computed = [(name, one.grad_fn) for name, one in [*vars(module).items()] if isinstance(one, Tensor)]
    nodes = [node for name, node in computed if node is not None and mentions(fn, name)]
    return {id(leaf) for leaf in leaves_behind(nodes) if not leaf._backward_hooks}
