"""RNN, GRU and LSTM.

Per direction, with gates stacked along the first axis of W (gates * H, I), R (gates * H, H) and B = [Wb, Rb], each
step computes (ONNX RNN, GRU, LSTM; P holds LSTM's peepholes for the gates i, o, f)::

    RNN   H' = f(x W + H R + Wb + Rb)
    GRU   z, r = f(...)   h = g(x Wh + Wbh + (r H) Rh + Rbh)   or, with linear_before_reset, r (H Rh + Rbh)
          H' = (1 - z) h + z H
    LSTM  i = f(... + Pi C)   f = f(... + Pf C)   c = g(...)   C' = f C + i c   o = f(... + Po C')   H' = o h(C')
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from renorm_onnx.runtime.operators.call import Array, Call, Kernel, Result, UnusableError
from renorm_onnx.runtime.operators.elementwise import sigmoid

_Activation = Callable[[Array], Any]

_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_DEFAULT_ACTIVATIONS = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}
_PLAIN: Mapping[str, _Activation] = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "softplus": lambda x: np.logaddexp(0.0, x),
}
_WITH_ALPHA: Mapping[str, tuple[float, Callable[[Array, float], Any]]] = {
    "leakyrelu": (0.01, lambda x, a: np.where(x < 0, a * x, x)),
    "thresholdedrelu": (1.0, lambda x, a: np.where(x > a, x, 0.0)),
    "elu": (1.0, lambda x, a: np.where(x < 0, a * np.expm1(np.minimum(x, 0)), x)),
}
_WITH_BOTH: Mapping[str, tuple[float, float, Callable[[Array, float, float], Any]]] = {
    "affine": (1.0, 0.0, lambda x, a, b: a * x + b),
    "scaledtanh": (1.0, 1.0, lambda x, a, b: a * np.tanh(b * x)),
    "hardsigmoid": (0.2, 0.5, lambda x, a, b: np.clip(a * x + b, 0.0, 1.0)),
}


def _bind_alpha(function: Callable[[Array, float], Any], alpha: float) -> _Activation:
    return lambda x: function(x, alpha)


def _bind_both(function: Callable[[Array, float, float], Any], alpha: float, beta: float) -> _Activation:
    return lambda x: function(x, alpha, beta)


def _clipped(function: _Activation, limit: float) -> _Activation:
    return lambda x: function(np.clip(x, -limit, limit))


def _activations(call: Call, directions: int) -> list[_Activation]:
    """One function per gate activation and direction; alphas and betas go, in order, to those that take one."""
    names = call.attributes.get("activations") or _DEFAULT_ACTIVATIONS[call.op_type] * directions
    alphas = iter(call.attributes.get("activation_alpha") or ())
    betas = iter(call.attributes.get("activation_beta") or ())
    clip = call.attributes.get("clip")
    per_direction = len(_DEFAULT_ACTIVATIONS[call.op_type])
    result: list[_Activation] = []
    for name in map(str.lower, names):
        if name in _PLAIN:
            function = _PLAIN[name]
        elif name in _WITH_ALPHA:
            default, with_alpha = _WITH_ALPHA[name]
            function = _bind_alpha(with_alpha, next(alphas, default))
        elif name in _WITH_BOTH:
            default_alpha, default_beta, with_both = _WITH_BOTH[name]
            function = _bind_both(with_both, next(alphas, default_alpha), next(betas, default_beta))
        else:
            raise UnusableError(f"activation {name!r} is not covered")
        gate = len(result) % per_direction < 2  # the cell itself, behind LSTM's third activation, is not clipped
        result.append(_clipped(function, clip) if clip and gate else function)
    return result


@dataclass(frozen=True, slots=True)
class _Direction:
    """One direction's weights."""

    call: Call
    weight: Array  # (gates * H, I)
    recurrent: Array  # (gates * H, H)
    input_bias: Array  # (gates * H,)
    state_bias: Array  # (gates * H,)
    peepholes: Sequence[Array]  # i, o, f, each (H,)
    activations: Sequence[_Activation]

    def step(self, x: Array, state: Array, cell: Array) -> tuple[Array, Array]:
        """The next state and cell, each (B, H), from `x` of shape (B, I)."""
        return _STEPS[self.call.op_type](self, x, state, cell)

    def gates(self, x: Array) -> list[Array]:
        """What the input contributes to each gate."""
        return np.split(x @ self.weight.T + self.input_bias, _GATES[self.call.op_type], axis=1)


def _step_rnn(layer: _Direction, x: Array, state: Array, cell: Array) -> tuple[Array, Array]:
    (total,) = layer.gates(x)
    return layer.activations[0](total + state @ layer.recurrent.T + layer.state_bias), cell


