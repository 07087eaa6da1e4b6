"""Overrides while several threads are in a model, and what is changed while a forward runs. Contract, section 5."""

import contextlib
import copy
import pickle
import sys
import threading
import time
import warnings

import pytest
import torch
from oracles import accumulators, closely, exactly, noise
from torch import nn

import gradoverride as go
from gradoverride._core.overriding.overridden_class import _overridden
from overrides.models import doubled, gradient, guided, guided_by_hand, mlp, tripled


@pytest.fixture(autouse=True)
def threads_that_take_turns_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def leaves_in(value):
    """The tensors and modules that a function holds, or a function within it."""
    if isinstance(value, (nn.Module, torch.Tensor)):
        yield value
    for cell in getattr(value, "__closure__", None) or ():
        yield from leaves_in(cell.cell_contents)
    for part in value if isinstance(value, (list, tuple)) else getattr(value, "__defaults__", None) or ():
        yield from leaves_in(part)


def together(*works):
    """Run these at once, each in a thread; give their results, or raise what one raised."""
    held = accumulators(*[leaf for work in works for leaf in leaves_in(work)])
    barrier = threading.Barrier(len(works))
    results, errors = [None] * len(works), []

    def run(index, work):
        try:
            barrier.wait()
            results[index] = work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads)
    del held
    if errors:
        raise errors[0]
    return results


def seen(model):
    """What an override changes on modules."""
    return [(type(module), dict(module.__dict__)) for module in model.modules()]


def scaled_weight(grad_output, input, weight, bias):
    return {"input": 2 * grad_output @ weight, "weight": 3 * grad_output.T @ input, "bias": 5 * grad_output.sum(0)}


def by_name(grad_output, vjp):
    return {name: 2 * grad for name, grad in vjp.by_name(grad_output).items()}


def reading_module(grad_output, module):
    return 2 * grad_output @ module.weight


class LinearByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, factors):
        ctx.save_for_backward(x, weight)
        ctx.factors = factors
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.factors
        return of_x * grad_output @ weight, of_weight * grad_output.T @ x, of_bias * grad_output.sum(0), None


RULES = {
    "vjp": (doubled, (2, 1, 1)),
    "weight": (scaled_weight, (2, 3, 5)),
    "by_name": (by_name, (2, 2, 2)),
    "module": (reading_module, (2, 1, 1)),
}


def expected_of(linear, x, factors):
    result = LinearByHand.apply(x, linear.weight, linear.bias, factors)
    return torch.autograd.grad(result.square().sum(), [x, linear.weight, linear.bias])


def found_of(module, linear, x):
    return torch.autograd.grad(module(x).square().sum(), [x, linear.weight, linear.bias])


# --- many threads in one model ---


@pytest.mark.parametrize(("rule", "factors"), RULES.values(), ids=RULES)
def test_eight_threads_in_one_module_have_each_their_own_gradients(rule, factors):
    module = nn.Linear(3, 3).double()
    inputs = [noise(4, 3) for _ in range(8)]
    with go.override(module, {module: rule}) as plan:
        found = together(*[lambda x=x: [found_of(module, module, x) for _ in range(20)] for x in inputs])
        assert plan.table[0].calls == "160"
    for x, all_found in zip(inputs, found, strict=True):
        expected = expected_of(module, x, factors)
        for grads in all_found:
            closely(grads, expected)


def test_eight_threads_accumulate_what_one_does():
    """Each backward runs in its thread, and all of them add to the same parameters."""
    model, one = mlp(), guided_by_hand(mlp())
    inputs = [noise(4, 3, grad=False) for _ in range(8)]
    with go.override(model, {nn.ReLU: guided}):
        together(*[lambda x=x: [model(x).sum().backward() for _ in range(10)] for x in inputs])
    for x in inputs:
        (10 * one(x).sum()).backward()
    for ours, theirs in zip(model.parameters(), one.parameters(), strict=True):
        closely(ours.grad, theirs.grad)


def test_first_calls_in_eight_threads_at_once_agree():
    """What is made for a rule at its first call is made once, or as often the same."""
    for _ in range(10):
        model = mlp()
        x = noise(4, 3)
        by_hand = gradient(guided_by_hand(model), x)

        def fresh(grad_output, vjp):
            return vjp(grad_output.clamp(min=0))

        with go.override(model, {nn.ReLU: fresh}):
            for found in together(*[lambda model=model, x=x: gradient(model, x)] * 8):
                exactly(found, by_hand)


