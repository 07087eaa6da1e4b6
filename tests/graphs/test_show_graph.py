"""`show_graph`: the backward graph, drawn."""

import gc
import shutil
import subprocess
import time
import weakref
import xml.etree.ElementTree as ET

import pytest
import torch
from oracles import noise
from torch import nn

import gradoverride as go

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")


def norm_backward(grad_output, x):
    return grad_output * x


@go.custom_backward(norm_backward)
def norm(x):
    return x * 1


def clip(grad_output):
    return grad_output.clamp(-1, 1)


def double(grad_output):
    return grad_output * 2


def by_hand(root):
    """The graph walked without this library: how often each edge is there, by names of nodes."""
    found, left, seen = [], [root.grad_fn], set()
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is not None:
                found.append((node.name(), following.name()))
                left.append(following)
    return len(seen), sorted(found)


def names(drawing):
    return [node.name for node in drawing.nodes]


def edges(drawing):
    return [(drawing.nodes[edge.start].name, drawing.nodes[edge.end].name, edge.label) for edge in drawing.edges]


def node_of(drawing, name):
    (node,) = [node for node in drawing.nodes if node.name == name]
    return node


# --- what is in it ---


def test_nodes_and_edges_are_those_of_the_graph():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    loss = model(torch.randn(2, 5, 8)).square().sum()
    count, expected = by_hand(loss)
    drawing = go.show_graph(loss)
    assert len(drawing.nodes) == count + 1
    assert drawing.edges[0].start == 0
    full = {"leaf": "torch::autograd::AccumulateGrad", "parameter": "torch::autograd::AccumulateGrad"}
    found = [tuple(full.get(name, name) for name in edge[:2]) for edge in edges(drawing)[1:]]
    assert sorted(found) == expected


def test_edges_bear_the_shapes_of_gradients():
    x, weight = noise(2, 3), noise(3, 4)
    loss = (x @ weight).sum()
    assert edges(go.show_graph(loss, {"x": x, "weight": weight})) == [
        ("result", "SumBackward0", "()"),
        ("SumBackward0", "MmBackward0", "(2, 4)"),
        ("MmBackward0", "x", "(2, 3)"),
        ("MmBackward0", "weight", "(3, 4)"),
    ]


def test_tensor_used_twice_has_two_edges_and_one_node():
    x = noise(3)
    middle = x.sin()
    drawing = go.show_graph(middle * middle, {"x": x})
    assert edges(drawing).count(("MulBackward0", "SinBackward0", "(3,)")) == 2
    assert names(drawing).count("SinBackward0") == 1


def test_edges_of_a_node_with_several_results_say_which():
    x = noise(4, 2)
    left, right = (x * 1).chunk(2)
    assert ("MulBackward0", "SplitBackward0", "[1] (2, 2)") in edges(go.show_graph(left.detach() * right))


def test_parameters_bear_their_names():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[1].bias.requires_grad_(False)
    drawing = go.show_graph(model(torch.randn(4, 2)), model)
    leaves = {node.name: node.shape for node in drawing.nodes if node.kind == "leaf"}
    assert leaves == {"0.weight": "(3, 2)", "0.bias": "(3,)", "1.weight": "(1, 3)"}


def test_tied_parameter_bears_both_names():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert "0.weight, 1.weight" in names(go.show_graph(model(torch.randn(4, 2)), model))


def test_what_is_between_is_named_on_its_edge():
    x = noise(3)
    middle = x.sin()
    drawing = go.show_graph(middle.exp().sum(), {"middle": middle, "constant": noise(3, grad=False)})
    assert ("ExpBackward0", "SinBackward0", "middle (3,)") in edges(drawing)
    assert [node.name for node in drawing.nodes if node.kind == "leaf"] == ["leaf"]


