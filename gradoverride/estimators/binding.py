"""An estimator as the rule of a forward: it asks for all its arguments.

An estimator cannot know how the arguments of its forward are called. So, attached to a forward, it is replaced by a
rule of that forward (`Estimator.bound_to`), which asks for all of them by their names. Where somebody else calls it, as
one rule within another, it asks for `input`, and serves forwards of one argument.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from gradoverride._core.binding.options import check, check_flag, check_generator, is_integer, is_number
from gradoverride._core.binding.signature import Forward, signature_asking
from gradoverride._core.private.dynamo import hidden_from_dynamo
from gradoverride.errors import RuleSignatureError, UnsupportedError
from gradoverride.estimators.evaluation import BATCHED, Evaluation

__all__ = ["NOT_TRACED", "Estimator", "check_options"]


NOT_TRACED = "an estimator evaluates its forward again (gradoverride.estimators)"
_hidden = functools.partial(hidden_from_dynamo, reason=NOT_TRACED)


class Estimator:
    """A rule that evaluates the forward again, at arguments that it chooses."""

    takes_tensors = True  # in a `bridge` too: the forward that it is offered turns them into arrays
    writes_nothing = True

    # What most have as options.
    batch_dims: int = 0
    batched: str | None = None
    deterministic: bool = True

    def gradients(self, evaluation: Evaluation) -> list[Tensor]:
        """One for each of the points."""
        raise NotImplementedError

    def bound_to(self, forward: Forward) -> Any:
        """This as the rule of one forward."""
        return Bound(self, forward)

    def __call__(self, grad_output: Any, /, forward: Any, input: Any, output: Any, needs: Any, module: Any) -> Any:
        """By name, the gradient of the only argument."""
        return self._answer(grad_output, forward, input, output, needs, module)

    @_hidden
    def _answer(self, grad_output: Any, forward: Any, input: Any, output: Any, needs: Any, module: Any) -> Any:
        own = () if module is None else {name for name, _ in module.named_parameters(remove_duplicate=False)}
        names = [name for name in needs if name not in own]
        if len(names) != 1 or names[0] in ("args", "kwargs"):
            raise UnsupportedError(
                f"{type(self).__name__}: where another rule calls it, its forward must have one argument; it has "
                f"{', '.join(map(repr, names))}. Decorate a function of one argument that calls it"
            )

        def again(values: dict[str, Any]) -> Any:
            return forward(values[names[0]])

        evaluation = Evaluation(self, "the forward", again, {names[0]: input}, needs, grad_output, output)
        evaluation.check_repeats()
        return evaluation.answer(self.gradients(evaluation))


class Arguments:
    """The arguments of a forward by name: how it is called with them, and how a rule answers for them."""

    def __init__(self, forward: Forward) -> None:
        if forward.parameters is None:
            raise RuleSignatureError(
                f"{forward.who} must have a signature, for an estimator to call it again with all its arguments; it "
                f"has none. Give a function that calls it, such as `lambda x: {forward.name}(x)`"
            )
        self.signature = inspect.Signature(forward.parameters)
        self.rest = next((p.name for p in forward.parameters if p.kind is p.VAR_KEYWORD), None)

    def call(self, fn: Callable[..., Any], values: dict[str, Any]) -> Any:
        """`fn` of these."""
        bound = inspect.BoundArguments(self.signature, values)
        return fn(*bound.args, **bound.kwargs)

    def wanted(self, values: Mapping[str, Any], needs: Mapping[str, bool]) -> dict[str, bool]:
        """By name, whether a gradient is wanted: of `**kwargs` if of any of them."""
        wanted = {name: bool(needs.get(name)) for name in values}
        if self.rest is not None:
            wanted[self.rest] = any([needs[name] for name in values[self.rest]])
        return wanted

    def answer(self, gradients: dict[str, Any]) -> dict[str, Any]:
        """The gradients as a rule gives them: those of `**kwargs` by their own names."""
        more = gradients.pop(self.rest, {}) if self.rest is not None else {}
        return {**gradients, **more}


class Bound:
    """An estimator as the rule of one forward."""

    takes_tensors = True
    needs_floating = True  # a forward of integers alone has no gradient that it could estimate
    writes_nothing = True
    not_traced = NOT_TRACED

    def __init__(self, estimator: Estimator, forward: Forward) -> None:
        self.estimator = estimator
        self.forward = forward
        self.arguments = Arguments(forward)
        self.looked = False
        self.__name__ = repr(estimator)
        self.__signature__ = signature_asking(dict.fromkeys(("forward", "output", "needs", *forward.names), True))

    def __call__(self, grad_output: Any, /, *, forward: Any, output: Any, needs: Any, **values: Any) -> Any:
        """By name, the gradients of the arguments."""
        return self._answer(grad_output, forward, output, needs, values)

    @_hidden
    def _answer(self, grad_output: Any, forward: Any, output: Any, needs: Any, values: dict[str, Any]) -> Any:
        def again(changed: dict[str, Any]) -> Any:
            return self.arguments.call(forward, changed)

        wanted = self.arguments.wanted(values, needs)
        evaluation = Evaluation(self.estimator, self.forward.who, again, values, wanted, grad_output, output)
        if not self.looked:  # once is enough
            evaluation.check_repeats()
            self.looked = True
        return self.arguments.answer(evaluation.answer(self.estimator.gradients(evaluation)))


def check_options(rule: Any) -> None:
    """Raise `RuleOptionError` for what is out of range among the options that estimators share."""
    kind, own = type(rule).__name__, vars(rule)
    if "n" in own:
        check(kind, "n", rule.n, is_integer(rule.n) and rule.n >= 1, "an integer, 1 or larger")
    if "sigma" in own:
        check(kind, "sigma", rule.sigma, is_number(rule.sigma) and rule.sigma > 0, "a number larger than 0")
    if "eps" in own:
        optional = type(rule).eps is None  # its default
        fits = (optional and rule.eps is None) or (is_number(rule.eps) and rule.eps > 0)
        check(kind, "eps", rule.eps, fits, f"{'None or ' * optional}a number larger than 0")
    if "strength" in own:
        fits = is_number(rule.strength) and rule.strength > 0
        check(kind, "strength", rule.strength, fits, "a number larger than 0")
    if "generator" in own:
        check_generator(kind, rule.generator)
    fits = is_integer(rule.batch_dims) and rule.batch_dims >= 0
    check(kind, "batch_dims", rule.batch_dims, fits, "an integer, 0 or larger")
    check(kind, "batched", rule.batched, rule.batched in BATCHED, "None, 'vmap', 'stack' or 'cat'")
    check_flag(kind, "deterministic", rule.deterministic)
