"""Overrides of the whole process: classes and functions without a model. Contract, section 5."""

import copy
import functools
import gc
import io
import os
import pickle
import queue
import subprocess
import sys
import threading
import types
import uuid
import weakref
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

import pytest
import torch
import torch.nn.functional as F
import wrapt
from oracles import closely, exactly, noise
from torch import nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

import gradoverride as go
from gradoverride._core.in_force import layers
from gradoverride._core.torch_functions import function_mode
from overrides.models import doubled, gradient, guided, mlp, negated, tripled

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",  # Dynamo's own doing, for any Function
)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()


@pytest.fixture
def x():
    return noise(5, 3)


class Listening(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Own(nn.ReLU):
    """Has no forward of its own."""


class Twice(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x)


class Other(nn.Module):
    def forward(self, x):
        return F.relu(x)


@wrapt.decorator
def as_it_is(wrapped, instance, args, kwargs):
    assert isinstance(instance, nn.Module)
    return wrapped(*args, **kwargs)


class Wrapped(nn.Module):
    @as_it_is
    def forward(self, x):
        return F.relu(x)


class Bound(nn.Module):
    def power(self, x, exponent):
        return x**exponent

    forward = functools.partialmethod(power, exponent=3)


def classes():
    return {cls: dict(vars(cls)) for cls in (nn.ReLU, Own, Twice, Other)}


@pytest.fixture(autouse=True)
def _classes_are_as_before():
    before = classes()
    yield
    gc.collect()
    assert classes() == before
    assert torch.overrides._get_current_function_mode_stack() == []
    assert str(go.explain()) == "nothing is overridden"


class TestClass:
    @pytest.mark.parametrize("cls", [nn.ReLU, Own, Twice])
    def test_modules_there_are_and_to_come_have_the_rule_once(self, cls, x):
        before = cls()
        plain = gradient(before, x)
        with go.override({nn.ReLU: doubled}) as plan:
            for module in (before, cls(), copy.deepcopy(before)):
                closely(gradient(module, x), 2 * plain)
            (row,) = plan.table
            assert (row.path, row.cls, row.target, row.calls) == ("(everywhere)", "ReLU", "class 'ReLU'", "3")
        exactly(gradient(before, x), plain)

    def test_modules_of_other_classes_have_it_not(self, x):
        plain = gradient(Other(), x)
        with go.override({nn.ReLU: doubled}):
            gradient(nn.ReLU(), x)
            exactly(gradient(Other(), x), plain)
            exactly(gradient(F.relu, x), plain)

    def test_a_class_derived_meanwhile_has_it(self, x):
        with go.override({nn.ReLU: doubled}):

            class Later(nn.ReLU):
                def forward(self, x):
                    return 3 * super().forward(x)

            closely(gradient(Later(), x), 6 * gradient(Other(), x))
        closely(gradient(Later(), x), 3 * gradient(Other(), x))

    def test_a_class_derived_meanwhile_from_one_that_does_not_tell_its_super_has_it(self, x):
        known = []

        class Registered(nn.ReLU):
            def __init_subclass__(cls, **options):
                known.append(cls.__name__)

        before = dict(vars(Registered))
        with go.override({nn.ReLU: doubled}):

            class Later(Registered):
                pass

            class Own(Registered):
                def forward(self, x):
                    return 3 * x.relu()

            closely(gradient(Later(), x), 2 * gradient(Other(), x))
            closely(gradient(Own(), x), 6 * gradient(Other(), x))
        assert dict(vars(Registered)) == before
        assert known == ["Later", "Own"]
        closely(gradient(Own(), x), 3 * gradient(Other(), x))

    def test_a_class_derived_meanwhile_is_told_to_the_bases_of_the_overridden_one(self, x):
        known = []

        class Registry(nn.Module):
            def __init_subclass__(cls, **options):
                known.append((cls.__name__, options))

        class Middle(Registry):
            def forward(self, x):
                return x.relu()

        with go.override({Middle: doubled}):

            class Later(Middle, word="given"):
                pass

            closely(gradient(Later(), x), 2 * gradient(Other(), x))
        assert known == [("Middle", {}), ("Later", {"word": "given"})]

    @pytest.mark.parametrize("cls", [Wrapped, Bound])
    def test_a_forward_that_is_no_plain_function_has_it_and_is_put_back(self, cls, x):
        before, plain = dict(vars(cls)), gradient(cls(), x)
        with go.override({cls: doubled}):
            closely(gradient(cls(), x), 2 * plain)
        assert dict(vars(cls)) == before
        exactly(gradient(cls(), x), plain)

    def test_the_nearest_class_wins(self, x):
        plain = gradient(nn.ReLU(), x)
        with go.override({nn.ReLU: doubled, Twice: tripled}):
            closely(gradient(nn.ReLU(), x), 2 * plain)
            closely(gradient(Own(), x), 2 * plain)
            closely(gradient(Twice(), x), 3 * 2 * plain)

    def test_of_two_rules_for_one_class_the_later_wins_and_the_other_is_not_missed(self, x):
        plain = gradient(nn.ReLU(), x)
        with go.override(go.Registry("others", {nn.ReLU: tripled}) | {nn.ReLU: doubled}) as plan:
            closely(gradient(nn.ReLU(), x), 2 * plain)
            assert [(row.cls, row.rule.partition(" ")[0], row.calls) for row in plan.table] == [
                ("ReLU", "'doubled'", "1")
            ]

    def test_a_rule_for_a_base_whose_modules_all_have_a_nearer_one_is_not_missed(self, x):
        plain = gradient(Own(), x)
        with go.override({nn.ReLU: tripled, Own: doubled}):
            closely(gradient(Own(), x), 2 * plain)

    def test_one_whose_modules_are_not_called_is(self, x):
        rules = {nn.ReLU: lambda grad_output: grad_output * 2, Own: lambda grad_output: -grad_output}
        handle = go.override(rules)
        gradient(nn.ReLU(), x)
        with pytest.warns(go.GradOverrideWarning, match=r"of the class 'Own' never ran"):
            handle.remove()
        handle = go.override(rules)
        with pytest.warns(go.GradOverrideWarning, match="never ran") as seen:
            handle.remove()
        assert len(seen) == 2

    def test_a_derived_class_alone(self, x):
        plain = gradient(nn.ReLU(), x)
        with go.override({Own: doubled}):
            closely(gradient(Own(), x), 2 * plain)
            exactly(gradient(nn.ReLU(), x), plain)

    def test_nested_in_any_order_with_that_of_a_model(self, x):
        told = []

        def telling(name):
            def rule(grad_output, vjp):
                told.append(name)
                return 2 * vjp(grad_output)

            return rule

        model = nn.Sequential(nn.ReLU())
        plain = gradient(model, x)
        for outer in ("model", "everywhere"):
            rules = {nn.ReLU: telling("first")}, {nn.ReLU: telling("second")}
            first, second = (rules[0],), (model, rules[1])
            if outer == "everywhere":
                first, second = (model, rules[0]), (rules[1],)
            told.clear()
            with go.override(*first), go.override(*second):
                closely(gradient(model, x), 4 * plain)
                assert told == ["second", "first"]
        exactly(gradient(model, x), plain)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiled_code_is_never_stale(self, x, backend):
        model = nn.Sequential(nn.ReLU(), Twice(), Own())
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        plain = gradient(compiled, x)
        for _ in range(2):
            with go.override({nn.ReLU: doubled}):
                closely(gradient(compiled, x), 8 * plain)
                with go.override(model, {nn.ReLU: tripled}):
                    closely(gradient(compiled, x), 27 * 8 * plain)
                closely(gradient(compiled, x), 8 * plain)
            closely(gradient(compiled, x), plain)

    def test_a_parametrized_module_has_it(self, x):
        module = parametrizations.weight_norm(nn.Linear(3, 2)).double()
        plain = gradient(module, x)
        with go.override({nn.Linear: doubled}):
            closely(gradient(module, x), 2 * plain)

    def test_a_forward_that_somebody_has_put_on_an_instance_is_refused(self, x):
        module = nn.ReLU()
        module.forward = lambda x: x.relu()
        with pytest.raises(go.UnsupportedError, match=r"class 'ReLU'.* put another one on one of them, a 'ReLU'"):
            go.override({nn.ReLU: doubled})

    def test_modules_of_several_classes_are_looked_for_at_once_and_what_is_in_the_way_at_one_is_told(self, monkeypatch):
        class First(nn.Module):
            def forward(self, x):
                return F.relu(x)

        class Second(First):
            pass

        class Third(nn.Module):
            forward = First.forward

        looks, look = [], gc.get_referrers
        monkeypatch.setattr(gc, "get_referrers", lambda *kinds: looks.append(kinds) or look(*kinds))
        with go.override({First: doubled, Third: doubled}):
            assert len(looks) == 1
            modules = [First(), Second(), Third()]
            for module in modules:
                module(noise(5, 3))
        modules[1].forward = modules[1].forward
        for rules, name in (({Third: doubled, Second: doubled}, "Second"), ({Third: doubled, First: doubled}, "First")):
            with pytest.raises(go.UnsupportedError, match=f"class '{name}'.* another one on one of them, a 'Second'"):
                go.override(rules)

    def test_a_rule_whose_names_do_not_fit_changes_nothing(self, x):
        class Named(nn.Module):
            def forward(self, output):
                return F.relu(output)

        before, plain = dict(vars(Named)), gradient(Named(), x)
        with pytest.raises(go.RuleSignatureError, match=r"asks for 'output', which is a parameter of 'Named'"):
            go.override({Named: lambda grad_output, output: grad_output})
        assert dict(vars(Named)) == before
        exactly(gradient(Named(), x), plain)

    def test_one_that_is_garbage_is_not(self, x):
        module = nn.ReLU()
        module.forward = types.MethodType(lambda self, x: x.relu(), module)  # a cycle
        del module
        with go.override({nn.ReLU: doubled}):
            closely(gradient(nn.ReLU(), x), 2 * gradient(Other(), x))

    def test_removal_out_of_order(self, x):
        plain = gradient(nn.ReLU(), x)
        first, second = go.override({nn.ReLU: doubled}), go.override({nn.ReLU: tripled})
        closely(gradient(nn.ReLU(), x), 6 * plain)
        first.remove()
        closely(gradient(nn.ReLU(), x), 3 * plain)
        second.remove()
        second.remove()

    def test_where_another_has_replaced_the_forward_meanwhile_theirs_stays(self, x):
        class Mine(nn.Module):
            def forward(self, x):
                return F.relu(x)

        plain = gradient(Mine(), x)
        with go.override({Mine: doubled}):
            ours = Mine.forward
            Mine.forward = theirs = lambda self, x: 5 * ours(self, x)
            closely(gradient(Mine(), x), 10 * plain)
        assert Mine.forward is theirs
        closely(gradient(Mine(), x), 5 * plain)

    def test_it_is_told_in_a_model(self, x):
        model = mlp()
        with go.override({nn.ReLU: doubled}):
            gradient(model, x)
            assert [(row.path, row.target) for row in go.explain(model)] == [
                ("1", "class 'ReLU'"),
                ("2.1", "class 'ReLU'"),
            ]


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def passed(grad_output):
    return grad_output


def weights_of(x):
    """What `gradient` gives where the gradient passes as it is."""
    return gradient(lambda x: x, x)


class TestCopies:
    """Which rule is outside is told by the order of their overrides, in copies too."""

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled, saved])
    def test_a_later_rule_of_the_process_is_outside_of_the_rule_that_a_copy_brings(self, copied, x):
        module = Own()
        go.override(module, {module: passed})
        with go.override({Own: doubled}):
            exactly(gradient(copied(module), x), 2 * weights_of(x))

    @pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
    def test_rules_of_one_override_apply_once_in_a_copy(self, copied, x):
        model = nn.Sequential(nn.ReLU())
        plain = gradient(model, x)
        go.override(model, {nn.ReLU: doubled, F.relu: doubled})
        exactly(gradient(copied(model), x), 2 * plain)

    def test_a_pickle_of_another_process_is_inside_of_what_comes_after_it(self, x):
        module = nn.Sequential(nn.ReLU())
        plain = gradient(module, x)
        go.override(module, {nn.ReLU: doubled})
        go.override(module, {nn.ReLU: tripled})
        ours, theirs = (uuid.UUID(int=0).hex.encode(), layers._process.encode())
        loaded = pickle.loads(pickle.dumps(module).replace(theirs, ours))
        exactly(gradient(loaded, x), 6 * plain)
        with go.override({nn.ReLU: passed}):
            exactly(gradient(loaded, x), weights_of(x))

    def test_what_belongs_together_does_in_a_pickle_of_another_process(self, x):
        module = nn.Sequential(nn.ReLU())
        plain = gradient(module, x)
        go.override(module, {nn.ReLU: doubled, F.relu: tripled})  # one call, one rule
        ours, theirs = (uuid.UUID(int=1).hex.encode(), layers._process.encode())
        loaded = pickle.loads(pickle.dumps(module).replace(theirs, ours))
        exactly(gradient(loaded, x), 2 * plain)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
    def test_an_override_of_a_forked_process_is_none_of_this_one(self, x):
        plain = gradient(nn.ReLU(), x)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:  # the next override in either has the same place there
            try:
                model = nn.Sequential(nn.ReLU())
                go.override(model, {nn.ReLU: doubled})
                os.write(writing, pickle.dumps(model))
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            data = pipe.read()
        os.waitpid(child, 0)
        with go.override({F.relu: tripled}):
            closely(gradient(pickle.loads(data), x), 6 * plain)


