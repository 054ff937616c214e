"""The leader of a mesh over several hosts."""

import pytest

from muxjax.cluster.leader import LeadingExecutor
from muxjax.errors import WrongState
from muxjax.executor.model_slots import ModelSlots


def test_models_of_a_mesh_over_hosts_are_fixed():
    executor = object.__new__(LeadingExecutor)
    with pytest.raises(WrongState, match=r"chat cannot be added: .* are fixed"):
        executor.add_model("chat", object.__new__(ModelSlots))
    with pytest.raises(WrongState, match=r"chat cannot be removed: .* are fixed"):
        executor.remove_model("chat")
