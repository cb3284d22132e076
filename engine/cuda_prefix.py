"""The heads' prefix attention on the CUDA kernels: one more layer in the step's cache, behind the backbone's.

Four launches over a pass's rows: their features side by side, the matrix to queries, keys and values, the attention and
the matrix out of it. What is computed for the text is only read here, never changed. Nothing here allocates or waits
once it is built: it can be captured.
"""

from collections.abc import Callable

from torch import Tensor, nn

from engine.block_weights import DenseWeight
from engine.cuda_linear import LinearBank
from engine.cuda_memory import StepMemory
from engine.cuda_weights import pack_matrix, require
from engine.kernels import fused_ops
from engine.kernels.small_batch_linear import LoadKernel, PackedLinear
from engine.prefix_attention import PrefixAttention

__all__ = ["PrefixLayer"]

_EPS = 1e-6  # as `prefix_attention.feature`


class PrefixLayer:
    """One `PrefixAttention` over a step's memory, whose cache must be empty; its matrices become int8, as heads' do.

    `middle` [MAX_ROWS, hidden] by layer is where a pass leaves what comes out of those layers; `states` [MAX_ROWS,
    hidden] is what heads read behind a pass's rows. Raises CheckpointMismatchError for another backbone's heads and
    CudaKernelsUnavailableError for those that read too many layers.
    """

    def __init__(self, prefix: PrefixAttention, memory: StepMemory, linear: LinearBank, load: LoadKernel) -> None:
        layers, config = prefix.config.layers, memory.config
        prefix.config.check_fits(config)
        require(len(layers) <= fused_ops.MAX_MIDDLE, f"at most {fused_ops.MAX_MIDDLE} layers that heads read", layers)
        self._memory, self._linear, self._load = memory, linear, load

        def pack(matrix: nn.Linear) -> PackedLinear:
            return pack_matrix([DenseWeight(matrix.weight.detach())], "int8", memory.dtype, memory.device)

        self._query_key_value, self._output = self.matrices = pack(prefix.query_key_value), pack(prefix.output)
        self._layer = memory.add_layer()
        # What leaves the last layer stays in `x` anyway, where the norm reads it.
        own = [layer for layer in layers if layer < config.num_layers - 1]
        self._own = {layer: memory.rows(config.hidden_size) for layer in own}
        self.middle = {layer: self._own.get(layer, memory.x) for layer in layers}
        self._features = memory.rows(prefix.config.num_features * config.hidden_size)
        self.states = memory.rows(config.hidden_size)

    def prepare(self, rows: int) -> None:
        """Choose how to run both matrices for so many rows."""
        self._linear.prepare(self.matrices, rows)

    def launch(self, rows: int, attend: Callable[[int, Tensor], None]) -> None:
        """Run a pass's rows, whose hidden states are in the memory; `attend` is that of the pass's other layers."""
        memory, linear, hidden = self._memory, self._linear, self._memory.hidden[:rows]
        features = self._features[:rows]
        middle = [left[:rows] for left in self.middle.values()]
        fused_ops.gather_features(hidden, middle, _EPS, out=features, load=self._load)
        attend(self._layer, linear(features, self._query_key_value, out=memory.qkv[:rows]))
        linear(memory.attended[:rows].flatten(1), self._output, residual=hidden, out=self.states[:rows])

    @property
    def weight_bytes(self) -> int:
        return sum(matrix.num_bytes for matrix in self.matrices)

    @property
    def work_bytes(self) -> int:
        """Bytes of its buffers, without its part of the cache."""
        return sum(buffer.nbytes for buffer in (*self._own.values(), self._features, self.states))
