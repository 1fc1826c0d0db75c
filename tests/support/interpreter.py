"""A patch for Triton's interpreter, which runs the kernels without a GPU; ``conftest.py`` enables the interpreter."""

import functools

import numpy as np


@functools.cache
def mend() -> None:
    """Patch Triton 3.6 so that a loop's limit may be a value loaded by the kernel.

    Triton 3.6 uses an array of size one as an integer, which NumPy 2.5 rejects. Triton 3.7 needs no patch.
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
