"""Tracers that record a forward: the rule goes along, or a warning says that it does not. Conformance, group export."""

import warnings

import pytest
import torch
from functorch.compile import aot_module, make_boxed_func
from oracles import closely, exactly, noise
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

import gradoverride as go
from gradoverride._core.private.modes import in_modes

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # it is deprecated


@go.custom_backward(lambda grad_output: 7 * grad_output)
def seven(x):
    return 2 * x


class Model(nn.Module):
    def forward(self, x):
        return seven(x) + 1


class Ruled(nn.Module):
    @go.custom_backward(lambda grad_output: 7 * grad_output)
    def forward(self, x):
        return 2 * x


ROUND = go.straight_through(torch.round)
KEYWORDS = go.custom_backward(lambda grad_output: 7 * grad_output)(lambda *, x: 2 * x)


@pytest.fixture
def x():
    return noise(3, 4)


def gradient(function, x):
    return torch.autograd.grad(function(x).sum(), x)[0]


def test_graph_of_fx_calls_the_decorated_function_itself(x):
    graph = torch.fx.symbolic_trace(Model())
    assert next(node.target for node in graph.graph.nodes if node.op == "call_function") is seven
    exactly(gradient(graph, x), torch.full_like(x, 7.0))


def test_graph_of_fx_calls_the_module_with_a_rule_as_one(x):
    graph = torch.fx.symbolic_trace(nn.Sequential(Ruled(), nn.Identity()))
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    exactly(gradient(graph, x), torch.full_like(x, 7.0))


class Scale:
    @go.custom_backward(lambda grad_output: 7 * grad_output)
    def scaled(self, x):
        return 2 * x

    @classmethod
    @go.custom_backward(lambda grad_output: 7 * grad_output)
    def doubled(cls, x):
        return 2 * x


@go.custom_backward(lambda grad_output: 7 * grad_output)
def of_self(self):
    return 2 * self


@pytest.mark.parametrize("call", [Scale().scaled, lambda x: Scale.scaled(Scale(), x), Scale().doubled, of_self])
def test_graph_of_fx_has_the_rule_of_a_method_of_any_object_and_of_a_function_of_self(call, x):
    class Calling(nn.Module):
        def forward(self, x):
            return call(x)

    exactly(gradient(torch.fx.symbolic_trace(Calling()), x), torch.full_like(x, 7.0))


def test_lambdas_and_functions_of_torch_are_recorded_with_their_rule(x):
    forms = {
        "lambda": go.custom_backward(lambda grad_output: 7 * grad_output)(lambda x: 2 * x),
        "torch": lambda x: ROUND(x),
        "edit": lambda x: go.edit_gradient(x, lambda grad_output: 7 * grad_output),
        "connect": lambda x: go.connect(x.detach().round(), x),
        "keywords": lambda x: KEYWORDS(x=x),
    }
    for name, form in forms.items():
        exactly(gradient(torch.fx.symbolic_trace(form), x), gradient(form, x))
        assert gradient(form, x).mean().item() in (1.0, 7.0), name


def test_model_that_is_a_module_with_a_rule_itself_is_refused_by_fx_with_a_way_out(x):
    with pytest.raises(go.UnsupportedError, match=r"(?s)'Ruled' .*must be a part of the model.*nn.Sequential\(model\)"):
        torch.fx.symbolic_trace(Ruled())


