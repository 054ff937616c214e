import jax

from muxjax.pallas_kernels.target import KernelTarget, current_target


def test_current_target_is_the_default_device_or_the_abstract_mesh():
    assert current_target() == KernelTarget("cpu", jax.devices()[0].device_kind)
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert current_target() == KernelTarget("gpu", "NVIDIA H200")
        assert str(current_target()) == "NVIDIA H200"
    assert current_target().platform == "cpu"
