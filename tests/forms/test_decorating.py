"""What can be decorated, and what comes back. Contract, section 2."""

import abc
import copy
import functools
import importlib
import inspect
import io
import marshal
import pickle
import types
import weakref

import pytest
import torch
from oracles import closely, exactly, float64, noise
from torch import nn

import gradoverride as go


def seven_times(grad_output):
    return 7 * grad_output


def halve(x):
    """Half of x."""
    return x / 2


class Halver:
    def __call__(self, x):
        return x / 2

    def method(self, x):
        return x / 2


class HalvingModule(nn.Module):
    def forward(self, x):
        return x / 2


CALLABLES = {
    "function": lambda: halve,
    "lambda": lambda: lambda x: x / 2,
    "builtin": lambda: torch.floor,
    "tensor method": lambda: torch.Tensor.floor,
    "partial": lambda: functools.partial(torch.mul, other=0.5),
    "partial of a function": lambda: functools.partial(lambda factor, x: factor * x, 0.5),
    "callable object": Halver,
    "bound method": lambda: Halver().method,
    "module": HalvingModule,
    "bound forward": lambda: HalvingModule().forward,
    "compiled": lambda: torch.compile(halve, backend="eager"),
    "compiled by aot": lambda: torch.compile(halve, backend="aot_eager"),
    "compiled module": lambda: torch.compile(HalvingModule(), backend="eager"),
    "decorated": lambda: go.custom_backward(lambda grad_output: 100 * grad_output)(halve),
}


@pytest.mark.parametrize("kind", CALLABLES)
def test_callable_keeps_its_value_and_gets_the_gradient_of_the_rule(kind):
    original = CALLABLES[kind]()
    decorated = go.custom_backward(seven_times)(original)
    x = float64(4.0, 6.0)
    y = decorated(x)
    exactly(y.detach(), original(x.detach()))
    y.backward(float64(1.0, 10.0, grad=False))
    exactly(x.grad, float64(7.0, 70.0, grad=False))


@pytest.mark.parametrize("kind", CALLABLES)
def test_what_comes_back_is_a_plain_function_around_the_original(kind):
    original = CALLABLES[kind]()
    decorated = go.custom_backward(seven_times)(original)
    assert type(decorated) is types.FunctionType
    assert decorated.__wrapped__ == original


@pytest.mark.parametrize("decorate", [go.custom_backward(seven_times), go.straight_through], ids=["rule", "ste"])
def test_name_signature_and_docstring_are_the_originals(decorate):
    def forward(x: torch.Tensor, /, power: float = 2.0, *rest, flag: bool = False, **options) -> torch.Tensor:
        """Raise x."""
        return x**power

    decorated = decorate(forward)
    assert decorated.__name__ == forward.__name__
    assert decorated.__qualname__ == forward.__qualname__
    assert decorated.__module__ == forward.__module__
    assert decorated.__doc__ == "Raise x."
    assert inspect.signature(decorated) == inspect.signature(forward)


def test_name_of_a_builtin_stays():
    assert go.straight_through(torch.round).__name__ == "round"


@pytest.mark.parametrize(
    ("builtin", "place"), [(torch.round, "torch.round"), (torch.Tensor.floor, r"torch._C.TensorBase.floor")]
)
def test_decorated_builtin_cannot_be_pickled_and_the_error_names_the_builtin(builtin, place):
    with pytest.raises(pickle.PicklingError, match=f"not the same object as {place}"):
        pickle.dumps(go.straight_through(builtin))


def test_decorated_abstract_method_stays_abstract():
    class Base(abc.ABC):
        @go.custom_backward(seven_times)
        @abc.abstractmethod
        def forward(self, x): ...

    with pytest.raises(TypeError, match="abstract"):
        Base()


def scripted_halve():
    return torch.jit.script(halve)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_function_gets_the_gradient_of_the_rule():
    decorated = go.custom_backward(seven_times)(scripted_halve())
    x = float64(4.0)
    y = decorated(x)
    y.backward()
    assert (y.item(), x.grad.item()) == (2.0, 7.0)
    assert type(decorated) is types.FunctionType


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_traced_function_gets_the_gradient_of_the_rule():
    decorated = go.custom_backward(seven_times)(torch.jit.trace(halve, torch.ones(1, dtype=torch.float64)))
    x = float64(4.0)
    decorated(x).backward()
    exactly(x.grad, float64(7.0, grad=False))


