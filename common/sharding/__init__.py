"""Mesh building, logical-axis rules and multi-process initialisation."""

from common.sharding.accelerators import ACCELERATORS as ACCELERATORS
from common.sharding.accelerators import Accelerator as Accelerator
from common.sharding.accelerators import accelerator as accelerator
from common.sharding.accelerators import accelerator_of as accelerator_of
from common.sharding.distributed import initialize_distributed as initialize_distributed
from common.sharding.mesh import BATCH_AXES as BATCH_AXES
from common.sharding.mesh import MESH_AXES as MESH_AXES
from common.sharding.mesh import MeshConfig as MeshConfig
from common.sharding.mesh import batch_sharding as batch_sharding
from common.sharding.mesh import batch_shards as batch_shards
from common.sharding.mesh import make_mesh as make_mesh
from common.sharding.rules import DEFAULT_RULES as DEFAULT_RULES
from common.sharding.rules import Rules as Rules
from common.sharding.rules import partition_spec as partition_spec
from common.sharding.rules import shard as shard
from common.sharding.rules import state_shardings as state_shardings
from common.sharding.rules import use_mesh as use_mesh
from common.sharding.rules import variable_axes as variable_axes
from common.sharding.shards import per_shard as per_shard
from common.sharding.topology import Topology as Topology
from common.sharding.topology import compile_for as compile_for
from common.sharding.topology import topology as topology