@pytest.mark.parametrize("target", [nn.ReLU, torch.relu], ids=["class", "function"])
def test_rules_come_and_go_while_another_thread_is_about_to_compile(target, x):
    from torch._dynamo.callback import CallbackTrigger, callback_handler

    model, ones = nn.Sequential(nn.ReLU()), torch.ones_like(x)
    with callback_handler.install_callbacks(CallbackTrigger.DYNAMO, "0/0"):  # which it then has entered
        with go.override({target: negated}):
            closely(gradient(model, x, weights=ones), -ones)
        closely(gradient(model, x, weights=ones), (x > 0).to(x.dtype))


def test_a_module_that_was_parametrized_under_a_rule_loses_it_while_its_class_has_another(x):
    module = nn.Linear(3, 3, bias=False).double()
    first = go.override(module, {module: doubled})
    parametrizations.weight_norm(module)
    weight = module.weight.detach()
    plain = gradient(lambda x: F.linear(x, weight), x)
    with go.override({nn.Linear: tripled}):
        closely(gradient(module, x), 6 * plain)
        first.remove()
        closely(gradient(module, x), 3 * plain)
    closely(gradient(module, x), plain)


MADE_OF_ANOTHER = {
    "a slice": lambda model: model[:2],
    "one made of its parts": lambda model: type(model)(*model),
    "a sum": lambda model: model + model,
}