@torch.library.custom_op("gradoverride_tests::scaled_square", mutates_args=())
def scaled_square(x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    """The square, scaled."""
    return factor * x * x


scaled_square.register_fake(lambda x, factor=2.0: torch.empty_like(x))


def test_custom_operator_is_known_by_the_function_that_it_was_made_of():
    decorated = go.custom_backward(lambda grad_output, x, factor: grad_output * 5 * factor * x)(scaled_square)
    x = float64(3.0)
    y = decorated(x)
    assert y.item() == 18.0
    assert y.grad_fn.name() == "scaled_squareBackward"
    exactly(torch.autograd.grad(y, x)[0], float64(30.0, grad=False))
    exactly(torch.autograd.grad(decorated(x, factor=1.0), x)[0], float64(15.0, grad=False))
    assert (decorated.__name__, decorated.__doc__) == ("scaled_square", "The square, scaled.")
    assert list(inspect.signature(decorated).parameters) == ["x", "factor"]
    assert decorated.__wrapped__ is scaled_square
    with pytest.raises(go.RuleSignatureError, match=r"'scaled_square' \(.*test_decorating.py:\d+\) offers 'x', 'fac"):
        go.custom_backward(lambda grad_output, factr: grad_output)(scaled_square)


@pytest.mark.parametrize("kind", ["operator", "overload"])
def test_custom_operator_without_a_gradient_gets_one_by_any_spelling(kind):
    operator = {"operator": scaled_square, "overload": torch.ops.gradoverride_tests.scaled_square.default}[kind]
    x = float64(3.0)
    exactly(torch.autograd.grad(go.straight_through(operator)(x), x)[0], float64(1.0, grad=False))


def test_scripted_function_is_known_by_its_own_name():
    decorated = go.custom_backward(seven_times)(scripted_halve())
    assert decorated(float64(1.0)).grad_fn.name() == "halveBackward"
    assert decorated.__name__ == "halve"
    assert list(inspect.signature(decorated).parameters) == ["x"]


@pytest.mark.parametrize("made", [torch.jit.script, lambda module: torch.compile(module, backend="eager")])
def test_scripted_and_compiled_modules_are_known_by_their_own_class(made):
    decorated = go.custom_backward(seven_times)(made(torch.nn.Tanh()))
    assert decorated(float64(1.0)).grad_fn.name() == "TanhBackward"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_scripted_function_keeps_the_rule_when_it_is_compiled():
    decorated = torch.compile(go.custom_backward(seven_times)(scripted_halve()), backend="aot_eager")
    x = float64(4.0)
    decorated(x).backward()
    exactly(x.grad, float64(7.0, grad=False))
    torch.compiler.reset()


# The node in the graph


def scale_backward(grad_output, x, weight):
    return grad_output * weight, grad_output * x


@go.custom_backward(scale_backward)
def scale(x, weight):
    return x * weight


def test_node_bears_the_users_name():
    y = scale(noise(2), noise(2))
    assert y.grad_fn.name() == "scaleBackward"
    assert "grad_fn=<scaleBackward>" in repr(y)


@pytest.mark.parametrize(
    ("decorated", "name"),
    [
        (go.straight_through(torch.round), "roundBackward"),
        (go.straight_through(torch.sign, surrogate=torch.tanh), "signBackward"),
        (go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(halve), "halveBackward"),
        (go.custom_backward(seven_times)(functools.partial(halve)), "halveBackward"),
    ],
    ids=["straight_through", "surrogate", "vjp", "partial"],
)
def test_node_of_every_form_bears_the_users_name(decorated, name):
    assert decorated(noise(2)).grad_fn.name() == name


def test_the_opening_example_has_the_gradients_of_the_product():
    assert torch.autograd.gradcheck(scale, (noise(3), noise(3)))


# Pickling, copying


def test_module_level_function_is_pickled_by_reference():
    assert pickle.loads(pickle.dumps(scale)) is scale


class ByValue(pickle.Pickler):
    """Pickles functions as cloudpickle does those that no module has."""

    def reducer_override(self, value):
        if isinstance(value, types.CodeType):
            return marshal.loads, (marshal.dumps(value),)
        if isinstance(value, types.CellType):
            return made_of, ("CellType", value.cell_contents)
        if isinstance(value, weakref.WeakSet):
            return weakref.WeakSet, (list(value),)
        if isinstance(value, types.ModuleType):
            return importlib.import_module, (value.__name__,)
        if isinstance(value, types.FunctionType) and "<locals>" in value.__qualname__:
            found = {name: value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__}
            parts = value.__code__, found, value.__name__, value.__defaults__, value.__closure__
            return made_of, ("FunctionType", *parts)
        return NotImplemented


def made_of(kind, *parts):
    return getattr(types, kind)(*parts)


@pytest.mark.parametrize("rule", [lambda grad_output: 2 * grad_output, lambda grad_output, vjp: vjp(grad_output)])
def test_function_is_not_pickled_by_value_and_the_error_says_what_to_do(rule):
    def plain(x):
        return x * x

    class Layer(nn.Module):
        @go.custom_backward(rule)
        def forward(self, x):
            return x * x

    ByValue(io.BytesIO()).dump(plain)
    for decorated, name in ((go.custom_backward(rule)(plain), "plain"), (Layer.forward, "Layer")):
        with pytest.raises(go.UnsupportedError) as caught:
            ByValue(io.BytesIO()).dump(decorated)
        text = str(caught.value)
        assert text.startswith(f"'{name}' (")
        assert "has a rule, '<lambda>' (" in text
        assert "must be found by its name in a module that can be imported, to be pickled" in text
        assert text.endswith("Move it into a module, or use override, whose rules are pickled with the model")


def test_function_copies_to_itself():
    assert copy.deepcopy(scale) is scale


# Methods


class Shapes:
    factor = 5

    @go.custom_backward(seven_times)
    def method(self, x):
        return x * self.factor

    @staticmethod
    @go.custom_backward(seven_times)
    def static_outside(x):
        return x * 5

    @go.custom_backward(seven_times)
    @staticmethod
    def static_inside(x):
        return x * 5

    @classmethod
    @go.custom_backward(seven_times)
    def class_outside(cls, x):
        return x * cls.factor

    @go.custom_backward(seven_times)
    @classmethod
    def class_inside(cls, x):
        return x * cls.factor


STATIC_AND_CLASS_METHODS = ["static_outside", "static_inside", "class_outside", "class_inside"]


@pytest.mark.parametrize("name", ["method", *STATIC_AND_CLASS_METHODS])
def test_method_called_on_an_instance_gets_the_rule(name):
    x = float64(1.0, 2.0)
    y = getattr(Shapes(), name)(x)
    exactly(y.detach(), float64(5.0, 10.0, grad=False))
    y.sum().backward()
    exactly(x.grad, float64(7.0, 7.0, grad=False))


@pytest.mark.parametrize("name", STATIC_AND_CLASS_METHODS)
def test_static_and_class_methods_called_on_the_class_get_the_rule(name):
    x = float64(1.0, 2.0)
    getattr(Shapes, name)(x).sum().backward()
    exactly(x.grad, float64(7.0, 7.0, grad=False))


@pytest.mark.parametrize("name", ["class_outside", "class_inside"])
def test_class_method_sees_the_subclass(name):
    class Sub(Shapes):
        factor = 11

    exactly(getattr(Sub, name)(float64(1.0)).detach(), float64(11.0, grad=False))


@pytest.mark.parametrize("name", STATIC_AND_CLASS_METHODS)
def test_static_and_class_methods_stay_what_they_are(name):
    raw = Shapes.__dict__[name]
    bound = getattr(Shapes, name)
    assert isinstance(raw, (staticmethod, classmethod))
    assert list(inspect.signature(bound).parameters) == ["x"]


def test_method_rule_may_ask_for_an_argument():
    class Power:
        exponent = 3

        @go.custom_backward(lambda grad_output, x: grad_output * 3 * x**2)
        def method(self, x):
            return x**self.exponent

    assert torch.autograd.gradcheck(Power().method, (noise(3),))


def test_super_reaches_the_decorated_forward_of_the_base():
    class Base(nn.Module):
        @go.custom_backward(seven_times)
        def forward(self, x):
            return x * 2

    class Derived(Base):
        def forward(self, x):
            return 3 * super().forward(x)

    x = float64(1.0)
    Derived()(x).backward()
    exactly(x.grad, float64(21.0, grad=False))


def test_forward_of_a_module_runs_its_hooks():
    class Halve(nn.Module):
        @go.custom_backward(seven_times)
        def forward(self, x):
            return x / 2

    layer, seen = Halve(), []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.item()))
    layer(float64(4.0))
    assert seen == [2.0]


