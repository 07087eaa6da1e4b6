"""`chain`: several rules as one, against the same rules written as one function."""

import copy
import functools
import inspect
import pickle

import pytest
import torch
from oracles import closely, exactly, float64, noise
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import gradoverride as go
from gradoverride import rules
from gradoverride.rules import chain, plain


def gradient(forward, *args, g):
    return torch.autograd.grad(forward(*args), [arg for arg in args if arg.requires_grad], g)


def times_x(grad_output, x):
    return grad_output * x


def over_result(grad_output, output, eps=0.0):
    return grad_output / (output + eps)


# --- what it does ---


def test_the_first_rule_sees_the_incoming_gradient_first():
    x, g = noise(3), float64(9.0, 0.5, -9.0, grad=False)
    exactly(
        gradient(lambda x: go.edit_gradient(x, chain(rules.clip_value(1.0), rules.scale(3.0))), x, g=g)[0],
        g.clamp(-1, 1) * 3,
    )
    exactly(
        gradient(lambda x: go.edit_gradient(x, chain(rules.scale(3.0), rules.clip_value(1.0))), x, g=g)[0], g.sign()
    )


def test_each_rule_is_given_what_it_asks_for_and_no_more():
    seen = {}

    def first(grad_output, x):
        seen["first"] = x
        return grad_output

    def second(grad_output, *, weight, output):
        seen["second"] = weight, output
        return {"x": grad_output * weight}

    forward = go.custom_backward(chain(first, second))(lambda x, weight, unused: x * weight + unused)
    x, weight, unused = noise(3), noise(3, grad=False), noise(3, grad=False)
    y = forward(x, weight, unused)
    (found,) = torch.autograd.grad(y.sum(), x)
    exactly(found, weight)
    exactly(seen, {"first": x, "second": (weight, y)})


def test_it_asks_for_the_union_and_keeps_no_more():
    def bytes_kept(rule):
        kept = []
        x = noise(10)
        with saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes), lambda _: None):
            go.custom_backward(rule)(lambda x, weight: torch.tanh(x * weight))(x, noise(10, grad=False))
        return sum(kept)

    assert bytes_kept(chain(rules.reverse(), rules.clip_norm(1.0))) == 0
    assert bytes_kept(chain(rules.reverse(), times_x)) == 80
    assert bytes_kept(chain(times_x, rules.reverse(), times_x)) == 80
    assert bytes_kept(chain(times_x, over_result)) == 160


def test_its_signature_is_the_union():
    def first(grad_output, x, eps=1e-3, lo=0):
        return grad_output

    def second(grad_output, eps, vjp):
        return grad_output

    rule = chain(first, functools.partial(second, vjp=None), torch.neg)
    assert str(inspect.signature(rule)) == "(grad_output, *, x, eps, lo=None)"
    assert str(inspect.signature(chain(rule, second))) == "(grad_output, *, x, eps, lo=None, vjp)"
    assert str(inspect.signature(chain(second, first))) == "(grad_output, *, eps, vjp, x, lo=None)"


def test_it_is_called_as_a_function():
    g, x = noise(3, grad=False), noise(3, grad=False)
    exactly(chain(times_x, rules.scale(2.0))(g, x=x), g * x * 2)


@pytest.mark.parametrize("bound", [False, True], ids=["its own default", "bound by partial"])
def test_an_option_of_a_rule_stays_its_own(bound):
    link = functools.partial(over_result, eps=1.0) if bound else over_result
    x, g = float64(2.0), float64(6.0, grad=False)
    forward = go.custom_backward(chain(rules.scale(2.0), link))(lambda x: x * 1)
    exactly(gradient(forward, x, g=g)[0], float64(4.0 if bound else 6.0, grad=False))


def test_an_optional_name_that_the_forward_has_is_given():
    forward = go.custom_backward(chain(rules.scale(2.0), over_result))(lambda x, eps: x * 1)
    x = float64(2.0)
    exactly(torch.autograd.grad(forward(x, 1.0), x, float64(6.0, grad=False))[0], float64(4.0, grad=False))


# --- with vjp ---


def test_vjp_in_a_link_is_the_plain_one_for_the_gradient_before_it():
    x, g = noise(3), noise(3, grad=False) * 3
    forward = go.custom_backward(chain(rules.clip_value(1.0), plain, rules.scale(2.0)))(torch.tanh)
    (expected,) = torch.autograd.grad(torch.tanh(x), x, g.clamp(-1, 1))
    closely(gradient(forward, x, g=g)[0], expected * 2)


