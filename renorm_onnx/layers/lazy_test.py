"""A lazy layer becomes, with its first batch, the layer that it would have been from the start."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from renorm_onnx import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    LazyBatchRenorm1d,
    LazyBatchRenorm2d,
    LazyBatchRenorm3d,
    convert_sync_batchrenorm,
    to_batchnorm,
    to_onnx,
)
from renorm_onnx.errors import InputError
from renorm_onnx.layers.conftest import make_batch, outcome, worst

PAIRS = {
    2: (LazyBatchRenorm1d, BatchRenorm1d),
    4: (LazyBatchRenorm2d, BatchRenorm2d),
    5: (LazyBatchRenorm3d, BatchRenorm3d),
}
OPTIONS = [
    {},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"renorm_momentum": 0.3, "stat": "var", "r_max": 2.0},
    {"momentum": None, "virtual_batch_size": 2},
]


def step(layer, x):
    return outcome(layer, x, layer)


@pytest.mark.parametrize("rank", PAIRS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_lazy_layer_becomes_the_usual_one_with_its_first_batch(rank, options):
    lazy_class, usual_class = PAIRS[rank]
    options = {"schedule": None, "dtype": torch.float64, **options}
    lazy, usual = lazy_class(**options), usual_class(3, **options)
    assert set(lazy.state_dict()) == set(usual.state_dict())
    for seed in range(2):
        x = make_batch(rank, seed=seed)
        assert worst(step(lazy, x), step(usual, x)) < (1e-15, "")
    assert type(lazy) is usual_class
    assert repr(lazy) == repr(usual)
    with pytest.raises(InputError, match="expected 3 channels"):
        lazy(make_batch(rank)[:, :2])


def test_a_mask_may_come_with_the_first_batch():
    lazy, usual = LazyBatchRenorm1d(dtype=torch.float64), BatchRenorm1d(3, dtype=torch.float64)
    x, mask = make_batch(3), torch.ones(make_batch(3).shape[::2], dtype=torch.bool)
    mask[0, 1:] = False
    assert torch.equal(lazy(x, mask), usual(x=x, mask=mask))
    assert torch.equal(lazy.running_var, usual.running_var)


def test_a_layer_before_its_first_batch_moves_pickles_and_loads():
    trained = BatchRenorm2d(3, renorm_momentum=0.1)
    trained(make_batch(4, dtype=torch.float32))
    lazy = pickle.loads(pickle.dumps(LazyBatchRenorm2d(renorm_momentum=0.1).double().float()))
    lazy.load_state_dict(trained.state_dict())
    x = make_batch(4, seed=1, dtype=torch.float32)
    assert torch.equal(lazy.eval()(x), trained.eval()(x))
    assert type(lazy) is BatchRenorm2d
    assert lazy.num_features == 3
    lazy = LazyBatchRenorm2d(renorm_momentum=0.1)
    lazy.load_state_dict(trained.state_dict())
    with pytest.raises(InputError, match=r"x has shape \(4, 2, .*expected 3 channels"):
        lazy(torch.zeros(4, 2, 5, 5))


def test_what_is_loaded_before_the_first_batch_stays_and_the_rest_is_as_in_a_new_layer():
    lazy = LazyBatchRenorm1d(renorm_momentum=0.5)
    lazy.load_state_dict({"weight": torch.full((3,), 5.0), "bias": torch.full((3,), 7.0)}, strict=False)
    lazy.eval()(torch.zeros(2, 3))
    assert {name: value.tolist() for name, value in lazy.state_dict().items()} == {
        "weight": [5.0] * 3,
        "bias": [7.0] * 3,
        **{f"{which}_mean": [0.0] * 3 for which in ("running", "renorm")},
        **{f"{which}_var": [1.0] * 3 for which in ("running", "renorm")},
        "num_batches_tracked": 0,
    }


class Own(LazyModuleMixin, nn.Module):
    """Stays of its class when it knows its sizes."""

    def __init__(self):
        super().__init__()
        self.shift = UninitializedParameter()

    def initialize_parameters(self, x):
        if self.has_uninitialized_params():
            self.shift.materialize(x.shape[1:])
            nn.init.ones_(self.shift)

    def forward(self, x):
        return x + self.shift


def test_a_lazy_module_that_stays_of_its_class_is_exported_once_it_knows_its_sizes():
    net, x = nn.Sequential(Own(), nn.Linear(3, 2)).eval(), torch.zeros(2, 3)
    with pytest.raises(InputError, match="'0' is a Own that does not know its sizes yet"):
        to_onnx(net, x)
    net(x)
    assert len(to_onnx(net, x).graph.output) == 1


def test_bad_input_and_options_are_refused_as_by_the_usual_layer():
    lazy = LazyBatchRenorm2d()
    with pytest.raises(InputError, match=r"LazyBatchRenorm2d: expected 4D input \(got 2D input of shape \(4, 3\)\)"):
        lazy(torch.zeros(4, 3))
    assert lazy.has_uninitialized_params()
    with pytest.raises(InputError, match=r"r_max=0\.5"):
        LazyBatchRenorm2d(r_max=0.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta'"):
        LazyBatchRenorm2d(beta=True)


def test_before_its_first_batch_it_cannot_be_converted_or_exported():
    for model in (nn.Sequential(LazyBatchRenorm1d()), nn.Sequential(nn.LazyLinear(3), BatchRenorm1d(3))):
        model.eval()
        with pytest.raises(InputError, match=r"'0' is a Lazy\w+ that does not know its sizes yet; run one batch"):
            to_onnx(model, torch.zeros(2, 3))
    for convert in (to_batchnorm, convert_sync_batchrenorm):
        with pytest.raises(InputError, match="'0' is a LazyBatchRenorm1d that does not know its sizes yet"):
            convert(nn.Sequential(LazyBatchRenorm1d()))
