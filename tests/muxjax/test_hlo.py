import jax
import jax.numpy as jnp

from muxjax.hlo import copies_of, kernels

POOL = jax.ShapeDtypeStruct((100, 16, 128), jnp.bfloat16)


def test_copies_of_the_pool_are_found_in_any_shape():
    hlo = """
  %copy.1 = bf16[100,16,128]{2,1,0} copy(%kv)
  ROOT %copy-start.2 = (bf16[1600,128]{1,0}, bf16[1600,128]{1,0}, u32[]) copy-start(%kv)
  %copy.3 = bf16[100,16,64]{2,1,0} copy(%half)
  %copy.4 = f32[100,16,128]{2,1,0} copy(%other)
  %scatter.5 = bf16[1600,128]{1,0} scatter(%kv, %rows, %new)
"""
    assert copies_of(hlo, POOL) == ["%copy.1", "%copy-start.2"]


def test_kernels_are_listed_with_their_memory():
    hlo = """
  %paged_decode_9_3_64.10 = f32[16,16,128]{2,1,0} custom-call(%a), custom_call_target=\
"tpu_custom_call", backend_config={"scoped_memory_configs":[{"memory_space":"1","offset":"0",\
"size":"67108864"}],"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"1359"}]}
  %paged_decode_9_3_64.11 = f32[16,16,128]{2,1,0} custom-call(%a), custom_call_target=\
"tpu_custom_call", backend_config={}
  %sort.3 = f32[16] custom-call(%a), custom_call_target="Sort"
"""
    assert kernels(hlo) == {"paged_decode_9_3_64": 1359}