def test_several_results():
    x = noise(3)
    drawing = go.show_graph({"a": x.sin(), "b": [x.cos(), x.detach()], "c": "text"})
    assert names(drawing) == ["result 0", "result 1", "SinBackward0", "leaf", "CosBackward0"]
    assert edges(drawing)[:2] == [("result 0", "SinBackward0", "(3,)"), ("result 1", "CosBackward0", "(3,)")]


def test_from_a_node_and_from_a_leaf():
    x = noise(3)
    loss = x.sin().exp().sum()
    (node,) = go.find_nodes(loss, "Exp*")
    assert names(go.show_graph(node)) == ["ExpBackward0", "SinBackward0", "leaf"]
    assert names(go.show_graph(x)) == ["result", "leaf"]


# --- marks ---


def layer_rule(grad_output, vjp):
    return vjp(grad_output)


def of_bridge(grad_output):
    return grad_output


@go.custom_backward
class Layer(nn.Module):
    def forward(self, x):
        return x * 1

    def backward(self, grad_output):
        return grad_output


def overridden(module):
    go.override(module, {type(module): layer_rule})
    return module


OVERRIDDEN = {
    "function": (lambda x: norm(x), "norm", "norm_backward"),
    "vjp": (go.custom_backward(layer_rule)(torch.sin), "sin", "layer_rule"),
    "structure": (lambda x: go.custom_backward(lambda g: g)(lambda x: {"y": x * 1})(x)["y"], "<lambda>", "<lambda>"),
    "straight through": (go.straight_through(torch.round), "round", "pass_through"),
    "module": (overridden(nn.Linear(3, 3).double()), "Linear", "layer_rule"),
    "class": (Layer(), "Layer", "backward"),
    "bridge": (lambda x: go.bridge(of_bridge)(abs)(x), "abs", "of_bridge"),
    "connect": (lambda x: go.connect(x.detach(), x, of_bridge), "connect", "of_bridge"),
}


@pytest.mark.parametrize(("fn", "name", "rule"), OVERRIDDEN.values(), ids=OVERRIDDEN)
def test_overridden_node_bears_the_name_of_its_function_and_of_its_rule(fn, name, rule):
    x = noise(3)
    drawing = go.show_graph(fn(x.exp()).sum())
    (node,) = [node for node in drawing.nodes if node.rule]
    assert (node.name, node.rule, node.look) == (name, rule, "overridden")


def test_other_peoples_functions_are_not_marked():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.variable = x.detach()  # torch has this name for the leaf of a node
            return x * 2

        @staticmethod
        def backward(ctx, grad_output):
            return grad_output * 2

    assert node_of(go.show_graph(Double.apply(noise(3))), "DoubleBackward").look == "operation"


EDITED = {
    "tensor": lambda x: go.edit_gradient(x, clip),
    "value": lambda x: go.edit_gradient(x, lambda grad_output, x: grad_output),
    "structure": lambda x: go.edit_gradient([x, x], lambda grads: grads)[0],
}


@pytest.mark.parametrize("edit", EDITED.values(), ids=EDITED)
def test_edit_before_the_graph_is_marked(edit):
    node = node_of(go.show_graph(edit(noise(3).exp()).sum()), "edit_gradient")
    assert node.look == "edited"
    assert node.rule == ("clip" if edit is EDITED["tensor"] else "<lambda>")


def test_edits_of_a_built_graph_are_marked_while_they_are_there():
    x = noise(3)
    middle = x.sin()
    loss = middle.exp().sum()
    handles = [go.edit_gradient_(found, rule) for found, rule in ((middle, clip), (middle.grad_fn, double), (x, clip))]
    drawing = go.show_graph(loss, {"x": x})
    assert node_of(drawing, "SinBackward0").edits == ("clip", "double")
    assert node_of(drawing, "x").edits == ("clip",)
    assert [node.name for node in drawing.nodes if node.look == "edited"] == ["SinBackward0", "x"]
    for handle in handles:
        handle.remove()
    assert not any(node.edits for node in go.show_graph(loss).nodes)


