"""`connect_`: a graph that is built already is connected to another."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from oracles import closely, noise
from torch import nn

import gradoverride as go


def square_rule(grad_output, input):
    return grad_output * 2 * input


def leaf_of(x, fn=torch.square):
    """A leaf with the value of `fn` at `x`, without a graph."""
    return fn(x.detach()).requires_grad_()


# --- the gradient arrives ---


def test_gradient_goes_on():
    x = noise(3)
    leaf = leaf_of(x)
    loss = leaf.exp().sum()
    go.connect_(leaf, x, square_rule)
    loss.backward()
    closely(leaf.grad, leaf.detach().exp())
    closely(x.grad, leaf.detach().exp() * 2 * x.detach())


def test_into_a_network_as_one_graph_would():
    x = noise(5, 3)
    first, last = nn.Linear(3, 3).double(), nn.Linear(3, 1).double()
    expected = torch.autograd.grad(last(first(x).square()).sum(), [*first.parameters(), *last.parameters(), x])
    middle = first(x)
    leaf = leaf_of(middle)
    loss = last(leaf).sum()
    go.connect_(leaf, middle, square_rule)
    loss.backward()
    closely([*(p.grad for p in (*first.parameters(), *last.parameters())), x.grad], list(expected))


def test_identity_by_default():
    x = noise(3)
    leaf = leaf_of(x, torch.round)
    loss = leaf.exp().sum()
    go.connect_(leaf, x)
    loss.backward()
    closely(x.grad, leaf.detach().exp())


def test_once_where_an_earlier_pass_has_raised_on_the_way():
    x = noise(3)
    leaf = leaf_of(x)
    loss = leaf.exp().sum()
    go.connect_(leaf, x, square_rule)

    def fails(grad):
        raise KeyError("on the way")

    hook = leaf.register_hook(fails)
    with pytest.raises(KeyError, match="on the way"):
        loss.backward(retain_graph=True)
    hook.remove()
    loss.backward()
    closely(x.grad, leaf.detach().exp() * 2 * x.detach())


def test_several_uses_of_the_leaf_are_one_gradient():
    x = noise(3)
    leaf = leaf_of(x)
    loss = (leaf * 2).sum() + leaf.exp().sum()
    calls = []
    go.connect_(leaf, x, lambda g: (calls.append(1), g.square())[1])
    loss.backward()
    closely(x.grad, (2 + leaf.detach().exp()).square())
    assert len(calls) == 1


def test_several_inputs():
    a, b = noise(3), noise(3)
    leaf = leaf_of(a * b, lambda t: t)
    loss = leaf.exp().sum()
    go.connect_(leaf, {"a": a, "b": b}, lambda g, a, b: {"a": g * b, "b": g * a})
    loss.backward()
    closely([a.grad, b.grad], [leaf.detach().exp() * b.detach(), leaf.detach().exp() * a.detach()])


def test_two_connections_from_one_source_share_its_graph():
    x = noise(3)
    middle = x.exp()
    one, other = leaf_of(middle), leaf_of(middle, torch.sin)
    loss = (one * other).sum()
    go.connect_(one, middle, square_rule)
    go.connect_(other, middle, lambda g, input: g * input.cos())
    loss.backward()
    m = x.detach().exp()
    closely(x.grad, (2 * m * m.sin() + m**2 * m.cos()) * m)


def test_two_connections_of_one_leaf():
    x, z = noise(3), noise(3)
    leaf = leaf_of(x, torch.clone)
    loss = leaf.exp().sum()
    go.connect_(leaf, x)
    go.connect_(leaf, z, lambda g: g * 2)
    loss.backward()
    closely([x.grad, z.grad], [x.detach().exp(), 2 * x.detach().exp()])


@pytest.mark.parametrize("later_first", [False, True])
def test_chain_waits_until_all_has_arrived(later_first):
    """x -> first leaf -> second leaf, and the first leaf is used in the loss besides: its rule is not linear."""
    x = noise(3)
    first = leaf_of(x, torch.clone)
    middle = first * 3
    second = leaf_of(middle, torch.clone)
    loss = (second * 2).sum() + (first * 5).sum()
    calls = []

    def of_first():
        go.connect_(first, x, lambda g: (calls.append(1), g.square())[1])

    if not later_first:
        of_first()
    go.connect_(second, middle)
    if later_first:
        of_first()
    loss.backward()
    closely(x.grad, torch.full_like(x, (2 * 3 + 5) ** 2))
    assert len(calls) == 1
    closely(first.grad, torch.full_like(x, 11))


def test_long_chain():
    x = noise(3)
    source, leaves = x, []
    for _ in range(5):
        leaf = leaf_of(source, torch.clone)
        go.connect_(leaf, source, lambda g: g * 2)
        leaves.append(leaf)
        source = leaf * 1
    (source.sum() + leaves[0].sum()).backward()
    closely(x.grad, torch.full_like(x, 2**5 + 2))


# --- several passes ---


def test_retain_graph_twice_accumulates():
    x = noise(3)
    middle = x.exp()
    leaf = leaf_of(middle)
    loss = leaf.sum()
    go.connect_(leaf, middle, square_rule)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    closely(once, 2 * x.detach().exp() ** 2)
    loss.backward()
    closely(x.grad, 2 * once)
    closely(leaf.grad, torch.full_like(leaf, 2))


def test_two_graphs_on_one_leaf():
    x = noise(3)
    leaf = leaf_of(x, torch.clone)
    go.connect_(leaf, x)
    leaf.exp().sum().backward()
    (leaf * 2).sum().backward()
    closely(x.grad, x.detach().exp() + 2)


def test_create_graph():
    """The second derivative has two parts: of the rule, and of the leaf, whose gradient goes on too."""
    x = noise(3)
    leaf = leaf_of(x)
    loss = leaf.exp().sum()
    go.connect_(leaf, x, square_rule)
    with pytest.warns(UserWarning, match="backward\\(\\) with create_graph"):
        loss.backward(create_graph=True)
    first, value = x.grad, x.detach()
    closely(first, leaf.exp() * 2 * x)
    x.grad = leaf.grad = None  # they hold the graph that holds them
    with pytest.raises(go.GraphError, match=r"would lack the share of the leaf"):
        torch.autograd.grad(first.sum(), x, retain_graph=True)
    first.sum().backward()
    closely(x.grad, (value**2).exp() * (2 + 4 * value**2))


def test_leaves_that_it_leads_to_are_read_anew_in_each_pass():
    """In a training loop: a new graph on the leaf in each step, and an optimizer that writes into the parameter."""
    leaf, parameter = noise(3), nn.Parameter(torch.ones(3, dtype=torch.float64))
    go.connect_(leaf, parameter, lambda g, input: g * input)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    expected = torch.ones(3, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        (leaf * 2).sum().backward()
        closely(parameter.grad, 2 * expected)
        optimizer.step()
        expected = expected - 0.1 * 2 * expected
    parameter.requires_grad_(False)
    parameter.grad = None
    (leaf * 2).sum().backward()
    assert parameter.grad is None


def test_each_pass_runs_under_the_autocast_of_the_connection():
    leaf, x = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    dtypes = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        go.connect_(leaf, x, lambda g: (dtypes.append((g @ g).dtype), g)[1])
    for _ in range(2):
        leaf.sum().backward()
    assert dtypes == [torch.bfloat16, torch.bfloat16]


def test_gradient_with_respect_to_what_is_between_leaves_no_trace():
    x = noise(3)
    leaf = leaf_of(x)
    after = leaf.exp()
    loss = after.square().sum()
    go.connect_(leaf, x, square_rule)
    (of_after,) = torch.autograd.grad(loss, after, retain_graph=True)
    (of_leaf,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    closely(of_after, 2 * after)
    closely(of_leaf, 2 * after**2)
    assert x.grad is None
    assert leaf.grad is None
    loss.backward()
    closely(x.grad, (2 * after**2).detach() * 2 * x.detach())


def test_backward_with_inputs_reaches_those_alone():
    x, z = noise(3), noise(3)
    leaf = leaf_of(x * z, torch.clone)
    loss = leaf.exp().sum()
    go.connect_(leaf, {"x": x, "z": z}, lambda g, x, z: (g * z, g * x))
    loss.backward(inputs=[leaf], retain_graph=True)
    assert x.grad is None
    assert z.grad is None
    leaf.grad = None
    loss.backward(inputs=[leaf, x])
    closely(x.grad, (leaf.exp() * z).detach())
    assert z.grad is None


def test_hooks_of_others_on_the_leaf_are_seen_before_and_after():
    x = noise(3)
    leaf = leaf_of(x, torch.clone)
    loss = (leaf * 3).sum()
    leaf.register_hook(lambda g: g * 2)
    go.connect_(leaf, x)
    leaf.register_hook(lambda g: g + 1)
    loss.backward(retain_graph=True)
    closely(x.grad, torch.full_like(x, 7))
    loss.backward()
    closely(x.grad, torch.full_like(x, 14))


@pytest.mark.parametrize("before", [1e12, float("inf")])
def test_what_was_accumulated_before_has_no_share_in_what_goes_on(before):
    x, leaf = noise(3), noise(3)
    go.connect_(leaf, x)
    leaf.register_hook(lambda g: None)
    leaf.grad = torch.full_like(leaf, before)
    (leaf * 1e-8).sum().backward()
    closely(x.grad, torch.full_like(x, 1e-8))


def dropped(leaf):
    leaf.grad = None


def overwritten(leaf):
    leaf.grad.fill_(7)


@pytest.mark.parametrize("after", [dropped, overwritten])
def test_what_others_do_with_the_accumulated_gradient_does_not_go_on(after):
    x, leaf = noise(3), noise(3)
    leaf.register_post_accumulate_grad_hook(after)
    go.connect_(leaf, x)
    leaf.register_hook(lambda g: g * 3)
    for times in (1, 2):
        (leaf * 2).sum().backward()
        closely(x.grad, torch.full_like(x, 6.0 * times))


def test_after_a_pass_that_failed_on_the_leaf_nothing_is_left_over():
    x, leaf = noise(3), noise(3)
    go.connect_(leaf, x)

    def broken(g):
        raise KeyError("inside")

    loss = (leaf * 2).sum()
    handle = leaf.register_hook(broken)
    with pytest.raises(KeyError, match="inside"):
        loss.backward(retain_graph=True)
    handle.remove()
    assert x.grad is None
    loss.backward()
    closely(x.grad, torch.full_like(x, 2))


def test_hooks_of_the_source_run_once():
    x = noise(3)
    leaf = leaf_of(x, torch.clone)
    loss = (leaf * 3).sum()
    calls = []
    x.register_hook(lambda g: calls.append(g.clone()))
    go.connect_(leaf, x)
    loss.backward()
    assert len(calls) == 1


def test_threads():
    sources = [noise(3) for _ in range(8)]
    leaves = [leaf_of(x) for x in sources]
    losses = [leaf.exp().sum() for leaf in leaves]
    for leaf, x in zip(leaves, sources, strict=True):
        go.connect_(leaf, x, square_rule)
    threads = [threading.Thread(target=loss.backward) for loss in losses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x in sources:
        closely(x.grad, (x**2).exp().detach() * 2 * x.detach())


# --- undoing, memory ---


def test_removed_it_is_as_before():
    x = noise(3)
    leaf = leaf_of(x)
    loss = leaf.sum()
    with go.connect_(leaf, x, square_rule) as handle:
        assert "a leaf of shape (3,)" in repr(handle)
    assert "removed" in repr(handle)
    handle.remove()
    assert leaf._backward_hooks is None
    assert leaf._post_accumulate_grad_hooks is None
    assert x._backward_hooks is None
    loss.backward()
    assert x.grad is None


@pytest.mark.parametrize("attempt", [copy.copy, copy.deepcopy, pickle.dumps])
def test_connection_is_not_copied_in_silence(attempt):
    text = r"^connect_: what connects a leaf of shape \(3,\) can be neither copied nor pickled.* Keep it outside"
    with pytest.raises(go.UnsupportedError, match=text):
        attempt(go.connect_(noise(3), noise(3)))


def test_inputs_are_as_before_when_the_leaf_is_gone():
    x = noise(3)
    go.connect_(leaf_of(x), x, square_rule)
    gc.collect()
    assert x._backward_hooks is None


def test_without_a_handle_it_lives_as_long_as_the_leaf():
    x = noise(3)
    leaf = leaf_of(x)
    go.connect_(leaf, x, square_rule)
    gc.collect()
    leaf.sum().backward()
    closely(x.grad, 2 * x.detach())


def test_nothing_is_kept_without_the_garbage_collector():
    def run():
        x = noise(3)
        middle = x.exp()
        leaf = leaf_of(middle)
        loss = leaf.sum()
        go.connect_(leaf, middle, square_rule)
        loss.backward()
        return weakref.ref(leaf), weakref.ref(middle), weakref.ref(x)

    gc.disable()
    try:
        assert [found() for found in run()] == [None, None, None]
    finally:
        gc.enable()


# --- errors ---


BAD = {
    "no grad": (lambda: noise(3, grad=False), r"a tensor of shape \(3,\) that requires no grad"),
    "no leaf": (lambda: noise(3) * 2, r"a tensor of shape \(3,\) that is no leaf"),
    "no tensor": (lambda: None, "got None"),
}


@pytest.mark.parametrize(("make", "text"), BAD.values(), ids=BAD)
def test_what_is_no_leaf(make, text):
    with pytest.raises(
        go.GraphError, match=rf"connect_: 'leaf' must be a leaf that requires grad.*{text}.*use connect"
    ):
        go.connect_(make(), noise(3))


def test_inputs_that_need_no_gradient():
    with pytest.raises(go.GraphError, match=r"connect_: 'inputs' must hold a tensor that requires grad"):
        go.connect_(noise(3), noise(3, grad=False))


def test_shapes_that_do_not_agree():
    with pytest.raises(go.GraphError, match=r"connect_: .* results have \(3,\) and inputs \(4,\)"):
        go.connect_(noise(3), noise(4))


def test_in_compiled_code_it_is_refused():
    def fn(x, leaf):
        go.connect_(leaf, x, square_rule)
        return leaf.exp().sum()

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"connect_: it connects a graph that is built already.*Use connect there"):
        torch.compile(fn, backend="aot_eager")(noise(3), noise(3))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_graph_that_compiled_code_built():
    x = noise(3)
    leaf = leaf_of(x)
    torch._dynamo.reset()
    loss = torch.compile(lambda leaf: leaf.exp().sum(), backend="aot_eager")(leaf)
    go.connect_(leaf, x, square_rule)
    loss.backward()
    closely(x.grad, leaf.detach().exp() * 2 * x.detach())


def test_round():
    leaf = noise(3)
    with pytest.raises(go.GraphError, match=r"must not start at 'leaf' itself; the tensor of shape \(3,\)"):
        go.connect_(leaf, leaf * 2)
    assert leaf._backward_hooks is None
    other = noise(3)
    go.connect_(other, leaf * 2)
    with pytest.raises(go.GraphError, match=r"must not start at 'leaf' itself"):
        go.connect_(leaf, other * 2)


def test_grad_across_it():
    x = noise(3)
    leaf = leaf_of(x)
    loss = leaf.exp().sum()
    go.connect_(leaf, x, square_rule)
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(loss, x, retain_graph=True)
    with pytest.raises(go.GraphError, match=r"torch.autograd.grad does not go on from the leaf of shape \(3,\)"):
        torch.autograd.grad(loss, [leaf, x], retain_graph=True, allow_unused=True)
    assert x.grad is None
    assert leaf.grad is None


@pytest.mark.parametrize("through", ["leaf", "middle"])
def test_passes_that_would_lack_the_share_of_the_leaf_are_refused(through):
    x = noise(3)
    source = x if through == "leaf" else x.exp()
    leaf = leaf_of(source)
    loss = leaf.exp().sum() + source.sum()
    other = (source * 2).sum()
    text = (
        r"is not asked for the leaf of shape \(3,\), so .* 'inputs' or behind them, of shape \(3,\), would lack the "
        r"share of the leaf"
    )
    with go.connect_(leaf, source, square_rule):
        with pytest.raises(go.GraphError, match=rf"torch.autograd.grad {text}"):
            torch.autograd.grad(loss, x, retain_graph=True)
        with pytest.raises(go.GraphError, match=rf"backward\(inputs=...\) {text}"):
            loss.backward(inputs=[x], retain_graph=True)
        assert x.grad is None
        before = torch.autograd.grad(other, x, retain_graph=True)[0]
        loss.backward(inputs=[x, leaf], retain_graph=True)
    closely(before, torch.autograd.grad(other, x, retain_graph=True)[0])
    inner = torch.autograd.grad(source.sum(), x, retain_graph=True)[0] if through == "middle" else torch.ones(3)
    closely(x.grad, inner * (1 + leaf.detach().exp() * 2 * source.detach()))
    closely(torch.autograd.grad(loss, x)[0], inner * torch.ones_like(x))  # it is removed, so there is no gap


def test_leaves_behind_the_inputs_are_watched_too():
    x, z = noise(3), noise(3)
    middle = x * z
    leaf = leaf_of(middle)
    loss = leaf.exp().sum() + (x * 5).sum()
    handle = go.connect_(leaf, middle, square_rule)
    with pytest.raises(go.GraphError, match=r"torch.autograd.grad is not asked for the leaf .* behind them"):
        torch.autograd.grad(loss, x, retain_graph=True)
    with pytest.raises(go.GraphError, match=r"backward\(inputs=...\) is not asked for the leaf"):
        loss.backward(inputs=[x], retain_graph=True)
    loss.backward(retain_graph=True)
    closely(x.grad, 5 + (leaf.exp() * 2 * middle * z).detach())
    handle.remove()
    assert x._backward_hooks is z._backward_hooks is None


def test_wrong_shape_reaches_no_input():
    x = noise(3)
    leaf = leaf_of(x)
    loss = leaf.exp().sum()
    go.connect_(leaf, x, lambda g: g[:2])
    with pytest.raises(go.RuleResultError, match=r"must return a gradient of shape \(3,\) for 'input'"):
        loss.backward(retain_graph=True)
    assert x.grad is None


def test_pass_after_a_failed_one():
    x = noise(3)
    leaf = leaf_of(x)
    loss = leaf.exp().sum()
    answers = iter([lambda g: g[:2], lambda g: g])
    go.connect_(leaf, x, lambda g: next(answers)(g))
    with pytest.raises(go.RuleResultError):
        loss.backward(retain_graph=True)
    loss.backward()
    closely(x.grad, leaf.detach().exp())


def test_pass_after_one_that_failed_on_its_way():
    def fails(_):
        raise RuntimeError("on the way")

    x = noise(3)
    first, second = leaf_of(x), leaf_of(x)
    answers = iter([fails, lambda g: g])
    go.connect_(first, x, lambda g: g)
    go.connect_(second, first * 2, lambda g: next(answers)(g))
    loss = (second * 3).sum()
    with pytest.raises(RuntimeError, match="on the way"):
        loss.backward(retain_graph=True)
    assert x.grad is None
    (first * 5).sum().backward()
    closely(x.grad, torch.full_like(x, 5))
    loss.backward()
    closely(x.grad, torch.full_like(x, 11))


def test_shared_graph_must_be_kept():
    def build():
        x = noise(3)
        middle = x.exp()
        leaf = leaf_of(middle)
        go.connect_(leaf, middle, square_rule)
        return x, (leaf * middle).sum()

    _, loss = build()
    with pytest.raises(
        go.GraphError, match=r"has been freed, by an earlier .* or by the one that runs now.*retain_graph=True"
    ):
        loss.backward()
    x, loss = build()
    loss.backward(retain_graph=True)
    closely(x.grad, 3 * x.detach().exp() ** 3)


def test_errors_say_connect_():
    x, leaf = noise(3), noise(3)

    def broken(g):
        raise KeyError("inside")

    go.connect_(leaf, x, broken)
    with pytest.raises(KeyError) as error:
        leaf.sum().backward()
    assert error.value.__notes__[0].endswith("of 'connect_'")
    with pytest.raises(
        go.RuleSignatureError, match=r"asks for 'nope', which does not exist\. 'connect_' offers 'input'"
    ):
        go.connect_(leaf, x, lambda g, nope: g)
    with pytest.raises(go.GraphError, match=r"connect_: 'inputs' must hold .*; got a dict with the keys \(none\)"):
        go.connect_(leaf, {})
