"""What every error has in common, and those that are not about rules: forwards, decorations, captured tensors."""

import builtins
import functools
import re
import traceback
import types

import pytest
import torch
from oracles import exactly, float64, noise
from torch import nn

import gradoverride as go

HERE = r"\(.*test_errors\.py:\d+\)"


# --- the tree ---


TREE = {
    "DecorationError": TypeError,
    "RuleSignatureError": TypeError,
    "RuleResultError": ValueError,
    "ForwardResultError": TypeError,
    "CapturedTensorError": RuntimeError,
    "SurrogateError": ValueError,
    "UnsupportedError": NotImplementedError,
    "TargetNotFoundError": LookupError,
    "GraphError": ValueError,
    "RuleOptionError": ValueError,
    "NonFiniteGradientError": FloatingPointError,
    "TargetError": TypeError,
    "MissingExtraError": ImportError,
}


@pytest.mark.parametrize(("name", "builtin"), TREE.items(), ids=TREE)
def test_error_is_exported_and_derives_from_the_base_and_a_builtin(name, builtin):
    error = getattr(go, name)
    assert error.__bases__ == (go.GradOverrideError, builtin)
    assert name in go.__all__


def test_base_is_a_plain_exception():
    assert go.GradOverrideError.__bases__ == (Exception,)
    assert "GradOverrideError" in go.__all__


def test_no_exported_error_stands_outside_of_the_tree():
    exported = [value for name in go.__all__ if isinstance(value := getattr(go, name), type)]
    errors = [value for value in exported if issubclass(value, Exception) and not issubclass(value, Warning)]
    assert all(issubclass(error, go.GradOverrideError) for error in errors)
    assert {error.__name__ for error in errors} >= {*TREE, "GradOverrideError"}


def test_names_of_errors_shadow_no_builtin():
    assert not set(TREE) & set(dir(builtins))


# --- one example of each error ---


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(3))

    def forward(self, x):
        return x * self.weight


GLOBAL_LAYER = Layer()


def rule(grad_output):
    return grad_output


def shape_rule(grad_output):
    return grad_output.sum()


def parameter_rule(grad_output, weight):
    return {"x": grad_output}


def unknown_rule(grad_output, wieght):
    return grad_output


def structure_rule(grad_output):
    return {"x": [grad_output, GLOBAL_LAYER]}


def double(x, weight=None):
    return x * 2


def in_place(x, weight=None):
    x.mul_(2)
    return x + 1


def closed(x):
    return GLOBAL_LAYER(x)


def wrong_result(x):
    return GLOBAL_LAYER


def backward_of(forward, rule, *args):
    go.custom_backward(rule)(forward)(*args).sum().backward()


EXAMPLES = {
    "shape": (go.RuleResultError, lambda x: backward_of(double, shape_rule, x)),
    "structure": (go.RuleResultError, lambda x: backward_of(double, structure_rule, x)),
    "parameter": (go.RuleResultError, lambda x: backward_of(Layer.forward, parameter_rule, Layer(), x)),
    "count": (go.RuleResultError, lambda x: backward_of(double, lambda grad_output: (grad_output,) * 3, x)),
    "unknown name": (go.RuleSignatureError, lambda x: backward_of(double, unknown_rule, x)),
    "unknown name of a module": (
        go.RuleSignatureError,
        lambda x: backward_of(Layer.forward, unknown_rule, Layer(), x),
    ),
    "captured": (go.CapturedTensorError, lambda x: go.custom_backward(rule)(closed)(x)),
    "in place": (go.ForwardResultError, lambda x: go.custom_backward(rule)(in_place)(x)),
    "no tensor": (go.ForwardResultError, lambda x: go.custom_backward(rule)(wrong_result)(x)),
    "straight through": (go.ForwardResultError, lambda x: go.straight_through(torch.sum)(x)),
    "surrogate": (go.SurrogateError, lambda x: go.straight_through(double, surrogate=torch.sum)(x).sum().backward()),
}
examples = pytest.mark.parametrize(("kind", "provoke"), EXAMPLES.values(), ids=EXAMPLES)


def message(kind, provoke):
    with pytest.raises(kind) as caught:
        provoke(noise(3))
    return str(caught.value)


@examples
def test_message_begins_with_the_users_name_and_place(kind, provoke):
    assert re.match(
        r"(rule |surrogate )?'[\w<>.()=]+' (\(.*test_errors\.py:\d+\)|\(built in\))", message(kind, provoke)
    )


