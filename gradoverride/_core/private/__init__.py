"""Every private name of torch that this library uses, with the reason and the public way that stands in for it.

Private names move between releases, so they are named here and nowhere else, and each has a public fallback that is
right, only slower; where there is none, what needs it is refused. `tests/core/fallbacks.py` runs the suite on the
fallbacks too.

Elsewhere are those alone that everybody's code reads: the tables of a module (`_parameters`, `_buffers`, `_modules`),
and the `_version`, `_is_view()` and two kinds of hooks of a tensor; the names of torch's modules where code is read;
and `_is_replica`, in `forward_pass.py`, for Dynamo guards each constant of a module.
"""
