"""Random cases for the interpreter."""

from __future__ import annotations

import torch
from hypothesis import assume
from hypothesis import strategies as st

from fuzz.interpreter import Argument, Case, Made, Pair, Record, Same, is_floating, parts_of, tensors_of

SHAPES = st.sampled_from([(), (2,), (2, 3), (1, 2)])
CONSTANTS = st.sampled_from([None, "mode", 3, 2.5, True])
FACTORS = st.sampled_from([None, 1.0, -2.0, 0.5])
CONTAINERS = st.sampled_from([list, tuple, dict, Pair, Record])
BOOLEANS = st.booleans()
UP_TO = [st.integers(0, most) for most in range(8)]
# Strategies are made once: hypothesis takes longer to make one than to draw from it.


def rarely(draw):
    return draw(UP_TO[7]) == 7


def floating(draw):
    shape = draw(SHAPES)
    dtype = torch.float32 if rarely(draw) else torch.float64
    first = draw(UP_TO[4]) - 2
    values = torch.arange(first, first + torch.Size(shape).numel(), dtype=dtype).reshape(shape)
    return values.requires_grad_(draw(UP_TO[3]) < 3)


def nested(draw, leaf, depth=2):
    """A leaf, or containers of them."""
    if depth == 0 or draw(UP_TO[2]) < 2:
        return leaf(draw)
    kind = draw(CONTAINERS)
    if kind in (Pair, Record):
        return kind(nested(draw, leaf, depth - 1), nested(draw, leaf, depth - 1))
    parts = [nested(draw, leaf, depth - 1) for _ in range(draw(UP_TO[2]))]
    return dict(zip("pq", parts, strict=False)) if kind is dict else kind(parts)


def in_an_argument(draw):
    return (floating, floating, lambda draw: draw(CONSTANTS), lambda draw: torch.tensor([1, 2]))[draw(UP_TO[3])](draw)


def in_a_result(draw):
    which = draw(UP_TO[4])
    if which < 2:
        return Made(draw(SHAPES))
    if which == 2:
        return Same(draw(UP_TO[3]))
    return draw(CONSTANTS) if which == 3 else torch.tensor([3, 4])


def _made(result):
    return [part for part in parts_of(result) if isinstance(part, (Made, Same))]


@st.composite
def cases(draw, kinds=("function", "method", "override")):
    """A signature, a call, a result, and a rule that is right for them."""
    seen = []  # tensors, some of which come again

    def value():
        if seen and rarely(draw):
            return seen[draw(UP_TO[7]) % len(seen)]
        drawn = nested(draw, in_an_argument)
        seen.extend(tensors_of(drawn))
        return drawn

    positional = ["a", "b", "c"][: draw(UP_TO[3])]
    with_default = draw(UP_TO[len(positional)])
    only = draw(UP_TO[len(positional)])  # of these, positional-only
    has_args, has_kwargs = draw(BOOLEANS), draw(BOOLEANS)
    keyword_only = ["k", "m"][: draw(UP_TO[2])]
    keyword_default = draw(UP_TO[2])
    constants = {name: draw(CONSTANTS) for name in (*positional, *keyword_only)}

    header, arguments, args, kwargs = [], [], [], {}
    extra = draw(UP_TO[2]) if has_args else 0
    by_position = True
    for index, name in enumerate(positional):
        defaults = index >= len(positional) - with_default
        header.append(f"{name}={constants[name]!r}" if defaults else name)
        if index + 1 == only:
            header.append("/")
        given = not defaults or (by_position and extra > 0) or draw(BOOLEANS)
        if by_position and not extra and index >= only and (not given or draw(BOOLEANS)):
            by_position = False
        if index < only and not by_position:
            given = False
        if not given and by_position:
            by_position = False
        passed = value() if given else constants[name]
        if given and by_position:
            args.append(passed)
        elif given:
            kwargs[name] = passed
        arguments.append((name, passed))
    if has_args:
        header.append("*args")
        for _ in range(extra if by_position else 0):
            passed = value()
            args.append(passed)
            arguments.append(("args", passed))
    if keyword_only and not has_args:
        header.append("*")
    for index, name in enumerate(keyword_only):
        defaults = index < keyword_default
        header.append(f"{name}={constants[name]!r}" if defaults else name)
        given = not defaults or draw(BOOLEANS)
        passed = value() if given else constants[name]
        if given:
            kwargs[name] = passed
        arguments.append((name, passed))
    if has_kwargs:
        header.append("**kwargs")
        for name in ["u", "v"][: draw(UP_TO[2])]:
            kwargs[name] = passed = value()
            arguments.append((name, passed))
    names = [*positional, *(["args"] if has_args else []), *keyword_only, *(["kwargs"] if has_kwargs else [])]
    tensors = [tensor for _, passed in arguments for tensor in tensors_of(passed)]
    assume(any(tensor.requires_grad for tensor in tensors))

    kind = kinds[draw(UP_TO[len(kinds) - 1])]
    result = nested(draw, in_a_result)
    assume(_made(result))
    holders = [index for index, (_, passed) in enumerate(arguments) if tensors_of(passed)]
    answer, weight_factor, asked = _answer(draw, kind, [passed for _, passed in arguments], holders)
    asked += [name for name in [*names, "input", "output", "needs"] if draw(UP_TO[2]) == 0]
    return Case(
        header=", ".join(header),
        names=names,
        args=tuple(args),
        kwargs=kwargs,
        arguments=[Argument(name, passed, [draw(FACTORS) for _ in tensors_of(passed)]) for name, passed in arguments],
        variadic="args" if has_args else None,
        result=result,
        asked=asked,
        answer=answer,
        kind=kind,
        weight_factor=weight_factor,
        chosen=_chosen(draw, len(_made(result))),
    )


def _answer(draw, kind, values, holders):
    """The form of the answer, and what becomes of the module's parameter."""
    if kind != "function":
        weight_factor = ("left", "left", 2.0, None)[draw(UP_TO[3])]
        asks = draw(BOOLEANS)
        if weight_factor != "left":
            return "dict", weight_factor, ["weight"] if asks else []
    forms = ["tuple", "list", "trimmed", "dict", "vjp", "by_name"]
    if len(holders) == 1:
        # A sequence as the answer is then the gradient of a sequence; a dict is by names of arguments.
        held = values[holders[0]]
        forms = ["bare", "dict", "vjp", "by_name"]
        if is_floating(held):
            forms += ["tuple", "list", "trimmed"]
        elif isinstance(held, dict):
            forms.remove("bare")
            forms.remove("vjp")
    answer = forms[draw(UP_TO[len(forms) - 1])]
    return answer, "left", ["vjp"] if answer in ("vjp", "by_name") else []


def _chosen(draw, count):
    """Which of the results go into the loss; at least one."""
    chosen = [draw(BOOLEANS) for _ in range(count)]
    chosen[draw(UP_TO[7]) % count] = True
    return chosen