@examples
def test_message_says_what_was_required_before_what_came(kind, provoke):
    text = message(kind, provoke)
    required = re.search(r"\bmust\b|asks for", text)
    came = re.search(r"it returned|it gives|it reached|does not exist|it did|must answer", text)
    assert required
    assert came
    assert required.start() < came.start()


@examples
def test_message_has_no_repr_of_a_tensor_or_module(kind, provoke):
    text = message(kind, provoke)
    assert "tensor(" not in text
    assert "Parameter containing" not in text
    assert not re.search(r"\b(Layer|Linear)\(", text)
    assert " object at 0x" not in text
    assert len(text) < 600


@examples
def test_shapes_are_written_as_tuples(kind, provoke):
    assert "torch.Size" not in message(kind, provoke)


@examples
def test_error_is_caught_as_the_base(kind, provoke):
    with pytest.raises(go.GradOverrideError):
        provoke(noise(3))


@examples
def test_next_backward_works_right_after_the_error(kind, provoke):
    message(kind, provoke)
    x = float64(1.0, 2.0, 3.0)
    go.custom_backward(lambda grad_output, x: grad_output * x * 10)(double)(x).sum().backward()
    exactly(x.grad, x.detach() * 10)


@examples
def test_error_leaves_no_gradient_and_no_mode_behind(kind, provoke):
    x = noise(3)
    with pytest.raises(kind):
        provoke(x)
    assert x.grad is None
    assert torch.is_grad_enabled()
    assert GLOBAL_LAYER.weight.grad is None


def test_same_function_works_after_its_rule_gave_a_wrong_answer():
    answers = [lambda g: g.sum(), lambda g: g * 7]
    forward = go.custom_backward(lambda grad_output: answers.pop(0)(grad_output))(double)
    x = noise(3)
    out = forward(x).sum()
    with pytest.raises(go.RuleResultError):
        out.backward(retain_graph=True)
    out.backward()
    exactly(x.grad, torch.full((3,), 7.0, dtype=torch.float64))


def test_same_function_works_after_its_forward_gave_a_wrong_result():
    results = [lambda x: "text", lambda x: x * 2]
    forward = go.custom_backward(lambda grad_output: grad_output * 7)(lambda x: results.pop(0)(x))
    x = noise(3)
    with pytest.raises(go.ForwardResultError):
        forward(x)
    forward(x).sum().backward()
    exactly(x.grad, torch.full((3,), 7.0, dtype=torch.float64))


# --- exceptions of the user's own ---


class OwnError(Exception):
    pass


def raising(grad_output):
    raise OwnError("own text")