def test_rule_on_a_class_means_its_forward():
    @go.custom_backward(lambda grad_output, weight: 7 * grad_output * weight)
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", float64(3.0, grad=False))

        def forward(self, x):
            return x * self.weight

    x = float64(1.0)
    layer = Layer()
    y = layer(x)
    y.backward()
    assert isinstance(layer, nn.Module)
    assert isinstance(Layer, type)
    assert Layer.__name__ == "Layer"
    assert (y.item(), x.grad.item()) == (3.0, 21.0)


@pytest.mark.parametrize("reach", [lambda linear: linear, lambda linear: linear.forward], ids=["module", "forward"])
def test_module_instance_leaves_its_parameters_to_autograd(reach):
    linear = nn.Linear(3, 2, dtype=torch.float64)
    plain, x = copy.deepcopy(linear), noise(4, 3)
    twin = x.detach().clone().requires_grad_()
    go.custom_backward(lambda grad_output, vjp: 7 * vjp(grad_output))(reach(linear))(x).square().sum().backward()
    plain(twin).square().sum().backward()
    closely(x.grad, 7 * twin.grad)
    closely((linear.weight.grad, linear.bias.grad), (plain.weight.grad, plain.bias.grad))


class Vector(torch.Tensor):
    @go.custom_backward(lambda grad_output: 7 * grad_output)
    def double(self):
        return self * 2

    @go.custom_backward(lambda grad_output, self, factor: (grad_output * factor, grad_output * self))
    def times(self, factor, *, shift=0.0):
        return self * factor + shift

    @go.straight_through
    def rounded(self, *scales):
        return (self * scales[0]).round()


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda vector: vector.double(), 7.0),
        (lambda vector: vector.times(float64(3.0, 3.0), shift=1.0), 3.0),
        (lambda vector: vector.rounded(4.0), 1.0),
    ],
    ids=["rule", "rule that asks", "straight_through"],
)
def test_method_of_a_class_of_tensors_has_its_receiver_as_an_argument(call, expected):
    vector = torch.tensor([1.0, 2.0], dtype=torch.float64).as_subclass(Vector).requires_grad_()
    result = call(vector)
    assert type(result) is Vector
    result.sum().backward()
    assert vector.grad.tolist() == [expected] * 2
    with torch.no_grad():
        assert not call(vector).requires_grad


