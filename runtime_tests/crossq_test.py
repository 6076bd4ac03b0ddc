"""A CrossQ policy of sb3-contrib after two thousand steps: adopted, exported, fused, and its actions are the same."""

import warnings

import numpy as np
import pytest
import torch

from renorm_onnx import model_file
from renorm_onnx.exporter import to_onnx
from renorm_onnx.fusion.engine import fuse
from renorm_onnx.layers.adoption import adopt
from renorm_onnx.layers.modules import BatchRenorm1d
from renorm_onnx.runtime.parity import verify
from renorm_onnx.runtime.session import open_session

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def agent():
    """CrossQ after 2,000 steps of Pendulum; its critics, which are not exported, are smaller than by default."""
    sb3_contrib = pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = {"net_arch": {"pi": [256, 256], "qf": [256, 256]}}
        agent = sb3_contrib.CrossQ(
            "MlpPolicy", "Pendulum-v1", learning_starts=64, seed=0, device="cpu", policy_kwargs=sizes
        )
        agent.learn(2_000)
    return agent


class Policy(torch.nn.Module):
    """The deterministic actor: observation to action in [-1, 1], without sb3's preprocessing of dictionaries."""

    def __init__(self, actor):
        super().__init__()
        self.latent, self.mean = actor.latent_pi, actor.mu

    def forward(self, observation):
        return torch.tanh(self.mean(self.latent(observation)))


def test_a_trained_policy_keeps_its_actions_through_adoption_export_and_fusion(agent):
    policy = Policy(agent.policy.actor).eval()
    rng = np.random.default_rng(0)
    observations = np.stack([agent.observation_space.sample() for _ in range(64)]).astype(np.float32)
    observations += rng.normal(0, 0.1, observations.shape).astype(np.float32)
    with torch.no_grad():
        raw = policy(torch.from_numpy(observations)).numpy()
    wanted, _ = agent.predict(observations, deterministic=True)
    np.testing.assert_allclose(agent.policy.unscale_action(raw), wanted, rtol=1e-6, atol=1e-6)

    norms = sum("BatchRenorm" in type(part).__name__ for part in policy.modules())
    adopted = adopt(policy).eval()
    ours = [part for part in adopted.modules() if isinstance(part, BatchRenorm1d)]
    assert len(ours) == norms >= 2
    model = to_onnx(adopted, torch.from_numpy(observations[:2]), dynamic_shapes=({0: "batch"},))
    fused, report = fuse(model)
    assert not report.kept, report
    assert len(report.folded) == norms
    verdict = verify(model, fused)
    assert verdict.ok, verdict
    session = open_session(fused, optimize="all")
    loaded = model_file.load(fused)
    assert {node.op_type for node in loaded.graph} <= {"Gemm", "Relu", "Tanh"}
    (got,) = session.run({session.inputs[0].name: observations}).values()
    # Actions of trained float32 networks: both sides round, neither is the reference.
    np.testing.assert_allclose(got, raw, rtol=0, atol=2e-5)
