"""What is known of a decorated callable before it is ever called: its forward, its rule, and what they need.

Everything that can be decided once is decided here, so that a call decides little.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from gradoverride._core.autograd.function import General, Transformed, named
from gradoverride._core.binding.contract import shape_text
from gradoverride._core.binding.layout import Layout, Layouts
from gradoverride._core.binding.own_backward import OwnBackward
from gradoverride._core.binding.rule import Rule
from gradoverride._core.binding.signature import RESERVED, Forward, resolve, runs_later, unknown_name
from gradoverride._core.calls.asking import asks_grad
from gradoverride._core.calls.opaque_call import step_of
from gradoverride._core.calls.state import names_kept
from gradoverride._core.calls.tracers import EXPORT, recorded_as, warn
from gradoverride._core.graph.captured import captured_names
from gradoverride._core.private.dynamo import fail, step_of_graph
from gradoverride._core.private.engine import call_directly, can_call_directly, fast_apply
from gradoverride._core.private.marks import evaluated_while_tracing
from gradoverride._core.private.tensors import made_at_import
from gradoverride._core.python import purity, scan
from gradoverride._core.python.by_class import standing
from gradoverride._core.python.reach import (
    Reach,
    attribute_names,
    calls_unseen,
    methods_called,
    names_assigned_in,
    names_changed_in,
    names_filled_in,
    names_in,
)
from gradoverride._core.python.residuals import close_frame, open_frame, save_for_backward
from gradoverride.errors import (
    DecorationError,
    ForwardResultError,
    GradOverrideWarning,
    RuleResultError,
    RuleSignatureError,
    UnsupportedError,
)

__all__ = ["NamesLeft", "Plan"]

_GIVING_DATA = ("data", "set_")
_LAYING_OUT = (
    *("as_strided_", "resize_", "resize_as_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_", "unsqueeze_"),
)
_SHARING = ("as_subclass", "as_tensor", "asarray", "detach", "from_dlpack", "view")  # a view of another dtype is none


class NamesLeft(NamedTuple):
    """The attributes of a module in which a forward may leave something for its rule."""

    read: frozenset[str] | None  # by the rule; None: any
    assigned: frozenset[str]  # by the forward
    filled: frozenset[str]  # that hold a container which it may put something into
    changed: frozenset[str]  # that hold one which the rule itself changes, as a stack


class Plan:
    """A forward and its rule."""

    _unread: Plan  # see `as_read`

    def __init__(self, forward: Forward, rule: Rule, *, class_form: bool = False, is_edit: bool = False) -> None:
        self.forward = forward
        self.jvp = rule.jvp
        self.straight_through = rule.straight_through
        self.on_first_call = rule.on_first_call
        self.rule = rule = rule.for_forward(forward)
        self.needs_floating = rule.straight_through or getattr(rule.fn, "needs_floating", False)  # for its result
        self.fn: Callable[..., Any] = forward.fn
        later = runs_later(self.fn)
        if later is not None:
            raise DecorationError(
                f"{forward.who} must return its result when it is called, for the rule {rule.who} to be its backward; "
                f"it gives {later}, which runs later. Give the rule to the function that computes the tensors, and "
                "call that there"
            )
        self.rule_comes_with_call = False  # one of the same code: see `Reading`
        self.marked = False  # whether what it saves is to be told from what the bare forward saves: see `mark`
        self.on_trace: Callable[[], None] | None = None  # when Dynamo traces a call
        self.on_unrecorded: Callable[[Any], None] | None = None  # when a call of a receiver records no graph
        self.wrapper: Any = None  # what a user calls
        self.make_as_function: Callable[[], None] | None = None  # of a method: see `called_as_function`
        self.as_function: Any = None
        self.takes_receiver = forward.is_method
        self.tensor_defaults = {p.name: p.default for p in forward.parameters or () if isinstance(p.default, Tensor)}
        self.class_form = class_form  # the rule is a method called `backward`, whose self is a stand-in
        self.own_backward = rule.once(OwnBackward, lambda: OwnBackward.of(rule.fn)) if class_form else None
        self.is_edit = is_edit  # of `edit_gradient`: an answer mirrors the only argument, if that is a dict too
        self.hands_over = self._hands_over()
        self.sources = resolve(rule, forward, may_defer=forward.is_method or self.hands_over)
        self.jvp_sources = self._sources_of_jvp()
        # Names that a parameter of the module may supply, and those of them that may be residuals instead.
        self.asked_of_module = frozenset(name for name, source in self.sources.items() if source != "argument")
        self.may_be_residuals = scan.strings(self.fn) & self.asked_of_module if self.hands_over else frozenset[str]()
        self.reserved = frozenset(name for name, source in self.sources.items() if source == "reserved")
        self.asks_vjp = "vjp" in self.reserved
        self.asks_params = "params" in self.reserved
        self.asks_module = bool(self.reserved & {"module", "forward"}) or class_form
        self._read_forward(forward.owner)
        self.rule_code = code = rule.code
        # Calls read these here: each further dot is time, and a guard where Dynamo traces it.
        self.rule_writes = code.writes
        self.may_answer = code.strings
        self.calls_vjp_once = code.calls_vjp_once
        self.through_aliases = code.names_by_name  # whether all parameters are reached through aliases
        self.general = named(General, forward.name)
        if can_call_directly():
            call_directly(self.general, General.backward)
        self.apply = fast_apply(self.general)
        self.transformed = named(Transformed, forward.name)
        self._subclasses: dict[Any, Plan] = {}
        self._backwards: dict[Any, Any] = {}  # by class, the one that its plan was made for
        self._kept: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()
        self._left: weakref.WeakKeyDictionary[Any, NamesLeft] = weakref.WeakKeyDictionary()
        self.told_of_state = self.told_of_held = False
        self.layouts = Layouts(forward)
        self.steps = SimpleNamespace()  # Dynamo needs a place to know an object by

    def _read_forward(self, owner: Any) -> None:
        """What the code of the forward tells, and that of the methods of its class that it calls on its `self`."""
        mentions = functools.partial(scan.mentions, self.fn, cls=owner)
        self.own_methods = methods_called(self.fn, owner) if self.takes_receiver else []
        self.reach = Reach.of(self.fn, method=self.takes_receiver, owner=owner)
        attributes = self.reach.attributes if self.reach is not None else frozenset[str]()
        self.forward_is_arithmetic = purity.is_arithmetic(self.fn, attributes)
        self.forward_gives_alike = purity.gives_alike(self.fn)
        writes = purity.writes(self.fn, cls=owner)
        # Modules of torch have one forward for both, and `self.inplace` says which it is.
        self.inplace_tells = writes and "inplace" in attributes and not purity.writes(self.fn, but="inplace", cls=owner)
        self.forward_may_write = not purity.writes_nothing(self.fn, owner)
        # Whether it may change a container that it is given.
        self.forward_may_change = self.forward_may_write or bool(names_assigned_in(self.fn, owner))
        # What it may do with aliases: to attributes that not every tensor has, and to their data.
        self.attribute_names = attribute_names(self.fn, method=self.takes_receiver)
        self.uses_attributes = self.reach is None or bool(self.attribute_names)
        # Whether the forward asks if a tensor requires grad: such a one runs where aliases do as the arguments do, in a
        # graph. None if that cannot be told before it is called.
        self.forward_asks_grad = asks_grad(self.fn)
        self._asking: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self._asking_alike: dict[frozenset[weakref.ref[Any]], bool] = {}
        self.may_give_data = mentions(*_GIVING_DATA, *_LAYING_OUT) or calls_unseen(self.fn)
        # It may lay an argument out anew: that it does to an alias, for the argument's own layout is to be known after.
        self.may_lay_out = mentions(*_LAYING_OUT)
        # Whether the forward may run in its Function, as one by hand does: what it can reach besides has no gradient.
        self.runs_inside = self.reach is not None and not (self.asks_vjp or self.may_lay_out)
        # Whether its result may lie where an argument does, and be no view: as its code shows it, or does not show.
        self.may_give_memory = self.forward_may_write or mentions(*_SHARING)
        # Whether arguments that the rule asks for are to be kept as they were given: torch counts no write of these.
        self.keeps_given = purity.normalizes(self.fn, owner) and "argument" in self.sources.values()

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            f"{self.forward.who} has a rule, {self.rule.who}, and must be found by its name in a module that can be "
            "imported, to be pickled; it was to be pickled by value, as cloudpickle does with what a notebook or a "
            "script defines. Move it into a module, or use override, whose rules are pickled with the model"
        )

    @property
    def who(self) -> str:
        """How messages about the rule begin."""
        return f"rule {self.rule.who} of {self.forward.who}"

    @property
    def second_derivative_is_unknown(self) -> str:
        """The text of the error for that of parameters which are left to autograd, whose graph begins at aliases."""
        return (
            f"the second derivative of {self.forward.who} with respect to its arguments, through parameters "
            f"that the rule {self.rule.who} leaves to autograd, needs the graph of the forward. "
            "Ask for 'vjp' in the rule, which keeps it"
        )

    @functools.cached_property
    def mark(self) -> Tensor:
        """A tensor without values, whose shape identifies the rule.

        Saved so that a replay under another rule, or under none, is noticed: a checkpoint sees that what is saved is
        something else, and raises.
        """
        return made_at_import(0, self.rule.number)

    def _hands_over(self) -> bool:
        """Whether the forward hands over values, or may do so where nobody sees it and the rule asks for one."""
        owner = self.forward.owner
        if any(scan.calls(fn, save_for_backward, owner) for fn in (self.fn, inspect.unwrap(self.fn))):
            return True
        if self.forward.is_method or {*self.forward.names, *RESERVED}.issuperset(self.rule.asks):
            return False
        return calls_unseen(inspect.unwrap(self.fn))

    def _sources_of_jvp(self) -> dict[str, str]:
        """Where the names come from that the user's own forward mode asks for."""
        if self.jvp is None:
            return {}
        sources = resolve(self.jvp, self.forward, may_defer=self.forward.is_method or self.hands_over)
        for name, source in sources.items():
            if source == "reserved" and name not in ("input", "output"):
                raise RuleSignatureError(
                    f"jvp {self.jvp.who} asks for '{name}', which belongs to a backward. Ask for arguments, for what "
                    "is handed over, for parameters, 'input' or 'output'"
                )
        return sources

    @functools.cached_property
    def recorded(self) -> Callable[..., Any]:
        """What torch.fx records as called, always the same."""
        return recorded_as(self.forward.name, self.wrapper)

    @evaluated_while_tracing
    def add_step(self, key: Any, arguments: Any, changed: Any, differentiate: Callable[..., Any]) -> str:
        """The name under which `steps` has one for a layout and these arguments: see `opaque_call.py`."""
        name = f"step_{len(vars(self.steps))}"
        setattr(
            self.steps, name, step_of_graph(step_of(self, self.layouts.found[key], arguments, changed, differentiate))
        )
        return name

    @evaluated_while_tracing
    def note_trace(self) -> None:
        """Dynamo traces a call."""
        if self.on_trace is not None:
            self.on_trace()

    def of_instance(self, module: Any) -> Plan:
        """The plan for a module of the class form, whose class may have a `backward` of its own."""
        if "backward" in module.__dict__:
            fail(
                UnsupportedError,
                f"{self.forward.who} must have its 'backward' from its class; somebody has put another on the "
                "instance, which would not be called. Put it on a subclass, or give the instance a rule: "
                "go.override(model, {module: rule})",
            )
        cls = type(module)
        if cls.backward is self.rule.fn:
            return self
        self._read_subclass(cls)
        return self._subclasses[cls]

    @evaluated_while_tracing
    def _read_subclass(self, cls: Any) -> None:
        if self._backwards.get(cls) is cls.backward:
            return
        self._backwards[cls] = cls.backward
        # That of a subclass with a forward of its own is for it, and not for the one that it reaches by `super()`.
        owners = (owner for owner in cls.__mro__ if standing(owner, "forward") is self.wrapper)
        backward = next(owners, cls).backward
        same = backward is self.rule.fn
        self._subclasses[cls] = self if same else Plan(self.forward, Rule(backward, method=True), class_form=True)

    def as_read(self, receiver: Any) -> Plan:
        """The plan for a receiver: where it has other methods than were read, one that has read none."""
        replaced = any([name.key in receiver.__dict__ for name in self.own_methods])
        if not replaced and self._has_those_read(type(receiver)):
            return self
        self._make_unread()
        return self._unread

    @evaluated_while_tracing
    def _has_those_read(self, cls: Any) -> bool:
        return all([standing(cls, name.key) is name.value for name in self.own_methods])

    @evaluated_while_tracing
    def _make_unread(self) -> None:
        if "_unread" not in self.__dict__:
            self._unread = unread = Plan.__new__(Plan)
            unread.__dict__.update(self.__dict__, steps=SimpleNamespace())
            unread._read_forward(None)

    def names_kept(self, cls: Any) -> tuple[str, ...]:
        """The attributes in which the forward may keep something from one call of a module of `cls` to the next."""
        known = self._kept.get(cls)
        if known is None:
            known = self._kept[cls] = names_kept(self.fn, cls)
        return known

    def names_left(self, cls: Any) -> NamesLeft:
        """What the rule may read of a module of `cls`, as their code shows it."""
        known = self._left.get(cls)
        if known is None:
            known = self._left[cls] = NamesLeft(
                names_in(self.rule.fn, cls),
                names_assigned_in(self.fn, cls),
                names_filled_in(self.fn, cls),
                names_changed_in(self.rule.fn, cls),
            )
        return known

    def asks_grad(self, module: Any = None) -> bool:
        """Whether the forward, of this module perhaps, asks if a tensor requires grad."""
        if self.forward_asks_grad:
            return True
        if module is None:
            if self.forward_asks_grad is None:
                self.forward_asks_grad = asks_grad(self.fn) is not False
            return self.forward_asks_grad
        found = self._asking.get(module)
        if found is None:
            parts = [*module.modules()]
            held = [one for part in parts for one in vars(part).values() if isinstance(one, FunctionType)]
            alike = frozenset(map(weakref.ref, {*map(type, parts), *held}))  # those of equal blocks
            if alike not in self._asking_alike:
                self._asking_alike[alike] = asks_grad(self.fn, module) is not False
            found = self._asking[module] = self._asking_alike[alike]
        return found

    @evaluated_while_tracing
    def asks_grad_while_tracing(self, *classes: Any) -> bool:
        """The same of a module whose parts are of these classes: one that is handed on is guarded by its identity."""
        return asks_grad(self.fn, *classes) is not False

    @evaluated_while_tracing
    def attribute_names_of(self, cls: Any) -> tuple[str, ...]:
        """`attribute_names`, and those in the methods of the receiver's class that the forward calls."""
        return attribute_names(self.fn, method=self.takes_receiver, cls=cls if self.takes_receiver else None)

    @evaluated_while_tracing
    def attribute_names_in_backward(self, cls: Any) -> tuple[str, ...]:
        """The same of the `backward` of a class."""
        return attribute_names(self.rule.fn, method=True, cls=cls)

    def invoke(self, layout: Layout, receiver: Any, values: Sequence[Any]) -> Any:
        """The undecorated forward on these values."""
        if layout.given is not None:
            count, named = layout.given
            positional = values[:count]
            keywords = {name: values[index] for name, index in named}
        else:
            positional = values[: layout.positional]
            keywords = dict(zip(layout.keywords, values[layout.positional :], strict=True))
        if self.takes_receiver:
            return self.fn(receiver, *positional, **keywords)
        return self.fn(*positional, **keywords)

    def collecting(self, layout: Layout, receiver: Any, values: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        """The same, and what the forward hands over."""
        frame = open_frame()
        try:
            result = self.invoke(layout, receiver, values)
        finally:
            close_frame()
        return result, frame

    def read_as_function(self, make: Callable[[], Any]) -> None:
        """`make` gives what to call instead where the receiver is a tensor. Few are, so it is made when one is met."""

        @evaluated_while_tracing
        def once() -> None:
            if self.as_function is None:
                self.as_function = make()

        self.make_as_function = once

    def called_as_function(self, layout: Layout, receiver: Any, values: Sequence[Any]) -> Any:
        """A call of a method of a class of tensors: the receiver is its first argument."""
        assert self.make_as_function is not None, "the caller has looked"
        self.make_as_function()
        keywords = dict(zip(layout.keywords, values[layout.positional :], strict=True))
        return self.as_function(receiver, *values[: layout.positional], **keywords)

    def undecorated(self, layout: Layout, receiver: Any, values: Sequence[Any]) -> Any:
        """A call where no gradient is wanted: the original, and nothing else happens."""
        if not self.hands_over:
            return self.invoke(layout, receiver, values)
        return self.collecting(layout, receiver, values)[0]  # or it would go to a decorated call around this one

    # --- messages (some are put together while tracing: Dynamo knows no cells, and no search for the closest name) ---

    @evaluated_while_tracing
    def warn_of_export(self) -> None:
        """Say that what torch.export records has no rule."""
        warn(self, EXPORT)

    @evaluated_while_tracing
    def captured_names(self) -> str:
        """The tensors that the forward reaches besides its arguments, by names: where no graph can be looked at."""
        return ", ".join(captured_names(self.forward.fn))

    @evaluated_while_tracing
    def unknown_name(self, name: str, *more: str) -> str:
        """What to say of a name that nothing supplies: see `signature.unknown_name`."""
        return str(unknown_name(self.rule, self.forward, name, more))

    @evaluated_while_tracing
    def warn_of_first(self, first: str, others: str) -> None:
        """Say that the gradient goes to the first differentiable argument alone, which wants none."""
        warnings.warn(
            f"{self.forward.who} lets the gradient through to its first differentiable argument alone, '{first}', "
            f"which wants none: so none gets to {others}. Make that the first argument, or detach() it",
            GradOverrideWarning,
            stacklevel=2,
        )

    def note(self, error: Exception) -> None:
        """Note on an exception that the rule raised whose rule it was."""
        note = f"in the {self.who}"
        if self.class_form and isinstance(error, TypeError) and "NoneType" in str(error):
            note += (
                ", where the grad of each parameter is None until it is assigned: autograd adds it to what was "
                "accumulated before. Assign it (=) before anything is added to it (+=)"
            )
        error.add_note(note)

    def refuse_written(self) -> NoReturn:
        """The rule wrote into the gradient itself."""
        fail(
            RuleResultError,
            f"{self.who} must not write into the gradient it is given, "
            "which other gradients share; it did. Write into grad_output.clone()",
        )

    def refuse_residuals(self) -> NoReturn:
        """A gradient has come to what the forward handed over."""
        fail(
            UnsupportedError,
            f"the second derivative of {self.forward.who} through the values that its forward hands over needs "
            f"the graph of the forward. Ask for 'vjp' in the rule {self.rule.who}, which keeps it (not under "
            "torch.func), or compute them in the rule",
        )

    def refuse_answered(self, name: str) -> NoReturn:
        """Compiled: what the gradient of the result flows on to was settled before the rule answered."""
        fail(
            RuleResultError,
            f"{self.who} answers for the parameter '{name}' and must ask for it where it is compiled, by its name or "
            "by 'params'",
        )

    def refuse_unassigned(self, name: str) -> NoReturn:
        """The `backward` of a class left out a parameter."""
        fail(
            RuleResultError,
            f"{self.rule.who} of {self.forward.who} must assign self.{name}.grad (None "
            "stops its gradient), or ask for 'vjp' as a further parameter, which leaves "
            f"'{name}' to autograd; it did neither",
        )

    def check_straight_through(self, argument: Any, result: Any) -> None:
        """The identity as a gradient needs a result of the shape of the argument."""
        if argument != result:
            fail(
                ForwardResultError,
                f"{self.forward.who} must return a tensor of shape {shape_text(argument)}, the shape of its first "
                f"differentiable argument, for the gradient to pass straight through; it returned one of shape "
                f"{shape_text(result)}. Give a surrogate with that result: straight_through(surrogate=...)",
            )