def test_grad_mode_of_a_thread_is_its_own():
    module = nn.Linear(3, 3).double()
    x = noise(4, 3)
    expected = expected_of(module, x, (2, 1, 1))

    def without():
        with torch.no_grad():
            return [module(x).requires_grad for _ in range(20)]

    with go.override(module, {module: doubled}):
        found, plain = together(lambda: [found_of(module, module, x) for _ in range(20)], without)
    assert not any(plain)
    for grads in found:
        closely(grads, expected)


def test_worker_thread_sees_the_override_of_its_parent():
    model = mlp()
    x = noise(4, 3)
    with go.override(model, {nn.ReLU: guided}):
        (found,) = together(lambda: gradient(model, x))
    exactly(found, gradient(guided_by_hand(model), x))


def test_backward_in_another_thread_has_the_rules_of_its_forward():
    module = nn.Linear(3, 3).double()
    x = noise(4, 3)
    with go.override(module, {module: scaled_weight}):
        loss = module(x).square().sum()
    (found,) = together(lambda: torch.autograd.grad(loss, [x, module.weight, module.bias]))
    closely(found, expected_of(module, x, (2, 3, 5)))


@pytest.mark.parametrize(("rule", "factors"), RULES.values(), ids=RULES)
def test_replicas_in_threads_have_each_their_own_weights(rule, factors):
    """As `DataParallel` does it on several devices."""
    module = nn.Linear(3, 3).double()
    inputs = [noise(4, 3) for _ in range(4)]

    def replica():
        made = module._replicate_for_data_parallel()
        made._former_parameters = {}
        for name, parameter in module.named_parameters():
            made._former_parameters[name] = 2 * parameter
            setattr(made, name, made._former_parameters[name])
        return made

    expected = [torch.zeros(())] * 3
    for x in inputs:
        result = LinearByHand.apply(x, 2 * module.weight, 2 * module.bias, factors)
        grads = torch.autograd.grad(result.square().sum(), [x, module.weight, module.bias])
        expected = [grads[0], *[one + other for one, other in zip(expected[1:], grads[1:], strict=True)]]
    with go.override(module, {module: rule}):
        made = [replica() for _ in inputs]
        results = together(*[lambda made=made, x=x: made(x) for made, x in zip(made, inputs, strict=True)])
    total = sum(result.square().sum() for result in results)
    closely(torch.autograd.grad(total, [inputs[-1], module.weight, module.bias]), tuple(expected))


# --- overrides that come and go meanwhile ---

# Not by `catch_warnings`, which is not for threads.
NEVER_RAN = pytest.mark.filterwarnings("ignore:.*never ran while it was in force:gradoverride.GradOverrideWarning")


def test_overrides_of_other_modules_come_and_go_while_a_model_runs():
    model = mlp()
    others = [mlp() for _ in range(3)]
    x = noise(4, 3)
    expected = gradient(guided_by_hand(model), x)
    before = [seen(other) for other in others]

    def come_and_go(other):
        for rules in [{nn.ReLU: guided}, {nn.Linear: doubled}, {"*": lambda grad_output, vjp: vjp(grad_output)}] * 10:
            with go.override(other, rules):
                gradient(other, x)

    with go.override(model, {nn.ReLU: guided}):
        works = [lambda: [gradient(model, x) for _ in range(50)]] * 2
        found = together(*works, *[lambda other=other: come_and_go(other) for other in others])
    for one in (*found[0], *found[1]):
        exactly(one, expected)
    assert [seen(other) for other in others] == before


@NEVER_RAN
@pytest.mark.parametrize("rules", [{nn.ReLU: guided, nn.Linear: doubled}, {"3": tripled}], ids=["classes", "glob"])
def test_two_threads_that_override_the_same_model_leave_it_as_it_was(rules):
    model = mlp()
    x = noise(4, 3)
    plain, before = gradient(model, x), seen(model)

    def come_and_go():
        for _ in range(100):
            go.override(model, rules).remove()

    together(come_and_go, come_and_go, come_and_go)
    assert seen(model) == before
    exactly(gradient(model, x), plain)


