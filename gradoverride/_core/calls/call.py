"""One invocation: what is known of it, from its forward to its backward.

`forward_pass.py` fills it in, `backward_pass.py` reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gradoverride._core.autograd.ambient import EAGER, TRACED, TRANSFORMED, Autocast, autocast_while_tracing
from gradoverride._core.autograd.function import fresh
from gradoverride._core.binding.contract import Meta
from gradoverride._core.binding.layout import Layout
from gradoverride._core.calls.backward_pass import Backward
from gradoverride._core.calls.forward_mode import transpose
from gradoverride._core.calls.params import Param
from gradoverride._core.calls.plan import Plan
from gradoverride._core.values.structure import LEAF, Constant, Node, flatten, unflatten
from gradoverride._core.values.tensors import is_differentiable

__all__ = ["Asked", "Call"]


class Asked:
    """One value that the rule asks for: its structure, and where its tensors are among the saved ones."""

    __slots__ = ("name", "slots", "spec")

    def __init__(self, name: str, spec: Any, slots: list[int]) -> None:
        self.name = name
        self.spec = spec
        self.slots = slots

    def value(self, saved: Sequence[Tensor]) -> Any:
        if self.spec is LEAF:
            return saved[self.slots[0]]
        return unflatten(self.spec, iter([saved[slot] for slot in self.slots]))


class Call:
    """What is known of one call, from its forward to its backward. It holds no tensors that torch should save."""

    plan: Plan
    layout: Layout
    mode: str
    opaque: bool  # whether Dynamo is to look through it only, for torch.func transforms: `opaque_call.py`
    rule: Any  # that of the plan, or one of the same code
    names: tuple[str, ...]  # of the arguments, from the layout
    groups: dict[str, tuple[int, ...]]
    variadic: str | None
    autocast: Any  # the state that the rule is to run under
    # From the arguments (`take_apart`):
    specs: list[Any]  # by argument, its structure
    ends: list[int]  # by argument, the number of leaves up to its last
    holders: list[int]  # the arguments that hold leaves
    single: int | None  # the only one of them, if there is one only: its gradient is returned bare
    n_leaves: int  # a leaf is a floating or complex tensor among the arguments
    metas: list[Meta]  # by leaf, what its gradient must be like
    wanted: list[bool]  # by leaf, whether a gradient is wanted
    # From the module (`params.find_params`):
    params: list[Param]
    aliased: list[Param]
    natural: list[Param]
    frozen: dict[str, Tensor]
    unsettled: bool  # whether the forward may yet hand over what else is a parameter that the rule asks for
    # From the result (`ForwardPass`):
    rules: Sequence[Any]  # of overrides, that were called in the forward; known in a transform alone
    result: Any  # its structure
    n_outs: int  # the number of floating or complex tensors in it
    out_metas: list[Meta]
    alias_of: list[int | None]  # by such tensor, the leaf that it is as it stands
    dirty: list[int]  # leaves that were written into
    copies: list[int]  # leaves that were written into and are copied back (not in eager mode)
    flows: list[bool]  # by such tensor, whether its gradient flows on to natural parameters
    residual_metas: list[Meta]
    outer: list[Tensor]  # with natural parameters and no kept graph: what leads to the arguments
    n_residuals: int  # floating residuals are outputs of the Function besides
    first_out: int  # where the results stand among its inputs
    # For the rule:
    graph: Any  # behind `vjp` (`inner_graph.py`)
    token: Tensor | None  # what keeps it, on its way into the saved tensors
    transposed: bool  # whether forward mode has been through this call
    module: nn.Module | None
    receiver: Any  # of a method: its object, where that is no module
    buffers: dict[str, Any]
    then: dict[str, int | None]  # of buffers and frozen parameters that are shown, the versions
    training: dict[str, bool]  # whether each part of the module was in training, by prefix
    left: list[Asked]  # what the forward assigned to attributes of the module that the rule reads, by dotted name
    computed: dict[str, Any]  # parametrized weights by dotted name, as the forward read them; then where they are saved
    asked: list[Asked]
    held: Any  # tensors within objects that the forward handed over: `held.HandedOver`
    saved: list[int]  # by saved tensor, where among inputs and results it stands
    # Where values are among the saved tensors:
    given: set[str]  # names in `asked`, which take precedence over reserved ones
    module_slots: dict[str, int]

    __slots__ = tuple(__annotations__)

    def __init__(self, plan: Plan, layout: Layout, mode: str, rule: Any = None, opaque: bool = False) -> None:
        self.plan = plan
        self.layout = layout
        self.mode = mode
        self.opaque = opaque
        self.rule = plan.rule.fn if rule is None else rule
        self.names = layout.names
        self.groups = layout.groups
        self.variadic = layout.variadic
        self.autocast = autocast_while_tracing() if mode == TRACED else Autocast()
        self.params = []
        self.aliased = []
        self.natural = []
        self.frozen = {}
        self.unsettled = False
        self.dirty = []
        self.asked = []
        self.held = None
        self.saved = []
        self.graph = None
        self.transposed = False
        self.token = None
        self.module = None
        self.receiver = None
        self.buffers = {}
        self.then = {}
        self.training = {}
        self.left = []
        self.computed = {}

    # --- taking the call apart ------------------------------------------------------------------------------

    def take_apart(self, values: Sequence[Any]) -> list[Tensor]:
        """The differentiable tensors among the arguments; notes their structure and what their gradients look like."""
        leaves: list[Tensor] = []
        specs, ends = [], []
        for value in values:
            specs.append(flatten(value, is_differentiable, leaves))
            ends.append(len(leaves))
        everywhere = self.mode == TRANSFORMED
        wanted = [everywhere or leaf.requires_grad for leaf in leaves]
        if everywhere and self.plan.tensor_defaults:  # these no transform can track
            defaults = list(map(id, self.plan.tensor_defaults.values()))
            wanted = [leaf.requires_grad or id(leaf) not in defaults for leaf in leaves]
        self._describe(specs, ends, [Meta(leaf) for leaf in leaves], wanted)
        return leaves

    def describe_plain(self, places: Sequence[int], metas: list[Meta], wanted: Sequence[bool]) -> None:
        """As `take_apart`, for a call whose arguments at `places` were tensors and the others scalars."""
        indices = range(len(self.names))
        specs = [LEAF if index in places else Constant(None) for index in indices]
        self._describe(specs, [sum(place <= index for place in places) for index in indices], metas, list(wanted))

    def describe_tuple(self, metas: list[Meta]) -> None:
        """As `take_apart`, for a call whose only argument was a tuple of tensors."""
        self._describe([Node(tuple, None, [LEAF] * len(metas))], [len(metas)], metas, [True] * len(metas))

    def _describe(self, specs: list[Any], ends: list[int], metas: list[Meta], wanted: list[bool]) -> None:
        self.specs = specs
        self.ends = ends
        self.holders = [index for index, end in enumerate(ends) if end > (ends[index - 1] if index else 0)]
        self.single = self.holders[0] if len(self.holders) == 1 else None
        self.n_leaves = len(metas)
        self.metas = metas
        self.wanted = wanted

    def describe_params(self, names: Sequence[str], metas: Sequence[Meta]) -> None:
        """As `params.find_params`, for parameters that the rule asks for."""
        self.params = [Param(name, None, meta) for name, meta in zip(names, metas, strict=True)]
        for param in self.params:
            param.asked = True

    @property
    def answers_dict_bare(self) -> bool:
        """Whether a dict as the answer is the gradient of a dict, and not gradients by the names of arguments."""
        return self.plan.is_edit and isinstance(self.specs[0], Node) and issubclass(self.specs[0].kind, dict)

    def needs(self) -> dict[str, bool]:
        """By name, whether a gradient is wanted: of arguments (each of `*args` as "args[0]" too), of parameters."""
        wanted = {name: any(self.wants(index) for index in indices) for name, indices in self.groups.items()}
        wanted.update({name: self.wants(index) for index, name in enumerate(self.names) if name not in wanted})
        return {
            **wanted,
            **dict.fromkeys(self.frozen, False),
            **{param.name: True for param in self.params},
            **wanted,  # an argument comes before a parameter of its name
        }

    @property
    def asks_once(self) -> bool:
        """Whether `vjp` is called once, and nothing is left to autograd that is to be asked for after it."""
        return self.plan.calls_vjp_once and not self.natural and all([param.asked for param in self.aliased])

    def places_of(self, index: int) -> range:
        """Where those of the argument at `index` stand among the leaves."""
        return range(self.ends[index - 1] if index else 0, self.ends[index])

    def wants(self, index: int) -> bool:
        """Whether a gradient is wanted for the argument at `index`."""
        return any([self.wanted[place] for place in self.places_of(index)])

    @property
    def passed_alone(self) -> int | None:
        """The only argument with tensors beside those that have one as their default and want no gradient."""
        defaults = self.plan.tensor_defaults
        passed = [index for index in self.holders if self.names[index] not in defaults or self.wants(index)]
        return passed[0] if len(passed) == 1 else None

    def metas_of(self, index: int) -> list[Meta]:
        return [self.metas[place] for place in self.places_of(index)]

    def name_of_leaf(self, leaf: int) -> str:
        return next(name for name, end in zip(self.names, self.ends, strict=True) if leaf < end)

    # --- what the Function calls ---

    def results(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The forward of the Function: new tensor objects with the values of the forward's results."""
        results = []
        taken = set()
        for k, index in enumerate(self.alias_of):
            out = tensors[self.first_out + k]
            if self.mode != EAGER:
                results.append(out.clone())
            elif index is None or index in taken:
                results.append(fresh(out))
            elif ~k in self.saved and index not in self.dirty:
                taken.add(index)
                results.append(tensors[index].view_as(tensors[index]))  # torch would save the input for it
            else:
                taken.add(index)  # torch makes a view of it, or its next version if it was written into
                results.append(tensors[index])
        for residual in tensors[self.first_out + self.n_outs :]:
            results.append(residual.clone() if self.mode != EAGER else residual.detach())
        return tuple(results)

    def tensors_to_save(self, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
        """What the rule asks for, in the order of its slots, and the kept graph."""
        saved = [tensors[place] if place >= 0 else results[~place] for place in self.saved]
        if self.token is not None:
            saved.append(self.token)
            self.token = None
        return saved

    def backward(self, ctx: Any, grad_outputs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One gradient for each input of the Function, by the rule."""
        return Backward(self, ctx).run(grad_outputs)

    def jvp(self, ctx: Any, tangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Forward mode: the rule is linear in the gradient, and its transpose is the JVP."""
        backward = Backward(self, ctx)
        count = self.n_leaves + len(self.params)
        self.transposed = True
        # Those of residuals matter to derivatives of a higher order alone, which are refused (`Backward.run`).
        zeros = [meta.zeros() for meta in self.residual_metas]
        if self.plan.jvp is not None:
            own = backward.tangents(self.plan.jvp, tangents[:count])
            return (*own, *zeros)

        def gradients(*grads: Tensor) -> list[Tensor | None]:
            leaf_grads, param_grads, _ = backward.gradients(list(grads))
            return [*leaf_grads, *param_grads]

        found = transpose(gradients, self.out_metas, list(tangents[:count]), self.plan.who)
        return (*found, *zeros)
