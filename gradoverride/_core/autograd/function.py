"""The only file that subclasses `autograd.Function`.

On the general path a forward runs before and outside of the Function, on aliases that are cut off from the graph;
the Function only ties the result to the inputs, with the rule as its gradient. So one mechanism serves plain autograd,
`torch.func` and `torch.compile`, and what the forward does (vmap, submodules, parameters left to autograd) is traced
as ever. On the short path a forward of known reach runs inside, as one does that is written by hand.

    plain_function  plain tensors in, one tensor out: what most calls need (`short_function.py` writes its code)
    alias_function  the identity, whose gradient a rule edits (`edit.py`)
    General         everything else, eager or traced
    Transformed     the same for torch.func: a generated vmap rule, and `jvp`, on which Dynamo breaks its graph
    Cut             aliases that the kept graph behind `vjp` starts from: gradients end there
    TracedCut       the same while Dynamo traces
    Beside          what leaves such a forward otherwise than in its result: no gradient may come back from there
    Carry           what leads to the tensors of those aliases: gradients of gradients go there
    Tail            where the kept graph ends: a tensor of no bytes, which the engine frees like any saved one
    Lifted          a derivative computed in the kept graph, tied to the outer tensors again, for second derivatives
    Refused         the identity, whose own derivative raises: it is not known
    Opaque          the same for torch.func
    ByLoop          a function that no transform can look into, once for each in a batch (`arrays.py`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function

from gradoverride._core.private.dynamo import fail, in_transform
from gradoverride._core.private.engine import call_directly, can_call_directly, fast_apply
from gradoverride._core.private.modes import require_in_graph
from gradoverride._core.private.tensors import has_memory_alone, made_at_import
from gradoverride._core.private.transforms import in_batched_autograd
from gradoverride.errors import UnsupportedError

__all__ = [
    "Alias",
    "Beside",
    "ByLoop",
    "CUT",
    "Carry",
    "Cut",
    "General",
    "KeptAlias",
    "Lifted",
    "TOKEN",
    "Tail",
    "TracedCut",
    "Transformed",
    "alias_function",
    "fresh",
    "named",
    "plain_function",
    "refuse_batched",
    "refuse_lost",
    "tied",
    "trackable",
]


def named(base: type[Function], name: str) -> type[Function]:
    """A subclass of `base` whose node in the graph is called `<name>Backward`."""
    metaclass: Any = type(base)
    return metaclass(name, (base,), {})


def plain_function(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> type[Function]:
    """A Function of these two functions, which its node in the graph calls without torch's layer in between."""
    metaclass: Any = type(Function)
    function: type[Function] = metaclass(
        name, (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )
    call_directly(function, backward)
    return function


def alias_function(backward: Callable[..., Any], *, keeps: bool) -> type[Function]:
    """A Function whose result is an alias of its tensor. What the gradient becomes, `backward` reads in `ctx.rule`."""
    function = named(KeptAlias if keeps else Alias, "edit_gradient")
    function.backward = staticmethod(backward)  # type: ignore[method-assign]  # of this class
    if can_call_directly():
        call_directly(function, backward)
    return function


def fresh(tensor: Tensor) -> Tensor:
    """A new tensor object with the storage of `tensor`: torch would make `tensor` itself a node's output, and turn a
    parameter or a cached buffer that a forward returns into a non-leaf.
    """
    # A view of what others have stays one, so that torch refuses to write into it (it could not tell its base).
    stays = tensor._is_view() and not has_memory_alone(tensor)
    alias = tensor.detach()
    return alias.view_as(alias) if stays else alias


def trackable(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy if it was made in inference mode: to such a one torch gives no node, without a word."""
    return tensor.clone() if tensor.is_inference() else tensor


class Alias(Function):
    """An alias of `tensor`, which is not kept. It is a view, so that torch refuses to write into it in place."""

    @staticmethod
    def forward(ctx: Any, rule: Any, tensor: Tensor) -> Tensor:
        ctx.rule = rule
        try:
            return tensor[...]  # in two thirds of the time of `view_as`
        except RuntimeError:  # sparse tensors, and those of mkldnn, have no views
            return tensor.clone()


class KeptAlias(Function):
    """The same of a tensor that is kept for the rule."""

    @staticmethod
    def forward(ctx: Any, rule: Any, tensor: Tensor) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(tensor)
        try:
            return tensor[...]
        except RuntimeError:
            return tensor.clone()


class General(Function):
    """One call, described by a `Call`; its tensors are inputs in the order that the `Call` says."""

    @staticmethod
    def forward(ctx: Any, call: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = call.results(tensors)
        _keep(ctx, call, tensors, results)
        return results

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *ctx.call.backward(ctx, grad_outputs))


class Transformed(Function):
    """The same under `torch.func` and forward-mode AD, where the tangent comes from the rule transposed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = call.results(tensors)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, *tensors = inputs
        ctx.save_for_forward(*_keep(ctx, call, tensors, output))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *ctx.call.backward(ctx, grad_outputs))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return ctx.call.jvp(ctx, tangents[1:])


def _keep(ctx: Any, call: Any, tensors: Sequence[Tensor], results: tuple[Tensor, ...]) -> list[Tensor]:
    ctx.call = call
    ctx.set_materialize_grads(False)
    if call.dirty:
        ctx.mark_dirty(*[tensors[index] for index in call.dirty])
    saved: list[Tensor] = call.tensors_to_save(tensors, results)
    ctx.save_for_backward(*saved)
    return saved


class Cut(Function):
    """Aliases that start a graph of their own. No gradient goes on from there: the kept graph is asked for it.

    It is given plain aliases, so that its graph does not lead back into that of the tensors: where a module is used
    twice, the engine would go through the first use in search of the parameters of the second.
    """

    @staticmethod
    def forward(ctx: Any, token: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple([_unviewed(tensor) for tensor in tensors])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        if hasattr(ctx, "who"):  # the forward has returned (`KeptGraph.guard`)
            refuse_lost(ctx.who)
        return (None,) * (len(grads) + 1)


def _unviewed(tensor: Tensor) -> Tensor:
    """An alias that is no view, so that a forward may write into it."""
    alias = tensor.detach()
    if not alias._is_view() or type(alias).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return alias
    plain = alias.as_subclass(Tensor).detach()  # torch gives what it computes of a subclass its class by a view
    plain.__class__ = type(alias)
    plain.__dict__.update(alias.__dict__)
    return plain


def refuse_lost(who: str) -> NoReturn:
    fail(UnsupportedError, _lost(who))


def _lost(who: str) -> str:
    return (
        f"{who} must return each tensor that a gradient is to come back from; one came from a tensor that left it in "
        "another way (an attribute, a hook, a list), and would not reach the arguments, whose gradients its rule "
        "gives. Return that tensor too, or detach it"
    )


class Carry(Function):
    """For each tensor one of its shape with the bytes of one element, whose gradient goes to the tensor.

    Second derivatives need that way, and keeping the tensor itself would keep its memory.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple([_carrier(tensor) for tensor in tensors])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads


def _carrier(tensor: Tensor) -> Tensor:
    if tensor.layout is torch.strided:
        return tensor.new_empty(()).expand(tensor.shape)
    return tensor.detach()  # nothing is expanded to a sparse or a jagged one


class TracedCut(Function):
    """`Cut` under Dynamo: real copies (a compiler removes them), and no second derivatives, so no carriers."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        return (None,) * (len(grads) + 1)


class Beside(Function):
    """A tensor that left a traced forward beside its result, as one that no gradient may come back from."""

    @staticmethod
    def forward(ctx: Any, who: str, token: Tensor, tensor: Tensor) -> Tensor:
        ctx.who = who
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        if require_in_graph is None:
            refuse_lost(ctx.who)
        require_in_graph((grad == 0).all(), _lost(ctx.who))
        return None, None, None


class Tail(Function):
    """Ties the ends of a kept graph to a tensor of no bytes.

    Saved for backward, it keeps the graph as long as the engine keeps saved tensors, and
    `grad_fn.next_functions` gives the ends again. Keeping the results themselves would keep their memory.
    """

    @staticmethod
    def forward(ctx: Any, *ends: Tensor) -> Tensor:
        return torch.empty(0, dtype=ends[0].dtype, device=ends[0].device)  # of a jagged one there is no new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise AssertionError("a kept graph is asked for its gradients, never run through its tail")


class Lifted(Function):
    """`derivatives` that were computed in a kept graph, as functions of the outer tensors. `tie` knows how."""

    @staticmethod
    def forward(ctx: Any, tie: Any, derivatives: Sequence[Tensor], *outer: Tensor) -> tuple[Tensor, ...]:
        ctx.tie = tie
        ctx.set_materialize_grads(False)
        return tuple(derivatives)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.tie.backward(grads))


class Refused(Function):
    """The identity of the first tensor. How it depends on the others is not known: a derivative raises `text`."""

    @staticmethod
    def forward(ctx: Any, text: str, tensor: Tensor, *others: Tensor) -> Tensor:
        ctx.text = text
        return fresh(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        fail(UnsupportedError, ctx.text)


class Opaque(Function):
    """The same under transforms, which see themselves what the tensors depend on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(text: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple([tensor.clone() for tensor in tensors])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.text = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        fail(UnsupportedError, ctx.text)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        fail(UnsupportedError, ctx.text)


def tied(found: list[Tensor], sources: Sequence[Tensor], text: str) -> list[Tensor]:
    """These, which were computed from the sources in a way that torch does not know: that derivative raises `text`."""
    if in_transform():
        return list(Opaque.apply(text, *found))  # type: ignore[no-untyped-call]  # torch has no types for it
    outer = [source for source in sources if source.requires_grad]
    if not torch.is_grad_enabled() or not outer:
        return found
    refuse_batched(found)
    return [_refuse(text, tensor, *outer) for tensor in found]


_refuse = fast_apply(Refused)


def refuse_batched(found: Sequence[Tensor | None]) -> None:
    """Raise the error where a gradient with a history is computed for a batch at once, and not by torch.func: the
    history that a Function gives is lost there.
    """
    if in_batched_autograd(*[grad for grad in found if grad is not None]):
        fail(
            UnsupportedError,
            "a gradient that is found by a rule's 'vjp', or through parameters that a rule leaves to autograd, must be "
            "computed one at a time if it is to be differentiated again; it is computed for a batch at once "
            "(torch.autograd.functional with vectorize=True, torch.autograd.grad with is_grads_batched=True), where "
            "torch drops the backward of every autograd.Function. Leave that out, or use torch.func",
        )


class ByLoop(Function):
    """`run` of plain tensors, which gives a tuple of them: under vmap one by one. It has no derivative."""

    @staticmethod
    def forward(run: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = run(*tensors)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.run = inputs[0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], run: Any, *tensors: Tensor) -> Any:
        if info.batch_size == 0:
            run.refuse_empty()
        pairs = [*zip(tensors, in_dims[1:], strict=True)]
        results = []
        for index in range(info.batch_size):
            one = [tensor if dim is None else tensor.select(dim, index) for tensor, dim in pairs]
            results.append(ByLoop.apply(run, *one))  # type: ignore[no-untyped-call]
        return run.stacked(results), (0,) * len(results[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        ctx.run.refuse_derivative()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        ctx.run.refuse_derivative()


# Every Cut has an input that requires grad, so that its aliases do, whatever the caller's tensors want. It tells where
# a graph starts: at CUT those of eager calls, and what leads there from outside of the call was captured.
TOKEN = made_at_import(requires_grad=True)
CUT = made_at_import(requires_grad=True)