class SoonRaising:
    """A surrogate that raises in the backward; its shape is looked at in the first forward."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x * 1 if self.calls == 1 else raising(x)


def notes(error):
    return getattr(error, "__notes__", [])


class ClassForm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(3))

    def forward(self, x):
        return x * self.weight

    def backward(self, grad_output):
        raise OwnError("own text")


RAISING = {
    "short path": lambda x: go.custom_backward(raising)(double)(x),
    "general path": lambda x: go.custom_backward(raising)(lambda *xs: xs[0] * 2)(x),
    "method": lambda x: go.custom_backward(raising)(Layer.forward)(Layer(), x),
    "class": lambda x: go.custom_backward(ClassForm)()(x),
    "surrogate": lambda x: go.straight_through(double, surrogate=SoonRaising())(x),
    "vjp": lambda x: go.custom_backward(lambda grad_output, vjp: raising(vjp(grad_output)))(double)(x),
}
raising_forms = pytest.mark.parametrize("call", RAISING.values(), ids=RAISING)


def error_of(call):
    out = call(noise(3)).sum()
    with pytest.raises(OwnError) as caught:
        out.backward()
    return caught.value


@raising_forms
def test_exception_inside_a_rule_passes_through_unchanged(call):
    error = error_of(call)
    assert type(error) is OwnError
    assert error.args == ("own text",)
    assert error.__cause__ is None


@raising_forms
def test_exception_inside_a_rule_shows_the_line_that_raised(call):
    frames = [frame.name for frame in traceback.extract_tb(error_of(call).__traceback__)]
    assert frames[-1] in ("raising", "backward")


@raising_forms
def test_exception_inside_a_rule_has_one_note(call):
    assert len(notes(error_of(call))) == 1


def test_note_names_the_rule_and_its_forward_with_their_places():
    (note,) = notes(error_of(RAISING["short path"]))
    assert re.search(rf"rule 'raising' {HERE} of 'double' {HERE}", note)


def test_exception_through_two_rules_has_a_note_for_each():
    inner = go.custom_backward(raising)(double)
    outer = go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(lambda x: inner(x) + 1)
    text = "\n".join(notes(error_of(outer)))
    assert "rule 'raising'" in text
    assert "rule '<lambda>'" in text


@raising_forms
def test_next_backward_works_right_after_an_exception_inside_a_rule(call):
    error_of(call)
    x = noise(3)
    go.custom_backward(lambda grad_output: grad_output * 7)(double)(x).sum().backward()
    exactly(x.grad, torch.full((3,), 7.0, dtype=torch.float64))


def test_backward_may_be_tried_again_after_an_exception_inside_a_rule():
    tries = []

    def rule(grad_output, x):
        tries.append(1)
        if len(tries) == 1:
            raise OwnError
        return grad_output * x

    x = noise(3)
    out = go.custom_backward(rule)(double)(x).sum()
    with pytest.raises(OwnError):
        out.backward(retain_graph=True)
    out.backward()
    exactly(x.grad, x.detach())


def test_typo_inside_a_rule_is_the_users_own_error():
    out = go.custom_backward(lambda grad_output: grad_output.no_such_method())(double)(noise(3))
    with pytest.raises(AttributeError, match="no_such_method"):
        out.sum().backward()


def test_exception_inside_a_forward_passes_through_unchanged():
    def forward(x):
        raise OwnError("own text")

    with pytest.raises(OwnError) as caught:
        go.custom_backward(rule)(forward)(noise(3))
    assert caught.value.args == ("own text",)


def test_exception_inside_a_forward_leaves_no_residuals_behind():
    def forward(x, fail):
        result = go.save_for_backward(x * 2, factor=3.0)
        if fail:
            raise OwnError
        return result

    decorated = go.custom_backward(lambda grad_output, factor=7.0: grad_output * factor)(forward)
    x = float64(1.0)
    with pytest.raises(OwnError):
        decorated(x, True)
    assert go.save_for_backward(1, factor=9.0) == 1
    decorated(x, False).backward()
    assert x.grad.item() == 3.0


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit], ids=lambda kind: kind.__name__)
def test_interrupt_inside_a_rule_passes_through(kind):
    def interrupted(grad_output):
        raise kind

    out = go.custom_backward(interrupted)(double)(noise(3)).sum()
    with pytest.raises(kind):
        out.backward()


# --- ForwardResultError ---


NO_TENSORS = {
    "None": (None, "it returned None"),
    "string": ("text", "it returned 'text', a str"),
    "number": (1.5, "it returned 1.5, a float"),
    "empty tuple": ((), "it returned an empty tuple"),
    "dict of strings": ({"a": "b"}, "it returned a dict with the keys 'a'"),
    "module": (GLOBAL_LAYER, "it returned a Layer"),
    "namespace": (
        types.SimpleNamespace(a=torch.ones(3)),
        "it returned a SimpleNamespace. Return the tensor that the rule is about, alone or in a tuple, list, dict or ",
    ),
}


@pytest.mark.parametrize(("result", "came"), NO_TENSORS.values(), ids=NO_TENSORS)
@pytest.mark.parametrize("form", ["function", "method"])
def test_forward_without_a_tensor_in_its_result_is_an_error(result, came, form):
    class Method(nn.Module):
        @go.custom_backward(rule)
        def forward(self, x):
            return result

    call = go.custom_backward(rule)(lambda x: result) if form == "function" else Method()
    with pytest.raises(go.ForwardResultError, match=rf"^'\S+' {HERE} must return at least one tensor.*{came}"):
        call(noise(3))


@pytest.mark.parametrize("form", ["function", "variadic"])
def test_forward_with_an_integer_result_needs_no_gradient(form):
    forward = {"function": lambda x: x.argmax(), "variadic": lambda *xs: xs[0].argmax()}[form]
    result = go.custom_backward(rule)(forward)(float64(1.0, 3.0, 2.0))
    assert not result.requires_grad
    assert result.item() == 1


# --- DecorationError ---


def test_class_without_backward_is_told_the_ways_out():
    class NoBackward(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(go.DecorationError, match=r"NoBackward.*backward"):
        go.custom_backward(NoBackward)


def test_class_that_inherits_its_backward_is_fine():
    class Inherits(ClassForm):
        pass

    assert isinstance(go.custom_backward(Inherits)()(noise(3)), torch.Tensor)


class NoForward:
    def backward(self, grad_output):
        return grad_output


class ModuleWithoutForward(nn.Module):
    def backward(self, grad_output):
        return grad_output


CLASSES = {
    "class that is no module": NoForward,
    "module without a forward": ModuleWithoutForward,
    "builtin class": int,
    "exception": ValueError,
}


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_class_that_cannot_have_a_rule_of_its_own_is_refused(cls):
    with pytest.raises(go.DecorationError, match=cls.__name__):
        go.custom_backward(cls)


TARGETS = {"None": None, "number": 3, "string": "text", "list": [double], "tensor": torch.ones(3)}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(
    "decorate",
    [go.custom_backward(rule), lambda fn: go.straight_through(surrogate=torch.tanh)(fn)],
    ids=["custom_backward", "straight_through"],
)
def test_what_is_not_callable_is_refused_without_its_repr(decorate, target):
    with pytest.raises(go.DecorationError) as caught:
        decorate(target)
    assert "tensor(" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "kwargs", "given"),
    [
        ((noise(3),), {}, r"a tensor of shape \(3,\)"),
        ((noise(3), 2), {}, "2 arguments"),
        ((noise(3),), {"scale": 2}, "2 arguments"),
        ((), {}, "0 arguments"),
    ],
)
def test_function_that_was_decorated_without_a_rule_is_told_so_when_it_is_called(args, kwargs, given):
    @go.custom_backward
    def halve(x=None, scale=0.5):
        return x * scale

    with pytest.raises(
        go.DecorationError,
        match=f"the rule 'halve' {HERE} must be given a function.*; it was given {given}. If 'halve' is what is to be "
        r"decorated, it needs a rule: @custom_backward\(rule\)$",
    ):
        halve(*args, **kwargs)


def test_method_that_was_decorated_without_a_rule_is_told_so_when_it_is_called():
    class Layer(nn.Module):
        @go.custom_backward
        def forward(self, x):
            return x

    with pytest.raises(go.DecorationError, match=r"the rule 'forward' .* given 2 arguments. If 'forward' is what"):
        Layer()(noise(3))


@pytest.mark.parametrize(
    "kind", [property, functools.cached_property, functools.partialmethod, functools.singledispatchmethod]
)
@pytest.mark.parametrize(
    ("decorate", "who"),
    [(go.custom_backward(rule), f"custom_backward: the rule 'rule' {HERE}"), (go.straight_through, "straight_through")],
    ids=["custom_backward", "straight_through"],
)
def test_what_is_made_of_a_function_is_to_be_made_of_the_decorated_one(kind, decorate, who):
    with pytest.raises(
        go.DecorationError,
        match=rf"^{who} must be given .*; it was given a {kind.__name__}. Decorate the function that the "
        f"{kind.__name__} is made of$",
    ):
        decorate(kind(double))


async def coroutine(x):
    return x * 2


def generator(x):
    yield x * 2


async def each(x):
    yield x * 2


class Later(nn.Module):
    async def forward(self, x):
        return x * 2

    def backward(self, grad_output):
        return grad_output


LATER = {
    "coroutine": (lambda: go.custom_backward(rule)(coroutine), "coroutine", "a coroutine"),
    "generator": (lambda: go.custom_backward(rule)(generator), "generator", "a generator"),
    "async generator": (lambda: go.custom_backward(rule)(each), "each", "an async generator"),
    "partial": (lambda: go.custom_backward(rule)(functools.partial(generator)), "generator", "a generator"),
    "straight_through": (lambda: go.straight_through(generator), "generator", "a generator"),
    "static method": (lambda: go.custom_backward(rule)(staticmethod(generator)), "generator", "a generator"),
    "class": (lambda: go.custom_backward(rule)(Later), "Later", "a coroutine"),
    "bare class": (lambda: go.custom_backward(Later), "Later", "a coroutine"),
    "override": (lambda: go.override(Later(), {Later: rule}), "Later", "a coroutine"),
}


@pytest.mark.parametrize(("made", "name", "kind"), LATER.values(), ids=LATER)
def test_function_that_has_not_run_when_it_returns_is_refused_at_once(made, name, kind):
    forward = Later.forward
    with pytest.raises(
        go.DecorationError,
        match=rf"'{name}' {HERE} must return its result when it is called, for the rule '\w+' .* to be its backward; "
        rf"it gives {kind}, which runs later. Give the rule to the function that computes the tensors, and call that "
        "there$",
    ):
        made()
    assert Later.forward is forward


@pytest.mark.parametrize(
    ("made", "name", "kind"),
    [
        (lambda: go.custom_backward(coroutine), "coroutine", "a coroutine"),
        (lambda: go.edit_gradient(noise(3), generator), "generator", "a generator"),
        (lambda: go.override(nn.ReLU(), {nn.ReLU: each}), "each", "an async generator"),
        (lambda: go.custom_backward(AnswersLater), "backward", "a coroutine"),
    ],
)
def test_rule_that_has_not_run_when_it_returns_is_refused_at_once(made, name, kind):
    with pytest.raises(
        go.RuleSignatureError,
        match=rf"rule '{name}' {HERE} must return the gradient when it is called; it gives {kind}, which runs later. "
        "Use 'def' and 'return'$",
    ):
        made()


class AnswersLater(nn.Module):
    def forward(self, x):
        return x * 2

    async def backward(self, grad_output):
        return grad_output


# --- CapturedTensorError ---


GLOBAL_WEIGHT = noise(3)


def reads_a_global(x):
    return x * GLOBAL_WEIGHT


def reads_a_global_module(x):
    return GLOBAL_LAYER(x)


def closes_over_a_tensor():
    captured = noise(3)
    return lambda x: x * captured


def closes_over_a_module():
    layer = Layer()
    return lambda x: layer(x)


def closes_over_a_list():
    tensors = [noise(3, grad=False), noise(3)]
    return lambda x: x * tensors[0] * tensors[1]


def closes_over_a_result():
    computed = noise(3).exp()
    return lambda x: x * computed


class MethodOfAModule(nn.Module):
    """Its method reaches a global besides its own parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(3))

    def forward(self, x):
        return x * self.weight * GLOBAL_WEIGHT


