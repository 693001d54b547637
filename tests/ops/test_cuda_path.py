"""What of the CUDA path can be checked without a GPU: adapters, error lines, the benchmark's arithmetic."""

from __future__ import annotations

import importlib
import importlib.machinery
import subprocess
import sys
import types
import warnings

import pytest
import torch
from conftest import import_without_kernels

from benchmarks import cuda
from ssm_retrieval.ops import _cuda_kernels, _route, causal_conv1d, selective_scan
from ssm_retrieval.ops import ssd as ssd_module
from ssm_retrieval.ops.ssd import ssd, ssd_reference

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


class OnGpu:
    """What choosing a backend asks a CUDA tensor: device, dtype, shape."""

    device = torch.device("cuda:0")

    def __init__(self, *shape, dtype=torch.float32):
        self.shape, self.dtype = torch.Size(shape), dtype

    def numel(self):
        return self.shape.numel()


@pytest.fixture
def with_packages(monkeypatch):
    monkeypatch.setattr(_cuda_kernels, "installed", lambda package: True)


HALF = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
@pytest.mark.parametrize("length", [0, 1, 9])
def test_auto_takes_a_cuda_kernel_for_what_it_accepts(with_packages, dtype, length):
    """selective_scan.cpp and causal_conv1d.cpp check for these dtypes, and index a last token."""
    want = dtype in HALF and length > 0
    u = OnGpu(2, length, 8, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scan = selective_scan._choose((u, *[None] * 8), None, False)
    assert scan == ("cuda" if want else "chunks")
    conv = causal_conv1d._choose(u, torch.ones(8, 4), None, None)
    assert conv == ("cuda" if want else "reference")
    assert causal_conv1d._choose(u, torch.ones(8, 5), None, None) == "reference"
    assert ssd_module._choose(OnGpu(2, length, 4, 2, dtype=dtype), None) == ("cuda" if want else "chunks")


def test_auto_warns_once_where_no_kernel_fits_on_a_gpu(monkeypatch):
    _route.warn_once.cache_clear()
    monkeypatch.setattr(_cuda_kernels, "installed", lambda package: False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length, warned in ((1, 0), (7, 1), (8, 1)):  # one token is quick
            assert selective_scan._choose((OnGpu(1, length, 8), *[None] * 8), None, False) == "chunks"
            assert len(caught) == warned
    line = str(caught[0].message)
    assert "plain PyTorch on this GPU" in line and "pip install" in line and "\n" not in line


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d", "ssd"])
def test_cuda_backend_refuses_float64_in_one_line(op):
    inputs = {k: v.detach().double() for k, v in cuda.op_inputs(op, torch.float32, "cpu").items()}
    modules = {"selective_scan": selective_scan, "causal_conv1d": causal_conv1d, "ssd": ssd_module}
    function = getattr(modules[op], op)
    with pytest.raises(ValueError, match=r"^backend='cuda' takes float32, .*backend='auto'$"):
        function(**inputs, backend="cuda")


def test_one_token_reaches_causal_conv1d_with_strides_in_multiples_of_8():
    """The first token of mamba2-tiny, batch 1: a slice of in_proj's output, rows of 644 numbers."""
    seen = []

    def kernel(x, weight, bias, activation):
        seen.append(x.stride())
        return x * weight[:, -1].unsqueeze(-1) + bias.unsqueeze(-1)

    sliced = torch.randn(1, 1, 644)[..., 128:512]
    assert sliced.is_contiguous() and sliced.stride(0) % 8
    weight, bias = torch.randn(384, 4), torch.randn(384)
    y = causal_conv1d.in_causal_conv1d_layout(kernel, sliced, weight, bias, None)
    ((batch, channel, token),) = seen
    assert (batch % 8, channel, token % 8) == (0, 1, 0)
    torch.testing.assert_close(y, causal_conv1d.causal_conv1d(sliced, weight, bias))
