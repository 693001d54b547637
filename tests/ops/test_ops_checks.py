"""Wrong arguments of every operator: always one ValueError, never a crash, never a silent number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ssm_retrieval import models
from ssm_retrieval.ops.causal_conv1d import causal_conv1d
from ssm_retrieval.ops.cross_entropy import linear_cross_entropy
from ssm_retrieval.ops.delta_rule import delta_rule
from ssm_retrieval.ops.linear import linear
from ssm_retrieval.ops.selective_scan import selective_scan
from ssm_retrieval.ops.ssd import ssd, ssd_reference


def drawn(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def scan_inputs():
    given = drawn(u=(2, 5, 6), dt=(2, 5, 6), A=(6, 3), B=(2, 5, 3), C=(2, 5, 3), D=(6,), z=(2, 5, 6))
    given |= drawn(dt_bias=(6,), initial_state=(2, 6, 3))
    return {**given, "A": -given["A"].abs()}


def ssd_inputs():
    given = drawn(x=(2, 5, 4, 3), dt=(2, 5, 4), A=(4,), B=(2, 5, 2, 3), C=(2, 5, 2, 3))
    return {**given, **drawn(initial_state=(2, 4, 3, 3)), "A": -given["A"].abs(), "dt": given["dt"].abs()}


def delta_inputs():
    given = drawn(q=(2, 5, 4, 3), k=(2, 5, 4, 3), v=(2, 5, 4, 6), beta=(2, 5, 4), log_decay=(2, 5, 4))
    return {**given, **drawn(initial_state=(2, 4, 6, 3)), "log_decay": -given["log_decay"].abs()}


def conv_inputs():
    return drawn(x=(2, 5, 6), weight=(6, 4), bias=(6,), initial_state=(2, 3, 6))


def loss_inputs():
    return {**drawn(x=(2, 5, 6), weight=(7, 6)), "labels": torch.arange(10).view(2, 5) % 7}


def linear_inputs():
    return drawn(x=(2, 5, 6), weight=(7, 6), bias=(7,))


OPERATORS = {
    "selective_scan": (selective_scan, scan_inputs),
    "ssd": (ssd, ssd_inputs),
    "delta_rule": (delta_rule, delta_inputs),
    "causal_conv1d": (causal_conv1d, conv_inputs),
    "linear_cross_entropy": (linear_cross_entropy, loss_inputs),
    "linear": (linear, linear_inputs),
}
# what may have another size: the length of a convolution, the vocabulary, the rows of a linear map
FREE = {
    ("causal_conv1d", "x", 1),
    ("linear_cross_entropy", "weight", 0),
    ("linear", "x", 0),
    ("linear", "x", 1),
}
SIZES = ("longer", "shorter", "empty", "axis more", "axis less")
OTHER_DTYPES = [torch.complex64, torch.int64, torch.int32, torch.bool, torch.uint8]


def wrong(data, operator, name, x):
    """x spoilt in one way that is always an error: shape, dtype, device, layout or type."""
    axis = data.draw(st.integers(0, x.dim() - 1), label="axis")
    kind = data.draw(st.sampled_from((*SIZES, "dtype", "device", "type")), label="kind")
    assume(kind not in SIZES or (operator, name, axis) not in FREE)
    assume((operator, name, kind) != ("linear", "x", "axis more"))
    if kind == "longer":
        return torch.cat([x, x.narrow(axis, 0, 1)], axis)
    if kind == "shorter":
        return x.narrow(axis, 0, x.shape[axis] - 1)
    if kind == "empty":
        return x.narrow(axis, 0, 0)
    if kind == "axis more":
        return x.unsqueeze(axis)
    if kind == "axis less":
        return x.select(axis, 0)
    if kind == "dtype":
        others = [torch.float32, torch.int32] if x.dtype == torch.int64 else OTHER_DTYPES
        return x.to(data.draw(st.sampled_from(others), label="dtype"))
    if kind == "device":
        return x.to("meta")
    return data.draw(st.sampled_from([x.tolist(), x.numpy(), 1.0, "x", x.to_sparse()]), label="type")


@pytest.mark.parametrize("operator", OPERATORS)
@settings(deadline=None, max_examples=120)
@given(data=st.data())
def test_one_wrong_tensor_is_one_value_error(operator, data):
    """At most one argument is wrong, so no other size can make it right again."""
    function, inputs = OPERATORS[operator]
    arguments = inputs()
    function(**arguments)
    name = data.draw(st.sampled_from(sorted(arguments)), label="argument")
    if operator == "ssd" and name == "x":  # a headdim of its own is right without a state
        del arguments["initial_state"]
        name = "dt"
    arguments[name] = wrong(data, operator, name, arguments[name])
    with pytest.raises(ValueError) as caught:
        function(**arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("operator", ["selective_scan", "ssd", "delta_rule"])
@pytest.mark.parametrize(
    "states_at",
    [[-1], [5], [0, 2, 500], [1.0], [True], ["1"], 3, "12", [[0, 1]], [None], [2**70],
     torch.tensor([[0, 1]]), torch.tensor([0.5]), torch.tensor(2), torch.tensor([-1])],
    ids=str,
)  # fmt: skip
def test_wrong_positions(operator, states_at):
    function, inputs = OPERATORS[operator]
    with pytest.raises(ValueError, match=r"^states_at must") as caught:
        function(**inputs(), states_at=states_at)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda t: torch.tensor(t).numpy()])
def test_positions_of_every_kind_are_the_states_of_the_recurrence(kind):
    arguments, at = ssd_inputs(), [4, 0, 0, 3]
    B = arguments["B"].repeat_interleave(2, dim=2)
    states = ssd(**arguments, states_at=kind(at), chunk_size=2)[1]
    h = arguments["initial_state"]
    found = []
    for t in range(5):
        x, dt = arguments["x"][:, t], arguments["dt"][:, t]
        write = (dt.unsqueeze(-1) * x).unsqueeze(-1) * B[:, t].unsqueeze(-2)
        h = torch.exp(dt * arguments["A"])[..., None, None] * h + write
        found.append(h)
    torch.testing.assert_close(states, torch.stack([found[t] for t in at], 1))


@pytest.mark.parametrize(
    "operator, change",
    [
        ("ssd", dict(B=torch.ones(2, 5, 3, 3), C=torch.ones(2, 5, 3, 3))),  # three groups of four heads
        ("ssd", dict(chunk_size=0)),
        ("ssd", dict(chunk_size=2.0)),
        ("ssd", dict(chunk_size=torch.ones(2))),
        ("ssd", dict(backend=None)),
        ("ssd", dict(return_last_state=torch.ones(2))),
        ("selective_scan", dict(dt_softplus=torch.ones(2, 6, 3))),  # initial_state, one place too early
        ("selective_scan", dict(return_last_state=1)),
        ("selective_scan", dict(backend=torch.ones(2))),
        ("causal_conv1d", dict(weight=torch.ones(6, 0), initial_state=None)),
        ("causal_conv1d", dict(activation=True)),
        ("causal_conv1d", dict(return_last_state="yes")),
        ("linear_cross_entropy", dict(weight=torch.ones(0, 6), labels=torch.full((2, 5), -100))),
        ("linear_cross_entropy", dict(labels=torch.full((2, 5), 7))),
        ("linear_cross_entropy", dict(labels=torch.full((2, 5), -1))),
        ("linear_cross_entropy", dict(labels=torch.full((2, 5), 2**62))),
        ("linear_cross_entropy", dict(x=torch.tensor(1.0))),
        ("linear_cross_entropy", dict(label_smoothing=1.1)),
        ("linear_cross_entropy", dict(label_smoothing=float("nan"))),
        ("linear_cross_entropy", dict(label_smoothing=torch.ones(2))),
        ("linear", dict(x=torch.ones(2, 6, dtype=torch.float64))),
    ],
)
def test_other_wrong_arguments(operator, change):
    function, inputs = OPERATORS[operator]
    with pytest.raises(ValueError) as caught:
        function(**{**inputs(), **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", ["shifted", "doubled", "transposed", "one row", "flat", "float", "one-hot"]
)
def test_labels_of_another_shape_than_the_input(change):
    """The two ways of shifting labels meet here: F.cross_entropy refuses them as well."""
    model = models.build("mamba-tiny", vocab_size=13, d_model=16, n_layer=1)
    ids = torch.randint(0, 13, (4, 9))
    labels = {
        "shifted": ids[:, 1:],
        "doubled": torch.cat([ids, ids], 1),
        "transposed": ids.t(),
        "one row": ids[:1],
        "flat": ids.flatten(),
        "float": ids.float(),
        "one-hot": F.one_hot(ids, 13),
    }[change]
    with pytest.raises(ValueError, match=r"^labels "):
        model.loss(ids, labels=labels)
    with pytest.raises(ValueError, match=r"^labels have shape"):
        model.loss(ids, labels=ids, logits_at=torch.tensor([3]))


@pytest.mark.parametrize("rows", [(0,), (2, 0)])
def test_no_rows_are_a_nan_as_in_torch(rows):
    x, weight, labels = torch.ones(*rows, 6, requires_grad=True), torch.ones(7, 6), torch.ones(rows).long()
    loss, predictions = linear_cross_entropy(x, weight, labels)
    assert loss.isnan() and F.cross_entropy(torch.ones(0, 7), torch.ones(0).long()).isnan()
    assert predictions.shape == rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_default_dtype_changes_nothing(operator, dtype):
    function, inputs = OPERATORS[operator]
    arguments = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in inputs().items()}
    leaves = [x for x in arguments.values() if x.requires_grad]

    def everything():
        out = function(**arguments)
        y = out[0] if isinstance(out, tuple) else out
        return [y, *torch.autograd.grad(y.sum(), leaves)]

    want = everything()
    torch.set_default_dtype(dtype)
    try:
        got = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, want, rtol=0, atol=0)  # which compares dtypes, too


@pytest.mark.parametrize("family", ["mamba", "mamba2", "hybrid", "transformer", "gated-deltanet"])
def test_meta_and_fake_tensors_have_the_shapes_of_real_ones(family):
    from torch._subclasses.fake_tensor import FakeTensorMode

    ids = torch.zeros(2, 7, dtype=torch.long)
    model = models.build(f"{family}-tiny", vocab_size=13, n_layer=3)
    meta = models.build(f"{family}-tiny", vocab_size=13, n_layer=3, device="meta")
    assert meta(ids.to("meta")).shape == model(ids).shape == (2, 7, 13)
    loss, predictions = meta.loss(ids.to("meta"), labels=ids.to("meta"))
    assert loss.device.type == "meta" and predictions.shape == (2, 7)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model(torch.zeros(2, 7, dtype=torch.long)).shape == (2, 7, 13)


@pytest.mark.parametrize("family", ["mamba", "transformer", "deltanet"])
def test_jit_trace_is_refused_in_one_line(family):
    model = models.build(f"{family}-tiny", vocab_size=13, n_layer=1)
    with pytest.raises(
        NotImplementedError, match=r"torch\.jit\.trace cannot record \w+, .*use torch\.compile"
    ):
        torch.jit.trace(model, (torch.zeros(1, 4, dtype=torch.long),), check_trace=False)


def test_jit_trace_of_a_linear_layer_can_be_saved(tmp_path):
    from ssm_retrieval.ops.linear import Linear

    layer, x = Linear(5, 3), torch.randn(2, 5)
    torch.jit.save(torch.jit.trace(layer, (x,)), str(tmp_path / "layer.pt"))
    again = torch.jit.load(str(tmp_path / "layer.pt"))
    torch.testing.assert_close(again(torch.cat([x, x])), layer(torch.cat([x, x])))


def test_a_cpu_backend_for_tensors_elsewhere_is_one_line():
    for operator in ("selective_scan", "causal_conv1d", "delta_rule"):
        function, inputs = OPERATORS[operator]
        with pytest.raises(ValueError, match="backend='cpu' got tensors on meta; use backend='reference'"):
            function(**{k: v.to("meta") for k, v in inputs().items()}, backend="cpu")


def test_negative_views_are_read_as_torch_reads_them():
    """A tensor with torch's lazy negation: its memory has the other sign."""
    arguments = scan_inputs()
    want = selective_scan(**arguments)
    arguments["B"] = torch._neg_view(-arguments["B"])
    assert arguments["B"].is_neg()
    torch.testing.assert_close(selective_scan(**arguments), want, rtol=0, atol=0)


