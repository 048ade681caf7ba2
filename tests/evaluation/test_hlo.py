"""What is counted in a program's text, loops included."""

from diffusion_lm.evaluation import hlo

TEXT = """HloModule jit_step, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %all-reduce.9 = f32[64]{0} all-reduce(%p), replica_groups={}, to_apply=%sum
  ROOT %cut = f32[8]{0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={8}
}

%below (c: (s32[], f32[16])) -> pred[] {
  %c = (s32[], f32[16]) parameter(0)
  %constant.5 = s32[]{:T(128)} constant(12)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %constant.5), direction=LT
}

%body (c: (s32[], f32[16])) -> (s32[], f32[16]) {
  %c.1 = (s32[], f32[16]) parameter(0)
  %x = f32[16]{0} get-tuple-element(%c.1), index=1
  %all-gather-start.1 = (f32[16]{0}, f32[128]{0:T(128)S(1)}) all-gather-start(%x), dimensions={0}
  %all-gather-done.1 = f32[128]{0} all-gather-done(%all-gather-start.1)
  %big = bf16[4,32]{1,0} fusion(%all-gather-done.1), kind=kLoop, calls=%sum, metadata={op_name="layers/mlp"}
  ROOT %t = (s32[], f32[16]) tuple(%x, %x)
}

ENTRY %main (state: f32[16]) -> (f32[999], f32[8]) {
  %state = f32[16]{0} parameter(0)
  %w = (s32[], f32[16]) while(%state), condition=%below, body=%body
  %v = (s32[], f32[16]) while(%w), condition=%sum, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %scatter = f32[8]{0} fusion(%v), kind=kCustom, calls=%all-reduce-scatter.1
  %new = f32[999]{0} fusion(%v), kind=kLoop, calls=%sum
  %piece.1 = f32[10]{0} all-gather(%state), frontend_attributes={chain_id="2"}
  %piece.2 = f32[10]{0} all-gather(%state), frontend_attributes={chain_id="2"}
  ROOT %out = (f32[999], f32[8]) tuple(%new, %scatter)
}
"""


def test_collectives_count_as_often_as_their_loops_run():
    assert hlo.read(TEXT).collectives() == {
        "all-gather": {"places": 2, "runs": 15 + 1, "bytes": 15 * 128 * 4 + 10 * 4},  # one is spread over two places
        "reduce-scatter": {"places": 1, "runs": 1, "bytes": 64 * 4},  # a sum fused with its cut
    }


def test_the_largest_arrays_are_those_that_are_stored_and_not_handed_back():
    largest = hlo.read(TEXT).largest(2)
    assert largest == [{"name": "layers/mlp", "bytes": 256}, {"name": "all-gather-start.1", "bytes": 64}]
