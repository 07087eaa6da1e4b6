"""Rules that are wrong in one place, in random cases: each is an error that names rule, forward and argument."""

import re

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st

import gradoverride as go
from fuzz.cases import UP_TO, cases
from fuzz.examples import examples
from fuzz.interpreter import Pair, Record, is_floating, mapped
from fuzz.test_rules import decorated, loss_of

# What a gradient must not be, and what the message says of it.
WRONG_TENSORS = {
    "another shape": (lambda grad: torch.stack([grad, grad]), "shape"),
    "a sum": (lambda grad: grad.sum() if grad.dim() else grad.view(1), "shape"),
    "transposed": (lambda grad: grad.T if grad.dim() == 2 else grad[None], "shape"),
    "integers": (lambda grad: grad.long(), "floating"),
    "booleans": (lambda grad: grad > 0, "floating"),
    "complex": (lambda grad: grad * 1j, "real"),
    "another device": (lambda grad: grad.to("meta"), "on meta"),
    "a number": (lambda grad: 1.5, "1.5, a float"),
    "a string": (lambda grad: "wrong", "'wrong', a str"),
    "a container": (lambda grad: Record(grad), "a Record"),
}


def refused(case, *texts):
    """Fail unless the backward of the case raises, with these texts, and leaves no gradient behind."""
    function, weight = decorated(case)
    result = function(*case.args, **case.kwargs)
    tensors = [tensor for argument in case.arguments for tensor in argument.tensors]
    with pytest.raises(go.RuleResultError) as caught:
        loss_of(case, result).backward()
    message = str(caught.value)
    for text in (r"'the_rule' \(<string>:1\)", f"'{'Module' if case.is_module else 'forward'}'", *texts):
        assert re.search(text, message), (text, message)
    assert all(tensor.grad is None for tensor in tensors)
    assert weight is None or weight.grad is None


def named(argument):
    """How a message names an argument, or a part of one."""
    return rf"'\*?{argument.key}\b"


def answering(*answers):
    return cases().filter(lambda case: case.answer in answers)


def all_entries(case):
    """Entries that answer for everything."""
    return [mapped(_ones, argument.value) if argument.tensors else None for argument in case.arguments]


def _ones(part):
    return torch.ones_like(part, requires_grad=False) if is_floating(part) else None


@given(answering("bare", "tuple", "list", "dict"), UP_TO[7], st.sampled_from(sorted(WRONG_TENSORS)))
@examples(150)
def test_wrong_tensor_is_refused_by_the_name_of_its_argument(case, at, fault):
    event(f"{case.answer}, {fault}")
    spoil, text = WRONG_TENSORS[fault]
    holders = [index for index, argument in enumerate(case.arguments) if argument.tensors]
    index = holders[at % len(holders)]
    place = at % len(case.arguments[index].tensors)

    def spoiled(entries):
        number = -1

        def grad(part):
            nonlocal number
            if not is_floating(part):
                return None
            number += 1
            return spoil(_ones(part)) if number == place else _ones(part)

        return [mapped(grad, case.arguments[index].value) if i == index else entry for i, entry in enumerate(entries)]

    case.spoil = spoiled
    refused(case, named(case.arguments[index]), re.escape(text))


@given(answering("bare", "tuple", "list", "dict"), UP_TO[7])
@examples(100)
def test_wrong_structure_is_refused_by_the_name_of_its_argument(case, at):
    containers = [
        index for index, each in enumerate(case.arguments) if each.tensors and not isinstance(each.value, torch.Tensor)
    ]
    assume(containers)
    index = containers[at % len(containers)]
    argument = case.arguments[index]

    def spoiled(entries):
        whole = all_entries(case)[index]
        return [_other_structure(whole, at) if i == index else entry for i, entry in enumerate(entries)]

    case.spoil = spoiled
    refused(case, named(argument), "structure")


def _other_structure(entry, at):
    if at % 2 or isinstance(entry, (Pair, Record)):
        return torch.ones(2)
    return {**entry, "more": None} if isinstance(entry, dict) else type(entry)([*entry, None])


