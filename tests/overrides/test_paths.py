"""Import paths as targets: what is there, what is made later, what is imported later. Contract, section 5."""

import copy
import functools
import importlib
import pickle
import sys
import textwrap
import warnings
from types import FunctionType

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, exactly, noise
from torch import nn

import gradoverride as go
from overrides.models import doubled, gradient, guided, negated, tripled


def plus_one(grad_output, vjp):
    return vjp(grad_output) + 1


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",  # Dynamo's own doing, for any Function
)

SOURCE = {
    "__init__": "",
    "functions": """
        import torch
        from torch import nn

        def cube(x, scale=1.0):
            return scale * x**3

        def through(x):
            return cube(x)

        class Block(nn.Module):
            def forward(self, x):
                return self.step(x) + self.still(x)

            def step(self, x):
                return cube(x)

            @staticmethod
            def still(x):
                return 2 * x

            @classmethod
            def of_class(cls, x):
                return 3 * x

        class Derived(Block):
            def forward(self, x):
                return 2 * super().forward(x)

        class Spike(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, shift=0.0):
                return (x > shift).to(x)

            @staticmethod
            def backward(ctx, grad_output):
                return grad_output, None

        def spike(x):
            return Spike.apply(x, 0.5)

        fire = Spike.apply
        still = Block.still
        of_class = Derived.of_class
        step = Block().step

        def by_another_name(name, x):
            return globals()[name](x)

        class Meta(type):
            def of_meta(cls, x):
                return 3 * x

        class Stepping(metaclass=Meta):
            def step(self, x):
                return 3 * x

            __call__ = again = step

        class SteppingMore(Stepping):
            pass

        class Slotted:
            __slots__ = ("held",)

        slotted = Slotted()
        slotted.held = lambda x: 3 * x

        def pieces(x):
            yield x**3

        class Spiking(nn.Module):
            def forward(self, x):
                return spike(x)

        NUMBER = 3
    """,
    "users": """
        from thirdparty.functions import Block, cube

        def uses(x):
            return cube(x)

        class Model(Block):
            def forward(self, x):
                return cube(x)
    """,
    "borrowers": """
        from thirdparty.functions import of_class, step, still
    """,
    "late": """
        from thirdparty.functions import cube as renamed

        def late(x):
            return renamed(x)
    """,
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `thirdparty`, of which nothing is imported yet."""
    torch.compiler.reset()
    for name, source in SOURCE.items():
        file = tmp_path / "thirdparty" / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "thirdparty"]:
        del sys.modules[name]


@pytest.fixture
def functions(package):
    import thirdparty.functions

    return thirdparty.functions


@pytest.fixture
def users(functions):
    import thirdparty.users

    return thirdparty.users


@pytest.fixture
def x():
    return noise(5, 3)


CUBE = "thirdparty.functions:cube"


class TestFunctionThatIsThere:
    def test_has_the_rule(self, functions, x):
        plain = gradient(functions.cube, x)
        with go.override({CUBE: doubled}) as plan:
            closely(gradient(functions.cube, x), 2 * plain)
            assert [(row.path, row.target, row.calls) for row in plan.table] == [
                ("(everywhere)", f"path '{CUBE}'", "1")
            ]
        exactly(gradient(functions.cube, x), plain)

    def test_is_told_in_a_model_and_without_one(self, functions, x):
        model = functions.Block()
        with go.override({CUBE: doubled, "thirdparty.functions:Block.step": guided}) as plan:
            gradient(model, x)
            assert go.explain() == plan.table
            assert go.explain(model) == plan.table
            with go.override(model, {CUBE: tripled}):
                gradient(model, x)
                assert [(row.path, row.cls, row.calls) for row in go.explain(model)] == [
                    ("(the model)", "Block", "1"),
                    *[("(everywhere)", "", "2")] * 2,
                ]
                assert go.explain() == plan.table
        assert str(go.explain()) == "nothing is overridden"

    def test_under_the_names_that_others_have_imported_it_by(self, users, functions, x):
        plain = gradient(users.uses, x)
        before = functions.cube
        with go.override({CUBE: doubled}):
            for call in (functions.through, users.uses, users.cube, users.Model(), lambda x: users.Model().step(x)):
                closely(gradient(call, x), 2 * plain)
        assert functions.cube is before is users.cube

    def test_by_a_module_that_is_imported_while_it_is_in_force(self, functions, x):
        plain = gradient(functions.cube, x)
        with go.override({CUBE: doubled}):
            import thirdparty.late

            closely(gradient(thirdparty.late.late, x), 2 * plain)
        assert thirdparty.late.renamed is functions.cube
        exactly(gradient(thirdparty.late.late, x), plain)

    def test_rule_asks_for_its_arguments(self, functions, x):
        def by_hand(grad_output, x, scale):
            return 30 * scale * x**2 * grad_output

        with go.override({CUBE: by_hand}):
            closely(gradient(lambda x: functions.cube(x, scale=2.0), x), 20 * gradient(lambda x: x**3, x))

    def test_keeps_its_name_and_signature(self, functions, x):
        import inspect

        before = inspect.signature(functions.cube)
        with go.override({CUBE: doubled}):
            assert functions.cube.__name__ == "cube"
            assert inspect.signature(functions.cube) == before
            gradient(functions.cube, x)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_compiled_before_and_after(self, users, x, backend):
        compiled = torch.compile(users.uses, backend=backend, fullgraph=True)
        plain = gradient(compiled, x)
        for _ in range(2):
            with go.override({CUBE: doubled}):
                closely(gradient(compiled, x), 2 * plain)
                closely(gradient(torch.compile(users.Model(), backend=backend, fullgraph=True), x), 2 * plain)
            closely(gradient(compiled, x), plain)

    def test_what_somebody_holds_besides_is_warned_of(self, functions, x):
        kept = {"cube": functions.cube}
        with pytest.warns(go.GradOverrideWarning, match="also held by a dict; what is called through that is not"):
            handle = go.override({CUBE: doubled})
        assert kept["cube"] is not functions.cube
        gradient(functions.cube, x)
        handle.remove()

    def test_what_a_decorated_function_calls_has_the_rule_and_nothing_is_warned_of(self, functions, x):
        decorated = go.custom_backward(tripled)(functions.through)
        plain = gradient(functions.through, x)
        with go.override({CUBE: doubled}):
            closely(gradient(decorated, x), 6 * plain)
        closely(gradient(decorated, x), 3 * plain)

    def test_what_has_been_kept_meanwhile_is_plain_afterwards(self, functions, x):
        plain = gradient(functions.cube, x)
        with go.override({CUBE: doubled}):
            kept = functools.partial(functions.cube)
            closely(gradient(kept, x), 2 * plain)
        exactly(gradient(kept, x), plain)

    def test_where_another_has_wrapped_it_meanwhile_theirs_stays(self, functions, x):
        plain = gradient(functions.cube, x)
        with go.override({CUBE: doubled}):
            ours = functions.cube
            functions.cube = theirs = lambda x: 5 * ours(x)
            closely(gradient(functions.cube, x), 10 * plain)
        assert functions.cube is theirs
        closely(gradient(functions.cube, x), 5 * plain)


class TestMethod:
    @pytest.mark.parametrize(
        ("name", "call"),
        [
            ("step", lambda cls, x: cls().step(x)),
            ("still", lambda cls, x: cls.still(x)),
            ("still", lambda cls, x: cls().still(x)),
            ("of_class", lambda cls, x: cls.of_class(x)),
            ("forward", lambda cls, x: cls()(x)),
        ],
    )
    @pytest.mark.parametrize("compiled", [False, True])
    def test_has_the_rule(self, functions, x, name, call, compiled):
        def run(x):
            return call(functions.Block, x)

        before = vars(functions.Block)[name]
        plain = gradient(run, x)
        called = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
        with go.override({f"thirdparty.functions:Block.{name}": doubled}):
            closely(gradient(called, x), 2 * plain)
        assert vars(functions.Block)[name] is before
        closely(gradient(called, x), plain)

    def test_of_a_derived_class_is_put_there_and_taken_off(self, functions, x):
        plain = gradient(functions.Block().step, x)
        with go.override({"thirdparty.functions:Derived.step": doubled}):
            exactly(gradient(functions.Block().step, x), plain)
            closely(gradient(functions.Derived().step, x), 2 * plain)
        assert "step" not in vars(functions.Derived)

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("scoped", [False, True], ids=["process", "model"])
    @pytest.mark.parametrize("name", ["still", "of_class", "step"])
    def test_is_reached_by_the_name_that_a_module_has_for_it(self, functions, x, name, scoped, compiled):
        class Model(nn.Module):
            def forward(self, x):
                return functions.by_another_name(name, x)

        model = Model()
        before = getattr(functions, name)
        plain = gradient(model, x)
        called = torch.compile(model, backend="aot_eager") if compiled else model
        rules = {f"thirdparty.functions:Block.{name}": doubled}
        with go.override(model, rules) if scoped else go.override(rules):
            import thirdparty.borrowers

            closely(gradient(called, x), 2 * plain)
            if not scoped:
                closely(gradient(getattr(thirdparty.borrowers, name), x), 2 * plain)
        assert getattr(functions, name) is before is getattr(thirdparty.borrowers, name)
        closely(gradient(called, x), plain)

    def test_of_another_class_keeps_its_own_under_other_names(self, functions, x):
        functions.of_block = functions.Block.of_class
        plain = gradient(functions.of_block, x)
        with go.override({"thirdparty.functions:Derived.of_class": doubled}):
            exactly(gradient(functions.of_block, x), plain)
            closely(gradient(functions.of_class, x), 2 * plain)

    @pytest.mark.parametrize("name", ["still", "of_class", "step"])
    def test_what_somebody_holds_besides_is_warned_of(self, functions, x, name):
        kept = {name: getattr(functions.Block(), name)}
        text = f"path 'thirdparty.functions:Block.{name}': it is also held by a dict; what is called through that"
        with pytest.warns(go.GradOverrideWarning, match=text):
            handle = go.override({f"thirdparty.functions:Block.{name}": doubled})
        gradient(getattr(functions, name), x)
        handle.remove()
        exactly(gradient(kept[name], x), gradient(getattr(functions, name), x))


class TestApplyOfAFunction:
    """A surrogate gradient in somebody's package, which is named by its `apply`."""

    SPIKE = "thirdparty.functions:Spike.apply"

    @pytest.mark.parametrize("scoped", [False, True], ids=["process", "model"])
    def test_has_the_rule(self, functions, x, scoped):
        model = functions.Spiking()
        plain = gradient(model, x)
        before = dict(vars(functions.Spike))
        rules = {self.SPIKE: tripled_first}
        with go.override(model, rules) if scoped else go.override(rules) as plan:
            closely(gradient(model, x), 3 * plain)
            assert [row.calls for row in plan.table] == ["1"]
        assert dict(vars(functions.Spike)) == before
        exactly(gradient(model, x), plain)

    def test_of_one_that_has_its_backward_from_another_has_the_rule(self, functions, x):
        class Later(functions.Spike):
            @staticmethod
            def forward(ctx, x):
                return (x > 1.0).to(x)

        functions.Later = Later
        plain, before = gradient(Later.apply, x), dict(vars(Later))
        with go.override({"thirdparty.functions:Later.apply": tripled_first}):
            closely(gradient(Later.apply, x), 3 * plain)
        assert dict(vars(Later)) == before

    def test_is_reached_by_the_name_that_a_module_has_for_it(self, functions, users, x):
        users.fire = functions.fire
        plain = gradient(functions.fire, x)
        with go.override({self.SPIKE: tripled_first}):
            for module in (functions, users):
                closely(gradient(module.fire, x), 3 * plain)
                closely(gradient(lambda x: module.fire(x, 0.5), x), 3 * plain)  # noqa: B023
        assert functions.fire is users.fire
        exactly(gradient(functions.fire, x), plain)

    def test_what_somebody_holds_besides_is_warned_of(self, functions, x):
        layer = nn.Module()
        layer.fire = functions.Spike.apply
        with pytest.warns(go.GradOverrideWarning, match=r"it is also held by an? (object|dict)"):
            handle = go.override({self.SPIKE: tripled_first})
        gradient(functions.spike, x)
        handle.remove()

    @pytest.mark.parametrize("name", ["forward", "backward"])
    def test_is_what_must_be_named_of_it(self, functions, name):
        text = rf"'{name}' of an autograd.Function is called by torch, .* path of its apply: '{self.SPIKE}'$"
        with pytest.raises(go.TargetError, match=text):
            go.override({f"thirdparty.functions:Spike.{name}": doubled})

    def test_is_told_of_where_the_function_itself_is_named(self, functions):
        way = f"Give the path of its apply: '{self.SPIKE}'$"
        with pytest.raises(go.TargetError, match=f"it names the class 'Spike'. {way}"):
            go.override({"thirdparty.functions:Spike": doubled})
        with pytest.raises(go.TargetError, match=f"must be one of modules; got the class 'Spike'. {way}"):
            go.override({functions.Spike: doubled})
        with pytest.raises(go.TargetError, match=f"is that of an autograd.Function. {way}"):
            go.override({functions.Spike.apply: doubled})

        class Local(torch.autograd.Function):
            pass

        with pytest.raises(go.TargetError, match=r"got the class 'Local'. Override the module that calls its apply$"):
            go.override({Local: doubled})

    def test_has_an_entry_for_each_of_its_arguments(self, functions, x):
        with go.override({self.SPIKE: lambda grad_output: (5 * grad_output, None)}):
            exactly(gradient(functions.spike, x), 5 * gradient(lambda x: x.view_as(x), x))

    def test_of_a_derived_function_alone(self, functions, x):
        class Derived(functions.Spike):
            pass

        functions.Derived = Derived
        with go.override({"thirdparty.functions:Derived.apply": tripled_first}):
            closely(gradient(Derived.apply, x), 3 * gradient(functions.Spike.apply, x))

    @pytest.mark.parametrize("scoped", [False, True], ids=["process", "model"])
    def test_is_refused_in_compiled_code_for_dynamo_passes_it_by(self, functions, x, scoped):
        model = functions.Spiking()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        plain = gradient(compiled, x)
        rules = {self.SPIKE: tripled_first}
        with go.override(model, rules) if scoped else go.override(rules):
            with pytest.raises(go.UnsupportedError, match=r"'thirdparty.functions:Spike.apply'.*must be called uncomp"):
                compiled(x)
            gradient(model, x)
        closely(gradient(compiled, x), plain)

    def test_other_models_may_be_compiled_meanwhile(self, functions, x):
        model, other = functions.Spiking(), torch.compile(functions.spike, backend="aot_eager", fullgraph=True)
        with go.override(model, {self.SPIKE: tripled_first}):
            closely(gradient(other, x), gradient(functions.spike, x))
            gradient(model, x)


def tripled_first(grad_output, vjp):
    found = vjp(grad_output)
    return (3 * found[0], None) if isinstance(found, tuple) else 3 * found


class TestClass:
    def test_is_overridden_with_its_modules_there_are_and_to_come(self, functions, users, x):
        block = functions.Block()
        plain = gradient(block, x)
        before = dict(vars(functions.Block))
        with go.override({"thirdparty.functions:Block": doubled}):
            closely(gradient(block, x), 2 * plain)
            closely(gradient(functions.Block(), x), 2 * plain)
            closely(gradient(users.Model(), x), 2 * gradient(lambda x: x**3, x))
        assert dict(vars(functions.Block)) == before
        exactly(gradient(block, x), plain)

    def test_is_a_class_target_in_a_model(self, functions, x):
        model = nn.Sequential(functions.Block())
        plain = gradient(model, x)
        with go.override(model, {"thirdparty.functions:Block": doubled}) as plan:
            closely(gradient(model, x), 2 * plain)
            exactly(gradient(functions.Block(), x), plain)
            assert [(row.path, row.target) for row in plan.table] == [("0", "class 'Block'")]


class TestWhatIsImportedLater:
    @pytest.mark.parametrize("path", [CUBE, "thirdparty.functions:Block", "thirdparty.functions:Block.step"])
    def test_has_the_rule(self, package, x, path):
        with go.override({path: lambda grad_output, vjp: 2 * vjp(grad_output)}) as plan:
            assert plan.table[0].calls == "0"
            import thirdparty.functions
            from thirdparty.functions import Block, cube

            called = cube if path == CUBE else Block().step if "step" in path else Block()
            plain = {CUBE: 1, "thirdparty.functions:Block.step": 1}.get(path)
            expected = gradient(lambda x: 2 * x**3 if plain else 2 * (x**3 + 2 * x), x)
            closely(gradient(called, x), expected)
            assert plan.table[0].calls == "1"
        closely(gradient(thirdparty.functions.cube, x), gradient(lambda x: x**3, x))

    def test_is_plain_when_the_override_has_gone_before(self, package, x):
        with (
            pytest.warns(go.GradOverrideWarning, match="never ran"),
            go.override({CUBE: lambda grad_output: grad_output}),
        ):
            pass
        import thirdparty.functions

        exactly(gradient(thirdparty.functions.cube, x), gradient(lambda x: 1.0 * x**3, x))

    def test_in_a_model(self, package, x):
        class Model(nn.Module):
            def forward(self, x):
                from thirdparty.functions import cube

                return cube(x)

        model = Model()
        with go.override(model, {CUBE: doubled}):
            closely(gradient(model, x), 2 * gradient(lambda x: x**3, x))
            import thirdparty.functions

            closely(gradient(thirdparty.functions.cube, x), gradient(lambda x: x**3, x))

    def test_in_two_models_in_another_order_each(self, package, x):
        class Model(nn.Module):
            def forward(self, x):
                from thirdparty.functions import cube

                return cube(x)

        one, other = Model(), Model()
        with (
            go.override(one, {CUBE: doubled}),
            go.override(one, {CUBE: plus_one}),
            go.override(other, {CUBE: plus_one}),
            go.override(other, {CUBE: doubled}),
        ):
            import thirdparty.functions

            plain = gradient(thirdparty.functions.cube, x)
            closely(gradient(one, x), 2 * plain + 1)
            closely(gradient(other, x), 2 * (plain + 1))

    def test_without_the_name_is_warned_of(self, package):
        handle = go.override({"thirdparty.functions:cub": doubled})
        with pytest.warns(go.GradOverrideWarning, match="has been imported and has no 'cub'"):
            import thirdparty.functions
        assert thirdparty.functions.NUMBER == 3
        with pytest.warns(go.GradOverrideWarning, match="never ran"):
            handle.remove()

    @pytest.mark.parametrize(
        ("path", "text"),
        [
            (CUBE, r"asks for 'skale', which does not exist"),
            ("thirdparty.functions:NUMBER", r"must name a function, a method or a class of modules; it names an int"),
        ],
    )
    def test_where_the_rule_does_not_fit_is_warned_of_and_imported(self, package, x, path, text):
        handle = go.override({path: lambda grad_output, skale: grad_output})
        with pytest.warns(go.GradOverrideWarning, match=rf"override of path '{path}': .* nothing is .*: .*{text}"):
            import thirdparty.functions
        exactly(gradient(thirdparty.functions.cube, x), gradient(lambda x: 1.0 * x**3, x))
        with pytest.warns(go.GradOverrideWarning, match="never ran"):
            handle.remove()


LOADING_AGAIN = {
    "reload": importlib.reload,
    "import after removal": lambda module: (
        sys.modules.pop(module.__name__) and importlib.import_module(module.__name__)
    ),
}


@pytest.mark.parametrize("load", LOADING_AGAIN.values(), ids=LOADING_AGAIN)
@pytest.mark.parametrize("imported", ["before", "meanwhile"])
class TestWhatIsLoadedAgain:
    def put(self, rules, imported, *model):
        if imported == "before":
            import thirdparty.functions as functions

            return go.override(*model, rules), functions
        handle = go.override(*model, rules)
        import thirdparty.functions as functions

        return handle, functions

    def test_has_the_rule(self, package, x, load, imported):
        before, loader = [*sys.meta_path], None
        handle, functions = self.put({CUBE: doubled}, imported)
        first, plain = functions.cube, gradient(lambda x: x**3, x)
        for _ in range(2):
            functions = load(functions)
            loader = functions.__spec__.loader
            assert functions.cube is not first
            closely(gradient(functions.cube, x), 2 * plain)
            closely(gradient(functions.through, x), 2 * plain)
            closely(gradient(first, x), 2 * plain)
        assert handle.table[0].calls == "6"
        handle.remove()
        exactly(gradient(functions.cube, x), gradient(first, x))
        closely(gradient(functions.cube, x), plain)
        assert functions.cube.__code__.co_filename == functions.__file__
        assert functions.__spec__.loader is functions.__loader__ is loader
        assert "exec_module" not in vars(loader)
        assert [finder for finder in sys.meta_path if type(finder).__name__ != "ImportHookFinder"] == [
            finder for finder in before if type(finder).__name__ != "ImportHookFinder"
        ]
        closely(gradient(load(functions).cube, x), plain)

    def test_has_the_rule_on_modules_of_a_class(self, package, x, load, imported):
        handle, functions = self.put({"thirdparty.functions:Block": doubled}, imported)
        plain = gradient(lambda x: x**3 + 2 * x, x)
        first = functions.Block()
        functions = load(functions)
        closely(gradient(functions.Block(), x), 2 * plain)
        closely(gradient(first, x), 2 * plain)
        forward = functions.Block.__dict__["forward"]
        handle.remove()
        assert functions.Block.__dict__["forward"] is not forward
        closely(gradient(functions.Block(), x), plain)
        closely(gradient(first, x), plain)

    def test_has_the_rule_in_a_model(self, package, x, load, imported):
        class Model(nn.Module):
            def forward(self, x):
                from thirdparty.functions import cube

                return cube(x)

        model, plain = Model(), gradient(lambda x: x**3, x)
        handle, functions = self.put({CUBE: doubled}, imported, model)
        functions = load(functions)
        closely(gradient(model, x), 2 * plain)
        closely(gradient(functions.cube, x), plain)
        handle.remove()
        closely(gradient(model, x), plain)

    def test_has_the_rules_of_several_overrides(self, package, x, load, imported):
        inner, functions = self.put({CUBE: doubled}, imported)
        outer, _ = self.put({CUBE: lambda grad_output, vjp: vjp(grad_output) + 1}, imported)
        functions, plain = load(functions), gradient(lambda x: x**3, x)
        closely(gradient(functions.cube, x), 2 * plain + 1)
        inner.remove()
        closely(gradient(functions.cube, x), plain + 1)
        outer.remove()
        closely(gradient(functions.cube, x), plain)


@pytest.mark.parametrize(("name", "kind"), [("step", FunctionType), ("still", staticmethod), ("of_class", classmethod)])
def test_a_method_of_a_class_that_is_loaded_again_has_the_rule(functions, x, name, kind):
    plain = gradient(getattr(functions.Block(), name), x)
    with go.override({f"thirdparty.functions:Block.{name}": tripled}):
        importlib.reload(functions)
        closely(gradient(getattr(functions.Block(), name), x), 3 * plain)
    closely(gradient(getattr(functions.Block(), name), x), plain)
    assert type(functions.Block.__dict__[name]) is kind


def test_a_module_whose_code_raises_when_it_is_loaded_again_keeps_the_rule(functions, x, tmp_path):
    source = tmp_path / "thirdparty" / "functions.py"
    plain = gradient(functions.cube, x)
    with go.override({CUBE: doubled}):
        source.write_text("raise ValueError('half a module')")
        importlib.invalidate_caches()
        with pytest.raises(ValueError, match="half a module"):
            importlib.reload(functions)
        closely(gradient(functions.cube, x), 2 * plain)
        source.write_text("def cube(x): return 5 * x\nraise ValueError('one function of it')")
        with pytest.raises(ValueError, match="one function of it"):
            importlib.reload(functions)
        closely(gradient(functions.cube, x), gradient(lambda x: 10 * x, x))
    closely(gradient(functions.cube, x), gradient(lambda x: 5 * x, x))


def test_a_module_that_is_loaded_again_without_the_name_is_warned_of(functions, tmp_path, x):
    gradient_of_it = functions.cube
    with go.override({CUBE: doubled}):
        gradient(gradient_of_it, x)
        gradient(functions.cube, x)
        (tmp_path / "thirdparty" / "functions.py").write_text("def cubic(x): return x")
        del functions.cube
        with pytest.warns(go.GradOverrideWarning, match="has been imported and has no 'cube'; nothing is overridden"):
            importlib.reload(functions)


class TestInAModel:
    def test_calls_elsewhere_are_as_ever(self, users, functions, x):
        model = nn.Sequential(users.Model())
        plain = gradient(model, x)
        with go.override(model, {CUBE: doubled}) as plan:
            closely(gradient(model, x), 2 * plain)
            exactly(gradient(functions.cube, x), plain)
            exactly(gradient(users.Model(), x), plain)
            assert [(row.path, row.target, row.calls) for row in plan.table] == [("(the model)", f"path '{CUBE}'", "1")]
        exactly(gradient(model, x), plain)

    def test_compiled(self, users, x):  # once: Dynamo keeps modules by name, and these are imported anew for each test
        model = nn.Sequential(users.Model())
        plain = gradient(model, x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        gradient(compiled, x)
        with go.override(model, {CUBE: doubled}):
            closely(gradient(compiled, x), 2 * plain)
        closely(gradient(compiled, x), plain)

    def test_of_several_the_later_is_outside(self, users, x):
        told = []

        def telling(name):
            def rule(grad_output, vjp):
                told.append(name)
                return 2 * vjp(grad_output)

            return rule

        model = nn.Sequential(users.Model())
        plain = gradient(model, x)
        with go.override({CUBE: telling("first")}), go.override(model, {CUBE: telling("second")}):
            closely(gradient(model, x), 4 * plain)
            assert told == ["second", "first"]
            closely(gradient(users.uses, x), 2 * plain)

    def test_of_two_models_is_one_call_in_each(self, users, x):
        one, other = nn.Sequential(users.Model()), nn.Sequential(users.Model())
        both = nn.Sequential(one, other)
        plain, of_both = gradient(one, x), gradient(both, x)
        with go.override(one, {CUBE: tripled}), go.override(other, {CUBE: tripled}):
            closely(gradient(one, x), 3 * plain)
            closely(gradient(other, x), 3 * plain)
            closely(gradient(both, x), 9 * of_both)

    def test_of_two_models_in_another_order_each(self, users, x):
        one, other = users.Model(), users.Model()
        plain = gradient(one, x)
        with (
            go.override(one, {CUBE: doubled}),
            go.override(one, {CUBE: plus_one}),
            go.override(other, {CUBE: plus_one}),
            go.override(other, {CUBE: doubled}),
        ):
            closely(gradient(one, x), 2 * plain + 1)
            closely(gradient(other, x), 2 * (plain + 1))

    def test_removal_out_of_order(self, users, functions, x):
        plain, before = gradient(functions.cube, x), functions.cube
        first = go.override({CUBE: doubled})
        second = go.override({CUBE: tripled})
        closely(gradient(functions.cube, x), 6 * plain)
        first.remove()
        closely(gradient(functions.cube, x), 3 * plain)
        second.remove()
        assert functions.cube is before is users.cube

    def test_two_paths_of_one_function(self, users, functions, x):
        plain, before = gradient(functions.cube, x), functions.cube
        first = go.override({CUBE: doubled})
        second = go.override({"thirdparty.users:cube": tripled})
        closely(gradient(users.uses, x), 6 * plain)
        first.remove()
        closely(gradient(users.uses, x), 3 * plain)
        second.remove()
        assert functions.cube is before is users.cube

    @pytest.mark.parametrize("whole", [False, True], ids=["in a model", "in the whole process"])
    @pytest.mark.parametrize(
        ("paths", "call"),
        [
            ((CUBE, "thirdparty.users:cube"), lambda users: users.Model()),
            (("thirdparty.functions:Block.still", "thirdparty.users:Block.still"), lambda users: users.Block()),
        ],
    )
    def test_of_two_paths_of_one_function_in_an_override_the_later_wins(self, users, x, paths, call, whole):
        model = nn.Sequential(call(users))
        one, both = {paths[0]: tripled}, {paths[1]: doubled, paths[0]: tripled}
        with go.override(one) if whole else go.override(model, one):
            expected = gradient(model, x)
        with go.override(both) if whole else go.override(model, both):
            closely(gradient(model, x), expected)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "copy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
class TestCopyOfAModel:
    """It has its rules for good, on a function that is another's too."""

    def test_has_the_rules_when_those_of_the_original_are_gone(self, users, functions, x, copied):
        before = functions.cube
        model = users.Model()
        plain = gradient(model, x)
        with go.override(model, {CUBE: doubled}), go.override(model, {CUBE: tripled}):
            other = copied(model)
            closely(gradient(model, x), 6 * plain)
            closely(gradient(other, x), 6 * plain)
        closely(gradient(other, x), 6 * plain)
        exactly(gradient(model, x), plain)
        exactly(gradient(functions.cube, x), plain)
        go.remove_overrides(other)
        exactly(gradient(other, x), plain)
        assert functions.cube is before is users.cube

    def test_keeps_them_in_their_order_whichever_goes_first(self, users, functions, x, copied):
        model = users.Model()
        plain = gradient(model, x)
        with go.override(model, {CUBE: doubled}) as first, go.override(model, {CUBE: plus_one}):
            other = copied(model)
            closely(gradient(model, x), 2 * plain + 1)
            first.remove()
            closely(gradient(model, x), plain + 1)
            closely(gradient(other, x), 2 * plain + 1)
        closely(gradient(other, x), 2 * plain + 1)
        go.remove_overrides(other)

    def test_that_is_gone_leaves_nothing_behind(self, users, functions, x, copied):
        before = functions.cube
        model = users.Model()
        with go.override(model, {CUBE: doubled}):
            other = copied(model)
            gradient(model, x)
            del other
        assert functions.cube is before is users.cube

    def test_goes_on_when_the_original_is_overridden_again(self, users, x, copied):
        model = users.Model()
        plain = gradient(model, x)
        with go.override(model, {CUBE: doubled}):
            gradient(model, x)
            other = copied(model)
        with go.override(model, {CUBE: doubled}), go.override(other, {CUBE: doubled}):
            closely(gradient(model, x), 2 * plain)
            closely(gradient(other, x), 4 * plain)
        closely(gradient(other, x), 2 * plain)
        go.remove_overrides(other)


def test_a_pickle_that_is_loaded_after_the_override_has_the_rule_of_a_path(users, functions, x):
    before = functions.cube
    model = users.Model()
    plain = gradient(model, x)
    with go.override(model, {CUBE: doubled}):
        gradient(model, x)
        data = pickle.dumps(model)
    assert functions.cube is before
    loaded = pickle.loads(data)
    closely(gradient(loaded, x), 2 * plain)
    go.remove_overrides(loaded)
    assert functions.cube is before


def test_a_pickle_whose_path_names_nothing_any_more_is_an_error(users, functions, monkeypatch, x):
    model = users.Model()
    with go.override(model, {CUBE: doubled}):
        gradient(model, x)
        data = pickle.dumps(model)
    monkeypatch.delattr(functions, "cube")
    with pytest.raises(go.TargetNotFoundError, match=r"'thirdparty\.functions' must have 'cube'; it has not"):
        pickle.loads(data)


class TestTheForwardOfModulesThatHaveARule:
    """One rule for a call, and of several overrides the later one outside."""

    TEXT = r"a call must have one rule of each override, .* forward of a '{}', which has .* by the {}, and would"

    @pytest.mark.parametrize("target", ["Block", "glob", "instance"])
    def test_is_refused_beside_it_in_a_model(self, functions, x, target):
        model = nn.Sequential(functions.Block())
        plain = gradient(model, x)
        target, name = {
            "Block": (functions.Block, "class 'Block'"),
            "glob": ("0", "glob '0'"),
            "instance": (model[0], "module Block"),
        }[target]
        for rules in ({target: doubled, FORWARD: tripled}, {FORWARD: tripled, target: doubled}):
            with pytest.raises(go.UnsupportedError, match=self.TEXT.format("Block", name)):
                go.override(model, rules)
        exactly(gradient(model, x), plain)

    @pytest.mark.parametrize("whole", [False, True])
    def test_is_refused_after_it_and_may_come_before(self, functions, x, whole):
        model = nn.Sequential(functions.Block())
        plain = gradient(model, x)
        put = go.override if whole else functools.partial(go.override, model)
        text = self.TEXT.format("Block", "class 'Block'")
        with put({functions.Block: doubled}):
            with pytest.raises(go.UnsupportedError, match=text):
                put({FORWARD: tripled})
            with pytest.raises(go.UnsupportedError, match=text):
                go.override(model, {FORWARD: tripled})
            closely(gradient(model, x), 2 * plain)
        with put({FORWARD: doubled}), put({functions.Block: lambda grad_output, vjp: vjp(grad_output) + 1}):
            closely(gradient(model, x), 2 * plain + 1)
        exactly(gradient(model, x), plain)

    def test_is_refused_in_the_whole_process_for_a_derived_class(self, functions, x):
        class Inheriting(functions.Block):
            pass

        with pytest.raises(go.UnsupportedError, match=self.TEXT.format("Inheriting", "class 'Inheriting'")):
            go.override({Inheriting: doubled, FORWARD: tripled})

    def test_what_the_forward_calls_is_a_call_of_its_own(self, functions, x):
        model = functions.Block()
        plain = gradient(lambda x: x**3, x)
        with go.override(model, {functions.Block: doubled, CUBE: tripled}):
            closely(gradient(model, x), 6 * plain + 2 * gradient(lambda x: 2 * x, x))


FORWARD = "thirdparty.functions:Block.forward"


class TestFunctionOfTorch:
    def test_is_one_in_all_its_spellings(self, x):
        class Model(nn.Module):
            def forward(self, x):
                return x.relu() + torch.relu(x)

        model = Model()
        plain = gradient(model, x)
        with go.override(model, {"torch.nn.functional:relu": doubled}) as plan:
            closely(gradient(model, x), 2 * plain)
            assert plan.table[0].target == "function 'relu'"


class TestErrors:
    @pytest.mark.usefixtures("functions")
    @pytest.mark.parametrize(
        ("path", "text"),
        [
            ("thirdparty.functions:cub", "must have 'cub'; it has not. The closest names are 'cube'"),
            ("thirdparty.functions:Block.stp", "must have 'Block.stp'; it has not. The closest names are 'step'"),
            ("thirdparty.functions:Blok.step", "must have 'Blok'; it has not. The closest names are 'Block'"),
            ("thirdparty.functons:cube", "a module 'thirdparty.functons' must be there, to be imported later"),
            ("thirdprty.functions:cube", "a module 'thirdprty' must be there"),
            ("thirdparty.functions.more:cube", "a module 'thirdparty.functions.more' must be there"),
        ],
    )
    def test_of_what_is_not_there(self, path, text):
        with pytest.raises(go.TargetNotFoundError, match=text):
            go.override({path: doubled})

    @pytest.mark.usefixtures("functions")
    @pytest.mark.parametrize(
        ("path", "text"),
        [
            ("thirdparty.functions:NUMBER", "must name a function, a method or a class of modules; it names an int"),
            ("thirdparty.functions:", "reads 'package.module:attribute'"),
            (":cube", "reads 'package.module:attribute'"),
            ("a b:cube", "reads 'package.module:attribute'"),
            ("collections:OrderedDict", "it names the class 'OrderedDict'"),
        ],
    )
    def test_of_what_cannot_be_overridden(self, path, text):
        with pytest.raises(go.TargetError, match=text):
            go.override({path: doubled})

    @pytest.mark.parametrize(("path", "kind"), [("layer", "a"), ("layer.forward", "a method of a")])
    def test_of_a_module_whose_parameters_would_lose_their_gradients(self, functions, x, path, kind):
        functions.layer = nn.Linear(3, 3).to(x.dtype)
        path = f"thirdparty.functions:{path}"
        text = rf"override of path '{path}': .* it names {kind} 'Linear' that is there, .* Give the module itself"
        with pytest.raises(go.TargetError, match=text):
            go.override({path: negated})
        functions.layer.requires_grad_(False)
        plain = gradient(functions.layer, x)
        with go.override({path: lambda grad_output, vjp: -vjp(grad_output)}):
            closely(gradient(functions.layer, x), -plain)

    def test_of_a_rule_whose_names_do_not_fit_and_nothing_is_changed(self, functions):
        before = functions.cube
        with pytest.raises(go.RuleSignatureError, match=r"asks for 'skale', which does not exist.*mean 'scale'"):
            go.override({CUBE: lambda grad_output, skale: grad_output})
        assert functions.cube is before


def test_a_path_in_a_registry_beside_other_targets(users, x):
    rules = go.Registry("mixed")
    rules.register(CUBE, nn.ReLU, F.relu)(doubled)
    model = nn.Sequential(users.Model(), nn.ReLU())
    plain = gradient(model, x)
    with go.override(model, rules):
        closely(gradient(model, x), 4 * plain)


def test_nothing_is_warned_of_where_all_is_reached(users, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with go.override({CUBE: negated}):
            gradient(users.uses, x)
        with go.override({"thirdparty.functions:Block.step": guided}):
            gradient(users.Block(), x)


@pytest.mark.parametrize("name", ["Stepping", "SteppingMore"])
def test_other_names_of_a_method_in_its_class_have_its_rule(functions, name, x):
    cls = getattr(functions, name)
    before = dict(vars(cls))
    plain = gradient(cls().step, x)
    with go.override({f"thirdparty.functions:{name}.step": doubled}):
        for called in (cls().step, cls().again, cls()):
            exactly(gradient(called, x), 2 * plain)
        if cls is not functions.Stepping:
            exactly(gradient(functions.Stepping(), x), plain)
    assert dict(vars(cls)) == before
    exactly(gradient(cls(), x), plain)


def test_method_of_a_metaclass_is_refused_by_the_path_of_a_class(functions, x):
    text = r"it must name what stands in the class; 'of_meta' stands in its metaclass, 'Meta' of thirdparty\.functions"
    with pytest.raises(go.TargetError, match=text):
        go.override({"thirdparty.functions:Stepping.of_meta": doubled})
    plain = gradient(functions.Stepping.of_meta, x)
    with go.override({"thirdparty.functions:Meta.of_meta": doubled}):
        exactly(gradient(functions.Stepping.of_meta, x), 2 * plain)


def test_what_an_object_without_a_dict_holds_is_refused(functions):
    with pytest.raises(go.TargetError, match=r"'held' is that of a 'Slotted', which has none\. Give"):
        go.override({"thirdparty.functions:slotted.held": doubled})


@pytest.mark.parametrize("where", ["process", "model"])
def test_path_of_what_no_rule_can_be_for_leaves_nothing_behind(functions, where, x):
    before, model = functions.pieces, nn.Sequential(nn.ReLU())
    rules = {"thirdparty.functions:pieces": doubled, nn.ReLU: doubled}
    plain = gradient(model, x)
    with pytest.raises(go.DecorationError, match=r"'pieces' .* gives a generator, which runs later"):
        go.override(rules) if where == "process" else go.override(model, rules)
    assert functions.pieces is before
    assert not [*go.explain()]
    exactly(gradient(model, x), plain)
    functions.pieces = functions.cube
    with go.override({"thirdparty.functions:pieces": doubled}):
        exactly(gradient(functions.pieces, x), 2 * gradient(functions.cube.__wrapped__, x))
