"""What of the CUDA path can be checked without a GPU: adapters, error lines, the benchmark's arithmetic."""

from __future__ import annotations

import importlib
import importlib.machinery
import subprocess
import sys
import types

import pytest
import torch
from conftest import import_without_kernels

from benchmarks import cuda
from models.ops import _cuda_kernels
from models.ops.ssd import ssd, ssd_reference

SCAN = "mamba_ssm.ops.selective_scan_interface"


@pytest.fixture(autouse=True)
def fresh():
    _cuda_kernels.kernel.cache_clear()
    yield
    _cuda_kernels.kernel.cache_clear()


def ssd_inputs(L=256, b=2, H=4, P=8, G=2, N=6):
    g = torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(b, L, *s, generator=g) for s in ((H, P), (G, N), (G, N)))
    dt, A = 0.1 * torch.rand(b, L, H, generator=g), -torch.rand(H, generator=g)
    return [t.requires_grad_() for t in (x, dt, A, B, C)]


def test_arguments_reach_mamba2s_kernel_as_it_wants_them():
    """mamba-ssm's reference in the kernel's place: outputs and gradients of `ssd`."""
    kernel = import_without_kernels("mamba_ssm.ops.triton.ssd_combined").ssd_chunk_scan_combined_ref
    inputs = ssd_inputs()
    got, last = _cuda_kernels.in_chunk_scan_layout(kernel, *inputs, None, False)
    want = ssd(*inputs, backend="chunks")
    assert last is None
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


def test_real_signature_takes_what_the_adapter_gives():
    """The kernel's own signature, states and options included, with our recurrence behind it."""
    import inspect

    real = import_without_kernels("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    signature, start = inspect.signature(real), torch.randn(2, 4, 8, 6)

    def kernel(*args, **kwargs):
        a = signature.bind(*args, **kwargs).arguments
        assert a["return_final_states"] and a["chunk_size"] == 256
        return ssd_reference(*(a[name] for name in ("x", "dt", "A", "B", "C", "initial_states")))

    inputs = ssd_inputs(L=20)
    got = _cuda_kernels.in_chunk_scan_layout(kernel, *inputs, start, True)
    want = ssd(*inputs, initial_state=start, return_last_state=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def loading(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)


@pytest.mark.parametrize(
    "error, said",
    [
        (ModuleNotFoundError("No module named 'mamba_ssm'", name="mamba_ssm"), "not installed: pip install"),
        (ModuleNotFoundError("No module named 'einops'", name="einops"), "needs einops"),
        (ModuleNotFoundError("No module", name="selective_scan_cuda"), "needs selective_scan_cuda"),
        (ImportError("selective_scan_cuda.so: undefined symbol:\n _ZN3c10"), r"undefined symbol: _ZN3c10"),
        (OSError("libcudart.so.12: cannot open shared object file"), "libcudart.so.12.*--force-reinstall"),
        (RuntimeError("triton found\nno driver"), "triton found no driver"),
    ],
)
def test_a_package_that_does_not_load_is_one_line(monkeypatch, error, said):
    loading(monkeypatch, error)
    with pytest.raises(ImportError, match=said) as caught:
        _cuda_kernels.kernel(SCAN, "selective_scan_fn")
    line = str(caught.value)
    assert "\n" not in line and "pip install --no-build-isolation" in line and "mamba-ssm" in line


def fake(monkeypatch, **functions):
    module = types.ModuleType("causal_conv1d")
    module.__spec__ = importlib.machinery.ModuleSpec("causal_conv1d", None)
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)


def test_an_old_package_is_one_line(monkeypatch):
    fake(monkeypatch)
    with pytest.raises(ImportError, match=r"no causal_conv1d\.causal_conv1d_fn: pip install .*-U"):
        _cuda_kernels.kernel("causal_conv1d", "causal_conv1d_fn")
    with pytest.raises(ImportError, match=r"it has no causal_conv1d\.new: pip install .*-U"):
        _cuda_kernels.kernel("causal_conv1d.new", "f")
    fake(monkeypatch, causal_conv1d_fn=lambda x, weight: x)
    with pytest.raises(ImportError, match=r"does not take activation: pip install .*causal-conv1d>=1\.4"):
        _cuda_kernels.kernel("causal_conv1d", "causal_conv1d_fn", "activation")


def test_cuda_backend_of_ssd_refuses_what_it_cannot(monkeypatch):
    inputs = ssd_inputs(L=4)
    with pytest.raises(ValueError, match="use backend='auto'"):
        ssd(*inputs, states_at=[1], backend="cuda")
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        ssd(*inputs, backend="fast")
    loading(monkeypatch, ModuleNotFoundError("no", name="mamba_ssm"))
    with pytest.raises(ImportError, match="pip install --no-build-isolation 'mamba-ssm"):
        ssd(*inputs, backend="cuda")


@pytest.mark.parametrize("op, fast", [("selective_scan", "cpu"), ("causal_conv1d", "cpu"), ("ssd", "auto")])
def test_benchmark_compares_every_result(op, fast):
    """On a CPU, where other backends stand in for the kernels."""
    found = cuda.errors(op, torch.float32, "cpu", fast)
    assert {"y", *(f"d{name}" for name in cuda.op_inputs(op, torch.float32, "cpu"))} <= found.keys()
    assert max(found.values()) < 1e-4


def test_benchmark_sees_an_error(monkeypatch, capsys):
    monkeypatch.setattr(cuda, "errors", lambda *_: {"y": float("nan")})
    assert not cuda.report_errors("cpu", lambda op: "cpu")
    assert "error ssd bfloat16 y nan  EXCEEDS" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_benchmark_without_a_gpu_is_one_line():
    done = subprocess.run([sys.executable, "-m", "benchmarks.cuda"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == cuda.NO_GPU + "\n" and not done.stdout