def _step_gru(layer: _Direction, x: Array, state: Array, cell: Array) -> tuple[Array, Array]:
    f, g = layer.activations
    x_update, x_reset, x_hidden = layer.gates(x)
    recurrent_update, recurrent_reset, recurrent_hidden = np.split(layer.recurrent, 3)
    bias_update, bias_reset, bias_hidden = np.split(layer.state_bias, 3)
    update = f(x_update + state @ recurrent_update.T + bias_update)
    reset = f(x_reset + state @ recurrent_reset.T + bias_reset)
    if layer.call.integer("linear_before_reset", 0):
        hidden = g(x_hidden + reset * (state @ recurrent_hidden.T + bias_hidden))
    else:
        hidden = g(x_hidden + (reset * state) @ recurrent_hidden.T + bias_hidden)
    return (1 - update) * hidden + update * state, cell


def _step_lstm(layer: _Direction, x: Array, state: Array, cell: Array) -> tuple[Array, Array]:
    f, g, h = layer.activations
    recurrent = np.split(state @ layer.recurrent.T + layer.state_bias, 4, axis=1)
    into, out, forget, candidate = (a + b for a, b in zip(layer.gates(x), recurrent, strict=True))
    peep_into, peep_out, peep_forget = layer.peepholes
    opened = f(into + peep_into * cell)
    kept = 1 - opened if layer.call.integer("input_forget", 0) else f(forget + peep_forget * cell)
    cell = kept * cell + opened * g(candidate)
    return f(out + peep_out * cell) * h(cell), cell


_STEPS: Mapping[str, Callable[[_Direction, Array, Array, Array], tuple[Array, Array]]] = {
    "RNN": _step_rnn,
    "GRU": _step_gru,
    "LSTM": _step_lstm,
}


def _run(layer: _Direction, x: Array, lengths: Array, state: Array, cell: Array, *, backwards: bool) -> list[Array]:
    """All states (T, B, H) with zeros beyond each sequence's end, the last state and the last cell."""
    steps, batch = x.shape[:2]
    time = np.arange(steps)[:, None]
    order = np.where(backwards & (time < lengths), lengths - 1 - time, time)  # (T, B)
    samples = np.arange(batch)
    states = np.zeros((steps, batch, state.shape[1]))
    for step in range(steps):
        alive = (step < lengths)[:, None]
        new_state, new_cell = layer.step(x[order[step], samples], state, cell)
        state, cell = np.where(alive, new_state, state), np.where(alive, new_cell, cell)
        states[order[step], samples] = np.where(alive, new_state, 0.0)
    return [states, state, cell]


def _recurrent(call: Call) -> Result:
    x, weight, recurrent = call.inputs[:3]
    batch_first = bool(call.integer("layout", 0))
    x = x.swapaxes(0, 1) if batch_first else x
    steps, batch = x.shape[:2]
    directions, hidden = weight.shape[0], recurrent.shape[2]
    bias = np.zeros((directions, 2 * weight.shape[1])) if call.input(3) is None else call.inputs[3]
    lengths = np.full(batch, steps) if call.input(4) is None else call.inputs[4]
    peepholes = np.zeros((directions, 3 * hidden)) if call.input(7) is None else call.inputs[7]
    states, cells = (
        np.zeros((directions, batch, hidden)) if value is None else value.swapaxes(0, 1) if batch_first else value
        for value in (call.input(5), call.input(6))
    )
    activations = _activations(call, directions)
    each = len(activations) // directions
    results = []
    for d in range(directions):
        input_bias, state_bias = np.split(bias[d], 2)
        chosen = activations[d * each : (d + 1) * each]
        peeps = np.split(peepholes[d], 3)
        layer = _Direction(call, weight[d], recurrent[d], input_bias, state_bias, peeps, chosen)
        backwards = d == 1 or call.text("direction", "forward") == "reverse"
        results.append(_run(layer, x, lengths, states[d], cells[d], backwards=backwards))
    every, last, last_cell = (np.stack(parts) for parts in zip(*results, strict=True))
    every = np.moveaxis(every, 0, 1)  # (D, T, B, H) -> (T, D, B, H)
    if batch_first:
        every, last, last_cell = every.transpose(2, 0, 1, 3), last.swapaxes(0, 1), last_cell.swapaxes(0, 1)
    return (every, last, last_cell) if call.op_type == "LSTM" else (every, last)


OPERATORS: Mapping[str, Kernel] = dict.fromkeys(_GATES, _recurrent)
"""Recurrent operators by name."""