class OfModule(nn.Module):
    @staticmethod
    def forward(x):
        return x * 2


class OfAnyClass:
    factor = 2

    @classmethod
    def forward(cls, x):
        return x * cls.factor


class Inheriting(OfModule):
    pass


@pytest.mark.parametrize("decorate", [go.custom_backward(seven_times), go.straight_through], ids=["rule", "ste"])
@pytest.mark.parametrize("base", [OfModule, OfAnyClass, Inheriting])
def test_rule_on_a_class_whose_forward_is_static_or_of_the_class(base, decorate):
    decorated = decorate(type("Decorated", (base,), {}))
    kind = type(inspect.getattr_static(base, "forward"))
    assert isinstance(inspect.getattr_static(decorated, "forward"), kind)
    for call in (decorated.forward, decorated().forward, *([decorated()] if issubclass(base, nn.Module) else [])):
        x = float64(1.0)
        y = call(x)
        y.backward()
        assert (y.item(), x.grad.item()) == (2.0, 1.0 if decorate is go.straight_through else 7.0)


# One rule inside another


def test_rule_of_the_outer_decorator_sees_the_inner_one_as_its_vjp():
    inner = go.custom_backward(seven_times)(halve)
    outer = go.custom_backward(lambda grad_output, vjp: 10 * vjp(grad_output))(inner)
    x = float64(4.0)
    outer(x).backward()
    exactly(x.grad, float64(70.0, grad=False))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: go.custom_backward(lambda grad_output: {"self": 5 * grad_output})(lambda *, self: self * 2)(self=x),
        lambda x: go.custom_backward(lambda grad_output: {"cls": 5 * grad_output})(lambda *, cls=None: cls * 2)(cls=x),
        lambda x: go.custom_backward(lambda grad_output: (5 * grad_output,))(lambda *self: self[0] * 2)(x),
        lambda x: go.custom_backward(lambda grad_output: 5 * grad_output)(lambda **self: self["x"] * 2)(x=x),
    ],
    ids=["keyword", "keyword_cls", "args", "kwargs"],
)
def test_argument_called_self_that_cannot_be_a_receiver_is_an_argument(call):
    x = float64(1.0, 2.0)
    call(x).sum().backward()
    exactly(x.grad, float64(5.0, 5.0, grad=False))