def test_edit_of_one_of_several_results_says_which():
    left, right = (noise(6) * 1).chunk(2)
    go.edit_gradient_(right, clip)
    go.edit_gradient_(left.grad_fn, double)
    assert node_of(go.show_graph(left * right), "SplitBackward0").edits == ("[1] clip", "double")


def test_connection_is_a_dashed_edge_into_the_other_graph():
    x = noise(3)
    middle = x.sin()
    leaf = middle.detach().requires_grad_()
    loss = leaf.exp().sum()
    named = {"x": x, "leaf": leaf}
    handle = go.connect_(leaf, middle)
    drawing = go.show_graph(loss, named)
    assert [drawing.nodes[edge.start].name for edge in drawing.edges if edge.connected] == ["leaf"]
    assert edges(drawing)[-3:] == [
        ("leaf", "connect_", "(3,)"),
        ("connect_", "SinBackward0", "(3,)"),
        ("SinBackward0", "x", "(3,)"),
    ]
    assert '-.->|"(3,)"|' in drawing.mermaid
    assert "style=dashed" in drawing.dot
    handle.remove()
    assert "x" not in names(go.show_graph(loss, named))


# --- how it is shown ---


def test_mermaid_text_is_what_print_gives():
    x = noise(3)
    drawing = go.show_graph(go.custom_backward(lambda g: g)(lambda x: x * 1)(x), {'"x" #1': x})
    assert str(drawing) == drawing.mermaid
    assert drawing.mermaid.splitlines()[:6] == [
        "flowchart TD",
        '  n0(["result"])',
        '  n1["#lt;lambda#gt;<br>backward: #lt;lambda#gt;"]:::overridden',
        '  n2(["#quot;x#quot; #35;1<br>(3,)"]):::leaf',
        '  n0 -->|"(3,)"| n1',
        '  n1 -->|"(3,)"| n2',
    ]


def test_dot_text_escapes_names():
    x = noise(3)
    assert r'[label="a\"b\\c\n(3,)"' in go.show_graph(x * 1, {'a"b\\c': x}).dot


def test_repr_counts():
    x = noise(3)
    assert repr(go.show_graph(x * 1)) == "GraphDrawing(3 nodes)"
    drawing = go.show_graph(go.edit_gradient(norm(x), clip))
    assert repr(drawing) == "GraphDrawing(4 nodes, 1 overridden, 1 edited)"


@needs_dot
def test_svg_has_every_node_and_edge():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    drawing = go.show_graph(model(torch.randn(4, 2)), model)
    picture = ET.fromstring(drawing.svg)
    kinds = [group.get("class") for group in picture.iter("{http://www.w3.org/2000/svg}g")]
    assert kinds.count("node") == len(drawing.nodes)
    assert kinds.count("edge") == len(drawing.edges)
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"ReluBackward0", "0.weight", "(3, 2)"} <= set(texts)


@needs_dot
def test_notebook_shows_svg():
    shown = go.show_graph(noise(3) * 1)._repr_mimebundle_(include=None, exclude=None)
    assert shown["image/svg+xml"].startswith("<svg")
    assert shown["text/plain"] == "GraphDrawing(3 nodes)"


@needs_dot
@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_saved_by_graphviz(tmp_path, suffix, start):
    path = tmp_path / f"graph.{suffix}"
    go.show_graph(noise(3) * 1).save(path)
    assert path.read_bytes().startswith(start)


def test_saved_as_text(tmp_path):
    drawing = go.show_graph(norm(noise(3)))
    drawing.save(str(tmp_path / "graph.mmd"))
    drawing.save(tmp_path / "graph.gv")
    assert (tmp_path / "graph.mmd").read_text() == drawing.mermaid + "\n"
    assert (tmp_path / "graph.gv").read_text() == drawing.dot + "\n"


