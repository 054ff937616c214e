import jax
import jax.numpy as jnp

from muxjax.compile_check.hlo import count_collectives, find_copies, find_kernels

POOL = jax.ShapeDtypeStruct((100, 16, 128), jnp.bfloat16)


def test_find_copies_of_the_pool_in_any_shape():
    hlo = """
  %copy.1 = bf16[100,16,128]{2,1,0} copy(%kv)
  ROOT %copy-start.2 = (bf16[1600,128]{1,0}, bf16[1600,128]{1,0}, u32[]) copy-start(%kv)
  %copy.3 = bf16[100,16,64]{2,1,0} copy(%half)
  %copy.4 = f32[100,16,128]{2,1,0} copy(%other)
  %scatter.5 = bf16[1600,128]{1,0} scatter(%kv, %rows, %new)
"""
    assert find_copies(hlo, POOL) == ["%copy.1", "%copy-start.2"]


def test_find_kernels_with_their_vmem():
    hlo = """
  %paged_decode_9_3_64.10 = f32[16,16,128]{2,1,0} custom-call(%a), custom_call_target=\
"tpu_custom_call", backend_config={"scoped_memory_configs":[{"memory_space":"1","offset":"0",\
"size":"67108864"}],"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"1359"}]}
  %paged_decode_9_3_64.11 = f32[16,16,128]{2,1,0} custom-call(%a), custom_call_target=\
"tpu_custom_call", backend_config={}
  %sort.3 = f32[16] custom-call(%a), custom_call_target="Sort"
"""
    assert find_kernels(hlo) == {"paged_decode_9_3_64": 1359}


def test_collectives_in_loops_count_once_per_trip():
    hlo = """
HloModule jit_prefill, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%a, %b)
}

%layer (carry: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-reduce.1 = f32[4]{0} all-reduce(%x), channel_id=1, to_apply=%add
  %all-reduce.2 = f32[4]{0} all-reduce(%y), channel_id=2, to_apply=%add
}

%sampled (p: f32[4]) -> f32[8] {
  %start = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), dimensions={0}
  ROOT %done = f32[8]{0} all-gather-done(%start)
}

%fewer (carry: (s32[], f32[4])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(3), metadata={}
  ROOT %lt.2 = pred[]{:T(512)} compare(%at, %constant.7), direction=LT
}

%counted (carry: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-to-all.3 = f32[4]{0} all-to-all(%x), channel_id=3
}

ENTRY %main (p: f32[4]) -> f32[8] {
  %while.2 = (s32[]{:T(128)}, f32[4]) while(%t), condition=%fewer, body=%counted
  %while.3 = (s32[], f32[4]) while(%t), condition=%sampled, body=%counted
  %while.1 = (s32[], f32[4]) while(%t), condition=%c, body=%layer, \
backend_config={"known_trip_count":{"n":"16"}}
  ROOT %out = f32[8] conditional(%i, %a, %b), branch_computations={%sampled, %sampled}
}
"""
    assert count_collectives(hlo) == {"all-gather": 2, "all-reduce": 32, "all-to-all": 4}