def test_override_of_a_class_leaves_the_tuples_alone_that_other_threads_are_making():
    """Python lets no tuple grow that somebody else has: who looks at all objects that there are has it."""
    stop = threading.Event()

    def slowly():
        for one in range(3):
            time.sleep(1e-3)
            yield one

    def make_tuples():
        while not stop.is_set():
            assert tuple(slowly()) == (0, 1, 2)

    def override():
        try:
            for _ in range(5):
                with go.override({nn.Tanh: doubled}):
                    gradient(nn.Tanh(), noise(3))
        finally:
            stop.set()

    together(make_tuples, make_tuples, make_tuples, override)


@pytest.mark.parametrize(("target", "other"), [(nn.Tanh, nn.ReLU), (torch.tanh, torch.relu)], ids=["class", "function"])
def test_rule_of_the_whole_process_holds_in_threads_while_others_come_and_go(target, other):
    x = noise(3)
    plain = gradient(nn.Tanh(), x)
    sys.setswitchinterval(1e-6)
    stop = threading.Event()
    wrong = []

    def run():
        while not stop.is_set():
            found = gradient(nn.Tanh(), x)
            if not torch.equal(found, 2 * plain):
                wrong.append(found)

    with go.override({target: doubled}):
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(30):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", go.GradOverrideWarning)  # the other never runs
                    go.override({other: tripled}).remove()
        finally:
            stop.set()
            for thread in threads:
                thread.join(300)
    assert not wrong


def sine(x):
    return torch.sin(x)


class Calling(nn.Module):
    """Calls what it would take a look into it to know."""

    def forward(self, x):
        return sine(x).mul(2)


@pytest.mark.parametrize("place", [[], [nn.Sequential(nn.Tanh(), Calling())]], ids=["in the process", "in a model"])
def test_calls_leave_the_filters_of_warnings_alone_which_all_threads_share(place, monkeypatch):
    changed = []
    model = place[0] if place else nn.Sequential(nn.Tanh(), Calling())
    with go.override(*place, {torch.tanh: doubled, torch.sin: doubled}):
        monkeypatch.setattr(warnings.catch_warnings, "__enter__", lambda _: changed.append(True))
        together(lambda: gradient(model, noise(3)))
        monkeypatch.undo()
    assert not changed


@NEVER_RAN
def test_modules_are_overridden_while_another_thread_overrides_a_class():
    model = nn.Sequential(*[nn.Tanh() for _ in range(100)])
    before = seen(model)
    sys.setswitchinterval(1e-6)
    stop = threading.Event()

    def modules():
        while not stop.is_set():
            go.override(model, {nn.Tanh: doubled}).remove()

    def everywhere():
        try:
            for _ in range(20):
                go.override({nn.ReLU: doubled}).remove()
        finally:
            stop.set()

    together(modules, everywhere)
    assert seen(model) == before