def test_links_before_edit_the_gradient_of_the_result_and_links_behind_that_of_the_input():
    seen = []
    rule = chain(rules.observe(seen.append), plain, rules.observe(seen.append))
    x, g = noise(2, 3), noise(2, grad=False)
    (found,) = gradient(go.custom_backward(rule)(lambda x: x.square().sum(1)), x, g=g)
    (expected,) = torch.autograd.grad(x.square().sum(1), x, g)
    closely(found, expected)
    exactly(seen, [g, found])


def test_second_derivatives_are_those_of_the_rule_as_written():
    def by_hand(grad_output, vjp):
        return vjp(grad_output.clamp(-1, 1)) * 2

    seconds = []
    x, g = noise(3), noise(3, grad=False)
    for rule in (chain(rules.clip_value(1.0), plain, rules.scale(2.0)), by_hand):
        (first,) = torch.autograd.grad(go.custom_backward(rule)(torch.tanh)(x), x, g, create_graph=True)
        seconds.append(torch.autograd.grad(first.sum(), x)[0])
    assert seconds[1].abs().min() > 0
    closely(*seconds)


def test_parameters_keep_the_gradient_of_autograd():
    torch.manual_seed(1)
    model, x, g = nn.Linear(3, 2).double(), noise(4, 3), noise(4, 2, grad=False) * 5
    plainly = torch.autograd.grad(model(x), list(model.parameters()), g)
    (clipped,) = torch.autograd.grad(model(x), x, g.clamp(-1, 1))
    with go.override(model, {nn.Linear: chain(rules.clip_value(1.0), plain)}):
        found, *parameters = torch.autograd.grad(model(x), [x, *model.parameters()], g)
    closely(found, clipped)
    closely(parameters, list(plainly))


def test_by_name_in_a_link_answers_for_parameters_too():
    def all_of_them(grad_output, vjp, params):
        return vjp.by_name(grad_output)

    torch.manual_seed(1)
    model, x, g = nn.Linear(3, 2).double(), noise(4, 3), noise(4, 2, grad=False) * 5
    expected = torch.autograd.grad(model(x), [x, *model.parameters()], g.clamp(-1, 1))
    with go.override(model, {nn.Linear: chain(rules.clip_value(1.0), all_of_them, rules.scale(2.0))}):
        found = torch.autograd.grad(model(x), [x, *model.parameters()], g)
    closely(found, tuple([2 * grad for grad in expected]))


def test_an_answer_for_a_parameter_that_it_does_not_ask_for():
    def ones(grad_output, input, module):
        return {"input": grad_output @ module.weight, "weight": torch.ones_like(module.weight)}

    model, x = nn.Linear(3, 2).double(), noise(4, 3)
    with go.override(model, {nn.Linear: chain(rules.reverse(), ones)}):
        model(x).sum().backward()
    exactly(model.weight.grad, torch.ones_like(model.weight))
    closely(model.bias.grad, torch.full_like(model.bias, 4.0))
    closely(x.grad, -model.weight.sum(0).expand(4, 3).detach())


def test_with_a_rule_of_relevance():
    torch.manual_seed(1)
    model, x = nn.Linear(3, 2).double(), noise(1, 3)
    r = noise(1, 2, grad=False)
    with go.override(model, {nn.Linear: rules.lrp_gamma(0.5)}):
        (expected,) = torch.autograd.grad(model(x), x, r * 2)
    with go.override(model, {nn.Linear: chain(rules.scale(2.0), rules.lrp_gamma(0.5))}):
        (found,) = torch.autograd.grad(model(x), x, r)
    closely(found, expected)


# --- what stops, what writes, what is wrong ---


def test_none_stops_the_gradient_and_no_further_link_is_called():
    called = []
    rule = chain(lambda grad_output: None, rules.observe(called.append), called.append)
    x = noise(3)
    (go.edit_gradient(x, rule) + x).sum().backward()
    exactly(x.grad, torch.ones_like(x).detach())
    assert called == []


def double_in_place(grad_output):
    return grad_output.mul_(2)


@pytest.mark.parametrize("first", [True, False])
def test_a_link_that_writes_is_given_a_copy(first):
    seen = []
    watch = rules.observe(seen.append)
    x, g = noise(3), torch.ones(3, dtype=torch.float64)
    rule = chain(double_in_place, watch) if first else chain(watch, double_in_place)
    exactly(gradient(lambda x: go.edit_gradient(x, rule), x, g=g)[0], torch.full_like(g, 2.0))
    exactly(g, torch.ones_like(g))
    exactly(seen, [torch.full_like(g, 2.0 if first else 1.0)])


