"""Which rule is for which module: kinds of targets, precedence, errors. Contract, section 5."""

import copy
import functools
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, exactly, noise
from torch import nn

import gradoverride as go
from overrides.models import doubled, gradient, guided, guided_by_hand, mlp, negated, tripled


@pytest.fixture
def model():
    return mlp()


@pytest.fixture
def x():
    return noise(5, 3)


TARGETS = {
    "class": lambda model: nn.ReLU,
    "base class": lambda model: nn.ReLU,
    "glob": lambda model: "*1",
    "predicate": lambda model: lambda name, module: isinstance(module, nn.ReLU),
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_relu_that_a_target_names_is_guided(model, x, target):
    with go.override(model, {target(model): guided}):
        exactly(gradient(model, x), gradient(guided_by_hand(model_of()), x))
    exactly(gradient(model, x), gradient(model_of(), x))


def model_of():
    return mlp()


def test_module_as_a_target_is_overridden_alone(model, x):
    with go.override(model, {model[3]: doubled}) as plan:
        assert [row.path for row in plan.table] == ["3"]
        exactly(gradient(model, x), 2 * gradient(mlp(), x))


def test_the_model_itself_may_be_a_target(model, x):
    plain = gradient(model, x)
    with go.override(model, {model: doubled}):
        exactly(gradient(model, x), 2 * plain)


def test_class_of_an_overridden_module_is_the_class_that_it_is_of(model, x):
    plain = gradient(model, x)
    with go.override(model, {nn.ReLU: doubled}):
        cls = type(model[1])
        for arguments in ((model, {cls: tripled}), ({cls: tripled},)):
            with go.override(*arguments) as plan:
                closely(gradient(model, x), 36 * plain)
                assert {row.target for row in plan.table} == {"class 'ReLU'"}
    with go.override(model, {cls: tripled}):
        closely(gradient(model, x), 9 * plain)


def test_class_names_modules_of_derived_classes_too(x):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(Own(3, 3)).double()
    plain = gradient(model, x)
    with go.override(model, {nn.Linear: doubled}):
        exactly(gradient(model, x), 2 * plain)


class Base(nn.Linear):
    pass


class Derived(Base):
    pass


# Of two targets for one `Derived`, the one that wins, from the most specific on.
RANKED = {
    "module": lambda model: model[0],
    "glob": lambda model: "0",
    "predicate": lambda model: lambda name, module: name == "0",
    "exact class": lambda model: Derived,
    "nearer base": lambda model: Base,
    "farther base": lambda model: nn.Linear,
}
ORDER = list(RANKED)


@pytest.mark.parametrize("later", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(
    ("winner", "loser"), [(ORDER[i], ORDER[j]) for i in range(len(ORDER)) for j in range(i + 1, len(ORDER))]
)
def test_the_more_specific_target_wins_wherever_it_stands(winner, loser, later):
    model = nn.Sequential(Derived(3, 3)).double()
    x = noise(2, 3)
    plain = gradient(model, x)
    entries = [(RANKED[winner](model), doubled), (RANKED[loser](model), tripled)]
    with go.override(model, dict(reversed(entries) if later else entries)) as plan:
        assert len(plan.table) == 1
        exactly(gradient(model, x), 2 * plain)


def test_later_entry_wins_a_tie(model, x):
    plain = gradient(model, x)
    with go.override(model, {"3": tripled, "[3]": doubled}):
        exactly(gradient(model, x), 2 * plain)


def test_shared_module_is_found_by_each_of_its_names_and_overridden_once(x):
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, shared).double()
    plain = gradient(model, x)
    for names in ("0", "1", "*"):
        with go.override(model, {names: doubled}) as plan:
            assert len(plan.table) == 1
            exactly(gradient(model, x), 4 * plain)


def test_predicate_without_a_hash(model, x):
    class Any(list):
        def __call__(self, name, module):
            return isinstance(module, tuple(self))

    plain, registry = gradient(model, x), go.Registry()
    registry.register(Any([nn.ReLU]))(guided)
    with go.override(model, registry):
        assert not torch.equal(gradient(model, x), plain)
        assert [row.path for row in go.explain(model)] == ["1", "2.1"]


def test_shared_module_is_told_of_once():
    relu = nn.ReLU()
    model = nn.Sequential(relu, relu)
    rule = functools.partial(guided)  # one that no other test has compiled
    with pytest.warns(go.GradOverrideWarning, match="never ran"), go.override(model, {relu: rule}):
        assert [row.path for row in go.explain(model)] == ["0"]


def test_glob_crosses_dots_and_never_names_the_model_itself(model):
    with go.override(model, {"*": lambda grad_output: grad_output}) as plan:
        assert [row.path for row in plan.table] == ["0", "1", "2", "2.0", "2.1", "3"]
        plan_of_none_called(plan)


def plan_of_none_called(plan):
    with pytest.warns(go.GradOverrideWarning):
        plan.remove()


# --- registries ---


def test_name_with_brackets_names_its_module(x):
    model = nn.Sequential()
    model.add_module("relu[0]", nn.ReLU())
    model.add_module("relu0", nn.ReLU())
    plain = gradient(model, x)
    with go.override(model, {"relu[0]": doubled}) as plan:
        closely(gradient(model, x), 4 * plain)
    assert [row.path for row in plan.table] == ["relu[0]", "relu0"]


def test_registry_is_applied_and_gives_the_rule_back(model, x):
    registry = go.Registry("guided")
    assert registry.register(nn.ReLU)(guided) is guided
    with go.override(model, registry):
        exactly(gradient(model, x), gradient(guided_by_hand(mlp()), x))


def test_default_registry_is_applied_where_none_is_given(model, x, monkeypatch):
    monkeypatch.setattr(go.registry, "_entries", [])
    go.register(nn.ReLU)(guided)
    assert list(go.registry) == [(nn.ReLU, guided)]
    with go.override(model):
        exactly(gradient(model, x), gradient(guided_by_hand(mlp()), x))


def test_entry_with_several_targets_needs_one_that_matches(model):
    registry = go.Registry("several")
    registry.register(nn.Conv2d, nn.ReLU)(lambda grad_output: grad_output)
    with go.override(model, registry) as plan:
        assert {row.cls for row in plan.table} == {"ReLU"}
        plan_of_none_called(plan)


def test_merged_registries_have_the_entries_of_both_and_the_later_wins():
    one, other = go.Registry("one", {nn.ReLU: guided}), go.Registry("other", {nn.ReLU: negated})
    assert list(one | other) == [(nn.ReLU, guided), (nn.ReLU, negated)]
    assert (one | other).name == "one | other"
    assert list(one) == [(nn.ReLU, guided)]
    assert list(one | {nn.Linear: doubled}) == [(nn.ReLU, guided), (nn.Linear, doubled)]
    assert list({nn.Linear: doubled} | one) == [(nn.Linear, doubled), (nn.ReLU, guided)]
    with pytest.raises(TypeError):
        one | 3
    with pytest.raises(TypeError, match="unsupported operand"):
        3 | one


def test_registries_are_compared_by_name_and_entries():
    assert go.Registry("a", {nn.ReLU: guided}) == go.Registry("a", {nn.ReLU: guided})
    assert go.Registry("a", {nn.ReLU: guided}) != go.Registry("b", {nn.ReLU: guided})
    assert go.Registry("a", {nn.ReLU: guided}) != go.Registry("a", {nn.ReLU: negated})
    assert len(go.Registry("a", {nn.ReLU: guided})) == 1
    assert repr(go.Registry("a", {nn.ReLU: guided})) == "Registry('a': class 'ReLU' -> guided)"


def test_registry_changed_after_it_was_applied_changes_nothing(model, x):
    registry = go.Registry("r", {"3": doubled})
    plain = gradient(model, x)
    with go.override(model, registry):
        registry.register("3")(tripled)
        exactly(gradient(model, x), 2 * plain)


class Equal(nn.Module):
    """Modules that compare as what they were made with."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def __eq__(self, other):
        return isinstance(other, Equal) and self.factor == other.factor

    def __hash__(self):
        return hash(self.factor)

    def forward(self, x):
        return self.factor * x.relu()


@pytest.mark.parametrize("target", [Equal, "[02]", F.relu], ids=["class", "glob", "function"])
def test_modules_that_compare_equal_have_a_rule_each(x, target):
    model = nn.Sequential(Equal(3.0), nn.Identity(), Equal(3.0))
    with go.override(model, {target: doubled}) as plan:
        exactly(gradient(model, x), 4 * 9 * gradient(torch.relu, x))
        for index in (0, 2):
            exactly(gradient(model[index], x), 2 * 3 * gradient(torch.relu, x))
        assert len(plan.table) == len({row.path for row in plan.table})
        assert str(go.explain(model)) == str(plan)
    exactly(gradient(model, x), 9 * gradient(torch.relu, x))
    with go.override(model, {model[2]: doubled}) as plan:
        exactly(gradient(model, x), 2 * 9 * gradient(torch.relu, x))
        assert [row.path for row in plan.table] == ["2"]
    go.override(model, {target: doubled})
    go.remove_overrides(model)
    exactly(gradient(model, x), 9 * gradient(torch.relu, x))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda registry: go.Registry(registry.name, registry)])
def test_a_copy_of_a_registry_has_entries_of_its_own(model, copied):
    def own(grad_output, vjp):  # of one that has been compiled nobody knows whether it ran
        return 2 * vjp(grad_output)

    registry = go.Registry("r", {nn.ReLU: own, model[0]: own})
    registry.register(nn.Conv2d, optional=True)(negated)
    other = copied(registry)
    assert other == registry
    assert list(other)[1][0] is model[0]
    with pytest.warns(go.GradOverrideWarning, match="never ran"), go.override(model, other):
        pass  # nn.Conv2d is optional there too
    other.register(nn.Tanh)(negated)
    assert (len(registry), len(other)) == (3, 4)


@pytest.mark.parametrize("path", ["no_such_package.layers:act", "torch.nn.functional:no_such_function"])
def test_optional_path_that_names_nothing_is_left_out(model, path):
    """A registry may be for packages that are not installed everywhere."""
    registry = go.Registry("r", {nn.ReLU: doubled})
    registry.register(path, optional=True)(negated)
    x = noise(2, 3)
    plain = gradient(model, x)
    with go.override(model, registry) as plan:
        assert [row.target for row in plan.table] == ["class 'ReLU'"] * 2
        closely(gradient(model, x), 4 * plain)
    everywhere = go.Registry("e")
    everywhere.register(path, optional=True)(negated)
    with go.override(everywhere) as plan:
        assert list(plan.table) == []
    registry.register(path)(negated)
    with pytest.raises(go.TargetNotFoundError, match="no_such"):
        go.override(model, registry)


def test_registries_that_require_other_modules_are_not_equal():
    """They have the same targets and rules, and raise for other models."""
    required, optional, together, each = (go.Registry("r") for _ in range(4))
    required.register(nn.ReLU)(guided)
    optional.register(nn.ReLU, optional=True)(guided)
    assert required != optional
    together.register(nn.ReLU, nn.Tanh)(guided)
    each.register(nn.ReLU)(guided)
    each.register(nn.Tanh)(guided)
    assert together != each


@pytest.mark.parametrize("name", ["guided_backprop", "deeplift", "epsilon_plus", "attn_lrp"])
def test_a_preset_can_be_pickled(name):
    preset = getattr(go.presets, name)
    assert pickle.loads(pickle.dumps(preset)) == preset


def never_called(grad_output):
    return grad_output


def test_a_registry_of_a_pickle_does_what_it_did(model, x):
    registry = pickle.loads(pickle.dumps(go.Registry("r", {nn.ReLU: guided, "1": guided, torch.relu: never_called})))
    assert [target for target, _ in registry] == [nn.ReLU, "1", torch.relu]
    with pytest.warns(go.GradOverrideWarning, match="'never_called' .* never ran"), go.override(model, registry):
        exactly(gradient(model, x), gradient(guided_by_hand(mlp()), x))


def test_a_lambda_in_a_registry_cannot_be_pickled():
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(go.Registry("r", {nn.ReLU: lambda grad_output: grad_output}))


# --- errors, by their text; nothing is changed ---


def everything(model):
    return [(type(module), dict(module.__dict__)) for module in model.modules()]


NOT_FOUND = {
    "class": (nn.Conv2d, r"the class 'Conv2d'.*names none\. Its classes are 'Sequential', 'Linear', 'ReLU'"),
    "class that is close": (nn.ReLU6, r"the class 'ReLU6'.*The closest classes in it are 'ReLU'"),
    "glob": ("2.9", r"the glob '2\.9'.*names none\. The closest names are '2\.1', '2\.0', '2'"),
    "glob far off": ("zzz", r"the glob 'zzz'.*Its modules are '0', '1', '2', '2\.0', '2\.1', '3'"),
    "name of the model": ("", r"the glob ''.*The model itself has no name: give the module as the target"),
    "predicate": (lambda name, module: False, r"the predicate '<lambda>' \(.*test_targets.py:\d+\).*said no to each"),
    "module of another model": (nn.ReLU(), r"the module ReLU.*names none\. Of this class it has '1', '2\.1'"),
}


@pytest.mark.parametrize(("target", "text"), NOT_FOUND.values(), ids=NOT_FOUND)
def test_target_that_names_nothing_is_an_error_before_anything_changes(model, target, text):
    before = everything(model)
    with pytest.raises(go.TargetNotFoundError, match=text) as caught:
        go.override(model, {nn.ReLU: guided, target: negated})
    assert str(caught.value).startswith("override of a 'Sequential': ")
    assert "'negated' (" in str(caught.value)
    assert isinstance(caught.value, LookupError)
    assert everything(model) == before


class Adapter:
    """What others mix into their modules."""


BAD_TARGETS = {
    "number": (
        3,
        r"a target is a module, a class of modules, a glob over dotted names, a predicate .*, a function of torch or "
        "an import path 'package.module:attribute'; got an int",
    ),
    "several": ((nn.ReLU, F.relu), r"; got a tuple. Several targets of one rule: register\(nn.ReLU, F.relu\)\(rule\)"),
    "operator": (operator.mul, r"'mul' \(built in\) is an operator of Python. Give the function .*: torch.mul"),
    "partial": (
        functools.partial(F.relu, inplace=True),
        r"'relu' \(.*functional.py:\d+\) is a functools.partial of one. Give the function itself",
    ),
    "name with a colon": ("blocks.a:b", r"a module 'blocks' must be .* write '\?' for a colon"),
    "other name with a colon": ("blocks.0:b", r"an import path as a target reads .* write '\?' for a colon"),
    "other class": (
        Adapter,
        r"must be one of modules; got the class 'Adapter'. .* derived from it: lambda .*isinstance\(module, Adapter\)$",
    ),
}


@pytest.mark.parametrize(("target", "text"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_what_cannot_be_a_target_is_an_error(model, target, text):
    with pytest.raises((go.TargetError, go.TargetNotFoundError), match=text):
        go.override(model, {target: guided})
    if not isinstance(target, str):  # a path is looked up where it is applied
        with pytest.raises(go.TargetError, match=text):
            go.Registry().register(target)


def test_a_glob_reaches_a_name_with_a_colon(x):
    model = nn.ModuleDict({"a:b": nn.ReLU()})
    with go.override(model, {"a?b": doubled}):
        closely(gradient(model["a:b"], x), 2 * gradient(nn.ReLU(), x))


def test_a_glob_for_a_model_without_parts_is_an_error_that_says_so():
    with pytest.raises(go.TargetNotFoundError, match=r"'ReLU': the glob .*names none. It has no modules within"):
        go.override(nn.ReLU(), {"*": guided})


@pytest.mark.parametrize(("given", "text"), [(3, "an int"), (nn.ReLU, "the class 'ReLU'")])
def test_what_is_told_of_and_cleared_must_be_a_module(given, text):
    with pytest.raises(go.TargetError, match=f"explain: 'model' must be a module; got {text}"):
        go.explain(given)
    with pytest.raises(go.TargetError, match=f"remove_overrides: 'model' must be a module; got {text}"):
        go.remove_overrides(given)


def test_register_without_a_target_is_an_error():
    with pytest.raises(go.TargetError, match=r"register: give at least one target, .*; got none"):
        go.Registry().register()


@pytest.mark.parametrize("given", [nn.GELU, "relu", 1, None])
def test_register_with_a_target_for_the_option_is_an_error(given):
    registry = go.Registry("r")
    with pytest.raises(
        go.TargetError, match=r"register: 'optional' must be True or False; got .*\. Several targets of"
    ):
        registry.register(nn.ReLU, optional=given)
    assert len(registry) == 0


def test_a_rule_where_the_target_should_be_is_an_error():
    registry = go.Registry("r")
    with pytest.raises(go.TargetError, match=r"'rule' \(.*_targets.py:\d+\) asks for 'grad_output', 'vjp', as a rule"):

        @registry.register
        def rule(grad_output, vjp):
            return vjp(grad_output)


def test_arguments_of_a_registry_of_another_kind_are_errors():
    with pytest.raises(go.TargetError, match=r"Registry: 'name' must be a string; got a dict. Give the name first"):
        go.Registry({nn.ReLU: guided})
    with pytest.raises(go.TargetError, match=r"Registry: 'rules' must be a Registry or a mapping .*; got a list"):
        go.Registry("r", [(nn.ReLU, guided)])


def test_arguments_of_another_kind_are_errors(model):
    with pytest.raises(go.TargetError, match="'model' must be a module; got a dict"):
        go.override({nn.ReLU: guided}, model)
    with pytest.raises(go.TargetError, match="'rules' must be a Registry or a mapping of targets to rules; got a list"):
        go.override(model, [nn.ReLU, guided])
    with pytest.raises(go.TargetError, match="'rules' must have an entry; Registry\\('': empty\\) has none"):
        go.override(model, {})


def test_rule_that_is_none_is_an_error_where_it_is_registered():
    with pytest.raises(go.RuleSignatureError, match="must take the gradient as its first"):
        go.Registry().register(nn.ReLU)(lambda: None)


def test_name_that_a_module_does_not_have_is_an_error_that_says_which_module(model):
    def rule(grad_output, wieght):
        return grad_output

    before = everything(model)
    with pytest.raises(
        go.RuleSignatureError,
        match=r"override of '2\.0', a 'Linear': rule 'rule' \(.*\) asks for 'wieght', which does not exist\. "
        r"'Linear' \(.*\) offers 'input', 'weight', 'bias'.*Did you mean 'weight'\?",
    ):
        go.override(model, {"1": guided, "2.0": rule})
    assert everything(model) == before


def test_script_module_is_refused():
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    with pytest.warns((DeprecationWarning, FutureWarning), match="script"):  # the latter since torch 2.15
        model[1] = torch.jit.script(model[1])
    with pytest.raises(
        go.UnsupportedError, match=r"override of '1'.*it is a ScriptModule\. Override the module before"
    ):
        go.override(model, {"1": doubled})


def scripted(module):
    with pytest.warns((DeprecationWarning, FutureWarning), match="script"):  # the latter since torch 2.15
        return torch.jit.script(module)


class OwnReLU(nn.ReLU):
    pass


@pytest.mark.parametrize("cls", [nn.ReLU, OwnReLU])
@pytest.mark.parametrize("inner", [lambda module: module, nn.Sequential], ids=["alone", "within"])
def test_scripted_module_that_a_class_names_is_refused_and_other_modules_may_be_named(cls, inner, x):
    model = nn.Sequential(nn.ReLU(), scripted(inner(cls())))
    plain = gradient(torch.relu, x)
    with pytest.raises(
        go.UnsupportedError,
        match=rf"override of '1[.0]*', a scripted '{cls.__name__}': a module must run Python code .*; it is a "
        "ScriptModule. Override the model before it is scripted, or name the modules to be overridden by a glob",
    ):
        go.override(model, {nn.ReLU: doubled})
    exactly(gradient(model, x), plain)
    with go.override(model, {"0": doubled}):
        exactly(gradient(model, x), 2 * plain)
    around = nn.Sequential(model, nn.Tanh())
    with go.override(around, {nn.Tanh: lambda grad_output, vjp: 2 * vjp(grad_output)}) as plan:
        assert [row.path for row in plan.table] == ["1"]
        plan_of_none_called(plan)


def test_scripted_module_of_a_class_that_is_overridden_in_the_whole_process_is_warned_of(x):
    module = scripted(nn.Sequential(OwnReLU()))
    plain = gradient(torch.relu, x)
    with pytest.warns(
        go.GradOverrideWarning,
        match="override of the class 'ReLU': its modules must run Python code to be overridden; there is a scripted "
        "'OwnReLU', which keeps its own gradient",
    ):
        handle = go.override({nn.ReLU: doubled})
    exactly(gradient(module, x), plain)
    exactly(gradient(nn.ReLU(), x), 2 * plain)
    handle.remove()
    garbage = [module]  # that only the collector frees
    garbage.append(garbage)
    del module, garbage
    with go.override({nn.ReLU: doubled}):
        exactly(gradient(nn.ReLU(), x), 2 * plain)


def test_lazy_module_is_refused_until_it_has_its_parameters():
    model = nn.Sequential(nn.LazyLinear(2)).double()
    with pytest.raises(go.UnsupportedError, match=r"override of '0', a 'LazyLinear'.*Call the model once before"):
        go.override(model, {"0": doubled})
    x = noise(2, 3)
    plain = gradient(model, x)
    with go.override(model, {"0": doubled}):
        exactly(gradient(model, x), 2 * plain)


def test_forward_on_the_instance_is_refused():
    model = nn.Sequential(nn.ReLU())
    model[0].forward = lambda x: x
    with pytest.raises(go.UnsupportedError, match=r"override of '0', a 'ReLU'.*somebody has put another one on"):
        go.override(model, {nn.ReLU: guided})


@pytest.mark.parametrize(
    "rules",
    [
        lambda model: {"blocks*": doubled, model.blocks[0]: tripled},
        lambda model: {(lambda name, module: name.startswith("blocks")): doubled, "blocks.*": tripled},
    ],
    ids=["glob", "predicate"],
)
def test_container_that_a_pattern_names_beside_modules_that_others_win_is_passed_by(rules, x):
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ReLU()])

        def forward(self, x):
            return self.blocks[0](x)

    model = Blocks()
    plain = gradient(model, x)
    with go.override(model, rules(model)):
        closely(gradient(model, x), 3 * plain)


class Disguised(nn.Module):
    @property
    def __class__(self):
        return nn.Linear

    def forward(self, x):
        return 3 * x


def test_module_that_says_it_is_of_another_class_is_refused():
    model = nn.Sequential(Disguised())
    before = dict(model[0].__dict__)
    with pytest.raises(go.UnsupportedError, match=r"override of '0', .* must say itself which class it is of"):
        go.override(model, {"0": guided})
    assert model[0].__dict__ == before
    assert type(model) is nn.Sequential


def test_container_without_a_forward_is_refused():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ReLU()])})
    with pytest.raises(go.UnsupportedError, match=r"override of 'blocks', a 'ModuleList'.*it is a container only"):
        go.override(model, {nn.ModuleList: guided})


class Static(nn.Module):
    @staticmethod
    def forward(x):
        return torch.sigmoid(x)


class OfClass(nn.Module):
    @classmethod
    def forward(cls, x):
        return torch.sigmoid(x)


class FromProperty(nn.Module):
    @property
    def forward(self):
        return torch.sigmoid


class Sigmoid:
    def __call__(self, x):
        return torch.sigmoid(x)


class FromObject(nn.Module):
    forward = Sigmoid()


class FromBuiltin(nn.Module):
    forward = torch.sigmoid


class ByKind(nn.Module):
    @functools.singledispatchmethod
    def forward(self, x):
        return 7 * x

    @forward.register
    def of_tensors(self, x: torch.Tensor):
        return torch.sigmoid(x)


class Decorator:  # itself where a class is asked for it
    def __init__(self, function):
        self.function = function

    def __get__(self, module, cls):
        return self if module is None else functools.partial(self.function, module)


class Decorated(nn.Module):
    @Decorator
    def forward(self, x):
        return torch.sigmoid(x)


NO_METHODS = {
    ByKind: "a singledispatchmethod",
    Decorated: "an object of the class Decorator",
    Static: "a static method",
    OfClass: "a class method",
    FromProperty: "a property",
    FromObject: "an object of the class Sigmoid",
    FromBuiltin: "an object of the class builtin_function_or_method",
}


@pytest.mark.parametrize(("cls", "kind"), NO_METHODS.items())
def test_forward_that_is_no_method_is_refused_and_functions_that_it_calls_are_overridden(cls, kind, x):
    model = nn.Sequential(cls())
    plain = gradient(torch.sigmoid, x)
    way_out = "Define it as a method"
    if cls in (Static, OfClass):
        way_out += rf", or give its import path as the target: '.*test_targets:{cls.__name__}\.forward'"
    text = rf"must have a method 'forward'.*; it has {kind}, .*\. {way_out}$"
    for target in (cls, "0"):
        with pytest.raises(go.UnsupportedError, match=rf"override of '0', a '{cls.__name__}': a module {text}"):
            go.override(model, {target: doubled})
    with pytest.raises(go.UnsupportedError, match=rf"override of the class '{cls.__name__}': '{cls.__name__}' {text}"):
        go.override({cls: doubled})
    with pytest.raises(go.UnsupportedError, match=rf"override of a '{cls.__name__}': a module {text}"):
        go.override(model[0], {torch.sigmoid: doubled})
    exactly(gradient(model, x), plain)
    with go.override(model, {torch.sigmoid: doubled}):
        exactly(gradient(model, x), 2 * plain)
    exactly(gradient(model, x), plain)


@pytest.mark.parametrize("cls", [Static, OfClass])
@pytest.mark.parametrize("where", ["model", "process"])
def test_forward_that_is_no_method_is_overridden_by_its_path(cls, where, x):
    model = nn.Sequential(cls())
    plain = gradient(torch.sigmoid, x)
    rules = {f"{__name__}:{cls.__name__}.forward": doubled}
    with go.override(model, rules) if where == "model" else go.override(rules):
        exactly(gradient(model, x), 2 * plain)
    exactly(gradient(model, x), plain)


def test_class_without_a_method_that_is_derived_from_an_overridden_one_is_warned_of(x):
    class Own(nn.Sigmoid):
        pass

    plain = gradient(torch.sigmoid, x)
    with go.override({Own: doubled}):
        with pytest.warns(
            go.GradOverrideWarning,
            match="override of the class 'Own': 'Derived', which is derived from it now, must have a method 'forward' "
            "to be overridden too; it has a static method, which is not told of the module",
        ):

            class Derived(Own):
                forward = staticmethod(torch.sigmoid)

        exactly(gradient(Derived(), x), plain)
        exactly(gradient(Own(), x), 2 * plain)


# --- a forward that asks for its super by the class of the module ---


class ByItsClass(nn.Linear):
    """The idiom of Python 2, which is right in the class of the module itself alone."""

    def forward(self, x):
        return super(self.__class__, self).forward(x) * 2

    def train(self, mode=True):
        self.was = super(type(self), self).train(mode).training
        return self

    def extra_repr(self):
        above = super(self.__class__, self)
        return f"twice, {above.extra_repr()}"


def tripled_whole(grad_output, vjp):
    found = vjp(grad_output)
    if isinstance(found, tuple):  # of a function
        return tuple(None if grad is None else 3 * grad for grad in found)
    return 3 * found


@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("target", [nn.Linear, ByItsClass, F.linear, F.relu])
def test_module_that_asks_for_its_super_by_its_own_class_is_what_it_was(target, compiling):
    model = nn.Sequential(ByItsClass(3, 3, dtype=torch.float64), nn.ReLU())
    bare = copy.deepcopy(model)
    x, y = noise(2, 3), noise(2, 3)
    y.data.copy_(x)
    with go.override(model, {target: tripled_whole}):
        torch.compiler.reset()
        result = (torch.compile(model, backend="aot_eager", fullgraph=True) if compiling else model)(x)
        closely(copy.deepcopy(model)(x), result)
        assert repr(model) == repr(bare)
        assert model.eval()[0].was is False
    assert type(model[0]) is ByItsClass
    result.sum().backward()
    bare(y).sum().backward()
    closely(result, bare(y))
    closely(x.grad, 3 * y.grad)


def test_module_that_asks_for_its_super_by_its_own_class_has_the_rule_for_its_parameters():
    module, x = ByItsClass(3, 3, dtype=torch.float64), noise(2, 3)
    bare = copy.deepcopy(module)
    with go.override(module, {nn.Linear: lambda grad, params, vjp: {n: 5 * g for n, g in vjp.by_name(grad).items()}}):
        module(x).sum().backward()
    bare(x.detach()).sum().backward()
    closely(module.weight.grad, 5 * bare.weight.grad)


@pytest.mark.parametrize(("build", "text"), [(lambda part: part, "it was"), (nn.Sequential, "'0' was")])
def test_warning_of_a_rule_that_never_ran_says_what_was_not_called(build, text):
    part = nn.ReLU()
    with pytest.warns(go.GradOverrideWarning, match=rf"never ran while it was in force; {text} not called"):
        go.override(build(part), {part: lambda grad_output: 2 * grad_output}).remove()
