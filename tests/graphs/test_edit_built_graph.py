"""`edit_gradient_` and `find_nodes`: gradients of graphs that are already built."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from oracles import closely, exactly, noise, right_or_refused
from torch import nn

import gradoverride as go


def grad(y, *inputs, **options):
    found = torch.autograd.grad(y, inputs, **options)
    return found[0] if len(inputs) == 1 else found


def double(grad_output):
    return grad_output * 2


class Chain:
    """x -> operation -> more operations -> result, and the gradients in it by hand."""

    def __init__(self):
        self.x = noise(3, 4)
        self.middle = self.x.sin()
        self.result = self.middle.exp().sum()
        self.grad_of_more_operations = self.middle.detach().exp()
        self.of_operation = self.x.detach().cos()


# --- a tensor ---


def test_gradient_of_more_operations_is_changed_before_it_reaches_operation():
    chain = Chain()
    go.edit_gradient_(chain.middle, lambda grad_of_more_operations: grad_of_more_operations.clamp(max=1))
    chain.result.backward()
    closely(chain.x.grad, chain.grad_of_more_operations.clamp(max=1) * chain.of_operation)


def test_grad_with_the_tensor_itself_among_the_inputs():
    chain = Chain()
    go.edit_gradient_(chain.middle, double)
    of_middle, of_x = grad(chain.result, chain.middle, chain.x)
    closely(of_middle, chain.grad_of_more_operations * 2)
    closely(of_x, chain.grad_of_more_operations * 2 * chain.of_operation)


def test_value_by_any_name():
    for rule in (lambda g, x: g * x, lambda g, input: g * input, lambda g, output: g * output):
        chain = Chain()
        go.edit_gradient_(chain.middle, rule)
        closely(grad(chain.result, chain.x), chain.grad_of_more_operations * chain.middle * chain.of_operation)


def test_leaf_before_and_after_its_graphs():
    leaf = noise(3)
    handle = go.edit_gradient_(leaf, lambda g, x: g * x)
    for _ in range(2):
        leaf.grad = None
        (leaf * 3).sum().backward()
        closely(leaf.grad, leaf.detach() * 3)
    closely(grad((leaf * 3).sum(), leaf), leaf.detach() * 3)
    handle.remove()
    closely(grad((leaf * 3).sum(), leaf), torch.full_like(leaf, 3))


def test_value_of_a_parameter_is_that_of_the_pass_while_an_optimizer_writes_into_it():
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    go.edit_gradient_(weight, lambda g, x: g + x)  # weight decay
    optimizer = torch.optim.SGD([weight], lr=0.5)
    expected = weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        (weight * 3).sum().backward()
        optimizer.step()
        expected -= 0.5 * (3 + expected)
    closely(weight.detach(), expected)


def test_second_derivative_with_the_value_of_a_leaf():
    x = noise(3)
    go.edit_gradient_(x, lambda g, x: g * x)
    first = grad(x.exp().sum(), x, create_graph=True)
    closely(first, x.exp() * x)
    closely(grad(first.sum(), x), x.exp() * (x + 1) * x)


def test_leaf_is_edited_once_for_all_uses_and_then_accumulated():
    leaf = noise(3)
    loss = (leaf * 3).sum() + (leaf * 4).sum()
    go.edit_gradient_(leaf, lambda g: g.square())
    loss.backward(retain_graph=True)
    closely(leaf.grad, torch.full_like(leaf, 49))
    loss.backward()
    closely(leaf.grad, torch.full_like(leaf, 98))


def test_parameter_of_a_module():
    layer = nn.Linear(3, 2).double()
    loss = layer(noise(4, 3)).square().sum()
    plain = grad(loss, layer.weight, retain_graph=True)
    with go.edit_gradient_(layer.weight, lambda g: g.clamp(-0.1, 0.1)):
        loss.backward()
    closely(layer.weight.grad, plain.clamp(-0.1, 0.1))


def test_several_edits_follow_in_the_order_they_were_made():
    chain = Chain()
    go.edit_gradient_(chain.middle, lambda g: g + 1)
    go.edit_gradient_(chain.middle, double)
    closely(grad(chain.result, chain.middle), (chain.grad_of_more_operations + 1) * 2)


@pytest.mark.parametrize(("made", "run"), [("TNT", "TTN"), ("NTT", "NTT"), ("NTN", "NTN"), ("TNN", "TNN")])
def test_edits_of_a_tensor_come_at_the_place_of_the_first_among_those_of_its_node(made, run):
    chain, ran = Chain(), []

    def noted(kind):
        def rule(g):
            ran.append(kind)
            return g

        return rule

    for kind in made:
        go.edit_gradient_(chain.middle if kind == "T" else chain.middle.grad_fn, noted(kind))
    chain.result.backward()
    assert "".join(ran) == run


def test_none_stops_the_gradient():
    chain = Chain()
    go.edit_gradient_(chain.middle, lambda g: None)
    exactly(grad(chain.result, chain.x), torch.zeros(3, 4, dtype=torch.float64))


def second_derivatives(edit):
    torch.manual_seed(0)
    x = noise(4)
    middle, result = edit(x.sin())
    first = grad(result(middle), x, create_graph=True)
    return first, grad(first.square().sum(), x)


def after(rule):
    def edit(middle):
        def result(middle):
            loss = middle.exp().sum()
            go.edit_gradient_(middle, rule)
            return loss

        return middle, result

    return edit


def test_second_derivative_as_by_edit_gradient():
    before = second_derivatives(lambda middle: (go.edit_gradient(middle, double), lambda m: m.exp().sum()))
    closely(second_derivatives(after(double)), before)


def test_second_derivative_with_the_value_as_by_a_hook():
    def by_hand(middle):
        middle.register_hook(lambda g: g * middle)
        return middle, lambda m: m.exp().sum()

    closely(second_derivatives(after(lambda g, x: g * x)), second_derivatives(by_hand))


def test_second_derivative_through_a_value_that_is_gone_is_refused():
    x = noise(4)
    middle = x.sin()
    result = middle.exp().sum()
    go.edit_gradient_(middle, lambda g, x: g * x)
    expected = grad(result, x, retain_graph=True)
    del middle
    gc.collect()
    right_or_refused(lambda: grad(result, x, create_graph=True), expected, "Keep a reference to it")
    closely(grad(result, x), expected)


def test_retain_graph_twice():
    chain = Chain()
    go.edit_gradient_(chain.middle, double)
    expected = chain.grad_of_more_operations * 2 * chain.of_operation
    closely(grad(chain.result, chain.x, retain_graph=True), expected)
    closely(grad(chain.result, chain.x), expected)


def test_edit_between_two_passes():
    chain = Chain()
    plain = grad(chain.result, chain.x, retain_graph=True)
    with go.edit_gradient_(chain.middle, double):
        closely(grad(chain.result, chain.x, retain_graph=True), plain * 2)
    closely(grad(chain.result, chain.x), plain)


def test_part_of_a_split():
    x = noise(6)
    left, right = (x * 2).chunk(2)
    loss = (left * right).sum()
    go.edit_gradient_(right, lambda g: g * 10)
    closely(grad(loss, x), torch.cat([right * 2, left * 20]))


def test_view_and_what_it_is_of():
    x = noise(2, 3)
    base = x * 1
    view = base[0]
    loss = view.exp().sum() + base.sum()
    go.edit_gradient_(view, double)
    expected = torch.ones_like(x)
    expected[0] += 2 * x[0].exp()
    closely(grad(loss, x), expected)


# --- a node ---


def test_node_of_the_question():
    chain = Chain()
    (node,) = go.find_nodes(chain.result, "Sin*")
    go.edit_gradient_(node, double)
    closely(grad(chain.result, chain.x), chain.grad_of_more_operations * 2 * chain.of_operation)


def test_node_for_grad_with_its_result_among_the_inputs():
    chain = Chain()
    go.edit_gradient_(chain.middle.grad_fn, double)
    of_middle, of_x = grad(chain.result, chain.middle, chain.x, retain_graph=True)
    closely(of_middle, chain.grad_of_more_operations * 2)
    closely(of_x, chain.grad_of_more_operations * 2 * chain.of_operation)
    closely(grad(chain.result, chain.middle), chain.grad_of_more_operations * 2)


def test_grad_with_several_edited_tensors_among_the_inputs():
    x = noise(3)
    first = x.sin()
    second = first.exp()
    loss = second.square().sum()
    go.edit_gradient_(first, lambda g: g + 1)
    go.edit_gradient_(first, double)
    go.edit_gradient_(second, lambda g, x: g * x)
    of_second = 2 * second * second
    of_first = (of_second * second + 1) * 2
    closely(grad(loss, second, x, first, retain_graph=True), (of_second, of_first * x.cos(), of_first))
    closely(grad(loss, second, first, retain_graph=True), (of_second, of_first))
    closely(grad(loss, first), of_first)


def test_grad_that_torch_would_return_unedited_is_refused():
    text = r"asked for the edited gradient of a tensor of shape \(3,\) and for others behind it.*a call of its own"
    x = noise(3)
    middle, other = x.sin(), x.exp()
    loss = (middle + other).sum()  # one tensor is the gradient of both
    go.edit_gradient_(middle, double)
    with pytest.raises(go.UnsupportedError, match=text):
        grad(loss, middle, other, x, retain_graph=True)
    with pytest.raises(go.UnsupportedError, match=text):
        grad((middle * other).sum(), middle, x, create_graph=True)
    of_middle, of_other = grad(loss, middle, other, retain_graph=True)
    closely((of_middle, of_other), (torch.full_like(x, 2), torch.ones_like(x)))
    closely(grad((middle * other).sum(), middle, create_graph=True), 2 * other)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_edit_within_a_transform_is_a_part_of_what_it_differentiates(transform):
    def loss(x):
        middle = x * 2
        go.edit_gradient_(middle, lambda g: g * 10)
        return (middle * middle).sum()

    x = noise(3, grad=False)
    closely(transform(loss)(x), 80 * (torch.eye(3, dtype=x.dtype) if transform is torch.func.hessian else x))


def test_batched_gradients_that_torch_would_return_unedited_are_refused():
    chain = Chain()
    go.edit_gradient_(chain.middle, double)
    result, grads = chain.middle.exp().sum(1), torch.eye(3, dtype=torch.float64)
    with pytest.raises(go.UnsupportedError, match=r"asked for the edited gradient of a tensor .* in a call of its own"):
        grad(result, chain.middle, chain.x, grad_outputs=grads, is_grads_batched=True, retain_graph=True)
    (found,) = torch.autograd.grad(result, [chain.x], grads, is_grads_batched=True)
    closely(found.sum(0), chain.grad_of_more_operations * 2 * chain.of_operation)


def test_backward_with_inputs():
    chain = Chain()
    go.edit_gradient_(chain.middle, double)
    chain.result.backward(inputs=[chain.middle, chain.x])
    closely(chain.middle.grad, chain.grad_of_more_operations * 2)
    closely(chain.x.grad, chain.grad_of_more_operations * 2 * chain.of_operation)


def test_retained_grad_is_the_edited_one():
    chain = Chain()
    chain.middle.retain_grad()
    go.edit_gradient_(chain.middle, double)
    chain.result.backward()
    closely(chain.middle.grad, chain.grad_of_more_operations * 2)


def test_node_whose_result_nobody_holds():
    x = noise(4)
    loss = (x.sin() * 2).exp().sum()
    (node,) = go.find_nodes(loss, "Sin*")
    handle = go.edit_gradient_(node, lambda g: g * 3)
    del node
    gc.collect()
    closely(grad(loss, x, retain_graph=True), 3 * (x.sin() * 2).exp() * 2 * x.cos())
    handle.remove()
    closely(grad(loss, x), (x.sin() * 2).exp() * 2 * x.cos())


def test_accumulating_node_is_its_leaf():
    leaf = noise(3)
    (node,) = go.find_nodes((leaf * 3).sum(), "AccumulateGrad")
    go.edit_gradient_(node, double)
    del node
    gc.collect()
    (leaf * 3).sum().backward()
    closely(leaf.grad, torch.full_like(leaf, 6))


class Two(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1, x * 2

    @staticmethod
    def backward(ctx, left, right):
        return left + 2 * right


def test_node_of_a_function_that_keeps_a_tensor_under_the_name_of_a_leaf_is_edited_itself():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.variable = kept
            return x * 2

        @staticmethod
        def backward(ctx, grad_output):
            return grad_output * 2

    kept, x = noise(3), noise(3)
    result = Double.apply(x)
    go.edit_gradient_(result.grad_fn, lambda grad_output: grad_output * 5)
    result.sum().backward()
    exactly(x.grad, torch.full_like(x, 10.0))


def test_node_with_several_results():
    x = noise(3)
    left, right = Two.apply(x * 1)
    loss = left.sin().sum() + right.exp().sum()
    go.edit_gradient_(left.grad_fn, lambda g: (g[1], g[0] * 3))
    of_left, of_right, of_x = grad(loss, left, right, x)
    closely(of_left, right.exp())
    closely(of_right, left.cos() * 3)
    closely(of_x, right.exp() + 2 * left.cos() * 3)


def test_node_with_several_results_one_without_a_gradient():
    x = noise(6)
    left, right = (x * 1).chunk(2)
    seen = []

    def rule(g):
        seen.extend(part.clone() for part in g)
        return tuple(part * 2 for part in g)

    go.edit_gradient_(left.grad_fn, rule)
    closely(grad(right.sum(), x), torch.tensor([0.0, 0, 0, 2, 2, 2], dtype=torch.float64))
    exactly(seen, [torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)])


def test_gradient_for_a_result_that_has_none_is_refused():
    x = noise(6)
    left, right = (x * 1).chunk(2)
    go.edit_gradient_(left.grad_fn, lambda g: (g[1], g[0]))
    with pytest.raises(go.GraphError, match=r"gives a gradient to result 0 of the node, which has none"):
        grad(right.sum(), x)


def test_edit_stays_with_what_was_before_a_write_in_place():
    x = noise(3)
    middle = x * 1
    go.edit_gradient_(middle, lambda g: g.square())
    middle.mul_(3)
    closely(grad(middle.sum(), x), torch.full_like(x, 9))


def test_view_is_edited_after_it_was_written_into():
    x = noise(4)
    base = x * 1
    view = base[:2]
    view.mul_(2)
    go.edit_gradient_(view, lambda g: g * 10)
    closely(grad(view.sum(), x), torch.tensor([20.0, 20, 0, 0]).double())


def test_in_compiled_code_it_is_refused():
    """A graph break would not do: `middle` and `loss` would be two results of one node."""

    def fn(x):
        middle = x.sin()
        loss = middle.exp().sum()
        go.edit_gradient_(middle, double)
        return loss

    for fullgraph in (True, False):
        torch._dynamo.reset()
        compiled = torch.compile(fn, backend="aot_eager", fullgraph=fullgraph)
        with pytest.raises(
            Exception, match=r"edit_gradient_: what compiled code builds is one node.*Use edit_gradient"
        ):
            compiled(noise(3))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_results_of_compiled_code():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: (x.sin(), x.cos()), backend="aot_eager")
    x = noise(3)
    left, right = compiled(x)
    go.edit_gradient_(left, double)
    closely(grad((left * right).sum(), x, retain_graph=True), 2 * x.cos() ** 2 - x.sin() ** 2)
    closely(grad(right.sum(), x), -x.sin())


@pytest.mark.parametrize("split", [lambda x: Two.apply(x * 1), lambda x: (x * 1).chunk(2)], ids=["function", "chunk"])
def test_result_that_has_no_gradient_beside_one_that_has(split):
    x = noise(4)
    left, right = split(x)
    expected = grad(right.sum(), x, retain_graph=True)
    go.edit_gradient_(left, lambda g, x: g * x)
    closely(grad(right.sum(), x), expected)


def test_node_of_this_library():
    @go.custom_backward(lambda g, x: g * x)
    def same(x):
        return x * 1

    x = noise(3)
    y = same(x)
    go.edit_gradient_(y.grad_fn, double)
    closely(grad(y.sum(), x), 2 * x)


@pytest.mark.parametrize("what", ["tensor", "leaf", "node", "node with several results"])
def test_rule_runs_under_the_autocast_in_which_the_edit_was_made(what):
    weight, dtypes = torch.randn(4, 4), []

    def look(g):
        first = g[0] if isinstance(g, tuple) else g
        dtypes.append((first.float() @ weight).dtype)
        return g

    def run(within, after):
        x = torch.randn(4, 4, requires_grad=True)
        middle = x * 1
        parts = middle.split([4, 0])
        places = {"tensor": middle, "leaf": x, "node": middle.grad_fn, "node with several results": parts[0].grad_fn}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
            go.edit_gradient_(places[what], look)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=after):
            torch.cat(parts).sum().backward()

    run(within=True, after=False)
    run(within=False, after=True)
    assert dtypes == [torch.bfloat16, torch.float32]


# --- undoing ---


def test_undo_is_exact_for_a_leaf():
    leaf = noise(3)
    assert leaf._backward_hooks is None
    first, second = go.edit_gradient_(leaf, double), go.edit_gradient_(leaf, double)
    first.remove()
    closely(grad(leaf.sum(), leaf), torch.full_like(leaf, 2))
    second.remove()
    assert leaf._backward_hooks is None
    closely(grad(leaf.sum(), leaf), torch.ones_like(leaf))


def test_undo_leaves_the_hooks_of_others():
    leaf = noise(3)
    handle = go.edit_gradient_(leaf, double)
    other = leaf.register_hook(lambda g: g + 5)
    handle.remove()
    closely(grad(leaf.sum(), leaf), torch.full_like(leaf, 6))
    other.remove()


def test_removing_twice_and_in_any_order():
    chain = Chain()
    plain = grad(chain.result, chain.x, retain_graph=True)
    handles = [go.edit_gradient_(chain.middle, double), go.edit_gradient_(chain.middle.grad_fn, double)]
    closely(grad(chain.result, chain.x, retain_graph=True), plain * 4)
    for handle in handles:
        handle.remove()
        handle.remove()
        assert "removed" in repr(handle)
    closely(grad(chain.result, chain.x), plain)


def rows(x):
    """A node with several results, and the loss."""
    parts = x.unbind()
    return parts[0].grad_fn, sum(part.sum() * (index + 1) for index, part in enumerate(parts))


EDITED = {
    "a tensor": lambda: (lambda chain: (chain.middle, chain.result, chain.x))(Chain()),
    "a leaf": lambda: (lambda chain: (chain.x, chain.result, chain.x))(Chain()),
    "a node": lambda: (lambda chain: (chain.middle.grad_fn, chain.result, chain.x))(Chain()),
    "a node with several results": lambda: (lambda x: (*rows(x), x))(noise(3, 4)),
}


@pytest.mark.parametrize("kind", EDITED)
@pytest.mark.parametrize("which", ["itself", "the next", "both"])
def test_removed_by_a_rule_while_a_pass_runs(kind, which):
    edited, result, x = EDITED[kind]()
    plain = grad(result, x, retain_graph=True)

    def scaled(grad_output, factor):
        return tuple(scaled(one, factor) for one in grad_output) if type(grad_output) is tuple else grad_output * factor

    def removing(grad_output):
        for handle in {"itself": handles[:1], "the next": handles[1:], "both": handles}[which]:
            handle.remove()
        return scaled(grad_output, 2)

    handles = [
        go.edit_gradient_(edited, removing),
        go.edit_gradient_(edited, lambda grad_output: scaled(grad_output, 5)),
    ]
    closely(grad(result, x, retain_graph=True), plain * (10 if which == "itself" else 2))
    closely(grad(result, x), plain * {"itself": 5, "the next": 2, "both": 1}[which])


def test_removed_by_a_rule_that_raises_is_gone():
    x = noise(3, 4)
    node, result = rows(x)
    plain = grad(result, x, retain_graph=True)
    before = dict(node.metadata)

    def failing(grad_output):
        handle.remove()
        raise KeyError

    handle = go.edit_gradient_(node, failing)
    with pytest.raises(KeyError):
        grad(result, x, retain_graph=True)
    assert dict(node.metadata) == before
    closely(grad(result, x), plain)


def test_undone_by_an_exception():
    chain = Chain()
    plain = grad(chain.result, chain.x, retain_graph=True)
    with pytest.raises(KeyError), go.edit_gradient_(chain.middle, double):
        raise KeyError
    closely(grad(chain.result, chain.x), plain)


@pytest.mark.parametrize("attempt", [copy.copy, copy.deepcopy, pickle.dumps])
def test_edit_is_not_copied_in_silence(attempt):
    layer = nn.Linear(2, 3)
    layer.edit = go.edit_gradient_(layer.weight, double)
    text = r"^edit_gradient_: what edits a tensor of shape \(3, 2\) can be neither copied nor pickled.* Keep it outside"
    with pytest.raises(go.UnsupportedError, match=text):
        attempt(layer.edit)
    if attempt is not copy.copy:
        with pytest.raises(go.UnsupportedError, match=text):
            attempt(layer)


def test_edit_keeps_neither_tensor_nor_graph_alive():
    def build():
        middle = noise(3).sin()
        saved = noise(3).square()  # kept by the graph alone
        loss = (middle * saved).sum()
        return go.edit_gradient_(middle, lambda g, x: g * x), weakref.ref(middle), weakref.ref(saved), loss

    gc.disable()
    try:
        handle, middle, saved, loss = build()
        assert saved() is not None
        del loss
        assert middle() is None
        assert saved() is None
    finally:
        gc.enable()
    handle.remove()


EDITABLE = {
    "tensor": lambda middle: middle,
    "node": lambda middle: middle.grad_fn,
    "node of several results": lambda middle: middle.unsqueeze(0).unbind()[0].grad_fn,
}


@pytest.mark.parametrize("of", EDITABLE.values(), ids=EDITABLE)
def test_what_a_rule_holds_goes_with_the_graph(of):
    def run():
        middle, held = noise(3).sin(), torch.ones(3, dtype=torch.float64)
        go.edit_gradient_(of(middle), lambda g: each_times(g, held))
        middle.sum().backward()
        return weakref.ref(held)

    def each_times(g, factor):
        return tuple(part * factor for part in g) if isinstance(g, tuple) else g * factor

    gc.disable()
    try:
        assert run()() is None
    finally:
        gc.enable()


def test_threads():
    chain = Chain()
    plain = grad(chain.result, chain.x, retain_graph=True)
    halves = [chain.middle * 1, chain.middle * 1]
    losses = [half.exp().sum() for half in halves]
    _left, _ = torch.stack(halves).unbind()
    go.edit_gradient_(halves[0].grad_fn, double)
    found = [None, None]

    def run(index):
        found[index] = [grad(losses[index], chain.x, retain_graph=True) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(*found, strict=True):
        closely(one, plain * 2)
        closely(other, plain)


# --- finding nodes ---


def names(nodes):
    return [node.name().rpartition("::")[2] for node in nodes]


def test_find_by_glob_from_the_root_on():
    x = noise(3)
    loss = ((x * 2).sin() * 3).sum()
    assert names(go.find_nodes(loss, "Mul*")) == ["MulBackward0", "MulBackward0"]
    assert names(go.find_nodes(loss, "*")) == [
        *("SumBackward0", "MulBackward0", "SinBackward0", "MulBackward0", "AccumulateGrad")
    ]
    assert go.find_nodes(loss, "mul*") == []
    first, second = go.find_nodes(loss, "Mul*")
    assert first.next_functions[0][0] is go.find_nodes(loss, "Sin*")[0]
    assert second.next_functions[0][0].variable is x


def test_find_by_tensor():
    x = noise(3)
    middle = x.sin()
    loss = middle.exp().sum()
    assert go.find_nodes(loss, middle) == [middle.grad_fn]
    assert names(go.find_nodes(loss, x)) == ["AccumulateGrad"]
    assert go.find_nodes(loss, noise(3)) == []
    assert go.find_nodes(loss, noise(3, grad=False)) == []


def test_find_by_predicate():
    x = noise(3)
    loss = x.sin().exp().sum()
    found = go.find_nodes(loss, lambda node: "Exp" in node.name() or hasattr(node, "variable"))
    assert names(found) == ["ExpBackward0", "AccumulateGrad"]


def test_find_from_a_node_and_from_a_leaf():
    x = noise(3)
    loss = x.sin().exp().sum()
    assert names(go.find_nodes(loss.grad_fn.next_functions[0][0], "*")) == [
        *("ExpBackward0", "SinBackward0", "AccumulateGrad")
    ]
    assert names(go.find_nodes(x, "*")) == ["AccumulateGrad"]


def test_shared_node_is_listed_once():
    x = noise(3)
    middle = x.sin()
    loss = (middle * middle.exp()).sum()
    assert names(go.find_nodes(loss, "Sin*")) == ["SinBackward0"]


def test_find_in_a_deep_graph():
    x = noise(3)
    y = x
    for _ in range(20_000):
        y = y + 1
    assert len(go.find_nodes(y, "Add*")) == 20_000


# --- errors ---


def test_tensor_that_needs_no_gradient():
    with pytest.raises(
        go.GraphError, match=r"'tensor_or_node' must require grad.* a tensor of shape \(3,\) that does not"
    ):
        go.edit_gradient_(noise(3, grad=False), double)
    with pytest.raises(go.GraphError, match=r"of torch.int64, which has no gradient"):
        go.edit_gradient_(torch.arange(3), double)


@pytest.mark.parametrize("value", [None, 3, "Mul*", [1]])
def test_neither_tensor_nor_node(value):
    with pytest.raises(go.GraphError, match=r"'tensor_or_node' must be a tensor that requires grad, or a node"):
        go.edit_gradient_(value, double)


@pytest.mark.parametrize("of", [lambda t: t, lambda t: t.grad_fn], ids=["tensor", "node"])
def test_freed_graph(of):
    x = noise(3)
    middle = x.exp()
    middle.sum().backward()
    with pytest.raises(go.GraphError, match=r"graph of the node 'ExpBackward0' has been freed.*retain_graph=True"):
        go.edit_gradient_(of(middle), double)
    left, _ = Saving.apply(x)
    left.sum().backward()
    with pytest.raises(go.GraphError, match=r"has been freed"):
        go.edit_gradient_(of(left), double)


class Saving(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 1, x * 2

    @staticmethod
    def backward(ctx, left, right):
        return left + 2 * right


def test_names_that_there_are_not():
    chain = Chain()
    with pytest.raises(go.RuleSignatureError, match=r"asks for 'needs', which edit_gradient_ does not have"):
        go.edit_gradient_(chain.middle, lambda g, needs: g)
    with pytest.raises(go.RuleSignatureError, match=r"asks for 'x', and a node keeps no value of its result"):
        go.edit_gradient_(chain.middle.grad_fn, lambda g, x: g)
    with pytest.raises(go.RuleSignatureError, match=r"asks for 'weight', .* always there are 'input', 'output'\."):
        go.edit_gradient_(chain.middle, lambda g, weight: g)


def test_wrong_shape_pollutes_no_grad():
    chain = Chain()
    handle = go.edit_gradient_(chain.middle, lambda g: g[:2])
    with pytest.raises(go.RuleResultError, match=r"of 'edit_gradient_' must return a gradient of shape \(3, 4\)"):
        chain.result.backward(retain_graph=True)
    assert chain.x.grad is None
    handle.remove()
    chain.result.backward()
    closely(chain.x.grad, chain.grad_of_more_operations * chain.of_operation)


class Twice:
    def __mul__(self, tensor):
        return tensor.mul_(2)


twice = Twice()


def test_write_that_the_code_does_not_show_spares_the_gradients_of_others():
    x = noise(4)
    parts = (x * 1).chunk(2)
    given = [torch.ones_like(part) for part in parts]
    go.edit_gradient_(parts[0].grad_fn, lambda grads: (twice * grads[0], grads[1]))
    torch.autograd.backward(parts, given)
    assert x.grad.tolist() == [2, 2, 1, 1]
    assert all((grad == 1).all() for grad in given)


def test_wrong_count_of_a_node_with_several_results():
    x = noise(6)
    left, right = (x * 1).chunk(2)
    go.edit_gradient_(left.grad_fn, lambda g: g[0])
    with pytest.raises(go.RuleResultError, match=r"mirrors the structure of 'result', \(\*, \*\)"):
        grad((left * right).sum(), x)


def test_error_in_a_rule_of_a_node_with_several_results_says_which():
    def broken(g):
        raise KeyError("inside")

    x = noise(6)
    left, right = (x * 1).chunk(2)
    go.edit_gradient_(left.grad_fn, broken)
    with pytest.raises(KeyError, match="inside") as error:
        grad((left * right).sum(), x)
    assert "in the rule 'broken'" in error.value.__notes__[0]


def test_value_that_was_written_into():
    x = noise(3)
    middle = x * 1
    loss = (middle * 2).sum()
    go.edit_gradient_(middle, lambda g, x: g * x)
    with torch.no_grad():
        middle.mul_(2)
    with pytest.raises(go.GraphError, match=r"has been written into in place, and the rule asks for its value"):
        grad(loss, x)


def test_roots_without_a_graph():
    with pytest.raises(
        go.GraphError, match=r"'root' must have a graph, or be a node of one; got a tensor of shape \(3,\)"
    ):
        go.find_nodes(noise(3, grad=False), "*")
    with pytest.raises(go.GraphError, match=r"'root' must be a tensor with a graph, or a node of one; got None"):
        go.find_nodes(None, "*")
    with pytest.raises(
        go.GraphError, match=r"'pattern' must be a glob over names of nodes, a tensor or a predicate; got 3"
    ):
        go.find_nodes(noise(3), 3)


@pytest.mark.parametrize(
    ("pattern", "got"),
    [(nn.ReLU, "the class 'ReLU'"), (nn.Identity(), "an Identity"), ((noise(3) * 2).grad_fn, "a MulBackward0")],
    ids=["class", "module", "node"],
)
def test_what_can_be_called_and_is_no_predicate(pattern, got):
    with pytest.raises(go.GraphError) as caught:
        go.find_nodes(noise(3) * 2, pattern)
    assert str(caught.value) == (
        f"find_nodes: 'pattern' must be a glob over names of nodes, a tensor or a predicate; got {got}"
    )