class Scale(nn.Module):
    """Calls `meanwhile` inside of its forward: there another thread may be."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64))
        self.meanwhile = []

    def forward(self, x):
        if self.meanwhile:
            self.meanwhile.pop()()
        return x * self.weight


def on_weight(grad_output, x, weight):
    return {"x": 2 * grad_output * weight, "weight": grad_output * x}


def on_params(grad_output, params, vjp):
    return vjp.by_name(grad_output)


WHERE = {
    # what is overridden by a rule that asks for parameters, and how the module in it is found
    "module": (lambda: Scale(), on_weight, lambda model: model),
    "parent": (lambda: nn.Sequential(Scale()), on_params, lambda model: model[0]),
}


@pytest.mark.parametrize(("make", "rule", "part"), WHERE.values(), ids=WHERE)
def test_override_removed_in_a_forward_is_gone(make, rule, part):
    model = make()
    scale = part(model)
    inner = go.override(scale, {scale: doubled})
    outer = go.override(model, {model: rule})
    x = noise(5, 3)
    scale.meanwhile.append(inner.remove)
    model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outer.remove()
    assert "_gradoverride" not in scale.__dict__
    assert type(scale) is Scale
    with go.override(scale, {scale: lambda grad_output: 7 * grad_output}):
        exactly(gradient(model, x, weights=1), torch.full((5, 3), 7.0, dtype=torch.float64))


@pytest.mark.parametrize(("make", "rule", "part"), WHERE.values(), ids=WHERE)
def test_override_put_on_in_a_forward_stays(make, rule, part):
    model = make()
    scale = part(model)
    outer = go.override(model, {model: rule})
    x = noise(5, 3)
    handles = []
    scale.meanwhile.append(lambda: handles.append(go.override(scale, {scale: lambda grad_output: 7 * grad_output})))
    model(x)
    outer.remove()
    exactly(gradient(model, x, weights=1), torch.full((5, 3), 7.0, dtype=torch.float64))
    handles[0].remove()
    assert type(scale) is Scale
    assert "_gradoverride" not in scale.__dict__


@pytest.mark.parametrize(("make", "rule", "part"), WHERE.values(), ids=WHERE)
def test_module_changed_during_a_forward_stays_changed(make, rule, part):
    """By another thread, a hook, or the forward of another module."""
    model = make()
    scale = part(model)
    scale.meanwhile.append(lambda: (scale.eval(), setattr(scale, "mark", 1)))
    with go.override(model, {model: rule}):
        model(noise(5, 3))
    assert not scale.training
    assert scale.mark == 1


def test_what_a_forward_assigns_on_itself_is_kept():
    class Counting(Scale):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    model = Counting()
    with go.override(model, {model: on_weight}):
        model(noise(5, 3))
        model(noise(5, 3))
    assert model.calls == 2


@NEVER_RAN
def test_override_that_comes_and_goes_under_running_forwards_leaves_the_model_as_it_was():
    model = Scale()
    x = noise(4, 3)
    before = seen(model)
    done = threading.Event()

    def forwards():
        for _ in range(500):  # not without end: the other thread may hardly get its turn
            model(x)
            if done.is_set():
                break

    def come_and_go():
        try:
            for _ in range(40):
                go.override(model, {model: on_weight}).__exit__(ValueError, None, None)
                with go.override(model, {model: on_weight}):
                    model(x)
        finally:
            done.set()

    together(forwards, forwards, come_and_go)
    assert seen(model) == before


def test_forward_that_runs_while_an_override_goes_has_it_or_has_it_not():
    model = nn.Sequential(mlp()[3])
    x = noise(4, 4)
    plain = gradient(model, x)
    done = threading.Event()

    def forwards():
        found = []
        while not done.is_set() and len(found) < 500:
            found.append(gradient(model, x))
        return found

    def come_and_go():
        try:
            for _ in range(100):
                with go.override(model, {"0": doubled}):
                    gradient(model, x)
        finally:
            done.set()

    found = [one for some in together(forwards, forwards, come_and_go)[:2] for one in some]
    twice = [torch.equal(one, 2 * plain) for one in found]
    once = [torch.equal(one, plain) for one in found]
    assert all(a or b for a, b in zip(once, twice, strict=True))
    assert type(model[0]) is nn.Linear
    assert "_gradoverride" not in model[0].__dict__


# --- copies in threads ---


def test_copies_made_in_threads_are_whole_while_overrides_come_and_go():
    model = mlp()
    x = noise(4, 3)
    plain = gradient(model, x)

    def copies():
        return [copy.deepcopy(model) for _ in range(30)]

    def come_and_go():
        for _ in range(20):
            with go.override(model, {"3": doubled}):
                gradient(model, x)

    made = [one for some in together(copies, copies, come_and_go)[:2] for one in some]
    for one in made:
        found = gradient(one, x)
        assert torch.equal(found, plain) or torch.equal(found, 2 * plain)
        go.remove_overrides(one)
        exactly(gradient(one, x), plain)
    assert all(type(one[3]) is nn.Linear for one in made)


class Waiting(type):
    """Makes a class derived from a class of this only when two threads do, or after a while."""

    barrier = threading.Barrier(2)

    def __new__(meta, name, bases, body):
        if bases != (nn.Linear,):
            with contextlib.suppress(threading.BrokenBarrierError):
                meta.barrier.wait(0.5)
        return super().__new__(meta, name, bases, body)


class Pickled(nn.Linear, metaclass=Waiting):
    pass


def test_pickles_loaded_in_threads_are_of_one_class_and_can_be_cleared():
    module = Pickled(2, 2)
    go.override(module, {module: doubled})
    data = pickle.dumps(module)
    _overridden.cache_clear()  # as in a process that has overridden none of this class
    Waiting.barrier.reset()
    made = together(*[lambda: pickle.loads(data)] * 2)
    for one in made:
        go.remove_overrides(one)
    assert [type(one) for one in made] == [Pickled, Pickled]
