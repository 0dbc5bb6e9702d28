"""Passes over graphs, and the pipeline that prepares a kernel graph for a backend."""

from sagellm.graphs.passes.fuse_add_norm import FuseAddNorm
from sagellm.graphs.passes.fuse_gated_linear import FuseGatedLinear
from sagellm.graphs.passes.fuse_linears import FuseGateUp, FuseQkv
from sagellm.graphs.passes.fuse_rope_kv_write import FuseRopeKvWrite
from sagellm.graphs.passes.fuse_silu_mul import FuseSiluMul
from sagellm.graphs.passes.pipeline import Pass, UnknownPass, run_pipeline
from sagellm.graphs.passes.place_layers import PlaceLayers

# The linears first: the later passes hide the nodes by which they are found.
KERNEL_PASSES: tuple[Pass, ...] = (
    FuseQkv(),
    FuseGateUp(),
    FuseAddNorm(),
    FuseSiluMul(),
    FuseGatedLinear(),
    FuseRopeKvWrite(),
)

__all__ = ["KERNEL_PASSES", "Pass", "PlaceLayers", "UnknownPass", "run_pipeline"]
