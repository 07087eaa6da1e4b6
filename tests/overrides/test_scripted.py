"""TorchScript, which runs no Python code: where rules for functions could be passed by, that is told. Contract, section
5."""

import functools
import io
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, exactly, noise
from torch import nn
from torch.jit import script

import gradoverride as go
from overrides.models import doubled, gradient, tripled

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:.*torch.jit:FutureWarning",  # since torch 2.15
    "ignore:.*never ran while it was in force:gradoverride.GradOverrideWarning",
)


class Part(nn.Module):
    def forward(self, x):
        return F.relu(x) * 2


def scripted_part():
    return torch.jit.script(Part())


def traced_part():
    return torch.jit.trace(Part(), noise(5, 3, grad=False))


def step(x):
    return torch.relu(x) * 2


def scripted_function():
    return torch.jit.script(step)


def traced_function():
    return torch.jit.trace(step, noise(5, 3, grad=False))


def scripted_by_an_imported_name():
    return script(Part())


def loaded():
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", go.GradOverrideWarning)
        torch.jit.save(scripted_part(), file)
    file.seek(0)
    return torch.jit.load(file)


MADE = {one.__name__: one for one in (scripted_part, traced_part, scripted_function, traced_function)}


class Around(nn.Module):
    """A model that has such a thing as a part or an attribute, beside a sigmoid."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x) + torch.sigmoid(x)


class Naming(nn.Module):
    """One that names it in its code."""

    def forward(self, x):
        return PART(x) + torch.sigmoid(x)


class NamingInAMethod(nn.Module):
    def forward(self, x):
        return self.around(x)

    def around(self, x):
        return PART(x) + torch.sigmoid(x)


class NamingOfAModule(nn.Module):
    def forward(self, x):
        return elsewhere.PART(x) + torch.sigmoid(x)


class NamingInABase(Naming):
    def forward(self, x):
        return super().forward(x)


PART = None


elsewhere = types.ModuleType("elsewhere")


def naming(part, kind=Naming):
    globals()["PART"] = elsewhere.PART = part
    return kind()


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    globals()["PART"] = elsewhere.PART = None


REACHED = {
    "part": Around,
    "global": naming,
    "of another module": functools.partial(naming, kind=NamingOfAModule),
    "global in a method": functools.partial(naming, kind=NamingInAMethod),
    "global in a base": functools.partial(naming, kind=NamingInABase),
}


@pytest.fixture
def x():
    return noise(5, 3)


@pytest.mark.parametrize("around", REACHED.values(), ids=REACHED)
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
class TestInAModel:
    def test_a_rule_for_what_it_calls_is_refused(self, make, around, x):
        model = around(make())
        plain = gradient(model, x)
        text = r"must run Python code for the functions that it calls .*'relu' among them; .* is a .*, which runs none"
        with pytest.raises(go.UnsupportedError, match=text):
            go.override(model, {torch.sigmoid: tripled, F.relu: doubled})
        assert str(go.explain(model)) == "nothing is overridden"
        exactly(gradient(model, x), plain)

    def test_a_rule_for_what_it_does_not_call_holds_around_it(self, make, around, x):
        model = around(make())
        of_part = 2 * (x > 0).double() * torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
        plain = gradient(model, x)
        with go.override(model, {torch.sigmoid: tripled}) as plan:
            closely(gradient(model, x), of_part + 3 * (plain - of_part))
            assert [row.calls for row in plan.table] == ["1"]
        exactly(gradient(model, x), plain)


def test_a_function_in_python_is_taken_to_be_in_what_was_traced_where_what_it_calls_is():
    traced = torch.jit.trace(F.normalize, noise(5, 3, grad=False))
    with pytest.raises(go.UnsupportedError, match="'normalize' among them"):
        go.override(Around(traced), {F.normalize: doubled})


@pytest.mark.parametrize("make", [torch.jit.script, lambda form: torch.jit.trace(form, noise(5, 3, grad=False))])
def test_an_operator_after_a_number_is_found(make):
    def less(x: torch.Tensor):
        return 1 - x

    def divided(x: torch.Tensor):
        return 1 / x

    for form, function in ((less, torch.sub), (divided, torch.div)):
        with pytest.raises(go.UnsupportedError, match=rf"'{function.__name__}' among them"):
            go.override(Around(make(form)), {function: doubled})


SCALED = """
def scaled(x, factor: float):
    rows = x.size(0) * 1.0
    return (x / factor).tanh() * (factor * rows)