def test_kernels_leave_storages_resizable():
    """FSDP frees weights by resizing their storages; what NumPy has once seen cannot be resized."""
    arguments = {k: v.requires_grad_() for k, v in scan_inputs().items()}
    arguments = {k: torch.cat([v, v, v], -1)[..., :16] if k in ("u", "dt", "D", "z", "dt_bias") else v
                 for k, v in arguments.items()}  # fmt: skip
    arguments |= dict(A=-torch.rand(16, 3), initial_state=torch.randn(2, 16, 3))
    given = {k: v.detach().clone().requires_grad_() for k, v in arguments.items()}
    selective_scan(**given).sum().backward()
    conv = {"x": torch.randn(2, 5, 16), "weight": torch.randn(16, 4).t().contiguous().t()}
    conv |= {"bias": torch.randn(16), "initial_state": torch.randn(2, 3, 16)}
    conv = {k: v.requires_grad_() for k, v in conv.items()}
    causal_conv1d(**conv).sum().backward()
    loss = {k: v.clone() for k, v in loss_inputs().items()}
    linear_cross_entropy(**loss)
    for name, x in [*given.items(), *conv.items(), *loss.items()]:
        assert x.untyped_storage().resizable(), name
        x.untyped_storage().resize_(0)


def test_ssd_equals_the_recurrence_it_stands_for():
    arguments = ssd_inputs()
    y, last = ssd(**arguments, return_last_state=True, chunk_size=2)
    want = ssd_reference(*(arguments[k] for k in ("x", "dt", "A", "B", "C", "initial_state")))
    torch.testing.assert_close((y, last), want)
