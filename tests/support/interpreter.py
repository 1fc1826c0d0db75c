"""Triton's interpreter, which runs the kernels where there is no GPU; ``conftest.py`` switches it on."""

import functools

import numpy as np


@functools.cache
def mend() -> None:
    """Let Triton 3.6 loop up to a number it has loaded: it takes an array of one for an integer, as numpy 2.5 does not.

    Triton 3.7 needs no mending.
    """
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.6.") or np.lib.NumpyVersion(np.__version__) < "2.5.0":
        return
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
