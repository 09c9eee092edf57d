"""What cugemm raises beside the built-in ValueError and TypeError, which mean that the call was wrong.

    Exception
    +-- ValueError
    |   +-- NoKernelError      the call is right, but no kernel takes it on this GPU; lists every refusal
    +-- RuntimeError
    |   +-- CudaError          the CUDA driver said no; carries the driver's own name for it
    |   |   +-- CompileError   NVRTC said no; carries the log
    |   +-- CaptureError       something a stream capture forbids was needed; names the warm-up call
    +-- Warning
        +-- UserWarning
            +-- HostWarning    a large product runs on the CPU although a GPU is visible

A missing extra is an ImportError with the pip line that installs it. No message prints the values of an array.
"""

from __future__ import annotations


class NoKernelError(ValueError):
    """No kernel of the catalogue takes this problem; the message holds the reason of each."""


class CudaError(RuntimeError):
    """A call of the CUDA driver failed. The message holds the function, the driver's name of the error and its explanation."""


class CompileError(CudaError):
    """A kernel did not compile. The message holds NVRTC's log."""


class CaptureError(RuntimeError):
    """The call needs to compile, tune, load a module or allocate while the stream is being captured into a CUDA graph."""


class HostWarning(UserWarning):
    """Operands in host memory are computed by the NumPy reference, far slower than the GPU in this machine would."""