class MethodOfAnObject:
    def forward(self, x):
        return x * GLOBAL_WEIGHT


CAPTURES = {
    "global": (lambda rule: go.custom_backward(rule)(reads_a_global), "'GLOBAL_WEIGHT'"),
    "global module": (lambda rule: go.custom_backward(rule)(reads_a_global_module), r"'GLOBAL_LAYER\.weight'"),
    "closure": (lambda rule: go.custom_backward(rule)(closes_over_a_tensor()), "'captured'"),
    "closure over a module": (lambda rule: go.custom_backward(rule)(closes_over_a_module()), r"'layer\.weight'"),
    "closure over a list": (lambda rule: go.custom_backward(rule)(closes_over_a_list()), r"'tensors\[1\]'"),
    "closure over a result": (lambda rule: go.custom_backward(rule)(closes_over_a_result()), "'computed'"),
    "method of a module": (
        lambda rule: go.custom_backward(rule)(MethodOfAModule.forward).__get__(MethodOfAModule()),
        "'GLOBAL_WEIGHT'",
    ),
    "method of an object": (
        lambda rule: go.custom_backward(rule)(MethodOfAnObject.forward).__get__(MethodOfAnObject()),
        "'GLOBAL_WEIGHT'",
    ),
}
RULES = {
    "gradient alone": rule,
    "vjp": lambda grad_output, vjp: vjp(grad_output),
    "argument": lambda grad_output, x: grad_output * x,
}
captures = pytest.mark.parametrize(("make", "name"), CAPTURES.values(), ids=CAPTURES)
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@captures
@rules
def test_captured_tensor_is_an_error_that_names_it_at_every_call(make, name, rule):
    forward = make(rule)
    for _ in range(3):
        with pytest.raises(go.CapturedTensorError, match=rf"^'\S+' {HERE} must get.*{name}.*lost\. Pass it"):
            forward(noise(3))