TRACERS = {
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "make_fx": lambda model, x: make_fx(model)(x),
    "jit.trace": lambda model, x: torch.jit.trace(model, (x,)),
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("wanted", [False, True])
def test_tracer_that_drops_rules_says_so_and_has_the_forward(tracer, wanted, x):
    given = x.detach().requires_grad_(wanted)
    with pytest.warns(go.GradOverrideWarning, match=r"records the forward of 'seven' .* and not its rule '<lambda>'.*"):
        traced = TRACERS[tracer](Model(), given)
    exactly(traced(x).detach(), (2 * x + 1).detach())


@pytest.mark.parametrize("tracer", TRACERS)
def test_nothing_is_said_where_no_gradient_is_wanted(tracer, x):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", go.GradOverrideWarning)
        traced = TRACERS[tracer](Model(), x.detach())
    exactly(traced(x).detach(), (2 * x + 1).detach())


def test_make_fx_of_a_gradient_has_the_rule(x):
    graph = make_fx(torch.func.grad(lambda x: seven(x).sum()))(x.detach())
    exactly(graph(x.detach()), torch.full_like(x, 7.0).detach())


def calls_seven(x):
    return seven(x) + 1


@pytest.mark.parametrize("what", [seven, calls_seven, Model()], ids=["itself", "what calls it", "a model"])
def test_script_of_a_decorated_function_is_refused_with_a_way_out(what):
    with pytest.raises(go.UnsupportedError, match=r"'seven' .* torch.jit.script compiles none.*its __wrapped__"):
        torch.jit.script(what)


def test_script_of_an_overridden_model_is_refused_and_without_the_override_it_is_what_it_was(x):
    model = nn.Sequential(nn.ReLU())
    refused = pytest.raises(
        go.UnsupportedError, match=r"an overridden 'ReLU' .* torch.jit.script .*without the override"
    )
    with go.override(model, {nn.ReLU: lambda grad_output: 7 * grad_output}):
        model(x)
        with refused:
            torch.jit.script(model)
    exactly(torch.jit.script(model)(x), x.relu())


def test_script_of_a_model_whose_functions_are_overridden_is_refused(x):
    model = nn.Sequential(nn.ReLU())
    refused = pytest.raises(go.UnsupportedError, match=r"an overridden 'Sequential' .* torch.jit.script .*without the")
    with go.override(model, {torch.relu: lambda grad_output: 7 * grad_output}):
        model(x)
        with refused:
            torch.jit.script(model)


# --- fake tensors, which others estimate shapes and memory with ---

# Without the private name such a mode is not seen, and refuses what the engine makes.
modes_are_seen = pytest.mark.skipif(in_modes is get_proxy_mode, reason="needs a private name")
FAKE_RULES = {
    "gradient": lambda grad_output: {"input": grad_output},
    "output": lambda grad_output, output: {"input": grad_output * output},
    "vjp": lambda grad_output, vjp: vjp(grad_output),
    "by_name": lambda grad_output, vjp, params: vjp.by_name(grad_output),
    "parameter": lambda grad_output, weight: {"input": grad_output @ weight, "weight": None},
    "module": lambda grad_output, module: {"input": grad_output @ module.weight},
}


@modes_are_seen
@pytest.mark.parametrize("rule", FAKE_RULES.values(), ids=FAKE_RULES)
def test_override_runs_on_fake_tensors(rule):
    with FakeTensorMode():
        module, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
        with go.override(module, {module: rule}):
            module(x).sum().backward()
        assert x.grad.shape == (1, 2)


@modes_are_seen
def test_function_and_its_second_derivative_run_on_fake_tensors():
    fn = go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(torch.sin)
    with FakeTensorMode():
        x = torch.ones(3, requires_grad=True)
        (grad,) = torch.autograd.grad(fn(x).sum(), x, create_graph=True)
        grad.sum().backward()
        assert x.grad.shape == (3,)
        fn(torch.ones(3)).sum()
    assert isinstance(x.grad, FakeTensor)


@modes_are_seen
def test_rule_that_asks_for_vjp_is_in_what_aot_module_traces():
    model, x = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), nn.Tanh()), noise(2, 3)
    with go.override(model, {nn.Tanh: lambda grad_output, vjp: 3 * vjp(grad_output)}), warnings.catch_warnings():
        (expected,) = torch.autograd.grad(model(x).sum(), x)
        warnings.simplefilter("ignore")  # make_fx says that it records the forward, and aot_module gives it both
        compiled = aot_module(model, lambda graph, _: make_boxed_func(graph.forward))
        (actual,) = torch.autograd.grad(compiled(x).sum(), x)
    closely(actual, expected)
