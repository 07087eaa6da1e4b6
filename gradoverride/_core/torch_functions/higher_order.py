"""Higher-order operators of torch, such as `torch.cond` or a checkpoint that Dynamo traces, under rules for functions.

They are given what they run, their bodies. A mode that is shown such an operator has been left for as long as it runs;
so each body is replaced by one that enters the mode again. In eager mode torch compiles the body first, and comes here
while it does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling as compiling
from torch.fx import GraphModule

__all__ = ["run_under"]

# From where to where the bodies are among the arguments; otherwise there is one, the first. (The scalar functions that
# an attention is modified by stand further back, and remain as they are.)
_BODIES = {
    **{"cond": (1, 3), "while_loop": (0, 2), "while_loop_stack_output": (0, 2), "dynamo_bypassing_wrapper": (1, 2)},
    **{"wrap_with_set_grad_enabled": (1, 2), "wrap_with_autocast": (4, 5)},
    **{"aoti_call_delegate": (0, 0), "executorch_call_delegate": (0, 0)},  # given a module, and read it
}
_CODE = (FunctionType, MethodType, functools.partial, nn.Module)


def run_under(mode: Any, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a higher-order operator with `mode` entered in its bodies."""
    if compiling():
        if operator.__name__ == "invoke_subgraph":
            # A region to be compiled once for all its calls, by the code of its function: ours is the same for all.
            with mode:
                return args[0](*args[1:], **kwargs)
        with mode:  # in a body Dynamo lets modes be entered and left only if that was done before it
            pass
    first, last = _BODIES.get(operator.__name__, (0, 1))
    bodies = [_within(mode, body) if isinstance(body, _CODE) else body for body in args[first:last]]
    return operator(*args[:first], *bodies, *args[last:], **kwargs)


def _within(mode: Any, body: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(body, GraphModule):  # traced, with the rules in it
        return body
    if isinstance(body, functools.partial):  # some want one
        return functools.partial(_within(mode, body.func), *body.args, **body.keywords)

    def within(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return body(*args, **kwargs)

    return within
