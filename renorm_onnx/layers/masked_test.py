import copy

import pytest
import torch

from renorm_onnx.errors import InputError
from renorm_onnx.layers.conftest import LAYERS, algorithm_1, make_batch, shaken, weights_like
from renorm_onnx.layers.masked import length_mask


def layer_for(rank, **options):
    return shaken(LAYERS[rank](3, **{"momentum": 0.1, "schedule": None, "dtype": torch.float64, **options}))


def random_mask(x, seed=0):
    shape = (x.size(0), *x.shape[2:])
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_a_masked_step_is_algorithm_1_on_the_valid_positions(rank):
    layer = layer_for(rank)
    x = make_batch(rank).requires_grad_()
    mask = random_mask(x)
    valid = x.movedim(1, -1)[mask]  # (M, C)
    sigma = (layer.running_var + layer.eps).sqrt()
    want, mu, sigma = algorithm_1(valid, layer.weight, layer.bias, layer.running_mean, sigma, layer.eps, 3.0, 5.0, 0.1)
    g = weights_like(want)
    want_grads = torch.autograd.grad(want, (x, layer.weight, layer.bias), g)

    got = layer(x, mask).movedim(1, -1)[mask]
    grads = torch.autograd.grad(got, (x, layer.weight, layer.bias), g)

    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.running_mean, mu)
    torch.testing.assert_close((layer.running_var + layer.eps).sqrt(), sigma)


def test_a_full_mask_is_no_mask():
    x = make_batch(3)
    one, other = layer_for(3), layer_for(3)
    torch.testing.assert_close(one(x, torch.ones(6, 5, dtype=torch.bool)), other(x))
    torch.testing.assert_close(one.running_var, other.running_var)


@pytest.mark.parametrize("junk", [0.0, 1e30, float("inf"), float("nan")])
def test_what_padding_holds_reaches_neither_statistics_nor_gradients(junk):
    x = make_batch(3)
    lengths = torch.tensor([5, 4, 1, 3, 2, 5])
    mask = length_mask(lengths, 5)
    outcomes = []
    for filler in (0.5, junk):
        layer = layer_for(3)
        filled = torch.where(mask.unsqueeze(1), x, filler).requires_grad_()
        y = layer(filled, mask).movedim(1, -1)[mask]
        (y * weights_like(y)).sum().backward()
        outcomes.append([y, filled.grad, layer.weight.grad, layer.running_mean, layer.running_var])
    for clean, dirty in zip(*outcomes, strict=True):
        torch.testing.assert_close(dirty, clean)


def mask_of(valid):
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask[0, :valid] = True
    return mask


@pytest.mark.parametrize("valid", [0, 1])
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 3}, {"track_running_stats": False}])
def test_fewer_than_two_valid_positions_are_refused_and_change_nothing(options, valid):
    layer = layer_for(3, **options)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    said = rf"BatchRenorm1d: Expected more than 1 value .* \(6, 3, 5\), of which the mask leaves {valid} valid"
    with pytest.raises(InputError, match=said):
        layer(make_batch(3), mask_of(valid))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    layer(make_batch(3), mask_of(2))


@pytest.mark.parametrize("valid", [0, 1])
def test_fewer_than_two_valid_positions_teach_nothing_where_nobody_looks(valid):
    layer = layer_for(3)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    y = torch.compile(layer, backend="eager", fullgraph=True)(make_batch(3), mask_of(valid))
    assert torch.isfinite(y).all()
    assert torch.equal(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-15, atol=0)
    assert layer.num_batches_tracked.item() == 1


def test_one_position_is_refused_though_the_mask_leaves_it():
    with pytest.raises(InputError, match="the mask leaves 1 valid"):
        layer_for(2)(torch.ones(1, 3, dtype=torch.float64), torch.tensor([True]))


def test_the_unbiased_variance_of_two_valid_positions_is_that_of_a_sample():
    layer, x, mask = layer_for(3, stat="var_unbiased"), make_batch(3), mask_of(2)
    before = layer.running_var.clone()
    layer(x, mask)
    sample = x.movedim(1, -1)[mask].var(0, correction=1)
    torch.testing.assert_close(layer.running_var, 0.9 * before + 0.1 * sample, rtol=1e-12, atol=0)