@pytest.mark.parametrize("first", [False, True], ids=["after the class", "before the class"])
@pytest.mark.parametrize("make", MADE_OF_ANOTHER.values(), ids=MADE_OF_ANOTHER)
def test_module_that_is_made_of_an_overridden_one_has_the_rule_of_its_class(make, first, x):
    """It is of the class that modules have while they are overridden, and is not overridden itself."""
    model = nn.Sequential(nn.Tanh(), nn.Tanh(), nn.Tanh())
    plain = gradient(make(model), x)
    if first:
        go.override(model, {model: tripled})
    with go.override({nn.Sequential: doubled}) as plan:
        with go.override(model, {model: tripled}):
            part = make(model)
            closely(gradient(part, x), 2 * plain)
            model(x)
        closely(gradient(part, x), 2 * plain)
        assert [row.calls for row in plan.table] == ["3"]
    exactly(gradient(part, x), plain)


class TestFunction:
    @pytest.mark.parametrize("call", [F.relu, torch.relu, torch.Tensor.relu, nn.ReLU(), Twice()])
    def test_every_call_has_the_rule(self, call, x):
        plain = gradient(call, x)
        with go.override({torch.relu: doubled}) as plan:
            closely(gradient(call, x), 2 * plain)
            assert [(row.path, row.target, row.calls) for row in plan.table] == [
                ("(everywhere)", "function 'relu'", "1")
            ]
        exactly(gradient(call, x), plain)

    def test_one_rule_for_a_class_and_its_function(self, x):
        plain = gradient(nn.ReLU(), x)
        with go.override({nn.ReLU: doubled, F.relu: doubled}):
            closely(gradient(nn.ReLU(), x), 2 * plain)
            closely(gradient(F.relu, x), 2 * plain)

    def test_rules_that_have_been_left_are_no_obstacle_where_compiled_code_keeps_them(self):
        model, x = nn.LayerNorm(3, dtype=torch.float64), noise(2, 3)
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
        with go.override(model, {model: lambda grad_output, vjp: vjp(2 * grad_output)}):
            run(x)
        with go.override({F.layer_norm: lambda grad_output, vjp: vjp(3 * grad_output)}):
            found = gradient(model, x)
        closely(found, 3 * gradient(model, x))

    def test_one_that_cannot_be_outside_of_the_rule_of_a_model_changes_nothing(self, x):
        model = nn.Sequential(nn.Linear(3, 3)).double()
        plain = gradient(model, x)
        with go.override(model, {nn.Linear: doubled}):
            with pytest.raises(go.UnsupportedError, match=r"(?s)'linear'.*must be outside.*target 'Linear'"):
                go.override({F.linear: tripled})
            closely(gradient(model, x), 2 * plain)
        exactly(gradient(model, x), plain)

    @pytest.mark.parametrize("second", [nn.ReLU, F.relu])
    @pytest.mark.parametrize("first", [nn.ReLU, F.relu])
    @pytest.mark.parametrize("where", ["model model", "model process", "process model", "process process"])
    def test_the_later_one_is_outside(self, where, first, second, x):
        told = []

        def telling(name):
            def rule(grad_output, vjp):
                told.append(name)
                return 2 * vjp(grad_output)

            return rule

        model = nn.Sequential(nn.ReLU())
        plain = gradient(model, x)
        rules = {first: telling("first")}, {second: telling("second")}
        arguments = [
            (model, rule) if place == "model" else (rule,) for place, rule in zip(where.split(), rules, strict=True)
        ]
        with go.override(*arguments[0]), go.override(*arguments[1]):
            closely(gradient(model, x), 4 * plain)
        assert told == ["second", "first"]

    def test_who_enters_it_is_not_kept(self, x, request):
        def enter(model):
            return go.override({F.relu: doubled})

        model = Other()
        gone = weakref.ref(model)
        gc.collect()
        gc.disable()
        request.addfinalizer(gc.enable)
        with enter(model):
            del model
            assert gone() is None
            gradient(F.relu, x)

    def test_what_is_called_under_a_rule_is_made_once(self, x, monkeypatch):
        made, kind = [], function_mode.Plan
        monkeypatch.setattr(function_mode, "Plan", lambda *parts: made.append(parts) or kind(*parts))

        def own(grad_output, vjp):
            return 2 * vjp(grad_output)

        plain = gradient(F.relu, x)
        with go.override({F.relu: own}):
            closely(gradient(F.relu, x), 2 * plain)
        before = len(made)
        with go.override({torch.relu: own}) as plan:
            closely(gradient(F.relu, x), 2 * plain)
            assert [row.calls for row in plan.table] == ["1"]
        assert len(made) == before > 0

    def test_one_rule_several_times_and_in_a_model_too(self, x):
        model = nn.Sequential(nn.ReLU(), Other())
        plain = gradient(model, x)
        with (
            go.override({F.relu: doubled}),
            go.override(model, {F.relu: doubled}),
            go.override({nn.ReLU: tripled, F.relu: doubled}),
        ):
            closely(gradient(model, x), 2 * 2 * 3 * 2 * 2 * 2 * plain)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiled(self, x, backend):
        model = nn.Sequential(nn.ReLU(), Other())
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        plain = gradient(compiled, x)
        with go.override({F.relu: doubled}):
            closely(gradient(compiled, x), 4 * plain)
        closely(gradient(compiled, x), plain)

    def test_removed_beneath_the_mode_of_another(self, x):
        plain = gradient(F.relu, x)
        handle = go.override({F.relu: doubled})
        with Listening() as listening:
            closely(gradient(F.relu, x), 2 * plain)
            handle.remove()
            assert torch.overrides._get_current_function_mode_stack() == [listening]
            exactly(gradient(F.relu, x), plain)

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("block", [torch.device("meta"), Listening()])
    def test_put_on_within_the_block_of_another_mode_it_stays(self, x, block, compiled):
        relu = torch.compile(F.relu, backend="aot_eager") if compiled else F.relu
        plain = gradient(relu, x)
        with block:
            handle = go.override({F.relu: doubled})
            closely(gradient(relu, x, weights=3.0), 6 * (x > 0).double())
        assert torch.empty(1).device.type == "cpu"
        closely(gradient(relu, x), 2 * plain)
        with block:
            handle.remove()
            closely(gradient(relu, x, weights=3.0), 3 * (x > 0).double())
        exactly(gradient(relu, x), plain)

    def test_a_default_device_comes_and_goes_while_it_stands(self, x):
        plain = gradient(F.relu, x)
        try:
            with go.override({F.relu: doubled}):
                torch.set_default_device("meta")
                closely(gradient(F.relu, x, weights=3.0), 6 * (x > 0).double())
                torch.set_default_device(None)
                closely(gradient(F.relu, x), 2 * plain)
            torch.set_default_device("meta")
            with go.override({F.relu: doubled}):
                assert torch.empty(1).device.type == "meta"
                torch.set_default_device(None)
                closely(gradient(F.relu, x), 2 * plain)
        finally:
            torch.set_default_device(None)

    def test_backward_within_runs_the_rule_as_it_is_written(self, x):
        def calls_it(grad_output, input):
            return grad_output * torch.relu(input)

        with go.override({F.relu: calls_it}):
            found = gradient(F.relu, x, weights=torch.ones_like(x))
        closely(found, x.detach().clamp(min=0))