@given(answering("tuple", "list", "dict"), UP_TO[7])
@examples(60)
def test_gradient_of_what_has_none_is_refused_by_its_name(case, at):
    without = [index for index, argument in enumerate(case.arguments) if not argument.tensors]
    assume(without)
    index = without[at % len(without)]
    case.spoil = lambda entries: [torch.ones(2) if i == index else entry for i, entry in enumerate(entries)]
    refused(case, named(case.arguments[index]), "must return None for")


@given(answering("tuple", "list"), st.booleans())
@examples(60)
def test_wrong_count_is_refused_with_the_names_of_all(case, more):
    wants = [any(tensor.requires_grad for tensor in argument.tensors) for argument in case.arguments]
    last = max(index for index, wanted in enumerate(wants) if wanted)
    case.spoil = lambda entries: [*entries, None] if more else entries[:last]
    single = sum(bool(argument.tensors) for argument in case.arguments) == 1
    count = len(case.arguments) + 1 if more else last
    refused(
        case,
        "" if more else named(case.arguments[last]),
        rf"returned {count}\b",
        "" if single else rf"\({re.escape(', '.join(numbered(case)))}\)",
    )


def numbered(case):
    """The names of the arguments; those of `*args` by number."""
    count = iter(range(len(case.arguments)))
    return [f"args[{next(count)}]" if each.key == case.variadic else each.key for each in case.arguments]


@given(answering("tuple", "list"), st.sampled_from(["tensor", "None", "number"]))
@examples(50)
def test_one_gradient_for_several_is_refused_with_the_names_of_all(case, kind):
    assume(sum(bool(argument.tensors) for argument in case.arguments) > 1)
    case.spoil_answer = lambda answer: {"tensor": torch.ones(2), "None": None, "number": 2.5}[kind]
    refused(case, rf"one gradient for each argument \({re.escape(', '.join(numbered(case)))}\)")


@given(answering("dict"), st.sampled_from(["grad_a", "aa", "weights", "arg", 0]))
@examples(60)
def test_unknown_name_in_a_dict_is_refused_with_those_that_exist(case, key):
    case.spoil_answer = lambda answer: {**answer, key: None}
    refused(case, rf"it has {re.escape(repr(key))}", *[rf"\b{argument.key}\b" for argument in case.arguments])


@given(cases(kinds=("method", "override")).filter(lambda case: case.answer == "dict"), st.booleans())
@examples(60)
def test_wrong_gradient_of_a_parameter_is_refused_by_its_name(case, left_out):
    """One that is asked for must be answered for; one of another shape is wrong in any case."""
    if left_out:
        case.asked = [*case.asked, "weight"] if "weight" not in case.asked else case.asked
        case.spoil_answer = lambda answer: {key: value for key, value in answer.items() if key != "weight"}
        refused(case, "asks for the parameter 'weight'", r"module\.weight", r"vjp\.by_name")
    else:
        case.spoil_answer = lambda answer: {**answer, "weight": torch.ones(2)}
        refused(case, "'weight'", re.escape("shape (3,)"), re.escape("shape (2,)"))


@given(answering("vjp", "by_name"), st.booleans(), st.booleans())
@examples(60)
def test_wrong_gradient_for_vjp_is_refused(case, by_name, fewer):
    """It takes what has the structure of the result."""

    def wrong(grad_output, given):
        vjp = given["vjp"].by_name if by_name else given["vjp"]
        if fewer:
            return vjp([])
        return vjp(mapped(lambda part: torch.stack([part, part]) if is_floating(part) else None, grad_output))

    case.answer_of = wrong
    refused(case, "vjp in the rule", r"it got (\[\]|an empty list)\." if fewer else "shape")


@given(cases(), st.sampled_from(["inputs", "zz", "weights", "grad"]))
@examples(60)
def test_rule_that_asks_for_what_does_not_exist_is_refused_before_the_backward(case, name):
    case.asked = [*case.asked, name]
    case.answer = "tuple"
    with pytest.raises(go.RuleSignatureError) as caught:
        called(case)
    message = str(caught.value)
    closest = {"inputs": "'input'", "weights": "'weight'" if case.is_module else ""}.get(name, "")
    for text in (f"asks for '{name}'", "'the_rule'", *[f"'{each}'" for each in case.names], closest):
        assert text in message, (text, message)
    assert case.calls == []


def called(case):
    """The result: names are looked up when a rule is attached, those of a module at the first call."""
    return decorated(case)[0](*case.args, **case.kwargs)