def test_a_link_that_writes_into_the_answer_of_vjp_changes_no_other():
    x, g = noise(3), noise(3, grad=False)
    y = go.custom_backward(chain(plain, double_in_place, double_in_place))(lambda x: x * 1)(x)
    for _ in range(2):
        exactly(torch.autograd.grad(y, x, g, retain_graph=True)[0], 4 * g)
    exactly(y, x)


def test_what_is_no_rule_is_an_error_when_it_is_made():
    with pytest.raises(go.RuleSignatureError, match=r"a rule is a function of the gradient, .* got the class 'scale'"):
        chain(rules.reverse(), rules.scale)
    with pytest.raises(go.RuleSignatureError, match=r"got 1\.0, a float"):
        chain(1.0)
    with pytest.raises(go.RuleSignatureError, match="must take the gradient as its first positional parameter"):
        chain(rules.reverse(), lambda: None)
    with pytest.raises(go.RuleOptionError) as error:
        chain()
    assert str(error.value) == "chain: 'rules' must be one rule or more; got ()"


def test_a_name_that_does_not_exist_is_an_error_that_shows_the_chain():
    rule = chain(rules.clip_value(1.0), times_x)
    with pytest.raises(
        go.RuleSignatureError, match=r"rule 'chain\(clip_value\(limit=1.0\), times_x\)' .* asks for 'x'"
    ):
        go.custom_backward(rule)(lambda y: y)


def test_a_wrong_answer_is_an_error_that_shows_the_chain():
    rule = chain(rules.reverse(), torch.sum)
    with pytest.raises(
        go.RuleResultError, match=r"rule 'chain\(reverse\(strength=1.0\), sum\)' .* returned a tensor of shape \(\)"
    ):
        go.edit_gradient(noise(3), rule).sum().backward()


def test_an_exception_in_a_link_passes_with_a_note():
    with pytest.raises(go.NonFiniteGradientError) as error:
        go.edit_gradient(noise(1), chain(rules.scale(2.0), rules.check_finite())).log().mul(0).div(0).sum().backward()
    notes = getattr(error.value, "__notes__", None)
    assert notes is None or "chain(scale(factor=2.0), check_finite(name=''))" in " ".join(notes)


# --- as a value ---


def test_it_pickles_copies_compares_and_prints():
    rule = chain(rules.clip_norm(1.0), plain, chain(rules.stop, torch.neg))
    assert repr(rule) == "chain(clip_norm(max_norm=1.0, dim=None), plain, chain(stop, neg))"
    for other in (pickle.loads(pickle.dumps(rule)), copy.copy(rule), copy.deepcopy(rule)):
        assert other == rule
        assert hash(other) == hash(rule)
        assert inspect.signature(other) == inspect.signature(rule)
    assert rule != chain(rules.clip_norm(2.0), plain, chain(rules.stop, torch.neg))


def test_a_model_with_one_pickles():
    model, x = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.ones(2)
    go.override(model, {nn.Tanh: chain(rules.clip_norm(1.0), plain)})
    other = pickle.loads(pickle.dumps(model))
    grads = []
    for each in (model, other):
        leaf = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(each(leaf).sum(), leaf)[0])
    exactly(*grads)


def test_chains_of_chains_are_chains():
    a, b, c = rules.clip_value(0.5), times_x, rules.scale(3.0)
    x, g = noise(4), noise(4, grad=False)
    found = [
        gradient(go.custom_backward(rule)(lambda x: x.tanh()), x, g=g)[0]
        for rule in (chain(a, b, c), chain(chain(a, b), c), chain(a, chain(b, c)))
    ]
    exactly(found[1], found[0])
    exactly(found[2], found[0])
    closely(found[0], g.clamp(-0.5, 0.5) * x.detach() * 3)


# --- in every place ---

CHAINS = {
    "gradient alone": chain(rules.clip_value(0.5), rules.reverse(0.5)),
    "input": chain(rules.clip_value(0.5), lambda grad_output, input: grad_output * input),
    "vjp": chain(rules.clip_value(0.5), plain, rules.scale(2.0)),
}