def test_recursive_function_applies_its_rule_at_each_level():
    @go.custom_backward(lambda grad_output, vjp: 2 * vjp(grad_output))
    def recursive(x, depth):
        return x * 3 if depth == 0 else recursive(x, depth - 1) * 1

    x = float64(1.0)
    recursive(x, 3).backward()
    exactly(x.grad, float64(3.0 * 2**4, grad=False))


def test_one_rule_serves_many_functions():
    first, second = go.custom_backward(seven_times)(torch.sin), go.custom_backward(seven_times)(torch.cos)
    x = float64(1.0)
    (first(x) + second(x)).backward()
    exactly(x.grad, float64(14.0, grad=False))


# What cannot be decorated


@pytest.mark.parametrize("target", [3, "text", None], ids=["number", "string", "None"])
def test_what_is_not_callable_is_refused(target):
    with pytest.raises(go.DecorationError, match=r"custom_backward"):
        go.custom_backward(seven_times)(target)


def test_module_class_without_backward_is_refused_by_name():
    class Forgetful(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(go.DecorationError, match=r"(?s)Forgetful.*backward"):
        go.custom_backward(Forgetful)


def test_class_without_forward_is_refused_by_name():
    class Forwardless:
        def backward(self, grad_output):
            return grad_output

    with pytest.raises(go.DecorationError, match=r"(?s)Forwardless.*forward"):
        go.custom_backward(Forwardless)


@pytest.mark.parametrize("decorate", [go.custom_backward(seven_times), go.custom_backward, go.straight_through])
def test_autograd_function_is_refused_for_it_has_a_backward(decorate):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 3

    message = r"'Doubled' \(.*test_decorating\.py:\d+\) must be no torch.autograd.Function.* calls Doubled.apply"
    with pytest.raises(go.DecorationError, match=message):
        decorate(Doubled)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_bare_class_with_a_static_forward_or_backward_is_refused(name):
    class Static(nn.Module):
        def forward(self, x):
            return x

        def backward(self, grad_output):
            return grad_output

    setattr(Static, name, staticmethod(lambda x: x))
    with pytest.raises(go.DecorationError, match=rf"'{name}' of class 'Static' .*must be a method.*Take 'self'"):
        go.custom_backward(Static)


def test_bare_class_that_is_no_module_is_refused():
    class Plain:
        def forward(self, x):
            return x

        def backward(self, grad_output):
            return grad_output

    with pytest.raises(go.DecorationError, match=r"class 'Plain' \(.*\) must be an nn.Module .*give a rule instead"):
        go.custom_backward(Plain)


def test_rule_on_a_class_without_forward_is_refused_by_name():
    class Nothing:
        pass

    with pytest.raises(go.DecorationError, match=r"(?s)Nothing.*forward"):
        go.custom_backward(seven_times)(Nothing)


def test_builtin_without_a_signature_offers_the_reserved_names():
    decorated = go.custom_backward(lambda grad_output, input, output: grad_output * input * output)(torch.round)
    x = float64(2.4)
    decorated(x).backward()
    closely(x.grad, float64(4.8, grad=False))


def test_builtin_without_a_signature_offers_nothing_else():
    with pytest.raises(go.RuleSignatureError, match=r"(?s)\bx\b.*input"):
        go.custom_backward(lambda grad_output, x: grad_output * x)(torch.round)