@captures
@rules
def test_captured_tensor_is_found_after_calls_without_gradient(make, name, rule):
    forward = make(rule)
    with torch.no_grad():
        forward(noise(3))
    with pytest.raises(go.CapturedTensorError, match=name):
        forward(noise(3))


def test_captured_tensor_in_one_branch_is_an_error_at_the_call_that_takes_it():
    captured = noise(3)
    forward = go.custom_backward(lambda grad_output: {"x": grad_output * 7})(
        lambda x, flag: x * captured if flag else x * 2
    )
    x = noise(3)
    forward(x, False).sum().backward()
    exactly(x.grad, torch.full((3,), 7.0, dtype=torch.float64))
    with pytest.raises(go.CapturedTensorError, match="'captured'"):
        forward(x, True)


def test_captured_tensor_of_a_helper_is_an_error():
    def helper(x):
        return x * GLOBAL_WEIGHT

    with pytest.raises(go.CapturedTensorError):
        go.custom_backward(rule)(lambda x: helper(x))(noise(3))


def test_captured_tensor_has_the_name_the_user_knows_among_several():
    used, unused = noise(3), noise(3)

    def forward(x):
        return (unused.detach() * 0 + x) * used

    with pytest.raises(go.CapturedTensorError) as caught:
        go.custom_backward(rule)(forward)(noise(3))
    assert "'used'" in str(caught.value)
    assert "'unused'" not in str(caught.value)


