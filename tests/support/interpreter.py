"""Triton's interpreter, which runs the kernels without a GPU; ``conftest.py`` enables it."""

import functools

import numpy as np


@functools.cache
def mend() -> None:
    """Let Triton 3.6 loop up to a loaded number: it uses an array of size one as an integer, which numpy 2.5 refuses.

    Triton 3.7 needs no patch.
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