def in_thread(work):
    """What `work` gives in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


HANDED = {
    "map": lambda pool, run, x: pool.map(run, [x, x]),
    "imap": lambda pool, run, x: list(pool.imap(run, [x, x])),
    "imap_unordered": lambda pool, run, x: list(pool.imap_unordered(run, [x, x])),
    "starmap_async": lambda pool, run, x: pool.starmap_async(run, [(x,), (x,)]).get(60),
    "apply": lambda pool, run, x: [pool.apply(run, (x,)), pool.apply(func=run, args=(x,))],
    "apply_async": lambda pool, run, x: [pool.apply_async(run, (x,)).get(60)],
    "apply_async by keyword": lambda pool, run, x: [pool.apply_async(func=run, args=(x,)).get(60)],
}


class TestThreads:
    """torch has its modes per thread."""

    def test_those_that_are_started_meanwhile_have_the_rule(self, x):
        plain, start, submit = gradient(F.relu, x), threading.Thread.start, ThreadPoolExecutor.submit
        with go.override({F.relu: doubled}):
            exactly(in_thread(lambda: gradient(F.relu, x)), 2 * plain)
            exactly(in_thread(lambda: in_thread(lambda: gradient(F.relu, x))), 2 * plain)
            with ThreadPoolExecutor(2) as workers:
                for found in workers.map(lambda _: gradient(F.relu, x), range(4)):
                    exactly(found, 2 * plain)
        exactly(in_thread(lambda: gradient(F.relu, x)), plain)
        assert (threading.Thread.start, ThreadPoolExecutor.submit) == (start, submit)

    def test_one_that_goes_on_loses_the_rule_when_it_goes_and_gets_later_ones(self, x):
        plain, asked, answers = gradient(F.relu, x), queue.Queue(), queue.Queue()

        def work():
            while asked.get():
                answers.put(gradient(F.relu, x))

        def now():
            asked.put(True)
            return answers.get()

        first = go.override({F.relu: doubled})
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            exactly(now(), 2 * plain)
            second = go.override({F.relu: tripled})
            exactly(now(), 6 * plain)
            first.remove()
            exactly(now(), 3 * plain)
            second.remove()
            exactly(now(), plain)
        finally:
            asked.put(False)
            thread.join()

    def test_tasks_of_an_executor_have_the_rules_of_whoever_gives_them(self, x):
        plain = gradient(F.relu, x)
        with ThreadPoolExecutor(1) as workers:
            run = lambda: workers.submit(gradient, F.relu, x).result()  # noqa: E731
            exactly(run(), plain)  # its thread runs already
            with go.override({F.relu: doubled}):
                exactly(run(), 2 * plain)
                with go.override({F.relu: tripled}):
                    exactly(run(), 6 * plain)
                exactly(in_thread(run), 2 * plain)
            exactly(run(), plain)
            failing = workers.submit(lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                failing.result()
            exactly(run(), plain)

    @pytest.mark.parametrize("way", HANDED)
    def test_what_a_pool_of_threads_is_given_has_the_rules_of_whoever_gives_it(self, x, way):
        def run(x):
            return gradient(F.relu, x)

        plain, before = run(x), dict(vars(ThreadPool))
        with ThreadPool(2) as pool:
            assert HANDED[way](pool, run, x)
            with go.override({F.relu: doubled}) as plan:
                found = HANDED[way](pool, run, x)
                assert plan.table[0].calls == str(len(found))
            for one in found:
                closely(one, 2 * plain)
            for one in HANDED[way](pool, run, x):
                exactly(one, plain)
        assert dict(vars(ThreadPool)) == before

    def test_a_task_that_goes_on_loses_the_rule_when_it_goes(self, x):
        plain, may_go_on = gradient(F.relu, x), threading.Event()

        def work():
            first = gradient(F.relu, x)
            ready.set()
            may_go_on.wait()
            return first, gradient(F.relu, x)

        with ThreadPoolExecutor(1) as workers:
            ready = threading.Event()
            with go.override({F.relu: doubled}):
                task = workers.submit(work)
                ready.wait()
            may_go_on.set()
            first, second = task.result()
        exactly(first, 2 * plain)
        exactly(second, plain)

    def test_of_those_that_run_already_a_warning_tells(self, x):
        go_on = threading.Event()
        thread = threading.Thread(target=go_on.wait, name="a worker")
        thread.start()
        try:
            with pytest.warns(go.GradOverrideWarning) as caught:
                go.override({F.relu: doubled}).__exit__(KeyError, KeyError(), None)
        finally:
            go_on.set()
            thread.join()
        assert str(caught[0].message) == (
            "override of the whole process: torch lets nobody enter a mode in a thread that runs already, so the "
            "function 'relu' is not overridden in the thread 'a worker'. Override it before the thread is started, or "
            "in a model: override(model, ...) holds in every thread that calls it"
        )

    def test_where_another_has_wrapped_the_start_of_threads_meanwhile_theirs_stays(self, x):
        plain, start = gradient(F.relu, x), threading.Thread.start
        with go.override({F.relu: doubled}):
            exactly(gradient(F.relu, x), 2 * plain)
            ours = threading.Thread.start
            threading.Thread.start = theirs = lambda self: ours(self)
        try:
            assert threading.Thread.start is theirs
            exactly(in_thread(lambda: gradient(F.relu, x)), plain)
            with go.override({F.relu: doubled}):
                exactly(in_thread(lambda: gradient(F.relu, x)), 2 * plain)
            assert threading.Thread.start is theirs
        finally:
            threading.Thread.start = start

    def test_a_thread_with_a_run_of_its_own_keeps_it(self, x):
        plain, found = gradient(F.relu, x), []
        thread = threading.Thread()
        thread.run = run = lambda: found.append(gradient(F.relu, x))
        with go.override({F.relu: doubled}):
            thread.start()
            thread.join()
        exactly(found[0], 2 * plain)
        assert thread.run is run


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (nn.ReLU(), "the module ReLU names modules of a model. Give the model first"),
        ("encoder.*", r"the glob 'encoder.\*' names modules of a model"),
        (lambda name, module: True, "the predicate .* names modules of a model"),
    ],
)
def test_what_names_modules_of_a_model_needs_one(target, text):
    with pytest.raises(go.TargetError, match=text):
        go.override({target: guided})


def test_what_is_no_registry_is_an_error():
    with pytest.raises(go.TargetError, match=r"'model' must be a module; got an int.*or the rules alone"):
        go.override(3)
    with pytest.raises(go.TargetError, match="'model' must be a module; got a dict"):
        go.override({nn.ReLU: negated}, {nn.ReLU: negated})


def test_overrides_before_dynamo_is_imported_leave_nothing_behind():
    script = """
import gc, sys, torch, gradoverride as go

x = torch.ones(3, requires_grad=True)

def enter(times):
    for _ in range(times):
        with go.override({torch.tanh: lambda grad_output: grad_output}):
            torch.tanh(x).sum().backward()
    gc.collect()
    return len(gc.get_objects())

before = enter(20)
print(enter(50) - before < 20, "torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