@pytest.fixture
def without_dot(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_without_graphviz_a_notebook_shows_mermaid(without_dot):
    drawing = go.show_graph(noise(3) * 1)
    shown = drawing._repr_mimebundle_()
    assert shown == {"text/vnd.mermaid": drawing.mermaid, "text/plain": drawing.mermaid}


def test_without_graphviz_what_it_draws_is_refused(without_dot, tmp_path):
    drawing = go.show_graph(noise(3) * 1)
    text = r"graphviz draws the picture as svg, and its program 'dot' is not installed. Install graphviz .*Mermaid text"
    with pytest.raises(go.DrawingError, match=text):
        _ = drawing.svg
    with pytest.raises(go.DrawingError, match=text):
        drawing.save(tmp_path / "graph.svg")
    assert not (tmp_path / "graph.svg").exists()


def test_graphviz_that_fails_is_quoted(monkeypatch):
    ran = subprocess.CompletedProcess([], 1, b"", b'Format: "svg" not recognized.')
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: ran)
    with pytest.raises(go.DrawingError, match=r'graphviz failed: Format: "svg" not recognized'):
        _ = go.show_graph(noise(3) * 1).svg


def test_graphviz_that_takes_too_long_is_stopped(monkeypatch):
    def run(*args, timeout, **kwargs):
        raise subprocess.TimeoutExpired("dot", timeout)

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(go.DrawingError, match=r"has not drawn the 3 nodes within 60 s. Draw a part: show_graph\(find"):
        _ = go.show_graph(noise(3) * 1).svg


# --- costs ---


def test_few_hundred_nodes_take_a_fraction_of_a_second():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 6)
    loss = model(torch.randn(2, 5, 8)).sum()
    start = time.process_time()
    drawing = go.show_graph(loss, model)
    assert len(drawing.mermaid) < 50_000  # what Mermaid takes unless told otherwise
    assert time.process_time() - start < 0.5
    assert 400 < len(drawing.nodes) < 600


def test_deep_graph():
    y = noise(3)
    for _ in range(5_000):
        y = y + 1
    assert len(go.show_graph(y).nodes) == 5_002


def test_picture_holds_neither_graph_nor_tensors():
    def draw():
        x = noise(3)
        saved = x.exp()
        return go.show_graph((saved * x).sum(), {"x": x}), weakref.ref(x), weakref.ref(saved)

    gc.disable()
    try:
        drawing, x, saved = draw()
        assert (x(), saved()) == (None, None)
        assert "x" in names(drawing)
    finally:
        gc.enable()


def test_graph_that_a_backward_pass_has_freed_is_drawn():
    x = noise(3)
    loss = x.exp().sum()
    before = str(go.show_graph(loss))
    loss.backward()
    assert str(go.show_graph(loss)) == before


# --- errors ---


ROOTS = {
    "constant": (lambda: noise(3, grad=False), r"a tensor of shape \(3,\) that requires no grad"),
    "none": (lambda: None, "None"),
    "structure": (lambda: [noise(3, grad=False)], "a list"),
    "text": (lambda: "loss", "'loss', a str"),
}


@pytest.mark.parametrize(("make", "text"), ROOTS.values(), ids=ROOTS)
def test_root_without_a_graph(make, text):
    with pytest.raises(go.GraphError, match=rf"show_graph: 'root' must be a tensor with a graph, .*; got {text}"):
        go.show_graph(make())


def test_params_that_are_none():
    with pytest.raises(
        go.GraphError, match=r"'params' must be a model, or a dict of tensors by name; got a tensor of shape \(3,\)"
    ):
        go.show_graph(noise(3), noise(3))
    with pytest.raises(go.GraphError, match=r"'params' must hold tensors by name; 'a' is 3"):
        go.show_graph(noise(3), {"a": 3})


@pytest.mark.parametrize("name", ["graph.jpg", "graph"])
def test_suffix_that_is_not_known(name, tmp_path):
    with pytest.raises(go.DrawingError, match=rf"is saved as .svg, .png, .pdf, .gv or .mmd; got '{name}'"):
        go.show_graph(noise(3)).save(tmp_path / name)
