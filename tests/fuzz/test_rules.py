"""Random signatures, arguments, results and rules, against an interpreter of the contract that knows no library."""

import dataclasses

import torch
from hypothesis import event, given
from oracles import closely

import gradoverride as go
from fuzz.cases import cases
from fuzz.examples import examples
from fuzz.interpreter import Case, is_floating, mapped, tensors_of


def decorated(case: Case):
    """The forward of a case with its rule, and the weight of its module."""
    forward = case.forward()
    if case.kind == "function":
        return go.custom_backward(case.rule())(forward), None
    if case.kind == "method":
        module = go.custom_backward(case.rule())(forward)()
    else:
        module = forward()
        go.override(module, {module: case.rule()})
    return module, module.weight


def same(one, other):
    """Whether two structures are equal, in their types too."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, each.name), getattr(other, each.name)) for each in dataclasses.fields(one))
    return one == other


def undecorated_result(case):
    forward = case.forward()
    with torch.no_grad():
        return (forward() if case.is_module else forward)(*case.args, **case.kwargs)


def loss_of(case, result):
    """The sum of the results that are chosen."""
    tensors = [tensor.double() for tensor in tensors_of(result)]
    return sum(tensor.sum() for tensor, chosen in zip(tensors, case.chosen, strict=True) if chosen)


@given(cases())
@examples(300)
def test_result_and_gradients_are_those_of_the_contract(case):
    event(f"{case.kind}, {case.answer}")
    function, weight = decorated(case)
    result = function(*case.args, **case.kwargs)
    assert same(result, undecorated_result(case))
    wanted = {id(each): each for argument in case.arguments for each in argument.tensors if each.requires_grad}
    leaves = [*wanted.values(), *([] if weight is None else [weight])]
    found = torch.autograd.grad(loss_of(case, result), leaves, allow_unused=True)
    by_tensor, of_weight = case.expected(weight)
    for grad, expected in zip(found, [*[by_tensor[key] for key in wanted], of_weight], strict=False):
        if grad is None:  # so autograd says it of what a result does not depend on, too
            assert expected is None or (case.leaves_to_autograd and not expected.any())
        else:
            closely(grad, expected)
    assert len(case.calls) == 1


@given(cases())
@examples(150)
def test_rule_is_given_what_the_contract_says(case):
    function, _ = decorated(case)
    result = function(*case.args, **case.kwargs)
    loss_of(case, result).backward()
    ((grad_output, given),) = case.calls
    assert same(grad_output, case.grad_output())
    for name, value in given.items():
        if name == "vjp":
            continue
        if name in case.names:
            assert same(plain(value), plain(bound(case)[name]))
        elif name == "input":
            assert same(plain(value), plain(next(each.value for each in case.arguments if each.tensors)))
        elif name == "output":
            assert same(plain(value), plain(result))
        elif name == "needs":
            check_needs(case, value)
        else:
            assert name == "weight"
            assert torch.equal(value, torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))


def plain(value):
    return mapped(lambda part: part.detach() if is_floating(part) else part, value)


def bound(case):
    """The values of the parameters of the forward, by name, as Python binds them."""
    found = {}
    for argument in case.arguments:
        if argument.key == case.variadic:
            found[argument.key] = (*found.get(argument.key, ()), argument.value)
        elif argument.key in case.names:
            found[argument.key] = argument.value
        else:
            found.setdefault("kwargs", {})[argument.key] = argument.value
    return {"args": (), "kwargs": {}, **found}


def check_needs(case, needs):
    for argument in case.arguments:
        if argument.key != case.variadic:
            assert needs[argument.key] == any(tensor.requires_grad for tensor in argument.tensors)
    every = [tensor for each in case.arguments if each.key == case.variadic for tensor in each.tensors]
    if case.variadic:
        assert needs[case.variadic] == any(tensor.requires_grad for tensor in every)
    if case.is_module:
        assert needs["weight"]


@given(cases())
@examples(60)
def test_without_a_gradient_the_rule_is_never_asked(case):
    function, _ = decorated(case)
    with torch.no_grad():
        result = function(*case.args, **case.kwargs)
    assert same(result, undecorated_result(case))
    assert not any(tensor.requires_grad and tensor.grad_fn for tensor in tensors_of(result))
    assert case.calls == []