"""


def test_numbers_that_are_multiplied_are_no_sign_of_a_function_in_python():
    """`F.batch_norm` multiplies sizes, which it asks for, before it calls torch."""
    model = Around(torch.jit.CompilationUnit(SCALED).scaled)
    for function in (F.batch_norm, F.group_norm, F.instance_norm, F.interpolate, F.gaussian_nll_loss):
        go.override(model, {function: doubled}).remove()
    for function in (torch.mul, torch.tanh, F.tanhshrink):
        with pytest.raises(go.UnsupportedError, match=rf"'{function.__name__}' among them"):
            go.override(model, {function: doubled})


def test_parts_that_are_not_called_say_nothing(x):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Sigmoid(), nn.Tanh()])

        def forward(self, x):
            for part in self.parts:
                x = part(x)
            return x

    model = nn.Sequential(torch.jit.script(Listed()), nn.ReLU())
    plain = gradient(model, x)
    with go.override(model, {F.relu: doubled}):
        closely(gradient(model, x), 2 * plain)


def test_what_has_no_forward_may_call_anything():
    class Other(nn.Module):
        @torch.jit.export
        def other(self, x: torch.Tensor):
            return x * 2

    with pytest.raises(go.UnsupportedError, match="'relu' among them"):
        go.override(Around(torch.jit.script(Other())), {F.relu: doubled})


def test_the_loss_of_a_traced_model_is_found():
    classes = torch.tensor([0, 1, 2, 0, 1])

    def loss(x):
        return F.cross_entropy(x, classes)

    traced = torch.jit.trace(loss, noise(5, 3, grad=False))
    with pytest.raises(go.UnsupportedError, match="'cross_entropy' among them"):
        go.override(Around(traced), {F.cross_entropy: doubled})


def test_a_path_is_refused_beside_it_whatever_it_calls():
    with pytest.raises(go.UnsupportedError, match=rf"'{__name__}:step' among them"):
        go.override(Around(scripted_part()), {f"{__name__}:step": doubled})


class TestInTheWholeProcess:
    @pytest.mark.parametrize("make", [scripted_part, traced_part])
    def test_a_module_that_keeps_its_own_gradient_is_warned_of(self, make, x):
        module = make()
        plain = gradient(module, x)
        text = r"override of function 'relu': what calls it must run Python .* keeps its own gradient: .*'Part'"
        with pytest.warns(go.GradOverrideWarning, match=text):
            handle = go.override({F.relu: doubled})
        exactly(gradient(module, x), plain)
        handle.remove()

    def test_one_that_is_made_after_none_was_found_is_warned_of(self, recwarn):
        for _ in range(2):
            go.override({F.relu: doubled}).remove()
        module = scripted_part()
        with pytest.warns(go.GradOverrideWarning, match="keeps its own gradient: .*'Part'"):
            go.override({F.relu: doubled}).remove()
        del module

    def test_a_function_of_a_module_is_warned_of(self, monkeypatch):
        monkeypatch.setattr(torch.jit, "of_a_test", scripted_function(), raising=False)
        with pytest.warns(go.GradOverrideWarning, match="keeps its own gradient: .*'step'"):
            go.override({F.relu: doubled}).remove()

    @pytest.mark.parametrize("make", [scripted_by_an_imported_name, scripted_function, loaded])
    def test_one_that_is_made_while_it_is_in_force_is_warned_of(self, make, x):
        plain = gradient(make(), x)
        with go.override({F.relu: doubled}):
            with pytest.warns(go.GradOverrideWarning, match="its own gradient: '(Part|step)'. Leave it in") as told:
                made = make()
            exactly(gradient(made, x), plain)
        assert {one.filename for one in told if one.category is go.GradOverrideWarning} == {__file__}
        with warnings.catch_warnings():
            warnings.simplefilter("error", go.GradOverrideWarning)
            make()
            with go.override({torch.tanh: tripled}):
                torch.tanh(x)
                make()

    def test_nothing_is_told_of_one_that_does_not_call_it_or_is_gone(self, x):
        module, gone = scripted_part(), [torch.jit.script(nn.Sigmoid())]
        gone.append(gone)
        del gone
        with warnings.catch_warnings():
            warnings.simplefilter("error", go.GradOverrideWarning)
            with go.override({torch.sigmoid: tripled}):
                plain = gradient(lambda x: x.tanh(), x)
                closely(gradient(lambda x: (2 * x).sigmoid(), x), 3 * gradient(_sigmoid_by_hand, x))
        closely(plain, gradient(lambda x: x.tanh(), x))
        assert module(x).shape == x.shape


def _sigmoid_by_hand(x):
    return 1 / (1 + (-2 * x).exp())


class Prepared(Part):
    def __prepare_scriptable__(self):
        return self


@pytest.mark.parametrize("cls", [Part, nn.Sigmoid, Prepared])
@pytest.mark.parametrize("inside", [False, True], ids=["itself", "within"])
def test_a_module_whose_class_is_overridden_is_not_scripted(cls, inside):
    def model():
        return nn.Sequential(cls()) if inside else cls()

    before = dict(vars(cls))
    with go.override({cls: doubled}):
        text = (
            rf"a '{cls.__name__}', whose class is overridden, must run Python code for its rule 'doubled' .* script it"
        )
        with pytest.raises(go.UnsupportedError, match=text):
            torch.jit.script(model())
        model()(noise(5, 3)).sum().backward()
    assert dict(vars(cls)) == before
    x = noise(5, 3)
    exactly(torch.jit.script(model())(x), model()(x))
