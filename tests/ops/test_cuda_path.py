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
from operator_inputs import conv_inputs, inputs, outputs
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cuda
from ssm_retrieval import models
from ssm_retrieval.ops import _cuda_kernels, _route, _triton, causal_conv1d, selective_scan
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
    assert conv == ("cuda" if want else "chunks")
    assert ssd_module._choose(OnGpu(2, length, 4, 2, dtype=dtype), None) == ("cuda" if want else "chunks")


def test_auto_warns_once_where_no_kernel_fits_on_a_gpu(monkeypatch):
    _route.warn_once.cache_clear()
    monkeypatch.setattr(_cuda_kernels, "installed", lambda package: False)
    monkeypatch.setattr(_triton, "installed", lambda: False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for length, warned in ((1, 0), (7, 1), (8, 1)):  # one token is quick
            assert selective_scan._choose((OnGpu(1, length, 8), *[None] * 8), None, False) == "chunks"
            assert causal_conv1d._choose(OnGpu(1, length, 8), torch.ones(8, 4), None, None) == "chunks"
            assert len(caught) == warned  # one line for all operators
    line = str(caught[0].message)
    assert "plain PyTorch on this GPU" in line and "pip install" in line and "\n" not in line


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv1d", "ssd"])
def test_cuda_backend_refuses_float64_in_one_line(op):
    x, weight = torch.ones(1, 3, 8, dtype=torch.float64), torch.ones(8, 4, dtype=torch.float64)
    calls = {
        "selective_scan": lambda: selective_scan.selective_scan(
            x, x, -weight, x[..., :4], x[..., :4], backend="cuda"
        ),
        "causal_conv1d": lambda: causal_conv1d.causal_conv1d(x, weight, backend="cuda"),
        "ssd": lambda: ssd(*(t.double() for t in ssd_inputs(L=4)), backend="cuda"),
    }
    with pytest.raises(ValueError, match=r"^backend='cuda' takes float32, .*backend='auto'$"):
        calls[op]()


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


# --- a GPU simulated: CPU tensors count as tensors on one, and Triton's interpreter is its compiler ------


@pytest.fixture
def simulated(monkeypatch):
    """Without mamba-ssm and causal-conv1d; no equation may run token by token."""

    def never(*_):
        raise AssertionError("a loop over time")

    monkeypatch.setattr(_triton, "on_gpu", lambda x: True)
    monkeypatch.setattr(_cuda_kernels, "installed", lambda package: False)
    monkeypatch.setitem(selective_scan._RUN, "reference", never)
    _route.warn_once.cache_clear()
    yield
    _route.warn_once.cache_clear()


class Calls(TorchDispatchMode):
    """How many operators of torch were called meanwhile."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def calls(length):
    """Those of a scan with all that it can be asked for and of a convolution, and of their gradients."""
    scan, conv = inputs(1, length, 2, 1), conv_inputs(1, length, 2, 4)
    with Calls() as counted:
        results = [*outputs(scan, "auto", [0, length - 1])]
        results += causal_conv1d.causal_conv1d(**conv, activation="silu", return_last_state=True)
        sum(r.sum() for r in results).backward()
    return counted.number


@pytest.mark.skipif(not _triton.installed(), reason="triton is not installed")
def test_the_number_of_calls_on_a_gpu_does_not_depend_on_the_length(simulated):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calls(9) == calls(17) == calls(33)


def test_without_triton_a_gpu_goes_by_blocks_of_64_tokens(simulated, monkeypatch):
    monkeypatch.setattr(_triton, "installed", lambda: False)
    with pytest.warns(UserWarning, match="pip install triton"):
        one, two, three = calls(128), calls(192), calls(256)
    assert three - two == two - one  # for 64 tokens more, whose loop over time would be thousands
    assert three - two < 8 * 64


@pytest.mark.skipif(not _triton.installed(), reason="triton is not installed")
def test_which_kernel_a_gpu_takes(simulated, monkeypatch):
    """What mamba-ssm cannot do, or does more slowly where that was measured, is Triton's."""
    u, state = torch.ones(2, 9, 8), torch.ones(2, 8, 4)
    alone, continued = (u, *[None] * 8), (u, *[None] * 7, state)
    weight = torch.ones(8, 4)
    assert selective_scan._choose(alone, None, False) == "triton"
    monkeypatch.setattr(_cuda_kernels, "installed", lambda package: True)
    assert selective_scan._choose(alone, None, False) == "cuda"
    assert causal_conv1d._choose(u, weight, None, None) == "cuda"
    for given, positions, wants_grad in ((continued, None, False), (alone, [1], False), (alone, None, True)):
        assert selective_scan._choose(given, positions, wants_grad) == "triton"
    assert selective_scan._choose((u.double(), *[None] * 8), None, False) == "triton"
    assert causal_conv1d._choose(u, weight, None, torch.ones(2, 3, 8)) == "triton"
    assert causal_conv1d._choose(u, torch.ones(8, 5), None, None) == "triton"
    assert causal_conv1d._choose(u, torch.ones(8, 9), None, None) == "reference"
    monkeypatch.setitem(_triton.MEASURED, "selective_scan", ((0, "cuda"), (18, "triton")))
    assert selective_scan._choose(alone, None, False) == "triton"
    assert selective_scan._choose((u[:, 1:], *[None] * 8), None, False) == "cuda"
    seen = []

    def look(x):
        seen.append(selective_scan._choose((x, *[None] * 8), None, False))
        return x

    torch.func.vmap(look)(u[None])
    assert seen == ["chunks"]


TINY = dict(vocab_size=16, n_layer=1, d_model=16)
SSMS = {
    "mamba": dict(d_state=2), "mamba2": dict(d_state=4, headdim=8), "mamba3": dict(d_state=4, headdim=8),
    **{name: dict(d_state=4, headdim=8) for name in ("deltanet", "gated-deltanet", "kda", "gla")},
}  # fmt: skip


def training_calls(family, length):
    """Those of a loss and its gradients."""
    model = models.build(f"{family}-tiny", **TINY | SSMS[family])
    ids = torch.arange(length)[None] % 16
    with Calls() as counted:
        model.loss(ids, labels=ids)[0].backward()
    return counted.number


@pytest.mark.skipif(not _triton.installed(), reason="triton is not installed")
@pytest.mark.parametrize("family", SSMS)
def test_no_model_goes_token_by_token_on_a_gpu(simulated, monkeypatch, family):
    assert training_calls(family, 9) == training_calls(family, 17)
    monkeypatch.setattr(_triton, "installed", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, two, three = (training_calls(family, length) for length in (128, 192, 256))
    assert three - two == two - one < 8 * 64