@pytest.mark.parametrize("rule", CHAINS.values(), ids=CHAINS)
class TestInEveryPlace:
    def oracle(self, x, g, rule, derivative):
        g = g.clamp(-0.5, 0.5)
        return {
            "gradient alone": -0.5 * g,
            "input": g * x,
            "vjp": 2 * g * derivative(x),
        }[next(name for name, known in CHAINS.items() if known is rule)]

    def slope(self, x):
        return 1 - torch.tanh(x) ** 2

    def test_as_a_backward(self, rule):
        x, g = noise(4), noise(4, grad=False)
        found = gradient(go.custom_backward(rule)(torch.tanh), x, g=g)[0]
        closely(found, self.oracle(x.detach(), g, rule, self.slope))

    def test_in_a_registry(self, rule):
        registry = go.Registry("chains")
        registry.register(nn.Tanh)(rule)
        model, x, g = nn.Sequential(nn.Tanh()), noise(4), noise(4, grad=False)
        with go.override(model, registry):
            closely(gradient(model, x, g=g)[0], self.oracle(x.detach(), g, rule, self.slope))

    def test_in_a_graph(self, rule):
        x, g = noise(4), noise(4, grad=False)
        found = gradient(lambda x: go.edit_gradient(x, rule), x, g=g)[0]
        closely(found, self.oracle(x.detach(), g, rule, torch.ones_like))

    def test_under_grad_and_vmap(self, rule):
        x, g = noise(3, 4, grad=False), noise(4, grad=False)
        forward = go.custom_backward(rule)(torch.tanh)
        found = torch.vmap(torch.func.grad(lambda x: (forward(x) * g).sum()))(x)
        closely(found, self.oracle(x, g, rule, self.slope).expand(3, 4))

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
    @pytest.mark.parametrize("place", ["backward", "graph"])
    def test_compiled(self, rule, place):
        torch.compiler.reset()
        x, g = noise(4), noise(4, grad=False)
        if place == "backward":
            forward, derivative = go.custom_backward(rule)(torch.tanh), self.slope
        else:
            forward, derivative = (lambda x: go.edit_gradient(x * 1, rule)), torch.ones_like
        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
        closely(gradient(compiled, x, g=g)[0], self.oracle(x.detach(), g, rule, derivative))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_made_within_compiled_code_it_is_an_error():
    torch.compiler.reset()
    run = torch.compile(
        lambda x: go.edit_gradient(x * 1, chain(rules.reverse(), rules.stop)), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="chain: it must be made outside of the code that is compiled"):
        run(noise(3))


def test_a_link_may_ask_for_an_argument_that_has_the_name_of_the_gradient():
    x = noise(3)
    rule = chain(rules.scale(2.0), lambda g, grad_output: g * grad_output.cos())
    closely(
        gradient(go.custom_backward(rule)(lambda grad_output: grad_output.sin()), x, g=torch.ones_like(x))[0],
        2 * x.cos(),
    )


def test_it_takes_the_gradient_by_name_unless_a_link_asks_for_that_name():
    g, rule = torch.ones(2), chain(rules.scale(2.0), lambda g, x: g * x)
    exactly(rule(grad_output=g, x=3.0), torch.full((2,), 6.0))
    run = torch.compile(lambda g: rule(grad_output=g, x=3.0) + rule(g, x=1.0), backend="eager", fullgraph=True)
    exactly(run(g), torch.full((2,), 8.0))
    with pytest.raises(TypeError, match=r"it must be given a gradient; it was given none"):
        rule(x=3.0)
    taken = chain(rules.scale(2.0), lambda g, grad_output: g * grad_output)
    with pytest.raises(TypeError, match=r"by position, for a link asks for an argument called 'grad_output'"):
        taken(grad_output=g)
    exactly(taken(g, grad_output=3.0), torch.full((2,), 6.0))
    assert str(inspect.signature(taken)) == "(_grad_output, /, *, grad_output)"


def test_of_an_object_without_a_hash():
    class Times(list):
        def __call__(self, grad_output):
            return grad_output * self[0]

    model, x = torch.nn.Sequential(torch.nn.Identity()), torch.ones(2, requires_grad=True)
    with go.override(model, {torch.nn.Identity: chain(Times([3.0]))}):
        exactly(torch.autograd.grad(model(x).sum(), x)[0], torch.full((2,), 3.0))


def test_over_a_structure():
    grads = {"a": torch.tensor([3.0, 0.0]), "b": (torch.tensor([[4.0]]), None)}
    found = chain(rules.clip_norm(1.0), double_in_place_each, rules.reverse())(grads)
    torch.testing.assert_close(found["a"], torch.tensor([-1.2, 0.0]))
    torch.testing.assert_close(found["b"][0], torch.tensor([[-1.6]]))
    assert found["b"][1] is None


def double_in_place_each(grads):
    grads["a"].mul_(2)
    grads["b"][0].mul_(2)
    return grads