def test_captured_tensor_passed_as_an_argument_too_is_no_error():
    weight = noise(3)
    forward = go.custom_backward(lambda grad_output: (grad_output, grad_output * 7))(lambda x, weight: x * weight)
    forward(noise(3), weight).sum().backward()
    exactly(weight.grad, torch.full((3,), 7.0, dtype=torch.float64))


def test_tensor_that_only_the_rule_reaches_is_no_error():
    factor = noise(3)
    x = noise(3)
    go.custom_backward(lambda grad_output: grad_output * factor)(double)(x).sum().backward()
    exactly(x.grad, factor.detach())


def test_frozen_or_detached_tensor_in_a_closure_is_no_error():
    frozen, live = noise(3, grad=False), noise(3)
    x = noise(3)
    go.custom_backward(lambda grad_output: grad_output * 7)(lambda x: x * frozen * live.detach())(x).sum().backward()
    exactly(x.grad, torch.full((3,), 7.0, dtype=torch.float64))


# --- methods of objects that are no modules ---


class Plain:
    factor = 3.0

    @go.custom_backward(lambda grad_output, module: grad_output * module.factor)
    def scaled(self, x):
        return x * self.factor

    @go.custom_backward(lambda grad_output, module=None: grad_output * (7 if module is None else 1))
    def without(self, x):
        return x * self.factor


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_rule_that_asks_for_the_module_of_an_object_that_is_none_is_refused_at_the_call(compiled):
    run = torch.compile(Plain().scaled, backend="aot_eager") if compiled else Plain().scaled
    message = (
        rf"(?s)rule '<lambda>' {HERE} asks for 'module', and '\w+' {HERE} must be a method of an nn.Module for that; "
        r"it is one of the class 'Plain', which is none\. Hand over what the rule needs.*save_for_backward"
    )
    with pytest.raises(Exception, match=message):
        run(noise(3))


def test_rule_that_may_do_without_a_module_does():
    x = noise(3)
    Plain().without(x).sum().backward()
    exactly(x.grad, torch.full((3,), 7.0, dtype=torch.float64))


@pytest.mark.parametrize("base", [nn.Module, object])
def test_rule_that_asks_for_self_is_told_to_ask_for_the_module(base):
    def takes_self(self, x):
        return x

    def made():
        rule = go.custom_backward(lambda grad_output, self: grad_output)
        return type("Made", (base,), {"forward": rule(takes_self)})().forward(noise(3))

    with pytest.raises(go.RuleSignatureError, match=r"'self', which does not exist.*For 'self' ask for 'module'"):
        made()


NO_RULES = {
    "custom_backward": (lambda: go.custom_backward(3), "3, an int"),
    "bridge": (lambda: go.bridge("numpy.sin"), "'numpy.sin', a str"),
    "edit_gradient": (lambda: go.edit_gradient(lambda grad: grad, noise(3)), r"a tensor of shape \(3,\)"),
    "edit_gradient_": (lambda: go.edit_gradient_(noise(3), None), "None"),
    "connect": (lambda: go.connect(torch.ones(3), noise(3), nn.ReLU), "the class 'ReLU'"),
    "connect_": (lambda: go.connect_(noise(3), noise(3), []), "an empty list"),
    "chain": (lambda: go.rules.chain(rule, [rule]), r"a list of 1 \(a function\)"),
    "class 'ReLU'": (lambda: go.override(nn.ReLU(), {nn.ReLU: None}), "None"),
    "glob 'a', function 'relu'": (lambda: go.Registry("r").register("a", torch.relu)(2.0), "2.0, a float"),
}


@pytest.mark.parametrize(("who", "made", "got"), [(who, *case) for who, case in NO_RULES.items()], ids=NO_RULES)
def test_what_came_instead_of_a_rule_is_named_with_whom_it_came_to(who, made, got):
    with pytest.raises(
        go.RuleSignatureError,
        match=rf"^{who}: a rule is a function of the gradient, `rule\(grad_output, ...\)`; got {got}$",
    ) as caught:
        made()
    assert caught.value.__context__ is None
