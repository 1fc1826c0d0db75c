"""A patch for Triton's interpreter, which runs kernels without a GPU. ``conftest.py`` enables the interpreter."""

import functools

import numpy as np


@functools.cache
def mend() -> None:
    """Patch Triton 3.6 so that a loop's limit can be a value that the kernel has loaded.

    For such a limit, Triton 3.6 converts an array of size one to an integer, but NumPy 2.5 rejects this conversion.
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