def test_a_batch_without_positions_and_an_evaluation_need_no_valid_ones():
    layer = layer_for(3)
    assert layer(torch.zeros(0, 3, 5, dtype=torch.float64), torch.zeros(0, 5, dtype=torch.bool)).shape == (0, 3, 5)
    assert torch.isfinite(layer.eval()(make_batch(3), mask_of(0))).all()


def test_ghost_batches_take_their_part_of_the_mask():
    layer, x, mask = layer_for(3, virtual_batch_size=3, stat="var"), make_batch(3), random_mask(make_batch(3))
    halves = [layer_for(3, stat="var") for _ in range(2)]
    want = [half(x[3 * i : 3 * i + 3], mask[3 * i : 3 * i + 3]) for i, half in enumerate(halves)]
    torch.testing.assert_close(layer(x, mask), torch.cat(want))
    torch.testing.assert_close(layer.running_var, (halves[0].running_var + halves[1].running_var) / 2)


def test_evaluation_does_not_look_at_the_mask():
    layer, x = layer_for(3).eval(), make_batch(3)
    assert torch.equal(layer(x, random_mask(x)), layer(x))


def test_without_running_statistics_the_valid_positions_normalize():
    layer = layer_for(3, track_running_stats=False)
    x = make_batch(3)
    mask = random_mask(x)
    valid = x.movedim(1, -1)[mask]
    want = torch.batch_norm(valid, layer.weight, layer.bias, None, None, True, 0.0, layer.eps, False)
    for mode in (True, False):
        torch.testing.assert_close(layer.train(mode)(x, mask).movedim(1, -1)[mask], want)


def test_a_mask_that_does_not_fit_is_refused():
    layer, x = layer_for(3), make_batch(3)
    with pytest.raises(
        InputError, match=r"BatchRenorm1d: mask has shape \(6, 4\) .* expected \(6, 5\) and torch\.bool"
    ):
        layer(x, torch.ones(6, 4, dtype=torch.bool))
    with pytest.raises(InputError, match=r"dtype torch\.float32"):
        layer(x, torch.ones(6, 5))
    with pytest.raises(InputError, match=r"length_mask: lengths has shape \(2, 2\)"):
        length_mask(torch.ones(2, 2, dtype=torch.long), 4)


def test_lengths_become_a_mask():
    assert length_mask(torch.tensor([0, 2, 3]), 3).tolist() == [[False] * 3, [True, True, False], [True] * 3]


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        (torch.tensor([-3, 2]), "lengths has values from -3 to 2, expected 0 to length=10"),
        (torch.tensor([4, 11]), "lengths has values from 4 to 11, expected 0 to length=10"),
        ([3, 1], "lengths is a list, expected a tensor of integers"),
        (torch.tensor([True, False]), r"dtype torch\.bool, expected integers"),
    ],
    ids=str,
)
def test_lengths_that_no_sequence_can_have_are_refused(lengths, said):
    with pytest.raises(InputError, match=f"length_mask: .*{said}"):
        length_mask(lengths, 10)


def test_lengths_are_not_looked_at_where_that_would_break_a_graph():
    class Mask(torch.nn.Module):
        def forward(self, lengths):
            return length_mask(lengths, 4)

    lengths = torch.tensor([3, 0])
    compiled = torch.compile(Mask(), backend="eager", fullgraph=True)
    for mask in (compiled, torch.export.export(Mask(), (lengths,)).module()):
        assert torch.equal(mask(lengths), Mask()(lengths))
    assert length_mask(torch.zeros(0, dtype=torch.int8), 4).shape == (0, 4)


@pytest.mark.parametrize("options", [{}, {"stat": "var_unbiased"}, {"virtual_batch_size": 3}], ids=str)
def test_statistics_of_float64_are_computed_in_float64(options):
    layer, x = layer_for(3, **options), make_batch(3)
    unmasked = copy.deepcopy(layer)
    layer(x, torch.ones(x.size(0), x.size(2), dtype=torch.bool))
    unmasked(x)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(unmasked.named_buffers()), rtol=1e-14, atol=1e-14)
