"""Checkpoints: safe readers of foreign formats, key maps both ways, the workspace's own store."""

from common.checkpoint.folder import open_checkpoint as open_checkpoint
from common.checkpoint.folder import open_huggingface as open_huggingface
from common.checkpoint.keymap import Piece as Piece
from common.checkpoint.keymap import Row as Row
from common.checkpoint.keymap import export_tensors as export_tensors
from common.checkpoint.keymap import load_tensors as load_tensors
from common.checkpoint.reader import TensorReader as TensorReader
from common.checkpoint.reader import subtree as subtree
from common.checkpoint.safetensors import open_safetensors_file as open_safetensors_file
from common.checkpoint.safetensors_writer import LazyTensor as LazyTensor
from common.checkpoint.safetensors_writer import write_safetensors as write_safetensors
from common.checkpoint.torch_file import open_torch_file as open_torch_file
from common.checkpoint.transforms import DEPTHWISE_CONV as DEPTHWISE_CONV
from common.checkpoint.transforms import IDENTITY as IDENTITY
from common.checkpoint.transforms import PLUS_ONE as PLUS_ONE
from common.checkpoint.transforms import TRANSPOSE as TRANSPOSE
from common.checkpoint.transforms import AddConstant as AddConstant
from common.checkpoint.transforms import Concat as Concat
from common.checkpoint.transforms import Reshape as Reshape
from common.checkpoint.transforms import Stack as Stack
from common.checkpoint.transforms import Transform as Transform
from common.checkpoint.transforms import Transpose as Transpose
from common.checkpoint.transforms import chain as chain
from common.checkpoint.tree_file import open_msgpack_file as open_msgpack_file
from common.checkpoint.tree_file import open_tree_folder as open_tree_folder
